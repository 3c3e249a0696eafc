"""Training steps of TransNormerLLM on one rank and on many: tokens/s of a GPU, memory, and what the exchange costs.

    torchrun --nproc-per-node 2 bench/scaling.py --model 1B --tokens 16384 32768 65536 131072 [--save]
    torchrun --nproc-per-node 8 bench/scaling.py --model 1B --mesh 1x8 2x4 4x2   # dp x sp
    torchrun --nproc-per-node 2 bench/scaling.py --model 1B --mesh 1x1x2 --tokens 16384    # dp x sp x tp
    torchrun --nproc-per-node 2 bench/scaling.py --model 7B --mesh 1x1x2 1x2 2x1 --only --tokens 8192 16384
    torchrun --nproc-per-node 8 bench/scaling.py --model 1B --strong 1048576     # one sequence, more and more ranks
    torchrun --nproc-per-node 2 bench/scaling.py --model 1B --longest            # the longest sequence that fits
    torchrun --nproc-per-node 2 bench/scaling.py --model 1B --schemes --mesh 1x2 2x1 --tokens 16384   # and CO2

FSDP2 (--parallel: another scheme), bf16 parameters in the arithmetic, blocks recomputed in backward (--recompute: some
of them), AdamW. A layout of fewer ranks than there are runs on all of them at once, in copies that share nothing; so
one rank is measured in the same run, on the same GPUs. A model that one GPU cannot hold: --only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import plots
import torch
import torch.distributed as dist
from common import add_report_arguments, command_line, report
from intervals import Interval, length, union
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lasp
from lasp.data_parallel.schemes import FSDP2_SCHEMES, SCHEMES
from lasp.exchange import cost
from lasp.models import TNL, TNLConfig
from lasp.models.memory import save_memory
from lasp.models.tnl import SIZES
from lasp.ranks import MESH_AXES, SCHEDULES

WARM = 12  # steps before a graph is captured; DDP asks for 11
CO2 = "co2"  # `lasp.CO2` with zero3 in each replica
GATE_TOKENS, GATE_LIMIT = 128, 1e-2  # relative difference of the losses from those of one rank


@dataclass(frozen=True)
class Layout:
    """dp sequences, each over sp ranks, their weights each over tp, in as many copies as there is room for."""

    dp: int
    sp: int
    tp: int = 1

    @property
    def ranks(self) -> int:
        return self.dp * self.sp * self.tp

    def __str__(self) -> str:
        return f"{self.dp}x{self.sp}" + (f"x{self.tp}" if self.tp > 1 else "")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From "dp x sp" or "dp x sp x tp", such as 2x4 or 1x1x2."""
        try:
            dp, sp, *tp = (int(part) for part in text.split("x"))
            return cls(dp, sp, *tp)
        except (ValueError, TypeError):
            raise argparse.ArgumentTypeError(f"expected dp x sp or dp x sp x tp such as 2x4, got {text!r}") from None


@functools.lru_cache
def mesh_of(layout: Layout, device_type: str, *, hybrid: bool = False) -> DeviceMesh:
    """The ranks of this rank's copy of a layout, with the axes of `lasp.init_mesh`; `hybrid`: dp is dp_replicate."""
    dp = (layout.dp, 1) if hybrid else (1, layout.dp)
    copies = torch.arange(dist.get_world_size()).view(-1, *dp, layout.sp, layout.tp)
    return DeviceMesh(device_type, copies, mesh_dim_names=("copy", *MESH_AXES))[MESH_AXES]


class Training:
    """A model on this rank's copy of a layout, and its steps. `exchange` None cuts the ranks' sequences apart."""

    def __init__(self, options: argparse.Namespace, layout: Layout, device: torch.device, exchange: str | None):
        self.layout, self.device, self.exchange = layout, device, exchange
        apart = options.parallel == CO2  # replicas average their weights once a round
        whole = mesh_of(layout, device.type, hybrid=apart or options.parallel == "hsdp")
        self.mesh = lasp.replica_mesh(whole) if apart else whole
        self.place = whole["dp_replicate"].get_local_rank() + whole["dp_shard"].get_local_rank()  # one of them is 0
        torch.manual_seed(0)
        changes = {"vocab_size": options.vocab, "layers": options.layers}
        changes = {name: value for name, value in changes.items() if value is not None}
        self.config = TNLConfig.named(options.model, decay=options.decay, lrpe=options.lrpe, **changes)
        with device:
            model = TNL(self.config)
        if exchange is not None:
            lasp.parallelize(model, self.mesh["sp"], exchange=exchange)
        lasp.tensor_parallel(model, self.mesh["tp"])
        free()
        recomputed = len(model.blocks) if options.recompute is None else options.recompute
        if options.compile:
            for block in model.blocks:
                block.compile()
        save_memory(model.blocks, recompute=recomputed, chunk=options.chunk, offload=options.offload)
        gpu, more = device.type == "cuda", {}
        scheme = "zero3" if apart else options.parallel
        self.head, self.autocast = model.head, scheme not in FSDP2_SCHEMES
        if not self.autocast:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if gpu else None, reduce_dtype=torch.float32)
            more = {"blocks": model.blocks, "mp_policy": policy}
        adamw = functools.partial(AdamW, lr=1e-4, fused=gpu, capturable=gpu and options.graph)
        with on_the_side(device):  # where a graph will be captured
            self.model, self.optimizer = lasp.data_parallel(model, self.mesh, scheme=scheme, optimizer=adamw, **more)
        self.co2 = lasp.CO2(self.model, self.optimizer, whole, sync_every=options.steps) if apart else None
        self.graph = Graph(self._step) if options.graph else None

    def batch(self, tokens: int) -> dict[str, Tensor]:
        """This rank's part of one random sequence of sp x tokens for each dp rank."""
        return lasp.shard_batch({"input_ids": self.ids(tokens * self.layout.sp)}, self.mesh)

    def ids(self, tokens: int) -> Tensor:
        """The whole sequence of this rank's place in data parallelism."""
        draw = torch.Generator().manual_seed(1 + self.place)
        return torch.randint(self.config.vocab_size, (1, tokens), generator=draw).to(self.device)

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss over all tokens; without a wait for the device."""
        return self._step(batch) if self.graph is None else self.graph.step(batch)

    def _step(self, batch: dict[str, Tensor]) -> Tensor:
        here = batch["input_ids"].shape[1]  # on every rank as many; with the layout lasp knows it
        layout = lasp.ShardLayout((here,) * (self.layout.sp if self.exchange else 1))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=self.graph is None):
            hidden = self.model(batch["input_ids"], batch["position_ids"], layout, return_hidden=True)
            loss, _ = lasp.linear_token_loss(hidden, self.head.weight, batch["labels"], mesh=self.mesh)
        self.optimizer.zero_grad()
        loss.backward()  # the scheme averages over the ranks
        self.optimizer.step()
        if self.co2 is not None:
            self.co2.step()
        return loss.detach()


class Graph:
    """A step as one CUDA graph, always of the same batch: the host only starts it."""

    def __init__(self, step: Callable[[dict[str, Tensor]], Tensor]):
        self._run, self._calls, self._batch = step, 0, None
        self._captured: torch.cuda.CUDAGraph | None = None

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """The first ones, for which DDP and kernels are not ready, without a graph."""
        self._calls += 1
        if self._calls <= WARM:
            with on_the_side(batch["input_ids"].device):
                return self._run(batch)
        if self._captured is None:
            self._captured, self._batch = torch.cuda.CUDAGraph(), batch
            with torch.cuda.graph(self._captured, capture_error_mode="thread_local"):  # NCCL's thread goes on
                self._loss = self._run(batch)
        assert batch is self._batch, "a graph has one batch"
        self._captured.replay()
        return self._loss


@contextlib.contextmanager
def on_the_side(device: torch.device) -> Iterator[None]:
    """On a GPU on another stream, between what comes before and after."""
    if device.type != "cuda":
        yield
        return
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        yield
    here.wait_stream(side)


# ---- one row


def measure(
    options: argparse.Namespace, layout: Layout, tokens: int, device: torch.device, *, compare: bool = True
) -> dict:
    """Steps with the exchange and, to `compare`, without it: the difference is what it costs, whatever hides it."""
    training = Training(options, layout, device, options.exchange)
    batch = training.batch(tokens)
    seconds, peak = steps(training, batch, options)
    peaks = by_rank(peak_gib(device))
    profiled = exposed_milliseconds(training, batch) if device.type == "cuda" else None
    exposures = by_rank(None if profiled is None else sum(profiled.values()))
    del training
    free()
    found = {"layout": str(layout), "ranks": layout.ranks, "tokens a rank": tokens}
    found |= {"sequence": tokens * layout.sp, "step ms": seconds * 1e3, "tokens/s/GPU": tokens / seconds / layout.tp}
    found |= {"peak GiB": peak, "peak GiB by rank": peaks}
    without = None
    if compare and layout.sp > 1:
        apart = Training(options, layout, device, None)
        without, _ = steps(apart, batch, options)
        del apart
        free()
    found["without exchange ms"] = without and without * 1e3
    found["exchange costs ms"] = without and (seconds - without) * 1e3
    found["exposed NCCL ms"] = None if profiled is None else sum(profiled.values())
    found["exposed NCCL ms by rank"] = exposures
    found["by kernel"] = None if profiled is None else ", ".join(f"{k} {v:.3g}" for k, v in profiled.items()) or "none"
    if dist.get_rank() == 0:  # now: a later row may end the run
        print(
            ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()), file=sys.stderr
        )
    return found


def peak_gib(device: torch.device) -> float | None:
    """On this rank, since `steps` began; None on a CPU, of which PyTorch counts none."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def by_rank(mine: float | None) -> list[float] | None:
    """A number of every rank, in their order, on all of them; None if they have none."""
    found: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return None if None in found else found  # type: ignore[return-value]


def mean_over_ranks(loss: Tensor) -> float:
    """Of what the ranks hold: with replicas that train apart each has its own."""
    loss = loss.double()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def steps(
    training: Training,
    batch: dict[str, Tensor],
    options: argparse.Namespace,
    middle: Callable[[list[float]], float] = statistics.median,
) -> tuple[float, float | None]:
    """Median (or `middle`) seconds of a step on the slowest rank, and peak memory in GiB on the fullest.

    Steps follow one another as in training: nothing waits between them, neither for the device nor for other ranks. A
    wait would add to each step the time in which the host queues its first kernels; in training that time passes while
    the device still works on the step before. A step lasts from the end of the one before it to its own end, on the
    stream; the first that counts follows on the last of the warm-up.
    """
    device = training.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    dist.barrier()
    marks = [mark(device)]
    for _ in range(options.warmup + options.steps):
        training.step(batch)
        marks.append(mark(device))
    synchronize(device)
    dist.barrier()
    times = [elapsed(*two) for two in zip(marks[options.warmup :], marks[options.warmup + 1 :])]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    mine = torch.tensor([*times, peak], dtype=torch.float64, device=device)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    *times, peak = mine.tolist()
    return middle(times), peak if device.type == "cuda" else None


def mark(device: torch.device) -> torch.cuda.Event | float:
    """This point in time: on a GPU when its stream comes here, which the host does not wait for."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Seconds between two marks; on a GPU both must be past."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3
    return float(end) - float(begin)  # type: ignore[arg-type]


def exposed_milliseconds(training: Training, batch: dict[str, Tensor]) -> dict[str, float]:
    """Of one step on this rank: time in which NCCL's kernels ran and no other kernel did, by kernel."""
    synchronize(training.device)
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        training.step(batch)
        synchronize(training.device)
    kernels: dict[str, list[Interval]] = {}
    for event in recorded.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:  # a label, no kernel
            kernels.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
    return exposed(kernels)


def exposed(kernels: dict[str, list[Interval]]) -> dict[str, float]:
    """Milliseconds of each NCCL kernel that no other kernel covers; intervals are in microseconds."""
    busy = union(i for name, of in kernels.items() if "nccl" not in name.lower() for i in of)
    found: dict[str, float] = {}
    for name, intervals in kernels.items():
        if "nccl" in name.lower():
            mine = union(intervals)
            covered = length(mine) + length(busy) - length(union([*mine, *busy]))
            short = name.split("(")[0].removeprefix("ncclDevKernel_")
            found[short] = found.get(short, 0.0) + (length(mine) - covered) / 1e3
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- what is measured


def gate(options: argparse.Namespace, layouts: Sequence[Layout], device: torch.device) -> list[dict]:
    """The losses of every layout are those of one rank that has the whole sequence; ends the run if not."""
    rows = []
    for layout in layouts:
        if layout.sp == layout.tp == 1:
            continue
        losses = []  # of two steps: the second tells whether the gradients were right
        for one, tokens in ((layout, GATE_TOKENS), (Layout(layout.dp, 1), GATE_TOKENS * layout.sp)):
            training = Training(options, one, device, options.exchange)
            batch = training.batch(tokens)
            losses.append([training.step(batch).item() for _ in range(2)])
            del training
            free()
        error = max(abs(split - whole) / whole for split, whole in zip(*losses))
        rows.append({"what": f"loss, {layout}", "relative error": float(f"{error:.3g}"), "limit": GATE_LIMIT})
        if not error <= GATE_LIMIT:
            raise SystemExit(f"loss of {layout}: {losses[0]}, of one rank a sequence: {losses[1]}; nothing was timed")
    return rows


def weak(options: argparse.Namespace, layouts: Sequence[Layout], device: torch.device) -> list[dict]:
    """As many tokens on a rank, however many ranks; % of ideal is against one rank."""
    rows = []
    for tokens in options.tokens:
        for layout in layouts:
            rows.append(run_if_it_fits(options, layout, tokens, device, rows))
    one = {row["tokens a rank"]: row["tokens/s/GPU"] for row in rows if row["ranks"] == 1}
    for row in rows:
        alone = one.get(row["tokens a rank"])
        row["% of ideal"] = 100 * row["tokens/s/GPU"] / alone if alone and row["tokens/s/GPU"] else None
    return rows


def strong(options: argparse.Namespace, layouts: Sequence[Layout], device: torch.device) -> list[dict]:
    """One length of sequence, over more and more ranks; % of ideal is against the fewest ranks that it fits."""
    rows: list[dict] = []
    for layout in sorted(layouts, key=lambda layout: -layout.sp):  # the largest shards, which may not fit, come last
        if options.strong % layout.sp:
            raise SystemExit(f"--strong {options.strong} cannot be split over {layout.sp} ranks")
        rows.append(run_if_it_fits(options, layout, options.strong // layout.sp, device, rows))
    rows.sort(key=lambda row: row["ranks"])
    base = next((row["tokens/s/GPU"] for row in rows if row["tokens/s/GPU"]), None)
    for row in rows:
        row["% of ideal"] = 100 * row["tokens/s/GPU"] / base if base and row["tokens/s/GPU"] else None
    return rows


def longest(options: argparse.Namespace, layouts: Sequence[Layout], device: torch.device) -> list[dict]:
    """Memory grows by so much a token: from two lengths follows the longest, and then that length is run."""
    if device.type != "cuda":
        raise SystemExit("--longest needs GPUs: a CPU tells no peak memory")
    rows = []
    for layout in layouts:
        tried = [measure(options, layout, tokens, device, compare=False) for tokens in sorted(options.tokens)[-2:]]
        if len(tried) < 2:
            raise SystemExit("--longest needs two lengths in --tokens")
        tokens = int(fitting_tokens(tried, options.fill * capacity(device)) // 1024 * 1024)
        tried.append(measure(options, layout, tokens, device, compare=False))
        rows += [row | {"% of ideal": None} for row in tried]
    return rows


def schemes(options: argparse.Namespace, layouts: Sequence[Layout], device: torch.device) -> list[dict]:
    """A row for each scheme of data parallelism; ends the run where the losses of two steps are not the first's."""
    rows, expected = [], {}
    wanted = [(layout, tokens) for layout in layouts for tokens in options.tokens]
    for layout, tokens in wanted:
        for scheme in options.schemes or (*SCHEMES, CO2):
            if scheme == "fsdp2" or (scheme in ("hsdp", CO2) and layout.dp == 1):  # is zero3; need copies
                continue
            own = argparse.Namespace(**{**vars(options), "parallel": scheme})
            training = Training(own, layout, device, options.exchange)
            batch = training.batch(tokens)
            losses = [mean_over_ranks(training.step(batch)) for _ in range(1 if scheme == CO2 else 2)]
            known = expected.setdefault((layout, tokens), losses)
            error = max(abs(found - first) / first for found, first in zip(losses, known))
            if not error <= GATE_LIMIT:
                raise SystemExit(f"losses of {scheme}, {layout}: {losses}, of {rows[0]['scheme']}: {known}")
            # Of CO2 the mean over a round, in which weights travel once.
            seconds, peak = steps(training, batch, own, statistics.fmean if scheme == CO2 else statistics.median)
            peaks = by_rank(peak_gib(device))
            counted = options.steps if scheme == CO2 else 1
            with Sent() as sent:
                for _ in range(counted):
                    training.step(batch)
            exposed = exposed_milliseconds(training, batch) if device.type == "cuda" else None
            if training.co2 is not None:
                training.co2.finish()
            del training
            free()
            found = {"scheme": scheme, "layout": str(layout), "tokens a rank": tokens, "step ms": seconds * 1e3}
            found |= {"tokens/s/GPU": tokens / seconds, "peak GiB": peak, "peak GiB by rank": peaks}
            found |= {"sent MiB": sent.total / counted / 2**20}
            found["sent, by collective"] = ", ".join(
                f"{name} {n / counted / 2**20:.4g}" for name, n in sent.bytes.items()
            )
            found["exposed NCCL ms"] = None if exposed is None else sum(exposed.values())
            found["exposed NCCL ms by rank"] = by_rank(found["exposed NCCL ms"])
            found["relative error of losses"] = error
            rows.append(found)
            if dist.get_rank() == 0:
                print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()))
    return rows


class Sent(TorchDispatchMode):
    """Counts what a rank sends in the collectives of a step, as rings send it: of N bytes over n ranks (n - 1) / n * N
    for an all-gather, a reduce-scatter and, in the mean of the ranks, a broadcast; twice that for an all-reduce. States
    of the sequence that go from rank to rank are no collective."""

    _TIMES: ClassVar = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1}

    def __init__(self):
        super().__init__()
        self.bytes: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Of all."""
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("c10d::")
        if name != func._schema.name and name in self._TIMES:
            tensors = [x for x in pytree.tree_leaves(args[:2]) if isinstance(x, Tensor)]
            numbers = max(x.numel() * x.element_size() for x in tensors)  # the whole, and not a part
            group = next(x for x in args if isinstance(x, torch.ScriptObject))
            ranks = ProcessGroup.unbox(group).size()
            sent = self._TIMES[name] * numbers * (ranks - 1) / ranks
            self.bytes[name.strip("_")] = self.bytes.get(name.strip("_"), 0.0) + sent
        return func(*args, **(kwargs or {}))


def fitting_tokens(rows: Sequence[dict], gib: float) -> float:
    """Tokens of a rank at which a straight line through the last two rows' peak memory reaches `gib`."""
    first, second = sorted(rows, key=lambda row: row["tokens a rank"])[-2:]
    slope = (second["peak GiB"] - first["peak GiB"]) / (second["tokens a rank"] - first["tokens a rank"])
    return second["tokens a rank"] + (gib - second["peak GiB"]) / slope


def capacity(device: torch.device) -> float:
    """GiB of the smallest of all GPUs."""
    mine = torch.tensor(torch.cuda.get_device_properties(device).total_memory / 2**30, device=device)
    dist.all_reduce(mine, dist.ReduceOp.MIN)
    return mine.item()


def run_if_it_fits(
    options: argparse.Namespace, layout: Layout, tokens: int, device: torch.device, before: Sequence[dict]
) -> dict:
    """A row; without a run where two shorter ones tell that the memory does not suffice.

    To try and fail would leave the other ranks waiting in a collective.
    """
    alike = [r for r in before if r["layout"] == str(layout) and r.get("peak GiB") and r["tokens a rank"] < tokens]
    if device.type == "cuda" and len(alike) >= 2 and fitting_tokens(alike, 0.97 * capacity(device)) < tokens:
        empty = dict.fromkeys(alike[-1])
        head = {"layout": str(layout), "ranks": layout.ranks, "tokens a rank": tokens, "sequence": tokens * layout.sp}
        return empty | head | {"by kernel": "not run: would not fit the memory"}
    if dist.get_rank() == 0:
        print(f"{layout} (dp x sp x tp), {tokens} tokens a rank of sp", file=sys.stderr, flush=True)
    return measure(options, layout, tokens, device)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `Training` and `steps` read."""
    parser.add_argument("--model", choices=list(SIZES), default="385M")
    parser.add_argument("--vocab", type=int, help="default: the released models' 64000")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--decay", default="alibi")
    parser.add_argument("--no-lrpe", dest="lrpe", action="store_false", help="no rotation in the first layer")
    parser.add_argument("--recompute", type=int, metavar="BLOCKS", help="so many of them in backward; default: all")
    parser.add_argument("--compile", action="store_true", help="each block by torch.compile")
    parser.add_argument("--parallel", choices=SCHEMES, default="fsdp2", help="ddp and zero1: bf16 by autocast")
    parser.add_argument("--graph", action="store_true", help="a step as one CUDA graph; with ddp only")
    parser.add_argument("--chunk", type=int, default=0, help="tokens of a gated linear unit at once; default: all")
    parser.add_argument("--offload", type=int, default=0, metavar="BLOCKS", help="so many of these keep it on the host")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2**n for n in range(14, 18)], help="of a rank")
    parser.add_argument(
        "--mesh", nargs="+", type=Layout.parse, help="dp x sp (x tp); default: 1x1, 1x2, 1x4, ... 1xRANKS"
    )
    parser.add_argument("--only", action="store_true", help="--mesh alone, without a gate and without one rank")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--strong", type=int, metavar="TOKENS", help="one length of sequence over more and more ranks")
    kind.add_argument("--longest", action="store_true", help="the longest sequence that fits")
    kind.add_argument(
        "--schemes", nargs="*", choices=(*SCHEMES, CO2), metavar="SCHEME", help="a row for each of these, or for all"
    )
    parser.add_argument("--fill", type=float, default=0.8, help="--longest: the share of the memory to be used")
    parser.add_argument("--exchange", choices=("auto", *SCHEDULES), default="auto")
    add_model_arguments(parser)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    if options.graph and options.parallel != "ddp":
        raise SystemExit("--graph needs --parallel ddp: FSDP2 frees its weights within a step")
    if options.recompute is not None and options.offload > options.recompute:
        raise SystemExit(f"--offload {options.offload} is more than the blocks of --recompute, {options.recompute}")
    options.warmup = max(options.warmup, WARM + 2) if options.graph else options.warmup
    env = lasp.init()
    if options.parallel in ("ddp", "zero1") and any(layout.tp > 1 for layout in options.mesh or ()):
        raise SystemExit(f"--mesh with tp needs another --parallel than {options.parallel}: DDP averages plain tensors")
    name = "strong" if options.strong else "longest" if options.longest else "weak"
    name = name if options.schemes is None else "schemes"
    layouts = choose_layouts(options.mesh, env.world_size, alone=name == "weak" and not options.only)
    if env.world_size > 1:
        cost.measure(lasp.SequenceParallel(dist.group.WORLD))
    gates = [] if options.only else gate(options, layouts, env.device)
    kinds = {"strong": strong, "longest": longest, "weak": weak, "schemes": schemes}
    rows = kinds[name](options, layouts, env.device)
    if env.rank:
        return
    facts = {"ranks": env.world_size, "backend": env.backend, "model": options.model, "decay": options.decay}
    facts |= {"blocks recomputed": "all" if options.recompute is None else options.recompute}
    facts |= {"chunk of the gated units": options.chunk or "all", "kept on the host": options.offload}
    facts |= {
        "data parallel": "by row" if name == "schemes" else options.parallel,
        "one CUDA graph": options.graph,
        "steps timed": options.steps,
    }
    facts |= {"load of the host (1 minute)": os.getloadavg()[0]}
    kept = report(
        f"scaling_{name}_{options.model}_{env.world_size}x{env.device.type}",
        command_line("scaling.py", argv, env.world_size),
        [{k: four_digits(v) for k, v in row.items()} for row in rows],
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        tables={"gate: losses of two steps against one rank a sequence": gates},
        facts=facts,
        markdown=True,
    )
    if kept and name != "schemes":  # which is a table
        plots.draw(kept)


def four_digits(value):
    """Numbers with so many digits that count, in lists too."""
    if isinstance(value, list):
        return [four_digits(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def choose_layouts(wanted: Sequence[Layout] | None, world: int, *, alone: bool) -> list[Layout]:
    """Those asked for; and `alone`, one rank to compare with."""
    layouts = list(wanted or (Layout(1, sp) for sp in range(1, world + 1) if sp & (sp - 1) == 0 and world % sp == 0))
    for layout in layouts:
        if layout.ranks < 1 or world % layout.ranks:
            raise SystemExit(f"--mesh {layout}: {layout.ranks} ranks do not divide {world}")
    return [Layout(1, 1), *layouts] if alone and Layout(1, 1) not in layouts else layouts


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    dist.destroy_process_group()
