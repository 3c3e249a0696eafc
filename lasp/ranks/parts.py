"""What the ranks of tensor parallelism do together: in a layer of which each has some heads or inner channels."""

from __future__ import annotations

from typing import TypeGuard

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lasp.ranks import collectives
from lasp.ranks.group import process, waiting
from lasp.ranks.sequence import place_in


class Ranks:
    """The ranks of tensor parallelism of one layer: the `Parts` of lasp.models.

    Args:
        mesh: the axis "tp".
        layer: its path, for messages.
    """

    def __init__(self, mesh: DeviceMesh, layer: str):
        # No `SequenceParallel`: while ranks compute `alone` it is one of one rank, and these go on together.
        place = place_in(mesh)
        self.mesh, self.layer = mesh, layer
        self.group, self.in_group = place["group"], place["in_group"]
        self.rank, self.number = place["rank"], place["size"]

    def enter(self, x: Tensor) -> Tensor:
        """x; its gradient is the sum over the ranks."""
        return _Enter.apply(x, self)  # type: ignore[return-value]

    def leave(self, x: Tensor) -> Tensor:
        """The sum over the ranks; its gradient is that of each."""
        return _Leave.apply(x, self)  # type: ignore[return-value]

    def total(self, x: Tensor, *, backward: bool = False) -> Tensor:
        """The sum over the ranks, and of its gradient too. What computes a gradient by itself says that it is in
        `backward`, which messages then tell; there is no gradient of that."""
        if backward:
            return self.sum(x, "backward")
        return _Total.apply(x, self)  # type: ignore[return-value]

    def gather(self, x: Tensor) -> Tensor:
        """The channels [..., n] of all ranks side by side, [..., ranks * n]; each gets the gradient of its own."""
        return _Gather.apply(x, self)  # type: ignore[return-value]

    def sum(self, x: Tensor, direction: str) -> Tensor:
        """The sum of x over the ranks, in its dtype, as a new tensor; it has no gradient of its own."""
        if torch.compiler.is_compiling():  # a graph has no clock, and may move what writes to a tensor
            return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", self.group))
        found = x.clone(memory_format=torch.contiguous_format)
        if found.numel():
            with waiting(self._what(f"the sum, {direction},")):
                dist.all_reduce(found, group=self.group)
        return found

    def gathered(self, x: Tensor) -> Tensor:
        """x of all ranks, see `gather`; without a gradient."""
        return torch.cat(self.of_each(x).unbind(), -1)

    def of_each(self, x: Tensor) -> Tensor:
        """x [...] of each rank, [ranks, ...], in the order of the mesh; it has no gradient of its own."""
        if torch.compiler.is_compiling():
            flat = functional.wait_tensor(functional.all_gather_tensor(x.contiguous(), 0, self.group))
            found = flat.view(self.number, *x.shape)
        else:
            found = x.new_empty(self.number, *x.shape)
            if x.numel():
                with waiting(self._what("the gathering")):
                    collectives.gather_flat(found.flatten(0, 1), x.contiguous(), group=self.group)
        if self.in_group == tuple(range(self.number)):
            return found
        return torch.stack([found[place] for place in self.in_group])

    def of_first(self, x: Tensor) -> None:
        """Overwrite x with what the first rank has."""
        with waiting(self._what("the sending of the first rank's")):
            dist.broadcast(x, group=self.group, group_src=self.in_group[0])

    def _what(self, what: str) -> str:
        return f"tensor parallel, {self.layer}: {what} over the ranks of tp"

    def __deepcopy__(self, memo) -> Ranks:
        return self  # a copied model is split over the same ranks

    @classmethod
    def of(cls, x: DTensor) -> Ranks:
        """The ranks over which a tensor is split (`is_split`)."""
        found = process.parts_of_world().get(x.device_mesh)
        return cls.note(x.device_mesh) if found is None else found

    @classmethod
    def note(cls, mesh: DeviceMesh) -> Ranks:
        """These are what `of` finds for a tensor of this mesh, or of one that equals it: what DTensor keeps of
        operations may put an equal mesh of before into a new tensor, whose group was destroyed."""
        found = process.parts_of_world()[mesh] = cls(mesh, "the loss")
        return found


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


class _Total(_Enter):
    """Its gradient is summed as that of `_Enter`."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return ranks.sum(x, "forward")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.place, ctx.width = ranks.rank, x.shape[-1]
        return ranks.gathered(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.narrow(-1, ctx.place * ctx.width, ctx.width), None


def is_split(x: object) -> TypeGuard[DTensor]:
    """Whether it is a tensor that tensor parallelism alone has split, or holds whole on each of its ranks."""
    return isinstance(x, DTensor) and x.device_mesh.mesh_dim_names == ("tp",)


def part_of(x: Tensor) -> Tensor:
    """This rank's part of a tensor that tensor parallelism alone has split; any other as it is."""
    return x.to_local() if is_split(x) else x


def parts_of_model(model: nn.Module) -> int:
    """Over how many ranks tensor parallelism has split it, also if FSDP2 has since sharded it."""
    meshes = (p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    return next((x.size((x.mesh_dim_names or ()).index("tp")) for x in meshes if "tp" in (x.mesh_dim_names or ())), 1)
