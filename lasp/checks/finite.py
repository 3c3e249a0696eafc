"""NaN or Inf in a state or a gradient: every rank stops, naming layer or parameter, before the optimizer steps.

A state that is not finite stays so, and travels: from the rank where it arose to all after it, in backward to all
before it. Each layer notes it in a flag on its device, without waiting for it. Once a step, before an optimizer's, the
gradients that it is about to use are looked at, and what all ranks have found meets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lasp import arguments
from lasp.checks.optimizers import before_step
from lasp.ranks import SequenceParallel, axis_groups, collectives, peers_of, waiting
from lasp.ranks.group import process

_DIRECTIONS = ("forward", "backward")
_NAMED = 4  # layers, and parameters, that a message lists for a rank; mostly one makes all the others NaN
_WHAT = "before a step of the optimizer: the comparison of NaN and Inf (check_finite) with the other ranks"


def watch(model: nn.Module, sequence: SequenceParallel, layers: Iterable[SequenceParallel]) -> None:
    """Look at the gradients of this model before an optimizer steps, if `sequence` has `check_finite`.

    `layers` are those of the model's layers. Of the model a weak reference is kept.
    """
    if sequence.check_finite:
        process.watched[model] = sequence
        process.of_models.update(layers)
        _check_steps()


def note_call(sequence: SequenceParallel) -> None:
    """An operator runs over these ranks, be it only one: there will be gradients to look at."""
    if sequence.check_finite:
        process.noted[sequence] = None
        _check_steps()


def note(sequence: SequenceParallel | None, state: Tensor, *, reverse: bool = False) -> None:
    """Set the layer's flag if a state (`reverse`: its gradient) is not finite, if the option `check_finite` is on.

    `state` is what leaves a rank's tokens, which whatever entered them is part of.
    """
    if sequence is None or not sequence.check_finite:
        return
    note_call(sequence)
    flags = process.not_finite.get(sequence)
    if flags is None or flags.device != state.device:  # a model may move
        flags = torch.zeros(2, dtype=torch.bool, device=state.device) if flags is None else flags.to(state.device)
        process.not_finite[sequence] = flags
    flags[int(reverse)].logical_or_(state.isfinite().all().logical_not())


def _check_steps() -> None:
    """Check before each step, as the last check: ranks that have exchanged different things must not meet here."""
    before_step(assert_finite, last=True)


@torch.no_grad()
def assert_finite(gradients_of: Optimizer | nn.Module | None = None) -> None:
    """Raise on every rank if a state was NaN or Inf since the last call, or if a gradient is, with `check_finite`.

    Optimizers call it before they step (all of `torch.optim`, and what derives from it); call it yourself where
    something else uses the gradients. All ranks of the mesh that was given to `parallelize` or `SequenceParallel` must
    do so, also those of its other axes: gradients are averaged over these (not with `lasp.CO2`, which lets replicas
    train apart: then those of a replica). The host waits for the device here, once.

    Gradients are looked at if one of them is a parameter's of a model that `parallelize` got with `check_finite`, or
    if an operator has run since the last call with such a `SequenceParallel` of your own. A copy that is made of the
    model is another model.

    With a `GradScaler`, whose scale is meant to overflow now and then, leave the option off.

    Args:
        gradients_of: the optimizer that is about to step, or the model; None: look at states only.

    Raises:
        FloatingPointError: naming the ranks, and the layers with the direction, or the parameters.
        PeerError: a rank has ended, or did not come within the timeout of its group.
        TypeError: `gradients_of` is something else.
    """
    parameters = _parameters(gradients_of)
    layers = [x for x in process.noted if x.group is None or x.peers.exists]
    process.noted.clear()
    models = _watched(parameters)
    if not models and all(x in process.of_models for x in layers):
        parameters = []  # of another model, which is no concern of ours
    sequences = [*layers, *models.values()]
    if not sequences:
        return
    one_of_each_mesh = {id(sequence.mesh): sequence for sequence in sequences}.values()  # of many layers mostly one
    axes = list(dict.fromkeys(group for sequence in one_of_each_mesh for group in axis_groups(sequence.mesh)))
    axes = [group for group in axes if not peers_of(group).apart]  # replicas that do not meet at every step
    flag = _any([*_flags(layers), *_flag_of([x for _, x in _gradients(parameters)])])
    for group in axes:  # the greatest along one axis after the other is that of all ranks
        flag = flag.to(collectives.device_of(group))
        with waiting(_WHAT):
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    with waiting(_WHAT):
        found_any = bool(flag.item())
    if not found_any:
        return
    names = [*_names_of_layers(layers), *_names_of_gradients(parameters, models)]
    for flags in (process.not_finite.get(layer) for layer in layers):
        if flags is not None:
            flags.zero_()
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = [f"rank {rank}: {', '.join(names)}"] if names else []
    for group in axes:
        parts = [json.loads(text) for text in collectives.gather_texts(json.dumps(found), group, lambda: _WHAT)]
        found = sorted({line for part in parts for line in part})
    listed = "; ".join(found)
    raise FloatingPointError(f"a state or a gradient was NaN or Inf before this step of the optimizer; {listed}")


def _parameters(of: Optimizer | nn.Module | None) -> list[Tensor]:
    if isinstance(of, nn.Module):
        return list(of.parameters())
    if of is not None and not hasattr(of, "param_groups"):  # an optimizer need not derive from PyTorch's
        raise TypeError(f"gradients_of must be an optimizer, a module or None, got {arguments.shown(of)}")
    return [] if of is None else [p for group in of.param_groups for p in group["params"]]


def _watched(parameters: list[Tensor]) -> dict[nn.Module, SequenceParallel]:
    """The models to be looked at that have one of the parameters, which FSDP2 makes anew after `parallelize`."""
    if not parameters or not process.watched:
        return {}
    known = {id(p) for p in parameters}
    return {model: x for model, x in process.watched.items() if any(id(p) in known for p in model.parameters())}


def _gradients(parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each parameter that has a gradient on this rank, with the numbers of it that lie here; no empty ones."""
    found = []
    for p in parameters:
        if p.grad is not None:
            gradient = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
            values = gradient._values() if gradient.layout is torch.sparse_coo else gradient  # coalesced or not
            if values.numel():
                found.append((p, values))
    return found


def _flags(layers: list[SequenceParallel]) -> list[Tensor]:
    """The flags of the layers."""
    return [flags.any() for layer in layers if (flags := process.not_finite.get(layer)) is not None]


def _flag_of(tensors: list[Tensor]) -> list[Tensor]:
    """Whether one is not finite; the greatest number tells, and that of 16 bits cannot overflow as their sum can."""
    return [get_total_norm(tensors, torch.inf).isfinite().logical_not()] if tensors else []


def _any(flags: list[Tensor]) -> Tensor:
    """Whether a flag is set, as a number on the device of the first."""
    if not flags:
        return torch.zeros((), dtype=torch.int32)
    return torch.stack([x.to(flags[0].device, non_blocking=True) for x in flags]).any().to(torch.int32)


def _names_of_layers(layers: list[SequenceParallel]) -> list[str]:
    found = []
    for layer in layers:
        flags = process.not_finite.get(layer)
        directions = [] if flags is None else [name for name, flag in zip(_DIRECTIONS, flags.tolist()) if flag]
        if directions:
            found.append(f"{layer.name or 'a layer without name'} ({' and '.join(directions)})")
    return _in_short(found, "layers")


def _names_of_gradients(parameters: list[Tensor], models: Iterable[nn.Module]) -> list[str]:
    names = {id(p): name for model in models for name, p in model.named_parameters()}
    found = [
        f"the gradient of {names.get(id(p)) or f'a parameter of shape {tuple(p.shape)}'}"
        for p, gradient in _gradients(parameters)
        if not gradient.isfinite().all()
    ]
    return _in_short(found, "gradients")


def _in_short(found: list[str], what: str) -> list[str]:
    more = len(found) - _NAMED
    return [*found[:_NAMED], *([f"{more} more {what}"] if more > 0 else [])]
