"""Models whose code comes with their weights, on slices of a sequence: against one process, in fp64."""

import copy

import pytest
import torch
from ranks import mesh_of, run_ranks

import lasp

pytest.importorskip("transformers", reason="needs the extra `transformers`")

import foreign
import remote_models
from foreign import loss_of, relative

from lasp.adapters import remote_code

TOKENS = 83


def batch_of(mask=None, cu_seqlens=None):
    return foreign.batch_of(TOKENS, mask, cu_seqlens)


def compare(name, batch):
    torch.set_num_threads(1)
    world = torch.distributed.get_world_size()
    mesh = mesh_of(sp=world)
    reference, whole = remote_models.build(name), lasp.shard_batch(batch, None)
    mask = whole.get("attention_mask")
    offsets = batch.get("cu_seqlens", (0, TOKENS))
    documents = [whole["input_ids"][:, a:b] for a, b in zip(offsets, offsets[1:])]
    logits = torch.cat([reference(ids, attention_mask=mask).logits for ids in documents], 1)
    loss = loss_of(logits, whole["labels"]) / (whole["labels"] != -100).sum()
    loss.backward()
    model = remote_models.build(name)
    lasp.parallelize(model, mesh["sp"])
    local = lasp.shard_batch(batch, mesh, pad=False)
    given = {key: local[key] for key in ("input_ids", "attention_mask", "layout") if key in local}
    got = model(**given).logits
    start, end = local["layout"].bounds(mesh["sp"].get_local_rank())
    real = torch.ones_like(local["input_ids"]) if mask is None else local["attention_mask"]
    assert relative(got[real != 0], logits[:, start:end][real != 0]) < 1e-11
    tokens = (whole["labels"] != -100).sum()
    part = loss_of(got, local["labels"]) / tokens
    total = part.detach().clone()
    torch.distributed.all_reduce(total)
    assert relative(total, loss) < 1e-12
    (part * world).backward()
    lasp.sync_grads(model, mesh)
    pairs = zip(model.named_parameters(), reference.parameters())
    worst = {key: relative(p.grad, r.grad) for (key, p), r in pairs}
    assert max(worst.values()) < 1e-11, sorted(worst.items(), key=lambda x: -x[1])[:5]
    assert set(model.state_dict()) == set(reference.state_dict())
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**given).logits, got)


def streamed(name):
    """Segment by segment: what counts positions from where a slice begins counts from where the segment does."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    model = remote_models.build(name)
    lasp.parallelize(model, mesh["sp"], strict=False)
    for offsets in ((0, TOKENS), (0, 11, 12, 40, TOKENS)):
        packed = len(offsets) > 2
        batch = batch_of(cu_seqlens=list(offsets)) if packed else batch_of()
        reference, whole = remote_models.build(name), lasp.shard_batch(batch, None)
        documents = [whole["input_ids"][:, a:b] for a, b in zip(offsets, offsets[1:])]
        logits = torch.cat([reference(ids).logits for ids in documents], 1)
        (loss_of(logits, whole["labels"]) / (whole["labels"] != -100).sum()).backward()
        lasp.stream_backward(model, batch, mesh=mesh, segment=32)
        lasp.sync_grads(model, mesh)
        pairs = zip(model.named_parameters(), reference.parameters())
        worst = {key: relative(p.grad, r.grad) for (key, p), r in pairs if r.grad is not None}
        assert max(worst.values()) < 1e-11, sorted(worst.items(), key=lambda x: -x[1])[:5]
        model.zero_grad()


@pytest.mark.parametrize("name", remote_models.MODELS)
@pytest.mark.parametrize("world", [1, 2])
def test_streamed_segments_and_one_process_agree(world, name):
    run_ranks(world, streamed, name)


@pytest.mark.parametrize("name", remote_models.MODELS)
@pytest.mark.parametrize("world", [2, 3])
def test_one_process_and_slices_agree(world, name):
    run_ranks(world, compare, name, batch_of())


@pytest.mark.parametrize("name", remote_models.MODELS)
def test_padding_before_and_behind(name):
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, :35] = 0
    mask[1, 70:] = 0
    run_ranks(3, compare, name, batch_of(mask))


@pytest.mark.parametrize("name", remote_models.MODELS)
def test_packed_documents_are_each_alone(name):
    run_ranks(3, compare, name, batch_of(cu_seqlens=[0, 5, 6, 50, 70, TOKENS]))


def decays_seen(name, dtype):
    """What each linear layer is split with, where the model was made and cast in 16 bits."""
    mesh = mesh_of(sp=2)
    torch.set_default_dtype(dtype)
    try:
        model = remote_models.build(name, dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    lasp.parallelize(model, mesh["sp"], strict=False)
    local = lasp.shard_batch(batch_of(), mesh)
    seen = []
    genuine = remote_code.linear_attention
    remote_code.linear_attention = lambda *a, **k: seen.append(k["log_decay"]) or genuine(*a, **k)
    try:
        with torch.no_grad():
            model(local["input_ids"], layout=local["layout"])
    finally:
        remote_code.linear_attention = genuine
    slopes = torch.tensor(remote_models.alibi(6), dtype=torch.float64)
    first = 1 if name == "ring" else 0
    layers = [i for i, m in enumerate(model.layers) if "Linear" in type(m).__name__ or "Lightning" in type(m).__name__]
    for i, found in zip(layers, seen):
        exact = -slopes * (1 - (i - first) / 3 + 1e-5)
        assert found.dtype == torch.float32
        assert relative(found.double(), exact) < 1e-6, (i, found, exact)
    assert len(seen) == len(layers)


@pytest.mark.parametrize("name", remote_models.MODELS)
def test_decays_are_those_of_the_formula_in_16_bits(name):
    run_ranks(2, decays_seen, name, torch.bfloat16)


def made_once():
    """Decays of Ring-linear are made of the code's formula once, and those of an evaluation serve a training."""
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(remote_models.build("ring"), mesh["sp"], strict=False)
    local = lasp.shard_batch(batch_of(), mesh)
    kind = next(type(m) for m in model.layers if hasattr(m, "build_slope_tensor"))
    formula, made = kind.build_slope_tensor, []
    kind.build_slope_tensor = staticmethod(lambda heads: made.append(heads) or formula(heads))
    try:
        with torch.inference_mode():
            evaluated = model(local["input_ids"], layout=local["layout"]).logits
        for _ in range(2):
            trained = model(local["input_ids"], layout=local["layout"]).logits
            trained.sum().backward()
    finally:
        kind.build_slope_tensor = staticmethod(formula)
    assert made == [6, 6]  # of two layers
    assert torch.equal(trained, evaluated)


def test_decays_are_made_once():
    run_ranks(2, made_once)


def refusals():
    mesh = mesh_of(sp=2)
    local = lasp.shard_batch(batch_of(), mesh)
    model = lasp.parallelize(remote_models.build("minimax"), mesh["sp"])
    with pytest.raises(
        ValueError, match="use_cache=True cannot be used where the sequence of MiniMaxText01ForCausalLM"
    ):
        model(local["input_ids"], use_cache=True, layout=local["layout"])
    layer = model.layers[0]
    layer.register_forward_pre_hook(lambda m, args, kwargs: (args, {**kwargs, "slope_rate": None}), with_kwargs=True)
    with pytest.raises(ValueError, match=r"slope_rate of layer 'layers\.0' is None: the model's own gradient check"):
        model(local["input_ids"], layout=local["layout"])
    other = remote_models.build("minimax")
    del other.layers[0].output_gate
    with pytest.raises(ValueError, match="has no output_gate: its adapter is for another version of that code"):
        lasp.parallelize(other, mesh["sp"], strict=False)


def test_what_cannot_be_split_is_refused():
    run_ranks(2, refusals)


def verified(name):
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(remote_models.build(name), mesh["sp"])
    found = lasp.verify(model, mesh)
    assert found.ok, found


@pytest.mark.parametrize("name", remote_models.MODELS)
def test_verify_runs_the_whole_as_it_came(name):
    run_ranks(2, verified, name)
