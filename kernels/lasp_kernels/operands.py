"""The tensors of one call, and the checks that they pass before anything is computed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 64  # tokens; a segment is a multiple of it


class Operands(NamedTuple):
    """What linear attention computes on, handed as one from step to step.

    q [B, T, H*G, K]; k [B, T, H, K]; v [B, T, H, V], of one float dtype; or q and k [B, T, H/G, K] with v of H heads, G
    of which share one of q and k. `log_decay`, natural logarithm and <= 0: None, [H] (fixed per head), [B, T, H] (per
    token) or [B, T, H, K] (per token and channel). `scale` multiplies o. `normalize`: o is divided by what it would be
    with values of 1 (and a scale of 1), and states have that as a column more.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    scale: float = 1.0
    normalize: bool = False

    @property
    def heads(self) -> int:
        """Of states."""
        return self.v.shape[2]

    @property
    def output_heads(self) -> int:
        """Of o."""
        return max(self.q.shape[2], self.v.shape[2])

    @property
    def state_columns(self) -> int:
        """Of states: V, and one more for the sum of keys."""
        return self.v.shape[3] + self.normalize


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless all three are dense float tensors of four dimensions, of one dtype, on one device."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_form(name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"q, k and v must have one dtype, got q {q.dtype} and {name} {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got q on {q.device} and {name} on {x.device}")
    if q.is_meta:
        raise ValueError("q, k and v must be on a device that holds numbers, got q on meta")


def shown(x: object) -> str:
    """A value that is not what it must be, for a message: of a tensor the dtype."""
    return str(x.dtype) if isinstance(x, Tensor) else " ".join(repr(x).split())[:120]


def check_form(name: str, x: Tensor) -> None:
    """Raise unless it is a dense float tensor [B, T, H, dim] with at least one channel a head."""
    check_dense(name, x)
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must have shape [B, T, H, dim], got {tuple(shape)}")
    if shape[3] == 0:
        raise ValueError(f"{name} must have at least one channel a head, got {tuple(shape)}")


def check_dense(name: str, x: Tensor) -> None:
    """Raise unless it is a float tensor, and neither sparse nor nested."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {shown(x)}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a {'nested' if x.is_nested else x.layout} one")


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, segment_length: int | None = None) -> None:
    """Raise the `ValueError` or `TypeError` that says which argument is wrong, with its value.

    Decays are only looked at on a CPU: on a GPU that would wait for the device.
    """
    check_tensors(q, k, v)
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"k and v must agree in B and T, got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in B, T and K, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if k.shape[2] == 0:
        raise ValueError(f"k must have at least one head, got {tuple(k.shape)}")
    _check_heads(q.shape[2], k.shape[2], v.shape[2])
    if segment_length is not None and (segment_length < TILE or segment_length % TILE):
        raise ValueError(f"segment_length must be a positive multiple of {TILE}, got {segment_length}")
    if log_decay is not None:
        _check_log_decay(log_decay, k, v.shape[2])


def _check_heads(q: int, k: int, v: int) -> None:
    """As many of each; or more of q (grouped queries), or more of v (grouped values)."""
    if q == 0 or q % k:
        raise ValueError(f"q must have a multiple of the heads of k, got {q} and {k}")
    if v == 0 or v % k:
        raise ValueError(f"v must have the heads of k, or a multiple of them, got {v} and {k}")
    if q > k < v:
        raise ValueError(f"only one of q and v may have more heads than k, got q {q}, k {k} and v {v}")


def _check_log_decay(log_decay: Tensor, k: Tensor, H: int) -> None:
    """For H heads of states."""
    B, T, _, K = k.shape
    check_dense("log_decay", log_decay)
    if tuple(log_decay.shape) not in {(H,), (B, T, H), (B, T, H, K)}:
        raise ValueError(
            f"log_decay must have shape [H] = {(H,)}, [B, T, H] = {(B, T, H)} or [B, T, H, K] = {(B, T, H, K)}, "
            f"got {tuple(log_decay.shape)}"
        )
    if log_decay.device != k.device:
        raise ValueError(f"log_decay must be on the device of k, {k.device}, got {log_decay.device}")
    check_decays(log_decay)


def check_decays(log_decay: Tensor) -> None:
    """Raise `ValueError` unless all are finite and <= 0. They are looked at on a CPU only: a GPU's the host would wait
    for."""
    if log_decay.device.type == "cpu" and log_decay.numel():
        low, high = log_decay.detach().aminmax()
        if not (high <= 0 and torch.isfinite(low)):
            raise ValueError(f"log_decay must be finite and <= 0, got values from {low.item()} to {high.item()}")
