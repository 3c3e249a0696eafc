"""Linear layers for few rows against PyTorch's, in fp64; on a GPU, else under Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest
import torch
import torch.nn.functional as F

import lasp
from lasp.models import TNL, Decoder, DecoderConfig, TNLConfig
from lasp_kernels import few_rows, layers
from lasp_kernels.reference import activation_of

CUDA = interpreter.CUDA
DEVICE = "cuda" if CUDA else "cpu"
# Of the greatest. Triton's interpreter cuts off what does not fit in bf16.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if CUDA else 8e-3, torch.float16: 1e-3}
DTYPES = list(TOLERANCE)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < TOLERANCE[actual.dtype], f"{error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_norm_and_several_layers(dtype, rows, weighted):
    D, sizes, activations = 45, (33, 1, 64, 5), ("silu", "silu", "none", "none")
    x, norm = normal(rows, 1, D, dtype=dtype) * 3, normal(D, dtype=dtype, seed=1) if weighted else None
    weights = [normal(n, D, dtype=dtype, seed=2 + i) for i, n in enumerate(sizes)]
    ys = few_rows.norm_linear(x, weights, norm, eps=0.1, activations=activations)
    h = F.rms_norm(x.double(), (D,), None if norm is None else norm.double(), 0.1)
    for y, w, activation in zip(ys, weights, activations):
        expected = activation_of(activation)(F.linear(h, w.double()))
        assert y.dtype == dtype
        assert_near(y, expected)
    assert_near(few_rows.norm_linear(x, weights[:1], norm, eps=0.1)[0], F.linear(h, weights[0].double()))


@pytest.mark.parametrize("activation", ["none", "sigmoid", "silu"])
@pytest.mark.parametrize("rows", [1, 2])
def test_norm_gate_and_residual(rows, activation):
    H, V, N = 3, 21, 17
    x, gate, weight, norm = (
        normal(rows, 1, H, V),
        normal(rows, 1, H * V, seed=1),
        normal(N, H * V, seed=2),
        normal(H * V),
    )
    residual = normal(rows, 1, N, seed=3)
    wide = F.rms_norm(x.flatten(-2).double(), (H * V,), norm.double(), 1e-6) * activation_of(activation)(gate.double())
    expected = F.linear(wide, weight.double())
    assert_near(few_rows.norm_gate_linear(x, gate, weight, norm, activation=activation), expected)
    y = few_rows.norm_gate_linear(x, gate, weight, norm, activation=activation, residual=residual)
    assert_near(y, expected + residual)
    wide = x.flatten(-2).double() * activation_of(activation)(gate.double())
    y = few_rows.gated_linear(x.flatten(-2), gate, weight, activation=activation, residual=residual)
    assert_near(y, F.linear(wide, weight.double()) + residual)


def test_rows_that_lie_apart():
    """x, gate and residual as slices of what one layer gave."""
    rows = normal(3, 5, 2 * 40)[:, 2]
    x, gate, weight = rows[:, :40], rows[:, 40:], normal(40, 40, seed=1)
    expected = F.linear(x.double() * gate, weight.double()) + gate
    assert_near(few_rows.gated_linear(x, gate, weight, residual=gate), expected)


def test_long_rows_in_several_steps(monkeypatch):
    monkeypatch.setattr(few_rows, "_blocks", lambda *_: few_rows.Blocks(4, 32, 4))
    x, weight = normal(1, 100), normal(50, 100, seed=1)
    expected = F.linear(F.rms_norm(x.double(), (100,), eps=1e-6), weight.double())
    assert_near(few_rows.norm_linear(x, [weight])[0], expected)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("width", "sizes"), [(2048, (2048,) * 4), (2048, (5632,) * 2), (5632, (2048,)), (1024, (64000,))]
)
def test_layers_of_a_models_size(rows, width, sizes):
    """Also one behind the other, so that each begins while the one before runs, and with weights that were changed just
    before."""
    x = normal(rows, 1, width, dtype=torch.bfloat16)
    weights = [normal(n, width, dtype=torch.bfloat16, seed=1 + i) / width**0.5 for i, n in enumerate(sizes)]
    h = F.rms_norm(x.double(), (width,), eps=1e-6)
    for factor in (1, -2, 4):
        for w in weights:
            w.mul_(factor)
        ys = few_rows.norm_linear(x, weights)
        again = few_rows.norm_linear(x, weights)
        for y, twice, w in zip(ys, again, weights):
            assert_near(y, F.linear(h, w.double()))
            assert torch.equal(y, twice)
    if len(weights) == 1:
        gate, residual = normal(rows, 1, width, dtype=torch.bfloat16, seed=7), ys[0]
        for _ in range(3):
            y = few_rows.norm_gate_linear(x.unsqueeze(-2), gate, weights[0], activation="silu", residual=residual)
            assert_near(y, F.linear(h * F.silu(gate.double()), weights[0].double()) + residual)
            residual = y


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_a_chain_in_a_graph(rows):
    """Each layer reads what the one before has written, in memory that is used again: replays are alike, and as steps
    that wait for each other."""
    width, inner = 512, 1280
    first = [normal(inner, width, dtype=torch.bfloat16, seed=i) / width**0.5 for i in range(2)]
    last = normal(width, inner, dtype=torch.bfloat16, seed=2) / inner**0.5
    x = normal(rows, 1, width, dtype=torch.bfloat16, seed=3)

    def step(wait=lambda: None):
        y = x
        for _ in range(24):
            value, gate = few_rows.norm_linear(y, first)
            wait()
            y = few_rows.gated_linear(value, gate, last, activation="silu", residual=y)
            wait()
        return y

    expected = step(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for seed in range(20):
        x.copy_(normal(rows, 1, width, dtype=torch.bfloat16, seed=3 + seed % 2))
        graph.replay()
        graph.replay()
        if seed % 2 == 0:
            assert torch.equal(y, expected)


@pytest.mark.timeout(600)  # five kernels are compiled
def test_nothing_is_read_before_the_wait_and_registers_are_enough():
    """Of the kernels as they are compiled for Hopper, at the sizes of TNL-1B; no GPU is needed for it."""
    kernels = Path(few_rows.__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(kernels), environment.get("PYTHONPATH", "")])
    script = Path(__file__).parent / "compiled_for_hopper.py"
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_wrong_shapes_are_named():
    x, weight = normal(1, 8), normal(3, 8)
    with pytest.raises(ValueError, match=r"gate must have shape \(1, 8\), got \(1, 7\)"):
        few_rows.gated_linear(x, x[:, :7], weight)
    with pytest.raises(ValueError, match=r"residual must have shape \(1, 3\), got \(1, 8\)"):
        few_rows.gated_linear(x, x, weight, residual=x)


@pytest.mark.parametrize("wrong", [("silu",), ("silu", "sigmoid"), "silu"])
def test_activations_are_one_a_layer_and_such_as_the_kernel_has(wrong):
    x, weight = normal(1, 8), normal(4, 8)
    with pytest.raises(ValueError, match=r'activations must be "none" or "silu" for each of 2 weights, or None, got'):
        layers.norm_linear(x, [weight, weight], activations=wrong)


@pytest.mark.parametrize("family", ["tnl", "hgrn2"])
def test_a_model_of_one_token(monkeypatch, family):
    """Its logits are the same, in as many launches as its blocks have products that read the same."""
    sizes = {"vocab_size": 50, "layers": 2, "width": 32, "heads": 2, "glu_width": 40}
    model = (TNL(TNLConfig(**sizes)) if family == "tnl" else Decoder(DecoderConfig(family, **sizes))).to(DEVICE)
    ids, launches, launch = torch.tensor([[7]], device=DEVICE), [], few_rows._launch
    with torch.no_grad():
        monkeypatch.setattr(layers, "_few_rows", lambda *_: False)
        expected = model(ids)
        monkeypatch.setattr(layers, "_few_rows", lambda x, width, *weights: few_rows.serves(x, width, *weights))
        monkeypatch.setattr(
            few_rows, "_launch", lambda *args, **options: launches.append(1) or launch(*args, **options)
        )
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)
    assert len(launches) == (8 if family == "tnl" else 6)


def test_a_generation(monkeypatch):
    """As `lasp.generate` meets them, on a GPU in its CUDA graph: tokens and logits are those of the whole sequence."""
    if not CUDA:
        monkeypatch.setattr(layers, "_few_rows", lambda x, width, *weights: few_rows.serves(x, width, *weights))
    width, heads = (512, 4) if CUDA else (32, 2)
    model = TNL(TNLConfig(50, layers=2, width=width, heads=heads, glu_width=40)).to(DEVICE)
    prompt = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = lasp.generate(model, prompt, max_new_tokens=40 if CUDA else 4)
    with torch.no_grad():
        whole = model(torch.cat([prompt, found.ids], 1))
    torch.testing.assert_close(found.state.logits, whole[:, -1].to(found.state.logits.dtype), atol=1e-4, rtol=1e-4)
    assert torch.equal(whole[:, 8:-1].argmax(-1), found.ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_go_through_products_of_matrices(dtype):
    weight = normal(32, 64, dtype=dtype)
    served = [few_rows.serves(normal(1, rows, 64, dtype=dtype), 64, weight) for rows in range(7)]
    assert served == [False, True, False, False, False, False, False]


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_when_they_are_chosen():
    x, weight = normal(1, 1, 64), normal(32, 64)
    with torch.no_grad():
        assert layers._few_rows(x, 64, weight)
        assert not layers._few_rows(normal(1, 2, 64), 64, weight)
        assert not layers._few_rows(x, 64, weight.bfloat16())
        assert layers._few_rows(x.bfloat16(), 64, weight.bfloat16())
        assert not layers._few_rows(normal(1, 2, 64).bfloat16(), 64, weight.bfloat16())
        with torch.autocast("cuda", torch.bfloat16):
            assert not layers._few_rows(x, 64, weight)
    assert not layers._few_rows(x, 64, weight)
    assert not few_rows.serves(x.double(), 64, weight.double())
