"""Whether Triton's kernels compute, or PyTorch: the environment's word, and what holds without one."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor

Path = Literal["triton", "reference"]


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, where a CPU can run them."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def path_of(x: Tensor, *, served: bool) -> Path:
    """What computes with x, where the kernels can (`served`) or cannot; see the docstring of dispatch.py."""
    if "LASP_KERNELS" in os.environ and (asked := os.environ["LASP_KERNELS"]):
        if asked == "triton" and x.device.type == "cpu" and not interpreted():
            raise ValueError(
                'the environment variable LASP_KERNELS must be "reference", or not set, for tensors on a CPU, got '
                "'triton': the kernels run there in Triton's interpreter alone (TRITON_INTERPRET=1)"
            )
        if asked == "triton" or asked == "reference":
            return asked
        raise ValueError(f'the environment variable LASP_KERNELS must be "triton" or "reference", got {asked!r}')
    return "triton" if x.is_cuda and x.dtype != torch.float64 and served else "reference"
