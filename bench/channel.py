"""A decay per channel on one GPU: errors against fp64, and times beside the PyTorch path and fla's, in two tables.

    python bench/channel.py [--lengths 8192 32768 131072] [--fla] [--save] [--commit SHA]
    python bench/channel.py --segments 0 512 1024 --finish 128x6 64x6 32x8   # which settings are fastest

Errors are relative to chunked fp64, of a tensor as a whole; o, final state and all gradients. Decays: `gla`
logsigmoid(x) / 16; `hgrn` logsigmoid(2x); `mixed` from -1e-4 to -50 a token and channel, so that all tiles are flagged
(see kernels/lasp_kernels/channel.py); `resets` of -1000 among weak ones. Times are medians of
`triton.testing.do_bench`, forward and forward with backward, of q, k, v in bf16 and log_decay in fp32; beside them the
memory that forward and backward need beyond the inputs. "% floor" is the time of reading every input and writing every
output once (forward q, k, v, o and log_decay: 6 tensors of bf16; backward 11) over the measured time. With --fla the
`gla` rows have fla-core's `chunk_gla` of the same process beside: its times, and its both over ours.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from unittest import mock

import fla_families
import torch
import torch.nn.functional as F
from common import add_report_arguments, command_line, report
from tables import table
from timing import copies, median, queued
from torch import Tensor

import lasp
from lasp_kernels import Operands, chunked_linear_attention, path, plan, shared

DECAYS = ("gla", "hgrn", "mixed", "resets")
NAMES = ("o", "final", "dq", "dk", "dv", "dg", "ds")
DIMS = (128, 64)  # of what is timed


def decays(kind: str, shape: tuple[int, ...], device: str) -> Tensor:
    """Log-decays of a kind, fp32."""
    x = torch.randn(shape, device=device)
    if kind == "gla":
        return F.logsigmoid(x) / 16
    if kind == "hgrn":
        return F.logsigmoid(2 * x)
    if kind == "resets":
        return torch.where(torch.rand(shape, device=device) < 0.03, -1000.0, -0.01)
    return -(10 ** (torch.rand(shape, device=device) * (math.log10(50) + 4) - 4))


def inputs(T: int, H: int, K: int, V: int, kind: str, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """q, k, v, log_decay, which all want a gradient, and do."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, T, H, n, device=device, dtype=dtype) for n in (K, K, V, V))
    return [x.requires_grad_() for x in (q, k, v, decays(kind, (1, T, H, K), device))], do


def ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """By the path of LASP_KERNELS."""
    return lasp.linear_attention(q, k, v, log_decay=log_decay, scale=q.shape[-1] ** -0.5, **options)


def errors(T: int, H: int, K: int, V: int, kind: str, dtype: torch.dtype, device: str = "cuda") -> dict:
    """A row."""
    x, do = inputs(T, H, K, V, kind, dtype, device)
    state, d_final = (torch.randn(1, H, K, V, device=device) for _ in range(2))
    found = []
    for wide in (False, True):
        leaves = [(y.detach().double() if wide else y.detach()).requires_grad_() for y in (*x, state)]
        if wide:
            options = {"log_decay": leaves[3], "initial_state": leaves[4], "scale": K**-0.5}
            results = chunked_linear_attention(*leaves[:3], **options)
        else:
            results = ours(*leaves[:4], initial_state=leaves[4], output_final_state=True)
        seeds = [y.to(z.dtype) for y, z in zip((do, d_final), results)]
        found.append([*results, *torch.autograd.grad(results, leaves, seeds)])
    errors = {name: _relative(a, b) for name, a, b in zip(NAMES, *found)}
    return {"T": T, "K": K, "V": V, "decay": kind, "dtype": str(dtype)[6:], "path": path(Operands(*x)), **errors}


def _relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def same_bits(T: int, device: str = "cuda") -> bool:
    """See `same_bits_when_cut`."""
    return same_bits_when_cut(ours, inputs(T, 2, 64, 64, "gla", torch.bfloat16, device)[0])


def same_bits_when_cut(call: Callable[..., tuple[Tensor, Tensor | None]], x: list[Tensor]) -> bool:
    """Whether tokens that are cut at the border of a segment, the state handed on, give the bits of the whole."""
    options, cut = {"segment_length": 256, "output_final_state": True}, x[0].shape[1] // 2 // 256 * 256
    with torch.no_grad():
        o, final = call(*x, **options)
        first, state = call(*(y[:, :cut] for y in x), **options)
        second, end = call(*(y[:, cut:] for y in x), initial_state=state, **options)
        assert final is not None
        assert end is not None
        return torch.equal(o, torch.cat([first, second], 1)) and torch.equal(final, end)


def times(T: int, dim: int, kind: str, kernels: str, bandwidth: float, *, beside: bool = False) -> dict:
    """A row; `beside`: with fla's times."""
    os.environ["LASP_KERNELS"] = kernels
    x, do = inputs(T, 16, dim, dim, kind, torch.bfloat16, "cuda")
    row = {"T": T, "dim": dim, "decay": kind, "path": path(Operands(*x))}
    try:
        forward, backward, memory = _both(lambda: ours(*x)[0], x, do)
    except torch.OutOfMemoryError:
        return {**row, "note": "out of memory"}
    finally:
        os.environ.pop("LASP_KERNELS")
    floor = T * 16 * dim * 2 / bandwidth / 1e6
    row |= {"fwd ms": forward, "fwd % floor": 600 * floor / forward}
    row |= {"bwd ms": backward, "bwd % floor": 1100 * floor / backward, "MiB": memory}
    if not beside:
        return row
    theirs = _both(lambda: fla_gla(*x), x, do)
    row |= {"fla fwd ms": theirs[0], "fla bwd ms": theirs[1], "fla MiB": theirs[2]}
    return {**row, "fla / lasp": (theirs[0] + theirs[1]) / (forward + backward)}


@contextmanager
def finishing(columns: int, stages: int) -> Iterator[None]:
    """The last kernel of backward with so many channels a program, and loads of so many tokens ahead."""
    forget = (shared.shared_by, plan.walk_blocks)
    with mock.patch.dict(plan.CONFIGS, {"channel finish": (plan.Config(1, 0, columns, 1, stages),) * 4}):
        for kept in forget:
            kept.cache_clear()
        yield
    for kept in forget:
        kept.cache_clear()


def settings(T: int, dim: int, segment_length: int, finish: str) -> dict:
    """A row: times of the GPU with segments of so many tokens (0: the plan's) and `finish` as COLUMNSxSTAGES."""
    x, do = inputs(T, 16, dim, dim, "gla", torch.bfloat16, "cuda")
    with finishing(*map(int, finish.split("x"))):
        call = partial(ours, *x, segment_length=segment_length or None)
        forward, backward, memory = _both(lambda: call()[0], x, do, queued)
    row = {"T": T, "dim": dim, "segment": segment_length or "plan", "finish": finish}
    return {**row, "fwd ms": forward, "bwd ms": backward, "both ms": forward + backward, "MiB": memory}


def fla_gla(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The same by fla-core."""
    from fla.ops.gla import chunk_gla  # type: ignore[import-not-found]

    return chunk_gla(q, k, v, log_decay, scale=q.shape[-1] ** -0.5)[0]


def _both(call: Callable[[], Tensor], x: list[Tensor], do: Tensor, clock=median) -> tuple[float, float, float]:
    """Forward and backward in ms, and the MiB of memory that both need."""
    with torch.no_grad():
        forward = clock(call)

    def both():
        torch.autograd.grad(call(), x, do)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    torch.cuda.synchronize()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    return forward, clock(both) - forward, memory


def compile_part(part: str) -> None:
    """In a process of its own: this part of the settings of fla's kernels (see fla_families.py)."""

    def once(dim: int) -> None:
        x, do = inputs(1024, 16, dim, dim, "gla", torch.bfloat16, "cuda")
        torch.autograd.grad(fla_gla(*x), x, do)

    fla_families.compile_part(part, [partial(once, dim) for dim in DIMS])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--fla", action="store_true", help="fla-core's times beside")
    parser.add_argument("--segments", type=int, nargs="+", help="time these lengths of a segment; 0: the plan's")
    parser.add_argument(
        "--finish", nargs="+", metavar="COLUMNSxSTAGES", help="time these of the last kernel of backward"
    )
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    if args.compile_part:
        return compile_part(args.compile_part)
    if args.segments or args.finish:
        grid = product(DIMS, args.lengths, args.segments or [0], args.finish or ["128x6"])
        rows = []
        for dim, T, segment, finish in grid:
            rows.append(settings(T, dim, segment, finish))
            print(rows[-1], file=sys.stderr, flush=True)  # whatever comes after
        report(
            "channel_settings",
            command_line("channel.py", argv),
            rows,
            save=args.save,
            out=args.out,
            markdown=True,
            commit=args.commit,
            html=args.html,
        )
        return None
    dims = ((128, 128), (64, 64), (96, 80), (256, 256))
    wrong = [
        errors(4133, 4, K, V, kind, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for K, V in dims
        for kind in DECAYS
    ]
    print(table(wrong), flush=True)  # whatever comes after
    if args.fla:
        fla_families.compile_beside([sys.executable, __file__], 100)
        fla_families.measure_quickly()
    bandwidth, rows = copies(), []
    for dim in DIMS:
        for T in args.lengths:
            rows.append(times(T, dim, "gla", "triton", bandwidth, beside=args.fla))
            if T == 32768:  # PyTorch is slow, and needs much memory
                rows.append(times(T, dim, "gla", "reference", bandwidth))
    rows += [times(32768, 128, kind, "triton", bandwidth) for kind in ("hgrn", "mixed")]
    facts = {
        "copy GB/s": bandwidth,
        "a sequence that is cut at the border of a segment gives the bits of the whole": same_bits(4133),
    }
    report(
        "channel", command_line("channel.py", argv), rows, tables={"errors": wrong}, facts=facts, save=args.save,
        out=args.out, markdown=True, commit=args.commit, html=args.html,
    )  # fmt: skip


if __name__ == "__main__":
    main()
