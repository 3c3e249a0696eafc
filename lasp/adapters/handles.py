"""What adapters put into a model on one rank: there only while it is needed.

On one rank `parallelize` leaves a model as it is. To stream a sequence through it (`lasp.stream_backward`), its layers
must call the operators with ranks even so, of which there is one. So the adapters edit it once; what they have changed
is taken out again, and put in its place while a sequence is streamed.
"""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lasp import adapters
from lasp.adapters.border import Border, OneRank
from lasp.ranks import SequenceParallel

_ABSENT = object()
_entering = threading.Lock()


class Handles:
    """The changes that make a model on one rank call the operators with its rank.

    Args:
        model: as it came.
        layers: with their paths and adapters.
        sequence: of one rank.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[tuple[str, nn.Module, adapters.Adapter]], sequence: SequenceParallel
    ):
        layers = list(layers)
        before = {module: _state(module) for module in model.modules()}
        border = Border(sequence) if any(isinstance(x, adapters.Foreign) for _, _, x in layers) else None
        self.own = [sequence.of_layer(path, border) for path, _, _ in layers]
        try:
            for (_, module, adapter), own in zip(layers, self.own):
                adapter(module, own)
            if border is not None:
                around = sequence.of_layer("", border)
                adapters.prepare(model, around)
                border.install(model)
                self.own.append(around)
            # Weakly: these live as long as the model, and must not keep it alive.
            self._changes = [(weakref.ref(m), *_difference(state, m)) for m, state in before.items()]
        finally:
            for module, state in before.items():
                _restore(module, state)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """A context inside which the changes are in the model."""
        held: list[tuple[dict[str, Any], str, Any]] = []

        def put(values: dict[str, Any], name: str, value: Any) -> None:
            held.append((values, name, values.get(name, _ABSENT)))
            values[name] = value

        try:
            for reference, plain, entries in self._changes:
                module = reference()
                if module is None:
                    continue
                values = vars(module)
                for name, value in plain.items():
                    put(values, name, value.of(module) if isinstance(value, _Method) else value)
                for name, added in entries.items():
                    kept = {key: x for key, x in values[name].items() if not isinstance(x, OneRank)}
                    put(values, name, type(values[name])({**kept, **added}))
            yield
        finally:
            for values, name, value in reversed(held):
                if value is _ABSENT:
                    values.pop(name, None)
                else:
                    values[name] = value


class Parallelized:
    """What is known of a model that `parallelize` was called with."""

    def __init__(
        self,
        model: nn.Module,
        sequence: SequenceParallel,
        layers: Mapping[str, tuple[nn.Module, adapters.Adapter]],
        own: Iterable[SequenceParallel],
    ):
        self.sequence, self._model = sequence, weakref.ref(model)
        self.own = list(own)  # the ranks of each layer; none on one rank, before a sequence is streamed
        self.streamed = ""  # how a sequence was streamed through it last (lasp.streaming), in words
        self.fills_cache = False  # whether a trial has shown that a prompt's state fits its library's cache
        self.decoded = ""  # how tokens were generated with it last (lasp.inference), in words
        self.last_layer: Any = None  # what of it may give the loss (lasp.streaming); None: not known yet
        self.fitting: dict[tuple, Any] = {}  # by the kind of step: segments for which there is memory, as was tried
        self._layers = [(path, weakref.ref(module), adapter) for path, (module, adapter) in layers.items()]
        self._modules = [weakref.ref(module) for module in model.modules()]
        self._handles: Handles | None = None

    @property
    def adapters(self) -> list[tuple[str, adapters.Adapter]]:
        """The adapters of its layers, by path."""
        return [(path, adapter) for path, _, adapter in self._layers]

    def knows_all(self, model: nn.Module) -> bool:
        """Whether the model has the modules that it had, and no others."""
        now = list(model.modules())
        return len(now) == len(self._modules) and all(held() is m for held, m in zip(self._modules, now))

    def refuse_new_layers(self) -> None:
        """Raise `ValueError` if a layer that mixes tokens has come into the model since: it would see the tokens of
        each rank, or of each segment, by themselves."""
        model = self._model()
        if model is None or self.knows_all(model):
            return
        known = {id(module) for held in self._modules if (module := held()) is not None}
        local = tuple(f"{path}." * bool(path) for path, _, adapter in self._layers if adapter is adapters.token_local)
        for path, module in model.named_modules():
            if id(module) not in known and adapters.find(module) is not None and not f"{path}.".startswith(local):
                raise ValueError(
                    f"model must have the layers that lasp.parallelize was called with, got {path!r}, a "
                    f"{type(module).__name__} that was put there afterwards: call lasp.parallelize behind all changes"
                )
        self._modules = [weakref.ref(module) for module in model.modules()]  # the others mix none

    def with_ranks(self) -> contextlib.AbstractContextManager[None]:
        """Inside, its layers call the operators with their ranks, on one rank too."""
        if self.sequence.size > 1:
            return contextlib.nullcontext()
        if self._handles is None:
            model = self._model()
            assert model is not None
            living = [(path, module, adapter) for path, held, adapter in self._layers if (module := held()) is not None]
            self._handles = Handles(model, living, self.sequence)
            self.own = self._handles.own
        return self._handles.inside()


_parallelized: weakref.WeakKeyDictionary[nn.Module, Parallelized] = weakref.WeakKeyDictionary()
_untouched: weakref.WeakKeyDictionary[nn.Module, Parallelized] = weakref.WeakKeyDictionary()
"""Models that `parallelize` was never called with, and run on one rank with handles."""


def remember(
    model: nn.Module,
    sequence: SequenceParallel,
    layers: Mapping[str, tuple[nn.Module, adapters.Adapter]],
    own: Iterable[SequenceParallel],
) -> None:
    """Remember what `parallelize` was called with, and have each forward look if the model is still that."""
    _parallelized[model] = Parallelized(model, sequence, layers, own)
    if sequence.size > 1 and sequence.validate != "off":
        model.register_forward_pre_hook(_refuse_new_layers)


def _refuse_new_layers(model: nn.Module, args: object) -> None:
    """A forward pre-hook of a split model. A copy of it is not known, and looks at nothing; nor is looked again for
    each segment of a stream, or each token (see `check_ranks`)."""
    if torch.compiler.is_compiling() or (split := _parallelized.get(model)) is None:
        return
    if split.sequence.stream is None:
        split.refuse_new_layers()


def of_untouched(
    model: nn.Module, make: Callable[[], Mapping[str, tuple[nn.Module, adapters.Adapter]]]
) -> Parallelized:
    """Of a model that `parallelize` was never called with, on one rank; `make` finds its layers, once while it has the
    same modules."""
    known = _untouched.get(model)
    if known is None or not known.knows_all(model):
        known = _untouched[model] = Parallelized(model, SequenceParallel(None), make(), [])
    return known


def held_by(model: nn.Module) -> list[Parallelized]:
    """What `parallelize` was called with in this process, of the model and of those in it."""
    return [_parallelized[module] for module in model.modules() if module in _parallelized]


def check_ranks(splits: Iterable[Parallelized], sequence: SequenceParallel) -> None:
    """Raise `ValueError` unless these are the ranks that they are split over, with all of their layers."""
    for split in splits:
        split.refuse_new_layers()
        if split.sequence.ranks != sequence.ranks and (split.sequence.size > 1 or sequence.size > 1):
            raise ValueError(
                f"mesh must be that of lasp.parallelize, which has split the model over the ranks "
                f"{split.sequence.ranks}, got one with {sequence.ranks}"
            )


@contextlib.contextmanager
def under_way(stream: Any, splits: list[Parallelized], model: nn.Module) -> Iterator[None]:
    """Inside, the layers of the model find the stream (a `lasp.ops.stream.Carrier`) at their ranks."""
    held = {id(x): x for m in model.modules() if isinstance(x := getattr(m, "sequence", None), SequenceParallel)}
    held |= {id(x): x for split in splits for x in (split.sequence, *split.own)}  # the border of a model asks its own
    with _entering:  # of several threads one
        busy = next((x.stream for x in held.values() if x.stream is not None), None)
        if busy is not None:
            raise RuntimeError(
                f"{stream.name} was called within "
                + ("another one" if busy.name == stream.name else busy.name)
                + " of the same model, or while it runs in another thread: wait for its end, or take a copy, "
                "made before lasp.parallelize"
            )
        for x in held.values():
            object.__setattr__(x, "stream", stream)
    try:
        yield
    finally:
        for x in held.values():
            object.__setattr__(x, "stream", None)


def known(model: nn.Module) -> list[Parallelized]:
    """The same, or what inference knows of a model that `parallelize` was never called with."""
    return held_by(model) or [x for x in (_untouched.get(model),) if x is not None]


@dataclass(frozen=True)
class _Method:
    """One that was put into a module, which it does not hold."""

    function: Callable[..., Any]

    def of(self, module: nn.Module) -> types.MethodType:
        return types.MethodType(self.function, module)


def _state(module: nn.Module) -> dict[str, Any]:
    return {name: dict(x) if isinstance(x, dict) else x for name, x in vars(module).items()}


def _difference(before: dict[str, Any], module: nn.Module) -> tuple[dict[str, Any], dict[str, dict]]:
    """Attributes that are others now, and of those that are dicts (submodules, hooks) their entries."""
    plain, entries = {}, {}
    for name, now in vars(module).items():
        old = before.get(name, _ABSENT)
        if isinstance(now, dict) and isinstance(old, dict):
            changed = {key: x for key, x in now.items() if old.get(key, _ABSENT) is not x}
            if changed:
                entries[name] = changed
        elif now is not old:
            bound = isinstance(now, types.MethodType) and now.__self__ is module
            plain[name] = _Method(now.__func__) if bound else now  # type: ignore[union-attr]
    return plain, entries


def _restore(module: nn.Module, before: dict[str, Any]) -> None:
    values = vars(module)
    for name in list(values):
        if name not in before:
            del values[name]
    for name, old in before.items():
        now = values.get(name)
        if isinstance(old, dict) and isinstance(now, dict):
            now.clear()  # the same object, to which others refer
            now.update(old)
        else:
            values[name] = old
