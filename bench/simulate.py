"""Simulate the exchange of states on 8 to 4,096 ranks, and check the simulation against published times.

    python bench/simulate.py [--max-ranks 4096] [--tokens 65536] [--save]
    python bench/simulate.py --measured bench/results/DATE_exchange_4xcuda.json ... [--save]
    python bench/simulate.py --measured DATE_exchange_4xH200.json --scaling DATE_operator_scaling_8xH200.json ...

Published are the times of ZeCO on 8 to 256 H100s (as a digest of the paper gives them: collectives at 8K tokens a GPU,
width 4096, 32 heads; the operator at 16K tokens a GPU, 16 heads). What no source tells is fitted to some of these
figures, and every row says "fitted" or "predicted". The tables for this project's operator then use the same network,
and its kernel times as measured on one H100. Needs no GPU.

`--measured` takes results of exchange.py and simulates the same exchanges and operators on as many ranks, with the
latency and bandwidth of that file. Nothing is fitted to what is compared. `--scaling` takes results of
operator_scaling.py and scaling.py, and simulates them with the network of the first of these files: from what one rank
takes in the same result follows what many take.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import plots
import torch
from common import RESULTS, add_report_arguments, command_line, report
from horizon_savings import count
from simulator import SCHEDULES, Link, Machine, Pass, exchange_seconds, operator_seconds

import lasp

MS = 1e-3
# Published, milliseconds by number of GPUs.
ALL_GATHER = {8: 0.375, 16: 0.658, 32: 1.616, 64: 2.543, 128: 4.350, 256: 8.514}
ALL_SCAN = {8: 0.226, 16: 0.297, 32: 0.448, 64: 0.739, 128: 1.272, 256: 2.165}
OPERATOR = {  # LASP-1, LASP-2, ZeCO, and data parallelism, which exchanges nothing: forward and backward
    8: (22.59, 19.39, 7.32, 6.39),
    32: (39.03, 25.72, 7.65, 6.44),
    128: (113.71, 35.72, 9.88, 6.12),
}
COLLECTIVE_BYTES = 32 * 128 * 128 * 4  # one fp32 state: 32 heads of 128 x 128; the source does not tell the dtype
OPERATOR_BYTES = 16 * 128 * 128 * 4
# Measured on two H100s (NVLink, NCCL): 1 MiB and 16 MiB in an all-gather take 22 and 96 us, in a send 20 and 75 us.
GATHER_BANDWIDTH = 15 * 2**20 / 74e-6
SEND_BANDWIDTH = 15 * 2**20 / 55e-6
MESSAGE_OVERHEAD = 20e-6 - 2**20 / SEND_BANDWIDTH  # of a message that is the only one
GATHER_SETUP = 22e-6 - 2**20 / GATHER_BANDWIDTH
FOLD = 20e-6 / (16 * 2**20)  # seconds a byte: the scan of 16 segments of 1 MiB takes 20 us
RANKS_TABLE = "this project's operator, B1 H16 D128, one fp32 state of 1 MiB"
HORIZON_TABLE = "the same with the horizon: ring, mean over the 16 layers of TNL-1B"
ALONE, OPERATOR_TABLE = "the exchange alone", "the operator"  # titles in the results of exchange.py
SCALING = "scaling, measured and simulated"
WITH_MAPS = ("delta", "gated_delta", "kda")  # beside each state travels the K x K map that led to it
LAYERS = 16  # of TNL-1B, and heads a layer
BLOCKS = (1, 2, 4, 8, 16, 32)
# Shares of one operator call, from the kernel times of one H100, in us (65,536 tokens, 16 heads of 128, no decay): the
# state, then what waits for it, in forward; the state's gradient, dq, then dk and dv in backward. For the published
# operators they are an assumption.
FORWARD, BACKWARD = 141 + 4 + 357, 131 + 4 + 354 + 751
FORWARD_SHARE = FORWARD / (FORWARD + BACKWARD)
STATE_SHARE, D_STATE_SHARE, DQ_SHARE = (141 + 4) / FORWARD, (131 + 4) / BACKWARD, 354 / BACKWARD


def passes(forward: float, backward: float) -> list[Pass]:
    """The two passes of an operator that takes so many seconds on one rank, cut at the shares above."""
    state, d_state, dq = STATE_SHARE * forward, D_STATE_SHARE * backward, DQ_SHARE * backward
    return [Pass(state, 0.0, forward - state), Pass(d_state, dq, backward - d_state - dq)]


def solve(function: Callable[[float], float], target: float, guess: float) -> float:
    """The argument at which a function that grows nearly linearly reaches the target (secant steps)."""
    low, high = guess, 2 * guess
    at_low, at_high = function(low), function(high)
    for _ in range(50):
        if abs(at_high - target) <= 1e-9 * abs(target):
            return high
        step = (target - at_high) * (high - low) / (at_high - at_low)
        low, at_low, high = high, at_high, high + step
        at_high = function(high)
    raise SystemExit(f"no argument gives {target}: the simulation reaches {at_high}")


def best_pipeline(ranks: int, nbytes: float, machine: Machine) -> tuple[float, int]:
    """Seconds and blocks of the best cut among BLOCKS."""
    return min((exchange_seconds("pipeline", ranks, nbytes, machine, blocks=k), k) for k in BLOCKS)


@lru_cache
def gather_machine() -> Machine:
    """NVLink as measured; between nodes a bandwidth that meets 256 GPUs, and a setup that meets 8."""

    def machine(between: float) -> Machine:
        found = Machine(Link(0.0, GATHER_BANDWIDTH), Link(0.0, COLLECTIVE_BYTES / between))
        inside = exchange_seconds("all_gather", 8, COLLECTIVE_BYTES, found)
        return replace(found, setup=ALL_GATHER[8] * MS - inside)

    def at_256(between: float) -> float:
        return exchange_seconds("all_gather", 256, COLLECTIVE_BYTES, machine(between))

    return machine(solve(at_256, ALL_GATHER[256] * MS, 30e-6))


@lru_cache
def scan_machine() -> Machine:
    """The same network for messages: a latency that meets All-Scan on 256 GPUs, and a setup that meets 8."""
    network = gather_machine()

    def machine(latency: float) -> Machine:
        inside = Link(latency / 2, SEND_BANDWIDTH, latency / 2)
        between = Link(latency / 2, network.between.bandwidth, latency / 2)
        found = Machine(inside, between, fold=FOLD)
        return replace(found, setup=ALL_SCAN[8] * MS - best_pipeline(8, COLLECTIVE_BYTES, found)[0])

    def at_256(latency: float) -> float:
        return best_pipeline(256, COLLECTIVE_BYTES, machine(latency))[0]

    return machine(solve(at_256, ALL_SCAN[256] * MS, 3e-6))


def row(figure: str, gpus: int, published: float, seconds: float, fitted: bool) -> dict:
    simulated = seconds / MS
    error = 100 * (simulated - published) / published
    return {
        "figure": figure,
        "GPUs": gpus,
        "published ms": published,
        "simulated ms": round(simulated, 4),
        "error %": round(error, 2),
        "how": "fitted" if fitted else "predicted",
    }


def check_collectives() -> list[dict]:
    """Published and simulated times of one exchange."""
    rows = []
    for gpus, published in ALL_GATHER.items():
        seconds = exchange_seconds("all_gather", gpus, COLLECTIVE_BYTES, gather_machine())
        rows.append(row("AllGather", gpus, published, seconds, gpus in (8, 256)))
    for gpus, published in ALL_SCAN.items():
        seconds, _ = best_pipeline(gpus, COLLECTIVE_BYTES, scan_machine())
        rows.append(row("All-Scan", gpus, published, seconds, gpus in (8, 256)))
    return rows


def check_operators() -> list[dict]:
    """Published and simulated times of forward and backward of one layer's attention."""
    rows = []
    for gpus, (_, _, zeco, alone) in OPERATOR.items():  # nothing is fitted here
        compute = passes(FORWARD_SHARE * alone * MS, (1 - FORWARD_SHARE) * alone * MS)
        _, blocks = best_pipeline(gpus, OPERATOR_BYTES, scan_machine())
        seconds = operator_seconds("pipeline", gpus, OPERATOR_BYTES, scan_machine(), compute, blocks=blocks)
        rows.append(row("operator, ZeCO", gpus, zeco, seconds, False))
    for index, name, model in ((1, "operator, LASP-2", gather_operator), (0, "operator, LASP-1", serial_operator)):
        alone, growth = fit_operator(model, OPERATOR[8][index] * MS, OPERATOR[128][index] * MS)
        for gpus, published in OPERATOR.items():
            rows.append(row(name, gpus, published[index], model(gpus, alone, growth), gpus != 32))
    return rows


def gather_operator(gpus: int, alone: float, fold: float) -> float:
    """LASP-2: `alone` seconds of computation, and `fold` to fold each state that was gathered."""
    machine = replace(gather_machine(), fold=fold / OPERATOR_BYTES)
    compute = passes(FORWARD_SHARE * alone, (1 - FORWARD_SHARE) * alone)
    return operator_seconds("all_gather", gpus, OPERATOR_BYTES, machine, compute)


def serial_operator(gpus: int, alone: float, serial: float) -> float:
    """LASP-1: `alone` seconds that need no other rank, and `serial` between receiving and sending, both passes."""
    compute = [Pass(beside=share * alone, after=serial / 2) for share in (FORWARD_SHARE, 1 - FORWARD_SHARE)]
    return operator_seconds("serial", gpus, OPERATOR_BYTES, scan_machine(), compute)


def fit_operator(model: Callable[[int, float, float], float], at_8: float, at_128: float) -> tuple[float, float]:
    """The two unknowns of a model from its times at 8 and 128 GPUs."""

    def alone(growth: float) -> float:
        return solve(lambda seconds: model(8, seconds, growth), at_8, at_8 / 2)

    growth = solve(lambda seconds: model(128, alone(seconds), seconds), at_128, (at_128 - at_8) / 400)
    return alone(growth), growth


def kernel_seconds(tokens: int) -> tuple[float, float]:
    """Forward and backward of the kernels on one H100, from the newest kept result of suite `lengths` with this one."""
    for path in sorted(RESULTS.glob("*_kernels_*lengths*.json"), reverse=True):
        for found in json.loads(path.read_text())["rows"]:
            shape = {"T": tokens, "B": 1, "H": 16, "D": 128, "decay": "fixed", "what": "lasp"}
            if all(found.get(key) == value for key, value in shape.items()):
                return found["fwd ms"] * MS, found["bwd ms"] * MS
    raise SystemExit(f"no result in {RESULTS.name}/ has the kernel times of {tokens} tokens (B1 H16 D128, fixed decay)")


def machines() -> dict[str, tuple[Machine, Machine]]:
    """For the tables of this project's operator: networks by name, for messages and for the all-gather.

    The second takes the two GPUs' times as they are: every message costs what one alone costs from the call to the
    end, which is too much for a chain whose receives are posted before.
    """
    scan, gather = scan_machine(), replace(gather_machine(), fold=FOLD)
    slow = [Link(MESSAGE_OVERHEAD, link.bandwidth) for link in (scan.inside, scan.between)]
    return {
        "latencies as published": (scan, gather),
        "latencies of two H100s": (
            replace(scan, inside=slow[0], between=slow[1], setup=0.0),
            replace(gather, setup=GATHER_SETUP),
        ),
    }


def ranks_table(network: str, tokens: int, max_ranks: int) -> list[dict]:
    """Each schedule from 8 ranks on: the exchange alone, and the operator against one rank with as many tokens."""
    messages, gather = machines()[network]
    compute = passes(*kernel_seconds(tokens))
    alone = sum(work.total for work in compute)
    rows = []
    for schedule in ("ring", "pipeline", "all_gather", "serial"):
        machine = gather if schedule == "all_gather" else messages
        ranks = 8
        while ranks <= max_ranks:
            blocks = best_pipeline(ranks, OPERATOR_BYTES, machine)[1] if schedule == "pipeline" else 1
            exchange = exchange_seconds(schedule, ranks, OPERATOR_BYTES, machine, blocks=blocks)
            seconds = operator_seconds(schedule, ranks, OPERATOR_BYTES, machine, compute, blocks=blocks)
            found = {"network": network, "schedule": schedule, "ranks": ranks, "blocks": blocks}
            found |= {"exchange ms": round(exchange / MS, 4), "op fwd+bwd ms": round(seconds / MS, 4)}
            rows.append(found | {"% of one rank": round(100 * alone / seconds, 2)})
            ranks *= 2
    return rows


def horizon_table(tokens: int, max_ranks: int) -> list[dict]:
    """The ring with the horizon: heads whose state fades within a shard go to the neighbour only.

    Which heads those are the runtime's own code says, for TNL-1B, 16 layers of 16 heads; times are means over layers.
    """
    (machine, _), compute = machines()["latencies as published"], passes(*kernel_seconds(tokens))
    rows = []
    for name in ("alibi", "tnl"):
        for ranks in [2**n for n in range(3, max_ranks.bit_length())]:
            shape = {"heads": 16, "tokens": tokens, "ranks": ranks, "key_dim": 128, "value_dim": 128}
            rates = [lasp.decay.schedule(name, 16, layer, LAYERS) for layer in range(LAYERS)]
            far = [count("ring", rate.tolist(), **shape).far_heads for rate in rates if rate is not None]
            seconds = {
                heads: operator_seconds("ring", ranks, OPERATOR_BYTES * heads / 16, machine, compute)
                if heads
                else operator_seconds("neighbour", ranks, OPERATOR_BYTES, machine, compute)
                for heads in {*far, 16}
            }
            row = {"decay": name, "ranks": ranks, "heads that go further": sum(far), "of": 16 * LAYERS}
            row |= {"layers that need the neighbour only": far.count(0)}
            row |= {"op ms, whole ring": round(seconds[16] / MS, 4)}
            rows.append(row | {"op ms": round(sum(seconds[heads] for heads in far) / len(far) / MS, 4)})
    return rows


# ---- beside measurements


@dataclass(frozen=True)
class Measured:
    """The links of some measurement: for messages, for a step of the all-gather, for memory that others read."""

    messages: Link
    gather: Link
    direct: Link | None = None

    def machine(self, schedule: str) -> Machine | None:
        """None where the measurement has no link for the schedule."""
        link = {"all_gather": self.gather, "direct": self.direct}.get(schedule, self.messages)
        return link and Machine(link, link, fold=FOLD)

    def __str__(self) -> str:
        links = (("messages", self.messages), ("a step of the all-gather", self.gather), ("direct", self.direct))
        return "; ".join(f"{n} {1e6 * x.overhead:.1f} us, {x.bandwidth / 1e9:.0f} GB/s" for n, x in links if x)


def by_plain_messages(result: dict) -> Measured:
    """The links whose times are nearest to those of a plain send and of a plain all-gather in the same run."""
    links = []
    for name, steps in (("send and receive", 1), ("all-gather", result["facts"]["ranks"] - 1)):
        rows = [row for row in result["tables"][ALONE] if row["schedule"] == f"plain {name}"]
        links.append(nearest_link((1024 * row["KiB"], row["ms"] * MS / steps) for row in rows))
    return Measured(*links)


def by_lasp(result: dict) -> Measured:
    """What `lasp` measured when the ranks met, from which "auto" chooses."""
    told = dict(re.findall(r"(\w+)=([\d.e+-]+)", result["facts"]["network as lasp measured it"]))
    prefixes = [of for of in ("", "collective_", "direct_") if f"{of}latency" in told]  # "inf" is no number there
    return Measured(*(Link(float(told[f"{of}latency"]), float(told[f"{of}bandwidth"])) for of in prefixes))


def nearest_link(times: Iterable[tuple[float, float]]) -> Link:
    """The line through (bytes, seconds) with the smallest sum of squared errors in %."""
    nbytes, seconds = torch.tensor(list(times), dtype=torch.float64).T
    parts = torch.stack([1 / seconds, nbytes / seconds], 1)
    latency, per_byte = torch.linalg.lstsq(parts, torch.ones_like(parts[:, :1])).solution.flatten().tolist()
    return Link(max(latency, 0.0), 1 / per_byte)


def result_of(path: Path) -> dict:
    """What a results file holds; ends the script if it is none."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # not there, or no JSON
        raise SystemExit(f"{path} cannot be read as a result: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("tables", {}), dict):
        raise SystemExit(f"{path} is no result of a script of bench/")
    return result


def networks_of(path: Path) -> tuple[dict, tuple[Measured, Measured]]:
    """A results file of exchange.py, and its network by plain messages and as `lasp` measured it."""
    result = result_of(path)
    if ALONE not in result.get("tables", {}):
        raise SystemExit(f"{path.name} has no times of suite `alone` of exchange.py, from which the network is known")
    return result, (by_plain_messages(result), by_lasp(result))


def compare(path: Path) -> tuple[dict[str, list[dict]], dict]:
    """Tables of measured and simulated times of one results file of exchange.py, and facts about them."""
    result, networks = networks_of(path)
    compared = {ALONE: compare_alone(result, networks), OPERATOR_TABLE: compare_operator(result, networks)}
    names = {row["schedule"] for row in result["tables"][ALONE] if not row["schedule"].startswith("plain")}
    names |= {row["chosen"] for row in result["tables"].get(OPERATOR_TABLE, [])}
    about: dict = {f"plain messages, {path.stem}": str(networks[0]), f"lasp's network, {path.stem}": str(networks[1])}
    about[f"unknown to the simulator, {path.stem}"] = sorted(names - {*SCHEDULES})
    return {f"{title}, measured and simulated: {path.stem}": rows for title, rows in compared.items() if rows}, about


def compare_alone(result: dict, networks: Sequence[Measured]) -> list[dict]:
    """Every schedule and size of state that the simulator knows."""
    rows = []
    for row in result["tables"][ALONE]:
        name = row["schedule"]
        if name in SCHEDULES:
            size, blocks = 1024 * row["KiB"], row["blocks"] or 1
            seconds = [
                machine and exchange_seconds(name, result["facts"]["ranks"], size, machine, blocks=blocks)
                for machine in (network.machine(name) for network in networks)
            ]
            rows.append(beside({"schedule": name, "KiB": row["KiB"]}, row["ms"], seconds))
    return rows


def compare_operator(result: dict, networks: Sequence[Measured]) -> list[dict]:
    """Forward and backward with the schedule that was chosen; what one rank takes is the same row's measurement."""
    rows: list[dict] = []
    if re.search("--(heads|dim) ", result["command"]):
        return rows  # the state is not OPERATOR_BYTES
    for row in result["tables"].get(OPERATOR_TABLE, []):
        name, one = row["chosen"], row["one rank ms"] * MS
        if name in SCHEDULES:
            work = passes(one, one)[("forward", "backward").index(row["direction"])]
            seconds = simulated(name, result["facts"]["ranks"], OPERATOR_BYTES, [work], networks)
            head = {key: row[key] for key in ("tokens a rank", "decay", "direction", "schedule", "chosen")}
            rows.append(beside(head, row["ms"], seconds))
    return rows


def compare_scaling(path: Path, networks: Sequence[Measured]) -> list[dict]:
    """Operators, and training steps of TNL-1B, on several ranks; what one rank takes is a measurement of the result."""
    result = result_of(path)
    try:
        rows = scaling_rows(result, networks)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise SystemExit(f"{path.name} has rows of another kind: {type(error).__name__} {error}") from error
    if not rows:
        raise SystemExit(
            f"{path.name} has no times of several ranks beside those of one; give a result of operator_scaling.py, or "
            "of scaling.py with TNL-1B"
        )
    return rows


def scaling_rows(result: dict, networks: Sequence[Measured]) -> list[dict]:
    """The rows of `compare_scaling`."""
    rows: list[dict] = []
    for title, found in {"": result.get("rows", []), **result.get("tables", {})}.items():
        strong = "strong" in title
        for row in found:
            if row.get("ranks", 1) > 1 and row.get("chosen") in SCHEDULES and row["direction"] != "both":
                one = row["one rank ms"] * MS / (row["ranks"] if strong else 1)
                work = passes(one, one)[("forward", "backward").index(row["direction"])]
                nbytes = OPERATOR_BYTES * (2 if row["decay"] in WITH_MAPS else 1)
                seconds = simulated(row["chosen"], int(row["ranks"]), nbytes, [work], networks)
                rows.append(beside(scaling_head(row, "strong" if strong else "weak", row["decay"]), row["ms"], seconds))
    of_1b = re.search(r"--model 1B\b", result.get("command", ""))  # whose exchanges are known here
    steps = [row for row in result.get("rows", []) if "step ms" in row and "layout" in row] if of_1b else []
    for row in steps:
        dp, sp = (int(n) for n in row["layout"].split("x")[:2])
        alone = [
            other for other in steps if other["layout"] == "1x1" and other["tokens a rank"] == row["tokens a rank"]
        ]
        if sp > 1 and alone:
            work = passes(*kernel_seconds(int(row["tokens a rank"])))
            more = [
                None if seconds is None else LAYERS * (seconds - sum(each.total for each in work))
                for seconds in simulated("direct", sp, OPERATOR_BYTES, work, networks)
            ]
            seconds = [None if extra is None else alone[0]["step ms"] * MS + extra for extra in more]
            rows.append(beside(scaling_head(row, f"step of TNL-1B, {dp}x{sp}", "fixed"), row["step ms"], seconds))
    return rows


def scaling_head(row: dict, what: str, decay: str) -> dict:
    direction = row.get("direction", "both")
    head = {"what": what, "ranks": int(row["ranks"]), "tokens a rank": int(row["tokens a rank"]), "decay": decay}
    return {**head, "direction": direction, "chosen": row.get("chosen", "direct")}


def simulated(
    schedule: str, ranks: int, nbytes: int, work: Sequence[Pass], networks: Sequence[Measured]
) -> list[float | None]:
    """Seconds of these passes over each of the networks, None where it has no link for the schedule."""
    machines = (network.machine(schedule) for network in networks)
    return [machine and operator_seconds(schedule, ranks, nbytes, machine, work) for machine in machines]


def beside(head: dict, measured: float, seconds: Sequence[float | None]) -> dict:
    """A row: measured ms, and simulated ones with the links of plain messages and with those that `lasp` measured."""
    found = head | {"measured ms": measured}
    columns = (("simulated ms", "error %"), ("with lasp's network ms", "its error %"))
    for simulated, (name, error) in zip(seconds, columns):
        found |= {name: None, error: None}
        if simulated is not None:
            found |= {name: round(simulated / MS, 4), error: round(100 * (simulated / MS / measured - 1), 1)}
    return found


def facts(tokens: int) -> dict:
    """What was measured, fitted and assumed, in words."""
    gather, scan = gather_machine(), scan_machine()
    forward, backward = kernel_seconds(tokens)
    return {
        "measured, two H100s": f"NVLink {GATHER_BANDWIDTH / 1e9:.0f} GB/s in an all-gather, "
        f"{SEND_BANDWIDTH / 1e9:.0f} GB/s in a send; fold of states {1e-9 / FOLD:.0f} GB/s",
        "fitted, AllGather": f"setup {gather.setup * 1e6:.0f} us (on 8 GPUs), between nodes "
        f"{gather.between.bandwidth / 1e9:.1f} GB/s (on 256)",
        "fitted, All-Scan": f"setup {scan.setup * 1e6:.0f} us (on 8), {2e6 * scan.inside.latency:.2f} us a message, "
        "half of it in flight (on 256)",
        "fitted, operators": "LASP-1 and LASP-2 each: computation of a rank, and seconds a rank more (on 8 and 128)",
        "assumed": "fp32 states; the best of " + ", ".join(map(str, BLOCKS)) + " blocks; nodes of 8; the share of an "
        "operator that needs no other rank, from this project's kernels",
        "kernels, one H100": f"{tokens} tokens a rank: forward {forward / MS:.3f} ms, backward {backward / MS:.3f} ms",
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-ranks", type=int, default=4096, help="the last of 8, 16, 32, ... (4096: six minutes)")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of a rank, as the kernels were measured")
    parser.add_argument("--measured", nargs="+", type=Path, default=[], help="results of exchange.py, to compare with")
    parser.add_argument(
        "--scaling", nargs="+", type=Path, default=[], help="results of operator_scaling.py, scaling.py"
    )
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    if options.scaling and not options.measured:
        parser.error("--scaling needs --measured, whose network it takes")
    kernel_seconds(options.tokens)  # refuses before the long part
    compared = [compare(path) for path in options.measured]
    scaled = {
        f"{SCALING}: {path.stem}": compare_scaling(path, networks_of(options.measured[0])[1])
        for path in options.scaling
    }
    ranks = [r for name in machines() for r in ranks_table(name, options.tokens, options.max_ranks)]
    tables = {RANKS_TABLE: ranks, HORIZON_TABLE: horizon_table(options.tokens, options.max_ranks)}
    about = facts(options.tokens)
    for found, more in compared:
        tables |= found
        about |= more
    tables |= scaled
    kept = report(
        "simulation",
        command_line("simulate.py", argv),
        check_collectives() + check_operators(),
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        tables=tables,
        facts=about,
        markdown=True,
    )
    if kept:
        plots.draw(kept)


if __name__ == "__main__":
    main()
