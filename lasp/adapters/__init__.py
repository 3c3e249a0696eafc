"""Adapters: what `parallelize` does to a layer so that it works on a slice of the sequence.

An adapter is a function of the module and the `SequenceParallel`, which edits the module in place. It answers for what
the module does in its own forward, and for the modules below that it `covers`. Adapters for layers of other libraries
have a file each in this folder.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from torch import nn

from lasp import arguments
from lasp.adapters.border import Border, layout_of
from lasp.adapters.rebind import is_function, names_in, rebind, without_methods
from lasp.modules import OPERATOR_MODULES, Router
from lasp.ranks import SequenceParallel

__all__ = ["is_function", "layout_of", "linear", "names_in", "rebind", "register", "token_local"]

Adapter = Callable[[nn.Module, SequenceParallel], None]
Covers = bool | tuple[str, ...]
ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


def linear(module: nn.Module, sequence: SequenceParallel) -> None:
    """For a layer that calls `lasp.linear_attention(..., sequence=self.sequence)`, or another operator so.

    Args:
        module: the layer, whose attribute `sequence` is set.
        sequence: the ranks.
    """
    module.sequence = sequence  # type: ignore[assignment]


def token_local(module: nn.Module, sequence: SequenceParallel) -> None:
    """For a layer that mixes no tokens, though it looks as if it did: leaves it, and all below, as it is.

    Args:
        module: the layer.
        sequence: the ranks, which it is not told.
    """


def _counting(module: nn.Module, sequence: SequenceParallel) -> None:
    """For a router, which sends nothing, but must know which of this rank's tokens are padding."""
    module.sequence = sequence  # type: ignore[assignment]


@dataclass(frozen=True)
class Covering:
    """An adapter that also answers for modules below its own: their paths from there, or True for all of them."""

    adapter: Adapter
    covers: Covers
    exchanges: bool = True  # whether the layer calls an operator with the ranks

    def __call__(self, module: nn.Module, sequence: SequenceParallel) -> None:
        self.adapter(module, sequence)


@dataclass(frozen=True)
class Foreign(Covering):
    """An adapter for a layer of a model that takes no `layout`: it is told at the model's border (border.py)."""

    stand_in: Callable[[nn.Module], None] | None = None  # for a trial: gives it a quick forward, each token by itself


_ADAPTERS: dict[type[nn.Module], Adapter] = dict.fromkeys(OPERATOR_MODULES, linear)
_ADAPTERS[Router] = Covering(_counting, (), exchanges=False)
_BY_NAME: dict[str, Adapter] = {}  # patterns of dotted names of classes
_LIBRARIES = {
    "fla": "lasp.adapters.fla",
    "transformers": "lasp.adapters.transformers",
    "transformers_modules": "lasp.adapters.remote_code",
}
"""Files for the layers of a library, by its first name: imported when a model has one."""


@overload
def register(cls: ModuleClass, *, adapter: Adapter = ..., covers: bool | Iterable[str] = ...) -> ModuleClass: ...


@overload
def register(cls: str, *, adapter: Adapter, covers: bool | Iterable[str] = ...) -> str: ...


@overload
def register(*, adapter: Adapter = ..., covers: bool | Iterable[str] = ...) -> Callable[[ModuleClass], ModuleClass]: ...


def register(
    cls: type[nn.Module] | str | None = None, *, adapter: Adapter = linear, covers: bool | Iterable[str] = ()
) -> Any:
    """Tell `parallelize` how a module class of yours is split. Also a class decorator.

    By default the class has an attribute `sequence`, None on one rank, that its forward passes on::

        @lasp.register
        class MyAttention(torch.nn.Module):
            sequence = None  # lasp.parallelize sets it

            def forward(self, x):
                ...
                o, _ = lasp.linear_attention(q, k, v, sequence=self.sequence)

    Anything else takes an `adapter`, a function of the module and the `lasp.SequenceParallel`. Subclasses inherit.
    A class of another library is given by its dotted name, and nothing is imported (docs/models.md shows how to write
    the adapter)::

        lasp.register("their_library.layers.TheirAttention", adapter=split_their_attention)

    Args:
        cls: the class, or its dotted name, in which * stands for anything ("transformers_modules.*.TheirAttention").
        adapter: edits a module of that class in place. It answers for the module's own forward.
        covers: the modules below that the adapter takes care of as well, by their paths from the module, e.g.
            ("conv1d",), or True for all of them. The others must mix no tokens, or have an adapter of their own.

    Returns:
        `cls`, so that it is a decorator; without `cls` a decorator with these options.

    Raises:
        ValueError: a string that is no dotted name.
        TypeError: not a module class, one without `sequence` for the default adapter, an adapter that cannot be
            called, or `covers` that are no names.
    """
    arguments.function("adapter", adapter)
    if cls is None:
        return lambda c: register(c, adapter=adapter, covers=covers)
    covers = _checked(covers)
    if isinstance(cls, str):
        if not all(part == "*" or part.replace("*", "_").isidentifier() for part in cls.split(".")) or "." not in cls:
            raise ValueError(f"cls must be a class or its dotted name such as 'library.file.Class', got {cls!r}")
        if adapter is linear:
            raise TypeError(f"{cls} is given by its name, so that it needs an adapter")
        _BY_NAME[cls] = adapter if adapter is token_local else Foreign(adapter, covers)
        return cls
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class of torch.nn.Module or its dotted name, got {arguments.shown(cls)}")
    if adapter is linear and not hasattr(cls, "sequence"):
        raise TypeError(
            f"{cls.__name__} needs a class attribute `sequence = None` that its forward passes to "
            "lasp.linear_attention(..., sequence=self.sequence); or give register an adapter"
        )
    _ADAPTERS[cls] = Covering(adapter, covers) if covers else adapter
    return cls


def check(adapter: object, name: str) -> None:
    """Raise `TypeError` unless it can be an adapter."""
    if not callable(adapter):
        raise TypeError(f"{name} must be an adapter, a function of a module and a SequenceParallel, got {adapter!r}")


def _checked(covers: bool | Iterable[str]) -> Covers:
    if isinstance(covers, bool):
        return covers
    names = None if isinstance(covers, str) or not isinstance(covers, Iterable) else tuple(covers)
    if names is None or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"covers must be True or names of modules, e.g. ('conv1d',), got {arguments.shown(covers)}")
    return names


def find(module: nn.Module) -> Adapter | None:
    """The adapter of a module's class or the nearest class it inherits from, or else what is known of its library."""
    for base in type(module).__mro__:
        if base in _ADAPTERS:
            return _ADAPTERS[base]
        dotted = f"{base.__module__}.{base.__qualname__}"
        for pattern, adapter in _BY_NAME.items():
            if fnmatch.fnmatchcase(dotted, pattern):
                return adapter
    for base in type(module).__mro__:
        library = _LIBRARIES.get(base.__module__.partition(".")[0])
        if library is not None:
            return importlib.import_module(library).adapter_of(module)
    return None


def known_to_mix(module: nn.Module) -> bool:
    """Whether its library's file says of its class that it mixes tokens, for where it cannot be asked."""
    for base in type(module).__mro__:
        library = _LIBRARIES.get(base.__module__.partition(".")[0])
        if library is not None:
            asked = getattr(importlib.import_module(library), "mixes", None)
            return asked is not None and asked(module)
    return False


@contextlib.contextmanager
def standing_in(model: nn.Module, layers: Iterable[tuple[nn.Module, Adapter]]) -> Iterator[None]:
    """For a trial: inside, a layer whose adapter has a `stand_in` does not compute along the sequence. The adapter
    answers for that, and kernels of its library might first be compiled for minutes, or run on no such device. Nor does
    a model return what its library's file puts right."""
    before = []
    with contextlib.ExitStack() as stack:
        for library in _libraries_of(model):
            if hasattr(library, "for_trial"):
                stack.enter_context(library.for_trial(model))
        for module, adapter in layers:
            if isinstance(adapter, Foreign) and adapter.stand_in is not None:
                before.append((vars(module), vars(module).get("forward")))
                adapter.stand_in(module)
        try:
            yield
        finally:
            for attributes, forward in before:
                attributes.pop("forward", None) if forward is None else attributes.update(forward=forward)


def prepare(model: nn.Module, sequence: SequenceParallel) -> None:
    """What a library's layers need of the model around them, after they were split."""
    for library in _libraries_of(model):
        library.prepare(model, sequence)


@contextlib.contextmanager
def as_it_came(model: nn.Module) -> Iterator[None]:
    """Inside, a model of another library is what that made of it: what `parallelize` put into it is gone. To other
    threads the model is refused."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, Border):
                    stack.enter_context(hook.taken_from(module))
        stack.enter_context(without_edits(model))
        yield


@contextlib.contextmanager
def without_edits(model: nn.Module) -> Iterator[None]:
    """The same, but for the border, whose hooks stay."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_methods(model))
        for library in _libraries_of(model):
            stack.enter_context(library.as_it_came(model))
        yield


def on_one_rank(model: nn.Module) -> list[str]:
    """What libraries' files have to say of a model that stays as its library made it."""
    told = [library.on_one_rank(model) for library in _libraries_of(model) if hasattr(library, "on_one_rank")]
    return [text for text in told if text]


def libraries_of(model: nn.Module) -> list[str]:
    """The libraries whose layers `parallelize` changes, and which the model has."""
    return sorted(
        _LIBRARIES.keys() & {b.__module__.partition(".")[0] for m in model.modules() for b in type(m).__mro__}
    )


def _libraries_of(model: nn.Module) -> list[Any]:
    return [importlib.import_module(_LIBRARIES[name]) for name in libraries_of(model)]


def exchanges(adapter: Adapter) -> bool:
    """Whether a layer with this adapter calls an operator with the ranks."""
    return adapter is not token_local and getattr(adapter, "exchanges", True)


def passes_ranks(adapter: Adapter) -> bool:
    """Whether it leaves the module as it is, which must then pass its `sequence` to an operator."""
    return adapter is linear or (isinstance(adapter, Covering) and adapter.adapter is linear)


def covers(adapter: Adapter, name: str) -> bool:
    """Whether it answers for what mixes tokens at `name`, the path from its module; empty is the module itself."""
    if adapter is token_local:
        return True
    if not name:
        return not passes_ranks(adapter)
    covered = getattr(adapter, "covers", ())  # any object that says so
    return covered is True or any(name == below or name.startswith(f"{below}.") for below in covered or ())
