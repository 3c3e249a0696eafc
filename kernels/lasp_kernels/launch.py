"""Checks the inputs of linear attention and decides which path computes it.

| device | inputs | path |
|---|---|---|
| CUDA | bf16, fp16, fp32; log_decay None, [H], [B, T, H]; K, V from 16 to 256 | `triton_steps` |
| CUDA | fp64, or log_decay [B, T, H, K] | `reference` |
| CUDA | other K or V | refused |
| CPU | any | `reference` |

The environment variable LASP_KERNELS overrules this for debugging: "reference", or "triton", which raises a
`ValueError` where the kernels cannot serve and which runs on a CPU under Triton's interpreter (TRITON_INTERPRET=1).
LASP_DEBUG=1 prints each choice once. Nothing changes the path otherwise; `path` tells it.

Products of fp32 inputs are true fp32, or TF32 on a GPU after `torch.set_float32_matmul_precision("high")`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lasp_kernels.reference import TILE, ChunkedSteps, fold_maps, reference_norm_gate

Steps = ChunkedSteps  # what every path offers


def path(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> str:
    """ "triton" or "reference": what computes these inputs (see the table above)."""
    per_channel = log_decay is not None and log_decay.ndim == 4
    return _path(k, per_channel=per_channel)


def _path(x: Tensor, *, per_channel: bool) -> str:
    asked = os.environ.get("LASP_KERNELS", "")
    if asked not in ("", "triton", "reference"):
        raise ValueError(f'the environment variable LASP_KERNELS must be "triton" or "reference", got {asked!r}')
    by_default = "triton" if x.device.type == "cuda" and x.dtype != torch.float64 and not per_channel else "reference"
    return asked or by_default


def plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    segment_length: int | None = None,
    decay_gradient: bool = False,
    ends: bool = True,
) -> Steps:
    """The steps of the path for these inputs.

    Args:
        q: and k, v, log_decay: the inputs, checked by `check_inputs`.
        cu_seqlens: offsets of packed sequences; on the host, or the host waits for them.
        segment_length: tokens of a segment, a multiple of 64; None chooses.
        decay_gradient: whether `decay_gradient` will be called.
        ends: whether a state enters or the one behind the last token is wanted, or such a gradient in backward.
    """
    chosen = path(q, k, v, log_decay)
    if os.environ.get("LASP_DEBUG", "") not in ("", "0"):
        form = "none" if log_decay is None else f"{log_decay.ndim}-d"
        _tell_once(
            f"lasp_kernels: {chosen} for {k.dtype} on {k.device.type}, K {k.shape[-1]}, V {v.shape[-1]}, decay {form}"
        )
    if chosen == "reference":
        return ChunkedSteps(q, k, v, log_decay, cu_seqlens=cu_seqlens, segment_length=segment_length)
    from lasp_kernels.triton_steps import TritonSteps  # where Triton is not installed, nothing else needs it

    return TritonSteps.of(  # type: ignore[return-value]  # not a subclass, but the same steps
        q,
        k,
        v,
        log_decay,
        cu_seqlens=cu_seqlens,
        segment_length=segment_length,
        decay_gradient=decay_gradient,
        ends=ends,
    )


def fold(entering: Tensor | None, state: Tensor, log_decay: Tensor) -> Tensor:
    """Pass a state [N, H, K, V] through the maps that `Steps.maps` gives, with the arithmetic of `Steps.scan`.

    None is a state of zeros, of which the first map leaves its own state.

    state [U, N, H, K, V] and log_decay [U, N, H, K | 1] may come from several ranks, and be slices along H or K.
    """
    if entering is None:
        if len(state) == 1:
            return state[0]
        entering, state, log_decay = state[0], state[1:], log_decay[1:]
    if _path(state, per_channel=log_decay.shape[-1] > 1) == "triton":
        from lasp_kernels import triton_steps

        return triton_steps.fold(entering, state, log_decay)
    return fold_maps(entering, state, log_decay)


def norm_gate(
    x: Tensor, gate: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    """RMS norm of x [..., H, V] over its heads together, times weight [H * V], times activation(gate [..., H * V]).

    What models do after attention, in one pass over memory on a GPU (`norm.py`); in PyTorch on a CPU, in
    fp64, and under `torch.compile`, which fuses it by itself. Returns [..., H * V] in x's dtype.
    `activation` is "none", "sigmoid" or "silu".
    """
    if x.device.type == "cuda" and x.dtype != torch.float64 and not torch.compiler.is_compiling():
        from lasp_kernels.norm import fused_norm_gate

        return fused_norm_gate(x, gate, weight, eps=eps, activation=activation)
    return reference_norm_gate(x, gate, weight, eps=eps, activation=activation)


@lru_cache
def _tell_once(message: str) -> None:
    print(message, file=sys.stderr)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, segment_length: int | None = None) -> None:
    """Raise the `ValueError` or `TypeError` that says which argument is wrong, with its value.

    Decays are only looked at on a CPU: on a GPU that would wait for the device.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x))}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape [B, T, H, dim], got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got q {q.dtype} and {name} {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got q on {q.device} and {name} on {x.device}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in [B, T, H], got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in B, T and K, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of the heads of k, got {q.shape[2]} and {k.shape[2]}")
    if segment_length is not None and (segment_length < TILE or segment_length % TILE):
        raise ValueError(f"segment_length must be a positive multiple of {TILE}, got {segment_length}")
    if log_decay is not None:
        _check_log_decay(log_decay, k)


def _check_log_decay(log_decay: Tensor, k: Tensor) -> None:
    B, T, H, K = k.shape
    if not isinstance(log_decay, Tensor) or not log_decay.is_floating_point():
        raise TypeError(
            f"log_decay must be a floating-point tensor, got {getattr(log_decay, 'dtype', type(log_decay))}"
        )
    if tuple(log_decay.shape) not in {(H,), (B, T, H), (B, T, H, K)}:
        raise ValueError(
            f"log_decay must have shape [H] = {(H,)}, [B, T, H] = {(B, T, H)} or [B, T, H, K] = {(B, T, H, K)}, "
            f"got {tuple(log_decay.shape)}"
        )
    if log_decay.device != k.device:
        raise ValueError(f"log_decay must be on the device of k, {k.device}, got {log_decay.device}")
    if log_decay.device.type == "cpu" and log_decay.numel():
        low, high = log_decay.detach().aminmax()
        if not (high <= 0 and torch.isfinite(low)):
            raise ValueError(f"log_decay must be finite and <= 0, got values from {low.item()} to {high.item()}")
