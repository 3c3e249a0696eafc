"""How ranks are arranged: `init_mesh`, the sequence axis of a mesh, and the ranks over which gradients are averaged."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lasp import arguments
from lasp.ranks import collectives
from lasp.ranks.group import making_groups, peers_of, process
from lasp.ranks.sequence import SequenceParallel

MESH_AXES = ("dp_replicate", "dp_shard", "sp", "tp")


def init_mesh(*, dp_replicate: int = 1, dp_shard: int = -1, sp: int = 1, tp: int = 1) -> DeviceMesh:
    """A `DeviceMesh` over all ranks with the axes dp_replicate, dp_shard, sp, tp.

    Neighbours on tp, which send most (`lasp.tensor_parallel`), are neighbours in rank, and then those on the sequence
    axis, so with 8 GPUs a node they share a node. All ranks must call it, and over NCCL those of `grad_mesh` meet here,
    so that no step of training connects them (`collectives.connect`). Asked again for the same sizes it gives the same
    mesh: PyTorch keeps threads and sockets of a process group to the end of the process, whoever needs it.

    Args:
        dp_replicate: ranks that hold the same part of a model and other sequences.
        dp_shard: ranks among which a model may be dealt out, with other sequences.
        sp: ranks that share each sequence.
        tp: ranks that share each layer's weights.

    One of them may be -1: as many as the others leave.

    Returns:
        The mesh; `mesh["sp"]` is its axis of the sequence. On a GPU's ranks its device is "cuda", else "cpu".

    Raises:
        RuntimeError: `lasp.init` was not called.
        ValueError, TypeError: sizes that are no positive integers or -1, more than one -1, or whose product is not the
            number of ranks.
        PeerError: a rank did not come within the timeout.
    """
    if not dist.is_initialized():
        raise RuntimeError("call lasp.init() before lasp.init_mesh()")
    sizes = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "sp": sp, "tp": tp}
    sizes = {name: arguments.integer(name, size) for name, size in sizes.items()}
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
        alone = "; start as many with torchrun --nproc-per-node, mpirun or srun" if world == 1 else ""
        raise ValueError(f"{sizes} does not divide {world} ranks{alone}")
    shape = tuple(world // known if size == -1 else size for size in sizes.values())
    made = process.meshes_of_world()
    mesh, groups = made.get(shape, (None, []))
    if mesh is not None and all(peers_of(group).exists for group in groups):  # else one was destroyed
        return mesh
    device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
    with making_groups("lasp.init_mesh: making the process groups of all ranks"):
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=MESH_AXES)
    group, _ = grad_group(mesh)  # made here, where all ranks come, and not by the first loss
    connect_once(group, device_type)
    groups = [*mesh.get_all_groups(), *([] if group is None else [group])]
    for group in groups:
        peers_of(group)  # so that the timeout of another `lasp.init` is theirs
    made[shape] = mesh, groups
    return mesh


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
    is returned as it is. Of a mesh that `init_mesh` has not made, the first call makes a process group: all ranks call
    it, and before a graph of torch.compile does.

    Args:
        mesh: the whole mesh, an axis of it, a ProcessGroup, or None for one rank.

    Returns:
        A mesh of one dimension; or what was given, if that was no mesh.

    Raises:
        TypeError: `mesh` is something else.
        ValueError: a mesh of several axes of which none is "sp".
        PeerError: a rank did not come within the timeout, where a process group is made.
    """
    if not isinstance(mesh, DeviceMesh):
        if mesh is not None and not isinstance(mesh, ProcessGroup):
            raise TypeError(f"mesh must be a DeviceMesh, a ProcessGroup or None, got {arguments.shown(mesh)}")
        return mesh
    if mesh.ndim == 1:
        return mesh
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "tp")
    if "sp" not in names:
        raise ValueError(f'the mesh has no axis "sp", only {mesh.mesh_dim_names}')
    if names == ("sp",):
        return mesh["sp"]
    # In a graph, which can read no clock, the group is there: `init_mesh` has made it.
    in_graph = torch.compiler.is_compiling()
    name = "dp_shard_sp" if names == ("dp_shard", "sp") else "grad"  # that of a replica is another one
    with nullcontext() if in_graph else making_groups("lasp.grad_mesh: making the process group of dp x sp"):
        return mesh[names]._flatten(name)


def replica_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks of this rank's replica, the mesh without its axis dp_replicate: for replicas that train apart.

    Where a slow network joins the replicas and `lasp.CO2` averages them now and then, all that belongs to a step takes
    this in place of the whole mesh: `parallelize` (its "sp"), `shard_batch`, `token_loss`, and `lasp.data_parallel`,
    `wrap_ddp`, `wrap_fsdp2` or `sync_grads`. The first call makes a process group: all ranks call it.

    Args:
        mesh: the whole mesh of `init_mesh`.

    Returns:
        The mesh with its other axes, of this rank's replica.

    Raises:
        TypeError: `mesh` is no mesh.
        ValueError: it has no axis "dp_replicate" or "sp".
        PeerError: a rank did not come within the timeout.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {arguments.shown(mesh)}")
    names = tuple(mesh.mesh_dim_names or ())
    if not {"dp_replicate", "sp"} <= set(names):
        raise ValueError(f'mesh must have the axes "dp_replicate" and "sp", got {mesh.mesh_dim_names}')
    replica = mesh[tuple(name for name in names if name != "dp_replicate")]
    group, _ = grad_group(replica)
    connect_once(group, mesh.device_type)  # `init_mesh` has done so with the ranks of `grad_mesh` only
    return replica


def connect_once(group: ProcessGroup | None, device_type: str) -> None:
    """Before training, as no timeout ends the wait for it (`collectives.connect`); all ranks of the group call it."""
    if group is not None and device_type == "cuda" and not peers_of(group).all_connected:
        collectives.connect(group, device_type)
        peers_of(group).all_connected = True


def shard_mesh(mesh: DeviceMesh | ProcessGroup | None) -> DeviceMesh | ProcessGroup | None:
    """The ranks over which parameters or states of optimizers are dealt out: those of `grad_mesh` without dp_replicate.

    Along dp_replicate all ranks hold the same. The first call for a mesh that has such an axis makes a process group;
    all ranks call it.
    """
    if not isinstance(mesh, DeviceMesh) or copies_of(mesh) == 1:
        return grad_mesh(mesh)
    shard = grad_mesh(replica_mesh(mesh))
    connect_once(mesh["dp_replicate"].get_group(), mesh.device_type)
    return shard


def copies_of(mesh: DeviceMesh | ProcessGroup | None) -> int:
    """How many ranks hold the same part of a model that is dealt out: the size of dp_replicate."""
    if not isinstance(mesh, DeviceMesh) or mesh.ndim == 1 or "dp_replicate" not in (mesh.mesh_dim_names or ()):
        return 1
    return mesh["dp_replicate"].size()


def grad_group(mesh: DeviceMesh | ProcessGroup | None) -> tuple[ProcessGroup | None, int]:
    """The process group of `grad_mesh`, and its size."""
    axis = grad_mesh(mesh)
    group = axis.get_group() if isinstance(axis, DeviceMesh) else axis
    if group is not None and not torch.compiler.is_compiling():
        peers_of(group)  # for its timeout, if it is the user's; making a `Peers` is no part of a graph
    return group, dist.get_world_size(group) if group is not None else 1


def axis_groups(mesh: DeviceMesh | ProcessGroup | None) -> list[ProcessGroup]:
    """The groups of this rank along all axes of the mesh that `mesh` is or is an axis of; those of one rank left out.

    What is reduced along one after the other is reduced over all ranks of that mesh.
    """
    if isinstance(mesh, DeviceMesh):
        root = mesh._get_root_mesh()
        return [root.get_group(axis) for axis in range(root.ndim) if root.size(axis) > 1]
    return [] if mesh is None else [mesh]
