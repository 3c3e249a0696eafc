"""Small language models for streaming: a layer for each way to depend on earlier tokens, as a user might write them."""

import torch
import torch.nn.functional as F
from torch import nn

import lasp
from lasp.ops.elementwise import elementwise_recurrence, selective_scan

VOCABULARY, WIDTH, HEADS = 19, 12, 3


class Layer(nn.Module):
    sequence = None

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.gates = nn.Linear(WIDTH, WIDTH)

    def split(self, x):
        return (y.unflatten(-1, (HEADS, -1)) for y in self.qkv(x).chunk(3, -1))


@lasp.register
class PerHead(Layer):
    decay = torch.tensor([-0.02, -0.3, -2.0])

    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        o, _ = lasp.linear_attention(q, k, v, log_decay=self.decay, layout=layout, sequence=self.sequence)
        return o.flatten(-2)


@lasp.register
class NoDecay(Layer):
    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        o, _ = lasp.linear_attention(lambda: q.sin(), k, v, scale=0.3, layout=layout, sequence=self.sequence)
        return o.flatten(-2)


@lasp.register
class PerToken(Layer):
    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        decay = -F.softplus(self.gates(x)[..., :HEADS]).to(lasp_dtype(x))
        o, _ = lasp.linear_attention(q, k, v, log_decay=decay, layout=layout, sequence=self.sequence)
        return o.flatten(-2)


@lasp.register
class Normalised(Layer):
    """All heads of v share one of q and k."""

    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        decay = -F.softplus(self.gates(x)[..., :HEADS]).to(lasp_dtype(x))
        options = {"log_decay": decay, "normalize": True, "layout": layout, "sequence": self.sequence}
        o, _ = lasp.linear_attention(F.elu(q[:, :, :1]) + 1, F.elu(k[:, :, :1]) + 1, v, **options)
        return o.flatten(-2)


@lasp.register
class PerChannel(Layer):
    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        decay = -F.softplus(self.gates(x)).unflatten(-1, (HEADS, -1)).to(lasp_dtype(x))
        o, _ = lasp.linear_attention(q, k, v, log_decay=decay, layout=layout, sequence=self.sequence)
        return o.flatten(-2)


@lasp.register
class Initial(Layer):
    """With a state of its own before each sequence; and its operator is called twice."""

    decay = PerHead.decay

    def __init__(self):
        super().__init__()
        self.before = nn.Parameter(torch.randn(HEADS, WIDTH // HEADS, WIDTH // HEADS))

    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        rows = len(layout.cu_seqlens) - 1 if layout is not None and layout.packed else len(x)
        states = self.before.expand(rows, -1, -1, -1)
        options = {"layout": layout, "sequence": self.sequence}
        first, _ = lasp.linear_attention(q, k, v, log_decay=self.decay, initial_state=states, **options)
        second, _ = lasp.linear_attention(k, q, first.tanh(), log_decay=self.decay, **options)
        return (first + second).flatten(-2)


@lasp.register
class Delta(Layer):
    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        gates = self.gates(x)
        beta, decay = gates[..., :HEADS].sigmoid(), -F.softplus(gates[..., HEADS : 2 * HEADS]).to(lasp_dtype(x))
        k = F.normalize(k, dim=-1)
        o, _ = lasp.delta_rule(q, k, v, beta, log_decay=decay, layout=layout, sequence=self.sequence)
        return o.flatten(-2)


@lasp.register
class Conv(Layer):
    def __init__(self):
        super().__init__()
        self.taps = nn.Parameter(torch.randn(WIDTH, 4) * 0.5)

    def forward(self, x, layout=None):
        return lasp.causal_conv(self.gates(x), self.taps, layout=layout, sequence=self.sequence).sin()


@lasp.register
class Shift(Layer):
    def forward(self, x, layout=None):
        before = lasp.halo(x, 3, layout=layout, sequence=self.sequence)
        # Of a packed document's first tokens those before are another's, but for the first of a rank.
        keep = starts(layout, x, self.sequence)
        return self.gates(before[:, 1:-1] * keep[0] + before[:, :-2] * keep[1])


def starts(layout, x, sequence):
    """1 where the token before, and the second before, are of the same document."""
    tokens = x.shape[1]
    found = x.new_ones(2, 1, tokens, 1)
    if layout is not None and layout.packed:
        runs = layout.local(0 if sequence is None else sequence.rank).cu_seqlens
        for start in runs[1:-1]:
            found[0, :, start : start + 1] = 0
            found[1, :, start : start + 2] = 0
    return found


@lasp.register
class Elementwise(Layer):
    def forward(self, x, layout=None):
        decay = -F.softplus(self.gates(x)).to(lasp_dtype(x))
        return elementwise_recurrence(x, decay, layout=layout, sequence=self.sequence)


@lasp.register
class Selective(Layer):
    def __init__(self):
        super().__init__()
        self.log = nn.Parameter(torch.randn(WIDTH, 5) * 0.1)

    def forward(self, x, layout=None):
        u, dt, rest = self.qkv(x).chunk(3, -1)
        B, C = rest[..., :5], rest[..., 5:10]
        options = {"layout": layout, "sequence": self.sequence}
        return selective_scan(u, F.softplus(dt), -self.log.exp(), B, C, **options)


@lasp.register
class Softmax(Layer):
    window = None

    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        options = {"layout": layout, "sequence": self.sequence, "window": self.window}
        return lasp.softmax_attention(q, k, v, **options).flatten(-2)


@lasp.register
class Window(Softmax):
    window = 9


@lasp.register
class Blocks(Layer):
    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        return lasp.block_attention(q, k, v, 6, layout=layout, sequence=self.sequence).flatten(-2)


@lasp.register
class Grouped(Layer):
    """Heads of queries that share keys, with a cap on scores."""

    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        options = {"layout": layout, "sequence": self.sequence, "softcap": 0.7, "scale": 0.9}
        return lasp.softmax_attention(q, k[:, :, :1], v[:, :, 1:2], **options).flatten(-2)


@lasp.register
class SharedHeads(Layer):
    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        options = {"layout": layout, "sequence": self.sequence}
        return (
            lasp.softmax_attention(q, k[:, :, :1], v[:, :, 1:2, :3], **options).repeat(1, 1, 1, 2)[..., :4].flatten(-2)
        )


def lasp_dtype(x):
    return torch.promote_types(x.dtype, torch.float32)


LINEAR = (PerHead, NoDecay, PerToken, PerChannel, Normalised)
SHORT = (Conv, Shift)
STATES = (Delta, Elementwise, Selective)
HYBRID = (PerHead, Softmax, Window, Conv, Grouped, Blocks)


class Model(nn.Module):
    def __init__(self, *layers, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(128, WIDTH)
        self.layers = nn.ModuleList(layer() for layer in layers)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in layers)
        self.mlps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def block(self, number, x, layout):
        x = x + self.dropout(self.layers[number](self.norms[number](x), layout))
        return x + self.mlps[number](x).tanh()

    def forward(self, input_ids, position_ids, layout=None):
        x = self.tokens(input_ids) + self.positions(position_ids)
        for number in range(len(self.layers)):
            x = self.block(number, x, layout)
        return self.head(x)
