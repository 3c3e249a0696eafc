"""LASP's schedule: a chain from rank to rank, point to point. (LASP, arXiv 2404.02882, algorithms 2 and 3.)

Each rank receives the state behind all ranks before it, folds its own tokens into it and sends the result on: one
message of one state a rank, whatever the number of ranks. In reverse the chain runs from the last rank to the first.
"""

from __future__ import annotations

import torch

from lasp.exchange.base import Job, Link, Network, Schedule, Sizes, Transfer, schedule


@schedule
class Ring(Schedule):
    """P - 1 hops of a whole state: (P - 1) (alpha + n / beta) seconds."""

    name = "ring"
    waits_per_hop = True

    def seconds(self, sizes: Sizes, ranks: int, network: Network) -> float:
        """See `Schedule`."""
        return (ranks - 1) * (network.latency + sizes.state / network.bandwidth)

    def run(self, job: Job, link: Link, blocks: int) -> Transfer:
        """In blocks of columns (one, but for pipeline.py): receive a block, fold, and send it on at once."""
        local, width = job.local, job.local.state.shape[4]
        size = -(-width // blocks)
        parts = [local] if blocks == 1 else [local.columns(slice(n, n + size)) for n in range(0, width, size)]
        if link.source is None:
            if link.target is not None:
                for part in parts:
                    link.send(job.fold(None, *part))
            yield
            return local.zeros()
        incoming = link.receive(parts[0].state.shape[1:], local.state)
        yield
        entering = []
        # A block is passed on before the next is asked for: NCCL runs the messages of a rank one after the other.
        for n, part in enumerate(parts):
            entering.append(incoming())
            if link.target is not None:
                link.send(job.fold(entering[-1] if job.terms.passes else None, *part))
            if n + 1 < len(parts):
                incoming = link.receive(parts[n + 1].state.shape[1:], local.state)
        return entering[0] if len(entering) == 1 else torch.cat(entering, 3)
