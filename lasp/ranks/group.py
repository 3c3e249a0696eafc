"""What this process keeps of each process group: one object a group, and one place that forgets them all.

A `Peers` lives as long as its group. What a part of the runtime must remember between calls (memory that the ranks
read from each other, what was measured between them, how often they have exchanged) is an attribute here and nowhere
else, so that nothing outlives a group and tests can begin anew.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


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
        self.reset()

    def reset(self) -> None:
        """As if nothing had been exchanged yet."""
        self.connected = False  # whether neighbours have exchanged a first message (lasp.exchange)
        self.busy = False  # whether a state travels while a function of the caller's runs (lasp.ops)
        self.network: Any = None  # lasp.exchange.cost.Network: what was measured between the ranks
        self.board: Any = None  # lasp.exchange.board.Board: memory that the ranks read from each other
        self.refusal: str | None = None  # why there can be no board; empty if there may be; None: not asked yet
        self.exchanges: Counter[tuple[str, bool]] = Counter()  # of a layer, in a direction, since the last step
        self.comparisons = itertools.count()  # their numbers (lasp.checks.agreement)
        self.store: Any = None  # a connection of our own to the group's key-value store

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
        """After which a rank that does not come is an error."""
        return timeout_of(self.group)


class _Process:
    """What this process keeps of all groups together."""

    def __init__(self) -> None:
        self.peers: weakref.WeakKeyDictionary[ProcessGroup, Peers] = weakref.WeakKeyDictionary()
        self.meetings = 0  # to set up symmetric memory, in all groups (see lasp.exchange.board)
        self.not_finite: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # flags of a layer
        self.ran: dict[Any, None] = {}  # layers that ran in training since the last step (lasp.checks.use)
        self.noted: dict[Any, None] = {}  # layers that set one since the last check, in order; the same on all ranks


process = _Process()


def peers_of(group: ProcessGroup) -> Peers:
    """The one object of a group."""
    found = process.peers.get(group)
    if found is None:
        found = process.peers[group] = Peers(group)
    return found


def all_peers() -> list[Peers]:
    """Of the groups that still exist."""
    return [peers for peers in process.peers.values() if peers.exists]


def reset() -> None:
    """Forget what was exchanged, measured and made in every group; on all ranks, and only between calls (for tests)."""
    process.noted.clear()
    process.ran.clear()
    for peers in process.peers.values():
        peers.reset()


def forget_steps() -> None:
    """What was exchanged so far, and whether it was finite, is no concern of the next step of an optimizer."""
    process.noted.clear()
    process.ran.clear()
    for peers in process.peers.values():
        peers.exchanges.clear()


def timeout_of(group: ProcessGroup) -> timedelta:
    """After which a rank of the group that does not come is an error."""
    return group._get_backend(group._device_types[0]).options._timeout


class waiting:
    """Around what a backend does with other ranks: its error becomes a `PeerError` that says what, and with whom."""

    def __init__(self, what: str | Callable[[], str]):
        """`what`, or a function that says it when it is needed: "the exchange of the state with rank 3"."""
        self._what = what

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, (torch.OutOfMemoryError, PeerError)):
            return
        what = self._what if isinstance(self._what, str) else self._what()
        raise PeerError(
            f"{what} failed after {time.monotonic() - self._started:.1f} s; mostly a rank has ended, hangs, or left "
            f"out a call: {error}"
        ) from error
