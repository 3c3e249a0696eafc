"""The steps of `dispatch.Steps` for a decay per token and channel, on the Triton kernels of channel.py.

Inputs are fp32 or bf16, with a query head for each head of k. Results are the same bits every time. q~ and k~ are made
in forward and again in backward: kept from one to the other they would add two fifths to the memory of q, k, v (bf16)
and log_decay (fp32), which are kept anyway, and to make them is less than a fifth of what backward reads and writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp_kernels import channel_launches as launches
from lasp_kernels.launch import Placed, layout
from lasp_kernels.operands import Operands
from lasp_kernels.plan import CHANNEL_DECAY, MAX_DIM
from lasp_kernels.shared import Shared
from lasp_kernels.steps import KernelSteps, shared_of


@dataclass(frozen=True)
class ChannelMaps:
    """What each segment does to a state that passes through it: S -> exp(log_total) S + local."""

    local: Tensor  # [B, H, segments, K, V] fp32, from zero
    log_total: Tensor  # [B, H, segments, K] fp32


@dataclass
class Prepared:
    """What the walks of a pass read in place of `x`; see channel.py. Without q, which may come later, not all."""

    x: Operands
    k: Placed  # these three and q as kernels take them
    v: Placed
    log_decay: Placed
    kt: Tensor
    vec: Tensor
    flag: Tensor
    q: Placed | None = None
    qt: Tensor | None = None
    side: Tensor | None = None


class ChannelSteps(KernelSteps):
    """The steps of forward and backward on one device, for inputs of one shape; see `dispatch.Steps`.

    `states` and `d_states` are buffers as in state.py, with slots for all borders. With `decay_gradient` the step of
    that name must follow the others in the same backward: only then are the numbers in dq and dk. Without `ends` the
    state behind the last token (reversed: before the first) is not wanted, and `scan` returns None for it.
    """

    @classmethod
    def of(
        cls,
        x: Operands,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        segment_length: int | None = None,
        decay_gradient: bool = False,
        ends: bool = True,
    ) -> ChannelSteps:
        """For these inputs. A `cu_seqlens` tensor on a GPU is waited for; a tuple is not."""
        if (reason := unsupported(x)) is not None:
            raise ValueError(f"the Triton kernels of a decay per channel take {reason}")
        return cls(shared_of(x, CHANNEL_DECAY, cu_seqlens, segment_length, decay_gradient, ends=True), ends)

    def __init__(self, shared: Shared, ends: bool = True):
        super().__init__(shared)
        self._ends = ends
        self._made: Prepared | None = None  # of one pass
        self._gradients: dict[str, Tensor] = {}  # dq~ and dk~ of one backward, for `decay_gradient`

    def of_end(self, tokens: int) -> ChannelSteps:
        """For the last `tokens` of the inputs alone."""
        return ChannelSteps(self._shared.of(tokens=tokens, segment_length=-(-tokens // 64) * 64))

    def of_keys(self) -> ChannelSteps:
        """For the gradients of k and v: these."""
        return self

    def _prepared(self, x: Operands, *, keys_only: bool = False) -> Prepared:
        """What an earlier step of the pass has made, with what is missing; `keys_only`: of q nothing is needed."""
        made = self._made
        if made is None or (made.x is not x and any(a is not b for a, b in zip(made.x[1:4], x[1:4]))):
            assert x.log_decay is not None
            shared, sizes, device = self._shared, self.plan.sizes, self._shared.device
            kt = torch.empty(shared.key_shape, dtype=shared.dtype, device=device)
            heads = (sizes.batch, sizes.heads, self.plan.all_tiles)
            vec = torch.empty((3, *heads, sizes.key_dim), dtype=self.dtype, device=device)
            flag = torch.zeros(heads, dtype=torch.int32, device=device)
            placed = self._placed(x.k), self._placed(x.v), self._placed(x.log_decay)
            self._made = made = Prepared(x, *placed, kt, vec, flag)
            self._prepare(made, x, keys=True, queries=not keys_only)
        elif not keys_only and (made.qt is None or made.x.q is not x.q):
            self._prepare(made, x, keys=False, queries=True)
        made.x = x
        return made

    def _prepare(self, made: Prepared, x: Operands, *, keys: bool, queries: bool) -> None:
        """All of it, or what is of k, or what is of q and left."""
        shared, (k, k_at), (g, g_at), q, q_at = self._shared, made.k, made.log_decay, None, None
        if queries:
            made.q = q, q_at = self._placed(x.q)
            made.qt = torch.empty(shared.key_shape, dtype=shared.dtype, device=shared.device)
            tile = self.plan.walk_tile
            made.side = torch.empty((*made.flag.shape, tile, tile), dtype=shared.dtype, device=shared.device)
        kt, vec = (made.kt, made.vec) if keys else (None, None)
        key = ("prepare", x.scale, q_at, k_at if keys else None, g_at)
        launch = shared.launches.get(key) or shared.keep(key, launches.prepare_launch(shared, *key[1:]))
        launch(q, k if keys else None, g, made.qt, kt, vec, made.flag, shared.table)
        key = ("flagged", keys, x.scale, q_at, k_at, g_at)
        launch = shared.launches.get(key) or shared.keep(key, launches.flagged_launch(shared, *key[2:]))
        launch(q, k, g, made.qt, kt, vec, made.flag, made.side, shared.table)

    def local_maps(self, x: Operands, *, needs_end: bool = True) -> ChannelMaps:
        """The state at the end of every segment, from zero. (`needs_end` is for a path that may leave the last out.)"""
        self._made = None
        # A q that is still to come has a stand-in, k, or one of another length.
        made = self._prepared(x, keys_only=x.q is x.k or x.q.shape != x.k.shape)
        return self._maps(made.kt, made.v, made.vec, reverse=False)

    def gradient_maps(self, x: Operands, do: Tensor) -> ChannelMaps:
        """The gradient of the state before every segment, from zero behind it."""
        self._made = None
        made = self._prepared(x)
        assert made.qt is not None
        return self._maps(made.qt, self._placed(do), made.vec, reverse=True)

    def _maps(self, y: Tensor, placed: Placed, vec: Tensor, *, reverse: bool) -> ChannelMaps:
        shared, (z, z_at) = self._shared, placed
        local = torch.empty((*shared.segments_shape, *shared.state), dtype=self.dtype, device=shared.device)
        log_total = torch.empty((*shared.segments_shape, shared.state[0]), dtype=self.dtype, device=shared.device)
        key = ("states", reverse, z_at)
        launch = shared.launches.get(key) or shared.keep(key, launches.state_launch(shared, reverse, z_at))
        launch(y, z, vec, local, log_total, shared.table)
        return ChannelMaps(local, log_total)

    def run_map(self, maps: ChannelMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """All segments of each run as one map: its local state [N, H, K, V] and log-decay [N, H, K]."""
        log_decay = torch.empty(self._shared.ends_shape[:3], dtype=self.dtype, device=self._shared.device)
        local_state = self._scan(maps, None, None, log_decay, reverse=reverse)
        assert local_state is not None
        return local_state, log_decay

    def border_maps(self, maps: ChannelMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """The segments of the run at the border to the tokens behind (reversed: before), each as one map.

        In the order in which a state passes through them: local states [U, N, H, K, V] and log-decays [U, N, H, K].
        """
        return self._of_border(maps.local, reverse=reverse), self._of_border(maps.log_total, reverse=reverse)

    def scan(
        self, maps: ChannelMaps, entering: Tensor | None, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """From the state that enters each run [N, H, K, V]: those at all borders, and the one behind all."""
        states = torch.empty(self._shared.states_shape, dtype=self.dtype, device=self._shared.device)
        return states, self._scan(maps, entering, states, None, reverse=reverse)

    def _scan(
        self,
        maps: ChannelMaps,
        entering: Tensor | None,
        states: Tensor | None,
        log_end: Tensor | None,
        *,
        reverse: bool,
    ) -> Tensor | None:
        shared, end, entering_at = self._shared, None, None
        if self._ends or states is None:
            end = torch.empty(shared.ends_shape, dtype=self.dtype, device=shared.device)
        if entering is not None:
            entering = entering.to(self.dtype).contiguous()
            entering_at = layout(entering)
        key = ("scan", reverse, entering_at, states is None, end is None, log_end is None)
        launch = shared.launches.get(key) or shared.keep(key, launches.scan_launch(shared, reverse))
        launch(entering, maps.local, maps.log_total.exp(), maps.log_total, states, end, log_end, shared.run_starts)
        return end

    def outputs(self, x: Operands, states: Tensor) -> tuple[Tensor, None]:
        """o [B, T, H, V] from the states at the borders of the segments; no denominators."""
        made = self._prepared(x)
        self._made = None
        assert made.qt is not None
        at = self._shared.key_at
        out = torch.empty(self._shared.value_shape, dtype=self._shared.dtype, device=self._shared.device)
        self._walk(made, ((made.qt, at), (made.kt, at), made.v), states, out, transposed=False)
        return out, None

    def output_gradient(self, x: Operands, do: Tensor, o: Tensor, denominators: Tensor) -> Tensor:
        """There is no normaliser here, see `unsupported`."""
        raise ValueError("the Triton kernels of a decay per channel take no normalize")

    def query_gradient(self, x: Operands, do: Tensor, states: Tensor) -> Tensor:
        """dq, from the states that `scan` gave in forward; with `decay_gradient` filled there."""
        made, shared = self._prepared(x), self._shared
        # In fp32: the gradient of a decay is a sum of differences of such numbers, and bf16 costs it a digit.
        dqt = torch.empty(shared.key_shape, dtype=self.dtype, device=shared.device)
        self._walk(made, (self._placed(do), made.v, (made.kt, shared.key_at)), states, dqt, transposed=True)
        dq = torch.empty(shared.key_shape, dtype=shared.dtype, device=shared.device)
        if self.plan.sizes.decay_gradient:
            self._gradients["dq"] = dqt
        else:
            self._finish(made, x, do, (dqt, None), (dq, None))
        return dq

    def _walk(
        self, made: Prepared, tiles: tuple[Placed, Placed, Placed], states: Tensor, out: Tensor, *, transposed: bool
    ) -> None:
        shared, ((x, x_at), (y, y_at), (z, z_at)) = self._shared, tiles
        key = ("walk", transposed, x_at, y_at, z_at, layout(states)[1])
        launch = shared.launches.get(key) or shared.keep(key, launches.walk_launch(shared, *key[1:5]))
        launch(x, y, z, made.vec, made.flag, made.side, states, out, shared.table)

    def key_value_gradient(self, x: Operands, do: Tensor, d_states: Tensor) -> tuple[Tensor, Tensor]:
        """dk and dv, from the gradients of the states at the borders; with `decay_gradient` dk is filled there."""
        made, shared = self._prepared(x), self._shared
        assert made.qt is not None
        dkt = torch.empty(shared.key_shape, dtype=self.dtype, device=shared.device)
        dv = torch.empty(shared.value_shape, dtype=shared.dtype, device=shared.device)
        (v, v_at), (z, z_at) = made.v, self._placed(do)
        for role in (2,) if self.plan.sizes.paired else (0, 1):
            key = ("reverse walk", role, v_at, z_at, layout(d_states)[1])
            launch = shared.launches.get(key) or shared.keep(key, launches.reverse_walk_launch(shared, *key[1:4]))
            launch(made.kt, made.qt, v, z, made.vec, made.flag, made.side, d_states, dkt, dv, shared.table)
        dk = torch.empty(shared.key_shape, dtype=shared.dtype, device=shared.device)
        if self.plan.sizes.decay_gradient:
            self._gradients["dk"] = dkt
        else:
            self._finish(made, x, do, (None, dkt), (None, dk))
            self._made = None
        return dk, dv

    def decay_gradient(
        self, x: Operands, gradients: tuple[Tensor, Tensor, Tensor], states: Tensor, d_states: Tensor
    ) -> Tensor:
        """d log_decay [B, T, H, K], fp32; and what the two steps before it have left open, the numbers in dq and dk."""
        if not self.plan.sizes.decay_gradient:
            raise ValueError("a gradient of log_decay must be asked for when the steps are made")
        (do, dq, dk), made = gradients, self._prepared(x)
        out = torch.empty(self._shared.key_shape, dtype=self.dtype, device=self._shared.device)
        prepared = (self._gradients.pop("dq"), self._gradients.pop("dk"))
        self._finish(made, x, do, prepared, (dq, dk), (states, d_states, out))
        self._made = None
        return out

    def _finish(
        self,
        made: Prepared,
        x: Operands,
        do: Tensor,
        prepared: tuple[Tensor | None, Tensor | None],
        out: tuple[Tensor | None, Tensor | None],
        of_decay: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None),
    ) -> None:
        """dq and dk, or one of them, into `out` from dq~ and dk~; `of_decay`: the states of both scans, and d log_decay
        to be written."""
        assert made.q is not None
        shared, (q, q_at), (k, k_at), (g, g_at) = self._shared, made.q, made.k, made.log_decay
        (v, v_at), (z, z_at) = made.v, self._placed(do)
        which = (out[0] is None, out[1] is None)
        key = ("flagged gradient", x.scale, (q_at, k_at, v_at, z_at, g_at), which)
        launch = shared.launches.get(key) or shared.keep(key, launches.flagged_gradient_launch(shared, *key[1:3]))
        launch(q, k, v, z, g, made.flag, *out, shared.table)
        states, d_states, d_decay = of_decay
        aligned = None if states is None or d_states is None else (layout(states)[1], layout(d_states)[1])
        key = ("finish", x.scale, q_at, k_at, g_at, which, aligned)
        launch = shared.launches.get(key) or shared.keep(key, launches.finish_launch(shared, *key[1:5]))
        launch(q, k, g, made.qt, made.kt, *prepared, made.vec, made.flag, states, d_states, *out, d_decay, shared.table)


def unsupported(x: Operands) -> str | None:
    """What the kernels take in place of what these inputs have; None where they serve."""
    dtype, queries, (*_, heads, key_dim), (*_, values, value_dim) = x.k.dtype, x.q.shape[2], x.k.shape, x.v.shape
    if dtype not in (torch.float32, torch.bfloat16):  # exp(LIMIT) is no number of fp16
        return f"fp32 or bf16, got {dtype}"
    if queries != heads:
        return f"a query head for each head of k, got {queries} and {heads}"
    if heads != values:
        return f"a head of k for each head of v, got {heads} and {values}"
    if x.normalize:
        return "no normalize, got True"
    for name, dim in (("K", key_dim), ("V", value_dim)):
        if not 1 <= dim <= MAX_DIM:
            return f"head dims from 1 to {MAX_DIM}, got {name} = {dim}"
    return None
