"""Calls that are not compared: another tensor on one rank is an error on every rank, and nothing is sent."""

import time
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from inputs import random_inputs
from ranks import run_ranks
from small_model import SmallModel
from test_agreement import SOON, works
from test_attention import check_against_oracle
from torch.utils.checkpoint import checkpoint

import lasp
from lasp import exchange
from lasp.checks import agreement, messages
from lasp.checks.rounds import Round
from lasp.ops import halo, softmax, tokens
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp.ranks import SCHEDULES, peers_of
from lasp.ranks.group import process, set_timeout, timeout_of

B, T, H, K, V = 2, 5, 2, 3, 4

DIFFERENT = {
    "batch": ((B + 1, T, H, K, V), torch.float32, r"state \(3, 2, 3, 4\)"),
    "heads": ((B, T, H - 1, K, V), torch.float32, r"state \(2, 1, 3, 4\)"),
    "more heads": ((B, T, H + 1, K, V), torch.float32, r"state \(2, 3, 3, 4\)"),
    "values": ((B, T, H, K, V + 1), torch.float32, r"state \(2, 2, 3, 5\)"),
    "dtype": ((B, T, H, K, V), torch.float64, r"dtype torch.float64"),
}


def draw(shape=(B, T, H, K, V), dtype=torch.float32):
    batch, tokens, heads, k, v = shape
    draw = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(batch, tokens, heads, n, generator=draw, dtype=dtype) for n in (k, k, v)]


def raises(odd, message, what):
    """On every rank, soon; `what` is what the message says of the odd one."""
    shown = rf"rank {odd} has come to {message}.*{what}.*, the others"
    if dist.get_world_size() == 2:  # of which the first is taken to be right
        shown = rf"rank 1 has come to .*{what}" if odd == 1 else rf"the others .*{what}"
    return pytest.raises(lasp.RankMismatchError, match=shown)


def _differ_later(schedule, form, odd, train):
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule, name="deep")
    shape, dtype, shown = DIFFERENT[form]
    same = draw()
    for _ in range(2):
        expected, _ = lasp.linear_attention(*same, sequence=sequence)
    sent = (sequence.traffic.messages, sequence.traffic.forward_exchanges)
    started = time.monotonic()
    for _ in range(2):  # also once it was caught
        other = [x.requires_grad_(train) for x in (draw(shape, dtype) if rank == odd else draw())]
        with raises(odd, "layer 'deep', forward: linear_attention", shown):
            lasp.linear_attention(*other, sequence=sequence)
    assert time.monotonic() - started < SOON
    assert sent == (sequence.traffic.messages, sequence.traffic.forward_exchanges)
    o, _ = lasp.linear_attention(*same, sequence=sequence)
    assert torch.equal(o, expected)
    works(sequence)


@pytest.mark.parametrize("form", DIFFERENT)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_another_tensor_at_a_later_call(schedule, form):
    odd = list(DIFFERENT).index(form) % 3
    run_ranks(3, _differ_later, schedule, form, odd, form != "batch")


@pytest.mark.parametrize("odd", range(2))
def test_another_tensor_at_a_later_call_of_two_ranks(odd):
    run_ranks(2, _differ_later, "auto", "heads", odd, False)


def _differ_in_decays():
    """The far heads, of which each rank makes up its mind from what the host knows."""
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange="ring")
    layout = lasp.ShardLayout((T,) * 3)
    for odd in (False, True):
        rates = [-200.0, -0.1] if odd and rank == 1 else [-0.2, -0.1]
        decay = lasp.decay.fixed(torch.tensor(rates))
        with raises(1, "", "far heads ") if odd else nullcontext():
            lasp.linear_attention(*draw(), log_decay=decay, layout=layout, sequence=sequence)
    works(sequence)


def test_another_fixed_decay_at_a_later_call():
    run_ranks(3, _differ_in_decays)


def _linear(sequence, **other):
    """A call, and what is called instead."""
    options = {"scale": 1.0, "layout": lasp.ShardLayout((T,) * 3, (0, 4, 15))} | other
    heads, dtype, rate = (options.pop(name, x) for name, x in (("heads", 1), ("dtype", torch.float32), ("rate", -1.0)))
    q, k, v = (x[:1] for x in draw(dtype=dtype))
    q, decay = q.repeat(1, 1, heads, 1), torch.tensor([rate, -1.0])
    return lambda: lasp.linear_attention(q, k, v, log_decay=decay, sequence=sequence, **options)


def _softmax(sequence, **other):
    q, k, v = draw()
    return lambda: lasp.softmax_attention(q, k, v, sequence=sequence, **other)


def _delta(sequence, **other):
    q, k, v = draw()
    return lambda: lasp.delta_rule(q, k, v, torch.ones(B, T, H), sequence=sequence, **other)


FACTS = {
    "scale": (_linear, {"scale": 0.25}, "scale 0.25, the others 1.0"),
    "segment_length": (_linear, {"segment_length": 64}, "segment_length 64, the others None"),
    "16 bits": (_linear, {"dtype": torch.bfloat16}, "dtype torch.bfloat16, the others torch.float32"),
    "query heads": (_linear, {"heads": 2}, "query heads 4, the others 2"),
    "decays": (_linear, {"rate": -0.5}, r"fixed decays \(-0.5, -1.0\), the others \(-1.0, -1.0\)"),
    "final state": (_linear, {"output_final_state": True}, "output_final_state True, the others False"),
    "scale of the delta rule": (_delta, {"scale": 0.25}, "scale 0.25, the others 1.0"),
    "window": (_softmax, {"window": 3}, "window 3, the others None"),
    "scale of softmax": (_softmax, {"scale": 2}, "scale 2.0, the others None"),
    "softcap": (_softmax, {"softcap": 2.0}, "softcap 2.0, the others None"),
    "dropout": (_softmax, {"dropout_p": 0.5}, "dropout_p 0.5, the others 0.0"),
}
LAYOUTS = {
    "borders": ((0, 3, 15), "2 packed sequences over 3 ranks, checksum .*, the others 2 packed"),
    "no documents": (None, "a batch over 3 ranks, checksum .*, the others 2 packed"),
}
FACTS |= {
    name: (_linear, {"layout": lasp.ShardLayout((T,) * 3, offsets)}, f"layout {shown}")
    for name, (offsets, shown) in LAYOUTS.items()
}


def _another_fact(name, odd):
    """Messages are as they should be."""
    rank, (call, other, shown) = dist.get_rank(), FACTS[name]
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange="ring", name="deep")
    for _ in range(2):
        call(sequence)()
    sent, started = sequence.traffic.messages, time.monotonic()
    for _ in range(2):
        with pytest.raises(lasp.RankMismatchError, match=f"^layer 'deep', forward: .*: rank {odd} has {shown}"):
            call(sequence, **(other if rank == odd else {}))()
    assert time.monotonic() - started < SOON
    assert sent == sequence.traffic.messages
    call(sequence)()
    works(sequence)


@pytest.mark.parametrize("name", FACTS)
def test_another_fact_of_a_later_call(name):
    run_ranks(3, _another_fact, name, list(FACTS).index(name) % 3)


def _in_a_long_header():
    """What does not fit into the first message is named all the same."""
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="x" * 300)
    for n in range(3):
        other = {"scale": 3.0} if n == 2 and dist.get_rank() == 1 else {}
        with pytest.raises(lasp.RankMismatchError, match=r"rank 1 has scale 3\.0") if n == 2 else nullcontext():
            _linear(sequence, **other)()


def test_another_fact_beside_a_long_name():
    run_ranks(3, _in_a_long_header)


def _elsewhere_than_sync_grads(odd):
    """Ranks that come to the sum of gradients do not wait for one that comes to a layer."""
    rank, group = dist.get_rank(), dist.new_group([0, 1, 2])
    model, sequence = SmallModel(), lasp.SequenceParallel(group, name="deep")
    for _ in range(2):
        lasp.sync_grads(model, group)
        _linear(sequence)()
    started = time.monotonic()
    with raises(odd, "layer 'deep', forward: linear_attention", ""):
        _linear(sequence)() if rank == odd else lasp.sync_grads(model, group)
    assert time.monotonic() - started < SOON
    lasp.sync_grads(model, group)


@pytest.mark.parametrize("odd", range(3))
def test_a_rank_that_is_elsewhere_than_at_the_sum_of_gradients(odd):
    run_ranks(3, _elsewhere_than_sync_grads, odd)


# What follows an exchange, and the other operators


def _operators(x, bad, sequence):
    """Calls by name; `bad` is whether this rank's is another one."""
    wide = torch.cat([x, x], 2) if bad else x
    beta, layout = x[..., 0], lasp.ShardLayout((T,) * sequence.size)
    more = x.new_zeros(B + B * bad, H, K, K)
    both = torch.cat([x, x]) if bad else x
    return {
        "delta": lambda: lasp.delta_rule(wide, wide, wide, wide[..., 0], sequence=sequence),
        "conv": lambda: lasp.causal_conv(wide.flatten(2), x.new_zeros(wide[0, 0].numel(), 3), sequence=sequence),
        "width": lambda: lasp.halo(x, 4 if bad else 3, sequence=sequence),
        "softmax": lambda: lasp.softmax_attention(wide, wide, wide, sequence=sequence),
        "softmax layout": lambda: lasp.softmax_attention(wide, wide, wide, layout=layout, sequence=sequence),
        "dtype of softmax": lambda: lasp.softmax_attention(*[x.double() if bad else x] * 3, sequence=sequence),
        "elementwise": lambda: elementwise_recurrence(wide, -wide, sequence=sequence),
        "dtype of elementwise": lambda: elementwise_recurrence(
            *[x.double() * 0 if bad else x * 0] * 2, sequence=sequence
        ),
        "selective": lambda: selective_scan(
            x[..., 0], x[..., 0], -torch.ones(H, K + bad), *[x.new_zeros(B, T, K + bad)] * 2, sequence=sequence
        ),
        "initial state": lambda: lasp.linear_attention(
            both, both, both, initial_state=more, log_decay=-beta.new_ones(H), sequence=sequence
        ),
        "unshard": lambda: lasp.unshard_sequence(wide, sequence),
        "dtype of unshard": lambda: lasp.unshard_sequence(x.half() if bad else x, sequence),
        "rows of unshard": lambda: lasp.unshard_sequence(both, sequence),
    }


OPERATORS = [
    "delta",
    "conv",
    "width",
    "softmax",
    "softmax layout",
    "dtype of softmax",
    "elementwise",
    "dtype of elementwise",
    "selective",
    "initial state",
    "unshard",
    "dtype of unshard",
    "rows of unshard",
]


def _differ_in_operator(name, odd):
    rank, x = dist.get_rank(), torch.ones(B, T, H, K)
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    for _ in range(2):
        _operators(x, False, sequence)[name]()
    started = time.monotonic()
    with raises(odd, "", ""):
        _operators(x, rank == odd, sequence)[name]()
    assert time.monotonic() - started < SOON
    _operators(x, False, sequence)[name]()


@pytest.mark.parametrize("name", OPERATORS)
def test_another_tensor_at_a_later_call_of_an_operator(name):
    run_ranks(3, _differ_in_operator, name, OPERATORS.index(name) % 3)


def _shard_with_other_widths():
    rank = dist.get_rank()
    good, bad = torch.zeros(1, 6, 2).requires_grad_(), torch.zeros(1, 6, 2 + (rank == 1)).requires_grad_()
    lasp.shard_sequence(good, dist.group.WORLD).sum().backward()
    with raises(1, "shard_sequence or unshard_sequence", r"\(1, 'T', 3\)"):
        lasp.shard_sequence(bad, dist.group.WORLD).sum().backward()
    lasp.shard_sequence(good, dist.group.WORLD).sum().backward()


def test_gradients_of_slices_of_another_tensor():
    run_ranks(3, _shard_with_other_widths)


def _sum_of_final_states():
    """Ranks come to it after the exchange of the state."""
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    call = lasp.ops.call.call_of("linear_attention", torch.zeros(B, T, H, K), None, sequence)
    call.sum_over_ranks(torch.ones(B, H, K, V))
    with raises(2, "layer '', backward: linear_attention, the sum of the gradients of the final states", r"\(3, 2"):
        call.sum_over_ranks(torch.ones(B + (rank == 2), H, K, V), reverse=True)
    assert call.sum_over_ranks(torch.ones(B, H, K, V)).eq(3).all()


def test_sums_of_other_states():
    run_ranks(3, _sum_of_final_states)


def _swapped(evaluates):
    """Two layers of equal shapes in another order; nobody would notice by the size of a message."""
    rank = dist.get_rank()
    model = lasp.parallelize(SmallModel(), dist.group.WORLD)
    ids, places = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4) + 4 * rank
    for _ in range(2):
        model(ids, places).sum().backward()
    if rank == 1:
        model.blocks = torch.nn.ModuleList([model.blocks[1], model.blocks[0]])
    started = time.monotonic()
    with raises(1, "layer 'blocks.1.mixer.inner'", "") as caught, torch.set_grad_enabled(not evaluates):
        model(ids, places)
    assert "the others layer 'blocks.0.mixer.inner'" in str(caught.value)
    assert time.monotonic() - started < SOON


@pytest.mark.parametrize("evaluates", [False, True])
def test_two_layers_that_are_swapped_at_a_later_call(evaluates):
    run_ranks(3, _swapped, evaluates)


class Skips(torch.nn.Module):
    """In place of a layer, and no mixing: it may come into a split model."""

    def forward(self, q, k, v, **options):
        return v


def _left_out(direction):
    """A rank that leaves a layer out comes to another one."""
    rank = dist.get_rank()
    model = lasp.parallelize(SmallModel(), dist.group.WORLD)
    ids, places = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4) + 4 * rank
    model(ids, places).sum().backward()
    mixer, started = model.blocks[0 if direction == "forward" else 1].mixer, time.monotonic()
    sound = mixer.inner.forward
    if rank == 2 and direction == "forward":
        mixer.inner = Skips()
    elif rank == 2:
        mixer.inner.forward = lambda q, k, v, **o: sound(q, k, v, **o).detach()
    with raises(2, f"layer 'blocks.{int(direction == 'forward')}.mixer.inner', {direction}", ""):
        model(ids, places).sum().backward()
    assert time.monotonic() - started < SOON


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_layer_that_a_rank_leaves_out_at_a_later_call(direction):
    run_ranks(3, _left_out, direction)


# Where messages do not wait for the host


class Ahead:
    """As over NCCL: nothing is waited for, and what comes is whatever comes."""

    def __init__(self, local):
        self.local = local

    def wait(self):
        return self.local.zeros()


def _start(local, sequence, *, fold, terms=exchange.FORWARD, operator="state"):
    exchange.count_exchange(sequence, sequence.traffic_of(operator), reverse=terms.reverse)
    return Ahead(local)


def on_nccl():
    """Messages of which a host sees nothing."""
    return mock.patch.multiple(exchange, start=_start), mock.patch.object(messages, "on_hosts", return_value=False)


def _new_kind(odd, evaluates):
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="deep")
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    compared = []
    compare = Round.compare

    def spy(self, record):
        compared.append(self.before)
        return compare(self, record)

    def step(heads):
        x = torch.zeros(B, T, heads, K) * weight
        lasp.linear_attention(x, x, x, sequence=sequence)[0].sum().backward()
        if not evaluates:
            optimizer.step()

    peers_of(dist.group.WORLD).agreed.clear()
    start, hosts = on_nccl()
    with start, hosts, mock.patch.object(Round, "compare", spy):
        for heads in (2, 2, 3, 2, 3):
            step(heads)
        assert [text.startswith("a new kind") for text in compared].count(True) == 4  # of two, forward and backward
        started, before = time.monotonic(), weight.detach().clone()
        others = "the exchange" if evaluates else "the step of the optimizer"
        comes_next = mock.patch.object(agreement, "EVERY", 1) if evaluates and rank != odd else nullcontext()
        with raises(odd, '"a new kind of message', "") as caught, comes_next:
            step(4 if rank == odd else 2)
            step(2)
        assert f'the others "{others}"' in str(caught.value)
        assert time.monotonic() - started < SOON
        assert torch.equal(weight, before)
        step(2)


@pytest.mark.parametrize("odd", range(3))
def test_a_kind_of_message_is_compared_once_where_the_host_does_not_wait(odd):
    run_ranks(3, _new_kind, odd, False)


def test_a_new_kind_of_message_in_an_evaluation():
    run_ranks(3, _new_kind, 1, True)


_NAMES = ("query heads", "fixed decays")  # of facts that are not those of an argument


def _later_fact(name, odd):
    """The messages go; before the step all ranks know."""
    rank, (call, other, shown) = dist.get_rank(), FACTS[name]
    group = dist.new_group([0, 1, 2])
    sequence = lasp.SequenceParallel(group, name="deep")
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.ones(())
    start, hosts = on_nccl()
    if call is _linear and "layout" in other:
        shown = r'layouts since the last step "2, checksum \w{8}", the others "2, checksum'
    else:
        value, usual = shown.split(", the others ")
        fact = next(x for x in (*_NAMES, *other) if value.startswith(x))
        value = value.removeprefix(f"{fact} ")
        several = ", ".join(sorted([value, usual]))
        shown = rf"a call's {fact} in layer 'deep' \(\w+\) {several}, the others {usual}$"
    with start, hosts:
        for n in range(4):
            before = weight.detach().clone()
            for m in range(2):
                call(sequence, **(other if (rank, n, m) == (odd, 2, 1) else {}))()
            started = time.monotonic()
            with pytest.raises(lasp.RankMismatchError, match=f"rank {odd} has {shown}") if n == 2 else nullcontext():
                optimizer.step()
            assert time.monotonic() - started < SOON
            assert torch.equal(weight, before) == (n == 2)


# One that sends more messages is found by these.
@pytest.mark.parametrize("name", [name for name in FACTS if name != "final state"])
def test_another_fact_where_the_host_does_not_wait(name):
    run_ranks(3, _later_fact, name, list(FACTS).index(name) % 3)


def _packed_batches():
    """Their borders, and how many there are, make no new kind; only whether a state gets past a rank at all."""
    rank = dist.get_rank()
    group = dist.group.WORLD
    start, hosts = on_nccl()
    for name in ("ring", "all_gather"):
        sequence = lasp.SequenceParallel(group, exchange=name)
        known = []
        with start, hosts:
            for offsets in ((0, 7, 8, 15), (0, 15), (0, 4, 7, 9, 15), (0, 1, 2, 3, 15), (0, 3, 15), (0, 15, 15)):
                layout = lasp.ShardLayout((T,) * 3, offsets)
                q, k, v = (x[:1].requires_grad_() for x in draw())
                o, _ = lasp.linear_attention(q, k, v, layout=layout, sequence=sequence)
                o.sum().backward()
                known.append(len(peers_of(group).agreed))
        assert len(set(known[1:])) == 1, (rank, known)


def test_packed_batches_make_no_new_kind_of_message():
    run_ranks(3, _packed_batches)


def _other_kinds():
    """Those that are not an exchange of states: nothing is sent before all agree."""
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="deep")
    x = torch.ones(B, T + (rank == 1), H, K)
    call = lasp.ops.call.call_of(softmax.NAME, x, None, sequence)
    with mock.patch.object(messages, "on_hosts", return_value=False):
        with pytest.raises(lasp.RankMismatchError, match=r'"deep": rank 1 has most tokens 7, the others 6'):
            tokens.gather(x, (6, 6, 6 + (rank == 1)), call)
        with pytest.raises(lasp.RankMismatchError, match=r'"deep": rank 1 has most tokens 7, the others 6'):
            tokens.deal(torch.ones(B, 6, 3, K), (6, 6, 6 + (rank == 1)), call)
        with pytest.raises(lasp.RankMismatchError, match="rank 1 has shape"):
            halo.with_halo(x[:, :, : H - (rank == 1)], 3, lasp.ops.call.call_of(halo.NAME, x, None, sequence))
        with pytest.raises(lasp.RankMismatchError, match="rank 1 has dtype"):
            lasp.unshard_sequence(x.half() if rank == 1 else x, sequence)
        assert lasp.unshard_sequence(x, sequence).shape[1] == 3 * T + 1


def test_other_kinds_of_messages_where_the_host_does_not_wait():
    run_ranks(3, _other_kinds)


def test_off_and_fake_ask_nobody():
    run_ranks(2, _off)


def _off():
    sequence = lasp.SequenceParallel(dist.group.WORLD, validate="off")
    with mock.patch.object(messages, "_meet", side_effect=AssertionError):
        lasp.linear_attention(*draw(), sequence=sequence)
        lasp.unshard_sequence(draw()[0], sequence)


def _changing(schedule, on_host):
    """What a correct program may change from call to call, in batches of other sizes, dtypes and borders."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
    with mock.patch.object(messages, "on_hosts", return_value=on_host):
        for rows, lengths in ((2, (7, 3, 0)), (1, (4, 4, 4)), (3, (0, 9, 2)), (2, (7, 3, 0))):
            check_against_oracle(random_inputs("head", sum(lengths), B=rows), lengths, sequence)
        for offsets in ((0, 3, 12), (0, 12), (0, 1, 5, 5, 9, 12)):
            packed = random_inputs("token", 12, B=1, sequences=len(offsets) - 1)
            check_against_oracle(packed, (4,) * 3, sequence, cu_seqlens=offsets)
        for length, segments in ((130, 64), (64, 64), (130, None)):
            x = random_inputs("none", length * world)
            layout = lasp.ShardLayout((length,) * world)
            check_against_oracle(x, (length,) * world, sequence, layout=layout, segment_length=segments)
        x = [t.requires_grad_() for t in draw()]
        for autocast in (False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                o, _ = lasp.linear_attention(*x, sequence=sequence)
            assert o.dtype == (torch.bfloat16 if autocast else torch.float32)
            o.sum().backward()
        again = checkpoint(lambda *x: lasp.linear_attention(*x, sequence=sequence)[0], *x, use_reentrant=False)
        again.sum().backward()
        for tokens in (1, 5, 3):
            q, k, v = draw((1, tokens + rank, H, K, V))
            lasp.softmax_attention(q, k, v, sequence=sequence)
            assert lasp.unshard_sequence(k, sequence).shape[1] == world * tokens + 3


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
def test_what_changes_in_a_correct_program(schedule, on_host):
    run_ranks(3, _changing, schedule, on_host)


def _own_timeout():
    """A group that its user made with a longer timeout: what is told before an exchange waits as long as lasp does."""
    group, rank = dist.new_group([0, 1], timeout=timedelta(seconds=25)), dist.get_rank()
    before = process.timeout, timeout_of(dist.group.WORLD)
    sequence = lasp.SequenceParallel(group, exchange="ring")
    lasp.linear_attention(*draw(), sequence=sequence)
    try:
        set_timeout(timedelta(seconds=2))
        if rank == 0:
            started = time.monotonic()
            with pytest.raises(lasp.PeerError, match="the state, compared with rank 1 failed after"):
                lasp.linear_attention(*draw(), sequence=sequence)
            assert time.monotonic() - started < SOON
    finally:
        set_timeout(before[1])
        process.timeout = before[0]
    dist.barrier()


def test_the_timeout_of_lasp_holds_in_a_group_that_was_made_with_another():
    run_ranks(2, _own_timeout)
