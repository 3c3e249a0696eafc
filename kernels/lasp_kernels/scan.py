# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Recurrences of channels that decay each by itself, in Triton: what they share, and the plain one (HGRN, RG-LRU).

    h_t = exp(log_decay_t) * h_{t-1} + x_t          dh_t = dy_t + c_{t+1}      c_t = exp(log_decay_t) * dh_t
                                                    dx_t = dh_t                d log_decay_t = c_t * h_{t-1}

A program has a *tile* of tokens and some channels, all in registers. It reads them once, scans them as if zero came
in, and leaves for the others what its tokens do to a state that passes: S -> exp(log) * S + state. Then it needs what
really comes in, and can write its results:

    tiles      0  1 .. 15 | 16 17 .. 31 | 32 ..      GROUP = 16 of them are a group
    entering   E0         | E1          | E2 ..      the last program of a group makes what enters the next group
    tile 18                 E1, then the maps of 16 and 17

What a tile waits for is the maps of those before it in its group, which run beside it, and one number a channel for
the group, so the chain from one end of the sequence to the other has a link for each 16 tiles. All is put together in
the same order each time: results are the same bits, whoever came first. Programs number themselves as they begin, so
who is waited for has begun. That is MODE ALONE, where nothing comes from elsewhere in between. With other ranks before
(in backward: behind) there are three launches: MAPS leaves the maps, `prefix_kernel` what enters groups, first from
zero, for the others, then from what they sent; and WALK reads the tiles again, and needs to wait for nobody.

Backward is the same from the last tile to the first; n counts tiles in the order in which they pass something on. The
states before its tokens it makes again, from the one that entered the tile, which forward kept: 1/64 of the tokens'.

A packed document that begins lets nothing pass, not even NaN: its factor is -1, its log 1, which no decay can be.
"""

import triton
import triton.language as tl

ALONE, MAPS, WALK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Arguments that change from call to call: a kernel must not be compiled anew when they become 1 or divisible by 16.
VARYING = ["B", "T", "tiles", "groups", "x_b", "g_b", "dy_b"]


@triton.jit
def join(a1, s1, a2, s2):
    """S -> a1 S + s1, then S -> a2 S + s2."""
    return a1 * a2, a2 * s1 + s2


@triton.jit
def join_documents(a1, s1, a2, s2):
    """The same, where a factor of -1 lets nothing pass."""
    begins = a2 < 0
    return tl.where(begins | (a1 < 0), -1.0, a1 * a2), tl.where(begins, s2, a2 * s1 + s2)


@triton.jit
def scan_rows(a, s, REVERSE: tl.constexpr, PACKED: tl.constexpr):
    """All maps up to each row (reversed: from the last one back to it), as one."""
    if PACKED:
        return tl.associative_scan((a, s), 0, join_documents, reverse=REVERSE)
    return tl.associative_scan((a, s), 0, join, reverse=REVERSE)


@triton.jit
def passed(a, s, entering, PACKED: tl.constexpr):
    """What is behind a map when this enters it."""
    behind = a * entering + s
    if PACKED:
        behind = tl.where(a < 0, s, behind)
    return behind


@triton.jit
def factor_of(log, PACKED: tl.constexpr):
    """Of a map, from its log."""
    a = tl.exp(log)
    if PACKED:
        a = tl.where(log > 0, -1.0, a)
    return a


@triton.jit
def log_of_all(log, PACKED: tl.constexpr):
    """Of the maps in all rows, as one."""
    total = tl.sum(log, 0, keep_dims=True)
    if PACKED:
        total = tl.where(tl.max(log, 0, keep_dims=True) > 0, 1.0, total)
    return total


@triton.jit
def row_of(x, rows, row):
    """One of them; the others may be NaN."""
    return tl.sum(tl.where(rows == row, x, 0.0), 0, keep_dims=True)


@triton.jit
def number_of_program(FLAGS, MODE: tl.constexpr):
    """In the order in which programs begin, if they wait for each other."""
    if MODE == ALONE:
        return tl.atomic_add(FLAGS, 1)
    return tl.program_id(0)


@triton.jit
def raise_flag(FLAG):
    """Behind what all threads of this program have stored."""
    tl.debug_barrier()
    tl.atomic_xchg(FLAG, 1, sem="release")


@triton.jit
def wait_for(FLAGS, count, MOST: tl.constexpr):
    """Until the first `count` flags are raised; then what was stored before them can be read past the L1 cache."""
    n = tl.arange(0, MOST)
    raised = tl.sum(tl.load(FLAGS + n, mask=n < count, other=0, volatile=True), 0)
    while raised < count:
        raised = tl.sum(tl.load(FLAGS + n, mask=n < count, other=0, volatile=True), 0)
    tl.atomic_add(FLAGS + n, tl.zeros([MOST], tl.int32), mask=n < count, sem="acquire")


@triton.jit
def leave_map(LOG, STATE, FLAG, at, mask, log, state, MODE: tl.constexpr):
    """What a tile does to a state that passes, for the others."""
    tl.store(LOG + at, log, mask=mask)
    tl.store(STATE + at, state, mask=mask)
    if MODE == ALONE:
        raise_flag(FLAG)


@triton.jit
def entering_tile(
    LOG, STATE, PREFIX, ENTERING, FLAGS, PREFIX_FLAGS, n, C, c, outer, mask, earlier,
    GROUP: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The state that enters the n-th tile; `earlier` are the numbers up to GROUP as rows, c the channels of a state.

    `outer` are the same channels where others put them.
    """
    group, count = n // GROUP, n % GROUP
    if MODE == ALONE:
        wait_for(FLAGS + group * GROUP, count, GROUP)
    at, before = (group * GROUP + earlier).to(tl.int64) * C + c, mask & (earlier < count)
    log = tl.load(LOG + at, mask=before, other=0.0, cache_modifier=".cg")
    state = tl.load(STATE + at, mask=before, other=0.0, cache_modifier=".cg")
    _, state = scan_rows(factor_of(log, PACKED), state, False, PACKED)
    log = log_of_all(log, PACKED)
    if ENTERING is None:  # noqa: SIM108  # a choice of the compiler
        prefix = tl.zeros_like(log)
    else:
        prefix = tl.load(ENTERING + outer, mask=mask, other=0.0)
    if group > 0:
        if MODE == ALONE:
            wait_for(PREFIX_FLAGS + group, 1, 1)
        prefix = tl.load(PREFIX + group.to(tl.int64) * C + c, mask=mask, other=0.0, cache_modifier=".cg")
    return passed(factor_of(log, PACKED), row_of(state, earlier, GROUP - 1), prefix, PACKED)


@triton.jit
def leave_prefix(
    PREFIX, PREFIX_FLAGS, n, groups, C, c, mask, log, state, entering,
    GROUP: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The last tile of a group says what enters the next one, if there is one."""
    if MODE == ALONE:
        group = n // GROUP + 1
        if (n % GROUP == GROUP - 1) & (group < groups):
            behind = passed(factor_of(log, PACKED), state, entering, PACKED)
            tl.store(PREFIX + group.to(tl.int64) * C + c, behind, mask=mask)
            raise_flag(PREFIX_FLAGS + group)


@triton.jit(do_not_specialize=["tiles", "groups"])
def prefix_kernel(
    LOG, STATE, PREFIX, ENTERING, END, LOG_END, tiles, groups, C, D,
    BC: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What enters each group of tiles, and what is behind all: the state, and the log of the map that all are.

    PREFIX [B, groups, C], what enters the first group left out; a state has D channels of C / D numbers, which the
    kernels keep number by number, and others channel by channel: ENTERING and END [B, C]. LOG_END too, -inf where a
    document begins.
    """
    b = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    mask, outer = c < C, b * C + (c % D) * (C // D) + c // D
    earlier = tl.arange(0, GROUP)[:, None]
    LOG, STATE = LOG + b * tiles * C, STATE + b * tiles * C
    if ENTERING is None:  # noqa: SIM108  # a choice of the compiler
        state = tl.zeros([1, BC], tl.float32)
    else:
        state = tl.load(ENTERING + outer, mask=mask, other=0.0)
    whole = tl.zeros([1, BC], tl.float32)
    here = mask & (earlier < tiles)
    logs = tl.load(LOG + earlier * C + c, mask=here, other=0.0)
    states = tl.load(STATE + earlier * C + c, mask=here, other=0.0)
    for group in range(groups):
        log = log_of_all(logs, PACKED)
        _, local = scan_rows(factor_of(logs, PACKED), states, False, PACKED)
        n = (group + 1) * GROUP + earlier  # read already, while the scan is under way
        at, here = n.to(tl.int64) * C + c, mask & (n < tiles)
        logs = tl.load(LOG + at, mask=here, other=0.0)
        states = tl.load(STATE + at, mask=here, other=0.0)
        state = passed(factor_of(log, PACKED), row_of(local, earlier, GROUP - 1), state, PACKED)
        if PACKED:
            whole = tl.where((whole > 0) | (log > 0), 1.0, whole + log)
        else:
            whole += log
        if PREFIX is not None:  # noqa: SIM102  # a choice of the compiler
            if group + 1 < groups:
                tl.store(PREFIX + (b * groups + group + 1) * C + c, state, mask=mask)
    tl.store(END + outer, state, mask=mask)
    if LOG_END is not None:
        if PACKED:
            whole = tl.where(whole > 0, -float("inf"), whole)
        tl.store(LOG_END + outer, whole, mask=mask)


@triton.jit
def begins_at(BEGINS, t, valid):
    """Whether documents begin at these tokens; BEGINS [T] int8."""
    return tl.load(BEGINS + t, mask=valid, other=0) != 0


@triton.jit(do_not_specialize=VARYING)
def recurrence_kernel(
    X, G, Y, BEGINS, LOG, STATE, PREFIX, ENTERING, STATES, END, FLAGS,
    B, T, tiles, groups, C, x_b, x_t, g_b, g_t, g_c,
    L: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Forward. X [B, T, C], G with strides; Y [B, T, C]; LOG, STATE and STATES [B, tiles, C]; END [B, C].

    FLAGS: one counter, then one a tile for each b and block of channels, then as many with one a group.
    """
    number, blocks = number_of_program(FLAGS, MODE), tl.cdiv(C, BC)
    part, n = number % (blocks * B), number // (blocks * B)
    b = (part // blocks).to(tl.int64)
    rows, c = tl.arange(0, L)[:, None], ((part % blocks) * BC + tl.arange(0, BC))[None, :]
    mask, t = c < C, n * L + rows
    valid, t = mask & (t < T), t.to(tl.int64)
    x = tl.load(X + b * x_b + t * x_t + c, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(G + b * g_b + t * g_t + c * g_c, mask=valid, other=0.0).to(tl.float32)
    if PACKED:
        g = tl.where(begins_at(BEGINS, t, t < T), 1.0, g)
    a, h = scan_rows(factor_of(g, PACKED), x, False, PACKED)
    log, last = log_of_all(g, PACKED), row_of(h, rows, L - 1)
    at, earlier = b * tiles * C + c, tl.arange(0, GROUP)[:, None]
    flags, prefix_flags = FLAGS + 1 + part * tiles, FLAGS + 1 + blocks * B * tiles + part * groups
    if MODE != WALK:
        leave_map(LOG, STATE, flags + n, at + n.to(tl.int64) * C, mask, log, last, MODE)
    if MODE != MAPS:
        PREFIX += b * groups * C
        entering = entering_tile(
            LOG + b * tiles * C, STATE + b * tiles * C, PREFIX, ENTERING, flags, prefix_flags, n, C, c, b * C + c, mask,
            earlier, GROUP, MODE, PACKED,
        )  # fmt: skip
        leave_prefix(PREFIX, prefix_flags, n, groups, C, c, mask, log, last, entering, GROUP, MODE, PACKED)
        h = passed(a, h, entering, PACKED)
        tl.store(Y + (b * T + t) * C + c, h.to(Y.dtype.element_ty), mask=valid)
        tl.store(STATES + at + n.to(tl.int64) * C, entering, mask=mask)
        if n == tiles - 1:
            tl.store(END + b * C + c, row_of(h, rows, L - 1), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def recurrence_gradient_kernel(
    DY, X, G, DX, DG, BEGINS, LOG, STATE, PREFIX, ENTERING, STATES, FIRST, FLAGS,
    B, T, tiles, groups, C, dy_b, dy_t, x_b, x_t, g_b, g_t, g_c,
    L: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Backward. What passes is c: the gradient of the state before a tile, FIRST [B, C] that before all tokens.

    DX, DG [B, T, C], DG may be None; STATES are what entered the tiles in forward.
    """
    number, blocks = number_of_program(FLAGS, MODE), tl.cdiv(C, BC)
    part, n = number % (blocks * B), number // (blocks * B)
    b, tile = (part // blocks).to(tl.int64), tiles - 1 - n
    rows, c = tl.arange(0, L)[:, None], ((part % blocks) * BC + tl.arange(0, BC))[None, :]
    mask, t = c < C, tile * L + rows
    valid, behind, t = mask & (t < T), mask & (t + 1 < T) & (rows < L - 1), t.to(tl.int64)
    dy = tl.load(DY + b * dy_b + t * dy_t + c, mask=valid, other=0.0).to(tl.float32)
    at_g = G + b * g_b + t * g_t + c * g_c
    g = tl.load(at_g, mask=valid, other=0.0).to(tl.float32)
    g_behind = tl.load(at_g + g_t, mask=behind, other=0.0).to(tl.float32)
    if PACKED:
        g = tl.where(begins_at(BEGINS, t, t < T), 1.0, g)
        g_behind = tl.where(begins_at(BEGINS, t + 1, (t + 1 < T) & (rows < L - 1)), 1.0, g_behind)
    a, dh = scan_rows(factor_of(g_behind, PACKED), dy, True, PACKED)
    own = factor_of(g, PACKED)
    if PACKED:  # what would go on to another document
        own = tl.where(own < 0, 0.0, own)
    log, first = log_of_all(g, PACKED), row_of(dh, rows, 0) * row_of(own, rows, 0)
    if PACKED:
        first = tl.where(row_of(g, rows, 0) > 0, 0.0, first)
    at, earlier = b * tiles * C + c, tl.arange(0, GROUP)[:, None]
    flags, prefix_flags = FLAGS + 1 + part * tiles, FLAGS + 1 + blocks * B * tiles + part * groups
    if MODE != WALK:
        leave_map(LOG, STATE, flags + n, at + n.to(tl.int64) * C, mask, log, first, MODE)
    if MODE != MAPS:
        PREFIX += b * groups * C
        entering = entering_tile(
            LOG + b * tiles * C, STATE + b * tiles * C, PREFIX, ENTERING, flags, prefix_flags, n, C, c, b * C + c, mask,
            earlier, GROUP, MODE, PACKED,
        )  # fmt: skip
        leave_prefix(PREFIX, prefix_flags, n, groups, C, c, mask, log, first, entering, GROUP, MODE, PACKED)
        dh = passed(a, dh, entering, PACKED)
        tl.store(DX + (b * T + t) * C + c, dh.to(DX.dtype.element_ty), mask=valid)
        if n == tiles - 1:
            tl.store(FIRST + b * C + c, passed(factor_of(log, PACKED), first, entering, PACKED), mask=mask)
        if DG is not None:
            # The state before each token: that before the tile, then each token's before it.
            before = valid & (rows > 0)
            x = tl.load(X + b * x_b + (t - 1) * x_t + c, mask=before, other=0.0).to(tl.float32)
            g_before = tl.load(at_g - g_t, mask=before, other=0.0).to(tl.float32)
            if PACKED:
                g_before = tl.where(begins_at(BEGINS, t - 1, (t < T) & (rows > 0)), 1.0, g_before)
            state = tl.load(STATES + at + tile.to(tl.int64) * C, mask=mask, other=0.0)
            _, h = scan_rows(factor_of(g_before, PACKED), tl.where(rows > 0, x, state), False, PACKED)
            dg = own * dh * h
            if PACKED:
                dg = tl.where(g > 0, 0.0, dg)
            tl.store(DG + (b * T + t) * C + c, dg.to(DG.dtype.element_ty), mask=valid)
