"""Models of transformers streamed segment by segment: loss and every gradient against the library on one process."""

import pytest
import torch
from ranks import mesh_of, run_ranks

import lasp

pytest.importorskip("transformers", reason="needs the extra `transformers`")

import foreign
from test_transformers import BOUND, TOKENS, batches, by_the_library, gradients_of

SEGMENTS = (TOKENS, 32, 20)


def agree(name, kinds, checkpointed=False):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    reference, model = foreign.build(name), foreign.build(name)
    lasp.parallelize(model, mesh["sp"], strict=False)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for kind in kinds:
        batch = batches()[kind]
        _, expected = by_the_library(reference, lasp.shard_batch(batch, None))
        for segment in SEGMENTS:
            lasp.stream_backward(model, batch, mesh=mesh, segment=segment)
            lasp.sync_grads(model, mesh)
            found = gradients_of(model)
            worst = {name: foreign.relative(found[name], expected[name]) for name in expected}
            assert max(worst.values()) < BOUND, (kind, segment, sorted(worst.items(), key=lambda x: -x[1])[:5])
    if mesh["sp"].size() == 1:  # as it came: the library's own forward, with a cache
        ids = batches()["dense"]["input_ids"][:, :20]
        with torch.no_grad():
            assert torch.equal(model(ids).logits, reference(ids).logits)
            assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 23)


@pytest.mark.parametrize("name", foreign.MODELS)
@pytest.mark.parametrize("world", [1, 2])
def test_streamed_and_one_process_agree(world, name):
    run_ranks(world, agree, name, ("dense", "left", "packed"))


@pytest.mark.parametrize("name", ["minimax", "bamba", "qwen3_next"])
def test_streamed_with_the_librarys_checkpointing(name):
    run_ranks(3, agree, name, ("right", "packed"), True)
