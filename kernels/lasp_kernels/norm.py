# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""RMS norm of rows, with a gate: what models do before a layer and after attention, one pass forward and one backward.

    y = x / sqrt(mean(x^2) + eps) * weight * activation(gate)

x is normalised over a row of W numbers, for attention the V of all its H heads; gate, weight, and what is to be added
to dx are optional. Unfused these are several memory-bound operators and their intermediate tensors; here forward moves
each tensor once and keeps one fp32 number a row. A program holds a whole row in registers. The gradient of the weight
is summed in a fixed order: each program sums its own rows, in order, and then PyTorch the programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp_kernels.once import no_second_derivative

ACTIVATIONS = {"none": 0, "sigmoid": 1, "silu": 2}
MAX_WIDTH = 32768  # of a row, so that it fits the registers of a program


def fused_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    """RMS norm of x [..., H, V] over its heads together, times weight [H * V], times activation(gate [..., H * V])."""
    check_norm_gate(x, gate, weight, activation)
    return _NormGate.apply(x, gate, weight, eps, activation)  # type: ignore[return-value]


def check_norm_gate(x: Tensor, gate: Tensor, weight: Tensor | None, activation: str) -> None:
    """Raise for what does not fit."""
    width = x.shape[-2] * x.shape[-1]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if gate.shape != (*x.shape[:-2], width):
        raise ValueError(f"gate must have shape {(*x.shape[:-2], width)}, got {tuple(gate.shape)}")
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"weight must have shape {(width,)}, got {tuple(weight.shape)}")
    if x.dtype == torch.float64 or width > MAX_WIDTH:
        raise ValueError(f"norm_gate takes fp32, fp16 or bf16 and rows of at most {MAX_WIDTH}, got {x.dtype}, {width}")


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if ACTIVATION == 0:
        return gate, tl.full(gate.shape, 1.0, tl.float32)
    elif ACTIVATION == 1:
        return sigmoid, sigmoid * (1.0 - sigmoid)
    else:
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid))


@triton.jit(do_not_specialize=["eps"])
def norm_kernel(
    X, GATE, WEIGHT, Y, SCALE, eps, gate_stride, W: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
):
    """One row a program. SCALE [rows] fp32 = 1 / sqrt(mean(x^2) + eps), for backward. GATE and WEIGHT may be None."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < W
    x = tl.load(X + row * W + c, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / W + eps)
    y = x * scale
    if WEIGHT is not None:
        y = y * tl.load(WEIGHT + c, mask=mask, other=0.0).to(tl.float32)
    if GATE is not None:
        gate = tl.load(GATE + row * gate_stride + c, mask=mask, other=0.0).to(tl.float32)
        y = y * activate(gate, ACTIVATION)[0]
    tl.store(Y + row * W + c, y.to(Y.dtype.element_ty), mask=mask)
    tl.store(SCALE + row, scale)


@triton.jit(do_not_specialize=["rows"])
def norm_gradient_kernel(
    X, GATE, WEIGHT, DY, SCALE, BESIDE, DX, DGATE, DWEIGHT, Y, rows, gate_stride,
    W: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Rows program_id, + programs, ... ; DWEIGHT [programs, W] fp32 is this program's part.

    BESIDE, if it is not None, is added to dx: the gradient of x that came by another way. Y, if it is not None, gets
    y again.
    """
    c = tl.arange(0, BLOCK)
    mask = c < W
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + c, mask=mask, other=0.0).to(tl.float32)
        d_weight = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        x = tl.load(X + row * W + c, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * W + c, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(SCALE + row)
        normed = x * scale
        d_normed, y = dy, normed
        if WEIGHT is not None:
            y = normed * weight
        if GATE is not None:
            gate = tl.load(GATE + row * gate_stride + c, mask=mask, other=0.0).to(tl.float32)
            activated, slope = activate(gate, ACTIVATION)
            d_normed = dy * activated
            tl.store(DGATE + row * W + c, (dy * y * slope).to(DGATE.dtype.element_ty), mask=mask)
            y = y * activated
        if WEIGHT is not None:
            d_weight += d_normed * normed
            d_normed = d_normed * weight
        if Y is not None:
            tl.store(Y + row * W + c, y.to(Y.dtype.element_ty), mask=mask)
        dx = scale * (d_normed - normed * (tl.sum(d_normed * normed, 0) / W))
        if BESIDE is not None:
            dx += tl.load(BESIDE + row * W + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(DX + row * W + c, dx.to(DX.dtype.element_ty), mask=mask)
    if WEIGHT is not None:
        tl.store(DWEIGHT + tl.program_id(0).to(tl.int64) * W + c, d_weight, mask=mask)


def norm(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, eps: float, activation: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y [rows, W] in `dtype`, and the scale of each row. x [rows, W] is contiguous, and so are the rows of the gate."""
    weight = None if weight is None else weight.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    if scale.numel():
        stride = 0 if gate is None else gate.stride(0)
        options = _launch_options(x.shape[1], activation)
        with torch.cuda.device_of(x):
            norm_kernel[(len(x),)](x, gate, weight, y, scale, float(eps), stride, **options)
    return y, scale


def norm_gradient(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    scale: Tensor,
    dy: Tensor,
    activation: str,
    *,
    beside: Tensor | None = None,
    again: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dx (with `beside` added to it), d gate, d weight, and y `again` in this dtype, from what `norm` was given."""
    rows, width = x.shape
    # What was saved may come back with other strides, from hooks of saved tensors.
    x, scale, dy = x.contiguous(), scale.contiguous(), dy.contiguous()
    gate, weight = None if gate is None else rows_of(gate, width), None if weight is None else weight.contiguous()
    dx = torch.empty_like(x)
    d_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    y = None if again is None else torch.empty(x.shape, dtype=again, device=x.device)
    programs = min(max(rows, 1), programs_of(x.device))
    d_weight = None if weight is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        norm_gradient_kernel[(programs,)](
            x, gate, weight, dy, scale, beside, dx, d_gate, d_weight, y, rows, 0 if gate is None else gate.stride(0),
            **_launch_options(width, activation),
        )  # fmt: skip
    if d_weight is not None and weight is not None:
        d_weight = d_weight.sum(0).to(weight.dtype)
    return dx, d_gate, d_weight, y


def rows_of(x: Tensor, width: int) -> Tensor:
    """x as [rows, width], whose rows are contiguous."""
    x = x.reshape(-1, width)
    return x if x.stride(1) == 1 else x.contiguous()


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps, activation):
        width = gate.shape[-1]
        flat_x, flat_gate = x.reshape(-1, width).contiguous(), rows_of(gate, width)
        y, scale = norm(flat_x, flat_gate, weight, eps, activation, x.dtype)
        ctx.save_for_backward(flat_x, flat_gate, weight, scale)
        ctx.shapes, ctx.activation = (x.shape, gate.shape), activation
        return y.view(gate.shape)

    @staticmethod
    @no_second_derivative("norm_gate")
    def backward(ctx, dy):
        x, gate, weight, scale = ctx.saved_tensors
        dy = dy.reshape(x.shape).contiguous()
        dx, d_gate, d_weight, _ = norm_gradient(x, gate, weight, scale, dy, ctx.activation)
        return dx.view(ctx.shapes[0]), d_gate.view(ctx.shapes[1]), d_weight, None, None


def _launch_options(width: int, activation: str) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    return {"W": width, "BLOCK": block, "ACTIVATION": ACTIVATIONS[activation], "num_warps": warps}


def programs_of(device: torch.device) -> int:
    """How many programs backward has: so many that a few rows of loads are in flight on every multiprocessor."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
