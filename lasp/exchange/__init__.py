"""How a state travels between ranks. Each schedule has a file of its own; all share `base`. See docs/exchange.md."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lasp import recompute
from lasp.exchange import cost, horizon
from lasp.exchange.all_gather import all_gather
from lasp.exchange.base import (
    Arrived,
    Closing,
    Fold,
    HeadRuns,
    Link,
    Pending,
    RunningBeside,
    RunningInWait,
    Schedule,
    StateMap,
    beside,
    put_heads,
    result,
    waiting,
)
from lasp.exchange.board import Board, board_of, has_room
from lasp.exchange.direct import Turn, direct
from lasp.exchange.neighbour import neighbour
from lasp.exchange.pipeline import pipeline
from lasp.exchange.ring import ring
from lasp.mesh import SequenceParallel

__all__ = ["Fold", "HeadRuns", "Pending", "StateMap", "beside", "cost", "horizon", "start", "waiting"]

CHAIN, NEIGHBOUR = 0, 1  # tags: a message to the neighbour may overtake those of the chain


def start(
    local: StateMap | Callable[[], StateMap],
    sequence: SequenceParallel,
    *,
    fold: Fold,
    reverse: bool = False,
    far: HeadRuns | None = None,
    units: int | None = None,
    ragged: bool = False,
    at_once: bool = False,
    borrow: bool = False,
) -> Pending:
    """Begin to send what this rank's tokens do to a state; `wait()` gives the state that enters them.

    Every rank of the sequence must call it, in the same order and with the same options. In the recompute of a
    checkpoint nothing is sent: what the original forward received is there.

    Args:
        local: the maps of this rank's tokens, or what makes them, which is called if they are sent.
        sequence: the ranks.
        fold: passes a state through maps; the arithmetic is the caller's.
        reverse: from the last rank to the first.
        far: the heads that must go through the chain (see `horizon`); None is all. The others go to the neighbour.
        units: the most maps that any rank has, for messages that are equally long; None if all have as many as this.
        ragged: whether `units` might differ between ranks, for lack of knowledge: then "auto" takes no such messages.
        at_once: the caller computes nothing before it waits.
        borrow: the caller uses what enters before it starts another exchange, on the same stream: it may lie in the
            memory of another rank.
    """
    reception = None if reverse else recompute.reception(sequence.key)
    if reception is not None and reception.result is not None:
        return _Received(reception.result)
    local = local() if callable(local) else local
    sequence.count_exchange(reverse=reverse)
    far = local.all_heads if far is None else far
    units, near = units or len(local.state), not far or sequence.size == 2
    choice = _choose(local, sequence, far, units, ragged)
    board = None
    if choice.schedule == "direct" and sequence.size > 1:
        board = _board(local, sequence, _direct_bytes(local, units, near), reverse)
        choice = choice if board is not None else _choose(local, sequence, far, units, ragged)
    traffic = sequence.traffic
    traffic.schedule, traffic.blocks, traffic.predicted_seconds = choice.schedule, choice.blocks, choice.seconds
    if board is not None:
        turn, first = Turn(board, sequence, reverse), sequence.neighbour(1 if reverse else -1) is None
        borrow = borrow and not (reception is not None and reception.kept)
        schedule = direct(local, turn, fold, units, near=near, borrow=borrow)
        # The first rank waits for nobody, so its own stream should not wait for the others to meet.
        pending = _queue(schedule, [turn], local, beside=first or not at_once)
    else:
        connect(sequence, local.state)
        hop, chain = (Link(sequence, reverse, tag) for tag in (NEIGHBOUR, CHAIN))
        pending = _queue(_messages(local, hop, chain, fold, far, units, choice), [hop, chain], local, beside=True)
    return pending if reception is None else _Receiving(pending, reception)


def _queue(schedule: Schedule, closing: Sequence[Closing], local: StateMap, *, beside: bool) -> Pending:
    if not local.state.is_cuda:
        return RunningInWait(schedule, closing)
    return RunningBeside(schedule, closing, local) if beside else Arrived(schedule, closing)


def _board(local: StateMap, sequence: SequenceParallel, size: int, reverse: bool) -> Board | None:
    """None where "auto" finds that ranks lack the memory after all; from then on it does not take "direct"."""
    _not_in_capture(local.state, has_room(sequence, size), "makes its memory")
    try:
        with waiting(sequence, None, reverse=reverse):
            return board_of(sequence, size, local.state.device)
    except ValueError as error:
        if sequence.exchange != "auto":
            raise
        warnings.warn(f'{error}. exchange="auto" takes messages from now on', stacklevel=2)
        cost.forget_direct(sequence)
        return None


def connect(sequence: SequenceParallel, like: Tensor) -> None:
    """Send a number to both neighbours, once for each group; a collective call.

    At the first message each way NCCL connects the two ranks. The host waits for that, and neither a timeout nor a
    watchdog ends it: a rank that died before its first reverse exchange would keep its neighbour waiting.
    """
    if sequence.group in _connected or sequence.size == 1:
        return
    assert sequence.group is not None
    _not_in_capture(like, False, "connects the ranks")
    number = StateMap(like.new_zeros(1, 1, 1, 1, 1), like.new_zeros(1, 1, 1, 1))
    for reverse in (False, True):
        link = Link(replace(sequence, validate="off"), reverse)  # whose traffic is not the layer's
        schedule = neighbour(number, link, lambda entering, state, log_decay: state[0])
        next(schedule)
        result(schedule)
        link.finish()
    _connected.add(sequence.group)


_connected: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


def _not_in_capture(x: Tensor, done: bool, what: str) -> None:
    if not done and x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"the first exchange {what}: make one before a CUDA graph is captured")


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
    network, heads = cost.network_of(sequence), local.state.shape[2]
    if not far:
        return cost.choose_near(sequence.exchange, _state_bytes(local, local.all_heads), network)
    map_bytes = _direct_bytes(local, units, near=False) * horizon.size_of(far) // heads
    direct_bytes = _direct_bytes(local, units, near=sequence.size == 2)
    if ragged and sequence.exchange == "auto":
        map_bytes, direct_bytes = None, direct_bytes if sequence.size == 2 else None
    return cost.choose(
        sequence.exchange,
        _state_bytes(local, far),
        map_bytes,
        direct_bytes,
        local.state.shape[3],
        sequence.size,
        network,
    )


def _state_bytes(local: StateMap, heads: HeadRuns) -> int:
    return horizon.size_of(heads) * local.state[0, :, 0].numel() * local.state.element_size()


def _direct_bytes(local: StateMap, units: int, near: bool) -> int:
    """What a rank writes: a state for its neighbour, or all maps of all heads."""
    size = local.state[0].numel()
    return (size if near else units * (size + local.log_decay[0].numel())) * local.state.element_size()


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
