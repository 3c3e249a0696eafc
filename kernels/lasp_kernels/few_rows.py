# pyright: reportCallIssue=false, reportArgumentType=false, reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Linear layers for few rows, such as a token of some sequences: each weight is read once, and that is their time.

    norm_linear         y_i = activation(norm(x) W_i^T)                     for several W_i
    norm_gate_linear    y = (norm(x) * activation(gate)) W^T + residual
    gated_linear        y = (x * activation(gate)) W^T + residual

Around a product a model's small operations each cost a launch, which at one token is as long as reading megabytes. Here
each of these is one launch: a program takes some rows of the weights, and makes what they are multiplied with by
itself, from x in the cache; the norm is a factor of the sum, so that squares are added up on the way.

- One row (`one_row_kernel`): sums in fp32, and the layer's input is not rounded in between. A program for each row, so
  that few rows of fp32 or fp16 go this way, too.
- Up to 64 rows of bf16 (`rows_kernel`): products of tiles, the weight's as the left one, for that is the long side. The
  input is rounded to bf16. Where there are fewer tiles of outputs than multiprocessors, several programs share the
  columns of a tile, and a second launch adds up what each has found, always in the same order.

What is on its way at a time decides how fast weights come: about 3 MB for all of the card, 22 KB a multiprocessor. So
programs are many or have several tiles under way; and from Hopper on each asks for its weights while the kernel before
still runs (`launch.early`).

There is no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lasp_kernels.launch import ask_for, early, processors
from lasp_kernels.norm import ACTIVATIONS, activate

MOST_ROWS = 64  # of bf16
TILES_FROM = 2  # so many rows of bf16 on, rows share programs
MOST_SINGLE = 4  # rows that each have their own programs, in other dtypes
MOST_WEIGHTS = 4  # that read the same
SUMS = 256  # of a program that adds up what others have found
AT_ONCE = 12 * 2**20  # bytes of weights that all programs ask for before they wait


class Blocks(NamedTuple):
    """Of a program of `one_row_kernel`: outputs, columns at once, warps, and in how many pieces it asks for a row of
    the weight before x is there."""

    outputs: int
    columns: int
    warps: int
    asked: int


class Tiles(NamedTuple):
    """Of a program of `rows_kernel`: rows, outputs and columns of its products; programs that share the columns; the
    rest as in `Blocks`."""

    rows: int
    outputs: int
    columns: int
    shared: int
    warps: int
    stages: int
    asked: int


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


@triton.jit
def begin(W, n, N, begin, D: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr):
    """What stands before all loads of a program (`launch.early`): AHEAD times CHUNK columns of rows n, from `begin`."""
    if EARLY:
        if AHEAD > 0:
            c = tl.minimum(begin + tl.arange(0, AHEAD) * CHUNK, D - CHUNK)
            at = tl.minimum(n, N - 1).to(tl.int64)[None, :] * D + c[:, None]  # the first columns of all rows first
            ask_for(W + at, CHUNK * W.dtype.element_ty.primitive_bitwidth // 8)
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prepared(x, GATE, NORM, gate_at, c, mask, inside, ACTIVATION: tl.constexpr):
    """x [...] in fp32 times what it is multiplied with; the norm is a factor of the sum."""
    if NORM is not None:
        x = x * tl.load(NORM + c, mask=inside, other=0.0).to(tl.float32)
    if GATE is not None:
        gate = tl.load(GATE + gate_at, mask=mask, other=0.0).to(tl.float32)
        x = x * activate(gate, ACTIVATION)[0]
    return x


@triton.jit(do_not_specialize=["eps", "N0", "N1", "N2", "N3", "rows"])
def one_row_kernel(
    X, GATE, NORM, W0, W1, W2, W3, RESIDUAL, Y,
    eps, N0, N1, N2, N3, rows, x_r, gate_r, residual_r,
    D: tl.constexpr, WEIGHTS: tl.constexpr, NORMED: tl.constexpr, ACTIVATION: tl.constexpr, SILU: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN outputs of a weight [N, D] for one row; grid: outputs of all weights in blocks, rows.

    X [rows, D]; GATE [rows, D], NORM [D] and RESIDUAL [rows, N] may be None; Y is [rows, N] of one weight behind that
    of the other. Bits of SILU: of which outputs swish is taken.
    """
    W, N, which, first, tile = find_weight(tl.program_id(0), W0, W1, W2, W3, N0, N1, N2, N3, WEIGHTS, BN)
    n, d = tile * BN + tl.arange(0, BN), tl.arange(0, BD)
    begin(W, n, N, 0, D, AHEAD, CHUNK, EARLY)
    row = tl.program_id(1).to(tl.int64)
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
        x = prepared(x, GATE, NORM, row * gate_r + c, c, mask, mask, ACTIVATION)
        y += w.to(tl.float32) * x[None, :]
    y = tl.sum(y, 1)
    if NORMED:
        y = y / tl.sqrt(tl.sum(squares, 0) / D + eps)
    if SILU != 0:
        y = tl.where((SILU >> which) & 1 == 1, y / (1.0 + tl.exp(-y)), y)
    if RESIDUAL is not None:
        y += tl.load(RESIDUAL + row * residual_r + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(Y + first.to(tl.int64) * rows + row * N + n, y.to(Y.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=["eps", "N0", "N1", "N2", "N3", "rows"])
def rows_kernel(
    X, GATE, NORM, W0, W1, W2, W3, RESIDUAL, Y, PARTS, SQUARES,
    eps, N0, N1, N2, N3, rows, x_r, gate_r, residual_r,
    D: tl.constexpr, WEIGHTS: tl.constexpr, NORMED: tl.constexpr, ACTIVATION: tl.constexpr, SILU: tl.constexpr,
    LOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SHARED: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BN outputs for BM rows; grid: rows in blocks and, slower, outputs of all weights in blocks; parts of the columns.

    Operands as of `one_row_kernel`; products are of LOW. With SHARED parts of the columns, of one weight, a program
    leaves its sums in PARTS [SHARED, rows, N] and, if the norm is to be taken, of its columns the squares of x in
    SQUARES [SHARED, rows]; `sum_kernel` does the rest.
    """
    blocks = tl.cdiv(rows, BM)
    W, N, which, first, tile = find_weight(tl.program_id(0) // blocks, W0, W1, W2, W3, N0, N1, N2, N3, WEIGHTS, BN)
    n, k = tile * BN + tl.arange(0, BN), tl.arange(0, BK)
    m = (tl.program_id(0) % blocks * BM + tl.arange(0, BM)).to(tl.int64)
    part = tl.program_id(1)
    each: tl.constexpr = ((D + BK - 1) // BK + SHARED - 1) // SHARED * BK
    begin(W, n, N, part * each, D, AHEAD, CHUNK, EARLY)
    W += n.to(tl.int64)[:, None] * D
    x_at, gate_at = m[None, :] * x_r, m[None, :] * gate_r
    y, squares = tl.zeros([BN, BM], tl.float32), tl.zeros([BK, BM], tl.float32)
    for start in tl.range(part * each, tl.minimum(part * each + each, D), BK, num_stages=STAGES):
        c = start + k
        w = tl.load(W + c[None, :], mask=(n < N)[:, None] & (c < D)[None, :], other=0.0)
        inside = (c < D)[:, None]
        mask = inside & (m < rows)[None, :]
        x = tl.load(X + x_at + c[:, None], mask=mask, other=0.0)
        if NORMED:
            squares += x.to(tl.float32) * x.to(tl.float32)
        if NORM is not None or GATE is not None:
            wide = prepared(x.to(tl.float32), GATE, NORM, gate_at + c[:, None], c[:, None], mask, inside, ACTIVATION)
            x = wide.to(x.dtype)
        y = tl.dot(w.to(LOW), x.to(LOW), y, input_precision="ieee")
    mask = (n < N)[:, None] & (m < rows)[None, :]
    at = m[None, :] * N + n[:, None]
    if SHARED > 1:
        tl.store(PARTS + part.to(tl.int64) * rows * N + at, y, mask=mask)
        if NORMED:  # noqa: SIM102  # known when it is compiled, the other is not
            if tile == 0:
                tl.store(SQUARES + part * rows + m, tl.sum(squares, 0), mask=m < rows)
    else:
        if NORMED:
            y = y / tl.sqrt(tl.sum(squares, 0) / D + eps)[None, :]
        if SILU != 0:
            y = tl.where((SILU >> which) & 1 == 1, y / (1.0 + tl.exp(-y)), y)
        if RESIDUAL is not None:
            y += tl.load(RESIDUAL + m[None, :] * residual_r + n[:, None], mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + first.to(tl.int64) * rows + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["eps", "N", "rows"])
def sum_kernel(
    PARTS, SQUARES, RESIDUAL, Y, eps, N, rows, residual_r,
    D: tl.constexpr, NORMED: tl.constexpr, SILU: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """What `rows_kernel` has left in PARTS, for BLOCK outputs of one row; grid: outputs in blocks, rows."""
    if EARLY:  # `launch.early`
        gdc_wait()
        gdc_launch_dependents()
    n, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = n < N
    y, squares = tl.zeros([BLOCK], tl.float32), 0.0
    for part in tl.static_range(SHARED):
        y += tl.load(PARTS + (part * rows + row) * N + n, mask=mask, other=0.0)
        if NORMED:
            squares += tl.load(SQUARES + part * rows + row)
    if NORMED:
        y = y / tl.sqrt(squares / D + eps)
    if SILU != 0:
        y = y / (1.0 + tl.exp(-y))
    if RESIDUAL is not None:
        y += tl.load(RESIDUAL + row * residual_r + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + row * N + n, y.to(Y.dtype.element_ty), mask=mask)


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
    most = MOST_ROWS if x.dtype == torch.bfloat16 else MOST_SINGLE
    return (
        x.numel() <= most * width
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
    asks = begins and D * x.element_size() % 16 == 0 and all(w.data_ptr() % 16 == 0 for w in weights)
    settings: dict = {"D": D, "NORMED": int(normed), "SILU": silu, "EARLY": begins}
    options = {"launch_pdl": True} if begins else {}
    operation = {"WEIGHTS": len(weights), "ACTIVATION": ACTIVATIONS[activation]}
    operands = (x, gate, norm_weight, *w, residual, y)
    numbers = (float(eps), *n, rows, *strides)
    with torch.cuda.device_of(x):
        if not _in_tiles(rows, x.dtype):
            block = _blocks(sum(sizes), D, processors(x.device))
            blocks = sum(triton.cdiv(size, block.outputs) for size in sizes)
            one_row_kernel[(blocks, rows)](
                *operands, *numbers, BN=block.outputs, BD=block.columns, num_warps=block.warps,
                **_asked(block.asked if asks else 0, block.outputs, D, x.element_size(), blocks, processors(x.device)),
                **operation, **settings, **options,
            )  # fmt: skip
        else:
            tile = _tiles(sum(sizes), rows, len(weights), processors(x.device))
            parts = squares = None
            if tile.shared > 1:
                parts = torch.empty(tile.shared * (len(y) + rows), dtype=torch.float32, device=x.device)
                squares = parts[tile.shared * len(y) :]
            blocks = sum(triton.cdiv(size, tile.outputs) for size in sizes) * triton.cdiv(rows, tile.rows)
            rows_kernel[(blocks, tile.shared)](
                *operands, parts, squares, *numbers, LOW=_low(x.dtype), BM=tile.rows, BN=tile.outputs, BK=tile.columns,
                SHARED=tile.shared, STAGES=tile.stages, num_warps=tile.warps,
                **_asked(
                    tile.asked if asks else 0, tile.outputs, D // tile.shared, x.element_size(), blocks * tile.shared,
                    processors(x.device),
                ),
                **operation, **settings, **options,
            )  # fmt: skip
            if tile.shared > 1:
                sum_kernel[(triton.cdiv(sizes[0], SUMS), rows)](
                    parts, squares, residual, y, float(eps), sizes[0], rows, strides[2], SHARED=tile.shared,
                    BLOCK=SUMS, num_warps=2, **settings, **options,
                )  # fmt: skip
    return tuple(part.view(*leading, size) for part, size in zip(y.split([rows * size for size in sizes]), sizes))


def _rows(x: Tensor | None, width: int) -> Tensor | None:
    if x is None:
        return None
    x = x.reshape(-1, width)
    return x if x.stride(1) == 1 else x.contiguous()


def _in_tiles(rows: int, dtype: torch.dtype) -> bool:
    """Whether rows share a program."""
    return rows >= TILES_FROM and dtype == torch.bfloat16


def _low(dtype: torch.dtype) -> tl.dtype:
    """Of products. The interpreter's, of bf16, are wrong."""
    return tl.bfloat16 if dtype == torch.bfloat16 and not knobs.runtime.interpret else tl.float32


def _asked(pieces: int, outputs: int, columns: int, itemsize: int, programs: int, processors: int) -> dict[str, int]:
    """How long the pieces are that a program asks for: whole lines of the cache, all the columns at most, and of all
    programs together what comes while a kernel ends and the next begins, or the cache could not keep it."""
    of_piece = min(columns * itemsize, AT_ONCE // (min(programs, 4 * processors) * outputs)) / max(1, pieces)
    size = max(1, math.ceil(of_piece / 128)) * 128 // itemsize
    return {"AHEAD": pieces if size <= columns else 0, "CHUNK": size}


def _blocks(outputs: int, D: int, processors: int) -> Blocks:
    """For one row: as many outputs as leave a multiprocessor 2.6 programs, whose threads have two times 64 bytes under
    way, 43 KB together. They should all run at once, in half of the registers, so that the next kernel's have room
    beside them. Few outputs need long parts of the weight's rows, which then all warps share."""
    each = next((n for n in (32, 16, 8) if outputs >= 2.6 * n * processors), 4)
    columns = max(16, min(4096 // each, triton.next_power_of_2(D)))
    return Blocks(each, columns, 4, 128 // each)


def _tiles(outputs: int, rows: int, weights: int, processors: int) -> Tiles:
    """For several rows: tiles of outputs for three quarters of the multiprocessors at least. Where only small ones are
    enough, x would be read as often as there are these; so tiles stay as long as there are rows, and programs share the
    columns. Behind 64 rows it is products that take the time, and not the weights."""
    if rows > 64:
        block, each, columns, warps, stages = 64 if weights == 1 else 128, 128, 64, 8, 4
    else:
        block, warps, stages = max(16, triton.next_power_of_2(rows)), 4, 4
        each = next((n for n in (64, 32) if 4 * outputs >= 3 * n * processors), 16)
        if weights == 1:
            each = max(each, block)
        columns = 64 if block == 64 else 256 if each == 16 else 128
    shared, tiles = 1, triton.cdiv(outputs, each) * triton.cdiv(rows, block)
    while weights == 1 and shared < 8 and 2 * shared * tiles <= 1.1 * processors:
        shared *= 2
    return Tiles(block, each, columns, shared, warps, stages, max(1, 32 * warps // each))
