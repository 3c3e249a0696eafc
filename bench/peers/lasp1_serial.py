"""LASP-1's released order: receive the state, then compute everything, then send. (OpenNLPLab/LASP.)

Its order only: the kernels are this project's, so the difference to `lasp` is what the order costs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import lasp
from peers.base import Attention, Contiguous, Inputs, Shape
from peers.ours import Lasp, fixed_decay


class Lasp1Serial(Contiguous):
    name = "lasp1_serial"
    what = "linear attention, receive before computing (LASP-1's order, our kernels)"

    def attention(self, shape: Shape, sequence: lasp.SequenceParallel) -> Attention:
        log_decay = fixed_decay(shape.heads, shape.device)
        return lambda x: _Serial.apply(x.q, x.k, x.v, log_decay, sequence)  # type: ignore[return-value]

    def one_process(self, inputs: Inputs) -> Tensor:
        return Lasp().one_process(inputs)


class _Serial(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, sequence):
        state = torch.zeros(q.shape[0], k.shape[2], k.shape[3], v.shape[3], device=q.device)  # fp32
        _receive(state, sequence, -1)
        with torch.enable_grad():
            ctx.leaves = [x.detach().requires_grad_() for x in (q, k, v, state)]
            *qkv, entering = ctx.leaves
            ctx.outputs = lasp.linear_attention(
                *qkv, log_decay=log_decay, initial_state=entering, output_final_state=True
            )
        o, final_state = ctx.outputs
        _send(final_state.detach(), sequence, 1)
        ctx.sequence = sequence
        return o.detach()

    @staticmethod
    def backward(ctx, do):
        d_state = torch.zeros_like(ctx.leaves[-1])
        _receive(d_state, ctx.sequence, 1)
        *gradients, d_entering = torch.autograd.grad(ctx.outputs, ctx.leaves, (do, d_state), retain_graph=True)
        _send(d_entering, ctx.sequence, -1)
        return *gradients, None, None


def _receive(state: Tensor, sequence: lasp.SequenceParallel, offset: int) -> None:
    if (source := (sequence.next_rank if offset > 0 else sequence.prev_rank)) is not None:
        dist.recv(state, group=sequence.group, group_src=source)


def _send(state: Tensor, sequence: lasp.SequenceParallel, offset: int) -> None:
    if (target := (sequence.next_rank if offset > 0 else sequence.prev_rank)) is not None:
        dist.send(state.contiguous(), group=sequence.group, group_dst=target)
