"""How fast the network between the ranks is, and which schedule is therefore the best.

A message of n bytes takes alpha + n / beta: latency and bandwidth. Both are measured once for each group of ranks, for
messages to a neighbour, for the collective and for memory that is read directly, and the ranks agree on the numbers; so
all of them choose alike, call by call, without a word and without waiting for a device. What a schedule makes of these
numbers is in its own file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.exchange.base import Network, Schedule, Sizes
from lasp.exchange.board import board_of, obstacle
from lasp.exchange.neighbour import NEIGHBOUR
from lasp.ranks import SCHEDULES, SequenceParallel
from lasp.ranks.collectives import start_all_gather

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

    schedule: Schedule
    blocks: int
    seconds: float


@lru_cache(maxsize=256)
def choose(
    asked: Schedule | None, sizes: Sizes, ranks: int, network: Network, *, near: bool = False, hop: int = 0
) -> Choice:
    """The schedule that is asked for, or (None) the fastest beside kernels that fill the card.

    `near`: every rank needs the state of its neighbour only. Then it is a message, or a read of two ranks' memory.
    `hop`: bytes of those heads that need no more, which go to the neighbour beside a schedule that does not read.
    """
    if near:
        reads = [each for each in SCHEDULES.values() if each.reads]
        candidates = [NEIGHBOUR, *reads] if asked is None else [asked] if asked.reads else [NEIGHBOUR]
        ranks = min(ranks, 2)
    else:
        candidates = list(SCHEDULES.values()) if asked is None else [asked]

    def choice(each: Schedule) -> Choice:
        beside = NEIGHBOUR.seconds(replace(sizes, state=hop), ranks, network) if hop and not each.reads else 0.0
        return Choice(each, each.blocks(sizes, ranks, network), each.seconds(sizes, ranks, network) + beside)

    # Of equals the one in which fewer ranks wait for each other.
    return min(map(choice, candidates), key=lambda found: (_beside_kernels(found, ranks - 1), found.schedule.gathers))


def _beside_kernels(choice: Choice, hops: int) -> float:
    """Roughly by how long it delays a busy card."""
    if choice.schedule.reads:
        return choice.seconds
    return choice.seconds * UNDER_LOAD * (UNDER_LOAD if choice.schedule.waits_per_hop and hops > 1 else 1)


def network_of(sequence: SequenceParallel) -> Network:
    """What was measured between the ranks; what is published, if nothing was."""
    return PUBLISHED if sequence.group is None else sequence.peers.network or PUBLISHED


# Bytes and times; the first time is not counted. NVLink needs more for its bandwidth to show than its latency does.
SMALL, LARGE, LARGE_ON_GPUS, REPEATS = 2**16, 2**22, 2**26, 4
ON_BOARD = 2**22  # the large message where memory is read directly, which must be kept as large as that
GATHERED = 2**28  # bytes that a gather of the large message may need


def measure(sequence: SequenceParallel) -> Network:
    """Measure the group, once; a collective call. The slowest rank counts, and all get the same numbers."""
    if sequence.peers.network is None:
        device = _device_of(sequence)
        nccl = device.type == "cuda"
        large = max(2 * SMALL, min(LARGE_ON_GPUS if nccl else LARGE, GATHERED // sequence.size))
        cases = [(op, size) for op in (_pass_along, _gather) for size in (SMALL, large)]
        # On CPUs a meeting is as slow as a message, and nothing is hidden: "auto" does not take it there.
        reads = sequence.schedule is not None and sequence.schedule.reads
        if (nccl or reads) and not obstacle(sequence, device, ON_BOARD):
            cases += [(_read, size) for size in (SMALL, ON_BOARD)]
        times = [_time(op, size, sequence, device) for op, size in cases]
        agreed = torch.tensor(times, dtype=torch.float64, device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=sequence.group)
        steps, seconds = sequence.size - 1, agreed.tolist()
        chain = _line((SMALL, large), seconds[:2], steps)
        gather = _line((SMALL, large), seconds[2:4], steps)
        direct = _line((SMALL, ON_BOARD), seconds[4:], steps) if seconds[4:] else (math.inf, math.inf)
        direct_latency = direct[0] * steps  # there is one meeting, whatever the number of ranks
        sequence.peers.network = Network(*chain, *gather, "measured", direct_latency, direct[1])
    return sequence.peers.network


def forget_direct(sequence: SequenceParallel) -> None:
    """Ranks cannot read each other's memory after all; to be called on all of them."""
    sequence.peers.network = replace(network_of(sequence), direct_latency=math.inf, direct_bandwidth=math.inf)


def require_direct(sequence: SequenceParallel) -> None:
    """Raise `ValueError` on every rank if they cannot read each other's memory; a collective call, the first time."""
    board_of(sequence, SMALL, _device_of(sequence))


def _device_of(sequence: SequenceParallel) -> torch.device:
    """The device on which the group's messages lie."""
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
    """Seconds of the stream, not of the host: the card sleeps while the host queues everything."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(4_000_000)  # cycles, some 2 ms
    dist.all_reduce(ready, group=sequence.group)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _pass_along(message: Tensor, sequence: SequenceParallel) -> None:
    source, target = sequence.prev_rank, sequence.next_rank
    if source is not None:
        sequence.peers.wait(dist.irecv(message, group=sequence.group, group_src=source))  # type: ignore[arg-type]
    if target is not None:
        sequence.peers.wait(dist.isend(message, group=sequence.group, group_dst=target))  # type: ignore[arg-type]


def _read(message: Tensor, sequence: SequenceParallel) -> None:
    """What `direct` does; the last rank reads most."""
    board = board_of(sequence, ON_BOARD, message.device)
    board.begin()
    board.mine(message.shape, message.dtype).copy_(message)
    board.meet()
    before = [sequence.in_group[place] for place in range(sequence.rank)]
    if before:
        torch.cat([board.view(rank, message.shape, message.dtype) for rank in before])
    board.end()


def _gather(message: Tensor, sequence: SequenceParallel) -> None:
    gathered = message.new_empty(sequence.size, 1, message.numel())
    start_all_gather(gathered, message.unsqueeze(0), sequence.group).wait()
