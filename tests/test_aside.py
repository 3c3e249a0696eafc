"""What a check of a model does aside from training: one rank's arithmetic on many, and exchanges that nobody counts."""

import contextlib
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from inputs import assert_close
from ranks import run_ranks
from small_model import SmallModel
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lasp
from lasp.ranks import alone, uncounted
from lasp.ranks.group import process


def _alone():
    x = torch.randn(1, 9, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    held = lasp.SequenceParallel(dist.group.WORLD)
    mine = x[:, 3 * dist.get_rank() : 3 * dist.get_rank() + 3]

    def compute(x, sequence, layout):
        options = {"sequence": sequence, "layout": layout}
        y = lasp.causal_conv(x.flatten(2), torch.ones(6, 3, dtype=torch.float64), **options).view_as(x)
        y = y + lasp.linear_attention(x, x, x, **options)[0] + lasp.softmax_attention(x, x, x, **options)
        return y + lasp.delta_rule(x, x, x, torch.ones(x.shape[:3], dtype=torch.float64), **options)[0]

    whole, shards = lasp.ShardLayout((9,)), lasp.ShardLayout((3, 3, 3))
    expected = compute(x, None, whole)
    with alone():
        assert torch.equal(compute(x, held, whole), expected)
        assert torch.equal(compute(x, held, None), expected)
        made = lasp.SequenceParallel(dist.group.WORLD)
        with alone():
            assert (held.size, made.size, held.rank, held.group) == (1, 1, 0, None)
        assert (held.size, made.size) == (1, 1)
        assert lasp.shard_sequence(x, dist.group.WORLD) is x
        assert lasp.unshard_sequence(x, held) is x
        assert torch.equal(compute(x, made, whole), expected)
        with pytest.raises(ValueError, match="layout is for 3 ranks, but the sequence has 1"):
            compute(x, held, shards)
    for sequence in (held, made):
        assert (sequence.size, sequence.rank, sequence.ranks) == (3, dist.get_rank(), (0, 1, 2))
        assert_close(lasp.unshard_sequence(compute(mine, sequence, shards), held), expected, "split")
    with pytest.raises(KeyError), alone():
        raise KeyError
    assert held.size == 3


def test_alone_is_one_rank_for_every_operator_and_every_holder():
    run_ranks(3, _alone)


def _in_another_thread(wait=10.0):
    """One thread computes as one rank, others meanwhile over all of them."""
    x = torch.randn(1, 9, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    held = lasp.SequenceParallel(dist.group.WORLD)
    layout = lasp.ShardLayout((3, 3, 3))
    expected, _ = lasp.linear_attention(x, x, x)
    inside, done = threading.Event(), threading.Event()

    def compute(sequence):
        mine = x[:, 3 * dist.get_rank() :][:, :3].clone().requires_grad_()
        o, _ = lasp.linear_attention(mine, mine, mine, layout=layout, sequence=sequence)
        o.sum().backward()
        return o.detach(), mine.grad

    def others():
        assert inside.wait(wait)
        made = lasp.SequenceParallel(dist.group.WORLD)
        assert (made.size, made.rank) == (held.size, held.rank) == (3, dist.get_rank())
        found = [compute(held), compute(made)]
        with alone():
            assert made.size == held.size == 1
        assert made.size == held.size == 3
        done.set()
        return made, found

    before = compute(held)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(others)
        try:
            with alone():
                inside.set()
                assert torch.equal(lasp.linear_attention(x, x, x, sequence=held)[0], expected)
                assert done.wait(wait) or running.result(0)
                mine = lasp.SequenceParallel(dist.group.WORLD)
                assert held.size == mine.size == 1
                assert torch.equal(lasp.linear_attention(x, x, x, sequence=mine)[0], expected)
        finally:
            inside.set()
        made, found = running.result()
    for o, gradient in found:
        assert torch.equal(o, before[0])
        assert torch.equal(gradient, before[1])
    for sequence in (held, made, mine):
        assert type(sequence) is lasp.SequenceParallel
        assert (sequence.size, sequence.rank) == (3, dist.get_rank())
        assert torch.equal(compute(sequence)[0], before[0])


def test_another_thread_is_not_alone():
    run_ranks(3, _in_another_thread)


class _Backwards(torch.autograd.Function):
    """In whose backward another one begins, so often that autograd takes another thread for it, as on a GPU."""

    @staticmethod
    def forward(ctx, x, depth, sequence, found):
        ctx.rest = depth, sequence, found
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        depth, sequence, found = ctx.rest
        found.append((threading.get_ident(), sequence.size))
        if depth:
            with torch.enable_grad():
                x = torch.ones((), requires_grad=True)
                _Backwards.apply(x, depth - 1, sequence, found).backward()
        return gradient, None, None, None


def _backward_in_another_thread():
    held, x = lasp.SequenceParallel(dist.group.WORLD), torch.ones((), requires_grad=True)
    for size in (2, 1, 2):
        found = []
        with alone() if size == 1 else contextlib.nullcontext():
            _Backwards.apply(x, 80, held, found).backward()
        assert len({thread for thread, _ in found}) == 2
        assert {size for _, size in found} == {size}


def test_a_backward_in_a_thread_of_autograd_is_alone():
    run_ranks(2, _backward_in_another_thread)


def _compiled():
    """What runs compiled in one thread is not what another one, which is alone, finds."""
    model = torch.compile(SmallModel().double(), backend="aot_eager")
    lasp.parallelize(model._orig_mod, dist.group.WORLD)
    batch = lasp.shard_batch({"input_ids": torch.arange(13)[None]}, dist.group.WORLD)
    split = functools.partial(model, batch["input_ids"], batch["position_ids"])
    whole = functools.partial(model, torch.arange(13)[None], torch.arange(13))
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        expected, frames = split(), torch._dynamo.utils.counters["frames"]["total"]
        with alone():
            of_whole = whole()
            found = pool.submit(torch.no_grad()(split)).result()
            assert torch.equal(whole(), of_whole)
        assert torch.equal(split(), expected)
    assert_close(found, expected, "in another thread", rtol=1e-12, atol=1e-12)
    together = lasp.unshard_sequence(expected, dist.group.WORLD)[:, :13]
    assert_close(of_whole, together, "alone", rtol=1e-12, atol=1e-12)
    assert torch._dynamo.utils.counters["frames"]["total"] == frames > 0


def test_nothing_runs_compiled_meanwhile():
    run_ranks(2, _compiled)


def _backward_alone():
    """A checkpoint's recompute takes place in backward, as alone as its forward."""
    torch.manual_seed(0)
    model = lasp.parallelize(SmallModel().double(), dist.group.WORLD)
    ids, positions = torch.arange(13)[None], torch.arange(13)
    serial = SmallModel().double()
    serial(ids, positions).square().sum().backward()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    with alone():
        model(ids, positions).square().sum().backward()
    for p, q in zip(model.parameters(), serial.parameters()):
        assert torch.equal(p.grad, q.grad)
    assert [layer.exchanges for layer in lasp.explain(model)] == [0, 0]


def test_backward_alone():
    run_ranks(2, _backward_alone)


def _uncounted():
    model = lasp.parallelize(SmallModel(), dist.group.WORLD, check_finite=True)
    first = model.blocks[0].mixer.inner.sequence

    def step(factor=1.0):
        batch = lasp.shard_batch({"input_ids": torch.arange(13)[None]}, dist.group.WORLD)
        loss = model(batch["input_ids"], batch["position_ids"]).sum() * factor
        loss.backward()

    unsplit = torch.nn.Linear(2, 2)
    for before in (0, 1):
        calls, noted = first.traffic_of("linear_attention").calls, list(process.noted)
        told, made = str(lasp.explain(model)), dict(first.peers.exchanges)
        order, models = first.peers.order, [x() for x in first.peers.models]
        with uncounted():
            for _ in range(2):
                step(float("nan"))
            model.zero_grad()  # gradients are not its concern
            copied = lasp.parallelize(SmallModel(), dist.group.WORLD)
            assert [x() for x in first.peers.models] == [*models, copied]
        assert (before > 0) == bool(made)
        assert str(lasp.explain(model)) == told
        assert dict(first.peers.exchanges) == made
        assert (first.peers.order, [x() for x in first.peers.models]) == (order, models)
        if not before:  # of layers that only ran inside nothing is to be said
            torch.optim.SGD(unsplit.parameters(), lr=0.0).step()
        assert first.traffic_of("linear_attention").calls == calls == before
        assert list(process.noted) == noted
        lasp.assert_finite()  # what was not finite was so inside alone
        step()
        assert first.traffic_of("linear_attention").calls == before + 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step()


def test_what_is_uncounted_leaves_no_trace():
    run_ranks(2, _uncounted)
