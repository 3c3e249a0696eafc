"""Models of transformers on slices of a sequence: logits, loss and every gradient against the library on one process.

In fp64, with shards of different length. One model for all batches of a test: dense, padded on the left and on the
right (a row is empty on the first or the last rank), and packed; and again with the library's own checkpointing.
"""

import copy

import pytest
import torch
from ranks import divided, mesh_of, run_ranks

import lasp

pytest.importorskip("transformers", reason="needs the extra `transformers`")

import foreign
from foreign import loss_of

TOKENS = 83
OFFSETS = (0, 11, 12, 40, 71, 83)  # of packed documents; on three ranks one of them lies on two borders
BOUND = 1e-11  # of the largest entry


def batches():
    ids = torch.randint(3, 97, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    masks = torch.ones(2, 2, TOKENS, dtype=torch.int64)
    masks[0, 1, :45] = masks[1, 1, -45:] = 0
    found = {"dense": {"input_ids": ids}}
    for side, mask in zip(("left", "right"), masks):
        first = (mask.cumsum(1) == 1) & (mask == 1)  # which a padded token would predict
        labels = torch.where((mask == 0) | first, -100, ids)
        found[side] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return found | {"packed": {"input_ids": ids[:1], "cu_seqlens": OFFSETS}}


def gradients_of(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def by_the_library(model, whole):
    """Logits, loss and gradients of one process; packed documents one after the other, each by itself."""
    inputs = {key: whole[key] for key in ("input_ids", "attention_mask") if key in whole}  # positions from 0
    cuts = whole["layout"].cu_seqlens or (0, TOKENS)
    of_documents = [
        model(**{key: x[:, a:b] for key, x in inputs.items()}, use_cache=False).logits for a, b in zip(cuts, cuts[1:])
    ]
    logits = torch.cat(of_documents, 1)
    loss = loss_of(logits, whole["labels"]) / (whole["labels"] != -100).sum()
    loss.backward()
    return logits.detach(), gradients_of(model)


def compare(model, batch, mesh, expected):
    logits, gradients = expected
    local = lasp.shard_batch(batch, mesh, pad=False)
    inputs = {key: local[key] for key in ("input_ids", "attention_mask") if key in local}  # positions are filled in
    got = model(**inputs, layout=local["layout"]).logits
    start, end = local["layout"].bounds(mesh["sp"].get_local_rank())
    real = torch.ones_like(local["input_ids"]) if "attention_mask" not in local else local["attention_mask"]
    assert foreign.relative(got[real != 0], logits[:, start:end][real != 0]) < BOUND
    tokens = (lasp.shard_batch(batch, None)["labels"] != -100).sum()
    (loss_of(got, local["labels"]) * mesh["sp"].size() / tokens).backward()
    lasp.sync_grads(model, mesh)
    found = gradients_of(model)
    worst = {name: foreign.relative(found[name], gradients[name]) for name in gradients}
    assert max(worst.values()) < BOUND, sorted(worst.items(), key=lambda x: -x[1])[:5]
    return inputs | {"layout": local["layout"]}, got.detach()


def agree(name):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    reference, model = foreign.build(name), foreign.build(name)
    lasp.parallelize(model, mesh["sp"], strict=False)  # whether it mixes tokens `verified` asks
    told_before(model, mesh)
    assert list(model.state_dict()) == list(reference.state_dict())
    expected = divided(lambda kind: by_the_library(reference, lasp.shard_batch(batches()[kind], None)), batches())
    for kind, batch in batches().items():
        inputs, got = compare(model, batch, mesh, expected[kind])
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, got)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for kind in ("left", "packed"):
        compare(model, batches()[kind], mesh, expected[kind])


# On two ranks, which can share the heads of softmax attention, each model is verified as well.
BY_HEADS = ("minimax", "bamba", "zamba2", "qwen3_next", "llama", "deepseek_v2")


@pytest.mark.parametrize(("world", "name"), [(3, name) for name in foreign.MODELS] + [(2, name) for name in BY_HEADS])
def test_slices_and_one_process_agree(world, name):
    """And what `explain` tells before is what runs."""
    run_ranks(world, agree, name)


def told_before(model, mesh, batch=None):
    """What `explain` says of each layer before it has run is what then runs, wherever below the layer."""
    before = {layer.path: set(layer.expected) for layer in lasp.explain(model)}
    assert before
    assert all(before.values())
    assert all(layer.adapter.startswith("lasp.adapters.") for layer in lasp.explain(model))
    assert "known after a step" in str(lasp.explain(model))
    local = lasp.shard_batch(batch or batches()["dense"], mesh)
    model(local["input_ids"], layout=local["layout"])
    assert "known after a step" not in str(lasp.explain(model))
    found = {path: set() for path in before}
    for row in lasp.explain(model):
        path = next((p for p in before if f"{row.path}.".startswith(f"{p}.")), None)
        if path is not None:
            found[path].add(row.operator)
    assert found == {path: {{"causal_conv": "halo"}.get(x, x) for x in names} for path, names in before.items()}


def verified(name):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    model = foreign.build(name, torch.float32)
    before = lasp.verify(model, mesh)
    assert before.ok, str(before)
    lasp.parallelize(model, mesh["sp"], strict=False)  # asked above
    after = lasp.verify(model, mesh)
    assert after.ok, str(after)
    assert after.whole_loss == before.whole_loss  # both are the library's own
    assert lasp.verify(model, mesh, {"input_ids": batches()["packed"]["input_ids"], "cu_seqlens": OFFSETS}).ok


@pytest.mark.parametrize("name", foreign.MODELS)
def test_verify_compares_with_the_library_itself(name):
    run_ranks(2, verified, name)


def wrong_adapter():
    """A layer whose adapter is consistently wrong, on one rank too, is found: the whole is what the library made."""
    from lasp.adapters import rebind, transformers

    mesh = mesh_of(sp=torch.distributed.get_world_size())
    model = foreign.build("bamba", torch.float32)
    lasp.parallelize(model, mesh["sp"])
    layer = model.model.layers[0].mamba

    def too_much(*args, **kwargs):
        return 1.01 * transformers._ssd(layer.sequence)(*args, **kwargs)

    rebind(layer, mamba2_chunk_scan=too_much, causal_conv1d_fn=transformers._conv(layer.sequence))
    assert not lasp.verify(model, mesh).ok


def test_verify_finds_an_adapter_that_is_wrong_everywhere():
    run_ranks(2, wrong_adapter)
