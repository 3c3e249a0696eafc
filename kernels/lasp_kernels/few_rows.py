# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Linear layers for few rows, such as a token of one sequence: each weight is read once, and that is their time.

    norm_linear         y_i = activation(norm(x) W_i^T)                     for several W_i
    norm_gate_linear    y = (norm(x) * activation(gate)) W^T + residual
    gated_linear        y = (x * activation(gate)) W^T + residual

Around a product a model's small operations each cost a launch, which at one token is as long as reading megabytes. Here
each of these is one launch: a program takes some rows of the weights, and makes what they are multiplied with by
itself, from x in the cache; the norm is a factor of the sum, so that squares are added up on the way. Sums are fp32,
and the layer's input is not rounded in between.

What is on its way at a time decides how fast weights come: about 3 MB for all of the card, 22 KB a multiprocessor. So
there are many programs. Each row has its own, which read a weight at the same time, from the L2 cache all but one.
From Hopper on a program begins while the kernel before still runs (`launch.early`).

There is no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lasp_kernels.launch import early, processors
from lasp_kernels.norm import ACTIVATIONS, activate

MOST_ROWS = 1  # the kernel takes more, but with more it was not compared with PyTorch's products
MOST_WEIGHTS = 4  # that read the same


class Blocks(NamedTuple):
    """What a program has: outputs, columns at once, warps."""

    outputs: int
    columns: int
    warps: int


@triton.jit
def find_weight(tile, W0, W1, W2, W3, N0, N1, N2, N3, WEIGHTS: tl.constexpr, BN: tl.constexpr):
    """Of all tiles of outputs one after another: its weight, that one's outputs and number, how many outputs there are
    before these, and which tile of the weight it is."""
    W, N, which, first = W0, N0, tile * 0, tile * 0
    if WEIGHTS > 1:
        more = tile >= tl.cdiv(N0, BN)
        if more:
            W, N, which, first, tile = W1, N1, which + 1, first + N0, tile - tl.cdiv(N0, BN)
        if WEIGHTS > 2:
            more = more and tile >= tl.cdiv(N1, BN)
            if more:
                W, N, which, first, tile = W2, N2, which + 1, first + N1, tile - tl.cdiv(N1, BN)
        if WEIGHTS > 3:
            more = more and tile >= tl.cdiv(N2, BN)
            if more:
                W, N, which, first, tile = W3, N3, which + 1, first + N2, tile - tl.cdiv(N2, BN)
    return W, N, which, first, tile


@triton.jit(do_not_specialize=["eps", "N0", "N1", "N2", "N3", "rows"])
def one_row_kernel(
    X, GATE, NORM, W0, W1, W2, W3, RESIDUAL, Y,
    eps, N0, N1, N2, N3, rows, x_r, gate_r, residual_r,
    D: tl.constexpr, WEIGHTS: tl.constexpr, NORMED: tl.constexpr, ACTIVATION: tl.constexpr, SILU: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN outputs of a weight [N, D] for one row; grid: rows and, slower, outputs of all weights in blocks.

    X [rows, D]; GATE [rows, D], NORM [D] and RESIDUAL [rows, N] may be None; Y is [rows, N] of one weight behind that
    of the other. Bits of SILU: of which outputs swish is taken.
    """
    row, tile = (tl.program_id(0) % rows).to(tl.int64), tl.program_id(0) // rows
    W, N, which, first, tile = find_weight(tile, W0, W1, W2, W3, N0, N1, N2, N3, WEIGHTS, BN)
    n, d = tile * BN + tl.arange(0, BN), tl.arange(0, BD)
    if EARLY:  # `launch.early`
        gdc_wait()
        gdc_launch_dependents()
    W += n.to(tl.int64)[:, None] * D + d[None, :]
    inside = (n < N)[:, None]
    y, squares = tl.zeros([BN, BD], tl.float32), tl.zeros([BD], tl.float32)
    coming = tl.load(W, mask=inside & (d < D)[None, :], other=0.0, eviction_policy="evict_first")
    for start in range(0, D, BD):
        c = start + d
        mask = c < D
        W += BD
        w, coming = (
            coming,
            tl.load(W, mask=inside & (c < D - BD)[None, :], other=0.0, eviction_policy="evict_first"),
        )
        x = tl.load(X + row * x_r + c, mask=mask, other=0.0).to(tl.float32)
        if NORMED:
            squares += x * x
        if NORM is not None:
            x = x * tl.load(NORM + c, mask=mask, other=0.0).to(tl.float32)
        if GATE is not None:
            gate = tl.load(GATE + row * gate_r + c, mask=mask, other=0.0).to(tl.float32)
            x = x * activate(gate, ACTIVATION)[0]
        y += w.to(tl.float32) * x[None, :]
    y = tl.sum(y, 1)
    if NORMED:
        y = y / tl.sqrt(tl.sum(squares, 0) / D + eps)
    if SILU != 0:
        y = tl.where((SILU >> which) & 1 == 1, y / (1.0 + tl.exp(-y)), y)
    if RESIDUAL is not None:
        y += tl.load(RESIDUAL + row * residual_r + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(Y + first.to(tl.int64) * rows + row * N + n, y.to(Y.dtype.element_ty), mask=n < N)


def norm_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activations: Sequence[str] | None = None,
) -> tuple[Tensor, ...]:
    """Of each weight [N, D] the product with the RMS norm of x [..., D], through its activation, "none" or "silu"."""
    silu = sum(1 << i for i, name in enumerate(activations or ()) if name == "silu")
    return _launch(x, None, weights, norm_weight, None, eps=eps, normed=True, silu=silu)


def norm_gate_linear(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The layer [N, H * V] of the RMS norm of x [..., H, V] over all heads times activation(gate); plus residual."""
    flat = x.flatten(-2)
    return _launch(flat, gate, [weight], norm_weight, residual, eps=eps, normed=True, activation=activation)[0]


def gated_linear(
    value: Tensor, gate: Tensor, weight: Tensor, *, activation: str = "none", residual: Tensor | None = None
) -> Tensor:
    """The linear layer [N, W] of value times activation(gate), both [..., W], + residual [..., N]."""
    return _launch(value, gate, [weight], None, residual, eps=0.0, normed=False, activation=activation)[0]


def serves(x: Tensor, width: int, *weights: Tensor) -> bool:
    """Whether these kernels take rows of so many numbers, and weights [N, width] that nobody wants a gradient of."""
    return (
        x.numel() <= MOST_ROWS * width
        and x.numel() > 0
        and len(weights) <= MOST_WEIGHTS
        and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(w.dtype == x.dtype and w.is_contiguous() for w in weights)
    )


def _launch(
    x: Tensor,
    gate: Tensor | None,
    weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    residual: Tensor | None,
    *,
    eps: float,
    normed: bool,
    activation: str = "none",
    silu: int = 0,
) -> tuple[Tensor, ...]:
    D = weights[0].shape[1]
    sizes = [len(w) for w in weights]
    for name, y, width in (("x", x, D), ("gate", gate, D), ("residual", residual, sizes[0])):
        if y is not None and y.shape != (*x.shape[:-1], width):  # the kernel would read behind its end
            raise ValueError(f"{name} must have shape {(*x.shape[:-1], width)}, got {tuple(y.shape)}")
    leading = x.shape[:-1]
    x, gate, residual = _rows(x, D), _rows(gate, D), _rows(residual, sizes[0])  # type: ignore[assignment]
    rows = len(x)
    y = torch.empty(rows * sum(sizes), dtype=x.dtype, device=x.device)
    begins = early(x.device)
    strides = [0 if t is None else t.stride(0) for t in (x, gate, residual)]
    w, n = ([*given, *[None] * (MOST_WEIGHTS - len(given))] for given in (weights, sizes))
    n = [0 if size is None else size for size in n]
    block = _blocks(sum(sizes), D, processors(x.device))
    blocks = sum(triton.cdiv(size, block.outputs) for size in sizes)
    with torch.cuda.device_of(x):
        one_row_kernel[(rows * blocks,)](
            x, gate, norm_weight, *w, residual, y, float(eps), *n, rows, *strides,
            D=D, WEIGHTS=len(weights), NORMED=int(normed), ACTIVATION=ACTIVATIONS[activation], SILU=silu,
            BN=block.outputs, BD=block.columns, EARLY=begins, num_warps=block.warps,
            **({"launch_pdl": True} if begins else {}),
        )  # fmt: skip
    return tuple(part.view(*leading, size) for part, size in zip(y.split([rows * size for size in sizes]), sizes))


def _rows(x: Tensor | None, width: int) -> Tensor | None:
    if x is None:
        return None
    x = x.reshape(-1, width)
    return x if x.stride(1) == 1 else x.contiguous()


def _blocks(outputs: int, D: int, processors: int) -> Blocks:
    """As many outputs as leave a multiprocessor 2.6 programs, whose threads have two times 64 bytes under way, 43 KB
    together. They should all run at once, in half of the registers, so that the next kernel's have room beside them.
    Few outputs need long parts of the weight's rows, which then all warps share."""
    each = next((n for n in (32, 16, 8) if outputs >= 2.6 * n * processors), 4)
    columns = max(16, min(4096 // each, triton.next_power_of_2(D)))
    return Blocks(each, columns, 4)
