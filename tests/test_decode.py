"""Decode steps of all operators against their fp64 recurrences, token by token."""

import pytest
import torch
from inputs import FORMS, VARIANTS, random_inputs

from lasp_kernels import chunked_linear_attention, recurrent_linear_attention
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


def test_autocast_rounds_no_state():
    x = good_call() | {"log_decay": None}
    o = linear_attention_step(**x)
    with torch.autocast("cpu", torch.bfloat16):
        again = linear_attention_step(**x | {"state": torch.zeros(2, 2, 5, 3)})
    assert torch.equal(o, again)
