"""The Triton kernels of a decay per channel against the fp64 recurrence: on a GPU, else under Triton's interpreter."""

import math
from dataclasses import replace
from types import SimpleNamespace

import interpreter
import pytest
import torch
from inputs import assert_digits, every_strength, gradients, oracle, random_inputs, run
from steps import backward_steps, forward_steps, operands
from test_kernels import DEVICE, assert_near, on_device

import lasp
from lasp_kernels import Operands, chunked_linear_attention, fold, path, plan, steps_of
from lasp_kernels.channel_steps import ChannelSteps

CUDA = interpreter.CUDA
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}  # relative, of the whole tensor


@pytest.fixture(autouse=True)
def tile(request, monkeypatch):
    """Tokens of a tile, whatever the dtype. The interpreter's time goes by what it does one by one: few and short."""
    tile = getattr(request, "param", 16)
    if not CUDA:
        for name in ("walk", *(name for name in plan.CONFIGS if name.startswith("channel "))):
            configs = tuple(config._replace(tile=tile) for config in plan.CONFIGS[name])
            monkeypatch.setitem(plan.CONFIGS, name, configs)
    interpreter.forget_plans()
    yield tile
    interpreter.forget_plans()


def channel_inputs(kind, T, *, strength=1.0, **options):
    """`even`: up to `strength`. `mixed`: from -1e-4 to -50 a token and channel; `channels`: as much, but each channel
    its own; `resets`: of -1000 among weak decays."""
    x = random_inputs("channel", T, **options)
    if kind == "even":
        return replace(x, log_decay=x.log_decay * strength)
    if kind == "resets":
        return replace(x, log_decay=torch.where(x.log_decay > -0.05, -1000.0, -0.01).double())
    power = -x.log_decay
    if kind == "channels":
        power = torch.linspace(0, 1, power.shape[-1], dtype=power.dtype).expand_as(power)
    return replace(x, log_decay=-(10 ** (power * (math.log10(50) + 4) - 4)))


def channel_steps(x, **options):
    return ChannelSteps.of(operands(x), **{"decay_gradient": True, **options})


def all_steps(x, scale, **options):
    """What `oracle` returns, by the steps in the order in which `lasp.linear_attention` calls them."""
    steps = channel_steps(x, **options)
    states, final_state, o = forward_steps(steps, x, scale, x.initial_state)
    return o, final_state, backward_steps(steps, x, states, scale, decay_gradient=steps.plan.sizes.decay_gradient)


def check(x, *, scale=0.7, dtype=torch.float32, cu_seqlens=None, tolerance=None, decay_tolerance=None, **options):
    """All results against the oracle on the same inputs, rounded to their dtype."""
    tolerance = tolerance or TOLERANCE[dtype]
    x = on_device(x, dtype)
    rounded = replace(x, **{name: t.detach().double().cpu() for name, t in vars(x).items() if t is not None})
    o, final_state, expected = oracle(rounded, cu_seqlens=cu_seqlens, scale=scale)
    actual_o, actual_state, found = all_steps(x, scale, cu_seqlens=cu_seqlens, **options)
    assert actual_o.dtype == found["q"].dtype == found["k"].dtype == found["v"].dtype == dtype
    assert_near(actual_o, o, "o", tolerance)
    assert_near(actual_state, final_state, "final_state", tolerance)
    for name, gradient in found.items():
        if name in expected:
            bound = decay_tolerance if decay_tolerance and name == "log_decay" else tolerance
            assert_near(gradient, expected[name], f"d{name}", bound)
    return found


@pytest.mark.parametrize("T", [0, 1, 63, 65, 130])
def test_ragged_lengths(T):
    x = channel_inputs("even", T, H=1, K=13, V=5)
    x.log_decay[:1, -3:] = -70.0
    check(x, segment_length=64 if T == 65 else 128)


@pytest.mark.parametrize("kind", ["mixed", "channels", "resets"])
def test_decays_of_all_strengths(kind):
    x = channel_inputs(kind, 70, B=1, H=1, K=16, V=16)
    assert x.log_decay.amax() > -0.02
    assert x.log_decay.amin() < -30
    check(x, segment_length=64)


@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 80), (80, 17), (80, 80), (3, 16), (1, 5), (130, 48), (16, 200)])
def test_head_dims(K, V):
    """Several blocks of rows, of columns and of channels, and narrower ones than a product has."""
    x = channel_inputs("even", 20, B=1, H=1, K=K, V=V)
    x.log_decay[:, 17:19] = -40.0  # in one tile of two
    check(x, segment_length=64)


@pytest.mark.parametrize("tile", [64], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_64_tokens(tile, dtype):
    """Of the second some half decays by more than exp(-60): there is more than one block in a tile."""
    x = channel_inputs("even", 130, B=1, H=1, K=16, V=16, strength=0.5)
    x.log_decay[:, 70:90] *= 30
    check(x, dtype=dtype, segment_length=128)


def test_the_strength_from_which_a_tile_is_flagged():
    """Decays just below and just above, in the first half and in the second."""
    x = channel_inputs("even", 64, B=1, H=4, K=16, V=16, strength=0.01)
    for head, (first, half) in enumerate(((0, 59.0), (0, 61.0), (8, 59.0), (8, 61.0))):
        x.log_decay[:, 16 + first : 24 + first, head, 3] = -half / 8
    check(x)
    steps = channel_steps(x := on_device(x, torch.float32))
    steps.local_maps(operands(x))
    if not CUDA:
        flagged = steps._made.flag.nonzero().tolist()
        assert flagged == [[0, 1, 1], [0, 3, 1]]  # batch, head, tile


@pytest.mark.parametrize("half", [45.0, 59.0])
def test_a_state_survives_between_tiles_that_are_not_flagged(half):
    """Two halves beside each other decay by more than fp32 holds, and what the one leaves reaches the other.

    Exponents up to 60 are exact to 4e-6; the gradient of a decay is a difference of numbers of order 1, and here as
    small as one token's decay.
    """
    x = channel_inputs("even", 70, B=1, H=1, K=16, V=16)
    x = replace(x, log_decay=torch.full_like(x.log_decay, -half / 8))
    check(x, segment_length=64, tolerance=8e-6, decay_tolerance=6e-7 * math.exp(half / 8))


def test_weak_decays_behind_strong_ones():
    """Every one keeps its digits, but those that are in sums with up to exp(-60): they are sums of 60 +- 4e-6."""
    x = every_strength("channel", 48)
    few = [0, 3, 6, 7, 8, 9]  # heads
    x = replace(x, **{name: t[:, few] if "state" in name else t[:, :, few] for name, t in vars(x).items()})
    x = on_device(x, torch.float32)
    exact = replace(x, **{name: t.double().cpu() for name, t in vars(x).items()})
    o, final_state, expected = oracle(exact)
    actual_o, actual_state, found = all_steps(x, 1.0, segment_length=64)
    assert_digits({"log_decay": found.pop("log_decay")}, {"log_decay": expected.pop("log_decay")}, 8e-6)
    assert_digits({"o": actual_o, "final_state": actual_state, **found},
                  {"o": o, "final_state": final_state, **expected}, 8e-6)  # fmt: skip


def test_low_precision():
    """In the dims that dk and dv share one kernel for, and in others."""
    check(channel_inputs("even", 70, B=1, H=1, K=72, V=72, strength=0.2), dtype=torch.bfloat16, segment_length=64)
    check(channel_inputs("mixed", 40, B=1, H=1, K=16, V=130), dtype=torch.bfloat16, segment_length=64)


@pytest.mark.parametrize("cu_seqlens", [(0, 0, 1, 6, 71, 71, 100), (0, 64, 90)])
def test_packed(cu_seqlens):
    """Sequences begin anywhere, and their tiles with them."""
    x = channel_inputs("even", cu_seqlens[-1], B=1, H=1, K=16, V=16, sequences=len(cu_seqlens) - 1)
    x.log_decay[:, [5, 63, 70, 89]] = -70.0
    check(x, cu_seqlens=cu_seqlens, segment_length=64)


def test_packed_all_empty():
    x = on_device(channel_inputs("even", 0, B=1, K=16, V=16, sequences=2), torch.float32)
    o, final_state, found = all_steps(x, 1.0, cu_seqlens=(0, 0, 0))
    assert torch.equal(final_state, x.initial_state)
    assert (o.shape, found["log_decay"].shape) == (x.v.shape, x.k.shape)


@pytest.mark.parametrize(("K", "V"), [(16, 16), (16, 32)])
def test_without_a_gradient_of_the_decay(K, V):
    """dq and dk are then finished one by one: the same numbers."""
    x = channel_inputs("even", 70, B=1, H=1, K=K, V=V)
    x.log_decay[:, [5, 63]] = -70.0
    found = check(x, segment_length=64, decay_gradient=False)
    whole = check(x, segment_length=64)
    assert set(whole) - set(found) == {"log_decay"}
    assert all(torch.equal(found[name], whole[name]) for name in found)
    x = on_device(x, torch.float32)
    with pytest.raises(ValueError, match="asked for"):
        channel_steps(x, decay_gradient=False).decay_gradient(operands(x), (x.do, x.q, x.k), x.q, x.q)


def test_views_of_a_fused_projection():
    """q, k, v and log_decay as parts of wider tensors, log_decay as [B, H, T, K] too, do with stride 0."""
    x = on_device(channel_inputs("even", 40, B=1, K=16, V=16), torch.float32)
    q, k, v = torch.cat([x.q, x.k, x.v], -1).split(16, -1)
    wide = torch.cat([x.log_decay, x.log_decay], -1)[..., 16:]
    turned = x.log_decay.transpose(1, 2).contiguous().transpose(1, 2)
    last = x.log_decay.mT.contiguous().mT  # whose channels lie apart
    do = torch.ones((), device=DEVICE).expand(v.shape)
    expected = all_steps(replace(x, do=do.contiguous()), 1.0, segment_length=64)
    for log_decay in (wide, turned, last):
        o, _, found = all_steps(replace(x, q=q, k=k, v=v, log_decay=log_decay, do=do), 1.0, segment_length=64)
        assert_near(o, expected[0].double().cpu(), "o", 1e-6)
        for name, gradient in expected[2].items():
            assert_near(found[name], gradient.double().cpu(), name, 1e-6)


def test_backward_twice():
    """The states that forward keeps are as they were after a backward (retain_graph), and the bits are the same."""
    x = on_device(channel_inputs("even", 100, B=1, K=16, V=16), torch.float32)
    steps = channel_steps(x, segment_length=64)
    states, _ = steps.scan(steps.local_maps(operands(x)), x.initial_state)
    first, second = (backward_steps(steps, x, states) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert steps._made is None  # nothing is kept between passes


@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 70, 150)])
@pytest.mark.parametrize("reverse", [False, True])
def test_maps(cu_seqlens, reverse):
    """The map of a run is that of the scan; those of its segments have the bits of the scan when they are folded."""
    sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    x = on_device(channel_inputs("even", 150, B=1, K=16, V=32, sequences=sequences, strength=0.1), torch.float32)
    steps = channel_steps(x, cu_seqlens=cu_seqlens, segment_length=64)
    if reverse:
        maps, entering = steps.gradient_maps(operands(x), x.do), x.d_final_state
    else:
        maps, entering = steps.local_maps(operands(x)), x.initial_state
    local_state, log_total = steps.run_map(maps, reverse=reverse)
    states, end = steps.scan(maps, entering, reverse=reverse)
    assert log_total.shape == entering.shape[:3]
    assert states.shape == steps.states_shape
    through = log_total.exp().unsqueeze(-1) * entering + local_state
    torch.testing.assert_close(through, end, rtol=1e-5, atol=1e-5)
    of_border = slice(None) if cu_seqlens is None else slice(0, 1) if reverse else slice(-1, None)
    folded = fold(entering[of_border], *steps.border_maps(maps, reverse=reverse))
    assert torch.equal(folded, end[of_border])


def test_the_last_tokens_alone():
    x = on_device(channel_inputs("even", 100, K=16, V=32, strength=0.1), torch.float32)
    ending = channel_steps(x).of_end(70)
    last = replace(x, **{name: getattr(x, name)[:, -70:] for name in ("k", "v", "log_decay")})
    state, log_decay = ending.run_map(ending.local_maps(operands(last)))
    _, expected = chunked_linear_attention(last.k, last.k, last.v, log_decay=last.log_decay)
    assert_near(state, expected.double().cpu(), "state", 3e-6)
    assert_near(log_decay, last.log_decay.sum(1).double().cpu(), "log_decay", 1e-6)


@pytest.mark.parametrize("form", ["grouped queries", "grouped values"])
def test_heads_that_share(monkeypatch, form):
    """The kernels take one number of heads; the operator gives it to them, and states stay those of heads."""
    monkeypatch.setenv("LASP_KERNELS", "triton")
    x = random_inputs("channel", 40, B=1, H=2, K=8, V=5, groups=2)
    if form == "grouped values":
        x = random_inputs("channel", 40, B=1, H=4, K=8, V=5)
        x = replace(x, q=x.q[:, :, :2], k=x.k[:, :, :2])
    expected = []
    for dtype, kernels in ((torch.float64, "reference"), (torch.float32, "triton")):
        monkeypatch.setenv("LASP_KERNELS", kernels)
        leaves = on_device(x, dtype) if kernels == "triton" else x.to(dtype)
        leaves.require_grad()
        found = run(lasp.linear_attention, leaves, output_final_state=True)
        expected.append([*found, *gradients(leaves, *found).values()])
    for exact, actual in zip(*expected):
        assert actual.shape == exact.shape
        assert_near(actual, exact.detach(), "heads", TOLERANCE[torch.float32])


def test_errors_of_heads_that_share_name_what_was_given(monkeypatch):
    """Not what the kernels would be given."""
    monkeypatch.setenv("LASP_KERNELS", "triton")
    x = random_inputs("channel", 40, B=1, H=2, K=8, V=5, groups=2)
    call = {"q": x.q, "k": x.k, "v": x.v, "log_decay": x.log_decay}
    for wrong, error, said in (
        ({"initial_state": torch.zeros(1, 4, 8, 5)}, ValueError, r"= \(1, 2, 8, 5\), got \(1, 4, 8, 5\)"),
        ({"initial_state": [0.0]}, TypeError, r"initial_state must be a .*tensor, got \[0\.0\]"),
        ({"k": torch.cat([x.k, x.k])}, ValueError, r"got k \(2, 40, 2, 8\) and v \(1, 40, 2, 5\)"),
        ({"k": x.k[..., :5]}, ValueError, r"got q \(1, 40, 4, 8\) and k \(1, 40, 2, 5\)"),
    ):
        with pytest.raises(error, match=said):
            lasp.linear_attention(**{**call, **wrong})


@pytest.mark.parametrize("later", ["given", "a function", "the same as k"])
@pytest.mark.parametrize("under_autocast", [False, True])
def test_the_operator(monkeypatch, later, under_autocast):
    """A q that is made later has k for a stand-in, or a copy of it; and q may be k itself."""
    monkeypatch.setenv("LASP_KERNELS", "triton")
    x = channel_inputs("even", 40, B=1, K=8, V=5)
    x = replace(x, q=x.k) if later == "the same as k" else x
    dtype = torch.bfloat16 if under_autocast else torch.float32
    rounded = on_device(x, dtype)
    o, final_state, expected = oracle(replace(rounded, **{n: t.double().cpu() for n, t in vars(rounded).items()}))
    x = on_device(x, torch.float32)
    x = replace(x, q=x.k) if later == "the same as k" else x
    x.require_grad()
    call = replace(x, q=(lambda: x.q)) if later == "a function" else x
    with torch.autocast(DEVICE, torch.bfloat16, enabled=under_autocast):
        found = run(lasp.linear_attention, call, output_final_state=True)
    for actual, wanted, what in zip(found, (o, final_state), ("o", "final_state")):
        assert_near(actual, wanted, what, TOLERANCE[dtype])
    if later == "the same as k":
        expected["k"] = expected["k"] + expected.pop("q")
        x = replace(x, q=x.q.detach())
    for name, gradient in gradients(x, *found).items():
        assert_near(gradient, expected[name], f"d{name}", TOLERANCE[dtype])


def test_q_of_a_rank_that_makes_it_while_the_state_travels():
    """Its maps are made without it, and with the same bits."""
    x = on_device(channel_inputs("even", 70, K=16, V=16), torch.float32)
    x.log_decay[:, 5] = -70.0
    whole, _, o = forward_steps(channel_steps(x), x, 1.0, x.initial_state)
    steps, stand_in = channel_steps(x), operands(x)._replace(q=x.k)
    states, _ = steps.scan(steps.local_maps(stand_in), x.initial_state)
    assert steps._made.qt is None
    assert torch.equal(states, whole)
    assert torch.equal(steps.outputs(operands(x), states)[0], o)


@pytest.mark.parametrize("groups", [1, 2])
def test_compiled(monkeypatch, groups):
    """Heads that share, too: the graph has the kernels as the call without it has."""
    monkeypatch.setenv("LASP_KERNELS", "triton")

    def f(q, k, v, log_decay):
        return lasp.linear_attention(q, k, v, log_decay=log_decay)[0]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    for T in (40, 55):
        x = on_device(random_inputs("channel", T, B=1, H=1, K=8, V=8, state=False, groups=groups), torch.float32)
        found = []
        for function in (f, compiled):
            leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.log_decay)]
            o = function(*leaves)
            found.append([o.detach(), *torch.autograd.grad(o, leaves, x.do)])
        for eager, other in zip(*found):
            assert torch.equal(eager, other), T


UNSUPPORTED = {
    "fp64": ({}, torch.float64, "float64"),
    "fp16": ({}, torch.float16, "float16"),
    "grouped": ({"groups": 2}, torch.float32, "a query head for each head of k, got 4 and 2"),
    "wide K": ({"K": 257}, torch.float32, "K = 257"),
    "wide V": ({"V": 257}, torch.bfloat16, "V = 257"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_is_an_error_where_the_kernels_are_asked_for(monkeypatch, case):
    options, dtype, match = UNSUPPORTED[case]
    x = random_inputs("channel", 4, **{"K": 16, "V": 16, **options}).to(dtype)
    monkeypatch.setenv("LASP_KERNELS", "triton")
    with pytest.raises(ValueError, match=match):
        steps_of(operands(x)._replace(log_decay=x.log_decay.float()))


def on_cuda(x):
    """What `path` looks at, as if it were there."""
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda"), shape=x.shape, ndim=x.ndim, dtype=x.dtype)


@pytest.mark.parametrize("case", [*UNSUPPORTED, "bf16", "fp32", "on a CPU"])
def test_path(monkeypatch, case):
    """Of a GPU the kernels where they serve, else PyTorch, and it says so."""
    monkeypatch.delenv("LASP_KERNELS", raising=False)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "on a CPU": torch.float32}
    options, dtype, _ = UNSUPPORTED[case] if case in UNSUPPORTED else ({}, dtypes[case], "")
    x = operands(random_inputs("channel", 4, **{"K": 16, "V": 16, **options}).to(dtype))
    there = [t if case == "on a CPU" else on_cuda(t) for t in x[:4]]
    assert path(Operands(*there)) == ("triton" if case in ("bf16", "fp32") else "reference")
    monkeypatch.setenv("LASP_KERNELS", "reference")
    assert path(Operands(*there)) == "reference"


def test_kernels_on_a_cpu_without_the_interpreter(monkeypatch):
    x = operands(random_inputs("channel", 4, K=16, V=16).to(torch.float32))
    monkeypatch.setenv("LASP_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"LASP_KERNELS must be .* for tensors on a CPU, got 'triton'"):
        path(x)


def test_steps_of_the_path(monkeypatch):
    x = operands(channel_inputs("even", 4, K=16, V=16).to(torch.float32))
    monkeypatch.setenv("LASP_KERNELS", "triton")
    assert isinstance(steps_of(x), ChannelSteps)
    monkeypatch.setenv("LASP_KERNELS", "reference")
    assert not isinstance(steps_of(x), ChannelSteps)


def test_segments_are_short_where_the_decay_has_a_gradient():
    """Whose rounding noise grows with them; where it has none, they fill the card once."""
    sizes = plan.Sizes(1, 131072, 16, 1, 128, 128, 2, plan.CHANNEL_DECAY, 2048, 132, True, ends=True)
    short, long = (plan.Plan.of(sizes._replace(decay_gradient=needed)) for needed in (True, False))
    assert 1024 <= short.segment_length <= 2048 < long.segment_length
    assert short.pieces == long.pieces == 1


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("kind", ["even", "mixed", "channels", "resets"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (64, 64), (80, 96), (256, 256), (128, 256)])
def test_full_size(kind, dtype, K, V):
    """Thousands of tokens and the segments that the card is given, against the chunked fp64 computation."""
    x = on_device(channel_inputs(kind, 3000, K=K, V=V, H=2, strength=0.2), dtype)
    exact = replace(x, **{name: t.detach().double() for name, t in vars(x).items() if t is not None})
    exact.require_grad()
    o, final_state = run(chunked_linear_attention, exact, scale=0.1)
    expected = gradients(exact, o, final_state)
    actual_o, actual_state, found = all_steps(x, 0.1)
    bound = 2e-5 if dtype == torch.float32 else TOLERANCE[dtype]
    assert_near(actual_o, o.detach().cpu(), "o", bound)
    assert_near(actual_state, final_state.detach().cpu(), "final_state", bound)
    for name, gradient in found.items():
        assert_near(gradient, expected[name].cpu(), f"d{name}", 4 * bound if name == "log_decay" else bound)
