"""What a schedule is, the link to the neighbours, and how an exchange runs beside the computation.

A schedule is a class of its own file, entered by `@schedule` under the name that `exchange=` takes. It says how long it
takes, whether its messages must be equally long, and how it runs. Its run is a generator: it posts what it can, yields
once before the first thing that it would have to wait for, and returns the state that enters this rank's tokens. On a
GPU it runs to its end at once, mostly on a stream of its own, and only that stream waits; on a CPU what follows the
yield runs in `wait`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.exchange.maps import Fold, HeadRuns, StateMap
from lasp.ranks import SCHEDULES, SequenceParallel, Traffic, waiting
from lasp.ranks.watch import watch

Transfer = Generator[None, None, Tensor]
"""What `Schedule.run` returns, see the module; its value is the state that enters."""


@dataclass(frozen=True)
class Network:
    """Latencies in seconds, bandwidths in bytes a second; of the collective those of one of its P - 1 steps."""

    latency: float
    bandwidth: float
    collective_latency: float
    collective_bandwidth: float
    source: str  # "measured" or "published"
    direct_latency: float = float("inf")  # of a meeting and a read; infinite where ranks cannot read each other
    direct_bandwidth: float = float("inf")


@dataclass(frozen=True)
class Sizes:
    """What one rank contributes to an exchange, in bytes, by what a schedule makes of it."""

    state: int  # one state of the heads that go far: what a chain sends
    gathered: int | None  # all maps of these heads, equally many on every rank; None: the ranks may differ
    read: int | None  # what the others read directly; None likewise
    columns: int  # of a state, into which a chain may be cut


@dataclass(frozen=True)
class Terms:
    """The terms on which a state travels; the same on every rank.

    Args:
        reverse: from the last rank to the first.
        far: the heads that must go through the chain (see `horizon`); None is all. The others go to the neighbour.
        units: the most maps that any rank has, for messages that are equally long; None if all have as many as this.
        ragged: whether `units` might differ between ranks, for lack of knowledge: then "auto" takes no such messages.
        at_once: the caller computes nothing before it waits.
        borrow: the caller uses what enters before it starts another exchange, on the same stream: it may lie in the
            memory of another rank.
        passes: whether what enters this rank goes on behind it, whatever its maps say: where a packed sequence begins
            here nothing does, not even NaN.
        reach: how many of the ranks before this one let their state come so far; None is all.
    """

    reverse: bool = False
    far: HeadRuns | None = None
    units: int | None = None
    ragged: bool = False
    at_once: bool = False
    borrow: bool = False
    passes: bool = True
    reach: int | None = None


@dataclass(frozen=True)
class Job:
    """One exchange: what is sent, among which ranks, on what terms."""

    local: StateMap
    sequence: SequenceParallel
    traffic: Traffic
    fold: Fold
    units: int  # the most maps that any rank has
    near: bool  # one state of the rank before this one is enough
    terms: Terms
    thing: str = "the state"  # for messages

    @property
    def before(self) -> range:
        """The places whose maps come so far, from the first; nearer ranks are further behind."""
        rank, size, reach = self.sequence.rank, self.sequence.size, self.terms.reach
        if self.terms.reverse:
            return range(size - 1 if reach is None else rank + reach, rank, -1)
        return range(0 if reach is None else rank - reach, rank)

    def what(self, peer: int | None = None) -> str:
        """What is exchanged with a rank, as the group counts it, or None for all, for the error of a peer."""
        return _what(self.sequence, self.terms.reverse, self.thing, peer)


def _what(sequence: SequenceParallel, reverse: bool, thing: str, peer: int | None) -> str:
    direction = "backward" if reverse else "forward"
    return f"layer {sequence.name!r}, {direction}: the exchange of {thing} with {sequence.name_of(peer)}"


class Schedule(ABC):
    """How a state travels from each rank to all behind it."""

    name: ClassVar[str]
    gathers: ClassVar[bool] = False  # its messages are equally long on all ranks
    reads: ClassVar[bool] = False  # ranks read each other's memory; all heads then go the same way
    waits_per_hop: ClassVar[bool] = False  # a busy card delays it at every hop, not once

    def needs_equal_lengths(self, ranks: int) -> bool:
        """Whether every rank must know how many maps the others send."""
        return self.gathers

    @abstractmethod
    def seconds(self, sizes: Sizes, ranks: int, network: Network) -> float:
        """Seconds from the start until the last rank has its state, on an idle card; infinite where it cannot run."""

    def blocks(self, sizes: Sizes, ranks: int, network: Network) -> int:
        """Into how many blocks a state is cut."""
        return 1

    @abstractmethod
    def run(self, job: Job, link: Any, blocks: int) -> Transfer:
        """See the module. `link` carries the messages; where memory is read, it is a turn on the board."""


ScheduleClass = TypeVar("ScheduleClass", bound=type[Schedule])


def schedule(cls: ScheduleClass) -> ScheduleClass:
    """Class decorator: what `exchange=cls.name` takes from now on."""
    SCHEDULES[cls.name] = cls()
    return cls


class Link:
    """Messages from the rank before this one, and to the rank behind it (reversed: the other way round).

    Messages of one `tag` arrive in the order in which they are sent. NCCL has no tags, but there an exchange is posted
    as a whole, and in the same order at both ends.
    """

    joins = False

    def __init__(self, job: Job, tag: int = 0):
        self.job, self.sequence, self.traffic, self.tag = job, job.sequence, job.traffic, tag
        ends = self.sequence.prev_rank, self.sequence.next_rank
        self.source, self.target = reversed(ends) if job.terms.reverse else ends
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def receive(self, shape: torch.Size | tuple[int, ...], like: Tensor) -> Callable[[], Tensor]:
        """Post the receipt of a tensor; the result waits for it."""
        message = like.new_empty(shape)
        with waiting(self._from_source):
            work = dist.irecv(message, group=self.sequence.group, group_src=self.source, tag=self.tag)

        def wait() -> Tensor:
            with waiting(self._from_source):
                self.sequence.peers.wait(work)  # type: ignore[arg-type]
            return message

        return wait

    def send(self, message: Tensor) -> None:
        """Post it. It stays alive until `finish`."""
        message = message.contiguous()
        self.traffic.messages += 1
        self.traffic.bytes_sent += message.nbytes
        with waiting(self._to_target):
            work = dist.isend(message, group=self.sequence.group, group_dst=self.target, tag=self.tag)
        self._sent.append((work, message))  # type: ignore[arg-type]

    def finish(self) -> None:
        """Wait until all is sent."""
        if self._sent:
            with waiting(self._to_target):
                for work, _ in self._sent:
                    self.sequence.peers.wait(work)
            self._sent.clear()

    def _from_source(self) -> str:
        return self.job.what(self.source)

    def _to_target(self) -> str:
        return self.job.what(self.target)


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> Tensor:
        """The state [N, H, K, V] that enters this rank's tokens; zeros where no rank comes before."""
        ...


class Closing(Protocol):
    """What is to be done once the state has arrived."""

    job: Job

    @property
    def joins(self) -> bool:
        """Whether the caller must wait for it, too."""
        ...

    def finish(self) -> None:
        """Once, on the stream of the exchange."""
        ...


def queue(transfer: Transfer, closing: Sequence[Closing], inputs: Sequence[Tensor], *, beside: bool) -> Pending:
    """Begin what a schedule does with `inputs`; on a GPU `beside` the caller's stream, or before all that follows."""
    if not inputs[0].is_cuda:
        return RunningInWait(transfer, closing)
    pending = RunningBeside(transfer, closing, inputs) if beside else Inline(transfer, closing)
    if watch.on and not torch.cuda.is_current_stream_capturing():
        _note(pending, closing[0].job, inputs[0])
    return pending


def _note(pending: RunningBeside | Inline, job: Job, like: Tensor) -> None:
    """For the thread that tells where a rank waits over NCCL. (Not the job: it holds tensors.)"""
    sequence, reverse = job.sequence, job.terms.reverse
    source = sequence.next_rank if reverse else sequence.prev_rank
    event = pending.arrived if isinstance(pending, RunningBeside) else current_stream(like).record_event()
    watch.note(event, partial(_what, sequence, reverse, job.thing, source))


class RunningInWait:
    """An exchange on a CPU: what must wait for other ranks happens in `wait`."""

    def __init__(self, transfer: Transfer, closing: Sequence[Closing]):
        self._transfer, self._closing = transfer, closing
        next(transfer)

    def wait(self) -> Tensor:
        """Receive, fold, send on; see `Pending`."""
        entering = result(self._transfer)
        for each in self._closing:
            each.finish()
        return entering


class Inline:
    """An exchange that was queued on the caller's own stream, before all that follows; on gloo the host waits here."""

    def __init__(self, transfer: Transfer, closing: Sequence[Closing]):
        next(transfer)
        self._entering = result(transfer)
        for each in closing:
            each.finish()

    def wait(self) -> Tensor:
        """See `Pending`."""
        return self._entering


class RunningBeside:
    """An exchange on a GPU, queued as a whole on a stream of its own, so that the caller's goes on."""

    def __init__(self, transfer: Transfer, closing: Sequence[Closing], inputs: Sequence[Tensor]):
        side = _side_stream(inputs[0].device.index)
        side.wait_stream(current_stream(inputs[0]))
        with torch.cuda.stream(side):
            next(transfer)
            self._entering = result(transfer)
            # What is captured in a CUDA graph must end on the stream on which it began; else sends need not be awaited.
            at_end = torch.cuda.is_current_stream_capturing() or any(each.joins for each in closing)
            arrived = None if at_end else side.record_event()
            for each in closing:
                each.finish()
            self.arrived = side.record_event() if arrived is None else arrived
        # Each stream uses memory of the other: it must not be given away before both have passed.
        for x in inputs:
            x.record_stream(side)

    def wait(self) -> Tensor:
        """Let the current stream wait, not the host; see `Pending`."""
        caller = current_stream(self._entering)
        caller.wait_event(self.arrived)
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
    """The current stream of a tensor's GPU. (By number: PyTorch takes several times as long for a `torch.device`.)"""
    return torch.cuda.current_stream(x.device.index)


@lru_cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream of the exchanges, of high priority: what it runs is short, and other ranks wait for it."""
    return torch.cuda.Stream(device, priority=-1)


def result(transfer: Transfer) -> Tensor:
    """Run a schedule from its yield to its end."""
    try:
        next(transfer)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a schedule yields once")


def heads_in(runs: HeadRuns) -> int:
    """How many heads the runs hold."""
    return sum(end - first for first, end in runs)
