"""From a whole batch to this rank's slice of it: contiguous shards in rank order, labels and positions global."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lasp.mesh import SequenceParallel, sequence_axis


@dataclass(frozen=True)
class LocalRuns:
    """One rank's part of the sequences. A dense batch is one run a batch row; packed, one a sequence."""

    cu_seqlens: tuple[int, ...] | None  # local, when packed
    sequences: range  # packed: which of the global sequences the runs belong to
    continues: bool  # the first run began on an earlier rank
    continued: bool  # the last run goes on on a later rank


@dataclass(frozen=True)
class ShardLayout:
    """How a global sequence lies on the ranks. Held on the host, so that nothing waits for a device.

    Args:
        lengths: tokens of each rank, in sequence order; zero is allowed.
        cu_seqlens: for packed sequences the global offsets, from 0 to the number of tokens (batch size 1).
    """

    lengths: tuple[int, ...]
    cu_seqlens: tuple[int, ...] | None = None

    def __post_init__(self):
        object.__setattr__(self, "lengths", tuple(int(n) for n in self.lengths))
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"lengths must be one non-negative number of tokens a rank, got {self.lengths}")
        if self.cu_seqlens is None:
            return
        offsets = tuple(int(n) for n in self.cu_seqlens)
        object.__setattr__(self, "cu_seqlens", offsets)
        if len(offsets) < 2 or offsets[0] != 0 or any(b < a for a, b in zip(offsets, offsets[1:])):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, got {offsets}")
        if offsets[-1] != self.total:
            raise ValueError(f"cu_seqlens ends at {offsets[-1]}, but the ranks hold {self.total} tokens")

    @classmethod
    def even(cls, tokens: int, ranks: int, *, cu_seqlens: Sequence[int] | Tensor | None = None) -> ShardLayout:
        """Split `tokens` as evenly as whole tokens allow; the first ranks get the rest."""
        lengths = tuple(tokens // ranks + (r < tokens % ranks) for r in range(ranks))
        offsets = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
        return cls(lengths, None if offsets is None else tuple(offsets))

    @property
    def total(self) -> int:
        """Tokens on all ranks."""
        return sum(self.lengths)

    def bounds(self, rank: int) -> tuple[int, int]:
        """First and last + 1 global token of a rank."""
        start = sum(self.lengths[:rank])
        return start, start + self.lengths[rank]

    def local(self, rank: int) -> LocalRuns:
        """The runs that a rank holds."""
        last_rank = rank == len(self.lengths) - 1
        if self.cu_seqlens is None:
            return LocalRuns(None, range(0), rank > 0, not last_rank)
        start, end = self.bounds(rank)
        pairs = list(zip(self.cu_seqlens, self.cu_seqlens[1:]))
        # An empty sequence lies on the rank that holds the token at its offset, or else on the last one.
        mine = [n for n, (a, b) in enumerate(pairs) if max(a, start) < min(b, end) or (a == b and self._holds(rank, a))]
        if not mine:  # no token and no sequence here: what comes in goes out
            return LocalRuns((0, 0), range(0), True, True)
        sequences = range(mine[0], mine[-1] + 1)
        offsets = tuple(min(max(n, start), end) - start for n in self.cu_seqlens[mine[0] : mine[-1] + 2])
        first, last = pairs[mine[0]], pairs[mine[-1]]
        return LocalRuns(offsets, sequences, first[0] < start, last[1] > end)

    def _holds(self, rank: int, token: int) -> bool:
        start, end = self.bounds(rank)
        return start <= token < end or (token == self.total and rank == len(self.lengths) - 1)


def shard_batch(
    batch: Mapping[str, Any],
    mesh,
    *,
    seq_dim: int = 1,
    shift_labels: bool = True,
    pad: bool = True,
    ignore_index: int = -100,
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
    """
    sequence = sequence_axis(mesh)
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
    """
    sequence = sequence_axis(mesh)
    dim = _check_dim(x, dim)
    return x if sequence.size == 1 else _ShardSequence.apply(x, sequence, dim)  # type: ignore[return-value]


def unshard_sequence(x: Tensor, mesh, *, dim: int = 1) -> Tensor:
    """The whole tensor on every rank from its slices along `dim`, which may differ in length.

    Gradients: the sum over ranks of what each did with the slice (see `shard_sequence`). So a loss that every rank
    computes on the whole output gives exact parameter gradients under DDP, FSDP2 or `sync_grads`, which average.
    """
    sequence = sequence_axis(mesh)
    dim = _check_dim(x, dim)
    return x if sequence.size == 1 else _UnshardSequence.apply(x, sequence, dim)  # type: ignore[return-value]


def _check_dim(x: Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be a dimension of x {tuple(x.shape)}, got {dim}")
    return dim % x.ndim


class _ShardSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sequence, dim):
        ctx.sequence, ctx.dim = sequence, dim
        start, end = ShardLayout.even(x.shape[dim], sequence.size).bounds(sequence.rank)
        return x.narrow(dim, start, end - start).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return torch.cat(_gather(gradient, ctx.sequence, ctx.dim), ctx.dim) / ctx.sequence.size, None, None


class _UnshardSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sequence, dim):
        parts = _gather(x, sequence, dim)
        ctx.sequence, ctx.dim, ctx.lengths = sequence, dim, [part.shape[dim] for part in parts]
        return torch.cat(parts, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.sequence.group)
        start = sum(ctx.lengths[: ctx.sequence.rank])
        return gradient.narrow(ctx.dim, start, ctx.lengths[ctx.sequence.rank]), None, None


def _gather(x: Tensor, sequence: SequenceParallel, dim: int) -> list[Tensor]:
    """The slices of all ranks in sequence order, of any length."""
    group = sequence.group
    sizes = torch.empty(sequence.size, dtype=torch.int64, device=x.device)
    mine = torch.tensor([x.shape[dim]], device=x.device)
    dist.all_gather(list(sizes.split(1)), mine, group=group)
    lengths = sizes.tolist()
    padded = F.pad(x.movedim(dim, 0), (0, 0) * (x.ndim - 1) + (0, max(lengths) - x.shape[dim])).contiguous()
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    # A group counts its ranks in ascending order, which need not be the order of the sequence.
    order = [dist.get_group_rank(group, r) for r in sequence.ranks]  # type: ignore[arg-type]
    return [parts[i][: lengths[i]].movedim(0, dim) for i in order]
