"""A trace of overlap.py: how long its exchange ran alone, and its picture."""

from __future__ import annotations

from intervals import length, union
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from plots import SMALL, WIDTH, sheet

COLORS = {
    "segment_state_kernel": "tab:green",
    "scan_kernel": "tab:olive",
    "fold_kernel": "tab:olive",
    "forward_walk_kernel": "tab:blue",
    "backward_walk_kernel": "tab:purple",
    "nccl": "tab:red",
    "barrier_kernel": "tab:red",  # by which ranks meet that read each other's memory
    "other": "lightgray",
}
LABELS = {  # as they follow on each other
    "states of segments": "tab:green",
    "scan, fold": "tab:olive",
    "outputs; dq": "tab:blue",
    "dk, dv": "tab:purple",
    "exchange: NCCL, or a wait to meet": "tab:red",
    "others": "lightgray",
}
EXCHANGE = ("nccl", "barrier_kernel")


def kind_of(name: str) -> str:
    """The key of COLORS for a kernel's name."""
    return next((kind for kind in COLORS if kind in name.lower()), "other")


def exposed_us(kernels: list[dict]) -> float:
    """Microseconds of a rank's trace in which a kernel of the exchange ran and no other did."""
    spans = [(k["kernel"] in EXCHANGE, (k["start"], k["start"] + k["us"])) for k in kernels]
    exchange, others = (union(span for of, span in spans if of is wanted) for wanted in (True, False))
    return length(union([*exchange, *others])) - length(others)


def figure_of(result: dict) -> Figure:
    """Two rows a rank: what computes, and below it what exchanges."""
    ranks = result["ranks"]
    figure = sheet(figsize=(WIDTH, 1.5 + 0.9 * len(ranks)))
    axes: Axes = figure.subplots()
    end = max(k["start"] + k["us"] for kernels in ranks for k in kernels)
    for rank, kernels in enumerate(ranks):
        for k in kernels:
            row = 2 * (len(ranks) - 1 - rank) + (k["kernel"] not in EXCHANGE)
            axes.barh(row, k["us"], left=k["start"], height=0.8, color=COLORS[k["kernel"]])
        said = f"without other work beside it: {exposed_us(kernels):.0f} us"
        axes.text(end, 2 * (len(ranks) - 1 - rank), said, ha="right", va="center", fontsize=SMALL)
    names = [f"rank {r}: {what}" for r in reversed(range(len(ranks))) for what in ("exchange", "kernels")]
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("microseconds since the first kernel of the rank")
    words = {"decay fixed": "ALiBi slopes", "decay none": "no decay"}
    for name, said in words.items():
        result = result | {"what": result["what"].replace(name, said)}
    axes.set_title(f"Forward, then backward of linear attention: {result['what']}", fontsize=10)
    handles = [Patch(color=color, label=name) for name, color in LABELS.items()]
    figure.legend(handles=handles, ncols=6, loc="outside upper center", fontsize=8, frameon=False, columnspacing=1)
    axes.set_ylim(-0.6, 2 * len(ranks) - 0.4)
    return figure
