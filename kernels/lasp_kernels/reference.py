"""Causal linear attention in plain PyTorch: the specification, and the path that runs on a CPU.

Per head, with a state S [K, V] that starts at the initial state::

    S_t = exp(log_decay_t) * S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

`recurrent_linear_attention` is that loop. `chunked_linear_attention` computes the same with matrix products
only, on two levels of one scan: a *segment* is a run of tokens that is walked serially, *tile* by tile, while
all segments advance together. `ChunkedSteps` has the steps one by one, because a runtime that splits the
sequence over ranks must send a state between the first and the last of them.

Within a tile, G_i is the log-decay summed from the tile's first token to token i, inclusive, and S the state
that enters the tile. With C tokens a tile::

    o_i  = q_i exp(G_i) S  +  sum_{j <= i} (q_i exp(G_i - G_j) k_j^T) v_j
    S'   = exp(G_C) S      +  sum_j (k_j exp(G_C - G_j))^T v_j

All exponents are <= 0, so no decay, however strong or long, can overflow. (Lightning Attention-2, arXiv
2401.04658, algorithm 1, with the decay of each form; backward is algorithm 2.)

Shapes: q [B, T, H*G, K]; k [B, T, H, K]; v [B, T, H, V]: G query heads read one state. States [N, H, K, V] where
N is B, or the number of packed sequences (then B = 1). `log_decay`, natural logarithm and <= 0: None, [H] (fixed
per head), [B, T, H] (per token), [B, T, H, K] (per token and channel). Inputs have any float dtype; states are
fp32, or fp64 when the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a state is kept: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token; differentiable by autograd. The oracle of every test, not a path for users.

    Returns o [B, T, H*G, V] in q's dtype and the final state [N, H, K, V]. Shapes: see the module.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        runs = [
            recurrent_linear_attention(
                q[:, a:b],
                k[:, a:b],
                v[:, a:b],
                log_decay=log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, a:b],
                scale=scale,
                initial_state=None if initial_state is None else initial_state[n : n + 1],
            )
            for n, (a, b) in enumerate(zip(bounds, bounds[1:]))
        ]
        return torch.cat([o for o, _ in runs], 1), torch.cat([s for _, s in runs])
    dtype = state_dtype(q.dtype)
    B, T, H, K = k.shape
    V, G = v.shape[-1], q.shape[2] // H
    state = q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        if log_decay is not None:
            log_factor = log_decay if log_decay.ndim == 1 else log_decay[:, t]  # [H], [B, H] or [B, H, K]
            log_factor = log_factor.unsqueeze(-1) if log_decay.ndim < 4 else log_factor
            state = log_factor.to(dtype).exp().unsqueeze(-1) * state
        state = state + k[:, t].to(dtype).unsqueeze(-1) * v[:, t].to(dtype).unsqueeze(-2)
        q_t = q[:, t].to(dtype).view(B, H, G, K) * scale
        outputs.append((q_t @ state).reshape(B, H * G, V))
    o = torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, H * G, V)
    return o.to(q.dtype), state


def chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segment_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """With matrix products; the same values and gradients as `recurrent_linear_attention`.

    `segment_length` is a number of tokens, a multiple of 64; by default about the square root of T tiles.
    """
    steps = ChunkedSteps(q, k, v, log_decay, cu_seqlens=cu_seqlens, segment_length=segment_length)
    segments = steps.segment_states(k, v, log_decay)
    states, final_state = steps.scan(segments, initial_state)
    return steps.outputs(q, k, v, log_decay, states, scale).to(q.dtype), final_state


def reference_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    """The stage after attention (see `launch.norm_gate`), in any dtype."""
    functions = {"none": lambda g: g, "sigmoid": torch.sigmoid, "silu": F.silu}
    if activation not in functions:
        raise ValueError(f"activation must be one of {', '.join(functions)}, got {activation!r}")
    x = x.flatten(-2)
    return F.rms_norm(x, x.shape[-1:], weight, eps) * functions[activation](gate)


def fold_maps(entering: Tensor, state: Tensor, log_decay: Tensor) -> Tensor:
    """Pass a state through maps one by one, S <- exp(log_decay_u) S + state_u: the arithmetic of `scan`, bit for bit.

    entering [N, H, K, V]; state [U, N, H, K, V] and log_decay [U, N, H, K | 1], on any strides.
    """
    for factor, local_state in zip(log_decay.exp().unsqueeze(-1), state):
        entering = factor * entering + local_state
    return entering


def _bounded(log_decay: Tensor) -> Tensor:
    """No stronger than a decay to 0, subnormal numbers included, so that sums keep digits and are finite."""
    numbers = torch.finfo(log_decay.dtype)
    return log_decay.clamp(min=math.log(numbers.tiny) + math.log(numbers.eps) - 1)


@dataclass(frozen=True)
class Segments:
    """What each segment does to a state that passes through it: S -> exp(log_total) * S + state."""

    state: Tensor  # [b, h, s, 1, K, V], from zero
    log_total: Tensor  # [b | 1, h | 1, s, 1, K | 1, 1]


@dataclass(frozen=True)
class _TileDecay:
    """The decays of one tile in every segment. `cumulative` is G of the module's docstring."""

    cumulative: Tensor  # [b | 1, h | 1, s | 1, 1, C, K | 1]
    log_total: Tensor  # [b | 1, h | 1, s | 1, 1, 1, K | 1]
    matrix: Tensor | None = None  # [b | 1, h | 1, s | 1, 1, C, C], where all tiles share it

    @property
    def entering(self) -> Tensor:
        """From the tile's start to each token."""
        return self.cumulative.exp()

    @property
    def leaving(self) -> Tensor:
        """From after each token to the tile's end; padding lies behind the end, hence the clamp."""
        return (self.log_total - self.cumulative).clamp(max=0).exp()

    @property
    def total(self) -> Tensor:
        """Over the whole tile, shaped to multiply a state [..., K, V]."""
        return self.log_total.mT.exp()

    @property
    def per_channel(self) -> bool:
        return self.cumulative.shape[-1] > 1

    def causal(self) -> Tensor:
        """exp(G_i - G_j) where j <= i, else 0. Masked before exp: above the diagonal it could overflow."""
        if self.matrix is not None:
            return self.matrix
        difference = self.cumulative - self.cumulative.mT
        future = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
        return difference.masked_fill(future, -math.inf).exp()


def _scores(q: Tensor, k: Tensor, decay: _TileDecay) -> Tensor:
    """P_ij = sum_K q_i exp(G_i - G_j) k_j for j <= i, else 0: [..., C, C].

    A decay per channel sits inside the sum over K, and exp(G_i) exp(-G_j) would overflow. So blocks are halved:
    between a left half and a right half, split at token m, exp(G_i - G_m) and exp(G_m - G_j) are both <= 1.
    """
    if not decay.per_channel:
        return (q @ k.mT) * decay.causal()
    scores = (q * k).sum(-1)[..., None, None]  # blocks of one token: [..., C, 1, 1]
    half = 1
    while half < q.shape[-2]:
        to_right, to_left = _half_decays(decay.cumulative, half)
        right, left = (
            q.unflatten(-2, (-1, 2, half))[..., 1, :, :],
            k.unflatten(-2, (-1, 2, half))[..., 0, :, :],
        )
        cross = (right * to_right) @ (left * to_left).mT
        blocks = scores.unflatten(-3, (-1, 2))
        upper = F.pad(blocks[..., 0, :, :], (0, half))
        scores = torch.cat([upper, torch.cat([cross, blocks[..., 1, :, :]], -1)], -2)
        half *= 2
    return scores.squeeze(-3)


def _half_decays(cumulative: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """For blocks of 2*half tokens: exp(G_i - G_m) of the right halves, exp(G_m - G_j) of the left halves."""
    blocks = cumulative.unflatten(-2, (-1, 2, half))
    left, right = blocks[..., 0, :, :], blocks[..., 1, :, :]
    middle = left[..., -1:, :]
    return (right - middle).exp(), (middle - left).exp()


def _scores_gradient(
    d_scores: Tensor, decay: _TileDecay, *, q: Tensor | None = None, k: Tensor | None = None
) -> Tensor:
    """The adjoint of `_scores`: with k given, the gradient of q; with q given, the gradient of k."""
    other = k if k is not None else q
    assert other is not None
    if not decay.per_channel:
        d_scores = d_scores * decay.causal()
        return d_scores @ other if k is not None else d_scores.mT @ other
    gradient = d_scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * other
    half = 1
    while half < other.shape[-2]:
        to_right, to_left = _half_decays(decay.cumulative, half)
        blocks = d_scores.unflatten(-2, (-1, 2, half)).unflatten(-1, (-1, 2, half))
        cross = blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # right rows, left columns
        halves = other.unflatten(-2, (-1, 2, half))
        if k is not None:
            part = to_right * (cross @ (halves[..., 0, :, :] * to_left))
            both = torch.stack([torch.zeros_like(part), part], -3)
        else:
            part = to_left * (cross.mT @ (halves[..., 1, :, :] * to_right))
            both = torch.stack([part, torch.zeros_like(part)], -3)
        gradient = gradient + both.flatten(-4, -2)
        half *= 2
    return gradient


class ChunkedSteps:
    """The steps of forward and backward on one rank, for inputs of one shape.

    Forward: `segment_states` -> `scan` -> `outputs`. Backward: `query_gradient` needs the scanned states of
    forward only; `segment_gradients` -> `scan(reverse=True)` -> `key_value_gradient`; `decay_gradient` last.
    `fold` gives what a whole run of tokens does to a state, which is what ranks exchange.
    Gradients are returned in the state's dtype.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        segment_length: int | None = None,
    ):
        self.batch, self.tokens, self.heads, self.key_dim = k.shape
        self.value_dim = v.shape[-1]
        self.groups = q.shape[2] // self.heads
        self.dtype = state_dtype(q.dtype)
        self.runs: list[tuple[int, int]] | None = None  # packed: first and last + 1 segment of each sequence
        self._index: Tensor | None = None  # packed: where each token lies among the padded tiles
        tiles = max(1, -(-self.tokens // TILE))
        if cu_seqlens is not None:
            lengths = self._pack(cu_seqlens, k.device)
        else:
            per_segment = segment_length // TILE if segment_length else -(-tiles // max(1, math.isqrt(tiles)))
            self._tiles_per_segment = per_segment
            self.tiles = min(per_segment, tiles)
            self.segments = -(-tiles // self.tiles)
            starts = torch.arange(self.segments * self.tiles, device=k.device) * TILE
            lengths = (self.tokens - starts).clamp(0, TILE)
        self._lengths = lengths.view(self.segments, self.tiles).T  # tokens in each tile: [n, s]

    def _pack(self, cu_seqlens: Sequence[int] | Tensor, device: torch.device) -> Tensor:
        """Lay packed sequences out so that each begins a tile; a segment is then one tile."""
        bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
        counts = [-(-(b - a) // TILE) for a, b in zip(bounds, bounds[1:])]
        first = [sum(counts[:n]) for n in range(len(counts) + 1)]
        self.runs = list(zip(first, first[1:]))
        self._tiles_per_segment = 1
        self.tiles, self.segments = 1, first[-1]
        offsets = torch.tensor(bounds, device=device)
        starts, lengths = offsets[:-1], offsets.diff()
        shift = torch.tensor(first[:-1], device=starts.device) * TILE - starts
        self._index = torch.arange(self.tokens, device=starts.device) + shift.repeat_interleave(lengths)
        in_run = torch.cat([torch.arange(c) for c in counts] or [torch.arange(0)]).to(starts.device)
        return (lengths.repeat_interleave(torch.tensor(counts, device=starts.device)) - in_run * TILE).clamp(0, TILE)

    def _tile(self, x: Tensor) -> Tensor:
        """[B, T, H*g, D] to [n, B, H, s, g, C, D] in the state's dtype, zeros behind the end."""
        x = x.to(self.dtype)
        padded = self.segments * self.tiles * TILE
        if self._index is None:
            x = F.pad(x, (0, 0, 0, 0, 0, padded - self.tokens))
        else:
            x = x.new_zeros(x.shape[0], padded, *x.shape[2:]).index_copy(1, self._index, x)
        groups = x.shape[2] // self.heads
        x = x.view(x.shape[0], self.segments, self.tiles, TILE, self.heads, groups, x.shape[-1])
        return x.permute(2, 0, 4, 1, 5, 3, 6)

    def _untile(self, tiles: list[Tensor]) -> Tensor:
        """The inverse of `_tile`, from a list over n."""
        x = torch.stack(tiles).permute(1, 3, 0, 5, 2, 4, 6).flatten(4, 5).flatten(1, 3)
        return x[:, : self.tokens] if self._index is None else x[:, self._index]

    def _tile_decays(self, log_decay: Tensor | None) -> list[_TileDecay]:
        device = self._lengths.device
        if log_decay is not None:
            log_decay = _bounded(log_decay.to(self.dtype))
        if log_decay is not None and log_decay.ndim > 1:
            if log_decay.ndim == 3:
                log_decay = log_decay.unsqueeze(-1)
            cumulative = self._tile(log_decay).cumsum(-2)
            return [_TileDecay(x, x[..., -1:, :]) for x in cumulative]
        rate = torch.zeros(1, dtype=self.dtype, device=device) if log_decay is None else log_decay
        rate = rate.view(1, -1, 1, 1, 1, 1)
        shared = _TileDecay(rate * torch.arange(1, TILE + 1, device=device).view(-1, 1), rate)
        matrix = shared.causal()
        return [_TileDecay(shared.cumulative, rate * n.view(-1, 1, 1, 1), matrix) for n in self._lengths]

    def zero_state(self) -> Tensor:
        """A state of zeros for every run: [N, H, K, V]."""
        rows = self.batch if self.runs is None else len(self.runs)
        shape = (rows, self.heads, self.key_dim, self.value_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self._lengths.device)

    @property
    def states_shape(self) -> tuple[int, ...]:
        """Of the states that `scan` returns."""
        return (self.batch, self.heads, self.segments, 1, self.key_dim, self.value_dim)

    @property
    def segment_length(self) -> int:
        """The most tokens that a segment may have, whatever the number of tokens here."""
        return self._tiles_per_segment * TILE

    def of_end(self, tokens: int) -> ChunkedSteps:
        """For the last `tokens` of the inputs alone, to fold them.

        Where these are all that a state remembers, their map is that of all tokens, and known earlier.
        """
        number = torch.empty((), dtype=self.dtype, device=self._lengths.device)
        q = number.expand(self.batch, tokens, self.heads * self.groups, self.key_dim)
        k = number.expand(self.batch, tokens, self.heads, self.key_dim)
        return ChunkedSteps(q, k, number.expand(*k.shape[:3], self.value_dim), None)

    def segment_states(self, k: Tensor, v: Tensor, log_decay: Tensor | None, *, needs_end: bool = True) -> Segments:
        """The state at the end of every segment, from zero. (`needs_end` is for a path that may leave the last out.)"""
        decays = self._tile_decays(log_decay)
        state = k.new_zeros(self.states_shape, dtype=self.dtype)
        for k_n, v_n, decay in zip(self._tile(k), self._tile(v), decays):
            state = decay.total * state + (k_n * decay.leaving).mT @ v_n
        return Segments(state, self._log_total(decays))

    def of_keys(self) -> ChunkedSteps:
        """For the gradients of k and v: these."""
        return self

    def segment_gradients(self, q: Tensor, do: Tensor, log_decay: Tensor | None, scale: float) -> Segments:
        """The gradient of the state before every segment, from zero behind it."""
        decays = self._tile_decays(log_decay)
        state = q.new_zeros(self.states_shape, dtype=self.dtype)
        for q_n, do_n, decay in _backwards(self._tile(q) * scale, self._tile(do), decays):
            state = decay.total * state + _group_sum((q_n * decay.entering).mT @ do_n)
        return Segments(state, self._log_total(decays))

    def _log_total(self, decays: list[_TileDecay]) -> Tensor:
        total = sum((decay.log_total for decay in decays), torch.zeros((), device=self._lengths.device))
        return total.mT.expand(-1, -1, self.segments, -1, -1, -1)

    def fold(self, segments: Segments, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """All segments of each run as one map: its local state [N, H, K, V] and log-decay [N, H, K | 1]."""
        _, local_state = self.scan(segments, None, reverse=reverse)
        total = segments.log_total.squeeze(-1).squeeze(-2).expand(self.batch, self.heads, -1, -1)
        if self.runs is None:
            return local_state, total.sum(2)
        return local_state, torch.stack([total[0, :, a:b].sum(1) for a, b in self.runs])

    def maps(self, segments: Segments, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """The segments one by one as maps, in the order in which a state passes through them; see `fold_maps`.

        state [U, N, H, K, V] and log_decay [U, N, H, K | 1]. Packed, only the run that reaches the end of the tokens
        (`reverse`: their beginning), since another rank can continue no other: N is 1, and U may be 0.
        """
        first, end = (0, self.segments) if self.runs is None else self.runs[0 if reverse else -1]
        state = segments.state[:, :, first:end].squeeze(3)
        log_decay = segments.log_total[:, :, first:end].squeeze(-1).squeeze(3)
        log_decay = log_decay.expand(self.batch, self.heads, -1, -1)
        if reverse:
            state, log_decay = state.flip(2), log_decay.flip(2)
        return state.movedim(2, 0), log_decay.movedim(2, 0)

    def scan(self, segments: Segments, entering: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """From the state that enters each run [N, H, K, V]: that which enters each segment, and the one behind all.

        Left fold in segment order; with `reverse` from the last segment to the first, for gradients.
        """
        factor = segments.log_total.exp()
        runs = [(0, self.segments)] if self.runs is None else self.runs
        rows = self.batch if self.runs is None else len(runs)
        if entering is None:
            entering = segments.state.new_zeros(rows, self.heads, self.key_dim, self.value_dim)
        states: list[Tensor] = [entering] * self.segments
        ends = []
        for state, (first, end) in zip(entering.to(self.dtype).unsqueeze(2).split(self.batch), runs):
            for s in reversed(range(first, end)) if reverse else range(first, end):
                states[s] = state
                state = factor[:, :, s] * state + segments.state[:, :, s]
            ends.append(state)
        return torch.stack(states, 2) if states else torch.zeros_like(segments.state), torch.cat(ends).squeeze(2)

    def outputs(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        states: Tensor,
        scale: float,
    ) -> Tensor:
        """o [B, T, H*G, V] from the state that enters every segment."""
        tiles = []
        decays = self._tile_decays(log_decay)
        for q_n, k_n, v_n, decay in zip(self._tile(q) * scale, self._tile(k), self._tile(v), decays):
            tiles.append(_scores(q_n, k_n, decay) @ v_n + (q_n * decay.entering) @ states)
            states = decay.total * states + (k_n * decay.leaving).mT @ v_n
        return self._untile(tiles)

    def query_gradient(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, states: Tensor, scale: float
    ) -> Tensor:
        """dq, from the states that `scan` gave in forward. (q is for a path that prepares `decay_gradient` here.)"""
        tiles = []
        decays = self._tile_decays(log_decay)
        for k_n, v_n, do_n, decay in zip(self._tile(k), self._tile(v), self._tile(do), decays):
            within = _scores_gradient(do_n @ v_n.mT, decay, k=k_n)
            tiles.append(within + decay.entering * (do_n @ states.mT))
            states = decay.total * states + (k_n * decay.leaving).mT @ v_n
        return self._untile(tiles) * scale

    def key_value_gradient(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        log_decay: Tensor | None,
        d_states: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """dk and dv, from the gradient of the state behind every segment."""
        dk, dv = [], []
        tiles = (
            self._tile(q) * scale,
            self._tile(k),
            self._tile(v),
            self._tile(do),
            self._tile_decays(log_decay),
        )
        for q_n, k_n, v_n, do_n, decay in _backwards(*tiles):
            within = _scores_gradient(do_n @ v_n.mT, decay, q=q_n)
            dk.append(_group_sum(within) + decay.leaving * (v_n @ d_states.mT))
            dv.append(_group_sum(_scores(q_n, k_n, decay).mT @ do_n) + (k_n * decay.leaving) @ d_states)
            d_states = decay.total * d_states + _group_sum((q_n * decay.entering).mT @ do_n)
        return self._untile(dk[::-1]), self._untile(dv[::-1])

    def decay_gradient(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        dq: Tensor,
        dk: Tensor,
        log_decay: Tensor,
        states: Tensor,
        d_states: Tensor,
        scale: float,
    ) -> Tensor:
        """d log_decay, in its shape. A token's decay scales all that crosses it, so within a tile::

            d log_decay_t = sum_{s >= t} (q_s * dq_s - k_s * dk_s) + <S', dS'>

        with S' and dS' at the tile's end, summed over K unless the decay is per channel. Tile by tile, since
        over a whole sequence the two terms of the sum would cancel to rounding noise.
        """
        decays = self._tile_decays(log_decay)
        q_tiles, k_tiles, v_tiles, do_tiles = self._tile(q), self._tile(k), self._tile(v), self._tile(do)
        ends = []
        for k_n, v_n, decay in zip(k_tiles, v_tiles, decays):
            states = decay.total * states + (k_n * decay.leaving).mT @ v_n
            ends.append(states)
        crossing = _group_sum(q_tiles * self._tile(dq)) - k_tiles * self._tile(dk)
        tiles = []
        for x, end, q_n, do_n, decay in _backwards(crossing, ends, q_tiles * scale, do_tiles, decays):
            boundary = (end * d_states).sum(-1).unsqueeze(-2)  # [b, h, s, 1, 1, K]
            if not decay.per_channel:
                x, boundary = x.sum(-1, keepdim=True), boundary.sum(-1, keepdim=True)
            tiles.append(x.flip(-2).cumsum(-2).flip(-2) + boundary)
            d_states = decay.total * d_states + _group_sum((q_n * decay.entering).mT @ do_n)
        gradient = self._untile(tiles[::-1])  # [B, T, H, K | 1]
        if log_decay.ndim == 4:
            return gradient.expand_as(log_decay)
        return gradient.squeeze(-1) if log_decay.ndim == 3 else gradient.sum((0, 1, 3))


def _group_sum(x: Tensor) -> Tensor:
    """Sum over the query heads that share a state."""
    return x.sum(-3, keepdim=True)


def _backwards(*tiles):
    """Zip from the last tile to the first."""
    return ([x[n] for x in tiles] for n in reversed(range(len(tiles[0]))))
