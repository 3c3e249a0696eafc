"""What the adapters for layers of several libraries share."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lasp import decay
from lasp.adapters.rebind import TESTED, of_another_version, put
from lasp.ranks import SequenceParallel
from lasp_kernels import state_dtype


def needs(module: nn.Module, *names: str) -> None:
    """Raise `ValueError` unless a module has what the code uses that is put into it."""
    if missing := [name for name in names if not hasattr(module, name)]:
        library = type(module).__module__.partition(".")[0]
        raise ValueError(
            f"{type(module).__module__}.{type(module).__qualname__} has no {', '.join(missing)}: "
            + (of_another_version(library) if library in TESTED else "its adapter is for another version of that code")
            + "; write one for this (lasp.register)"
        )


def with_forward(forward: Callable[..., Any], *needed: str) -> Callable[[nn.Module, SequenceParallel], None]:
    """The adapter that gives a module another forward, which uses these attributes and finds the ranks in
    `sequence`."""

    def split(module: nn.Module, sequence: SequenceParallel) -> None:
        needs(module, *needed)
        module.sequence = sequence  # type: ignore[assignment]
        put(module, "forward", forward)

    return split


def no_cache(**given: Any) -> None:
    """Raise `RuntimeError` for arguments that belong to a cache."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise RuntimeError(f"{name} of a layer whose sequence is split: pass use_cache=False, one rank can decode")


_decays: weakref.WeakKeyDictionary[nn.Module, dict[tuple[torch.device, torch.dtype], Tensor]]
_decays = weakref.WeakKeyDictionary()


def _fixed_decay(module: nn.Module, formula: Callable[[Any], Tensor], q: Tensor) -> Tensor:
    """The log-decay [H] that a formula gives for a layer, made once for each device and dtype of q.

    To make it anew takes a host longer than to launch the layer's kernels, and where the host knows its values, an
    exchange may do with less (`lasp.decay.fixed`).
    """
    made = _decays.setdefault(module, {})
    key = q.device, state_dtype(q.dtype)
    if key not in made:
        with torch.inference_mode(False), torch.no_grad():  # what an evaluation makes may serve a training
            values = in_fp32(lambda: formula(module).flatten())
            made[key] = decay.fixed(values, q.device) if key[1] == torch.float32 else values.to(*key)
    return made[key]


# No part of a graph, whose compiler would take the dictionary apart.
fixed_decay = torch._disable_dynamo(_fixed_decay)  # type: ignore[attr-defined,reportPrivateImportUsage]


def in_fp32(make: Callable[[], Tensor]) -> Tensor:
    """What a function makes while fp32 is the default, as it is not where a model is made in 16 bits."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return make().float()
    finally:
        torch.set_default_dtype(before)
