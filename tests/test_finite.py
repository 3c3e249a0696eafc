"""`check_finite`: a NaN or Inf in the state of one rank stops all ranks before the optimizer steps."""

import re

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks
from small_model import SmallModel

import lasp

T = 5  # tokens of a rank


class Spoil(torch.autograd.Function):
    """Replaces one number, of the output or of its gradient."""

    @staticmethod
    def forward(ctx, x, value, reverse):
        ctx.value, ctx.reverse = value, reverse
        return x.clone() if reverse else Spoil.spoiled(x, value)

    @staticmethod
    def backward(ctx, dy):
        return Spoil.spoiled(dy, ctx.value) if ctx.reverse else dy, None, None

    @staticmethod
    def spoiled(x, value):
        x = x.clone()
        x[0, 2, 1] = value
        return x


def spoil(module, value, reverse):
    return module.register_forward_hook(lambda module, args, output: Spoil.apply(output, value, reverse))


def step(model, optimizer, mesh, sp_rank):
    optimizer.zero_grad()
    ids = torch.full((1, T), 3)
    model(ids, torch.arange(T) + T * sp_rank).square().mean().backward()
    lasp.sync_grads(model, mesh)
    optimizer.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def raises_and_recovers(model, mesh, sequence_rank, spoiled, message):
    """The spoiled step changes no parameter; the next one, which is sound, does."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    before = values(model)
    handle = spoiled(model)
    with pytest.raises(FloatingPointError, match=message):
        step(model, optimizer, mesh, sequence_rank)
    assert all(torch.equal(x, y) for x, y in zip(values(model), before))
    assert not optimizer.state
    if handle is not None:
        handle.remove()
    step(model, optimizer, mesh, sequence_rank)
    after = values(model)
    assert not any(torch.equal(x, y) for x, y in zip(after, before))
    assert all(x.isfinite().all() for x in after)


def _one_rank(odd, value, reverse):
    rank = dist.get_rank()
    model = lasp.parallelize(SmallModel(), dist.group.WORLD, check_finite=True)
    layer = "blocks.1.mixer.inner"

    def spoiled(model):
        module = model.blocks[1].mixer.inner if reverse else model.blocks[1].norm
        return spoil(module, value, reverse) if rank == odd else None

    # It travels to the ranks after it, or in backward before it; the odd rank has it in any case.
    reached = range(odd, -1, -1) if reverse else range(odd, 3)
    direction = "backward" if reverse else "forward"
    for r in reached:
        message = rf"rank {r}: [^;]*{re.escape(layer)} \([^)]*{direction}"
        raises_and_recovers(model, dist.group.WORLD, rank, spoiled, message)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_one_rank_alone_has_it(odd, value, reverse):
    run_ranks(3, _one_rank, odd, value, reverse)


def _other_sequences_stop_too():
    """The gradients of all four ranks are averaged, so those of the sound sequence must not be used either."""
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(SmallModel(), mesh["sp"], check_finite=True)
    sp_rank = mesh.get_local_rank("sp")

    def spoiled(model):
        return spoil(model.blocks[0].norm, torch.nan, False) if dist.get_rank() == 3 else None

    raises_and_recovers(model, mesh, sp_rank, spoiled, r"; rank 3: blocks\.0\.mixer\.inner \(forward")


def test_a_mesh_of_several_sequences():
    run_ranks(4, _other_sequences_stop_too)


def _bare_operator():
    """Without a model or an optimizer, and once only: the flags are read and reset."""
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD, check_finite=True)
    x = torch.ones(1, T, 1, 2)
    lasp.linear_attention(x, x, x / (0 if rank == 1 else 1), sequence=sequence)
    with pytest.raises(FloatingPointError, match=r"rank 1: a layer without name \(forward\)$"):
        lasp.assert_finite()
    lasp.assert_finite()
    lasp.linear_attention(x, x, x, sequence=sequence)
    lasp.assert_finite()


def test_without_an_optimizer():
    run_ranks(2, _bare_operator)


def _compiled_step(odd):
    """The check is no part of the graph, and is not left out either."""
    rank = dist.get_rank()
    model = lasp.parallelize(SmallModel(), dist.group.WORLD, check_finite=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    take_step = torch.compile(optimizer.step, backend="eager")
    before = values(model)
    if rank == odd:
        spoil(model.blocks[1].norm, torch.nan, False)
    model(torch.full((1, T), 3), torch.arange(T) + T * rank).square().mean().backward()
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.mixer\.inner"):
        take_step()
    assert all(torch.equal(x, y) for x, y in zip(values(model), before))


def test_a_compiled_step_of_the_optimizer():
    run_ranks(2, _compiled_step, 0)


def _off_and_unrelated():
    rank = dist.get_rank()
    model = lasp.parallelize(SmallModel(), dist.group.WORLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spoil(model.blocks[1].norm, torch.nan, False)
    step(model, optimizer, dist.group.WORLD, rank)  # not asked for
    assert model.head.weight.isnan().any()

    checked = lasp.parallelize(SmallModel(), dist.group.WORLD, check_finite=True)
    step(checked, torch.optim.SGD(checked.parameters(), lr=0.1), dist.group.WORLD, rank)
    if rank == 0:  # an optimizer that steps where no split layer ran talks to nobody
        other = torch.nn.Linear(2, 2)
        other(torch.ones(2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    dist.barrier()


def test_what_was_not_asked_for_is_left_alone():
    run_ranks(2, _off_and_unrelated)
