"""How much memory a step takes, and how much there is."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Used:
    """What a run took at most beside what was there before, in bytes."""

    bytes = 0


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[Used]:
    """Around a forward and its backward. On a GPU the allocator's peak (whose statistics begin anew), on a CPU what
    autograd keeps from forward to backward."""
    used = Used()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield used
        used.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if x.layout is torch.strided:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield used
    used.bytes = sum(seen.values())


def free_bytes(device: torch.device, sharing: int) -> int:
    """That may be taken; of a host each of so many ranks may take its part."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _free_of_host() // sharing


def _free_of_host() -> int:
    """What the system says is available; where it does not (macOS), half of all that there is."""
    if sys.platform == "linux":
        with open("/proc/meminfo") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(ImportError):
        import psutil

        return psutil.virtual_memory().available
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    raise RuntimeError(
        f"the free memory of this machine is not known, on {sys.platform}: pip install psutil, or say how many tokens "
        "a segment has (segment=...)"
    )


def bytes_of_training(parameters: Iterable[Tensor]) -> int:
    """What a first step will take for good: gradients that are not there yet, and with them the two moments of Adam."""
    missing = [p for p in parameters if p.requires_grad and p.grad is None]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in missing]
    return 3 * sum(p.nbytes for p in local)
