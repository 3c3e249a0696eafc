"""The delta rule on one GPU: errors against fp64, and times beside other packages' kernels, in tables.

    python bench/delta.py [--lengths 8192 32768 131072] [--dims 128 64] [--peers fla flashqla cudnn] [--save]

DeltaNet (`none`), Gated DeltaNet (`token`) and KDA (`channel`); decays are logsigmoid(x) of a normal x, `strong` ten
times that, keys of unit length, beta uniform in [0, 1]. Errors are relative to chunked fp64, of a tensor as a whole: o,
final state and all gradients. Times are medians of `triton.testing.do_bench`, forward and forward with backward, H 16,
of q, k, v in bf16 and log_decay in fp32, with the memory that forward and backward need beyond the inputs. "% floor" is
the time of reading every input and writing every output once over the measured time.

Peers are fla-core (its settings are compiled beforehand in processes beside this one), FlashQLA and cuDNN's frontend,
in the forms that they have. Each is compared with fp64 first, at the H of the times; a note says what is off or
refused, and that is not timed. FlashQLA and cuDNN cut a sequence where its decays have let the state fade, which these
decays do within some dozens of tokens: they are slower where decays are weak.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

import fla_families
import torch
import torch.nn.functional as F
from channel import same_bits_when_cut
from common import add_report_arguments, command_line, report
from delta_peers import FORMS as PEERS
from delta_peers import Call, peer, refusal, versions
from tables import table
from timing import copies, median
from torch import Tensor

import lasp
from lasp_kernels import path
from lasp_kernels.delta import DeltaOperands
from lasp_kernels.delta_steps import chunked_delta_rule

FORMS = ("none", "token", "channel")
HEADS = 16  # of what is timed
NAMES = ("o", "final", "dq", "dk", "dv", "dbeta", "ds", "dg")
FLOOR = {"none": (4, 7), "token": (4, 7), "channel": (6, 11)}  # tensors of bf16; a decay per channel counts for two
GRADIENTS = {form: ("dq", "dk", "dv", "dbeta", "dg")[: 4 + (form != "none")] for form in FORMS}
LIMIT = 0.05  # of a peer's errors, in bf16


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


def errors(
    T: int,
    H: int,
    K: int,
    V: int,
    form: str,
    dtype: torch.dtype,
    strength: float = 1.0,
    device: str = "cuda",
    call: Call | None = None,
    backward: bool = True,
) -> dict:
    """A row; with a peer's `call`, of what that computes, from and to no state, and without `backward` of o alone."""
    x, do = inputs(T, H, K, V, form, dtype, device, strength)
    given, seeds = dict(zip(("q", "k", "v", "beta", "g"), x)), {"o": do}
    if call is None:
        given["s"], seeds["final"] = (torch.randn(1, H, K, V, device=device) for _ in range(2))
    found = []
    for wide in (False, True):
        leaves = {name: (y.detach().double() if wide else y.detach()).requires_grad_() for name, y in given.items()}
        tokens, state = list(leaves.values())[: len(x)], leaves.get("s")
        if wide:
            options = {"log_decay": leaves.get("g"), "initial_state": state, "scale": K**-0.5}
            results = chunked_delta_rule(*tokens[:4], **options)[: len(seeds)]
        elif call is not None:
            results = (call(tokens),)
        else:
            results = ours(tokens, initial_state=state, output_final_state=True)
        found.append(dict(zip(seeds, results)))
        if backward:
            d = [y.to(z.dtype) for y, z in zip(seeds.values(), results)]
            gradients = torch.autograd.grad(results, list(leaves.values()), d)
            found[-1] |= dict(zip([f"d{name}" for name in leaves], gradients))
    row = {"T": T, "K": K, "V": V, "decay": form, "strength": strength, "dtype": str(dtype)[6:]}
    row["path"] = path(DeltaOperands(*x)) if call is None else None
    return row | {name: None for name in NAMES} | {name: _relative(y, found[1][name]) for name, y in found[0].items()}


def _relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def compared(name: str, form: str, dim: int, T: int = 4133, H: int = HEADS, device: str = "cuda") -> dict:
    """A peer's row of errors; in `note` what is off, or what it refuses."""
    row: dict = {"T": T, "K": dim, "V": dim, "decay": form, "strength": 1.0, "dtype": "bfloat16", "path": name}
    row |= dict.fromkeys((*NAMES, "note"))
    try:
        call = peer(name, form)
        for backward in (False, True):
            row |= errors(T, H, dim, dim, form, torch.bfloat16, 1.0, device, call, backward) | {"path": name}
    except Exception as problem:  # each package has its own
        print(f"{name} {form} {dim}: {str(problem)[:2000]}", file=sys.stderr, flush=True)
        row["note"] = refusal(problem)
    off = [f"{what} is {row[what]:.1e} off" for what in NAMES if row[what] is not None and not row[what] < LIMIT]
    row["note"] = ", ".join(off) or row["note"]
    return row


def right(row: dict, names: tuple[str, ...]) -> bool:
    """Whether a peer computes these."""
    return all(row[name] is not None and row[name] < LIMIT for name in names)


def same_bits(T: int, form: str, device: str = "cuda") -> bool:
    """See `same_bits_when_cut`."""
    x, _ = inputs(T, 2, 64, 64, form, torch.bfloat16, device)
    return same_bits_when_cut(lambda *y, **options: ours(list(y), **options), x)


def times(T: int, dim: int, form: str, kernels: str, bandwidth: float, checked: dict | None = None) -> dict:
    """A row; `kernels` is a path, or a peer whose row of errors is `checked`: what is not right is not timed."""
    row = {"T": T, "dim": dim, "decay": form, "kernels": kernels}
    row |= dict.fromkeys(("fwd ms", "fwd % floor", "bwd ms", "bwd % floor", "MiB", "note"))
    if checked is not None:
        row["note"] = checked["note"]
        if not right(checked, ("o",)):
            return row
    floor = T * HEADS * dim * 2 / bandwidth / 1e6
    x, do = inputs(T, HEADS, dim, dim, form, torch.bfloat16, "cuda")
    try:
        if checked is not None:
            call = peer(kernels, form)
        else:
            os.environ["LASP_KERNELS"] = kernels
            call = lambda y: ours(y)[0]  # noqa: E731
        with torch.no_grad():
            row["fwd ms"] = forward = median(lambda: call(x))
        row["fwd % floor"] = 100 * FLOOR[form][0] * floor / forward
        if checked is not None and not right(checked, GRADIENTS[form]):
            return row

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
    except Exception as problem:
        if checked is None and not isinstance(problem, RuntimeError):  # as running out of memory is
            raise
        row["note"] = refusal(problem)
    finally:
        os.environ.pop("LASP_KERNELS", None)
    return row


def compile_part(part: str, dims: list[int]) -> None:
    """In a process of its own: this part of the settings of fla's kernels (see fla_families.py)."""

    def once(dim: int, form: str) -> None:
        x, do = inputs(1024, HEADS, dim, dim, form, torch.bfloat16, "cuda")
        torch.autograd.grad(peer("fla", form)(x), x, do)

    fla_families.compile_part(part, [partial(once, dim, form) for dim in dims for form in FORMS])


def compared_peers(args: argparse.Namespace) -> dict[tuple[str, str, int], dict]:
    """The row of errors of each peer, form and head dim; fla's settings are compiled first."""
    if "fla" in args.peers and fla_families.version() is not None:
        dims = [str(dim) for dim in args.dims]
        fla_families.compile_beside([sys.executable, __file__, "--dims", *dims], args.compile_limit)
        fla_families.measure_quickly()
    cases = [(name, form, dim) for dim in args.dims for name in args.peers for form in PEERS[name]]
    return {case: compared(*case) for case in cases}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["fla"], help="beside ours (default fla)")
    parser.add_argument("--compile-limit", type=float, default=150, help="seconds for fla's settings (default 150)")
    parser.add_argument("--no-errors", action="store_true", help="of ours: times alone")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    add_report_arguments(parser)
    args = parser.parse_args(argv)
    if args.compile_part:
        return compile_part(args.compile_part, args.dims)
    wrong = []
    if not args.no_errors:
        wrong = [
            errors(4133, 4, K, V, form, dtype)
            for dtype in (torch.bfloat16, torch.float32)
            for K, V in ((128, 128), (64, 64), (96, 80), (256, 256))
            for form in FORMS
        ]
        wrong += [errors(4133, 4, 128, 128, form, torch.bfloat16, 10.0) for form in ("token", "channel")]
        print(table(wrong), flush=True)  # whatever comes after
    peers = compared_peers(args)
    if peers:
        print(table(list(peers.values())), flush=True)
    bandwidth, rows = copies(), []
    for dim in args.dims:
        for T in args.lengths:
            for form in FORMS:
                beside = [name for name in args.peers if form in PEERS[name]]
                rows.append(times(T, dim, form, "triton", bandwidth))
                rows += [times(T, dim, form, name, bandwidth, peers[name, form, dim]) for name in beside]
                print(table(rows[-1 - len(beside) :]), flush=True)
    rows.append(times(8192, args.dims[0], "token", "reference", bandwidth))
    tables = {"errors": wrong} if wrong else {}
    tables["errors of peers"] = list(peers.values())
    facts = {
        "copy GB/s": bandwidth,
        "peers": versions(args.peers),
        "a sequence that is cut at the border of a segment gives the bits of the whole": [
            f"{form}: {same_bits(4133, form)}" for form in FORMS
        ],
    }
    report(
        "delta", command_line("delta.py", argv), rows, tables=tables, facts=facts, save=args.save,
        out=args.out, markdown=True, commit=args.commit, html=args.html,
    )  # fmt: skip


if __name__ == "__main__":
    main()
