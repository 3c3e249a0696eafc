"""How a state travels between ranks. Each schedule has a file of its own; all share `base`."""

from __future__ import annotations

from lasp.exchange.base import Pending, StateMap, compose
from lasp.exchange.ring import start_ring
from lasp.mesh import SequenceParallel

__all__ = ["Pending", "StateMap", "compose", "resolve", "start"]

_SCHEDULES = {"ring": start_ring}


def resolve(sequence: SequenceParallel) -> str:
    """The schedule that "auto" stands for."""
    return "ring" if sequence.exchange == "auto" else sequence.exchange


def start(local: StateMap, sequence: SequenceParallel, *, reverse: bool = False) -> Pending:
    """Begin to send what this rank's tokens do to a state; `wait()` gives the state that enters them.

    Every rank of the sequence must call it, in the same order, once forward and once in reverse.
    """
    if reverse:
        sequence.traffic.reverse_exchanges += 1
    else:
        sequence.traffic.forward_exchanges += 1
    return _SCHEDULES[resolve(sequence)](local, sequence, reverse)
