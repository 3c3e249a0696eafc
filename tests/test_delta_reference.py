"""The delta rule on one device: its steps, driven as a runtime drives them, against the recurrence token by token."""

from dataclasses import dataclass, replace

import pytest
import torch
from inputs import spoilt
from torch import Tensor

from lasp_kernels.delta import DeltaOperands, check_delta_inputs, recurrent_delta_rule
from lasp_kernels.delta_steps import DeltaMaps, DeltaSteps, chunked_delta_rule
from lasp_kernels.reference import transform

FORMS = ("none", "token", "channel")  # DeltaNet, Gated DeltaNet, KDA
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
EVERY_FORM = pytest.mark.parametrize("form", FORMS)


@dataclass(frozen=True)
class Inputs:
    x: DeltaOperands
    initial_state: Tensor
    do: Tensor
    d_final_state: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Those of the call, by name."""
        named = dict(zip(NAMES, (*self.x[:5], self.initial_state)))
        return {name: x for name, x in named.items() if x is not None}

    def to(self, target) -> "Inputs":
        """In another dtype or on another device."""
        x = DeltaOperands(*[None if y is None else y.to(target) for y in self.x[:5]], self.x.scale)
        return Inputs(x, self.initial_state.to(target), self.do.to(target), self.d_final_state.to(target))

    def cut(self, tokens: slice, runs: slice) -> "Inputs":
        """Some runs of packed inputs alone."""
        x = DeltaOperands(*[None if y is None else y[:, tokens] for y in self.x[:5]], self.x.scale)
        return Inputs(x, self.initial_state[runs], self.do[:, tokens], self.d_final_state[runs])


def mild(draw, shape):
    """Between -1 and 0."""
    return -torch.rand(shape, generator=draw, dtype=torch.float64)


def mixed(draw, shape):
    """Each of its own strength, from -1e-4 to -1e4."""
    return -(10.0 ** (8 * torch.rand(shape, generator=draw, dtype=torch.float64) - 4))


def late(draw, shape):
    """Weak ones behind a long stretch of strong ones: a sum over both has no digits left for the weak."""
    log_decay = 0.02 * mild(draw, shape)
    log_decay[:, :32] = -100.0
    return log_decay


def random_inputs(form, T, *, B=2, H=2, groups=1, K=8, V=6, runs=None, decays=mild, seed=0) -> Inputs:
    """fp64; keys of length one and beta up to 2, so that no token makes the state grow. `groups`: heads of v a key."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    shape = {"none": None, "token": (B, T, H * groups), "channel": (B, T, H * groups, K)}[form]
    x = DeltaOperands(
        q=normal(B, T, H, K),
        k=torch.nn.functional.normalize(normal(B, T, H, K), dim=-1),
        v=normal(B, T, H * groups, V),
        beta=2 * torch.rand(B, T, H * groups, generator=draw, dtype=torch.float64),
        log_decay=None if shape is None else decays(draw, shape),
        scale=0.7,
    )
    x.beta[:, 2::7], x.beta[:, 3::7] = 0.0, 2.0  # a token that writes nothing; a reflection
    states = (B if runs is None else runs, H * groups, K, V)
    return Inputs(x, normal(*states), normal(B, T, H * groups, V), normal(*states))


def by_autograd(function, inputs: Inputs, **options) -> dict[str, Tensor]:
    """Outputs, final state and all gradients of a function with the oracle's signature."""
    given = {name: x.detach().clone().requires_grad_() for name, x in inputs.tensors().items()}
    operands = [given[name] for name in NAMES[:4]]
    rest = {name: given[name] for name in NAMES[4:] if name in given}
    o, final_state = function(*operands, **rest, scale=inputs.x.scale, **options)
    found = torch.autograd.grad(
        (o, final_state), list(given.values()), (inputs.do, inputs.d_final_state), materialize_grads=True
    )
    results = {"o": o.detach(), "final_state": final_state.detach()}
    return results | {f"d{name}": gradient for name, gradient in zip(given, found)}


def by_steps(inputs: Inputs, **options) -> dict[str, Tensor]:
    """The same through the steps, forward and backward, as the runtime drives them; nothing here uses autograd."""
    x, do = inputs.x, inputs.do
    steps = DeltaSteps(x, **options)
    maps = steps.local_maps(x)
    states, final_state = steps.scan(maps, inputs.initial_state)
    assert states.shape == steps.states_shape
    results = {"o": steps.outputs(x, states), "final_state": final_state}
    results["dq"] = steps.query_gradient(x, do, states)
    d_maps = steps.gradient_maps(x, do, maps.transition)
    d_states, results["dinitial_state"] = steps.scan(d_maps, inputs.d_final_state, reverse=True)
    results["dk"], results["dv"], results["dbeta"], d_log_decay = steps.gradients(x, do, states, d_states)
    assert (d_log_decay is None) == (x.log_decay is None)
    return results if d_log_decay is None else results | {"dlog_decay": d_log_decay}


def packed(T):
    """Sequences of all kinds: one token, empty ones at both ends and within, and one longer than a tile."""
    return torch.tensor(sorted([0, 0, min(1, T), T // 3, T // 3, T, T]), dtype=torch.int32)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float):
    """By the norm of each tensor; names and shapes are the same."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert x.shape == expected[name].shape, name
        difference, norm = (x.double() - expected[name]).norm().item(), expected[name].norm().item()
        subnormal = torch.finfo(x.dtype).tiny  # behind decays of -100 a token fp32 has few digits or none
        assert difference <= rtol * norm + subnormal, f"{name}: {difference:.1e} of {norm:.1e}"  # a NaN fails too


def closed_form(x: DeltaOperands, initial_state: Tensor):
    """The final state as the matrices of the module's docstring make it, one by one, without decay or with."""
    B, T, H, K = x.k.shape
    states = initial_state
    for t in range(T):
        k, beta = x.k[:, t], x.beta[:, t, :, None, None]
        reflection = torch.eye(K, dtype=k.dtype) - beta * k.unsqueeze(-1) * k.unsqueeze(-2)
        log_decay = torch.zeros(B, H, K, dtype=k.dtype) if x.log_decay is None else x.log_decay[:, t]
        log_decay = log_decay if log_decay.ndim == 3 else log_decay.unsqueeze(-1).expand(B, H, K)
        states = reflection @ torch.diag_embed(log_decay.exp()) @ states
        states = states + beta * k.unsqueeze(-1) * x.v[:, t].unsqueeze(-2)
    return x.scale * (x.q[:, -1].unsqueeze(-2) @ states).squeeze(-2), states


@EVERY_FORM
def test_recurrence_is_the_formula(form):
    inputs = random_inputs(form, 9)
    results = by_autograd(recurrent_delta_rule, inputs)
    o, final_state = closed_form(inputs.x, inputs.initial_state)
    torch.testing.assert_close(results["o"][:, -1], o)
    torch.testing.assert_close(results["final_state"], final_state)


@EVERY_FORM
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("T", [0, 1, 17, 63, 64, 65, 200])
def test_steps_equal_recurrence(form, T, groups):
    inputs = random_inputs(form, T, groups=groups)
    expected = by_autograd(recurrent_delta_rule, inputs)
    for segment_length in (None, 64, 128):
        assert_close(by_steps(inputs, segment_length=segment_length), expected, 1e-13)


@EVERY_FORM
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("T", [0, 3, 70, 400])
def test_steps_equal_recurrence_packed(form, T, groups):
    cu_seqlens = packed(T)
    inputs = random_inputs(form, T, B=1, groups=groups, runs=6)
    expected = by_autograd(recurrent_delta_rule, inputs, cu_seqlens=cu_seqlens)
    for segment_length in (None, 64, 128):
        assert_close(by_steps(inputs, cu_seqlens=cu_seqlens, segment_length=segment_length), expected, 1e-13)


@EVERY_FORM
@pytest.mark.parametrize("cu_seqlens", [None, packed(200)])
def test_chunked_equals_recurrence(form, cu_seqlens):
    inputs = random_inputs(form, 200, B=1, groups=2, runs=None if cu_seqlens is None else 6)
    expected = by_autograd(recurrent_delta_rule, inputs, cu_seqlens=cu_seqlens)
    for segment_length in (None, 128):
        actual = by_autograd(chunked_delta_rule, inputs, cu_seqlens=cu_seqlens, segment_length=segment_length)
        assert_close(actual, expected, 1e-13)


@pytest.mark.parametrize("decays", [mild, mixed, late])
@EVERY_FORM
def test_fp32_and_decays_of_every_strength(form, decays):
    """The bound is that of the recurrence in fp32 and some: no decay costs digits or overflows."""
    inputs = random_inputs(form, 200, K=32, V=16, decays=decays)
    assert_close(by_steps(inputs), by_autograd(recurrent_delta_rule, inputs), 1e-13)
    single = inputs.to(torch.float32)
    expected = by_autograd(recurrent_delta_rule, single.to(torch.float64))
    actual = by_steps(single)
    assert all(x.dtype == torch.float32 for x in actual.values())
    assert_close(actual, expected, 2e-6)


@EVERY_FORM
@pytest.mark.parametrize("name", ["q", "k", "v", "beta", "do"])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 30, 80]])
def test_what_is_not_finite_spoils_what_depends_on_it(form, name, cu_seqlens):
    """No token before it, no sequence beside it, and no gradient but those that the recurrence spoils too."""
    inputs = random_inputs(form, 80, B=1, runs=cu_seqlens and 2)
    offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    for token, value in ((20, torch.nan), (63, torch.inf), (64, torch.nan)):
        x, do = (
            DeltaOperands(*[None if y is None else y.clone() for y in inputs.x[:5]], inputs.x.scale),
            inputs.do.clone(),
        )
        (do if name == "do" else getattr(x, name))[0, token, 1] = value
        changed = replace(inputs, x=x, do=do)
        found = by_steps(changed, cu_seqlens=cu_seqlens)
        for what, expected in by_autograd(recurrent_delta_rule, changed, cu_seqlens=offsets).items():
            assert torch.equal(spoilt(found[what]), spoilt(expected)), (what, token, value)


def test_bf16_inputs_keep_fp32_states():
    inputs = random_inputs("channel", 70).to(torch.bfloat16)
    x = replace(inputs, initial_state=inputs.initial_state.float())
    o, final_state = chunked_delta_rule(
        *x.x[:4], log_decay=x.x.log_decay, scale=x.x.scale, initial_state=x.initial_state
    )
    assert (o.dtype, final_state.dtype) == (torch.bfloat16, torch.float32)
    expected = by_autograd(recurrent_delta_rule, x.to(torch.float64))
    assert_close({"final_state": final_state}, {"final_state": expected["final_state"]}, 1e-6)
    assert_close({"o": o}, {"o": expected["o"]}, 4e-3)


@EVERY_FORM
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("segment_length", [64, 128])
def test_bits_of_a_run_do_not_depend_on_what_is_packed_beside(form, groups, segment_length):
    bounds = [0, 1, 1, 150, 450, 459, 459]
    inputs = random_inputs(form, 459, B=1, groups=groups, K=16, V=24, runs=6).to(torch.float32)
    together = by_steps(inputs, cu_seqlens=bounds, segment_length=segment_length)
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        alone = by_steps(inputs.cut(slice(start, end), slice(n, n + 1)), segment_length=segment_length)
        for name, x in alone.items():
            of_run = together[name][n : n + 1] if "state" in name else together[name][:, start:end]
            assert torch.equal(x, of_run), (name, n)


@EVERY_FORM
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, [0, 130, 330], [0, 330, 330], [0, 0, 330]])
def test_border_maps_fold_to_the_map_of_their_run(form, reverse, cu_seqlens):
    inputs = random_inputs(form, 330, B=1, H=3, runs=None if cu_seqlens is None else 2).to(torch.float32)
    steps = DeltaSteps(inputs.x, cu_seqlens=cu_seqlens, segment_length=64)
    maps = steps.local_maps(inputs.x)
    if reverse:
        maps = steps.gradient_maps(inputs.x, inputs.do, maps.transition)
    state, transition = steps.run_map(maps, reverse=reverse)
    run = 0 if reverse else len(state) - 1
    folded = steps.zero_state()[:1]
    through = torch.eye(folded.shape[-2]).expand(1, 3, -1, -1)
    border_state, border_transition = steps.border_maps(maps, reverse=reverse)
    assert border_state.shape[1:] == folded.shape
    for local_state, matrix in zip(border_state, border_transition):
        folded, through = transform(matrix, folded) + local_state, transform(matrix, through)
    assert torch.equal(folded, state[run : run + 1])
    assert torch.equal(through, transition[run : run + 1])
    entering = inputs.initial_state
    _, end = steps.scan(maps, entering, reverse=reverse)
    torch.testing.assert_close(end, transition @ entering + state, rtol=1e-4, atol=1e-5)


def test_border_of_an_empty_run_has_no_maps():
    inputs = random_inputs("token", 70, B=1, runs=2)
    steps = DeltaSteps(inputs.x, cu_seqlens=[0, 70, 70])
    state, transition = steps.border_maps(steps.local_maps(inputs.x))
    assert state.shape == (0, 1, 2, 8, 6)
    assert transition.shape == (0, 1, 2, 8, 8)


@EVERY_FORM
def test_transitions_are_the_gradients_transposed(form):
    """Through a segment, the gradient of the state before it is transition^T times that behind it."""
    inputs = random_inputs(form, 100)
    x = inputs.x._replace(v=torch.zeros_like(inputs.x.v))
    steps = DeltaSteps(x, segment_length=128)
    transition = steps.local_maps(x).transition[0]
    final_state = by_autograd(recurrent_delta_rule, replace(inputs, x=x, do=torch.zeros_like(inputs.do)))
    torch.testing.assert_close(final_state["final_state"], transition @ inputs.initial_state)
    torch.testing.assert_close(final_state["dinitial_state"], transition.mT @ inputs.d_final_state)


def test_transform_is_a_product_whose_bits_depend_on_nothing_beside():
    draw = torch.Generator().manual_seed(0)
    matrix, state = torch.randn(5, 3, 19, 19, generator=draw), torch.randn(5, 3, 19, 37, generator=draw)
    out = transform(matrix, state)
    torch.testing.assert_close(out, matrix @ state, rtol=1e-5, atol=1e-5)
    for head in range(3):
        assert torch.equal(out[1:2, head], transform(matrix[1:2, head], state[1:2, head]))
    for columns in (slice(0, 1), slice(36, 37), slice(5, 30)):
        assert torch.equal(out[..., columns], transform(matrix, state[..., columns].contiguous()))
    transposed = transform(matrix.mT.contiguous().mT, state)
    assert torch.equal(out, transposed)


def test_segment_length_is_what_was_given_whatever_the_tokens():
    x = random_inputs("none", 100, B=1).x
    assert DeltaSteps(x, segment_length=1024).segment_length == 1024
    assert DeltaSteps(x, segment_length=64).states_shape == (2, 1, 2, 8, 6)
    assert DeltaSteps(x, cu_seqlens=[0, 65, 65, 66, 100], segment_length=64).states_shape == (4, 1, 2, 8, 6)


@EVERY_FORM
@pytest.mark.parametrize("cu_seqlens", [None, [0, 1, 1, 150, 200]])
def test_steps_ask_for_no_value_of_the_device(form, cu_seqlens):
    """Tensors without values have all shapes and the device; a step that looked at a value would fail."""
    inputs = random_inputs(form, 200, B=1, groups=2, runs=None if cu_seqlens is None else 4)
    expected = by_steps(inputs, cu_seqlens=cu_seqlens)
    for name, x in by_steps(inputs.to("meta"), cu_seqlens=cu_seqlens).items():
        assert (x.shape, x.dtype, x.device.type) == (expected[name].shape, torch.float64, "meta")


def test_scan_without_a_state_starts_from_zero():
    x = random_inputs("token", 150, B=1).x
    steps = DeltaSteps(x, segment_length=64)
    maps = steps.local_maps(x)
    for reverse in (False, True):
        got, expected = steps.scan(maps, None, reverse=reverse), steps.scan(maps, steps.zero_state(), reverse=reverse)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_maps_hold_one_matrix_a_segment():
    x = random_inputs("channel", 150).x
    maps = DeltaSteps(x, segment_length=64).local_maps(x)
    assert isinstance(maps, DeltaMaps)
    assert maps.state.shape == (3, 2, 2, 8, 6)
    assert maps.transition.shape == (3, 2, 2, 8, 8)


B, T, H, K, V = 1, 5, 2, 3, 4
GOOD = {
    "q": torch.zeros(B, T, H, K),
    "k": torch.zeros(B, T, H, K),
    "v": torch.zeros(B, T, 2 * H, V),
    "beta": torch.zeros(B, T, 2 * H),
    "log_decay": torch.zeros(B, T, 2 * H),
}


def test_the_arguments_that_the_others_change_are_good():
    check_delta_inputs(**GOOD)
    check_delta_inputs(**{**GOOD, "log_decay": torch.full((B, T, 2 * H, K), -1e4)}, segment_length=128)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, r"q must be a floating-point tensor, got \[1.0\]"),
        ({"k": torch.zeros(B, T, H, K).int()}, TypeError, "k must be a floating-point tensor, got torch.int32"),
        ({"v": torch.zeros(B, T, V)}, ValueError, r"v must have shape \[B, T, H, dim\], got \(1, 5, 4\)"),
        ({"v": torch.zeros(B, T, H, V).half()}, TypeError, "one dtype, got q torch.float32 and v torch.float16"),
        ({"v": torch.zeros(B, T, H, V, device="meta")}, ValueError, "v must be on the device of q, cpu, got meta"),
        ({"q": torch.zeros(B, T, H, K + 1)}, ValueError, r"q and k must have one shape .*\(1, 5, 2, 4\)"),
        ({"q": torch.zeros(B, T, 2 * H, K)}, ValueError, r"q and k must have one shape .*\(1, 5, 4, 3\)"),
        ({"v": torch.zeros(B, T + 1, H, V)}, ValueError, r"k and v must agree in \[B, T\], .*v \(1, 6, 2, 4\)"),
        ({"v": torch.zeros(B, T, 3, V)}, ValueError, "v must have a multiple of the heads of k, got 3 and 2"),
        ({"v": torch.zeros(B, T, 0, V)}, ValueError, "v must have a multiple of the heads of k, got 0 and 2"),
        ({"beta": 1.0}, TypeError, "beta must be a floating-point tensor, got 1.0"),
        (
            {"beta": torch.zeros(B, T, H)},
            ValueError,
            r"beta must have shape \[B, T, H\] = \(1, 5, 4\), got \(1, 5, 2\)",
        ),
        ({"beta": torch.zeros(B, T, 2 * H, device="meta")}, ValueError, "beta must be on the device of q"),
        ({"log_decay": torch.zeros(2 * H)}, ValueError, r"log_decay must have shape .* got \(4,\)"),
        ({"log_decay": torch.zeros(B, T, 2 * H, V)}, ValueError, r"log_decay must have shape .* got \(1, 5, 4, 4\)"),
        ({"log_decay": torch.ones(B, T, 2 * H)}, ValueError, "finite and <= 0, got values from 1.0 to 1.0"),
        ({"log_decay": torch.full((B, T, 2 * H), -torch.inf)}, ValueError, "finite and <= 0, got values from -inf"),
        ({"log_decay": torch.full((B, T, 2 * H), torch.nan)}, ValueError, "finite and <= 0, got values from nan"),
        ({"segment_length": 0}, ValueError, "segment_length must be a positive multiple of 64, got 0"),
        ({"segment_length": 100}, ValueError, "segment_length must be a positive multiple of 64, got 100"),
    ],
)
def test_wrong_inputs(changed, error, message):
    with pytest.raises(error, match=message):
        check_delta_inputs(**{**GOOD, **changed})


@pytest.mark.parametrize("bounds", [[], [1, 5], [0, 4], [0, 6], [0, 3, 2, 5]])
def test_wrong_cu_seqlens(bounds):
    with pytest.raises(ValueError, match=r"cu_seqlens must go from 0 to T = 5 in steps >= 0, got \["):
        DeltaSteps(DeltaOperands(**GOOD), cu_seqlens=bounds)


def test_packed_inputs_have_one_row():
    x = random_inputs("none", 5, B=2).x
    with pytest.raises(ValueError, match="cu_seqlens needs inputs with B = 1, got B = 2"):
        DeltaSteps(x, cu_seqlens=[0, 5])


def test_wrong_initial_state():
    x = dict(GOOD)
    with pytest.raises(ValueError, match=r"initial_state must have shape .* = \(1, 4, 3, 4\), got \(1, 4, 4, 3\)"):
        chunked_delta_rule(x["q"], x["k"], x["v"], x["beta"], initial_state=torch.zeros(1, 4, 4, 3))
