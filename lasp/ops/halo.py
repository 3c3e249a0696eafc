"""`halo`: the last tokens of the ranks before this one, for what looks a few tokens back; and on it `causal_conv` and
`block_attention`.

    rank 0   a b c d e                tokens; W - 1 = 2
    rank 1         (d e) f            its halo in brackets. It holds fewer than W - 1 tokens, so it passes on e f
    rank 2               (e f) g h i

Every rank sends exactly W - 1 tokens to the rank behind it, whatever the ranks hold: its own last ones, or, if it has
too few, what it received with its own behind. So no rank needs to know how many tokens the others hold, and where each
holds W - 1 or more, nobody waits for a rank that waits. Backward goes the same way from the last rank to the first:
what a rank received gets its gradient here, and that of what it passed on.

Where a document begins, the tokens before it are zeros for it. (A zero is what a convolution pads with.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp import arguments, exchange
from lasp.checks.trial import operator
from lasp.exchange import Job, Link, StateMap, Terms
from lasp.exchange.base import Transfer
from lasp.layout import ShardLayout
from lasp.ops import recompute, stream
from lasp.ops.call import (
    Call,
    autocast,
    begin,
    call_of,
    facts_of,
    kind_of_tensor,
    of_own_tokens,
    padding_of,
    wants_gradient,
)
from lasp.ranks import SequenceParallel
from lasp_kernels import blocks, convolution, decode, softmax
from lasp_kernels.once import no_second_derivative

NAME = "halo"


def _zeros_before(x: Tensor, width: int, **_: Any) -> Tensor:
    """What replaces `halo` in a trial of a model (lasp.checks.trial)."""
    return torch.cat([x.new_zeros(x.shape[0], width - 1, *x.shape[2:]), x], 1)


def _the_same(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
    """What replaces `causal_conv` in a trial of a model: each token sees only itself."""
    return x


def _of_own_tokens(q: Tensor, k: Tensor, v: Tensor, block: int, **_: Any) -> Tensor:
    """What replaces `block_attention` in a trial of a model: each token sees only itself."""
    return of_own_tokens(q, k, v, q.shape[2])


@operator(_zeros_before)
def halo(
    x: Tensor, width: int, *, layout: ShardLayout | None = None, sequence: SequenceParallel | None = None
) -> Tensor:
    """x with the `width` - 1 tokens before it: [B, width - 1 + T, ...] of x [B, T, ...], in its dtype.

    Args:
        x: this rank's tokens; T may differ between ranks, down to zero.
        width: how many tokens a token sees, itself included: the kernel size W of a causal convolution, 2 for a shift.
        layout: how tokens lie on the ranks; needed for packed documents (then B = 1). What belongs to a document before
            that of this rank's first token is zero.
        sequence: the ranks; None is one rank, before which there are zeros. All of them must call it.

    Returns:
        [B, width - 1 + T, ...], in x's dtype. Its gradient goes to the rank whose token it was.

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication.
        RankMismatchError, PeerError: as `lasp.linear_attention`.
    """
    padding = padding_of(x, layout, sequence)
    if padding is not None:
        return padding.fill(halo(padding.cut(x), width, layout=padding.layout, sequence=sequence))
    check_arguments = functools.partial(check, x, width)
    if stream.under_way(sequence):
        return _streamed(x, width, layout, sequence, check_arguments).tokens
    if torch.compiler.is_compiling():
        return _in_graph(x, width, layout, sequence, check_arguments)
    return _bring(x, width, layout, sequence, check_arguments).tokens


def _in_graph(
    x: Tensor,
    width: int,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    check_arguments: Callable[[], None],
) -> Tensor:
    """Where torch.compile looks on. It must not see the offsets of documents: how many there are would be a constant
    of the graph."""
    check_arguments()
    return torch.ops.lasp.halo(x, width, *facts_of(layout, sequence))


class Brought(NamedTuple):
    """A rank's tokens, with those before them in front."""

    tokens: Tensor
    runs: tuple[int, ...] | None  # borders of packed documents among this rank's tokens
    before: int | None  # tokens of the document of the first token that lie before it; None: no layout tells


def _bring(
    x: Tensor,
    width: int,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    check_arguments: Callable[[], None],
    **compared: object,
) -> Brought:
    """x with the tokens before it. `compared`: what else must be the same on all ranks."""
    call = _checked_call(x, width, layout, sequence, check_arguments, **compared)
    y = _Halo.apply(x, int(width), call, None)[0]  # type: ignore[index]
    return Brought(y, call.shard.runs.cu_seqlens, call.shard.tokens_before)


@stream.in_eager
def _streamed(
    x: Tensor,
    width: int,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    check_arguments: Callable[[], None],
    **compared: object,
) -> Brought:
    """x on one segment of a sequence: the last tokens of the segment before stand before the first rank's."""
    if width != 1 and (last := stream.held(NAME, sequence)) is not None:
        return Brought(_one_token(x, last), None, None)
    call = _checked_call(x, width, layout, sequence, check_arguments, **compared)
    if int(width) == 1:  # the token itself
        return Brought(x, call.shard.runs.cu_seqlens, 0)
    crossing = stream.crossing(NAME, sequence)
    assert crossing is not None
    entering = crossing.enter(None, x)
    border = SegmentBorder(entering is not None, crossing.segment.before, crossing.leaves)
    y, tail = _Halo.apply(x, int(width), call, border, entering)  # type: ignore[misc]
    return Brought(crossing.leave(y, tail), call.shard.runs.cu_seqlens, _before(call, border))


def _one_token(x: Tensor, last: Tensor) -> Tensor:
    """x [B, 1, ...] behind the last tokens, among which it then is."""
    y = torch.cat([last, x.to(last.dtype)], 1)
    last.copy_(y[:, 1:])
    return y.to(x.dtype)


@stream.in_eager
def _streamed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    width: int,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    check_arguments: Callable[[], None],
) -> Tensor:
    if width != 1 and (last := stream.held(NAME, sequence)) is not None:
        return decode.convolution_step(x.squeeze(1), weight, bias, last).unsqueeze(1)
    brought = _streamed(x, width, layout, sequence, check_arguments)
    return convolution.causal_conv(brought.tokens, weight, bias, cu_seqlens=brought.runs)


def _checked_call(
    x: Tensor,
    width: int,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    check_arguments: Callable[[], None],
    **compared: object,
) -> Call:
    with begin(NAME, sequence, x) as ranks_agree:
        check_arguments()
        call = call_of(NAME, x, layout, sequence, name="x")
        if ranks_agree is not None:
            gradient = wants_gradient(x)
            ranks_agree.settle(lambda: call.fingerprint({"x": x}, width=int(width), gradient=gradient, **compared))
    return call


class SegmentBorder(NamedTuple):
    """What a segment of a streamed sequence has before its first token."""

    enters: bool  # whether something does: [B, width - 1, ...], on every rank
    before: int  # how many tokens of the document of the first token lie there
    leaves: bool  # whether the last tokens are wanted, for the segment behind


@operator(_the_same)
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
) -> Tensor:
    """A short causal convolution of each channel, over a sequence that may be split over ranks.

    y_t = bias + sum_j weight[:, j] x_{t - W + 1 + j}: the last tap meets the token itself, as in an `nn.Conv1d` of one
    group a channel with `padding=W - 1`, cut to T (its weight is [C, 1, W]). It starts anew at each packed document.

    Args:
        x: [B, T, C], this rank's tokens; T may differ between ranks, down to zero.
        weight: [C, W].
        bias: [C] or None.
        layout: how tokens lie on the ranks; needed for packed documents (then B = 1).
        sequence: the ranks; None is one rank. All of them must call it.

    Returns:
        y [B, T, C] in the dtype of x.

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication.
        RankMismatchError, PeerError: as `lasp.linear_attention`.
    """
    padding = padding_of(x, layout, sequence)
    if padding is not None:
        y = causal_conv(padding.cut(x), weight, bias, layout=padding.layout, sequence=sequence)
        return padding.fill(y)
    check_arguments = functools.partial(convolution.check_weight, x, weight, bias)
    width = weight.shape[1] if isinstance(weight, Tensor) and weight.ndim == 2 else 1  # which is an error
    if stream.under_way(sequence):
        return _streamed_conv(x, weight, bias, width, layout, sequence, check_arguments)
    if torch.compiler.is_compiling():
        with_before = _in_graph(x, width, layout, sequence, check_arguments)
        if layout is not None and layout.packed:
            return torch.ops.lasp.packed_conv(with_before, weight, bias, *facts_of(layout, sequence))
        return convolution.causal_conv(with_before, weight, bias)
    brought = _bring(x, width, layout, sequence, check_arguments)
    return convolution.causal_conv(brought.tokens, weight, bias, cu_seqlens=brought.runs)


@operator(_of_own_tokens)
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    *,
    scale: float | None = None,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
) -> Tensor:
    """Causal softmax attention within blocks of `block` tokens, over a sequence that may be split over ranks.

    A token sees itself and the tokens before it in its block, and nothing of another. (DiagAttention of TransNormer,
    arXiv 2210.10340, section 4; elsewhere local, block-wise or chunked attention.) Blocks are counted from the first
    token of the whole sequence, wherever ranks begin; in packed documents from the first token of each, so that a
    document gets what it would get alone. What crosses ranks are the keys and values of `block` - 1 tokens.

    Args:
        q: [B, T, H*G, K], this rank's tokens; G query heads share a head of k and v.
        k: [B, T, H, K].
        v: [B, T, H, V]. q, k and v have one float dtype. T may differ between ranks, down to zero.
        block: tokens of a block.
        scale: of the scores; None is K^-0.5.
        layout: how tokens lie on the ranks, which tells where blocks begin: needed over several ranks, and for packed
            documents (then B = 1).
        sequence: the ranks; None is one rank. All of them must call it.

    Returns:
        o [B, T, H*G, V] in the dtype of q.

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication.
        RankMismatchError, PeerError: as `lasp.linear_attention`.
    """
    padding = padding_of(k, layout, sequence)
    if padding is not None:
        q, k, v = (padding.cut(x) for x in (q, k, v))
        return padding.fill(block_attention(q, k, v, block, scale=scale, layout=padding.layout, sequence=sequence))
    if all(isinstance(x, Tensor) for x in (q, k, v)):
        q, k, v = autocast(q, k, v)
    check_arguments = functools.partial(_check_blocks, q, k, v, block, scale, layout, sequence)
    both = _side_by_side(k, v)
    if stream.under_way(sequence):
        return _streamed_blocks(q, both, block, scale, layout, sequence, check_arguments)
    if not torch.compiler.is_compiling():
        brought = _bring(both, block, layout, sequence, check_arguments, scale=scale)
        return attend_in_blocks(q, brought, block, scale)
    with_before = _in_graph(both, block, layout, sequence, check_arguments)
    if layout is not None and layout.packed:
        return torch.ops.lasp.packed_blocks(q, with_before, block, scale, *facts_of(layout, sequence))
    before = 0 if layout is None or sequence is None else layout.bounds(sequence.rank)[0]
    return attend_in_blocks(q, Brought(with_before, None, before), block, scale)


def _side_by_side(k: Tensor, v: Tensor) -> Tensor:
    """Both, for one message. Of what does not fit together k alone: a check comes next, of which all ranks hear."""
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)) or k.ndim != 4 or k.shape[:3] != v.shape[:3]:
        return k
    fits = v.ndim == 4 and k.device == v.device and k.layout == v.layout == torch.strided
    return torch.cat([k, v], 3) if fits else k


def _check_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    scale: float | None,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
) -> None:
    arguments.integer("block", block, at_least=1)
    if scale is not None:
        arguments.number("scale", scale)
    blocks.check(q, k, v)
    if layout is None and isinstance(sequence, SequenceParallel) and sequence.size > 1:
        raise ValueError(
            "layout must tell how tokens lie on the ranks (lasp.shard_batch makes it), since blocks are counted from "
            "the beginning of the sequence; got None"
        )


@stream.in_eager
def _streamed_blocks(
    q: Tensor,
    both: Tensor,
    block: int,
    scale: float | None,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    check_arguments: Callable[[], None],
) -> Tensor:
    if block != 1 and (last := stream.held(NAME, sequence)) is not None:
        return _in_block(q, _one_token(both, last), sequence.stream.positions, scale)  # type: ignore[union-attr]
    brought = _streamed(both, block, layout, sequence, check_arguments, scale=scale)
    return attend_in_blocks(q, brought, block, scale)


def _in_block(q: Tensor, keys_and_values: Tensor, positions: Tensor, scale: float | None) -> Tensor:
    """The attention of one token a row [B, 1, H, K] at these positions, over the tokens before it in its own block."""
    block = keys_and_values.shape[1]
    k, v = keys_and_values.split([q.shape[3], keys_and_values.shape[3] - q.shape[3]], 3)
    places = torch.arange(block, device=q.device)
    seen = places >= (block - 1 - positions % block)[:, None]
    return softmax.softmax_attention(q, k, v, start=block - 1, key_mask=seen, scale=scale)


def attend_in_blocks(q: Tensor, keys_and_values: Brought, block: int, scale: float | None) -> Tensor:
    """The arithmetic of `block_attention`, on one device; keys and values stand side by side."""
    both, runs, before = keys_and_values
    assert before is not None  # there is a layout
    k, v = both.split([q.shape[3], both.shape[3] - q.shape[3]], 3)
    return blocks.block_attention(q, k, v, int(block), before=before, cu_seqlens=runs, scale=scale)


def check(x: Tensor, width: int) -> None:
    """Raise `TypeError` or `ValueError` unless they are what `halo` takes."""
    arguments.float_tensor("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape [B, T, ...], got {tuple(x.shape)}")
    if arguments.integer("width", width) < 1:
        raise ValueError(f"width must be at least 1, the token itself, got {width}")


def with_halo(
    x: Tensor, width: int, call: Call, border: SegmentBorder | None = None, entering: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Forward of `halo`; and for a segment of a stream its last width - 1 tokens, on every rank."""
    reach = width - 1
    before = x.new_zeros(x.shape[0], reach, *x.shape[2:])
    leaving = None
    if before.numel() and (call.sequence is not None or border is not None):
        received = _received(x, reach, call, entering)
        if border is not None and border.leaves:
            leaving = recompute.once(call.key, lambda: _leaving(x, received, call))
        seen = _seen(call, reach, border)
        before[:, reach - seen :] = received[:, reach - seen :]
    elif border is not None and border.leaves:
        leaving = before.clone()
    return torch.cat([before, x], 1), leaving


def _leaving(x: Tensor, received: Tensor, call: Call) -> Tensor:
    """What the last rank would pass on, on every rank."""
    last = _tail(x, received.shape[1]).after(received)
    if call.sequence is None:
        return last
    return call.sum_over_ranks(last if call.sequence.next_rank is None else torch.zeros_like(last))


def without_halo(
    dy: Tensor, width: int, call: Call, border: SegmentBorder | None = None, d_leaving: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Backward of `halo`: from the gradients of its results that of x, and of a border's tokens."""
    reach = width - 1
    dx = dy[:, reach:].clone(memory_format=torch.contiguous_format)
    if not dy[:, :reach].numel() or (call.sequence is None and border is None):
        return dx, dy[:, :reach] if border is not None else None
    own = min(reach, dx.shape[1])
    d_before = dy[:, :reach].clone(memory_format=torch.contiguous_format)
    d_before[:, : reach - _seen(call, reach, border)] = 0.0  # zeros of a document that begins here
    if border is not None and border.leaves:
        d_leaving = torch.zeros_like(d_before) if d_leaving is None else d_leaving.clone()
        d_leaving = call.sum_over_ranks(d_leaving, reverse=True)
    tail = _Tail(d_before, own, reverse=True)
    arrived = d_leaving if call.sequence is None else _travel(tail, call, d_leaving, reverse=True)
    if arrived is None:
        arrived = torch.zeros_like(d_before)
    dx[:, dx.shape[1] - own :] += arrived[:, reach - own :]
    if border is None or not border.enters:
        return dx, None
    first = call.sequence is None or call.sequence.prev_rank is None
    return dx, tail.after(arrived) if first else torch.zeros_like(d_before)


def _before(call: Call, border: SegmentBorder | None) -> int | None:
    """How many tokens of the document of this rank's first token lie before it; None where no layout tells."""
    known = call.shard.tokens_before
    if known is None or border is None:
        return known
    in_segment = call.shard.layout is not None and call.shard.first_token != known
    return known if in_segment else known + border.before  # that document did not begin in this segment


def _seen(call: Call, reach: int, border: SegmentBorder | None) -> int:
    """How many of the `reach` tokens before this rank belong to the document of its first token."""
    known = _before(call, border)
    return reach if known is None else min(reach, known)


def _tail(x: Tensor, reach: int) -> _Tail:
    own = min(reach, x.shape[1])
    tokens = torch.cat([x.new_zeros(x.shape[0], reach - own, *x.shape[2:]), x[:, x.shape[1] - own :]], 1)
    return _Tail(tokens, own, reverse=False)


def _received(x: Tensor, reach: int, call: Call, entering: Tensor | None) -> Tensor:
    """What the rank before passes on; on the first rank what enters the segment, or zeros. In a recompute nothing is
    sent."""
    if call.sequence is None:
        return x.new_zeros(x.shape[0], reach, *x.shape[2:]) if entering is None else entering
    reception = call.reception()
    if reception.result is not None:
        return reception.result
    return reception.keep(_travel(_tail(x, reach), call, entering, reverse=False))


class _Tail:
    """What a rank passes on, in `Job`'s place of its maps: reach tokens, of which the `own` last are this rank's.

    Forward, what was received moves up before the own tokens. Backward, `tokens` are the gradients of what was
    received; those of what was passed on of it are added.
    """

    def __init__(self, tokens: Tensor, own: int, *, reverse: bool):
        self.tokens, self.own, self.reverse = tokens, own, reverse

    @property
    def complete(self) -> bool:
        """Whether nothing that is received is passed on."""
        return self.own == self.tokens.shape[1]

    def after(self, received: Tensor) -> Tensor:
        """What is sent once the message of the rank before (reversed: behind) is there."""
        kept = self.tokens.shape[1] - self.own
        sent = self.tokens.clone()
        if self.reverse:
            sent[:, self.own :] += received[:, :kept]
        else:
            sent[:, :kept] = received[:, self.own :]
        return sent


def _travel(tail: _Tail, call: Call, entering: Tensor | None, *, reverse: bool) -> Tensor:
    """Send it to the rank behind (reversed: before) and return what came from the other side.

    Where no rank is on that side, it is what is `entering`; None is zeros.
    """
    sequence, traffic = call.sequence, call.traffic
    assert sequence is not None
    call.check_messages("the tokens before a shard", kind_of_tensor(tail.tokens), tail.tokens, reverse=reverse)
    exchange.count_exchange(sequence, traffic, reverse=reverse)
    if not sequence.peers.connected:
        exchange.connect(sequence, tail.tokens)
    traffic.schedule, traffic.kernels, traffic.decay = "neighbour", "torch", "none"
    state = StateMap(tail.tokens)  # in whose place the tokens are; nothing is folded
    job = Job(state, sequence, traffic, lambda *_: tail.tokens, 1, True, Terms(reverse), "the tokens before a shard")
    link = Link(job)
    return exchange.queue(_pass_on(tail, link, entering), [link], [tail.tokens], beside=False).wait()


def _pass_on(tail: _Tail, link: Link, entering: Tensor | None) -> Transfer:
    """NCCL runs the messages of a rank one after the other, so every other rank begins with its receipt."""
    incoming, sends_first = None, tail.complete and link.sequence.rank % 2 == 0
    if sends_first and link.target is not None:
        link.send(tail.tokens)
    if link.source is not None:
        incoming = link.receive(tail.tokens.shape, tail.tokens)
    if tail.complete and not sends_first and link.target is not None:
        link.send(tail.tokens)
    yield
    entering = torch.zeros_like(tail.tokens) if entering is None else entering
    received = entering if incoming is None else incoming()
    if not tail.complete and link.target is not None:
        link.send(tail.after(received))
    return received


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, width, call, border, entering=None):
        ctx.width, ctx.call, ctx.border = width, call, border
        with recompute.unseen():
            return with_halo(x, width, call, border, entering)

    @staticmethod
    @no_second_derivative("lasp.halo")
    def backward(ctx, dy, d_leaving):
        dx, d_entering = without_halo(dy, ctx.width, ctx.call, ctx.border, d_leaving)
        return dx, None, None, None, d_entering
