"""Channels that decay each by itself, over ranks: all values and gradients against an fp64 loop over tokens."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import of_one_rank, run_ranks, sequence_of_all
from torch import nn
from torch.utils.checkpoint import checkpoint

import lasp
import lasp_kernels.selective_scan as kernel
from lasp.adapters import _scans
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp.ranks import SCHEDULES
from lasp_kernels.elementwise import recurrent_elementwise
from lasp_kernels.selective_scan import SelectiveOperands, recurrent_selective_scan

PACKED = (0, 5, 38, 38, 70, 97)
LENGTHS = [(97,), (40, 57), (0, 97), (33, 0, 64), (1, 95, 1), (5, 33, 59)]
OPERATORS = {"elementwise_recurrence": elementwise_recurrence, "selective_scan": selective_scan}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def decays(*shape, draw, resets=0.0):
    """Log-decays from -1e-4 to -1e4, with some resets among them."""
    decay = -(10 ** (8 * torch.rand(shape, generator=draw, dtype=torch.float64) - 4))
    return decay.masked_fill(torch.rand(shape, generator=draw) < resets, -math.inf)


def example(operator, T, *, rows=2, channels=(3,), of_decay=None, resets=0.1):
    """Tensors by name, and the gradient of the result."""
    draw = torch.Generator().manual_seed(T)
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    if operator == "elementwise_recurrence":
        x = {"x": normal(rows, T, *channels)}
        x["log_decay"] = decays(rows, T, *(of_decay or channels), draw=draw, resets=resets)
        return x, normal(rows, T, *channels)
    D, N = 4, 3
    x = {"u": normal(rows, T, D), "dt": -decays(rows, T, D, draw=draw), "A": -normal(D, N).exp()}
    return {**x, "B": normal(rows, T, N), "C": normal(rows, T, N)}, normal(rows, T, D)


def true_results(operator, x, dy, cu_seqlens=None):
    """By a loop over tokens, in fp64: the result and all gradients."""
    x = {name: y.double().requires_grad_() for name, y in x.items()}
    if operator == "elementwise_recurrence":
        y = recurrent_elementwise(*x.values(), cu_seqlens=cu_seqlens)
    else:
        y = recurrent_selective_scan(SelectiveOperands(**x), cu_seqlens=cu_seqlens)
    return {"result": y.detach(), **dict(zip(x, torch.autograd.grad(y, tuple(x.values()), dy.double())))}


def results(operator, x, dy, wrap=False, **options):
    x = {name: y.clone().requires_grad_() for name, y in x.items()}
    call = partial(OPERATORS[operator], **options)
    y = checkpoint(call, *x.values(), use_reentrant=False) if wrap else call(*x.values())
    return {"result": y.detach(), **dict(zip(x, torch.autograd.grad(y, tuple(x.values()), dy)))}


def cut(x, start, end):
    return {name: y if name == "A" else y[:, start:end] for name, y in x.items()}


def assert_near(found, expected, tolerance, what):
    """Relative to the greatest; NaN is never near."""
    assert found.shape == expected.shape, what
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}"
    )


# On one rank


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("T", [1, 2, 63, 97, 500])
def test_one_rank(operator, T, dtype):
    x, dy = example(operator, T)
    x = {name: y.to(dtype) for name, y in x.items()}
    true = true_results(operator, x, dy.to(dtype))
    for name, y in results(operator, x, dy.to(dtype)).items():
        assert y.dtype == dtype
        assert_near(y, true[name], TOLERANCE[dtype], name)


def test_a_fixed_decay_that_hardly_forgets():
    """Its factor is rounded to the same side for every token, which a loop in fp32 adds up over all of them."""
    T, tensors = 5000, {}
    tensors["x"] = torch.rand(1, T, 2, generator=torch.Generator().manual_seed(0)).add(0.5)
    tensors["log_decay"] = torch.full((1, T, 2), -1e-5)
    dy = torch.ones(1, T, 2)
    true = true_results("elementwise_recurrence", tensors, dy)
    for name, y in results("elementwise_recurrence", tensors, dy).items():
        assert_near(y, true[name], 3e-6, name)
    with pytest.raises(AssertionError):
        assert_near(recurrent_elementwise(**tensors), true["result"], 3e-5, "the loop")


@pytest.mark.parametrize(
    ("channels", "of_decay"), [((), None), ((1,), None), ((2, 3), (2, 1)), ((2, 3), (1, 3)), ((2, 3, 4), (1, 1, 1))]
)
@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
def test_any_shape(channels, of_decay, cu_seqlens):
    x, dy = example("elementwise_recurrence", 97, rows=2 if cu_seqlens is None else 1, channels=channels)
    if of_decay is not None:
        x["log_decay"] = x["log_decay"][(..., *(slice(n) for n in of_decay))]
    layout = None if cu_seqlens is None else lasp.ShardLayout((97,), cu_seqlens)
    true = true_results("elementwise_recurrence", x, dy, cu_seqlens)
    for name, y in results("elementwise_recurrence", x, dy, layout=layout).items():
        assert_near(y, true[name], 1e-12, name)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tokens(operator):
    x, dy = example(operator, 3)
    found = results(operator, cut(x, 0, 0), dy[:, :0])
    assert all(found[name].shape == (y.shape if name == "A" else y[:, :0].shape) for name, y in x.items())
    assert not found.get("A", torch.zeros(1)).any()


@pytest.mark.parametrize("piece", [1, 500])
def test_backward_in_pieces(monkeypatch, piece):
    """As many segments at a time as fit: all of them above, and here one, or some."""
    x, dy = example("selective_scan", 97)
    true = true_results("selective_scan", x, dy)
    monkeypatch.setattr(kernel, "PIECE", piece)
    pieces = []
    of_piece = kernel.SelectiveSteps._gradients_of_piece
    monkeypatch.setattr(
        kernel.SelectiveSteps, "_gradients_of_piece", lambda *a: (pieces.append(a[-3:-1]), of_piece(*a))[1]
    )
    for name, y in results("selective_scan", x, dy).items():
        assert_near(y, true[name], 1e-12, name)
    assert len(pieces) > 2
    assert [first for first, _ in pieces[1:]] == [end for _, end in pieces[:-1]]


@pytest.mark.parametrize("operator", OPERATORS)
def test_memory_does_not_hold_the_states_of_all_tokens(operator):
    """What backward keeps beside inputs and result: little of all tokens."""
    x, dy = example(operator, 4000, rows=1, channels=(30,))
    x, kept = {name: y.float().requires_grad_() for name, y in x.items()}, {}
    pointers = {y.untyped_storage().data_ptr() for y in x.values()}

    def pack(y):
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        y = OPERATORS[operator](**x)
    pointers.add(y.untyped_storage().data_ptr())
    assert sum(size for pointer, size in kept.items() if pointer not in pointers) < 0.15 * dy.float().nbytes
    assert len(kept) >= len(x)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("token", [40, 45, 69])
def test_nan_stays_in_its_document(operator, token):
    """In values behind the token, in gradients before and behind it, and in no other document."""
    x, dy = example(operator, 97, rows=1, resets=0.0)
    layout = lasp.ShardLayout((97,), PACKED)
    clean = results(operator, x, dy, layout=layout)
    for name in [*(n for n in x if n not in ("A", "log_decay", "dt")), "dy"]:
        spoilt = {n: y.clone() for n, y in {**x, "dy": dy}.items()}
        spoilt[name][:, token] = math.nan
        d_result = spoilt.pop("dy")
        found = results(operator, spoilt, d_result, layout=layout)
        for key, y in found.items():
            if key != "A":
                assert torch.equal(y[:, :38], clean[key][:, :38]), (name, key)
                assert torch.equal(y[:, 70:], clean[key][:, 70:]), (name, key)
        assert any(y.isnan().any() for y in found.values())
        assert name == "dy" or torch.equal(found["result"][:, :token], clean["result"][:, :token])


def test_no_second_derivative():
    x = torch.randn(1, 5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(elementwise_recurrence(x, -x.square()).sum(), x, create_graph=False)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="elementwise_recurrence has no second derivative"):
        torch.autograd.grad(elementwise_recurrence(x, -x.square()).sum(), x, create_graph=True)


# Over ranks


def _against_loop(operator, lengths, cu_seqlens, dtype, schedules, wrap, known):
    rank, T = dist.get_rank(), sum(lengths)
    x, dy = example(operator, T, rows=1 if cu_seqlens else 2)
    x, dy = {name: y.to(dtype) for name, y in x.items()}, dy.to(dtype)
    true = of_one_rank(true_results, operator, x, dy, cu_seqlens)
    start, end = sum(lengths[:rank]), sum(lengths[: rank + 1])
    layout = lasp.ShardLayout(lengths, cu_seqlens) if known or cu_seqlens else None
    for schedule in schedules:
        sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule, name="scan")
        found = results(operator, cut(x, start, end), dy[:, start:end], wrap, layout=layout, sequence=sequence)
        traffic, ranks = sequence.traffic_of(operator), len(lengths) > 1
        assert (traffic.forward_exchanges, traffic.reverse_exchanges) == (ranks, ranks)
        assert (traffic.calls, traffic.kernels) == ((1, "reference") if ranks else (0, ""))
        for name, y in found.items():
            if name == "A":  # of this rank's tokens
                dist.all_reduce(y)
            expected = true[name] if name == "A" else true[name][:, start:end]
            scale = true[name].abs().max()
            assert (y.double() - expected).abs().le(TOLERANCE[dtype] * scale).all(), (name, schedule, rank)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("cu_seqlens", [None, PACKED, (0, 97), (0, 33, 34, 97)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_gradient_on_every_rank(operator, lengths, cu_seqlens):
    run_ranks(len(lengths), _against_loop, operator, lengths, cu_seqlens, torch.float64, tuple(SCHEDULES), False, True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_a_layout_and_in_fp32(operator):
    for dtype, known in itertools.product((torch.float64, torch.float32), (False, True)):
        run_ranks(3, _against_loop, operator, (33, 0, 64), None, dtype, ("ring", "all_gather"), False, known)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
def test_a_recompute_exchanges_nothing(operator, cu_seqlens):
    run_ranks(3, _against_loop, operator, (33, 2, 62), cu_seqlens, torch.float64, tuple(SCHEDULES), True, True)


def _explained():
    class Layer(nn.Module):
        sequence = None

        def forward(self, x):
            return elementwise_recurrence(x, -x.detach().abs(), sequence=self.sequence)

    model = nn.Sequential(nn.Linear(3, 3), Layer())
    lasp.parallelize(model, dist.group.WORLD, plan={"1": lasp.adapters.linear})
    model(torch.randn(2, 5, 3)).sum().backward()
    assert "elementwise_recurrence" in str(lasp.explain(model))
    traffic = model[1].sequence.traffic_of("elementwise_recurrence")
    assert (traffic.calls, traffic.forward_exchanges, traffic.reverse_exchanges) == (1, 1, 1)


def test_explain_counts_it():
    run_ranks(2, _explained)


class Layer(nn.Module):
    """Mixes tokens by the operators alone, or by itself as well."""

    sequence = None

    def __init__(self, mixes):
        super().__init__()
        self.mixes = mixes

    def forward(self, x):
        x = x.cumsum(1) if self.mixes else x
        x = elementwise_recurrence(x, -x.abs(), sequence=self.sequence)
        A = x.new_full((x.shape[2], 2), -1.0)
        return selective_scan(x, x.exp(), A, x[..., :2], x[..., 1:3], sequence=self.sequence)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_trial_knows_the_operators(mixes):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer, self.head = nn.Embedding(11, 3), Layer(mixes), nn.Linear(3, 11)

        def forward(self, input_ids):
            return self.head(self.layer(self.embed(input_ids)))

    plan = {"layer": lasp.adapters.linear}
    if not mixes:
        assert lasp.parallelize(Model(), None, plan=plan)
        return
    with pytest.raises(ValueError, match="layer"):
        lasp.parallelize(Model(), None, plan=plan)


# Errors


def _differ():
    rank = dist.get_rank()
    x = torch.zeros(1, 4, 3)
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="scan")
    wrong = torch.zeros(1, 4, 5) if rank == 1 else x
    with pytest.raises(lasp.RankMismatchError, match='layer "scan": rank 1 has x '):
        elementwise_recurrence(wrong, wrong, sequence=sequence)
    with pytest.raises(lasp.RankMismatchError, match='layer "scan": rank 1 has gradient true, the others false'):
        elementwise_recurrence(x.requires_grad_(rank == 1), x.detach(), sequence=sequence)
    x = x.detach()
    with pytest.raises(lasp.RankMismatchError, match="rank 1 failed before its exchange"):
        elementwise_recurrence(x, x + (rank == 1), sequence=sequence)
    A = -torch.ones(3, 2 + (rank == 1))
    B = torch.zeros(1, 4, A.shape[1])
    with pytest.raises(lasp.RankMismatchError, match=r'rank 1 has A \[3, 3, "torch.float32"\], the others \[3, 2'):
        selective_scan(x, x, A, B, B, sequence=sequence)
    assert not elementwise_recurrence(x, x, sequence=sequence).any()
    for _ in range(2):
        with pytest.raises(lasp.RankMismatchError, match="elementwise_recurrence, the state"):
            elementwise_recurrence(wrong, wrong, sequence=sequence)
        assert not elementwise_recurrence(x, x, sequence=sequence).any()


def test_ranks_that_differ_raise_on_all():
    run_ranks(3, _differ)


def _not_finite(operator):
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="scan", check_finite=True)
    x, dy = example(operator, 6, resets=0.0)
    assert results(operator, x, dy, sequence=sequence)["result"].isfinite().all()
    lasp.assert_finite()
    spoilt = x["x" if operator == "elementwise_recurrence" else "u"]
    spoilt[:, 2] = math.nan if rank == 1 else 1.0
    assert OPERATORS[operator](**x, sequence=sequence).isfinite().all() == (rank < 1)
    with pytest.raises(FloatingPointError, match="rank 1: scan \\(forward\\); rank 2: scan \\(forward"):
        lasp.assert_finite()
    spoilt[:, 2] = 1.0
    dy[:, 2] = math.nan if rank == 1 else 1.0
    results(operator, x, dy, sequence=sequence)
    with pytest.raises(FloatingPointError, match="rank 0: scan \\(backward\\); rank 1: scan \\(backward"):
        lasp.assert_finite()


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_finite_is_noted(operator):
    run_ranks(3, _not_finite, operator)


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("x", "log_decay", "error", "message"),
    [
        (None, X, TypeError, "x must be a floating-point tensor, got None"),
        (X.long(), X, TypeError, "x must be a floating-point tensor, got torch.int64"),
        (X[0, 0], X, ValueError, r"x must have shape \[B, T, ...\], got \(4,\)"),
        (X[..., :0], X[..., :0], ValueError, r"x must have at least one channel, got \(2, 3, 0\)"),
        (X.to("meta"), X.to("meta"), ValueError, "x must be on a device that holds numbers"),
        (X, None, TypeError, "log_decay must be a floating-point tensor, got None"),
        (X, X.to("meta"), ValueError, "log_decay must be on the device of x, cpu, got meta"),
        (X, X[:, :2], ValueError, r"log_decay must have the shape of x, \(2, 3, 4\), or 1 .* got \(2, 2, 4\)"),
        (X, X[0], ValueError, r"log_decay must have the shape of x, .* got \(3, 4\)"),
        (X, X + 0.5, ValueError, "log_decay must be <= 0, got values up to 0.5"),
        (X, X * math.nan, ValueError, "log_decay must be <= 0, got values up to nan"),
    ],
)
def test_bad_arguments(x, log_decay, error, message):
    with pytest.raises(error, match=message):
        elementwise_recurrence(x, log_decay)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("u", X[0], ValueError, r"u must have shape \[B, T, D\] with D, N >= 1, got \(3, 4\)"),
        ("u", "u", TypeError, "u must be a floating-point tensor, got 'u'"),
        ("A", torch.zeros(4), ValueError, r"A must have shape \[D, N\] with D, N >= 1, got \(4,\)"),
        ("A", torch.zeros(5, 2), ValueError, r"A must have shape \[D, N\] = \(4, 2\), got \(5, 2\)"),
        ("A", torch.ones(4, 2), ValueError, "A must be <= 0, got values up to 1.0"),
        ("dt", X[..., :1], ValueError, r"dt must have shape \[B, T, D\] = \(2, 3, 4\), got \(2, 3, 1\)"),
        ("dt", X - 1, ValueError, "dt must be >= 0, got values down to -1.0"),
        ("B", X, ValueError, r"B must have shape \[B, T, N\] = \(2, 3, 2\), got \(2, 3, 4\)"),
        ("C", None, TypeError, "C must be a floating-point tensor, got None"),
    ],
)
def test_bad_arguments_of_a_selective_scan(name, value, error, message):
    good = {"u": X, "dt": X, "A": torch.zeros(4, 2), "B": X[..., :2], "C": X[..., :2]}
    selective_scan(**good)
    with pytest.raises(error, match=message):
        selective_scan(**{**good, name: value})


# In the form in which transformers calls them


def mamba_inputs(T, dtype, draw):
    rows, D, N = 2, 5, 3
    normal = partial(torch.randn, generator=draw, dtype=torch.float64)
    x = {"x": normal(rows, D, T), "dt": normal(rows, D, T), "A": -normal(D, N).exp()}
    x |= {"B": normal(rows, N, T), "C": normal(rows, N, T), "D": normal(D)}
    x |= {"z": normal(rows, D, T), "delta_bias": normal(D)}
    return {name: y.to(dtype) for name, y in x.items()}, normal(rows, D, T).to(dtype)


def mamba_loop(x, dt, A, B, C, D, z, delta_bias):
    """One token after the other."""
    dt, h, outputs = F.softplus(dt + delta_bias[:, None]), torch.zeros(x.shape[0], *A.shape).to(x), []
    for t in range(x.shape[2]):
        h = (dt[..., t, None] * A).exp() * h + dt[..., t, None] * x[..., t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(outputs, 2) + x * D[:, None]) * F.silu(z)


def _as_mamba(lengths, dtype):
    rank, draw = dist.get_rank(), torch.Generator().manual_seed(3)
    inputs, dy = mamba_inputs(sum(lengths), dtype, draw)
    whole = {name: y.double().requires_grad_() for name, y in inputs.items()}
    expected = mamba_loop(**whole)
    wanted = dict(zip(whole, torch.autograd.grad(expected, tuple(whole.values()), dy.double())))
    start, end = sum(lengths[:rank]), sum(lengths[: rank + 1])
    mine = {n: (y if n in ("A", "D", "delta_bias") else y[..., start:end]).clone() for n, y in inputs.items()}
    mine = {name: y.requires_grad_() for name, y in mine.items()}
    layout = lasp.ShardLayout(lengths)
    y = _scans.selective_scan(**mine, delta_softplus=True, layout=layout, sequence=sequence_of_all())
    assert y.dtype == dtype
    found = dict(zip(mine, torch.autograd.grad(y, tuple(mine.values()), dy[..., start:end])))
    assert_near(y, expected[..., start:end], TOLERANCE[dtype] * 3, "y")
    for name, gradient in found.items():
        if name in ("A", "D", "delta_bias"):
            gradient = gradient.double()
            dist.all_reduce(gradient)
            assert_near(gradient, wanted[name], TOLERANCE[dtype] * 3, name)
        else:
            assert_near(gradient, wanted[name][..., start:end], TOLERANCE[dtype] * 3, name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [(31,), (13, 18), (17, 13, 1)], ids=str)
def test_the_scan_of_mamba(lengths, dtype):
    run_ranks(len(lengths), _as_mamba, lengths, dtype)


def _as_rg_lru(lengths):
    """Documents that begin where the position is 0, without a layout, and gates that are exactly 0 and 1."""
    rank, draw, T = dist.get_rank(), torch.Generator().manual_seed(3), sum(lengths)
    x, dy = (torch.randn(2, T, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    rates = 10 ** (4 * torch.rand(2, T, 4, generator=draw, dtype=torch.float64) - 2)
    rates[:, 3], rates[:, 5] = 0.0, 1e4
    reset = torch.rand(2, T, 1, generator=draw) < 0.1
    reset[:, 0] = True
    whole = [y.clone().requires_grad_() for y in (x, rates)]
    gate, h, states = (-whole[1]).exp() * ~reset, torch.zeros(2, 4, dtype=torch.float64), []
    for t in range(T):
        h = gate[:, t] * h + whole[0][:, t]
        states.append(h)
    expected = torch.stack(states, 1)
    wanted = torch.autograd.grad(expected, whole, dy)
    start, end = sum(lengths[:rank]), sum(lengths[: rank + 1])
    mine = [y[:, start:end].clone().requires_grad_() for y in (x, rates)]
    h = _scans.rnn_scan(mine[0], (-mine[1]).exp(), reset[:, start:end], sequence=sequence_of_all())
    assert_near(h, expected[:, start:end], 1e-12, "h")
    for found, gradient in zip(torch.autograd.grad(h, mine, dy[:, start:end]), wanted):
        assert_near(found, gradient[:, start:end], 1e-12, "gradient")


@pytest.mark.parametrize("lengths", [(31,), (13, 18), (17, 13, 1)], ids=str)
def test_the_scan_of_recurrent_gemma(lengths):
    run_ranks(len(lengths), _as_rg_lru, lengths)


def test_they_are_the_functions_of_transformers():
    mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    gemma = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    inputs, _ = mamba_inputs(37, torch.float32, torch.Generator().manual_seed(5))
    theirs = mamba.mamba_selective_scan(*inputs.values(), delta_softplus=True)
    assert_near(_scans.selective_scan(**inputs, delta_softplus=True), theirs.double(), 2e-6, "y")
    x, gate, reset = torch.randn(2, 37, 5), torch.rand(2, 37, 5), torch.rand(2, 37, 1) < 0.1
    theirs, _ = gemma.RecurrentGemmaRglru._rnn_scan(None, x, gate, reset, None)
    assert_near(_scans.rnn_scan(x, gate, reset), theirs.double(), 2e-6, "h")
