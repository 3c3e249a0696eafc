"""Models of transformers behind a prompt: what `prefill` has found goes into a cache of the library, whose own
`generate` goes on from it.

    lasp        the prompt, over ranks and in segments
    library     the tokens behind it, on each rank by itself, with the model as the library made it
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lasp import adapters, arguments
from lasp.adapters import caches
from lasp.inference.prompts import prompts_of
from lasp.inference.run import Runner, as_in_evaluation, as_usual, device_of_model, embedding_and_head
from lasp.inference.state import InferenceState, form_of
from lasp.layout import ShardLayout
from lasp.ops.session import Session
from lasp.ops.stream import Segment
from lasp.ranks import alone

_TRIAL = 5  # tokens; more than a short convolution looks back


@contextlib.contextmanager
def unsplit(model: nn.Module) -> Iterator[None]:
    """Inside, a model is on this rank what its library made of it, with its own `generate`, cache and kernels.

    It takes all tokens of a batch, and no rank waits for another. No other model is split meanwhile, in this thread;
    other threads go on with theirs, and are refused this one.

    Args:
        model: of another library; `parallelize` was called with it or not.

    Raises:
        TypeError: no module.
        RuntimeError: another thread is within it, or within `lasp.verify`, with this model.
    """
    arguments.module("model", model)
    with alone(), adapters.as_it_came(model):
        yield


@as_usual
def library_inputs(model: nn.Module, state: InferenceState, ids: Any) -> dict[str, Any]:
    """Arguments for a model's own `generate` behind a state: the next token, a mask, and the model's own cache.

        state = lasp.prefill(model, ids[:, :-1], mesh)
        with lasp.unsplit(model):
            found = model.generate(**lasp.library_inputs(model, state, ids[:, -1:]), max_new_tokens=100)

    Args:
        model: of transformers; that of the state, or another of its class and weights.
        state: of `lasp.prefill`. It is not changed.
        ids: [B, 1], the token behind it, with which the library begins. (Those before it are for `lasp.prefill`, which
            goes on from a state: not every model takes several behind a cache.)

    Returns:
        `input_ids`, which are ids on the model's device; `attention_mask` [B, tokens + 1], with zeros to the left of
        rows that are shorter than others ([B, 1] for a model that has no keys); and `cache`, a copy in the dtypes of
        the library.

    Raises:
        TypeError, ValueError: an argument that does not fit; or a layer that holds what the cache has no room for.
    """
    if not adapters.libraries_of(arguments.module("model", model)):
        raise ValueError(f"model must be one of transformers, got a {type(model).__name__}: lasp.generate is for it")
    if not isinstance(state, InferenceState):
        raise TypeError(f"state must be an InferenceState, of lasp.prefill, got {arguments.shown(state)}")
    embedding, _ = embedding_and_head(model)
    rows = prompts_of(ids, vocabulary=getattr(embedding, "num_embeddings", None))
    device = device_of_model(model)
    state.check("state", form_of(model), device, len(rows))
    layer = next(iter(state.held)).layer
    _refuse_others(model, layer)
    if any(row.numel() > 1 for row in rows):
        raise ValueError(
            f"ids must be one token a row, got {max(row.numel() for row in rows)}: those before it are for lasp.prefill"
        )
    new = torch.stack(rows).to(device)
    cache = _cache_of_library(model, torch.ones_like(new), layer)
    most = max(state.lengths)
    caches.fill(cache, caches.by_slot(state.held, state.lengths, cache), most)
    if min(state.lengths) < most and not caches.counts(cache, most):
        raise ValueError(
            f"state must have rows of one length for a {type(model).__name__} whose first layer has no keys, got "
            f"{state.lengths}: the library would ask that layer how many tokens its cache holds, and mask wrongly"
        )
    if all(cache.is_linear):  # which looks at the new tokens only
        return {"input_ids": new, "attention_mask": torch.ones_like(new), "cache": cache}
    places = torch.arange(most + 1, device=device)
    first = most - torch.tensor(state.lengths, device=device)
    return {"input_ids": new, "attention_mask": (places >= first[:, None]).long(), "cache": cache}


def check_cache(runner: Runner) -> None:
    """Raise `ValueError` unless the cache of a foreign model can be filled; it is tried once, with a few tokens."""
    split = runner.splits[0]
    if split.fills_cache:
        return
    _refuse_others(runner.model, runner.foreign[0])
    ids = torch.arange(1, _TRIAL + 1, device=runner.device)[None] % (runner.vocabulary or _TRIAL + 1)
    theirs = _cache_of_library(runner.model, ids, runner.foreign[0])
    session = Session({}, "lasp.prefill")
    session.room = _TRIAL
    layout = ShardLayout((_TRIAL,))
    with runner.inside(session, each_alone=True):
        session.begin_segment(Segment(0, 0, _TRIAL, layout, 0, True))
        runner.logits(ids, torch.arange(_TRIAL, device=runner.device)[None], layout)
        session.end()
    try:
        caches.refuse_unlike(caches.by_slot(session.kept, (_TRIAL,), theirs), theirs)
    except ValueError as error:
        raise ValueError(f"{_refused(runner.model)}: {error}") from error
    split.fills_cache = True


def _refuse_others(model: nn.Module, layer: str) -> None:
    """Raise `ValueError` for models of other libraries than transformers, and for what only wraps one."""
    others = [name for name in adapters.libraries_of(model) if name != "transformers"]
    if others:
        raise ValueError(f"{_refused(model)}: layer {layer!r} is one of {others[0]}, which has a cache of its own")
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"{_refused(model)}, which has no generate()")


def _cache_of_library(model: nn.Module, ids: Tensor, layer: str) -> Any:
    """What the library has behind these tokens [B, T]; `layer` is one that holds something."""
    with torch.no_grad(), unsplit(model), as_in_evaluation(model):
        cache = getattr(model(input_ids=ids, use_cache=True), "cache", None)
    if not caches.known(cache):
        got = "" if cache is None else f", but in a {type(cache).__module__}.{type(cache).__name__}"
        raise ValueError(
            f"{_refused(model)}: what layer {layer!r} knows of earlier tokens is in no cache of transformers{got}"
        )
    return cache


def _refused(model: nn.Module) -> str:
    return (
        "model must be one whose cache lasp can fill (docs/inference.md), or call the operators of lasp itself, got a "
        f"{type(model).__name__}"
    )
