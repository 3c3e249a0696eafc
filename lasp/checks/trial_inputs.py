"""What a trial gives to a module: tokens, made up from what its forward takes and its layers are wide."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lasp.checks import hooks
from lasp.checks.forward import MASKS, POSITIONS, own_parameters, parameters_of
from lasp.checks.torch_modules import is_of_torch
from lasp.checks.trial_weights import SMALL, Weights

_SPECIAL = re.compile(r"eos|bos|eo[dt]|sep|pad|end|stop|doc|special", re.IGNORECASE)


@dataclass
class Input:
    """An argument of a forward."""

    value: Any
    dim: int | None = None  # that of tokens


Inputs = dict[str, Input]


def inputs_of(module: nn.Module, weights: Weights) -> Iterator[Callable[..., Inputs]]:
    """Ways to make its inputs from a number of tokens, the likeliest first: ids, or numbers of some width."""
    parameters = _given(module)
    if not parameters:
        return
    used = (weights.get(name, x) for name, x in (*module.named_parameters(), *module.named_buffers()))
    like = next((x for x in used if x.is_floating_point()), torch.empty(0, device="cpu"))
    takes_ids, widths = True, []
    if isinstance(module, hooks.Alone):
        takes_ids, widths, module = module.takes_ids, module.widths, module.imitated
    tables = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)] if takes_ids else []
    kinds: list[int | None] = [None] if tables else []  # None: ids; else the width
    vocabulary = min(tables, default=0)
    special = _numbers_of(module, vocabulary)
    for position_dim in (1, 0):
        for width in [*kinds, *widths, *_widths_of(module)]:
            yield functools.partial(_make_inputs, parameters, like, vocabulary, special, width, position_dim)
        if not any(POSITIONS.fullmatch(p.name) for p in parameters[1:]):
            return


def optional(module: nn.Module, names: re.Pattern[str]) -> list[str]:
    """The arguments of its forward with such a name that need not be given."""
    return [p.name for p in _given(module)[1:] if names.fullmatch(p.name) and p.default is not p.empty]


def _given(module: nn.Module) -> list[inspect.Parameter]:
    """What a trial may give to its forward; of what a wrapper hands on only what the trial knows to make."""
    own = {name: p for name, p in own_parameters(module).items() if p.kind != p.VAR_KEYWORD}
    if not own:  # the tokens are given without a name
        return []
    handed_on = (p for name, p in parameters_of(module).items() if name not in own)
    known = (p for p in handed_on if POSITIONS.fullmatch(p.name) or MASKS.fullmatch(p.name) or p.name == "use_cache")
    return [*own.values(), *known]


def _widths_of(module: nn.Module) -> list[int]:
    """Of a token, by what the first layers take."""
    found = []
    for m in module.modules():
        shape = getattr(m, "normalized_shape", None) or (getattr(m, "in_features", None),)
        width = shape[-1] if isinstance(shape, tuple) else None
        found += [width] if isinstance(width, int) and width > 0 else []
    found += [p.shape[-1] for p in module.parameters() if p.ndim]
    return list(dict.fromkeys(found))[:4] or [8]


def _numbers_of(module: nn.Module, vocabulary: int) -> list[int]:
    """Ids that the modules may know: the lowest and the highest, and every number that they, their configurations or
    the code of their classes hold, those first whose name says so. One of them may end a document."""
    named, others = [0, vocabulary - 1], [1, 2]
    for m in module.modules():
        for holder in (m, getattr(m, "config", None)):
            for name, value in getattr(holder, "__dict__", {}).items():
                numbers = value if isinstance(value, (list, tuple, set)) else (value,)
                (named if _SPECIAL.search(name) else others).extend(x for x in numbers if type(x) is int)
    for cls in dict.fromkeys(type(m) for m in module.modules() if not is_of_torch(m)):
        for code in (f.__code__ for f in vars(cls).values() if inspect.isfunction(f)):
            held = {name: getattr(sys.modules.get(cls.__module__), name, None) for name in code.co_names}
            others += [x for x in (*code.co_consts, *held.values()) if type(x) is int]
    return list(dict.fromkeys(x for x in (*named, *others) if 0 <= x < vocabulary))


def _make_inputs(
    parameters: list[inspect.Parameter],
    like: Tensor,
    vocabulary: int,
    special: list[int],
    width: int | None,
    position_dim: int,
    tokens: int,
    cut: int,
    *,
    masks: bool = False,
    rows: int = 1,
) -> Inputs:
    generator = torch.Generator("cpu").manual_seed(tokens)
    if width is None:
        x = torch.cat([_ids(vocabulary, special, tokens, cut, generator) for _ in range(rows)]).to(like.device)
    else:
        x = torch.randn(rows, tokens, width, generator=generator, device="cpu").to(like)
    first, *others = parameters
    inputs = {"" if first.kind in (first.VAR_POSITIONAL, first.POSITIONAL_ONLY) else first.name: Input(x, 1)}
    positions = torch.arange(tokens, device=like.device)
    in_rows = positions.view(1, -1).expand(rows, -1)
    for p in others:
        if POSITIONS.fullmatch(p.name):
            inputs[p.name] = Input(in_rows if position_dim else positions, position_dim)
        elif masks and MASKS.fullmatch(p.name):
            inputs[p.name] = Input(torch.ones_like(in_rows), 1)
        elif p.name == "use_cache":
            inputs[p.name] = Input(False)
        elif p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD:
            inputs[p.name] = Input(None)
    return inputs


def _ids(vocabulary: int, special: list[int], tokens: int, cut: int, generator: torch.Generator) -> Tensor:
    """[1, tokens], all different if there are as many; if not, at least what stands side by side on the whole or at
    the end of a slice, as far as possible: else a shift might bring what was there before.

    No id is in both slices, so that the largest number of all tokens, say, is in one of them only. Special ones are in
    the first: one of them may end a document, which the tokens behind it are to know."""
    borders = [(0, cut), (0, tokens - 1), (cut - 1, tokens - 1), (cut - 1, 0), (cut, tokens - 1)]
    known, count = torch.tensor(special, device="cpu"), min(vocabulary, SMALL)
    x = torch.zeros(0, dtype=torch.int64, device="cpu")
    for _ in range(100 if tokens < 64 else 1):
        drawn = torch.randperm(count, generator=generator, device="cpu")
        drawn = torch.cat([known, drawn[~torch.isin(drawn, known)]])
        of_first = min(cut, max(1, len(drawn) * cut // tokens))
        first, second = drawn[:of_first], drawn[of_first:][: tokens - cut]
        pools = ((first, cut), (second if len(second) else first, tokens - cut))
        x = torch.cat([_shuffled(pool, length, generator) for pool, length in pools])
        if bool((x[1:] != x[:-1]).all()) and all(x[a] != x[b] for a, b in borders):
            break
    return x[None]


def _shuffled(pool: Tensor, length: int, generator: torch.Generator) -> Tensor:
    parts = [pool[torch.randperm(len(pool), generator=generator, device="cpu")] for _ in range(-(-length // len(pool)))]
    return torch.cat(parts)[:length]
