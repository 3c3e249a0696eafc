"""What the horizon saves with TransNormerLLM's two decay schedules: `python -m lasp.exchange.savings`.

Counted by `horizon.count`, with the code by which the exchange decides; no ranks are needed.
"""

from __future__ import annotations

from lasp import decay
from lasp.exchange.horizon import count

MIB = 2**20


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


def table(*, heads: int = 16, layers: int = 24, tokens: int = 16384, dim: int = 128) -> str:
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
