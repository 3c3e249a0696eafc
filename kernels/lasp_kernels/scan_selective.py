# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Mamba's selective scan in Triton, by the tiles of scan.py.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t        y_t = sum_N h_t C_t
    dh_t = dy_t C_t + c_{t+1}                           c_t = exp(dt_t A) * dh_t

A state has D channels of N numbers. A tile here is [tokens, N, channels], made in registers from what is [tokens, D] or
[tokens, N] in memory; nothing of the size of all states is ever there. What tiles leave and keep lies as [N, D], so
that neighbours in memory are channels, as in all else.

In backward a program goes through some blocks of channels one after the other, and adds up over them what it gives to
the gradients of B and C; other programs' sums, and those of A over tokens, are added up afterwards, in a fixed order.
"""

import triton
import triton.language as tl

from lasp_kernels.scan import (
    MAPS,
    WALK,
    begins_at,
    entering_tile,
    factor_of,
    leave_map,
    leave_prefix,
    log_of_all,
    number_of_program,
    passed,
    row_of,
    scan_rows,
)

VARYING = ["B", "T", "tiles", "groups", "u_b", "dt_b", "B_b", "C_b", "dy_b", "parts"]


@triton.jit
def rows_of(X, t, stride, columns, mask):
    """Rows of a tensor in fp32, zeros outside."""
    return tl.load(X + t * stride + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def logs_of(dt, A, BEGINS, t, valid, PACKED: tl.constexpr):
    """The log-decays [tokens, N, channels] of tokens t [tokens, 1], from dt [tokens, channels] and A [N, channels]."""
    log = dt[:, None, :] * A[None, :, :]
    if PACKED:
        log = tl.where(begins_at(BEGINS, t, valid)[:, :, None], 1.0, log)
    return log


@triton.jit(do_not_specialize=VARYING)
def selective_kernel(
    U, DT, A, IN, OUT, Y, BEGINS, LOG, STATE, PREFIX, ENTERING, STATES, END, FLAGS,
    B, T, tiles, groups, D, N, u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t,
    L: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Forward. U, DT [B, T, D], A [D, N], IN and OUT (what others call B and C) [B, T, N], Y [B, T, D]; else as in
    `recurrence_kernel`, with D * N channels."""
    number, blocks = number_of_program(FLAGS, MODE), tl.cdiv(D, BD)
    part, n = number % (blocks * B), number // (blocks * B)
    b = (part // blocks).to(tl.int64)
    t = n * L + tl.arange(0, L)[:, None]
    here, t = t < T, t.to(tl.int64)
    d = ((part % blocks) * BD + tl.arange(0, BD))[None, :]
    s = tl.arange(0, NP)
    a = tl.load(A + d * N + s[:, None], mask=(d < D) & (s[:, None] < N), other=0.0).to(tl.float32)
    u = rows_of(U + b * u_b, t, u_t, d, here & (d < D))
    dt = rows_of(DT + b * dt_b, t, dt_t, d, here & (d < D))
    into = rows_of(IN + b * B_b, t, B_t, s[None, :], here & (s[None, :] < N))
    log = logs_of(dt, a, BEGINS, t, here, PACKED)
    through, h = scan_rows(factor_of(log, PACKED), (dt * u)[:, None, :] * into[:, :, None], False, PACKED)
    rows, earlier = tl.arange(0, L)[:, None, None], tl.arange(0, GROUP)[:, None, None]
    log, last = log_of_all(log, PACKED), row_of(h, rows, L - 1)
    c, outer = s[None, :, None] * D + d[:, None, :], d[:, None, :] * N + s[None, :, None]
    mask, C = (s[None, :, None] < N) & (d[:, None, :] < D), D * N
    at = b * tiles * C + n.to(tl.int64) * C + c
    flags, prefix_flags = FLAGS + 1 + part * tiles, FLAGS + 1 + blocks * B * tiles + part * groups
    if MODE != WALK:
        leave_map(LOG, STATE, flags + n, at, mask, log, last, MODE)
    if MODE != MAPS:
        PREFIX += b * groups * C
        entering = entering_tile(
            LOG + b * tiles * C, STATE + b * tiles * C, PREFIX, ENTERING, flags, prefix_flags, n, C, c, b * C + outer,
            mask, earlier, GROUP, MODE, PACKED,
        )  # fmt: skip
        leave_prefix(PREFIX, prefix_flags, n, groups, C, c, mask, log, last, entering, GROUP, MODE, PACKED)
        h = passed(through, h, entering, PACKED)
        out = rows_of(OUT + b * C_b, t, C_t, s[None, :], here & (s[None, :] < N))
        y = tl.sum(h * out[:, :, None], 1)
        tl.store(Y + (b * T + t) * D + d, y.to(Y.dtype.element_ty), mask=here & (d < D))
        tl.store(STATES + at, entering, mask=mask)
        if n == tiles - 1:
            tl.store(END + b * C + outer, row_of(h, rows, L - 1), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def selective_maps_kernel(
    DY, DT, A, OUT, BEGINS, LOG, STATE, B, T, tiles, D, N, dy_b, dy_t, dt_b, dt_t, C_b, C_t,
    L: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Backward: what tiles do to the gradient of a state; the n-th in order is the n-th from the end."""
    blocks = tl.cdiv(D, BD)
    part, n = tl.program_id(0) % (blocks * B), tl.program_id(0) // (blocks * B)
    b = (part // blocks).to(tl.int64)
    t = (tiles - 1 - n) * L + tl.arange(0, L)[:, None]
    here, t = t < T, t.to(tl.int64)
    d, s = ((part % blocks) * BD + tl.arange(0, BD))[None, :], tl.arange(0, NP)
    a = tl.load(A + d * N + s[:, None], mask=(d < D) & (s[:, None] < N), other=0.0).to(tl.float32)
    dy = rows_of(DY + b * dy_b, t, dy_t, d, here & (d < D))
    dt = rows_of(DT + b * dt_b, t, dt_t, d, here & (d < D))
    out = rows_of(OUT + b * C_b, t, C_t, s[None, :], here & (s[None, :] < N))
    log, dh = logs_of(dt, a, BEGINS, t, here, PACKED), dy[:, None, :] * out[:, :, None]
    # Element by element what a token passes on is c = exp(log) (dy C + c of the token behind): no row must be shifted.
    own = factor_of(log, PACKED)
    new = own * dh
    if PACKED:
        new = tl.where(own < 0, 0.0, new)
    _, c_of = scan_rows(own, new, True, PACKED)
    rows = tl.arange(0, L)[:, None, None]
    c, mask = s[None, :, None] * D + d[:, None, :], (s[None, :, None] < N) & (d[:, None, :] < D)
    at = b * tiles * D * N + n.to(tl.int64) * D * N + c
    tl.store(LOG + at, log_of_all(log, PACKED), mask=mask)
    tl.store(STATE + at, row_of(c_of, rows, 0), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def selective_gradient_kernel(
    DY, U, DT, A, IN, OUT, DU, DDT, DA, DIN, DOUT, BEGINS, LOG, STATE, PREFIX, ENTERING, STATES, FIRST,
    B, T, tiles, groups, D, N, parts, dy_b, dy_t, u_b, u_t, dt_b, dt_t, B_b, B_t, C_b, C_t,
    L: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Backward. DU, DDT [B, T, D]; DA [B, tiles, N, D]; DIN, DOUT [parts, B, T, N], of BLOCKS blocks of channels each.

    STATES are what entered the tiles in forward, FIRST [B, D, N] the gradient of the state before all tokens.
    """
    part, n = tl.program_id(0) % parts, tl.program_id(0) // parts % tiles
    b, tile = (tl.program_id(0) // parts // tiles).to(tl.int64), tiles - 1 - n
    s, rows = tl.arange(0, NP), tl.arange(0, L)[:, None, None]
    row = tl.arange(0, L)[:, None]
    t, earlier = tile * L + row, tl.arange(0, GROUP)[:, None, None]
    here, behind, before, t = t < T, (t + 1 < T) & (row < L - 1), (t < T) & (row > 0), t.to(tl.int64)
    IN, OUT, C = IN + b * B_b, OUT + b * C_b, D * N
    into = rows_of(IN, t, B_t, s[None, :], here & (s[None, :] < N))
    out = rows_of(OUT, t, C_t, s[None, :], here & (s[None, :] < N))
    into_before = rows_of(IN, t - 1, B_t, s[None, :], before & (s[None, :] < N))
    d_into, d_out = tl.zeros([L, NP], tl.float32), tl.zeros([L, NP], tl.float32)
    for block in range(BLOCKS):
        d = ((part * BLOCKS + block) * BD + tl.arange(0, BD))[None, :]
        wide = d < D
        a = tl.load(A + d * N + s[:, None], mask=wide & (s[:, None] < N), other=0.0).to(tl.float32)
        dy = rows_of(DY + b * dy_b, t, dy_t, d, here & wide)
        u = rows_of(U + b * u_b, t, u_t, d, here & wide)
        dt = rows_of(DT + b * dt_b, t, dt_t, d, here & wide)
        dt_behind = rows_of(DT + b * dt_b, t + 1, dt_t, d, behind & wide)
        dt_before = rows_of(DT + b * dt_b, t - 1, dt_t, d, before & wide)
        u_before = rows_of(U + b * u_b, t - 1, u_t, d, before & wide)
        c, outer = s[None, :, None] * D + d[:, None, :], d[:, None, :] * N + s[None, :, None]
        mask = (s[None, :, None] < N) & (d[:, None, :] < D)
        entering = entering_tile(
            LOG + b * tiles * C, STATE + b * tiles * C, PREFIX + b * groups * C, ENTERING, LOG, LOG, n, C, c,
            b * C + outer, mask, earlier, GROUP, WALK, PACKED,
        )  # fmt: skip
        through, dh = scan_rows(
            factor_of(logs_of(dt_behind, a, BEGINS, t + 1, behind, PACKED), PACKED), dy[:, None, :] * out[:, :, None],
            True, PACKED,
        )  # fmt: skip
        dh = passed(through, dh, entering, PACKED)
        # The state before each token: that before the tile, then each token's before it.
        at = b * tiles * C + tile.to(tl.int64) * C + c
        state = tl.load(STATES + at, mask=mask, other=0.0)
        new = (dt_before * u_before)[:, None, :] * into_before[:, :, None]
        _, h = scan_rows(
            factor_of(logs_of(dt_before, a, BEGINS, t - 1, before, PACKED), PACKED), tl.where(rows > 0, new, state),
            False, PACKED,
        )  # fmt: skip
        log = logs_of(dt, a, BEGINS, t, here, PACKED)
        h = factor_of(log, PACKED) * h
        if PACKED:
            h = tl.where(log > 0, 0.0, h)
        d_log = dh * h  # of the state that came through to the token
        h += (dt * u)[:, None, :] * into[:, :, None]
        d_out += tl.sum(h * dy[:, None, :], 2)
        d_into += tl.sum(dh * (dt * u)[:, None, :], 2)
        d_new = tl.sum(dh * into[:, :, None], 1)
        at_d = (b * T + t) * D + d
        tl.store(DU + at_d, (dt * d_new).to(DU.dtype.element_ty), mask=here & wide)
        d_dt = u * d_new + tl.sum(d_log * a[None, :, :], 1)
        tl.store(DDT + at_d, d_dt.to(DDT.dtype.element_ty), mask=here & wide)
        tl.store(DA + at, tl.sum(d_log * dt[:, None, :], 0, keep_dims=True), mask=mask)
        if n == tiles - 1:
            first = row_of(dh, rows, 0) * row_of(factor_of(log, PACKED), rows, 0)
            if PACKED:
                first = tl.where(row_of(log, rows, 0) > 0, 0.0, first)
            tl.store(FIRST + b * C + outer, first, mask=mask)
    at_n = ((part * B + b) * T + t) * N + s[None, :]
    tl.store(DIN + at_n, d_into, mask=here & (s[None, :] < N))
    tl.store(DOUT + at_n, d_out, mask=here & (s[None, :] < N))
