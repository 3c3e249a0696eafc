"""Tensor parallelism: the heads and inner channels of each layer over ranks that all have the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

import lasp_kernels as kernels
from lasp import arguments
from lasp.checks import agreement
from lasp.checks.agreement import Agreement
from lasp.checks.checksum import checksums, forms_of, whole_parameters
from lasp.checks.messages import check_messages
from lasp.models.decoder import Decoder
from lasp.models.lrpe import LRPE
from lasp.models.mixers import Mamba2
from lasp.modules import LightningAttention
from lasp.ranks import SequenceParallel
from lasp.ranks.parts import Ranks, is_split
from lasp.tp.held import hold, split_parameter
from lasp.tp.plans import PLANS, Plan, check_model

__all__ = ["tensor_parallel"]


def tensor_parallel(model: nn.Module, mesh: DeviceMesh | None, *, validate: str = "first") -> nn.Module:
    """Split the weights of a model of `lasp.models` over the ranks of `mesh`, in place, by heads and inner channels.

    Each rank computes with the whole stream of tokens and its own heads; a layer's outputs are summed over the ranks,
    its input's gradients in backward (arXiv 2405.17381, appendix E). A norm over all heads has one sum of squares, a
    number a token, over the ranks. The embedding is cut by channels, and the last layer by words.

    It is a call of its own beside `parallelize`, which splits tokens and leaves every weight where it is: that is for
    any model with an operator of lasp in it, this for those whose weights lasp knows, and who needs one seldom needs
    both. Compose in this order: `parallelize` (its trial of the model needs whole weights), `tensor_parallel`,
    activation checkpointing, data parallelism. ::

        mesh = lasp.init_mesh(sp=2, tp=2)                # ranks of tp are neighbours: they send most
        lasp.parallelize(model, mesh["sp"])
        lasp.tensor_parallel(model, mesh["tp"])
        wrap_fsdp2(model, mesh, blocks=model.blocks)     # or lasp.sync_grads(model, mesh) after each backward

    Ranks of tp get the same batch: draw it by the place in data parallelism, as for sp.

    Parameters become DTensors on the axis "tp", so that `torch.nn.utils.clip_grad_norm_`, the optimizers of
    `torch.optim`, FSDP2 and `torch.distributed.checkpoint` do with them what they do with the whole. Names in the
    `state_dict` stay. A layer sees its part as a plain tensor (`model.blocks[0].glu.value.weight`); the parameter is
    what `named_parameters` gives. Of a `state_dict` of whole tensors load with
    `torch.distributed.checkpoint.state_dict.set_model_state_dict` and `StateDictOptions(full_state_dict=True)`.

    Args:
        model: a `TNL`, `Decoder` or `LinearTransformer`, whole, the same on every rank; not yet compiled or wrapped.
            On the meta device it stays there: `to_empty`, and then load its weights.
        mesh: `mesh["tp"]`, the whole mesh (its "tp" axis is used), or None. Of one rank the model is left untouched.
        validate: "first" compares the models of the ranks, weights included, before they are split, and the tokens
            that they get at the first two calls and every 1000th; "off" does not.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: a model without a plan, or sizes that the ranks do not divide; before any communication.
        RankMismatchError: ranks have other models or weights, or one of them failed with one of the above; later, in a
            forward, other tokens. On every rank.
        PeerError: a rank did not come within the timeout of the group.
    """
    ranks = _ranks_of(mesh, validate)
    with Agreement(ranks, due=validate != "off" and ranks.size > 1, before="tensor_parallel") as ranks_agree:
        _check(model, ranks.size)
        ranks_agree.settle(
            lambda: {"ranks": ranks.ranks},
            lambda: {
                "parameter": forms_of(model.named_parameters()),
                "the whole weights of": checksums(whole_parameters(model)),
            },
        )
    if ranks.size > 1:
        _split(model, ranks)
        model.register_forward_pre_hook(_SameTokens(ranks), with_kwargs=True)
    return model


def _ranks_of(mesh: Any, validate: str) -> SequenceParallel:
    arguments.choice("validate", validate, ("first", "off"))
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(f'mesh must be a DeviceMesh such as mesh["tp"], or None, got {arguments.shown(mesh)}')
    if mesh is not None:
        if "tp" not in (mesh.mesh_dim_names or ()):
            raise ValueError(f'the mesh has no axis "tp", only {mesh.mesh_dim_names}')
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return SequenceParallel(mesh, name="", validate=validate)


def _check(model: nn.Module, ranks: int) -> None:
    arguments.module("model", model)
    check_model(model, ranks)
    for name, parameter in model.named_parameters():
        if is_split(parameter):
            raise ValueError(f"model must be whole, but {name} is split already: lasp.tensor_parallel is called once")
        if hasattr(parameter, "device_mesh"):
            raise ValueError(f"model must not be sharded before lasp.tensor_parallel, got {name} as a DTensor")


def _split(model: nn.Module, ranks: SequenceParallel) -> None:
    for path, module in list(model.named_modules()):
        if (plan := PLANS.get(type(module))) is not None:
            _split_layer(path, module, plan, ranks)
    if isinstance(model, Decoder) and model.bound_shares is not None:
        _apply(model, Ranks(ranks, "the model"), bound_shares=1)
    _apply(model.embedding, Ranks(ranks, "embedding"), weight=1, forward=_embedding)
    _apply(model.head, Ranks(ranks, "head"), weight=0, forward=_head, seen=False)
    for path, module in model.named_modules():  # what no layer's plan has: norms between the layers
        names = [name for name, p in module._parameters.items() if p is not None and not is_split(p)]
        if names:
            _apply(module, Ranks(ranks, path), **dict.fromkeys(names))


def _split_layer(path: str, layer: nn.Module, plan: Plan, ranks: SequenceParallel) -> None:
    own = Ranks(ranks, path)
    cut = {name: 0 for name in plan.cut if name in layer._parameters}
    for name in plan.cut:
        if name not in cut:
            module = layer.get_submodule(name)
            _apply(module, own, **dict.fromkeys(_names(module), 0))
    if cut:
        _apply(layer, own, **cut)
    _apply(layer.get_submodule(plan.out), own, weight=1, bias=None, forward=_out)
    for name in plan.between:
        _apply(layer.get_submodule(name), own, weight=1, forward=_between)
    for name in plan.shared:
        module = layer.get_submodule(name)
        view = own.enter
        if isinstance(layer, Mamba2) and name == "conv":
            view = _Convolved(own, 2 * layer.width)
        _apply(module, own, view=view, **dict.fromkeys(_names(module)))
    if plan.norm is not None:
        _apply(layer.get_submodule(plan.norm), own, weight=0, forward=_norm)
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
        _apply(module, own, delta=0)


def _apply(
    module: nn.Module,
    own: Ranks,
    *,
    forward: Callable | None = None,
    view: Callable | None = None,
    seen: bool = True,
    **dims: int | None,
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
        self, own: Ranks, forward: Callable | None, view: Callable | None, seen: bool, dims: dict[str, int | None]
    ):
        super().__init__()
        self.own, self.forward, self.view, self.seen, self.dims = own, forward, view, seen, dims

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        names = [name for name in self.dims if module._parameters.get(name) is not None]
        for name in names:
            split_parameter(module, name, self.own, self.dims[name])
        hold(module, dict.fromkeys(names if self.seen else (), self.view), self.forward)
        if self.forward is not None:
            module.parts = self.own  # type: ignore[assignment]
        return module


class _Enter:
    """A forward pre-hook: what the layer reads is read by all ranks."""

    def __init__(self, own: Ranks):
        self.own = own

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.own.enter(args[0]), *args[1:])


class _Convolved:
    """Of a convolution over this rank's part of `width` channels, and over all that come behind them."""

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
    return kernels.norm_of_parts(x, parts.total, parts.number, layer.weight, eps=layer.eps or 1e-6)


def _embedding(layer: nn.Embedding, ids: Tensor) -> Tensor:
    return layer.parts.gather(F.embedding(ids, layer.weight))  # type: ignore[union-attr,operator]


def _head(layer: nn.Linear, x: Tensor) -> Tensor:
    """Its weight stays a DTensor, which `lasp.linear_token_loss` takes."""
    parts: Ranks = layer.parts  # type: ignore[assignment]
    return parts.gather(F.linear(parts.enter(x), layer.weight.to_local()))  # type: ignore[operator]


class _SameTokens:
    """A forward pre-hook of the model: its ranks must get the same tokens. Each would compute with others, unseen."""

    def __init__(self, ranks: SequenceParallel):
        self.ranks, self.calls = ranks, 0

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ranks = self.ranks
        if ranks.validate == "off" or torch.compiler.is_compiling():
            return
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            return  # the model's own error says so
        before = "a forward of the ranks of tensor parallelism"

        def settle() -> None:
            agreement.compare(ranks, {}, {agreement.TOKENS: checksums({"input_ids": ids})}, before=before)

        if agreement.is_due(self.calls) and not agreement.capturing():
            settle()
        else:
            kind = (("tokens", tuple(ids.shape)), ("gradients", torch.is_grad_enabled()))
            check_messages(ranks, before, kind, ids.device, explain=settle)
        self.calls += 1

    def __deepcopy__(self, memo) -> _SameTokens:
        return _SameTokens(self.ranks)
