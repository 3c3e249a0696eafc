"""What every peer is to the benchmark, and what the benchmark does with each of them alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

import lasp


@dataclass(frozen=True)
class Shape:
    """q, k, v [batch, tokens of a rank, heads, dim]; K = V = dim."""

    batch: int
    tokens: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Inputs:
    """What an attention takes, and the gradient of its output; `extra` are a peer's own inputs, [B, T, ...] each."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    extra: dict[str, Tensor]

    @classmethod
    def random(cls, shape: Shape, seed: int, tokens: int | None = None) -> Inputs:
        """The same on every rank for the same seed."""
        draw = torch.Generator(shape.device).manual_seed(seed)
        size = (shape.batch, tokens or shape.tokens, shape.heads, shape.dim)
        q, k, v, do = (torch.randn(size, generator=draw, device=shape.device) for _ in range(4))
        return cls(*(x.to(shape.dtype) for x in (q, k, v, do)), {})

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same of every tensor."""
        extra = {name: change(x) for name, x in self.extra.items()}
        return Inputs(change(self.q), change(self.k), change(self.v), change(self.do), extra)

    def leaves(self) -> Inputs:
        """Fresh leaves that require a gradient, but for do."""
        fresh = self.map(lambda x: x.detach().clone().requires_grad_())
        return replace(fresh, do=self.do)

    @property
    def differentiable(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.extra.values()]


Attention = Callable[[Inputs], Tensor]


class Peer(Protocol):
    """One way to compute causal attention whose sequence is split over ranks."""

    name: str
    what: str  # one line for the table

    def unavailable(self, shape: Shape, sequence: lasp.SequenceParallel) -> str | None:
        """Why it cannot run here; None if it can."""
        ...

    def inputs(self, shape: Shape, seed: int, tokens: int | None = None) -> Inputs:
        """Random inputs of the given shape, the same on every rank."""
        ...

    def shard(self, whole: Tensor, sequence: lasp.SequenceParallel) -> Tensor:
        """This rank's part of a whole [B, T, ...], as this peer lays tokens on ranks."""
        ...

    def attention(self, shape: Shape, sequence: lasp.SequenceParallel) -> Attention:
        """From this rank's inputs to this rank's output."""
        ...

    def one_process(self, inputs: Inputs) -> Tensor:
        """The same on a whole sequence, without ranks."""
        ...


class Contiguous:
    """Rank r holds the r-th of W equal parts, q, k and v are all there is, and nothing can be missing."""

    def unavailable(self, shape: Shape, sequence: lasp.SequenceParallel) -> str | None:
        return None

    def inputs(self, shape: Shape, seed: int, tokens: int | None = None) -> Inputs:
        return Inputs.random(shape, seed, tokens)

    def shard(self, whole: Tensor, sequence: lasp.SequenceParallel) -> Tensor:
        return whole.chunk(sequence.size, 1)[sequence.rank].contiguous()


def make(
    peer: Peer, shape: Shape, sequence: lasp.SequenceParallel | None
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward, to be timed; None as `sequence` is the one-process form on as many tokens as a rank has."""
    inputs = peer.inputs(shape, seed=1).leaves()
    attention = peer.one_process if sequence is None else peer.attention(shape, sequence)
    o = attention(inputs)

    def backward() -> object:
        return torch.autograd.grad(o, inputs.differentiable, inputs.do, retain_graph=True)

    return lambda: attention(inputs), backward


def gate(peer: Peer, shape: Shape, sequence: lasp.SequenceParallel) -> float:
    """The worst relative error (Frobenius, over all ranks) of output and gradients against one process."""
    whole = peer.inputs(shape, seed=2, tokens=shape.tokens * sequence.size).leaves()
    expected = _step(peer.one_process, whole)
    mine = whole.map(lambda x: peer.shard(x, sequence)).leaves()
    actual = _step(peer.attention(shape, sequence), mine)
    worst = torch.zeros((), dtype=torch.float64, device=shape.device)
    for x, y in zip(actual, expected):
        y = peer.shard(y, sequence).double()
        error = (x.double() - y).norm() / y.norm()
        worst = torch.maximum(worst, torch.nan_to_num(error, nan=torch.inf))
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=sequence.group)
    return worst.item()


def _step(attention: Attention, inputs: Inputs) -> list[Tensor]:
    o = attention(inputs)
    return [o.detach(), *torch.autograd.grad(o, inputs.differentiable, inputs.do)]
