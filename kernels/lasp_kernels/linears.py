# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Linear layers together with what makes their input token by token: a norm, a gate.

    norm_linear         y_i = norm(x) W_i^T            for several W_i, and x for the residual beside it
    norm_gate_linear    y = (norm(x) * activation(gate)) W^T
    gated_linear        y = (value * activation(gate)) W^T
    norm_gate_linear_of_parts   the second where a row of x, and W, are in several parts

A linear layer keeps its input for the gradient of its weight. Here only x, gate and value are kept, which others keep
too; what the layer read is made again in backward, in the pass over memory that computes the gradients of these. So a
block of a model keeps a third less and moves less, and no product of matrices is computed twice. The gradients of
several layers that read the same are added up inside their products, and that of the residual in the norm's.

Behind a gated unit a block ends. So that activation checkpointing, which runs a block again until it has all that
backward needs, stops before this last product, `gated_linear` is two functions: the first keeps what backward needs and
gives a stand-in, whose place the product takes in the second.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lasp_kernels.norm import (
    ACTIVATIONS,
    activate,
    check_norm_gate,
    norm,
    norm_gradient,
    rows_of,
)
from lasp_kernels.once import no_second_derivative

BLOCK = 1024  # numbers of a program of the gate's kernels


def fused_norm_linear(
    x: Tensor, weights: tuple[Tensor, ...], norm_weight: Tensor | None = None, *, eps: float = 1e-6
) -> tuple[Tensor, ...]:
    """x itself, to be taken for a residual, and of each weight [N, D] the product with the RMS norm of x [..., D]."""
    if norm_weight is not None and norm_weight.shape != x.shape[-1:]:  # kernels would read behind its end
        raise ValueError(f"norm_weight must have shape {tuple(x.shape[-1:])}, got {tuple(norm_weight.shape)}")
    return _NormLinear.apply(x, norm_weight, eps, *weights)  # type: ignore[return-value]


def fused_norm_gate_linear(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "none",
) -> Tensor:
    """The linear layer with this weight [N, H * V] of `fused_norm_gate`."""
    check_norm_gate(x, gate, norm_weight, activation)
    return _NormGateLinear.apply(x, gate, norm_weight, weight, eps, activation)  # type: ignore[return-value]


def fused_norm_gate_linear_of_parts(
    x: Tensor, gate: Tensor, weight: Tensor, total: Callable[..., Tensor], parts: int, *, eps: float = 1e-6
) -> Tensor:
    """See `layers.norm_gate_linear_of_parts`. `total` gets fp32 [rows] and may write to it; in
    backward with `backward=True`."""
    check_norm_gate(x, gate, None, "none")
    return _NormGateLinearOfParts.apply(x, gate, weight, total, parts, eps)  # type: ignore[return-value]


def fused_gated_linear(value: Tensor, gate: Tensor, weight: Tensor, *, activation: str = "none") -> Tensor:
    """The linear layer with this weight [N, W] of value [..., W] times activation(gate [..., W])."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if gate.shape != value.shape:  # the kernel would read behind its end
        raise ValueError(f"gate must have the shape of value, {tuple(value.shape)}, got {tuple(gate.shape)}")
    stand_in = _GatedLinear.apply(value, gate, weight, activation)
    with torch.no_grad():
        y = F.linear(_gated(value, gate, weight.dtype, activation), weight)
    return _InPlaceOf.apply(stand_in, y)  # type: ignore[return-value]


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, eps, *weights):
        ctx.set_materialize_grads(False)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        h, scale = norm(flat, None, norm_weight, eps, "none", weights[0].dtype)
        ctx.save_for_backward(flat, scale, norm_weight, *weights)
        ctx.shape = x.shape
        return (x, *(F.linear(h, w).view(*x.shape[:-1], len(w)) for w in weights))

    @staticmethod
    @no_second_derivative("norm_linear")
    def backward(ctx, beside, *gradients):
        x, scale, norm_weight, *weights = ctx.saved_tensors
        dys = [None if dy is None else rows_of(dy, dy.shape[-1]) for dy in gradients]
        used = [(dy, w) for dy, w in zip(dys, weights) if dy is not None]
        if not used:
            return (beside, None, None, *[None] * len(weights))
        dh = used[0][0] @ used[0][1]
        for dy, w in used[1:]:
            dh.addmm_(dy, w)
        needs = ctx.needs_input_grad[3:]
        beside = None if beside is None else beside.reshape(x.shape).contiguous()
        dx, _, d_norm, h = norm_gradient(
            x, None, norm_weight, scale, dh, "none", beside=beside, again=dh.dtype if any(needs) else None
        )
        d_weights = [dy.T @ h if dy is not None and need and h is not None else None for dy, need in zip(dys, needs)]
        return (dx.view(ctx.shape), d_norm, None, *d_weights)


class _NormGateLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, norm_weight, weight, eps, activation):
        width = gate.shape[-1]
        flat_x, flat_gate = x.reshape(-1, width).contiguous(), rows_of(gate, width)
        h, scale = norm(flat_x, flat_gate, norm_weight, eps, activation, weight.dtype)
        ctx.save_for_backward(flat_x, flat_gate, norm_weight, scale, weight)
        ctx.shapes, ctx.activation = (x.shape, gate.shape), activation
        return F.linear(h, weight).view(*gate.shape[:-1], len(weight))

    @staticmethod
    @no_second_derivative("norm_gate_linear")
    def backward(ctx, dy):
        x, gate, norm_weight, scale, weight = ctx.saved_tensors
        dy = rows_of(dy, len(weight))
        dh = dy @ weight
        again = dh.dtype if ctx.needs_input_grad[3] else None
        dx, d_gate, d_norm, h = norm_gradient(x, gate, norm_weight, scale, dh, ctx.activation, again=again)
        d_weight = None if h is None else dy.T @ h
        return dx.view(ctx.shapes[0]), d_gate.view(ctx.shapes[1]), d_norm, d_weight, None, None


class _NormGateLinearOfParts(torch.autograd.Function):
    """The kernels see a part of a row. Its scale is put right by a factor of the row, and so is its gradient."""

    @staticmethod
    def forward(ctx, x, gate, weight, total, parts, eps):
        width = gate.shape[-1]
        flat_x, flat_gate = x.reshape(-1, width).contiguous(), rows_of(gate, width)
        h, of_part = norm(flat_x, flat_gate, None, eps, "none", weight.dtype)
        squares = total((of_part.pow(-2) - eps) * width)
        scale = torch.rsqrt(squares / (parts * width) + eps)
        h.mul_((scale / of_part).unsqueeze(1))
        ctx.save_for_backward(flat_x, flat_gate, scale, weight)
        ctx.shapes, ctx.total, ctx.parts = (x.shape, gate.shape), total, parts
        return F.linear(h, weight).view(*gate.shape[:-1], len(weight))

    @staticmethod
    @no_second_derivative("norm_gate_linear_of_parts")
    def backward(ctx, dy):
        x, gate, scale, weight = ctx.saved_tensors
        dy = rows_of(dy, len(weight))
        dh = dy @ weight
        again = dh.dtype if ctx.needs_input_grad[2] else None
        dx, d_gate, _, h = norm_gradient(x, gate, None, scale, dh, "none", again=again)
        # With n = x scale: dx = scale (dn - n sum(dn n) / W), where the kernel has the sum and W of this part alone.
        of_part = (d_gate * gate).sum(-1, dtype=torch.float32)
        excess = (of_part - ctx.total(of_part.clone(), backward=True) / ctx.parts) / gate.shape[-1]
        dx.addcmul_(x, (scale.square() * excess).to(x.dtype).unsqueeze(1))
        d_weight = None if h is None else dy.T @ h
        return dx.view(ctx.shapes[0]), d_gate.view(ctx.shapes[1]), d_weight, None, None, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gate, weight, activation):
        ctx.save_for_backward(value, gate, weight)
        ctx.activation = activation
        return weight.new_empty(()).expand(*value.shape[:-1], len(weight))  # one number

    @staticmethod
    @no_second_derivative("gated_linear")
    def backward(ctx, dy):
        value, gate, weight = ctx.saved_tensors
        dy = rows_of(dy, len(weight))
        dh = dy @ weight
        d_value, d_gate, h = _gate_gradients(value, gate, dh, ctx.activation, again=ctx.needs_input_grad[2])
        return d_value, d_gate, None if h is None else dy.T @ h.view(len(dy), weight.shape[1]), None


class _InPlaceOf(torch.autograd.Function):
    """y, whose gradient goes where that of the stand-in would."""

    @staticmethod
    def forward(ctx, stand_in, y):
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def _gated(value: Tensor, gate: Tensor, dtype: torch.dtype, activation: str) -> Tensor:
    h = torch.empty(value.shape, dtype=dtype, device=value.device)
    if h.numel():
        grid, options = _launch(h, activation)
        with torch.cuda.device_of(value):
            gate_kernel[grid](value.contiguous(), gate.contiguous(), h, h.numel(), **options)
    return h


def _gate_gradients(
    value: Tensor, gate: Tensor, dh: Tensor, activation: str, *, again: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """d value, d gate, and h `again`."""
    value, gate = value.contiguous(), gate.contiguous()
    d_value, d_gate = torch.empty_like(value), torch.empty_like(gate)
    h = torch.empty(value.shape, dtype=dh.dtype, device=dh.device) if again else None
    if dh.numel():
        grid, options = _launch(dh, activation)
        with torch.cuda.device_of(value):
            gate_gradient_kernel[grid](value, gate, dh, d_value, d_gate, h, dh.numel(), **options)
    return d_value, d_gate, h


def _launch(x: Tensor, activation: str) -> tuple[tuple[int], dict[str, int]]:
    return (triton.cdiv(x.numel(), BLOCK),), {"ACTIVATION": ACTIVATIONS[activation], "BLOCK": BLOCK, "num_warps": 4}


@triton.jit
def gate_kernel(VALUE, GATE, H, numbers, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """h = value * activation(gate)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numbers
    value = tl.load(VALUE + i, mask=mask).to(tl.float32)
    gate = tl.load(GATE + i, mask=mask).to(tl.float32)
    tl.store(H + i, (value * activate(gate, ACTIVATION)[0]).to(H.dtype.element_ty), mask=mask)


@triton.jit
def gate_gradient_kernel(
    VALUE, GATE, DH, DVALUE, DGATE, H, numbers, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The gradients of value and gate; H, if it is not None, gets h again."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numbers
    value = tl.load(VALUE + i, mask=mask).to(tl.float32)
    gate = tl.load(GATE + i, mask=mask).to(tl.float32)
    dh = tl.load(DH + i, mask=mask).to(tl.float32)
    activated, slope = activate(gate, ACTIVATION)
    tl.store(DVALUE + i, (dh * activated).to(DVALUE.dtype.element_ty), mask=mask)
    tl.store(DGATE + i, (dh * value * slope).to(DGATE.dtype.element_ty), mask=mask)
    if H is not None:
        tl.store(H + i, (value * activated).to(H.dtype.element_ty), mask=mask)
