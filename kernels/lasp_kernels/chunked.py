"""Causal linear attention with matrix products, in plain PyTorch: the path of a CPU, of fp64 and of what has no kernel.

The same values as the recurrence of reference.py, on two levels of one scan: a *segment* is a run of tokens that is
walked serially, *tile* by tile, while all segments advance together. `ChunkedSteps` has the steps one by one, because
a runtime that splits the sequence must send a state between the first and the last of them.

Within a tile, G_i is the log-decay summed from the tile's first token to token i, inclusive, and S the state
that enters the tile. With C tokens a tile::

    o_i  = q_i exp(G_i) S  +  sum_{j <= i} (q_i exp(G_i - G_j) k_j^T) v_j
    S'   = exp(G_C) S      +  sum_j (k_j exp(G_C - G_j))^T v_j

All exponents are <= 0, so no decay, however strong or long, can overflow. (Lightning Attention-2, arXiv
2401.04658, algorithm 1, with the decay of each form; backward is algorithm 2.)

A normaliser is a column more of v, of ones, and its denominator that of o: what is here V is then one more than of x.

A tile of all segments is a tensor [b, h, s, g, C, D]: batch, head of k, segment, query head of the group, token, dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp_kernels.operands import TILE, Operands
from lasp_kernels.reference import state_dtype
from lasp_kernels.tile_decay import (
    TileDecay,
    bounded,
    causal_product,
    head_decays,
    no_decays,
    sum_before,
    sum_from,
    token_decay,
)


def chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segment_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same values and gradients as `recurrent_linear_attention`; differentiable by autograd.

    `segment_length` is a number of tokens, a multiple of 64; by default about the square root of T tiles.
    """
    x = Operands(q, k, v, log_decay, scale, normalize)
    steps = ChunkedSteps(x, cu_seqlens=cu_seqlens, segment_length=segment_length)
    states, final_state = steps.scan(steps.local_maps(x), initial_state)
    return steps.outputs(x, states)[0].to(q.dtype), final_state


@dataclass(frozen=True)
class SegmentMaps:
    """What each segment does to a state that passes through it: S -> exp(log_total) * S + state; None is no decay."""

    state: Tensor  # [b, h, s, 1, K, V], from zero
    log_total: Tensor | None  # [b | 1, h | 1, s, 1, K | 1, 1]


@dataclass(frozen=True)
class _Tiling:
    """Where tokens lie among padded tiles: every run begins a segment, which has `tiles` tiles."""

    tiles: int  # of a segment
    segments: int
    runs: tuple[tuple[int, int], ...] | None = None  # packed: first and last + 1 segment of each sequence
    bounds: tuple[int, ...] | None = None  # packed: first token of each sequence, and the end

    @classmethod
    def of(cls, tokens: int, bounds: tuple[int, ...] | None, tiles: int) -> _Tiling:
        """The tiling into segments of at most so many tiles."""
        lengths = [tokens] if bounds is None else [b - a for a, b in zip(bounds, bounds[1:])]
        tiles = max(1, min(tiles, -(-max(lengths, default=0) // TILE)))
        counts = [-(-n // (TILE * tiles)) for n in lengths]
        if bounds is None:
            return cls(tiles, max(1, counts[0]))
        first = [sum(counts[:n]) for n in range(len(counts) + 1)]
        return cls(tiles, first[-1], tuple(zip(first, first[1:])), bounds)

    @property
    def padded(self) -> int:
        """The number of tokens, padding included."""
        return self.segments * self.tiles * TILE

    def index(self, device: torch.device) -> Tensor:
        """The padded place of each token of packed sequences."""
        assert self.bounds is not None
        assert self.runs is not None
        offsets = torch.tensor(self.bounds, device=device)
        first = torch.tensor([first for first, _ in self.runs], device=device) * (self.tiles * TILE)
        shift = (first - offsets[:-1]).repeat_interleave(offsets.diff())
        return torch.arange(self.bounds[-1], device=device) + shift

    def lengths(self, tokens: int, device: torch.device) -> Tensor:
        """Tokens of each tile of a segment: [n, s]."""
        per_segment = self.tiles * TILE
        if self.bounds is None or self.runs is None:
            left = tokens - torch.arange(self.segments, device=device) * per_segment
        else:
            ends = zip(self.runs, self.bounds, self.bounds[1:])
            numbers = [
                n for (low, high), a, b in ends for n in range(b - a, b - a - (high - low) * per_segment, -per_segment)
            ]
            left = torch.tensor(numbers, dtype=torch.int64, device=device)
        return (left - torch.arange(self.tiles, device=device).view(-1, 1) * TILE).clamp(0, TILE)


class ChunkedSteps:
    """The steps of forward and backward on one device, for inputs of one shape; see `dispatch.Steps`.

    Gradients are returned in the state's dtype. Where heads of v share one of q and k, these are repeated here.
    """

    def __init__(
        self,
        x: Operands,
        *,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        segment_length: int | None = None,
        decay_gradient: bool = False,
    ):
        self.batch, self.tokens, _, self.key_dim = x.k.shape
        self.heads, self.share, self.value_dim = x.heads, x.heads // x.k.shape[2], x.state_columns
        self.groups, self._normalize = x.output_heads // x.heads, x.normalize
        self.dtype, self.device = state_dtype(x.k.dtype), x.k.device
        bounds = None
        if cu_seqlens is not None:
            bounds = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
        if segment_length:
            per_segment = segment_length // TILE
        else:
            tiles = max(1, -(-self.tokens // TILE))
            per_segment = 1 if bounds else -(-tiles // max(1, math.isqrt(tiles)))
        self.segment_length = per_segment * TILE  # the most tokens of a segment, whatever the number of tokens here
        self._tiling = _Tiling.of(self.tokens, bounds, per_segment)
        self._decay_gradient = decay_gradient
        self._index: Tensor | None = None
        self._decays: tuple[Tensor | None, list[TileDecay]] | None = None  # of one pass: log_decay, and what it makes

    @property
    def _rows(self) -> int:
        """N, the number of states."""
        return self.batch if self._tiling.runs is None else len(self._tiling.runs)

    def zero_state(self) -> Tensor:
        """A state of zeros for every run: [N, H, K, V]."""
        return torch.zeros(self._rows, self.heads, self.key_dim, self.value_dim, dtype=self.dtype, device=self.device)

    @property
    def states_shape(self) -> tuple[int, ...]:
        """The shape of the states that `scan` returns."""
        return (self.batch, self.heads, self._tiling.segments, 1, self.key_dim, self.value_dim)

    def of_end(self, tokens: int) -> ChunkedSteps:
        """The steps for the last `tokens` of the inputs alone."""
        number = torch.empty((), dtype=self.dtype, device=self.device)
        q = number.expand(self.batch, tokens, self.heads * self.groups, self.key_dim)
        k = number.expand(self.batch, tokens, self.heads, self.key_dim)
        v = number.expand(*k.shape[:3], self.value_dim - self._normalize)
        return ChunkedSteps(Operands(q, k, v, normalize=self._normalize))

    def of_keys(self) -> ChunkedSteps:
        """The steps for the gradients of k and v: these."""
        return self

    def _tile(self, x: Tensor) -> Tensor:
        """[B, T, H*g, D] to [n, B, H, s, g, C, D] in the state's dtype, zeros behind the end.

        In one dense order, however x lies in memory, so that products have the same bits for the same numbers.
        """
        x, tiling = x.to(self.dtype), self._tiling
        if x.shape[2] < self.heads:  # of a head of q or k that heads of v share
            x = x.repeat_interleave(self.heads // x.shape[2], 2)
        if tiling.bounds is not None:
            if self._index is None:
                self._index = tiling.index(self.device)
            x = x.new_zeros(x.shape[0], tiling.padded, *x.shape[2:]).index_copy(1, self._index, x)
        elif tiling.padded > self.tokens:
            x = F.pad(x, (0, 0, 0, 0, 0, tiling.padded - self.tokens))
        groups = x.shape[2] // self.heads
        x = x.view(x.shape[0], tiling.segments, tiling.tiles, TILE, self.heads, groups, x.shape[-1])
        return x.permute(2, 0, 4, 1, 5, 3, 6).contiguous()

    def _untile(self, tiles: list[Tensor]) -> Tensor:
        """The inverse of `_tile`, from a list over n."""
        x = torch.stack(tiles).permute(1, 3, 0, 5, 2, 4, 6).flatten(4, 5).flatten(1, 3)
        return x[:, : self.tokens] if self._index is None else x[:, self._index]

    def _queries(self, x: Operands) -> Tensor:
        """Tiles of q; with a normaliser the scale comes later."""
        return self._tile(x.q) * (1.0 if self._normalize else x.scale)

    def _values(self, x: Operands) -> Tensor:
        """Tiles of v, with the column of a normaliser."""
        return self._tile(F.pad(x.v, (0, 1), value=1.0) if self._normalize else x.v)

    def _of_group(self, of_values: Tensor) -> Tensor:
        """The gradient of q or k from the parts of all heads of v: the sum over the heads that share one."""
        return of_values if self.share == 1 else of_values.unflatten(2, (-1, self.share)).sum(3)

    def _tile_decays(self, log_decay: Tensor | None, *, last: bool = False) -> list[TileDecay]:
        """The decays of tile n of every segment, for all n; kept from the first step of a pass to the `last`."""
        if self._decays is None or self._decays[0] is not log_decay:
            self._decays = (log_decay, self._make_decays(log_decay))
        decays = self._decays[1]
        if last:
            self._decays = None
        return decays

    def _make_decays(self, log_decay: Tensor | None) -> list[TileDecay]:
        if log_decay is None:
            return no_decays(self._tiling.tiles)
        log_decay = bounded(log_decay.to(self.dtype))
        if log_decay.ndim == 1:
            return head_decays(log_decay, self._tiling.lengths(self.tokens, self.device))
        tiles = self._tile(log_decay.unsqueeze(-1) if log_decay.ndim == 3 else log_decay)
        return [token_decay(tile) for tile in tiles]

    def local_maps(self, x: Operands, *, needs_end: bool = True) -> SegmentMaps:
        """The state at the end of every segment, from zero. (`needs_end` is for a path that may leave the last out.)"""
        decays = self._tile_decays(x.log_decay)
        k, v = self._tile(x.k), self._values(x)
        state = decays[0].left(k[0]).mT @ v[0]
        for k_n, v_n, decay in zip(k[1:], v[1:], decays[1:]):
            state = _advance(state, k_n, v_n, decay)
        return SegmentMaps(state, self._log_total(decays))

    def gradient_maps(self, x: Operands, do: Tensor) -> SegmentMaps:
        """The gradient of the state before every segment, from zero behind it."""
        decays = self._tile_decays(x.log_decay)
        q, do = self._queries(x), self._tile(do)
        state = _group_sum(decays[-1].entered(q[-1]).mT @ do[-1])
        for q_n, do_n, decay in _backwards(q[:-1], do[:-1], decays[:-1]):
            state = _retreat(state, q_n, do_n, decay)
        return SegmentMaps(state, self._log_total(decays))

    def _log_total(self, decays: list[TileDecay]) -> Tensor | None:
        log_totals = [decay.log_total for decay in decays if decay.log_total is not None]
        if not log_totals:
            return None
        return sum(log_totals[1:], log_totals[0]).mT.expand(-1, -1, self._tiling.segments, -1, -1, -1)

    def run_map(self, maps: SegmentMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """All segments of each run as one map: its local state [N, H, K, V] and log-decay [N, H, K | 1]."""
        _, local_state = self.scan(maps, None, reverse=reverse)
        if maps.log_total is None:
            return local_state, None
        total = self._log_decays(maps.log_total)
        if self._tiling.runs is None:
            return local_state, total.sum(2)
        return local_state, torch.stack([total[0, :, a:b].sum(1) for a, b in self._tiling.runs])

    def _log_decays(self, log_total: Tensor) -> Tensor:
        """Log-decays in the shape that maps have, [B, H, s, K | 1]."""
        return log_total.squeeze(-1).squeeze(3).expand(self.batch, self.heads, -1, -1)

    def border_maps(self, maps: SegmentMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """The segments one by one as maps, in the order in which a state passes through them; see `fold_maps`.

        state [U, N, H, K, V] and log_decay [U, N, H, K | 1]. Packed, only the run that reaches the end of the tokens
        (`reverse`: their beginning), since tokens elsewhere can continue no other: N is 1, and U may be 0.
        """
        first, end = self._runs[0 if reverse else -1]

        def of_border(of_segments: Tensor) -> Tensor:
            part = of_segments[:, :, first:end]
            return (part.flip(2) if reverse else part).movedim(2, 0)

        log_decay = None if maps.log_total is None else of_border(self._log_decays(maps.log_total))
        return of_border(maps.state.squeeze(3)), log_decay

    @property
    def _runs(self) -> tuple[tuple[int, int], ...]:
        return ((0, self._tiling.segments),) if self._tiling.runs is None else self._tiling.runs

    def scan(self, maps: SegmentMaps, entering: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """From the state that enters each run [N, H, K, V]: that which enters each segment, and the one behind all.

        Left fold in segment order; with `reverse` from the last segment to the first, for gradients.
        """
        factor = None if maps.log_total is None else maps.log_total.exp()
        entering = self.zero_state() if entering is None else entering.to(self.dtype)
        states: list[Tensor] = [entering] * self._tiling.segments
        ends = []
        for state, (first, end) in zip(entering.unsqueeze(2).split(self.batch), self._runs):
            for s in reversed(range(first, end)) if reverse else range(first, end):
                states[s] = state
                state = (state if factor is None else factor[:, :, s] * state) + maps.state[:, :, s]
            ends.append(state)
        return torch.stack(states, 2) if states else torch.zeros_like(maps.state), torch.cat(ends).squeeze(2)

    def outputs(self, x: Operands, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """o [B, T, H*G, V] from the state that enters every segment; with a normaliser also the denominators."""
        decays = self._tile_decays(x.log_decay, last=True)
        q, k, v = self._queries(x), self._tile(x.k), self._values(x)
        tiles = []
        for q_n, k_n, v_n, decay, state in zip(q, k, v, decays, _states_before(states, k, v, decays)):
            tiles.append(causal_product(decay.scores(q_n, k_n), v_n) + decay.entered(q_n) @ state)
        o = self._untile(tiles)
        if not self._normalize:
            return o, None
        denominators = o[..., -1:]
        return o[..., :-1] / denominators * x.scale, denominators.squeeze(-1).mT.contiguous()

    def output_gradient(self, x: Operands, do: Tensor, o: Tensor, denominators: Tensor) -> Tensor:
        """What the steps of backward take as `do` where there is a normaliser: with the column that it adds."""
        do, o, denominators = do.to(self.dtype), o.to(self.dtype), denominators.mT.unsqueeze(-1)
        return torch.cat([do * x.scale, -(do * o).sum(-1, keepdim=True)], -1) / denominators

    def query_gradient(self, x: Operands, do: Tensor, states: Tensor) -> Tensor:
        """dq, from the states that `scan` gave in forward."""
        decays = self._tile_decays(x.log_decay)
        k, v = self._tile(x.k), self._values(x)
        tiles = []
        for k_n, v_n, do_n, decay, state in zip(k, v, self._tile(do), decays, _states_before(states, k, v, decays)):
            within = decay.query_gradient(do_n @ v_n.mT, k_n)
            tiles.append(within + decay.entered(do_n @ state.mT))
        return self._of_group(self._untile(tiles)) * (1.0 if self._normalize else x.scale)

    def key_value_gradient(self, x: Operands, do: Tensor, d_states: Tensor) -> tuple[Tensor, Tensor]:
        """dk and dv, from the gradient of the state behind every segment."""
        decays = self._tile_decays(x.log_decay, last=not self._decay_gradient)
        q, k, v, do = self._queries(x), self._tile(x.k), self._values(x), self._tile(do)
        behind = _gradients_behind(d_states, q, do, decays)
        dk, dv = [], []
        for (q_n, k_n, v_n, do_n, decay), d_state in zip(_backwards(q, k, v, do, decays), behind):
            within = decay.key_gradient(do_n @ v_n.mT, q_n)
            dk.append(_group_sum(within) + decay.left(v_n @ d_state.mT))
            written = causal_product(decay.scores(q_n, k_n).mT, do_n, reverse=True)
            dv.append(_group_sum(written) + decay.left(k_n) @ d_state)
        of_values = self._untile(dv[::-1])
        return self._of_group(self._untile(dk[::-1])), of_values[..., :-1] if self._normalize else of_values

    def decay_gradient(
        self, x: Operands, gradients: tuple[Tensor, Tensor, Tensor], states: Tensor, d_states: Tensor
    ) -> Tensor:
        """d log_decay, in its shape. A token's decay scales what crosses it: within a tile, where q sees k (P) or the
        state before the tile (S), and where the state behind the tile (S') has k or S::

            d log_decay_t = sum_{j < t <= i} dP_ij P_ij + sum_{i >= t} q_i . (exp(G_i) S do_i)
                            + sum_{j < t} k_j . (exp(G_C - G_j) dS' v_j) + <exp(G_C) S, dS'>

        summed over K unless the decay is per channel. The gradients dq and dk would be enough (the sum of q dq - k dk
        over the tokens from t on), but in that sum these terms cancel to rounding noise.
        """
        assert x.log_decay is not None
        decays = self._tile_decays(x.log_decay, last=True)
        per_channel = x.log_decay.ndim == 4
        q, k, v, do = self._queries(x), self._tile(x.k), self._values(x), self._tile(gradients[0])
        before = list(_states_before(states, k, v, decays))
        behind = _gradients_behind(d_states, q, do, decays)
        tiles = []
        for (q_n, k_n, v_n, do_n, decay, state), d_state in zip(_backwards(q, k, v, do, decays, before), behind):
            read = _group_sum(q_n * decay.entered(do_n @ state.mT))
            written = k_n * decay.left(v_n @ d_state.mT)
            passed = (decay.passed(state) * d_state).sum(-1).unsqueeze(-2)  # [b, h, s, 1, 1, K]
            if not per_channel:
                read, written, passed = (part.sum(-1, keepdim=True) for part in (read, written, passed))
            within = _group_sum(decay.decay_gradient(do_n @ v_n.mT, q_n, k_n))
            tiles.append(within + sum_from(read) + sum_before(written) + passed)
        gradient = self._untile(tiles[::-1])  # [B, T, H, K | 1]
        if per_channel:
            return gradient.expand_as(x.log_decay)
        return gradient.squeeze(-1) if x.log_decay.ndim == 3 else gradient.sum((0, 1, 3))


def _advance(state: Tensor, k: Tensor, v: Tensor, decay: TileDecay) -> Tensor:
    """The state behind a tile, from the one before it."""
    return decay.passed(state) + decay.left(k).mT @ v


def _retreat(d_state: Tensor, q: Tensor, do: Tensor, decay: TileDecay) -> Tensor:
    """The gradient of the state before a tile, from that of the one behind it."""
    return decay.passed(d_state) + _group_sum(decay.entered(q).mT @ do)


def _states_before(state: Tensor, k: Tensor, v: Tensor, decays: list[TileDecay]) -> Iterator[Tensor]:
    """The state before each tile, from that before the first."""
    yield state
    for k_n, v_n, decay in zip(k[:-1], v[:-1], decays):
        state = _advance(state, k_n, v_n, decay)
        yield state


def _gradients_behind(d_state: Tensor, q: Tensor, do: Tensor, decays: list[TileDecay]) -> Iterator[Tensor]:
    """The gradient of the state behind each tile from the last to the first, from that behind the last."""
    yield d_state
    for q_n, do_n, decay in _backwards(q[1:], do[1:], decays[1:]):
        d_state = _retreat(d_state, q_n, do_n, decay)
        yield d_state


def _group_sum(x: Tensor) -> Tensor:
    """Sum over the query heads that share a state."""
    return x if x.shape[-3] == 1 else x.sum(-3, keepdim=True)


def _backwards(*tiles):
    """Zip from the last tile to the first."""
    return zip(*(x[::-1] if isinstance(x, list) else x.unbind()[::-1] for x in tiles))
