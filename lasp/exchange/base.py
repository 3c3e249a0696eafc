"""What travels between ranks, the link to the neighbours, and how an exchange runs beside the computation.

A schedule is a generator: it posts what it can, yields once before the first thing that it would have to wait for, and
returns the state that enters this rank's tokens. On a GPU it runs to its end at once, mostly on a stream of its own,
and only that stream waits; on a CPU what follows the yield runs in `wait`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.mesh import PeerError, SequenceParallel

Fold = Callable[[Tensor | None, Tensor, Tensor], Tensor]  # (entering, state, log_decay) -> the state behind the maps
Schedule = Generator[None, None, Tensor]


@dataclass(frozen=True)
class StateMap:
    """What a rank's tokens do to a state that passes through them, as U maps S -> exp(log_decay) * S + state in a row.

    state [U, N, H, K, V] and log_decay [U, N, H, K | 1], both fp32 (fp64 for fp64 inputs), U >= 1. Where a sequence
    begins, what came before is forgotten: log_decay is -inf.
    """

    state: Tensor
    log_decay: Tensor

    def heads(self, heads: HeadRuns) -> StateMap:
        """The same for some of the heads."""
        return StateMap(take_heads(self.state, heads), take_heads(self.log_decay, heads))

    @property
    def all_heads(self) -> HeadRuns:
        """As one run."""
        return ((0, self.state.shape[2]),)

    def zeros(self) -> Tensor:
        """The state before the first rank's tokens: [N, H, K, V]."""
        return torch.zeros_like(self.state[0])

    def fold(self, fold: Fold, entering: Tensor | None) -> Tensor:
        """The state behind these tokens; None enters where nothing came before."""
        return fold(entering, self.state, self.log_decay)

    def packed(self, units: int, out: Tensor | None = None) -> Tensor:
        """As one tensor [units, numbers of a state and of its decay]; written to `out` if that is given.

        What is added are zeros, maps that change nothing: their decay is exp(0).
        """
        own, size = self.state.shape[0], self.state[0].numel() + self.log_decay[0].numel()
        if out is None:
            out = self.state.new_empty(units, size)
        out[own:] = 0.0
        torch.cat([self.state.flatten(1), self.log_decay.flatten(1)], 1, out=out[:own])
        return out

    def unpack(self, message: Tensor) -> StateMap:
        """The inverse, for maps of as many heads, rows and columns as these."""
        size = self.state[0].numel()
        state = message[:, :size].view(-1, *self.state.shape[1:])
        return StateMap(state, message[:, size:].view(-1, *self.log_decay.shape[1:]))


HeadRuns = tuple[tuple[int, int], ...]  # runs of neighbouring heads: first, last + 1


def take_heads(x: Tensor, heads: HeadRuns) -> Tensor:
    """Some heads of [U, N, H, ...]. By slices, since an index tensor would have to be copied to the device."""
    parts = [x[:, :, first:end] for first, end in heads]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def put_heads(x: Tensor, part: Tensor, heads: HeadRuns) -> None:
    """Write heads that `take_heads` took to their places in [N, H, ...]."""
    for (first, end), piece in zip(heads, part.split([end - first for first, end in heads], 1)):
        x[:, first:end] = piece


class Link:
    """Messages from the rank before this one, and to the rank behind it (`reverse`: the other way round).

    Messages of one `tag` arrive in the order in which they are sent. NCCL has no tags, but there an exchange is posted
    as a whole, and in the same order at both ends.
    """

    def __init__(self, sequence: SequenceParallel, reverse: bool, tag: int = 0):
        self.sequence, self.reverse, self.tag = sequence, reverse, tag
        step = -1 if reverse else 1
        self.source, self.target = sequence.neighbour(-step), sequence.neighbour(step)
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self.joins = False

    def receive(self, shape: torch.Size | tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        """Post the receipt of a tensor; the result waits for it."""
        message = like.new_empty(shape)
        with waiting(self.sequence, self.source, reverse=self.reverse):
            work = dist.irecv(message, group=self.sequence.group, group_src=self.source, tag=self.tag)

        def wait() -> Tensor:
            with waiting(self.sequence, self.source, reverse=self.reverse):
                work.wait()  # type: ignore[union-attr]  # on NCCL the stream waits, not the host
            return message

        return wait

    def send(self, message: Tensor) -> None:
        """Post it. It stays alive until `finish`."""
        message = message.contiguous()
        self.sequence.traffic.messages += 1
        self.sequence.traffic.bytes_sent += message.numel() * message.element_size()
        with waiting(self.sequence, self.target, reverse=self.reverse):
            work = dist.isend(message, group=self.sequence.group, group_dst=self.target, tag=self.tag)
        self._sent.append((work, message))  # type: ignore[arg-type]

    def finish(self) -> None:
        """Wait until all is sent."""
        with waiting(self.sequence, self.target, reverse=self.reverse):
            for work, _ in self._sent:
                work.wait()
        self._sent.clear()


@contextmanager
def waiting(sequence: SequenceParallel, peer: int | None, *, reverse: bool) -> Iterator[None]:
    """Around what a backend does with a peer: its error becomes a `PeerError` with the layer and the peer.

    `peer` is a rank as the group counts it, None where all take part.
    """
    started = time.monotonic()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerError(
            f"layer {sequence.name!r}, {'backward' if reverse else 'forward'}: the exchange of the state with "
            f"{'the other ranks' if peer is None else sequence.name_of(peer)} failed after "
            f"{time.monotonic() - started:.1f} s; mostly a rank has ended, hangs, or left out a call: {error}"
        ) from error


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> Tensor:
        """The state [N, H, K, V] that enters this rank's tokens; zeros where no rank comes before."""
        ...


class Closing(Protocol):
    """What is to be done once the state has arrived."""

    @property
    def joins(self) -> bool:
        """Whether the caller must wait for it, too."""
        ...

    def finish(self) -> None:
        """Once, on the stream of the exchange."""
        ...


class RunningInWait:
    """An exchange on a CPU: what must wait for other ranks happens in `wait`."""

    def __init__(self, schedule: Schedule, closing: Sequence[Closing]):
        self._schedule, self._closing = schedule, closing
        next(schedule)

    def wait(self) -> Tensor:
        """Receive, fold, send on; see `Pending`."""
        entering = result(self._schedule)
        for each in self._closing:
            each.finish()
        return entering


class Arrived:
    """An exchange that was queued on the caller's own stream, before all that follows."""

    def __init__(self, schedule: Schedule, closing: Sequence[Closing]):
        next(schedule)
        self._entering = result(schedule)
        for each in closing:
            each.finish()

    def wait(self) -> Tensor:
        """See `Pending`."""
        return self._entering


class RunningBeside:
    """An exchange on a GPU, queued as a whole on a stream of its own, so that the caller's goes on."""

    def __init__(self, schedule: Schedule, closing: Sequence[Closing], local: StateMap):
        side = _side_stream(local.state.device.index)
        side.wait_stream(current_stream(local.state))
        with torch.cuda.stream(side):
            next(schedule)
            self._entering = result(schedule)
            # What is captured in a CUDA graph must end on the stream on which it began; else sends need not be awaited.
            at_end = torch.cuda.is_current_stream_capturing() or any(each.joins for each in closing)
            arrived = None if at_end else side.record_event()
            for each in closing:
                each.finish()
            self._arrived = side.record_event() if arrived is None else arrived
        # Each stream uses memory of the other: it must not be given away before both have passed.
        for x in (local.state, local.log_decay):
            x.record_stream(side)

    def wait(self) -> Tensor:
        """Let the current stream wait, not the host; see `Pending`."""
        caller = current_stream(self._entering)
        caller.wait_event(self._arrived)
        self._entering.record_stream(caller)
        return self._entering


@contextmanager
def beside(like: Tensor) -> Iterator[None]:
    """What is queued inside runs on the stream of the exchanges, as soon as the inputs are there; on a CPU at once.

    The caller must wait for it, by an exchange that begins inside, before it gives the inputs away.
    """
    if not like.is_cuda:
        yield
        return
    side = _side_stream(like.device.index)
    side.wait_stream(current_stream(like))
    with torch.cuda.stream(side):
        yield


def current_stream(x: Tensor) -> torch.cuda.Stream:
    """Of the device of a tensor on a GPU. (By its number: PyTorch takes several times as long for a `torch.device`.)"""
    return torch.cuda.current_stream(x.device.index)


@lru_cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """Of high priority: what it runs is short, and other ranks wait for it."""
    return torch.cuda.Stream(device, priority=-1)


def result(schedule: Schedule) -> Tensor:
    """Run a schedule from its yield to its end."""
    try:
        next(schedule)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a schedule yields once")
