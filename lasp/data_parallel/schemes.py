"""`data_parallel`: what lies on each rank beside sequence parallelism, by the name of a scheme."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lasp import arguments
from lasp.checks.agreement import compare
from lasp.data_parallel import ddp, fsdp2, legacy
from lasp.data_parallel.ddp import check_plain
from lasp.data_parallel.fsdp2 import check_blocks
from lasp.data_parallel.legacy import AfterBackward
from lasp.ranks import SequenceParallel, copies_of, grad_group, shard_mesh
from lasp.ranks.group import process

_OF_WEIGHTS = "parameters, gradients and the optimizer's states"
_DEALT_OUT = {  # by scheme
    "ddp": "",
    "ddp-legacy": "",
    "zero1": "the optimizer's states",
    "zero2": "gradients and the optimizer's states",
    "zero3": _OF_WEIGHTS,
    "fsdp2": _OF_WEIGHTS,
    "hsdp": _OF_WEIGHTS,
}
SCHEMES = tuple(_DEALT_OUT)
FSDP2_SCHEMES = ("zero2", "zero3", "fsdp2", "hsdp")

_OURS = {"module", "mesh", "process_group"}  # arguments of PyTorch's wrappers that are no options


def data_parallel(
    model: nn.Module,
    mesh,
    *,
    scheme: str,
    optimizer: Callable[[Iterable[Tensor]], Optimizer],
    blocks: Iterable[nn.Module] = (),
    validate: str = "first",
    **options,
) -> tuple[nn.Module, Optimizer]:
    """The model and its optimizer under a scheme of data parallelism, over all ranks of `lasp.grad_mesh(mesh)`.

        model, optimizer = lasp.data_parallel(
            model, mesh, scheme="zero3", optimizer=functools.partial(torch.optim.AdamW, lr=3e-4), blocks=model.blocks
        )

    After a backward (the last one, see `lasp.no_sync`) the gradients are those of the whole batch, with a loss from
    `lasp.token_loss`: averaged over data and sequence parallelism. `torch.nn.utils.clip_grad_norm_`, schedules of
    learning rates and torch.distributed.checkpoint work as ever. What a scheme deals out lies once in every dp_shard x
    sp ranks; along dp_replicate all hold the same. docs/data_parallel.md says what that costs and when to take which.

    Args:
        model: after `lasp.parallelize` and activation checkpointing; the same on all ranks.
        mesh: the whole mesh; for schemes that shard nothing, or the optimizer's states alone, also one axis, a
            ProcessGroup, or None for one rank.
        scheme: "ddp" (DistributedDataParallel); "ddp-legacy" (without buckets: all gradients in one message after
            backward); "zero1" (DDP, and PyTorch's ZeroRedundancyOptimizer); "zero2" (FSDP2, whose weights stay whole
            from the forward to the backward); "zero3", or "fsdp2" (FSDP2); "hsdp" (the same with dp_replicate > 1).
        optimizer: makes one of parameters, such as `functools.partial(torch.optim.AdamW, lr=3e-4)`. It is called when
            the model is wrapped, with the parameters that are trained, and may sort them into groups.
        blocks: modules whose weights FSDP2 gathers together, as a rule the layers; the other schemes need none.
        validate: "first" compares on all ranks scheme, names, shapes and dtypes, and refuses a step on a parameter
            that was unfrozen or added later where nobody averages it; "off" does neither.
        options: for `DistributedDataParallel` or `fully_shard`, as the scheme has it (mp_policy, ..).

    Returns:
        The model to call: a `DistributedDataParallel` for "ddp" and "zero1", else the same module. And its optimizer.

    Raises:
        ValueError, TypeError: an argument that does not fit; on every rank, before anything is sent, but for what is
            seen only once the model is wrapped: what `optimizer` returns, and values of `options` that PyTorch refuses.
        RankMismatchError: ranks have other schemes or parameters; on every rank.
    """
    arguments.module("model", model)
    arguments.choice("scheme", scheme, SCHEMES)
    arguments.choice("validate", validate, ("first", "off"))
    _check_optimizer(optimizer)
    blocks = check_blocks(model, blocks)
    _check_options(scheme, options)
    _check_whole(model)
    if scheme in ("ddp", "zero1"):
        check_plain(model)
    group, ranks = grad_group(mesh)
    _check_mesh(scheme, mesh)
    if ranks > 1 and validate == "first":
        compare(SequenceParallel(group), {"scheme": scheme}, before="lasp.data_parallel")
    by = f"lasp.data_parallel(.., scheme={scheme!r})"
    if scheme in FSDP2_SCHEMES:
        if scheme == "zero2":
            options["reshard_after_forward"] = False
        wrapped = fsdp2.wrapped(by, model, mesh, blocks, validate, options)
    elif scheme == "ddp-legacy":
        wrapped = legacy.wrapped(by, model, mesh, validate)
    else:
        wrapped = ddp.wrapped(by, model, mesh, validate, options)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    made = optimizer(trained)
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {arguments.shown(made)} from it")
    over = shard_mesh(mesh) if _DEALT_OUT[scheme] else None
    if scheme == "zero1" and over is not None:
        from lasp.data_parallel.zero1 import Zero1  # what it imports takes time, and warns of torch.jit

        made = Zero1(made, over.get_group() if isinstance(over, DeviceMesh) else over)
    for module in {model, wrapped}:
        process.schemes[module] = _told(scheme, ranks, copies_of(mesh))
    return wrapped, made


def _told(scheme: str, ranks: int, copies: int) -> str:
    """What `lasp.explain` says of the scheme."""
    what = _DEALT_OUT[scheme]
    shards = f"; {what} dealt out over {ranks // copies}" if what else ""
    of_copies = f", in {copies} copies" if what and copies > 1 else ""
    return f"data parallel: {scheme}, gradients averaged over {ranks} ranks{shards}{of_copies}"


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        got = type(optimizer).__name__ if isinstance(optimizer, Optimizer) else arguments.shown(optimizer)
        raise TypeError(
            "optimizer must be a function that makes one of parameters, such as functools.partial(torch.optim.AdamW, "
            f"lr=3e-4), since a scheme may shard them first; got {got}"
        )


def _check_options(scheme: str, options: dict[str, Any]) -> None:
    """PyTorch's wrapper would refuse them, too, but after ranks have met."""
    wrapper = fully_shard if scheme in FSDP2_SCHEMES else DistributedDataParallel
    known = inspect.signature(wrapper).parameters.keys() - _OURS if scheme != "ddp-legacy" else set()
    if scheme == "zero2":
        known = known - {"reshard_after_forward"}  # that it says itself
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"options of scheme {scheme!r} are {sorted(known)}, got {', '.join(unknown)}")


def _check_whole(model: nn.Module) -> None:
    """Raise if something averages the model's gradients already."""
    for module in model.modules():
        kind = next((k for k in (DistributedDataParallel, FSDPModule) if isinstance(module, k)), None)
        if kind is not None or isinstance(process.reducers.get(module), AfterBackward):
            how = kind.__name__ if kind else "the scheme 'ddp-legacy'"
            raise ValueError(f"model is data parallel already, by {how}: got {type(model).__name__}")


def _check_mesh(scheme: str, mesh: Any) -> None:
    """Raise unless the mesh has the axes that the scheme needs."""
    if scheme in FSDP2_SCHEMES and not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh for scheme {scheme!r}, got {arguments.shown(mesh)}")
    if scheme == "hsdp" and copies_of(mesh) == 1:
        sizes = dict(zip(mesh.mesh_dim_names or (), mesh.shape))
        raise ValueError(
            "mesh must have dp_replicate > 1 for scheme 'hsdp', as lasp.init_mesh(dp_replicate=2, ..) makes it, got "
            f"{sizes}; 'zero3' shards over all ranks"
        )
