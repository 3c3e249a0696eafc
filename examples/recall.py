"""Is the state used? Associative recall over distances that no segment and no rank holds.

    python examples/recall.py                          # all GPUs, or 2 CPU processes where there are none
    python examples/recall.py --length 1048576 --segment 65536 --tokens 65536 --width 128 --keys 64 --dtype bfloat16

A small linear-attention model learns to tell the value of a key that it saw up to --length tokens ago, first in short
sequences, then in longer ones. Every sequence is split over the ranks (`lasp.parallelize`) and streamed in segments
(`lasp.stream_backward`): a pair reaches its question only through the states and last tokens that lasp carries over the
borders between ranks and between segments. So there are two controls: the same weights where each rank goes over its
slice alone, and where each segment is gone over alone. Beyond a slice and a segment both can only guess. With
--train-controls they are trained as well, on the same batches with the same cuts.

It prints accuracy by distance, and leaves recall.json and recall.png in --out. The task is described in _needles.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import _recall_report
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from _files import FileError, NotWritten, on_all_ranks, on_rank_0
from _launch import new_folder, refuse, refuse_beyond_memory, relaunch, started_by_a_launcher
from _needles import NOBODY_ASKS, Sequences, Task, sequences
from _recall_report import Answers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

import lasp
from lasp.modules import LightningAttention

LEARNED = 0.1  # nats: with such a loss of its last steps a length is learned, and the next one follows
LAST = 5
TRAINING, TEST = 0, 1  # what sequences are drawn for
WHOLE, RANKS, SEGMENTS = "split and streamed", "each rank alone", "each segment alone"


@dataclass(frozen=True)
class Options:
    """The command line; `main` explains each."""

    length: int
    test_length: int
    segment: int
    keys: int
    values: int
    width: int
    layers: int
    tokens: int
    steps: int
    last_steps: int
    lr: float
    tests: int
    questions: int
    dtype: str
    seed: int
    train_controls: bool
    out: Path | None
    ranks: int | None

    @property
    def task(self) -> Task:
        """What is asked."""
        return Task(self.keys, self.values)


def main(
    length: Annotated[int, typer.Option(min=2, help="Tokens of the longest sequences of the training.")] = 65536,
    test_length: Annotated[int | None, typer.Option(min=2, help="Tokens of the tests; default: --length.")] = None,
    segment: Annotated[int, typer.Option(min=1, help="Tokens of a segment, of all ranks together.")] = 8192,
    keys: Annotated[int, typer.Option(min=2, help="Pairs of a sequence.")] = 32,
    values: Annotated[int, typer.Option(min=2, help="Values that a key may have; chance is one of them.")] = 16,
    width: Annotated[int, typer.Option(min=1, help="Channels of a token; a layer's state holds as many squared.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Of a step, in sequences shorter than that.")] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Of each length, at most.")] = 300,
    last_steps: Annotated[int, typer.Option(min=1, help="With a falling learning rate, at the end.")] = 20,
    lr: Annotated[float, typer.Option(min=1e-9, max=1.0, help="Learning rate.")] = 3e-3,
    tests: Annotated[int, typer.Option(min=1, help="Sequences of the test.")] = 4,
    questions: Annotated[int, typer.Option(min=1, help="Of a sequence, at most.")] = 1024,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the arithmetic.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the weights and the sequences.")] = 0,
    train_controls: Annotated[bool, typer.Option("--train-controls", help="Also train with each cut.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for results; default: a new one in runs/.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes to start; default: GPUs, or 2.")] = None,
) -> None:
    """Train a model to recall what lies far back, and test it with the state and without."""
    arguments = {**locals(), "test_length": length if test_length is None else test_length}
    options = Options(**{name: arguments[name] for name in Options.__dataclass_fields__})
    if not started_by_a_launcher():
        ranks = options.ranks or torch.cuda.device_count() or 2
        check(options, ranks)
        if ranks > 1:
            relaunch(__file__, ranks)
    try:
        run(options)
    except (FileError, NotWritten, FloatingPointError) as error:  # which say what is wrong, and are on every rank
        print(f"\nrank {dist.get_rank()}: the run ends here: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from None


def check(options: Options, ranks: int) -> None:
    """Refuse options that do not fit together."""
    if options.length < options.task.shortest:
        refuse("--length", f"{options.length} tokens are less than {options.task.shortest}, 8 for each of --keys")
    if options.test_length < options.length:
        refuse("--test-length", f"{options.test_length} tokens are less than --length {options.length}")
    if options.segment >= options.test_length or options.segment % ranks:
        wanted = f"a multiple of {ranks} ranks, and less than the {options.test_length} tokens of a test"
        refuse("--segment", f"{options.segment} is not {wanted}")
    check_memory(options)


def check_memory(options: Options) -> None:
    """Refuse a model, or sequences, of which not even a part fits: the weights, and the tokens and questions."""
    layer = 4 * 8 * options.width**2  # matrices of a `Layer`
    refuse_beyond_memory("--width", f"the weights of {options.width} channels", layer)
    refuse_beyond_memory("--layers", f"the weights of {options.layers} layers", layer * options.layers)
    refuse_beyond_memory("--values", f"the weights of {options.values} values", 8 * options.width * options.values)
    for option, tokens in (("--length", options.length), ("--test-length", options.test_length)):
        refuse_beyond_memory(option, f"{tokens} tokens", 16 * tokens, on_host=True)
    refuse_beyond_memory("--questions", f"{options.questions} questions", 8 * 8 * options.questions, on_host=True)
    if options.tokens >= options.task.shortest:
        refuse_beyond_memory("--tokens", f"{options.tokens} tokens", 8 * options.tokens, on_host=True)


# ---- the model


@lasp.register
class ShortConvolution(nn.Module):
    """Each channel of a token with those of the two before it."""

    sequence = None  # lasp.parallelize sets it

    def __init__(self, channels: int, width: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width).normal_(std=width**-0.5))

    def forward(self, x: Tensor, layout: lasp.ShardLayout | None = None) -> Tensor:
        """x [B, T, C] to the same shape and dtype."""
        return lasp.causal_conv(x, self.weight, layout=layout, sequence=self.sequence)


class Layer(nn.Module):
    """Linear attention of one head without decay, and a feed-forward part.

    The convolution lets a value be written under the key before it. The gate decides if a token writes at all: a
    million of them do not, and what each left in the state would add up. relu makes that exactly nothing.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width + 1)
        self.convolution = ShortConvolution(3 * width + 1)
        self.attention = LightningAttention()
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, layout: lasp.ShardLayout | None = None) -> Tensor:
        """x [B, T, D] to the same shape."""
        y = self.convolution(self.project(self.norm(x)), layout)
        q, k, v, gate = y.split([self.width] * 3 + [1], -1)
        k = F.silu(k) * F.relu(gate + 1)  # at first every token writes
        o = self.attention(*(z.unsqueeze(2) for z in (F.silu(q), k, v)), layout=layout).squeeze(2)
        x = x + self.out(F.rms_norm(o, o.shape[-1:], eps=1e-5))
        return x + self.mlp(x)


class Recaller(nn.Module):
    """Tells of each token which value would answer it, [B, T, values]."""

    def __init__(self, task: Task, width: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(task.vocabulary, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, task.values)

    def forward(self, input_ids: Tensor, layout: lasp.ShardLayout | None = None) -> Tensor:
        """input_ids [B, T] of this rank to logits."""
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, layout)
        return self.head(self.norm(x))


def build(options: Options, device: torch.device) -> Recaller:
    """The model, with the same weights on every rank."""
    torch.manual_seed(options.seed)
    with device:
        return Recaller(options.task, options.width, options.layers)


# ---- over a sequence with the state, or without


@dataclass(frozen=True)
class Way:
    """How a sequence is gone over: whole, or cut into pieces none of which knows of the others.

    Attributes:
        name: for the report.
        model: given to `lasp.parallelize`.
        mesh: the ranks of a piece; None: each piece belongs to one rank.
        rank: this one.
        cuts: the borders of the pieces of a sequence of so many tokens, from 0 to all.
    """

    name: str
    model: nn.Module
    mesh: DeviceMesh | None
    rank: int
    cuts: Callable[[int], list[int]]

    def pieces(self, length: int) -> list[tuple[int, int]]:
        """Those that this rank goes over, alone or with the others."""
        cuts = self.cuts(length)
        found = list(zip(cuts, cuts[1:]))
        return found if self.mesh is not None else [found[self.rank]]

    def sees(self, batch: Sequences) -> np.ndarray:
        """[Q]: whether question and answer are in one piece."""
        cuts = self.cuts(batch.ids.shape[1])
        return np.searchsorted(cuts, batch.asked, "right") == np.searchsorted(cuts, batch.told, "right")


def way_of(name: str, options: Options, env: lasp.Env, mesh: DeviceMesh) -> Way:
    """One of the three, with a model of its own."""
    model, size = build(options, env.device), env.world_size
    if name == RANKS:
        lasp.parallelize(model, None)
        return Way(name, model, None, env.rank, lambda length: [length * r // size for r in range(size + 1)])
    lasp.parallelize(model, mesh["sp"])
    if name == WHOLE:
        return Way(name, model, mesh, env.rank, lambda length: [0, length])
    return Way(name, model, mesh, env.rank, lambda length: [*range(0, length, options.segment), length])


def go_over(options: Options, way: Way, batch: Sequences, env: lasp.Env) -> tuple[float, Tensor]:
    """Leave the gradients of the mean loss of all questions; that loss, and which this rank has answered right."""
    answers = batch.answers.to(env.device)
    right = torch.zeros(len(answers), dtype=torch.bool, device=env.device)

    def loss_of(logits: Tensor, numbers: Tensor) -> tuple[Tensor, int]:
        asked = numbers != NOBODY_ASKS
        chosen, numbers = logits[asked].float(), numbers[asked]
        right[numbers] = chosen.detach().argmax(-1) == answers[numbers]
        return F.cross_entropy(chosen, answers[numbers], reduction="sum"), len(numbers)

    together = way.mesh is not None
    segment = options.segment if together else options.segment // env.world_size  # as many tokens on a rank
    loss = 0.0
    for begin, end in way.pieces(batch.ids.shape[1]):
        part = {"input_ids": batch.ids[:, begin:end], "labels": batch.questions[:, begin:end]}
        share = int((part["labels"] != NOBODY_ASKS).sum()) / len(answers)
        mean, _ = lasp.stream_backward(
            way.model,
            part,
            mesh=way.mesh,
            segment=segment,
            loss_fn=loss_of,
            loss_scale=share if together else share * env.world_size,  # gradients are averaged over the ranks
            shift_labels=False,
            ignore_index=NOBODY_ASKS,
        )
        loss += mean.item() * share
    return loss if together else sum(on_all_ranks("the loss of a step", lambda: loss)), right


# ---- training and test


def lengths_of(options: Options) -> list[int]:
    """Of the training, from the shortest to --length, each four times as long as the one before."""
    found = [options.task.shortest]
    while found[-1] * 4 <= options.length:
        found.append(found[-1] * 4)
    return found if found[-1] == options.length else [*found, options.length]


def train(options: Options, way: Way, env: lasp.Env, mesh: DeviceMesh, plan: list[int] | None = None) -> list[dict]:
    """Train until each length is learned, or for --steps; its steps. A `plan` says the length of each step instead."""
    optimizer = AdamW(way.model.parameters(), lr=options.lr, weight_decay=0.0)
    done: list[dict] = []
    bar = tqdm(desc=way.name, unit="step", disable=env.rank != 0, dynamic_ncols=True)

    def step(length: int, factor: float) -> None:
        loss = train_step(options, way, optimizer, env, mesh, len(done), length, factor)
        done.append({"step": len(done), "length": length, "loss": loss})
        bar.set_postfix_str(f"sequences of {length:,}, loss {loss:.3f}")
        bar.update()

    if plan is None:
        for length in lengths_of(options):
            recent: list[float] = []
            while len(recent) < options.steps and not (len(recent) >= LAST and np.mean(recent[-LAST:]) < LEARNED):
                step(length, 1.0)
                recent.append(done[-1]["loss"])
    else:
        for length in plan[: -options.last_steps]:
            step(length, 1.0)
    for number in range(options.last_steps):
        step(options.length, 1 - number / options.last_steps)
    bar.close()
    return done


def train_step(
    options: Options,
    way: Way,
    optimizer: Optimizer,
    env: lasp.Env,
    mesh: DeviceMesh,
    step: int,
    length: int,
    factor: float,
) -> float:
    """One step; the loss before it."""
    count = max(1, options.tokens // length)
    rng = np.random.default_rng([options.seed, TRAINING, step])
    batch = sequences(options.task, rng, count, length, min(length // 4, options.questions))
    optimizer.zero_grad()
    with arithmetic(options, env):
        loss, _ = go_over(options, way, batch, env)
    if not np.isfinite(loss):  # the same on every rank
        raise FloatingPointError(f"the loss of step {step} is {loss}")
    lasp.sync_grads(way.model, mesh)
    nn.utils.clip_grad_norm_(way.model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = options.lr * factor * min(1.0, (step + 1) / 20)
    optimizer.step()
    return loss


def examine(options: Options, way: Way, env: lasp.Env, *, trained: bool = False) -> Answers:
    """Ask about sequences that no training has seen; the same answers on every rank."""
    found = Answers(way.name, trained)
    with arithmetic(options, env):
        for number in range(options.tests):
            rng = np.random.default_rng([options.seed, TEST, number])
            batch = sequences(options.task, rng, 1, options.test_length, options.questions)
            _, right = go_over(options, way, batch, env)
            way.model.zero_grad()
            of_ranks = on_all_ranks("the answers", lambda right=right: right.int().tolist())
            found.add(batch.distances, np.any(of_ranks, axis=0), way.sees(batch))
    return found


def arithmetic(options: Options, env: lasp.Env) -> Any:
    """Autocast, if it is asked for."""
    return torch.autocast(env.device.type, torch.bfloat16) if options.dtype == "bfloat16" else nullcontext()


def run(options: Options) -> None:
    """The whole run of one rank."""
    began = time.perf_counter()
    env = lasp.init()
    on_all_ranks("looking at the options", lambda: check(options, env.world_size))
    mesh = lasp.init_mesh(dp_shard=1, sp=-1)
    folder = options.out or Path(on_rank_0("naming the folder for results", lambda: new_folder("recall")))
    folder.mkdir(parents=True, exist_ok=True)

    whole = way_of(WHOLE, options, env, mesh)
    history = {WHOLE: train(options, whole, env, mesh)}
    answers = [examine(options, whole, env)]
    plan = [step["length"] for step in history[WHOLE]]
    for name in (RANKS, SEGMENTS) if env.world_size > 1 else (SEGMENTS,):
        control = way_of(name, options, env, mesh)
        if options.train_controls:
            trained = way_of(name, options, env, mesh)
            history[name] = train(options, trained, env, mesh, plan)
            answers.append(examine(options, trained, env, trained=True))
        control.model.load_state_dict(whole.model.state_dict())
        answers.append(examine(options, control, env))

    seconds = time.perf_counter() - began
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    on_rank_0(
        "writing recall.json and recall.png",
        lambda: _recall_report.write_results(
            folder, answers, options=shown, history=history, env=env, seconds=seconds, chance=1 / options.values
        ),
    )
    dist.destroy_process_group()


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)  # plain tracebacks: every rank may print one
app.command()(main)

if __name__ == "__main__":
    app()
