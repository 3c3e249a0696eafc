"""What all models of `lasp.models` have in common: tokens to logits around a list of blocks, written for one device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lasp import arguments
from lasp.layout import ShardLayout
from lasp.modules import OPERATOR_MODULES


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head. A subclass has these, and may give `embed` and `run` of its own.

    Attributes:
        embedding: nn.Embedding [vocab_size, width].
        blocks: each of (x [B, T, D], position_ids, layout) to x.
        norm: before the head.
        head: nn.Linear without bias, to logits.
        counts_positions: whether positions matter, so that a slice of a sequence must be told its own.
    """

    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear
    counts_positions: bool = True

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        layout: ShardLayout | None = None,
        *,
        return_hidden: bool = False,
    ) -> Tensor:
        """Logits [B, T, vocab_size] in the model's dtype.

        Args:
            input_ids: [B, T], int64; on a rank of a split sequence its slice, as `lasp.shard_batch` cuts it.
            position_ids: [B, T] or [T], integers: positions in the *whole* sequence. By default 0, 1, ... T - 1,
                which is wrong on a slice and refused there.
            layout: how tokens lie on the ranks, from `lasp.shard_batch`: needed for packed sequences, and heads that
                forget fast then exchange with their neighbour only.
            return_hidden: give what the head reads, [B, T, width], for `lasp.linear_token_loss`.
        """
        arguments.positions(position_ids, input_ids)
        arguments.flag("return_hidden", return_hidden)
        if position_ids is None:
            position_ids = self._default_positions(input_ids)
        x = self.run(self.embed(input_ids, position_ids), position_ids, layout)
        x = self.norm(x)
        return x if return_hidden else self.head(x)

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Tokens [B, T] to x [B, T, D]."""
        return self.embedding(input_ids)

    def run(self, x: Tensor, position_ids: Tensor, layout: ShardLayout | None) -> Tensor:
        """x [B, T, D] through all blocks."""
        for block in self.blocks:
            x = block(x, position_ids, layout)
        return x

    def _default_positions(self, input_ids: Tensor) -> Tensor:
        if self.counts_positions and any(
            m.sequence is not None for m in self.modules() if isinstance(m, OPERATOR_MODULES)
        ):
            raise ValueError("position_ids are needed when the sequence is split; lasp.shard_batch makes them")
        return torch.arange(input_ids.shape[1], device=input_ids.device)
