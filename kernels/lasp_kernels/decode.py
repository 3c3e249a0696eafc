"""One token more: what each operator does to its state and gives for a token, with the state changed in place.

    linear attention    S <- exp(log_decay) * S + k^T v                                      o = scale * q S
    delta rule          S <- (I - beta k^T k) diag(exp(log_decay)) S + beta k^T v            o = scale * q S
    elementwise         h <- exp(log_decay) * h + x                                          h
    selective scan      h <- exp(dt A) * h + dt u B                                          y = sum_N h C
    convolution         the last W - 1 tokens                                                y

The token after those of `linear_attention` and the others goes on from their final state: shapes and dtypes are theirs
without the dimension T, so N, the number of sequences, is B. States are fp32 (fp64 for fp64 inputs). They stay where
they are, the host looks at no number on a GPU, and nothing here depends on how many tokens came before, so that a step
can be captured in a CUDA graph, and costs the same for ever.

There is no gradient. What computes a step is told by `dispatch.step_path`: the Triton kernels of decode_kernels.py, or
PyTorch, here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp_kernels.dispatch import step_path
from lasp_kernels.operands import check_dense
from lasp_kernels.reference import state_dtype


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """One token of linear attention: o, and `state` becomes that behind the token.

    Args:
        q: [B, H*G, K], where G query heads read one state; or, as k, [B, H/G, K] where G states share one key.
        k: [B, H, K].
        v: [B, H, V].
        log_decay: None, [H] (fixed per head), [B, H] (per token) or [B, H, K] (per token and channel); <= 0.
        state: [B, H, K, V], changed in place; with `normalize` V + 1 columns, the last of which is the sum of keys.
        scale: multiplies o.
        normalize: divide o by the query's product with the sum of keys.

    Returns:
        o [B, H*G, V] in q's dtype, or [B, H, V] where states share keys.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    _check_heads(q, k, v, state, columns=v.shape[-1] + normalize)
    _check_log_decay(log_decay, v.shape[:2], k, fixed=True)
    if step_path(k, rows=k.shape[2]) == "triton":
        return _kernels(k, rows=k.shape[2]).attend(q, k, v, None, log_decay, state, scale, normalize)
    return _linear_attention(q, k, v, log_decay, state, scale, normalize)


@torch.no_grad()
def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float, normalize: bool
) -> Tensor:
    """The step in plain PyTorch."""
    dtype, (B, H, _, V), given = state.dtype, state.shape, q.dtype
    if k.shape[1] < H:
        q, k = (x.repeat_interleave(H // x.shape[1], 1) for x in (q, k))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if normalize:
        v = F.pad(v, (0, 1), value=1.0)
    _decay_heads(state, log_decay)
    state.addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    o = _product(q.view(B, H, -1, q.shape[-1]), state)
    if normalize:
        o = o[..., :-1] / o[..., -1:]
    return (o * scale).reshape(B, -1, V - normalize).to(given)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    scale: float = 1.0,
) -> Tensor:
    """One token of the delta rule: o, and `state` becomes that behind the token.

    Args:
        q, k: [B, HK, K]; each head serves H / HK heads of v.
        v: [B, H, V].
        beta: [B, H].
        log_decay: None, [B, H] (per token) or [B, H, K] (per token and channel); <= 0.
        state: [B, H, K, V], changed in place.
        scale: multiplies o.

    Returns:
        o [B, H, V] in the dtype of v.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [B, H, K], got q {tuple(q.shape)} and k {tuple(k.shape)}")
    _check_heads(q, k, v, state, columns=v.shape[-1])
    _check_like("beta", beta, tuple(v.shape[:2]), "[B, H]", q)
    _check_log_decay(log_decay, v.shape[:2], k, fixed=False)
    if step_path(k, rows=k.shape[2]) == "triton":
        return _kernels(k, rows=k.shape[2]).attend(q, k, v, beta, log_decay, state, scale)
    return _delta_rule(q, k, v, beta, log_decay, state, scale)


@torch.no_grad()
def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    """The step in plain PyTorch."""
    dtype, H, given = state.dtype, state.shape[1], v.dtype
    q, k = (x.to(dtype).repeat_interleave(H // x.shape[1], 1).unsqueeze(-2) for x in (q, k))  # [B, H, 1, K]
    _decay_heads(state, log_decay)
    error = v.to(dtype).unsqueeze(-2) - _product(k, state)  # [B, H, 1, V]
    state.addcmul_((k * beta.to(dtype)[..., None, None]).mT, error)
    return (_product(q, state) * scale).squeeze(-2).to(given)


def elementwise_step(x: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """One token of a recurrence whose channels decay each by itself: h in x's dtype; `state` becomes h.

    Args:
        x: [B, ...].
        log_decay: <= 0, of x's shape, or with 1 in dimensions behind B; -inf forgets all.
        state: of x's shape, changed in place.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    check_dense("x", x)
    _check_like("state", state, tuple(x.shape), "[B, ...] of x", x, state_dtype(x.dtype))
    check_dense("log_decay", log_decay)
    fits = log_decay.ndim == x.ndim and log_decay.shape[:1] == x.shape[:1]
    if not fits or any(size not in (1, of_x) for size, of_x in zip(log_decay.shape[1:], x.shape[1:])):
        raise ValueError(
            f"log_decay must have the shape of x, {tuple(x.shape)}, or 1 in dimensions behind B, got "
            f"{tuple(log_decay.shape)}"
        )
    return _kernels(x).recur(x, log_decay, state) if step_path(x) == "triton" else _elementwise(x, log_decay, state)


@torch.no_grad()
def _elementwise(x: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """The step in plain PyTorch."""
    _decay(state, log_decay).add_(x.to(state.dtype))
    return state.to(x.dtype, copy=True)


def selective_scan_step(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """One token of Mamba's scan: y [B, D] in the dtype of u, and `state` becomes that behind the token.

    Args:
        u: [B, D].
        dt: [B, D], >= 0, after its bias and softplus.
        A: [D, N], <= 0.
        B: [B, N].
        C: [B, N].
        state: [B, D, N], changed in place.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    check_dense("u", u)
    if u.ndim != 2:
        raise ValueError(f"u must have shape [B, D], got {tuple(u.shape)}")
    check_dense("A", A)
    if A.ndim != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(f"A must have shape [D, N] with D = {u.shape[1]}, got {tuple(A.shape)}")
    of_token = (u.shape[0], A.shape[1])
    _check_like("dt", dt, tuple(u.shape), "[B, D]", u)
    _check_like("A", A, tuple(A.shape), "[D, N]", u)
    _check_like("B", B, of_token, "[B, N]", u)
    _check_like("C", C, of_token, "[B, N]", u)
    _check_like("state", state, (*u.shape, A.shape[1]), "[B, D, N]", u, state_dtype(u.dtype))
    if step_path(u, states=A.shape[1]) == "triton":
        return _kernels(u, states=A.shape[1]).scan(u, dt, A, B, C, state)
    return _selective_scan(u, dt, A, B, C, state)


@torch.no_grad()
def _selective_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """The step in plain PyTorch."""
    dt, wide, A, B, C = (x.to(state.dtype) for x in (dt, u, A, B, C))
    _decay(state, dt.unsqueeze(-1) * A).addcmul_((dt * wide).unsqueeze(-1), B.unsqueeze(1))
    return _product(state, C.unsqueeze(-1)).squeeze(-1).to(u.dtype)


def convolution_step(x: Tensor, weight: Tensor, bias: Tensor | None, last: Tensor) -> Tensor:
    """One token of a causal convolution of each channel: y [B, D] in x's dtype, and x becomes the newest of `last`.

    Args:
        x: [B, D].
        weight: [D, W]; weight[:, W - 1] meets the token itself.
        bias: [D] or None.
        last: [B, W - 1, D], the tokens before, the oldest first, zeros where there are none; changed in place.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    check_dense("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape [B, D], got {tuple(x.shape)}")
    check_dense("weight", weight)
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] == 0:
        raise ValueError(f"weight must have shape [D, W] with D = {x.shape[1]} and W >= 1, got {tuple(weight.shape)}")
    _check_like("weight", weight, tuple(weight.shape), "[D, W]", x)
    if bias is not None:
        _check_like("bias", bias, (x.shape[1],), "[D]", x)
    _check_like("last", last, (x.shape[0], weight.shape[1] - 1, x.shape[1]), "[B, W - 1, D]", x, last.dtype)
    if step_path(x) == "triton":
        return _kernels(x).convolve(x, weight, bias, last)
    return _convolution(x, weight, bias, last)


@torch.no_grad()
def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, last: Tensor) -> Tensor:
    """The step in plain PyTorch, in fp32 at least."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    seen = torch.cat([last, x.to(last.dtype).unsqueeze(1)], 1)  # [B, W, D]
    y = (seen.to(dtype) * weight.to(dtype).T).sum(1)
    if bias is not None:
        y += bias.to(dtype)
    last.copy_(seen[:, 1:])
    return y.to(x.dtype)


def _kernels(x: Tensor, **sizes: int) -> Any:
    """The module of the kernels. Where Triton is not installed, nothing else needs it."""
    from lasp_kernels import decode_kernels

    if (reason := decode_kernels.unsupported(x, **sizes)) is not None:
        raise ValueError(f"the Triton kernels of a step take {reason}")
    return decode_kernels


def _decay_heads(state: Tensor, log_decay: Tensor | None) -> None:
    """State [B, H, K, V] times the exp of log_decay [H], [B, H] or [B, H, K], in place."""
    if log_decay is not None:
        _decay(state, log_decay.unsqueeze(-1) if log_decay.ndim == 3 else log_decay[..., None, None])


def _decay(state: Tensor, log_decay: Tensor) -> Tensor:
    """State times exp(log_decay), in place.

    A factor near 1 is rounded to the same side at every token where the decay is fixed: by 3e-8 in fp32, which is 3e-4
    of what a decay of 1e-4 remembers. exp(x) - 1 has its digits behind the point.
    """
    log_decay = log_decay.to(state.dtype)
    weak = log_decay > -0.5
    rest = torch.where(weak, log_decay.expm1(), log_decay.exp())
    return torch.addcmul(state * weak, state, rest, out=state)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of both, which autocast would round."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _check_heads(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, columns: int) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dense(name, x)
        if x.ndim != 3 or 0 in x.shape[1:]:
            raise ValueError(
                f"{name} must have shape [B, H, dim] with at least one head and channel, got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got q {q.dtype} and {name} {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got q on {q.device} and {name} on {x.device}")
    if not q.shape[0] == k.shape[0] == v.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q, k and v must agree in B, and q and k in K, got q {tuple(q.shape)}, k {tuple(k.shape)} and v "
            f"{tuple(v.shape)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of the heads of k, got {q.shape[1]} and {k.shape[1]}")
    if v.shape[1] % k.shape[1]:
        raise ValueError(f"v must have the heads of k, or a multiple of them, got {v.shape[1]} and {k.shape[1]}")
    if q.shape[1] > k.shape[1] < v.shape[1]:
        raise ValueError(
            f"only one of q and v may have more heads than k, got q {q.shape[1]}, k {k.shape[1]} and v {v.shape[1]}"
        )
    shape = (*v.shape[:2], k.shape[2], columns)
    _check_like("state", state, shape, "[B, H, K, V]", q, state_dtype(q.dtype))


def _check_log_decay(log_decay: Tensor | None, heads: torch.Size, k: Tensor, *, fixed: bool) -> None:
    """Raise unless it fits states of so many sequences and heads [B, H]."""
    if log_decay is None:
        return
    check_dense("log_decay", log_decay)
    B, H = heads
    forms = {"[B, H]": (B, H), "[B, H, K]": (B, H, k.shape[2])}
    if fixed:
        forms = {"[H]": (H,), **forms}
    if tuple(log_decay.shape) not in forms.values():
        shapes = " or ".join(f"{form} = {shape}" for form, shape in forms.items())
        raise ValueError(f"log_decay must have shape {shapes}, got {tuple(log_decay.shape)}")
    if log_decay.device != k.device:
        raise ValueError(f"log_decay must be on the device of k, {k.device}, got {log_decay.device}")


def _check_like(
    name: str, x: Tensor, shape: tuple[int, ...], form: str, like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raise unless it is a float tensor of this shape on the device of `like`; of the dtype, if any, and contiguous."""
    check_dense(name, x)
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {form} = {shape}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of the other inputs, {like.device}, got {x.device}")
    if dtype is None:
        return
    if not x.is_contiguous():
        raise ValueError(f"{name}, which is changed in place, must be contiguous, got strides {x.stride()}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for inputs of {like.dtype}, got {x.dtype}")
