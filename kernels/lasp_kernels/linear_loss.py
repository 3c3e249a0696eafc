"""Cross entropy of a linear layer's outputs that never are in memory all at once.

A row of logits = hidden @ weight^T is needed for its loss and for its gradient, softmax(logits) - one_hot(label), and
then no more. So a tile of tokens at a time: logits, loss, and the gradient written over the logits; from that at once
d(hidden) of the tile and its part of d(weight). Backward only multiplies by what reached the sum. That is three matrix
products a token where keeping nothing and computing the logits again takes four.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lasp_kernels.once import no_second_derivative

TILE = {"cuda": 2**29, "cpu": 2**24}  # logits in memory at once: 1 GiB in bf16 on a GPU, 64 MiB in fp32 on a CPU


class Words(NamedTuple):
    """Where the rows of a weight are those of some words only, and others have the rest."""

    first: int  # of these words
    of_each: Callable[[Tensor], Tensor]  # x [...] of each that has a part, [parts, ...]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    words: Words | None = None,
) -> Tensor:
    """The sum of the cross entropies of `hidden @ weight^T + bias`, in fp32 (fp64 of fp64).

    hidden [N, D] and weight [V, D] of one float dtype, bias [V]; labels [N] int64, `ignore_index` or within [0, V).
    Logits are rounded to that dtype, as a linear layer's output is; all sums over tokens and words are in fp32.

    With `words` the weight [V, D] is that of some words. The sum is that over all; the gradient of hidden is this
    part's summand. Three numbers a token are told to the others.
    """
    train = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, ignore_index, train, words)  # type: ignore[return-value]


def tokens_at_once(vocabulary: int, device: torch.device) -> int:
    """How many tokens a tile has: a multiple of 128, unless the vocabulary is vast."""
    tokens = max(1, TILE.get(device.type, TILE["cuda"]) // vocabulary)
    return tokens - tokens % 128 if tokens >= 128 else tokens


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ignore_index, train, words):
        needs = ctx.needs_input_grad[:3] if train else (False,) * 3  # a parameter needs one in an evaluation, too
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if needs[2] else None
        size = tokens_at_once(len(weight), hidden.device)
        for first in range(0, len(hidden), size):
            here = slice(first, first + size)
            h = hidden[here]
            logits = h @ weight.T if bias is None else torch.addmm(bias, h, weight.T)
            if words is None:
                total += _losses(logits, labels[here], ignore_index, gradient=any(needs)).sum()
            else:
                total += _losses_of_words(logits, labels[here], ignore_index, words, gradient=any(needs)).sum()
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[here])
            if d_weight is not None:
                _add_product(d_weight, logits, h)
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=wide)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @no_second_derivative("linear_cross_entropy")
    def backward(ctx, gradient):
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        of_weight, of_bias = ctx.dtypes
        return (
            None if d_hidden is None else _scaled(d_hidden, gradient),
            None if d_weight is None else (d_weight * gradient).to(of_weight),
            None if d_bias is None else (d_bias * gradient).to(of_bias),
            *[None] * 4,
        )


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Some rows at a time in the dtype of the factor, which in 16 bits would be off by up to 0.4%, for all alike."""
    if x.dtype == factor.dtype:
        return x * factor
    found = torch.empty_like(x)
    for part, to in zip(x.split(4096), found.split(4096)):
        to.copy_(part.to(factor.dtype).mul_(factor))
    return found


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total [V, D] += gradient^T [V, n] @ hidden [n, D], summed in the dtype of `total`."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, hidden)
    elif total.is_cuda:
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(gradient.T.to(total.dtype), hidden.to(total.dtype))


def _losses(logits: Tensor, labels: Tensor, ignore_index: int, *, gradient: bool) -> Tensor:
    """The loss of each row of logits [n, V]; with `gradient` that of their sum stands in place of the logits."""
    if logits.is_cuda and logits.dtype != torch.float64:
        from lasp_kernels.cross_entropy import fused_cross_entropy

        return fused_cross_entropy(logits, labels, ignore_index, gradient=gradient)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels != ignore_index
    known = labels.masked_fill(~counted, 0)  # it may be any number
    wide = wide.log_softmax(1)
    losses = torch.where(counted, -wide.gather(1, known[:, None]).squeeze(1), 0)
    if gradient:
        wide = wide.exp_().scatter_add_(1, known[:, None], torch.full_like(wide[:, :1], -1))
        logits.copy_(wide.masked_fill_(~counted[:, None], 0))
    return losses


def _losses_of_words(logits: Tensor, labels: Tensor, ignore_index: int, words: Words, *, gradient: bool) -> Tensor:
    """`_losses` of all words, where these are the logits [n, V] of some."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    counted, places = labels != ignore_index, (labels - words.first).unsqueeze(1)
    here = counted & (places[:, 0] >= 0) & (places[:, 0] < logits.shape[1])
    places = places.clamp(0, logits.shape[1] - 1)
    of_label = torch.where(here, logits.gather(1, places)[:, 0].to(wide), 0)
    own, highest = _sums_of_exponentials(logits, counted, gradient=gradient)
    sums, tops, of_labels = words.of_each(torch.stack([own, highest, of_label])).unbind(1)
    top = tops.amax(0)  # differences first, as in the kernel: next to logits of thousands a logarithm has no digits
    total = (sums + (tops - top)).logsumexp(0)
    if gradient:
        logits.mul_((own + (highest - top) - total).exp().unsqueeze(1))
        # The label's from the logit: a probability near 1 that was rounded to 16 bits would be no digit of it less 1.
        exact = ((of_label - top - total).exp() - 1).to(logits.dtype).unsqueeze(1)
        logits.scatter_(1, places, torch.where(here.unsqueeze(1), exact, logits.gather(1, places)))
    return torch.where(counted, total + (top - of_labels.sum(0)), 0)


def _sums_of_exponentials(logits: Tensor, counted: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Of each row the logarithm of that, less the highest logit, and this; with `gradient` the softmax in place of the
    logits, 0 of rows that do not count."""
    if logits.is_cuda and logits.dtype != torch.float64:
        return _sums_in_triton(logits, counted, gradient=gradient)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest = wide.amax(1)
    wide = wide - highest.unsqueeze(1)
    found = wide.logsumexp(1)
    if gradient:
        logits.copy_((wide - found.unsqueeze(1)).exp_().masked_fill_(~counted.unsqueeze(1), 0))
    return found, highest


def _sums_in_triton(logits: Tensor, counted: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
    from lasp_kernels.cross_entropy import fused_cross_entropy

    highest = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    labels = counted.to(torch.int64) - 2  # -1 is none of these words, -2 does not count
    return fused_cross_entropy(logits, labels, -2, gradient=gradient, highest=highest), highest
