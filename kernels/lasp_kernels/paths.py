"""Whether Triton's kernels compute, or PyTorch: the environment's word, and what holds without one."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

Path = Literal["triton", "reference"]


def path_of(x: Tensor, *, served: bool) -> Path:
    """What computes with x, where the kernels can (`served`) or cannot; see the docstring of dispatch.py."""
    if "LASP_KERNELS" in os.environ and (asked := os.environ["LASP_KERNELS"]):
        interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
        if asked == "triton" and not x.is_cuda and x.device.type == "cpu" and not interpreted:
            raise ValueError(
                'the environment variable LASP_KERNELS must be "reference", or not set, for tensors on a CPU, got '
                "'triton': the kernels run there in Triton's interpreter alone (TRITON_INTERPRET=1)"
            )
        if asked == "triton" or asked == "reference":
            return asked
        raise ValueError(f'the environment variable LASP_KERNELS must be "triton" or "reference", got {asked!r}')
    return "triton" if x.is_cuda and x.dtype != torch.float64 and served else "reference"
