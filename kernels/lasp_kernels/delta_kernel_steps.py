"""The steps of the delta rule, as delta_steps.py has them in PyTorch, on the Triton kernels of delta_kernels.py.

Inputs are fp32 or bf16, K and V up to 256. Results are the same bits every time.
M and P are made in forward and again in backward, U in backward only: what is kept between the two are the states at
the borders of segments, and their matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp_kernels import delta_launches as launches
from lasp_kernels.delta import DeltaOperands
from lasp_kernels.launch import Placed, has_tma, layout, processors
from lasp_kernels.plan import DELTA, MAX_DIM, Sizes
from lasp_kernels.shared import Key, Shared, shared_by
from lasp_kernels.steps import KernelSteps

SMALL = 2**25  # numbers of a tensor: of 16 heads of 128 those of 16,384 tokens


def by_tiles(key: Key) -> bool:
    """Whether the gradients of a decay per channel are made tile by tile (delta_tiles.py), and not by walks.

    Only in calls for which both were timed and compared with fp64 on a card
    (bench/results/2026-11-27_delta_tiles_1xH200.md): who compares more may widen it. fp32 has tiles of 16 tokens, so
    that the states of all, and their gradients, take 8 KiB a token and head of 128 x 128. A card without TMA may have
    too little shared memory for tiles of 256 x 256. Tests replace this function where small calls are to go this way.
    """
    sizes = key.sizes
    return sizes.has_tma and key.dtype == torch.bfloat16 and sizes.key_dim == sizes.value_dim == 128


@dataclass(frozen=True)
class DeltaKernelMaps:
    """What each segment does to a state that passes through it: S -> transition @ S + local."""

    local: Tensor  # [B, H, segments, K, V] fp32
    transition: Tensor  # [B, H, segments, K, K] fp32
    transposed: bool = False  # the map's matrix is the transposed one


@dataclass
class Gates:
    """With a decay per channel what the walks read in place of q and k; see delta_channel.py."""

    hats: tuple[Tensor, ...]  # Q^, K^ and K_
    sides: tuple[Tensor, ...]  # q>, k> and k<
    factors: tuple[Tensor, ...] | tuple[None, None]  # of q> and k>, and of k<
    steps: Tensor
    total: Tensor
    flag: Tensor
    log_decay: Placed


@dataclass
class Prepared:
    """What the walks of a pass read beside `x`; see delta_kernels.py."""

    x: DeltaOperands
    q: Placed  # these three as kernels take them
    k: Placed
    v: Placed
    m: Tensor
    p: Tensor
    factors: Tensor
    walked: tuple[Placed, Placed, Tensor | None]  # queries and keys of the walks, and keys to write with, if others
    gates: Gates | None = None

    @property
    def total(self) -> Tensor | None:
        """The decays of the tiles, per channel."""
        return None if self.gates is None else self.gates.total


class DeltaKernelSteps(KernelSteps):
    """The steps of forward and backward on one device, for inputs of one shape; see `delta_steps.DeltaSteps`.

    `states` and `d_states` are buffers as in state.py. Of `query_gradient` the numbers are there after `gradients`,
    which must follow in the same backward: both come from one kernel. Outputs and gradients have the dtype of the
    inputs, those of beta and log_decay fp32. Without `ends` the state behind the last token (reversed: before the
    first) is not wanted, and `scan` returns None for it.
    """

    @classmethod
    def of(
        cls,
        x: DeltaOperands,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        segment_length: int | None = None,
        ends: bool = True,
    ) -> DeltaKernelSteps:
        """For these inputs. A `cu_seqlens` tensor on a GPU is waited for; a tuple is not."""
        if (reason := unsupported(x)) is not None:
            raise ValueError(f"the Triton kernels of the delta rule take {reason}")
        bounds = None
        if cu_seqlens is not None:
            bounds = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
        batch, tokens, heads, value_dim = map(int, x.v.shape)  # plain numbers, also under torch.compile
        device, dtype = x.k.device, x.k.dtype
        sizes = Sizes(
            batch,
            tokens,
            heads,
            1,
            int(x.k.shape[3]),
            value_dim,
            x.k.element_size(),
            DELTA,
            _token_stride(x),
            processors(device),
            has_tma(device),
            bounds,
            segment_length,
            decay_gradient=x.log_decay is not None,
        )
        tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        decay_dtype = None if x.log_decay is None else x.log_decay.dtype
        return cls(shared_by(Key(sizes, dtype, decay_dtype, device, tf32)), heads // int(x.k.shape[2]), ends)

    def __init__(self, shared: Shared, groups: int, ends: bool):
        super().__init__(shared)
        self._ends = ends
        self._shapes = launches.shapes_of(shared)
        self._groups = groups  # heads of v that share one of k
        self._made: Prepared | None = None  # of one pass
        self._written: tuple[Tensor, Tensor, Tensor] | None = None  # dq, U and the borders' states, for `gradients`

    @property
    def transitions_shape(self) -> tuple[int, ...]:
        """Of the matrices of all segments."""
        return self._shapes.transition

    def _empty(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self._shared.device)

    def _several(self, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """So many of one shape; of small ones one is made and cut, since each takes the host some microseconds. For
        large ones the allocator finds room more easily one by one."""
        if math.prod(shape) <= SMALL:
            return self._empty((number, *shape), dtype).unbind()
        return tuple([self._empty(shape, dtype) for _ in range(number)])

    def _prepared(self, x: DeltaOperands, *, reverse: bool = False) -> Prepared:
        """What an earlier step of the pass has made, or made now; `reverse`: for the gradients, too."""
        made = self._made
        if made is not None and (made.x is x or all(a is b for a, b in zip(made.x[:5], x[:5]))):
            made.x = x
            return made
        shared, shapes, log_decay = self._shared, self._shapes, x.log_decay
        q, k, v = self._placed(x.q), self._placed(x.k), self._placed(x.v)
        m, p = self._empty(shapes.squares, shared.dtype), self._empty(shapes.squares, shared.dtype)
        if log_decay is not None and log_decay.ndim == 4:
            factors = self._empty((1, *shapes.rows))
            gates = self._gates(x.scale, q, k, self._placed(log_decay), reverse)
            walked = self._placed(gates.hats[0]), self._placed(gates.hats[1]), gates.hats[2]
            self._made = made = Prepared(x, q, k, v, m, p, factors, walked, gates)
            self._inner(x, made, gates)
            return made
        g_at = None if log_decay is None else layout(log_decay)
        factors = self._empty((1 if log_decay is None else 6, *shapes.rows))
        self._made = made = Prepared(x, q, k, v, m, p, factors, (q, k, None))
        key = ("prepare", self._groups, x.scale, q[1], k[1], g_at, layout(x.beta), x.beta.dtype)
        launch = shared.launches.get(key) or shared.keep(key, launches.prepare_launch(shared, *key[1:-1]))
        launch(q[0], k[0], log_decay, x.beta, m, p, factors, shared.table)
        return made

    def _gates(self, scale: float, queries: Placed, keys: Placed, decays: Placed, reverse: bool) -> Gates:
        shared, of_tiles, key_dim = self._shared, self._shapes.tiles, self.plan.sizes.key_dim
        tokens = self._several(8 if reverse else 6, shared.key_shape, shared.dtype)
        gates = Gates(
            tokens[:3],
            tokens[3:6],
            tokens[6:] if reverse else (None, None),
            self._empty((*of_tiles, 5, self.plan.walk_tile // 16, key_dim)),
            self._empty((*of_tiles, key_dim)),
            self._empty(of_tiles, torch.int32),
            decays,
        )
        (q, q_at), (k, k_at), (g, g_at) = queries, keys, decays
        key = ("gate", self._groups, scale, q_at, k_at, g_at, reverse)
        launch = shared.launches.get(key) or shared.keep(key, launches.gate_launch(shared, *key[1:-1]))
        tensors = (*gates.hats, *gates.sides, *gates.factors, gates.steps, gates.total, gates.flag)
        launch(q, k, g, *tensors, shared.table)
        return gates

    def _inner(self, x: DeltaOperands, made: Prepared, gates: Gates) -> None:
        """M and P, with a decay per channel."""
        shared = self._shared
        side = self._empty((2, *self._shapes.rows, 16))
        (q, q_at), (k, k_at), (g, g_at) = made.q, made.k, gates.log_decay
        key = ("flagged", self._groups, x.scale, q_at, k_at, g_at)
        launch = shared.launches.get(key) or shared.keep(key, launches.flagged_launch(shared, *key[1:]))
        launch(q, k, g, gates.flag, side, shared.table)
        key = ("inner", layout(x.beta), x.beta.dtype)
        launch = shared.launches.get(key) or shared.keep(key, launches.inner_launch(shared, key[1]))
        launch(*gates.sides, gates.steps, gates.flag, side, x.beta, made.m, made.p, made.factors, shared.table)

    def local_maps(self, x: DeltaOperands) -> DeltaKernelMaps:
        """What each segment does to a state. Its matrix is walked as more columns: from I, with v = 0."""
        self._made = None
        local, transition = self._empty(self._shapes.local), self._empty(self._shapes.transition)
        self._walk("maps", x, None, None, None, None, local, transition)
        return DeltaKernelMaps(local, transition)

    def gradient_maps(self, x: DeltaOperands, do: Tensor, transition: Tensor) -> DeltaKernelMaps:
        """What each segment does to the gradient of a state; `transition` is that of `local_maps`."""
        self._made = None
        self._prepared(x, reverse=True)
        local = self._empty(self._shapes.local)
        self._reverse_walk(x, do, None, None, None, None, None, local)
        return DeltaKernelMaps(local, transition, transposed=True)

    def outputs(self, x: DeltaOperands, states: Tensor) -> Tensor:
        """o [B, T, H, V] from the states at the borders of the segments."""
        o = self._empty(self._shared.value_shape, self._shared.dtype)
        self._walk("outputs", x, states, o, None, None, None, None)
        self._made = None
        return o

    def query_gradient(self, x: DeltaOperands, do: Tensor, states: Tensor) -> Tensor:
        """dq, from the states that `scan` gave in forward; filled by `gradients`."""
        u, (kept, tiles) = self._empty(self._shared.value_shape, self._shared.dtype), self._kept_states(x)
        self._walk("writes", x, states, None, u, None if tiles else kept, None, None, kept if tiles else None)
        dq = self._empty(x.q.shape, self._shared.dtype)
        self._written = dq, u, kept
        return dq

    def gradients(
        self, x: DeltaOperands, do: Tensor, states: Tensor, d_states: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dk, dv, dbeta and d log_decay, in the shapes of those (None without decay); and the numbers of dq.

        `d_states` are the gradients of the states at the borders of the segments.
        """
        if self._written is None:
            raise ValueError("the gradients of the delta rule need `query_gradient` before them")
        shared = self._shared
        (dq, u, kept), self._written = self._written, None
        dv, (d_kept, tiles) = self._empty(shared.value_shape, shared.dtype), self._kept_states(x)
        d_beta = self._empty(self._shapes.d_beta)
        self._reverse_walk(x, do, d_states, u, dv, d_beta, None if tiles else d_kept, None, d_kept if tiles else None)
        dk = self._empty(x.k.shape, shared.dtype)
        # Where heads of v share one of k, each has its own gradient of it, and these are summed.
        own = (dq, dk) if self._groups == 1 else (self._empty(shared.key_shape), self._empty(shared.key_shape))
        if tiles:
            d_decay = self._tile_gradients(x, do, u, dv, kept, d_kept, own)
        elif _per_channel(x):
            d_decay = self._channel_gradients(x, do, u, dv, kept, d_kept, own)
        else:
            d_decay = self._token_gradients(x, do, u, dv, kept, d_kept, own)
        self._made = None
        if self._groups > 1:
            for whole, of_each in zip((dq, dk), own):
                whole.copy_(of_each.unflatten(2, (-1, self._groups)).sum(3))
        return dk, dv, d_beta.sum(0).transpose(1, 2), d_decay

    def _token_gradients(
        self, x: DeltaOperands, do: Tensor, u: Tensor, dv: Tensor, borders: Tensor, d_borders: Tensor, out: tuple
    ) -> Tensor | None:
        """dq and dk into `out`, and the gradient of a decay per token if there is one."""
        shared, sizes = self._shared, self.plan.sizes
        blocks, rows = launches.key_blocks(shared), (sizes.batch, sizes.heads, sizes.tokens)
        query_rows = key_rows = None
        if x.log_decay is not None:
            query_rows, key_rows = self._empty((2, 2 * blocks, *rows)), self._empty((blocks, *rows))
        self._gradient_walk(x, do, u, dv, borders, (*out, query_rows), of_keys=False)
        self._gradient_walk(x, do, u, dv, d_borders, (out[1], key_rows), of_keys=True)
        if x.log_decay is None:
            return None
        d_decay = self._empty(x.log_decay.shape)
        key = ("decay", layout(x.log_decay))
        launch = shared.launches.get(key) or shared.keep(key, launches.decay_launch(shared, key[1]))
        launch(x.log_decay, borders, d_borders, query_rows, key_rows, d_decay, shared.table)
        return d_decay

    def _kept_states(self, x: DeltaOperands) -> tuple[Tensor, bool]:
        """For what a walk keeps of its states: those at the borders of stretches, or (True) at those of all tiles."""
        if not (_per_channel(x) and by_tiles(self._shared.key)):
            return self._empty(self._shapes.borders), False
        return self._empty(self._shapes.states, self._shared.dtype), True

    def _tile_gradients(
        self, x: DeltaOperands, do: Tensor, u: Tensor, dv: Tensor, states: Tensor, d_states: Tensor, out: tuple
    ) -> Tensor:
        """As `_channel_gradients`, tile by tile, from the states of all."""
        shared, made, (dq, dk) = self._shared, self._prepared(x), out
        gates, (q, q_at), (k, k_at), (do, do_at) = made.gates, made.q, made.k, self._placed(do)
        assert gates is not None
        g, g_at = gates.log_decay
        d_decay = self._empty(shared.key_shape)
        key = ("flagged gradient", self._groups, x.scale, q_at, k_at, g_at, do_at, "tiles")
        launch = shared.launches.get(key) or shared.keep(key, launches.flagged_gradient_launch(shared, *key[1:-1]))
        launch(q, k, g, u, do, dv, gates.flag, dq, dk, None, d_decay, shared.table)
        key = ("tile gradient", self._groups > 1, x.scale, do_at)
        launch = shared.launches.get(key) or shared.keep(key, launches.tile_gradient_launch(shared, *key[2:]))
        tiles = (gates.steps, gates.total, gates.flag, u, do, dv, states, d_states)
        launch(*gates.sides, *gates.factors, *tiles, dq, dk, d_decay, shared.table)
        return d_decay

    def _channel_gradients(
        self, x: DeltaOperands, do: Tensor, u: Tensor, dv: Tensor, borders: Tensor, d_borders: Tensor, out: tuple
    ) -> Tensor:
        """dq and dk into `out`, and the gradient of a decay per channel."""
        shared, made, (dq, dk) = self._shared, self._prepared(x), out
        gates, (q, q_at), (k, k_at), (do, do_at) = made.gates, made.q, made.k, self._placed(do)
        assert gates is not None
        g, g_at = gates.log_decay
        write, sums = self._empty(dk.shape, dk.dtype), self._empty((2, *shared.key_shape))
        from_state, d_decay = self._empty((2, *gates.total.shape)), self._empty(shared.key_shape)
        key = ("flagged gradient", self._groups, x.scale, q_at, k_at, g_at, do_at)
        launch = shared.launches.get(key) or shared.keep(key, launches.flagged_gradient_launch(shared, *key[1:]))
        launch(q, k, g, u, do, dv, gates.flag, dq, dk, write, sums, shared.table)
        (later, earlier), (queries, keys, written) = gates.factors, gates.hats
        tiles = (gates.steps, gates.total, gates.flag, u, do, dv, borders)
        # The dtype of what is written depends on the groups, as in all of these launches.
        key = ("channel gradient", self._groups > 1, False, x.scale, do_at)
        launch = shared.launches.get(key) or shared.keep(key, launches.channel_gradient_launch(shared, *key[2:]))
        launch(*gates.sides, written, later, *tiles, dq, dk, sums, from_state, shared.table)
        key = ("channel gradient", self._groups > 1, True, x.scale, do_at)
        launch = shared.launches.get(key) or shared.keep(key, launches.channel_gradient_launch(shared, *key[2:]))
        out = (d_borders, dk, write, sums, from_state, d_decay)
        launch(*gates.sides, queries, keys, earlier, *tiles, *out, shared.table)
        return d_decay

    def _walk(
        self,
        kind: str,
        x: DeltaOperands,
        states: Tensor | None,
        o: Tensor | None,
        u: Tensor | None,
        borders: Tensor | None,
        local: Tensor | None,
        transition: Tensor | None,
        of_tiles: Tensor | None = None,
    ) -> None:
        shared, made = self._shared, self._prepared(x)
        ((q, q_at), (k, k_at), write), (v, v_at) = made.walked, made.v
        states_at, channel = None if states is None else layout(states)[1], write is not None
        decay = x.log_decay is not None and not channel
        key = ("walk", self._groups, kind, x.scale, q_at, k_at, v_at, decay, channel, states_at, of_tiles is None)
        launch = shared.launches.get(key)
        if launch is None:
            launch = launches.walk_launch(shared, *key[1:7], decay=decay, channel=channel)
            shared.keep(key, launch)
        inner = (made.m, made.p, made.factors, made.total)
        launch(q, k, write, v, *inner, states, o, u, borders, of_tiles, local, transition, shared.table)

    def _reverse_walk(
        self,
        x: DeltaOperands,
        do: Tensor,
        d_states: Tensor | None,
        u: Tensor | None,
        dv: Tensor | None,
        d_beta: Tensor | None,
        borders: Tensor | None,
        local: Tensor | None,
        of_tiles: Tensor | None = None,
    ) -> None:
        shared, made = self._shared, self._prepared(x)
        ((q, q_at), (k, k_at), write), (do, do_at) = made.walked, self._placed(do)
        states_at, channel = None if d_states is None else layout(d_states)[1], write is not None
        decay = x.log_decay is not None and not channel
        key = ("reverse walk", self._groups, x.scale, q_at, k_at, do_at, decay, channel, states_at, of_tiles is None)
        launch = shared.launches.get(key)
        if launch is None:
            launch = launches.reverse_walk_launch(shared, *key[1:6], decay=decay, channel=channel)
            shared.keep(key, launch)
        tensors = (made.m, made.p, made.factors, made.total, d_states, dv, d_beta, borders, of_tiles, local)
        launch(q, k, write, do, u, *tensors, shared.table)

    def _gradient_walk(
        self, x: DeltaOperands, do: Tensor, u: Tensor, dv: Tensor, borders: Tensor, out: tuple, *, of_keys: bool
    ) -> None:
        shared, made = self._shared, self._prepared(x)
        (q, q_at), (k, k_at), (do, do_at) = made.q, made.k, self._placed(do)
        key = ("gradient", self._groups, of_keys, x.scale, q_at, k_at, do_at, x.log_decay is not None)
        launch = shared.launches.get(key)
        if launch is None:
            launch = launches.gradient_launch(shared, *key[1:7], decay=key[7])
            shared.keep(key, launch)
        launch(q, k, u, do, dv, made.factors, borders, *out, shared.table)

    def run_map(self, maps: DeltaKernelMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """All segments of each run as one map: its state [N, H, K, V] and transition [N, H, K, K]."""
        shape = self._shared.ends_shape
        transition = self._empty((*shape[:3], shape[2]))
        state = self._scan(maps, None, None, transition, reverse=reverse)
        assert state is not None
        return state, transition

    def border_maps(self, maps: DeltaKernelMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """The segments of the run at the border to the tokens behind (reversed: before), each as one map.

        In the order in which a state passes through them: states [U, N, H, K, V] and transitions [U, N, H, K, K].
        """
        transition = self._of_border(maps.transition, reverse=reverse)
        return self._of_border(maps.local, reverse=reverse), transition.mT if maps.transposed else transition

    def scan(
        self, maps: DeltaKernelMaps, entering: Tensor | None, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """From the state that enters each run [N, H, K, V]: those at all borders, and the one behind all."""
        states = self._empty(self._shared.states_shape)
        return states, self._scan(maps, entering, states, None, reverse=reverse)

    def _scan(
        self,
        maps: DeltaKernelMaps,
        entering: Tensor | None,
        states: Tensor | None,
        end_transition: Tensor | None,
        *,
        reverse: bool,
    ) -> Tensor | None:
        shared, plan = self._shared, self.plan
        end = self._empty(shared.ends_shape) if self._ends or states is None else None
        entering = None if entering is None else entering.to(self.dtype).contiguous()
        tensors = (entering, maps.local, maps.transition, states, end, end_transition)
        launch = launches.scan_launch(
            plan.runs, plan.segments, plan.slots, plan.sizes.heads, *shared.state, shared.device, reverse,
            maps.transposed, shared.packed, end_transition is not None, _given(tensors),
        )  # fmt: skip
        launch(*tensors, shared.run_starts)
        return end


def fold(entering: Tensor, state: Tensor, transition: Tensor) -> Tensor:
    """`entering` [N, H, K, V] through the maps `state` [U, N, H, K, V] and matrices [U, N, H, K, K], in order; fp32.

    By the kernel of the scan, so that devices that fold one after another come to the bits of one.
    """
    units, runs, heads, rows, columns = state.shape
    out = torch.empty(entering.shape, dtype=entering.dtype, device=entering.device)
    of_runs = (x.permute(1, 2, 0, 3, 4).contiguous() for x in (state, transition))
    tensors = (entering.contiguous(), *of_runs, None, out, None)
    launch = launches.scan_launch(
        runs, units, 0, heads, rows, columns, out.device, False, False, False, False, _given(tensors)
    )
    launch(*tensors, None)
    return out


def _given(tensors: Sequence[Tensor | None]) -> tuple[bool | None, ...]:
    """Which tensors there are, and how they lie."""
    return tuple(x if x is None else layout(x)[1] for x in tensors)


def _per_channel(x: DeltaOperands) -> bool:
    return x.log_decay is not None and x.log_decay.ndim == 4


def _token_stride(x: DeltaOperands) -> int:
    """The longest; of a tensor whose last dim has gaps that of its copy."""
    tensors = (x.q, x.k, x.v, *(y for y in (x.beta, x.log_decay) if y is not None))
    strides = (y.stride(1) if y.ndim == 3 or y.stride(3) == 1 else y.shape[2] * MAX_DIM for y in tensors)
    return int(max(strides))


def unsupported(x: DeltaOperands) -> str | None:
    """What the kernels take in place of what these inputs have; None where they serve."""
    if x.k.dtype not in (torch.float32, torch.bfloat16):  # 1 / LEAST_BETA is no number of fp16
        return f"fp32 or bf16, got {x.k.dtype}"
    for name, dim in (("K", x.k.shape[-1]), ("V", x.v.shape[-1])):
        if not 1 <= dim <= MAX_DIM:
            return f"head dims from 1 to {MAX_DIM}, got {name} = {dim}"
    return None
