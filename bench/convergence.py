"""Is training on split sequences the same training? Final losses with sequence parallelism and without.

    python bench/convergence.py --save                      # all GPUs, or 2 CPU processes; goes on where it stopped
    python bench/convergence.py --budget 540 --save         # begins no cell after nine minutes

LASP's table of convergence: TNL and the linear transformer under each scheme of data parallelism, and, generalised,
other families, a hybrid, and a model of transformers under DDP. "without" deals the sequences of a step out over the
ranks (dp = ranks, sp = 1); "with" splits each of the same sequences over them (dp = 1, sp = ranks). Weights, batches,
learning rates and everything else are the same, so the gap is what another order of sums makes of a training. "fsdp2"
and "zero3" are one scheme by two names: the difference between their rows is that of a second run. A cell is one
training, in processes of its own (cells.py); its loss is the mean of the last 50 steps. The published figures
(published_convergence.csv) are of other text and larger models: only gaps compare.

In fp32 by default, and not faster than 3e-4: at 1e-3 what is rounded otherwise grows within 1,000 steps to 0.011 in the
loss in bf16 and 0.005 in fp32, of either sign, and covers what the table is about; at 3e-4 in fp32 it is 0.0001.

Ends with 1 if a cell is missing, or a gap is more than --largest-gap.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import cells
import plots
from cells import FOREIGN, Cell, mean_of_last
from common import add_report_arguments, command_line, report

SCHEMES = ("ddp", "ddp-legacy", "fsdp2", "zero1", "zero2", "zero3")
LASP = ("tnl", "linear")
GENERALISED = ("gla", "hgrn2", "retnet", "hybrid", FOREIGN)
PUBLISHED = Path(__file__).parent / "published_convergence.csv"
WAYS = ("without", "with")


def published() -> dict[tuple[str, str], dict[str, float]]:
    """Losses without and with, by model and scheme."""
    with PUBLISHED.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {(row["model"], row["scheme"]): {way: float(row[way]) for way in WAYS} for row in rows}


def pairs_of(options: argparse.Namespace) -> dict[tuple[str, str], tuple[Cell, Cell]]:
    """The cells without and with, by model and scheme."""
    found = {}
    for model in options.models:
        for scheme in options.schemes if model in LASP else options.schemes[:1]:
            of = {"model": model, "shape": tuple(options.shape), "scheme": scheme, "batch": options.batch}
            of |= cells.given_of(options)
            found[model, scheme] = (
                Cell(name=f"{model}, {scheme}, without", dp=options.ranks, sp=1, **of),
                Cell(name=f"{model}, {scheme}, with", dp=1, sp=options.ranks, **of),
            )
    return found


def rows_of(pairs: dict[tuple[str, str], tuple[Cell, Cell]], results: dict, last: int) -> list[dict]:
    """A row for each pair of which both are trained."""
    rows, theirs = [], published()
    for (model, scheme), cells_of in pairs.items():
        if not all(cell.name in results for cell in cells_of):
            continue
        without, with_ = (results[cell.name] for cell in cells_of)
        a, b = (mean_of_last(result["losses"], last) for result in (without, with_))
        known = theirs.get((model, scheme), {})
        largest = max(abs(x - y) for x, y in zip(without["losses"], with_["losses"]))
        rows.append(
            {
                "model": model,
                "scheme": scheme,
                "without": round(a, 5),
                "with": round(b, 5),
                "gap": b - a,
                "largest of a step": largest,
                "published without": known.get("without"),
                "published with": known.get("with"),
                "published gap": round(known["with"] - known["without"], 3) if known else None,
                "tokens/s without": round(without["tokens/s"]),
                "tokens/s with": round(with_["tokens/s"]),
                "GiB without": without["peak GiB"],
                "GiB with": with_["peak GiB"],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*LASP, *GENERALISED), default=[*LASP, *GENERALISED])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="the first for all models")
    parser.add_argument("--shape", nargs=4, type=int, default=[4, 256, 4, 768], help="layers, width, heads, gated unit")
    parser.add_argument("--batch", type=int, help="sequences of a step, of all ranks together; default: ranks")
    parser.add_argument("--largest-gap", type=float, default=0.005, help="between with and without")
    cells.add_arguments(parser, dtype="float32", lr=3e-4)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    options.batch = options.batch or options.ranks
    if options.batch % options.ranks:
        parser.error(f"--batch must be a multiple of --ranks {options.ranks}, got {options.batch}")
    text = cells.text_of(options, parser)
    name = cells.benchmark("convergence", options.ranks)
    kept = options.kept or cells.RUNS / f"{name}.json"
    pairs = pairs_of(options)
    all_cells = [cell for pair in pairs.values() for cell in pair]
    try:
        results = cells.train_all(all_cells, kept, same=cells.same_of(options, text, "shape", "batch"), options=options)
    except cells.Refused as error:
        parser.error(f"--kept: {error}")
    missing = [cell.name for cell in all_cells if cell.name not in results]
    rows = rows_of(pairs, results, options.last)
    if not rows:
        sys.exit(f"no pair of cells is complete; missing: {'; '.join(missing)}")
    worst = max(rows, key=lambda row: abs(row["gap"]))
    facts = {
        "largest gap": abs(worst["gap"]),
        "of": f"{worst['model']}, {worst['scheme']}",
        "allowed": options.largest_gap,
        "layers, width, heads, gated unit": options.shape,
        "sequences of a step": options.batch,
        "missing": missing,
        **cells.facts_of(results, options, text),
    }
    path = report(
        name,
        command_line("convergence.py", argv),
        rows,
        tables={"mean losses up to a step, since the one before": cells.curves(results)},
        facts=facts,
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        markdown=True,
        digits=5,
    )
    if path:
        plots.draw(path)
    if missing or not abs(worst["gap"]) <= options.largest_gap:
        sys.exit(1)


if __name__ == "__main__":
    main()
