# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Gradients of k and v and of the decay, in Triton; that of q is output.py's walk with other operands.

The walk goes from a segment's end to its start. Per tile of C tokens, with dS the gradient of the state behind it
(in registers, in fp32), D_ij = exp(G_i - G_j) for j <= i and sums over the query heads of a group::

    dv = exp(G_C - G) * (k dS)   + scale * ((k q^T)  * D^T) do
    dk = exp(G_C - G) * (v dS^T) + scale * ((v do^T) * D^T) q
    dS <- exp(G_C) dS + scale * (exp(G) * q)^T do

`backward_walk_kernel` does one of the first two with the third, for a block of columns; it is output.py's walk,
backwards. dk and dv run as one grid (PAIRED): programs that read the same tiles sit side by side, so each
tensor comes from memory once, and the copies that the others need come from the L2 cache.

Tiles are aligned to the segment's start, as in output.py. In the one at its end, which is walked first, q and do are
zero behind the end. (Aligned to the end instead, tiles would start at negative rows, which TMA refuses.) The sum over
a group stays in one program: no atomics.

With a normaliser (normaliser.py) `scale` is a number r of each query, and the state has a column more, the sum of keys.
So does dS, the sum of r c q; k dS is without it, v dS^T has it added, and c is added to v do^T.

The decay of token t scales all that crosses from before t to t or later: within a segment::

    d log_decay_t = sum_{s >= t} (q_s . dq_s - k_s . dk_s) + <S, dS> at the segment's end

`token_decay_kernel` sums this up. The row sums come from the kernels that make dq and dk, in fp32; the states and
gradients of all borders are there anyway. Over the whole sequence instead, the sums would cancel to noise. Also
where a tile as a whole decays to nothing the sum starts anew: what crosses the tile's start then ends in the tile,
so its gradient is the row sum of that part of dq which comes from the state before the tile.

For a decay per head even a segment's length would be too much: the noise of every row sum would enter as many
times as there are tokens before it. `head_decay_kernel` differentiates the walk of output.py instead: by the chain
rule, over one segment at a time, it carries N = dS/dg from zero next to S, and nothing cancels::

    d g = scale * sum_i do_i . (exp(G_i) q_i ((i + 1) S + N) + sum_j (i - j) P_ij v_j)   +   <N, dS> at its end
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
def backward_walk_kernel(
    X, X2, Y, Z, W, NORM, G, STATE, OUT, OUT2, ROWS, TABLE,
    scale, B, T, segment_length, segments, slots, H,
    x_b, x_t, x_h, x2_b, x2_t, x2_h, y_b, y_t, y_h, z_b, z_t, z_h, w_b, w_t, w_h, g_h,
    DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, SHARE: tl.constexpr, NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr, PACKED: tl.constexpr, TRANSPOSED: tl.constexpr, PAIRED: tl.constexpr,
    SUM_ROWS: tl.constexpr, SPLIT_SUMS: tl.constexpr, TMA: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [B, T, H, DZ], contiguous. TRANSPOSED: STATE holds [DZ, DY], else [DY, DZ]; without slots it is zeros.
    G is [H], or per token what `tile_decay_kernel` makes.

    PAIRED (DY = DZ, not TRANSPOSED): every other program computes OUT2 from x = X2, y = Z, z = Y, STATE transposed.
    SUM_ROWS: also ROWS [blocks, B, H, T] = sum over the block's columns of W * out (PAIRED: of OUT2), unrounded.
    SHARE heads of v have one of q and k; both outputs have one for each of them. NORMALIZE: NORM is what normaliser.py
    makes.
    """
    width: tl.constexpr = (DY if TRANSPOSED else DZ) + (1 if NORMALIZE else 0)  # of a row of the state
    size: tl.constexpr = (DZ if TRANSPOSED else DY) * width
    of_keys: tl.constexpr = TRANSPOSED or PAIRED  # dk, perhaps
    blocks: tl.constexpr = (DZ + BZ - 1) // BZ
    roles: tl.constexpr = 2 if PAIRED else 1
    part, b, h, segment = place_of_program(B, H, roles * blocks)
    role, block = part % roles, part // roles  # programs that read the same tiles side by side
    first, end, slot = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    c, d, e = tl.arange(0, C), tl.arange(0, BY), block * BZ + tl.arange(0, BZ)
    y_h, z_h = tl.cast(y_h, tl.int64), tl.cast(z_h, tl.int64)  # heads of a group may be far apart
    xh = h if TRANSPOSED else h // SHARE
    yh, zh = h if TRANSPOSED else h // SHARE, h // SHARE if TRANSPOSED else h
    x_base = X + b * x_b + start * x_t + xh * x_h
    y_base = Y + b * y_b + start * y_t + (yh * GROUP) * y_h
    z_base = Z + b * z_b + start * z_t + (zh * GROUP) * z_h
    out_base = OUT + ((b * T + start) * H + h) * DZ
    state_at = d[:, None] + e[None, :] * width if TRANSPOSED else d[:, None] * width + e[None, :]
    if PAIRED:
        if role == 1:
            x_base = X2 + b * x2_b + start * x2_t + h * x2_h
            y_base, z_base = z_base, y_base
            out_base = OUT2 + ((b * T + start) * H + h) * DZ
        x_t, y_t, z_t = tl.where(role == 1, x2_t, x_t), tl.where(role == 1, z_t, y_t), tl.where(role == 1, y_t, z_t)
        state_at = tl.where(role == 1, d[:, None] + e[None, :] * width, state_at)
    if TMA:
        x_tiles = tl.make_tensor_descriptor(x_base, [n, DY], [x_t, 1], [C, BY])
        y_tiles = tl.make_tensor_descriptor(y_base, [n, DY], [y_t, 1], [C, BY])
        z_tiles = tl.make_tensor_descriptor(z_base, [n, DZ], [z_t, 1], [C, BZ])
        out_tiles = tl.make_tensor_descriptor(out_base, [n, DZ], [H * DZ, 1], [C, BZ])
    past = c[:, None] <= c[None, :]  # [key, query]
    if DECAY == HEAD_DECAY:
        g = bounded(tl.load(G + h * g_h))
        enter, _, _ = head_decays(g, C)
        causal = head_causal_decays(g, C, True)
    if DECAY == TOKEN_DECAY:
        g_base = G + (b * H + h) * T + start
    inside = (d < tl.where(slots > 0, DY, 0))[:, None] & (e < DZ)[None, :]
    ds = tl.load(STATE + ((b * H + h) * slots + slot + 1) * size + state_at, mask=inside, other=0.0)
    if NORMALIZE:
        norm_at = NORM + (b * H + h) * GROUP * T + start
        if of_keys:
            inside = e < tl.where((slots > 0) & (role == roles - 1), DZ, 0)
            d_sum_at = STATE + ((b * H + h) * slots + slot + 1) * size + e * width + width - 1
            d_sum = tl.load(d_sum_at, mask=inside, other=0.0)  # gradient of the sum of keys
    last = (n - 1) // C * C  # where the last tile begins
    for i in tl.range(0, n, C, num_stages=STAGES):
        at = last - i
        valid = at + c < n
        rows = tl.minimum(at + c, n - 1)
        if TMA:
            x = x_tiles.load([at, 0]).to(LOW)
        else:
            x = load_columns(x_base + (rows[:, None] * x_t + d[None, :]), d[None, :], DY, BY, LOW)
        out = tl.dot(x, ds.to(LOW), input_precision=PRECISION)
        if NORMALIZE and of_keys:
            out += d_sum[None, :]
        if DECAY == HEAD_DECAY:  # to the segment's end, where the last tile may end early
            length = tl.minimum(n - at, C)
            leave, tile_decay = tl.exp(g * tl.maximum(length - 1 - c, 0).to(tl.float32)), tl.exp(g * length)
        if DECAY == TOKEN_DECAY:
            tile_last = tl.minimum(at + C, n) - 1
            causal, enter, leave, tile_decay = tile_decays(g_base, B, H, T, rows, tile_last, C, True, SPLIT_SUMS)
        if DECAY != NO_DECAY:
            out = out * leave[:, None]
            ds = ds * tile_decay
            if NORMALIZE and of_keys:
                d_sum = d_sum * tile_decay
        for m in range(GROUP):
            if TMA:
                y = y_tiles.load([at, 0]).to(LOW)
                z = z_tiles.load([at, block * BZ]).to(LOW)
            else:
                y = load_columns(y_base + m * y_h + (rows[:, None] * y_t + d[None, :]), d[None, :], DY, BY, LOW)
                z_mask = valid[:, None] & (e < DZ)[None, :]
                z = tl.load(z_base + m * z_h + rows[:, None] * z_t + e[None, :], mask=z_mask, other=0.0).to(LOW)
            p = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            factor = scale
            if NORMALIZE:
                factor = tl.load(norm_at + m * T + rows, mask=valid, other=0.0)
                if of_keys:
                    added_at = norm_at + (B.to(tl.int64) * (H * GROUP) + m) * T + rows
                    added = tl.load(added_at, mask=at + c < tl.where(role == roles - 1, n, 0), other=0.0)
                    p += added[None, :]
            p = p * (factor[None, :] if NORMALIZE else scale)
            p = tl.where(past, p, 0.0) if DECAY == NO_DECAY else p * causal
            out = tl.dot(p.to(LOW), z, out, input_precision=PRECISION)
            if DECAY != NO_DECAY:
                factor = enter * factor
            z = (z * (factor if DECAY == NO_DECAY and not NORMALIZE else factor[:, None])).to(LOW)
            if NORMALIZE and of_keys:
                d_sum += tl.sum(z.to(tl.float32) * added[:, None], 0)
            ds = tl.dot(tl.trans(y), z, ds, input_precision=PRECISION)
        mask = valid[:, None] & (e < DZ)[None, :]
        if TMA:
            out_tiles.store([at, block * BZ], out.to(OUT.dtype.element_ty))
        else:
            tl.store(out_base + (rows[:, None] * (H * DZ) + e[None, :]), out.to(OUT.dtype.element_ty), mask=mask)
        if SUM_ROWS:
            valid = at + c < tl.where(role == roles - 1, n, 0)  # of a pair only dk
            mask = valid[:, None] & (e < DZ)[None, :]
            w_at = W + b * w_b + (start + rows[:, None]) * w_t + h // SHARE * w_h + e[None, :]
            w = tl.load(w_at, mask=mask, other=0.0)
            tl.store(ROWS + ((block * B + b) * H + h) * T + start + rows, tl.sum(w * out, 1), mask=valid)


@triton.jit(do_not_specialize=VARYING)
def token_decay_kernel(
    G, STATE, GRADIENT, QUERY_ROWS, KEY_ROWS, OUT, TABLE,
    B, T, segment_length, segments, slots, H, g_b, g_t, g_h,
    SIZE: tl.constexpr, GROUP: tl.constexpr, Q_BLOCKS: tl.constexpr, K_BLOCKS: tl.constexpr,
    PACKED: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT [B, T, H] from the row sums and the SIZE elements of the states. C is the tile of the kernel for dq.

    QUERY_ROWS [2, Q_BLOCKS, B, H * GROUP, T], KEY_ROWS [K_BLOCKS, B, H, T].
    """
    _part, b, h, segment = place_of_program(B, H, 1)
    first, end, slot = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n = end - first
    c = tl.arange(0, C)
    at = ((b * H + h) * slots + slot + 1) * SIZE + tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK], tl.float32)
    for i in range(0, SIZE, BLOCK):
        mask = i + tl.arange(0, BLOCK) < SIZE
        s = tl.load(STATE + at + i, mask=mask, other=0.0)
        products += s * tl.load(GRADIENT + at + i, mask=mask, other=0.0)
    later = tl.sum(products, 0)  # the gradient of a decay just behind the tile
    tiles = tl.cdiv(n, C)
    for i in range(tiles):
        row = (tiles - 1 - i) * C + c
        valid = row < n
        token = first.to(tl.int64) + row
        x = tl.zeros([C], tl.float32)
        from_state = tl.zeros([C], tl.float32)
        for m in tl.static_range(GROUP * Q_BLOCKS):
            rows_at = QUERY_ROWS + (((m // GROUP) * B + b) * (H * GROUP) + h * GROUP + m % GROUP) * T + token
            x += tl.load(rows_at, mask=valid, other=0.0)
            rows_at += Q_BLOCKS * B.to(tl.int64) * (H * GROUP) * T
            from_state += tl.load(rows_at, mask=valid, other=0.0)
        for m in tl.static_range(K_BLOCKS):
            x -= tl.load(KEY_ROWS + ((m * B + b) * H + h) * T + token, mask=valid, other=0.0)
        tl.store(OUT + (b * T + token) * H + h, tl.cumsum(x, 0, reverse=True) + later, mask=valid)
        g = bounded(tl.load(G + b * g_b + token * g_t + h * g_h, mask=valid, other=0.0))
        # exp(-16) is 1e-7, the rounding of fp32
        later = tl.where(tl.sum(g, 0) < -16.0, tl.sum(from_state, 0), later + tl.sum(x, 0))


@triton.jit(do_not_specialize=VARYING)
def head_decay_kernel(
    Q, K, V, DO, NORM, G, STATE, GRADIENT, OUT, TABLE,
    scale, B, T, segment_length, segments, slots, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, g_h,
    DK_: tl.constexpr, DV_: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, SHARE: tl.constexpr, NORMALIZE: tl.constexpr, DECAY: tl.constexpr, PACKED: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [segments, blocks, B, H * GROUP]: the part of each segment, block of columns and query head."""
    width: tl.constexpr = DV_ + 1 if NORMALIZE else DV_
    blocks: tl.constexpr = (DV_ + BV - 1) // BV
    heads = H * GROUP
    block, b, hq, segment = place_of_program(B, heads, blocks)
    h = hq // GROUP
    first, end, slot = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n = end - first
    start = first.to(tl.int64)
    c = tl.arange(0, C)
    d = tl.arange(0, BK)
    e = block * BV + tl.arange(0, BV)
    q_base = Q + b * q_b + start * q_t + hq // SHARE * q_h
    k_base = K + b * k_b + start * k_t + h // SHARE * k_h
    v_base = V + b * v_b + start * v_t + h * v_h
    do_base = DO + b * do_b + start * do_t + hq * do_h
    g = bounded(tl.load(G + h * g_h))
    enter, _, _ = head_decays(g, C)
    distance = tl.maximum(c[:, None] - c[None, :], 0).to(tl.float32)
    by_distance = distance * head_causal_decays(g, C, False)
    inside = (d < DK_)[:, None] & (e < DV_)[None, :]
    at = ((b * H + h) * slots + slot) * (DK_ * width) + d[:, None] * width + e[None, :]
    s = tl.load(STATE + at, mask=inside, other=0.0)
    if NORMALIZE:  # the column of the sum of keys, and its derivative
        norm_at = NORM + (b * heads + hq) * T + start
        sum_at = ((b * H + h) * slots + slot) * (DK_ * width) + d * width + DV_
        keys = tl.load(STATE + sum_at, mask=d < DK_, other=0.0)
        n_keys, weighed = tl.zeros([BK], tl.float32), tl.zeros([C], tl.float32)
    ns = tl.zeros([BK, BV], tl.float32)  # N, the derivative of s by g
    products = tl.zeros([C, BV], tl.float32)
    for i in tl.range(0, n, C, num_stages=STAGES):
        row = i + c
        valid = row < n
        rows = tl.minimum(row, n - 1)
        q = load_columns(q_base + (rows[:, None] * q_t + d[None, :]), d[None, :], DK_, BK, LOW)
        kt = load_columns(k_base + (rows[None, :] * k_t + d[:, None]), d[:, None], DK_, BK, LOW)
        v = load_columns(v_base + (rows[:, None] * v_t + e[None, :]), e[None, :], DV_, BV, LOW)
        do = load_columns(do_base + (rows[:, None] * do_t + e[None, :]), e[None, :], DV_, BV, LOW)
        d_o = tl.dot(q, s.to(LOW), input_precision=PRECISION) * (c + 1).to(tl.float32)[:, None]
        d_o = tl.dot(q, ns.to(LOW), d_o, input_precision=PRECISION) * enter[:, None]
        p = tl.dot(q, kt, input_precision=PRECISION) * by_distance
        d_o = tl.dot(p.to(LOW), v, d_o, input_precision=PRECISION)
        if NORMALIZE:
            factor = tl.load(norm_at + rows)
            d_o = d_o * factor[:, None]
            by_g = (c + 1).to(tl.float32)[:, None] * keys[None, :] + n_keys[None, :]  # [query, K]
            d_norm = tl.sum(q.to(tl.float32) * by_g, 1) * enter + tl.sum(p, 1)
            factor = factor * tl.load(norm_at + B.to(tl.int64) * heads * T + rows)
            weighed += tl.where(valid, d_norm * factor, 0.0)
        products += tl.where(valid[:, None], d_o * do.to(tl.float32), 0.0)
        # The end of the last tile counts, so its decays are those of its own tokens.
        length = tl.minimum(n - i, C)
        after = tl.maximum(length - 1 - c, 0).to(tl.float32)
        leave = tl.where(valid, tl.exp(g * after), 0.0)
        tile_decay = tl.exp(g * length)
        if NORMALIZE:
            n_keys = (n_keys + keys * length) * tile_decay
            n_keys += tl.sum(kt.to(tl.float32) * (leave * after)[None, :], 1)
            keys = keys * tile_decay + tl.sum(kt.to(tl.float32) * leave[None, :], 1)
        ns = (ns + s * length) * tile_decay
        ns = tl.dot((kt * (leave * after)[None, :]).to(LOW), v, ns, input_precision=PRECISION)
        s = tl.dot((kt * leave[None, :]).to(LOW), v, s * tile_decay, input_precision=PRECISION)
    ds = tl.load(GRADIENT + at + DK_ * width, mask=inside, other=0.0)
    part = tl.sum(tl.sum(products, 1), 0) * (1.0 if NORMALIZE else scale)
    if hq % GROUP == 0:  # the state's own gradient, once for a group
        part += tl.sum(tl.sum(ns * ds, 1), 0)
    if NORMALIZE:  # of all blocks of columns one has this
        inside = d < tl.where((block == 0) & (hq % GROUP == 0), DK_, 0)
        d_sum = tl.load(GRADIENT + sum_at + DK_ * width, mask=inside, other=0.0)
        part += tl.where(block == 0, tl.sum(weighed, 0), 0.0) + tl.sum(n_keys * d_sum, 0)
    tl.store(OUT + ((segment * blocks + block) * B + b) * heads + hq, part)
