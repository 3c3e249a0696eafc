"""Collectives whose name in PyTorch changes between the versions that we support."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 deprecates all_gather_into_tensor for a name that 2.11 lacks.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def start_all_gather(gathered: Tensor, mine: Tensor, group: ProcessGroup | None) -> dist.Work:
    """Begin to gather `mine` [...] of all ranks into `gathered` [ranks, ...]."""
    return _all_gather(gathered.flatten(0, 1), mine, group=group, async_op=True)  # type: ignore[return-value]
