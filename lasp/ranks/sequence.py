"""`SequenceParallel`: the ranks over which a sequence is split, and what a layer has sent among them."""

from __future__ import annotations

import itertools
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from lasp import arguments
from lasp.ranks.group import Peers, peers_of, process

SCHEDULES: dict[str, Any] = {}
"""How a state may travel, by name: what `exchange=` takes beside "auto". Files of `lasp.exchange` enter their own."""


@dataclass
class Traffic:
    """What one operator of one layer has exchanged so far, counted where it is sent, and how it did so last."""

    calls: int = 0  # of the operator in forward; a checkpoint's recompute is none
    forward_exchanges: int = 0
    reverse_exchanges: int = 0
    messages: int = 0  # to a neighbour; an all-gather counts as one
    bytes_sent: int = 0  # in an all-gather the states of others too, which a rank passes on
    schedule: str = ""  # of the heads that the horizon leaves; "neighbour" if it leaves none
    blocks: int = 1  # that a state was cut into
    predicted_seconds: float = 0.0  # for the last exchange, by the cost model
    kernels: str = ""  # what computed it: "triton", "reference" (lasp's steps in PyTorch), "SDPA", "torch"
    decay: str = ""  # the form of its log-decays, such as "[B, T, H]"; "none" without
    repeats: str = ""  # why a recompute repeats the exchange; empty if it does not

    def __add__(self, other: Traffic) -> Traffic:
        """Counts add up; how it was done last is the other's."""
        counts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.type == "int"}
        return replace(other, **counts | {"blocks": other.blocks})


@dataclass(frozen=True, eq=False)
class SequenceParallel:
    """The ranks over which a sequence is split, in sequence order. What `sequence=` of the operators takes.

    Args:
        mesh: a 1-D `DeviceMesh` such as `mesh["sp"]`, a `ProcessGroup`, or None for one rank.
        exchange: how a state travels (docs/exchange.md): "ring", "all_gather", "pipeline", "direct" (ranks of one
            host), or "auto", one of them by a cost model, for which the network is measured at the first exchange.
        softmax: how `softmax_attention` is split: "auto", by heads where the ranks divide them; "all_gather", never so.
        name: the layer, for messages.
        validate: "first" compares what the ranks are about to compute before the first exchange and then every 1000th,
            what they are about to send before each, and before an optimizer steps how many exchanges they made (see
            `lasp.checks.agreement`), so that a difference is a `RankMismatchError` on every rank; "off" does not.
        check_finite: raise `FloatingPointError` before an optimizer steps, on every rank, if a state was NaN or Inf, or
            a gradient that the optimizer would use is (see `lasp.assert_finite`).

    Raises:
        ValueError, TypeError: a mesh of several axes, something that is no ranks, or options that there are not.
    """

    mesh: DeviceMesh | ProcessGroup | None
    exchange: str = field(default="auto", kw_only=True)
    softmax: str = field(default="auto", kw_only=True)
    name: str = field(default="", kw_only=True)
    validate: str = field(default="first", kw_only=True)
    check_finite: bool = field(default=False, kw_only=True)
    group: ProcessGroup | None = field(init=False, repr=False)
    ranks: tuple[int, ...] = field(init=False)  # global ranks
    rank: int = field(init=False)
    size: int = field(init=False)  # the number of ranks
    peers: Peers = field(init=False, repr=False)  # of the group; absent without one
    schedule: Any = field(init=False, repr=False)  # that `exchange` names, one of `SCHEDULES`; None chooses
    by_operator: dict[str, Traffic] = field(init=False, repr=False, default_factory=dict)
    kept: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)  # calls (lasp.ops), routes (exchange)
    border: Any = field(init=False, repr=False, default=None)  # of the model around the layer (lasp.adapters.border)
    stream: Any = field(init=False, repr=False, default=None)  # what crosses borders of segments (lasp.ops.stream)
    of_model: bool = field(init=False, repr=False, default=False)  # whether `parallelize` made it, for a layer
    handle: Tensor = field(init=False, repr=False)  # a number that stands for this object in a custom op
    in_group: tuple[int, ...] = field(init=False, repr=False)  # rank, as the group counts it, at each place
    prev_rank: int | None = field(init=False, repr=False)  # as the group counts it; None on the first
    next_rank: int | None = field(init=False, repr=False)  # likewise; None on the last

    def __post_init__(self):
        arguments.choice("exchange", self.exchange, ("auto", *SCHEDULES))
        arguments.choice("softmax", self.softmax, ("auto", "all_gather"))
        arguments.text("name", self.name)
        arguments.choice("validate", self.validate, ("first", "off"))
        arguments.flag("check_finite", self.check_finite)
        number = next(_numbers)
        with torch.inference_mode(False):
            handle = torch.tensor(number, device="cpu")
        own = {"schedule": SCHEDULES.get(self.exchange), "handle": handle}
        vars(self).update(place_in(self.mesh), **own)
        self.handle.ranks = self  # type: ignore[attr-defined]  # a graph that keeps the one for backward keeps both
        with _places:
            _by_number[number] = self
            object.__setattr__(self, "__class__", ByThread if process.alone else SequenceParallel)

    def traffic_of(self, operator: str) -> Traffic:
        """What one operator of this layer has exchanged; counted here by the exchange."""
        found = self.by_operator.get(operator)
        if found is None:
            found = self.by_operator[operator] = Traffic()
        return found

    def of_layer(self, name: str, border: Any = None) -> SequenceParallel:
        """The same ranks for a layer of this name, with counts of its own."""
        own = replace(self, name=name)
        object.__setattr__(own, "border", border)
        object.__setattr__(own, "of_model", True)
        return own

    @property
    def traffic(self) -> Traffic:
        """What all operators of this layer have exchanged so far."""
        return sum(self.by_operator.values(), Traffic())

    def name_of(self, group_rank: int | None) -> str:
        """A rank of the group in messages: its place in the sequence and, where that differs, its global rank."""
        if group_rank is None:
            return "the other ranks"
        place = self.in_group.index(group_rank)
        return f"rank {place}" + ("" if place == self.ranks[place] else f" (global rank {self.ranks[place]})")

    def __deepcopy__(self, memo) -> SequenceParallel:
        return self  # a copied model is split over the same ranks; process groups cannot be copied

    def __copy__(self) -> SequenceParallel:
        return self

    def __reduce__(self):
        """Pickled, as by `torch.save(model)`, it is None: the ranks of this run are not those of another."""
        return _of_a_pickle, ()


def _of_a_pickle() -> None:
    """In place of the ranks that a pickled model was split over: one rank, until `parallelize` is called again."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn("a pickled model is not split over ranks when it is loaded: call lasp.parallelize", stacklevel=2)


_numbers = itertools.count()
_places = threading.Lock()
_by_number: weakref.WeakValueDictionary[int, SequenceParallel] = weakref.WeakValueDictionary()


def sequence_of_handle(handle: Tensor | None) -> SequenceParallel | None:
    """The living `SequenceParallel` that a handle stands for."""
    return None if handle is None else _by_number[int(handle)]


def living_sequences() -> list[SequenceParallel]:
    """All that this process holds, in the order in which they were made."""
    return [sequence for _, sequence in sorted(_by_number.items())]


def place_in(mesh: DeviceMesh | ProcessGroup | None) -> dict[str, Any]:
    """The fields of a `SequenceParallel` that follow from its mesh: the ranks, and this one's place among them."""
    group, ranks = _group_and_ranks(mesh)
    place = 0 if group is None else ranks.index(dist.get_rank())
    in_group = (0,) if group is None else tuple(dist.get_group_rank(group, r) for r in ranks)
    return {
        "group": group,
        "ranks": ranks,
        "rank": place,
        "size": len(ranks),
        "peers": None if group is None else peers_of(group),
        "in_group": in_group,
        "prev_rank": in_group[place - 1] if place > 0 else None,
        "next_rank": in_group[place + 1] if place + 1 < len(ranks) else None,
    }


def _group_and_ranks(mesh: DeviceMesh | ProcessGroup | None) -> tuple[ProcessGroup | None, tuple[int, ...]]:
    """The group, and its global ranks in the order of the mesh (a group itself sorts them)."""
    if mesh is None:
        return None, (0,)
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f'mesh must be one axis such as mesh["sp"], got {mesh.mesh_dim_names} {tuple(mesh.shape)}')
        ranks = tuple(mesh.mesh.tolist())
        if dist.get_rank() not in ranks:  # then it has no group
            raise ValueError(f"rank {dist.get_rank()} is not in the sequence-parallel group {ranks}")
        return mesh.get_group(), ranks
    if mesh is dist.GroupMember.NON_GROUP_MEMBER:  # what dist.new_group gives to the ranks that it leaves out
        raise ValueError(f"rank {dist.get_rank()} is not in the sequence-parallel group")
    if isinstance(mesh, ProcessGroup):
        return mesh, tuple(dist.get_process_group_ranks(mesh))
    raise TypeError(f"mesh must be a 1-D DeviceMesh, a ProcessGroup or None, got {arguments.shown(mesh)}")


_ALONE = "lasp.alone"


def is_alone() -> bool:
    """Whether this thread, or the one whose backward runs in this thread of autograd, computes by itself."""
    return torch._C._is_key_in_tls(_ALONE) and torch._C._get_obj_in_tls(_ALONE)


def set_alone(value: bool) -> None:
    """Say so, or no longer. (PyTorch takes it along to the threads in which this thread's backward runs on a GPU.)"""
    torch._C._stash_obj_in_tls(_ALONE, value)


class ByThread(SequenceParallel):
    """What each `SequenceParallel` is while a thread is alone: there one of one rank, and elsewhere what it was."""


def _by_thread(name: str, of_one: Any) -> property:
    return property(lambda self: of_one if is_alone() else vars(self)[name])


for _name, _of_one in place_in(None).items():
    setattr(ByThread, _name, _by_thread(_name, _of_one))


@contextmanager
def by_thread() -> Iterator[None]:
    """Inside, ranks are by thread. So who asks for them pays for it only while a thread is alone.

    Nothing runs compiled meanwhile, in any thread: a graph would hold for all of them what it found in one.
    """
    with _places:
        if not process.alone:
            process.stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else None
            _put(ByThread)
        process.alone += 1
    try:
        yield
    finally:
        with _places:
            process.alone -= 1
            if not process.alone:
                _put(SequenceParallel)
                if process.stance is not None:
                    process.stance.__exit__(None, None, None)


def _put(kind: type[SequenceParallel]) -> None:
    for sequence in living_sequences():
        object.__setattr__(sequence, "__class__", kind)
