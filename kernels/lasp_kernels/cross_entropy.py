# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Cross entropy of rows of logits, and its gradient in their place: one kernel that reads a row twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # of a row's logits at a time


def fused_cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, *, gradient: bool, highest: Tensor | None = None
) -> Tensor:
    """The loss of each row of logits [n, V], contiguous, not fp64; see `linear_loss`.

    With `gradient` that of their sum stands in place of the logits. labels [n] int64.
    Where `highest` [n] fp32 is given, labels are none of these words, but for `ignore_index`: it gets the highest logit
    of each row, and what is returned is the logarithm of the sum of exponentials, less that.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(len(logits),)](
                logits,
                labels,
                losses,
                highest,
                ignore_index,
                V=logits.shape[1],
                BLOCK=BLOCK,
                GRADIENT=gradient,
                num_warps=16,
            )
    return losses


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_kernel(
    LOGITS, LABELS, LOSSES, HIGHEST, ignore_index, V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):
    """One row a program: the logarithm of the sum of exponentials in one pass, the gradient in a second."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(LABELS + row)
    columns = tl.arange(0, BLOCK)
    x_row = LOGITS + row * V
    if label == ignore_index:
        tl.store(LOSSES + row, 0.0)
        if GRADIENT:
            for first in range(0, V, BLOCK):
                c = first + columns
                tl.store(x_row + c, tl.zeros([BLOCK], LOGITS.dtype.element_ty), mask=c < V)
    else:
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, V, BLOCK):
            c = first + columns
            x = tl.load(x_row + c, mask=c < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, x)
            # A lane that has seen nothing yet would take -inf from -inf.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - shift) + tl.exp(x - shift)
            top = higher
        highest = tl.max(top, 0)
        # Differences first: next to logits of thousands the logarithm would lose its digits.
        norm = tl.log(tl.sum(total * tl.exp(top - highest), 0))
        if HIGHEST is None:
            of_label = tl.load(x_row + label).to(tl.float32)
            tl.store(LOSSES + row, norm + (highest - of_label))
        else:
            tl.store(LOSSES + row, norm)
            tl.store(HIGHEST + row, highest)
        if GRADIENT:
            for first in range(0, V, BLOCK):
                c = first + columns
                x = tl.load(x_row + c, mask=c < V, other=float("-inf")).to(tl.float32)
                d = tl.exp(x - highest - norm) - tl.where(c == label, 1.0, 0.0)
                tl.store(x_row + c, d.to(LOGITS.dtype.element_ty), mask=c < V)
