"""Positions that somebody counted on a slice, as if it were the whole: refused, unless something begins there."""

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks
from small_model import VOCABULARY, SmallModel
from torch import nn

import lasp

IDS = torch.randint(VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(3))


def split_model():
    mesh = mesh_of(sp=dist.get_world_size())
    model = SmallModel().double()
    lasp.parallelize(model, mesh["sp"])
    return model, mesh


def _counted_on_the_slice(form):
    model, mesh = split_model()
    local = lasp.shard_batch({"input_ids": IDS}, mesh, pad=False)
    ids, layout = local["input_ids"], local["layout"]
    counted = torch.arange(ids.shape[1])
    counted = counted if form == "[T]" else counted.expand_as(ids)
    if dist.get_rank() == 0:  # whose slice is where the sequence begins
        assert torch.equal(counted.expand_as(ids), local["position_ids"].expand_as(ids))
        return
    message = (
        rf"position_ids must be those in the whole sequence, got 0, 1, 2, ... for the slice of rank {dist.get_rank()}"
    )
    for call in (
        lambda: model(ids, counted, layout),
        lambda: model(ids, position_ids=counted, layout=layout),
        lambda: model(input_ids=ids, position_ids=counted, layout=layout),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("form", ["[T]", "[B, T]"])
def test_positions_counted_on_a_slice_are_refused(form):
    run_ranks(3, _counted_on_the_slice, form)


def _something_begins_there(lengths, documents):
    """Positions are 0, 1, 2, ... on some rank, and right: all ranks give what one process does."""
    model, _ = split_model()
    ids = IDS[:1]
    layout = lasp.ShardLayout(lengths, documents)
    offsets = documents or (0, ids.shape[1])
    positions = torch.cat([torch.arange(b - a) for a, b in zip(offsets, offsets[1:])])[None]
    start, end = layout.bounds(dist.get_rank())
    here = positions[:, start:end]
    found = model(ids[:, start:end], here, layout)
    whole = SmallModel().double()
    expected = torch.cat([whole(ids[:, a:b], positions[:, a:b]) for a, b in zip(offsets, offsets[1:])], 1)
    torch.testing.assert_close(found, expected[:, start:end])
    counted = torch.equal(here, torch.arange(end - start)[None]) and end - start > 1
    assert counted == (dist.get_rank() in (0, 1) if documents else dist.get_rank() == 1)


@pytest.mark.parametrize(
    ("lengths", "documents"),
    [((9, 8, 6), (0, 9, 20, 23)), ((0, 16, 7), None)],
    ids=["a document", "the first rank has no token"],
)
def test_positions_from_0_where_something_begins(lengths, documents):
    run_ranks(3, _something_begins_there, lengths, documents)


class Masked(nn.Module):
    """Takes a mask, too; with padding before the first token positions begin anywhere."""

    def __init__(self):
        super().__init__()
        self.inner = SmallModel()

    def forward(self, input_ids, position_ids, layout, attention_mask=None):
        return self.inner(input_ids, position_ids, layout)


def _with_a_mask():
    mesh = mesh_of(sp=2)
    model = Masked().double()
    lasp.parallelize(model, mesh["sp"])
    here = IDS[:, :10]
    counted = torch.arange(10).expand_as(here)
    mask = torch.full_like(here, dist.get_rank())  # all of the first rank's tokens are padding
    layout = lasp.ShardLayout((10, 10))
    found = model(here, counted, layout, mask)
    assert found.shape == (2, 10, VOCABULARY)
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="position_ids must be those in the whole sequence"):
            model(here, counted, layout)


def test_padding_may_come_before():
    run_ranks(2, _with_a_mask)
