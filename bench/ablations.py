"""What each part of TNL is worth, and TNL beside other families: trained on the same tokens.

    python bench/ablations.py parts --save                  # all GPUs, or 2 CPU processes; goes on where it stopped
    python bench/ablations.py sizes --budget 540 --save     # begins no cell after nine minutes
    sbatch bench/ablations.sbatch                           # larger ones, on a cluster

`parts`: TNL with one part off or otherwise, and TransNormer, RetNet and LLaMA (softmax attention) of the same shape:
final loss, loss curve, memory and tokens/s. Beside the gaps to TNL stand the published ones, of models of 385M after
100,000 steps on other text (published_ablations.csv).

`sizes`: TNL, HGRN2, cosFormer2 and LLaMA at some sizes of "Scaling Laws for Linear Complexity Language Models" (arXiv
2406.16690, table 7; `lasp.models.sizes`): the loss of text, and, of a second training with as many tokens, the share of
questions of associative recall (examples/_needles.py) that are answered right. This is no reproduction: a few tens of
millions of tokens are no scaling law. With --sizes, --steps and --data it is the command that would be one.

Sequences are split over all ranks, or --sp of them. A cell is one training, in processes of its own (cells.py). Ends
with 1 if a cell is missing.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import cells
import plots
from cells import PARTS, RECALL, Cell, mean_of_last
from common import add_report_arguments, command_line, report

from lasp.data_parallel.schemes import SCHEMES
from lasp.models.sizes import SIZES

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from _model import LEARNING_RATES

PUBLISHED = Path(__file__).parent / "published_ablations.csv"
NAMES = {
    "tnl": "TNL",
    "transnormer": "TransNormer",
    "retnet": "RetNet",
    "softmax": "LLaMA (softmax)",
    "hgrn2": "HGRN2",
    "cosformer2": "cosFormer2",
}
OF_PARTS = [("tnl", part) for part in PARTS] + [(model, "") for model in ("transnormer", "retnet", "softmax")]
OF_SIZES = ("tnl", "hgrn2", "cosformer2", "softmax")
RATE = 1e-3  # of parts


def published() -> dict[tuple[str, str], float]:
    """Losses by model and part."""
    with PUBLISHED.open() as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {(row["model"], row["part"]): float(row["loss"]) for row in rows}


def split_of(options: argparse.Namespace) -> dict:
    """The fields of every cell that say how it is split, and how long it is trained."""
    of = {"dp": options.ranks // options.sp, "sp": options.sp, "scheme": options.scheme}
    return {**cells.given_of(options), **of, "keys": options.keys}


def what(model: str, part: str) -> str:
    return f"{NAMES[model]}, {part}" if part else NAMES[model]


# ---- parts


def cells_of_parts(options: argparse.Namespace) -> list[Cell]:
    """TNL as it is first."""
    of = {**split_of(options), "batch": options.batch, "lr": options.lr or RATE, "shape": tuple(options.shape)}
    return [Cell(name=what(model, part), model=model, part=part, **of) for model, part in OF_PARTS]


def rows_of_parts(of: list[Cell], results: dict, last: int) -> list[dict]:
    """A row for each cell that is trained."""
    theirs, rows = published(), []
    base = results.get(of[0].name)
    for cell in of:
        if (result := results.get(cell.name)) is None:
            continue
        loss, known = mean_of_last(result["losses"], last), theirs.get((cell.model, cell.part))
        gap = None if base is None else loss - mean_of_last(base["losses"], last)
        rows.append(
            {
                "what": cell.name,
                "loss": round(loss, 5),
                "gap": gap,
                "published loss": known,
                "published gap": None if known is None else round(known - theirs["tnl", ""], 3),
                "parameters, millions": result["parameters"] / 1e6,
                "tokens/s": round(result["tokens/s"]),
                "peak GiB": result["peak GiB"],
            }
        )
    return rows


# ---- sizes


def cells_of_sizes(options: argparse.Namespace) -> list[Cell]:
    """A cell of text and one of recall, of as many tokens, for each model and size."""
    found = []
    for size in options.sizes:
        for model in OF_SIZES:
            rate = options.lr or LEARNING_RATES[size.split("-")[-1]]
            of = {**split_of(options), "model": model, "shape": SIZES[size], "lr": rate}
            name = f"{NAMES[model]}, {size}"
            found.append(Cell(name=name, batch=options.batch, **of))
            batch = options.batch * options.seq_len // options.recall_len
            of = {**of, "seq_len": options.recall_len, "batch": batch, "task": RECALL}
            found.append(Cell(name=f"{name}, recall", **of))
    return found


def rows_of_sizes(of: list[Cell], results: dict, last: int) -> list[dict]:
    """A row for each cell of text that is trained, with what its pair has recalled."""
    rows = []
    for cell in of:
        if cell.task == RECALL or (result := results.get(cell.name)) is None:
            continue
        recall = results.get(f"{cell.name}, recall")
        model, size = cell.name.rsplit(", ", 1)
        rows.append(
            {
                "cell": cell.name,
                "model": model,
                "size": size,
                "parameters, millions": result["parameters"] / 1e6,
                "FLOP": result["FLOP of a token"] * cell.batch * cell.seq_len * cell.steps,
                "loss": round(mean_of_last(result["losses"], last), 5),
                "recall accuracy": None if recall is None else round(recall["accuracy"], 4),
                "recall loss": None if recall is None else round(mean_of_last(recall["losses"], last), 5),
                "tokens/s": round(result["tokens/s"]),
                "peak GiB": result["peak GiB"],
            }
        )
    return rows


SUITES = {"parts": (cells_of_parts, rows_of_parts), "sizes": (cells_of_sizes, rows_of_sizes)}


def options_of(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The command line, if it fits together."""
    parser.add_argument("suite", choices=list(SUITES))
    shape = SIZES["scaling-70M"]
    parser.add_argument("--shape", nargs=4, type=int, default=shape, help="of parts: layers, width, heads, gated unit")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["scaling-70M", "scaling-160M"])
    parser.add_argument("--batch", type=int, help="sequences of a step, of all ranks together; default: ranks")
    parser.add_argument("--sp", type=int, help="ranks that share a sequence; default: all")
    parser.add_argument("--scheme", choices=SCHEMES, default="ddp", help="of data parallelism")
    parser.add_argument("--keys", type=int, default=16, help="of a sequence of recall")
    parser.add_argument("--recall-len", type=int, default=1024, help="tokens of a sequence of recall")
    cells.add_arguments(parser, lr=None)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    options.sp = options.sp or options.ranks
    options.batch = options.batch or options.ranks
    if options.sp < 1 or options.ranks % options.sp:
        parser.error(f"--sp must divide --ranks {options.ranks}, got {options.sp}")
    if options.batch % (options.ranks // options.sp):
        parser.error(f"--batch must be a multiple of --ranks / --sp, got {options.batch}")
    if options.suite == "sizes":
        if options.recall_len < 8 * options.keys or options.keys < 2:
            parser.error(f"--recall-len must be at least 8 times --keys, got {options.recall_len} and {options.keys}")
        if options.seq_len % options.recall_len:
            parser.error(f"--recall-len must divide --seq-len {options.seq_len}, got {options.recall_len}")
    return options


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = options_of(parser, argv)
    text = cells.text_of(options, parser)
    make, rows_of = SUITES[options.suite]
    name = cells.benchmark(f"ablations_{options.suite}", options.ranks)
    kept, of = options.kept or cells.RUNS / f"{name}.json", make(options)
    # A file may get further sizes later.
    own = ("shape",) if options.suite == "parts" else ("keys", "recall_len")
    same = cells.same_of(options, text, "batch", "sp", "scheme", *own)
    try:
        results = cells.train_all(of, kept, same=same, options=options)
    except cells.Refused as error:
        parser.error(f"--kept: {error}")
    missing = [cell.name for cell in of if cell.name not in results]
    rows = rows_of(of, results, options.last)
    if not rows:
        sys.exit(f"no row is complete; missing: {'; '.join(missing)}")
    facts = {
        "ranks of a sequence": options.sp,
        "data parallelism": f"{options.ranks // options.sp}, {options.scheme}",
        "sequences of a step": options.batch,
        "learning rates, highest": sorted({cell.lr for cell in of}),
        "missing": missing,
        **cells.facts_of(results, options, text),
    }
    if options.suite == "parts":
        facts["layers, width, heads, gated unit"] = list(options.shape)
    else:
        task = cells.task_of(of[0])
        facts |= {"chance": 1 / task.values, "keys": task.keys, "tokens of a sequence of recall": options.recall_len}
    on_text = {cell.name: results[cell.name] for cell in of if cell.name in results and cell.task != RECALL}
    on_recall = {cell.name: results[cell.name] for cell in of if cell.name in results and cell.task == RECALL}
    curves = {"mean losses up to a step, since the one before": cells.curves(on_text)}
    if on_recall:
        curves["the same of recall"] = cells.curves(on_recall)
    path = report(
        name,
        command_line("ablations.py", argv),
        rows,
        tables=curves,
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
    if missing:
        sys.exit(1)


if __name__ == "__main__":
    main()
