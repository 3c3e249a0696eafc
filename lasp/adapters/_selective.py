"""What Mamba's layers and RecurrentGemma's call for their recurrence, in the form in which transformers calls it.

Tensors and dtypes are those of `mamba_selective_scan` (Mamba, FalconMamba, Jamba, Zamba) and of
`RecurrentGemmaRglru._rnn_scan`; the operators do the rest. States that are handed in or asked for belong to a cache,
which training over ranks has not got: who adapts the layer refuses them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.layout import ShardLayout
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
