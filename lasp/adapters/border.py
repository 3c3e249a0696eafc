"""The border of a model that somebody else wrote: where its forward is called with a slice of a batch.

Such a model takes no `layout`, counts positions from 0 if it is given none, would fill a cache, and shifts labels on
its slice. Its layers take what they are given. So before its forward (a hook) the arguments are checked and filled in,
and what the layers need to know is held here until it ends::

    local = lasp.shard_batch(batch, mesh)
    output = model(input_ids=local["input_ids"], position_ids=local["position_ids"], layout=local["layout"])

A layer's functions ask `facts_of(sequence)`. In the recompute of a checkpoint they get what the original forward was
told, whichever batch came since.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lasp import arguments
from lasp.checks.forward import MASKS, parameters_of, places_of
from lasp.checks.use import of_a_pickle
from lasp.layout import ShardLayout
from lasp.ops import recompute
from lasp.ranks import SequenceParallel

_CACHES = ("past_key_values", "cache", "cache_params")
_DOCUMENTS = ("seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass(frozen=True)
class Facts:
    """What every rank knows of a call."""

    layout: ShardLayout
    real: Tensor | None = None  # which of this rank's tokens are no padding, [B, T]; None on all ranks without a mask


def _facts_of(sequence: SequenceParallel) -> Facts:
    """Of the call of the model in which a layer with this `sequence` runs now, or ran when this is a recompute.

    Raises:
        RuntimeError: neither.
    """
    border = sequence.border
    facts = None if border is None else recompute.as_in_the_original(border, border.facts)
    if facts is None:
        repeats = (
            "in backward, as a reentrant checkpoint does: pass use_reentrant=False" if recompute.under_way() else ""
        )
        raise RuntimeError(
            f"layer {sequence.name!r} ran outside of the forward of the model that lasp.parallelize split"
            + (f", {repeats}" if repeats else "; call that model, with layout=local['layout']")
        )
    return facts


# A graph ends here: what it would look at is another at each call.
facts_of: Callable[[SequenceParallel], Facts] = torch._disable_dynamo(_facts_of)  # type: ignore[attr-defined]


def layout_of(sequence: SequenceParallel) -> ShardLayout:
    """How the tokens lie on the ranks in the call of the model in which a layer with this `sequence` runs now.

    For adapters: what a function that `rebind` puts into a layer hands to an operator as `layout=`.

    Args:
        sequence: the one that the adapter was given for the layer.

    Returns:
        The layout of that call.

    Raises:
        RuntimeError: the layer ran outside of the forward of the model that was split.
    """
    return facts_of(sequence).layout


class Border:
    """Hooks around the forward of a model, and what it was called with."""

    def __init__(self, sequence: SequenceParallel):
        self.sequence = sequence
        self.when_pickled: Callable[[], tuple] = lambda: (of_a_pickle, ())  # what takes its place
        self.checks: list[Callable[[nn.Module], None]] = []  # by libraries, before each forward; on the host, and quick
        self.taken: dict[int, int] = {}  # by model, the thread in which it runs as its library made it (`as_it_came`)
        # By thread, of the forward that runs: its model, since others within it are given what it makes, and facts.
        self._running: dict[int, tuple[int, Facts]] = {}

    @property
    def facts(self) -> Facts | None:
        """Of the forward that runs now, in this thread."""
        return self._running.get(threading.get_ident(), (0, None))[1]

    def install(self, model: nn.Module) -> None:
        """Stand before and behind its forward. (Objects as hooks, since a pickle takes no methods.)"""
        model.register_forward_pre_hook(self, with_kwargs=True)
        model.register_forward_hook(_Leave(self), always_call=True)

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:  # noqa: D102
        # The same model once more: an interrupt ended its last forward, and PyTorch ran no hook behind that.
        here = threading.get_ident()
        if here in self._running and self._running[here][0] != id(model):
            return args, kwargs
        call = _Arguments(model, args, dict(kwargs))
        if self.taken and id(model) in self.taken:
            self._refuse_others(model)
            call.kwargs.pop("layout", None)
            call.no_cache()
            return call.args, call.kwargs
        facts = call.facts(self.sequence)
        call.refuse_what_needs_the_whole()
        call.fill_in(facts, self.sequence)
        for check in self.checks:
            check(model)
        self._running[here] = id(model), facts
        return call.args, call.kwargs

    def leave(self, model: nn.Module) -> None:
        """Its forward is over, if it was that."""
        here = threading.get_ident()
        if here in self._running and self._running[here][0] == id(model):
            del self._running[here]

    @contextlib.contextmanager
    def taken_from(self, model: nn.Module) -> Iterator[None]:
        """Inside, it does nothing before this model, which its library's code runs, in this thread alone."""
        nested = id(model) in self.taken
        self.taken.setdefault(id(model), threading.get_ident())
        self._refuse_others(model)
        try:
            yield
        finally:
            if not nested:
                del self.taken[id(model)]

    def _refuse_others(self, model: nn.Module) -> None:
        if self.taken.get(id(model)) not in (None, threading.get_ident()):
            raise RuntimeError(
                f"the {type(model).__name__} is as its library made it while another thread is within lasp.unsplit or "
                "lasp.verify of it, and would take this rank's slice for the whole: wait for its end, or take a copy"
            )

    def __deepcopy__(self, memo: object) -> Border:
        return self  # a copy of the model is split over the same ranks

    def __reduce__(self):
        """Pickled with the model, which then is not split, it does nothing."""
        return self.when_pickled()


class _Leave:
    """The hook behind a forward, however it ended."""

    def __init__(self, border: Border):
        self.border = border

    def __call__(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.border.leave(model)

    def __deepcopy__(self, memo: object) -> _Leave:
        return self

    def __reduce__(self):
        """As its border."""
        return of_a_pickle, ()


def stands_before(model: nn.Module) -> bool:
    """Whether the forward of a model, or of one that it wraps, takes its `layout` at a border."""
    hooks = (hook for m in model.modules() for hook in m._forward_pre_hooks.values())
    return any(isinstance(hook, (Border, OneRank)) for hook in hooks)


class OneRank:
    """The hook of a model on one rank, which is as its library made it: takes away what only lasp understands."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:  # noqa: D102
        layout = kwargs.pop("layout", None)
        if isinstance(layout, ShardLayout) and layout.packed:
            raise ValueError(
                f"{type(model).__name__} is on one rank, where lasp leaves it as it is, and packed documents "
                f"(cu_seqlens {arguments.shown(layout.cu_seqlens)}) might run into each other in it: pack on two ranks "
                "or more, or give it one document at a time"
            )
        return args, kwargs

    def __deepcopy__(self, memo: object) -> OneRank:
        return self

    def __reduce__(self):
        """Pickled with the model, it does nothing."""
        return of_a_pickle, ()


class _Arguments:
    """Those of one call of a model's forward."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.takes, self.places = set(parameters_of(model)), places_of(model)
        self.given = by_name(model, args) | kwargs
        self.name = type(model).__name__

    def facts(self, sequence: SequenceParallel) -> Facts:
        """What was announced; raises unless it fits what was given."""
        layout = self.kwargs.pop("layout", None)
        if layout is None:
            raise ValueError(
                f"layout is needed where the sequence of {self.name} is split: lasp.shard_batch makes it, pass "
                "layout=local['layout']; in a Trainer take lasp.integrations.SequenceTrainer, a plain one would give "
                "each rank other samples. (generate() is for a model on one rank, or within lasp.unsplit)"
            )
        if not isinstance(layout, ShardLayout):
            raise TypeError(f"layout must be a lasp.ShardLayout, got {arguments.shown(layout)}")
        tokens = self._tokens()
        if len(layout.lengths) != sequence.size or layout.lengths[sequence.rank] != tokens.shape[1]:
            raise ValueError(
                f"layout must be of {sequence.size} ranks and the {tokens.shape[1]} tokens of rank {sequence.rank}, "
                f"got lengths {layout.lengths}"
            )
        if 0 in layout.lengths:  # as all ranks see; code of its library views, say, no empty tensor
            without = [rank for rank, length in enumerate(layout.lengths) if not length]
            raise ValueError(
                f"layout must give every rank of {self.name} a token, got none on {without} of {sequence.size} ranks: "
                "leave pad=True of lasp.shard_batch, or take longer sequences"
            )
        if layout.packed and tokens.shape[0] != 1:
            raise ValueError(f"packed documents need a batch of 1, got {tokens.shape[0]} rows")
        mask = self.given.get("attention_mask")
        return Facts(layout, mask != 0 if isinstance(mask, Tensor) else None)

    def _tokens(self) -> Tensor:
        named = [self.given.get(name) for name in ("input_ids", "inputs_embeds")]
        others = self.given.values() if not {"input_ids", "inputs_embeds"} & self.takes else ()
        for x in (*named, *others):
            if isinstance(x, Tensor) and x.ndim > 1:
                return x
        raise ValueError(f"input_ids [B, T] or inputs_embeds [B, T, D] are needed where {self.name} is split")

    def refuse_what_needs_the_whole(self) -> None:
        """Raise for what a forward on a slice cannot do."""
        cache = next((name for name in _CACHES if self.given.get(name) is not None), None)
        if cache is not None or self.given.get("use_cache"):
            raise ValueError(
                f"{cache or 'use_cache=True'} cannot be used where the sequence of {self.name} is split: generate() "
                "and steps with a cache are for a model on one rank, or within lasp.unsplit; training and evaluation "
                "need use_cache=False"
            )
        of_whole = self.given.get("shift_labels") is not None and (
            self.given.get("num_items_in_batch") is not None or self.given.get("fused_lm_head")
        )
        if not of_whole and (self.given.get("labels") is not None or self.given.get("shift_labels") is not None):
            raise ValueError(
                f"labels would be shifted by {self.name} on its slice alone, and the means of slices are not the mean: "
                "leave labels out, and loss, tokens = lasp.token_loss(output.logits, local['labels'], mesh=mesh); "
                "lasp.integrations.SequenceTrainer does so"
            )
        kept = self.given.get("logits_to_keep")
        if kept is not None and (isinstance(kept, Tensor) or kept):  # 0 is all of them
            raise ValueError(f"logits_to_keep would be of this rank's slice alone, got {arguments.shown(kept)}")
        mask = self.given.get("attention_mask")
        other = next((x for x in self.given if MASKS.fullmatch(x) and self.given[x] is not None), None)
        if other is not None and mask is None:
            raise ValueError(
                f"{other} would not reach the split layers of {self.name}, which see padding by attention_mask: let "
                "forward call it so, 0 where this rank's tokens [B, T] are padding"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError(
                "attention_mask must be the [B, T] of this rank's tokens, 0 where they are padding, got "
                f"{arguments.shown(mask)}"
            )

    def fill_in(self, facts: Facts, sequence: SequenceParallel) -> None:
        """Positions, no cache; and without what the layout says already."""
        documents = [name for name in _DOCUMENTS if self.kwargs.pop(name, None) is not None]
        if documents and not facts.layout.packed:
            raise ValueError(
                f"{documents[0]} was given, but the layout is not of packed documents: give them to lasp.shard_batch"
            )
        if "position_ids" in self.takes and self.given.get("position_ids") is None:
            here = positions(facts.layout, sequence.rank, self._tokens().device, tokens_before(sequence))
            self.set("position_ids", here.clone())
        self.no_cache()

    def no_cache(self) -> None:
        """Also where the config of a model would have one."""
        if "use_cache" in self.takes and not self.given.get("use_cache"):
            self.set("use_cache", False)

    def set(self, name: str, value: Any) -> None:
        """One more argument, or another one."""
        place = self.places.index(name) if name in self.places else len(self.args)
        if place < len(self.args):
            self.args = (*self.args[:place], value, *self.args[place + 1 :])
        else:
            self.kwargs[name] = value


def by_name(model: nn.Module, args: tuple) -> dict[str, Any]:
    """What a forward is given without names, by the names that it, or the model that it hands them on to, has."""
    places = places_of(model)
    unnamed = (f"*args[{place}]" for place in range(len(places), len(args)))
    return dict(zip((*places, *unnamed), args))


@functools.lru_cache(maxsize=8)  # the layers of a model ask for the same ones
def positions(layout: ShardLayout, rank: int, device: torch.device, before: int = 0) -> Tensor:
    """[1, T], int64: of a rank's tokens in the whole sequence, or in their documents. Not to be written to.

    `before` is how many tokens of the first document (not packed: of all) come before those of the layout.
    """
    start, end = layout.bounds(rank)
    with torch.inference_mode(False):  # those of an evaluation may serve a training
        found = torch.arange(start, end, device=device)
        if layout.packed:
            offsets: Tensor = layout.facts[1]  # type: ignore[assignment]
            if device.type == "cuda":  # from pinned memory, so that the host need not wait for the device
                offsets = offsets.pin_memory().to(device, non_blocking=True)
            document = torch.searchsorted(offsets, found, right=True) - 1
            found = found - offsets[document.clamp(max=len(offsets) - 1)]
            return (found + before * (document == 0))[None] if before else found[None]
        return found[None] + before


def positions_here(sequence: SequenceParallel, device: torch.device) -> Tensor:
    """`positions` in the call of the model in which a layer with this `sequence` runs now."""
    return positions(layout_of(sequence), sequence.rank, device, tokens_before(sequence))


def tokens_before(sequence: SequenceParallel) -> int:
    """Of the first document, in earlier segments of a sequence that is streamed (lasp.ops.stream)."""
    return 0 if sequence.stream is None else sequence.stream.segment.before


def longest_document(sequence: SequenceParallel) -> int:
    """How many positions there are in the call in which a layer runs now: the tokens of the longest document, or of
    all where there are none; of all segments of a sequence that is streamed."""
    layout = layout_of(sequence)
    offsets = layout.real.cu_seqlens or (0, layout.total)
    longest = max(layout.padding, *(end - start for start, end in zip(offsets, offsets[1:])))
    return longest if sequence.stream is None else max(longest, sequence.stream.longest_document)
