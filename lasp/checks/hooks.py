"""Forward hooks and pre-hooks that neither PyTorch nor lasp has registered: what they do may mix tokens, too."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global
from torch.utils import _pytree as pytree


class _Everywhere:
    """In the place of a module: its hooks are those of all modules of the process."""

    def __init__(self):
        self._forward_pre_hooks, self._forward_hooks = _global._global_forward_pre_hooks, _global._global_forward_hooks
        self._forward_pre_hooks_with_kwargs = {}
        self._forward_hooks_with_kwargs = _global._global_forward_hooks_with_kwargs
        self._forward_hooks_always_called = _global._global_forward_hooks_always_called


EVERYWHERE = _Everywhere()
Owner = nn.Module | _Everywhere
_TABLES = tuple(name for name in vars(nn.Module()) if name.startswith("_forward"))


def tables_of(modules: Iterable[Owner]) -> list[dict[int, Any]]:
    """What holds their hooks, and how these are called."""
    return [table for m in modules for name in _TABLES if isinstance(table := vars(m).get(name), dict)]


def functions_of(owner: Owner) -> list[tuple[str, Callable[..., Any]]]:
    """The hooks around its forward that count, each with the name of its table."""
    values = vars(owner)
    return [(name, x) for name in ("_forward_pre_hooks", "_forward_hooks") for x in values[name].values() if _counts(x)]


def _counts(hook: Any) -> bool:
    """PyTorch's own do not: they gather, cast, scale or observe (FSDP2, DDP, weight norm, quantization), or call
    modules, which are asked themselves. Nor do those of lasp, which are there for the ranks."""
    return (getattr(_function(hook), "__module__", None) or "").partition(".")[0] not in ("torch", "lasp")


def _function(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return hook


@dataclass(frozen=True, eq=False)
class Hook:
    """One of a model that counts."""

    owner: Owner
    path: str  # of its module
    table: MutableMapping[int, Callable[..., Any]]
    number: int  # in that
    function: Callable[..., Any]
    before: bool  # a pre-hook
    with_kwargs: bool

    @functools.cached_property
    def name(self) -> str:
        """What it is called in an error."""
        f = _function(self.function)
        f = f if hasattr(f, "__qualname__") else type(f)
        kind = "forward pre-hook" if self.before else "forward hook"
        where = f"{self.path or 'the model itself'} ({type(self.owner).__name__})"
        where = "all modules" if self.owner is EVERYWHERE else where
        return f"{where}, {kind} {f.__module__}.{f.__qualname__}"

    def call(self, module: Any, given: tuple) -> tuple:
        """What goes on from it, of what it was given and in the same form: of a pre-hook the arguments, else the same
        with the new output. It raises what the hook does."""
        try:
            out = self.function(module, *given)
        except RuntimeError:
            if torch.is_grad_enabled():
                raise
            with torch.enable_grad():  # it may register something with autograd
                given = pytree.tree_map_only(Tensor, _with_grad, given)
                out = self.function(module, *given)
            given, out = pytree.tree_map_only(Tensor, Tensor.detach, (given, out))
        if out is None:
            return given
        if not self.before:
            return (*given[:-1], out)
        return out if self.with_kwargs else (out if isinstance(out, tuple) else (out,),)


def _with_grad(x: Tensor) -> Tensor:
    x = x.detach().clone()
    return x.requires_grad_().view_as(x) if x.is_floating_point() else x


@contextlib.contextmanager
def states_kept(found: Iterable[Hook]) -> Iterator[None]:
    """Afterwards they hold what they held: in attributes, in the variables of a closure, in lists and such there."""
    states = _States()
    for hook in found:
        states.add(hook.function)
    try:
        yield
    finally:
        states.put_back()


class _States:
    """What functions hold, and objects that are called or whose methods are."""

    def __init__(self):
        self._seen: dict[int, Any] = {}
        self._attributes: list[tuple[dict[str, Any], dict[str, Any], Iterable[str]]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._globals: list[tuple[dict[str, Any], dict[str, Any]]] = []  # those that a function names
        self._contents: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []

    def add(self, x: Any, package: str = "") -> None:
        """What x holds, if it is of the hook's package: loggers and such that others wrote count for themselves."""
        if id(x) in self._seen:
            return
        self._seen[id(x)] = x
        if type(x) in _CONTAINERS:
            self._contents.append((x, copy.copy(x)))
            for y in x.values() if isinstance(x, dict) else ():
                if type(y) in _CONTAINERS:
                    self.add(y, package)
        elif type(x) is Tensor:
            if not x.is_meta and not x.is_inference() and x.numel() <= _SMALL:
                self._tensors.append((x, x._version, x.detach().clone()))
        elif not isinstance(x, (type, types.ModuleType)) and package in ("", _package(x)):
            for y in self._add_own(x):
                self.add(y, package or _package(x.__self__ if isinstance(x, types.MethodType) else x))

    def _add_own(self, x: Any) -> list[Any]:
        """Its attributes or variables; gives what these hold."""
        if isinstance(x, functools.partial):
            return [x.func, *x.args, *x.keywords.values()]
        if isinstance(x, types.MethodType):
            return [x.__func__, x.__self__]
        if isinstance(x, types.FunctionType):
            cells = [c for c in x.__closure__ or () if c != types.CellType()]  # else it is empty
            self._cells += [(c, c.cell_contents) for c in cells]
            named = {name: x.__globals__[name] for name in x.__code__.co_names if name in x.__globals__}
            self._globals.append((x.__globals__, named))
            given = (*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values())
            return [*(c.cell_contents for c in cells), *named.values(), *given]
        if not hasattr(x, "__dict__"):
            return []
        plain = vars(nn.Module()).keys() if isinstance(x, nn.Module) else ()
        own = {name: y for name, y in vars(x).items() if name not in plain}
        self._attributes.append((vars(x), own, plain))
        return [y for y in own.values() if type(y) in (*_CONTAINERS, Tensor)]

    def put_back(self) -> None:
        """As it was when it was added."""
        for values, before, plain in self._attributes:
            for name in values.keys() - before.keys() - set(plain):
                del values[name]
            values.update(before)
        for cell, content in self._cells:
            cell.cell_contents = content
        for values, before in self._globals:
            values.update(before)
        for x, content in self._contents:
            x.clear()
            x.extend(content) if isinstance(x, (list, deque)) else x.update(content)
        for x, version, content in self._tensors:
            if x._version != version:
                with torch.no_grad():
                    x.copy_(content)


_SMALL = 1 << 20  # numbers of a tensor that is copied
_CONTAINERS = (list, dict, set, deque, defaultdict, OrderedDict, Counter)  # those of others may not be written to


def _package(x: Any) -> str:
    x = _function(x)
    named = x if isinstance(x, (types.FunctionType, types.MethodType)) else type(x)
    return (getattr(named, "__module__", None) or "").partition(".")[0]


def hooks_of(model: nn.Module, prefix: str = "") -> list[Hook]:
    """Those of all modules of a model whose path is `prefix`, and those of the process."""
    owners: list[tuple[str, Owner]] = [("", EVERYWHERE)]
    owners += [(".".join(filter(None, (prefix, path))), m) for path, m in model.named_modules()]
    found = []
    for path, owner in owners:
        for name in ("_forward_pre_hooks", "_forward_hooks"):
            table = vars(owner).get(name) or {}
            kwargs = vars(owner).get(f"{name}_with_kwargs") or {}
            before = name == "_forward_pre_hooks"
            found += [Hook(owner, path, table, k, f, before, k in kwargs) for k, f in table.items() if _counts(f)]
    return found


class Alone(nn.Module):
    """A hook of a module that cannot run, for a trial: given a tensor, or a tuple in which it is the first."""

    def __init__(self, hook: Hook, *, in_tuple: bool):
        super().__init__()
        assert isinstance(hook.owner, nn.Module)
        self._hook, self._owner, self._in_tuple = hook, (hook.owner,), in_tuple  # no module in it
        like = next((p for p in hook.owner.parameters() if p.is_floating_point() and not p.is_meta), None)
        like = torch.empty(0, device="cpu") if like is None else torch.empty(0, dtype=like.dtype, device=like.device)
        self.like = nn.Parameter(like, requires_grad=False)

    @property
    def imitated(self) -> nn.Module:
        """The module whose inputs it is given, or behind which it is given outputs."""
        return self._owner[0]

    @property
    def widths(self) -> list[int]:
        """Of those outputs, if that is known."""
        width = None if self._hook.before else getattr(self.imitated, "out_features", None)
        return [width] if isinstance(width, int) else []

    @property
    def takes_ids(self) -> bool:
        """Whether it may be given what goes into an embedding."""
        return self._hook.before

    def forward(self, x: Any) -> Any:
        """What goes on from the hook."""
        given = ((x,), {}) if self._hook.with_kwargs else ((x,),)
        if self._hook.before:
            return self._hook.call(self.imitated, given)
        return self._hook.call(self.imitated, (*given, (x, None) if self._in_tuple else x))[-1]
