"""One page, report.html, that shows what records of runs hold: curves, memory by rank, exposed communication, tables.

    python bench/html_report.py bench/results/DATE_NAME.json ... [--out report.html]
    python bench/html_report.py --metrics runs/mine/metrics.jsonl           # of examples/train.py
    torchrun --nproc-per-node 2 bench/scaling.py --html                     # beside the record of a run

The page needs no other file and no network: pictures are SVG within it. What a record does not hold it says.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import plots
import traces
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from tables import cell

ABOUT = ("command", "commit", "date", "device", "torch", "triton", "cuda", "python")
# Columns by which tables tell a length, tokens a second, and of what; the first that a table has counts.
LENGTHS = ("sequence", "tokens of a sequence", "tokens a rank", "tokens a GPU", "tokens of the prompt", "T", "tokens")
SPEEDS = ("tokens/s/GPU", "tokens/s a GPU", "tokens_per_s_per_rank", "tokens/s", "forward+backward tok/s")
WHAT = ("scheme", "layout", "model", "family", "attention", "what", "GPUs", "blocks recomputed", "experts")
MEMORY, MEMORY_BY_RANK = ("peak GiB", "peak GiB a GPU"), "peak GiB by rank"
EXPOSED, EXPOSED_BY_RANK, COSTS = "exposed NCCL ms", "exposed NCCL ms by rank", "exchange costs ms"
# Kinds of plots.py of which the page shows the whole picture; of others it has the curves already, or the table.
OWN = ("simulation", "operator_scaling", "families_published", "convergence", "ablations_parts", "ablations_sizes")
NO_CPU = "not measured on a CPU"
GIB = 2**30
STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 0 auto; padding: 1rem; }
body { overflow-wrap: anywhere; } h1 { font-size: 1.6rem; }
h2 { margin-top: 2.5rem; border-top: 2px solid var(--line); padding-top: 1rem; font-size: 1.3rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 1rem; }
.figures { margin: 1rem 0; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
figure img { display: block; box-sizing: border-box; width: 100%; padding: .5rem .25rem 0; background: white; }
figure.wide { grid-column: 1 / -1; overflow-x: auto; } figure.wide img { min-width: 700px; }
figcaption { padding: .5rem .75rem; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
td, th { border: 1px solid var(--line); padding: .2rem .5rem; text-align: right; overflow-wrap: normal; }
th { font-weight: 600; } .about td, .about th { text-align: left; } .about td { overflow-wrap: anywhere; }
summary { cursor: pointer; margin: .5rem 0; } code { font-size: .9em; }
"""


class Section:
    """What the page says of one record: pictures, tables, and what is not there."""

    def __init__(self, title: str, about: dict[str, Any], *, source: str):
        self.title, self.about, self.source = title, about, source
        self.pictures: list[str] = []
        wanted = [name for name in ABOUT if name != "cuda" or "+cpu" not in str(about.get("torch"))]
        missing = [name for name in wanted if not about.get(name)]
        self.lacks: list[str] = [f"where it comes from: no {', no '.join(missing)}"] if missing else []
        self.tables: list[tuple[str, list[dict]]] = []
        self.facts: dict[str, Any] = {}

    def picture(self, figure: Figure, caption: str, *, wide: bool = False) -> None:
        """Add one; `wide` has the page's whole width, and is scrolled on a narrow screen."""
        source = f"data:image/svg+xml;base64,{base64.b64encode(svg(figure)).decode()}"
        kind = ' class="wide"' if wide else ""
        image = f'<img src="{source}" alt="{escape(caption, quote=True)}">'
        self.pictures.append(f"<figure{kind}>{image}<figcaption>{escape(caption)}</figcaption></figure>")

    def lack(self, what: str, why: str) -> None:
        """Say that something is not in the record."""
        self.lacks.append(f"{what}: {why}")

    def html(self) -> str:
        """The section's part of the page."""
        parts = [f"<section><h2>{escape(self.title)}</h2>", self._about()]
        if self.pictures:
            parts.append(f'<div class="figures">{"".join(self.pictures)}</div>')
        parts.append("<h3>Not in this record</h3><ul>" + "".join(f"<li>{escape(x)}</li>" for x in self.lacks) + "</ul>")
        for title, rows in self.tables:
            name = escape(title) or "main table"
            parts.append(f"<details><summary>{name}, {len(rows)} rows</summary>{html_table(rows)}</details>")
        if self.facts:
            rows = [{"fact": name, "value": value} for name, value in self.facts.items()]
            parts.append(f"<details><summary>facts, {len(rows)}</summary>{html_table(rows, 'about')}</details>")
        return "\n".join([*parts, "</section>"])

    def _about(self) -> str:
        known = {"file": self.source} | {name: self.about[name] for name in ABOUT if self.about.get(name)}
        known |= {name: value for name, value in self.about.items() if name not in ABOUT}
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{_code(k, v)}</td></tr>" for k, v in known.items())
        return f'<div class="scroll"><table class="about">{rows}</table></div>'


def _code(name: str, value: Any) -> str:
    text = escape(cell(value))
    return f"<code>{text}</code>" if name in ("command", "commit", "file") else text


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    kept = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lasp"}):
        figure.savefig(kept, format="svg", metadata={"Date": None})
    return kept.getvalue()


def html_table(rows: Sequence[dict], kind: str = "") -> str:
    """Rows with the columns that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell(row.get(name)))}</td>" for name in columns) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


# ---- records of benchmarks


def of_record(path: Path) -> Section:
    """What a JSON under bench/results, or a trace of overlap.py, holds."""
    result = read_object(path)
    check_record(result, path)
    about = {"command": result.get("command"), **result.get("environment", {})}
    if "ranks" in result and "what" in result:
        return of_trace(result, about, path)
    if not isinstance(result.get("benchmark"), str):
        raise SystemExit(f"{path}: no record of a benchmark: it has no 'benchmark'")
    section = Section(result["benchmark"], about, source=path.name)
    section.facts = result.get("facts", {})
    section.tables = [(title, rows) for title, rows in tables_of(result) if rows]
    if not section.tables:
        section.lack("tables", "this record holds no rows")
    section.lack("loss by step", "a benchmark's record holds none; --metrics metrics.jsonl draws that of a training")
    speed_over_length(section)
    memory_by_rank(section)
    exposed_communication(section)
    if (kind := plots.kind_of(result)) in OWN:
        picture = plots.figure_of(result, path.name)
        section.picture(picture, f"The record's own picture, as bench/plots.py draws it ({kind}).", wide=True)
    return section


def check_record(result: dict, path: Path) -> None:
    """End the program, with the file's name, if a part of a record is not what benchmarks write."""
    for name in ("environment", "facts", "tables"):
        if not isinstance(result.get(name, {}), dict):
            raise SystemExit(f"{path}: {name!r} must be an object, got {type(result[name]).__name__}")
    for title, rows in tables_of(result):
        name = f"the table {title!r}" if title else "'rows'"
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise SystemExit(f"{path}: {name} must be a list of objects, got {json.dumps(rows):.60}")
        for row in rows:
            for column in (MEMORY_BY_RANK, EXPOSED_BY_RANK):
                if not isinstance(row.get(column), list | None):
                    raise SystemExit(f"{path}: {column!r} must be a list, a number a rank, got {row[column]!r:.60}")


def tables_of(result: dict) -> list[tuple[str, list[dict]]]:
    """All tables of a record, the main one first."""
    return [("", result.get("rows", [])), *result.get("tables", {}).items()]


def first_of(names: Sequence[str], rows: Sequence[dict]) -> str | None:
    """The first of the columns that holds numbers."""
    return next((name for name in names if any(isinstance(row.get(name), int | float) for row in rows)), None)


def names_of(rows: Sequence[dict], *, but: Iterable[str | None] = ()) -> list[str]:
    """What tells rows apart, in words."""
    columns = [name for name in WHAT if name not in but and len({str(row.get(name)) for row in rows}) > 1]
    return [textwrap.fill(", ".join(_name(name, row) for name in columns), 30) for row in rows]


def _name(column: str, row: dict) -> str:
    if column == "layout" and "ranks" in row:
        return plots.who(row["layout"], row["ranks"], "rank")
    value = cell(row.get(column))
    if column in ("GPUs", "blocks recomputed", "experts"):
        return f"{value} {'GPU' if (value, column) == ('1', 'GPUs') else column}"
    return value


def speed_over_length(section: Section) -> None:
    """Tokens a second over the length of a sequence, a line for each thing that was measured."""
    drawn = False
    for title, rows in section.tables:
        speed, length = first_of(SPEEDS, rows), first_of(LENGTHS, rows)
        if speed is None or length is None:
            continue
        rows = [row for row in rows if all(isinstance(row.get(name), int | float) for name in (speed, length))]
        of = plots.groups([{**row, "name": name} for row, name in zip(rows, names_of(rows, but=(length,)))], "name")
        caption = f"{speed} over the length ({length}){f', of the table {title!r}' if title else ''}."
        most = max(len(line) for line in of.values())
        if len(of) > 8 or most == 1:
            longest = [max(line, key=lambda row: row[length]) for line in of.values()]
            names = [f"{row['name']}\n{row[length]:,} tokens".strip() for row in longest]
            lines = max(name.count("\n") for name in names) + 1
            figure = plots.sheet(figsize=(4.8, max(2.4, 0.6 + 0.17 * lines * len(names))))
            axes = figure.subplots()
            plots.bars(axes, names, [row[speed] for row in longest], speed)
            axes.tick_params(labelsize=7.5)
            caption += " Of each the longest." if most > 1 else ""
        else:
            figure = plots.sheet(figsize=(4.8, 3.4))
            speed_lines(figure.subplots(), of, speed, length)
        section.picture(figure, caption)
        drawn = True
    if not drawn:
        section.lack("tokens/s over the length", "no table has both")


def speed_lines(axes: Any, of: dict[tuple, list[dict]], speed: str, length: str) -> None:
    """A line for each name."""
    for number, ((name,), line) in enumerate(of.items()):
        line = sorted(line, key=lambda row: row[length])
        style = {"marker": "os^vD"[number % 5], "markersize": 4, "color": plots.PALETTE[number % len(plots.PALETTE)]}
        axes.plot([row[length] for row in line], [row[speed] for row in line], label=name or "_", **style)
    ticks = sorted({row[length] for line in of.values() for row in line})
    plots.double_steps(axes, ticks if len(ticks) < 9 else {ticks[0], *ticks[::-2]}, "tokens")
    plots.room(axes)
    axes.tick_params(labelsize=8)
    axes.set_ylim(0, 1.2 * max(row[speed] for line in of.values() for row in line))
    axes.yaxis.set_major_formatter(FuncFormatter(plots.thousands))
    axes.set_title(speed, fontsize=10)
    plots.label_lines(axes, 8)


def bar_groups(names: Sequence[str], series: dict[str, Sequence[float | None]], title: str) -> Figure:
    """For each name a bar of each series that has a value there, with the value behind it."""
    lines = max(max(name.count("\n") for name in names) + 1, len(series))
    figure = plots.sheet(figsize=(4.8, max(2.0, 0.7 + (0.17 * lines + 0.1) * len(names))))
    axes, height = figure.subplots(), 0.8 / len(series)
    most = max((value for values in series.values() for value in values if value is not None), default=0.0) or 1.0
    for number, (label, values) in enumerate(series.items()):
        color = plots.PALETTE[number % len(plots.PALETTE)]
        for place, value in enumerate(values):
            if value is not None:
                y = place + (number - (len(series) - 1) / 2) * height
                axes.barh(y, value, 0.9 * height, color=color)
                said = f"{value:.3g}  {label}"
                axes.annotate(said, (max(value, 0), y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7.5)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    least = min(value for values in (*series.values(), [0.0]) for value in values if value is not None)
    axes.set_xlim(least, most + (most - least) * (0.2 + 0.028 * max(map(len, series))))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10)
    return figure


def row_names(rows: Sequence[dict]) -> list[str]:
    """What tells rows apart, and their length."""
    length = first_of(LENGTHS, rows)
    of = names_of(rows, but=(length,))
    return [f"{name}\n{row[length]:,} tokens".strip() if length else name for name, row in zip(of, rows)]


def memory_by_rank(section: Section) -> None:
    """Peak memory of each rank, or of the fullest where that is all that was kept."""
    for title, rows in section.tables:
        of_table = f" Of the table {title!r}." if title else ""
        if any(row.get(MEMORY_BY_RANK) for row in rows):
            known = [row for row in rows if row.get(MEMORY_BY_RANK)]
            ranks = max(len(row[MEMORY_BY_RANK]) for row in known)
            series = {f"rank {r}": [row[MEMORY_BY_RANK][r] for row in known] for r in range(ranks)}
            figure = bar_groups(row_names(known), series, "peak memory by rank, GiB")
            section.picture(figure, f"Most memory that tensors of a rank had at a time, in GiB.{of_table}")
            return
        if (column := first_of(MEMORY, rows)) is not None:
            known = [row for row in rows if isinstance(row.get(column), int | float)]
            figure = bar_groups(row_names(known), {"": [row[column] for row in known]}, "peak memory, GiB")
            section.picture(figure, f"Most memory that tensors of the fullest rank had at a time, in GiB.{of_table}")
            section.lack("memory by rank", "this record holds that of the fullest rank only")
            return
    measured = any(name in row for _, rows in section.tables for row in rows for name in (*MEMORY, MEMORY_BY_RANK))
    section.lack("memory by rank", NO_CPU if measured else "this benchmark measures none")


def exposed_communication(section: Section) -> None:
    """What the exchange adds to a step, and the time in which only NCCL's kernels ran."""
    for title, rows in section.tables:
        known = [row for row in rows if row.get(EXPOSED) or row.get(COSTS) is not None]  # one rank exposes nothing
        if not known:
            continue
        series: dict[str, list[float | None]] = {}
        if any(row.get(COSTS) is not None for row in known):
            series["more than without"] = [row.get(COSTS) for row in known]
        if any(row.get(EXPOSED_BY_RANK) for row in known):
            ranks = max(len(row.get(EXPOSED_BY_RANK) or ()) for row in known)
            for r in range(ranks):
                series[f"only NCCL, rank {r}"] = [(row.get(EXPOSED_BY_RANK) or [None] * ranks)[r] for row in known]
        elif any(row.get(EXPOSED) is not None for row in known):
            series["only NCCL, rank 0"] = [row.get(EXPOSED) for row in known]
            section.lack("exposed communication by rank", "this record holds that of rank 0 only")
        else:
            section.lack("time in which only NCCL's kernels ran", NO_CPU)
        figure = bar_groups(row_names(known), series, "exposed communication, ms of a step")
        caption = (
            "Milliseconds by which a step with the exchange is longer than one without, and those in which NCCL's "
        )
        section.picture(figure, f"{caption}kernels ran and no other did.{f' Of the table {title!r}.' if title else ''}")
        return
    measured = any(EXPOSED in row for _, rows in section.tables for row in rows)
    section.lack("exposed communication", NO_CPU if measured else "this benchmark measures none")


def of_trace(result: dict, about: dict, path: Path) -> Section:
    """A trace of overlap.py."""
    section = Section(f"overlap: {result['what']}", about, source=path.name)
    ranks = range(len(result["ranks"]))
    times = [traces.exposed_us(kernels) for kernels in result["ranks"]]
    figure = bar_groups([f"rank {r}" for r in ranks], {"": times}, "exposed exchange, microseconds")
    section.picture(figure, "Microseconds in which a kernel of the exchange ran and no other did.")
    if peaks := result.get("peak MiB by rank"):
        figure = bar_groups([f"rank {r}" for r in ranks], {"": peaks}, "peak memory by rank, MiB")
        section.picture(figure, "Most memory that tensors of a rank had in a forward and backward, in MiB.")
    else:
        section.lack("memory by rank", "this trace is older than its measurement")
    section.picture(traces.figure_of(result), "Every kernel of one forward and backward.", wide=True)
    section.lack("loss by step, tokens/s over the length", "a trace holds none")
    return section


# ---- metrics of a training


def of_metrics(path: Path) -> Section:
    """What a training by examples/train.py has written."""
    steps = read_metrics(path)
    beside = path.with_name("run.json")
    run = read_object(beside) if beside.exists() else {}
    about = {name: value for name, value in run.items() if not isinstance(value, dict)}
    about = {"command": None, "commit": None, "date": about.pop("started", None), **about}
    section = Section(f"training, {path.parent.name or path.name}", about, source=path.name)
    section.facts = run.get("options", {})
    if not run:
        section.lack("environment and options", f"there is no {beside.name} beside {path.name}")
    curve(section, steps, "loss", "loss, nats", "Loss of each step, and smoothed.", smooth=True)
    rate = "tokens_per_s_per_rank" if "tokens_per_s_per_rank" in steps[0] else "tokens_per_s"
    curve(section, steps, rate, rate.replace("_per_", "/").replace("_", " "), "Tokens a second by step.")
    caption = "Most memory so far on rank 0: of tensors on a GPU, of the process on a CPU."
    curve(section, steps, "peak_memory_bytes", "peak memory, GiB", caption, unit=GIB)
    section.lack("memory by rank", "metrics.jsonl holds that of rank 0 only")
    section.lack("exposed communication", "a training measures none; bench/scaling.py and bench/overlap.py do")
    section.lack("tokens/s over the length", "a training has one length")
    section.tables = [("steps", steps)]
    return section


def curve(
    section: Section, steps: list[dict], name: str, label: str, caption: str, *, unit: float = 1, smooth: bool = False
) -> None:
    """A number over the steps."""
    points = [(m["step"], m[name] / unit) for m in steps if isinstance(m.get(name), int | float)]
    if not points:
        section.lack(label, f"no step has {name!r}")
        return
    figure = plots.sheet(figsize=(4.8, 3.4))
    axes = figure.subplots()
    x, y = zip(*points)
    color = plots.PALETTE[0]
    axes.plot(x, y, color=color, alpha=0.4 if smooth else 1, linewidth=1, marker="." if len(points) < 40 else "")
    if smooth and len(points) > 2:
        axes.plot(x, smoothed(y, max(2, len(y) // 20)), color=color)
    axes.set_ylim(0, 1.1 * max(y))
    axes.set_xlabel("step")
    axes.set_title(label, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_formatter(FuncFormatter(plots.thousands))
    axes.grid(alpha=0.3)
    section.picture(figure, caption)


def smoothed(values: Sequence[float], over: int) -> list[float]:
    """Of each value the mean with those before it, each counting 1 - 1 / `over` times as much as the next.

    As examples/_report.py has it, which imports the library and what a training needs: this page needs neither.
    """
    found, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = total * (1 - 1 / over) + value, weight * (1 - 1 / over) + 1
        found.append(total / weight)
    return found


# ---- files


def parse(text: str) -> Any:
    """JSON of finite numbers, which pictures need; another is a ValueError."""

    def refuse(name: str) -> None:
        raise ValueError(f"a number is {name}")

    return json.loads(text, parse_constant=refuse)


def read_object(path: Path) -> dict:
    """A JSON object; what is none ends the program with the file's name."""
    try:
        found = parse(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def read_metrics(path: Path) -> list[dict]:
    """The steps of a metrics.jsonl; a last line that was cut off does not count."""
    try:
        lines = path.read_text().split("\n")[:-1]
    except OSError as error:
        raise SystemExit(f"{path}: {error}") from None
    steps = []
    for number, line in enumerate(lines, 1):
        try:
            steps.append(parse(line))
        except ValueError as error:
            raise SystemExit(f"line {number} of {path}: {error}") from None
        if not isinstance(steps[-1], dict) or not {"step", "loss"} <= steps[-1].keys():
            raise SystemExit(f"line {number} of {path}: no step and loss in it")
    if not steps:
        raise SystemExit(f"{path}: no step in it")
    return steps


def page(sections: Sequence[Section]) -> str:
    """The whole file."""
    titles = ", ".join(section.title for section in sections)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(titles)}</title><style>{STYLE}</style>"
    body = "\n".join(section.html() for section in sections)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body><h1>Report</h1>\n{body}\n</body></html>\n'


def write(records: Sequence[Path], target: Path, metrics: Sequence[Path] = ()) -> Path:
    """The page of some records and trainings; returns its path."""
    made: list[tuple[Callable[[Path], Section], Path]] = [(of_metrics, path) for path in metrics]
    made += [(of_record, path) for path in records]
    target.write_text(page([_made(make, path) for make, path in made]))
    return target


def _made(make: Callable[[Path], Section], path: Path) -> Section:
    """A section; a text where the page draws a number, say, ends the program with the file's name."""
    try:
        return make(path)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        text = f"{path}: something in it is not what a run writes: {type(error).__name__}: {error}"
        raise SystemExit(text) from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, help="JSON files of bench/results, or docs/overlap_*.json")
    parser.add_argument("--metrics", nargs="+", type=Path, default=[], help="metrics.jsonl of trainings")
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    options = parser.parse_args(argv)
    if not options.records and not options.metrics:
        parser.error("expected a record or --metrics, got neither")
    print(write(options.records, options.out, options.metrics))


if __name__ == "__main__":
    main()
