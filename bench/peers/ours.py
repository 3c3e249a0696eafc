"""This project's operator, as a row among its peers: fixed decay, whatever schedule the sequence asks for."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

import lasp
from peers.base import Attention, Contiguous, Inputs, Shape

LAYERS = 24  # of the model whose first layer's ALiBi slopes are the decay


@lru_cache
def fixed_decay(heads: int, device: torch.device) -> Tensor:
    """[H], with values that the host knows, as `lasp.modules` has them."""
    return lasp.decay.fixed(lasp.decay.alibi(heads, 0, LAYERS), device)


class Lasp(Contiguous):
    name = "lasp"
    what = "linear attention, states exchanged (this project)"

    def attention(self, shape: Shape, sequence: lasp.SequenceParallel) -> Attention:
        log_decay = fixed_decay(shape.heads, shape.device)
        options = {"log_decay": log_decay, "sequence": sequence}

        def attention(x: Inputs) -> Tensor:
            W, T = sequence.size, x.q.shape[1]
            return lasp.linear_attention(x.q, x.k, x.v, layout=lasp.ShardLayout((T,) * W), **options)[0]

        return attention

    def one_process(self, inputs: Inputs) -> Tensor:
        log_decay = fixed_decay(inputs.q.shape[2], inputs.q.device)
        return lasp.linear_attention(inputs.q, inputs.k, inputs.v, log_decay=log_decay)[0]
