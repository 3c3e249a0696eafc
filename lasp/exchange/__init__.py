"""How a state travels between ranks. Each schedule has a file of its own; all share `base`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lasp import recompute
from lasp.exchange.base import Pending, StateMap, compose, waiting
from lasp.exchange.ring import start_ring
from lasp.mesh import SequenceParallel

__all__ = ["Pending", "StateMap", "compose", "resolve", "start", "waiting"]

_SCHEDULES = {"ring": start_ring}


def resolve(sequence: SequenceParallel) -> str:
    """The schedule that "auto" stands for."""
    return "ring" if sequence.exchange == "auto" else sequence.exchange


def start(local: StateMap, sequence: SequenceParallel, *, reverse: bool = False) -> Pending:
    """Begin to send what this rank's tokens do to a state; `wait()` gives the state that enters them.

    Every rank of the sequence must call it, in the same order, once forward and once in reverse. In the recompute of a
    checkpoint nothing is sent: what the original forward received is there.
    """
    if reverse:
        sequence.traffic.reverse_exchanges += 1
        return _SCHEDULES[resolve(sequence)](local, sequence, True)
    reception = recompute.reception(sequence.key)
    if reception.result is not None:
        return _Received(reception.result)
    sequence.traffic.forward_exchanges += 1
    return _Receiving(_SCHEDULES[resolve(sequence)](local, sequence, False), reception)


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
