# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Segment states and their scan, in Triton.

A *segment* is the run of tokens that one program of output.py or gradient.py walks, tile by tile. Where a walk starts
it needs the state that enters its segment, so three steps come before it:

    1. `segment_state_kernel` gives the end state of every segment from zero; with REVERSE, the gradient that its
       tokens send to the state before it. A segment is cut into *pieces*, one program each, since only a few heads
       have to read all of it (see below) and would otherwise keep the card waiting.
    2. `scan_kernel` folds pieces and segments from the left, starting with the state that enters the run. It leaves the
       state at every border between segments, in a buffer [B, H, slots, K, V] with one slot a border (so one more
       than segments, for each run of a packed sequence). With REVERSE the same slots get the gradients of
       these states, so that state and gradient of a border lie at the same place.
    3. The walks start from the slot before (reversed: behind) their segment.

Ragged ends need no special decays: the pieces of a segment are counted from its end (reversed: from its start), so
that only the first tile walked, when the state is still zero, has rows outside. They are loaded as zeros.

Horizon: with a fixed decay g, exp(n g) is 0 in fp32 (subnormals flushed) once n > 88 / |g|. The end state is
therefore exactly that of the last 88 / |g| tokens, and only those are read. The host does not need to know g.
"""

import triton
import triton.language as tl

# Forms of the decay, for the kernels' DECAY.
NO_DECAY = tl.constexpr(0)
HEAD_DECAY = tl.constexpr(1)  # [H]
TOKEN_DECAY = tl.constexpr(2)  # [B, T, H]

LOG2E = tl.constexpr(1.4426950408889634)

# Arguments that change from call to call: a kernel must not be compiled anew when they become 1 or divisible by 16.
VARYING = ["scale", "B", "T", "segment_length", "segments", "slots", "piece_length", "pieces", "skipped"]
VARYING += ["tiles", "g_b"]


@triton.jit
def load_columns(pointers, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr):
    """Load a tile in the dtype of the matrix products; zeros in columns beyond WIDTH."""
    if WIDTH % BLOCK == 0:
        return tl.load(pointers).to(LOW)
    return tl.load(pointers, mask=columns < WIDTH, other=0.0).to(LOW)


@triton.jit
def segment_bounds(TABLE, segment, segment_length, T, PACKED: tl.constexpr):
    """First token, end and slot of a segment. TABLE [segments, 3] int32: first token, end, run."""
    if PACKED:
        first = tl.load(TABLE + segment * 3)
        end = tl.load(TABLE + segment * 3 + 1)
        slot = segment + tl.load(TABLE + segment * 3 + 2)
    else:
        first = segment * segment_length
        end = tl.minimum(first + segment_length, T)
        slot = segment
    return first, end, slot


@triton.jit
def place_of_program(B, heads, PARTS: tl.constexpr):
    """Which of the PARTS of its work, batch entry, head and segment a program of the grid has, in this order."""
    bh = (tl.program_id(0) // PARTS) % (B * heads)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)  # far heads and sequences need 64-bit offsets
    return tl.program_id(0) % PARTS, b, h, tl.program_id(0) // (PARTS * B * heads)


@triton.jit
def head_decays(g, C: tl.constexpr):
    """Of a tile of C tokens with decay g each: from its start to every token, from there to its end, over all."""
    c = tl.arange(0, C)
    return tl.exp(g * (c + 1).to(tl.float32)), tl.exp(g * (C - 1 - c).to(tl.float32)), tl.exp(g * C)


@triton.jit
def bounded(log_decay):
    """In fp32, and no stronger than a decay to 0 (2^-150, without subnormal numbers too), so that sums are finite."""
    log_decay = log_decay.to(tl.float32)
    return tl.where(log_decay < -104.0, -104.0, log_decay)


@triton.jit
def token_decays(G, rows, valid, n, stride, C: tl.constexpr):
    """As `head_decays`, but over all the log, for C rows of n, in order; tokens that are not valid do not decay."""
    g = bounded(tl.load(G + rows * stride, mask=valid, other=0.0))
    # What comes after a token is summed from there: a difference of sums would lose digits to strong decays.
    behind = valid & (tl.arange(0, C) < C - 1) & (rows < n - 1)
    g_behind = bounded(tl.load(G + (rows + 1) * stride, mask=behind, other=0.0))
    return tl.exp(tl.cumsum(g, 0)), tl.exp(tl.cumsum(g_behind, 0, reverse=True)), tl.sum(g, 0)


@triton.jit
def head_causal_decays(g, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[query, key] (TRANSPOSED: [key, query]): of the decay g a token what is between two tokens, 0 for later keys."""
    c = tl.arange(0, C)
    distance = c[None, :] - c[:, None] if TRANSPOSED else c[:, None] - c[None, :]
    return tl.exp(tl.where(distance >= 0, g * distance.to(tl.float32), -float("inf")))


@triton.jit(do_not_specialize=VARYING)
def tile_decay_kernel(
    G, OUT, TABLE, B, T, segment_length, tiles, H, g_b, g_t, g_h,
    C: tl.constexpr, HEADS: tl.constexpr, PACKED: tl.constexpr, SPLIT_SUMS: tl.constexpr,
):  # fmt: skip
    """OUT [2, B, H, T]: log-decays from the start of each token's tile, the token's included, and behind it to the end.
    SPLIT_SUMS, [3, B, H, T]: the former as a whole number, and last what is left of them, at most 1/2.

    For the walks, whose programs of a tile would each sum them up; in units of log 2. A tile has C tokens, the last one
    of a segment perhaps fewer. One program per HEADS heads and each of the `tiles` that a segment may have.
    """
    parts = tl.cdiv(H, HEADS)
    h = ((tl.program_id(0) % parts) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    b = ((tl.program_id(0) // parts) % B).to(tl.int64)
    tile = (tl.program_id(0) // (parts * B)) % tiles
    first, end, _ = segment_bounds(TABLE, tl.program_id(0) // (parts * B * tiles), segment_length, T, PACKED)
    if tile * C >= end - first:
        return
    c = tl.arange(0, C)
    token = first.to(tl.int64) + tile * C + c
    mask = (token < end)[:, None] & (h < H)[None, :]
    behind = mask & ((c < C - 1) & (token < end - 1))[:, None]
    g_at = G + b * g_b + token[:, None] * g_t + h[None, :] * g_h
    # In fp64, which costs little here: memory is what this kernel waits for.
    g = bounded(tl.load(g_at, mask=mask, other=0.0)).to(tl.float64) * LOG2E
    summed = tl.cumsum(g, 0)
    # What comes after a token is summed from there: a difference of sums would lose digits to strong decays.
    g_behind = bounded(tl.load(g_at + g_t, mask=behind, other=0.0)) * LOG2E
    at = OUT + (b * H + h[None, :]) * T + token[:, None]
    one = B.to(tl.int64) * H * T
    if SPLIT_SUMS:
        whole = tl.floor(summed + 0.5)
        tl.store(at + 2 * one, (summed - whole).to(tl.float32), mask=mask)
        summed = whole
    tl.store(at, summed.to(tl.float32), mask=mask)
    tl.store(at + one, tl.cumsum(g_behind, 0, reverse=True), mask=mask)


@triton.jit
def differences(sums, TRANSPOSED: tl.constexpr):
    """[query, key] (TRANSPOSED: [key, query]): sums_query - sums_key."""
    if TRANSPOSED:
        return sums[None, :] - sums[:, None]
    return sums[:, None] - sums[None, :]


@triton.jit
def tile_decays(
    DECAYS, B, H, T, rows, last, C: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT_SUMS: tl.constexpr
):  # fmt: skip
    """Of the tile with these rows: as `head_causal_decays`, and as `head_decays`. `last` is its last row.

    With SPLIT_SUMS the difference of two sums has all the digits of what decays between the tokens, however strongly
    those before them do: that of whole numbers is exact. Without, the rounding of both sums is in it, behind the
    strongest decays up to 7e-4 of what it should be: enough for bf16, and one subtraction a pair, not three operations.
    """
    c = tl.arange(0, C)
    one = B.to(tl.int64) * H * T
    sums, leave, total = tl.load(DECAYS + rows), tl.load(DECAYS + one + rows), tl.load(DECAYS + last)
    difference = differences(sums, TRANSPOSED)
    if SPLIT_SUMS:
        rest = tl.load(DECAYS + 2 * one + rows)
        difference += differences(rest, TRANSPOSED)
        sums, total = sums + rest, total + tl.load(DECAYS + 2 * one + last)
    past = c[:, None] <= c[None, :] if TRANSPOSED else c[:, None] >= c[None, :]
    # Above the diagonal the difference is positive: left out before the power, so that no decay > 1 is ever formed.
    causal = tl.exp2(tl.where(past, difference, -float("inf")))
    return causal, tl.exp2(sums), tl.exp2(leave), tl.exp2(total)


@triton.jit
def reach_of_decay(g, n):
    """How many of n tokens next to a border still reach it through a decay g a token: the horizon."""
    horizon = tl.minimum(88.0 / tl.maximum(-g, 1e-9) + 1.0, 1e9)
    return tl.minimum(n, horizon.to(tl.int32))


@triton.jit
def advance(s, log_decay, local):
    """The state behind a run of tokens: exp(log_decay) s + local. Rounded once, here and wherever states are folded."""
    return tl.fma(s, tl.zeros_like(s) + tl.exp(log_decay), local)


@triton.jit(do_not_specialize=VARYING)
def segment_state_kernel(
    Y, Z, NORM, G, PIECES, TOTAL, TABLE,
    scale, B, T, segment_length, segments, slots, H, piece_length, pieces, skipped,
    y_b, y_t, y_h, z_b, z_t, z_h, g_b, g_t, g_h,
    DY: tl.constexpr, DZ: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr, C: tl.constexpr,
    GROUP: tl.constexpr, SHARE: tl.constexpr, NORMALIZE: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """PIECES[b, h, segment, piece] = sum over its tokens (reversed: and the group's query heads) of decayed y^T z.

    Forward y = k, z = v; REVERSE y = q, z = do. TOTAL [B, H, segments, pieces]: summed log-decay, per token only.
    `skipped` segments, 0 or 1, at the end (reversed: the start) are left out. SHARE heads of z have one of y.
    NORMALIZE: with a column behind z whose numbers are 1, and REVERSE those of NORM (normaliser.py), which is not
    among the blocks of columns but a sum beside the products.
    """
    width: tl.constexpr = DZ + 1 if NORMALIZE else DZ
    blocks_z: tl.constexpr = (DZ + BZ - 1) // BZ
    blocks: tl.constexpr = blocks_z * ((DY + BY - 1) // BY)
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks) % (B * H)
    piece = (tl.program_id(0) // (blocks * B * H)) % pieces
    segment = tl.program_id(0) // (blocks * B * H * pieces)
    if REVERSE:
        segment += skipped
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n = end - first
    c = tl.arange(0, C)
    d = (block // blocks_z) * BY + tl.arange(0, BY)
    e = (block % blocks_z) * BZ + tl.arange(0, BZ)
    y_base = Y + b * y_b + first.to(tl.int64) * y_t + (h // SHARE * GROUP) * y_h
    z_base = Z + b * z_b + first.to(tl.int64) * z_t + (h * GROUP) * z_h
    near = piece * piece_length  # tokens between the piece and the border
    far = tl.minimum(n, near + piece_length)
    total = 0.0
    if DECAY == HEAD_DECAY:
        g = bounded(tl.load(G + h * g_h))
        enter, leave, tile_decay = head_decays(g, C)
        weight = enter if REVERSE else leave
        far = tl.minimum(far, reach_of_decay(g, n))
        if near >= far:
            return  # nobody reads it
    if DECAY == TOKEN_DECAY:
        g_base = G + b * g_b + first.to(tl.int64) * g_t + h * g_h
    tiles = tl.cdiv(tl.maximum(far - near, 0), C)
    s = tl.zeros([BY, BZ], tl.float32)
    if NORMALIZE:
        last = tl.zeros([BY], tl.float32)  # column
    for i in tl.range(0, tiles * GROUP, num_stages=STAGES):
        tile = i // GROUP  # the heads of a group are walked within a tile
        distance = near + (tiles - 1 - tile) * C + (c if REVERSE else C - 1 - c)  # of each token to the border
        valid = distance < far
        rows = tl.minimum(distance, n - 1)
        rows = rows if REVERSE else n - 1 - rows
        m = tl.cast(i % GROUP, tl.int64)
        y = load_columns(y_base + m * y_h + rows[:, None] * y_t + d[None, :], d[None, :], DY, BY, LOW)
        z_mask = valid[:, None] if DZ % BZ == 0 else valid[:, None] & (e < DZ)[None, :]
        z = tl.load(z_base + m * z_h + rows[:, None] * z_t + e[None, :], mask=z_mask, other=0.0).to(LOW)
        if DECAY == TOKEN_DECAY:
            enter, leave, tile_total = token_decays(g_base, rows, valid, n, g_t, C)
            weight = enter if REVERSE else leave
            tile_decay = tl.exp(tile_total)
            total += tl.where(i % GROUP == 0, tile_total, 0.0)
        if NORMALIZE:
            factor = tl.where(valid, 1.0, 0.0) if DECAY == NO_DECAY else tl.where(valid, weight, 0.0)
            if REVERSE:
                norm_at = NORM + ((b * H + h) * GROUP + m) * T + first + rows
                factor = factor * tl.load(norm_at)
                z = (z * factor[:, None]).to(LOW)
                factor = factor * tl.load(norm_at + B.to(tl.int64) * (H * GROUP) * T)
            elif DECAY != NO_DECAY:
                z = (z * weight[:, None]).to(LOW)
            if DECAY != NO_DECAY:
                passed = tile_decay if GROUP == 1 else tl.where(i % GROUP == 0, tile_decay, 1.0)
                s, last = s * passed, last * passed
            last += tl.sum(y.to(tl.float32) * factor[:, None], 0)
        elif DECAY != NO_DECAY:
            z = (z * weight[:, None]).to(LOW)
            s = s * (tile_decay if GROUP == 1 else tl.where(i % GROUP == 0, tile_decay, 1.0))
        s = tl.dot(tl.trans(y), z, s, input_precision=PRECISION)
    index = (bh.to(tl.int64) * segments + segment) * pieces + piece
    at = index * (DY * width) + d[:, None] * width + e[None, :]
    tl.store(PIECES + at, s * scale, mask=(d < DY)[:, None] & (e < DZ)[None, :])
    if NORMALIZE:
        tl.store(PIECES + index * (DY * width) + d * width + DZ, last, mask=d < tl.where(block % blocks_z == 0, DY, 0))
    if DECAY == TOKEN_DECAY:
        tl.store(TOTAL + index, total, mask=block == 0)


@triton.jit(do_not_specialize=VARYING)
def scan_kernel(
    G, ENTERING, PIECES, TOTAL, STATE, END, LOG_END, TABLE, RUNS,
    T, segment_length, segments, slots, H, piece_length, pieces, skipped, SIZE,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold the segments of one run into ENTERING [N, H, SIZE] -> END, and keep each border in STATE.

    LOG_END [N, H] is the summed log-decay of the run. RUNS [N + 1] int32, packed only: the first segment of each run.
    One program per run, head and BLOCK elements. ENTERING None is a state of zeros; STATE, END, LOG_END None are not
    wanted. With `skipped` the last segment (reversed: the first) is not folded.
    """
    row = tl.program_id(0) // H
    h = tl.program_id(0) % H
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = j < SIZE
    low, high, head = 0, segments, tl.program_id(0).to(tl.int64)
    base = head * slots
    if PACKED:
        low = tl.load(RUNS + row)
        high = tl.load(RUNS + row + 1)
        head = h.to(tl.int64)
        base = head * slots + row
    if DECAY == HEAD_DECAY:
        g = bounded(tl.load(G + h))
    s = tl.zeros([BLOCK], tl.float32)
    if ENTERING is not None:
        s = tl.load(ENTERING + tl.program_id(0).to(tl.int64) * SIZE + j, mask=mask, other=0.0)
    log_end = 0.0
    folded = high - low - skipped
    chunks = tl.cdiv(pieces, CHUNK)
    # One loop over the pieces of all segments, so that their loads run ahead of the chain of products; and a chunk of
    # pieces at once, since the chain is what takes long.
    for i in tl.range(0, folded * chunks, num_stages=4):
        segment = high - 1 - i // chunks if REVERSE else low + i // chunks
        nearest = (chunks - 1 - i % chunks) * CHUNK  # the chunk nearest to the border last
        if STATE is not None:
            border = segment + 1 if REVERSE else segment
            tl.store(STATE + (base + border) * SIZE + j, s, mask=j < tl.where(i % chunks == 0, SIZE, 0))
        first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
        n = end - first
        far = n
        if DECAY == HEAD_DECAY:
            far = reach_of_decay(g, n)
        used = tl.cdiv(far, piece_length)
        piece = nearest + tl.arange(0, CHUNK)
        at = (head * segments + segment) * pieces + piece
        valid = (piece < used)[:, None] & mask[None, :]
        local = tl.load(PIECES + at[:, None] * SIZE + j[None, :], mask=valid, other=0.0)
        if DECAY == HEAD_DECAY:
            # The tokens of pieces that no one computed come with the farthest chunk that has one.
            behind = tl.where(nearest + CHUNK >= used, n, tl.minimum(n, (nearest + CHUNK) * piece_length))
            log_total = g * tl.where(nearest < used, behind - nearest * piece_length, 0)
            local = local * tl.exp(g * ((piece - nearest) * piece_length))[:, None]
        elif DECAY == TOKEN_DECAY:
            log_total = tl.sum(tl.load(TOTAL + at, mask=piece < used, other=0.0), 0)
            # Of all nearer ones: not a difference of sums, which would lose digits to strong decays.
            nearer = tl.load(TOTAL + at - 1, mask=(piece > nearest) & (piece < used), other=0.0)
            local = local * tl.exp(tl.cumsum(nearer, 0))[:, None]
        local = tl.sum(local, 0)
        if DECAY == NO_DECAY:
            s = s + local
        else:
            log_end += log_total
            s = advance(s, log_total, local)
    if STATE is not None:
        border = high - folded if REVERSE else low + folded
        tl.store(STATE + (base + border) * SIZE + j, s, mask=mask)
    if END is not None:
        tl.store(END + tl.program_id(0).to(tl.int64) * SIZE + j, s, mask=mask)
    if LOG_END is not None:
        tl.store(LOG_END + tl.program_id(0), log_end, mask=tl.program_id(1) == 0)


@triton.jit(do_not_specialize=["units"])
def fold_kernel(ENTERING, UNITS, LOG_DECAY, OUT, units, SIZE, DECAY: tl.constexpr, BLOCK: tl.constexpr):
    """OUT [R, SIZE]: ENTERING [R, SIZE] through the maps UNITS [units, R, SIZE] and LOG_DECAY [units, R], in order.

    Without DECAY nothing fades, and LOG_DECAY is None.
    """
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = j < SIZE
    s = tl.load(ENTERING + row * SIZE + j, mask=mask, other=0.0)
    for i in range(units):
        at = i * tl.num_programs(0).to(tl.int64) + row
        if DECAY:
            s = advance(s, tl.load(LOG_DECAY + at), tl.load(UNITS + at * SIZE + j, mask=mask, other=0.0))
        else:
            s = s + tl.load(UNITS + at * SIZE + j, mask=mask, other=0.0)
    tl.store(OUT + row * SIZE + j, s, mask=mask)
