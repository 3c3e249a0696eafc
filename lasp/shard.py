"""Where a rank's tokens lie among those of all ranks, and which of its states come from or go to another rank.

A *run* is what a rank holds of one sequence. Packed tokens make several; all else is one run a batch entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lasp.data import LocalRuns, ShardLayout
from lasp.mesh import SequenceParallel


@dataclass(frozen=True)
class Shard:
    """This rank's tokens among those of all ranks."""

    runs: LocalRuns
    sequence: SequenceParallel | None  # None: nothing to exchange
    num_sequences: int  # N, of all ranks
    layout: ShardLayout | None = None

    @classmethod
    def of(cls, k: Tensor, layout: ShardLayout | None, sequence: SequenceParallel | None) -> Shard:
        """From the arguments of `linear_attention`; raises where they do not fit each other."""
        if sequence is not None and not isinstance(sequence, SequenceParallel):
            raise TypeError(f"sequence must be a lasp.SequenceParallel or None, got {type(sequence).__name__}")
        rank, size = (0, 1) if sequence is None else (sequence.rank, sequence.size)
        sequence = None if size == 1 else sequence
        if layout is None:
            return cls(LocalRuns(None, range(0), rank > 0, rank < size - 1), sequence, k.shape[0])
        if len(layout.lengths) != size:
            raise ValueError(f"layout is for {len(layout.lengths)} ranks, but the sequence has {size}")
        if layout.lengths[rank] != k.shape[1]:
            raise ValueError(f"layout gives rank {rank} {layout.lengths[rank]} tokens, but k has {k.shape[1]}")
        if layout.cu_seqlens is not None and k.shape[0] != 1:
            raise ValueError(f"packed sequences (cu_seqlens) need a batch of 1, got {k.shape[0]}")
        count = k.shape[0] if layout.cu_seqlens is None else len(layout.cu_seqlens) - 1
        return cls(layout.local(rank), sequence, count, layout)

    @property
    def packed(self) -> bool:
        """Whether the tokens are several sequences, in a batch of 1."""
        return self.runs.cu_seqlens is not None

    def own_states(self, states: Tensor | None, zeros: Tensor, *, first: bool) -> Tensor:
        """Of the states before (`first`) or after all sequences, those of the runs that begin or end here.

        [runs, H, K, V]; the zeros stay where that end of a run lies on another rank.
        """
        if states is not None:
            here, there = self._ends(first)
            zeros[here] = states[there].to(zeros.dtype)
        return zeros

    def all_states(self, own: Tensor, *, first: bool) -> Tensor:
        """The inverse: states of local runs at the place of their sequence, zero for those of other ranks."""
        states = own.new_zeros(self.num_sequences, *own.shape[1:])
        here, there = self._ends(first)
        states[there] = own[here]
        return states

    def _ends(self, first: bool) -> tuple[slice, slice]:
        """Which local runs begin (`first`) or end on this rank, and which global sequences they are."""
        elsewhere = self.runs.continues if first else self.runs.continued
        if not self.packed:
            rows = slice(0, 0 if elsewhere else None)
            return rows, rows
        count = len(self.runs.sequences)
        low, high = (int(elsewhere), count) if first else (0, count - int(elsewhere))
        start = self.runs.sequences.start
        return slice(low, max(low, high)), slice(start + low, start + max(low, high))

    def lets_pass(self, *, reverse: bool) -> bool:
        """Whether a state that comes from before this rank goes on behind it: no sequence begins here."""
        return _lets_pass(self.runs, reverse)

    def at_border(self, x: Tensor, *, reverse: bool) -> Tensor:
        """Of [runs, ...] the run that the next rank (`reverse`: the previous) goes on with; dense, all of them."""
        return x[slice(0, 1) if reverse else slice(-1, None)] if self.packed else x

    def enter(self, own: Tensor | None, received: Tensor, *, reverse: bool) -> Tensor | None:
        """The state that enters every run: what was received, where a run began elsewhere; else its own."""
        elsewhere = self.runs.continued if reverse else self.runs.continues
        if not elsewhere:
            return own
        if not self.packed:
            return received
        assert own is not None
        return torch.cat([own[:-1], received] if reverse else [received, own[1:]])


def _lets_pass(runs: LocalRuns, reverse: bool) -> bool:
    one_run = runs.cu_seqlens is None or len(runs.cu_seqlens) == 2
    return one_run and (runs.continued if reverse else runs.continues)


@lru_cache(maxsize=64)
def crossed_tokens(layout: ShardLayout, reverse: bool) -> tuple[int, ...]:
    """Tokens of the ranks that lie between two others and let a state pass."""
    inner = range(1, len(layout.lengths) - 1)
    return tuple(layout.lengths[r] for r in inner if _lets_pass(layout.local(r), reverse))
