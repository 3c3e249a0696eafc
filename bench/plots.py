"""Plots of kept results, drawn from their JSON, so that they can be drawn again.

    python bench/plots.py bench/results/DATE_NAME.json ...

Each writes a PNG beside its JSON. They are 9 inches wide, so that their letters can be read where a page shows them
900 pixels wide. A line has its name beside it: `label_lines` looks for a place that is free.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

WIDTH = 9.0  # inches
SMALL = 8.5  # points: names beside lines, and figures beside bars
# All dark enough for letters on white.
PALETTE = ("#1f5fa8", "#c2410c", "#2e7d32", "#7b3fa0", "#8a6d00", "#b0185b", "#00727a", "#5c4033")
GRAY = "#666666"
NAMES = {"serial": "in turn (LASP-1)", "ring": "ring", "pipeline": "pipeline", "all_gather": "all-gather"}
HORIZON_NAMES = {"alibi": "ring with horizon, ALiBi slopes", "tnl": "ring with horizon, decays of the TNL paper"}
COLORS = {"serial": GRAY, "ring": PALETTE[0], "pipeline": PALETTE[2], "all_gather": PALETTE[1]}
DECAYS = {
    "fixed": "ALiBi slopes",
    "none": "no decay",
    "token": "a decay per token",
    "channel": "a decay per channel",
    "delta": "delta rule",
    "gated_delta": "gated delta rule",
    "kda": "KDA",
}


def draw(path: Path) -> Path:
    """The PNG of one kept result; returns its path."""
    result = json.loads(path.read_text())
    figure = figure_of(result, path.name)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=150)
    return target


def figure_of(result: dict, file: str) -> Figure:
    """The picture of a result, with a line that says where its numbers are from."""
    kind = kind_of(result)
    if kind is None:
        raise ValueError(f"{file}: there is a plot for {', '.join(DRAWINGS)}, not for {result.get('benchmark')!r}")
    figure = DRAWINGS[kind](result)
    sign(figure, result["environment"], file)
    return figure


def kind_of(result: dict) -> str | None:
    """The key of `DRAWINGS` for a result, None if there is none."""
    name = result.get("benchmark", "")
    return next((kind for kind in DRAWINGS if name.startswith(kind) and not name.startswith(TABLES)), None)


def sign(figure: Figure, about: dict, file: str) -> None:
    """Hardware, date, commit and file, below the plots."""
    figure.text(0.01, 0.005, f"{about['device']}; {about['date']}; {about['commit']}; {file}", fontsize=7, color=GRAY)
    if engine := figure.get_layout_engine():
        below = 0.16 / figure.get_figheight()
        engine.set(rect=(0, below, 1, 1 - below))  # type: ignore[call-arg]  # room for that line


def groups(rows: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Rows by the values of some columns, in order of appearance."""
    found: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return found


def sheet(*, figsize: tuple[float, float]) -> Figure:
    """An empty figure that knows how large letters are."""
    figure = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# ---- axes


def count(value: float, _=None) -> str:
    """131072 as 128K."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def thousands(value: float, _=None) -> str:
    """60000 as 60,000."""
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def double_steps(axes: Axes, ticks: Iterable[int], label: str) -> None:
    """An x axis whose ticks double."""
    ticks = sorted(set(ticks))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(count))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    if ticks[-1] / 2 ** math.floor(math.log2(ticks[-1])) != 1 and len(ticks) < 4:  # 2,301,952 is no 2M
        axes.set_xticklabels([count(tick) if tick & (tick - 1) == 0 else f"{tick:,}" for tick in ticks])


def room(axes: Axes, *, left: float = 0.06, right: float = 0.06) -> None:
    """Leave parts of the width of a logarithmic x axis free, for names."""
    ticks = axes.get_xticks()
    low, high = math.log2(min(ticks)), math.log2(max(ticks))
    width = (high - low or 1.0) / (1 - left - right)
    axes.set_xlim(2 ** (low - left * width), 2 ** (high + right * width))


def plain_log(axis: Any) -> None:
    """A logarithmic axis whose ticks are numbers as one writes them."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high > 8 * low else (1, 2, 3, 4, 5, 6, 8)))
    axis.set_minor_locator(LogLocator(10, subs=tuple(range(1, 10))))
    axis.set_major_formatter(FuncFormatter(thousands))
    axis.set_minor_formatter(NullFormatter())


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], title: str, form: str = "{:,.0f}") -> None:
    """A bar for each name, the first above, with its value behind its end."""
    places = range(len(names))
    axes.barh(places, values, color=PALETTE[0], height=0.6)
    for place, value in zip(places, values):
        inside = value > 0.3 * max(values)
        at = {"ha": "right" if inside else "left", "va": "center_baseline", "color": "white" if inside else "black"}
        at |= {"textcoords": "offset points", "fontsize": SMALL}
        axes.annotate(form.format(value), (value, place), (-4 if inside else 4, 0), **at)
    axes.set_yticks(places, names, fontsize=SMALL)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.08 * max(values))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10)


# ---- names beside lines

# Sides of a point: offset in points, and which part of the text is there: 0 its left or lower end, 1 its other one.
SIDES = (
    ((7, 0), (0, 0.5)),
    ((0, 6), (0.5, 0)),
    ((0, -6), (0.5, 1)),
    ((7, 7), (0, 0.5)),
    ((7, -7), (0, 0.5)),
    ((4, 6), (1, 0)),
    ((4, -6), (1, 1)),
    ((-4, 6), (0, 0)),
    ((-4, -6), (0, 1)),
    ((-7, 0), (1, 0.5)),
)
Box = tuple[float, float, float, float]


def label_lines(axes: Axes, size: float = SMALL) -> None:
    """Write each line's label beside it, where it covers no line and no other label; call it when the axes are set.

    At its last point if there is room, else at its first, else anywhere along it. Where no place is free, that which
    covers least.
    """
    figure: Figure = axes.get_figure(root=True)  # type: ignore[assignment]
    figure.draw_without_rendering()  # so that sizes are known
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    lines = [line for line in axes.lines if len(line.get_xdata())]
    taken = np.concatenate([_pixels_of(line) for line in lines]) if lines else np.empty((0, 2))
    boxes: list[Box] = [text.get_window_extent(renderer).extents for text in axes.texts]
    for line in lines:
        name = str(line.get_label())
        if name.startswith("_"):
            continue
        text = axes.annotate(name, (0, 0), xycoords="axes fraction", fontsize=size, color=line.get_color())
        extent, scale = text.get_window_extent(renderer), figure.dpi / 72
        places: list[tuple[float, Box, Any, Any, Any]] = []
        for point in _along(line):
            for offset, part in SIDES:
                corner = point + np.array(offset) * scale - np.array(part) * (extent.width, extent.height)
                box = (*corner, corner[0] + extent.width, corner[1] + extent.height)
                places.append((_covers(box, taken, boxes, frame), box, point, offset, part))
                if places[-1][0] == 0:
                    break
            if places[-1][0] == 0:
                break
        _, box, point, offset, part = min(places, key=lambda place: place[0])
        text.xy, text.xycoords = axes.transAxes.inverted().transform(point), "axes fraction"
        text.set(ha=("left", "center", "right")[int(2 * part[0])], va=("bottom", "center", "top")[int(2 * part[1])])
        text.xyann, text.anncoords = offset, "offset points"
        boxes.append(box)


def _covers(box: Box, taken: np.ndarray, boxes: Iterable[Box], frame: Any) -> float:
    """How much a label there would hide, or stand outside; 0 if nothing."""
    left, low, right, high = box
    cost = float(((taken > (left - 2, low)) & (taken < (right + 2, high))).all(axis=1).sum())
    cost += 1000 * sum(left < x1 + 4 and x0 < right + 4 and low < y1 and y0 < high for x0, y0, x1, y1 in boxes)
    return cost + 10 * sum(max(0.0, of) for of in (frame.x0 - left, right - frame.x1, frame.y0 - low, high - frame.y1))


def _along(line) -> list[np.ndarray]:
    """Points of a line in pixels: its last, its first, the others, and those between."""
    points = _points_of(line)
    between = [(1 - part) * begin + part * end for begin, end in zip(points, points[1:]) for part in (0.33, 0.67)]
    return [points[-1], points[0], *points[-2:0:-1], *between]


def _points_of(line) -> np.ndarray:
    """In pixels; of an axhline the x are parts of the width."""
    return line.get_transform().transform(np.column_stack([line.get_xdata(), line.get_ydata()]).astype(float))


def _pixels_of(line) -> np.ndarray:
    """Where a line and its markers are."""
    points, steps = _points_of(line), np.linspace(0, 1, 100)[:, None]
    between = [begin + steps * (end - begin) for begin, end in zip(points, points[1:])]
    if line.get_linestyle() in ("None", "none", ""):
        between = []
    around = np.array([(x, y) for x in (-4, 0, 4) for y in (-4, 0, 4)])
    return np.concatenate([*between, (points[:, None] + around).reshape(-1, 2)])


# ---- the pictures


def simulation(result: dict) -> Figure:
    """Above: published and simulated times of one exchange. Below: what the operator loses on many ranks."""
    figure = sheet(figsize=(WIDTH, 9))
    axes = figure.subplot_mosaic(
        [["exchange", "exchange"], ["first", "second"]], height_ratios=(1, 1.4), width_ratios=(1.75, 1)
    )
    published_exchange(axes["exchange"], [row for row in result["rows"] if not row["figure"].startswith("operator")])
    (title, rows), (_, horizon), *_ = result["tables"].items()
    alone = rows[0]["op fwd+bwd ms"] * rows[0]["% of one rank"] / 100
    for (network,), below in zip(groups(rows, "network"), (axes["first"], axes["second"])):
        of_network = [row for row in rows if row["network"] == network]
        for (schedule,), of in groups(of_network, "schedule").items():
            style = {"color": COLORS[schedule], "marker": ".", "label": NAMES[schedule]}
            below.plot([r["ranks"] for r in of], [r["% of one rank"] for r in of], **style)
        if network == rows[0]["network"]:  # of which the horizon's table is
            for number, ((decay,), of) in enumerate(groups(horizon, "decay").items()):
                style = {"color": PALETTE[(3, 5)[number]], "marker": "v^"[number], "markersize": 4}
                of_decay = [100 * alone / row["op ms"] for row in of]
                below.plot([row["ranks"] for row in of], of_decay, label=HORIZON_NAMES[decay], **style)
        double_steps(below, [row["ranks"] for row in rows], "ranks (GPUs)")
        below.tick_params(axis="x", labelsize=8)
        below.set_ylim(0, 108)
        below.set_title(f"{title.split(', ')[0]}, simulated;\n{network}", fontsize=9.5)
    axes["first"].set_ylabel("speed of a rank, % of one rank alone\n" + title.split(", ", 1)[1], fontsize=9)
    for of_axes in axes.values():
        label_lines(of_axes, 8)
    return figure


def published_exchange(axes: Axes, rows: list[dict]) -> None:
    """Lines are simulated, circles published; the simulation knows those that are filled."""
    for number, ((name,), of) in enumerate(groups(rows, "figure").items()):
        color = PALETTE[number]
        axes.plot([row["GPUs"] for row in of], [row["simulated ms"] for row in of], label=f"{name}, simulated", c=color)
        for how, fill in (("predicted", "none"), ("fitted", color)):
            style = {"linestyle": "none", "marker": "o", "markerfacecolor": fill, "color": color, "label": "_"}
            points = [row for row in of if row["how"] == how]
            axes.plot([row["GPUs"] for row in points], [row["published ms"] for row in points], **style)
    double_steps(axes, [row["GPUs"] for row in rows], "GPUs")
    axes.set_yscale("log")
    plain_log(axes.yaxis)
    axes.set_ylabel("one exchange of a layer's state, ms")
    axes.set_title(
        "Lines: simulated. Circles: published; the simulation was fitted to those that are filled", fontsize=10
    )


def who(layout: str, ranks: int, unit: str) -> str:
    """How a training was split, in words: "4 GPUs, 2 sequences over 2 each"."""
    dp, sp, *tp = (int(part) for part in layout.split("x"))
    name = f"{ranks:g} {unit}" + ("s" if ranks > 1 else "")
    if dp > 1:
        name += f", {dp} sequences" + (f" over {sp} each" if sp > 1 else "")
    elif sp > 1:
        name += ", one sequence"
    return name + (f", weights over {tp[0]}" if tp else "")


def scaling(result: dict) -> Figure:
    """Tokens/s of a GPU, its memory, and, where it was compared, % of ideal."""
    rows = [row for row in result["rows"] if row["tokens/s/GPU"]]
    compared = [row for row in rows if row.get("% of ideal") and row["% of ideal"] != 100]
    strong = result["benchmark"].startswith("scaling_strong")
    unit = "GPU" if result["facts"].get("backend", "nccl") == "nccl" else "rank"
    height = 0.7 + 0.27 * len(compared)
    figure = sheet(figsize=(WIDTH, 4 + (height if compared else 0)))
    above, *below = figure.subfigures(2, 1, height_ratios=(3.8, height)) if compared else (figure,)
    single = max(len(of) for of in groups(rows, "layout").values()) == 1
    speed, memory = above.subplots(1, 2, sharey=single)
    over_length(speed, rows, "tokens/s/GPU", f"tokens a second, of one {unit}", unit)
    over_length(memory, rows, "peak GiB", f"peak memory of a {unit}, GiB", unit)
    for part in below:
        names = [f"{who(row['layout'], row['ranks'], unit)}, {of_tokens(row, strong)}" for row in compared]
        base = "the fewest that hold the sequence" if strong else f"one {unit} with as many tokens"
        percent_bars(part.subplots(), names, [row["% of ideal"] for row in compared], f"speed of a {unit}, % of {base}")
    kind = result["benchmark"].split("_")[1]
    title = {"strong": "strong scaling", "weak": "weak scaling", "longest": "the longest sequences that fit"}[kind]
    model = result["facts"].get("model") or result["benchmark"].split("_")[2]
    figure.suptitle(f"Training TNL-{model}: {title}", fontsize=11)
    return figure


def of_tokens(row: dict, strong: bool) -> str:
    return f"{count(row['sequence'])} tokens" if strong else f"{count(row['tokens a rank'])} tokens on each"


def percent_bars(axes: Axes, names: Sequence[str], values: Sequence[float], title: str) -> None:
    """Bars in %, with a line at 100."""
    bars(axes, names, values, title, "{:.1f}%")
    axes.axvline(100, color="black", linestyle="--", linewidth=1, zorder=0)


def over_length(axes: Axes, rows: list[dict], column: str, title: str, unit: str) -> None:
    """A column over the length of a sequence, a line for each layout; bars where each layout has one length."""
    if any(row[column] is None for row in rows):
        axes.set_title(title, fontsize=10)
        axes.text(0.5, 0.5, "not measured on a CPU", ha="center", color=GRAY, transform=axes.transAxes)
        axes.set_axis_off()
        return
    lines = {layout: (who(layout, of[0]["ranks"], unit), of) for (layout,), of in groups(rows, "layout").items()}
    if all(len(of) == 1 for _, of in lines.values()):
        names = [f"{name.replace(', ', chr(10), 1)}, {count(of[0]['sequence'])} tokens" for name, of in lines.values()]
        bars(axes, names, [of[0][column] for _, of in lines.values()], title, "{:,.0f}" if "/s" in column else "{:.1f}")
        return
    for number, (name, of) in enumerate(lines.values()):
        style = {"marker": "os^vD"[number % 5], "color": PALETTE[number % len(PALETTE)], "markersize": 5}
        axes.plot([row["sequence"] for row in of], [row[column] for row in of], label=name, **style)
    double_steps(axes, [row["sequence"] for row in rows], "tokens of a sequence")
    room(axes)
    axes.set_ylim(0, 1.2 * max(row[column] for row in rows))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    axes.set_title(title, fontsize=10)
    label_lines(axes)


def operator_scaling(result: dict) -> Figure:
    """A row of plots for each decay: weak scaling forward and backward, strong scaling; % of ideal over ranks."""
    tables = result["tables"]
    rows = tables.get("weak scaling") or [row for row in result["rows"] if "% of ideal" in row]
    total = [row for row in tables["strong scaling"] if row["direction"] != "both"]
    columns = [f"weak scaling, {direction}:\nso many tokens on each rank" for direction in ("forward", "backward")]
    if total:
        columns.append(
            f"strong scaling: one sequence of\n{count(total[0]['ranks'] * total[0]['tokens a rank'])} tokens"
        )
    decays = list(groups(rows, "decay"))
    figure = sheet(figsize=(WIDTH, 1.4 + 2.2 * len(decays)))
    grid = figure.subplots(len(decays), len(columns), squeeze=False, sharex=True, sharey=True)
    least = 10 * math.floor(min(row["% of ideal"] for row in [*rows, *total]) / 10)
    for (decay,), line in zip(decays, grid):
        for direction, axes in zip(("forward", "backward"), line):
            of = [row for row in rows if (row["decay"], row["direction"]) == (decay, direction)]
            percent_lines(axes, of, "tokens a rank", count)
            for tokens, target in sorted({(r["tokens a rank"], r["target %"]) for r in of if r.get("target %")}):
                axes.axhline(target, color=GRAY, linestyle=":", linewidth=1, label="_")
                place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "top", "color": GRAY}
                axes.text(0.99, target - 0.6, f"aim at {count(tokens)}", fontsize=7.5, **place)
        if total:
            of = [row for row in total if row["decay"] == decay]
            percent_lines(line[2], of, "direction", str)
            if not of:
                line[2].text(0.5, 0.5, "not measured", ha="center", color=GRAY, transform=line[2].transAxes)
        line[0].set_ylabel(f"{DECAYS.get(decay, decay)}\nspeed of a rank, % of ideal", fontsize=9)
    for axes, title in zip(grid[0], columns):
        axes.set_title(title, fontsize=9)
    ticks = sorted({row["ranks"] for row in [*rows, *total]})
    for axes in grid.flat:
        axes.axhline(100, color="black", linewidth=1, label="_")
        double_steps(axes, ticks, "")
        room(axes, left=0.08, right=0.42)
        axes.set_ylim(least - 2, 106)
    for axes in grid[-1]:
        axes.set_xlabel("ranks (GPUs)" if result["environment"].get("cuda") else "ranks")
    figure.suptitle(
        f"Linear attention over ranks of one machine, {result['facts']['inputs']}; 100%: one rank", fontsize=10
    )
    for axes in grid.flat:
        label_lines(axes, 8)
    return figure


def percent_lines(axes: Axes, rows: list[dict], key: str, name: Callable) -> None:
    """% of ideal over ranks, a line for each value of `key`, with the last value in its name."""
    for number, ((value,), of) in enumerate(groups(rows, key).items()):
        style = {"marker": "os^vD"[number % 5], "color": PALETTE[number % len(PALETTE)], "markersize": 4}
        percent = [row["% of ideal"] for row in of]
        axes.plot([row["ranks"] for row in of], percent, label=f"{name(value)}: {percent[-1]:.0f}%", **style)


def lengths(result: dict) -> Figure:
    """Tokens a second over the length of a sequence: ours, a softmax model of the same size, and what is published."""
    figure = sheet(figsize=(WIDTH, 5.4))
    card = re.sub(r"^1 x ", "", result["environment"]["device"])
    axes = figure.add_subplot(
        ylabel=f"tokens/s of one GPU ({card})", title="A training step of models of 1B parameters"
    )
    for number, rows in enumerate(groups(result["rows"], "model").values()):
        style = {"marker": "os"[number], "color": PALETTE[number]}
        axes.plot([r["tokens of a sequence"] for r in rows], [r["tokens/s"] for r in rows], label="_", **style)
    for number, (name, rates) in enumerate(result["facts"].get("published", {}).items()):
        style = {"linestyle": "--", "marker": "x", "color": ("#444444", "#888888")[number % 2]}
        axes.plot([int(n) for n in rates], list(rates.values()), label=name, **style)
    double_steps(axes, [r["tokens of a sequence"] for r in result["rows"]], "tokens of a sequence")
    axes.set_ylim(0, 1.12 * max(r["tokens/s"] for r in result["rows"]))
    axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    of_models = groups(result["rows"], "model")
    if ("tnl",) in of_models:
        rows, place = of_models["tnl",], {"textcoords": "offset points", "ha": "right"}
        last = (rows[-1]["tokens of a sequence"], rows[-1]["tokens/s"])
        axes.annotate("TransNormerLLM with lasp", last, (0, 8), color=PALETTE[0], fontsize=11, **place)
        for words, row in ways(rows):
            at = (row["tokens of a sequence"], row["tokens/s"])
            axes.annotate(words, at, (0, -8), va="top", color=PALETTE[0], fontsize=SMALL, **place)
    if ("softmax",) in of_models:
        rows = of_models["softmax",]
        words = "softmax attention: a Llama of the same size, PyTorch's flash kernel"
        words += "".join(
            f"\n{way.replace(chr(10), ' ')} up to {count(row['tokens of a sequence'])} tokens"
            for way, row in ways(rows)
        )
        at = (rows[len(rows) // 2]["tokens of a sequence"], rows[len(rows) // 2]["tokens/s"])
        axes.annotate(words, at, (14, 10), textcoords="offset points", color=PALETTE[1], fontsize=SMALL + 0.5)
    label_lines(axes)
    return figure


def ways(rows: list[dict]) -> list[tuple[str, dict]]:
    """How neighbouring rows of lengths.py were computed, in words, each with the last row of which it is true."""
    found: list[tuple[str, list[int], dict]] = []
    for row in rows:
        number = int(re.findall(r"\d+", row["how"])[0])
        kind = "in segments" if row["how"].startswith("segments") else "recomputed" if number else "nothing recomputed"
        if not found or found[-1][0] != kind:
            found.append((kind, [], row))
        found[-1][1].append(number)
        found[-1] = (*found[-1][:2], row)
    words = []
    for kind, numbers, row in found:
        span = str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"
        text = {"in segments": f"in segments of {count(numbers[0])} tokens", "recomputed": f"{span} blocks\nrecomputed"}
        words.append((text.get(kind, kind), row))
    return words


def families(result: dict) -> Figure:
    """Tokens a second, a line of dots for each family, fastest first: the operator, and a training step."""
    steps = [(title, rows) for title, rows in result.get("tables", {}).items() if rows]
    of_rows = "a training step" if "step ms" in result["rows"][0] else "the operator of a layer, forward and backward"
    pairs = [(of_rows, result["rows"]), *steps]
    sizes = [0.8 + 0.36 * len(groups(rows, "family")) for _, rows in pairs]
    figure = sheet(figsize=(WIDTH, 0.8 + sum(sizes)))
    grid = figure.subplots(len(pairs), 1, squeeze=False, height_ratios=sizes)[:, 0]
    of_lengths = sorted({row["T"] for _, rows in pairs for row in rows})
    for axes, (title, rows) in zip(grid, pairs):
        million = max(row["tokens/s"] for row in rows) > 5e6
        family_dots(axes, rows, of_lengths, 1e6 if million else 1)
        axes.set_title(f"Families of linear attention: {title}", fontsize=10)
        of_gpu = " of one GPU" if result["environment"].get("cuda") else ""
        axes.set_xlabel(("millions of tokens a second" if million else "tokens a second") + of_gpu)
    handles, names = grid[0].get_legend_handles_labels()
    if any(row.get("fla fwd ms") for row in result["rows"]):
        handles.append(Line2D([], [], color=GRAY, marker="o", markerfacecolor="white", linestyle="none"))
        names.append("hollow: fla-core's kernel (of softmax PyTorch's) on the same inputs")
    figure.legend(handles, names, loc="outside upper center", ncols=6, fontsize=SMALL, frameon=False)
    return figure


def family_dots(axes: Axes, rows: list[dict], of_lengths: Sequence[int], unit: float) -> None:
    """A row for each family, a dot for each length."""
    longest: dict[str, tuple] = {}
    for row in rows:
        longest[row["family"]] = max(longest.get(row["family"], (0, 0)), (row["T"], row["tokens/s"]))
    order = sorted(longest, key=lambda family: longest[family], reverse=True)
    for number, length in enumerate(of_lengths):
        style = {"linestyle": "none", "marker": "os^vDP"[number % 6], "color": PALETTE[number % len(PALETTE)]}
        of = [row for row in rows if row["T"] == length]
        places = [order.index(row["family"]) + 0.22 * (number - (len(of_lengths) - 1) / 2) for row in of]
        axes.plot(
            [row["tokens/s"] / unit for row in of], places, markersize=5, label=f"{count(length)} tokens", **style
        )
        both = [(row, place) for row, place in zip(of, places) if row.get("fla fwd ms") and row.get("fla bwd ms")]
        speed = [1e3 / unit * row["T"] / (row["fla fwd ms"] + row["fla bwd ms"]) for row, _ in both]
        style |= {"markerfacecolor": "white", "markersize": 5, "label": "_"}
        axes.plot(speed, [place for _, place in both], **style)
    axes.set_xscale("log")
    plain_log(axes.xaxis)
    axes.set_yticks(range(len(order)), order, fontsize=SMALL)
    axes.set_ylim(len(order) - 0.5, -0.5)
    for place in range(1, len(order)):
        axes.axhline(place - 0.5, color="black", alpha=0.12, linewidth=0.8, label="_")
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)


def published(result: dict) -> Figure:
    """Forward and backward over the length, for each shape: measured; and what was published of another card."""
    names = {"lasp": "lasp, TransNormerLLM's decays", "flash": "softmax, flash", "scores": "softmax, all scores"}
    theirs = result["tables"]["published by others"]
    others = {"lightning": "Lightning Attention", "flash2": "FlashAttention-2", "flash1": "FlashAttention-1"}
    shapes = groups(result["rows"], "shape")
    figure = sheet(figsize=(WIDTH, 0.6 + 3.4 * (len(shapes) + 1)))
    grid = figure.subplots(len(shapes) + 1, 2, squeeze=False, sharex=True, sharey=True)
    for column, (part, title) in enumerate((("fwd", "forward"), ("bwd", "backward"))):
        for ((shape,), rows), axes in zip(shapes.items(), grid[:, column]):
            for place, ((what,), of) in enumerate(groups(rows, "what").items()):
                style = {"color": PALETTE[place], "marker": "os^"[place % 3], "markersize": 5}
                axes.plot([row["T"] for row in of], [row[f"{part} ms"] for row in of], label=names[what], **style)
            axes.set_title(f"{shape}, {title}", fontsize=10)
        for place, (name, label) in enumerate(others.items()):
            style = {"color": PALETTE[(0, 1, 4)[place]], "linestyle": "--", "marker": "osD"[place], "markersize": 5}
            times = [row[f"{part}_{name}"] for row in theirs]
            grid[-1, column].plot([row["tokens"] for row in theirs], times, label=label, **style)
        grid[-1, column].set_title(f"published, {title}, of another card", fontsize=10)
    for axes in grid.flat:
        double_steps(axes, [row["T"] for row in result["rows"]], "tokens of a sequence")
        axes.set_yscale("log")
        plain_log(axes.yaxis)
        axes.set_ylabel("ms")
    for axes in grid.flat:
        label_lines(axes, 8)
    return figure


def loss_lines(axes: Axes, rows: list[dict], style: Callable = lambda cell: {}) -> None:
    """Mean losses of cells (bench/cells.py) over the steps up to which they are taken."""
    for number, row in enumerate(rows):
        steps = [key for key in row if key != "cell"]
        how = {"marker": ".", "linestyle": "-" if number < 8 else "--", "color": PALETTE[number % 8]}
        how |= {"label": row["cell"]} | style(row["cell"])
        axes.plot([int(step) for step in steps], [row[step] for step in steps], **how)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a byte")
    axes.grid(alpha=0.3)


def gap_bars(axes: Axes, rows: list[dict], names: Sequence[str], theirs: str) -> None:
    """The gap of each row as a bar, and beside it as a cross the published one."""
    places = range(len(rows))
    axes.barh(places, [row["gap"] for row in rows], color=PALETTE[0], height=0.6, label="here")
    known = [(row["published gap"], place) for place, row in enumerate(rows) if row["published gap"] is not None]
    style = {"marker": "x", "linestyle": "none", "color": PALETTE[1], "label": theirs}
    axes.plot([gap for gap, _ in known], [place for _, place in known], **style)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(places, names, fontsize=SMALL)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("nats a byte")
    axes.legend(fontsize=SMALL, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


def convergence(result: dict) -> Figure:
    """Above: losses without and with sequence parallelism. Below: the gap of each pair, and the published one."""
    rows = result["rows"]
    below = 1.2 + 0.24 * len(rows)
    figure = sheet(figsize=(WIDTH, 4.6 + below))
    above, gaps = figure.subplots(2, 1, height_ratios=(4.2, below))
    [curves] = result["tables"].values()
    models = list(dict.fromkeys(row["model"] for row in rows))
    first = {row["model"]: row["scheme"] for row in reversed(rows)}
    shown = [row for row in curves if first.get(row["cell"].split(", ")[0]) == row["cell"].split(", ")[1]]

    def style(cell: str) -> dict:
        without = cell.endswith("without")
        found = {
            "color": PALETTE[models.index(cell.split(", ")[0]) % len(PALETTE)],
            "linestyle": "-" if without else "none",
        }
        return found | {"marker": "" if without else ".", "label": cell.split(", ")[0] if without else "_"}

    loss_lines(above, shown, style=style)
    above.set_title("Lines: without sequence parallelism. Dots: with it", fontsize=10)
    label_lines(above)
    names = [f"{row['model']}, {row['scheme']}" for row in rows]
    gap_bars(gaps, rows, names, "published by LASP, other text and size")
    for sign_of in (-1, 1):
        gaps.axvline(sign_of * result["facts"]["allowed"], color="black", linestyle=":")
    gaps.set_title("Final loss with sequence parallelism less that without; dotted: allowed", fontsize=10, pad=22)
    return figure


def ablations(result: dict) -> Figure:
    """Above: loss curves. Below: how far each ends from the model as it is, beside the published gap."""
    rows = result["rows"]
    below = 1.2 + 0.24 * len(rows)
    figure = sheet(figsize=(WIDTH, 4.6 + below))
    above, gaps = figure.subplots(2, 1, height_ratios=(4.2, below))
    [curves] = result["tables"].values()
    loss_lines(above, curves)
    above.legend(fontsize=SMALL, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    above.set_title("Loss on the same tokens", fontsize=10)
    gap_bars(gaps, rows, [row["what"] for row in rows], "published, 385M and 100,000 steps")
    gaps.set_title("Final loss less that of TNL", fontsize=10, pad=22)
    return figure


def sizes(result: dict) -> Figure:
    """Above: loss against compute. Below: recall accuracy of each model and size."""
    figure = sheet(figsize=(WIDTH, 8.6))
    above, recall = figure.subplots(2, 1)
    tables = list(result["tables"].values())
    flops = {row["cell"]: row for row in result["rows"]}
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    of_sizes = list(dict.fromkeys(row["size"] for row in result["rows"]))
    for curve in tables[0]:
        row = flops[curve["cell"]]
        steps = [key for key in curve if key != "cell"]
        compute = [row["FLOP"] * int(step) / result["facts"]["steps"] for step in steps]
        style = {"color": PALETTE[models.index(row["model"])], "marker": "os^v"[of_sizes.index(row["size"]) % 4]}
        style["linestyle"] = ("-", "--", ":", "-.")[of_sizes.index(row["size"]) % 4]
        above.plot(compute, [curve[step] for step in steps], label=f"{row['model']}, {row['size']}", **style)
    above.set(
        xscale="log", xlabel="FLOP of forward and backward", ylabel="loss, nats a byte", title="Loss against compute"
    )
    above.grid(alpha=0.3)
    above.legend(fontsize=SMALL, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for number, ((model,), rows) in enumerate(groups(result["rows"], "model").items()):
        rows = [row for row in rows if row["recall accuracy"] is not None]
        places = [of_sizes.index(row["size"]) + 0.8 * number / len(models) for row in rows]
        style = {"color": PALETTE[number], "label": model}
        recall.bar(places, [100 * row["recall accuracy"] for row in rows], 0.8 / len(models), **style)
    chance = 100 * result["facts"]["chance"]
    recall.axhline(chance, color="black", linestyle=":", label="chance")
    recall.set_xticks([n + 0.4 - 0.4 / len(models) for n in range(len(of_sizes))], of_sizes)
    recall.set(ylim=(0, 105), ylabel="%", title="Questions of associative recall answered right")
    recall.legend(fontsize=SMALL, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


TABLES = ("scaling_schemes",)  # which are tables
DRAWINGS: dict[str, Callable[[dict], Figure]] = {
    "simulation": simulation,
    "scaling": scaling,
    "operator_scaling": operator_scaling,
    "lengths": lengths,
    "families_published": published,
    "families": families,
    "convergence": convergence,
    "ablations_parts": ablations,
    "ablations_sizes": sizes,
}


# ---- operators of many families, one line or bar each; drawn from the records that docs/performance.md shows

PAGE = 9.0  # inches: as wide as a page shows it
FAMILY_NAMES = {"fixed": "ALiBi slopes", "none": "no decay", "token": "a decay per token", "channel": "per channel",
                "delta": "DeltaNet", "gated_delta": "Gated DeltaNet", "kda": "KDA"}  # fmt: skip
OF_DELTA = {"none": "DeltaNet", "token": "Gated DeltaNet", "channel": "KDA"}


def kernels(result: dict) -> Figure:
    """Of one suite with peers: time over length, and how near forward and backward come to the roofline."""
    compared = {row["suite"] for row in result["rows"] if row["what"] != "lasp"}
    rows = [row for row in result["rows"] if row["suite"] in compared]
    figure = Figure(figsize=(PAGE, 4.4), layout="constrained")
    times, roofline = figure.subplots(1, 2)
    for number, ((what,), of) in enumerate(groups(rows, "what").items()):
        lengths, color = [row["T"] for row in of], f"C{number}"
        total = [row["fwd ms"] + row["bwd ms"] for row in of]
        times.plot(lengths, total, marker="o", color=color, label=what)
        for part, style, name in (("fwd", "-", "forward"), ("bwd", "--", "backward")):
            percent = [row[f"{part} % floor"] for row in of]
            roofline.plot(lengths, percent, marker="o", color=color, linestyle=style, label=f"{what}, {name}")
    roofline.axhline(100, color="black", label="each tensor moved once")
    for axes in (times, roofline):
        double_steps(axes, [row["T"] for row in rows], "tokens of a sequence")
    times.set(yscale="log", ylabel="ms", title="Forward and backward")
    times.yaxis.set_major_formatter(FuncFormatter(count))
    times.legend(fontsize=9)
    roofline.set(ylim=(0, 108), ylabel="% of the memory roofline", title="How near the memory roofline")
    roofline.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    first = rows[0]
    shape = f"B = {first['B']}, {first['H']} heads of {first['D']} x {first['D']}"
    figure.suptitle(f"Linear attention on one GPU, bf16, {shape}, decay {first['decay']}", fontsize=11)
    return figure


def delta(result: dict) -> Figure:
    """Bars of forward, and of backward on top, at the longest sequence: ours and every peer's that ran."""
    longest = max(row["T"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["T"] == longest and row["fwd ms"] and row["bwd ms"]]
    figure = Figure(figsize=(PAGE, 3.8), layout="constrained")
    for axes, ((decay,), of) in zip(figure.subplots(1, 3), groups(rows, "decay").items()):
        what = ["lasp" if row["kernels"] == "triton" else row["kernels"] for row in of]
        forward, backward = [row["fwd ms"] for row in of], [row["bwd ms"] for row in of]
        axes.bar(what, forward, label="forward")
        bars = axes.bar(what, backward, bottom=forward, label="backward")
        axes.bar_label(bars, [f"{a + b:.3g}" for a, b in zip(forward, backward)], fontsize=8)
        axes.margins(y=0.25)
        axes.set(title=OF_DELTA[decay], ylabel="ms")
        axes.legend(fontsize=8, ncols=2, loc="upper center")
    figure.suptitle(f"The delta rule on one GPU, bf16, {longest:,} tokens, heads of {rows[0]['dim']}", fontsize=11)
    return figure


def decode(result: dict) -> Figure:
    """Tokens a second of one request over what came before: ours, which does not depend on it, and a softmax model."""
    figure = Figure(figsize=(PAGE, 4.6), layout="constrained")
    axes = figure.add_subplot(ylabel="tokens/s of one request", title="One token more, 1B parameters, one GPU")
    prompts = result["tables"]["lengths"]
    softmax = [row for row in result["rows"] if row["model"] == "softmax"]
    ours = [row["tokens of the prompt"] for row in prompts]
    axes.plot(ours, [row["tokens/s"] for row in prompts], marker="o", label="TransNormerLLM, lasp")
    contexts = [int(row["context"]) for row in softmax]
    rates = [row["tokens/s"] for row in softmax]
    axes.plot(contexts, rates, marker="o", label="softmax attention (Llama of the same size)")
    double_steps(axes, [*ours, *contexts], "tokens before")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=9)
    return figure


WAYS = {
    "lasp": "lasp",
    "lasp1_serial": "receive, compute,\nsend (LASP-1)",
    "ulysses": "all-to-all over\nheads (Ulysses)",
    "ring_softmax": "softmax attention,\nkeys in a ring",
    "fla_cp": "fla-core",
}


def peers(result: dict) -> Figure:
    """Beside lasp, on as many ranks as there are: other ways to split a sequence, and fla-core's delta rules."""
    ways, beside_fla = (table for name, table in result["tables"].items() if "peers" in name or "fla-core" in name)
    ways = [row for row in ways if row["both ms"]]
    timed = [row for row in beside_fla if row["ms"]]
    both = {(row["decay"], row["operator"]): row for row in timed if row["direction"] == "both"}
    forward = {(row["decay"], row["operator"]): row for row in timed if row["direction"] == "forward"}
    figure = Figure(figsize=(PAGE, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = left.bar([WAYS[row["peer"]] for row in ways], [row["both ms"] for row in ways])
    left.bar_label(drawn, [f"{row['both ms']:.3g}\n{row['x lasp']:.3g} x" for row in ways], fontsize=8)
    left.set(yscale="log", ylabel="ms, forward and backward", title="ALiBi slopes: ways to split a sequence")
    for number, operator in enumerate(("lasp", "fla_cp")):
        of = [row for (_, name), row in forward.items() if name == operator]
        places = [list(DECAYS).index(row["decay"]) + 0.4 * number for row in of]
        drawn = right.bar(places, [row["ms"] for row in of], width=0.38, label=WAYS[operator])
        right.bar_label(drawn, [f"{row['ms']:.3g}\n{row['x lasp']:.3g} x" for row in of], fontsize=8)
    kinds = list(groups(timed, "decay"))
    names = [FAMILY_NAMES[decay] + ("" if (decay, "fla_cp") in both else "\n(fla: no backward)") for (decay,) in kinds]
    right.set_xticks([list(DECAYS).index(decay) + 0.2 for (decay,) in kinds], names)
    right.set(ylabel="ms, forward", title="Delta rules beside fla-core's context parallelism")
    right.legend(fontsize=8, loc="upper left")
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.tick_params(axis="x", labelsize=7.5)
        axes.margins(y=0.25)
        axes.yaxis.set_major_formatter(FuncFormatter(thousands))
    first = ways[0]
    about = f"{first['ranks']} GPUs, {count(first['tokens a rank'])} tokens on each, {result['facts']['inputs']}"
    figure.suptitle(f"One sequence over several GPUs: {about}", fontsize=11)
    return figure


def over_ranks(result: dict) -> Figure:
    """Of many families weak scaling, both directions together, a panel for each length; else `operator_scaling`.

    A line needs two numbers of ranks: of peers on one number of ranks there are bars.
    """
    rows = result["tables"].get("weak scaling") or result["rows"]  # the second of a run that was broken off
    if len({row["ranks"] for row in rows}) == 1 and any("fla-core" in name for name in result["tables"]):
        return peers(result)
    if all(row["decay"] in ("fixed", "none") for row in rows):
        return operator_scaling(result)
    of_lengths = list(groups((row for row in rows if row["direction"] == "both"), "tokens a rank").items())
    figure = Figure(figsize=(PAGE, 4.2), layout="constrained")
    panels = figure.subplots(1, len(of_lengths), squeeze=False, sharey=True)[0]
    for axes, ((tokens,), of) in zip(panels, of_lengths):
        for number, ((decay,), line) in enumerate(groups(of, "decay").items()):
            style = {"marker": "os^vD*"[number % 6], "markersize": 5, "label": FAMILY_NAMES[decay]}
            axes.plot([row["ranks"] for row in line], [row["% of ideal"] for row in line], **style)
        double_steps(axes, [row["ranks"] for row in of], "GPUs")
        axes.axhline(100, color="black", linewidth=1)
        axes.set(ylim=(0, 106), title=f"{count(tokens)} tokens on each")
    panels[0].set_ylabel("speed of a GPU, % of one alone")
    panels[0].legend(fontsize=8, loc="lower left")
    about = f"forward and backward, {result['facts']['inputs']}"
    figure.suptitle(f"Operators over GPUs of one machine, {about}", fontsize=11)
    return figure


DRAWINGS |= {"kernels": kernels, "delta": delta, "decode_contexts": decode, "operator_scaling": over_ranks}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)))
