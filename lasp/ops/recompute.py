"""Activation checkpointing without a second exchange: what the original forward received is kept for its recompute.

`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` runs a forward again in backward. A state that travelled
once need not travel again, and a rank that recomputes needs no peer that does. The received states are small beside
what a checkpoint saves: one [N, H, K, V] a layer.

Which original call a recompute repeats is known exactly, whatever the order of backwards: PyTorch gives each
checkpointed call a frame, and its hooks for saved tensors, in force while the original runs and while it is repeated,
refer to it. The frame is the key under which a call's states are kept, in the order in which they came, and they are
freed with it: with the graph.

A selective checkpoint (`create_selective_checkpoint_contexts`) counts operations of PyTorch to tell which of the kept
results is whose. A recompute that exchanges nothing has fewer, so what is around an exchange is `unseen` by it: nothing
of that is kept, all is made again.

That reference is no public interface of PyTorch. All that is private here is in `_Private`, imported at the first use.
Where a version of PyTorch lacks it, and where there is no frame (`use_reentrant=True`, or a recompute inside a
`torch.compile` graph), every rank repeats the exchange: the same result, in more time; `lasp.explain` says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

PackHook = Callable[[Tensor], Any]


class _Private:
    """What PyTorch does not promise to keep."""

    def __init__(self) -> None:
        from torch._C import _autograd
        from torch.utils import _python_dispatch, checkpoint

        self.frame: type = checkpoint._CheckpointFrame
        self.top, self.pop, self.push = (
            getattr(_autograd, f"_{name}_saved_tensors_default_hooks") for name in ("top", "pop", "push")
        )
        self.graph_task = torch._C._current_graph_task_id
        self.modes = _python_dispatch._get_current_dispatch_mode_stack
        self.selective = (checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode)
        self.no_modes = torch._C._DisableTorchDispatch


@lru_cache
def _private() -> _Private | None:
    """None where this version of PyTorch has not got it."""
    try:
        return _Private()
    except (ImportError, AttributeError):
        return None


def repeats() -> str:
    """Why every recompute repeats its exchanges here; empty where they need not."""
    return "" if _private() else f"torch {torch.__version__} does not tell which call a recompute repeats"


def unseen() -> AbstractContextManager[None]:
    """Around arithmetic with an exchange in it: a selective checkpoint sees nothing of it, neither time."""
    private = _private()
    if private is None or private.top(True) is None:
        return _NOTHING
    return private.no_modes() if any(isinstance(x, private.selective) for x in private.modes()) else _NOTHING


_NOTHING = nullcontext()


class Reception:
    """One communication of a forward: it takes place, or its result is known from the original."""

    def __init__(self, key: str, result: Tensor | None, kept_by: list[list[_Kept]]):
        self.result = result
        self._places = []
        for kept in kept_by:
            kept.append(_Kept(key))
            self._places.append(kept[-1])
        self.kept = bool(self._places)  # whether a recompute may need the result
        if result is not None:
            self.keep(result)

    def keep(self, result: Tensor) -> Tensor:
        """Remember what came, for recomputes; returns it."""
        for place in self._places:
            place.result = result
        return result


def under_way() -> bool:
    """Whether what runs now repeats an earlier forward."""
    private = _private()
    if private is None:
        return False
    if private.graph_task() != -1:  # in backward, as a rule; also where there is no frame
        return True
    return private.top(True) is not None and any(_frame_of(pack)[1] for pack in _pack_hooks())


def once(key: str, communicate: Callable[[], Tensor]) -> Tensor:
    """What `communicate` gives, or in a recompute what it gave; a copy, which the caller may change or return."""
    here = reception(key)
    return (here.keep(communicate()) if here.result is None else here.result).clone()


class _Kept:
    def __init__(self, key: str):
        self.key = key
        self.result: Tensor | None = None


# Of each frame: what its original forward was told (`as_in_the_original`), and what it has received; and how much of
# that each recompute has used, by its hook, since a graph that is retained may be recomputed more than once.
_received: weakref.WeakKeyDictionary[Any, list[_Kept]] = weakref.WeakKeyDictionary()
_used: weakref.WeakKeyDictionary[PackHook, int] = weakref.WeakKeyDictionary()
_told: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
_TAKES_PLACE = Reception("", None, [])


def as_in_the_original(owner: Any, now: Any) -> Any:
    """What the `owner` says now; in a recompute what it said when the original ran, maybe of an earlier batch.

    Where PyTorch does not tell which call a recompute repeats, that is what it says now.
    """
    private = _private()
    if private is None or private.top(True) is None:
        return now
    for pack in _pack_hooks():
        frame, is_repeat = _frame_of(pack)
        if frame is not None and is_repeat:
            return _told.get(frame, {}).get(owner, now)
        if frame is not None:
            _told.setdefault(frame, {})[owner] = now
    return now


def reception(key: str) -> Reception:
    """To be called once for each communication of a forward, in order; `key` says which layer's it is.

    Raises:
        RuntimeError: a recompute does not do what its original did.
    """
    private = _private()
    if private is None or private.top(True) is None:  # no hooks at all: no checkpoint
        return _TAKES_PLACE
    result, kept_by = None, []
    for pack in _pack_hooks():
        frame, is_repeat = _frame_of(pack)
        if frame is None:
            continue
        if is_repeat:  # hooks further down belong to what runs around this recompute
            result = _next_result(frame, pack, key)
            break
        kept_by.append(_received.setdefault(frame, []))
    return Reception(key, result, kept_by)


def _next_result(frame: Any, pack: PackHook, key: str) -> Tensor:
    kept = _received.get(frame, [])
    place = _used.get(pack, 0)
    _used[pack] = place + 1
    if place >= len(kept) or kept[place].key != key or kept[place].result is None:
        raise RuntimeError(
            f"the recompute of a checkpoint exchanges something for {key} as its number {place}, but in the original "
            f"forward these were exchanged: {[x.key for x in kept]}. A checkpointed function must do the same each time"
        )
    return kept[place].result  # type: ignore[return-value]


def _pack_hooks() -> list[PackHook]:
    """The saved-tensor hooks in force, from the innermost."""
    private, taken = _private(), []
    assert private is not None
    try:
        while (hooks := private.top(True)) is not None:
            private.pop()  # the only way to see those below
            taken.append(hooks)
    finally:
        for hooks in reversed(taken):
            private.push(*hooks)
    return [pack for pack, _ in taken]


def _frame_of(pack: PackHook) -> tuple[Any, bool]:
    """The checkpoint frame to which a hook belongs, and whether that is being recomputed.

    The hook of an original forward holds its frame, that of a recompute a weak reference to it.
    """
    private = _private()
    assert private is not None
    pack = getattr(pack, "__wrapped__", pack)
    for cell in getattr(pack, "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
        if isinstance(held, private.frame):
            return held, False
        if isinstance(held, weakref.ref) and isinstance(held(), private.frame):
            return held(), True
    return None, False
