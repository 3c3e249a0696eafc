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
        batch["labels"] = torch.where(mask == 0, -100, ids)
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


READY = [name for name in foreign.MODELS if name not in ("mamba", "falcon_mamba", "jamba", "recurrent_gemma")]


@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("world", [2, 3])
def test_one_process_and_slices_agree(world, name):
    run_ranks(world, compare, name)
