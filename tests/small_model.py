"""A language model of two layers, as a user might write it: it knows no ranks."""

import torch
from torch import nn

from lasp.modules import LightningAttention

VOCABULARY, WIDTH, HEADS = 17, 12, 3


class Mixer(nn.Module):
    def __init__(self, log_decay):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.inner = LightningAttention(log_decay, scale=0.5)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, layout=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        return self.out(self.inner(q.sigmoid(), k.sigmoid(), v, layout=layout).flatten(-2))


class Block(nn.Module):
    def __init__(self, log_decay):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixer = Mixer(log_decay)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x, layout=None):
        x = x + self.mixer(self.norm(x), layout)
        return x + self.mlp(x)


class SmallModel(nn.Module):
    """Positions are learned, so that a local position in place of a global one shows."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList([Block(torch.tensor([-0.01, -0.1, -1.0])), Block(None)])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids, position_ids, layout=None):
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x, layout)
        return self.head(x)
