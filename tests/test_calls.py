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
