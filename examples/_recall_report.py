"""What examples/recall.py finds: accuracy by distance, as a table, as recall.json, and as recall.png."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from _files import write
from _report import environment, peak_memory
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.console import Console
from rich.table import Table

import lasp

TRAINED = ", trained so"
ENOUGH = 0.9  # of the answers right: a distance is learned


@dataclass
class Answers:
    """Of every question, gone over in one way: how far back the answer lies, if it was right, if it could be seen."""

    name: str
    trained: bool = False  # with that cut, as well as tested with it
    distances: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    right: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    seen: np.ndarray = field(default_factory=lambda: np.empty(0, bool))

    def add(self, distances: np.ndarray, right: np.ndarray, seen: np.ndarray) -> None:
        """Those of more sequences."""
        self.distances = np.append(self.distances, distances)
        self.right, self.seen = np.append(self.right, right), np.append(self.seen, seen)

    @property
    def title(self) -> str:
        """What it is called in table and plot."""
        return f"{self.name}{TRAINED}" if self.trained else self.name

    def by_distance(self) -> list[dict]:
        """Of distances from a power of two to the next: how many questions, and which share was right."""
        of = np.floor(np.log2(self.distances)).astype(int)
        return [
            {
                "from": 2**power,
                "to": min(2 ** (power + 1) - 1, int(self.distances.max())),
                "questions": int((of == power).sum()),
                "accuracy": float(self.right[of == power].mean()),
            }
            for power in np.unique(of).tolist()
        ]

    def beyond_reach(self) -> tuple[int, float | None]:
        """How many questions had their answer in another piece, and which share of them was right."""
        hidden = self.right[~self.seen]
        return len(hidden), float(hidden.mean()) if len(hidden) else None

    def within_reach(self) -> float:
        """Which share of the others was right."""
        return float(self.right[self.seen].mean())


def write_results(
    folder: Path, answers: list[Answers], *, options: dict, history: dict, env: lasp.Env, seconds: float, chance: float
) -> None:
    """Print the table and what follows from it, and keep all in the folder."""
    rows = [x.by_distance() for x in answers]
    result = {
        "environment": environment(env),
        "options": options,
        "seconds": seconds,
        "peak_memory_bytes_of_rank_0": peak_memory(env.device),
        "chance": chance,
        "ways": {
            x.title: {
                "by distance": by_distance,
                "within reach": {"accuracy": x.within_reach()},
                "beyond reach": dict(zip(("questions", "accuracy"), x.beyond_reach())),
            }
            for x, by_distance in zip(answers, rows)
        },
        "training": {
            name: {key: [step[key] for step in steps] for key in ("length", "loss")} for name, steps in history.items()
        },
    }
    write(folder / "recall.json", json.dumps(result, indent=1) + "\n")
    write(folder / "recall.png", plot(result))
    Console(width=max(100, 28 + 14 * len(answers))).print(_table(answers, rows))
    for line in _verdict(answers, rows, chance, {name: len(steps) for name, steps in history.items()}, seconds):
        print(line)
    print(f"recall.json and recall.png are in {folder}")


def _table(answers: list[Answers], rows: list[list[dict]]) -> Table:
    table = Table(title="Right answers by distance, %")
    for name in ("tokens back", "questions", *(x.title for x in answers)):
        table.add_column(name, justify="right", no_wrap=name == "tokens back")
    for of_distance in zip(*rows):
        first = of_distance[0]
        accuracies = [f"{100 * row['accuracy']:.1f}" for row in of_distance]
        table.add_row(f"{first['from']:,} to {first['to']:,}", f"{first['questions']:,}", *accuracies)
    return table


def _verdict(
    answers: list[Answers], rows: list[list[dict]], chance: float, steps: dict[str, int], seconds: float
) -> list[str]:
    whole, missed = answers[0], [row for row in rows[0] if row["accuracy"] < ENOUGH]
    learned = f"learned at all distances, up to {int(whole.distances.max()):,} tokens"
    if missed:
        first = missed[0]
        learned = f"NOT learned: {100 * first['accuracy']:.1f}% right at {first['from']:,} to {first['to']:,} tokens"
    lines = [f"{whole.name}: {learned} ({steps[whole.name]} steps; {seconds:.0f} s for all that is told here)"]
    for x in answers[1:]:
        number, accuracy = x.beyond_reach()
        said = f"{100 * x.within_reach():.1f}% right where it sees the answer"
        if accuracy is not None:
            said += f", {100 * accuracy:.1f}% of {number:,} where it does not (chance {100 * chance:.1f}%)"
        lines.append(f"{x.title}: {said}")
    return lines


def plot(result: dict) -> bytes:
    """Of what recall.json holds: accuracy by distance, a curve a way; upright lines where a segment and a slice end."""
    options, ranks, chance = result["options"], result["environment"]["ranks"], 100 * result["chance"]
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens between the value and its question", ylabel="right answers, %")
    colors = ("#1f5fa8", "#c2410c", "#2e7d32")
    names = [title for title in result["ways"] if not title.endswith(TRAINED)]
    for title, way in result["ways"].items():
        name, trained = title.removesuffix(TRAINED), title.endswith(TRAINED)
        color = colors[names.index(name)]
        points = [((row["from"] * row["to"]) ** 0.5, 100 * row["accuracy"]) for row in way["by distance"]]
        axes.plot(
            *zip(*points),
            "o--" if trained else "o-",
            color=color,
            markersize=4,
            fillstyle="none" if trained else "full",
        )
        if not trained:
            fallen = [point for point in points if point[1] < 85]
            outside = bool(fallen) and name == names[1]  # the last curve to fall: to its right nothing is
            said = f"{name}\n(dashed: {TRAINED.strip(', ')})" if f"{name}{TRAINED}" in result["ways"] else name
            away = (10 if outside else -10, 0) if fallen else (0, -8)
            text = axes.annotate(
                said, fallen[0] if fallen else points[-1], away, textcoords="offset points", color=color
            )
            text.set(ha="left" if outside else "right", va="center" if fallen else "top")
    axes.axhline(chance, color="gray", linestyle=":")
    axes.annotate(f"chance: {chance:.1f}%", (1, chance), (0, 4), textcoords="offset points", color="gray", fontsize=9)
    borders = {"a segment ends": options["segment"], "a rank's slice ends": options["test_length"] // ranks}
    for name, tokens in borders.items():
        if name == "a segment ends" or ranks > 1:
            axes.axvline(tokens, color="lightgray", linewidth=1)
            axes.annotate(f" {name}", (tokens, 55), rotation=90, ha="left", va="center", color="gray", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks([4**n for n in range(1 + int(math.log(options["test_length"], 4)))])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0.7, 2.4 * options["test_length"])
    axes.set_ylim(0, 103)
    over = f"{ranks} ranks" if ranks > 1 else "1 rank"
    axes.set_title(f"Recall with the state and without: {options['test_length']:,} tokens, {over}")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()
