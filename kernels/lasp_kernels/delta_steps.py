"""The delta rule with matrix products, in plain PyTorch on any device: the steps of a runtime that splits sequences.

What it computes, and its shapes, are in delta.py. *Segments* are walked *tile* by tile while all segments advance
together, as in `chunked.ChunkedSteps`.

In a tile of C tokens let G_i be the log-decay summed from its first token to token i, inclusive, S the state that
enters it, and::

    K^ = k exp(G)    K_ = k exp(G_C - G)    Q^ = scale q exp(G)    P_ij = scale sum_K q_i exp(G_i - G_j) k_j  (j <= i)
    B_ij = beta_i sum_K k_i exp(G_i - G_j) k_j  (j < i)            T = (I + B)^-1

    U = T beta (v - K^ S)        o = Q^ S + P U        S' = exp(G_C) S + K_^T U

U is what the tokens write, each after it has read what those before it wrote. S' is affine in S, so a run of tokens
is a map S -> transition @ S + state, with a matrix [K, K] where linear attention has a factor: ranks exchange those.
The gradient dS of a state passes a tile the other way, and what it does there is the transposed map::

    Y = T^T (P^T do + K_ dS')    dS = exp(G_C) dS' + Q^^T do - (beta K^)^T Y
    dv = beta Y                  dP = do U^T                  dB = -strictly_lower(Y U^T)

The gradients of q, k, beta and log_decay follow from these (`_Tile.gradients`).

All exponents are sums of log-decays, hence <= 0: no decay overflows. No sum is a difference of longer ones, which
after a strong decay would have lost the digits of the weak ones behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp_kernels.delta import DeltaOperands, check_delta_inputs, expand_heads, host_bounds
from lasp_kernels.folding import fold
from lasp_kernels.operands import TILE
from lasp_kernels.reference import state_dtype
from lasp_kernels.tile_decay import bounded, causal_product, no_decays, not_finite, sum_before, sum_from, token_decay


@dataclass(frozen=True)
class DeltaMaps:
    """What each segment does to a state that passes through it: S -> transition @ S + state."""

    state: Tensor  # [segments, B, H, K, V]
    transition: Tensor  # [segments, B, H, K, K]


def chunked_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segment_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same values and gradients as `recurrent_delta_rule`, by matrix products.

    `segment_length` is a number of tokens, a multiple of 64; by default about the square root of T tiles.
    Raises `ValueError` or `TypeError` for arguments that do not fit.
    """
    check_delta_inputs(q, k, v, beta, log_decay, segment_length)
    x = DeltaOperands(q, k, v, beta, log_decay, scale)
    steps = DeltaSteps(x, cu_seqlens=cu_seqlens, segment_length=segment_length)
    if initial_state is not None and initial_state.shape != (expected := steps.zero_state().shape):
        raise ValueError(
            f"initial_state must have shape [N, H, K, V] = {tuple(expected)}, got {tuple(initial_state.shape)}"
        )
    states, final_state = steps.scan(steps.local_maps(x), initial_state)
    return steps.outputs(x, states).to(q.dtype), final_state


class _Tile:
    """One tile of every segment, and what in it depends on no state; names and formulas: see the module.

    Tensors [s, B, H, C, ...]; q is scaled, beta [..., 1]. Behind the end of a segment all of them are zeros, so that
    a state passes unchanged.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None):
        self.q, self.k, self.v, self.beta = q, k, v, beta
        self.decay = no_decays(1)[0] if log_decay is None else token_decay(log_decay)

    @cached_property
    def query(self) -> Tensor:
        """Q^."""
        return self.decay.entered(self.q)

    @cached_property
    def read(self) -> Tensor:
        """K^."""
        return self.decay.entered(self.k)

    @cached_property
    def write(self) -> Tensor:
        """K_."""
        return self.decay.left(self.k)

    @cached_property
    def scores(self) -> Tensor:
        """P."""
        return self.decay.scores(self.q, self.k)

    @cached_property
    def keys(self) -> Tensor:
        """B without its beta."""
        return self.decay.scores(self.k, self.k).tril(-1)

    @cached_property
    def inverse(self) -> Tensor:
        """T."""
        eye = torch.eye(self.k.shape[-2], dtype=self.k.dtype, device=self.k.device).expand_as(self.keys)
        matrix = (self.beta * self.keys).tril(-1)
        found = not_finite(matrix)
        if found is None:
            return torch.linalg.solve_triangular(matrix, eye, upper=False, unitriangular=True)
        # The solver would multiply zeros with what is not finite, which spoils T_ij if it lies between row and column.
        spoilt = torch.zeros_like(matrix).masked_fill(found, math.nan)
        inverse = torch.linalg.solve_triangular(matrix.masked_fill(found, 0), eye, upper=False, unitriangular=True)
        return inverse + sum_from(spoilt.mT).mT.cumsum(-2)

    def walk(self, state: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """U, and the state behind the tile."""
        written = causal_product(self.inverse, self.beta * (v - self.read @ state))
        return written, self.decay.passed(state) + self.write.mT @ written

    def walk_back(self, do: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor]:
        """Y, and the gradient of the state before the tile, from that of the state behind it."""
        d_written = causal_product(self.scores.mT, do, reverse=True) + self.write @ d_state
        d_values = causal_product(self.inverse.mT, d_written, reverse=True)
        before = self.decay.passed(d_state) + self.query.mT @ do - self.read.mT @ (self.beta * d_values)
        return d_values, before

    def query_gradient(self, state: Tensor, written: Tensor, do: Tensor) -> Tensor:
        """The gradient of the scaled q; `state` enters the tile, `written` is U."""
        return self.decay.entered(do @ state.mT) + self.decay.query_gradient(do @ written.mT, self.k)

    def gradients(self, state: Tensor, do: Tensor, d_state: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of k, v, beta and, if there is one, the log-decay per channel; and of the state before the tile."""
        decay = self.decay
        written, _ = self.walk(state, self.v)
        d_values, before = self.walk_back(do, d_state)
        d_scores = do @ written.mT
        d_keys = -(d_values @ written.mT).tril(-1)  # dB
        d_read = -decay.entered(d_values @ state.mT)  # what crosses the tile's borders, here and in the next line
        d_write = decay.left(written @ d_state.mT)
        d_beta = (d_values * (self.v - self.read @ state)).sum(-1, keepdim=True)
        d_beta = d_beta + (d_keys * self.keys).tril(-1).sum(-1, keepdim=True)
        dk = self.beta * (decay.query_gradient(d_keys, self.k) + d_read) + d_write
        dk = dk + decay.key_gradient(d_scores, self.q) + decay.key_gradient(d_keys, self.beta * self.k)
        found = [dk, self.beta * d_values, d_beta]
        if decay.log_total is not None:
            read = self.q * decay.entered(do @ state.mT) + self.beta * self.k * d_read
            found.append(self._decay_gradient(d_scores, d_keys, read, self.k * d_write, state, d_state))
        return found, before

    def _decay_gradient(
        self, d_scores: Tensor, d_keys: Tensor, read: Tensor, written: Tensor, state: Tensor, d_state: Tensor
    ) -> Tensor:
        """Of the log-decay. As in `ChunkedSteps.decay_gradient`, where what crosses the tile's borders are products
        with their gradients: `read` of what is read from the state before, `written` of what reaches the one behind."""
        within = self.decay.decay_gradient(d_scores, self.q, self.k)
        within = within + self.decay.decay_gradient(d_keys, self.beta * self.k, self.k)
        crossing = sum_from(read) + sum_before(written) + (self.decay.passed(state) * d_state).sum(-1).unsqueeze(-2)
        return within + (crossing if within.shape[-1] > 1 else crossing.sum(-1, keepdim=True))


class DeltaSteps:
    """The steps of forward and backward on one rank, for inputs of one shape.

    Forward: `local_maps` -> `scan` -> `outputs`. Backward: `query_gradient` needs the scanned states of forward only;
    `gradient_maps` -> `scan(reverse=True)` -> `gradients`. `run_map` and `border_maps` give what ranks exchange.
    Outputs and gradients are returned in the state's dtype.

    `segment_length`, a multiple of 64, fixes where segments begin in a run, and so the bits of its results, whatever
    is packed beside it. Raises ValueError where `cu_seqlens` does not go from 0 to T in steps >= 0, with B = 1.
    """

    def __init__(
        self,
        x: DeltaOperands,
        *,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        segment_length: int | None = None,
    ):
        self.batch, self.tokens, self.heads, self.value_dim = x.v.shape
        self.key_dim, self.groups = x.k.shape[-1], x.v.shape[2] // x.k.shape[2]
        self.dtype, self.device = state_dtype(x.v.dtype), x.v.device
        self.packed = cu_seqlens is not None
        bounds = [0, self.tokens] if cu_seqlens is None else host_bounds(cu_seqlens, self.batch, self.tokens)
        lengths = [end - start for start, end in zip(bounds, bounds[1:])]
        tiles = [-(-length // TILE) if self.packed else max(1, -(-length // TILE)) for length in lengths]
        per_segment = segment_length // TILE if segment_length else _tiles_per_segment(tiles)
        self.segment_length = per_segment * TILE
        self.tiles = max(1, min(per_segment, max(tiles, default=0)))  # of each segment; no more than any run fills
        first = [0]
        for count in tiles:
            first.append(first[-1] - (-count // self.tiles))
        self.runs = list(zip(first, first[1:]))  # first and last + 1 segment of each
        self.segments = first[-1]
        self._places = self._token_places(bounds) if self.packed else None
        self._orders = {reverse: self._order(reverse=reverse) for reverse in (False, True)}

    def _token_places(self, bounds: list[int]) -> Tensor:
        """Where each packed token lies among the padded segments."""
        offsets = torch.tensor(bounds)
        starts = torch.tensor([first * self.tiles * TILE for first, _ in self.runs], dtype=torch.int64)
        shift = (starts - offsets[:-1]).repeat_interleave(offsets.diff())
        return (torch.arange(self.tokens) + shift).to(self.device)

    def _order(self, *, reverse: bool) -> list[tuple[Tensor, Tensor]]:
        """For each step of a scan: the runs that have a segment left, and that segment of each."""
        order = []
        for step in range(max((end - first for first, end in self.runs), default=0)):
            runs = [n for n, (first, end) in enumerate(self.runs) if first + step < end]
            segments = [self.runs[n][1] - 1 - step if reverse else self.runs[n][0] + step for n in runs]
            order.append((torch.tensor(runs, device=self.device), torch.tensor(segments, device=self.device)))
        return order

    def _tile(self, x: Tensor) -> Tensor:
        """[B, T, H, D] to [n, s, B, H, C, D] in the state's dtype, zeros behind the end of each segment."""
        x = expand_heads(x.to(self.dtype), self.heads)
        padded = self.segments * self.tiles * TILE
        if self._places is None:
            x = F.pad(x, (0, 0, 0, 0, 0, padded - self.tokens))
        else:
            x = x.new_zeros(self.batch, padded, *x.shape[2:]).index_copy(1, self._places, x)
        x = x.view(self.batch, self.segments, self.tiles, TILE, self.heads, x.shape[-1])
        return x.permute(2, 1, 0, 4, 3, 5).contiguous()

    def _untile(self, tiles: Sequence[Tensor]) -> Tensor:
        """The inverse of `_tile`, from a list over n."""
        x = torch.stack(list(tiles)).permute(2, 1, 0, 4, 3, 5).flatten(1, 3)
        return x[:, : self.tokens] if self._places is None else x[:, self._places]

    def _operands(self, x: DeltaOperands) -> list[Tensor]:
        """What `_Tile` takes, of all tiles: [n, ...]."""
        q, k, v, beta = (self._tile(y) for y in (x.q, x.k, x.v, x.beta.unsqueeze(-1)))
        if x.log_decay is None:
            return [q * x.scale, k, v, beta]
        log_decay = x.log_decay if x.log_decay.ndim == 4 else x.log_decay.unsqueeze(-1)
        return [q * x.scale, k, v, beta, self._tile(bounded(log_decay.to(self.dtype)))]

    @property
    def states_shape(self) -> tuple[int, ...]:
        """The shape of the states that `scan` returns."""
        return (self.segments, self.batch, self.heads, self.key_dim, self.value_dim)

    @property
    def transitions_shape(self) -> tuple[int, ...]:
        """The shape of the matrices of all segments."""
        return (*self.states_shape[:-1], self.key_dim)

    def zero_state(self) -> Tensor:
        """A state of zeros for every run: [N, H, K, V]."""
        rows = len(self.runs) if self.packed else self.batch
        return self._zeros(rows, *self.states_shape[2:])

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _identity(self, *rows: int) -> Tensor:
        return torch.eye(self.key_dim, dtype=self.dtype, device=self.device).expand(*rows, self.heads, -1, -1)

    def local_maps(self, x: DeltaOperands) -> DeltaMaps:
        """What each segment does to a state. Its transition is walked as more columns: from I, with v = 0."""
        states = torch.cat([self._zeros(*self.states_shape), self._identity(self.segments, self.batch)], -1)
        for tile in _tiles(self._operands(x)):
            _, states = tile.walk(states, F.pad(tile.v, (0, self.key_dim)))
        return DeltaMaps(*states.split([self.value_dim, self.key_dim], -1))

    def gradient_maps(self, x: DeltaOperands, do: Tensor, transition: Tensor) -> DeltaMaps:
        """What each segment does to the gradient of a state; `transition` is that of `local_maps`."""
        d_states = self._zeros(*self.states_shape)
        for tile, do_n in zip(_tiles(self._operands(x), reverse=True), self._tile(do).flip(0)):
            _, d_states = tile.walk_back(do_n, d_states)
        return DeltaMaps(d_states, transition.mT)

    def run_map(self, maps: DeltaMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """All segments of each run as one map: its state [N, H, K, V] and transition [N, H, K, K]."""
        zero = self.zero_state()
        columns = DeltaMaps(F.pad(maps.state, (0, self.key_dim)), maps.transition)
        _, end = self.scan(columns, torch.cat([zero, self._identity(len(zero))], -1), reverse=reverse)
        state, transition = end.split([self.value_dim, self.key_dim], -1)
        return state, transition

    def border_maps(self, maps: DeltaMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """The segments one by one as maps, in the order in which a state passes through them.

        state [U, N, H, K, V] and transition [U, N, H, K, K]. Packed, only the run that reaches the end of the tokens
        (`reverse`: their beginning), since another rank can continue no other: N is 1, and U may be 0.
        """
        first, end = self.runs[0 if reverse else -1] if self.runs else (0, 0)
        state, transition = maps.state[first:end], maps.transition[first:end]
        return (state.flip(0), transition.flip(0)) if reverse else (state, transition)

    def scan(self, maps: DeltaMaps, entering: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """From the state that enters each run [N, H, K, V]: that which enters each segment, and the one behind all.

        Left fold in segment order, by `folding.fold` as between ranks; with `reverse` from the last segment to the
        first, for gradients. Runs advance together.
        """
        entering = self.zero_state() if entering is None else entering.to(self.dtype)
        state = entering.unflatten(0, (len(self.runs), self.batch))  # [runs, B, H, K, V]
        states, places = [maps.state[:0]], [torch.empty(0, dtype=torch.int64, device=self.device)]
        for runs, segments in self._orders[reverse]:
            states.append(state[runs])
            places.append(segments)
            of_rows = (x[segments].flatten(0, 1).unsqueeze(0) for x in (maps.state, maps.transition))
            passed = fold(states[-1].flatten(0, 1), *of_rows)
            state = state.index_copy(0, runs, passed.view_as(states[-1]))
        return torch.cat(states)[torch.cat(places).argsort()], state.flatten(0, 1)

    def outputs(self, x: DeltaOperands, states: Tensor) -> Tensor:
        """o [B, T, H, V] from the state that enters every segment."""
        outputs = []
        for tile in _tiles(self._operands(x)):
            written, behind = tile.walk(states, tile.v)
            outputs.append(tile.query @ states + causal_product(tile.scores, written))
            states = behind
        return self._untile(outputs)

    def query_gradient(self, x: DeltaOperands, do: Tensor, states: Tensor) -> Tensor:
        """dq, from the states that `scan` gave in forward."""
        gradients = []
        for tile, do_n in zip(_tiles(self._operands(x)), self._tile(do)):
            written, behind = tile.walk(states, tile.v)
            gradients.append(tile.query_gradient(states, written, do_n))
            states = behind
        return self._group_sum(self._untile(gradients)) * x.scale

    def gradients(
        self, x: DeltaOperands, do: Tensor, states: Tensor, d_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dk, dv, dbeta and d log_decay, in the shapes of those (None without decay).

        `states` enter the segments, as `scan` gave them in forward; `d_states` are the gradients of those behind them.
        """
        operands, before = self._operands(x), []
        for tile in _tiles(operands):
            before.append(states)
            _, states = tile.walk(states, tile.v)
        found = []
        for tile, state, do_n in zip(_tiles(operands, reverse=True), reversed(before), self._tile(do).flip(0)):
            gradients, d_states = tile.gradients(state, do_n, d_states)
            found.append(gradients)
        dk, dv, d_beta, *d_decay = (self._untile(tiles) for tiles in zip(*reversed(found)))
        if x.log_decay is None:
            return self._group_sum(dk), dv, d_beta.squeeze(-1), None
        return self._group_sum(dk), dv, d_beta.squeeze(-1), d_decay[0].reshape(x.log_decay.shape)

    def _group_sum(self, x: Tensor) -> Tensor:
        """Sum over the heads of v that share a head of q and k."""
        return x if self.groups == 1 else x.unflatten(2, (-1, self.groups)).sum(3)


def _tiles(operands: list[Tensor], *, reverse: bool = False) -> Iterator[_Tile]:
    """Made one by one, so that the intermediate results of one tile live at a time."""
    numbers = range(len(operands[0]))
    return (_Tile(*[x[n] for x in operands]) for n in (reversed(numbers) if reverse else numbers))


def _tiles_per_segment(tiles: list[int]) -> int:
    """About the square root of the tiles of a run: as many steps in a walk as in a scan.

    By the average run, so that the padding of short runs never outgrows the tokens.
    """
    average = sum(tiles) // max(1, sum(count > 0 for count in tiles))
    return max(1, -(-average // max(1, math.isqrt(average))))
