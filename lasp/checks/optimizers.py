"""What is checked before an optimizer steps, so that no wrong step is taken."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

_checks: list[Callable[[], None]] = []


def before_step(check: Callable[[], None]) -> None:
    """Call `check` before every step of an optimizer of `torch.optim`, or of one that derives from them; once each."""
    if not _checks:
        register_optimizer_step_pre_hook(_call_checks)  # type: ignore[arg-type]
    if check not in _checks:
        _checks.append(check)


# What asks other ranks cannot be part of a graph. (The decorator that torch.optim uses: the public one would import the
# compiler, and Triton, with this module.)
@torch._disable_dynamo  # type: ignore[attr-defined,reportPrivateImportUsage]
def _call_checks(*_: object) -> None:
    for check in _checks:
        check()
