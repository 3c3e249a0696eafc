"""Causal softmax attention of some queries over keys that come in pieces, in memory that grows with a piece only.

What a query has seen so far is its output and the logarithm of the sum of its weights (lse); one more piece of keys is
merged into both. Backward takes the pieces one by one as well, in any order: the weight of a key is exp(score - lse)
with the lse of all keys, whichever piece it is in (FlashAttention-2, arXiv 2307.08691, section 3).

A query at global position p sees the keys from its `first` visible one to p. That is all there is to causality, packed
documents and windows here.

There are two ways, as in softmax.py. Where PyTorch has a flash kernel for the tensors of a GPU, it is one call for the
queries of a document and a piece. Anything else (windows, caps, padding) forms the scores of a block of queries, in
fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from lasp_kernels.reference import state_dtype
from lasp_kernels.softmax import ALIGNMENT

BOUND = 2**24  # scores of a block, 64 MiB in fp32
MANY = 64  # documents of queries, each a call of its own, or one of so many tokens


@dataclass(frozen=True)
class Queries:
    """Where some queries stand, and what they see.

    Args:
        start: the global position of the first.
        first: [T], on the host: of each query the first key that it sees, by its global position.
        groups: query heads that share a head of keys.
        scale: of scores.
        softcap: scores s become softcap * tanh(s / softcap); None leaves them.
    """

    start: int
    first: Tensor
    groups: int
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Piece:
    """Some keys and values of successive tokens: [B, n, H, K] and [B, n, H, V], the first at a global position.

    `real` [B, n], bool, tells which of them are no padding; None: all.
    """

    start: int
    k: Tensor
    v: Tensor
    real: Tensor | None = None


class Attended:
    """What queries q [B, T, Hq, K] have seen so far: `o` [B, H, G, T, V] and `lse` [B, H, G, T], in states' dtype."""

    def __init__(self, q: Tensor, value_dim: int, queries: Queries):
        self._q, self._queries = _heads_first(q, queries), queries
        shape, dtype = self._q.shape[:4], state_dtype(q.dtype)
        self.o = self._q.new_zeros(*shape, value_dim, dtype=dtype)
        self.lse = self._q.new_full(shape, -torch.inf, dtype=dtype)

    def see(self, piece: Piece) -> None:
        """Merge one more piece."""
        parts = _parts(self._q, piece, self._queries)
        if parts is None:
            return self._see_by_scores(piece)
        k, v = (x.transpose(1, 2) for x in (piece.k, piece.v))
        for rows, keys, causal in parts:
            q = self._q[..., rows, :].flatten(1, 2)
            found = flash_forward(q, k[:, :, keys], v[:, :, keys], causal, self._queries.scale)
            o, more = (x.unflatten(1, self._q.shape[1:3]).to(self.o.dtype) for x in found)
            lse = self.lse[..., rows]
            now = torch.logaddexp(lse, more)
            kept, added = ((x - now).exp().unsqueeze(-1) for x in (lse, more))
            self.o[..., rows, :] = self.o[..., rows, :] * kept + o * added
            self.lse[..., rows] = now
        return None

    def _see_by_scores(self, piece: Piece) -> None:
        k, v = (x.transpose(1, 2).unsqueeze(2).to(self.o.dtype) for x in (piece.k, piece.v))
        for rows, keys in _blocks(self._q, piece, self._queries):
            q = self._q[..., rows, :].to(self.o.dtype)
            scores, _ = _scores(q, k[..., keys, :], piece, rows, keys, self._queries)
            lse, o = self.lse[..., rows], self.o[..., rows, :]
            now = torch.logaddexp(lse, scores.logsumexp(-1))
            safe = now.masked_fill(now == -torch.inf, 0.0)  # of a query that sees nothing yet
            kept = (lse - safe).exp().unsqueeze(-1)
            self.o[..., rows, :] = o * kept + (scores - safe.unsqueeze(-1)).exp() @ v[..., keys, :]
            self.lse[..., rows] = now

    def output(self) -> Tensor:
        """[B, T, Hq, V]."""
        return self.o.flatten(1, 2).transpose(1, 2)


class Gradients:
    """The gradients of queries, and of one piece of keys after the other; `dq` [B, T, Hq, K] is complete once all were
    seen.

    Args:
        q: [B, T, Hq, K].
        o: what `Attended.output` gave.
        lse: of it.
        do: the gradient of o, [B, T, Hq, V].
        queries: as there.
    """

    def __init__(self, q: Tensor, o: Tensor, lse: Tensor, do: Tensor, queries: Queries):
        self._dtype, self._queries, self._shape = state_dtype(q.dtype), queries, q.shape
        self._q, self._do, self._o = (_heads_first(x, queries) for x in (q, do, o))
        self._lse = lse.masked_fill(lse == -torch.inf, 0.0)
        self._delta = (self._do.to(self._dtype) * self._o.to(self._dtype)).sum(-1)
        self._dq = torch.zeros(self._q.shape, dtype=self._dtype, device=q.device)

    def of(self, piece: Piece) -> tuple[Tensor, Tensor]:
        """dk and dv of a piece, in its shapes and the states' dtype."""
        parts = _parts(self._q, piece, self._queries)
        if parts is None:
            return self._of_scores(piece)
        k, v = (x.transpose(1, 2) for x in (piece.k, piece.v))
        dk, dv = (torch.zeros(x.shape, dtype=self._dtype, device=x.device) for x in (k, v))
        for rows, keys, causal in parts:
            q, do, o = (x[..., rows, :].flatten(1, 2) for x in (self._q, self._do, self._o))
            lse = self._lse[..., rows].flatten(1, 2)
            pair = (k[:, :, keys], v[:, :, keys])
            of_q, of_k, of_v = flash_backward(do, q, *pair, o, lse, causal, self._queries.scale)
            self._dq[..., rows, :] += of_q.unflatten(1, self._q.shape[1:3])
            dk[:, :, keys] += of_k
            dv[:, :, keys] += of_v
        return dk.transpose(1, 2), dv.transpose(1, 2)

    def _of_scores(self, piece: Piece) -> tuple[Tensor, Tensor]:
        k, v = (x.transpose(1, 2).unsqueeze(2).to(self._dtype) for x in (piece.k, piece.v))
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in _blocks(self._q, piece, self._queries):
            q, do = (x[..., rows, :].to(self._dtype) for x in (self._q, self._do))
            scores, slope = _scores(q, k[..., keys, :], piece, rows, keys, self._queries)
            weights = (scores - self._lse[..., rows, None]).exp()
            dv[..., keys, :] += (weights.mT @ do).sum(2, keepdim=True)
            of_scores = weights * (do @ v[..., keys, :].mT - self._delta[..., rows, None]) * self._queries.scale
            if slope is not None:
                of_scores = of_scores * slope
            self._dq[..., rows, :] += of_scores @ k[..., keys, :]
            dk[..., keys, :] += (of_scores.mT @ q).sum(2, keepdim=True)
        return dk.squeeze(2).transpose(1, 2), dv.squeeze(2).transpose(1, 2)

    def of_queries(self) -> Tensor:
        """[B, T, Hq, K], in the states' dtype."""
        return self._dq.flatten(1, 2).transpose(1, 2)


def _heads_first(x: Tensor, queries: Queries) -> Tensor:
    """[B, T, H * G, ...] to [B, H, G, T, ...]."""
    return x.unflatten(2, (-1, queries.groups)).permute(0, 2, 3, 1, 4)


def _parts(q: Tensor, piece: Piece, queries: Queries) -> list[tuple[slice, slice, bool]] | None:
    """Rows of queries of one document, the keys of the piece that they see, and whether the last of these is the last
    row's own (else every row sees all); None where no flash kernel does it."""
    if piece.real is not None or queries.softcap is not None or not q.shape[3] or not has_flash(q, piece):
        return None
    firsts, counts = torch.unique_consecutive(queries.first, return_counts=True)
    if len(firsts) > max(MANY, len(queries.first) // MANY):  # windows: another first key for each query
        return None
    found, row = [], 0
    for first, count in zip(firsts.tolist(), counts.tolist()):
        end = queries.start + row + count
        low, high = max(0, first - piece.start), min(piece.k.shape[1], end - piece.start)
        if low < high:
            found.append((slice(row, row + count), slice(low, high), piece.start + high == end))
        row += count
    return found


def has_flash(q: Tensor, piece: Piece) -> bool:
    """Whether PyTorch has a kernel for q [B, H, G, T, K] and a piece; the user's `sdpa_kernel` decides, too."""
    if q.device.type == "cpu" or q.shape[4] == 0:
        return False
    q, k, v = _aligned(q.flatten(1, 2), piece.k.transpose(1, 2), piece.v.transpose(1, 2))
    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1]))


def flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """o [B, Hq, T, V] and lse [B, Hq, T] of q [B, Hq, T, K], k and v [B, H, S, ...]; causal up to the last key."""
    dim, (q, k, v) = v.shape[3], _aligned(q, k, v)
    o, lse, *_ = _flash(q, k, v, 0.0, is_causal=causal, return_debug_mask=False, scale=scale)
    return o[..., :dim], lse


def flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, where o and lse are of these and other keys."""
    dims = [x.shape[3] for x in (q, k, v)]
    q, k, v = _aligned(q, k, v)
    do, o = (F.pad(x, (0, q.shape[3] - x.shape[3])) for x in (do.to(q.dtype), o))
    # What the kernel wants besides depends on the version of PyTorch; without dropout it says nothing.
    one = _flash(q[:, :, :1], k[:, :, :1], v[:, :, :1], 0.0, is_causal=False, return_debug_mask=False, scale=scale)
    cum_q, cum_k, seed, offset = one[2], one[3], one[6], one[7]
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        do, q, k, v, o, lse.contiguous(), cum_q, cum_k, q.shape[2], k.shape[2], 0.0, causal, seed, offset, scale=scale
    )
    return tuple(x[..., :dim] for x, dim in zip(found, dims))  # type: ignore[return-value]


_flash = torch.ops.aten._scaled_dot_product_flash_attention


def _aligned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros behind K and V, which change no score, up to one head dim that kernels take."""
    dim = max(q.shape[3], v.shape[3])
    dim += -dim % ALIGNMENT
    q, k, v = (x if x.shape[3] == dim else F.pad(x, (0, dim - x.shape[3])) for x in (q, k, v))
    return q, k, v


def _blocks(q: Tensor, piece: Piece, queries: Queries) -> Iterator[tuple[slice, slice]]:
    """Rows of queries, and the keys of the piece that some of them see."""
    batch, heads, groups, tokens, _ = q.shape
    keys = piece.k.shape[1]
    length = max(1, min(tokens, BOUND // max(1, batch * heads * groups * keys)))
    for row in range(0, tokens, length):
        end = min(row + length, tokens)
        low = max(0, int(queries.first[row:end].min()) - piece.start)
        high = min(keys, queries.start + end - piece.start)
        if low < high:
            yield slice(row, end), slice(low, high)


def _scores(
    q: Tensor, k: Tensor, piece: Piece, rows: slice, keys: slice, queries: Queries
) -> tuple[Tensor, Tensor | None]:
    """[B, H, G, rows, keys], -inf where a query does not see a key; and the slope of the cap."""
    scores, slope = (q * queries.scale) @ k.mT, None
    if queries.softcap is not None:
        scores = torch.tanh(scores / queries.softcap)
        slope = 1 - scores.square()
        scores = scores * queries.softcap
    first, last = queries.first[rows], queries.start + rows.start
    low, high = piece.start + keys.start, piece.start + keys.stop - 1
    if high > last or low < int(first.max()):
        key = torch.arange(low, high + 1, device=q.device)
        query = torch.arange(last, last + len(first), device=q.device)[:, None]
        seen = (key <= query) & (key >= first.to(q.device, non_blocking=True)[:, None])
        scores = scores.masked_fill(~seen, -torch.inf)
    if piece.real is not None:
        scores = scores.masked_fill(~piece.real[:, None, None, None, keys], -torch.inf)
    return scores, slope
