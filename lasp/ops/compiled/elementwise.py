"""Channels that decay each by itself: one op for both operators, which differ in their tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

import lasp_kernels as kernels
from lasp.layout import ShardLayout
from lasp.ops import elementwise
from lasp.ops.compiled._common import MaybeTensor
from lasp.ranks import sequence_of_handle


@torch.library.custom_op("lasp::elementwise", mutates_args=())
def elementwise_op(
    operator: str, tensors: Sequence[Tensor], lengths: MaybeTensor, cu_seqlens: MaybeTensor, sequence: MaybeTensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The result and what backward needs: the states of segments and of all tokens.

    These are empty where they are the result, or where backward makes them again.
    """
    x, layout = elementwise.operands_of(operator, tensors), ShardLayout.of_facts(lengths, cu_seqlens)
    call, started = elementwise.start(x, layout, sequence_of_handle(sequence))
    y, states, kept, _ = elementwise.forward(x, call, started)
    kept = y.new_empty(0) if kept is None or elementwise.keeps_result(x) else kept
    return y.to(tensors[0].dtype), states.contiguous(), kept


@elementwise_op.register_fake
def _(operator, tensors, lengths, cu_seqlens, sequence):
    x, y = elementwise.operands_of(operator, tensors), tensors[0]
    kept_shape = y.shape if elementwise.keeps_states(x) and not elementwise.keeps_result(x) else (0,)
    dtype, segments = kernels.state_dtype(y.dtype), torch.library.get_ctx().new_dynamic_size()
    states = y.new_empty(y.shape[0], segments, *elementwise.state_shape(x), dtype=dtype)
    return torch.empty(y.shape, dtype=y.dtype, device=y.device), states, y.new_empty(kept_shape, dtype=dtype)


@torch.library.custom_op("lasp::elementwise_backward", mutates_args=())
def elementwise_backward_op(
    operator: str,
    tensors: Sequence[Tensor],
    states: Tensor,
    kept: Tensor,
    dy: Tensor,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
) -> list[Tensor]:
    """The gradients of all tensors."""
    x, layout = elementwise.operands_of(operator, tensors), ShardLayout.of_facts(lengths, cu_seqlens)
    call = elementwise.checked_call(x, layout, sequence_of_handle(sequence))
    found, _ = elementwise.backward(x, (states, kept), dy, call, (True,) * len(tensors))
    return [d.contiguous() for d in found if d is not None]


@elementwise_backward_op.register_fake
def _(operator, tensors, *_):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]


def _setup_elementwise(ctx, inputs, output):
    ctx.operator, tensors, *facts = inputs
    y, states, kept = output
    kept = y if elementwise.keeps_result(elementwise.operands_of(ctx.operator, tensors)) else kept
    ctx.save_for_backward(*tensors, states, kept, *facts)


def _elementwise_gradients(ctx, dy, *_):
    *tensors, states, kept, lengths, cu_seqlens, sequence = ctx.saved_tensors
    found = elementwise_backward_op(ctx.operator, tensors, states, kept, dy, lengths, cu_seqlens, sequence)
    return None, found, None, None, None


elementwise_op.register_autograd(_elementwise_gradients, setup_context=_setup_elementwise)
