"""A model that is called for inference: over the ranks in a prompt, each rank by itself in a step of one token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp import adapters, arguments
from lasp.adapters.handles import check_ranks, held_by, under_way
from lasp.api import on_one_rank
from lasp.calls import Caller, logits_of
from lasp.inference.state import form_of
from lasp.layout import ShardLayout
from lasp.models.trunk import LanguageModel
from lasp.modules import Router
from lasp.ops.session import Session
from lasp.ranks import SequenceParallel, alone, sequence_axis, waiting
from lasp_kernels.reference import state_dtype

as_usual = torch.inference_mode(False)
"""Decorator: what is made is not only for the user's `torch.inference_mode`, but may be changed in place outside."""


def sequence_of(model: nn.Module, mesh: Any) -> SequenceParallel:
    """The ranks of a mesh; of None those over which the model is split, or one."""
    if mesh is not None:
        return sequence_axis(mesh)
    splits = held_by(arguments.module("model", model))
    return splits[0].sequence if splits else SequenceParallel(None)


class Runner:
    """A model, its ranks, and how it is called.

    Args:
        model: `parallelize` was called with it or not; it is left as it is.
        mesh: as of `prefill`.
        foreign: whether layers may be another library's (`foreign` are their paths), which take no step of one token.

    Raises:
        TypeError, ValueError: what does not fit.
    """

    def __init__(self, model: nn.Module, mesh: Any, *, foreign: bool = False):
        self.model = arguments.module("model", model)
        splits, self.sequence = held_by(model), sequence_of(model, mesh)
        if not splits and self.sequence.size > 1:
            raise ValueError(
                f"model must be one that lasp.parallelize was called with, got a {type(model).__name__} that was not, "
                f"and a mesh of {self.sequence.size} ranks: call lasp.parallelize(model, mesh['sp']) before (copies "
                "are made before that, too)"
            )
        self.splits = splits or [on_one_rank(model, (lambda _: None) if foreign else self._refuse_foreign)]
        check_ranks(self.splits, self.sequence)
        self.foreign = [path for split in self.splits for path in _foreign(split.adapters)]
        if not foreign:
            for split in self.splits:
                self._refuse_foreign(split.adapters)
        self._call = Caller(model, ask="for lasp.prefill and lasp.generate, whose rows have no padding")
        self._call.check(("input_ids", "position_ids", "layout"))
        self.device = device_of_model(model)
        self.form = form_of(model)
        embedding, self._head = embedding_and_head(model)
        self.vocabulary = getattr(embedding, "num_embeddings", None)  # None: not known
        self._tokens, self._last = 0, (0, 0)  # of a call, and those of them whose logits are wanted

    def _refuse_foreign(self, of_layers: list[tuple[str, adapters.Adapter]]) -> None:
        if foreign := _foreign(of_layers):
            raise ValueError(
                f"model must call the operators of lasp itself, got a {type(self.model).__name__} whose layer "
                f"{foreign[0]!r} another library wrote: behind lasp.prefill its own generate() goes on "
                "(lasp.library_inputs)"
            )

    @contextlib.contextmanager
    def inside(self, session: Session, *, each_alone: bool = False) -> Iterator[None]:
        """Inside, the model may be called with the session; behind it the model is as it was."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(as_in_evaluation(self.model))
            for split in self.splits:
                stack.enter_context(split.with_ranks())
            stack.enter_context(under_way(session, self.splits, self.model))
            if each_alone and self.sequence.size > 1:
                stack.enter_context(alone())
            if self._head is not None:
                handle = self._head.register_forward_pre_hook(self._only_last)
                stack.callback(handle.remove)
            yield

    def _only_last(self, head: nn.Module, args: tuple) -> tuple | None:
        """A hook before the last layer, which gives logits of no other tokens; of all where it is called otherwise than
        with [B, T, D]."""
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3 or args[0].shape[1] != self._tokens:
            return None
        return (args[0][:, slice(*self._last)], *args[1:])

    def logits(self, ids: Tensor, positions: Tensor, layout: ShardLayout, *, last: bool = True) -> Tensor:
        """[B, vocab] of the last of these tokens, or [B, 0, vocab] where others hold the `last`."""
        self._tokens = ids.shape[1]
        self._last = (self._tokens - 1, self._tokens) if last else (0, 0)
        found = logits_of(self._call(self.model, {"input_ids": ids, "position_ids": positions, "layout": layout}))
        return found[:, -1] if last else found[:, :0]

    def of_last_rank(self, logits: Tensor) -> Tensor:
        """[B, vocab] in the dtype of states on every rank, of the only one that has them (see `logits`)."""
        dtype = state_dtype(logits.dtype)
        if logits.ndim == 3:
            found = logits.new_zeros(len(logits), logits.shape[2], dtype=dtype)
        else:  # dense and by itself, since it may be a view of the logits of all tokens
            found = logits.to(dtype, copy=True, memory_format=torch.contiguous_format)
        if self.sequence.size == 1:
            return found
        with waiting("lasp.prefill: the logits of the last token, from the rank that holds it"):
            dist.all_reduce(found, group=self.sequence.group)
        return found


def device_of_model(model: nn.Module) -> torch.device:
    """The device of a model."""
    return next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _foreign(of_layers: list[tuple[str, adapters.Adapter]]) -> list[str]:
    return [path for path, adapter in of_layers if isinstance(adapter, adapters.Foreign)]


def embedding_and_head(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The first layer, and the last, which gives logits; None where they are not known."""
    for module in model.modules():
        if isinstance(module, LanguageModel):
            return module.embedding, module.head
        if (head := getattr(module, "get_output_embeddings", lambda: None)()) is not None:  # of transformers
            return module.get_input_embeddings(), head  # type: ignore[operator]
    return None, None


@contextlib.contextmanager
def as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """A context inside which modules are in evaluation mode; what routers have counted stays that of before."""
    training = [m for m in model.modules() if m.training]
    counted = [(m, m.counted) for m in model.modules() if isinstance(m, Router)]
    try:
        for m in training:
            m.training = False
        yield
    finally:
        for m in training:
            m.training = True
        for router, before in counted:
            router.counted = before
