"""The operators as modules, which models use and `parallelize` finds.

A model holds them, gives them what its own layers have made of its tokens, and knows no ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasp import arguments
from lasp.checks import reach
from lasp.decay import fixed, values_of
from lasp.layout import ShardLayout
from lasp.ops import recompute
from lasp.ops.attention import linear_attention
from lasp.ops.call import padding_of
from lasp.ops.delta import delta_rule
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp.ops.halo import block_attention, causal_conv
from lasp.ops.softmax import softmax_attention
from lasp.ranks import SequenceParallel


class LightningAttention(nn.Module):
    """Causal linear attention of q, k, v, as a module. It has no parameters and no entry in the `state_dict`.

    Args:
        log_decay: the fixed decay of each head, [H], finite and <= 0 (see `lasp.decay`), or None. It stays fp32
            whatever dtype the model is cast to. A decay that is learned or depends on data is an argument of `forward`
            instead.
        scale: multiplies the output.
        normalize: divide the output by the query's product with the sum of keys, see `lasp.linear_attention`.

    Raises:
        ValueError, TypeError: values that are no decays, or require a gradient; a scale that is no finite number.
    """

    sequence: SequenceParallel | None = None  # set by lasp.parallelize

    def __init__(self, log_decay: Tensor | None = None, *, scale: float = 1.0, normalize: bool = False):
        super().__init__()
        # Not a buffer: model.to(bfloat16) would round it, and a decay in bf16 is a bug.
        self._fixed = None if log_decay is None else values_of("log_decay", log_decay)
        self._on_device: Tensor | None = None
        self.scale, self.normalize = arguments.number("scale", scale), arguments.flag("normalize", normalize)
        self._copy_to(torch.get_default_device())

    def log_decay(self, device: torch.device) -> Tensor | None:
        """The fixed decay on a device; copied there once."""
        if self._fixed is None or self._fixed.device == device:
            return self._fixed
        if self._on_device is None or self._on_device.device != device:
            self._on_device = fixed(self._fixed, device)
        return self._on_device

    def keep_heads(self, first: int, number: int) -> None:
        """Go on with these heads only: their fixed decays, if there are any. Inputs then have so many heads."""
        if self._fixed is not None:
            device = None if self._on_device is None else self._on_device.device
            self._fixed, self._on_device = self._fixed[first : first + number].clone(), None
            if device is not None:
                self.log_decay(device)

    def _apply(self, fn, recurse: bool = True):
        """When the module moves: also the decay, which else would first be copied inside a compiled graph."""
        super()._apply(fn, recurse)
        self._copy_to(fn(torch.empty(0, device="cpu")).device)
        return self

    def _copy_to(self, device: torch.device) -> None:
        if device.type == "cuda":
            self.log_decay(device)

    def forward(
        self,
        q: Tensor | Callable[[], Tensor],
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None = None,
        *,
        layout: ShardLayout | None = None,
    ) -> Tensor:
        """q [B, T, H*G, K], k [B, T, H, K], v [B, T, H, V] to o [B, T, H*G, V]; see `lasp.linear_attention`.

        Or q and k with fewer heads than v, whose number o then has. q may be a function that makes it, which is called
        while the state travels to the next rank.
        """
        if log_decay is None:
            log_decay = self.log_decay(k.device)
        elif self._fixed is not None:
            raise ValueError("log_decay is fixed for this layer; it cannot also be given to forward")
        options = {"log_decay": log_decay, "scale": self.scale, "normalize": self.normalize, "layout": layout}
        return linear_attention(q, k, v, sequence=self.sequence, **options)[0]  # type: ignore[arg-type]

    @property
    def overlaps(self) -> bool:
        """Whether something travels while a function makes q; else it may as well be made together with k and v."""
        return self.sequence is not None and self.sequence.size > 1

    def extra_repr(self) -> str:
        """The heads that decay, the scale, and whether it is normalised."""
        decay = "none" if self._fixed is None else f"[{len(self._fixed)}]"
        normalize = ", normalize=True" if self.normalize else ""
        return f"log_decay={decay}, scale={self.scale}{normalize}"


class DeltaRule(nn.Module):
    """`lasp.delta_rule` as a module, without parameters.

    Args:
        scale: multiplies the output.

    Raises:
        ValueError, TypeError: a scale that is no finite number.
    """

    sequence: SequenceParallel | None = None  # set by lasp.parallelize

    def __init__(self, *, scale: float = 1.0):
        super().__init__()
        self.scale = arguments.number("scale", scale)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None = None,
        *,
        layout: ShardLayout | None = None,
    ) -> Tensor:
        """q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H] to o [B, T, H, V]; see `lasp.delta_rule`."""
        options = {"log_decay": log_decay, "scale": self.scale, "layout": layout, "sequence": self.sequence}
        return delta_rule(q, k, v, beta, **options)[0]  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.scale}"


class SoftmaxAttention(nn.Module):
    """`lasp.softmax_attention` as a module, without parameters: the softmax layers of hybrids.

    Args:
        scale: multiplies the scores; None is 1 / sqrt(K).
        window: tokens that a query sees, its own among them; None is all before it.

    Raises:
        ValueError, TypeError: a scale that is no finite number, a window that is no positive integer.
    """

    sequence: SequenceParallel | None = None  # set by lasp.parallelize

    def __init__(self, *, scale: float | None = None, window: int | None = None):
        super().__init__()
        self.scale = None if scale is None else arguments.number("scale", scale)
        self.window = None if window is None else arguments.integer("window", window, at_least=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, layout: ShardLayout | None = None) -> Tensor:
        """q [B, T, H*G, K], k [B, T, H, K], v [B, T, H, V] to o [B, T, H*G, V]; see `lasp.softmax_attention`."""
        options = {"scale": self.scale, "window": self.window, "layout": layout, "sequence": self.sequence}
        return softmax_attention(q, k, v, **options)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The scale, and the window."""
        return f"scale={self.scale}, window={self.window}"


class BlockAttention(nn.Module):
    """`lasp.block_attention` as a module, without parameters: softmax attention within blocks of `block` tokens.

    Args:
        block: tokens of a block, counted from the beginning of the sequence, or of a packed document.
        scale: multiplies the scores; None is 1 / sqrt(K).

    Raises:
        ValueError, TypeError: a block that is no positive integer, a scale that is no finite number.
    """

    sequence: SequenceParallel | None = None  # set by lasp.parallelize

    def __init__(self, block: int, *, scale: float | None = None):
        super().__init__()
        self.block = arguments.integer("block", block, at_least=1)
        self.scale = None if scale is None else arguments.number("scale", scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, layout: ShardLayout | None = None) -> Tensor:
        """q [B, T, H*G, K], k [B, T, H, K], v [B, T, H, V] to o [B, T, H*G, V]; see `lasp.block_attention`."""
        return block_attention(q, k, v, self.block, scale=self.scale, layout=layout, sequence=self.sequence)

    def extra_repr(self) -> str:
        """The block and the scale."""
        return f"{self.block}, scale={self.scale}"


class CausalConv(nn.Module):
    """A short causal convolution of each channel (`lasp.causal_conv`), with its weight [channels, width].

    Args:
        channels: of a token.
        width: tokens that an output sees, its own among them.
        bias: add one to each channel.

    Raises:
        ValueError, TypeError: channels or a width that are no positive integers, a bias that is no bool.
    """

    sequence: SequenceParallel | None = None  # set by lasp.parallelize

    def __init__(self, channels: int, width: int = 4, *, bias: bool = False):
        super().__init__()
        channels, width = (arguments.integer(n, x, at_least=1) for n, x in (("channels", channels), ("width", width)))
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if arguments.flag("bias", bias) else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform, as `nn.Conv1d` begins."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, *, layout: ShardLayout | None = None) -> Tensor:
        """x [B, T, channels] to the same shape; see `lasp.causal_conv`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)  # under autocast x has another
        return causal_conv(x, self.weight.to(x.dtype), bias, layout=layout, sequence=self.sequence)

    def extra_repr(self) -> str:
        """The channels, the width, and whether there is a bias."""
        return f"{self.weight.shape[0]}, width={self.weight.shape[1]}, bias={self.bias is not None}"


class ElementwiseRecurrence(nn.Module):
    """`elementwise_recurrence` of lasp.ops.elementwise as a module, without parameters: HGRN, RG-LRU."""

    sequence: SequenceParallel | None = None  # set by lasp.parallelize

    def forward(self, x: Tensor, log_decay: Tensor, *, layout: ShardLayout | None = None) -> Tensor:
        """x and log_decay [B, T, D] to h of the same shape, h_t = exp(log_decay_t) h_{t-1} + x_t."""
        return elementwise_recurrence(x, log_decay, layout=layout, sequence=self.sequence)


class SelectiveScan(nn.Module):
    """Mamba's `selective_scan` of lasp.ops.elementwise as a module, without parameters."""

    sequence: SequenceParallel | None = None  # set by lasp.parallelize

    def forward(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, layout: ShardLayout | None = None
    ) -> Tensor:
        """u and dt [B, T, D], A [D, N], B and C [B, T, N] to y [B, T, D]."""
        return selective_scan(u, dt, A, B, C, layout=layout, sequence=self.sequence)


class Counted(NamedTuple):
    """What a `Router` has counted in a forward, of this rank's tokens.

    Attributes:
        chosen: [experts], int64: how often each.
        probability: [experts], fp32 (fp64 of fp64 logits): the sum over tokens of the softmax of all logits, with its
            gradient.
    """

    chosen: Tensor
    probability: Tensor


class Router(nn.Module):
    """Chooses experts for each token, from that token alone; who is chosen how often `lasp.balance_loss` asks.

    As in LLaMA-MoE v2 (arXiv 2411.15708): of the logits x W the largest are chosen, and the gates are the softmax over
    these alone, times `scale`.

    Args:
        width: D, channels of a token.
        experts: among which it chooses.
        chosen: how many of them for a token.
        scale: of the gates; None is `chosen`, so that those of a token are 1 on average.

    Raises:
        ValueError, TypeError: sizes that are no positive integers, more chosen than there are experts, a scale that is
            no finite number.
    """

    sequence: SequenceParallel | None = None  # set by lasp.parallelize
    counted: Counted | None = None  # of the last forward, until lasp.balance_loss has taken it

    def __init__(self, width: int, experts: int, chosen: int, *, scale: float | None = None):
        super().__init__()
        width, self.experts, self.chosen = (
            arguments.integer(name, x, at_least=1)
            for name, x in (("width", width), ("experts", experts), ("chosen", chosen))
        )
        if self.chosen > self.experts:
            raise ValueError(f"chosen must be at most the {self.experts} experts, got {chosen}")
        self.scale = float(self.chosen) if scale is None else arguments.number("scale", scale)
        self.score = nn.Linear(width, self.experts, bias=False)

    def forward(self, x: Tensor, *, layout: ShardLayout | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] to gates [B, T, chosen], in x's dtype, and the experts they are of, int64.

        The layout says which tokens are padding and count for nothing.
        """
        logits = self.score(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest, chosen = logits.topk(self.chosen, -1)
        counted = self._count(logits, chosen, layout)  # also in a recompute, which must save what the original saved
        if torch.compiler.is_compiling() or not recompute.under_way():
            self.counted = counted
        return (largest.softmax(-1) * self.scale).to(x.dtype), chosen

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or a file: without what the last forward has counted, which is part of its graph."""
        return {name: x for name, x in self.__dict__.items() if name != "counted"}

    def _count(self, logits: Tensor, chosen: Tensor, layout: ShardLayout | None) -> Counted:
        padding = padding_of(logits, layout, self.sequence)
        if self.sequence is not None:
            reach.note_call("the router", logits, layout, self.sequence, reach.BALANCE)
        if padding is not None:
            logits, chosen = padding.cut(logits), padding.cut(chosen)
        times = chosen.new_zeros(self.experts)
        times.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        return Counted(times, logits.softmax(-1).flatten(0, -2).sum(0))

    def extra_repr(self) -> str:
        """How many experts are chosen, of how many, and the scale."""
        return f"{self.chosen} of {self.experts}, scale={self.scale}"


OPERATOR_MODULES = (
    LightningAttention,
    DeltaRule,
    SoftmaxAttention,
    CausalConv,
    BlockAttention,
    ElementwiseRecurrence,
    SelectiveScan,
)
"""All of them: what `parallelize` gives the ranks to."""
