"""fp32 on the path of a CPU: digits after strong decays, and tokens that are not finite, as in the recurrence."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from inputs import FORMS, assert_digits, every_strength, gradients, oracle, random_inputs, run, spoilt
from ranks import run_ranks
from steps import backward_steps, forward_steps, operands

import lasp
from lasp_kernels.chunked import ChunkedSteps


def results(x, **options):
    """Output, final state and all gradients, by name, of the steps that the operator takes on a CPU."""
    steps = ChunkedSteps(operands(x), decay_gradient=True, **options)
    states, final_state, o = forward_steps(steps, x, 1.0, x.initial_state)
    return {"o": o, "final_state": final_state, **backward_steps(steps, x, states)}


def by_recurrence(x, dtype, **options):
    x = replace(x, **{name: t.to(dtype) for name, t in vars(x).items() if t is not None})
    o, final_state, found = oracle(x, **options)
    return {"o": o, "final_state": final_state, **found}


@pytest.mark.parametrize("form", ["token", "channel"])
@pytest.mark.parametrize("T", [64, 130])
def test_weak_decays_behind_strong_ones(form, T):
    x = every_strength(form, T)
    assert_digits(results(x), by_recurrence(x, torch.float64), 1e-6)


@pytest.mark.parametrize("form", ["token", "channel"])
def test_weak_decays_behind_strong_ones_packed(form):
    x = every_strength(form, 130)
    x = replace(x, initial_state=x.initial_state.repeat(3, 1, 1, 1), d_final_state=x.d_final_state.repeat(3, 1, 1, 1))
    bounds = (0, 20, 90, 130)
    assert_digits(results(x, cu_seqlens=bounds), by_recurrence(x, torch.float64, cu_seqlens=bounds), 1e-6)


def _on_ranks(form, lengths):
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    x = every_strength(form, sum(lengths))
    local = x.shard(lengths, sequence.rank)
    local = replace(local, d_final_state=local.d_final_state / sequence.size)  # ranks' gradients of it are summed
    local.require_grad()
    o, final_state = run(lasp.linear_attention, local, output_final_state=True, sequence=sequence)
    found = {"o": o.detach(), "final_state": final_state.detach(), **gradients(local, o, final_state)}
    whole = by_recurrence(x, torch.float64)
    expected = {name: t.split(lengths, 1)[sequence.rank] if "state" not in name else t for name, t in whole.items()}
    if sequence.rank > 0:  # the first one's
        del found["initial_state"], expected["initial_state"]
    assert_digits(found, expected, 2e-6)


@pytest.mark.parametrize("form", ["token", "channel"])
@pytest.mark.parametrize("lengths", [(130,), (45, 85), (70, 3, 57)], ids=str)
def test_weak_decays_behind_strong_ones_of_other_ranks(form, lengths):
    run_ranks(len(lengths), _on_ranks, form, lengths)


@pytest.mark.parametrize("form", ["token", "channel"])
def test_a_gradient_of_strong_decays_is_no_noise(form):
    """As small as it is, next to q dq and k dk: the gradient of a decay has no part of what does not cross it."""
    x = random_inputs(form, 100, B=1, K=16, V=16, dtype=torch.float32)
    x = replace(x, log_decay=torch.full_like(x.log_decay, -20.0))
    assert_digits(results(x), by_recurrence(x, torch.float64), 1e-6)


@pytest.mark.parametrize("T", [130, 2048])
@pytest.mark.parametrize("rate", [1e-3, 0.1, 3.0])
def test_gradient_of_a_fixed_decay(rate, T):
    """At most ten times the error of a loop in fp32."""
    x = random_inputs("head", T, B=1, H=4, K=16, V=16, dtype=torch.float32)
    x = replace(x, log_decay=torch.full((4,), -rate))
    expected = by_recurrence(x, torch.float64)["log_decay"]
    error, of_loop = (y["log_decay"].double() - expected for y in (results(x), by_recurrence(x, torch.float32)))
    assert error.abs().max() <= 10 * of_loop.abs().max()


def with_one_spoilt(x, name, token, value):
    changed = getattr(x, name).clone()
    changed[0, token, 1, 3] = value
    return replace(x, **{name: changed})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize("cu_seqlens", [None, (0, 30, 80)])
def test_what_is_not_finite_spoils_what_depends_on_it(form, name, cu_seqlens):
    """No token before it, no sequence beside it, and no gradient but those that the recurrence spoils too."""
    x = random_inputs(form, 80, B=1, K=16, V=16, sequences=cu_seqlens and 2, dtype=torch.float32)
    sound = results(x, cu_seqlens=cu_seqlens)
    for token, value in ((20, math.nan), (20, math.inf), (63, math.nan), (64, -math.inf)):
        changed = with_one_spoilt(x, name, token, value)
        found = results(changed, cu_seqlens=cu_seqlens)
        for what, expected in by_recurrence(changed, torch.float32, cu_seqlens=cu_seqlens).items():
            assert torch.equal(spoilt(found[what]), spoilt(expected)), (what, token, value)
            same = found[what].isfinite()
            torch.testing.assert_close(found[what][same], sound[what][same], rtol=1e-5, atol=1e-5)
