"""Where the time of a training step goes: the kernels of TransNormerLLM by class, beside what the card could do.

    python bench/step.py --model 1B --tokens 16384 --recompute 0 [--save]
    python bench/step.py --model 1B --tokens 65536              # all blocks recomputed in backward

One rank, the model and step of bench/scaling.py. The ceiling of products is that of bf16 matrices of 8,192 x 8,192 in
the same run. "executed" counts what is computed, also again: 2 N a token forward and 4 N backward for the N weights of
linear layers, those of recomputed blocks once more but for each one's last product, which nothing needs, and linear
attention as 12 K V a head and token. The last layer is never computed twice.
"""

from __future__ import annotations

import argparse
import re
import sys

import torch
import torch.distributed as dist
from common import add_report_arguments, command_line, report
from scaling import WARM, Layout, Training, add_model_arguments, free, steps
from torch.profiler import ProfilerActivity, profile

import lasp
from lasp.models import TNLConfig

# The first that fits the name of a kernel is its class.
CLASSES = {
    "products of matrices": r"nvjet|gemm|cutlass|xmma|splitK|cublas",
    "attention": r"state_|output_|walk|scan|query_gradient|key_value|finish|decay",
    "norm": r"norm",
    "gate": r"gate",
    "cross entropy": r"cross_entropy",
    "optimizer": r"adam|multi_tensor",
    "silu": r"silu",
    "casts and copies": r"copy|Memcpy|bfloat16_copy|to_copy|split_with_sizes|chunk_cat|cat",
    "fill": r"Memset|fill",
    "sums and other elementwise": r"elementwise|reduce|add|mul|triton",
    "communication": r"nccl",
}
MATRIX = 8192


def ceiling(device: torch.device) -> float:
    """TFLOP/s of a product of bf16 matrices."""
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(20):
        a @ b
    begin.record()
    for _ in range(100):
        a @ b
    end.record()
    end.synchronize()
    return 2 * MATRIX**3 * 100 / begin.elapsed_time(end) / 1e9


def flop_of_token(config: TNLConfig, recomputed: int) -> tuple[float, float]:
    """Of a forward and a backward: what the model needs, and what is executed."""
    D, G = config.width, config.glu_width
    block, head = 5 * D * D + 3 * D * G, D * config.vocab_size
    attention = 12 * D * (D // config.heads)
    needed = config.layers * (6 * block + attention) + 6 * head
    return needed, needed + recomputed * (2 * (block - D * G) + attention / 3)


def by_class(training: Training, batch: dict[str, torch.Tensor]) -> tuple[list[dict], list[dict], float]:
    """Milliseconds of a step by class and by kernel, and those in which the device did nothing."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        training.step(batch)
        training.step(batch)
        torch.cuda.synchronize()
    events = [e for e in recorded.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted((e for e in events if not e.is_user_annotation), key=lambda e: e.time_range.start)
    kernels: dict[str, list[float]] = {}
    end, idle = events[0].time_range.start, 0.0
    for e in events:
        kernels.setdefault(e.name, []).append((e.time_range.end - e.time_range.start) / 2e3)
        idle += max(0.0, e.time_range.start - end) / 2e3
        end = max(end, e.time_range.end)
    classes: dict[str, list[float]] = {}
    for name, times in kernels.items():
        kind = next((kind for kind, words in CLASSES.items() if re.search(words, name, re.IGNORECASE)), "rest")
        classes.setdefault(kind, []).extend(times)
    total = sum(map(sum, classes.values()))
    rows = [
        {"class": kind, "ms": sum(times), "% of the kernels": 100 * sum(times) / total, "kernels": len(times) // 2}
        for kind, times in sorted(classes.items(), key=lambda x: -sum(x[1]))
    ]
    slowest = sorted(kernels.items(), key=lambda x: -sum(x[1]))[:30]
    return rows, [{"ms": sum(t), "times": len(t) // 2, "kernel": name[:150]} for name, t in slowest], idle


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    add_model_arguments(parser)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    options.warmup = max(options.warmup, WARM + 2) if options.graph else options.warmup
    options.exchange = "auto"
    env = lasp.init()
    if env.device.type != "cuda":
        raise SystemExit("bench/step.py needs a GPU")
    rows, tables = [], {}
    for tokens in options.tokens:
        training = Training(options, Layout(1, 1), env.device, "auto")
        batch = training.batch(tokens)
        seconds, peak = steps(training, batch, options)
        classes, slowest, idle = by_class(training, batch)
        recomputed = training.config.layers if options.recompute is None else options.recompute
        needed, executed = flop_of_token(training.config, recomputed)
        top = ceiling(env.device)
        row = {
            "tokens": tokens,
            "blocks recomputed": recomputed,
            "step ms": seconds * 1e3,
            "tokens/s": tokens / seconds,
        }
        row |= {"peak GiB": peak, "idle ms": idle, "needed TFLOP/s": needed * tokens / seconds / 1e12}
        row |= {"executed TFLOP/s": executed * tokens / seconds / 1e12, "ceiling TFLOP/s": top}
        row["executed % of ceiling"] = 100 * row["executed TFLOP/s"] / top
        print(row, file=sys.stderr, flush=True)
        rows.append(row)
        tables |= {f"by class, {tokens} tokens": classes, f"slowest kernels, {tokens} tokens": slowest}
        del training
        free()
    report(
        f"step_{options.model}_recomputed-{'all' if options.recompute is None else options.recompute}",
        command_line("step.py", argv),
        rows,
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        tables=tables,
        markdown=True,
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
