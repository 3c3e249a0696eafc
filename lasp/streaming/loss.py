"""The loss of a streamed sequence: the mean over all tokens of all ranks, to which each segment adds its part.

The gradient of a part is divided by the number of all tokens, so that number must be known before the first backward,
which is that of the last segment. For the cross entropy (`TokenLoss`) the labels tell it; a user's function (`OwnLoss`)
tells its count segment by segment in the sweep, and that of the last segment before its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lasp import arguments
from lasp.calls import logits_of
from lasp.loss import check_loss, sum_of_slice, totals, which_labels
from lasp.ranks import grad_group, waiting
from lasp.ranks.collectives import device_of
from lasp.streaming.last_layer import SumOfLoss

LossFunction = Callable[[Any, Tensor], tuple[Tensor, Any]]
"""From what the model returns and the labels, to the sum of the loss and how many labels count."""


class Loss:
    """The mean over the tokens of all ranks."""

    labels: Tensor  # of this rank, of all segments
    found: tuple[Tensor, Tensor] | None = None  # the mean, and of how many tokens, once it is known

    ignores: int | None = None  # a label, if it is the cross entropy, which the last layer may take in place of logits
    scale_beside: float | Tensor | None = None  # of what is no mean over tokens, if another

    def __init__(self, mesh, scale: float | Tensor):
        self.mesh, self.scale = mesh, scale
        self.group, self.ranks = grad_group(mesh)
        self._sum: Tensor | None = None
        self._beside: Tensor | None = None  # that is no mean over tokens
        self._tokens: Tensor | None = None
        self._sound: Tensor | float = 1.0

    def look(self, output: Any, labels: Tensor) -> None:
        """What the model gave in the sweep."""

    def part(self, output: Any, labels: Tensor) -> Tensor:
        """What to call backward on. The average of gradients over ranks is then that of the mean."""
        local = self._sum_of(output, labels)
        assert self._tokens is not None
        self._sum = local.detach().double() if self._sum is None else self._sum + local.detach().double()
        weight = self._sound * self.ranks / self._tokens.clamp(min=1) * self.scale
        self._dtype = local.dtype
        return local * weight.to(local.dtype)

    def beside(self, loss: Tensor) -> Tensor:
        """Likewise for a part of a loss that is no mean over tokens, and that all ranks of a sequence hold alike."""
        now = loss.detach().double()
        self._beside = now if self._beside is None else self._beside + now
        return loss * (self.scale if self.scale_beside is None else self.scale_beside)

    def _sum_of(self, output: Any, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def mean(self) -> tuple[Tensor, Tensor]:
        """The loss, and the number of tokens."""
        assert self._sum is not None
        assert self._tokens is not None
        mean = self._sum / self._tokens.clamp(min=1)
        if self._beside is not None:
            mean = mean + self._beside / self.ranks
        mean = self._sound * self._over_ranks(mean, "the loss")
        return mean.to(self._dtype), self._tokens.round().long()

    def beside_mean(self) -> Tensor | float:
        """What of that is no mean over tokens, on this rank."""
        return 0.0 if self._beside is None else self._beside

    def greatest(self, *numbers: int) -> tuple[int, ...]:
        """The greatest of each of these numbers, over all ranks over which gradients are averaged."""
        found = torch.tensor(numbers, device=torch.device("cpu") if self.group is None else device_of(self.group))
        if self.ranks > 1:
            with waiting("stream_backward: the choice of a segment that fits"):
                dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return tuple(found.tolist())

    def least(self, number: int) -> int:
        """The least number of all ranks over which gradients are averaged."""
        return -self.greatest(-number)[0]

    def _over_ranks(self, x: Tensor, what: str) -> Tensor:
        if self.ranks > 1:
            with waiting(f"stream_backward: the sum of {what} over all ranks"):
                dist.all_reduce(x, group=self.group)
        return x


_PART = 4096  # tokens


class TokenLoss(Loss):
    """`token_loss` of all logits, or what the last layer gives for them."""

    def __init__(self, mesh, scale: float | Tensor, ignore_index: int):
        super().__init__(mesh, scale)
        self.ignore_index = self.ignores = ignore_index

    def look(self, output: Any, labels: Tensor) -> None:
        """The number of tokens is known by the labels; whether these fit, once there are logits."""
        if self._tokens is None:
            if isinstance(output, SumOfLoss):
                vocabulary, device = output.vocabulary, output.total.device
            else:
                logits = logits_of(output)
                check_loss(logits, labels, self.ignore_index, self.mesh, self.group)
                vocabulary, device = logits.shape[-1], logits.device
            all_labels = self.labels.to(device, non_blocking=True)
            counted, outside = which_labels(all_labels, vocabulary, self.ignore_index)
            zero = torch.zeros((), dtype=torch.float64, device=device)
            settings = (vocabulary, self.ignore_index, self.group, self.ranks)
            found = totals(zero, all_labels, counted, outside, *settings)
            self._tokens, self._sound = found.tokens, found.sound

    def _sum_of(self, output: Any, labels: Tensor) -> Tensor:
        self.look(output, labels)
        if isinstance(output, SumOfLoss):
            return output.total
        logits = logits_of(output)
        check_loss(logits, labels, self.ignore_index, self.mesh, self.group)
        # A part at a time, of which nothing is kept but the logits: their fp32 copy and softmax would be most of all.
        parts = zip(logits.flatten(0, -2).split(_PART), labels.flatten().split(_PART))
        sums = [
            checkpoint(self._sum_of_part, *part, use_reentrant=False, preserve_rng_state=False)
            if len(labels.flatten()) > _PART
            else self._sum_of_part(*part)
            for part in parts
        ]
        return torch.stack(sums).sum() if len(sums) > 1 else sums[0]

    def _sum_of_part(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sum_of_slice(logits, labels, self.ignore_index)[0]


class OwnLoss(Loss):
    """The mean of what the caller's `loss_fn` sums up and counts."""

    def __init__(self, mesh, scale: float | Tensor, function: LossFunction, ignore_index: int):
        super().__init__(mesh, scale)
        self.function, self.ignore_index = function, ignore_index
        # Of tokens, and in how many segments there were more than labels; of these segments tokens and labels.
        self._counts: Tensor | None = None

    def look(self, output: Any, labels: Tensor) -> None:
        """Only it knows how many tokens count."""
        _, count = self._called(output, labels)
        self._counted(count, labels)

    def _called(self, output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and how many tokens (fp64, on its device)."""
        found = self.function(output, labels)
        fits = isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Tensor) and found[0].ndim == 0
        if not fits or not found[0].is_floating_point():
            got = arguments.shown(found)
            raise TypeError(f"loss_fn must return the sum of the loss, a tensor (), and a number of tokens, got {got}")
        return found[0], _count_beside(found[0], found[1])

    def _counted(self, count: Tensor, labels: Tensor) -> None:
        most = (labels != self.ignore_index).sum().double()
        wrong = ~((count >= 0) & (count <= most))  # NaN is, too
        now = torch.stack([count, wrong.double(), torch.where(wrong, count, 0), torch.where(wrong, most, 0)])
        self._counts = now if self._counts is None else self._counts + now

    def _sum_of(self, output: Any, labels: Tensor) -> Tensor:
        total, count = self._called(output, labels)
        if self._tokens is None:  # the last segment, which no sweep went over
            self._counted(count, labels)
            assert self._counts is not None
            self._tokens, wrong = self._over_ranks(self._counts[:2].clone(), "the number of tokens").unbind()
            if wrong.device.type == "cpu" and wrong:
                self._refuse()
            self._sound = torch.where(wrong > 0, torch.nan, 1.0)
        return total if total.requires_grad else self._without_graph(total, count, output)

    def _refuse(self) -> None:
        """Raise on every rank: all have come here, since each has the sum of how often it was so."""
        assert self._counts is not None
        rank = dist.get_rank(self.group) if self.ranks > 1 else 0
        found = torch.zeros(self.ranks, 3, dtype=torch.float64)
        found[rank] = self._counts[1:]
        self._over_ranks(found, "which rank has counted wrong")
        told = [
            f"{count:g} of {int(most)} labels on rank {rank if self.ranks == 1 else _global(self.group, rank)}"
            for rank, (wrong, count, most) in enumerate(found.tolist())
            if wrong
        ]
        raise ValueError(
            f"loss_fn must count at most the labels that are not ignore_index {self.ignore_index}, got "
            f"{', '.join(told)}: the mean of the loss is over all that count"
        )

    def _without_graph(self, total: Tensor, count: Tensor, output: Any) -> Tensor:
        """Where no label counts, the gradients that come from later segments still go through what the model gave."""
        given = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        if not given or (count.device.type == "cpu" and count):
            raise ValueError(
                f"loss_fn must return a sum with a gradient where tokens count, got {arguments.shown(total)} without, "
                f"of {arguments.shown(output)}"
            )
        return _NoGradient.apply(torch.where(count > 0, torch.nan, total).to(total.dtype), *given)  # type: ignore[return-value]


class _NoGradient(torch.autograd.Function):
    """A number whose gradient is zero in what it stands beside."""

    @staticmethod
    def forward(ctx, total, *given):
        ctx.like = [(x.shape, x.dtype, x.device) for x in given]
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like)
        return None, *zeros


def _count_beside(total: Tensor, count: Any) -> Tensor:
    """The count in fp64 on the device of the sum, without a wait of the host."""
    if isinstance(count, Tensor) and count.numel() == 1 and count.device == total.device:
        return count.detach().double().reshape(())
    on_host = count.numel() == 1 and count.device.type == "cpu" if isinstance(count, Tensor) else True
    if not on_host or not hasattr(count, "__float__"):
        raise TypeError(
            f"loss_fn must return a number of tokens, or a tensor () on {total.device}, got {arguments.shown(count)}"
        )
    return total.detach().new_full((), float(count), dtype=torch.float64)


def _global(group: Any, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def loss_maker(loss_fn: Any, ignore_index: Any, mesh, scale: float | Tensor) -> Callable[[], Loss]:
    """What makes the loss of a step, or of a trial of one; raises for arguments that do not fit."""
    arguments.integer("ignore_index", ignore_index)
    grad_group(mesh)  # raises for what is no mesh
    if loss_fn is None:
        return lambda: TokenLoss(mesh, scale, ignore_index)
    function = arguments.function("loss_fn", loss_fn)
    return lambda: OwnLoss(mesh, scale, function, ignore_index)
