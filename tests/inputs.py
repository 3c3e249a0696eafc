"""Random inputs of linear attention in all decay forms, and what the fp64 recurrence makes of them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lasp_kernels import recurrent_linear_attention

FORMS = ("none", "head", "token", "channel")
NAMES = ("q", "k", "v", "log_decay", "initial_state")


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    do: Tensor
    d_final_state: Tensor

    @property
    def given(self) -> dict[str, Tensor]:
        """The tensors of the call that are not None, by name."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    def shard(self, lengths, rank) -> "Inputs":
        """The tokens of one rank; copies, which require no gradient."""
        start = sum(lengths[:rank])
        end = start + lengths[rank]
        cut = {name: getattr(self, name)[:, start:end].clone() for name in ("q", "k", "v", "do")}
        if self.log_decay is not None:
            per_token = self.log_decay.ndim > 1
            cut["log_decay"] = (self.log_decay[:, start:end] if per_token else self.log_decay).clone()
        if self.initial_state is not None:
            cut["initial_state"] = self.initial_state.clone()
        return replace(self, **cut)

    def to(self, dtype) -> "Inputs":
        """q, k, v and do in another dtype."""
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "do")})

    def require_grad(self, names=NAMES) -> list[Tensor]:
        """Turn gradients on for those of `names` that are given; returns the tensors."""
        return [x.requires_grad_() for name, x in self.given.items() if name in names]


def random_inputs(
    form, T, *, B=2, H=2, groups=1, K=5, V=4, sequences=None, state=True, strength=1.0, seed=0, dtype=torch.float64
) -> Inputs:
    """`sequences` is the number of packed ones; the decays lie between -strength and 0."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=dtype)

    N = B if sequences is None else sequences
    shape = {"none": None, "head": (H,), "token": (B, T, H), "channel": (B, T, H, K)}[form]
    return Inputs(
        q=normal(B, T, H * groups, K),
        k=normal(B, T, H, K),
        v=normal(B, T, H, V),
        log_decay=None if shape is None else -strength * torch.rand(shape, generator=draw, dtype=dtype),
        initial_state=normal(N, H, K, V) if state else None,
        do=normal(B, T, H * groups, V),
        d_final_state=normal(N, H, K, V),
    )


def run(function, x: Inputs, **options):
    """Outputs and final state of a function with the oracle's signature."""
    return function(x.q, x.k, x.v, log_decay=x.log_decay, initial_state=x.initial_state, **options)


def gradients(x: Inputs, o, final_state) -> dict[str, Tensor]:
    """By name, of what requires one."""
    wanted = {name: t for name, t in x.given.items() if t.requires_grad}
    seeds = ((o, x.do.to(o.dtype)), (final_state, x.d_final_state.to(final_state.dtype)))
    outputs, seeds = zip(*[(y, dy) for y, dy in seeds if y.requires_grad])
    found = torch.autograd.grad(outputs, list(wanted.values()), seeds, allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), found)}


def oracle(x: Inputs, *, cu_seqlens=None, scale=1.0):
    """Outputs, final state and all gradients of the recurrence."""
    x = replace(x, **{name: t.detach().clone() for name, t in x.given.items()})
    x.require_grad()
    offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    o, final_state = run(recurrent_linear_attention, x, scale=scale, cu_seqlens=offsets)
    return o.detach(), final_state.detach(), gradients(x, o, final_state)


def assert_close(actual, expected, what, *, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")
