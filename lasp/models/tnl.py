"""TransNormerLLM (TNL): linear attention with a decay for each head, norms without parameters, gated linear units.

The model is that of "TransNormerLLM" (arXiv 2307.14995) as "Various Lengths, Constant Speed" (arXiv 2405.17381)
trains it. It is written for one device; `lasp.parallelize` splits its sequence over ranks. Shapes in comments:
B sequences, T tokens (of this rank), D the width, H heads of K = D / H channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lasp import arguments, decay
from lasp.layout import ShardLayout
from lasp.models._linears import Parts, SimpleRMSNorm, gated_linear, norm_gate_linear, norm_linear
from lasp.models.lrpe import LRPE
from lasp.models.sizes import SIZES
from lasp.models.trunk import LanguageModel
from lasp.modules import LightningAttention


@dataclass(frozen=True)
class TNLConfig:
    """The size of a TNL, and which of its published variants it is.

    Args:
        vocab_size: tokens of the vocabulary.
        layers: number of blocks.
        width: D, the channels of a token.
        heads: H; it divides the width.
        glu_width: inner channels of the gated linear unit.
        decay: the schedule of `lasp.decay` by name. "alibi" is that of the released weights, "tnl" the paper's.
        lrpe: rotate queries and keys of the first layer by position. It doubles the attention state there.

    Raises:
        ValueError, TypeError: sizes that are no positive integers or do not fit together, a schedule that there is not.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    glu_width: int
    decay: str = "alibi"
    lrpe: bool = True

    def __post_init__(self):
        for name in ("vocab_size", "layers", "width", "heads", "glu_width"):
            object.__setattr__(self, name, arguments.integer(name, getattr(self, name), at_least=1))
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        arguments.choice("decay", self.decay, decay.SCHEDULES)
        arguments.flag("lrpe", self.lrpe)

    @classmethod
    def named(cls, name: str, **changes) -> TNLConfig:
        """A configuration by name (`lasp.models.sizes`): "tiny", "385M", "1B", "7B", or "scaling-70M" to "scaling-7B";
        `changes` are fields to set otherwise. The vocabulary is that of OpenNLPLab's models, 64000, if not changed."""
        arguments.choice("name", name, SIZES)
        return replace(cls(64000, *SIZES[name]), **changes)


class TNL(LanguageModel):
    """The language model: embedding, blocks, norm, head.

    To build it without memory, for a size that one device cannot hold::

        with torch.device("meta"):
            model = TNL(config)
        ...                               # lasp.parallelize, fully_shard
        model.to_empty(device="cuda")
        model.init_weights()

    Args:
        config: its size, a `TNLConfig`.

    Raises:
        TypeError: `config` is something else.
    """

    def __init__(self, config: TNLConfig):
        super().__init__()
        if not isinstance(config, TNLConfig):
            raise TypeError(f"config must be a TNLConfig, got {arguments.shown(config)}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = SimpleRMSNorm()
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Random weights: unit-sized activations at the start, and nearly uniform predictions."""
        nn.init.normal_(self.embedding.weight, std=self.config.width**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, LRPE):
                module.reset_parameters()
        with torch.no_grad():
            for block in self.blocks:  # what a block adds starts small, as the number of blocks asks
                for layer in (block.attention, block.glu):
                    layer.out.weight.mul_((2 * self.config.layers) ** -0.5)  # type: ignore[union-attr,operator]
            self.head.weight.mul_(0.1)  # nearly equal logits: the loss starts at ln(vocab_size)

    @property
    def counts_positions(self) -> bool:
        """Only what rotates queries and keys does."""
        return self.config.lrpe

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Tokens [B, T] to x [B, T, D]."""
        x = self.embedding(input_ids) * math.sqrt(self.config.width)
        if torch.is_autocast_enabled(x.device.type):  # between the blocks, too, as in FSDP2's mixed precision
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x


class Block(nn.Module):
    """x + attention(norm(x)), then x + glu(norm(x)) (arXiv 2405.17381, section 4)."""

    def __init__(self, config: TNLConfig, layer: int):
        super().__init__()
        self.attention = GatedLinearAttention(config, layer)
        self.glu = SimpleGLU(config)

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """x [B, T, D] to the same shape and dtype; the rest as in `TNL.forward`."""
        return self.glu(self.attention(x, position_ids, layout))


class GatedLinearAttention(nn.Module):
    """x + [norm(attention(swish(h W_q), swish(h W_k), h W_v)) * h W_u] W_o, h = norm(x) (arXiv 2405.17381, section 4).

    The second norm spans all heads of a token. Queries are not scaled by 1 / sqrt(K): the norm would undo it.
    """

    parts: Parts | None = None  # where its heads are in parts

    def __init__(self, config: TNLConfig, layer: int):
        super().__init__()
        D, self.heads = config.width, config.heads
        self.channels = D // self.heads  # K
        self.norm = SimpleRMSNorm()
        self.query = nn.Linear(D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.gate = nn.Linear(D, D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.lrpe = LRPE(self.heads, D // self.heads) if config.lrpe and layer == 0 else None
        self.attention = LightningAttention(decay.schedule(config.decay, self.heads, layer, config.layers))

    def forward(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None = None) -> Tensor:
        """x [B, T, D] to the same shape and dtype; the rest as in `TNL.forward`."""
        beside, x = x, self.parts.enter(x) if self.parts else x
        split = (*x.shape[:2], self.heads, self.channels)  # [B, T, H, K]
        if self.lrpe is None and self.attention.overlaps:
            x, k, v = norm_linear(x, self.norm, self.key, self.value, activations=("silu", "none"))
            gate = x

            def query() -> Tensor:
                """And the gate: while the state of k and v travels."""
                nonlocal x, gate
                x, q, gate = norm_linear(x, self.norm, self.query, self.gate, activations=("silu", "none"))
                return q.view(split)

            o = self.attention(query, k.view(split), v.view(split), layout=layout)
        else:
            layers, activations = (self.query, self.key, self.value, self.gate), ("silu", "silu", "none", "none")
            x, q, k, v, gate = norm_linear(x, self.norm, *layers, activations=activations)
            q, k = q.view(split), k.view(split)
            if self.lrpe is not None:
                q, k = self.lrpe(q, k, position_ids)  # [B, T, H, 2K]
            o = self.attention(q, k, v.view(split), layout=layout)
        return norm_gate_linear(o, gate, self.out, beside if self.parts else x)


class SimpleGLU(nn.Module):
    """x + (h W_v * h W_u) W_o, h = norm(x): a gated linear unit without activation (arXiv 2307.14995, section 3.1)."""

    parts: Parts | None = None  # where its inner channels are in parts

    def __init__(self, config: TNLConfig):
        super().__init__()
        self.norm = SimpleRMSNorm()
        self.value = nn.Linear(config.width, config.glu_width, bias=False)
        self.gate = nn.Linear(config.width, config.glu_width, bias=False)
        self.out = nn.Linear(config.glu_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] to the same shape and dtype."""
        rest, value, gate = norm_linear(self.parts.enter(x) if self.parts else x, self.norm, self.value, self.gate)
        return gated_linear(value, gate, self.out, residual=x if self.parts else rest)
