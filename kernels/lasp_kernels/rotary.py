# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Rotation of queries and keys by their positions, forward and backward in one pass each.

    y = [x cos(angle), x sin(angle)],  angle = position * theta

Angles are computed in fp64, since in fp32 that of token 4,000,000 would be off by a quarter, and reduced to one turn.
In PyTorch that is a dozen passes over tensors of 8 bytes a number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp_kernels.norm import programs_of
from lasp_kernels.once import no_second_derivative

TURN = tl.constexpr(6.283185307179586)


def fused_rotate(q: Tensor, k: Tensor, position_ids: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], positions [B, T] or [T], theta [H, K] in fp32 or fp64, to q, k [B, T, H, 2K] as they were."""
    if k.shape != q.shape or theta.shape != q.shape[2:]:  # kernels would read behind their ends
        wanted, got = (tuple(q.shape), tuple(q.shape[2:])), (tuple(k.shape), tuple(theta.shape))
        raise ValueError(f"k and theta must have shapes {wanted[0]}, as q, and {wanted[1]}, got {got[0]} and {got[1]}")
    positions = position_ids.expand(q.shape[:2]).reshape(-1).contiguous()
    return _Rotate.apply(q, k, positions, theta)  # type: ignore[return-value]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, positions, theta):
        q, k, theta = q.contiguous(), k.contiguous(), theta.contiguous()
        *tokens, H, K = q.shape
        q_out, k_out = (torch.empty(*tokens, H, 2 * K, dtype=x.dtype, device=x.device) for x in (q, k))
        if len(positions):
            with torch.cuda.device_of(q):
                rotate_kernel[(len(positions),)](q, k, positions, theta, q_out, k_out, **_launch(H, K))
        ctx.save_for_backward(q, k, positions, theta)
        return q_out, k_out

    @staticmethod
    @no_second_derivative("rotate")
    def backward(ctx, dq_out, dk_out):
        q, k, positions, theta = (x.contiguous() for x in ctx.saved_tensors)  # hooks may give other strides
        H, K = theta.shape
        dq, dk = torch.empty_like(q), torch.empty_like(k)
        programs = min(max(len(positions), 1), programs_of(q.device))
        d_theta = torch.empty(programs, H, K, dtype=torch.float64, device=q.device)
        with torch.cuda.device_of(q):
            rotate_gradient_kernel[(programs,)](
                q, k, positions, theta, dq_out.contiguous(), dk_out.contiguous(), dq, dk, d_theta, len(positions),
                **_launch(H, K),
            )  # fmt: skip
        return dq, dk, None, d_theta.sum(0).to(theta.dtype)


def _launch(H: int, K: int) -> dict[str, int]:
    block = triton.next_power_of_2(H * K)
    return {"H": H, "K": K, "BLOCK": block, "num_warps": min(16, max(1, block // 256))}


@triton.jit
def _turned(position, theta):
    """cos and sin of position * theta."""
    angle = position.to(tl.float64) * theta.to(tl.float64)
    angle = (angle - tl.floor(angle / TURN) * TURN).to(tl.float32)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def rotate_kernel(Q, KEY, POSITION, THETA, Q_OUT, KEY_OUT, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < H * K
    out = token * (2 * H * K) + c // K * (2 * K) + c % K
    cos, sin = _turned(tl.load(POSITION + token), tl.load(THETA + c, mask=mask, other=0.0))
    q = tl.load(Q + token * (H * K) + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(Q_OUT + out, (q * cos).to(Q_OUT.dtype.element_ty), mask=mask)
    tl.store(Q_OUT + out + K, (q * sin).to(Q_OUT.dtype.element_ty), mask=mask)
    k = tl.load(KEY + token * (H * K) + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(KEY_OUT + out, (k * cos).to(KEY_OUT.dtype.element_ty), mask=mask)
    tl.store(KEY_OUT + out + K, (k * sin).to(KEY_OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def rotate_gradient_kernel(
    Q, KEY, POSITION, THETA, DQ_OUT, DKEY_OUT, DQ, DKEY, DTHETA, tokens,
    H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens program_id, + programs, ...; DTHETA [programs, H, K] fp64 is this program's part."""
    c = tl.arange(0, BLOCK)
    mask = c < H * K
    theta = tl.load(THETA + c, mask=mask, other=0.0)
    d_theta = tl.zeros([BLOCK], tl.float64)
    for i in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(i, tl.int64)
        position = tl.load(POSITION + token)
        cos, sin = _turned(position, theta)
        at, out = token * (H * K) + c, token * (2 * H * K) + c // K * (2 * K) + c % K
        d_cos = tl.load(DQ_OUT + out, mask=mask, other=0.0).to(tl.float32)
        d_sin = tl.load(DQ_OUT + out + K, mask=mask, other=0.0).to(tl.float32)
        tl.store(DQ + at, (d_cos * cos + d_sin * sin).to(DQ.dtype.element_ty), mask=mask)
        slope = tl.load(Q + at, mask=mask, other=0.0).to(tl.float32) * (d_sin * cos - d_cos * sin)
        d_cos = tl.load(DKEY_OUT + out, mask=mask, other=0.0).to(tl.float32)
        d_sin = tl.load(DKEY_OUT + out + K, mask=mask, other=0.0).to(tl.float32)
        tl.store(DKEY + at, (d_cos * cos + d_sin * sin).to(DKEY.dtype.element_ty), mask=mask)
        slope += tl.load(KEY + at, mask=mask, other=0.0).to(tl.float32) * (d_sin * cos - d_cos * sin)
        d_theta += slope.to(tl.float64) * position.to(tl.float64)
    tl.store(DTHETA + tl.program_id(0).to(tl.int64) * (H * K) + c, d_theta, mask=mask)
