"""Linear layers of a model together with the norm or gate before them, in one function where that is faster.

What computes them (lasp_kernels.linears) takes weights. So layers that are more than their weight, with hooks, an
adapter of LoRA, in 8 bits or wrapped one by one, are called as any others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _global

import lasp_kernels as kernels


class Parts(Protocol):
    """What is done together by those that each hold a part of a layer's heads or inner channels, where they do.

    A layer between the two, such as attention, reads the whole stream of tokens, and gives its part of a sum over all
    heads. So the parts meet twice a layer, once in each direction. `lasp.tensor_parallel` makes it.
    """

    number: int  # of parts

    def enter(self, x: Tensor) -> Tensor:
        """x, which each part reads; its gradient is the sum over the parts."""
        ...

    def leave(self, x: Tensor) -> Tensor:
        """The sum over the parts; its gradient is each part's."""
        ...

    def total(self, x: Tensor, *, backward: bool = False) -> Tensor:
        """The sum over the parts, which each of them goes on with; its gradient is the sum of theirs. With `backward`
        it is a sum of gradients, and has none."""
        ...


class SimpleRMSNorm(nn.Module):
    """x sqrt(D) / |x|, without a gain (arXiv 2307.14995, section 3.1); computed in fp32 inside."""

    eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to the same shape and dtype."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


def norm_linear(
    x: Tensor, norm: nn.Module, *layers: nn.Linear, activations: Sequence[str] | None = None
) -> tuple[Tensor, ...]:
    """x [..., D], to be taken for the residual, and of each layer its output for norm(x), through its activation.

    What has replaced the RMS norm of the model, or one of the layers, is called as it is. `activations` are "none" or
    "silu", one a layer; None is none.
    """
    weights = [_weight_of(layer) for layer in layers]
    if not _is_rms_norm(norm) or not all([weight is not None for weight in weights]):
        h = norm(x)
        ys = (layer(h) for layer in layers)
        return (x, *(kernels.activation_of(name)(y) for name, y in zip(activations or ["none"] * len(layers), ys)))
    gain = getattr(norm, "weight", None)
    return kernels.norm_linear(x, weights, gain, eps=norm.eps, activations=activations)  # type: ignore[arg-type]


def norm_gate_linear(x: Tensor, gate: Tensor, layer: nn.Linear, residual: Tensor | None = None) -> Tensor:
    """layer(norm(x) * gate), the RMS norm over all heads of x [B, T, H, V] together, and gate [B, T, H * V]; plus the
    residual, if there is one."""
    weight, parts = _weight_of(layer), parts_of(layer)
    if parts is None and weight is not None:
        return kernels.norm_gate_linear(x, gate, weight, residual=residual)
    if parts is None:
        y = layer(kernels.norm_gate(x, gate))
    elif weight is None:
        y = layer(kernels.norm_of_parts(x.flatten(-2), parts.total, parts.number) * gate)
    else:
        y = parts.leave(kernels.norm_gate_linear_of_parts(x, gate, weight, parts.total, parts.number))
    return y if residual is None else residual + y


def gated_linear(
    value: Tensor, gate: Tensor, layer: nn.Linear, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """layer(value * activation(gate)), both [..., W], "none", "sigmoid" or "silu"; plus the residual, if any."""
    weight, parts = _weight_of(layer), parts_of(layer)
    if weight is not None and parts is None:
        return kernels.gated_linear(value, gate, weight, activation=activation, residual=residual)
    if weight is None:
        y = layer(value * kernels.activation_of(activation)(gate))
    else:
        assert parts is not None
        y = parts.leave(kernels.gated_linear(value, gate, weight, activation=activation))
    return y if residual is None else residual + y


def parts_of(layer: nn.Module) -> Parts | None:
    """Of a layer that holds a part of the channels that it reads; None of one that reads all."""
    return layer.__dict__.get("parts")


def _weight_of(layer: Any) -> Tensor | None:
    """If calling the layer is to multiply by its weight, and nothing else. (Libraries for 8 bits put a weight of a
    class of their own into a plain layer.)"""
    multiplies = type(layer).forward is nn.Linear.forward or parts_of(layer) is not None
    if not (isinstance(layer, nn.Linear) and multiplies and layer.bias is None) or _has_hooks(layer):
        return None
    weight = layer.weight
    return weight if type(weight) in (nn.Parameter, Tensor) else None


def _is_rms_norm(norm: Any) -> bool:
    plain = type(norm).forward in (SimpleRMSNorm.forward, nn.RMSNorm.forward)
    return plain and norm.eps is not None and not _has_hooks(norm)


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
