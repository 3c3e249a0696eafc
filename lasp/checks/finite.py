"""NaN or Inf in a state: every rank stops, naming the layer, before the optimizer steps.

A state that is not finite stays so, and travels: from the rank where it arose to all after it, in backward to all
before it. Each layer notes it in a flag on its device, without waiting for it. Once a step, before an optimizer's, the
flags of all ranks meet.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.checks.optimizers import before_step
from lasp.ranks import SequenceParallel, axis_groups
from lasp.ranks.group import process

_DIRECTIONS = ("forward", "backward")


def note(sequence: SequenceParallel | None, state: Tensor, *, reverse: bool = False) -> None:
    """Set the layer's flag if a state (`reverse`: its gradient) is not finite, if the option `check_finite` is on.

    `state` is what leaves a rank's tokens, which whatever entered them is part of.
    """
    if sequence is None or not sequence.check_finite:
        return
    flags = process.not_finite.get(sequence)
    if flags is None:
        flags = process.not_finite[sequence] = torch.zeros(2, dtype=torch.bool, device=state.device)
        before_step(assert_finite)
    process.noted[sequence] = None
    flags[int(reverse)].logical_or_(state.isfinite().all().logical_not())


def assert_finite() -> None:
    """Raise on every rank if a state has been NaN or Inf since the last call, in a layer with `check_finite`.

    Optimizers call it before they step (all of `torch.optim`, and what derives from it); call it yourself where
    something else uses the gradients. All ranks of the mesh that was given to `parallelize` or `SequenceParallel` must
    do so, also those of its other axes: gradients are averaged over these. The host waits for the device here, once.

    With a `GradScaler`, whose scale is meant to overflow now and then, leave the option off.

    Raises:
        FloatingPointError: naming the layers, the direction and the ranks.
    """
    if not process.noted:
        return
    layers = list(process.noted)
    process.noted.clear()
    meshes = {id(layer.mesh): layer for layer in layers}  # of many layers mostly one
    axes = list(dict.fromkeys(group for layer in meshes.values() for group in axis_groups(layer.mesh)))
    flag = torch.stack([process.not_finite[layer].any() for layer in layers]).any().to(torch.int32)
    for group in axes:  # the greatest along one axis after the other is that of all ranks
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
    if not flag.item():
        return
    found = [f"rank {dist.get_rank()}: {names}"] if (names := _names(layers)) else []
    for layer in layers:
        process.not_finite[layer].zero_()
    for group in axes:
        parts: list = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, found, group=group)
        found = sorted({line for part in parts for line in part})
    raise FloatingPointError(f"a state was NaN or Inf before this step of the optimizer; {'; '.join(found)}")


def _names(layers: list[SequenceParallel]) -> str:
    found = []
    for layer in layers:
        directions = [name for name, flag in zip(_DIRECTIONS, process.not_finite[layer].tolist()) if flag]
        if directions:
            found.append(f"{layer.name or 'a layer without name'} ({' and '.join(directions)})")
    return ", ".join(found)
