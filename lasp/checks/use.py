"""Layers that were split and have run, but called no operator with their ranks: asked before an optimizer steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lasp.ranks import SequenceParallel
from lasp.ranks.group import Peers, process


def watch(module: nn.Module, sequence: SequenceParallel) -> None:
    """Note when the layer runs in training, until it has called an operator with its ranks."""
    _Watch(module, sequence)


def without_operator() -> dict[Peers, str]:
    """What is to be said of layers that ran since the last step and never called an operator, by their ranks."""
    found: dict[Peers, list[str]] = {}
    for layer in list(process.ran):
        if layer.called:
            layer.handle.remove()
        else:
            found.setdefault(layer.sequence.peers, []).append(layer.name)
    process.ran.clear()
    how = (
        "ran, but called no operator of lasp with the ranks, so that the result is that of a slice: pass "
        "sequence=self.sequence to the operator, or say in the plan of lasp.parallelize that the layer mixes no tokens "
        "(lasp.adapters.token_local)"
    )
    return {peers: f"{', '.join(names)} {how}" for peers, names in found.items()}


class _Watch:
    """A forward hook of a layer."""

    def __init__(self, module: nn.Module, sequence: SequenceParallel):
        self.name = f"layer {sequence.name!r} ({type(module).__name__})"
        self.sequence, self.module = sequence, weakref.ref(module)
        self.handle = module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            process.ran[self] = None

    def __deepcopy__(self, memo: Any) -> _Watch:
        return self  # a copy of the layer is split over the same ranks

    def __reduce__(self):
        """Pickled with the layer, it does nothing: like `sequence`, it belongs to the ranks of this run."""
        return of_a_pickle, ()

    @property
    def called(self) -> bool:
        """An adapter may have given the layer, or those below, ranks of its own making."""
        module = self.module()
        of_modules = [] if module is None else [getattr(m, "sequence", None) for m in module.modules()]
        ranks = [self.sequence, *(x for x in of_modules if isinstance(x, SequenceParallel))]
        return module is None or any(t.calls for x in ranks for t in x.by_operator.values())


def of_a_pickle() -> Callable[..., None]:
    """In place of a hook that concerns the ranks of a run, in a model that is loaded from a pickle."""
    return _nothing


def _nothing(*_: object) -> None:
    pass
