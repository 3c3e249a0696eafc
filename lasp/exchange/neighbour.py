"""One hop: every rank sends to the rank behind it at once, and waits for the rank before it only.

Enough for the heads whose state no rank lets pass (see horizon.py): what enters a rank is then made by the rank before
it alone. All hops happen at the same time, so that this takes as long on 1,000 ranks as on 3. Nobody asks for it by
name: it serves the heads that need no more, under every schedule that sends messages.
"""

from __future__ import annotations

from lasp.exchange.base import Job, Link, Network, Schedule, Sizes, Transfer


class Neighbour(Schedule):
    """One message: alpha + n / beta seconds."""

    name = "neighbour"

    def seconds(self, sizes: Sizes, ranks: int, network: Network) -> float:
        """See `Schedule`."""
        return 0.0 if ranks < 2 else network.latency + sizes.state / network.bandwidth

    def run(self, job: Job, link: Link, blocks: int) -> Transfer:
        """NCCL runs the messages of a rank one after the other: so every other rank begins with its receipt.

        Otherwise the first hop would have to end before the second can begin, and so on.
        """
        incoming = None
        sends_first = job.sequence.rank % 2 == 0
        if sends_first and link.target is not None:
            link.send(job.fold(None, *job.local))
        if link.source is not None:
            incoming = link.receive(job.local.state.shape[1:], job.local.state)
        if not sends_first and link.target is not None:
            link.send(job.fold(None, *job.local))
        yield
        return job.local.zeros() if incoming is None else incoming()


NEIGHBOUR = Neighbour()
