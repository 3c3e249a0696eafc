"""The operator as two custom ops, so that `torch.compile(fullgraph=True)` passes through a model that uses it.

Eager code does not come here. An op takes tensors and plain values only: a layout is its two lists, and the ranks
are a key. Kernels and exchange are opaque to the compiler; forward and backward are those of `attention.py`.
"""

from typing import Optional

import torch
from torch import Tensor

import lasp_kernels as kernels
from lasp import agreement, attention, decay
from lasp.data import ShardLayout
from lasp.mesh import sequence_of_key
from lasp.shard import Shard

Ints = Optional[list[int]]  # noqa: UP045  # the schema is read from these annotations


def _call(
    k: Tensor,
    scale,
    final,
    ends,
    lengths,
    cu_seqlens,
    sequence,
    segment_length,
    log_decay=None,
    ranks_agree=agreement.NOT_ASKED,
) -> attention._Call:
    """`log_decay` where it may be read; the compiler's stand-ins have no values."""
    layout = None if lengths is None else ShardLayout(tuple(lengths), None if cu_seqlens is None else tuple(cu_seqlens))
    shard = Shard.of(k, layout, sequence_of_key(sequence))
    return attention._Call(shard, scale, final, ends, segment_length, decay.host_values(log_decay), ranks_agree)


@torch.library.custom_op("lasp::linear_attention", mutates_args=())
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Optional[Tensor],  # noqa: UP045
    initial_state: Optional[Tensor],  # noqa: UP045
    scale: float,
    output_final_state: bool,
    ends: bool,
    lengths: Ints,
    cu_seqlens: Ints,
    sequence: str,
    segment_length: Optional[int],  # noqa: UP045
    initial_grad: bool,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state (empty unless asked for), and the states that backward needs."""
    with agreement.of_call(sequence_of_key(sequence)) as ranks_agree:
        kernels.check_inputs(q, k, v, log_decay, segment_length)
        layout = (lengths, cu_seqlens, sequence, segment_length)
        call = _call(k, scale, output_final_state, ends, *layout, log_decay, ranks_agree)
        attention._check_initial_state(initial_state, k, v, call.shard)
        started = [attention._start_forward(q, k, v, log_decay, initial_state, call, decay_grad, at_once=True)]
        o, final_state, states = attention._forward(q, k, v, log_decay, call, started)
    return o.contiguous(), states.new_empty(0) if final_state is None else final_state, states


@linear_attention.register_fake
def _(
    q,
    k,
    v,
    log_decay,
    initial_state,
    scale,
    output_final_state,
    ends,
    lengths,
    cu_seqlens,
    sequence,
    segment_length,
    *grads,
):
    call = _call(k, scale, output_final_state, ends, lengths, cu_seqlens, sequence, segment_length)
    steps = call.plan((q, k, v, log_decay), grads[1])
    states = q.new_empty(steps.states_shape, dtype=steps.dtype)
    final_shape = (call.shard.num_sequences, *k.shape[2:], v.shape[3]) if output_final_state else (0,)
    return v.new_empty(*q.shape[:3], v.shape[3]), states.new_empty(final_shape), states


@torch.library.custom_op("lasp::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Optional[Tensor],  # noqa: UP045
    states: Tensor,
    do: Tensor,
    d_final_state: Optional[Tensor],  # noqa: UP045
    scale: float,
    ends: bool,
    lengths: Ints,
    cu_seqlens: Ints,
    sequence: str,
    segment_length: Optional[int],  # noqa: UP045
    initial_grad: bool,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradients of the initial state and of log_decay, empty where not asked for."""
    call = _call(k, scale, d_final_state is not None, ends, lengths, cu_seqlens, sequence, segment_length, log_decay)
    steps, needs_grad = call.plan((q, k, v, log_decay), decay_grad), (initial_grad, decay_grad)
    *gradients, d_initial, d_decay = attention._backward(
        q, k, v, log_decay, states, do, d_final_state, call, steps, needs_grad
    )
    dq, dk, dv = (x.contiguous() for x in gradients)  # as the compiler was told
    d_initial, d_decay = (states.new_empty(0) if x is None else x.contiguous() for x in (d_initial, d_decay))
    return dq, dk, dv, d_initial, d_decay


@linear_attention_backward.register_fake
def _(
    q, k, v, log_decay, states, do, d_final_state, scale, ends, lengths, cu_seqlens, sequence, segment_length, *grads
):
    call = _call(k, scale, d_final_state is not None, ends, lengths, cu_seqlens, sequence, segment_length)
    initial_shape = (call.shard.num_sequences, *k.shape[2:], v.shape[3]) if grads[0] else (0,)
    decay_shape = log_decay.shape if grads[1] else (0,)
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return *gradients, states.new_empty(initial_shape), states.new_empty(decay_shape)


def _setup_context(ctx, inputs, output):
    q, k, v, log_decay, initial_state, scale, output_final_state, *layout = inputs
    ctx.save_for_backward(q, k, v, log_decay, output[2])
    ctx.arguments = (scale, *layout)
    ctx.output_final_state = output_final_state
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype


def _gradients(ctx, do, d_final_state, _):
    q, k, v, log_decay, states = ctx.saved_tensors
    dq, dk, dv, d_initial, d_decay = linear_attention_backward(
        q, k, v, log_decay, states, do, d_final_state if ctx.output_final_state else None, *ctx.arguments
    )
    initial_grad, decay_grad = ctx.arguments[-2:]
    d_initial = d_initial.to(ctx.initial_dtype) if initial_grad else None
    d_decay = d_decay.to(log_decay.dtype) if decay_grad else None
    return dq, dk, dv, d_decay, d_initial, *[None] * 9


linear_attention.register_autograd(_gradients, setup_context=_setup_context)
