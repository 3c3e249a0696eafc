"""What the model makes of text that it is not trained on: the loss by position in the sequence.

A model that uses what lies far back predicts late tokens better than early ones. The end of the text is held out for
that, and the loss of its sequences is computed over the ranks as in training, split and, with --segment, streamed.
validation.json in the run's folder has the numbers, validation.png the curves.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _files import FileError, on_all_ranks, on_rank_0, read_object, write
from _text import Text, batch_of_step
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import lasp
from lasp.data_parallel.schemes import FSDP2_SCHEMES

SHARE = 20  # one part in so many, the last one, is held out
BATCHES = 4  # of it, each of as many sequences as one of the training
FILE, PLOT = "validation.json", "validation.png"
PART = 4096  # tokens whose logits are in memory at once


def held_out(text: Text) -> tuple[Text, Text]:
    """The text to train on, and that which is held out: its end."""
    length = len(text) - len(text) // SHARE
    return text.part(0, length), text.part(length, len(text))


class Validation:
    """The losses on the held-out text of one run, after some of its steps.

    Args:
        folder: of the run.
        text: that which is held out.
        first_step: steps done before a resume; what was found after later ones of the interrupted run goes.
    """

    def __init__(self, folder: Path, text: Text, *, first_step: int):
        self.folder, self.text = folder, text
        path = folder / FILE

        def kept() -> list[dict]:
            return [x for x in read_validation(path) if x["step"] <= first_step] if first_step else []

        self.found: list[dict] = on_rank_0(f"reading {FILE}", kept)

    def run(self, step: int, model: nn.Module, mesh: DeviceMesh, options: Any, device: torch.device) -> float:
        """The loss after `step` steps, in nats; every rank calls it. Weights and their gradients are as before, or
        the gradients None."""
        sums = Sums(options.seq_len, options.vocab, device)
        model.eval()
        for number in range(BATCHES):
            drawn = {"seed": 0, "step": number, "batch": options.batch, "seq_len": options.seq_len}
            ids = batch_of_step(self.text, mesh, **drawn)
            _add(sums, ids, model, mesh, options, device)
        model.train()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what no backward follows stays gathered
        rows = by_position(on_all_ranks("the loss on the held-out text", sums.read), options.seq_len)
        loss = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
        self.found = [*(x for x in self.found if x["step"] != step), {"step": step, "loss": loss, "by position": rows}]
        on_rank_0(f"writing {FILE} and {PLOT}", self._write)
        return loss

    @property
    def losses(self) -> dict[int, float]:
        """By the number of steps done."""
        return {x["step"]: x["loss"] for x in self.found}

    def _write(self) -> None:
        write(self.folder / FILE, json.dumps({"validation": self.found}, indent=1) + "\n")
        write(self.folder / PLOT, _plot(self.found))


class Sums:
    """Losses of this rank's tokens, added up by position: [0], [1], [2, 3], [4 ... 7] and so on.

    A streamed loss is told no positions, so these are in the labels: position * vocabulary + token.
    """

    def __init__(self, seq_len: int, vocabulary: int, device: torch.device):
        self.vocabulary = vocabulary
        self.numbers = torch.zeros(2, seq_len.bit_length() + 1, dtype=torch.float64, device=device)  # losses, tokens

    def labels(self, ids: Tensor) -> Tensor:
        """[B, T]: of each token the one behind it, with its own position; -100 at the end."""
        positions = torch.arange(ids.shape[1] - 1, device=ids.device)
        return F.pad(positions * self.vocabulary + ids[:, 1:], (0, 1), value=-100)

    def add(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        """Those of some tokens, [..., vocabulary] and [...]: the sum of their losses, and how many count."""
        counted = labels != -100
        positions, tokens = labels[counted] // self.vocabulary, labels[counted] % self.vocabulary
        losses = F.cross_entropy(logits[counted].float(), tokens, reduction="none")
        buckets = (positions.double() + 0.5).log2().floor().long() + 1  # exact: no position is near a power of two
        self.numbers[0].index_add_(0, buckets, losses.detach().double())
        self.numbers[1].index_add_(0, buckets, torch.ones_like(losses, dtype=torch.float64))
        return losses.sum(), len(tokens)

    def read(self) -> list[list[float]]:
        """As JSON holds them."""
        return self.numbers.tolist()


def by_position(of_ranks: list[list[list[float]]], seq_len: int) -> list[dict]:
    """From the sums of all ranks the mean loss of each bucket that has tokens."""
    losses, tokens = np.sum(of_ranks, axis=0)
    begins = [0, *(2**power for power in range(len(tokens) - 1))]
    return [
        {"from": begin, "to": min(max(0, 2 * begin - 1), seq_len - 2), "tokens": int(count), "loss": total / count}
        for begin, total, count in zip(begins, losses.tolist(), tokens.tolist())
        if count
    ]


def _add(sums: Sums, ids: Tensor, model: nn.Module, mesh: DeviceMesh, options: Any, device: torch.device) -> None:
    """The losses of some sequences, [B, T], of which this rank computes its slice."""
    sharded = options.parallel in FSDP2_SCHEMES  # then FSDP2 casts to bf16
    bf16 = options.dtype == "bfloat16" and not sharded
    labels = sums.labels(ids)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if options.segment:
            _add_streamed(sums, {"input_ids": ids, "labels": labels}, model, mesh, options.segment)
            return
        with torch.no_grad():
            batch = {"input_ids": ids.to(device), "labels": labels.to(device)}
            local = lasp.shard_batch(batch, mesh, shift_labels=False)
            head = (model.module if isinstance(model, DistributedDataParallel) else model).head
            hidden = model(local["input_ids"], local["position_ids"], local["layout"], return_hidden=True)
            for x, y in zip(hidden.flatten(0, 1).split(PART), local["labels"].flatten().split(PART)):
                sums.add(F.linear(x, head.weight), y)  # type: ignore[union-attr,arg-type]


def _add_streamed(sums: Sums, batch: dict[str, Tensor], model: nn.Module, mesh: DeviceMesh, segment: int) -> None:
    """Likewise. lasp streams forward and backward only, so a sequence costs what it does in training; each is seen
    twice, and counted where gradients are taken."""

    def loss_fn(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        if torch.is_grad_enabled():
            return sums.add(logits, labels)
        return logits.new_zeros(()), int((labels != -100).sum())

    lasp.stream_backward(model, batch, mesh=mesh, segment=segment, loss_fn=loss_fn, shift_labels=False)
    model.zero_grad()


def read_validation(path: Path) -> list[dict]:
    """What validation.json holds, if it is there.

    Raises:
        FileError: it holds something else.
    """
    if not path.exists():
        return []
    found = read_object(path).get("validation")
    if not isinstance(found, list) or not all(isinstance(x, dict) and type(x.get("step")) is int for x in found):
        raise FileError(f"{path} is not what a run writes: no list of validations in it")
    return found


def _plot(found: list[dict]) -> bytes:
    """A curve of each validation, the last one in front."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="position in the sequence", ylabel="loss on held-out text (nats)")
    for number, x in enumerate(found, 1):
        rows = [row for row in x["by position"] if row["from"]]  # 0 is on no logarithmic axis
        last = number == len(found)
        color = "C0" if last else str(0.85 - 0.5 * number / len(found))  # from light to dark
        middle = [(row["from"] * max(1, row["to"])) ** 0.5 for row in rows]
        label = f"step {x['step']}: {x['loss']:.3f} in the mean" if last or number == 1 else None
        axes.plot(middle, [row["loss"] for row in rows], marker="o", markersize=3, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()
