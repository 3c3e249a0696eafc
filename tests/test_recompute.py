"""Activation checkpointing: the same bits as without it, no second exchange, and nothing kept longer than the graph."""

import functools
import gc
import time
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from small_model import SmallModel
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import lasp
from lasp.ops import recompute
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp.ranks import SCHEDULES

LENGTHS = (5, 4, 7)


def plain(function, *args):
    return function(*args)


def checkpointed(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def nested(function, *args):
    return checkpointed(lambda *inner: checkpointed(function, *inner), *args)


def offloaded(function, *args):
    """With hooks of the user's own between the checkpoint and the operator."""

    def inside(*inner):
        with torch.autograd.graph.save_on_cpu():
            return function(*inner)

    return checkpointed(inside, *args)


def selective(function, *args):
    """Matrix products are saved, all else is recomputed."""
    products = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default]
    contexts = functools.partial(torch_checkpoint.create_selective_checkpoint_contexts, products)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def no_early_stop(function, *args):
    with set_checkpoint_early_stop(False):
        return checkpointed(function, *args)


class Model(SmallModel):
    """Each block runs in `wrap`; the state after the whole sequence is used as well."""

    wrap = staticmethod(plain)

    def forward(self, input_ids, position_ids, layout=None):
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = self.wrap(block, x, layout)
        return self.head(x)


def slice_of(seed, rank):
    ids = torch.randint(0, 17, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(seed))
    start = sum(LENGTHS[:rank])
    here = slice(start, start + LENGTHS[rank])
    return ids[:, here], torch.arange(sum(LENGTHS))[here]


def model_with(wrap, exchange="auto"):
    model = lasp.parallelize(Model(), dist.group.WORLD, exchange=exchange)
    model.wrap = wrap
    return model, [block.mixer.inner.sequence for block in model.blocks]


def train(wrap, batches=(0,), order=None, retain=False, exchange="auto"):
    """Losses, and the gradients of backwards in the given order; then the exchanges of each layer."""
    model, layers = model_with(wrap, exchange)
    losses = [model(*slice_of(seed, dist.get_rank())).square().mean() for seed in batches]
    for i in order or range(len(losses)):
        if retain:
            losses[i].backward(retain_graph=True)
        losses[i].backward()
    counts = [(t.calls, t.forward_exchanges, t.reverse_exchanges) for t in (layer.traffic for layer in layers)]
    return [x.detach() for x in losses], [p.grad for p in model.parameters()], counts


def assert_same_bits(found, expected):
    for x, y in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(x, y)


def _one_step(wrap):
    expected = train(plain)
    found = train(wrap)
    assert_same_bits(found, expected)
    assert found[2] == expected[2] == [(1, 1, 1)] * 2


@pytest.mark.parametrize("wrap", [checkpointed, nested, offloaded, selective, no_early_stop])
def test_the_same_bits_with_one_exchange_each_way(wrap):
    run_ranks(3, _one_step, wrap)


def _operators(rank):
    """Every operator, of tokens of this rank; the first has heads that forget within them."""
    draw = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, 150, 2, 8, generator=draw, dtype=torch.float64) for _ in range(3))
    gate = -torch.rand(1, 150, 2, 8, generator=draw, dtype=torch.float64)
    lengths, ranks = (150,) * 3, {"sequence": lasp.SequenceParallel(dist.group.WORLD)}
    ranks["layout"], fixed = lasp.ShardLayout(lengths), lasp.decay.fixed([-6.0, -7.0])
    packed = {**ranks, "layout": lasp.ShardLayout(lengths, (0, 5, 160, 450))}
    A, weight = -torch.ones(2, 8, dtype=torch.float64), torch.ones(2, 200, dtype=torch.float64)
    linear, sizes = lasp.linear_attention, {"segment_length": 64}
    calls = {
        "fixed": lambda q, k, v: linear(q, k, v, log_decay=fixed, **ranks)[0],
        "channel": lambda q, k, v: linear(q, k, v, log_decay=gate, **packed, **sizes)[0],
        "final": lambda q, k, v: linear(q, k, v, output_final_state=True, **ranks)[1] + q.sum(),
        "unmasked": lambda q, k, v: linear(q, k, v, causal=False, **packed)[0],
        "delta": lambda q, k, v: lasp.delta_rule(q, k / 3, v, gate[..., 0].exp(), **packed)[0],
        "recurrence": lambda q, k, v: elementwise_recurrence(q, gate, **ranks) * k * v,
        "scan": lambda q, k, v: selective_scan(q[..., 0], gate[..., 0].exp(), A, k[:, :, 0], v[:, :, 0], **ranks),
        "halo": lambda q, k, v: lasp.halo(q, 200, **ranks)[:, :150] * k * v,
        "convolution": lambda q, k, v: lasp.causal_conv(q[..., 0], weight, **packed)[..., None] * k[..., 0, None] * v,
        "blocks": lambda q, k, v: lasp.block_attention(q, k, v, 40, **ranks),
        "softmax": lambda q, k, v: lasp.softmax_attention(q, k, v, sequence=ranks["sequence"]),
        "packed softmax": lambda q, k, v: lasp.softmax_attention(q, k, v, **packed),
        "softmax by heads": lambda q, k, v: lasp.softmax_attention(
            *(torch.cat([x] * 3, 2) for x in (q, k, v)), **ranks
        ),
    }
    return calls, (q, k, v)


def _selective(names):
    """What a checkpoint keeps of the operations with these names must be what the recompute asks for."""
    kept = [getattr(torch.ops.aten, name) for name in names]
    kept = [getattr(op, overload) for op in kept for overload in op.overloads()]
    contexts = functools.partial(torch_checkpoint.create_selective_checkpoint_contexts, kept)
    calls, given = _operators(dist.get_rank())
    for name, call in calls.items():
        found = []
        for wrap in (plain, functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)):
            leaves = [x.clone().requires_grad_() for x in given]
            wrap(call, *(x * 1.5 for x in leaves)).square().sum().backward()
            found.append([x.grad for x in leaves])
        for gradient, expected in zip(*found[::-1]):
            assert torch.equal(gradient, expected), f"{name}: {(gradient - expected).abs().max()}"


@pytest.mark.parametrize(
    "names", [("mm", "bmm", "addmm"), ("exp",), ("cat", "clone", "constant_pad_nd"), ("sum", "cumsum")]
)
def test_a_selective_checkpoint(names):
    run_ranks(3, _selective, names)


def _schedule(exchange):
    expected = train(plain, exchange=exchange)
    found = train(checkpointed, exchange=exchange)
    assert_same_bits(found, expected)
    assert found[2] == expected[2] == [(1, 1, 1)] * 2


@pytest.mark.parametrize("exchange", SCHEDULES)
def test_every_schedule(exchange):
    run_ranks(3, _schedule, exchange)


def _micro_batches(order):
    """Several forwards before the first backward, and backwards in any order."""
    expected = train(plain, batches=(1, 2, 3), order=order)
    found = train(checkpointed, batches=(1, 2, 3), order=order)
    assert_same_bits(found, expected)
    assert found[2] == [(3, 3, 3)] * 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_micro_batches_outstanding(order):
    run_ranks(3, _micro_batches, order)


def _twice():
    """A graph that is kept is recomputed for each backward."""
    expected = train(plain, retain=True)
    found = train(checkpointed, retain=True)
    assert_same_bits(found, expected)
    assert found[2] == [(1, 1, 2)] * 2


def test_a_graph_that_is_kept():
    run_ranks(3, _twice)


def _whole_model():
    """One checkpoint around several layers: they are told apart by their order."""
    model, layers = model_with(plain)
    expected = train(plain)
    loss = checkpointed(model, *slice_of(0, dist.get_rank())).square().mean()
    loss.backward()
    assert_same_bits(([loss.detach()], [p.grad for p in model.parameters()]), expected)
    assert [(t.traffic.forward_exchanges, t.traffic.reverse_exchanges) for t in layers] == [(1, 1)] * 2


def test_one_checkpoint_around_all_layers():
    run_ranks(3, _whole_model)


def _final_state(form):
    """The sum that gives every rank the final state is a communication as well."""
    rank = dist.get_rank()
    draw = torch.Generator().manual_seed(rank)
    inputs = [torch.randn((2, LENGTHS[rank], 2, 3), generator=draw) for _ in range(3)]
    sequence = lasp.SequenceParallel(dist.group.WORLD)

    def function(q, k, v):
        o, state = lasp.linear_attention(q, k, v, output_final_state=True, sequence=sequence)
        return (o @ state.mul_(2).sin()[:, :1]).sin()  # in place: what is kept must not change with it

    def run(wrap):
        x = [t.clone().requires_grad_() for t in inputs]
        y = wrap(function, *[t.movedim(1, 1) for t in x])
        y.sum().backward()
        return [y.detach(), *[t.grad for t in x]]

    for found, expected in zip(run(form), run(plain)):
        assert torch.equal(found, expected)
    assert (sequence.traffic.forward_exchanges, sequence.traffic.reverse_exchanges) == (2, 2)


@pytest.mark.parametrize("form", [checkpointed, nested])
def test_the_final_state_is_kept_too(form):
    run_ranks(1, _single_rank, form)
    run_ranks(3, _final_state, form)


def _single_rank(form):
    x = torch.randn(1, 6, 1, 2, requires_grad=True)
    form(lambda q: lasp.linear_attention(q, q, q, output_final_state=True)[1].clone(), x).sum().backward()
    assert x.grad.isfinite().all()


def _no_peer():
    """What the recompute needs is here: it runs while the other ranks do something else."""
    rank = dist.get_rank()
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn((1, 4, 1, 3), generator=draw, requires_grad=True)
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    y = checkpointed(lambda q: lasp.linear_attention(q, q, q, sequence=sequence)[0].sin(), x)
    if rank == 1:
        saved = y.grad_fn._saved_self  # of the sine: the output of the operator, which only a recompute gives
        assert torch.equal(saved.sin(), y)
    assert sequence.traffic.calls == 1
    dist.barrier()
    y.sum().backward()


def test_a_recompute_needs_no_other_rank():
    run_ranks(2, _no_peer)


def _freed(how):
    """The states are there while the graph is, and no longer."""
    gc.disable()  # what needs it would be a cycle, which keeps memory for long
    try:
        kept = Counter()

        class Watched(recompute.Reception):
            def keep(self, result):
                if self._places:
                    kept["all"] += 1
                    weakref.finalize(result, kept.update, ["freed"])
                return super().keep(result)

        original, recompute.Reception = recompute.Reception, Watched
        try:
            model, _ = model_with(checkpointed)
            loss = model(*slice_of(0, dist.get_rank())).square().mean()
            assert (kept["all"], kept["freed"]) == (2, 0)
            if how == "backward":
                loss.backward()
            del loss
        finally:
            recompute.Reception = original
        deadline = time.monotonic() + 5
        while (
            kept["freed"] < 2 and time.monotonic() < deadline
        ):  # a thread of gloo's may hold a message a moment longer
            time.sleep(0.01)
        assert kept["freed"] == kept["all"] == 2
        assert not recompute._received
        assert not recompute._used
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["backward", "dropped"])
def test_what_is_kept_goes_with_the_graph(how):
    run_ranks(2, _freed, how)


def _reentrant():
    """There is no frame; all ranks exchange again, and the result is the same."""
    wrap = lambda function, *args: checkpoint(function, *args, use_reentrant=True)  # noqa: E731
    expected, found = train(plain), train(wrap)
    assert_same_bits(found, expected)
    assert found[2] == [(1, 2, 1)] * 2


def test_the_reentrant_form_repeats_the_exchange():
    run_ranks(3, _reentrant)


def _compiled_block():
    def compiled(function, *args):
        return checkpointed(torch.compile(function, backend="aot_eager"), *args)

    expected, found = train(plain), train(compiled)
    for x, y in zip((*found[0], *found[1]), (*expected[0], *expected[1])):
        torch.testing.assert_close(x, y)
    assert found[2] == [(1, 1, 1)] * 2


def test_a_checkpoint_around_a_compiled_block():
    run_ranks(2, _compiled_block)


def _wrapped_block(compile_first, exchanges):
    """The form that examples/train.py has, each block one graph: `fullgraph` makes anything else an error."""
    expected = train(plain)
    model, layers = model_with(plain)
    names = list(model.state_dict())
    for i, block in enumerate(model.blocks):
        if compile_first:
            block.compile(fullgraph=True, backend="aot_eager")
        model.blocks[i] = checkpoint_wrapper(block)
        if not compile_first:
            model.blocks[i].compile(fullgraph=True, backend="aot_eager")
    loss = model(*slice_of(0, dist.get_rank())).square().mean()
    loss.backward()
    for x, y in zip((loss, *(p.grad for p in model.parameters())), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(x, y)
    assert list(model.state_dict()) == names
    counts = [(t.calls, t.forward_exchanges, t.reverse_exchanges) for t in (layer.traffic for layer in layers)]
    assert counts == [exchanges] * 2


@pytest.mark.parametrize(("compile_first", "exchanges"), [(True, (1, 1, 1)), (False, (1, 2, 1))])
def test_a_wrapped_block_is_one_graph(compile_first, exchanges):
    """A recompute inside the graph exchanges again (docs/guide.md, rules of the road)."""
    run_ranks(2, _wrapped_block, compile_first, exchanges)


def _different_each_time():
    """A function that does more in the recompute than in the original is refused, not given a wrong state."""
    sequences = [lasp.SequenceParallel(dist.group.WORLD, name=str(i)) for i in range(2)]
    runs = []

    def function(x):
        runs.append(None)
        sequence = sequences[len(runs) - 1]
        return lasp.linear_attention(x, x, x, sequence=sequence)[0].sin()

    y = checkpointed(function, torch.ones(1, 2, 1, 2, requires_grad=True))
    with pytest.raises(RuntimeError, match="A checkpointed function must do the same each time"):
        y.sum().backward()


def test_a_recompute_that_differs_is_an_error():
    run_ranks(2, _different_each_time)


def _without_private_parts():
    """On a PyTorch that does not tell which call a recompute repeats: the exchange is repeated, and told."""
    expected = train(checkpointed)
    recompute._private.cache_clear()
    with mock.patch.object(recompute, "_Private", side_effect=AttributeError("gone")):
        found = train(checkpointed)
        model, _ = model_with(checkpointed)
        model(*slice_of(0, dist.get_rank())).sum().backward()
        report = str(lasp.explain(model))
    recompute._private.cache_clear()
    assert_same_bits(found, expected)
    assert found[2] == [(2, 2, 1)] * 2
    assert "a recompute repeats its exchanges: torch" in report
    assert "repeats" not in str(lasp.explain(model_with(checkpointed)[0]))


def test_where_pytorch_does_not_tell_the_exchange_is_repeated():
    run_ranks(3, _without_private_parts)


# What PyTorch must have for all this. If one of these fails with a new version, lasp/ops/recompute.py needs new eyes.


def test_hooks_of_a_checkpoint_refer_to_its_frame():
    seen = []

    def function(x):
        seen.append([recompute._frame_of(pack) for pack in recompute._pack_hooks()])
        return x.sin().exp()

    checkpointed(function, torch.ones(2, requires_grad=True)).sum().backward()
    [(original, repeats)], [(again, repeats_again)] = seen
    assert isinstance(original, torch_checkpoint._CheckpointFrame)
    assert original is again
    assert (repeats, repeats_again) == (False, True)


def test_the_hooks_are_left_as_they_were():
    def function(x):
        before = torch._C._autograd._top_saved_tensors_default_hooks(True)
        with torch.autograd.graph.save_on_cpu():
            inner = torch._C._autograd._top_saved_tensors_default_hooks(True)
            assert len(recompute._pack_hooks()) == 2
            assert torch._C._autograd._top_saved_tensors_default_hooks(True) == inner
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) == before
        return x.sin().exp()

    checkpointed(function, torch.ones(2, requires_grad=True)).sum().backward()
    assert recompute._pack_hooks() == []


def test_backward_is_recognised():
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 1
    y.register_hook(lambda gradient: seen.append(torch._C._current_graph_task_id()))
    seen.append(torch._C._current_graph_task_id())
    y.backward()
    assert seen[0] == -1 != seen[1]
