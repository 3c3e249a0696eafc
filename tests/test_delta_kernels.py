"""The Triton kernels of the delta rule against the fp64 recurrence: on a GPU, else under Triton's interpreter."""

from types import SimpleNamespace

import interpreter
import pytest
import torch
import torch.nn.functional as F

import lasp
from lasp_kernels import delta_steps_of, fold, path, plan
from lasp_kernels.delta import DeltaOperands, recurrent_delta_rule
from lasp_kernels.delta_kernel_steps import DeltaKernelSteps
from lasp_kernels.delta_steps import DeltaSteps, chunked_delta_rule

CUDA = interpreter.CUDA
DEVICE = "cuda" if CUDA else "cpu"
# tiles: as channel, with the gradients tile by tile whatever the dtype and the head dims (see the fixture).
FORMS = ("none", "token", "channel", "tiles")
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}  # relative, of the whole tensor
TILES = ("walk", "delta walk", "delta gradient", "delta prepare", "delta inner", "delta channel gradient")
TILES += ("delta tile gradient",)


@pytest.fixture(autouse=True)
def tile(request, monkeypatch):
    """Tokens of a tile, whatever the dtype, and the path. The interpreter's time goes by what it does one by one."""
    tile = getattr(request, "param", 16)
    monkeypatch.setenv("LASP_KERNELS", "triton")
    if not CUDA:
        for name in TILES:
            monkeypatch.setitem(plan.CONFIGS, name, tuple(c._replace(tile=tile) for c in plan.CONFIGS[name]))
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("form") == "tiles":
        monkeypatch.setattr("lasp_kernels.delta_kernel_steps.by_tiles", lambda key: key.sizes.has_tma)
    interpreter.forget_plans()
    yield tile
    interpreter.forget_plans()


def delta_inputs(form, T, *, B=1, heads=1, groups=1, K=16, V=16, sequences=None, strength=1.0, dtype=torch.float32):
    """By name, then do and the gradient of the final state. Some tokens write nothing."""
    draw = torch.Generator().manual_seed(T)
    H, N = heads * groups, sequences or B

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    q, k, v, do = normal(B, T, heads, K), normal(B, T, heads, K), normal(B, T, H, V), normal(B, T, H, V)
    beta = 2 * torch.rand(B, T, H, generator=draw, dtype=torch.float64)
    beta[:, 3::7] = 0
    shape = {"none": None, "token": (B, T, H), "channel": (B, T, H, K), "tiles": (B, T, H, K)}[form]
    decay = None if shape is None else -2 * strength * torch.rand(shape, generator=draw, dtype=torch.float64) ** 3
    x = {"q": q, "k": F.normalize(k, dim=-1), "v": v, "beta": beta, "log_decay": decay}
    state, d_final = normal(N, H, K, V), normal(N, H, K, V)
    x = {name: t if t is None else t.to(dtype if name in "qkv" else torch.float32) for name, t in x.items()}
    x["initial_state"] = state.float()
    x = {name: t if t is None else t.to(DEVICE) for name, t in x.items()}
    return x, do.to(dtype).to(DEVICE), d_final.float().to(DEVICE)


def given(x):
    return {name: t for name, t in x.items() if t is not None}


def results(function, x, do, d_final, **options):
    """o, the final state and all gradients."""
    x = {name: t if t is None else t.detach().clone().requires_grad_() for name, t in x.items()}
    arguments = {name: x[name] for name in ("log_decay", "initial_state")}
    o, final = function(x["q"], x["k"], x["v"], x["beta"], scale=0.7, **arguments, **options)
    leaves = given(x)
    seeds = (do.to(o.dtype), d_final.to(final.dtype))
    found = torch.autograd.grad((o, final), list(leaves.values()), seeds, allow_unused=True, materialize_grads=True)
    return {"o": o.detach(), "final_state": final.detach(), **dict(zip(leaves, found))}


def by_kernels(x, do, d_final, *, cu_seqlens=None, **options):
    layout = None if cu_seqlens is None else lasp.ShardLayout((x["q"].shape[1],), cu_seqlens)
    return results(lasp.delta_rule, x, do, d_final, output_final_state=True, layout=layout, **options)


def exactly(x, do, d_final, *, cu_seqlens=None, function=recurrent_delta_rule):
    exact = {name: t if t is None else t.double() for name, t in x.items()}
    offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    return results(function, exact, do.double(), d_final.double(), cu_seqlens=offsets)


def relative(actual, expected):
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return (error / size.clamp(min=1e-2)).item()


def check(x, do, d_final, *, cu_seqlens=None, bound=None, **options):
    """All results against the recurrence on the same inputs."""
    found = by_kernels(x, do, d_final, cu_seqlens=cu_seqlens, **options)
    expected = exactly(x, do, d_final, cu_seqlens=cu_seqlens)
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        assert found[name].shape == exact.shape, name
        assert found[name].isfinite().all(), name
        error = relative(found[name], exact)
        assert error < (bound or TOLERANCE[x["q"].dtype]), f"{name}: relative error {error:.1e}"
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("T", "B"), [(0, 2), (1, 2), (65, 1), (100, 1)])
def test_ragged_lengths(form, T, B):
    check(*delta_inputs(form, T, B=B, K=13, V=5), segment_length=64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("K", "V"), [(80, 17), (3, 80), (130, 16), (16, 200)])
def test_head_dims(form, K, V):
    """Several blocks of columns, parts of a matrix, and narrower heads than a product has."""
    check(*delta_inputs(form, 40, K=K, V=V))


@pytest.mark.parametrize("form", FORMS)
def test_grouped_heads(form):
    check(*delta_inputs(form, 40, heads=2, groups=2, V=8))


@pytest.mark.parametrize("tile", [64], indirect=True)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_64_tokens(tile, form, dtype):
    """Of which the blocks of 16 see each other; in bf16 the interpreter cuts digits off, where a GPU rounds."""
    bound = 2e-2 if dtype == torch.bfloat16 else None
    check(*delta_inputs(form, 150, dtype=dtype), segment_length=128, bound=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (64, 128), (128, 64)])
@pytest.mark.parametrize("tma", [True, False])
def test_which_calls_have_gradients_tile_by_tile(monkeypatch, dtype, K, V, tma):
    """bf16 of 128 x 128 on cards with TMA; all others walk. What a step keeps for the gradients tells the two apart."""
    monkeypatch.setattr("lasp_kernels.delta_kernel_steps.has_tma", lambda device: tma)
    x, do, _ = delta_inputs("channel", 20, K=K, V=V, dtype=dtype)
    operands = DeltaOperands(*list(x.values())[:5], 0.7)
    steps = DeltaKernelSteps.of(operands)
    maps = steps.local_maps(operands)
    steps.query_gradient(operands, do, steps.scan(maps, x["initial_state"])[0])
    kept, tiles = steps._written[2], tma and dtype == torch.bfloat16 and K == V
    assert kept.shape[-2:] == ((V, K) if tiles else (K, V))
    assert kept.dtype == (torch.bfloat16 if tiles else torch.float32)


@pytest.mark.parametrize("tile", [64], indirect=True)
def test_gradients_of_128_x_128_in_bf16(tile):
    """As a user's call has them: odd lengths, packed, heads that share one of k; and a tile that is flagged."""
    cu_seqlens = (0, 0, 19, 84)
    x, do, d_final = delta_inputs("channel", 84, groups=2, K=128, V=128, sequences=3, dtype=torch.bfloat16)
    x["log_decay"][:, 60:64, :, ::3] = -60.0
    check(x, do, d_final, cu_seqlens=cu_seqlens, segment_length=64, bound=2e-2)


@pytest.mark.parametrize("tile", [16, 64], indirect=True)
@pytest.mark.parametrize(
    ("form", "kind"),
    [
        *((form, kind) for form in ("token", "channel", "tiles") for kind in ("mixed", "resets")),
        ("channel", "channels"),
        ("tiles", "channels"),
    ],
)
def test_decays_of_all_strengths(tile, form, kind):
    """From -1e-4 to -50 a token; of -1000 among weak ones; and each channel its own."""
    x, do, d_final = delta_inputs(form, 70)
    power = (-x["log_decay"] / 2) ** (1 / 3)
    if kind == "channels":
        power = torch.linspace(0, 1, power.shape[-1], device=DEVICE).expand_as(power)
    x["log_decay"] = -(10 ** (power * 5.7 - 4))
    if kind == "resets":
        x["log_decay"] = torch.where(power > 0.9, -1000.0, -0.01)
    assert x["log_decay"].amin() < -30
    check(x, do, d_final, segment_length=64, bound=1e-5)


@pytest.mark.parametrize("tile", [64], indirect=True)
@pytest.mark.parametrize("form", ["channel", "tiles"])
def test_the_strength_from_which_a_tile_is_flagged(tile, form):
    """Half a block of 16 decays by just less than the limit, or more, in its first half or its second."""
    x, do, d_final = delta_inputs(form, 64, heads=4)
    x["log_decay"] *= 0.01
    for head, (first, half) in enumerate(((0, 41.0), (0, 43.0), (8, 41.0), (8, 43.0))):
        x["log_decay"][:, 16 + first : 24 + first, head, 3] = -half / 8
    check(x, do, d_final, bound=1e-5)
    steps = DeltaKernelSteps.of(operands := DeltaOperands(*list(x.values())[:5], 0.7))
    steps.local_maps(operands)
    assert steps._made.gates.flag[:, :, 0].flatten().tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cu_seqlens", [(0, 0, 1, 6, 71, 71, 100), (0, 64, 90)])
def test_packed(form, cu_seqlens):
    """Sequences begin anywhere, and their tiles with them."""
    x, do, d_final = delta_inputs(form, cu_seqlens[-1], sequences=len(cu_seqlens) - 1)
    check(x, do, d_final, cu_seqlens=cu_seqlens, segment_length=64)


def test_packed_all_empty():
    x, do, d_final = delta_inputs("channel", 0, sequences=2)
    found = by_kernels(x, do, d_final, cu_seqlens=(0, 0, 0))
    assert torch.equal(found["final_state"], x["initial_state"])
    assert torch.equal(found["initial_state"], d_final)


@pytest.mark.parametrize("form", FORMS)
def test_stretches(monkeypatch, form):
    """Several in a segment, of which the last ones are not full."""
    monkeypatch.setattr("lasp_kernels.delta_launches.STRETCH", 32)
    check(*delta_inputs(form, 100), segment_length=64)


def test_repeated_keys():
    """The same key again and again, written in full: the worst that a triangle of a tile can be."""
    x, do, d_final = delta_inputs("none", 70)
    x["k"] = x["k"][:, :1].expand_as(x["k"]).contiguous()
    x["beta"] = torch.full_like(x["beta"], 1.0)
    check(x, do, d_final, segment_length=64)


def test_views_of_a_fused_projection():
    """q, k, v and log_decay as parts of wider tensors, beta and log_decay in other orders, do with stride 0."""
    x, do, d_final = delta_inputs("channel", 20, B=2)
    do = torch.ones((), device=DEVICE).expand_as(do)
    expected = by_kernels(x, do.contiguous(), d_final)
    q, k, v = torch.cat([x["q"], x["k"], x["v"]], -1).split(16, -1)
    wide = torch.cat([x["log_decay"], x["log_decay"]], -1)[..., 16:]
    turned = x["log_decay"].transpose(1, 2).contiguous().transpose(1, 2)
    beta = x["beta"].transpose(0, 2).contiguous().transpose(0, 2)
    for log_decay in (wide, turned, x["log_decay"].mT.contiguous().mT):
        steps = DeltaKernelSteps.of(DeltaOperands(q, k, v, beta, log_decay, 0.7))
        found = all_steps(steps, DeltaOperands(q, k, v, beta, log_decay, 0.7), do, x["initial_state"], d_final)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def all_steps(steps, x, do, entering, d_final):
    """o and the gradients, by the steps in the order in which `lasp.delta_rule` calls them."""
    maps = steps.local_maps(x)
    states, _ = steps.scan(maps, entering)
    found = {"o": steps.outputs(x, states)}
    reverse = steps.gradient_maps(x, do, maps.transition)
    found["q"] = steps.query_gradient(x, do, states)
    d_states, found["initial_state"] = steps.scan(reverse, d_final, reverse=True)
    found["k"], found["v"], found["beta"], decay = steps.gradients(x, do, states, d_states)
    return found if decay is None else {**found, "log_decay": decay}


def test_steps_twice():
    """The same bits again, and nothing is kept between passes."""
    x, do, d_final = delta_inputs("channel", 40)
    operands = DeltaOperands(*list(x.values())[:5], 0.7)
    steps = DeltaKernelSteps.of(operands)
    first, second = (all_steps(steps, operands, do, x["initial_state"], d_final) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (steps._made, steps._written) == (None, None)
    with pytest.raises(ValueError, match="query_gradient"):
        steps.gradients(operands, do, do, do)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 0, 70, 150)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("K", [16, 48])
def test_maps(cu_seqlens, reverse, K):
    """The map of a run is that of the scan; those of its segments have the bits of the scan when they are folded."""
    x, do, d_final = delta_inputs("token", 150, K=K, V=32, sequences=cu_seqlens and len(cu_seqlens) - 1, strength=0.1)
    operands = DeltaOperands(*list(x.values())[:5], 0.7)
    steps = DeltaKernelSteps.of(operands, cu_seqlens=cu_seqlens, segment_length=64)
    maps, entering = steps.local_maps(operands), x["initial_state"]
    if reverse:
        maps, entering = steps.gradient_maps(operands, do, maps.transition), d_final
    state, transition = steps.run_map(maps, reverse=reverse)
    states, end = steps.scan(maps, entering, reverse=reverse)
    assert (states.shape, maps.transition.shape) == (steps.states_shape, steps.transitions_shape)
    torch.testing.assert_close(transition @ entering + state, end, rtol=1e-5, atol=1e-5)
    of_border = slice(None) if cu_seqlens is None else slice(0, 1) if reverse else slice(-1, None)
    local, matrices = steps.border_maps(maps, reverse=reverse)
    assert torch.equal(fold(entering[of_border], local, matrices), end[of_border])
    columns = slice(8, 24)  # as the schedule that sends a state in blocks of them does
    assert torch.equal(
        fold(entering[of_border][..., columns], local[..., columns], matrices), end[of_border][..., columns]
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_sequence_that_is_continued_has_the_bits_of_the_whole(form):
    x, *_ = delta_inputs(form, 150, V=32)

    def run(tokens, state):
        cut = {name: t if t is None else t[:, tokens] for name, t in x.items() if name != "initial_state"}
        return lasp.delta_rule(**cut, initial_state=state, output_final_state=True, segment_length=64)

    o, final = run(slice(None), x["initial_state"])
    first, state = run(slice(64), x["initial_state"])
    second, end = run(slice(64, None), state)
    assert torch.equal(o, torch.cat([first, second], 1))
    assert torch.equal(final, end)


@pytest.mark.parametrize("form", FORMS)
def test_compiled(form):
    x, do, _ = delta_inputs(form, 40, K=8, V=8)
    inputs = [t for name, t in x.items() if t is not None and name != "initial_state"]

    def f(q, k, v, beta, log_decay=None):
        return lasp.delta_rule(q, k, v, beta, log_decay=log_decay)[0]

    found = []
    for function in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        o = function(*leaves)
        found.append([o.detach(), *torch.autograd.grad(o, leaves, do)])
    for eager, compiled in zip(*found):
        assert torch.equal(eager, compiled)


def test_autocast():
    x, do, d_final = delta_inputs("token", 40)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = by_kernels(x, do, d_final)
    expected = exactly(x, do, d_final)
    assert found["o"].dtype == torch.bfloat16
    assert all(relative(found[name], expected[name]) < 2e-2 for name in expected)


UNSUPPORTED = {
    "fp64": ({}, torch.float64, "float64"),
    "fp16": ({}, torch.float16, "float16"),
    "wide K": ({"K": 257}, torch.float32, "K = 257"),
    "wide V": ({"V": 257}, torch.bfloat16, "V = 257"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_is_an_error_where_the_kernels_are_asked_for(case):
    options, dtype, match = UNSUPPORTED[case]
    x, *_ = delta_inputs("token", 4, dtype=dtype, **options)
    with pytest.raises(ValueError, match=match):
        lasp.delta_rule(x["q"], x["k"], x["v"], x["beta"])


def on_cuda(x):
    """What `path` looks at, as if it were there."""
    return (
        None
        if x is None
        else SimpleNamespace(is_cuda=True, device=torch.device("cuda"), shape=x.shape, ndim=x.ndim, dtype=x.dtype)
    )


@pytest.mark.parametrize("case", [*UNSUPPORTED, "bf16", "fp32", "on a CPU"])
@pytest.mark.parametrize("form", FORMS)
def test_path(monkeypatch, capsys, case, form):
    """The kernels where they serve, on a GPU, else PyTorch; what is asked for in any case."""
    monkeypatch.delenv("LASP_KERNELS")
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "on a CPU": torch.float32}
    options, dtype, _ = UNSUPPORTED.get(case) or ({}, dtypes[case], "")
    x, *_ = delta_inputs(form, 4, dtype=dtype, **options)
    tensors = [t.cpu() if t is not None else None for t in list(x.values())[:5]]
    there = DeltaOperands(*(tensors if case == "on a CPU" else map(on_cuda, tensors)))
    assert path(there) == ("triton" if case in ("bf16", "fp32") else "reference")
    for asked in ("triton", "reference"):
        monkeypatch.setenv("LASP_KERNELS", asked)
        assert path(there) == asked


def test_steps_of_the_path(monkeypatch, capfd):
    x = DeltaOperands(*list(delta_inputs("channel", 4)[0].values())[:5])
    monkeypatch.setenv("LASP_DEBUG", "1")
    assert isinstance(delta_steps_of(x), DeltaKernelSteps)
    assert "triton for the delta rule, torch.float32" in capfd.readouterr().err
    monkeypatch.setenv("LASP_KERNELS", "reference")
    assert isinstance(delta_steps_of(x), DeltaSteps)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("K", "V"), [(128, 128), (64, 64), (80, 96), (256, 256), (128, 256)])
def test_full_size(form, dtype, K, V):
    """Thousands of tokens and the segments that the card is given, against the chunked fp64 computation."""
    x, do, d_final = delta_inputs(form, 3000, heads=2, K=K, V=V, dtype=dtype)
    found = by_kernels(x, do, d_final)
    expected = exactly(x, do, d_final, function=chunked_delta_rule)
    for name, exact in expected.items():
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        error = relative(found[name], exact)
        assert error < bound, f"{name}: relative error {error:.1e}"


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("form", FORMS)
def test_full_size_with_grouped_heads_behind_others(form, D):
    """Calls with as many heads of v share launches; gradients of each group's heads are fp32, others as the inputs."""
    for heads, groups in ((4, 1), (2, 2), (4, 1)):
        x, do, d_final = delta_inputs(form, 700, heads=heads, groups=groups, K=D, V=D, dtype=torch.bfloat16)
        expected = exactly(x, do, d_final, function=chunked_delta_rule)
        for name, value in by_kernels(x, do, d_final).items():
            assert relative(value, expected[name]) < 1e-2, name


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("strength", [1.0, 10.0])
def test_full_size_packed_with_a_decay_per_channel(strength):
    """In bf16 of 128 x 128, whose gradients are made tile by tile; the strong decays flag tiles."""
    cu_seqlens = (0, 0, 1, 1061, 3000)
    options = {"heads": 2, "K": 128, "V": 128, "sequences": 4, "strength": strength, "dtype": torch.bfloat16}
    x, do, d_final = delta_inputs("channel", 3000, **options)
    found = by_kernels(x, do, d_final, cu_seqlens=cu_seqlens)
    expected = exactly(x, do, d_final, cu_seqlens=cu_seqlens, function=chunked_delta_rule)
    for name, exact in expected.items():
        assert relative(found[name], exact) < 1e-2, name


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("D", [64, 128])
def test_full_size_without_a_wait_of_the_host(D):
    x, do, d_final = delta_inputs("channel", 3000, heads=2, K=D, V=D, dtype=torch.bfloat16)
    expected = by_kernels(x, do, d_final)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = by_kernels(x, do, d_final)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
