"""Collectives: under names that PyTorch changes between the versions that we support, and a first time for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from lasp.ranks.group import waiting
from lasp.ranks.sequence import SequenceParallel

# Shard by shard: gather_flat(whole, part, group=, async_op=) and scatter_sum_flat(part, whole, op, group=, async_op=).
# torch 2.13 deprecates all_gather_into_tensor and reduce_scatter_tensor for names that 2.11 lacks.
gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_sum_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_SENT = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
_SENT |= {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64}
"""What every backend sends as it is; anything else travels as bytes."""


def start_all_gather(gathered: Tensor, mine: Tensor, group: ProcessGroup | None) -> dist.Work:
    """Begin to gather `mine` [...] of all ranks into `gathered` [ranks, ...], in a `waiting` of the caller's."""
    return gather_flat(gathered.flatten(0, 1), mine, group=group, async_op=True)  # type: ignore[return-value]


def gather_tokens(
    x: Tensor, lengths: Sequence[int], sequence: SequenceParallel, what: Callable[[], str], *, dim: int = 1
) -> Tensor:
    """The tokens of all ranks along `dim`, in the order of the sequence, from each rank's x [B, T, ...].

    `lengths` are the tokens of each rank: shorter slices are padded, so that one message a rank suffices.
    """
    if x.dtype not in _SENT:
        there = x.movedim(dim, -1).contiguous().unsqueeze(-1).view(torch.uint8).movedim(-2, dim)
        gathered = gather_tokens(there, lengths, sequence, what, dim=dim)
        return gathered.contiguous().view(x.dtype).squeeze(-1)
    longest, mine = max(lengths), x.movedim(dim, 0)
    mine = F.pad(mine, (0, 0) * (x.ndim - 1) + (0, longest - len(mine))).contiguous()
    gathered = mine.new_empty(sequence.size, *mine.shape)
    if mine.numel():
        with waiting(what):
            start_all_gather(gathered, mine, sequence.group).wait()
    if len(set(lengths)) == 1 and sequence.in_group == tuple(range(sequence.size)):
        return gathered.flatten(0, 1).movedim(0, dim)
    parts = [gathered[place][:length] for place, length in zip(sequence.in_group, lengths)]
    return torch.cat(parts).movedim(0, dim)


def scatter_tokens(
    x: Tensor, lengths: Sequence[int], sequence: SequenceParallel, what: Callable[[], str], *, dim: int = 1
) -> Tensor:
    """The sum over ranks of x, of which each rank gets its slice along `dim`: `gather_tokens` in reverse.

    16-bit numbers are summed in fp32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    tokens = x.movedim(dim, 0)
    parts = x.new_zeros(sequence.size, max(lengths), *tokens.shape[1:], dtype=dtype)
    for place, part in zip(sequence.in_group, tokens.split(list(lengths))):
        parts[place, : len(part)] = part
    mine = parts.new_empty(parts.shape[1:])
    if mine.numel():
        with waiting(what):
            scatter_sum_flat(mine, parts.flatten(0, 1), group=sequence.group)
    return mine[: lengths[sequence.rank]].movedim(0, dim).to(x.dtype)


def tokens_to_heads(x: Tensor, lengths: Sequence[int], sequence: SequenceParallel, what: Callable[[], str]) -> Tensor:
    """The tokens of all ranks of this rank's share, [B, T of all ranks, n], from each rank's x [B, T, ranks, n]."""
    B, T, ranks, n = x.shape
    out = x.permute(2, 1, 0, 3)
    if sequence.in_group != tuple(range(ranks)):
        out = _in_order(out, _places(sequence.in_group))
    out = out.contiguous().view(ranks * T, B, n)
    arrived = x.new_empty(sum(lengths), B, n)
    theirs = [0] * ranks
    for rank, place in enumerate(sequence.in_group):
        theirs[place] = lengths[rank]
    if arrived.numel():
        with waiting(what):
            dist.all_to_all_single(arrived, out, theirs, [T] * ranks, group=sequence.group)
    if sequence.in_group != tuple(range(ranks)):
        parts = arrived.split(theirs)
        arrived = torch.cat([parts[place] for place in sequence.in_group])
    return arrived.transpose(0, 1)


def heads_to_tokens(x: Tensor, lengths: Sequence[int], sequence: SequenceParallel, what: Callable[[], str]) -> Tensor:
    """[B, T, ranks, n] from each rank's share of all tokens, x [B, T of all ranks, n]: `tokens_to_heads` in reverse."""
    B, _, n = x.shape
    ranks, T = sequence.size, lengths[sequence.rank]
    out, sent = x.transpose(0, 1), list(lengths)
    if sequence.in_group != tuple(range(ranks)):
        parts, order = out.split(sent), _places(sequence.in_group)
        out, sent = torch.cat([parts[rank] for rank in order]), [lengths[rank] for rank in order]
    arrived = x.new_empty(ranks, T, B, n)
    if x.numel():
        with waiting(what):
            dist.all_to_all_single(arrived.flatten(0, 1), out.contiguous(), [T] * ranks, sent, group=sequence.group)
    if sequence.in_group != tuple(range(ranks)):
        arrived = _in_order(arrived, sequence.in_group)
    return arrived.permute(2, 1, 0, 3)


def _places(in_group: Sequence[int]) -> list[int]:
    """Which rank of the sequence stands at each place of its group."""
    return sorted(range(len(in_group)), key=lambda rank: in_group[rank])


def _in_order(shares: Tensor, places: Sequence[int]) -> Tensor:
    """What ranks hold, [ranks, ...], in another order. A list as index would be a tensor that is copied to the device,
    and the host would wait for that."""
    return torch.stack([shares[place] for place in places])


def lengths_of(x: Tensor, sequence: SequenceParallel, what: Callable[[], str], *, dim: int = 1) -> tuple[int, ...]:
    """How many tokens each rank holds, where no layout tells: the host waits for an exchange of these numbers."""
    mine = torch.tensor([x.shape[dim]], device=x.device)
    sizes = torch.empty(sequence.size, 1, dtype=mine.dtype, device=x.device)
    with waiting(what):
        start_all_gather(sizes, mine, sequence.group).wait()
        found = sizes.flatten().tolist()
    return tuple(found[place] for place in sequence.in_group)


def gather_texts(text: str, group: ProcessGroup, what: Callable[[], str]) -> list[str]:
    """The text of every rank of a group, in its order."""
    with waiting(what):
        return texts_of_all(text, group)


def texts_of_all(text: str, group: ProcessGroup) -> list[str]:
    """`gather_texts` within a `waiting` of the caller's. (PyTorch's gather of objects unpickles what others send.)"""
    ranks, device = dist.get_world_size(group), device_of(group)
    mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    sizes = torch.empty(ranks, 1, dtype=torch.int64, device=device)
    start_all_gather(sizes, torch.tensor([len(mine)], device=device), group).wait()
    lengths = sizes.flatten().tolist()
    gathered = mine.new_empty(ranks, max(1, *lengths))
    start_all_gather(gathered, F.pad(mine, (0, gathered.shape[1] - len(mine))), group).wait()
    return [bytes(row[:length].tolist()).decode() for row, length in zip(gathered, lengths)]


def device_of(group: ProcessGroup) -> torch.device:
    """Where a tensor must lie that the group's backend sends: on the host, if it takes it from there."""
    types = [device.type for device in group._device_types]
    return torch.device("cpu" if "cpu" in types else types[0])


def connect(group: ProcessGroup | None, device_type: str, *, megabytes: int = 64) -> None:
    """Run each collective that averages gradients or gathers weights, from some bytes to so many MiB; collective, too.

    NCCL connects the ranks of a group anew for every way to run a collective (ring, tree, ...), when it first takes
    that way, which depends on the size. The host waits for it, and neither a timeout nor a watchdog ends that: a rank
    that comes alone, since the others have failed in the step before, would never end.
    """
    ranks = dist.get_world_size(group)
    averages = [dist.ReduceOp.SUM] + ([dist.ReduceOp.AVG] if device_type == "cuda" else [])  # gloo has no AVG
    numbers = 1
    while ranks > 1 and numbers <= megabytes * 2**18:
        part = torch.zeros(-(-numbers // ranks), device=device_type)
        whole = part.new_zeros(len(part) * ranks)
        with waiting("connecting the ranks that average gradients"):
            gather_flat(whole, part, group=group)
            for op in averages:
                dist.all_reduce(whole, op, group=group)
                scatter_sum_flat(part, whole, op, group=group)
        numbers *= 4
