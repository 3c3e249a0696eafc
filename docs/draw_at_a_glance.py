"""Draws the picture of README.md: `python docs/draw_at_a_glance.py`, which writes at-a-glance.svg."""

from __future__ import annotations

from pathlib import Path

from draw_how_it_works import CHANNELS, HEADS, RANKS, SUBSCRIPTS, WIDTH
from drawing import BACKWARD, FORWARD, PALE, SHADE, box, line, svg, text

FILE = Path(__file__).parent / "at-a-glance.svg"
HEIGHT = 232
LEFT, BOX, GAP, TOP, HIGH = 30, 140, 60, 62, 92  # of the four ranks' boxes


def ranks() -> list[str]:
    """A box for each, with what goes from one to the next and back."""
    drawn = []
    for rank in range(RANKS):
        left = LEFT + rank * (BOX + GAP)
        right, middle = left + BOX, left + BOX / 2
        drawn += [box(left, TOP, BOX, HIGH, SHADE[rank]), text(middle, TOP + 26, f"rank {rank}", bold=True)]
        drawn += [text(middle, TOP + 50, "its own tokens,", size=13)]
        drawn += [text(middle, TOP + 69, "all ranks at once", size=13)]
        if rank + 1 < RANKS:
            n = SUBSCRIPTS[rank + 1]
            drawn += [line(right + 4, TOP + 32, right + GAP - 4, TOP + 32, FORWARD, "ahead")]
            drawn += [text(right + GAP / 2, TOP + 22, f"S{n}", size=14, ink=FORWARD, bold=True)]
            drawn += [line(right + GAP - 4, TOP + 60, right + 4, TOP + 60, BACKWARD, "back")]
            drawn += [text(right + GAP / 2, TOP + 81, f"dS{n}", size=14, ink=BACKWARD, bold=True)]
    return drawn


def picture() -> str:
    """The whole file."""
    ahead = "Forward: to the right goes a state, what all tokens so far have left behind"
    back = "Backward: to the left goes its gradient, what all later tokens want of it"
    size = (
        f"An arrow is {HEADS * CHANNELS**2 * 4 // 2**20} MiB a layer ({HEADS} heads of {CHANNELS} x {CHANNELS}, fp32)"
    )
    drawn = [text(LEFT, 36, ahead, ink=FORWARD, anchor="start", bold=True), *ranks()]
    drawn += [text(LEFT, 186, back, ink=BACKWARD, anchor="start", bold=True)]
    drawn += [text(LEFT, 212, f"{size}, for a thousand tokens as for a billion.", size=14, ink=PALE, anchor="start")]
    title = "Four ranks: a state goes to the right in forward, its gradient to the left in backward"
    return svg(WIDTH, HEIGHT, title, drawn)


if __name__ == "__main__":
    FILE.write_text(picture())
