"""What every benchmark shares: the header that says where a number comes from, a table, and the results file."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str]:
    """Hardware, versions and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    found = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    if torch.cuda.is_available():
        found["device"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    else:
        found["device"] = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return found


def cpu_name() -> str:
    """The processor's model as Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(rows: list[dict]) -> str:
    """Rows as aligned text; the first row's keys are the columns."""
    columns = list(rows[0])
    cells = [columns] + [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths)) for line in cells)


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def report(name: str, command: str, rows: list[dict], *, save: bool, out: Path = RESULTS) -> None:
    """Print the table, and everything as one JSON line last; keep it under bench/results with `save`."""
    result = {"benchmark": name, "command": command, "environment": environment(), "rows": rows}
    print(table(rows))
    if save:
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{result['environment']['date']}_{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"kept as {path.name}")
    print(json.dumps(result))
