"""Adapters: what `parallelize` does to a layer so that it works on a slice of the sequence.

An adapter is a function of the module and the `SequenceParallel`, which edits the module in place. Adapters
for layers of other libraries have a file each in this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from torch import nn

from lasp import arguments
from lasp.modules import LightningAttention
from lasp.ranks import SequenceParallel

Adapter = Callable[[nn.Module, SequenceParallel], None]
ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


def linear(module: nn.Module, sequence: SequenceParallel) -> None:
    """For a layer that calls `lasp.linear_attention(..., sequence=self.sequence)`."""
    module.sequence = sequence  # type: ignore[assignment]


def token_local(module: nn.Module, sequence: SequenceParallel) -> None:
    """For a layer that mixes no tokens, though it looks as if it did: leaves it as it is."""


_ADAPTERS: dict[type[nn.Module], Adapter] = {LightningAttention: linear}


@overload
def register(cls: ModuleClass, *, adapter: Adapter = ...) -> ModuleClass: ...


@overload
def register(*, adapter: Adapter = ...) -> Callable[[ModuleClass], ModuleClass]: ...


def register(cls: type[nn.Module] | None = None, *, adapter: Adapter = linear) -> Any:
    """Tell `parallelize` how a module class of yours is split. Also a class decorator.

    By default the class has an attribute `sequence`, None on one rank, that its forward passes on::

        @lasp.register
        class MyAttention(torch.nn.Module):
            sequence = None  # lasp.parallelize sets it

            def forward(self, x):
                ...
                o, _ = lasp.linear_attention(q, k, v, sequence=self.sequence)

    Anything else takes an `adapter`, a function of the module and the `lasp.SequenceParallel`. Subclasses inherit.

    Raises:
        TypeError: not a module class, or one without `sequence` for the default adapter.
    """
    arguments.function("adapter", adapter)
    if cls is None:
        return lambda c: register(c, adapter=adapter)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class of torch.nn.Module, got {arguments.shown(cls)}")
    if adapter is linear and not hasattr(cls, "sequence"):
        raise TypeError(
            f"{cls.__name__} needs a class attribute `sequence = None` that its forward passes to "
            "lasp.linear_attention(..., sequence=self.sequence); or give register an adapter"
        )
    _ADAPTERS[cls] = adapter
    return cls


def find(module: nn.Module) -> Adapter | None:
    """The adapter of a module's class or the nearest class it inherits from."""
    return next((_ADAPTERS[base] for base in type(module).__mro__ if base in _ADAPTERS), None)
