"""LASP's schedule: a chain from rank to rank, point to point. (LASP, arXiv 2404.02882, algorithms 2 and 3.)

Each rank receives the state behind all ranks before it, folds its own tokens into it and sends the result on: one
message of one state a rank, whatever the number of ranks. In reverse the chain runs from the last rank to the first.
"""

from __future__ import annotations

from lasp.exchange.base import Fold, Link, Schedule, StateMap


def ring(local: StateMap, link: Link, fold: Fold) -> Schedule:
    """The first rank waits for no one and sends before the yield."""
    if link.source is None:
        if link.target is not None:
            link.send(local.fold(fold, None))
        yield
        return local.zeros()
    incoming = link.receive(local.state.shape[1:], local.state)
    yield
    entering = incoming()
    if link.target is not None:
        link.send(local.fold(fold, entering))
    return entering
