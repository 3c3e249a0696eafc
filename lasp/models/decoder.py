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
from lasp.models._linears import Parts, gated_linear, norm_linear
from lasp.models.experts import GatedExperts, HeadExperts, cut_unit
from lasp.models.lrpe import LRPE
from lasp.models.mixers import HGRN, HGRN2, MIXERS, TPE, Mixer
from lasp.models.sizes import SIZES
from lasp.models.trunk import LanguageModel
from lasp.modules import CausalConv, Router


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
        experts: into so many slices the inner channels of each gated unit are cut, of which every token chooses
            some (`lasp.models.experts`); 0 is none. Train them with `lasp.balance_loss`.
        experts_per_token: that it chooses.
        shared_experts: slices beside these that all tokens take.
        attention_experts: groups of heads of each mixer, of which every token takes the outputs of as many; 0 is all.
        tpe: add a Toeplitz positional encoding (`lasp.models.mixers.TPE`) to the embeddings, as cosFormer2 does.

    Raises:
        ValueError, TypeError: a family that there is not, or sizes that are no integers or do not fit together.
    """

    family: str
    vocab_size: int
    layers: int
    width: int
    heads: int
    glu_width: int
    pattern: str = "L"
    experts: int = 0
    experts_per_token: int = 2
    shared_experts: int = 0
    attention_experts: int = 0
    tpe: bool = False

    def __post_init__(self):
        arguments.choice("family", self.family, MIXERS)
        for name in ("vocab_size", "layers", "width", "heads", "glu_width"):
            object.__setattr__(self, name, arguments.integer(name, getattr(self, name), at_least=1))
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the heads, got {self.width} and {self.heads}")
        if not isinstance(self.pattern, str) or not self.pattern or set(self.pattern) - set("LS"):
            raise ValueError(f"pattern must be letters L and S, such as LLLS, got {self.pattern!r}")
        arguments.flag("tpe", self.tpe)
        self._check_experts()

    def _check_experts(self) -> None:
        for name in ("experts", "experts_per_token", "shared_experts", "attention_experts"):
            least = int(name == "experts_per_token")
            object.__setattr__(self, name, arguments.integer(name, getattr(self, name), at_least=least))
        for name in ("experts", "attention_experts"):
            if 0 < getattr(self, name) < self.experts_per_token:
                raise ValueError(
                    f"experts_per_token must be at most {name}, {getattr(self, name)}, got {self.experts_per_token}"
                )
        slices = self.experts + self.shared_experts
        if self.shared_experts and not self.experts:
            raise ValueError(f"shared_experts must be 0 where experts are none, got {self.shared_experts}")
        if self.experts and self.glu_width % slices:
            raise ValueError(
                f"experts + shared_experts must divide glu_width {self.glu_width}, got {self.experts} + "
                f"{self.shared_experts}"
            )
        if self.attention_experts and self.heads % self.attention_experts:
            raise ValueError(f"attention_experts must divide the {self.heads} heads, got {self.attention_experts}")

    @classmethod
    def named(cls, family: str, size: str, **changes) -> DecoderConfig:
        """A configuration by family and size (`lasp.models.sizes`): "tiny", "385M", "1B", "7B", or "scaling-70M" to
        "scaling-7B"; `changes` are fields to set otherwise."""
        arguments.choice("size", size, SIZES)
        return replace(cls(family, 64000, *SIZES[size]), **changes)

    def family_of(self, layer: int) -> str:
        """The family of a layer, by the pattern. TransNormer's first half of layers is softmax within blocks."""
        if self.pattern[layer % len(self.pattern)] == "S":
            return "softmax"
        in_first_half = layer < self.layers // 2
        return "block_softmax" if self.family == "transnormer" and in_first_half else self.family


class Decoder(LanguageModel):
    """The language model. On the meta device it is built as `lasp.models.TNL` is.

    Args:
        config: its size, a `DecoderConfig`.

    Raises:
        TypeError: `config` is something else.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        if not isinstance(config, DecoderConfig):
            raise TypeError(f"config must be a DecoderConfig, got {arguments.shown(config)}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.tpe = TPE(config.width, config.heads) if config.tpe else None
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
            elif isinstance(module, (nn.RMSNorm, CausalConv, Mixer, LRPE, GatedExperts)):
                module.reset_parameters()
        with torch.no_grad():
            for block in self.blocks:  # what a block adds starts small, as the number of blocks asks
                block.scale_output((2 * self.config.layers) ** -0.5)  # type: ignore[operator]
            self.head.weight.mul_(0.1)  # nearly equal logits: the loss starts at ln(vocab_size)
            if self.bound_shares is not None:
                self.bound_shares.zero_()

    def run(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None) -> Tensor:
        """x [B, T, D] through all blocks."""
        if self.tpe is not None:
            x = x + self.tpe(x, position_ids, layout)
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
    """x + mixer(norm(x)), then x + (swish(h W_g) * h W_v) W_o, h = norm(x); or experts in place of either."""

    parts: Parts | None = None  # where the inner channels of the gated unit are in parts

    def __init__(self, config: DecoderConfig, layer: int):
        super().__init__()
        width, inner = config.width, config.glu_width
        self.mixer_norm = nn.RMSNorm(width, eps=1e-6)
        self.mixer = MIXERS[config.family_of(layer)](width, config.heads)
        self.head_experts = self.experts = None
        if config.attention_experts:
            self.head_experts = HeadExperts(self.mixer.out, width, config.attention_experts, config.experts_per_token)
            self.mixer.out = nn.Identity()  # type: ignore[assignment]
        self.norm = nn.RMSNorm(width, eps=1e-6)
        if config.experts:
            self.experts = GatedExperts(width, inner, config.experts, config.experts_per_token, config.shared_experts)
            return
        self.value = nn.Linear(width, inner, bias=False)
        self.gate = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply the weights of the last layers, of mixer and gated unit."""
        (self.mixer if self.head_experts is None else self.head_experts).out.weight.mul_(factor)
        if self.experts is None:
            self.out.weight.mul_(factor)
        else:
            self.experts.scale_output(factor)

    def forward(
        self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None, lower_bound: Tensor | None = None
    ) -> Tensor:
        """x [B, T, D] to the same shape and dtype; lower_bound [D] of a gate of HGRN or HGRN2."""
        more = (lower_bound,) if isinstance(self.mixer, (HGRN, HGRN2)) else ()
        h = self.mixer_norm(x)
        mixed = self.mixer(h, position_ids, layout, *more)
        x = x + (mixed if self.head_experts is None else self.head_experts(h, mixed, layout=layout))
        if self.experts is not None:
            return x + self.experts(self.norm(x), layout=layout)
        rest, value, gate = norm_linear(self.parts.enter(x) if self.parts else x, self.norm, self.value, self.gate)
        return gated_linear(value, gate, self.out, "silu", x if self.parts else rest)


def experts_from_dense(
    model: Decoder,
    *,
    experts: int = 0,
    experts_per_token: int = 2,
    shared_experts: int = 0,
    attention_experts: int = 0,
) -> Decoder:
    """A model with experts, cut from the weights of a dense one (LLaMA-MoE v2, arXiv 2411.15708), to be trained on.

    The inner channels of a gated unit become experts in their order, the last of them shared ones; heads become experts
    in theirs. Routers begin at random, small; where all experts are chosen at zero, and the output is then what that of
    the dense model is, up to the order of sums.

    Args:
        model: without experts; it is left as it is, and shares no memory with the result.
        experts: as of `DecoderConfig`.
        experts_per_token: as of `DecoderConfig`.
        shared_experts: as of `DecoderConfig`.
        attention_experts: as of `DecoderConfig`.

    Returns:
        A `Decoder` with as many weights, and routers, on the device and in the dtype of the other.

    Raises:
        TypeError, ValueError: no `Decoder`, one that has experts, none asked for, or numbers that do not fit.
    """
    if not isinstance(model, Decoder):
        raise TypeError(f"model must be a lasp.models.Decoder, got {arguments.shown(model)}")
    if model.config.experts or model.config.attention_experts:
        raise ValueError(f"model must have no experts, got {model.config}")
    config = replace(
        model.config,
        experts=experts,
        experts_per_token=experts_per_token,
        shared_experts=shared_experts,
        attention_experts=attention_experts,
    )
    if not (config.experts or config.attention_experts):
        raise ValueError(f"experts or attention_experts must be more than 0, got {experts} and {attention_experts}")
    with model.head.weight.device:
        made = Decoder(config).to(model.head.weight.dtype)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    for path, router in made.named_modules():
        if isinstance(router, Router):
            all_chosen = router.chosen == router.experts
            nn.init.zeros_(router.score.weight) if all_chosen else nn.init.normal_(router.score.weight, std=0.02)
            state[f"{path}.score.weight"] = router.score.weight.detach()
    for number in range(config.layers):
        block = f"blocks.{number}"
        if config.experts:
            unit = (state.pop(f"{block}.{name}.weight") for name in ("value", "gate", "out"))
            cut = cut_unit(*unit, config.experts, config.shared_experts)
            state |= {f"{block}.experts.{name}": x for name, x in cut.items()}
        if config.attention_experts:
            state[f"{block}.head_experts.out.weight"] = state.pop(f"{block}.mixer.out.weight")
    made.load_state_dict(state)
    return made.train(model.training)
