"""Decoding on one GPU: a step of the operators, a token of TNL, tokens/s over the context, a softmax model beside.

    python bench/decode.py --save
    python bench/decode.py --phases step token --batch 1 16 --budget 120

`step`: one token of linear attention and of the delta rule, H 16 and K = V = 128, in as many layers as a model has, one
after the other. "% of floor" is the time of reading and writing the states once, at the speed of a copy, over that of
the CUDA graph. fla-core's fused_recurrent kernels beside.

`linears`: the linear layers of a block of TNL and its head, for a token of each of B sequences, with the norm, gate and
residual around them: GB/s of the weights, by PyTorch and, for as many rows as it serves, by few_rows.py, there also
with other programs (`--blocks`, outputs x columns x warps).

`token`: a token of TNL in bf16, as a CUDA graph, in each of the ways of decode_models.py. The floor is the time of
reading the weights (not the embedding's) and reading and writing the states, at the speed of a copy. Predicted for the
1B on an H200, one row by few_rows.py: 0.69 ms, of a floor of 0.49; us of its layers: q k v gate 11, out 4, value gate
14, glu out 8, head 72.

`lengths`: tokens/s of `lasp.generate` behind a prompt of each length that `lasp.prefill` has run; B is 1.

`softmax`: a token of a softmax model with the shape of TNL (SDPA, keys and values in buffers that are full, of random
numbers; its linear layers and rotations are as few launches as TNL's), TNL's first, and what a request holds in memory.

Before it is timed, a step is compared with fp64 (`--gate`), a model's with its logits of the whole sequence
(`--gate-model`). A phase that would go beyond `--budget`, or a row beyond `--limit`, is left out, and said so.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import fla_families
import torch
import torch.nn.functional as F
from common import add_report_arguments, command_line, report
from decode_models import HOWS, Stepping, graphed
from delta_peers import refusal
from tables import table
from timing import copies, median
from torch import Tensor

import lasp
import lasp_kernels as kernels
from lasp.models import TNLConfig
from lasp_kernels import few_rows, launch, layers
from lasp_kernels.delta import recurrent_delta_rule

FORMS = ("fixed", "none", "token", "channel", "delta")
PHASES = ("step", "linears", "token", "softmax", "lengths")  # the last one takes as long as it is given
LENGTHS = (1024, 8192, 65536, 524288, 4194304, 16777216)
CONTEXTS = (512, 1024, 2048, 4096, 8192, 32768, 262144)
PUBLISHED = Path(__file__).parent / "published_decode.csv"
NEW = 128  # tokens behind a prompt
LONG = 2**16  # tokens of a prompt whose time is not that of compiling kernels


class Clock:
    """Milliseconds of calls, and what is left of the budget."""

    def __init__(self, device: torch.device, budget: float):
        self.device, self.end = device, time.monotonic() + budget
        self.gb_per_second = copies() if device.type == "cuda" else _copies_on_cpu()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def __call__(self, call: Callable[[], object], rep: int = 60) -> float:
        """Median of a call, on a GPU with an empty L2 cache."""
        if self.device.type == "cuda":
            return median(call, rep)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
        return sorted(times)[1]

    def floor(self, moved: int) -> float:
        """Of moving so many bytes once."""
        return moved / self.gb_per_second / 1e6


def _copies_on_cpu() -> float:
    a, b = torch.zeros(2, 2**26, dtype=torch.uint8).unbind()
    b.copy_(a)
    begin = time.perf_counter()
    b.copy_(a)
    return 2 * a.numel() / (time.perf_counter() - begin) / 1e9


# ---- the step


class StepCase:
    """A token of each of B sequences, in bf16, and the states of some layers."""

    def __init__(self, form: str, B: int, layers: int, options: argparse.Namespace, device: torch.device):
        H, D = options.heads, options.dim
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(device)

        self.form, self.scale = form, D**-0.5
        self.q, self.k, self.v = (normal(B, H, D).bfloat16() for _ in range(3))
        self.beta = normal(B, H).sigmoid().bfloat16()
        if form == "delta":
            self.k = F.normalize(self.k.float(), dim=-1).bfloat16()
        shape = {"none": None, "fixed": (H,), "token": (B, H), "channel": (B, H, D), "delta": (B, H)}[form]
        self.log_decay = None if shape is None else F.logsigmoid(normal(*shape) + 3)
        self.states = [torch.randn(B, H, D, D, device=device) for _ in range(layers)]
        self.moved = 2 * self.states[0].nbytes + 4 * self.q.nbytes  # of one layer

    def ours(self, state: Tensor) -> Tensor:
        if self.form == "delta":
            return kernels.delta_rule_step(self.q, self.k, self.v, self.beta, self.log_decay, state, scale=self.scale)
        return kernels.linear_attention_step(self.q, self.k, self.v, self.log_decay, state, scale=self.scale)

    def fla(self, state: Tensor) -> Tensor:
        q, k, v = (x.unsqueeze(1) for x in (self.q, self.k, self.v))
        given = {"scale": self.scale, "initial_state": state, "output_final_state": True}
        decay = None if self.log_decay is None or self.form == "fixed" else self.log_decay.unsqueeze(1)
        if self.form == "delta":
            call = fla_families.fla("gated_delta_rule", "fused_recurrent_gated_delta_rule")
            return call(q, k, v, g=decay, beta=self.beta.unsqueeze(1), **given)[0].squeeze(1)
        if self.form == "channel":
            return fla_families.fla("gla", "fused_recurrent_gla")(q, k, v, gk=decay, **given)[0].squeeze(1)
        decays = {"g_gamma": self.log_decay} if self.form == "fixed" else {"g": decay}
        return fla_families.fla("simple_gla", "fused_recurrent_simple_gla")(q, k, v, **decays, **given)[0].squeeze(1)

    def error(self, call: Callable[[Tensor], Tensor]) -> float:
        """Of o, relative to the fp64 recurrence from the same state; the state is left as it was."""
        state = self.states[0]
        before = state.clone()
        o = call(state).double()
        state.copy_(before)
        q, k, v = (x.double().unsqueeze(1) for x in (self.q, self.k, self.v))
        decay = None if self.log_decay is None else self.log_decay.double()
        decay = decay if decay is None or self.form == "fixed" else decay.unsqueeze(1)
        given = {"log_decay": decay, "scale": self.scale, "initial_state": before.double()}
        if self.form == "delta":
            expected = recurrent_delta_rule(q, k, v, self.beta.double().unsqueeze(1), **given)[0].squeeze(1)
        else:
            expected = kernels.recurrent_linear_attention(q, k, v, **given)[0].squeeze(1)
        return ((o - expected).norm() / expected.norm()).item()


def step_phase(options: argparse.Namespace, clock: Clock, device: torch.device) -> Iterator[dict]:
    """Rows."""
    peers = ["lasp"] + (["fla"] if options.fla and fla_families.version() is not None else [])
    for form in options.decays:
        for B in options.batch:
            case = StepCase(form, B, options.layers, options, device)
            calls: dict[str, Callable[[Tensor], Tensor]] = {"lasp": case.ours}
            if "fla" in peers:
                calls["fla"] = case.fla
            for columns in options.columns if device.type == "cuda" else ():
                calls[f"lasp, {columns} columns"] = partial(_with_columns, columns, case)
            for name, call in calls.items():
                if clock.left < 0:
                    return
                yield _step_row(name, call, case, B, options, clock)
            del case, calls
            _free(device)


def _with_columns(columns: int, case: StepCase, state: Tensor) -> Tensor:
    """A step whose programs have so many. (What it costs the host is in "eager us".)"""
    from lasp_kernels import decode_kernels

    with mock.patch.object(decode_kernels, "_columns", return_value=columns):
        decode_kernels._step_launch.cache_clear()
        o = case.ours(state)
    decode_kernels._step_launch.cache_clear()
    return o


def _step_row(
    name: str, call: Callable[[Tensor], Tensor], case: StepCase, B: int, options: argparse.Namespace, clock: Clock
) -> dict:
    row: dict = {"decay": case.form, "B": B, "kernels": name}
    row |= dict.fromkeys(("error", "eager us", "graph us", "% of floor", "note"))
    layers = len(case.states)

    def all_layers() -> None:
        for state in case.states:
            call(state)

    try:
        row["error"] = error = case.error(call)
        if not error < options.gate:
            return row | {"note": f"{error:.1e} off: not timed"}
        row["eager us"] = clock(all_layers, options.rep) * 1e3 / layers
        row["graph us"] = us = clock(graphed(all_layers, clock.device), options.rep) * 1e3 / layers
        row["% of floor"] = 100 * clock.floor(case.moved) * 1e3 / us
    except Exception as problem:
        if name != "fla" and not isinstance(problem, torch.OutOfMemoryError):
            raise
        row["note"] = refusal(problem)
    return row


# ---- linear layers


class LinearCase:
    """A product of a token of B sequences, of the layers `weights` [N, D] of some copies, read one after another."""

    def __init__(
        self, name: str, B: int, D: int, sizes: tuple[int, ...], options: argparse.Namespace, device: torch.device
    ):
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, device=device).to(options.dtype)

        self.name, self.bytes = name, sum(sizes) * D * options.dtype.itemsize
        copied = max(1, min(options.layers, 2**30 // self.bytes))
        self.weights = [[normal(N, D) / D**0.5 for N in sizes] for _ in range(copied)]
        self.x, self.gate, self.residual = normal(B, 1, D), normal(B, 1, D), normal(B, 1, sizes[0])

    def __call__(self, weights: list[Tensor]) -> tuple[Tensor, ...]:
        if self.name == "out":
            x = self.x.unflatten(-1, (1, -1))
            return (kernels.norm_gate_linear(x, self.gate, weights[0], residual=self.residual),)
        if self.name == "glu out":
            return (kernels.gated_linear(self.x, self.gate, weights[0], residual=self.residual),)
        activations = ("silu", "silu", "none", "none")[: len(weights)] if len(weights) == 4 else None
        return kernels.norm_linear(self.x, weights, activations=activations)[1:]

    def error(self) -> float:
        """Relative to fp64."""
        found = torch.cat(self(self.weights[0]), -1).double()
        wide = copy.copy(self)
        wide.x, wide.gate, wide.residual = (x.double() for x in (self.x, self.gate, self.residual))
        expected = torch.cat(wide([w.double() for w in self.weights[0]]), -1)
        return ((found - expected).norm() / expected.norm()).item()


def linears_phase(options: argparse.Namespace, clock: Clock, device: torch.device) -> Iterator[dict]:
    """Rows."""
    config = _config(options.models[0], options)
    D, inner = config.width, config.glu_width
    shapes = {"q k v gate": (D, (D,) * 4), "out": (D, (D,)), "value gate": (D, (inner,) * 2), "glu out": (inner, (D,))}
    for B in options.batch:
        for name, (width, sizes) in (shapes | {"head": (D, (config.vocab_size,))}).items():
            if clock.left < 0:
                return
            case = LinearCase(name, B, width, sizes, options, device)
            for how, patched in _hows_of_linears(B, width, sizes, options, device).items():
                if clock.left < 0:
                    return
                with patched, torch.no_grad():
                    yield _linear_row(case, B, how, options, clock)
            del case
            _free(device)


def _hows_of_linears(
    B: int, width: int, sizes: tuple[int, ...], options: argparse.Namespace, device: torch.device
) -> dict[str, contextlib.AbstractContextManager]:
    """What is put in the place of what, by name."""
    hows: dict = {"PyTorch": mock.patch.object(layers, "_few_rows", return_value=False)}
    if device.type != "cuda" or B > few_rows.MOST_ROWS:  # which is PyTorch then
        return hows
    hows["few rows"] = contextlib.nullcontext()
    made = few_rows._blocks(sum(sizes), width, launch.processors(device))
    for given in options.blocks:
        if (block := few_rows.Blocks(*map(int, given.split("x")))) != made:
            hows[given] = mock.patch.object(few_rows, "_blocks", return_value=block)
    return hows


def _linear_row(case: LinearCase, B: int, how: str, options: argparse.Namespace, clock: Clock) -> dict:
    row: dict = {"layers": case.name, "B": B, "how": how} | dict.fromkeys(("error", "us", "GB/s", "% of copy", "note"))
    try:
        row["error"] = error = case.error()
        if not error < options.gate:
            return row | {"note": f"{error:.1e} off: not timed"}
        us = clock(graphed(partial(_all_of, case), clock.device), options.rep) * 1e3 / len(case.weights)
    except Exception as problem:
        if how in ("PyTorch", "few rows"):
            raise
        return row | {"note": refusal(problem)}  # more than a multiprocessor has
    return row | {"us": us, "GB/s": case.bytes / us / 1e3, "% of copy": 100 * clock.floor(case.bytes) * 1e3 / us}


def _all_of(case: LinearCase) -> None:
    for weights in case.weights:
        case(weights)


# ---- the token


def token_phase(options: argparse.Namespace, clock: Clock, device: torch.device) -> Iterator[dict]:
    """Rows."""
    for model in options.models:
        for B in options.batch:
            if clock.left < 0:
                return
            stepping = Stepping("tnl", _config(model, options), B, device, options.dtype)
            for how in options.hows:
                if how == "few rows" and B > few_rows.MOST_ROWS:  # which is eager then
                    continue
                if clock.left < 0:
                    return
                yield _token_row(stepping, model, how, options, clock)
            del stepping
            _free(device)


def _token_row(stepping: Stepping, model: str, how: str, options: argparse.Namespace, clock: Clock) -> dict:
    row: dict = {"model": model, "B": stepping.B, "how": how}
    row |= dict.fromkeys(("error", "ms", "floor ms", "ratio", "tokens/s", "GB of weights", "MB of states", "note"))
    begin = time.monotonic()
    try:
        with stepping.entered(how):
            row["error"] = error = stepping.error()
            if not error < options.gate_model:
                return row | {"note": f"{error:.1e} off: not timed"}
            row["ms"] = ms = clock(graphed(stepping.step, clock.device), options.rep)
    except Exception as problem:
        if not isinstance(problem, torch.OutOfMemoryError):
            raise
        return row | {"note": refusal(problem)}
    floor = clock.floor(stepping.bytes_of_token)
    row |= {"floor ms": floor, "ratio": ms / floor, "tokens/s": stepping.B / ms * 1e3}
    row |= {"GB of weights": stepping.bytes_of_weights / 1e9, "MB of states": stepping.bytes_held / 1e6}
    print(f"{model}, B {stepping.B}, {how}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return row


# ---- contexts


def lengths_phase(options: argparse.Namespace, clock: Clock, device: torch.device) -> Iterator[dict]:
    """Rows: a prompt of each length by `lasp.prefill`, and tokens behind it by `lasp.generate`."""
    model = Stepping("tnl", _config(options.models[0], options), 1, device, options.dtype).model
    draw = torch.Generator().manual_seed(1)
    known = 0.0  # seconds a token, of a prompt that is long enough to tell
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    for length in sorted(options.lengths):
        expected = known * length
        if expected > options.limit or expected > clock.left:
            print(f"a prompt of {length} tokens: not run, it would take {expected:.0f} s", file=sys.stderr)
            return
        ids = torch.randint(vocabulary, (1, length), generator=draw)
        begin = time.perf_counter()
        state = lasp.prefill(model, ids, segment=options.segment)
        _wait(device)
        seconds = time.perf_counter() - begin
        known = seconds / length if length >= LONG else 0.0
        lasp.generate(model, None, state=state, max_new_tokens=8)
        per_token, behind = _seconds_of_new(model, state, options.new, device)
        row = {"tokens of the prompt": length, "prefill s": seconds, "prefill tokens/s": length / seconds}
        row |= {"ms a token": per_token * 1e3, "tokens/s": 1 / per_token, "MB of the request": _held(behind) / 1e6}
        yield row


def _seconds_of_new(model: torch.nn.Module, state: lasp.InferenceState, new: int, device: torch.device):
    """Of a token, between the first some tokens of a generation and its last; and the state behind it."""
    stream = lasp.stream_tokens(model, None, state=state, max_new_tokens=new + 8)
    for _ in range(8):
        next(stream)
    _wait(device)
    begin = time.perf_counter()
    for _ in stream:
        pass
    _wait(device)
    return (time.perf_counter() - begin) / new, stream.result().state


def _held(state: lasp.InferenceState) -> int:
    return sum(held.x.nbytes for held in state.held.values())


def softmax_phase(options: argparse.Namespace, clock: Clock, device: torch.device) -> Iterator[dict]:
    """Rows: TNL once, and the softmax model at each context."""
    config = _config(options.models[0], options)
    yield _context_row(Stepping("tnl", config, 1, device, options.dtype), "any", options, clock)
    for context in sorted(options.contexts):
        _free(device)
        if clock.left < 0:
            return
        try:
            stepping = Stepping("softmax", config, 1, device, options.dtype, context=context)
            row = _context_row(stepping, context, options, clock)
        except torch.OutOfMemoryError:
            print(f"a softmax model at {context}: out of memory", file=sys.stderr)
            return
        del stepping
        yield row


def _context_row(stepping: Stepping, context: int | str, options: argparse.Namespace, clock: Clock) -> dict:
    with stepping.entered("few rows"):
        ms = clock(graphed(stepping.step, clock.device), options.rep)
    floor = clock.floor(stepping.bytes_of_token)
    row = {"model": stepping.kind, "context": context, "ms": ms, "tokens/s": 1e3 / ms, "floor ms": floor}
    return row | {"ratio": ms / floor, "MB of the request": stepping.bytes_held / 1e6}


def _config(name: str, options: argparse.Namespace) -> TNLConfig:
    changes = {} if options.vocab_size is None else {"vocab_size": options.vocab_size}
    return TNLConfig.named(name, **changes)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def published() -> list[dict]:
    """Figures of others."""
    with PUBLISHED.open() as file:
        lines = [line for line in file if not line.startswith("#")]
    return [{"model": row["model"], "tokens/s": float(row["tokens/s"])} for row in csv.DictReader(lines)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--models", nargs="+", default=["1B", "385M"], help="the first is that of the contexts")
    parser.add_argument("--hows", nargs="+", choices=HOWS, default=list(HOWS))
    parser.add_argument("--decays", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--segment", type=int, help="tokens of a segment of the prefill")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=8, help="steps in a row")
    parser.add_argument("--new", type=int, default=NEW, help="tokens behind a prompt")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16)
    parser.add_argument("--blocks", nargs="*", default=[], help="of programs of few_rows.py, such as 16x256x4")
    parser.add_argument("--columns", nargs="*", type=int, default=[], help="of programs of a step, such as 32")
    parser.add_argument("--rep", type=int, default=60, help="milliseconds of repetitions")
    parser.add_argument("--gate", type=float, default=1e-2)
    parser.add_argument("--gate-model", type=float, default=5e-2)
    parser.add_argument("--budget", type=float, default=240, help="seconds of all phases together")
    parser.add_argument("--limit", type=float, default=120, help="seconds of a prompt")
    parser.add_argument("--no-fla", dest="fla", action="store_false")
    parser.add_argument("--name", default="", help="behind that of the results")
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, options.budget)
    phases = {
        "step": step_phase,
        "linears": linears_phase,
        "token": token_phase,
        "lengths": lengths_phase,
        "softmax": softmax_phase,
    }
    tables: dict[str, list[dict]] = {}
    for name in options.phases:
        rows = tables[name] = []
        for row in phases[name](options, clock, device):
            rows.append(row)
            print(table(rows[-1:]), file=sys.stderr, flush=True)
        _free(device)
    facts = {
        "copy GB/s": clock.gb_per_second,
        "left of the budget, s": clock.left,
        "fla": fla_families.version() or "none",
    }
    first, *_ = tables
    report(
        f"decode{options.name}",
        command_line("decode.py", argv),
        tables.pop(first),
        tables={**{name: rows for name, rows in tables.items() if rows}, "published, tokens/s": published()},
        facts=facts,
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        markdown=True,
    )


if __name__ == "__main__":
    main()
