"""Ways to split the sequence of one model's training step over ranks, each a `Training` of scaling.py.

The model is TNL without rotation; where a method is for softmax attention, that stands in place of the linear one.
Weights, gradients and moments lie in W parts on W ranks with each of them: by FSDP2, or by tensor parallelism.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peers.ring_softmax import RingSoftmax, flash, ring
from peers.ulysses import Ulysses, by_heads
from scaling import Layout, Training
from torch import Tensor, nn

import lasp
from lasp.models.tnl import GatedLinearAttention, SimpleGLU
from lasp.modules import LightningAttention
from lasp.ranks.collectives import scatter_sum_flat

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, T, H, K] to o [B, T, H, V]


@dataclass(frozen=True)
class Method:
    """One of them.

    Args:
        name: in tables.
        what: one line, likewise.
        exchange: of `lasp.parallelize`; None where that has no part in it.
        tensor_parallel: each rank has all tokens of some heads within a layer, and some tokens between layers.
        softmax: it is one for softmax attention.
        two_parts: a rank has a part from the front of the sequence and one from its back.
        attend: what stands in place of the attention of a layer; None leaves it.
    """

    name: str
    what: str
    exchange: str | None = None
    tensor_parallel: bool = False
    softmax: bool = False
    two_parts: bool = False
    attend: Callable[[LightningAttention, lasp.SequenceParallel], Attend] | None = None

    def layout(self, ranks: int) -> Layout:
        return Layout(1, 1, ranks) if self.tensor_parallel else Layout(1, ranks)


class Split(Training):
    """Training steps by a method, on so many ranks; on one rank the same model by no method at all."""

    def __init__(self, options: argparse.Namespace, method: Method, ranks: int, device: torch.device):
        super().__init__(options, method.layout(ranks), device, method.exchange)
        self.method, self.sequence = method, lasp.SequenceParallel(self.mesh["sp"])
        for layer in self.model.modules():
            if isinstance(layer, GatedLinearAttention):
                if ranks == 1 and method.softmax:
                    layer.attention = _Attention(flash)  # type: ignore[assignment]
                elif ranks > 1 and method.attend is not None:
                    layer.attention = _Attention(method.attend(layer.attention, self.sequence))  # type: ignore[assignment]
        if ranks > 1 and method.tensor_parallel:
            _split_tokens_between_layers(self.model)

    def batch(self, tokens: int) -> dict[str, Tensor]:
        """Of so many tokens a rank."""
        if self.method.tensor_parallel:  # whose ranks are told the whole sequence
            return super().batch(tokens * self.layout.tp)
        if self.method.exchange is not None or self.layout.sp == 1:
            return super().batch(tokens)
        # Not cut by lasp, which would ask why lasp has not split the model.
        whole = lasp.shard_batch({"input_ids": self.ids(tokens * self.layout.sp)}, None)
        peer = RingSoftmax() if self.method.two_parts else Ulysses()
        return {name: peer.shard(whole[name], self.sequence) for name in ("input_ids", "labels", "position_ids")}


class _Attention(nn.Module):
    """In place of a `LightningAttention`."""

    overlaps = False

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, layout: Any = None) -> Tensor:
        return self.attend(q, k, v)


def _linear_by_heads(attention: LightningAttention, sequence: lasp.SequenceParallel) -> Attend:
    heads = attention._fixed.shape[0] // sequence.size  # type: ignore[union-attr]
    attention.keep_heads(sequence.rank * heads, heads)
    return lambda q, k, v: by_heads(q, k, v, attention, sequence)


def _softmax_by_heads(_: LightningAttention, sequence: lasp.SequenceParallel) -> Attend:
    return lambda q, k, v: by_heads(q, k, v, flash, sequence)


def _ring(_: LightningAttention, sequence: lasp.SequenceParallel) -> Attend:
    return lambda q, k, v: ring(q, k, v, sequence)


METHODS = (
    Method("lasp", "linear attention, states exchanged (this project)", exchange="auto"),
    Method("ulysses", "linear attention, all-to-all of heads, our kernels", attend=_linear_by_heads),
    Method("megatron", "linear attention, our kernels; tokens gathered before each layer", tensor_parallel=True),
    Method("ulysses_softmax", "softmax, all-to-all of heads, flash kernel", softmax=True, attend=_softmax_by_heads),
    Method(
        "ring_softmax", "softmax, keys and values round a ring, flash kernel",
        softmax=True, two_parts=True, attend=_ring,
    ),
)  # fmt: skip


# ---- Megatron's sequence parallelism: tensor parallelism whose sums are scattered over the tokens


def _split_tokens_between_layers(model: Any) -> None:
    """In place, of a model that `lasp.tensor_parallel` has split: each rank has its tokens between the layers.

    The tokens are gathered before a layer's first products, and its outputs are summed and scattered behind the last,
    where tensor parallelism alone sums them on all ranks. Every norm is computed of gathered tokens: it has no weights.
    Embedding and head are cut as by tensor parallelism, and read all tokens.
    """
    for layer in model.modules():
        if isinstance(layer, GatedLinearAttention | SimpleGLU):
            layer.parts = layer.out.parts = tokens = _Tokens(layer.parts)  # type: ignore[assignment]
    run = model.run
    model.run = lambda x, position_ids, layout: run(tokens.cut(x), position_ids, layout)
    model.norm = nn.Sequential(model.norm, _Gathered(tokens))


class _Tokens:
    """The `Parts` of lasp.models, of a layer around which each rank has some of the tokens, in order."""

    def __init__(self, ranks: Any):
        self.ranks, self.number, self.rank, self.total = ranks, ranks.number, ranks.rank, ranks.total

    def enter(self, x: Tensor) -> Tensor:
        return _Moved.apply(x, self.gather, self.scatter)  # type: ignore[return-value]

    def leave(self, x: Tensor) -> Tensor:
        return _Moved.apply(x, self.scatter, self.gather)  # type: ignore[return-value]

    def cut(self, x: Tensor) -> Tensor:
        """Of what is the same on all ranks."""
        return _Moved.apply(x, self.own, self.gather)  # type: ignore[return-value]

    def whole(self, x: Tensor) -> Tensor:
        """For what gives every rank the same gradient."""
        return _Moved.apply(x, self.gather, self.own)  # type: ignore[return-value]

    def gather(self, x: Tensor) -> Tensor:
        """x [1, T, D] of all ranks, one behind the other."""
        return self.ranks.of_each(x).view(1, -1, x.shape[-1])

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's tokens of the sum over ranks of x [1, T of all, D]."""
        _, tokens, width = x.shape
        mine = x.new_empty(tokens // self.number, width)
        scatter_sum_flat(mine, x.contiguous().view(tokens, width), group=self.ranks.group)
        return mine.unsqueeze(0)

    def own(self, x: Tensor) -> Tensor:
        """This rank's tokens of x [1, T of all, D]."""
        return x.chunk(self.number, 1)[self.rank].clone()


class _Gathered(nn.Module):
    """Before the head, whose own backward sums over the ranks."""

    def __init__(self, tokens: _Tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens.whole(x)


class _Moved(torch.autograd.Function):
    """There in forward, and the gradient back in backward."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient), None, None
