"""Steps a second and losses of DDP, LocalSGD and CO2 over a slow network; torchft's DiLoCo too, where it is installed.

    python bench/co2.py --save

Two replicas on CPUs, each in a network namespace of its own (Linux, iproute2, root); the cable between them lets pass
1 Gbit/s, then 80 Mbit/s (a token bucket, `tc tbf`, on both ends). All take the same tokens from the same weights with
the same inner optimizer. "network MB/s" is measured by a plain all-reduce on that cable, and the simulation of these
runs gets it, and the time of a step without any network: nothing else. Beside it the simulation says what 16 nodes
would do at 80 and 800 Gbit/s, with step times that are assumed.

Each forward also sleeps for --pause seconds, as where a device computes and the host does not: of two busy cores a step
alone would be mostly noise. Times are medians over rounds, of which each scheme has some, then the next has, and so on.
CO2's overlap is traced by the clock: when the all-reduce begins, when it has come to its end, which local steps end in
between, and how long the end of a round waits.

torchft's DiLoCo is run with its own code and one fragment; its Manager, which needs a lighthouse, is replaced by one
that averages over the process group and always commits.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from common import add_report_arguments, command_line, report
from simulator import Link, Machine, Work, training_seconds
from torch import nn

import lasp
from lasp.data_parallel import wrap_ddp
from lasp.models import TNL, TNLConfig

sys.path.append(str(Path(__file__).parent.parent / "examples"))  # whose text this trains on
from _text import Text, batch_of_step, open_text

NETWORKS = {"1 Gbit/s": "1gbit", "80 Mbit/s": "80mbit"}
ADDRESSES = ("10.78.0.1", "10.78.0.2")
RANKS, SEQ_LEN, BATCH, LR = 2, 64, 8, 3e-3
CONFIG = TNLConfig(vocab_size=256, layers=4, width=128, heads=4, glu_width=384)
ROUNDS = 4  # of a turn
HELD_OUT = 200_000  # bytes at the end of the text
SCHEMES = (
    "alone",
    "DDP",
    "LocalSGD",
    "CO2",
    "CO2, momentum 0",
    "CO2, momentum 0.9",
    "DiLoCo (torchft), delay 1",
    "DiLoCo (torchft), delay all but 1",
)
# Of the simulation: replicas are nodes of 8 GPUs, and each sends the model once.
NODES = 16
MODELS = {"1B": 1e9, "7B": 7e9}  # parameters, which travel in fp32
TOKENS, FLOPS = 8 * 8192, 8 * 312e12 * 0.4  # of a node: tokens a step; A100s at 40% of their peak in bf16
FASTER = {"80 Gbit/s": 10e9, "800 Gbit/s": 100e9}  # bytes a second


# ---- what a rank runs


class Trace:
    """When the asynchronous all-reduces of floating-point numbers began and ended, and when local steps did."""

    def __init__(self):
        self.sent: list[list[float]] = []
        self.steps: list[tuple[float, float]] = []
        self.waited: list[float] = []  # seconds, at ends of rounds
        self._real = dist.all_reduce

    def __enter__(self):
        dist.all_reduce = self._all_reduce
        return self

    def __exit__(self, *_):
        dist.all_reduce = self._real

    def _all_reduce(self, x, *args, **options):
        work = self._real(x, *args, **options)
        if options.get("async_op") and x.is_floating_point():
            self.sent.append([time.monotonic()])
            threading.Thread(target=self._watch, args=(work, self.sent[-1]), daemon=True).start()
        return work

    @staticmethod
    def _watch(work, times):
        while not work.is_completed():
            time.sleep(0.001)
        times.append(time.monotonic())


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same on every rank."""
    torch.manual_seed(0)
    model = TNL(CONFIG)
    return model, torch.optim.AdamW(model.parameters(), lr=LR)


def step_of(model, optimizer, text: Text, mesh, over, step: int, pause: float) -> None:
    """One step on this rank's rows; the loss is the mean over the ranks of `over`."""
    ids = batch_of_step(text, mesh, seed=0, step=step, batch=BATCH, seq_len=SEQ_LEN)
    local = lasp.shard_batch({"input_ids": ids}, None)
    optimizer.zero_grad()
    time.sleep(pause)
    loss, _ = lasp.token_loss(model(local["input_ids"], local["position_ids"]), local["labels"], mesh=over)
    loss.backward()
    optimizer.step()


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Text) -> float:
    """In nats, the same sequences for all."""
    losses = []
    for step in range(8):
        ids = batch_of_step(text, None, seed=1, step=step, batch=BATCH, seq_len=SEQ_LEN)
        local = lasp.shard_batch({"input_ids": ids}, None)
        logits = model(local["input_ids"], local["position_ids"])
        losses.append(lasp.token_loss(logits, local["labels"], mesh=None)[0])
    return torch.stack(losses).mean().item()


def average(model: nn.Module) -> None:
    """LocalSGD's: of the parameters, while all wait."""
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    dist.all_reduce(flat)
    nn.utils.vector_to_parameters(flat / RANKS, model.parameters())


class GroupManager:
    """What torchft's DiLoCo asks of its Manager, over a process group that never changes."""

    _use_async_quorum = False

    def __init__(self):
        self.rounds = 0

    def register_state_dict_fn(self, *_):
        """Nothing recovers here."""

    def start_quorum(self):
        """All ranks are always there."""

    allow_state_dict_read = disallow_state_dict_read = start_quorum

    def current_step(self):
        return self.rounds

    def should_commit(self):
        self.rounds += 1
        return True

    def allreduce(self, x, should_quantize=False):
        work = dist.all_reduce(x, async_op=True)
        assert work is not None

        class Average:
            def wait(self):
                work.wait()
                x.div_(RANKS)

        return Average()


def diloco(model, optimizer, every: int, delay: int, stack: ExitStack) -> None:
    """torchft's, as its examples set it; local and global weights are mixed in equal parts if steps are left out."""
    from torchft.local_sgd import DiLoCo

    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    mix = 0.0 if delay == 1 else 0.5
    options = {"sync_every": every, "fragment_sync_delay": delay, "fragment_update_alpha": mix}
    stack.enter_context(DiLoCo(GroupManager(), [model], optimizer, outer, **options))  # type: ignore[arg-type]


class Replica:
    """A model under one of the schemes."""

    def __init__(self, scheme: str, mesh, every: int, stack: ExitStack):
        self.model, self.optimizer = build()
        self.wrapped, self.over, self.every, self.local = self.model, None, every, scheme == "LocalSGD"
        self.co2: lasp.CO2 | None = None
        if scheme == "DDP":
            self.wrapped, self.over = wrap_ddp(self.model, mesh, validate="off"), mesh
        elif scheme.startswith("CO2"):
            momentum = float(scheme.split()[-1]) if "momentum" in scheme else 0.5
            self.co2 = lasp.CO2(self.model, self.optimizer, mesh, sync_every=every, outer_momentum=momentum)
        elif scheme.startswith("DiLoCo"):
            diloco(self.model, self.optimizer, every, 1 if scheme.endswith("delay 1") else every - 1, stack)

    def after(self, step: int) -> bool:
        """What follows a local step; whether it was the end of a round of CO2."""
        if self.local and (step + 1) % self.every == 0:
            average(self.model)
        return self.co2 is not None and self.co2.step()


class Runs:
    """The schemes in turn, some rounds of each at a time, so that what else the machine does meets all alike."""

    def __init__(self, options, mesh, text: Text, stack: ExitStack):
        self.every, self.mesh, self.text, self.pause = options.sync_every, mesh, text, options.pause
        self.replicas = {name: Replica(name, mesh, options.sync_every, stack) for name in options.schemes}
        self.traces = {name: Trace() for name in options.schemes}
        self.seconds: dict[str, list[float]] = {name: [] for name in options.schemes}  # of rounds

    def run(self, scheme: str, rounds: range) -> None:
        """The first of the rounds is not timed: what came before may still be on its way."""
        replica, trace = self.replicas[scheme], self.traces[scheme]
        with trace:
            for number in rounds:
                if number == rounds[0] + 1:
                    dist.barrier()
                began = time.monotonic()
                for step in range(number * self.every, (number + 1) * self.every):
                    start = time.monotonic()
                    step_of(replica.wrapped, replica.optimizer, self.text, self.mesh, replica.over, step, self.pause)
                    trace.steps.append((start, time.monotonic()))
                    if replica.after(step):
                        trace.waited.append(time.monotonic() - trace.steps[-1][1])
                if number > rounds[0]:
                    self.seconds[scheme].append(time.monotonic() - began)

    def found(self, scheme: str, unseen: Text) -> dict:
        """Seconds a step in the median of the rounds, and the loss in the end."""
        replica = self.replicas[scheme]
        if replica.co2 is not None:
            replica.co2.finish()
        seconds = statistics.median(self.seconds[scheme]) / self.every
        return {
            "seconds": seconds,
            "loss": held_out_loss(replica.model, unseen),
            **traced(self.traces[scheme], self.every),
        }


def traced(trace: Trace, every: int) -> dict:
    """Of CO2's all-reduces: how long they travel, how many local steps end meanwhile, what the end of a round waits."""
    flights = [times for times in trace.sent if len(times) == 2]
    flights = [times for number, times in enumerate(flights) if number % ROUNDS in range(1, ROUNDS - 1)]  # of one turn
    if not trace.waited or not flights:
        return {}
    inside = [sum(begin < end < arrived for _, end in trace.steps) for begin, arrived in flights]
    steps = [end - begin for begin, end in trace.steps[every:]]
    return {
        "in flight": statistics.median(b - a for a, b in flights),
        "steps meanwhile": statistics.median(inside),
        "waited": statistics.median(x for number, x in enumerate(trace.waited) if number % ROUNDS > 1),
        "local step": statistics.median(steps),
        "one round": [
            *({"event": "all-reduce begins", "s": flights[-1][0]}, {"event": "all-reduce ends", "s": flights[-1][1]}),
            *(
                {"event": "local step ends", "s": end}
                for _, end in trace.steps
                if flights[-1][0] < end < flights[-1][1] + 0.2
            ),
        ],
    }


def bandwidth(nbytes: int) -> float:
    """Bytes a second that each of two ranks sends in an all-reduce of so many bytes, the best of some."""
    x = torch.zeros(nbytes // 4)
    seconds = []
    for _ in range(4):
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(x)
        seconds.append(time.monotonic() - began)
    return nbytes / min(seconds)  # the ring of two sends half of it twice


def worker(options) -> None:
    """A rank."""
    torch.set_num_threads(1)
    env = lasp.init("gloo", timeout=300)
    mesh = lasp.init_mesh(dp_replicate=RANKS)
    whole = open_text(None)
    text, unseen = Text(whole.ids[:-HELD_OUT]), Text(whole.ids[-HELD_OUT:])
    nbytes = 4 * sum(p.numel() for p in build()[0].parameters())
    found = {"bytes": nbytes, "bandwidth": bandwidth(nbytes), "schemes": {}}
    with ExitStack() as stack:
        runs = Runs(options, mesh, text, stack)
        for turn in range(options.turns):
            for scheme in options.schemes:
                runs.run(scheme, range(turn * ROUNDS, (turn + 1) * ROUNDS))
                if env.rank == 0:
                    seconds = statistics.median(runs.seconds[scheme]) / options.sync_every
                    print(f"turn {turn}, {scheme}: {seconds:.3f} s a step", file=sys.stderr, flush=True)
    for scheme in options.schemes:
        found["schemes"][scheme] = runs.found(scheme, unseen)
    if env.rank == 0:
        Path(options.worker).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# ---- the network


def ip(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()} (needs Linux, iproute2 and root)")


@contextmanager
def two_hosts(rate: str) -> Iterator[list[str]]:
    """Network namespaces that a cable of this rate joins."""
    names = [f"co2{os.getpid()}{side}" for side in "ab"]
    cables = [f"c{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("ip", "netns", "add", name)
        ip("ip", "link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES):
            ip("ip", "link", "set", cable, "netns", name)
            ip("ip", "-n", name, "addr", "add", f"{address}/24", "dev", cable)
            ip("ip", "-n", name, "link", "set", cable, "up")
            ip("ip", "-n", name, "link", "set", "lo", "up")
            bucket = ["rate", rate, "burst", "256kb", "latency", "200ms"]
            ip("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", cable, "root", "tbf", *bucket)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def measure(rate: str, schemes: list[str], options) -> dict:
    """What rank 0 found on a cable of this rate."""
    with two_hosts(rate) as names, tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        command = [sys.executable, __file__, "--worker", str(out), "--turns", str(options.turns)]
        command += ["--sync-every", str(options.sync_every), "--pause", str(options.pause)]
        command += ["--schemes", *schemes]
        ranks = []
        for rank, name in enumerate(names):
            variables = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": ADDRESSES[0]}
            env = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
            ranks.append(subprocess.Popen(["ip", "netns", "exec", name, *command], env=env))
        try:
            codes = [process.wait() for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        return json.loads(out.read_text())


# ---- the simulation


def work_of(scheme: str, step: float, every: int, rounds: int) -> list[Work]:
    """Of so many rounds; DDP's all-reduce goes on beside its backward, two thirds of a step."""
    if scheme == "DDP":
        parts = [[Work(step / 3, starts=k), Work(2 * step / 3, waits=k)] for k in range(rounds * every)]
        return [part for parts_of_step in parts for part in parts_of_step]
    # Steps before the end of a round at which what is consumed at the end of this, or of the next round, is sent.
    delay = {"DiLoCo (torchft), delay 1": 1, "DiLoCo (torchft), delay all but 1": every - 1}.get(scheme, 0)
    late = scheme.startswith("CO2")
    work = []
    for k in range(1, rounds * every + 1):
        starts = (k + delay) // every - 1 if (k + delay) % every == 0 and scheme != "alone" else None
        waits = k // every - 1 - late if k % every == 0 and scheme != "alone" else None
        starts = None if starts is not None and starts >= rounds else starts
        work.append(Work(step, starts, None if waits is not None and waits < 0 else waits))
    return work


def simulated(scheme: str, ranks: int, nbytes: float, bytes_per_second: float, step: float, every: int) -> float:
    """Seconds a step; the mean of eight rounds after the first."""
    link = Link(0.0, bytes_per_second)
    machine = Machine(link, link)
    first, all_ = (training_seconds(work_of(scheme, step, every, rounds), ranks, nbytes, machine) for rounds in (1, 9))
    return (all_ - first) / (8 * every)


def at_scale(every: int) -> list[dict]:
    """Nodes on networks that this machine has not got."""
    rows = []
    for network, bytes_per_second in FASTER.items():
        for name, parameters in MODELS.items():
            step = 6 * parameters * TOKENS / FLOPS
            for scheme in ("DDP", "LocalSGD", "CO2"):
                seconds = simulated(scheme, NODES, 4 * parameters, bytes_per_second, step, every)
                row = {"network": network, "model": name, "nodes": NODES, "scheme": scheme}
                row |= {"s a step": round(seconds, 4), "tokens/s": round(NODES * TOKENS / seconds)}
                rows.append(row | {"% of no network": round(100 * step / seconds, 1)})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2, help=f"of {ROUNDS} rounds for each scheme, one after the other")
    parser.add_argument("--sync-every", type=int, default=16, help="local steps of a round")
    parser.add_argument("--pause", type=float, default=0.15, help="seconds that each forward also sleeps")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # where a rank writes what it found
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    if options.worker:
        worker(options)
        return
    schemes = [x for x in options.schemes if "torchft" not in x or importlib.util.find_spec("torchft")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that namespaces and ranks go as after an error
    rows, facts, traces = [], {}, {}
    for network, rate in NETWORKS.items():
        again = [x for x in schemes if not (rows and "momentum" in x)]  # whose losses are known, and times those of CO2
        found = measure(rate, again, options)
        alone = found["schemes"]["alone"]["seconds"] if "alone" in found["schemes"] else None
        facts[f"parameters, {network}"] = f"{found['bytes'] / 4e6:.2f}M, {found['bytes'] / 1e6:.2f} MB in fp32"
        facts[f"network, {network}"] = f"{found['bandwidth'] / 1e6:.1f} MB/s in a plain all-reduce"
        for scheme, x in found["schemes"].items():
            row = {"network": network, "scheme": scheme, "steps/s": round(1 / x["seconds"], 3)}
            row["simulated steps/s"] = None
            if alone is not None:
                sim = simulated(scheme, RANKS, found["bytes"], found["bandwidth"], alone, options.sync_every)
                row["simulated steps/s"] = round(1 / sim, 3)
            rows.append(row | {"held-out loss": None if scheme == "alone" else round(x["loss"], 4)})
            if scheme == "CO2" and "in flight" in x:
                facts[f"overlap, {network}"] = (
                    f"medians: the all-reduce travels {1e3 * x['in flight']:.0f} ms, {x['steps meanwhile']:.0f} local "
                    f"steps of {1e3 * x['local step']:.0f} ms end meanwhile, and the end of a round takes "
                    f"{1e3 * x['waited']:.1f} ms"
                )
                begin = x["one round"][0]["s"]
                events = sorted(x["one round"], key=lambda event: event["s"])
                traces[f"one round of CO2, {network}"] = [
                    {"ms": round(1e3 * (event["s"] - begin), 1), "event": event["event"]} for event in events
                ]
    facts["of a step"] = f"{options.pause} s asleep, in the forward, beside the computation"
    facts["steps of each"] = options.turns * ROUNDS * options.sync_every
    facts["left out"] = [x for x in options.schemes if x not in schemes]
    facts["assumed at scale"] = (
        f"{NODES} nodes of 8 A100 at 40% of 312 TFLOP/s, {TOKENS} tokens a node and step, parameters and gradients "
        "travel in fp32, each node sends the model once, no latency"
    )
    report(
        "co2",
        command_line("co2.py", argv),
        rows,
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        tables={"simulated at scale": at_scale(48), **traces},
        facts=facts,
        markdown=True,
    )


if __name__ == "__main__":
    main()
