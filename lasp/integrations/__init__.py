"""Trainers of other libraries on sequences that are split over ranks. Nothing here is imported before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lasp.integrations.trainer import SequenceTrainer

__all__ = ["SequenceTrainer"]


def __getattr__(name: str) -> Any:
    if name != "SequenceTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lasp.integrations.trainer import SequenceTrainer
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("transformers", "accelerate"):
            raise
        raise ImportError(
            f"lasp.integrations.SequenceTrainer needs transformers and accelerate ({error}): "
            "pip install 'lasp-runtime[transformers]'"
        ) from error
    return SequenceTrainer
