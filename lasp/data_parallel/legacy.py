"""Data parallelism as it was before gradients travelled in buckets: all at once, when the backward has ended."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed import ProcessGroup

from lasp import arguments
from lasp.checks.optimizers import averages
from lasp.checks.replicas import compare_parameters
from lasp.data_parallel.manual import sync_grads
from lasp.ranks import grad_group
from lasp.ranks.group import process


def average_after_backward(model: nn.Module, mesh, *, validate: str = "first") -> nn.Module:
    """From now on every backward of the model ends with `sync_grads(model, mesh)`; the model itself, no wrapper.

    All gradients of a dtype travel in one message that overlaps with nothing. In exchange a parameter that a rank has
    not used counts as zero there (one that none has used gets no gradient), and gradients may be sparse. All ranks come
    to a backward equally often; one that reaches no parameter of the model averages nothing.

    Args:
        model: the same on all ranks.
        mesh: the whole mesh, one axis, a ProcessGroup, or None for one rank.
        validate: "first" compares the parameters of the ranks here, and before they are averaged; "off" does not.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: an argument that does not fit.
        RankMismatchError: ranks hold other parameters; on every rank, here or in a backward.
    """
    return wrapped("average_after_backward", model, mesh, validate)


def wrapped(by: str, model: nn.Module, mesh, validate: str) -> nn.Module:
    """The same, `by` what the user has called, which errors name."""
    arguments.module("model", model)
    arguments.choice("validate", validate, ("first", "off"))
    group, ranks = grad_group(mesh)
    compare_parameters(model, group, by, validate=validate)
    if group is not None and ranks > 1:
        process.reducers[model] = AfterBackward(model, mesh, group, validate, by)
    return model


class AfterBackward:
    """What averages the gradients of a model, unless it is told to wait."""

    def __init__(self, model: nn.Module, mesh, group: ProcessGroup, validate: str, by: str):
        self._model, self._mesh, self._validate = weakref.ref(model), mesh, validate
        self.process_group = group  # that of `mesh`, called as DDP calls its own
        self._wait, self._queued = False, -1  # in which backward, if it came to its end or not
        for p in model.parameters():
            if (p.is_floating_point() or p.is_complex()) and not p.is_inference():
                trained = p.requires_grad  # what is frozen may be trained later, and takes no hook as it is
                p.requires_grad_().register_post_accumulate_grad_hook(self._queue)
                p.requires_grad_(trained)
        if validate != "off":
            averages(model.parameters(), model, by)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context inside which a backward averages nothing."""
        before, self._wait = self._wait, True
        try:
            yield
        finally:
            self._wait = before

    def _queue(self, _: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if not self._wait and backward != self._queued:
            self._queued = backward
            Variable._execution_engine.queue_callback(self._average)  # once the gradients of all parameters are there

    def _average(self) -> None:
        model = self._model()
        if model is not None:
            sync_grads(model, self._mesh, validate=self._validate)
