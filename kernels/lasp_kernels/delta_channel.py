# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The delta rule with a decay per token and channel (KDA), in Triton: what is other than in delta_kernels.py.

What crosses a tile's borders is read and written by Q^ = scale q exp(G), K^ = k exp(G) and K_ = k exp(G_C - G), none
larger than what it was, whatever the decays: `delta_channel_prepare_kernel` leaves these for the walks of
delta_kernels.py, with the decay of each tile, TOTAL [B, H, all_tiles, K] in units of log 2.

Within the tile G_i - G_j stands inside of the sums over channels, as exp(G_i - R) exp(R - G_j): with R from the middle
of a block of 16 tokens, whose decays are at most 8 tokens long, for the pairs of later and earlier token in

    a block and itself         R the middle of the block                      both factors within exp(-+ LIMIT)
    a block and earlier ones   R the middle of the later block                the earlier one's factor <= 1
    (of a key's gradient:      R the middle of the earlier block)

A tile in which half a block decays by more than exp(-LIMIT) in any channel is *flagged* (gates of at least -5 a token
never do that). There R is the border before the later block (behind the earlier one), so that both factors are <= 1,
and a block with itself is worked out token by token, its gradients by `delta_flagged_gradient_kernel`. In units of
log 2 all exponents are sums of log-decays, or of one and half a block.

FLAG [B, H, all_tiles]: 1 where the tile is flagged. Blocks are [C / 16, 16, channels].
"""

import triton
import triton.language as tl

from lasp_kernels.channel import first_tile, load_tile, log2_decays
from lasp_kernels.delta_kernels import VARYING_HERE, load_beta, store_inner, stretch_bounds
from lasp_kernels.state import place_of_program, segment_bounds

LIMIT = tl.constexpr(42.0 * 1.4426950408889634)  # of half a block: exp(2 * 42), a whole one, is a number of bf16
FORGOTTEN = tl.constexpr(16.0 * 1.4426950408889634)  # of a tile, behind which what came before is lost in rounding


@triton.jit
def block_decays(base, row, stride, d, d_mask, n, C: tl.constexpr, BD: tl.constexpr):
    """Of a tile's log-decays, in blocks: from a block's start to each token, inclusive; behind each token to the
    block's end; and of the first half and the whole of each block [C / 16, BD]."""
    blocks: tl.constexpr = C // 16
    at = base + row[:, None] * stride + d[None, :]
    g = tl.reshape(log2_decays(at, (row < n)[:, None] & d_mask[None, :]), [blocks, 16, BD])
    inner = (tl.arange(0, C) % 16 < 15) & (row < n - 1)
    following = tl.reshape(log2_decays(at + stride, inner[:, None] & d_mask[None, :]), [blocks, 16, BD])
    first = (tl.arange(0, 16) < 8)[None, :, None]
    half, whole = tl.sum(tl.where(first, g, 0.0), 1), tl.sum(g, 1)
    return tl.cumsum(g, 1), tl.cumsum(following, 1, reverse=True), half, whole


@triton.jit
def between_blocks(whole, low, high, BLOCKS: tl.constexpr):
    """[BLOCKS, BD]: the decay of the blocks m with low < m < high, either of which may be a number or one a block."""
    m = tl.arange(0, BLOCKS)
    return tl.sum(tl.where(((m[None, :] > low) & (m[None, :] < high))[:, :, None], whole[None, :, :], 0.0), 1)


@triton.jit
def is_strong(half, whole):
    """Whether half a block decays by more than the limit."""
    return tl.min(tl.min(tl.minimum(half, whole - half), 1), 0) < -LIMIT


@triton.jit
def on_diagonal(blocks_16, C: tl.constexpr):
    """[C / 16, 16, 16] as the blocks of a diagonal: [C, C], 0 elsewhere."""
    of_block = (tl.arange(0, C // 16)[None, :] == (tl.arange(0, C) // 16)[:, None])[:, :, None]
    return tl.reshape(tl.where(of_block, tl.reshape(blocks_16, [C, 1, 16]), 0.0), [C, C])


@triton.jit
def from_diagonal(whole, C: tl.constexpr):
    """The inverse of `on_diagonal`."""
    of_block = (tl.arange(0, C // 16)[None, :] == (tl.arange(0, C) // 16)[:, None])[:, :, None]
    return tl.reshape(tl.sum(tl.where(of_block, tl.reshape(whole, [C, C // 16, 16]), 0.0), 1), [C // 16, 16, 16])


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_channel_prepare_kernel(
    Q, K, G, BETA, N, P, FACTORS, QH, KH, KW, TOTAL, FLAG, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """N, P, FACTORS, TOTAL and FLAG of a tile, and QH, KH, KW [B, T, H, D], which are Q^, K^ and K_."""
    blocks: tl.constexpr = C // 16
    _, b, h, rest = place_of_program(B, H, 1)
    tile, segment = rest % tiles, rest // tiles
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n = end - first
    if tile * C >= n:
        return
    start = first.to(tl.int64)
    c, block, i = tl.arange(0, C), tl.arange(0, blocks), tl.arange(0, 16)
    row = tile * C + c
    q_base, k_base = Q + b * q_b + start * q_t + (h // GROUP) * q_h, K + b * k_b + start * k_t + (h // GROUP) * k_h
    g_base = G + b * g_b + start * g_t + h * g_h
    out_at = ((b * T + start) * H + h) * D
    at = first_tile(b, h, H, first, segment, all_tiles, C) + tile
    beta = load_beta(BETA + b * beta_b + (start + row) * beta_t + h * beta_h, row < n)
    tl.store(FACTORS + at * C + c, beta)
    a, p = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    flag = 0
    for channel in range(0, D, BD):
        d = channel + tl.arange(0, BD)
        d_mask = d < D
        within, behind, half, whole = block_decays(g_base, row, g_t, d, d_mask, n, C, BD)
        strong = is_strong(half, whole)
        flag = tl.where(strong, 1, flag)
        q = tl.reshape(load_tile(q_base, row, q_t, d, n, D, tl.float32) * scale, [blocks, 16, BD])
        k = tl.reshape(load_tile(k_base, row, k_t, d, n, D, tl.float32), [blocks, 16, BD])
        before, after = (
            between_blocks(whole, -1, block[:, None], blocks),
            between_blocks(whole, block[:, None], C, blocks),
        )
        enter = tl.exp2(within + before[:, None, :])
        leave = tl.exp2(behind)
        mask = (row < n)[:, None] & d_mask[None, :]
        out = out_at + row[:, None] * (H * D) + d[None, :]
        tl.store(QH + out, tl.reshape(q * enter, [C, BD]).to(QH.dtype.element_ty), mask=mask)
        tl.store(KH + out, tl.reshape(k * enter, [C, BD]).to(KH.dtype.element_ty), mask=mask)
        left = tl.reshape(k * (leave * tl.exp2(after)[:, None, :]), [C, BD])
        tl.store(KW + out, left.to(KW.dtype.element_ty), mask=mask)
        tl.store(TOTAL + at * D + d, tl.sum(whole, 0), mask=d_mask)
        middle = tl.where(strong, 0.0, half)
        to_later = tl.exp2(within - middle[:, None, :])
        q_low, k_low = tl.reshape(q * to_later, [C, BD]).to(LOW), tl.reshape(k * to_later, [C, BD]).to(LOW)
        in_block = tl.where(strong, 0.0, tl.exp2(tl.where(strong, 0.0, middle[:, None, :] - within)))
        for r in tl.static_range(blocks):
            of_r = tl.sum(tl.where((block == r)[:, None], middle, 0.0), 0)
            gap = tl.exp2(between_blocks(whole, block[:, None], r, blocks) + of_r[None, :])
            to_r = tl.where((block < r)[:, None, None], leave * gap[:, None, :], 0.0)
            to_r = tl.where((block == r)[:, None, None], in_block, to_r)
            earlier = tl.trans(tl.reshape(k * to_r, [C, BD]).to(LOW))
            of_rows = (c // 16 == r)[:, None]
            a += tl.where(of_rows, tl.dot(k_low, earlier, input_precision=PRECISION), 0.0)
            p += tl.where(of_rows, tl.dot(q_low, earlier, input_precision=PRECISION), 0.0)
        if strong:
            a_16, p_16 = tl.zeros([blocks, 16, 16], tl.float32), tl.zeros([blocks, 16, 16], tl.float32)
            apart = tl.zeros([blocks, 16, BD], tl.float32)  # the decays behind token j up to i
            for m in range(16):
                j = 15 - m
                token = tile * C + block * 16 + j
                j_mask = (token < n)[:, None] & d_mask[None, :]
                k_j = tl.load(k_base + token[:, None] * k_t + d[None, :], mask=j_mask, other=0.0).to(tl.float32)
                seen = k_j[:, None, :] * tl.exp2(apart)
                here = (i[None, None, :] == j) & (i[None, :, None] >= j)
                a_16 = tl.where(here, tl.sum(k * seen, 2)[:, :, None], a_16)
                p_16 = tl.where(here, tl.sum(q * seen, 2)[:, :, None], p_16)
                g_j = log2_decays(g_base + token[:, None] * g_t + d[None, :], j_mask)
                apart = tl.where((i >= j)[None, :, None], apart + g_j[:, None, :], apart)
            a += on_diagonal(a_16, C)
            p += on_diagonal(p_16, C)
    tl.store(FLAG + at, flag)
    a = tl.where(c[:, None] > c[None, :], a, 0.0)
    p = tl.where(c[:, None] >= c[None, :], p, 0.0)
    store_inner(a, p, beta, N, P, at, C, INVERSE)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_flagged_gradient_kernel(
    Q, K, G, U, DO, DV_, FLAG, DQ, READ, WRITE, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TILES tiles and BK channels: of the flagged ones what pairs of tokens in one block of 16 give to DQ, READ and
    WRITE [B, T, H, DK]; the others are left as they are."""
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
            tl.store(READ + at, tl.reshape(read, [C, BK]).to(READ.dtype.element_ty), mask=mask)
            tl.store(WRITE + at, tl.reshape(write, [C, BK]).to(WRITE.dtype.element_ty), mask=mask)


@triton.jit
def in_other_blocks(x, flag, C: tl.constexpr):
    """Of weights [C, C]: all, or if the tile is flagged those of pairs in different blocks of 16."""
    block = tl.arange(0, C) // 16
    return tl.where((flag != 0) & (block[:, None] == block[None, :]), 0.0, x)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_channel_query_walk_kernel(
    Q, K, G, U, DO, DV_, FLAG, BORDERS, DQ, READ, X, FROM_STATE, TABLE,
    scale, B, T, segment_length, segments, all_tiles, stretches, H,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    STRETCH: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `delta_query_walk_kernel`. X [B, T, H, DK] fp32: q dq + k read; FROM_STATE [B, H, all_tiles, DK]: the sum over
    a tile of what in it comes from the state before. In flagged tiles DQ and READ have what
    `delta_flagged_gradient_kernel` left."""
    blocks: tl.constexpr = C // 16
    column_blocks: tl.constexpr = (DK + BK - 1) // BK
    part, b, h, rest = place_of_program(B, H, column_blocks)
    stretch, segment = rest % stretches, rest // stretches
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    start, n = stretch_bounds(first, end, stretch, C, STRETCH)
    if n <= 0:
        return
    c, e, block = tl.arange(0, C), tl.arange(0, BV), tl.arange(0, blocks)
    d = part * BK + tl.arange(0, BK)
    d_mask = d < DK
    q_base, k_base = Q + b * q_b + start * q_t + (h // GROUP) * q_h, K + b * k_b + start * k_t + (h // GROUP) * k_h
    g_base, do_base = G + b * g_b + start * g_t + h * g_h, DO + b * do_b + start * do_t + h * do_h
    value_at, out_at = ((b * T + start) * H + h) * DV, ((b * T + start) * H + h) * DK
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C) + stretch * STRETCH
    state_at = d[None, :] * DV + e[:, None]
    border = ((b * H + h) * segments + segment) * (stretches + 1) + stretch
    s = tl.load(BORDERS + border * (DK * DV) + state_at, mask=d_mask[None, :] & (e < DV)[:, None], other=0.0)
    for step in tl.range(0, n, C, num_stages=STAGES):
        row = step + c
        at = out_at + row[:, None] * (H * DK) + d[None, :]
        mask = (row < n)[:, None] & d_mask[None, :]
        flag = tl.load(FLAG + tile_at + step // C)
        do = load_tile(do_base, row, do_t, e, n, DV, LOW)
        u = load_tile(U + value_at, row, H * DV, e, n, DV, LOW)
        dv = load_tile(DV_ + value_at, row, H * DV, e, n, DV, LOW)
        k = tl.reshape(load_tile(k_base, row, k_t, d, n, DK, tl.float32), [blocks, 16, BK])
        within, behind, half, whole = block_decays(g_base, row, g_t, d, d_mask, n, C, BK)
        low = s.to(LOW)
        before = between_blocks(whole, -1, block[:, None], blocks)
        enter = tl.reshape(tl.exp2(within + before[:, None, :]), [C, BK])
        dq = tl.dot(do, low, input_precision=PRECISION) * enter * scale
        read = tl.dot(dv, low, input_precision=PRECISION) * -enter
        q_wide, k_wide = load_tile(q_base, row, q_t, d, n, DK, tl.float32), tl.reshape(k, [C, BK])
        from_state = q_wide * dq + k_wide * read
        tl.store(FROM_STATE + (tile_at + step // C) * DK + d, tl.sum(from_state, 0), mask=d_mask)
        dp = tl.dot(do, tl.trans(u), input_precision=PRECISION)
        da = tl.dot(dv, tl.trans(u), input_precision=PRECISION)
        dp = in_other_blocks(tl.where(c[:, None] >= c[None, :], dp * scale, 0.0), flag, C)
        da = in_other_blocks(tl.where(c[:, None] > c[None, :], -da, 0.0), flag, C)
        middle = tl.where(flag != 0, 0.0, half)
        leave = tl.exp2(behind)
        in_block = tl.exp2(tl.where(flag != 0, 0.0, middle[:, None, :] - within))
        dq_inner, read_inner = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for r in tl.static_range(blocks):
            of_r = tl.sum(tl.where((block == r)[:, None], middle, 0.0), 0)
            gap = tl.exp2(between_blocks(whole, block[:, None], r, blocks) + of_r[None, :])
            to_r = tl.where((block < r)[:, None, None], leave * gap[:, None, :], 0.0)
            to_r = tl.where((block == r)[:, None, None], in_block, to_r)
            earlier = tl.reshape(k * to_r, [C, BK]).to(LOW)
            of_rows = (c // 16 == r)[:, None]
            dq_inner = tl.dot(tl.where(of_rows, dp, 0.0).to(LOW), earlier, dq_inner, input_precision=PRECISION)
            read_inner = tl.dot(tl.where(of_rows, da, 0.0).to(LOW), earlier, read_inner, input_precision=PRECISION)
        to_later = tl.reshape(tl.exp2(within - middle[:, None, :]), [C, BK])
        dq += dq_inner * to_later
        read += read_inner * to_later
        if flag != 0:
            dq += tl.load(DQ + at, mask=mask, other=0.0).to(tl.float32)
            read += tl.load(READ + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DQ + at, dq.to(DQ.dtype.element_ty), mask=mask)
        tl.store(READ + at, read.to(READ.dtype.element_ty), mask=mask)
        tl.store(X + at, q_wide * dq + k_wide * read, mask=mask)
        after = between_blocks(whole, block[:, None], C, blocks)
        left = tl.reshape(k * (leave * tl.exp2(after)[:, None, :]), [C, BK]).to(LOW)
        s = s * tl.exp2(tl.sum(whole, 0))[None, :]
        s = tl.dot(tl.trans(u), left, s, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_channel_key_walk_kernel(
    Q, K, G, U, DO, DV_, FLAG, STATE, BORDERS, DK_, WRITE, X, FROM_STATE, DG, TABLE,
    scale, B, T, segment_length, segments, all_tiles, stretches, H,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    STRETCH: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
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
    c, e, block = tl.arange(0, C), tl.arange(0, BV), tl.arange(0, blocks)
    d = part * BK + tl.arange(0, BK)
    d_mask = d < DK
    q_base, k_base = Q + b * q_b + start * q_t + (h // GROUP) * q_h, K + b * k_b + start * k_t + (h // GROUP) * k_h
    g_base, do_base = G + b * g_b + start * g_t + h * g_h, DO + b * do_b + start * do_t + h * do_h
    value_at, out_at = ((b * T + start) * H + h) * DV, ((b * T + start) * H + h) * DK
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C) + stretch * STRETCH
    border = ((b * H + h) * segments + segment) * (stretches + 1) + stretch + 1
    border_at = border * (DK * DV) + d[None, :] * DV + e[:, None]
    inside = d_mask[None, :] & (e < DV)[:, None]
    ds = tl.load(BORDERS + border_at, mask=inside, other=0.0)
    later = tl.sum(
        ds * tl.load(STATE + border_at, mask=inside, other=0.0), 0
    )  # the gradient of a decay behind the tile
    last = (n - 1) // C
    for m in tl.range(0, last + 1, num_stages=STAGES):
        tile = last - m
        row = tile * C + c
        at = out_at + row[:, None] * (H * DK) + d[None, :]
        mask = (row < n)[:, None] & d_mask[None, :]
        flag = tl.load(FLAG + tile_at + tile)
        do = load_tile(do_base, row, do_t, e, n, DV, LOW)
        u = load_tile(U + value_at, row, H * DV, e, n, DV, LOW)
        dv = load_tile(DV_ + value_at, row, H * DV, e, n, DV, LOW)
        q = tl.reshape(load_tile(q_base, row, q_t, d, n, DK, tl.float32) * scale, [blocks, 16, BK])
        k = tl.reshape(load_tile(k_base, row, k_t, d, n, DK, tl.float32), [blocks, 16, BK])
        within, behind, half, whole = block_decays(g_base, row, g_t, d, d_mask, n, C, BK)
        dp = tl.dot(u, tl.trans(do), input_precision=PRECISION)  # [key, query]
        da = tl.dot(u, tl.trans(dv), input_precision=PRECISION)
        dp = in_other_blocks(tl.where(c[:, None] <= c[None, :], dp, 0.0), flag, C)
        da = in_other_blocks(tl.where(c[:, None] < c[None, :], -da, 0.0), flag, C)
        middle = tl.where(flag != 0, whole, half)
        rest_of_block = whole - middle
        enter = tl.exp2(within)
        in_block = tl.exp2(tl.where(flag != 0, 0.0, within - middle[:, None, :]))
        inner = tl.zeros([C, BK], tl.float32)
        for r in tl.static_range(blocks):
            of_r = tl.sum(tl.where((block == r)[:, None], rest_of_block, 0.0), 0)
            gap = tl.exp2(between_blocks(whole, r, block[:, None], blocks) + of_r[None, :])
            from_r = tl.where((block > r)[:, None, None], enter * gap[:, None, :], 0.0)
            from_r = tl.where((block == r)[:, None, None], in_block, from_r)
            of_rows = (c // 16 == r)[:, None]
            x = tl.reshape(q * from_r, [C, BK]).to(LOW)
            inner = tl.dot(tl.where(of_rows, dp, 0.0).to(LOW), x, inner, input_precision=PRECISION)
            x = tl.reshape(k * from_r, [C, BK]).to(LOW)
            inner = tl.dot(tl.where(of_rows, da, 0.0).to(LOW), x, inner, input_precision=PRECISION)
        to_end = tl.exp2(behind)
        to_middle = tl.where(flag != 0, to_end, tl.exp2(tl.where(flag != 0, 0.0, middle[:, None, :] - within)))
        after = between_blocks(whole, block[:, None], C, blocks)
        leave = tl.reshape(to_end * tl.exp2(after)[:, None, :], [C, BK])
        write = tl.dot(u, ds.to(LOW), input_precision=PRECISION) * leave + inner * tl.reshape(to_middle, [C, BK])
        if flag != 0:
            write += tl.load(WRITE + at, mask=mask, other=0.0).to(tl.float32)
        read = tl.load(DK_ + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(DK_ + at, (read + write).to(DK_.dtype.element_ty), mask=mask)
        x = tl.load(X + at, mask=mask, other=0.0) - tl.reshape(k, [C, BK]) * write
        tl.store(DG + at, tl.cumsum(x, 0, reverse=True) + later[None, :], mask=mask)
        total = tl.sum(whole, 0)
        # Where a tile decays to nothing, all that crosses its start ends within it: the sum starts anew.
        from_state = tl.load(FROM_STATE + (tile_at + tile) * DK + d, mask=d_mask, other=0.0)
        later = tl.where(total < -FORGOTTEN, from_state, later + tl.sum(x, 0))
        before = between_blocks(whole, -1, block[:, None], blocks)
        enter = enter * tl.exp2(before)[:, None, :]
        ds = ds * tl.exp2(total)[None, :]
        ds = tl.dot(tl.trans(do), tl.reshape(q * enter, [C, BK]).to(LOW), ds, input_precision=PRECISION)
        ds = tl.dot(tl.trans(dv), tl.reshape(k * -enter, [C, BK]).to(LOW), ds, input_precision=PRECISION)
