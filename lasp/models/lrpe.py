"""Positions as a rotation of queries and keys by a learned angle a token: of TNL's first layer and of cosFormer2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lasp_kernels import rotate


class LRPE(nn.Module):
    """Linearized relative positional encoding: q_t . k_s becomes sum_j q_tj k_sj cos(theta_j (t - s)).

    The rotation e^{i theta t} of arXiv 2307.14995, section 3.1, in real form: x to [x cos(theta t), x sin(theta t)], so
    K doubles. The frequencies are learned, theta_j = 10000^(-2j/D) exp(delta_j) over the channels j of all heads. What
    is trained and stored is delta, zero at first: casting a model to bf16 then leaves the frequencies exact, and a
    step of the optimizer changes slow frequencies as much as fast ones, in proportion.
    """

    def __init__(self, heads: int, channels: int):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(heads, channels))
        self.heads, self.first_head = heads, 0  # of all heads, and the first of those that are here

    def reset_parameters(self) -> None:
        """The frequencies of the paper."""
        nn.init.zeros_(self.delta)

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [B, T, H, K] and integer positions [B, T] or [T] to q, k [B, T, H, 2K] of the same dtype."""
        if position_ids.is_floating_point():
            raise TypeError(f"position_ids must be integers, got {position_ids.dtype}")
        H, K = (delta := self.delta).shape
        # Frequencies and angles are made in fp64 whatever the model's dtype: in bf16 tokens beyond position 256 would
        # share their positions, and in fp32 the angle of token 4,000,000 would be off by a quarter.
        first = self.first_head * K
        places = torch.arange(first, first + H * K, device=q.device, dtype=torch.float64).view(H, K)
        theta = torch.pow(10000.0, places * (-2 / (self.heads * K))) * delta.double().exp()
        return rotate(q, k, position_ids, theta)
