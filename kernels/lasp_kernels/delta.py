"""The delta rule, token by token: the specification, what it is computed from, and the checks of that.

Per head, with a state S [K, V] that starts at the initial state::

    S_t = (I - beta_t k_t^T k_t) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t^T v_t          o_t = scale * q_t S_t

without decay DeltaNet (arXiv 2406.06484), with one per token Gated DeltaNet (arXiv 2412.06464), with one per token
and channel KDA (arXiv 2510.26692). The same with matrix products is in delta_steps.py.

Without decay the state stays bounded only while beta |k|^2 <= 2; keys are normalised by who calls.

Shapes: q, k [B, T, HK, K]; v [B, T, H, V], where each head of q and k serves H / HK heads of v; beta [B, T, H];
log_decay <= 0: None, [B, T, H] or [B, T, H, K]. States [N, H, K, V] where N is B, or the number of packed sequences
(then B = 1). Inputs have any float dtype; states are fp32, or fp64 when the inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasp_kernels import operands
from lasp_kernels.operands import TILE, check_dense, check_form
from lasp_kernels.reference import state_dtype


class DeltaOperands(NamedTuple):
    """What the delta rule is computed from; shapes: see the module."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None = None
    scale: float = 1.0


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token; differentiable by autograd. The oracle of every test, not a path for users.

    Returns o [B, T, H, V] in q's dtype and the final state [N, H, K, V]. Shapes: see the module.
    """
    dtype, H = state_dtype(q.dtype), v.shape[2]
    g = torch.zeros_like(beta) if log_decay is None else log_decay
    x = [y.to(dtype) for y in (expand_heads(q, H) * scale, expand_heads(k, H), v, beta.unsqueeze(-1))]
    x.append((g if g.ndim == 4 else g.unsqueeze(-1)).to(dtype).exp())
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = len(bounds) - 1 if cu_seqlens is not None else q.shape[0]
    state = v.new_zeros(rows, H, q.shape[-1], v.shape[-1], dtype=dtype) if initial_state is None else initial_state
    runs = zip(bounds, bounds[1:], state.to(dtype).split(q.shape[0]))
    outputs, states = zip(*[_recur([y[:, a:b] for y in x], entering) for a, b, entering in runs])
    return torch.cat(outputs, 1).to(q.dtype), torch.cat(states)


def _recur(x: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """One run. q, k, v, beta [B, T, H, 1] and the factors of the decay [B, T, H, K | 1]; state [B, H, K, V]."""
    outputs = [x[2][:, :0]]
    for q, k, v, beta, factor in zip(*[y.unbind(1) for y in x]):
        state = factor.unsqueeze(-1) * state
        error = v - (k.unsqueeze(-2) @ state).squeeze(-2)
        state = state + (beta * k).unsqueeze(-1) * error.unsqueeze(-2)
        outputs.append((q.unsqueeze(-2) @ state).transpose(1, 2))
    return torch.cat(outputs, 1), state


def check_delta_inputs(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, segment_length: int | None = None
) -> None:
    """Raise the `ValueError` or `TypeError` that says which argument is wrong, with its value.

    Decays are only looked at on a CPU: on a GPU that would wait for the device.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_form(name, x)
        _check_device(name, x, q)
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got q {q.dtype} and {name} {x.dtype}")
    if q.is_meta:
        raise ValueError("q, k and v must be on a device that holds numbers, got q on meta")
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [B, T, H, K], got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k and v must agree in [B, T], got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if k.shape[2] == 0 or v.shape[2] == 0 or v.shape[2] % k.shape[2]:
        raise ValueError(f"v must have a multiple of the heads of k, got {v.shape[2]} and {k.shape[2]}")
    check_dense("beta", beta)
    _check_device("beta", beta, q)
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta must have shape [B, T, H] = {tuple(v.shape[:3])}, got {tuple(beta.shape)}")
    if segment_length is not None and (segment_length < TILE or segment_length % TILE):
        raise ValueError(f"segment_length must be a positive multiple of {TILE}, got {segment_length}")
    if log_decay is not None:
        _check_log_decay(log_decay, k, v)


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _check_log_decay(log_decay: Tensor, k: Tensor, v: Tensor) -> None:
    check_dense("log_decay", log_decay)
    _check_device("log_decay", log_decay, k)
    per_token = tuple(v.shape[:3])
    per_channel = (*per_token, k.shape[-1])
    if tuple(log_decay.shape) not in (per_token, per_channel):
        raise ValueError(
            f"log_decay must have shape [B, T, H] = {per_token} or [B, T, H, K] = {per_channel}, "
            f"got {tuple(log_decay.shape)}"
        )
    operands.check_decays(log_decay)


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Each head of q and k as often as there are heads of v that it serves."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def host_bounds(cu_seqlens: Sequence[int] | Tensor, batch: int, tokens: int) -> list[int]:
    """Offsets of packed sequences on the host; `ValueError` unless they go from 0 to T, with B = 1."""
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens needs inputs with B = 1, got B = {batch}")
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"cu_seqlens must go from 0 to T = {tokens} in steps >= 0, got {bounds}")
    return bounds
