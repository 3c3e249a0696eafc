"""Whether what came of a fault is what must come of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from faults.launch import Finished, limit
from faults.program import OF_LAYERS, Fault

# What the log of a process says that was ended from outside Python: by NCCL's watchdog, or by a kernel that waits for
# another GPU (exchange "direct") and gives up. The first that is found tells most.
ABORTS = {
    "watchdog timeout": r"Watchdog caught collective operation timeout.*",
    "symmetric memory": r"CUDASymmetricMemory::\w+: .*",
    "CUDA error": r"CUDA error: .*",
    "NCCL error": r"NCCL error.*",
    "watchdog hang": r"watchdog got stuck.*",
}
# GPUs need not add in the same order in every run. A state that is missing makes more of a difference.
CLOSE = {"gloo": 0.0, "nccl": 1e-5}


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
    difference: float  # the largest of a loss from that of the run without fault


def judge(run: Finished, losses: dict[int, float]) -> Outcome:
    """Compare with the losses of a run without fault; errors must come on all ranks that can have one, in time."""
    fault = run.fault
    happened = run.find(fault.rank, "fault")
    errors = {rank: found for rank in range(run.run.ranks) if (found := _error(run, rank))}
    how = ", ".join(f"{n} x {name}" for name, n in Counter(e["type"] for e in errors.values()).most_common())
    seconds = max(e["time"] for e in errors.values()) - happened["time"] if errors and happened else None
    difference = max((abs(losses[s] - x) for found in run.losses for s, x in found.items()), default=0.0)
    if happened is None:
        problem = f"the fault did not happen: {run.log}"
    elif wrong := _wrong_losses(run, losses):
        problem = f"wrong losses on ranks {wrong}"
    elif fault.kind == "delay":
        how = how or "the right losses"
        problem = run.problem
    else:
        problem = _not_detected(run, errors, seconds)
    if run.left:
        problem += f" {run.left} processes did not end"
    texts = {rank: f"{e['type']}: {e['text']}" for rank, e in errors.items()}
    return Outcome(fault, not problem, how, seconds, run.left, problem, texts, difference)


def _error(run: Finished, rank: int) -> dict | None:
    """What the rank raised, or what ended it and when."""
    raised = run.find(rank, "error")
    if raised is not None or run.run.backend != "nccl" or rank not in run.ends or run.exits[rank] == 0:
        return raised
    for name, pattern in ABORTS.items():
        if found := re.search(pattern, run.logs[rank]):
            return {"type": name, "text": found[0], "time": run.ends[rank]}
    return None


def _wrong_losses(run: Finished, losses: dict[int, float]) -> list[int]:
    close = CLOSE[run.run.backend]
    return [
        rank
        for rank, found in enumerate(run.losses)
        if not all(math.isclose(losses[step], x, rel_tol=close) for step, x in found.items())
    ]


def _not_detected(run: Finished, errors: dict[int, dict], seconds: float | None) -> str:
    """Why a fault that must be an error on all ranks is none; empty if it is."""
    fault, most = run.fault, limit(run.fault, run.run)
    gone = {fault.rank} if fault.kind in ("kill", "stop", "exit") else set()
    silent = [rank for rank in range(run.run.ranks) if rank not in errors and rank not in gone]
    if silent:
        return f"ranks {silent} raised nothing (exit codes {run.exits}): {run.log}"
    if seconds is None or seconds > most:
        return f"{seconds} s are more than {most} s"
    if unnamed := [rank for rank, error in errors.items() if rank != fault.rank and not _named(run, rank, error)]:
        return f"the errors of ranks {unnamed} name neither place nor rank {fault.rank}: {run.log}"
    # Over NCCL the watchdog may end a process that is just ending with an error of its own.
    aborts = run.run.backend == "nccl"
    bad = [rank for rank in errors if run.exits[rank] != 1 and (not aborts or run.exits[rank] == 0)]
    return f"ranks {bad} ended with {[run.exits[rank] for rank in bad]}: {run.log}" if bad else ""


# What an error of lasp's says of the place, and the line that follows one of PyTorch's.
PLACE = (
    r"layer ['\"]|token_loss|sync_grads|wrap_\w+:|lasp\.\w+|saving|FSDP2's|the step of the optimizer|key-value store|"
    "check_finite"
)
LINE = r"^lasp: rank \d+ (?:waited|may wait) for another; .*$"


def _named(run: Finished, rank: int, error: dict) -> bool:
    """Whether it is an error of lasp's that names place and rank, or another with lasp's line behind it."""
    fault, run_of = run.fault, run.run
    sp = run_of.ranks // run_of.dp
    same = range(fault.rank // sp * sp, (fault.rank // sp + 1) * sp)  # the ranks of its sequence
    wrong = same if fault.kind in OF_LAYERS else [fault.rank]  # of two that differ nobody can tell which is wrong
    names = "|".join(rf"rank {r}\b|ranks [\d, ]*\b{r}\b" for r in wrong)
    if rank in same:  # there ranks go by their place
        names += "".join(rf"|rank {r % sp}\b" for r in wrong)
    if error["type"] in ("PeerError", "RankMismatchError"):
        return bool(re.search(PLACE, error["text"]) and re.search(names, error["text"]))
    return any(re.search(names, found.split(";", 1)[1]) for found in re.findall(LINE, run.logs[rank], re.M))
