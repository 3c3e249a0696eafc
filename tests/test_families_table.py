"""The table of docs/families.md: every row that is said to run, against its recurrence token by token in fp64.

A cell says twice what a family is: by what the table gives, m_t = f(o_t, m_{t-1}) + e_t i_t^T and y_t = m_t^T s_t, in a
loop over the tokens of the whole sequence; and by the call of an operator on each rank's tokens.
"""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from inputs import assert_close
from processes import ROOT
from ranks import run_ranks, sequence_of_all

import lasp
from lasp.models.mixers import MIXERS
from lasp.ops.elementwise import elementwise_recurrence, selective_scan

H, K, V, BLOCK = 2, 4, 3, 5
LENGTHS = {1: (19,), 3: (8, 1, 10)}
QKV = {"q": (H, K), "k": (H, K), "v": (H, V)}


class Cell(NamedTuple):
    """A row of the table: what it is computed from, and in two ways how."""

    tokens: dict[str, tuple[int, ...]]  # random numbers of a token
    direct: Callable  # y of the tokens of the whole sequence
    call: Callable  # y of this rank's tokens; of x and the options of operators
    shared: dict[str, tuple[int, ...]] | None = None  # random numbers that all tokens share


def recur(e, o, s, i, *, matrix=False):
    """y [B, T, H, d] of e, s [B, T, H, k], i [B, T, H, d] and o, [B, T, H, k or 1, d or 1] or a matrix [.., k, k]."""
    e, o, s = (torch.as_tensor(x, dtype=torch.promote_types(i.dtype, torch.as_tensor(x).dtype)) for x in (e, o, s))
    e, s = (x.expand(*i.shape[:3], x.shape[-1] if x.ndim else 1) for x in (e, s))
    o = o.expand(*i.shape[:3], *(o.shape[-2:] if o.ndim >= 2 else (1, 1)))
    memory, outputs = torch.zeros(()), []
    for t in range(i.shape[1]):
        kept = (o[:, t] @ memory if memory.ndim else memory) if matrix else o[:, t] * memory
        memory = kept + e[:, t].unsqueeze(-1) * i[:, t].unsqueeze(-2)
        outputs.append((memory * s[:, t].unsqueeze(-1)).sum(-2))
    return torch.stack(outputs, 1)


def per_channel(x):
    """[..., k] to an oscillation of rows, [..., k, 1]."""
    return x.unsqueeze(-1)


def in_pairs(x):
    """Real [..., 2n] as complex [..., n]."""
    return torch.complex(*x.chunk(2, -1))


def parts(x):
    """Complex [..., n] as real [..., 2n]."""
    return torch.cat([x.real, x.imag], -1)


def turned(x, theta, position):
    """Complex x [B, T, ...] times e^{i theta position}."""
    angle = position.view(-1, *[1] * theta.ndim) * theta
    return x * torch.polar(torch.ones_like(angle), angle)


def phi(x):
    """A positive feature map."""
    return F.elu(x) + 1


def unit(x):
    return F.normalize(x, dim=-1)


def fixed(heads=H):
    """Log-decays of heads."""
    return -0.3 * torch.arange(1, heads + 1, dtype=torch.float64)


ANGLES = torch.tensor([[0.9, 0.2], [0.5, 0.01]], dtype=torch.float64)  # of H heads and K / 2 pairs
CELLS = {
    "linear attention": Cell(
        QKV,
        lambda x: recur(phi(x.k), 1.0, phi(x.q), x.v),
        lambda x, **o: lasp.linear_attention(phi(x.q), phi(x.k), x.v, **o)[0],
    ),
    "Lightning, TNL": Cell(
        QKV,
        lambda x: recur(F.silu(x.k), fixed().exp().view(H, 1, 1), F.silu(x.q), x.v),
        lambda x, **o: lasp.linear_attention(F.silu(x.q), F.silu(x.k), x.v, log_decay=fixed(), **o)[0],
    ),
    "Mamba-2": Cell(
        {"C": (H, K), "B": (H, K), "x": (H, V), "dt": (H,)},
        lambda x: recur(
            x.B, torch.exp(-F.softplus(x.dt) * x.a.exp())[..., None, None], x.C, F.softplus(x.dt).unsqueeze(-1) * x.x
        ),
        lambda x, **o: lasp.linear_attention(
            x.C, x.B, F.softplus(x.dt).unsqueeze(-1) * x.x, log_decay=-F.softplus(x.dt) * x.a.exp(), **o
        )[0],
        {"a": (H,)},
    ),
    "GLA": Cell(
        {**QKV, "g": (H, K)},
        lambda x: recur(x.k, per_channel(torch.sigmoid(x.g) ** (1 / 16)), x.q, x.v),
        lambda x, **o: lasp.linear_attention(x.q, x.k, x.v, log_decay=F.logsigmoid(x.g) / 16, **o)[0],
    ),
    "HGRN2": Cell(
        {"q": (H, K), "f": (H, K), "v": (H, V)},
        lambda x: recur(1 - torch.sigmoid(x.f), per_channel(torch.sigmoid(x.f)), F.silu(x.q), x.v),
        lambda x, **o: lasp.linear_attention(F.silu(x.q), torch.sigmoid(-x.f), x.v, log_decay=F.logsigmoid(x.f), **o)[
            0
        ],
    ),
    "RWKV-6 without bonus": Cell(
        {**QKV, "w": (H, K)},
        lambda x: recur(x.k, per_channel(torch.exp(-x.w.exp())), x.q, x.v),
        lambda x, **o: lasp.linear_attention(x.q, x.k, x.v, log_decay=-x.w.exp(), **o)[0],
    ),
}


def normalised(x):
    number = recur(phi(x.k), 1.0, phi(x.q), F.pad(x.v, (0, 1), value=1.0))
    return number[..., :-1] / number[..., -1:]


def normalised_call(x, **options):
    return lasp.linear_attention(phi(x.q), phi(x.k), x.v, normalize=True, **options)[0]


CELLS["linear attention, normalised"] = Cell(QKV, normalised, normalised_call)


# Oscillations that turn: complex numbers in the recurrence; in the call queries and keys that are turned before it


def retnet(x):
    turn = torch.polar(fixed().exp().unsqueeze(-1).expand(H, K // 2), ANGLES)
    return recur(in_pairs(x.k).conj(), per_channel(turn), in_pairs(x.q), x.v).real


def retnet_call(x, **options):
    q, k = (parts(turned(in_pairs(y), ANGLES, x.position)) for y in (x.q, x.k))
    return lasp.linear_attention(q, k, x.v, log_decay=fixed(), **options)[0]


def lrpe(x, decay):
    theta = x.theta.exp()
    turn = decay.exp().unsqueeze(-1) * torch.polar(torch.ones_like(theta), theta)
    return recur(F.silu(x.k), per_channel(turn), F.silu(x.q), x.v).real


def lrpe_call(x, decay, **options):
    angle = x.position[:, None, None] * x.theta.exp()
    q, k = (torch.cat([F.silu(y) * angle.cos(), F.silu(y) * angle.sin()], -1) for y in (x.q, x.k))
    return lasp.linear_attention(q, k, x.v, log_decay=decay, **options)[0]


CELLS |= {
    "RetNet": Cell(QKV, retnet, retnet_call),
    "cosFormer2 (LRPE)": Cell(
        QKV, lambda x: lrpe(x, torch.zeros(H)), lambda x, **o: lrpe_call(x, None, **o), {"theta": (H, K)}
    ),
    "TNL, first layer (LRPE-d)": Cell(
        QKV, lambda x: lrpe(x, fixed()), lambda x, **o: lrpe_call(x, fixed(), **o), {"theta": (H, K)}
    ),
}


# Matrices


def delta(x, decay):
    k, beta = unit(x.k), torch.sigmoid(x.beta).unsqueeze(-1)
    turn = torch.eye(K) - beta.unsqueeze(-1) * k.unsqueeze(-1) * k.unsqueeze(-2)
    return recur(beta * k, turn * decay.exp().unsqueeze(-2), x.q, x.v, matrix=True)


def delta_call(x, decay, **options):
    return lasp.delta_rule(x.q, unit(x.k), x.v, torch.sigmoid(x.beta), log_decay=decay, **options)[0]


def convolution(x):
    W = x.weight.shape[1]
    shift = torch.diag(torch.ones(W - 1), 1)  # what is new stands last, and moves up
    newest = torch.eye(W)[-1]
    channels = x.x.unsqueeze(-1)  # each as a head of one number
    return recur(newest, shift, x.weight, channels, matrix=True).squeeze(-1)


CELLS |= {
    "DeltaNet": Cell(
        {**QKV, "beta": (H,)},
        lambda x: delta(x, torch.zeros(1)),
        lambda x, **o: delta_call(x, None, **o),
    ),
    "Gated DeltaNet": Cell(
        {**QKV, "beta": (H,), "g": (H,)},
        lambda x: delta(x, F.logsigmoid(x.g).unsqueeze(-1)),
        lambda x, **o: delta_call(x, F.logsigmoid(x.g), **o),
    ),
    "KDA": Cell(
        {**QKV, "beta": (H,), "g": (H, K)},
        lambda x: delta(x, F.logsigmoid(x.g)),
        lambda x, **o: delta_call(x, F.logsigmoid(x.g), **o),
    ),
    "short convolution": Cell(
        {"x": (5,)}, convolution, lambda x, **o: lasp.causal_conv(x.x, x.weight, **o), {"weight": (5, 4)}
    ),
}


# One number a channel, or several


def channels(o, i):
    """h [B, T, D] with o and i of that shape."""
    return recur(1.0, o[:, :, None, None], 1.0, i.unsqueeze(2)).squeeze(2)


def mamba(x):
    dt, A = F.softplus(x.dt), -x.A.exp()
    o = torch.exp(dt.unsqueeze(2) * A.mT).unsqueeze(2)  # [B, T, 1, N, D]
    return recur(x.B.unsqueeze(2), o, x.C.unsqueeze(2), (dt * x.u).unsqueeze(2)).squeeze(2)


def rg_lru(x):
    decay = 8 * F.logsigmoid(x.rate) * torch.sigmoid(x.r)
    return decay, (-torch.expm1(2 * decay)).sqrt() * torch.sigmoid(x.i) * x.x


def hgrn(x):
    f = torch.sigmoid(x.f)
    o = f * torch.polar(torch.ones_like(x.theta), x.theta)
    return parts(channels(o, (1 - f) * in_pairs(x.c)))


def hgrn_call(x, **options):
    """Turned back by the position, what turns is at rest."""
    turned_back = parts(turned((1 - torch.sigmoid(x.f)) * in_pairs(x.c), -x.theta, x.position))
    h = elementwise_recurrence(turned_back, F.logsigmoid(x.f).repeat(1, 1, 2), **options)
    return parts(turned(in_pairs(h), x.theta, x.position))


def s4(x):
    """A state of K / 2 complex numbers for each of V channels, which are the heads."""
    o = torch.polar(torch.exp(-x.a.exp()), x.theta)
    return recur(in_pairs(x.B), per_channel(o), in_pairs(x.C), x.u.unsqueeze(-1)).real.squeeze(-1)


def s4_call(x, **options):
    shape = (*x.u.shape, K // 2)
    q = parts(turned(in_pairs(x.C).expand(shape), x.theta, x.position))
    k = parts(turned(in_pairs(x.B).conj().expand(shape), x.theta, x.position))
    decay = -x.a.exp().repeat(1, 2).expand(*x.u.shape, K)
    return lasp.linear_attention(q, k, x.u.unsqueeze(-1), log_decay=decay, **options)[0].squeeze(-1)


def s5(x):
    """A state of three complex numbers of all channels."""
    o = torch.polar(torch.exp(-x.a.exp()), x.theta).expand(*x.u.shape[:2], -1)
    return (channels(o, x.u.to(torch.complex128) @ in_pairs(x.B)) @ in_pairs(x.C).mT).real


def s5_call(x, **options):
    inputs = parts(turned(x.u.to(torch.complex128) @ in_pairs(x.B), -x.theta, x.position))
    h = elementwise_recurrence(inputs, -x.a.exp().repeat(2).expand_as(inputs), **options)
    return (turned(in_pairs(h), x.theta, x.position) @ in_pairs(x.C).mT).real


CELLS |= {
    "Mamba": Cell(
        {"u": (V,), "dt": (V,), "B": (K,), "C": (K,)},
        mamba,
        lambda x, **o: selective_scan(x.u, F.softplus(x.dt), -x.A.exp(), x.B, x.C, **o),
        {"A": (V, K)},
    ),
    "HGRN": Cell({"f": (V,), "c": (2 * V,)}, hgrn, hgrn_call, {"theta": (V,)}),
    "RG-LRU": Cell(
        {"x": (V,), "r": (V,), "i": (V,)},
        lambda x: channels(rg_lru(x)[0].exp(), rg_lru(x)[1]),
        lambda x, **o: elementwise_recurrence(rg_lru(x)[1], rg_lru(x)[0], **o),
        {"rate": (V,)},
    ),
    "S4, diagonal": Cell({"u": (V,)}, s4, s4_call, {"a": (V, K // 2), "theta": (V, K // 2), "B": (V, K), "C": (V, K)}),
    "S5": Cell({"u": (V,)}, s5, s5_call, {"a": (3,), "theta": (3,), "B": (V, 6), "C": (V, 6)}),
}


# What is not an oscillation of one state


def rwkv(x):
    """The state before the token, and the token itself by its bonus."""
    before = [F.pad(y, (0, 0, 0, 0, 1, 0))[:, :-1] for y in (x.k, x.v, -x.w.exp())]
    y = recur(before[0], per_channel(before[2].exp()), x.q, before[1])
    return y + (x.q * x.bonus * x.k).sum(-1, keepdim=True) * x.v


def rwkv_call(x, **options):
    before = lasp.halo(torch.cat([x.k, x.v, -x.w.exp()], -1), 2, **options)[:, :-1]
    k, v, decay = before.split([K, V, K], -1)
    o, _ = lasp.linear_attention(x.q, k, v, log_decay=decay, **options)
    return o + (x.q * x.bonus * x.k).sum(-1, keepdim=True) * x.v


def softmax(x, block=10**9):
    """The memory is all keys and values so far, or those of the block."""
    outputs = []
    for t in range(x.q.shape[1]):
        first = t // block * block
        scores = torch.einsum("bhk,bjhk->bjh", x.q[:, t], x.k[:, first : t + 1]) / math.sqrt(K)
        outputs.append(torch.einsum("bjh,bjhv->bhv", scores.softmax(1), x.v[:, first : t + 1]))
    return torch.stack(outputs, 1)


def normed(x):
    return F.rms_norm(x.flatten(2), (H * V,), eps=1e-6)


CELLS |= {
    "RWKV-6": Cell({**QKV, "w": (H, K)}, rwkv, rwkv_call, {"bonus": (H, K)}),
    "TransNormer, NormAttention": Cell(
        QKV,
        lambda x: normed(recur(phi(x.k), 1.0, phi(x.q), x.v)),
        lambda x, **o: normed(lasp.linear_attention(phi(x.q), phi(x.k), x.v, **o)[0]),
    ),
    "TransNormer, DiagAttention": Cell(
        QKV, lambda x: softmax(x, BLOCK), lambda x, **o: lasp.block_attention(x.q, x.k, x.v, BLOCK, **o)
    ),
    "softmax": Cell(QKV, softmax, lambda x, **o: lasp.softmax_attention(x.q, x.k, x.v, **o)),
}


def inputs_of(cell, batch=2):
    draw = torch.Generator().manual_seed(3)
    T = sum(LENGTHS[1])
    tokens = {n: torch.randn(batch, T, *shape, generator=draw, dtype=torch.float64) for n, shape in cell.tokens.items()}
    shared = {
        n: 0.5 * torch.randn(shape, generator=draw, dtype=torch.float64) for n, shape in (cell.shared or {}).items()
    }
    return tokens, shared


def gradients(x, y, do):
    return dict(zip(x, torch.autograd.grad(y, list(x.values()), do)))


def _as_its_recurrence(name):
    cell, lengths = CELLS[name], LENGTHS[dist.get_world_size()]
    rank, T = dist.get_rank(), sum(lengths)
    mine = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    tokens, shared = inputs_of(cell)

    whole = {n: x.clone().requires_grad_() for n, x in {**tokens, **shared}.items()}
    expected = cell.direct(SimpleNamespace(**whole, position=torch.arange(T)))
    do = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    of_whole = gradients(whole, expected, do)

    local = {n: x[:, mine].clone().requires_grad_() for n, x in tokens.items()}
    local |= {n: x.clone().requires_grad_() for n, x in shared.items()}
    x = SimpleNamespace(**local, position=torch.arange(T)[mine])
    y = cell.call(x, layout=lasp.ShardLayout(lengths), sequence=sequence_of_all())
    assert_close(y, expected[:, mine], "y", rtol=1e-10, atol=1e-11)
    for n, found in gradients(local, y, do[:, mine]).items():
        gradient = of_whole[n][:, mine] if n in tokens else of_whole[n]
        if n in shared:  # each rank has what its tokens give
            found = found.contiguous()
            dist.all_reduce(found)
        assert of_whole[n].abs().max() > 1e-3, f"{n} has no gradient to compare"
        assert_close(found, gradient, f"gradient of {n}", rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ranks", LENGTHS)
@pytest.mark.parametrize("name", CELLS)
def test_a_row_is_its_recurrence(name, ranks):
    run_ranks(ranks, _as_its_recurrence, name)


# The document


def rows():
    """Cells of the table's rows, by the first."""
    text = (ROOT / "docs" / "families.md").read_text()
    (table,) = re.findall(r"^\| family \|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    lines = [line for line in table.splitlines() if line[:2] == "| "]
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert {len(line) for line in table} == {len(table[0])} == {8}
    return {line[0]: dict(zip(table[0], line)) for line in table[1:]}


def test_what_the_document_says_to_run_has_a_cell_and_the_other_way_round():
    table = rows()
    runs = {name for name, row in table.items() if row["runs"] == "yes"}
    assert runs == set(CELLS)
    for name, row in table.items():
        assert name in runs or re.fullmatch(r"no: .{20,}", row["runs"]), name
        for column in ("expand e", "oscillation o", "shrink s", "input i"):
            marks = re.search(r"\((data|learned|fixed)(, (data|learned|fixed))*\)$", row[column])
            assert marks or row[column] in ("1 (fixed)", "-"), (name, column)


def test_the_document_names_code_that_there_is():
    """Every `lasp.function` of the table, and every mixer."""
    table = rows()
    code = " ".join(row["code"] for row in table.values())
    for path in re.findall(r"`lasp\.([\w.]+)", code):
        found = lasp
        for part in path.split("."):
            found = getattr(found, part)
    mixers = {name for row in table.values() for name in re.findall(r"mixer `(\w+)`", row["code"])}
    assert mixers == set(MIXERS)
