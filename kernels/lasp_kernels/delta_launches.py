# pyright: reportCallIssue=false, reportArgumentType=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The launches of delta_kernels.py, for calls of one kind; `delta_kernel_steps.DeltaKernelSteps` keeps them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from triton import knobs

from lasp_kernels import delta_channel as channels
from lasp_kernels import delta_kernels as kernels
from lasp_kernels import delta_tiles
from lasp_kernels.launch import Launch, Layout
from lasp_kernels.plan import STRETCH, Config, config_of, power_of_two
from lasp_kernels.shared import Shared

TILES = 4  # that a program looks at for one that is flagged
SCAN_COLUMNS = 16  # of a state, in a program of a scan: few, for a chain of products that fills the card
SCAN_WIDTH, SCAN_STAGES = 32, 2  # columns of a matrix at a time, which lie in shared memory


class Shapes(NamedTuple):
    """Of what the steps make."""

    tiles: tuple[int, ...]  # of one number a tile
    rows: tuple[int, ...]  # one a token of a tile
    squares: tuple[int, ...]  # of matrices between the tokens of a tile
    local: tuple[int, ...]  # of the states of segments
    transition: tuple[int, ...]  # of their matrices
    borders: tuple[int, ...]  # of states at the borders of stretches
    states: tuple[int, ...]  # of those of all tiles, transposed
    d_beta: tuple[int, ...]  # of each block of columns


@lru_cache(maxsize=256)
def shapes_of(shared: Shared) -> Shapes:
    """For calls of one kind."""
    plan, sizes = shared.plan, shared.plan.sizes
    heads, (rows, columns) = (sizes.batch, sizes.heads), shared.state
    tiles, segments = (*heads, plan.all_tiles), shared.segments_shape
    return Shapes(
        tiles,
        (*tiles, plan.walk_tile),
        (*tiles, plan.walk_tile, plan.walk_tile),
        (*segments, rows, columns),
        (*segments, rows, rows),
        (*segments, stretches(shared) + 1, rows, columns),
        (*tiles, columns, rows),
        (value_blocks(shared), *heads, sizes.tokens),
    )


def stretch_tiles(shared: Shared) -> int:
    """How many tiles a stretch has."""
    return STRETCH // shared.plan.walk_tile


def stretches(shared: Shared) -> int:
    """The most stretches that a segment has."""
    return -(-shared.plan.tiles // stretch_tiles(shared))


def value_blocks(shared: Shared) -> int:
    """How many blocks of columns of V a walk is divided into."""
    sizes = shared.plan.sizes
    return -(-sizes.value_dim // _columns(shared, _config(shared, "delta walk", sizes.key_dim), sizes.value_dim))


def key_blocks(shared: Shared) -> int:
    """How many blocks of columns of K the walks for dq and dk are divided into."""
    sizes = shared.plan.sizes
    return -(-sizes.key_dim // _columns(shared, _config(shared, "delta gradient", sizes.value_dim), sizes.key_dim))


def prepare_launch(
    shared: Shared, groups: int, scale: float, q: Layout, k: Layout, log_decay: Layout | None, beta: Layout
) -> Launch:
    """The launch of `delta_prepare_kernel`."""
    sizes, config = shared.plan.sizes, _config(shared, "delta prepare", shared.plan.sizes.key_dim)
    strides = (*_strides(q, k), *((0, 0, 0) if log_decay is None else log_decay[0]), *beta[0])
    return Launch(
        kernels.delta_prepare_kernel, shared.device, _of_tiles(shared), (scale, *_tile_numbers(shared), *strides),
        D=sizes.key_dim, BD=_whole(shared, sizes.key_dim), C=config.tile, GROUP=groups, PACKED=shared.packed,
        SPLIT_SUMS=sizes.itemsize == 4, LOW=shared.low, PRECISION=shared.precision,
        INVERSE=_inverse_precision(shared), num_warps=config.warps,
    )  # fmt: skip


def gate_launch(shared: Shared, groups: int, scale: float, q: Layout, k: Layout, log_decay: Layout) -> Launch:
    """The launch of `delta_gate_kernel`."""
    sizes = shared.plan.sizes
    return Launch(
        channels.delta_gate_kernel, shared.device, _of_tiles(shared),
        (scale, *_tile_numbers(shared), *_strides(q, k, log_decay)), D=sizes.key_dim, BD=power_of_two(sizes.key_dim),
        C=shared.plan.walk_tile, GROUP=groups, PACKED=shared.packed, num_warps=4,
    )  # fmt: skip


def inner_launch(shared: Shared, beta: Layout) -> Launch:
    """The launch of `delta_inner_kernel`."""
    sizes, config = shared.plan.sizes, _config(shared, "delta inner", shared.plan.sizes.key_dim)
    return Launch(
        channels.delta_inner_kernel, shared.device, _of_tiles(shared), (*_tile_numbers(shared), *beta[0]),
        D=sizes.key_dim, BD=min(config.columns, _whole(shared, sizes.key_dim)), C=config.tile, PACKED=shared.packed,
        LOW=shared.low, PRECISION=shared.precision, INVERSE=_inverse_precision(shared), num_warps=config.warps,
    )  # fmt: skip


def flagged_launch(shared: Shared, groups: int, scale: float, q: Layout, k: Layout, log_decay: Layout) -> Launch:
    """The launch of `delta_flagged_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    programs = sizes.batch * sizes.heads * plan.segments * -(-plan.tiles // TILES)
    return Launch(
        channels.delta_flagged_kernel, shared.device, (programs, 1),
        (scale, *_tile_numbers(shared), *_strides(q, k, log_decay)), D=sizes.key_dim,
        BD=min(64, power_of_two(sizes.key_dim)), C=plan.walk_tile, GROUP=groups, TILES=TILES, PACKED=shared.packed,
        num_warps=4,
    )  # fmt: skip


def walk_launch(
    shared: Shared, groups: int, kind: str, scale: float, q: Layout, k: Layout, v: Layout, *, decay: bool, channel: bool
) -> Launch:
    """The launch of `delta_walk_kernel`; `kind` is "maps", "outputs" or "writes"."""
    plan, sizes = shared.plan, shared.plan.sizes
    config = _config(shared, "delta walk", sizes.key_dim)
    columns = _columns(shared, config, sizes.value_dim)
    blocks = value_blocks(shared) + (-(-sizes.key_dim // columns) if kind == "maps" else 0)
    return Launch(
        kernels.delta_walk_kernel, shared.device, (blocks * sizes.batch * sizes.heads * plan.segments, 1),
        (scale, *_numbers(shared), *_strides(q, k, v)), DK=sizes.key_dim, DV=sizes.value_dim,
        BK=_whole(shared, sizes.key_dim), BV=columns, C=config.tile, GROUP=groups, STRETCH=stretch_tiles(shared),
        DECAY=decay, CHANNEL=channel, TMA=_moves(shared, q, k, v), **shared.product_flags(config),
    )  # fmt: skip


def reverse_walk_launch(
    shared: Shared, groups: int, scale: float, q: Layout, k: Layout, do: Layout, *, decay: bool, channel: bool
) -> Launch:
    """The launch of `delta_reverse_walk_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    config = _config(shared, "delta walk", sizes.key_dim)
    programs = value_blocks(shared) * sizes.batch * sizes.heads * plan.segments
    return Launch(
        kernels.delta_reverse_walk_kernel, shared.device, (programs, 1),
        (scale, *_numbers(shared), *_strides(q, k, do)), DK=sizes.key_dim, DV=sizes.value_dim,
        BK=_whole(shared, sizes.key_dim), BV=_columns(shared, config, sizes.value_dim), C=config.tile, GROUP=groups,
        STRETCH=stretch_tiles(shared), DECAY=decay, CHANNEL=channel, TMA=_moves(shared, q, k, do),
        **shared.product_flags(config),
    )  # fmt: skip


def gradient_launch(
    shared: Shared, groups: int, of_keys: bool, scale: float, q: Layout, k: Layout, do: Layout, *, decay: bool
) -> Launch:
    """The launch of `delta_key_walk_kernel` (`of_keys`) or `delta_query_walk_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    config = _config(shared, "delta gradient", sizes.value_dim)
    programs = key_blocks(shared) * sizes.batch * sizes.heads * plan.segments * stretches(shared)
    programs *= 1 if of_keys else 2
    numbers = (sizes.batch, sizes.tokens, plan.segment_length, plan.segments, plan.all_tiles, stretches(shared))
    return Launch(
        kernels.delta_key_walk_kernel if of_keys else kernels.delta_query_walk_kernel, shared.device, (programs, 1),
        (scale, *numbers, sizes.heads, *_strides(q, k, do)), DK=sizes.key_dim, DV=sizes.value_dim,
        BK=_columns(shared, config, sizes.key_dim), BV=_whole(shared, sizes.value_dim), C=config.tile, GROUP=groups,
        STRETCH=stretch_tiles(shared), DECAY=decay, SPLIT_SUMS=sizes.itemsize == 4, TMA=_moves(shared, q, k, do),
        **shared.product_flags(config),
    )  # fmt: skip


def channel_gradient_launch(shared: Shared, of_keys: bool, scale: float, do: Layout) -> Launch:
    """The launch of `delta_channel_key_walk_kernel` (`of_keys`) or `delta_channel_query_walk_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    config = _config(shared, "delta channel gradient", sizes.value_dim)
    columns = channel_columns(shared)
    programs = -(-sizes.key_dim // columns) * sizes.batch * sizes.heads * plan.segments * stretches(shared)
    programs *= 1 if of_keys else 2
    numbers = (sizes.batch, sizes.tokens, plan.segment_length, plan.segments, plan.all_tiles, stretches(shared))
    numbers = (*numbers, sizes.heads, *_strides(do))
    return Launch(
        channels.delta_channel_key_walk_kernel if of_keys else channels.delta_channel_query_walk_kernel,
        shared.device, (programs, 1), numbers if of_keys else (scale, *numbers), DK=sizes.key_dim, DV=sizes.value_dim,
        BK=columns, BV=_whole(shared, sizes.value_dim), C=config.tile, STRETCH=stretch_tiles(shared),
        **shared.product_flags(config),
    )  # fmt: skip


def tile_gradient_launch(shared: Shared, scale: float, do: Layout) -> Launch:
    """The launch of `delta_tile_gradient_kernel`."""
    sizes, config = shared.plan.sizes, _config(shared, "delta tile gradient", shared.plan.sizes.value_dim)
    columns = _columns(shared, config, sizes.key_dim)
    return Launch(
        delta_tiles.delta_tile_gradient_kernel, shared.device,
        (-(-sizes.key_dim // columns) * _of_tiles(shared)[0], 1), (scale, *_tile_numbers(shared), *_strides(do)),
        DK=sizes.key_dim, DV=sizes.value_dim, BK=columns, BV=_whole(shared, sizes.value_dim), C=config.tile,
        PACKED=shared.packed, LOW=shared.low, PRECISION=shared.precision, SPLIT=sizes.itemsize == 2,
        num_warps=config.warps,
    )  # fmt: skip


def flagged_gradient_launch(
    shared: Shared, groups: int, scale: float, q: Layout, k: Layout, log_decay: Layout, do: Layout
) -> Launch:
    """The launch of `delta_flagged_gradient_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    columns = channel_columns(shared)
    programs = -(-sizes.key_dim // columns) * sizes.batch * sizes.heads * plan.segments * -(-plan.tiles // TILES)
    return Launch(
        channels.delta_flagged_gradient_kernel, shared.device, (programs, 1),
        (scale, *_tile_numbers(shared), *_strides(q, k, log_decay, do)), DK=sizes.key_dim, DV=sizes.value_dim,
        BK=columns, BV=min(64, power_of_two(sizes.value_dim)), C=plan.walk_tile, GROUP=groups, TILES=TILES,
        PACKED=shared.packed, LOW=shared.low, PRECISION=shared.precision, num_warps=4,
    )  # fmt: skip


def channel_columns(shared: Shared) -> int:
    """How many columns of K a program of the gradients has, with a decay per channel."""
    sizes = shared.plan.sizes
    return _columns(shared, _config(shared, "delta channel gradient", sizes.value_dim), sizes.key_dim)


def decay_launch(shared: Shared, log_decay: Layout) -> Launch:
    """The launch of `delta_decay_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    return Launch(
        kernels.delta_decay_kernel, shared.device,
        (sizes.batch * sizes.heads * plan.segments * stretches(shared), 1),
        (sizes.batch, sizes.tokens, plan.segment_length, plan.segments, stretches(shared), sizes.heads, *log_decay[0]),
        SIZE=sizes.key_dim * sizes.value_dim, BLOCKS=key_blocks(shared), C=plan.walk_tile,
        STRETCH=stretch_tiles(shared), PACKED=shared.packed, BLOCK=1024, num_warps=4,
    )  # fmt: skip


@lru_cache(maxsize=256)
def scan_launch(
    runs: int, segments: int, slots: int, heads: int, key_dim: int, value_dim: int, device: torch.device,
    reverse: bool, transposed: bool, packed: bool, products: bool, given: tuple,
) -> Launch:  # fmt: skip
    """Of `delta_scan_kernel`, for a scan and a fold alike; `products`: also those of the matrices. `given` tells apart
    what is compiled by itself: which tensors there are and how they lie."""
    rows = power_of_two(key_dim)
    width = min(rows, SCAN_WIDTH)
    blocks = -(-value_dim // SCAN_COLUMNS) + (-(-key_dim // SCAN_COLUMNS) if products else 0)
    return Launch(
        kernels.delta_scan_kernel, device, (runs * heads, blocks), (segments, slots, heads), DK=key_dim, DV=value_dim,
        BK=rows, BV=SCAN_COLUMNS, PARTS=rows // width, REVERSE=reverse, TRANSPOSED=transposed, PACKED=packed,
        PRECISION="ieee" if knobs.runtime.interpret else "tf32x3", STAGES=1 if rows > 128 else SCAN_STAGES,
        num_warps=4,
    )  # fmt: skip


def _config(shared: Shared, name: str, dim: int) -> Config:
    config = config_of(name, dim, shared.plan.sizes.itemsize)
    # Cards without TMA have less shared memory than the 220 KiB that two stages need here.
    return config if shared.plan.sizes.has_tma or name != "delta channel gradient" else config._replace(stages=1)


def _columns(shared: Shared, config: Config, width: int) -> int:
    """Of a block. Of 2-byte numbers no fewer than the tensor cores of a warp group have rows (see plan.CONFIGS)."""
    return config.columns if shared.plan.sizes.itemsize == 2 else min(config.columns, power_of_two(width))


def _whole(shared: Shared, dim: int) -> int:
    """All of a dim as one block."""
    return max(power_of_two(dim), 64 if shared.plan.sizes.itemsize == 2 else 16)


def _inverse_precision(shared: Shared) -> str:
    """The precision of the fp32 products that invert a tile's matrix: TF32 unless inputs are fp32."""
    return "ieee" if knobs.runtime.interpret or shared.low == tl.float32 else "tf32"


def _moves(shared: Shared, *layouts: Layout) -> bool:
    sizes = shared.plan.sizes
    return shared.moves(*layouts, *(shared.fresh(sizes.heads, width) for width in shared.state))


def _of_tiles(shared: Shared) -> tuple[int, int]:
    """Programs of a grid over all tiles."""
    plan, sizes = shared.plan, shared.plan.sizes
    return sizes.batch * sizes.heads * plan.segments * plan.tiles, 1


def _tile_numbers(shared: Shared) -> tuple[int, ...]:
    """What kernels take whose programs have tiles."""
    plan, sizes = shared.plan, shared.plan.sizes
    return sizes.batch, sizes.tokens, plan.segment_length, plan.tiles, plan.all_tiles, sizes.heads


def _numbers(shared: Shared) -> tuple[int, ...]:
    plan, sizes = shared.plan, shared.plan.sizes
    counts = (plan.segment_length, plan.segments, plan.slots, plan.all_tiles, stretches(shared))
    return sizes.batch, sizes.tokens, *counts, sizes.heads


def _strides(*layouts: Layout) -> tuple[int, ...]:
    """The strides of the batch, of tokens and of heads."""
    return tuple(n for layout in layouts for n in layout[0][:3])
