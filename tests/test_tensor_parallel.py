"""Tensor parallelism: loss and every gradient are those of one process, on dp x sp x tp ranks."""

import copy
import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from processes import free_port
from ranks import mesh_of, run_ranks
from scripts import run_script
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.models import TNL, Decoder, DecoderConfig, LinearTransformer, LinearTransformerConfig, TNLConfig
from lasp.models.memory import save_memory
from lasp.models.mixers import MIXERS
from lasp.ranks.parts import Ranks

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
WORDS = 24


def make(family):
    """Small and in fp64, with no weight at a value at which something is not seen."""
    torch.manual_seed(3)
    sizes = {"layers": 2, "width": 16, "heads": 4}
    if family == "tnl":
        model = TNL(TNLConfig(WORDS, **sizes, glu_width=12))
    elif family == "linear_transformer":
        model = LinearTransformer(LinearTransformerConfig(WORDS, **sizes, mlp_width=12))
    else:
        model = Decoder(DecoderConfig(family, WORDS, **sizes, glu_width=12))
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch_of(rows=2, T=13, seed=0):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (rows, T), generator=draw)
    labels = tokens.clone()
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


def loss_of(model, batch, mesh, *, fused=True):
    if mesh is not None:
        rows = len(batch["input_ids"]) // mesh["dp_shard"].size()
        place = mesh["dp_shard"].get_local_rank()
        batch = {name: x[place * rows : (place + 1) * rows] for name, x in batch.items()}
    local = lasp.shard_batch(batch, mesh)
    call = (local["input_ids"], local["position_ids"], local["layout"])
    if fused:
        hidden = model(*call, return_hidden=True)
        return lasp.linear_token_loss(hidden, model.head.weight, local["labels"], mesh=mesh)[0]
    return lasp.token_loss(model(*call), local["labels"], mesh=mesh)[0]


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def split_model(family, mesh):
    model = lasp.parallelize(make(family), mesh["sp"])
    return lasp.tensor_parallel(model, mesh["tp"])


def assert_same(model, expected, of):
    found = dict(model.named_parameters())
    assert set(found) == {name for name, _ in expected.named_parameters()}
    for name, p in expected.named_parameters():
        assert_close(whole(of(found[name])), of(p), msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@functools.cache
def found_alone(family, fused):
    alone = make(family)
    loss = loss_of(alone, batch_of(), None, fused=fused)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in alone.named_parameters()}


def one_process(family, fused):
    """Loss, and a model with its gradients: one worker needs them for several meshes and schemes."""
    alone, (loss, gradients) = make(family), found_alone(family, fused)
    for name, p in alone.named_parameters():
        p.grad = gradients[name].clone()
    return loss, alone


def _gradients(family, sizes, scheme, fused):
    mesh, batch = mesh_of(**sizes), batch_of()
    serial, alone = one_process(family, fused)
    model = split_model(family, mesh)
    if scheme == "fsdp2":
        wrap_fsdp2(model, mesh, blocks=model.blocks)
    loss = loss_of(model, batch, mesh, fused=fused)
    loss.backward()
    if scheme == "sync_grads":
        lasp.sync_grads(model, mesh)
    assert_close(loss, serial, **CLOSE)
    assert_same(model, alone, lambda p: p.grad)
    if scheme == "none" and family != "mamba2":
        parts = [p for name, p in model.named_parameters() if p.to_local().numel() < p.numel()]
        assert len(parts) > 10
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e-3)
    assert_close(whole(norm), expected, **CLOSE)
    assert_same(model, alone, lambda p: p.grad)


# The loss is the last layer's, which decoders share: with each mixer it is taken in one of its two ways.
BOTH_LOSSES = [(family, fused) for family in ("tnl", "linear_transformer") for fused in (True, False)]
ONE_LOSS = [(family, number % 2 == 0) for number, family in enumerate(MIXERS)]


@pytest.mark.any_pytorch
@pytest.mark.parametrize(("family", "fused"), BOTH_LOSSES + ONE_LOSS)
def test_every_gradient_is_that_of_one_process(family, fused):
    run_ranks(2, _gradients, family, {"dp_shard": 1, "sp": 1, "tp": 2}, "none", fused)


def _last_layer_of(model):
    layer = model.blocks[1]
    return layer.mixer if isinstance(model, Decoder) else layer.attention


def _with_bias(family):
    """In the last linear layer of a layer."""
    model = make(family)
    draw = torch.Generator().manual_seed(1)
    layer = _last_layer_of(model)
    weight = layer.out.weight
    layer.out = torch.nn.Linear(weight.shape[1], 16, bias=True, dtype=torch.float64)
    with torch.no_grad():
        layer.out.weight.copy_(weight)
        layer.out.bias.copy_(torch.randn(16, generator=draw, dtype=torch.float64))
    return model


def _more_than_a_weight(family, what):
    mesh, batch = mesh_of(dp_shard=1, sp=1, tp=2), batch_of()
    alone, model = (_with_bias(family) if what == "bias" else make(family) for _ in range(2))
    lasp.tensor_parallel(model, mesh["tp"])
    called = []
    if what == "hook":
        for m in (alone, model):
            for layer in (_last_layer_of(m).out, m.head):
                layer.register_forward_hook(lambda _, args, y: called.append(0) or 3 * y)
    serial, loss = loss_of(alone, batch, None, fused=False), loss_of(model, batch, mesh, fused=False)
    assert len(called) == (4 if what == "hook" else 0)
    serial.backward()
    loss.backward()
    assert_close(loss, serial, **CLOSE)
    assert_same(model, alone, lambda p: p.grad)


@pytest.mark.parametrize("what", [pytest.param("bias", marks=pytest.mark.any_pytorch), "hook"])
@pytest.mark.parametrize("family", ["tnl", "transnormer", "hgrn2", "cosformer2", "gla", "linear_transformer"])
def test_a_last_layer_that_is_more_than_its_weight(family, what):
    run_ranks(2, _more_than_a_weight, family, what)


MESHES = [{"dp_shard": 1, "sp": 2, "tp": 2}, {"dp_shard": 2, "sp": 1, "tp": 2}]


# Each family with both schemes and on both meshes; each scheme on both meshes.
FAMILIES = ["tnl", "gla", "gated_delta_net", "mamba2", "linear_transformer"]
PAIRS = [
    (family, scheme, ("1x2x2", "2x1x2")[(number + (scheme == "fsdp2")) % 2])
    for number, family in enumerate(FAMILIES)
    for scheme in ("sync_grads", "fsdp2")
]


@pytest.mark.any_pytorch
@pytest.mark.parametrize(("family", "scheme", "sizes"), PAIRS)
def test_with_other_axes_every_gradient_is_that_of_one_process(family, scheme, sizes):
    run_ranks(4, _gradients, family, dict(zip(("dp_shard", "sp", "tp"), map(int, sizes.split("x")))), scheme, True)


@pytest.mark.any_pytorch
@pytest.mark.parametrize("family", sorted({"retnet", "hgrn", "hgrn2", "mamba", "softmax", "rglru", "transnormer"}))
def test_families_with_a_split_sequence(family):
    run_ranks(4, _gradients, family, MESHES[0], "sync_grads", False)


def _four_heads():
    run = {"dp_shard": 1, "sp": 1, "tp": 4}
    for family in ("tnl", "mamba2", "cosformer2", "kda"):
        _gradients(family, run, "none", True)


def test_four_ranks_of_tp():
    run_ranks(4, _four_heads)


def _train(sizes, scheme):
    mesh = mesh_of(**sizes)
    alone, model = make("tnl"), split_model("tnl", mesh)
    if scheme == "fsdp2":
        wrap_fsdp2(model, mesh, blocks=model.blocks)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-6) for m in (alone, model)]
    losses = []
    for step in range(3):
        for m, over, optimizer in zip((alone, model), (None, mesh), optimizers):
            optimizer.zero_grad()
            loss = loss_of(m, batch_of(seed=step), over)
            loss.backward()
            if over is not None and scheme == "sync_grads":
                lasp.sync_grads(m, over)
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            optimizer.step()
            losses.append(loss.detach())
    for serial, parallel in zip(losses[::2], losses[1::2]):
        assert_close(parallel, serial, **CLOSE)
    assert_same(model, alone, lambda p: p.detach())
    before = dict(make("tnl").named_parameters())
    assert not any(torch.allclose(p, before[name]) for name, p in alone.named_parameters())


@pytest.mark.parametrize("sizes", MESHES, ids=["1x2x2", "2x1x2"])
@pytest.mark.parametrize("scheme", ["sync_grads", "fsdp2"])
def test_three_clipped_steps_are_those_of_one_process(sizes, scheme):
    run_ranks(4, _train, sizes, scheme)


def _scaled(mesh, family="gla"):
    """Losses, scales and parameters of steps with a GradScaler, of which one part of a gradient overflows in one."""
    model = make(family) if mesh is None else split_model(family, mesh)
    if mesh is not None and mesh["sp"].size() > 1:
        wrap_fsdp2(model, mesh, blocks=model.blocks)
    whole_on_each = [p for p in model.parameters() if p.ndim == 1]
    cut = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.SGD([{"params": whole_on_each}, {"params": cut}], lr=1e-2)  # as without weight decay
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, batch_of(seed=step), mesh)
        scaler.scale(loss).backward()
        if step == 1 and (mesh is None or dist.get_rank() == dist.get_world_size() - 1):
            gradient = dict(model.named_parameters())["blocks.0.mixer.query.weight"].grad
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient)[-1, -1] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        found.append((loss.item(), scaler.get_scale()))
    return found, {name: whole(p.detach()) for name, p in model.named_parameters()}


def _skipped(sizes):
    assert_close(_scaled(mesh_of(**sizes)), _scaled(None), **CLOSE)


@pytest.mark.parametrize("sizes", [{"dp_shard": 1, "sp": 1, "tp": 2}, {"dp_shard": 1, "sp": 2, "tp": 2}])
def test_all_ranks_skip_a_step_if_a_part_overflows_on_one(sizes):
    run_ranks(sizes["sp"] * 2, _skipped, sizes)


def _state_dicts(folder):
    """Of the split model: whole tensors, and a checkpoint that another number of ranks reads."""
    mesh = mesh_of(dp_shard=1, sp=2, tp=2)
    alone, model = make("tnl"), split_model("tnl", mesh)
    wrap_fsdp2(model, mesh, blocks=model.blocks)
    options = StateDictOptions(full_state_dict=True)
    found = get_model_state_dict(model, options=options)
    assert found.keys() == alone.state_dict().keys()
    for name, x in alone.state_dict().items():
        assert torch.equal(found[name], x), name
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    changed = {name: x + 1 for name, x in found.items()}
    set_model_state_dict(model, dict(changed), options=options)  # it writes to what it is given
    for name, x in get_model_state_dict(model, options=options).items():
        assert torch.equal(x, changed[name]), name

    other = lasp.tensor_parallel(make("tnl"), mesh_of(dp_shard=1, sp=1, tp=4)["tp"])
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    there = {"model": get_model_state_dict(other)}
    dcp.load(there, checkpoint_id=folder)
    set_model_state_dict(other, there["model"])
    assert_same(other, alone, lambda p: p.detach())


def test_state_dicts_whole_and_sharded(tmp_path):
    run_ranks(4, _state_dicts, str(tmp_path))


def _on_meta():
    mesh = mesh_of(dp_shard=1, sp=1, tp=2)
    with torch.device("meta"):
        model = make_on_meta()
    lasp.tensor_parallel(model, mesh["tp"])
    assert model.blocks[0].glu.value.weight.shape == (6, 16)
    model.to_empty(device="cpu")
    set_model_state_dict(model, make("tnl").state_dict(), options=StateDictOptions(full_state_dict=True))
    assert_same(model, make("tnl"), lambda p: p.detach())
    loss, serial = loss_of(model.double(), batch_of(), mesh), loss_of(make("tnl"), batch_of(), None)
    assert_close(loss, serial, **CLOSE)


def make_on_meta():
    return TNL(TNLConfig(WORDS, layers=2, width=16, heads=4, glu_width=12)).double()


def _drawn():
    """Weights that each rank draws: of the size they have in one process, no two parts alike, the rest alike."""
    mesh = mesh_of(dp_shard=1, sp=1, tp=2)
    for family in ("tnl", "mamba2", "kda"):
        torch.manual_seed(5)
        model = lasp.tensor_parallel(make(family), mesh["tp"])
        model.init_weights()
        alone = make(family)
        alone.init_weights()
        for name, p in model.named_parameters():
            expected = alone.get_parameter(name)
            if p.to_local().numel() == p.numel():
                both = p.to_local().clone()
                dist.broadcast(both, 0)
                assert torch.equal(both, p.to_local()), name
            elif expected.std() > 0 and p.numel() >= 64:
                first, second = p.full_tensor().chunk(2, 0 if p.placements[0].is_shard(0) else 1)
                assert not torch.equal(first, second), name
                assert 0.5 < p.full_tensor().std() / expected.std() < 2, name
        mine = torch.randint(2**40, ())  # what is drawn next is the same on all ranks again
        first = mine.clone()
        dist.broadcast(first, 0)
        assert mine == first


def test_weights_that_ranks_draw():
    run_ranks(2, _drawn)


def test_a_model_on_the_meta_device():
    run_ranks(2, _on_meta)


def _recompute():
    """Checkpointed blocks, chunks of gated units, and the sequence split, too."""
    mesh = mesh_of(dp_shard=1, sp=2, tp=2)
    alone, model = make("tnl"), split_model("tnl", mesh)
    serial = loss_of(alone, batch_of(), None)
    serial.backward()
    save_memory(model.blocks, recompute=2, chunk=3)
    loss = loss_of(model, batch_of(), mesh)
    loss.backward()
    lasp.sync_grads(model, mesh)
    assert_close(loss, serial, **CLOSE)
    found = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
    for name, p in alone.named_parameters():
        assert_close(whole(found[name].grad), p.grad, **CLOSE)


def test_recomputed_blocks():
    run_ranks(4, _recompute)


def _stream(sharded):
    mesh = mesh_of(dp_shard=1, sp=2, tp=2)
    alone, model = make("tnl"), split_model("tnl", mesh)
    if sharded:
        wrap_fsdp2(model, mesh, blocks=model.blocks)
    batch = batch_of(rows=1, T=26)
    serial = loss_of(alone, batch, None)
    serial.backward()
    loss, _ = lasp.stream_backward(model, batch, mesh=mesh, segment=6)
    if not sharded:
        lasp.sync_grads(model, mesh)
    assert_close(loss, serial.detach(), **CLOSE)
    assert_same(model, alone, lambda p: p.grad)
    assert "the loss is taken in 'head', without logits" in str(lasp.explain(model))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_sequence_in_segments(sharded):
    run_ranks(4, _stream, sharded)


def assert_a_step_as_alone(model, alone, mesh):
    """Loss and gradients of the split model, and of the same whole in one process."""
    serial, loss = loss_of(alone, batch_of(), None), loss_of(model, batch_of(), mesh)
    serial.backward()
    loss.backward()
    lasp.sync_grads(model, mesh)
    assert_close(loss, serial, **CLOSE)
    assert_same(model, alone, lambda p: p.grad)


def _other_order():
    """`tensor_parallel` first: the trial of `parallelize` cannot run, and goes by classes."""
    mesh = mesh_of(dp_shard=1, sp=2, tp=2)
    for family in ("tnl", "gated_delta_net"):
        alone, model = make(family), lasp.tensor_parallel(make(family), mesh["tp"])
        lasp.parallelize(model, mesh["sp"])
        assert_a_step_as_alone(model, alone, mesh)


def test_in_the_other_order():
    run_ranks(4, _other_order)


def _optimizer_of_before():
    mesh, model, other = mesh_of(dp_shard=1, sp=1, tp=2), make("tnl"), make("gla")
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    lasp.tensor_parallel(model, mesh["tp"])
    loss_of(model, batch_of(), mesh).backward()
    text = r"SGD would step on embedding\.weight as it was before lasp\.tensor_parallel, which the model no longer has"
    with pytest.raises(RuntimeError, match=text):
        before.step()
    kept = model.head.weight.full_tensor().detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.head.weight.full_tensor(), kept)
    copied = copy.deepcopy(model)
    torch.optim.SGD([*copied.parameters(), *other.parameters()], lr=0.1).step()


def test_an_optimizer_that_was_made_before_the_split():
    run_ranks(2, _optimizer_of_before)


def test_the_loss_after_another_life_of_the_process_groups():
    """It goes over the new group, and nothing keeps the one of before."""
    body = """
import gc, os, weakref, torch, torch.distributed as dist, lasp
from lasp.models import TNL, TNLConfig
from lasp.ranks.parts import Ranks
kept = []
for life in range(2):
    os.environ["MASTER_PORT"] = PORTS[life]
    lasp.init("gloo", timeout=60.0)
    mesh = lasp.init_mesh(dp_shard=1, tp=2)
    torch.manual_seed(0)
    model = TNL(TNLConfig(24, layers=1, width=16, heads=4, glu_width=12))
    ids = torch.arange(13)[None]
    serial = lasp.linear_token_loss(model(ids, return_hidden=True), model.head.weight, ids, mesh=None)[0]
    lasp.tensor_parallel(model, mesh)
    loss = lasp.linear_token_loss(model(ids, return_hidden=True), model.head.weight, ids, mesh=mesh)[0]
    loss.backward()
    torch.testing.assert_close(loss, serial)
    ranks = Ranks.of(model.head.weight)
    assert ranks.group is mesh["tp"].get_group()
    kept.append(weakref.ref(ranks))
    del ranks, model, mesh, loss, serial
    if life == 0:
        dist.destroy_process_group()
gc.collect()
assert [ref() is None for ref in kept] == [True, False]
"""
    for code, _, errors in run_script(
        body.replace("PORTS", repr([str(free_port()), str(free_port())])), 2, agent=False
    ):
        assert code == 0, errors


def _schemes(scheme, explained):
    mesh = mesh_of(dp_shard=1, sp=2, tp=2)
    alone, model = make("tnl"), split_model("tnl", mesh)
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2)
    model, _ = lasp.data_parallel(model, mesh, scheme=scheme, optimizer=adamw, blocks=model.blocks)
    loss_of(alone, batch_of(), None).backward()
    loss_of(model, batch_of(), mesh).backward()
    assert_same(model, alone, lambda p: p.grad)
    report = str(lasp.explain(model))
    assert "tensor parallel: heads, inner channels and words over 2 ranks" in report
    assert explained in report


@pytest.mark.parametrize("scheme", ["zero2", "zero3", "ddp-legacy"])
def test_schemes_of_data_parallelism(scheme):
    run_ranks(4, _schemes, scheme, f"data parallel: {scheme}")


def test_a_rank_of_tp_that_ends():
    body = """
import os, sys, torch, lasp
from lasp.models import TNL, TNLConfig
env = lasp.init("gloo", timeout=60.0)
torch.manual_seed(0)
model = TNL(TNLConfig(24, layers=2, width=16, heads=4, glu_width=12))
lasp.tensor_parallel(model, lasp.init_mesh(dp_shard=1, tp=2), validate="VALIDATE")
ids = torch.arange(13)[None]
model(ids)
if env.rank == 1:
    model.blocks[1].register_forward_pre_hook(lambda *_: sys.exit("enough"))
loss = model(ids).sum()
"""
    for validate in ("first", "off"):
        found = run_script(body.replace("VALIDATE", validate), 2)
        assert found[1][0] == 1
        assert "PeerError: tensor parallel, blocks.1.attention: the sum, forward, over the ranks of tp" in found[0][2]


def _verify():
    """The split of the sequence, with the ranks of tp together in both runs."""
    mesh = mesh_of(dp_shard=1, sp=2, tp=2)
    for model in (split_model("tnl", mesh), lasp.tensor_parallel(make("gated_delta_net"), mesh["tp"])):
        report = lasp.verify(model, mesh)
        assert "2 ranks compute what one does" in str(report)


def test_verify_of_a_model_that_is_split_twice():
    run_ranks(4, _verify)


def _compiled():
    mesh = mesh_of(dp_shard=1, sp=2, tp=2)
    alone, model = make("tnl"), split_model("tnl", mesh)
    model.blocks[1].compile(backend="aot_eager")  # the other has the same code
    assert_a_step_as_alone(model, alone, mesh)


def test_a_compiled_block():
    run_ranks(4, _compiled)


def _autocast():
    """bf16 in the arithmetic: as near to fp64 as one process is."""
    mesh, batch = mesh_of(dp_shard=1, sp=1, tp=2), batch_of()
    for family in ("tnl", "mamba2"):
        model, alone = lasp.tensor_parallel(make(family).float(), mesh["tp"]), make(family).float()
        exact = loss_of(make(family), batch, None)
        with torch.autocast("cpu", torch.bfloat16):
            found, usual = loss_of(model, batch, mesh), loss_of(alone, batch, None)
        found.backward()
        usual.backward()
        assert abs(found - exact) < 2 * abs(usual - exact) + 0.02
        for (name, p), q in zip(model.named_parameters(), alone.parameters()):
            assert p.grad.dtype == torch.float32
            assert (p.grad.full_tensor() - q.grad).norm() < 0.1 * q.grad.norm() + 1e-5, name


def test_autocast():
    run_ranks(2, _autocast)


def _refused(make_model, tp, error, text):
    mesh = mesh_of(dp_shard=1, sp=1, tp=tp)
    with pytest.raises(error, match=text):
        lasp.tensor_parallel(make_model(), mesh["tp"])
    dist.barrier()  # nothing of it is left over


def _three_heads():
    return TNL(TNLConfig(WORDS, layers=1, width=12, heads=3, glu_width=12))


def _odd_words():
    return TNL(TNLConfig(23, layers=1, width=12, heads=2, glu_width=12))


def _odd_unit():
    return Decoder(DecoderConfig("gla", WORDS, layers=1, width=16, heads=4, glu_width=13))


def _with_experts():
    return Decoder(DecoderConfig("gla", WORDS, layers=1, width=16, heads=4, glu_width=12, experts=4))


def _with_tpe():
    return Decoder(DecoderConfig("gla", WORDS, layers=1, width=16, heads=4, glu_width=12, tpe=True))


def _other_layer():
    """As LoRA does."""
    model = make("tnl")
    model.blocks[1].glu.gate = torch.nn.Sequential(model.blocks[1].glu.gate)
    return model


def _other_mixer():
    class Mine(MIXERS["gla"]):
        pass

    model = make("gla")
    model.blocks[1].mixer.__class__ = Mine
    return model


def _head_with_bias():
    model = make("tnl")
    model.head = torch.nn.Linear(16, WORDS)
    return model


def _head_of_own():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make("tnl")
    model.head = Scaled(16, WORDS, bias=False)
    return model


def _larger_head():
    model = make("tnl")
    model.head = torch.nn.Linear(16, WORDS + 1, bias=False)
    return model


def _embedding_of_own():
    model = make("gla")
    model.embedding = torch.nn.Sequential(model.embedding)
    return model


def _padded():
    model = make("gla")
    model.embedding.padding_idx = 3
    return model


def _bounded():
    model = make("linear_transformer")
    model.embedding.max_norm = 1.0
    return model


def _by_frequency():
    model = make("tnl")
    model.embedding.scale_grad_by_freq = True
    return model


def _sparse():
    model = make("tnl")
    model.embedding.sparse = True
    return model


def _tied():
    model = make("tnl")
    model.head.weight = model.embedding.weight
    return model


def _one_layer_twice():
    model = make("gla")
    model.blocks[1].mixer.key = model.blocks[1].mixer.query
    return model


def _keys_with_bias():
    model = make("mamba")
    keys = model.blocks[0].mixer.keys
    model.blocks[0].mixer.keys = torch.nn.Linear(keys.in_features, keys.out_features)
    return model


def _other_norm():
    model = make("hgrn")
    model.blocks[0].mixer.norm = torch.nn.LayerNorm(16)
    return model


def _wrapped_forward():
    """As accelerate does."""
    model = make("tnl")
    layer = model.blocks[0].glu.out
    layer.forward = functools.partial(torch.nn.Linear.forward, layer)
    return model


def _no_plan():
    return torch.nn.Linear(4, 4)


def _already():
    return lasp.tensor_parallel(make("tnl"), mesh_of(dp_shard=1, sp=1, tp=2)["tp"])


@pytest.mark.parametrize(
    ("make_model", "text"),
    [
        (_three_heads, "the 2 ranks of tp must divide heads of the TNL, got 3"),
        (_odd_words, "the 2 ranks of tp must divide vocab_size of the TNL, got 23"),
        (_odd_unit, "the 2 ranks of tp must divide glu_width of the Decoder, got 13"),
        (_with_experts, "model must have experts = 0 for tensor parallelism, got 4"),
        (_with_tpe, "model must have tpe = False for tensor parallelism, got True"),
        (_other_layer, r"model must have its own layers, got blocks\.1\.glu\.gate, a Sequential"),
        (_other_mixer, r"model must have layers with a plan, got blocks\.1\.mixer, a Mine"),
        (_head_with_bias, "model must have head without bias for tensor parallelism, got one"),
        (_head_of_own, "model must have its own layers, got head, a Scaled"),
        (_larger_head, r"model must have head\.weight of shape \(24, 16\), as its config says, got \(25, 16\)"),
        (_embedding_of_own, "model must have its own layers, got embedding, a Sequential"),
        (_padded, "model must have embedding without padding_idx for tensor parallelism, got 3"),
        (_bounded, "model must have embedding without max_norm for tensor parallelism, got 1.0"),
        (_by_frequency, "model must have embedding without scale_grad_by_freq for tensor parallelism, got True"),
        (_sparse, "model must have embedding without sparse for tensor parallelism, got True"),
        (_tied, r"no parameter at two places .* got embedding\.weight and head\.weight"),
        (_one_layer_twice, r"two places .* got blocks\.1\.mixer\.query\.weight and blocks\.1\.mixer\.key\.weight"),
        (_keys_with_bias, r"model must have blocks\.0\.mixer\.keys without bias"),
        (_other_norm, r"model must have its own layers, got blocks\.0\.mixer\.norm, a LayerNorm"),
        (_wrapped_forward, r"got blocks\.0\.glu\.out, whose `forward` something has replaced"),
        (_no_plan, "model must be one of lasp.models .* got Linear: there is no plan"),
        (_already, "model must be whole, but embedding.weight is split already"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_cannot_be_split_is_refused_on_every_rank(make_model, text):
    run_ranks(2, _refused, make_model, 2, ValueError, text)


def _seeded_by_rank():
    model = make("tnl")
    with torch.no_grad():
        model.blocks[1].glu.out.weight.add_(dist.get_rank())
    return model


def test_ranks_with_other_weights():
    text = "the whole weights of blocks.1.glu.out.weight"
    run_ranks(2, _refused, _seeded_by_rank, 2, lasp.RankMismatchError, text)


def _alone_refused():
    """A model that one rank cannot split, and the other could."""
    return _three_heads() if dist.get_rank() else make("tnl")


def test_one_rank_that_refuses():
    run_ranks(2, _refused, _alone_refused, 2, lasp.RankMismatchError, "rank 1 .*must divide heads of the TNL, got 3")


def _norm_without_eps():
    """nn.RMSNorm takes that of the dtype then. What it norms is small, so that it matters."""
    mesh, batch = mesh_of(dp_shard=1, sp=1, tp=2), batch_of()
    alone, model = make("hgrn"), make("hgrn")
    for m in (alone, model):
        m.blocks[0].mixer.norm.eps = None
        with torch.no_grad():
            m.blocks[0].mixer.value.weight.mul_(1e-3)
    lasp.tensor_parallel(model, mesh["tp"])
    serial, loss = loss_of(alone, batch, None), loss_of(model, batch, mesh)
    serial.backward()
    loss.backward()
    assert_close(loss, serial, **CLOSE)
    assert_same(model, alone, lambda p: p.grad)


def test_a_norm_without_an_eps_of_its_own():
    run_ranks(2, _norm_without_eps)


def _other_tokens():
    """Drawn by the global rank: each rank would sum what belongs to other tokens."""
    mesh = mesh_of(dp_shard=1, sp=1, tp=2)
    model = lasp.tensor_parallel(make("tnl"), mesh["tp"])
    with pytest.raises(
        lasp.RankMismatchError, match=r"the ranks of tp get one batch: .*rank 1 has the tokens .* input_ids"
    ):
        model(batch_of(seed=dist.get_rank())["input_ids"])
    for _ in range(3):
        model(batch_of()["input_ids"])
    with pytest.raises(lasp.RankMismatchError, match="the ranks of tp get one batch"):
        model(batch_of(T=5 + dist.get_rank())["input_ids"])
    assert_close(model(batch_of()["input_ids"]), make("tnl")(batch_of()["input_ids"]), **CLOSE)


def test_ranks_of_tp_with_other_tokens():
    run_ranks(2, _other_tokens)


def _ddp():
    mesh = mesh_of(dp_shard=1, sp=1, tp=2)
    model = lasp.tensor_parallel(make("tnl"), mesh["tp"])
    with pytest.raises(ValueError, match=r"embedding\.weight is a DTensor, as after lasp\.tensor_parallel"):
        wrap_ddp(model, mesh)


def test_ddp_is_refused():
    run_ranks(2, _ddp)


def _totals():
    """What a fused layer asks for in its own backward tells messages so, and has no gradient."""
    ranks = Ranks.of(lasp.tensor_parallel(make("tnl"), mesh_of(dp_shard=1, sp=1, tp=2)["tp"]).head.weight)
    x = torch.ones(3, requires_grad=True)
    told = []
    with mock.patch.object(Ranks, "_what", lambda self, what: told.append(what) or what):
        y = ranks.total(x)
        assert not ranks.total(x.detach(), backward=True).requires_grad
        y.sum().backward()
    assert told == ["the sum, forward,", "the sum, backward,", "the sum, backward,"]
    assert_close(x.grad, torch.full((3,), 2.0))


def test_a_total_says_in_which_direction_it_is():
    run_ranks(2, _totals)


def _one_rank():
    model = make("tnl")
    assert lasp.tensor_parallel(model, None) is model
    assert lasp.tensor_parallel(model, mesh_of(dp_shard=1, sp=2, tp=1)) is model
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert type(model.head) is torch.nn.Linear


def test_one_rank_of_tp_leaves_the_model_alone():
    run_ranks(2, _one_rank)


def _copies():
    mesh = mesh_of(dp_shard=1, sp=1, tp=2)
    model = lasp.tensor_parallel(make("mamba2"), mesh["tp"])
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_close(copied(batch_of()["input_ids"]), make("mamba2")(batch_of()["input_ids"]), **CLOSE)


def test_a_copy_is_split_over_the_same_ranks():
    run_ranks(2, _copies)


def _not_finite():
    mesh = mesh_of(dp_shard=1, sp=2, tp=2)
    model = lasp.parallelize(make("tnl"), mesh["sp"], check_finite=True)
    lasp.tensor_parallel(model, mesh["tp"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, batch_of(), mesh).backward()
    lasp.sync_grads(model, mesh)
    if dist.get_rank() == 3:
        dict(model.named_parameters())["blocks.0.glu.out.weight"].grad.to_local().fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"rank 3: the gradient of blocks\.0\.glu\.out\.weight"):
        optimizer.step()


def test_a_gradient_that_is_not_finite():
    run_ranks(4, _not_finite)
