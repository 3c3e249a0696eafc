# pyright: reportCallIssue=false, reportArgumentType=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""What calls of one kind share: the plan, the launch of every kernel, and the tables of packed sequences."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple, TypeAlias

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from lasp_kernels.gradient import backward_walk_kernel, head_decay_kernel, token_decay_kernel
from lasp_kernels.launch import Launch, Layout, fits_tma
from lasp_kernels.normaliser import normaliser_kernel
from lasp_kernels.output import forward_walk_kernel
from lasp_kernels.plan import (
    MIN_BLOCK,
    Blocks,
    Config,
    Plan,
    Sizes,
    most_pieces,
    power_of_two,
    run_starts,
    segment_table,
)
from lasp_kernels.state import fold_kernel, scan_kernel, segment_state_kernel, tile_decay_kernel

BLOCK = 512  # numbers of a state that a program of a scan or a fold has
WalkLayouts: TypeAlias = tuple[Layout, Layout, Layout, Layout, Layout | None, Layout | None]
UNSET: Layout = ((0, 0, 0, 0), True)  # of a tensor that is not there


class Key(NamedTuple):
    """All that steps depend on: calls with the same share them."""

    sizes: Sizes
    dtype: torch.dtype
    decay_dtype: torch.dtype | None
    device: torch.device
    allow_tf32: bool


class Shared:
    """What all calls with the same key share."""

    def __init__(self, key: Key):
        self.key, self.device, self.dtype = key, key.device, key.dtype
        self.plan = plan = Plan.of(key.sizes)
        sizes = key.sizes
        self.launches: dict[tuple, Launch] = {}
        self.packed = sizes.bounds is not None
        # As kernels take them.
        self.numbers = (sizes.tokens, plan.segment_length, plan.segments, plan.slots, sizes.heads)
        self.dims = (sizes.key_dim, sizes.value_dim)
        self.state = (sizes.key_dim, sizes.value_dim + sizes.normalize)
        self.states_shape = (sizes.batch, sizes.heads, plan.slots, *self.state)
        self.ends_shape = (plan.runs, sizes.heads, *self.state)
        self.segments_shape = (sizes.batch, sizes.heads, plan.segments)
        self.pieces_shape = (*self.segments_shape, plan.pieces, *self.state)
        tokens, queries = (sizes.batch, sizes.tokens), sizes.heads * sizes.groups
        self.query_shapes = ((*tokens, queries, sizes.value_dim), (*tokens, queries, sizes.key_dim))  # of o and dq
        self.norm_shape = (sizes.batch, queries, sizes.tokens)  # of the denominators of a normaliser
        self.key_shape, self.value_shape = ((*tokens, sizes.heads, dim) for dim in self.dims)
        self.key_at = self.fresh(sizes.heads, sizes.key_dim)  # how what is made in that shape lies
        low = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[key.dtype]
        # The interpreter's product of bf16 operands is wrong: upcast there.
        upcast = knobs.runtime.interpret and key.dtype == torch.bfloat16
        self.low = tl.float32 if upcast else low
        self.precision = "tf32" if key.allow_tf32 else "ieee"

    def flags(self, config: Config) -> dict[str, object]:
        """Constants and options that most kernels have."""
        sizes = self.key.sizes
        form = {"DECAY": sizes.decay, "SHARE": sizes.share, "NORMALIZE": sizes.normalize}
        return {**form, **self.product_flags(config)}

    def product_flags(self, config: Config) -> dict[str, object]:
        """Of all kernels with matrix products."""
        return {
            "PACKED": self.packed,
            "LOW": self.low,
            "PRECISION": self.precision,
            "STAGES": config.stages,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    def of(self, **changes: object) -> Shared:
        """For other sizes."""
        return shared_by(self.key._replace(sizes=self.key.sizes._replace(**changes)))

    @cached_property
    def of_keys(self) -> Shared:
        """For the gradients of k and v; see `TritonSteps.of_keys`."""
        sizes = self.key.sizes
        return self if sizes.segment_length or sizes.decay_gradient or not sizes.paired else self.of(for_keys=True)

    @property
    def _tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Not made with the rest, which the compiler's stand-ins make, too."""
        bounds = self.key.sizes.bounds
        return (None, None) if bounds is None else _segment_tables(bounds, self.plan.segment_length, self.device)

    @cached_property
    def table(self) -> Tensor | None:
        """Of packed sequences: first token, end and run of each segment; int32."""
        return self._tables[0]

    @cached_property
    def run_starts(self) -> Tensor | None:
        """Of packed sequences: the first segment of each run; int32."""
        return self._tables[1]

    @cached_property
    def segment_tokens(self) -> Tensor:
        """Tokens of each segment, fp32, on the device."""
        if self.table is not None:
            return self.table.view(-1, 3)[:, :2].diff(dim=1).view(-1).float()
        starts = torch.arange(self.plan.segments, device=self.device) * self.plan.segment_length
        return (self.key.sizes.tokens - starts).clamp(max=self.plan.segment_length).float()

    def states_launch(
        self, reverse: bool, skipped: int, scale: float, y: Layout, z: Layout, log_decay: Layout | None
    ) -> Launch:
        """Of `segment_state_kernel`."""
        plan, sizes = self.plan, self.key.sizes
        config, columns, blocks, rows = plan.state_blocks()
        programs = blocks * sizes.batch * sizes.heads * (plan.segments - skipped) * plan.pieces
        numbers = (
            float(scale), sizes.batch, *self.numbers, plan.piece_length, plan.pieces, skipped,
            *y[0][:3], *z[0][:3], *_decay_strides(log_decay),
        )  # fmt: skip
        return Launch(
            segment_state_kernel, self.device, (programs, 1), numbers, DY=sizes.key_dim, DZ=sizes.value_dim,
            BY=rows, BZ=columns, C=config.tile, GROUP=sizes.groups if reverse else 1, REVERSE=reverse,
            **self.flags(config),
        )  # fmt: skip

    def keep(self, key: tuple, launch: Launch) -> Launch:
        """For the next call whose inputs lie alike."""
        self.launches[key] = launch
        return launch

    def scan_launch(self, reverse: bool, skipped: int) -> Launch:
        """Of `scan_kernel`."""
        plan, sizes = self.plan, self.key.sizes
        size = self.state[0] * self.state[1]
        return Launch(
            scan_kernel, self.device, (plan.runs * sizes.heads, -(-size // BLOCK)),
            (*self.numbers, plan.piece_length, plan.pieces, skipped, size),
            DECAY=sizes.decay, REVERSE=reverse, PACKED=self.packed, CHUNK=most_pieces(sizes.decay), BLOCK=BLOCK,
            num_warps=4,
        )  # fmt: skip

    def forward_launch(
        self, transposed: bool, scale: float, x: Layout, y: Layout, z: Layout, w: Layout | None, decays: Layout | None
    ) -> Launch:
        """Of `forward_walk_kernel`."""
        plan, sizes = self.plan, self.key.sizes
        contracted, width = reversed(self.dims) if transposed else self.dims
        out = self.fresh(sizes.heads * sizes.groups, width)
        moves = self.moves(x, y, z, out)
        config, columns, blocks, _ = plan.walk_blocks(contracted, width, row_sums=w is not None, moves=moves)
        numbers = (
            float(scale), sizes.batch, *self.numbers, *x[0][:3], *y[0][:3], *z[0][:3], *out[0][:3],
            *(w or UNSET)[0][:3], 0 if decays is None else decays[0][0],
        )  # fmt: skip
        programs = blocks * sizes.batch * sizes.heads * sizes.groups * plan.segments
        return Launch(
            forward_walk_kernel, self.device, (programs, 1), numbers, blocks=blocks, DY=contracted, DZ=width,
            BY=power_of_two(contracted), BZ=columns, C=config.tile, GROUP=sizes.groups, TRANSPOSED=transposed,
            SUM_ROWS=w is not None, SPLIT_SUMS=sizes.split_sums, TMA=moves, **self.flags(config),
        )  # fmt: skip

    def backward_launch(self, transposed: bool, scale: float, layouts: WalkLayouts) -> Launch:
        """Of `backward_walk_kernel`, over x, x2, y, z; w and decays where there are such."""
        plan, sizes = self.plan, self.key.sizes
        x, x2, y, z, w, decays = layouts
        contracted, width = reversed(self.dims) if transposed else self.dims
        moves = sizes.groups == 1 and self.moves(x, x2, y, z, self.fresh(sizes.heads, width))
        config, columns, blocks, _ = plan.walk_blocks(contracted, width, row_sums=w is not None, moves=moves)
        numbers = (
            float(scale), sizes.batch, *self.numbers, *x[0][:3], *x2[0][:3], *y[0][:3], *z[0][:3],
            *(w or UNSET)[0][:3], 0 if decays is None else decays[0][0],
        )  # fmt: skip
        programs = (2 if sizes.paired else 1) * blocks * sizes.batch * sizes.heads * plan.segments
        return Launch(
            backward_walk_kernel, self.device, (programs, 1), numbers, blocks=blocks, DY=contracted, DZ=width,
            BY=power_of_two(contracted), BZ=columns, C=config.tile, GROUP=sizes.groups, TRANSPOSED=transposed,
            PAIRED=sizes.paired, SUM_ROWS=w is not None, SPLIT_SUMS=sizes.split_sums, TMA=moves, **self.flags(config),
        )  # fmt: skip

    def tile_decays_launch(self, log_decay: Layout) -> Launch:
        """Of `tile_decay_kernel`."""
        plan, sizes = self.plan, self.key.sizes
        heads = 16  # of a program: they lie side by side
        programs = -(-sizes.heads // heads) * sizes.batch * plan.tiles * plan.segments
        return Launch(
            tile_decay_kernel, self.device, (programs, 1),
            (sizes.batch, sizes.tokens, plan.segment_length, plan.tiles, sizes.heads, *log_decay[0]),
            C=plan.walk_tile, HEADS=heads, PACKED=self.packed, SPLIT_SUMS=sizes.split_sums, num_warps=4,
        )  # fmt: skip

    def token_decay_launch(self, query_blocks: int, key_blocks: int, log_decay: Layout) -> Launch:
        """Of `token_decay_kernel`."""
        plan, sizes = self.plan, self.key.sizes
        return Launch(
            token_decay_kernel, self.device, (sizes.batch * sizes.heads * plan.segments, 1),
            (sizes.batch, *self.numbers, *log_decay[0]),
            SIZE=self.state[0] * self.state[1], GROUP=sizes.groups, Q_BLOCKS=query_blocks, K_BLOCKS=key_blocks,
            PACKED=self.packed, C=plan.walk_tile, BLOCK=1024, num_warps=4,
        )  # fmt: skip

    def head_decay_launch(self, blocks: Blocks, scale: float, layouts: tuple[Layout, ...]) -> Launch:
        """Of `head_decay_kernel`, over q, k, v, do and log_decay."""
        plan, sizes = self.plan, self.key.sizes
        strides = [n for strides, _ in layouts[:4] for n in strides[:3]]
        programs = plan.segments * blocks.count * sizes.batch * sizes.heads * sizes.groups
        return Launch(
            head_decay_kernel, self.device, (programs, 1),
            (float(scale), sizes.batch, *self.numbers, *strides, layouts[4][0][0]),
            DK_=sizes.key_dim, DV_=sizes.value_dim, BK=power_of_two(sizes.key_dim), BV=blocks.columns,
            C=blocks.config.tile, GROUP=sizes.groups, **self.flags(blocks.config),
        )  # fmt: skip

    def normaliser_launch(self, scale: float, o: Layout, do: Layout) -> Launch:
        """Of `normaliser_kernel`."""
        sizes, tokens = self.key.sizes, 32  # of a program
        heads = sizes.heads * sizes.groups
        return Launch(
            normaliser_kernel, self.device, (-(-sizes.tokens // tokens) * heads * sizes.batch, 1),
            (float(scale), sizes.batch, sizes.tokens, heads, *o[0][:3], *do[0][:3]),
            V=sizes.value_dim, BV=power_of_two(sizes.value_dim), C=tokens, num_warps=4,
        )  # fmt: skip

    def fresh(self, heads: int, width: int) -> Layout:
        """Of a tensor [B, T, heads, width] that is made here."""
        return (self.key.sizes.tokens * heads * width, heads * width, width, 1), True

    def moves(self, *layouts: Layout) -> bool:
        """Whether TMA can move them; heads that are narrower than any block of a product are loaded without it."""
        sizes, wide = self.key.sizes, min(self.dims) >= MIN_BLOCK
        return sizes.has_tma and wide and all(fits_tma(x, sizes.itemsize) for x in layouts)


@lru_cache(maxsize=64)
def _segment_tables(bounds: tuple[int, ...], segment_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`segment_table` and `run_starts` on the device."""
    table = [n for row in segment_table(bounds, segment_length) for n in row]
    # One copy to the device, from pinned memory, so that the host need not wait for it.
    host = torch.tensor(table + run_starts(bounds, segment_length), dtype=torch.int32)
    if device.type == "cuda":
        host = host.pin_memory()
    both = host.to(device, non_blocking=True)
    return both[: len(table)], both[len(table) :]


@lru_cache(maxsize=256)
def shared_by(key: Key) -> Shared:
    """One object for all calls with the same key."""
    return Shared(key)


@lru_cache(maxsize=256)
def fold_launch(shape: torch.Size, device: torch.device, decays: bool, aligned: tuple[bool, ...]) -> Launch:
    """For states of a shape; one launch for each device and alignment, which Triton compiles for."""
    units, runs, heads, rows, columns = shape
    size = rows * columns
    return Launch(fold_kernel, device, (runs * heads, -(-size // BLOCK)), (units, size), DECAY=decays, BLOCK=BLOCK)


def _decay_strides(log_decay: Layout | None) -> tuple[int, ...]:
    """Of [B, T, H]; a fixed decay is the same in B and T."""
    if log_decay is None:
        return 0, 0, 0
    strides = log_decay[0]
    return (0, 0, *strides) if len(strides) == 1 else strides
