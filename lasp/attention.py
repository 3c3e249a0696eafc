"""`linear_attention`: the one operator, in which the kernels of a device and the exchange between ranks meet.

Forward                                        Backward
  1. local state of every segment                1. local gradient of every segment's state
  2. start the exchange                          2. start the exchange, in reverse
  3. wait for the state that enters              3. dq, from the states that forward kept
  4. states of all segments, outputs             4. wait; dk, dv, d log_decay

The states of step 4 are kept for backward, so there is one exchange in forward and one in backward, and no more. Where
a state forgets fast, 2 comes before 1 in forward: the last tokens alone make what the next rank waits for. A q that is
a function is made between 2 and 3.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

import lasp_kernels as kernels
from lasp import agreement, decay, exchange, finite, recompute
from lasp.agreement import Agreement
from lasp.data import ShardLayout
from lasp.exchange import StateMap, horizon, waiting
from lasp.mesh import SequenceParallel
from lasp.shard import Shard, crossed_tokens


def linear_attention(
    q: Tensor | Callable[[], Tensor],
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
    segment_length: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention over a sequence that may be split over ranks.

    Per head, over the whole sequence: S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t and o_t = scale * q_t S_t
    (Lightning Attention-2, arXiv 2401.04658; over ranks LASP, arXiv 2404.02882).

    Args:
        q: [B, T, H*G, K], this rank's tokens; G query heads share a head of k and v (G = 1 is the usual case). Or a
            function that makes it, with G = 1: it is called while the state travels, for which k and v are enough. It
            must leave these as they are, and must not exchange anything among the same ranks itself. What it uses
            gets its gradients as elsewhere, but not through a reentrant checkpoint around this call alone.
        k: [B, T, H, K].
        v: [B, T, H, V]. q, k and v have one float dtype (fp32 may use TF32 as PyTorch's own products do, by
            `torch.set_float32_matmul_precision`). T may differ between ranks, down to zero.
        log_decay: fp32, <= 0 and finite: None, [H] (fixed per head), [B, T, H] (per token) or [B, T, H, K] (per token
            and channel). With a decay for each of H*G query heads, k and v are repeated to as many.
        scale: multiplies the output.
        initial_state: [N, H, K, V], the state before the sequence, given on every rank; N is B, or the number of packed
            sequences. The rank on which a sequence begins gets its gradient, the others zero.
        output_final_state: also return the state after the last token.
        layout: how tokens lie on the ranks; needed for packed sequences (then B = 1), whose state starts anew. With
            it, heads of a fixed decay (see `lasp.decay.fixed`) whose state no rank lets pass exchange with the
            neighbour only.
        sequence: the ranks; None is one rank. All of them must call with the same settings, in the same order.
        segment_length: tokens of a segment, a multiple of 64; None chooses. If it is given, results do not depend on
            the number of ranks: where the borders of ranks are borders of segments, they are the bits of one rank.
            With exchange "all_gather" (or "direct" on more than two ranks) and no layout, all ranks must then
            hold equally many tokens.

    Returns:
        o [B, T, H*G, V] in the dtype of v, and the final state [N, H, K, V] (fp32; fp64 for fp64 inputs; the same
        on every rank) or None. A gradient that ranks give to the final state is summed over them.

    Raises:
        ValueError, TypeError: an argument that does not fit, before any communication; a q that a function made, after
            it, and then the group is usable afterwards.
        RankMismatchError: ranks differ in what they are about to compute, or one of them failed before its exchange;
            on every rank. Compared at the first call of `sequence` and at every 1000th (see `lasp.agreement`).
        PeerError: another rank ended, or was silent for the timeout of the group.
        RuntimeError: a second derivative is asked for; an exchange inside the function that makes q.
    """
    if torch.compiler.is_compiling():
        q = _made(q, k) if callable(q) else q
        q, k, v = _prepare(q, k, v, log_decay, initial_state)
        return _compiled(q, k, v, log_decay, initial_state, scale, output_final_state, layout, sequence, segment_length)
    alone = not isinstance(sequence, SequenceParallel) or sequence.size == 1
    if not alone and sequence.group in _under_way:  # type: ignore[union-attr]
        raise RuntimeError("the function that makes q must not exchange anything among the same ranks")
    with agreement.of_call(sequence) as ranks_agree:
        # What ranks compare must be there before they exchange, and without ranks nothing travels meanwhile.
        if callable(q) and (ranks_agree.due or alone):
            q = _made(q, k)
        later, q = (q, k) if callable(q) else (None, q)  # until it is made the shape of k says it all
        q, k, v = _prepare(q, k, v, log_decay, initial_state)
        kernels.check_inputs(q, k, v, log_decay, segment_length)
        shard = Shard.of(k, layout, sequence)
        _check_initial_state(initial_state, k, v, shard)
        ends = initial_state is not None or output_final_state
        rates, grad_mode = decay.host_values(log_decay), torch.is_grad_enabled()
        call = _Call(shard, scale, output_final_state, ends, segment_length, rates, ranks_agree, grad_mode)
        decay_grad = log_decay is not None and log_decay.requires_grad and grad_mode
        # In a list, from which `_forward` takes it, so that it lives no longer than it is needed.
        started = [_start_forward(q, k, v, log_decay, initial_state, call, decay_grad, at_once=later is None)]
        if later is not None:
            q = _made_meanwhile(later, k, started, shard.sequence)
        return _LinearAttention.apply(q, k, v, log_decay, initial_state, call, started)  # type: ignore[return-value]


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in one dtype, and with a head of k and v for each head of the decay."""
    for name, x in (("k", k), ("v", v), ("q", q), ("log_decay", log_decay), ("initial_state", initial_state)):
        if not isinstance(x, Tensor) and (name in "qkv" or x is not None):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    q, k, v = _autocast(q, k, v)
    if log_decay is not None and k.ndim == 4 and q.ndim == 4 and log_decay.ndim in (1, 3, 4):
        heads = log_decay.shape[0 if log_decay.ndim == 1 else 2]
        if heads == q.shape[2] != k.shape[2] and k.shape[2] and heads % k.shape[2] == 0:
            k, v = (x.repeat_interleave(heads // k.shape[2], 2) for x in (k, v))
    return q, k, v


def _made(make: Callable[[], Tensor], k: Tensor) -> Tensor:
    """The q that a function makes, which must be like k."""
    q = make()
    if not isinstance(q, Tensor):
        raise TypeError(f"q must make a tensor, got {type(q).__name__}")
    if isinstance(k, Tensor):
        like, (q,) = _autocast(k)[0], _autocast(q)
        if (q.shape, q.dtype, q.device) != (like.shape, like.dtype, like.device):
            raise ValueError(
                f"q must make a tensor like k, {tuple(like.shape)} {like.dtype} on {like.device}, got {tuple(q.shape)} "
                f"{q.dtype} on {q.device}"
            )
    return q


def _made_meanwhile(
    make: Callable[[], Tensor], k: Tensor, started: list[_Started], sequence: SequenceParallel | None
) -> Tensor:
    """The same while an exchange is under way, which must come to its end whatever happens here."""
    assert sequence is not None
    assert sequence.group is not None
    _under_way.add(sequence.group)
    try:
        return _made(make, k)
    except BaseException:
        started.pop().wait()  # other ranks count on what this one passes on, and its memory is still read
        raise
    finally:
        _under_way.discard(sequence.group)


_under_way: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()  # whose state travels while q is made


@dataclass(frozen=True)
class _Call:
    """What a call is besides its tensors."""

    shard: Shard
    scale: float
    output_final_state: bool
    ends: bool  # whether there is an initial or final state
    segment_length: int | None
    rates: tuple[float, ...] | None = None  # the fixed log-decay of each head, where the host knows it
    ranks_agree: Agreement = agreement.NOT_ASKED
    grad_mode: bool | None = None  # of the caller; None where that cannot be seen, in a custom op

    def fingerprint(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None
    ) -> dict[str, object]:
        """What must be the same on all ranks, lest their messages differ in size, number or meaning."""
        sequence, layout = self.shard.sequence, self.shard.layout
        assert sequence is not None
        return {
            "layer": sequence.name,
            "call": sequence.traffic.calls,
            "exchanges": [sequence.traffic.forward_exchanges, sequence.traffic.reverse_exchanges],
            "ranks": sequence.ranks,
            "exchange": [sequence.exchange, *astuple(exchange.cost.network_of(sequence))],
            "q": _shape_but_for_tokens(q),
            "k": _shape_but_for_tokens(k),
            "v": _shape_but_for_tokens(v),
            "dtype": str(q.dtype),
            "log_decay": None if log_decay is None else [*_shape_but_for_tokens(log_decay), str(log_decay.dtype)],
            "initial_state": None if initial_state is None else [*initial_state.shape, str(initial_state.dtype)],
            "decay_on_host": self.rates,
            "layout": None if layout is None else _in_short(layout),
            "scale": self.scale,
            "output_final_state": self.output_final_state,
            "segment_length": self.segment_length,
            "tokens": k.shape[1] if self.needs_equal_tokens else None,
            "check_finite": sequence.check_finite,
            **({} if self.grad_mode is None else {"grad_mode": self.grad_mode}),
        }

    @property
    def needs_equal_tokens(self) -> bool:
        """Whether ranks must hold as many tokens: their messages are equally long, and no layout tells how long."""
        sequence = self.shard.sequence
        gathers = sequence is not None and (
            sequence.exchange == "all_gather" or (sequence.exchange == "direct" and sequence.size > 2)
        )
        return gathers and self.segment_length is not None and self.shard.layout is None

    def plan(self, inputs: _Inputs, decay_grad: bool) -> kernels.Steps:
        """The steps on this device; the same for the same inputs."""
        return kernels.steps_of(
            self.operands(inputs),
            cu_seqlens=self.shard.runs.cu_seqlens,
            segment_length=self.segment_length,
            decay_gradient=decay_grad,
            ends=self.ends or self.shard.sequence is not None,
        )

    def operands(self, inputs: _Inputs) -> kernels.Operands:
        return kernels.Operands(*inputs, self.scale)

    def far(self, steps: kernels.Steps, *, reverse: bool) -> exchange.HeadRuns:
        """The heads that need more than the neighbour; the same on every rank."""
        layout, crossed = self.shard.layout, None
        if layout is not None and len(layout.lengths) > 2:
            crossed = crossed_tokens(layout, reverse)
            if self.segment_length is not None:  # then a state crosses a segment at a time
                crossed = tuple(min(tokens, steps.segment_length) for tokens in crossed)
        return horizon.far_heads(self.rates, steps.heads, crossed, steps.dtype)

    def remembered_tokens(self, dtype: torch.dtype) -> float:
        """Tokens after which nothing is left of a state; infinite if the host cannot know, or bits are promised."""
        if self.segment_length is not None or self.shard.packed:
            return math.inf
        return horizon.memory(self.rates, kernels.state_dtype(dtype))

    def most_units(self, steps: kernels.Steps, with_own: bool) -> int:
        """The most maps that any rank sends; without a layout, if all hold as many tokens."""
        if self.segment_length is None:
            return 1
        lengths = [steps.tokens] if self.shard.layout is None else self.shard.layout.lengths
        return max(1, *(-(-tokens // steps.segment_length) for tokens in lengths)) + with_own


_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]  # q, k, v, log_decay


class _Started(NamedTuple):
    """A forward whose state travels."""

    steps: kernels.Steps
    segments: kernels.Maps
    wait: Callable[[], Tensor | None]  # for the state that enters each run


def _start_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    call: _Call,
    decay_grad: bool,
    *,
    at_once: bool,
) -> _Started:
    """What forward does before it must wait. Of q only shape and dtype count. `at_once`: it waits next."""
    inputs, sequence = (q, k, v, log_decay), call.shard.sequence
    with torch.no_grad(), _no_autocast(k.device.type):
        steps = call.plan(inputs, decay_grad)
        if sequence is not None:
            sequence.traffic.kernels = kernels.path(call.operands(inputs))
        return _Started(steps, *_segments_and_exchange(steps, inputs, initial_state, call, at_once))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, call: _Call, started: list[_Started]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """o, the final state if asked for, and the states that backward needs."""
    shard, (steps, segments, wait) = call.shard, started.pop()
    with _no_autocast(q.device.type):
        states, final = steps.scan(segments, wait())
        if final is not None:
            finite.note(shard.sequence, final)
        del segments  # large, and no longer needed
        o = steps.outputs(call.operands((q, k, v, log_decay)), states).to(v.dtype)
        final_state = None
        if call.output_final_state:
            assert final is not None
            own, key = shard.all_states(final, first=False), "" if shard.sequence is None else shard.sequence.key
            final_state = recompute.once(key, lambda: _sum_over_ranks(own, shard))
    return o, final_state, states


def _segments_and_exchange(
    steps: kernels.Steps, inputs: _Inputs, initial_state: Tensor | None, call: _Call, at_once: bool
) -> tuple[kernels.Maps, Callable[[], Tensor | None]]:
    """Steps 1 and 2 of forward. Where a state forgets within these tokens, first what its last ones leave, for others.

    That then travels beside the states of the segments. It does not depend on layout and exchange, so that all of them
    give the same bits.
    """
    _, k, v, log_decay = inputs
    sequence, remembered = call.shard.sequence, call.remembered_tokens(k.dtype)
    if sequence is None or log_decay is None or initial_state is not None or remembered > steps.tokens:
        segments = steps.local_maps(call.operands(inputs))
        call.ranks_agree.settle(lambda: call.fingerprint(*inputs, initial_state))
        return segments, _start_exchange(steps, segments, initial_state, call, at_once=at_once)
    last = int(remembered)

    def what_others_wait_for() -> StateMap:
        ending = steps.of_end(last)
        ends = kernels.Operands(k[:, -last:], k[:, -last:], v[:, -last:], log_decay, call.scale)
        state, left = ending.run_map(ending.local_maps(ends))
        assert left is not None
        call.ranks_agree.settle(lambda: call.fingerprint(*inputs, None))
        return StateMap(state.unsqueeze(0), left.unsqueeze(0))

    with exchange.beside(k):
        pending = _start(what_others_wait_for, steps, call)
    needs_end = call.output_final_state or sequence.check_finite
    segments = steps.local_maps(call.operands(inputs), needs_end=needs_end)
    return segments, lambda: call.shard.enter(None, pending.wait(), reverse=False)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    states: Tensor,
    do: Tensor,
    d_final_state: Tensor | None,
    call: _Call,
    steps: kernels.Steps,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, and as `needs_grad` says d_initial_state [N, H, K, V] and d_log_decay, both in the state's dtype."""
    shard, x = call.shard, call.operands((q, k, v, log_decay))
    d_initial = d_decay = None
    with _no_autocast(q.device.type):
        if d_final_state is not None:
            # Ranks add memory to memory, so it must lie in the same way on all of them.
            d_final_state = d_final_state.clone(memory_format=torch.contiguous_format)
            d_final_state = _sum_over_ranks(d_final_state, shard, reverse=True)
        of_keys = steps.of_keys()
        segments = of_keys.gradient_maps(x, do)
        # Always, whichever inputs need a gradient here: the ranks before this one wait for it.
        wait = _start_exchange(of_keys, segments, d_final_state, call, reverse=True)
        dq = steps.query_gradient(x, do, states)
        d_states, d_first = of_keys.scan(segments, wait(), reverse=True)
        if d_first is not None:
            finite.note(shard.sequence, d_first, reverse=True)
        del segments
        dk, dv = of_keys.key_value_gradient(x, do, d_states)
        if needs_grad[0]:
            assert d_first is not None
            d_initial = shard.all_states(d_first, first=True)
        if needs_grad[1]:
            assert log_decay is not None
            d_decay = steps.decay_gradient(x, (do, dq, dk), states, d_states)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_initial, d_decay


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, call, started):
        ctx.call, ctx.needs_grad = call, (ctx.needs_input_grad[4], ctx.needs_input_grad[3])
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        ctx.steps = started[0].steps
        o, final_state, states = _forward(q, k, v, log_decay, call, started)
        ctx.save_for_backward(q, k, v, log_decay, states)
        return o, final_state

    @staticmethod
    def backward(ctx, do, d_final_state):
        if torch.is_grad_enabled():
            raise RuntimeError("lasp.linear_attention has no second derivative: call backward without create_graph")
        q, k, v, log_decay, states = ctx.saved_tensors
        dq, dk, dv, d_initial, d_decay = _backward(
            q, k, v, log_decay, states, do, d_final_state, ctx.call, ctx.steps, ctx.needs_grad
        )
        d_initial = None if d_initial is None else d_initial.to(ctx.initial_dtype)
        d_decay = None if d_decay is None else d_decay.to(log_decay.dtype)
        return dq, dk, dv, d_decay, d_initial, None, None


def _compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    output_final_state: bool,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    segment_length: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The same through the custom op of compiled.py, which torch.compile takes as it is."""
    lengths = None if layout is None else list(layout.lengths)
    cu_seqlens = None if layout is None or layout.cu_seqlens is None else list(layout.cu_seqlens)
    o, final_state, _ = torch.ops.lasp.linear_attention(
        q,
        k,
        v,
        log_decay,
        initial_state,
        scale,
        output_final_state,
        initial_state is not None or output_final_state,
        lengths,
        cu_seqlens,
        "" if sequence is None else sequence.key,
        segment_length,
        initial_state is not None and initial_state.requires_grad,
        log_decay is not None and log_decay.requires_grad,
    )
    return o, final_state if output_final_state else None


def _start_exchange(
    steps: kernels.Steps,
    segments: kernels.Maps,
    ends: Tensor | None,
    call: _Call,
    *,
    reverse: bool = False,
    at_once: bool = False,
) -> Callable[[], Tensor | None]:
    """Send what this rank's tokens do to a state; the result waits for the state that enters each of its runs.

    `ends` are the states before all sequences (`reverse`: the gradients of those after them); None is zeros.
    `at_once`: nothing is computed before the result waits.
    """
    shard = call.shard
    if shard.sequence is None and ends is None:
        return lambda: None
    given = ends is not None
    own = None  # zeros, where nobody reads them
    if given or shard.packed or call.segment_length is not None:
        own = shard.own_states(ends, steps.zero_state(), first=not reverse)
    if shard.sequence is None:
        return lambda: own
    pending = _start(
        lambda: _border_maps(steps, segments, own, given, call, reverse=reverse),
        steps,
        call,
        reverse=reverse,
        at_once=at_once,
        units=call.most_units(steps, given),
    )
    return lambda: shard.enter(own, pending.wait(), reverse=reverse)


def _start(
    maps: Callable[[], StateMap],
    steps: kernels.Steps,
    call: _Call,
    *,
    reverse: bool = False,
    at_once: bool = False,
    units: int = 1,
) -> exchange.Pending:
    shard = call.shard
    assert shard.sequence is not None
    return exchange.start(
        maps,
        shard.sequence,
        fold=kernels.fold,
        reverse=reverse,
        far=call.far(steps, reverse=reverse),
        units=units,
        ragged=call.segment_length is not None and shard.layout is None,
        at_once=at_once,
        borrow=True,
    )


def _border_maps(
    steps: kernels.Steps, segments: kernels.Maps, own: Tensor | None, given: bool, call: _Call, *, reverse: bool
) -> StateMap:
    """What this rank's tokens do to the state that the next rank (`reverse`: the previous) will receive.

    Only the run at that border matters: as one map, or with a segment length as that of each of its segments, so that
    ranks continue the fold that one rank would do. If the run began on this rank, nothing from before gets
    past it (-inf), and its own state, if one was `given`, stands in front.
    """
    shard = call.shard
    passes = shard.lets_pass(reverse=reverse)
    if own is not None:
        own = shard.at_border(own, reverse=reverse)
    if call.segment_length is None:
        maps = _with_decay(*steps.run_map(segments, reverse=reverse))
        state, log_decay = (shard.at_border(x, reverse=reverse).unsqueeze(0) for x in maps)
        if passes or own is None:  # None: the first rank, before which there is nothing
            return StateMap(state, log_decay)
        state = kernels.fold(own, state, log_decay) if given else state[0]
        return StateMap(state.unsqueeze(0), torch.full_like(log_decay, -torch.inf))
    assert own is not None
    state, log_decay = _with_decay(*steps.border_maps(segments, reverse=reverse))
    if passes and len(state):
        return StateMap(state, log_decay)
    border = log_decay.new_full((1, *log_decay.shape[1:]), 0.0 if passes else -torch.inf)
    if given or not len(state):
        return StateMap(torch.cat([own.unsqueeze(0), state]), torch.cat([border, log_decay]))
    return StateMap(state, torch.cat([border, log_decay[1:]]))


def _with_decay(state: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maps with a decay; exp(0) where there is none."""
    return state, state.new_zeros(*state.shape[:-2], 1) if log_decay is None else log_decay


def _sum_over_ranks(states: Tensor, shard: Shard, *, reverse: bool = False) -> Tensor:
    """In place. Of the ranks only the one on which a sequence ends has a state other than zero."""
    if shard.sequence is not None:
        with waiting(shard.sequence, None, reverse=reverse):
            dist.all_reduce(states, group=shard.sequence.group)
    return states


def _in_short(layout: ShardLayout) -> str:
    """A checksum stands for the offsets, of which there may be thousands."""
    count = "a batch" if layout.cu_seqlens is None else f"{len(layout.cu_seqlens) - 1} packed sequences"
    return f"{count} over {len(layout.lengths)} ranks, checksum {zlib.crc32(repr(layout).encode()):08x}"


def _shape_but_for_tokens(x: Tensor) -> list[int | str]:
    """The shape of a tensor whose second dimension, if it has two or more, is that of tokens."""
    return ["T" if dim == 1 else size for dim, size in enumerate(x.shape)]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast all in its dtype, as for any matrix product; log_decay and states stay as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _no_autocast(device_type: str) -> AbstractContextManager:
    """Inside, everything is computed in its own dtype. (PyTorch's context takes long where there is nothing to do.)"""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _check_initial_state(initial_state: Tensor | None, k: Tensor, v: Tensor, shard: Shard) -> None:
    if initial_state is None:
        return
    expected = (shard.num_sequences, k.shape[2], k.shape[3], v.shape[3])
    if tuple(initial_state.shape) != expected:
        raise ValueError(f"initial_state must have shape [N, H, K, V] = {expected}, got {tuple(initial_state.shape)}")
    if initial_state.device != k.device:
        raise ValueError(f"initial_state must be on the device of k, {k.device}, got {initial_state.device}")
