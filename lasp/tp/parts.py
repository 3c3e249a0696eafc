"""What the ranks of tensor parallelism do together in a layer, and how a layer holds a part of a weight.

A parameter is a DTensor on the axis "tp", so that optimizers, norms of gradients, FSDP2 and checkpoints see what it is
a part of. The layer sees the part, a plain tensor, through a property of its class (`hold`): what it computes is what
it would compute with fewer heads, in the same kernels, and no operation of a forward goes through DTensor's dispatch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from lasp.ranks import SequenceParallel, waiting

View = Callable[[Tensor], Tensor]


class Ranks:
    """Those of one layer: the `Parts` of lasp.models.

    Args:
        ranks: of the axis "tp".
        layer: its path, for messages.
    """

    def __init__(self, ranks: SequenceParallel, layer: str):
        self.ranks, self.layer, self.number = ranks, layer, ranks.size

    def enter(self, x: Tensor) -> Tensor:
        """x; its gradient is the sum over the ranks."""
        return _Enter.apply(x, self)  # type: ignore[return-value]

    def leave(self, x: Tensor) -> Tensor:
        """The sum over the ranks; its gradient is that of each."""
        return _Leave.apply(x, self)  # type: ignore[return-value]

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks, and of its gradient too."""
        return _Total.apply(x, self)  # type: ignore[return-value]

    def gather(self, x: Tensor) -> Tensor:
        """The channels [..., n] of all ranks side by side, [..., ranks * n]; each gets the gradient of its own."""
        return _Gather.apply(x, self)  # type: ignore[return-value]

    def sum(self, x: Tensor, direction: str) -> Tensor:
        """The sum of x over the ranks, in its dtype, as a new tensor; it has no gradient of its own."""
        found = x.clone(memory_format=torch.contiguous_format)
        if found.numel():
            # In a graph of torch.compile there is no clock.
            with nullcontext() if torch.compiler.is_compiling() else waiting(self._what(f"the sum, {direction},")):
                dist.all_reduce(found, group=self.ranks.group)
        return found

    def gathered(self, x: Tensor) -> Tensor:
        """See `gather`; it has no gradient of its own."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.number)]
        if x.numel():
            with nullcontext() if torch.compiler.is_compiling() else waiting(self._what("the gathering")):
                dist.all_gather(parts, x.contiguous(), group=self.ranks.group)
        return torch.cat([parts[place] for place in self.ranks.in_group], -1)

    def _what(self, what: str) -> str:
        return f"tensor parallel, {self.layer}: {what} over the ranks of tp"

    def __deepcopy__(self, memo) -> Ranks:
        return self  # a copied model is split over the same ranks


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.ranks.sum(gradient, "backward"), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        return ranks.sum(x, "forward")

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return ranks.sum(x, "forward")

    @staticmethod
    def backward(ctx, gradient):
        return ctx.ranks.sum(gradient, "backward"), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.place, ctx.width = ranks.ranks.rank, x.shape[-1]
        return ranks.gathered(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.narrow(-1, ctx.place * ctx.width, ctx.width), None


def split_parameter(module: nn.Module, name: str, ranks: Ranks, dim: int | None) -> None:
    """In place of a whole parameter a DTensor: this rank's part along `dim`, or (None) the whole on each rank."""
    mesh, old = ranks.ranks.mesh, module._parameters[name]
    assert old is not None
    whole = old.detach()
    part = whole if dim is None else whole.chunk(ranks.number, dim)[ranks.ranks.rank].clone()
    made = DTensor.from_local(part, mesh, [Replicate() if dim is None else Shard(dim)], run_check=False)  # type: ignore[arg-type]
    module._parameters[name] = nn.Parameter(made, requires_grad=old.requires_grad)


def hold(module: nn.Module, views: Mapping[str, View | None], forward: Callable | None = None) -> None:
    """Make a module see the parts of its parameters of these names, as plain tensors.

    Args:
        module: its class is replaced by one that derives from it, and has its name.
        views: of each parameter what the layer sees of this rank's part; None is the part itself.
        forward: in place of the class's.
    """
    module.__class__ = _class_that_holds(type(module), tuple(views), forward)
    module.__dict__["_lasp_views"] = {name: view for name, view in views.items() if view is not None}


@functools.lru_cache(maxsize=None)
def _class_that_holds(cls: type[nn.Module], names: tuple[str, ...], forward: Callable | None) -> type[nn.Module]:
    members: dict[str, object] = {name: _seen(name) for name in names}
    if forward is not None:
        members["forward"] = forward
    return type(cls.__name__, (cls,), members | {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _seen(name: str) -> property:
    def part(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        if not is_split(parameter):  # as while FSDP2 has shards of it
            return parameter
        view = module.__dict__["_lasp_views"].get(name)
        return parameter.to_local() if view is None else view(parameter.to_local())

    return property(part)


def is_split(x: object) -> bool:
    """Whether it is a tensor that tensor parallelism alone has split, or holds whole on each of its ranks."""
    return isinstance(x, DTensor) and x.device_mesh.mesh_dim_names == ("tp",)
