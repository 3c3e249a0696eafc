"""`check_finite`: a NaN or Inf in a state or a gradient of one rank stops all ranks before the optimizer steps."""

import math
import re

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks
from small_model import SmallModel

import lasp
from lasp.checks import optimizers
from lasp.data_parallel import wrap_ddp, wrap_fsdp2

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
    # Not strict: what it does to one token is something else on a slice.
    model = lasp.parallelize(SmallModel(), dist.group.WORLD, check_finite=True, strict=False)
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


def _spoil_gradient(parameter, value):
    """Whatever the gradient is, one number of it is `value`, before anybody averages it."""

    def spoiled(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[1] = value
        return gradient

    return parameter.register_hook(spoiled)


def _a_gradient_that_is_no_states(odd, value):
    """Rank `odd` alone has it, and its states are sound; without an average the others' gradients are, too."""
    rank = dist.get_rank()
    model = lasp.parallelize(SmallModel(), dist.group.WORLD, check_finite=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = values(model)
    handle = _spoil_gradient(model.head.weight, value) if rank == odd else None
    ids = torch.full((1, T), 3)
    model(ids, torch.arange(T) + T * rank).square().mean().backward()
    with pytest.raises(FloatingPointError, match=rf"; rank {odd}: the gradient of head\.weight$"):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(values(model), before))
    assert not optimizer.state
    if handle is not None:
        handle.remove()
    step(model, optimizer, dist.group.WORLD, rank)
    assert not any(torch.equal(x, y) for x, y in zip(values(model), before))
    assert all(x.isfinite().all() for x in values(model))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("odd", [0, 2])
def test_a_gradient_that_is_no_states(odd, value):
    run_ranks(3, _a_gradient_that_is_no_states, odd, value)


def _wrapped_step(scheme, clip, odd):
    """The gradient of one rank before it is averaged, over dp x sp; the one that the optimizer sees is all ranks'."""
    mesh = mesh_of(dp_shard=1, sp=-1)
    model = lasp.parallelize(SmallModel(), mesh["sp"], check_finite=True)
    wrapped = {"plain": lambda: model, "ddp": lambda: wrap_ddp(model, mesh), "fsdp2": lambda: wrap_fsdp2(model, mesh)}
    net, rank = wrapped[scheme](), dist.get_rank()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [x.clone() for x in _local_values(net)]
    if rank == odd:
        module = model.head
        module.register_full_backward_pre_hook(lambda _, gradients: (gradients[0] * torch.inf,))
    for _ in range(2):  # accumulated
        net(torch.full((1, T), 3), torch.arange(T) + T * rank).square().mean().backward()
    if scheme == "plain":
        lasp.sync_grads(model, mesh)
    if clip:
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # which makes NaN of Inf
    with pytest.raises(FloatingPointError, match=r"rank 0: .*the gradient of .*; rank 1: .*the gradient of "):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(_local_values(net), before))


def _local_values(net):
    return [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in net.parameters()]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scheme", ["plain", "ddp", "fsdp2"])
def test_gradients_that_are_averaged_accumulated_clipped(scheme, clip):
    run_ranks(2, _wrapped_step, scheme, clip, 1)


class Alone(torch.nn.Module):
    """One layer that is split, and an embedding with sparse gradients, whose rows may be drawn twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(5, 8, sparse=True)
        self.inner = lasp.modules.LightningAttention(None)

    def forward(self, ids):
        x = self.table(ids).unflatten(-1, (2, 4))
        return self.inner(x, x, x)


def _one_step(model, ids, factor):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = values(model)
    optimizer.zero_grad()
    (model(ids).sum() * factor).backward()
    if math.isfinite(factor):
        optimizer.step()
        assert not all(torch.equal(x, y) for x, y in zip(values(model), before))
        return
    with pytest.raises(FloatingPointError, match=r"rank 0: .*the gradient of table\.weight"):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(values(model), before))


def _sparse(mesh):
    model = lasp.parallelize(Alone(), dist.group.WORLD if mesh else None, check_finite=True)
    ids = torch.tensor([[1, 3, 1]])
    for factor in (1.0, torch.nan, 1.0, torch.inf):
        _one_step(model, ids, factor)
    if not mesh:
        assert model.inner.sequence is None  # nothing is split


@pytest.mark.parametrize("mesh", [False, True])
def test_on_one_rank_with_sparse_gradients(mesh):
    run_ranks(1, _sparse, mesh)


def test_sparse_gradients_on_two_ranks():
    run_ranks(2, _sparse, True)


def test_without_any_process_group():
    model = lasp.parallelize(Alone(), None, check_finite=True)
    for factor in (1.0, torch.nan, torch.inf, 1.0):
        _one_step(model, torch.tensor([[1, 3, 1]]), factor)
    (model(torch.tensor([[1]])).sum() * torch.nan).backward()
    with pytest.raises(FloatingPointError, match="the gradient of table"):
        lasp.assert_finite(model)


def test_an_operator_of_ones_own_on_one_rank():
    """Names of parameters are nowhere to be found: shapes stand for them. Without a call nothing is looked at."""
    weight = torch.nn.Parameter(torch.ones(1, 3, 1, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    sequence = lasp.SequenceParallel(None, check_finite=True)
    lasp.linear_attention(weight, weight, weight, sequence=sequence)[0].sum().backward()
    weight.grad[0, 1] = torch.inf
    with pytest.raises(FloatingPointError, match=r"rank 0: the gradient of a parameter of shape \(1, 3, 1, 2\)$"):
        optimizer.step()
    assert torch.equal(weight, torch.ones_like(weight))
    optimizer.step()  # no operator with the option has run since
    assert not weight.isfinite().all()


@pytest.mark.parametrize("wrong", [5, "model", [torch.ones(1)]])
def test_what_has_no_gradients(wrong):
    with pytest.raises(TypeError, match="gradients_of must be an optimizer, a module or None, got "):
        lasp.assert_finite(wrong)


def _no_sequence_is_split():
    """Two ranks with a batch each, one rank a sequence: gradients are averaged all the same."""
    mesh, rank = mesh_of(dp_shard=-1, sp=1), dist.get_rank()
    model = lasp.parallelize(SmallModel(), mesh["sp"], check_finite=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = values(model)
    if rank == 1:
        _spoil_gradient(model.head.weight, torch.nan)
    model(torch.full((1, T), 3), torch.arange(T)).square().mean().backward()
    with pytest.raises(FloatingPointError, match=r"; rank 1: the gradient of head\.weight$"):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(values(model), before))


def test_ranks_that_share_no_sequence():
    run_ranks(2, _no_sequence_is_split)


def _another_model():
    """A model that was not given to `parallelize` is none of its concern, even between a forward and its step."""
    rank = dist.get_rank()
    model = lasp.parallelize(SmallModel(), dist.group.WORLD, check_finite=True)
    other = torch.nn.Linear(2, 2)
    model(torch.full((1, T), 3), torch.arange(T) + T * rank).square().mean().backward()
    (other(torch.ones(2)).sum() * torch.inf).backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not other.weight.isfinite().all()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_the_gradients_of_another_model():
    run_ranks(2, _another_model)


def _many_are_not_finite():
    model = lasp.parallelize(SmallModel(), dist.group.WORLD, check_finite=True)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    count = len(list(model.parameters()))
    with pytest.raises(FloatingPointError, match=rf"rank 0: [^;]*, {count - 4} more gradients; rank 1: ") as caught:
        lasp.assert_finite(model)
    assert len(str(caught.value)) < 600


def test_the_message_is_short():
    run_ranks(2, _many_are_not_finite)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_gradients_that_are_large_and_sound(dtype):
    """Their squares, and their sum, would not be finite."""
    model = Alone().to(dtype) if dtype is not torch.complex64 else Alone()
    lasp.parallelize(model, None, check_finite=True)
    extra = torch.nn.Parameter(torch.zeros(3000, dtype=dtype))
    model.register_parameter("extra", extra)
    model.register_parameter("empty", torch.nn.Parameter(torch.zeros(0, 3)))
    model.empty.grad = torch.zeros(0, 3)
    extra.grad = torch.full_like(extra, torch.finfo(dtype).max / 2)
    lasp.assert_finite(model)
    extra.grad[-1] = -torch.inf
    with pytest.raises(FloatingPointError, match="the gradient of extra"):
        lasp.assert_finite(model)


def test_hosts_compare_before_devices_meet(monkeypatch):
    """Whichever was asked for first: a rank that left out an exchange would be met by the collective of the other."""
    monkeypatch.setattr(optimizers, "_checks", [])
    monkeypatch.setattr(optimizers, "_last_checks", [])
    monkeypatch.setattr(optimizers, "register_optimizer_step_pre_hook", lambda hook: hooks.append(hook))
    hooks, called, optimizer = [], [], torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    meets, compares = (lambda x, name=name: called.append((name, x)) for name in ("meets", "compares"))
    for _ in range(2):
        optimizers.before_step(meets, last=True)
        optimizers.before_step(compares)
    (hook,) = hooks
    hook(optimizer, (), {})
    assert called == [("compares", optimizer), ("meets", optimizer)]
