"""`Decoder`: one model for the published families, whose layers differ in what mixes their tokens, and hybrids of them.

Pre-norm blocks of a mixer (`lasp.models.mixers`) and a gated unit with swish (arXiv 2002.05202), RMS norms with
weights: the frame of LLaMA, in which these families are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lasp import arguments
from lasp.layout import ShardLayout
from lasp.models._linears import gated_linear, norm_linear
from lasp.models.mixers import HGRN, HGRN2, MIXERS, Mixer
from lasp.models.trunk import LanguageModel
from lasp.modules import CausalConv


@dataclass(frozen=True)
class DecoderConfig:
    """The size of a `Decoder`, and its families.

    Args:
        family: of its layers: a key of `lasp.models.mixers.MIXERS`, such as "gla".
        vocab_size: tokens of the vocabulary.
        layers: number of blocks.
        width: D, the channels of a token.
        heads: H; twice H divides the width.
        glu_width: inner channels of the gated unit.
        pattern: which layers are of the family and which are softmax attention: letters L and S, repeated over the
            layers, so that "LLLS" makes every fourth a softmax layer.
    """

    family: str
    vocab_size: int
    layers: int
    width: int
    heads: int
    glu_width: int
    pattern: str = "L"

    def __post_init__(self):
        arguments.choice("family", self.family, MIXERS)
        for name in ("vocab_size", "layers", "width", "heads", "glu_width"):
            object.__setattr__(self, name, arguments.integer(name, getattr(self, name), at_least=1))
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the heads, got {self.width} and {self.heads}")
        if not isinstance(self.pattern, str) or not self.pattern or set(self.pattern) - set("LS"):
            raise ValueError(f"pattern must be letters L and S, such as LLLS, got {self.pattern!r}")

    @classmethod
    def named(cls, family: str, size: str, **changes) -> DecoderConfig:
        """A configuration by family and size: "tiny", "385M", "1B" or "7B", the shapes of `TNLConfig`'s; `changes` are
        fields to set otherwise."""
        arguments.choice("size", size, SIZES)
        layers, width, heads, glu_width = SIZES[size]
        return replace(cls(family, 64000, layers, width, heads, glu_width), **changes)

    def family_of(self, layer: int) -> str:
        """Of a layer, by the pattern."""
        return self.family if self.pattern[layer % len(self.pattern)] == "L" else "softmax"


SIZES = {
    "tiny": (4, 128, 4, 384),
    "385M": (24, 1024, 8, 2816),
    "1B": (16, 2048, 16, 5632),
    "7B": (30, 4096, 32, 11008),
}


class Decoder(LanguageModel):
    """The language model. On the meta device it is built as `lasp.models.TNL` is."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if not isinstance(config, DecoderConfig):
            raise TypeError(f"config must be a DecoderConfig, got {arguments.shown(config)}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        gated = config.family in ("hgrn", "hgrn2")
        # Of HGRN's and HGRN2's gates: the bound of a layer is the share of all layers before it.
        self.bound_shares = nn.Parameter(torch.empty(config.layers, config.width)) if gated else None
        self.init_weights()

    def init_weights(self) -> None:
        """Random weights: unit-sized activations at the start, and nearly uniform predictions."""
        nn.init.normal_(self.embedding.weight)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.RMSNorm, CausalConv, Mixer)):
                module.reset_parameters()
        with torch.no_grad():
            for block in self.blocks:  # what a block adds starts small, as the number of blocks asks
                for layer in (block.mixer.out, block.out):  # type: ignore[union-attr]
                    layer.weight.mul_((2 * self.config.layers) ** -0.5)  # type: ignore[union-attr,operator]
            self.head.weight.mul_(0.1)  # nearly equal logits: the loss starts at ln(vocab_size)
            if self.bound_shares is not None:
                self.bound_shares.zero_()

    def run(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None) -> Tensor:
        """x [B, T, D] through all blocks."""
        bounds = None if self.bound_shares is None else self._lower_bounds()
        for number, block in enumerate(self.blocks):
            x = block(x, position_ids, layout, None if bounds is None else bounds[number])
        return x

    def _lower_bounds(self) -> Tensor:
        """[layers, D], from 0 in the first layer on, growing, below 1 (HGRN, arXiv 2311.04823, section 3.2)."""
        assert self.bound_shares is not None
        wide = self.bound_shares.to(torch.promote_types(self.bound_shares.dtype, torch.float32))
        shares = wide.softmax(0)
        return shares.cumsum(0) - shares


class DecoderBlock(nn.Module):
    """x + mixer(norm(x)), then x + (swish(h W_g) * h W_v) W_o, h = norm(x)."""

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer = MIXERS[config.family_of(layer)](config.width, config.heads)
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.value = nn.Linear(config.width, config.glu_width, bias=False)
        self.gate = nn.Linear(config.width, config.glu_width, bias=False)
        self.out = nn.Linear(config.glu_width, config.width, bias=False)

    def forward(
        self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None, lower_bound: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D] to the same shape and dtype; lower_bound [D] of a gate of HGRN or HGRN2."""
        more = (lower_bound,) if isinstance(self.mixer, (HGRN, HGRN2)) else ()
        x = x + self.mixer(self.mixer_norm(x), position_ids, layout, *more)
        x, value, gate = norm_linear(x, self.norm, self.value, self.gate)
        return x + gated_linear(value, gate, self.out, activation="silu")
