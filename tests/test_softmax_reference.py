"""Softmax attention of a slice against the formula with its mask written out, in fp64: outputs and every gradient."""

import itertools
import random

import pytest
import torch
from inputs import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lasp_kernels import softmax
from lasp_kernels.softmax import softmax_attention

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
PACKED = (0, 0, 5, 20, 20, 33, 70, 83, 83)  # of 83 tokens: empty documents at both ends and within


def draw(T, *, S=None, B=2, heads=4, groups=2, K=5, V=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (B, T, heads, K),
        (B, T if S is None else S, heads // groups, K),
        (B, T if S is None else S, heads // groups, V),
    )
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def sees(T, S, *, start=0, cu_seqlens=None, window=None, key_mask=None):
    """Token by token, bool [B or 1, T, S]."""
    batch = 1 if key_mask is None else key_mask.shape[0]
    seen = torch.zeros(batch, T, S, dtype=torch.bool)
    for b, t in itertools.product(range(batch), range(T)):
        at = start + t
        opens = 0 if cu_seqlens is None else max(a for a, e in zip(cu_seqlens, cu_seqlens[1:]) if a <= at < e)
        opens = opens if window is None else max(opens, at - window + 1)
        for s in range(opens, at + 1):
            seen[b, t, s] = key_mask is None or bool(key_mask[b, s])
        if not seen[b, t].any():
            seen[b, t, at] = True
    return seen


def direct(q, k, v, *, scale=None, softcap=None, **facts):
    """softmax(cap(scale * q k^T) where seen) v, all at once."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = sees(q.shape[1], k.shape[1], **facts)
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v)


def compare(x, **call):
    """Output and gradients of the three inputs, against `direct`."""
    o, expected = softmax_attention(*x, **call), direct(*x, **call)
    assert o.shape == expected.shape
    assert_close(o, expected, "o", **CLOSE)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    gradients = zip("qkv", torch.autograd.grad(o, x, do), torch.autograd.grad(expected, x, do))
    for name, actual, gradient in gradients:
        assert_close(actual, gradient, f"d{name}", **CLOSE)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """Bounds low enough that short sequences are cut, too, into blocks of odd lengths."""
    if request.param == "many blocks":
        monkeypatch.setattr(softmax, "BOUND", 200)
        monkeypatch.setattr(softmax, "FEWEST", 6)


def padding(S):
    """A row padded left, one padded right, one that is only padding, one with holes."""
    mask = torch.ones(4, S, dtype=torch.bool)
    mask[0, : S // 3], mask[1, S // 2 :], mask[2] = False, False, False
    mask[3, ::3] = False
    return mask


# Against the formula


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("T", "start", "later"), [(1, 0, 0), (37, 0, 0), (37, 20, 0), (37, 20, 9), (1, 56, 0)])
def test_a_slice(groups, T, start, later):
    compare(draw(T, S=start + T + later, groups=groups), start=start)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("window", [1, 2, 7, 30, 500])
@pytest.mark.parametrize("start", [0, 3, 40])
def test_windows(window, start):
    compare(draw(41, S=start + 41), start=start, window=window)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("start", "end"), [(0, 83), (0, 20), (5, 20), (3, 40), (21, 33), (34, 35), (70, 83)])
def test_packed_documents(start, end, window):
    """A slice that begins or ends in a document, at its border, that holds one, or part of one."""
    compare(draw(end - start, S=83, B=1), start=start, cu_seqlens=PACKED, window=window)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("start", [0, 15])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_padding(start, window, softcap):
    x = draw(29, S=start + 29, B=4)
    compare(x, start=start, key_mask=padding(start + 29), window=window, softcap=softcap)


@pytest.mark.usefixtures("blocks")
def test_padding_of_packed_documents():
    key_mask = padding(83)[3:]
    compare(draw(60, S=83, B=1), start=11, key_mask=key_mask, cu_seqlens=PACKED)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("cu_seqlens", [None, PACKED])
@pytest.mark.parametrize("softcap", [0.5, 20])
@pytest.mark.parametrize("window", [None, 7])
def test_softcap(softcap, cu_seqlens, window):
    compare(draw(50, S=70, B=1), start=20, softcap=softcap, cu_seqlens=cu_seqlens, window=window, scale=2.0)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("scale", [0.0, 1, -0.7])
@pytest.mark.parametrize(("K", "V"), [(3, 8), (8, 3), (4, 4), (1, 1)])
def test_scale_and_head_dims(scale, K, V):
    compare(draw(20, K=K, V=V), scale=scale)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("call", [{}, {"window": 9}, {"softcap": 2.0}, {"cu_seqlens": (0, 13, 13, 40)}])
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_what_is_not_finite_spoils_what_depends_on_it(name, call):
    """No query that does not see it, and no gradient but those of which it is a term."""
    q, k, v = (x.detach() for x in draw(40, B=1))
    do, token = torch.ones(1, 40, 4, 3, dtype=v.dtype), 20
    bounds = call.get("cu_seqlens", (0, 40))
    first = max(bound for bound in bounds if bound <= token)
    reach = call.get("window", 40)
    sees = range(token, min(token + reach, 40))  # queries that see it
    seen = range(max(first, token - reach + 1), token + 1)  # keys that it sees
    by_seeing = range(max(first, token - reach + 1), sees[-1] + 1)  # keys that those see
    expected = {
        "q": ([token], [token], seen, seen),
        "k": (sees, sees, by_seeing, by_seeing),
        "v": (sees, sees, by_seeing, []),
        "do": ([], [token], seen, seen),
    }[name]
    tensors = {"q": q, "k": k, "v": v, "do": do}
    for value in (torch.nan, torch.inf):
        changed = {n: x.clone() for n, x in tensors.items()}
        changed[name][0, token, :, 1] = value
        leaves = [changed[n].requires_grad_() for n in "qkv"]
        o = softmax_attention(*leaves, **call)
        for x, tokens in zip((o, *torch.autograd.grad(o, leaves, changed["do"])), expected):
            assert (~x.isfinite()).flatten(2).any(-1)[0].nonzero().flatten().tolist() == list(tokens)


@pytest.mark.parametrize("call", [{}, {"window": 3}, {"softcap": 2.0}, {"cu_seqlens": (0, 4, 9)}, {"start": 3}])
def test_no_queries(call):
    """A part of a sequence may be empty; its gradients are then zeros, and there."""
    x = draw(0, S=5, B=1)
    o = softmax_attention(*x, **call)
    assert o.shape == (1, 0, 4, 3)
    for gradient, of in zip(torch.autograd.grad(o.sum(), x), x):
        assert torch.equal(gradient, torch.zeros_like(of))


def test_no_keys_and_no_queries():
    assert softmax_attention(*draw(0)).shape == (2, 0, 4, 3)


# Slices of one sequence


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "call", [{}, {"cu_seqlens": PACKED}, {"window": 7}, {"softcap": 3.0}, {"key_mask": padding(83)[3:]}]
)
def test_slices_are_the_whole(call, seed):
    q, k, v = x = draw(83, B=1, seed=seed)
    random_cuts = random.Random(seed).choices(range(84), k=4)
    cuts = sorted([0, *random_cuts, 83])
    outputs = []
    for start, end in zip(cuts, cuts[1:]):
        facts = {**call, "key_mask": call["key_mask"][:, :end]} if "key_mask" in call else call
        outputs.append(softmax_attention(q[:, start:end], k[:, :end], v[:, :end], start=start, **facts))
    parts, whole = torch.cat(outputs, 1), softmax_attention(*x, **call)
    assert_close(parts, whole, "o", **CLOSE)
    do = torch.randn_like(whole)
    for name, actual, expected in zip("qkv", torch.autograd.grad(parts, x, do), torch.autograd.grad(whole, x, do)):
        assert_close(actual, expected, f"d{name}", **CLOSE)


def test_later_keys_other_documents_and_padding_do_not_matter():
    """Not even if they are NaN, as uninitialised memory may be."""
    q, k, v = (x.detach() for x in draw(10, S=30, B=1))
    call = {"start": 12, "cu_seqlens": (0, 8, 30)}
    o = softmax_attention(q, k, v, **call)
    for x in (k, v):
        x[:, :8], x[:, 22:] = torch.nan, torch.nan
    assert torch.equal(softmax_attention(q, k, v, **call), o)


# Precision and dropout


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("call", [{}, {"window": 7}, {"softcap": 5.0}, {"key_mask": padding(57)[:2]}])
def test_lower_precision(dtype, tolerance, call):
    x = [t.detach().to(dtype).requires_grad_() for t in draw(37, S=57)]
    exact = [t.detach().double().requires_grad_() for t in x]
    o, expected = softmax_attention(*x, start=20, **call), direct(*exact, start=20, **call)
    assert o.dtype == dtype
    assert_close(o.double(), expected, "o", rtol=tolerance, atol=tolerance)
    gradients = zip("qkv", torch.autograd.grad(o.sum(), x), torch.autograd.grad(expected.sum(), exact))
    for name, actual, gradient in gradients:
        assert actual.dtype == dtype
        error = (actual.double() - gradient).norm() / gradient.norm()
        assert error < tolerance, f"d{name}: {error}"


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("blocks_of", [32, 6])
def test_dropout(softcap, blocks_of, monkeypatch):
    """Right on average; a recompute in backward drops what forward dropped, or the gradient were not that of v."""
    monkeypatch.setattr(softmax, "FEWEST", blocks_of)
    monkeypatch.setattr(softmax, "BOUND", 200)
    torch.manual_seed(0)
    q, k, v = draw(20, B=2000, heads=1, groups=1)
    q, k, v = (x[:1].expand_as(x) for x in (q, k, v))
    dropped = softmax_attention(q, k, v, dropout_p=0.3, softcap=softcap)
    kept = softmax_attention(q, k, v, softcap=softcap)
    assert dropped.shape == kept.shape
    assert not torch.equal(dropped, kept)
    assert_close(dropped.mean(0), kept.mean(0), "mean", rtol=0, atol=0.15)
    assert torch.equal(softmax_attention(q, k, v, dropout_p=0.0, softcap=softcap), kept)
    do = torch.randn_like(dropped)
    (dv,) = torch.autograd.grad(dropped, v, do)
    assert_close((dv * v).sum(), (dropped * do).sum(), "linear in v")


# Memory


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator made, views of the inputs aside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return made


@pytest.mark.parametrize(
    ("T", "call"),
    [
        (16384, {}),
        (16384, {"window": 300}),
        (2048, {"key_mask": torch.ones(1, 16384, dtype=torch.bool)}),
        (2048, {"softcap": 20.0}),
    ],
)
def test_no_tensor_of_all_pairs(T, call):
    """The last T of 16,384 tokens: up to 2^28 pairs. No tensor holds more than the bound, forward or backward."""
    x = draw(T, S=16384, B=1, heads=1, groups=1, K=8, V=8, dtype=torch.float32)
    with Largest() as largest:
        softmax_attention(*x, start=16384 - T, **call).sum().backward()
    assert largest.elements <= (600 * 600 if "window" in call else softmax.BOUND)


def test_a_few_queries_at_the_end_of_a_long_sequence():
    q, k, v = draw(64, S=131072, B=1, heads=1, groups=1, K=8, V=8, dtype=torch.float32)
    with Largest() as largest:
        o = softmax_attention(q, k, v, start=131072 - 64)
        o.sum().backward()
    assert largest.elements <= 64 * 131072
    weights = (q[0, 63, 0] @ k[0, :, 0].T * 8**-0.5).softmax(0)
    assert_close(o[0, 63, 0], weights @ v[0, :, 0], "o", rtol=1e-4, atol=1e-5)


def test_what_backward_keeps_does_not_grow_with_the_blocks():
    """Several blocks keep their inputs, which are views, and no mask."""
    x = draw(4096, B=1, heads=1, groups=1, K=8, V=8, dtype=torch.float32)
    own = {t.untyped_storage().data_ptr() for t in x}
    kept = []

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        softmax_attention(*x, window=200)
    assert sum(kept) <= 4096 * 8


def test_windows_cost_their_length(monkeypatch):
    """Of 2,048 queries with a window of 64, no block meets more keys than it has queries and window."""
    met = []
    attend = softmax._attend
    monkeypatch.setattr(
        softmax, "_attend", lambda q, k, *rest: met.append((q.shape[2], k.shape[2])) or attend(q, k, *rest)
    )
    softmax_attention(*draw(2048, B=1, heads=1, groups=1), window=64)
    assert sum(rows for rows, _ in met) == 2048
    assert all(128 <= rows < 256 and keys <= rows + 63 for rows, keys in met)


# Compiled


@pytest.mark.parametrize("call", [{}, {"window": 30}, {"softcap": 3.0}, {"key_mask": padding(90)[:2]}])
def test_compiles_to_one_graph(call, monkeypatch):
    monkeypatch.setattr(softmax, "BOUND", 2000)
    monkeypatch.setattr(softmax, "FEWEST", 16)
    torch.compiler.reset()
    x = draw(70, S=90)
    o = softmax_attention(*x, start=20, **call)
    compiled = torch.compile(softmax_attention, backend="aot_eager", fullgraph=True)(*x, start=20, **call)
    assert_close(compiled, o, "o", **CLOSE)
    gradients = zip("qkv", torch.autograd.grad(compiled.sum(), x), torch.autograd.grad(o.sum(), x))
    for name, actual, expected in gradients:
        assert_close(actual, expected, f"d{name}", **CLOSE)


# On a GPU, where without a mask one flash kernel does it

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-10}


@GPU
@pytest.mark.parametrize("dtype", GPU_TOLERANCE, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("K", "V"), [(64, 64), (48, 20), (5, 13)])
@pytest.mark.parametrize(
    "call",
    [{}, {"cu_seqlens": (0, 90, 201, 201, 300)}, {"window": 70}, {"softcap": 2.0}, {"key_mask": padding(300)[3:]}],
)
def test_on_a_gpu(dtype, groups, K, V, call, monkeypatch):
    monkeypatch.setattr(softmax, "BOUND", 2**16)
    x = [t.detach().to(dtype).requires_grad_() for t in draw(211, S=300, B=1, groups=groups, K=K, V=V)]
    exact = [t.detach().double().requires_grad_() for t in x]
    expected = direct(*exact, start=80, **call)
    do = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    there = [t.detach().cuda().requires_grad_() for t in x]
    call = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    o = softmax_attention(*there, start=80, **call)
    pairs = [
        (o, expected),
        *zip(torch.autograd.grad(o, there, do.cuda()), torch.autograd.grad(expected, exact, do.double())),
    ]
    for name, (actual, wanted) in zip(("o", "dq", "dk", "dv"), pairs):
        error = (actual.cpu().double() - wanted).norm() / wanted.norm()
        assert error < GPU_TOLERANCE[dtype], f"{name}: {error}"


@GPU
@pytest.mark.parametrize("call", [{}, {"window": 4096}, {"key_mask": torch.ones(1, 131072, dtype=torch.bool)}])
def test_memory_on_a_gpu(call):
    """Of 16,384 queries and 131,072 keys: in bf16 the scores of one head, or a mask, would be 4 GiB."""
    q, k, v = (t.detach().cuda().requires_grad_() for t in draw(16384, S=131072, B=1, K=64, V=64, dtype=torch.bfloat16))
    call = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in call.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    softmax_attention(q, k, v, start=131072 - 16384, **call).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30


@GPU
@pytest.mark.parametrize("call", [{}, {"window": 70}, {"softcap": 2.0}])
def test_compiles_on_a_gpu(call):
    torch.compiler.reset()
    x = [t.detach().cuda().requires_grad_() for t in draw(211, S=300, K=64, V=64, dtype=torch.bfloat16)]
    o = softmax_attention(*x, start=80, **call)
    compiled = torch.compile(softmax_attention, fullgraph=True)(*x, start=80, **call)
    assert_close(compiled, o, "o", rtol=2e-2, atol=2e-2)
    gradients = zip("qkv", torch.autograd.grad(compiled.sum(), x), torch.autograd.grad(o.sum(), x))
    for name, actual, expected in gradients:
        assert (actual - expected).norm() <= 2e-2 * expected.norm(), f"d{name}"


# Wrong inputs

Q, K, V = torch.zeros(2, 6, 4, 3), torch.zeros(2, 9, 2, 3), torch.zeros(2, 9, 2, 5)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ((None, K, V), TypeError, "q must be a floating-point tensor, got None"),
        ((Q.long(), K, V), TypeError, "q must be .*int64"),
        ((Q[0], K, V), ValueError, r"q must have shape .* got \(6, 4, 3\)"),
        ((Q, K.double(), V), TypeError, "one dtype, got q torch.float32 and k torch.float64"),
        ((Q, K, V.half()), TypeError, "one dtype, got q torch.float32 and v torch.float16"),
        ((Q, K.to("meta"), V), ValueError, "one device, got q on cpu and k on meta"),
        ((Q, K, V[:, 1:]), ValueError, r"k and v must agree .* k \(2, 9, 2, 3\) and v \(2, 8, 2, 5\)"),
        ((Q[:1], K, V), ValueError, r"q and k must agree in B and K, got q \(1, 6, 4, 3\)"),
        ((Q[..., 1:], K, V), ValueError, r"q and k must agree in B and K, got q \(2, 6, 4, 2\)"),
        ((Q[:, :, 1:], K, V), ValueError, "multiple of the heads of k, got 3 and 2"),
        ((Q, K[:, :, :0], V[:, :, :0]), ValueError, "multiple of the heads of k, got 4 and 0"),
    ],
)
def test_wrong_tensors(x, error, text):
    with pytest.raises(error, match=text):
        softmax_attention(*x)


@pytest.mark.parametrize(
    ("option", "value", "error", "text"),
    [
        ("start", -1, ValueError, "start must be >= 0 .* got start -1"),
        ("start", 4, ValueError, "got start 4, 6 queries, 9 keys"),
        ("start", 1.0, TypeError, "start must be an int, got 1.0"),
        ("window", 0, ValueError, "window must be at least 1, .* got 0"),
        ("window", 2.5, TypeError, "window must be an int, got 2.5"),
        ("scale", "1", TypeError, "scale must be a number, got '1'"),
        ("softcap", 0, ValueError, "softcap must be > 0, got 0"),
        ("softcap", float("nan"), ValueError, "softcap must be > 0, got nan"),
        ("softcap", [50], TypeError, r"softcap must be a number, got \[50\]"),
        ("dropout_p", 1.0, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ("dropout_p", -0.1, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
        ("dropout_p", None, ValueError, r"dropout_p must be in \[0, 1\), got None"),
        ("dropout_p", "0", TypeError, "dropout_p must be a number, got '0'"),
        ("key_mask", torch.ones(2, 9), TypeError, "key_mask must be a bool tensor, got torch.float32"),
        ("key_mask", [True], TypeError, r"key_mask must be a bool tensor, got \[True\]"),
        ("key_mask", torch.ones(2, 6, dtype=torch.bool), ValueError, r"\[B, S\] = \(2, 9\), got \(2, 6\)"),
        ("key_mask", torch.ones(2, 9, dtype=torch.bool, device="meta"), ValueError, "device of k, cpu, got meta"),
    ],
)
def test_wrong_options(option, value, error, text):
    with pytest.raises(error, match=text):
        softmax_attention(Q, K, V, **{option: value})


@pytest.mark.parametrize(
    ("cu_seqlens", "batch", "error", "text"),
    [
        ([0, 6], 1, TypeError, r"cu_seqlens must be a tuple of ints, got \[0, 6\]"),
        (torch.tensor([0, 6]), 1, TypeError, "cu_seqlens must be a tuple of ints, got tensor"),
        ((0, 6.0), 1, TypeError, r"cu_seqlens must be a tuple of ints, got \(0, 6.0\)"),
        ((0, 6), 2, ValueError, "cu_seqlens needs a batch of 1, got B = 2"),
        ((0,), 1, ValueError, r"from 0 to at least start \+ T = 6, got \(0,\)"),
        ((1, 6), 1, ValueError, r"from 0 to at least start \+ T = 6, got \(1, 6\)"),
        ((0, 5), 1, ValueError, r"from 0 to at least start \+ T = 6, got \(0, 5\)"),
        ((0, 4, 3, 6), 1, ValueError, r"cu_seqlens must not fall, got \(0, 4, 3, 6\)"),
    ],
)
def test_wrong_documents(cu_seqlens, batch, error, text):
    with pytest.raises(error, match=text):
        softmax_attention(Q[:batch], K[:batch], V[:batch], cu_seqlens=cu_seqlens)
