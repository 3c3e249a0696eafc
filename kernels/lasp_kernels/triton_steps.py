# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The steps of `reference.ChunkedSteps`, on Triton kernels: segments, launches, and the table of their settings.

Inputs are fp32, fp16 or bf16, on any strides with the last dim contiguous; decays None, [H] or [B, T, H]. Results
are the same bits every time. What the kernels do is in state.py (states, scan), output.py (o, dq) and gradient.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lasp_kernels.gradient import backward_walk_kernel, head_decay_kernel, token_decay_kernel
from lasp_kernels.output import forward_walk_kernel
from lasp_kernels.state import scan_kernel, segment_state_kernel

MAX_DIM = 256
MIN_SEGMENT = 256  # a program reads a state of 32 KiB: for fewer tokens than this it would not pay
DECAY_SEGMENT = 1024  # for a gradient of a decay per token, whose rounding noise grows with the segment
STATE_SHARE = 0.05  # but no shorter than this: the share of a segment's state in the memory of its dq, dk and dv
PIECE = 4096  # tokens of a segment that one program of the state kernel reads


@dataclass(frozen=True)
class Config:
    """How a kernel runs. `rows` x `columns` is its block of the state; 0 is all rows (or columns)."""

    tile: int
    rows: int
    columns: int
    warps: int
    stages: int


# By kernel: for 2-byte inputs whose contracted dim is <= 128, or more; then the same for 4-byte inputs.
# A tile of 64 tokens, 64 columns, 4 warps and 4 stages measured best on an H100 (docs/kernels.md). For wide heads the
# stages must fit shared memory (227 KiB); fp32 products run without tensor cores, and larger tiles would spill.
NARROW, WIDE, FP32, FP32_WIDE = (Config(64, 0, 64, 4, 4), Config(64, 0, 64, 8, 2), Config(16, 0, 32, 8, 2),
                                 Config(16, 0, 16, 8, 2))  # fmt: skip
CONFIGS: dict[str, tuple[Config, Config, Config, Config]] = {
    "state": (Config(64, 128, 128, 4, 3),) * 2 + (Config(32, 64, 64, 4, 2),) * 2,
    "walk": (NARROW, WIDE, FP32, FP32_WIDE),
    "head_decay": (Config(64, 0, 64, 8, 2), Config(64, 0, 32, 8, 1), Config(16, 0, 32, 8, 1), Config(16, 0, 16, 8, 1)),
}


def _power_of_two(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _config(name: str, dim: int, itemsize: int) -> Config:
    return CONFIGS[name][2 * (itemsize == 4) + (dim > 128)]


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the card; on a CPU (interpreter) as if there were 4."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache
def _has_tma(device: torch.device) -> bool:
    """Whether the card has the copy engine for tiles (Hopper and later); the interpreter acts as if it had."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where programs put the descriptors that they make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _fits_tma(x: Tensor) -> bool:
    """A descriptor needs addresses and strides that are multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


@dataclass(frozen=True)
class Segments:
    """What the pieces of each segment do to a state that passes through; `TritonSteps.scan` folds them."""

    pieces: Tensor  # [B, H, segments, pieces, K, V] fp32, see state.py
    log_decay: Tensor | None  # as given
    log_total: Tensor | None  # [B, H, segments, pieces] fp32, for a decay per token


@lru_cache(maxsize=64)
def _segment_table(bounds: tuple[int, ...], segment_length: int, device: torch.device) -> tuple[Tensor, ...]:
    """For packed sequences: first token, end and run of each segment; the first segment and length of each run.

    Kept, since all layers of a model ask for the same.
    """
    table, run_starts = [], [0]
    for run, (first, end) in enumerate(zip(bounds, bounds[1:])):
        for t in range(first, end, segment_length):
            table += [t, min(t + segment_length, end), run]
        run_starts.append(len(table) // 3)
    lengths = [end - first for first, end in zip(bounds, bounds[1:])]
    # One copy to the device, from pinned memory, so that the host need not wait for it.
    host = torch.tensor(table + run_starts + lengths, dtype=torch.int32)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True).split([len(table), len(run_starts), len(lengths)])


class TritonSteps:
    """The steps of forward and backward on one rank, for inputs of one shape; see `reference.ChunkedSteps`.

    `states` and `d_states` are buffers as in state.py. Gradients have the dtype of the inputs. With
    `decay_gradient` the steps query_gradient and key_value_gradient also keep the row sums that the step of that
    name needs; it must follow in the same backward. Without `ends` the states behind the last segment and before the
    first are not computed: what `scan` returns as such is undefined then.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        segment_length: int | None = None,
        decay_gradient: bool = False,
        ends: bool = True,
        allow_tf32: bool = False,
    ):
        self.batch, self.tokens, self.heads, self.key_dim = k.shape
        self.value_dim = v.shape[-1]
        self.groups = q.shape[2] // self.heads
        self.device, self.input_dtype, self.dtype = k.device, k.dtype, torch.float32
        _check_supported(q, k, v, log_decay)
        self._decay = 0 if log_decay is None else {1: 1, 3: 2}[log_decay.ndim]
        self._keep_rows = decay_gradient and self._decay == 2
        self._rows: dict[str, Tensor] = {}
        interpreted = triton.knobs.runtime.interpret
        low = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[k.dtype]
        # The interpreter's product of bf16 operands is wrong: upcast there.
        self._low = tl.float32 if interpreted and k.dtype == torch.bfloat16 else low
        self._precision = "tf32" if allow_tf32 else "ieee"
        # Kernels address the tokens of a segment with 32 bits.
        stride = max(x.shape[2] * MAX_DIM if x.stride(-1) != 1 else x.stride(1) for x in (q, k, v))
        longest = 2**31 // max(stride, q.shape[2] * MAX_DIM) // 64 * 64
        self._segment_length = min(segment_length or self._choose_segment_length(), longest)
        self._table = self._run_starts = self._run_lengths = None  # packed only
        self.runs = self.batch
        if cu_seqlens is not None:
            self._pack(cu_seqlens)
        else:
            self.segments = -(-self.tokens // self._segment_length)
            self.slots = self.segments + 1
        self._piece_length = min(self._segment_length, PIECE)
        self._pieces = -(-self._segment_length // self._piece_length)
        self._skipped = int(not ends and not decay_gradient and cu_seqlens is None and self.segments > 0)
        self._tma = _has_tma(self.device)
        if self._tma:  # here, since Triton keeps it by thread, and backward has one of its own
            triton.set_allocator(_scratch)

    def _choose_segment_length(self) -> int:
        """As long as it may be, for a state kernel that reads little, with programs for two on every processor.

        Where their number is a little more than a multiple of the processors, the last ones would run almost alone:
        then rather more and shorter segments.
        """
        columns = _config("walk", max(self.key_dim, self.value_dim), self.input_dtype.itemsize).columns
        programs = max(1, self.batch * self.heads * self.groups * -(-self.value_dim // columns))
        slots = 2 * _processors(self.device)
        fewest = max(1, slots // programs)

        def busy(segments: int) -> float:
            return programs * segments / (-(-programs * segments // slots) * slots)

        wanted = next((n for n in range(fewest, 4 * fewest + 1) if busy(n) > 0.9), fewest)
        length = max(MIN_SEGMENT, -(-self.tokens // wanted))
        if self._keep_rows:
            token_bytes = (2 * self.key_dim + self.value_dim) * self.input_dtype.itemsize
            state_bytes = 4 * self.key_dim * self.value_dim
            length = min(length, max(DECAY_SEGMENT, math.ceil(state_bytes / (STATE_SHARE * token_bytes))))
        return -(-length // 64) * 64

    def _pack(self, cu_seqlens: Tensor | Sequence[int]) -> None:
        """Cut each run for itself. A tensor on a GPU is waited for; a tuple is not."""
        bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
        self._table, self._run_starts, self._run_lengths = _segment_table(
            tuple(bounds), self._segment_length, self.device
        )
        self.runs, self.segments = len(bounds) - 1, self._table.numel() // 3
        self.slots = self.segments + self.runs

    @property
    def segment_length(self) -> int:
        """The most tokens that a segment may have, whatever the number of tokens here."""
        return self._segment_length

    def zero_state(self) -> Tensor:
        """A state of zeros for every run: [N, H, K, V]."""
        shape = (self.runs, self.heads, self.key_dim, self.value_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def states_shape(self) -> tuple[int, ...]:
        """Of the states that `scan` returns."""
        return (self.batch, self.heads, self.slots, self.key_dim, self.value_dim)

    def segment_states(self, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Segments:
        """The state at the end of every segment, from zero."""
        return self._segments(k, v, log_decay, 1.0, reverse=False)

    def segment_gradients(self, q: Tensor, do: Tensor, log_decay: Tensor | None, scale: float) -> Segments:
        """The gradient of the state before every segment, from zero behind it."""
        return self._segments(q, do, log_decay, scale, reverse=True)

    def _segments(self, y: Tensor, z: Tensor, log_decay: Tensor | None, scale: float, *, reverse: bool) -> Segments:
        y, z = self._addressable(y), self._addressable(z)
        shape = (self.batch, self.heads, self.segments, self._pieces, self.key_dim, self.value_dim)
        pieces = torch.empty(shape, dtype=self.dtype, device=self.device)
        log_total = pieces.new_empty(shape[:4]) if self._decay == 2 else None
        config = _config("state", 0, y.element_size())
        rows = min(config.rows, _power_of_two(self.key_dim))
        columns = min(config.columns, _power_of_two(self.value_dim))
        blocks = -(-self.key_dim // rows) * -(-self.value_dim // columns)
        programs = blocks * self.batch * self.heads * (self.segments - self._skipped) * self._pieces
        if programs > 0:
            segment_state_kernel[(programs,)](
                y, z, log_decay, pieces, log_total, self._table, float(scale), self.batch, *self._sizes(),
                self._piece_length, self._pieces, self._skipped,
                *y.stride()[:3], *z.stride()[:3], *self._decay_strides(log_decay),
                self.key_dim, self.value_dim, rows, columns, config.tile,
                GROUP=self.groups if reverse else 1, REVERSE=reverse, **self._flags(config),
            )  # fmt: skip
        return Segments(pieces, log_decay, log_total)

    def fold(self, segments: Segments, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """All segments of each run as one map: its local state [N, H, K, V] and log-decay [N, H, 1]."""
        local_state = self._scan(segments, self.zero_state(), None, reverse)
        if segments.log_decay is None:
            return local_state, local_state.new_zeros(self.runs, self.heads, 1)
        if segments.log_total is None:
            lengths = self._run_lengths
            if lengths is None:
                lengths = torch.full((self.runs,), self.tokens, device=self.device)
            return local_state, lengths.view(-1, 1, 1) * segments.log_decay.float().view(1, -1, 1)
        if self._run_starts is None:
            return local_state, segments.log_total.sum((2, 3)).unsqueeze(-1)
        sums = F.pad(segments.log_total[0].sum(2).double().cumsum(1), (1, 0))  # up to each segment: [H, segments + 1]
        return local_state, sums[:, self._run_starts.long()].diff(dim=1).T.float().unsqueeze(-1)

    def scan(self, segments: Segments, entering: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """From the state that enters each run [N, H, K, V]: those at all borders, and the one behind all."""
        states = torch.empty(self.states_shape, dtype=self.dtype, device=self.device)
        end = self._scan(segments, self.zero_state() if entering is None else entering, states, reverse)
        return states, end

    def _scan(self, segments: Segments, entering: Tensor, states: Tensor | None, reverse: bool) -> Tensor:
        entering = entering.to(self.dtype).contiguous()
        end = torch.empty_like(entering)
        size, block = self.key_dim * self.value_dim, 512
        if end.numel():
            scan_kernel[(self.runs * self.heads, -(-size // block))](
                segments.pieces, entering, states, end, _contiguous(segments.log_decay), segments.log_total,
                self._table, self._run_starts, *self._sizes(), self._piece_length, self._pieces, self._skipped, size,
                DECAY=self._decay, REVERSE=reverse, PACKED=self._table is not None, WRITE=states is not None,
                BLOCK=block, num_warps=4,
            )  # fmt: skip
        return end

    def outputs(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, states: Tensor, scale: float
    ) -> Tensor:
        """o [B, T, H*G, V] from the states at the borders of the segments."""
        return self._forward_walk(q, k, v, None, log_decay, states, scale)

    def query_gradient(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, states: Tensor, scale: float
    ) -> Tensor:
        """dq, from the states that `scan` gave in forward."""
        return self._forward_walk(do, v, k, q, log_decay, states, scale, transposed=True)

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
        """dk and dv, from the gradients of the states at the borders of the segments."""
        dk = torch.empty(k.shape, dtype=self.input_dtype, device=self.device)
        dv = torch.empty(v.shape, dtype=self.input_dtype, device=self.device)
        if self.key_dim == self.value_dim and self.groups == 1 and not self._keep_rows:
            self._backward_walk(k, q, do, dv, None, log_decay, d_states, scale, pair=(v, dk))
        else:
            self._backward_walk(k, q, do, dv, None, log_decay, d_states, scale)
            self._backward_walk(v, do, q, dk, k, log_decay, d_states, scale, transposed=True)
        return dk, dv

    def _forward_walk(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        w: Tensor | None,
        log_decay: Tensor | None,
        states: Tensor,
        scale: float,
        *,
        transposed: bool = False,
    ) -> Tensor:
        """The outputs, or dq, by the walk of output.py: [B, T, heads of x, columns of z]."""
        x, y, z = self._addressable(x), self._addressable(y), self._addressable(z)
        out = torch.empty(*x.shape[:3], z.shape[-1], dtype=self.input_dtype, device=self.device)
        config, columns, blocks = self._blocks(y, z)
        sums = None
        if self._keep_rows and transposed:
            assert w is not None
            w = self._addressable(w)
            self._rows["dq"] = sums = self._row_sums(2, blocks, x.shape[2])
        programs = blocks * self.batch * x.shape[2] * self.segments
        if programs:
            forward_walk_kernel[(programs,)](
                x, y, z, out, w, sums, log_decay, states, self._table, float(scale), self.batch, *self._sizes(),
                *x.stride()[:3], *y.stride()[:3], *z.stride()[:3], *(w.stride()[:3] if sums is not None else (0, 0, 0)),
                *self._decay_strides(log_decay), y.shape[-1], z.shape[-1], _power_of_two(y.shape[-1]), columns,
                config.tile, GROUP=self.groups, TRANSPOSED=transposed, SUM_ROWS=sums is not None,
                TMA=self._tma and all(map(_fits_tma, (x, y, z, out))), **self._flags(config),
            )  # fmt: skip
        return out

    def _backward_walk(
        self,
        x: Tensor,
        y: Tensor,
        z: Tensor,
        out: Tensor,
        w: Tensor | None,
        log_decay: Tensor | None,
        d_states: Tensor,
        scale: float,
        *,
        transposed: bool = False,
        pair: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """dv or dk into `out` by the walk of gradient.py, or with `pair`, the other's x and out, both."""
        x, y, z = self._addressable(x), self._addressable(y), self._addressable(z)
        x2, out2 = (x, out) if pair is None else (self._addressable(pair[0]), pair[1])
        config, columns, blocks = self._blocks(y, z)
        sums = None
        if self._keep_rows and transposed:
            assert w is not None
            w = self._addressable(w)
            self._rows["dk"] = sums = self._row_sums(1, blocks, self.heads)
        programs = (1 if pair is None else 2) * blocks * self.batch * self.heads * self.segments
        if programs:
            backward_walk_kernel[(programs,)](
                x, x2, y, z, out, out2, w, sums, log_decay, d_states, self._table,
                float(scale), self.batch, *self._sizes(), *x.stride()[:3], *x2.stride()[:3],
                *y.stride()[:3], *z.stride()[:3], *(w.stride()[:3] if sums is not None else (0, 0, 0)),
                *self._decay_strides(log_decay), y.shape[-1], z.shape[-1], _power_of_two(y.shape[-1]), columns,
                config.tile, GROUP=self.groups, TRANSPOSED=transposed, PAIRED=pair is not None,
                SUM_ROWS=sums is not None,
                TMA=self._tma and self.groups == 1 and all(map(_fits_tma, (x, x2, y, z, out, out2))),
                **self._flags(config),
            )  # fmt: skip

    def _blocks(self, y: Tensor, z: Tensor) -> tuple[Config, int, int]:
        """How a walk runs, the columns of z that one program takes, and the number of such blocks."""
        config = _config("walk", y.shape[-1], y.element_size())
        columns = min(config.columns, _power_of_two(z.shape[-1]))
        if y.element_size() == 2 and _power_of_two(y.shape[-1]) * columns <= 128 * 64:
            # A small state needs no more warps; and Triton 3.6 addresses shared memory wrongly for 8 with 16 columns.
            config = replace(config, warps=4)
        return config, columns, -(-z.shape[-1] // columns)

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
        """d log_decay in its shape, fp32. From the row sums that the steps of dq and dk kept."""
        if self._decay == 1:
            return self._head_decay_gradient(q, k, v, do, log_decay, states, d_states, scale)
        if not self._keep_rows:
            raise ValueError("a gradient of log_decay must be asked for when TritonSteps is made")
        query_rows, key_rows = self._rows.pop("dq"), self._rows.pop("dk")
        out = torch.empty(log_decay.shape, dtype=self.dtype, device=self.device)
        programs = self.batch * self.heads * self.segments
        if programs:
            token_decay_kernel[(programs,)](
                query_rows, key_rows, states, d_states, out, log_decay, self._table, self.batch, *self._sizes(),
                *self._decay_strides(log_decay), self.key_dim * self.value_dim, self.groups,
                query_rows.shape[1], key_rows.shape[1], PACKED=self._table is not None,
                C=_config("walk", self.value_dim, k.element_size()).tile, BLOCK=1024, num_warps=4,
            )  # fmt: skip
        return out

    def _head_decay_gradient(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        do: Tensor,
        log_decay: Tensor,
        states: Tensor,
        d_states: Tensor,
        scale: float,
    ) -> Tensor:
        q, k, v, do = (self._addressable(x) for x in (q, k, v, do))
        config = _config("head_decay", self.key_dim, k.element_size())
        columns = min(config.columns, _power_of_two(self.value_dim))
        blocks = -(-self.value_dim // columns)
        parts = states.new_empty(self.segments, blocks, self.batch, self.heads, self.groups)
        if parts.numel():
            head_decay_kernel[(parts.numel(),)](
                q, k, v, do, parts, log_decay, states, d_states, self._table, float(scale), self.batch, *self._sizes(),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *self._decay_strides(log_decay),
                self.key_dim, self.value_dim, _power_of_two(self.key_dim), columns, config.tile, GROUP=self.groups,
                **self._flags(config),
            )  # fmt: skip
        return parts.sum((0, 1, 2, 4))

    def _addressable(self, x: Tensor) -> Tensor:
        """As it is, unless its last dim has gaps or its segments are too far apart for 32 bits."""
        return x if x.stride(-1) == 1 and x.stride(1) * self._segment_length < 2**31 else x.contiguous()

    def _row_sums(self, kinds: int, blocks: int, heads: int) -> Tensor:
        return torch.empty(kinds, blocks, self.batch, heads, self.tokens, dtype=self.dtype, device=self.device)

    def _sizes(self) -> tuple[int, int, int, int, int]:
        return self.tokens, self._segment_length, self.segments, self.slots, self.heads

    def _decay_strides(self, log_decay: Tensor | None) -> tuple[int, int, int]:
        """Of [B, T, H]; a fixed decay is the same in B and T."""
        if log_decay is None:
            return 0, 0, 0
        return (0, 0, log_decay.stride(0)) if log_decay.ndim == 1 else log_decay.stride()  # type: ignore[return-value]

    def _flags(self, config: Config) -> dict[str, object]:
        return {
            "DECAY": self._decay,
            "PACKED": self._table is not None,
            "LOW": self._low,
            "PRECISION": self._precision,
            "STAGES": config.stages,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


def _check_supported(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    """Raise `ValueError` for what these kernels do not do; `launch.check_inputs` has seen to the rest."""
    if k.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the Triton kernels take fp32, fp16 or bf16, got {k.dtype}")
    if log_decay is not None and log_decay.ndim == 4:
        raise ValueError("the Triton kernels take log_decay [H] or [B, T, H], got a decay per channel, [B, T, H, K]")
    for name, dim in (("K", k.shape[-1]), ("V", v.shape[-1])):
        if not 16 <= dim <= MAX_DIM:
            raise ValueError(f"the Triton kernels take head dims from 16 to {MAX_DIM}, got {name} = {dim}")
