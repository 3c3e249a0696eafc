"""Results do not depend, to the bit, on the schedule; with a segment length, not on the number of ranks either."""

import pytest
import torch
import torch.distributed as dist
from inputs import FORMS, NAMES, gradients, random_inputs, run
from ranks import run_ranks

import lasp
from lasp.ranks import SCHEDULES

SEGMENT = 64


def results_of(x, *, sequence=None, layout=None, segment_length=None, trained=NAMES):
    """Of one rank: o, the gradients by name, final state. Only rank 0 asks for a gradient of the final state."""
    x.require_grad(trained)
    o, final_state = run(
        lasp.linear_attention,
        x,
        scale=0.7,
        output_final_state=True,
        layout=layout,
        sequence=sequence,
        segment_length=segment_length,
    )
    if sequence is not None and sequence.rank > 0:
        x.d_final_state.zero_()
    return {"o": o.detach(), "final_state": final_state.detach(), **gradients(x, o, final_state)}


def assert_same_bits(found, whole, lengths, rank):
    """Of one rank's results and those of one rank that did it all."""
    start = sum(lengths[:rank])
    for name, x in whole.items():
        if name == "log_decay" and x.ndim == 1:
            continue  # a sum over all tokens, which ranks take in parts
        if name == "initial_state":
            expected = x
            dist.all_reduce(found[name])  # all ranks but the one on which the sequence begins have zeros
        elif name == "final_state":
            expected = x
        else:
            expected = x[:, start : start + lengths[rank]]
        assert torch.equal(found[name], expected), f"{name} on rank {rank} of {lengths}"


def _as_one_rank(form, lengths, *, groups, state, dtype, packed):
    rank, T = dist.get_rank(), sum(lengths)
    sequences = None if packed is None else len(packed) - 1
    options = {"B": 1 if packed else 2, "groups": groups, "state": state, "sequences": sequences, "strength": 0.3}

    def inputs():
        x = random_inputs(form, T, dtype=torch.float32, **options)
        return x.to(dtype)

    alone = None if packed is None else lasp.ShardLayout((T,), packed)
    whole = results_of(inputs(), segment_length=SEGMENT, layout=alone)
    for schedule in SCHEDULES:
        for layout in (None, lasp.ShardLayout(lengths, packed)):
            if layout is None and (packed or (schedule in ("all_gather", "direct") and len(set(lengths)) > 1)):
                continue
            sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
            found = results_of(inputs().shard(lengths, rank), sequence=sequence, layout=layout, segment_length=SEGMENT)
            assert_same_bits(found, whole, lengths, rank)


def one_rank(lengths, form, *, groups=1, state=True, dtype=torch.float32, packed=None):
    run_ranks(len(lengths), _with_options, form, lengths, groups, state, dtype, packed)


def _with_options(form, lengths, groups, state, dtype, packed):
    _as_one_rank(form, lengths, groups=groups, state=state, dtype=dtype, packed=packed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "lengths", [(200,), (128, 128), (64, 30), (128, 64, 192), (64, 64, 64, 64), (128, 0, 64, 33)], ids=str
)
def test_with_a_segment_length_the_bits_are_those_of_one_rank(lengths, form):
    one_rank(lengths, form)


@pytest.mark.parametrize("form", FORMS)
def test_so_with_grouped_heads_no_initial_state_and_bfloat16(form):
    one_rank((64, 64, 64), form, groups=2, state=False, dtype=torch.bfloat16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "packed", [(0, 320), (0, 100, 228, 320), (0, 64, 128, 128, 320), (0, 0, 300, 320), (0, 100, 300, 433)], ids=str
)
@pytest.mark.parametrize("state", [True, False])
def test_so_with_packed_sequences(packed, form, state):
    """Where a sequence crosses a border, the border lies a multiple of 64 tokens behind its beginning."""
    lengths = {
        (0, 100, 228, 320): (100, 64, 64, 92),
        (0, 0, 300, 320): (64, 128, 0, 128),
        (0, 100, 300, 433): (164, 64, 136, 69),
    }.get(packed, (64, 128, 64, 64))
    one_rank(lengths, form, state=state, packed=packed)


def _every_schedule(form, lengths, packed, rates):
    """Without a segment length, with the horizon and without."""
    rank = dist.get_rank()
    first, sent = None, {}
    trained = [name for name in NAMES if form != "head" or name != "log_decay"]  # one that is trained has no horizon
    layouts = [lasp.ShardLayout(lengths, packed)] + ([] if packed else [None])
    sequences = None if packed is None else len(packed) - 1
    for schedule in SCHEDULES:
        for layout in layouts:
            x = random_inputs(
                form, sum(lengths), B=1 if packed else 2, H=5, groups=2, sequences=sequences, dtype=torch.float32
            ).shard(lengths, rank)
            if form == "head":
                x.log_decay.copy_(torch.tensor(rates))
            sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
            found = results_of(x, sequence=sequence, layout=layout, trained=trained)
            assert (sequence.traffic.forward_exchanges, sequence.traffic.reverse_exchanges) == (1, 1)
            sent[schedule, layout is None] = sequence.traffic.bytes_sent
            first = found if first is None else first
            for name, y in found.items():
                assert torch.equal(y, first[name]), f"{name}: {schedule}, layout {layout}"
    if form == "head" and len(lengths) > 2 and not packed:  # two of five heads go to the neighbour only
        per_state = 4 * 2 * 5 * 4  # B, K, V
        both_ways = (rank > 0) + (rank < len(lengths) - 1)
        assert sent["ring", True] == sent["ring", False] == 5 * per_state * both_ways
        gathered = 2 * 3 * 3 * (per_state + 4 * 2)  # twice, to 3 ranks, 3 heads and their decays
        assert sent["all_gather", False] == gathered + 2 * per_state * both_ways
        assert sent["all_gather", True] == 2 * 3 * 5 * (per_state + 4 * 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("lengths", "packed"),
    [((70, 33), None), ((40, 50, 3, 60), None), ((40, 50, 3, 60), (0, 60, 60, 80, 153))],
    ids=str,
)
def test_all_schedules_give_the_same_bits(lengths, packed, form):
    slow_at = [(0, 1, 3), (0, 1, 2), (2, 3, 4)] if form == "head" else [()]
    for slow in slow_at:
        rates = [-0.1 if head in slow else -50.0 for head in range(5)]
        run_ranks(len(lengths), _every_schedule, form, lengths, packed, rates)


def _nothing_gets_past(lengths):
    """All heads need the neighbour only; against the recurrence, in fp64."""
    from test_attention import check_against_oracle

    sequence = lasp.SequenceParallel(dist.group.WORLD)
    x = random_inputs("head", sum(lengths))
    x.log_decay.copy_(torch.tensor([-9.0, -12.0]))
    wanted = ("q", "k", "v", "initial_state")  # a decay that is trained may change: it has no horizon
    check_against_oracle(x, lengths, sequence, only=wanted, layout=lasp.ShardLayout(lengths))
    assert sequence.traffic.schedule == "neighbour"
    check_against_oracle(x, lengths, sequence, layout=lasp.ShardLayout(lengths))
    assert sequence.traffic.schedule in SCHEDULES


@pytest.mark.parametrize("lengths", [(3, 90, 100, 5), (0, 85, 2)], ids=str)
def test_fast_heads_exchange_with_their_neighbour_only(lengths):
    run_ranks(len(lengths), _nothing_gets_past, lengths)


def _early_end(lengths):
    """Ranks with enough tokens send what their last ones leave before all else; the others cannot."""
    rank, T = dist.get_rank(), sum(lengths)
    first = None
    for schedule in SCHEDULES:
        for layout in (lasp.ShardLayout(lengths), None):
            x = random_inputs("head", T, dtype=torch.float64, state=False, groups=2)
            x.log_decay.copy_(torch.tensor([-9.0, -30.0]))  # in fp64 nothing is left after 83 and 25 tokens
            whole, x = x, x.shard(lengths, rank)
            sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
            o, _ = lasp.linear_attention(x.q, x.k, x.v, log_decay=x.log_decay, sequence=sequence, layout=layout)
            expected, _ = lasp.linear_attention(whole.q, whole.k, whole.v, log_decay=whole.log_decay)
            start = sum(lengths[:rank])
            torch.testing.assert_close(o, expected[:, start : start + lengths[rank]], rtol=1e-12, atol=1e-12)
            first = o if first is None else first
            assert torch.equal(o, first), f"{schedule}, layout {layout}"


@pytest.mark.parametrize("lengths", [(100, 90), (5, 90), (90, 83, 3, 100), (82, 84, 0, 200)], ids=str)
def test_what_the_last_tokens_leave_is_sent_first(lengths):
    run_ranks(len(lengths), _early_end, lengths)
