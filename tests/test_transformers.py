"""Models of transformers on slices of a sequence: logits, loss and every gradient against one process, in fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ranks import mesh_of, run_ranks

import lasp

pytest.importorskip("transformers", reason="needs the extra `transformers`")

import foreign

TOKENS = 83


def loss_of(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def whole_of(name, dtype, **batch):
    """One process on the whole batch: the model, its logits and the mean loss."""
    model = foreign.build(name, dtype)
    inputs = {key: x for key, x in batch.items() if key in ("input_ids", "attention_mask")}  # positions from 0
    logits = model(**inputs, use_cache=False).logits
    loss = loss_of(logits, batch["labels"]) / (batch["labels"] != -100).sum()
    return model, logits, loss


def compare(name, dtype=torch.float64, checkpointing=False, mask=None, bound=1e-11):
    """On each rank: what is worst."""
    torch.set_num_threads(1)
    world = torch.distributed.get_world_size()
    mesh = mesh_of(sp=world)
    ids = torch.randint(3, 97, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids}
    if mask is not None:
        batch["attention_mask"] = mask
        first = (mask.cumsum(1) == 1) & (mask == 1)  # what a padded token would predict
        batch["labels"] = torch.where((mask == 0) | first, -100, ids)
    whole = lasp.shard_batch(batch, None)
    reference, logits, loss = whole_of(name, dtype, **whole)
    model = foreign.build(name, dtype)
    lasp.parallelize(model, mesh["sp"])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    local = lasp.shard_batch(batch, mesh, pad=False)
    inputs = {key: local[key] for key in ("input_ids", "attention_mask") if key in local}  # positions are filled in
    got = model(**inputs, layout=local["layout"]).logits
    start, end = local["layout"].bounds(mesh["sp"].get_local_rank())
    real = torch.ones(2, end - start, dtype=torch.bool) if mask is None else mask[:, start:end] != 0
    assert foreign.relative(got[real], logits[:, start:end][real]) < bound
    loss.backward()
    part, tokens = loss_of(got, local["labels"]), (whole["labels"] != -100).sum()
    (part * world / tokens).backward()
    lasp.sync_grads(model, mesh)
    pairs = zip(model.named_parameters(), reference.parameters())
    worst = {name: foreign.relative(p.grad, r.grad) for (name, p), r in pairs if r.grad is not None}
    assert max(worst.values()) < bound, sorted(worst.items(), key=lambda x: -x[1])[:5]
    assert set(model.state_dict()) == set(reference.state_dict())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        again = copied(**inputs, layout=local["layout"]).logits
    assert torch.equal(again, got.detach())
    return max(worst.values())


READY = list(foreign.MODELS)


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("world", [2, 3])
def test_one_process_and_slices_agree(world, name):
    run_ranks(world, compare, name)


@pytest.mark.parametrize("name", READY)
def test_checkpointed_by_the_library_s_own_switch(name):
    run_ranks(2, compare, name, torch.float64, True)


def padded(left):
    """Of two rows one is whole; the other has padding over the first or the last rank, and more."""
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, slice(0, 45) if left else slice(TOKENS - 45, None)] = 0
    return mask


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", READY)
def test_padding_is_seen_by_no_token(name, left):
    run_ranks(2, compare, name, torch.float64, False, padded(left))


OFFSETS = (0, 11, 12, 40, 71, 83)  # with three ranks one document lies on two borders


def compare_packed(name, checkpointing=False, bound=1e-11):
    """Each document's logits and gradients are those of the document alone."""
    torch.set_num_threads(1)
    world = torch.distributed.get_world_size()
    mesh = mesh_of(sp=world)
    ids = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    whole = lasp.shard_batch({"input_ids": ids, "cu_seqlens": OFFSETS}, None)
    reference = foreign.build(name)
    pairs = list(zip(OFFSETS, OFFSETS[1:]))
    logits = torch.cat([reference(ids[:, a:b], use_cache=False).logits for a, b in pairs], 1)
    tokens = (whole["labels"] != -100).sum()
    (loss_of(logits, whole["labels"]) / tokens).backward()

    model = foreign.build(name)
    lasp.parallelize(model, mesh["sp"])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    local = lasp.shard_batch({"input_ids": ids, "cu_seqlens": OFFSETS}, mesh, pad=False)
    got = model(local["input_ids"], layout=local["layout"]).logits
    start, end = local["layout"].bounds(mesh["sp"].get_local_rank())
    assert foreign.relative(got, logits[:, start:end]) < bound
    (loss_of(got, local["labels"]) * world / tokens).backward()
    lasp.sync_grads(model, mesh)
    compared = zip(model.named_parameters(), reference.parameters())
    worst = {name: foreign.relative(p.grad, r.grad) for (name, p), r in compared if r.grad is not None}
    assert max(worst.values()) < bound, sorted(worst.items(), key=lambda x: -x[1])[:5]
    assert lasp.verify(model, mesh, {"input_ids": ids, "cu_seqlens": OFFSETS}).ok


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("world", [2, 3])
def test_packed_documents_are_as_alone(world, name):
    run_ranks(world, compare_packed, name, world == 3)


def verified(name, dtype, before):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    model = foreign.build(name, dtype)
    if not before:
        lasp.parallelize(model, mesh["sp"])
    found = lasp.verify(model, mesh)
    assert found.ok, str(found)
    return str(found)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", READY)
def test_verify_compares_with_the_library_itself(name, before):
    run_ranks(2, verified, name, torch.float32, before)
