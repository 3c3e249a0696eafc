"""Where a rank's tokens lie among those of all ranks, and which of its states come from or go to another rank.

A *run* is what a rank holds of one sequence. Packed tokens make several; all else is one run a batch entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from lasp import arguments
from lasp.ranks import SequenceParallel


@dataclass(frozen=True)
class LocalRuns:
    """One rank's part of the sequences. A dense batch is one run a batch row; packed, one a sequence."""

    cu_seqlens: tuple[int, ...] | None  # local, when packed
    sequences: range  # packed: which of the global sequences the runs belong to
    continues: bool  # the first run began on an earlier rank
    continued: bool  # the last run goes on on a later rank


@dataclass(frozen=True)
class ShardLayout:
    """How a global sequence lies on the ranks. Held on the host, so that nothing waits for a device.

    Args:
        lengths: tokens of each rank, in sequence order; zero is allowed.
        cu_seqlens: for packed sequences the global offsets, from 0 to the number of tokens without the padding (batch
            size 1).
        padding: how many tokens at the end of all are no tokens of any sequence, but make ranks hold as many. No state
            and no other token sees them, and what operators give for them is zero.

    Raises:
        ValueError, TypeError: numbers that are no integers, are negative, or do not fit together.
    """

    lengths: tuple[int, ...]
    cu_seqlens: tuple[int, ...] | None = None
    padding: int = 0
    # No fields: FSDP2 makes a dataclass anew from all of its fields.
    facts: ClassVar[tuple[Tensor, Tensor | None]]  # lengths and offsets as tensors on the host, for a custom op
    _real: ClassVar[ShardLayout]  # the same without the padding, where there is one

    def __post_init__(self):
        lengths = arguments.integers("lengths", self.lengths)
        if not lengths or min(lengths) < 0:
            raise ValueError(f"lengths must be one non-negative number of tokens a rank, got {lengths}")
        padding = arguments.integer("padding", self.padding, at_least=0)
        total = arguments.integer("the sum of lengths", sum(lengths))
        if padding > total:
            raise ValueError(f"padding must be part of the {total} tokens of all ranks, got {padding}")
        found = {"lengths": lengths, "padding": padding}
        if self.cu_seqlens is not None:
            ranks = "all ranks" + (" without padding" if padding else "")
            offsets = arguments.offsets("cu_seqlens", self.cu_seqlens, tokens=total - padding, of=ranks)
            found["cu_seqlens"] = offsets
        for name, value in found.items():
            object.__setattr__(self, name, value)
        with torch.inference_mode(False):  # a layout of an evaluation may come to training
            facts = [None if x is None else torch.tensor(x, device="cpu") for x in (self.lengths, self.cu_seqlens)]
        object.__setattr__(self, "facts", tuple(facts))
        if padding:
            object.__setattr__(self, "_real", self._without_padding())

    def _without_padding(self) -> ShardLayout:
        left, lengths = self.total - self.padding, []
        for length in self.lengths:
            lengths.append(min(length, left))
            left -= lengths[-1]
        return ShardLayout(tuple(lengths), self.cu_seqlens)

    @classmethod
    def of_facts(cls, lengths: Tensor | None, cu_seqlens: Tensor | None) -> ShardLayout | None:
        """The inverse of `facts`, for a layout without padding."""
        if lengths is None:
            return None
        return cls(tuple(lengths.tolist()), None if cu_seqlens is None else tuple(cu_seqlens.tolist()))

    @classmethod
    def even(cls, tokens: int, ranks: int, *, cu_seqlens: Sequence[int] | Tensor | None = None) -> ShardLayout:
        """Split `tokens` as evenly as whole tokens allow; the first ranks get the rest."""
        tokens, ranks = arguments.integer("tokens", tokens, at_least=0), arguments.integer("ranks", ranks, at_least=1)
        lengths = tuple(tokens // ranks + (r < tokens % ranks) for r in range(ranks))
        return cls(lengths, cu_seqlens)  # type: ignore[arg-type]

    @property
    def real(self) -> ShardLayout:
        """The layout of the same tokens without the padding."""
        return self._real if self.padding else self

    @property
    def packed(self) -> bool:
        """Whether there are documents. (Asked of the tensors: a graph that looks at the offsets is for as many.)"""
        return self.facts[1] is not None

    @property
    def total(self) -> int:
        """Tokens on all ranks, padding included."""
        return sum(self.lengths)

    def bounds(self, rank: int) -> tuple[int, int]:
        """First and last + 1 global token of a rank, padding included."""
        self._check_rank(rank)
        start = sum(self.lengths[:rank])
        return start, start + self.lengths[rank]

    def local(self, rank: int) -> LocalRuns:
        """The runs that a rank holds, without padding."""
        self._check_rank(rank)
        if self.padding:
            return self.real.local(rank)
        last_rank = rank == len(self.lengths) - 1
        if self.cu_seqlens is None:
            return LocalRuns(None, range(0), rank > 0, not last_rank)
        start, end = self.bounds(rank)
        pairs = list(zip(self.cu_seqlens, self.cu_seqlens[1:]))
        # An empty sequence lies on the rank that holds the token at its offset, or else on the last one.
        mine = [n for n, (a, b) in enumerate(pairs) if max(a, start) < min(b, end) or (a == b and self._holds(rank, a))]
        if not mine:  # no token and no sequence here: what comes in goes out
            return LocalRuns((0, 0), range(0), True, True)
        sequences = range(mine[0], mine[-1] + 1)
        offsets = tuple(min(max(n, start), end) - start for n in self.cu_seqlens[mine[0] : mine[-1] + 2])
        first, last = pairs[mine[0]], pairs[mine[-1]]
        return LocalRuns(offsets, sequences, first[0] < start, last[1] > end)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= arguments.integer("rank", rank) < len(self.lengths):
            raise ValueError(f"rank must be one of the layout's {len(self.lengths)} ranks, got {rank}")

    def _holds(self, rank: int, token: int) -> bool:
        start, end = self.bounds(rank)
        return start <= token < end or (token == self.total and rank == len(self.lengths) - 1)


@dataclass(frozen=True)
class Shard:
    """This rank's tokens among those of all ranks."""

    runs: LocalRuns
    sequence: SequenceParallel | None  # None: nothing to exchange
    num_sequences: int  # N, of all ranks
    layout: ShardLayout | None = None
    edges: bool = False  # of packed sequences only the states before the first and after the last count, [1, H, K, V]
    packed: bool = field(init=False)  # whether the tokens are several sequences, in a batch of 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "packed", self.runs.cu_seqlens is not None)

    @classmethod
    def of(
        cls,
        x: Tensor,
        layout: ShardLayout | None,
        sequence: SequenceParallel | None,
        name: str = "k",
        *,
        edges: bool = False,
    ) -> Shard:
        """The shard of an operator whose tensor `name` is x [B, T, ...]; raises where the arguments do not fit."""
        if sequence is not None and not isinstance(sequence, SequenceParallel):
            raise TypeError(f"sequence must be a lasp.SequenceParallel or None, got {arguments.shown(sequence)}")
        rank, size = (0, 1) if sequence is None else (sequence.rank, sequence.size)
        sequence = None if size == 1 else sequence
        if layout is None:
            return cls(LocalRuns(None, range(0), rank > 0, rank < size - 1), sequence, x.shape[0])
        if not isinstance(layout, ShardLayout):
            raise TypeError(f"layout must be a lasp.ShardLayout or None, got {arguments.shown(layout)}")
        if len(layout.lengths) != size:
            alone = ": was lasp.parallelize called, or sequence= passed to the operator?" if size == 1 else ""
            raise ValueError(f"layout is for {len(layout.lengths)} ranks, but the sequence has {size}{alone}")
        if layout.lengths[rank] != x.shape[1]:
            raise ValueError(f"layout gives rank {rank} {layout.lengths[rank]} tokens, but {name} has {x.shape[1]}")
        if layout.cu_seqlens is not None and x.shape[0] != 1:
            raise ValueError(f"packed sequences (cu_seqlens) need a batch of 1, got {x.shape[0]}")
        count = x.shape[0] if layout.cu_seqlens is None or edges else len(layout.cu_seqlens) - 1
        return cls(layout.local(rank), sequence, count, layout, edges and layout.cu_seqlens is not None)

    @property
    def first_token(self) -> int:
        """The first token of this rank among those of all ranks. Without a layout only a single rank knows."""
        if self.layout is None:
            assert self.sequence is None
            return 0
        return self.layout.bounds(0 if self.sequence is None else self.sequence.rank)[0]

    @property
    def tokens_before(self) -> int | None:
        """How many tokens of the first run lie on earlier ranks; None where no layout tells."""
        if not self.runs.continues:
            return 0
        if self.layout is None:
            return None
        if self.layout.cu_seqlens is None:
            return self.first_token
        return self.first_token - max(n for n in self.layout.cu_seqlens[:-1] if n <= self.first_token)

    def own_states(self, states: Tensor | None, zeros: Tensor, *, first: bool) -> Tensor:
        """Of the states before (`first`) or after all sequences, those of the runs that begin or end here.

        [runs, H, K, V]; the zeros stay where that end of a run lies on another rank.
        """
        if states is not None:
            here, there = self._ends(first)
            zeros[self._row(here, zeros)] = states[there].to(zeros.dtype)
        return zeros

    def all_states(self, own: Tensor, *, first: bool) -> Tensor:
        """The inverse: states of local runs at the place of their sequence, zero for those of other ranks."""
        states = own.new_zeros(self.num_sequences, *own.shape[1:])
        here, there = self._ends(first)
        states[there] = own[self._row(here, own)]
        return states

    def _ends(self, first: bool) -> tuple[slice, slice]:
        """Which local runs begin (`first`) or end on this rank, and which global sequences they are."""
        elsewhere = self.runs.continues if first else self.runs.continued
        if not self.packed:
            rows = slice(0, 0 if elsewhere else None)
            return rows, rows
        count = len(self.runs.sequences)
        if self.edges:
            assert self.layout is not None
            assert self.layout.cu_seqlens is not None
            last = len(self.layout.cu_seqlens) - 1
            if elsewhere or not count or (self.runs.sequences.start if first else self.runs.sequences.stop - last):
                return slice(0, 0), slice(0, 0)
            return (slice(0, 1) if first else slice(count - 1, count)), slice(0, 1)
        low, high = (int(elsewhere), count) if first else (0, count - int(elsewhere))
        start = self.runs.sequences.start
        return slice(low, max(low, high)), slice(start + low, start + max(low, high))

    def _row(self, here: slice, states: Tensor) -> slice:
        """Operators of one state a channel have only that of the run at a border of the tokens."""
        return slice(0, here.stop - here.start) if self.edges and len(states) == 1 else here

    def lets_pass(self, *, reverse: bool) -> bool:
        """Whether a state that comes from before this rank goes on behind it: no sequence begins here."""
        return _lets_pass(self.runs, reverse)

    def reach(self, *, reverse: bool) -> int | None:
        """How many of the ranks before (`reverse`: behind) this one have a state that comes here; None: all."""
        if not self.packed or self.layout is None or self.sequence is None:
            return None
        step, place, count = 1 if reverse else -1, self.sequence.rank, 0
        while 0 <= (place := place + step) < self.sequence.size:
            count += 1
            if not _lets_pass(self.layout.local(place), reverse):
                break
        return count

    def at_border(self, x: Tensor, *, reverse: bool) -> Tensor:
        """From [runs, ...] the run that the next rank (`reverse`: the previous) goes on with; dense, all of them."""
        return x[slice(0, 1) if reverse else slice(-1, None)] if self.packed else x

    def own_at_border(self, own: Tensor, *, reverse: bool) -> Tensor:
        """From own states the one of that run. If there is only one, it is of the run at the other end."""
        if self.edges and len(own) == 1 and len(self.runs.sequences) > 1:
            return torch.zeros_like(own)
        return self.at_border(own, reverse=reverse)

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
