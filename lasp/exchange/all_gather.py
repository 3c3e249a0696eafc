"""LASP-2's schedule: every rank gets the maps of all, by one collective, and folds those before it. (arXiv 2502.07563)

One step for the host and for the network's software, but each rank receives a state of every other one. It suits few
ranks; and a CUDA graph can capture it.
"""

from __future__ import annotations

import torch

from lasp.collectives import start_all_gather
from lasp.exchange.base import Fold, Schedule, StateMap, waiting
from lasp.mesh import SequenceParallel


def all_gather(local: StateMap, sequence: SequenceParallel, reverse: bool, fold: Fold, units: int) -> Schedule:
    """`units` maps a rank, the most that any rank has; those that have less add maps that change nothing."""
    message = local.packed(units)
    gathered = message.new_empty(sequence.size, *message.shape)
    with waiting(sequence, None, reverse=reverse):
        work = start_all_gather(gathered, message, sequence.group)
    sequence.traffic.messages += 1
    sequence.traffic.bytes_sent += (sequence.size - 1) * message.numel() * message.element_size()
    yield
    with waiting(sequence, None, reverse=reverse):
        work.wait()  # on NCCL the stream waits, not the host
    places = range(sequence.size - 1, sequence.rank, -1) if reverse else range(sequence.rank)
    if not places:
        return local.zeros()
    # In the order of the sequence, which need not be that in which the group counts its ranks.
    before = torch.cat([gathered[sequence.rank_in_group(place)] for place in places])
    return local.unpack(before).fold(fold, None)
