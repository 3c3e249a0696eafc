"""Linear layers of a model together with the norm or gate before them, in one function where that is faster.

What computes them (lasp_kernels.linears) takes weights. So layers that are more than their weight, with hooks, an
adapter of LoRA, in 8 bits or wrapped one by one, are called as any others.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _global

import lasp_kernels as kernels


class SimpleRMSNorm(nn.Module):
    """x sqrt(D) / |x|, without a gain (arXiv 2307.14995, section 3.1); computed in fp32 inside."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to the same shape and dtype."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


def norm_linear(x: Tensor, norm: nn.Module, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """x [..., D], to be taken for the residual, and of each layer its output for norm(x).

    What has replaced the RMS norm of the model, or one of the layers, is called as it is.
    """
    if not (all(map(_is_its_weight, layers)) and _is_rms_norm(norm)):
        h = norm(x)
        return (x, *(layer(h) for layer in layers))
    weights = [layer.weight for layer in layers]
    return kernels.norm_linear(x, weights, getattr(norm, "weight", None), eps=norm.eps)  # type: ignore[arg-type]


def norm_gate_linear(x: Tensor, gate: Tensor, layer: nn.Linear) -> Tensor:
    """layer(norm(x) * gate), the RMS norm over all heads of x [B, T, H, V] together, and gate [B, T, H * V]."""
    if not _is_its_weight(layer):
        return layer(kernels.norm_gate(x, gate))
    return kernels.norm_gate_linear(x, gate, layer.weight)


def gated_linear(value: Tensor, gate: Tensor, layer: nn.Linear, activation: str = "none") -> Tensor:
    """layer(value * activation(gate)), both [..., W]; "none", "sigmoid" or "silu"."""
    if not _is_its_weight(layer):
        return layer(value * kernels.activation_of(activation)(gate))
    return kernels.gated_linear(value, gate, layer.weight, activation=activation)


def _is_its_weight(layer: Any) -> bool:
    """Whether calling the layer is to multiply by its weight, and nothing else. (Libraries for 8 bits put a weight of a
    class of their own into a plain layer.)"""
    plain = type(layer) is nn.Linear and layer.bias is None and type(layer.weight) in (nn.Parameter, Tensor)
    return plain and not _has_hooks(layer)


def _is_rms_norm(norm: Any) -> bool:
    return type(norm) in (SimpleRMSNorm, nn.RMSNorm) and norm.eps is not None and not _has_hooks(norm)


def _has_hooks(layer: Any) -> bool:
    """Whether calling the module does more than its class says."""
    return bool(
        "forward" in layer.__dict__
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or _global._global_forward_hooks
        or _global._global_forward_pre_hooks
        or _global._global_backward_hooks
        or _global._global_backward_pre_hooks
    )
