"""How a model is called that somebody else wrote: by what its forward names, of what a batch has."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from lasp.adapters import border
from lasp.checks.forward import MASKS, POSITIONS, own_parameters, parameters_of


class Caller:
    """A function of a model and a slice of a batch, which calls the one with the other.

    Args:
        model: the one, or what it is a copy of.
        ask: what helps where the forward cannot be called.

    Raises:
        ValueError: a forward that takes nothing by which it could be called.
    """

    def __init__(self, model: nn.Module, *, ask: str = "pass forward"):
        self.name, self.ask = type(model).__name__, ask
        parameters = parameters_of(model)
        named = {name: p for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not named:
            raise ValueError(f"the forward of {self.name} names no arguments: {ask}")
        first, *others = named
        self.first = first if named[first].kind == inspect.Parameter.KEYWORD_ONLY else None
        others = [name for name in others if name not in ("input_ids", "labels")]
        self.taken = {name: "position_ids" if POSITIONS.fullmatch(name) else name for name in others}
        takes_more = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        if border.stands_before(model) and takes_more:  # and hands it on
            self.taken.setdefault("attention_mask", "attention_mask")
        own = own_parameters(model)
        self.needed = [name for name, p in named.items() if name != first and name in own and p.default is p.empty]
        self.without_name = [name for name in self.needed if named[name].kind == inspect.Parameter.POSITIONAL_ONLY]
        at_border = any(isinstance(x, (border.Border, border.OneRank)) for x in model._forward_pre_hooks.values())
        self.no_layout = border.stands_before(model) and not at_border and not takes_more and "layout" not in named

    def check(self, entries: Container[str]) -> None:
        """Raise `ValueError` unless the model can be called with a batch of these entries."""
        given = [name for name, entry in self.taken.items() if entry in entries and name not in self.without_name]
        entry = next((name for name in self.needed if name not in given), None)
        if entry is not None:
            how = " without a name" if entry in self.without_name else ""
            raise ValueError(
                f"the forward of {self.name} needs the argument {entry!r}{how}, and is called with the tokens and, by "
                f"their names, {', '.join(given) or 'no more'}: give {entry!r} a default, or call a module around "
                f"{self.name} whose forward makes it ({self.ask})"
            )
        if self.no_layout:
            raise ValueError(
                f"the forward of {self.name} takes no argument 'layout', which the model within it needs: let it take "
                "layout=None and hand it on"
            )
        mask = next((name for name in self.taken if MASKS.fullmatch(name) and name not in entries), None)
        if "attention_mask" in entries and "attention_mask" not in self.taken and mask is not None:
            raise ValueError(
                f"attention_mask would not reach the forward of {self.name}, which has an argument {mask!r}: give it "
                f"under that name, with the numbers that this forward means by it"
            )

    def takes(self, entry: str) -> bool:
        """Whether the model is given this entry of a batch."""
        return entry in self.taken.values()

    def __call__(self, called: nn.Module, batch: dict[str, Any]) -> Any:
        """What the model gives for a slice that was checked."""
        more = {name: batch[entry] for name, entry in self.taken.items() if entry in batch}
        if border.stands_before(called):
            more["layout"] = batch["layout"]
        if self.first is not None:
            return called(**{self.first: batch["input_ids"]}, **more)
        return called(batch["input_ids"], **more)


def logits_of(output: Any) -> Any:
    """What of a model's output are the logits: itself, its `logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output[0]
