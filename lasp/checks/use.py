"""What is done with a split model, against what it needs.

Layers that were split and have run, but called no operator with their ranks: asked before an optimizer steps. The
tensors that a split model gives, which are a rank's tokens only: asked by the loss that is to take them. And models
that were never split, though the batches were.
"""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Callable, Container
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils import _pytree as pytree

from lasp.ranks import SequenceParallel, all_peers
from lasp.ranks.group import Peers, process

split_models: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Those that were given to `parallelize`, and what of them could not be asked whether it mixes tokens."""


class Tried(Protocol):
    """What is known of a split model."""

    def refuse_new_layers(self) -> None:
        """Raise if what mixes tokens has come into it since it was tried."""

    def accept(self, model: nn.Module) -> None:
        """Take what is in it now for tried."""


tried: weakref.WeakKeyDictionary[nn.Module, Tried] = weakref.WeakKeyDictionary()
"""Those that are split over several ranks, and are to be looked at again when modules of them are others."""


def look_again(model: nn.Module) -> None:
    """Try what has come into a split model, or one in it, until now: when its weights are cut, that is too late."""
    for split in [tried[module] for module in model.modules() if module in tried]:
        split.refuse_new_layers()


def accept(model: nn.Module) -> None:
    """What lasp has made of the modules of a split model mixes nothing."""
    for module in model.modules():
        if module in tried:
            tried[module].accept(module)


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
    """A forward hook of a layer, which notes that it ran until it has called an operator."""

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
    """The metadata of a node of autograd's graph, which goes with it."""
    return node.metadata


# Models that were never split


def keep_whole(model: nn.Module) -> None:
    """Who keeps a part of the model from now on keeps the model.

    Ranks compare what they do with it, and it must not depend on when Python's collector comes by whether a rank still
    has it: of a frame around what is trained, or a head that nobody uses, nothing else may be left.
    """
    for module in model.modules():
        known = vars(module).get(_WHOLE)
        vars(module)[_WHOLE] = _Whole(*(known.models if isinstance(known, _Whole) else ()), model)


def is_split(model: nn.Module) -> bool:
    """Whether `parallelize` was called with this model, or with one that it holds, is a part of or is a copy of."""
    return isinstance(vars(model).get(_WHOLE), _Whole) or any(
        module in split_models or isinstance(getattr(module, "sequence", None), SequenceParallel)
        for module in model.modules()
    )


_WHOLE = "_lasp_whole"


class _Whole:
    """An attribute of a module: the models that it is a part of."""

    def __init__(self, *models: nn.Module):
        self.models = models

    def __deepcopy__(self, memo: Any) -> _Whole:
        return _Whole()  # a copy is split as well, and does not keep the original

    def __reduce__(self):
        return of_a_pickle, ()


def refuse_whole(model: nn.Module, group: ProcessGroup) -> None:
    """Raise if gradients of this model are to be averaged over ranks that share sequences, but it was never split."""
    if not process.by_hand and _cut_over(group) and not is_split(model):
        raise ValueError(_never_split(f"this {type(model).__name__} was never", _cut_over(group)))


def note_averaged(model: nn.Module, group: ProcessGroup) -> None:
    """Ask the same before an optimizer steps that has parameters of the model."""
    if not is_split(model):
        process.averaged[model] = group


def refuse_nothing_split(group: ProcessGroup | None = None, parameters: Container[int] = ()) -> None:
    """Raise if batches were cut over ranks of this group (None: over any), but nothing was split, and no operator
    called; or if the parameters with one of these ids are of a model that `note_averaged` knows."""
    if process.by_hand or not any(peers.cut for peers in process.peers.values()):
        return
    if not process.split and (ranks := _cut_over(group)):
        raise ValueError(_never_split("no model was", ranks))
    for model, averaged_over in list(process.averaged.items()):
        if any(id(p) in parameters for p in model.parameters()):
            refuse_whole(model, averaged_over)


def _cut_over(group: ProcessGroup | None) -> tuple[int, ...]:
    """The ranks among these over which batches were cut; none if there were no such batches."""
    of_group = None if group is None else set(dist.get_process_group_ranks(group))
    for peers in all_peers():
        ranks = dist.get_process_group_ranks(peers.group) if peers.cut else []
        if ranks and (of_group is None or of_group.issuperset(ranks)):
            return tuple(ranks)
    return ()


def _never_split(what: str, ranks: tuple[int, ...]) -> str:
    return (
        f"{what} given to lasp.parallelize, but lasp.shard_batch has cut batches over the ranks {ranks}: each would "
        "take its slice for the whole sequence. Call lasp.parallelize(model, mesh['sp']) first, with the model that is "
        "trained; of one that mixes no tokens with plan={'': lasp.adapters.token_local}"
    )


def of_a_pickle() -> Callable[..., None]:
    """What a hook that concerned the ranks of a run becomes in a pickled model: one that does nothing."""
    return _nothing


def _nothing(*_: object) -> None:
    pass
