"""What a layer will call, as far as its code and that of its adapter tell before it has run: for `explain`."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lasp.adapters.rebind import names_in

CROSSES = {
    "linear_attention": "a state",
    "delta_rule": "a state and its matrix",
    "selective_scan": "a state",
    "elementwise_recurrence": "a number a channel",
    "causal_conv": "the last tokens",
    "block_attention": "the last tokens",
    "halo": "the last tokens",
    "softmax_attention": "K and V",
}
"""What an operator sends to other ranks, by its name."""

_DEPTH = 4  # of functions that hold the next one: an adapter, what it makes, what that calls


def operators_of(module: nn.Module, adapter: Callable[..., Any]) -> tuple[str, ...]:
    """The operators that the code of a layer names, which the adapter has split; nothing is run."""
    methods = [getattr(x, "__func__", x) for m in module.modules() for x in vars(m).values()]
    starts = [_function_of(adapter), type(module).forward, *methods]
    known: dict[Any, set[str]] = {}
    for start in starts:
        _collect(start, _DEPTH, known)
    named = set().union(*known.values())
    return tuple(name for name in CROSSES if name in named)


def name_of(adapter: Callable[..., Any]) -> str:
    """Where an adapter's function stands; for one of lasp's, its file."""
    function = _function_of(adapter)
    file = getattr(function, "__module__", type(function).__module__)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if file is None:  # of text that was run
        return name
    return file if file.startswith("lasp.adapters.") else f"{file}.{name}"


def _function_of(adapter: Any) -> Any:
    """What is called in the end, below what only adds to it."""
    while True:
        inner = next((getattr(adapter, x) for x in ("adapter", "split", "func") if hasattr(adapter, x)), None)
        if inner is None:
            return adapter
        adapter = inner


def _collect(function: Any, depth: int, known: dict[Any, set[str]]) -> None:
    if not isinstance(function, types.FunctionType) or function in known or depth == 0:
        return
    names = known[function] = names_in(function)
    for called in _called(function, names):
        _collect(called, depth - 1, known)


def _called(function: types.FunctionType, names: set[str]) -> Iterator[Any]:
    """What it calls by a global name, holds, or says by an attribute; but for the operators themselves."""
    yield vars(function).get("calls")
    yield from (function.__globals__[name] for name in names - CROSSES.keys() if name in function.__globals__)
    for cell in function.__closure__ or ():
        held = cell.cell_contents if cell != types.CellType() else None
        yield held.func if isinstance(held, functools.partial) else held
