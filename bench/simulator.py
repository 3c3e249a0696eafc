"""A discrete-event simulation of ranks that compute and exchange a state. It holds no formula for a schedule.

Events are calls at a time (`Clock`). A message takes its sender's port for a while, then flies (`Network`). A schedule
only says who sends to whom when something arrives (`Chain`, `AllGather`, `Direct`, `Neighbour`, `Serial`). In
`operator_seconds` every rank computes, exchanges and computes again, forward and then in reverse; in `training_seconds`
an `AllReduce` goes on beside its steps. Times are in seconds, sizes in bytes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SCHEDULES = ("ring", "pipeline", "all_gather", "direct", "neighbour", "serial")


class Clock:
    """Calls in the order of their times; those of one time in the order in which they were asked for."""

    def __init__(self):
        self.now = 0.0
        self._events: list = []
        self._order = itertools.count()

    def at(self, time: float, call: Callable, *args) -> None:
        """Ask for `call(*args)` at a time that is not past."""
        if time < self.now:
            raise ValueError(f"time {time} is past: it is {self.now}")
        heapq.heappush(self._events, (time, next(self._order), call, args))

    def run(self) -> float:
        """Until nothing is asked for any more; returns the time of the last call."""
        events, pop = self._events, heapq.heappop
        while events:
            self.now, _, call, args = pop(events)
            call(*args)
        return self.now


@dataclass(frozen=True)
class Link:
    """One way from rank to rank, in the terms of LogGP (Alexandrov et al., 1995): its o, G and L."""

    overhead: float  # seconds of the sender's port for a message, besides its bytes
    bandwidth: float  # bytes a second
    latency: float = 0.0  # seconds in flight, while the port is free again


@dataclass(frozen=True)
class Machine:
    """Nodes of `node` ranks each, and what an exchange costs beside its messages."""

    inside: Link
    between: Link
    node: int = 8
    setup: float = 0.0  # seconds from the call of an exchange to its first message, on every rank
    fold: float = 0.0  # seconds a byte to fold one state into another

    def link(self, source: int, target: int) -> Link:
        """The link that joins two ranks."""
        return self.inside if source // self.node == target // self.node else self.between


@dataclass(frozen=True)
class Pass:
    """The computation of one rank in one direction, seconds."""

    before: float = 0.0  # until the local state is known
    beside: float = 0.0  # what needs no other rank
    after: float = 0.0  # what needs the state that arrives

    @property
    def total(self) -> float:
        """What one rank alone takes."""
        return self.before + self.beside + self.after


class Network:
    """Ports that send one message after the other."""

    def __init__(self, clock: Clock, machine: Machine, ranks: int):
        self.clock, self.machine = clock, machine
        self.free = [0.0] * ranks  # when a rank's port is free again

    def send(self, source: int, target: int, nbytes: float, received: Callable, *args) -> None:
        """Queue a message at its sender's port; `received(*args)` happens where and when it arrives."""
        link = self.machine.link(source, target)
        sent = max(self.clock.now, self.free[source]) + link.overhead + nbytes / link.bandwidth
        self.free[source] = sent
        self.clock.at(sent + link.latency, received, *args)


class Chain:
    """`ring` (one block), and `pipeline`, which folds and passes on each block of the state as it comes.

    Places in the chain are counted in the order in which the state travels; `order` are their ranks.
    """

    def __init__(
        self, network: Network, order: Sequence[int], nbytes: float, arrived: Callable[[int], None], blocks: int = 1
    ):
        self.network, self.order, self.arrived, self.blocks = network, order, arrived, blocks
        self.block_bytes = nbytes / blocks
        self.is_ready = [False] * len(order)
        self.received, self.waiting = [0] * len(order), [0] * len(order)
        self.folded = [0.0] * len(order)  # when a place has folded what came so far

    def ready(self, place: int) -> None:
        """The local state of this place is known."""
        self.is_ready[place] = True
        if place == 0:
            self.arrived(0)
        for _ in range(self.blocks if place == 0 else self.waiting[place]):
            self._fold(place)

    def _fold(self, place: int) -> None:
        if place + 1 == len(self.order):
            return  # no one waits for what comes after the last
        clock, seconds = self.network.clock, self.network.machine.fold * self.block_bytes
        self.folded[place] = max(clock.now, self.folded[place]) + (seconds if place else 0.0)
        clock.at(self.folded[place], self._pass_on, place)

    def _pass_on(self, place: int) -> None:
        source, target = self.order[place], self.order[place + 1]
        self.network.send(source, target, self.block_bytes, self._receive, place + 1)

    def _receive(self, place: int) -> None:
        self.received[place] += 1
        if self.received[place] == self.blocks:
            self.arrived(place)
        if self.is_ready[place]:
            self._fold(place)
        else:
            self.waiting[place] += 1


class AllGather:
    """A ring collective, as NCCL's: every state goes round to all ranks, then each rank folds those before it."""

    def __init__(self, network: Network, order: Sequence[int], nbytes: float, arrived: Callable[[int], None]):
        self.network, self.order, self.nbytes, self.arrived = network, order, nbytes, arrived
        self.is_ready = [False] * len(order)
        self.received = [0] * len(order)
        self.waiting: list[list[int]] = [[] for _ in order]

    def ready(self, place: int) -> None:
        """This place joins: only now does it send its own state and pass on those of others."""
        self.is_ready[place] = True
        for hop in (0, *self.waiting[place]):
            self._pass_on(place, hop)
        self._finish(place)

    def _pass_on(self, place: int, hop: int) -> None:
        if hop + 1 < len(self.order):
            target = (place + 1) % len(self.order)
            self.network.send(self.order[place], self.order[target], self.nbytes, self._receive, target, hop + 1)

    def _receive(self, place: int, hop: int) -> None:
        self.received[place] += 1
        if self.is_ready[place]:
            self._pass_on(place, hop)
            self._finish(place)
        else:
            self.waiting[place].append(hop)

    def _finish(self, place: int) -> None:
        if self.received[place] == len(self.order) - 1:
            clock = self.network.clock
            clock.at(clock.now + self.network.machine.fold * self.nbytes * place, self.arrived, place)


class Direct:
    """All write where the others can read, and meet; then each reads the states of those before it, and folds them.

    A link's overhead is here that of the meeting and the first byte. The first place waits for nobody.
    """

    def __init__(self, network: Network, order: Sequence[int], nbytes: float, arrived: Callable[[int], None]):
        self.network, self.nbytes, self.arrived = network, nbytes, arrived
        self.places, self.missing = len(order), len(order)

    def ready(self, place: int) -> None:
        """This place has written; the last one to come opens the meeting."""
        clock, machine = self.network.clock, self.network.machine
        if place == 0:
            self.arrived(0)
        self.missing -= 1
        for reader in range(1, self.places) if not self.missing else ():
            link, read = machine.inside, reader * self.nbytes
            clock.at(clock.now + link.overhead + read / link.bandwidth + machine.fold * read, self.arrived, reader)


class Serial:
    """LASP-1's order: a place sends when all its computation is done, so `ready` comes last and not first."""

    def __init__(self, network: Network, order: Sequence[int], nbytes: float, arrived: Callable[[int], None]):
        self.network, self.order, self.nbytes, self.arrived = network, order, nbytes, arrived

    def ready(self, place: int) -> None:
        """This place has received and computed."""
        if place + 1 < len(self.order):
            self.network.send(self.order[place], self.order[place + 1], self.nbytes, self.arrived, place + 1)


class Neighbour(Serial):
    """The horizon's schedule: what a place sends needs no other place, and goes one hop."""

    def ready(self, place: int) -> None:
        """The local state of this place is known."""
        if place == 0:
            self.arrived(0)
        super().ready(place)


def operator_seconds(
    schedule: str, ranks: int, nbytes: float, machine: Machine, passes: Sequence[Pass], *, blocks: int = 1
) -> float:
    """When the last rank is done with all passes; the state travels up the ranks in the first, down in the second."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    clock = Clock()
    network = Network(clock, machine, ranks)
    runs: list[_PassOfAll] = []
    for number, work in enumerate(passes):
        order = range(ranks) if number % 2 == 0 else range(ranks - 1, -1, -1)
        runs.append(_PassOfAll(schedule, network, order, nbytes, work, blocks))
    for run, then in zip(runs, runs[1:]):
        run.then = then.begin
    if runs:
        for rank in range(ranks):
            clock.at(0.0, runs[0].begin, rank)
    return clock.run()


def exchange_seconds(schedule: str, ranks: int, nbytes: float, machine: Machine, *, blocks: int = 1) -> float:
    """One exchange alone, from the call on all ranks at once to the last rank that has its state."""
    return operator_seconds(schedule, ranks, nbytes, machine, [Pass()], blocks=blocks)


class _PassOfAll:
    """One pass on all ranks: before, exchange with beside next to it, after."""

    def __init__(self, schedule: str, network: Network, order: Sequence[int], nbytes: float, work: Pass, blocks: int):
        self.clock, self.machine, self.order, self.work = network.clock, network.machine, order, work
        self.place = {rank: place for place, rank in enumerate(order)}
        self.waits_first = schedule == "serial"
        self.then: Callable[[int], None] = lambda rank: None
        self.parts = [0] * len(order)  # of the two that `after` waits for: the state, and what goes on beside
        if schedule in ("ring", "pipeline"):
            self.exchange = Chain(network, order, nbytes, self._part, blocks if schedule == "pipeline" else 1)
        else:
            kinds = {"all_gather": AllGather, "direct": Direct, "neighbour": Neighbour, "serial": Serial}
            self.exchange = kinds[schedule](network, order, nbytes, self._part)

    def begin(self, rank: int) -> None:
        """The rank starts this pass."""
        place, now = self.place[rank], self.clock.now
        if self.waits_first:
            if place == 0:
                self.clock.at(now, self._part, place)
            self.clock.at(now + self.work.before + self.work.beside, self._part, place)
            return
        local = now + self.work.before
        self.clock.at(local + self.machine.setup, self.exchange.ready, place)
        self.clock.at(local + self.work.beside, self._part, place)

    def _part(self, place: int) -> None:
        self.parts[place] += 1
        if self.parts[place] == 2:
            setup = self.machine.setup if self.waits_first else 0.0
            self.clock.at(self.clock.now + self.work.after + setup, self._end, place)

    def _end(self, place: int) -> None:
        if self.waits_first:
            self.exchange.ready(place)
        self.then(self.order[place])


class AllReduce:
    """A ring, as NCCL's and gloo's: parts of 1 / ranks go round twice, summed the first time, handed on the second."""

    def __init__(self, network: Network, ranks: int, nbytes: float, arrived: Callable[[int], None]):
        self.network, self.ranks, self.arrived = network, ranks, arrived
        self.part, self.messages = nbytes / ranks, 2 * (ranks - 1)
        self.is_ready, self.received, self.sent = [False] * ranks, [0] * ranks, [0] * ranks

    def ready(self, rank: int) -> None:
        """This rank joins, with its numbers."""
        self.is_ready[rank] = True
        self._go_on(rank)

    def _go_on(self, rank: int) -> None:
        while self.is_ready[rank] and self.sent[rank] < self.messages and self.sent[rank] <= self.received[rank]:
            self.sent[rank] += 1
            self.network.send(rank, (rank + 1) % self.ranks, self.part, self._receive, (rank + 1) % self.ranks)
        if self.is_ready[rank] and self.received[rank] == self.messages:
            self.arrived(rank)

    def _receive(self, rank: int) -> None:
        self.received[rank] += 1
        self._go_on(rank)


@dataclass(frozen=True)
class Work:
    """What a rank does in a training without a pause, and what follows it."""

    seconds: float
    starts: int | None = None  # the all-reduce, by its number, that begins then and goes on beside what follows
    waits: int | None = None  # the one that must have come to its end before anything follows


def training_seconds(work: Sequence[Work], ranks: int, nbytes: float, machine: Machine) -> float:
    """When the last rank is done with all its work; each all-reduce is of so many bytes."""
    clock = Clock()
    network = Network(clock, machine, ranks)
    arrived: dict[int, set[int]] = {}
    blocked: list[int | None] = [None] * ranks  # for which a rank waits
    place = [0] * ranks

    def come(number: int, rank: int) -> None:
        arrived[number].add(rank)
        if blocked[rank] == number:
            blocked[rank] = None
            begin(rank)

    def begin(rank: int) -> None:
        if place[rank] < len(work):
            clock.at(clock.now + work[place[rank]].seconds, end, rank)

    def end(rank: int) -> None:
        done = work[place[rank]]
        place[rank] += 1
        if done.starts is not None:
            if done.starts not in reductions:
                arrived[done.starts] = set()
                number = done.starts
                reductions[number] = AllReduce(network, ranks, nbytes, lambda rank: come(number, rank))
            clock.at(clock.now + machine.setup, reductions[done.starts].ready, rank)
        if done.waits is not None and rank not in arrived[done.waits]:
            blocked[rank] = done.waits
        else:
            begin(rank)

    reductions: dict[int, AllReduce] = {}
    for rank in range(ranks):
        clock.at(0.0, begin, rank)
    return clock.run()
