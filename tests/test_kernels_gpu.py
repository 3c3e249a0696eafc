"""`lasp.linear_attention` on a GPU, at sizes that the interpreter cannot reach: its kernels as a user meets them."""

import sys
from dataclasses import replace

import pytest
import torch
from inputs import assert_digits, every_strength, oracle

import lasp
from lasp.models.tnl import TNL, Block, TNLConfig
from lasp_kernels import chunked_linear_attention, recurrent_linear_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
LONG = 2**20 + 3  # tokens
MEMORY_TOKENS = 131072
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative, of the whole tensor
NAMES = ("q", "k", "v", "log_decay")


def random(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE, dtype=dtype)


def random_qkv(B, T, H, K, V, dtype=torch.bfloat16):
    """q, k, v and the gradient of the output."""
    shapes = ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, T, H, V))
    return [random(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes)]


def fixed_decay(H):
    return lasp.decay.alibi(H, 0, 24).to(DEVICE)


def token_decay(B, T, H, strength=0.1):
    uniform = torch.rand(B, T, H, generator=torch.Generator(DEVICE).manual_seed(9), device=DEVICE)
    return -strength * uniform


def step(function, tensors, do, **options):
    """Output, final state if any, and gradients by name, of q, k, v and, unless it is None, log_decay."""
    leaves = [t.detach().requires_grad_() for t in tensors if t is not None]
    decay = leaves[3] if len(leaves) == 4 else options.pop("log_decay", None)
    o, final_state = function(*leaves[:3], log_decay=decay, **options)
    grads = torch.autograd.grad(o, leaves, do.to(o.dtype))
    return {"o": o.detach(), **{f"d{name}": g for name, g in zip(NAMES, grads)}}, final_state


def exact_step(tensors, do, dtype=torch.float64, **options):
    """The same of the chunked computation in PyTorch, on the same rounded inputs."""
    wide = [None if t is None else t.detach().to(dtype) for t in tensors]
    if options.get("log_decay") is not None:
        options["log_decay"] = options["log_decay"].to(dtype)
    return step(chunked_linear_attention, wide, do.to(dtype), **options)


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-2)).item()


def assert_near(actual, expected, tolerance, decay_tolerance=None):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        error = relative_error(x, expected[name])
        bound = tolerance if name != "dlog_decay" else decay_tolerance or 8 * tolerance
        assert error < bound, f"{name}: relative error {error:.2e}"


def peak_memory(function):
    """Bytes requested during the call beyond those before it, at their peak; and its result.

    Those that are allocated are more, by what the block that was free happened to have.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, result


def compiled_kernels():
    """How many kernels Triton has compiled or loaded for this package in this process."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("lasp_kernels"):
            for function in vars(module).values():
                function = getattr(function, "fn", function) if hasattr(function, "configs") else function
                if hasattr(function, "device_caches"):
                    found[id(function)] = sum(len(caches[0]) for caches in function.device_caches.values())
    return sum(found.values())


@pytest.mark.parametrize("n", [256, 512, 1024, 2048, 4096, 8192, 513, 913, 1213])
def test_shapes_of_lightning_attention(n):
    """Those of OpenNLPLab's tests: b 6, h 8, d 128, e 64."""
    *qkv, do = random_qkv(6, n, 8, 128, 64)
    actual, _ = step(lasp.linear_attention, qkv, do, log_decay=fixed_decay(8))
    expected, _ = exact_step(qkv, do, torch.float32, log_decay=fixed_decay(8))
    assert_near(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("n", [913, 4096])
def test_true_fp32(n):
    *qkv, do = random_qkv(2, n, 8, 128, 64, torch.float32)
    actual, _ = step(lasp.linear_attention, qkv, do, log_decay=fixed_decay(8))
    expected, _ = exact_step(qkv, do, log_decay=fixed_decay(8))
    assert_near(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("per_token", [False, True])
def test_decays_from_0_to_minus_50(per_token):
    B, T, H = 2, 3001, 8
    *qkv, do = random_qkv(B, T, H, 64, 64)
    rates = torch.tensor([0.0, -1e-4, -0.01, -0.1, -1.0, -5.0, -20.0, -50.0], device=DEVICE)
    if per_token:
        draw = torch.Generator(DEVICE).manual_seed(5)
        rates = rates[torch.randint(0, 8, (B, T, H), generator=draw, device=DEVICE)]
    actual, _ = step(lasp.linear_attention, [*qkv, rates], do)
    expected, _ = exact_step([*qkv, rates], do)
    assert_near(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("T", [64, 130, 700])
def test_weak_decays_behind_strong_ones(T):
    """Every one keeps its digits: within a tile its decays are as right as if there were no others."""
    x = every_strength("token", T, K=64, V=64)
    o, final_state, expected = oracle(replace(x, **{name: t.double() for name, t in vars(x).items()}))
    leaves = [t.to(DEVICE).requires_grad_() for t in x.given.values()]
    q, k, v, log_decay, initial = leaves
    found = lasp.linear_attention(q, k, v, log_decay=log_decay, initial_state=initial, output_final_state=True)
    grads = torch.autograd.grad(found, leaves, [x.do.to(DEVICE), x.d_final_state.to(DEVICE)])
    actual = {"o": found[0].detach(), "final_state": found[1].detach(), **dict(zip(x.given, grads))}
    assert_digits(actual, {"o": o, "final_state": final_state, **expected}, 2e-6)


@pytest.mark.parametrize("rate", [1e-3, 0.1, 3.0])
def test_gradient_of_a_fixed_decay_next_to_a_loop(rate):
    """At most ten times the error of a loop in fp32."""
    *qkv, do = random_qkv(1, 2048, 4, 64, 64, torch.float32)
    decay = torch.full((4,), -rate, device=DEVICE)
    actual, _ = step(lasp.linear_attention, [*qkv, decay], do)
    exact, _ = exact_step([*qkv, decay], do)
    loop, _ = step(recurrent_linear_attention, [*qkv, decay], do)
    error, bound = ((x["dlog_decay"].double() - exact["dlog_decay"]).abs().max() for x in (actual, loop))
    assert error <= 10 * bound, f"{error:.2e}, loop {bound:.2e}"


@pytest.mark.parametrize("form", ["none", "fixed", "token"])
@pytest.mark.parametrize(("K", "V", "dtype"), [(8, 8, torch.bfloat16), (20, 3, torch.bfloat16), (1, 8, torch.float32)])
def test_narrow_heads(form, K, V, dtype):
    """Narrower than the blocks of a product, which are filled up with zeros."""
    *qkv, do = random_qkv(2, 700, 3, K, V, dtype)
    decay = {"none": None, "fixed": fixed_decay(3), "token": token_decay(2, 700, 3)}[form]
    actual, _ = step(lasp.linear_attention, [*qkv, decay], do)
    expected, _ = exact_step([*qkv, decay], do)
    assert_near(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ["fixed", "token"])
def test_a_million_tokens(form):
    """No overflow, and what lies beyond the horizon changes nothing: the ends are those of short runs."""
    horizon, compared = 10400, 1000  # exp(-0.01 * 10400) is 0 in fp32
    *qkv, do = random_qkv(1, LONG, 2, 64, 64)
    decay = torch.tensor([-0.01, -0.5], device=DEVICE)
    if form == "token":
        decay = (decay * (1 + torch.rand(1, LONG, 2, device=DEVICE))).contiguous()

    def part(first, end):
        cut = [t[:, first:end] for t in (*qkv, do)]
        log_decay = decay[:, first:end] if form == "token" else decay
        return step(lasp.linear_attention, [*cut[:3], log_decay], cut[3])[0]

    whole = part(0, LONG)
    for name, x in whole.items():
        assert x.isfinite().all(), name
    last, first = part(LONG - horizon - compared, LONG), part(0, horizon + compared)
    for name in ("o", "dq"):  # these see the tokens before theirs
        assert relative_error(whole[name][:, -compared:], last[name][:, -compared:]) < 1e-2, name
    for name in ("dk", "dv"):  # and these the ones behind
        assert relative_error(whole[name][:, :compared], first[name][:, :compared]) < 1e-2, name


def test_a_million_tokens_without_decay():
    *qkv, do = random_qkv(1, LONG, 2, 64, 64)
    qkv[1], do = qkv[1] * 0.01, do * 0.01
    found, _ = step(lasp.linear_attention, qkv, do)
    for name, x in found.items():
        assert x.isfinite().all(), name
    tail = 1000
    with torch.no_grad():
        state = torch.einsum("bthk,bthv->bhkv", *(t[:, :-tail].double() for t in qkv[1:]))
        cut = [t[:, -tail:].double() for t in qkv]
        expected, _ = chunked_linear_attention(*cut, initial_state=state)
    assert relative_error(found["o"][:, -tail:], expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("K", "V"), [(16, 80), (80, 96), (96, 128), (128, 256), (256, 16), (256, 256)])
def test_head_dims(K, V):
    *qkv, do = random_qkv(2, 1500, 3, K, V)
    decay = torch.tensor([-0.001, -0.03, -0.7], device=DEVICE)
    actual, _ = step(lasp.linear_attention, qkv, do, log_decay=decay)
    expected, _ = exact_step(qkv, do, log_decay=decay)
    assert_near(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("aligned", [True, False])  # whether the copy engine can move its tiles
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", ["none", "fixed", "token"])
def test_wide_heads_fit_shared_memory(form, groups, aligned):
    """With the gradient of the decay, whose row sums take more of it."""
    q, do = (random(1, 1500, 2 * groups, 256, seed=seed) for seed in (0, 3))
    k, v = (random(1, 1500, 2, 256 + 8 * aligned + (not aligned), seed=seed)[..., :256] for seed in (1, 2))
    decay = {"none": None, "fixed": fixed_decay(2), "token": token_decay(1, 1500, 2)}[form]
    actual, _ = step(lasp.linear_attention, [q, k, v, decay], do)
    expected, _ = exact_step([q, k, v, decay], do)
    assert_near(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("form", ["none", "fixed", "token"])
@pytest.mark.parametrize(("K", "V", "pad"), [(128, 32, 1), (128, 16, 1), (32, 128, 1), (256, 32, 1), (250, 17, 0)])
def test_narrow_values_that_tma_cannot_move(form, K, V, pad):
    """ptxas 12.8 reads shared memory at wrong places for blocks of 16 and 32 columns here (docs/lab/kernels.md)."""
    q, k, v, do = (random(1, 700, 2, dim + pad, seed=n)[..., :dim] for n, dim in enumerate((K, K, V, V)))
    decay = {"none": None, "fixed": fixed_decay(2), "token": token_decay(1, 700, 2)}[form]
    actual, _ = step(lasp.linear_attention, [q, k, v, decay], do)
    expected, _ = exact_step([q, k, v, decay], do)
    assert_near(actual, expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("form", ["fixed", "token"])
def test_packed(form):
    bounds = (0, 1, 1, 700, 2048, 5000)
    *qkv, do = random_qkv(1, bounds[-1], 4, 64, 64)
    decay = fixed_decay(4) if form == "fixed" else token_decay(1, bounds[-1], 4)
    layout = lasp.ShardLayout((bounds[-1],), bounds)
    options = {"output_final_state": True, "layout": layout}
    actual, state = step(lasp.linear_attention, [*qkv, decay], do, **options)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    expected, expected_state = exact_step([*qkv, decay], do, cu_seqlens=cu_seqlens)
    assert_near(actual, expected, TOLERANCE[torch.bfloat16])
    assert relative_error(state, expected_state) < TOLERANCE[torch.bfloat16]


def test_states_in_and_out():
    B, T, H = 2, 3001, 8
    *qkv, do = random_qkv(B, T, H, 64, 64)
    initial, d_final = (random(B, H, 64, 64, dtype=torch.float32, seed=n) for n in (5, 6))
    found = []
    for function, dtype in ((lasp.linear_attention, None), (chunked_linear_attention, torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (*qkv, initial)]
        options = {"output_final_state": True} if dtype is None else {}
        decay = fixed_decay(H).to(dtype or torch.float32)
        o, final = function(*leaves[:3], log_decay=decay, initial_state=leaves[3], **options)
        assert final is not None
        grads = torch.autograd.grad([o, final], leaves, [do.to(o.dtype), d_final.to(final.dtype)])
        found.append(dict(zip(("o", "final", "dq", "dk", "dv", "d_initial"), (o, final, *grads))))
    assert_near(found[0], found[1], TOLERANCE[torch.bfloat16])


def test_views_of_a_fused_projection():
    """No copy and no change of a bit: q, k, v as parts of one [B, T, 3, H, D] and of one [B, T, H, 3 D]."""
    *qkv, do = random_qkv(2, 2000, 4, 64, 64)
    decay = fixed_decay(4)
    all_views = (torch.stack(qkv, 2).unbind(2), torch.cat(qkv, -1).split(64, -1))
    step(lasp.linear_attention, qkv, do, log_decay=decay)  # what is allocated once is so after this
    needed, (expected, _) = peak_memory(lambda: step(lasp.linear_attention, qkv, do, log_decay=decay))
    for views in all_views:
        assert not any(t.is_contiguous() for t in views)
        memory, (actual, _) = peak_memory(lambda views=views: step(lasp.linear_attention, views, do, log_decay=decay))
        assert memory <= needed + do.nbytes / 2
        for name, x in actual.items():
            assert torch.equal(x, expected[name]), name


def positive(x):
    """As a feature map makes them."""
    return torch.nn.functional.elu(x) + 1


@pytest.mark.parametrize("form", ["none", "fixed", "token"])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (128, 128), (128, 64), (80, 17), (256, 256)])
def test_normaliser(form, K, V):
    """In bf16 at most about twice as far off as without one: the gradient begins with o, which is rounded."""
    q, k, v, do = random_qkv(2, 1500, 3, K, V)
    q, k = positive(q), positive(k)
    decay = {"none": None, "fixed": fixed_decay(3), "token": token_decay(2, 1500, 3)}[form]
    errors = []
    for normalize in (False, True):
        actual, _ = step(lasp.linear_attention, [q, k, v, decay], do, normalize=normalize)
        expected, _ = exact_step([q, k, v, decay], do, normalize=normalize)
        errors.append({name: relative_error(x, expected[name]) for name, x in actual.items()})
        assert_near(actual, expected, TOLERANCE[torch.bfloat16], decay_tolerance=2e-2)
    for name in ("o", "dq", "dk", "dv"):
        assert errors[1][name] <= 2 * errors[0][name] + 1e-3, f"{name}: {errors}"
    wide = [None if t is None else t.float() for t in (q, k, v, decay)]
    actual, _ = step(lasp.linear_attention, wide, do.float(), normalize=True)
    expected, _ = exact_step(wide, do, normalize=True)
    assert_near(actual, expected, 2 * TOLERANCE[torch.float32], decay_tolerance=1e-3)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("form", ["none", "fixed", "token"])
def test_grouped_values(form, groups, normalize):
    """The shape of Mamba-2: heads of 64 channels of v, all or half of which share a q and k of 128, without a copy."""
    B, T, H, K, V = 1, 3001, 16, 128, 64
    q, k = (positive(random(B, T, groups, K, seed=seed)) for seed in (0, 1))
    v, do = (random(B, T, H, V, seed=seed) for seed in (2, 3))
    decay = {"none": None, "fixed": fixed_decay(H), "token": token_decay(B, T, H)}[form]
    actual, _ = step(lasp.linear_attention, [q, k, v, decay], do, normalize=normalize)
    expected, _ = exact_step([q, k, v, decay], do, normalize=normalize)
    assert_near(actual, expected, TOLERANCE[torch.bfloat16])
    with torch.no_grad():
        options = {"log_decay": decay, "normalize": normalize}
        needed, _ = peak_memory(lambda: lasp.linear_attention(q, k, v, **options))
        repeated = [x.repeat_interleave(H // groups, 2) for x in (q, k)]
        more, (o, _) = peak_memory(lambda: lasp.linear_attention(*repeated, v, **options))
        assert needed <= more
        assert torch.equal(o, actual["o"])


@pytest.mark.parametrize("form", ["none", "fixed", "token"])
def test_normaliser_packed_with_states_and_grouped_queries(form):
    bounds, H, D = (0, 1, 1, 700, 2048, 5000), 4, 64
    q, do = (random(1, bounds[-1], 2 * H, D, seed=seed) for seed in (0, 3))
    k, v = (random(1, bounds[-1], H, D, seed=seed) for seed in (1, 2))
    decay = {"none": None, "fixed": fixed_decay(H), "token": token_decay(1, bounds[-1], H)}[form]
    initial, d_final = (random(5, H, D, D + 1, dtype=torch.float32, seed=n) for n in (5, 6))
    initial[..., -1].abs_().add_(0.1)
    found = []
    for function, dtype in ((lasp.linear_attention, None), (chunked_linear_attention, torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (positive(q), positive(k), v, initial)]
        if dtype is None:
            options = {"output_final_state": True, "layout": lasp.ShardLayout((bounds[-1],), bounds)}
        else:
            options = {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE)}
        log_decay = None if decay is None else decay.to(dtype or torch.float32)
        options |= {"log_decay": log_decay, "normalize": True, "initial_state": leaves[3]}
        o, final = function(*leaves[:3], **options)
        assert final is not None
        grads = torch.autograd.grad([o, final], leaves, [do.to(o.dtype), d_final.to(final.dtype)])
        found.append(dict(zip(("o", "final", "dq", "dk", "dv", "d_initial"), (o, final, *grads))))
    assert_near(found[0], found[1], TOLERANCE[torch.bfloat16])


def test_memory_of_a_normaliser():
    """Forward keeps a number of each query more, and o, which is there in any case; backward makes two of these."""
    B, T, H, D = 1, MEMORY_TOKENS, 16, 64
    *qkv, do = random_qkv(B, T, H, D, D)
    qkv = [positive(x) if n < 2 else x for n, x in enumerate(qkv)]
    peaks = []
    for normalize in (False, True):
        leaves = [t.detach().requires_grad_() for t in qkv]
        forward, (o, _) = peak_memory(lambda leaves=leaves, n=normalize: lasp.linear_attention(*leaves, normalize=n))
        backward, grads = peak_memory(lambda o=o, leaves=leaves: torch.autograd.grad(o, leaves, do))
        peaks.append((forward, backward))
        del o, grads, leaves
    numbers = 4 * B * T * H
    assert peaks[1][0] - peaks[0][0] <= 1.1 * numbers + 2**20
    assert peaks[1][1] - peaks[0][1] <= 2.2 * numbers + 2**20


def test_same_bits_twice():
    *qkv, do = random_qkv(2, 5000, 4, 64, 64)
    for decay in (fixed_decay(4), token_decay(2, 5000, 4)):
        first, second = (step(lasp.linear_attention, [*qkv, decay], do)[0] for _ in range(2))
        for name, x in first.items():
            assert torch.equal(x, second[name]), name


@pytest.mark.parametrize("form", ["fixed", "token"])
@pytest.mark.parametrize("T", [130, 20000])
def test_gradient_of_the_decay(form, T):
    """In fp32, so that what is left is the error of the sum, not of the inputs."""
    *qkv, do = random_qkv(1, T, 4, 64, 64, torch.float32)
    decay = fixed_decay(4) if form == "fixed" else token_decay(1, T, 4)
    actual, _ = step(lasp.linear_attention, [*qkv, decay], do)
    expected, _ = exact_step([*qkv, decay], do)
    assert actual["dlog_decay"].dtype == torch.float32
    assert_near(actual, expected, TOLERANCE[torch.float32], decay_tolerance=1e-4)


@pytest.mark.timeout(400)  # fla tries many configurations at its first call
@pytest.mark.parametrize("form", ["none", "fixed", "token"])
def test_error_next_to_fla(form):
    """In bf16 at most 1.2 times that of fla-core on the same inputs.

    With a decay per token only of o: fla refuses its backward on Hopper GPUs with Triton before 3.7.1.
    """
    pytest.importorskip("fla", reason="fla-core is not installed")
    pytest.importorskip("einops")
    from fla.ops.simple_gla import chunk_simple_gla

    *qkv, do = random_qkv(1, 4133, 8, 64, 64)
    decay = {"none": None, "fixed": fixed_decay(8), "token": token_decay(1, 4133, 8)}[form]
    tensors = [*qkv, decay] if form == "token" else qkv
    options = {"log_decay": decay} if form == "fixed" else {}

    def fla(q, k, v, log_decay):
        name = "g_gamma" if form == "fixed" else "g"
        return chunk_simple_gla(q, k, v, scale=1.0, **{name: log_decay})

    expected, _ = exact_step(tensors, do, **options)
    ours, _ = step(lasp.linear_attention, tensors, do, **options)
    if form == "token":
        theirs = {"o": fla(*tensors)[0]}
    else:
        theirs, _ = step(fla, tensors, do, **options)
    for name in theirs:
        error, bound = (relative_error(x[name], expected[name]) for x in (ours, theirs))
        bound *= 1.2
        assert error <= bound, f"{name}: {error:.2e}, fla {bound / 1.2:.2e}"


@pytest.mark.parametrize(("form", "D"), [("none", 64), ("fixed", 64), ("token", 64), ("token", 128)])
def test_memory_of_backward(form, D):
    """At its peak at most a tenth of dq, dk and dv beyond the gradients that it returns."""
    *qkv, do = random_qkv(1, MEMORY_TOKENS, 16, D, D)
    decay = {"none": None, "fixed": fixed_decay(16), "token": token_decay(1, MEMORY_TOKENS, 16)}[form]
    leaves = [t.requires_grad_() for t in (qkv if form != "token" else [*qkv, decay])]
    o, _ = lasp.linear_attention(*qkv, log_decay=decay)
    peak, grads = peak_memory(lambda: torch.autograd.grad(o, leaves, do))
    extra = peak - sum(g.nbytes for g in grads)
    assert extra <= 0.1 * sum(g.nbytes for g in grads[:3]), f"{extra / 2**20:.0f} MiB"


def test_no_kernel_is_compiled_again_for_another_length_or_batch():
    def run(B, T):
        *qkv, do = random_qkv(B, T, 4, 64, 64)
        for decay in (fixed_decay(4), token_decay(B, T, 4)):
            step(lasp.linear_attention, [*qkv, decay], do)
        step(lasp.linear_attention, qkv, do, log_decay=fixed_decay(4))  # needs no state at the end
        step(lasp.linear_attention, [positive(x) for x in qkv[:2]] + qkv[2:], do, normalize=True)
        step(lasp.linear_attention, [x[:, :, :2] for x in qkv[:2]] + qkv[2:], do)

    run(2, 1000)
    before = compiled_kernels()
    assert before > 0
    for B, T in ((1, 1000), (3, 1000), (2, 1024), (2, 1), (1, 8191), (1, 65536), (16, 64)):
        run(B, T)
        assert compiled_kernels() == before, f"B {B}, T {T}"


def test_compiled_model():
    """A block of TNL in one graph, without a break, is the eager one, forward and backward."""
    torch.manual_seed(0)
    config = TNLConfig(vocab_size=16, layers=2, width=128, heads=2, glu_width=256)
    block = Block(config, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    block = block.to(DEVICE)
    x, dy = (random(2, 1000, 128, dtype=torch.float32, seed=n) for n in (1, 2))
    positions = torch.arange(1000, device=DEVICE)
    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = function(leaf, positions)
        grads = torch.autograd.grad(y, [leaf, *block.parameters()], dy)
        results.append({"y": y.detach(), **{str(n): g for n, g in enumerate(grads)}})
    assert_near(results[1], results[0], 1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_a_card_that_is_not_the_current_one():
    """Forward, backward, and few rows without gradients, bit for bit; the current card stays what it was."""
    torch.manual_seed(0)
    model = TNL(TNLConfig(vocab_size=64, layers=2, width=128, heads=2, glu_width=256))
    ids, results = torch.randint(64, (1, 500)), []
    for device in ("cuda:0", "cuda:1"):
        model, here = model.to(device), ids.to(device)
        loss, _ = lasp.linear_token_loss(model(here, return_hidden=True), model.head.weight, here, mesh=None)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            one = model(here[:, :1])
        results.append([x.cpu() for x in (loss.detach(), one, *grads)])
        assert torch.cuda.current_device() == 0
    for a, b in zip(*results):
        assert torch.equal(a, b)
