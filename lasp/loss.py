"""The exact mean loss over all tokens of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lasp.ranks import grad_group, waiting


def token_loss(logits: Tensor, labels: Tensor, *, mesh, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Cross entropy, averaged over every token of every rank of dp x sp, not over ranks.

    Args:
        logits: [..., vocabulary], this rank's tokens, any float dtype; the loss is taken in fp32 (fp64 for fp64).
        labels: [...], int64, already shifted (`shard_batch` does it); `ignore_index` marks tokens that do not count.
        mesh: the whole mesh (dp_replicate x dp_shard x sp), one axis, a ProcessGroup, or None for one rank.
        ignore_index: the label that does not count.

    Returns:
        The loss, equal on every rank, and the number of tokens that it is the mean of (int64). Its gradient is
        scaled so that the *average* of parameter gradients over `grad_mesh(mesh)`, which DDP, FSDP2 and
        `sync_grads` form, is exact, however unequal the ranks' token counts. With no token at all the loss is 0.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must agree but for the last")
    exact = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    local = F.cross_entropy(exact, labels.flatten(), ignore_index=ignore_index, reduction="sum")
    group, ranks = grad_group(mesh)
    tokens = (labels != ignore_index).sum()
    total = local.detach().clone()
    if ranks > 1:
        with waiting("token_loss, forward: the sum over all ranks"):
            dist.all_reduce(tokens, group=group)
            dist.all_reduce(total, group=group)
    count = tokens.clamp(min=1).to(total.dtype)  # an integer would be divided in fp32
    return _GlobalMean.apply(local, total / count, ranks / count), tokens  # type: ignore[return-value]


class _GlobalMean(torch.autograd.Function):
    """The value of the global mean with the gradient of this rank's part of it."""

    @staticmethod
    def forward(ctx, local, mean, weight):
        ctx.save_for_backward(weight)
        return mean

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient * weight, None, None
