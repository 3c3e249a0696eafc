"""Several backwards of a step whose gradients are averaged once: what each scheme must be told for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lasp import arguments
from lasp.data_parallel import fsdp2
from lasp.data_parallel.legacy import AfterBackward
from lasp.ranks.group import process


class AveragedOnce:
    """The wrappers in a model while a step goes through it in parts.

    DDP averages in the last backward, if it would do so now (`no_sync` is the caller's for accumulation). FSDP2
    gathers its weights at the first forward, keeps them, and averages and shards in the last backward.
    """

    def __init__(self, model: nn.Module):
        self._model = model
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
        """A context around all parts of a step."""
        with fsdp2.weights_kept(self._fsdp):
            yield

    @contextlib.contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """A context around one forward and its backward."""
        with contextlib.ExitStack() as stack:
            if not last:
                for wrapper in _wrappers(self._model):
                    stack.enter_context(wrapper.no_sync())
            stack.enter_context(fsdp2.averaging(self._fsdp, last=last))
            yield


def no_sync(model: nn.Module, *, enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Around forward and backward of a micro-batch that another of the same step follows: gradients only add up.

        for number, part in enumerate(parts):
            with lasp.no_sync(model, enabled=number + 1 < len(parts)):
                (loss_of(part) / len(parts)).backward()

    Without it each backward would average over ranks. The last micro-batch stands outside, or has `enabled=False`: its
    backward averages what all have added. Holds for DDP, FSDP2 and all that `lasp.data_parallel` gives, also around
    `lasp.stream_backward`; of a model that is averaged by `lasp.sync_grads`, call that after the last only. FSDP2 does
    not shard the gradients of a parameter until they are averaged, so that meanwhile they take the memory of DDP's.

    Args:
        model: what the forward is called on: wrapped, or with wrapped parts.
        enabled: False does nothing, as for the last micro-batch.

    Returns:
        A context manager, for one `with`.

    Raises:
        TypeError: `model` is no module, or `enabled` no bool.
    """
    arguments.module("model", model)
    return _adding_up(model) if arguments.flag("enabled", enabled) else contextlib.nullcontext()


@contextlib.contextmanager
def _adding_up(model: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for wrapper in _wrappers(model):
            stack.enter_context(wrapper.no_sync())
        stack.enter_context(fsdp2.adding_up([m for m in model.modules() if isinstance(m, FSDPModule)]))
        yield


def _wrappers(model: nn.Module) -> list[DistributedDataParallel | AfterBackward]:
    """What averages gradients of the model, or of its parts, and is no FSDP2."""
    after = [process.reducers.get(m) for m in model.modules()]
    ddp = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    return [*ddp, *(x for x in after if isinstance(x, AfterBackward))]
