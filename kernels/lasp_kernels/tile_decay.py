"""What a decay does within one tile of every segment: one class for each kind, and the products of what is causal.

With G_i as in chunked.py, the log-decay from the tile's start to token i, inclusive; C tokens a tile. `scores` are
P_ij = sum_K q_i exp(G_i - G_j) k_j for j <= i, else 0, and the gradients are the adjoints of that.

G_i - G_j is never a difference of G, which after strong decays would have lost the digits of the weak ones behind them,
but a sum over the tokens that it spans. Nor is a gradient of a decay a difference of longer sums: the decay of token t
gets what each pair j < t <= i has, and nothing else (`decay_gradient`).

A token that is not finite spoils what depends on it and no more. So what is masked is left out, never multiplied by
zero, which would make NaN of it.
"""

from __future__ import annotations

import math
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
        """The log-decay over the whole tile: [b | 1, h | 1, s | 1, 1, 1, K | 1]."""

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
        """The gradient of the q of `scores`. What d_scores has above the diagonal is ignored, here and below."""
        ...

    def key_gradient(self, d_scores: Tensor, q: Tensor) -> Tensor:
        """The gradient of the k of `scores`."""
        ...

    def decay_gradient(self, d_scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The gradient of the log-decays [..., C, K | 1] that `scores` applies."""
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
        return causal_product(d_scores.tril(), k)

    def key_gradient(self, d_scores: Tensor, q: Tensor) -> Tensor:
        return causal_product(d_scores.tril().mT, q, reverse=True)

    def decay_gradient(self, d_scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        raise ValueError("there is no decay that could have a gradient")


@dataclass(frozen=True)
class _Decay:
    """What a decay per head, per token and per channel have in common."""

    log_total: Tensor
    entering: Tensor  # from the tile's start to each token: [b | 1, h | 1, s | 1, 1, C, K | 1]
    leaving: Tensor  # from behind each token to the tile's end
    total: Tensor  # [b | 1, h | 1, s | 1, 1, K | 1, 1], to multiply a state
    log_decay: Tensor | None = None  # like `entering`; None where the class needs it not

    def entered(self, x: Tensor) -> Tensor:
        return x * self.entering

    def left(self, x: Tensor) -> Tensor:
        return x * self.leaving

    def passed(self, state: Tensor) -> Tensor:
        return self.total * state


@dataclass(frozen=True)
class _ScalarDecay(_Decay):
    """A decay that is the same for all channels of a head, so that it stands outside of the products."""

    matrix: Tensor | None = None  # `causal`, where all tiles share it

    @cached_property
    def causal(self) -> Tensor:
        """exp(G_i - G_j) for j <= i, else 0."""
        if self.matrix is not None:
            return self.matrix
        assert self.log_decay is not None
        spanned = self.log_decay.expand(*self.log_decay.shape[:-1], self.log_decay.shape[-2])  # [query, key]
        return spanned.tril(-1).cumsum(-2).exp().tril()

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self._masked(q @ k.mT)

    def query_gradient(self, d_scores: Tensor, k: Tensor) -> Tensor:
        return causal_product(self._masked(d_scores), k)

    def key_gradient(self, d_scores: Tensor, q: Tensor) -> Tensor:
        return causal_product(self._masked(d_scores).mT, q, reverse=True)

    def decay_gradient(self, d_scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        later = sum_from(self._masked(d_scores * (q @ k.mT)).tril(-1))  # [t, j], over all i >= t
        return later.tril(-1).sum(-1, keepdim=True)

    def _masked(self, x: Tensor) -> Tensor:
        return (x * self.causal).tril()


@dataclass(frozen=True)
class _ChannelDecay(_Decay):
    """One for each of the K channels.

    It sits inside the sum over K, and exp(G_i) exp(-G_j) would overflow. So blocks are halved: between a left half and
    a right half, split at token m, exp(G_i - G_m) and exp(G_m - G_j) are both <= 1.
    """

    @cached_property
    def halves(self) -> list[tuple[Tensor, Tensor]]:
        """For blocks of 2, 4, ... tokens: exp(G_i - G_m) of the right halves, exp(G_m - G_j) of the left halves."""
        assert self.log_decay is not None
        found, half = [], 1
        while half < self.log_decay.shape[-2]:
            left, right = _halves(self.log_decay, half)
            found.append((right.cumsum(-2).exp(), _sum_behind(left).exp()))
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
        gradient = d_scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * k
        for level, (to_right, to_left) in enumerate(self.halves):
            part = to_right * (_cross(d_scores, 2**level) @ (_halves(k, 2**level)[0] * to_left))
            gradient = gradient + torch.stack([torch.zeros_like(part), part], -3).flatten(-4, -2)
        return gradient

    def key_gradient(self, d_scores: Tensor, q: Tensor) -> Tensor:
        gradient = d_scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * q
        for level, (to_right, to_left) in enumerate(self.halves):
            part = to_left * (_cross(d_scores, 2**level).mT @ (_halves(q, 2**level)[1] * to_right))
            gradient = gradient + torch.stack([part, torch.zeros_like(part)], -3).flatten(-4, -2)
        return gradient

    def decay_gradient(self, d_scores: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """All pairs of a block's right and left half cross the middle; from there each token loses some of them."""
        gradient = torch.zeros_like(self.entering)
        for level, (to_right, to_left) in enumerate(self.halves):
            half = 2**level
            cross, right, left = _cross(d_scores, half), _halves(q, half)[1] * to_right, _halves(k, half)[0] * to_left
            of_right, of_left = right * (cross @ left), left * (cross.mT @ right)
            both = torch.stack([sum_before(of_left), sum_from(of_right)], -3)
            gradient = gradient + both.flatten(-4, -2)
        return gradient


def no_decays(tiles: int) -> list[TileDecay]:
    """The decays of so many tiles without a decay."""
    return [_NoDecay()] * tiles


def head_decays(log_decay: Tensor, lengths: Tensor) -> list[TileDecay]:
    """The decays of log_decay [H], for tiles with these numbers of tokens [n, s]: a list over n."""
    rate = bounded(log_decay).view(1, -1, 1, 1, 1, 1)
    token = torch.arange(TILE, device=rate.device).view(-1, 1)
    lengths = lengths.view(len(lengths), 1, 1, -1, 1, 1, 1)
    log_totals, entering = rate * lengths, (rate * (token + 1)).exp()
    leaving = (rate * (lengths - 1 - token).clamp(min=0)).exp()  # padding lies behind the end, hence the clamp
    matrix = (rate * (token - token.mT).clamp(min=0)).exp().tril()
    tiles = zip(log_totals, leaving, log_totals.exp())
    return [_ScalarDecay(log_total, entering, leave, total, matrix=matrix) for log_total, leave, total in tiles]


def token_decay(log_decay: Tensor) -> TileDecay:
    """The decays of one tile from its bounded log-decays [..., C, K | 1]."""
    log_total = log_decay.sum(-2, keepdim=True)
    entering, leaving = log_decay.cumsum(-2).exp(), _sum_behind(log_decay).exp()
    kind = _ChannelDecay if log_decay.shape[-1] > 1 else _ScalarDecay
    return kind(log_total, entering, leaving, log_total.mT.exp(), log_decay)


def causal_product(weights: Tensor, x: Tensor, *, reverse: bool = False) -> Tensor:
    """weights [..., C, C] @ x [..., C, D], for weights that are 0 above the diagonal (`reverse`: below it).

    Of tokens that such a weight leaves out nothing comes into the product, NaN and Inf neither.
    """
    found = not_finite(x)
    if found is None:
        return weights @ x
    spoilt = torch.zeros_like(x).masked_fill(found, math.nan)
    return weights @ x.masked_fill(found, 0) + (sum_from(spoilt) if reverse else spoilt.cumsum(-2))


def not_finite(x: Tensor) -> Tensor | None:
    """Which elements are NaN or Inf; None where a CPU has seen that none is. On a GPU the host would wait for that."""
    if x.device.type == "cpu" and bool(x.sum().isfinite()):
        return None
    return ~x.isfinite()


def sum_from(x: Tensor) -> Tensor:
    """At each token the sum over it and those behind it; x [..., C, D], as below."""
    return x.flip(-2).cumsum(-2).flip(-2)


def sum_before(x: Tensor) -> Tensor:
    """At each token the sum over those before it."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _sum_behind(x: Tensor) -> Tensor:
    """At each token the sum over those behind it."""
    return sum_from(F.pad(x[..., 1:, :], (0, 0, 0, 1)))


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The left and the right halves of blocks of 2 * half tokens: [..., blocks, half, D] each."""
    blocks = x.unflatten(-2, (-1, 2, half))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _cross(scores: Tensor, half: int) -> Tensor:
    """What the right half of each block of 2 * half tokens has of its left half: [..., blocks, half, half]."""
    blocks = scores.unflatten(-2, (-1, 2, half)).unflatten(-1, (-1, 2, half))
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def bounded(log_decay: Tensor) -> Tensor:
    """No stronger than a decay to 0, subnormal numbers included, so that sums are finite."""
    numbers = torch.finfo(log_decay.dtype)
    return log_decay.clamp(min=math.log(numbers.tiny) + math.log(numbers.eps) - 1)
