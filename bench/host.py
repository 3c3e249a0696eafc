"""What a call of an operator costs the host, and how much of the library it passes through; no GPU is needed.

    python bench/host.py                           # this checkout
    python bench/host.py --against ../lasp-before  # and another, in turn: 20 runs of each
    python bench/host.py --device cuda             # on a GPU, where the kernels are started, one rank
    python bench/host.py --count                   # functions and files that a layer's forward passes through

A call at 8,192 tokens takes a GPU 0.08 ms, so that the host must not take longer. What it does is the same for any
number of tokens, and is timed here at 512 (layers: 64), the least of 60 calls in processor time of the calling thread,
without the wait for other ranks. Paths: "triton" is that of a GPU up to the start of each kernel, which is left out,
like the look at the values of decays, which a GPU is spared. "reference" is that of a CPU, with its arithmetic.
On a GPU it is the clock on the wall until the call returns, from an idle device, so that no queue is full.

"aten" is how many operations of PyTorch a call has, allocations and views included, "launches" how many kernels of ours
it starts, each forward and backward. The rest of a layer (linear layers, convolutions, norms) is PyTorch's on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from common import add_report_arguments, command_line, report
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
TOKENS, HEADS, DIM = 512, 4, 64
CALLS, WARM = 60, 20
FORMS = ("none", "head", "token", "channel")  # of a decay; the last two are learned
LAYERS = ("retnet", "gla", "hgrn2", "mamba2", "delta_net", "gated_delta_net", "kda")
LAYER_TOKENS, LAYER_WIDTH, LAYER_HEADS = 64, 64, 2
CASES = ("operators", "layers", "reference")
TIMES = ("forward us", "backward us")
Case = tuple[Callable[[], Tensor], list[Tensor]]  # a call, and what of it has a gradient


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--runs", type=int, default=20, help="of each checkout, in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2, help="the most; on a GPU there is one")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--worker", choices=("times", "count"), help=argparse.SUPPRESS)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    if options.worker:
        print(json.dumps(worker(options.worker, options)))
        return
    checkouts = [ROOT] if options.against is None else [ROOT, options.against.resolve()]
    if options.count:
        for checkout in checkouts:
            for path, found in run(checkout, "count", options).items():
                print(f"{checkout.name}, {path}: {found}")
        return
    report(
        "host", command_line("host.py", argv), rows(measure(checkouts, options)),
        save=options.save, out=options.out, markdown=True, commit=options.commit, html=options.html,
    )  # fmt: skip


def measure(checkouts: list[Path], options: argparse.Namespace) -> list[list[list[dict]]]:
    """The rows of each checkout in each run. The checkouts take turns, so that a drift meets both."""
    found: list[list[list[dict]]] = [[] for _ in checkouts]
    for number in range(options.runs):
        for checkout, of_checkout in zip(checkouts, found):
            of_checkout.append(run(checkout, "times", options))
        print(f"run {number + 1} of {options.runs}", file=sys.stderr)
    return found


def rows(found: list[list[list[dict]]]) -> list[dict]:
    """Medians of the runs with the middle half of them; of a second checkout those before, and what is left of them."""
    table = []
    for cases in zip(*(zip(*runs) for runs in found)):  # of each checkout all runs of one case
        row = {key: value for key, value in cases[0][0].items() if key not in TIMES}
        for name in TIMES:
            columns = [[of_run[name] for of_run in runs] for runs in cases]
            row[name] = statistics.median(columns[0])
            row[f"{name}, middle half"] = " to ".join(f"{x:.0f}" for x in quartiles(columns[0]))
            if len(columns) > 1:
                row[f"{name} before"] = statistics.median(columns[1])
                row[f"{name} % of before"] = 100 * row[name] / row[f"{name} before"]
        if len(cases) > 1:
            row |= {f"{name} before": cases[1][0][name] for name in ("aten", "launches")}
        table.append(row)
    return table


def quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    return [values[0], values[0]] if len(values) < 2 else statistics.quantiles(values, n=4)[::2]


def run(checkout: Path, what: str, options: argparse.Namespace):
    """The answer of the last rank."""
    path, ranks = os.pathsep.join(map(str, (checkout, checkout / "kernels"))), options.ranks
    if options.device == "cuda":
        ranks = 1
    shared = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", what, "--device", options.device, "--ranks", str(ranks)]
    command += ["--cases", *options.cases]
    of_ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
    workers = [subprocess.Popen(command, env=shared | rank, stdout=subprocess.PIPE, text=True) for rank in of_ranks]
    answers = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a worker of {checkout} ended with {[worker.returncode for worker in workers]}")
    return json.loads(answers[-1].splitlines()[-1])


def worker(what: str, options: argparse.Namespace) -> list[dict] | dict[str, dict]:
    """One rank."""
    import lasp

    torch.set_num_threads(1)
    device, cases = options.device, options.cases
    paths = PATHS if device == "cpu" else PATHS[:1]
    if options.ranks == 1 and what == "times":
        return [row for path in paths for row in times(1, None, path, device, cases)]
    env = lasp.init("gloo")
    both = lasp.SequenceParallel(lasp.init_mesh(sp=env.world_size)["sp"], exchange="ring")
    if what == "count":
        return {path: count_functions(operators(both, path, "cpu")["linear_attention", "head"][0]) for path in PATHS}
    ranks = ((1, None), (env.world_size, both))
    return [row for path in PATHS for size, sequence in ranks for row in times(size, sequence, path, device, cases)]


PATHS = ("triton", "reference")  # as LASP_KERNELS calls them


def times(ranks: int, sequence, path: str, device: str, cases, calls: int = CALLS, warm: int = WARM) -> list[dict]:
    """A row of each case on this path."""
    here: dict[tuple[str, str], Case] = {}
    if path == "reference":  # whose arithmetic takes long
        wanted = operators(sequence, path, device) if "reference" in cases else {}
        here = {name: case for name, case in wanted.items() if name[0] == "linear_attention"}
    elif "operators" in cases:
        here = operators(sequence, path, device)
    if path == "triton" and sequence is None and "layers" in cases:
        here |= layers(device)
    left_out = path == "triton" and device == "cpu"
    found = []
    for (operator, decay), case in here.items():
        with mock.patch.dict(os.environ, {"LASP_KERNELS": path}), without_kernels() if left_out else as_it_is():
            forward, backward = time_of(case, device, calls, warm)
            counted = counts(case)
        row = {"operator": operator, "decay": decay, "path": path, "ranks": ranks}
        found.append({**row, "forward us": forward, "backward us": backward, **counted})
    return found


as_it_is = contextlib.nullcontext


def operators(sequence, path: str, device: str) -> dict[tuple[str, str], Case]:
    """By operator and decay."""
    import lasp

    dtype = torch.bfloat16 if path == "triton" else torch.float32
    q, k, v = (_leaf(torch.randn(1, TOKENS, HEADS, DIM), device, dtype) for _ in range(3))
    beta = _leaf(torch.rand(1, TOKENS, HEADS), device, dtype)
    decays = {
        "none": None,
        "head": lasp.decay.fixed(lasp.decay.alibi(HEADS, 0, 2), device),
        "token": _leaf(-torch.rand(1, TOKENS, HEADS), device),
        "channel": _leaf(-torch.rand(1, TOKENS, HEADS, DIM), device),
    }

    def options(form: str) -> dict:
        layout = None if sequence is None else lasp.ShardLayout((TOKENS,) * sequence.size)
        return {"log_decay": decays[form], "sequence": sequence, "layout": layout}

    def leaves(form: str, *tensors: Tensor) -> list[Tensor]:
        return [*tensors, *([decays[form]] if form in ("token", "channel") else [])]

    def attention(form: str) -> Case:
        return lambda: lasp.linear_attention(q, k, v, **options(form))[0], leaves(form, q, k, v)

    def delta(form: str) -> Case:
        return lambda: lasp.delta_rule(q, k, v, beta, **options(form))[0], leaves(form, q, k, v, beta)

    return {("linear_attention", form): attention(form) for form in FORMS} | {
        ("delta_rule", form): delta(form) for form in FORMS if form != "head"
    }


def layers(device: str) -> dict[tuple[str, str], Case]:
    """The layers of families, by name."""
    from lasp.models.mixers import MIXERS

    x = _leaf(torch.randn(1, LAYER_TOKENS, LAYER_WIDTH), device, torch.bfloat16)
    positions = torch.arange(LAYER_TOKENS, device=device)

    def of(name: str) -> Case:
        layer = MIXERS[name](LAYER_WIDTH, LAYER_HEADS).to(device, torch.bfloat16)
        return lambda: layer(x, positions), [x, *layer.parameters()]

    return {(f"layer {name}", "its own"): of(name) for name in LAYERS}


def _leaf(x: Tensor, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return x.to(device, dtype).requires_grad_()


def time_of(case: Case, device: str, calls: int, warm: int) -> tuple[float, float]:
    """Microseconds of forward, and of backward: the least, since other programs take time and caches away."""
    call, leaves = case
    clock = time.thread_time if device == "cpu" else time.perf_counter
    found: list[tuple[float, float]] = []
    for _ in range(warm + calls):
        begin = _idle(device, clock)
        o = call()
        forward, do = clock() - begin, o.detach()
        begin = _idle(device, clock)
        torch.autograd.grad(o, leaves, do)
        found.append((forward, clock() - begin))
    return tuple(min(column) * 1e6 for column in zip(*found[warm:]))  # type: ignore[return-value]


def _idle(device: str, clock: Callable[[], float]) -> float:
    """The time at which the device has nothing to do."""
    if device == "cuda":
        torch.cuda.synchronize()
    return clock()


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Plan and prepare each start of a kernel, and do not start it; nor look at the values of decays."""
    from lasp_kernels import operands
    from lasp_kernels.launch import Launch

    looks = mock.patch.object(operands, "check_decays", _nothing, create=True)  # which other checkouts may not have
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launch, "__call__", _nothing))
        stack.enter_context(looks)
        if importlib.util.find_spec("lasp_kernels.paths"):  # else a CPU is refused, which cannot run them
            stack.enter_context(mock.patch("lasp_kernels.paths.interpreted", return_value=True))
        yield


def _nothing(*_: object) -> None:
    """In place of what is left out."""


def counts(case: Case) -> dict[str, list[int]]:
    """Operations of PyTorch and starts of our kernels, [forward, backward]."""
    from lasp_kernels.launch import Launch

    call, leaves = case
    launches, start = [0], Launch.__call__

    def counted(launch, *tensors) -> None:
        launches[0] += 1
        start(launch, *tensors)

    with mock.patch.object(Launch, "__call__", counted):
        with _Operations() as forward:
            o = call()
        before, do = launches[0], o.detach()
        with _Operations() as backward:
            torch.autograd.grad(o, leaves, do)
    return {"aten": [forward.count, backward.count], "launches": [before, launches[0] - before]}


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_functions(call: Callable[[], Tensor]) -> dict[str, object]:
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


if __name__ == "__main__":
    main()
