"""Recurrences in which every channel of a state decays by itself, in plain PyTorch on any device.

    h_t = exp(log_decay_t) * h_{t-1} + x_t

per channel, with log_decay <= 0; -inf forgets all (RG-LRU, arXiv 2402.19427; HGRN; Mamba-1, see selective_scan.py). Its
gradient is the same recurrence from the last token to the first: dh_t is what the output gives plus what comes back
from the token behind, and c_t = exp(log_decay_t) dh_t goes on to the token before::

    dh_t = dy_t + c_{t+1}        dx_t = dh_t        d log_decay_t = c_t * h_{t-1}

Tokens are cut into *segments* of equal length. The j-th tokens of all segments are one step, a strided slice of the
inputs, so that T tokens take as many steps as a segment has tokens, and nothing is copied or padded: first with zeros
before each segment, for what it leaves behind; then the states that enter segments are known (`scan`), and the second
walk is that of the recurrence itself. The gradient walks back in the same two ways.

All factors are exp of a sum of log-decays, hence <= 1: nothing overflows, and no sum is a difference of longer ones.
A packed document that begins lets nothing pass, not even NaN.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp_kernels.delta import host_bounds
from lasp_kernels.operands import check_dense
from lasp_kernels.reference import state_dtype

# The most tokens of a segment. A factor near 1 is rounded, up to 3e-8 in fp32, to the same side for each token if the
# decay is fixed: 32 of them are 1e-6. From segment to segment a factor is exp of a sum, and rounded once.
SEGMENT = 32


class RecurrenceOperands(NamedTuple):
    """x [B, T, ...] and log_decay, which has 1 in some of the dimensions behind T, or all of x."""

    x: Tensor
    log_decay: Tensor


class ElementwiseMaps(NamedTuple):
    """What each segment does to a state that passes through it: S -> exp(log_decay) * S + state; [B, segments, ...]."""

    state: Tensor
    log_decay: Tensor


def recurrent_elementwise(x: Tensor, log_decay: Tensor, *, cu_seqlens: Sequence[int] | None = None) -> Tensor:
    """Token by token; differentiable by autograd. The oracle of every test, not a path for users.

    h [B, T, ...] in x's dtype. `cu_seqlens`: offsets of packed documents, on the host, with B = 1.
    """
    bounds = [0, x.shape[1]] if cu_seqlens is None else host_bounds(cu_seqlens, x.shape[0], x.shape[1])
    dtype, states = state_dtype(x.dtype), []
    for start, end in zip(bounds, bounds[1:]):
        state = torch.zeros(x.shape[:1] + x.shape[2:], dtype=dtype, device=x.device)
        for t in range(start, end):
            state = log_decay[:, t].to(dtype).exp() * state + x[:, t].to(dtype)
            states.append(state)
    return torch.stack(states, 1).to(x.dtype) if states else torch.zeros_like(x)


def check_recurrence_inputs(x: Tensor, log_decay: Tensor) -> None:
    """Raise the `ValueError` or `TypeError` that says which argument is wrong, with its value.

    Decays are only looked at on a CPU: on a GPU that would wait for the device.
    """
    check_dense("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have shape [B, T, ...], got {tuple(x.shape)}")
    if x.is_meta:
        raise ValueError("x must be on a device that holds numbers, got x on meta")
    if math.prod(x.shape[2:]) == 0:
        raise ValueError(f"x must have at least one channel, got {tuple(x.shape)}")
    check_dense("log_decay", log_decay)
    if log_decay.device != x.device:
        raise ValueError(f"log_decay must be on the device of x, {x.device}, got {log_decay.device}")
    fits = log_decay.ndim == x.ndim and log_decay.shape[:2] == x.shape[:2]
    if not fits or any(size not in (1, of_x) for size, of_x in zip(log_decay.shape[2:], x.shape[2:])):
        raise ValueError(
            f"log_decay must have the shape of x, {tuple(x.shape)}, or 1 in dimensions behind [B, T], got "
            f"{tuple(log_decay.shape)}"
        )
    check_not_positive("log_decay", log_decay)


def check_not_positive(name: str, x: Tensor) -> None:
    """Raise `ValueError` if it is seen on a CPU that a number is positive or NaN."""
    if x.device.type == "cpu" and x.numel():
        high = x.detach().max()
        if not high <= 0:
            raise ValueError(f"{name} must be <= 0, got values up to {high.item()}")


class ElementwiseSteps(ABC):
    """The steps of forward and backward on one rank, for inputs of one shape.

    Forward: `local_maps` -> `scan` -> `outputs`. Backward: `gradient_maps` -> `scan(reverse=True)` -> `gradients`.
    `run_map` gives what ranks exchange: states [N, 1, channels, 1] and log-decays [N, 1, channels]. Packed, N is 1, the
    run at the border of the tokens, since another rank can continue no other. x are operands of the shapes of the
    inputs; states and gradients are in the state's dtype.
    """

    def __init__(self, like: Tensor, channels: tuple[int, ...], *, cu_seqlens: Sequence[int] | None = None):
        """`like` [B, T, ...] has the tokens and the dtype of inputs; `channels` is the shape of a state."""
        self.heads = 1  # whose state has all channels as rows
        self.batch, self.tokens = like.shape[:2]
        self.channels, self.dtype, self.device = channels, state_dtype(like.dtype), like.device
        self._rows = math.prod(channels)  # of a state; -1 would not do where the batch is empty
        # As many steps in a segment as segments, for few tokens: then both are few.
        self.segment_length = max(1, min(SEGMENT, math.isqrt(max(0, self.tokens - 1)) + 1))
        self.segments = -(-self.tokens // self.segment_length)
        self._begins = self._opens = None
        if cu_seqlens is not None:
            self._find_documents(host_bounds(cu_seqlens, self.batch, self.tokens))

    def _find_documents(self, bounds: list[int]) -> None:
        """At which tokens documents begin, and in which segments such tokens are. Not the first: what enters it is
        zero, if it begins here."""
        begins = document_starts(tuple(bounds), self.tokens, self.device)
        self._begins = begins != 0
        padding = self.segments * self.segment_length - self.tokens
        padded = torch.nn.functional.pad(self._begins, (0, padding))
        self._opens = padded.view(self.segments, self.segment_length).any(1)

    @abstractmethod
    def _token(self, x: Any, places: slice) -> tuple[Tensor, Tensor]:
        """log_decay, which may broadcast, and input of some tokens: [B, n, *channels] in the state's dtype."""

    @abstractmethod
    def _state_gradient(self, x: Any, dy: Tensor, places: slice) -> Tensor:
        """What the gradient of their output gives to their states: [B, n, *channels]."""

    @abstractmethod
    def outputs(self, x: Any, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of all tokens, from the states that enter segments, and what backward needs beside those."""

    @abstractmethod
    def gradients(
        self, x: Any, dy: Tensor, states: Tensor, kept: Tensor | None, d_states: Tensor, needed: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Of the operands, None where not needed, in their shapes; `states` and `kept` are of forward."""

    # What the recurrence does

    def _places(self, j: int, first: int = 0, end: int | None = None) -> slice:
        """The j-th tokens of segments. The last one may have no such token: then it is not among them."""
        length = self.segment_length
        return slice(first * length + j, (self.segments if end is None else end) * length, length)

    def _cut(self, x: Tensor, places: slice) -> Tensor:
        """In place: zeros in x [B, n, ...] for tokens with which a document begins."""
        return x if self._begins is None else _clear(x, self._begins[places])

    def walk(
        self, x: Any, state: Tensor, first: int = 0, end: int | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """From the states that enter some segments [B, n, *channels], which are overwritten: the steps, each as the
        places of its tokens, their log_decay, and their states, of which the caller must take a copy."""
        for j in range(self.segment_length):
            places = self._places(j, first, end)
            log_decay, new = self._token(x, places)
            part = state[:, : log_decay.shape[1]]
            self._cut(part.mul_(log_decay.exp()), places).add_(new)
            yield places, log_decay, part

    def walk_back(
        self, x: Any, dy: Tensor, carried: Tensor, first: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """The same for gradients, from what comes back from the tokens behind each segment: j, places, log_decay, dh.

        The caller may overwrite dh, which is not looked at again.
        """
        for j in reversed(range(self.segment_length)):
            places = self._places(j, first, end)
            log_decay, _ = self._token(x, places)
            part = carried[:, : log_decay.shape[1]]
            d_state = part.add_(self._state_gradient(x, dy, places)).clone()
            self._cut(part.mul_(log_decay.exp()), places)
            yield j, places, log_decay, d_state

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(self.batch, count, *self.channels, dtype=self.dtype, device=self.device)

    def zero_state(self) -> Tensor:
        """A state of zeros for every run at a border of the tokens: [N, 1, channels, 1]."""
        return self._zeros(1).view(self.batch, 1, self._rows, 1)

    def local_maps(self, x: Any) -> ElementwiseMaps:
        """What each segment does to a state."""
        state = self._zeros(self.segments)
        return self._maps(state, (log_decay for _, log_decay, _ in self.walk(x, state)))

    def gradient_maps(self, x: Any, dy: Tensor) -> ElementwiseMaps:
        """The same for the gradient of a state."""
        carried = self._zeros(self.segments)
        return self._maps(carried, (log_decay for _, _, log_decay, _ in self.walk_back(x, dy, carried)))

    def _maps(self, state: Tensor, steps: Iterator[Tensor]) -> ElementwiseMaps:
        """Walk, and add up the log-decays of the steps. (Where a document begins they are not looked at.)"""
        total = None
        for log_decay in steps:
            if total is None:
                total = log_decay.new_zeros(self.batch, self.segments, *log_decay.shape[2:])
            total[:, : log_decay.shape[1]] += log_decay
        assert total is not None  # a segment has a token
        return ElementwiseMaps(state, total)

    def run_map(self, maps: ElementwiseMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """What all tokens do to a state that passes, and leave in the run at their end (`reverse`: beginning)."""
        _, end = self.scan(maps, None, reverse=reverse)
        total = maps.log_decay.sum(1, keepdim=True).expand_as(self._zeros(1))
        return end, total.reshape(self.batch, 1, self._rows)

    def border_maps(self, maps: ElementwiseMaps, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """There is no `segment_length` for which these are asked."""
        raise NotImplementedError

    def scan(self, maps: ElementwiseMaps, entering: Tensor | None, *, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """From the state that enters the tokens: those that enter segments [B, segments, *channels]; the one behind.

        In as many steps as the number of segments has binary digits: each map is put behind the one that ends where it
        begins. Products of factors only, and an entry depends on those before it only, so NaN goes nowhere else.
        """
        first = self._zeros(1) if entering is None else entering.view(self.batch, 1, *self.channels).to(self.dtype)
        state, log_decay, opens = maps.state, maps.log_decay, self._opens
        if reverse:
            state, log_decay, opens = state.flip(1), log_decay.flip(1), None if opens is None else opens.flip(0)
        state = torch.cat([first, state], 1)
        factor = torch.cat([log_decay.new_zeros(self.batch, 1, *log_decay.shape[2:]), log_decay], 1).exp()
        opens = None if opens is None else torch.cat([opens.new_zeros(1), opens])
        reach = 1
        while reach <= self.segments:
            passed = factor[:, reach:] * state[:, :-reach]
            if opens is not None:
                _clear(passed, opens[reach:])
                opens = torch.cat([opens[:reach], opens[reach:] | opens[:-reach]])
            state[:, reach:] += passed
            factor[:, reach:] = factor[:, reach:] * factor[:, :-reach]
            reach *= 2
        states, end = state[:, :-1], state[:, -1]
        return states.flip(1) if reverse else states, end.reshape(self.batch, 1, self._rows, 1)


@lru_cache(maxsize=64)
def document_starts(bounds: tuple[int, ...], tokens: int, device: torch.device) -> Tensor:
    """[T] int8: 1 where a packed document begins, the first token left out. Shared by calls: not to be changed."""
    starts = torch.zeros(tokens, dtype=torch.int8)
    starts[[n for n in bounds[1:-1] if n < tokens]] = 1
    if device.type == "cuda":  # so that the host need not wait for the copy
        starts = starts.pin_memory()
    return starts.to(device, non_blocking=True)


class RecurrenceSteps(ElementwiseSteps):
    """Of `RecurrenceOperands`: the output is the state itself, and kept for backward."""

    def __init__(self, x: RecurrenceOperands, *, cu_seqlens: Sequence[int] | None = None):
        super().__init__(x.x, tuple(x.x.shape[2:]), cu_seqlens=cu_seqlens)

    def _token(self, x: RecurrenceOperands, places: slice) -> tuple[Tensor, Tensor]:
        return x.log_decay[:, places].to(self.dtype), x.x[:, places].to(self.dtype)

    def _state_gradient(self, x: RecurrenceOperands, dy: Tensor, places: slice) -> Tensor:
        return dy[:, places].to(self.dtype)

    def outputs(self, x: RecurrenceOperands, states: Tensor) -> tuple[Tensor, Tensor]:
        """h, twice."""
        h = torch.empty(x.x.shape, dtype=self.dtype, device=self.device)
        for places, _, state in self.walk(x, states.clone()):
            h[:, places] = state
        return h, h

    def gradients(
        self,
        x: RecurrenceOperands,
        dy: Tensor,
        states: Tensor,
        kept: Tensor | None,
        d_states: Tensor,
        needed: Sequence[bool],
    ) -> tuple[Tensor, Tensor | None]:
        """dx and, if needed, d log_decay."""
        dx = torch.empty(x.x.shape, dtype=self.dtype, device=self.device)
        d_decay = torch.empty(x.log_decay.shape, dtype=self.dtype, device=self.device) if needed[1] else None
        for j, places, log_decay, dh in self.walk_back(x, dy, d_states.clone()):
            dx[:, places] = dh
            if d_decay is not None:
                assert kept is not None
                before = (kept[:, self._places(j - 1)] if j else states)[:, : dh.shape[1]]
                through = self._cut(dh * log_decay.exp() * before, places)
                d_decay[:, places] = through.sum_to_size(log_decay.shape)
        return dx, d_decay


def _clear(x: Tensor, where: Tensor) -> Tensor:
    """In place: zeros in rows of x [B, n, ...]. By no product, which would keep NaN."""
    return x.masked_fill_(where.view(-1, *[1] * (x.ndim - 2)), 0.0)
