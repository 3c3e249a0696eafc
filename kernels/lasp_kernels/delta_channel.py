# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The delta rule with a decay per token and channel (KDA), in Triton: what is other than in delta_kernels.py.

What crosses a tile's borders is read and written by Q^ = scale q exp(G), K^ = k exp(G) and K_ = k exp(G_C - G), none
larger than what it was, whatever the decays: `delta_gate_kernel` leaves these for the walks of delta_kernels.py.

Within a tile exp(G_i - G_j) stands inside of the sums over channels. In each block of 16 tokens let g_i be the decays
up to token i, inclusive, h those of its first 8 tokens, w those of all 16, and

    q> = scale q exp(g - h)      k> = k exp(g - h)      k< = k exp(h - g)

None of the factors is beyond exp(+-LIMIT) if half a block decays by no more. A pair in one block is then q> k<, and one
in different blocks q> k< times the decay from the middle of one block to that of the other, which is <= 1: earlier
keys are moved from block to block (`moved_on`), later queries back (`seen_from_behind`). The gradients of q>, k> and k<
are found alike, and x = q> dq> + k> dk> - k< dk<; what a pair in one block gives to both sides of that sum is exactly
the same, however it is rounded.

A tile in which half a block decays by more than exp(-LIMIT) in any channel is *flagged* (gates of at least -5 a token
never do that): there q>, k> are taken from their block's start and k< from its end, so that no factor is above 1, and a
block with itself is worked out token by token, its scores by `delta_flagged_kernel`, its gradients by
`delta_flagged_gradient_kernel`. In units of log 2 all exponents are sums of log-decays, or of those of half a block.

FLAG [B, H, all_tiles]: 1 where the tile is flagged. TOTAL [B, H, all_tiles, K]: the decay of each tile. STEPS [B, H,
all_tiles, 5, C / 16, K], factors of each block: 0 (1 from the block before it) what moves keys on to it, 2 what moves
queries back to it, 3 and 4 what leads from the tile's start to it, and from it to the tile's end.
SIDE [2, B, H, all_tiles, C, 16]: of flagged tiles A and P of each block with itself.
"""

import triton
import triton.language as tl

from lasp_kernels.channel import first_tile, load_tile, log2_decays
from lasp_kernels.delta_kernels import (
    VARYING_HERE,
    from_diagonal,
    load_beta,
    on_diagonal,
    store_inner,
    stretch_bounds,
)
from lasp_kernels.state import place_of_program, segment_bounds

LIMIT = tl.constexpr(42.0 * 1.4426950408889634)  # of half a block: bf16 has exp(+-42), and fp32 the square of that
FORGOTTEN = tl.constexpr(16.0 * 1.4426950408889634)  # of a tile, behind which what came before is lost in rounding
KINDS = tl.constexpr(5)  # of factors in STEPS


@triton.jit
def between_blocks(of_blocks, low, high, BLOCKS: tl.constexpr):
    """[BLOCKS, BD]: for each block the sum over the blocks m with low < m < high, which are numbers or [BLOCKS, 1]."""
    m = tl.arange(0, BLOCKS)
    return tl.sum(tl.where(((m[None, :] > low) & (m[None, :] < high))[:, :, None], of_blocks[None, :, :], 0.0), 1)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_gate_kernel(
    Q, K, G, QH, KH, KW, Q_LATER, K_LATER, K_EARLIER, LATER, EARLIER, STEPS, TOTAL, FLAG, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H, q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of a tile all that is elementwise, each [B, T, H, D]: Q^, K^, K_; q>, k>, k<; and, if they are given, LATER and
    EARLIER, the factors of these. A program goes through the tokens of all blocks at once, and adds up nothing but
    what one thread has."""
    blocks: tl.constexpr = C // 16
    _, b, h, rest = place_of_program(B, H, 1)
    tile, segment = rest % tiles, rest // tiles
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n = end - first
    if tile * C >= n:
        return
    start = first.to(tl.int64)
    block, d = tl.arange(0, blocks)[:, None], tl.arange(0, BD)[None, :]
    token = tile * C + block * 16
    q_at = Q + b * q_b + (start + token) * q_t + (h // GROUP) * q_h + d
    k_at = K + b * k_b + (start + token) * k_t + (h // GROUP) * k_h + d
    g_at = G + b * g_b + (start + token) * g_t + h * g_h + d
    out_at = ((b * T + start + token) * H + h) * D + d
    half, second = tl.zeros([blocks, BD], tl.float32), tl.zeros([blocks, BD], tl.float32)
    for i in tl.static_range(16):
        g = log2_decays(g_at + i * g_t, (token + i < n) & (d < D))
        if i < 8:
            half += g
        else:
            second += g
    whole = half + second
    strong = tl.min(tl.min(tl.minimum(half, second), 1), 0) < -LIMIT
    at = first_tile(b, h, H, first, segment, all_tiles, C) + tile
    tl.store(FLAG + at, strong.to(tl.int32))
    tl.store(TOTAL + at * D + tl.arange(0, BD), tl.sum(whole, 0), mask=tl.arange(0, BD) < D)
    to_later = tl.where(strong, 0.0, half)  # from a block's start to where q> and k> are taken from
    from_later = tl.where(strong, whole, second)
    from_earlier = tl.where(strong, 0.0, second)  # from where k< are taken from to the block's end
    to_earlier = tl.where(strong, whole, half)
    before, after = between_blocks(whole, -1, block, blocks), between_blocks(whole, block, C, blocks)
    enter, leave = tl.exp2(before + to_later), tl.exp2(after + from_earlier)
    steps = STEPS + at * (KINDS * blocks * D) + block * D + d
    kind: tl.constexpr = blocks * D
    d_mask = (d < D) & (block < blocks)
    tl.store(steps, tl.exp2(between_blocks(from_later, block - 2, block, blocks) + to_later), mask=d_mask)
    tl.store(steps + kind, tl.exp2(between_blocks(from_earlier, block - 2, block, blocks) + to_later), mask=d_mask)
    tl.store(
        steps + 2 * kind, tl.exp2(between_blocks(to_earlier, block, block + 2, blocks) + from_earlier), mask=d_mask
    )
    tl.store(steps + 3 * kind, enter, mask=d_mask)
    tl.store(steps + 4 * kind, leave, mask=d_mask)
    run = -to_later
    for i in tl.static_range(16):
        mask = (token + i < n) & (d < D)
        run += log2_decays(g_at + i * g_t, mask)
        factor = tl.exp2(run)
        q = tl.load(q_at + i * q_t, mask=mask, other=0.0).to(tl.float32) * scale * factor
        k = tl.load(k_at + i * k_t, mask=mask, other=0.0).to(tl.float32) * factor
        at = out_at + i * (H * D)
        tl.store(Q_LATER + at, q.to(Q_LATER.dtype.element_ty), mask=mask)
        tl.store(K_LATER + at, k.to(K_LATER.dtype.element_ty), mask=mask)
        tl.store(QH + at, (q * enter).to(QH.dtype.element_ty), mask=mask)
        tl.store(KH + at, (k * enter).to(KH.dtype.element_ty), mask=mask)
        if LATER is not None:
            tl.store(LATER + at, factor.to(LATER.dtype.element_ty), mask=mask)
    run = -from_earlier
    for i in tl.static_range(15, -1, -1):
        mask = (token + i < n) & (d < D)
        factor = tl.exp2(run)
        k = tl.load(k_at + i * k_t, mask=mask, other=0.0).to(tl.float32) * factor
        at = out_at + i * (H * D)
        tl.store(K_EARLIER + at, k.to(K_EARLIER.dtype.element_ty), mask=mask)
        tl.store(KW + at, (k * leave).to(KW.dtype.element_ty), mask=mask)
        if EARLIER is not None:
            tl.store(EARLIER + at, factor.to(EARLIER.dtype.element_ty), mask=mask)
        run += log2_decays(g_at + i * g_t, mask)


@triton.jit
def moved_on(y, earlier, steps, kind, d, d_mask, r, D: tl.constexpr, C: tl.constexpr):
    """Earlier keys, as seen from block r: those of block r, and those of the blocks before it, which y has as seen from
    block r - 1. [C, channels] in fp32."""
    block = (tl.arange(0, C) // 16)[:, None]
    far = tl.load(steps + r * D + d, mask=d_mask, other=0.0)
    near = tl.load(steps + kind + r * D + d, mask=d_mask, other=0.0)
    y = y * tl.where(block == r - 1, near[None, :], far[None, :])
    return tl.where(block == r, earlier.to(tl.float32), y)


@triton.jit
def of_block(x, r, C: tl.constexpr):
    """The rows [C, ...] of block r, else 0."""
    return tl.where((tl.arange(0, C) // 16 == r)[:, None], x, 0.0)


@triton.jit
def seen_from_behind(
    out, p, later, steps, kind, d, d_mask, D: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """out [C, channels] + what each key gets from the queries behind it, by weights p [key, query].

    From the last block on: x are the later queries as seen from block r, those of block r itself and those of the
    blocks behind it.
    """
    blocks: tl.constexpr = C // 16
    block = (tl.arange(0, C) // 16)[:, None]
    x = tl.zeros_like(out)
    for r in tl.static_range(blocks - 1, -1, -1):
        far = tl.load(steps + 2 * kind + r * D + d, mask=d_mask, other=0.0)
        near = tl.load(steps + kind + (r + 1) * D + d, mask=d_mask & (r + 1 < blocks), other=0.0)
        x = tl.where(block == r, later.to(tl.float32), x * tl.where(block == r + 1, near[None, :], far[None, :]))
        out = tl.dot(of_block(p, r, C).to(later.dtype), x.to(later.dtype), out, input_precision=PRECISION)
    return out


@triton.jit
def in_other_blocks(x, flag, C: tl.constexpr):
    """Of weights [C, C]: all, or if the tile is flagged those of pairs in different blocks of 16."""
    block = tl.arange(0, C) // 16
    return tl.where((flag != 0) & (block[:, None] == block[None, :]), 0.0, x)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_inner_kernel(
    Q_LATER, K_LATER, K_EARLIER, STEPS, FLAG, SIDE, BETA, M, P, FACTORS, TABLE,
    B, T, segment_length, tiles, all_tiles, H, beta_b, beta_t, beta_h,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """M, P and FACTORS of a tile."""
    blocks: tl.constexpr = C // 16
    _, b, h, rest = place_of_program(B, H, 1)
    tile, segment = rest % tiles, rest // tiles
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n = end - first
    if tile * C >= n:
        return
    start = first.to(tl.int64)
    c = tl.arange(0, C)
    row = tile * C + c
    base = ((b * T + start) * H + h) * D
    at = first_tile(b, h, H, first, segment, all_tiles, C) + tile
    beta = load_beta(BETA + b * beta_b + (start + row) * beta_t + h * beta_h, row < n)
    tl.store(FACTORS + at * C + c, beta)
    a, p = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    steps, kind = STEPS + at * (KINDS * blocks * D), blocks * D
    for channel in range(0, D, BD):
        d = channel + tl.arange(0, BD)
        q = load_tile(Q_LATER + base, row, H * D, d, n, D, LOW)
        k = load_tile(K_LATER + base, row, H * D, d, n, D, LOW)
        earlier = load_tile(K_EARLIER + base, row, H * D, d, n, D, LOW)
        y = tl.zeros([C, BD], tl.float32)
        for r in tl.static_range(blocks):
            y = moved_on(y, earlier, steps, kind, d, d < D, r, D, C)
            low = tl.trans(y.to(LOW))
            a = tl.dot(of_block(k, r, C).to(LOW), low, a, input_precision=PRECISION)
            p = tl.dot(of_block(q, r, C).to(LOW), low, p, input_precision=PRECISION)
    flag = tl.load(FLAG + at)
    a, p = in_other_blocks(a, flag, C), in_other_blocks(p, flag, C)
    plane = B.to(tl.int64) * H * all_tiles * (C * 16)
    side = SIDE + at * (C * 16) + c[:, None] * 16 + tl.arange(0, 16)[None, :]
    flagged = (c < tl.where(flag != 0, C, 0))[:, None]
    a += on_diagonal(tl.load(side, mask=flagged, other=0.0), C)
    p += on_diagonal(tl.load(side + plane, mask=flagged, other=0.0), C)
    a = tl.where(c[:, None] > c[None, :], a, 0.0)
    p = tl.where(c[:, None] >= c[None, :], p, 0.0)
    store_inner(a, p, beta, M, P, at, C, INVERSE)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_flagged_kernel(
    Q, K, G, FLAG, SIDE, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H, q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """TILES tiles: SIDE of the flagged ones, token by token."""
    blocks: tl.constexpr = C // 16
    _, b, h, rest = place_of_program(B, H, 1)
    groups = tl.cdiv(tiles, TILES)
    segment = rest // groups
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    c, block, i = tl.arange(0, C), tl.arange(0, blocks), tl.arange(0, 16)
    q_base, k_base = Q + b * q_b + start * q_t + (h // GROUP) * q_h, K + b * k_b + start * k_t + (h // GROUP) * k_h
    g_base = G + b * g_b + start * g_t + h * g_h
    plane = B.to(tl.int64) * H * all_tiles * (C * 16)
    for t in range(TILES):
        tile = (rest % groups) * TILES + t
        at = first_tile(b, h, H, first, segment, all_tiles, C) + tile
        if tl.load(FLAG + at, mask=tile * C < n, other=0) != 0:
            row = tile * C + c
            a, p = tl.zeros([blocks, 16, 16], tl.float32), tl.zeros([blocks, 16, 16], tl.float32)
            for channel in range(0, D, BD):
                d = channel + tl.arange(0, BD)
                q = tl.reshape(load_tile(q_base, row, q_t, d, n, D, tl.float32) * scale, [blocks, 16, BD])
                k = tl.reshape(load_tile(k_base, row, k_t, d, n, D, tl.float32), [blocks, 16, BD])
                apart = tl.zeros([blocks, 16, BD], tl.float32)  # the decays behind token j up to i
                for m in range(16):
                    j = 15 - m
                    token = tile * C + block * 16 + j
                    j_mask = (token < n)[:, None] & (d < D)[None, :]
                    k_j = tl.load(k_base + token[:, None] * k_t + d[None, :], mask=j_mask, other=0.0).to(tl.float32)
                    seen = k_j[:, None, :] * tl.exp2(apart)
                    here = (i[None, None, :] == j) & (i[None, :, None] >= j)
                    a += tl.where(here, tl.sum(k * seen, 2)[:, :, None], 0.0)
                    p += tl.where(here, tl.sum(q * seen, 2)[:, :, None], 0.0)
                    g_j = log2_decays(g_base + token[:, None] * g_t + d[None, :], j_mask)
                    apart = tl.where((i >= j)[None, :, None], apart + g_j[:, None, :], apart)
            side = SIDE + at * (C * 16) + (block[:, None, None] * 16 + i[None, :, None]) * 16 + i[None, None, :]
            tl.store(side, a)
            tl.store(side + plane, p)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_flagged_gradient_kernel(
    Q, K, G, U, DO, DV_, FLAG, DQ, READ, WRITE, X, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TILES tiles and BK channels: of the flagged ones what pairs of tokens in one block of 16 give to DQ, READ, WRITE
    and X [B, T, H, DK]; the others are left as they are. Without WRITE it is added to READ."""
    blocks: tl.constexpr = C // 16
    column_blocks: tl.constexpr = (DK + BK - 1) // BK
    part, b, h, rest = place_of_program(B, H, column_blocks)
    groups = tl.cdiv(tiles, TILES)
    segment = rest // groups
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    c, block, i = tl.arange(0, C), tl.arange(0, blocks), tl.arange(0, 16)
    d = part * BK + tl.arange(0, BK)
    d_mask = d < DK
    q_base, k_base = Q + b * q_b + start * q_t + (h // GROUP) * q_h, K + b * k_b + start * k_t + (h // GROUP) * k_h
    g_base, do_base = G + b * g_b + start * g_t + h * g_h, DO + b * do_b + start * do_t + h * do_h
    value_at, out_at = ((b * T + start) * H + h) * DV, ((b * T + start) * H + h) * DK
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C)
    for t in range(TILES):
        tile = (rest % groups) * TILES + t
        if tl.load(FLAG + tile_at + tile, mask=tile * C < n, other=0) != 0:
            row = tile * C + c
            dp, da = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
            for column in range(0, DV, BV):
                e = column + tl.arange(0, BV)
                u = tl.trans(load_tile(U + value_at, row, H * DV, e, n, DV, LOW))
                do = load_tile(do_base, row, do_t, e, n, DV, LOW)
                dp = tl.dot(do, u, dp, input_precision=PRECISION)
                dv = load_tile(DV_ + value_at, row, H * DV, e, n, DV, LOW)
                da = tl.dot(dv, u, da, input_precision=PRECISION)
            dp_16, da_16 = from_diagonal(dp * scale, C), from_diagonal(da, C)
            q = tl.reshape(load_tile(q_base, row, q_t, d, n, DK, tl.float32), [blocks, 16, BK])
            k = tl.reshape(load_tile(k_base, row, k_t, d, n, DK, tl.float32), [blocks, 16, BK])
            dq, read = tl.zeros([blocks, 16, BK], tl.float32), tl.zeros([blocks, 16, BK], tl.float32)
            write, apart = tl.zeros([blocks, 16, BK], tl.float32), tl.zeros([blocks, 16, BK], tl.float32)
            for m in range(16):
                j = 15 - m
                token = tile * C + block * 16 + j
                j_mask = (token < n)[:, None] & d_mask[None, :]
                k_j = tl.load(k_base + token[:, None] * k_t + d[None, :], mask=j_mask, other=0.0).to(tl.float32)
                decay = tl.exp2(apart)
                of_j = (i == j)[None, None, :]
                later, after = (i >= j)[None, :, None], (i > j)[None, :, None]
                dp_j = tl.sum(tl.where(of_j, dp_16, 0.0), 2)[:, :, None]
                da_j = tl.sum(tl.where(of_j, da_16, 0.0), 2)[:, :, None]
                dp_j, da_j = tl.where(later, dp_j, 0.0) * decay, tl.where(after, da_j, 0.0) * decay
                dq += dp_j * k_j[:, None, :]
                read -= da_j * k_j[:, None, :]
                write_j = tl.sum(dp_j * q - da_j * k, 1)[:, None, :]
                write = tl.where((i == j)[None, :, None], write_j, write)
                g_j = log2_decays(g_base + token[:, None] * g_t + d[None, :], j_mask)
                apart = tl.where(later, apart + g_j[:, None, :], apart)
            mask = (row < n)[:, None] & d_mask[None, :]
            at = out_at + row[:, None] * (H * DK) + d[None, :]
            tl.store(DQ + at, tl.reshape(dq, [C, BK]).to(DQ.dtype.element_ty), mask=mask)
            tl.store(X + at, tl.reshape(q * dq + k * (read - write), [C, BK]), mask=mask)
            if WRITE is None:
                read += write
            else:
                tl.store(WRITE + at, tl.reshape(write, [C, BK]).to(WRITE.dtype.element_ty), mask=mask)
            tl.store(READ + at, tl.reshape(read, [C, BK]).to(READ.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_channel_query_walk_kernel(
    Q_LATER, K_LATER, K_EARLIER, KW, LATER, STEPS, TOTAL, FLAG, U, DO, DV_, BORDERS, DQ, READ, X, FROM_STATE, TABLE,
    scale, B, T, segment_length, segments, all_tiles, stretches, H, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STRETCH: tl.constexpr,
    PACKED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `delta_query_walk_kernel`. X [2, B, T, H, DK] fp32: q dq and k read; FROM_STATE [2, B, H, all_tiles, DK]: the
    sums over a tile of what in them comes from the state before. In flagged tiles DQ, READ and the first X have what
    `delta_flagged_gradient_kernel` left."""
    blocks: tl.constexpr = C // 16
    column_blocks: tl.constexpr = (DK + BK - 1) // BK
    part, b, h, rest = place_of_program(B, H, 2 * column_blocks)
    role = part % 2
    stretch, segment = rest % stretches, rest // stretches
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    start, n = stretch_bounds(first, end, stretch, C, STRETCH)
    if n <= 0:
        return
    c, e = tl.arange(0, C), tl.arange(0, BV)
    d = (part // 2) * BK + tl.arange(0, BK)
    d_mask = d < DK
    value_at, key_at = ((b * T + start) * H + h) * DV, ((b * T + start) * H + h) * DK
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C) + stretch * STRETCH
    x_base, x_t, w_base, out_base = DO + b * do_b + start * do_t + h * do_h, do_t, Q_LATER + key_at, DQ + key_at
    sign, factor = tl.where(role == 1, -1.0, 1.0), tl.where(role == 1, 1.0, scale)
    sums, sums_of_tiles = X + key_at, FROM_STATE
    if role == 1:
        x_base, x_t, w_base, out_base = DV_ + value_at, H * DV, K_LATER + key_at, READ + key_at
        sums, sums_of_tiles = sums + B.to(tl.int64) * T * H * DK, FROM_STATE + B.to(tl.int64) * H * all_tiles * DK
    border = ((b * H + h) * segments + segment) * (stretches + 1) + stretch
    state_at = border * (DK * DV) + d[None, :] * DV + e[:, None]
    s = tl.load(BORDERS + state_at, mask=d_mask[None, :] & (e < DV)[:, None], other=0.0)
    seen = c[:, None] >= c[None, :] + role
    kind = blocks * DK
    for step in tl.range(0, n, C, num_stages=STAGES):
        row, tile = step + c, tile_at + step // C
        at, mask = row[:, None] * (H * DK) + d[None, :], (row < n)[:, None] & d_mask[None, :]
        flag, steps = tl.load(FLAG + tile), STEPS + tile * (KINDS * blocks * DK)
        x = load_tile(x_base, row, x_t, e, n, DV, LOW)
        u = load_tile(U + value_at, row, H * DV, e, n, DV, LOW)
        earlier = load_tile(K_EARLIER + key_at, row, H * DK, d, n, DK, LOW)
        p = tl.dot(x, tl.trans(u), input_precision=PRECISION)
        p = in_other_blocks(tl.where(seen, p * sign, 0.0), flag, C).to(LOW)
        enter = tl.zeros([C, BK], tl.float32)
        for r in tl.static_range(blocks):
            enter += of_block(tl.load(steps + 3 * kind + r * DK + d, mask=d_mask, other=0.0)[None, :], r, C)
        out = tl.dot(x, s.to(LOW), input_precision=PRECISION) * (enter * sign)
        w = tl.load(w_base + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(sums_of_tiles + tile * DK + d, tl.sum(w * out, 0), mask=d_mask)
        y = tl.zeros([C, BK], tl.float32)
        for r in tl.static_range(blocks):
            y = moved_on(y, earlier, steps, kind, d, d_mask, r, DK, C)
            out = tl.dot(of_block(p, r, C).to(LOW), y.to(LOW), out, input_precision=PRECISION)
        flagged = (row < tl.where(flag != 0, n, 0))[:, None] & d_mask[None, :]
        of_flagged = (row < tl.where((flag != 0) & (role == 0), n, 0))[:, None] & d_mask[None, :]
        tl.store(sums + at, w * out + tl.load(sums + at, mask=of_flagged, other=0.0), mask=mask)
        out = out * (tl.load(LATER + key_at + at, mask=mask, other=0.0).to(tl.float32) * factor)
        out += tl.load(out_base + at, mask=flagged, other=0.0).to(tl.float32)
        tl.store(out_base + at, out.to(DQ.dtype.element_ty), mask=mask)
        write = load_tile(KW + key_at, row, H * DK, d, n, DK, LOW)
        s = s * tl.exp2(tl.load(TOTAL + tile * DK + d, mask=d_mask, other=0.0))[None, :]
        s = tl.dot(tl.trans(u), write, s, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_channel_key_walk_kernel(
    Q_LATER, K_LATER, K_EARLIER, QH, KH, EARLIER, STEPS, TOTAL, FLAG, U, DO, DV_, STATE, BORDERS, DK_, WRITE, X,
    FROM_STATE, DG, TABLE,
    B, T, segment_length, segments, all_tiles, stretches, H, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, STRETCH: tl.constexpr,
    PACKED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `delta_key_walk_kernel`, and DG [B, T, H, DK]. STATE are the BORDERS of the states, WRITE has what
    `delta_flagged_gradient_kernel` left in flagged tiles."""
    blocks: tl.constexpr = C // 16
    column_blocks: tl.constexpr = (DK + BK - 1) // BK
    part, b, h, rest = place_of_program(B, H, column_blocks)
    stretch, segment = rest % stretches, rest // stretches
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    start, n = stretch_bounds(first, end, stretch, C, STRETCH)
    if n <= 0:
        return
    c, e = tl.arange(0, C), tl.arange(0, BV)
    d = part * BK + tl.arange(0, BK)
    d_mask = d < DK
    do_base, value_at, key_at = (
        DO + b * do_b + start * do_t + h * do_h,
        ((b * T + start) * H + h) * DV,
        ((b * T + start) * H + h) * DK,
    )
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C) + stretch * STRETCH
    border = ((b * H + h) * segments + segment) * (stretches + 1) + stretch + 1
    state_at, inside = border * (DK * DV) + d[None, :] * DV + e[:, None], d_mask[None, :] & (e < DV)[:, None]
    ds = tl.load(BORDERS + state_at, mask=inside, other=0.0)
    # The gradient of a decay just behind the tile.
    behind = tl.sum(ds * tl.load(STATE + state_at, mask=inside, other=0.0), 0)
    kind = blocks * DK
    of_keys, of_tiles = B.to(tl.int64) * T * H * DK, B.to(tl.int64) * H * all_tiles * DK
    last = (n - 1) // C
    for m in tl.range(0, last + 1, num_stages=STAGES):
        row, tile = (last - m) * C + c, tile_at + last - m
        at, mask = key_at + row[:, None] * (H * DK) + d[None, :], (row < n)[:, None] & d_mask[None, :]
        flag, steps = tl.load(FLAG + tile), STEPS + tile * (KINDS * blocks * DK)
        do = load_tile(do_base, row, do_t, e, n, DV, LOW)
        u = load_tile(U + value_at, row, H * DV, e, n, DV, LOW)
        dv = load_tile(DV_ + value_at, row, H * DV, e, n, DV, LOW)
        leave = tl.zeros([C, BK], tl.float32)
        for r in tl.static_range(blocks):
            leave += of_block(tl.load(steps + 4 * kind + r * DK + d, mask=d_mask, other=0.0)[None, :], r, C)
        write = tl.dot(u, ds.to(LOW), input_precision=PRECISION) * leave
        p = tl.dot(u, tl.trans(do), input_precision=PRECISION)  # [key, query]
        p = in_other_blocks(tl.where(c[:, None] <= c[None, :], p, 0.0), flag, C).to(LOW)
        q = load_tile(Q_LATER + key_at, row, H * DK, d, n, DK, LOW)
        write = seen_from_behind(write, p, q, steps, kind, d, d_mask, DK, C, PRECISION)
        p = tl.dot(u, tl.trans(dv), input_precision=PRECISION)
        p = in_other_blocks(tl.where(c[:, None] < c[None, :], -p, 0.0), flag, C).to(LOW)
        k = load_tile(K_LATER + key_at, row, H * DK, d, n, DK, LOW)
        write = seen_from_behind(write, p, k, steps, kind, d, d_mask, DK, C, PRECISION)
        x = tl.load(X + at, mask=mask, other=0.0) + tl.load(X + at + of_keys, mask=mask, other=0.0)
        x -= tl.load(K_EARLIER + at, mask=mask, other=0.0).to(tl.float32) * write
        tl.store(DG + at, tl.cumsum(x, 0, reverse=True) + behind[None, :], mask=mask)
        total = tl.load(TOTAL + tile * DK + d, mask=d_mask, other=0.0)
        # Where a tile decays to nothing, all that crosses its start ends within it: the sum starts anew.
        from_state = tl.load(FROM_STATE + tile * DK + d, mask=d_mask, other=0.0)
        from_state += tl.load(FROM_STATE + of_tiles + tile * DK + d, mask=d_mask, other=0.0)
        behind = tl.where(total < -FORGOTTEN, from_state, behind + tl.sum(x, 0))
        write = write * tl.load(EARLIER + at, mask=mask, other=0.0).to(tl.float32)
        flagged = (row < tl.where(flag != 0, n, 0))[:, None] & d_mask[None, :]
        write += tl.load(WRITE + at, mask=flagged, other=0.0).to(tl.float32)
        write += tl.load(DK_ + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DK_ + at, write.to(DK_.dtype.element_ty), mask=mask)
        ds = ds * tl.exp2(total)[None, :]
        ds = tl.dot(tl.trans(do), load_tile(QH + key_at, row, H * DK, d, n, DK, LOW), ds, input_precision=PRECISION)
        read = (-load_tile(KH + key_at, row, H * DK, d, n, DK, tl.float32)).to(LOW)
        ds = tl.dot(tl.trans(dv), read, ds, input_precision=PRECISION)
