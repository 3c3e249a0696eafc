"""Does every fault of a rank end in an error on all others, in time, or in the right result? Injects many and counts.

    python tests/faults/inject.py --count 200 --seed 0

Each injection is a training run of its own (program.py): at a random layer, step and direction a random rank is killed
or stopped, ends early, leaves a layer out, is late, or comes with another shape or dtype. What must follow:

- late, by less than the timeout: the run ends on every rank with the losses of a run without fault, bit for bit;
- anything else: every rank that can (also one with a wrong call, or that left something out) raises, within the time of
  `limit`, and no step that was finished has another loss than it has without fault;
- every process ends by itself, but for one that was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "bench")]

from faults.program import COMPARED, COMPARED_EVERY, KINDS, LAYERS, STEPS, Fault, Run, run_rank  # noqa: E402
from processes import free_port  # noqa: E402
from ranks import workers  # noqa: E402

from lasp.mesh import EXCHANGES  # noqa: E402

MISMATCH = 5.0  # seconds after which ranks that differ must know it
MARGIN = 3.0  # seconds that a rank may need beside what it waits for: several runs share the cores


@dataclass(frozen=True)
class Outcome:
    """What came of one injection."""

    fault: Fault
    detected: bool
    how: str  # errors by rank, or "the right losses"
    seconds: float | None  # from the fault to the last rank's error
    left: int  # processes that did not end by themselves, but for the stopped one
    problem: str  # why it does not count as detected
    errors: dict[int, str]  # texts by rank


def random_faults(count: int, ranks: int, seed: int) -> list[Fault]:
    """Each kind as often as the others, everything else at random."""
    draw = random.Random(seed)
    faults = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        compared = kind in COMPARED
        fault = Fault(
            kind,
            rank=draw.randrange(ranks),
            layer=draw.randrange(LAYERS),
            step=draw.randrange(0, STEPS, COMPARED_EVERY if compared else 1),
            direction="forward" if compared else draw.choice(("forward", "backward")),
            exchange=draw.choice(EXCHANGES[1:]),
            store=draw.choice(("launcher", "rank 0")),
        )
        faults.append(fault)
    draw.shuffle(faults)
    return faults


def inject(faults: Iterable[Fault], *, ranks: int, backend: str, timeout: float, jobs: int) -> list[Outcome]:
    """Run each; `jobs` of them at once."""
    context = workers()
    with ThreadPoolExecutor(jobs) as pool:
        reference = _run(context, Fault("none"), ranks, backend, timeout)
        if reference.problem:
            raise RuntimeError(f"the run without fault failed: {reference.problem}")
        losses = reference.losses[0]  # all schedules give the same bits
        runs = pool.map(lambda fault: _run(context, fault, ranks, backend, timeout), faults)
        return [judge(run, losses, timeout) for run in runs]


@dataclass
class _Finished:
    """What the ranks of one run left."""

    fault: Fault
    events: list[list[dict]]  # by rank
    exits: list[int | None]
    left: int
    log: str

    @property
    def losses(self) -> list[dict[int, float]]:
        return [{e["step"]: e["value"] for e in events if e["event"] == "loss"} for events in self.events]

    def find(self, rank: int, name: str) -> dict | None:
        return next((e for e in self.events[rank] if e["event"] == name), None)

    @property
    def problem(self) -> str:
        """Of a run that should end well."""
        for rank, code in enumerate(self.exits):
            if self.find(rank, "done") is None or code != 0:
                return f"rank {rank} did not end well (exit code {code}): {self.find(rank, 'error') or self.log}"
        return ""


def _run(context, fault: Fault, ranks: int, backend: str, timeout: float) -> _Finished:
    folder = Path(tempfile.mkdtemp(prefix="fault-"))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the launcher's, if it is to hold it
    port = store.port if fault.store == "launcher" else free_port()
    run = Run(ranks, port, folder, backend, timeout)
    processes = [context.Process(target=run_rank, args=(rank, run, fault), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 5 * timeout + 30
    stopped = processes[fault.rank] if fault.kind == "stop" else None
    for process in processes:
        if process is not stopped:
            process.join(max(0.0, deadline - time.monotonic()))
    left = sum(process.is_alive() for process in processes if process is not stopped)
    for process in processes:
        process.kill()
        process.join()
    lines = [folder / f"{rank}.jsonl" for rank in range(ranks)]
    events = [[json.loads(x) for x in path.read_text().splitlines()] if path.exists() else [] for path in lines]
    log = "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
    shutil.rmtree(folder)
    return _Finished(fault, events, [process.exitcode for process in processes], left, log)


def judge(run: _Finished, losses: dict[int, float], timeout: float) -> Outcome:
    """Whether what happened is what must."""
    fault = run.fault
    happened = run.find(fault.rank, "fault")
    errors = {rank: found for rank in range(len(run.events)) if (found := run.find(rank, "error"))}
    how = ", ".join(f"{n} x {name}" for name, n in Counter(e["type"] for e in errors.values()).most_common())
    seconds = max(e["time"] for e in errors.values()) - happened["time"] if errors and happened else None
    problem = ""
    if happened is None:
        problem = f"the fault did not happen: {run.log}"
    elif wrong := [rank for rank, found in enumerate(run.losses) if any(losses[s] != x for s, x in found.items())]:
        problem = f"wrong losses on ranks {wrong}"
    elif fault.kind == "delay":
        how = how or "the right losses"
        problem = run.problem
    else:
        gone = {fault.rank} if fault.kind in ("kill", "stop", "exit") else set()
        silent = [rank for rank in range(len(run.events)) if rank not in errors and rank not in gone]
        if silent:
            problem = f"ranks {silent} raised nothing (exit codes {run.exits}): {run.log}"
        elif seconds is None or seconds > limit(fault, timeout):
            problem = f"{seconds} s are more than {limit(fault, timeout)} s"
        elif bad := [rank for rank in errors if run.exits[rank] != 1]:
            problem = f"ranks {bad} ended with {[run.exits[r] for r in bad]}: {run.log}"
    if run.left:
        problem += f" {run.left} processes did not end"
    texts = {rank: f"{e['type']}: {e['text']}" for rank, e in errors.items()}
    return Outcome(fault, not problem, how, seconds, run.left, problem, texts)


def limit(fault: Fault, timeout: float) -> float:
    """Seconds from a fault to the last rank's error.

    A rank that is silent is noticed after the timeout by those that wait for it, and these by others, since they end.
    But if it is stopped and holds the store, that is asked once more.
    """
    if fault.kind in COMPARED:
        return MISMATCH
    asked_again = fault.kind == "stop" and fault.store == "rank 0" and fault.rank == 0
    return timeout * (2 if asked_again else 1) + MARGIN


def summary(outcomes: list[Outcome]) -> list[dict]:
    """A row for each kind of fault and direction, and one for all."""
    rows = []
    for kind in (*KINDS, "all"):
        for direction in ("forward", "backward") if kind != "all" else ("",):
            mine = [o for o in outcomes if kind == "all" or (o.fault.kind, o.fault.direction) == (kind, direction)]
            seconds = sorted(o.seconds for o in mine if o.seconds is not None)
            if mine:
                how = Counter(o.how for o in mine)
                rows.append(
                    {
                        "fault": kind,
                        "direction": direction,
                        "injected": len(mine),
                        "detected": sum(o.detected for o in mine),
                        "seconds, median": statistics.median(seconds) if seconds else None,
                        "seconds, most": max(seconds, default=None),
                        "processes left": sum(o.left for o in mine),
                        "how": "; ".join(f"{n}: {text}" for text, n in how.most_common(3)) if kind != "all" else "",
                    }
                )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--timeout", type=float, default=5.0, help="of the group, in seconds")
    parser.add_argument("--jobs", type=int, default=4, help="injections at once")
    parser.add_argument("--save", action="store_true", help="keep the table in bench/results")
    options = parser.parse_args()
    started = time.monotonic()
    faults = random_faults(options.count, options.ranks, options.seed)
    given = {name: getattr(options, name) for name in ("ranks", "backend", "timeout", "jobs")}
    outcomes = inject(faults, **given)
    from common import report

    report(
        f"faults_{options.backend}",
        " ".join(["python tests/faults/inject.py", *sys.argv[1:]]),
        summary(outcomes),
        save=options.save,
        markdown=True,
        facts={
            **given,
            "detected": f"{sum(o.detected for o in outcomes)} of {len(outcomes)}",
            "processes left": sum(o.left for o in outcomes),
            "the whole took, seconds": time.monotonic() - started,
        },
    )
    for outcome in outcomes:
        if not outcome.detected:
            print(f"NOT detected: {asdict(outcome.fault)}: {outcome.problem}\n  {outcome.errors}")
    return int(not all(o.detected for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
