# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The delta rule in Triton. What it computes is in delta.py, the products of a tile in delta_steps.py.

What a tile's tokens do to each other needs no state, so `delta_prepare_kernel` works it out for all tiles at once. With
A_ij = k_i exp(G_i - G_j) k_j (j < i) and P_ij = scale q_i exp(G_i - G_j) k_j (j <= i) it leaves P and

    N = A (I + beta A)^-1        strictly lower, so that   (I + beta A)^-1 = I - beta N,   (I + A beta)^-1 = I - N beta

and with it a tile never divides by beta, nor rounds the 1 of a triangle's diagonal:

    R = v - K^ S        E = R - N (beta R)         U = beta E        o = Q^ S + P U        S' = exp(G_C) S + K_^T U
    dU = P^T do + K_ dS'    Y = dU - N^T (beta dU)    dv = beta Y    dS = exp(G_C) dS' + Q^^T do - K^^T dv

These are the walks, a column of V (and of the transition, whose v is 0) independent of the others: a program has some
columns of a segment's state. It holds them transposed, [columns, K]: then every product takes what the one before it
left in registers as its first operand, and the second as it lies in shared memory, so that the chain from tile to tile
waits for no other warp.

With U and dv in memory all that is left is linear attention, and a program may have rows of the state, [V, some of K]:

    dq    = scale (exp(G) do S^T + [do U^T] k)                  a query q with the gradient do of its output
    read  = -(exp(G) dv S^T + [dv U^T] k)                       a query k with the gradient -dv; of earlier keys only
    write = exp(G_C - G) U dS'^T + [do U^T]^T scale q - [dv U^T]^T k          dk = read + write
    dbeta = Y . E        x = q dq + k read - k write gives dg, from the end of a stretch of tokens

    prepare             q, k, g, beta -> N, P and the factors of each token             all tiles at once
    walk, scan          k, v -> what each segment does to a state: what it leaves, and its matrix [K, K]
    walk                q, k, v -> o                                                    from the state before a segment
    reverse walk, scan  q, k, do -> the same of a state's gradient (the matrices are the transposed ones)
    walk                k, v -> U, and S at every border of a stretch
    reverse walk        q, k, do -> dv, dbeta, and dS at these borders
    query walk          do, dv, U, k -> dq, read                                        stretch by stretch
    key walk            U, do, dv, q, k -> dk
    decay               the sums of x -> dg

Segments and slots are those of state.py; a *stretch* is a part of a segment, short enough for the rounding noise in a
sum of x. A segment at token `first` has its tiles from first // C + segment on in what is kept by tile, as in
channel.py: N and P [B, H, all_tiles, C, C], FACTORS [1 or 5, B, H, all_tiles, C] (see `factors_at`). BORDERS
[B, H, segments, stretches + 1, K, V]: the state (its gradient) at both ends of every stretch.

H are the heads of v; GROUP of them share a head of q and k.
"""

import triton
import triton.language as tl

from lasp_kernels.channel import first_tile, load_tile
from lasp_kernels.state import LOG2E, VARYING, bounded, differences, place_of_program, segment_bounds

# A token that writes nothing writes next to nothing instead: what it would write, E = U / beta, is found from that.
LEAST_BETA = tl.constexpr(1e-12)
VARYING_HERE = [*VARYING, "all_tiles", "stretches", "beta_b", "units"]


@triton.jit
def on_diagonal(rows_16, C: tl.constexpr):
    """[C, 16] as the blocks of a diagonal: [C, C], 0 elsewhere."""
    here = (tl.arange(0, C // 16)[None, :] == (tl.arange(0, C) // 16)[:, None])[:, :, None]
    return tl.reshape(tl.where(here, tl.reshape(rows_16, [C, 1, 16]), 0.0), [C, C])


@triton.jit
def from_diagonal(whole, C: tl.constexpr):
    """The inverse, as [C / 16, 16, 16]."""
    here = (tl.arange(0, C // 16)[None, :] == (tl.arange(0, C) // 16)[:, None])[:, :, None]
    return tl.reshape(tl.sum(tl.where(here, tl.reshape(whole, [C, C // 16, 16]), 0.0), 1), [C // 16, 16, 16])


@triton.jit
def corners(rows, columns, SIZE: tl.constexpr):
    """What lies below the diagonal between the two halves of a pair of blocks of SIZE."""
    same = (rows // (2 * SIZE)) == (columns // (2 * SIZE))
    return same & ((rows // SIZE) > (columns // SIZE))


@triton.jit
def joined(m, a, here, PRECISION: tl.constexpr):
    """M of blocks, two of which in a row become one: see `solved`. `here` are the corners."""
    corner = tl.where(here, a, 0.0)
    corner -= tl.dot(corner, m, input_precision=PRECISION)
    return m + corner - tl.dot(m, corner, input_precision=PRECISION)


@triton.jit
def solved(a, C: tl.constexpr, PRECISION: tl.constexpr):
    """M = I - (I + a)^-1 of a strictly lower a [C, C]: by blocks, pairs of which become blocks twice as large.

    With M of two blocks in a row known, the corner below is (I - M_2) a_21 (I - M_1): products alone, each as
    well-conditioned as a forward substitution, and the 1 of a diagonal is added without rounding. In a pair of single
    tokens it is a_21 itself. Up to 16 tokens all blocks of 16 are worked on at once.
    """
    i, j = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    small = from_diagonal(a, C)
    m = tl.where(corners(i, j, 1), small, 0.0)
    m = joined(m, small, corners(i, j, 2), PRECISION)
    m = joined(m, small, corners(i, j, 4), PRECISION)
    m = joined(m, small, corners(i, j, 8), PRECISION)
    m = on_diagonal(tl.reshape(m, [C, 16]), C)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if C >= 32:
        m = joined(m, a, corners(i, j, 16), PRECISION)
    if C >= 64:
        m = joined(m, a, corners(i, j, 32), PRECISION)
    return tl.where(i > j, m, 0.0)


@triton.jit
def store_inner(a, p, beta, M, P, at, C: tl.constexpr, PRECISION: tl.constexpr):
    """M and P of the tile at `at`, from a and p without beta."""
    c = tl.arange(0, C)
    tile = at * (C * C) + c[:, None] * C + c[None, :]
    tl.store(P + tile, (p * beta[None, :]).to(P.dtype.element_ty))
    tl.store(M + tile, solved(a * beta[None, :], C, PRECISION).to(M.dtype.element_ty))


@triton.jit
def load_beta(pointers, mask):
    """Of tokens that are not there 0."""
    beta = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask & (tl.abs(beta) < LEAST_BETA), LEAST_BETA, beta)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_prepare_kernel(
    Q, K, G, BETA, M, P, FACTORS, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H,
    q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, beta_b, beta_t, beta_h,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
    SPLIT_SUMS: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """M, P and FACTORS of a tile; no decay (G None), or one per token."""
    _, b, h, rest = place_of_program(B, H, 1)
    tile, segment = rest % tiles, rest // tiles
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n = end - first
    if tile * C >= n:
        return
    start = first.to(tl.int64)
    c, d = tl.arange(0, C), tl.arange(0, BD)
    row = tile * C + c
    q = load_tile(Q + b * q_b + start * q_t + (h // GROUP) * q_h, row, q_t, d, n, D, LOW)
    k = load_tile(K + b * k_b + start * k_t + (h // GROUP) * k_h, row, k_t, d, n, D, LOW)
    beta = load_beta(BETA + b * beta_b + (start + row) * beta_t + h * beta_h, row < n)
    at = first_tile(b, h, H, first, segment, all_tiles, C) + tile
    tl.store(FACTORS + at * C + c, beta)
    past = c[:, None] >= c[None, :]
    a = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    p = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if G is not None:
        # In fp64, whose differences have all the digits of weak decays behind strong ones.
        g = bounded(tl.load(G + b * g_b + (start + row) * g_t + h * g_h, mask=row < n, other=0.0))
        g = g.to(tl.float64) * LOG2E
        sums, total = tl.cumsum(g, 0), tl.sum(g, 0)
        apart = tl.exp2(tl.where(past, sums[:, None] - sums[None, :], -float("inf")).to(tl.float32))
        a, p = a * apart, p * apart
        plane = B.to(tl.int64) * H * all_tiles * C
        leave = tl.exp2((total - sums).to(tl.float32))
        tl.store(FACTORS + plane + at * C + c, tl.exp2(sums.to(tl.float32)))
        tl.store(FACTORS + 2 * plane + at * C + c, leave)
        tl.store(FACTORS + 3 * plane + at * C + c, leave * beta)
        if SPLIT_SUMS:
            whole = tl.floor(sums + 0.5)
            tl.store(FACTORS + 5 * plane + at * C + c, (sums - whole).to(tl.float32))
            sums = whole
        tl.store(FACTORS + 4 * plane + at * C + c, sums.to(tl.float32))
    a = tl.where(c[:, None] > c[None, :], a, 0.0)
    p = tl.where(past, p, 0.0)
    store_inner(a, p, beta, M, P, at, C, INVERSE)


@triton.jit
def decays_between(factors, plane, C: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT_SUMS: tl.constexpr):
    """[query, key] (TRANSPOSED: [key, query]): exp(G_query - G_key) of a tile, 0 for later keys; see
    `state.tile_decays`."""
    c = tl.arange(0, C)
    sums = tl.load(factors + 4 * plane + c)
    difference = differences(sums, TRANSPOSED)
    if SPLIT_SUMS:
        difference += differences(tl.load(factors + 5 * plane + c), TRANSPOSED)
    past = c[:, None] <= c[None, :] if TRANSPOSED else c[:, None] >= c[None, :]
    return tl.exp2(tl.where(past, difference, -float("inf")))


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_walk_kernel(
    Q, K, WRITE, V, M, P, FACTORS, TOTAL, STATE, OUT, U, BORDERS, OF_TILES, LOCAL, TRANSITION, TABLE,
    scale, B, T, segment_length, segments, slots, all_tiles, stretches, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    STRETCH: tl.constexpr, DECAY: tl.constexpr, CHANNEL: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BV columns of a segment, from the first tile on. Of the results only those that are given:

    OUT [B, T, H, DV] (the only one that needs Q and P), U [B, T, H, DV], BORDERS (of stretches of STRETCH tiles) or
    OF_TILES [B, H, all_tiles, DV, DK], the state before each tile; and LOCAL [B, H, segments, DK, DV], TRANSITION
    [B, H, segments, DK, DK]: then from zero, and from the identity.
    CHANNEL: Q, K and WRITE are Q^, K^ and K_, TOTAL [B, H, all_tiles, DK] the decays of the tiles in units of log 2.
    """
    blocks_v: tl.constexpr = (DV + BV - 1) // BV
    blocks: tl.constexpr = blocks_v + ((DK + BV - 1) // BV if TRANSITION is not None else 0)
    block, b, h, segment = place_of_program(B, H, blocks)
    first, end, slot = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start, hk = end - first, first.to(tl.int64), h // GROUP
    c, d = tl.arange(0, C), tl.arange(0, BK)
    e = block * BV + tl.arange(0, BV)  # of v beyond DV, whose zeros are loaded, columns of the transition
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C)
    k_base, v_base = K + b * k_b + start * k_t + hk * k_h, V + b * v_b + start * v_t + h * v_h
    q_base, out_at = Q + b * q_b + start * q_t + hk * q_h, ((b * T + start) * H + h) * DV
    if CHANNEL:
        k_at = ((b * T + start) * H + h) * DK
        k_base, q_base, write_base = K + k_at, Q + k_at, WRITE + k_at
    if TMA:
        k_tiles = tl.make_tensor_descriptor(k_base, [n, DK], [k_t, 1], [C, BK])
        v_tiles = tl.make_tensor_descriptor(v_base, [n, DV], [v_t, 1], [C, BV])
        m_tiles = tl.make_tensor_descriptor(M + tile_at * (C * C), [n + C, C], [C, 1], [C, C])
        if CHANNEL:
            write_tiles = tl.make_tensor_descriptor(write_base, [n, DK], [k_t, 1], [C, BK])
        if OUT is not None:
            q_tiles = tl.make_tensor_descriptor(q_base, [n, DK], [q_t, 1], [C, BK])
            p_tiles = tl.make_tensor_descriptor(P + tile_at * (C * C), [n + C, C], [C, 1], [C, C])
            out_tiles = tl.make_tensor_descriptor(OUT + out_at, [n, DV], [H * DV, 1], [C, BV])
        if U is not None:
            u_tiles = tl.make_tensor_descriptor(U + out_at, [n, DV], [H * DV, 1], [C, BV])
    plane = B.to(tl.int64) * H * all_tiles * C
    factors, inner = FACTORS + tile_at * C, tile_at * (C * C) + c[:, None] * C + c[None, :]
    WEIGHT: tl.constexpr = 3 if DECAY else 0  # of what a token writes: beta, and what of it is left at the tile's end
    state_at = d[None, :] * DV + e[:, None]
    inside = (d < DK)[None, :] & (e < DV)[:, None]
    if LOCAL is None:
        s = tl.load(STATE + ((b * H + h) * slots + slot) * (DK * DV) + state_at, mask=inside, other=0.0)
    else:
        s = tl.where((e - blocks_v * BV)[:, None] == d[None, :], 1.0, tl.zeros([BV, BK], tl.float32))
    borders_at = ((b * H + h) * segments + segment) * (stretches + 1) * (DK * DV) + state_at
    for i in tl.range(0, n, C, num_stages=STAGES):
        tile = i // C
        row = i + c
        if BORDERS is not None:
            at = borders_at + (tile // STRETCH).to(tl.int64) * (DK * DV)
            tl.store(BORDERS + at, s, mask=inside & (d < tl.where(tile % STRETCH == 0, DK, 0))[None, :])
        if OF_TILES is not None:
            at = (tile_at + tile) * (DK * DV) + e[:, None] * DK + d[None, :]
            tl.store(OF_TILES + at, s.to(OF_TILES.dtype.element_ty), mask=inside)
        if TMA:
            k = k_tiles.load([i, 0]).to(LOW)
            v = v_tiles.load([i, block * BV])
            inner_m = m_tiles.load([i, 0]).to(LOW)
        else:
            k = load_tile(k_base, row, k_t, d, n, DK, LOW)
            v = load_tile(v_base, row, v_t, e, n, DV, V.dtype.element_ty)
            inner_m = tl.load(M + inner + i * C).to(LOW)
        low = s.to(LOW)
        read = tl.dot(low, tl.trans(k), input_precision=PRECISION)
        if DECAY:
            enter = tl.load(factors + plane + i + c)
            read = read * enter[None, :]
        error = tl.trans(v).to(tl.float32) - read
        error -= tl.dot(error.to(LOW), tl.trans(inner_m), input_precision=PRECISION)
        if OUT is not None:
            if TMA:
                q = q_tiles.load([i, 0]).to(LOW)
                inner_p = p_tiles.load([i, 0]).to(LOW)
            else:
                q = load_tile(q_base, row, q_t, d, n, DK, LOW)
                inner_p = tl.load(P + inner + i * C).to(LOW)
            out = tl.dot(low, tl.trans(q), input_precision=PRECISION)
            if not CHANNEL:
                out = out * (enter * scale)[None, :] if DECAY else out * scale
            out = tl.dot(error.to(LOW), tl.trans(inner_p), out, input_precision=PRECISION)
            if TMA:
                out_tiles.store([i, block * BV], tl.trans(out).to(OUT.dtype.element_ty))
            else:
                at = out_at + row[None, :] * (H * DV) + e[:, None]
                tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=(row < n)[None, :] & (e < DV)[:, None])
        if U is not None:
            u = error * tl.load(factors + i + c)[None, :]
            if TMA:
                u_tiles.store([i, block * BV], tl.trans(u).to(U.dtype.element_ty))
            else:
                at = out_at + row[None, :] * (H * DV) + e[:, None]
                tl.store(U + at, u.to(U.dtype.element_ty), mask=(row < n)[None, :] & (e < DV)[:, None])
        if CHANNEL:
            k = write_tiles.load([i, 0]).to(LOW) if TMA else load_tile(write_base, row, k_t, d, n, DK, LOW)
            s = s * tl.exp2(tl.load(TOTAL + (tile_at + tile) * DK + d, mask=d < DK, other=0.0))[None, :]
        elif DECAY:
            s = s * tl.load(factors + plane + i + C - 1)
        error = error * tl.load(factors + WEIGHT * plane + i + c)[None, :]
        s = tl.dot(error.to(LOW), k, s, input_precision=PRECISION)
    if BORDERS is not None:
        at = borders_at + tl.cdiv(n, C * STRETCH).to(tl.int64) * (DK * DV)
        tl.store(BORDERS + at, s, mask=inside)
    if LOCAL is not None:
        at = (b * H + h) * segments + segment
        tl.store(LOCAL + at * (DK * DV) + state_at, s, mask=inside)
        if TRANSITION is not None:
            f = e - blocks_v * BV
            mask = (d < DK)[None, :] & ((f >= 0) & (f < DK))[:, None]
            tl.store(TRANSITION + at * (DK * DK) + d[None, :] * DK + f[:, None], s, mask=mask)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_reverse_walk_kernel(
    Q, K, WRITE, DO, U, M, P, FACTORS, TOTAL, STATE, DV_, D_BETA, BORDERS, OF_TILES, LOCAL, TABLE,
    scale, B, T, segment_length, segments, slots, all_tiles, stretches, H,
    q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    STRETCH: tl.constexpr, DECAY: tl.constexpr, CHANNEL: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BV columns of a segment's gradients, from the last tile on; of the results only those that are given:

    LOCAL [B, H, segments, DK, DV], the gradient of the state before the segment, from zero behind it. Or, from STATE:
    DV_ [B, T, H, DV], D_BETA [blocks, B, H, T] (in parts; needs U), and the BORDERS of stretches or OF_TILES
    [B, H, all_tiles, DV, DK], the gradient of the state behind each tile.
    """
    blocks: tl.constexpr = (DV + BV - 1) // BV
    block, b, h, segment = place_of_program(B, H, blocks)
    first, end, slot = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start, hk = end - first, first.to(tl.int64), h // GROUP
    c, d = tl.arange(0, C), tl.arange(0, BK)
    e = block * BV + tl.arange(0, BV)
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C)
    k_base, do_base = K + b * k_b + start * k_t + hk * k_h, DO + b * do_b + start * do_t + h * do_h
    q_base, out_at = Q + b * q_b + start * q_t + hk * q_h, ((b * T + start) * H + h) * DV
    if CHANNEL:
        k_at = ((b * T + start) * H + h) * DK
        k_base, q_base, write_base = K + k_at, Q + k_at, WRITE + k_at
    if TMA:
        q_tiles = tl.make_tensor_descriptor(q_base, [n, DK], [q_t, 1], [C, BK])
        k_tiles = tl.make_tensor_descriptor(k_base, [n, DK], [k_t, 1], [C, BK])
        do_tiles = tl.make_tensor_descriptor(do_base, [n, DV], [do_t, 1], [C, BV])
        m_tiles = tl.make_tensor_descriptor(M + tile_at * (C * C), [n + C, C], [C, 1], [C, C])
        p_tiles = tl.make_tensor_descriptor(P + tile_at * (C * C), [n + C, C], [C, 1], [C, C])
        if CHANNEL:
            write_tiles = tl.make_tensor_descriptor(write_base, [n, DK], [k_t, 1], [C, BK])
        if DV_ is not None:
            dv_tiles = tl.make_tensor_descriptor(DV_ + out_at, [n, DV], [H * DV, 1], [C, BV])
            u_tiles = tl.make_tensor_descriptor(U + out_at, [n, DV], [H * DV, 1], [C, BV])
    plane = B.to(tl.int64) * H * all_tiles * C
    factors, inner = FACTORS + tile_at * C, tile_at * (C * C) + c[:, None] * C + c[None, :]
    WEIGHT: tl.constexpr = 3 if DECAY else 0  # of what a token writes: beta, and what of it is left at the tile's end
    state_at = d[None, :] * DV + e[:, None]
    inside = (d < DK)[None, :] & (e < DV)[:, None]
    ds = tl.zeros([BV, BK], tl.float32)
    if LOCAL is None:
        ds = tl.load(STATE + ((b * H + h) * slots + slot + 1) * (DK * DV) + state_at, mask=inside, other=0.0)
    borders_at = ((b * H + h) * segments + segment) * (stretches + 1) * (DK * DV) + state_at
    last = (n - 1) // C
    for m in tl.range(0, last + 1, num_stages=STAGES):
        tile = last - m
        i = tile * C
        row = i + c
        if BORDERS is not None:  # behind the last tile of a stretch
            ends = (tile == last) | (tile % STRETCH == STRETCH - 1)
            at = borders_at + (tile // STRETCH + 1).to(tl.int64) * (DK * DV)
            tl.store(BORDERS + at, ds, mask=inside & (d < tl.where(ends, DK, 0))[None, :])
        if OF_TILES is not None:
            at = (tile_at + tile) * (DK * DV) + e[:, None] * DK + d[None, :]
            tl.store(OF_TILES + at, ds.to(OF_TILES.dtype.element_ty), mask=inside)
        if TMA:
            q = q_tiles.load([i, 0]).to(LOW)
            k = k_tiles.load([i, 0]).to(LOW)
            do = do_tiles.load([i, block * BV]).to(LOW)
            inner_m = m_tiles.load([i, 0]).to(LOW)
            inner_p = p_tiles.load([i, 0]).to(LOW)
        else:
            q = load_tile(q_base, row, q_t, d, n, DK, LOW)
            k = load_tile(k_base, row, k_t, d, n, DK, LOW)
            do = load_tile(do_base, row, do_t, e, n, DV, LOW)
            inner_m = tl.load(M + inner + i * C).to(LOW)
            inner_p = tl.load(P + inner + i * C).to(LOW)
        do = tl.trans(do)
        write = k
        if CHANNEL:
            write = write_tiles.load([i, 0]).to(LOW) if TMA else load_tile(write_base, row, k_t, d, n, DK, LOW)
        dv = tl.dot(ds.to(LOW), tl.trans(write), input_precision=PRECISION)
        dv = dv * tl.load(factors + WEIGHT * plane + i + c)[None, :]
        dv = tl.dot(do, inner_p, dv, input_precision=PRECISION)
        dv -= tl.dot(dv.to(LOW), inner_m, input_precision=PRECISION)
        if DV_ is not None:
            mask = (row < n)[None, :] & (e < DV)[:, None]
            at = out_at + row[None, :] * (H * DV) + e[:, None]
            if TMA:
                dv_tiles.store([i, block * BV], tl.trans(dv).to(DV_.dtype.element_ty))
                u = tl.trans(u_tiles.load([i, block * BV])).to(tl.float32)
            else:
                tl.store(DV_ + at, dv.to(DV_.dtype.element_ty), mask=mask)
                u = tl.load(U + at, mask=mask, other=0.0).to(tl.float32)
            beta = tl.load(factors + i + c)
            d_beta = tl.sum(dv * u, 0) / tl.where(row < n, beta * beta, 1.0)
            tl.store(D_BETA + ((block * B + b) * H + h) * T + start + row, d_beta, mask=row < n)
        if CHANNEL:
            ds = ds * tl.exp2(tl.load(TOTAL + (tile_at + tile) * DK + d, mask=d < DK, other=0.0))[None, :]
            ds = tl.dot(do, q, ds, input_precision=PRECISION)
            ds = tl.dot((-dv).to(LOW), k, ds, input_precision=PRECISION)
        elif DECAY:
            ds = ds * tl.load(factors + plane + i + C - 1)
            enter = tl.load(factors + plane + i + c)
            ds = tl.dot((do.to(tl.float32) * (enter * scale)[None, :]).to(LOW), q, ds, input_precision=PRECISION)
            ds = tl.dot((dv * -enter[None, :]).to(LOW), k, ds, input_precision=PRECISION)
        else:
            ds = tl.dot((do.to(tl.float32) * scale).to(LOW), q, ds, input_precision=PRECISION)
            ds = tl.dot((-dv).to(LOW), k, ds, input_precision=PRECISION)
    if LOCAL is not None:
        tl.store(LOCAL + ((b * H + h) * segments + segment) * (DK * DV) + state_at, ds, mask=inside)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_scan_kernel(
    ENTERING, LOCAL, TRANSITION, STATE, END, END_TRANSITION, RUNS,
    segments, slots, H,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Pass the columns of a state through the segments of one run, S <- transition @ S + local (TRANSPOSED: by the
    transposed matrices; REVERSE: from the last segment on). ENTERING [N, H, DK, DV] -> END; STATE keeps each border.

    With END_TRANSITION [N, H, DK, DK] also the product of the matrices, as more columns. One order of sums, whatever
    else is computed beside it: so ranks that fold such maps one after another come to the bits of one.
    """
    blocks_v: tl.constexpr = (DV + BV - 1) // BV
    row, h = tl.program_id(0) // H, tl.program_id(0) % H
    run, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BK)
    e = block * BV + tl.arange(0, BV)
    f = e - blocks_v * BV  # columns of the matrices
    low, high, head = 0, segments, run
    base = head * slots
    if PACKED:
        low, high, head = tl.load(RUNS + row), tl.load(RUNS + row + 1), h.to(tl.int64)
        base = head * slots + row
    at = d[:, None] * DV + e[None, :]
    inside = (d < DK)[:, None] & (e < DV)[None, :]
    s = tl.where(d[:, None] == f[None, :], 1.0, tl.zeros([BK, BV], tl.float32))
    if ENTERING is not None:
        s += tl.load(ENTERING + run * (DK * DV) + at, mask=inside, other=0.0)
    width: tl.constexpr = BK // PARTS
    passed = tl.zeros([BK, BV], tl.float32)
    # One loop over parts of the matrices, so that their loads run ahead of the chain of products.
    for i in tl.range(0, (high - low) * PARTS, num_stages=STAGES):
        segment = high - 1 - i // PARTS if REVERSE else low + i // PARTS
        part = i % PARTS
        if STATE is not None:
            border = segment + 1 if REVERSE else segment
            mask = inside & (d < tl.where(part == 0, DK, 0))[:, None]
            tl.store(STATE + (base + border) * (DK * DV) + at, s, mask=mask)
        of_segment = head * segments + segment
        j = part * width + tl.arange(0, width)
        matrix_at = d[:, None] + j[None, :] * DK if TRANSPOSED else d[:, None] * DK + j[None, :]
        mask = (d < DK)[:, None] & (j < DK)[None, :]
        matrix = tl.load(TRANSITION + of_segment * (DK * DK) + matrix_at, mask=mask, other=0.0)
        if PARTS == 1:
            rows = s
        else:
            rows = tl.reshape(s, [PARTS, width, BV])
            rows = tl.sum(tl.where((tl.arange(0, PARTS) == part)[:, None, None], rows, 0.0), 0)
        passed = tl.dot(matrix, rows, passed, input_precision=PRECISION)
        mask = inside & (d < tl.where(part == PARTS - 1, DK, 0))[:, None]
        local = tl.load(LOCAL + of_segment * (DK * DV) + at, mask=mask, other=0.0)
        s = tl.where(part == PARTS - 1, passed + local, s)
        passed = tl.where(part == PARTS - 1, 0.0, passed)
    if STATE is not None:
        border = low if REVERSE else high
        tl.store(STATE + (base + border) * (DK * DV) + at, s, mask=inside)
    if END is not None:
        tl.store(END + run * (DK * DV) + at, s, mask=inside)
    if END_TRANSITION is not None:
        mask = (d < DK)[:, None] & ((f >= 0) & (f < DK))[None, :]
        tl.store(END_TRANSITION + run * (DK * DK) + d[:, None] * DK + f[None, :], s, mask=mask)


@triton.jit
def stretch_bounds(first, end, stretch, C: tl.constexpr, STRETCH: tl.constexpr):
    """First token of a segment's stretch, and how many it has: none or less where there is no such stretch."""
    start = first + stretch * (C * STRETCH)
    return start.to(tl.int64), tl.minimum(end - start, C * STRETCH)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_query_walk_kernel(
    Q, K, U, DO, DV_, FACTORS, BORDERS, DQ, READ, ROWS, TABLE,
    scale, B, T, segment_length, segments, all_tiles, stretches, H,
    q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    STRETCH: tl.constexpr, DECAY: tl.constexpr, SPLIT_SUMS: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DQ or READ [B, T, H, DK] of a stretch, BK columns; neighbouring programs, which read the same tiles, have the
    two. With DECAY also ROWS [2, 2 * blocks, B, H, T]: the sums over the columns of q dq or k read, and of what in it
    comes from the state before the tile."""
    blocks: tl.constexpr = (DK + BK - 1) // BK
    part, b, h, rest = place_of_program(B, H, 2 * blocks)
    role, block = part % 2, part // 2
    stretch, segment = rest % stretches, rest // stretches
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    start, n = stretch_bounds(first, end, stretch, C, STRETCH)
    if n <= 0:
        return
    hk = h // GROUP
    c, e = tl.arange(0, C), tl.arange(0, BV)
    d = block * BK + tl.arange(0, BK)
    value_at, out_at = ((b * T + start) * H + h) * DV, ((b * T + start) * H + h) * DK
    k_base = K + b * k_b + start * k_t + hk * k_h
    # A query q whose output has the gradient do; or a query k, whose output, of earlier keys, is subtracted from v.
    x_base, x_t, factor = DO + b * do_b + start * do_t + h * do_h, do_t, tl.where(role == 1, -1.0, scale)
    w_base, w_t, out_base = Q + b * q_b + start * q_t + hk * q_h, q_t, DQ + out_at
    if role == 1:
        x_base, x_t = DV_ + value_at, H * DV
        w_base, w_t, out_base = k_base, k_t, READ + out_at
    if TMA:
        k_tiles = tl.make_tensor_descriptor(k_base, [n, DK], [k_t, 1], [C, BK])
        x_tiles = tl.make_tensor_descriptor(x_base, [n, DV], [x_t, 1], [C, BV])
        u_tiles = tl.make_tensor_descriptor(U + value_at, [n, DV], [H * DV, 1], [C, BV])
        out_tiles = tl.make_tensor_descriptor(out_base, [n, DK], [H * DK, 1], [C, BK])
        if DECAY:
            w_tiles = tl.make_tensor_descriptor(w_base, [n, DK], [w_t, 1], [C, BK])
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C) + stretch * STRETCH
    plane = B.to(tl.int64) * H * all_tiles * C
    factors = FACTORS + tile_at * C
    state_at = d[None, :] * DV + e[:, None]
    inside = (d < DK)[None, :] & (e < DV)[:, None]
    border = ((b * H + h) * segments + segment) * (stretches + 1) + stretch
    s = tl.load(BORDERS + border * (DK * DV) + state_at, mask=inside, other=0.0)  # [V, some of K]
    seen = c[:, None] >= c[None, :] + role
    for i in tl.range(0, n, C, num_stages=STAGES):
        row = i + c
        if TMA:
            k = k_tiles.load([i, block * BK]).to(LOW)
            x = x_tiles.load([i, 0]).to(LOW)
            u = u_tiles.load([i, 0]).to(LOW)
        else:
            k = load_tile(k_base, row, k_t, d, n, DK, LOW)
            x = load_tile(x_base, row, x_t, e, n, DV, LOW)
            u = load_tile(U + value_at, row, H * DV, e, n, DV, LOW)
        out = tl.dot(x, s.to(LOW), input_precision=PRECISION)
        if DECAY:
            out = out * tl.load(factors + plane + i + c)[:, None]
            w = w_tiles.load([i, block * BK]) if TMA else load_tile(w_base, row, w_t, d, n, DK, LOW)
            rows_at = ROWS + ((part * B + b) * H + h) * T + start + row
            from_state = tl.sum(w.to(tl.float32) * out, 1) * factor
            tl.store(rows_at + 2 * blocks * B.to(tl.int64) * H * T, from_state, mask=row < n)
        p = tl.dot(x, tl.trans(u), input_precision=PRECISION)
        if DECAY:
            p = p * decays_between(factors + i, plane, C, False, SPLIT_SUMS)
        p = tl.where(seen, p, 0.0)
        out = tl.dot(p.to(LOW), k, out, input_precision=PRECISION) * factor
        if TMA:
            out_tiles.store([i, block * BK], out.to(DQ.dtype.element_ty))
        else:
            mask, at = (row < n)[:, None] & (d < DK)[None, :], row[:, None] * (H * DK) + d[None, :]
            tl.store(out_base + at, out.to(DQ.dtype.element_ty), mask=mask)
        if DECAY:
            tl.store(rows_at, tl.sum(w.to(tl.float32) * out, 1), mask=row < n)
            s = s * tl.load(factors + plane + i + C - 1)
            k = (k.to(tl.float32) * tl.load(factors + 2 * plane + i + c)[:, None]).to(LOW)
        s = tl.dot(tl.trans(u), k, s, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_key_walk_kernel(
    Q, K, U, DO, DV_, FACTORS, BORDERS, DK_, ROWS, TABLE,
    scale, B, T, segment_length, segments, all_tiles, stretches, H,
    q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr,
    STRETCH: tl.constexpr, DECAY: tl.constexpr, SPLIT_SUMS: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """DK_ [B, T, H, DK] of a stretch, from its end, BK columns: `read` lies there, and `write` is added. With DECAY
    also ROWS [blocks, B, H, T]: the sums over the columns of k write."""
    blocks: tl.constexpr = (DK + BK - 1) // BK
    block, b, h, rest = place_of_program(B, H, blocks)
    stretch, segment = rest % stretches, rest // stretches
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    start, n = stretch_bounds(first, end, stretch, C, STRETCH)
    if n <= 0:
        return
    hk = h // GROUP
    c, e = tl.arange(0, C), tl.arange(0, BV)
    d = block * BK + tl.arange(0, BK)
    q_base, k_base = Q + b * q_b + start * q_t + hk * q_h, K + b * k_b + start * k_t + hk * k_h
    do_base, value_at = DO + b * do_b + start * do_t + h * do_h, ((b * T + start) * H + h) * DV
    out_at = ((b * T + start) * H + h) * DK
    if TMA:
        q_tiles = tl.make_tensor_descriptor(q_base, [n, DK], [q_t, 1], [C, BK])
        k_tiles = tl.make_tensor_descriptor(k_base, [n, DK], [k_t, 1], [C, BK])
        do_tiles = tl.make_tensor_descriptor(do_base, [n, DV], [do_t, 1], [C, BV])
        u_tiles = tl.make_tensor_descriptor(U + value_at, [n, DV], [H * DV, 1], [C, BV])
        dv_tiles = tl.make_tensor_descriptor(DV_ + value_at, [n, DV], [H * DV, 1], [C, BV])
        dk_tiles = tl.make_tensor_descriptor(DK_ + out_at, [n, DK], [H * DK, 1], [C, BK])
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C) + stretch * STRETCH
    plane = B.to(tl.int64) * H * all_tiles * C
    factors = FACTORS + tile_at * C
    state_at = d[None, :] * DV + e[:, None]
    inside = (d < DK)[None, :] & (e < DV)[:, None]
    border = ((b * H + h) * segments + segment) * (stretches + 1) + stretch + 1
    ds = tl.load(BORDERS + border * (DK * DV) + state_at, mask=inside, other=0.0)
    later, behind = c[:, None] <= c[None, :], c[:, None] < c[None, :]  # [key, query]
    last = (n - 1) // C
    for m in tl.range(0, last + 1, num_stages=STAGES):
        i = (last - m) * C
        row = i + c
        mask = (row < n)[:, None] & (d < DK)[None, :]
        at = out_at + row[:, None] * (H * DK) + d[None, :]
        if TMA:
            q = q_tiles.load([i, block * BK]).to(LOW)
            k = k_tiles.load([i, block * BK]).to(LOW)
            do = do_tiles.load([i, 0]).to(LOW)
            u = u_tiles.load([i, 0]).to(LOW)
            dv = dv_tiles.load([i, 0]).to(LOW)
            read = dk_tiles.load([i, block * BK]).to(tl.float32)
        else:
            q = load_tile(q_base, row, q_t, d, n, DK, LOW)
            k = load_tile(k_base, row, k_t, d, n, DK, LOW)
            do = load_tile(do_base, row, do_t, e, n, DV, LOW)
            u = load_tile(U + value_at, row, H * DV, e, n, DV, LOW)
            dv = load_tile(DV_ + value_at, row, H * DV, e, n, DV, LOW)
            read = tl.load(DK_ + at, mask=mask, other=0.0).to(tl.float32)
        # Rounded as in the query walk, so that in the sum of x what a pair of tokens gives to both cancels.
        dp = tl.dot(u, tl.trans(do), input_precision=PRECISION)
        dp = dp * decays_between(factors + i, plane, C, True, SPLIT_SUMS) if DECAY else tl.where(later, dp, 0.0)
        inner = tl.dot(dp.to(LOW), q, input_precision=PRECISION) * scale
        da = tl.dot(u, tl.trans(dv), input_precision=PRECISION)
        if DECAY:
            da = da * decays_between(factors + i, plane, C, True, SPLIT_SUMS)
        da = tl.where(behind, -da, 0.0)
        inner = tl.dot(da.to(LOW), k, inner, input_precision=PRECISION)
        write = tl.dot(u, ds.to(LOW), input_precision=PRECISION)
        if DECAY:
            enter, leave = tl.load(factors + plane + i + c), tl.load(factors + 2 * plane + i + c)
            write = write * leave[:, None]
        write += inner
        if DECAY:
            rows_at = ROWS + ((block * B + b) * H + h) * T + start + row
            tl.store(rows_at, tl.sum(k.to(tl.float32) * write, 1), mask=row < n)
        if TMA:
            dk_tiles.store([i, block * BK], (read + write).to(DK_.dtype.element_ty))
        else:
            tl.store(DK_ + at, (read + write).to(DK_.dtype.element_ty), mask=mask)
        if DECAY:
            ds = ds * tl.load(factors + plane + i + C - 1)
            q = (q.to(tl.float32) * (enter * scale)[:, None]).to(LOW)
            k = (k.to(tl.float32) * -enter[:, None]).to(LOW)
        else:
            q, k = (q.to(tl.float32) * scale).to(LOW), (-k.to(tl.float32)).to(LOW)
        ds = tl.dot(tl.trans(do), q, ds, input_precision=PRECISION)
        ds = tl.dot(tl.trans(dv), k, ds, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_decay_kernel(
    G, STATE, GRADIENT, QUERY_ROWS, KEY_ROWS, OUT, TABLE,
    B, T, segment_length, segments, stretches, H, g_b, g_t, g_h,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, C: tl.constexpr, STRETCH: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT [B, T, H], the gradient of a decay per token, of a stretch from its end. STATE and GRADIENT are BORDERS."""
    _, b, h, rest = place_of_program(B, H, 1)
    stretch, segment = rest % stretches, rest // stretches
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    start, n = stretch_bounds(first, end, stretch, C, STRETCH)
    if n <= 0:
        return
    c, j = tl.arange(0, C), tl.arange(0, BLOCK)
    border = (((b * H + h) * segments + segment) * (stretches + 1) + stretch + 1) * SIZE
    products = tl.zeros([BLOCK], tl.float32)
    for i in range(0, SIZE, BLOCK):
        s = tl.load(STATE + border + i + j, mask=i + j < SIZE, other=0.0)
        products += s * tl.load(GRADIENT + border + i + j, mask=i + j < SIZE, other=0.0)
    later = tl.sum(products, 0)
    tiles = tl.cdiv(n, C)
    kind = B.to(tl.int64) * H * T
    for i in range(tiles):
        row = (tiles - 1 - i) * C + c
        rows_at, valid = (b * H + h) * T + start + row, row < n
        x, from_state = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        for m in tl.static_range(BLOCKS):
            x -= tl.load(KEY_ROWS + m * kind + rows_at, mask=valid, other=0.0)
        for m in tl.static_range(2 * BLOCKS):
            x += tl.load(QUERY_ROWS + m * kind + rows_at, mask=valid, other=0.0)
            from_state += tl.load(QUERY_ROWS + (2 * BLOCKS + m) * kind + rows_at, mask=valid, other=0.0)
        tl.store(OUT + (b * T + start + row) * H + h, tl.cumsum(x, 0, reverse=True) + later, mask=valid)
        g = bounded(tl.load(G + b * g_b + (start + row) * g_t + h * g_h, mask=valid, other=0.0))
        # Where a tile decays to nothing (exp(-16) is fp32's rounding) all that crosses its start ends within it.
        later = tl.where(tl.sum(g, 0) < -16.0, tl.sum(from_state, 0), later + tl.sum(x, 0))
