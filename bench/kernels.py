"""`lasp.linear_attention` on one GPU against fla-core, torch SDPA and the limits of the card, in one process.

    python bench/kernels.py --suite headline [lengths published grid normaliser groups cold] [--budget 500] [--save]

Before a decay form and head dim are timed, the bf16 output and gradients must be as near to an fp64 computation as
fla's (at most 1.2 times its error). Times are medians of `triton.testing.do_bench`, which empties the L2 cache before
every call. Short calls wait for the host, whose time varies by a factor of two within seconds on some machines: they
are timed in six rounds that take turns with fla's, and the least median counts. "card" is the time of the card alone,
from a CUDA graph of calls below 2 ms. "% floor" is the time that reading every input and writing every output once
takes at the speed of a device-to-device copy, over the measured time: forward q, k, v, o; backward q, k, v, do, dq, dk,
dv. The suites `normaliser` and `groups` have no peer: they are timed next to what gives the same without these forms, a
column of ones behind v ("ones") and q and k that are repeated ("repeated"); "plain" is without a normaliser.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import fla_families
import torch
import torch.nn.functional as F
from common import RESULTS, report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lasp
from lasp_kernels import chunked_linear_attention

DEVICE = "cuda"
DECAYS = ("none", "fixed", "token")
GATE_CASE = dict(batch=1, tokens=4133, heads=8)  # no multiple of anything
GATE_RATIO = 1.2  # of fla's error
GATE_LIMIT, GATE_LIMIT_DECAY = 1e-2, 5e-2  # relative error, whatever fla's is
GRID_BYTES = 8 * 2**30
SOFTMAX_FLOPS = 1e14
HOST_MS = 2.0  # a longer call does not wait for the host, and its graph would only hold memory
SHORT, ROUNDS = 2**20, 6  # rows with at most so many (token, head) pairs wait for the host: timed in so many rounds
PARTS = ("fwd", "bwd", "both", "fwd card", "both card")  # that are compared with fla
LAYERS = 24  # of the model whose first layer's ALiBi slopes are the fixed decay
Attention = Callable[["Inputs"], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape; K = V = dim. `decay`: none, fixed ([H]) or token ([B, T, H], which then has a gradient).

    `values`: V, if it is another. `groups`: heads of q and k, if there are fewer than of v.
    """

    batch: int
    tokens: int
    heads: int
    dim: int
    decay: str
    values: int = 0
    groups: int = 0
    normalize: bool = False

    @property
    def form(self) -> str:
        """The decay, and what is not usual."""
        groups = f", V{self.values or self.dim} of {self.groups} group{'s' * (self.groups > 1)}" if self.groups else ""
        return f"{self.decay}{groups}{', normalised' if self.normalize else ''}"

    @property
    def tensor_bytes(self) -> int:
        return self.batch * self.tokens * self.heads * self.dim * 2

    @property
    def softmax_flops(self) -> float:
        return 2.0 * self.batch * self.heads * self.tokens**2 * self.dim

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} H{self.heads} D{self.dim} {self.form}"


@dataclass(frozen=True)
class Inputs:
    """q, k, v and do [B, T, H, D]; the leaves require a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    log_decay: Tensor | None
    normalize: bool = False

    @classmethod
    def random(cls, case: Case) -> Inputs:
        draw = torch.Generator(DEVICE).manual_seed(0)
        shape = (case.batch, case.tokens, case.heads, case.values or case.dim)
        narrow = (case.batch, case.tokens, case.groups or case.heads, case.dim)
        shapes = (narrow, narrow, shape, shape)
        q, k, v, do = (torch.randn(s, generator=draw, device=DEVICE, dtype=torch.bfloat16) for s in shapes)
        if case.normalize:
            q, k = (F.elu(x) + 1 for x in (q, k))
        log_decay = None
        if case.decay == "fixed":
            log_decay = lasp.decay.alibi(case.heads, 0, LAYERS).to(DEVICE)
        elif case.decay == "token":
            log_decay = (-0.1 * torch.rand(shape[:3], generator=draw, device=DEVICE)).requires_grad_()
        return cls(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do, log_decay, case.normalize)

    @property
    def leaves(self) -> list[Tensor]:
        qkv = [self.q, self.k, self.v]
        return [*qkv, self.log_decay] if self.log_decay is not None and self.log_decay.requires_grad else qkv

    def double(self) -> Inputs:
        def up(x: Tensor) -> Tensor:
            return x.detach().double().requires_grad_(x.requires_grad)

        decay = None if self.log_decay is None else up(self.log_decay)
        return Inputs(up(self.q), up(self.k), up(self.v), up(self.do), decay, self.normalize)

    @property
    def floors(self) -> tuple[int, int]:
        """Bytes of the inputs and outputs of forward, and of backward."""
        qkv = self.q.nbytes + self.k.nbytes + self.v.nbytes
        return qkv + self.do.nbytes, 2 * qkv + self.do.nbytes


def linear(x: Inputs) -> Tensor:
    return lasp.linear_attention(x.q, x.k, x.v, log_decay=x.log_decay, normalize=x.normalize)[0]


def plain(x: Inputs) -> Tensor:
    return lasp.linear_attention(x.q, x.k, x.v, log_decay=x.log_decay)[0]


def ones(x: Inputs) -> Tensor:
    """The normaliser as a column of v."""
    o = lasp.linear_attention(x.q, x.k, F.pad(x.v, (0, 1), value=1.0), log_decay=x.log_decay)[0]
    return o[..., :-1] / o[..., -1:]


def repeated(x: Inputs) -> Tensor:
    q, k = (y.repeat_interleave(x.v.shape[2] // y.shape[2], 2) for y in (x.q, x.k))
    return lasp.linear_attention(q, k, x.v, log_decay=x.log_decay, normalize=x.normalize)[0]


def oracle(x: Inputs) -> Tensor:
    return chunked_linear_attention(x.q, x.k, x.v, log_decay=x.log_decay, normalize=x.normalize)[0]


@lru_cache
def fla_function() -> Callable:
    from fla.ops.simple_gla import chunk_simple_gla  # type: ignore[import-not-found]

    return chunk_simple_gla


def fla(x: Inputs) -> Tensor:
    decay = {} if x.log_decay is None else {"g_gamma" if x.log_decay.ndim == 1 else "g": x.log_decay}
    return fla_function()(x.q, x.k, x.v, scale=1.0, **decay)[0]


def softmax(x: Inputs) -> Tensor:
    """Causal softmax attention by the flash kernel; it knows no decay."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return o.transpose(1, 2)


ATTENTIONS: dict[str, Attention] = {"lasp": linear, "fla": fla, "sdpa": softmax}
OTHER_WAYS: dict[str, Attention] = {"plain": plain, "ones": ones, "repeated": repeated}


# ---- correctness


def step(attention: Attention, x: Inputs) -> list[Tensor]:
    """The output and all gradients."""
    o = attention(x)
    return [o.detach(), *torch.autograd.grad(o, x.leaves, x.do)]


def errors(attention: Attention, x: Inputs, exact: list[Tensor]) -> dict[str, float]:
    """Relative error (Frobenius) of the output and every gradient; infinite if an element is not finite."""
    found = {}
    for name, actual, expected in zip(("o", "dq", "dk", "dv", "dlog_decay"), step(attention, x), exact):
        error = ((actual.double() - expected).norm() / expected.norm()).item()
        found[name] = error if math.isfinite(error) else math.inf
    return found


def gate(case: Case, peer: Attention | None) -> tuple[bool, list[dict]]:
    """Whether output and gradients are right, and a row for each of them."""
    x = Inputs.random(case)
    exact = step(oracle, x.double())
    ours = errors(linear, x, exact)
    theirs = {} if peer is None else errors(peer, x, exact)
    rows = []
    for name, error in ours.items():
        limit = GATE_LIMIT_DECAY if name == "dlog_decay" else GATE_LIMIT
        if math.isfinite(theirs.get(name, math.inf)):
            limit = min(limit, GATE_RATIO * theirs[name])
        row = {"decay": case.form, "dim": case.dim, "what": name, "lasp": rounded(error)}
        row |= {"fla": rounded(theirs.get(name)), "limit": rounded(limit), "ok": error <= limit}
        rows.append(row)
    return all(row["ok"] for row in rows), rows


# ---- time and memory


def rounded(x: float | None) -> float | None:
    """To 4 digits; None for what JSON cannot say."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.4g}")


def milliseconds(run: Callable[[], object], rep: int) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=max(5, rep // 4), rep=rep, return_mode="median"))  # type: ignore[arg-type]


def loop_milliseconds(run: Callable[[], object], count: int = 50) -> float:
    """Of one call in a plain loop without pauses, where the host's part of short calls shows."""
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count * 1000


def card_milliseconds(run: Callable[[], object], rep: int) -> float:
    """Of the card alone, by replays of a CUDA graph of the call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept = run()
    found = milliseconds(graph.replay, rep)
    del kept
    return found


def ceilings(rep: int) -> dict[str, float]:
    """What the card gives to a copy (bytes read and written) and to a matrix product."""
    draw = torch.Generator(DEVICE).manual_seed(0)  # the default one is not to be used after a capture that failed
    source = torch.randn(2**29, generator=draw, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, generator=draw, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    copy = milliseconds(lambda: target.copy_(source), rep)
    product = milliseconds(lambda: a @ b, rep)
    return {"copy GB/s": 2 * source.nbytes / copy / 1e6, "matmul TFLOP/s": 2 * 8192**3 / product / 1e9}


def backward_memory(o: Tensor, x: Inputs, leaves: list[Tensor]) -> int:
    """Bytes that backward needs at its peak beyond the gradients that it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(o, leaves, x.do, retain_graph=True)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)


@dataclass
class Timing:
    """One attention on one input, in any number of rounds, of which the least times count."""

    attention: Attention
    x: Inputs
    forward_only: bool = False
    calls: dict[str, Callable[[], object]] = field(default_factory=dict)
    row: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def round(self, copy: float, rep: int) -> None:
        """Times in ms, % of the floor at `copy` GB/s, memory in MiB."""
        if not self.calls:
            self.calls = self.prepared()
        forward, backward = (n / copy / 1e6 for n in self.x.floors)  # ms
        for part, call in self.calls.items():
            time = milliseconds(call, rep)
            self.row[f"{part} ms"] = time = min(time, self.row.get(f"{part} ms") or math.inf)
            if part != "both":
                self.row[f"{part} % floor"] = 100 * (forward if part == "fwd" else backward) / time
        if self.forward_only:
            return
        if "fwd card ms" not in self.row:
            for part in ("fwd", "both"):
                waits = self.row[f"{part} ms"] < HOST_MS  # type: ignore[operator]
                self.row[f"{part} card ms"] = self.captured(part, rep) if waits else None
        batch, tokens = self.x.q.shape[:2]
        self.row["both ns/tok"] = self.row["both ms"] / (batch * tokens) * 1e6  # type: ignore[operator]
        loop = loop_milliseconds(self.calls["both"]) if tokens <= 2048 else None
        self.row["loop ms"] = min(loop, self.row.get("loop ms") or math.inf) if loop else None
        if "kept MiB" not in self.row:
            self.row |= memory(self.attention, self.x, self.leaves)

    def captured(self, part: str, rep: int) -> float | None:
        """None, and a note, if the call cannot be captured."""
        try:
            return card_milliseconds(self.calls[part], rep)
        except RuntimeError as problem:
            self.notes.append(f"no graph of {part}: {brief(problem)}")
            return None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x.q, self.x.k, self.x.v] if self.attention is softmax else self.x.leaves

    def prepared(self) -> dict[str, Callable[[], object]]:
        """What is timed: forward without a graph, backward through a graph that stays, both; all compiled."""
        attention, x, leaves = self.attention, self.x, self.leaves

        def forward() -> Tensor:
            with torch.no_grad():
                return attention(x)

        forward()
        if self.forward_only:
            return {"fwd": forward}
        o = attention(x)
        torch.autograd.grad(o, leaves, x.do, retain_graph=True)
        return {
            "fwd": forward,
            "bwd": lambda: torch.autograd.grad(o, leaves, x.do, retain_graph=True),
            "both": lambda: torch.autograd.grad(attention(x), leaves, x.do),
        }


def memory(attention: Attention, x: Inputs, leaves: list[Tensor]) -> dict[str, float]:
    """MiB that forward keeps besides its output, and that backward needs besides the gradients."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    o = attention(x)
    kept = torch.cuda.memory_allocated() - before - o.nbytes
    extra = backward_memory(o, x, leaves)
    gradients = x.q.nbytes + x.k.nbytes + x.v.nbytes
    return {"kept MiB": kept / 2**20, "bwd extra MiB": extra / 2**20, "extra %": 100 * extra / gradients}


# ---- bounds


@contextmanager
def within(seconds: float, *, one_thread: bool = False) -> Iterator[None]:
    """Raise TimeoutError in this thread after so many seconds, between two steps of the interpreter.

    With `one_thread` backward runs on this thread as well; else the signal waits for its end.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with torch.autograd.set_multithreading_enabled(not one_thread):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass
class Session:
    """What one run of this script may do, and what it found."""

    budget: float
    rep: int
    peer_limit: float
    peers: set[str]
    begin: float = field(default_factory=time.perf_counter)
    limits: dict[str, float] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    gates: dict[tuple[Case, bool], bool] = field(default_factory=dict)
    gate_rows: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    dropped: set[tuple[str, str, int]] = field(default_factory=set)  # peers that failed, by decay and dim
    forward_only: set[tuple[str, str, int]] = field(default_factory=set)  # peers whose backward failed
    softmax: set[Case] = field(default_factory=set)  # timed already, whatever the decay
    tuning: dict[str, float] = field(default_factory=dict)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.begin

    def out_of_time(self, what: str) -> bool:
        if self.elapsed > self.budget:
            self.left_out.append(what)
            return True
        return False

    def run(self, suite: str, cases: list[Case], names: tuple[str, ...]) -> None:
        """Time the cases; the gate of each decay form and dim comes before its first one."""
        for case in cases:
            if self.out_of_time(f"{suite} {case}"):
                continue
            if self.passes(case, [c for c in cases if (c.decay, c.dim) == (case.decay, case.dim)], names):
                self.time(suite, case, names)
            else:
                self.left_out.append(f"{suite} {case} (gate)")

    def passes(self, case: Case, alike: list[Case], names: tuple[str, ...]) -> bool:
        if "fla" in names and self.usable("fla", case) and f"fla {case.decay} D{case.dim}" not in self.tuning:
            # fla tunes itself on the first shape it sees, so that is the largest.
            self.tune("fla", max(alike, key=lambda c: c.tensor_bytes))
        whole = ("fla", case.decay, case.dim) not in self.forward_only
        peer = fla if "fla" in names and self.usable("fla", case) and whole else None
        small = replace(case, **{**GATE_CASE, "heads": max(GATE_CASE["heads"], 2 * case.groups)})
        key = (small, peer is not None)
        if key not in self.gates:
            say(f"gate: {case.form}, D{case.dim}")
            try:
                self.gates[key], rows = gate(small, peer)
            except Exception as problem:
                self.gates[key], rows = False, []
                self.failed.append(f"gate {case.form} D{case.dim}: {brief(problem)}")
            self.gate_rows += rows
            if not self.gates[key]:
                say(f"gate is RED for {case.form}, D{case.dim}: not timed")
            free()
        return self.gates[key]

    def usable(self, name: str, case: Case) -> bool:
        if name == "sdpa" and (case.softmax_flops > SOFTMAX_FLOPS or replace(case, decay="none") in self.softmax):
            return False
        return (
            name == "lasp"
            or name in OTHER_WAYS
            or (name in self.peers and (name, case.decay, case.dim) not in self.dropped)
        )

    def tune(self, name: str, case: Case) -> None:
        say(f"{name} compiles and tunes itself: {case}")
        begin = time.perf_counter()
        try:
            with within(self.peer_limit, one_thread=True):
                x = Inputs.random(case)
                o = ATTENTIONS[name](x)
                torch.cuda.synchronize()
                try:
                    torch.autograd.grad(o, x.leaves, x.do)
                    torch.cuda.synchronize()
                except RuntimeError as refused:  # fla refuses gates per token on Hopper with some versions of Triton
                    self.forward_only.add((name, case.decay, case.dim))
                    self.left_out.append(f"{name}'s backward at {case}: {brief(refused)}")
        except Exception as problem:
            self.drop(name, case, problem)
        self.tuning[f"{name} {case.decay} D{case.dim}"] = round(time.perf_counter() - begin, 1)
        free()

    def drop(self, name: str, case: Case, problem: Exception) -> None:
        self.dropped.add((name, case.decay, case.dim))
        self.left_out.append(f"{name} at {case}: {brief(problem)}")

    def time(self, suite: str, case: Case, names: tuple[str, ...]) -> None:
        """A row for each attention; ours has the speedups over fla."""
        say(f"{suite}: {case}")
        try:
            x = Inputs.random(case)
        except torch.OutOfMemoryError as problem:  # the rows before it are not lost
            self.failed_to_time(suite, "lasp", case, problem)
            return free()
        short = case.batch * case.tokens * case.heads <= SHORT
        known = ATTENTIONS | OTHER_WAYS
        timings = {name: Timing(known[name], x) for name in names if self.usable(name, case)}
        for _ in range(ROUNDS if short else 1):
            for name, timing in list(timings.items()):
                timing.forward_only = (name, case.decay, case.dim) in self.forward_only
                try:
                    with within(600 if name == "lasp" else self.peer_limit):
                        timing.round(self.limits["copy GB/s"], self.rep // ROUNDS if short else self.rep)
                except Exception as problem:
                    del timings[name]
                    self.failed_to_time(suite, name, case, problem)
                if not short:
                    timing.calls.clear()  # with the graph that they keep
                    free()
        self.left_out += [f"{name} at {case}: {note}" for name, timing in timings.items() for note in timing.notes]
        if "sdpa" in timings:
            self.softmax.add(replace(case, decay="none"))
        rows = {name: {n: rounded(value) for n, value in timing.row.items()} for name, timing in timings.items()}
        for name, row in rows.items():
            head = {"suite": suite, "B": case.batch, "T": case.tokens, "H": case.heads, "D": case.dim}
            head |= {"decay": "softmax" if name == "sdpa" else case.form, "what": name}
            self.rows.append({**head, **row, **self.speedups(row, rows.get("fla") if name == "lasp" else None)})
        del timings, timing
        free()

    def failed_to_time(self, suite: str, name: str, case: Case, problem: Exception) -> None:
        if name == "lasp":
            self.failed.append(f"{suite} {case}: {brief(problem)}")
        elif isinstance(problem, torch.OutOfMemoryError):
            self.left_out.append(f"{name} at {case}: out of memory")
        else:
            self.drop(name, case, problem)

    @staticmethod
    def speedups(ours: dict, theirs: dict | None) -> dict[str, float | None]:
        both = {part: (ours.get(f"{part} ms"), (theirs or {}).get(f"{part} ms")) for part in PARTS}
        return {f"{part} x fla": rounded(fla / mine) if mine and fla else None for part, (mine, fla) in both.items()}


def brief(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:200]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- suites


def headline() -> list[Case]:
    return [Case(1, 131072, 16, 128, decay) for decay in ("fixed", "none")]


def lengths() -> list[Case]:
    return [Case(1, 2**n, 16, 128, "fixed") for n in range(14, 21)]


def published() -> list[Case]:
    return [Case(4, 2**n, 32, 128, "fixed") for n in range(9, 16)]


def grid() -> list[Case]:
    cases = [
        Case(B, T, H, D, decay)
        for D in (128, 64, 256)
        for decay in ("fixed", "token")
        for T in (512, 2048, 8192, 32768, 131072)
        for B in (1, 4)
        for H in (4, 16, 32)
    ]
    return [case for case in cases if 8 * case.tensor_bytes <= GRID_BYTES]


def normaliser() -> list[Case]:
    return [
        Case(1, T, 16, dim, decay, normalize=True)
        for dim, T in ((128, 8192), (128, 131072), (64, 131072))
        for decay in DECAYS
    ]


def groups() -> list[Case]:
    """Of Mamba-2: V = 64 and K = 128, with one group 24 heads at 130M and 64 at 1.3B; Codestral has 128 and 8."""
    return [
        Case(1, T, heads, 128, "token", values=64, groups=count)
        for heads, count in ((64, 1), (24, 1), (128, 8))
        for T in (8192, 32768)
    ]


SUITES: dict[str, tuple[Callable[[], list[Case]], tuple[str, ...]]] = {
    "headline": (headline, ("lasp", "fla", "sdpa")),
    "lengths": (lengths, ("lasp",)),
    "published": (published, ("lasp", "fla", "sdpa")),
    "grid": (grid, ("lasp", "fla")),
    "normaliser": (normaliser, ("lasp", "plain", "ones")),
    "groups": (groups, ("lasp", "repeated")),
}


def cold(session: Session) -> list[dict]:
    """Seconds of the first call in a process with an empty Triton cache; kernels made by a change of B or T."""
    rows = []
    for decay in DECAYS:
        if session.out_of_time(f"cold {decay}"):
            continue
        say(f"cold: {decay}")
        with tempfile.TemporaryDirectory() as cache:
            first, second = (_cold_process(decay, cache, session) for _ in range(2))
        if first and second:
            rows.append({"decay": decay, **first, "first call, warm disk s": second["first call s"]})
    return rows


def _cold_process(decay: str, cache: str, session: Session) -> dict | None:
    command = [sys.executable, __file__, "--cold-child", decay]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=os.environ | {"TRITON_CACHE_DIR": cache}
        )
    except subprocess.TimeoutExpired:
        session.failed.append(f"cold {decay}: not done within 300 s")
        return None
    if found.returncode:
        session.failed.append(f"cold {decay}: {found.stderr.strip()[-300:]}")
        return None
    return json.loads(found.stdout.splitlines()[-1])


def cold_child(decay: str) -> None:
    """In its own process: the first call forward and backward, then other B and T."""
    case = Case(1, 8192, 16, 128, decay)

    def seconds(case: Case) -> float:
        x = Inputs.random(case)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step(linear, x)
        torch.cuda.synchronize()
        return round(time.perf_counter() - begin, 4)

    def kernels() -> int:
        return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))

    row: dict[str, float] = {"first call s": seconds(case), "second call s": seconds(case), "kernels": kernels()}
    others = [replace(case, tokens=10007), replace(case, tokens=1), replace(case, tokens=65536), replace(case, batch=3)]
    row["slowest other B, T s"] = max(seconds(other) for other in others)
    row["kernels after"] = kernels()
    print(json.dumps(row))


# ---- the run


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", default=["headline"], choices=[*SUITES, "cold"])
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no further row is begun")
    parser.add_argument("--no-fla", action="store_true", help="leave fla out")
    parser.add_argument("--no-sdpa", action="store_true", help="leave softmax attention out")
    parser.add_argument("--peer-limit", type=float, default=240, help="seconds for one step of a peer (default 240)")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of calls in one measurement (default 100)")
    for name, kind in (("batch", int), ("tokens", int), ("heads", int), ("dim", int), ("decay", str)):
        parser.add_argument(f"--{name}", nargs="+", type=kind, help="only the rows of the suites that have it")
    parser.add_argument("--save", action="store_true", help="keep the results under bench/results")
    parser.add_argument("--out", type=Path, default=None, help="keep the results in this folder instead")
    parser.add_argument("--commit", default=None, help="recorded where there is no git to ask")
    parser.add_argument("--cold-child", choices=DECAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def chosen(cases: list[Case], options: argparse.Namespace) -> tuple[list[Case], str]:
    """The cases that every given filter allows, and the filters as part of a file's name."""
    label = ""
    for name in ("batch", "tokens", "heads", "dim", "decay"):
        allowed = getattr(options, name)
        if allowed is not None:
            cases = [case for case in cases if getattr(case, name) in allowed]
            label += f"_{name}-{'-'.join(map(str, allowed))}"
    return cases, label


def verdicts(rows: list[dict]) -> dict[str, object]:
    """What the rows say together."""
    found: dict[str, object] = {}
    ours = [row for row in rows if row["what"] == "lasp" and row["fwd x fla"] is not None]
    for part in PARTS:
        ratios = [row[f"{part} x fla"] for row in ours if row[f"{part} x fla"] is not None]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            found[f"{part} x fla: least, geometric mean"] = [min(ratios), rounded(mean)]
    if ours:
        slower = [
            f"{part} {row[f'{part} x fla']} at B{row['B']} T{row['T']} H{row['H']} D{row['D']} {row['decay']}"
            for row in ours
            for part in PARTS
            if row[f"{part} x fla"] is not None and row[f"{part} x fla"] < 1
        ]
        found["slower than fla"] = slower
    lengths = [row for row in rows if row["suite"] == "lengths"]
    flat = [(row["both card ms"] or row["both ms"]) / (row["B"] * row["T"]) for row in lengths]
    if flat:
        found["time per token, longest over shortest"] = rounded(max(flat) / min(flat))
    return found


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench/kernels.py needs a GPU; bench/reference.py measures the CPU path")
    if options.cold_child:
        cold_child(options.cold_child)
        return 0
    version = None if options.no_fla else fla_families.version()
    peers = {name for name, wanted in (("fla", version), ("sdpa", not options.no_sdpa)) if wanted}
    session = Session(options.budget, options.rep, options.peer_limit, peers)
    name = "kernels_" + "_".join(options.suite)
    cold_rows = cold(session) if "cold" in options.suite else []
    timed = [suite for suite in options.suite if suite != "cold"]
    if timed:
        session.limits = ceilings(options.rep)
        free()
    labels = set()
    for suite in timed:
        cases, names = SUITES[suite][0](), SUITES[suite][1]
        cases, label = chosen(cases, options)
        labels.add(label)
        session.run(suite, cases, names)
    facts: dict[str, object] = {f"{what}, before": rounded(value) for what, value in session.limits.items()}
    if timed:
        facts |= {f"{what}, after": rounded(value) for what, value in ceilings(options.rep).items()}
    facts |= {"fla-core": version or "left out", **verdicts(session.rows)}
    facts |= {"failed": session.failed, "left out": session.left_out, "seconds": round(session.elapsed)}
    if session.tuning:
        facts["seconds of a peer's first call"] = [f"{what} {s}" for what, s in session.tuning.items()]
    report(
        name + "".join(sorted(labels)),
        shlex.join(["python", "bench/kernels.py", *sys.argv[1:]]),
        session.rows or cold_rows,
        save=options.save or options.out is not None,
        out=options.out or RESULTS,
        tables={
            "gate: relative error against fp64": session.gate_rows,
            "first call with an empty kernel cache": cold_rows if session.rows else [],
        },
        facts=facts,
        markdown=True,
        commit=options.commit,
    )
    return int(bool(session.failed) or not all(session.gates.values()))


if __name__ == "__main__":
    sys.exit(main())
