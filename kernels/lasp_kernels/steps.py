"""The steps of `dispatch.Steps`, on Triton kernels; those of a decay per channel are in channel_steps.py.

Inputs are fp32, fp16 or bf16, on any strides with the last dim contiguous; decays None, [H] or [B, T, H]. Results
are the same bits every time. How the work is divided is in plan.py; what the kernels do is in state.py (states, scan),
output.py (o, dq) and gradient.py.

A step looks up the launch of its kernel by how its inputs lie in memory, and makes one where there is none yet; all
that depends on shapes alone is kept by shape (`Shared`). So a call that is like an earlier one does little on the host
but to make the tensors that kernels write to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lasp_kernels.launch import Layout, Placed, has_tma, layout, processors
from lasp_kernels.operands import Operands
from lasp_kernels.plan import END_PIECE, HEAD_DECAY, MAX_DIM, NO_DECAY, TOKEN_DECAY, Sizes
from lasp_kernels.shared import Key, Shared, fold_launch, shared_by


@dataclass(frozen=True)
class PieceMaps:
    """What the pieces of each segment do to a state that passes through; `TritonSteps.scan` folds them."""

    pieces: Tensor  # [B, H, segments, pieces, K, V] fp32, see state.py
    log_decay: Tensor | None  # as given
    log_total: Tensor | None  # [B, H, segments, pieces] fp32, for a decay per token
    skipped: int  # segments at the end (reversed: the start) that are left out: 0 or 1


class NormalisedGradient(NamedTuple):
    """The gradient of an o that a denominator divides, and [2, B, H*G, T] fp32 of `normaliser_kernel`."""

    do: Tensor
    norm: Tensor


def _parts(do: Tensor | NormalisedGradient) -> tuple[Tensor, Tensor | None]:
    return do if isinstance(do, NormalisedGradient) else (do, None)


class KernelSteps:
    """What the steps of all forms of the decay have in common."""

    dtype = torch.float32  # of states

    def __init__(self, shared: Shared):
        self._shared, self.plan = shared, shared.plan

    @property
    def tokens(self) -> int:
        """Of the inputs."""
        return self.plan.sizes.tokens

    @property
    def heads(self) -> int:
        """Of states: of k and v, or where heads of v share one of k, of v."""
        return self.plan.sizes.heads

    @property
    def segment_length(self) -> int:
        """The most tokens that a segment may have, whatever the number of tokens here."""
        return self.plan.segment_length

    @property
    def states_shape(self) -> tuple[int, ...]:
        """Of the states that `scan` returns."""
        return self._shared.states_shape

    def zero_state(self) -> Tensor:
        """A state of zeros for every run: [N, H, K, V]."""
        return torch.zeros(self._shared.ends_shape, dtype=self.dtype, device=self._shared.device)

    def _of_border(self, of_segments: Tensor, *, reverse: bool) -> Tensor:
        """[B, H, segments, ...] to those of the run at the border, [U, N, H, ...]; see `dispatch.Steps.border_maps`."""
        low, high = self.plan.run_segments[0 if reverse else -1]
        part = of_segments[:, :, low:high].movedim(2, 0)
        return part.flip(0) if reverse else part.contiguous()

    def _placed(self, x: Tensor) -> Placed:
        """x and how it lies; copied where its last dim has gaps or its segments are too far apart for 32 bits."""
        strides = x.stride()
        if strides[3] != 1 or strides[1] > self.plan.longest_stride:
            x = x.contiguous()
            strides = x.stride()
        return x, (strides, x.data_ptr() % 16 == 0)


class TritonSteps(KernelSteps):
    """The steps of forward and backward on one device, for inputs of one shape; see `dispatch.Steps`.

    `states` and `d_states` are buffers as in state.py. Gradients have the dtype of the inputs. With
    `decay_gradient` the steps query_gradient and key_value_gradient also keep the row sums that the step of that
    name needs; it must follow in the same backward. Without `ends` no state enters and the one behind the last token
    (reversed: before the first) is not wanted: `scan` then returns None for it, and, if there is a single segment, a
    buffer of no states. With a given `segment_length` a segment is not cut into pieces, so that one device and
    several fold the same maps (`border_maps`).
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
    ) -> TritonSteps:
        """For these inputs. A `cu_seqlens` tensor on a GPU is waited for; a tuple is not.

        fp32 products use TF32 if PyTorch's own may (`torch.set_float32_matmul_precision`).
        """
        log_decay = x.log_decay
        _check_supported(x.k, x.v, log_decay)
        decay = NO_DECAY if log_decay is None else HEAD_DECAY if log_decay.ndim == 1 else TOKEN_DECAY
        return cls(shared_of(x, decay, cu_seqlens, segment_length, decay_gradient, ends))

    def __init__(self, shared: Shared):
        super().__init__(shared)
        self._rows: dict[str, Tensor] = {}  # row sums, and the decays of walks: of one backward

    def of_end(self, tokens: int) -> TritonSteps:
        """For the last `tokens` of the inputs alone: in more programs, each with less work."""
        length = -(-tokens // 64) * 64
        return TritonSteps(self._shared.of(tokens=tokens, segment_length=length, piece_length=END_PIECE, ends=True))

    def of_keys(self) -> TritonSteps:
        """For the gradients of k and v, whose grid has two programs where the others have one: longer segments.

        Not where the gradient of the decay needs a state and its gradient at the same borders.
        """
        other = self._shared.of_keys
        return self if other is self._shared else TritonSteps(other)

    def local_maps(self, x: Operands, *, needs_end: bool = True) -> PieceMaps:
        """The state at the end of every piece, from zero; of the last only if the state behind it is needed."""
        return self._piece_maps(x.k, x.v, None, x.log_decay, 1.0, reverse=False, needs_end=needs_end)

    def gradient_maps(self, x: Operands, do: Tensor | NormalisedGradient) -> PieceMaps:
        """The gradient of the state before every piece, from zero behind it."""
        do, norm = _parts(do)
        scale = x.scale if norm is None else 1.0  # which is in `norm`
        return self._piece_maps(x.q, do, norm, x.log_decay, scale, reverse=True)

    def _piece_maps(
        self,
        y: Tensor,
        z: Tensor,
        norm: Tensor | None,
        log_decay: Tensor | None,
        scale: float,
        *,
        reverse: bool,
        needs_end: bool = True,
    ) -> PieceMaps:
        shared, plan = self._shared, self.plan
        skipped = plan.skipped if needs_end else plan.skippable
        shape = shared.pieces_shape if plan.slots else (0,)
        pieces = torch.empty(shape, dtype=torch.float32, device=shared.device)
        log_total = pieces.new_empty(shared.pieces_shape[:4]) if plan.sizes.decay == TOKEN_DECAY else None
        if skipped < plan.segments:
            (y, y_at), (z, z_at) = self._placed(y), self._placed(z)
            key = ("states", reverse, skipped, scale, y_at, z_at, None if log_decay is None else layout(log_decay))
            launch = shared.launches.get(key) or shared.keep(key, shared.states_launch(*key[1:]))
            launch(y, z, norm, log_decay, pieces, log_total, shared.table)
        return PieceMaps(pieces, log_decay, log_total, skipped)

    def run_map(self, maps: PieceMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """All segments of each run as one map: its local state [N, H, K, V] and log-decay [N, H, 1]."""
        if maps.skipped:
            raise ValueError("the map of a run needs all segments")
        log_decay = None
        if self.plan.sizes.decay != NO_DECAY:
            log_decay = torch.empty(*self._shared.ends_shape[:2], 1, dtype=self.dtype, device=self._shared.device)
        local_state = self._scan(maps, None, None, log_decay, reverse=reverse)
        assert local_state is not None
        return local_state, log_decay

    def border_maps(self, maps: PieceMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """The segments of the run at the border to the tokens behind (reversed: before), each as one map.

        In the order in which a state passes through them: local states [U, N, H, K, V] and log-decays [U, N, H, 1].
        """
        if self.plan.pieces > 1:
            raise ValueError("maps of segments need a given segment_length")
        low, high = self.plan.run_segments[0 if reverse else -1]
        state = self._of_border(maps.pieces[:, :, :, 0], reverse=reverse)
        if maps.log_decay is None:
            return state, None
        if maps.log_total is not None:
            return state, self._of_border(maps.log_total, reverse=reverse)
        log_decay = self._shared.segment_tokens[low:high, None, None] * maps.log_decay.float()
        log_decay = log_decay.expand(state.shape[:3]).unsqueeze(-1)
        return state, log_decay.flip(0) if reverse else log_decay.contiguous()

    def scan(self, maps: PieceMaps, entering: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """From the state that enters each run [N, H, K, V]: those at all borders, and the one behind all.

        None instead of the last where the maps leave one out.
        """
        states = torch.empty(self._shared.states_shape, dtype=self.dtype, device=self._shared.device)
        return states, self._scan(maps, entering, states, None, reverse=reverse)

    def _scan(
        self,
        maps: PieceMaps,
        entering: Tensor | None,
        states: Tensor | None,
        log_end: Tensor | None,
        *,
        reverse: bool,
    ) -> Tensor | None:
        shared, plan = self._shared, self.plan
        if plan.skipped and entering is not None:
            raise ValueError("a state that enters must be announced by `ends`")
        if not plan.slots:  # one segment, which nothing enters and nothing leaves
            return None
        end = None if maps.skipped else torch.empty(shared.ends_shape, dtype=self.dtype, device=shared.device)
        entering_at = log_decay = None
        if entering is not None:
            entering = entering.to(self.dtype).contiguous()
            entering_at = layout(entering)
        if maps.log_decay is not None and plan.sizes.decay == HEAD_DECAY:  # else the kernel does not read it
            log_decay = maps.log_decay.contiguous()
        key = ("scan", reverse, maps.skipped, entering_at, None if log_decay is None else layout(log_decay),
               states is None, log_end is None)  # fmt: skip
        launch = shared.launches.get(key) or shared.keep(key, shared.scan_launch(reverse, maps.skipped))
        launch(log_decay, entering, maps.pieces, maps.log_total, states, end, log_end, shared.table, shared.run_starts)
        return end

    def outputs(self, x: Operands, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """o [B, T, H*G, V] from the states at the borders of the segments; with a normaliser also the denominators."""
        norm = None
        if self.plan.sizes.normalize:
            norm = torch.empty(self._shared.norm_shape, dtype=self.dtype, device=self._shared.device)
        return self._forward_walk(x, (x.q, x.k, x.v, None), norm, states, transposed=False), norm

    def output_gradient(self, x: Operands, do: Tensor, o: Tensor, denominators: Tensor) -> NormalisedGradient:
        """What the steps of backward take as `do` where there is a normaliser."""
        shared, (o, o_at), (do, do_at) = self._shared, self._placed(o), self._placed(do)
        norm = torch.empty(2, *shared.norm_shape, dtype=self.dtype, device=shared.device)
        key = ("normaliser", x.scale, o_at, do_at, layout(denominators)[1])
        launch = shared.launches.get(key) or shared.keep(key, shared.normaliser_launch(*key[1:4]))
        launch(o, do, denominators, norm)
        return NormalisedGradient(do, norm)

    def query_gradient(self, x: Operands, do: Tensor | NormalisedGradient, states: Tensor) -> Tensor:
        """dq, from the states that `scan` gave in forward."""
        (do, norm), w = _parts(do), x.q if self.plan.sizes.keeps_rows else None
        return self._of_group(self._forward_walk(x, (do, x.v, x.k, w), norm, states, transposed=True))

    def _of_group(self, of_values: Tensor) -> Tensor:
        """Of q or k, from the part of each head of v: the sum over those that share one."""
        share = self.plan.sizes.share
        return of_values if share == 1 else of_values.unflatten(2, (-1, share)).sum(3)

    def _forward_walk(
        self, operands: Operands, tiles: tuple[Tensor, Tensor, Tensor, Tensor | None], norm: Tensor | None,
        states: Tensor, *, transposed: bool,
    ) -> Tensor:  # fmt: skip
        """The outputs, or dq, by the walk of output.py over x, y, z; with w also row sums."""
        shared, (x, y, z, w) = self._shared, tiles
        (x, x_at), (y, y_at), (z, z_at), w_at = self._placed(x), self._placed(y), self._placed(z), None
        decays, decay_at = self._walk_decays(operands.log_decay, keep=w is not None)
        if w is not None:
            w, w_at = self._placed(w)
        key = ("forward", transposed, operands.scale, x_at, y_at, z_at, w_at, decay_at, states.data_ptr() % 16 == 0)
        walk = shared.launches.get(key) or shared.keep(key, shared.forward_launch(*key[1:-1]))
        out = torch.empty(shared.query_shapes[transposed], dtype=shared.dtype, device=shared.device)
        sums = None if w is None else self._row_sums("dq", 2, walk.blocks, shared.query_shapes[0][2])
        walk(x, y, z, w, norm, decays, states, out, sums, shared.table)
        return out

    def key_value_gradient(
        self, x: Operands, do: Tensor | NormalisedGradient, d_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """dk and dv, from the gradients of the states at the borders of the segments."""
        shared, w, (do, norm) = self._shared, x.k if self.plan.sizes.keeps_rows else None, _parts(do)
        dk = torch.empty(shared.key_shape, dtype=shared.dtype, device=shared.device)
        dv = torch.empty(shared.value_shape, dtype=shared.dtype, device=shared.device)
        if self.plan.sizes.paired:
            self._backward_walk(x, (x.k, x.v, x.q, do, w), norm, (dv, dk), d_states, transposed=False)
        else:
            self._backward_walk(x, (x.k, x.k, x.q, do, None), norm, (dv, dv), d_states, transposed=False)
            self._backward_walk(x, (x.v, x.v, do, x.q, w), norm, (dk, dk), d_states, transposed=True)
        return self._of_group(dk), dv

    def _backward_walk(
        self, operands: Operands, tiles: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], norm: Tensor | None,
        out: tuple[Tensor, Tensor], d_states: Tensor, *, transposed: bool,
    ) -> None:  # fmt: skip
        """dv or dk into `out` by the walk of gradient.py over x, x2, y, z; both where there is a pair x and x2.

        With w, which is k, also the row sums of dk.
        """
        shared, (x, x2, y, z, w) = self._shared, tiles
        (x, x_at), (x2, x2_at), (y, y_at), (z, z_at) = map(self._placed, (x, x2, y, z))
        decays, decay_at = self._walk_decays(operands.log_decay, keep=w is not None)
        w_at = None
        if w is not None:
            w, w_at = self._placed(w)
        at = (x_at, x2_at, y_at, z_at, w_at, decay_at)
        key = ("backward", transposed, operands.scale, at, d_states.data_ptr() % 16 == 0)
        walk = shared.launches.get(key) or shared.keep(key, shared.backward_launch(*key[1:4]))
        sums = None if w is None else self._row_sums("dk", 1, walk.blocks, self.heads)
        walk(x, x2, y, z, w, norm, decays, d_states, *out, sums, shared.table)

    def _walk_decays(self, log_decay: Tensor | None, *, keep: bool) -> tuple[Tensor | None, Layout | None]:
        """What a walk reads of the decays, and how those given lie: per token summed up in tiles, fp32.

        `keep`: for the walks of this backward that follow.
        """
        if log_decay is None or log_decay.ndim == 1:
            return log_decay, None if log_decay is None else layout(log_decay)
        decays = self._rows.get("decays")
        if decays is None:
            decays = self._sum_tiles(log_decay)
            if keep:
                self._rows["decays"] = decays
        return decays, None

    def _sum_tiles(self, log_decay: Tensor) -> Tensor:
        shared = self._shared
        decays = torch.empty(self.plan.tile_sums_shape, dtype=self.dtype, device=shared.device)
        key = ("tile decays", layout(log_decay))
        launch = shared.launches.get(key) or shared.keep(key, shared.tile_decays_launch(key[1]))
        launch(log_decay, decays, shared.table)
        return decays

    def decay_gradient(
        self,
        x: Operands,
        gradients: tuple[Tensor | NormalisedGradient, Tensor, Tensor],
        states: Tensor,
        d_states: Tensor,
    ) -> Tensor:
        """d log_decay in its shape, fp32, from do, dq and dk; per token from the row sums that their steps kept."""
        assert x.log_decay is not None
        if self.plan.sizes.decay == HEAD_DECAY:
            return self._head_decay_gradient(x, gradients[0], x.log_decay, states, d_states)
        if not self.plan.sizes.keeps_rows:
            raise ValueError("a gradient of log_decay must be asked for when the steps are made")
        shared, log_decay = self._shared, x.log_decay
        query_rows, key_rows, _ = (self._rows.pop(name) for name in ("dq", "dk", "decays"))
        out = torch.empty(log_decay.shape, dtype=self.dtype, device=shared.device)
        key = ("token decay", query_rows.shape[1], key_rows.shape[1], layout(log_decay), layout(states)[1],
               layout(d_states)[1])  # fmt: skip
        launch = shared.launches.get(key) or shared.keep(key, shared.token_decay_launch(*key[1:4]))
        launch(log_decay, states, d_states, query_rows, key_rows, out, shared.table)
        return out

    def _head_decay_gradient(
        self, x: Operands, do: Tensor | NormalisedGradient, log_decay: Tensor, states: Tensor, d_states: Tensor
    ) -> Tensor:
        shared, sizes, (do, norm) = self._shared, self.plan.sizes, _parts(do)
        (q, q_at), (k, k_at), (v, v_at), (do, do_at) = map(self._placed, (x.q, x.k, x.v, do))
        aligned = (layout(states)[1], layout(d_states)[1])
        key = ("head decay", x.scale, q_at, k_at, v_at, do_at, layout(log_decay), aligned)
        blocks = self.plan.head_decay_blocks()
        launch = shared.launches.get(key) or shared.keep(key, shared.head_decay_launch(blocks, x.scale, key[2:7]))
        shape = (self.plan.segments, blocks.count, sizes.batch, sizes.heads, sizes.groups)
        parts = torch.empty(shape, dtype=self.dtype, device=shared.device)
        launch(q, k, v, do, norm, log_decay, states, d_states, parts, shared.table)
        return parts.sum((0, 1, 2, 4))

    def _row_sums(self, name: str, kinds: int, blocks: int, heads: int) -> Tensor:
        """Kept for `decay_gradient`."""
        shape = (kinds, blocks, self.plan.sizes.batch, heads, self.tokens)
        self._rows[name] = torch.empty(shape, dtype=self.dtype, device=self._shared.device)
        return self._rows[name]


def shared_of(
    x: Operands,
    decay: int,
    cu_seqlens: Tensor | Sequence[int] | None,
    segment_length: int | None,
    decay_gradient: bool,
    ends: bool,
) -> Shared:
    """What all calls with such inputs share; `decay` is its form, as a number of plan.py."""
    q, k, v, log_decay, *_ = x
    bounds = None
    if cu_seqlens is not None:
        bounds = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
    # Sizes as plain numbers: under torch.compile they may be symbols, which would not find what was kept.
    batch, tokens, _, key_dim = map(int, k.shape)
    heads = int(v.shape[2])
    sizes = Sizes(
        batch,
        tokens,
        heads,
        max(1, int(q.shape[2]) // heads),
        key_dim,
        int(v.shape[3]),
        k.element_size(),
        decay,
        _token_stride(x),
        processors(k.device),
        has_tma(k.device),
        bounds,
        segment_length,
        decay_gradient,
        ends,
        split_sums=k.dtype != torch.bfloat16,  # whose numbers have fewer digits than the sums lose
        share=heads // int(k.shape[2]),
        normalize=x.normalize,
    )
    tf32 = k.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return shared_by(Key(sizes, k.dtype, None if log_decay is None else log_decay.dtype, k.device, tf32))


def fold(entering: Tensor, state: Tensor, log_decay: Tensor | None) -> Tensor:
    """`entering` [N, H, K, V] through the maps `state` [U, N, H, K, V], `log_decay` [U, N, H, 1], in order; fp32.

    Rounds as the scan does, so that devices that fold one after another come to the bits of one.
    """
    entering, state = entering.contiguous(), state.contiguous()
    log_decay = None if log_decay is None else log_decay.contiguous()
    out = torch.empty_like(entering)
    tensors = (entering, state, log_decay, out)
    aligned = tuple(x is None or x.data_ptr() % 16 == 0 for x in tensors)
    fold_launch(state.shape, out.device, log_decay is not None, aligned)(*tensors)
    return out


def _token_stride(x: Operands) -> int:
    """The longest; of a tensor whose last dim has gaps that of its copy."""
    longest, tensors = 0, [*x[:3]]
    if x.log_decay is not None and x.log_decay.ndim == 4:
        tensors.append(x.log_decay)
    for tensor in tensors:
        strides = tensor.stride()
        longest = max(longest, strides[1] if strides[3] == 1 else tensor.shape[2] * MAX_DIM)
    if x.log_decay is not None and x.log_decay.ndim == 3:
        longest = max(longest, x.log_decay.stride(1))
    return int(longest)


def _check_supported(k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    """Raise `ValueError` for what these kernels do not do; `check_inputs` has seen to the rest."""
    if k.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the Triton kernels take fp32, fp16 or bf16, got {k.dtype}")
    if log_decay is not None and log_decay.ndim == 4:
        raise ValueError("the Triton kernels take log_decay [H] or [B, T, H], got a decay per channel, [B, T, H, K]")
    for name, dim in (("K", k.shape[-1]), ("V", v.shape[-1])):
        if not 1 <= dim <= MAX_DIM:
            raise ValueError(f"the Triton kernels take head dims from 1 to {MAX_DIM}, got {name} = {dim}")
