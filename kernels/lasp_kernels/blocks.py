"""Causal softmax attention within fixed blocks of tokens: every block is a row of a batch, and one call does them all.

    tokens       b c | d e f | g          blocks of 3; a is the token before, which fills up the first block
    rows         a b c
                 d e f
                 g . .                    what is missing at an end is zeros, which stand behind all that is real

A query sees what stands before it in its row, so no real token sees a zero, and no mask is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp_kernels.operands import check_tensors
from lasp_kernels.softmax import check_queries_keys_values, softmax_attention

ROWS = 2**15  # of a batch, in one call: kernels take fewer than 2**16


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    *,
    before: int = 0,
    cu_seqlens: tuple[int, ...] | None = None,
    scale: float | None = None,
) -> Tensor:
    """o [B, T, H*G, V] of q [B, T, H*G, K] and k [B, block - 1 + T, H, K], v [.., V] with the tokens before them.

    `before`: how many tokens of its sequence stand before the first query; as far as they are in its block, the last of
    the block - 1 are these. `cu_seqlens`: offsets of packed documents (B = 1) on the host, whose blocks are counted
    anew; then `before` is of the first. `scale` is K^-0.5 unless given. Differentiable by autograd.
    """
    tokens, reach = q.shape[1], block - 1
    if not tokens:
        return softmax_attention(q, k[:, :0], v[:, :0], scale=scale)
    offsets = (0, tokens) if cu_seqlens is None else cu_seqlens
    bounds = [(start, end) for start, end in zip(offsets, offsets[1:]) if start < end]
    runs = [(start, end, before % block if start == 0 else 0) for start, end in bounds]
    size = min(block, max(seen + end - start for start, end, seen in runs))  # of a row: it may be that none fills one
    rows_of_q = [_rows(_padded(q[:, start:end], seen, 0), size) for start, end, seen in runs]
    rows_of_k, rows_of_v = (
        [_rows(x[:, reach + start - seen : reach + end], size) for start, end, seen in runs] for x in (k, v)
    )
    operands = map(_joined, (rows_of_q, rows_of_k, rows_of_v))
    o = _joined([softmax_attention(*x, scale=scale) for x in zip(*(x.split(ROWS) for x in operands))])
    parts = []
    for of_run, (start, end, seen) in zip(o.split([len(x) for x in rows_of_q]), runs):
        tokens_of_run = of_run.unflatten(0, (len(q), -(-(seen + end - start) // size))).flatten(1, 2)
        parts.append(tokens_of_run[:, seen : seen + end - start])
    return _joined(parts, 1)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Along a dimension, without a copy of one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _rows(x: Tensor, block: int) -> Tensor:
    """x [B, T, H, n] as [B * blocks, block, H, n], with zeros behind it."""
    return _padded(x, 0, -x.shape[1] % block).unflatten(1, (-1, block)).flatten(0, 1)


def _padded(x: Tensor, before: int, behind: int) -> Tensor:
    """With so many tokens of zeros."""
    return F.pad(x, (0, 0, 0, 0, before, behind)) if before or behind else x


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise the `ValueError` or `TypeError` that says which of q, k and v [B, T, ...] is wrong, with its value."""
    check_tensors(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must agree in [B, T], got q {tuple(q.shape)} and k {tuple(k.shape)}")
    check_queries_keys_values(q, k, v, 0)
