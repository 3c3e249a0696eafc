"""A transformer whose attention is linear and has no decay: the second model that LASP was measured with.

The feature map elu(x) + 1 is that of "Transformers are RNNs" (arXiv 2006.16236, eq. 7). Its denominator is left out
and the output normalised instead, since that denominator makes gradients unbounded (arXiv 2210.10340, section 3); or
it is there, with `normalize`. The rest is the usual pre-norm transformer. Written for one device, as `lasp.models.tnl`;
shapes as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp import arguments
from lasp.layout import ShardLayout
from lasp.models.trunk import LanguageModel
from lasp.modules import LightningAttention


@dataclass(frozen=True)
class LinearTransformerConfig:
    """The size of a `LinearTransformer`.

    Args:
        vocab_size: tokens of the vocabulary.
        layers: number of blocks.
        width: D, the channels of a token; even.
        heads: H; it divides the width.
        mlp_width: inner channels of the feed-forward layer.
        normalize: divide what attention gives by the sum of its weights, as arXiv 2006.16236 does, with no norm behind.

    Raises:
        ValueError, TypeError: sizes that are no positive integers, or do not fit together.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    normalize: bool = False

    def __post_init__(self):
        arguments.flag("normalize", self.normalize)
        for name in ("vocab_size", "layers", "width", "heads", "mlp_width"):
            object.__setattr__(self, name, arguments.integer(name, getattr(self, name), at_least=1))
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and a multiple of heads, got {self.width} and {self.heads}")

    @classmethod
    def named(cls, name: str, **changes) -> LinearTransformerConfig:
        """A configuration by name: "tiny" or "385M", the sizes of the TNLs; `changes` are fields to set otherwise."""
        arguments.choice("name", name, SIZES)
        return replace(SIZES[name], **changes)


SIZES = {
    "tiny": LinearTransformerConfig(64000, layers=4, width=128, heads=4, mlp_width=512),
    "385M": LinearTransformerConfig(64000, layers=24, width=1024, heads=8, mlp_width=4096),
}


class LinearTransformer(LanguageModel):
    """The language model: embedding with sinusoidal positions, blocks, norm, head.

    Args:
        config: its size, a `LinearTransformerConfig`.

    Raises:
        TypeError: `config` is something else.
    """

    def __init__(self, config: LinearTransformerConfig):
        super().__init__()
        if not isinstance(config, LinearTransformerConfig):
            raise TypeError(f"config must be a LinearTransformerConfig, got {arguments.shown(config)}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Random weights; call it after `to_empty` if the model was built on the meta device."""
        nn.init.normal_(self.embedding.weight)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in self.blocks:  # what a block adds starts small, as the number of blocks asks
                for out in (block.attention.out, block.mlp[-1]):  # type: ignore[union-attr,index]
                    out.weight.mul_((2 * self.config.layers) ** -0.5)  # type: ignore[union-attr,operator]
            self.head.weight.mul_(0.1)  # nearly equal logits: the loss starts at ln(vocab_size)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Tokens [B, T] and their positions to x [B, T, D]."""
        x = self.embedding(input_ids)
        return x + sinusoids(position_ids, self.config.width).to(x.dtype)

    def run(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None) -> Tensor:
        """x [B, T, D] through all blocks."""
        for block in self.blocks:
            x = block(x, layout)
        return x


def sinusoids(position_ids: Tensor, width: int) -> Tensor:
    """Sine and cosine of each position (arXiv 1706.03762, section 3.5): integers [..., T] to fp32 [..., T, width]."""
    if position_ids.is_floating_point():
        raise TypeError(f"position_ids must be integers, got {position_ids.dtype}")
    exponent = torch.arange(0, width, 2, device=position_ids.device, dtype=torch.float32) / -width
    angle = position_ids.float().unsqueeze(-1) * torch.pow(10000.0, exponent)
    return torch.cat([angle.sin(), angle.cos()], -1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LinearTransformerConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = MultiHeadLinearAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.mlp_width), nn.GELU(), nn.Linear(config.mlp_width, config.width)
        )

    def forward(self, x: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """x [B, T, D] to the same shape and dtype; the layout as in `LinearTransformer.forward`."""
        x = x + self.attention(self.attention_norm(x), layout)
        return x + self.mlp(self.mlp_norm(x))


class MultiHeadLinearAttention(nn.Module):
    """norm(phi(x W_q) sum_s phi(x W_k)^T (x W_v)) W_o with phi(x) = elu(x) + 1; the norm is RMS, in each head.

    Or in its place, with `config.normalize`, a division by phi(x W_q) sum_s phi(x W_k)^T.
    """

    def __init__(self, config: LinearTransformerConfig):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.channels = D // self.heads  # K
        self.query = nn.Linear(D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        scale = 1.0 if config.normalize else 1 / math.sqrt(D // self.heads)
        self.attention = LightningAttention(scale=scale, normalize=config.normalize)

    def forward(self, x: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """x [B, T, D] to the same shape and dtype; the layout as in `LinearTransformer.forward`."""
        split = (*x.shape[:2], self.heads, self.channels)  # [B, T, H, K]
        k = F.elu(self.key(x)).add(1).view(split)
        v = self.value(x).view(split)
        # As a function q is made while the state of k and v travels, where the sequence is split.
        o = self.attention(lambda: F.elu(self.query(x)).add(1).view(split), k, v, layout=layout)
        o = o if self.attention.normalize else F.rms_norm(o, o.shape[-1:], eps=1e-6)
        return self.out(o.flatten(2))
