"""What mixes the tokens in the published families, one class each: x [B, T, D], normed, to what is added to the stream.

Each is its paper's layer around one of the operators in `lasp.modules`, which alone know what crosses ranks. Shapes in
comments: B sequences, T tokens (of this rank), H heads of K channels of queries and keys and V of values.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp import decay
from lasp.layout import ShardLayout
from lasp.models._linears import norm_gate_linear
from lasp.models.lrpe import LRPE
from lasp.modules import (
    BlockAttention,
    CausalConv,
    DeltaRule,
    ElementwiseRecurrence,
    LightningAttention,
    SelectiveScan,
    SoftmaxAttention,
)


class Mixer(nn.Module):
    """A layer of `width` channels in `heads` heads. `out` is its last linear layer."""

    out: nn.Linear

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.width, self.heads = width, heads

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """x [B, T, D] to the same shape; positions are those in the whole sequence."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """What `LanguageModel`s do not set: what is neither a linear layer nor a convolution."""

    def _split(self, x: Tensor) -> Tensor:
        """[B, T, H * n] to [B, T, H, n]."""
        return x.unflatten(-1, (self.heads, -1))

    def _linear(self, outputs: int, inputs: int | None = None) -> nn.Linear:
        return nn.Linear(self.width if inputs is None else inputs, outputs, bias=False)


def rotary(x: Tensor, position_ids: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate pairs of channels (j, j + K / 2) of x [B, T, H, K] by position * base^(-2j / K) (arXiv 2104.09864).

    Angles are in fp64, as in `lasp_kernels.rotate`: there are sequences of millions of tokens.
    """
    half = x.shape[-1] // 2
    theta = base ** (torch.arange(half, device=x.device, dtype=torch.float64) / -half)
    angle = (
        (position_ids.double()[..., None] * theta)
        .remainder(2 * math.pi)
        .to(torch.promote_types(x.dtype, torch.float32))
    )
    cos, sin = (f(angle).to(x.dtype).unsqueeze(-2) for f in (torch.cos, torch.sin))  # [(B,) T, 1, K / 2]
    a, b = x.split(half, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class SoftmaxMixer(Mixer):
    """Causal softmax attention with rotary positions, the layer of LLaMA (arXiv 2302.13971)."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.query, self.key, self.value, self.out = (self._linear(width) for _ in range(4))
        self.attention = SoftmaxAttention()

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        q, k = (rotary(self._split(layer(x)), position_ids) for layer in (self.query, self.key))
        return self.out(self.attention(q, k, self._split(self.value(x)), layout=layout).flatten(2))


class Retention(Mixer):
    """Multi-scale retention (RetNet, arXiv 2307.08621, eq. 8): fixed decays 1 - 2^(-5 - h), rotated queries and keys.

    Values are twice as wide as keys; the norm is in each head, and swish(x W_g) the gate.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.query, self.key = self._linear(width), self._linear(width)
        self.value, self.gate = self._linear(2 * width), self._linear(2 * width)
        self.out = self._linear(width, 2 * width)
        self.attention = LightningAttention(decay.schedule("retnet", heads, 0, 1), scale=(width // heads) ** -0.5)

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        q, k = (rotary(self._split(layer(x)), position_ids) for layer in (self.query, self.key))
        o = self.attention(q, k, self._split(self.value(x)), layout=layout)
        o = F.rms_norm(o, o.shape[-1:], eps=1e-6).flatten(2)
        return self.out(o * F.silu(self.gate(x)))


class GLA(Mixer):
    """Gated linear attention (arXiv 2312.06635, section 4.4): a decay of each channel, from the token.

    Keys are half as wide as values. The decay is sigmoid(x W_1 W_2 + b)^(1 / 16), with 16 channels between.
    """

    RANK, TEMPERATURE = 16, 16.0

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.query, self.key = self._linear(width // 2), self._linear(width // 2)
        self.value, self.gate, self.out = (self._linear(width) for _ in range(3))
        self.decay = nn.Sequential(self._linear(self.RANK), nn.Linear(self.RANK, width // 2))
        self.norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.attention = LightningAttention(scale=(width // 2 // heads) ** -0.5)

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        q, k, v = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        log_decay = F.logsigmoid(_wide(self.decay(x))) / self.TEMPERATURE  # [B, T, H * K]
        o = self.norm(self.attention(q, k, v, self._split(log_decay), layout=layout)).flatten(2)
        return self.out(o * F.silu(self.gate(x)))


class HGRN2(Mixer):
    """A gated recurrence whose gate is the key (HGRN2, arXiv 2404.07904, eq. 5): f and 1 - f, of each channel.

    The gate's lower bound grows from layer to layer; it is the model's, since it is learned over all layers together.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.query, self.forget, self.value, self.out = (self._linear(width) for _ in range(4))
        self.attention = LightningAttention()

    def forward(
        self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None, lower_bound: Tensor | None = None
    ) -> Tensor:
        """See `Mixer`; lower_bound [D] of the forget gate, in [0, 1), None for 0."""
        q, v = self._split(F.silu(self.query(x))), self._split(self.value(x))
        log_gate, key = _bounded_gate(_wide(self.forget(x)), lower_bound)
        o = self.attention(q, self._split(key.to(v.dtype)), v, self._split(log_gate), layout=layout)
        return norm_gate_linear(o, _open_gate(o, x), self.out)


class DeltaNet(Mixer):
    """The delta rule with short convolutions (DeltaNet, arXiv 2406.06484, section 3.4)."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.query, self.key, self.value, self.out = (self._linear(width) for _ in range(4))
        self.query_conv, self.key_conv, self.value_conv = (CausalConv(width) for _ in range(3))
        self.beta = self._linear(heads)
        self.norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.attention = DeltaRule(scale=(width // heads) ** -0.5)

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        return self.out(self.norm(self._attend(x, None, layout)).flatten(2))

    def _attend(self, x: Tensor, log_decay: Tensor | None, layout: ShardLayout | None) -> Tensor:
        layers = ((self.query, self.query_conv), (self.key, self.key_conv), (self.value, self.value_conv))
        q, k, v = (self._split(F.silu(conv(layer(x), layout=layout))) for layer, conv in layers)
        q, k = (F.normalize(y, dim=-1, eps=1e-6) for y in (q, k))
        return self.attention(q, k, v, torch.sigmoid(self.beta(x)), log_decay, layout=layout)


class GatedDeltaNet(DeltaNet):
    """The delta rule with a decay of each token and head, and an output gate (arXiv 2412.06464, section 3.4)."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.rate, self.gate = self._linear(heads), self._linear(width)
        self.log_rate, self.rate_bias = (nn.Parameter(torch.empty(heads)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As Mamba's: rates from 1 to 16, times from 0.001 to 0.1."""
        _reset_rates(self.log_rate, self.rate_bias)

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        log_decay = -_wide(self.log_rate).exp() * F.softplus(_wide(self.rate(x)) + _wide(self.rate_bias))
        o = self.norm(self._attend(x, log_decay, layout)).flatten(2)
        return self.out(o * F.silu(self.gate(x)))


class Mamba2(Mixer):
    """The state-space layer of Mamba-2 (arXiv 2405.21060, section 7): linear attention whose decay is exp(a dt).

    Values are twice as wide as the stream, in heads as wide as D / H; all heads share one query (C) and one key (B) of
    `STATE` channels. A short convolution goes over all three; D x is added; the norm follows the gate.
    """

    STATE = 64

    def __init__(self, width: int, heads: int):
        super().__init__(width, 2 * heads)
        inner = 2 * width
        self.gate, self.value, self.keys, self.rate = (
            self._linear(n) for n in (inner, inner, 2 * self.STATE, 2 * heads)
        )
        self.conv = CausalConv(inner + 2 * self.STATE, bias=True)
        self.log_rate, self.rate_bias, self.skip = (nn.Parameter(torch.empty(2 * heads)) for _ in range(3))
        self.norm = nn.RMSNorm(inner, eps=1e-6)
        self.out = self._linear(width, inner)
        self.attention = LightningAttention()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rates from 1 to 16, times from 0.001 to 0.1, and x added as it is."""
        _reset_rates(self.log_rate, self.rate_bias)
        nn.init.ones_(self.skip)

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        mixed = F.silu(self.conv(torch.cat([self.value(x), self.keys(x)], -1), layout=layout))
        value, key, query = mixed.split([2 * self.width, self.STATE, self.STATE], -1)
        value = self._split(value)
        step = F.softplus(_wide(self.rate(x)) + _wide(self.rate_bias))  # [B, T, H]
        q, k = (y.unsqueeze(2) for y in (query, key))  # one head
        o = self.attention(
            q, k, (value * step.unsqueeze(-1)).to(value.dtype), -_wide(self.log_rate).exp() * step, layout=layout
        )
        o = (o + value * self.skip.to(value.dtype).unsqueeze(-1)).flatten(2)
        return self.out(self.norm(o * F.silu(self.gate(x))))


class HGRN(Mixer):
    """A gated recurrence of each channel (HGRN, arXiv 2311.04823, section 3), of real numbers, without heads.

    h_t = f_t h_{t-1} + (1 - f_t) silu(x_t W), whose gate has a lower bound that grows from layer to layer, as HGRN2's.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.value, self.forget, self.gate, self.out = (self._linear(width) for _ in range(4))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.recurrence = ElementwiseRecurrence()

    def forward(
        self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None, lower_bound: Tensor | None = None
    ) -> Tensor:
        """See `Mixer`; lower_bound [D] of the forget gate, in [0, 1), None for 0."""
        log_gate, rest = _bounded_gate(_wide(self.forget(x)), lower_bound)
        h = self.recurrence((rest * F.silu(self.value(x))).to(x.dtype), log_gate, layout=layout)
        return self.out(self.norm(h) * F.silu(self.gate(x)))


class Mamba(Mixer):
    """The selective state-space layer of Mamba (arXiv 2312.00752, section 3.4), without heads.

    Twice as many channels as the stream, each with a state of `STATE` numbers; B, C and the time of a step are made
    from the channels behind a short convolution, the time through D / 16 channels between. D u is added.
    """

    STATE = 16

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        inner, self.between = 2 * width, -(-width // 16)
        self.value, self.gate = self._linear(inner), self._linear(inner)
        self.conv = CausalConv(inner, bias=True)
        self.keys = self._linear(self.between + 2 * self.STATE, inner)
        self.time = self._linear(inner, self.between)
        self.log_rate = nn.Parameter(torch.empty(inner, self.STATE))
        self.time_bias, self.skip = (nn.Parameter(torch.empty(inner)) for _ in range(2))
        self.out = self._linear(width, inner)
        self.scan = SelectiveScan()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rates 1 to N, times from 0.001 to 0.1, and u added as it is."""
        _reset_times(self.time_bias)
        with torch.no_grad():
            self.log_rate.copy_(
                torch.arange(1, self.STATE + 1, device=self.log_rate.device).log().expand_as(self.log_rate)
            )
        nn.init.ones_(self.skip)

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        u = F.silu(self.conv(self.value(x), layout=layout))
        time, B, C = self.keys(u).split([self.between, self.STATE, self.STATE], -1)
        step = F.softplus(_wide(self.time(time)) + _wide(self.time_bias))
        y = self.scan(u, step, -_wide(self.log_rate).exp(), B, C, layout=layout)
        return self.out((y + u * self.skip.to(u.dtype)) * F.silu(self.gate(x)))


class RGLRU(Mixer):
    """The recurrent layer of Griffin (arXiv 2402.19427, section 2.4) around its RG-LRU: a^(8 r_t), r_t a gate.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t) behind a short convolution, beside a branch with GELU. The layers of
    the gates are of blocks, one a head.
    """

    POWER = 8.0

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.value, self.gate, self.out = (self._linear(width) for _ in range(3))
        self.conv = CausalConv(width, bias=True)
        block = width // heads
        self.input_gate, self.recurrence_gate = (nn.Parameter(torch.empty(heads, block, block)) for _ in range(2))
        self.input_bias, self.recurrence_bias, self.rate = (nn.Parameter(torch.empty(width)) for _ in range(3))
        self.recurrence = ElementwiseRecurrence()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """a = sigmoid(rate) so that a^8 is from 0.9 to 0.999; gates begin open by half."""
        with torch.no_grad():
            for weight in (self.input_gate, self.recurrence_gate):
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            self.input_bias.zero_()
            self.recurrence_bias.zero_()
            log_a = torch.empty_like(self.rate).uniform_(0.9, 0.999).log_().div_(self.POWER)
            self.rate.copy_(log_a - torch.log(-torch.expm1(log_a)))

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        u = self.conv(self.value(x), layout=layout)
        opened = [
            torch.sigmoid(_wide(torch.einsum("bthi,hij->bthj", self._split(u), weight.to(u.dtype)).flatten(2) + bias))
            for weight, bias in ((self.input_gate, self.input_bias), (self.recurrence_gate, self.recurrence_bias))
        ]
        log_a = self.POWER * opened[1] * F.logsigmoid(_wide(self.rate))
        new = torch.sqrt(_above_zero(-torch.expm1(2 * log_a))) * opened[0] * u
        h = self.recurrence(new.to(u.dtype), log_a, layout=layout)
        return self.out(h * F.gelu(self.gate(x)))


class KDA(DeltaNet):
    """Kimi Delta Attention (arXiv 2510.26692, section 4): the delta rule with a decay of each token and channel.

    Decay and output gate come from the token by way of as many channels as a head has.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        between = width // heads
        self.rate = nn.Sequential(self._linear(between), self._linear(width, between))
        self.gate = nn.Sequential(self._linear(between), nn.Linear(between, width))
        self.log_rate, self.rate_bias = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As Mamba's: rates from 1 to 16, times from 0.001 to 0.1."""
        _reset_rates(self.log_rate, self.rate_bias)

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        step = F.softplus(_wide(self.rate(x)) + _wide(self.rate_bias))
        log_decay = -_wide(self.log_rate).exp().unsqueeze(-1) * self._split(step)  # [B, T, H, K]
        o = self.norm(self._attend(x, log_decay, layout)).flatten(2)
        return self.out(o * torch.sigmoid(self.gate(x)))


class CosFormer2(Mixer):
    """Linear attention without decay, whose queries and keys turn with the position by learned angles (`LRPE`).

    cosFormer (arXiv 2202.08791) as arXiv 2406.16690 scales it: no denominator but a norm over all heads, and a gate,
    sigmoid(x W_1 W_2) with as many channels between as a head has.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.query, self.key, self.value, self.out = (self._linear(width) for _ in range(4))
        self.gate = nn.Sequential(self._linear(width // heads), self._linear(width, width // heads))
        self.lrpe = LRPE(heads, width // heads)
        self.attention = LightningAttention()

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        q, k = (self._split(F.silu(layer(x))) for layer in (self.query, self.key))
        q, k = self.lrpe(q, k, position_ids)  # [B, T, H, 2K]
        o = self.attention(q, k, self._split(self.value(x)), layout=layout)
        return norm_gate_linear(o, torch.sigmoid(self.gate(x)), self.out)


class TPE(Mixer):
    """Toeplitz positional encoding, for embeddings (arXiv 2405.21022): norm(sum_s q k lambda^(t - s) x_s) W.

    Linear attention in which queries and keys are the same for all tokens, so that what a token gets of another depends
    on their distance alone. q and k are learned, as is the decay lambda of each head, a sigmoid. (The paper's is for
    several dimensions; this is that of text.)
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.query, self.key = (nn.Parameter(torch.empty(heads, width // heads)) for _ in range(2))
        self.decay = nn.Parameter(torch.empty(heads))
        self.out = self._linear(width)
        self.attention = LightningAttention()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decays from about 0.5 to 0.99."""
        for parameter in (self.query, self.key):
            nn.init.normal_(parameter)
        with torch.no_grad():
            self.decay.copy_(torch.linspace(0, 5, self.heads))

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        v = self._split(x)
        q, k = (y.to(x.dtype).expand(*v.shape[:2], -1, -1) for y in (self.query, self.key))
        o = self.attention(q, k, v, F.logsigmoid(_wide(self.decay)), layout=layout)
        return norm_gate_linear(o, _open_gate(o, x), self.out)


class BlockSoftmax(SoftmaxMixer):
    """Softmax attention within blocks of `BLOCK` tokens: TransNormer's DiagAttention (arXiv 2210.10340, section 4)."""

    BLOCK = 64

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.attention = BlockAttention(self.BLOCK)


class NormAttention(Mixer):
    """Linear attention with a norm in place of the denominator, and phi(x) = elu(x) + 1 (arXiv 2210.10340, section 4).

    TransNormer has it in its later layers, where what a token needs lies farther than a block away.
    """

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.query, self.key, self.value, self.out = (self._linear(width) for _ in range(4))
        self.attention = LightningAttention(scale=(width // heads) ** -0.5)

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """See `Mixer`."""
        k, v = self._split(F.elu(self.key(x)) + 1), self._split(self.value(x))
        # As a function q is made while the state of k and v travels, where the sequence is split.
        o = self.attention(lambda: self._split(F.elu(self.query(x)) + 1), k, v, layout=layout)
        return norm_gate_linear(o, _open_gate(o, x), self.out)


# What they share


def _open_gate(o: Tensor, x: Tensor) -> Tensor:
    """Ones [B, T, H * V], in x's dtype, for o [B, T, H, V]."""
    return x.new_ones(*o.shape[:2], o.shape[2] * o.shape[3])


def _wide(x: Tensor) -> Tensor:
    """x in fp32 at least, as decays are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _reset_rates(log_rate: Tensor, rate_bias: Tensor) -> None:
    """Rates from 1 to 16, and times."""
    with torch.no_grad():
        log_rate.uniform_(1, 16).log_()
    _reset_times(rate_bias)


def _reset_times(bias: Tensor) -> None:
    """Set a bias so that softplus(bias) is a time from 0.001 to 0.1, log-uniform."""
    with torch.no_grad():
        time = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(0.1)).exp_()
        bias.copy_(time + torch.log(-torch.expm1(-time)))


def _above_zero(x: Tensor) -> Tensor:
    """Not below the smallest normal number: of 0 a logarithm is infinite, and so is the gradient of a root."""
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def _bounded_gate(logits: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logarithm of a forget gate that is no less than the bound, and 1 - gate."""
    if lower_bound is None:  # of small gates the logarithm of the sigmoid keeps its digits
        return F.logsigmoid(logits), torch.sigmoid(-logits)
    gate = _above_zero(lower_bound + (1 - lower_bound) * torch.sigmoid(logits))
    return gate.log(), (1 - lower_bound) * torch.sigmoid(-logits)


MIXERS: dict[str, type[Mixer]] = {
    "softmax": SoftmaxMixer,
    "block_softmax": BlockSoftmax,
    "transnormer": NormAttention,
    "cosformer2": CosFormer2,
    "retnet": Retention,
    "gla": GLA,
    "hgrn2": HGRN2,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KDA,
    "mamba2": Mamba2,
    "hgrn": HGRN,
    "mamba": Mamba,
    "rglru": RGLRU,
}
