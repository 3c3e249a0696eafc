"""Decode steps of all operators against their fp64 recurrences, token by token.

The Triton kernels run on a GPU, else under Triton's interpreter.
"""

from dataclasses import replace

import interpreter
import pytest
import torch
from inputs import FORMS, VARIANTS, largest_error, random_inputs

from lasp_kernels import chunked_linear_attention, recurrent_linear_attention, step_path
from lasp_kernels.convolution import causal_conv
from lasp_kernels.decode import (
    convolution_step,
    delta_rule_step,
    elementwise_step,
    linear_attention_step,
    selective_scan_step,
)
from lasp_kernels.delta import recurrent_delta_rule
from lasp_kernels.elementwise import recurrent_elementwise
from lasp_kernels.selective_scan import SelectiveOperands, recurrent_selective_scan

CUDA = interpreter.CUDA
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of the greatest: what o is rounded to
T, CLOSE = 19, {"atol": 1e-12, "rtol": 1e-12}
DELTA_FORMS = ("none", "token", "channel")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_token(log_decay, t):
    return log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, t]


def attend(x, state, **options):
    """o [B, T, H*G, V] of all tokens of `Inputs`, and the state behind the last."""
    steps = [
        linear_attention_step(x.q[:, t], x.k[:, t], x.v[:, t], of_token(x.log_decay, t), state, **options)
        for t in range(x.q.shape[1])
    ]
    return torch.stack(steps, 1), state


@pytest.mark.parametrize("variant", ["plain", "grouped queries", *VARIANTS])
@pytest.mark.parametrize("form", FORMS)
def test_linear_attention_goes_on_from_a_state(form, variant):
    options = {"plain": {}, "grouped queries": {"groups": 3}, **VARIANTS}[variant]
    x = random_inputs(form, T, **options)
    call = {"scale": 0.3, "normalize": x.normalize}
    o, state = attend(x, x.initial_state.clone(), **call)
    others = {"log_decay": x.log_decay, "initial_state": x.initial_state, **call}
    for reference in (recurrent_linear_attention, chunked_linear_attention):
        expected, expected_state = reference(x.q, x.k, x.v, **others)[:2]
        torch.testing.assert_close(o, expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(state, expected_state, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("heads", [3, 1])
@pytest.mark.parametrize("form", DELTA_FORMS)
def test_delta_rule_goes_on_from_a_state(form, heads):
    B, H, K, V = 2, 3, 5, 4
    q, k = normal(B, T, heads, K), torch.nn.functional.normalize(normal(B, T, heads, K, seed=1), dim=-1)
    v, beta = normal(B, T, H, V, seed=2), normal(B, T, H, seed=3).sigmoid()
    shape = {"none": None, "token": (B, T, H), "channel": (B, T, H, K)}[form]
    log_decay = None if shape is None else -normal(*shape, seed=4).square()
    state = normal(B, H, K, V, seed=5)
    call = {"log_decay": log_decay, "scale": 0.3, "initial_state": state.clone()}
    expected, expected_state = recurrent_delta_rule(q, k, v, beta, **call)
    steps = [
        delta_rule_step(q[:, t], k[:, t], v[:, t], beta[:, t], of_token(log_decay, t), state, scale=0.3)
        for t in range(T)
    ]
    torch.testing.assert_close(torch.stack(steps, 1), expected, **CLOSE)
    torch.testing.assert_close(state, expected_state, **CLOSE)


@pytest.mark.parametrize("shape", [(5,), (1,)])
def test_elementwise_recurrence(shape):
    x, log_decay = normal(2, T, 5), -normal(2, T, *shape, seed=1).square()
    log_decay[:, 7] = -torch.inf
    state = torch.zeros(2, 5, dtype=torch.float64)
    h = torch.stack([elementwise_step(x[:, t], log_decay[:, t], state) for t in range(T)], 1)
    torch.testing.assert_close(h, recurrent_elementwise(x, log_decay), **CLOSE)
    torch.testing.assert_close(state, h[:, -1], **CLOSE)


def test_selective_scan():
    B, D, N = 2, 5, 3
    u, dt = normal(B, T, D), normal(B, T, D, seed=1).square()
    A, Bs, C = -normal(D, N, seed=2).square(), normal(B, T, N, seed=3), normal(B, T, N, seed=4)
    state = torch.zeros(B, D, N, dtype=torch.float64)
    y = [selective_scan_step(u[:, t], dt[:, t], A, Bs[:, t], C[:, t], state) for t in range(T)]
    expected = recurrent_selective_scan(SelectiveOperands(u, dt, A, Bs, C))
    torch.testing.assert_close(torch.stack(y, 1), expected, **CLOSE)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_convolution(width, bias):
    x, weight, given = normal(2, T, 5), normal(5, width, seed=1), normal(5, seed=2) if bias else None
    last = torch.zeros(2, width - 1, 5, dtype=torch.float64)
    y = torch.stack([convolution_step(x[:, t], weight, given, last) for t in range(T)], 1)
    before = torch.cat([torch.zeros_like(last), x], 1)
    torch.testing.assert_close(y, causal_conv(before, weight, given), **CLOSE)
    torch.testing.assert_close(last, x[:, T - width + 1 :])


def test_the_form_without_growing_powers_does_not_overflow():
    """TransNormerLLM's two forms of inference at b 2, h 8, n 1024, d 64 with decays of 2^-1 to 2^-8 (arXiv 2307.14995):
    powers of 1 / lambda are infinite from token 178 on in the head that forgets fastest."""
    B, H, tokens, D = 2, 8, 1024, 64
    q, k, v = (normal(B, tokens, H, D, seed=n).float() for n in range(3))
    log_decay = -torch.logspace(-1, -8, H, base=2.0)
    expected, expected_state = recurrent_linear_attention(
        q.double(), k.double(), v.double(), log_decay=log_decay.double()
    )
    state = torch.zeros(B, H, D, D)
    o = [linear_attention_step(q[:, t], k[:, t], v[:, t], log_decay, state) for t in range(tokens)]
    assert largest_error(torch.stack(o, 1).double(), expected, 2) < 1e-5
    assert largest_error(state.double(), expected_state, 1) < 1e-5

    grown = torch.zeros(B, H, D, D)
    for t in range(tokens):
        power = (-log_decay * (t + 1)).exp()[:, None, None]
        grown += power * (k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2))
    origin = (q[:, -1].unsqueeze(-2) * (log_decay * tokens).exp()[:, None, None]) @ grown
    finite = origin.isfinite().all(-1).all(-1).all(0)
    assert finite.tolist() == [False] * 3 + [True] * 5  # 1,024 x 2^-4 is 64, and e^88.7 the largest number


def good_call():
    """Of a linear attention, by name."""
    x = {"q": normal(2, 4, 5), "k": normal(2, 2, 5), "v": normal(2, 2, 3), "log_decay": -torch.ones(2)}
    return {name: y.float() for name, y in x.items()} | {"state": torch.zeros(2, 2, 5, 3), "scale": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.zeros(2, 3, 5), "q must have a multiple of the heads of k, got 3 and 2"),
        ("q", torch.zeros(2, 2, 4), r"q and k in K, got q \(2, 2, 4\), k \(2, 2, 5\)"),
        ("k", torch.zeros(2, 2, 5, dtype=torch.bfloat16), "one dtype, got q torch.float32 and k torch.bfloat16"),
        ("v", torch.zeros(2, 2, 1, 3), r"v must have shape \[B, H, dim\].*got \(2, 2, 1, 3\)"),
        ("log_decay", torch.zeros(3), r"log_decay must have shape \[H\] = \(2,\) or \[B, H\].*got \(3,\)"),
        (
            "state",
            torch.zeros(2, 2, 5, 4),
            r"state must have shape \[B, H, K, V\] = \(2, 2, 5, 3\), got \(2, 2, 5, 4\)",
        ),
        ("state", torch.zeros(2, 2, 5, 3, dtype=torch.bfloat16), "state must be torch.float32 for inputs of"),
    ],
)
def test_wrong_inputs_are_named(name, value, message):
    x = good_call()
    assert linear_attention_step(**x).shape == (2, 4, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        linear_attention_step(**x | {name: value})


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("step", "arguments", "message"),
    [
        (
            delta_rule_step,
            (zeros(2, 2, 5), zeros(2, 1, 5), zeros(2, 2, 3), zeros(2, 2), None, zeros(2, 2, 5, 3)),
            r"one shape \[B, H, K\], got q \(2, 2, 5\) and k \(2, 1, 5\)",
        ),
        (
            delta_rule_step,
            (zeros(2, 1, 5), zeros(2, 1, 5), zeros(2, 2, 3), zeros(2, 1), None, zeros(2, 2, 5, 3)),
            r"beta must have shape \[B, H\] = \(2, 2\), got \(2, 1\)",
        ),
        (
            delta_rule_step,
            (zeros(2, 2, 5), zeros(2, 2, 5), zeros(2, 2, 3), zeros(2, 2), zeros(2), zeros(2, 2, 5, 3)),
            r"log_decay must have shape \[B, H\] = \(2, 2\) or \[B, H, K\] = \(2, 2, 5\), got \(2,\)",
        ),
        (elementwise_step, (zeros(2, 5), zeros(2, 4), zeros(2, 5)), r"log_decay must have the shape of x, \(2, 5\)"),
        (elementwise_step, (zeros(2, 5), zeros(2, 5), zeros(5)), r"state must have shape \[B, ...\] of x = \(2, 5\)"),
        (
            selective_scan_step,
            (zeros(2, 5), zeros(2, 5), zeros(4, 3), zeros(2, 3), zeros(2, 3), zeros(2, 5, 3)),
            r"A must have shape \[D, N\] with D = 5, got \(4, 3\)",
        ),
        (
            convolution_step,
            (zeros(2, 5), zeros(5, 4), None, zeros(2, 4, 5)),
            r"last must have shape \[B, W - 1, D\] = \(2, 3, 5\), got \(2, 4, 5\)",
        ),
        (
            convolution_step,
            (zeros(2, 5), zeros(5, 4), None, zeros(2, 5, 3).mT),
            r"last, which is changed in place, must be contiguous, got strides \(15, 1, 3\)",
        ),
    ],
)
def test_wrong_inputs_of_the_others_are_named(step, arguments, message):
    with pytest.raises(ValueError, match=message):
        step(*arguments)


def test_autocast_rounds_no_state():
    x = good_call() | {"log_decay": None}
    o = linear_attention_step(**x)
    with torch.autocast("cpu", torch.bfloat16):
        again = linear_attention_step(**x | {"state": torch.zeros(2, 2, 5, 3)})
    assert torch.equal(o, again)


# The kernels


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setenv("LASP_KERNELS", "triton")


def on_device(x, dtype):
    """Inputs as a user has them: q, k and v in a dtype, decays and the state in fp32."""
    x = x.to(dtype)
    wide = {name: getattr(x, name).float() for name in ("log_decay", "initial_state") if getattr(x, name) is not None}
    return replace(x, **{name: y.to(DEVICE) for name, y in {**x.given, **wide}.items()})


def exact(x, **call):
    wide = {name: y.double().cpu() for name, y in x.given.items()}
    return recurrent_linear_attention(
        wide["q"], wide["k"], wide["v"], log_decay=wide.get("log_decay"), initial_state=wide["initial_state"], **call
    )


def check(x, digits=1e-6, **call):
    """A step's kernel for all tokens of `Inputs`."""
    o, state = attend(x, x.initial_state.clone(), **call)
    expected, expected_state = exact(x, **call)
    assert o.dtype == x.q.dtype
    assert state.dtype == torch.float32
    assert largest_error(o.double().cpu(), expected, 2) < max(digits, TOLERANCE[x.q.dtype])
    assert largest_error(state.double().cpu(), expected_state, 1) < digits


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("variant", ["plain", "grouped queries", *VARIANTS])
@pytest.mark.parametrize("form", FORMS)
def test_kernel_of_linear_attention(form, variant):
    options = {"plain": {}, "grouped queries": {"groups": 3}, **VARIANTS}[variant]
    x = random_inputs(form, 3, B=3, K=21, V=37, **options)
    check(on_device(x, torch.float32), scale=0.3, normalize=x.normalize)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["head", "channel"])
def test_kernel_in_16_bits(form, dtype):
    check(on_device(random_inputs(form, 3, B=1, H=3, K=64, V=64), dtype), scale=0.3)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("form", ["head", "channel"])
def test_kernel_after_many_tokens_and_any_decay(form):
    """300 tokens, whose decays lie between -1e-4 and -1000."""
    x = random_inputs(form, 300, B=1, H=8 if CUDA else 2, K=8, V=8)
    strengths = -torch.logspace(-4, 3, x.log_decay.numel(), dtype=torch.float64)
    order = torch.randperm(len(strengths), generator=torch.Generator().manual_seed(0))
    check(on_device(replace(x, log_decay=strengths[order].view(x.log_decay.shape)), torch.float32), digits=2e-6)


@pytest.mark.parametrize("path", ["reference", "triton"])
def test_a_weak_decay_does_not_drift(monkeypatch, path):
    """exp(-1e-4) in fp32 is 2e-8 off, always to the same side: after 2,000 tokens an exact state would be 4e-5 off."""
    monkeypatch.setenv("LASP_KERNELS", path)
    log_decay, zeros = torch.full((1,), -1e-4, device=DEVICE), torch.zeros(1, 1, 16, device=DEVICE)
    state = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = state.double() * log_decay.double().mul(300).exp()
    for _ in range(300):
        linear_attention_step(zeros, zeros, zeros, log_decay, state)
    assert ((state - expected) / expected).mean().abs() < 3e-7


@pytest.mark.usefixtures("triton")
def test_kernel_reads_slices_of_one_projection():
    """q, k and v as views of what one layer gave for a token."""
    B, H, K = 3, 2, 16
    rows = normal(B, 3 * H * K).to(DEVICE, torch.float32)
    q, k, v = (y.view(B, H, K) for y in rows.split(H * K, 1))
    state = normal(B, H, K, K, seed=1).to(DEVICE, torch.float32)
    again = state.clone()
    o = linear_attention_step(q, k, v, None, state)
    expected = linear_attention_step(q.contiguous(), k.contiguous(), v.contiguous(), None, again)
    assert torch.equal(o, expected)
    assert torch.equal(state, again)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("heads", [3, 1])
@pytest.mark.parametrize("form", DELTA_FORMS)
def test_kernel_of_the_delta_rule(form, heads):
    B, H, K, V, tokens = 2, 3, 21, 37, 4
    q, k = normal(B, tokens, heads, K), torch.nn.functional.normalize(normal(B, tokens, heads, K, seed=1), dim=-1)
    v, beta = normal(B, tokens, H, V, seed=2), normal(B, tokens, H, seed=3).sigmoid()
    shape = {"none": None, "token": (B, tokens, H), "channel": (B, tokens, H, K)}[form]
    log_decay = None if shape is None else -normal(*shape, seed=4).square().to(DEVICE, torch.float32)
    state = normal(B, H, K, V, seed=5).to(DEVICE, torch.float32)
    q, k, v, beta = (x.to(DEVICE, torch.float32) for x in (q, k, v, beta))
    wide = [x.double().cpu() for x in (q, k, v, beta)]
    call = {"log_decay": log_decay if log_decay is None else log_decay.double().cpu(), "scale": 0.3}
    expected, expected_state = recurrent_delta_rule(*wide, **call, initial_state=state.double().cpu())
    steps = [
        delta_rule_step(q[:, t], k[:, t], v[:, t], beta[:, t], of_token(log_decay, t), state, scale=0.3)
        for t in range(tokens)
    ]
    assert largest_error(torch.stack(steps, 1).double().cpu(), expected, 2) < 3e-6
    assert largest_error(state.double().cpu(), expected_state, 1) < 3e-6


@pytest.mark.usefixtures("triton")
def test_kernels_of_the_small_operators():
    B, D, N, W = 3, 21, 5, 4
    x, u = normal(2, B, D).to(DEVICE, torch.float32)
    log_decay = -normal(B, D, seed=1).square().to(DEVICE, torch.float32)
    log_decay[:, 3] = -torch.inf
    state = normal(B, D, seed=2).to(DEVICE, torch.float32)
    expected = log_decay.double().exp() * state.double() + x.double()
    h = elementwise_step(x, log_decay, state)
    torch.testing.assert_close(h.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(state, h)
    h = elementwise_step(x, log_decay[:, :1], state)
    torch.testing.assert_close(h.double(), log_decay[:, :1].double().exp() * expected + x, atol=1e-6, rtol=1e-6)

    dt, A, Bs, C, state = (
        y.to(DEVICE, torch.float32)
        for y in (
            normal(B, D, seed=3).square(),
            -normal(D, N, seed=4).square(),
            normal(B, N, seed=5),
            normal(B, N, seed=6),
            normal(B, D, N, seed=7),
        )
    )
    expected = (dt.unsqueeze(-1) * A).double().exp() * state + (dt * u).double().unsqueeze(-1) * Bs.unsqueeze(1)
    y = selective_scan_step(u, dt, A, Bs, C, state)
    torch.testing.assert_close(state.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(y.double(), (expected * C.double().unsqueeze(1)).sum(-1), atol=1e-5, rtol=1e-5)

    weight, bias, last = (
        y.to(DEVICE, torch.float32) for y in (normal(D, W), normal(D, seed=8), normal(B, W - 1, D, seed=9))
    )
    seen = torch.cat([last, x.unsqueeze(1)], 1)
    y = convolution_step(x, weight, bias, last)
    assert torch.equal(last, seen[:, 1:])
    torch.testing.assert_close(
        y.double(), causal_conv(seen.double(), weight.double(), bias.double())[:, 0], atol=1e-6, rtol=1e-6
    )


def test_which_path_computes_a_step(monkeypatch):
    x = torch.zeros(1, 2, 8, device=DEVICE)
    monkeypatch.delenv("LASP_KERNELS", raising=False)
    assert step_path(x, rows=8) == ("triton" if CUDA else "reference")
    assert step_path(x.double(), rows=8) == "reference"
    monkeypatch.setenv("LASP_KERNELS", "triton")
    wide = torch.zeros(1, 1, 1025, device=DEVICE)
    with pytest.raises(ValueError, match="a step take up to 1024 rows of a state, got 1025"):
        linear_attention_step(wide, wide, wide, None, torch.zeros(1, 1, 1025, 1025, device=DEVICE))
    with pytest.raises(ValueError, match=r"state, which is changed in place, must be contiguous, got strides \(128"):
        linear_attention_step(x, x, x, None, torch.zeros(1, 2, 8, 8, device=DEVICE).mT)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("B", [1, 16, 64, 256])
@pytest.mark.parametrize("form", ["none", "head", "token", "channel", "delta"])
def test_steps_in_a_graph_at_a_models_size(form, B):
    """40 replays of a captured step are 40 steps."""
    H, D, tokens = 16, 128, 40
    q, k, v = (normal(B, tokens, H, D, seed=n).to(DEVICE, torch.bfloat16) for n in range(3))
    shape = {"none": None, "head": (H,), "token": (B, tokens, H), "channel": (B, tokens, H, D)}.get(form)
    log_decay = None if shape is None else -normal(*shape, seed=3).square().to(DEVICE, torch.float32)
    beta = normal(B, tokens, H, seed=4).sigmoid().to(DEVICE, torch.bfloat16)
    if form == "delta":
        k = torch.nn.functional.normalize(k, dim=-1)
    state = torch.zeros(B, H, D, D, device=DEVICE)
    given = [x[:, 0].clone() if x.ndim > 1 else x for x in (q, k, v, beta)]
    decay = None if log_decay is None else of_token(log_decay, 0).clone()

    def step():
        if form == "delta":
            return delta_rule_step(*given, decay, state, scale=D**-0.5)
        return linear_attention_step(*given[:3], decay, state, scale=D**-0.5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step()
    state.zero_()
    outputs = []
    for t in range(tokens):
        for x, y in zip(given, (q, k, v, beta)):
            x.copy_(y[:, t])
        if decay is not None and decay.ndim > 1:
            decay.copy_(log_decay[:, t])
        graph.replay()
        outputs.append(o.clone())
    wide = [x.double() for x in (q, k, v)]
    options = {"log_decay": None if log_decay is None else log_decay.double(), "scale": D**-0.5}
    if form == "delta":
        expected, expected_state = recurrent_delta_rule(*wide, beta.double(), **options)
    else:
        expected, expected_state = recurrent_linear_attention(*wide, **options)
    assert largest_error(torch.stack(outputs, 1).double(), expected, 2) < 8e-3
    assert largest_error(state.double(), expected_state, 1) < 1e-5
