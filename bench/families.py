"""The families of `lasp.models.mixers` on one GPU: the operator of a layer, and a training step; fla-core's beside.

    python bench/families.py --save                            # all of them at 8K, 32K and 128K tokens
    python bench/families.py --families gla kda --no-steps
    python bench/families.py --published --save                # beside FlashAttention, and published figures

The operator is what a mixer of the size gives its module of `lasp.modules` (no projections, norms or convolutions),
bf16, one sequence. Before it is timed, output and gradients of 517 tokens are compared with fp64 on the host. "% floor"
is the time of reading all inputs and writing the output once (backward: reading these and the output's gradient,
writing all other gradients) at the speed of a copy on the device, over the measured time. "% triton" is the share of
the device's time in kernels of lasp_kernels, forward and backward of the shortest length; "launches" how many kernels
those are in all. "x fla" is fla's time over ours (for softmax that of PyTorch's flash kernel). fla tunes its kernels on
settings that processes compile beforehand.

A training step is one of `Decoder` with `--layers` blocks of the size, embedding and last layer: forward, loss,
backward, AdamW; weights in fp32, bf16 by autocast, no block recomputed. `--no-operators --experts 8` is one with
experts, and their balance in the loss.

`--published`: `lasp.linear_attention` with TransNormerLLM's decays, PyTorch's flash kernel, and softmax with all scores
in memory where they fit; MiB are peaks with inputs. What others published of Lightning Attention and FlashAttention
(published.csv) is of another card. And gated linear attention beside flash at 32 sequences of 2,048 and 4,096 tokens:
both 1,024 wide, 4 heads of keys of 128 and values of 256 (arXiv 2312.06635, section 4.4), 16 heads of 64.

Each cell is bounded by `--limit` seconds; none begins after `--budget`. Rows are printed as they come.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import inspect
import math
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fla_families
import torch
import torch.nn.functional as F
from common import add_report_arguments, command_line, report
from fla_families import Peer, flash, peer_of, scores
from torch import Tensor, nn
from torch.optim import AdamW

import lasp
from kernels import brief, free, rounded, within
from lasp.models import Decoder, DecoderConfig
from lasp.models.mixers import MIXERS
from lasp.modules import CausalConv, Router

GATE_TOKENS, GATE_LIMIT = 517, 5e-2  # relative error in bf16, of the norm; decays' gradients have the most
LONG_MS = 300.0  # a call that takes as long is timed once
TNL_LAYERS = 24  # of the model whose first layer's decays --published takes
PUBLISHED = Path(__file__).parent / "published.csv"
Result = TypeVar("Result")


class Operation(NamedTuple):
    """A call of a module, with the arguments that it was given."""

    module: nn.Module
    given: dict[str, Any]

    def call(self) -> Tensor:
        return _first(self.module(**self.given))

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self.given.values() if isinstance(x, Tensor) and x.requires_grad]

    def like(self, device: torch.device | str, dtype: torch.dtype | None) -> Operation:
        """The same elsewhere, in another dtype if one is given."""

        def moved(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            y = x.detach().to(device, dtype if x.is_floating_point() else None)
            return y.requires_grad_(x.requires_grad)

        return Operation(self.module, {name: moved(x) for name, x in self.given.items()})


class _Caught(Exception):
    """The operator has been called."""


def operation(family: str, config: DecoderConfig, tokens: int, device: torch.device) -> Operation:
    """What a mixer of the family gives its operator, for random tokens."""
    torch.manual_seed(0)
    mixer = MIXERS[family](config.width, config.heads).to(device, _dtype(device))
    x = torch.randn(1, tokens, config.width, device=device, dtype=_dtype(device))
    found: list[Operation] = []

    def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        values = {name: y() if callable(y) else y for name, y in named.items() if y is not None}
        found.append(Operation(module, {name: _leaf(y) for name, y in values.items()}))
        raise _Caught

    operators = [m for m in mixer.modules() if hasattr(type(m), "sequence") and not isinstance(m, (CausalConv, Router))]
    handles = [m.register_forward_pre_hook(catch, with_kwargs=True) for m in operators]
    try:
        with torch.no_grad():
            mixer(x, torch.arange(tokens, device=device))
    except _Caught:
        return found[0]
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(f"{family} calls no operator of lasp.modules")


def _leaf(x: Any) -> Any:
    return x.detach().contiguous().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---- right, and how long


def error_of(made: Operation) -> float:
    """The worst relative error of output and gradients, against fp64 on the host."""
    exact = made.like("cpu", torch.float64)
    o = made.call()
    seed = torch.randn_like(o)
    ours = [o, *torch.autograd.grad(o, made.leaves, seed)]
    true = exact.call()
    return _worst(ours, [true, *torch.autograd.grad(true, exact.leaves, seed.to("cpu", torch.float64))])


def error_of_peer(made: Operation, beside: Peer) -> float:
    """Of its output: whether it computes the same."""
    with torch.no_grad():
        return _worst([beside.call(made.given)], [made.like("cpu", torch.float64).call()])


def _worst(actual: list[Tensor], exact: list[Tensor]) -> float:
    found = [((a.cpu().double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(actual, exact)]
    return max(x if math.isfinite(x) else math.inf for x in found)


def milliseconds(call: Callable[[], object], device: torch.device, rep: int) -> float:
    """The median of several calls; of one, if it takes long."""
    call()
    once = _once(call, device)
    if device.type != "cuda":
        return statistics.median([once, *(_once(call, device) for _ in range(2))])
    if once > LONG_MS:
        return once
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=rep, return_mode="median"))  # type: ignore[arg-type]


def _once(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return (time.perf_counter() - begin) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Times(NamedTuple):
    """Milliseconds, and MiB at the peak with what was there before; None on a CPU."""

    forward: float
    backward: float
    forward_mib: float | None
    backward_mib: float | None


def times_of(call: Callable[[], Tensor], leaves: list[Tensor], device: torch.device, rep: int) -> Times:
    """Forward without a graph, and backward through a graph that stays."""

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    forward_ms, forward_mib = milliseconds(forward, device, rep), _peak(forward, device)
    backward_ms = _backward(call, leaves, device, rep)
    seed = torch.randn_like(forward())
    mib = _peak(lambda: torch.autograd.grad(call(), leaves, seed), device)
    return Times(forward_ms, backward_ms, forward_mib, mib)


def _backward(call: Callable[[], Tensor], leaves: list[Tensor], device: torch.device, rep: int) -> float:
    o = call()
    seed = torch.randn_like(o)
    return milliseconds(lambda: torch.autograd.grad(o, leaves, seed, retain_graph=True), device, rep)


def _peak(call: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def launches(operation: Operation) -> dict[str, float]:
    """How many kernels forward and backward start, and the share of the device's time that is in Triton's of ours."""
    from torch.profiler import ProfilerActivity, profile

    ours = _names_of_kernels()
    seed = torch.randn_like(operation.call())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        torch.autograd.grad(operation.call(), operation.leaves, seed)
        torch.cuda.synchronize()
    events = [e for e in record.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    spent = [(e.time_range.elapsed_us(), e.name in ours) for e in events if not e.is_user_annotation]
    total = sum(t for t, _ in spent)
    return {"% triton": 100 * sum(t for t, own in spent if own) / max(total, 1e-9), "launches": len(spent)}


def _names_of_kernels() -> set[str]:
    import lasp_kernels

    files = [importlib.import_module(f"lasp_kernels.{m.name}") for m in pkgutil.iter_modules(lasp_kernels.__path__)]
    return {name for file in files for name, x in vars(file).items() if type(x).__module__.startswith("triton.runtime")}


def copy_speed(device: torch.device) -> float | None:
    """GB/s of a copy on the device, read and written."""
    if device.type != "cuda":
        return None
    a = torch.empty(2**30, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.numel() / milliseconds(lambda: b.copy_(a), device, 100) / 1e6


# ---- the cells


@dataclass
class Session:
    """What a run may do, and what it could not."""

    device: torch.device
    options: argparse.Namespace
    begin: float = field(default_factory=time.perf_counter)
    left_out: list[str] = field(default_factory=list)
    broken: bool = False  # the device does nothing any more

    def cell(self, what: str, measure: Callable[[], Result]) -> Result | None:
        """The result, or None and why not."""
        seconds = time.perf_counter() - self.begin
        if self.broken or seconds > self.options.budget:
            self.left_out.append(f"{what}: {'the device has failed' if self.broken else 'out of time'}")
            return None
        try:
            with within(self.options.limit, one_thread=True):
                return measure()
        except Exception as problem:  # a cell that fails must not take the others with it
            self.left_out.append(f"{what}: {brief(problem)}")
            print(self.left_out[-1], file=sys.stderr, flush=True)
            self.broken = "CUDA error" in str(problem) or "Triton Error [CUDA]" in str(problem)
        finally:
            if not self.broken:
                free()
        return None

    def gate(self, what: str, error: Callable[[], float]) -> float | None:
        """The error, or None if it is too large to time what has it."""
        found = self.cell(f"{what}, gate", error)
        if found is not None and found > GATE_LIMIT:
            self.left_out.append(f"{what}: {found:.1e} off, not timed")
            return None
        return found

    def measured(self, rows: list[dict], row: dict[str, Any]) -> None:
        """One more, which is printed at once."""
        rows.append({name: rounded(x) if isinstance(x, float) else x for name, x in row.items()})
        print(rows[-1], file=sys.stderr, flush=True)


def of_family(session: Session, family: str, copy: float | None) -> list[dict]:
    """A row for each length, if the operator is right."""
    options, device = session.options, session.device
    config, rows = DecoderConfig.named(family, options.size), []
    small = session.cell(f"{family}, gate", lambda: operation(family, config, GATE_TOKENS, device))
    if small is None or (error := session.gate(family, lambda: error_of(small))) is None:
        return rows
    beside = _right_peer(session, family, small) if options.peers else None
    for T in options.lengths:
        row = {**dict.fromkeys(COLUMNS), "family": family, "operator": type(small.module).__name__, "T": T}
        found = _timed(session, family, config, T, copy, beside)
        if found:
            session.measured(rows, {**row, "error": error, **found})
    return rows


def _right_peer(session: Session, family: str, made: Operation) -> Peer | None:
    """What computes the same, if it does."""
    beside = peer_of(made.module, made.given)
    if beside is None:
        return None
    error = session.gate(f"{beside.name}, {family}", lambda: error_of_peer(made, beside))
    return None if error is None else beside


def _timed(
    session: Session, family: str, config: DecoderConfig, T: int, copy: float | None, beside: Peer | None
) -> dict[str, Any]:
    """The columns of one length; none if it could not be measured."""
    options, device, what = session.options, session.device, f"{family} T{T}"
    made = session.cell(what, lambda: operation(family, config, T, device))
    if made is None:
        return {}
    found = session.cell(what, lambda: times_of(made.call, made.leaves, device, options.rep))
    if found is None:
        return {}
    row = {**_columns(found, made, copy), "tokens/s": 1e3 * T / (found.forward + found.backward)}
    if beside is not None:
        theirs = session.cell(f"{beside.name}, {what}", lambda: _peer(beside, made, session))
        row |= _compared(found, beside, theirs)
    if device.type == "cuda" and min(options.lengths) == T:
        row |= session.cell(f"{what}, kernels", lambda: launches(made)) or {}
    return row


COLUMNS = (
    *("family", "operator", "T", "error", "fwd ms", "fwd % floor", "bwd ms", "bwd % floor", "peak MiB", "tokens/s"),
    *("% triton", "launches", "fla", "fla fwd ms", "fla bwd ms", "fwd x fla", "bwd x fla"),
)


def _columns(found: Times, made: Operation, copy: float | None) -> dict[str, Any]:
    inputs = sum(x.nbytes for x in made.given.values() if isinstance(x, Tensor))
    with torch.no_grad():
        output = made.call().nbytes
    gradients = sum(x.nbytes for x in made.leaves)
    row: dict[str, Any] = {"fwd ms": found.forward, "bwd ms": found.backward, "peak MiB": found.backward_mib}
    if copy is not None:
        row["fwd % floor"] = 100 * (inputs + output) / copy / 1e6 / found.forward
        row["bwd % floor"] = 100 * (inputs + output + gradients) / copy / 1e6 / found.backward
    return row


def _peer(beside: Peer, made: Operation, session: Session) -> tuple[float, float | None]:
    """Milliseconds of forward and backward; the latter is None where the peer refuses it."""
    leaves, device, rep = made.leaves, session.device, session.options.rep
    with torch.no_grad():
        forward = milliseconds(lambda: beside.call(made.given), device, rep)
    try:
        return forward, _backward(lambda: beside.call(made.given), leaves, device, rep)
    except TimeoutError:
        raise
    except Exception as refused:  # as fla does for some gates on Hopper with some versions of Triton
        session.left_out.append(f"{beside.name}, backward: {brief(refused)}")
        return forward, None


def _compared(found: Times, beside: Peer | None, theirs: tuple[float, float | None] | None) -> dict[str, Any]:
    if beside is None or theirs is None:
        return {}
    forward, backward = theirs
    row: dict[str, Any] = {"fla": beside.name, "fla fwd ms": forward, "fla bwd ms": backward}
    return row | {"fwd x fla": forward / found.forward, "bwd x fla": backward and backward / found.backward}


def step_of(family: str, T: int, session: Session) -> dict[str, Any]:
    """A row: tokens a second of a training step."""
    options, device = session.options, session.device
    changes = {"experts": options.experts, "experts_per_token": options.experts_per_token}
    config = DecoderConfig.named(family, options.size, layers=options.layers, vocab_size=options.vocab, **changes)
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with device:
        model = Decoder(config)
    optimizer = AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    ids = torch.randint(options.vocab, (1, T), device=device)
    batch = lasp.shard_batch({"input_ids": ids}, None)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model(batch["input_ids"], batch["position_ids"], return_hidden=True)
            loss, _ = lasp.linear_token_loss(hidden, model.head.weight, batch["labels"], mesh=None)
            if options.experts:
                loss = loss + 0.01 * lasp.balance_loss(model, mesh=None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    once = _once(step, device)
    steps = 1 if once > 3000 else 3
    seconds = _once(lambda: [step() for _ in range(steps)], device) / steps / 1e3
    row = {
        "family": family,
        "layers": options.layers,
        "experts": options.experts,
        "T": T,
        "step ms": 1e3 * seconds,
        "tokens/s": T / seconds,
    }
    return {**row, "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None}


def steps_of(session: Session, family: str) -> list[dict]:
    """A row for each length."""
    rows: list[dict] = []
    for T in session.options.lengths:
        row = session.cell(f"{family} T{T}, training step", lambda: step_of(family, T, session))  # noqa: B023
        if row is not None:
            session.measured(rows, row)
    return rows


# ---- what was published


def published(session: Session) -> tuple[list[dict], dict[str, list[dict]]]:
    """Rows by shape and length; the published ones, and gated linear attention beside flash, as further tables."""
    rows: list[dict] = []
    for shape in session.options.shapes:
        batch, heads, dim = map(int, shape.split("x"))
        module = _tnl(heads)
        small = _qkv(module, 1, GATE_TOKENS, heads, dim, session)
        right = session.gate(f"lasp {shape}", lambda: error_of(small)) is not None  # noqa: B023
        for T in session.options.lengths:
            for what, call in (("lasp", None), ("flash", flash), ("scores", scores)):
                if what == "lasp" and not right:
                    continue
                row = {"shape": f"B{batch} H{heads} D{dim}", "T": T, "what": what}
                _one(session, rows, row, lambda: _qkv(module, batch, T, heads, dim, session), call)  # noqa: B023
    beside: list[dict] = []
    batch, width = session.options.gla
    right = session.gate("gated linear attention", lambda: error_of(_gla(1, GATE_TOKENS, width, session))) is not None
    for T in session.options.gla_lengths:
        row, heads = {"B": batch, "width": width, "T": T}, max(1, width // 64)
        if right:
            _one(session, beside, {**row, "what": "lasp"}, lambda: _gla(batch, T, width, session), None)  # noqa: B023
        softmax = lambda: _qkv(_tnl(heads), batch, T, heads, 64, session)  # noqa: B023, E731
        _one(session, beside, {**row, "what": "flash"}, softmax, flash)
    for found in (rows, beside):
        _times_flash(found)
    lines = [line for line in PUBLISHED.read_text().splitlines() if not line.startswith("#")]
    printed = [{k: float(x) if "." in x else int(x) for k, x in row.items()} for row in csv.DictReader(lines)]
    return rows, {"gated linear attention beside softmax attention": beside, "published by others": printed}


def _times_flash(rows: list[dict]) -> None:
    """Beside our times how many times as long flash takes."""
    key = lambda row: [x for name, x in row.items() if name in ("shape", "B", "width", "T")]  # noqa: E731
    for row in rows:
        theirs = next((other for other in rows if other["what"] == "flash" and key(other) == key(row)), None)
        for part in ("fwd", "bwd"):
            ours = theirs is not None and row["what"] == "lasp"
            row[f"{part} x flash"] = rounded(theirs[f"{part} ms"] / row[f"{part} ms"]) if ours else None


def _one(
    session: Session,
    rows: list[dict],
    row: dict[str, Any],
    make: Callable[[], Operation],
    call: Callable[[Mapping[str, Any]], Tensor] | None,
) -> None:
    """Add the row with its times, if it can be measured."""

    def measure() -> Times:
        made = make()
        run = made.call if call is None else partial(call, made.given)
        return times_of(run, made.leaves, session.device, session.options.rep)

    found = session.cell(", ".join(map(str, row.values())), measure)
    if found is not None:
        mib = {"fwd MiB": found.forward_mib, "bwd MiB": found.backward_mib}
        session.measured(rows, {**row, "fwd ms": found.forward, "bwd ms": found.backward, **mib})


def _tnl(heads: int) -> nn.Module:
    return lasp.modules.LightningAttention(lasp.decay.schedule("tnl", heads, 0, TNL_LAYERS))


def _qkv(module: nn.Module, batch: int, T: int, heads: int, dim: int, session: Session) -> Operation:
    torch.manual_seed(0)
    shape, options = (batch, T, heads, dim), {"device": session.device, "dtype": _dtype(session.device)}
    return Operation(module, {name: torch.randn(shape, **options).requires_grad_() for name in ("q", "k", "v")})


def _gla(batch: int, T: int, width: int, session: Session) -> Operation:
    torch.manual_seed(0)
    device, heads = session.device, 4
    sizes = {"q": width // 2 // heads, "k": width // 2 // heads, "v": width // heads}
    given = {
        name: torch.randn(batch, T, heads, n, device=device, dtype=_dtype(device)).requires_grad_()
        for name, n in sizes.items()
    }
    logits = torch.randn(batch, T, heads, sizes["k"], device=device)
    given["log_decay"] = (F.logsigmoid(logits) / 16).requires_grad_()
    return Operation(lasp.modules.LightningAttention(scale=sizes["k"] ** -0.5), given)


# ---- the run


def compile_part(options: argparse.Namespace) -> None:
    """In a process of its own: this part of the settings of fla's kernels, for all families."""

    def once(family: str) -> None:
        made = operation(family, DecoderConfig.named(family, options.size), 1024, torch.device("cuda"))
        beside = peer_of(made.module, made.given)
        if beside is not None and beside.name.startswith("chunk"):
            o = beside.call(made.given)
            torch.autograd.grad(o, made.leaves, torch.randn_like(o), allow_unused=True)

    fla_families.compile_part(options.compile_part, [partial(once, family) for family in options.families])


def ready_peers(session: Session) -> dict[str, Any]:
    """Compile what fla will choose from; facts for the report."""
    options = session.options
    options.peers = not options.no_fla and session.device.type == "cuda"
    found = fla_families.version() if options.peers else None
    if found is None:
        options.peers = False
        return {"fla-core": "left out"}
    command = [sys.executable, __file__, "--size", options.size, "--families", *options.families]
    seconds = fla_families.compile_beside(command, options.compile_limit)
    try:
        fla_families.measure_quickly()
    except Exception as problem:  # of a version of Triton that it does not know: then it measures as it does
        session.left_out.append(f"fla's tuning, in less time: {brief(problem)}")
    return {"fla-core": found, "seconds of compiling fla's settings": round(seconds)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--lengths", nargs="+", type=int, help="tokens")
    parser.add_argument("--size", default="385M", help="of the model (default 385M)")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the training step (default 4)")
    parser.add_argument("--vocab", type=int, default=64000)
    parser.add_argument("--experts", type=int, default=0, help="slices of the step's gated units; 0: none")
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--no-operators", action="store_true", help="training steps alone")
    parser.add_argument("--no-steps", action="store_true", help="operators alone")
    parser.add_argument("--no-fla", action="store_true", help="without peers")
    parser.add_argument("--published", action="store_true", help="the comparison with published figures, alone")
    parser.add_argument("--shapes", nargs="+", default=["4x32x128", "4x32x64"], help="of --published: BxHxD")
    parser.add_argument("--gla", nargs=2, type=int, default=[32, 1024], help="of --published: sequences and width")
    parser.add_argument("--gla-lengths", nargs="+", type=int, default=[2048, 4096])
    parser.add_argument("--rep", type=int, default=60, help="milliseconds of calls in one measurement")
    parser.add_argument("--limit", type=float, default=60, help="seconds of a cell (default 60)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no cell is begun")
    parser.add_argument("--compile-limit", type=float, default=120, help="seconds for fla's settings (default 120)")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    usual = [2**n for n in range(10, 16)] if options.published else [8192, 32768, 131072]
    options.lengths = sorted(options.lengths or usual)
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    if options.compile_part:
        compile_part(options)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session(device, options)
    facts: dict[str, Any] = {"dtype": str(_dtype(device))[6:]}
    if options.published:
        name, (rows, tables) = "families_published", published(session)
    else:
        name, rows, tables = f"families_{options.size}", [], {}
        steps: list[dict] = []
        if not options.no_operators:
            facts |= ready_peers(session)
            copy = session.cell("the speed of a copy", lambda: copy_speed(device))
            facts["copy GB/s"] = copy
            for family in options.families:
                rows += of_family(session, family, copy)
        for family in () if options.no_steps else options.families:
            steps += steps_of(session, family)
        title = f"training step, {options.layers} blocks of the {options.size} model"
        name += f"_experts-{options.experts}" if options.experts else ""
        rows, tables = (rows, {title: steps}) if rows else (steps, {})
    facts |= {"left out": session.left_out, "seconds": round(time.perf_counter() - session.begin)}
    if not rows:
        raise SystemExit(f"nothing was measured: {'; '.join(session.left_out)}")
    kept = report(
        f"{name}_1x{device.type}",
        command_line("families.py", argv),
        rows,
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        tables=tables,
        facts=facts,
        markdown=True,
    )
    if kept:
        draw(kept)


def draw(kept: Path) -> None:
    """The plot of what was kept, if it can be drawn here."""
    try:
        import plots
    except ImportError as missing:  # the numbers are there, and it can be drawn on another machine
        print(f"no plot: {missing}; python bench/plots.py {kept}", file=sys.stderr)
        return
    plots.draw(kept)


if __name__ == "__main__":
    main()
