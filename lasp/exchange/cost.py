"""How long an exchange takes by the alpha-beta model, and which schedule is therefore the best.

A message of n bytes takes alpha + n / beta: latency and bandwidth. Both are measured once for each group of ranks, for
messages to a neighbour and for the collective, and the ranks agree on the numbers; so all of them choose alike, call by
call, without a word and without waiting for a device.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lasp.exchange.collectives import start_all_gather
from lasp.mesh import EXCHANGES, SequenceParallel


@dataclass(frozen=True)
class Network:
    """Latencies in seconds, bandwidths in bytes a second; of the collective those of one of its P - 1 steps."""

    latency: float
    bandwidth: float
    collective_latency: float
    collective_bandwidth: float
    source: str  # "measured" or "published"


# Fitted to the collectives that ZeCO reports (arXiv 2507.01004) for 8 to 256 H100s and a state of 2 MiB: within 11% of
# its All-Scan and 30% of its all-gather.
PUBLISHED = Network(5.5e-6, 24e9, 5.5e-6, 64e9, "published")

# A hop of a chain waits for a multiprocessor of a card that computes meanwhile, and a collective does so once. On four
# H100s, alone as fast, the ring cost the operator 0.2 ms more (bench/results/2026-11-22_exchange_4xcuda.md).
UNDER_LOAD = 2.0


@dataclass(frozen=True)
class Choice:
    """A schedule, its blocks (1 but for the pipeline), and how long it should take."""

    schedule: str
    blocks: int
    seconds: float


def predict(schedule: str, bytes_per_rank: int, ranks: int, network: Network, *, blocks: int | None = None) -> float:
    """Seconds from the start of an exchange until the last of P `ranks` has its state.

    With n bytes a rank, alpha and beta of messages to a neighbour, alpha' and beta' of a step of the collective::

        neighbour   alpha + n / beta
        ring        (P - 1) (alpha + n / beta)
        pipeline    (P - 2 + B) (alpha + n / (B beta))            B blocks; None takes the best number
        all_gather  (P - 1) (alpha' + n / beta')

    The fold, some microseconds, is left out.
    """
    if ranks < 2:
        return 0.0
    if schedule == "all_gather":
        return (ranks - 1) * (network.collective_latency + bytes_per_rank / network.collective_bandwidth)
    steps, size = {"neighbour": (1, bytes_per_rank), "ring": (ranks - 1, bytes_per_rank)}.get(schedule, (0, 0.0))
    if schedule == "pipeline":
        blocks = blocks or best_blocks(bytes_per_rank, ranks, network)
        steps, size = ranks - 2 + blocks, bytes_per_rank / blocks
    if steps == 0:
        raise ValueError(f"schedule must be one of {('neighbour', *EXCHANGES[1:])}, got {schedule!r}")
    return steps * (network.latency + size / network.bandwidth)


def best_blocks(bytes_per_rank: int, ranks: int, network: Network, *, most: int = 2**31) -> int:
    """The B for which the pipeline is fastest: its time has its minimum at sqrt((P - 2) n / (alpha beta))."""
    exact = math.sqrt(max(0, ranks - 2) * bytes_per_rank / (network.latency * network.bandwidth))
    return max(1, min(round(exact), most))


@lru_cache(maxsize=256)
def choose(exchange: str, state_bytes: int, map_bytes: int | None, rows: int, ranks: int, network: Network) -> Choice:
    """The schedule that is asked for, or for "auto" the fastest, where a chain counts `UNDER_LOAD` times.

    `state_bytes` is what a rank sends in a chain, `map_bytes` what it gives to the all-gather, which is not considered
    if that is None. `rows` are those of a state, which the pipeline cuts.
    """
    blocks = best_blocks(state_bytes, ranks, network, most=rows)
    blocks = -(-rows // -(-rows // blocks))  # blocks of whole rows
    choices = [
        Choice("ring", 1, predict("ring", state_bytes, ranks, network)),
        Choice("pipeline", blocks, predict("pipeline", state_bytes, ranks, network, blocks=blocks)),
    ]
    if map_bytes is not None:
        choices.append(Choice("all_gather", 1, predict("all_gather", map_bytes, ranks, network)))
    allowed = (c for c in choices if exchange in ("auto", c.schedule))
    return min(allowed, key=lambda c: c.seconds if c.schedule == "all_gather" else UNDER_LOAD * c.seconds)


_measured: weakref.WeakKeyDictionary[ProcessGroup, Network] = weakref.WeakKeyDictionary()


def network_of(sequence: SequenceParallel) -> Network:
    """What was measured between the ranks; what is published, if nothing was."""
    return PUBLISHED if sequence.group is None else _measured.get(sequence.group, PUBLISHED)


# Bytes and times; the first time is not counted. NVLink needs more for its bandwidth to show than its latency does.
SMALL, LARGE, LARGE_ON_GPUS, REPEATS = 2**16, 2**22, 2**26, 4
GATHERED = 2**28  # bytes that a gather of the large message may need


def measure(sequence: SequenceParallel) -> Network:
    """Measure the group, once; a collective call. The slowest rank counts, and all get the same numbers."""
    assert sequence.group is not None
    if sequence.group not in _measured:
        nccl = dist.get_backend(sequence.group) == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
        sizes = (SMALL, max(2 * SMALL, min(LARGE_ON_GPUS if nccl else LARGE, GATHERED // sequence.size)))
        times = [_time(op, size, sequence, device) for op in (_pass_along, _gather) for size in sizes]
        agreed = torch.tensor(times, dtype=torch.float64, device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=sequence.group)
        steps = sequence.size - 1
        chain_small, chain_large, small, large = (seconds / steps for seconds in agreed.tolist())
        chain, gather = _line(sizes, chain_small, chain_large), _line(sizes, small, large)
        _measured[sequence.group] = Network(*chain, *gather, "measured")
    return _measured[sequence.group]


def _line(sizes: tuple[int, int], small: float, large: float) -> tuple[float, float]:
    """Latency and bandwidth from the times of two sizes. Noise must not make either of them negative."""
    per_byte = max(large - small, 0.01 * large) / (sizes[1] - sizes[0])
    return max(small - sizes[0] * per_byte, 0.01 * small), 1 / per_byte


def _time(
    op: Callable[[Tensor, SequenceParallel], None], size: int, sequence: SequenceParallel, device: torch.device
) -> float:
    """Seconds, from when all ranks are ready until this one is done."""
    message, ready = torch.zeros(size // 4, device=device), torch.zeros(1, device=device)
    once = _seconds_on_gpu if device.type == "cuda" else _seconds_on_cpu
    return min([once(lambda: op(message, sequence), ready, sequence) for _ in range(1 + REPEATS)][1:])


def _seconds_on_cpu(run: Callable[[], None], ready: Tensor, sequence: SequenceParallel) -> float:
    dist.all_reduce(ready, group=sequence.group)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_gpu(run: Callable[[], None], ready: Tensor, sequence: SequenceParallel) -> float:
    """Of the stream, not of the host: the card sleeps while the host queues everything."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(4_000_000)  # cycles, some 2 ms
    dist.all_reduce(ready, group=sequence.group)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _pass_along(message: Tensor, sequence: SequenceParallel) -> None:
    source, target = sequence.neighbour(-1), sequence.neighbour(1)
    if source is not None:
        dist.irecv(message, group=sequence.group, group_src=source).wait()  # type: ignore[union-attr]
    if target is not None:
        dist.isend(message, group=sequence.group, group_dst=target).wait()  # type: ignore[union-attr]


def _gather(message: Tensor, sequence: SequenceParallel) -> None:
    gathered = message.new_empty(sequence.size, 1, message.numel())
    start_all_gather(gathered, message.unsqueeze(0), sequence.group).wait()
