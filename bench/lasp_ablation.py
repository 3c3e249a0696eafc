"""LASP's own ablation on a training step of TNL: state cache and kernel fusion, on and off; and the longest sequences.

    torchrun --nproc-per-node 2 bench/lasp_ablation.py --model 1B [--save]
    torchrun --nproc-per-node 2 bench/lasp_ablation.py --model 1B --suite longest --methods lasp megatron

Suite `ablation`: one sequence over all ranks, no block recomputed. Suite `longest`: the longest sequence that each way
to split one can hold, forward, backward and AdamW with all blocks recomputed. Memory is measured at two lengths. The
length at which it would reach --fill of the card is then run, or, where a step of it would take longer than --proof
seconds, only predicted. Nothing counts before it is right: losses of two steps and gradients of a small model against
one process. See bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from common import add_report_arguments, command_line, report
from scaling import (
    GATE_TOKENS,
    add_model_arguments,
    capacity,
    elapsed,
    fitting_tokens,
    free,
    mark,
    steps,
    synchronize,
)
from sequence_methods import METHODS, Method, Split
from torch.distributed.tensor import DTensor

import lasp
import lasp.models.lrpe
import lasp_kernels
from lasp.exchange import cost
from lasp.ops import attention
from lasp.ranks import SCHEDULES
from lasp_kernels import Operands, layers
from lasp_kernels.reference import reference_norm_gate, reference_rotate

SUITES = ("ablation", "longest")
FUSION = {
    "on": "Triton kernels",
    "attention off": "linear attention in PyTorch's products, the other kernels as they are",
    "off": "linear attention, norms, gates and rotation in PyTorch",
}
CACHE = {"on": "states of forward kept for backward", "off": "made again in backward, with forward's exchange"}
GRACE = 10.0  # seconds for the first rank to tell what there is: torchrun ends all when one has ended
PUBLISHED = Path(__file__).parent / "published_longest.csv"
LOSS_LIMIT = 1e-2  # relative difference of losses from those of one process
GRADIENT_LIMITS = {"cuda": 5e-2, "cpu": 1e-4}  # of gradients (Frobenius, of all weights together): bf16, and fp32


# ---- what is switched off


@contextlib.contextmanager
def replaced(owner: object, **attributes: object) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def switched(fusion: str, cache: str) -> Iterator[None]:
    """Training steps with this fusion and this cache; for a model that is made in it."""
    with contextlib.ExitStack() as stack:
        if fusion != "on":
            stack.enter_context(environment(LASP_KERNELS="reference"))
        if fusion == "off":
            unfused = {"_fuses": lambda x, *weights: False, "norm_gate": reference_norm_gate}
            stack.enter_context(replaced(layers, **unfused))
            stack.enter_context(replaced(lasp_kernels, norm_gate=reference_norm_gate))
            stack.enter_context(replaced(lasp.models.lrpe, rotate=reference_rotate))
        if cache == "off":
            stack.enter_context(replaced(attention, _LinearAttention=_WithoutStates))
        yield


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


_WithStates = attention._LinearAttention


class _WithoutStates(_WithStates):
    """Keeps no states, neither of segments nor what came from other ranks. Of calls without an initial state."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, initial_state, facts, started):
        results = _WithStates.forward(ctx, q, k, v, log_decay, initial_state, facts, started)
        ctx.save_for_backward(q, k, v, log_decay)  # in place of what that has saved
        ctx.needs = facts[-2]
        return results

    @staticmethod
    def backward(ctx, do, d_final_state):
        x = Operands(*ctx.saved_tensors, *ctx.options)
        steps, maps, wait, _ = attention.start_forward(x, None, ctx.call, ctx.needs, None)
        states, _ = steps.scan(maps, wait())
        del maps
        kept = attention.Kept(states)
        found = attention.backward(x, kept, do, d_final_state, ctx.call, steps, ctx.needs_grad)
        return found.dq, found.dk, found.dv, None, None, None, None


# ---- is it right


class Gate:
    """Compares small models with one process: losses of two steps, and gradients."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        small = {"layers": 2, "vocab": 512, "chunk": 0}
        self.options, self.device = argparse.Namespace(**{**vars(options), **small}), device
        self.rows: list[dict] = []
        self._expected: dict[tuple, tuple] = {}

    def passes(self, what: str, method: Method, fusion: str = "on", cache: str = "on", **changes: object) -> bool:
        """The same on every rank; `changes` of the options."""
        of_losses, of_gradients = self._errors(method, fusion, cache, changes)
        limit = GRADIENT_LIMITS[self.device.type]
        row = {"what": what, "of losses": float(f"{of_losses:.3g}"), "limit": LOSS_LIMIT}
        row |= {"of gradients": float(f"{of_gradients:.3g}"), "its limit": limit}
        row["right"] = of_losses <= LOSS_LIMIT and of_gradients <= limit
        self.rows.append(row)
        tell(str(row))
        return row["right"]

    def _errors(self, method: Method, fusion: str, cache: str, changes: dict) -> tuple[float, float]:
        """Relative, on the worst rank."""
        ranks = dist.get_world_size()
        options = argparse.Namespace(**{**vars(self.options), **changes})
        with switched(fusion, cache):
            losses, gradients = self._trained(options, method, ranks)
        key = (method.softmax, *changes.items())
        if key not in self._expected:
            one, of_one = self._trained(options, method, 1)
            self._expected[key] = one, {name: g.cpu() for name, g in of_one.items()}  # whose memory is not measured
        expected_losses, expected = self._expected[key]
        if gradients.keys() != expected.keys():
            raise RuntimeError(f"{method.name} has other parameters: {sorted(gradients.keys() ^ expected.keys())}")
        squares = [self._squares(gradients[name], g.to(self.device)) for name, g in expected.items()]
        off, of = (torch.stack(x).sum() for x in zip(*squares))
        of_losses = max(abs(split - one) / one for split, one in zip(losses, expected_losses))
        worst = torch.stack([torch.tensor(of_losses, device=self.device).double(), (off / of).sqrt()])
        worst = worst.nan_to_num(nan=torch.inf)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return tuple(worst.tolist())  # type: ignore[return-value]

    @staticmethod
    def _squares(found: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the difference, and of what was expected."""
        return (found.double() - expected.double()).square().sum(), expected.double().square().sum()

    def _trained(self, options: argparse.Namespace, method: Method, ranks: int) -> tuple[list, dict]:
        training = Split(options, method, ranks, self.device)
        batch = training.batch(GATE_TOKENS * dist.get_world_size() // ranks)
        losses = [training.step(batch).item()]
        gradients = {name: whole(p.grad) for name, p in training.model.named_parameters()}
        losses.append(training.step(batch).item())  # tells whether the optimizer got them
        del training
        free()
        return losses, gradients


def whole(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


# ---- the ablation


def ablation(options: argparse.Namespace, gate: Gate, clock: Clock, rows: list[dict]) -> None:
    """A row for each fusion and cache."""
    own = argparse.Namespace(**{**vars(options), "recompute": 0})
    tokens, ranks, device = options.tokens, dist.get_world_size(), gate.device
    for fusion in options.fusion:
        for cache in CACHE:
            row = {"fusion": fusion, "state cache": cache, "tokens a rank": tokens}
            columns = ("step ms", "tokens/s", "x neither", "peak GiB", "exchanges of a layer", "note")
            rows.append(row | dict.fromkeys(columns))
            row = rows[-1]
            if clock.left() <= 0:
                row["note"] = "not run: no time left"
                continue
            if not gate.passes(f"fusion {fusion}, state cache {cache}", METHODS[0], fusion, cache, recompute=0):
                row["note"] = "not run: wrong"
                continue
            with switched(fusion, cache):
                training = Split(own, METHODS[0], ranks, device)
                seconds, row["peak GiB"] = steps(training, training.batch(tokens), own)
            exchanges = [layer.exchanges for layer in lasp.explain(training.model)]
            row["exchanges of a layer"] = sum(exchanges) / len(exchanges) / (own.steps + own.warmup)
            del training
            free()
            row |= {"step ms": seconds * 1e3, "tokens/s": tokens * ranks / seconds}
            row["note"] = None if device.type == "cuda" else "a CPU has no fused kernels, and tells no peak memory"
            tell(str(row))
    neither = next((r["tokens/s"] for r in rows if r["fusion"] == r["state cache"] == "off"), None)
    for row in rows:
        row["x neither"] = row["tokens/s"] / neither if neither and row["tokens/s"] else None


# ---- the longest sequence


def longest(options: argparse.Namespace, gate: Gate, clock: Clock, rows: list[dict]) -> None:
    """A row for each method."""
    same = {"lrpe": False, "recompute": None}
    own = argparse.Namespace(**{**vars(options), **same})
    for method in METHODS:
        if method.name not in options.methods:
            continue
        row: dict = {"method": method.name, "sequence": None, "tokens a rank": None, "peak GiB": None, "step s": None}
        row |= {"tokens/s": None, "by": None, "GiB at": None, "what": method.what, "note": None}
        rows.append(row)
        if clock.left() <= 0:
            row["note"] = "not run: no time left"
        elif not gate.passes(f"method {method.name}", method, **same):
            row["note"] = "not run: wrong"
        else:
            row |= longest_of(own, method, gate.device, clock)
            free()
        tell(str(row))


def longest_of(options: argparse.Namespace, method: Method, device: torch.device, clock: Clock) -> dict:
    """What a row says of a method that is right."""
    ranks = dist.get_world_size()
    training = Split(options, method, ranks, device)
    training.step(training.batch(max(64, options.short[0] // 4 // 64 * 64)))  # the optimizer has its moments now
    tried = []
    for tokens in options.short if method.softmax else options.lengths:
        seconds, peak = one_step(training, tokens)
        tried.append({"tokens a rank": tokens, "peak GiB": peak, "step s": seconds})
        tell(f"{method.name}: {tried[-1]}")
    row: dict = {"GiB at": ", ".join(f"{r['tokens a rank']}: {r['peak GiB'] or 0:.4g}" for r in tried)}
    if tried[-1]["peak GiB"] is None:
        return row | {"GiB at": None, "note": "not found: a CPU tells no peak memory"}
    if tried[0]["peak GiB"] >= tried[1]["peak GiB"]:
        return row | {"note": "not found: memory does not grow between these lengths; give longer ones"}
    tokens = int(fitting_tokens(tried, options.fill * capacity_of(device)) // 128 * 128)
    seconds, peak, by = seconds_at(tokens, tried), options.fill * capacity_of(device), "predicted"
    if tokens <= tried[-1]["tokens a rank"]:
        tokens, peak, seconds = (tried[-1][name] for name in ("tokens a rank", "peak GiB", "step s"))
        by, row["note"] = "run", "the lengths tried are as long as fits: give shorter ones"
    elif 1.2 * seconds <= min(options.proof, clock.left()):
        tell(f"{method.name}: {tokens} tokens a rank, {seconds:.3g} s predicted")
        (seconds, peak), by = one_step(training, tokens), "run"
    row |= {"sequence": tokens * ranks, "tokens a rank": tokens, "peak GiB": peak, "step s": seconds}
    return row | {"tokens/s": tokens * ranks / seconds, "by": by}


def one_step(training: Split, tokens: int) -> tuple[float, float | None]:
    """Seconds on the slowest rank, and peak memory in GiB on the fullest."""
    device = training.device
    free()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    batch = training.batch(tokens)
    synchronize(device)
    dist.barrier()
    begin = mark(device)
    training.step(batch)
    end = mark(device)
    synchronize(device)
    peak = peak_gib(device)
    mine = torch.tensor([elapsed(begin, end), peak or 0.0], dtype=torch.float64, device=device)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    seconds, worst = mine.tolist()
    return seconds, None if peak is None else worst


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def capacity_of(device: torch.device) -> float:
    """GiB of the smallest device."""
    return capacity(device)


def seconds_at(tokens: int, tried: Sequence[dict]) -> float:
    """Of a step: a part that grows with the tokens and one that grows with their square, through two lengths."""
    (a, s), (b, t) = ((r["tokens a rank"], r["step s"]) for r in tried[-2:])
    square = max(0.0, (t / b - s / a) / (b - a))
    return (t / b + square * (tokens - b)) * tokens


# ---- the script


class Clock:
    """What is left of the budget, the same on all ranks."""

    def __init__(self, budget: float, device: torch.device):
        self.end, self.device = time.perf_counter() + budget, device

    def left(self) -> float:
        mine = torch.tensor(self.end - time.perf_counter(), device=self.device)
        dist.all_reduce(mine, dist.ReduceOp.MIN)
        return mine.item()


def tell(what: str) -> None:
    """Now, by rank 0: whatever comes later may end the run."""
    if dist.get_rank() == 0:
        print(what, file=sys.stderr, flush=True)


def published() -> list[dict]:
    lines = [line for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    names = lines[0].split(",")
    return [dict(zip(names, line.split(","))) for line in lines[1:]]


def rounded(rows: list[dict]) -> list[dict]:
    return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES))
    parser.add_argument("--tokens", type=int, default=16384, help="of a rank, in `ablation`")
    parser.add_argument("--fusion", nargs="+", choices=FUSION, default=list(FUSION), help="in `ablation`")
    parser.add_argument("--methods", nargs="+", choices=[m.name for m in METHODS], default=[m.name for m in METHODS])
    parser.add_argument(
        "--lengths",
        nargs=2,
        type=int,
        default=[98304, 131072],
        help="of a rank, in `longest`, where memory is measured",
    )
    parser.add_argument("--short", nargs=2, type=int, default=[49152, 65536], help="the same of softmax attention")
    parser.add_argument("--fill", type=float, default=0.85, help="the share of the memory to be used")
    parser.add_argument("--proof", type=float, default=30.0, help="seconds of a step of the longest, at most")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further row begins")
    parser.add_argument("--exchange", choices=("auto", *SCHEDULES), default="auto")
    add_model_arguments(parser)
    add_report_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    if options.parallel != "fsdp2" or options.graph or options.compile:
        raise SystemExit("bench/lasp_ablation.py is for FSDP2 without --graph and --compile")
    for name, (first, second) in (("--lengths", options.lengths), ("--short", options.short)):
        if not 0 < first < second or first % 2 or second % 2:
            raise SystemExit(f"{name} must be two even lengths, the longer behind, got {first} {second}")
    # Read with the first memory of a GPU. Without it 18 GiB of an H200 lay free in pieces that were each too small.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    env = lasp.init()
    if env.world_size < 2:
        raise SystemExit("needs two ranks or more: torchrun --nproc-per-node 2 bench/lasp_ablation.py")
    clock, gate = Clock(options.budget, env.device), Gate(options, env.device)
    cost.measure(lasp.SequenceParallel(dist.group.WORLD))
    found: dict[str, list[dict]] = {}
    for suite in options.suite:
        found[suite] = []
        try:
            {"ablation": ablation, "longest": longest}[suite](options, gate, clock, found[suite])
        except torch.OutOfMemoryError as problem:  # other ranks may wait for this one now
            print(f"rank {env.rank}: {problem}", file=sys.stderr, flush=True)
            found[suite][-1]["note"] = "ran out of memory, which ended the run"
            if env.rank == 0:
                tell_all(options, argv, env, gate.rows, found)
            else:
                time.sleep(GRACE)
            os._exit(1)
    if env.rank == 0:
        tell_all(options, argv, env, gate.rows, found)
    if not all(row["right"] for row in gate.rows):
        raise SystemExit("what is wrong was not measured")


def tell_all(
    options: argparse.Namespace, argv: list[str] | None, env: lasp.Env, gates: list[dict], found: dict[str, list[dict]]
) -> None:
    """Tables and JSON, by rank 0."""
    titles = {"ablation": "state cache and kernel fusion", "longest": "the longest sequence"}
    tables = {titles[suite]: rounded(rows) for suite, rows in found.items()}
    if "longest" in found:
        tables["published: what 64 A100 80GB held"] = published()
    facts = {"ranks": env.world_size, "backend": env.backend, "model": options.model, "decay": options.decay}
    facts |= {f"fusion {name}": what for name, what in FUSION.items()}
    facts |= {f"state cache {name}": what for name, what in CACHE.items()}
    facts |= {"chunk of the gated units": options.chunk or "all", "share of the memory": options.fill}
    facts |= {"memory GiB": capacity_if_known(env.device), "load of the host (1 minute)": os.getloadavg()[0]}
    report(
        f"lasp_ablation_{options.model}_{env.world_size}x{env.device.type}",
        command_line("lasp_ablation.py", argv, env.world_size),
        gates,
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        tables=tables,
        facts=facts,
        markdown=True,
        digits=4,
    )
    sys.stdout.flush()


def capacity_if_known(device: torch.device) -> float | None:
    return torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    dist.destroy_process_group()
