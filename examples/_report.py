"""What a run shows and leaves behind: a progress bar, metrics.jsonl, run.json, loss.png and a summary."""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import lasp


def nats(value: float) -> str:
    """A loss in nats, and in bits, which compare with the 8 of a byte."""
    return f"{value:.4f} nats ({value / math.log(2):.3f} bits) a byte"


class Report:
    """Keeps the run's losses; on rank 0 it also writes and prints them.

    Args:
        folder: where the files go.
        env: what `lasp.init` returned.
        options: the run's options, as JSON can hold them.
        first_step: steps done before a resume. Their metrics stay, later ones of the interrupted run go.
        entropy: of the data's unigrams, in nats a byte.
    """

    def __init__(self, folder: Path, env: lasp.Env, options: dict, *, first_step: int, entropy: float):
        self.folder, self.env, self.entropy = folder, env, entropy
        self.writes = env.rank == 0
        self.metrics = [m for m in read_metrics(folder) if m["step"] < first_step]
        self.bar = tqdm(
            total=options["steps"], initial=first_step, unit="step", disable=not self.writes, dynamic_ncols=True
        )
        self.clock = time.perf_counter()
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "run.json").write_text(json.dumps({"options": options, **environment(env)}, indent=2) + "\n")
            (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in self.metrics))

    @property
    def losses(self) -> list[float]:
        """Of every step, from the first."""
        return [m["loss"] for m in self.metrics]

    def step(self, step: int, loss: float, tokens: int) -> None:
        """Note a step that has just ended; `tokens` are those of all ranks."""
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        rate = tokens / seconds
        metrics = {
            "step": step,
            "loss": loss,
            "tokens": tokens,
            "tokens_per_s": rate,
            "tokens_per_s_per_rank": rate / self.env.world_size,
            "peak_memory_bytes": peak_memory(self.env.device),
            "seconds": seconds,
        }
        self.metrics.append(metrics)
        if not self.writes:
            return
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        unit = "GPU" if self.env.device.type == "cuda" else "rank"
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, {rate:,.0f} tokens/s, {rate / self.env.world_size:,.0f} tokens/s/{unit}, "
            f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
        self.bar.update()

    def restart_clock(self) -> None:
        """Leave what was done since the last step, such as a checkpoint, out of the next step's seconds."""
        self.clock = time.perf_counter()

    def finish(self) -> None:
        """Draw the curve and print the summary."""
        self.bar.close()
        if not self.writes:
            return
        plot_losses(self.folder / "loss.png", self.losses, self.entropy)
        last = self.losses[-10:]  # one step's loss is that of a few texts, and these differ
        mean = sum(last) / len(last)
        print(f"first loss       {nats(self.losses[0])}")
        print(f"last loss        {nats(last[-1])}; mean of the last {len(last)} steps {nats(mean)}")
        print(f"unigram entropy  {nats(self.entropy)}")
        print(f"That mean is {'below' if mean < self.entropy else 'NOT below'} the unigram entropy.")
        print(f"metrics.jsonl, run.json, loss.png and checkpoints are in {self.folder}")


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, if there are any; a last line that was cut off does not count."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


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


def plot_losses(path: Path, losses: list[float], entropy: float) -> None:
    """Loss by step, above the line that a model of byte frequencies cannot cross."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a byte)", title="TransNormerLLM on bytes")
    axes.plot(losses, label="training loss")
    axes.axhline(entropy, color="gray", linestyle="--", label="entropy of the bytes' unigrams")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)
