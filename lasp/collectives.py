"""Collectives: under names that PyTorch changes between the versions that we support, and a first time for each."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 deprecates all_gather_into_tensor and reduce_scatter_tensor for names that 2.11 lacks.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_all_gather(gathered: Tensor, mine: Tensor, group: ProcessGroup | None) -> dist.Work:
    """Begin to gather `mine` [...] of all ranks into `gathered` [ranks, ...]."""
    return _all_gather(gathered.flatten(0, 1), mine, group=group, async_op=True)  # type: ignore[return-value]


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
        _all_gather(whole, part, group=group)
        for op in averages:
            dist.all_reduce(whole, op, group=group)
            _reduce_scatter(part, whole, op, group=group)
        numbers *= 4
