"""The CPU path against causal softmax attention (torch SDPA), tokens/s, in one process.

    python bench/reference.py [--save]

Before anything is timed, output and gradients of 300 tokens must be within 1e-5 (relative) of the fp64 recurrence.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import add_report_arguments, report
from torch import Tensor

import lasp
from lasp_kernels import recurrent_linear_attention

HEADS, DIM = 4, 64


def inputs(tokens: int, form: str) -> tuple[list[Tensor], Tensor | None]:
    generator = torch.Generator().manual_seed(tokens)
    qkv = [torch.randn(1, tokens, HEADS, DIM, generator=generator).requires_grad_() for _ in range(3)]
    shape = {"none": None, "[H]": (HEADS,), "[B,T,H]": (1, tokens, HEADS), "[B,T,H,K]": (1, tokens, HEADS, DIM)}[form]
    return qkv, None if shape is None else -0.1 * torch.rand(shape, generator=generator)


def linear(qkv: list[Tensor], log_decay: Tensor | None) -> Tensor:
    return lasp.linear_attention(*qkv, log_decay=log_decay)[0]


def softmax(qkv: list[Tensor]) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), is_causal=True)


def gate(form: str) -> None:
    qkv, log_decay = inputs(300, form)
    double = [x.detach().double().requires_grad_() for x in qkv]
    expected, _ = recurrent_linear_attention(*double, log_decay=None if log_decay is None else log_decay.double())
    o = linear(qkv, log_decay)
    pairs = zip([o, *torch.autograd.grad(o.sum(), qkv)], [expected, *torch.autograd.grad(expected.sum(), double)])
    worst = max(((x - y).norm() / y.norm()).item() for x, y in pairs)
    if not worst < 1e-5:
        raise SystemExit(f"log_decay {form}: relative error {worst:.1e} against the fp64 recurrence; nothing was timed")


def tokens_per_second(tokens: int, run: Callable[[], object], budget: float = 3.0) -> float:
    """Median over as many runs as the budget of seconds allows, 2 to 10, after one warm-up."""
    times: list[float] = []
    run()
    while len(times) < 2 or (sum(times) < budget and len(times) < 10):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return tokens / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_report_arguments(parser)
    options = parser.parse_args()
    forms = ("none", "[H]", "[B,T,H]", "[B,T,H,K]")
    for form in forms:
        gate(form)
    rows = []
    for tokens in (2048, 8192, 32768):
        for name in (*(f"linear, log_decay {form}" for form in forms), "softmax (SDPA)"):
            qkv, log_decay = inputs(tokens, name.split()[-1] if name.startswith("linear") else "none")

            def call(qkv=qkv, log_decay=log_decay, name=name) -> Tensor:
                return softmax(qkv) if name.startswith("softmax") else linear(qkv, log_decay)

            with torch.no_grad():
                forward = tokens_per_second(tokens, call)
            both = tokens_per_second(tokens, lambda call=call, qkv=qkv: torch.autograd.grad(call().sum(), qkv))
            rows.append({"tokens": tokens, "attention": name, "forward tok/s": forward, "forward+backward tok/s": both})
    command = f"python bench/reference.py, B=1 H={HEADS} D={DIM} fp32"
    report("reference_cpu", command, rows, save=options.save, out=options.out, commit=options.commit, html=options.html)


if __name__ == "__main__":
    main()
