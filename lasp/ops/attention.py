"""`linear_attention`: where the kernels of one device meet the exchange between ranks.

The arithmetic is that of `lasp_kernels` (`Steps` in dispatch.py), the exchange that of `Call` (call.py). This file puts
them in order, so that a state travels while something else is computed:

    forward                                        backward
      1. local map of every segment                  1. local gradient map of every segment
         (`local_maps`)                                 (`gradient_maps`)
      2. start the exchange of states                2. start the exchange of their gradients, from the last
         (`Call.enter`)                                 rank to the first (`Call.enter`)
      3. wait for the state that enters              3. dq, from the states that forward kept
                                                        (`query_gradient`)
      4. states of all segments, then outputs        4. wait; then dk, dv and d log_decay (`scan`,
         (`scan`, `outputs`)                            `key_value_gradient`, `decay_gradient`)

Forward keeps the states of step 4, so backward needs no second forward exchange: a call is one exchange each way.

Two things can hide the forward exchange. If q is given as a function, it is called between 2 and 3. And if every head
forgets within this rank's last few tokens, 2 comes first: they alone make the state that the next rank waits for.

Eager code runs `_LinearAttention`, an `autograd.Function`; under torch.compile the custom ops of compiled/ call the
same `start_forward`, `forward` and `backward`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lasp_kernels as kernels
from lasp import arguments, decay, exchange
from lasp.checks import finite
from lasp.checks.agreement import Agreement
from lasp.checks.messages import Kind
from lasp.checks.trial import operator
from lasp.exchange import StateMap
from lasp.layout import ShardLayout
from lasp.ops import stream, unmasked
from lasp.ops.call import (
    FORMS,
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
from lasp_kernels import Operands, decode
from lasp_kernels.once import no_second_derivative

NAME = "linear_attention"


def _stand_in(
    q: Tensor, k: Tensor, v: Tensor, output_final_state: bool = False, normalize: bool = False, **_: Any
) -> tuple[Tensor, Tensor | None]:
    """What replaces the operator while `parallelize` tries out a model (lasp.checks.trial): the same shapes, and each
    token sees only itself."""
    x = Operands(q, k, v, normalize=normalize)
    shape = (k.shape[0], x.heads, k.shape[3], x.state_columns)
    final_state = k.new_zeros(shape, dtype=kernels.state_dtype(k.dtype))
    return of_own_tokens(q, k, v, x.output_heads), final_state if output_final_state else None


@operator(_stand_in)
def linear_attention(
    q: Tensor | Callable[[], Tensor],
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    causal: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
    segment_length: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention over a sequence that may be split over ranks.

    Per head, over the whole sequence: S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t and o_t = scale * q_t S_t
    (Lightning Attention-2, arXiv 2401.04658; over ranks LASP, arXiv 2404.02882). With `normalize` o_t is divided by
    q_t s_t, where s_t = exp(log_decay_t) s_{t-1} + k_t is the sum of keys ("Transformers are RNNs", arXiv 2006.16236).
    With `causal=False` there is no mask: each token sees the final state, which is the sum of k^T v over all tokens of
    its sequence, on all ranks.

    On a CPU (and on a GPU in fp64) a token whose q, k or v is NaN or Inf spoils only what depends on it. The Triton
    kernels of a GPU may also spoil its neighbours in the same packed sequence: in o up to 63 tokens before it, in
    gradients up to 63 behind it, those that share a tile with it.

    Args:
        q: [B, T, H*G, K], this rank's tokens; G query heads share a head of k and v (G = 1 is the usual case). Or, with
            G = 1, a function that returns it: it is called while the state travels, which needs only k and v. It must
            not change k and v, and must not exchange anything among the same ranks. Gradients flow through it as
            usual, except under a reentrant checkpoint around this call alone.
        k: [B, T, H, K].
        v: [B, T, H, V]; or G*H heads where q and k both have H: then G heads of v, each with its own state and decay,
            share one head of q and k (the groups of Mamba-2). q, k and v have one float dtype (fp32 may use TF32 as
            PyTorch's own products do, by `torch.set_float32_matmul_precision`). T may differ between ranks, down to 0.
        log_decay: fp32, <= 0 and finite: None, [H] (fixed per head), [B, T, H] (per token) or [B, T, H, K] (per token
            and channel), where H counts the heads of v. With a decay for each of H*G query heads, k and v are repeated
            to as many heads. Values are checked on a CPU only, since on a GPU the host would have to wait
            (`lasp.decay.fixed` checks them once).
        scale: multiplies the output.
        normalize: divide by q_t s_t. It is meant for q and k with positive channels, such as elu(x) + 1. Nothing is
            added to the denominator: where it is 0, o is NaN or Inf, and where it is near 0, gradients are large.
        causal: False for the sum over all tokens (of each packed sequence) in place of the state before a token. It
            cannot be combined with log_decay, normalize, segment_length or grouped values, nor used under
            `lasp.stream_backward` or in inference. An initial state is added. Over several ranks it needs `layout`, or
            padding would be in the sum.
        initial_state: [N, H, K, V], the state before the sequence, given on every rank; N is B, or the number of packed
            sequences; H the heads of v. With `normalize` [N, H, K, V + 1], whose last column is s. The rank on which a
            sequence begins gets its gradient, the others zero.
        output_final_state: also return the state after the last token.
        layout: how tokens lie on the ranks. Needed for packed sequences (then B = 1), which each begin with a new
            state, and where some tokens are padding: these enter no state, and their o is zero. With a layout, heads
            whose fixed decay (see `lasp.decay.fixed`) forgets within every rank exchange with their neighbour only.
        sequence: the ranks; None is one rank. All of them must call with the same settings, in the same order.
        segment_length: tokens of a segment, a multiple of 64; None chooses. If it is given, results do not depend on
            the number of ranks: where ranks are cut at borders of segments, they are bit for bit those of one rank.
            With exchange "all_gather" (or "direct" on more than two ranks) and no layout, all ranks must then hold
            equally many tokens.

    Returns:
        o [B, T, H*G, V] in the dtype of v, and the final state, of the shape of the initial one (fp32; fp64 for fp64
        inputs; the same on every rank), or None. A gradient that ranks give to the final state is summed over them.

    Raises:
        ValueError, TypeError: an argument that does not fit, before any communication. If it is the q that a function
            returned, after it; the group can be used again.
        RankMismatchError: ranks differ in what they are about to compute, or one of them failed before its exchange;
            on every rank. Compared at the first call of `sequence` and at every 1000th (see `lasp.checks.agreement`);
            what is about to be sent, at every call (see `lasp.checks.messages`).
        PeerError: another rank ended, or was silent for the timeout of the group.
        RuntimeError: a second derivative is asked for; an exchange inside the function that makes q.
    """
    padding = padding_of(k, layout, sequence)
    if padding is not None:
        make_query = q
        q = (lambda: padding.cut(make_query())) if callable(make_query) else padding.cut(make_query)
        k, v, log_decay, layout = padding.cut(k), padding.cut(v), padding.cut(log_decay), padding.layout
    options = Options(
        log_decay, scale, normalize, causal, initial_state, output_final_state, layout, sequence, segment_length
    )
    run = _streamed if stream.under_way(sequence) else _run
    o, final_state = run(q, k, v, options)
    return o if padding is None else padding.fill(o), final_state


class Options(NamedTuple):
    """The keyword arguments of a call."""

    log_decay: Tensor | None
    scale: float
    normalize: bool
    causal: bool
    initial_state: Tensor | None
    output_final_state: bool
    layout: ShardLayout | None
    sequence: SequenceParallel | None
    segment_length: int | None


def _run(
    q: Tensor | Callable[[], Tensor], k: Tensor, v: Tensor, options: Options, *, edges: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The call without padding, in eager mode or in a graph; `edges` as in `call_of`."""
    in_graph = torch.compiler.is_compiling()
    if in_graph and callable(q):
        q = _make_query(q, k, options.sequence)
    if (equal := _with_equal_heads(q, k, v, options)) is not None:
        groups, (q, k, v), options = equal
        o, final_state = _run(q, k, v, options, edges=edges)
        return o, None if final_state is None else final_state[:, ::groups]
    if in_graph:
        return _in_graph(q, k, v, options)  # type: ignore[arg-type]
    return _in_eager(q, k, v, options, edges)


def _in_eager(
    q: Tensor | Callable[[], Tensor], k: Tensor, v: Tensor, options: Options, edges: bool
) -> tuple[Tensor, Tensor | None]:
    """Check the arguments, let the ranks agree on the call where that is due, and run the `autograd.Function`."""
    log_decay, scale, normalize, causal, initial_state, output_final_state, layout, sequence, segment_length = options
    alone = not isinstance(sequence, SequenceParallel) or sequence.size == 1
    with begin(NAME, sequence, k) as ranks_agree:
        scale, segment_length = check_options(scale, output_final_state, segment_length)
        arguments.flag("normalize", normalize)
        causal = arguments.flag("causal", causal)
        # Ranks compare q, too, before they exchange; and without ranks there is no wait that making q could fill.
        if callable(q) and (alone or ranks_agree is not None or not causal):
            q = _make_query(q, k, sequence)
        make_query, q = (q, k) if callable(q) else (None, q)  # until q is made, k stands in: only the shape counts
        x = _operands(q, k, v, options, scale)
        kernels.check_inputs(x.q, x.k, x.v, log_decay, segment_length)
        if not causal:
            unmasked.check(x, segment_length, layout, sequence)
        ends, rates = initial_state is not None or output_final_state, decay.host_values(log_decay)
        call = call_of(
            NAME,
            x.k,
            layout,
            sequence,
            segment_length=segment_length,
            ends=ends,
            rates=rates,
            settings=() if alone else settings_of(x, initial_state, output_final_state, rates),
            edges=edges,
        )
        if initial_state is not None:
            check_initial_state(initial_state, x.k, x.v, call, normalize=normalize)
        grad_mode = torch.is_grad_enabled()
        decay_gradient = log_decay is not None and grad_mode and log_decay.requires_grad
        needs = Needs(output_final_state, decay_gradient, make_query is None, grad_mode=grad_mode, causal=causal)
        if not causal:
            if ranks_agree is not None:
                ranks_agree.settle(lambda: fingerprint(x, initial_state, call, needs))
            return unmasked.Unmasked.apply(*x[:3], initial_state, (call, scale, output_final_state))
        # A list, from which `forward` takes what was started: nobody else holds the maps, so it can free them early.
        started: list[Started] = []
        if make_query is not None:
            with torch.no_grad():
                started.append(start_forward(x, initial_state, call, needs, ranks_agree))
            x = x._replace(q=_make_query_meanwhile(make_query, k, started, call))
        settings = (call, scale, normalize, needs, ranks_agree)
        return _LinearAttention.apply(*x[:4], initial_state, settings, started)  # type: ignore[return-value]


def _operands(q: Tensor, k: Tensor, v: Tensor, options: Options, scale: float) -> Operands:
    """q, k and v in one dtype, and with a head of k and v for each head of the decay."""
    log_decay = options.log_decay
    tensors = (("k", k), ("v", v), ("q", q), ("log_decay", log_decay), ("initial_state", options.initial_state))
    for name, x in tensors:
        if not isinstance(x, Tensor) and (x is not None or name in "qkv"):
            raise TypeError(f"{name} must be a tensor, got {arguments.shown(x)}")
    if k.is_meta or torch.is_autocast_enabled(k.device.type):
        q, k, v = autocast(q, k, v)
    if log_decay is not None and k.ndim == 4 and q.ndim == 4 and log_decay.ndim in (1, 3, 4):
        heads = log_decay.shape[0 if log_decay.ndim == 1 else 2]
        alike = v.ndim == 4 and v.shape[2] == k.shape[2]
        if heads == q.shape[2] != k.shape[2] and alike and k.shape[2] and heads % k.shape[2] == 0:
            k, v = (x.repeat_interleave(heads // k.shape[2], 2) for x in (k, v))
    return Operands(q, k, v, log_decay, scale, options.normalize)


# Forward and backward


class Needs(NamedTuple):
    """What is wanted of a forward besides o, and what `start_forward` must know of its caller."""

    final_state: bool
    decay_gradient: bool
    waits_next: bool = True  # nothing is computed between the start of the exchange and the wait for it
    grad_mode: bool | None = None  # of the caller, where it can be told; ranks compare it
    causal: bool = True


class Started(NamedTuple):
    """A forward whose exchange is under way."""

    steps: kernels.Steps
    maps: Any  # of this rank's segments; only `steps` can read them
    wait: Callable[[], Tensor | None]  # returns the state that enters each run
    final_state: bool


def start_forward(
    x: Operands, initial_state: Tensor | None, call: Call, needs: Needs, ranks_agree: Agreement | None
) -> Started:
    """Steps 1 and 2 of forward, outside of autograd. Of q only shape and dtype are used."""
    if needs.final_state:
        call.note_final_state(x.k)
    with no_autocast(x.k.device.type):
        steps = steps_of(x, call, needs.decay_gradient)
        if not call.traffic.kernels:
            call.traffic.kernels, call.traffic.decay = kernels.path(x), form_of(x.log_decay)
        agree = None
        if ranks_agree is not None:
            agree = functools.partial(ranks_agree.settle, lambda: fingerprint(x, initial_state, call, needs))
        if call.rates is not None and initial_state is None and _last_tokens_suffice(x, steps, call):
            return Started(steps, *_last_tokens_first(x, steps, call, needs, agree), needs.final_state)
        maps = steps.local_maps(x)
        if agree is not None:
            agree()
        return Started(steps, maps, call.enter(steps, maps, initial_state, at_once=needs.waits_next), needs.final_state)


def steps_of(x: Operands, call: Call, decay_gradient: bool) -> kernels.Steps:
    """The arithmetic of this device for these operands; backward gets the same as forward."""
    return kernels.steps_of(
        x,
        cu_seqlens=call.shard.runs.cu_seqlens,
        segment_length=call.segment_length,
        decay_gradient=decay_gradient,
        ends=call.ends or call.sequence is not None,
    )


def _last_tokens_suffice(x: Operands, steps: kernels.Steps, call: Call) -> bool:
    """Whether every head forgets within this rank's tokens: then the last of them alone make the state behind them."""
    return call.sequence is not None and call.remembered_tokens(x.k.dtype) <= steps.tokens


def _last_tokens_first(
    x: Operands, steps: kernels.Steps, call: Call, needs: Needs, agree: Callable[[], None] | None
) -> tuple[Any, Callable[[], Tensor | None]]:
    """Steps 1 and 2 in the other order: first the state that the next rank waits for, from the last tokens alone.

    It travels while the maps of the segments are computed. Whether this is done depends on neither layout nor exchange,
    so that all of these give the same bits.
    """
    last = int(call.remembered_tokens(x.k.dtype))

    def last_map() -> StateMap:
        ending = steps.of_end(last)
        maps = ending.local_maps(x._replace(k=x.k[:, -last:], v=x.v[:, -last:]))
        state, transition = ending.run_map(maps)
        if agree is not None:
            agree()
        return StateMap(state.unsqueeze(0), None if transition is None else transition.unsqueeze(0))

    with exchange.beside(x.k):
        wait = call.exchange(last_map, call.terms(steps, given=False))
    assert call.sequence is not None
    maps = steps.local_maps(x, needs_end=needs.final_state or call.sequence.check_finite)
    return maps, lambda: call.shard.enter(None, wait(), reverse=False)


class Kept(NamedTuple):
    """What backward needs besides the inputs: the states of segments; with a normaliser also o and its denominators."""

    states: Tensor
    o: Tensor | None = None
    denominators: Tensor | None = None


def forward(x: Operands, call: Call, started: list[Started]) -> tuple[Tensor, Tensor | None, Kept]:
    """Steps 3 and 4: o, the final state if it was asked for, and what backward needs. Empties `started`."""
    steps, maps, wait, wants_final = started.pop()
    with no_autocast(x.q.device.type):
        states, leaving = steps.scan(maps, wait())
        if leaving is not None:
            finite.note(call.sequence, leaving)
        del maps  # large, and no longer needed
        o, denominators = steps.outputs(x, states)
        o = o.to(x.v.dtype)
        final_state = None
        if wants_final:
            assert leaving is not None
            final_state = call.final_state(leaving)
    return o, final_state, Kept(states, o if x.normalize else None, denominators)


class Gradients(NamedTuple):
    """The gradients of a call's inputs. The last two are in the state's dtype, and None where they are not needed."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_initial: Tensor | None
    d_decay: Tensor | None


def backward(
    x: Operands,
    kept: Kept,
    do: Tensor,
    d_final_state: Tensor | None,
    call: Call,
    steps: kernels.Steps,
    needs_grad: tuple[bool, bool],
) -> Gradients:
    """All gradients; `needs_grad`: whether also those of the initial state [N, H, K, V] and of log_decay."""
    d_initial = d_decay = None
    with no_autocast(x.q.device.type):
        if d_final_state is not None:
            # Ranks add it up element by element in memory, so it must have the same strides on all of them.
            d_final_state = d_final_state.clone(memory_format=torch.contiguous_format)
            d_final_state = call.sum_over_ranks(d_final_state, reverse=True)
        if kept.o is not None and kept.denominators is not None:
            do = steps.output_gradient(x, do, kept.o, kept.denominators)
        key_steps = steps.of_keys()
        maps = key_steps.gradient_maps(x, do)
        # Always, whichever inputs need a gradient here: the ranks before this one wait for it.
        wait = call.enter(key_steps, maps, d_final_state, reverse=True)
        dq = steps.query_gradient(x, do, kept.states)
        d_states, d_first = key_steps.scan(maps, wait(), reverse=True)
        if d_first is not None:
            finite.note(call.sequence, d_first, reverse=True)
        del maps
        dk, dv = key_steps.key_value_gradient(x, do, d_states)
        if needs_grad[0]:
            assert d_first is not None
            d_initial = call.shard.all_states(d_first, first=True)
        if needs_grad[1]:
            d_decay = steps.decay_gradient(x, (do, dq, dk), kept.states, d_states)
    return Gradients(dq.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype), d_initial, d_decay)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, settings, started):
        ctx.call, *ctx.options, needs, ranks_agree = settings
        ctx.needs_grad = (ctx.needs_input_grad[4], ctx.needs_input_grad[3])
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        x = Operands(q, k, v, log_decay, *ctx.options)
        if not started:
            started.append(start_forward(x, initial_state, ctx.call, needs, ranks_agree))
        ctx.steps = started[0].steps
        o, final_state, kept = forward(x, ctx.call, started)
        ctx.save_for_backward(q, k, v, log_decay, *kept)
        return o, final_state

    @staticmethod
    @no_second_derivative("lasp.linear_attention")
    def backward(ctx, do, d_final_state):
        q, k, v, log_decay, *kept = ctx.saved_tensors
        x = Operands(q, k, v, log_decay, *ctx.options)
        found = backward(x, Kept(*kept), do, d_final_state, ctx.call, ctx.steps, ctx.needs_grad)
        d_initial = None if found.d_initial is None else found.d_initial.to(ctx.initial_dtype)
        d_decay = None if found.d_decay is None else found.d_decay.to(log_decay.dtype)
        return found.dq, found.dk, found.dv, d_decay, d_initial, None, None


# What the ranks compare


def settings_of(
    x: Operands, initial_state: Tensor | None, output_final_state: bool, rates: tuple[float, ...] | None
) -> Kind:
    """The settings that must agree on all ranks at every call, and do not show in its messages.

    `rates` are the fixed decays, where the host knows them. For a GPU it may know them in eager code and not in a
    graph, so they count on a CPU only.
    """
    return (
        ("scale", x.scale),
        ("normalize", x.normalize),
        ("dtype", x.k.dtype),
        ("query heads", x.q.shape[2]),
        ("key heads", x.k.shape[2]),
        ("log_decay", None if x.log_decay is None else FORMS[x.log_decay.ndim]),
        ("fixed decays", rates if x.k.device.type == "cpu" else None),
        ("initial_state", "none" if initial_state is None else "given"),
        ("output_final_state", output_final_state),
    )


def fingerprint(x: Operands, initial_state: Tensor | None, call: Call, needs: Needs) -> dict[str, object]:
    """All that must agree on all ranks, compared at the first call and at every 1000th."""
    tensors = {**x._asdict(), "initial_state": initial_state}
    scale, normalize = tensors.pop("scale"), tensors.pop("normalize")
    modes = {"causal": needs.causal} | ({} if needs.grad_mode is None else {"grad_mode": needs.grad_mode})
    return call.fingerprint(tensors, scale=scale, normalize=normalize, output_final_state=needs.final_state, **modes)


# A q that is a function


def _make_query(make: Callable[[], Tensor], k: Tensor, sequence: SequenceParallel | None) -> Tensor:
    """The q that a function returns; raises unless it is like k, or if the function exchanges among these ranks."""
    peers = sequence.peers if isinstance(sequence, SequenceParallel) else None
    if peers is None or torch.compiler.is_compiling():
        q = make()
    else:
        peers.busy = True
        try:
            q = make()
        finally:
            peers.busy = False
    if not isinstance(q, Tensor):
        raise TypeError(f"q must make a tensor, got {arguments.shown(q)}")
    if isinstance(k, Tensor):
        like, (q,) = autocast(k)[0], autocast(q)
        if (q.shape, q.dtype, q.device) != (like.shape, like.dtype, like.device):
            raise ValueError(
                f"q must make a tensor like k, {tuple(like.shape)} {like.dtype} on {like.device}, got {tuple(q.shape)} "
                f"{q.dtype} on {q.device}"
            )
    return q


def _make_query_meanwhile(make: Callable[[], Tensor], k: Tensor, started: list[Started], call: Call) -> Tensor:
    """The same while an exchange is under way, which is brought to its end even if the function raises."""
    try:
        return _make_query(make, k, call.sequence)
    except BaseException:
        # Other ranks wait for what this one passes on and adds, and may still be reading its memory.
        steps, maps, wait, wants_final = started.pop()
        _, leaving = steps.scan(maps, wait())
        if wants_final and leaving is not None:
            call.final_state(leaving)
        raise


# Grouped heads


def _with_equal_heads(q: Any, k: Any, v: Any, options: Options) -> tuple[int, tuple[Any, Any, Any], Options] | None:
    """For the kernels of a decay per channel, which need as many heads of q, k and v: repeat those that are shared.

    Returns how many of the repeated states stand for one that was given, and the arguments. None where nothing is to be
    repeated, or where they do not fit, which a later check reports.
    """
    log_decay, initial_state = options.log_decay, options.initial_state
    if options.normalize or not isinstance(log_decay, Tensor) or log_decay.ndim != 4:
        return None  # the kernels of all other decays take grouped heads
    if not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k, v)):
        return None
    queries, keys, values = q.shape[2], k.shape[2], v.shape[2]
    if queries == keys == values:
        return None
    groups = max(queries, values) // max(1, keys)
    forms = (keys, groups * keys), (groups * keys, keys)  # grouped values, grouped queries
    if groups < 2 or (queries, values) not in forms:
        return None
    fits = q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3]
    fits = fits and log_decay.shape == (*k.shape[:2], values, k.shape[3])
    if initial_state is not None:
        shape = getattr(initial_state, "shape", ())[1:]
        fits = fits and isinstance(initial_state, Tensor) and shape == (values, k.shape[3], v.shape[3])
    if not fits:
        return None
    one_each = Operands(k, k, v[:, :, :keys], log_decay[:, :, :keys])
    if kernels.path(one_each) == "reference":
        return None
    if values > keys:
        return 1, (q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2), v), options
    k, v, log_decay = (x.repeat_interleave(groups, 2) for x in (k, v, log_decay))
    initial_state = None if initial_state is None else initial_state.repeat_interleave(groups, 1)
    return groups, (q, k, v), options._replace(log_decay=log_decay, initial_state=initial_state)


# A segment of a longer sequence: lasp.stream_backward, and inference


@stream.in_eager
def _streamed(q: Tensor | Callable[[], Tensor], k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, None]:
    """The call on one segment (lasp.ops.stream): the state enters from the segment before, and leaves to the next."""
    sequence = options.sequence
    if options.causal is not True:
        unmasked.not_streamed(sequence.stream.name)  # type: ignore[union-attr]
    stream.no_final_state(options.output_final_state, sequence)
    if (state := stream.held(NAME, sequence)) is not None:
        return _one_token(_operands(q() if callable(q) else q, k, v, options, options.scale), state), None
    crossing = stream.crossing(NAME, sequence)
    assert crossing is not None
    entering = crossing.enter(options.initial_state, k, v, options.log_decay)
    with_states = options._replace(initial_state=entering, output_final_state=crossing.leaves)
    o, final_state = _run(q, k, v, with_states, edges=options.initial_state is None)
    return crossing.leave(o, final_state), None


def _one_token(x: Operands, state: Tensor) -> Tensor:
    """o [B, 1, H, V] of one token a row. The state [B, H, K, V] is updated in place."""
    log_decay = x.log_decay if x.log_decay is None or x.log_decay.ndim == 1 else x.log_decay.squeeze(1)
    q, k, v = (y.squeeze(1) for y in x[:3])
    o = decode.linear_attention_step(q, k, v, log_decay, state, scale=x.scale, normalize=x.normalize)
    return o.unsqueeze(1).to(x.v.dtype)


# torch.compile


def _in_graph(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """The call as a custom op (compiled/), which torch.compile does not look into."""
    x = _operands(q, k, v, options, options.scale)
    initial_state, wants_final, layout = options.initial_state, options.output_final_state, options.layout
    initial_grad = initial_state is not None and initial_state.requires_grad
    facts = facts_of(layout, options.sequence)
    if arguments.flag("causal", options.causal):
        decay_grad = x.log_decay is not None and x.log_decay.requires_grad
        o, final_state, *_ = torch.ops.lasp.linear_attention(
            *x, initial_state, wants_final, *facts, options.segment_length, initial_grad, decay_grad
        )
    else:
        unmasked.check(x, options.segment_length, layout, options.sequence)
        o, final_state, _ = torch.ops.lasp.unmasked_attention(
            *x[:3], x.scale, initial_state, wants_final, *facts, initial_grad
        )
    return o, final_state if wants_final else None
