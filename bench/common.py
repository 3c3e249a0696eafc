"""What every benchmark shares: the header that says where a number comes from, and the results files."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from tables import cell, markdown_table, table

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Hardware, versions and commit ("-dirty" if files differ from it)."""
    found = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["device"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        found["device"] = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"


def cpu_name() -> str:
    """The processor's model as Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(
    name: str,
    command: str,
    rows: list[dict],
    *,
    save: bool,
    out: Path = RESULTS,
    tables: dict[str, list[dict]] | None = None,
    facts: dict | None = None,
    markdown: bool = False,
    commit: str | None = None,
    digits: int = 3,
    html: bool = False,
) -> Path | None:
    """Print the tables, and everything as one JSON line last; keep it under bench/results with `save`.

    `rows` is the main table, `tables` are others by title, `facts` what belongs in no table. With `markdown` a
    readable .md is kept beside the .json, with `html` a page that shows it (html_report.py). `commit` is for a machine
    that has the files but not their history. The tables show so many `digits` that count; the JSON has all.
    Returns the path of the .json if it was kept.
    """
    everything = {title: t for title, t in {"": rows, **(tables or {})}.items() if t}
    result = {"benchmark": name, "command": command, "environment": environment(), "rows": rows}
    if commit is not None:
        result["environment"]["commit"] = commit
    result |= {"tables": tables or {}, "facts": facts or {}} if tables or facts else {}
    for title, t in everything.items():
        print(f"\n{title}\n{table(t, digits)}" if title else table(t, digits))
    for what, value in (facts or {}).items():
        print(f"{what}: {_fact(value)}")
    path = None
    if save:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{result['environment']['date']}_{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        if markdown:
            parts = [f"# {name}", f"`{command}`", "; ".join(f"{k} {v}" for k, v in result["environment"].items())]
            parts += ["\n".join(f"- {what}: {_fact(value)}" for what, value in (facts or {}).items())]
            for title, t in everything.items():
                parts += [f"## {title}", markdown_table(t, digits)] if title else [markdown_table(t, digits)]
            path.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
        if html:
            import html_report  # draws with matplotlib, which nothing else here needs

            html_report.write([path], path.with_suffix(".html"))
        print(f"kept as {path.name}")
    print(json.dumps(result))
    return path


class _SaveWithPage(argparse.Action):
    def __init__(self, **options):
        super().__init__(**options, nargs=0, default=False)

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.html = namespace.save = True


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """What every script can be told about its results: --save, --html, --out, --commit."""
    parser.add_argument("--save", action="store_true", help="keep tables, JSON and plots under bench/results")
    parser.add_argument(
        "--html", action=_SaveWithPage, help="--save, and beside them a page with curves: DATE_NAME.html"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="another folder for --save")
    parser.add_argument("--commit", help="the commit, on a machine that has the files but not their history")


def command_line(script: str, argv: list[str] | None, ranks: int | None = None) -> str:
    """How a script was called, for its results; by torchrun, if it runs on several ranks."""
    launcher = ["python"] if ranks is None else ["torchrun", "--nproc-per-node", str(ranks)]
    return shlex.join([*launcher, f"bench/{script}", *(sys.argv[1:] if argv is None else argv)])


def _fact(value) -> str:
    return ", ".join(str(x) for x in value) or "none" if isinstance(value, list) else cell(value)
