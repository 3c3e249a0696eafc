"""What a run of tokens does to a state that passes through it: a map. Two maps, one after the other, are again one.

| kind | transition | map | who |
|---|---|---|---|
| none | None | S -> S + state | linear attention without decay |
| decay | log-decay [U, N, H, K or 1] | S -> exp(transition) S + state | a number or a vector for each head |
| matrix | [U, N, H, K, K] | S -> transition @ S + state | the delta rule |

What differs between the kinds is here and in `lasp_kernels.fold`, which does the arithmetic: how a map looks that
changes nothing, and one that lets nothing pass. The columns of a state (V) are never mixed; its rows (K) may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Fold = Callable[[Tensor | None, Tensor, Tensor | None], Tensor]
"""(entering [N, H, K, V] or None, state [U, N, H, K, V], transition) -> the state behind the maps, from the left."""

HeadRuns = tuple[tuple[int, int], ...]  # runs of neighbouring heads: first, last + 1


def identity(transition: Tensor | None) -> Tensor | None:
    """The transition of maps like these that change nothing (beside a state of zeros)."""
    if transition is None or transition.ndim == 4:
        return None if transition is None else torch.zeros_like(transition)
    same = torch.zeros_like(transition)
    same.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return same


def forgetting(transition: Tensor | None) -> Tensor:
    """The transition of maps like these that let nothing pass, as where a sequence begins."""
    if transition is None:
        raise ValueError("a map without transition lets everything pass: a sequence that begins needs a decay")
    return torch.full_like(transition, -math.inf if transition.ndim == 4 else 0.0)


class StateMap(NamedTuple):
    """What a rank's tokens do to a state that passes through them, as U maps in a row.

    state [U, N, H, K, V] and transition (see the module), both fp32 (fp64 for fp64 inputs), U >= 1.
    """

    state: Tensor
    transition: Tensor | None = None

    @property
    def all_heads(self) -> HeadRuns:
        """All heads, as one run."""
        return ((0, self.state.shape[2]),)

    @property
    def state_numbers(self) -> int:
        """Numbers of one state [N, H, K, V]."""
        return math.prod(self.state.shape[1:])

    @property
    def map_numbers(self) -> int:
        """Numbers of one map: its state and its transition."""
        return self.state_numbers + (0 if self.transition is None else math.prod(self.transition.shape[1:]))

    def heads(self, heads: HeadRuns) -> StateMap:
        """The map of some of the heads."""
        if heads == self.all_heads:
            return self
        transition = None if self.transition is None else take_heads(self.transition, heads)
        return StateMap(take_heads(self.state, heads), transition)

    def columns(self, cut: slice) -> StateMap:
        """The map of some columns of the state, which no map mixes."""
        return StateMap(self.state[..., cut], self.transition)

    def zeros(self) -> Tensor:
        """The state before the first rank's tokens: [N, H, K, V]."""
        return torch.zeros_like(self.state[0])

    def packed(self, units: int, out: Tensor | None = None) -> Tensor:
        """The maps as one tensor [units, numbers of a map]; written to `out` if that is given.

        What is added behind the own maps are maps that change nothing.
        """
        own, numbers = self.state.shape[0], self.state_numbers
        if out is None:
            out = self.state.new_empty(units, self.map_numbers)
        if self.transition is None:
            out[:own] = self.state.flatten(1)
        else:
            torch.cat([self.state.flatten(1), self.transition.flatten(1)], 1, out=out[:own])
        if own < units:
            out[own:] = 0.0
            if self.transition is not None and self.transition.ndim == 5:
                rest = out[own:, numbers:].view(units - own, *self.transition.shape[1:])
                rest.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return out

    def unpack(self, message: Tensor) -> StateMap:
        """The inverse, for maps of as many heads, rows and columns as these."""
        numbers = self.state_numbers
        units = message.shape[0]
        state = message[:, :numbers].view(units, *self.state.shape[1:])
        if self.transition is None:
            return StateMap(state)
        return StateMap(state, message[:, numbers:].view(units, *self.transition.shape[1:]))


def take_heads(x: Tensor, heads: HeadRuns) -> Tensor:
    """Some heads of [U, N, H, ...]. By slices, since an index tensor would have to be copied to the device."""
    parts = [x[:, :, first:end] for first, end in heads]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def put_heads(x: Tensor, part: Tensor, heads: HeadRuns) -> None:
    """Write heads that `take_heads` took to their places in [N, H, ...]."""
    for (first, end), piece in zip(heads, part.split([end - first for first, end in heads], 1)):
        x[:, first:end] = piece
