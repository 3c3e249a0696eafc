"""Gradient averaging for a plain training loop, without a wrapper."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lasp import arguments
from lasp.checks.agreement import capturing
from lasp.checks.checksum import gradient_dtype
from lasp.checks.optimizers import averages
from lasp.checks.replicas import check_gradients
from lasp.ranks import grad_group, waiting
from lasp.ranks.parts import is_split, part_of


@torch.no_grad()
def sync_grads(model: nn.Module, mesh, *, validate: str = "first") -> None:
    """Average every parameter's gradient over `grad_mesh(mesh)`, in place; call it between backward and step.

    A parameter that got no gradient on this rank counts as zero there, so that all ranks take part in the same
    sums. One that got none on any rank has none afterwards, so that an optimizer leaves it as it is, as in one process.
    (To know it, a rank where one has none waits for the device; within a CUDA graph, where it cannot, that one gets
    zeros.) Needs memory for one more copy of the gradients. Sparse ones, as of `nn.Embedding(sparse=True)`, travel
    dense and are sparse again afterwards: the rows of all ranks, without those whose average is zero.

    Args:
        model: the same on all ranks.
        mesh: the whole mesh, one axis, a ProcessGroup, or None for one rank.
        validate: "first" compares at every call which parameters the ranks are about to average (names, shapes,
            dtypes, those of gradients, which are trained, their order), and at the first two calls for a model and
            every 1000th also their values; "off" does not.

    Raises:
        ValueError: the model is sharded by FSDP2, which averages by itself (what `lasp.tensor_parallel` has split is
            not: each rank averages its parts with those that have the same); or it was never given to `parallelize`,
            though `shard_batch` has cut batches over some of these ranks (unless `validate` is "off").
        RankMismatchError: ranks hold other parameters; on every rank, before anything is sent.
        PeerError: a rank did not come within the timeout of the group.
    """
    arguments.module("model", model)
    arguments.choice("validate", validate, ("first", "off"))
    group, ranks = grad_group(mesh)
    if ranks == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    sharded = next((name for name, p in model.named_parameters() if isinstance(p, DTensor) and not is_split(p)), None)
    if sharded is not None:
        raise ValueError(f"{sharded} is sharded (DTensor): FSDP2 averages gradients itself, leave out sync_grads")
    check_gradients(model, group, "sync_grads", validate=validate)
    averages(parameters)
    sparse = _sparse_dims(model, parameters)
    for dtype in sorted({gradient_dtype(p) for p in parameters}, key=str):
        mine = [p for p in parameters if gradient_dtype(p) == dtype]
        without = [number for number, p in enumerate(mine) if p.grad is None]
        flat = torch.cat([*(_dense(p).flatten().to(dtype) for p in mine), _present(mine, without, dtype)])
        if narrow := dtype == torch.float16:  # 65,504 at most: the sum may pass that where the average does not
            flat.div_(ranks)
        with waiting(f"sync_grads: the sum of the {dtype} gradients over all ranks"):
            dist.all_reduce(flat, group=group)
        if not narrow:
            flat.div_(ranks)
        *gradients, present = flat.split([*(part_of(p).numel() for p in mine), len(mine)])
        counts = present.tolist() if without and not capturing() else None
        for number, (p, gradient) in enumerate(zip(mine, gradients)):
            if counts is not None and not counts[number]:
                continue
            if is_split(p):
                _set_part(p, gradient)
            elif p in sparse:
                p.grad = gradient.view_as(p).to_sparse(sparse[p])
            elif p.grad is None or 0 in p.grad.stride():  # an expanded one cannot be written to
                p.grad = gradient.view_as(p).clone()
            else:
                p.grad.copy_(gradient.view_as(p))


def _present(parameters: list[nn.Parameter], without: list[int], dtype: torch.dtype) -> Tensor:
    """1 for each parameter, 0 for those without a gradient here; the host waits for nothing."""
    found = torch.ones(len(parameters), dtype=dtype, device=part_of(parameters[0]).device)
    for number in without:
        found[number] = 0
    return found


def _dense(p: Tensor) -> Tensor:
    """The gradient of a parameter; zeros where there is none."""
    if p.grad is None:
        return torch.zeros_like(part_of(p))
    if is_split(p):
        return part_of(p.grad)
    return p.grad if p.grad.layout is torch.strided else p.grad.to_dense()


def _set_part(p: DTensor, gradient: Tensor) -> None:
    """Set the gradient of a parameter in parts, as a new tensor: a part may be a view of another's."""
    part = gradient.view_as(part_of(p)).clone()
    p.grad = DTensor.from_local(part, p.device_mesh, p.placements, run_check=False)


def _sparse_dims(model: nn.Module, parameters: list[nn.Parameter]) -> dict[Tensor, int]:
    """The parameters whose gradients are sparse, also where this rank has none, and in how many dimensions."""
    tables = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse)
    found = {table.weight: 1 for table in tables if table.weight.grad is None}
    return found | {p: p.grad.sparse_dim() for p in parameters if p.grad is not None and p.grad.is_sparse}
