# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The gradients of the delta rule with a decay per channel, all tiles at once.

The walks leave the state before each tile and its gradient behind each, in the dtype of the products:

    STATE, GRADIENT [B, H, all_tiles, V, K]

so that nothing goes from tile to tile here, and a program is done with few registers. It holds all transposed,
[channels, tokens]: what a decay does to a channel is then a number of a row, and a block of 16 tokens is known when the
kernel is compiled, so that no token outside of it costs anything. q>, k>, k<, STEPS: see delta_channel.py.

The gradient of a decay needs no sum from the end of a stretch. Just behind a tile it is, for each channel,

    sum over V of S' dS'    with S' = exp(G_C) S + K_^T U, so    exp(G_C) sum (S dS') + sum over tokens of K_ (U dS'^T)

and the last sum's terms are those that x takes off again, token by token.
"""

import triton
import triton.language as tl

from lasp_kernels.channel import first_tile, load_tile
from lasp_kernels.delta_channel import KINDS, in_other_blocks
from lasp_kernels.delta_kernels import VARYING_HERE
from lasp_kernels.state import place_of_program, segment_bounds


@triton.jit
def turned(x, TIME: tl.constexpr, PRECISION: tl.constexpr):
    """[C, channels] as [channels, C] in fp32, by a product with the identity.

    Exact, and it leaves the numbers where the other products leave theirs: what is worked out from both needs no way
    through shared memory, neither for itself nor as the first operand of a product. At another TIME it is another
    product, by 2^TIME: so the compiler makes it again, which is cheap, and does not keep the first in registers.
    """
    c = tl.arange(0, x.shape[0])
    one = tl.where(c[:, None] == c[None, :], 1.0 * (1 << TIME), 0.0).to(x.dtype)
    out = tl.dot(tl.trans(x), one, input_precision=PRECISION)
    return out if TIME == 0 else out * (1.0 / (1 << TIME))


@triton.jit
def of_blocks(steps, d, D: tl.constexpr, C: tl.constexpr):
    """[channels, tokens]: of each token the factors of its block."""
    block = (tl.arange(0, C) // 16)[None, :]
    out = tl.zeros([d.shape[0], C], tl.float32)
    for r in tl.static_range(C // 16):
        out = tl.where(block == r, tl.load(steps + r * D + d, mask=d < D, other=0.0)[:, None], out)
    return out


@triton.jit
def reads(
    earlier, p, steps, d, d_mask, D: tl.constexpr, C: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """[channels, C]: what each query gets from the keys up to it, by weights p [query, key]: block by block, from the
    keys as seen from there."""
    blocks: tl.constexpr = C // 16
    block = (tl.arange(0, C) // 16)[None, :]
    out, factor = tl.zeros([d.shape[0], C], tl.float32), tl.zeros([d.shape[0], C], tl.float32)
    for r in tl.static_range(blocks):
        if r > 0:
            far = tl.load(steps + r * D + d, mask=d_mask, other=0.0)[:, None]
            near = tl.load(steps + (blocks + r) * D + d, mask=d_mask, other=0.0)[:, None]
            factor = tl.where(block < r - 1, factor * far, tl.where(block == r - 1, near, 1.0))
        else:
            factor = tl.where(block == r, 1.0, factor)
        y = tl.where(block <= r, earlier * factor, 0.0).to(LOW)
        out = tl.where(block == r, tl.dot(y, tl.trans(p), input_precision=PRECISION), out)
    return out


@triton.jit(do_not_specialize=VARYING_HERE)
def delta_tile_gradient_kernel(
    Q_LATER, K_LATER, K_EARLIER, LATER, EARLIER, STEPS, TOTAL, FLAG, U, DO, DV_, STATE, GRADIENT, DQ, DK_, DG, TABLE,
    scale, B, T, segment_length, tiles, all_tiles, H, do_b, do_t, do_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """DQ, DK_ and DG [B, T, H, DK] of a tile and BK channels. In flagged tiles they have what
    `delta_flagged_gradient_kernel` left, DG its x."""
    blocks: tl.constexpr = C // 16
    column_blocks: tl.constexpr = (DK + BK - 1) // BK
    part, b, h, rest = place_of_program(B, H, column_blocks)
    tile, segment = rest % tiles, rest // tiles
    first, end, _ = segment_bounds(TABLE, segment, segment_length, T, PACKED)
    n = end - first
    if tile * C >= n:
        return
    start = first.to(tl.int64)
    c, e = tl.arange(0, C), tl.arange(0, BV)
    d = part * BK + tl.arange(0, BK)
    d_mask = d < DK
    row, block = tile * C + c, (c // 16)[None, :]
    value_at, key_at = ((b * T + start) * H + h) * DV, ((b * T + start) * H + h) * DK
    tile_at = first_tile(b, h, H, first, segment, all_tiles, C) + tile
    kind: tl.constexpr = blocks * DK
    steps, flag = STEPS + tile_at * (KINDS * kind), tl.load(FLAG + tile_at)

    # The state before the tile, the gradient of the one behind it, and (`behind`) that of a decay just behind the tile.
    state_at = tile_at * (DK * DV) + e[None, :] * DK + d[:, None]
    inside = d_mask[:, None] & (e < DV)[None, :]
    s = tl.load(STATE + state_at, mask=inside, other=0.0).to(LOW)
    ds = tl.load(GRADIENT + state_at, mask=inside, other=0.0).to(LOW)
    total = tl.load(TOTAL + tile_at * DK + d, mask=d_mask, other=0.0)
    behind = tl.exp2(total) * tl.sum(s.to(tl.float32) * ds.to(tl.float32), 1)

    # Weights [query, key], of q and of k.
    u = load_tile(U + value_at, row, H * DV, e, n, DV, LOW)
    do = load_tile(DO + b * do_b + start * do_t + h * do_h, row, do_t, e, n, DV, LOW)
    dv = load_tile(DV_ + value_at, row, H * DV, e, n, DV, LOW)
    p = tl.dot(do, tl.trans(u), input_precision=PRECISION)
    p = in_other_blocks(tl.where(c[:, None] >= c[None, :], p, 0.0), flag, C).to(LOW)
    a = tl.dot(dv, tl.trans(u), input_precision=PRECISION)
    a = in_other_blocks(tl.where(c[:, None] > c[None, :], -a, 0.0), flag, C).to(LOW)

    # What each key writes: what is behind the tile, and the queries from block r on, as seen from there.
    write = tl.dot(ds, tl.trans(u), input_precision=PRECISION) * of_blocks(steps + 4 * kind, d, DK, C)
    earlier = load_tile(K_EARLIER + key_at, row, H * DK, d, n, DK, LOW)
    q = load_tile(Q_LATER + key_at, row, H * DK, d, n, DK, LOW)
    k = load_tile(K_LATER + key_at, row, H * DK, d, n, DK, LOW)
    behind += tl.sum(turned(earlier, 0, PRECISION) * write, 1)
    q_turned, k_turned = turned(q, 0, PRECISION), turned(k, 0, PRECISION)
    factor = tl.zeros([BK, C], tl.float32)
    for r in tl.static_range(blocks - 1, -1, -1):
        if r + 1 < blocks:
            far = tl.load(steps + 2 * kind + r * DK + d, mask=d_mask, other=0.0)[:, None]
            near = tl.load(steps + kind + (r + 1) * DK + d, mask=d_mask, other=0.0)[:, None]
            factor = tl.where(block > r + 1, factor * far, tl.where(block == r + 1, near, 1.0))
        else:
            factor = tl.where(block == r, 1.0, factor)
        x = tl.where(block >= r, q_turned * factor, 0.0).to(LOW)
        seen = tl.dot(x, p, input_precision=PRECISION)
        x = tl.where(block >= r, k_turned * factor, 0.0).to(LOW)
        seen = tl.dot(x, a, seen, input_precision=PRECISION)
        write += tl.where(block == r, seen, 0.0)
    early = turned(earlier, 1, PRECISION)
    x = -early * write
    factors = load_tile(EARLIER + key_at, row, H * DK, d, n, DK, LOW)
    dk = write * turned(factors, 0, PRECISION)

    # What each query reads, and each key as a query of those before it.
    at, mask = key_at + row[None, :] * (H * DK) + d[:, None], (row < n)[None, :] & d_mask[:, None]
    enter = of_blocks(steps + 3 * kind, d, DK, C)
    factors = load_tile(LATER + key_at, row, H * DK, d, n, DK, LOW)
    dq = reads(early, p, steps, d, d_mask, DK, C, LOW, PRECISION)
    dq += tl.dot(s, tl.trans(do), input_precision=PRECISION) * enter
    x += turned(q, 1, PRECISION) * dq
    dq = dq * (turned(factors, 0, PRECISION) * scale)
    if flag != 0:
        dq += tl.load(DQ + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(DQ + at, dq.to(DQ.dtype.element_ty), mask=mask)

    read = reads(early, a, steps, d, d_mask, DK, C, LOW, PRECISION)
    read -= tl.dot(s, tl.trans(dv), input_precision=PRECISION) * enter
    x += turned(k, 1, PRECISION) * read
    dk += read * turned(factors, 1, PRECISION)
    if flag != 0:
        x += tl.load(DG + at, mask=mask, other=0.0)
        dk += tl.load(DK_ + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(DK_ + at, dk.to(DK_.dtype.element_ty), mask=mask)
    if SPLIT:  # two numbers of 8 bits and a product with ones: a scan would go between threads
        ones = tl.where(c[:, None] >= c[None, :], 1.0, 0.0).to(LOW)
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        x = tl.dot(high.to(LOW), ones, input_precision=PRECISION)
        x = tl.dot(low.to(LOW), ones, x, input_precision=PRECISION)
    else:
        x = tl.cumsum(x, 1, reverse=True)
    tl.store(DG + at, x + behind[:, None], mask=mask)
