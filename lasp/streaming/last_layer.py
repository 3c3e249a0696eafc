"""The last layer of a model, which gives the sum of the loss in place of its logits (`lasp.stream_backward`).

Logits are most of what a segment takes where there are many words, and the sweep would make them for nobody. A model
need not be written for it: what makes its logits is found by looking. In one forward each `nn.Linear` that may be it
(no part of a list of blocks, nothing in it changed) notes what it gives. If the logits of the model are that very
tensor of one of them, for all tokens, then whoever reads the model's output reads that layer's: so it may give
something else instead, as long as what comes out of the model still is what it gave.

The loss is taken in the layer's forward, so that FSDP2, DDP and checkpoints see its weight used there.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor import DTensor
from torch.nn.modules._functions import BackwardHookFunction

from lasp.calls import logits_of
from lasp.loss import sum_of_linear
from lasp.ranks.parts import is_split


class SumOfLoss(NamedTuple):
    """What a model gives in place of logits."""

    total: Tensor  # the sum over the tokens that count; 0 in the sweep
    vocabulary: int


class Finding(NamedTuple):
    """What is known of a model's last layer."""

    layer: weakref.ref[nn.Linear] | None  # that may give the loss
    told: str  # of it, for `explain`
    of: tuple[str, ...]  # the layers among which it was looked for
    training: bool = True  # whether the model was then


class _Seen(NamedTuple):
    name: str
    layer: nn.Linear
    tokens: torch.Size
    output: Tensor
    version: int


class LastLayer:
    """The last layer of a model, during one step.

    Args:
        model: in whatever wraps it.
        inner: the same without DDP, which may give a copy of what it is given.
        finding: of an earlier step; None: not known yet.
        ignore_index: the label that the loss skips.
    """

    def __init__(self, model: nn.Module, inner: nn.Module, finding: Finding | None, ignore_index: int):
        self._model, self._inner, self.finding, self._ignore_index = model, inner, finding, ignore_index
        self._candidates = [(name, x) for name, x in _linears(model) if _as_it_came(x)]
        self._forwards = contextlib.ExitStack()  # that stand in layers
        self._labels: Tensor | None = None
        self._sweeping = False
        self._found = False  # just now
        self._logits: Any = None  # of the inner model
        self._seen: list[_Seen] = []
        self._given: list[Tensor] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A context inside which layers have other forwards."""
        candidates = dict(self._candidates)
        known = self._layer()
        if self.finding is not None and (
            self.finding.of != tuple(candidates)
            or self.finding.training is not self._inner.training
            or (self.finding.layer is not None and all(x is not known for x in candidates.values()))
        ):
            self.finding = None  # layers, or hooks of theirs, are others since
        if self._model is not self._inner and self._model._forward_hooks:  # behind what `result` compares
            self.finding = Finding(None, f"{_ALL}: {type(self._model).__name__} around the model has hooks", ())
            yield
            return
        if not candidates:
            self.finding = Finding(None, f"{_ALL}: none outside of lists and compiled parts is a plain nn.Linear", ())
            yield
            return
        with self._forwards:
            if self.finding is None:
                for name, candidate in candidates.items():
                    self._put(candidate, self._noting(name, candidate))
            else:
                self._put_giving()
            handle = self._inner.register_forward_hook(self._note_logits)
            try:
                yield
            finally:
                handle.remove()

    def begin(self, labels: Tensor, *, sweeping: bool) -> None:
        """The model is about to run, on tokens with these labels; with `sweeping` nobody asks for their loss."""
        if self._found:  # and a recompute in backward repeats what the forward did
            self._found = False
            self._forwards.close()
            self._put_giving()
        self._labels, self._sweeping = labels, sweeping
        self._seen.clear()
        self._given.clear()

    def result(self, output: Any) -> SumOfLoss | None:
        """The loss that the forward which has ended gave; None if it gave logits."""
        logits, self._logits = self._logits, None
        given, self._given = self._given, []
        if self.finding is None:
            self._find(logits)
            return None
        if (layer := self._layer()) is None:
            return None
        if len(given) != 1 or not _same(given[0], logits):
            self.finding = None
            raise RuntimeError(
                f"what {type(self._inner).__name__} gives is no longer what its last layer gave: lasp.stream_backward "
                "saw in an earlier segment that nothing comes behind that, and takes the loss there. A loss_fn is "
                "always given the logits themselves"
            )
        if torch.is_grad_enabled() and (what := _changes_gradient(given[0], logits)):
            raise RuntimeError(
                f"{what} behind the last layer of {type(self._inner).__name__} would get the gradient of the loss, "
                "which lasp.stream_backward takes in that layer, in place of the logits'. Pass a loss_fn: it is always "
                "given the logits themselves"
            )
        return SumOfLoss(logits_of(output).flatten()[0], layer.out_features)

    def _layer(self) -> nn.Linear | None:
        return None if self.finding is None or self.finding.layer is None else self.finding.layer()

    def _put(self, layer: nn.Linear, forward: Callable[[Tensor], Tensor]) -> None:
        layer.forward = forward  # type: ignore[method-assign]
        self._forwards.callback(vars(layer).pop, "forward", None)

    def _put_giving(self) -> None:
        if (layer := self._layer()) is not None:
            self._put(layer, self._giving(layer))

    def _note_logits(self, inner: nn.Module, args: Any, output: Any) -> None:
        self._logits = logits_of(output)

    def _noting(self, name: str, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            output = type(layer).forward(layer, input)
            if not torch.compiler.is_compiling() and (is_split(layer.weight) or not isinstance(layer.weight, DTensor)):
                self._seen.append(_Seen(name, layer, input.shape[:-1], output, output._version))
            return output

        return forward

    def _giving(self, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            labels = self._labels
            assert labels is not None
            if self._sweeping or input.shape[:-1] != labels.shape:
                total = input.new_zeros(())
            else:
                total, _, _ = sum_of_linear(input, layer.weight, layer.bias, labels, self._ignore_index)
            # With an entry for each token, as what comes behind may look at the shape, though it changes nothing.
            output = total.expand(*input.shape[:-1], 1).contiguous()
            if input.shape[:-1] == labels.shape:
                self._given.append(output)
            return output

        return forward

    def _find(self, logits: Any) -> None:
        """Whether one of those that were called gave these logits, and nobody changed them since."""
        seen, self._seen = self._seen, []
        assert self._labels is not None
        if not isinstance(logits, Tensor):
            return
        found = [x for x in seen if _same(x.output, logits) and logits._version == x.version]
        once = len(found) == 1 and sum(x.layer is found[0].layer for x in seen) == 1
        candidates = tuple(dict(self._candidates))
        changed = _changes_gradient(found[0].output, logits) if once and torch.is_grad_enabled() else ""
        if changed:
            self.finding = Finding(None, f"{_ALL}: {changed} stands behind {found[0].name!r}", candidates)
        elif once and logits is not found[0].output:  # `.view(B, T, V)` asks for V numbers a token
            self.finding = Finding(None, f"{_ALL}: they are a view of what {found[0].name!r} gave", candidates)
        elif once and found[0].tokens == self._labels.shape:
            name, layer = found[0].name, found[0].layer
            self.finding = Finding(weakref.ref(layer), f"the loss is taken in {name!r}, without logits", candidates)
        else:
            why = "they are of a layer that is called more than once, or not with all tokens"
            self.finding = Finding(None, f"{_ALL}: {why if found else self._why(logits.shape[-1])}", candidates)
        self.finding = self.finding._replace(training=self._inner.training)
        self._found = True

    def _why(self, words: int) -> str:
        """No layer's output is that of the model."""
        of_words = [(name, x) for name, x in _linears(self._model) if x.out_features == words]
        if not of_words:
            return f"no nn.Linear outside of lists and compiled parts gives {words:,} words"
        name, layer = of_words[-1]
        if all(layer is not x for _, x in self._candidates):
            return f"{name!r} is no plain nn.Linear, or has hooks"
        return f"they are not what {name!r} gave (but scaled, capped or cast)"


_ALL = "all logits of a segment are made"


def _same(one: Tensor, other: Any) -> bool:
    """Whether they are the same numbers in memory. (Wrappers may give an alias.)"""
    return (
        isinstance(other, Tensor)
        and (one.data_ptr(), one.shape, one.stride(), one.dtype)
        == (other.data_ptr(), other.shape, other.stride(), other.dtype)
        and one.device == other.device
    )


def _changes_gradient(given: Tensor, logits: Tensor) -> str:
    """What stands between what the layer gave and the logits, the same numbers, and may change their gradient."""
    hooks = [*(given._backward_hooks or {}).values(), *(logits._backward_hooks or {}).values()]
    if any(not str(getattr(x, "__module__", "")).startswith("torch.") for x in hooks):  # FSDP2 has one, which looks
        return "a hook of a tensor"
    node = logits.grad_fn
    while node is not None and node is not given.grad_fn:
        # PyTorch's own, of a view or around a module with backward hooks, hand on what they are given.
        if isinstance(node, BackwardCFunction) and not isinstance(node, BackwardHookFunction._backward_cls):
            return f"the autograd.Function {node.name().removesuffix('Backward')}"
        node = node.next_functions[0][0] if node.next_functions else None
    return ""


def _linears(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """The layers that may be the last of a model; in a list are its blocks, and compiled code reads no forward."""
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
        return
    if isinstance(module, nn.Linear):
        yield name, module
    for key, child in module.named_children():
        if not isinstance(child, nn.ModuleList):
            yield from _linears(child, f"{name}.{key}" if name else key)


def _as_it_came(layer: nn.Linear) -> bool:
    """Whether a call of it is the forward of `nn.Linear` and nothing else, or that over the words of all ranks of
    tensor parallelism."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    plain = type(layer) is nn.Linear or ("parts" in vars(layer) and isinstance(layer.weight, DTensor))
    return plain and not any(hooks) and "forward" not in vars(layer)
