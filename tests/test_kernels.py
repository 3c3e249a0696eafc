"""The Triton kernels against the fp64 recurrence: on a GPU if there is one, else under Triton's interpreter."""

import functools
import itertools
import operator
from dataclasses import replace
from unittest import mock

import interpreter
import pytest
import torch
import torch.nn.functional as F
from inputs import VARIANTS, assert_digits, every_strength, gradients, oracle, random_inputs, run
from steps import backward_steps, forward_steps, operands
from torch.utils.checkpoint import checkpoint

import lasp
from lasp_kernels import (
    chunked_linear_attention,
    cross_entropy,
    launch,
    linear_loss,
    linears,
    plan,
    rotary,
    shared,
)
from lasp_kernels.norm import fused_norm_gate as norm_gate
from lasp_kernels.reference import activation_of, reference_norm_gate, reference_rotate
from lasp_kernels.steps import TritonSteps

CUDA = interpreter.CUDA
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # relative, of the whole tensor
FORMS = ("none", "head", "token")


@pytest.fixture(scope="module", autouse=True)
def large_tiles():
    """The interpreter's time goes by the number of tiles, so fp32 takes the large ones, too: in this file alone."""
    with mock.patch.dict(plan.CONFIGS):
        if not CUDA:
            plan.CONFIGS.update({name: (*c[:2], *c[:2]) for name, c in plan.CONFIGS.items()})
        interpreter.forget_plans()
        yield
    interpreter.forget_plans()


def steps_of(x, **options):
    return TritonSteps.of(operands(x), **{"decay_gradient": x.log_decay is not None, **options})


def all_steps(x, scale, **options):
    """What `oracle` returns, by the steps in the order in which `lasp.linear_attention` calls them."""
    steps = steps_of(x, **options)
    states, final_state, o = forward_steps(steps, x, scale, x.initial_state)
    return o, final_state, backward_steps(steps, x, states, scale)


def on_device(x, dtype):
    x = x.to(dtype)
    floats = ("log_decay", "initial_state", "d_final_state")
    moved = {n: getattr(x, n).float() for n in floats if getattr(x, n) is not None}
    x = replace(x, **moved)
    return replace(x, **{n: t.to(DEVICE) for n, t in vars(x).items() if t is not None})


def assert_near(actual, expected, what, tolerance):
    """Relative error of the tensor as a whole; every element must be finite."""
    assert actual.shape == expected.shape, what
    actual = actual.detach().double().cpu()
    assert actual.isfinite().all(), f"{what} has elements that nobody wrote"
    # Where the gradient of a single token vanishes only an absolute bound makes sense.
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-2)
    assert error < tolerance, f"{what}: relative error {error:.2e}"


def check(x, *, scale=0.7, dtype=torch.float32, cu_seqlens=None, decay_tolerance=None, **options):
    """All results against the oracle on the same inputs, rounded to their dtype."""
    x = on_device(x, dtype)
    rounded = replace(x, **{name: t.detach().double().cpu() for name, t in vars(x).items() if t is not None})
    o, final_state, expected = oracle(rounded, cu_seqlens=cu_seqlens, scale=scale)
    actual_o, actual_state, found = all_steps(x, scale, cu_seqlens=cu_seqlens, **options)
    tolerance = TOLERANCE[dtype]
    assert actual_o.dtype == found["q"].dtype == found["k"].dtype == dtype
    assert_near(actual_o, o, "o", tolerance)
    assert_near(actual_state, final_state, "final_state", tolerance)
    for name, gradient in found.items():
        if name in expected:
            bound = decay_tolerance or 4 * tolerance if name == "log_decay" else tolerance
            assert_near(gradient, expected[name], f"d{name}", bound)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [0, 1, 5, 63, 64, 65, 200])
def test_ragged_lengths(form, T):
    check(random_inputs(form, T, H=1, K=16, V=32), segment_length=64 if T == 65 else 128)


HEAD_DIMS = [(16, 16), (32, 80), (80, 17), (80, 80), (96, 128), (128, 48), (256, 16), (16, 200)]


@pytest.mark.parametrize(
    ("form", "K", "V"),
    [("token", *dims) for dims in HEAD_DIMS] + [(FORMS[n % 2], *dims) for n, dims in enumerate(HEAD_DIMS)],
)
def test_head_dims(form, K, V):
    check(random_inputs(form, 70, B=1, H=1, K=K, V=V), segment_length=64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("K", "V"), [(8, 8), (3, 16), (1, 5)])
def test_narrow_heads(form, K, V):
    """Narrower than the blocks of a product: with states in and out, packed, grouped, and in two bytes."""
    check(random_inputs(form, 70, B=1, H=2, K=K, V=V), segment_length=64)
    x = random_inputs(form, 70, B=1, H=1, groups=2, K=K, V=V, sequences=2)
    check(x, dtype=torch.bfloat16, cu_seqlens=(0, 3, 70), segment_length=64)


def test_narrow_heads_of_the_operator(monkeypatch):
    monkeypatch.setenv("LASP_KERNELS", "triton")
    x = random_inputs("token", 70, K=8, V=5)
    o, final_state, expected = oracle(x)
    x = on_device(x, torch.float32)
    x.require_grad()
    found = run(lasp.linear_attention, x, output_final_state=True)
    for actual, wanted, what in zip(found, (o, final_state), ("o", "final_state")):
        assert_near(actual, wanted, what, 1e-5)
    for name, gradient in gradients(x, *found).items():
        assert_near(gradient, expected[name], f"d{name}", 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(form, dtype):
    """In the dims that dk and dv share one kernel for, and in others."""
    check(random_inputs(form, 150, B=1, H=1, K=72, V=72), dtype=dtype, segment_length=128)
    check(random_inputs(form, 70, B=1, H=1, K=16, V=130), dtype=dtype, segment_length=64)


@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads(form):
    check(random_inputs(form, 70, groups=3, K=16, V=16), segment_length=64)
    check(random_inputs(form, 70, B=1, groups=2, K=16, V=80), dtype=torch.float16, segment_length=64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_normaliser_and_grouped_values(variant, form):
    """dk and dv in one grid and in two; some in several blocks of columns, packed, and in two bytes."""
    options = {"B": 1, **VARIANTS[variant]}
    check(random_inputs(form, 70, H=2, K=16, V=16, **options), segment_length=64)
    check(random_inputs(form, 30, H=1, K=16, V=32, **options))
    if variant not in ("normalised", "both"):
        return
    x = random_inputs(form, 30, H=1, K=80, V=70, sequences=3, **options)
    check(x, dtype=torch.bfloat16, cu_seqlens=(0, 0, 3, 30))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", ["normalised", "both"])
def test_normaliser_and_grouped_values_of_the_operator(monkeypatch, variant, form):
    """A scale of its own, several segments and pieces, no state in or out: then there may be no states at all."""
    monkeypatch.setenv("LASP_KERNELS", "triton")
    for T, ends in ((5, False), (300, False), (70, True)):
        x = random_inputs(form, T, B=1, H=1, K=16, V=16, state=ends, strength=0.1, **VARIANTS[variant])
        x = replace(x, d_final_state=x.d_final_state * ends)
        o, final_state, expected = oracle(x, scale=0.7)
        x = on_device(x, torch.float32)
        x.require_grad()
        found, behind = run(lasp.linear_attention, x, scale=0.7, output_final_state=ends)
        assert_near(found, o, "o", 1e-5)
        if ends:
            assert_near(behind, final_state, "final_state", 1e-5)
        for name, gradient in gradients(x, found, found.new_zeros(()) if behind is None else behind).items():
            assert_near(gradient, expected[name], f"d{name}", 4e-5)


@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_scale_of_a_normalised_output(scale):
    check(random_inputs("head", 70, B=1, H=1, K=16, V=16, normalize=True), scale=scale, segment_length=64)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 3.0])
def test_gradient_of_a_fixed_decay_with_a_normaliser(rate):
    """At most ten times the error of a loop in fp32."""
    x = random_inputs("head", 300, B=1, H=1, K=16, V=16, normalize=True, dtype=torch.float32)
    x = replace(x, log_decay=torch.full((1,), -rate))
    exact = replace(x, **{name: t.double() for name, t in vars(x).items()})
    (*_, expected), (*_, of_loop) = oracle(exact), oracle(x)
    _, _, found = all_steps(on_device(x, torch.float32), 1.0)
    error, bound = (y["log_decay"].double().cpu() - expected["log_decay"] for y in (found, of_loop))
    assert error.abs().max() <= 10 * bound.abs().max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cu_seqlens", [(0, 0, 1, 6, 71, 71, 200, 200), (0, 64, 128, 170)])
def test_packed(form, groups, cu_seqlens):
    x = random_inputs(form, cu_seqlens[-1], B=1, H=3 - groups, groups=groups, K=16, V=16, sequences=len(cu_seqlens) - 1)
    check(x, cu_seqlens=cu_seqlens, segment_length=64)


@pytest.mark.parametrize("form", ["none", "token"])
def test_far_heads(form):
    """Of a group, whose heads lie more than 2^31 elements apart, as those of [B, H, T, K] do."""
    x = on_device(random_inputs(form, 70, B=1, H=1, groups=3, K=16, V=16), torch.float16)
    storage = torch.UntypedStorage(2 * (2 * (2**30 + 8) + 70 * 16), device=DEVICE)  # 4.3 GB, hardly touched
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage)  # torch.empty alone would fill it here

    def spread(t):
        return far.as_strided(t.shape, (0, 16, 2**30 + 8, 1)).copy_(t)

    tolerance = TOLERANCE[torch.float16]
    o, _, near = all_steps(x, 0.7, segment_length=64)
    for name in ("q", "do"):
        far_o, _, found = all_steps(replace(x, **{name: spread(getattr(x, name))}), 0.7, segment_length=64)
        for what, gradient in {"o": far_o, **found}.items():
            assert_near(gradient, {"o": o, **near}[what].double().cpu(), what, tolerance)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 1, 2, 3, 300, 600)])
@pytest.mark.parametrize(("processors", "pieces"), [(4, 1), (8, 2)])
def test_segments_that_fill_the_card_are_not_cut(monkeypatch, processors, pieces, cu_seqlens):
    for name, value in (("MIN_SEGMENT", 64), ("DECAY_SEGMENT", 128)):
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr("lasp_kernels.steps.processors", lambda device: processors)
    shared.shared_by.cache_clear()
    x = random_inputs("token", 600, B=1, H=2, K=16, V=16, sequences=5 if cu_seqlens else 1)
    steps = steps_of(on_device(x, torch.float32), cu_seqlens=cu_seqlens)
    assert (steps.segment_length, steps.plan.pieces) == (128, pieces)
    check(x, cu_seqlens=cu_seqlens, decay_tolerance=1e-4)
    shared.shared_by.cache_clear()


def test_almost_empty_sequences_leave_a_long_one_in_pieces():
    x = on_device(random_inputs("none", 4000, B=1, H=4, K=16, V=16, state=False), torch.float32)
    processors = launch.processors(x.k.device)
    bounds = (*range(2 * processors), 4000)
    assert steps_of(x, cu_seqlens=bounds).plan.pieces == steps_of(x).plan.pieces == 2


def test_calls_share_the_table_of_packed_sequences():
    x = on_device(random_inputs("token", 100, B=1, K=16, V=16, state=False), torch.float32)
    first, second = (steps_of(x, cu_seqlens=(0, 40, 100)) for _ in range(2))
    assert first is not second
    assert first._shared.table is second._shared.table


def test_walks_have_one_tile():
    """One kernel sums decays up for all of them, and their row sums meet in one."""
    walks = [plan.CONFIGS[name] for name in ("walk", "short walk", "row-sum walk")]
    for pair in (slice(0, 2), slice(2, 4)):
        assert len({config.tile for configs in walks for config in configs[pair]}) == 1


def test_packed_all_empty():
    x = random_inputs("head", 0, B=1, K=16, V=16, sequences=2)
    steps = steps_of(on_device(x, torch.float32), cu_seqlens=(0, 0, 0))
    x = on_device(x, torch.float32)
    states, final_state = steps.scan(steps.local_maps(operands(x)), x.initial_state)
    assert torch.equal(final_state, x.initial_state)
    assert steps.outputs(operands(x), states)[0].shape == x.q.shape


@pytest.mark.parametrize("form", ["head", "token"])
@pytest.mark.parametrize("strength", [1e-3, 10.0, 50.0])
def test_weak_and_strong_decays(form, strength):
    """Strong ones would overflow if a decay above 1 were formed, and let the horizon cut most tokens off."""
    found = check(
        random_inputs(form, 300, B=1, K=16, V=16, strength=strength), segment_length=256, decay_tolerance=1e-4
    )
    assert all(gradient.isfinite().all() for gradient in found.values())


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("reset", [-60.0, -1e4, LOWEST])
def test_a_reset_among_weak_decays(reset):
    """What came before it is forgotten, and the decays around it keep their digits, however strong it is."""
    x = random_inputs("token", 300, B=1, K=16, V=16, strength=0.1)
    x.log_decay[:, [3, 64, 70, 71, 190, 255, 256]] = reset
    found = check(x, segment_length=256, decay_tolerance=1e-4)
    assert found["log_decay"].isfinite().all()


@pytest.mark.parametrize("T", [64, 130])
def test_weak_decays_behind_strong_ones(T):
    """Every one keeps its digits: within a tile its decays are as right as if there were no others."""
    x = on_device(every_strength("token", T), torch.float32)
    exact = replace(x, **{name: t.double().cpu() for name, t in vars(x).items()})
    o, final_state, expected = oracle(exact)
    actual_o, actual_state, found = all_steps(x, 1.0, segment_length=128)
    # The gradient of the decay is a sum of q dq - k dk, which cancel; see docs/lab/kernels.md, "Limits".
    assert_digits({"log_decay": found.pop("log_decay")}, {"log_decay": expected.pop("log_decay")}, 2e-6)
    actual = {"o": actual_o, "final_state": actual_state, **found}
    assert_digits(actual, {"o": o, "final_state": final_state, **expected}, 1e-6)


def weak_behind_the_strongest():
    """The largest sums that a tile may have before weak decays."""
    x = random_inputs("token", 64, B=1, H=8, K=16, V=16, strength=0.3)
    x.log_decay[:, :56] = LOWEST
    return x


@pytest.mark.parametrize("make", [lambda: every_strength("token", 64), weak_behind_the_strongest])
def test_weak_decays_behind_strong_ones_in_bf16(make):
    """Their sums are rounded to fp32 once, which is less than bf16 loses. The interpreter computes in fp32, and rounds
    o, dq, dk and dv alone."""
    x = on_device(make(), torch.bfloat16)
    exact = replace(x, **{name: t.double().cpu() for name, t in vars(x).items()})
    o, final_state, expected = oracle(exact)
    actual_o, actual_state, found = all_steps(x, 1.0)
    actual = {"o": actual_o, "final_state": actual_state, **found}
    bounds = {"log_decay": 7e-4, "final_state": 2e-6, "initial_state": 2e-6}
    for name, wanted in {"o": o, "final_state": final_state, **expected}.items():
        assert_digits({name: actual[name]}, {name: wanted}, 2e-2 if CUDA else bounds.get(name, 2**-7))


@pytest.mark.parametrize(("dtype", "numbers"), [(torch.bfloat16, 2), (torch.float16, 3), (torch.float32, 3)])
def test_numbers_that_tiles_sum_up_to(dtype, numbers):
    """Of a token: two sums, one of them in two numbers where the inputs have digits to lose."""
    x = on_device(random_inputs("token", 70, B=2, H=3, K=16, V=16), dtype)
    assert steps_of(x).plan.tile_sums_shape == (numbers, 2, 3, 70)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 3.0])
def test_gradient_of_a_fixed_decay(rate):
    """At most ten times the error of a loop in fp32."""
    x = random_inputs("head", 600, B=1, H=4, K=16, V=16, dtype=torch.float32)
    x = replace(x, log_decay=torch.full((4,), -rate))
    exact = replace(x, **{name: t.double() for name, t in vars(x).items()})
    (*_, expected), (*_, of_loop) = oracle(exact), oracle(x)
    _, _, found = all_steps(on_device(x, torch.float32), 1.0)
    error, bound = (y["log_decay"].double().cpu() - expected["log_decay"] for y in (found, of_loop))
    assert error.abs().max() <= 10 * bound.abs().max()


def test_a_head_that_forgets_everything():
    x = random_inputs("head", 200, B=1, H=3, K=16, V=16)
    check(replace(x, log_decay=torch.tensor([-0.1, -1e4, LOWEST], dtype=torch.float64)), decay_tolerance=1e-4)


def test_more_heads_than_a_program_sums_up():
    check(random_inputs("token", 70, B=2, H=19, K=16, V=16), decay_tolerance=1e-4)


def test_short_sequences_in_long_segments():
    """The tiles of decays are counted by the longest sequence, not by the segments."""
    x = random_inputs("token", 300, B=1, K=16, V=16, sequences=4)
    check(x, cu_seqlens=(0, 100, 101, 165, 300), segment_length=256, decay_tolerance=1e-4)


def test_horizon_within_a_segment():
    """Decays whose horizon ends in the first, in a later, and in no tile of a segment."""
    x = random_inputs("head", 500, B=1, H=4, K=16, V=16)
    x = replace(x, log_decay=torch.tensor([[-0.0, -0.3, -0.9, -80.0], [1.0] * 4], dtype=torch.float64).T[:, 0])
    check(x, segment_length=256, decay_tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_views_of_a_fused_projection(dtype):
    """q, k, v as parts of one [B, T, H, 3 D], do with stride 0 in its last dim, as the gradient of a sum."""
    x = random_inputs("token", 130, H=2, K=16, V=16)
    fused = torch.cat([x.q, x.k, x.v], -1).to(dtype).to(DEVICE)
    q, k, v = fused.split(16, -1)
    decay = x.log_decay.float().to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
    do = torch.ones((), dtype=dtype, device=DEVICE).expand(v.shape)
    x = replace(on_device(x, dtype), q=q, k=k, v=v, do=do, log_decay=decay)
    rounded = replace(x, **{name: t.detach().double().cpu() for name, t in vars(x).items()})
    o, _, expected = oracle(rounded, scale=1.0)
    actual_o, _, found = all_steps(x, 1.0, segment_length=64)
    assert_near(actual_o, o, "o", TOLERANCE[dtype])
    for name in ("q", "k", "v", "log_decay"):
        assert_near(found[name], expected[name], f"d{name}", 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_that_is_the_same_for_all_tokens(form):
    """do with stride 0 along T, as after o.sum(1): no tile of a copy engine."""
    x = on_device(random_inputs(form, 130, H=2, K=16, V=16), torch.float32)
    x = replace(x, do=x.do[:, :1].expand_as(x.do))
    assert x.do.stride(1) == 0
    check(x, segment_length=64)


def test_fp32_uses_tf32_only_where_pytorch_may():
    x = on_device(random_inputs("none", 64, B=1, K=16, V=16), torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        exact = steps_of(x)
        torch.set_float32_matmul_precision("high")
        fast = steps_of(x)
        assert (exact._shared.precision, fast._shared.precision) == ("ieee", "tf32")
        assert steps_of(on_device(x, torch.float16))._shared.precision == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def language():
    """Some of what Triton's interpreter puts functions of its own in the place of."""
    from triton import language as tl

    return tl.load, tl.core.load, tl.exp, tl.tensor.__repr__, tl.reduce


@pytest.mark.skipif(CUDA, reason="is without a GPU")
@pytest.mark.parametrize("form", FORMS)
def test_the_interpreter_computes_what_it_does_as_it_comes(form):
    x = on_device(random_inputs(form, 130, B=1, H=1, groups=2, K=16, V=17, sequences=2), torch.bfloat16)
    o, final_state, found = all_steps(x, 0.7, cu_seqlens=(0, 69, 130), segment_length=64)
    put_in = language()
    with interpreter.as_it_comes():
        own = language()
        expected = all_steps(x, 0.7, cu_seqlens=(0, 69, 130), segment_length=64)
        assert not any(map(operator.is_, own, put_in))
    assert language() == put_in
    assert torch.equal(o, expected[0])
    assert torch.equal(final_state, expected[1])
    assert all(torch.equal(found[name], expected[2][name]) for name in expected[2])


def test_same_bits_twice():
    x = on_device(random_inputs("token", 130, B=1, K=16, V=32), torch.float16)
    first, second = (all_steps(x, 1.0, segment_length=64) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


def test_backward_twice():
    """The states that forward keeps are as they were after a backward (retain_graph)."""
    x = on_device(random_inputs("token", 130, B=1, K=16, V=16), torch.float32)
    steps = steps_of(x, segment_length=64)
    states, _ = steps.scan(steps.local_maps(operands(x)), x.initial_state)
    first, second = (backward_steps(steps, x, states, 1.0) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 70, 200)])
@pytest.mark.parametrize("reverse", [False, True])
def test_fold(form, cu_seqlens, reverse):
    """The map of a whole run is that of the scan, and leaves the segments as they were."""
    sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    x = on_device(random_inputs(form, 200, B=1, K=16, V=16, sequences=sequences, strength=0.1), torch.float32)
    steps = steps_of(x, cu_seqlens=cu_seqlens, segment_length=64)
    if reverse:
        segments, entering = steps.gradient_maps(operands(x), x.do), x.d_final_state
    else:
        segments, entering = steps.local_maps(operands(x)), x.initial_state
    local_state, log_total = steps.run_map(segments, reverse=reverse)
    _, end = steps.scan(segments, entering, reverse=reverse)
    assert (log_total is None) == (form == "none")
    if log_total is not None:
        assert log_total.shape == (*entering.shape[:2], 1)
        entering = log_total.exp().unsqueeze(-1) * entering
    torch.testing.assert_close(entering + local_state, end, rtol=1e-5, atol=1e-5)


def test_chosen_segments():
    """The choice covers every token, whatever the length."""
    for T in (64, 1000, 5000) if CUDA else (64, 500):
        x = on_device(random_inputs("head", T, B=1, H=1, K=16, V=16, state=False), torch.float32)
        o, final_state, _ = all_steps(x, 1.0)
        rounded = replace(x, **{name: t.double() for name, t in vars(x).items() if t is not None})
        expected_o, expected_state = run(chunked_linear_attention, rounded)
        assert_near(o, expected_o.cpu(), "o", 1e-5)
        assert_near(final_state, expected_state.cpu(), "final_state", 1e-5)


@pytest.mark.parametrize("form", ["none", "head"])
@pytest.mark.parametrize("ends", [False, True])
def test_gradients_of_keys_have_segments_of_their_own(form, ends):
    """Longer ones than outputs; where the decay has a gradient, and with a given length, the same."""
    x = on_device(random_inputs(form, 1100, B=1, H=1, K=16, V=16, state=False), torch.float32)
    x = replace(x, d_final_state=torch.zeros_like(x.d_final_state))
    steps = TritonSteps.of(operands(x), ends=ends)
    assert steps.of_keys().plan.segments < steps.plan.segments
    states, _ = steps.scan(steps.local_maps(operands(x)), None)
    found = backward_steps(steps, x if ends else replace(x, d_final_state=None), states, decay_gradient=False)
    rounded = replace(x, **{name: t.double().cpu() for name, t in vars(x).items() if t is not None})
    _, _, expected = oracle(rounded)
    for name in "qkv":
        assert_near(found[name], expected[name], f"d{name}", 1e-5)
    for options in ({"decay_gradient": True}, {"segment_length": 256}):
        steps = TritonSteps.of(operands(x), **options)
        assert steps.of_keys() is steps


COLUMNS = [(128, 32), (32, 128), (144, 17), (40, 40)]


@pytest.mark.parametrize(
    ("form", "K", "V"),
    [("token", *dims) for dims in COLUMNS] + [(form, *dims) for form, dims in zip(("none", "head") * 2, COLUMNS)],
)
def test_blocks_may_have_more_columns_than_there_are(form, K, V):
    """Of 2-byte tiles that TMA does not move: there no block has fewer than 64."""
    for dims in ((K, V), (V, K)):
        assert plan.walk_blocks("short walk", *dims, 2, False).columns == 64
    x = random_inputs(form, 130, B=1, K=K, V=V, state=False)
    x = on_device(x, torch.bfloat16)
    odd = {n: torch.cat([t, t[..., :1]], -1)[..., :-1] for n, t in (("q", x.q), ("k", x.k), ("v", x.v), ("do", x.do))}
    assert not any(launch.fits_tma(launch.layout(t), 2) for t in odd.values())
    x = replace(x, **odd)
    steps = TritonSteps.of(operands(x), decay_gradient=form == "token")
    states, _ = steps.scan(steps.local_maps(operands(x)), None)
    o, _ = steps.outputs(operands(x), states)
    found = backward_steps(steps, x, states, decay_gradient=form == "token")
    rounded = replace(x, **{name: t.double().cpu() for name, t in vars(x).items() if t is not None})
    expected_o, _, expected = oracle(rounded)
    assert_near(o, expected_o, "o", 1e-2)
    for name in ("q", "k", "v", *(["log_decay"] if form == "token" else [])):
        assert_near(found[name], expected[name], f"d{name}", 2e-2)


@pytest.mark.parametrize(("T", "H", "alone", "among_ranks"), [(500, 1, 1, 2), (500, 4, 1, 2), (1000, 1, 4, 4)])
def test_two_short_segments_are_one_where_that_needs_no_state(monkeypatch, T, H, alone, among_ranks):
    monkeypatch.setattr("lasp_kernels.steps.processors", lambda device: 8)
    x = on_device(random_inputs("none", T, B=1, H=H, K=16, V=16, state=False), torch.float32)
    found = [TritonSteps.of(operands(x), ends=ends) for ends in (False, True)]
    assert [steps.plan.segments for steps in found] == [alone, among_ranks]
    assert [steps.plan.slots for steps in found] == [alone + 1 if alone > 1 else 0, among_ranks + 1]
    assert TritonSteps.of(operands(x), ends=False, decay_gradient=True).plan.segments == among_ranks


@pytest.mark.parametrize(
    ("form", "dtype", "K", "match"),
    [
        ("channel", torch.float32, 16, "per channel"),
        ("head", torch.float64, 16, "float64"),
        ("head", torch.float32, 0, "K = 0"),
        ("head", torch.float32, 257, "K = 257"),
    ],
)
def test_unsupported_is_an_error(form, dtype, K, match):
    x = random_inputs(form, 4, K=K, V=16).to(dtype)
    with pytest.raises(ValueError, match=match):
        steps_of(x)


def test_decay_gradient_must_be_asked_for():
    x = on_device(random_inputs("token", 4, K=16, V=16), torch.float32)
    steps = TritonSteps.of(operands(x))
    with pytest.raises(ValueError, match="asked for"):
        steps.decay_gradient(operands(x), (x.do, x.q, x.k), x.q, x.q)


@pytest.mark.parametrize("activation", ["none", "sigmoid", "silu"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_gate(activation, weighted, dtype):
    """Value and gradients, with the gate a view of a wider projection, on a width that is no power of two."""
    draw = torch.Generator().manual_seed(0)
    x, gate, dy = (torch.randn(2, 7, *shape, generator=draw) for shape in ((3, 20), (120,), (60,)))
    x, gate, dy = (t.to(DEVICE, dtype) for t in (x, gate, dy))
    weight = torch.randn(60, generator=draw).to(DEVICE) if weighted else None
    results = []
    for function, wide in ((norm_gate, lambda t: t), (reference_norm_gate, torch.Tensor.double)):
        leaves = [wide(t).detach().requires_grad_() for t in (x, gate, *([weight] if weighted else []))]
        y = function(leaves[0], leaves[1][..., 60:], *leaves[2:], eps=1e-5, activation=activation)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, wide(dy))])
    for actual, expected, what in zip(*results, ("y", "dx", "dgate", "dweight")):
        assert_near(actual, expected.cpu(), what, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [5, 100])
def test_cross_entropy(words, dtype, gradient):
    logits = (3 * torch.randn(7, words, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)
    logits[2] -= 1e4  # no exponential of it is a number
    labels = torch.tensor([0, words - 1, 2, -100, 1, 4, -100], device=DEVICE)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    with mock.patch.object(cross_entropy, "BLOCK", 32):
        found = cross_entropy.fused_cross_entropy(given := logits.clone(), labels, -100, gradient=gradient)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    if gradient:
        close = 1e-6 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(given.double(), exact.grad, rtol=close, atol=close)
    else:
        assert given.equal(logits)


def test_norm_gate_of_nothing():
    x = torch.empty(2, 0, 3, 20, device=DEVICE, requires_grad=True)
    weight = torch.ones(60, device=DEVICE, requires_grad=True)
    norm_gate(x, x.detach().flatten(2), weight).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert x.grad.shape == x.shape


def test_norm_gate_wrong_arguments():
    x, gate = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 12)
    with pytest.raises(ValueError, match="relu"):
        norm_gate(x, gate, activation="relu")
    with pytest.raises(ValueError, match="gate must have shape"):
        norm_gate(x, gate[..., 1:])
    with pytest.raises(ValueError, match="weight must have shape"):
        norm_gate(x, gate, torch.ones(3))
    with pytest.raises(ValueError, match="float64"):
        norm_gate(x.double(), gate.double())


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (64, 64), (80, 96), (256, 256), (128, 256)])
def test_full_size(form, dtype, K, V):
    """Thousands of tokens and the segments that the card is given, against the chunked fp64 computation."""
    x = on_device(random_inputs(form, 5000, K=K, V=V, H=4, strength=0.2), dtype)
    exact = replace(x, **{name: t.detach().double() for name, t in vars(x).items() if t is not None})
    exact.require_grad()
    o, final_state = run(chunked_linear_attention, exact, scale=0.1)
    expected = gradients(exact, o, final_state)
    actual_o, actual_state, found = all_steps(x, 0.1)
    assert_near(actual_o, o.detach().cpu(), "o", TOLERANCE[dtype])
    assert_near(actual_state, final_state.detach().cpu(), "final_state", TOLERANCE[dtype])
    for name, gradient in found.items():
        bound = 8 * TOLERANCE[dtype] if name == "log_decay" else TOLERANCE[dtype]
        assert_near(gradient, expected[name].cpu(), f"d{name}", bound)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 30, 100)])
def test_compiled_for_one_length_after_another(monkeypatch, cu_seqlens):
    """The compiler's stand-ins have sizes without value; nothing of theirs may be kept for the real call."""
    monkeypatch.setenv("LASP_KERNELS", "triton")

    def f(q, k, v, log_decay, layout):
        return lasp.linear_attention(q, k, v, log_decay=log_decay, layout=layout)[0]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for T in (100, 130, 201):
        bounds = None if cu_seqlens is None else (*cu_seqlens, T) if T > 100 else cu_seqlens
        x = on_device(random_inputs("head", T, B=1, H=2, K=16, V=16, state=False), torch.float32)
        layout = None if bounds is None else lasp.ShardLayout((T,), bounds)
        found = []
        for function in (f, compiled):
            leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
            o = function(*leaves, x.log_decay, layout)
            found.append([o.detach(), *torch.autograd.grad(o, leaves, x.do)])
        for eager, other in zip(*found):
            assert torch.equal(eager, other), T


@pytest.mark.parametrize("T", [100, 200, 333])
@pytest.mark.parametrize("tokens", [88, 100])
def test_the_last_tokens_give_the_map_of_all_that_forget(monkeypatch, T, tokens):
    """A decay of 1.2 a token leaves exp(-104) = 0 after 87 tokens, one of 5 after 21."""
    monkeypatch.setattr("lasp_kernels.steps.END_PIECE", 64)
    x = on_device(random_inputs("head", T, K=16, V=32), torch.float32)
    x.log_decay.copy_(torch.tensor([-1.2, -5.0]))
    steps = TritonSteps.of(operands(x))
    ending = steps.of_end(tokens)
    last = replace(x, **{name: getattr(x, name)[:, -tokens:] for name in "qkv"})
    state, log_decay = ending.run_map(ending.local_maps(operands(last)))
    expected, _ = steps.run_map(steps.local_maps(operands(x)))
    assert_near(state, expected.cpu(), "state", 1e-6)
    assert torch.all(log_decay.exp() == 0)
    assert log_decay.shape == (*state.shape[:2], 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [64, 200])
def test_the_last_segment_is_left_out_where_nobody_needs_the_end(form, T):
    x = on_device(random_inputs(form, T, K=16, V=32), torch.float32)
    steps = TritonSteps.of(operands(x), segment_length=64)
    whole, end = steps.scan(steps.local_maps(operands(x)), x.initial_state)
    segments = steps.local_maps(operands(x), needs_end=False)
    states, no_end = steps.scan(segments, x.initial_state)
    assert end is not None
    assert no_end is None
    assert torch.equal(states[:, :, : steps.plan.segments], whole[:, :, : steps.plan.segments])
    o, _ = steps.outputs(operands(x), states)
    assert torch.equal(o, steps.outputs(operands(x), whole)[0])
    with pytest.raises(ValueError, match="all segments"):
        steps.run_map(segments)


def linear_inputs(dtype):
    draw = torch.Generator().manual_seed(0)

    def numbers(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=draw)).to(DEVICE, dtype)

    return numbers


def assert_linear(function, reference, leaves, dtype):
    """A fused function against its composition in fp64: values and gradients of all leaves, some of them unused."""
    results = []
    for f, wide in ((function, lambda t: t), (reference, torch.Tensor.double)):
        inputs = [wide(t).detach().requires_grad_() for t in leaves]
        ys = f(*inputs)
        ys = ys if isinstance(ys, tuple) else (ys,)
        draw = torch.Generator().manual_seed(1)
        dys = [torch.randn(y.shape, generator=draw).to(DEVICE, dtype) for y in ys]
        results.append([*(y.detach() for y in ys), *torch.autograd.grad(ys, inputs, [wide(dy) for dy in dys])])
    for number, (actual, expected) in enumerate(zip(*results)):
        assert actual.dtype == dtype
        assert_near(actual, expected.cpu(), str(number), 1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_linear(weighted, dtype):
    numbers = linear_inputs(dtype)
    leaves = [numbers(2, 7, 60), numbers(40, 60, scale=0.1), numbers(24, 60, scale=0.1)]
    leaves += [numbers(60)] if weighted else []

    def fused(x, a, b, weight=None):
        return linears.fused_norm_linear(x, (a, b), weight, eps=1e-5)

    def composed(x, a, b, weight=None):
        h = F.rms_norm(x, (60,), weight, 1e-5)
        return x * 1, h @ a.T, h @ b.T

    assert_linear(fused, composed, leaves, dtype)


@pytest.mark.parametrize("activation", ["none", "sigmoid", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_linear(activation, dtype):
    numbers = linear_inputs(dtype)
    leaves = [numbers(2, 7, 60), numbers(2, 7, 60), numbers(24, 60, scale=0.1)]

    def composed(value, gate, weight):
        return (value * activation_of(activation)(gate)) @ weight.T

    assert_linear(functools.partial(linears.fused_gated_linear, activation=activation), composed, leaves, dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_gate_linear(weighted, dtype):
    numbers = linear_inputs(dtype)
    leaves = [numbers(2, 7, 3, 20), numbers(2, 7, 60), numbers(24, 60, scale=0.1)]
    leaves += [numbers(60)] if weighted else []

    def composed(x, gate, weight, norm_weight=None):
        return reference_norm_gate(x, gate, norm_weight, activation="silu") @ weight.T

    assert_linear(functools.partial(linears.fused_norm_gate_linear, activation="silu"), composed, leaves, dtype)


def in_parts(parts, run):
    """What run(part, tell) gives for each part, where tell(x) gives [parts, ...], what each part has told at that
    point: once more for each time that the parts tell, so that in the end all have told what is right."""
    told, tells = {}, 1
    while tells:
        before, results = dict(told), []
        for part in range(parts):
            order = itertools.count()

            def tell(x, part=part, order=order):
                place = next(order)
                told[part, place] = x.clone()
                return torch.stack([told.get((p, place), torch.zeros_like(x)) for p in range(parts)])

            results.append(run(part, tell))
        tells = len(told) != len(before) or any(not told[key].equal(before[key]) for key in told)
    return results


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_gate_linear_of_parts(parts, dtype):
    numbers = linear_inputs(dtype)
    x, gate, weight, dy = numbers(2, 7, 6, 20), numbers(2, 7, 120), numbers(24, 120, scale=0.1), numbers(2, 7, 24)
    x[:, :, :2] *= 3  # the parts' own norms differ
    wide = [t.double().requires_grad_() for t in (x, gate, weight)]
    expected = reference_norm_gate(wide[0], wide[1]) @ wide[2].T
    gradients = torch.autograd.grad(expected, wide, dy.double())

    def run(part, tell):
        cut = [t.chunk(parts, dim)[part].clone().requires_grad_() for t, dim in ((x, 2), (gate, 2), (weight, 1))]
        directions = []

        def total(t, *, backward=False):
            directions.append(backward)
            return tell(t).sum(0)

        y = linears.fused_norm_gate_linear_of_parts(*cut, total, parts)
        found = y.detach(), *torch.autograd.grad(y, cut, dy)
        assert directions == [False, True]
        return found

    found = list(zip(*in_parts(parts, run)))
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert_near(sum(y.double() for y in found[0]), expected.detach().cpu(), "y", limit)
    for name, pieces, dim, exact in zip(("x", "gate", "weight"), found[1:], (2, 2, 1), gradients):
        assert all(piece.dtype == dtype for piece in pieces)
        assert_near(torch.cat(pieces, dim), exact.cpu(), name, limit)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_of_some_words(parts, dtype):
    """As it is on a GPU: the kernel is told that no label is among these words."""
    logits = (3 * torch.randn(7, 60, generator=torch.Generator().manual_seed(0))).to(DEVICE, dtype)
    logits[2] -= 1e4
    logits[3, 59] = 40.0  # a probability of 1
    labels = torch.tensor([0, 59, 2, 59, -1, 31, 20], device=DEVICE)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none", ignore_index=-1)
    expected.sum().backward()

    def run(part, tell):
        mine = logits.chunk(parts, 1)[part].contiguous()
        words = linear_loss.Words(part * mine.shape[1], tell)
        return linear_loss._losses_of_words(mine, labels, -1, words, gradient=True), mine

    in_torch = in_parts(parts, run)
    with mock.patch.object(linear_loss, "_sums_of_exponentials", linear_loss._sums_in_triton):
        in_triton = in_parts(parts, run)
    close = 1e-6 if dtype == torch.float32 else 4e-3
    for results in (in_torch, in_triton):
        for losses, _ in results:
            torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        found = torch.cat([gradient for _, gradient in results], 1)
        torch.testing.assert_close(found.double(), exact.grad, rtol=2 * close, atol=close)


def test_a_recompute_leaves_out_the_last_product():
    """Of a checkpointed gated unit: everything that follows what backward needs."""
    numbers = linear_inputs(torch.float32)
    x, *weights = (numbers(*shape).requires_grad_() for shape in ((5, 60), (40, 60), (40, 60), (60, 40)))

    def unit(x):
        x, value, gate = linears.fused_norm_linear(x, tuple(weights[:2]))
        return x + linears.fused_gated_linear(value, gate, weights[2])

    expected = torch.autograd.grad(unit(x).square().sum(), [x, *weights])
    y = checkpoint(unit, x, use_reentrant=False)
    with mock.patch.object(linears, "_gated", side_effect=AssertionError("computed again")):
        found = torch.autograd.grad(y.square().sum(), [x, *weights])
    for one, other in zip(found, expected):
        assert one.equal(other)


def test_linears_without_a_gradient_or_tokens():
    numbers = linear_inputs(torch.float32)
    x, weight, out = numbers(0, 60).requires_grad_(), numbers(40, 60).requires_grad_(), numbers(60, 40).requires_grad_()
    x2, value, gate = linears.fused_norm_linear(x, (weight, weight))
    y = x2 + linears.fused_gated_linear(value, gate, out)
    gradients = torch.autograd.grad(y.sum(), [x, weight, out])
    assert y.shape == (0, 60)
    assert all(g.shape == w.shape and not g.any() for g, w in zip(gradients, (x, weight, out)))
    with torch.no_grad():
        assert not linears.fused_gated_linear(numbers(3, 40), numbers(3, 40), out).requires_grad
    x = numbers(3, 60).requires_grad_()
    found, expected = (
        torch.autograd.grad(linears.fused_norm_linear(x, (w,))[1].square().sum(), x)[0]
        for w in (weight.detach(), weight)
    )
    assert torch.equal(found, expected)  # of a frozen weight


def fused_calls():
    """Of each function the call, and its leaves."""
    numbers = linear_inputs(torch.float32)
    x, gate, norm_weight, heads = numbers(2, 7, 60), numbers(2, 7, 60), numbers(60), numbers(2, 7, 3, 20)
    weight, back = numbers(24, 60, scale=0.1), numbers(60, scale=0.1)
    positions, theta = torch.arange(7, device=DEVICE), numbers(3, 20)
    return {
        "norm_gate": (norm_gate, [heads, gate, norm_weight]),
        "norm_linear": (lambda x, w, n: linears.fused_norm_linear(x, (w,), n)[1], [x, weight, norm_weight]),
        "norm_gate_linear": (linears.fused_norm_gate_linear, [heads, gate, weight, back]),
        "norm_gate_linear_of_parts": (
            lambda x, gate, w: linears.fused_norm_gate_linear_of_parts(x, gate, w, lambda t, **_: t.clone(), 1),
            [heads, gate, weight],
        ),
        "gated_linear": (linears.fused_gated_linear, [x, gate, weight]),
        "rotate": (lambda q, k, t: sum(rotary.fused_rotate(q, k, positions, t)), [heads, heads.flip(0), theta]),
    }


@pytest.mark.parametrize("name", list(fused_calls()))
def test_no_second_derivative_of_what_is_fused(name):
    """Also where `torch.autograd.grad` would pass over its part, and another one has an own."""
    function, leaves = fused_calls()[name]
    leaves = [x.requires_grad_() for x in leaves]
    y = function(*leaves).square().sum() + leaves[0].pow(3).sum()
    with pytest.raises(RuntimeError, match=f"{name} has no second derivative"):
        torch.autograd.grad(y, leaves[0], create_graph=True)


@pytest.mark.parametrize("name", list(fused_calls()))
def test_saved_tensors_that_come_back_with_other_strides(name):
    """From hooks; and a weight of a norm that lies so from the start."""
    function, leaves = fused_calls()[name]
    leaves = [x.requires_grad_() for x in leaves]
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    turned = [x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for x in leaves]

    def turn(x):
        return torch.stack([x, x], -1)[..., 0]

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, turn):
        y = function(*turned)
    for one, other in zip(torch.autograd.grad(y.square().sum(), turned), expected):
        assert_near(one, other.double().cpu(), name, 1e-5)


def test_shapes_that_fused_functions_refuse():
    numbers = linear_inputs(torch.float32)
    x, weight, q = numbers(2, 7, 60), numbers(24, 60), numbers(2, 7, 4, 20)
    with pytest.raises(ValueError, match=r"gate must have the shape of value, \(2, 7, 60\), got \(1, 7, 60\)"):
        linears.fused_gated_linear(x, x[:1], weight)
    with pytest.raises(ValueError, match="activation must be one of none, sigmoid, silu, got 'gelu'"):
        linears.fused_gated_linear(x, x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(60,\), got \(30,\)"):
        linears.fused_norm_linear(x, (weight,), x[0, 0, :30])
    for k, theta in ((q[:, :, :2], q[0, 0]), (q, q[0, 0, :2])):
        with pytest.raises(ValueError, match=r"k and theta must have shapes \(2, 7, 4, 20\), as q, and \(4, 20\), got"):
            rotary.fused_rotate(q, k, torch.arange(7, device=DEVICE), theta)


@pytest.mark.parametrize("shared_positions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_theta", [torch.float32, torch.float64])
def test_rotate(shared_positions, dtype, of_theta):
    """Positions of millions too, where fp32 angles would be off by a quarter."""
    numbers = linear_inputs(dtype)
    q, k = numbers(2, 7, 3, 20), numbers(2, 7, 3, 20)
    positions = torch.tensor([[0, 1, 2, 300, 70_000, 4_000_000, 16_000_001], [5, 4, 3, 2, 1, 0, 9]], device=DEVICE)
    positions = positions[0] if shared_positions else positions
    theta = 10000.0 ** -torch.rand(3, 20, generator=torch.Generator().manual_seed(2), dtype=of_theta)
    results = []
    for function, wide in ((rotary.fused_rotate, lambda t: t), (reference_rotate, torch.Tensor.double)):
        leaves = [wide(q).requires_grad_(), wide(k).requires_grad_(), theta.to(DEVICE).clone().requires_grad_()]
        q_out, k_out = function(leaves[0], leaves[1], positions, leaves[2])
        draw = torch.Generator().manual_seed(3)
        dq, dk = (wide(torch.randn(q_out.shape, generator=draw).to(DEVICE, dtype)) for _ in range(2))
        results.append([q_out.detach(), k_out.detach(), *torch.autograd.grad((q_out, k_out), leaves, (dq, dk))])
    for actual, expected, what in zip(*results, ("q", "k", "dq", "dk", "dtheta")):
        assert_near(actual, expected.cpu(), what, 1e-5 if dtype == torch.float32 else 1e-2)
