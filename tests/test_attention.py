"""`lasp.linear_attention` over 1 to 4 ranks against the single-process recurrence in fp64, values and gradients."""

import itertools
import weakref
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from inputs import FORMS, NAMES, VARIANTS, assert_close, gradients, oracle, random_inputs, run
from ranks import mesh_of, of_one_rank, run_ranks, sequence_of_all
from torch.distributed.device_mesh import DeviceMesh

import lasp
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp.ranks import SCHEDULES
from lasp_kernels.chunked import ChunkedSteps

LENGTHS = [
    (70,),
    (9, 9),
    (70, 3),
    (0, 9),
    (64, 0),
    (5, 5, 5),
    (70, 0, 3),
    (0, 0, 6),
    (4, 4, 4, 4),
    (70, 0, 3, 65),
    (9, 0, 0, 0),
]
SCALE = 0.7


def offsets_of(lengths):
    """Packed sequences that cross 0, 1 or all borders, start on one or in the middle of every rank, or are empty."""
    T, first = sum(lengths), lengths[0]
    middles = [sum(lengths[:r]) + lengths[r] // 2 for r in range(len(lengths))]
    return [
        (0, T),
        (0, first, T),
        (0, *middles, T),
        (0, T // 3, T // 3, T // 2, T),
        (0, 0, T),
        (0, T, T),
        (0, 1, 2, T),
    ]


def check_against_oracle(x, lengths, sequence, *, cu_seqlens=None, only=NAMES, segment_length=None, layout=None):
    """Run this rank's shard and compare output, final state and gradients with those of the whole sequence."""
    rank, ranks = sequence.rank, sequence.size
    whole = of_one_rank(oracle, x, cu_seqlens=cu_seqlens, scale=SCALE, group=sequence.group)
    o, final_state, expected = whole
    local = x.shard(lengths, rank)
    local = replace(local, d_final_state=local.d_final_state / ranks)  # ranks' gradients of it are summed
    local.require_grad(only)
    layout = layout if cu_seqlens is None else lasp.ShardLayout(lengths, cu_seqlens)
    o_local, final_local = run(
        lasp.linear_attention,
        local,
        scale=SCALE,
        output_final_state=True,
        layout=layout,
        sequence=sequence,
        segment_length=segment_length,
    )
    assert_close(o_local, cut(o, lengths, rank), "o")
    assert_close(final_local, final_state, "final_state")
    found = gradients(local, o_local, final_local)
    assert set(found) == set(only) & set(x.given)
    for name, gradient in found.items():
        if name == "initial_state" or (name == "log_decay" and x.log_decay.ndim == 1):
            dist.all_reduce(gradient, group=sequence.group)
            assert_close(gradient, expected[name], f"d{name}, summed over ranks")
        else:
            assert_close(gradient, cut(expected[name], lengths, rank), f"d{name}")


def cut(x, lengths, rank):
    start = sum(lengths[:rank])
    return x[:, start : start + lengths[rank]]


# Values and gradients


def _dense(lengths, form, groups, state):
    x = random_inputs(form, sum(lengths), groups=groups, state=state)
    check_against_oracle(x, lengths, sequence_of_all())


@pytest.mark.any_pytorch
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_dense(lengths, form):
    run_ranks(len(lengths), _dense, lengths, form, 1, True)


@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads_and_no_initial_state(form):
    run_ranks(3, _dense, (7, 2, 66), form, 3, False)


def _packed(lengths, form, groups):
    for seed, cu_seqlens in enumerate(offsets_of(lengths)):
        sequences = len(cu_seqlens) - 1
        x = random_inputs(form, sum(lengths), B=1, groups=groups, sequences=sequences, seed=seed)
        check_against_oracle(x, lengths, sequence_of_all(), cu_seqlens=cu_seqlens)


@pytest.mark.any_pytorch
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed(lengths, form):
    run_ranks(len(lengths), _packed, lengths, form, 1)


@pytest.mark.any_pytorch
@pytest.mark.parametrize("form", FORMS)
def test_packed_with_grouped_heads(form):
    run_ranks(3, _packed, (7, 0, 66), form, 2)


def _segmented(form):
    lengths = (200, 129)
    check_against_oracle(random_inputs(form, sum(lengths)), lengths, sequence_of_all(), segment_length=128)


@pytest.mark.any_pytorch
@pytest.mark.parametrize("form", FORMS)
def test_segment_length(form):
    run_ranks(2, _segmented, form)


def _variants(lengths, form):
    """A normaliser, and heads of v that share one of q and k: dense with states and without, packed, in segments."""
    T, sequence = sum(lengths), sequence_of_all()
    for options in VARIANTS.values():
        check_against_oracle(random_inputs(form, T, **options), lengths, sequence)
        check_against_oracle(random_inputs(form, T, state=False, **options), lengths, sequence, segment_length=64)
        cu_seqlens = (0, 0, 1, T // 3, 3 * T // 4, T)
        x = random_inputs(form, T, B=1, sequences=5, **options)
        check_against_oracle(x, lengths, sequence, cu_seqlens=cu_seqlens)


@pytest.mark.any_pytorch
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [(77,), (66, 9), (7, 0, 66)], ids=str)
def test_normaliser_and_grouped_values(lengths, form):
    run_ranks(len(lengths), _variants, lengths, form)


def _queries_later_and_a_horizon():
    """q is made while the state travels; of the strong decays only the neighbour's last tokens are left."""
    lengths, sequence = (130, 140, 150), lasp.SequenceParallel(dist.group.WORLD)
    for options in VARIANTS.values():
        x = random_inputs("head", sum(lengths), B=1, H=2, state=False, **options)
        decay = torch.linspace(-8, -20, x.v.shape[2], dtype=torch.float64)
        x = replace(x, log_decay=decay, d_final_state=torch.zeros_like(x.d_final_state))
        o, _, expected = oracle(x)
        mine = x.shard(lengths, sequence.rank)
        for later in (False, True):
            if later and x.q.shape[2] != x.k.shape[2]:  # such a function makes as many heads as k has
                continue
            mine.require_grad(("q", "k", "v"))
            q = (lambda mine=mine: mine.q * 1) if later else mine.q
            found, _ = lasp.linear_attention(
                q, mine.k, mine.v, log_decay=mine.log_decay, normalize=x.normalize, sequence=sequence
            )
            assert_close(found, cut(o, lengths, sequence.rank), "o")
            for name, gradient in zip("qkv", torch.autograd.grad(found, (mine.q, mine.k, mine.v), mine.do)):
                assert_close(gradient, cut(expected[name], lengths, sequence.rank), f"d{name}")


@pytest.mark.any_pytorch
def test_normaliser_and_grouped_values_whose_queries_come_later():
    run_ranks(3, _queries_later_and_a_horizon)


def test_the_sum_of_keys_is_the_last_column_of_a_state():
    """Also of one that goes on with the tokens behind."""
    x = random_inputs("none", 40, state=False, normalize=True)
    whole, final_state = run(lasp.linear_attention, x, output_final_state=True)
    assert_close(final_state[..., -1], x.k.sum(1), "sum of keys")
    assert_close(final_state[..., :-1], torch.einsum("bthk,bthv->bhkv", x.k, x.v), "state")
    first, second = (x.shard((15, 25), rank) for rank in (0, 1))
    a, state = run(lasp.linear_attention, first, output_final_state=True)
    b, _ = run(lasp.linear_attention, replace(second, initial_state=state))
    assert_close(torch.cat([a, b], 1), whole, "o")


def test_a_denominator_of_zero_spoils_its_token_alone():
    x = random_inputs("token", 70, state=False, normalize=True)
    x.q[0, 9, 1] = 0
    o, _ = run(lasp.linear_attention, x)
    spoilt = ~o.isfinite().all(-1)
    assert spoilt.nonzero().tolist() == [[0, 9, 1]]


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_scale_of_a_normalised_output(scale):
    x = random_inputs("head", 70, normalize=True)
    o, _, _ = oracle(x, scale=1.0)
    x.require_grad()
    found = run(lasp.linear_attention, x, scale=scale, output_final_state=True)
    assert_close(found[0], scale * o, "o")
    x_of_o = replace(x, d_final_state=torch.zeros_like(x.d_final_state))
    _, _, of_o = oracle(x_of_o, scale=1.0)
    for name, gradient in gradients(x_of_o, *found).items():
        assert_close(gradient, scale * of_o[name], f"d{name}")


def _no_tokens_at_all(form):
    lengths = (0,) * dist.get_world_size()
    check_against_oracle(random_inputs(form, 0), lengths, sequence_of_all())


@pytest.mark.any_pytorch
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_at_all_passes_the_state_through(world, form):
    run_ranks(world, _no_tokens_at_all, form)


def _strong_decay(form):
    lengths = (40, 90, 30)
    check_against_oracle(random_inputs(form, 160, strength=50.0), lengths, sequence_of_all())


@pytest.mark.any_pytorch
@pytest.mark.parametrize("form", FORMS[1:])
def test_strong_decay(form):
    run_ranks(3, _strong_decay, form)


def _decay_per_query_head(form):
    H, groups, lengths = 2, 3, (6, 11)
    x = random_inputs(form, sum(lengths), H=H * groups, K=4)
    narrow = replace(x, k=x.k[:, :, :H].clone(), v=x.v[:, :, :H].clone())
    wide = replace(x, k=narrow.k.repeat_interleave(groups, 2), v=narrow.v.repeat_interleave(groups, 2))
    o, final_state, expected = oracle(wide, scale=SCALE)
    rank = dist.get_rank()
    local = narrow.shard(lengths, rank)
    local = replace(local, d_final_state=local.d_final_state / len(lengths))
    local.require_grad()
    o_local, final_local = run(
        lasp.linear_attention, local, scale=SCALE, output_final_state=True, sequence=sequence_of_all()
    )
    assert_close(o_local, cut(o, lengths, rank), "o")
    assert_close(final_local, final_state, "final_state")
    found = gradients(local, o_local, final_local)
    for name in "kv":
        summed = cut(expected[name], lengths, rank).unflatten(2, (H, groups)).sum(3)
        assert_close(found[name], summed, f"d{name}")
    assert_close(found["q"], cut(expected["q"], lengths, rank), "dq")


@pytest.mark.any_pytorch
@pytest.mark.parametrize("form", FORMS[1:])
def test_decay_per_query_head_with_grouped_keys(form):
    run_ranks(2, _decay_per_query_head, form)


def _initial_state_gradient():
    lengths = (3, 4, 5)
    x = random_inputs("head", sum(lengths))
    _, _, expected = oracle(x)
    local = x.shard(lengths, dist.get_rank())
    local = replace(local, d_final_state=local.d_final_state / 3)
    local.require_grad()
    o, final_state = run(lasp.linear_attention, local, output_final_state=True, sequence=sequence_of_all())
    found = gradients(local, o, final_state)["initial_state"]
    assert_close(found, expected["initial_state"] if dist.get_rank() == 0 else torch.zeros_like(found), "d initial")


def test_the_first_rank_alone_gets_the_gradient_of_the_initial_state():
    run_ranks(3, _initial_state_gradient)


def _bfloat16(form):
    """Inputs and results are rounded to bf16 (relative 2^-8), everything between is fp32 (here below 1e-4)."""
    lengths = (70, 61)
    rank = dist.get_rank()
    x = random_inputs(form, sum(lengths), state=False, dtype=torch.float32).to(torch.bfloat16)
    if x.log_decay is not None:
        x = replace(x, log_decay=x.log_decay * 0.1)
    double = replace(x.to(torch.float64), log_decay=None if x.log_decay is None else x.log_decay.double())
    o, final_state, expected = oracle(double)
    local = x.shard(lengths, rank)
    local = replace(local, d_final_state=local.d_final_state / 2)
    local.require_grad()
    o_local, final_local = run(lasp.linear_attention, local, output_final_state=True, sequence=sequence_of_all())
    assert (o_local.dtype, final_local.dtype) == (torch.bfloat16, torch.float32)
    bound = {"rtol": 2**-8, "atol": 1e-4}
    assert_close(o_local.double(), cut(o, lengths, rank), "o", **bound)
    assert_close(final_local.double(), final_state, "final_state", rtol=1e-4, atol=1e-4)
    found = gradients(local, o_local, final_local)
    for name in "qkv":
        assert_close(found[name].double(), cut(expected[name], lengths, rank), f"d{name}", **bound)
    if form in ("token", "channel"):
        assert found["log_decay"].dtype == torch.float32
        exact = cut(expected["log_decay"], lengths, rank)
        assert_close(found["log_decay"].double(), exact, "dlog_decay", rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.any_pytorch
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_differs_by_the_rounding_of_its_results_only(form):
    run_ranks(2, _bfloat16, form)


# The exchange of backward happens on every rank, whatever is asked for


def _frozen(trained):
    lengths = (4, 6, 3)
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange="ring")
    check_against_oracle(random_inputs("token", 13), lengths, sequence, only=trained)
    assert (sequence.traffic.forward_exchanges, sequence.traffic.reverse_exchanges) == (1, 1)
    assert sequence.traffic.messages == (1 if dist.get_rank() in (0, 2) else 2)


@pytest.mark.any_pytorch
@pytest.mark.parametrize(
    "trained", [names for n in range(1, 6) for names in itertools.combinations(NAMES, n)], ids="+".join
)
def test_frozen_inputs_still_exchange_once_each_way(trained):
    run_ranks(3, _frozen, trained)


def _loss_of_one_rank(chosen, how):
    """Only tokens of one rank count in the loss."""
    lengths, rank = (4, 6, 3), dist.get_rank()
    x = random_inputs("head", 13, state=False)
    counted = torch.zeros(13, dtype=torch.float64)
    start = sum(lengths[:chosen])
    counted[start : start + lengths[chosen]] = 1
    x = replace(x, do=x.do * counted.view(1, -1, 1, 1), d_final_state=torch.zeros_like(x.d_final_state))
    _, _, expected = oracle(x)
    local = x.shard(lengths, rank)
    wanted = local.require_grad()
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    o, _ = run(lasp.linear_attention, local, sequence=sequence)
    loss = (o * local.do).sum()
    if how == "times zero" and rank != chosen:
        loss = o.sum() * 0
    loss.backward()
    assert sequence.traffic.reverse_exchanges == 1
    for name, t in zip(("q", "k", "v"), wanted):
        assert_close(t.grad, cut(expected[name], lengths, rank), f"d{name}")


@pytest.mark.parametrize("how", ["zero gradient", "times zero"])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_loss_of_one_rank_only(chosen, how):
    run_ranks(3, _loss_of_one_rank, chosen, how)


def _final_state_only(chosen):
    """The outputs are unused, and only one rank's final state is in the loss."""
    lengths, rank = (4, 6, 3), dist.get_rank()
    x = random_inputs("channel", 13)
    x = replace(x, do=torch.zeros_like(x.do))
    _, _, expected = oracle(x)
    local = x.shard(lengths, rank)
    local.require_grad()
    _, final_state = run(lasp.linear_attention, local, output_final_state=True, sequence=sequence_of_all())
    # Its gradient lies in memory in another way than those of the others.
    weight = x.d_final_state.mT.contiguous() if rank == chosen else torch.zeros_like(x.d_final_state)
    ((final_state.mT if rank == chosen else final_state) * weight).sum().backward()
    for name in ("k", "v", "log_decay"):
        assert_close(getattr(local, name).grad, cut(expected[name], lengths, rank), f"d{name}")


@pytest.mark.parametrize("chosen", [0, 2])
def test_loss_on_the_final_state_of_one_rank(chosen):
    run_ranks(3, _final_state_only, chosen)


# Modes of PyTorch


def _no_grad():
    lengths, rank = (4, 6), dist.get_rank()
    x = random_inputs("head", 10)
    o, final_state, _ = oracle(x)
    local = x.shard(lengths, rank)
    local.require_grad()
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    with torch.no_grad():
        o_local, final_local = run(lasp.linear_attention, local, output_final_state=True, sequence=sequence)
    assert not o_local.requires_grad
    assert sequence.traffic.reverse_exchanges == 0
    assert_close(o_local, cut(o, lengths, rank), "o")
    assert_close(final_local, final_state, "final_state")


def test_no_grad():
    run_ranks(2, _no_grad)


def _autocast():
    x = random_inputs("head", 10, dtype=torch.float32).shard((4, 6), dist.get_rank())
    leaves = x.require_grad()
    with torch.autocast("cpu", torch.bfloat16):
        o, final_state = run(lasp.linear_attention, x, output_final_state=True, sequence=sequence_of_all())
        assert (o.dtype, final_state.dtype) == (torch.bfloat16, torch.float32)
        (o.float().sum() + final_state.sum() / 2).backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 5
    rounded = replace(x, **{n: getattr(x, n).detach().bfloat16() for n in "qkv"})
    plain, _ = run(lasp.linear_attention, rounded, sequence=sequence_of_all())
    assert torch.equal(o, plain)


def test_autocast_computes_in_its_dtype_and_keeps_the_state_in_fp32():
    run_ranks(2, _autocast)


def _second_derivative():
    x = random_inputs("head", 10).shard((4, 6), dist.get_rank())
    x.require_grad()
    o, _ = run(lasp.linear_attention, x, sequence=sequence_of_all())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(o.sum(), x.q, create_graph=True)


@pytest.mark.parametrize("world", [1, 2])
def test_second_derivative_is_refused(world):
    if world == 1:
        x = random_inputs("head", 6)
        x.require_grad()
        o, _ = run(lasp.linear_attention, x)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(o.sum(), x.q, create_graph=True)
    else:
        run_ranks(2, _second_derivative)


def _same_bits_twice_and_strided(form):
    x = random_inputs(form, 75, dtype=torch.float32).shard((70, 5), dist.get_rank())
    results = []
    for layout in ("contiguous", "contiguous", "strided"):
        given = {name: t.detach().clone() for name, t in x.given.items()}
        if layout == "strided":  # [B, H, T, K] seen as [B, T, H, K], and every other element of a wider one
            given = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 4 else t for n, t in given.items()}
            given["v"] = torch.stack([given["v"], -given["v"]], -1)[..., 0]
            assert not given["q"].is_contiguous() or given["q"].shape[1] == 1
        before = {name: t.clone() for name, t in given.items()}
        y = replace(x, **given)
        y.require_grad()
        o, final_state = run(lasp.linear_attention, y, output_final_state=True, sequence=sequence_of_all())
        do = y.do.transpose(1, 2).contiguous().transpose(1, 2) if layout == "strided" else y.do
        found = gradients(replace(y, do=do), o, final_state)
        assert all(torch.equal(before[name], given[name]) for name in given), "an input was changed"
        results.append([o, final_state, *found.values()])
    first, again, strided = results
    assert all(torch.equal(a, b) for a, b in zip(first, again)), "same input, other bits"
    for a, b in zip(first, strided):
        assert_close(b, a, "strided inputs", rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_twice_inputs_unchanged_and_any_strides(form):
    run_ranks(2, _same_bits_twice_and_strided, form)


# Groups


def _order_of_mesh(order):
    mesh = DeviceMesh("cpu", order)
    sequence = lasp.SequenceParallel(mesh)
    assert sequence.ranks == tuple(order)
    assert sequence.rank == order.index(dist.get_rank())
    lengths = (5, 0, 66, 3)
    check_against_oracle(random_inputs("token", sum(lengths)), lengths, sequence)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]], ids=str)
def test_sequence_follows_the_order_of_the_mesh(order):
    run_ranks(4, _order_of_mesh, order)


def _two_groups_at_once(as_group):
    """Ranks 0 and 2 hold one sequence, 3 and 1 another."""
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3] if as_group else [3, 1]], mesh_dim_names=("dp", "sp"))
    sequence = lasp.SequenceParallel(mesh["sp"].get_group() if as_group else mesh["sp"])
    row = 0 if dist.get_rank() in (0, 2) else 1
    lengths = (5, 9) if row == 0 else (66, 2)
    check_against_oracle(random_inputs("channel", sum(lengths), seed=row), lengths, sequence)


@pytest.mark.parametrize("as_group", [True, False])
def test_two_groups_of_ranks_that_are_not_neighbours(as_group):
    run_ranks(4, _two_groups_at_once, as_group)


def _subgroup():
    group = dist.new_group([1, 3])
    if dist.get_rank() in (1, 3):
        check_against_oracle(random_inputs("head", 11), (4, 7), lasp.SequenceParallel(group))
    else:
        with pytest.raises(ValueError, match=f"rank {dist.get_rank()} is not in the sequence-parallel group"):
            lasp.SequenceParallel(group)


def test_a_process_group_of_some_ranks():
    run_ranks(4, _subgroup)


def _axis_of_mesh():
    sequence = lasp.SequenceParallel(mesh_of(sp=2)["sp"])
    check_against_oracle(random_inputs("head", 11, seed=dist.get_rank() // 2), (4, 7), sequence)


def test_sequence_axis_of_init_mesh():
    run_ranks(4, _axis_of_mesh)


@pytest.mark.any_pytorch
@pytest.mark.parametrize("form", FORMS)
def test_without_ranks_it_is_the_recurrence(form):
    x = random_inputs(form, 130, groups=2)
    o, final_state, expected = oracle(x)
    x.require_grad()
    o_here, final_here = run(lasp.linear_attention, x, output_final_state=True)
    assert_close(o_here, o, "o")
    assert_close(final_here, final_state, "final_state")
    for name, gradient in gradients(x, o_here, final_here).items():
        assert_close(gradient, expected[name], f"d{name}")


def test_final_state_is_returned_only_when_asked_for():
    x = random_inputs("none", 3)
    assert run(lasp.linear_attention, x)[1] is None


def _queries_made_later(lengths, form):
    """Output and gradients of a call that has q at once, bit for bit; and when q is asked for."""
    rank, sequence = dist.get_rank(), lasp.SequenceParallel(dist.group.WORLD, exchange="ring")
    x = random_inputs(form, sum(lengths), state=False).shard(lengths, rank)
    expected = None
    for turn in range(3):  # the first call is compared, and has q before it exchanges
        x.require_grad(NAMES)
        exchanged = []

        def make(q=x.q, exchanged=exchanged):
            exchanged.append(sequence.traffic.forward_exchanges)
            return q.square()

        q = x.q.square() if turn == 1 else make
        o, _ = lasp.linear_attention(q, x.k, x.v, log_decay=x.log_decay, scale=SCALE, sequence=sequence)
        leaves = [leaf for leaf in (x.q, x.k, x.v, x.log_decay) if leaf is not None]
        found = [o.detach(), *torch.autograd.grad(o, leaves, x.do)]
        expected = expected or found
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert exchanged == [[0], [], [3]][turn]
    assert sequence.traffic.reverse_exchanges == 3


@pytest.mark.parametrize("form", FORMS)
def test_queries_may_be_made_while_the_state_travels(form):
    run_ranks(3, _queries_made_later, (70, 0, 3), form)


def _wrong_queries_made_later():
    """The same error at a compared call and later; the group works afterwards, on every rank."""
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange="ring", validate="off")
    x = random_inputs("none", 9 * sequence.size)
    k, v = torch.zeros(1, 5, 2, 3), torch.zeros(1, 5, 2, 4)

    def exchanges():
        return lasp.linear_attention(k, k, v, sequence=sequence)[0]

    def fails():
        raise KeyError("of the user")

    cases = [
        (lambda: k[:, 1:], ValueError, r"q must make a tensor like k, \(1, 5, 2, 3\).*, got \(1, 4, 2, 3\)"),
        (lambda: k.repeat(1, 1, 2, 1), ValueError, r"got \(1, 5, 4, 3\)"),
        (lambda: k.double(), ValueError, "got .*float64"),
        (lambda: None, TypeError, "q must make a tensor, got None"),
        (fails, KeyError, "of the user"),
    ]
    if sequence.size > 1:
        cases.append((exchanges, RuntimeError, "must not exchange"))
    for make, kind, message in cases:
        with pytest.raises(kind, match=message):
            lasp.linear_attention(make, k, v, sequence=sequence)
        check_against_oracle(x, (9,) * sequence.size, sequence)
    compared = lasp.SequenceParallel(dist.group.WORLD)
    with pytest.raises(lasp.RankMismatchError if sequence.size > 1 else ValueError, match=r"got \(1, 5, 4, 3\)|failed"):
        lasp.linear_attention(cases[1][0] if sequence.rank == 0 else k, k, v, sequence=compared)
    with pytest.raises(TypeError, match="k must be a tensor, got 3"):
        lasp.linear_attention(lambda: k, 3, v, sequence=sequence)  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [1, 3])
def test_what_makes_queries_must_make_the_right_ones(world):
    run_ranks(world, _wrong_queries_made_later)


def _states_of_segments_live_no_longer():
    """With a function as with a tensor: they are large."""
    sequence = lasp.SequenceParallel(dist.group.WORLD, validate="off")
    x = random_inputs("head", 70)
    living = []

    def outputs(self, *arguments):
        living.append(segments() is not None)
        return original(self, *arguments)

    def states(self, *arguments, **options):
        nonlocal segments
        found = make(self, *arguments, **options)
        segments = weakref.ref(found)
        return found

    segments, original, make = lambda: None, ChunkedSteps.outputs, ChunkedSteps.local_maps
    with mock.patch.multiple(ChunkedSteps, outputs=outputs, local_maps=states):
        for q in (x.q, lambda: x.q):
            lasp.linear_attention(q, x.k, x.v, log_decay=x.log_decay, sequence=sequence)
    assert living == [False, False]


def test_states_of_segments_are_freed_before_outputs():
    run_ranks(2, _states_of_segments_live_no_longer)


def _exchange_in_the_maker():
    """From the first call on, and whatever is exchanged there."""
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    x, weight = torch.zeros(1, 4, 2, 3), torch.zeros(6, 3)
    makers = {
        "conv": lambda: lasp.causal_conv(x.flatten(2), weight, sequence=sequence).view(x.shape),
        "attention": lambda: lasp.linear_attention(x, x, x, sequence=sequence)[0],
        "softmax": lambda: lasp.softmax_attention(x, x, x, sequence=sequence),
        "unshard": lambda: lasp.unshard_sequence(x, sequence)[:, :4],
    }
    for _ in range(2):
        for make in makers.values():
            with pytest.raises((RuntimeError, lasp.RankMismatchError), match="must not exchange anything"):
                lasp.linear_attention(make, x, x, sequence=sequence)
        lasp.linear_attention(lambda: x, x, x, sequence=sequence)


def test_what_makes_queries_must_not_exchange():
    run_ranks(3, _exchange_in_the_maker)


def _maker_that_fails():
    """With a final state, which others wait for as well."""
    rank, sequence = dist.get_rank(), lasp.SequenceParallel(dist.group.WORLD)
    x = torch.ones(1, 4, 2, 3)
    make = lambda: x  # noqa: E731
    lasp.linear_attention(make, x, x, sequence=sequence, output_final_state=True)
    if rank == 0:
        with pytest.raises(ZeroDivisionError):
            lasp.linear_attention(lambda: 1 / 0, x, x, sequence=sequence, output_final_state=True)
    else:
        lasp.linear_attention(make, x, x, sequence=sequence, output_final_state=True)
    _, state = lasp.linear_attention(make, x, x, sequence=sequence, output_final_state=True)
    assert state.unique().tolist() == [12.0]


def test_a_maker_that_fails_leaves_the_others_no_one_to_wait_for():
    run_ranks(3, _maker_that_fails)


def _not_a_number(schedule, reverse):
    """It stays in its packed sequence, on whatever ranks that lies."""
    rank, lengths, cu_seqlens = dist.get_rank(), (8, 8, 8, 8), (0, 8, 32) if not reverse else (0, 24, 32)
    layout, sequence = lasp.ShardLayout(lengths, cu_seqlens), lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
    x = torch.randn(1, 8, 2, 4, requires_grad=True)
    beta, weight = torch.full((1, 8, 2), 0.5), torch.ones(8, 3)
    bad = rank == (3 if reverse else 0)
    poison = torch.full((), float("nan")) if bad else torch.ones(())
    for operator in (
        lambda x: lasp.linear_attention(x, x, x, layout=layout, sequence=sequence)[0],
        lambda x: lasp.linear_attention(x, x, x, log_decay=-torch.ones(2), layout=layout, sequence=sequence)[0],
        lambda x: lasp.delta_rule(x, x, x, beta, layout=layout, sequence=sequence)[0],
        lambda x: lasp.causal_conv(x.flatten(2), weight, layout=layout, sequence=sequence).view(x.shape),
    ):
        o = operator(x if reverse else x * poison)
        assert o.isfinite().all() or bad
        (dx,) = torch.autograd.grad(o, x, torch.ones_like(o) * (poison if reverse else 1.0))
        assert dx.isfinite().all() or bad


@pytest.mark.any_pytorch
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reverse", [False, True])
def test_not_a_number_stays_in_its_packed_sequence(schedule, reverse):
    run_ranks(4, _not_a_number, schedule, reverse)


def _no_batch(schedule):
    sequence, layout = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule), lasp.ShardLayout((8, 8))
    x, beta, weight = torch.zeros(0, 8, 2, 4, requires_grad=True), torch.zeros(0, 8, 2), torch.ones(8, 3)
    for o in (
        lasp.linear_attention(x, x, x, sequence=sequence)[0],
        lasp.delta_rule(x, x, x, beta, sequence=sequence)[0],
        lasp.softmax_attention(x, x, x, sequence=sequence),
        lasp.causal_conv(x.flatten(2), weight, sequence=sequence),
        elementwise_recurrence(x, beta.unsqueeze(-1), sequence=sequence),
        selective_scan(x.flatten(2), x.detach().flatten(2), -torch.ones(8, 2), beta, beta, sequence=sequence),
        lasp.linear_attention(x, x, x, causal=False, layout=layout, sequence=sequence)[0],
        lasp.block_attention(x, x, x, 3, layout=layout, sequence=sequence),
        lasp.halo(x, 3, sequence=sequence),
    ):
        o.sum().backward()
        assert o.shape[0] == 0


@pytest.mark.any_pytorch
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_empty_batch(schedule):
    run_ranks(2, _no_batch, schedule)
