"""The weights of a model of lasp.models cut by its layers' plans, and what those layers then do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

import lasp_kernels as kernels
from lasp.models.decoder import Decoder
from lasp.models.lrpe import LRPE
from lasp.models.mixers import Mamba2
from lasp.models.trunk import LanguageModel
from lasp.modules import LightningAttention
from lasp.ranks.parts import Ranks, is_split, part_of
from lasp.tp.held import hold, skip_steps_together, split_parameter
from lasp.tp.plans import MODELS, PLANS, Plan


def split(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Split the layer in place, over the ranks of the axis "tp"."""
    Ranks.note(mesh)
    skip_steps_together()
    for path, module in list(model.named_modules()):
        if (plan := PLANS.get(type(module))) is not None:
            _split_layer(path, module, plan, mesh)
    if isinstance(model, Decoder) and model.bound_shares is not None:
        _apply(model, Ranks(mesh, "the model"), {"bound_shares": 1})
    _apply(model.embedding, Ranks(mesh, "embedding"), {"weight": 1}, forward=_embedding)
    _apply(model.head, Ranks(mesh, "head"), {"weight": 0}, forward=_head, seen=False)
    hold(model, {}, init_weights=_init_weights)
    model.parts = Ranks(mesh, "init_weights")  # type: ignore[assignment]
    for path, module in model.named_modules():  # what no layer's plan has: norms between the layers
        names = [name for name, p in module._parameters.items() if p is not None and not is_split(p)]
        if names:
            _apply(module, Ranks(mesh, path), dict.fromkeys(names))


def _split_layer(path: str, layer: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    own = Ranks(mesh, path)
    cut = {name: 0 for name in plan.cut if name in layer._parameters}
    for name in plan.cut:
        if name not in cut:
            module = layer.get_submodule(name)
            _apply(module, own, dict.fromkeys(_names(module), 0))
    if cut:
        _apply(layer, own, cut)
    _apply(layer.get_submodule(plan.out), own, {"weight": 1, "bias": None}, forward=_out)
    for name in plan.between:
        _apply(layer.get_submodule(name), own, {"weight": 1}, forward=_between)
    for name in plan.shared:
        module = layer.get_submodule(name)
        view = own.enter
        if isinstance(layer, Mamba2) and name == "conv":
            view = _Convolved(own, 2 * layer.width)
        _apply(module, own, dict.fromkeys(_names(module)), view=view)
    if plan.norm is not None:
        _apply(layer.get_submodule(plan.norm), own, {"weight": 0}, forward=_norm)
    for name in plan.heads:
        _keep_heads(getattr(layer, name), own, layer.heads // own.number)  # type: ignore[operator]
    for name in plan.divided:
        setattr(layer, name, getattr(layer, name) // own.number)
    if plan.enters is None:
        layer.parts = own  # type: ignore[assignment]
    else:
        layer.get_submodule(plan.enters).register_forward_pre_hook(_Enter(own))


def _names(module: nn.Module) -> list[str]:
    return [name for name, p in module._parameters.items() if p is not None]


def _keep_heads(module: nn.Module | None, own: Ranks, heads: int) -> None:
    first = own.rank * heads
    if isinstance(module, LightningAttention):
        module.keep_heads(first, heads)
    elif isinstance(module, LRPE):
        module.first_head = first
        _apply(module, own, {"delta": 0})


def _apply(
    module: nn.Module,
    own: Ranks,
    dims: Mapping[str, int | None],
    *,
    forward: Callable | None = None,
    view: Callable | None = None,
    seen: bool = True,
) -> None:
    """Split parameters of a module, each along a dimension, or keep it whole on every rank (None).

    What is `seen` of them are the parts, through a `view`; else the DTensors.
    """
    parallelize_module(module, own.mesh, _Held(own, forward, view, seen, dims))  # type: ignore[arg-type]


class _Held(ParallelStyle):
    """One module of the plan, as torch.distributed.tensor.parallel applies it.

    (Its own ColwiseParallel and RowwiseParallel make DTensors of what a layer reads and gives. The fused layers of
    lasp.models take weights as plain tensors, and read the stream once for several layers.)
    """

    def __init__(
        self, own: Ranks, forward: Callable | None, view: Callable | None, seen: bool, dims: Mapping[str, int | None]
    ):
        super().__init__()
        self.own, self.forward, self.view, self.seen, self.dims = own, forward, view, seen, dims

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        names = [name for name in self.dims if module._parameters.get(name) is not None]
        for name in names:
            split_parameter(module, name, self.own, self.dims[name])
        methods = {} if self.forward is None else {"forward": self.forward}
        hold(module, dict.fromkeys(names if self.seen else (), self.view), **methods)
        if methods:
            module.parts = self.own  # type: ignore[assignment]
        return module


class _Enter:
    """A forward pre-hook: what the layer reads is read by all ranks."""

    def __init__(self, own: Ranks):
        self.own = own

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.own.enter(args[0]), *args[1:])


class _Convolved:
    """The weight of a convolution over this rank's part of `width` channels, and over all that come behind them."""

    def __init__(self, own: Ranks, width: int):
        self.own, self.width, self.part = own, width, width // own.number

    def __call__(self, whole: Tensor) -> Tensor:
        whole = self.own.enter(whole)
        return torch.cat([whole.narrow(0, self.own.rank * self.part, self.part), whole[self.width :]])


# Forwards of layers that hold a part


def _out(layer: nn.Linear, x: Tensor) -> Tensor:
    y = layer.parts.leave(F.linear(x, layer.weight))  # type: ignore[union-attr,operator]
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def _between(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.parts.total(F.linear(x, layer.weight))  # type: ignore[union-attr,operator]


def _norm(layer: nn.RMSNorm, x: Tensor) -> Tensor:
    parts: Ranks = layer.parts  # type: ignore[assignment]
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps  # as nn.RMSNorm
    return kernels.norm_of_parts(x, parts.total, parts.number, layer.weight, eps=eps)


def _embedding(layer: nn.Embedding, ids: Tensor) -> Tensor:
    return layer.parts.gather(F.embedding(ids, layer.weight))  # type: ignore[union-attr,operator]


def _head(layer: nn.Linear, x: Tensor) -> Tensor:
    """The logits of all words, from a last layer whose weight stays a DTensor, as `lasp.linear_token_loss` takes it."""
    parts: Ranks = layer.parts  # type: ignore[assignment]
    return parts.gather(F.linear(parts.enter(x), part_of(layer.weight)))


def _init_weights(model: nn.Module) -> None:
    """The model's `init_weights`, over parts: each rank draws its own, and what all ranks hold is the first one's."""
    parts: Ranks = model.parts  # type: ignore[assignment]
    parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
    sharded = not all(map(is_split, parameters))  # by FSDP2: then DTensor's generator tells ranks apart
    gpus = list({p.device for p in parameters if p.is_cuda})
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng(gpus, enabled=not sharded):
        if not sharded:
            torch.manual_seed(seed + parts.rank)
        next(cls for cls in MODELS if isinstance(model, cls)).init_weights(model)  # type: ignore[arg-type]
    for p in parameters:
        if p.placements[-1].is_replicate():  # over tp, which comes last
            parts.of_first(p.to_local().detach())
