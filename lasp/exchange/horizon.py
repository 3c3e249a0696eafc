"""Which heads' states get past a rank at all, known on the host before anything starts.

A fixed decay g per token leaves exp(T g) of a state after T tokens. In fp32 that is exactly 0 once T |g| > 104 (the
smallest number is 2^-149, and what is below half of it is rounded to 0), in fp64 once T |g| > 746. If that is so on
every rank that lies between two others, then what enters a rank comes from the rank before it alone: the head needs its
neighbour only (neighbour.py), never the chain. Nothing is approximated: the bits are those of the chain.

`python bench/horizon_savings.py` prints what that saves. A matrix has no horizon: what it forgets depends on the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lasp.exchange.maps import HeadRuns

EXPONENT = {torch.float32: 104.0, torch.float64: 746.0}  # exp(-x) is 0 for all x above


def far_heads(rates: Sequence[float] | None, heads: int, crossed: Sequence[int] | None, dtype: torch.dtype) -> HeadRuns:
    """The heads whose state gets past some rank, and must therefore go through the chain.

    Args:
        rates: the fixed log-decay of each head; None if there is none, or the host does not know it.
        heads: their number.
        crossed: for each rank between two others, how many tokens a state crosses at once there; ranks that nothing
            passes, because a sequence begins there, are left out. None if the host does not know: then all are far.
        dtype: of the state.
    """
    if crossed is None:
        return ((0, heads),)
    if not crossed:
        return ()
    tokens = min(crossed)
    far = [h for h in range(heads) if rates is None or -rates[h] * tokens <= EXPONENT[dtype]]
    return runs_of(far)


def memory(rates: Sequence[float] | None, dtype: torch.dtype) -> float:
    """Tokens after which nothing is left of a state, in any head: infinite unless all decay at a known rate."""
    slowest = max(rates, default=0.0) if rates is not None else 0.0
    return math.ceil(EXPONENT[dtype] / -slowest) if slowest < 0 else math.inf


def runs_of(heads: Sequence[int]) -> HeadRuns:
    """Ascending heads as runs of neighbouring ones."""
    starts = [h for h in heads if h - 1 not in heads]
    ends = [h + 1 for h in heads if h + 1 not in heads]
    return tuple(zip(starts, ends))


def others(heads: HeadRuns, number: int) -> HeadRuns:
    """The heads of `number` that are in none of the runs."""
    borders = [0, *(h for run in heads for h in run), number]
    return tuple((a, b) for a, b in zip(borders[::2], borders[1::2]) if a < b)
