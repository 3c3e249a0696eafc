"""What is checked before an optimizer steps, so that no wrong step is taken."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_checks: list[Callable[[Optimizer], None]] = []
_last_checks: list[Callable[[Optimizer], None]] = []


def before_step(check: Callable[[Optimizer], None], *, last: bool = False) -> None:
    """Call `check` before every step of an optimizer of `torch.optim`, or of one that derives from them; once each.

    It gets the optimizer. Those that are `last` come after all others, whichever was the first to be asked for.
    """
    if not _checks and not _last_checks:
        register_optimizer_step_pre_hook(_call_checks)  # type: ignore[arg-type]
    if check not in _checks and check not in _last_checks:
        (_last_checks if last else _checks).append(check)


# What asks other ranks cannot be part of a graph. (The decorator that torch.optim uses: the public one would import the
# compiler, and Triton, with this module.)
@torch._disable_dynamo  # type: ignore[attr-defined,reportPrivateImportUsage]
def _call_checks(optimizer: Optimizer, *_: object) -> None:
    for check in (*_checks, *_last_checks):
        check(optimizer)
