"""From a whole batch to this rank's slice of it: contiguous shards in rank order, labels and positions global."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.checks import agreement
from lasp.checks.checksum import checksums
from lasp.checks.messages import check_messages
from lasp.layout import ShardLayout
from lasp.ranks import SequenceParallel, collectives, sequence_axis


def shard_batch(
    batch: Mapping[str, Any],
    mesh,
    *,
    seq_dim: int = 1,
    shift_labels: bool = True,
    pad: bool = True,
    ignore_index: int = -100,
    validate: str = "first",
) -> dict[str, Any]:
    """This rank's slice of a batch that every rank of the sequence holds whole.

    Every tensor with T = `input_ids.shape[seq_dim]` entries at `seq_dim` is cut along it; anything else passes.
    Added or changed, before cutting:

    - `labels`: shifted by one over the *whole* sequence with `shift_labels` (so the last label of a shard is the
      first token of the next), made from `input_ids` if absent. The last label, and with a 1-D `cu_seqlens` the last
      of each packed sequence, is `ignore_index`.
    - `position_ids` (int64): global, from 0 in each sequence, made if absent.
    - with `pad`, T is padded to a multiple of the ranks: token 0, label `ignore_index`, behind the last real token.
      Without, the first ranks get one token more.
    - `layout`: the `ShardLayout`, if the batch has `cu_seqlens`; a model passes it to the operator.

    Args:
        batch: has at least `input_ids`, an integer tensor such as [B, T].
        mesh: the whole mesh, `mesh["sp"]`, a ProcessGroup or None.
        seq_dim: the dimension of T.
        shift_labels: False if the labels are already the next tokens.
        pad: see above.
        ignore_index: the label that the loss skips.
        validate: "first" compares the batch and these options between the ranks of the sequence, at the first call and
            at every 1000th: all of them must call, in the same order. (It may be in a thread that prepares batches. In
            a worker process of a DataLoader nothing is compared.) "off" does not.

    Raises:
        RankMismatchError: ranks were given different batches, or one of them failed; on every rank.
        PeerError: a rank did not call it within the timeout of the group.
    """
    sequence = sequence_axis(mesh)
    options = {"seq_dim": seq_dim, "shift_labels": shift_labels, "pad": pad, "ignore_index": ignore_index}
    with agreement.of_batch(sequence, validate=validate) as ranks_agree:
        local = _local(batch, sequence, **options)
        ranks_agree.settle(lambda: options, lambda: {agreement.BATCH: _facts(batch, local)})
    return local


def _facts(batch: Mapping[str, Any], local: Mapping[str, Any]) -> dict[str, str]:
    """What ranks must hold alike: all that was cut, and the borders of packed sequences."""
    whole = {name: x for name, x in batch.items() if isinstance(x, Tensor) and local[name] is not x}
    if batch.get("cu_seqlens") is not None:
        whole["cu_seqlens"] = torch.as_tensor(batch["cu_seqlens"])
    return checksums(whole)


def _local(
    batch: Mapping[str, Any],
    sequence: SequenceParallel,
    *,
    seq_dim: int,
    shift_labels: bool,
    pad: bool,
    ignore_index: int,
) -> dict[str, Any]:
    """The work of `shard_batch`."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or not -ids.ndim <= seq_dim < ids.ndim:
        raise ValueError(f"batch['input_ids'] must be a tensor with a dimension {seq_dim}, got {ids!r}")
    seq_dim %= ids.ndim
    tokens = ids.shape[seq_dim]
    offsets = batch.get("cu_seqlens")
    offsets = [0, tokens] if offsets is None else [int(n) for n in offsets]
    if not offsets or offsets[-1] != tokens:
        raise ValueError(f"cu_seqlens must end at the {tokens} tokens of input_ids, got {offsets}")

    whole = dict(batch)
    whole.setdefault("position_ids", _positions(ids, seq_dim, offsets))
    labels = whole.get("labels", ids)
    if labels.shape != ids.shape:
        raise ValueError(f"labels must have the shape of input_ids {tuple(ids.shape)}, got {tuple(labels.shape)}")
    whole["labels"] = _shift(labels, seq_dim, offsets, ignore_index) if shift_labels else labels

    padding = -tokens % sequence.size if pad else 0
    layout = ShardLayout.even(tokens + padding, sequence.size)
    start, end = layout.bounds(sequence.rank)
    local = {}
    for name, x in whole.items():
        if isinstance(x, Tensor) and x.ndim > seq_dim and x.shape[seq_dim] == tokens and name != "cu_seqlens":
            fill = ignore_index if name == "labels" else 0
            x = F.pad(x, (0, 0) * (x.ndim - 1 - seq_dim) + (0, padding), value=fill) if padding else x
            x = x.narrow(seq_dim, start, end - start)
        local[name] = x
    if "cu_seqlens" in whole:
        if padding:
            offsets = [*offsets, tokens + padding]
            local["cu_seqlens"] = whole["cu_seqlens"].new_tensor(offsets)
        local["layout"] = ShardLayout(layout.lengths, tuple(offsets))
    return local


def _positions(ids: Tensor, seq_dim: int, offsets: list[int]) -> Tensor:
    positions = torch.arange(ids.shape[seq_dim], device=ids.device)
    for start, end in zip(offsets, offsets[1:]):
        positions[start:end] -= start
    shape = [1] * ids.ndim
    shape[seq_dim] = -1
    return positions.view(shape).expand(ids.shape)


def _shift(labels: Tensor, seq_dim: int, offsets: list[int], ignore_index: int) -> Tensor:
    shifted = torch.full_like(labels, ignore_index)
    for start, end in zip(offsets, offsets[1:]):
        if end > start:
            following = labels.narrow(seq_dim, start + 1, end - start - 1)
            shifted.narrow(seq_dim, start, end - start - 1).copy_(following)
    return shifted


def shard_sequence(x: Tensor, mesh, *, dim: int = 1) -> Tensor:
    """This rank's slice along `dim` of a tensor that every rank holds whole; the inverse of `unshard_sequence`.

    If T is no multiple of the ranks, the first ranks get one entry more. Gradients follow the convention of data
    parallelism: the objective is the *mean* over ranks of what each calls backward on, so the gradient of the
    whole x is the gathered gradient of the slices over the number of ranks, the same on every rank.

    Raises:
        RankMismatchError: in backward, ranks hold gradients of other shapes or dtypes; on every rank.
    """
    sequence = sequence_axis(mesh)
    dim = _check_dim(x, dim)
    return x if sequence.size == 1 else _ShardSequence.apply(x, sequence, dim)  # type: ignore[return-value]


def unshard_sequence(x: Tensor, mesh, *, dim: int = 1) -> Tensor:
    """The whole tensor on every rank from its slices along `dim`, which may differ in length.

    Gradients: the sum over ranks of what each did with the slice (see `shard_sequence`). So a loss that every rank
    computes on the whole output gives exact parameter gradients under DDP, FSDP2 or `sync_grads`, which average.

    Raises:
        RankMismatchError: ranks hold slices of other shapes or dtypes; on every rank.
    """
    sequence = sequence_axis(mesh)
    dim = _check_dim(x, dim)
    return x if sequence.size == 1 else _UnshardSequence.apply(x, sequence, dim)  # type: ignore[return-value]


def _check_quiet(sequence: SequenceParallel) -> None:
    """Nothing may be exchanged while a state travels (see `lasp.linear_attention`)."""
    if sequence.peers.busy:
        raise RuntimeError("the function that makes q must not exchange anything among the same ranks")


def _check_dim(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be a dimension of x {tuple(x.shape)}, got {dim}")
    return dim % x.ndim


class _ShardSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sequence, dim):
        ctx.sequence, ctx.dim = sequence, dim
        ctx.lengths = ShardLayout.even(x.shape[dim], sequence.size).lengths
        start = sum(ctx.lengths[: sequence.rank])
        return x.narrow(dim, start, ctx.lengths[sequence.rank]).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        _check_messages(gradient, ctx.lengths, ctx.sequence, ctx.dim)
        whole = collectives.gather_tokens(gradient, ctx.lengths, ctx.sequence, _what, dim=ctx.dim)
        return whole / ctx.sequence.size, None, None


class _UnshardSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sequence, dim):
        _check_quiet(sequence)
        ctx.sequence, ctx.dim = sequence, dim
        _check_messages(x, (), sequence, dim)
        ctx.lengths = collectives.lengths_of(x, sequence, _what, dim=dim)
        _check_messages(x, ctx.lengths, sequence, dim)
        return collectives.gather_tokens(x, ctx.lengths, sequence, _what, dim=dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        _check_messages(gradient, ctx.lengths, ctx.sequence, ctx.dim)
        return collectives.scatter_tokens(gradient, ctx.lengths, ctx.sequence, _what, dim=ctx.dim), None, None


def _check_messages(x: Tensor, lengths: Sequence[int], sequence: SequenceParallel, dim: int) -> None:
    """Raise on every rank unless all hold slices along `dim` of one tensor."""
    shape = (*x.shape[:dim], "T", *x.shape[dim + 1 :])
    kind = (("shape", shape), ("dtype", x.dtype), ("most tokens", max(lengths, default=None)))
    check_messages(sequence, _what(), kind, x.device)


def _what() -> str:
    return "shard_sequence or unshard_sequence: the exchange of slices with the other ranks"
