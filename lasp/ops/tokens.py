"""Exchanges whose messages are the tokens themselves, for `softmax_attention`: all of them of a share of the heads
(`deal`, and `collect` back), or all of K and V (`gather`, and `scatter` for their gradients)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp import exchange
from lasp.ops import recompute
from lasp.ops.call import Call, kind_of_tokens
from lasp.ranks import SequenceParallel, collectives
from lasp_kernels.once import no_second_derivative


@dataclass(frozen=True)
class Shares:
    """q, k and v of this rank's tokens with heads in as many shares as there are ranks.

    Args:
        packed: [B, T, ranks, n], the n numbers of a token that a rank gets.
        query_dims, key_dims, value_dims: heads of a share, and their size.
    """

    packed: Tensor
    query_dims: tuple[int, int]
    key_dims: tuple[int, int]
    value_dims: tuple[int, int]

    @property
    def output(self) -> tuple[int, int, int, int]:
        """The shape [B, T, heads, V] of this rank's output."""
        B, T, ranks, _ = self.packed.shape
        return B, T, ranks * self.query_dims[0], self.value_dims[1]

    def of_one_rank(self, packed: Tensor) -> list[Tensor]:
        """q, k and v of one share, from [B, T, n]."""
        dims = self.query_dims, self.key_dims, self.value_dims
        return [x.unflatten(2, d) for x, d in zip(packed.split([math.prod(d) for d in dims], 2), dims)]


def by_heads(q: Tensor, k: Tensor, sequence: SequenceParallel) -> bool:
    """Whether each rank gets a share of the heads: whole heads of k and v, or one that it shares with others."""
    heads, ranks = k.shape[2], sequence.size
    return sequence.softmax == "auto" and q.shape[2] % ranks == 0 and (heads % ranks == 0 or ranks % heads == 0)


def shares_of(q: Tensor, k: Tensor, v: Tensor, ranks: int) -> Shares:
    """The shares of q [B, T, H*G, K], k [B, T, H, K] and v [B, T, H, V]."""
    if k.shape[2] < ranks:
        k, v = (x.repeat_interleave(ranks // x.shape[2], 2) for x in (k, v))
    parts = [x.unflatten(2, (ranks, x.shape[2] // ranks)) for x in (q, k, v)]
    dims = [(x.shape[3], x.shape[4]) for x in parts]
    return Shares(torch.cat([x.flatten(3) for x in parts], 3), *dims)


def name_of(call: Call, thing: str, *, reverse: bool) -> str:
    """What ranks wait for, in errors."""
    assert call.sequence is not None
    direction = "backward" if reverse else "forward"
    return f"layer {call.sequence.name!r}, {direction}: the exchange of {thing} with the other ranks"


def gather(x: Tensor, lengths: tuple[int, ...], call: Call) -> Tensor:
    """[B, T of all ranks, ...]; in a recompute what the original forward received."""
    reception = call.reception()
    if reception.result is not None:
        return reception.result
    with recompute.unseen():
        return reception.keep(gather_now(x, lengths, call, reverse=False))


def gather_now(x: Tensor, lengths: tuple[int, ...], call: Call, *, reverse: bool) -> Tensor:
    """[B, T of all ranks, ...], of which nothing is kept for a recompute."""
    sequence, traffic = call.sequence, call.traffic
    assert sequence is not None
    call.check_messages("keys and values", kind_of_tokens(x, lengths), x, reverse=reverse)
    exchange.count_exchange(sequence, traffic, reverse=reverse)
    found = collectives.gather_tokens(x, lengths, sequence, lambda: name_of(call, "keys and values", reverse=reverse))
    _count(x, x.element_size(), lengths, call)
    return found


def scatter(dx: Tensor, lengths: tuple[int, ...], call: Call) -> Tensor:
    """This rank's slice of the sum over ranks."""
    sequence, traffic = call.sequence, call.traffic
    assert sequence is not None
    what = "the gradients of keys and values"
    call.check_messages(what, kind_of_tokens(dx, lengths), dx, reverse=True)
    exchange.count_exchange(sequence, traffic, reverse=True)
    found = collectives.scatter_tokens(dx, lengths, sequence, lambda: name_of(call, what, reverse=True))
    _count(found, max(4, found.element_size()), lengths, call)  # 16-bit numbers are summed in fp32
    return found


def deal(x: Tensor, lengths: tuple[int, ...], call: Call, *, reverse: bool = False) -> Tensor:
    """This rank's share of all tokens, [B, T of all ranks, n], from x [B, T, ranks, n].

    In a recompute (as all of these) what the original forward received; `reverse` is in backward.
    """
    sent = x.numel() - x.numel() // x.shape[2]
    return _moved("tokens of the other heads", collectives.tokens_to_heads, x, sent, lengths, call, reverse=reverse)


def collect(x: Tensor, lengths: tuple[int, ...], call: Call, *, reverse: bool = False) -> Tensor:
    """This rank's tokens of all shares, [B, T, ranks, n], from x [B, T of all ranks, n]."""
    assert call.sequence is not None
    sent = x.numel() - x.shape[0] * lengths[call.sequence.rank] * x.shape[2]
    return _moved("the other ranks' tokens", collectives.heads_to_tokens, x, sent, lengths, call, reverse=reverse)


def _moved(
    thing: str,
    move: Callable[..., Tensor],
    x: Tensor,
    sent: int,
    lengths: tuple[int, ...],
    call: Call,
    *,
    reverse: bool,
) -> Tensor:
    reception = None if reverse else call.reception()
    if reception is not None and reception.result is not None:
        return reception.result
    sequence, traffic = call.sequence, call.traffic
    assert sequence is not None
    thing = f"the gradients of {thing}" if reverse else thing
    call.check_messages(thing, kind_of_tokens(x, lengths), x, reverse=reverse)
    exchange.count_exchange(sequence, traffic, reverse=reverse)
    with recompute.unseen():
        found = move(x, lengths, sequence, lambda: name_of(call, thing, reverse=reverse))
    traffic.schedule, traffic.kernels, traffic.decay = "all_to_all", "SDPA", "none"
    traffic.messages += 1
    traffic.bytes_sent += sent * x.element_size()
    return found if reception is None else reception.keep(found)


def _count(mine: Tensor, itemsize: int, lengths: tuple[int, ...], call: Call) -> None:
    """What a rank sends or passes on: as many slices as there are other ranks, each padded to the longest."""
    traffic, numbers_of_token = call.traffic, mine.shape[0] * math.prod(mine.shape[2:])
    traffic.schedule, traffic.kernels, traffic.decay = "all_gather", "SDPA", "none"
    traffic.messages += 1
    traffic.bytes_sent += (len(lengths) - 1) * max(lengths) * numbers_of_token * itemsize


class _Gather(torch.autograd.Function):
    """`gather`, with `scatter` for its gradient."""

    @staticmethod
    def forward(ctx, x, lengths, call):
        ctx.lengths, ctx.call = lengths, call
        return gather(x, lengths, call).detach()  # a recompute may get the same memory again

    @staticmethod
    @no_second_derivative("lasp.softmax_attention")
    def backward(ctx, dx):
        return scatter(dx, ctx.lengths, ctx.call), None, None


class _Move(torch.autograd.Function):
    """`deal`, with `collect` for its gradient, or the other way round."""

    @staticmethod
    def forward(ctx, x, lengths, call, move, back):
        ctx.lengths, ctx.call, ctx.back = lengths, call, back
        return move(x, lengths, call).detach()

    @staticmethod
    @no_second_derivative("lasp.softmax_attention")
    def backward(ctx, dx):
        return ctx.back(dx, ctx.lengths, ctx.call, reverse=True), *[None] * 4


# The same for autograd, of (x, lengths, call).
gathered = _Gather.apply


def dealt(x: Tensor, lengths: tuple[int, ...], call: Call) -> Tensor:
    """`deal` for autograd."""
    return _Move.apply(x, lengths, call, deal, collect)  # type: ignore[return-value]


def collected(x: Tensor, lengths: tuple[int, ...], call: Call) -> Tensor:
    """`collect` for autograd."""
    return _Move.apply(x, lengths, call, collect, deal)  # type: ignore[return-value]
