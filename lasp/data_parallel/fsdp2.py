"""FSDP2 (`fully_shard`) over dp x sp."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lasp import arguments
from lasp.checks.replicas import compare_parameters
from lasp.ranks import collectives, grad_mesh, waiting
from lasp.ranks.group import making_groups


def wrap_fsdp2(
    model: nn.Module, mesh: DeviceMesh, *, blocks: Iterable[nn.Module] = (), validate: str = "first", **options
) -> nn.Module:
    """Shard the parameters of each of `blocks`, then of the rest, over all ranks of `grad_mesh(mesh)`, in place.

    `options` go to `fully_shard` (mp_policy, reshard_after_forward, ...). With dp_replicate > 1 it is hybrid:
    sharded over dp_shard x sp and replicated over dp_replicate. With a loss from `lasp.token_loss` every
    parameter's gradient is that of the whole batch. Unless `validate` is "off", ranks compare the names, shapes and
    dtypes of the parameters first, and which are trained.

    Raises:
        RankMismatchError: ranks hold other parameters; on every rank.
    """
    arguments.module("model", model)
    arguments.choice("validate", validate, ("first", "off"))
    if not isinstance(blocks, Iterable):
        raise TypeError(f"blocks must be modules, got {arguments.shown(blocks)}")
    blocks = [arguments.module("blocks", block) for block in blocks]
    axis = grad_mesh(mesh)
    if not isinstance(axis, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh for FSDP2, got {arguments.shown(mesh)}")
    compare_parameters(model, axis.get_group(), "wrap_fsdp2", validate=validate)
    if mesh.ndim > 1 and mesh["dp_replicate"].size() > 1:
        with making_groups("wrap_fsdp2: making the process group of dp_shard x sp"):
            shard = mesh["dp_shard", "sp"]._flatten("dp_shard_sp")
        axis = DeviceMesh._concatenate([mesh["dp_replicate"], shard])
        if mesh.device_type == "cuda":  # `init_mesh` has connected only the ranks of `grad_mesh`
            for part in (mesh["dp_replicate"], shard):
                collectives.connect(part.get_group(), mesh.device_type)
    with waiting("wrap_fsdp2: sharding the parameters over all ranks"):
        for block in blocks:
            fully_shard(block, mesh=axis, **options)
        fully_shard(model, mesh=axis, **options)
    return model
