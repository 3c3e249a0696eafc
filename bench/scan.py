"""Recurrences of channels that decay each by itself, on one GPU: errors against fp64, and times, in two tables.

    python bench/scan.py [--lengths 8192 32768 131072] [--save] [--commit SHA]

2048 channels of one sequence; x (or u, B, C) in bf16, log_decay (or dt, A) in fp32; 16 numbers a channel in the
selective scan. The floor is every input read once and every result written once, at the bandwidth of a copy on the
device: forward x, log_decay and h; backward dh, x, log_decay, dx and d log_decay. Times are medians, with an empty L2
cache. Errors are the greatest of a tensor, relative to the greatest number in it, from the PyTorch steps in fp64, which
tests compare with a loop over tokens; of inputs as the kernels see them.
"""

from __future__ import annotations

import argparse
import os

import torch
from common import add_report_arguments, command_line, report
from timing import copies, median
from torch import Tensor

from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp_kernels import elementwise_path
from lasp_kernels.elementwise import RecurrenceOperands
from lasp_kernels.selective_scan import SelectiveOperands

CHANNELS, STATES = 2048, 16
OPERATORS = {"elementwise_recurrence": elementwise_recurrence, "selective_scan": selective_scan}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def inputs(operator: str, T: int, channels: int, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """Tensors that want gradients, and the gradient of the result. Decays between 1e-3 and 7 a token."""
    draw = torch.Generator(device).manual_seed(T)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=torch.float32).to(dtype)

    rate = torch.nn.functional.softplus(normal(1, T, channels, dtype=torch.float32).mul_(2).sub_(2))
    x, dy = normal(1, T, channels), normal(1, T, channels)
    if operator == "elementwise_recurrence":
        return [y.requires_grad_() for y in (x, rate.neg_())], dy
    A = -torch.arange(1, STATES + 1, device=device, dtype=torch.float32).repeat(channels, 1)
    rest = (normal(1, T, STATES), normal(1, T, STATES))
    return [y.requires_grad_() for y in (x, rate, A, *rest)], dy


def floors(operator: str, x: list[Tensor], dy: Tensor, bandwidth: float) -> tuple[float, float]:
    """Milliseconds of forward and backward at `bandwidth` GB/s."""
    read = sum(y.nbytes for y in x)
    return (read + dy.nbytes) / bandwidth / 1e6, (2 * read + dy.nbytes) / bandwidth / 1e6


def errors(operator: str, T: int, dtype: str, device: str) -> dict:
    """A row: forward and every gradient."""
    x, dy = inputs(operator, T, 96, DTYPES[dtype], device)
    y = OPERATORS[operator](*x)
    found = [y, *torch.autograd.grad(y, x, dy)]
    exact = [y.detach().double().requires_grad_() for y in x]
    y = OPERATORS[operator](*exact)
    true = [y.detach(), *torch.autograd.grad(y, exact, dy.double())]
    names = ["result", *("d" + name for name in (("x", "log_decay") if len(x) == 2 else ("u", "dt", "A", "B", "C")))]
    row: dict = {"operator": operator, "T": T, "dtype": dtype}
    for name, a, b in zip(names, found, true):
        row[name] = float((a.detach().double() - b).abs().max() / b.abs().max())
    return row


def times(operator: str, T: int, kernels: str, bandwidth: float) -> dict:
    """A row."""
    os.environ["LASP_KERNELS"] = kernels
    f = OPERATORS[operator]
    row: dict = {"operator": operator, "T": T}
    try:
        x, dy = inputs(operator, T, CHANNELS, torch.bfloat16, "cuda")
        kind = RecurrenceOperands if len(x) == 2 else SelectiveOperands
        row["path"] = elementwise_path(kind(*x))
        with torch.no_grad():
            forward = median(lambda: f(*x))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = f(*x)
        kept = torch.cuda.memory_allocated() - before
        torch.autograd.grad(y, x, dy, retain_graph=True)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        backward = median(lambda: torch.autograd.grad(y, x, dy, retain_graph=True))
    except torch.OutOfMemoryError:
        return {**row, "note": "out of memory"}
    finally:
        os.environ.pop("LASP_KERNELS")
    floor = floors(operator, x, dy, bandwidth)
    row |= {"fwd ms": forward, "fwd % floor": 100 * floor[0] / forward}
    row |= {"bwd ms": backward, "bwd % floor": 100 * floor[1] / backward}
    return {**row, "kept MiB": kept / 2**20, "peak MiB": peak / 2**20}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    bandwidth, rows = copies(), []
    for operator in OPERATORS:
        for T in args.lengths:
            rows.append(times(operator, T, "triton", bandwidth))
            if T <= 32768:  # PyTorch is slow, and needs much memory
                rows.append(times(operator, T, "reference", bandwidth))
    wrong = [errors(operator, 4133, dtype, "cuda") for operator in OPERATORS for dtype in DTYPES]
    halves = {operator: [row for row in wrong if row["operator"] == operator] for operator in OPERATORS}
    report(
        f"scan_1x{torch.cuda.get_device_name().split()[1]}", command_line("scan.py", argv), rows,
        tables={f"errors of {operator}": found for operator, found in halves.items()},
        facts={"copy GB/s": bandwidth}, save=args.save, out=args.out, markdown=True,
        commit=args.commit, html=args.html,
    )  # fmt: skip


if __name__ == "__main__":
    main()
