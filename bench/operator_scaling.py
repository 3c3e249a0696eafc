"""Weak and strong scaling of the operator on 1, 2, 4, ... ranks of one machine, all in one run.

    torchrun --nproc-per-node 4 bench/operator_scaling.py [--peers] [--save]

Weak: every rank has as many tokens, and ideal is the time of one rank with these. Strong: one sequence over more and
more ranks, and ideal is a W-th of one rank's time. W ranks are ranks 0 to W - 1; the others wait. One rank's time is
taken in turns with that of the W ranks, by each of them for itself, so that both have the same GPUs, equally warm.
The schedule is "auto". Nothing is timed before the operator is right on every number of ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace

import plots
import torch
import torch.distributed as dist
from common import add_report_arguments, command_line, report
from exchange import (
    USUAL,
    Bench,
    against_peers,
    delta,
    operator_calls,
    operator_error,
    rounded,
    shape_of,
)
from operators import DECAYS, DELTA

import lasp
from lasp.exchange import cost

TARGETS = {32768: 95.0}  # % of ideal by tokens of a rank, weak
WEAK, STRONG, PEERS = "weak scaling", "strong scaling", "weak scaling of peers, forward and backward"
BESIDE_FLA = "the delta rule beside fla-core's context parallelism"
DIRECTIONS = {"forward": (0,), "backward": (1,), "both": (0, 1)}
Groups = dict[int, "Bench | None"]


def groups_of(world: Bench) -> Groups:
    """By number of ranks: ranks 0 to W - 1 as a Bench of their own, None on the others. A collective call."""
    found: Groups = {}
    # The largest first: PyTorch wants ranks that set up symmetric memory to have done so equally often.
    for ranks in sorted(world.options.ranks, reverse=True):
        group = dist.new_group(list(range(ranks)))
        found[ranks] = None
        if world.env.rank < ranks:
            sequence = lasp.SequenceParallel(group)  # type: ignore[arg-type]  # an int only where a rank is left out
            if ranks > 1:
                cost.measure(sequence)
            found[ranks] = Bench(replace(world.env, world_size=ranks), {"auto": sequence}, world.options)
        dist.barrier()
    return dict(sorted(found.items()))


def gate(world: Bench, groups: Groups) -> list[dict]:
    """The operator on every number of ranks against fp64 in one process; ends the run on all ranks if one is wrong."""
    rows = []
    for ranks, bench in groups.items():
        for decay in world.options.decay:
            error = operator_error(bench, "auto", decay) if bench else 0.0
            error = world.worst([torch.tensor(error, device=world.env.device)])
            limit = 1e-5 if world.dtype == torch.float32 else 1e-2 if decay in USUAL else 2e-2  # decays with gradients
            rows.append(world.require(f"operator, {ranks} of {world.env.world_size} ranks, {decay}", error, limit))
    return rows


# ---- ours


def weak(world: Bench, groups: Groups) -> list[dict]:
    """As many tokens on every rank, however many ranks there are."""
    rows = []
    for tokens in world.options.weak:
        found = measure(world, groups, {ranks: (tokens, tokens) for ranks in groups})
        # On a CPU the targets, which are for GPUs, say nothing.
        target = TARGETS.get(tokens) if world.env.device.type == "cuda" else None
        rows += [judged(row, target if row["ranks"] > 1 else None) for row in found]
    return rows


def judged(row: dict, target: float | None) -> dict:
    return row | {"target %": target, "met": None if target is None else row["% of ideal"] >= target}


def strong(world: Bench, groups: Groups) -> list[dict]:
    """One sequence, over more and more ranks."""
    total = world.options.strong
    return measure(world, groups, {ranks: (total, total // ranks) for ranks in groups}) if total else []


def measure(world: Bench, groups: Groups, tokens: dict[int, tuple[int, int]]) -> list[dict]:
    """By number of ranks: the tokens of one rank alone, and those of each of the ranks."""
    rows = []
    for decay in world.options.decay:
        for ranks, bench in groups.items():
            if bench:
                tell(f"{ranks} ranks, {tokens[ranks][1]} tokens each, decay {decay}", bench)
                rows += rows_of(bench, decay, *tokens[ranks])
            dist.barrier()
    return rows


def rows_of(bench: Bench, decay: str, whole: int, share: int) -> list[dict]:
    """Forward, backward and their sum of one rank with `whole` tokens, and of all with `share` tokens each."""
    ranks, sequence = bench.env.world_size, bench.sequences["auto"]
    calls = {"one": operator_calls(bench, shape_of(bench, whole), decay, None)}
    if ranks > 1:
        calls["all"] = operator_calls(bench, shape_of(bench, share), decay, sequence)
    one, every, chosen = [], [], []
    for index in DIRECTIONS["both"]:
        times = bench.time({name: call[index] for name, call in calls.items()})
        one.append(times["one"])
        every.append(times.get("all", times["one"]))
        chosen.append(sequence.traffic.schedule if ranks > 1 else "-")
    rows = []
    for direction, parts in DIRECTIONS.items():
        ms, alone = (sum(times[i].median for i in parts) for times in (every, one))
        speed_up = ranks * share / ms * alone / whole
        row = {"ranks": ranks, "tokens a rank": share, "decay": decay, "direction": direction, "ms": ms}
        row |= {"spread %": max(every[i].spread for i in parts), "one rank ms": alone, "speed-up": speed_up}
        row |= {"% of ideal": 100 * speed_up / ranks, "chosen": ", ".join(dict.fromkeys(chosen[i] for i in parts))}
        tell(
            ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items()),
            bench,
        )
        rows.append(row)
    return rows


def tell(what: str, bench: Bench) -> None:
    """Progress, by rank 0."""
    if bench.env.rank == 0:
        print(what, file=sys.stderr, flush=True)


# ---- peers


def weak_of_peers(groups: Groups, suite: Callable[[Bench], tuple[list[dict], list[dict]]]) -> tuple[list, list]:
    """A suite of exchange.py by the number of ranks: rows, and their gates."""
    rows, gates = [], []
    for ranks, bench in groups.items():
        if ranks > 1 and bench:
            tell(f"{ranks} ranks, {suite.__name__}", bench)
            found, right = suite(bench)
            rows += [{"ranks": ranks, **row} for row in found]
            gates += [{**row, "what": f"{row['what']}, {ranks} ranks"} for row in right]
        dist.barrier()
    return rows, gates


# ---- the script


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    world = Bench.start(options)
    check(options, world.env.world_size)
    groups = groups_of(world)
    gates = gate(world, groups)
    tables = {WEAK: weak(world, groups), STRONG: strong(world, groups)}
    if options.peers:
        tables[PEERS], more = weak_of_peers(groups, against_peers)
        gates += more
        if any(decay in DELTA for decay in options.decay):
            tables[BESIDE_FLA], more = weak_of_peers(groups, delta)
            gates += more
    if world.env.rank:
        return
    size = world.env.world_size
    kept = report(
        "_".join(["operator_scaling", options.name or f"{size}x{world.env.device.type}"]),
        command_line("operator_scaling.py", argv, size),
        gates,
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        tables={title: rounded(rows) for title, rows in tables.items()},
        facts=facts(world, groups),
        markdown=True,
    )
    if kept:
        plots.draw(kept)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, help="default: 1, 2, 4, ... of those there are")
    parser.add_argument("--weak", nargs="*", type=int, default=[8192, 32768, 131072], help="tokens of a rank")
    parser.add_argument("--strong", type=int, default=2**20, help="tokens of the sequence; 0: none")
    parser.add_argument("--peers", action="store_true", help="weak scaling of the peers too")
    # Under the name by which suite `peers` of exchange.py knows it. Softmax attention takes long on long sequences.
    parser.add_argument("--peer-tokens", dest="tokens", nargs="+", type=int, default=[8192, 32768], help="of a rank")
    parser.add_argument("--decay", nargs="+", choices=DECAYS, default=list(USUAL))
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--name", default="", help="for the results: operator_scaling_NAME")
    parser.add_argument("--compile-limit", type=float, default=150, help="seconds for fla's settings (default 150)")
    add_report_arguments(parser)
    return parser


def check(options: argparse.Namespace, world: int) -> None:
    """Refuse before anything is measured; fill in the numbers of ranks."""
    if world < 2:
        raise SystemExit("needs two ranks or more: torchrun --nproc-per-node 4 bench/operator_scaling.py")
    options.ranks = sorted(set(options.ranks or powers_of_two(world)))
    if options.ranks[0] < 1 or options.ranks[-1] > world:
        raise SystemExit(f"--ranks {options.ranks}: there are {world}")
    for ranks in options.ranks:
        if options.strong % ranks:
            raise SystemExit(f"--strong {options.strong} cannot be split over {ranks} ranks")


def powers_of_two(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length())]


def facts(world: Bench, groups: Groups) -> dict:
    """Under which conditions, in words; on rank 0, which is in every group."""
    options = world.options
    found = {"ranks": world.env.world_size, "backend": world.env.backend, "repetitions": options.repetitions}
    found["inputs"] = f"B1 H{options.heads} D{options.dim} {str(world.dtype).removeprefix('torch.')}"
    found["load of the host (1 minute)"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    for ranks, bench in groups.items():
        if ranks > 1 and bench:
            found[f"network of {ranks} ranks as lasp measured it"] = str(cost.network_of(bench.sequences["auto"]))
    return found


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    dist.destroy_process_group()
