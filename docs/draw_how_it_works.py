"""Draws the picture of docs/how-it-works.md: `python docs/draw_how_it_works.py`, which writes how-it-works.svg.

How long tiles and segments are is asked of the code that decides it (`lasp_kernels.plan`).
"""

from __future__ import annotations

from pathlib import Path

from drawing import BACKWARD, FORWARD, PALE, SHADE, box, line, svg, text

from lasp_kernels.plan import HEAD_DECAY, Plan, Sizes

FILE = Path(__file__).parent / "how-it-works.svg"
RANKS = 4
# The call whose numbers are shown: 131,072 tokens a rank, 16 heads of 128 x 128 in bf16, on an H100.
SHARD, HEADS, CHANNELS = 131_072, 16, 128
PLAN = Plan.of(
    Sizes(
        batch=1,
        tokens=SHARD,
        heads=HEADS,
        groups=1,
        key_dim=CHANNELS,
        value_dim=CHANNELS,
        itemsize=2,
        decay=HEAD_DECAY,
        token_stride=HEADS * CHANNELS,
        processors=132,
        has_tma=True,
    )
)

WIDTH, HEIGHT = 800, 820
LEFT, COLUMN, GAP, BOX = 40, 165, 20, 56  # of the four columns; the height of a box
SUBSCRIPTS = "₀₁₂₃"


def column(rank: int) -> float:
    """The left edge of a rank's column."""
    return LEFT + rank * (COLUMN + GAP)


def row(y: float, words: list[tuple[str, str]], edge: str) -> list[str]:
    """A box with two lines of words for each rank."""
    drawn = []
    for rank, (first, second) in enumerate(words):
        middle = column(rank) + COLUMN / 2
        drawn += [box(column(rank), y, COLUMN, BOX, SHADE[rank], edge)]
        drawn += [text(middle, y + 24, first), text(middle, y + 45, second, size=13, ink=PALE)]
    return drawn


def levels() -> list[str]:
    """The sequence, a shard of it, a segment of that, and its tiles."""
    right = column(RANKS - 1) + COLUMN
    drawn = [text(LEFT, 34, "One sequence, cut three times", size=18, anchor="start", bold=True)]
    for rank in range(RANKS):
        drawn += [box(column(rank), 48, COLUMN, 40, SHADE[rank])]
        drawn += [text(column(rank) + COLUMN / 2, 73, f"rank {rank}: {SHARD:,} tokens", size=13)]
    drawn += [line(column(1), 88, LEFT, 112), line(column(1) + COLUMN, 88, right, 112)]
    width = (right - LEFT) / PLAN.segments
    for n in range(PLAN.segments):
        drawn += [box(LEFT + n * width, 112, width, 40, SHADE[1])]
        drawn += [text(LEFT + (n + 0.5) * width, 137, f"segment: {PLAN.segment_length:,}", size=14)]
    drawn += [line(LEFT + width, 152, LEFT, 176), line(LEFT + 2 * width, 152, right, 176)]
    tiles, ticks = PLAN.segment_length // PLAN.walk_tile, 24
    drawn += [box(LEFT, 176, right - LEFT, 26, SHADE[1])]
    places = [LEFT + n * (right - LEFT) / ticks for n in range(1, ticks)]
    drawn += [line(x, 176, x, 202) for x in places]
    words = f"{tiles} tiles of {PLAN.walk_tile} tokens: a tile is one step of a program, a segment is one program,"
    drawn += [text(LEFT, 224, words, size=14, ink=PALE, anchor="start")]
    words = "a shard is one rank. What goes between two of them is always a state, K x V numbers a head."
    return [*drawn, text(LEFT, 243, words, size=14, ink=PALE, anchor="start")]


def travel(y: float, ink: str, head: str, letters: str, *, reverse: bool) -> list[str]:
    """What enters each shard (E, or X in reverse), what leaves it, and the arrows from one to the next."""
    entering, own = letters
    drawn = []
    for rank in range(RANKS):
        first = rank == (RANKS - 1 if reverse else 0)
        n = SUBSCRIPTS[rank]
        left = column(rank)
        enters, leaves = (left + 150, left + 50) if reverse else (left + 15, left + 115)
        drawn += [text(enters, y + 5, "0" if first else f"{entering}{n}", ink=ink, bold=True)]
        drawn += [text(leaves, y + 5, f"{own}{n}" if first else f"A{n}{entering}{n} + {own}{n}", ink=ink, bold=True)]
        side, half = (-1, 14 if first else 48) if reverse else (1, 14 if first else 48)  # of the sum
        drawn += [line(enters + 14 * side, y, leaves - (half + 2) * side, y, ink, head)]
        last = rank == (0 if reverse else RANKS - 1)
        if not last:
            drawn += [line(leaves + half * side, y, leaves + (COLUMN + GAP - 116) * side, y, ink, head)]
        drawn += [line(leaves, y - 40, leaves, y - 14, ink, head), line(enters, y + 14, enters, y + 38, ink, head)]
    return drawn


def heading(y: float, name: str, words: str, ink: str) -> list[str]:
    """Of a half of the picture."""
    drawn = [text(LEFT, y, name, size=18, anchor="start", bold=True, ink=ink)]
    return [*drawn, text(LEFT + 110, y, words, size=14, ink=PALE, anchor="start")]


def forward() -> list[str]:
    """Local states, the exchange from left to right, outputs."""
    y = 288
    drawn = heading(y, "Forward", "states go to the right", FORWARD)
    drawn += row(y + 14, [(f"A{n}, L{n}", "from own k, v, decay") for n in SUBSCRIPTS], FORWARD)
    drawn += travel(y + 112, FORWARD, "ahead", "EL", reverse=False)
    return drawn + row(y + 152, [("o", f"from own q, k, v and {e}") for e in ("0", "E₁", "E₂", "E₃")], FORWARD)


def backward() -> list[str]:
    """Local gradients of states, the exchange from right to left, gradients of keys and values."""
    y = 540
    drawn = heading(y, "Backward", "gradients of states go to the left", BACKWARD)
    drawn += row(y + 14, [(f"A{n}, G{n}", "from own q, do, decay") for n in SUBSCRIPTS], BACKWARD)
    drawn += travel(y + 112, BACKWARD, "back", "XG", reverse=True)
    for rank, (e, x) in enumerate(zip(("0", "E₁", "E₂", "E₃"), ("X₀", "X₁", "X₂", "0"))):
        left, half = column(rank), COLUMN / 2
        for place, first, second in ((left, "dq", f"with {e}"), (left + half, "dk, dv", f"with {x}")):
            drawn += [box(place, y + 152, half, BOX, SHADE[rank], BACKWARD)]
            drawn += [text(place + half / 2, y + 176, first)]
            drawn += [text(place + half / 2, y + 197, second, size=13, ink=PALE)]
    for n, words in enumerate(
        (
            "A: how much a shard's tokens let a state fade.   L: what they leave behind.   E: the state that enters.",
            "G: what its outputs want of the state that enters.   X: what all later ranks want of the one that leaves.",
        )
    ):
        drawn += [text(LEFT, y + 238 + 20 * n, words, size=13, anchor="start", ink=PALE)]
    return drawn


def picture() -> str:
    """The whole file."""
    title = "A sequence over four ranks: states travel to the right in forward, their gradients to the left in backward"
    return svg(WIDTH, HEIGHT, title, [*levels(), *forward(), *backward()])


if __name__ == "__main__":
    FILE.write_text(picture())
