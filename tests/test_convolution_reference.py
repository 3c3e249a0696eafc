"""The causal convolution against its sum written out token by token, in fp64: outputs and every gradient."""

import pytest
import torch
from inputs import assert_close
from torch import nn

from lasp_kernels.convolution import causal_conv

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
PACKED = [(0, 23), (0, 0, 23), (0, 23, 23), (0, 1, 2, 3, 23), (0, 5, 5, 5, 9, 22, 23), (0, 0, 2, 2, 23)]


def draw(T, *, W, B=2, C=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, W - 1 + T, C), (C, W), (C,)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def document(place, W, cu_seqlens):
    """Which document the token at `place` in x is of; those before the first token are of the first."""
    if cu_seqlens is None or place < W - 1:
        return 0
    return next(n for n, end in enumerate(cu_seqlens[1:]) if place - W + 1 < end)


def direct(x, weight, bias=None, *, cu_seqlens=None):
    W = weight.shape[1]
    rows = []
    for t in range(x.shape[1] - W + 1):
        own = document(t + W - 1, W, cu_seqlens)
        taps = [weight[:, j] * x[:, t + j] for j in range(W) if document(t + j, W, cu_seqlens) == own]
        rows.append(sum(taps) if bias is None else sum(taps) + bias)
    return torch.stack(rows, 1)


def compare(x, **call):
    y, expected = causal_conv(*x, **call), direct(*x, **call)
    assert_close(y, expected, "y", **CLOSE)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    gradients = zip(("x", "weight", "bias"), torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))
    for name, actual, gradient in gradients:
        assert_close(actual, gradient, f"d{name}", **CLOSE)


@pytest.mark.parametrize("W", [1, 2, 4, 7])
@pytest.mark.parametrize("T", [1, 3, 23])
@pytest.mark.parametrize("C", [1, 5])
@pytest.mark.parametrize("inputs", [2, 3], ids=["no bias", "bias"])
def test_dense(W, T, C, inputs):
    compare(draw(T, W=W, C=C)[:inputs])


@pytest.mark.parametrize("W", [1, 2, 4, 7, 30])
@pytest.mark.parametrize("cu_seqlens", PACKED)
@pytest.mark.parametrize("inputs", [2, 3], ids=["no bias", "bias"])
def test_packed(W, cu_seqlens, inputs):
    compare(draw(23, W=W, B=1)[:inputs], cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("W", [1, 4])
@pytest.mark.parametrize("cu_seqlens", [None, (0, 0), (0, 0, 0)])
@pytest.mark.parametrize("inputs", [2, 3], ids=["no bias", "bias"])
def test_no_tokens(W, cu_seqlens, inputs):
    x = draw(0, W=W, B=1)[:inputs]
    y = causal_conv(*x, cu_seqlens=cu_seqlens)
    assert y.shape == (1, 0, 5)
    for gradient, of in zip(torch.autograd.grad(y.sum(), x), x):
        assert torch.equal(gradient, torch.zeros_like(of))


def test_is_a_padded_convolution_cut_to_its_length():
    conv = nn.Conv1d(5, 5, 4, groups=5, padding=3).double()
    x = draw(23, W=1)[0]
    before = x.new_zeros(2, 3, 5)
    y = causal_conv(torch.cat([before, x], 1), conv.weight[:, 0], conv.bias)
    assert_close(y, conv(x.mT)[..., :23].mT, "y", **CLOSE)


@pytest.mark.parametrize("cuts", [(0, 23), (0, 1, 2, 23), (0, 9, 9, 17, 23)])
def test_slices_are_the_whole(cuts):
    x, weight, bias = draw(23, W=4)
    parts = [causal_conv(x[:, start : end + 3], weight, bias) for start, end in zip(cuts, cuts[1:])]
    assert_close(torch.cat(parts, 1), causal_conv(x, weight, bias), "y", **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_nan_stays_in_its_window(dtype, channels):
    """The W tokens that read it, and in the gradient of x those that it reads."""
    for width in (1, 2, 4):
        x, dy = (torch.ones(1, tokens, channels, dtype=dtype) for tokens in (width + 19, 20))
        weight = torch.ones(channels, width, dtype=dtype)
        spoilt = x.clone()
        spoilt[0, width + 9] = torch.nan
        dy[0, 10] = torch.nan
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(causal_conv(x, weight), x, dy)
        for found in (causal_conv(spoilt, weight), gradient):
            assert found.isnan().any(-1)[0].nonzero().flatten().tolist() == list(range(10, 10 + width))


def test_a_nan_stays_in_its_document():
    x, weight, bias = (t.detach() for t in draw(23, W=4, B=1))
    expected = causal_conv(x, weight, bias, cu_seqlens=(0, 9, 23))
    x[:, : 3 + 9] = torch.nan
    y = causal_conv(x, weight, bias, cu_seqlens=(0, 9, 23))
    assert torch.equal(y[:, 9:], expected[:, 9:])
    assert y[:, :9].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.bfloat16, torch.float32, 8e-3),
    ],
)
@pytest.mark.parametrize("cu_seqlens", [None, (0, 9, 23)])
def test_lower_precision(dtype, weight_dtype, tolerance, cu_seqlens):
    x, weight, bias = (t.detach() for t in draw(23, W=4, B=1))
    x, weight, bias = x.to(dtype), weight.to(weight_dtype), bias.to(weight_dtype)
    y = causal_conv(x, weight, bias, cu_seqlens=cu_seqlens)
    expected = direct(x.double(), weight.double(), bias.double(), cu_seqlens=cu_seqlens)
    assert y.dtype == dtype
    assert_close(y.double(), expected, "y", rtol=tolerance, atol=tolerance)


def test_compiles_to_one_graph():
    torch.compiler.reset()
    x = draw(23, W=4)
    y = torch.compile(causal_conv, backend="aot_eager", fullgraph=True)(*x)
    assert_close(y, causal_conv(*x), "y", **CLOSE)


X, WEIGHT, BIAS = torch.zeros(2, 9, 5), torch.zeros(5, 4), torch.zeros(5)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ((None, WEIGHT), TypeError, "x must be a floating-point tensor, got None"),
        ((X.int(), WEIGHT), TypeError, "x must be a floating-point tensor, got torch.int32"),
        ((X[0], WEIGHT), ValueError, r"x must have shape .* got \(9, 5\)"),
        ((X, WEIGHT[0]), ValueError, r"weight must have shape \[C, W\], got \(4,\)"),
        ((X, WEIGHT.long()), TypeError, "weight must be a floating-point tensor, got torch.int64"),
        ((X, WEIGHT[1:]), ValueError, r"with C = 5 and W >= 1, got \(4, 4\)"),
        ((X, WEIGHT[:, :0]), ValueError, r"with C = 5 and W >= 1, got \(5, 0\)"),
        ((X[:, :2], WEIGHT), ValueError, r"x must begin with the W - 1 = 3 tokens before, got \(2, 2, 5\)"),
        ((X, WEIGHT.to("meta")), ValueError, "weight must be on the device of x, cpu, got meta"),
        ((X, WEIGHT, BIAS.double()), TypeError, "bias must be .* torch.float32, got torch.float64"),
        ((X, WEIGHT, 0.0), TypeError, "bias must be .* torch.float32, got 0.0"),
        ((X, WEIGHT, BIAS[1:]), ValueError, r"bias must have shape \[C\] = \(5,\), got \(4,\)"),
        ((X, WEIGHT, BIAS.to("meta")), ValueError, "bias must be on the device of weight, cpu, got meta"),
    ],
)
def test_wrong_tensors(x, error, text):
    with pytest.raises(error, match=text):
        causal_conv(*x)


@pytest.mark.parametrize(
    ("cu_seqlens", "batch", "error", "text"),
    [
        ([0, 6], 1, TypeError, r"cu_seqlens must be a tuple of ints, got \[0, 6\]"),
        ((0, 6.0), 1, TypeError, r"cu_seqlens must be a tuple of ints, got \(0, 6.0\)"),
        ((0, 6), 2, ValueError, "cu_seqlens needs a batch of 1, got B = 2"),
        ((0,), 1, ValueError, r"from 0 to T = 6, got \(0,\)"),
        ((1, 6), 1, ValueError, r"from 0 to T = 6, got \(1, 6\)"),
        ((0, 7), 1, ValueError, r"from 0 to T = 6, got \(0, 7\)"),
        ((0, 4, 3, 6), 1, ValueError, r"cu_seqlens must not fall, got \(0, 4, 3, 6\)"),
    ],
)
def test_wrong_documents(cu_seqlens, batch, error, text):
    with pytest.raises(error, match=text):
        causal_conv(X[:batch], WEIGHT, BIAS, cu_seqlens=cu_seqlens)
