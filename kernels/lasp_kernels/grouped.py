"""A linear layer for each group of rows: what experts do to the tokens that chose them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """[M, O]: the rows of x [M, I] in order of their groups, those of group e times weight[e] [O, I] transposed.

    On a GPU one launch of PyTorch's grouped product (in 16 bits rows of x and of a weight must be multiples of 16
    bytes), which reads the sizes there, so that the host does not wait. On a CPU, and in fp64, which that does not
    know, a product a group.

    Args:
        x: [M, I].
        weight: [groups, O, I], of x's dtype.
        sizes: [groups], integers on x's device that add up to M; a group may be empty.
    """
    if x.device.type == "cpu" or x.dtype == torch.float64:
        return torch.cat([part @ w.mT for part, w in zip(x.split(sizes.tolist()), weight.unbind())])
    return F.grouped_mm(x, weight.mT, offs=sizes.cumsum(0).int())
