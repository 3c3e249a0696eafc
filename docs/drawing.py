"""What the pictures of docs/ are drawn with: SVG written by hand, so that its words stay words.

Each lies on a light ground of its own, and can be read on any page.
"""

from __future__ import annotations

from html import escape

GROUND, LINE, INK, PALE = "#fcfcf9", "#8a8f98", "#1d2129", "#5b6270"
FORWARD, BACKWARD, SHADE = "#1f6f8b", "#b3541e", ("#dcebf0", "#cfe3d8", "#f3e6c8", "#ead9ea")
FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif"
HEADS = (("ahead", FORWARD), ("back", BACKWARD))  # of arrows


def text(x: float, y: float, words: str, *, size: int = 15, ink: str = INK, anchor: str = "middle", bold=False) -> str:
    """A line of words; y is its base."""
    look = f'font-size="{size}" fill="{ink}" text-anchor="{anchor}"' + (' font-weight="600"' if bold else "")
    return f'<text x="{x:g}" y="{y:g}" {look}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, edge: str = LINE) -> str:
    """A rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{edge}"/>'


def line(x1: float, y1: float, x2: float, y2: float, ink: str = LINE, head: str = "") -> str:
    """A straight line, with an arrow at its end if `head` names one."""
    end = f' marker-end="url(#{head})"' if head else ""
    return f'<path d="M{x1:g} {y1:g} L{x2:g} {y2:g}" stroke="{ink}" stroke-width="1.6" fill="none"{end}/>'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """The whole file."""
    markers = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{ink}"/></marker>'
        for name, ink in HEADS
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="{FONTS}">',
        f"<title>{escape(title)}</title><defs>{markers}</defs>",
        f'<rect width="{width}" height="{height}" rx="10" fill="{GROUND}" stroke="#d9dbd6"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
