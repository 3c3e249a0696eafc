"""Plots of kept results, drawn from their JSON, so that they can be drawn again.

    python bench/plots.py bench/results/DATE_NAME.json ...

Each writes a PNG beside its JSON.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

NAMES = {"serial": "receive, then compute (LASP-1)", "ring": "ring", "pipeline": "pipeline", "all_gather": "all-gather"}
DECAY_NAMES = {"alibi": "ALiBi slopes", "tnl": "the TNL paper's decay"}
COLORS = {"serial": "tab:gray", "ring": "tab:blue", "pipeline": "tab:green", "all_gather": "tab:orange"}


def draw(path: Path) -> Path:
    """The PNG of one kept result; returns its path."""
    result = json.loads(path.read_text())
    kind = next((name for name in DRAWINGS if result["benchmark"].startswith(name)), None)
    if kind is None:
        raise ValueError(f"{path.name}: there is a plot for {', '.join(DRAWINGS)}, not for {result['benchmark']!r}")
    figure = DRAWINGS[kind](result)
    about = result["environment"]
    figure.text(0.01, 0.005, f"{about['device']}; {about['date']}; {about['commit']}; {path.name}", fontsize=6)
    if engine := figure.get_layout_engine():
        engine.set(rect=(0, 0.03, 1, 0.97))  # type: ignore[call-arg]  # room for that line
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=150)
    return target


def groups(rows: Iterable[dict], *keys: str) -> dict[tuple, list[dict]]:
    """Rows by the values of some columns, in order of appearance."""
    found: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return found


def count(value: float, _=None) -> str:
    """131072 as 128K."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def double_steps(axes: Axes, ticks: Iterable[int], label: str) -> None:
    """An x axis whose ticks double."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(count))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


def simulation(result: dict) -> Figure:
    """Left: published and simulated times of one exchange. Right: what the operator loses on many ranks."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name,), rows in groups(result["rows"], "figure").items():
        if name.startswith("operator"):
            continue
        gpus = [row["GPUs"] for row in rows]
        [line] = left.plot(gpus, [row["simulated ms"] for row in rows], label=f"{name}, simulated")
        for how, fill in (("predicted", "none"), ("fitted", line.get_color())):
            of = [row for row in rows if row["how"] == how]
            label = f"{name}, published" + (" (the simulation is fitted here)" if how == "fitted" else "")
            style = {"linestyle": "none", "marker": "o", "markerfacecolor": fill, "color": line.get_color()}
            left.plot([row["GPUs"] for row in of], [row["published ms"] for row in of], label=label, **style)
        double_steps(left, gpus, "GPUs")
    left.set_yscale("log")
    left.set_ylabel("one exchange, ms")
    left.set_title("Exchange of one layer's state: published and simulated")
    left.legend(fontsize=7)
    (title, rows), (_, horizon), *_ = result["tables"].items()
    for (network, schedule), of in groups(rows, "network", "schedule").items():
        first = network == rows[0]["network"]
        style = {"color": COLORS[schedule], "linestyle": "-" if first else ":"}
        label = NAMES[schedule] if first else None
        right.plot([r["ranks"] for r in of], [r["% of one rank"] for r in of], label=label, **style)
    alone = rows[0]["op fwd+bwd ms"] * rows[0]["% of one rank"] / 100
    for (decay,), of in groups(horizon, "decay").items():
        label = f"ring with the horizon, {DECAY_NAMES[decay]}"
        style = {"color": "tab:purple", "marker": "v" if decay == "alibi" else "^", "markersize": 4}
        right.plot([row["ranks"] for row in of], [100 * alone / row["op ms"] for row in of], label=label, **style)
    for network, line in zip(dict.fromkeys(row["network"] for row in rows), "-:"):
        right.plot([], [], color="black", linestyle=line, label=network)
    double_steps(right, [row["ranks"] for row in rows], "ranks (GPUs)")
    right.set_ylim(0, 102)
    right.set_ylabel("speed of a rank, % of one rank alone")
    right.set_title(f"Simulated: {title}", fontsize=9)
    right.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    return figure


def speed_of_ideal(axes: Axes, rows: list[dict], *, strong: bool) -> None:
    """A line for each length of sequence (strong scaling) or shard."""
    for (tokens,), of in groups(rows, "sequence" if strong else "tokens a rank").items():
        of = sorted(of, key=lambda row: row["ranks"])
        what = f"one sequence of {count(tokens)} tokens" if strong else f"{count(tokens)} tokens on each GPU"
        axes.plot([row["ranks"] for row in of], [row["% of ideal"] for row in of], marker="o", label=what)
    double_steps(axes, [row["ranks"] for row in rows], "GPUs")
    axes.axhline(100, color="black", linestyle="--", label="ideal")
    axes.set_ylim(0, 110)
    axes.set_title("speed of a GPU, % of " + ("the fewest that hold the sequence" if strong else "one GPU alone"))
    axes.legend(fontsize=8)


def scaling(result: dict) -> Figure:
    """Throughput of a GPU, its memory, and, where it was compared, % of ideal; one line for each number of ranks."""
    rows = [row for row in result["rows"] if row["tokens/s/GPU"]]
    compared = [row for row in rows if row.get("% of ideal")]
    figure = Figure(figsize=(15 if compared else 10, 5), layout="constrained")
    speed, memory, *last = figure.subplots(1, 3 if compared else 2)
    for (layout,), of in groups(rows, "layout").items():
        dp, sp, *tp = layout.split("x")
        label = f"{of[0]['ranks']} GPU" + ("s" if of[0]["ranks"] > 1 else "")
        label += f" ({dp} sequences, each over {sp})" if dp != "1" else ""
        label += f", weights over {tp[0]}" if tp else ""
        length = [row["sequence"] for row in of]
        speed.plot(length, [row["tokens/s/GPU"] for row in of], marker="o", label=label)
        if all(row["peak GiB"] is not None for row in of):
            memory.plot(length, [row["peak GiB"] for row in of], marker="o", label=label)
    for axes, title in ((speed, "tokens a second, of one GPU"), (memory, "peak memory of a GPU, GiB")):
        double_steps(axes, [row["sequence"] for row in rows], "tokens of a sequence")
        axes.set_title(title)
        if axes.lines:
            axes.set_ylim(0, 1.15 * max(max(line.get_ydata()) for line in axes.lines))  # type: ignore[arg-type]
            axes.legend(fontsize=8, loc="lower left" if axes is speed else "upper left")
    for axes in last:
        speed_of_ideal(axes, compared, strong=result["benchmark"].startswith("scaling_strong"))
    kind = result["benchmark"].split("_")[1]
    title = {"strong": "strong scaling", "weak": "weak scaling", "longest": "the longest sequences that fit"}[kind]
    figure.suptitle(f"Training TNL-{result['facts']['model']}: {title}")
    return figure


def operator_scaling(result: dict) -> Figure:
    """Weak scaling of forward and of backward, % of ideal; strong scaling, speed-up."""
    figure = Figure(figsize=(15, 5), layout="constrained")
    forward, backward, strong = figure.subplots(1, 3)
    tables = result["tables"]
    rows, total = tables["weak scaling"], tables["strong scaling"]
    for axes, direction in ((forward, "forward"), (backward, "backward")):
        percent = [row for row in rows if row["direction"] == direction]
        decay_lines(axes, percent, "tokens a rank", "% of ideal", lambda tokens: f"{count(tokens)} tokens on each rank")
        axes.axhline(100, color="black", label="ideal: one rank alone with as many tokens")
        for tokens, target in sorted({(r["tokens a rank"], r["target %"]) for r in percent if r["target %"]}):
            axes.axhline(target, color="gray", linestyle=":", label=f"target: {target:g}% at {count(tokens)} tokens")
        axes.set_ylim(0, 110)
        axes.set_ylabel("speed of a rank, % of one rank alone")
        axes.set_title(f"Weak scaling, {direction}")
    decay_lines(strong, total, "direction", "speed-up", lambda name: {"both": "forward and backward"}.get(name, name))
    if total:
        ranks = sorted({row["ranks"] for row in total})
        strong.plot(ranks, ranks, color="black", label="ideal: W times as fast on W ranks")
        strong.set_yscale("log", base=2)
        strong.yaxis.set_major_formatter(FuncFormatter(count))
        sequence = count(total[0]["ranks"] * total[0]["tokens a rank"])
        strong.set_title(f"Strong scaling, one sequence of {sequence} tokens")
    strong.set_ylabel("times as fast as one rank with the whole sequence")
    for axes in (forward, backward, strong):
        if axes.lines:
            double_steps(axes, [row["ranks"] for row in [*rows, *total]], "ranks (GPUs)")
            axes.legend(fontsize=7, loc="lower left" if axes is not strong else "upper left")
    about = f"{result['facts']['inputs']}, {result['facts']['backend']}"
    figure.suptitle(f"Linear attention over ranks of one machine, {about}")
    return figure


def decay_lines(axes: Axes, rows: list[dict], key: str, value: str, name: Callable) -> None:
    """A column against ranks: a colour for each value of `key`; with a decay the line is solid, without one dashed."""
    colors: dict = {}
    for (decay, of_key), of in groups(rows, "decay", key).items():
        style = {"color": colors.get(of_key), "linestyle": "-" if decay == "fixed" else "--", "marker": "o"}
        label = f"{name(of_key)}, {'ALiBi slopes' if decay == 'fixed' else 'no decay'}"
        [line] = axes.plot([row["ranks"] for row in of], [row[value] for row in of], label=label, **style)
        colors.setdefault(of_key, line.get_color())


def lengths(result: dict) -> Figure:
    """Tokens a second over the length of a sequence: ours, a softmax model of the same size, and what is published."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(ylabel="tokens/s of a GPU", title="A training step, 1B parameters, one GPU")
    names = {"tnl": "TransNormerLLM, lasp", "softmax": "softmax attention (Llama of the same size, SDPA flash)"}
    for (name,), rows in groups(result["rows"], "model").items():
        axes.plot(
            [r["tokens of a sequence"] for r in rows], [r["tokens/s"] for r in rows], marker="o", label=names[name]
        )
    for number, (name, rates) in enumerate(result["facts"]["published"].items()):
        style = {"linestyle": "--", "marker": "x", "color": ("gray", "lightgray")[number % 2]}
        axes.plot([int(n) for n in rates], list(rates.values()), label=name, **style)
    double_steps(axes, [r["tokens of a sequence"] for r in result["rows"]], "tokens of a sequence")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def families(result: dict) -> Figure:
    """Tokens a second over the length, a line a family: the operator, forward and backward, and a training step."""
    steps = [(title, rows) for title, rows in result.get("tables", {}).items() if rows]
    figure = Figure(figsize=(13 if steps else 7, 5), layout="constrained")
    of_rows = "a training step" if "step ms" in result["rows"][0] else "the operator of a layer, forward and backward"
    pairs = [(of_rows, result["rows"]), *steps]
    for axes, (title, rows) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs):
        for number, ((family,), of) in enumerate(groups(rows, "family").items()):
            style = {"marker": "o", "linestyle": "-" if number < 10 else "--"}
            axes.plot([row["T"] for row in of], [row["tokens/s"] for row in of], label=family, **style)
            theirs = [row for row in of if row.get("fla fwd ms") and row.get("fla bwd ms")]
            speed = [1e3 * row["T"] / (row["fla fwd ms"] + row["fla bwd ms"]) for row in theirs]
            style = {"marker": "x", "linestyle": ":", "color": axes.lines[-1].get_color()}
            axes.plot([row["T"] for row in theirs], speed, **style)
        double_steps(axes, [row["T"] for row in rows], "tokens of a sequence")
        axes.set_yscale("log")
        axes.set_ylabel("tokens/s of one GPU")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=7)
    figure.suptitle("Families of linear attention; dotted: fla-core's, or of softmax PyTorch's kernel", fontsize=10)
    return figure


def published(result: dict) -> Figure:
    """Forward and backward over the length: measured, and what was published of another card."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    names = {"lasp": "lasp, TransNormerLLM's decays", "flash": "softmax, flash", "scores": "softmax, all scores"}
    theirs = result["tables"]["published by others"]
    others = {"lightning": "Lightning", "flash2": "FlashAttention-2", "flash1": "FlashAttention-1"}
    for axes, part, title in zip(figure.subplots(1, 2), ("fwd", "bwd"), ("forward", "backward")):
        colors: dict[str, Any] = {}
        for number, ((shape,), rows) in enumerate(groups(result["rows"], "shape").items()):
            for (what,), of in groups(rows, "what").items():
                style = {"color": colors.get(what), "linestyle": "-" if number == 0 else "--", "marker": "o"}
                times = [row[f"{part} ms"] for row in of]
                [line] = axes.plot([row["T"] for row in of], times, label=f"{names[what]}, {shape}", **style)
                colors.setdefault(what, line.get_color())
        for (name, label), marker in zip(others.items(), "sx+"):
            style = {"color": "gray", "linestyle": ":", "marker": marker}
            times = [row[f"{part}_{name}"] for row in theirs]
            axes.plot([row["tokens"] for row in theirs], times, label=f"{label}, published, another card", **style)
        double_steps(axes, [row["T"] for row in result["rows"]], "tokens of a sequence")
        axes.set_yscale("log")
        axes.set_ylabel("ms")
        axes.set_title(title)
        axes.legend(fontsize=7)
    return figure


def loss_lines(
    axes: Axes, rows: list[dict], name: Callable[[str], str] = str, style: Callable = lambda cell: {}
) -> None:
    """Mean losses of cells (bench/cells.py) over the steps up to which they are taken."""
    for number, row in enumerate(rows):
        steps = [key for key in row if key != "cell"]
        how = {"marker": ".", "linestyle": "-" if number < 10 else "--"} | style(row["cell"])
        axes.plot([int(step) for step in steps], [row[step] for step in steps], label=row["cell"], **how)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats")
    axes.grid(alpha=0.3)


def convergence(result: dict) -> Figure:
    """Left: loss curves without and with sequence parallelism. Right: the gap of each pair, and the published one."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    [curves] = result["tables"].values()
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))

    def style(cell: str) -> dict:
        color = f"C{models.index(cell.split(', ')[0])}" if cell.split(", ")[0] in models else "gray"
        return {"color": color, "linestyle": "-" if cell.endswith("without") else ":", "linewidth": 1}

    loss_lines(left, curves, style=style)
    for number, model in enumerate(models):
        left.plot([], [], color=f"C{number}", label=model)
    left.legend(handles=left.lines[-len(models) :], fontsize=7)
    left.set_title("Losses without (lines) and with (dots) sequence parallelism, all schemes")
    rows = result["rows"]
    places = range(len(rows))
    right.barh(places, [row["gap"] for row in rows], color="tab:blue", label="with - without, here")
    theirs = [(place, row["published gap"]) for place, row in enumerate(rows) if row["published gap"] is not None]
    style_of = {
        "marker": "x",
        "linestyle": "none",
        "color": "tab:gray",
        "label": "published by LASP, other text and size",
    }
    right.plot([gap for _, gap in theirs], [place for place, _ in theirs], **style_of)
    for sign in (-1, 1):
        right.axvline(sign * result["facts"]["allowed"], color="black", linestyle=":")
    right.set_yticks(places, [f"{row['model']}, {row['scheme']}" for row in rows], fontsize=7)
    right.invert_yaxis()
    right.set_title("Gap of the final losses; dotted: allowed", fontsize=10)
    right.legend(fontsize=7)
    return figure


def ablations(result: dict) -> Figure:
    """Left: loss curves. Right: how far each ends from the model as it is, beside the published gap."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    [curves] = result["tables"].values()
    loss_lines(left, curves)
    left.legend(fontsize=7)
    left.set_title("Loss of the same tokens", fontsize=10)
    rows = result["rows"]
    right.barh(range(len(rows)), [row["gap"] for row in rows], label="here")
    theirs = [(place, row["published gap"]) for place, row in enumerate(rows) if row["published gap"] is not None]
    style = {"marker": "x", "linestyle": "none", "color": "black", "label": "published, 385M and 100,000 steps"}
    right.plot([gap for _, gap in theirs], [place for place, _ in theirs], **style)
    right.set_yticks(range(len(rows)), [row["what"] for row in rows], fontsize=7)
    right.invert_yaxis()
    right.set_title("Final loss less that of TNL", fontsize=10)
    right.legend(fontsize=7)
    return figure


def sizes(result: dict) -> Figure:
    """Left: loss against compute. Right: recall accuracy against compute of a token."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    tables = list(result["tables"].values())
    flops = {row["cell"]: row for row in result["rows"]}
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    of_sizes = list(dict.fromkeys(row["size"] for row in result["rows"]))
    for curve in tables[0]:
        row = flops[curve["cell"]]
        steps = [key for key in curve if key != "cell"]
        compute = [row["FLOP"] * int(step) / result["facts"]["steps"] for step in steps]
        style = {"color": f"C{models.index(row['model'])}", "marker": "os^v"[of_sizes.index(row["size"]) % 4]}
        style["linestyle"] = ("-", "--", ":", "-.")[of_sizes.index(row["size"]) % 4]
        left.plot(compute, [curve[step] for step in steps], label=f"{row['model']}, {row['size']}", **style)
    left.set(xscale="log", xlabel="FLOP of forward and backward", ylabel="loss, nats", title="Loss against compute")
    left.legend(fontsize=7)
    for number, ((model,), rows) in enumerate(groups(result["rows"], "model").items()):
        rows = [row for row in rows if row["recall accuracy"] is not None]
        places = [of_sizes.index(row["size"]) + 0.8 * number / len(models) for row in rows]
        right.bar(places, [100 * row["recall accuracy"] for row in rows], 0.8 / len(models), label=model)
    right.axhline(100 * result["facts"]["chance"], color="black", linestyle=":", label="chance")
    right.set_xticks([n + 0.4 - 0.4 / len(models) for n in range(len(of_sizes))], of_sizes)
    right.set(ylim=(0, 105), ylabel="%", title="Questions of associative recall answered right")
    right.legend(fontsize=7)
    return figure


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


def over_ranks(result: dict) -> Figure:
    """Of many families weak scaling, both directions together, a panel for each length; else `operator_scaling`."""
    rows = result["tables"].get("weak scaling") or result["rows"]  # the second of a run that was broken off
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
