"""The balance of experts over all tokens of all ranks, as a loss.

It is a product of two means over tokens, how often an expert was chosen and its mean probability, so the sums of all
ranks must meet before the product; the mean of what ranks would get alone is another loss. Only the probabilities have
a gradient, and the loss is linear in them: once the numbers of all ranks are known, each rank has its own part of the
gradient, and backward sends nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from lasp import arguments
from lasp.modules import Counted, Router
from lasp.ranks import RankMismatchError, grad_group, waiting


def balance_loss(model: nn.Module, *, mesh) -> Tensor:
    """The load-balancing loss of the routers of a model (arXiv 2101.03961, equations 4 to 6), averaged over routers.

    Of n experts, f_i of the choices and p_i of the mean probability: n * sum_i f_i p_i, which is 1 where all are chosen
    alike, and n where one is. f and p are of all tokens of all ranks of dp x sp, but for the padding of a layout.
    Add it to the loss times a small coefficient::

        loss, _ = lasp.token_loss(logits, local["labels"], mesh=mesh)
        (loss + 0.01 * lasp.balance_loss(model, mesh=mesh)).backward()

    Args:
        model: with `lasp.modules.Router`s in it, which has run since the last call of this; wrapped or not. Of a router
            that was called more than once since, the last call counts.
        mesh: as of `token_loss`.

    Returns:
        The loss, (), in fp32 (fp64 of fp64), equal on every rank. As with `token_loss`, the *average* of parameter
        gradients over `grad_mesh(mesh)` is exact.

    Raises:
        TypeError, ValueError: before any communication: an argument that does not fit, a model without routers, or one
            that has not run since, or ran without gradients (also in a checkpoint with use_reentrant=True); a mesh that
            lacks ranks over which the model was split.
        RankMismatchError: another rank's model has not run, or has other routers; on every rank (on a CPU: elsewhere
            the host would have to wait).
        PeerError: another rank ended, or was silent for the timeout of the group.
    """
    routers = routers_of(model)
    group, ranks = grad_group(mesh)
    _check_ranks(routers, mesh, group)
    kinds = _take_together(routers, group, ranks)
    sums = _over_ranks([x for kind in kinds for x in (kind.times, kind.probability.detach().double())], group, ranks)
    value, local = sums[0].new_zeros(()), kinds[0].probability.new_zeros(())
    for kind, times, probability in zip(kinds, sums[::2], sums[1::2]):
        weights = kind.weights(times)
        value = value + (weights * probability).sum()
        local = local + (weights.to(local.dtype) * kind.probability).sum()
    local = local * (ranks / len(routers))
    return (value / len(routers)).to(local.dtype) + (local - local.detach())


class BalanceOverSegments:
    """The same for a sequence that goes through the model in segments, forward twice (lasp.streaming): who was chosen
    how often is known once all segments have run, before the first backward."""

    def __init__(self, model: nn.Module, mesh: object, group: ProcessGroup | None, ranks: int):
        self._routers, self._group, self._ranks = routers_of(model), group, ranks
        _check_ranks(self._routers, mesh, group)
        self._times: list[Tensor] | None = None
        self._weights: list[Tensor] | None = None

    def look(self, *, together: bool = False) -> list[_Kind]:
        """After a forward of the sweep; `together`: all ranks do."""
        kinds = _take_together(self._routers, self._group, self._ranks) if together else _take(self._routers)
        times = [kind.times for kind in kinds]
        self._times = times if self._times is None else [a + b for a, b in zip(self._times, times)]
        return kinds

    def part(self) -> Tensor:
        """After a forward with graph: this rank's part of the loss, times the ranks. The first is of the segment that
        no sweep went over."""
        if self._weights is None:
            kinds = self.look(together=True)
            assert self._times is not None
            sums = _over_ranks(self._times, self._group, self._ranks)
            self._weights = [kind.weights(times) for kind, times in zip(kinds, sums)]
        else:
            kinds = _take(self._routers)
        parts = [(w.to(kind.probability.dtype) * kind.probability).sum() for kind, w in zip(kinds, self._weights)]
        return torch.stack(parts).sum() * (self._ranks / len(self._routers))


class _Kind(NamedTuple):
    """Routers that choose as many of as many experts: a row each."""

    chosen: int
    times: Tensor  # [routers, experts], fp64: how often each expert was chosen
    probability: Tensor  # [routers, experts], summed over tokens, with its gradient

    def weights(self, times: Tensor) -> Tensor:
        """The gradient of the losses in the summed probabilities, given `times` of all ranks."""
        choices = times.sum(-1, keepdim=True).clamp(min=1)
        return times.shape[-1] * (times / choices) / (choices / self.chosen)


def routers_of(model: nn.Module) -> dict[str, Router]:
    """The routers of a model, by their paths."""
    found = {path: m for path, m in arguments.module("model", model).named_modules() if isinstance(m, Router)}
    if not found:
        raise ValueError(f"model must have routers (lasp.modules.Router), got a {type(model).__name__} without")
    return found


def _take(routers: Mapping[str, Router]) -> list[_Kind]:
    """What they have counted, each forward once."""
    idle = [path for path, router in routers.items() if router.counted is None]
    if idle:
        raise ValueError(
            f"model must have run since the last lasp.balance_loss, got one whose router {idle[0]!r} has not"
        )
    found: dict[tuple[int, int], list[Counted]] = {}
    for path, router in routers.items():
        assert router.counted is not None
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in router.parameters())
        if wanted and not router.counted.probability.requires_grad:
            raise ValueError(
                f"model must have run with gradients, but its router {path!r} has not: it ran in torch.no_grad, or in "
                "a checkpoint, which then needs use_reentrant=False"
            )
        found.setdefault((router.chosen, router.experts), []).append(router.counted)
        router.counted = None
    return [
        _Kind(chosen, torch.stack([x.chosen for x in of]).double(), torch.stack([x.probability for x in of]))
        for (chosen, _), of in found.items()
    ]


def _take_together(routers: Mapping[str, Router], group: ProcessGroup | None, ranks: int) -> list[_Kind]:
    """The same on all ranks, which on a CPU tell each other first whether there is something, and how much."""
    problem, kinds = None, []
    try:
        kinds = _take(routers)
    except ValueError as found:
        problem = found
    on_cpu = next(next(iter(routers.values())).parameters()).device.type == "cpu"
    if ranks > 1 and on_cpu and not torch.compiler.is_compiling():
        told = torch.zeros(ranks, 2, dtype=torch.int64)
        told[dist.get_rank(group)] = torch.tensor([problem is not None, sum(kind.times.numel() for kind in kinds)])
        with waiting("balance_loss, forward: whether all ranks have counted"):
            dist.all_reduce(told, group=group)
        if problem is None:
            _compare(told.tolist(), group)
    if problem is not None:
        raise problem
    return kinds


def _compare(told: list[list[int]], group: ProcessGroup | None) -> None:
    """Raise unless every rank has counted, and as many numbers."""
    usual = Counter(count for failed, count in told if not failed).most_common(1)[0][0]
    listed = [
        f"rank {rank if group is None else dist.get_global_rank(group, rank)} "
        + ("has failed before the sum (see its error)" if failed else f"has {count} experts in its routers")
        for rank, (failed, count) in enumerate(told)
        if failed or count != usual
    ]
    if listed:
        raise RankMismatchError(f"balance_loss: {'; '.join(listed)}, the others {usual} experts in their routers")


def _over_ranks(numbers: Sequence[Tensor], group: ProcessGroup | None, ranks: int) -> list[Tensor]:
    """The sums over ranks, in one message."""
    flat = torch.cat([x.flatten() for x in numbers])
    if ranks > 1:
        with waiting("balance_loss, forward: the sum over all ranks"):
            dist.all_reduce(flat, group=group)
    return [x.view_as(y) for x, y in zip(flat.split([x.numel() for x in numbers]), numbers)]


def _check_ranks(routers: Mapping[str, Router], mesh: object, group: ProcessGroup | None) -> None:
    """Raise if the ranks that are summed over leave out ranks that hold tokens of the same sequences."""
    of_group = [dist.get_rank()] if group is None and dist.is_initialized() else [0]
    of_group = of_group if group is None else dist.get_process_group_ranks(group)
    for path, router in routers.items():
        sequence = router.sequence
        if sequence is not None and sequence.size > 1 and not set(sequence.ranks) <= set(of_group):
            raise ValueError(
                f"mesh must hold all ranks of the sequence, {sequence.ranks}, over which lasp.parallelize has split "
                f"the router {path!r}, got {arguments.shown(mesh)} of the ranks {tuple(of_group)}"
            )
