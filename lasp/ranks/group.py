"""What this process keeps of each process group: one object a group, and one place that forgets them all.

A `Peers` lives as long as its group. What a part of the runtime must remember between calls (memory that the ranks
read from each other, what was measured between them, how often they have exchanged) is an attribute here and nowhere
else, so that nothing outlives a group and tests can begin anew.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed import distributed_c10d as c10d

from lasp.ranks.presence import presence
from lasp.ranks.watch import watch


class RankMismatchError(RuntimeError):
    """Ranks disagree about what they compute. Raised on every rank, naming the rank that differs."""


class PeerError(RuntimeError):
    """A rank that this one waits for has ended, or was silent for the timeout of the group."""


class Peers:
    """What this process keeps of one process group."""

    def __init__(self, group: ProcessGroup):
        self._group = weakref.ref(group)  # what is kept for a group must not keep it alive
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.fake = dist.get_backend(group) == "fake"  # nobody else is there
        self._gloo = dist.get_backend(group) == "gloo"
        self.reset()

    def reset(self) -> None:
        """Forget all, as if nothing had been exchanged yet."""
        self.connected = False  # whether neighbours have exchanged a first message (lasp.exchange)
        self.all_connected = False  # whether all have met in every collective of a step (lasp.ranks.mesh)
        self.busy = False  # whether a state travels while a function of the caller's makes q (lasp.ops)
        self.network: Any = None  # lasp.exchange.cost.Network: what was measured between the ranks
        self.board: Any = None  # lasp.exchange.board.Board: memory that the ranks read from each other
        self.refusal: str | None = None  # why there can be no board; empty if there can; None: not asked yet
        # What ranks compare before an optimizer steps (lasp.checks), since the last comparison
        self.exchanges: Counter[tuple[str, bool]] = Counter()  # how many, by layer and direction
        self.order = 0  # a checksum of the order of the exchanges
        self.facts: dict[Any, None] = {}  # settings of the calls, with layer and operator
        self.layouts: tuple[int, int] = (0, 0)  # how many calls had a layout, and a checksum of the layouts
        self.autocast: dict[str | None, None] = {}  # autocast modes of the calls; None: of compiled code, not known
        self.settings: dict[str, list[str]] = {}  # of optimizers that have stepped
        self.steps = 0  # of optimizers of split models
        # What decides when they compare
        self.usual_steps = 1  # steps between the last two comparisons
        self.compared_steps = 0  # comparisons before a step so far
        self.models: list[weakref.ref[Any]] = []  # models that are split over these ranks
        self.counted: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # calls with a model
        self.batches: Counter[str] = Counter()  # batches cut so far, by the kind of comparison and who cut them
        self.cutting: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # held while a batch is compared
        self.apart: weakref.WeakSet[Any] = weakref.WeakSet()  # every lasp.CO2 that lets these ranks train apart now
        self.cuts: Any = None  # batches whose layout must reach the operators (lasp.checks.reach)
        self.cut = False  # whether a batch was cut since the last step of an optimizer
        # Messages (lasp.checks.messages)
        self.agreed: set[Any] = set()  # kinds of messages on which the ranks have agreed
        self.on_hosts: dict[str, bool] = {}  # by type of device: whether a message keeps the host waiting anyway
        # Rounds of comparison in the group's key-value store (lasp.checks.rounds)
        self.rounds: Counter[str] = Counter()  # how many so far, by kind
        self.stores: dict[str, Any] = {}  # a connection of our own for each kind
        self.threads: dict[str, int] = {}  # the thread of the last round of each kind
        self.life: str | None = None  # prefix of the keys of this group; None: the first rank has yet to tell it
        self.token = os.urandom(8).hex()

    def forget_step(self) -> None:
        """What was exchanged so far is no concern of the next comparison before a step."""
        self.exchanges.clear()
        self.order = 0
        self.facts.clear()
        self.layouts = (0, 0)
        self.autocast.clear()
        self.settings.clear()
        self.steps = 0
        self.cut = False

    @property
    def group(self) -> ProcessGroup:
        """The process group."""
        group = self._group()
        assert group is not None
        return group

    @property
    def exists(self) -> bool:
        """Whether the group has not been destroyed."""
        try:
            dist.get_rank(self._group())
        except ValueError:
            return False
        return True

    @property
    def timeout(self) -> timedelta:
        """The time after which a rank that does not come is an error."""
        return timeout_of(self.group)

    def wait(self, work: dist.Work) -> None:
        """Until a message has come or gone, within the timeout; on NCCL the stream waits, and not the host.

        A gloo group that was made with another timeout keeps it for messages, though not for collectives.
        """
        work.wait(self.timeout) if self._gloo else work.wait()


class _Process:
    """What this process keeps of all groups together."""

    def __init__(self) -> None:
        self.peers: weakref.WeakKeyDictionary[ProcessGroup, Peers] = weakref.WeakKeyDictionary()
        self.timeout: timedelta | None = None  # of `lasp.init`, for all groups; None: it was not called
        self.alone = 0  # how many threads compute by themselves for now (lasp.ranks.aside)
        self.stance: Any = None  # of torch.compile, meanwhile
        self.meetings = 0  # how often symmetric memory was set up, in all groups (lasp.exchange.board)
        # Whether states and gradients are finite (lasp.checks.finite)
        self.not_finite: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # flags, by layer
        self.noted: dict[Any, None] = {}  # layers that ran since the last check, in order; the same on all ranks
        self.watched: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # models with check_finite
        self.of_models: weakref.WeakSet[Any] = weakref.WeakSet()  # the sequences of these models' layers
        # What is done with a split model (lasp.checks.use)
        self.split = False  # whether `parallelize` has split a model
        self.by_hand = False  # whether an operator was called with ranks of the user's own making
        self.ran: dict[Any, None] = {}  # layers that ran in training since the last step
        self.averaged: weakref.WeakKeyDictionary[Any, Any] = (
            weakref.WeakKeyDictionary()
        )  # groups of DDP or FSDP2, by model
        self.cuts: Any = None  # as `Peers.cuts`, for one rank
        # What ranks compare (lasp.checks.agreement)
        self.buffers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # by model, before its first
        # forward: a hook, and then the checksums until the ranks have compared them
        self.loss_gradient: Any = None  # that the last loss since the last step got (lasp.loss)
        # Data parallelism (lasp.data_parallel)
        self.reducers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # what averages, by model
        self.sharded: weakref.WeakSet[Any] = weakref.WeakSet()  # models, by FSDP2
        self.schemes: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # for `explain`, by model
        self._of_world: tuple[Any, dict[str, dict[Any, Any]]] = (None, {})  # a weak reference to the world, and its own

    def meshes_of_world(self) -> dict[tuple[int, ...], tuple[Any, list[ProcessGroup]]]:
        """What `lasp.init_mesh` has made in this life of the process groups: by shape a mesh, and all its groups."""
        return self._made("meshes")

    def parts_of_world(self) -> dict[Any, Any]:
        """The ranks of tensor parallelism by mesh (`lasp.ranks.parts.Ranks.of`), in this life of the groups."""
        return self._made("parts")

    def _made(self, kind: str) -> dict[Any, Any]:
        world, made = self._of_world
        if world is None or world() is not dist.group.WORLD:
            made = {}
            self._of_world = weakref.ref(dist.group.WORLD), made
        return made.setdefault(kind, {})

    def forget_meshes(self) -> None:
        """And the parts. They keep their groups alive."""
        self._of_world = (None, {})


_set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # since torch 2.14 the second one warns

process = _Process()


def peers_of(group: ProcessGroup) -> Peers:
    """The one object of a group, which from now on waits as long as `lasp.init` was told."""
    found = process.peers.get(group)
    if found is None:
        found = process.peers[group] = Peers(group)
        if process.timeout is not None and not found.fake:
            _set_timeout(process.timeout, group)
    return found


def all_peers() -> list[Peers]:
    """The `Peers` of all groups that still exist."""
    return [peers for peers in process.peers.values() if peers.exists]


def reset() -> None:
    """Forget what was exchanged, measured and made in every group; on all ranks, and only between calls (for tests)."""
    process.noted.clear()
    process.ran.clear()
    process.split = process.by_hand = False
    process.cuts = None
    for peers in process.peers.values():
        peers.reset()


def forget_steps() -> None:
    """What was exchanged so far, and whether it was finite, is no concern of the next step of an optimizer."""
    process.noted.clear()
    process.ran.clear()
    process.loss_gradient = None
    for peers in process.peers.values():
        peers.forget_step()
        peers.models.clear()


def timeout_of(group: ProcessGroup) -> timedelta:
    """The time after which a rank of the group that does not come is an error."""
    return group._get_backend(group._device_types[0]).options._timeout


def set_timeout(timeout: timedelta) -> None:
    """Set the timeout of the world, of all groups that lasp has, and of all that it will make or be handed."""
    process.timeout = timeout
    for group in {dist.group.WORLD, *process.peers}:
        if group is not None and peers_of(group).exists and not peers_of(group).fake:
            _set_timeout(timeout, group)


@contextmanager
def making_groups(what: str) -> Iterator[None]:
    """Around what makes process groups: they have the timeout of `lasp.init` from their first meeting on.

    PyTorch's functions for a mesh make them with its default of 30 minutes, and meet before they return.
    """
    usual = c10d._get_default_timeout
    if process.timeout is not None:
        c10d._get_default_timeout = lambda backend: process.timeout
    try:
        with waiting(lambda: what):
            yield
    finally:
        c10d._get_default_timeout = usual


class waiting:
    """Around what a backend does with other ranks: its error becomes a `PeerError` that says what, and with whom."""

    def __init__(self, what: str | Callable[[], str]):
        """`what`, or a function that says it when it is needed: "the exchange of the state with rank 3"."""
        self._what = what

    def __enter__(self) -> None:
        self._started, self._left = time.monotonic(), False
        if watch.on and isinstance(self._what, str):
            watch.note(self, lambda what=self._what: what)  # the host may wait inside, as for a checkpoint

    def query(self) -> bool:
        """Whether it was left."""
        return self._left

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._left = True
        if error is None and watch.on and isinstance(self._what, str):  # exchanges note themselves
            watch.note_current(self._what)
        ours = (torch.OutOfMemoryError, PeerError, RankMismatchError)
        if not isinstance(error, RuntimeError) or isinstance(error, ours):
            return
        what = self._what if isinstance(self._what, str) else self._what()
        failed = f"{what} failed after {time.monotonic() - self._started:.1f} s"
        known = presence.account(f"PeerError: {what}") or "mostly a rank has ended, hangs, or left out a call"
        raise PeerError(f"{failed}; {known}: {error}") from error
