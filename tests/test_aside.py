"""What a check of a model does aside from training: one rank's arithmetic on many, and exchanges that nobody counts."""

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
