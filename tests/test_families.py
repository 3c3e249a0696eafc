"""The families of `lasp.models.mixers`: the formulas of their papers, token by token in fp64, and models over ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from inputs import assert_close
from ranks import mesh_of, run_ranks
from torch import nn

import lasp
from lasp.models import TNL, Decoder, DecoderConfig, TNLConfig
from lasp.models._linears import norm_linear
from lasp.models.mixers import MIXERS, rotary
from lasp.modules import BlockAttention

VOCABULARY, T = 17, 23
WIDTH, HEADS = 24, 3
BLOCK = 5  # tokens of a block: borders of blocks and ranks differ
CONFIGS = {family: DecoderConfig(family, VOCABULARY, 2, WIDTH, HEADS, 32) for family in MIXERS}
CONFIGS["cosformer2, tpe"] = DecoderConfig("cosformer2", VOCABULARY, 1, WIDTH, HEADS, 32, tpe=True)
CONFIGS["transnormer, hybrid"] = DecoderConfig("transnormer", VOCABULARY, 3, WIDTH, HEADS, 32, pattern="LLS")
CONFIGS["gla, hybrid"] = DecoderConfig("gla", VOCABULARY, 3, WIDTH, HEADS, 32, pattern="LLS")


def model_of(kind):
    torch.manual_seed(0)
    model = Decoder(CONFIGS[kind]).double()
    with torch.no_grad():
        for p in model.parameters():  # what begins at zeros or ones would hide a mistake
            p.add_(0.1 * torch.randn_like(p))
    for module in model.modules():
        if isinstance(module, BlockAttention):
            module.block = BLOCK
    return model


def batch_of(rows, **more):
    draw = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(VOCABULARY, (rows, T), generator=draw), **more}


def loss_of(model, batch, mesh):
    local = lasp.shard_batch(batch, mesh)
    logits = model(local["input_ids"], local["position_ids"], local["layout"])
    return lasp.token_loss(logits, local["labels"], mesh=mesh)[0]


def _parity(kind, batch, streamed):
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    alone, model = model_of(kind), lasp.parallelize(model_of(kind), mesh)
    assert list(model.state_dict()) == list(alone.state_dict())
    serial = loss_of(alone, batch, None)
    serial.backward()
    if streamed:
        loss, _ = lasp.stream_backward(model, batch, mesh=mesh, segment=8)
    else:
        loss = loss_of(model, batch, mesh)
        loss.backward()
    lasp.sync_grads(model, mesh)
    assert_close(loss, serial, "loss", rtol=1e-9)
    for name, p in alone.named_parameters():
        assert p.grad.abs().max() > 1e-7, f"{name} has no gradient to compare"
        assert_close(model.get_parameter(name).grad, p.grad, name, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", CONFIGS)
def test_over_three_ranks(kind):
    run_ranks(3, _parity, kind, batch_of(2), False)


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_documents_in_segments_over_two_ranks(kind):
    offsets = torch.tensor([0, 5, 16, T], dtype=torch.int32)
    run_ranks(2, _parity, kind, batch_of(1, cu_seqlens=offsets), True)


# Of each family: its operators, with the form of decays and what computes them on a CPU.
EXPLAINED = {
    "softmax": {("softmax_attention", "none", "SDPA")},
    "block_softmax": {("halo", "none", "torch")},
    "transnormer": {("halo", "none", "torch"), ("linear_attention", "none", "reference")},
    "cosformer2": {("linear_attention", "none", "reference")},
    "retnet": {("linear_attention", "[H]", "reference")},
    "gla": {("linear_attention", "[B, T, H, K]", "reference")},
    "hgrn2": {("linear_attention", "[B, T, H, K]", "reference")},
    "delta_net": {("halo", "none", "torch"), ("delta_rule", "none", "reference")},
    "gated_delta_net": {("halo", "none", "torch"), ("delta_rule", "[B, T, H]", "reference")},
    "kda": {("halo", "none", "torch"), ("delta_rule", "[B, T, H, K]", "reference")},
    "mamba2": {("halo", "none", "torch"), ("linear_attention", "[B, T, H]", "reference")},
    "hgrn": {("elementwise_recurrence", "[B, T, ...]", "reference")},
    "rglru": {("halo", "none", "torch"), ("elementwise_recurrence", "[B, T, ...]", "reference")},
    "mamba": {("halo", "none", "torch"), ("selective_scan", "dt A", "reference")},
}


def _explained():
    mesh = mesh_of(sp=2)
    for family in MIXERS:
        model = lasp.parallelize(model_of(family), mesh)
        loss_of(model, batch_of(1), mesh)
        report = lasp.explain(model)
        assert {(row.operator, row.decay, row.kernels) for row in report} == EXPLAINED[family], family
        assert all(row.decay in str(report) for row in report)


def test_explain_tells_operators_decays_and_kernels_of_every_family():
    run_ranks(2, _explained)


def recurrence(q, k, v, log_decay=None, beta=None):
    """o of q, k [B, T, H, K], v [B, T, H, V], a log-decay [B, T, H, K] and, for the delta rule, beta [B, T, H]."""
    state, outputs = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), []
    for t in range(q.shape[1]):
        if log_decay is not None:
            state = log_decay[:, t].exp().unsqueeze(-1) * state
        value = v[:, t]
        if beta is not None:
            value = beta[:, t].unsqueeze(-1) * (value - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t].unsqueeze(-1) * value.unsqueeze(-2)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1)


def heads(x, number=HEADS):
    return x.unflatten(-1, (number, -1))


def norm(x, weight=None):
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y if weight is None else y * weight


def conv(layer, x):
    width = layer.weight.shape[1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = sum(layer.weight[:, j] * padded[:, j : j + x.shape[1]] for j in range(width))
    return F.silu(y if layer.bias is None else y + layer.bias)


def turned(x):
    """x times e^{i position theta}, its halves as real and imaginary parts."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1]).double()[:, None] * 10000.0 ** -(torch.arange(half).double() / half)
    return torch.view_as_real(
        torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    ).mT.flatten(-2)


def softmax(m, x, block=10**9):
    q, k, v = turned(heads(m.query(x))), turned(heads(m.key(x))), heads(m.value(x))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    t = torch.arange(x.shape[1])
    scores = scores.masked_fill((t > t[:, None]) | (t // block != t[:, None] // block), -math.inf)
    return m.out(torch.einsum("bhij,bjhv->bihv", scores.softmax(-1), v).flatten(2))


def retnet(m, x):
    q, k, v = turned(heads(m.query(x))), turned(heads(m.key(x))), heads(m.value(x))
    log_decay = torch.log(1 - 2.0 ** (-5 - torch.arange(HEADS).double())).float()  # decays are fp32
    log_decay = log_decay.double()[:, None].expand(*k.shape)
    o = norm(recurrence(q * q.shape[-1] ** -0.5, k, v, log_decay)).flatten(2)
    return m.out(o * F.silu(m.gate(x)))


def gla(m, x):
    q, k, v = (heads(layer(x)) for layer in (m.query, m.key, m.value))
    log_decay = torch.sigmoid(heads(m.decay[1](m.decay[0](x)))).log() / 16
    o = norm(recurrence(q * q.shape[-1] ** -0.5, k, v, log_decay), m.norm.weight).flatten(2)
    return m.out(o * F.silu(m.gate(x)))


def hgrn2(m, x, bound=None):
    gate = torch.sigmoid(m.forget(x))
    gate = gate if bound is None else bound + (1 - bound) * gate
    o = recurrence(heads(F.silu(m.query(x))), heads(1 - gate), heads(m.value(x)), heads(gate.log()))
    return m.out(norm(o.flatten(2)))


def delta(m, x, log_decay=None):
    q, k, v = (
        heads(conv(c, f(x))) for c, f in zip((m.query_conv, m.key_conv, m.value_conv), (m.query, m.key, m.value))
    )
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    o = recurrence(q * q.shape[-1] ** -0.5, k, v, log_decay, torch.sigmoid(m.beta(x)))
    return norm(o, m.norm.weight).flatten(2)


def kda(m, x):
    log_decay = -m.log_rate.exp().unsqueeze(-1) * heads(F.softplus(m.rate[1](m.rate[0](x)) + m.rate_bias))
    return m.out(delta(m, x, log_decay) * torch.sigmoid(m.gate[1](m.gate[0](x))))


def cosformer2(m, x):
    theta = 10000.0 ** (torch.arange(WIDTH).double() * (-2 / WIDTH)).view(HEADS, -1) * m.lrpe.delta.exp()
    angle = torch.arange(x.shape[1])[:, None, None] * theta
    q, k = (heads(F.silu(layer(x))) for layer in (m.query, m.key))
    q, k = (torch.cat([y * angle.cos(), y * angle.sin()], -1) for y in (q, k))
    o = norm(recurrence(q, k, heads(m.value(x))).flatten(2))
    return m.out(o * torch.sigmoid(m.gate[1](m.gate[0](x))))


def norm_attention(m, x):
    q, k = (heads(F.elu(layer(x)) + 1) for layer in (m.query, m.key))
    return m.out(norm(recurrence(q * q.shape[-1] ** -0.5, k, heads(m.value(x))).flatten(2)))


def gated_delta(m, x):
    log_decay = -m.log_rate.exp() * F.softplus(m.rate(x) + m.rate_bias)
    o = delta(m, x, log_decay.unsqueeze(-1).expand(*x.shape[:2], HEADS, WIDTH // HEADS))
    return m.out(o * F.silu(m.gate(x)))


def mamba2(m, x):
    mixed = conv(m.conv, torch.cat([m.value(x), m.keys(x)], -1))
    v, k, q = mixed.split([2 * WIDTH, m.STATE, m.STATE], -1)
    v, step = heads(v, 2 * HEADS), F.softplus(m.rate(x) + m.rate_bias).unsqueeze(-1)
    q, k = (y.unsqueeze(2).expand(-1, -1, 2 * HEADS, -1) for y in (q, k))
    log_decay = (-m.log_rate.exp().unsqueeze(-1) * step).expand(*k.shape)
    o = recurrence(q, k, v * step, log_decay) + v * m.skip.unsqueeze(-1)
    return m.out(norm(o.flatten(2) * F.silu(m.gate(x)), m.norm.weight))


def by_channel(x, log_decay):
    state, outputs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = log_decay[:, t].exp() * state + x[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1)


def hgrn(m, x, bound=None):
    gate = torch.sigmoid(m.forget(x))
    gate = gate if bound is None else bound + (1 - bound) * gate
    h = by_channel((1 - gate) * F.silu(m.value(x)), gate.log())
    return m.out(norm(h, m.norm.weight) * F.silu(m.gate(x)))


def mamba(m, x):
    u = conv(m.conv, m.value(x))
    time, B, C = m.keys(u).split([m.between, m.STATE, m.STATE], -1)
    dt = F.softplus(m.time(time) + m.time_bias).unsqueeze(-1)
    h = by_channel(dt * u.unsqueeze(-1) * B.unsqueeze(2), -dt * m.log_rate.exp())
    return m.out(((h * C.unsqueeze(2)).sum(-1) + m.skip * u) * F.silu(m.gate(x)))


def rglru(m, x):
    padded = F.pad(m.value(x), (0, 0, 3, 0))
    u = sum(m.conv.weight[:, j] * padded[:, j : j + x.shape[1]] for j in range(4)) + m.conv.bias
    opened = [
        torch.sigmoid(torch.cat([heads(u)[:, :, h] @ weight[h] for h in range(HEADS)], -1) + bias)
        for weight, bias in ((m.input_gate, m.input_bias), (m.recurrence_gate, m.recurrence_bias))
    ]
    a = torch.sigmoid(m.rate) ** (8 * opened[1])
    return m.out(by_channel((1 - a * a).sqrt() * opened[0] * u, a.log()) * F.gelu(m.gate(x)))


FORMULAS = {
    "softmax": softmax,
    "block_softmax": lambda m, x: softmax(m, x, BLOCK),
    "transnormer": norm_attention,
    "cosformer2": cosformer2,
    "retnet": retnet,
    "gla": gla,
    "hgrn2": hgrn2,
    "delta_net": lambda m, x: m.out(delta(m, x)),
    "gated_delta_net": gated_delta,
    "kda": kda,
    "mamba2": mamba2,
    "hgrn": hgrn,
    "mamba": mamba,
    "rglru": rglru,
}


@pytest.mark.parametrize("family", MIXERS)
def test_a_mixer_is_its_formula(family):
    mixer = model_of(family).blocks[1].mixer
    x = torch.randn(2, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_close(mixer(x, torch.arange(T)), FORMULAS[family](mixer, x), family, rtol=1e-9, atol=1e-10)


def test_a_toeplitz_positional_encoding_depends_on_the_distance():
    tpe = model_of("cosformer2, tpe").tpe
    x = torch.randn(2, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    decay = torch.sigmoid(tpe.decay).view(-1, 1, 1) ** distance.clamp(min=0) * (distance >= 0)  # [H, T, T]
    o = torch.einsum("hk,hij,hk,bjhv->bihv", tpe.query, decay, tpe.key, heads(x)).flatten(2)
    assert_close(tpe(x, torch.arange(T)), tpe.out(norm(o)), "tpe", rtol=1e-9, atol=1e-10)


def test_transnormer_begins_with_blocks():
    config = DecoderConfig("transnormer", VOCABULARY, 5, WIDTH, HEADS, 32, pattern="LLS")
    assert [config.family_of(layer) for layer in range(5)] == [
        "block_softmax",
        "block_softmax",
        "softmax",
        "transnormer",
        "transnormer",
    ]


@pytest.mark.parametrize("family", ["hgrn", "hgrn2"])
def test_lower_bounds_grow_from_zero(family):
    model = model_of(family)
    bounds = model._lower_bounds()
    assert bounds[0].abs().max() == 0
    assert bounds[1].min() > 0
    assert bounds[1].max() < 1
    mixer, x = model.blocks[1].mixer, torch.randn(1, T, WIDTH, dtype=torch.float64)
    bound = bounds[1].detach()
    expected = FORMULAS[family](mixer, x, bound)
    assert_close(mixer(x, torch.arange(T), None, bound), expected, family, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", ["hgrn", "hgrn2", "rglru"])
def test_a_gate_that_is_shut_leaves_finite_gradients(family):
    """In fp32 sigmoid(-200) is 0."""
    torch.manual_seed(0)
    mixer, more = MIXERS[family](WIDTH, HEADS), ()
    with torch.no_grad():
        if family == "rglru":
            mixer.recurrence_bias.fill_(-200.0)
        else:
            mixer.forget.weight.fill_(-200.0 / WIDTH)
            more = (torch.zeros(WIDTH),)
    o = mixer(torch.ones(1, T, WIDTH), torch.arange(T), None, *more)
    o.square().sum().backward()
    assert o.isfinite().all()
    for name, p in mixer.named_parameters():
        assert p.grad.isfinite().all(), name


def test_rotation_of_far_tokens():
    """Products depend on the difference of positions alone, also in fp32 and millions of tokens away."""
    q, k = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    near, far = ([rotary(x, torch.arange(6) + shift) for x in (q, k)] for shift in (0, 16_000_000))
    products = [torch.einsum("bihk,bjhk->bhij", *pair) for pair in (near, far)]
    assert_close(products[1], products[0], "scores", rtol=1e-4, atol=1e-4)


def test_positions_are_needed_on_a_slice():
    run_ranks(2, _without_positions)


def _without_positions():
    model = lasp.parallelize(model_of("retnet"), mesh_of(sp=2))
    with pytest.raises(ValueError, match="position_ids are needed"):
        model(torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("replaced", [nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-6)])
def test_a_norm_that_was_replaced_is_called(replaced):
    x, layer = torch.randn(2, 3, WIDTH) + 1, nn.Linear(WIDTH, 5, bias=False)
    assert_close(norm_linear(x, replaced, layer)[1], layer(replaced(x)), "output", rtol=1e-5, atol=1e-6)


# Millions of parameters without the table of embeddings, with 64000 tokens in the head.
COUNTS = {
    "scaling-70M": {"tnl": 54.8, "hgrn2": 53.2, "cosformer2": 54.0, "softmax": 53.2},
    "scaling-160M": {"tnl": 141.2, "hgrn2": 134.1, "cosformer2": 136.5, "softmax": 134.1},
    "scaling-410M": {"tnl": 412.9, "hgrn2": 386.7, "cosformer2": 393.3, "softmax": 386.7},
    "scaling-1B": {"tnl": 1306.3, "hgrn2": 1230.9, "cosformer2": 1240.4, "softmax": 1230.9},
    "scaling-3B": {"tnl": 3168.7, "hgrn2": 2939.6, "cosformer2": 2962.5, "softmax": 2939.5},
    "scaling-7B": {"tnl": 7275.0, "hgrn2": 6738.5, "cosformer2": 6772.1, "softmax": 6738.4},
}


@pytest.mark.parametrize("size", COUNTS)
def test_sizes_of_the_scaling_laws_have_about_as_many_parameters_as_they_are_named(size):
    """The paper's "1B" is the farthest off. (Its TNL has a gate of low rank, where this one's has a full matrix.)"""
    named = float(size[len("scaling-") : -1]) * (1 if size.endswith("M") else 1000)
    for family, millions in COUNTS[size].items():
        with torch.device("meta"):
            model = TNL(TNLConfig.named(size)) if family == "tnl" else Decoder(DecoderConfig.named(family, size))
        count = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
        assert count / 1e6 == pytest.approx(millions, abs=0.1)
        assert 0.75 < millions / named < 1.31
