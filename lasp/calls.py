"""How a model is called that somebody else wrote: by what its forward names, of what a batch has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lasp.adapters import border
from lasp.checks.trial import POSITIONS


def caller(model: nn.Module, *, ask: str = "pass forward") -> Callable[[nn.Module, dict[str, Any]], Any]:
    """A function of a model and a slice of a batch, which calls the one with the other; `ask` says what else helps."""
    inner = model
    while (names := _names(inner)) is None:  # a wrapper takes whatever comes
        children = list(inner.children())
        if len(children) != 1:
            raise ValueError(f"the forward of {type(inner).__name__} names no arguments: {ask}")
        inner = children[0]
    taken = {name: "position_ids" if POSITIONS.fullmatch(name) else name for name in names[1:] if name != "labels"}
    if border.stands_before(model) and _takes_anything(inner):  # a wrapper that hands on what it does not name
        taken.setdefault("attention_mask", "attention_mask")

    def call(called: nn.Module, batch: dict[str, Any]) -> Any:
        more = {name: batch[entry] for name, entry in taken.items() if entry in batch}
        if border.stands_before(called):
            more["layout"] = batch["layout"]
        return called(batch["input_ids"], **more)

    return call


def _takes_anything(module: nn.Module) -> bool:
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(type(module).forward).parameters.values())


def _names(module: nn.Module) -> list[str] | None:
    parameters = inspect.signature(type(module).forward).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return named[1:] if len(named) > 1 else None


def logits_of(output: Any) -> Any:
    """What of a model's output are the logits: itself, its `logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output[0]
