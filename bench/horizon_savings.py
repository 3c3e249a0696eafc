"""What the horizon saves with TransNormerLLM's two decay schedules: hops and bytes, counted, not timed.

    python bench/horizon_savings.py

Counted with `lasp.exchange.horizon.far_heads`, by which the exchange decides; no ranks are needed. The sizes are those
of TNL-1B: 16 layers of 16 heads of 128 x 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lasp import decay
from lasp.exchange.base import heads_in
from lasp.exchange.horizon import far_heads

MIB = 2**20


@dataclass(frozen=True)
class Count:
    """What one exchange of a layer costs a rank in the middle."""

    far_heads: int
    hops: int  # messages that follow one another until the last rank has its state
    bytes_sent: int


def count(
    schedule: str,
    rates: Sequence[float] | None,
    *,
    heads: int,
    tokens: int,
    ranks: int,
    key_dim: int,
    value_dim: int,
) -> Count:
    """Hops and bytes of one exchange with `tokens` on every rank, one sequence, an fp32 state.

    `rates` None counts what it would be without the horizon. An all-gather passes every state on ranks - 1 times.
    """
    crossed = [tokens] * (ranks - 2) if ranks > 2 and rates is not None else None
    far = heads_in(far_heads(rates, heads, crossed, torch.float32))
    per_head = 4 * key_dim * value_dim
    passed_on = far * (per_head + 4) * (ranks - 1) if schedule == "all_gather" else far * per_head
    return Count(far, ranks - 1 if far else 1, passed_on + (heads - far) * per_head)


def row(name: str, ranks: int, *, heads: int, layers: int, tokens: int, dim: int) -> str:
    """One line of the table: sums over the layers, without -> with the horizon."""
    far, hops, chain, gathered = 0, [0, 0], [0.0, 0.0], [0.0, 0.0]
    for layer in range(layers):
        log_decay = decay.schedule(name, heads, layer, layers)
        assert log_decay is not None
        for n, rates in enumerate((None, log_decay.tolist())):
            shape = {"heads": heads, "tokens": tokens, "ranks": ranks, "key_dim": dim, "value_dim": dim}
            ring, gather = count("ring", rates, **shape), count("all_gather", rates, **shape)
            hops[n] += ring.hops
            chain[n] += ring.far_heads / heads * ring.bytes_sent / MIB
            gathered[n] += gather.bytes_sent / MIB
            far += n * ring.far_heads
    cells = [name, f"{ranks:,}", f"{far} of {heads * layers}", f"{hops[0]:,} -> {hops[1]:,}"]
    cells += [f"{before:,.1f} -> {after:,.1f}" for before, after in (chain, gathered)]
    return f"| {' | '.join(cells)} |"


def table(*, heads: int = 16, layers: int = 16, tokens: int = 16384, dim: int = 128) -> str:
    """For 8, 64 and 1,024 ranks; one forward pass of one sequence, fp32 states."""
    return "\n".join(
        [
            f"{layers} layers of {heads} heads of {dim} x {dim}, {tokens:,} tokens a rank",
            "",
            "| decay | ranks | heads that go further | hops | sent along the chain, MiB | sent by all_gather, MiB |",
            "|---|---|---|---|---|---|",
            *(
                row(name, ranks, heads=heads, layers=layers, tokens=tokens, dim=dim)
                for name in ("alibi", "tnl")
                for ranks in (8, 64, 1024)
            ),
        ]
    )


if __name__ == "__main__":
    print(table())
