"""How ranks find each other, whoever started them: `init`."""

from __future__ import annotations

import atexit
import numbers
import os
import re
import shutil
import socket
import subprocess
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]  # public, untyped

from lasp import arguments
from lasp.ranks.group import process, set_timeout, waiting
from lasp.ranks.hosts import LOOPBACK, bind_to_loopback, choose_interfaces, interfaces, is_loopback, listen, this_host
from lasp.ranks.meeting import Place, all_succeed, complete, connected, hosts_of, meet
from lasp.ranks.presence import presence, tell_uncaught
from lasp.ranks.watch import watch

_PORT = 29500  # torchrun's default
_LONGEST = 30 * 24 * 3600.0  # seconds of a timeout


@dataclass(frozen=True)
class Env:
    """This process among all: what `init` found.

    Args:
        rank: of this process among all, from 0.
        world_size: how many there are.
        local_rank: of this process among those of its host, which is also the number of its GPU.
        local_world_size: how many its host has.
        device: the process's GPU, or the CPU with the backend gloo.
        backend: "nccl" or "gloo".
        launcher: who started it: "torchrun", "mpi", "slurm" or "single".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    backend: str
    launcher: str


_joined: tuple[weakref.ref, Env] | None = None  # the default process group that `init` has made


def init(backend: str | None = None, *, timeout: float = 600.0) -> Env:
    """Join the other ranks, whoever started them, and return this process's place among them.

    Looks, in this order, for torchrun's variables, an MPI launcher (through mpi4py), Slurm's variables; with none
    of them it is one process, and everything works on a group of one. RANK, WORLD_SIZE and MASTER_ADDR (rank 0's
    host) are enough: who is on whose host the ranks find out, unless LOCAL_RANK and LOCAL_WORLD_SIZE say it. The
    default of MASTER_PORT is 29500. Where all are on one host nothing listens but on its loopback interface. NCCL's
    streams get a high priority (the environment variable TORCH_NCCL_HIGH_PRIORITY, unless it is set).

    Args:
        backend: "nccl" or "gloo"; None is nccl where there is a GPU.
        timeout: seconds, from 0.001 to 30 days, after which a peer that is silent is an error, in every group of ranks.

    Returns:
        This process's rank, device and launcher. Asked again it gives the same, with the new timeout.

    Raises:
        ValueError, TypeError: an argument, or an environment variable, that is missing, no number, or out of range;
            nccl without a GPU. The message names it and its value.
        RuntimeError: the ranks do not meet within the timeout: an address that cannot be used, a port that is taken,
            a rank that does not come, a launcher whose library is missing. The message says what to do.
        RankMismatchError: on every rank, if they differ in world size or backend, or two are the same rank.
    """
    global _joined
    chosen = _check_arguments(backend, timeout)
    if dist.is_initialized():
        env = _of_existing_group(backend)
        set_timeout(timedelta(seconds=timeout))
        tell_uncaught()
        if env.backend == "nccl" and env.world_size > 1:
            watch.start(timedelta(seconds=timeout))
        return env
    place, one_host = _discover(), True
    if place.world_size == 1:
        bind_to_loopback()
        store, local = dist.HashStore(), [(0, 1)]  # type: ignore[attr-defined]  # public, untyped
    else:
        if place.launcher == "mpi":
            place = _meeting_point_of_mpi(place, timeout)
        store, members = meet(place, chosen, timeout)
        local, one_host = complete(members), len({member.host for member in members}) == 1
        own = [members[place.rank].source, *(member.store for member in members)]
        choose_interfaces([member.host for member in members], own)
        if chosen == "nccl":  # on every rank, or the others would wait
            _check_gpus({rank: (local[rank][0], member.gpus) for rank, member in enumerate(members)})
    local_rank, local_world_size = local[place.rank]
    device = _device(chosen, local_rank)
    _init_process_group(store, chosen, place, device, timeout)
    with waiting("lasp.init: the meeting of all ranks"):
        presence.meet(timedelta(seconds=timeout), one_host=one_host)
    set_timeout(timedelta(seconds=timeout))
    tell_uncaught()
    if chosen == "nccl" and place.world_size > 1:
        watch.start(timedelta(seconds=timeout))
    env = Env(place.rank, place.world_size, local_rank, local_world_size, device, chosen, place.launcher)
    _joined = weakref.ref(dist.group.WORLD), env
    return env


def _check_arguments(backend: object, timeout: object) -> str:
    """Raise for arguments that do not fit; the backend to use."""
    if not isinstance(timeout, numbers.Real) or isinstance(timeout, bool):
        raise TypeError(f"timeout must be a number of seconds, got {arguments.shown(timeout)}")
    if not 0.001 <= timeout <= _LONGEST:  # type: ignore[operator]  # so that NaN is refused as well
        got = arguments.shown(timeout)
        raise ValueError(f"timeout must be a number of seconds from 0.001 to {_LONGEST:.0f}, got {got}")
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f'backend must be "nccl", "gloo" or None, got {backend!r}')
    if backend is None:
        return "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if backend == "mpi":
        raise ValueError(
            'backend "mpi" is not in PyTorch\'s wheels. Start with mpirun as usual and leave backend out: '
            "lasp.init finds the ranks through mpi4py and talks over nccl or gloo."
        )
    if backend not in ("nccl", "gloo"):
        raise ValueError(f'backend must be "nccl", "gloo" or None, got {backend!r}')
    if backend == "nccl" and not torch.cuda.is_available():
        raise ValueError('backend "nccl" needs a GPU and none is visible; use "gloo"')
    return backend


def _of_existing_group(backend: str | None) -> Env:
    """The `Env` of a default process group that exists: made by `init`, or by the caller on all ranks."""
    used, group = str(dist.get_backend()), dist.group.WORLD
    assert group is not None
    if backend is not None and {backend, used} == {"nccl", "gloo"}:
        raise ValueError(f'backend is "{backend}", but the process group exists and has "{used}"; leave backend out')
    if _joined is not None and _joined[0]() is group:
        return _joined[1]
    rank, world = dist.get_rank(), dist.get_world_size()
    place = _discover()
    local = (0, 1)
    if place.local_rank is not None and place.local_world_size is not None:
        local = (place.local_rank, place.local_world_size)
    elif used != "fake":  # nobody else is there
        hosts = hosts_of(group)
        here = [r for r, host in enumerate(hosts) if host == hosts[rank]]
        local = (here.index(rank), len(here))
    if used == "nccl":
        _check_gpus({rank: (local[0], torch.cuda.device_count())})
    return Env(rank, world, *local, _device(used, local[0]), used, place.launcher)


def _check_gpus(ranks: dict[int, tuple[int, int]]) -> None:
    """Raise unless ranks have GPUs of their own; from each rank's local rank, and how many GPUs it sees."""
    for rank, (local_rank, gpus) in ranks.items():
        if local_rank >= gpus:
            raise RuntimeError(
                f"rank {rank} has local rank {local_rank} on its host and no GPU of its own: it sees {gpus}. Start "
                "fewer ranks on a host, let each see all GPUs of its host (CUDA_VISIBLE_DEVICES; Slurm: "
                '--gpus-per-node instead of --gpus-per-task), or pass backend="gloo".'
            )


def _device(backend: str, local_rank: int) -> torch.device:
    if backend != "nccl":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _leave() -> None:
    """Run at the end of a process that has talked over gloo; NCCL's communicators end with the process.

    A thread of gloo's gives back the tensors of the last collective a moment after that is complete, and needs Python's
    lock for it. If the interpreter has begun to end by then, the process aborts ("terminate called without an active
    exception"): in 8 of 24 runs of a script that ended after an all_reduce, and in none of 24 that slept before.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        process.forget_meshes()
        dist.destroy_process_group()
    time.sleep(0.05)


def _init_process_group(store: Store, backend: str, place: Place, device: torch.device, timeout: float) -> None:
    if backend == "gloo":
        atexit.register(_leave)
    options = {"timeout": timedelta(seconds=timeout)}
    if device.type == "cuda":
        # A small message must not queue behind the blocks of a kernel that fills the card. NCCL reads it as it starts.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        options["device_id"] = device  # type: ignore[assignment]  # eager communicator, no guessing of devices

    def connect() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, **options)  # type: ignore[arg-type]

    if place.world_size == 1:
        try:
            connect()
        except RuntimeError as error:
            variable = f"{backend.upper()}_SOCKET_IFNAME"
            raise RuntimeError(
                f"{backend} cannot start in this one process: {error}. {variable}={os.environ.get(variable)!r} must "
                "name a network interface of this host (see ip addr); unset, the loopback is taken"
            ) from error
        return
    try:
        all_succeed(connect, store, place, timeout)
    except (RuntimeError, TimeoutError, ValueError) as error:  # the store's, gloo's and NCCL's have no other in common
        raise RuntimeError(
            f"{place} has met the others at {place.address}:{place.port}, but {backend} could not connect all within "
            f"{timeout:g} s: {error}. A rank has ended since, or the hosts do not reach each other: "
            f"{backend.upper()}_SOCKET_IFNAME names the network interface that they share (see ip addr), and no "
            "firewall may be between them."
        ) from error


def _discover() -> Place:
    """This process's place as variables or a launcher say it. Sets MASTER_ADDR and MASTER_PORT where they are not."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return _of_variables()
    place = _of_mpi_or_slurm()
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in env]
    if place is None and given:
        missing = " and ".join(name for name in ("RANK", "WORLD_SIZE") if name not in env)
        raise ValueError(
            f"{given[0]} is {env[given[0]]!r} without {missing}: this process would train alone. Set RANK and "
            f"WORLD_SIZE both, or none of {', '.join(given)}"
        )
    if place is None:
        return Place(0, 1, "single")
    for name, found in (("RANK", place.rank), ("WORLD_SIZE", place.world_size)):
        if _integer(name) not in (None, found):
            raise ValueError(f"{name} is {env[name]!r}, but {place.launcher} has started this process as {place}")
    return place


def _of_variables() -> Place:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, of torchrun, Kubernetes or a user's own script."""
    env = os.environ
    world = _required("WORLD_SIZE", lowest=1)
    rank = _required("RANK", below=("WORLD_SIZE", world))
    local_world = _integer("LOCAL_WORLD_SIZE", lowest=1, below=("WORLD_SIZE", world + 1))
    below = ("WORLD_SIZE", world) if local_world is None else ("LOCAL_WORLD_SIZE", local_world)
    place = Place(rank, world, "torchrun", _integer("LOCAL_RANK", below=below), local_world)
    if world == 1:
        return place
    together = local_world == world
    if "MASTER_ADDR" not in env and not together:
        raise ValueError(
            "MASTER_ADDR is not set: on every rank, set it to an address of rank 0's host (127.0.0.1 if all ranks are "
            "on one), or LOCAL_WORLD_SIZE to WORLD_SIZE if all are on this host"
        )
    # torchrun's agent listens where it says; otherwise rank 0 shall not listen for others than it needs.
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _at(place, LOOPBACK if together and not agent else "", agent)


def _at(place: Place, address: str, agent: bool = False) -> Place:
    """The place with the address of the store, by default MASTER_ADDR, and MASTER_PORT."""
    os.environ.setdefault("MASTER_PORT", str(_PORT))
    port = _required("MASTER_PORT", lowest=1, below=("", 2**16))
    named = os.environ.setdefault("MASTER_ADDR", address)
    if not named.strip():
        raise ValueError(f"MASTER_ADDR must be an address of rank 0's host, got {named!r}")
    address = address or named
    if address == "localhost" and not agent:
        address = LOOPBACK  # the name may be an address of IPv6 to some
    return replace(place, address=address, port=port, agent=agent)


def _of_mpi_or_slurm() -> Place | None:
    """What one of these says, MPI before Slurm; None if neither has started this process."""
    slurm = _of_slurm() if "SLURM_PROCID" in os.environ and "SLURM_NTASKS" in os.environ else None
    sizes = {name: _integer(name, lowest=1) or 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")}
    if max(sizes.values()) == 1:
        return slurm
    try:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no library of MPI that it could use
        if slurm is not None:
            return slurm
        raise RuntimeError(
            f"started by an MPI launcher, but mpi4py is not installed: pip install 'lasp-runtime[mpi]', "
            f"or start with torchrun ({error})"
        ) from error
    name, size = max(sizes.items(), key=lambda item: item[1])
    if world.size < size:
        if slurm is not None:
            return slurm
        raise RuntimeError(
            f"{name} is {size}, but mpi4py sees {world.size}: it uses another MPI than the launcher, and each process "
            "would train alone. Build mpi4py with the launcher's MPI, or start with torchrun."
        )
    return Place(world.rank, world.size, "mpi")


def _meeting_point_of_mpi(place: Place, timeout: float) -> Place:
    """An address of rank 0's host that all ranks reach, and where rank 0 listens already."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if port.isdecimal() and connected(address, int(port)):  # all have met before, and these are not the user's
        return replace(place, address=address, port=int(port))
    listeners: list[socket.socket] = []
    together = len(set(world.allgather(this_host()))) == 1
    named, problem = os.environ.get("MASTER_ADDR"), ""
    if world.rank == 0:
        try:  # the others wait in a broadcast that has no timeout
            port = _integer("MASTER_PORT", lowest=1, below=("", 2**16)) or 0
            if named is not None and is_loopback(named) and not together:
                raise ValueError(f"MASTER_ADDR is {named!r}, but the ranks are on several hosts")
            addresses = [LOOPBACK] if together else [named] if named else _addresses()
            listeners = [listen(address, port) for address in addresses]
            offered = [(address, x.getsockname()[1]) for address, x in zip(addresses, listeners)]
        except (OSError, ValueError) as error:
            offered, problem = [], f"rank 0 cannot listen for the others: {error}; set MASTER_ADDR and MASTER_PORT"
    offered, named, problem = world.bcast((offered, named, problem) if world.rank == 0 else None)
    if problem:
        raise RuntimeError(problem)
    reached = offered if named or together else _reached(offered, min(timeout, 5.0))
    reached_by = world.allgather(reached)
    common = [where for where in offered if all(where in found for found in reached_by)]
    if not common:
        lost = [rank for rank, found in enumerate(reached_by) if not found]
        raise RuntimeError(
            f"no address of rank 0's host ({', '.join(address for address, _ in offered)}) is reached by all ranks, "
            f"and none by ranks {lost[:8]}; set MASTER_ADDR to one that is, and see that no firewall is between them"
        )
    for where, x in zip(offered, listeners):
        if where != common[0]:
            x.close()
    listener = listeners[offered.index(common[0])] if listeners else None
    address, port = common[0]
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    return replace(place, address=address, port=port, listener=listener)


def _addresses() -> list[str]:
    """The addresses of this host that others may reach: first what its name stands for."""
    own = [address for _, address in interfaces()]
    try:
        named = [str(x[4][0]) for x in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    except socket.gaierror:
        named = []
    found = list(dict.fromkeys([x for x in named if not is_loopback(x) and (x in own or not own)] + own))
    if not found:
        raise ValueError("this host knows no address of its own that others reach")
    return found


def _reached(offered: list[tuple[str, int]], seconds: float) -> list[tuple[str, int]]:
    """Those of the addresses at which somebody listens, as seen from here."""

    def reach(where: tuple[str, int]) -> bool:
        try:
            socket.create_connection(where, timeout=seconds).close()
        except OSError:
            return False
        return True

    with ThreadPoolExecutor(len(offered)) as pool:
        return [where for where, reaches in zip(offered, pool.map(reach, offered)) if reaches]


def _of_slurm() -> Place:
    env = os.environ
    world = _required("SLURM_NTASKS", lowest=1)
    rank = _required("SLURM_PROCID", below=("SLURM_NTASKS", world))
    local_rank = _integer("SLURM_LOCALID", below=("SLURM_NTASKS", world))
    if world == 1:
        return Place(0, 1, "single")
    lists = [env[name] for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if name in env]
    counts = [_integer(name, lowest=1) for name in ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")]
    nodes = next((count for count in counts if count), None)
    # Every task must come to the same port without talking: one of 20000 that is a function of the job and its step.
    number = (_integer("SLURM_JOB_ID") or 0) + (_integer("SLURM_STEP_ID") or 0)
    env.setdefault("MASTER_PORT", str(20000 + number % 20000))
    if nodes == 1:
        return _at(Place(rank, world, "slurm", local_rank, world), LOOPBACK)
    if "MASTER_ADDR" not in env:
        if not lists:
            raise RuntimeError("Slurm gives no node list (SLURM_JOB_NODELIST); set MASTER_ADDR to rank 0's host")
        env["MASTER_ADDR"] = _first_host(lists[0])
    if _integer("SLURM_NODEID"):
        _refuse_loopback(env["MASTER_ADDR"])
    return _at(Place(rank, world, "slurm", local_rank), "")


def _refuse_loopback(host: str) -> None:
    """Raise on a host that is not rank 0's, if the address is a loopback one."""
    try:
        found = {str(x[4][0]) for x in socket.getaddrinfo(host, None)}
    except socket.gaierror:  # is tried again, and named, when ranks meet
        return
    if all(is_loopback(address) for address in found):
        raise RuntimeError(
            f"rank 0's host is {host!r}, which is the loopback address {', '.join(sorted(found))} on this other node; "
            "set MASTER_ADDR to an address of rank 0's host that all nodes reach"
        )


def _first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[07-09,12]" is gpu07."""
    if shutil.which("scontrol"):
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        if listed.returncode or not listed.stdout.split():
            raise RuntimeError(
                f"scontrol cannot read Slurm's node list {nodes!r}: {listed.stderr.strip()}; set MASTER_ADDR to rank "
                "0's host"
            )
        return listed.stdout.split()[0]
    match = re.match(r"[^,\[\]\s](?:[^,\[\]]|\[\d[^\]]*\])*(?=,|$)", nodes)
    if match is None:
        raise RuntimeError(f"cannot read Slurm's node list {nodes!r}; set MASTER_ADDR to rank 0's host")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def _integer(name: str, lowest: int = 0, below: tuple[str, int] | None = None) -> int | None:
    """An environment variable; None if it is not set. `below` is a limit, and the variable that gives it, or ""."""
    text = os.environ.get(name)
    if text is None:
        return None
    digits = text.strip()
    value = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else -1  # of 64 bits
    if value < lowest or (below is not None and value >= below[1]):
        upto = f"of at least {lowest}" if below is None else f"from {lowest} to {below[1] - 1}"
        limit = f" ({below[0]} is {os.environ[below[0]]})" if below is not None and below[0] else ""
        got = arguments.shown(text)
        raise ValueError(f"the environment variable {name} must be an integer {upto}{limit}, got {got}")
    return value


def _required(name: str, lowest: int = 0, below: tuple[str, int] | None = None) -> int:
    value = _integer(name, lowest, below)
    assert value is not None, name  # the caller has seen that it is set
    return value
