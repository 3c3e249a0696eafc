"""The operators as modules, which models use and `parallelize` finds.

A model holds them, gives them what its own layers have made of its tokens, and knows no ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lasp import arguments
from lasp.decay import fixed, values_of
from lasp.layout import ShardLayout
from lasp.ops.attention import linear_attention
from lasp.ops.delta import delta_rule
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp.ops.halo import causal_conv
from lasp.ops.softmax import softmax_attention
from lasp.ranks import SequenceParallel


class LightningAttention(nn.Module):
    """Causal linear attention of q, k, v, as a module. It has no parameters and no entry in the `state_dict`.

    Args:
        log_decay: the fixed decay of each head, [H], finite and <= 0 (see `lasp.decay`), or None. It stays fp32
            whatever dtype the model is cast to. A decay that is learned or depends on data is an argument of `forward`
            instead.
        scale: multiplies the output.

    Raises:
        ValueError, TypeError: values that are no decays, or require a gradient; a scale that is no finite number.
    """

    sequence: SequenceParallel | None = None  # set by lasp.parallelize

    def __init__(self, log_decay: Tensor | None = None, *, scale: float = 1.0):
        super().__init__()
        # Not a buffer: model.to(bfloat16) would round it, and a decay in bf16 is a bug.
        self._fixed = None if log_decay is None else values_of("log_decay", log_decay)
        self._on_device: Tensor | None = None
        self.scale = arguments.number("scale", scale)
        self._copy_to(torch.get_default_device())

    def log_decay(self, device: torch.device) -> Tensor | None:
        """The fixed decay on a device; copied there once."""
        if self._fixed is None or self._fixed.device == device:
            return self._fixed
        if self._on_device is None or self._on_device.device != device:
            self._on_device = fixed(self._fixed, device)
        return self._on_device

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

        q may be a function that makes it, which is called while the state travels to the next rank.
        """
        if log_decay is None:
            log_decay = self.log_decay(k.device)
        elif self._fixed is not None:
            raise ValueError("log_decay is fixed for this layer; it cannot also be given to forward")
        o, _ = linear_attention(q, k, v, log_decay=log_decay, scale=self.scale, layout=layout, sequence=self.sequence)
        return o

    @property
    def overlaps(self) -> bool:
        """Whether something travels while a function makes q; else it may as well be made together with k and v."""
        return self.sequence is not None and self.sequence.size > 1

    def extra_repr(self) -> str:
        """The heads that decay, and the scale."""
        decay = "none" if self._fixed is None else f"[{len(self._fixed)}]"
        return f"log_decay={decay}, scale={self.scale}"


class DeltaRule(nn.Module):
    """`lasp.delta_rule` as a module, without parameters; `scale` multiplies the output."""

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


class CausalConv(nn.Module):
    """A short causal convolution of each channel (`lasp.causal_conv`), with its weight [channels, width].

    Args:
        channels: of a token.
        width: tokens that an output sees, its own among them.
        bias: add one to each channel.
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
        """Its size."""
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


OPERATOR_MODULES = (LightningAttention, DeltaRule, SoftmaxAttention, CausalConv, ElementwiseRecurrence, SelectiveScan)
