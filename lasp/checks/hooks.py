"""Forward hooks and pre-hooks that neither PyTorch nor lasp has registered: what they do may mix tokens, too."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _global


class _Everywhere:
    """In the place of a module: its hooks are those of all modules of the process."""

    def __init__(self):
        self._forward_pre_hooks, self._forward_hooks = _global._global_forward_pre_hooks, _global._global_forward_hooks
        self._forward_pre_hooks_with_kwargs = {}
        self._forward_hooks_with_kwargs = _global._global_forward_hooks_with_kwargs


EVERYWHERE = _Everywhere()
Owner = nn.Module | _Everywhere
_TABLES = tuple(name for name in vars(nn.Module()) if name.startswith("_forward"))


def tables_of(modules: Iterable[nn.Module]) -> list[dict[int, Any]]:
    """What holds their hooks, and how these are called."""
    return [table for m in modules for name in _TABLES if isinstance(table := vars(m).get(name), dict)]


def functions_of(owner: Owner) -> list[Callable[..., Any]]:
    """The hooks around its forward that count."""
    values = vars(owner)
    return [x for x in (*values["_forward_pre_hooks"].values(), *values["_forward_hooks"].values()) if _counts(x)]


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
        with the new output."""
        out = self.function(module, *given)
        if out is None:
            return given
        if not self.before:
            return (*given[:-1], out)
        return out if self.with_kwargs else (out if isinstance(out, tuple) else (out,),)


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

    @contextlib.contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Inside, its module is; afterwards that has the attributes and hooks that it had: some remove themselves."""
        values = vars(self.imitated)
        before, kept = dict(values), [(table, dict(table)) for table in tables_of([self.imitated])]
        try:
            values["training"] = False
            yield
        finally:
            for name in values.keys() - before.keys():
                del values[name]
            values.update(before)
            for table, content in kept:
                table.clear()
                table.update(content)
