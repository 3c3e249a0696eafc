"""How ranks find each other, whoever started them: `init`."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lasp.ranks.group import set_timeout, waiting
from lasp.ranks.presence import presence, tell_uncaught
from lasp.ranks.watch import watch


@dataclass(frozen=True)
class Env:
    """This process among all: what `init` found."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    backend: str
    launcher: str  # "torchrun", "mpi", "slurm" or "single"


def init(backend: str | None = None, *, timeout: float = 600.0) -> Env:
    """Join the other ranks, whoever started them, and return this process's place among them.

    Looks, in this order, for torchrun's variables, an MPI launcher (through mpi4py), Slurm's variables; with none
    of them it is one process, and everything works on a group of one. `backend` is "nccl" or "gloo", by default
    nccl where there is a GPU. NCCL's streams get a high
    priority (the environment variable TORCH_NCCL_HIGH_PRIORITY, unless it is set).

    Raises:
        ValueError: an unknown backend, or nccl without a GPU.
        RuntimeError: a launcher whose library is missing, or an address that cannot be used; it says what to do.
    """
    backend = _check_backend(backend, timeout)
    rank, world, local_rank, local_world, launcher = _discover()
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        backend = dist.get_backend()
    device = torch.device("cpu")
    if backend == "nccl":
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"local rank {local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}. "
                'Start fewer ranks, or pass backend="gloo".'
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if local_world == world:
            _bind_to_loopback()
        _init_process_group(backend, rank, world, device, launcher, timeout)
        with waiting("lasp.init: the meeting of all ranks"):
            presence.meet(timedelta(seconds=timeout), one_host=local_world == world)
    set_timeout(timedelta(seconds=timeout))
    tell_uncaught()
    if backend == "nccl" and world > 1:
        watch.start(timedelta(seconds=timeout))
    return Env(rank, world, local_rank, local_world, device, backend, launcher)


def _check_backend(backend: str | None, timeout: float) -> str:
    if timeout <= 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
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


def _leave() -> None:
    """At the end of a process that has talked over gloo; NCCL's communicators end with the process.

    A thread of gloo's gives back the tensors of the last collective a moment after that is complete, and needs Python's
    lock for it. If the interpreter has begun to end by then, the process aborts ("terminate called without an active
    exception"): in 8 of 24 runs of a script that ended after an all_reduce, and in none of 24 that slept before.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
    time.sleep(0.05)


def _init_process_group(
    backend: str, rank: int, world: int, device: torch.device, launcher: str, timeout: float
) -> None:
    if backend == "gloo":
        atexit.register(_leave)
    options = {"timeout": timedelta(seconds=timeout)}
    if device.type == "cuda":
        # A small message must not queue behind the blocks of a kernel that fills the card. NCCL reads it as it starts.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        options["device_id"] = device  # type: ignore[assignment]  # eager communicator, no guessing of devices
    if world == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **options)  # type: ignore[arg-type]
        return
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(backend, rank=rank, world_size=world, **options)  # type: ignore[arg-type]
    except dist.DistNetworkError as error:
        raise RuntimeError(
            f"rank {rank} of {world} ({launcher}) could not meet the others at {address}: {error}. If the port is "
            "taken, set MASTER_PORT to a free one (torchrun: --master-port); if the host is wrong, set MASTER_ADDR."
        ) from error
    except dist.DistStoreError as error:
        raise RuntimeError(
            f"rank {rank} of {world} ({launcher}) waited {timeout} s at {address} and not all ranks came: {error}. "
            "Under Slurm start one process a task with srun."
        ) from error


def _discover() -> tuple[int, int, int, int, str]:
    """Rank, world size, rank and number of ranks on this host, and who started them. Sets MASTER_ADDR and _PORT."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", "29500")
        local = int(env.get("LOCAL_RANK", env["RANK"]))
        return int(env["RANK"]), world, local, int(env.get("LOCAL_WORLD_SIZE", world)), "torchrun"
    slurm = "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1
    if any(int(env.get(name, "1")) > 1 for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")):
        try:
            return _discover_mpi()
        except ImportError as error:
            if not slurm:
                raise RuntimeError(
                    "started by an MPI launcher, but mpi4py is not installed: pip install 'lasp-runtime[mpi]', "
                    "or start with torchrun"
                ) from error
    if slurm:
        return _discover_slurm()
    return 0, 1, 0, 1, "single"


def _discover_mpi() -> tuple[int, int, int, int, str]:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    meeting_point = None
    if world.rank == 0:
        address = "127.0.0.1" if host.size == world.size else socket.gethostbyname(socket.gethostname())
        meeting_point = (
            os.environ.get("MASTER_ADDR", address),
            os.environ.get("MASTER_PORT", str(_free_port())),
        )
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = world.bcast(meeting_point)
    return world.rank, world.size, host.rank, host.size, "mpi"


def _discover_slurm() -> tuple[int, int, int, int, str]:
    env = os.environ
    world = int(env["SLURM_NTASKS"])
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    num_nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    if num_nodes == 1:
        env.setdefault("MASTER_ADDR", "127.0.0.1")
    elif "MASTER_ADDR" not in env:
        if not nodes:
            raise RuntimeError("Slurm gives no node list (SLURM_JOB_NODELIST); set MASTER_ADDR to rank 0's host")
        env["MASTER_ADDR"] = _first_host(nodes)
    # Every task must come to the same port without talking: one of 20000 that is a function of the job.
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    tasks_here = env.get("SLURM_TASKS_PER_NODE", "1")  # such as "8(x4),2"
    local_world = world if num_nodes == 1 else int(re.split(r"\D", tasks_here)[0])
    return int(env["SLURM_PROCID"]), world, int(env.get("SLURM_LOCALID", "0")), local_world, "slurm"


def _first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[07-09,12]" is gpu07."""
    if shutil.which("scontrol"):
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return listed.stdout.split()[0]
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise RuntimeError(f"cannot read Slurm's node list {nodes!r}; set MASTER_ADDR to rank 0's host")
    return "".join(part for part in match.groups() if part)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _bind_to_loopback() -> None:
    """All ranks are on this host: a laptop's changing network, or none, must not matter."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if names:
            os.environ.setdefault(variable, names[0])
