"""What runs beside the exchange: one forward and backward of the operator on every rank, kernel by kernel.

    torchrun --nproc-per-node 2 bench/overlap.py --tokens 65536 [--save]

A trace by torch.profiler. With `--save` it is kept as docs/overlap_DECAY.json and drawn as docs/overlap_DECAY.png, one
row for the kernels and one for the exchange of every rank. Needs GPUs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from common import command_line, environment
from plots import sign
from torch.profiler import ProfilerActivity, profile
from traces import exposed_us, figure_of, kind_of

import lasp
from lasp.exchange import cost

DOCS = Path(__file__).parents[1] / "docs"


def traced(run: Callable[[], object], device: torch.device) -> list[dict]:
    """Kernels of one call on this rank after several others, with times in us."""
    for _ in range(5):
        run()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(3):
            dist.all_reduce(torch.zeros(1, device=device))
            torch.cuda._sleep(40_000_000)  # 20 ms, so that the host is ahead, which tracing slows
            run()
            torch.cuda.synchronize(device)
    kernels = [e for e in recorded.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sorted((e for e in kernels if not e.is_user_annotation), key=lambda e: e.time_range.start)
    begin = [n for n, e in enumerate(kernels) if "segment_state" in e.name]
    per_call = len(begin) // 3
    start = kernels[begin[2 * per_call]].time_range.start
    return [
        {"kernel": kind_of(e.name), "start": e.time_range.start - start, "us": e.time_range.elapsed_us()}
        for e in kernels[begin[2 * per_call] :]
    ]


def record(what: str, command: str, ranks: list[tuple[list[dict], float]]) -> dict:
    """What is kept: of each rank its kernels and peak MiB."""
    return {
        "what": what,
        "command": command,
        "environment": environment(),
        "exposed exchange us by rank": [round(exposed_us(kernels), 1) for kernels, _ in ranks],
        "peak MiB by rank": [round(mib, 1) for _, mib in ranks],
        "ranks": [kernels for kernels, _ in ranks],
    }


def draw(result: dict, target: Path) -> None:
    """The picture of a trace."""
    figure = figure_of(result)
    sign(figure, result["environment"], target.with_suffix(".json").name)
    figure.savefig(target, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="of a rank")
    parser.add_argument("--exchange", default="auto")
    parser.add_argument("--save", action="store_true", help="keep the traces and pictures under docs")
    parser.add_argument("--out", type=Path, default=DOCS, help="in this folder instead")
    parser.add_argument("--commit", default=None, help="recorded where there is no git to ask")
    options = parser.parse_args()
    env = lasp.init()
    if env.device.type != "cuda":
        raise SystemExit("bench/overlap.py needs GPUs")
    cost.measure(lasp.SequenceParallel(dist.group.WORLD))  # from which "auto" chooses
    layout = lasp.ShardLayout((options.tokens,) * env.world_size)
    q, k, v, do = (torch.randn(1, options.tokens, 16, 128, device=env.device, dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for name, values in (("fixed", lasp.decay.alibi(16, 0, 24)), ("none", None)):
        sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=options.exchange)
        log_decay = None if values is None else lasp.decay.fixed(values, env.device)

        def run(log_decay=log_decay, sequence=sequence) -> None:
            o, _ = lasp.linear_attention(*leaves, log_decay=log_decay, sequence=sequence, layout=layout)
            torch.autograd.grad(o, leaves, do)

        kernels = traced(run, env.device)
        torch.cuda.reset_peak_memory_stats(env.device)
        run()
        ranks: list = [None] * env.world_size
        dist.all_gather_object(ranks, (kernels, torch.cuda.max_memory_allocated(env.device) / 2**20))
        if env.rank == 0:
            what = f"B1 H16 D128 bf16, {options.tokens} tokens a rank, decay {name}, {sequence.traffic.schedule}"
            result = record(what, command_line("overlap.py", None, env.world_size), ranks)
            if options.commit:
                result["environment"]["commit"] = options.commit
            for rank, (kernels, _) in enumerate(ranks):
                end = max(x["start"] + x["us"] for x in kernels)
                print(f"{name}, rank {rank}: {len(kernels)} kernels, {end:.0f} us")
            if options.save:
                options.out.mkdir(parents=True, exist_ok=True)
                path = options.out / f"overlap_{name}.json"
                path.write_text(json.dumps(result) + "\n")
                draw(result, path.with_suffix(".png"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
