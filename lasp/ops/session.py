"""What is carried on behind a prompt, for as long as tokens come: the states of `lasp.prefill` and `lasp.generate`.

It is a stream (stream.py) without end and without backward. A prompt runs in segments, over the ranks, and what leaves
the last one is kept. Then tokens come one by one, a token of each row at a time:

    segment     an operator takes what enters, and hands over what leaves it
    token       it changes what it holds in place, so that it stays where it is and a step can be a CUDA graph

What is held is by layer, operator, and how often that was called before in the same run. Its rows are those of the
batch. There are two kinds: what has one size for ever (states, the last tokens before a convolution, in a block or
window), and the keys and values of softmax attention without a window, of which there are as many as tokens.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.layout import ShardLayout
from lasp.ops.stream import Carrier, Segment
from lasp.ranks import SequenceParallel


class Key(NamedTuple):
    """What tells a call from the others of a run; the same in every run."""

    layer: str
    operator: str
    count: int  # of the operator's calls in the layer before this one


class Held(NamedTuple):
    """What one call carries on.

    Args:
        x: [B, ...]; if it grows [B, room, ...], of which a row uses the first tokens.
        grows: whether each row holds as much as it has seen tokens.
    """

    x: Tensor
    grows: bool = False


class Seen(NamedTuple):
    """Keys and values that queries look at."""

    tokens: Tensor  # [B, before + T, H, K + V]
    before: int  # how many of them are before the first query
    real: Tensor | None  # [B, before + T]: which of them are a row's; None: all


class Session(Carrier):
    """Rows of tokens under way.

    Args:
        held: by key; empty at first.
        name: whose it is, for messages.
    """

    def __init__(self, held: dict[Key, Held], name: str):
        self.kept, self.name = dict(held), name
        self.room = 0  # tokens for which what grows has room at first
        self.lengths: Sequence[int] = ()  # tokens that each row has seen, in a step of one token
        self.positions: Tensor  # [B], int64: the same on the device
        self._one_token = False
        self._thread: int | None = None  # that runs the model now; None between two runs
        self._counts: Counter[tuple[str, str]] = Counter()

    def begin_segment(self, segment: Segment) -> None:
        """The model is about to run on some tokens, behind `segment.before` others of all rows."""
        self.segment, self._one_token, self._thread = segment, False, threading.get_ident()
        self._counts.clear()

    def begin_token(self, lengths: Sequence[int], positions: Tensor) -> None:
        """The model is about to run on one token of each row."""
        before = max(lengths)
        self.segment = Segment(0, before, before + 1, _ONE, before, True)
        self.lengths, self.positions, self._one_token = lengths, positions, True
        self._thread = threading.get_ident()
        self._counts.clear()

    def end(self) -> None:
        """The model has run; raises `RuntimeError` unless it has called its operators as in the runs before."""
        self._thread = None
        called = Counter((key.layer, key.operator) for key in self.kept)
        if called == self._counts:
            return
        odd = [x for x in {**called, **self._counts} if called[x] != self._counts[x]]
        told = [
            f"{operator} of layer {layer!r} was called {self._counts[layer, operator]} times, before "
            f"{called[layer, operator]} times"
            for layer, operator in odd[:3]
        ]
        raise RuntimeError(f"in {self.name} {'; '.join(told)}: a model must call its operators in every run alike")

    # What a model of another library asks (lasp.adapters)

    @property
    def longest_document(self) -> int:
        """Tokens of a row, when the call that runs is over."""
        return self.room

    def largest_position(self) -> int:
        """The largest position among these."""
        return self.room - 1

    # What a call does

    def key_of(self, sequence: SequenceParallel, operator: str) -> Key:
        """The key of the call that begins now."""
        if self._thread != threading.get_ident():
            raise RuntimeError(
                f"the model was called while {self.name} is under way with it, in another thread or by its streamer, "
                "and would have gone on from that state: wait for its end, or take a copy, made before lasp.parallelize"
            )
        place = sequence.name, operator
        self._counts[place] += 1
        return Key(*place, self._counts[place] - 1)

    def entering(self, key: Key) -> Tensor | None:
        """What comes from the run before; None at the beginning."""
        assert self.segment is not None
        return self._of(key).x if self.segment.before else None

    def leave(self, key: Key, x: Tensor) -> None:
        """Keep what leaves this run, which enters the next."""
        x = x.detach()
        whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
        self.kept[key] = Held(x if whole else x.clone(memory_format=torch.contiguous_format))

    def held(self, sequence: SequenceParallel, operator: str) -> Tensor | None:
        """In a step of one token, what the call that begins changes in place; None in a segment."""
        return self._of(self.key_of(sequence, operator)).x if self._one_token else None

    def _of(self, key: Key) -> Held:
        found = self.kept.get(key)
        if found is None:
            raise RuntimeError(
                f"{key.operator} of layer {key.layer!r} is called in {self.name} as number {key.count}, but was not in "
                "the run before: a model must call its operators in every run alike"
            )
        return found

    # Keys and values

    def with_tokens_before(self, key: Key, tokens: Tensor, window: int | None) -> Seen:
        """The tokens [B, T, ...] of all ranks in this run behind those that they see; they are held from now on.

        Raises:
            ValueError: those are of another dtype, as under another autocast.
        """
        assert self.segment is not None
        if self.segment.before and (there := self._of(key).x.dtype) != tokens.dtype:
            raise ValueError(
                f"state must be gone on from in the dtype, or under the autocast, in which it was made: layer "
                f"{key.layer!r} holds keys and values of {there}, got {tokens.dtype}"
            )
        if window is None:
            return self._behind_all(key, tokens)
        return self._in_window(key, tokens, window - 1)

    def _in_window(self, key: Key, tokens: Tensor, reach: int) -> Seen:
        """The last `reach` are held, behind zeros while there are not as many."""
        assert self.segment is not None
        if not self._one_token:
            before = min(reach, self.segment.before)
            if self.segment.before:
                tokens = torch.cat([self._of(key).x[:, reach - before :], tokens], 1)
            last = tokens[:, max(0, tokens.shape[1] - reach) :]
            held = tokens.new_zeros(len(tokens), reach, *tokens.shape[2:])
            held[:, reach - last.shape[1] :] = last
            self.kept[key] = Held(held)
            return Seen(tokens, before, None)
        held = self._of(key).x
        tokens = torch.cat([held, tokens], 1)
        held.copy_(tokens[:, 1:])
        places = torch.arange(reach + 1, device=tokens.device)
        return Seen(tokens, reach, places >= (reach - self.positions)[:, None])

    def _behind_all(self, key: Key, tokens: Tensor) -> Seen:
        assert self.segment is not None
        before, more = self.segment.before, tokens.shape[1]
        held = self._of(key).x if before else tokens.new_empty(len(tokens), 0, *tokens.shape[2:])
        if held.shape[1] < before + more:
            held = with_room(held, before, max(before + more, 2 * held.shape[1], self.room))
        self.kept[key] = Held(held, grows=True)
        if not self._one_token:
            held[:, before : before + more] = tokens
            return Seen(held[:, : before + more], before, None)
        rows = torch.arange(len(tokens), device=tokens.device)
        held[rows, self.positions] = tokens[:, 0]
        seen = held[:, : before + 1]
        if min(self.lengths) == before:
            return Seen(seen, before, None)
        # A row with fewer tokens has its own last one at its place, and what is behind is none.
        return Seen(seen, before, torch.arange(before + 1, device=tokens.device) <= self.positions[:, None])


_ONE = ShardLayout((1,))


def with_room(x: Tensor, used: int, room: int) -> Tensor:
    """[B, room, ...] that begins with the first `used` tokens of x; zeros behind."""
    found = x.new_zeros(len(x), room, *x.shape[2:])
    found[:, :used] = x[:, :used]
    return found
