"""Arithmetic of linear attention on one device: torch and triton, no ranks and no torch.distributed."""

from lasp_kernels.chunked import chunked_linear_attention
from lasp_kernels.decode import (
    convolution_step,
    delta_rule_step,
    elementwise_step,
    linear_attention_step,
    selective_scan_step,
)
from lasp_kernels.dispatch import (
    Maps,
    Steps,
    delta_steps_of,
    elementwise_path,
    elementwise_steps_of,
    path,
    step_path,
    steps_of,
)
from lasp_kernels.folding import fold
from lasp_kernels.layers import (
    gated_linear,
    norm_gate,
    norm_gate_linear,
    norm_gate_linear_of_parts,
    norm_linear,
    norm_of_parts,
    rotate,
)
from lasp_kernels.operands import Operands, check_inputs
from lasp_kernels.reference import activation_of, recurrent_linear_attention, state_dtype

__all__ = [
    "Maps",
    "Operands",
    "Steps",
    "activation_of",
    "check_inputs",
    "chunked_linear_attention",
    "convolution_step",
    "delta_rule_step",
    "delta_steps_of",
    "elementwise_path",
    "elementwise_step",
    "elementwise_steps_of",
    "fold",
    "gated_linear",
    "linear_attention_step",
    "norm_gate",
    "norm_gate_linear",
    "norm_gate_linear_of_parts",
    "norm_linear",
    "norm_of_parts",
    "path",
    "recurrent_linear_attention",
    "rotate",
    "selective_scan_step",
    "state_dtype",
    "step_path",
    "steps_of",
]
