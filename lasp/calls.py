"""How a model is called that somebody else wrote: by what its forward names, of what a batch has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lasp.adapters import border
from lasp.checks.forward import POSITIONS, parameters_of


def caller(model: nn.Module, *, ask: str = "pass forward") -> Callable[[nn.Module, dict[str, Any]], Any]:
    """A function of a model and a slice of a batch, which calls the one with the other; `ask` says what else helps."""
    parameters = parameters_of(model)
    names = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not names:
        raise ValueError(f"the forward of {type(model).__name__} names no arguments: {ask}")
    others = [name for name in names[1:] if name not in ("input_ids", "labels")]
    taken = {name: "position_ids" if POSITIONS.fullmatch(name) else name for name in others}
    if border.stands_before(model) and any(p.kind == p.VAR_KEYWORD for p in parameters.values()):  # and hands it on
        taken.setdefault("attention_mask", "attention_mask")

    def call(called: nn.Module, batch: dict[str, Any]) -> Any:
        more = {name: batch[entry] for name, entry in taken.items() if entry in batch}
        if border.stands_before(called):
            more["layout"] = batch["layout"]
        return called(batch["input_ids"], **more)

    return call


def logits_of(output: Any) -> Any:
    """What of a model's output are the logits: itself, its `logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output[0]
