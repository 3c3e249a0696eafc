"""What a call of the operator costs the host, and how much of the library it passes through; no GPU is needed.

    python bench/host.py                           # this checkout
    python bench/host.py --against ../lasp-before  # and another, in turn: 20 runs of each
    python bench/host.py --count                   # functions and files that a layer's forward passes through

A call at 8,192 tokens takes a GPU 0.08 ms, so that the host must not take longer. What it does is the same for any
number of tokens, and is timed here at 512, in processor time of the calling thread, which leaves out the wait for
other ranks. "kernels": the path of a GPU up to the start of each kernel, which is left out. "reference": the path of a
CPU, whose arithmetic is included.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TOKENS, HEADS, DIM = 512, 4, 64
CALLS = 60
FORMS = ("none", "head", "token")
PATHS = {"kernels": "triton", "reference": "reference"}  # and what LASP_KERNELS calls them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--runs", type=int, default=20, help="of each checkout, in turn")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--worker", choices=("times", "count"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    checkouts = [ROOT] if options.against is None else [ROOT, options.against.resolve()]
    if options.count:
        for checkout in checkouts:
            for path, found in run(checkout, "count").items():
                print(f"{checkout.name}, {path}: {found}")
        return
    print_table(measure(checkouts, options.runs))


def measure(checkouts: list[Path], runs: int) -> dict[str, list[list[float]]]:
    """Microseconds by case, of each checkout in each run. The checkouts take turns, so that a drift meets both."""
    found: dict[str, list[list[float]]] = {}
    for number in range(runs):
        for index, checkout in enumerate(checkouts):
            for case, value in run(checkout, "times").items():
                found.setdefault(case, [[] for _ in checkouts])[index].append(value)
        print(f"run {number + 1} of {runs}", file=sys.stderr)
    return found


def run(checkout: Path, what: str) -> dict:
    """The answer of the second of two ranks."""
    path = os.pathsep.join(map(str, (checkout, checkout / "kernels")))
    shared = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", what]
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]
    workers = [subprocess.Popen(command, env=shared | rank, stdout=subprocess.PIPE, text=True) for rank in ranks]
    answers = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a worker of {checkout} ended with {[worker.returncode for worker in workers]}")
    return json.loads(answers[-1].splitlines()[-1])


def worker(what: str) -> None:
    """One rank; prints JSON."""
    import lasp

    torch.set_num_threads(1)
    env = lasp.init("gloo")
    both = lasp.SequenceParallel(lasp.init_mesh(sp=env.world_size)["sp"], exchange="ring")
    answer = {}
    for path, kernels in PATHS.items():
        os.environ["LASP_KERNELS"] = kernels
        dtype = torch.float32
        if path == "kernels":
            leave_out_kernels()
            dtype = torch.bfloat16
        q, k, v = (torch.randn(1, TOKENS, HEADS, DIM, dtype=dtype, requires_grad=True) for _ in range(3))
        decays = {"none": None, "head": lasp.decay.alibi(HEADS, 0, 2), "token": -torch.rand(1, TOKENS, HEADS)}

        def call(form: str, sequence: lasp.SequenceParallel | None) -> torch.Tensor:
            layout = None if sequence is None else lasp.ShardLayout((TOKENS,) * env.world_size)
            options = {"log_decay": decays[form], "sequence": sequence, "layout": layout}  # noqa: B023
            return lasp.linear_attention(q, k, v, **options)[0]  # noqa: B023

        if what == "count":
            answer[path] = count(lambda: call("head", both))
            continue
        for ranks, sequence in ((1, None), (2, both)):
            for form in FORMS:
                forward, backward = times(lambda: call(form, sequence))  # noqa: B023
                name = f"{path}, {ranks} rank{'s' * (ranks > 1)}, {form}"
                answer |= {f"{name}, forward": forward, f"{name}, backward": backward}
    print(json.dumps(answer))


def times(call) -> tuple[float, float]:
    """Medians of processor time, in microseconds: of forward, and of backward."""
    found: list[tuple[float, float]] = []
    for _ in range(CALLS + 20):
        begin = time.thread_time()
        o = call()
        middle = time.thread_time()
        o.backward(o.detach())
        found.append((middle - begin, time.thread_time() - middle))
    return tuple(statistics.median(column) * 1e6 for column in zip(*found[20:]))  # type: ignore[return-value]


def leave_out_kernels() -> None:
    """Plan and prepare each start of a kernel, and do not start it. (The second name is that of older checkouts.)"""
    for module, name in (("lasp_kernels.launch", "Launch"), ("lasp_kernels.triton_steps", "_Launch")):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError:
            continue
        if found is not None:
            found.__call__ = lambda *_: None
            return
    raise SystemExit("this checkout starts its kernels in a place that is not known here")


def count(call) -> dict[str, object]:
    """Functions and files of the library that a forward passes through, after calls that are compared or measured."""
    for _ in range(3):
        call().sum().backward()
    seen: set[tuple[str, str]] = set()

    def hook(frame, event: str, _) -> None:
        name = frame.f_code.co_filename
        if event == "call" and ("/lasp/" in name or "/lasp_kernels/" in name):
            seen.add((name, getattr(frame.f_code, "co_qualname", frame.f_code.co_name)))

    sys.setprofile(hook)
    o = call()
    sys.setprofile(None)
    o.sum().backward()
    return {"functions": len(seen), "files": len({name for name, _ in seen})}


def print_table(found: dict[str, list[list[float]]]) -> None:
    """Medians with the middle half of the runs, and what this checkout takes of the other."""
    print("| host microseconds a call | median (quartiles) | other checkout | of the other |\n|---|---|---|---|")
    for case, columns in found.items():
        cells = [f"{statistics.median(x):.0f} ({' to '.join(f'{y:.0f}' for y in quartiles(x))})" for x in columns]
        ratio = f"{statistics.median(columns[0]) / statistics.median(columns[1]):.0%}" if len(columns) > 1 else ""
        print(f"| {case} | {cells[0]} | {cells[1] if len(cells) > 1 else ''} | {ratio} |")


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    return [values[0], values[0]] if len(values) < 2 else statistics.quantiles(values, n=4)[::2]


if __name__ == "__main__":
    main()
