# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The stage after attention: RMS norm over the concatenated heads, times a gate, in one pass forward and one backward.

    y = x / sqrt(mean(x^2) + eps) * weight * activation(gate)

x [..., H, V] is normalised over H * V; gate and y are [..., H * V], weight [H * V]. Unfused these are three memory-
bound operators and their intermediate tensors; here forward moves 3 tensors and keeps one fp32 number a row, and
backward moves 5. A program holds a whole row in registers. The gradient of the weight is summed in a fixed order:
each program sums its own rows, in order, and then PyTorch the programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATIONS = {"none": 0, "sigmoid": 1, "silu": 2}
MAX_WIDTH = 32768  # of a row, so that it fits the registers of a program


def fused_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    """RMS norm of x [..., H, V] over its heads together, times weight [H * V], times activation(gate [..., H * V])."""
    width = x.shape[-2] * x.shape[-1]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if gate.shape != (*x.shape[:-2], width):
        raise ValueError(f"gate must have shape {(*x.shape[:-2], width)}, got {tuple(gate.shape)}")
    if weight is not None and weight.shape != (width,):
        raise ValueError(f"weight must have shape {(width,)}, got {tuple(weight.shape)}")
    if x.dtype == torch.float64 or width > MAX_WIDTH:
        raise ValueError(f"norm_gate takes fp32, fp16 or bf16 and rows of at most {MAX_WIDTH}, got {x.dtype}, {width}")
    return _NormGate.apply(x, gate, weight, eps, activation)  # type: ignore[return-value]


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """The activation and its derivative."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if ACTIVATION == 0:
        return gate, tl.full(gate.shape, 1.0, tl.float32)
    elif ACTIVATION == 1:
        return sigmoid, sigmoid * (1.0 - sigmoid)
    else:
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid))


@triton.jit(do_not_specialize=["eps"])
def norm_gate_kernel(
    X, GATE, WEIGHT, Y, SCALE, eps, gate_stride, W: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
):
    """One row a program. SCALE [rows] fp32 = 1 / sqrt(mean(x^2) + eps), for backward."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < W
    x = tl.load(X + row * W + c, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gate_stride + c, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / W + eps)
    y = x * scale
    if WEIGHT is not None:
        y = y * tl.load(WEIGHT + c, mask=mask, other=0.0).to(tl.float32)
    activated, _ = _activate(gate, ACTIVATION)
    tl.store(Y + row * W + c, (y * activated).to(Y.dtype.element_ty), mask=mask)
    tl.store(SCALE + row, scale)


@triton.jit(do_not_specialize=["rows"])
def norm_gate_gradient_kernel(
    X, GATE, WEIGHT, DY, SCALE, DX, DGATE, DWEIGHT, rows, gate_stride,
    W: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Rows program_id, + programs, ... ; DWEIGHT [programs, W] fp32 is this program's part."""
    c = tl.arange(0, BLOCK)
    mask = c < W
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + c, mask=mask, other=0.0).to(tl.float32)
        d_weight = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        x = tl.load(X + row * W + c, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(GATE + row * gate_stride + c, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * W + c, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(SCALE + row)
        activated, slope = _activate(gate, ACTIVATION)
        normed = x * scale
        d_normed = dy * activated
        if WEIGHT is not None:
            d_weight += d_normed * normed
            d_normed = d_normed * weight
            dy = dy * weight
        tl.store(DGATE + row * W + c, (dy * normed * slope).to(DGATE.dtype.element_ty), mask=mask)
        dx = scale * (d_normed - normed * (tl.sum(d_normed * normed, 0) / W))
        tl.store(DX + row * W + c, dx.to(DX.dtype.element_ty), mask=mask)
    if WEIGHT is not None:
        tl.store(DWEIGHT + tl.program_id(0).to(tl.int64) * W + c, d_weight, mask=mask)


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, weight, eps, activation):
        width = gate.shape[-1]
        flat_x, flat_gate = x.reshape(-1, width), gate.reshape(-1, width)
        flat_gate = flat_gate if flat_gate.stride(1) == 1 else flat_gate.contiguous()
        flat_x = flat_x.contiguous()
        y = torch.empty(gate.shape, dtype=x.dtype, device=x.device)
        scale = torch.empty(flat_x.shape[0], dtype=torch.float32, device=x.device)
        ctx.launch = _launch_options(width, activation)
        if scale.numel():
            norm_gate_kernel[(scale.numel(),)](
                flat_x, flat_gate, weight, y, scale, float(eps), flat_gate.stride(0), **ctx.launch
            )
        ctx.save_for_backward(flat_x, flat_gate, weight, scale)
        ctx.shapes = x.shape, gate.shape
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, weight, scale = ctx.saved_tensors
        rows, width = x.shape
        dx, d_gate = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(gate)
        d_gate = d_gate if d_gate.is_contiguous() else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        programs = min(max(rows, 1), _programs(x.device))
        d_weight = None if weight is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
        norm_gate_gradient_kernel[(programs,)](
            x, gate, weight, dy.reshape(rows, width).contiguous(), scale, dx, d_gate, d_weight, rows, gate.stride(0),
            **ctx.launch,
        )  # fmt: skip
        if d_weight is not None:
            d_weight = d_weight.sum(0).to(weight.dtype)
        return dx.view(ctx.shapes[0]), d_gate.view(ctx.shapes[1]), d_weight, None, None


def _launch_options(width: int, activation: str) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    return {"W": width, "BLOCK": block, "ACTIVATION": ACTIVATIONS[activation], "num_warps": warps}


def _programs(device: torch.device) -> int:
    """Of the backward: a few rows' worth of loads in flight on every multiprocessor."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
