"""`lasp.linear_attention`, causal and without a mask."""

import torch
from torch import Tensor

import lasp_kernels as kernels
from lasp import decay
from lasp.checks.messages import Kind
from lasp.layout import ShardLayout
from lasp.ops import attention, unmasked
from lasp.ops.call import Call, begin, call_of, check_initial_state
from lasp.ops.compiled._common import MaybeInt, MaybeTensor
from lasp.ranks import sequence_of_handle
from lasp_kernels import Operands


def _call(
    x: Operands,
    ends: bool,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
    segment_length: MaybeInt,
    settings: Kind = (),
) -> Call:
    layout, ranks = ShardLayout.of_facts(lengths, cu_seqlens), sequence_of_handle(sequence)
    rates = decay.host_values(x.log_decay)
    options = {"segment_length": segment_length, "ends": ends, "rates": rates, "settings": settings}
    return call_of(attention.NAME, x.k, layout, ranks, **options)


@torch.library.custom_op("lasp::linear_attention", mutates_args=())
def linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: MaybeTensor,
    scale: float,
    normalize: bool,
    initial_state: MaybeTensor,
    output_final_state: bool,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
    segment_length: MaybeInt,
    initial_grad: bool,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, the final state (empty unless asked for), and the states and denominators (or empty) that backward needs."""
    x = Operands(q, k, v, log_decay, scale, normalize)
    with begin(attention.NAME, sequence_of_handle(sequence)) as ranks_agree:
        kernels.check_inputs(q, k, v, log_decay, segment_length)
        ends = initial_state is not None or output_final_state
        rates = None if decay_grad else decay.host_values(log_decay)
        settings = attention.settings_of(x, initial_state, output_final_state, rates)
        call = _call(x, ends, lengths, cu_seqlens, sequence, segment_length, settings)
        if initial_state is not None:
            check_initial_state(initial_state, k, v, call, normalize=normalize)
        needs = attention.Needs(output_final_state, decay_grad)
        with torch.no_grad():
            started = [attention.start_forward(x, initial_state, call, needs, ranks_agree)]
            o, final_state, kept = attention.forward(x, call, started)
    states = kept.states.flatten()
    final_state, denominators = (states.new_empty(0) if x is None else x for x in (final_state, kept.denominators))
    return o.contiguous(), final_state, states, denominators


@linear_attention_op.register_fake
def _(q, k, v, log_decay, scale, normalize, initial_state, output_final_state, lengths, cu_seqlens, *rest):
    dtype, x = kernels.state_dtype(q.dtype), Operands(q, k, v, normalize=normalize)
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_shape = (rows, x.heads, k.shape[3], x.state_columns) if output_final_state else (0,)
    denominators_shape = (q.shape[0], x.output_heads, q.shape[1]) if normalize else (0,)
    # How many states there are depends on the numbers in the layout, and is nobody's business but backward's.
    states = q.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=dtype)
    o = v.new_empty(*q.shape[:2], x.output_heads, v.shape[3])
    return o, q.new_empty(final_shape, dtype=dtype), states, q.new_empty(denominators_shape, dtype=dtype)


@torch.library.custom_op("lasp::linear_attention_backward", mutates_args=())
def linear_attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: MaybeTensor,
    scale: float,
    normalize: bool,
    states: Tensor,
    o: MaybeTensor,
    denominators: MaybeTensor,
    do: Tensor,
    d_final_state: MaybeTensor,
    ends: bool,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
    segment_length: MaybeInt,
    initial_grad: bool,
    decay_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradients of the initial state and of log_decay, empty where not asked for."""
    x = Operands(q, k, v, log_decay, scale, normalize)
    call = _call(x, ends, lengths, cu_seqlens, sequence, segment_length)
    steps = attention.steps_of(x, call, decay_grad)
    kept = attention.Kept(states.view(steps.states_shape), o, denominators)
    found = attention.backward(x, kept, do, d_final_state, call, steps, (initial_grad, decay_grad))
    return tuple(states.new_empty(0) if y is None else y.contiguous() for y in found)  # type: ignore[return-value]


@linear_attention_backward_op.register_fake
def _(q, k, v, log_decay, scale, normalize, states, o, denominators, do, d_final_state, ends, *rest):
    cu_seqlens, grads, x = rest[1], rest[-2:], Operands(q, k, v, normalize=normalize)
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    initial_shape = (rows, x.heads, k.shape[3], x.state_columns) if grads[0] else (0,)
    decay_shape = log_decay.shape if grads[1] else (0,)
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return *gradients, states.new_empty(initial_shape), states.new_empty(decay_shape)


def _setup_context(ctx, inputs, output):
    q, k, v, log_decay, scale, normalize, initial_state, output_final_state, *facts, length, initial, decays = inputs
    o, denominators = (output[0], output[3]) if normalize else (None, None)
    ctx.save_for_backward(q, k, v, log_decay, output[2], o, denominators, *facts)
    ctx.options, ctx.rest = (scale, normalize), (length, initial, decays)
    ctx.output_final_state = output_final_state
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype


def _gradients(ctx, do, d_final_state, *_):
    q, k, v, log_decay, *kept, lengths, cu_seqlens, sequence = ctx.saved_tensors
    ends = ctx.initial_dtype is not None or ctx.output_final_state
    d_final_state = d_final_state if ctx.output_final_state else None
    dq, dk, dv, d_initial, d_decay = linear_attention_backward_op(
        q, k, v, log_decay, *ctx.options, *kept, do, d_final_state, ends, lengths, cu_seqlens, sequence, *ctx.rest
    )
    _, initial_grad, decay_grad = ctx.rest
    d_initial = d_initial.to(ctx.initial_dtype) if initial_grad else None
    d_decay = d_decay.to(log_decay.dtype) if decay_grad else None
    return dq, dk, dv, d_decay, None, None, d_initial, *[None] * 7


linear_attention_op.register_autograd(_gradients, setup_context=_setup_context)


# The same without a mask


@torch.library.custom_op("lasp::unmasked_attention", mutates_args=())
def unmasked_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    initial_state: MaybeTensor,
    output_final_state: bool,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
    initial_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, the final state (empty unless asked for), and the sums that backward needs."""
    x = Operands(q, k, v, None, scale)
    with begin(attention.NAME, sequence_of_handle(sequence)) as ranks_agree:
        kernels.check_inputs(q, k, v, None)
        settings = attention.settings_of(x, initial_state, output_final_state, None)
        ends = initial_state is not None or output_final_state
        call = _call(x, ends, lengths, cu_seqlens, sequence, None, settings)
        if initial_state is not None:
            check_initial_state(initial_state, k, v, call)
        if ranks_agree is not None:
            needs = attention.Needs(output_final_state, False, causal=False)
            ranks_agree.settle(lambda: attention.fingerprint(x, initial_state, call, needs))
    o, final_state, states = unmasked.forward(x, initial_state, call, output_final_state)
    return o, states.new_empty(0) if final_state is None else final_state, states


@unmasked_op.register_fake
def _(q, k, v, scale, initial_state, output_final_state, lengths, cu_seqlens, sequence, initial_grad):
    dtype, state = kernels.state_dtype(q.dtype), (*k.shape[2:], v.shape[3])
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_shape = (rows, *state) if output_final_state else (0,)
    # How many documents are on a rank depends on the numbers in the layout.
    runs = k.shape[0] if cu_seqlens is None else torch.library.get_ctx().new_dynamic_size()
    o = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    return o, q.new_empty(final_shape, dtype=dtype), q.new_empty(runs, *state, dtype=dtype)


@torch.library.custom_op("lasp::unmasked_attention_backward", mutates_args=())
def unmasked_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    states: Tensor,
    do: Tensor,
    d_final_state: MaybeTensor,
    ends: bool,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
    initial_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradient of the initial state, empty if not asked for."""
    x = Operands(q, k, v, None, scale)
    call = _call(x, ends, lengths, cu_seqlens, sequence, None)
    dq, dk, dv, d_initial = unmasked.backward(x, states, do, d_final_state, call, initial_grad)
    return dq, dk, dv, states.new_empty(0) if d_initial is None else d_initial


@unmasked_backward_op.register_fake
def _(q, k, v, scale, states, do, d_final_state, ends, lengths, cu_seqlens, sequence, initial_grad):
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    initial_shape = (rows, *states.shape[1:]) if initial_grad else (0,)
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return *gradients, states.new_empty(initial_shape)


def _setup_unmasked(ctx, inputs, output):
    q, k, v, scale, initial_state, output_final_state, *facts, initial_grad = inputs
    ctx.save_for_backward(q, k, v, output[2], *facts)
    ctx.scale, ctx.output_final_state, ctx.initial_grad = scale, output_final_state, initial_grad
    ctx.initial_dtype = None if initial_state is None else initial_state.dtype


def _unmasked_gradients(ctx, do, d_final_state, _):
    q, k, v, states, *facts = ctx.saved_tensors
    ends = ctx.initial_dtype is not None or ctx.output_final_state
    d_final_state = d_final_state if ctx.output_final_state else None
    *gradients, d_initial = unmasked_backward_op(
        q, k, v, ctx.scale, states, do, d_final_state, ends, *facts, ctx.initial_grad
    )
    return *gradients, None, d_initial.to(ctx.initial_dtype) if ctx.initial_grad else None, *[None] * 5


unmasked_op.register_autograd(_unmasked_gradients, setup_context=_setup_unmasked)
