"""How a layer holds a part of a weight.

A parameter is a DTensor on the axis "tp", so that optimizers, norms of gradients, FSDP2 and checkpoints see what it is
a part of. The layer sees the part, a plain tensor, through a property of its class (`hold`): what it computes is what
it would compute with fewer heads, in the same kernels, and no operation of a forward goes through DTensor's dispatch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lasp.ranks.parts import Ranks, is_split

View = Callable[[Tensor], Tensor]


_UNSCALE = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default


def skip_steps_together() -> None:
    """Of a `torch.amp.GradScaler`: ranks skip a step if the gradient of a part is not finite on one of them.

    PyTorch asks the other ranks as the placements of the first gradient say. If all ranks hold that whole, as a norm's,
    each rank would decide by its own parts. So the parts come first.
    """
    handlers = DTensor._op_dispatcher._custom_op_handlers
    if not isinstance(handlers[_UNSCALE], _PartsFirst):
        handlers[_UNSCALE] = _PartsFirst(handlers[_UNSCALE])


class _PartsFirst:
    def __init__(self, unscale: Callable):
        self.unscale = unscale

    def __call__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parts_first = sorted(args[0], key=lambda gradient: sum(x.is_replicate() for x in gradient.placements))
        self.unscale(op, (parts_first, *args[1:]), kwargs)


def split_parameter(module: nn.Module, name: str, ranks: Ranks, dim: int | None) -> None:
    """Put a DTensor in place of a whole parameter: this rank's part along `dim`, or (None) the whole on each rank."""
    mesh, old = ranks.mesh, module._parameters[name]
    assert old is not None
    whole = old.detach()
    part = whole if dim is None else whole.chunk(ranks.number, dim)[ranks.rank].clone()
    made = DTensor.from_local(part, mesh, [Replicate() if dim is None else Shard(dim)], run_check=False)  # type: ignore[arg-type]
    module._parameters[name] = nn.Parameter(made, requires_grad=old.requires_grad)


def hold(module: nn.Module, views: Mapping[str, View | None], **methods: Callable) -> None:
    """Make a module see the parts of its parameters of these names, as plain tensors.

    Args:
        module: its class is replaced by one that derives from it, and has its name.
        views: of each parameter what the layer sees of this rank's part; None is the part itself.
        methods: in place of the class's.
    """
    module.__class__ = _class_that_holds(type(module), tuple(views), tuple(methods.items()))
    module.__dict__["_lasp_views"] = {name: view for name, view in views.items() if view is not None}


@functools.cache
def _class_that_holds(
    cls: type[nn.Module], names: tuple[str, ...], methods: tuple[tuple[str, Callable], ...]
) -> type[nn.Module]:
    members = {"__module__": cls.__module__, "__doc__": cls.__doc__, **{name: _seen(name) for name in names}}
    return type(cls.__name__, (cls,), members | dict(methods))


def _seen(name: str) -> property:
    def part(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        if not is_split(parameter):  # as while FSDP2 has shards of it
            return parameter
        view = module.__dict__["_lasp_views"].get(name)
        return parameter.to_local() if view is None else view(parameter.to_local())

    return property(part)
