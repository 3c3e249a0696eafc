"""DistributedDataParallel over dp x sp."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lasp import arguments
from lasp.checks.optimizers import averages, not_averaged
from lasp.checks.replicas import compare_parameters
from lasp.checks.use import note_averaged
from lasp.ranks import grad_group, waiting
from lasp.ranks.group import process


def wrap_ddp(model: nn.Module, mesh, *, validate: str = "first", **options) -> nn.Module:
    """The model in `DistributedDataParallel` over all ranks of `grad_mesh(mesh)`.

    With a loss from `lasp.token_loss` every parameter's gradient is that of the whole batch. Of what went through the
    wrapper, gradients are averaged as long as the model lives, also if nobody keeps the wrapper until backward.

    Args:
        model: after `lasp.parallelize`; the same on all ranks.
        mesh: the whole mesh, one axis, a ProcessGroup, or None for one rank.
        validate: "first" compares the names, shapes and dtypes of the parameters on all ranks, and which are trained,
            and refuses a step on one that was unfrozen or added later, which nobody averages; "off" does neither.
        options: for `DistributedDataParallel`.

    Returns:
        The wrapper; the model itself with `mesh` None.

    Raises:
        ValueError: `lasp.tensor_parallel` has split the model. (PyTorch's DDP averages plain tensors.)
        RankMismatchError: ranks hold other parameters; on every rank.
    """
    return wrapped("wrap_ddp", model, mesh, validate, options)


def wrapped(by: str, model: nn.Module, mesh, validate: str, options: dict[str, Any]) -> nn.Module:
    """The same, `by` what the user has called, which errors name."""
    arguments.module("model", model)
    arguments.choice("validate", validate, ("first", "off"))
    check_plain(model)
    group, ranks = grad_group(mesh)
    if group is None:
        return model
    compare_parameters(model, group, by, validate=validate)
    if validate != "off":
        note_averaged(model, group)
    with waiting(f"{by}: comparing and sending the parameters of all ranks"):
        wrapper = DistributedDataParallel(model, process_group=group, **options)
    # What averages goes with the wrapper: mostly at once, and then no rank averages; where a cycle holds it (the first
    # in a process, compiled blocks) when Python's collector comes by, at another moment on each rank: then that rank
    # averages nothing, and the others wait for it in backward.
    process.reducers[model] = wrapper.reducer
    if ranks > 1 and validate != "off":
        averages((p for p in model.parameters() if p.requires_grad), model, by)
        if not options.get("static_graph"):  # there a parameter's gradient may come several times in a backward
            _Watch(wrapper)
    return wrapper


class _Watch:
    """Notes which gradients DDP does not average. Behind a forward through it, it averages in one backward, the next,
    whatever has been added up until then; what comes later stays this rank's, as of two forwards and two backwards."""

    def __init__(self, wrapped: DistributedDataParallel):
        self._averages = False  # the next backward
        self._come: set[int] | None = None  # parameters, since the last that averages began
        self._late: list[weakref.ref[Tensor]] = []
        wrapped.register_forward_pre_hook(self)  # a hook behind it might change its output, for all that others know
        for p in wrapped.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._note)

    @torch._disable_dynamo  # type: ignore[attr-defined,reportPrivateImportUsage]
    def __call__(self, wrapped: DistributedDataParallel, args: Any) -> None:
        self._averages |= torch.is_grad_enabled() and wrapped.require_backward_grad_sync

    def _note(self, p: Tensor) -> None:
        if self._averages:
            self._averages, self._come = False, set()
            averages(x for late in self._late if (x := late()) is not None)
            self._late.clear()
        if self._come is None or id(p) in self._come:
            not_averaged(p)
            self._late.append(weakref.ref(p))
        else:
            self._come.add(id(p))


def check_plain(model: nn.Module) -> None:
    """Raise if `lasp.tensor_parallel` has split the model."""
    split = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if split is not None:
        raise ValueError(
            f"model must have plain parameters for DDP, but {split} is a DTensor, as after lasp.tensor_parallel: take "
            "FSDP2 (wrap_fsdp2; its reshard_after_forward=False keeps whole weights, as DDP does), or lasp.sync_grads "
            "(the scheme 'ddp-legacy')"
        )
