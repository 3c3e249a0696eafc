"""Draws the picture of docs/exchange.md: `python docs/draw_exchange.py`, which writes exchange.svg.

Each schedule as lines in time, a level a rank. How long what takes is asked of the schedules' own formulas (`seconds`),
with the network that a record of bench/results measured.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from drawing import BACKWARD, FORWARD, LINE, PALE, box, line, svg, text

from lasp.exchange.base import Network, Schedule, Sizes
from lasp.exchange.neighbour import NEIGHBOUR
from lasp.ranks import SCHEDULES

FILE = Path(__file__).parent / "exchange.svg"
RECORD = FILE.parent.parent / "bench" / "results" / "2026-11-22_operator_scaling_4xcuda.json"
RANKS, MIB = 4, 16
SIZES = Sizes(state=MIB * 2**20, gathered=MIB * 2**20, read=MIB * 2**20, columns=256)

WIDTH, HEIGHT = 800, 786
LEFT, RIGHT = 236, 724  # of the time
PANEL, STEP = 142, 26  # heights: of a schedule, of a rank

Stroke = tuple[float, int, float, int]  # from this second and rank to that second and rank

WORDS = {
    "ring": ("one message of one state a", "rank, one after the other"),
    "pipeline": ("the same, cut into blocks of", "columns; a block goes on while", "the next is under way"),
    "all_gather": ("one collective: every rank gets", "what all ranks have"),
    "direct": ("one host: all write, meet, and", "read each other's memory"),
    "neighbour": ("heads whose state is gone", "after one rank's tokens: every", "hop at once"),
}


def network() -> Network:
    """Of four ranks, as the record has it."""
    said = json.loads(RECORD.read_text())["facts"][f"network of {RANKS} ranks as lasp measured it"]
    numbers = dict(re.findall(r"(\w+)=([\d.e+-]+)", said))
    return Network(**{name: float(x) for name, x in numbers.items()}, source="measured")


NETWORK = network()


def hops(schedule: Schedule) -> list[Stroke]:
    """What is sent, or read, when; the last of it ends at `schedule.seconds`."""
    total, last = schedule.seconds(SIZES, RANKS, NETWORK), RANKS - 1
    if schedule.reads:
        met = NETWORK.direct_latency
        return [(met, r, met + (total - met) * r / last, r) for r in range(1, RANKS)]
    if schedule.gathers:
        step = total / last
        return [(n * step, r, (n + 1) * step, (r + 1) % RANKS) for n in range(last) for r in range(RANKS)]
    blocks = schedule.blocks(SIZES, RANKS, NETWORK)
    if schedule is NEIGHBOUR:
        return [(0.0, r, total, r + 1) for r in range(last)]
    step = total / (last - 1 + blocks)
    return [((r + b) * step, r, (r + b + 1) * step, r + 1) for r in range(last) for b in range(blocks)]


def panel(top: float, name: str, schedule: Schedule, scale: float) -> list[str]:
    """One schedule."""
    drawn = [text(24, top + 16, name, size=17, anchor="start", bold=True)]
    for n, words in enumerate(WORDS[name]):
        drawn += [text(24, top + 37 + 17 * n, words, size=12, anchor="start", ink=PALE)]
    seconds, strokes = schedule.seconds(SIZES, RANKS, NETWORK), hops(schedule)
    levels = [top + 12 + STEP * r for r in range(RANKS)]
    for r, y in enumerate(levels):
        drawn += [line(LEFT, y, RIGHT, y, "#e2e4df"), text(LEFT - 8, y + 4, str(r), size=12, anchor="end", ink=PALE)]
    if schedule.reads:
        x = LEFT + scale * NETWORK.direct_latency
        drawn += [box(LEFT, levels[0] - 6, x - LEFT, levels[-1] - levels[0] + 12, "#f6d66b", LINE)]
    for start, source, end, target in strokes:
        x1, x2 = LEFT + scale * start, LEFT + scale * end
        wraps = target < source
        ink, head = (LINE, "") if wraps else (FORWARD, "ahead")
        drawn += [line(x1 + 1, levels[source], x2 - 1, levels[target], ink, head)]
    x = LEFT + scale * seconds
    drawn += [line(x, levels[0] - 8, x, levels[-1] + 8, BACKWARD)]
    return [*drawn, text(x + 8, levels[-1] + 23, f"{1e6 * seconds:.0f} us", size=13, ink=BACKWARD, bold=True)]


def picture() -> str:
    """The whole file."""
    schedules: dict[str, Schedule] = {**SCHEDULES, NEIGHBOUR.name: NEIGHBOUR}
    scale = (RIGHT - LEFT) / max(each.seconds(SIZES, RANKS, NETWORK) for each in schedules.values())
    title = "How a state gets from each rank to those behind it: every schedule in time"
    drawn = [text(LEFT - 8, 32, "rank", size=12, anchor="end", ink=PALE)]
    drawn += [text(LEFT, 32, "time", size=12, anchor="start", ink=PALE)]
    for n, name in enumerate(WORDS):
        drawn += panel(48 + PANEL * n, name, schedules[name], scale)
    words = f'Four H100s of one host, a state of {MIB} MiB, by the formulas with which "auto" chooses.'
    drawn += [text(24, HEIGHT - 30, words, size=12, anchor="start", ink=PALE)]
    words = "Red: the last rank has its state. Gray: what a collective sends and nobody needs. Yellow: the meeting."
    drawn += [text(24, HEIGHT - 13, words, size=12, anchor="start", ink=PALE)]
    return svg(WIDTH, HEIGHT, title, drawn)


if __name__ == "__main__":
    FILE.write_text(picture())
