"""Recurrences in the form in which layers of other libraries call for them; the operators do the rest.

Tensors and dtypes are those of `mamba_selective_scan` (Mamba, FalconMamba, Jamba, Zamba), of
`RecurrentGemmaRglru._rnn_scan`, of Mamba-2's scan and of the delta rule's kernels. States that are handed in or asked
for belong to a cache, which training over ranks has not got: who adapts the layer refuses them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.layout import ShardLayout
from lasp.ops.attention import linear_attention
from lasp.ops.delta import delta_rule
from lasp.ops.elementwise import elementwise_recurrence
from lasp.ops.elementwise import selective_scan as scan
from lasp.ranks import SequenceParallel
from lasp_kernels import state_dtype


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
) -> Tensor:
    """y [B, D, T] in the dtype of x, from x, dt and z [B, D, T], A [D, N], B and C [B, N, T], D and delta_bias [D].

    dt gets its bias and softplus in the state's dtype, as in the kernel of mamba-ssm; D and z are applied in the wider
    dtype of those that meet.
    """
    dtype = state_dtype(x.dtype)
    dt = dt.to(dtype) if delta_bias is None else dt.to(dtype) + delta_bias.to(dtype).unsqueeze(-1)
    dt = F.softplus(dt) if delta_softplus else dt
    # The operator walks along T: neighbours in memory should be channels of one token.
    u, dt, B, C = (y.mT.contiguous() for y in (x, dt, B, C))
    y = scan(u, dt, A, B, C, layout=layout, sequence=sequence).mT
    y = y if D is None else y + x * D.unsqueeze(-1)
    y = y if z is None else y * F.silu(z)
    return y.to(x.dtype)


def rnn_scan(
    x: Tensor,
    gate: Tensor,
    reset: Tensor,
    *,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
) -> Tensor:
    """h [B, T, D] in the dtype of x: h_t = gate_t * h_{t-1} + x_t, and h_t = x_t where `reset` [B, T, 1] is True.

    gate [B, T, D] is within [0, 1]. One that is exactly 0 has no gradient here: it is exp of something far below, whose
    gradient is 0 in any case.
    """
    gate = gate.to(state_dtype(x.dtype))
    passes = (gate > 0) & ~reset
    # Not log(0), whose gradient would be 0 / 0 even where it is not taken.
    log_decay = torch.where(passes, torch.where(passes, gate, 1.0).log(), -torch.inf)
    return elementwise_recurrence(x, log_decay, layout=layout, sequence=sequence)


def mamba2_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
) -> Tensor:
    """y [B, T, H, P] in the dtype of x. (arXiv 2405.21060, equation 16: q = C, k = B, v = dt x, log_decay = dt A; and
    D x is added.)

    x [B, T, H, P], B and C [B, T, G, N] in its dtype, of which H / G neighbouring heads of x share one, D [H] or
    [H, P]; A [H], and dt [B, T, H] with its bias, softplus and limits, in the state's dtype.
    """
    v = (x * dt[..., None]).to(x.dtype)
    y, _state = linear_attention(C, B, v, log_decay=dt * A, layout=layout, sequence=sequence)
    if D is None:
        return y
    return (y + (D[:, None] if D.ndim == 1 else D) * x).to(x.dtype)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    layout: ShardLayout | None = None,
    sequence: SequenceParallel | None = None,
) -> Tensor:
    """o [B, T, H, V] in the state's dtype, in which all is computed, as the kernels do inside: the gated delta rule
    (arXiv 2412.06464), and with a gate per channel KDA (arXiv 2510.26692).

    q and k [B, T, H, K], of unit length by `normalize`, v [B, T, G*H, V], beta [B, T, G*H], g [B, T, G*H] or
    [B, T, G*H, K].
    """
    dtype = state_dtype(v.dtype)
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    if normalize:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    o, _state = delta_rule(
        q,
        k,
        v,
        beta,
        log_decay=None if g is None else g.to(dtype),
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
        layout=layout,
        sequence=sequence,
    )
    return o
