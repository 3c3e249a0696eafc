# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Mamba's selective scan in Triton, by the tiles of scan.py.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t        y_t = sum_N h_t C_t
    dh_t = dy_t C_t + c_{t+1}                           c_t = exp(dt_t A) * dh_t

A state has D channels of N numbers; a program has [N, S, channels] of them, so that a thread has all N of a channel in
one strip. The states of single tokens are in registers only. So that these hold them, inputs are read again for each
walk, from the caches, and backward makes the states before V tokens at a time again, from the last ones of a strip to
the first. What tiles leave and keep lies as [N, D], so that neighbours in memory are channels, as in all else.

The gradients of B and C are sums over channels, and that of A over tokens: each program leaves its own, and they are
added up afterwards, in a fixed order.
"""

import triton
import triton.language as tl

from lasp_kernels.scan import (
    MAPS,
    WALK,
    and_one,
    entering_strips,
    entering_tile,
    factor_of,
    leave_map,
    leave_prefix,
    map_of_strips,
    number_of_program,
    passed,
    strip_of,
    through_token,
)

VARYING = ["B", "T", "tiles", "groups"]


@triton.jit
def token_of(X, t, left, stride, columns, mask):
    """The t-th of a tile, in fp32; zeros behind the last of the `left` ones."""
    return tl.load(X + t * stride + columns, mask=mask & (t < left), other=0.0).to(tl.float32)


@triton.jit
def log_of_token(dt, begins, a, PACKED: tl.constexpr):
    """Its log-decays [N, S, channels], from dt [S, channels]; `begins` [S, 1] is not 0 where a document does."""
    log = dt[None, :, :] * a
    if PACKED:
        log = tl.where((begins != 0)[None, :, :], 1.0, log)
    return log


@triton.jit
def begins_of(BEGINS, t, left, PACKED: tl.constexpr):
    """Whether documents begin at a token."""
    if PACKED:
        return tl.load(BEGINS + t, mask=t < left, other=0).to(tl.int32)
    return t * 0


@triton.jit
def next_state(h, u, dt, into, begins, a, PACKED: tl.constexpr):
    """Behind a token: u and dt [S, channels], into [N, S, 1]."""
    return passed(factor_of(log_of_token(dt, begins, a, PACKED), PACKED), (dt * u)[None, :, :] * into, h, PACKED)


@triton.jit(do_not_specialize=VARYING)
def selective_kernel(
    U_, DT, A, IN, OUT, Y, BEGINS, LOG, STATE, PREFIX, ENTERING, STATES, END, FLAGS,
    B, T, tiles, groups, D, N, u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t,
    S: tl.constexpr, U: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Forward. U_ (what others call u) and DT [B, T, D], A [D, N], IN and OUT (B and C) [B, T, N], Y [B, T, D]; else as
    in `recurrence_kernel`, with D * N channels."""
    number, blocks = number_of_program(FLAGS, MODE), tl.cdiv(D, BD)
    part, n = number % (blocks * B), number // (blocks * B)
    b, start = (part // blocks).to(tl.int64), n.to(tl.int64) * (S * U)
    d, strips, left = ((part % blocks) * BD + tl.arange(0, BD))[None, :], tl.arange(0, S)[:, None], T - start
    s3, d3, strips3, wide = tl.arange(0, NP)[:, None, None], d[None, :, :], strips[None, :, :], d < D
    mask, narrow, C = (s3 < N) & (d3 < D), s3 < N, D * N
    U_, DT = U_ + b * u_b + start * u_t, DT + b * dt_b + start * dt_t
    IN, OUT = IN + b * B_b + start * B_t, OUT + b * C_b + start * C_t
    if PACKED:
        BEGINS += start
    a = tl.load(A + d3 * N + s3, mask=mask, other=0.0).to(tl.float32)
    h, total, document = tl.zeros([NP, S, BD], tl.float32), tl.zeros([S, BD], tl.float32), strips * 0
    for i in range(U):
        t, t3 = strips * U + i, strips3 * U + i
        u, dt = token_of(U_, t, left, u_t, d, wide), token_of(DT, t, left, dt_t, d, wide)
        into, begins = token_of(IN, t3, left, B_t, s3, narrow), begins_of(BEGINS, t, left, PACKED)
        h = next_state(h, u, dt, into, begins, a, PACKED)
        total += dt
        document += begins
    logs = log_of_token(total, document, a, PACKED)
    log, state = map_of_strips(logs, h, strips3, S, 1, False, PACKED)
    c, outer = s3 * D + d3, d3 * N + s3
    own = n.to(tl.int64) * C + c
    flags, prefix_flags = FLAGS + 1 + part * tiles, FLAGS + 1 + blocks * B * tiles + part * groups
    if MODE != WALK:
        leave_map(LOG + b * tiles * C, STATE + b * tiles * C, flags + n, own, mask, log, state, MODE)
    if MODE != MAPS:
        PREFIX += b * groups * C
        entering = entering_tile(
            LOG + b * tiles * C, STATE + b * tiles * C, PREFIX, ENTERING, flags, prefix_flags, n, C, c, b * C + outer,
            mask, GROUP, MODE, PACKED,
        )  # fmt: skip
        leave_prefix(PREFIX, prefix_flags, n, groups, C, c, mask, log, state, entering, GROUP, MODE, PACKED)
        h = entering_strips(logs, h, strips3, entering, S, 1, False, PACKED)
        tl.store(STATES + ((b * tiles + n) * S + strips3) * C + c, h, mask=mask)
        Y += (b * T + start) * D
        for i in range(U):
            t, t3 = strips * U + i, strips3 * U + i
            u, dt = token_of(U_, t, left, u_t, d, wide), token_of(DT, t, left, dt_t, d, wide)
            into, begins = token_of(IN, t3, left, B_t, s3, narrow), begins_of(BEGINS, t, left, PACKED)
            h = next_state(h, u, dt, into, begins, a, PACKED)
            y = tl.sum(h * token_of(OUT, t3, left, C_t, s3, narrow), 0)
            tl.store(Y + t * D + d, y.to(Y.dtype.element_ty), mask=wide & (t < left))
        if n == tiles - 1:
            tl.store(END + b * C + outer, strip_of(h, strips3, S - 1, 1), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def selective_gradient_kernel(
    DY, U_, DT, A, IN, OUT, DU, DDT, DA, DIN, DOUT, BEGINS, LOG, STATE, PREFIX, ENTERING, STATES, FIRST, FLAGS,
    B, T, tiles, groups, D, N, dy_b, dy_t, u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t,
    S: tl.constexpr, U: tl.constexpr, V: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Backward. DU, DDT [B, T, D]; DA [B, tiles, N, D]; DIN, DOUT [blocks of channels, B, T, N].

    STATES are what entered the strips in forward, FIRST [B, D, N] the gradient of the state before all tokens.
    """
    number, blocks = number_of_program(FLAGS, MODE), tl.cdiv(D, BD)
    part, n = number % (blocks * B), number // (blocks * B)
    b, tile = (part // blocks).to(tl.int64), (tiles - 1 - n).to(tl.int64)
    start = tile * (S * U)
    d, strips, left = ((part % blocks) * BD + tl.arange(0, BD))[None, :], tl.arange(0, S)[:, None], T - start
    s3, d3, strips3, wide = tl.arange(0, NP)[:, None, None], d[None, :, :], strips[None, :, :], d < D
    mask, narrow, C = (s3 < N) & (d3 < D), s3 < N, D * N
    DY, U_, DT = DY + b * dy_b + start * dy_t, U_ + b * u_b + start * u_t, DT + b * dt_b + start * dt_t
    IN, OUT = IN + b * B_b + start * B_t, OUT + b * C_b + start * C_t
    if PACKED:
        BEGINS += start
    a = tl.load(A + d3 * N + s3, mask=mask, other=0.0).to(tl.float32)
    back, total, document = tl.zeros([NP, S, BD], tl.float32), tl.zeros([S, BD], tl.float32), strips * 0
    for i in range(U):
        t, t3 = strips * U + (U - 1 - i), strips3 * U + (U - 1 - i)
        dy, dt = token_of(DY, t, left, dy_t, d, wide), token_of(DT, t, left, dt_t, d, wide)
        out, begins = token_of(OUT, t3, left, C_t, s3, narrow), begins_of(BEGINS, t, left, PACKED)
        back = through_token(log_of_token(dt, begins, a, PACKED), dy[None, :, :] * out + back, PACKED)
        total += dt
        document += begins
    logs = log_of_token(total, document, a, PACKED)
    log, first = map_of_strips(logs, back, strips3, S, 1, True, PACKED)
    c, outer = s3 * D + d3, d3 * N + s3
    own = n.to(tl.int64) * C + c
    flags, prefix_flags = FLAGS + 1 + part * tiles, FLAGS + 1 + blocks * B * tiles + part * groups
    if MODE != WALK:
        leave_map(LOG + b * tiles * C, STATE + b * tiles * C, flags + n, own, mask, log, first, MODE)
    if MODE != MAPS:
        PREFIX += b * groups * C
        entering = entering_tile(
            LOG + b * tiles * C, STATE + b * tiles * C, PREFIX, ENTERING, flags, prefix_flags, n, C, c, b * C + outer,
            mask, GROUP, MODE, PACKED,
        )  # fmt: skip
        leave_prefix(PREFIX, prefix_flags, n, groups, C, c, mask, log, first, entering, GROUP, MODE, PACKED)
        back = entering_strips(logs, back, strips3, entering, S, 1, True, PACKED)
        of_part = (((part % blocks) * B + b) * T + start) * N
        DU, DDT, DIN, DOUT = DU + (b * T + start) * D, DDT + (b * T + start) * D, DIN + of_part, DOUT + of_part
        d_a = tl.zeros([NP, S, BD], tl.float32)
        for piece in range(U // V):
            before = U - V * (piece + 1)  # tokens of a strip
            h = tl.load(STATES + ((b * tiles + tile) * S + strips3) * C + c, mask=mask, other=0.0)
            for i in range(before):
                t, t3 = strips * U + i, strips3 * U + i
                u, dt = token_of(U_, t, left, u_t, d, wide), token_of(DT, t, left, dt_t, d, wide)
                into, begins = token_of(IN, t3, left, B_t, s3, narrow), begins_of(BEGINS, t, left, PACKED)
                h = next_state(h, u, dt, into, begins, a, PACKED)
            befores = ()
            for v in tl.static_range(V):
                befores = and_one(befores, h)
                t, t3 = strips * U + before + v, strips3 * U + before + v
                u, dt = token_of(U_, t, left, u_t, d, wide), token_of(DT, t, left, dt_t, d, wide)
                into, begins = token_of(IN, t3, left, B_t, s3, narrow), begins_of(BEGINS, t, left, PACKED)
                h = next_state(h, u, dt, into, begins, a, PACKED)
                d_out = tl.sum(h * token_of(DY, t, left, dy_t, d, wide)[None, :, :], 2, keep_dims=True)
                tl.store(DOUT + t3 * N + s3, d_out, mask=narrow & (t3 < left))
            for v in tl.static_range(V):
                t, t3 = strips * U + before + (V - 1 - v), strips3 * U + before + (V - 1 - v)
                u, dt = token_of(U_, t, left, u_t, d, wide), token_of(DT, t, left, dt_t, d, wide)
                dy, begins = token_of(DY, t, left, dy_t, d, wide), begins_of(BEGINS, t, left, PACKED)
                dh = dy[None, :, :] * token_of(OUT, t3, left, C_t, s3, narrow) + back
                log_here = log_of_token(dt, begins, a, PACKED)
                back = through_token(log_here, dh, PACKED)
                d_log = back * befores[V - 1 - v]
                if PACKED:
                    d_log = tl.where(log_here > 0, 0.0, d_log)
                d_in = tl.sum(dh * (dt * u)[None, :, :], 2, keep_dims=True)
                tl.store(DIN + t3 * N + s3, d_in, mask=narrow & (t3 < left))
                d_new, at = tl.sum(dh * token_of(IN, t3, left, B_t, s3, narrow), 0), t * D + d
                tl.store(DU + at, (dt * d_new).to(DU.dtype.element_ty), mask=wide & (t < left))
                d_dt = u * d_new + tl.sum(d_log * a, 0)
                tl.store(DDT + at, d_dt.to(DDT.dtype.element_ty), mask=wide & (t < left))
                d_a += d_log * dt[None, :, :]
        tl.store(DA + (b * tiles + tile) * C + c, tl.sum(d_a, 1, keep_dims=True), mask=mask)
        if n == tiles - 1:
            tl.store(FIRST + b * C + outer, strip_of(back, strips3, 0, 1), mask=mask)
