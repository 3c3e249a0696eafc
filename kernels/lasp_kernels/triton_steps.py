# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The steps of `reference.ChunkedSteps`, on Triton kernels: segments, launches, and the table of their settings.

Inputs are fp32, fp16 or bf16, on any strides with the last dim contiguous; decays None, [H] or [B, T, H]. Results
are the same bits every time. What the kernels do is in state.py (states, scan), output.py (o, dq) and gradient.py.
"""

from __future__ import annotations

import copy
import math
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp_kernels.gradient import backward_walk_kernel, head_decay_kernel, token_decay_kernel
from lasp_kernels.output import forward_walk_kernel
from lasp_kernels.state import fold_kernel, scan_kernel, segment_state_kernel, tile_decay_kernel

MAX_DIM = 256
MIN_SEGMENT = 256  # a program reads a state of 32 KiB: for fewer tokens than this it would not pay
MIN_PAIR = 2048  # the fewest tokens that are cut in two, where no state is needed for one
DECAY_SEGMENT = 1024  # for a gradient of a decay per token, whose rounding noise grows with the segment
STATE_SHARE = 0.05  # but no shorter than this: the share of a segment's state in the memory of its dq, dk and dv
PIECES = 2  # of a segment, one for each program of the state kernel
HEAD_PIECES, PIECE = 8, 2048  # with a decay per head, where a few heads have all the work: up to 8, of so many tokens
END_PIECE = 2048  # where other ranks wait for it (`of_end`), however many


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
# Two stages of wide heads are for cards with less shared memory; and with a decay per token fewer blocks of columns
# work out the decays between a tile's tokens. Row sums read one more tensor; with them two stages are faster for all
# heads: two programs then share a multiprocessor, and one sums while the other's products run.
# ptxas 12.8, which comes with Triton 3.6, reads shared memory at wrong places for some blocks of 16 or 32 columns of
# 2-byte numbers: without TMA, and with 8 warps (docs/kernels.md).
NARROW, WIDE, SHORT, FP32, FP32_WIDE = (Config(64, 0, 64, 4, 4), Config(64, 0, 32, 4, 3), Config(64, 0, 64, 4, 2),
                                        Config(16, 0, 32, 8, 2), Config(16, 0, 16, 8, 2))  # fmt: skip
CONFIGS: dict[str, tuple[Config, Config, Config, Config]] = {
    "state": (Config(64, 128, 64, 4, 3),) * 2 + (Config(32, 64, 64, 4, 2),) * 2,
    "end": (Config(64, 64, 64, 4, 4),) * 2 + (Config(32, 64, 64, 4, 2),) * 2,  # more programs, for `of_end`
    "walk": (NARROW, WIDE, FP32, FP32_WIDE),
    "short walk": (NARROW, SHORT, FP32, FP32_WIDE),  # without TMA, or with a decay per token
    "row-sum walk": (SHORT, SHORT, FP32, FP32_WIDE),
    "head_decay": (Config(64, 0, 64, 8, 2), Config(64, 0, 32, 8, 1), Config(16, 0, 32, 8, 1), Config(16, 0, 16, 8, 1)),
}  # all walks on one dtype have the same tile: the decays and row sums of its tokens go from one kernel to another


def _power_of_two(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _config(name: str, dim: int, itemsize: int) -> Config:
    return CONFIGS[name][2 * (itemsize == 4) + (dim > 128)]


@lru_cache
def _blocks(name: str, contracted: int, width: int, itemsize: int, moves: bool) -> tuple[Config, int, int]:
    """How a walk runs, the columns of z (of `width`) that one program takes, and the number of such blocks.

    `moves` is whether TMA brings the tiles.
    """
    config = _config(name, contracted, itemsize)
    columns = config.columns
    if moves or itemsize == 4:  # else no fewer, see CONFIGS
        columns = min(columns, _power_of_two(width))
    return config, columns, -(-width // columns)


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the card; on a CPU (interpreter) as if there were 8."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@lru_cache
def _has_tma(device: torch.device) -> bool:
    """Whether the card has the copy engine for tiles (Hopper and later); the interpreter acts as if it had."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where programs put the descriptors that they make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _fits_tma(x: Tensor) -> bool:
    """A descriptor needs addresses and strides that are multiples of 16 bytes, and rows that do not coincide."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return aligned and x.stride(1) > 0


@dataclass(frozen=True)
class Segments:
    """What the pieces of each segment do to a state that passes through; `TritonSteps.scan` folds them."""

    pieces: Tensor  # [B, H, segments, pieces, K, V] fp32, see state.py
    log_decay: Tensor | None  # as given
    log_total: Tensor | None  # [B, H, segments, pieces] fp32, for a decay per token
    skipped: int  # segments at the end (reversed: the start) that are left out: 0 or 1


_thread = threading.local()


@lru_cache(maxsize=64)
def _segment_table(bounds: tuple[int, ...], segment_length: int, device: torch.device) -> tuple[Tensor, ...]:
    """For packed sequences: first token, end and run of each segment; the first segment of each run."""
    table, run_starts = [], [0]
    for run, (first, end) in enumerate(zip(bounds, bounds[1:])):
        for t in range(first, end, segment_length):
            table += [t, min(t + segment_length, end), run]
        run_starts.append(len(table) // 3)
    # One copy to the device, from pinned memory, so that the host need not wait for it.
    host = torch.tensor(table + run_starts, dtype=torch.int32)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True).split([len(table), len(run_starts)])


class _Launch:
    """A kernel with its grid and all of its arguments but the tensors.

    Triton's own way to start a kernel looks at each argument to decide whether it must compile; for forty of them
    this takes longer than a short kernel. So it is taken once, and from then on the compiled kernel is started
    directly. The owner sees to it that tensors of one launch are alike in all that Triton looks at (`_start`).
    """

    def __init__(self, kernel: Any, programs: tuple[int, int], numbers: tuple, **settings: object):
        """`settings` are the kernel's constants and Triton's options (num_warps, ...); numbers precede constants."""
        constants = (settings.pop(name) for name in kernel.arg_names if name in settings)
        self._arguments = (*numbers, *constants)
        self._kernel, self._grid, self._options = kernel, (*programs, 1), settings
        self._compiled: Callable | None = None

    def __call__(self, tensors: tuple[Tensor | None, ...], device: torch.device) -> None:
        """Start it on the device of the tensors; Triton would take the current one."""
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return self(tensors, device)
        if self._compiled is not None:
            self._compiled(*tensors, *self._arguments)
        elif 0 not in self._grid:
            compiled = self._kernel[self._grid](*tensors, *self._arguments, **self._options)
            if compiled is not None:  # as it is under the interpreter
                self._compiled = compiled[self._grid]


class _Inputs(NamedTuple):
    """All that steps depend on: calls with the same share them."""

    q: torch.Size
    k: torch.Size
    v: torch.Size
    token_stride: int  # the longest
    dtype: torch.dtype
    device: torch.device
    decay: tuple[int, torch.dtype] | None  # dims and dtype of log_decay
    bounds: tuple[int, ...] | None  # of packed sequences
    segment_length: int | None
    decay_gradient: bool
    ends: bool
    allow_tf32: bool
    piece_length: int | None = None
    for_keys: bool = False


class TritonSteps:
    """The steps of forward and backward on one rank, for inputs of one shape; see `reference.ChunkedSteps`.

    `states` and `d_states` are buffers as in state.py. Gradients have the dtype of the inputs. With
    `decay_gradient` the steps query_gradient and key_value_gradient also keep the row sums that the step of that
    name needs; it must follow in the same backward. Without `ends` no state enters and the one behind the last token
    (reversed: before the first) is not wanted: `scan` then returns None for it, and, if there is a single segment, a
    buffer of no states. With a given `segment_length` a segment is not cut into pieces, so that one rank and
    several fold the same maps (`maps`).
    """

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        *,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        segment_length: int | None = None,
        decay_gradient: bool = False,
        ends: bool = True,
    ) -> TritonSteps:
        """For these inputs. A `cu_seqlens` tensor on a GPU is waited for; a tuple is not.

        fp32 products use TF32 if PyTorch's own may (`torch.set_float32_matmul_precision`).
        """
        _check_supported(q, k, v, log_decay)
        bounds = None
        if cu_seqlens is not None:
            bounds = tuple(cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens)
        stride = max(x.shape[2] * MAX_DIM if x.stride(-1) != 1 else x.stride(1) for x in (q, k, v))
        if log_decay is not None and log_decay.ndim == 3:
            stride = max(stride, log_decay.stride(1))
        tf32 = k.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        decay = None if log_decay is None else (log_decay.ndim, log_decay.dtype)
        # Sizes as plain numbers: under torch.compile they may be symbols, which would not find what was kept.
        shapes = [torch.Size(map(int, x.shape)) for x in (q, k, v)]
        steps = _shared_steps(
            _Inputs(*shapes, int(stride), k.dtype, k.device, decay, bounds, segment_length, decay_gradient, ends, tf32)
        )
        if steps._keep_rows:  # these belong to one call
            steps = copy.copy(steps)
            steps._rows = {}
        return steps

    def __init__(self, inputs: _Inputs):
        self.batch, self.tokens, self.heads, self.key_dim = inputs.k
        self.value_dim = inputs.v[-1]
        self.groups = inputs.q[2] // self.heads
        self.device, self.input_dtype, self.dtype = inputs.device, inputs.dtype, torch.float32
        self._decay = 0 if inputs.decay is None else {1: 1, 3: 2}[inputs.decay[0]]
        self._tma = _has_tma(self.device)
        self._most_pieces = HEAD_PIECES if self._decay == 1 else PIECES  # of a segment
        self._keep_rows = inputs.decay_gradient and self._decay == 2
        self._rows: dict[str, Tensor] = {}
        self._launches: dict[tuple, _Launch] = {}
        low = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[inputs.dtype]
        # The interpreter's product of bf16 operands is wrong: upcast there.
        upcast = triton.knobs.runtime.interpret and inputs.dtype == torch.bfloat16
        self._low = tl.float32 if upcast else low
        self._precision = "tf32" if inputs.allow_tf32 else "ieee"
        # Kernels address the tokens of a segment with 32 bits.
        longest = 2**31 // max(inputs.token_stride, inputs.q[2] * MAX_DIM) // 64 * 64
        self._inputs = inputs
        self._segment_length = min(inputs.segment_length or self._choose_segment_length(), longest)
        self.runs = self.batch
        self._bounds = inputs.bounds
        if inputs.bounds is not None:
            self._pack(inputs.bounds)
        else:
            self.segments = -(-self.tokens // self._segment_length)
            self.slots = self.segments + 1
            self._run_segments = [(0, self.segments)]
        self._piece_length = min(self._segment_length, self._choose_piece_length())
        self._pieces = -(-self._segment_length // self._piece_length)
        self._skippable = int(not inputs.decay_gradient and inputs.bounds is None and self.segments > 0)
        self._skipped = 0 if inputs.ends else self._skippable
        if self._skipped and self.segments == 1:  # nothing enters it, nothing leaves it
            self.slots = 0

    def _choose_segment_length(self) -> int:
        """As long as it may be, for a state kernel that reads little, with a program of a walk on every processor.

        Where their number is a little more than a multiple of the processors, the last ones would run almost alone:
        then rather more and shorter segments. Two short ones are slower than one, which needs neither states nor scan.
        """
        name = "short walk" if self._decay == 2 or not self._tma else "walk"
        columns = _config(name, max(self.key_dim, self.value_dim), self.input_dtype.itemsize).columns
        programs = max(1, self.batch * self.heads * self.groups * -(-self.value_dim // columns))
        programs *= 2 if self._inputs.for_keys else 1
        processors = _processors(self.device)
        fewest = max(1, processors // programs)

        def busy(segments: int) -> float:
            return programs * segments / (-(-programs * segments // processors) * processors)

        wanted = next((n for n in range(fewest, 4 * fewest + 1) if busy(n) > 0.9), fewest)
        length = max(MIN_SEGMENT, -(-self.tokens // wanted))
        if self._keep_rows:
            token_bytes = (2 * self.key_dim + self.value_dim) * self.input_dtype.itemsize
            state_bytes = 4 * self.key_dim * self.value_dim
            length = min(length, max(DECAY_SEGMENT, math.ceil(state_bytes / (STATE_SHARE * token_bytes))))
        alone = not (self._inputs.ends or self._inputs.decay_gradient or self._inputs.bounds)
        if alone and length < self.tokens < MIN_PAIR and self.tokens <= 2 * length:
            length = self.tokens
        return -(-length // 64) * 64

    def _choose_piece_length(self) -> int:
        """Enough pieces to have programs for every processor, and few, since the scan reads a state for each."""
        given = self._inputs.piece_length or self._inputs.segment_length
        if given:
            return given
        # Segments' worth of tokens: of packed sequences there may be many that are almost empty.
        segments = self.batch * self.heads * -(-self.tokens // self._segment_length)
        if self._decay != 1 and segments >= 2 * _processors(self.device):
            return self._segment_length
        pieces = min(self._most_pieces, max(PIECES, self._segment_length // PIECE))
        return -(-self._segment_length // (64 * pieces)) * 64

    def _pack(self, bounds: tuple[int, ...]) -> None:
        """Cut each run for itself."""
        ends = list(accumulate(-(-(b - a) // self._segment_length) for a, b in zip(bounds, bounds[1:])))
        self._run_segments = list(zip([0, *ends], ends))
        self.runs, self.segments = len(bounds) - 1, ends[-1]
        self.slots = self.segments + self.runs

    @property
    def segment_length(self) -> int:
        """The most tokens that a segment may have, whatever the number of tokens here."""
        return self._segment_length

    def _start(
        self,
        name: str,
        inputs: tuple[Tensor | None, ...],
        buffers: tuple[Tensor | None, ...],
        prepare: Callable[[], _Launch],
        scale: float = 1.0,
    ) -> None:
        """Start a kernel on inputs, which may lie in memory in any way, and on buffers, which were made here.

        `prepare` is asked once for all calls of these steps with this name and scale and inputs of the same strides and
        alignment.
        """
        layouts = [x if x is None else (x.stride(), x.data_ptr() % 16 == 0) for x in inputs]
        key = (name, scale, *layouts, *[x is None for x in buffers])
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = prepare()
        # Triton keeps the allocator by thread; backward has one of its own.
        if self._tma and not hasattr(_thread, "has_allocator"):
            triton.set_allocator(_scratch)
            _thread.has_allocator = True
        launch((*inputs, *buffers), self.device)

    @property
    def _tables(self) -> tuple[Tensor, ...]:
        """`_segment_table` of packed sequences. Not made with the steps, which the compiler's stand-ins make, too."""
        assert self._bounds is not None
        return _segment_table(self._bounds, self._segment_length, self.device)

    @property
    def _table(self) -> Tensor | None:
        return None if self._bounds is None else self._tables[0]

    @property
    def _run_starts(self) -> Tensor | None:
        return None if self._bounds is None else self._tables[1]

    @cached_property
    def _segment_tokens(self) -> Tensor:
        """Tokens of each segment, fp32, on the device."""
        if self._table is not None:
            return self._table.view(-1, 3)[:, :2].diff(dim=1).view(-1).float()
        starts = torch.arange(self.segments, device=self.device) * self._segment_length
        return (self.tokens - starts).clamp(max=self._segment_length).float()

    def zero_state(self) -> Tensor:
        """A state of zeros for every run: [N, H, K, V]."""
        shape = (self.runs, self.heads, self.key_dim, self.value_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def states_shape(self) -> tuple[int, ...]:
        """Of the states that `scan` returns."""
        return (self.batch, self.heads, self.slots, self.key_dim, self.value_dim)

    def segment_states(self, k: Tensor, v: Tensor, log_decay: Tensor | None, *, needs_end: bool = True) -> Segments:
        """The state at the end of every segment, from zero; of the last only if the state behind it is needed."""
        return self._segments(k, v, log_decay, 1.0, reverse=False, needs_end=needs_end)

    def of_end(self, tokens: int) -> TritonSteps:
        """For the last `tokens` of the inputs alone, to fold them: in more programs, each with less work.

        Where these are all that a state remembers, their map is that of all tokens, and known earlier.
        """
        q, k, v = (torch.Size((self.batch, tokens, *shape[2:])) for shape in self._inputs[:3])
        length = -(-tokens // 64) * 64
        inputs = self._inputs._replace(q=q, k=k, v=v, segment_length=length, piece_length=END_PIECE, ends=True)
        return _shared_steps(inputs)

    def of_keys(self) -> TritonSteps:
        """For the gradients of k and v, whose grid has two programs where the others have one: longer segments.

        Not where the gradient of the decay needs a state and its gradient at the same borders.
        """
        inputs = self._inputs
        if inputs.segment_length or inputs.decay_gradient or not self._paired:
            return self
        return _shared_steps(inputs._replace(for_keys=True))

    def segment_gradients(self, q: Tensor, do: Tensor, log_decay: Tensor | None, scale: float) -> Segments:
        """The gradient of the state before every segment, from zero behind it."""
        return self._segments(q, do, log_decay, scale, reverse=True)

    def _segments(
        self,
        y: Tensor,
        z: Tensor,
        log_decay: Tensor | None,
        scale: float,
        *,
        reverse: bool,
        needs_end: bool = True,
    ) -> Segments:
        y, z = self._addressable(y), self._addressable(z)
        shape = (self.batch, self.heads, self.segments, self._pieces, self.key_dim, self.value_dim)
        pieces = torch.empty(shape if self.slots else (0,), dtype=self.dtype, device=self.device)
        log_total = pieces.new_empty(shape[:4]) if self._decay == 2 else None
        skipped = self._skipped if needs_end else self._skippable

        def prepare() -> _Launch:
            config = _config("end" if self._inputs.piece_length else "state", 0, y.element_size())
            rows = min(config.rows, _power_of_two(self.key_dim))
            columns = min(config.columns, _power_of_two(self.value_dim))
            blocks = -(-self.key_dim // rows) * -(-self.value_dim // columns)
            programs = blocks * self.batch * self.heads * (self.segments - skipped) * self._pieces
            numbers = (
                float(scale), self.batch, *self._sizes(), self._piece_length, self._pieces, skipped,
                *y.stride()[:3], *z.stride()[:3], *self._decay_strides(log_decay),
            )  # fmt: skip
            return _Launch(
                segment_state_kernel, (programs, 1), numbers, DY=self.key_dim, DZ=self.value_dim, BY=rows, BZ=columns,
                C=config.tile, GROUP=self.groups if reverse else 1, REVERSE=reverse, **self._flags(config),
            )  # fmt: skip

        name = ("gradients" if reverse else "states") + (" but one" if skipped else "")
        self._start(name, (y, z, log_decay), (pieces, log_total, self._table), prepare, scale)
        return Segments(pieces, log_decay, log_total, skipped)

    def fold(self, segments: Segments, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """All segments of each run as one map: its local state [N, H, K, V] and log-decay [N, H, 1]."""
        if segments.skipped:
            raise ValueError("a fold needs all segments")
        log_decay = torch.empty(self.runs, self.heads, 1, dtype=self.dtype, device=self.device)
        local_state = self._scan(segments, None, None, reverse, log_decay)
        assert local_state is not None
        return local_state, log_decay

    def maps(self, segments: Segments, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """The segments of the run at the border to the next rank (reversed: the previous), each as one map.

        In the order in which a state passes through them: local states [U, N, H, K, V] and log-decays [U, N, H, 1].
        """
        if self._pieces > 1:
            raise ValueError("maps of segments need a given segment_length")
        low, high = self._run_segments[0 if reverse else -1]
        states = segments.pieces[:, :, low:high, 0].permute(2, 0, 1, 3, 4)
        if segments.log_total is not None:
            log_decay = segments.log_total[:, :, low:high, 0].permute(2, 0, 1)
        elif segments.log_decay is not None:
            log_decay = (self._segment_tokens[low:high, None] * segments.log_decay.float()).unsqueeze(1)
        else:
            log_decay = states.new_zeros(high - low, 1, self.heads)
        log_decay = log_decay.expand(states.shape[:3]).unsqueeze(-1)
        return (states.flip(0), log_decay.flip(0)) if reverse else (states.contiguous(), log_decay.contiguous())

    def scan(
        self, segments: Segments, entering: Tensor | None, *, reverse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """From the state that enters each run [N, H, K, V]: those at all borders, and the one behind all.

        None instead of the last where the segments leave one out.
        """
        states = torch.empty(self.states_shape, dtype=self.dtype, device=self.device)
        return states, self._scan(segments, entering, states, reverse)

    def _scan(
        self,
        segments: Segments,
        entering: Tensor | None,
        states: Tensor | None,
        reverse: bool,
        log_end: Tensor | None = None,
    ) -> Tensor | None:
        if self._skipped and entering is not None:
            raise ValueError("a state that enters must be announced by `ends`")
        if self._skipped and self.segments == 1:
            return None
        skipped = segments.skipped
        shape = (self.runs, self.heads, self.key_dim, self.value_dim)
        end = None if skipped else torch.empty(shape, dtype=self.dtype, device=self.device)
        if entering is not None:
            entering = entering.to(self.dtype).contiguous()
        log_decay = segments.log_decay.contiguous() if self._decay == 1 else None  # else the kernel does not read it

        def prepare() -> _Launch:
            size, block = self.key_dim * self.value_dim, 512
            return _Launch(
                scan_kernel, (self.runs * self.heads, -(-size // block)),
                (*self._sizes(), self._piece_length, self._pieces, skipped, size),
                DECAY=self._decay, REVERSE=reverse, PACKED=self._bounds is not None, CHUNK=self._most_pieces,
                BLOCK=block, num_warps=4,
            )  # fmt: skip

        buffers = (segments.pieces, segments.log_total, states, end, log_end, self._table, self._run_starts)
        name = ("reverse scan" if reverse else "scan") + (" but one" if skipped else "")
        self._start(name, (log_decay, entering), buffers, prepare)
        return end

    def outputs(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        states: Tensor,
        scale: float,
    ) -> Tensor:
        """o [B, T, H*G, V] from the states at the borders of the segments."""
        return self._forward_walk(q, k, v, None, log_decay, states, scale)

    def query_gradient(
        self, q: Tensor, k: Tensor, v: Tensor, do: Tensor, log_decay: Tensor | None, states: Tensor, scale: float
    ) -> Tensor:
        """dq, from the states that `scan` gave in forward."""
        w = q if self._keep_rows else None
        return self._forward_walk(do, v, k, w, log_decay, states, scale, transposed=True)

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
        w = k if self._keep_rows else None
        if self._paired:
            self._backward_walk(k, q, do, dv, w, log_decay, d_states, scale, pair=(v, dk))
        else:
            self._backward_walk(k, q, do, dv, None, log_decay, d_states, scale)
            self._backward_walk(v, do, q, dk, w, log_decay, d_states, scale, transposed=True)
        return dk, dv

    @property
    def _paired(self) -> bool:
        """Whether dk and dv are made in one grid."""
        return self.key_dim == self.value_dim and self.groups == 1

    def _tile_decays(self, log_decay: Tensor | None) -> Tensor | None:
        """What a walk reads of the decays: those per token summed up within tiles, [2, B, H, T] fp32."""
        if log_decay is None or self._decay != 2:
            return log_decay
        if "decays" in self._rows:
            return self._rows["decays"]
        decays = torch.empty(2, self.batch, self.heads, self.tokens, dtype=self.dtype, device=self.device)

        def prepare() -> _Launch:
            tile, heads = _config("walk", 0, self.input_dtype.itemsize).tile, 16  # heads that lie side by side
            runs = [self.tokens] if self._bounds is None else map(operator.sub, self._bounds[1:], self._bounds)
            tiles = -(-min(self._segment_length, max(runs)) // tile)
            programs = -(-self.heads // heads) * self.batch * tiles * self.segments
            return _Launch(
                tile_decay_kernel, (programs, 1),
                (self.batch, self.tokens, self._segment_length, tiles, self.heads, *log_decay.stride()),
                C=tile, HEADS=heads, PACKED=self._bounds is not None, num_warps=4,
            )  # fmt: skip

        self._start("tile decays", (log_decay,), (decays, self._table), prepare)
        return decays

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
        """The outputs, or dq, by the walk of output.py: [B, T, heads of x, columns of z]; with `w` also row sums."""
        x, y, z = self._addressable(x), self._addressable(y), self._addressable(z)
        out = torch.empty(*x.shape[:3], z.shape[-1], dtype=self.input_dtype, device=self.device)
        tiles = (x, y, z, out)
        config, columns, blocks = self._walk(y, z, tiles, rows=w is not None)
        decays = self._tile_decays(log_decay)
        sums = None
        if w is not None:
            w = self._addressable(w)
            self._rows["dq"] = sums = self._row_sums(2, blocks, x.shape[2])
            assert decays is not None
            self._rows["decays"] = decays  # the walks for dk and dv follow

        def prepare() -> _Launch:
            numbers = (
                float(scale), self.batch, *self._sizes(), *x.stride()[:3], *y.stride()[:3], *z.stride()[:3],
                *out.stride()[:3], *((0, 0, 0) if w is None else w.stride()[:3]), self._head_stride(log_decay),
            )  # fmt: skip
            return _Launch(
                forward_walk_kernel, (blocks * self.batch * x.shape[2] * self.segments, 1), numbers,
                DY=y.shape[-1], DZ=z.shape[-1], BY=_power_of_two(y.shape[-1]), BZ=columns, C=config.tile,
                GROUP=self.groups, TRANSPOSED=transposed, SUM_ROWS=w is not None,
                TMA=self._moves(tiles), **self._flags(config),
            )  # fmt: skip

        inputs = (x, y, z, w, decays, states)
        self._start("dq" if transposed else "o", inputs, (out, sums, self._table), prepare, scale)
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
        """dv or dk into `out` by the walk of gradient.py, or with `pair`, the other's x and out, both.

        With `w`, which is k, also the row sums of dk.
        """
        x, y, z = self._addressable(x), self._addressable(y), self._addressable(z)
        x2, out2 = (x, out) if pair is None else (self._addressable(pair[0]), pair[1])
        tiles = (x, x2, y, z, out, out2)
        config, columns, blocks = self._walk(y, z, tiles, rows=w is not None, groups=self.groups)
        decays = self._tile_decays(log_decay)
        sums = None
        if w is not None:
            w = self._addressable(w)
            self._rows["dk"] = sums = self._row_sums(1, blocks, self.heads)

        def prepare() -> _Launch:
            numbers = (
                float(scale), self.batch, *self._sizes(), *x.stride()[:3], *x2.stride()[:3], *y.stride()[:3],
                *z.stride()[:3], *((0, 0, 0) if w is None else w.stride()[:3]), self._head_stride(log_decay),
            )  # fmt: skip
            programs = (1 if pair is None else 2) * blocks * self.batch * self.heads * self.segments
            return _Launch(
                backward_walk_kernel, (programs, 1), numbers,
                DY=y.shape[-1], DZ=z.shape[-1], BY=_power_of_two(y.shape[-1]), BZ=columns, C=config.tile,
                GROUP=self.groups, TRANSPOSED=transposed, PAIRED=pair is not None, SUM_ROWS=w is not None,
                TMA=self.groups == 1 and self._moves(tiles), **self._flags(config),
            )  # fmt: skip

        inputs = (x, x2, y, z, w, decays, d_states)
        name = "dk" if transposed else "dv" if pair is None else "dk, dv"
        self._start(name, inputs, (out, out2, sums, self._table), prepare, scale)

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
        query_rows, key_rows, _ = (self._rows.pop(name) for name in ("dq", "dk", "decays"))
        out = torch.empty(log_decay.shape, dtype=self.dtype, device=self.device)

        def prepare() -> _Launch:
            return _Launch(
                token_decay_kernel, (self.batch * self.heads * self.segments, 1),
                (self.batch, *self._sizes(), *self._decay_strides(log_decay)),
                SIZE=self.key_dim * self.value_dim, GROUP=self.groups, Q_BLOCKS=query_rows.shape[1],
                K_BLOCKS=key_rows.shape[1], PACKED=self._bounds is not None,
                C=_config("walk", self.value_dim, k.element_size()).tile, BLOCK=1024, num_warps=4,
            )  # fmt: skip

        buffers = (query_rows, key_rows, out, self._table)
        self._start("token decay", (log_decay, states, d_states), buffers, prepare)
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
        if columns < 32:  # see CONFIGS
            config = replace(config, warps=4)
        blocks = -(-self.value_dim // columns)
        parts = states.new_empty(self.segments, blocks, self.batch, self.heads, self.groups)

        def prepare() -> _Launch:
            numbers = (
                float(scale), self.batch, *self._sizes(), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *do.stride()[:3], self._head_stride(log_decay),
            )  # fmt: skip
            return _Launch(
                head_decay_kernel, (parts.numel(), 1), numbers, DK_=self.key_dim, DV_=self.value_dim,
                BK=_power_of_two(self.key_dim), BV=columns, C=config.tile, GROUP=self.groups, **self._flags(config),
            )  # fmt: skip

        self._start("head decay", (q, k, v, do, log_decay, states, d_states), (parts, self._table), prepare, scale)
        return parts.sum((0, 1, 2, 4))

    def _moves(self, tiles: tuple[Tensor, ...]) -> bool:
        """Whether TMA can move them."""
        return self._tma and all(map(_fits_tma, tiles))

    def _walk(
        self, y: Tensor, z: Tensor, tiles: tuple[Tensor, ...], *, rows: bool, groups: int = 1
    ) -> tuple[Config, int, int]:
        """`_blocks` of a walk over these tiles, with row sums or not; in the one backwards TMA moves no `groups`."""
        low, high = sorted((self.key_dim, self.value_dim))
        # For the dims between it is all one, and the host has less to do.
        moves = (low > 32 and high <= 128) or (groups == 1 and self._moves(tiles))
        name = "row-sum walk" if rows else "short walk" if self._decay == 2 or not moves else "walk"
        return _blocks(name, y.shape[-1], z.shape[-1], y.element_size(), moves)

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

    def _head_stride(self, log_decay: Tensor | None) -> int:
        """Of [H]; a walk reads those per token as `_tile_decays` leaves them."""
        return log_decay.stride(0) if log_decay is not None and self._decay == 1 else 0

    def _flags(self, config: Config) -> dict[str, object]:
        return {
            "DECAY": self._decay,
            "PACKED": self._bounds is not None,
            "LOW": self._low,
            "PRECISION": self._precision,
            "STAGES": config.stages,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }


@lru_cache(maxsize=256)
def _shared_steps(inputs: _Inputs) -> TritonSteps:
    """One object for all calls with the same inputs, whose launches it keeps."""
    return TritonSteps(inputs)


def fold(entering: Tensor, states: Tensor, log_decay: Tensor) -> Tensor:
    """`entering` [N, H, K, V] through the maps `states` [U, N, H, K, V], `log_decay` [U, N, H, 1], in order; fp32.

    Rounds as the scan does, so that ranks that fold one after another come to the bits of one rank.
    """
    states, log_decay = states.contiguous(), log_decay.contiguous()
    entering = entering.contiguous()
    out = torch.empty_like(entering)
    tensors = (entering, states, log_decay, out)
    _fold_launch(states.shape, out.device, tuple(x.data_ptr() % 16 == 0 for x in tensors))(tensors, out.device)
    return out


@lru_cache(maxsize=256)
def _fold_launch(shape: torch.Size, device: torch.device, aligned: tuple[bool, ...]) -> _Launch:
    """For states of a shape; one launch for each device and alignment, which Triton compiles for."""
    units, runs, heads, rows, columns = shape
    size, block = rows * columns, 512
    return _Launch(fold_kernel, (runs * heads, -(-size // block)), (units, size), BLOCK=block)


def _check_supported(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    """Raise `ValueError` for what these kernels do not do; `launch.check_inputs` has seen to the rest."""
    if k.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"the Triton kernels take fp32, fp16 or bf16, got {k.dtype}")
    if log_decay is not None and log_decay.ndim == 4:
        raise ValueError("the Triton kernels take log_decay [H] or [B, T, H], got a decay per channel, [B, T, H, K]")
    for name, dim in (("K", k.shape[-1]), ("V", v.shape[-1])):
        if not 16 <= dim <= MAX_DIM:
            raise ValueError(f"the Triton kernels take head dims from 16 to {MAX_DIM}, got {name} = {dim}")
