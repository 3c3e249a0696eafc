"""PEFT's adapters (LoRA) in a split model, in a plain loop and in SequenceTrainer: gradients of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks

import lasp

pytest.importorskip("transformers", reason="needs the extra `transformers`")
pytest.importorskip("peft", reason="needs PEFT")

import foreign
import peft
from safetensors.torch import load_file
from test_recipes import PROGRAMS, assert_same, finished, in_fp64, losses
from test_trainer import arguments, launched, logs_of, samples, trainer_of, weights_of
from test_transformers import BOUND, batches, loss_of

pytestmark = pytest.mark.timeout(600)  # of a loaded machine, on which each rank imports all this
LIMIT = 200.0
NAMES = ["bamba", "lfm2"]
TARGETS = {"bamba": ["q_proj", "in_proj", "down_proj"], "lfm2": ["q_proj", "in_proj", "w1"]}


def with_adapter(model, name):
    torch.manual_seed(1)
    found = peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS[name], r=4, lora_alpha=8))
    with torch.no_grad():
        for path, p in found.named_parameters():
            if "lora_B" in path:
                p.normal_(0, 0.1)
    return found


def split_with_adapter(name, order, mesh, dtype=torch.float64):
    model = foreign.build(name, dtype)
    if order == "before":
        return lasp.parallelize(with_adapter(model, name), mesh["sp"])
    return with_adapter(lasp.parallelize(model, mesh["sp"]), name)


def loop(name, order, folder):
    torch.set_num_threads(1)
    mesh = mesh_of(dp_shard=1, sp=dist.get_world_size())
    alone, model = with_adapter(foreign.build(name), name), split_with_adapter(name, order, mesh)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 0.01) for m in (alone, model)]
    for kind in ("dense", "left", "dense"):
        batch = batches()[kind]
        whole, local = lasp.shard_batch(batch, None), lasp.shard_batch(batch, mesh)
        keys = [key for key in ("input_ids", "attention_mask") if key in whole]
        logits = alone(**{key: whole[key] for key in keys}, use_cache=False).logits
        (loss_of(logits, whole["labels"]) / (whole["labels"] != -100).sum()).backward()
        expected = {n: p.grad.clone() for n, p in alone.named_parameters() if p.grad is not None}
        got = model(**{key: local[key] for key in keys}, layout=local["layout"]).logits
        loss, _ = lasp.token_loss(got, local["labels"], mesh=mesh)
        loss.backward()
        lasp.sync_grads(model, mesh)
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        assert all("lora_" in n for n in found)
        worst = max(foreign.relative(x, expected[n]) for n, x in found.items())
        assert worst < 10 * BOUND, worst
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    saved_and_merged(model, alone, name, folder)


def saved_and_merged(model, alone, name, folder):
    """The adapter is written as of one process, and a model that it was merged into is the library's again on it."""
    place = f"{folder}/{dist.get_rank()}"
    model.save_pretrained(place)
    ids = batches()["dense"]["input_ids"]
    with torch.no_grad():
        expected = alone.eval()(input_ids=ids, use_cache=False).logits
        loaded = peft.PeftModel.from_pretrained(foreign.build(name), place).double().eval()
        assert foreign.relative(loaded(input_ids=ids, use_cache=False).logits, expected) < 1e-9
        merged = model.merge_and_unload()
        assert not any("lora_" in n for n in merged.state_dict())
        local = lasp.shard_batch({"input_ids": ids}, dist.group.WORLD, pad=False)
        got = merged.eval()(local["input_ids"], layout=local["layout"]).logits
        start, end = local["layout"].bounds(dist.get_rank())
        assert foreign.relative(got, expected[:, start:end]) < 1e-9
        plain = foreign.build(name).eval()
        plain.load_state_dict(merged.state_dict())
        assert foreign.relative(plain(ids, use_cache=False).logits, expected) < 1e-9


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_a_plain_loop(name, order, tmp_path):
    run_ranks(2, loop, name, order, tmp_path, timeout=LIMIT)


def train(name, order, sp, folder):
    with launched():
        mesh = mesh_of(dp_shard=-1, sp=sp)
        model = split_with_adapter(name, order, mesh, torch.float32)
        args = arguments(folder, gradient_accumulation_steps=2)
        trainer = trainer_of(model, args, train_dataset=samples(), mesh=mesh)
        before = copy.deepcopy(weights_of(model))
        trainer.train()
        weights = weights_of(model)
        changed = {n for n, x in weights.items() if not torch.equal(x, before[n])}
        assert changed
        assert all("lora_" in n for n in changed)
        return logs_of(trainer), weights


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_sequence_trainer(name, order, tmp_path):
    [expected] = run_ranks(1, train, name, order, 1, tmp_path, timeout=LIMIT)
    for logs, weights in run_ranks(2, train, name, order, 2, tmp_path, timeout=LIMIT):
        assert len(logs) == 3
        for found, known in zip(logs, expected[0]):
            assert found == pytest.approx(known, rel=5e-6)
        assert max(float((weights[n] - x).abs().max()) for n, x in expected[1].items()) < 1e-6


def test_the_recipe(tmp_path):
    """docs/recipes.md's lora.py: on two ranks the losses, weights and adapter of one process; in fp64, of which
    transformers does a few steps in fp32."""
    program = in_fp64(PROGRAMS["lora.py"])
    [expected], printed = finished(program, 1, tmp_path / "alone")
    assert losses(printed) == sorted(losses(printed), reverse=True)
    found, again = finished(program, 2, tmp_path / "split")
    assert_same(found, expected, bound=1e-6)
    assert all(rank["exchanges"] for rank in found)
    assert losses(again) == pytest.approx(losses(printed), abs=2e-5)
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in tmp_path.iterdir()]
    assert len(adapters) == 2
    assert adapters[0].keys() == adapters[1].keys()
    for name, x in adapters[0].items():
        assert x.any()
        torch.testing.assert_close(x, adapters[1][name], rtol=0, atol=1e-6)
    as_it_stands = losses(finished(PROGRAMS["lora.py"], 2, tmp_path / "fp32")[1])
    assert as_it_stands == pytest.approx(losses(printed), abs=3e-5)
