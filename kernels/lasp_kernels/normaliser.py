# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""What a normaliser makes of the gradient of o, in Triton.

With a normaliser o_i = scale * (q_i S_i) / (q_i s_i), where s is the sum of keys that decays as S does: S with a column
more, whose values are all 1. So a gradient do of o gives, to the numerator's columns and to the column more,

    r_i do_i        and        r_i c_i        with  r_i = scale / (q_i s_i)  and  c_i = - (do_i . o_i) / scale

and from there on all gradients are those of linear attention. The walks multiply by r where else by `scale`, and add c
to what do gives: [do, c] [v, 1]^T is do v^T + c. So nothing of the size of do is made, and no tensor gets a column.
(r is not in what is rounded to 16 bits, where a product can do without: it may be far smaller than do.)
"""

import triton
import triton.language as tl

from lasp_kernels.state import VARYING


@triton.jit(do_not_specialize=VARYING)
def normaliser_kernel(
    OUT, DO, DENOMINATOR, NORM,
    scale, B, T, H, o_b, o_t, o_h, do_b, do_t, do_h,
    V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """NORM [2, B, H, T]: r and c of each query, from OUT and DO [B, T, H, V] and DENOMINATOR [B, H, T].

    One program per batch entry, head and C tokens. A scale of 0 leaves no gradient, so c is 0.
    """
    tiles = tl.cdiv(T, C)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    h = (tl.program_id(0) // tiles % H).to(tl.int64)
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    token = tile * C + tl.arange(0, C)
    e = tl.arange(0, BV)
    mask = (token < T)[:, None] & (e < V)[None, :]
    o = tl.load(OUT + b * o_b + token[:, None] * o_t + h * o_h + e[None, :], mask=mask, other=0.0)
    do = tl.load(DO + b * do_b + token[:, None] * do_t + h * do_h + e[None, :], mask=mask, other=0.0)
    at = (b * H + h) * T + token
    denominator = tl.load(DENOMINATOR + at, mask=token < T, other=1.0)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(NORM + at, scale / denominator, mask=token < T)
    c = tl.where(scale == 0.0, 0.0, -product / tl.where(scale == 0.0, 1.0, scale))
    tl.store(NORM + B.to(tl.int64) * H * T + at, c, mask=token < T)
