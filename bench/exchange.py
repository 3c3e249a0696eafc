"""The exchange of states between ranks: alone, inside the operator, and against other ways to split a sequence.

    torchrun --nproc-per-node 2 bench/exchange.py --suite alone op peers [--save]
    torchrun --nproc-per-node 2 bench/exchange.py --suite delta --tokens 32768 --name delta [--save]

On GPUs over NCCL, else on the CPU over gloo. Nothing is timed before it is right: the states of `alone` against a local
fold, the operator against an fp64 computation, every peer against itself in one process. See bench/README.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import fla_families
import operators
import peers
import torch
import torch.distributed as dist
from common import add_report_arguments, command_line, report
from operators import DECAYS, DELTA
from peers.fla_context_parallel import FlaContextParallel, cp_context
from peers.fla_context_parallel import call as fla_call
from timing import Time, interleaved
from torch import Tensor

import lasp
from lasp import exchange
from lasp.exchange import StateMap, cost
from lasp.ranks import SCHEDULES, Traffic
from lasp.ranks.collectives import start_all_gather
from lasp_kernels import fold

USUAL = ("fixed", "none")  # of `operators.DECAYS`
TARGETS = {32768: 92.0, 65536: 97.0, 131072: 97.0}  # % of one rank, for forward and for backward
Key = TypeVar("Key")
Result = TypeVar("Result")
STATE = 128 * 128 * 4  # bytes of one head's state


@dataclass(frozen=True)
class Bench:
    """What every suite needs: the ranks, the device and the options."""

    env: lasp.Env
    sequences: dict[str, lasp.SequenceParallel]  # by schedule
    options: argparse.Namespace

    @classmethod
    def start(cls, options: argparse.Namespace) -> Bench:
        """Join the ranks and measure the network, from which "auto" chooses and times are predicted."""
        env = lasp.init()
        sequences = {name: lasp.SequenceParallel(dist.group.WORLD, exchange=name) for name in ("auto", *SCHEDULES)}
        if env.world_size > 1:
            cost.measure(sequences["auto"])
        return cls(env, sequences, options)

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a GPU; CPUs are slow at it."""
        return torch.bfloat16 if self.env.device.type == "cuda" else torch.float32

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that take part."""
        return self.sequences["auto"].group

    def time(self, cases: Mapping[Key, Callable[[], object]]) -> dict[Key, Time]:
        return interleaved(cases, self.env.device, repetitions=self.options.repetitions, group=self.group)

    def worst(self, errors: list[Tensor]) -> float:
        """The largest error of all ranks; not a number counts as infinite."""
        found = torch.stack(errors).double().nan_to_num(nan=torch.inf).max()
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found.item()

    def require(self, what: str, error: float, limit: float) -> dict:
        """A row for the gate; ends the run on every rank if the error is too large."""
        if not error <= limit:
            raise SystemExit(f"{what}: relative error {error:.1e} is over {limit:g}; nothing was timed")
        return {"what": what, "relative error": float(f"{error:.3g}"), "limit": limit}


def relative(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)


# ---- the exchange alone


def alone(bench: Bench) -> tuple[list[dict], list[dict]]:
    """Every schedule, an all-gather and a send to the next rank, by the bytes of a rank's state."""
    rows = []
    gates = [bench.require(f"exchange, {name}", exchange_error(bench, name), 1e-6) for name in SCHEDULES]
    for nbytes in bench.options.bytes:
        heads = nbytes // STATE
        if heads * STATE != nbytes:
            raise ValueError(f"--bytes must be multiples of {STATE}, got {nbytes}")
        local = random_map(heads, bench.env.rank, bench.env.device)
        message = local.state.flatten()
        cases = {name: exchange_call(local, bench.sequences[name]) for name in SCHEDULES}
        cases |= {"plain all-gather": plain_gather(message), "plain send and receive": plain_send(message)}
        for name, time in bench.time(cases).items():
            row = {"schedule": name, "KiB": nbytes // 1024, "ms": time.median, "spread %": time.spread}
            predicted = None
            if name in SCHEDULES:
                traffic = bench.sequences[name].traffic
                predicted = predicted_ms(traffic)
            rows.append(row | {"predicted ms": predicted, "blocks": traffic.blocks if predicted is not None else None})
    return rows, gates


def predicted_ms(traffic: Traffic) -> float | None:
    """By the cost model; None for what was not measured: memory read directly on a CPU, unless it is asked for."""
    return traffic.predicted_seconds * 1e3 if math.isfinite(traffic.predicted_seconds) else None


def random_map(heads: int, seed: int, device: torch.device) -> StateMap:
    """What the tokens of rank `seed` do to a state."""
    draw = torch.Generator(device).manual_seed(seed)
    state = torch.randn(1, 1, heads, 128, 128, generator=draw, device=device)
    return StateMap(state, -torch.rand(1, 1, heads, 1, generator=draw, device=device))


def exchange_call(local: StateMap, sequence: lasp.SequenceParallel) -> Callable[[], Tensor]:
    return lambda: exchange.start(local, sequence, fold=fold).wait()


def exchange_error(bench: Bench, name: str) -> float:
    """Against the fold, here, of the maps of all ranks before (and, in reverse, behind) this one."""
    sequence, errors = bench.sequences[name], []
    maps = [random_map(3, seed, bench.env.device) for seed in range(sequence.size)]
    for reverse in (False, True):
        before = maps[: sequence.rank] if not reverse else maps[: sequence.rank : -1]
        expected = maps[0].zeros().double()
        for one in before:
            expected = one.transition[0].double().exp().unsqueeze(-1) * expected + one.state[0].double()
        actual = exchange.start(maps[sequence.rank], sequence, fold=fold, terms=exchange.Terms(reverse)).wait()
        errors.append(relative(actual, expected))
    return bench.worst(errors)


def plain_gather(message: Tensor) -> Callable[[], object]:
    gathered = message.new_empty(dist.get_world_size(), 1, message.numel())
    return lambda: start_all_gather(gathered, message.unsqueeze(0), dist.group.WORLD).wait()


def plain_send(message: Tensor) -> Callable[[], object]:
    """Every rank at once to the next one, none to the first."""
    rank, size = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(message)

    def call() -> None:
        operations = []
        if rank + 1 < size:
            operations.append(dist.P2POp(dist.isend, message, rank + 1))
        if rank > 0:
            operations.append(dist.P2POp(dist.irecv, received, rank - 1))
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return call


# ---- the operator


def operator(bench: Bench) -> tuple[list[dict], list[dict]]:
    """Forward and backward with each schedule, against one rank with as many tokens."""
    options, rows, gates = bench.options, [], []
    names = (*SCHEDULES, "auto")
    for decay in options.decay:
        limit = 1e-2 if bench.dtype == torch.bfloat16 else 1e-5
        gates += [
            bench.require(f"operator, {name}, {decay}", operator_error(bench, name, decay), limit) for name in names
        ]
    for tokens in options.tokens:
        shape = peers.Shape(1, tokens, options.heads, options.dim, bench.dtype, bench.env.device)
        for decay in options.decay:
            calls = {name: operator_calls(bench, shape, decay, bench.sequences[name]) for name in names}
            calls["one rank"] = operator_calls(bench, shape, decay, None)
            for direction, index in (("forward", 0), ("backward", 1)):
                times = bench.time({name: call[index] for name, call in calls.items()})
                rows += [operator_row(bench, tokens, decay, direction, name, times) for name in names]
    return rows, gates


def operator_calls(
    bench: Bench, shape: peers.Shape, decay: str, sequence: lasp.SequenceParallel | None
) -> tuple[Callable[[], object], Callable[[], object]]:
    x = operators.inputs(shape, decay, seed=bench.env.rank).leaves()
    # With the layout the operator knows which heads distant ranks cannot matter to.
    layout = None if sequence is None else lasp.ShardLayout((shape.tokens,) * sequence.size)

    def forward() -> Tensor:
        return operators.call(x, decay, sequence=sequence, layout=layout)

    o = forward()
    return forward, lambda: torch.autograd.grad(o, x.differentiable, x.do, retain_graph=True)


def operator_row(bench: Bench, tokens: int, decay: str, direction: str, name: str, times: dict[str, Time]) -> dict:
    time, one, target = times[name], times["one rank"], TARGETS.get(tokens)
    percent = 100 * one.median / time.median
    traffic = bench.sequences[name].traffic
    row = {"tokens a rank": tokens, "decay": decay, "direction": direction, "schedule": name}
    row |= {"ms": time.median, "spread %": time.spread, "one rank ms": one.median, "% of one rank": percent}
    # On a CPU the targets, which are for GPUs, say nothing.
    target = target if bench.env.device.type == "cuda" else None
    row |= {"target %": target, "met": None if target is None else percent >= target}
    return row | {"chosen": traffic.schedule, "predicted exchange ms": predicted_ms(traffic)}


def operator_error(bench: Bench, name: str, decay: str) -> float:
    """Output and gradients at lengths that are no multiple of anything, against fp64 in one process."""
    lengths = [137 + rank % 3 for rank in range(bench.env.world_size)]
    shape = peers.Shape(1, sum(lengths), bench.options.heads, bench.options.dim, bench.dtype, bench.env.device)
    whole = operators.inputs(shape, decay, seed=3)
    mine = whole.map(lambda x: x.split(lengths, 1)[bench.env.rank]).leaves()
    o = operators.call(mine, decay, sequence=bench.sequences[name], layout=lasp.ShardLayout(tuple(lengths)))
    actual = [o, *torch.autograd.grad(o, mine.differentiable, mine.do)]
    double = whole.map(lambda x: x.double()).leaves()
    o = operators.exact(double, decay)
    expected = [o, *torch.autograd.grad(o, double.differentiable, double.do)]
    return bench.worst([relative(x, y.split(lengths, 1)[bench.env.rank]) for x, y in zip(actual, expected)])


# ---- peers


def against_peers(bench: Bench) -> tuple[list[dict], list[dict]]:
    """Forward and backward of every peer that can run here and is right; the others say why not."""
    options, rows, gates = bench.options, [], []
    sequence = bench.sequences["auto"]
    small = peers.Shape(1, 256, options.heads, options.dim, bench.dtype, bench.env.device)
    refused = {peer.name: refusal(bench, peer, small, gates) for peer in peers.PEERS}
    if refused["lasp"]:
        raise SystemExit(f"lasp among the peers: {refused['lasp']}; nothing was timed")
    for tokens in options.tokens:
        shape = peers.Shape(1, tokens, options.heads, options.dim, bench.dtype, bench.env.device)
        reasons = {peer.name: refused[peer.name] or peer.unavailable(shape, sequence) for peer in peers.PEERS}
        calls = {}
        for peer in peers.PEERS:
            if reasons[peer.name] is None:
                calls[peer.name, "ranks"] = peers.make(peer, shape, sequence)
                calls[peer.name, "one"] = peers.make(peer, shape, None)
        times = [bench.time({name: call[index] for name, call in calls.items()}) for index in (0, 1)]
        rows += [{"tokens a rank": tokens, **peer_row(peer, reasons[peer.name], *times)} for peer in peers.PEERS]
        if bench.env.rank == 0:  # whatever comes after
            print("\n".join(map(str, rows[-len(peers.PEERS) :])), file=sys.stderr, flush=True)
        del calls
    return rows, gates


def refusal(bench: Bench, peer: peers.Peer, shape: peers.Shape, gates: list[dict]) -> str | None:
    """Why a peer is not timed: it cannot run, it fails on some rank, or it is wrong. The same on every rank."""
    sequence, limit = bench.sequences["auto"], 2e-2 if bench.dtype == torch.bfloat16 else 1e-5
    if (reason := peer.unavailable(shape, sequence)) is not None:
        return reason
    error, failed = attempted(bench, lambda: peers.gate(peer, shape, sequence))
    if failed is not None or error is None:
        return failed
    gates.append({"what": f"peer, {peer.name}", "relative error": float(f"{error:.3g}"), "limit": limit})
    return None if error <= limit else f"relative error {error:.1e} against one process is over {limit:g}"


def peer_row(peer: peers.Peer, reason: str | None, forward: dict, backward: dict) -> dict:
    columns = ("fwd ms", "bwd ms", "both ms", "spread %", "x lasp", "% of one rank")
    if reason is not None:
        return {"peer": peer.name, **dict.fromkeys(columns), "note": f"not run: {reason}"}
    there, back = forward[peer.name, "ranks"], backward[peer.name, "ranks"]
    both = there.median + back.median
    ours = forward["lasp", "ranks"].median + backward["lasp", "ranks"].median
    one = forward[peer.name, "one"].median + backward[peer.name, "one"].median
    numbers = (there.median, back.median, both, max(there.spread, back.spread), both / ours, 100 * one / both)
    return {"peer": peer.name, **dict(zip(columns, numbers)), "note": peer.what}


# ---- the delta rule beside fla-core's


DIRECTIONS = {"forward": (0,), "backward": (1,), "both": (0, 1)}
DELTA_TARGETS = {  # at 32,768 tokens a rank: % of one rank, and fla's time over ours
    ("lasp", "forward"): 90.0,
    ("lasp", "both"): 93.0,
    ("fla_cp", "forward"): 1.3,
    ("fla_cp", "backward"): 1.3,
    ("fla_cp", "both"): 1.3,
}


class Reasons(NamedTuple):
    """Why fla's forward and backward are not timed; None where they are."""

    forward: str | None
    backward: str | None


def delta(bench: Bench) -> tuple[list[dict], list[dict]]:
    """By decay and length, ours and fla-core's context parallelism; in `note` why a part of its was not timed."""
    rows, gates = [], []
    decays = [decay for decay in bench.options.decay if decay in DELTA] or list(DELTA)
    reason = FlaContextParallel().unavailable(shape_of(bench, 64), bench.sequences["auto"])
    if reason is None:
        compile_fla(bench, decays)
    for decay in decays:
        limit = 2e-2 if bench.dtype == torch.bfloat16 else 1e-5
        gates.append(bench.require(f"operator, auto, {decay}", operator_error(bench, "auto", decay), limit))
        reasons, more = (Reasons(reason, reason), []) if reason else fla_right(bench, decay)
        gates += more
        for tokens in bench.options.tokens:
            rows += delta_rows(bench, decay, tokens, reasons)
            if bench.env.rank == 0:
                print("\n".join(map(str, rows[-6:])), file=sys.stderr, flush=True)
    return rows, gates


def shape_of(bench: Bench, tokens: int) -> peers.Shape:
    return peers.Shape(1, tokens, bench.options.heads, bench.options.dim, bench.dtype, bench.env.device)


def compile_fla(bench: Bench, decays: list[str]) -> None:
    """Its kernels' settings, by rank 0, in bounded time: the others find them on disk."""
    options = bench.options
    if bench.env.rank == 0 and options.compile_limit > 0:
        _compile_fla(options.heads, options.dim, tuple(decays), options.compile_limit)
    dist.barrier(group=bench.group)
    fla_families.measure_quickly()


@lru_cache
def _compile_fla(heads: int, dim: int, decays: tuple[str, ...], limit: float) -> None:
    """Once a run."""
    command = [sys.executable, __file__, "--heads", str(heads), "--dim", str(dim), "--decay", *decays]
    seconds = fla_families.compile_beside(command, limit)
    print(f"fla's settings were compiled for {seconds:.0f} s", file=sys.stderr, flush=True)


def compile_part(options: argparse.Namespace, device: torch.device) -> None:
    """In such a process, which is each of two ranks in turn, with a group that sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shape = peers.Shape(1, 1024, options.heads, options.dim, torch.bfloat16, device)

    def once(decay: str, rank: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        try:
            x = operators.inputs(shape, decay, seed=0).leaves()
            context = cp_context(shape.tokens, device, dist.group.WORLD, 2)
            torch.autograd.grad(fla_call(x, decay, cp_context=context), x.differentiable, x.do)
        finally:
            dist.destroy_process_group()

    forms = dict.fromkeys("kda" if decay == "kda" else "gated_delta" for decay in options.decay)
    fla_families.compile_part(options.compile_part, [partial(once, form, rank) for form in forms for rank in range(2)])


def attempted(bench: Bench, call: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What a call of a library that is not ours gives, or why it failed on some rank; the latter alike on all."""
    found = reason = None
    try:
        found = call()
        if bench.env.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as problem:  # the row says it
        reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:150]}"
    reasons: list[str | None] = [None] * bench.env.world_size
    dist.all_gather_object(reasons, reason, group=bench.group)
    return found, next((reason for reason in reasons if reason), None)


def fla_right(bench: Bench, decay: str) -> tuple[Reasons, list[dict]]:
    """Why its forward and backward are not timed, None where they are right against fp64; and their gates."""
    sequence, peer, tokens = bench.sequences["auto"], FlaContextParallel(decay), 512
    whole = operators.inputs(shape_of(bench, tokens * sequence.size), decay, seed=3)
    double = whole.map(lambda x: x.double()).leaves()
    exact = operators.exact(double, decay)
    gradients = torch.autograd.grad(exact, double.differentiable, double.do)
    mine = whole.map(lambda x: peer.shard(x, sequence)).leaves()
    o, forward = attempted(bench, lambda: peer.attention(shape_of(bench, tokens), sequence)(mine))
    gates: list[dict] = []
    if forward is None:
        forward = too_far(bench, f"fla_cp, {decay}, forward", [o], [exact.detach()], gates)
    if forward is not None:
        return Reasons(forward, forward), gates
    found, backward = attempted(bench, lambda: torch.autograd.grad(o, mine.differentiable, mine.do))  # type: ignore[arg-type]
    if backward is None:
        backward = too_far(bench, f"fla_cp, {decay}, backward", found, gradients, gates)
    return Reasons(None, backward), gates


def too_far(bench: Bench, what: str, found: Sequence | None, whole: Sequence[Tensor], gates: list[dict]) -> str | None:
    """Why a peer's results on ranks are wrong; None if they are not. Adds the gate."""
    assert found is not None
    sequence, limit = bench.sequences["auto"], 5e-2 if bench.dtype == torch.bfloat16 else 1e-5
    error = bench.worst([relative(x, FlaContextParallel().shard(y, sequence)) for x, y in zip(found, whole)])
    gates.append({"what": what, "relative error": float(f"{error:.3g}"), "limit": limit})
    return None if error <= limit else f"relative error {error:.1e} is over {limit:g}"


def delta_rows(bench: Bench, decay: str, tokens: int, reasons: Reasons) -> list[dict]:
    """Forward, backward and both, of ours and of fla's."""
    shape, splits = shape_of(bench, tokens), {"ranks": bench.sequences["auto"], "one": None}
    calls: dict[tuple[str, str], tuple] = {
        ("lasp", on): operator_calls(bench, shape, decay, split) for on, split in splits.items()
    }
    if reasons.forward is None:
        made, failed = attempted(
            bench,
            lambda: {
                ("fla_cp", on): fla_calls(bench, shape, decay, split, backward=reasons.backward is None)
                for on, split in splits.items()
            },
        )
        if failed is None:
            calls |= made or {}
        else:
            reasons = Reasons(failed, failed)
    times = [bench.time({n: call[i] for n, call in calls.items() if call[i] is not None}) for i in (0, 1)]
    rows = []
    for who, notes in (("lasp", Reasons(None, None)), ("fla_cp", reasons)):
        for direction, parts in DIRECTIONS.items():
            note = notes.forward or (notes.backward if 1 in parts else None)
            row = {"decay": decay, "tokens a rank": tokens, "direction": direction, "operator": who}
            rows.append(row | delta_row(bench, row, [times[i] for i in parts], note))
    return rows


def delta_row(bench: Bench, row: dict, times: list[dict], note: str | None) -> dict:
    """The numbers of a row; empty where the note says why."""
    columns = ("ms", "spread %", "one rank ms", "% of one rank", "x lasp", "target", "met")
    if note is not None:
        return {**dict.fromkeys(columns), "note": f"not run: {note}"}
    who = row["operator"]
    ms, ours, one = (sum(t[name].median for t in times) for name in ((who, "ranks"), ("lasp", "ranks"), (who, "one")))
    numbers = {"ms": ms, "spread %": max(t[who, "ranks"].spread for t in times), "one rank ms": one}
    numbers |= {"% of one rank": 100 * one / ms, "x lasp": ms / ours, "target": None, "met": None, "note": None}
    reached = numbers["% of one rank" if who == "lasp" else "x lasp"]
    target = DELTA_TARGETS.get((who, row["direction"])) if row["tokens a rank"] == 32768 else None
    if target is not None and bench.env.device.type == "cuda":
        numbers |= {"target": target, "met": reached >= target}
    return numbers


def fla_calls(
    bench: Bench, shape: peers.Shape, decay: str, sequence: lasp.SequenceParallel | None, *, backward: bool
) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """As `operator_calls`, each called once; no backward where it is not to be timed."""
    peer = FlaContextParallel(decay)
    x = operators.inputs(shape, decay, seed=bench.env.rank).leaves()
    attention = peer.one_process if sequence is None else peer.attention(shape, sequence)
    o = attention(x)

    def gradients() -> object:
        return torch.autograd.grad(o, x.differentiable, x.do, retain_graph=True)

    if backward:
        gradients()
    return lambda: attention(x), gradients if backward else None


SUITES = {"alone": alone, "op": operator, "peers": against_peers, "delta": delta}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=["alone", "op", "peers"])
    parser.add_argument("--bytes", nargs="+", type=int, default=[2**n for n in range(16, 27, 2)], help="of a state")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**n for n in range(13, 18)], help="of a rank")
    parser.add_argument("--decay", nargs="+", choices=DECAYS, default=list(USUAL))
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--name", default="", help="for the results: exchange_NAME")
    parser.add_argument("--compile-limit", type=float, default=150, help="seconds for fla's settings (default 150)")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    if options.compile_part:
        return compile_part(options, torch.device("cuda"))
    bench = Bench.start(options)
    if bench.env.world_size < 2:
        raise SystemExit("needs two ranks or more: torchrun --nproc-per-node 2 bench/exchange.py")
    found = {suite: SUITES[suite](bench) for suite in options.suite}
    if bench.env.rank:
        return
    titles = {"alone": "the exchange alone", "op": "the operator", "peers": "peers, forward and backward"}
    titles["delta"] = "the delta rule beside fla-core's context parallelism"
    tables = {titles[suite]: rounded(rows) for suite, (rows, _) in found.items()}
    gates = [row for _, rows in found.values() for row in rows]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    network = cost.network_of(bench.sequences["auto"])
    facts = {"ranks": bench.env.world_size, "backend": bench.env.backend, "repetitions": options.repetitions}
    facts |= {"load of the host (1 minute)": load, "network as lasp measured it": str(network)}
    report(
        "_".join(["exchange", options.name or f"{bench.env.world_size}x{bench.env.device.type}"]),
        command_line("exchange.py", argv, bench.env.world_size),
        gates,
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        tables=tables,
        facts=facts,
        markdown=True,
    )


def rounded(rows: list[dict]) -> list[dict]:
    """Times to four digits."""
    return [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()
