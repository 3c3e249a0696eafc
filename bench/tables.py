"""Rows of results as text."""

from __future__ import annotations


def table(rows: list[dict], digits: int = 3) -> str:
    """Rows as aligned text; the first row's keys are the columns. Numbers have so many digits that count."""
    columns = list(rows[0])
    cells = [columns] + [[cell(row.get(c), digits) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths)) for line in cells)


def cell(value, digits: int = 3) -> str:
    """A value as tables show it."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"
    if isinstance(value, list):
        return " / ".join(cell(x, digits) for x in value)
    return "-" if value is None else str(value)


def markdown_table(rows: list[dict], digits: int = 3) -> str:
    """Rows as a Markdown table; the first row's keys are the columns."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)] + [[cell(row.get(c), digits) for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
