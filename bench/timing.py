"""Times of what several ranks do together: aligned starts, interleaved repetitions, the slowest rank.

On a GPU the time is that of the streams, from a small all-reduce that aligns the ranks to the end of the call on the
caller's stream. A kernel that sleeps keeps the host ahead, so its launches do not count. The L2 cache is empty.
On a CPU it is the clock on the wall after a barrier.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

Key = TypeVar("Key")
HEAD_START = 8_000_000  # cycles that the GPU sleeps while the host queues the call: some 4 ms
L2_BYTES = 2**28


@dataclass(frozen=True)
class Time:
    """Milliseconds over the repetitions; of each repetition the slowest rank counts."""

    median: float
    low: float  # quartiles
    high: float

    @property
    def spread(self) -> float:
        """Distance of the quartiles, % of the median."""
        return 100 * (self.high - self.low) / self.median


def interleaved(
    cases: Mapping[Key, Callable[[], object]],
    device: torch.device,
    *,
    repetitions: int,
    group: ProcessGroup | None = None,
    warmup: int = 2,
) -> dict[Key, Time]:
    """Time every case once, then every case again, and so on. All ranks of the group call it with the same cases."""
    for call in cases.values():
        for _ in range(warmup):
            call()
    once = _on_gpu if device.type == "cuda" else _on_cpu
    mine = torch.tensor([[once(call, device, group) for call in cases.values()] for _ in range(repetitions)])
    slowest = mine.to(device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=group)
    return {name: summary(times) for name, times in zip(cases, slowest.T.tolist())}


def summary(times: list[float]) -> Time:
    """Median and quartiles; of a single time, that time."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return Time(statistics.median(times), low, high)


def _on_cpu(call: Callable[[], object], device: torch.device, group: ProcessGroup | None) -> float:
    dist.barrier(group=group)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _on_gpu(call: Callable[[], object], device: torch.device, group: ProcessGroup | None) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(L2_BYTES, dtype=torch.int8, device=device).zero_()
    torch.cuda._sleep(HEAD_START)
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end)


def queued(call: Callable[[], object], repetitions: int = 15) -> float:
    """Of calls on one GPU with an empty L2 cache, in ms, queued while it sleeps: the host's time does not count."""
    times = []
    for _ in range(2 + repetitions):  # the first ones compile
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(L2_BYTES, dtype=torch.int8, device="cuda").zero_()
        torch.cuda._sleep(HEAD_START)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def median(call: Callable[[], object], rep: int = 80) -> float:
    """Of calls on one GPU with an empty L2 cache, in ms, from so many milliseconds of them."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=rep, return_mode="median"))  # type: ignore[arg-type]


def copies() -> float:
    """GB/s of a copy on one GPU, read and written."""
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / median(lambda: b.copy_(a)) / 1e6
