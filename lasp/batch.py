"""From a whole batch to this rank's slice of it: contiguous shards in rank order, labels and positions global."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp import arguments
from lasp.checks import agreement
from lasp.checks.checksum import checksums
from lasp.checks.messages import check_messages
from lasp.checks.optimizers import before_step
from lasp.checks.reach import note_cut
from lasp.layout import ShardLayout
from lasp.ranks import SequenceParallel, collectives, sequence_axis
from lasp_kernels.once import no_second_derivative

_OFFSETS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")  # names under which batches have those of packed sequences
_OF_THE_WHOLE = (*_OFFSETS[1:], "seq_idx", "max_length_q", "max_length_k")  # wrong of a slice, or told by the layout

# What asks other ranks is no part of a graph, which ends here. (The public decorator would import the compiler; see
# checks/optimizers.py.)
_no_graph = torch._disable_dynamo  # type: ignore[attr-defined,reportPrivateImportUsage]


@_no_graph
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

    Every tensor with T = `input_ids.shape[seq_dim]` entries at `seq_dim` is cut along it, into contiguous slices;
    anything else passes. Added or changed, before cutting (what is None counts as absent):

    - `labels` (int64): shifted by one over the *whole* sequence with `shift_labels` (so the last label of a shard is
      the first token of the next). If absent, they are made from `input_ids`, without what `attention_mask` says is
      padding. The last label, and the last of each packed sequence, is `ignore_index`.
    - `position_ids`: global, from 0 in each sequence; made if absent (int64, [B, T]). Given ones are integers [T],
      [B, T] or [n, B, T], such as the three of multimodal models, and are cut along T.
    - with `pad`, T is padded to a multiple of the ranks: token 0, label `ignore_index`, behind the last real token.
      Without, the first ranks get one token more.
    - `layout`: the `ShardLayout`, which says what all ranks hold and how much of it is padding. Pass it to the model
      and the operators: without it they take padding for tokens, which then are part of a final state.

    The layout lies on the host, which must therefore read what tells documents. If `cu_seqlens`, `seq_idx` or
    `position_ids` is on a GPU the host waits for it, and but for comparisons for nothing else: leave the first two on
    the CPU, and positions that just count out.

    Args:
        batch: has at least `input_ids`, an integer tensor such as [B, T]. `attention_mask`, if any, has its shape: 1
            for tokens, 0 for padding.
            Packed sequences (then B = 1) are given by any of these, which must not contradict each other:

            - `cu_seqlens` (a list, tuple, NumPy array or integer tensor, [N + 1] or [1, N + 1]): their offsets, from 0
              to T. It stays global. `cu_seq_lens_q` and `cu_seq_lens_k` of transformers say the same.
            - `seq_idx`, integers of the shape of input_ids: a number for each sequence, which rises.
            - without those, `position_ids` [T] or [1, T] that start again at 0 and count by one, where no
              `attention_mask` is given.

            On several ranks what holds for the whole only (`cu_seq_lens_q` and the like, `max_length_q`) and `seq_idx`
            are left out: `layout` says where documents are.
        mesh: the whole mesh, `mesh["sp"]`, a ProcessGroup or None.
        seq_dim: the dimension of T.
        shift_labels: False if the labels are already the next tokens.
        pad: see above.
        ignore_index: the label that the loss skips.
        validate: "first" compares the batch and these options between the ranks of the sequence, at the first call and
            at every 1000th: all of them must call, in the same order. (It may be in a thread that prepares batches;
            the main thread counts its own. In a worker process of a DataLoader nothing is compared.) "off" does not.

    Returns:
        A new dict: this rank's slices, `labels` and `position_ids` in int64 if they were made, and the `layout`; all
        else as it was given. The batch itself is not changed.

    Raises:
        ValueError, TypeError: what does not fit. Also positions that start again within a row and are not those of
            packed sequences (see above), whose documents would run into each other; positions where `attention_mask`
            is 0 do not count. (An attention_mask on a GPU is looked at where the batch is compared, and the host waits
            for it anyway.)
        RankMismatchError: ranks were given different batches, or in another order, or one of them failed; on every
            rank.
        PeerError: a rank did not call it within the timeout of the group.
    """
    sequence = sequence_axis(mesh)
    options = {"seq_dim": seq_dim, "shift_labels": shift_labels, "pad": pad, "ignore_index": ignore_index}
    with agreement.of_batch(sequence, validate=validate) as ranks_agree:
        local = _local(batch, sequence, read=ranks_agree.due, **options)
        ranks_agree.settle(lambda: options, lambda: {agreement.BATCH: _facts(batch, local)})
    return local


def _facts(batch: Mapping[str, Any], local: Mapping[str, Any]) -> dict[str, str]:
    """What ranks must hold alike: all that was cut, and the borders of packed sequences."""
    whole = {name: x for name, x in batch.items() if isinstance(x, Tensor) and name in local and local[name] is not x}
    if local["layout"].packed:
        whole["cu_seqlens"] = local["layout"].facts[1]
    return checksums(whole)


def _local(
    batch: Mapping[str, Any],
    sequence: SequenceParallel,
    *,
    seq_dim: int,
    shift_labels: bool,
    pad: bool,
    ignore_index: int,
    read: bool,
) -> dict[str, Any]:
    """The work of `shard_batch`; `read`: the host waits for the device in any case."""
    arguments.flag("pad", pad)
    whole = whole_batch(batch, seq_dim=seq_dim, shift_labels=shift_labels, ignore_index=ignore_index, read=read)
    padding = -whole.tokens % sequence.size if pad else 0
    lengths = ShardLayout.even(whole.tokens + padding, sequence.size).lengths
    layout = ShardLayout(lengths, whole.offsets, padding)
    if sequence.size > 1:
        sequence.peers.cut = True
        before_step(agreement.compare_exchanges)
    note_cut(sequence, layout)
    local = whole.cut(*layout.bounds(sequence.rank))
    if sequence.size > 1:
        local = {name: x for name, x in local.items() if name not in _OF_THE_WHOLE}
    return {**local, "layout": layout}


class Whole(NamedTuple):
    """A batch that was looked through, with labels and positions of the whole sequence."""

    values: dict[str, Any]
    dims: dict[str, int | None]  # along which each of them is cut; None: not at all
    tokens: int
    offsets: tuple[int, ...] | None  # of packed sequences
    ignore_index: int

    def cut(self, start: int, end: int) -> dict[str, Any]:
        """The tokens from start to end. Those behind the last are padding: token 0, label `ignore_index`."""
        found = {}
        first, last = min(start, self.tokens), min(end, self.tokens)
        padding = end - start - (last - first)
        for name, x in self.values.items():
            dim = self.dims[name]
            if dim is not None:
                fill = self.ignore_index if name == "labels" else 0
                x = x.narrow(dim, first, last - first)
                x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, padding), value=fill) if padding else x
                x = x.contiguous()  # models view them
            found[name] = x
        return found

    def of_segment(self, start: int, end: int) -> dict[str, Any]:
        """The same for a segment, without what says where the documents of all tokens are."""
        return {name: x for name, x in self.cut(start, end).items() if name not in (*_OF_THE_WHOLE, "cu_seqlens")}


def whole_batch(
    batch: Mapping[str, Any], *, seq_dim: int, shift_labels: bool, ignore_index: int, read: bool = False
) -> Whole:
    """The batch as `shard_batch` takes it, before it is cut; raises for what does not fit. `read`: see `_local`."""
    arguments.mapping("batch", batch)
    arguments.flag("shift_labels", shift_labels)
    if isinstance(batch.get("layout"), ShardLayout):
        raise ValueError("batch must be whole, as the data have it, got what lasp.shard_batch returned (with a layout)")
    ids, seq_dim = _ids(batch, seq_dim, read=read)
    tokens = ids.shape[seq_dim]
    offsets = _offsets(batch, ids, seq_dim)
    labels = _labels(batch, ids, ignore_index)
    labels = _shift(labels, seq_dim, offsets or (0, tokens), ignore_index) if shift_labels else labels
    whole = {**batch, "labels": _made_of_tokens(labels, batch, ignore_index)}
    dims = {"position_ids": seq_dim, **dict.fromkeys(_OFFSETS)}
    if batch.get("position_ids") is None:
        whole["position_ids"] = _positions(ids, seq_dim, offsets or (0, tokens))
    else:
        dims["position_ids"] = _dim_of_positions(batch, ids, seq_dim, packed=offsets is not None)
    for name, x in whole.items():
        if name not in dims:
            dims[name] = _dim_of_tokens(name, x, seq_dim, tokens)
    return Whole(whole, dims, tokens, offsets, ignore_index)


def _ids(batch: Mapping[str, Any], seq_dim: int, *, read: bool) -> tuple[Tensor, int]:
    """The tokens, and the dimension of T from 0."""
    name, seq_dim = "batch['input_ids']", arguments.integer("seq_dim", seq_dim)
    ids = arguments.integer_tensor(name, batch.get("input_ids"))
    if not -ids.ndim <= seq_dim < ids.ndim:
        raise ValueError(f"seq_dim must be a dimension of {name} {tuple(ids.shape)}, got {seq_dim}")
    seq_dim %= ids.ndim
    if (mask := batch.get("attention_mask")) is not None:
        arguments.padding_mask("attention_mask", mask, "input_ids", ids, read=read)
    return ids, seq_dim


def _offsets(batch: Mapping[str, Any], ids: Tensor, seq_dim: int) -> tuple[int, ...] | None:
    """The offsets of packed sequences, in whatever form they are given; None if there are none."""
    given = [name for name in (*_OFFSETS, "seq_idx") if batch.get(name) is not None]
    tokens = ids.shape[seq_dim]
    rows = math.prod(size for dim, size in enumerate(ids.shape) if dim != seq_dim)
    if given and rows != 1:
        name, got = given[0], arguments.shown(batch[given[0]])
        need = "needs" if name == "seq_idx" else "need"
        raise ValueError(f"{name} {need} a batch of 1, but input_ids are {tuple(ids.shape)}; got {name} {got}")
    if not given:
        return _offsets_of_positions(batch, tokens) if rows == 1 else None
    found = {
        name: _offsets_of_numbers(batch[name], ids)
        if name == "seq_idx"
        else arguments.offsets(name, batch[name], tokens=tokens, of="input_ids")
        for name in given
    }
    first, offsets = next(iter(found.items()))
    for name, others in found.items():
        if set(others) != set(offsets):  # an empty sequence has no number
            raise ValueError(
                f"{first} and {name} must be of the same packed sequences, got offsets {offsets} and {others}"
            )
    return offsets


def _offsets_of_numbers(given: object, ids: Tensor) -> tuple[int, ...]:
    numbers = arguments.integer_tensor("seq_idx", given, signed=True)
    if numbers.shape != ids.shape:
        raise ValueError(f"seq_idx must have the shape of input_ids {tuple(ids.shape)}, got {tuple(numbers.shape)}")
    step = numbers.flatten().long().diff().cpu()
    if (step < 0).any():
        raise ValueError(f"seq_idx must rise from one packed sequence to the next, got {arguments.shown(numbers)}")
    return (0, *((step > 0).nonzero().flatten() + 1).tolist(), ids.numel())


def _offsets_of_positions(batch: Mapping[str, Any], tokens: int) -> tuple[int, ...] | None:
    """Where positions start again at 0 and count by one, as transformers takes a batch of 1 without attention_mask."""
    if batch.get("position_ids") is None or batch.get("attention_mask") is not None:
        return None
    positions = arguments.integer_tensor("position_ids", batch["position_ids"])
    if positions.numel() != tokens or positions.ndim > 2 or tokens < 2:
        return None
    positions = positions.flatten().long().cpu()
    starts = (positions.diff() != 1).nonzero().flatten() + 1
    if positions[0] != 0 or not len(starts) or (positions[starts] != 0).any():
        return None
    return (0, *starts.tolist(), tokens)


def _labels(batch: Mapping[str, Any], ids: Tensor, ignore_index: int) -> Tensor:
    arguments.integer("ignore_index", ignore_index)
    if batch.get("labels") is None:
        return _made_of_tokens(ids.long(), batch, ignore_index)
    labels = arguments.integer_tensor("labels", batch["labels"], signed=True)  # -100 must be one of its numbers
    if labels.shape != ids.shape:
        raise ValueError(f"labels must have the shape of input_ids {tuple(ids.shape)}, got {tuple(labels.shape)}")
    return labels.long()


def _made_of_tokens(labels: Tensor, batch: Mapping[str, Any], ignore_index: int) -> Tensor:
    """Labels without those at padding, if they are made here: padding neither predicts nor is predicted."""
    mask = batch.get("attention_mask")
    return labels if mask is None or batch.get("labels") is not None else labels.masked_fill(mask == 0, ignore_index)


def _dim_of_tokens(name: str, x: object, seq_dim: int, tokens: int) -> int | None:
    """Along which dimension a value of the batch is cut; None: not at all."""
    if not isinstance(x, Tensor) or x.ndim <= seq_dim or x.shape[seq_dim] != tokens:
        return None
    arguments.tensor(f"batch[{name!r}]", x)
    return seq_dim


def _dim_of_positions(batch: Mapping[str, Any], ids: Tensor, seq_dim: int, *, packed: bool) -> int:
    """The dimension of T of given position_ids; raises where they do not fit or start again."""
    found = arguments.integer_tensor("position_ids", batch["position_ids"])
    tokens, planes = ids.shape[seq_dim], found.ndim == ids.ndim + 1
    dim = seq_dim + planes if found.ndim > 1 else 0
    row = found[0] if planes and len(found) else found
    of_rows = row.ndim == ids.ndim and all(a in (1, b) for a, b in zip(row.shape, ids.shape))
    if not (of_rows or found.ndim == 1) or found.shape[dim] != tokens:
        raise ValueError(
            f"position_ids must be [T], [B, T] or [n, B, T] for input_ids {tuple(ids.shape)} with T = {tokens}, "
            f"got {tuple(found.shape)}"
        )
    if not packed and tokens > 1 and _start_again(row, dim - planes, planes, batch, seq_dim):
        raise ValueError(
            f"position_ids start again within a row, got {arguments.shown(found)}: packed documents need their offsets "
            "as cu_seqlens, or positions that start at 0 and count by one without attention_mask (then B = 1), and "
            "padded tokens 0 in attention_mask"
        )
    return dim


def _start_again(row: Tensor, dim: int, planes: bool, batch: Mapping[str, Any], seq_dim: int) -> bool:
    """Whether a position falls, or is 0 again. Of several planes the first tells, where an image's tokens are alike."""
    positions, mask = row.movedim(dim, -1), batch.get("attention_mask")
    if mask is not None:
        mask = mask.movedim(seq_dim, -1) != 0
        positions = torch.where(mask, positions, -1)  # which is less than all before, and so is not looked at
    highest, now = positions.cummax(-1).values[..., :-1], positions[..., 1:]
    again = now < highest
    if not planes:
        again |= (now == 0) & (highest >= 0)
    return bool((again if mask is None else again & mask[..., 1:]).any())


def _positions(ids: Tensor, seq_dim: int, offsets: Sequence[int]) -> Tensor:
    positions = torch.arange(ids.shape[seq_dim], device=ids.device)
    for start, end in zip(offsets, offsets[1:]):
        positions[start:end] -= start
    shape = [1] * ids.ndim
    shape[seq_dim] = len(positions)
    return positions.view(shape).expand(ids.shape)


def _shift(labels: Tensor, seq_dim: int, offsets: Sequence[int], ignore_index: int) -> Tensor:
    shifted = torch.full_like(labels, ignore_index)
    for start, end in zip(offsets, offsets[1:]):
        if end > start:
            following = labels.narrow(seq_dim, start + 1, end - start - 1)
            shifted.narrow(seq_dim, start, end - start - 1).copy_(following)
    return shifted


@_no_graph
def shard_sequence(x: Tensor, mesh, *, dim: int = 1) -> Tensor:
    """This rank's slice along `dim` of a tensor that every rank holds whole; the inverse of `unshard_sequence`.

    If T is no multiple of the ranks, the first ranks get one entry more. Gradients follow the convention of data
    parallelism: the objective is the *mean* over ranks of what each calls backward on, so the gradient of the
    whole x is the gathered gradient of the slices over the number of ranks, the same on every rank.

    Args:
        x: the whole tensor, the same on all ranks of the sequence.
        mesh: the whole mesh, `mesh["sp"]`, a ProcessGroup or None.
        dim: of the sequence.

    Returns:
        This rank's slice, contiguous in the sequence; x itself on one rank.

    Raises:
        ValueError, TypeError: no tensor, or no dimension of it; a mesh without an axis "sp".
        RankMismatchError: in backward, ranks hold gradients of other shapes or dtypes; on every rank.
        PeerError: a rank did not come within the timeout.
    """
    sequence = sequence_axis(mesh)
    dim = _check_dim(x, dim)
    return x if sequence.size == 1 else _ShardSequence.apply(x, sequence, dim)  # type: ignore[return-value]


@_no_graph
def unshard_sequence(x: Tensor, mesh, *, dim: int = 1) -> Tensor:
    """The whole tensor on every rank from its slices along `dim`, which may differ in length.

    Gradients: the sum over ranks of what each did with the slice (see `shard_sequence`). So a loss that every rank
    computes on the whole output gives exact parameter gradients under DDP, FSDP2 or `sync_grads`, which average.

    Args:
        x: this rank's slice.
        mesh: the whole mesh, `mesh["sp"]`, a ProcessGroup or None.
        dim: of the sequence.

    Returns:
        The slices in rank order, one behind the other; x itself on one rank.

    Raises:
        ValueError, TypeError: no tensor, or no dimension of it; a mesh without an axis "sp".
        RankMismatchError: ranks hold slices of other shapes or dtypes; on every rank.
        PeerError: a rank did not come within the timeout.
    """
    sequence = sequence_axis(mesh)
    dim = _check_dim(x, dim)
    return x if sequence.size == 1 else _UnshardSequence.apply(x, sequence, dim)  # type: ignore[return-value]


def _check_quiet(sequence: SequenceParallel) -> None:
    """Nothing may be exchanged while a state travels (see `lasp.linear_attention`)."""
    if sequence.peers.busy:
        raise RuntimeError("the function that makes q must not exchange anything among the same ranks")


def _check_dim(x: Tensor, dim: int) -> int:
    arguments.tensor("x", x)
    if not -x.ndim <= arguments.integer("dim", dim) < x.ndim:
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
    @no_second_derivative("lasp.shard_sequence")
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
    @no_second_derivative("lasp.unshard_sequence")
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
