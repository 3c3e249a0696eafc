"""Every rank reads the maps of those before it from their memory, and folds them. For ranks of one host (board.py).

The all-gather of LASP-2 (arXiv 2502.07563) without messages: each rank writes its map for the others to see, they
meet, and each reads what it needs. Where no state gets past a rank (horizon.py) it reads the map of the one before it.
"""

from __future__ import annotations

import torch

from lasp.exchange.base import Fold, Schedule, StateMap, waiting
from lasp.exchange.board import Board
from lasp.mesh import SequenceParallel


def direct(local: StateMap, turn: Turn, fold: Fold, units: int, *, near: bool, borrow: bool) -> Schedule:
    """`units` maps a rank, the most that any rank has. `near`: no head needs more than the rank before this one.

    `borrow`: a state that another rank alone has made may stay where it is, for the caller to read from there.
    """
    sequence, state = turn.sequence, local.state
    before, behind = range(sequence.rank), range(sequence.rank + 1, sequence.size)
    if turn.reverse:
        before, behind = behind[::-1], before[::-1]
    if near:
        before, behind = before[-1:], behind[:1]
    shape = state.shape[1:] if near else (units, state[0].numel() + local.log_decay[0].numel())
    mine = turn.begin(shape, state.dtype)
    if near:
        mine.copy_(local.fold(fold, None))
    else:
        local.packed(units, out=mine)
    sequence.traffic.messages += bool(behind)
    sequence.traffic.bytes_sent += len(behind) * mine.numel() * mine.element_size()
    # The first rank reads nothing, and its stream need not wait. On a CPU ranks must meet before they write again.
    if before or not mine.is_cuda:
        turn.meet()
    if not before:
        yield
        return local.zeros()
    read = [turn.board.view(sequence.rank_in_group(place), mine.shape, mine.dtype) for place in before]
    maps = read[0] if borrow and len(read) == 1 else torch.cat(read)
    yield
    return maps if near else local.unpack(maps).fold(fold, None)


class Turn:
    """One exchange on a board; for the errors of its meeting, and to end it."""

    def __init__(self, board: Board, sequence: SequenceParallel, reverse: bool):
        self.board, self.sequence, self.reverse, self._met = board, sequence, reverse, False

    @property
    def joins(self) -> bool:
        """A graph might be replayed next, whose meetings must not mix with that of a rank that reads nothing."""
        return self.board.repeats

    def begin(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Where to write what the others shall read."""
        with waiting(self.sequence, None, reverse=self.reverse):
            self.board.begin()
        return self.board.mine(shape, dtype)

    def meet(self) -> None:
        """Wait until all have written."""
        with waiting(self.sequence, None, reverse=self.reverse):
            self.board.meet()
        self._met = True

    def finish(self) -> None:
        """After what was read; a rank that has read nothing meets the others here."""
        if not self._met:
            self.meet()
        self.board.end()
