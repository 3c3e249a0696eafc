"""DistributedDataParallel over dp x sp."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lasp.ranks import grad_group, waiting


def wrap_ddp(model: nn.Module, mesh, **options) -> nn.Module:
    """The model in `DistributedDataParallel` over all ranks of `grad_mesh(mesh)`; `options` go to it.

    With a loss from `lasp.token_loss` every parameter's gradient is that of the whole batch.
    """
    group, _ = grad_group(mesh)
    if group is None:
        return model
    with waiting("wrap_ddp: comparing and sending the parameters of all ranks"):
        return DistributedDataParallel(model, process_group=group, **options)
