"""The All-Scan of ZeCO: the chain of ring.py, in blocks of rows. (arXiv 2507.01004, section 3.)

    rank 0   send 1  send 2  send 3
    rank 1           send 1  send 2  send 3            time ->
    rank 2                   send 1  send 2  send 3

The state is cut along K, and each block is folded and sent on as soon as it is there. With B blocks a state needs the
time of (P - 1) / B + 1 transfers instead of P - 1. A decay per channel is cut with the rows that it scales.
"""

from __future__ import annotations

import torch

from lasp.exchange.base import Fold, Link, Schedule, StateMap


def pipeline(local: StateMap, link: Link, fold: Fold, blocks: int) -> Schedule:
    """`blocks` as cost.py finds it; the last one may be shorter."""
    rows = local.state.shape[3]
    cuts = [slice(first, first + -(-rows // blocks)) for first in range(0, rows, -(-rows // blocks))]
    parts = [_rows(local, cut) for cut in cuts]
    if link.source is None:
        if link.target is not None:
            for part in parts:
                link.send(part.fold(fold, None))
        yield
        return local.zeros()
    incoming = link.receive(parts[0].state.shape[1:], local.state)
    yield
    entering = []
    # A block is passed on before the next is asked for: NCCL runs the messages of a rank one after the other.
    for n, part in enumerate(parts):
        entering.append(incoming())
        if link.target is not None:
            link.send(part.fold(fold, entering[-1]))
        if n + 1 < len(parts):
            incoming = link.receive(parts[n + 1].state.shape[1:], local.state)
    return torch.cat(entering, 2)


def _rows(local: StateMap, cut: slice) -> StateMap:
    per_channel = local.log_decay.shape[3] > 1
    return StateMap(local.state[..., cut, :], local.log_decay[..., cut] if per_channel else local.log_decay)
