"""Draws the picture of docs/kernels.md: `python docs/draw_kernels.py`, which writes kernels.svg.

The call is that of draw_how_it_works.py. How it is cut, and how its kernels run, is asked of `lasp_kernels.plan`.
"""

from __future__ import annotations

from pathlib import Path

from draw_how_it_works import CHANNELS, HEADS, PLAN, SHARD, SUBSCRIPTS
from drawing import BACKWARD, FORWARD, INK, PALE, SHADE, box, line, svg, text

from lasp_kernels.plan import Plan

FILE = Path(__file__).parent / "kernels.svg"
KEYS = Plan.of(PLAN.sizes._replace(for_keys=True))  # of the gradients of k and v
WALK = PLAN.walk_blocks(CHANNELS, CHANNELS, row_sums=False, moves=True)
PROCESSORS = PLAN.sizes.processors
GRID = HEADS * WALK.count * PLAN.segments
CHUNKS = PLAN.segment_length // PLAN.walk_tile
KEPT = PLAN.slots * HEADS * CHANNELS**2 * 4 // 2**20  # MiB: fp32 states at the borders of segments

WIDTH, HEIGHT = 800, 792
LABELS, LEFT, RIGHT = 24, 158, 750  # what a row is; its segments
KEEP = "#f6d66b"


def borders(plan: Plan) -> list[float]:
    """Where segments begin and end."""
    return [LEFT + n * (RIGHT - LEFT) / plan.segments for n in range(plan.segments + 1)]


def label(y: float, words: str, file: str) -> list[str]:
    """Of a row: what it makes, and the file of its kernel."""
    drawn = [text(LABELS, y, words, size=14, anchor="start")]
    return [*drawn, text(LABELS, y + 17, file, size=12, anchor="start", ink=PALE)]


def row(y: float, plan: Plan, words: str, edge: str, shade: str) -> list[str]:
    """A box for each segment."""
    places, drawn = borders(plan), []
    for left, right in zip(places, places[1:]):
        drawn += [box(left + 3, y, right - left - 6, 34, shade, edge), text((left + right) / 2, y + 22, words, size=13)]
    return drawn


def scan(y: float, plan: Plan, letter: str, ink: str, *, reverse: bool) -> list[str]:
    """The states at the borders, one after the other; from and to other ranks at the ends."""
    places, drawn = borders(plan), []
    head, way = ("back", -1) if reverse else ("ahead", 1)
    for n, x in enumerate(places):
        drawn += [box(x - 17, y - 14, 34, 28, "#ffffff" if reverse else KEEP, ink)]
        drawn += [text(x, y + 5, f"{letter}{(*SUBSCRIPTS, '₄')[n]}", ink=INK, bold=True)]
    for left, right in zip(places, places[1:]):
        start, end = (right, left) if reverse else (left, right)
        drawn += [line(start + 19 * way, y, end - 19 * way, y, ink, head)]
        drawn += [line((left + right) / 2, y - 26, (left + right) / 2, y - 3, ink, head)]
    outer = (LEFT - 44, LEFT - 19, RIGHT + 19, RIGHT + 44)
    first, second, third, fourth = reversed(outer) if reverse else outer
    return [*drawn, line(first, y, second, y, ink, head), line(third, y, fourth, y, ink, head)]


def forward() -> list[str]:
    """Three launches."""
    drawn = [text(LABELS, 34, "Forward", size=18, anchor="start", bold=True, ink=FORWARD)]
    drawn += [text(118, 34, "of one head; yellow: kept for backward", size=14, anchor="start", ink=PALE)]
    drawn += [text(LABELS, 74, "tokens", size=14, anchor="start")]
    drawn += row(52, PLAN, f"segment: {PLAN.segment_length:,}", "#8a8f98", SHADE[0])
    drawn += label(118, "1  local states", "state.py")
    drawn += row(104, PLAN, "S from zero", FORWARD, SHADE[1])
    for left, right in zip(borders(PLAN), borders(PLAN)[1:]):  # pieces
        width = (right - left - 6) / PLAN.pieces
        places = [left + 3 + n * width for n in range(1, PLAN.pieces)]
        drawn += [line(x, 104, x, 109, FORWARD) for x in places] + [line(x, 133, x, 138, FORWARD) for x in places]
    drawn += label(162, "2  scan", "state.py") + scan(166, PLAN, "S", FORWARD, reverse=False)
    drawn += label(220, "3  outputs", "output.py") + row(206, PLAN, "walk: o", FORWARD, SHADE[1])
    return drawn + [line(x + 10, 181, x + 22, 204, FORWARD, "ahead") for x in borders(PLAN)[:-1]]


def thread_block() -> list[str]:
    """What one of them does, chunk by chunk."""
    top, stages = 262, WALK.config.stages
    drawn = [box(LABELS, top, WIDTH - 2 * LABELS, 216, "#ffffff")]
    title = f"One thread block of 3: a loop over {CHUNKS} chunks of {PLAN.walk_tile} tokens"
    drawn += [text(LABELS + 16, top + 26, title, size=15, anchor="start", bold=True)]
    drawn += [box(LABELS + 16, top + 44, 150, 62, KEEP, FORWARD)]
    drawn += [text(LABELS + 91, top + 70, f"S, {CHANNELS} x {WALK.columns}, fp32", size=14)]
    drawn += [text(LABELS + 91, top + 91, "in registers", size=13, ink=PALE)]
    names = ["chunk i", *(f"i + {n}" for n in range(1, stages))]
    left, width = LABELS + 200, (WIDTH - 2 * LABELS - 216) / len(names)
    for n, name in enumerate(names):
        drawn += [box(left + n * width, top + 44, width - 8, 34, SHADE[2] if n == 0 else SHADE[0], FORWARD)]
        drawn += [text(left + n * width + (width - 8) / 2, top + 66, name, size=13)]
    drawn += [text(left, top + 97, "in the products", size=13, ink=PALE, anchor="start")]
    words = f"loading: q, k, v into shared memory by TMA, {stages} stages"
    drawn += [text(left + width, top + 97, words, size=13, ink=PALE, anchor="start")]
    lines = (
        ("P = (q kᵀ) * decays between two tokens, 0 above the diagonal", "within the chunk"),
        ("o = P v + (decay since the chunk began) * (q S)", "and from all before it"),
        ("S ← (decay of the chunk) S + kᵀ (decay to its end * v)", "for the next chunk"),
    )
    for n, (words, why) in enumerate(lines):
        y = top + 130 + 22 * n
        drawn += [text(LABELS + 16, y, words, size=14, anchor="start")]
        drawn += [text(WIDTH - LABELS - 16, y, why, size=13, anchor="end", ink=PALE)]
    words = f"{HEADS} heads x {WALK.count} blocks of {WALK.columns} columns x {PLAN.segments} segments = {GRID}"
    words += f" thread blocks of {WALK.config.warps} warps, on {PROCESSORS} SMs"
    return [*drawn, text(LABELS + 16, top + 202, words, size=13, anchor="start", ink=PALE)]


def backward() -> list[str]:
    """Four launches."""
    top = 516
    drawn = [text(LABELS, top, "Backward", size=18, anchor="start", bold=True, ink=BACKWARD)]
    words = "D is the gradient of S, and goes from the last token to the first"
    drawn += [text(130, top, words, size=14, anchor="start", ink=PALE)]
    drawn += label(top + 34, "1  local states", "state.py") + row(top + 20, KEYS, "D from zero", BACKWARD, SHADE[2])
    drawn += label(top + 82, "2  dq", "output.py")
    drawn += row(top + 68, PLAN, "walk: dq", BACKWARD, SHADE[2])
    for n, x in enumerate(borders(PLAN)[:-1]):
        drawn += [box(x + 8, top + 73, 28, 24, KEEP, FORWARD)]
        drawn += [text(x + 22, top + 90, f"S{SUBSCRIPTS[n]}", size=13, bold=True)]
    drawn += label(top + 136, "3  scan", "state.py") + scan(top + 140, KEYS, "D", BACKWARD, reverse=True)
    drawn += label(top + 194, "4  dk and dv", "gradient.py")
    drawn += row(top + 180, KEYS, "two walks in one grid: dk, dv", BACKWARD, SHADE[2])
    drawn += [line(x - 10, top + 155, x - 22, top + 178, BACKWARD, "back") for x in borders(KEYS)[1:]]
    words = f"{SHARD:,} tokens, {HEADS} heads of {CHANNELS} x {CHANNELS}, bf16, a fixed decay, on an H100."
    drawn += [text(LABELS, top + 244, words, size=13, anchor="start", ink=PALE)]
    words = f"Arrows at the ends: other ranks. Kept beside the inputs: {PLAN.slots} states a head, {KEPT} MiB in all."
    return [*drawn, text(LABELS, top + 263, words, size=13, anchor="start", ink=PALE)]


def picture() -> str:
    """The whole file."""
    title = "Linear attention on one GPU: local states, a scan, and walks over chunks; backward is the mirror image"
    return svg(WIDTH, HEIGHT, title, [*forward(), *thread_block(), *backward()])


if __name__ == "__main__":
    FILE.write_text(picture())
