"""How the Triton kernels divide the work of a call: plain numbers from plain numbers, without a tensor or a card.

A `Plan` says how long segments and pieces are, how many there are, and which states nobody needs; `CONFIGS` says how a
kernel runs. Every figure was measured on an H100 (docs/lab/kernels.md). What the words mean is in state.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import NamedTuple

MAX_DIM = 256
MIN_BLOCK = 16  # columns of a block of a matrix product; narrower heads are filled up with zeros as they are loaded
MIN_SEGMENT = 256  # a program reads a state of 32 KiB: for fewer tokens than this it would not pay
MIN_PAIR = 2048  # the fewest tokens that are cut in two, where no state is needed for one
DECAY_SEGMENT = 1024  # for a gradient of a decay per token, whose rounding noise grows with the segment
CHAINS = 2  # a processor, of the last kernel of backward with a decay per channel: each goes token by token
SHORT_CHAIN = 512  # the fewest tokens of one
STATE_SHARE = 0.05  # but no shorter than this: the share of a segment's state in the memory of its dq, dk and dv
PIECES = 2  # of a segment, one for each program of the state kernel
HEAD_PIECES, PIECE = 8, 2048  # with a decay per head, where a few heads have all the work: up to 8, of so many tokens
END_PIECE = 2048  # where others wait for it (`TritonSteps.of_end`), however many

NO_DECAY, HEAD_DECAY, TOKEN_DECAY = 0, 1, 2  # the forms of state.py, as numbers
CHANNEL_DECAY = 3  # which has kernels of its own, in channel.py
DELTA = 4  # the delta rule, whatever decays: delta_kernels.py
STRETCH = 1024  # tokens between two of its borders where a gradient of decays is known without a sum


class Config(NamedTuple):
    """How a kernel runs. `rows` x `columns` is its block of the state; 0 is all rows (or columns)."""

    tile: int
    rows: int
    columns: int
    warps: int
    stages: int


# By kernel: for 2-byte inputs whose contracted dim is <= 128, or more; then the same for 4-byte inputs.
# A tile of 64 tokens, 64 columns, 4 warps, 4 stages measured best on an H100 (docs/lab/kernels.md). For wide heads the
# stages must fit shared memory (227 KiB); fp32 products run without tensor cores, and larger tiles would spill.
# Two stages of wide heads are for cards with less shared memory; and with a decay per token fewer blocks of columns
# work out the decays between a tile's tokens. Row sums read one more tensor; with them two stages are faster for all
# heads: two programs then share a multiprocessor, and one sums while the other's products run.
# ptxas 12.8, which comes with Triton 3.6, reads shared memory at wrong places for some blocks of 16 or 32 columns of
# 2-byte numbers: without TMA, and with 8 warps (docs/lab/kernels.md).
NARROW, WIDE, SHORT, FP32, FP32_WIDE = (Config(64, 0, 64, 4, 4), Config(64, 0, 32, 4, 3), Config(64, 0, 64, 4, 2),
                                        Config(16, 0, 32, 8, 2), Config(16, 0, 16, 8, 2))  # fmt: skip
CONFIGS: dict[str, tuple[Config, ...]] = {
    "state": (Config(64, 128, 64, 4, 3),) * 2 + (Config(32, 64, 64, 4, 2),) * 2,
    "end": (Config(64, 64, 64, 4, 4),) * 2 + (Config(32, 64, 64, 4, 2),) * 2,  # more programs, for `of_end`
    "walk": (NARROW, WIDE, FP32, FP32_WIDE),
    "short walk": (NARROW, SHORT, FP32, FP32_WIDE),  # without TMA, or with a decay per token
    "row-sum walk": (SHORT, SHORT, FP32, FP32_WIDE),
    "head_decay": (Config(64, 0, 64, 8, 2), Config(64, 0, 32, 8, 1), Config(16, 0, 32, 8, 1), Config(16, 0, 16, 8, 1)),
    "channel state": (Config(64, 128, 64, 4, 2),) * 2 + (Config(16, 64, 64, 4, 2),) * 2,
    "channel walk": (Config(64, 0, 64, 4, 3), SHORT, FP32, FP32_WIDE),
    "channel reverse": (SHORT, SHORT, FP32, FP32_WIDE),
    "channel tile": (Config(64, 0, 32, 1, 1),) * 2 + (Config(16, 0, 32, 4, 1),) * 2,  # number by number
    "channel finish": (Config(1, 0, 64, 1, 8),) * 4,  # token by token, loads of so many ahead
    "delta prepare": (Config(64, 0, 0, 4, 1),) * 2 + (Config(16, 0, 0, 4, 1),) * 2,
    "delta walk": (SHORT, Config(64, 0, 64, 8, 1), FP32, FP32_WIDE),
    "delta gradient": (SHORT, Config(64, 0, 64, 8, 1), FP32, FP32_WIDE),
    "delta inner": (Config(64, 0, 64, 4, 1),) * 2 + (Config(16, 0, 64, 4, 1),) * 2,
    "delta channel gradient": (Config(64, 0, 64, 8, 2), Config(64, 0, 64, 8, 1), FP32, FP32_WIDE),
    "delta tile gradient": (Config(64, 0, 64, 4, 1),) * 2 + (Config(16, 0, 32, 4, 1),) * 2,
}  # all walks on one dtype have the same tile: the decays and row sums of its tokens go from one kernel to another


class Sizes(NamedTuple):
    """All that a plan depends on."""

    batch: int
    tokens: int
    heads: int  # of states, so of k and v; of v where heads share one of k
    groups: int  # query heads that share one of them
    key_dim: int
    value_dim: int
    itemsize: int  # bytes of a number of q, k and v
    decay: int  # NO_DECAY, HEAD_DECAY, TOKEN_DECAY, CHANNEL_DECAY or DELTA
    token_stride: int  # the longest, in numbers
    processors: int  # multiprocessors of the card
    has_tma: bool  # the copy engine for tiles
    bounds: tuple[int, ...] | None = None  # of packed sequences
    segment_length: int | None = None
    decay_gradient: bool = False
    ends: bool = True
    piece_length: int | None = None
    for_keys: bool = False  # for the gradients of k and v alone
    split_sums: bool = False  # sums of decays per token in two numbers each, see `state.tile_decays`
    share: int = 1  # heads of v that share one of q and k
    normalize: bool = False  # a state has the sum of keys as a column more

    @property
    def keeps_rows(self) -> bool:
        """Whether the walks leave row sums for the gradient of the decay."""
        return self.decay_gradient and self.decay == TOKEN_DECAY

    @property
    def paired(self) -> bool:
        """Whether dk and dv are made in one grid."""
        return self.key_dim == self.value_dim and self.groups == 1


class Blocks(NamedTuple):
    """How a kernel runs, the columns (and rows) of a program's block, and the number of blocks."""

    config: Config
    columns: int
    count: int
    rows: int = 0


@dataclass(frozen=True)
class Plan:
    """How one call is divided."""

    sizes: Sizes
    segment_length: int
    run_segments: tuple[tuple[int, int], ...]  # first and last + 1 segment of each packed sequence; else of them all
    runs: int  # sequences: packed ones, or the batch
    segments: int
    slots: int  # states at the borders of the segments, those at both ends of each run included; 0 where all are zero
    piece_length: int
    pieces: int  # of a segment
    skippable: int  # segments at the end (reversed: the start) whose map only leads to the state behind all: 0 or 1
    skipped: int  # those that are left out in every call
    longest_stride: int  # of tokens: kernels address the tokens of a segment with 32 bits

    @classmethod
    def of(cls, sizes: Sizes) -> Plan:
        """The plan for these sizes."""
        farthest = max(sizes.token_stride, sizes.heads * sizes.groups * MAX_DIM)
        length = min(sizes.segment_length or _segment_length(sizes), 2**31 // farthest // 64 * 64)
        bounds, count = sizes.bounds, -(-sizes.tokens // length)
        run_segments = ((0, count),) if bounds is None else tuple(_cut(bounds, length))
        segments = run_segments[-1][1]
        runs, borders = (sizes.batch, 1) if bounds is None else (len(run_segments), len(run_segments))
        piece_length = min(length, _piece_length(sizes, length))
        skippable = int(not sizes.decay_gradient and bounds is None and segments > 0)
        skipped = 0 if sizes.ends else skippable
        return cls(
            sizes,
            segment_length=length,
            run_segments=run_segments,
            runs=runs,
            segments=segments,
            slots=0 if skipped and segments == 1 else segments + borders,
            piece_length=piece_length,
            pieces=-(-length // piece_length),
            skippable=skippable,
            skipped=skipped,
            longest_stride=(2**31 - 1) // length,
        )

    @cached_property
    def tiles(self) -> int:
        """The most tiles of a walk that a segment has."""
        bounds = self.sizes.bounds or (0, self.sizes.tokens)
        longest = max(end - first for first, end in zip(bounds, bounds[1:]))
        return -(-min(self.segment_length, longest) // self.walk_tile)

    @cached_property
    def walk_tile(self) -> int:
        """Tokens of a tile, the same in all walks."""
        return config_of("walk", 0, self.sizes.itemsize).tile

    @cached_property
    def all_tiles(self) -> int:
        """How many tiles have room in what is kept by tile: see channel.py and delta_kernels.py."""
        return self.sizes.tokens // self.walk_tile + self.segments

    @property
    def tile_sums_shape(self) -> tuple[int, int, int, int]:
        """The shape of the sums of decays per token within tiles, as `tile_decay_kernel` makes them."""
        sizes = self.sizes
        return 3 if sizes.split_sums else 2, sizes.batch, sizes.heads, sizes.tokens

    def state_blocks(self) -> Blocks:
        """The blocks of the kernel that makes the states of pieces; with a decay per channel, of segments."""
        sizes = self.sizes
        name = "channel state" if sizes.decay == CHANNEL_DECAY else "end" if sizes.piece_length else "state"
        config = config_of(name, 0, sizes.itemsize)
        rows = min(config.rows, power_of_two(sizes.key_dim))
        columns = min(config.columns, power_of_two(sizes.value_dim))
        return Blocks(config, columns, -(-sizes.key_dim // rows) * -(-sizes.value_dim // columns), rows)

    def walk_blocks(self, contracted: int, width: int, *, row_sums: bool, moves: bool) -> Blocks:
        """The blocks of a walk whose products contract `contracted` columns and give `width`; `moves` as in
        `walk_blocks`."""
        name = "row-sum walk" if row_sums else "short walk" if self.sizes.decay == TOKEN_DECAY or not moves else "walk"
        return walk_blocks(name, contracted, width, self.sizes.itemsize, moves)

    def channel_blocks(self, walk: str, contracted: int, width: int, *, moves: bool) -> Blocks:
        """The blocks of a walk with a decay per channel: of the "walk", or of the "reverse" one."""
        return walk_blocks(f"channel {walk}", contracted, width, self.sizes.itemsize, moves)

    def head_decay_blocks(self) -> Blocks:
        """The blocks of the kernel that makes the gradient of a decay per head."""
        sizes = self.sizes
        config = config_of("head_decay", sizes.key_dim, sizes.itemsize)
        columns = min(config.columns, power_of_two(sizes.value_dim))
        if columns < 32:  # see CONFIGS
            config = config._replace(warps=4)
        return Blocks(config, columns, -(-sizes.value_dim // columns))


def segment_table(bounds: tuple[int, ...], segment_length: int) -> list[tuple[int, int, int]]:
    """First token, end and run of each segment of packed sequences, which never crosses the border of a run."""
    return [
        (t, min(t + segment_length, end), run)
        for run, (first, end) in enumerate(zip(bounds, bounds[1:]))
        for t in range(first, end, segment_length)
    ]


def run_starts(bounds: tuple[int, ...], segment_length: int) -> list[int]:
    """The first segment of each run, and the number of all."""
    return [0, *(end for _, end in _cut(bounds, segment_length))]


def power_of_two(n: int) -> int:
    """The next one, and no less than what a block of a matrix product has."""
    return max(MIN_BLOCK, 1 << (n - 1).bit_length())


def config_of(name: str, dim: int, itemsize: int) -> Config:
    """The line of `CONFIGS` for a contracted dim and a number of so many bytes."""
    return CONFIGS[name][2 * (itemsize == 4) + (dim > 128)]


@lru_cache
def walk_blocks(name: str, contracted: int, width: int, itemsize: int, moves: bool) -> Blocks:
    """How a walk runs; `moves` is whether TMA brings the tiles."""
    config = config_of(name, contracted, itemsize)
    columns = config.columns
    if moves or itemsize == 4:  # else no fewer, see CONFIGS
        columns = min(columns, power_of_two(width))
    return Blocks(config, columns, -(-width // columns))


def _cut(bounds: tuple[int, ...], length: int) -> Iterator[tuple[int, int]]:
    """Each run for itself: its first and last + 1 segment."""
    ends = list(accumulate(-(-(b - a) // length) for a, b in zip(bounds, bounds[1:])))
    return zip([0, *ends], ends)


def _segment_length(sizes: Sizes) -> int:
    """As long as it may be, for a state kernel that reads little, with a program of a walk on every processor.

    Where their number is a little more than a multiple of the processors, the last ones would run almost alone:
    then rather more and shorter segments. Two short ones are slower than one, which needs neither states nor scan.
    """
    processors = sizes.processors * (2 if sizes.decay == DELTA else 1)  # whose chains of products wait for each other
    length = max(MIN_SEGMENT, -(-sizes.tokens // _wanted_segments(_walk_programs(sizes), processors)))
    if sizes.keeps_rows or (sizes.decay_gradient and sizes.decay == CHANNEL_DECAY):
        token_bytes = (2 * sizes.key_dim + sizes.value_dim) * sizes.itemsize
        state_bytes = 4 * sizes.key_dim * sizes.value_dim
        length = min(length, max(DECAY_SEGMENT, math.ceil(state_bytes / (STATE_SHARE * token_bytes))))
    if sizes.decay_gradient and sizes.decay == CHANNEL_DECAY:
        blocks = -(-sizes.key_dim // config_of("channel finish", sizes.key_dim, sizes.itemsize).columns)
        tokens = sizes.tokens * sizes.batch * sizes.heads * blocks  # of all chains
        length = min(length, max(SHORT_CHAIN, tokens // (CHAINS * sizes.processors)))
    alone = not (sizes.ends or sizes.decay_gradient or sizes.bounds)
    if alone and length < sizes.tokens < MIN_PAIR and sizes.tokens <= 2 * length:
        length = sizes.tokens
    return -(-length // 64) * 64


def _walk_programs(sizes: Sizes) -> int:
    """How many programs a walk over one segment has."""
    name = "short walk" if sizes.decay == TOKEN_DECAY or not sizes.has_tma else "walk"
    name = {CHANNEL_DECAY: "channel walk", DELTA: "delta walk"}.get(sizes.decay, name)
    columns = config_of(name, max(sizes.key_dim, sizes.value_dim), sizes.itemsize).columns
    programs = max(1, sizes.batch * sizes.heads * sizes.groups * -(-sizes.value_dim // columns))
    return programs * (2 if sizes.for_keys else 1)


def _wanted_segments(programs: int, processors: int) -> int:
    """The fewest that keep 90% of the processors busy, up to four times as many as would fill them once."""
    fewest = max(1, processors // programs)

    def busy(segments: int) -> float:
        return programs * segments / (-(-programs * segments // processors) * processors)

    return next((n for n in range(fewest, 4 * fewest + 1) if busy(n) > 0.9), fewest)


def _piece_length(sizes: Sizes, segment_length: int) -> int:
    """Enough pieces to have programs for every processor, and few, since the scan reads a state for each."""
    given = sizes.piece_length or sizes.segment_length
    if given:
        return given
    if sizes.decay in (CHANNEL_DECAY, DELTA):
        return segment_length
    # Segments' worth of tokens: of packed sequences there may be many that are almost empty.
    segments = sizes.batch * sizes.heads * -(-sizes.tokens // segment_length)
    if sizes.decay != HEAD_DECAY and segments >= 2 * sizes.processors:
        return segment_length
    pieces = min(most_pieces(sizes.decay), max(PIECES, segment_length // PIECE))
    return -(-segment_length // (64 * pieces)) * 64


def most_pieces(decay: int) -> int:
    """The most pieces that a segment is cut into; the scan folds as many at once."""
    return HEAD_PIECES if decay == HEAD_DECAY else PIECES
