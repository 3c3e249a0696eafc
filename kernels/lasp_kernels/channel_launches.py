# pyright: reportCallIssue=false, reportArgumentType=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The launches of channel.py's kernels, for calls of one kind; `channel_steps.ChannelSteps` keeps them in `Shared`."""

from __future__ import annotations

from lasp_kernels import channel
from lasp_kernels.launch import Launch, Layout
from lasp_kernels.plan import config_of, power_of_two
from lasp_kernels.shared import BLOCK, Shared

TILES = 16  # that a program looks at for one that is flagged


def prepare_launch(shared: Shared, scale: float, q: Layout | None, k: Layout | None, log_decay: Layout) -> Launch:
    """The launch of `channel_prepare_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    config, channels, blocks = _channels(shared, "channel tile", sizes.key_dim)
    programs = blocks * sizes.batch * sizes.heads * plan.segments * plan.tiles
    return Launch(
        channel.channel_prepare_kernel, shared.device, (programs, 1),
        (*_of_tiles(shared, scale), *_strides(q, k, log_decay)),
        D=sizes.key_dim, BD=channels, C=config.tile, PACKED=shared.packed, num_warps=config.warps,
    )  # fmt: skip


def flagged_launch(shared: Shared, scale: float, q: Layout | None, k: Layout, log_decay: Layout) -> Launch:
    """The launch of `channel_flagged_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    programs = sizes.batch * sizes.heads * plan.segments * -(-plan.tiles // TILES)
    return Launch(
        channel.channel_flagged_kernel, shared.device, (programs, plan.walk_tile // 16),
        (*_of_tiles(shared, scale), *_strides(q, k, log_decay)),
        D=sizes.key_dim, BD=power_of_two(sizes.key_dim), C=plan.walk_tile, TILES=TILES, PACKED=shared.packed,
        LOW=shared.low, PRECISION=shared.precision, num_warps=2 if sizes.key_dim > 64 else 1,
    )  # fmt: skip


def state_launch(shared: Shared, reverse: bool, z: Layout) -> Launch:
    """Of `channel_state_kernel`, over k~ or q~ and z."""
    plan, sizes = shared.plan, shared.plan.sizes
    config, columns, blocks, rows = plan.state_blocks()
    numbers = (sizes.batch, sizes.tokens, plan.segment_length, plan.segments, plan.all_tiles, sizes.heads)
    return Launch(
        channel.channel_state_kernel, shared.device, (blocks * sizes.batch * sizes.heads * plan.segments, 1),
        (*numbers, *_strides(shared.key_at, z)), DY=sizes.key_dim, DZ=sizes.value_dim, BY=rows, BZ=columns,
        C=config.tile, REVERSE=reverse, **shared.product_flags(config),
    )  # fmt: skip


def scan_launch(shared: Shared, reverse: bool) -> Launch:
    """The launch of `channel_scan_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    size = sizes.key_dim * sizes.value_dim
    return Launch(
        channel.channel_scan_kernel, shared.device, (plan.runs * sizes.heads, -(-size // BLOCK)),
        (plan.segments, plan.slots, sizes.heads), DY=sizes.key_dim, DZ=sizes.value_dim, REVERSE=reverse,
        PACKED=shared.packed, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def walk_launch(shared: Shared, transposed: bool, x: Layout, y: Layout, z: Layout) -> Launch:
    """The launch of `channel_walk_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    contracted, width = reversed(shared.state) if transposed else shared.state
    moves = shared.moves(x, y, z, shared.fresh(sizes.heads, width))
    config, columns, blocks, _ = plan.channel_blocks("walk", contracted, width, moves=moves)
    return Launch(
        channel.channel_walk_kernel, shared.device, (blocks * sizes.batch * sizes.heads * plan.segments, 1),
        (*_of_segments(shared), *_strides(x, y, z)), DY=contracted, DZ=width, BY=power_of_two(contracted), BZ=columns,
        C=config.tile, TRANSPOSED=transposed, TMA=moves, **shared.product_flags(config),
    )  # fmt: skip


def reverse_walk_launch(shared: Shared, role: int, v: Layout, do: Layout) -> Launch:
    """Of `channel_reverse_walk_kernel`, over k~, q~, v and do."""
    plan, sizes, made = shared.plan, shared.plan.sizes, shared.key_at
    contracted, width = reversed(shared.state) if role == 1 else shared.state
    moves = shared.moves(made, v, do)
    config, columns, blocks, _ = plan.channel_blocks("reverse", contracted, width, moves=moves)
    programs = (2 if role == 2 else 1) * blocks * sizes.batch * sizes.heads * plan.segments
    return Launch(
        channel.channel_reverse_walk_kernel, shared.device, (programs, 1),
        (*_of_segments(shared), *_strides(made, made, v, do)), DY=contracted, DZ=width, BY=power_of_two(contracted),
        BZ=columns, C=config.tile, ROLE=role, TMA=moves, **shared.product_flags(config),
    )  # fmt: skip


def flagged_gradient_launch(shared: Shared, scale: float, layouts: tuple[Layout, ...]) -> Launch:
    """The launch of `channel_flagged_gradient_kernel`, over q, k, v, do and log_decay."""
    plan, sizes = shared.plan, shared.plan.sizes
    channels = min(64, power_of_two(sizes.key_dim))
    blocks = -(-sizes.key_dim // channels)
    programs = blocks * sizes.batch * sizes.heads * plan.segments * -(-plan.tiles // TILES)
    return Launch(
        channel.channel_flagged_gradient_kernel, shared.device, (programs, plan.walk_tile // 16),
        (*_of_tiles(shared, scale), *_strides(*layouts)), D=sizes.key_dim, E=sizes.value_dim, BD=channels,
        BE=min(64, power_of_two(sizes.value_dim)), C=plan.walk_tile, TILES=TILES, PACKED=shared.packed,
        LOW=shared.low, PRECISION=shared.precision, num_warps=1,
    )  # fmt: skip


def finish_launch(shared: Shared, scale: float, q: Layout, k: Layout, log_decay: Layout) -> Launch:
    """The launch of `channel_finish_kernel`."""
    plan, sizes = shared.plan, shared.plan.sizes
    config, channels, blocks = _channels(shared, "channel finish", sizes.key_dim)
    return Launch(
        channel.channel_finish_kernel, shared.device, (blocks * sizes.batch * sizes.heads * plan.segments, 1),
        (float(scale), *_of_segments(shared), *_strides(q, k, log_decay)), D=sizes.key_dim, E=sizes.value_dim,
        BD=channels, BE=8, C=plan.walk_tile, PACKED=shared.packed, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


def _channels(shared: Shared, name: str, dim: int):
    """How a kernel runs that goes number by number, the channels of a program, and the number of blocks of them."""
    config = config_of(name, dim, shared.plan.sizes.itemsize)
    channels = min(config.columns, power_of_two(dim))
    return config, channels, -(-dim // channels)


def _of_tiles(shared: Shared, scale: float) -> tuple[float, ...]:
    """What kernels take whose programs have tiles."""
    plan, sizes = shared.plan, shared.plan.sizes
    return float(scale), sizes.batch, sizes.tokens, plan.segment_length, plan.tiles, plan.all_tiles, sizes.heads


def _of_segments(shared: Shared) -> tuple[int, ...]:
    """What kernels take whose programs have segments."""
    plan, sizes = shared.plan, shared.plan.sizes
    numbers = (plan.segment_length, plan.segments, plan.slots, plan.all_tiles)
    return sizes.batch, sizes.tokens, *numbers, sizes.heads


def _strides(*layouts: Layout | None) -> tuple[int, ...]:
    """The strides of the batch, of tokens and of heads."""
    return tuple(n for layout in layouts for n in ((0, 0, 0) if layout is None else layout[0][:3]))
