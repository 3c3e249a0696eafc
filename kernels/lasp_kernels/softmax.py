"""Causal softmax attention of a slice of the queries over all keys up to it, in memory that does not grow with T * S.

The queries stand at the global positions start .. start + T - 1, the keys at 0 .. S - 1. What a run of queries may see
ends with the key of its last query, so whatever is cut here - a slice, a document, a block - is the same problem
again: `rows` queries that belong to the last `rows` of `keys` keys. Nothing below needs to know a position.

There are two ways. Without window, key_mask and softcap, and where PyTorch has a flash kernel for the tensors of a GPU,
it is one call a document, which forms neither mask nor scores (FlashAttention-2, arXiv 2307.08691). Anything else goes
by blocks of queries through `scaled_dot_product_attention`, each with a mask over the keys that it can see. A block is
as long as its mask has at most `BOUND` elements (its scores, where no fused kernel spares them), but is never cut below
`FEWEST` queries: each block reads all keys that it sees, which takes as long as the arithmetic on some hundred queries,
so shorter ones would save memory at the price of time.

Several blocks are recomputed in backward (`torch.utils.checkpoint`): autograd would keep the mask or the scores of
every one, together the whole that was to be avoided. It costs a second forward; one block alone is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lasp_kernels.operands import check_tensors, shown
from lasp_kernels.reference import state_dtype
from lasp_kernels.tile_decay import not_finite

BOUND = 2**24  # elements of a block's mask, or scores: 64 MiB in fp32
FEWEST = 128  # queries that a block is not cut below
ALIGNMENT = 8  # of head dims, for the kernels of a GPU
# Of masked blocks. Not cuDNN: its memory grows with queries times keys, and its compiled gradients were wrong (torch
# 2.11, one H200, bf16, heads of 32, aot_eager).
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Block = tuple[Tensor, Tensor, Tensor, "Tensor | None"]  # q, k, v and key_mask


@dataclass(frozen=True)
class Options:
    """What all blocks of a call have in common."""

    scale: float
    window: int | None
    softcap: float | None
    dropout_p: float


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    start: int = 0,
    cu_seqlens: tuple[int, ...] | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of the queries at start .. start + T - 1 over the keys at 0 .. start + T - 1, causal.

    q [B, T, Hq, K]; k [B, S, Hkv, K] and v [B, S, Hkv, V] with S >= start + T and Hq a multiple of Hkv: query head h
    reads key head h // (Hq / Hkv). Returns o [B, T, Hq, V] in q's dtype. Differentiable by autograd.

    `window`: a query sees itself and the window - 1 tokens before it. `cu_seqlens`: global offsets of packed documents
    (B = 1), on the host; a query sees its own document. `key_mask` [B, S] bool: False is padding, which nobody sees; a
    query that would see nothing at all sees itself, so that its meaningless output is finite. `scale` is K^-0.5 unless
    given; with `softcap` scores become softcap * tanh(scores / softcap); `dropout_p` drops weights, and scales the
    others. A token that is NaN or Inf spoils what depends on it, and on a CPU no more; on a GPU, and in a graph of
    torch.compile, it may also spoil tokens before it that its kernel works on together with it.
    """
    check_queries_keys_values(q, k, v, start)
    check_options(window=window, scale=scale, softcap=softcap, dropout_p=dropout_p)
    end = start + q.shape[1]
    if cu_seqlens is not None:
        check_documents(cu_seqlens, batch=q.shape[0], end=end)
    if key_mask is not None:
        check_key_mask(key_mask, k)
    options = Options(q.shape[3] ** -0.5 if scale is None else float(scale), window, softcap, float(dropout_p))
    value_dim = v.shape[3]
    q, k, v = _one_head_dim(q.transpose(1, 2), k[:, :end].transpose(1, 2), v[:, :end].transpose(1, 2))
    whole = q, k, v, None if key_mask is None else key_mask[:, :end]
    parts = [whole] if cu_seqlens is None else list(_documents(whole, cu_seqlens))
    if _flash(parts[0], options):
        outputs = [_flash_attention(*part[:3], options) for part in parts]
    else:
        # Cut as they are used: backward runs in reverse, and would else hold the gradients of all blocks' keys at once.
        outputs = [
            _attend(*block, options) if block[0].shape[2] == q.shape[2] else _recomputed(block, options)
            for part in parts
            for block in _blocks(part, options)
        ]
    return torch.cat([o.transpose(1, 2) for o in outputs], 1)[..., :value_dim]


# Parts of a slice: heads stand before tokens, and the queries belong to the last keys


def _one_head_dim(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros behind K and V, which change no score: fused kernels want one head dim, those of a GPU an aligned one."""
    dim = max(q.shape[3], v.shape[3])
    if q.device.type != "cpu":
        dim += -dim % ALIGNMENT
    q, k, v = (x if x.shape[3] == dim else F.pad(x, (0, dim - x.shape[3])) for x in (q, k, v))
    return q, k, v


def _documents(whole: Block, cu_seqlens: tuple[int, ...]) -> Iterator[Block]:
    """Of each document with queries in the slice, these and its keys. An empty slice is a document without keys."""
    q, k, v, key_mask = whole
    end = k.shape[2]
    start = end - q.shape[2]
    if start == end:
        yield q, k[:, :, end:], v[:, :, end:], None if key_mask is None else key_mask[:, end:]
        return
    # Split and not sliced: backward of each slice would fill a gradient as long as all keys.
    bounds = [min(offset, end) for offset in cu_seqlens]
    keys = [closes - opens for opens, closes in zip(bounds, bounds[1:])]
    rows = [max(0, closes - max(opens, start)) for opens, closes in zip(bounds, bounds[1:])]
    masks = [None] * len(keys) if key_mask is None else key_mask.split(keys, 1)
    for block in zip(q.split(rows, 2), k.split(keys, 2), v.split(keys, 2), masks):
        if block[0].shape[2]:
            yield block


def _blocks(part: Block, options: Options) -> Iterator[Block]:
    """The part, or its halves until they are small enough, in order; each with no more keys than it sees.

    By halves and not off the whole, since backward pads the gradient of a slice to the length of what it was cut from:
    many short windows off the keys of a long sequence would cost their number times its length.
    """
    q, k, v, key_mask = part
    rows, keys = q.shape[2], k.shape[2]
    if options.window is not None and keys - rows >= options.window:
        unseen = keys - rows - options.window + 1
        k, v, key_mask = k[:, :, unseen:], v[:, :, unseen:], None if key_mask is None else key_mask[:, unseen:]
        keys -= unseen
    if rows < 2 * FEWEST or not _too_long((q, k, v, key_mask), options):
        yield q, k, v, key_mask
        return
    half = rows // (2 * FEWEST) * FEWEST
    seen = keys - rows + half
    first = q[:, :, :half], k[:, :, :seen], v[:, :, :seen], None if key_mask is None else key_mask[:, :seen]
    yield from _blocks(first, options)
    yield from _blocks((q[:, :, half:], k, v, key_mask), options)


def _too_long(block: Block, options: Options) -> bool:
    """Whether a block's mask or scores pass the bound, or the window is shorter than the block: it then wastes keys."""
    q, k, _, key_mask = block
    rows, keys = q.shape[2], k.shape[2]
    if options.window is not None and rows > options.window:
        return True
    if _forms_scores(q, options):
        copies = q.shape[0] * q.shape[1]
    else:
        copies = q.shape[1] // k.shape[1] * (1 if key_mask is None else q.shape[0])
    return copies * rows * keys > BOUND


def _forms_scores(q: Tensor, options: Options) -> bool:
    """Where a masked block has no fused kernel: never with softcap, on a CPU with dropout, on a GPU in fp64."""
    if q.device.type == "cpu":
        return options.softcap is not None or options.dropout_p > 0
    return options.softcap is not None or q.dtype == torch.float64


# One part without a mask, one block with it


def _flash(part: Block, options: Options) -> bool:
    """Whether one call of a flash kernel does it: dtype, head dim, device, and the user's `sdpa_kernel` decide."""
    q, k, v, key_mask = part
    if q.device.type == "cpu" or q.shape[2] == 0:
        return False
    if key_mask is not None or options.window is not None or options.softcap is not None:
        return False
    import torch.nn.attention.bias  # noqa: F401  # teaches torch.compile SDPAParams; not above: it brings Triton along

    return can_use_flash_attention(SDPAParams(q, k, v, None, options.dropout_p, False, q.shape[1] != k.shape[1]))


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """o [B, Hq, rows, V] of a part.

    With as many queries as keys PyTorch chooses the kernel, on Hopper that of cuDNN; not in a graph of `torch.compile`
    (see `BACKENDS`). With fewer it is the operator that `torch.nn.attention.bias.causal_lower_right` stands for: its
    `is_causal` lets the last query see the last key. That bias is a subclass of Tensor, which no graph can make.
    """
    if q.shape[2] == k.shape[2] and not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=True,
            dropout_p=options.dropout_p,
            scale=options.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, options.dropout_p, is_causal=True, return_debug_mask=False, scale=options.scale
    )[0]


def _recomputed(block: Block, options: Options) -> Tensor:
    """`_attend`, of which nothing but the inputs is kept for backward."""
    return checkpoint(_attend, *block, options, use_reentrant=False, preserve_rng_state=options.dropout_p > 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, options: Options) -> Tensor:
    """o [B, Hq, rows, V] of a block.

    The query heads of a key head are laid behind each other as if they were more queries. So no key is copied, and no
    kernel need know of grouped heads: those that do differ by device, dtype, mask and version.
    """
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    seen = _seen(q.shape[2], k.shape[2], options.window, key_mask, device=q.device)
    seen = seen.repeat(1, 1, groups, 1)
    folded = q.unflatten(1, (heads, groups)).flatten(2, 3)
    spoilt = None
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # else the host would wait, or the graph break
        spoilt = _Spoilt(folded, k, v, seen)
        folded, k, v = (_Finite.apply(x, spoilt, name) for x, name in ((folded, "q"), (k, "k"), (v, "v")))
    if options.softcap is None and q.shape[2]:
        with sdpa_kernel(BACKENDS) if q.is_cuda else nullcontext():
            o = F.scaled_dot_product_attention(
                folded, k, v, attn_mask=seen, dropout_p=options.dropout_p, scale=options.scale
            )
    else:
        o = _by_scores(folded, k, v, seen, options)
    if spoilt is not None:
        o = _WithSpoilt.apply(o, spoilt)
    return o.unflatten(2, (groups, q.shape[2])).flatten(1, 2)


def _seen(rows: int, keys: int, window: int | None, key_mask: Tensor | None, *, device: torch.device) -> Tensor:
    """Which of the keys the last `rows` of as many queries see: bool [1 or B, 1, rows, keys]."""
    key = torch.arange(keys, device=device)
    query = key[keys - rows :, None]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    seen = seen[None, None]
    if key_mask is None:
        return seen
    seen = seen & key_mask[:, None, None]
    return seen | (~seen.any(-1, keepdim=True) & (key == query))


def _by_scores(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, options: Options) -> Tensor:
    """Attention written out, for a softcap (and for no queries, which kernels refuse).

    Scores are formed and capped in fp32, as kernels do: in bf16 a score near a cap of 50 is off by up to 0.1.
    """
    dtype = state_dtype(q.dtype)
    scores = (q.to(dtype) * options.scale) @ k.to(dtype).mT
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return F.dropout(weights, options.dropout_p).to(v.dtype) @ v


# Tokens that are not finite. A kernel multiplies what a query does not see by zero, which makes NaN of it: so those
# elements become zeros, and NaN is put where it belongs, in the output and in the gradients.


class _Spoilt:
    """Which rows of one block, [B, heads, rows], and keys are not finite, or depend on what is not; None is no row."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor):
        self.seen = seen
        of_q, of_k, of_v = map(_tokens_not_finite, (q, k, v))
        self.weights = _either(of_q, self._that_see(of_k))  # rows of the matrix that multiplies v
        self.outputs = _either(self.weights, self._that_see(of_v))
        self.gradients: dict[str, Tensor | None] = {}  # of q, k and v, by the rows of the output's gradient

    def backward(self, do: Tensor) -> Tensor:
        """The gradient of the output without what is not finite, which then is where it belongs in `gradients`."""
        of_do = _tokens_not_finite(do)
        of_v, of_scores = _either(self.weights, of_do), _either(self.outputs, of_do)
        self.gradients = {"q": of_scores, "k": self._seen_by(of_scores), "v": self._seen_by(of_v)}
        return do if of_v is None else do.masked_fill(of_v.unsqueeze(-1), 0)

    def _that_see(self, keys: Tensor | None) -> Tensor | None:
        return None if keys is None else (self.seen & keys.unsqueeze(-2)).any(-1)

    def _seen_by(self, rows: Tensor | None) -> Tensor | None:
        return None if rows is None else (self.seen & rows.unsqueeze(-1)).any(-2)


class _Finite(torch.autograd.Function):
    """q, k or v with zeros for what is not finite; its gradient is NaN where it must be."""

    @staticmethod
    def forward(ctx, x: Tensor, spoilt: _Spoilt, name: str) -> Tensor:
        ctx.spoilt, ctx.name = spoilt, name
        found = not_finite(x)
        return x.view_as(x) if found is None else x.masked_fill(found, 0)

    @staticmethod
    def backward(ctx, dx: Tensor):
        found = ctx.spoilt.gradients[ctx.name]
        return dx if found is None else dx.masked_fill(found.unsqueeze(-1), torch.nan), None, None


class _WithSpoilt(torch.autograd.Function):
    """The output, NaN in the rows that see or are what is not finite."""

    @staticmethod
    def forward(ctx, o: Tensor, spoilt: _Spoilt) -> Tensor:
        ctx.spoilt = spoilt
        return o.view_as(o) if spoilt.outputs is None else o.masked_fill(spoilt.outputs.unsqueeze(-1), torch.nan)

    @staticmethod
    def backward(ctx, do: Tensor):
        return ctx.spoilt.backward(do), None


def _tokens_not_finite(x: Tensor) -> Tensor | None:
    found = not_finite(x)
    return None if found is None else found.any(-1)


def _either(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one | other


# Checks


def check_queries_keys_values(q: Tensor, k: Tensor, v: Tensor, start: int) -> None:
    """Raise the `ValueError` or `TypeError` that says which of q, k, v and start is wrong, with its value."""
    check_tensors(q, k, v)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k and v must agree in [B, S, H], got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in B and K, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of the heads of k, got {q.shape[2]} and {k.shape[2]}")
    if not isinstance(start, int):
        raise TypeError(f"start must be an int, got {start!r}")
    if not 0 <= start <= k.shape[1] - q.shape[1]:
        raise ValueError(
            f"start must be >= 0 and k reach to start + T, got start {start}, {q.shape[1]} queries, {k.shape[1]} keys"
        )


def check_options(*, window: int | None, scale: float | None, softcap: float | None, dropout_p: float) -> None:
    """Raise the `ValueError` or `TypeError` that says which option is wrong, with its value."""
    if window is not None and not isinstance(window, int):
        raise TypeError(f"window must be an int, got {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the token itself, got {window}")
    for name, x in (("scale", scale), ("softcap", softcap), ("dropout_p", dropout_p)):
        if x is not None and not isinstance(x, (int, float)):
            raise TypeError(f"{name} must be a number, got {x!r}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0, got {softcap}")
    if dropout_p is None or not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def check_documents(cu_seqlens: tuple[int, ...], *, batch: int, end: int) -> None:
    """Raise the `ValueError` or `TypeError` that says what is wrong with offsets of packed documents."""
    if not isinstance(cu_seqlens, tuple) or not all(isinstance(offset, int) for offset in cu_seqlens):
        raise TypeError(f"cu_seqlens must be a tuple of ints, got {cu_seqlens!r}")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1, got B = {batch}")
    if len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or cu_seqlens[-1] < end:
        raise ValueError(f"cu_seqlens must run from 0 to at least start + T = {end}, got {cu_seqlens}")
    if any(a > b for a, b in zip(cu_seqlens, cu_seqlens[1:])):
        raise ValueError(f"cu_seqlens must not fall, got {cu_seqlens}")


def check_key_mask(key_mask: Tensor, k: Tensor) -> None:
    """Raise the `ValueError` or `TypeError` that says what is wrong with a padding mask."""
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be a bool tensor, got {shown(key_mask)}")
    if key_mask.shape != k.shape[:2]:
        raise ValueError(f"key_mask must have shape [B, S] = {tuple(k.shape[:2])}, got {tuple(key_mask.shape)}")
    if key_mask.device != k.device:
        raise ValueError(f"key_mask must be on the device of k, {k.device}, got {key_mask.device}")
