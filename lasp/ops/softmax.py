"""`softmax_attention`: the softmax layers of hybrid models, over the keys and values of all earlier ranks.

Unlike a state, what crosses grows with the sequence. There are two ways; the arithmetic between their exchanges is
PyTorch's, on one device (`lasp_kernels.softmax`).

    by heads    Where the ranks divide the heads of k and v (or the other way round), each rank gives away the tokens of
                all heads but its share, and gets all tokens of its share (all-to-all; DeepSpeed-Ulysses, arXiv
                2309.14509); so does the output on its way back. All ranks do as much.
    gathered    Else forward gathers K and V of all tokens (LASP-2H, arXiv 2502.07563, section 3); backward adds up what
                every rank did with them, and each gets the part of its own tokens (reduce-scatter). Later ranks have
                more to see: of P ranks with as many tokens the last does 2 - 1 / P times the mean of the work, and the
                others wait for it.

docs/lab/exchange.md has what both cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp import arguments
from lasp.checks import reach
from lasp.checks.messages import Kind
from lasp.checks.trial import operator
from lasp.layout import Shard, ShardLayout
from lasp.ops import recompute, stream, tokens
from lasp.ops.call import (
    Call,
    autocast,
    begin,
    call_of,
    facts_of,
    kind_of_tokens,
    no_autocast,
    of_own_tokens,
    padding_of,
    wants_gradient,
)
from lasp.ops.session import Session
from lasp.ranks import SequenceParallel, collectives
from lasp_kernels import softmax as local
from lasp_kernels.once import no_second_derivative
from lasp_kernels.softmax_pieces import Attended, Gradients, Piece, Queries

NAME = "softmax_attention"


def _stand_in(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """What replaces the operator in a trial of a model (lasp.checks.trial): each token sees only itself."""
    return of_own_tokens(q, k, v, q.shape[2])


@operator(_stand_in)
def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Causal softmax attention over a sequence that may be split over ranks.

    Args:
        q: [B, T, H*G, K], this rank's tokens; G query heads share a head of k and v.
        k: [B, T, H, K].
        v: [B, T, H, V]. q, k and v have one float dtype. T may differ between ranks, down to zero.
        layout: how tokens lie on the ranks. Needed for packed documents (then B = 1), which do not see each other, and
            under torch.compile. Without it ranks first exchange how many tokens they hold, for which the host waits.
        sequence: the ranks; None is one rank. All of them must call with the same settings, in the same order.
        window: a token sees itself and the `window` - 1 tokens before it; None is all of them.
        scale: of the scores; None is K^-0.5.
        softcap: scores s become softcap tanh(s / softcap); None leaves them.
        key_mask: [B, T], bool, True for real tokens; given on all ranks or on none. What a padded token itself gets is
            meaningless, but finite.
        dropout_p: the probability that a weight is left out; each rank draws from its own generator (ranks that were
            seeded alike draw alike). Under torch.compile packed documents take none: their backward, in an op, computes
            forward once more.

    Returns:
        o [B, T, H*G, V] in the dtype of q.

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication.
        RankMismatchError, PeerError: as `lasp.linear_attention`.
    """
    padding = padding_of(k, layout, sequence)
    if padding is not None:
        o = softmax_attention(
            padding.cut(q),
            padding.cut(k),
            padding.cut(v),
            layout=padding.layout,
            sequence=sequence,
            window=window,
            scale=scale,
            softcap=softcap,
            key_mask=padding.cut(key_mask),
            dropout_p=dropout_p,
        )
        return padding.fill(o)
    settings = {"window": window, "scale": scale, "softcap": softcap, "dropout_p": dropout_p}
    if stream.under_way(sequence):
        if isinstance(sequence.stream, Session):  # type: ignore[union-attr]
            return _in_session(q, k, v, layout, sequence, key_mask, settings)  # type: ignore[arg-type]
        return _streamed(q, k, v, layout, sequence, key_mask, settings)  # type: ignore[arg-type]
    if torch.compiler.is_compiling():
        q, k, v, settings = _checked(q, k, v, key_mask, settings)
        return _in_graph(q, k, v, layout, sequence, key_mask, settings)
    if not isinstance(sequence, SequenceParallel) or sequence.size == 1:
        q, k, v, settings = _checked(q, k, v, key_mask, settings)
        documents = Shard.of(k, layout, sequence).runs.cu_seqlens
        reach.note_call(NAME, k, layout, sequence, reach.DOCUMENTS)
        return local.softmax_attention(q, k, v, cu_seqlens=documents, key_mask=key_mask, **settings)
    q, k, v, settings, call, gradient = _agreed(q, k, v, key_mask, layout, sequence, settings)
    lengths = _lengths(k, call)
    if tokens.by_heads(q, k, sequence):
        return _by_heads(q, k, v, key_mask, lengths, call, settings)
    both = tokens.gathered(_side_by_side(k, v, gradient), lengths, call)
    if key_mask is not None:
        key_mask = tokens.gather(key_mask.to(torch.uint8), lengths, call).bool()
    o = _attend(q, both, k.shape[3], key_mask, ShardLayout(lengths, layout and layout.cu_seqlens), sequence, settings)
    return _Join.apply(o, both)  # type: ignore[return-value]


def _agreed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    layout: ShardLayout | None,
    sequence: SequenceParallel,
    settings: dict,
) -> tuple[Tensor, Tensor, Tensor, dict, Call, bool]:
    """The checked arguments, the call on which the ranks have agreed, and whether backward will come to it."""
    with begin(NAME, sequence, k) as ranks_agree:
        q, k, v, settings = _checked(q, k, v, key_mask, settings)
        if sequence.stream is not None and settings["dropout_p"]:
            raise ValueError(
                f"dropout_p must be 0 in a model that lasp.stream_backward runs, got {settings['dropout_p']}: weights "
                "are never formed for all keys at once"
            )
        told = settings_of(*settings.values(), q.shape[2], key_mask is not None)
        call = call_of(NAME, k, layout, sequence, settings=told)
        gradient = wants_gradient(q, k, v)
        if ranks_agree is not None:
            tensors = {"q": q, "k": k, "v": v, "key_mask": key_mask}
            ranks_agree.settle(lambda: call.fingerprint(tensors, gradient=gradient, **settings))
    return q, k, v, settings, call, gradient


def _side_by_side(k: Tensor, v: Tensor, gradient: bool) -> Tensor:
    """[B, T, H, K + V], for one message."""
    both = torch.cat([k, v], -1)
    if gradient and not both.requires_grad:  # ranks whose keys are trained wait for what this one did with them
        both.requires_grad_()
    return both


def _by_heads(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, lengths: tuple[int, ...], call: Call, settings: dict
) -> Tensor:
    """All tokens of this rank's share of the heads, there and back."""
    shares = tokens.shares_of(q, k, v, call.shard.sequence.size)  # type: ignore[union-attr]
    q, k, v = shares.of_one_rank(tokens.dealt(shares.packed, lengths, call))  # type: ignore[arg-type]
    if key_mask is not None:
        key_mask = tokens.gather(key_mask.to(torch.uint8), lengths, call).bool()
    layout = call.shard.layout
    documents = None if layout is None else layout.cu_seqlens
    o = local.softmax_attention(q, k, v, cu_seqlens=documents, key_mask=key_mask, **settings)
    return tokens.collected(o.flatten(2), lengths, call).reshape(*shares.output)  # type: ignore[union-attr]


@stream.in_eager
def _streamed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ShardLayout | None,
    sequence: SequenceParallel,
    key_mask: Tensor | None,
    settings: dict,
) -> Tensor:
    """On a segment of a sequence (lasp.ops.stream): over the keys and values of earlier ones, which lie on the host of
    the rank whose tokens they are, and come piece by piece."""
    q, k, v, settings, call, gradient = _agreed(q, k, v, key_mask, layout, sequence, settings)
    earlier = stream.earlier(NAME, sequence)
    both = _side_by_side(k, v, gradient)
    real = None if key_mask is None else key_mask.to(torch.uint8)
    earlier.keep(both, *([] if real is None else [real]))
    own = (earlier.segment.layout if layout is None else layout).lengths
    queries = _queries(q.shape[1], k.shape[2], own, sequence.rank, earlier.segment, q, settings)
    return _Streamed.apply(q, both, real, _SegmentCall(earlier, call, own, queries, k.shape[3], settings["window"]))  # type: ignore[return-value]


@stream.in_eager
def _in_session(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ShardLayout | None,
    sequence: SequenceParallel,
    key_mask: Tensor | None,
    settings: dict,
) -> Tensor:
    """The call in a prompt or in a step of one token: over all keys and values so far, which every rank holds."""
    session: Session = sequence.stream
    with begin(NAME, sequence, k) as ranks_agree:
        q, k, v, settings = _checked(q, k, v, None, settings)
        if key_mask is not None or settings["dropout_p"]:
            name, got = ("key_mask", key_mask) if key_mask is not None else ("dropout_p", settings["dropout_p"])
            raise ValueError(
                f"{name} must be left out in a model that {session.name} runs, got {arguments.shown(got)}: padding is "
                "cut from prompts before, and a state is without chance"
            )
        told = settings_of(*settings.values(), q.shape[2], False)
        call = call_of(NAME, k, layout, sequence, settings=told)
        if ranks_agree is not None:
            ranks_agree.settle(lambda: call.fingerprint({"q": q, "k": k, "v": v}, **settings))
    assert session.segment is not None
    lengths = (session.segment.layout if layout is None else layout).lengths
    both = _of_all(torch.cat([k, v], -1), lengths, call, reverse=False)
    key = session.key_of(sequence, NAME)
    seen = session.with_tokens_before(key, both, settings["window"])
    start, end = (seen.before + sum(lengths[:n]) for n in (sequence.rank, sequence.rank + 1))
    k, v = seen.tokens[:, :end].split([k.shape[3], v.shape[3]], 3)
    mask = None if seen.real is None else seen.real[:, :end]
    return local.softmax_attention(q, k, v, start=start, key_mask=mask, **settings)


def _queries(
    count: int, heads: int, lengths: tuple[int, ...], rank: int, segment: stream.Segment, q: Tensor, settings: dict
) -> Queries:
    """Where this rank's queries stand in the whole sequence, and what they see."""
    start = sum(lengths[:rank])
    positions = torch.arange(start, start + count, device="cpu")
    first = torch.full_like(positions, -segment.before)
    if segment.layout.packed:
        offsets = segment.layout.facts[1]
        assert offsets is not None
        opens = offsets[(torch.searchsorted(offsets, positions, right=True) - 1).clamp(max=len(offsets) - 2)]
        first = torch.where(opens > 0, opens, first)
    if settings["window"] is not None:
        first = torch.maximum(first, positions - settings["window"] + 1)
    scale = q.shape[3] ** -0.5 if settings["scale"] is None else settings["scale"]
    groups = q.shape[2] // heads
    return Queries(segment.start + start, first + segment.start, groups, scale, settings["softcap"])


class _SegmentCall(NamedTuple):
    """A call on one segment."""

    earlier: stream.Earlier
    call: Call
    lengths: tuple[int, ...]  # tokens of the ranks in this segment
    queries: Queries
    key_dim: int
    window: int | None

    def pieces(
        self, both: Tensor, real: Tensor | None, *, reverse: bool
    ) -> Iterator[tuple[stream.Segment, tuple[int, ...], Piece]]:
        """The keys and values of all ranks, of earlier segments and at last of this one."""
        segments = self.earlier.visible(None if self.window is None else self.window - 1)
        for segment, following in itertools.zip_longest(segments, segments[1:]):
            with self.earlier.of(segment, following) as found:
                yield segment, segment.layout.real.lengths, self._piece(segment, found, reverse)
        own = (both.detach(),) if real is None else (both.detach(), real)
        yield self.earlier.segment, self.lengths, self._piece(self.earlier.segment, own, reverse)

    def _piece(self, segment: stream.Segment, tensors: tuple[Tensor, ...], reverse: bool) -> Piece:
        lengths = self.lengths if segment is self.earlier.segment else segment.layout.real.lengths
        both, *real = (_of_all(x, lengths, self.call, reverse=reverse) for x in tensors)
        k, v = both.split([self.key_dim, both.shape[3] - self.key_dim], 3)
        return Piece(segment.start, k, v, real[0].bool() if real else None)


def _of_all(x: Tensor, lengths: tuple[int, ...], call: Call, *, reverse: bool) -> Tensor:
    return x if call.sequence is None else tokens.gather_now(x, lengths, call, reverse=reverse)


class _Streamed(torch.autograd.Function):
    """Attention of this rank's queries; its own keys and values get the gradients of all that look at them."""

    @staticmethod
    def forward(ctx, q, both, real, segment_call):
        ctx.segment_call, ctx.dtypes = segment_call, (q.dtype, both.dtype)
        of_o, of_lse = segment_call.call.reception(), segment_call.call.reception()
        o, lse = of_o.result, of_lse.result
        if o is None or lse is None:
            attended = Attended(q, both.shape[3] - segment_call.key_dim, segment_call.queries)
            with no_autocast(q.device.type):
                for _, _, piece in segment_call.pieces(both, real, reverse=False):
                    attended.see(piece)
            o, lse = of_o.keep(attended.output().to(q.dtype)), of_lse.keep(attended.lse)
        ctx.save_for_backward(q, both, real, o.detach(), lse)
        return o.detach()  # a recompute may get the same memory again

    @staticmethod
    @no_second_derivative("lasp.softmax_attention")
    def backward(ctx, do):
        q, both, real, o, lse = ctx.saved_tensors
        segment_call: _SegmentCall = ctx.segment_call
        found = Gradients(q, o, lse, do, segment_call.queries)
        mine = None
        with no_autocast(q.device.type):
            for segment, lengths, piece in segment_call.pieces(both, real, reverse=True):
                mine = torch.cat(found.of(piece), -1)
                if segment_call.call.sequence is not None:
                    mine = tokens.scatter(mine, lengths, segment_call.call)
                if segment is not segment_call.earlier.segment:
                    segment_call.earlier.add_gradient(segment, mine)
        assert mine is not None
        if (behind := segment_call.earlier.own_gradient()) is not None:
            mine = mine + behind
        return found.of_queries().to(ctx.dtypes[0]), mine.to(ctx.dtypes[1]), None, None


def settings_of(*values: object) -> Kind:
    """The settings that must agree on all ranks at every call, and do not show in its messages."""
    return tuple(zip(("window", "scale", "softcap", "dropout_p", "query heads", "key_mask"), values))


def _in_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    key_mask: Tensor | None,
    settings: dict,
) -> Tensor:
    """Where torch.compile looks on: the ranks agree in the custom op that gathers, and packed documents are attended
    to in another, since their number would be a constant of the graph."""
    if isinstance(sequence, SequenceParallel) and sequence.size > 1:
        if layout is None:
            raise ValueError("under torch.compile softmax_attention over several ranks needs layout=")
        told = (*settings.values(), q.shape[2], key_mask is not None)
        facts = (*layout.facts, layout.total, sequence.handle, *told)
        if tokens.by_heads(q, k, sequence):
            return _by_heads_in_graph(q, k, v, key_mask, layout, facts, settings)
        both = torch.ops.lasp.gather_tokens(torch.cat([k, v], -1), *facts)
        k, v = both.split([k.shape[3], v.shape[3]], 3)
        if key_mask is not None:
            key_mask = torch.ops.lasp.gather_tokens(key_mask.to(k.dtype), *facts) > 0
        if not layout.packed:
            return _attend(q, both, q.shape[3], key_mask, layout, sequence, settings)
    if layout is None or not layout.packed:
        Shard.of(k, layout, sequence)
    return _attend_in_graph(q, k, v, key_mask, facts_of(layout, sequence), settings)


def _attend_in_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    facts: tuple[Tensor | None, Tensor | None, Tensor | None],
    settings: dict,
) -> Tensor:
    """The attention of the rank that the `facts` name; see `facts_of`."""
    if facts[1] is None:
        return local.softmax_attention(q, k, v, key_mask=key_mask, **settings)
    if settings["dropout_p"]:
        raise ValueError(
            f"under torch.compile softmax_attention of packed documents takes no dropout, got {settings['dropout_p']}"
        )
    options = settings["window"], settings["scale"], settings["softcap"]
    return torch.ops.lasp.packed_softmax(q, k, v, key_mask, *options, *facts)


def _by_heads_in_graph(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, layout: ShardLayout, facts: tuple, settings: dict
) -> Tensor:
    """As `_by_heads`; `facts` are what the ops take of the layout, the ranks and the settings."""
    (lengths, cu_seqlens), (here, ranks) = facts[:2], (q.shape[1], len(layout.lengths))
    shares = tokens.shares_of(q, k, v, ranks)
    q, k, v = shares.of_one_rank(torch.ops.lasp.deal(shares.packed, *facts))
    if key_mask is not None:
        key_mask = torch.ops.lasp.gather_tokens(key_mask.to(k.dtype), *facts) > 0
    whole = lengths.sum(0, keepdim=True), cu_seqlens, None
    o = _attend_in_graph(q, k, v, key_mask, whole, settings)
    o = torch.ops.lasp.collect(o.flatten(2), here, ranks, lengths, cu_seqlens, *facts[3:])
    return o.reshape(*shares.output)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, layout: ShardLayout, rank: int, settings: dict
) -> Tensor:
    """This rank's queries on keys and values of all ranks."""
    start, end = layout.bounds(rank)
    if q.shape[1] != end - start:
        raise ValueError(f"layout gives rank {rank} {end - start} tokens, but q has {q.shape[1]}")
    key_mask = None if key_mask is None else key_mask[:, :end]
    k, v = k[:, :end], v[:, :end]
    return local.softmax_attention(q, k, v, start=start, cu_seqlens=layout.cu_seqlens, key_mask=key_mask, **settings)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, settings: dict
) -> tuple[Tensor, Tensor, Tensor, dict]:
    """The tensors in one dtype, and the settings in Python's numbers; raises where something does not fit."""
    if not torch.compiler.is_compiling():
        settings = {
            name: x if x is None and name != "dropout_p" else kind(name, x)
            for (name, x), kind in zip(settings.items(), (arguments.integer, *[arguments.number] * 3))
        }
    if all(isinstance(x, Tensor) for x in (q, k, v)):
        q, k, v = autocast(q, k, v)
    local.check_queries_keys_values(q, k, v, 0)
    local.check_options(**settings)
    if key_mask is not None:
        local.check_key_mask(key_mask, k)
    return q, k, v, settings


def _lengths(k: Tensor, call: Call) -> tuple[int, ...]:
    """Tokens of every rank; in a recompute those of the original forward."""
    if call.shard.layout is not None:
        return call.shard.layout.lengths
    reception = call.reception()
    if reception.result is not None:
        return tuple(reception.result.tolist())
    assert call.sequence is not None
    call.check_messages("the numbers of tokens", kind_of_tokens(k), k, reverse=False)
    with recompute.unseen():
        lengths = collectives.lengths_of(
            k, call.sequence, lambda: tokens.name_of(call, "the numbers of tokens", reverse=False)
        )
        reception.keep(torch.tensor(lengths, device="cpu"))
    return lengths


def _attend(
    q: Tensor,
    both: Tensor,
    key_dim: int,
    key_mask: Tensor | None,
    layout: ShardLayout,
    sequence: SequenceParallel,
    settings: dict,
) -> Tensor:
    """This rank's queries on the gathered keys and values [B, T of all ranks, H, K + V] that they may see."""
    start, end = layout.bounds(sequence.rank)
    k, v = both[:, :end, :, :key_dim], both[:, :end, :, key_dim:]
    key_mask = None if key_mask is None else key_mask[:, :end]
    return local.softmax_attention(q, k, v, start=start, cu_seqlens=layout.cu_seqlens, key_mask=key_mask, **settings)


class _Join(torch.autograd.Function):
    """o as it is; but whatever o depends on, backward comes to the gathered keys, for which other ranks wait."""

    @staticmethod
    def forward(ctx, o, gathered):
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do):
        return do, None
