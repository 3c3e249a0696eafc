"""What a decay does within one tile of every segment, for `chunked.ChunkedSteps`: one class for each kind.

With G_i as in chunked.py, the log-decay from the tile's start to token i, inclusive; C tokens a tile. `scores` are
P_ij = sum_K q_i exp(G_i - G_j) k_j for j <= i, else 0, and the two gradients are the adjoints of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp_kernels.operands import TILE


class TileDecay(Protocol):
    """The decays of one tile in every segment. x is of tokens [..., C, D], a state is [..., K, V]."""

    @property
    def log_total(self) -> Tensor | None:
        """Over the whole tile: [b | 1, h | 1, s | 1, 1, 1, K | 1]."""

    def entered(self, x: Tensor) -> Tensor:
        """Each token times the decay from the tile's start to it."""
        ...

    def left(self, x: Tensor) -> Tensor:
        """Each token times the decay from behind it to the tile's end."""
        ...

    def passed(self, state: Tensor) -> Tensor:
        """A state behind the whole tile."""
        ...

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """P [..., C, C]."""
        ...

    def query_gradient(self, d_scores: Tensor, k: Tensor) -> Tensor:
        """Of the q of `scores`."""
        ...

    def key_gradient(self, d_scores: Tensor, q: Tensor) -> Tensor:
        """Of the k of `scores`."""
        ...


class _NoDecay:
    """Nothing fades: nothing is multiplied."""

    log_total = None

    def entered(self, x: Tensor) -> Tensor:
        return x

    def left(self, x: Tensor) -> Tensor:
        return x

    def passed(self, state: Tensor) -> Tensor:
        return state

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT).tril()

    def query_gradient(self, d_scores: Tensor, k: Tensor) -> Tensor:
        return d_scores.tril() @ k

    def key_gradient(self, d_scores: Tensor, q: Tensor) -> Tensor:
        return d_scores.tril().mT @ q


@dataclass(frozen=True)
class _Decay:
    """What a decay per head, per token and per channel have in common."""

    cumulative: Tensor  # G: [b | 1, h | 1, s | 1, 1, C, K | 1]
    log_total: Tensor
    entering: Tensor  # like G
    leaving: Tensor
    total: Tensor  # [b | 1, h | 1, s | 1, 1, K | 1, 1], to multiply a state

    def entered(self, x: Tensor) -> Tensor:
        return x * self.entering

    def left(self, x: Tensor) -> Tensor:
        return x * self.leaving

    def passed(self, state: Tensor) -> Tensor:
        return self.total * state


@dataclass(frozen=True)
class _ScalarDecay(_Decay):
    """The same for all channels of a head, so that it stands outside of the products."""

    matrix: Tensor | None = None  # `_causal`, where all tiles share it

    @cached_property
    def causal(self) -> Tensor:
        """exp(G_i - G_j) for j <= i, else 0."""
        return _causal(self.cumulative) if self.matrix is None else self.matrix

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT) * self.causal

    def query_gradient(self, d_scores: Tensor, k: Tensor) -> Tensor:
        return (d_scores * self.causal) @ k

    def key_gradient(self, d_scores: Tensor, q: Tensor) -> Tensor:
        return (d_scores * self.causal).mT @ q


@dataclass(frozen=True)
class _ChannelDecay(_Decay):
    """One for each of the K channels.

    It sits inside the sum over K, and exp(G_i) exp(-G_j) would overflow. So blocks are halved: between a left half and
    a right half, split at token m, exp(G_i - G_m) and exp(G_m - G_j) are both <= 1.
    """

    @cached_property
    def halves(self) -> list[tuple[Tensor, Tensor]]:
        """For blocks of 2, 4, ... tokens: exp(G_i - G_m) of the right halves, exp(G_m - G_j) of the left halves."""
        found, half = [], 1
        while half < self.cumulative.shape[-2]:
            left, right = _halves(self.cumulative, half)
            middle = left[..., -1:, :]
            found.append(((right - middle).exp(), (middle - left).exp()))
            half *= 2
        return found

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """P [..., C, C] from blocks of 1, 2, 4, ... tokens: a level adds what each right half sees of its left half."""
        scores = (q * k).sum(-1)[..., None, None]  # blocks of one token: [..., C, 1, 1]
        for level, (to_right, to_left) in enumerate(self.halves):
            half = 2**level
            left, right = _halves(k, half)[0], _halves(q, half)[1]
            cross = (right * to_right) @ (left * to_left).mT
            blocks = scores.unflatten(-3, (-1, 2))
            upper = F.pad(blocks[..., 0, :, :], (0, half))
            scores = torch.cat([upper, torch.cat([cross, blocks[..., 1, :, :]], -1)], -2)
        return scores.squeeze(-3)

    def query_gradient(self, d_scores: Tensor, k: Tensor) -> Tensor:
        def of_level(cross: Tensor, half: int, to_right: Tensor, to_left: Tensor) -> tuple[Tensor, ...]:
            part = to_right * (cross @ (_halves(k, half)[0] * to_left))
            return torch.zeros_like(part), part

        return self._gradient(d_scores, k, of_level)

    def key_gradient(self, d_scores: Tensor, q: Tensor) -> Tensor:
        def of_level(cross: Tensor, half: int, to_right: Tensor, to_left: Tensor) -> tuple[Tensor, ...]:
            part = to_left * (cross.mT @ (_halves(q, half)[1] * to_right))
            return part, torch.zeros_like(part)

        return self._gradient(d_scores, q, of_level)

    def _gradient(self, d_scores: Tensor, other: Tensor, of_level: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        """The diagonal, and from each level the left and the right half of its blocks."""
        gradient = d_scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * other
        for level, (to_right, to_left) in enumerate(self.halves):
            half = 2**level
            blocks = d_scores.unflatten(-2, (-1, 2, half)).unflatten(-1, (-1, 2, half))
            cross = blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # right rows, left columns
            both = torch.stack(of_level(cross, half, to_right, to_left), -3)
            gradient = gradient + both.flatten(-4, -2)
        return gradient


def no_decays(tiles: int) -> list[TileDecay]:
    """For so many tiles."""
    return [_NoDecay()] * tiles


def head_decays(log_decay: Tensor, lengths: Tensor) -> list[TileDecay]:
    """Of log_decay [H], for tiles with these numbers of tokens [n, s]: a list over n."""
    rate = bounded(log_decay).view(1, -1, 1, 1, 1, 1)
    cumulative = rate * torch.arange(1, TILE + 1, device=rate.device).view(-1, 1)
    entering, matrix = cumulative.exp(), _causal(cumulative)
    log_totals = rate * lengths.view(len(lengths), 1, 1, -1, 1, 1, 1)
    totals, leaving = log_totals.exp(), _leaving(cumulative, log_totals)
    tiles = zip(log_totals, leaving, totals)
    return [_ScalarDecay(cumulative, log_total, entering, leave, total, matrix) for log_total, leave, total in tiles]


def token_decays(log_decay: Tensor) -> list[TileDecay]:
    """Of bounded log-decays in tiles, [n, b, h, s, 1, C, K | 1]: a list over n."""
    cumulative = log_decay.cumsum(-2)
    log_totals = cumulative[..., -1:, :]
    parts = (cumulative, log_totals, cumulative.exp(), _leaving(cumulative, log_totals), log_totals.mT.exp())
    kind = _ChannelDecay if log_decay.shape[-1] > 1 else _ScalarDecay
    return [kind(*tile) for tile in zip(*parts)]


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The left and the right halves of blocks of 2 * half tokens: [..., blocks, half, D] each."""
    blocks = x.unflatten(-2, (-1, 2, half))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _leaving(cumulative: Tensor, log_total: Tensor) -> Tensor:
    """From behind each token to the tile's end; padding lies behind the end, hence the clamp."""
    return (log_total - cumulative).clamp(max=0).exp()


def _causal(cumulative: Tensor) -> Tensor:
    """exp(G_i - G_j) where j <= i, else 0. Masked before exp: above the diagonal it could overflow."""
    difference = cumulative - cumulative.mT
    future = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
    return difference.masked_fill(future, -math.inf).exp()


def bounded(log_decay: Tensor) -> Tensor:
    """No stronger than a decay to 0, subnormal numbers included, so that sums keep digits and are finite."""
    numbers = torch.finfo(log_decay.dtype)
    return log_decay.clamp(min=math.log(numbers.tiny) + math.log(numbers.eps) - 1)
