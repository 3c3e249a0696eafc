"""Causal softmax attention within fixed blocks of tokens: every block is a row of a batch, and one call does them all.

    tokens       b c | d e f | g          blocks of 3; a is the token before, which fills up the first block
    rows         a b c
                 d e f
                 g . .                    what is missing at an end is zeros, which stand behind all that is real

A query sees what stands before it in its row, so no real token sees a zero, and no mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
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
    lengths = [end - start for start, end in zip(offsets, offsets[1:]) if start < end]
    seen = before % block  # tokens of the first block that are before
    with_seen = [seen + lengths[0], *lengths[1:]]
    size = min(block, max(with_seen))  # of a row: it may be that no document fills one
    missing = [-length % size for length in with_seen]  # behind each document
    operands = (
        _rows(q, lengths, missing, size, seen),
        *(_rows(x[:, reach - seen :], with_seen, missing, size) for x in (k, v)),
    )
    o = _joined([softmax_attention(*x, scale=scale) for x in zip(*(x.split(ROWS) for x in operands))])
    o = o.unflatten(0, (len(q), sum(with_seen + missing) // size)).flatten(1, 2)
    return _joined(list(o.split([seen, *_by_turns(lengths, missing)], 1)[1::2]), 1)


def _rows(x: Tensor, lengths: list[int], missing: list[int], size: int, before: int = 0) -> Tensor:
    """x [B, T, H, n] as [B * rows, size, H, n]: documents of these lengths, with zeros: `before` the first, and as
    many as are `missing` behind each."""
    zeros = x.new_zeros(len(x), max(before, *missing), *x.shape[2:])
    of_length = {n: zeros[:, :n] for n in {before, *missing}}
    parts = [of_length[before], *_by_turns(x.split(lengths, 1), (of_length[n] for n in missing))]
    return _joined([part for part in parts if part.shape[1]], 1).unflatten(1, (-1, size)).flatten(0, 1)


def _by_turns(these: Iterable[Any], others: Iterable[Any]) -> Iterator[Any]:
    """The first of both, the second of both, and so on."""
    return chain.from_iterable(zip(these, others))


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """Along a dimension, without a copy of one part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise the `ValueError` or `TypeError` that says which of q, k and v [B, T, ...] is wrong, with its value."""
    check_tensors(q, k, v)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"q and k must agree in [B, T], got q {tuple(q.shape)} and k {tuple(k.shape)}")
    check_queries_keys_values(q, k, v, 0)
