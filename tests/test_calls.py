"""A model of its user's own is given positions, whatever its forward calls them."""

import pytest
import torch
from torch import nn

import lasp
from lasp.modules import LightningAttention


class Model(nn.Module):
    """Counts positions from 0 where it is given none."""

    def __init__(self):
        super().__init__()
        self.embed, self.places, self.head = nn.Embedding(97, 16), nn.Embedding(512, 16), nn.Linear(16, 97)
        self.attention = LightningAttention()

    def logits(self, ids, positions, layout):
        positions = torch.arange(ids.shape[1])[None] if positions is None else positions
        x = self.embed(ids) + 3 * self.places(positions)
        q = x.unflatten(-1, (2, -1))
        return self.head(self.attention(q, q, q, layout=layout).flatten(2))


class Expected(Model):
    def forward(self, input_ids, position_ids=None, layout=None):
        return self.logits(input_ids, position_ids, layout)


class Pos(Model):
    def forward(self, tokens, pos=None, layout=None):
        return self.logits(tokens, pos, layout)


class InputPos(Model):
    def forward(self, tokens, layout=None, *, input_pos=None):
        return self.logits(tokens, input_pos, layout)


class Needed(Model):
    def forward(self, tokens, token_positions, layout=None):
        return self.logits(tokens, token_positions, layout)


def made(kind):
    torch.manual_seed(0)
    return kind().double()


@pytest.mark.parametrize("kind", [Pos, InputPos, Needed])
def test_positions_are_given_by_any_name(kind):
    ids = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
    model, other = made(Expected), made(kind)
    expected = lasp.generate(model, ids[:, :9], max_new_tokens=12)
    found = lasp.generate(other, ids[:, :9], max_new_tokens=12)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.state.logits, expected.state.logits)
    for each in (lasp.parallelize(model, None), lasp.parallelize(other, None)):  # three segments, one behind the other
        lasp.stream_backward(each, {"input_ids": ids}, mesh=None, segment=16)
    for p, p_other in zip(model.parameters(), other.parameters()):
        assert torch.equal(p.grad, p_other.grad)
    assert lasp.verify(other, None).ok


# What a forward needs, or does not take


class NeedsMore(Model):
    def forward(self, tokens, position_ids, memory, layout=None):
        return self.logits(tokens, position_ids, layout)


class OnlyByPlace(Model):
    def forward(self, tokens, position_ids, /):
        return self.logits(tokens, position_ids, None)


class OnlyByName(Model):
    def forward(self, *, tokens, pos=None, layout=None):
        return self.logits(tokens, pos, layout)


def every_way(model, batch):
    ids = batch["input_ids"]
    yield lambda: lasp.prefill(model, ids)
    yield lambda: lasp.generate(model, ids, max_new_tokens=2)
    yield lambda: next(lasp.stream_tokens(model, ids, max_new_tokens=2))
    yield lambda: lasp.verify(model, None, batch)
    yield lambda: lasp.stream_backward(lasp.parallelize(model, None, strict=False), batch, mesh=None, segment=4)


IDS = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NeedsMore, "the forward of NeedsMore needs the argument 'memory', .*layout: give 'memory' a default"),
        (OnlyByPlace, "the forward of OnlyByPlace needs the argument 'position_ids' without a name"),
    ],
)
def test_an_argument_that_is_needed_is_named(kind, words):
    for way in every_way(made(kind), {"input_ids": IDS}):
        with pytest.raises(ValueError, match=words):
            way()


def test_tokens_that_are_taken_by_name_only():
    expected = lasp.generate(made(Expected), IDS, max_new_tokens=5)
    assert torch.equal(lasp.generate(made(OnlyByName), IDS, max_new_tokens=5).ids, expected.ids)


# Padding


class Masked(Model):
    """True where tokens are padding, as of torch.nn."""

    def forward(self, tokens, pos=None, layout=None, key_padding_mask=None):
        logits = self.logits(tokens, pos, layout)
        return logits if key_padding_mask is None else logits.masked_fill(key_padding_mask[..., None], 0.5)


def test_a_mask_of_another_name_is_asked_for():
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    for way in [*every_way(made(Masked), {"input_ids": IDS, "attention_mask": mask})][3:]:
        with pytest.raises(
            ValueError, match=r"attention_mask would not reach the forward of Masked, .*'key_padding_mask'"
        ):
            way()
    model = lasp.parallelize(made(Masked), None)
    batch = {"input_ids": IDS, "key_padding_mask": mask == 0}
    found, _ = lasp.stream_backward(model, batch, mesh=None, segment=4)
    labels = lasp.shard_batch({"input_ids": IDS}, None)["labels"]
    expected, _ = lasp.token_loss(model(IDS, key_padding_mask=mask == 0), labels, mesh=None)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_tokens_would_see(side):
    """Of a model that takes no mask at all."""
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    model, batch = lasp.parallelize(made(Expected), None), {"input_ids": IDS, "attention_mask": mask}
    if side == "right":
        batch["attention_mask"] = mask.flip(1)
        lasp.stream_backward(model, batch, mesh=None, segment=4)
        return
    with pytest.raises(ValueError, match=r"padding before tokens, .* the forward of Expected takes no mask"):
        lasp.stream_backward(model, batch, mesh=None, segment=4)
