"""The specification: the recurrence against its closed form, the chunked computation against the recurrence."""

from dataclasses import replace

import pytest
import torch
from inputs import FORMS, assert_close, gradients, oracle, random_inputs, run
from steps import backward_steps, operands

from lasp_kernels import chunked_linear_attention, recurrent_linear_attention, state_dtype, steps_of

BOTH = pytest.mark.parametrize("function", [recurrent_linear_attention, chunked_linear_attention])
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


def packed(T):
    """Sequences of all kinds: one token, empty ones at both ends and within, and one longer than a tile."""
    return torch.tensor(sorted([0, 0, min(1, T), T // 3, T // 3, T, T]), dtype=torch.int32)


def quadratic(x, scale):
    """o_i = scale * sum_{j <= i} (q_i exp(G_i - G_j) k_j) v_j + q_i exp(G_i) S_0, and the same sum for the state."""
    B, T, H, K = x.k.shape
    groups = x.q.shape[2] // H
    decay = torch.zeros(()) if x.log_decay is None else x.log_decay
    decay = decay.unsqueeze(-1) if decay.ndim in (1, 3) else decay  # [H, 1], [B, T, H, 1], [B, T, H, K]
    G = decay.expand(B, T, H, K).cumsum(1)
    pair = (G[:, :, None] - G[:, None]).exp()  # [B, T, T, H, K]
    q = x.q.unflatten(2, (H, groups)) * scale
    scores = torch.einsum("bihgk,bijhk,bjhk->bhgij", q, pair, x.k).tril()
    o = torch.einsum("bhgij,bjhv->bihgv", scores, x.v) + torch.einsum(
        "bihgk,bihk,bhkv->bihgv", q, G.exp(), x.initial_state
    )
    entered = G[:, -1].exp().unsqueeze(-1) * x.initial_state
    return o.flatten(2, 3), entered + torch.einsum("bjhk,bjhk,bjhv->bhkv", (G[:, -1:] - G).exp(), x.k, x.v)


@EVERY_FORM
@pytest.mark.parametrize("groups", [1, 3])
def test_recurrence_is_the_closed_form(form, groups):
    x = random_inputs(form, 9, groups=groups)
    o, final_state = run(recurrent_linear_attention, x, scale=0.3)
    expected_o, expected_state = quadratic(x, 0.3)
    assert_close(o, expected_o, "o")
    assert_close(final_state, expected_state, "final_state")


@EVERY_FORM
@pytest.mark.parametrize("T", [0, 1, 5, 63, 64, 65, 200, 700])
@pytest.mark.parametrize("groups", [1, 2])
def test_chunked_equals_recurrence(form, T, groups):
    x = random_inputs(form, T, groups=groups)
    o, final_state, expected = oracle(x, scale=0.7)
    x.require_grad()
    chunked_o, chunked_state = run(chunked_linear_attention, x, scale=0.7)
    assert_close(chunked_o, o, "o")
    assert_close(chunked_state, final_state, "final_state")
    for name, gradient in gradients(x, chunked_o, chunked_state).items():
        assert_close(gradient, expected[name], f"d{name}")


@EVERY_FORM
@pytest.mark.parametrize("T", [3, 70, 200])
def test_chunked_equals_recurrence_packed(form, T):
    x = random_inputs(form, T, B=1, groups=2, sequences=6)
    cu_seqlens = packed(T)
    o, final_state, expected = oracle(x, cu_seqlens=cu_seqlens.tolist())
    x.require_grad()
    chunked_o, chunked_state = run(chunked_linear_attention, x, cu_seqlens=cu_seqlens)
    assert_close(chunked_o, o, "o")
    assert_close(chunked_state, final_state, "final_state")
    for name, gradient in gradients(x, chunked_o, chunked_state).items():
        assert_close(gradient, expected[name], f"d{name}")


@EVERY_FORM
def test_packed_sequences_do_not_see_each_other(form):
    cu_seqlens = torch.tensor([0, 70, 100], dtype=torch.int32)
    x = random_inputs(form, 100, B=1, sequences=2)
    changed = replace(x, k=torch.cat([x.k[:, :70] + 1, x.k[:, 70:]], 1))
    o, final_state = run(chunked_linear_attention, x, cu_seqlens=cu_seqlens)
    other_o, other_state = run(chunked_linear_attention, changed, cu_seqlens=cu_seqlens)
    assert torch.equal(o[:, 70:], other_o[:, 70:])
    assert torch.equal(final_state[1], other_state[1])
    assert not torch.equal(o[:, :70], other_o[:, :70])


@BOTH
@EVERY_FORM
def test_no_initial_state_is_a_state_of_zeros(form, function):
    x = random_inputs(form, 70)
    o, final_state = run(function, replace(x, initial_state=None))
    from_zeros = run(function, replace(x, initial_state=torch.zeros_like(x.initial_state)))
    assert torch.equal(o, from_zeros[0])
    assert torch.equal(final_state, from_zeros[1])


@BOTH
@EVERY_FORM
def test_final_state_continues_the_sequence(form, function):
    x = random_inputs(form, 150)
    o, final_state = run(function, x)
    first, second = x.shard((67, 83), 0), x.shard((67, 83), 1)
    o_first, between = run(function, first)
    o_second, end = run(function, replace(second, initial_state=between))
    assert_close(torch.cat([o_first, o_second], 1), o, "o")
    assert_close(end, final_state, "final_state")


@EVERY_FORM
@pytest.mark.parametrize("segment_length", [64, 128, 640, 1024])
def test_segment_length_changes_nothing(form, segment_length):
    x = random_inputs(form, 700)
    o, final_state = run(chunked_linear_attention, x)
    segmented_o, segmented_state = run(chunked_linear_attention, x, segment_length=segment_length)
    assert_close(segmented_o, o, "o")
    assert_close(segmented_state, final_state, "final_state")


# Precision


@EVERY_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_the_output_only(form, dtype):
    """State and sums are fp32: within 1e-5 of the largest value; then the output rounds to half its epsilon."""
    x = random_inputs(form, 200, strength=0.1, dtype=torch.float32).to(dtype)
    double = random_inputs(form, 200, strength=0.1, dtype=torch.float32)
    double = replace(
        x.to(torch.float64), **{n: t.double() for n, t in double.given.items() if n not in ("q", "k", "v")}
    )
    exact_o, exact_state = run(recurrent_linear_attention, double)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for function in (recurrent_linear_attention, chunked_linear_attention):
        o, final_state = run(function, x)
        assert (o.dtype, final_state.dtype) == (dtype, torch.float32)
        assert_close(o.double(), exact_o, "o", rtol=rounding, atol=1e-5 * exact_o.abs().max().item())
        assert_close(final_state.double(), exact_state, "state", rtol=0, atol=1e-5 * exact_state.abs().max().item())


def test_state_is_kept_in_fp32_or_in_fp64_for_fp64_inputs():
    assert state_dtype(torch.bfloat16) == state_dtype(torch.float16) == state_dtype(torch.float32) == torch.float32
    assert state_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize(("per_token", "T"), [(-50.0, 300), (-0.5, 2000), (-1e4, 70)])
def test_no_decay_overflows(form, per_token, T):
    """exp(-log_decay * T), which a product of two exponentials would form, is far above the largest fp32 number."""
    x = random_inputs(form, T, B=1, dtype=torch.float32)
    x = replace(x, log_decay=torch.full_like(x.log_decay, per_token))
    assert torch.tensor(-per_token * T).exp().isinf()
    double = replace(x.to(torch.float64), log_decay=x.log_decay.double(), initial_state=x.initial_state.double())
    o, final_state, expected = oracle(double)
    x.require_grad()
    chunked_o, chunked_state = run(chunked_linear_attention, x)
    assert_close(chunked_o.double(), o, "o", rtol=1e-4, atol=1e-4)
    assert_close(chunked_state.double(), final_state, "final_state", rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(x, chunked_o, chunked_state).items():
        assert_close(gradient.double(), expected[name], f"d{name}", rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("reset", [-60.0, -1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("form", ["head", "token", "channel"])
def test_a_reset_among_weak_decays(form, reset):
    """In fp32: what came before it is forgotten, and the decays around it keep their digits."""
    x = random_inputs(form, 150, strength=0.1)
    if form == "head":
        x.log_decay[1] = reset
    else:
        x.log_decay[:, [3, 64, 70, 71, 149]] = reset
    low = replace(x, **{name: t.float() for name, t in x.given.items()})
    for actual, expected in zip(run(chunked_linear_attention, low), run(recurrent_linear_attention, x)):
        assert (actual - expected).norm() / expected.norm() < 2e-5


@pytest.mark.parametrize("form", FORMS[2:])
def test_strong_and_weak_decays_mixed(form):
    x = random_inputs(form, 200)
    strong = torch.rand(x.log_decay.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    x = replace(x, log_decay=torch.where(strong, -60.0, x.log_decay * 0.01))
    o, final_state, expected = oracle(x)
    x.require_grad()
    chunked_o, chunked_state = run(chunked_linear_attention, x)
    assert_close(chunked_o, o, "o")
    assert_close(chunked_state, final_state, "final_state")
    for name, gradient in gradients(x, chunked_o, chunked_state).items():
        assert_close(gradient, expected[name], f"d{name}")


# Gradients


def _gradcheck(function, x, *, fast_mode, **options):
    x = replace(x, log_decay=None if x.log_decay is None else x.log_decay - 0.05)  # away from the bound at 0
    x.require_grad()
    names = list(x.given)

    def call(*tensors):
        return run(function, replace(x, **dict(zip(names, tensors))), **options)

    assert torch.autograd.gradcheck(call, tuple(x.given.values()), fast_mode=fast_mode)


@BOTH
@EVERY_FORM
def test_gradcheck(form, function):
    _gradcheck(function, random_inputs(form, 4, B=1, groups=2, K=3, V=2), scale=0.7, fast_mode=False)


@BOTH
@EVERY_FORM
def test_gradcheck_packed(form, function):
    x = random_inputs(form, 5, B=1, H=1, K=3, V=2, sequences=4)
    _gradcheck(function, x, cu_seqlens=torch.tensor([0, 2, 2, 4, 5], dtype=torch.int32), fast_mode=False)


@EVERY_FORM
def test_gradcheck_of_several_tiles_and_segments(form):
    x = random_inputs(form, 140, H=1, groups=2, K=3, V=2)
    _gradcheck(chunked_linear_attention, x, segment_length=64, fast_mode=True)


@EVERY_FORM
@pytest.mark.parametrize("T", [0, 1, 65, 300])
@pytest.mark.parametrize("is_packed", [False, True])
def test_gradient_steps_equal_autograd(form, T, is_packed):
    """The steps that the operator runs one by one, with `run_map` in place of the ranks' exchange."""
    scale = 0.7
    cu_seqlens = packed(T) if is_packed else None
    x = random_inputs(form, T, B=1 if is_packed else 2, groups=2, sequences=6 if is_packed else None)
    o, final_state, expected = oracle(x, scale=scale, cu_seqlens=None if cu_seqlens is None else cu_seqlens.tolist())

    call = operands(x, scale)
    steps = steps_of(call, cu_seqlens=cu_seqlens)
    maps = steps.local_maps(call)
    states, scanned = steps.scan(maps, x.initial_state)
    assert_close(steps.outputs(call, states)[0], o, "o")
    assert_close(scanned, final_state, "final_state by scan")
    assert_close(through(steps.run_map(maps), x.initial_state), final_state, "final_state by one map")

    by_map = through(steps.run_map(steps.gradient_maps(call, x.do), reverse=True), x.d_final_state)
    found = backward_steps(steps, x, states, scale)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert_close(gradient, expected[name], f"d{name}")
    assert_close(by_map, expected["initial_state"], "dinitial_state by one map")


def through(run_map, entering):
    """A state that passes through the map of its run."""
    state, log_decay = run_map
    return state + (entering if log_decay is None else log_decay.exp().unsqueeze(-1) * entering)
