"""The operators as custom ops, so that `torch.compile(fullgraph=True)` passes through a model that uses them.

Eager code does not come here. An op takes tensors and plain values only: a layout is its two lists of integers as
tensors on the host, and the ranks are a number in such a tensor. So nothing that differs between layers or steps is a
constant of the graph: layers share one, and packed sequences of other lengths need no other. Kernels and exchange are
opaque to the compiler; forward and backward are those of the operators' own files.
"""

from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

import lasp_kernels as kernels
from lasp import decay
from lasp.checks.messages import Kind
from lasp.layout import Shard, ShardLayout
from lasp.ops import attention, delta, elementwise, halo, softmax, tokens, unmasked
from lasp.ops.call import Call, begin, call_of, check_initial_state
from lasp.ranks import sequence_of_handle
from lasp_kernels import Operands, convolution
from lasp_kernels.delta import DeltaOperands

MaybeTensor = Optional[Tensor]  # noqa: UP045  # schemas are read from these annotations
MaybeInt = Optional[int]  # noqa: UP045
MaybeFloat = Optional[float]  # noqa: UP045


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


# The delta rule


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


# Channels that decay each by itself: one op for both operators, which differ in their tensors


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


# Tokens of other ranks


def _token_call(
    operator: str,
    x: Tensor,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
    settings: Kind = (),
) -> Call:
    layout = ShardLayout.of_facts(lengths, cu_seqlens)
    return call_of(operator, x, layout, sequence_of_handle(sequence), settings=settings, name="x")


@torch.library.custom_op("lasp::halo", mutates_args=())
def halo_op(x: Tensor, width: int, lengths: MaybeTensor, cu_seqlens: MaybeTensor, sequence: MaybeTensor) -> Tensor:
    """x with the tokens before it."""
    with begin(halo.NAME, sequence_of_handle(sequence)) as ranks_agree:
        halo.check(x, width)
        call = _token_call(halo.NAME, x, lengths, cu_seqlens, sequence)
        if ranks_agree is not None and width > 1:
            ranks_agree.settle(lambda: call.fingerprint({"x": x}, width=width))
    return halo.with_halo(x, width, call)[0]


@halo_op.register_fake
def _(x, width, lengths, cu_seqlens, sequence):
    return x.new_empty(x.shape[0], width - 1 + x.shape[1], *x.shape[2:])


@torch.library.custom_op("lasp::halo_backward", mutates_args=())
def halo_backward_op(
    dy: Tensor, width: int, lengths: MaybeTensor, cu_seqlens: MaybeTensor, sequence: MaybeTensor
) -> Tensor:
    """The gradient of x."""
    call = _token_call(halo.NAME, dy[:, width - 1 :], lengths, cu_seqlens, sequence)
    return halo.without_halo(dy, width, call)[0]


@halo_backward_op.register_fake
def _(dy, width, lengths, cu_seqlens, sequence):
    return dy.new_empty(dy.shape[0], dy.shape[1] - width + 1, *dy.shape[2:])


def _setup_halo(ctx, inputs, output):
    _, ctx.width, *facts = inputs
    ctx.save_for_backward(*facts)


def _halo_gradient(ctx, dy):
    return halo_backward_op(dy, ctx.width, *ctx.saved_tensors), None, None, None, None


halo_op.register_autograd(_halo_gradient, setup_context=_setup_halo)


def _agreed_call(x: Tensor, lengths: Tensor, cu_seqlens: MaybeTensor, sequence: MaybeTensor, settings: Kind) -> Call:
    """Of a `softmax_attention` that begins, once the ranks have agreed on it."""
    with begin(softmax.NAME, sequence_of_handle(sequence)) as ranks_agree:
        call = _token_call(softmax.NAME, x, lengths, cu_seqlens, sequence, settings)
        if ranks_agree is not None:
            ranks_agree.settle(lambda: call.fingerprint({"x": x}))
    return call


@torch.library.custom_op("lasp::gather_tokens", mutates_args=())
def gather_tokens_op(
    x: Tensor,
    lengths: Tensor,
    cu_seqlens: MaybeTensor,
    total: int,
    sequence: Tensor,
    window: MaybeInt,
    scale: MaybeFloat,
    softcap: MaybeFloat,
    dropout_p: float,
    heads: int,
    masked: bool,
) -> Tensor:
    """x of all ranks, which is `total` tokens; for a `softmax_attention` of these settings."""
    settings = softmax.settings_of(window, scale, softcap, dropout_p, heads, masked)
    call = _agreed_call(x, lengths, cu_seqlens, sequence, settings)
    return tokens.gather(x, tuple(lengths.tolist()), call).contiguous()


@gather_tokens_op.register_fake
def _(x, lengths, cu_seqlens, total, sequence, *settings):
    return x.new_empty(x.shape[0], total, *x.shape[2:])


@torch.library.custom_op("lasp::scatter_tokens", mutates_args=())
def scatter_tokens_op(dx: Tensor, here: int, lengths: Tensor, cu_seqlens: MaybeTensor, sequence: Tensor) -> Tensor:
    """The sum over ranks, of which this rank gets its tokens, as many as are `here`."""
    call = _whole_call(dx, here, lengths, cu_seqlens, sequence)
    return tokens.scatter(dx, tuple(lengths.tolist()), call).contiguous()


@scatter_tokens_op.register_fake
def _(dx, here, lengths, cu_seqlens, sequence):
    return dx.new_empty(dx.shape[0], here, *dx.shape[2:])


def _setup_gather(ctx, inputs, output):
    x, lengths, cu_seqlens, _, sequence, *_ = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(lengths, cu_seqlens, sequence)


def _gather_gradient(ctx, dx):
    return scatter_tokens_op(dx, ctx.tokens, *ctx.saved_tensors), *[None] * 10


gather_tokens_op.register_autograd(_gather_gradient, setup_context=_setup_gather)


@torch.library.custom_op("lasp::deal", mutates_args=())
def deal_op(
    x: Tensor,
    lengths: Tensor,
    cu_seqlens: MaybeTensor,
    total: int,
    sequence: Tensor,
    window: MaybeInt,
    scale: MaybeFloat,
    softcap: MaybeFloat,
    dropout_p: float,
    heads: int,
    masked: bool,
) -> Tensor:
    """All `total` tokens of this rank's share of x [B, T, ranks, n]; for a `softmax_attention` of these settings."""
    settings = softmax.settings_of(window, scale, softcap, dropout_p, heads, masked)
    call = _agreed_call(x, lengths, cu_seqlens, sequence, settings)
    return tokens.deal(x, tuple(lengths.tolist()), call).contiguous()


@deal_op.register_fake
def _(x, lengths, cu_seqlens, total, sequence, *settings):
    return x.new_empty(x.shape[0], total, x.shape[3])


@torch.library.custom_op("lasp::collect", mutates_args=())
def collect_op(
    x: Tensor,
    here: int,
    ranks: int,
    lengths: Tensor,
    cu_seqlens: MaybeTensor,
    sequence: Tensor,
    window: MaybeInt = None,
    scale: MaybeFloat = None,
    softcap: MaybeFloat = None,
    dropout_p: float = 0.0,
    heads: int = 0,
    masked: bool = False,
    reverse: bool = False,
) -> Tensor:
    """The tokens of this rank, as many as are `here`, of all shares; x [B, T of all ranks, n]."""
    settings = softmax.settings_of(window, scale, softcap, dropout_p, heads, masked)
    call = _whole_call(x, here, lengths, cu_seqlens, sequence, settings)
    return tokens.collect(x, tuple(lengths.tolist()), call, reverse=reverse).contiguous()


def _whole_call(
    x: Tensor, here: int, lengths: Tensor, cu_seqlens: MaybeTensor, sequence: Tensor, settings: Kind = ()
) -> Call:
    """The call of a rank that holds the tokens x of all ranks."""
    ranks = sequence_of_handle(sequence)
    assert ranks is not None
    first = sum(lengths.tolist()[: ranks.rank])
    return _token_call(softmax.NAME, x[:, first : first + here], lengths, cu_seqlens, sequence, settings)


@collect_op.register_fake
def _(x, here, ranks, *rest):
    return x.new_empty(x.shape[0], here, ranks, x.shape[2])


@torch.library.custom_op("lasp::deal_gradient", mutates_args=())
def deal_gradient_op(dx: Tensor, total: int, lengths: Tensor, cu_seqlens: MaybeTensor, sequence: Tensor) -> Tensor:
    """The gradient of what `collect` was given."""
    call = _token_call(softmax.NAME, dx, lengths, cu_seqlens, sequence)
    return tokens.deal(dx, tuple(lengths.tolist()), call, reverse=True).contiguous()


@deal_gradient_op.register_fake
def _(dx, total, lengths, cu_seqlens, sequence):
    return dx.new_empty(dx.shape[0], total, dx.shape[3])


def _setup_deal(ctx, inputs, output):
    x, lengths, cu_seqlens, _, sequence, *_ = inputs
    ctx.tokens = x.shape[1:3]
    ctx.save_for_backward(lengths, cu_seqlens, sequence)


def _deal_gradient(ctx, dx):
    return collect_op(dx, *ctx.tokens, *ctx.saved_tensors, reverse=True), *[None] * 10


deal_op.register_autograd(_deal_gradient, setup_context=_setup_deal)


def _setup_collect(ctx, inputs, output):
    x, _, _, lengths, cu_seqlens, sequence, *_ = inputs
    ctx.total = x.shape[1]
    ctx.save_for_backward(lengths, cu_seqlens, sequence)


def _collect_gradient(ctx, dx):
    return deal_gradient_op(dx, ctx.total, *ctx.saved_tensors), *[None] * 12


collect_op.register_autograd(_collect_gradient, setup_context=_setup_collect)


# Packed documents on one device: recomputed in backward, since an op cannot keep what autograd would


def _shard_layout(lengths: Tensor, cu_seqlens: Tensor, sequence: MaybeTensor) -> tuple[ShardLayout, int]:
    layout, ranks = ShardLayout.of_facts(lengths, cu_seqlens), sequence_of_handle(sequence)
    assert layout is not None
    return layout, 0 if ranks is None else ranks.rank


# How a call of eager code is dispatched. Inside an op autograd would be left out.
_AS_EAGER = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


def _gradients_of(f: Callable[..., Tensor], tensors: Sequence[MaybeTensor], dy: Tensor) -> list[Tensor]:
    """Of f's tensors, by running it once more; an empty tensor for None."""
    with torch._C._ForceDispatchKeyGuard(*_AS_EAGER), torch.enable_grad():  # type: ignore[attr-defined]
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
        given = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad(f(*leaves), given, dy))
    return [dy.new_empty(0) if x is None else next(found).contiguous() for x in leaves]


def _like_all(tensors: Sequence[MaybeTensor], dy: Tensor) -> list[Tensor]:
    return [dy.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]


def _conv(x: Tensor, weight: Tensor, bias: MaybeTensor, *facts: MaybeTensor) -> Tensor:
    layout, rank = _shard_layout(*facts)  # type: ignore[arg-type]
    return convolution.causal_conv(x, weight, bias, cu_seqlens=layout.local(rank).cu_seqlens)


@torch.library.custom_op("lasp::packed_conv", mutates_args=())
def packed_conv_op(
    x: Tensor, weight: Tensor, bias: MaybeTensor, lengths: Tensor, cu_seqlens: Tensor, sequence: MaybeTensor
) -> Tensor:
    """The convolution of this rank's documents, from x with the tokens before it."""
    return _conv(x, weight, bias, lengths, cu_seqlens, sequence).clone(memory_format=torch.contiguous_format)


@packed_conv_op.register_fake
def _(x, weight, bias, lengths, cu_seqlens, sequence):
    return x.new_empty(x.shape[0], x.shape[1] - weight.shape[1] + 1, x.shape[2])


@torch.library.custom_op("lasp::packed_conv_backward", mutates_args=())
def packed_conv_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: MaybeTensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""

    def again(x: Tensor, weight: Tensor, bias: MaybeTensor) -> Tensor:
        return _conv(x, weight, bias, lengths, cu_seqlens, sequence)

    dx, dw, db = _gradients_of(again, (x, weight, bias), dy)
    return dx, dw, db


@packed_conv_backward_op.register_fake
def _(dy, x, weight, bias, *facts):
    return tuple(_like_all((x, weight, bias), dy))


def _setup_conv(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _conv_gradients(ctx, dy):
    dx, dw, db = packed_conv_backward_op(dy, *ctx.saved_tensors)
    return dx, dw, None if ctx.saved_tensors[2] is None else db, None, None, None


packed_conv_op.register_autograd(_conv_gradients, setup_context=_setup_conv)


def _blocks(q: Tensor, both: Tensor, block: int, scale: MaybeFloat, *facts: MaybeTensor) -> Tensor:
    lengths, cu_seqlens, sequence = facts
    shard = Shard.of(q, ShardLayout.of_facts(lengths, cu_seqlens), sequence_of_handle(sequence), "q")
    keys_and_values = halo.Brought(both, shard.runs.cu_seqlens, shard.tokens_before)
    return halo.attend_in_blocks(q, keys_and_values, block, scale)


@torch.library.custom_op("lasp::packed_blocks", mutates_args=())
def packed_blocks_op(
    q: Tensor,
    both: Tensor,
    block: int,
    scale: MaybeFloat,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> Tensor:
    """Attention in blocks of this rank's documents, from keys and values side by side with the tokens before them."""
    o = _blocks(q, both, block, scale, lengths, cu_seqlens, sequence)
    return o.clone(memory_format=torch.contiguous_format)


@packed_blocks_op.register_fake
def _(q, both, *rest):
    return q.new_empty(*q.shape[:3], both.shape[3] - q.shape[3])


@torch.library.custom_op("lasp::packed_blocks_backward", mutates_args=())
def packed_blocks_backward_op(
    do: Tensor,
    q: Tensor,
    both: Tensor,
    block: int,
    scale: MaybeFloat,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of q, and of keys and values."""
    dq, d_both = _gradients_of(
        lambda q, both: _blocks(q, both, block, scale, lengths, cu_seqlens, sequence), (q, both), do
    )
    return dq, d_both


@packed_blocks_backward_op.register_fake
def _(do, q, both, *rest):
    return tuple(_like_all((q, both), do))


def _setup_blocks(ctx, inputs, output):
    q, both, ctx.block, ctx.scale, *facts = inputs
    ctx.save_for_backward(q, both, *facts)


def _blocks_gradients(ctx, do):
    q, both, *facts = ctx.saved_tensors
    return *packed_blocks_backward_op(do, q, both, ctx.block, ctx.scale, *facts), *[None] * 5


packed_blocks_op.register_autograd(_blocks_gradients, setup_context=_setup_blocks)


def _attend(q: Tensor, k: Tensor, v: Tensor, key_mask: MaybeTensor, options: tuple, *facts: MaybeTensor) -> Tensor:
    layout, rank = _shard_layout(*facts)  # type: ignore[arg-type]
    settings = dict(zip(("window", "scale", "softcap"), options))
    return softmax.attend_packed(q, k, v, key_mask, layout, rank, settings)


@torch.library.custom_op("lasp::packed_softmax", mutates_args=())
def packed_softmax_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: MaybeTensor,
    window: MaybeInt,
    scale: MaybeFloat,
    softcap: MaybeFloat,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> Tensor:
    """Attention of this rank's queries on the keys and values of all ranks, document by document."""
    o = _attend(q, k, v, key_mask, (window, scale, softcap), lengths, cu_seqlens, sequence)
    return o.clone(memory_format=torch.contiguous_format)


@packed_softmax_op.register_fake
def _(q, k, v, *rest):
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("lasp::packed_softmax_backward", mutates_args=())
def packed_softmax_backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: MaybeTensor,
    window: MaybeInt,
    scale: MaybeFloat,
    softcap: MaybeFloat,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""

    def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, key_mask, (window, scale, softcap), lengths, cu_seqlens, sequence)

    dq, dk, dv = _gradients_of(again, (q, k, v), do)
    return dq, dk, dv


@packed_softmax_backward_op.register_fake
def _(do, q, k, v, *rest):
    return tuple(_like_all((q, k, v), do))


def _setup_softmax(ctx, inputs, output):
    *tensors, window, scale, softcap, lengths, cu_seqlens, sequence = inputs
    ctx.options = (window, scale, softcap)
    ctx.save_for_backward(*tensors, lengths, cu_seqlens, sequence)


def _softmax_gradients(ctx, do):
    q, k, v, key_mask, *facts = ctx.saved_tensors
    return *packed_softmax_backward_op(do, q, k, v, key_mask, *ctx.options, *facts), *[None] * 7


packed_softmax_op.register_autograd(_softmax_gradients, setup_context=_setup_softmax)
