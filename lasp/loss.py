"""The exact mean loss over all tokens of all ranks."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard

from lasp import arguments
from lasp.checks import agreement
from lasp.checks.use import refuse_nothing_split, split_over
from lasp.ranks import RankMismatchError, grad_group, waiting
from lasp.ranks.parts import Ranks, is_split
from lasp_kernels.linear_loss import Words, linear_cross_entropy
from lasp_kernels.once import refuse_second_derivative


def token_loss(
    logits: Tensor, labels: Tensor, *, mesh, ignore_index: int = -100, total_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy, averaged over every token of every rank of dp x sp, not over ranks.

    Args:
        logits: [..., vocabulary], this rank's tokens, any float dtype; the loss is taken in fp32, of fp64 in fp64.
        labels: [...], integers, already shifted (`shard_batch` does it); `ignore_index` marks tokens that do not count.
        mesh: the whole mesh (dp_replicate x dp_shard x sp), one axis, a ProcessGroup, or None for one rank. It must
            hold the ranks over which `parallelize` has split the model that gave the logits.
        ignore_index: the label that does not count.
        total_tokens: for gradient accumulation: how many tokens count in all micro-batches of the step, on all ranks.
            The loss is then the sum over these tokens divided by it, so that the losses, and the gradients, of all
            micro-batches add up to those of the mean over their tokens, however unequal they are.

    Returns:
        The loss, equal on every rank, and the number of tokens that it is of (int64). Its gradient is
        scaled so that the *average* of parameter gradients over `grad_mesh(mesh)`, which DDP, FSDP2 and
        `sync_grads` form, is exact, however unequal the ranks' token counts. With no token at all the loss is 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication; also a mesh (or None) that lacks
            ranks of the sequence, as far as it can be seen (lasp.checks.use.split_over), and batches that `shard_batch`
            has cut over ranks of the mesh, though no model was split and no operator called.
        ValueError: a label that is neither in the vocabulary nor `ignore_index`, on every rank, naming the rank that
            has it. On a GPU, and under torch.compile, where the host would have to wait to know, the loss and all
            gradients are NaN on every rank instead.
        ValueError: total_tokens that are fewer than these; on every rank. (On a GPU NaN, as above.)
        RankMismatchError: ranks have another vocabulary, ignore_index or total_tokens; on every rank. (On a GPU NaN.)
        PeerError: another rank ended, or was silent for the timeout of the group.
    """
    group, ranks = grad_group(mesh)
    check_loss(logits, labels, ignore_index, mesh, group)
    _check_total(total_tokens)
    local, counted, outside = sum_of_slice(logits, labels, ignore_index)
    found = totals(local, labels, counted, outside, logits.shape[-1], ignore_index, group, ranks, of=total_tokens)
    return found.mean_of(local, ranks)


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    mesh,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    total_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_loss` of `hidden @ weight^T + bias`, whose logits never are in memory all at once.

    A model's last layer has as many outputs as there are words: 131,072 tokens and 64,000 words are 16 GiB of logits in
    bf16, and twice that in fp32. Here they are made a tile of tokens at a time, with the gradient at once, so forward
    takes three products of matrices and backward none (`lasp_kernels.linear_loss`).

    Args:
        hidden: [..., D], what the last layer reads, of this rank's tokens, any float dtype: `TNL` and
            `LinearTransformer` give it with `return_hidden=True`, a model of transformers from `model.model(...)`.
        weight: [V, D], of the last layer (`model.head.weight`), of the same dtype; under autocast both are cast. Under
            FSDP2 it must be that of the outermost wrapped module, whose weights stay gathered after forward. After
            `lasp.tensor_parallel` it is a DTensor: each rank makes the logits of its own words.
        labels: as in `token_loss`.
        mesh: as in `token_loss`.
        ignore_index: as in `token_loss`.
        bias: [V], of the last layer.
        reduction: "sum" gives the sum over this rank's tokens and how many these are, and asks no other rank: what a
            `loss_fn` of `stream_backward` returns. A label outside the vocabulary makes it NaN.
        total_tokens: as in `token_loss`, for "mean".

    Returns:
        As `token_loss`. The loss is in fp32 of 16-bit inputs, and logits are rounded to their dtype.

    Raises:
        TypeError, ValueError, RankMismatchError, PeerError: as `token_loss`.
    """
    arguments.choice("reduction", reduction, ("mean", "sum"))
    _check_linear(hidden, weight, bias)
    _check_total(total_tokens)
    if total_tokens is not None and reduction == "sum":
        raise ValueError(f"total_tokens must be None for reduction='sum', which divides by none, got {total_tokens}")
    group, ranks = grad_group(mesh)
    check_loss(hidden, labels, ignore_index, mesh, group, name="hidden")
    local, counted, outside = sum_of_linear(hidden, weight, bias, labels, ignore_index)
    if reduction == "sum":
        return torch.where(outside.any(), torch.nan, 1.0).to(local.dtype) * local, counted.sum()
    name = "linear_token_loss"
    found = totals(local, labels, counted, outside, len(weight), ignore_index, group, ranks, name=name, of=total_tokens)
    return found.mean_of(local, ranks)


def sum_of_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`sum_of_slice` of `hidden @ weight^T + bias`, without these logits; under autocast as a linear layer casts."""
    kind = hidden.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    labels = labels.flatten().long()
    counted, outside = which_labels(labels, len(weight), ignore_index)
    known, words = labels.masked_fill(outside, ignore_index), None
    if isinstance(weight, DTensor):  # each rank of tensor parallelism has some words
        ranks = Ranks.of(weight)
        hidden, weight = ranks.enter(hidden), weight.to_local()
        words = Words(ranks.rank * len(weight), ranks.of_each)
    flat = hidden.flatten(0, -2)
    local = linear_cross_entropy(flat, weight, known, bias=bias, ignore_index=ignore_index, words=words)
    return local, counted, outside


def sum_of_slice(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the cross entropy of these tokens; which of them count, and which labels are outside, both [T]."""
    labels = labels.flatten().long()
    counted, outside = which_labels(labels, logits.shape[-1], ignore_index)
    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    # One label outside would end the process on a GPU, and on a CPU leave the other ranks waiting.
    known = labels.masked_fill(outside, ignore_index)
    return F.cross_entropy(wide, known, ignore_index=ignore_index, reduction="sum"), counted, outside


def which_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which of them count, and which of these are outside of the vocabulary."""
    counted = labels != ignore_index
    return counted, counted & ((labels < 0) | (labels >= vocabulary))


class Totals(NamedTuple):
    """The sums over all ranks, in fp64."""

    loss: Tensor
    tokens: Tensor
    sound: Tensor  # 1, or NaN where a label is outside or ranks differ, and the host cannot wait to know it
    of: int | None = None  # what their sum is divided by, if not by their number

    def mean_of(self, local: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
        """The mean over all tokens, with the gradient of `local`, the sum over this rank's; and how many."""
        count = self.tokens.clamp(min=1) if self.of is None else self.of
        mean, weight = (self.sound * self.loss / count).to(local.dtype), (self.sound * ranks / count).to(local.dtype)
        return _GlobalMean.apply(local, mean, weight, ranks), self.tokens.long()  # type: ignore[return-value]


def totals(
    local: Tensor,
    labels: Tensor,
    counted: Tensor,
    outside: Tensor,
    vocabulary: int,
    ignore_index: int,
    group: ProcessGroup | None,
    ranks: int,
    *,
    name: str = "token_loss",
    of: int | None = None,
) -> Totals:
    """What the ranks hold together; raises on every rank, where the host can know it, if they do not fit.

    One message, in fp64, which holds each of these exactly enough, whatever the ranks' dtypes. Of a number that is to
    be the same on all of them it has the bits: how many ranks have each of these tells whether it is.
    """
    numbers = torch.stack([x.detach().double() for x in (local, counted.sum(), outside.sum())])
    if ranks > 1:
        same = [local.new_full((), x, dtype=torch.int64) for x in (vocabulary, ignore_index, of or 0)]
        bits = torch.stack(same)[:, None] >> torch.arange(64, device=local.device) & 1
        numbers = torch.cat([numbers, bits.flatten().double()])
        in_graph = torch.compiler.is_compiling()  # where a clock would end the graph
        with nullcontext() if in_graph else waiting(f"{name}, forward: the sum over all ranks"):
            dist.all_reduce(numbers, group=group)
    total, tokens, wrong = numbers[:3].unbind()
    differ = ((numbers[3:] > 0) & (numbers[3:] < ranks)).any()
    few = tokens > of if of is not None else wrong < 0
    if local.device.type == "cpu" and not torch.compiler.is_compiling() and (differ or wrong or few):
        if differ:
            _compare(vocabulary, ignore_index, of, group, ranks, name)
        if few:
            raise ValueError(f"total_tokens must be those of all micro-batches, got {of}, and these are {int(tokens)}")
        _refuse(labels.flatten()[outside], vocabulary, ignore_index, group, ranks, name)
    return Totals(total, tokens, torch.where(differ | few | (wrong > 0), torch.nan, 1.0), of)


def check_loss(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    mesh: object,
    group: ProcessGroup | None,
    *,
    name: str = "logits",
) -> None:
    """Raise for what does not fit, as far as one rank can see it."""
    if not isinstance(logits, Tensor) and hasattr(logits, "logits"):
        raise TypeError(f"{name} must be a tensor, got {type(logits).__name__}: pass its .logits")
    arguments.float_tensor(name, logits)
    arguments.integer_tensor("labels", labels, signed=True)  # of unsigned ones -100 is none
    arguments.integer("ignore_index", ignore_index)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        last = "vocabulary" if name == "logits" else "D"
        raise ValueError(f"{name} must have shape [..., {last}], got {tuple(logits.shape)}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"{name} {tuple(logits.shape)} and labels {tuple(labels.shape)} must agree but for the last")
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the device of {name}, {logits.device}, got {labels.device}")
    if not torch.compiler.is_compiling():
        _check_ranks(logits, mesh, group)


def _check_total(total_tokens: int | None) -> None:
    if total_tokens is not None:
        arguments.integer("total_tokens", total_tokens, at_least=1)


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless weight and bias fit what is known of `hidden`."""
    arguments.float_tensor("hidden", hidden)
    arguments.float_tensor("weight", weight)
    if is_split(weight) and weight.placements == (Shard(0),):
        if bias is not None:
            raise ValueError(f"bias must be None where lasp.tensor_parallel has split weight, got {bias.shape}")
    elif isinstance(weight, DTensor):
        raise TypeError(
            f"weight must be whole, got a DTensor {tuple(weight.shape)} on {weight.placements}: FSDP2 has put it away "
            "again. Let it belong to the outermost wrapped module, or call linear_token_loss within a forward"
        )
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"weight must have shape [V, D] with the D of hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        arguments.float_tensor(name, x)
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {x.device}")
        if x.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {x.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [V] = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")


def _check_ranks(logits: Tensor, mesh: object, group: ProcessGroup | None) -> None:
    """Raise if a mean over the ranks of the group leaves out ranks that hold tokens of the same sequences."""
    sequence = split_over(logits)
    if sequence is None and group is not None:
        refuse_nothing_split(group)
    if sequence is None or sequence.group is group:
        return
    of_group = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
    if not set(sequence.ranks) <= set(of_group):
        raise ValueError(
            f"mesh must hold all ranks of the sequence, {sequence.ranks}, since these logits are of a model that "
            f"lasp.parallelize has split over them, got {arguments.shown(mesh)} of the ranks {tuple(of_group)}: that "
            "would be the mean of a part of the tokens. Pass the mesh that lasp.init_mesh made; if a mean of this "
            "rank's tokens alone is meant, torch.nn.functional.cross_entropy gives it"
        )


def _compare(
    vocabulary: int, ignore_index: int, of: int | None, group: ProcessGroup | None, ranks: int, name: str
) -> None:
    """Raise on every rank: it is known that some have others."""
    found = torch.zeros(ranks, 3, dtype=torch.int64)
    found[dist.get_rank(group)] = torch.tensor([vocabulary, ignore_index, 0 if of is None else of])
    with waiting(f"{name}, forward: which rank has another vocabulary, ignore_index or total_tokens"):
        dist.all_reduce(found, group=group)
    told = [f"vocabulary {x} and ignore_index {y}" + f", total_tokens {z}" * (z > 0) for x, y, z in found.tolist()]
    usual = Counter(told).most_common(1)[0][0]
    listed = [
        f"rank {rank if group is None else dist.get_global_rank(group, rank)} has {text}"
        for rank, text in enumerate(told)
        if text != usual
    ]
    raise RankMismatchError(f"{name}: {'; '.join(listed)}, the others {usual}")


def _refuse(
    outside: Tensor, vocabulary: int, ignore_index: int, group: ProcessGroup | None, ranks: int, name: str
) -> None:
    """Raise on every rank: all have come here, since each has the sum of how many labels are outside."""
    found = torch.zeros(ranks, 2, dtype=torch.int64)  # of each rank how many, and the first
    mine = 0 if ranks == 1 else dist.get_rank(group)
    if len(outside):
        found[mine] = torch.stack([outside.new_tensor(len(outside)), outside[0]])
    if ranks > 1:
        with waiting(f"{name}, forward: which rank has a label outside the vocabulary"):
            dist.all_reduce(found, group=group)
    listed = []
    for rank, (count, first) in enumerate(found.tolist()):
        where = "" if ranks == 1 else f" on rank {rank if group is None else dist.get_global_rank(group, rank)}"
        listed += [f"{first}{where} ({count} such)"] if count else []
    raise ValueError(
        f"labels must be from 0 to {vocabulary - 1}, or ignore_index {ignore_index}, got {', '.join(listed)}"
    )


class _GlobalMean(torch.autograd.Function):
    """The value of the global mean with the gradient of this rank's part of it, times the ranks, over which gradients
    are averaged: what is made of that gradient (a penalty) would not be that of one process."""

    @staticmethod
    def forward(ctx, local, mean, weight, ranks):
        ctx.save_for_backward(weight)
        ctx.ranks = ranks
        return mean

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        if ctx.ranks > 1:
            refuse_second_derivative("lasp.token_loss over several ranks")
        if not torch.compiler.is_compiling():
            agreement.note_loss(gradient)
        return gradient * weight, None, None, None
