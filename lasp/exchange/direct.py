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
    sequence = turn.sequence
    before, behind = range(sequence.rank), range(sequence.rank + 1, sequence.size)
    if turn.reverse:
        before, behind = behind[::-1], before[::-1]
    if near:
        before, behind = before[-1:], behind[:1]
    message = local.fold(fold, None).unsqueeze(0) if near else local.packed(units)
    turn.begin(message)
    sequence.traffic.messages += bool(behind)
    sequence.traffic.bytes_sent += len(behind) * message.numel() * message.element_size()
    # The first rank reads nothing, and its stream need not wait. On a CPU ranks must meet before they write again.
    if before or not message.is_cuda:
        turn.meet()
    if not before:
        yield
        return local.zeros()
    read = [turn.board.view(sequence.rank_in_group(place), message.shape, message.dtype) for place in before]
    maps = read[0] if borrow and len(read) == 1 else torch.cat(read)
    yield
    return maps[0] if near else local.unpack(maps).fold(fold, None)


class Turn:
    """One exchange on a board; for the errors of its meeting, and to end it."""

    def __init__(self, board: Board, sequence: SequenceParallel, reverse: bool):
        self.board, self.sequence, self.reverse, self._met = board, sequence, reverse, False

    def begin(self, message: torch.Tensor) -> None:
        """Write the message for the others."""
        with waiting(self.sequence, None, reverse=self.reverse):
            self.board.begin()
        self.board.write(message)

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
