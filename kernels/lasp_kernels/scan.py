# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""Recurrences of channels that decay each by itself, in Triton: what they share, and the plain one (HGRN, RG-LRU).

    h_t = exp(log_decay_t) * h_{t-1} + x_t          dh_t = dy_t + c_{t+1}      c_t = exp(log_decay_t) * dh_t
                                                    dx_t = dh_t                d log_decay_t = c_t * h_{t-1}

A program has a *tile* of some channels and S * U tokens: S warps with U tokens each, a *strip*, one after the other in
each thread. It reads all of them at once, into registers, walks from zero, and leaves for the other programs what its
tokens do to a state that passes: S -> exp(log) * S + state. Then it needs what really comes in, walks again in the
registers, and writes its results:

    tiles      0  1 .. 7 | 8  9 .. 15 | 16 ..      GROUP = 8 of them are a group
    entering   E0        | E1         | E2 ..      the last program of a group makes what enters the next group
    tile 10                E1, then the maps of 8 and 9

What a tile waits for is the maps of those before it in its group, which run beside it, and one number a channel for
the group, so the chain from one end of the sequence to the other has a link for each 8 tiles. All is put together in
the same order each time: results are the same bits, whoever came first. Programs number themselves as they begin, so
who is waited for has begun. That is MODE ALONE, where nothing comes from elsewhere in between. With other ranks before
(in backward: behind) there are three launches: MAPS leaves the maps, `prefix_kernel` what enters groups, first from
zero, for the others, then from what they sent; and WALK reads the tiles again, and needs to wait for nobody.

Backward is the same from the last tile to the first; n counts tiles in the order in which they pass something on. The
states before its tokens it makes again, from those that entered the strips, which forward kept.

A packed document that begins lets nothing pass, not even NaN. A map of which that holds has a log of 1, and a factor of
-1, which no decay can have.
"""

import triton
import triton.language as tl

ALONE, MAPS, WALK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)

# Arguments that change from call to call: a kernel must not be compiled anew when they become 1 or divisible by 16.
VARYING = ["B", "T", "tiles", "groups"]


@triton.jit
def factor_of(log, PACKED: tl.constexpr):
    """The factor of a map, from its log."""
    a = tl.exp2(log * LOG2E)
    if PACKED:
        a = tl.where(log > 0, -1.0, a)
    return a


@triton.jit
def passed(a, state, entering, PACKED: tl.constexpr):
    """What is behind a map of factor a when this enters it."""
    behind = a * entering + state
    if PACKED:
        behind = tl.where(a < 0, state, behind)
    return behind


@triton.jit
def log_of_both(first, second, PACKED: tl.constexpr):
    """The log of two maps as one, the second behind the first."""
    log = first + second
    if PACKED:
        log = tl.where((first > 0) | (second > 0), 1.0, log)
    return log


@triton.jit
def strip_of(x, strips, s, AXIS: tl.constexpr):
    """One of them; the others may be NaN."""
    return tl.sum(tl.where(strips == s, x, 0.0), AXIS, keep_dims=True)


@triton.jit
def and_one(values, value):
    """A tuple and one more."""
    return values + (value,)  # noqa: RUF005  # which the compiler does not know


@triton.jit
def load_tokens(X, first, strips, T, stride, columns, mask, U: tl.constexpr):
    """The U tokens of each strip, each [S, columns], of a tile that begins at the token `first`; zeros from T on."""
    X, left, found = X + first * stride, T - first, ()
    for u in tl.static_range(U):
        t = strips * U + u
        found = and_one(found, tl.load(X + t * stride + columns, mask=mask & (t < left), other=0.0))
    return found


@triton.jit
def logs_of(logs, begins, U: tl.constexpr, PACKED: tl.constexpr):
    """The log-decays of tokens in fp32; 1 where documents begin."""
    found = ()
    for u in tl.static_range(U):
        log = logs[u].to(tl.float32)
        if PACKED:
            log = tl.where(begins[u] != 0, 1.0, log)
        found = and_one(found, log)
    return found


@triton.jit
def number_of_program(FLAGS, MODE: tl.constexpr):
    """In the order in which programs begin, if they wait for each other."""
    if MODE == ALONE:
        return tl.atomic_add(FLAGS, 1)
    return tl.program_id(0)


@triton.jit
def raise_flag(FLAG):
    """Raise a flag behind all that the threads of this program have stored."""
    tl.debug_barrier()
    tl.atomic_xchg(FLAG, 1, sem="release")


@triton.jit
def wait_for(FLAGS, count, MOST: tl.constexpr):
    """Wait until the first `count` flags are raised; then what was stored before them can be read past the L1 cache."""
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
def map_of_tiles(LOG, STATE, count, C, c, mask, MOST: tl.constexpr, PACKED: tl.constexpr):
    """The maps of the first `count` tiles, of MOST at most, as one."""
    logs, states, zero = (), (), tl.zeros_like(c)
    for j in tl.static_range(MOST):
        at, here = c + j * C, mask & (zero + j < count)
        logs = and_one(logs, tl.load(LOG + at, mask=here, other=0.0, cache_modifier=".cg"))
        states = and_one(states, tl.load(STATE + at, mask=here, other=0.0, cache_modifier=".cg"))
    log, state = logs[0], states[0]
    for j in tl.static_range(1, MOST):
        state = passed(factor_of(logs[j], PACKED), states[j], state, PACKED)
        log = log_of_both(log, logs[j], PACKED)
    return log, state


@triton.jit
def entering_tile(
    LOG, STATE, PREFIX, ENTERING, FLAGS, PREFIX_FLAGS, n, C, c, outer, mask,
    GROUP: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The state that enters the n-th tile; c are the channels of a state, `outer` the same where others put them."""
    of_group, count = n // GROUP, n % GROUP
    if MODE == ALONE:
        wait_for(FLAGS + of_group * GROUP, count, GROUP)
    first = (n - count).to(tl.int64) * C
    log, state = map_of_tiles(LOG + first, STATE + first, count, C, c, mask, GROUP - 1, PACKED)
    if ENTERING is None:  # noqa: SIM108  # a choice of the compiler
        prefix = tl.zeros_like(log)
    else:
        prefix = tl.load(ENTERING + outer, mask=mask, other=0.0)
    if of_group > 0:
        if MODE == ALONE:
            wait_for(PREFIX_FLAGS + of_group, 1, 1)
        prefix = tl.load(PREFIX + of_group.to(tl.int64) * C + c, mask=mask, other=0.0, cache_modifier=".cg")
    return passed(factor_of(log, PACKED), state, prefix, PACKED)


@triton.jit
def leave_prefix(
    PREFIX, PREFIX_FLAGS, n, groups, C, c, mask, log, state, entering,
    GROUP: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The last tile of a group says what enters the next one, if there is one."""
    if MODE == ALONE:
        of_group = n // GROUP + 1
        if (n % GROUP == GROUP - 1) & (of_group < groups):
            behind = passed(factor_of(log, PACKED), state, entering, PACKED)
            tl.store(PREFIX + of_group.to(tl.int64) * C + c, behind, mask=mask)
            raise_flag(PREFIX_FLAGS + of_group)


@triton.jit
def map_of_strips(
    logs, states, strips, S: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr
):
    """The maps of a tile's strips as one."""
    log = strip_of(logs, strips, S - 1 if REVERSE else 0, AXIS)
    state = strip_of(states, strips, S - 1 if REVERSE else 0, AXIS)
    for n in tl.static_range(1, S):
        own = strip_of(logs, strips, S - 1 - n if REVERSE else n, AXIS)
        new = strip_of(states, strips, S - 1 - n if REVERSE else n, AXIS)
        state = passed(factor_of(own, PACKED), new, state, PACKED)
        log = log_of_both(log, own, PACKED)
    return log, state


@triton.jit
def entering_strips(
    logs, states, strips, entering, S: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr
):
    """What enters each strip of a tile, from what enters the tile."""
    found = tl.where(strips == (S - 1 if REVERSE else 0), entering, tl.zeros_like(states))
    for n in tl.static_range(1, S):
        own = strip_of(logs, strips, S - n if REVERSE else n - 1, AXIS)
        new = strip_of(states, strips, S - n if REVERSE else n - 1, AXIS)
        entering = passed(factor_of(own, PACKED), new, entering, PACKED)
        found = tl.where(strips == (S - 1 - n if REVERSE else n), entering, found)
    return found


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
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask, outer = c < C, b * C + (c % D) * (C // D) + c // D
    LOG, STATE = LOG + b * tiles * C, STATE + b * tiles * C
    if ENTERING is None:  # noqa: SIM108  # a choice of the compiler
        state = tl.zeros([BC], tl.float32)
    else:
        state = tl.load(ENTERING + outer, mask=mask, other=0.0)
    whole = tl.zeros([BC], tl.float32)
    for of_group in tl.range(groups):
        log, local = map_of_tiles(LOG, STATE, tiles - of_group * GROUP, C, c, mask, GROUP, PACKED)
        LOG += GROUP * C
        STATE += GROUP * C
        state = passed(factor_of(log, PACKED), local, state, PACKED)
        whole = log_of_both(whole, log, PACKED)
        if PREFIX is not None:  # noqa: SIM102  # a choice of the compiler
            if of_group + 1 < groups:
                tl.store(PREFIX + (b * groups + of_group + 1) * C + c, state, mask=mask)
    tl.store(END + outer, state, mask=mask)
    if LOG_END is not None:
        if PACKED:
            whole = tl.where(whole > 0, -float("inf"), whole)
        tl.store(LOG_END + outer, whole, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def recurrence_kernel(
    X, G, Y, BEGINS, LOG, STATE, PREFIX, ENTERING, STATES, END, FLAGS,
    B, T, tiles, groups, C, x_b, x_t, g_b, g_t, g_c,
    S: tl.constexpr, U: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Forward. X [B, T, C], G, Y [B, T, C]; LOG and STATE [B, tiles, C]; STATES [B, strips, C]; END [B, C].

    BEGINS [T] int8. FLAGS: one counter; for each b and block of channels one a tile; then for each of them one a group.
    """
    number, blocks = number_of_program(FLAGS, MODE), tl.cdiv(C, BC)
    part, n = number % (blocks * B), number // (blocks * B)
    b = (part // blocks).to(tl.int64)
    strips, c = tl.arange(0, S)[:, None], ((part % blocks) * BC + tl.arange(0, BC))[None, :]
    mask, first = c < C, n.to(tl.int64) * (S * U)
    xs = load_tokens(X + b * x_b, first, strips, T, x_t, c, mask, U)
    gs = load_tokens(G + b * g_b, first, strips, T, g_t, c * g_c, mask, U)
    begins = load_tokens(BEGINS, first, strips, T, 1, 0, strips >= 0, U) if PACKED else ()
    gs = logs_of(gs, begins, U, PACKED)
    logs, h = tl.zeros([S, BC], tl.float32), tl.zeros([S, BC], tl.float32)
    for u in tl.static_range(U):
        h = passed(factor_of(gs[u], PACKED), xs[u].to(tl.float32), h, PACKED)
        logs = log_of_both(logs, gs[u], PACKED)
    log, state = map_of_strips(logs, h, strips, S, 0, False, PACKED)
    own = c + n.to(tl.int64) * C
    flags, prefix_flags = FLAGS + 1 + part * tiles, FLAGS + 1 + blocks * B * tiles + part * groups
    if MODE != WALK:
        leave_map(LOG + b * tiles * C, STATE + b * tiles * C, flags + n, own, mask, log, state, MODE)
    if MODE != MAPS:
        PREFIX += b * groups * C
        entering = entering_tile(
            LOG + b * tiles * C, STATE + b * tiles * C, PREFIX, ENTERING, flags, prefix_flags, n, C, c, b * C + c, mask,
            GROUP, MODE, PACKED,
        )  # fmt: skip
        leave_prefix(PREFIX, prefix_flags, n, groups, C, c, mask, log, state, entering, GROUP, MODE, PACKED)
        h = entering_strips(logs, h, strips, entering, S, 0, False, PACKED)
        tl.store(STATES + ((b * tiles + n) * S + strips) * C + c, h, mask=mask)
        Y, left = Y + (b * T + first) * C, T - first
        for u in tl.static_range(U):
            h = passed(factor_of(gs[u], PACKED), xs[u].to(tl.float32), h, PACKED)
            t = strips * U + u
            tl.store(Y + t * C + c, h.to(Y.dtype.element_ty), mask=mask & (t < left))
        if n == tiles - 1:
            tl.store(END + b * C + c, strip_of(h, strips, S - 1, 0), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def recurrence_gradient_kernel(
    DY, X, G, DX, DG, BEGINS, LOG, STATE, PREFIX, ENTERING, STATES, FIRST, FLAGS,
    B, T, tiles, groups, C, dy_b, dy_t, x_b, x_t, g_b, g_t, g_c,
    S: tl.constexpr, U: tl.constexpr, BC: tl.constexpr, GROUP: tl.constexpr, MODE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Backward. What passes is c: the gradient of the state before a tile, FIRST [B, C] that before all tokens.

    DX, DG [B, T, C], DG may be None; STATES are what entered the strips in forward.
    """
    number, blocks = number_of_program(FLAGS, MODE), tl.cdiv(C, BC)
    part, n = number % (blocks * B), number // (blocks * B)
    b, tile = (part // blocks).to(tl.int64), (tiles - 1 - n).to(tl.int64)
    strips, c = tl.arange(0, S)[:, None], ((part % blocks) * BC + tl.arange(0, BC))[None, :]
    mask, start = c < C, tile * (S * U)
    dys = load_tokens(DY + b * dy_b, start, strips, T, dy_t, c, mask, U)
    gs = load_tokens(G + b * g_b, start, strips, T, g_t, c * g_c, mask, U)
    begins = load_tokens(BEGINS, start, strips, T, 1, 0, strips >= 0, U) if PACKED else ()
    gs = logs_of(gs, begins, U, PACKED)
    logs, back = tl.zeros([S, BC], tl.float32), tl.zeros([S, BC], tl.float32)
    for u in tl.static_range(U):
        back = through_token(gs[U - 1 - u], dys[U - 1 - u].to(tl.float32) + back, PACKED)
        logs = log_of_both(logs, gs[U - 1 - u], PACKED)
    log, first = map_of_strips(logs, back, strips, S, 0, True, PACKED)
    flags, prefix_flags = FLAGS + 1 + part * tiles, FLAGS + 1 + blocks * B * tiles + part * groups
    own = c + n.to(tl.int64) * C
    if MODE != WALK:
        leave_map(LOG + b * tiles * C, STATE + b * tiles * C, flags + n, own, mask, log, first, MODE)
    if MODE != MAPS:
        # The state before each token.
        befores = ()
        if DG is not None:
            xs = load_tokens(X + b * x_b, start, strips, T, x_t, c, mask, U)
            h = tl.load(STATES + ((b * tiles + tile) * S + strips) * C + c, mask=mask, other=0.0)
            for u in tl.static_range(U):
                befores = and_one(befores, h)
                h = passed(factor_of(gs[u], PACKED), xs[u].to(tl.float32), h, PACKED)
        PREFIX += b * groups * C
        entering = entering_tile(
            LOG + b * tiles * C, STATE + b * tiles * C, PREFIX, ENTERING, flags, prefix_flags, n, C, c, b * C + c, mask,
            GROUP, MODE, PACKED,
        )  # fmt: skip
        leave_prefix(PREFIX, prefix_flags, n, groups, C, c, mask, log, first, entering, GROUP, MODE, PACKED)
        back = entering_strips(logs, back, strips, entering, S, 0, True, PACKED)
        left, DX = T - start, DX + (b * T + start) * C
        if DG is not None:
            DG += (b * T + start) * C
        for u in tl.static_range(U):
            t = strips * U + U - 1 - u
            at, here = t * C + c, mask & (t < left)
            dh = dys[U - 1 - u].to(tl.float32) + back
            tl.store(DX + at, dh.to(DX.dtype.element_ty), mask=here)
            back = through_token(gs[U - 1 - u], dh, PACKED)
            if DG is not None:
                dg = back * befores[U - 1 - u]
                if PACKED:
                    dg = tl.where(gs[U - 1 - u] > 0, 0.0, dg)
                tl.store(DG + at, dg.to(DG.dtype.element_ty), mask=here)
        if n == tiles - 1:
            tl.store(FIRST + b * C + c, strip_of(back, strips, 0, 0), mask=mask)


@triton.jit
def through_token(log, dh, PACKED: tl.constexpr):
    """c of the formulas above: what goes on to the token before, nothing where a document begins."""
    back = factor_of(log, PACKED) * dh
    if PACKED:
        back = tl.where(log > 0, 0.0, back)
    return back
