"""Ranks: how they find each other (`init`), how they are arranged (`init_mesh`), and one sequence axis among them."""

from __future__ import annotations

import atexit
import itertools
import os
import re
import shutil
import socket
import subprocess
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lasp import collectives

MESH_AXES = ("dp_replicate", "dp_shard", "sp", "tp")
EXCHANGES = ("auto", "ring", "all_gather", "pipeline", "direct")


class RankMismatchError(RuntimeError):
    """Ranks disagree about what they compute. Raised on every rank, naming the rank that differs."""


class PeerError(RuntimeError):
    """A rank that this one waits for has ended, or was silent for the timeout of the group."""


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
    nccl where there is a GPU. A peer that is silent for `timeout` seconds is an error. NCCL's streams get a high
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


def init_mesh(*, dp_replicate: int = 1, dp_shard: int = -1, sp: int = 1, tp: int = 1) -> DeviceMesh:
    """A `DeviceMesh` over all ranks with the axes dp_replicate, dp_shard, sp, tp; one of them may be -1 (the rest).

    Neighbours on the sequence axis are neighbours in rank, so with 8 GPUs a node they share a node. All ranks must call
    it, and over NCCL those of `grad_mesh` meet here, so that no step of training connects them (`collectives.connect`).
    """
    if not dist.is_initialized():
        raise RuntimeError("call lasp.init() before lasp.init_mesh()")
    sizes = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "sp": sp, "tp": tp}
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f"{name} must be positive or -1, got {size}")
    world = dist.get_world_size()
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"only one axis may be -1, got {' and '.join(open_axes)}")
    known = 1
    for size in sizes.values():
        known *= 1 if size == -1 else size
    if world % known or (not open_axes and world != known):
        raise ValueError(f"{sizes} does not divide {world} ranks")
    shape = tuple(world // known if size == -1 else size for size in sizes.values())
    device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=MESH_AXES)
    if device_type == "cuda":
        collectives.connect(grad_group(mesh)[0], device_type)
    return mesh


@dataclass
class Traffic:
    """What one layer has exchanged so far, counted where it is sent, and how it did so last."""

    calls: int = 0  # of the operator in forward; a checkpoint's recompute is none
    forward_exchanges: int = 0
    reverse_exchanges: int = 0
    messages: int = 0  # to a neighbour; an all-gather counts as one
    bytes_sent: int = 0  # in an all-gather the states of others too, which a rank passes on
    schedule: str = ""  # of the heads that the horizon leaves; "neighbour" if it leaves none
    blocks: int = 1  # that a state was cut into
    predicted_seconds: float = 0.0  # for the last exchange, by the cost model
    kernels: str = ""  # "triton" or "reference": what computed the layer


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """The ranks over which a sequence is split, in sequence order. What `sequence=` of the operator takes.

    Args:
        mesh: a 1-D `DeviceMesh` such as `mesh["sp"]`, a `ProcessGroup`, or None for one rank.
        exchange: how a state travels (docs/exchange.md): "ring", "all_gather", "pipeline", "direct" (ranks of one
            host), or "auto", one of them by a cost model.
        name: the layer, for messages.
        validate: "first" compares what the ranks are about to compute before the first exchange and then every 1000th,
            and before an optimizer steps how many exchanges they made (see `lasp.agreement`), so that a difference is
            a `RankMismatchError` on every rank; "off" does not.
        check_finite: raise `FloatingPointError` before the optimizer steps if a state was NaN or Inf
            (see `lasp.assert_finite`).
    """

    mesh: DeviceMesh | ProcessGroup | None
    exchange: str = field(default="auto", kw_only=True)
    name: str = field(default="", kw_only=True)
    validate: str = field(default="first", kw_only=True)
    check_finite: bool = field(default=False, kw_only=True)
    group: ProcessGroup | None = field(init=False, repr=False)
    ranks: tuple[int, ...] = field(init=False)  # global ranks
    rank: int = field(init=False)
    traffic: Traffic = field(init=False, repr=False, default_factory=Traffic)
    key: str = field(init=False, repr=False)  # stands for this object where only plain values can go (see compiled.py)

    def __post_init__(self):
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange must be one of {EXCHANGES}, got {self.exchange!r}")
        if self.validate not in ("first", "off"):
            raise ValueError(f'validate must be "first" or "off", got {self.validate!r}')
        group, ranks = _group_and_ranks(self.mesh)
        me = dist.get_rank() if group is not None else 0
        for name, value in (("group", group), ("ranks", ranks), ("rank", ranks.index(me))):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "key", f"sequence{next(_counter)}")
        _by_key[self.key] = self

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    def count_exchange(self, *, reverse: bool) -> None:
        """In the layer's traffic, and unless `validate` is "off" among those that ranks compare (`lasp.agreement`)."""
        self.traffic.forward_exchanges += not reverse
        self.traffic.reverse_exchanges += reverse
        if self.group is not None and self.size > 1 and self.validate == "first":
            exchanges.setdefault(self.group, Counter())[self.name, reverse] += 1

    def neighbour(self, offset: int) -> int | None:
        """The rank, as the group counts it, `offset` places further in the sequence; None past an end."""
        place = self.rank + offset
        return self.rank_in_group(place) if self.group is not None and 0 <= place < self.size else None

    def rank_in_group(self, place: int) -> int:
        """The rank, as the group counts it, at a place of the sequence. The two orders may differ."""
        assert self.group is not None
        return dist.get_group_rank(self.group, self.ranks[place])

    def name_of(self, group_rank: int) -> str:
        """For messages: what `neighbour` returns, as a place in the sequence and, where that differs, globally."""
        if self.group is None:
            return "rank 0"
        global_rank = dist.get_global_rank(self.group, group_rank)
        place = self.ranks.index(global_rank)
        return f"rank {place}" + ("" if place == global_rank else f" (global rank {global_rank})")

    def __deepcopy__(self, memo) -> SequenceParallel:
        return self  # a copied model is split over the same ranks; process groups cannot be copied


# By group, of the layers of a name and in a direction: since an optimizer last stepped.
exchanges: weakref.WeakKeyDictionary[ProcessGroup, Counter[tuple[str, bool]]] = weakref.WeakKeyDictionary()
_counter = itertools.count()
_by_key: weakref.WeakValueDictionary[str, SequenceParallel] = weakref.WeakValueDictionary()


def sequence_of_key(key: str) -> SequenceParallel | None:
    """The living `SequenceParallel` of a key; None for the empty one."""
    return _by_key[key] if key else None


def _group_and_ranks(mesh: DeviceMesh | ProcessGroup | None) -> tuple[ProcessGroup | None, tuple[int, ...]]:
    """The group, and its global ranks in the order of the mesh (a group itself sorts them)."""
    if mesh is None:
        return None, (0,)
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f'expected one mesh axis such as mesh["sp"], got {mesh.mesh_dim_names} {tuple(mesh.shape)}'
            )
        ranks = tuple(mesh.mesh.tolist())
        if dist.get_rank() not in ranks:  # then it has no group
            raise ValueError(f"rank {dist.get_rank()} is not in the sequence-parallel group {ranks}")
        return mesh.get_group(), ranks
    if mesh is dist.GroupMember.NON_GROUP_MEMBER:  # what dist.new_group gives to the ranks that it leaves out
        raise ValueError(f"rank {dist.get_rank()} is not in the sequence-parallel group")
    if isinstance(mesh, ProcessGroup):
        return mesh, tuple(dist.get_process_group_ranks(mesh))
    raise TypeError(f"expected a 1-D DeviceMesh, a ProcessGroup or None, got {type(mesh).__name__}")


def sequence_axis(mesh: DeviceMesh | ProcessGroup | SequenceParallel | None) -> SequenceParallel:
    """The sequence axis of what a user holds: the whole mesh, one axis of it, a group, or None."""
    if isinstance(mesh, SequenceParallel):
        return mesh
    if isinstance(mesh, DeviceMesh) and mesh.ndim > 1:
        if "sp" not in (mesh.mesh_dim_names or ()):
            raise ValueError(f'the mesh has no axis "sp", only {mesh.mesh_dim_names}')
        mesh = mesh["sp"]
    return SequenceParallel(mesh)


def grad_mesh(mesh: DeviceMesh | ProcessGroup | None) -> DeviceMesh | ProcessGroup | None:
    """The ranks over which a gradient is averaged: dp_replicate x dp_shard x sp as one axis, without tp.

    Pass it to `fully_shard(mesh=...)`, or its group to DDP. With a loss from `token_loss` the average over these
    ranks is the exact gradient; leaving out sp is a mistake that no loss curve shows. A 1-D mesh, a group or None
    is returned as it is.
    """
    if not isinstance(mesh, DeviceMesh) or mesh.ndim == 1:
        return mesh
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "tp")
    if "sp" not in names:
        raise ValueError(f'the mesh has no axis "sp", only {mesh.mesh_dim_names}')
    return mesh["sp"] if names == ("sp",) else mesh[names]._flatten("grad")


def grad_group(mesh: DeviceMesh | ProcessGroup | None) -> tuple[ProcessGroup | None, int]:
    """The process group of `grad_mesh`, and its size."""
    axis = grad_mesh(mesh)
    group = axis.get_group() if isinstance(axis, DeviceMesh) else axis
    return group, dist.get_world_size(group) if group is not None else 1


def group_timeout(group: ProcessGroup) -> timedelta:
    """After which a rank of the group that does not come is an error."""
    return group._get_backend(group._device_types[0]).options._timeout
