# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""A decay per token and channel, in Triton: walks without decay, in other variables.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t        g [B, T, H, K] <= 0

In a tile of C tokens let G_i be the decays summed up to token i, inclusive, and R those of the tile's first half. With

    q~_i = scale * q_i exp(G_i - R)        k~_j = k_j exp(R - G_j)        S^ = exp(R) S          (all per channel)

the tile is one of linear attention without a decay: P = causal(q~ k~^T), o = q~ S^ + P v, S^ += k~^T v, and at its end
S = exp(G_C - R) S^. Its gradients are those without a decay, too; dq = scale dq~ exp(G - R), dk = dk~ exp(R - G), and
x = q dq - k dk = q~ dq~ - k~ dk~ gives dg_t = sum_{s >= t} x_s + (S . dS summed over V at a border behind).
So nothing but the first and the last kernel sees a decay, and walks only scale rows of a state by K numbers a tile:

    prepare        q, k, g -> q~, k~ and the decays of each tile                   all tiles at once
    state, scan    k~, v -> the state at every border between segments             (what ranks exchange is in between)
    walk           q~, k~, v -> o;   in backward do, v, k~ -> dq~
    reverse walk   k~, q~, do -> dv;  v, do, q~ -> dk~
    finish         q~, k~, dq~, dk~, g -> dq, dk, dg                               from a segment's end

Tiles in which a half decays by more than exp(-LIMIT) in any channel are *flagged* (the usual gates of GLA and HGRN2
flag none): there q~ = scale q exp(G), k~ = k exp(G_C - G), none larger than what it was, and what lies within the tile
is worked out in blocks of 16 tokens: two blocks by a product, with the border before the later one as reference, a
block with itself token by token. Exponents are sums there, never differences of sums, which would lose the digits of
weak decays behind strong ones. P is made by `channel_flagged_kernel` for the walks to read, its gradients by
`channel_flagged_gradient_kernel`. So decays of any strength are right; a flagged tile costs some 40 powers a number
instead of 4.

Segments and slots are those of state.py. A segment at token `first` has its tiles from first // C + segment on in what
is kept by tile (VEC, FLAG, SIDE): no two share one, wherever packed sequences begin.

VEC [3, B, H, all_tiles, K], in units of log 2: what the state decays by before, within and behind the tile's product.
FLAG [B, H, all_tiles]: 1 where the tile is flagged. SIDE [B, H, all_tiles, C, C]: P of flagged tiles.
"""

import triton
import triton.language as tl

from lasp_kernels.state import LOG2E, VARYING, bounded, place_of_program, segment_bounds

LIMIT = tl.constexpr(60.0)  # nats in half a tile: exp(60) leaves bf16 and fp32 room for the numbers that it scales
LN2 = tl.constexpr(0.6931471805599453)
FORGOTTEN = tl.constexpr(16.0)  # nats in a tile, behind which a gradient of decays need not know of what came before
VARYING_HERE = [*VARYING, "all_tiles"]


@triton.jit
def log2_decays(pointers, mask):
    """Log-decays in units of log 2; 0 for tokens that are not there."""
    return bounded(tl.load(pointers, mask=mask, other=0.0)) * LOG2E


@triton.jit
def load_tile(base, row, stride, column, n, WIDTH: tl.constexpr, LOW: tl.constexpr):
    """Tokens `row` of n, in the dtype of the matrix products; zeros outside."""
    mask = (row < n)[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(LOW)


@triton.jit
def load_16(base, at, stride, d, d_mask, n):
    """16 tokens from `at`: [16, channels] in fp32, zeros behind the end."""
    row = at + tl.arange(0, 16)
    mask = (row < n)[:, None] & d_mask[None, :]
    return tl.load(base + row[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def decays_16(base, at, stride, d, d_mask, n):
    """The decays of 16 tokens from `at`."""
    row = at + tl.arange(0, 16)
    return log2_decays(base + row[:, None] * stride + d[None, :], (row < n)[:, None] & d_mask[None, :])


@triton.jit
def decays_behind(base, at, stride, d, d_mask, n, C: tl.constexpr):
    """Of each of C tokens from `at`: the decays behind it up to the last of them, as a sum."""
    c = tl.arange(0, C)
    row = at + 1 + c
    mask = ((c < C - 1) & (row < n))[:, None] & d_mask[None, :]
    return tl.cumsum(log2_decays(base + row[:, None] * stride + d[None, :], mask), 0, reverse=True)


@triton.jit
def sums_of_halves(g, C: tl.constexpr):
    """Of a tile [C, D]: the decay of its first half, of its second, and up to each token."""
    first = (tl.arange(0, C) < C // 2)[:, None]
    return tl.sum(tl.where(first, g, 0.0), 0), tl.sum(tl.where(first, 0.0, g), 0), tl.cumsum(g, 0)


@triton.jit
def first_tile(b, h, H, first, segment, all_tiles, C: tl.constexpr):
    """Where the tiles of a segment begin in what is kept by tile."""
    return (b * H + h) * all_tiles + first // C + segment


@triton.jit
def any_flagged(flags, tiles):
    """Whether any tile of a segment is."""
    found = tl.zeros([64], tl.int32)
    for i in range(0, tiles, 64):
        tile = i + tl.arange(0, 64)
        found = tl.maximum(found, tl.load(flags + tile, mask=tile < tiles, other=0))
    return tl.max(found, 0) != 0


@triton.jit
def end_of_flagged(flags, first, n, C: tl.constexpr, TILES: tl.constexpr):
    """Behind the last of TILES tiles from `first` of a segment of n tokens; `first` where none of them is flagged."""
    count = tl.minimum(tl.cdiv(n, C).to(tl.int32) - first, TILES)
    return first + tl.where(any_flagged(flags + first, count), count, 0)


@triton.jit(do_not_specialize=VARYING_HERE)
def channel_prepare_kernel(
    Q, K, G, QT, KT, VEC, FLAG, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H, q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """QT and KT [B, T, H, D] of a tile and a block of channels, as if no tile were flagged; without Q, or without K,
    one of them. With K also VEC, and FLAG, which is zeros before."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    block, b, h, rest = place_of_program(B, H, blocks)
    tile, segment = rest % tiles, rest // tiles
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n = end - first
    if tile * C >= n:
        return
    start = first.to(tl.int64)
    row, d = tile * C + tl.arange(0, C), block * BD + tl.arange(0, BD)
    d_mask = d < D
    mask = (row < n)[:, None] & d_mask[None, :]
    g = log2_decays(G + b * g_b + start * g_t + h * g_h + row[:, None] * g_t + d[None, :], mask)
    before, behind, summed = sums_of_halves(g, C)
    to_q = summed - before[None, :]
    out_at = ((b * T + start) * H + h) * D + row[:, None] * (H * D) + d[None, :]
    if Q is not None:
        q = load_tile(Q + b * q_b + start * q_t + h * q_h, row, q_t, d, n, D, tl.float32)
        tl.store(QT + out_at, (q * (tl.exp2(to_q) * scale)).to(QT.dtype.element_ty), mask=mask)
    if K is not None:
        k = load_tile(K + b * k_b + start * k_t + h * k_h, row, k_t, d, n, D, tl.float32)
        tl.store(KT + out_at, (k * tl.exp2(-to_q)).to(KT.dtype.element_ty), mask=mask)
        at = first_tile(b, h, H, first, segment, all_tiles, C) + tile
        plane = B.to(tl.int64) * H * all_tiles * D
        tl.store(VEC + at * D + d, before, mask=d_mask)
        tl.store(VEC + at * D + d + plane, tl.zeros_like(before), mask=d_mask)
        tl.store(VEC + at * D + d + 2 * plane, behind, mask=d_mask)
        if tl.min(tl.minimum(before, behind), 0) < -LIMIT * LOG2E:
            tl.atomic_max(FLAG + at, 1)  # by several blocks of channels


@triton.jit
def flagged_scores(
    q_base, k_base, g_base, side, tile, r, q_t, k_t, g_t, n, scale,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """16 rows of P of a tile, its block r, into `side` [C, C]; and the decay from the tile's start to theirs."""
    d, i = tl.arange(0, BD), tl.arange(0, 16)
    d_mask = d < D
    at = tile * C + r * 16
    side_at = side + (r * 16 + i[:, None]) * C + i[None, :]
    q = load_16(q_base, at, q_t, d, d_mask, n) * scale
    x = (q * tl.exp2(tl.cumsum(decays_16(g_base, at, g_t, d, d_mask, n), 0))).to(LOW)
    between = tl.zeros([BD], tl.float32)  # the decay of the blocks that lie between the two
    for m in tl.range(r, num_stages=1):
        block = r - 1 - m
        other = tile * C + block * 16
        y = load_16(k_base, other, k_t, d, d_mask, n)
        y = (y * tl.exp2(decays_behind(g_base, other, g_t, d, d_mask, n, 16) + between[None, :])).to(LOW)
        p = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        tl.store(side_at + block * 16, p.to(side.dtype.element_ty))
        between += tl.sum(decays_16(g_base, other, g_t, d, d_mask, n), 0)
    p = tl.zeros([16, 16], tl.float32)
    apart = tl.zeros([16, BD], tl.float32)  # the decays behind token j up to i
    for m in range(16):
        j = 15 - m
        j_mask = d < tl.where(at + j < n, D, 0)
        k_j = tl.load(k_base + (at + j) * k_t + d, mask=j_mask, other=0.0).to(tl.float32)
        column = tl.sum(q * k_j[None, :] * tl.exp2(apart), 1)
        p = tl.where((i[None, :] == j) & (i[:, None] >= j), column[:, None], p)
        g_j = log2_decays(g_base + (at + j) * g_t + d, j_mask)
        apart = tl.where((i >= j)[:, None], apart + g_j[None, :], apart)
    tl.store(side_at + r * 16, p.to(side.dtype.element_ty))
    for block in range(r + 1, C // 16):
        tl.store(side_at + block * 16, tl.zeros([16, 16], side.dtype.element_ty))
    return between


@triton.jit(do_not_specialize=VARYING_HERE)
def channel_flagged_kernel(
    Q, K, G, QT, KT, VEC, FLAG, SIDE, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H, q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """16 tokens of each of TILES tiles: where they are flagged, what `channel_prepare_kernel` left is replaced.

    With Q: QT, and SIDE; with KT: that, and VEC.
    """
    _, b, h, rest = place_of_program(B, H, 1)
    r = tl.program_id(1)
    groups = tl.cdiv(tiles, TILES)
    segment = rest // groups
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    d = tl.arange(0, BD)
    d_mask = d < D
    k_base, g_base = K + b * k_b + start * k_t + h * k_h, G + b * g_b + start * g_t + h * g_h
    out_base = ((b * T + start) * H + h) * D
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C)
    mine = (rest % groups) * TILES
    for tile in range(mine, end_of_flagged(FLAG + tile_at, mine, n, C, TILES)):
        of_tile = tile_at + tile
        if tl.load(FLAG + of_tile) != 0:
            at = tile * C + r * 16
            row = at + tl.arange(0, 16)
            mask = (row < n)[:, None] & d_mask[None, :]
            out_at = out_base + row[:, None] * (H * D) + d[None, :]
            g = decays_16(g_base, at, g_t, d, d_mask, n)
            if Q is not None:
                q_base = Q + b * q_b + start * q_t + h * q_h
                side = SIDE + of_tile * (C * C)
                before = flagged_scores(
                    q_base, k_base, g_base, side, tile, r, q_t, k_t, g_t, n, scale, D, BD, C, LOW, PRECISION
                )
                q = load_16(q_base, at, q_t, d, d_mask, n) * scale * tl.exp2(tl.cumsum(g, 0) + before[None, :])
                tl.store(QT + out_at, q.to(QT.dtype.element_ty), mask=mask)
            if KT is not None:
                behind = tl.zeros([BD], tl.float32)
                for block in tl.range(r + 1, C // 16, num_stages=1):
                    behind += tl.sum(decays_16(g_base, tile * C + block * 16, g_t, d, d_mask, n), 0)
                k = load_16(k_base, at, k_t, d, d_mask, n)
                k = k * tl.exp2(decays_behind(g_base, at, g_t, d, d_mask, n, 16) + behind[None, :])
                tl.store(KT + out_at, k.to(KT.dtype.element_ty), mask=mask)
                if r == 0:
                    plane = B.to(tl.int64) * H * all_tiles * D
                    tl.store(VEC + of_tile * D + d, tl.zeros_like(behind), mask=d_mask)
                    tl.store(VEC + of_tile * D + d + plane, tl.sum(g, 0) + behind, mask=d_mask)
                    tl.store(VEC + of_tile * D + d + 2 * plane, tl.zeros_like(behind), mask=d_mask)


@triton.jit(do_not_specialize=VARYING_HERE)
def channel_state_kernel(
    Y, Z, VEC, LOCAL, TOTAL, TABLE,
    B, T, segment_length, segments, all_tiles, H, y_b, y_t, y_h, z_b, z_t, z_h,
    DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """LOCAL [B, H, segments, DY, DZ]: the state behind a segment from zero (y = k~, z = v), or REVERSE the gradient of
    that before it (y = q~, z = do). TOTAL [B, H, segments, DY]: its log-decay."""
    blocks_z: tl.constexpr = (DZ + BZ - 1) // BZ
    blocks: tl.constexpr = blocks_z * ((DY + BY - 1) // BY)
    block, b, h, segment = place_of_program(B, H, blocks)
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    c = tl.arange(0, C)
    d = (block // blocks_z) * BY + tl.arange(0, BY)
    e = (block % blocks_z) * BZ + tl.arange(0, BZ)
    y_base = Y + b * y_b + start * y_t + h * y_h
    z_base = Z + b * z_b + start * z_t + h * z_h
    plane = B.to(tl.int64) * H * all_tiles * DY
    vec = VEC + first_tile(b, h, H, first, segment, all_tiles, C) * DY + d
    tiles = tl.cdiv(n, C)
    s = tl.zeros([BY, BZ], tl.float32)
    left = tl.zeros([BY], tl.float32)
    total = tl.zeros([BY], tl.float32)
    for i in tl.range(0, tiles, num_stages=STAGES):
        tile = tiles - 1 - i if REVERSE else i
        before = tl.load(vec + tile * DY, mask=d < DY, other=0.0)
        within = tl.load(vec + tile * DY + plane, mask=d < DY, other=0.0)
        behind = tl.load(vec + tile * DY + 2 * plane, mask=d < DY, other=0.0)
        row = tile * C + c
        y = load_tile(y_base, row, y_t, d, n, DY, LOW)
        z = load_tile(z_base, row, z_t, e, n, DZ, LOW)
        # One factor after the other: their product may be less than fp32 holds, where the state is not.
        s = s * tl.exp2(left)[:, None] * tl.exp2(within + (behind if REVERSE else before))[:, None]
        s = tl.dot(tl.trans(y), z, s, input_precision=PRECISION)
        left = before if REVERSE else behind
        total += before + within + behind
    s = s * tl.exp2(left)[:, None]
    index = (b * H + h) * segments + segment
    at = index * (DY * DZ) + d[:, None] * DZ + e[None, :]
    tl.store(LOCAL + at, s, mask=(d < DY)[:, None] & (e < DZ)[None, :])
    tl.store(TOTAL + index * DY + d, total * LN2, mask=d < tl.where(block % blocks_z == 0, DY, 0))


@triton.jit(do_not_specialize=VARYING_HERE)
def channel_scan_kernel(
    ENTERING, LOCAL, FACTOR, TOTAL, STATE, END, LOG_END, RUNS,
    segments, slots, H,
    DY: tl.constexpr, DZ: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `state.scan_kernel`: fold the segments of one run into ENTERING [N, H, DY, DZ] -> END, keep each border in
    STATE, and give the log-decay of the run, LOG_END [N, H, DY]. Any of them may be None.

    FACTOR [B, H, segments, DY] are exp(TOTAL), made by PyTorch, and products are rounded before sums (the owner turns
    fused ones off): the arithmetic of `reference.fold_maps`, which folds such maps between ranks.
    """
    row, h = tl.program_id(0) // H, tl.program_id(0) % H
    run = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = j < DY * DZ
    d = j // DZ
    low, high, head = 0, segments, run
    base = head * slots
    if PACKED:
        low, high, head = tl.load(RUNS + row), tl.load(RUNS + row + 1), h.to(tl.int64)
        base = head * slots + row
    s = tl.zeros([BLOCK], tl.float32)
    if ENTERING is not None:
        s = tl.load(ENTERING + run * (DY * DZ) + j, mask=mask, other=0.0)
    log_end = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, high - low, num_stages=4):
        segment = high - 1 - i if REVERSE else low + i
        if STATE is not None:
            border = segment + 1 if REVERSE else segment
            tl.store(STATE + (base + border) * (DY * DZ) + j, s, mask=mask)
        at = head * segments + segment
        if LOG_END is not None:
            log_end += tl.load(TOTAL + at * DY + d, mask=mask, other=0.0)
        factor = tl.load(FACTOR + at * DY + d, mask=mask, other=0.0)
        s = s * factor + tl.load(LOCAL + at * (DY * DZ) + j, mask=mask, other=0.0)
    if STATE is not None:
        border = low if REVERSE else high
        tl.store(STATE + (base + border) * (DY * DZ) + j, s, mask=mask)
    if END is not None:
        tl.store(END + run * (DY * DZ) + j, s, mask=mask)
    if LOG_END is not None:
        tl.store(LOG_END + run * DY + d, log_end, mask=mask & (j % DZ == 0))


@triton.jit
def walk_tiles(
    x_base, y_base, z_base, out_base, vec, plane, flags, side_base, s, n, block, x_t, y_t, z_t, out_t,
    DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr,
    FLAGGED: tl.constexpr, TMA: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A segment's n tokens of `channel_walk_kernel`, from the state s; FLAGGED: some tiles may be."""
    c, d, e = tl.arange(0, C), tl.arange(0, BY), block * BZ + tl.arange(0, BZ)
    if TMA:
        x_tiles = tl.make_tensor_descriptor(x_base, [n, DY], [x_t, 1], [C, BY])
        y_tiles = tl.make_tensor_descriptor(y_base, [n, DY], [y_t, 1], [C, BY])
        z_tiles = tl.make_tensor_descriptor(z_base, [n, DZ], [z_t, 1], [C, BZ])
        out_tiles = tl.make_tensor_descriptor(out_base, [n, DZ], [out_t, 1], [C, BZ])
    past = c[:, None] >= c[None, :]
    width: tl.constexpr = DZ if TRANSPOSED else DY
    channel = e if TRANSPOSED else d
    for i in tl.range(0, n, C, num_stages=STAGES):
        tile = i // C
        # All that feeds the products is loaded in the turn in which it does: then Triton loads it turns ahead.
        behind_last = channel < tl.where(i > 0, width, 0)
        leave = tl.exp2(tl.load(vec + (tile - 1) * width + channel + 2 * plane, mask=behind_last, other=0.0))
        enter = tl.exp2(tl.load(vec + tile * width + channel, mask=channel < width, other=0.0))
        row = i + c
        if TMA:
            x = x_tiles.load([i, 0]).to(LOW)
            y = y_tiles.load([i, 0]).to(LOW)
            z = z_tiles.load([i, block * BZ]).to(LOW)
        else:
            x = load_tile(x_base, row, x_t, d, n, DY, LOW)
            y = load_tile(y_base, row, y_t, d, n, DY, LOW)
            z = load_tile(z_base, row, z_t, e, n, DZ, LOW)
        # One factor after the other: their product may be less than fp32 holds, where the state is not.
        s = s * (leave[None, :] if TRANSPOSED else leave[:, None]) * (enter[None, :] if TRANSPOSED else enter[:, None])
        p = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        out = tl.dot(x, s.to(LOW), input_precision=PRECISION)
        p = tl.where(past, p, 0.0)
        if FLAGGED:
            flag = tl.load(flags + tile)
            p = tl.where(flag != 0, 0.0, p)
            if not TRANSPOSED:  # noqa: SIM102  # known when it is compiled, the other is not
                if flag != 0:
                    p = tl.load(side_base + tile.to(tl.int64) * (C * C) + c[:, None] * C + c[None, :]).to(tl.float32)
        out = tl.dot(p.to(LOW), z, out, input_precision=PRECISION)
        if TMA:
            out_tiles.store([i, block * BZ], out.to(out_base.dtype.element_ty))
        else:
            out_at = out_base + row[:, None] * out_t + e[None, :]
            tl.store(out_at, out.to(out_base.dtype.element_ty), mask=(row < n)[:, None] & (e < DZ)[None, :])
        if FLAGGED:
            within = tl.exp2(tl.load(vec + tile * width + channel + plane, mask=channel < width, other=0.0))
            s = s * (within[None, :] if TRANSPOSED else within[:, None])
        s = tl.dot(tl.trans(y), z, s, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING_HERE)
def channel_walk_kernel(
    X, Y, Z, VEC, FLAG, SIDE, STATE, OUT, TABLE,
    B, T, segment_length, segments, slots, all_tiles, H, x_b, x_t, x_h, y_b, y_t, y_h, z_b, z_t, z_h,
    DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [B, T, H, DZ]: o from x = q~, y = k~, z = v; TRANSPOSED dq~ from x = do, y = v, z = k~."""
    blocks: tl.constexpr = (DZ + BZ - 1) // BZ
    block, b, h, segment = place_of_program(B, H, blocks)
    first, end, slot = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    d, e = tl.arange(0, BY), block * BZ + tl.arange(0, BZ)
    x_base = X + b * x_b + start * x_t + h * x_h
    y_base = Y + b * y_b + start * y_t + h * y_h
    z_base = Z + b * z_b + start * z_t + h * z_h
    out_base = OUT + ((b * T + start) * H + h) * DZ
    at = d[:, None] + e[None, :] * DY if TRANSPOSED else d[:, None] * DZ + e[None, :]
    inside = (d < DY)[:, None] & (e < DZ)[None, :]
    s = tl.load(STATE + ((b * H + h) * slots + slot) * (DY * DZ) + at, mask=inside, other=0.0)
    width: tl.constexpr = DZ if TRANSPOSED else DY
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C)
    vec, flags, side_base = VEC + tile_at * width, FLAG + tile_at, SIDE + tile_at * (C * C)
    plane = B.to(tl.int64) * H * all_tiles * width
    # Few segments have a flagged tile, and the others need not ask for each.
    if any_flagged(flags, tl.cdiv(n, C)):
        walk_tiles(
            x_base, y_base, z_base, out_base, vec, plane, flags, side_base, s, n, block, x_t, y_t, z_t, H * DZ,
            DY, DZ, BY, BZ, C, TRANSPOSED, True, TMA, LOW, PRECISION, STAGES
        )  # fmt: skip
    else:
        walk_tiles(
            x_base, y_base, z_base, out_base, vec, plane, flags, side_base, s, n, block, x_t, y_t, z_t, H * DZ,
            DY, DZ, BY, BZ, C, TRANSPOSED, False, TMA, LOW, PRECISION, STAGES
        )  # fmt: skip


@triton.jit
def reverse_walk_tiles(
    x_base, y_base, z_base, dv_base, dk_base, vec, plane, flags, side_base, ds, n, role, block, x_t, y_t, z_t, out_t,
    DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    ROLE: tl.constexpr, FLAGGED: tl.constexpr, TMA: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A segment's n tokens of `channel_reverse_walk_kernel`, from the gradient ds of the state behind them."""
    c, d, e = tl.arange(0, C), tl.arange(0, BY), block * BZ + tl.arange(0, BZ)
    if TMA:
        x_tiles = tl.make_tensor_descriptor(x_base, [n, DY], [x_t, 1], [C, BY])
        y_tiles = tl.make_tensor_descriptor(y_base, [n, DY], [y_t, 1], [C, BY])
        z_tiles = tl.make_tensor_descriptor(z_base, [n, DZ], [z_t, 1], [C, BZ])
    past = c[:, None] <= c[None, :]  # [key, query]
    # A factor of rows for dv, of columns for dk: the other is 1.
    rows, columns = tl.where(role == 0, DY, 0), tl.where(role == 1, DZ, 0)
    last = (n - 1) // C
    for i in tl.range(0, last + 1, num_stages=STAGES):
        tile = last - i
        row = tile * C + c
        at = vec + tile * K
        if TMA:
            x = x_tiles.load([tile * C, 0]).to(LOW)
            y = y_tiles.load([tile * C, 0]).to(LOW)
            z = z_tiles.load([tile * C, block * BZ]).to(LOW)
        else:
            x = load_tile(x_base, row, x_t, d, n, DY, LOW)
            y = load_tile(y_base, row, y_t, d, n, DY, LOW)
            z = load_tile(z_base, row, z_t, e, n, DZ, LOW)
        if ROLE != 1:  # as in the other walk
            leave = tl.exp2(tl.load(at + K + d, mask=d < tl.where(i > 0, rows, 0), other=0.0))
            enter = tl.exp2(tl.load(at + 2 * plane + d, mask=d < rows, other=0.0))
            ds = ds * leave[:, None] * enter[:, None]
        if ROLE != 0:
            leave = tl.exp2(tl.load(at + K + e, mask=e < tl.where(i > 0, columns, 0), other=0.0))
            enter = tl.exp2(tl.load(at + 2 * plane + e, mask=e < columns, other=0.0))
            ds = ds * leave[None, :] * enter[None, :]
        p = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        out = tl.dot(x, ds.to(LOW), input_precision=PRECISION)
        p = tl.where(past, p, 0.0)
        if FLAGGED:
            flag = tl.load(flags + tile)
            p = tl.where(flag != 0, 0.0, p)
            if ROLE != 1:  # noqa: SIM102  # known when it is compiled, the other is not
                if (flag != 0) & (role == 0):
                    p = tl.load(side_base + tile.to(tl.int64) * (C * C) + c[:, None] + c[None, :] * C).to(tl.float32)
        out = tl.dot(p.to(LOW), z, out, input_precision=PRECISION)
        # Pointers, for the two may have different dtypes, and TMA stores in a branch do not compile (Triton 3.6).
        out_at = row[:, None] * out_t + e[None, :]
        if ROLE != 1:
            mask = (row < tl.where(role == 0, n, 0))[:, None] & (e < DZ)[None, :]
            tl.store(dv_base + out_at, out.to(dv_base.dtype.element_ty), mask=mask)
        if ROLE != 0:
            mask = (row < tl.where(role == 1, n, 0))[:, None] & (e < DZ)[None, :]
            tl.store(dk_base + out_at, out.to(dk_base.dtype.element_ty), mask=mask)
        if FLAGGED:
            if ROLE != 1:
                ds = ds * tl.exp2(tl.load(at + plane + d, mask=d < rows, other=0.0))[:, None]
            if ROLE != 0:
                ds = ds * tl.exp2(tl.load(at + plane + e, mask=e < columns, other=0.0))[None, :]
        ds = tl.dot(tl.trans(y), z, ds, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING_HERE)
def channel_reverse_walk_kernel(
    KT, QT, V, DO, VEC, FLAG, SIDE, STATE, DKT, DV, TABLE,
    B, T, segment_length, segments, slots, all_tiles, H,
    k_b, k_t, k_h, q_b, q_t, q_h, v_b, v_t, v_h, do_b, do_t, do_h,
    DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    ROLE: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROLE 0: DV from x = k~, y = q~, z = do, with dS [DY, DZ] = [K, V]. ROLE 1: DKT from x = v, y = do, z = q~, with
    dS transposed, [DY, DZ] = [V, K]. ROLE 2 (K = V): both, in neighbouring programs, which read the same tiles."""
    blocks: tl.constexpr = (DZ + BZ - 1) // BZ
    roles: tl.constexpr = 2 if ROLE == 2 else 1
    part, b, h, segment = place_of_program(B, H, roles * blocks)
    role, block = part % roles, part // roles
    if ROLE == 1:
        role = 1
    first, end, slot = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    d, e = tl.arange(0, BY), block * BZ + tl.arange(0, BZ)
    x_base, x_t = KT + b * k_b + start * k_t + h * k_h, k_t
    y_base, y_t = QT + b * q_b + start * q_t + h * q_h, q_t
    z_base, z_t = DO + b * do_b + start * do_t + h * do_h, do_t
    dv_base, dk_base = DV + ((b * T + start) * H + h) * DZ, DKT + ((b * T + start) * H + h) * DZ
    state_at = d[:, None] * DZ + e[None, :]
    if role == 1:
        x_base, x_t = V + b * v_b + start * v_t + h * v_h, v_t
        y_base, z_base = z_base, y_base
        y_t, z_t = z_t, y_t
        state_at = d[:, None] + e[None, :] * DY
    K: tl.constexpr = DZ if ROLE == 1 else DY
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C)
    vec, flags, side_base = VEC + tile_at * K, FLAG + tile_at, SIDE + tile_at * (C * C)
    plane = B.to(tl.int64) * H * all_tiles * K
    inside = (d < DY)[:, None] & (e < DZ)[None, :]
    ds = tl.load(STATE + ((b * H + h) * slots + slot + 1) * (DY * DZ) + state_at, mask=inside, other=0.0)
    # Few segments have a flagged tile, and the others need not ask for each.
    if any_flagged(flags, tl.cdiv(n, C)):
        reverse_walk_tiles(
            x_base, y_base, z_base, dv_base, dk_base, vec, plane, flags, side_base, ds, n, role, block, x_t, y_t, z_t,
            H * DZ, DY, DZ, BY, BZ, K, C, ROLE, True, TMA, LOW, PRECISION, STAGES
        )  # fmt: skip
    else:
        reverse_walk_tiles(
            x_base, y_base, z_base, dv_base, dk_base, vec, plane, flags, side_base, ds, n, role, block, x_t, y_t, z_t,
            H * DZ, DY, DZ, BY, BZ, K, C, ROLE, False, TMA, LOW, PRECISION, STAGES
        )  # fmt: skip


@triton.jit
def score_gradient_16(
    do_base, v_base, at, other, do_t, v_t, n, scale, E: tl.constexpr, BE: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * do v^T of the 16 queries from `at` and the 16 keys from `other`."""
    dp = tl.zeros([16, 16], tl.float32)
    for m in range(0, E, BE):
        e = m + tl.arange(0, BE)
        do = load_16(do_base, at, do_t, e, e < E, n).to(LOW)
        dp = tl.dot(do, tl.trans(load_16(v_base, other, v_t, e, e < E, n).to(LOW)), dp, input_precision=PRECISION)
    return dp * scale


@triton.jit(do_not_specialize=VARYING_HERE)
def channel_flagged_gradient_kernel(
    Q, K, V, DO, G, FLAG, DQ, DK, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, do_b, do_t, do_h, g_b, g_t, g_h,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    PACKED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """16 tokens of each of TILES tiles, and a block of channels: where they are flagged, the part of DQ and DK from
    within the tile; either may be None."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    block, b, h, rest = place_of_program(B, H, blocks)
    r = tl.program_id(1)
    groups = tl.cdiv(tiles, TILES)
    segment = rest // groups
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    d, i = block * BD + tl.arange(0, BD), tl.arange(0, 16)
    d_mask = d < D
    q_base, k_base = Q + b * q_b + start * q_t + h * q_h, K + b * k_b + start * k_t + h * k_h
    v_base, do_base = V + b * v_b + start * v_t + h * v_h, DO + b * do_b + start * do_t + h * do_h
    g_base, out_base = G + b * g_b + start * g_t + h * g_h, ((b * T + start) * H + h) * D
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C)
    mine = (rest % groups) * TILES
    for tile in range(mine, end_of_flagged(FLAG + tile_at, mine, n, C, TILES)):
        if tl.load(FLAG + tile_at + tile) != 0:
            at = tile * C + r * 16
            # These tokens as queries, of keys in earlier blocks; then as keys, for queries in later ones.
            dq, between = tl.zeros([16, BD], tl.float32), tl.zeros([BD], tl.float32)
            for m in tl.range(r, num_stages=1):
                other = at - (m + 1) * 16
                dp = score_gradient_16(do_base, v_base, at, other, do_t, v_t, n, scale, E, BE, LOW, PRECISION)
                y = load_16(k_base, other, k_t, d, d_mask, n)
                y = y * tl.exp2(decays_behind(g_base, other, g_t, d, d_mask, n, 16) + between[None, :])
                dq = tl.dot(dp.to(LOW), y.to(LOW), dq, input_precision=PRECISION)
                between += tl.sum(decays_16(g_base, other, g_t, d, d_mask, n), 0)
            dq = dq * tl.exp2(tl.cumsum(decays_16(g_base, at, g_t, d, d_mask, n), 0))
            dk, between = tl.zeros([16, BD], tl.float32), tl.zeros([BD], tl.float32)
            for m in tl.range(C // 16 - 1 - r, num_stages=1):
                other = at + (m + 1) * 16
                dp = score_gradient_16(do_base, v_base, other, at, do_t, v_t, n, scale, E, BE, LOW, PRECISION)
                g = decays_16(g_base, other, g_t, d, d_mask, n)
                x = load_16(q_base, other, q_t, d, d_mask, n) * tl.exp2(tl.cumsum(g, 0))
                part = tl.dot(tl.trans(dp.to(LOW)), x.to(LOW), input_precision=PRECISION)
                dk += part * tl.exp2(between)[None, :]
                between += tl.sum(g, 0)
            dk = dk * tl.exp2(decays_behind(g_base, at, g_t, d, d_mask, n, 16))
            q = load_16(q_base, at, q_t, d, d_mask, n)
            dp = score_gradient_16(do_base, v_base, at, at, do_t, v_t, n, scale, E, BE, LOW, PRECISION)
            dp = tl.where(i[:, None] >= i[None, :], dp, 0.0)
            apart = tl.zeros([16, BD], tl.float32)
            for m in range(16):
                j = 15 - m
                j_mask = d < tl.where(at + j < n, D, 0)
                k_j = tl.load(k_base + (at + j) * k_t + d, mask=j_mask, other=0.0).to(tl.float32)
                g_j = log2_decays(g_base + (at + j) * g_t + d, j_mask)
                column = tl.sum(tl.where(i[None, :] == j, dp, 0.0), 1)[:, None] * tl.exp2(apart)
                dq += column * k_j[None, :]
                dk += tl.where((i == j)[:, None], tl.sum(column * q, 0)[None, :], 0.0)
                apart = tl.where((i >= j)[:, None], apart + g_j[None, :], apart)
            row = at + i
            mask = (row < n)[:, None] & d_mask[None, :]
            out_at = out_base + row[:, None] * (H * D) + d[None, :]
            if DQ is not None:
                tl.store(DQ + out_at, dq.to(DQ.dtype.element_ty), mask=mask)
            if DK is not None:
                tl.store(DK + out_at, dk.to(DK.dtype.element_ty), mask=mask)


@triton.jit
def finish_tokens(
    g_base, qt_base, kt_base, dqt_base, dkt_base, behind, dq_base, dk_base, dg_base, scale, first, end, later, g_t,
    out_t, d, D: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens first to end of a segment, none in a flagged tile, from the last: dq, dk and dg. Returns `later`, which
    is the gradient of a decay just behind them, for those before. `behind` is what tiles decay by behind their state.
    """
    to_q = tl.zeros_like(later)
    for i in tl.range(0, end - first, num_stages=STAGES):
        t = end - 1 - i
        mask, at = d < D, t * out_t + d
        g = log2_decays(g_base + t * g_t + d, mask)
        # From the tile's reference, which is between its halves, to this token: a sum that starts where a half ends.
        at_end = (t % C == C - 1) | (i == 0)
        of_half = tl.load(behind + (t // C) * D + d, mask=d < tl.where(at_end, D, 0), other=0.0)
        to_q = tl.where(at_end, of_half, tl.where(t % C == C // 2 - 1, 0.0, to_q))
        if dq_base is not None:
            dq = tl.load(dqt_base + at, mask=mask, other=0.0)
            if dg_base is not None:
                later += tl.load(qt_base + at, mask=mask, other=0.0).to(tl.float32) * dq
            tl.store(dq_base + at, (dq * (tl.exp2(to_q) * scale)).to(dq_base.dtype.element_ty), mask=mask)
        if dk_base is not None:
            dk = tl.load(dkt_base + at, mask=mask, other=0.0)
            if dg_base is not None:
                later -= tl.load(kt_base + at, mask=mask, other=0.0).to(tl.float32) * dk
            tl.store(dk_base + at, (dk * tl.exp2(-to_q)).to(dk_base.dtype.element_ty), mask=mask)
        if dg_base is not None:
            tl.store(dg_base + at, later, mask=mask)
        to_q -= g
    return later


@triton.jit
def finish_flagged_tile(
    q_base, k_base, g_base, qt_base, kt_base, dqt_base, dkt_base, dq_base, dk_base, dg_base, scale, first, end, later,
    q_t, k_t, g_t, out_t, d, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same of a flagged tile. In dq and dk is what `channel_flagged_gradient_kernel` left there."""
    mask = d < D
    to_k, from_state = tl.zeros_like(later), tl.zeros_like(later)
    for i in tl.range(0, end - first, num_stages=STAGES):
        t = end - 1 - i
        at = t * out_t + d
        if dg_base is not None:
            dq, within = tl.load(dqt_base + at, mask=mask, other=0.0), tl.load(dq_base + at, mask=mask, other=0.0)
            product = tl.load(qt_base + at, mask=mask, other=0.0).to(tl.float32) * dq
            from_state += product
            q = tl.load(q_base + t * q_t + d, mask=mask, other=0.0).to(tl.float32)
            later += product + q * within.to(tl.float32)
        if dk_base is not None:
            dk = tl.load(dkt_base + at, mask=mask, other=0.0)
            within = tl.load(dk_base + at, mask=mask, other=0.0).to(tl.float32)
            if dg_base is not None:
                later -= tl.load(kt_base + at, mask=mask, other=0.0).to(tl.float32) * dk
                later -= tl.load(k_base + t * k_t + d, mask=mask, other=0.0).to(tl.float32) * within
            tl.store(dk_base + at, (dk * tl.exp2(to_k) + within).to(dk_base.dtype.element_ty), mask=mask)
        if dg_base is not None:
            tl.store(dg_base + at, later, mask=mask)
        to_k += log2_decays(g_base + t * g_t + d, mask)
    if dq_base is not None:
        to_q = tl.zeros_like(later)
        for t in tl.range(first, end, num_stages=STAGES):  # sums from the tile's start: no differences
            at = t * out_t + d
            to_q += log2_decays(g_base + t * g_t + d, mask)
            dq, within = tl.load(dqt_base + at, mask=mask, other=0.0), tl.load(dq_base + at, mask=mask, other=0.0)
            dq = dq * (tl.exp2(to_q) * scale) + within.to(tl.float32)
            tl.store(dq_base + at, dq.to(dq_base.dtype.element_ty), mask=mask)
    # Where the tile decays to nothing, all that crosses its start ends within it: the sum starts anew.
    return tl.where(to_k < -FORGOTTEN * LOG2E, from_state, later)


@triton.jit(do_not_specialize=VARYING_HERE)
def channel_finish_kernel(
    Q, K, G, QT, KT, DQT, DKT, VEC, FLAG, STATE, GRADIENT, DQ, DK, DG, TABLE,
    scale, B, T, segment_length, segments, slots, all_tiles, H, q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """DQ, DK, DG [B, T, H, D] of a segment and a block of channels, from its end; or one of DQ and DK alone.

    Token by token: a program is as wide as its channels, and sums along tokens need nobody else. For DG, STATE and
    GRADIENT are the state and its gradient at every border; within a segment it gathers rounding noise from the end on.
    """
    blocks: tl.constexpr = (D + BD - 1) // BD
    block, b, h, segment = place_of_program(B, H, blocks)
    first, end, slot = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n, start = end - first, first.to(tl.int64)
    d = block * BD + tl.arange(0, BD)
    later = tl.zeros([BD], tl.float32)
    if DG is not None:
        border = ((b * H + h) * slots + slot + 1) * (D * E) + d[:, None] * E
        for i in range(0, E, BE):
            e = i + tl.arange(0, BE)
            e_mask = (d < D)[:, None] & (e < E)[None, :]
            s = tl.load(STATE + border + e[None, :], mask=e_mask, other=0.0)
            later += tl.sum(s * tl.load(GRADIENT + border + e[None, :], mask=e_mask, other=0.0), 1)
    q_base, k_base = Q + b * q_b + start * q_t + h * q_h, K + b * k_b + start * k_t + h * k_h
    g_base, at = G + b * g_b + start * g_t + h * g_h, ((b * T + start) * H + h) * D
    qt_base, kt_base, dqt_base, dkt_base = QT + at, KT + at, DQT, DKT
    dq_base, dk_base, dg_base = DQ, DK, DG
    if DQ is not None:
        dqt_base, dq_base = DQT + at, DQ + at
    if DK is not None:
        dkt_base, dk_base = DKT + at, DK + at
    if DG is not None:
        dg_base = DG + at
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C)
    behind = VEC + tile_at * D + 2 * B.to(tl.int64) * H * all_tiles * D
    tiles = tl.cdiv(n, C)
    if any_flagged(FLAG + tile_at, tiles):
        for i in range(0, tiles):
            low = (tiles - 1 - i) * C
            high = tl.minimum(low + C, n)
            if tl.load(FLAG + tile_at + tiles - 1 - i) != 0:
                later = finish_flagged_tile(
                    q_base, k_base, g_base, qt_base, kt_base, dqt_base, dkt_base, dq_base, dk_base, dg_base, scale,
                    low, high, later, q_t, k_t, g_t, H * D, d, D, STAGES
                )  # fmt: skip
            else:
                later = finish_tokens(
                    g_base, qt_base, kt_base, dqt_base, dkt_base, behind, dq_base, dk_base, dg_base, scale, low, high,
                    later, g_t, H * D, d, D, C, STAGES
                )  # fmt: skip
    else:
        finish_tokens(
            g_base, qt_base, kt_base, dqt_base, dkt_base, behind, dq_base, dk_base, dg_base, scale, 0, n, later, g_t,
            H * D, d, D, C, STAGES
        )  # fmt: skip
