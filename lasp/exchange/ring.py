"""LASP's schedule: a chain from rank to rank, point to point. (LASP, arXiv 2404.02882, algorithms 2 and 3.)

Each rank receives the map of all ranks before it, composes its own behind it and sends the result on: one
message of one state a rank, whatever the number of ranks. In reverse the chain runs from the last rank to the first.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.exchange.base import StateMap, compose, waiting
from lasp.mesh import SequenceParallel


def start_ring(local: StateMap, sequence: SequenceParallel, reverse: bool) -> _Ring:
    """Post the receive; the rest happens in `wait`."""
    return _Ring(local, sequence, reverse)


class _Ring:
    def __init__(self, local: StateMap, sequence: SequenceParallel, reverse: bool):
        self.local, self.sequence, self.reverse = local, sequence, reverse
        step = -1 if reverse else 1
        self.source, self.target = sequence.neighbour(-step), sequence.neighbour(step)
        self.incoming = None
        if self.source is not None:
            size = local.state.numel() + local.log_decay.numel()
            self.incoming = local.state.new_empty(size)
            with waiting(sequence, self.source, reverse=reverse):
                self.receipt = dist.irecv(self.incoming, group=sequence.group, group_src=self.source)

    def wait(self) -> Tensor:
        """Receive, pass on, and return the state that enters this rank's tokens."""
        outgoing, entering = self.local, None
        if self.incoming is not None:
            with waiting(self.sequence, self.source, reverse=self.reverse):
                self.receipt.wait()  # type: ignore[union-attr]  # on NCCL the stream waits, not the host
            entering = self.local.unpack(self.incoming)
            outgoing = compose(entering, self.local)
        if self.target is not None:
            message = outgoing.pack()
            self.sequence.traffic.messages += 1
            self.sequence.traffic.bytes_sent += message.numel() * message.element_size()
            with waiting(self.sequence, self.target, reverse=self.reverse):
                dist.isend(message, group=self.sequence.group, group_dst=self.target).wait()  # type: ignore[union-attr]
        return torch.zeros_like(self.local.state) if entering is None else entering.state
