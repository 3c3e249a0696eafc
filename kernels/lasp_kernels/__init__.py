"""Arithmetic of linear attention on one device: torch and triton, no ranks and no torch.distributed."""

from lasp_kernels.launch import Steps, check_inputs, fold, norm_gate, path, plan
from lasp_kernels.reference import Segments, chunked_linear_attention, recurrent_linear_attention, state_dtype

__all__ = [
    "Segments",
    "Steps",
    "check_inputs",
    "chunked_linear_attention",
    "fold",
    "norm_gate",
    "path",
    "plan",
    "recurrent_linear_attention",
    "state_dtype",
]
