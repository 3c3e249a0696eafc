"""How long an exchange takes by the alpha-beta model, and which schedule is therefore the best.

A message of n bytes takes alpha + n / beta: latency and bandwidth. Both are measured once for each group of ranks, for
messages to a neighbour, for the collective and for memory that is read directly, and the ranks agree on the numbers; so
all of them choose alike, call by call, without a word and without waiting for a device.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lasp.collectives import start_all_gather
from lasp.exchange.board import board_of, obstacle
from lasp.mesh import EXCHANGES, SequenceParallel


@dataclass(frozen=True)
class Network:
    """Latencies in seconds, bandwidths in bytes a second; of the collective those of one of its P - 1 steps."""

    latency: float
    bandwidth: float
    collective_latency: float
    collective_bandwidth: float
    source: str  # "measured" or "published"
    direct_latency: float = math.inf  # of a meeting and a read; infinite where ranks cannot read each other's memory
    direct_bandwidth: float = math.inf


# Fitted to the collectives that ZeCO reports (arXiv 2507.01004) for 8 to 256 H100s and a state of 2 MiB: within 11% of
# its All-Scan and 30% of its all-gather.
PUBLISHED = Network(5.5e-6, 24e9, 5.5e-6, 64e9, "published")

# A message of NCCL's waits for room on a card that computes meanwhile, in a chain at every hop. The kernel by which
# ranks meet that read each other's memory finds it: beside an operator that takes 0.55 ms, an all-gather of 1 MiB was
# there after 0.17 ms instead of 0.02, a meeting and a read after 0.05 (two H100s).
UNDER_LOAD = 2.0


@dataclass(frozen=True)
class Choice:
    """A schedule, its blocks (1 but for the pipeline), and how long it should take."""

    schedule: str
    blocks: int
    seconds: float


def predict(schedule: str, bytes_per_rank: int, ranks: int, network: Network, *, blocks: int | None = None) -> float:
    """Seconds from the start of an exchange until the last of P `ranks` has its state.

    With n bytes a rank, alpha and beta of messages to a neighbour, alpha' and beta' of a step of the collective,
    alpha" and beta" of memory that is read directly::

        neighbour   alpha + n / beta
        ring        (P - 1) (alpha + n / beta)
        pipeline    (P - 2 + B) (alpha + n / (B beta))            B blocks; None takes the best number
        all_gather  (P - 1) (alpha' + n / beta')
        direct      alpha" + (P - 1) n / beta"

    The fold, some microseconds, is left out.
    """
    if ranks < 2:
        return 0.0
    if schedule == "all_gather":
        return (ranks - 1) * (network.collective_latency + bytes_per_rank / network.collective_bandwidth)
    if schedule == "direct":
        return network.direct_latency + (ranks - 1) * bytes_per_rank / network.direct_bandwidth
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
def choose(
    exchange: str,
    state_bytes: int,
    map_bytes: int | None,
    direct_bytes: int | None,
    rows: int,
    ranks: int,
    network: Network,
) -> Choice:
    """The schedule that is asked for, or for "auto" the fastest beside kernels that fill the card.

    `state_bytes` is what a rank sends in a chain, `map_bytes` what it gives to the all-gather, `direct_bytes` what it
    lets the others read; None: that is not considered. `rows` are those of a state, which the pipeline cuts.
    """
    blocks = best_blocks(state_bytes, ranks, network, most=rows)
    blocks = -(-rows // -(-rows // blocks))  # blocks of whole rows
    choices = [
        Choice("ring", 1, predict("ring", state_bytes, ranks, network)),
        Choice("pipeline", blocks, predict("pipeline", state_bytes, ranks, network, blocks=blocks)),
    ]
    for name, size in (("all_gather", map_bytes), ("direct", direct_bytes)):
        if size is not None:
            choices.append(Choice(name, 1, predict(name, size, ranks, network)))
    allowed = (c for c in choices if exchange in ("auto", c.schedule))
    return min(allowed, key=lambda choice: _beside_kernels(choice, ranks - 1))


def choose_near(exchange: str, state_bytes: int, network: Network) -> Choice:
    """Where every rank needs the state of its neighbour only: a message, or for "direct" or if it is faster, a read."""
    choices = [Choice(name, 1, predict(name, state_bytes, 2, network)) for name in ("neighbour", "direct")]
    if exchange == "auto":
        return min(choices, key=lambda choice: _beside_kernels(choice, 1))
    return choices[exchange == "direct"]


def _beside_kernels(choice: Choice, hops: int) -> float:
    """By how long it delays a busy card, roughly."""
    if choice.schedule == "direct":
        return choice.seconds
    return choice.seconds * UNDER_LOAD * (UNDER_LOAD if choice.schedule in ("ring", "pipeline") and hops > 1 else 1)


_measured: weakref.WeakKeyDictionary[ProcessGroup, Network] = weakref.WeakKeyDictionary()


def network_of(sequence: SequenceParallel) -> Network:
    """What was measured between the ranks; what is published, if nothing was."""
    return PUBLISHED if sequence.group is None else _measured.get(sequence.group, PUBLISHED)


# Bytes and times; the first time is not counted. NVLink needs more for its bandwidth to show than its latency does.
SMALL, LARGE, LARGE_ON_GPUS, REPEATS = 2**16, 2**22, 2**26, 4
ON_BOARD = 2**22  # the large message where memory is read directly, which must be kept as large as that
GATHERED = 2**28  # bytes that a gather of the large message may need


def measure(sequence: SequenceParallel) -> Network:
    """Measure the group, once; a collective call. The slowest rank counts, and all get the same numbers."""
    assert sequence.group is not None
    if sequence.group not in _measured:
        device = _device_of(sequence)
        nccl = device.type == "cuda"
        large = max(2 * SMALL, min(LARGE_ON_GPUS if nccl else LARGE, GATHERED // sequence.size))
        cases = [(op, size) for op in (_pass_along, _gather) for size in (SMALL, large)]
        # On CPUs a meeting is as slow as a message, and nothing is hidden: "auto" does not take it there.
        if (nccl or sequence.exchange == "direct") and not obstacle(sequence, device, ON_BOARD):
            cases += [(_read, size) for size in (SMALL, ON_BOARD)]
        times = [_time(op, size, sequence, device) for op, size in cases]
        agreed = torch.tensor(times, dtype=torch.float64, device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=sequence.group)
        steps, seconds = sequence.size - 1, agreed.tolist()
        chain = _line((SMALL, large), seconds[:2], steps)
        gather = _line((SMALL, large), seconds[2:4], steps)
        direct = _line((SMALL, ON_BOARD), seconds[4:], steps) if seconds[4:] else (math.inf, math.inf)
        direct_latency = direct[0] * steps  # there is one meeting, whatever the number of ranks
        _measured[sequence.group] = Network(*chain, *gather, "measured", direct_latency, direct[1])
    return _measured[sequence.group]


def forget_direct(sequence: SequenceParallel) -> None:
    """Ranks cannot read each other's memory after all; to be called on all of them."""
    assert sequence.group is not None
    _measured[sequence.group] = replace(network_of(sequence), direct_latency=math.inf, direct_bandwidth=math.inf)


def require_direct(sequence: SequenceParallel) -> None:
    """Raise `ValueError` on every rank if they cannot read each other's memory; a collective call, the first time."""
    board_of(sequence, SMALL, _device_of(sequence))


def _device_of(sequence: SequenceParallel) -> torch.device:
    """On which the group's messages lie."""
    nccl = dist.get_backend(sequence.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def _line(sizes: tuple[int, int], seconds: list[float], steps: int) -> tuple[float, float]:
    """Latency and bandwidth of a step, from the times of so many with messages of two sizes.

    Noise must not make either of them negative.
    """
    small, large = (x / steps for x in seconds)
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


def _read(message: Tensor, sequence: SequenceParallel) -> None:
    """What `direct` does; the last rank reads most."""
    board = board_of(sequence, ON_BOARD, message.device)
    board.begin()
    board.mine(message.shape, message.dtype).copy_(message)
    board.meet()
    before = [sequence.rank_in_group(place) for place in range(sequence.rank)]
    if before:
        torch.cat([board.view(rank, message.shape, message.dtype) for rank in before])
    board.end()


def _gather(message: Tensor, sequence: SequenceParallel) -> None:
    gathered = message.new_empty(sequence.size, 1, message.numel())
    start_all_gather(gathered, message.unsqueeze(0), sequence.group).wait()
