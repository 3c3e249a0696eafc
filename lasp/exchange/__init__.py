"""How a state travels between ranks. Each schedule has a file of its own; all share `base`. See docs/exchange.md."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed import ProcessGroup

from lasp import recompute
from lasp.exchange import cost, horizon
from lasp.exchange.all_gather import all_gather
from lasp.exchange.base import (
    Fold,
    HeadRuns,
    Link,
    Pending,
    Running,
    RunningInWait,
    Schedule,
    StateMap,
    beside,
    put_heads,
    result,
    waiting,
)
from lasp.exchange.board import board_of
from lasp.exchange.direct import Turn, direct
from lasp.exchange.neighbour import neighbour
from lasp.exchange.pipeline import pipeline
from lasp.exchange.ring import ring
from lasp.mesh import SequenceParallel

__all__ = ["Fold", "HeadRuns", "Pending", "StateMap", "beside", "cost", "horizon", "start", "waiting"]

CHAIN, NEIGHBOUR = 0, 1  # tags: a message to the neighbour may overtake those of the chain


def start(
    local: StateMap,
    sequence: SequenceParallel,
    *,
    fold: Fold,
    reverse: bool = False,
    far: HeadRuns | None = None,
    units: int | None = None,
    ragged: bool = False,
    at_once: bool = False,
) -> Pending:
    """Begin to send what this rank's tokens do to a state; `wait()` gives the state that enters them.

    Every rank of the sequence must call it, in the same order and with the same options. In the recompute of a
    checkpoint nothing is sent: what the original forward received is there.

    Args:
        local: the maps of this rank's tokens.
        sequence: the ranks.
        fold: passes a state through maps; the arithmetic is the caller's.
        reverse: from the last rank to the first.
        far: the heads that must go through the chain (see `horizon`); None is all. The others go to the neighbour.
        units: the most maps that any rank has, for the all-gather, whose messages are equally long; None if all have
            as many as this one.
        ragged: whether `units` might differ between ranks, for lack of knowledge: then "auto" takes no all-gather.
        at_once: the caller computes nothing before it waits, and uses what enters before it starts another exchange: it
            may lie in the memory of another rank.
    """
    reception = None if reverse else recompute.reception(sequence.key)
    if reception is not None and reception.result is not None:
        return _Received(reception.result)
    traffic = sequence.traffic
    traffic.forward_exchanges += not reverse
    traffic.reverse_exchanges += reverse
    far = ((0, local.state.shape[2]),) if far is None else far
    units, kept = units or len(local.state), reception is not None and reception.kept
    choice = _choose(local, sequence, far, units, ragged)
    near = not far or sequence.size == 2
    traffic.schedule, traffic.blocks, traffic.predicted_seconds = choice.schedule, choice.blocks, choice.seconds
    if choice.schedule == "direct" and sequence.size > 1:
        nbytes = _state_bytes(local, local.all_heads) if near else _map_bytes(local, units)
        turn = Turn(board_of(sequence, nbytes, local.state.device), sequence, reverse)
        closing, first = [turn], sequence.neighbour(1 if reverse else -1) is None
        schedule = direct(local, turn, fold, units, near=near, borrow=at_once and not kept)
        inline = at_once and not first
    else:
        connect(sequence, local.state)
        hop, chain = (Link(sequence, reverse, tag) for tag in (NEIGHBOUR, CHAIN))
        closing, inline = [hop, chain], False
        schedule = _messages(local, hop, chain, fold, far, units, choice)
    running = (
        Running(schedule, closing, local, beside=not inline)
        if local.state.is_cuda
        else RunningInWait(schedule, closing)
    )
    return running if reception is None else _Receiving(running, reception)


def connect(sequence: SequenceParallel, like: Tensor) -> None:
    """Send a number to both neighbours, once for each group; a collective call.

    At the first message each way NCCL connects the two ranks. The host waits for that, and neither a timeout nor a
    watchdog ends it: a rank that died before its first reverse exchange would keep its neighbour waiting.
    """
    if sequence.group in _connected or sequence.size == 1:
        return
    assert sequence.group is not None
    number = StateMap(like.new_zeros(1, 1, 1, 1, 1), like.new_zeros(1, 1, 1, 1))
    for reverse in (False, True):
        link = Link(replace(sequence, validate="off"), reverse)  # whose traffic is not the layer's
        schedule = neighbour(number, link, lambda entering, state, log_decay: state[0])
        next(schedule)
        result(schedule)
        link.finish()
    _connected.add(sequence.group)


_connected: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


@dataclass(frozen=True)
class _Receiving:
    """An exchange whose result a recompute may need again."""

    pending: Pending
    reception: recompute.Reception

    def wait(self) -> Tensor:
        return self.reception.keep(self.pending.wait())


@dataclass(frozen=True)
class _Received:
    """An exchange that took place in the original forward."""

    state: Tensor

    def wait(self) -> Tensor:
        return self.state


def _messages(
    local: StateMap,
    hop: Link,
    chain: Link,
    fold: Fold,
    far: HeadRuns,
    units: int,
    choice: cost.Choice,
) -> Schedule:
    """The far heads as chosen, the others to the neighbour; both at the same time.

    Itself a schedule, so that what is made here is made on the stream that uses it.
    """
    near, sequence = horizon.others(far, local.state.shape[2]), hop.sequence
    if not far:
        return (yield from neighbour(local, hop, fold))
    if not near:
        return (yield from _through_all(local, chain, fold, units, choice))
    seconds = cost.predict("neighbour", _state_bytes(local, near), sequence.size, cost.network_of(sequence))
    sequence.traffic.predicted_seconds += seconds
    to_neighbour = neighbour(local.heads(near), hop, fold)
    through_all = _through_all(local.heads(far), chain, fold, units, choice)
    return (yield from _both(local, (near, to_neighbour), (far, through_all)))


def _choose(local: StateMap, sequence: SequenceParallel, far: HeadRuns, units: int, ragged: bool) -> cost.Choice:
    """The schedule that the sequence asks for; "auto" leaves it to the cost model."""
    network = cost.network_of(sequence)
    if not far:
        return cost.choose_near(sequence.exchange, _state_bytes(local, local.all_heads), network)
    state_bytes, heads = _state_bytes(local, far), local.state.shape[2]
    map_bytes = _map_bytes(local, units) * horizon.size_of(far) // heads
    if ragged and sequence.exchange == "auto":
        map_bytes = None
    return cost.choose(sequence.exchange, state_bytes, map_bytes, local.state.shape[3], sequence.size, network)


def _state_bytes(local: StateMap, heads: HeadRuns) -> int:
    return horizon.size_of(heads) * local.state[0, :, 0].numel() * local.state.element_size()


def _map_bytes(local: StateMap, units: int) -> int:
    return units * (local.state[0].numel() + local.log_decay[0].numel()) * local.state.element_size()


def _through_all(local: StateMap, link: Link, fold: Fold, units: int, choice: cost.Choice) -> Schedule:
    if choice.schedule == "all_gather" and link.sequence.size > 1:
        return all_gather(local, link.sequence, link.reverse, fold, units)
    if choice.schedule == "pipeline":
        return pipeline(local, link, fold, choice.blocks)
    return ring(local, link, fold)


def _both(local: StateMap, *parts: tuple[HeadRuns, Schedule]) -> Schedule:
    for _, schedule in parts:
        next(schedule)
    yield
    entering = local.zeros()
    for heads, schedule in parts:
        put_heads(entering, result(schedule), heads)
    return entering
