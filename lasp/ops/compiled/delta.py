"""`lasp.delta_rule`."""

import torch
from torch import Tensor

import lasp_kernels as kernels
from lasp.layout import ShardLayout
from lasp.ops import delta
from lasp.ops.call import Call, begin
from lasp.ops.compiled._common import MaybeInt, MaybeTensor
from lasp.ranks import sequence_of_handle
from lasp_kernels.delta import DeltaOperands


def _delta_call(
    x: DeltaOperands,
    initial_state: MaybeTensor,
    final: bool,
    facts: tuple[MaybeTensor, MaybeTensor, MaybeTensor],
    segment_length: MaybeInt,
) -> Call:
    layout = ShardLayout.of_facts(*facts[:2])
    return delta.checked_call(x, initial_state, final, layout, sequence_of_handle(facts[2]), segment_length)


@torch.library.custom_op("lasp::delta_rule", mutates_args=())
def delta_rule_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: MaybeTensor,
    scale: float,
    initial_state: MaybeTensor,
    output_final_state: bool,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
    segment_length: MaybeInt,
    initial_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the final state (empty unless asked for), and the states and matrices that backward needs."""
    x = DeltaOperands(q, k, v, beta, log_decay, scale)
    with begin(delta.NAME, sequence_of_handle(sequence)) as ranks_agree:
        facts = (lengths, cu_seqlens, sequence)
        call = _delta_call(x, initial_state, output_final_state, facts, segment_length)
        started = [delta.start_forward(x, initial_state, call, output_final_state, ranks_agree)]
    o, final_state, states, transition = delta.forward(x, call, started)
    final_state = states.new_empty(0) if final_state is None else final_state
    return o.contiguous(), final_state, states.flatten(), transition.flatten()


@delta_rule_op.register_fake
def _(q, k, v, beta, log_decay, scale, initial_state, output_final_state, lengths, cu_seqlens, sequence, *rest):
    dtype = kernels.state_dtype(q.dtype)
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_shape = (rows, v.shape[2], k.shape[3], v.shape[3]) if output_final_state else (0,)
    size = torch.library.get_ctx().new_dynamic_size
    kept = (q.new_empty(size(), dtype=dtype), q.new_empty(size(), dtype=dtype))
    return v.new_empty(v.shape), q.new_empty(final_shape, dtype=dtype), *kept


@torch.library.custom_op("lasp::delta_rule_backward", mutates_args=())
def delta_rule_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: MaybeTensor,
    scale: float,
    states: Tensor,
    transition: Tensor,
    do: Tensor,
    d_final_state: MaybeTensor,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
    segment_length: MaybeInt,
    initial_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbeta, and the gradients of log_decay and of the initial state, empty where not asked for."""
    x = DeltaOperands(q, k, v, beta, log_decay, scale)
    facts = (lengths, cu_seqlens, sequence)
    call = _delta_call(x, None, d_final_state is not None or initial_grad, facts, segment_length)
    steps = delta.steps_of(x, call)
    saved = (states.view(steps.states_shape), transition.view(steps.transitions_shape))
    found = delta.backward(x, saved, do, d_final_state, call, steps, initial_grad)
    return tuple(states.new_empty(0) if y is None else y.contiguous() for y in found)  # type: ignore[return-value]


@delta_rule_backward_op.register_fake
def _(q, k, v, beta, log_decay, scale, states, transition, do, d_final_state, lengths, cu_seqlens, *rest):
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    decay_shape = (0,) if log_decay is None else log_decay.shape
    initial_shape = (rows, v.shape[2], k.shape[3], v.shape[3]) if rest[-1] else (0,)
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, beta)]
    return *gradients, states.new_empty(decay_shape), states.new_empty(initial_shape)


def _setup_delta(ctx, inputs, output):
    *tensors, scale, initial_state, output_final_state, lengths, cu_seqlens, sequence, segment_length, grad = inputs
    ctx.save_for_backward(*tensors, output[2], output[3], lengths, cu_seqlens, sequence)
    ctx.scale, ctx.rest, ctx.output_final_state = scale, (segment_length, grad), output_final_state
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype


def _delta_gradients(ctx, do, d_final_state, *_):
    q, k, v, beta, log_decay, states, transition, *facts = ctx.saved_tensors
    d_final_state = d_final_state if ctx.output_final_state else None
    *gradients, d_decay, d_initial = delta_rule_backward_op(
        q, k, v, beta, log_decay, ctx.scale, states, transition, do, d_final_state, *facts, *ctx.rest
    )
    d_decay = None if log_decay is None else d_decay.to(log_decay.dtype)
    d_initial = d_initial.to(ctx.initial_dtype) if ctx.rest[1] else None
    return *gradients, d_decay, None, d_initial, *[None] * 6


delta_rule_op.register_autograd(_delta_gradients, setup_context=_setup_delta)
