"""Which ranks have ended, and of what: known within moments, and never guessed from silence.

Each process listens on a socket and writes its address to the key-value store. It never accepts: the system itself
completes the connections of others, and closes them when the process ends, however it ends. So who waits for a rank
holds a connection to it and looks whether that still stands. A process that is busy, holds Python's lock or is stopped
keeps it; for those the timeout counts. Where no connection can be made (a firewall) nothing is known of a rank.

Beside it each rank that fails appends to one list in the store why, so that the error of every other rank can tell the
cause. All numbers of ranks in this file are global.
"""

from __future__ import annotations

import errno
import json
import os
import re
import select
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, untyped

from lasp.ranks.hosts import is_loopback, this_host

SECONDS = 1.0  # that a rank which failed waits to hear what has become of the others
_LOOK = 0.05  # seconds from one look to the next
_NAMED = 4  # ranks that a message lists of each kind
_LONGEST = 400  # characters of a rank's report
_MOST = 256  # connections: a process has 1,024 open files, mostly
# A host that is lost answers nothing: 5 s after the last word it is asked, 5 times, every 2 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 5}


class _Line:
    """A connection to another rank, which carries nothing."""

    def __init__(self, address: tuple[str, int], here: bool):
        """`here`: the rank is on this host, where a refused connection can only mean that it has ended."""
        self.address, self.here = address, here
        self.ended = False
        self._stands = self._again = False
        self._connect()

    def _connect(self) -> None:
        family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        self.socket: socket.socket | None = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # macOS lacks one
                self.socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        error = self.socket.connect_ex(self.address)
        if error not in (0, errno.EINPROGRESS):
            self._lost(error)

    def look(self) -> bool:
        """Whether the rank has ended."""
        while self.socket is not None:
            poll = select.poll()
            poll.register(self.socket, select.POLLIN | (0 if self._stands else select.POLLOUT))
            events = poll.poll(0)
            if not events:
                self._again &= not self._stands
                break
            error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error == 0 and events[0][1] == select.POLLOUT:
                self._stands = True
            else:
                self._lost(error)
        return self.ended

    def _lost(self, error: int) -> None:
        stood, self._stands = self._stands, False
        self.close()
        if error in (0, errno.ECONNRESET) and not self._again:  # by the end of the rank, or by a router on the way
            self._again = True
            self._connect()
        else:  # a first connection to another host may be refused, or lost, by a firewall: that tells nothing
            self.ended = stood or self._again or (self.here and error == errno.ECONNREFUSED)

    def close(self) -> None:
        """Give the connection back."""
        if self.socket is not None:
            self.socket.close()
        self.socket = None


@dataclass
class _Heard:
    """What a rank that fails has heard of the others, by rank."""

    causes: dict[int, str] = field(default_factory=dict)
    effects: dict[int, str] = field(default_factory=dict)  # errors of those that only waited for another
    answered: bool = False  # whether the store did

    def read(self, reports: str, own: int) -> None:
        """What the list in the store holds."""
        for report in map(json.loads, reports.splitlines()):
            if report["rank"] != own:
                (self.effects if report["effect"] else self.causes)[report["rank"]] = report["text"]
        self.answered = True


class Presence:
    """What this process knows of the lives of all others."""

    def __init__(self) -> None:
        self._world: weakref.ref | None = None  # the world that what follows was said in
        self._listener: socket.socket | None = None
        self._looking = threading.Lock()
        self._lines: dict[int, _Line] = {}
        self.forked = False  # whether this process is a child of a rank, which has no ranks to talk to
        self._forget()

    def _forget(self) -> None:
        for line in self._lines.values():
            line.close()
        self._lines = {}
        self._known: set[int] = set()  # ranks whose address is known, also if it is none that this host can reach
        self._store: Any = None  # a connection of our own to the key-value store
        self._announced = False
        self._mute = False  # whether the store did not answer once
        self._reported = False

    def close(self) -> None:
        """In a forked child, which is no rank: a socket that it kept open would make a dead rank look alive."""
        self.forked = dist.is_initialized()
        self._looking = threading.Lock()  # another thread of the parent may have held it
        if self._listener is not None:
            self._listener.close()
        self._listener, self._world = None, None
        self._forget()

    @property
    def _others(self) -> list[int]:
        """All other ranks; none where nobody else is there, or nobody real."""
        world = dist.group.WORLD if dist.is_initialized() else None
        if self.forked or world is None or dist.get_world_size() == 1 or dist.get_backend() == "fake":
            return []
        with self._looking:
            if self._world is None or self._world() is not world:
                self._forget()
                self._world = weakref.ref(world)
        return [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]

    def announce(self, *, one_host: bool | None = None) -> None:
        """Say where this process can be watched; the second time nothing.

        `one_host`: whether all ranks are on this one; None: if the store is reached by a loopback address.
        """
        if not self._others or self._announced:
            return
        address = "127.0.0.1" if one_host else _own_address(self._connection())
        with self._looking:
            if self._listener is None:
                self._listener = _listener(address)
        address, port = self._listener.getsockname()[:2]
        said = {"host": this_host(), "address": address, "port": port, "pid": os.getpid()}
        self._connection().set(f"address/{dist.get_rank()}", json.dumps(said))
        self._announced = True

    def meet(self, timeout: timedelta, *, one_host: bool) -> None:
        """Announce, wait for all, and watch them; all ranks of the world call it."""
        if not (others := self._others):
            return
        if dist.get_rank() == 0:
            self._connection().delete_key("reports")  # of an earlier life, on the same store
        self.announce(one_host=one_host)
        self._connection().wait([f"address/{rank}" for rank in others], timeout)
        if len(others) < _MOST:
            self.learn(others)

    def learn(self, ranks: Iterable[int]) -> None:
        """Begin to watch those that have announced themselves. Asks the store, which may hang."""
        unknown = set(ranks) & set(self._others) - self._known
        for rank in sorted(unknown)[: _MOST - len(self._lines)]:
            if self._connection().check([f"address/{rank}"]):
                self._known.add(rank)
                said = json.loads(self._connection().get(f"address/{rank}"))
                here = said["host"] == this_host()
                if here or not is_loopback(said["address"]):
                    self._lines[rank] = _Line((said["address"], said["port"]), here)

    def ended(self, ranks: Iterable[int] | None = None) -> list[int]:
        """The ranks (None: of all) whose process has ended; one of which nothing is known is not among them."""
        others = self._others
        with self._looking:
            watched = [(r, self._lines[r]) for r in (others if ranks is None else ranks) if r in self._lines]
            return [rank for rank, line in watched if line.look()]

    def account(self, failure: str, *, effect: bool = True, seconds: float = SECONDS) -> str:
        """Report why this rank fails, and tell what has become of the others; empty if nothing is known.

        Waits so many seconds at most for others to report, if no cause is known before: those that wait for the same
        rank come to their timeouts with this one, and that rank does not.

        Args:
            failure: what other ranks shall read.
            effect: whether another rank must be the cause.
            seconds: see above.
        """
        if not (others := self._others):
            return ""
        heard, until = _Heard(), time.monotonic() + seconds
        if not self._mute:
            # In a thread that can be left behind: PyTorch's client waits without end for a store that is stopped.
            report = json.dumps({"rank": dist.get_rank(), "text": failure[:_LONGEST], "effect": effect}) + "\n"
            thread = threading.Thread(target=self._ask, args=(report, heard, until), daemon=True)
            thread.start()
            thread.join(seconds + 0.1)
            self._mute = thread.is_alive()
        told = _told(others, self.ended(), heard)
        if self._mute and not told:
            by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            holder = "torchrun's agent" if by_agent else "global rank 0"
            return f"the key-value store does not answer: {holder}, which holds it, may hang"
        return told

    def _ask(self, report: str, heard: _Heard, until: float) -> None:
        others, own = self._others, dist.get_rank()
        try:
            store = self._connection()
            if not self._reported:
                store.append("reports", report)
                self._reported = True
            self.learn(others)
            while True:
                heard.read(store.get("reports").decode(), own)
                known = heard.causes or set(self.ended()) - heard.effects.keys() or len(heard.effects) == len(others)
                if known or time.monotonic() >= until:
                    return
                time.sleep(_LOOK)
        except RuntimeError:
            return  # the store has gone: what the connections tell is all there is

    def _connection(self) -> Any:
        """A connection of our own to the store of all ranks: one that waits blocks others."""
        if self._store is None:
            store = dist.group.WORLD.get_group_store().clone()  # type: ignore[union-attr]
            self._store = PrefixStore("lasp/presence", store)
        return self._store


presence = Presence()
os.register_at_fork(after_in_child=presence.close)


def tell_uncaught() -> None:
    """Report what ends this process; of an error that is not lasp's, say after the traceback who has gone."""
    previous = sys.excepthook
    if getattr(previous, "of_lasp", False):
        return

    def hook(kind, error, traceback) -> None:
        previous(kind, error, traceback)
        if issubclass(kind, (KeyboardInterrupt, SystemExit)):
            return
        effect = _is_effect(error)
        text = re.sub(r"\[/\S+:\d+\] ", "", str(error).split("\n")[0])  # without the place in PyTorch's sources
        known = presence.account(f"{kind.__name__}: {text}", effect=effect, seconds=SECONDS if effect else 0.1)
        if effect and known and not kind.__module__.startswith("lasp."):
            print(f"lasp: rank {dist.get_rank()} waited for another; {known}", file=sys.stderr, flush=True)

    hook.of_lasp = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _is_effect(error: BaseException) -> bool:
    """Whether it is an error of communication, of which another rank is the cause."""
    name = type(error).__name__
    if name in ("PeerError", "RankMismatchError", "OutOfMemoryError"):
        return name == "PeerError"
    of_pytorch = isinstance(error, RuntimeError) or name == "CheckpointException"
    comes_from = r"gloo|nccl|store|connection|timed out|Dist\w*Error"
    return of_pytorch and bool(re.search(comes_from, f"{name} {error}", re.I))


def _told(others: list[int], ended: list[int], heard: _Heard) -> str:
    """The cause where it is known; else who has ended of those that waited, and of whom nothing was heard."""
    parts = _by_text(heard.causes)
    if first := [rank for rank in ended if rank not in heard.effects and rank not in heard.causes]:
        parts.append(f"{_named(first)} {'has' if len(first) == 1 else 'have'} ended")
    if parts:
        return "; ".join(parts)
    parts = _by_text(heard.effects)  # where each waited: the one that left out a call is somewhere else
    silent = [rank for rank in others if rank not in heard.effects]
    if silent and heard.answered:
        parts.append(f"{_named(silent)} did not report, and may hang")
    return "; ".join(parts)


def _by_text(reports: dict[int, str]) -> list[str]:
    found: dict[str, list[int]] = {}
    for rank, text in sorted(reports.items()):
        found.setdefault(text, []).append(rank)
    return [f"{_named(ranks)} reported {text}" for text, ranks in found.items()][:_NAMED]


def _named(ranks: list[int]) -> str:
    more = len(ranks) - _NAMED
    listed = ", ".join(map(str, ranks[:_NAMED])) + (f" and {more} more" if more > 0 else "")
    return f"global rank{'s' if len(ranks) > 1 else ''} {listed}"


def _listener(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.bind((address, 0))
    found.listen(4096)  # nobody is ever taken from the queue
    return found


def _own_address(store: Any) -> str:
    """The address by which this host reaches the one that holds the store, and by which others may reach it."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return "127.0.0.1"
    for family, kind, _, _, address in socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM):
        with suppress(OSError), socket.socket(family, kind) as probe:  # this host may lack one of the families
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    return "127.0.0.1"
