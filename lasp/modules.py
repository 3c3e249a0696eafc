"""`LightningAttention`: the layer without parameters that models use and `parallelize` finds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lasp import arguments
from lasp.decay import fixed, values_of
from lasp.layout import ShardLayout
from lasp.ops.attention import linear_attention
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
