"""Learning rates by step: a linear warm-up first; those that fall reach a tenth of the highest behind the last step."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "wsd", "constant")
LEAST = 0.1  # of the highest rate
DECAY = 0.2  # of all steps: the end of "wsd"


def learning_rate(schedule: str, highest: float, step: int, steps: int, warmup: int | None = None) -> float:
    """The rate of step `step` (from 0) of `steps`.

    Args:
        schedule: after the warm-up "cosine" falls along half a cosine, "linear" in a line; "constant" stays; "wsd"
            (warm-up, stable, decay: MiniCPM, arXiv 2404.06395) stays but for the last fifth of all steps, in which it
            falls in a line.
        highest: the rate at the end of the warm-up.
        step, steps: the number of this step, and how many there are.
        warmup: steps of it; None: a tenth of all, at least one.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    warmup = max(1, steps // 10) if warmup is None else warmup
    if step < warmup:
        return highest * (step + 1) / warmup
    if schedule == "constant":
        return highest
    begin = max(warmup, steps - round(DECAY * steps)) if schedule == "wsd" else warmup
    progress = max(0.0, (step - begin) / max(1, steps - begin))
    if schedule == "cosine":
        return highest * (0.55 + 0.45 * math.cos(math.pi * progress))
    return highest * (1 - (1 - LEAST) * progress)
