"""`stream_backward`: gradients of a sequence in segments are those of one pass over all of it."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks
from streamed_models import LINEAR, SHORT, STATES, VOCABULARY, Initial, Model

import lasp

TOKENS = 61
OFFSETS = (0, 7, 8, 8, 30, 31, 61)  # of packed documents; one is empty, one crosses several borders
SEGMENTS = (61, 100, 16, 13, 5)  # 16: a border is at no document's; 5: fewer tokens than a convolution's and ranks
BOUND = 1e-10


def batch_of(packed):
    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    if packed:
        return {"input_ids": ids[:1], "cu_seqlens": OFFSETS}
    labels = ids.clone()
    labels[:, 20:33] = -100  # a whole segment counts nothing
    return {"input_ids": ids, "labels": labels}


def one_pass(model, batch):
    """Loss, number of tokens and gradients of a model that is not split."""
    whole = lasp.shard_batch(batch, None)
    loss, tokens = lasp.token_loss(
        model(whole["input_ids"], whole["position_ids"], whole["layout"]), whole["labels"], mesh=None
    )
    loss.backward()
    return loss.detach(), tokens, gradients_of(model)


def gradients_of(model):
    given = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = {name: x for name, x in given.items() if x.any()}  # sync_grads gives zeros to what is not used
    model.zero_grad()
    return found


def assert_same(found, expected, bound=BOUND):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        worst = ((found[name] - x).abs().max() / x.abs().max().clamp(min=1e-30)).item()
        assert worst <= bound, (name, worst)


def pair(*layers, exchange="auto", **options):
    """A model on one rank as reference, and a copy that is split over all."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=dist.get_world_size())
    reference = Model(*layers, **options).double()
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh["sp"], exchange=exchange)
    return reference, model, mesh


def streamed_as_one_pass(layers, packed, exchange="auto"):
    reference, model, mesh = pair(*layers, exchange=exchange)
    batch = batch_of(packed)
    loss, tokens, expected = one_pass(reference, batch)
    for segment in SEGMENTS:
        found = lasp.stream_backward(model, batch, mesh=mesh, segment=segment)
        assert abs(found[0] - loss) < BOUND
        assert found[1] == tokens
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_linear_attention_of_every_decay(world, packed):
    run_ranks(world, streamed_as_one_pass, LINEAR, packed)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("layers", [(Initial,), SHORT, STATES], ids=["initial", "short", "states"])
def test_every_operator(world, layers, packed):
    run_ranks(world, streamed_as_one_pass, layers, packed)


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "pipeline"])
def test_every_schedule(exchange):
    run_ranks(3, streamed_as_one_pass, (*LINEAR, *STATES), True, exchange)
