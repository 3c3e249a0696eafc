# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Outputs, and with other operands the gradient of q, in Triton: a walk from a segment's start to its end.

Per tile of C tokens, with S the state before it (kept in registers, in fp32) and D_ij = exp(G_i - G_j) for j <= i::

    out = scale * (exp(G) * (x S) + ((x y^T) * D) z)        S <- exp(G_C) S + (exp(G_C - G) * y)^T z

    outputs      x = q     y = k    z = v    S [K, V]
    dq           x = do    y = v    z = k    S^T [V, K]

With a normaliser S has a column more, the sum of keys s. For o the denominator is then the same for values of 1: the
sums of x y^T over its rows, and x s. For dq x has a number more, c of normaliser.py: it is added to x y^T, and c s^T to
what x S is there. `scale` is divided by the denominator.

The columns of z and out are divided among programs: the product x y^T is then computed more than once, but a program
needs fewer registers, so that loads run ahead of products in more stages. Its x and y come from the L2 cache.

Tiles are aligned to the segment's start. In the last one, rows behind the end are zeros (or repeat the last token):
causality keeps them from all rows that are stored, and the state they spoil is not used again. So no load needs a
mask. With TMA the card's copy engine moves tiles, addressed by descriptors whose bounds are the segment's.
"""

import triton
import triton.language as tl

from lasp_kernels.state import (
    HEAD_DECAY,
    NO_DECAY,
    TOKEN_DECAY,
    VARYING,
    bounded,
    head_causal_decays,
    head_decays,
    load_columns,
    place_of_program,
    segment_bounds,
    tile_decays,
)


@triton.jit(do_not_specialize=VARYING)
def forward_walk_kernel(
    X, Y, Z, W, NORM, G, STATE, OUT, ROWS, TABLE,
    scale, B, T, segment_length, segments, slots, H,
    x_b, x_t, x_h, y_b, y_t, y_h, z_b, z_t, z_h, out_b, out_t, out_h, w_b, w_t, w_h, g_h,
    DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, SHARE: tl.constexpr, NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, TRANSPOSED: tl.constexpr,
    SUM_ROWS: tl.constexpr, SPLIT_SUMS: tl.constexpr, TMA: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [B, T, H*GROUP, DZ]. TRANSPOSED: STATE holds [DZ, DY], else [DY, DZ]; without slots it is zeros.
    G is [H], or per token what `tile_decay_kernel` makes.

    SUM_ROWS: also ROWS [2, blocks, B, H*GROUP, T] = sum over the block's columns of W * out, before out is rounded,
    and of that part of it which comes from the state before the tile.
    SHARE heads of v have one of q and k; OUT has one for each of them.
    NORMALIZE: NORM [B, H*GROUP, T] gets the denominators; TRANSPOSED it is read, and is what normaliser.py makes.
    """
    width: tl.constexpr = (DY if TRANSPOSED else DZ) + (1 if NORMALIZE else 0)  # of a row of the state
    size: tl.constexpr = (DZ if TRANSPOSED else DY) * width
    blocks: tl.constexpr = (DZ + BZ - 1) // BZ
    heads = H * GROUP
    block, b, hq, segment = place_of_program(B, heads, blocks)
    h = hq // GROUP
    xh = hq if TRANSPOSED else hq // SHARE
    yh, zh = h if TRANSPOSED else h // SHARE, h // SHARE if TRANSPOSED else h
    first, end, slot = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    c, d = tl.arange(0, C), tl.arange(0, BY)
    e = block * BZ + tl.arange(0, BZ)
    x_base = X + b * x_b + start * x_t + xh * x_h
    y_base = Y + b * y_b + start * y_t + yh * y_h
    z_base = Z + b * z_b + start * z_t + zh * z_h
    out_base = OUT + b * out_b + start * out_t + hq * out_h
    past = c[:, None] >= c[None, :]
    if TMA:
        x_tiles = tl.make_tensor_descriptor(x_base, [n, DY], [x_t, 1], [C, BY])
        y_tiles = tl.make_tensor_descriptor(y_base, [n, DY], [y_t, 1], [C, BY])
        z_tiles = tl.make_tensor_descriptor(z_base, [n, DZ], [z_t, 1], [C, BZ])
        out_tiles = tl.make_tensor_descriptor(out_base, [n, DZ], [out_t, 1], [C, BZ])
    if DECAY == HEAD_DECAY:
        g = bounded(tl.load(G + h * g_h))
        enter, leave, tile_decay = head_decays(g, C)
        causal = head_causal_decays(g, C, False)
    if DECAY == TOKEN_DECAY:
        g_base = G + (b * H + h) * T + start
    at = d[:, None] + e[None, :] * width if TRANSPOSED else d[:, None] * width + e[None, :]
    inside = (d < tl.where(slots > 0, DY, 0))[:, None] & (e < DZ)[None, :]
    s = tl.load(STATE + ((b * H + h) * slots + slot) * size + at, mask=inside, other=0.0)
    if NORMALIZE:
        norm_at = NORM + (b * heads + hq) * T + start
        channel = e if TRANSPOSED else d  # of keys
        sum_at = STATE + ((b * H + h) * slots + slot) * size + channel * width + width - 1
        inside = channel < tl.where(slots > 0, DZ if TRANSPOSED else DY, 0)
        keys = tl.load(sum_at, mask=inside, other=0.0)  # their sum
    for i in tl.range(0, n, C, num_stages=STAGES):
        row = i + c
        rows = tl.minimum(row, n - 1)
        if TMA:
            x = x_tiles.load([i, 0]).to(LOW)
            y = y_tiles.load([i, 0]).to(LOW)
            z = z_tiles.load([i, block * BZ]).to(LOW)
        else:
            x = load_columns(x_base + (rows[:, None] * x_t + d[None, :]), d[None, :], DY, BY, LOW)
            y = load_columns(y_base + (rows[:, None] * y_t + d[None, :]), d[None, :], DY, BY, LOW)
            z = load_columns(z_base + (rows[:, None] * z_t + e[None, :]), e[None, :], DZ, BZ, LOW)
        p = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        out = tl.dot(x, s.to(LOW), input_precision=PRECISION)
        if NORMALIZE and TRANSPOSED:
            factor = tl.load(norm_at + rows)
            added = tl.load(norm_at + B.to(tl.int64) * heads * T + rows)[:, None]
            p, out = p + added, out + added * keys[None, :]
        if DECAY == TOKEN_DECAY:
            tile_last = tl.minimum(i + C, n) - 1
            causal, enter, leave, tile_decay = tile_decays(g_base, B, H, T, rows, tile_last, C, False, SPLIT_SUMS)
        if DECAY == NO_DECAY:
            p = tl.where(past, p, 0.0)
        else:
            p = p * causal
            out = out * enter[:, None]
        from_state = out
        out = tl.dot(p.to(LOW), z, out, input_precision=PRECISION)
        if NORMALIZE and not TRANSPOSED:
            norm = tl.sum(x.to(tl.float32) * keys[None, :], 1)
            norm = tl.sum(p, 1) + (norm if DECAY == NO_DECAY else norm * enter)
            tl.store(norm_at + rows, norm, mask=row < tl.where(block == 0, n, 0))
            factor = scale / tl.where(row < n, norm, 1.0)
        out = out * (factor[:, None] if NORMALIZE else scale)
        mask = (row < n)[:, None] if DZ % BZ == 0 else (row < n)[:, None] & (e < DZ)[None, :]
        if TMA:
            out_tiles.store([i, block * BZ], out.to(OUT.dtype.element_ty))
        else:
            tl.store(out_base + (rows[:, None] * out_t + e[None, :]), out.to(OUT.dtype.element_ty), mask=mask)
        if SUM_ROWS:
            w_at = W + b * w_b + (start + rows[:, None]) * w_t + hq // SHARE * w_h + e[None, :]
            w = tl.load(w_at, mask=mask, other=0.0)
            rows_at = ROWS + ((block * B + b) * heads + hq) * T + start + rows
            tl.store(rows_at, tl.sum(w.to(tl.float32) * out, 1), mask=row < n)
            from_state = tl.sum(w.to(tl.float32) * from_state, 1) * (factor if NORMALIZE else scale)
            tl.store(rows_at + blocks * B.to(tl.int64) * heads * T, from_state, mask=row < n)
        if NORMALIZE:
            seen = z if TRANSPOSED else y
            if DECAY == NO_DECAY:
                keys += tl.sum(seen.to(tl.float32), 0)
            else:
                keys = keys * tile_decay + tl.sum(seen.to(tl.float32) * leave[:, None], 0)
        if DECAY != NO_DECAY:  # z is scaled, not y, which the product takes transposed as it lies in shared memory
            z = (z * leave[:, None]).to(LOW)
            s = s * tile_decay
        s = tl.dot(tl.trans(y), z, s, input_precision=PRECISION)
