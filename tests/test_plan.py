"""How work is divided on an H100, in numbers that need no card."""

import pytest

from lasp_kernels.plan import (
    CHANNEL_DECAY,
    CONFIGS,
    HEAD_DECAY,
    NO_DECAY,
    TOKEN_DECAY,
    Plan,
    Sizes,
    power_of_two,
    run_starts,
    segment_table,
    walk_blocks,
)

H100 = {"processors": 132, "has_tma": True}


def sizes(tokens, *, batch=1, heads=16, groups=1, dim=128, itemsize=2, decay=NO_DECAY, **options):
    options = {"token_stride": heads * groups * dim, **H100, **options}
    return Sizes(batch, tokens, heads, groups, dim, dim, itemsize, decay, **options)


def plan(tokens, **options):
    return Plan.of(sizes(tokens, **options))


def programs(plan, **walk):
    """Of a walk over all segments."""
    options = {"row_sums": False, "moves": True, **walk}
    s = plan.sizes
    blocks = plan.walk_blocks(s.key_dim, s.value_dim, **options).count
    return blocks * s.batch * s.heads * s.groups * plan.segments


@pytest.mark.parametrize("tokens", [8192, 32768, 131072])
def test_segments_fill_the_card_once(tokens):
    """16 heads of 128 x 128 in two blocks of columns: 32 programs a segment, and 132 processors."""
    p = plan(tokens)
    assert (p.segments, p.segment_length, p.slots) == (4, tokens // 4, 5)
    assert programs(p) == 128
    assert plan(tokens, for_keys=True).segments == 2  # its grid has two programs where the others have one


def test_a_batch_that_fills_the_card_is_not_cut():
    p = plan(8192, batch=4)
    assert (p.segments, p.slots) == (1, 2)
    assert (p.skippable, p.skipped) == (1, 0)
    assert plan(8192, batch=4, ends=False).slots == 0  # nothing enters and nothing leaves: no states at all


def test_a_little_more_than_the_processors_makes_shorter_segments():
    """80 programs a segment: one or two segments would keep 61% of the processors busy, three 91%."""
    p = plan(65536, heads=40)
    assert p.segments == 3
    assert programs(p) / (-(-programs(p) // 132) * 132) > 0.9


@pytest.mark.parametrize(("tokens", "segments"), [(0, 0), (1, 1), (512, 1), (513, 3), (1024, 4), (2048, 8)])
def test_short_sequences(tokens, segments):
    """No segment has fewer than 256 tokens, and where no state is needed two short ones are one."""
    p = plan(tokens, heads=4, ends=False)
    assert p.segments == segments
    assert p.segment_length % 64 == 0
    assert p.skipped == (segments > 0)


def test_gradients_of_a_decay_per_token_have_shorter_segments():
    p = plan(131072, decay=TOKEN_DECAY, decay_gradient=True)
    state, gradients = 4 * 128 * 128, 3 * 128 * 2 * p.segment_length
    assert p.segment_length == 1728  # rounded up to 64 from 1707
    assert state / gradients <= 0.05
    assert (p.pieces, p.skippable) == (1, 0)  # they alone fill the card; all states are read


@pytest.mark.parametrize(
    ("decay", "tokens", "pieces"),
    [(NO_DECAY, 131072, 2), (HEAD_DECAY, 131072, 8), (HEAD_DECAY, 8192, 2), (NO_DECAY, 1 << 22, 2)],
)
def test_pieces(decay, tokens, pieces):
    """Up to eight where a few heads have all the work, of at least 2,048 tokens."""
    p = plan(tokens, decay=decay)
    assert p.pieces == pieces
    assert p.pieces * p.piece_length >= p.segment_length > (p.pieces - 1) * p.piece_length


@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "length", "chains"),
    [(8192, 16, 128, 1024, 256), (8192, 16, 64, 512, 256), (8192, 4, 128, 512, 128), (32768, 16, 128, 1728, 608)],
)
def test_a_decay_per_channel_has_two_chains_a_processor(tokens, heads, dim, length, chains):
    """In the last kernel of backward, but none of fewer than 512 tokens, and no longer ones than before."""
    p = plan(tokens, heads=heads, dim=dim, decay=CHANNEL_DECAY, decay_gradient=True)
    assert p.segment_length == length
    assert heads * p.segments * -(-dim // CONFIGS["channel finish"][0].columns) == chains
    assert plan(tokens, heads=heads, dim=dim, decay=CHANNEL_DECAY).segment_length >= length


def test_a_given_segment_length_is_taken_and_not_cut():
    p = plan(1000, decay=HEAD_DECAY, segment_length=192)
    assert (p.segment_length, p.segments, p.pieces, p.piece_length) == (192, 6, 1, 192)


def test_tokens_of_a_segment_are_addressed_with_32_bits():
    p = plan(1 << 20, token_stride=1 << 20, segment_length=1 << 16)
    assert p.segment_length == 2048
    assert p.segment_length * p.longest_stride < 2**31


@pytest.mark.parametrize("bounds", [(0, 0, 1, 6, 71, 71, 200, 200), (0, 64, 128, 170), (0, 1000), (0, 0)])
@pytest.mark.parametrize("length", [64, 128])
def test_every_token_of_packed_sequences_is_in_one_segment(bounds, length):
    table, starts = segment_table(bounds, length), run_starts(bounds, length)
    assert [t for first, end, _ in table for t in range(first, end)] == list(range(bounds[-1]))
    for first, end, run in table:
        assert bounds[run] <= first < end <= bounds[run + 1]
        assert (first - bounds[run]) % length == 0
        assert end - first <= length
    for run, (low, high) in enumerate(zip(starts, starts[1:])):
        assert [r for _, _, r in table[low:high]] == [run] * (high - low)
    p = plan(bounds[-1], bounds=bounds, segment_length=length)
    assert p.run_segments == tuple(zip(starts, starts[1:]))
    assert (p.runs, p.segments, p.slots) == (len(bounds) - 1, len(table), len(table) + len(bounds) - 1)
    assert p.skippable == 0


def test_the_table_of_packed_sequences():
    assert segment_table((0, 70, 70, 200), 64) == [(0, 64, 0), (64, 70, 0), (70, 134, 2), (134, 198, 2), (198, 200, 2)]
    assert run_starts((0, 70, 70, 200), 64) == [0, 2, 2, 5]


def test_tiles_are_counted_by_the_longest_sequence():
    assert plan(300, bounds=(0, 100, 101, 300), segment_length=256).tiles == 4
    assert plan(300, segment_length=256).tiles == 4
    fp32 = CONFIGS["walk"][2].tile
    assert plan(5000, segment_length=1024, itemsize=4).tiles == 1024 // fp32


SHARED_MEMORY = 227 * 1024


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{"moves": True}, {"moves": False}, {"row_sums": True}, {"decay": TOKEN_DECAY}])
def test_the_stages_of_a_walk_fit_shared_memory(dim, options):
    """Of its tiles x, y and z, and one more to write."""
    decay = options.get("decay", NO_DECAY)
    walk = {"row_sums": False, "moves": True, **{name: n for name, n in options.items() if name != "decay"}}
    config, columns, count, _ = plan(4096, dim=dim, decay=decay).walk_blocks(dim, dim, **walk)
    tiles = config.stages * config.tile * (2 * dim + columns) + config.tile * columns
    assert 2 * tiles <= SHARED_MEMORY
    assert columns * count >= dim > columns * (count - 1)


def test_blocks_of_two_bytes_that_tma_does_not_move_have_64_columns():
    """ptxas 12.8 makes wrong code for narrower ones."""
    for contracted in (16, 128, 256):
        for width in (16, 40, 256):
            assert walk_blocks("short walk", contracted, width, 2, False).columns == 64
            assert walk_blocks("walk", contracted, width, 2, True).columns <= max(32, power_of_two(width))


def test_of_the_last_tokens_there_are_more_pieces():
    p = plan(10000, decay=HEAD_DECAY, segment_length=10048, piece_length=2048)
    assert (p.segments, p.pieces, p.piece_length) == (1, 5, 2048)
    assert p.state_blocks().count == 4  # 64 rows x 64 columns
    assert plan(10000).state_blocks().count == 2  # 128 x 64
