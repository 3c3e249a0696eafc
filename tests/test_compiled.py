"""`torch.compile` over ranks: one graph for all layers, none anew for packed sequences of other lengths."""

import gc

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks

import lasp
from lasp.models import TNL, TNLConfig
from lasp.ops.elementwise import elementwise_recurrence, selective_scan


def counting_backend():
    """Imported by workers alone: it brings Triton along, which the tests of kernels import under its interpreter."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


def _one_graph(world):
    mesh = mesh_of(sp=world)
    model = TNL(TNLConfig(64, layers=5, width=32, heads=2, glu_width=32, lrpe=False))
    eager = TNL(model.config)
    eager.load_state_dict(model.state_dict())
    for each in (model, eager):
        lasp.parallelize(each, mesh["sp"])
    counter = counting_backend()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    ids = torch.randint(0, 64, (2, 7 + dist.get_rank()), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        found, expected = (each(ids, torch.arange(ids.shape[1])) for each in (model, eager))
        torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    return counter.frame_count


@pytest.mark.parametrize("world", [1, 2])
def test_layers_share_a_graph(world):
    for frames in run_ranks(world, _one_graph, world):
        assert frames <= 2, f"{frames} graphs for 5 layers that are alike"


def _linear(x, **facts):
    o, final = lasp.linear_attention(x, x, x, log_decay=-x[..., 0].square(), output_final_state=True, **facts)
    return o.square().sum() + final.sum()


def _normalised(x, **facts):
    """With two heads of v for each of q and k."""
    v, decay = torch.cat([x, x.sin()], 2), -torch.cat([x, x], 2)[..., 0].square()
    options = {"log_decay": decay, "normalize": True, "output_final_state": True, **facts}
    o, final = lasp.linear_attention(x.abs() + 1, x.square() + 1, v, **options)
    return o.square().sum() + final.sin().sum()


def _convolution(x, **facts):
    weight, bias = torch.linspace(-1, 1, 16 * 4).view(16, 4), x.new_ones(16)
    return lasp.causal_conv(x.flatten(2), weight, bias, **facts).square().sum()


def _selective(x, **facts):
    u, A = x.flatten(2), -torch.linspace(0.1, 2, 16 * 8).view(16, 8)
    return selective_scan(u, u.exp(), A * x.square().mean(), x[:, :, 0], x[:, :, 1], **facts).square().sum()


OPERATORS = {
    "linear_attention": _linear,
    "linear_attention, normalised": _normalised,
    "delta_rule": lambda x, **facts: lasp.delta_rule(x, x, x, x[..., 0].sigmoid(), **facts)[0].square().sum(),
    "halo": lambda x, **facts: lasp.halo(x, 4, **facts).square().sum(),
    "causal_conv": _convolution,
    "softmax_attention": lambda x, **facts: lasp.softmax_attention(x, x, x, **facts).square().sum(),
    "block_attention": lambda x, **facts: lasp.block_attention(x, x, x, 5, **facts).square().sum(),
    "elementwise_recurrence": lambda x, **facts: (
        elementwise_recurrence(x, -x[..., :1].square(), **facts).square().sum()
    ),
    "elementwise in bf16": lambda x, **facts: elementwise_recurrence(x.bfloat16(), -x.abs(), **facts).square().sum(),
    "selective_scan": _selective,
    "softmax of a window": lambda x, **facts: lasp.softmax_attention(x, x, x, window=9, **facts).square().sum(),
}
DIFFER = (0, 1, 2, 5, 9, 13)  # more than may have a graph of their own
PACKINGS = {
    "other lengths": [(0, 3 + n, 40, 40 + n, 64) for n in DIFFER],
    "another number": [(0, *range(3, 4 + n), 64) for n in DIFFER],
}


def _packed(world, operator, packings):
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD) if world > 1 else None
    counter = counting_backend()

    def f(x, layout):
        return OPERATORS[operator](x, layout=layout, sequence=sequence)

    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for n, cu_seqlens in enumerate(PACKINGS[packings]):
        layout = lasp.ShardLayout((64 // world,) * world, cu_seqlens)
        x = torch.randn(1, 64, 2, 8, generator=torch.Generator().manual_seed(n))
        x = x[:, rank * 64 // world : (rank + 1) * 64 // world].clone().requires_grad_()
        expected = torch.autograd.grad(f(x, layout), x)
        found = torch.autograd.grad(compiled(x, layout), x)
        torch.testing.assert_close(found, expected)
    return counter.frame_count


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.any_pytorch), 2])
@pytest.mark.parametrize("packings", PACKINGS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_packed_sequences_of_other_lengths_share_a_graph(operator, packings, world):
    # A second graph may come with the second packing, whose sizes are then no constants; the operator decides.
    assert max(run_ranks(world, _packed, world, operator, packings)) <= 2


def _handles():
    """A `SequenceParallel` lives as long as a graph that has to come back to it; one made in inference serves too."""
    with torch.inference_mode():
        sequence, layout = lasp.SequenceParallel(dist.group.WORLD), lasp.ShardLayout((4, 4))
    x = torch.randn(1, 4, 2, 8, requires_grad=True)

    def f(x, sequence):
        return lasp.linear_attention(x, x, x, layout=layout, sequence=sequence)[0].square().sum()

    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x, sequence)
    del sequence
    gc.collect()
    y.backward()
    assert x.grad.isfinite().all()


def test_handles_keep_their_ranks():
    run_ranks(2, _handles)
