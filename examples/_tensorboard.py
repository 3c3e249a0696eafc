"""The curves of a run for TensorBoard, beside the files that every run leaves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def is_installed() -> bool:
    """Whether the package tensorboard is here, which PyTorch does not bring."""
    return importlib.util.find_spec("tensorboard") is not None


class Curves:
    """Writes numbers by step into folder/tensorboard. One process of a run has it.

    Args:
        folder: of the run.
        first_step: steps done before a resume; what an interrupted run has written of later ones is hidden.
    """

    def __init__(self, folder: Path, *, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Each under its name."""
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        """Have all of it on the disk."""
        self._writer.close()
