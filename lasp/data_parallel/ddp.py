"""DistributedDataParallel over dp x sp."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lasp import arguments
from lasp.ranks import grad_group


def wrap_ddp(model: nn.Module, mesh, **options) -> nn.Module:
    """The model in `DistributedDataParallel` over all ranks of `grad_mesh(mesh)`; `options` go to it.

    With a loss from `lasp.token_loss` every parameter's gradient is that of the whole batch.
    """
    arguments.module("model", model)
    group, _ = grad_group(mesh)
    return model if group is None else DistributedDataParallel(model, process_group=group, **options)
