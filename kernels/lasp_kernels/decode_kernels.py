# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""The steps of decode.py in Triton: a kernel reads a state once, writes it once where it was, and makes what comes out.

A step computes two operations a number that it moves, so that its time is that of moving the state. Linear attention
and the delta rule are one kernel: a program has some columns of a head's state, and of these all rows, since both
k S (what the delta rule takes back) and q S are sums over rows. So programs share nothing.

How many columns a program has depends on how many heads there are: few, where there are few of these, so that all
multiprocessors have work; else as many as make long reads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lasp_kernels.launch import Launch, early, layout, processors

MAX_KEY_DIM = 1024  # rows of a state, which a program holds all
MAX_STATES = 256  # numbers of a channel's state in a selective scan
COLUMNS = (64, 32, 16)  # of a state, in a program
NUMBERS = 16384  # of a state, in a program, at most
CHANNELS = 256  # of a program of the small kernels


@triton.jit
def decayed(state, log_decay):
    """exp(log_decay) * state, whose error is that of one rounding, not of the factor's too.

    A factor near 1 is rounded to the same side at every token where the decay is fixed: by 3e-8 in fp32, which is 3e-4
    of what a decay of 1e-4 remembers. exp(x) - 1 has its digits behind the point; for x > -1/2 by its series.
    """
    weak = log_decay > -0.5
    x = tl.where(weak, log_decay, 0.0)
    change = 1.0 + x / 8
    for n in tl.static_range(7, 1, -1):
        change = 1.0 + x / n * change
    return tl.where(weak, state, 0.0) + tl.where(weak, x * change, tl.exp(log_decay)) * state


@triton.jit
def step_kernel(
    Q, KEY, VALUE, BETA, DECAY, STATE, OUT, scale, H, q_b, q_h, k_b, k_h, v_b, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    FORM: tl.constexpr, NORMALIZE: tl.constexpr, LOOPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """LOOPS times BV columns of a head's state [K, V], which stays in its place; GROUP outputs of it.

    Grid: columns in blocks, heads H of states, sequences. Q [B, H*GROUP, K] or, as KEY, [B, H/SHARE, K]; VALUE
    [B, H, V]; BETA [B, H] of a delta rule, else None; DECAY of FORM dimensions, none with 0; OUT [B, H*GROUP, V]. With
    NORMALIZE, STATE has a column more, and a program must have all of them.
    """
    blocks = tl.cdiv(V, BV * LOOPS)
    block = tl.program_id(0) % blocks
    h = (tl.program_id(0) // blocks % H).to(tl.int64)
    b = (tl.program_id(0) // blocks // H).to(tl.int64)
    rows = tl.arange(0, BK)
    inside = rows < K
    if EARLY:  # `launch.early`
        gdc_wait()
        gdc_launch_dependents()
    key = tl.load(KEY + b * k_b + h // SHARE * k_h + rows, mask=inside, other=0.0).to(tl.float32)
    if FORM == 1:  # [H]
        decay = tl.load(DECAY + h + rows * 0).to(tl.float32)
    elif FORM == 2:  # [B, H]
        decay = tl.load(DECAY + b * H + h + rows * 0).to(tl.float32)
    elif FORM == 3:  # [B, H, K]
        decay = tl.load(DECAY + (b * H + h) * K + rows, mask=inside, other=0.0).to(tl.float32)
    columns: tl.constexpr = V + NORMALIZE
    STATE += (b * H + h) * K * columns
    if NORMALIZE:
        total = tl.load(STATE + rows * columns + V, mask=inside, other=0.0)
        if FORM != 0:
            total = decayed(total, decay)
        total += key
        tl.store(STATE + rows * columns + V, total, mask=inside)
    for n in tl.static_range(LOOPS):
        e = (block * LOOPS + n) * BV + tl.arange(0, BV)
        at, mask = rows[:, None] * columns + e[None, :], inside[:, None] & (e < V)[None, :]
        state = tl.load(STATE + at, mask=mask, other=0.0)
        value = tl.load(VALUE + b * v_b + h * v_h + e, mask=e < V, other=0.0).to(tl.float32)
        if FORM != 0:
            state = decayed(state, decay[:, None])
        if BETA is not None:
            beta = tl.load(BETA + b * H + h).to(tl.float32)
            value = beta * (value - tl.sum(key[:, None] * state, 0))
        state += key[:, None] * value[None, :]
        tl.store(STATE + at, state, mask=mask)
        for g in tl.static_range(GROUP):
            q_at = Q + b * q_b + (h // SHARE * GROUP + g) * q_h
            query = tl.load(q_at + rows, mask=inside, other=0.0).to(tl.float32)
            o = tl.sum(query[:, None] * state, 0)
            if NORMALIZE:
                o = o / tl.sum(query * total, 0)
            o_at = OUT + ((b * H + h) * GROUP + g) * V
            tl.store(o_at + e, (o * scale).to(OUT.dtype.element_ty), mask=e < V)


@triton.jit
def elementwise_kernel(X, DECAY, STATE, Y, numbers, BLOCK: tl.constexpr):
    """h = exp(log_decay) h + x of some of the numbers."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = c < numbers
    decay = tl.load(DECAY + c, mask=mask, other=0.0).to(tl.float32)
    state = decayed(tl.load(STATE + c, mask=mask, other=0.0), decay)
    state += tl.load(X + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(STATE + c, state, mask=mask)
    tl.store(Y + c, state.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def selective_kernel(
    U_, DT, A, IN, OUT, STATE, Y, D, u_b, dt_b, in_b, out_b,
    N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK channels of one sequence, each with all N numbers of its state; IN and OUT are B and C."""
    blocks = tl.cdiv(D, BLOCK)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.arange(0, NP)
    at, mask = d[:, None] * N + n[None, :], (d < D)[:, None] & (n < N)[None, :]
    u = tl.load(U_ + b * u_b + d, mask=d < D, other=0.0).to(tl.float32)
    dt = tl.load(DT + b * dt_b + d, mask=d < D, other=0.0).to(tl.float32)
    into = tl.load(IN + b * in_b + n, mask=n < N, other=0.0).to(tl.float32)
    out = tl.load(OUT + b * out_b + n, mask=n < N, other=0.0).to(tl.float32)
    decay = dt[:, None] * tl.load(A + at, mask=mask, other=0.0).to(tl.float32)
    STATE += b * D * N
    state = decayed(tl.load(STATE + at, mask=mask, other=0.0), decay) + (dt * u)[:, None] * into[None, :]
    tl.store(STATE + at, state, mask=mask)
    y = tl.sum(state * out[None, :], 1)
    tl.store(Y + b * D + d, y.to(Y.dtype.element_ty), mask=d < D)


@triton.jit
def convolution_kernel(X, WEIGHT, BIAS, LAST, Y, D, x_b, W: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK channels of one sequence; LAST [B, W - 1, D] moves by one token."""
    blocks = tl.cdiv(D, BLOCK)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    mask = d < D
    x = tl.load(X + b * x_b + d, mask=mask, other=0.0)
    y = x.to(tl.float32) * tl.load(WEIGHT + d * W + W - 1, mask=mask, other=0.0).to(tl.float32)
    if BIAS is not None:
        y += tl.load(BIAS + d, mask=mask, other=0.0).to(tl.float32)
    LAST += b * (W - 1) * D + d
    for j in tl.static_range(W - 1):
        before = tl.load(LAST + j * D, mask=mask, other=0.0)
        y += before.to(tl.float32) * tl.load(WEIGHT + d * W + j, mask=mask, other=0.0).to(tl.float32)
        if j > 0:  # it has been read
            tl.store(LAST + (j - 1) * D, before, mask=mask)
    if W > 1:
        tl.store(LAST + (W - 2) * D, x.to(LAST.dtype.element_ty), mask=mask)
    tl.store(Y + b * D + d, y.to(Y.dtype.element_ty), mask=mask)


def unsupported(x: Tensor, *, rows: int = 1, states: int = 1) -> str | None:
    """What the kernels take in place of what these inputs have; None where they serve.

    `rows` of a state of linear attention, `states` of a channel.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"fp32, bf16 or fp16, got {x.dtype}"
    if rows > MAX_KEY_DIM:
        return f"up to {MAX_KEY_DIM} rows of a state, got {rows}"
    if states > MAX_STATES:
        return f"up to {MAX_STATES} states a channel, got {states}"
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float,
    normalize: bool = False,
) -> Tensor:
    """`linear_attention_step`, or with a beta `delta_rule_step`; checked."""
    B, H, V = v.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    beta, log_decay = (x if x is None else x.contiguous() for x in (beta, log_decay))
    o = torch.empty(B, max(q.shape[1], H), V, dtype=v.dtype, device=v.device)
    tensors = (q, k, v, beta, log_decay, state, o)
    key = tuple([x if x is None else (x.dtype, tuple(x.shape), *layout(x)) for x in tensors])
    _step_launch(key, float(scale), normalize, v.device)(*tensors)
    return o


@lru_cache(maxsize=1024)
def _step_launch(key: tuple[Any, ...], scale: float, normalize: bool, device: torch.device) -> Launch:
    """The launch for tensors that are alike in all that Triton specializes on."""
    shapes, strides = (tuple(() if x is None else x[n] for x in key) for n in (1, 2))
    (_, q_heads, K), k_heads, (B, H, V) = shapes[0], shapes[1][1], shapes[2]
    queries, share = max(1, q_heads // H), H // k_heads
    rows = max(16, triton.next_power_of_2(K))
    columns = _columns(B * H, rows, V, processors(device))
    loops = triton.cdiv(V, columns) if normalize else 1
    programs, begins = triton.cdiv(V, columns * loops) * B * H, early(device)
    return Launch(
        step_kernel, device, (programs, 1), (scale, H, *strides[0][:2], *strides[1][:2], *strides[2][:2]),
        K=K, V=V, BK=rows, BV=columns, GROUP=queries, SHARE=share, FORM=len(shapes[4]), NORMALIZE=int(normalize),
        LOOPS=loops, EARLY=begins, num_warps=min(8, max(1, rows * columns // 1024)),
        **({"launch_pdl": True} if begins else {}),
    )  # fmt: skip


def _columns(heads: int, rows: int, V: int, processors: int) -> int:
    """How many columns of a state a program has: few enough for six programs a multiprocessor and for its registers."""
    enough = [c for c in COLUMNS if c * rows <= NUMBERS and heads * triton.cdiv(V, c) >= 6 * processors]
    return min(enough[0] if enough else COLUMNS[-1], max(16, triton.next_power_of_2(V)))


def recur(x: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """Launch a checked `elementwise_step`."""
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    log_decay = log_decay.expand(x.shape).contiguous()
    grid = (triton.cdiv(x.numel(), 4 * CHANNELS),)
    if x.numel():
        with torch.cuda.device_of(x):
            elementwise_kernel[grid](x, log_decay, state, y, x.numel(), BLOCK=4 * CHANNELS)
    return y


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """Launch a checked `selective_scan_step`."""
    u, dt, B, C = (x if x.stride(-1) == 1 else x.contiguous() for x in (u, dt, B, C))
    y, (rows, D), N = torch.empty(u.shape, dtype=u.dtype, device=u.device), u.shape, A.shape[1]
    states = triton.next_power_of_2(N)
    block = max(16, 4 * CHANNELS // states)
    if rows:
        with torch.cuda.device_of(u):
            selective_kernel[(triton.cdiv(D, block) * rows,)](
                u, dt, A.contiguous(), B, C, state, y, D, u.stride(0), dt.stride(0), B.stride(0), C.stride(0),
                N=N, NP=states, BLOCK=block,
            )  # fmt: skip
    return y


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, last: Tensor) -> Tensor:
    """Launch a checked `convolution_step`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y, (rows, D), W = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape, weight.shape[1]
    bias = None if bias is None else bias.contiguous()
    if rows:
        with torch.cuda.device_of(x):
            convolution_kernel[(triton.cdiv(D, CHANNELS) * rows,)](
                x, weight.contiguous(), bias, last, y, D, x.stride(0), W=W, BLOCK=CHANNELS
            )
    return y
