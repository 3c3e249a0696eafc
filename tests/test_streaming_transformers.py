"""Models of transformers streamed segment by segment: loss and every gradient against the library on one process."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from ranks import mesh_of, run_ranks

import lasp
from lasp.ops import softmax

pytest.importorskip("transformers", reason="needs the extra `transformers`")

import foreign
from test_transformers import BOUND, batches, by_the_library, gradients_of

SEGMENTS = (32, 20)
ON_RANKS = ("minimax", "bamba", "qwen3_next", "falcon_mamba", "recurrent_gemma", "mistral")
CAPPED = {"falcon_h1", "granitemoehybrid", "recurrent_gemma"}  # or scaled logits
ON_ONE = sorted(set(foreign.MODELS) - {"kimi_linear"})  # which is as bailing_hybrid, and slow


def agree(name, kinds, checkpointed=False):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    reference, model = foreign.build(name), foreign.build(name)
    lasp.parallelize(model, mesh["sp"], strict=False)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for kind, segment in zip(kinds, itertools.cycle(SEGMENTS)):
        batch = batches()[kind]
        _, expected = by_the_library(reference, lasp.shard_batch(batch, None))
        lasp.stream_backward(model, batch, mesh=mesh, segment=segment)
        lasp.sync_grads(model, mesh)
        found = gradients_of(model)
        worst = {name: foreign.relative(found[name], expected[name]) for name in expected}
        assert max(worst.values()) < BOUND, (kind, segment, sorted(worst.items(), key=lambda x: -x[1])[:5])
        assert ("the loss is taken in 'lm_head'" in lasp.explain(model).streamed) == (name not in CAPPED)
    if mesh["sp"].size() == 1:  # as it came: the library's own forward, with a cache
        ids = batches()["dense"]["input_ids"][:, :20]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, reference(ids).logits)
            assert model.generate(ids[:1], min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 23)


@pytest.mark.parametrize(("world", "name"), [(1, x) for x in ON_ONE] + [(2, x) for x in ON_RANKS])
def test_streamed_and_one_process_agree(world, name):
    run_ranks(world, agree, name, ("dense", "left", "packed"))


@pytest.mark.parametrize("name", ["minimax", "bamba", "qwen3_next"])
def test_streamed_with_the_librarys_checkpointing(name):
    run_ranks(3, agree, name, ("right", "packed"), True)


def balanced(name):
    """The router's loss is a product of two means over the whole sequence."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    reference = foreign.build(name, output_router_logits=True, router_aux_loss_coef=0.3)
    model = foreign.build(name, output_router_logits=True, router_aux_loss_coef=0.3)
    lasp.parallelize(model, mesh["sp"], strict=False)
    for kind in ("dense", "right"):
        batch = batches()[kind]
        whole = lasp.shard_batch(batch, None)
        inputs = {key: whole[key] for key in ("input_ids", "attention_mask") if key in whole}
        output = reference(**inputs, use_cache=False)
        loss, _ = lasp.token_loss(output.logits, whole["labels"], mesh=None)
        assert float(output.aux_loss) > 0.1
        (loss + 0.3 * output.aux_loss).backward()
        expected = gradients_of(reference)
        for segment in SEGMENTS:
            found, _ = lasp.stream_backward(model, batch, mesh=mesh, segment=segment)
            assert abs(found - loss - 0.3 * output.aux_loss) < BOUND
            lasp.sync_grads(model, mesh)
            gradients = gradients_of(model)
            worst = {name: foreign.relative(gradients[name], expected[name]) for name in expected}
            assert max(worst.values()) < BOUND, (kind, segment, sorted(worst.items(), key=lambda x: -x[1])[:5])


@pytest.mark.parametrize(("world", "name"), [(1, "jamba"), (2, "minimax"), (2, "qwen3_next")])
def test_the_router_s_loss_is_over_all_segments(world, name):
    run_ranks(world, balanced, name)


def rotary():
    """Frequencies that follow the largest position follow that of the whole sequence."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    more = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 24,
    }
    reference, model = foreign.build("llama", **more), foreign.build("llama", **more)
    lasp.parallelize(model, mesh["sp"], strict=False)
    batch = batches()["dense"]
    _, expected = by_the_library(reference, lasp.shard_batch(batch, None))
    lasp.stream_backward(model, batch, mesh=mesh, segment=20)
    lasp.sync_grads(model, mesh)
    found = gradients_of(model)
    for key, x in expected.items():
        assert foreign.relative(found[key], x) < BOUND, key


@pytest.mark.parametrize("world", [1, 2])
def test_dynamic_rotary_follows_the_whole_sequence(world):
    run_ranks(world, rotary)


def idle_mask(name):
    """A mask of ones is none: with one, softmax layers would not take flash kernels."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    more = {"output_router_logits": True, "router_aux_loss_coef": 0.3} if name == "qwen3_next" else {}
    reference, model = foreign.build(name, **more), foreign.build(name, **more)
    lasp.parallelize(model, mesh["sp"], strict=False)
    ids = batches()["dense"]["input_ids"]
    ones = torch.ones_like(ids)
    whole = lasp.shard_batch({"input_ids": ids, "attention_mask": ones}, None)
    output = reference(whole["input_ids"], attention_mask=ones, use_cache=False)
    loss, _ = lasp.token_loss(output.logits, whole["labels"], mesh=None)
    (loss + (0.3 * output.aux_loss if more else 0)).backward()
    expected, seen = gradients_of(reference), []
    checked = softmax._checked

    def spy(q, k, v, key_mask, settings):
        seen.append(key_mask is None)
        return checked(q, k, v, key_mask, settings)

    for mask, none in ((ones, True), (ones.bool(), True), (ones.index_fill(1, torch.tensor([0]), 0), False)):
        seen.clear()
        with mock.patch.object(softmax, "_checked", spy):
            lasp.stream_backward(model, {"input_ids": ids, "attention_mask": mask}, mesh=mesh, segment=20)
        assert set(seen) == {none}
        lasp.sync_grads(model, mesh)
        found = gradients_of(model)
        if none:
            worst = {name: foreign.relative(found[name], expected[name]) for name in expected}
            assert max(worst.values()) < BOUND, sorted(worst.items(), key=lambda x: -x[1])[:5]


@pytest.mark.parametrize(("world", "name"), [(1, "llama"), (2, "bamba"), (2, "qwen3_next")])
def test_a_mask_of_ones_is_none(world, name):
    run_ranks(world, idle_mask, name)


class Wrapper(torch.nn.Module):
    """As PEFT wraps a model: its forward names few arguments, and hands on the others."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids=None, attention_mask=None, **others):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, **others)


class NamesNothing(Wrapper):
    def forward(self, input_ids, **others):
        return self.inner(input_ids=input_ids, **others)


def wrapped(name, wrapper):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    reference, model = foreign.build(name), wrapper(foreign.build(name))
    lasp.parallelize(model, mesh["sp"], strict=False)
    for kind in ("dense", "left"):
        batch = batches()[kind]
        _, expected = by_the_library(reference, lasp.shard_batch(batch, None))
        lasp.stream_backward(model, batch, mesh=mesh, segment=20)
        lasp.sync_grads(model, mesh)
        found = gradients_of(model.inner)
        worst = {name: foreign.relative(found[name], expected[name]) for name in expected}
        assert max(worst.values()) < BOUND, (kind, sorted(worst.items(), key=lambda x: -x[1])[:5])


@pytest.mark.parametrize("wrapper", [Wrapper, NamesNothing])
@pytest.mark.parametrize(("world", "name"), [(1, "llama"), (2, "llama"), (2, "bamba")])
def test_a_wrapper_that_names_few_arguments(world, name, wrapper):
    """Positions are of the whole sequence, and padding is seen."""
    run_ranks(world, wrapped, name, wrapper)


def in_another_thread(name, streams):
    """In the middle of each forward another thread calls the model, with a batch of another layout."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    models = [foreign.build(name) for _ in range(2)]
    told, more = [], {}
    for model in models:
        lasp.parallelize(model, mesh["sp"], strict=False)
    local = lasp.shard_batch(batches()["packed"], mesh)
    other = lasp.shard_batch({"input_ids": torch.arange(3, 14)[None]}, mesh)
    if mesh["sp"].size() > 1:
        more = {"layout": other["layout"]}

    def call(*_):
        if threading.current_thread() is threading.main_thread():
            try:
                pool.submit(models[0], input_ids=other["input_ids"], **more).result()
            except (RuntimeError, ValueError) as error:
                told.append(str(error))

    def run(model):
        if streams:
            return lasp.stream_backward(model, batches()["packed"], mesh=mesh, segment=SEGMENTS[0])[0]
        logits = model(input_ids=local["input_ids"], layout=local["layout"]).logits
        loss, _ = lasp.token_loss(logits, local["labels"], mesh=mesh)
        loss.backward()
        return loss

    with ThreadPoolExecutor(1) as pool:
        models[0].model.layers[1].register_forward_pre_hook(call)
        losses = [run(model) for model in models]
    assert torch.equal(*losses)
    found, expected = map(gradients_of, models)
    assert max(foreign.relative(found[name], expected[name]) for name in expected) < BOUND
    of_one = mesh["sp"].size() == 1 and "layout is needed"
    assert told if streams else not told
    assert all((of_one or "the model was called while lasp.stream_backward is under way") in text for text in told)


@pytest.mark.parametrize(("world", "streams"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("name", ["bamba", "minimax"])
def test_a_forward_in_another_thread(world, name, streams):
    run_ranks(world, in_another_thread, name, streams)
