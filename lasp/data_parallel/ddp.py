"""DistributedDataParallel over dp x sp."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lasp import arguments
from lasp.checks.replicas import compare_parameters
from lasp.ranks import grad_group, waiting


def wrap_ddp(model: nn.Module, mesh, *, validate: str = "first", **options) -> nn.Module:
    """The model in `DistributedDataParallel` over all ranks of `grad_mesh(mesh)`; `options` go to it.

    With a loss from `lasp.token_loss` every parameter's gradient is that of the whole batch. Unless `validate` is
    "off", ranks compare the names, shapes and dtypes of the parameters first, and which are trained.

    Raises:
        RankMismatchError: ranks hold other parameters; on every rank.
    """
    arguments.module("model", model)
    arguments.choice("validate", validate, ("first", "off"))
    group, _ = grad_group(mesh)
    if group is None:
        return model
    compare_parameters(model, group, "wrap_ddp", validate=validate)
    with waiting("wrap_ddp: comparing and sending the parameters of all ranks"):
        return DistributedDataParallel(model, process_group=group, **options)
