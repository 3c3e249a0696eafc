"""What crosses the borders between the segments of a streamed sequence, for `lasp.stream_backward`. (`lasp.prefill` and
`lasp.generate` are streams without end and without backward: session.py.)

    forward     segment 0 ──S──> segment 1 ──S──> segment 2    of each call of an operator: its state, or last tokens
    backward    segment 0 <─dS── segment 1 <─dS── segment 2

A model runs on one segment after the other and does not know it. An operator asks whether the ranks of its layer have a
stream under way. If so, what enters its call comes from the segment before, and what leaves it is kept for the one
behind. Backward goes from the last segment to the first: the gradient of what entered a segment becomes that of what
left the segment before. Two nodes of autograd's graph, `_Enter` and `_Leave`, do this and nothing else. So neither the
graphs of two segments nor a checkpoint's recompute need to know of each other.

A call in one segment continues that call of the segment before which has the same layer, operator and count (how often
the operator was called in the layer so far). In the recompute of a checkpoint the count is that of the original.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from lasp.layout import ShardLayout
from lasp.ops import recompute
from lasp.ranks import SequenceParallel

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Segment:
    """Some of the tokens of a sequence.

    Args:
        number: from 0.
        start: its first token, among all.
        end: the one behind its last.
        layout: how its tokens lie on the ranks, with its parts of packed documents.
        before: how many tokens of the document of its first token lie in earlier segments.
        continued: whether the document of its last token goes on in the next.
    """

    number: int
    start: int
    end: int
    layout: ShardLayout
    before: int
    continued: bool


class Key(NamedTuple):
    """What tells a call from the others of a segment; the same in every segment."""

    layer: int  # the handle of its ranks
    operator: str
    count: int  # of the operator's calls in the layer before this one


class Carrier:
    """What a model carries from one run to the next. Layers find it at their ranks (`SequenceParallel.stream`)."""

    name: str  # of whose it is, for messages
    segment: Segment | None = None  # that runs now

    def key_of(self, sequence: SequenceParallel, operator: str) -> Any:
        """The key of the call that begins now."""
        raise NotImplementedError

    def entering(self, key: Any) -> Tensor | None:
        """What comes from the segment before; None where no document comes from there."""
        raise NotImplementedError

    def leave(self, key: Any, x: Tensor) -> None:
        """Keep what leaves this segment, which enters the one behind."""
        raise NotImplementedError

    def held(self, sequence: SequenceParallel, operator: str) -> Tensor | None:
        """Where a step of one token runs, what the call that begins now enters with, to be changed in place into what
        leaves it. None where a segment runs."""
        return None


class Stream(Carrier):
    """A sequence under way in `lasp.stream_backward`."""

    name = "lasp.stream_backward"

    def __init__(self, segments: Sequence[Segment], longest_document: int, largest_position: Callable[[], int]) -> None:
        self.segments, self.longest_document = segments, longest_document
        self.largest_position = largest_position  # of the whole sequence
        self.sweeping = False  # forward alone, to learn what enters the segments
        self._thread: int | None = None  # that runs the model
        self._counts: Counter[tuple[int, str]] = Counter()
        self._usual: Counter[tuple[int, str]] | None = None  # calls of a segment
        self._names: dict[int, str] = {}
        self._entering: dict[int, dict[Key, Kept]] = {}  # by segment
        self._d_entering: dict[Key, Tensor] = {}  # gradients of what entered the segment that runs
        self._d_leaving: dict[Key, Tensor] = {}  # of what leaves it: what entered the segment behind
        self._tokens: dict[int, dict[Key, tuple[Kept, ...]]] = {}  # keys and values, by segment, for those behind
        self._d_tokens: dict[tuple[int, Key], Kept] = {}  # their gradients, as far as they have been added up
        self._sums: dict[int, Tensor] = {}  # over segments, by what adds them up
        self.bytes = 0  # kept of all borders
        self.bytes_of_tokens = 0  # kept of all segments
        self.crossings = 0  # of the border that holds most

    # What the sweep over the segments does

    def begin(self, segment: Segment, *, sweeping: bool) -> None:
        """The model is about to run on it: forward and backward, or forward alone if `sweeping`."""
        if not sweeping:
            self._d_leaving, self._d_entering = self._d_entering, {}
        for x in self._entering.get(segment.number - 1, {}).values():
            if sweeping:
                x.put_away()
            else:
                x.fetch()  # while this one runs
        self.segment, self.sweeping, self._thread = segment, sweeping, threading.get_ident()
        self._counts.clear()

    def end_forward(self) -> None:
        """Raise `RuntimeError` unless the operators were called as in the segments before."""
        if self._usual is None:
            self._usual = Counter(self._counts)
        if self._usual != self._counts:
            odd = [key for key in {**self._usual, **self._counts} if self._usual[key] != self._counts[key]]
            told = [
                f"{operator} of layer {self._names[layer]!r} was called {self._counts[layer, operator]} times, before "
                f"{self._usual[layer, operator]} times"
                for layer, operator in odd[:3]
            ]
            raise RuntimeError(
                f"in segment {self._segment().number} of lasp.stream_backward {'; '.join(told)}: a model must call its "
                "operators in every segment alike"
            )

    def end_backward(self) -> None:
        """Drop what was kept for the segment that has ended."""
        number = self._segment().number
        self._entering.pop(number, None)
        self._d_leaving = {}
        for key in self._tokens.pop(number, {}):
            self._d_tokens.pop((number, key), None)

    def _segment(self) -> Segment:
        assert self.segment is not None
        return self.segment

    # What a call does

    def key_of(self, sequence: SequenceParallel, operator: str) -> Key:
        """The key of the call that begins now."""
        layer = int(sequence.handle)
        self._names[layer] = sequence.name
        here = recompute.reception(f"the border of {operator} of layer {sequence.name!r} {layer}")
        if here.result is not None:
            return Key(layer, operator, int(here.result))
        if self._thread != threading.get_ident() and not recompute.under_way():  # which autograd has threads for
            raise RuntimeError(
                "the model was called while lasp.stream_backward is under way with it, in another thread, and would "
                "have gone on from a segment of it: wait for its end, or take a copy, made before lasp.parallelize"
            )
        count = self._counts[layer, operator]
        if recompute.under_way():  # whose original is not known
            if count > 1:
                raise RuntimeError(
                    f"{operator} of layer {sequence.name!r} is called {count} times in a segment of "
                    "lasp.stream_backward, and a recompute that does not tell which of them it repeats: pass "
                    "use_reentrant=False to the checkpoint"
                )
            return Key(layer, operator, 0)
        self._counts[layer, operator] += 1
        here.keep(torch.tensor(count, device="cpu"))
        return Key(layer, operator, count)

    def entering(self, key: Key) -> Tensor | None:
        """What comes from the segment before; None where no document comes from there."""
        segment = self._segment()
        if not segment.before:
            return None
        kept = self._entering.get(segment.number, {}).get(key)
        if kept is None:
            raise RuntimeError(
                f"{key.operator} of layer {self._names[key.layer]!r} is called in segment {segment.number} of "
                f"lasp.stream_backward as number {key.count}, but was not in the segment before: a model must call its "
                "operators in every segment alike"
            )
        return kept.get()

    def leave(self, key: Key, x: Tensor) -> None:
        """Keep what leaves this segment, which enters the one behind."""
        if self.sweeping:
            there = self._entering.setdefault(self._segment().number + 1, {})
            there[key] = Kept(x)
            self.bytes += x.nbytes
            self.crossings = max(self.crossings, len(there))

    def put_d_entering(self, key: Key, gradient: Tensor) -> None:
        """Keep the gradient of what entered, for the segment before."""
        if self._segment().before:
            self._d_entering[key] = gradient

    def take_d_leaving(self, key: Key) -> Tensor | None:
        """The gradient of what left, from the segment behind; None if none came from there."""
        return self._d_leaving.pop(key, None)

    # Sums over all tokens, whose product is no sum over segments

    @property
    def has_sums(self) -> bool:
        """Whether there are such."""
        return bool(self._sums)

    def over_segments(self, sequence: SequenceParallel, of_segment: Tensor) -> Tensor:
        """The sum over all segments of a tensor without gradient, known in the runs with backward. In the sweep the sum
        so far, of which nothing is used."""
        layer, number = int(sequence.handle), self._segment().number
        if self.sweeping or number == len(self.segments) - 1:  # over which no sweep goes
            self._sums[layer] = of_segment if layer not in self._sums else self._sums[layer] + of_segment
        return self._sums[layer]

    # Tokens that are looked at again

    def keep_tokens(self, key: Key, tensors: Sequence[Tensor]) -> None:
        """Keep tensors of the segment that runs, for those behind."""
        if self.sweeping and self._segment().continued:
            kept = tuple(Kept(x) for x in tensors)
            for x in kept:
                x.put_away()
            self._tokens.setdefault(self._segment().number, {})[key] = kept
            self.bytes_of_tokens += sum(x.nbytes for x in tensors)

    def tokens(self, number: int, key: Key) -> tuple[Kept, ...]:
        """What was kept of an earlier segment."""
        kept = self._tokens.get(number, {}).get(key)
        if kept is None:
            raise RuntimeError(
                f"{key.operator} of layer {self._names[key.layer]!r} is called in segment {self._segment().number} of "
                f"lasp.stream_backward as number {key.count}, but was not in segment {number}: a model must call its "
                "operators in every segment alike"
            )
        return kept

    def add_d_tokens(self, number: int, key: Key, gradient: Tensor) -> None:
        """Add to the gradient of what was kept of an earlier segment."""
        kept = self._d_tokens.get((number, key))
        if kept is None:
            self._d_tokens[number, key] = Kept(gradient)
            self._d_tokens[number, key].put_away()
        else:
            kept.add(gradient)

    def take_d_tokens(self, key: Key) -> Tensor | None:
        """The gradient of what was kept of the segment that runs: all segments behind it have added to it."""
        kept = self._d_tokens.pop((self._segment().number, key), None)
        return None if kept is None else kept.get()


class Earlier:
    """The tokens of earlier segments that a call of an operator looks at."""

    def __init__(self, stream: Stream, key: Key):
        assert stream.segment is not None
        self._stream, self._key, self.segment = stream, key, stream.segment

    def visible(self, reach: int | None) -> list[Segment]:
        """Earlier segments in which a token of this one sees something; `reach` tokens before itself, None is all."""
        first = self.segment.start - min(self.segment.before, self.segment.before if reach is None else reach)
        return [x for x in self._stream.segments[: self.segment.number] if x.end > first]

    def keep(self, *tensors: Tensor) -> None:
        """This call's own, for segments behind this one."""
        self._stream.keep_tokens(self._key, tensors)

    @contextlib.contextmanager
    def of(self, segment: Segment, following: Segment | None) -> Iterator[tuple[Tensor, ...]]:
        """What was kept of an earlier segment; meanwhile the following begins to come."""
        kept = self._stream.tokens(segment.number, self._key)
        found = tuple(x.get() for x in kept)
        if following is not None:
            for x in self._stream.tokens(following.number, self._key):
                x.fetch()
        try:
            yield found
        finally:
            for x in kept:
                x.put_away()

    def add_gradient(self, segment: Segment, gradient: Tensor) -> None:
        """Add to the gradient of what was kept of an earlier segment."""
        self._stream.add_d_tokens(segment.number, self._key, gradient)

    def own_gradient(self) -> Tensor | None:
        """The gradient of this call's own tensors, from all segments behind this one."""
        return self._stream.take_d_tokens(self._key)


def earlier(operator: str, sequence: SequenceParallel) -> Earlier:
    """The earlier tokens that the call which begins now looks at, of an operator that sees all tokens before."""
    return Earlier(sequence.stream, sequence.stream.key_of(sequence, operator))


class Crossing:
    """What enters and leaves one call of an operator."""

    def __init__(self, stream: Carrier, key: Any):
        self._stream, self._key = stream, key
        assert stream.segment is not None
        self.entering, self.segment = stream.entering(key), stream.segment
        self.leaves = self.segment.continued

    def enter(self, given: Tensor | None, *anchors: Tensor | None) -> Tensor | None:
        """What the call begins with: what came from the segment before; None if nothing does, nor was `given`.

        Args:
            given: the caller's own initial states, one a sequence. Only that of the first is not the caller's.
            anchors: other tensors of the call: where one of them needs a gradient, what enters gets one, too.
        """
        if self.entering is None:
            return given
        return _Enter.apply(self, given, *anchors)  # type: ignore[return-value]

    def leave(self, o: Tensor, leaving: Tensor | None) -> Tensor:
        """The call's result, from whose backward what left it gets its gradient."""
        if not self.leaves:
            return o
        assert leaving is not None
        self._stream.leave(self._key, leaving[-1:] if self._has_rows(leaving) else leaving)
        return _Leave.apply(self, o, leaving)  # type: ignore[return-value]

    def _has_rows(self, states: Tensor) -> bool:
        """Whether they are of packed sequences, of which one crosses the border."""
        return self.segment.layout.packed and len(states) > 1

    def initial(self, given: Tensor | None) -> Tensor:
        """The initial states, with what came from the segment before in the first one's place."""
        assert self.entering is not None
        if given is None or not self._has_rows(given):
            return self.entering.detach()
        return torch.cat([self.entering, given[1:].to(self.entering.dtype)])

    def put_d_entering(self, d_initial: Tensor, given: bool) -> Tensor | None:
        """Hand what entered its gradient, which goes to the segment before; returns that of `given`."""
        assert isinstance(self._stream, Stream)
        if not given or not self._has_rows(d_initial):
            self._stream.put_d_entering(self._key, d_initial)
            return None
        self._stream.put_d_entering(self._key, d_initial[:1])
        return torch.cat([torch.zeros_like(d_initial[:1]), d_initial[1:]])

    def take_d_leaving(self, shape: torch.Size) -> Tensor | None:
        """The gradient of what left, in the `shape` of all states of the call."""
        assert isinstance(self._stream, Stream)
        found = self._stream.take_d_leaving(self._key)
        if found is None or found.shape == shape:
            return found
        return torch.cat([found.new_zeros(shape[0] - 1, *shape[1:]), found])


def _crossing(operator: str, sequence: SequenceParallel) -> Crossing:
    return Crossing(sequence.stream, sequence.stream.key_of(sequence, operator))


def crossing(operator: str, sequence: Any) -> Crossing | None:
    """The crossing of the call that begins now; None where nothing is streamed, as nearly always."""
    if not isinstance(sequence, SequenceParallel) or sequence.stream is None:
        return None
    return _crossing(operator, sequence)


def under_way(sequence: Any) -> bool:
    """Whether a layer with these ranks runs on a segment."""
    return isinstance(sequence, SequenceParallel) and sequence.stream is not None


def held(operator: str, sequence: Any) -> Tensor | None:
    """What the call that begins now holds, in a step of one token (`Carrier.held`)."""
    return sequence.stream.held(sequence, operator)


def no_final_state(wanted: bool, sequence: Any) -> None:
    """Raise if a model asks for a state that is not there yet."""
    if wanted:
        raise ValueError(
            f"output_final_state is True in a model that {sequence.stream.name} runs: the state behind a segment is "
            "not that behind the sequence"
        )


def in_eager(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorator: a graph of torch.compile ends here."""
    return torch._disable_dynamo(function)  # type: ignore[attr-defined,reportPrivateImportUsage]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, crossing, given, *anchors):
        ctx.crossing, ctx.given, ctx.others = crossing, given is not None, len(anchors)
        ctx.dtype = None if given is None else given.dtype
        return crossing.initial(given)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        d_given = ctx.crossing.put_d_entering(gradient, ctx.given)
        return None, None if d_given is None else d_given.to(ctx.dtype), *[None] * ctx.others


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, crossing, o, leaving):
        ctx.crossing, ctx.shape = crossing, leaving.shape
        return o.view_as(o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return None, gradient, ctx.crossing.take_d_leaving(ctx.shape)


# Where it is kept: beside the computation in pinned memory of the host, on a CPU where it is


class Kept:
    """A tensor that is needed again later. On a GPU it goes to the host, and comes back before it is needed."""

    def __init__(self, x: Tensor):
        self._here: Tensor | None = x.detach()
        self._host: Tensor | None = None
        self._device, self._arrives = x.device, None
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            self._copy_to_host(self._here)

    def _copy_to_host(self, x: Tensor) -> None:
        assert self._host is not None
        side = _side_stream(self._device.index)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._host.copy_(x, non_blocking=True)
        x.record_stream(side)

    def put_away(self) -> None:
        """Free it on the GPU, until it is fetched."""
        if self._host is not None:
            self._here = self._arrives = None

    def fetch(self) -> None:
        """Begin to bring it back to the GPU."""
        if self._here is None:
            assert self._host is not None
            side = _side_stream(self._device.index)
            with torch.cuda.stream(side):  # behind the copy to the host
                self._here = self._host.to(self._device, non_blocking=True)
                self._arrives = side.record_event()

    def get(self) -> Tensor:
        """The tensor, on its device."""
        self.fetch()
        assert self._here is not None
        if self._arrives is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrives)
            self._here.record_stream(current)
        return self._here

    def add(self, x: Tensor) -> None:
        """Add x to it in place."""
        total = self.get().add_(x)
        if self._host is not None:
            self._copy_to_host(total)
            self.put_away()


class Content:
    """What a tensor holds now, to be put back later. Before the tensor is written to, `wait_for_copies`."""

    def __init__(self, x: Tensor):
        self._x = x.detach()
        self._before = Kept(x) if x.is_cuda and x.layout is torch.strided else self._x.clone()
        if isinstance(self._before, Kept):
            self._before.put_away()

    def put_back(self) -> None:
        """Write back what it held."""
        self._x.copy_(self._before.get() if isinstance(self._before, Kept) else self._before)


def wait_for_copies(device: torch.device) -> None:
    """What is queued from now on comes after the copies to the host that were begun; the host does not wait."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_stream(device.index))


@lru_cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream of copies to the host and back."""
    return torch.cuda.Stream(device)
