"""One hop: every rank sends to the rank behind it at once, and waits for the rank before it only.

Enough for the heads whose state no rank lets pass (see horizon.py): what enters a rank is then made by the rank before
it alone. All hops happen at the same time, so that this takes as long on 1,000 ranks as on 3.
"""

from __future__ import annotations

from lasp.exchange.base import Fold, Link, Schedule, StateMap


def neighbour(local: StateMap, link: Link, fold: Fold) -> Schedule:
    """NCCL runs the messages of a rank one after the other: so every other rank begins with its receipt.

    Otherwise the first hop would have to end before the second can begin, and so on.
    """
    incoming = None
    sends_first = link.sequence.rank % 2 == 0
    if sends_first and link.target is not None:
        link.send(local.fold(fold, None))
    if link.source is not None:
        incoming = link.receive(local.state.shape[1:], local.state)
    if not sends_first and link.target is not None:
        link.send(local.fold(fold, None))
    yield
    return local.zeros() if incoming is None else incoming()
