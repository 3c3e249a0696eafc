"""Ranks that are about to compute different things: every rank raises at once, and the group works afterwards."""

import threading
import time
from collections import Counter
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from inputs import random_inputs
from ranks import mesh_of, run_ranks
from scripts import run_script
from small_model import SmallModel
from test_attention import check_against_oracle

import lasp
from lasp.checks import agreement
from lasp.checks.rounds import Round, judge
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp.ranks import peers_of
from lasp_kernels.chunked import ChunkedSteps

B, T, H, K, V = 2, 5, 2, 3, 4
SOON = 8.0  # seconds; a second store in the process of the tests can stall one for 5 (torch 2.13)


def arguments(dtype=torch.float32, **changed):
    shapes = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V)}
    return {**{name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}, **changed}


def packed(world):
    layout = lasp.ShardLayout((T,) * world, (0, 1, T * world))
    return {name: x[:1] for name, x in arguments().items()} | {"layout": layout}


def odd_calls(world):
    """What one rank might call instead of the others' `linear_attention(**arguments())`, and what is said about it."""
    zeros = torch.zeros
    return [
        (arguments(v=zeros(B, T, H, V + 1)), r'has v \[2, "T", 2, 5, .*\], the others \[2, "T", 2, 4, .*\]'),
        (arguments(q=zeros(B, T, 2 * H, K)), r'has q \[2, "T", 4, 3, .*\], the others \[2, "T", 2, 3, .*\]'),
        ({name: x[:1] for name, x in arguments().items()}, r'.*has k \[1, "T", 2, 3, .*\], the others \[2, "T", .*\]'),
        (arguments(torch.float64), r'has q \[2, "T", 2, 3, "torch.float64"\], the others \[.*, "torch.float32"\]'),
        (arguments(log_decay=zeros(H)), r'has log_decay \[2, "torch.float32"\], the others null'),
        (arguments(log_decay=zeros(B, T, H)), r'has log_decay \[2, "T", 2, "torch.float32"\], the others null'),
        (arguments(initial_state=zeros(B, H, K, V)), r"has initial_state \[2, 2, 3, 4, .*, the others null"),
        (arguments(scale=0.5), "has scale 0.5, the others 1.0"),
        (arguments(normalize=True), "has normalize true, the others false"),
        (arguments(v=zeros(B, T, 2 * H, V)), r'has v \[2, "T", 4, 4, .*\], the others \[2, "T", 2, 4, .*\]'),
        (arguments(segment_length=64), "has segment_length 64, the others null"),
        (arguments(output_final_state=True), "has output_final_state true, the others false"),
        (packed(world), '.*has layout "2 packed sequences over 3 ranks, checksum [0-9a-f]{8}", the others null'),
        (arguments(k=zeros(B, T, H, K + 1)), "failed before its exchange: ValueError: "),
        (arguments(v=None), "failed before its exchange: TypeError: v must be a tensor, got None"),
    ]


def _differ(number, odd):
    world, rank = dist.get_world_size(), dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="blocks.1")
    other, message = odd_calls(world)[number]
    started = time.monotonic()
    with pytest.raises(lasp.RankMismatchError, match=rf"blocks\.1.*rank {odd} {message}|rank {odd} .*blocks\.1") as e:
        lasp.linear_attention(**(other if rank == odd else arguments()), sequence=sequence)
    assert time.monotonic() - started < SOON
    failed = "failed" in message and rank == odd
    assert (e.value.__cause__ is not None) == failed
    assert (sequence.traffic.forward_exchanges, sequence.traffic.messages) == (0, 0)
    works(sequence)


FIRST_RANK_ENDS = """
import os, time, torch, lasp
from lasp.checks.rounds import Round
env = lasp.init("gloo", timeout=20.0)
if env.rank == 2:  # is late to read what was found
    wait = Round._wait
    Round._wait = lambda *args: (wait(*args), time.sleep(0.3))[0]
sequence = lasp.SequenceParallel(lasp.init_mesh(sp=-1, dp_shard=1)["sp"], name="blocks.1")
x = torch.ones(1, 3 + env.rank, 2 if env.rank == 1 else 1, 2)
try:
    lasp.linear_attention(x, x, x, sequence=sequence)
except Exception as error:
    print(type(error).__name__, error, flush=True)
    os._exit(1)
"""


def test_the_first_rank_may_end_at_once_and_take_the_store_along():
    for code, out, error in run_script(FIRST_RANK_ENDS, 3, agent=False):
        assert code == 1, error
        assert out.startswith('RankMismatchError layer "blocks.1": rank 1 has q [1, "T", 2, 2, '), out


def works(sequence):
    """The group, compared with the recurrence: nothing of the failed call is in the way."""
    world = sequence.size
    check_against_oracle(random_inputs("head", 7 * world), (7,) * world, sequence)


@pytest.mark.parametrize("number", range(13))
def test_a_call_that_differs_on_one_rank_raises_on_all(number):
    run_ranks(3, _differ, number, number % 3)


def _differ_in_settings(name, values, shown):
    rank = dist.get_rank()
    options = {"name": "a", name: values[rank]}
    sequence = lasp.SequenceParallel(dist.group.WORLD, **options)
    with pytest.raises(lasp.RankMismatchError, match=shown):
        lasp.linear_attention(**arguments(), sequence=sequence)
    works(lasp.SequenceParallel(dist.group.WORLD))


def test_a_rank_that_skips_a_layer_arrives_with_the_name_of_another():
    shown = r'rank 0 has layer "blocks.2", the others "blocks.1"'
    run_ranks(3, _differ_in_settings, "name", ("blocks.2", "blocks.1", "blocks.1"), shown)


def test_a_rank_that_looks_for_nan_while_the_others_do_not():
    shown = "rank 1 has check_finite true, the others false"
    run_ranks(3, _differ_in_settings, "check_finite", (False, True, False), shown)


def _differ_in_tokens():
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange="all_gather")
    x = {name: torch.zeros(1, 64 if rank == 1 else 576, H, 4) for name in "qkv"}
    with pytest.raises(lasp.RankMismatchError, match="rank 1 has tokens 64, the others 576"):
        lasp.linear_attention(**x, sequence=sequence, segment_length=64)
    works(sequence)
    lengths = (64, 576, 576)
    x = random_inputs("head", sum(lengths))
    check_against_oracle(x, lengths, sequence, segment_length=64, layout=lasp.ShardLayout(lengths))


def test_gathered_segments_need_equal_tokens_or_a_layout():
    run_ranks(3, _differ_in_tokens)


def _differ_in_grad_mode():
    x = arguments()
    x["q"].requires_grad_()
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    with (
        torch.set_grad_enabled(dist.get_rank() != 1),
        pytest.raises(lasp.RankMismatchError, match="rank 1 has grad_mode false, the others true"),
    ):
        lasp.linear_attention(**x, sequence=sequence)
    works(sequence)


def test_a_rank_that_evaluates_while_the_others_train():
    run_ranks(3, _differ_in_grad_mode)


def _leave_out_in_backward(odd):
    """Nobody waits, as where a backend keeps small messages: the exchange takes place and is not counted."""
    rank = dist.get_rank()
    model = SmallModel()
    mesh = mesh_of(sp=3)
    lasp.parallelize(model, mesh["sp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sequence = model.blocks[1].mixer.inner.sequence
    places = torch.arange(5) + 5 * rank

    def step(left_out):
        optimizer.zero_grad()
        model(torch.full((1, 5), 3), places).square().mean().backward()
        sequence.peers.exchanges[sequence.name, True] -= left_out
        lasp.sync_grads(model, mesh)
        optimizer.step()

    step(0)
    before = [p.detach().clone() for p in model.parameters()]
    shown = (
        rf"rank {odd} has exchanges since the last step .*\[1, 1\].*blocks\.1\.mixer\.inner.*\[1, 0\].*, the others "
    )
    started = time.monotonic()
    with pytest.raises(lasp.RankMismatchError, match=shown):
        step(int(rank == odd))
    assert time.monotonic() - started < SOON
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters()))
    step(0)
    assert not all(torch.equal(x, y) for x, y in zip(before, model.parameters()))


@pytest.mark.parametrize("odd", range(3))
def test_an_exchange_that_a_rank_left_out_is_noticed_before_the_optimizer_steps(odd):
    run_ranks(3, _leave_out_in_backward, odd)


def _two_groups(odd):
    """Ranks 0, 1 and ranks 1, 2 are groups of their own, and rank 1 compares with both at once."""
    rank = dist.get_rank()
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [1, 2])]  # collective
    mine = [lasp.SequenceParallel(group) for n, group in enumerate(groups) if rank in (n, n + 1)]
    for group in [sequence.group for sequence in (mine if rank else mine[::-1])]:
        peers_of(group).exchanges = Counter({("a", False): 1 + (rank == odd)})
    with pytest.raises(lasp.RankMismatchError, match="exchanges since the last step"):
        agreement.compare_exchanges()
    agreement.compare_exchanges()  # nothing since
    for group in groups:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            peers_of(group).exchanges = Counter({("a", True): rank})
            dist.destroy_process_group(group)
    agreement.compare_exchanges()  # with nobody: these groups are no more


def test_exchanges_of_several_groups_are_compared_at_once():
    run_ranks(3, _two_groups, 1)


def _all_fail():
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    heads = 3 + 2 * dist.get_rank()
    with pytest.raises(ValueError, match=f"got {heads} and 2"):
        lasp.linear_attention(**arguments(q=torch.zeros(B, T, heads, K)), sequence=sequence)
    works(sequence)


def test_ranks_that_all_fail_keep_their_own_errors():
    run_ranks(3, _all_fail)


def _out_of_memory():
    """An error that comes after the checks, in the middle of the computation."""
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="deep")
    working = ChunkedSteps.local_maps
    broken = torch.OutOfMemoryError("16 TiB") if dist.get_rank() == 2 else None
    message = "layer 'deep': OutOfMemoryError: 16 TiB"
    with (
        mock.patch.object(ChunkedSteps, "local_maps", working if broken is None else mock.Mock(side_effect=broken)),
        pytest.raises(lasp.RankMismatchError, match=f"rank 2 failed before its exchange: {message}") as caught,
    ):
        lasp.linear_attention(**arguments(), sequence=sequence)
    assert caught.value.__cause__ is broken
    works(sequence)


def test_an_error_in_the_computation_before_the_exchange():
    run_ranks(3, _out_of_memory)


def _compiled(differ):
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="c")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(q, k, v, scale):
        return lasp.linear_attention(q, k, v, scale=scale, sequence=sequence)[0]

    x = random_inputs("none", 5, state=False, dtype=torch.float32)
    q = x.q.requires_grad_()
    if differ:
        with pytest.raises(lasp.RankMismatchError, match=r"layer \"c\": rank 1 has scale 2.0, the others 1.0"):
            f(q, x.k, x.v, 2.0 if rank == 1 else 1.0)
        assert sequence.traffic.forward_exchanges == 0
    eager, _ = lasp.linear_attention(q, x.k, x.v, sequence=sequence)
    assert torch.equal(f(q, x.k, x.v, 1.0), eager)
    assert sequence.traffic.calls == 2  # what the ranks did not agree on is no call


@pytest.mark.parametrize("differ", [False, True])
def test_compiled_calls_are_compared_too(differ):
    run_ranks(3, _compiled, differ)


def _mixed_compiled(decay):
    """A rank may have fallen back to eager code: it computes the same, and tells the others the same."""
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    layout = lasp.ShardLayout((5, 5), padding=1)

    def f(q, k, v, log_decay):
        return lasp.linear_attention(q, k, v, log_decay=log_decay, layout=layout, sequence=sequence)[0]

    x = random_inputs("head" if decay != "none" else "none", 5, state=False, dtype=torch.float32)
    x.q.requires_grad_()
    log_decay = None if decay == "none" else x.log_decay.requires_grad_(decay == "learned")
    optimizer = torch.optim.SGD([x.q], lr=0.0)
    if dist.get_rank() == 1:
        f = torch.compile(f, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        f(x.q, x.k, x.v, log_decay).sum().backward()
        optimizer.step()
    with torch.no_grad():
        f(x.q, x.k, x.v, log_decay)
    assert (sequence.traffic.forward_exchanges, sequence.traffic.reverse_exchanges) == (3, 2)


@pytest.mark.parametrize("decay", ["none", "fixed", "learned"])
def test_compiled_and_eager_ranks_agree(decay):
    run_ranks(2, _mixed_compiled, decay)


# When


def _softmax_compiled():
    """The same for softmax attention, whose settings its op must be told; and up to a step."""
    group = dist.new_group([0, 1])
    sequence, layout = lasp.SequenceParallel(group), lasp.ShardLayout((5, 5))

    def f(x, window):
        return lasp.softmax_attention(x, x, x, window=window, softcap=2.0, layout=layout, sequence=sequence)

    x = random_inputs("none", 5, state=False, dtype=torch.float32).k.requires_grad_()
    if dist.get_rank() == 1:
        f = torch.compile(f, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        for window in (None, 3, 3):
            f(x, window).sum().backward()
            optimizer.step()
        with pytest.raises(lasp.RankMismatchError, match="rank 1 has window 4, the others 3"):
            f(x, 3 + dist.get_rank())
    f(x, 3).sum().backward()
    optimizer.step()


def test_compiled_and_eager_softmax_agree():
    run_ranks(2, _softmax_compiled)


def _autocast_only():
    """Where q, k and v have 16 bits anyway it changes what lies between."""
    rank, group = dist.get_rank(), dist.new_group([0, 1, 2])
    sequence, weight = lasp.SequenceParallel(group), torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for n in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=n != 1 and not (n == 2 and rank == 1)):
            lasp.linear_attention(**arguments(torch.bfloat16), sequence=sequence)
        shown = r'rank 1 has autocast \["off"\], the others \["torch.bfloat16"\]'
        with pytest.raises(lasp.RankMismatchError, match=shown) if n == 2 else nullcontext():
            optimizer.step()


def test_autocast_on_one_rank():
    run_ranks(3, _autocast_only)


def _schedule(every):
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    compared = []
    compare = Round.compare

    def spy(self, record):
        compared.append(sequence.traffic.calls)
        return compare(self, record)

    with mock.patch.object(agreement, "EVERY", every), mock.patch.object(Round, "compare", spy):
        for tokens in (5, 5, 7, 5, 0, 9, 5):  # new shapes are no reason
            q = torch.zeros(B, tokens, H, K)
            lasp.linear_attention(q, q, q, sequence=sequence)
    assert compared == [0, 3, 6]
    off = lasp.SequenceParallel(dist.group.WORLD, validate="off")
    with mock.patch.object(Round, "compare", spy):
        lasp.linear_attention(**arguments(), sequence=off)
    assert compared == [0, 3, 6]


def test_the_first_call_and_then_every_nth_is_compared():
    run_ranks(2, _schedule, 3)


def _later_call():
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    with mock.patch.object(agreement, "EVERY", 2):
        for _ in range(2):
            lasp.linear_attention(**arguments(), sequence=sequence)
        with pytest.raises(lasp.RankMismatchError, match=r"rank 0 has scale 3\.0, the others 1.0"):
            lasp.linear_attention(**arguments(), scale=1.0 if rank else 3.0, sequence=sequence)
    works(sequence)


def test_a_difference_at_a_later_comparison():
    run_ranks(3, _later_call)


def _keys():
    store = dist.group.WORLD.get_group_store()
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    lasp.linear_attention(**arguments(), sequence=sequence)
    dist.barrier()
    before = store.num_keys()
    dist.barrier()
    for n in range(6):
        sequence = lasp.SequenceParallel(dist.group.WORLD)
        if n % 2:
            lasp.linear_attention(**arguments(), sequence=sequence)
        else:
            with pytest.raises(lasp.RankMismatchError):
                lasp.linear_attention(**arguments(), scale=float(dist.get_rank()), sequence=sequence)
    dist.barrier()
    return before, store.num_keys()


def test_comparisons_leave_nothing_in_the_store():
    for before, after in run_ranks(3, _keys):
        assert after <= before


# Groups


def _two_sequences():
    """Of a 2 x 2 mesh only one sequence has an odd rank; the other goes on, and both work afterwards."""
    mesh = mesh_of(sp=2)
    sequence = lasp.SequenceParallel(mesh["sp"], name="x")
    mine = mesh.get_local_rank("dp_shard")
    for n in range(3):
        scale = 2.0 if (mine, sequence.rank, n) == (1, 1, 1) else 1.0
        fresh = lasp.SequenceParallel(mesh["sp"], name="x")
        if (mine, n) == (1, 1):
            with pytest.raises(lasp.RankMismatchError, match=r"rank 1 \(global rank 3\) has scale 2.0, the others 1.0"):
                lasp.linear_attention(**arguments(), scale=scale, sequence=fresh)
        else:
            lasp.linear_attention(**arguments(), scale=scale, sequence=fresh)
    works(sequence)


def test_groups_do_not_hear_each_other():
    run_ranks(4, _two_sequences)


def _late():
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    if dist.get_rank() == 1:
        time.sleep(1.0)
    works(sequence)


def test_a_rank_that_is_late_is_waited_for():
    run_ranks(3, _late)


def _absent(absent):
    """One rank does not come; all others say so, and when it does come it hears that they have gone."""
    rank = dist.get_rank()
    short = mock.patch("lasp.ranks.group.timeout_of", return_value=timedelta(seconds=1.0))
    works(lasp.SequenceParallel(dist.group.WORLD))  # the ranks have met before: what one leaves behind is found
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="far")
    if rank == absent:
        time.sleep(2.0)
    expected, message = lasp.PeerError, rf"'far': waited 1\.\d s for rank {absent} before the exchange"
    if rank == absent == 0:  # it is the one that compares
        expected, message = lasp.RankMismatchError, f"rank 1 failed before its exchange: PeerError: .*{message}"
    started = time.monotonic()
    with short, pytest.raises(expected, match=message):
        lasp.linear_attention(**arguments(), sequence=sequence)
    assert time.monotonic() - started < 3.0
    dist.barrier()
    works(sequence)


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_does_not_come_in_time_is_named(absent):
    run_ranks(3, _absent, absent)


# parallelize


def _parallelize(broken):
    rank = dist.get_rank()
    model = SmallModel()
    plan = {"nothing.*": lasp.adapters.linear} if rank in broken else None
    error = lasp.RankMismatchError if len(broken) < dist.get_world_size() else ValueError
    with pytest.raises(error, match=r"no layer matches the plan's \['nothing"):
        lasp.parallelize(model, dist.group.WORLD, plan=plan)
    lasp.parallelize(model, dist.group.WORLD)
    assert lasp.explain(model)


@pytest.mark.parametrize("broken", [(1,), (0, 2), (0, 1, 2)])
def test_a_parallelize_that_fails_on_some_ranks(broken):
    run_ranks(3, _parallelize, broken)


def _model_differs():
    """The layer is named, and parameters and group are as before."""
    rank = dist.get_rank()
    model = lasp.parallelize(SmallModel(), dist.group.WORLD)
    if rank == 2:
        model.blocks[1].mixer.inner.scale = 0.25
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(
        lasp.RankMismatchError, match=r'layer "blocks.1.mixer.inner": rank 2 has scale 0.25, the others 0.5'
    ):
        model(ids, torch.arange(4) + 4 * rank)
    model.blocks[1].mixer.inner.scale = 0.5
    model(ids, torch.arange(4) + 4 * rank).sum().backward()


def test_the_message_names_the_layer():
    run_ranks(3, _model_differs)


# Who is the odd one


def record(**fields):
    return {"fields": {name: str(value) for name, value in fields.items()}}


def test_most_ranks_are_right():
    verdict = judge({"rank 0": record(a=1, b=1), "rank 1": record(a=2, b=1), "rank 2": record(a=2, b=1)})
    assert verdict == {"found": "mismatch", "text": "rank 0 has a 1, the others 2"}


def test_of_two_ranks_the_first():
    verdict = judge({"rank 0": record(a=1), "rank 1": record(a=2)})
    assert verdict == {"found": "mismatch", "text": "rank 1 has a 2, the others 1"}


def test_many_differences_are_counted():
    records = {f"rank {r}": record(a=r) for r in range(1000)}
    assert judge(records)["text"].endswith("rank 4 has a 4, the others 0; and 995 more")


def test_a_field_that_a_rank_leaves_out_is_not_compared():
    assert judge({"rank 0": record(a=1, b=3), "rank 1": record(a=1)})["found"] == "agreement"


def _retry():
    """A difference that is caught does not make the next difference pass."""
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="retry")
    for _ in range(2):
        with pytest.raises(lasp.RankMismatchError, match="has scale"):
            lasp.linear_attention(**arguments(scale=1.0 + dist.get_rank()), sequence=sequence)
    decay = torch.zeros(H) if dist.get_rank() else None
    with pytest.raises(lasp.RankMismatchError, match="has log_decay"):
        lasp.linear_attention(**arguments(log_decay=decay), sequence=sequence)
    lasp.linear_attention(**arguments(), sequence=sequence)
    assert sequence.traffic.calls == 1


def test_the_call_after_a_difference_is_compared_again():
    run_ranks(3, _retry)


def _one_rank_fails_early():
    """What is wrong on one rank only is known on all at once, for every operator."""
    rank, x, weight = dist.get_rank(), torch.zeros(1, 4, 2), torch.zeros(2, 3)
    started = time.monotonic()
    for call in (
        lambda bad, sequence: lasp.causal_conv(x, torch.zeros(5, 3) if bad else weight, sequence=sequence),
        lambda bad, sequence: lasp.causal_conv(
            x, weight, layout=lasp.ShardLayout((4,)) if bad else None, sequence=sequence
        ),
        lambda bad, sequence: lasp.halo(x, 0 if bad else 3, sequence=sequence),
        lambda bad, sequence: lasp.softmax_attention(*[x.unsqueeze(2)] * 3, window=0 if bad else 1, sequence=sequence),
        lambda bad, sequence: lasp.delta_rule(
            *[x.unsqueeze(2)] * 3, x[..., :0] if bad else x[..., :1], sequence=sequence
        ),
        lambda bad, sequence: elementwise_recurrence(x, x[:, :3] if bad else x, sequence=sequence),
        lambda bad, sequence: selective_scan(x, x, torch.zeros(2, 1 + bad), *[x[..., :1]] * 2, sequence=sequence),
    ):
        sequence = lasp.SequenceParallel(dist.group.WORLD, name="early")
        with pytest.raises(lasp.RankMismatchError, match="rank 1 failed before its exchange"):
            call(rank == 1, sequence)
        call(False, sequence)
    assert time.monotonic() - started < SOON


def test_bad_arguments_on_one_rank_are_known_on_all():
    run_ranks(3, _one_rank_fails_early)


# A second life of the group


class Life:
    """A group that finds in its store what another one has left there, as after init on the store of a launcher."""

    def __init__(self, timeout, rank_0_sleeps=0.0):
        self.group = dist.new_group(range(dist.get_world_size()), timeout=timedelta(seconds=timeout))
        self.sleeps = rank_0_sleeps if dist.get_rank() == 0 else 0.0
        self.sequence = lasp.SequenceParallel(self.group, name="b")
        store = dist.group.WORLD.get_group_store().clone()
        peers_of(self.group).stores = {kind: dist.PrefixStore("a launcher", store) for kind in ("call", "batch")}

    def __enter__(self):
        time.sleep(self.sleeps)
        return self.sequence

    def __exit__(self, *_):
        dist.barrier()
        dist.destroy_process_group(self.group)


def _second_life(calls, absent):
    """The first ends when a rank does not come; what is compared in the second is what its ranks say."""
    rank = dist.get_rank()
    with Life(1.0) as sequence:
        for _ in range(calls):
            compare_scale(sequence, 1.0)
        if rank != absent:
            with pytest.raises(lasp.PeerError, match=rf"'b': waited 1\.\d s for rank {absent}"):
                compare_scale(sequence, 1.0)
    for sleeps in (0.0, 1.2):  # where the others come first they find the token of the first life
        with Life(20.0, sleeps) as sequence:
            for n in range(calls + 3):
                odd = n % 3 == 2
                with pytest.raises(lasp.RankMismatchError, match="rank 2 has scale 3") if odd else nullcontext():
                    compare_scale(sequence, 3 if odd and rank == 2 else 1)
            ids = torch.full((1, 6), int(rank == 1))
            with pytest.raises(lasp.RankMismatchError, match="rank 1 has batch input_ids"):
                lasp.shard_batch({"input_ids": ids}, sequence)


def compare_scale(sequence, scale):
    agreement.compare(sequence, {"scale": scale}, before="the exchange")


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("absent", [0, 2])
def test_a_second_life_of_the_group_hears_nothing_of_the_first(calls, absent):
    run_ranks(3, _second_life, calls, absent)


def _late_in_a_file(path):
    """Of a FileStore a wait that is in vain is another error than of a TCPStore."""
    group = dist.new_group([0, 1])
    sequence = lasp.SequenceParallel(group)
    peers_of(group).stores["call"] = dist.FileStore(path, 2)
    time.sleep(1.5 * dist.get_rank())
    compare_scale(sequence, 1.0)


def test_ranks_that_met_in_a_file_wait_for_one_that_is_late(tmp_path):
    run_ranks(2, _late_in_a_file, str(tmp_path / "store"))


def _other_step():
    """A rank that is at the step of its optimizer while the others are before a call."""
    rank, sequence = dist.get_rank(), lasp.SequenceParallel(dist.group.WORLD)
    if rank == 1:
        peers_of(sequence.group).exchanges["a", False] += 1
    shown = 'rank 1 has come to "the step of the optimizer", the others "the exchange"$'
    call = agreement.compare_exchanges if rank == 1 else lambda: lasp.linear_attention(**arguments(), sequence=sequence)
    with pytest.raises(lasp.RankMismatchError, match=shown):
        call()
    works(sequence)


def test_ranks_that_compare_different_things_are_told_so():
    run_ranks(3, _other_step)


def _elsewhere(odd, met):
    """One rank cuts a batch while the others are at a call: both wait in the store, under other names."""
    rank, group = dist.get_rank(), dist.new_group([0, 1, 2])
    sequence = lasp.SequenceParallel(group, name="b")
    ids = torch.zeros(1, 6, dtype=torch.int64)
    if met:
        compare_scale(sequence, 1.0)
        lasp.shard_batch({"input_ids": ids}, group)
    shown = f'rank {odd} has come to "shard_batch", the others "parallelize"$'

    def cut():
        lasp.shard_batch({"input_ids": ids}, group)

    with mock.patch.object(agreement, "EVERY", 1):
        for _ in range(2):
            time.sleep(0.4 * rank)
            started = time.monotonic()
            with pytest.raises(lasp.RankMismatchError, match=shown):
                cut() if rank == odd else lasp.parallelize(SmallModel(), group)
            assert time.monotonic() - started < SOON
        for _ in range(2):
            lasp.shard_batch({"input_ids": ids}, group)
            compare_scale(sequence, 1.0)
        with pytest.raises(lasp.RankMismatchError, match="rank 1 has batch input_ids"):
            lasp.shard_batch({"input_ids": ids + (rank == 1)}, group)
    works(sequence)


@pytest.mark.parametrize("met", [False, True])
@pytest.mark.parametrize("odd", range(3))
def test_a_rank_at_a_batch_while_the_others_are_at_a_call(odd, met):
    run_ranks(3, _elsewhere, odd, met)


def _fails_elsewhere():
    """A rank that fails at a batch while the others are at a call: the cause is told."""
    rank, group = dist.get_rank(), dist.new_group([0, 1, 2])
    with pytest.raises(lasp.RankMismatchError, match="rank 2 failed before its exchange: TypeError: "):
        lasp.shard_batch({}, group) if rank == 2 else lasp.parallelize(SmallModel(), group)
    lasp.parallelize(SmallModel(), group)


def test_a_rank_that_fails_at_a_batch_while_the_others_are_at_a_call():
    run_ranks(3, _fails_elsewhere)


def _crosswise():
    """A thread that cuts batches may wait long for one whose rank is at a call, and the call for the thread's rank."""
    rank, group = dist.get_rank(), dist.new_group([0, 1])
    sequence = lasp.SequenceParallel(group)
    ids = torch.zeros(1, 6, dtype=torch.int64)

    def cut():
        with mock.patch.object(agreement, "EVERY", 1):
            for _ in range(2):
                lasp.shard_batch({"input_ids": ids}, group)
                time.sleep(1.0 * rank)

    thread = threading.Thread(target=cut)
    if rank == 0:
        thread.start()
        time.sleep(1.5)
    compare_scale(sequence, 1.0)
    if rank == 1:
        time.sleep(1.0)
        thread.start()
    compare_scale(sequence, 1.0)
    thread.join()


def test_a_thread_may_wait_for_another():
    run_ranks(2, _crosswise)
