"""How does what a model gives on a slice of the tokens differ from that slice of what it gives on all of them?

A tensor has no names for its dimensions: those are of tokens which are shorter by as much as the slice is.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Copied = tuple[list[Any], pytree.TreeSpec]
_PLAIN = (bool, int, float, str, type(None))


class How(IntEnum):
    """The later ones count where several tensors differ."""

    SAME = 0
    DIFFERS = 1
    COUNTED = 2  # as positions do that begin at 0 in each slice
    LOST = 3  # it has another form, and tells nothing


class Slice:
    """The tokens from `start` to `end` of `tokens`, which change from run to run of a trial."""

    def __init__(self, precision: float):
        self.precision = precision  # relative differences below are rounding
        self.start = self.end = self.tokens = 0
        self.rounding = 0.0  # of an autocast within
        self.fewer = False  # whether what was compared last is of fewer tokens than there are

    def note_autocast(self) -> None:
        """What comes out of a forward that is under it has been rounded likewise."""
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                self.rounding = max(self.rounding, torch.finfo(torch.get_autocast_dtype(kind)).eps * 4)

    def put_right(self, known: Copied, now: Any) -> tuple[How, Any]:
        """How a nest of tensors differs from the slice of what it was on the whole (`copied`), and that slice."""
        (before, form), (leaves, form_now) = known, pytree.tree_flatten(now)
        if form != form_now:
            return How.LOST, now
        if not any(isinstance(x, Tensor) for x in leaves) and any(not isinstance(x, _PLAIN) for x in leaves):
            return How.LOST, now  # an object may hold anything
        worst, self.fewer, put = How.SAME, False, False
        for i, (whole, x) in enumerate(zip(before, leaves)):
            if not isinstance(x, Tensor) or whole is None:
                continue
            part = self.of(whole, x) if isinstance(whole, Tensor) else None
            if part is None:
                return How.LOST, now
            if equal(part, x):
                continue
            if part.shape == whole.shape and not (x.is_floating_point() or x.is_complex()):
                # Numbers about the tokens, such as offsets. Never those of the whole: they may be indices, and code
                # of a GPU reads and writes wherever these tell it to.
                worst = max(worst, How.SAME if self._are_of_slice(part, x) else self.compare(part, x))
                continue
            how = self.compare(part, x)
            worst = max(worst, How.COUNTED if how == How.DIFFERS and self._are_of_the_first(whole, x) else how)
            leaves[i], put = part + (x - x.detach()) if x.requires_grad else x.clone().copy_(part), True
        return worst, pytree.tree_unflatten(leaves, form) if put else now

    def _are_of_slice(self, whole: Tensor, x: Tensor) -> bool:
        """Whether integers tell as much of the slice as they did of the whole: the number of tokens may stand in them,
        as at the end of the offsets of one document."""
        if x.dtype == torch.bool:
            return False
        whole = whole.long()  # a number of tokens may not fit into its own dtype
        return torch.equal(whole.masked_fill(whole == self.tokens, self.end - self.start), x.long())

    def _are_of_the_first(self, whole: Tensor, x: Tensor) -> bool:
        """Whether tokens behind give what the first of the whole do: as angles of rotary positions."""
        first = self.of(whole, x, start=0) if self.start else None
        return first is not None and self.compare(first, x) == How.SAME

    def of(self, whole: Tensor, x: Tensor, *, start: int | None = None) -> Tensor | None:
        """The part of `whole` in whose place x is: dimensions that shrank as the tokens did are theirs, perhaps with
        some more tokens before or behind. None if something else has changed."""
        start = self.start if start is None else start
        if whole.ndim != x.ndim or whole.dtype != x.dtype:
            return None
        for dim, (size, size_now) in enumerate(zip(whole.shape, x.shape)):
            if size == size_now:
                continue
            extra = size_now - (self.end - self.start)
            self.fewer = self.fewer or extra < 0
            if extra < 0 or size != self.tokens + extra:
                return None
            whole = whole.narrow(dim, start, size_now)
        return whole

    def compare(self, part: Tensor, x: Tensor, *, coarser: int = 1) -> How:
        """Two tensors of one shape; rounding may be so many times `coarser` than usual."""
        if part.is_sparse or part.is_nested or part.is_quantized:
            return How.LOST
        if not part.is_floating_point() and not part.is_complex():
            if torch.equal(part, x):
                return How.SAME
            counted = part.dtype != torch.bool and self.start and bool((part - x == self.start).all())
            return How.COUNTED if counted else How.DIFFERS
        if part.dtype.itemsize < 2:
            part, x = part.float(), x.float()
        size = part.abs().nan_to_num(0.0, 0.0).max() if part.numel() else 0.0
        relative = max(self.precision, self.rounding) * coarser
        bound = relative * float(size)
        return How.SAME if torch.allclose(part, x, rtol=relative, atol=bound, equal_nan=True) else How.DIFFERS


def copied(nest: Any) -> Copied:
    """A nest with copies of its tensors, flat."""
    leaves, form = pytree.tree_flatten(nest)
    return [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves], form


def equal(part: Tensor, x: Tensor) -> bool:
    """As most are: to compare them takes a dozen operations."""
    return not (part.is_sparse or part.is_nested or part.is_quantized) and torch.equal(part, x)
