"""A linear layer for each group of rows: what experts do to the tokens that chose them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """[M, O]: the rows of x [M, I] in order of their groups, those of group e times weight[e] [O, I] transposed.

    On a GPU one call of PyTorch's grouped product, which in bf16 reads the sizes there, so that the host does not wait
    (in fp32 and fp16 it does). On a CPU, and in fp64, which that does not know, a product a group.

    Args:
        x: [M, I].
        weight: [groups, O, I], of x's dtype.
        sizes: [groups], integers on x's device that add up to M; a group may be empty.

    Raises:
        ValueError: on a GPU, rows of I or O numbers that are no multiple of 16 bytes.
    """
    if x.device.type == "cpu" or x.dtype == torch.float64:
        return torch.cat([part @ w.mT for part, w in zip(x.split(sizes.tolist()), weight.unbind())])
    return in_one_call(x, weight, sizes)


def in_one_call(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """`grouped_linear` on a GPU."""
    numbers = 16 // x.element_size()
    if weight.shape[1] % numbers or weight.shape[2] % numbers:
        raise ValueError(
            f"weight must have multiples of {numbers} rows and columns in {x.dtype}, got {tuple(weight.shape)}"
        )
    return F.grouped_mm(x, weight.mT, offs=sizes.cumsum(0).int())
