"""LASP-2's schedule: every rank gets the maps of all, by one collective, and folds those before it. (arXiv 2502.07563)

One step for the host and for the network's software, but each rank receives a state of every other one. It suits few
ranks, and CUDA graphs, which can capture it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.exchange.base import Fold, Schedule, StateMap, waiting
from lasp.exchange.collectives import start_all_gather
from lasp.mesh import SequenceParallel


def all_gather(local: StateMap, sequence: SequenceParallel, reverse: bool, fold: Fold, units: int) -> Schedule:
    """`units` maps a rank, the most that any rank has; those that have less add maps that change nothing."""
    message = _pack(local, units)
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
    size = local.state[0].numel()
    state = before[:, :size].view(-1, *local.state.shape[1:])
    log_decay = before[:, size:].view(-1, *local.log_decay.shape[1:])
    return fold(None, state, log_decay)


def _pack(local: StateMap, units: int) -> Tensor:
    """[units, numbers of a state and of its decay]. Zeros are a map that changes nothing: a decay of exp(0)."""
    message = torch.cat([local.state.flatten(1), local.log_decay.flatten(1)], 1)
    return message if len(message) == units else F.pad(message, (0, 0, 0, units - len(message)))
