"""The delta rule on one GPU: errors against fp64, and times beside fla-core's kernels, in two tables.

    python bench/delta.py [--lengths 8192 32768 131072] [--dims 128 64] [--without-fla] [--save] [--commit SHA]

DeltaNet (`none`), Gated DeltaNet (`token`) and KDA (`channel`); decays are logsigmoid(x) of a normal x, `strong` ten
times that, keys of unit length, beta uniform in [0, 1]. Errors are relative to chunked fp64, of a tensor as a whole: o,
final state and all gradients. Times are medians of `triton.testing.do_bench`, forward and forward with backward, H 16,
of q, k, v in bf16 and log_decay in fp32; beside them the memory that forward and backward need beyond the inputs, and
fla's times where it is installed (some of its backwards refuse some versions of Triton: then a note). "% floor" is the
time of reading every input and writing every output once over the measured time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import command_line, report, table
from timing import copies, median
from torch import Tensor

import lasp
from lasp_kernels import path
from lasp_kernels.delta import DeltaOperands
from lasp_kernels.delta_steps import chunked_delta_rule

FORMS = ("none", "token", "channel")
NAMES = ("o", "final", "dq", "dk", "dv", "dbeta", "ds", "dg")
FLOOR = {"none": (4, 7), "token": (4, 7), "channel": (6, 11)}  # tensors of bf16; a decay per channel counts for two


def inputs(
    T: int, H: int, K: int, V: int, form: str, dtype: torch.dtype, device: str, strength: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, beta and, if there is one, log_decay, which all want a gradient; and do."""
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, T, H, n, device=device) for n in (K, K, V, V))
    x = [y.to(dtype) for y in (q, F.normalize(k, dim=-1), v, torch.rand(1, T, H, device=device))]
    if form != "none":
        shape = (1, T, H) if form == "token" else (1, T, H, K)
        x.append(strength * F.logsigmoid(torch.randn(shape, device=device)))
    return [y.requires_grad_() for y in x], do.to(dtype)


def ours(x: list[Tensor], **options) -> tuple[Tensor, Tensor | None]:
    """By the path of LASP_KERNELS."""
    return lasp.delta_rule(*x[:4], log_decay=x[4] if len(x) > 4 else None, scale=x[0].shape[-1] ** -0.5, **options)


def theirs(form: str) -> Callable[[list[Tensor]], Tensor]:
    """fla's kernels."""
    if form == "none":
        from fla.ops.delta_rule import chunk_delta_rule

        return lambda x: chunk_delta_rule(*x, scale=x[0].shape[-1] ** -0.5)[0]
    if form == "token":
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return lambda x: chunk_gated_delta_rule(*x[:3], x[4], x[3], scale=x[0].shape[-1] ** -0.5)[0]
    from fla.ops.kda import chunk_kda

    return lambda x: chunk_kda(*x[:3], x[4], x[3], scale=x[0].shape[-1] ** -0.5)[0]


def errors(
    T: int, H: int, K: int, V: int, form: str, dtype: torch.dtype, strength: float = 1.0, device: str = "cuda"
) -> dict:
    """A row."""
    x, do = inputs(T, H, K, V, form, dtype, device, strength)
    state, d_final = (torch.randn(1, H, K, V, device=device) for _ in range(2))
    found = []
    for wide in (False, True):
        *leaves, entering = [(y.detach().double() if wide else y.detach()).requires_grad_() for y in (*x, state)]
        if wide:
            log_decay = leaves[4] if len(leaves) > 4 else None
            options = {"log_decay": log_decay, "initial_state": entering, "scale": K**-0.5}
            results = chunked_delta_rule(*leaves[:4], **options)
        else:
            results = ours(leaves, initial_state=entering, output_final_state=True)
        seeds = [y.to(z.dtype) for y, z in zip((do, d_final), results)]
        order = [*leaves[:4], entering, *leaves[4:]]
        found.append([*results, *torch.autograd.grad(results, order, seeds)])
    row = {"T": T, "K": K, "V": V, "decay": form, "strength": strength, "dtype": str(dtype)[6:]}
    row["path"] = path(DeltaOperands(*x))
    return row | {name: None for name in NAMES} | {name: _relative(a, b) for name, a, b in zip(NAMES, *found)}


def _relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def same_bits(T: int, form: str, device: str = "cuda") -> bool:
    """Whether tokens that are cut at the border of a segment, the state handed on, give the bits of the whole."""
    x, _ = inputs(T, 2, 64, 64, form, torch.bfloat16, device)
    options, cut = {"segment_length": 256, "output_final_state": True}, T // 2 // 256 * 256
    with torch.no_grad():
        o, final = ours(x, **options)
        first, state = ours([y[:, :cut] for y in x], **options)
        second, end = ours([y[:, cut:] for y in x], initial_state=state, **options)
        assert final is not None
        assert end is not None
        return torch.equal(o, torch.cat([first, second], 1)) and torch.equal(final, end)


def times(T: int, dim: int, form: str, kernels: str, bandwidth: float) -> dict:
    """A row; `kernels` is a path, or "fla"."""
    x, do = inputs(T, 16, dim, dim, form, torch.bfloat16, "cuda")
    row = {"T": T, "dim": dim, "decay": form, "kernels": kernels}
    row |= dict.fromkeys(("fwd ms", "fwd % floor", "bwd ms", "bwd % floor", "MiB", "note"))
    floor = T * 16 * dim * 2 / bandwidth / 1e6
    try:
        if kernels == "fla":
            call = theirs(form)
        else:
            os.environ["LASP_KERNELS"] = kernels
            call = lambda y: ours(y)[0]  # noqa: E731
        with torch.no_grad():
            row["fwd ms"] = forward = median(lambda: call(x))
        row["fwd % floor"] = 100 * FLOOR[form][0] * floor / forward

        def both() -> None:
            torch.autograd.grad(call(x), x, do)

        both()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        torch.cuda.synchronize()
        row["MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        row["bwd ms"] = backward = median(both) - forward
        row["bwd % floor"] = 100 * FLOOR[form][1] * floor / backward
    except (RuntimeError, ImportError) as error:  # out of memory, too; fla refuses some versions of Triton
        row["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
    finally:
        os.environ.pop("LASP_KERNELS", None)
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--without-fla", action="store_true", help="it takes minutes to compile")
    parser.add_argument("--save", action="store_true", help="write bench/results/")
    parser.add_argument("--commit", help="of these files, on a machine that has not their history")
    args = parser.parse_args(argv)
    wrong = [
        errors(4133, 4, K, V, form, dtype)
        for dtype in (torch.bfloat16, torch.float32)
        for K, V in ((128, 128), (64, 64), (96, 80), (256, 256))
        for form in FORMS
    ]
    wrong += [errors(4133, 4, 128, 128, form, torch.bfloat16, 10.0) for form in ("token", "channel")]
    print(table(wrong), flush=True)  # whatever comes after
    bandwidth, rows = copies(), []
    for dim in args.dims:
        for T in args.lengths:
            for form in FORMS:
                rows += [times(T, dim, form, who, bandwidth) for who in ("triton", "fla")[: 2 - args.without_fla]]
                print(table(rows[-2:]), flush=True)
    rows.append(times(8192, args.dims[0], "token", "reference", bandwidth))
    facts = {
        "copy GB/s": bandwidth,
        "a sequence that is cut at the border of a segment gives the bits of the whole": [
            f"{form}: {same_bits(4133, form)}" for form in FORMS
        ],
    }
    report(
        "delta", command_line("delta.py", argv), rows, tables={"errors": wrong}, facts=facts, save=args.save,
        markdown=True, commit=args.commit,
    )  # fmt: skip


if __name__ == "__main__":
    main()
