"""One cell of convergence.py or ablations.py: a small language model, trained by one command in processes of its own.

    torchrun --nproc-per-node 2 bench/cells.py CELL.json RESULT.json

These two scripts start that for each of their cells, one after the other, and keep what comes back in one file, which
is written after each cell: the same command goes on where it was stopped. A step is that of examples/train.py, on the
same text. CELL.json holds the fields of `Cell`; RESULT.json what `train` returns.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import environment
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import AdamW
from tqdm import trange

import lasp
from lasp import decay
from lasp.data_parallel.schemes import FSDP2_SCHEMES
from lasp.models import TNL, Decoder, DecoderConfig, LinearTransformer, LinearTransformerConfig, TNLConfig
from lasp.models.lrpe import LRPE
from lasp.models.memory import save_memory
from lasp.models.tnl import SimpleRMSNorm
from lasp.modules import LightningAttention

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from _files import FileError, write
from _needles import NOBODY_ASKS, Task, sequences
from _schedule import learning_rate
from _text import Text, batch_of_step, open_text

RUNS = Path("runs")
WARM = 10  # steps that are not timed, at most: kernels are compiled in them
TEXT, RECALL = "text", "recall"


@dataclass(frozen=True)
class Cell:
    """What is trained, and how it is split.

    Attributes:
        name: of the cell, for progress and for the file of results.
        model: "tnl", "linear" (the linear transformer), "hybrid" (GLA, every fourth layer softmax), "mamba2 of
            transformers", or a family of `lasp.models.Decoder`.
        shape: layers, width, heads, width of the gated unit.
        part: what of TNL is otherwise: a key of `PARTS`.
        scheme: of data parallelism.
        dp, sp: ranks over which sequences are dealt out, and over which each is split.
        task: "text", or "recall": the associative recall of examples/recall.py.
        seq_len, batch: tokens of a sequence, and sequences of a step, of all ranks together.
        keys: of a sequence of recall.
        recompute: every block, in backward.
    """

    name: str
    model: str
    shape: tuple[int, int, int, int]
    seq_len: int
    batch: int
    steps: int
    lr: float
    dtype: str
    seed: int = 0
    part: str = ""
    scheme: str = "ddp"
    dp: int = 1
    sp: int = 1
    task: str = TEXT
    keys: int = 16
    recompute: bool = False
    data: str | None = None


# ---- models


def _lrpe_everywhere(model: TNL) -> None:
    for block in model.blocks:
        heads, channels = model.config.heads, model.config.width // model.config.heads
        block.attention.lrpe = LRPE(heads, channels)  # type: ignore[union-attr]


def _no_temperature(model: TNL) -> None:
    """All layers have the decays of the first."""
    for block in model.blocks:
        block.attention.attention = LightningAttention(  # type: ignore[union-attr]
            decay.schedule(model.config.decay, model.config.heads, 0, model.config.layers)
        )


class Ones(nn.Module):
    """In place of the layer that makes a gate. Its product stays, so a step takes a little longer than it could."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return torch.ones_like(x, dtype=dtype)  # as of the layer


def _no_gate(model: TNL) -> None:
    for block in model.blocks:
        block.attention.gate = Ones()  # type: ignore[union-attr]


def _norm(kind: Callable[[int], nn.Module]) -> Callable[[TNL], None]:
    """Before each layer and before the head; the one behind attention stays."""

    def change(model: TNL) -> None:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, SimpleRMSNorm):
                    setattr(module, name, kind(model.config.width))

    return change


PARTS: dict[str, tuple[dict[str, Any], Callable[[TNL], None]]] = {  # fields of the config, and what is changed after
    "": ({}, lambda model: None),
    "decay only": ({"lrpe": False}, lambda model: None),
    "LRPE only": ({"decay": "none"}, _lrpe_everywhere),
    "LRPE and decay in all layers": ({}, _lrpe_everywhere),
    "no temperature": ({}, _no_temperature),
    "no gate": ({}, _no_gate),
    "RMSNorm with weights": ({}, _norm(lambda width: nn.RMSNorm(width, eps=1e-6))),
    "LayerNorm": ({}, _norm(nn.LayerNorm)),
}


class Mamba2OfTransformers(nn.Module):
    """The library's model, called as those of `lasp.models`. On one rank `parallelize` leaves it as it is."""

    def __init__(self, vocab: int, shape: Sequence[int]):
        from transformers import Mamba2Config, Mamba2ForCausalLM

        super().__init__()
        layers, width, heads, _ = shape
        config = Mamba2Config(
            vocab_size=vocab,
            hidden_size=width,
            num_hidden_layers=layers,
            num_heads=heads,
            head_dim=2 * width // heads,
            state_size=32,
            n_groups=1,
            expand=2,
            chunk_size=32,  # what it computes with neither of its kernels grows with chunk_size * state_size
            use_cache=False,
            tie_word_embeddings=False,
        )
        self.library = Mamba2ForCausalLM(config).train()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.library.backbone.layers

    @property
    def head(self) -> nn.Linear:
        return self.library.lm_head

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, layout: lasp.ShardLayout | None, *, return_hidden: bool
    ) -> Tensor:
        hidden = self.library.backbone(input_ids, use_cache=False, layout=layout).last_hidden_state
        return hidden if return_hidden else self.head(hidden)


FOREIGN = "mamba2 of transformers"


def build(cell: Cell, vocab: int) -> Any:
    """The model, on the default device, before `parallelize`."""
    changes, change = PARTS[cell.part]
    if cell.part and cell.model != "tnl":
        raise ValueError(f"part must be '' for model {cell.model!r}, got {cell.part!r}")
    if cell.model == "tnl":
        model = TNL(TNLConfig(vocab, *cell.shape, **{"decay": "tnl", **changes}))
        change(model)
        return model
    if cell.model == "linear":
        return LinearTransformer(LinearTransformerConfig(vocab, *cell.shape))
    if cell.model == FOREIGN:
        return Mamba2OfTransformers(vocab, cell.shape)
    family, pattern = ("gla", "LLLS") if cell.model == "hybrid" else (cell.model, "L")
    return Decoder(DecoderConfig(family, vocab, *cell.shape, pattern=pattern, tpe=family == "cosformer2"))


def flops_of_token(cell: Cell, model: nn.Module) -> float:
    """Forward and backward: what linear layers compute, and softmax's scores.

    What a linear layer of attention computes beside its weights, less than a tenth of it, is left out.
    """
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name)
    layers, width = cell.shape[:2]
    softmax = {"softmax": layers, "hybrid": layers // 4}.get(cell.model, 0)
    return 6.0 * (weights + softmax * width * cell.seq_len)  # a token sees half of its sequence, in two products


# ---- batches


def batch_of(cell: Cell, text: Text, mesh: DeviceMesh, step: int, device: torch.device) -> dict[str, Any]:
    """This rank's slice of the batch of a step: the same batch for every split."""
    if cell.task == TEXT:
        ids = batch_of_step(text, mesh, seed=cell.seed, step=step, batch=cell.batch, seq_len=cell.seq_len)
        return lasp.shard_batch({"input_ids": ids.to(device)}, mesh)
    dp, dp_rank = mesh["dp_shard"].size(), mesh["dp_shard"].get_local_rank()
    rows = range(dp_rank * cell.batch // dp, (dp_rank + 1) * cell.batch // dp)
    drawn = [_recall(cell, np.random.default_rng([cell.seed, step, row])) for row in rows]
    ids, labels = (torch.cat(part).to(device) for part in zip(*drawn))
    return lasp.shard_batch({"input_ids": ids, "labels": labels}, mesh, shift_labels=False)


def _recall(cell: Cell, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A sequence, and the answers where something is asked, both [1, T]."""
    task = task_of(cell)
    drawn = sequences(task, rng, 1, cell.seq_len, cell.seq_len // 4)
    labels, asked = torch.full_like(drawn.ids, -100), drawn.questions != NOBODY_ASKS
    labels[asked] = task.keys + drawn.answers[drawn.questions[asked]]
    return drawn.ids, labels


def task_of(cell: Cell) -> Task:
    return Task(keys=cell.keys, values=16)


# ---- training


def train(cell: Cell, last: int) -> dict[str, Any]:
    """Train it on all ranks of this run; call it on each. The same on every rank:

    the loss of every step ("losses"), "seconds" from a step behind the first few to the end, "tokens/s" of them, of all
    ranks, "peak GiB" of the rank that holds most (None on a CPU), "parameters", "FLOP of a token", and for recall the
    share of questions of the `last` steps that were answered right, before the step ("accuracy"): each batch is new.
    """
    env = lasp.init()
    if env.world_size != cell.dp * cell.sp:
        raise ValueError(f"cell {cell.name!r} is of {cell.dp} x {cell.sp} ranks, and there are {env.world_size}")
    mesh = lasp.init_mesh(dp_shard=cell.dp, sp=cell.sp)
    text = open_text(None if cell.data is None else Path(cell.data))
    vocab = text.vocab if cell.task == TEXT else task_of(cell).vocabulary
    torch.manual_seed(cell.seed)
    with env.device:
        plain = build(cell, vocab)
    facts = {"parameters": sum(p.numel() for p in plain.parameters()), "FLOP of a token": flops_of_token(cell, plain)}
    lasp.parallelize(getattr(plain, "library", plain), mesh["sp"])
    if cell.recompute:
        save_memory(plain.blocks, recompute=len(plain.blocks))
    adamw = functools.partial(AdamW, lr=cell.lr, betas=(0.9, 0.95), fused=env.device.type == "cuda")
    sharded = cell.scheme in FSDP2_SCHEMES
    more: dict[str, Any] = {}
    if sharded:
        bf16 = torch.bfloat16 if cell.dtype == "bfloat16" else None
        more = {"mp_policy": MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)}
    model, optimizer = lasp.data_parallel(plain, mesh, scheme=cell.scheme, optimizer=adamw, blocks=plain.blocks, **more)
    autocast = functools.partial(
        torch.autocast, env.device.type, torch.bfloat16, enabled=cell.dtype == "bfloat16" and not sharded
    )
    losses, right = torch.zeros(cell.steps, device=env.device), torch.zeros(2, device=env.device)
    warm = min(WARM, cell.steps // 2)
    for step in trange(cell.steps, desc=cell.name, unit="step", disable=env.rank != 0, dynamic_ncols=True):
        if step == warm:
            start = _now(env.device)
        local = batch_of(cell, text, mesh, step, env.device)
        optimizer.zero_grad()
        with autocast():
            hidden = model(local["input_ids"], local["position_ids"], local["layout"], return_hidden=True)
            loss, _ = lasp.linear_token_loss(hidden, plain.head.weight, local["labels"], mesh=mesh)
            if cell.task == RECALL and step >= cell.steps - last:
                right += _right(hidden, plain.head.weight, local["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate("cosine", cell.lr, step, cell.steps)
        optimizer.step()
        losses[step] = loss.detach()
    seconds = _now(env.device) - start
    if not losses.isfinite().all():  # the same on every rank
        raise FloatingPointError(
            f"{cell.name}: the loss of step {int((~losses.isfinite()).nonzero()[0])} is not finite"
        )
    facts |= {"losses": losses.tolist(), **_measured(cell, seconds, cell.steps - warm, env.device)}
    if cell.task == RECALL:
        dist.all_reduce(right)
        facts["accuracy"] = (right[0] / right[1]).item()
    return facts


@torch.no_grad()
def _right(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """How many questions of this rank were answered right, and how many there are."""
    asked = labels != -100
    answers = (hidden[asked].to(weight.dtype) @ weight.T).argmax(-1)
    return torch.stack([(answers == labels[asked]).sum(), asked.sum()]).float()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _measured(cell: Cell, seconds: float, steps: int, device: torch.device) -> dict[str, Any]:
    """Of the slowest rank, and of that which holds most."""
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    worst = torch.tensor([seconds, peak], dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    seconds, peak = worst.tolist()
    tokens = steps * cell.batch * cell.seq_len
    return {"seconds": seconds, "tokens/s": tokens / seconds, "peak GiB": peak or None}


# ---- one cell after the other


class Refused(ValueError):
    """The file of results is of other options."""


def train_all(
    cells: Iterable[Cell], kept: Path, *, same: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Train each cell that `kept` does not have yet, and write its result there; all results by name of the cell.

    A cell that fails is told and left out, and the others are trained; run again, and it is tried again. Several runs
    of one machine may share the file, each on GPUs of its own (CUDA_VISIBLE_DEVICES): a cell is trained by one of them.

    Args:
        cells: to be trained.
        kept: JSON: {"options": .., "cells": {name: result}}.
        same: what results hang on; a file of others is refused.
        options: with those of `add_arguments`.
    """
    cells, same = list(cells), json.loads(json.dumps(same))
    kept.parent.mkdir(parents=True, exist_ok=True)
    begun, known = time.monotonic(), _read(kept, same)
    for number, cell in enumerate(cells):
        with _only_here(kept, cell.name.replace(os.sep, "-"), wait=False) as claimed:
            known = _read(kept, same)
            if cell.name in known["cells"] or not claimed:
                continue
            if options.budget and time.monotonic() - begun > options.budget:
                print(f"--budget: {cell.name} and what follows are left for the next run", file=sys.stderr, flush=True)
                break
            print(f"[{number + 1}/{len(cells)}] {cell.name}", file=sys.stderr, flush=True)
            start, about = time.monotonic(), environment()
            result = launch(cell, options)
            if result is None:
                print(f"[{number + 1}/{len(cells)}] {cell.name} FAILED: see above", file=sys.stderr, flush=True)
                continue
            result |= {"commit": options.commit or about["commit"], "device": about["device"], "torch": about["torch"]}
            result["seconds with start"] = time.monotonic() - start
            with _only_here(kept, "file", wait=True):
                known = _read(kept, same)
                known["cells"][cell.name] = result
                write(kept, json.dumps(known) + "\n")
            final = mean_of_last(result["losses"], options.last)
            print(f"    loss {final:.4f}, {result['tokens/s']:,.0f} tokens/s", file=sys.stderr, flush=True)
    return {cell.name: known["cells"][cell.name] for cell in cells if cell.name in known["cells"]}


def _read(kept: Path, same: dict[str, Any]) -> dict[str, Any]:
    """What is kept so far; `Refused` if it is of other options, or something else."""
    try:
        known = json.loads(kept.read_text()) if kept.exists() else {"options": same, "cells": {}}
        if not isinstance(known, dict) or not all(isinstance(known.get(name), dict) for name in ("options", "cells")):
            raise ValueError("no options and cells in it")
    except (OSError, ValueError) as error:
        raise Refused(f"{kept} is not what a run kept ({error}); give another --kept, or delete it") from error
    if differ := sorted(k for k in {*same, *known["options"]} if same.get(k) != known["options"].get(k)):
        found = "; ".join(f"{k}: {known['options'].get(k)} there, {same.get(k)} now" for k in differ)
        raise Refused(f"{kept} has results of other options ({found}); give another --kept, or delete it")
    return known


@contextlib.contextmanager
def _only_here(kept: Path, what: str, *, wait: bool) -> Iterator[bool]:
    """Whether no other run of this machine is at it; a run that dies lets go."""
    with kept.with_name(f".{kept.name}.{what}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def launch(cell: Cell, options: argparse.Namespace) -> dict[str, Any] | None:
    """Train a cell in fresh processes; None if that fails."""
    ranks = cell.dp * cell.sp
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    start = (
        [*shlex.split(options.launch), sys.executable] if options.launch else [*torchrun, f"--nproc-per-node={ranks}"]
    )
    environ = dict(os.environ)
    if not torch.cuda.is_available():  # the ranks share the cores
        environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    RUNS.mkdir(exist_ok=True)  # where all hosts find it
    with tempfile.TemporaryDirectory(dir=RUNS, prefix="cell-") as folder:
        given, found = Path(folder, "cell.json"), Path(folder, "result.json")
        given.write_text(json.dumps({"cell": asdict(cell), "last": options.last}))
        done = subprocess.run([*start, __file__, str(given), str(found)], env=environ)
        if done.returncode or not found.exists():
            return None
        return json.loads(found.read_text())


def main(argv: list[str] | None = None) -> None:
    given, found = sys.argv[1:] if argv is None else argv
    spec = json.loads(Path(given).read_text())
    spec["cell"]["shape"] = tuple(spec["cell"]["shape"])
    result = train(Cell(**spec["cell"]), spec["last"])
    if dist.get_rank() == 0:
        write(Path(found), json.dumps(result))
    dist.destroy_process_group()


# ---- what the two scripts share


def add_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Of a training, and of how cells are started; `defaults` are those of a script."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--ranks", type=int, default=torch.cuda.device_count() or 2, help="processes of a cell; default: GPUs, or 2")
    add("--seq-len", type=int, default=16384, help="tokens of a sequence")
    add("--steps", type=int, default=1000)
    add("--last", type=int, default=50, help="the loss of a cell is the mean of so many last steps")
    add("--lr", type=float, default=1e-3, help="the highest")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32", help="of the arithmetic")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--data", type=Path, help="text, or prepare.py's tokens; default: Python's own sources, as bytes")
    add("--recompute", action="store_true", help="every block in backward")
    add("--kept", type=Path, help="the file of results, which a next run goes on with; default: in runs/")
    add("--budget", type=float, default=0.0, help="begin no cell after so many seconds; 0: begin all")
    add("--launch", default="", help='what starts the ranks, such as "srun --ntasks 64"; default: torchrun')
    parser.set_defaults(**defaults)


def text_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Text:
    """What is trained on; ends the script if it cannot be read, or if options do not fit together."""
    for name in ("ranks", "seq_len", "steps", "last"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    try:
        return open_text(options.data)
    except (OSError, FileError) as error:
        parser.error(f"--data: {options.data} cannot be read: {error}")


def same_of(options: argparse.Namespace, text: Text, *names: str) -> dict[str, Any]:
    """Options, and the text, that results hang on."""
    names = ("ranks", "seq_len", "steps", "last", "lr", "dtype", "seed", "recompute", *names)
    return {**{name: getattr(options, name) for name in names}, "text": text.digest}


def given_of(options: argparse.Namespace) -> dict[str, Any]:
    """Of these, the fields of every `Cell`."""
    names = ("seq_len", "steps", "lr", "dtype", "seed", "recompute")
    data = None if options.data is None else str(options.data.resolve())
    return {**{name: getattr(options, name) for name in names}, "data": data}


def mean_of_last(losses: list[float], last: int) -> float:
    """The loss that a cell ends with."""
    end = losses[-last:]
    return sum(end) / len(end)


def curves(results: dict[str, dict[str, Any]], points: int = 10) -> list[dict]:
    """A row a cell: the mean of the losses up to each of some steps, since the one before."""
    rows = []
    for name, result in results.items():
        losses = result["losses"]
        ends = [len(losses) * (n + 1) // points for n in range(points)] if len(losses) >= points else [len(losses)]
        means = {str(end): float(np.mean(losses[begin:end])) for begin, end in zip([0, *ends], ends)}
        rows.append({"cell": name, **{step: round(mean, 4) for step, mean in means.items()}})
    return rows


def facts_of(results: dict[str, dict[str, Any]], options: argparse.Namespace, text: Text) -> dict[str, Any]:
    """What is true of all cells: what they were trained on, and where."""
    of = list(results.values())
    return {
        "text": f"{'sources of Python, bytes' if options.data is None else options.data}, SHA-256 {text.digest[:16]}",
        "entropy of its unigrams": text.entropy,
        "steps": options.steps,
        "tokens of a sequence": options.seq_len,
        "arithmetic": options.dtype,
        "commits": sorted({r["commit"] for r in of}),
        "devices": sorted({r["device"] for r in of}),
        "PyTorch": sorted({r["torch"] for r in of}),
        "seconds of a cell with its start, at most": max(r["seconds with start"] for r in of),
    }


def benchmark(name: str, ranks: int) -> str:
    return f"{name}_{ranks}x{'cuda' if torch.cuda.is_available() else 'cpu'}"


if __name__ == "__main__":
    main()
