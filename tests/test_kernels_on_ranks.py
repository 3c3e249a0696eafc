"""The Triton kernels and the exchange together: three ranks on a CPU, the kernels under Triton's interpreter."""

import interpreter  # noqa: F401
import pytest
from scripts import run_interpreted

COMPARE = """
import interpreter, torch, torch.distributed as dist, lasp
from lasp_kernels import Operands, path, recurrent_linear_attention
from torch.testing import assert_close

env = lasp.init("gloo", timeout=60)
sequence = lasp.SequenceParallel(dist.group.WORLD)
K, V = 16, 32
none_on_one, several_tiles, packed = ((70, 0, 33), None), ((65, 64, 3), None), ((40, 30, 7), (0, 10, 50, 50, 77))
cases = {"none": [none_on_one], "head": [several_tiles, packed], "token": [none_on_one, several_tiles, packed]}
cases["token, normalised"] = [packed]  # and heads of v that share one of q and k
cases["channel"] = [((33, 0, 18), None), ((20, 15, 5), (0, 4, 25, 25, 40))]
for form in cases:
    H = 1 if form in ("none", "token", "channel") else 2  # the interpreter's time goes by programs
    for lengths, offsets in cases[form]:
        T, B, more = sum(lengths), 1 if offsets else 2, "normalised" in form
        N = len(offsets) - 1 if offsets else B
        torch.manual_seed(T)
        shape = {"none": None, "head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[form.split(",")[0]]
        q, k, v, do = (torch.randn(B, T, H, n) for n in (K, K, V, V))
        g = None if shape is None else -torch.rand(shape)
        h, dh = torch.randn(N, H, K, V + more), torch.randn(N, H, K, V + more)
        if more:
            q, k = (x[:, :, :1].abs() + 0.1 for x in (q, k))
            h[..., -1].abs_().add_(0.1)

        whole = [x if x is None else x.double().requires_grad_() for x in (q, k, v, g, h)]
        cu = None if offsets is None else torch.tensor(offsets)
        options = {"log_decay": whole[3], "initial_state": whole[4], "normalize": more}
        o, final = recurrent_linear_attention(*whole[:3], cu_seqlens=cu, **options)
        expected = torch.autograd.grad((o, final), [x for x in whole if x is not None], (do.double(), dh.double()))

        start = sum(lengths[: env.rank])
        mine = slice(start, start + lengths[env.rank])
        local = [q[:, mine], k[:, mine], v[:, mine], g[:, mine] if g is not None and g.ndim > 1 else g, h]
        local = [x if x is None else x.clone().requires_grad_() for x in local]
        assert path(Operands(*local[:4])) == "triton"
        layout = lasp.ShardLayout(lengths, offsets) if offsets else None
        actual_o, actual_final = lasp.linear_attention(
            *local[:3], log_decay=local[3], initial_state=local[4], output_final_state=True, layout=layout,
            sequence=sequence, normalize=more,
        )
        inputs = [x for x in local if x is not None]
        found = torch.autograd.grad((actual_o, actual_final), inputs, (do[:, mine], dh / env.world_size))

        def near(actual, exact):
            assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4 * max(1.0, exact.abs().max().item()))

        near(actual_o, o[:, mine]) if actual_o.numel() else None
        near(actual_final, final)
        names = [n for n, x in zip(("q", "k", "v", "g", "h"), local) if x is not None]
        for name, x, y in zip(names, found, expected):
            if name == "h" or (name == "g" and form == "head"):
                dist.all_reduce(x)
            else:
                y = y[:, mine]
            assert x.shape == y.shape
            near(x, y) if x.numel() else None
dist.destroy_process_group()
print("compared")
"""


# With a segment length: the bits of one rank, on every schedule.
SAME_BITS = """
import interpreter, torch, torch.distributed as dist, lasp
from torch.autograd import grad

env = lasp.init("gloo", timeout=60)
K, V, lengths, B = 16, 16, (64, 64, 40), 1
T, options = sum(lengths), {"output_final_state": True, "segment_length": 64}
start = sum(lengths[: env.rank])
mine = slice(start, start + lengths[env.rank])
some, others = ("ring", "direct"), ("all_gather", "pipeline")  # of any form test_bits.py has all
for form, schedules in (("head", some), ("token", others), ("channel", some)):
    H = 2 if form == "head" else 1
    torch.manual_seed(T)
    shape = {"head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[form]
    q, k, v, do = (torch.randn(B, T, H, n, requires_grad=True) for n in (K, K, V, V))
    g = (-torch.rand(shape)).requires_grad_(form != "head")
    h, dh = torch.randn(B, H, K, V, requires_grad=True), torch.randn(B, H, K, V)
    inputs = [q, k, v, h] if form == "head" else [q, k, v, g, h]
    o, final = lasp.linear_attention(q, k, v, log_decay=g, initial_state=h, **options)
    expected = [o, *grad((o, final), inputs, (do, dh))]
    for schedule in schedules:
        sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
        cut = [x if x is h else x[:, mine] for x in inputs]
        local = dict(zip("qkvg", cut[:-1]), h=h)
        o, last = lasp.linear_attention(
            local["q"], local["k"], local["v"], log_decay=local.get("g", g), initial_state=h, sequence=sequence,
            layout=lasp.ShardLayout(lengths), **options,
        )
        assert torch.equal(last, final), f"final state, {form}, {schedule}"
        found = [o, *grad((o, last), cut, (do[:, mine], dh * (env.rank == 0)))]
        for name, x, y in zip(("o", *local), found, expected):
            dist.all_reduce(x) if name == "h" else None
            assert torch.equal(x, y if name == "h" else y[:, mine]), f"{name}, {form}, {schedule}"
dist.destroy_process_group()
print("compared")
"""


# The delta rule: against the recurrence by the schedule that sends matrices; and the bits of one rank by the others.
DELTA = """
import interpreter, torch, torch.distributed as dist, lasp
import torch.nn.functional as F
from lasp_kernels import path
from lasp_kernels.delta import DeltaOperands, recurrent_delta_rule

env = lasp.init("gloo", timeout=60)
H, K, V = 1, 16, 8
odd, whole_segments, packed = ((17, 0, 9), None), ((64, 0, 7), None), ((9, 7, 5), (0, 4, 12, 12, 21))
cases = [("none", *odd), ("token", *packed), ("channel", *odd), ("token", *whole_segments)]
for form, lengths, offsets in cases:
    T, N, G = sum(lengths), len(offsets) - 1 if offsets else 1, 2 if offsets else 1
    torch.manual_seed(T)
    shape = {"none": None, "token": (1, T, G * H), "channel": (1, T, G * H, K)}[form]
    q, k, v, do = (torch.randn(1, T, h, n) for h, n in ((H, K), (H, K), (G * H, V), (G * H, V)))
    g = None if shape is None else -torch.rand(shape)
    beta, h, dh = 2 * torch.rand(1, T, G * H), torch.randn(N, G * H, K, V), torch.randn(N, G * H, K, V)
    names, tensors = ("q", "k", "v", "beta", "g", "h"), (q, F.normalize(k, dim=-1), v, beta, g, h)

    def results(function, x, do, dh, **options):
        x = [y if y is None else y.detach().requires_grad_() for y in x]
        o, final = function(*x[:4], log_decay=x[4], initial_state=x[5], scale=0.3, **options)
        leaves = [y for y in x if y is not None]
        found = torch.autograd.grad((o, final), leaves, (do.to(o.dtype), dh.to(final.dtype)))
        return {"o": o, "final": final, **dict(zip([n for n, y in zip(names, x) if y is not None], found))}

    bits = lengths == whole_segments[0]
    if bits:
        options = {"segment_length": 64, "output_final_state": True}
        expected = results(lasp.delta_rule, tensors, do, dh, **options)
    else:
        options = {"output_final_state": True}
        exact = [y if y is None else y.double() for y in tensors]
        cu = None if offsets is None else torch.tensor(offsets)
        expected = results(recurrent_delta_rule, exact, do, dh, cu_seqlens=cu)
    start = sum(lengths[: env.rank])
    mine = slice(start, start + lengths[env.rank])
    local = [y if y is None or y is h else y[:, mine] for y in tensors]
    assert path(DeltaOperands(*local[:5])) == "triton"
    for schedule in ("ring", "pipeline") if bits else ("all_gather",):
        sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
        layout = lasp.ShardLayout(lengths, offsets)
        found = results(
            lasp.delta_rule, local, do[:, mine], dh * (env.rank == 0), layout=layout, sequence=sequence, **options
        )
        assert sequence.traffic.kernels == "triton"
        dist.all_reduce(found["h"])
        for name, x in found.items():
            y = expected[name] if name in ("final", "h") else expected[name][:, mine]
            error = ((x.double() - y).norm() / y.norm().clamp(min=1e-2)).item() if x.numel() else 0.0
            assert x.shape == y.shape and error < (1e-30 if bits else 3e-6), (form, lengths, schedule, name, error)
dist.destroy_process_group()
print("compared")
"""


@pytest.mark.parametrize(
    "script", [COMPARE, SAME_BITS, DELTA], ids=["the recurrence", "the bits of one rank", "the delta rule"]
)
def test_triton_on_three_ranks_gives(script):
    ranks = run_interpreted(script, 3)
    assert all(code == 0 and "compared" in out for code, out, _ in ranks), ranks
