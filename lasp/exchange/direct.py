"""Every rank reads the maps of those before it from their memory, and folds them. For ranks of one host (board.py).

The all-gather of LASP-2 (arXiv 2502.07563) without messages: each rank writes its map for the others to see, they
meet, and each reads what it needs. Where no state gets past a rank (horizon.py) it reads the map of the one before it.
"""

from __future__ import annotations

import math

import torch

from lasp.exchange.base import Job, Network, Schedule, Sizes, Transfer, schedule
from lasp.exchange.board import Board
from lasp.ranks import waiting


@schedule
class Direct(Schedule):
    """alpha" + (P - 1) n / beta" seconds, of a meeting and of memory that is read directly."""

    name = "direct"
    gathers = True
    reads = True

    def needs_equal_lengths(self, ranks: int) -> bool:
        """Not of two ranks, of which neither needs more than one state of the other."""
        return ranks > 2

    def seconds(self, sizes: Sizes, ranks: int, network: Network) -> float:
        """See `Schedule`."""
        if ranks < 2:
            return 0.0
        if sizes.read is None:
            return math.inf
        return network.direct_latency + (ranks - 1) * sizes.read / network.direct_bandwidth

    def run(self, job: Job, link: Turn, blocks: int) -> Transfer:
        """`units` maps a rank, the most that any rank has; if all heads are near, one state of each."""
        sequence, local = job.sequence, job.local
        before, behind = job.before, range(sequence.rank + 1, sequence.size)
        if job.terms.reverse:
            behind = range(sequence.rank)[::-1]
        if job.near:
            before, behind = before[-1:], behind[:1]
        shape = local.state.shape[1:] if job.near else (job.units, local.map_numbers)
        mine = link.begin(shape, local.state.dtype)
        if job.near:
            mine.copy_(job.fold(None, *local))
        else:
            local.packed(job.units, out=mine)
        job.traffic.messages += bool(behind)
        job.traffic.bytes_sent += len(behind) * mine.nbytes
        # The first rank reads nothing, and its stream need not wait. On a CPU ranks must meet before they write again.
        if before or not mine.is_cuda:
            link.meet()
        if not before:
            yield
            return local.zeros()
        read = [link.board.view(sequence.in_group[place], mine.shape, mine.dtype) for place in before]
        maps = read[0] if job.terms.borrow and len(read) == 1 else torch.cat(read)
        yield
        return maps if job.near else job.fold(None, *local.unpack(maps))


class Turn:
    """One exchange on a board; for the errors of its meeting, and to end it."""

    def __init__(self, board: Board, job: Job):
        self.board, self.job, self._met = board, job, False

    @property
    def joins(self) -> bool:
        """A graph might be replayed next, whose meetings must not mix with that of a rank that reads nothing."""
        return self.board.repeats

    def begin(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Where to write what the others shall read."""
        with waiting(self.job.what):
            self.board.begin()
        return self.board.mine(shape, dtype)

    def meet(self) -> None:
        """Wait until all have written."""
        with waiting(self.job.what):
            self.board.meet()
        self._met = True

    def finish(self) -> None:
        """End the turn, after what was read; a rank that has read nothing meets the others here."""
        if not self._met:
            self.meet()
        self.board.end()
