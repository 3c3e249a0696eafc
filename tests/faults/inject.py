"""Does every fault of a rank end in an error on all others, in time, or in the right result? Injects many and counts.

    python tests/faults/inject.py --count 300 --dp 2  # 4 ranks
    python tests/faults/inject.py --count 200 --seed 0  # 3 ranks, one sequence
    python tests/faults/inject.py --count 200 --seed 0 --backend nccl --ranks 2  # on GPUs, each rank on one of its own
    python tests/faults/inject.py --backend nccl --ranks 8 --gpus 2  # or as four hosts that have the same two GPUs

Hosts have no exchange "direct". (Where a meeting of it gives up, by a trap, a process that shares its GPU may not end.)

Each injection is a training run of its own (program.py), with gradients averaged by `sync_grads`, DDP or FSDP2: at a
random step, in a random layer forward or backward, before the sum of the loss, before gradients are averaged or before
a checkpoint, a random rank is killed or stopped, ends early, is late, or (in a layer) leaves it out or comes with
another shape or dtype. What must follow (judge.py):

- late, by less than the timeout: the run ends on every rank with the losses of a run without fault, bit for bit (over
  NCCL but for rounding);
- anything else: every rank that can (also one with a wrong call, or that left something out) raises an error that names
  place and rank, within the time of `launch.limit`; in a collective of DDP, FSDP2 or a checkpoint it may be PyTorch's,
  if lasp's line follows that names the rank. No step that was finished has another loss than it has without fault.
  Over NCCL a rank may be ended from outside Python instead, by PyTorch's watchdog or an error of CUDA, with that line;
- every process ends by itself, but for one that was stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "bench")]

from common import add_report_arguments, report  # noqa: E402
from faults.judge import Outcome, judge  # noqa: E402
from faults.launch import run_with  # noqa: E402
from faults.program import (  # noqa: E402
    COMPARED,
    COMPARED_EVERY,
    IN_LAYER,
    KINDS,
    LAYERS,
    OF_LAYERS,
    PLACES,
    SCHEMES,
    STEPS,
    Fault,
)
from ranks import workers  # noqa: E402

from lasp.ranks import SCHEDULES as REGISTERED  # noqa: E402

SCHEDULES = tuple(REGISTERED)
FIRST_START = 30.0  # seconds more for the runs without fault, which load libraries from disk and make NCCL's caches


def random_faults(
    count: int,
    ranks: int,
    seed: int,
    exchanges: Sequence[str] = SCHEDULES,
    schemes: Sequence[str] = SCHEMES,
    places: Sequence[str] = PLACES,
) -> list[Fault]:
    """Each kind as often as the others, everything else at random."""
    draw = random.Random(seed)
    faults = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        compared = kind in COMPARED
        possible = ["forward"] if compared else [p for p in places if p in IN_LAYER or kind not in OF_LAYERS]
        fault = Fault(
            kind,
            rank=draw.randrange(ranks),
            layer=draw.randrange(LAYERS),
            step=draw.randrange(0, STEPS, COMPARED_EVERY if compared else 1),
            place=draw.choice(possible),
            exchange=draw.choice(exchanges),
            store=draw.choice(("launcher", "rank 0")),
            scheme=draw.choice(schemes),
        )
        faults.append(fault)
    draw.shuffle(faults)
    return faults


def inject(
    faults: Sequence[Fault],
    *,
    ranks: int,
    backend: str,
    timeout: float,
    parallel: int,
    dp: int = 1,
    gpus: int | None = None,
    within: float = float("inf"),
    spawn: bool = False,
    tell: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Run each, and call `tell` with what came of it.

    Args:
        faults: one a run.
        ranks: of each run.
        backend: "gloo" or "nccl".
        timeout: of the group, in seconds.
        dp: of each run; the other ranks share a sequence.
        parallel: so many runs at once. On GPUs they take turns with the sets of `gpus` GPUs, and may share them.
        gpus: of each run over NCCL, by default one a rank; fewer are shared (`processes.place`).
        within: seconds after which no further run is started.
        spawn: start every rank as a fresh Python, instead of from a server that has imported everything.
        tell: called by several threads.
    """
    context = multiprocessing.get_context("spawn") if spawn else workers()
    sets = gpu_sets(gpus or ranks) if backend == "nccl" else [""]
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in range(parallel):
        free.put(sets[number % len(sets)])
    until = time.monotonic() + within

    def run(fault: Fault, timeout: float = timeout):
        devices = free.get()
        try:
            return run_with(context, fault, ranks, backend, timeout, devices, dp)
        finally:
            free.put(devices)

    losses = {}  # without fault, by scheme; all schedules give the same bits
    for scheme in {fault.scheme for fault in faults}:
        reference = run(Fault("none", scheme=scheme), timeout + FIRST_START)
        if reference.problem:
            raise RuntimeError(f"the run without fault failed: {reference.problem}")
        losses[scheme] = reference.losses[0]

    def injected(fault: Fault) -> Outcome | None:
        if time.monotonic() > until:
            return None
        outcome = judge(run(fault), losses[fault.scheme])
        tell(outcome)
        return outcome

    with ThreadPoolExecutor(parallel) as pool:
        return [outcome for outcome in pool.map(injected, faults) if outcome is not None]


def gpu_sets(size: int) -> list[str]:
    """Disjoint sets of so many of the GPUs that are visible, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    if count < size:
        raise RuntimeError(f"a run needs {size} GPUs, this machine shows {count}; --gpus {count} lets ranks share them")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",")[:count] if visible else [str(number) for number in range(count)]
    return [",".join(names[first : first + size]) for first in range(0, count - size + 1, size)]


def summary(outcomes: list[Outcome]) -> list[dict]:
    """A row for each kind of fault and place, and one for all."""
    rows = []
    for kind in (*KINDS, "all"):
        for place in PLACES if kind != "all" else ("",):
            mine = [o for o in outcomes if kind == "all" or (o.fault.kind, o.fault.place) == (kind, place)]
            seconds = sorted(o.seconds for o in mine if o.seconds is not None)
            if mine:
                how = Counter(o.how for o in mine)
                rows.append(
                    {
                        "fault": kind,
                        "place": place,
                        "injected": len(mine),
                        "detected": sum(o.detected for o in mine),
                        "seconds, median": statistics.median(seconds) if seconds else None,
                        "seconds, most": max(seconds, default=None),
                        "processes left": sum(o.left for o in mine),
                        "how": "; ".join(f"{n}: {text}" for text, n in how.most_common(3)) if kind != "all" else "",
                    }
                )
    return rows


def line(outcome: Outcome) -> str:
    """One injection, for those who wait."""
    fault, seconds = outcome.fault, "-" if outcome.seconds is None else f"{outcome.seconds:.2f} s"
    place = f"rank {fault.rank}, step {fault.step}, layer {fault.layer}, store of {fault.store}"
    verdict = "ok" if outcome.detected else "NOT DETECTED"
    what = f"{fault.kind} {fault.place}, {fault.scheme}, {fault.exchange}"
    return f"{verdict}: {what}, {place}: {seconds}, {outcome.how} {outcome.problem[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, help="of each injection; by default 3, with --dp twice --dp, over NCCL 2")
    parser.add_argument("--dp", type=int, default=1, help="of each injection; the other ranks share a sequence")
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=SCHEMES, help="draw from these")
    parser.add_argument("--place", nargs="+", choices=PLACES, default=PLACES, help="draw from these")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--gpus", type=int, help="of each injection over NCCL; by default one a rank, fewer are shared")
    parser.add_argument(
        "--exchange",
        nargs="+",
        choices=SCHEDULES,
        help="draw from these; by default all, without direct on shared GPUs",
    )
    parser.add_argument("--timeout", type=float, help="of the group, in seconds; by default 5, over NCCL 10")
    parser.add_argument("--parallel", type=int, help="injections at once; by default 4, over NCCL 2 for a set of GPUs")
    parser.add_argument("--within", type=float, default=float("inf"), help="begin no injection after so many seconds")
    parser.add_argument("--spawn", action="store_true", help="start every rank as a fresh Python; slower")
    add_report_arguments(parser)
    options = parser.parse_args()
    nccl = options.backend == "nccl"
    if options.gpus and not nccl:
        parser.error(f"--gpus {options.gpus} is for --backend nccl")
    ranks = options.ranks or (2 if nccl else 3 if options.dp == 1 else 2 * options.dp)
    gpus = min(options.gpus or ranks, ranks) if nccl else None
    shared = nccl and gpus != ranks
    exchanges = options.exchange or [name for name in SCHEDULES if name != "direct" or not shared]
    given = {
        "ranks": ranks,
        "dp": options.dp,
        "backend": options.backend,
        "gpus": gpus,
        "timeout": options.timeout or (10.0 if nccl else 5.0),
        "parallel": options.parallel or (2 * len(gpu_sets(gpus or ranks)) if nccl else 4),
    }
    faults = random_faults(options.count, ranks, options.seed, exchanges, options.scheme, options.place)
    started = time.monotonic()
    outcomes = inject(
        faults,
        **given,
        within=options.within,
        spawn=options.spawn,
        tell=lambda outcome: print(line(outcome), flush=True),
    )
    detected, left = sum(o.detected for o in outcomes), sum(o.left for o in outcomes)
    took = time.monotonic() - started
    report(
        f"faults_{ranks}x{options.backend}"
        + (f"_dp{options.dp}" if options.dp > 1 else "")
        + (f"_on_{gpus}_gpus" if shared else ""),
        " ".join(["python tests/faults/inject.py", *sys.argv[1:]]),
        summary(outcomes),
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        markdown=True,
        facts={
            **{name: value for name, value in given.items() if value is not None},
            "exchange": exchanges,
            "scheme": list(options.scheme),
            "detected": f"{detected} of {len(outcomes)}",
            "processes left": left,
            "largest difference of a loss": max((o.difference for o in outcomes), default=0.0),
            "the whole took, seconds": took,
            "not detected": [json.dumps(asdict(o.fault)) for o in outcomes if not o.detected],
        },
    )
    for outcome in outcomes:
        if not outcome.detected:
            print(f"NOT detected: {asdict(outcome.fault)}: {outcome.problem}\n  {outcome.errors}")
    print(
        f"faults_{options.backend}: {detected} of {len(outcomes)} detected ({options.count} asked for), "
        f"{left} processes left, {took:.0f} s"
    )
    return int(detected < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
