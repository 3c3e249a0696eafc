"""`linear_attention`: the operator in which the kernels of a device and the exchange between ranks meet.

Forward                                        Backward
  1. local state of every segment                1. local gradient of every segment's state
     (`local_maps`)                                 (`gradient_maps`)
  2. start the exchange (`Call.enter`)           2. start the exchange, in reverse (`Call.enter`)
  3. wait for the state that enters              3. dq, from the states that forward kept
                                                    (`query_gradient`)
  4. states of all segments, outputs             4. wait; dk, dv, d log_decay (`scan`,
     (`scan`, `outputs`)                            `key_value_gradient`, `decay_gradient`)

The states of step 4 are kept for backward, so there is one exchange in forward and one in backward, and no more. Where
a state forgets fast, 2 comes before 1 in forward: the last tokens alone make what the next rank waits for. A q that is
a function is made between 2 and 3.
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
from lasp_kernels import Operands
from lasp_kernels import decode as step

NAME = "linear_attention"


def _stand_in(
    q: Tensor, k: Tensor, v: Tensor, output_final_state: bool = False, normalize: bool = False, **_: Any
) -> tuple[Tensor, Tensor | None]:
    """For a trial."""
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

    A token whose q, k or v is NaN or Inf spoils what depends on it and no more on a CPU (and on a GPU in fp64). The
    Triton kernels of a GPU may spoil its neighbours too, of the same packed sequence: the up to 63 tokens before it in
    o, or behind it in gradients, that fall into one tile with it.

    Args:
        q: [B, T, H*G, K], this rank's tokens; G query heads share a head of k and v (G = 1 is the usual case). Or a
            function that makes it, with G = 1: it is called while the state travels, for which k and v are enough. It
            must leave these as they are, and must not exchange anything among the same ranks itself. What it uses
            gets its gradients as elsewhere, but not through a reentrant checkpoint around this call alone.
        k: [B, T, H, K].
        v: [B, T, H, V]; or G*H heads where q and k both have H: then G heads of v, with a state and a decay each, share
            one of q and k (the groups of Mamba-2). q, k and v have one float dtype (fp32 may use TF32 as PyTorch's own
            products do, by `torch.set_float32_matmul_precision`). T may differ between ranks, down to zero.
        log_decay: fp32, <= 0 and finite: None, [H] (fixed per head), [B, T, H] (per token) or [B, T, H, K] (per token
            and channel), H the heads of v. With a decay for each of H*G query heads, k and v are repeated to as many.
            Values are looked at on a CPU only: on a GPU the host would have to wait (`lasp.decay.fixed` looks at them
            once).
        scale: multiplies the output.
        normalize: divide by q_t s_t, which is for q and k whose channels are positive, as those of elu(x) + 1. Nothing
            is added to it: where it is 0, o is NaN or Inf, and where it is near 0, gradients are large.
        causal: False for a sum over all tokens (of each packed sequence) in place of the states before a token. It goes
            with no log_decay, normalize, segment_length or grouped values, and not with `lasp.stream_backward` or in
            inference. An initial state is added. Over several ranks it needs `layout`: padding would be in the sum.
        initial_state: [N, H, K, V], the state before the sequence, given on every rank; N is B, or the number of packed
            sequences; H the heads of v. With `normalize` [N, H, K, V + 1], whose last column is s. The rank on which a
            sequence begins gets its gradient, the others zero.
        output_final_state: also return the state after the last token.
        layout: how tokens lie on the ranks; needed for packed sequences (then B = 1), whose state starts anew, and
            where some tokens are padding, which then is in no state, and whose o is zero. With it, heads of a fixed
            decay (see `lasp.decay.fixed`) whose state no rank lets pass exchange with the neighbour only.
        sequence: the ranks; None is one rank. All of them must call with the same settings, in the same order.
        segment_length: tokens of a segment, a multiple of 64; None chooses. If it is given, results do not depend on
            the number of ranks: where the borders of ranks are borders of segments, they are the bits of one rank.
            With exchange "all_gather" (or "direct" on more than two ranks) and no layout, all ranks must then
            hold equally many tokens.

    Returns:
        o [B, T, H*G, V] in the dtype of v, and the final state, of the shape of the initial one (fp32; fp64 for fp64
        inputs; the same on every rank), or None. A gradient that ranks give to the final state is summed over them.

    Raises:
        ValueError, TypeError: an argument that does not fit, before any communication; a q that a function made, after
            it, and then the group is usable afterwards.
        RankMismatchError: ranks differ in what they are about to compute, or one of them failed before its exchange;
            on every rank. Compared at the first call of `sequence` and at every 1000th (see `lasp.checks.agreement`);
            what is about to be sent, at every call (see `lasp.checks.messages`).
        PeerError: another rank ended, or was silent for the timeout of the group.
        RuntimeError: a second derivative is asked for; an exchange inside the function that makes q.
    """
    padding = padding_of(k, layout, sequence)
    if padding is not None:
        o, final_state = linear_attention(
            (lambda: padding.cut(q())) if callable(q) else padding.cut(q),
            padding.cut(k),
            padding.cut(v),
            log_decay=padding.cut(log_decay),
            scale=scale,
            normalize=normalize,
            causal=causal,
            initial_state=initial_state,
            output_final_state=output_final_state,
            layout=padding.layout,
            sequence=sequence,
            segment_length=segment_length,
        )
        return padding.fill(o), final_state
    if stream.under_way(sequence):
        if causal is not True:
            unmasked.not_streamed(sequence.stream.name)  # type: ignore[union-attr]
        return _streamed(
            q, k, v, log_decay, scale, normalize, initial_state, output_final_state, layout, sequence, segment_length
        )
    options = (log_decay, scale, normalize, initial_state, output_final_state, layout, sequence, segment_length)
    return _run(q, k, v, *options, causal=causal)


@stream.in_eager
def _streamed(
    q: Tensor | Callable[[], Tensor],
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    segment_length: int | None,
) -> tuple[Tensor, None]:
    """On a segment of a sequence (lasp.ops.stream)."""
    stream.no_final_state(output_final_state, sequence)
    if (state := stream.held(NAME, sequence)) is not None:
        q = q() if callable(q) else q
        return _one_token(_prepare(q, k, v, log_decay, None, scale, normalize), state), None
    edges = initial_state is None
    crossing = stream.crossing(NAME, sequence)
    assert crossing is not None
    initial_state = crossing.enter(initial_state, k, v, log_decay)
    options = (log_decay, scale, normalize, initial_state, crossing.leaves, layout, sequence, segment_length)
    o, final_state = _run(q, k, v, *options, edges=edges)
    return crossing.leave(o, final_state), None


def _one_token(x: Operands, state: Tensor) -> Tensor:
    """o [B, 1, H, V]; the state becomes that behind the token."""
    log_decay = x.log_decay if x.log_decay is None or x.log_decay.ndim == 1 else x.log_decay.squeeze(1)
    q, k, v = (y.squeeze(1) for y in x[:3])
    o = step.linear_attention_step(q, k, v, log_decay, state, scale=x.scale, normalize=x.normalize)
    return o.unsqueeze(1).to(x.v.dtype)


def _run(
    q: Tensor | Callable[[], Tensor],
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    normalize: bool,
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    segment_length: int | None,
    *,
    causal: bool = True,
    edges: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Of tokens none of which is padding; `edges` as in `call_of`."""
    in_graph = torch.compiler.is_compiling()
    q = _made(q, k, sequence) if in_graph and callable(q) else q
    if (equal := _with_equal_heads(q, k, v, log_decay, initial_state, normalize)) is not None:
        groups, (q, k, v, log_decay), initial_state = equal
        options = (log_decay, scale, normalize, initial_state, output_final_state, layout, sequence, segment_length)
        o, final_state = _run(q, k, v, *options, edges=edges, causal=causal)
        return o, None if final_state is None else final_state[:, ::groups]
    if in_graph:
        x = _prepare(q, k, v, log_decay, initial_state, scale, normalize)  # type: ignore[arg-type]
        if not arguments.flag("causal", causal):
            return _compiled_unmasked(x, initial_state, output_final_state, layout, sequence, segment_length)
        return _compiled(x, initial_state, output_final_state, layout, sequence, segment_length)
    alone = not isinstance(sequence, SequenceParallel) or sequence.size == 1
    with begin(NAME, sequence, k) as ranks_agree:
        scale, segment_length = check_options(scale, output_final_state, segment_length)
        arguments.flag("normalize", normalize)
        causal = arguments.flag("causal", causal)
        # What ranks compare must be there before they exchange, and without ranks nothing travels meanwhile.
        if callable(q) and (alone or ranks_agree is not None or not causal):
            q = _made(q, k, sequence)
        later, q = (q, k) if callable(q) else (None, q)  # until it is made the shape of k says it all
        x = _prepare(q, k, v, log_decay, initial_state, scale, normalize)
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
            settings=settings_of(x, initial_state, output_final_state, rates),
            edges=edges,
        )
        if initial_state is not None:
            check_initial_state(initial_state, x.k, x.v, call, normalize=normalize)
        grad_mode = torch.is_grad_enabled()
        decay_gradient = log_decay is not None and grad_mode and log_decay.requires_grad
        needs = Needs(output_final_state, decay_gradient, later is None, grad_mode=grad_mode, causal=causal)
        if not causal:
            if ranks_agree is not None:
                ranks_agree.settle(lambda: fingerprint(x, initial_state, call, needs))
            return unmasked.Unmasked.apply(*x[:3], initial_state, (call, scale, output_final_state))
        # In a list, from which `forward` takes it, so that it lives no longer than it is needed.
        started: list[Started] = []
        if later is not None:
            with torch.no_grad():
                started.append(start_forward(x, initial_state, call, needs, ranks_agree))
            x = x._replace(q=_made_meanwhile(later, k, started, call))
        facts = (call, scale, normalize, needs, ranks_agree)
        return _LinearAttention.apply(*x[:4], initial_state, facts, started)  # type: ignore[return-value]


def _with_equal_heads(
    q: Any, k: Any, v: Any, log_decay: Any, initial_state: Any, normalize: bool
) -> tuple[int, tuple[Any, ...], Any] | None:
    """q, k, v and log_decay with one number of heads, for kernels that take nothing else; None where all is well.

    Before them: each how many heads of states is one that was given; behind them: the initial state.
    """
    if normalize or not all(isinstance(x, Tensor) and x.ndim == 4 for x in (q, k, v, log_decay)):
        return None  # kernels of the other decays take all numbers of heads
    queries, keys, values = (x.shape[2] for x in (q, k, v))
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
        return None  # to the error that names what was given
    one_each = Operands(k, k, v[:, :, :keys], log_decay[:, :, :keys])
    if kernels.path(one_each) == "reference":
        return None
    if values > keys:
        return 1, (*(x.repeat_interleave(groups, 2) for x in (q, k)), v, log_decay), initial_state
    initial_state = None if initial_state is None else initial_state.repeat_interleave(groups, 1)
    return groups, (q, *(x.repeat_interleave(groups, 2) for x in (k, v, log_decay))), initial_state


def settings_of(
    x: Operands, initial_state: Tensor | None, output_final_state: bool, rates: tuple[float, ...] | None
) -> Kind:
    """Of a call, besides what its messages show; of operands that have been checked.

    `rates` are the fixed decays if the host knows them. Of a GPU's it may in eager code and not in compiled.
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


class Needs(NamedTuple):
    """What a forward is wanted for."""

    final_state: bool
    decay_gradient: bool
    waits_next: bool = True  # nothing is computed between the start of the exchange and the wait for it
    grad_mode: bool | None = None  # of the caller, where it can be told; for the comparison of ranks
    causal: bool = True


class Started(NamedTuple):
    """A forward whose state travels."""

    steps: kernels.Steps
    maps: Any  # of this rank's segments
    wait: Callable[[], Tensor | None]  # for the state that enters each run
    final_state: bool


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    normalize: bool,
) -> Operands:
    """q, k and v in one dtype, and with a head of k and v for each head of the decay."""
    for name, x in (("k", k), ("v", v), ("q", q), ("log_decay", log_decay), ("initial_state", initial_state)):
        if not isinstance(x, Tensor) and (x is not None or name in "qkv"):
            raise TypeError(f"{name} must be a tensor, got {arguments.shown(x)}")
    if k.is_meta or torch.is_autocast_enabled(k.device.type):
        q, k, v = autocast(q, k, v)
    if log_decay is not None and k.ndim == 4 and q.ndim == 4 and log_decay.ndim in (1, 3, 4):
        heads = log_decay.shape[0 if log_decay.ndim == 1 else 2]
        alike = v.ndim == 4 and v.shape[2] == k.shape[2]
        if heads == q.shape[2] != k.shape[2] and alike and k.shape[2] and heads % k.shape[2] == 0:
            k, v = (x.repeat_interleave(heads // k.shape[2], 2) for x in (k, v))
    return Operands(q, k, v, log_decay, scale, normalize)


def _made(make: Callable[[], Tensor], k: Tensor, sequence: SequenceParallel | None) -> Tensor:
    """The q that a function makes, which must be like k, and must not exchange anything among these ranks."""
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


def _made_meanwhile(make: Callable[[], Tensor], k: Tensor, started: list[Started], call: Call) -> Tensor:
    """The same while an exchange is under way, which must come to its end whatever happens here."""
    try:
        return _made(make, k, call.sequence)
    except BaseException:
        # Other ranks count on what this one passes on and adds, and its memory is still read.
        steps, maps, wait, wants_final = started.pop()
        _, behind = steps.scan(maps, wait())
        if wants_final and behind is not None:
            call.final_state(behind)
        raise


def start_forward(
    x: Operands, initial_state: Tensor | None, call: Call, needs: Needs, ranks_agree: Agreement | None
) -> Started:
    """What forward does before it must wait, without a graph. Of q only shape and dtype count."""
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
    """The steps on this device; the same for the same inputs."""
    return kernels.steps_of(
        x,
        cu_seqlens=call.shard.runs.cu_seqlens,
        segment_length=call.segment_length,
        decay_gradient=decay_gradient,
        ends=call.ends or call.sequence is not None,
    )


def fingerprint(x: Operands, initial_state: Tensor | None, call: Call, needs: Needs) -> dict[str, object]:
    """What ranks compare of a call."""
    tensors = {**x._asdict(), "initial_state": initial_state}
    scale, normalize = tensors.pop("scale"), tensors.pop("normalize")
    modes = {"causal": needs.causal} | ({} if needs.grad_mode is None else {"grad_mode": needs.grad_mode})
    return call.fingerprint(tensors, scale=scale, normalize=normalize, output_final_state=needs.final_state, **modes)


def _last_tokens_suffice(x: Operands, steps: kernels.Steps, call: Call) -> bool:
    """Whether every head forgets within these tokens, so that what leaves them is known from the last ones alone."""
    return call.sequence is not None and call.remembered_tokens(x.k.dtype) <= steps.tokens


def _last_tokens_first(
    x: Operands, steps: kernels.Steps, call: Call, needs: Needs, agree: Callable[[], None] | None
) -> tuple[Any, Callable[[], Tensor | None]]:
    """Steps 1 and 2 of forward the other way round: first what the last tokens leave, which others wait for.

    It then travels beside the states of the segments. This does not depend on layout and exchange, so that all of them
    give the same bits.
    """
    last = int(call.remembered_tokens(x.k.dtype))

    def what_others_wait_for() -> StateMap:
        ending = steps.of_end(last)
        maps = ending.local_maps(x._replace(k=x.k[:, -last:], v=x.v[:, -last:]))
        state, transition = ending.run_map(maps)
        if agree is not None:
            agree()
        return StateMap(state.unsqueeze(0), None if transition is None else transition.unsqueeze(0))

    with exchange.beside(x.k):
        wait = call.exchange(what_others_wait_for, call.terms(steps, given=False))
    assert call.sequence is not None
    maps = steps.local_maps(x, needs_end=needs.final_state or call.sequence.check_finite)
    return maps, lambda: call.shard.enter(None, wait(), reverse=False)


class Kept(NamedTuple):
    """Of a forward, for its backward: the states of segments; with a normaliser also o and its denominators."""

    states: Tensor
    o: Tensor | None = None
    denominators: Tensor | None = None


def forward(x: Operands, call: Call, started: list[Started]) -> tuple[Tensor, Tensor | None, Kept]:
    """o, the final state if asked for, and what backward needs."""
    steps, maps, wait, wants_final = started.pop()
    with no_autocast(x.q.device.type):
        states, behind = steps.scan(maps, wait())
        if behind is not None:
            finite.note(call.sequence, behind)
        del maps  # large, and no longer needed
        o, denominators = steps.outputs(x, states)
        o = o.to(x.v.dtype)
        final_state = None
        if wants_final:
            assert behind is not None
            final_state = call.final_state(behind)
    return o, final_state, Kept(states, o if x.normalize else None, denominators)


class Gradients(NamedTuple):
    """Of the inputs of a call; those of the initial state and of the decay in the state's dtype, None if not asked."""

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
    """All gradients; `needs_grad`: whether also of the initial state [N, H, K, V], and of log_decay."""
    d_initial = d_decay = None
    with no_autocast(x.q.device.type):
        if d_final_state is not None:
            # Ranks add memory to memory, so it must lie in the same way on all of them.
            d_final_state = d_final_state.clone(memory_format=torch.contiguous_format)
            d_final_state = call.sum_over_ranks(d_final_state, reverse=True)
        if kept.o is not None and kept.denominators is not None:
            do = steps.output_gradient(x, do, kept.o, kept.denominators)
        of_keys = steps.of_keys()
        maps = of_keys.gradient_maps(x, do)
        # Always, whichever inputs need a gradient here: the ranks before this one wait for it.
        wait = call.enter(of_keys, maps, d_final_state, reverse=True)
        dq = steps.query_gradient(x, do, kept.states)
        d_states, d_first = of_keys.scan(maps, wait(), reverse=True)
        if d_first is not None:
            finite.note(call.sequence, d_first, reverse=True)
        del maps
        dk, dv = of_keys.key_value_gradient(x, do, d_states)
        if needs_grad[0]:
            assert d_first is not None
            d_initial = call.shard.all_states(d_first, first=True)
        if needs_grad[1]:
            d_decay = steps.decay_gradient(x, (do, dq, dk), kept.states, d_states)
    return Gradients(dq.to(x.q.dtype), dk.to(x.k.dtype), dv.to(x.v.dtype), d_initial, d_decay)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, facts, started):
        ctx.call, *ctx.options, needs, ranks_agree = facts
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
    def backward(ctx, do, d_final_state):
        if torch.is_grad_enabled():
            raise RuntimeError("lasp.linear_attention has no second derivative: call backward without create_graph")
        q, k, v, log_decay, *kept = ctx.saved_tensors
        x = Operands(q, k, v, log_decay, *ctx.options)
        found = backward(x, Kept(*kept), do, d_final_state, ctx.call, ctx.steps, ctx.needs_grad)
        d_initial = None if found.d_initial is None else found.d_initial.to(ctx.initial_dtype)
        d_decay = None if found.d_decay is None else found.d_decay.to(log_decay.dtype)
        return found.dq, found.dk, found.dv, d_decay, d_initial, None, None


def _compiled(
    x: Operands,
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    segment_length: int | None,
) -> tuple[Tensor, Tensor | None]:
    """The same through the custom op of compiled.py, which torch.compile takes as it is."""
    lengths, cu_seqlens = (None, None) if layout is None else layout.facts
    o, final_state, *_ = torch.ops.lasp.linear_attention(
        *x,
        initial_state,
        output_final_state,
        lengths,
        cu_seqlens,
        None if sequence is None else sequence.handle,
        segment_length,
        initial_state is not None and initial_state.requires_grad,
        x.log_decay is not None and x.log_decay.requires_grad,
    )
    return o, final_state if output_final_state else None


def _compiled_unmasked(
    x: Operands,
    initial_state: Tensor | None,
    output_final_state: bool,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    segment_length: int | None,
) -> tuple[Tensor, Tensor | None]:
    unmasked.check(x, segment_length, layout, sequence)
    lengths, cu_seqlens, ranks = facts_of(layout, sequence)
    with_gradient = initial_state is not None and initial_state.requires_grad
    o, final_state, _ = torch.ops.lasp.unmasked_attention(
        *x[:3], x.scale, initial_state, output_final_state, lengths, cu_seqlens, ranks, with_gradient
    )
    return o, final_state if output_final_state else None
