"""How a state travels between ranks. Each schedule has a file of its own; all share `base`. See docs/exchange.md."""

from __future__ import annotations

import warnings
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lasp.exchange import all_gather, direct, horizon, pipeline, ring
from lasp.exchange import cost as cost
from lasp.exchange.base import (
    Inline,
    Job,
    Link,
    Network,
    Pending,
    Schedule,
    Sizes,
    Terms,
    Transfer,
    beside,
    heads_in,
    queue,
    result,
)
from lasp.exchange.board import board_of, has_room
from lasp.exchange.cost import PUBLISHED
from lasp.exchange.direct import Turn
from lasp.exchange.maps import Fold, HeadRuns, StateMap, forgetting, identity, put_heads
from lasp.exchange.neighbour import NEIGHBOUR
from lasp.exchange.ring import Ring
from lasp.ranks import SequenceParallel, Traffic, waiting

__all__ = [
    "Fold", "HeadRuns", "Job", "Link", "Pending", "StateMap", "Terms", "all_gather", "beside", "connect", "cost",
    "count_exchange", "direct", "forgetting", "horizon", "identity", "kind_of", "pipeline", "queue", "ring", "start",
]  # fmt: skip

FORWARD = Terms()
CHAIN, HOP = 0, 1  # tags: a message to the neighbour may overtake those of the chain
_RING = Ring()  # of one rank, where nothing is sent


def start(
    local: StateMap, sequence: SequenceParallel, *, fold: Fold, terms: Terms = FORWARD, operator: str = "state"
) -> Pending:
    """Begin to send what this rank's tokens do to a state; `wait()` gives the state that enters them.

    Every rank of the sequence must call it, in the same order and on the same terms; the first time it measures the
    network, if the schedule is to be chosen.

    Args:
        local: the maps of this rank's tokens.
        sequence: the ranks.
        fold: passes a state through maps; the arithmetic is the caller's.
        terms: see `Terms`.
        operator: under which name `sequence` counts it.
    """
    traffic = sequence.by_operator.get(operator) or sequence.traffic_of(operator)
    count_exchange(sequence, traffic, reverse=terms.reverse)
    if sequence.size > 1:
        if not sequence.peers.connected:
            connect(sequence, local.state)
        if sequence.schedule is None and sequence.peers.network is None:
            _measure(sequence, local.state)
    route = _route(local, sequence, terms)
    units, near = terms.units or local.state.shape[0], not route.far or sequence.size == 2
    job = Job(local, sequence, traffic, fold, units, near, terms)
    board = None
    if route.schedule.reads and sequence.size > 1:
        board = _board(job, _map_bytes(local, units, near=near))
        if board is None:  # no longer, on any rank
            route = _route(local, sequence, terms)
    traffic.schedule, traffic.blocks, traffic.predicted_seconds = route.schedule.name, route.blocks, route.seconds
    inputs = (local.state,) if local.transition is None else (local.state, local.transition)
    if board is not None:
        turn = Turn(board, job)
        # The first rank waits for nobody, so its own stream should not wait for the others to meet.
        waits = (sequence.next_rank if terms.reverse else sequence.prev_rank) is not None
        return queue(route.schedule.run(job, turn, 1), [turn], inputs, beside=not (terms.at_once and waits))
    schedule = route.schedule if sequence.size > 1 else _RING
    if not route.hop:
        link = Link(job, CHAIN)
        return queue(schedule.run(job, link, route.blocks), [link], inputs, beside=True)
    links = [Link(job, CHAIN), Link(job, HOP)]
    return queue(_both_ways(job, links, schedule, route), links, inputs, beside=True)


def count_exchange(sequence: SequenceParallel, traffic: Traffic, *, reverse: bool) -> None:
    """Count it in the layer's traffic and, unless `validate` is "off", in what ranks compare (`lasp.checks`)."""
    if reverse:
        traffic.reverse_exchanges += 1
    else:
        traffic.forward_exchanges += 1
    if sequence.size > 1 and sequence.validate == "first":
        peers = sequence.peers
        peers.exchanges[sequence.name, reverse] += 1
        peers.order = zlib.crc32((b"-" if reverse else b"+") + sequence.name.encode(), peers.order)


def kind_of(local: StateMap, sequence: SequenceParallel, terms: Terms) -> tuple[tuple[str, object], ...]:
    """All that decides how many messages `start` makes of these maps, and how long they are; the same on every rank."""
    state, schedule = local.state, sequence.schedule
    kind = (
        ("state", tuple(state.shape[1:])),
        ("dtype", state.dtype),
        ("far heads", terms.far),
        ("reverse", terms.reverse),
    )
    # Elsewhere the number of maps may be a rank's own, and what else belongs to a map stays there.
    if not terms.ragged if schedule is None else schedule.needs_equal_lengths(sequence.size):
        kind += (("maps", terms.units or len(state)), ("numbers of a map", local.map_numbers))
    return kind


@dataclass(frozen=True)
class _Route:
    """How a state goes: by which schedule, and with which heads."""

    schedule: Schedule
    blocks: int
    seconds: float
    far: HeadRuns  # by this schedule
    hop: HeadRuns  # to the neighbour beside it; none where the schedule takes all


def _route(local: StateMap, sequence: SequenceParallel, terms: Terms) -> _Route:
    """Kept for calls that are alike, as long as the network is the same."""
    state, transition = local
    key = (state.shape, None if transition is None else transition.shape, state.dtype, terms)
    network = PUBLISHED if sequence.group is None else sequence.peers.network or PUBLISHED
    known = sequence.kept.get(key)
    if known is None or known[0] is not network:
        if len(sequence.kept) > KEPT:
            sequence.kept.clear()
        known = sequence.kept[key] = (network, _choose(local, sequence, terms, network))
    return known[1]


KEPT = 256  # of a layer: packed sequences may be others at every step


def _choose(local: StateMap, sequence: SequenceParallel, terms: Terms, network: Network) -> _Route:
    far = local.all_heads if terms.far is None else terms.far
    heads, ranks, itemsize = local.state.shape[2], sequence.size, local.state.element_size()
    columns, state = local.state.shape[4], local.state_numbers * itemsize
    if not far:
        choice = cost.choose(sequence.schedule, Sizes(state, None, state, columns), ranks, network, near=True)
        return _Route(choice.schedule, choice.blocks, choice.seconds, far, ())
    units = terms.units or local.state.shape[0]
    gathered: int | None = _map_bytes(local, units, near=False) * heads_in(far) // heads
    read: int | None = _map_bytes(local, units, near=ranks == 2)
    if terms.ragged and sequence.schedule is None:
        gathered, read = None, read if ranks == 2 else None
    sizes = Sizes(state * heads_in(far) // heads, gathered, read, columns)
    choice = cost.choose(sequence.schedule, sizes, ranks, network, hop=state - sizes.state)
    hop = () if choice.schedule.reads else horizon.others(far, heads)
    return _Route(choice.schedule, choice.blocks, choice.seconds, far, hop)


def _map_bytes(local: StateMap, units: int, *, near: bool) -> int:
    """What a rank gives: a state for its neighbour, or all maps of all heads."""
    return (local.state_numbers if near else units * local.map_numbers) * local.state.element_size()


def _both_ways(job: Job, links: list[Link], schedule: Schedule, route: _Route) -> Transfer:
    """The far heads as chosen, the others to the neighbour; both at the same time.

    Itself a schedule, so that what is made here is made on the stream that uses it.
    """
    far = schedule.run(replace(job, local=job.local.heads(route.far)), links[0], route.blocks)
    hop = NEIGHBOUR.run(replace(job, local=job.local.heads(route.hop)), links[1], 1)
    for steps in (hop, far):
        next(steps)
    yield
    entering = job.local.zeros()
    for heads, steps in ((route.hop, hop), (route.far, far)):
        put_heads(entering, result(steps), heads)
    return entering


def _board(job: Job, size: int) -> Any:
    """None where "auto" finds that ranks lack the memory after all; from then on it does not take "direct"."""
    sequence = job.sequence
    _not_in_capture(job.local.state, has_room(sequence, size), "makes its memory")
    try:
        with waiting(job.what):
            return board_of(sequence, size, job.local.state.device)
    except ValueError as error:
        if sequence.schedule is not None:
            raise
        warnings.warn(f'{error}. exchange="auto" takes messages from now on', stacklevel=2)
        cost.forget_direct(sequence)
        return None


def connect(sequence: SequenceParallel, like: Tensor) -> None:
    """Send a number to both neighbours; a collective call, once for each group, and never for a schedule that reads.

    At the first message each way NCCL connects the two ranks. The host waits for that, and neither a
    timeout nor a watchdog ends it: a rank that died before its first reverse exchange would keep its neighbour waiting.
    """
    peers, schedule = sequence.peers, sequence.schedule
    if schedule is not None and schedule.reads:  # no message will follow
        return
    _not_in_capture(like, False, "connects the ranks")
    number = StateMap(like.new_zeros(1, 1, 1, 1, 1))
    for reverse in (False, True):  # counted as nobody's traffic
        job = Job(number, sequence, Traffic(), _first_state, 1, True, Terms(reverse))
        link = Link(job)
        Inline(NEIGHBOUR.run(job, link, 1), [link])
    peers.connected = True


def _measure(sequence: SequenceParallel, like: Tensor) -> None:
    """For "auto", the first time; a collective call."""
    if not sequence.peers.fake:
        _not_in_capture(like, False, "measures the network")
        with waiting(f"layer {sequence.name!r}: the measurement of the network"):
            cost.measure(sequence)


def _first_state(entering: Tensor | None, state: Tensor, transition: Tensor | None) -> Tensor:
    return state[0]


def _not_in_capture(x: Tensor, done: bool, what: str) -> None:
    if not done and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"the first exchange {what}: make one before a CUDA graph is captured")
