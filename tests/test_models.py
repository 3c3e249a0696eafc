"""TNL and the linear transformer: their published formulas, and the same model over ranks."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inputs import assert_close
from ranks import mesh_of, run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lasp
from lasp import decay
from lasp.models import TNL, LinearTransformer, LinearTransformerConfig, TNLConfig, _linears
from lasp.models.memory import save_memory
from lasp.models.tnl import LRPE, GatedLinearAttention, SimpleGLU, SimpleRMSNorm
from lasp_kernels import recurrent_linear_attention

VOCABULARY = 17
SMALL = {
    "tnl": (TNL, TNLConfig(VOCABULARY, layers=3, width=12, heads=3, glu_width=16)),
    "tnl without lrpe": (
        TNL,
        TNLConfig(VOCABULARY, layers=2, width=12, heads=3, glu_width=16, decay="tnl", lrpe=False),
    ),
    "linear transformer": (
        LinearTransformer,
        LinearTransformerConfig(VOCABULARY, layers=2, width=12, heads=3, mlp_width=16),
    ),
    "normalised transformer": (
        LinearTransformer,
        LinearTransformerConfig(VOCABULARY, layers=2, width=12, heads=3, mlp_width=16, normalize=True),
    ),
}
EVERY_MODEL = pytest.mark.parametrize("kind", [kind for kind in SMALL if kind != "normalised transformer"])


def small_model(kind):
    torch.manual_seed(0)
    cls, config = SMALL[kind]
    return cls(config).double()


def tokens(T=23, rows=2):
    return torch.randint(VOCABULARY, (rows, T), generator=torch.Generator().manual_seed(0))


def loss_of(model, batch, mesh):
    local = lasp.shard_batch(batch, mesh)
    logits = model(local["input_ids"], local["position_ids"], local.get("layout"))
    return lasp.token_loss(logits, local["labels"], mesh=mesh)[0]


# Over ranks


def _parity(kind, batch, recompute):
    world_mesh = mesh_of(sp=torch.distributed.get_world_size())
    alone, model = small_model(kind), lasp.parallelize(small_model(kind), world_mesh)
    assert list(model.state_dict()) == list(alone.state_dict())
    assert [layer.path for layer in lasp.explain(model)] == [
        f"blocks.{i}.attention.attention" for i in range(len(model.blocks))
    ]
    if recompute:
        for block in model.blocks:
            block.forward = _recomputed(block.forward)
    serial, loss = loss_of(alone, batch, None), loss_of(model, batch, world_mesh)
    assert_close(loss, serial, "loss", rtol=1e-6)
    serial.backward()
    loss.backward()
    lasp.sync_grads(model, world_mesh)
    for name, p in alone.named_parameters():
        assert p.grad.abs().max() > 1e-6, f"{name} has no gradient to compare"
        assert_close(model.get_parameter(name).grad, p.grad, name, rtol=1e-5, atol=1e-8)


def _recomputed(forward):
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


@EVERY_MODEL
@pytest.mark.parametrize("world", [2, 3])
def test_loss_and_gradients_over_ranks_are_those_of_one_process(kind, world):
    run_ranks(world, _parity, kind, {"input_ids": tokens()}, False)


@EVERY_MODEL
def test_packed_documents_over_ranks(kind):
    cu_seqlens = torch.tensor([0, 5, 16, 23], dtype=torch.int32)
    run_ranks(2, _parity, kind, {"input_ids": tokens(rows=1), "cu_seqlens": cu_seqlens}, False)


@pytest.mark.parametrize("kind", ["tnl", "normalised transformer"])
def test_activation_checkpointing_over_ranks(kind):
    run_ranks(2, _parity, kind, {"input_ids": tokens()}, True)


def test_the_normalised_attention_is_that_of_its_paper():
    """arXiv 2006.16236, equation 9: weights phi(q) . phi(k) of the tokens so far, divided by their sum."""
    attention = small_model("normalised transformer").blocks[0].attention
    x = torch.randn(2, 11, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, v = (layer(x).unflatten(-1, (3, -1)) for layer in (attention.query, attention.key, attention.value))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    expected = attention.out(torch.einsum("bhij,bjhv->bihv", weights, v).flatten(2))
    assert_close(attention(x), expected, "attention")


def _empty_shards(kind, lengths, rows):
    """Forward, loss and every gradient; a rank that holds no token takes part all the same."""
    world, rank = len(lengths), torch.distributed.get_rank()
    mesh, T = mesh_of(sp=world), sum(lengths)
    ids = tokens(T, rows)
    alone, model = small_model(kind), lasp.parallelize(small_model(kind), mesh)
    whole = lasp.shard_batch({"input_ids": ids}, None)
    logits = alone(ids, whole["position_ids"])
    serial, _ = lasp.token_loss(logits, whole["labels"], mesh=None)
    layout = lasp.ShardLayout(lengths)
    start, end = layout.bounds(rank)
    for given in (layout, None):  # without one ranks do not know what the others hold
        local = model(ids[:, start:end], whole["position_ids"][:, start:end], given)
        assert_close(local, logits[:, start:end], "logits", rtol=1e-6)
        loss, count = lasp.token_loss(local, whole["labels"][:, start:end], mesh=mesh)
        assert int(count) == rows * max(0, T - 1)
        assert_close(loss, serial, "loss")
        model.zero_grad()
        loss.backward()
        lasp.sync_grads(model, mesh)
        wanted = torch.autograd.grad(serial, list(alone.parameters()), retain_graph=True)
        for (name, p), gradient in zip(model.named_parameters(), wanted):
            assert_close(p.grad, gradient, name, rtol=1e-6)


@EVERY_MODEL
@pytest.mark.parametrize(
    ("lengths", "rows"),
    [((0, 11), 2), ((11, 0), 2), ((0, 6, 5), 2), ((6, 0, 5), 2), ((6, 5, 0), 2), ((0, 0, 3, 0), 1), ((3, 2), 0)],
    ids=str,
)
def test_ranks_without_a_token(kind, lengths, rows):
    run_ranks(len(lengths), _empty_shards, kind, lengths, rows)


def _fewer_tokens_than_ranks(kind, T, pad):
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    batch = {"input_ids": tokens(T, 2)}
    alone, model = small_model(kind), lasp.parallelize(small_model(kind), mesh)
    local = lasp.shard_batch(batch, mesh, pad=pad)
    logits = model(local["input_ids"], local["position_ids"], local["layout"])
    loss, _ = lasp.token_loss(logits, local["labels"], mesh=mesh)
    serial = loss_of(alone, batch, None)
    assert_close(loss, serial, "loss")
    loss.backward()
    serial.backward()
    lasp.sync_grads(model, mesh)
    for name, p in alone.named_parameters():
        assert_close(model.get_parameter(name).grad, p.grad, name, rtol=1e-6)


@EVERY_MODEL
@pytest.mark.parametrize("pad", [True, False])
def test_fewer_tokens_than_ranks(kind, pad):
    run_ranks(4, _fewer_tokens_than_ranks, kind, 2, pad)


@pytest.mark.parametrize("kind", ["tnl", "linear transformer"])
@pytest.mark.parametrize(
    ("ids", "positions", "error", "message"),
    [
        (tokens(3)[0], None, ValueError, r"input_ids must have shape \[B, T\], got \(3,\)"),
        (tokens(3).float(), None, TypeError, "input_ids must be a tensor of integers, got .*float32"),
        ([[1, 2]], None, TypeError, r"input_ids must be a tensor, got \[\[1, 2\]\]"),
        (tokens(3), torch.arange(4), ValueError, r"position_ids must have shape \[B, T\] = \(2, 3\).*got \(4,\)"),
        (tokens(3), torch.zeros(3, 2, 3).long(), ValueError, r"position_ids must have .*got \(3, 2, 3\)"),
        (tokens(3), torch.zeros(3, dtype=torch.bool), TypeError, "position_ids must be a tensor of integers.*bool"),
    ],
    ids=str,
)
def test_tokens_and_positions_that_are_refused(kind, ids, positions, error, message):
    with pytest.raises(error, match=message):
        small_model(kind)(ids, positions)


def _positions_are_needed(kind):
    model = lasp.parallelize(small_model(kind), mesh_of(sp=2))
    with pytest.raises(ValueError, match=r"position_ids are needed when the sequence is split; lasp\.shard_batch"):
        model(tokens())


@pytest.mark.parametrize("kind", ["tnl", "linear transformer"])
def test_positions_are_needed_on_a_slice(kind):
    run_ranks(2, _positions_are_needed, kind)


@pytest.mark.parametrize("kind", ["tnl", "linear transformer"])
def test_positions_count(kind):
    """So that local positions in place of global ones would show in the tests above."""
    model, ids = small_model(kind), tokens()
    whole = model(ids)
    assert_close(model(ids, torch.arange(23)), whole, "default positions")
    broken = torch.arange(23)
    broken[12:] -= 12
    assert (model(ids, broken) - whole).abs().max() > 1e-4


@EVERY_MODEL
def test_packed_documents_are_separate_sequences(kind):
    model, ids = small_model(kind), tokens(rows=1)
    whole = lasp.shard_batch({"input_ids": ids, "cu_seqlens": torch.tensor([0, 9, 23])}, None)
    packed = model(whole["input_ids"], whole["position_ids"], whole["layout"])
    assert_close(packed, torch.cat([model(ids[:, :9]), model(ids[:, 9:])], 1), "logits")


@EVERY_MODEL
def test_causal(kind):
    model, ids = small_model(kind), tokens()
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % VOCABULARY
    assert_close(model(changed)[:, :12], model(ids)[:, :12], "logits before the change")


# Formulas


def test_gated_linear_attention_is_its_formula():
    """x + [norm(attention(swish(h W_q), swish(h W_k), h W_v)) * h W_u] W_o, h = norm(x), and no 1/sqrt(K)."""
    config = TNLConfig(VOCABULARY, layers=2, width=12, heads=3, glu_width=16)
    torch.manual_seed(0)
    layer = GatedLinearAttention(config, 1).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    h = layer.norm(x)
    q, k, v = (
        f(projection(h)).view(2, 9, 3, 4)
        for f, projection in ((F.silu, layer.query), (F.silu, layer.key), (lambda y: y, layer.value))
    )
    o, _ = recurrent_linear_attention(q, k, v, log_decay=decay.alibi(3, 1, 2))
    o = o.flatten(2)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(layer(x, torch.arange(9)), x + layer.out(o * layer.gate(h)), "o")


def test_norm_and_gated_unit_are_their_formulas():
    config = TNLConfig(VOCABULARY, layers=1, width=12, heads=3, glu_width=16)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    norm = SimpleRMSNorm()
    assert_close(norm(x), x * math.sqrt(12) / x.norm(dim=-1, keepdim=True), "norm", rtol=1e-5)
    assert not list(norm.parameters())
    glu = SimpleGLU(config).double()
    h = norm(x)
    assert_close(glu(x), x + glu.out(glu.value(h) * glu.gate(h)), "glu")


def test_a_weight_of_a_class_of_its_own_is_left_to_its_layer(monkeypatch):
    """As libraries for 8 bits put it into a plain nn.Linear."""

    class Packed(Tensor):
        pass

    glu = SimpleGLU(TNLConfig(VOCABULARY, layers=1, width=12, heads=3, glu_width=16))
    for layer in (glu.value, glu.out):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    x = torch.randn(2, 5, 12)
    h = glu.norm(x)
    expected = x + glu.out(glu.value(h) * glu.gate(h))
    for name in ("norm_linear", "gated_linear"):
        monkeypatch.setattr(_linears.kernels, name, None)  # a call of it would be an error
    assert torch.equal(glu(x), expected)


def test_lrpe_depends_on_the_difference_of_positions_only():
    lrpe = LRPE(2, 4)
    q, k = torch.randn(1, 6, 2, 4), torch.randn(1, 6, 2, 4)
    near, far = (lrpe(q, k, torch.arange(6) + shift) for shift in (0, 1000))
    products = [torch.einsum("bihk,bjhk->bhij", *pair) for pair in (near, far)]
    assert near[0].shape == (1, 6, 2, 8)
    assert_close(products[1], products[0], "scores", rtol=1e-3, atol=1e-3)
    assert (products[0] - torch.einsum("bihk,bjhk->bhij", q, k)).abs().max() > 0.1


def test_lrpe_tells_neighbours_apart_in_bf16():
    """bf16 has no integers between 256 and 258: a position in bf16 would be shared."""
    lrpe = LRPE(2, 4).bfloat16()
    q = torch.ones(1, 2, 2, 4, dtype=torch.bfloat16)
    rotated, _ = lrpe(q, q, torch.tensor([256, 257]))
    assert rotated.dtype == torch.bfloat16
    assert not torch.equal(rotated[:, 0], rotated[:, 1])


def test_the_decay_of_every_layer_stays_fp32_in_a_bf16_model():
    config = TNLConfig(VOCABULARY, layers=3, width=12, heads=3, glu_width=16)
    model = TNL(config).bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(tokens()).dtype == torch.bfloat16
    for layer, block in enumerate(model.blocks):
        found = block.attention.attention.log_decay(torch.device("cpu"))
        assert found.dtype == torch.float32
        assert torch.equal(found, decay.alibi(3, layer, 3))


@pytest.mark.parametrize("schedule", ["alibi", "tnl", "retnet", "none"])
def test_decay_by_name(schedule):
    model = TNL(TNLConfig(VOCABULARY, layers=2, width=12, heads=3, glu_width=16, decay=schedule))
    found = [block.attention.attention.log_decay(torch.device("cpu")) for block in model.blocks]
    for layer, x in enumerate(found):
        expected = decay.schedule(schedule, 3, layer, 2)
        assert x is expected is None or torch.equal(x, expected)


@pytest.mark.parametrize("has_lrpe", [True, False])
def test_only_the_first_layer_rotates(has_lrpe):
    model = TNL(TNLConfig(VOCABULARY, layers=3, width=12, heads=3, glu_width=16, lrpe=has_lrpe))
    assert [block.attention.lrpe is not None for block in model.blocks] == [has_lrpe, False, False]


# Sizes and starts


@pytest.mark.parametrize(
    ("cls", "config", "name", "millions"),
    [
        (TNL, TNLConfig, "385M", 385),
        (TNL, TNLConfig, "1B", 1000),
        (TNL, TNLConfig, "7B", 7000),
        (LinearTransformer, LinearTransformerConfig, "385M", 385),
    ],
)
def test_named_sizes_have_about_that_many_parameters(cls, config, name, millions):
    """Counted without the table of embeddings."""
    with torch.device("meta"):
        model = cls(config.named(name))
    count = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    assert count == pytest.approx(millions * 1e6, rel=0.06)


@pytest.mark.parametrize("config", [TNLConfig, LinearTransformerConfig])
def test_tiny_is_small_and_fields_can_be_changed(config):
    tiny = config.named("tiny", vocab_size=256, layers=2)
    assert (tiny.vocab_size, tiny.layers, tiny.width) == (256, 2, 128)
    with pytest.raises(ValueError, match=r"name must be .*tiny.*, got 'huge'"):
        config.named("huge")


@EVERY_MODEL
def test_the_loss_starts_at_the_entropy_of_uniform_predictions(kind):
    loss = loss_of(small_model(kind), {"input_ids": tokens(T=200)}, None)
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=0.2)


@EVERY_MODEL
def test_a_model_from_the_meta_device_is_the_same(kind):
    cls, config = SMALL[kind]
    with torch.device("meta"):
        model = cls(config)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    logits = model(tokens())
    assert logits.isfinite().all()
    assert loss_of(model, {"input_ids": tokens(T=200)}, None).item() == pytest.approx(math.log(VOCABULARY), abs=0.2)


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        (TNLConfig, {"heads": 5}, "width must be a multiple of heads, got 128 and 5"),
        (TNLConfig, {"layers": 0}, "layers must be positive, got 0"),
        (TNLConfig, {"decay": "fast"}, r"decay must be one of \[.*\], got 'fast'"),
        (LinearTransformerConfig, {"heads": 5}, "width must be even and a multiple of heads, got 128 and 5"),
        (LinearTransformerConfig, {"mlp_width": -1}, "mlp_width must be positive, got -1"),
    ],
)
def test_sizes_that_are_refused(config, changed, message):
    with pytest.raises(ValueError, match=message):
        config.named("tiny", **changed)


def test_lrpe_refuses_positions_that_are_not_integers():
    with pytest.raises(TypeError, match=r"position_ids must be a tensor of integers, got .*torch.bfloat16"):
        TNL(SMALL["tnl"][1])(tokens(T=3), torch.arange(3).bfloat16())


# In less memory


def test_recomputed_chunked_and_offloaded_blocks_give_the_same_gradients():
    alone, saving = small_model("tnl"), small_model("tnl")
    save_memory(saving.blocks, recompute=np.int32(2), chunk=np.int32(5), offload=np.int32(1))
    wrappers = [[type(module).__name__ for module in block.modules()][:2] for block in saving.blocks[:2]]
    assert wrappers == [["OffloadWrapper", "CheckpointWrapper"], ["CheckpointWrapper", "Block"]]
    for model in (alone, saving):
        model(tokens(), None, None).square().mean().backward()
    for p, q in zip(alone.parameters(), saving.parameters(), strict=True):
        assert_close(q.grad, p.grad, "gradient")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recompute": 9}, "recompute must be at most the number of blocks, 3, got 9"),
        ({"recompute": 1, "offload": 2}, "offload must be at most the blocks that are recomputed, 1, got 2"),
        ({"recompute": 1, "offload": -1}, "offload must not be negative, got -1"),
    ],
)
def test_memory_is_not_saved_on_more_blocks_than_there_are(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        save_memory(small_model("tnl").blocks, **given)
