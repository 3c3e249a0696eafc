"""The processes of one run: start them, see when each ends, and leave none behind."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import torch.distributed as dist
from faults.program import COMPARED, START, Fault, Run, run_rank
from processes import free_port

MISMATCH = 5.0  # seconds after which ranks that differ must know it
# Seconds that a rank may need beside what it waits for: several runs share the cores, and GPUs, and what the watchdog
# aborts ends only when its GPU is given back.
MARGIN = {"gloo": 3.0, "nccl": 8.0}
GRACE = 10.0  # seconds after `limit` until those that still run are killed


@dataclass
class Finished:
    """What the ranks of one run left."""

    fault: Fault
    run: Run
    events: list[list[dict]] = field(default_factory=list)  # by rank
    logs: list[str] = field(default_factory=list)  # by rank
    exits: list[int | None] = field(default_factory=list)  # by rank
    ends: dict[int, float] = field(default_factory=dict)  # when each rank ended, of those that did so by themselves
    left: int = 0  # processes that did not, but for the stopped one

    @property
    def losses(self) -> list[dict[int, float]]:
        return [{e["step"]: e["value"] for e in events if e["event"] == "loss"} for events in self.events]

    @property
    def log(self) -> str:
        return "\n".join(self.logs)

    def find(self, rank: int, name: str) -> dict | None:
        return _find(self.events[rank], name)

    @property
    def problem(self) -> str:
        """Of a run that should end well."""
        for rank, code in enumerate(self.exits):
            if self.find(rank, "done") is None or code != 0:
                return f"rank {rank} did not end well (exit code {code}): {self.find(rank, 'error') or self.log}"
        return ""


def run_with(
    context, fault: Fault, ranks: int, backend: str, timeout: float, devices: str = "", dp: int = 1
) -> Finished:
    """Start a run in which this happens, and wait until all its processes have ended."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # the launcher's, if it is to hold it
    port = store.port if fault.store == "launcher" else free_port()
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        run = Run(ranks, port, Path(folder), backend, timeout, devices, dp)
        processes = [context.Process(target=run_rank, args=(rank, run, fault), daemon=True) for rank in range(ranks)]
        finished = Finished(fault, run)
        waited_for = [rank for rank in range(ranks) if (fault.kind, fault.rank) != ("stop", rank)]
        try:
            for process in processes:
                process.start()
            finished.ends = _watch({processes[rank].sentinel: rank for rank in waited_for}, run, fault)
        finally:
            for process in processes:
                _end(process)
        finished.left = len(waited_for) - len(finished.ends)
        finished.exits = [process.exitcode for process in processes]
        finished.events = [_events(run.folder, rank) for rank in range(ranks)]
        finished.logs = [_text(run.folder / f"{rank}.log") for rank in range(ranks)]
    return finished


def limit(fault: Fault, run: Run) -> float:
    """Seconds from a fault to the last rank's error.

    A rank that is silent is noticed after the timeout by those that wait for it, and these by others, since they end.
    """
    if fault.kind in COMPARED and run.dp == 1:
        return MISMATCH
    return run.timeout + MARGIN[run.backend]


def _watch(running: dict[int, int], run: Run, fault: Fault) -> dict[int, float]:
    """When each of the ranks ended; `running` has them by the sentinels of their processes."""
    running, ends = dict(running), {}
    deadline, happened = time.monotonic() + START + run.timeout, None
    while running and time.monotonic() < deadline:
        for sentinel in wait(list(running), 0.1):
            ends[running.pop(sentinel)] = time.monotonic()
        if happened is None and (happened := _find(_events(run.folder, fault.rank), "fault")):
            deadline = happened["time"] + limit(fault, run) + GRACE
    return ends


def _end(process) -> None:
    """Kill it, and whatever it has started; also if it is stopped."""
    if process.pid is None:  # it was not started: another one could not be
        return
    process.kill()
    with suppress(ProcessLookupError, PermissionError):  # no such group: it has ended, or has not yet made its own
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _find(events: list[dict], name: str) -> dict | None:
    return next((event for event in events if event["event"] == name), None)


def _events(folder: Path, rank: int) -> list[dict]:
    return [json.loads(line) for line in _text(folder / f"{rank}.jsonl").splitlines()]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
