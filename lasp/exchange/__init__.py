"""How a state travels between ranks. Each schedule has a file of its own; all share `base`. See docs/exchange.md."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lasp import recompute
from lasp.exchange import cost, horizon
from lasp.exchange.all_gather import all_gather
from lasp.exchange.base import (
    Fold,
    HeadRuns,
    Link,
    Pending,
    RunningBeside,
    RunningInWait,
    Schedule,
    StateMap,
    put_heads,
    result,
    waiting,
)
from lasp.exchange.neighbour import neighbour
from lasp.exchange.pipeline import pipeline
from lasp.exchange.ring import ring
from lasp.mesh import SequenceParallel

__all__ = ["Fold", "HeadRuns", "Pending", "StateMap", "cost", "horizon", "start", "waiting"]

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
    goes_on: bool = False,
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
        goes_on: this is another part of the exchange that the call before began, for the count of exchanges.
    """
    reception = None if reverse else recompute.reception(sequence.key)
    if reception is not None and reception.result is not None:
        return _Received(reception.result)
    traffic = sequence.traffic
    traffic.forward_exchanges += not (reverse or goes_on)
    traffic.reverse_exchanges += reverse and not goes_on
    if not goes_on:
        traffic.schedule, traffic.blocks, traffic.predicted_seconds = "", 1, 0.0
    links: list[Link] = []
    schedule = _schedule(local, sequence, fold, reverse, far, units or len(local.state), ragged, links)
    pending = RunningBeside(schedule, links, local) if local.state.is_cuda else RunningInWait(schedule, links)
    return pending if reception is None else _Receiving(pending, reception)


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


def _schedule(
    local: StateMap,
    sequence: SequenceParallel,
    fold: Fold,
    reverse: bool,
    far: HeadRuns | None,
    units: int,
    ragged: bool,
    links: list[Link],
) -> Schedule:
    """Of the far heads as chosen, of the others the neighbour's; of both at once, if there are both.

    Itself a schedule, so that what is made here is made on the stream that uses it.
    """
    heads = local.state.shape[2]
    far = ((0, heads),) if far is None else far
    near = horizon.others(far, heads)
    chain, hop = (Link(sequence, reverse, tag) for tag in (CHAIN, NEIGHBOUR))
    links += [hop, chain]
    if not near:
        return (yield from _through_all(local, chain, fold, reverse, units, ragged))
    size = horizon.size_of(near) * local.state[0, :, 0].numel() * local.state.element_size()
    seconds = cost.predict("neighbour", size, sequence.size, cost.network_of(sequence))
    _tell(sequence, cost.Choice("neighbour", 1, seconds))
    to_neighbour = neighbour(local.heads(near), hop, fold)
    if not far:
        return (yield from to_neighbour)
    through_all = _through_all(local.heads(far), chain, fold, reverse, units, ragged)
    return (yield from _both(local, (near, to_neighbour), (far, through_all)))


def _through_all(local: StateMap, link: Link, fold: Fold, reverse: bool, units: int, ragged: bool) -> Schedule:
    """The schedule that the sequence asks for; "auto" leaves it to the cost model."""
    sequence, itemsize = link.sequence, local.state.element_size()
    state_bytes = local.state[0].numel() * itemsize
    map_bytes = units * (state_bytes + local.log_decay[0].numel() * itemsize)
    if ragged and sequence.exchange == "auto":
        map_bytes = None
    network = cost.network_of(sequence)
    choice = cost.choose(sequence.exchange, state_bytes, map_bytes, local.state.shape[3], sequence.size, network)
    _tell(sequence, choice)
    if choice.schedule == "all_gather" and sequence.size > 1:
        return all_gather(local, sequence, reverse, fold, units)
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


def _tell(sequence: SequenceParallel, choice: cost.Choice) -> None:
    """For `lasp.explain`. Of several parts of an exchange the one that goes further than to the neighbour counts."""
    traffic = sequence.traffic
    traffic.predicted_seconds += choice.seconds
    if traffic.schedule in ("", "neighbour"):
        traffic.schedule, traffic.blocks = choice.schedule, choice.blocks
