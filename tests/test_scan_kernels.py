"""The Triton kernels of recurrences by channel against an fp64 loop: on a GPU, else under Triton's interpreter."""

import math

import interpreter
import pytest
import torch
from scripts import run_interpreted
from test_elementwise import OPERATORS, assert_near, example, results, true_results

import lasp
from lasp_kernels import elementwise_path, elementwise_steps_of, scan_steps
from lasp_kernels.elementwise import RecurrenceOperands
from lasp_kernels.selective_scan import SelectiveOperands

CUDA = interpreter.CUDA
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # of the greatest
# Some groups of tiles, of which the last one is not full.
T, PACKED = (1163, (0, 5, 200, 200, 601, 700, 1163)) if CUDA else (37, (0, 3, 14, 14, 26, 27, 37))


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """The interpreter's time goes by the number of tiles, and by what it does element by element."""
    monkeypatch.setenv("LASP_KERNELS", "triton")
    if not CUDA:
        monkeypatch.setattr(scan_steps, "GROUP", 2)
        monkeypatch.setattr(scan_steps, "PREFIX_BLOCK", 8)
        monkeypatch.setattr(scan_steps.TileRecurrenceSteps, "config", scan_steps.Config(4, 2, 4, 128))
        monkeypatch.setattr(scan_steps.TileSelectiveSteps, "config", scan_steps.Config(2, 4, 4, 128))


def on_device(x, dy, dtype):
    """With decays in fp32, as they should be."""
    wide = {"log_decay", "dt", "A"}
    return {n: y.to(DEVICE, torch.float32 if n in wide else dtype) for n, y in x.items()}, dy.to(DEVICE, dtype)


def check(operator, x, dy, dtype=torch.float32, cu_seqlens=None):
    x, dy = on_device(x, dy, dtype)
    true = true_results(operator, {n: y.cpu() for n, y in x.items()}, dy.cpu(), cu_seqlens)
    layout = None if cu_seqlens is None else lasp.ShardLayout((dy.shape[1],), cu_seqlens)
    found = results(operator, x, dy, layout=layout)
    for name, y in found.items():
        assert y.dtype == (dtype if name == "result" else x[name].dtype)
        assert_near(y.cpu(), true[name], TOLERANCE[y.dtype], name)
    return found


# In the interpreter a 16-bit dtype is as another, and one operator's loads as the other's.
ALL_GRADIENTS = [
    (operator, dtype)
    for operator in OPERATORS
    for dtype in TOLERANCE
    if CUDA or dtype == torch.float32 or (dtype == torch.bfloat16 and operator == "elementwise_recurrence")
]


@pytest.mark.parametrize(("operator", "dtype"), ALL_GRADIENTS, ids=str)
@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["dense", "packed"])
def test_all_gradients(operator, cu_seqlens, dtype):
    x, dy = example(operator, T, rows=2 if CUDA and cu_seqlens is None else 1)
    if operator == "selective_scan":
        x["dt"] = x["dt"].clamp(max=10.0)  # fp16 holds no more than 65504
    check(operator, x, dy, dtype, cu_seqlens)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("tokens", [1, 8, 2048 if CUDA else 32])
def test_few_tokens_and_full_groups(operator, tokens):
    check(operator, *example(operator, tokens))


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tokens(operator):
    x, dy = on_device(*example(operator, 3), torch.float32)
    none = {name: y if name == "A" else y[:, :0] for name, y in x.items()}
    found = results(operator, none, dy[:, :0])
    assert all(found[name].shape == y.shape for name, y in none.items())
    assert not found.get("A", torch.zeros(1)).any()


@pytest.mark.parametrize(
    ("channels", "of_decay"), [((), None), ((2, 3), (2, 1)), ((2, 3), (1, 1)), ((70,) if CUDA else (6,), None)]
)
def test_any_shape(channels, of_decay):
    x, dy = example("elementwise_recurrence", 11, channels=channels)
    if of_decay is not None:
        x["log_decay"] = x["log_decay"][(..., *(slice(n) for n in of_decay))]
    check("elementwise_recurrence", x, dy)


@pytest.mark.parametrize("operator", OPERATORS)
def test_views(operator):
    """Parts of wider tensors, as a projection that is split gives them, and an expanded gradient."""
    x, dy = example(operator, 11)
    x = {
        n: torch.stack([y, y], -1)[..., 0] if n == "A" else torch.cat([y, y], -1)[..., : y.shape[-1]]
        for n, y in x.items()
    }
    check(operator, x, dy[..., :1].expand_as(dy))


@pytest.mark.parametrize(("D", "N"), [(1, 1), (5, 16), (70 if CUDA else 3, 5)])
def test_sizes_of_selective_states(D, N):
    draw = torch.Generator().manual_seed(D)
    u, B, C, dy = (torch.randn(1, 9, n, generator=draw, dtype=torch.float64) for n in (D, N, N, D))
    x = {"u": u, "dt": u.square(), "A": -torch.rand(D, N, generator=draw, dtype=torch.float64), "B": B, "C": C}
    check("selective_scan", x, dy)


def test_a_fixed_decay_that_hardly_forgets():
    tokens = 5000 if CUDA else 70
    x = {"x": torch.rand(1, tokens, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).add(0.5)}
    x["log_decay"] = torch.full((1, tokens, 2), -1e-5, dtype=torch.float64)
    x, dy = on_device(x, torch.ones(1, tokens, 2), torch.float32)
    true = true_results("elementwise_recurrence", {n: y.cpu() for n, y in x.items()}, dy.cpu())
    for name, y in results("elementwise_recurrence", x, dy).items():
        assert_near(y.cpu(), true[name], 3e-6, name)


@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_stays_in_its_document(operator):
    x, dy = on_device(*example(operator, T, rows=1, resets=0.0), torch.float32)
    layout = lasp.ShardLayout((T,), PACKED)
    clean = results(operator, x, dy, layout=layout)
    start, end = PACKED[3], PACKED[4]
    for token in (start, end - 1) if CUDA else (end - 1,):
        spoilt = {n: y.clone() for n, y in {**x, "dy": dy}.items()}
        for name in spoilt.keys() - {"A", "dt", "log_decay"}:
            spoilt[name][:, token] = math.nan
        found = results(operator, spoilt, spoilt.pop("dy"), layout=layout)
        assert found["result"][:, token].isnan().all()
        for name in found.keys() - {"A"}:
            assert torch.equal(found[name][:, :start], clean[name][:, :start]), (token, name)
            assert torch.equal(found[name][:, end:], clean[name][:, end:]), (token, name)
        assert torch.equal(found["result"][:, :token], clean["result"][:, :token])


def operands(x):
    return RecurrenceOperands(**x) if "x" in x else SelectiveOperands(**x)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_steps_that_are_asked_for_maps(operator, cu_seqlens):
    """As between ranks: the maps first, what enters later. The same numbers, bit by bit, as where nobody asks."""
    x, dy = on_device(*example(operator, T, rows=1), torch.float32)
    x, needed = operands(x), (True,) * len(x)
    found, state = [], torch.randn(1, 1, 3 if operator == "elementwise_recurrence" else 12, 1, device=DEVICE)
    for asks in (False, True):
        steps = elementwise_steps_of(x, cu_seqlens=cu_seqlens)
        maps = steps.local_maps(x)
        end_of_zero = log = torch.zeros(())
        if asks:
            end_of_zero, log = steps.run_map(maps)
        states, end = steps.scan(maps, state)
        y, kept = steps.outputs(x, states)
        assert kept is None
        if asks and cu_seqlens is None:
            torch.testing.assert_close(end, log.exp().unsqueeze(-1) * state + end_of_zero)
        elif asks:
            assert log.isneginf().all()
            torch.testing.assert_close(end, end_of_zero)
        steps = elementwise_steps_of(x, cu_seqlens=cu_seqlens)
        maps = steps.gradient_maps(x, dy)
        if asks:
            first_of_zero, log_back = steps.run_map(maps, reverse=True)
            torch.testing.assert_close(log_back, log)
        d_states, first = steps.scan(maps, state, reverse=True)
        gradients = steps.gradients(x, dy, states, kept, d_states, needed)
        if asks and cu_seqlens is None:
            torch.testing.assert_close(first, log.exp().unsqueeze(-1) * state + first_of_zero)
        found.append([y, end, states, first, *gradients])
    for alone, asked in zip(*found):
        if operator == "elementwise_recurrence":
            torch.testing.assert_close(alone, asked, rtol=1e-6, atol=1e-6)
        else:
            torch.testing.assert_close(alone, asked, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not CUDA, reason="the interpreter runs one program after the other")
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_same_bits_every_time(operator):
    x, dy = on_device(*example(operator, T, channels=(70,)), torch.float32)
    first = results(operator, x, dy)
    for _ in range(20):
        again = results(operator, x, dy)
        assert all(torch.equal(again[name], y) for name, y in first.items())


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_kept(operator):
    """Inputs and one state a strip."""
    x, _ = on_device(*example(operator, T), torch.float32)
    x, kept = {name: y.requires_grad_() for name, y in x.items()}, {}
    pointers = {y.untyped_storage().data_ptr() for y in x.values()}

    def pack(y):
        kept[y.untyped_storage().data_ptr()] = y.numel()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        OPERATORS[operator](**x)
    steps = elementwise_steps_of(operands(x))
    state = 3 if operator == "elementwise_recurrence" else 12
    strips = steps.tiles * steps.config.strips
    assert strips * steps.config.tokens < T + 64
    assert sum(size for pointer, size in kept.items() if pointer not in pointers) == 2 * strips * state


def test_what_the_kernels_do_not_take(monkeypatch):
    x = torch.zeros(1, 3, 2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"the Triton kernels of a recurrence take fp32, bf16 or fp16, got torch.float64"
    ):
        OPERATORS["elementwise_recurrence"](x, x)
    wide = SelectiveOperands(
        *(torch.zeros(s, device=DEVICE) for s in ((1, 3, 2), (1, 3, 2), (2, 300), (1, 3, 300), (1, 3, 300)))
    )
    with pytest.raises(ValueError, match="up to 256 states a channel, got 300"):
        OPERATORS["selective_scan"](*wide)
    monkeypatch.delenv("LASP_KERNELS")
    served = RecurrenceOperands(x.float(), x.float())
    assert [elementwise_path(y) for y in (RecurrenceOperands(x, x), wide)] == ["reference"] * 2
    few = SelectiveOperands(*(y[..., :256] for y in wide))
    assert {elementwise_path(y) for y in (served, few)} == {"triton" if CUDA else "reference"}
    assert not OPERATORS["selective_scan"](*wide).any()


COMPARE = """
import interpreter, torch, torch.distributed as dist, lasp
from torch.testing import assert_close
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp_kernels import scan_steps
from lasp_kernels.elementwise import recurrent_elementwise
from lasp_kernels.selective_scan import SelectiveOperands, recurrent_selective_scan

scan_steps.GROUP, scan_steps.PREFIX_BLOCK = 2, 8
scan_steps.TileRecurrenceSteps.config = scan_steps.Config(2, 2, 2, 128)
scan_steps.TileSelectiveSteps.config = scan_steps.Config(2, 2, 2, 128)
env = lasp.init("gloo", timeout=120)
D, N = 2, 2
two, three = dist.new_group([0, 1]), dist.group.WORLD
cases = [(two, (6, 3), (0, 1, 5, 9)), (three, (4, 0, 5), None), (three, (4, 1, 4), (0, 2, 6, 6, 9))]
for group, lengths, offsets in cases:
    if env.rank >= len(lengths):
        continue
    T = sum(lengths)
    draw = torch.Generator().manual_seed(T)
    x, dt, dy = (torch.randn(1, T, D, generator=draw) for _ in range(3))
    B, C, A = *torch.randn(2, 1, T, N, generator=draw), -torch.rand(D, N, generator=draw)
    g = -dt.square()
    g[:, 3] = -torch.inf
    selective = lambda *x, cu_seqlens: recurrent_selective_scan(SelectiveOperands(*x), cu_seqlens=cu_seqlens)
    for f, loop, inputs in ((elementwise_recurrence, recurrent_elementwise, (x, g)),
                            (selective_scan, selective, (x, dt.exp(), A, B, C))):
        whole = [y.double().requires_grad_() for y in inputs]
        y = loop(*whole, cu_seqlens=offsets)
        true = [y.detach(), *torch.autograd.grad(y, whole, dy.double())]
        start = sum(lengths[: env.rank])
        here = slice(start, start + lengths[env.rank])
        mine = [(y if y.ndim == 2 else y[:, here]).clone().requires_grad_() for y in inputs]
        for schedule in ("ring",) if offsets else ("all_gather",):
            sequence = lasp.SequenceParallel(group, exchange=schedule)
            y = f(*mine, layout=lasp.ShardLayout(lengths, offsets), sequence=sequence)
            found = [y.detach(), *torch.autograd.grad(y, mine, dy[:, here])]
            for a, b in zip(found, true):
                if b.ndim == 2:
                    dist.all_reduce(a, group=group)
                b = b if b.ndim == 2 else b[:, here]
                assert_close(a.double(), b, rtol=1e-5, atol=2e-6 * max(1.0, float(b.abs().max()) if b.numel() else 0))
            assert sequence.traffic_of(f.__name__).kernels == "triton"
dist.destroy_process_group()
print("compared")
"""


def test_over_two_and_three_ranks():
    ranks = run_interpreted(COMPARE, 3, limit=240.0)
    assert all(code == 0 and "compared" in out for code, out, _ in ranks), ranks
