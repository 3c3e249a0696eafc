"""What the forward of a model may be given: what it names, and what a model within it names that it hands the rest to.

All who call a model of somebody else's, or look at a call of it, ask here.
"""

from __future__ import annotations

import inspect
import re

from torch import nn

POSITIONS = re.compile(r"(token_|input_)?pos(ition)?s?(_ids?)?")  # what models call the positions of tokens
MASKS = re.compile(r"(attention_|padding_|token_|input_|key_padding_|src_key_padding_)?mask")


def parameters_of(model: nn.Module) -> dict[str, inspect.Parameter]:
    """By name all that it may be given: where it takes **kwargs, also what the model within it names."""
    found = dict(own_parameters(model))
    inner = within(model)
    if inner is not None and any(p.kind == p.VAR_KEYWORD for p in found.values()):
        found |= {name: p for name, p in parameters_of(inner).items() if name not in found}
    return found


def own_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Of its own forward, by name."""
    return dict(inspect.signature(model.forward).parameters)


def places_of(model: nn.Module) -> list[str]:
    """The names of what may be given without them, in order; where it takes *args, also those of the model within."""
    parameters = own_parameters(model).values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    inner = within(model)
    if inner is not None and any(p.kind == p.VAR_POSITIONAL for p in parameters):
        names += places_of(inner)[len(names) :]
    return names


def within(model: nn.Module) -> nn.Module | None:
    """The model that one hands its arguments on to: what a wrapper holds alone, or the trunk of a language model."""
    if len(children := list(model.children())) == 1:
        return children[0]
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) and inner is not model else None
