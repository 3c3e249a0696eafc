"""Several backwards of a step whose gradients are averaged once: what DDP and FSDP2 must be told for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lasp.data_parallel import fsdp2


class AveragedOnce:
    """The wrappers in a model while a step goes through it in parts.

    DDP averages in the last backward, if it would do so now (its `no_sync` is the caller's for accumulation). FSDP2
    gathers its weights at the first forward, keeps them, and averages and shards in the last backward.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._ddp = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self._fsdp = [m for m in model.modules() if isinstance(m, FSDPModule)]

    @property
    def without_backward(self) -> nn.Module:
        """What to call where no backward follows."""
        return self._model.module if isinstance(self._model, DistributedDataParallel) else self._model

    @property
    def once(self) -> list[Tensor]:
        """Parameters whose gradients come once, in the last backward, whoever asks."""
        return fsdp2.parameters_of(self._fsdp)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around all parts."""
        with fsdp2.weights_kept(self._fsdp):
            yield

    @contextlib.contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """Around one forward and its backward."""
        with contextlib.ExitStack() as stack:
            if not last:
                for module in self._ddp:
                    stack.enter_context(module.no_sync())
            stack.enter_context(fsdp2.averaging(self._fsdp, last=last))
            yield
