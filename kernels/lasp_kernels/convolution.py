"""Causal depthwise convolution of tokens that know the W - 1 tokens before them.

    y_t = bias + sum_{j < W} weight[:, j] * x_{t - W + 1 + j}

`weight[:, W - 1]` meets the token itself, as in an `nn.Conv1d` with padding W - 1 whose output is cut to T.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp_kernels.operands import check_dense, shown


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, cu_seqlens: tuple[int, ...] | None = None
) -> Tensor:
    """y [B, T, C] in x's dtype from x [B, W - 1 + T, C]: W - 1 tokens before, zeros where there are none, and T tokens.

    weight [C, W], bias [C]; differentiable by autograd. If weight has another dtype than x, the arithmetic is done in
    the wider of the two. `cu_seqlens`: offsets among the T tokens of packed documents (B = 1), on the host, first 0 and
    last T; no tap reaches into another document, and the tokens before belong to the first document.
    """
    check_convolution(x, weight, bias)
    tokens = x.shape[1] - weight.shape[1] + 1
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, batch=x.shape[0], tokens=tokens)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    wide, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if tokens == 0:
        return (wide[:, :0] * weight.sum(1) + (0 if bias is None else bias)).to(x.dtype)
    y = _dense(wide, weight, bias) if cu_seqlens is None else _packed(wide, weight, bias, cu_seqlens)
    return y.to(x.dtype)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.shape[2] == 1 and x.device.type == "cpu":
        # A CPU's kernel for a single channel takes 2-byte numbers in pairs, and of a pair that it needs only one of
        # it multiplies the other by zero: NaN would reach the token before.
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return F.conv1d(x.mT, weight.unsqueeze(1), bias, groups=x.shape[2]).mT


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: tuple[int, ...]) -> Tensor:
    """The dense convolution of documents with W - 1 zeros between them.

    Masked taps would keep W products the size of x for backward, and repaired borders subtract what must not be there
    (which is not exact, and spreads a NaN). This costs W - 1 more tokens a document and one copy.
    """
    before = weight.shape[1] - 1
    first, *others = (end - start for start, end in zip(cu_seqlens, cu_seqlens[1:]))
    others = [length for length in others if length]
    zeros = x.new_zeros(1, before, x.shape[2])
    opening, *following = x.split([before + first, *others], 1)
    apart = torch.cat([opening, *(piece for document in following for piece in (zeros, document))], 1)
    lengths = [first, *(length for document in others for length in (before, document))]
    return torch.cat(_dense(apart, weight, bias).split(lengths, 1)[::2], 1)


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`check_weight` for an x that begins with the W - 1 tokens before."""
    check_weight(x, weight, bias)
    if x.shape[1] < weight.shape[1] - 1:
        raise ValueError(f"x must begin with the W - 1 = {weight.shape[1] - 1} tokens before, got {tuple(x.shape)}")


def check_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise the `ValueError` or `TypeError` that says which of x, weight and bias is wrong, with its value."""
    for name, value, ndim, shape in (("x", x, 3, "[B, W - 1 + T, C]"), ("weight", weight, 2, "[C, W]")):
        check_dense(name, value)
        if value.ndim != ndim:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if weight.shape[0] != x.shape[2] or weight.shape[1] == 0:
        raise ValueError(f"weight must have shape [C, W] with C = {x.shape[2]} and W >= 1, got {tuple(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}, got {weight.device}")
    if bias is not None:
        _check_bias(bias, weight)


def _check_bias(bias: Tensor, weight: Tensor) -> None:
    if not isinstance(bias, Tensor) or bias.dtype != weight.dtype:
        raise TypeError(f"bias must be a tensor of weight's dtype {weight.dtype}, got {shown(bias)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [C] = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if bias.device != weight.device:
        raise ValueError(f"bias must be on the device of weight, {weight.device}, got {bias.device}")


def check_offsets(cu_seqlens: tuple[int, ...], *, batch: int, tokens: int) -> None:
    """Raise the `ValueError` or `TypeError` that says what is wrong with offsets of packed documents."""
    if not isinstance(cu_seqlens, tuple) or not all(isinstance(offset, int) for offset in cu_seqlens):
        raise TypeError(f"cu_seqlens must be a tuple of ints, got {cu_seqlens!r}")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1, got B = {batch}")
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens:
        raise ValueError(f"cu_seqlens must run from 0 to T = {tokens}, got {cu_seqlens}")
    if any(a > b for a, b in zip(cu_seqlens, cu_seqlens[1:])):
        raise ValueError(f"cu_seqlens must not fall, got {cu_seqlens}")
