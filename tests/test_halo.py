"""The tokens before a shard: any width, any lengths, packed documents; values and gradients on every rank."""

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, sequence_of_all
from torch.utils.checkpoint import checkpoint

import lasp

LENGTHS = [(7,), (4, 3), (1, 1), (3, 0), (0, 3)]
LENGTHS += [(2, 1, 3), (0, 0, 5), (5, 0, 0), (1, 0, 2, 4), (1, 1, 1, 1), (6, 5, 4, 3)]


def whole_halo(x, start, width, cu_seqlens):
    """The tokens before token `start` of x [B, T, ...], of its document only."""
    reach = width - 1
    first = 0 if cu_seqlens is None else max(n for n in cu_seqlens[:-1] if n <= start)
    before = [x[:, t] if t >= first else torch.zeros_like(x[:, 0]) for t in range(start - reach, start)]
    return torch.stack(before, 1) if before else x[:, :0]


def _halo(lengths, width, cu_seqlens, known, wrap):
    rank, sequence = dist.get_rank(), sequence_of_all()
    T, start = sum(lengths), sum(lengths[:rank])
    draw = torch.Generator().manual_seed(0)
    batch = 1 if cu_seqlens else 2
    x = torch.randn(batch, T, 3, generator=draw, dtype=torch.float64).requires_grad_()
    weights = torch.randn(len(lengths), batch, width - 1 + max(lengths), 3, generator=draw, dtype=torch.float64)
    layout = lasp.ShardLayout(lengths, cu_seqlens) if known else None

    mine = x[:, start : start + lengths[rank]].detach().clone().requires_grad_()
    call = lambda x: lasp.halo(x, width, layout=layout, sequence=sequence)  # noqa: E731
    counted = sequence.traffic_of("halo").forward_exchanges
    y = checkpoint(call, mine, use_reentrant=False) if wrap else call(mine)
    (y * weights[rank, :, : y.shape[1]]).sum().backward()
    forward = sequence.traffic_of("halo").forward_exchanges - counted
    assert forward == (dist.get_world_size() > 1 and width > 1)

    loss = torch.zeros((), dtype=torch.float64)
    for r, length in enumerate(lengths):
        first = sum(lengths[:r])
        whole = torch.cat([whole_halo(x, first, width, cu_seqlens), x[:, first : first + length]], 1)
        loss = loss + (whole * weights[r, :, : whole.shape[1]]).sum()
        if r == rank:
            torch.testing.assert_close(y, whole)
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(mine.grad, gradient[:, start : start + lengths[rank]])


@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_dense(lengths, width):
    for known, wrap in itertools.product((False, True), (False, True)):
        run_ranks(len(lengths), _halo, lengths, width, None, known, wrap)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("lengths", [(7,), (4, 3), (2, 1, 4), (1, 2, 1, 3)], ids=str)
def test_packed(lengths, width):
    for cut in ((0, 7), (0, 4, 7), (0, 2, 3, 7), (0, 0, 1, 4, 4, 7), (0, 5, 7, 7)):
        run_ranks(len(lengths), _halo, lengths, width, cut, True, False)


def _convolution(lengths, width, cu_seqlens, dtype):
    rank, T, C = dist.get_rank(), sum(lengths), 5
    start, end = sum(lengths[:rank]), sum(lengths[: rank + 1])
    draw = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(1, T, C, generator=draw, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(C, width, generator=draw).double(), torch.randn(C, generator=draw).double()
    true = [y.to(dtype).double().requires_grad_() for y in (x, weight, bias)]
    documents = cu_seqlens or (0, T)
    parts = []
    for a, b in zip(documents, documents[1:]):
        padded = torch.nn.functional.pad(true[0][:, a:b].mT, (width - 1, 0))
        if b > a:
            parts.append(torch.nn.functional.conv1d(padded, true[1].unsqueeze(1), true[2], groups=C).mT)
    y_true = torch.cat(parts, 1)
    (y_true * dy).sum().backward()

    mine = [y.detach().to(dtype).clone().requires_grad_() for y in (x[:, start:end], weight, bias)]
    layout = lasp.ShardLayout(lengths, cu_seqlens) if cu_seqlens else None
    y = lasp.causal_conv(*mine, layout=layout, sequence=sequence_of_all())
    (y * dy[:, start:end].to(dtype)).sum().backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(y.double(), y_true[:, start:end], **tolerance)
    torch.testing.assert_close(mine[0].grad.double(), true[0].grad[:, start:end], **tolerance)
    for y, expected in zip(mine[1:], true[1:]):
        total = y.grad.double()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected.grad, **tolerance)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 4, 5, 13, 13), (0, 1, 2, 3, 13)], ids=str)
@pytest.mark.parametrize("lengths", [(13,), (6, 7), (5, 1, 7), (2, 2, 0, 9)], ids=str)
def test_convolution(lengths, cu_seqlens):
    for width, dtype in ((1, torch.float64), (4, torch.float64), (4, torch.bfloat16)):
        run_ranks(len(lengths), _convolution, lengths, width, cu_seqlens, dtype)


def _compiled():
    rank, sequence = dist.get_rank(), lasp.SequenceParallel(dist.group.WORLD)
    x = torch.randn(2, 3 + rank, 4, dtype=torch.float64, requires_grad=True)
    layout = lasp.ShardLayout((3, 4, 5))
    f = lambda x: lasp.halo(x.sin(), 3, layout=layout, sequence=sequence).cos().sum()  # noqa: E731
    (expected,) = torch.autograd.grad(f(x), x)
    (found,) = torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(x), x)
    torch.testing.assert_close(found, expected)
    assert (sequence.traffic.forward_exchanges, sequence.traffic.reverse_exchanges) == (2, 2)


def test_compiled():
    run_ranks(3, _compiled)


def _differ(odd):
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="conv")
    width = 3 + (dist.get_rank() == odd)
    with pytest.raises(lasp.RankMismatchError, match=f'layer "conv": rank {odd} has width 4, the others 3'):
        lasp.halo(torch.zeros(1, 5, 2), width, sequence=sequence)
    assert lasp.halo(torch.ones(1, 5, 2), 2, sequence=sequence)[0, 0, 0] == (dist.get_rank() > 0)


@pytest.mark.parametrize("odd", [1, 2])
def test_ranks_that_differ_raise_on_all(odd):
    run_ranks(3, _differ, odd)


def _alone():
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    sequence = lasp.SequenceParallel(group, name="conv", validate="off", exchange="ring")
    if dist.get_rank() == 1:
        with pytest.raises(lasp.PeerError, match="layer 'conv', forward"):
            lasp.halo(torch.zeros(1, 5, 2), 2, sequence=sequence)


def test_a_rank_that_does_not_come_is_a_peer_error():
    run_ranks(2, _alone)


@pytest.mark.parametrize(
    ("x", "width", "error", "message"),
    [
        (torch.zeros(1, 3, 2), 0, ValueError, "width must be at least 1.*got 0"),
        (torch.zeros(1, 3, 2), 2.0, TypeError, "width must be an integer, got 2.0"),
        (torch.zeros(1, 3, 2), True, TypeError, "width must be an integer, got True"),
        (torch.zeros(3), 2, ValueError, r"x must have shape \[B, T, ...\], got \(3,\)"),
        (
            torch.zeros(1, 3, dtype=torch.long),
            2,
            TypeError,
            "x must be a floating-point tensor, got a tensor .* of torch.int64",
        ),
        (None, 2, TypeError, "x must be a tensor, got None"),
    ],
    ids=str,
)
def test_bad_arguments(x, width, error, message):
    with pytest.raises(error, match=message):
        lasp.halo(x, width)


def _differentiated_twice():
    sequence = sequence_of_all()
    calls = {
        "halo": lambda x: lasp.halo(x, 2, sequence=sequence),
        "softmax_attention": lambda x: lasp.softmax_attention(*(x.unsqueeze(2),) * 3, sequence=sequence),
        "shard_sequence": lambda x: lasp.shard_sequence(x, sequence),
        "unshard_sequence": lambda x: lasp.unshard_sequence(x, sequence),
    }
    for name, call in calls.items():
        x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
        y = call(x).square().sum() + x.pow(3).sum()
        with pytest.raises(RuntimeError, match=rf"lasp\.{name} has no second derivative"):
            torch.autograd.grad(y, x, create_graph=True)


def test_no_second_derivative_of_what_ranks_exchange():
    """Also where `torch.autograd.grad` would pass over its part, and another one has an own."""
    run_ranks(2, _differentiated_twice)
