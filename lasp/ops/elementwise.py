"""`elementwise_recurrence`: channels that decay each by itself (RG-LRU, HGRN); and Mamba's `selective_scan` on it.

The four steps are those of `linear_attention` (attention.py): local maps, exchange, scan, outputs, and backward the
same in reverse order. What travels is one number a channel of the state, and where maps travel too (all_gather, direct)
its log-decay: to an exchange it is one head's state with all channels as rows and one column, which decays by row.

The arithmetic is that of `lasp_kernels.elementwise_steps_of`: Triton's on a GPU, PyTorch's elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import lasp_kernels as kernels
from lasp.checks import finite
from lasp.checks.trial import operator
from lasp.layout import ShardLayout
from lasp.ops import stream
from lasp.ops.call import Call, begin, call_of, facts_of, no_autocast, padding_of, wants_gradient
from lasp.ranks import SequenceParallel
from lasp_kernels import decode
from lasp_kernels.elementwise import RecurrenceOperands, check_recurrence_inputs
from lasp_kernels.reference import state_dtype
from lasp_kernels.selective_scan import SelectiveOperands, check_selective_inputs

RECURRENCE, SELECTIVE = "elementwise_recurrence", "selective_scan"

Operands: TypeAlias = RecurrenceOperands | SelectiveOperands


def _its_input(x: Tensor, log_decay: Tensor, **_: Any) -> Tensor:
    """What replaces the operator in a trial of a model (lasp.checks.trial): each token sees only itself."""
    return x


def _its_u(u: Tensor, *_: Any, **__: Any) -> Tensor:
    """What replaces the operator in a trial of a model."""
    return u


@operator(_its_input)
def elementwise_recurrence(
    x: Tensor, log_decay: Tensor, *, layout: ShardLayout | None = None, sequence: SequenceParallel | None = None
) -> Tensor:
    """h_t = exp(log_decay_t) * h_{t-1} + x_t for each channel, over a sequence that may be split over ranks.

    Args:
        x: [B, T, ...], this rank's tokens, of any float dtype; T may differ between ranks, down to zero.
        log_decay: <= 0, of the shape of x, or with 1 in dimensions behind [B, T]; usually fp32. -inf is a reset: of the
            state before nothing is left, and the gradient there is zero. Values are looked at on a CPU only.
        layout: how tokens lie on the ranks; needed for packed documents (then B = 1), whose state starts anew, and
            where some tokens are padding, whose h is zero.
        sequence: the ranks; None is one rank, before which the state is zero. All of them must call it.

    Returns:
        h in the shape and dtype of x. Inside, states are fp32 (fp64 for fp64 inputs). On a GPU backward makes them
        again from those at every 64th token; elsewhere they are kept, all of them in that dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication.
        RankMismatchError, PeerError, RuntimeError: as `lasp.linear_attention`.
    """
    padding = padding_of(x, layout, sequence)
    if padding is not None:
        h = elementwise_recurrence(padding.cut(x), padding.cut(log_decay), layout=padding.layout, sequence=sequence)
        return padding.fill(h)
    return _run(RecurrenceOperands(x, log_decay), layout, sequence)


@operator(_its_u)
def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
) -> Tensor:
    """Mamba's scan (arXiv 2312.00752) over a sequence that may be split over ranks.

    For each channel and each of the N numbers of its state: h_t = exp(dt_t A) * h_{t-1} + dt_t u_t B_t, and
    y_t = sum_N h_t C_t. Neither states nor decays of all tokens are ever in memory: see `lasp_kernels.selective_scan`.

    Args:
        u: [B, T, D], this rank's tokens, of any float dtype; T may differ between ranks, down to zero.
        dt: [B, T, D], >= 0: after its bias and softplus; better fp32 than bf16, since it makes the decays.
        A: [D, N], <= 0. Like any parameter, the same on all ranks; each gets what its own tokens give to the gradient.
        B: [B, T, N].
        C: [B, T, N].
        layout: how tokens lie on the ranks; needed for packed documents (then B = 1), whose state starts anew, and
            where some tokens are padding, whose y is zero.
        sequence: the ranks; None is one rank, before which the state is zero. All of them must call it.

    Returns:
        y [B, T, D] in the dtype of u. States are fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication.
        RankMismatchError, PeerError, RuntimeError: as `lasp.linear_attention`.
    """
    padding = padding_of(u, layout, sequence)
    if padding is not None:
        u, dt, B, C = (padding.cut(x) for x in (u, dt, B, C))
        return padding.fill(selective_scan(u, dt, A, B, C, layout=padding.layout, sequence=sequence))
    return _run(SelectiveOperands(u, dt, A, B, C), layout, sequence)


class _Operator(NamedTuple):
    """What differs between the two operators."""

    operands: type[Operands]
    check: Callable[[Any], None]
    of_tokens: tuple[str, ...]  # the tensors [B, T, ...]; the others all ranks hold whole
    decay: str  # the form of its log-decays


_OPERATORS = {
    RECURRENCE: _Operator(RecurrenceOperands, lambda x: check_recurrence_inputs(*x), ("x", "log_decay"), "[B, T, ...]"),
    SELECTIVE: _Operator(SelectiveOperands, check_selective_inputs, ("u", "dt", "B", "C"), "dt A"),
}


def name_of(x: Operands) -> str:
    """The name of the operator."""
    return RECURRENCE if isinstance(x, RecurrenceOperands) else SELECTIVE


def operands_of(operator: str, tensors: Sequence[Tensor]) -> Operands:
    """The operands of an operator, by its name, from the list of its tensors."""
    return _OPERATORS[operator].operands(*tensors)


def keeps_result(x: Operands) -> bool:
    """Whether what backward needs of all tokens is the result itself."""
    return keeps_states(x) and x[0].dtype == state_dtype(x[0].dtype)


def keeps_states(x: Operands) -> bool:
    """Whether backward needs the states of all tokens; else it makes them again."""
    return isinstance(x, RecurrenceOperands) and kernels.elementwise_path(x) == "reference"


def state_shape(x: Operands) -> tuple[int, ...]:
    """The shape of a state, without batch and tokens."""
    return tuple(x.x.shape[2:] if isinstance(x, RecurrenceOperands) else x.A.shape)


class Started(NamedTuple):
    """A forward whose exchange is under way."""

    steps: Any  # of `kernels.elementwise_steps_of`
    maps: Any  # of this rank's segments
    wait: Callable[[], Tensor | None]  # for the state that enters them


def checked_call(
    x: Operands, layout: ShardLayout | None, sequence: SequenceParallel | None, *, edges: bool = False
) -> Call:
    """The call of these arguments; raises where they do not fit."""
    operator = name_of(x)
    _OPERATORS[operator].check(x)
    settings = tuple((f"dtype of {name}", str(y.dtype)) for name, y in x._asdict().items())
    return call_of(operator, x[0], layout, sequence, name=x._fields[0], settings=settings, edges=edges)


def steps_of(x: Operands, call: Call) -> Any:
    """The steps on this device."""
    return kernels.elementwise_steps_of(x, cu_seqlens=call.shard.runs.cu_seqlens)


def start(
    x: Operands,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    initial_state: Tensor | None = None,
    *,
    edges: bool = False,
) -> tuple[Call, Started]:
    """What forward does before it must wait. `initial_state` [B, 1, channels, 1] is that before the first token."""
    with begin(name_of(x), sequence, x[0]) as ranks_agree:
        call = checked_call(x, layout, sequence, edges=edges)
        gradient = wants_gradient(*x)
        with torch.no_grad(), no_autocast(x[0].device.type):
            steps = steps_of(x, call)
            maps = steps.local_maps(x)
            if ranks_agree is not None:
                ranks_agree.settle(lambda: _fingerprint(x, call, gradient))
            if call.sequence is not None:
                call.traffic.kernels = kernels.elementwise_path(x)
                call.traffic.decay = _OPERATORS[call.operator].decay
            return call, Started(steps, maps, call.enter(steps, maps, initial_state, at_once=True))


def _fingerprint(x: Operands, call: Call, gradient: bool) -> dict[str, object]:
    tensors, of_tokens = x._asdict(), _OPERATORS[call.operator].of_tokens
    whole = {name: [*y.shape, str(y.dtype)] for name, y in tensors.items() if name not in of_tokens}
    return call.fingerprint({name: tensors[name] for name in of_tokens}, **whole, gradient=gradient)


class Forward(NamedTuple):
    """A result, and what backward needs beside the inputs."""

    y: Tensor  # in the state's dtype, or that of the inputs
    states: Tensor  # that enter segments
    kept: Tensor | None
    final_state: Tensor | None  # [B, 1, channels, 1], that behind the last token, on every rank; None: not asked for


def forward(x: Operands, call: Call, started: Started, *, final_state: bool = False) -> Forward:
    """Wait for the state that enters, and compute the outputs."""
    steps, maps, wait = started
    with torch.no_grad(), no_autocast(x[0].device.type):
        states, behind = steps.scan(maps, wait())
        y, kept = steps.outputs(x, states)  # which may fill what `scan` has returned
        finite.note(call.sequence, behind)
        final = call.final_state(behind) if final_state else None
    return Forward(y, states, kept, final)


def backward(
    x: Operands,
    saved: tuple[Tensor, Tensor | None],
    dy: Tensor,
    call: Call,
    needed: tuple[bool, ...],
    d_final_state: Tensor | None = None,
    *,
    initial_grad: bool = False,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """The gradients of x, in the dtypes of these, from the states and what else `forward` kept; and that of the
    initial state if asked for, on the rank where it entered."""
    states, kept = saved
    with torch.no_grad(), no_autocast(dy.device.type):
        steps = steps_of(x, call)
        maps = steps.gradient_maps(x, dy)
        # Always, whichever inputs need a gradient here: the ranks before this one wait for it.
        if d_final_state is not None:
            d_final_state = call.sum_over_ranks(d_final_state.clone(), reverse=True)
        wait = call.enter(steps, maps, d_final_state, reverse=True)
        d_states, d_first = steps.scan(maps, wait(), reverse=True)
        found = steps.gradients(x, dy, states, kept, d_states, needed)
        finite.note(call.sequence, d_first, reverse=True)
        d_initial = call.shard.all_states(d_first, first=True) if initial_grad else None
    return tuple(None if d is None else d.to(y.dtype) for d, y in zip(found, x)), d_initial


def _run(x: Operands, layout: ShardLayout | None, sequence: SequenceParallel | None) -> Tensor:
    if stream.under_way(sequence):
        return _streamed(x, layout, sequence)
    if torch.compiler.is_compiling():
        return torch.ops.lasp.elementwise(name_of(x), list(x), *facts_of(layout, sequence))[0]
    call, started = start(x, layout, sequence)
    return _Elementwise.apply(call, [started], False, None, *x)[0]  # type: ignore[index]


@stream.in_eager
def _streamed(x: Operands, layout: ShardLayout | None, sequence: SequenceParallel | None) -> Tensor:
    """The call on one segment (lasp.ops.stream): the state enters from the segment before, and leaves to the next."""
    if (state := stream.held(name_of(x), sequence)) is not None:
        return _one_token(x, state.view(len(state), *state_shape(x)))
    crossing = stream.crossing(name_of(x), sequence)
    assert crossing is not None
    initial_state = crossing.enter(None, *x)
    call, started = start(x, layout, sequence, initial_state, edges=True)
    y, final_state = _Elementwise.apply(call, [started], crossing.leaves, initial_state, *x)  # type: ignore[misc]
    return crossing.leave(y, final_state)


def _one_token(x: Operands, state: Tensor) -> Tensor:
    """[B, 1, ...]; the state [B, ...] becomes that behind the token."""
    if isinstance(x, RecurrenceOperands):
        return decode.elementwise_step(x.x.squeeze(1), x.log_decay.squeeze(1), state).unsqueeze(1)
    u, dt, B, C = (y.squeeze(1) for y in (x.u, x.dt, x.B, x.C))
    return decode.selective_scan_step(u, dt, x.A, B, C, state).unsqueeze(1)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, started, wants_final, initial_state, *tensors):
        ctx.call = call
        x = operands_of(call.operator, tensors)
        y, states, kept, final_state = forward(x, call, started.pop(), final_state=wants_final)
        out = y.to(tensors[0].dtype)
        ctx.save_for_backward(*tensors, states, out if keeps_result(x) else kept)
        return out, final_state

    @staticmethod
    def backward(ctx, dy, d_final_state):
        if torch.is_grad_enabled():
            raise RuntimeError(f"{ctx.call.operator} has no second derivative: call backward without create_graph")
        *tensors, states, kept = ctx.saved_tensors
        x = operands_of(ctx.call.operator, tensors)
        _, _, _, initial_grad, *needed = ctx.needs_input_grad
        options = (ctx.call, tuple(needed), d_final_state)
        found, d_initial = backward(x, (states, kept), dy, *options, initial_grad=initial_grad)
        return None, None, None, d_initial, *found
