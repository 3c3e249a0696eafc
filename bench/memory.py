"""Memory of a training step of TransNormerLLM on one of tp x dp x sp GPUs, by formulas: no GPU, nothing is run.

    python bench/memory.py                 # the tables of docs/tensor_parallel.md
    python bench/memory.py --gib 139       # the longest sequences on an H200

A step as `scaling.py` runs it: fp32 weights, gradients and moments of AdamW in DTensors cut by tp and then by FSDP2
over dp x sp, bf16 arithmetic, blocks recomputed in backward or not. L blocks of width D, inner width G, V words, T
tokens of a rank of sp:

    P = L (5 D^2 + 3 D G) + 2 V D                                 parameters
    states      16 P / (tp dp sp)                                 weight, gradient, two moments, in fp32
    gathered    (4 B + 4 V D) / tp + (4 B + 8 V D) / tp           B = 5 D^2 + 3 D G: two blocks, embedding and head in
                                                                  bf16, gradients of one and of these in fp32
    loss        2^30 + 2 D T                                      a tile of logits, the gradient of what the head reads
    stream      2 L D T                                           the input of each block; tp does not cut it
    block       2 (2 D + (7 D + 2 G) / tp) T                      what one block keeps (lasp.models.memory): two inputs
                                                                  whole; q, k twice, v, gate, o, the unit's halves cut
    gradients   8 D T                                             of the stream, as backward goes through a block

Blocks that are not recomputed keep `block` each, in place of their part of `stream`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from lasp.models import TNLConfig

GB = 1e9
TILE = 2**30  # bytes of a tile of logits, lasp_kernels.linear_loss
# Shapes with as many parameters as the names say; the gated unit is 8/3 of the width, rounded up to 256.
SHAPES = {"13B": (36, 5120, 40, 13824), "65B": (72, 8192, 64, 22016), "175B": (88, 12288, 96, 32768)}
# arXiv 2307.14995: 64 A100 of 80 GB, the longest sequence in thousands of tokens, of a Transformer and of TNL; tokens/s
# of a GPU, where they are given.
PUBLISHED = {"7B": (37, 48, 3362, 4081), "13B": (24, 35), "65B": (19, 23), "175B": (10, 12, 106, 137)}


def config_of(name: str) -> TNLConfig:
    """By name: of `lasp.models.sizes`, or of `SHAPES`."""
    if name not in SHAPES:
        return TNLConfig.named(name)
    layers, width, heads, glu_width = SHAPES[name]
    return replace(TNLConfig.named("7B"), layers=layers, width=width, heads=heads, glu_width=glu_width)


def parameters(config: TNLConfig) -> int:
    """Of the model, without the angles of its positions."""
    return config.layers * of_block(config) + 2 * config.vocab_size * config.width


def of_block(config: TNLConfig) -> int:
    """Parameters of one."""
    return 5 * config.width**2 + 3 * config.width * config.glu_width


def fixed_bytes(config: TNLConfig, *, tp: int, shards: int) -> float:
    """That do not depend on the tokens; `shards` is dp x sp."""
    block, words = of_block(config), config.vocab_size * config.width
    return 16 * parameters(config) / (tp * shards) + (8 * block + 12 * words) / tp + TILE


def token_bytes(config: TNLConfig, *, tp: int, recompute: bool) -> float:
    """Of a token of a rank."""
    D, G, L = config.width, config.glu_width, config.layers
    block = 2 * (2 * D + (7 * D + 2 * G) / tp)
    kept = 2 * L * D + block if recompute else L * block
    return kept + 8 * D + 2 * D


def peak_bytes(config: TNLConfig, tokens: int, *, tp: int = 1, shards: int = 1, recompute: bool = True) -> float:
    """Of a step, on each GPU."""
    return fixed_bytes(config, tp=tp, shards=shards) + tokens * token_bytes(config, tp=tp, recompute=recompute)


def longest(config: TNLConfig, room: float, *, tp: int, shards: int) -> int:
    """Tokens of a rank that fit into so many bytes, all blocks recomputed; 0 if none do."""
    left = room - fixed_bytes(config, tp=tp, shards=shards)
    return max(0, int(left / token_bytes(config, tp=tp, recompute=True)))


def rows(header: str, body: list[list[object]]) -> str:
    """A table in markdown."""
    names = header.split(" | ")
    lines = [names, ["---"] * len(names), *[[str(x) for x in row] for row in body]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def against_measured() -> str:
    """On H100s: bench/results/2026-11-22_scaling_weak_1B_2xcuda.md; on H200s: 2026-11-27_scaling_tp_1B_2xH200.md and
    2026-11-27_scaling_tp_7B_2xH200.md; peak GiB."""
    measured = (
        ("1B", 1, 1, "H100", {16384: 22.7, 32768: 23.9, 65536: 26.1, 131072: 34.7}),
        ("1B", 2, 1, "H100", {16384: 14.4, 32768: 15.6, 65536: 18.0, 131072: 28.4}),
        ("1B", 1, 2, "H200", {16384: 11.3, 32768: 13.5}),
        ("7B", 2, 1, "H200", {8192: 58.0, 16384: 61.0}),
        ("7B", 1, 2, "H200", {8192: 56.5, 16384: 59.0}),
    )
    body = []
    for name, shards, tp, card, peaks in measured:
        for tokens, peak in peaks.items():
            found = peak_bytes(config_of(name), tokens, tp=tp, shards=shards) / 2**30
            error = f"{100 * (found / peak - 1):+.0f}%"
            body.append([name, f"1x{shards}x{tp}", card, f"{tokens:,}", f"{found:.1f}", peak, error])
    return rows("model | dp x sp x tp | GPUs | tokens a rank | predicted GiB | measured GiB | error", body)


def model_parallel(tokens: int = 8192) -> str:
    """TNL-7B on 8 GPUs, each tp ranks with so many tokens: what tp saves of the activations."""
    config, body = TNLConfig.named("7B"), []
    published = {1: ("66.3", "64.0", 32048), 8: ("28.7", "24.1", 24280)}
    for tp in (1, 2, 4, 8):
        kept, again = (
            peak_bytes(config, tokens, tp=tp, shards=8 // tp, recompute=recompute) / GB for recompute in (False, True)
        )
        transformer, tnl, speed = published.get(tp, ("", "", ""))
        body.append([tp, 8 // tp, f"{kept:.1f}", f"{again:.1f}", tnl, transformer, speed])
    return rows(
        "tp | dp | GB, all kept | GB, all recomputed | published: TNL, GB | Transformer, GB | TNL, tokens/s", body
    )


def states(gpus: int = 64) -> str:
    """Bytes that do not depend on tokens, by tp, on so many GPUs."""
    body = []
    for name in PUBLISHED:
        config = config_of(name)
        cells = [f"{fixed_bytes(config, tp=tp, shards=gpus // tp) / GB:.1f}" for tp in (1, 2, 4, 8)]
        body.append([name, f"{parameters(config) / 1e9:.1f}", *cells])
    return rows("model | parameters, 10^9 | GB at tp 1 | tp 2 | tp 4 | tp 8", body)


def contexts(gib: float, gpus: int = 64) -> str:
    """The longest sequence of a group of tp ranks, in thousands of tokens, beside the published."""
    body = []
    for name, (transformer, tnl, *speeds) in PUBLISHED.items():
        room = 0.9 * gib * 2**30
        fits = [longest(config_of(name), room, tp=tp, shards=gpus // tp) for tp in (1, 2, 4, 8)]
        cells = [f"{tokens // 1000:,}" for tokens in fits]
        body.append([name, *cells, tnl, transformer, *(reversed(speeds) if speeds else ("", ""))])
    ours, theirs = "K tokens at tp 1 | tp 2 | tp 4 | tp 8", "published: TNL | Transformer"
    return rows(f"model | {ours} | {theirs} | TNL, tokens/s/GPU | Transformer, tokens/s/GPU", body)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=74.5, help="memory of a GPU; default: 80 GB")
    options = parser.parse_args(argv)
    for title, table in (
        ("Predicted and measured", against_measured()),
        ("TNL-7B on 8 GPUs, 8,192 tokens for each tp ranks", model_parallel()),
        ("64 GPUs, memory without tokens", states()),
        (f"64 GPUs of {options.gib:g} GiB, the longest sequence of tp ranks", contexts(options.gib)),
    ):
        print(f"\n{title}\n\n{table}")


if __name__ == "__main__":
    main()
