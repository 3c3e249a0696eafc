"""LASP-2's schedule: every rank gets the maps of all, by one collective, and folds those before it. (arXiv 2502.07563)

One step for the host and for the network's software, but each rank receives a state of every other one. It suits few
ranks; and a CUDA graph can capture it.
"""

from __future__ import annotations

import math

import torch

from lasp.exchange.base import Job, Link, Network, Schedule, Sizes, Transfer, schedule
from lasp.ranks import waiting
from lasp.ranks.collectives import start_all_gather


@schedule
class AllGather(Schedule):
    """(P - 1) (alpha' + n / beta') seconds, with those of a step of the collective."""

    name = "all_gather"
    gathers = True

    def seconds(self, sizes: Sizes, ranks: int, network: Network) -> float:
        """See `Schedule`."""
        if sizes.gathered is None:
            return math.inf
        return (ranks - 1) * (network.collective_latency + sizes.gathered / network.collective_bandwidth)

    def run(self, job: Job, link: Link, blocks: int) -> Transfer:
        """`units` maps a rank, the most that any rank has; those that have less add maps that change nothing."""
        sequence, local = job.sequence, job.local
        if sequence.size == 1:
            yield
            return local.zeros()
        message = local.packed(job.units)
        gathered = message.new_empty(sequence.size, *message.shape)
        with waiting(job.what):
            work = start_all_gather(gathered, message, sequence.group)
        job.traffic.messages += 1
        job.traffic.bytes_sent += (sequence.size - 1) * message.nbytes
        yield
        with waiting(job.what):
            work.wait()  # on NCCL the stream waits, not the host
        if not job.before:
            return local.zeros()
        # In the order of the sequence, which need not be that in which the group counts its ranks.
        before = torch.cat([gathered[sequence.in_group[place]] for place in job.before])
        return job.fold(None, *local.unpack(before))
