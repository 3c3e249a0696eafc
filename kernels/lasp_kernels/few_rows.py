# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Linear layers for few rows, such as a token of one sequence: each weight is read once, and that is their time.

    norm_linear         y_i = activation(norm(x) W_i^T)                     for several W_i
    norm_gate_linear    y = (norm(x) * activation(gate)) W^T + residual
    gated_linear        y = (x * activation(gate)) W^T + residual

A product of matrices with one row leaves most of the units for such products idle, and around it a model's small
operations each cost a launch, which at one token is as long as reading megabytes. Here a program takes some rows of the
weight, and makes what they are multiplied with by itself, from x in the cache: the norm is a factor of the sum, so
that squares are added up on the way. All inside is fp32: the layer's input is not rounded in between.

There is no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lasp_kernels.launch import early, processors
from lasp_kernels.norm import ACTIVATIONS, activate

MOST_ROWS = 4  # from which on a product of matrices is as fast
MOST_WEIGHTS = 4  # that read the same
NUMBERS = 8192  # of a weight, which a program reads at once, for one row
COLUMNS = 2048  # of these


@triton.jit
def load_weights(W, columns, D, mask):
    """Of rows W; zeros behind the end. Once only."""
    mask = mask[:, None] & (columns < D)[None, :]
    return tl.load(W + columns[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["eps", "N0", "N1", "N2", "N3"])
def few_rows_kernel(
    X, GATE, NORM, W0, W1, W2, W3, RESIDUAL, Y,
    eps, D, N0, N1, N2, N3, x_r, gate_r, residual_r,
    ROWS: tl.constexpr, MOST: tl.constexpr, WEIGHTS: tl.constexpr, NORMED: tl.constexpr, ACTIVATION: tl.constexpr,
    SILU: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN outputs of a weight [N, D]; grid: outputs in blocks, weights.

    X [ROWS, D]; GATE [ROWS, D], NORM [D] and RESIDUAL [ROWS, N] may be None; Y is [ROWS, N] of one weight behind that
    of the other. Bits of SILU: of which outputs swish is taken. MOST: a power of two, of rows. EARLY: see
    `launch.early`; weights are on their way before x is there.
    """
    which = tl.program_id(1)
    W, N, first = W0, N0, N0 * 0
    if WEIGHTS > 1 and which == 1:
        W, N, first = W1, N1, N0
    if WEIGHTS > 2 and which == 2:
        W, N, first = W2, N2, N0 + N1
    if WEIGHTS > 3 and which == 3:
        W, N, first = W3, N3, N0 + N1 + N2
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m, d = tl.arange(0, MOST), tl.arange(0, BD)
    y, squares = tl.zeros([MOST, BN], tl.float32), tl.zeros([MOST], tl.float32)
    W += n.to(tl.int64)[:, None] * D
    coming = load_weights(W, d, D, n < N)
    if EARLY:
        gdc_wait()  # for x
        gdc_launch_dependents()
    for start in range(0, D, BD):
        c = start + d
        mask = (m < ROWS)[:, None] & (c < D)[None, :]
        w, coming = coming, load_weights(W, c + BD, D, n < N)
        x = tl.load(X + m[:, None] * x_r + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if NORMED:
            squares += tl.sum(x * x, 1)
        if NORM is not None:
            x = x * tl.load(NORM + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
        if GATE is not None:
            gate = tl.load(GATE + m[:, None] * gate_r + c[None, :], mask=mask, other=0.0).to(tl.float32)
            x = x * activate(gate, ACTIVATION)[0]
        y += tl.sum(w.to(tl.float32)[None, :, :] * x[:, None, :], 2)
    if NORMED:
        y = y / tl.sqrt(squares / D + eps)[:, None]
    if SILU != 0:
        y = tl.where((SILU >> which) & 1 == 1, y / (1.0 + tl.exp(-y)), y)
    mask = (m < ROWS)[:, None] & (n < N)[None, :]
    if RESIDUAL is not None:
        y += tl.load(RESIDUAL + m[:, None] * residual_r + n[None, :], mask=mask, other=0.0).to(tl.float32)
    at = first.to(tl.int64) * ROWS + m[:, None] * N + n[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


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
    most = triton.next_power_of_2(rows)
    outputs, columns = _block(sum(sizes), D, most, processors(x.device))
    begins = early(x.device)
    stride = [0 if t is None else t.stride(0) for t in (x, gate, residual)]
    w, n = ([*given, *[None] * (MOST_WEIGHTS - len(given))] for given in (weights, sizes))
    with torch.cuda.device_of(x):
        few_rows_kernel[(triton.cdiv(max(sizes), outputs), len(weights))](
            x, gate, norm_weight, *w, residual, y, float(eps), D, *[0 if size is None else size for size in n], *stride,
            ROWS=rows, MOST=most, WEIGHTS=len(weights), NORMED=int(normed), ACTIVATION=ACTIVATIONS[activation],
            SILU=silu, BN=outputs, BD=columns, EARLY=begins,
            num_warps=min(8, max(1, outputs * columns * most // 1024)), **({"launch_pdl": True} if begins else {}),
        )  # fmt: skip
    return tuple(part.view(*leading, size) for part, size in zip(y.split([rows * size for size in sizes]), sizes))


def _rows(x: Tensor | None, width: int) -> Tensor | None:
    if x is None:
        return None
    x = x.reshape(-1, width)
    return x if x.stride(1) == 1 else x.contiguous()


def _block(outputs: int, D: int, rows: int, processors: int) -> tuple[int, int]:
    """Outputs and columns of a program: all multiprocessors have some programs, and each of these long reads.

    A small weight must be on its way to the processors as a whole for its reading to be short, so its rows are not cut;
    of a large one there are programs enough, which share what they make of x among more outputs.
    """
    each = max(2, min(16, outputs // (8 * processors)))
    each = 1 << (each.bit_length() - 1)
    columns = min(COLUMNS, NUMBERS // each // rows, triton.next_power_of_2(D))
    return each, max(16, columns)
