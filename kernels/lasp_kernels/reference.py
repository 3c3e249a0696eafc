"""Causal linear attention in plain PyTorch: the specification.

Per head, with a state S [K, V] that starts at the initial state::

    S_t = exp(log_decay_t) * S_{t-1} + k_t^T v_t          o_t = scale * q_t S_t

`recurrent_linear_attention` is that loop. With a normaliser o_t is divided by q_t s_t, where s is the sum of keys that
decays as S does: S with a column more, whose value is 1 at every token ("Transformers are RNNs", arXiv 2006.16236,
equations 16 to 20). What a run of tokens does to the state before it is a map S -> T(S) + state,
where `state` is what the tokens alone leave. T is one of three, told apart by the `transition` that stands for it:

    None                         S                    no decay
    log-decay [..., H, K | 1]    exp(transition) S    a decay; the usual case
    matrix [..., H, K, K]        transition @ S       a delta rule

Two maps in a row are a map of the same kind, which is why a sequence can be cut anywhere. `fold_maps` passes a state
through maps, in order, with an arithmetic that depends on nothing else.

Shapes: q [B, T, H*G, K]; k [B, T, H, K]; v [B, T, H, V]: G query heads read one state. Or q and k [B, T, H/G, K]: G
states are written by one key, and read by one query. States [N, H, K, V], with a normaliser [N, H, K, V + 1], where N
is B, or the number of packed sequences (then B = 1). `log_decay`, natural logarithm and <= 0: None, [H] (fixed
per head), [B, T, H] (per token), [B, T, H, K] (per token and channel). Inputs have any float dtype; states are
fp32, or fp64 when the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a state is kept: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token; differentiable by autograd. The oracle of every test, not a path for users.

    Returns o [B, T, H*G, V] in q's dtype and the final state [N, H, K, V]. Shapes: see the module.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        runs = [
            recurrent_linear_attention(
                q[:, a:b],
                k[:, a:b],
                v[:, a:b],
                log_decay=log_decay if log_decay is None or log_decay.ndim == 1 else log_decay[:, a:b],
                scale=scale,
                normalize=normalize,
                initial_state=None if initial_state is None else initial_state[n : n + 1],
            )
            for n, (a, b) in enumerate(zip(bounds, bounds[1:]))
        ]
        return torch.cat([o for o, _ in runs], 1), torch.cat([s for _, s in runs])
    dtype = state_dtype(q.dtype)
    if k.shape[2] < v.shape[2]:
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    B, T, H, K = k.shape
    V, G = v.shape[-1], q.shape[2] // H
    state = q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        if log_decay is not None:
            log_factor = log_decay if log_decay.ndim == 1 else log_decay[:, t]  # [H], [B, H] or [B, H, K]
            log_factor = log_factor.unsqueeze(-1) if log_decay.ndim < 4 else log_factor
            state = log_factor.to(dtype).exp().unsqueeze(-1) * state
        state = state + k[:, t].to(dtype).unsqueeze(-1) * v[:, t].to(dtype).unsqueeze(-2)
        q_t = q[:, t].to(dtype).view(B, H, G, K)
        o_t = q_t @ state
        o_t = o_t[..., :-1] / o_t[..., -1:] if normalize else o_t
        outputs.append((scale * o_t).reshape(B, H * G, -1))
    o = torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, H * G, V - normalize)
    return o.to(q.dtype), state


def reference_norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    """The stage after attention (see `layers.norm_gate`), in any dtype."""
    activate, x = activation_of(activation), x.flatten(-2)
    return F.rms_norm(x, x.shape[-1:], weight, eps) * activate(gate)


def reference_rotate(q: Tensor, k: Tensor, position_ids: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation by position (see `layers.rotate`), in any dtype."""
    angle = (position_ids.double()[..., None, None] * theta).remainder(2 * math.pi)  # [(B,) T, H, K]
    angle = angle.to(state_dtype(q.dtype))
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
    return torch.cat([q * cos, q * sin], -1), torch.cat([k * cos, k * sin], -1)


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of a name: "none", "sigmoid" or "silu"."""
    functions = {"none": lambda g: g, "sigmoid": torch.sigmoid, "silu": F.silu}
    if name not in functions:
        raise ValueError(f"activation must be one of {', '.join(functions)}, got {name!r}")
    return functions[name]


def fold_maps(entering: Tensor, state: Tensor, transition: Tensor | None) -> Tensor:
    """Pass a state through maps one by one, S <- T_u(S) + state_u: the arithmetic of every scan, bit for bit.

    entering [N, H, K, V]; state [U, N, H, K, V]; transition None, log-decays [U, N, H, K | 1] or matrices
    [U, N, H, K, K]. On any strides.
    """
    if transition is None:
        for local_state in state:
            entering = entering + local_state
    elif transition.ndim == 5:
        for matrix, local_state in zip(transition, state):
            entering = transform(matrix, entering) + local_state
    else:
        for factor, local_state in zip(transition.exp().unsqueeze(-1), state):
            entering = factor * entering + local_state
    return entering


def transform(matrix: Tensor, state: Tensor) -> Tensor:
    """matrix [..., K, K] @ state [..., K, V], one row of the state after the other, each product rounded.

    A matrix product may add in another order for other numbers of heads or columns; this gives the same bits for all.
    """
    out = torch.zeros_like(state)
    for n in range(matrix.shape[-1]):
        out = out + matrix[..., n : n + 1] * state[..., n : n + 1, :]
    return out
