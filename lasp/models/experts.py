"""Experts, which a router chooses for each token by itself: over gated units, and over the heads of a mixer.

As in LLaMA-MoE v2 (arXiv 2411.15708) they are cut from the weights of a dense model (`experts_from_dense`): the inner
channels of its gated units, and the heads of its mixers. No token needs another here, so nothing crosses ranks but the
numbers of `lasp.balance_loss`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layout import ShardLayout
from lasp.models._linears import gated_linear
from lasp.modules import Router
from lasp.ops.call import autocast
from lasp_kernels.grouped import grouped_linear


class GatedExperts(nn.Module):
    """A gated unit in slices of its inner channels: y = sum over the chosen experts e of gate_e * unit_e(x).

    Rows are sorted by expert, and each expert is a matrix product over those that chose it, however many these are: no
    capacity, no token is dropped. On a GPU the host does not wait (`lasp_kernels.grouped`). Of the arithmetic of the
    whole unit it takes the share chosen / (experts + shared); rows are copied twice, `chosen` times as many as tokens.

    Args:
        width: D.
        inner: channels of all experts together, shared ones as well.
        experts: among which the router chooses.
        chosen: how many of them for a token.
        shared: how many more are there for every token (the residual expert of LLaMA-MoE v2), with a gate of 1.
    """

    def __init__(self, width: int, inner: int, experts: int, chosen: int, shared: int = 0):
        super().__init__()
        size = inner // (experts + shared)
        self.router = Router(width, experts, chosen)
        self.value, self.gate = (nn.Parameter(torch.empty(experts, size, width)) for _ in range(2))
        self.out = nn.Parameter(torch.empty(experts, width, size))
        self.shared = GatedUnit(width, shared * size) if shared else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as the linear layers of the models here begin: what comes out is unit-sized."""
        for weight in (self.value, self.gate):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        nn.init.normal_(self.out, std=(self.router.chosen * self.out.shape[-1]) ** -0.5)

    def scale_output(self, factor: float) -> None:
        """Multiply the weights of all last layers."""
        for weight in (self.out, *(() if self.shared is None else (self.shared.out.weight,))):
            weight.mul_(factor)

    def forward(self, x: Tensor, *, layout: ShardLayout | None = None) -> Tensor:
        """x [B, T, D], normed, to the same shape."""
        gates, chosen = self.router(x, layout=layout)
        order = chosen.flatten().argsort(stable=True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        sizes = order.new_zeros(len(self.value)).scatter_add_(0, chosen.flatten(), torch.ones_like(order))
        flat, *weights = autocast(x.flatten(0, -2), self.value, self.gate, self.out)
        rows = _Take.apply(flat, order, back, self.router.chosen)
        hidden = F.silu(grouped_linear(rows, weights[1], sizes)) * grouped_linear(rows, weights[0], sizes)
        of_experts = _Take.apply(grouped_linear(hidden, weights[2], sizes), back, order, 1)
        y = (of_experts.unflatten(0, chosen.shape) * gates.unsqueeze(-1)).sum(-2)  # type: ignore[union-attr]
        return y if self.shared is None else y + self.shared(x)


class GatedUnit(nn.Module):
    """(swish(x W_g) * x W_v) W_o."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.value, self.gate = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] to the same shape."""
        return gated_linear(self.value(x), self.gate(x), self.out, activation="silu")


class HeadExperts(nn.Module):
    """The last layer of a mixer, which takes of each token the heads that its router chose: groups of neighbours.

    So an expert is the queries and the rows of the out projection of some heads. Keys and values are of all tokens, as
    in mixture-of-attention (arXiv 2210.05144): a token that has not chosen a head is seen by those that have. (In the
    code of LLaMA-MoE v2 a head sees only the tokens that chose it, which would be another model for a mixer whose
    state decays.) Any mixer can be cut so; where its norm goes over all heads (HGRN2, Mamba-2), that is not cut.

    It saves no time: states and scores are of all heads, and heads that were not chosen are multiplied by zero.

    Args:
        out: the layer, of the outputs of all heads.
        width: D, of the tokens that choose.
        experts: groups of heads.
        chosen: how many of them for a token.
    """

    def __init__(self, out: nn.Linear, width: int, experts: int, chosen: int):
        super().__init__()
        self.router, self.out = Router(width, experts, chosen), out

    def forward(self, x: Tensor, o: Tensor, *, layout: ShardLayout | None = None) -> Tensor:
        """x [B, T, D], which the router reads, and o [B, T, H * V], the heads, to [B, T, D]."""
        gates, chosen = self.router(x, layout=layout)
        of_groups = gates.new_zeros(*gates.shape[:-1], self.router.experts).scatter(-1, chosen, gates)
        o = o.unflatten(-1, (self.router.experts, -1)) * of_groups.unsqueeze(-1)
        return self.out(o.flatten(-2))


class _Take(torch.autograd.Function):
    """x [M, D] in another order, [k * M, D], each row k times: row order[i] // k, where back[order[i]] = i. Its
    gradient is the sum of k rows that are picked, in one order, not added up as they come."""

    @staticmethod
    def forward(ctx, x, order, back, k):
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, order if k == 1 else order // k)

    @staticmethod
    def backward(ctx, gradient):
        (back,) = ctx.saved_tensors
        gradient = gradient.index_select(0, back)
        return (gradient if ctx.k == 1 else gradient.unflatten(0, (-1, ctx.k)).sum(1)), None, None, None


def cut_unit(value: Tensor, gate: Tensor, out: Tensor, experts: int, shared: int) -> dict[str, Tensor]:
    """The weights of `GatedExperts`, but for the router's, of a gated unit's: value and gate [W, D], out [D, W]. Its
    first channels make the experts, its last the shared ones."""
    size = len(value) // (experts + shared)
    inner = experts * size
    found = {
        "value": value[:inner].unflatten(0, (experts, size)),
        "gate": gate[:inner].unflatten(0, (experts, size)),
        "out": out[:, :inner].unflatten(1, (experts, size)).transpose(0, 1),
    }
    if shared:
        rest = {"value": value[inner:], "gate": gate[inner:], "out": out[:, inner:]}
        found |= {f"shared.{name}.weight": x for name, x in rest.items()}
    return found
