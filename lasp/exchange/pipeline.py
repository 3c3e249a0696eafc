"""The All-Scan of ZeCO: the chain of ring.py in blocks of columns. (arXiv 2507.01004, section 3.)

    rank 0   send 1  send 2  send 3
    rank 1           send 1  send 2  send 3            time ->
    rank 2                   send 1  send 2  send 3

The state is cut along V, whose columns no map mixes, and each block is folded and sent on as soon as it is there. With
B blocks a state needs the time of (P - 1) / B + 1 transfers instead of P - 1.
"""

from __future__ import annotations

import math

from lasp.exchange.base import Network, Sizes, schedule
from lasp.exchange.ring import Ring


@schedule
class Pipeline(Ring):
    """(P - 2 + B) (alpha + n / (B beta)) seconds with B blocks."""

    name = "pipeline"

    def seconds(self, sizes: Sizes, ranks: int, network: Network) -> float:
        """See `Schedule`."""
        if ranks < 2:
            return 0.0
        blocks = self.blocks(sizes, ranks, network)
        return (ranks - 2 + blocks) * (network.latency + sizes.state / blocks / network.bandwidth)

    def blocks(self, sizes: Sizes, ranks: int, network: Network) -> int:
        """The B of the shortest time, sqrt((P - 2) n / (alpha beta)), in blocks of whole columns."""
        exact = math.sqrt(max(0, ranks - 2) * sizes.state / (network.latency * network.bandwidth))
        most = max(1, sizes.columns)
        blocks = max(1, min(round(exact), most))
        return -(-most // -(-most // blocks))
