"""Softmax attention over ranks, both ways: by heads, and with all keys and values gathered (later ranks then see more).

    torchrun --nproc-per-node 2 bench/softmax.py --save      # GPUs; on a CPU: --tokens 512 --heads 2 --repetitions 3

Every rank holds as many tokens. "share" is the time of the slowest rank over the mean of all: 2 - 1 / P if arithmetic
is all that counts. "% of ideal" is one rank's time for the whole sequence over P times that of the slowest rank.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from common import add_report_arguments, command_line, report
from timing import _on_cpu, _on_gpu

import lasp

HEADS_OF_KEYS = 4  # a quarter of the query heads, as in hybrids


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768], help="of a rank")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=10)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    env = lasp.init()
    rows = [row for length in options.tokens for row in measure(length, env, options)]
    if env.rank == 0:
        name = f"softmax_{env.world_size}x{env.device.type}"
        command = command_line("softmax.py", argv, env.world_size)
        report(
            name,
            command,
            rows,
            save=options.save,
            out=options.out,
            commit=options.commit,
            html=options.html,
            markdown=True,
        )


def measure(length: int, env: lasp.Env, options: argparse.Namespace) -> list[dict]:
    """A row for each direction and way."""
    ranks, dtype = env.world_size, torch.bfloat16 if env.device.type == "cuda" else torch.float32
    layout = lasp.ShardLayout((length,) * ranks)

    def inputs(n: int) -> list[torch.Tensor]:
        heads = (options.heads, HEADS_OF_KEYS, HEADS_OF_KEYS)
        return [torch.randn(1, n, h, options.dim, device=env.device, dtype=dtype, requires_grad=True) for h in heads]

    split, alone = inputs(length), inputs(length * ranks)
    rows = []
    for direction in ("forward", "backward"):
        alone_ms, *_ = times(lambda: lasp.softmax_attention(*alone), direction, env, options.repetitions)
        for way, softmax in (("by heads", "auto"), ("gathered", "all_gather")):
            sequence = lasp.SequenceParallel(dist.group.WORLD, name="softmax", softmax=softmax)
            check(split, layout, sequence)
            call = lambda: lasp.softmax_attention(*split, layout=layout, sequence=sequence)  # noqa: B023, E731
            split_ms = times(call, direction, env, options.repetitions)
            slowest, mean = max(split_ms), sum(split_ms) / ranks
            rows.append(
                {
                    "tokens a rank": length,
                    "direction": direction,
                    "way": way,
                    **{f"rank {r} ms": ms for r, ms in enumerate(split_ms)},
                    "share": slowest / mean,
                    "whole on one rank ms": alone_ms,
                    "% of ideal": 100 * alone_ms / (ranks * slowest),
                }
            )
    return rows


def check(split: list[torch.Tensor], layout: lasp.ShardLayout, sequence: lasp.SequenceParallel) -> None:
    """Nothing is timed that is wrong: the split output against that of one rank on the gathered inputs."""
    o = lasp.softmax_attention(*split, layout=layout, sequence=sequence)
    whole = [lasp.unshard_sequence(x.detach(), sequence) for x in split]
    start, end = layout.bounds(sequence.rank)
    expected = lasp.softmax_attention(*whole)[:, start:end]
    error = ((o - expected).float().norm() / expected.float().norm()).item()
    if not error < 1e-2:
        raise SystemExit(f"rank {sequence.rank} is {error:.1e} off")


def times(call, direction: str, env: lasp.Env, repetitions: int) -> list[float]:
    """Milliseconds of every rank, medians; the ranks start together."""
    once = _on_gpu if env.device.type == "cuda" else _on_cpu
    found = []
    for _ in range(repetitions + 2):
        if direction == "forward":
            with torch.no_grad():
                found.append(once(call, env.device, None))
            continue
        o = call()
        gradient = torch.ones_like(o)
        found.append(once(lambda: o.backward(gradient), env.device, None))  # noqa: B023
    mine = torch.tensor(sorted(found[2:])[repetitions // 2], device=env.device)
    everyone = [torch.zeros_like(mine) for _ in range(env.world_size)]
    dist.all_gather(everyone, mine)
    return [x.item() for x in everyone]


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
