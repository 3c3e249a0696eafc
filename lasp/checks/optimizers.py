"""What is checked before an optimizer steps, so that no wrong step is taken."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_checks: list[Callable[[Optimizer], None]] = []
_last_checks: list[Callable[[Optimizer], None]] = []
_inner: weakref.WeakSet[Optimizer] = weakref.WeakSet()
_averaging: weakref.WeakKeyDictionary[nn.Module, tuple[str, Callable[[nn.Module], Iterable[Tensor]]]] = (
    weakref.WeakKeyDictionary()
)


def before_step(check: Callable[[Optimizer], None], *, last: bool = False) -> None:
    """Call `check` before every step of an optimizer of `torch.optim`, or of one that derives from them; once each.

    It gets the optimizer. Those that are `last` come after all others, whichever was the first to be asked for.
    """
    if not _checks and not _last_checks:
        register_optimizer_step_pre_hook(_call_checks)  # type: ignore[arg-type]
    if check not in _checks and check not in _last_checks:
        (_last_checks if last else _checks).append(check)


def steps_within(optimizer: Optimizer) -> None:
    """It steps only in the step of another, which is checked: each rank has its own, maybe of no parameters at all."""
    _inner.add(optimizer)


@contextlib.contextmanager
def replaces_parameters(model: nn.Module, by: str) -> Iterator[None]:
    """Inside, this function replaces parameters of the model: an optimizer that was made before would go on stepping on
    those that no model has, and is refused then."""
    before = dict(model.named_parameters())
    yield
    kept = {id(parameter) for parameter in model.parameters()}
    for name, parameter in before.items():
        if id(parameter) not in kept:
            parameter._lasp_replaced = f"{name} as it was before {by}"  # type: ignore[attr-defined]
    before_step(_refuse_replaced)


def _refuse_replaced(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (found := getattr(parameter, "_lasp_replaced", None)) is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__} would step on {found}, which the model no longer has: make the "
                    "optimizer afterwards, of the parameters that the model then has"
                )


def averages(
    parameters: Iterable[Tensor],
    model: nn.Module | None = None,
    by: str = "",
    known: Callable[[nn.Module], Iterable[Tensor]] = lambda _: (),
) -> None:
    """Note that gradients of these are averaged. Of a `model` no others are, `by` what was called now: a step on one
    that is unfrozen, or added, later on is refused. (DDP has no hook there, and FSDP2 does not know it: each rank would
    step with a gradient of its own.) `known` tells at a step which are averaged besides, whatever became of them: a
    cast of the model takes the note from a DTensor."""
    if model is not None:
        _averaging[model] = by, known
        before_step(_refuse_not_averaged)
        for parameter in model.parameters():
            parameter._lasp_averaged = False  # type: ignore[attr-defined]  # by what may have been called before
    for parameter in parameters:
        parameter._lasp_averaged = True  # type: ignore[attr-defined]


def not_averaged(parameter: Tensor) -> None:
    """Note that what has just been added to its gradient is not averaged."""
    parameter._lasp_averaged = None  # type: ignore[attr-defined]


def _refuse_not_averaged(optimizer: Optimizer) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for model, (by, known) in list(_averaging.items()):
        found = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) in stepped]
        averaged = {id(p) for p in known(model)} if found else set()
        for name, p in found:
            noted = getattr(p, "_lasp_averaged", False)
            if not (noted or id(p) in averaged):
                why = (
                    "does not average what was unfrozen or added after it. Call it afterwards, on the model without a "
                    "wrapper; what is frozen then, the schemes 'ddp-legacy', 'zero2' and 'zero3' average once it is not"
                    if noted is not None
                    else "averages in the one backward behind a forward of the model that it returned, and another "
                    "backward has come since, or none was behind such a forward. Call that model; backward of the sum "
                    "of the losses, or each behind its own forward, the last of a step without lasp.no_sync; or take "
                    "another scheme"
                )
                raise RuntimeError(
                    f"{type(optimizer).__name__} would step on {name} with the gradient of this rank alone: {by} {why}"
                )


_AVERAGE = ("torch.nn.parallel.", "lasp.data_parallel.")  # whose hooks average, and step with nothing


def refuse_steps_in_backward(model: nn.Module, why: str, but: Iterable[Tensor] = ()) -> None:
    """Raise for `why` if something is done to a parameter where its gradient has come, `but` for some of them."""
    known = {id(p) for p in but}
    for name, p in model.named_parameters():
        if id(p) in known:
            continue
        hooks = (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
        others = [x for x in hooks if not str(getattr(x, "__module__", "")).startswith(_AVERAGE)]
        if others or getattr(p, "_in_backward_optimizers", None):
            what = "register_post_accumulate_grad_hook" if others else "optimizer in backward"
            raise ValueError(f"model must have no {what}, got one at {name!r}: {why}")


def free_gathered(model: nn.Module) -> None:
    """Of FSDP2, before something writes to the shards: what was gathered of them would go on as it was."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# What asks other ranks cannot be part of a graph. (The decorator that torch.optim uses: the public one would import the
# compiler, and Triton, with this module.)
@torch._disable_dynamo  # type: ignore[attr-defined,reportPrivateImportUsage]
def _call_checks(optimizer: Optimizer, *_: object) -> None:
    if optimizer in _inner:
        return
    if isinstance(mine := getattr(optimizer, "optim", None), Optimizer):  # of ZeroRedundancyOptimizer
        steps_within(mine)
    for check in (*_checks, *_last_checks):
        check(optimizer)


def note_settings(noted: dict[str, list[str]], optimizer: Optimizer, *, read: bool) -> None:
    """Add what an optimizer is about to step with: numbers, such as the learning rate, of each group of parameters.

    Of one that is a tensor on another device the host would have to wait; only if it may be `read`.
    """
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            told = None if name == "params" else _told(value, read)  # a shard of one number may be empty
            if told is not None:
                values = noted.setdefault(f"{name} of group {number} ({type(optimizer).__name__})", [])
                if told not in values:
                    values.append(told)


def _told(value: Any, read: bool) -> str | None:
    if isinstance(value, Tensor) and value.numel() == 1 and (read or value.device.type == "cpu"):
        return str(value.item())
    if isinstance(value, (tuple, list)) and all(isinstance(x, (int, float, Tensor)) for x in value):
        parts = [_told(x, read) for x in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    return str(value) if isinstance(value, (bool, int, float)) else None
