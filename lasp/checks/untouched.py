"""Run a model to look at it, and leave it as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

_DROPS = re.compile(r"drop_?(out|path|connect|block)|stochastic_?depth", re.IGNORECASE)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards gradients, buffers, modes (train or eval) and PyTorch's random numbers are what they were.

    Gradients are None at first. Those that were there are put back as the same tensors, wherever they lie.
    """
    parameters, modules = list(model.parameters()), list(model.modules())
    gradients, modes = [p.grad for p in parameters], [m.training for m in modules]
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), buffers_kept(model):
        try:
            for p in parameters:
                p.grad = None
            yield
        finally:
            for module in modules:
                if isinstance(module, FSDPModule):
                    module.reshard()  # after a forward without backward its weights are whole
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient
            for module, training in zip(modules, modes):
                module.training = training


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers are what they were."""
    modules = list(model.modules())
    buffers = [dict(m._buffers) for m in modules]
    contents = {id(b): (b, b.detach().clone()) for held in buffers for b in held.values() if b is not None}
    try:
        yield
    finally:
        for module, held in zip(modules, buffers):
            module._buffers.clear()
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, content in contents.values():
                buffer.copy_(content)


def keep_all(model: nn.Module) -> None:
    """Layers that drop something at random, dropout and its like, let everything pass from now on."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or _DROPS.search(type(module).__name__):
            module.training = False


def random_state() -> list[Tensor]:
    """The states of PyTorch's generators, to see whether something draws from them."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, floating-point parameters and buffers are of this dtype (None: as they are); they must have no gradient.

    Afterwards they have their own memory again, which nothing has touched: optimizers and tied weights notice nothing.
    """
    held = [x for x in (*model.parameters(), *model.buffers()) if dtype is not None and x.is_floating_point()]
    own = [x.data for x in held]
    try:
        for x in held:
            x.data = x.data.to(dtype)
        yield
    finally:
        for x, data in zip(held, own):
            x.data = data


@contextmanager
def first_layers(model: nn.Module, count: int | None) -> Iterator[None]:
    """Inside, the longest `ModuleList` of the model ends after so many entries (None: all are there)."""
    if count is None:
        yield
        return
    blocks = longest_list(model)
    assert blocks is not None
    before = dict(blocks._modules)
    try:
        for name in list(before)[count:]:
            del blocks._modules[name]
        yield
    finally:
        blocks._modules.clear()
        blocks._modules.update(before)


def longest_list(model: nn.Module) -> nn.ModuleList | None:
    """The blocks of a model: the longest `ModuleList` that lies in no other (such as the experts of a layer)."""
    inside = {id(x) for m in model.modules() if isinstance(m, nn.ModuleList) for x in m.modules() if x is not m}
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and id(m) not in inside]
    return max(lists, key=len, default=None)
