"""All-to-all over heads, as DeepSpeed-Ulysses (arXiv 2309.14509) splits softmax attention, around our kernels.

Before attention every rank gives away tokens of all heads but its own and gets all tokens of its heads; afterwards the
other way round. The message grows with the tokens, and there can be no more ranks than heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import lasp
from peers.base import Attention, Contiguous, Inputs, Shape
from peers.ours import Lasp, fixed_decay


class Ulysses(Contiguous):
    name = "ulysses"
    what = "linear attention, all-to-all over heads (our kernels)"

    def unavailable(self, shape: Shape, sequence: lasp.SequenceParallel) -> str | None:
        if shape.heads % sequence.size:
            return f"{shape.heads} heads cannot be dealt out to {sequence.size} ranks"
        return None

    def attention(self, shape: Shape, sequence: lasp.SequenceParallel) -> Attention:
        slopes = fixed_decay(shape.heads, torch.device("cpu")).chunk(sequence.size)[sequence.rank]
        log_decay = lasp.decay.fixed(slopes, shape.device)

        def of_own_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return lasp.linear_attention(q, k, v, log_decay=log_decay)[0]

        return lambda x: by_heads(x.q, x.k, x.v, of_own_heads, sequence)

    def one_process(self, inputs: Inputs) -> Tensor:
        return Lasp().one_process(inputs)


def by_heads(
    q: Tensor, k: Tensor, v: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor], sequence: lasp.SequenceParallel
) -> Tensor:
    """o [B, T, H, D] of this rank's tokens, where `attend` is given the whole sequence of this rank's H / W heads."""
    q, k, v = _ToHeads.apply(torch.stack([q, k, v]), sequence).unbind()  # type: ignore[union-attr]
    return _ToTokens.apply(attend(q, k, v).unsqueeze(0), sequence).squeeze(0)  # type: ignore[union-attr]


class _ToHeads(torch.autograd.Function):
    """[n, B, T, H, D] of this rank's tokens to [n, B, W * T, H / W, D]."""

    @staticmethod
    def forward(ctx, x, sequence):
        ctx.sequence = sequence
        return _tokens_to_heads(x, sequence)

    @staticmethod
    def backward(ctx, dx):
        return _heads_to_tokens(dx, ctx.sequence), None


class _ToTokens(torch.autograd.Function):
    """The inverse of `_ToHeads`."""

    @staticmethod
    def forward(ctx, x, sequence):
        ctx.sequence = sequence
        return _heads_to_tokens(x, sequence)

    @staticmethod
    def backward(ctx, dx):
        return _tokens_to_heads(dx, ctx.sequence), None


def _tokens_to_heads(x: Tensor, sequence: lasp.SequenceParallel) -> Tensor:
    n, B, T, H, D = x.shape
    W = sequence.size
    sent = x.view(n, B, T, W, H // W, D).permute(3, 0, 1, 2, 4, 5).contiguous()
    got = torch.empty_like(sent)  # [W: from whom, n, B, T, H / W, D]
    dist.all_to_all_single(got, sent, group=sequence.group)
    return got.permute(1, 2, 0, 3, 4, 5).reshape(n, B, W * T, H // W, D)


def _heads_to_tokens(x: Tensor, sequence: lasp.SequenceParallel) -> Tensor:
    n, B, WT, h, D = x.shape
    W = sequence.size
    sent = x.reshape(n, B, W, WT // W, h, D).permute(2, 0, 1, 3, 4, 5).contiguous()
    got = torch.empty_like(sent)  # [W: whose heads, n, B, T, H / W, D]
    dist.all_to_all_single(got, sent, group=sequence.group)
    return got.permute(1, 2, 3, 0, 4, 5).reshape(n, B, WT // W, W * h, D)
