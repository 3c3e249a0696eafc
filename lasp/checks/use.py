"""What is done with a split model, against what it needs.

Layers that were split and have run, but called no operator with their ranks: asked before an optimizer steps. And the
tensors that a split model gives, which are a rank's tokens only: asked by the loss that is to take them.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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


def watch_outputs(model: nn.Module, sequence: SequenceParallel) -> None:
    """Remember of what the model gives that it is a rank's part (see `split_over`)."""
    model.register_forward_hook(_Outputs(sequence))


class _Outputs:
    """A forward hook of a split model."""

    def __init__(self, sequence: SequenceParallel):
        self.sequence = sequence

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self.sequence.size == 1:  # as while `lasp.verify` computes the whole
            return
        for x in pytree.tree_leaves(output):
            if isinstance(x, Tensor):
                _given.append((weakref.ref(x), self.sequence))
                if x.grad_fn is not None:
                    _notes(x.grad_fn)[_MARK] = self.sequence

    def __deepcopy__(self, memo: Any) -> _Outputs:
        return self

    def __reduce__(self):
        return of_a_pickle, ()


_given: deque[tuple[weakref.ref[Tensor], SequenceParallel]] = deque(maxlen=16)  # by split models, the last of all
_MARK = "given by a model that is split over"
_SAME_TOKENS = re.compile(r"(ToCopy|Clone|Alias|\w*View|Slice|Select|Transpose|Permute|Unsqueeze|Squeeze)Backward\d")


def split_over(x: Tensor) -> SequenceParallel | None:
    """The ranks over which the model is split that gave x, or that of which x is a view or a copy in another dtype.

    None also where that cannot be seen: in a compiled graph of the whole model, and for a copy without gradients.
    """
    place = x.untyped_storage().data_ptr()
    for known, sequence in _given:
        given = known()
        if given is x or (place and given is not None and given.untyped_storage().data_ptr() == place):
            return sequence
    node = x.grad_fn
    while node is not None and _MARK not in _notes(node):
        node = node.next_functions[0][0] if _SAME_TOKENS.fullmatch(node.name()) else None
    return None if node is None else _notes(node)[_MARK]


def _notes(node: Any) -> dict[str, Any]:
    """That belong to a node of autograd's graph, and go with it."""
    return node.metadata


def of_a_pickle() -> Callable[..., None]:
    """In place of a hook that concerns the ranks of a run, in a model that is loaded from a pickle."""
    return _nothing


def _nothing(*_: object) -> None:
    pass
