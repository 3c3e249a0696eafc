"""What a run shows and leaves behind: a progress bar, metrics.jsonl, run.json, loss.png and a summary."""

from __future__ import annotations

import io
import json
import math
import platform
import resource
import sys
import time
from pathlib import Path

import torch
from _files import FileError, append, on_all_ranks, on_rank_0, parse_object, read, sync, write
from _tensorboard import Curves
from matplotlib.figure import Figure
from tqdm import tqdm

import lasp

RUN, METRICS = "run.json", "metrics.jsonl"


def nats(value: float, unit: str) -> str:
    """A loss in nats, and in bits, which compare with the 8 of a byte."""
    return f"{value:.4f} nats ({value / math.log(2):.3f} bits) a {unit}"


class Report:
    """Keeps the run's losses; on rank 0 it also writes and prints them. If it cannot, that is an error on every rank.

    Args:
        folder: where the files go.
        env: what `lasp.init` returned.
        options: the run's options, as JSON can hold them.
        text: a digest of what it is trained on.
        tokenizer: who has made its tokens, as prepare.py notes it, or "bytes".
        first_step: steps done before a resume. Their metrics stay, later ones of the interrupted run go.
        entropy: of the data's unigrams, in nats a byte or token.
        unit: "byte" or "token".
    """

    def __init__(
        self,
        folder: Path,
        env: lasp.Env,
        options: dict,
        *,
        text: str,
        tokenizer: str,
        first_step: int,
        entropy: float,
        unit: str,
    ):
        self.folder, self.env, self.entropy, self.unit = folder, env, entropy, unit
        self.writes = env.rank == 0
        kept = on_all_ranks("reading metrics.jsonl", lambda: read_metrics(folder) if first_step else [])[env.rank]
        self.metrics = [m for m in kept if m["step"] < first_step]
        self._about = {"options": options, "text": text, "tokenizer": tokenizer, **environment(env)}
        on_rank_0("writing run.json and metrics.jsonl", lambda: self._begin(first_step))
        self.bar = tqdm(
            total=options["steps"], initial=first_step, unit="step", disable=not self.writes, dynamic_ncols=True
        )
        self.curves = Curves(folder, first_step=first_step) if options["tensorboard"] and self.writes else None
        self.clock = time.perf_counter()
        self.stop, self.last_stop = 0.0, 0.0  # seconds without a step since the last one, and of the last such stop

    def _begin(self, first_step: int) -> None:
        write(self.folder / RUN, json.dumps(self._about, indent=2) + "\n")
        write(self.folder / METRICS, "".join(json.dumps(m) + "\n" for m in self.metrics))
        missing = first_step - len(self.losses)
        if missing:
            print(f"{METRICS} lacks the losses of {missing} of the {first_step} steps done; they are left out below")

    @property
    def losses(self) -> dict[int, float]:
        """Of every step that is known, by its number."""
        return {m["step"]: m["loss"] for m in self.metrics}

    def step(self, step: int, loss: float, tokens: int, *, lr: float) -> None:
        """Note a step that has just ended; `tokens` are those of all ranks."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        rate = tokens / seconds
        metrics = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_s": rate,
            "tokens_per_s_per_rank": rate / self.env.world_size,
            "peak_memory_bytes": peak_memory(self.env.device),
            "seconds": seconds,
            "stopped_before_s": self.stop,
        }
        self.stop = 0.0
        self.metrics.append(metrics)
        on_rank_0(f"the metrics of step {step}", lambda: self._keep(step, metrics))
        unit = "GPU" if self.env.device.type == "cuda" else "rank"
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, {rate:,.0f} tokens/s, {rate / self.env.world_size:,.0f} tokens/s/{unit}, "
            f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"
            + (f", last stop {self.last_stop:.2f} s" if self.last_stop else "")
        )
        self.bar.update()

    def _keep(self, step: int, metrics: dict) -> None:
        append(self.folder / METRICS, json.dumps(metrics) + "\n")
        if self.curves is not None:
            self.curves.add(step, {name: metrics[name] for name in ("loss", "lr", "tokens_per_s", "peak_memory_bytes")})

    def held_out(self, step: int, loss: float) -> None:
        """Note the loss on held-out text after so many steps; the time that it took is no part of the next one's."""
        if self.curves is not None:
            self.curves.add(step - 1, {"held-out loss": loss})
        now = time.perf_counter()
        self.stop, self.clock = self.stop + now - self.clock, now

    def sync(self) -> None:
        """Have the metrics on the disk: before a checkpoint is, which would know of steps that they do not."""
        on_rank_0("writing metrics.jsonl", lambda: sync(self.folder / METRICS))

    def restart_clock(self) -> None:
        """Leave what was done since the last step, such as a checkpoint, out of the next step's seconds.

        How long it has stopped the training is in the next step's metrics, `stopped_before_s`, and on the bar.
        """
        now = time.perf_counter()
        self.last_stop = now - self.clock
        self.stop, self.clock = self.stop + self.last_stop, now

    def finish(self, held_out: dict[int, float]) -> None:
        """Draw the curve and print the summary; `held_out`: losses on held-out text, by the number of steps done."""
        self.bar.close()
        if self.curves is not None:
            self.curves.close()
        path = self.folder / "loss.png"
        on_rank_0("writing loss.png", lambda: plot_losses(path, self.losses, held_out, self.entropy, self.unit))
        losses = list(self.losses.values())
        if not self.writes or not losses:
            return
        last = losses[-10:]  # one step's loss is that of a few texts, and these differ
        mean = sum(last) / len(last)
        of_several = f"; mean of the last {len(last)} steps {nats(mean, self.unit)}" if len(last) > 1 else ""
        print(f"first loss       {nats(losses[0], self.unit)}")
        print(f"last loss        {nats(last[-1], self.unit)}{of_several}")
        for step, loss in list(held_out.items())[-1:]:
            print(f"held-out text    {nats(loss, self.unit)} after {step} steps; by position: validation.png")
        print(f"unigram entropy  {nats(self.entropy, self.unit)}")
        of = "mean" if of_several else "loss"
        print(f"That {of} is {'below' if mean < self.entropy else 'NOT below'} the unigram entropy.")
        saved = (self.folder / "LATEST").exists()
        print(
            f"metrics.jsonl, run.json{', loss.png and checkpoints' if saved else ' and loss.png'} are in {self.folder}"
        )


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, if there are any; a last line that was cut off does not count.

    Raises:
        FileError: a line is something else; names it.
    """
    path = folder / METRICS
    lines = read(path).split("\n")[:-1] if path.exists() else []
    metrics = [parse_object(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]
    for number, m in enumerate(metrics, 1):
        if type(m.get("step")) is not int or not isinstance(m.get("loss"), int | float):
            raise FileError(f"line {number} of {path} is not what a run writes: no step and loss in it")
    return metrics


def environment(env: lasp.Env) -> dict:
    """On what a run ran."""
    return {
        "ranks": env.world_size,
        "launcher": env.launcher,
        "backend": env.backend,
        "device": torch.cuda.get_device_name(env.device) if env.device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes, at most so far: allocated on this rank's GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def smoothed(values: list[float], over: int) -> list[float]:
    """Of each value the mean with those before it, of which each counts 1 - 1 / `over` times as much as the next."""
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = total * (1 - 1 / over) + value, weight * (1 - 1 / over) + 1
        found.append(total / weight)
    return found


def plot_losses(path: Path, losses: dict[int, float], held_out: dict[int, float], entropy: float, unit: str) -> None:
    """Loss by step, above the line that a model of the tokens' frequencies cannot cross."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss (nats a {unit})", title=f"TransNormerLLM on {unit}s")
    steps, values = list(losses), list(losses.values())
    over = max(2, len(values) // 20)
    axes.plot(steps, values, color="C0", alpha=0.35, label="training loss")
    axes.plot(steps, smoothed(values, over), color="C0", label=f"the same, smoothed over {over} steps")
    if held_out:
        behind = [step - 1 for step in held_out]
        axes.plot(behind, list(held_out.values()), "o-", color="C1", markersize=4, label="loss on held-out text")
    axes.axhline(entropy, color="gray", linestyle="--", label=f"entropy of the {unit}s' unigrams")
    axes.set_ylim(bottom=0)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write(path, picture.getvalue())
