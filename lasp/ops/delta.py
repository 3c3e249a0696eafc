"""`delta_rule`: DeltaNet, Gated DeltaNet and KDA over ranks. A state travels, and its map is a K x K matrix.

The four steps are those of `linear_attention` (attention.py): local maps, exchange, scan, outputs. Backward runs them
from the last segment to the first, and its maps are the transposes of forward's. In a chain (ring, pipeline, two ranks)
no matrix is sent, only states; an all-gather sends K + V columns instead of V.

The arithmetic is in `lasp_kernels.delta_steps`, which explains the steps, or on a GPU in Triton (delta_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp import arguments
from lasp.checks import finite
from lasp.checks.agreement import Agreement
from lasp.checks.trial import operator
from lasp.layout import ShardLayout
from lasp.ops import stream
from lasp.ops.call import (
    Call,
    autocast,
    begin,
    call_of,
    check_initial_state,
    check_options,
    facts_of,
    form_of,
    no_autocast,
    of_own_tokens,
    padding_of,
)
from lasp.ranks import SequenceParallel
from lasp_kernels import Maps, decode, delta_steps_of, path, state_dtype
from lasp_kernels.delta import DeltaOperands, check_delta_inputs
from lasp_kernels.delta_steps import DeltaSteps
from lasp_kernels.once import no_second_derivative

NAME = "delta_rule"


def _stand_in(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, output_final_state: bool = False, **_: Any
) -> tuple[Tensor, Tensor | None]:
    """What replaces the operator in a trial of a model (lasp.checks.trial): each token sees only itself."""
    final_state = k.new_zeros(k.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=state_dtype(k.dtype))
    return of_own_tokens(q, k, v, v.shape[2]), final_state if output_final_state else None


@operator(_stand_in)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
    segment_length: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The (gated) delta rule over a sequence that may be split over ranks.

    Per head, over the whole sequence: S_t = (I - beta_t k_t^T k_t) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t^T v_t,
    and o_t = scale * q_t S_t (DeltaNet, arXiv 2406.06484; Gated DeltaNet, arXiv 2412.06464; KDA, arXiv 2510.26692).

    Args:
        q: [B, T, H, K], this rank's tokens. Keys are usually of unit length; that is left to the caller.
        k: [B, T, H, K].
        v: [B, T, G*H, V]: G heads of values may share a head of q and k. q, k and v have one float dtype. T may differ
            between ranks, down to zero.
        beta: [B, T, G*H], how much of the old value a token replaces.
        log_decay: fp32, <= 0 and finite: None, [B, T, G*H] (per token) or [B, T, G*H, K] (per token and channel).
        scale: multiplies the output.
        initial_state: [N, G*H, K, V], the state before the sequence, given on every rank; N is B, or the number of
            packed sequences. The rank on which a sequence begins gets its gradient, the others zero.
        output_final_state: also return the state after the last token.
        layout: how tokens lie on the ranks; needed for packed sequences (then B = 1), whose state starts anew, and
            where some tokens are padding, which then is in no state, and whose o is zero.
        sequence: the ranks; None is one rank. All of them must call with the same settings, in the same order.
        segment_length: tokens of a segment, a multiple of 64; None chooses. If it is given, results do not depend on
            the number of ranks where the borders of ranks are borders of segments.

    Returns:
        o [B, T, G*H, V] in the dtype of v, and the final state [N, G*H, K, V] (fp32; fp64 for fp64 inputs; the same on
        every rank) or None. A gradient that ranks give to the final state is summed over them.

    Raises:
        ValueError, TypeError, RankMismatchError, PeerError, RuntimeError: as `lasp.linear_attention`.
    """
    padding = padding_of(k, layout, sequence)
    if padding is not None:
        q, k, v, beta = (padding.cut(x) for x in (q, k, v, beta))
        log_decay, layout = padding.cut(log_decay), padding.layout
    run = _streamed if stream.under_way(sequence) else _run
    given = (q, k, v, beta, log_decay, scale)
    o, final_state = run(given, initial_state, output_final_state, layout, sequence, segment_length)
    return o if padding is None else padding.fill(o), final_state


@stream.in_eager
def _streamed(
    given: tuple[Any, ...],
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    segment_length: int | None,
) -> tuple[Tensor, None]:
    """The call on one segment (lasp.ops.stream): the state enters from the segment before, and leaves to the next."""
    stream.no_final_state(output_final_state, sequence)
    if (state := stream.held(NAME, sequence)) is not None:
        return _one_token(_operands(*given), state), None
    crossing = stream.crossing(NAME, sequence)
    assert crossing is not None
    entering = crossing.enter(initial_state, *given[1:5])
    edges = initial_state is None
    o, final_state = _run(given, entering, crossing.leaves, layout, sequence, segment_length, edges=edges)
    return crossing.leave(o, final_state), None


def _one_token(x: DeltaOperands, state: Tensor) -> Tensor:
    """o [B, 1, H, V] of one token a row. The state [B, H, K, V] is updated in place."""
    q, k, v, beta = (y.squeeze(1) for y in x[:4])
    log_decay = None if x.log_decay is None else x.log_decay.squeeze(1)
    return decode.delta_rule_step(q, k, v, beta, log_decay, state, scale=x.scale).unsqueeze(1)


def _run(
    given: tuple[Any, ...],
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    segment_length: int | None,
    *,
    edges: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The call without padding; `given` are q, k, v, beta, log_decay and scale, `edges` as in `call_of`."""
    if torch.compiler.is_compiling():
        return _in_graph(_operands(*given), initial_state, output_final_state, layout, sequence, segment_length)
    with begin(NAME, sequence, given[1]) as ranks_agree:
        scale, segment_length = check_options(given[5], output_final_state, segment_length)
        x = _operands(*given[:5], scale)  # type: ignore[call-arg]
        call = checked_call(x, initial_state, output_final_state, layout, sequence, segment_length, edges=edges)
        started = [start_forward(x, initial_state, call, output_final_state, ranks_agree)]
    return _DeltaRule.apply(*x[:5], initial_state, (call, x.scale), started)  # type: ignore[return-value]


def _operands(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float) -> DeltaOperands:
    """q, k and v in one dtype."""
    for name, x in (("k", k), ("v", v), ("q", q), ("beta", beta)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {arguments.shown(x)}")
    q, k, v = autocast(q, k, v)
    return DeltaOperands(q, k, v, beta, log_decay, scale)


class Started(NamedTuple):
    """A forward whose exchange is under way."""

    steps: DeltaSteps
    maps: Maps  # of this rank's segments; only `steps` can read them
    wait: Callable[[], Tensor | None]  # returns the state that enters each run
    final_state: bool


def checked_call(
    x: DeltaOperands,
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    segment_length: int | None,
    *,
    edges: bool = False,
) -> Call:
    """The call of these arguments; raises where they do not fit."""
    check_delta_inputs(*x[:5], segment_length)
    ends = initial_state is not None or output_final_state
    settings = ()
    if sequence is not None:
        settings = (
            ("scale", x.scale),
            ("dtype", x.k.dtype),
            ("log_decay", "none" if x.log_decay is None else "given"),
            ("initial_state", "none" if initial_state is None else "given"),
            ("output_final_state", output_final_state),
        )
    call = call_of(
        NAME, x.k, layout, sequence, segment_length=segment_length, ends=ends, settings=settings, edges=edges
    )
    if initial_state is not None:
        check_initial_state(initial_state, x.k, x.v, call)
    return call


def steps_of(x: DeltaOperands, call: Call) -> DeltaSteps:
    """The arithmetic of this device for these operands."""
    return delta_steps_of(
        x,
        cu_seqlens=call.shard.runs.cu_seqlens,
        segment_length=call.segment_length,
        ends=call.ends or call.sequence is not None,
    )


def start_forward(
    x: DeltaOperands, initial_state: Tensor | None, call: Call, output_final_state: bool, ranks_agree: Agreement | None
) -> Started:
    """Steps 1 and 2 of forward, outside of autograd."""
    if output_final_state:
        call.note_final_state(x.k)
    with torch.no_grad(), no_autocast(x.k.device.type):
        steps = steps_of(x, call)
        maps = steps.local_maps(x)
        if ranks_agree is not None:
            tensors = {**x._asdict(), "initial_state": initial_state}
            scale = tensors.pop("scale")
            ranks_agree.settle(lambda: call.fingerprint(tensors, scale=scale, output_final_state=output_final_state))
        if call.sequence is not None and not call.traffic.kernels:
            call.traffic.kernels = path(x)
            call.traffic.decay = form_of(x.log_decay)
        return Started(steps, maps, call.enter(steps, maps, initial_state, at_once=True), output_final_state)


def forward(x: DeltaOperands, call: Call, started: list[Started]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """o, the final state if it was asked for, and the segments' states and matrices for backward. Empties `started`."""
    steps, maps, wait, wants_final = started.pop()
    with no_autocast(x.k.device.type):
        states, leaving = steps.scan(maps, wait())
        if leaving is not None:
            finite.note(call.sequence, leaving)
        o = steps.outputs(x, states).to(x.v.dtype)
        final_state = call.final_state(leaving) if wants_final else None
    return o, final_state, states, maps.transition


class Gradients(NamedTuple):
    """The gradients of a call's inputs. The last two are in the state's dtype, and None where they are not needed."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_beta: Tensor
    d_decay: Tensor | None
    d_initial: Tensor | None


def backward(
    x: DeltaOperands,
    saved: tuple[Tensor, Tensor],
    do: Tensor,
    d_final_state: Tensor | None,
    call: Call,
    steps: DeltaSteps,
    initial_grad: bool,
) -> Gradients:
    """All gradients; `saved` are the states and matrices that forward returned."""
    states, transition = saved
    with no_autocast(x.k.device.type):
        if d_final_state is not None:
            d_final_state = d_final_state.clone(memory_format=torch.contiguous_format)
            d_final_state = call.sum_over_ranks(d_final_state, reverse=True)
        maps = steps.gradient_maps(x, do, transition)
        wait = call.enter(steps, maps, d_final_state, reverse=True)
        dq = steps.query_gradient(x, do, states)
        d_states, d_first = steps.scan(maps, wait(), reverse=True)
        if d_first is not None:
            finite.note(call.sequence, d_first, reverse=True)
        dk, dv, d_beta, d_decay = steps.gradients(x, do, states, d_states)
        d_initial = call.shard.all_states(d_first, first=True) if initial_grad else None
    return Gradients(dq.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype), d_beta.to(x.beta.dtype), d_decay, d_initial)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, initial_state, call_and_scale, started):
        ctx.call, ctx.scale = call_and_scale
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.initial_grad = ctx.needs_input_grad[5]
        ctx.steps = started[0].steps
        x = DeltaOperands(q, k, v, beta, log_decay, ctx.scale)
        o, final_state, states, transition = forward(x, ctx.call, started)
        ctx.save_for_backward(q, k, v, beta, log_decay, states, transition)
        return o, final_state

    @staticmethod
    @no_second_derivative("lasp.delta_rule")
    def backward(ctx, do, d_final_state):
        *inputs, states, transition = ctx.saved_tensors
        q, k, v, beta, log_decay = inputs
        x = DeltaOperands(q, k, v, beta, log_decay, ctx.scale)
        found = backward(x, (states, transition), do, d_final_state, ctx.call, ctx.steps, ctx.initial_grad)
        d_decay = None if x.log_decay is None or found.d_decay is None else found.d_decay.to(x.log_decay.dtype)
        d_initial = None if found.d_initial is None else found.d_initial.to(ctx.initial_dtype)
        return *found[:4], d_decay, d_initial, None, None


def _in_graph(
    x: DeltaOperands,
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    segment_length: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The call as a custom op (compiled/), which torch.compile does not look into."""
    initial_grad = initial_state is not None and initial_state.requires_grad
    o, final_state, *_ = torch.ops.lasp.delta_rule(
        *x, initial_state, output_final_state, *facts_of(layout, sequence), segment_length, initial_grad
    )
    return o, final_state if output_final_state else None
