"""Processes meet: at a key-value store whose address they know, where each tells what the others must know of it.

What they tell says who is on whose host. Only processes that have compared hosts talk over the loopback interface.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public, untyped

from lasp.ranks.group import RankMismatchError
from lasp.ranks.hosts import LOOPBACK, is_loopback, listen, this_host

_ANSWER = 10.0  # seconds for the store to answer what needs no other rank
_NAMED = 8  # ranks that a message lists

_stores: dict[tuple[str, int], Store] = {}  # connections, and rank 0's server, for as long as the process lives

Result = TypeVar("Result")


@dataclass(frozen=True)
class Place:
    """What a launcher says of this process; None: it does not."""

    rank: int
    world_size: int
    launcher: str
    local_rank: int | None = None
    local_world_size: int | None = None
    address: str = ""  # of the store: a name or a number
    port: int = 0
    agent: bool = False  # whether torchrun's agent holds the store; otherwise rank 0 does
    listener: socket.socket | None = None  # rank 0's, where it listens already

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} ({self.launcher})"


@dataclass(frozen=True)
class Member:
    """What a process tells the others of itself."""

    nonce: str  # tells this process from others that were, or are, the same rank
    host: str
    world_size: int
    backend: str
    local_rank: int | None  # if a launcher says so
    local_world_size: int | None
    gpus: int  # that it sees
    source: str  # its address on the way to the store
    store: str  # the store's address, as it is resolved here


def meet(place: Place, backend: str, timeout: float) -> tuple[Store, list[Member]]:
    """A store that only these processes use, and what each of them tells, by rank.

    Nobody waits much longer than twice the timeout: once for the store, and once for the other ranks.

    Raises:
        RuntimeError: the store cannot be reached, or not all ranks came; on each that came, it says who.
        RankMismatchError: on every rank, two have the same number, or ranks differ in what they must have in common.
    """
    store = _within(timeout + _ANSWER, lambda: _connect(place, timeout), place)
    source, address = _way_to(place)
    gpus = torch.cuda.device_count()
    me = Member(
        uuid.uuid4().hex, this_host(), place.world_size, backend, place.local_rank, place.local_world_size, gpus,
        source, address,
    )  # fmt: skip
    talk = _gather if place.rank == 0 else _tell
    verdict = _within(timeout + _ANSWER, lambda: talk(store, place, me, timeout), place)
    if verdict["problem"]:
        raise RankMismatchError(f"{place}: {verdict['problem']}")
    if verdict["missing"]:
        raise RuntimeError(
            f"{place} waited {timeout:g} s at {place.address}:{place.port} and not all ranks came: "
            f"{verdict['missing']}. {_advice(place)}"
        )
    return PrefixStore(f"lasp/{verdict['life']}", store), [Member(**fields) for fields in verdict["members"]]


def all_succeed(connect: Callable[[], None], store: Store, place: Place, timeout: float) -> None:
    """Call `connect` on all ranks; when it fails on one, those that still try fail as well.

    By itself gloo waits five times its timeout for a rank that has given up (40 s of 8 s, torch 2.13).
    """
    outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    failure: list[str] = []
    ended = threading.Event()

    def try_here() -> None:
        try:
            connect()
            outcome.put(None)
        except Exception as error:  # raised by the caller's thread
            outcome.put(error)

    def talk() -> None:
        try:
            own = store.clone()  # type: ignore[attr-defined]  # a connection that waits keeps others out
            while not ended.wait(0.2):
                if own.check(["failed"]):
                    outcome.put(RuntimeError(own.get("failed").decode()))
                    return
            if failure:
                own.set("failed", failure[0])
        except dist.DistError as error:  # the store has gone, so its process has
            outcome.put(error)

    talking = threading.Thread(target=talk, daemon=True)
    talking.start()
    threading.Thread(target=try_here, daemon=True).start()
    try:
        error = outcome.get(timeout=timeout + _ANSWER)
    except queue.Empty:
        error = TimeoutError(f"no answer for {timeout + _ANSWER:g} s")
    if error is not None:
        failure.append(f"rank {place.rank}: {error}")
    ended.set()
    talking.join(_ANSWER)
    if error is None:
        return
    if place.rank == 0 and not place.agent:
        time.sleep(1.0)  # the others look before the store ends with this process
    raise error


def complete(members: list[Member]) -> list[tuple[int, int]]:
    """Rank and number of ranks on its host, of each process: what its launcher says, otherwise from the hosts.

    Raises:
        RankMismatchError: on every rank, if what a launcher says of one does not fit to the hosts.
    """
    hosts: dict[str, list[int]] = {}
    for rank, member in enumerate(members):
        hosts.setdefault(member.host, []).append(rank)
    places: list[tuple[int, int]] = []
    taken: dict[tuple[str, int], int] = {}
    for rank, member in enumerate(members):
        here = hosts[member.host]
        local_rank = here.index(rank) if member.local_rank is None else member.local_rank
        local_world = len(here) if member.local_world_size is None else member.local_world_size
        places.append((local_rank, local_world))
        if member.local_rank is not None and member.local_world_size is not None:
            continue  # who says both may have reasons, such as hosts that are cut in parts
        other = taken.setdefault((member.host, local_rank), rank)
        if local_rank >= local_world or other != rank:
            raise RankMismatchError(
                f"rank {rank} has local rank {local_rank}"
                + (f", as rank {other} of its host has" if other != rank else "")
                + f"; on its host: {_ranks(here)}. LOCAL_RANK must be set on all ranks of a host, or on none"
            )
    return places


def connected(address: str, port: int) -> bool:
    """Whether this process has met others there before."""
    return (address, port) in _stores


def hosts_of(group: dist.ProcessGroup) -> list[str]:
    """The hosts of all ranks of a group that exists; all of them ask."""
    store = PrefixStore("lasp/hosts", group.get_group_store())  # type: ignore[attr-defined]
    store.set(str(dist.get_rank(group)), this_host())
    hosts = []
    for rank in range(dist.get_world_size(group)):
        try:
            hosts.append(store.get(str(rank)).decode())
        except dist.DistError as error:
            raise RuntimeError(f"rank {rank} has not called lasp.init; all ranks of the process group must") from error
    return hosts


def _connect(place: Place, timeout: float) -> Store:
    """The store: rank 0 begins it, unless torchrun's agent has."""
    where = (place.address, place.port)
    if where not in _stores:
        limit = {"timeout": timedelta(seconds=timeout), "wait_for_workers": False}
        if place.rank or place.agent:
            _knock(place, timeout)
            _stores[where] = dist.TCPStore(*where, **limit)  # type: ignore[attr-defined]  # public, untyped
        else:
            listener = place.listener or _listen_for_all(place)
            host, port, *_ = listener.getsockname()
            host = LOOPBACK if host in ("::", "0.0.0.0") else host
            served = {"is_master": True, "master_listen_fd": listener.detach()}
            _stores[where] = dist.TCPStore(host, port, **served, **limit)  # type: ignore[attr-defined]
    return _stores[where]


def _listen_for_all(place: Place) -> socket.socket:
    try:
        return listen(place.address, place.port)
    except OSError as error:
        raise _not_met(
            place, error, "If the port is taken, set MASTER_PORT to a free one (torchrun: --master-port)"
        ) from error


def _knock(place: Place, timeout: float) -> None:
    """Wait until somebody listens. PyTorch's client would try for twice as long, and not say what is wrong."""
    deadline, pause = time.monotonic() + timeout, 0.05
    while True:
        try:
            left = max(deadline - time.monotonic(), 0.001)
            socket.create_connection((place.address, place.port), timeout=left).close()
            return
        except OSError as error:
            if time.monotonic() + pause > deadline:
                raise _not_met(place, error, f"That was tried for {timeout:g} s. {_why(place, error)}") from error
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


def _not_met(place: Place, error: Exception, advice: str) -> RuntimeError:
    where = f"{place.address}:{place.port}"
    return RuntimeError(f"{place} could not meet the others at {where}: {error}. {advice}.")


def _why(place: Place, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "MASTER_ADDR cannot be resolved on this host: set it to a name or an address of rank 0's host"
    if is_loopback(place.address):
        return (
            "Nobody listens on this host: rank 0 has not started, has ended, has another MASTER_PORT, or is on another "
            "host; then MASTER_ADDR must be an address of that, on all ranks"
        )
    if isinstance(error, ConnectionRefusedError):
        return (
            "Nobody listens there: rank 0 has not started, has ended, or has another MASTER_PORT or MASTER_ADDR (where "
            "its own is a loopback address, or its LOCAL_WORLD_SIZE is WORLD_SIZE, it serves its own host only)"
        )
    return "MASTER_ADDR must be an address of rank 0's host, and MASTER_PORT one that no firewall closes"


def _within(seconds: float, talk: Callable[[], Result], place: Place) -> Result:
    """Talk in a thread that can be left: PyTorch's client may wait forever for a store whose process is stopped."""
    results: list[Result] = []
    errors: list[Exception] = [TimeoutError(f"no answer for {seconds:g} s")]

    def run() -> None:
        try:
            results.append(talk())
        except Exception as error:  # raised by the other thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    error = errors[-1]
    if not isinstance(error, (dist.DistError, TimeoutError)):
        raise error
    holder = "torchrun's agent" if place.agent else "rank 0"
    if place.rank or place.agent:
        _stores.pop((place.address, place.port), None)
    advice = f"The process that holds the store, {holder}, has ended or hangs, or what listens there is another program"
    raise _not_met(place, error, advice) from error


def _gather(store: Store, place: Place, me: Member, timeout: float) -> dict[str, Any]:
    """Rank 0: what all have told, or who has not; it says the same to the others.

    The store may hold what earlier processes left there: torchrun's agent keeps it when it starts the ranks anew. So
    what these processes write stands under a name that none has used.
    """
    life = me.nonce
    store.set("lasp/life", life)
    store.append(_key(life, 0), json.dumps(vars(me)) + "\n")  # type: ignore[attr-defined]
    _comes(store, [_key(life, rank) for rank in range(place.world_size)], timeout)
    came, missing = _attendance(store, life, place)
    told = {rank: [json.loads(line) for line in store.get(_key(life, rank)).splitlines()] for rank in came}
    members = [member for rank in came for member in told[rank]]
    verdict = {"life": life, "missing": missing, "problem": _problem(told), "members": members}
    store.set(_key(life, "verdict"), json.dumps(verdict))
    if verdict["missing"] or verdict["problem"]:  # the store ends with this process: the others read that first
        deadline = time.monotonic() + _ANSWER / 2
        while store.add(_key(life, "readers"), 0) < len(members) - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
    return verdict


def _tell(store: Store, place: Place, me: Member, timeout: float) -> dict[str, Any]:
    """Any other rank: it tells rank 0, and reads what rank 0 says.

    What an earlier rank 0 has said does not name this process.
    """
    deadline, life = time.monotonic() + timeout + _ANSWER / 2, ""
    if not _comes(store, ["lasp/life"], timeout):
        return {"missing": "rank 0 did not", "problem": ""}
    while time.monotonic() < deadline:
        current = store.get("lasp/life").decode()
        if current != life:
            life = current
            store.append(_key(life, place.rank), json.dumps(vars(me)) + "\n")  # type: ignore[attr-defined]
        if _comes(store, [_key(life, "verdict")], 0.5):
            verdict = json.loads(store.get(_key(life, "verdict")))
            if any(member["nonce"] == me.nonce for member in verdict["members"]):
                store.add(_key(life, "readers"), 1)
                return verdict
            time.sleep(0.1)
    _, missing = _attendance(store, life, place)
    other = "rank 0 has met without this process: it has another WORLD_SIZE, or another process is this rank"
    return {"missing": missing or other, "problem": ""}


def _key(life: str, name: int | str) -> str:
    return f"lasp/{life}/meeting/{name}"


def _comes(store: Store, keys: list[str], seconds: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except dist.DistStoreError:
        return False
    return True


def _attendance(store: Store, life: str, place: Place) -> tuple[list[int], str]:
    """The ranks that came, and, if that is not all, in words."""
    came = [rank for rank in range(place.world_size) if store.check([_key(life, rank)])]
    missing = sorted(set(range(place.world_size)) - set(came))
    return came, f"{_ranks(came)} came, {_ranks(missing)} did not" if missing else ""


def _problem(told: dict[int, list[dict[str, Any]]]) -> str:
    """What is wrong with what the ranks that came have told; empty if nothing."""
    for rank, members in told.items():
        if len(members) > 1:
            return f"{len(members)} processes are rank {rank}; every process needs a RANK of its own"
        for name, variable in (("world_size", "WORLD_SIZE"), ("backend", "backend")):
            mine, first = members[0][name], told[0][0][name]
            if mine != first:
                return f"rank {rank} has {variable} {mine}, rank 0 has {first}"
    return ""


def _ranks(ranks: list[int]) -> str:
    more = len(ranks) - _NAMED
    listed = ", ".join(map(str, ranks[:_NAMED])) + (f" and {more} more" if more > 0 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def _advice(place: Place) -> str:
    if place.launcher == "slurm":
        return "Under Slurm start one process a task with srun."
    return "Start one process for every rank, all with one WORLD_SIZE, MASTER_ADDR and MASTER_PORT."


def _way_to(place: Place) -> tuple[str, str]:
    """This host's address on the way to the store, and the store's as it is resolved here; empty if it is not."""
    try:
        resolved = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_DGRAM)
    except socket.gaierror:  # rank 0 does not need to know how others find it
        resolved = []
    for family, *_, where in resolved:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(where)  # sends nothing: only the route is looked up
            except OSError:
                continue
            return probe.getsockname()[0], str(where[0])
    return "", ""
