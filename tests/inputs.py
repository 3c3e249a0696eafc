"""Random inputs of linear attention in all decay forms, and what the fp64 recurrence makes of them."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lasp_kernels import recurrent_linear_attention

FORMS = ("none", "head", "token", "channel")
NAMES = ("q", "k", "v", "log_decay", "initial_state")
VARIANTS = {  # of `random_inputs`
    "normalised": {"normalize": True},
    "grouped values": {"share": 2},
    "both": {"normalize": True, "share": 2},
    "normalised, grouped queries": {"normalize": True, "groups": 2},
}


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    do: Tensor
    d_final_state: Tensor
    normalize: ClassVar[bool] = False

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


class NormalisedInputs(Inputs):
    """For a call with `normalize`."""

    normalize = True


def random_inputs(
    form,
    T,
    *,
    B=2,
    H=2,
    groups=1,
    share=1,
    normalize=False,
    K=5,
    V=4,
    sequences=None,
    state=True,
    strength=1.0,
    seed=0,
    dtype=torch.float64,
) -> Inputs:
    """`sequences` is the number of packed ones; the decays lie between -strength and 0.

    H heads of k, of which `groups` heads of q read one, and `share` heads of v share one. With `normalize` q and k are
    positive, and so is the sum of keys that enters.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=dtype)

    N, S = B if sequences is None else sequences, H * share  # heads of states
    shape = {"none": None, "head": (S,), "token": (B, T, S), "channel": (B, T, S, K)}[form]
    x = (NormalisedInputs if normalize else Inputs)(
        q=normal(B, T, H * groups, K),
        k=normal(B, T, H, K),
        v=normal(B, T, S, V),
        log_decay=None if shape is None else -strength * torch.rand(shape, generator=draw, dtype=dtype),
        initial_state=normal(N, S, K, V + normalize) if state else None,
        do=normal(B, T, S * groups, V),
        d_final_state=normal(N, S, K, V + normalize),
    )
    if normalize:
        x = replace(x, q=x.q.abs() + 0.1, k=x.k.abs() + 0.1)
        if state:
            x.initial_state[..., -1].abs_().add_(0.1)
    return x


def run(function, x: Inputs, **options):
    """Outputs and final state of a function with the oracle's signature."""
    options = {"normalize": True, **options} if x.normalize else options
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


STRENGTHS = (0.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1e30)


def every_strength(form, T, *, K=16, V=16, dtype=torch.float32) -> Inputs:
    """Weak decays behind strong ones, whose sum over both has no digits left for the weak: a pattern for each head.

    32 tokens decay with a strength of `STRENGTHS`, from the first on, and in two heads from later ones; the others with
    0.01. Then three heads of decays between 1e-4 and 1e4.
    """
    draw = torch.Generator().manual_seed(7)
    patterns = [(0, strength) for strength in STRENGTHS] + [(5, 20.0), (40, 100.0)]
    log_decay = torch.full((1, T, len(patterns) + 3), -0.01, dtype=dtype)
    for head, (first, strength) in enumerate(patterns):
        log_decay[:, first : first + 32, head] = -strength
    if form == "channel":
        log_decay = log_decay.unsqueeze(-1).repeat(1, 1, 1, K)
    mixed = log_decay[:, :, len(patterns) :]
    mixed.copy_(-(10 ** (8 * torch.rand(mixed.shape, generator=draw, dtype=dtype) - 4)))
    x = random_inputs(form, T, B=1, H=log_decay.shape[2], K=K, V=V, dtype=dtype)
    return replace(x, log_decay=log_decay)


def largest_error(actual, expected, heads_dim) -> float:
    """The greatest of all heads, each relative to the greatest number of its head. Below 1e-30 all are taken for 0."""
    error, size = (
        (t.double().cpu().movedim(heads_dim, 0)).flatten(1).abs().amax(1) for t in (actual - expected, expected)
    )
    return (error / size.clamp(min=1e-30)).max().item()


def assert_digits(actual: dict[str, Tensor], expected: dict[str, Tensor], bound) -> None:
    """Of tensors by name, with a bound on `largest_error`."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        error = largest_error(x.double().cpu(), expected[name].cpu(), 1 if "state" in name else 2)
        assert error <= bound, f"{name}: {error:.1e}"


def spoilt(x) -> Tensor:
    """Which tokens of [B, T, H, ...] (states: heads of [N, H, ...]) are not finite."""
    found = ~x.isfinite()
    return found.flatten(3).any(-1) if found.ndim > 3 else found
