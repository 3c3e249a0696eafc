"""The layers around an operator: norm and gate behind it, linear layers, rotation before it.

On a GPU each is one pass over memory, or a product with what stands before and behind it: for few rows without a
gradient few_rows.py, else linears.py, norm.py and rotary.py. On a CPU, in fp64 and under `torch.compile`, which fuses
by itself, it is PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp_kernels.reference import activation_of, reference_norm_gate, reference_rotate, state_dtype


def norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    """RMS norm of x [..., H, V] over its heads together, times weight [H * V], times activation(gate [..., H * V]).

    What models do after attention, in one pass over memory on a GPU (`norm.py`); in PyTorch on a CPU, in
    fp64, and under `torch.compile`, which fuses it by itself. Returns [..., H * V] in x's dtype.
    `activation` is "none", "sigmoid" or "silu".
    """
    if x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        from lasp_kernels.norm import fused_norm_gate

        return fused_norm_gate(x, gate, weight, eps=eps, activation=activation)
    return reference_norm_gate(x, gate, weight, eps=eps, activation=activation)


def norm_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activations: Sequence[str] | None = None,
) -> tuple[Tensor, ...]:
    """Of each weight [N, D] the linear layer of rms_norm(x [..., D]) * norm_weight [D]; first x itself.

    Take that x for what is added behind the layers: on a GPU its gradient is then added in the pass that computes the
    norm's, and the norm is made again in backward instead of being kept (`linears.py`). In PyTorch elsewhere; and where
    x has a few rows on a GPU and there is no gradient, in one launch that reads the weights once (`few_rows.py`).
    `activations`, of each layer's output, are "none" or "silu"; None is none.
    """
    names = ("none",) * len(weights) if activations is None else tuple(activations)
    if len(names) != len(weights) or any([name not in ("none", "silu") for name in names]):
        raise ValueError(
            f'activations must be "none" or "silu" for each of {len(weights)} weights, or None, got {activations!r}'
        )
    if _few_rows(x, x.shape[-1], *weights):
        from lasp_kernels import few_rows

        return (x, *few_rows.norm_linear(x, weights, norm_weight, eps=eps, activations=names))
    if _fuses(x, *weights):
        from lasp_kernels.linears import fused_norm_linear

        x, *ys = fused_norm_linear(x, _cast(*weights), norm_weight, eps=eps)
    else:
        h = F.rms_norm(x, x.shape[-1:], norm_weight, eps)
        ys = [F.linear(h, w) for w in weights]
    return (x, *(activation_of(name)(y) for name, y in zip(names, ys)))


def norm_gate_linear(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The linear layer with this weight [N, H * V] of `norm_gate`, which on a GPU is made again in backward; plus
    residual [..., N], if there is one."""
    if _few_rows(x, weight.shape[1], weight):
        from lasp_kernels import few_rows

        options = {"eps": eps, "activation": activation, "residual": residual}
        return few_rows.norm_gate_linear(x, gate, weight, norm_weight, **options)
    if _fuses(x, weight):
        from lasp_kernels.linears import fused_norm_gate_linear

        y = fused_norm_gate_linear(x, gate, _cast(weight)[0], norm_weight, eps=eps, activation=activation)
    else:
        y = F.linear(norm_gate(x, gate, norm_weight, eps=eps, activation=activation), weight)
    return y if residual is None else residual + y


def norm_gate_linear_of_parts(
    x: Tensor, gate: Tensor, weight: Tensor, total: Callable[..., Tensor], parts: int, *, eps: float = 1e-6
) -> Tensor:
    """This part's summand of `norm_gate_linear`, where x [..., H, V], the gate and the columns of the weight [N, H * V]
    are those of some heads, one of so many equal parts. The norm is over the heads of all parts: `total` gives the sum
    of a tensor over them, with its gradient; with `backward=True` that of a gradient, which has none."""
    if _fuses(x, weight):
        from lasp_kernels.linears import fused_norm_gate_linear_of_parts

        return fused_norm_gate_linear_of_parts(x, gate, _cast(weight)[0], total, parts, eps=eps)
    return F.linear(norm_of_parts(x.flatten(-2), total, parts, eps=eps) * gate, weight)


def norm_of_parts(
    x: Tensor, total: Callable[[Tensor], Tensor], parts: int, weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """RMS norm of x [..., W] times weight [W], where both are one of so many equal parts of a row; `total` as above."""
    wide = x.to(state_dtype(x.dtype))
    squares = total(wide.square().sum(-1, keepdim=True))
    y = wide * torch.rsqrt(squares / (parts * x.shape[-1]) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def gated_linear(
    value: Tensor, gate: Tensor, weight: Tensor, *, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """The layer with this weight [N, W] of value [..., W] times activation(gate [..., W]), plus residual [..., N].

    The product is made again in backward on a GPU, and kept elsewhere.
    """
    if _few_rows(value, value.shape[-1], weight):
        from lasp_kernels import few_rows

        return few_rows.gated_linear(value, gate, weight, activation=activation, residual=residual)
    if _fuses(value, weight):
        from lasp_kernels.linears import fused_gated_linear

        y = fused_gated_linear(value, gate, _cast(weight)[0], activation=activation)
    else:
        y = F.linear(value * activation_of(activation)(gate), weight)
    return y if residual is None else residual + y


def rotate(q: Tensor, k: Tensor, position_ids: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """[x cos(position * theta), x sin(position * theta)] of q and k [B, T, H, K], as [B, T, H, 2K] of the same dtype.

    position_ids integers [B, T] or [T], theta [H, K] in fp32 or fp64; angles are computed in fp64. On a GPU in one pass
    over memory (`rotary.py`), elsewhere in PyTorch.
    """
    if q.is_cuda and q.dtype != torch.float64 and not torch.compiler.is_compiling():
        from lasp_kernels.rotary import fused_rotate

        return fused_rotate(q, k, position_ids, theta)
    return reference_rotate(q, k, position_ids, theta)


def _few_rows(x: Tensor, width: int, *weights: Tensor) -> bool:
    """Whether the kernels of few_rows.py serve, for x of rows of so many numbers: on a GPU, without a gradient."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    from lasp_kernels.few_rows import serves

    return serves(x, width, *weights)


def _fuses(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels of linears.py serve."""
    if not x.is_cuda or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    return torch.is_autocast_enabled("cuda") or all(w.dtype == x.dtype for w in weights)


def _cast(*weights: Tensor) -> tuple[Tensor, ...]:
    """As autocast would."""
    if not torch.is_autocast_enabled("cuda"):
        return weights
    dtype = torch.get_autocast_dtype("cuda")
    return tuple(w.to(dtype) for w in weights)
