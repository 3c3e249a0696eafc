"""Mamba's selective scan in plain PyTorch on any device, without the states of all tokens in memory.

    h_t = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t        y_t = sum_N h_t C_t

for each channel d of D and each of N numbers of its state (arXiv 2312.00752, section 3). States, decays and inputs of
all tokens would be N times as many numbers as u, mostly 16 times. So all three are made for one token of each segment
at a time (see elementwise.py); what is kept is a state a segment, N / 32 of the numbers of u in fp32. Backward makes
the states of one piece of the tokens again, as many segments as give the numbers of u or a little more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lasp_kernels.elementwise import ElementwiseSteps, check_not_positive, recurrent_elementwise
from lasp_kernels.operands import check_dense
from lasp_kernels.reference import state_dtype

MOST_STATES = 256  # numbers N of a channel's state for which there is a kernel
PIECE = 1 << 22  # numbers of the states that backward holds at once, or as many as u has


class SelectiveOperands(NamedTuple):
    """u and dt [B, T, D]; A [D, N], <= 0; B and C [B, T, N]. dt >= 0, after its bias and softplus."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor


def recurrent_selective_scan(x: SelectiveOperands, *, cu_seqlens: Sequence[int] | None = None) -> Tensor:
    """Token by token; differentiable by autograd. The oracle of every test, not a path for users.

    y [B, T, D] in the dtype of u; `cu_seqlens` as in `recurrent_elementwise`.
    """
    u, dt, A, B, C = (y.to(state_dtype(x.u.dtype)) for y in x)
    new = (dt * u).unsqueeze(-1) * B.unsqueeze(2)
    h = recurrent_elementwise(new, dt.unsqueeze(-1) * A, cu_seqlens=cu_seqlens)
    return (h * C.unsqueeze(2)).sum(-1).to(x.u.dtype)


def check_selective_inputs(x: SelectiveOperands) -> None:
    """Raise the `ValueError` or `TypeError` that says which argument is wrong, with its value.

    Values are only looked at on a CPU: on a GPU that would wait for the device.
    """
    u, dt, A, *_ = x
    for name, y, ndim, shape in (("u", u, 3, "[B, T, D]"), ("A", A, 2, "[D, N]")):
        check_dense(name, y)
        if y.ndim != ndim or 0 in y.shape[2 if ndim == 3 else 0 :]:
            raise ValueError(f"{name} must have shape {shape} with D, N >= 1, got {tuple(y.shape)}")
    if u.is_meta:
        raise ValueError("u must be on a device that holds numbers, got u on meta")
    of_tokens = (*u.shape[:2], A.shape[1])
    shapes = {"dt": ("[B, T, D]", tuple(u.shape)), "A": ("[D, N]", (u.shape[2], A.shape[1]))}
    shapes |= {"B": ("[B, T, N]", of_tokens), "C": ("[B, T, N]", of_tokens)}
    for name, (form, shape) in shapes.items():
        y = getattr(x, name)
        check_dense(name, y)
        if tuple(y.shape) != shape:
            raise ValueError(f"{name} must have shape {form} = {shape}, got {tuple(y.shape)}")
        if y.device != u.device:
            raise ValueError(f"{name} must be on the device of u, {u.device}, got {y.device}")
    check_not_positive("A", A)
    if dt.device.type == "cpu" and dt.numel():
        low = dt.detach().min()
        if not low >= 0:
            raise ValueError(f"dt must be >= 0, got values down to {low.item()}")


class SelectiveSteps(ElementwiseSteps):
    """The steps for `SelectiveOperands`."""

    def __init__(self, x: SelectiveOperands, *, cu_seqlens: Sequence[int] | None = None):
        super().__init__(x.u, tuple(x.A.shape), cu_seqlens=cu_seqlens)
        states = self.batch * self.segment_length * x.A.numel()  # of a segment
        self._piece = max(1, max(PIECE, x.u.numel()) // max(1, states))  # segments

    def _token(self, x: SelectiveOperands, places: slice) -> tuple[Tensor, Tensor]:
        dt, u, B = (y[:, places].to(self.dtype) for y in (x.dt, x.u, x.B))
        return dt.unsqueeze(-1) * x.A.to(self.dtype), (dt * u).unsqueeze(-1) * B.unsqueeze(2)

    def _state_gradient(self, x: SelectiveOperands, dy: Tensor, places: slice) -> Tensor:
        return dy[:, places].to(self.dtype).unsqueeze(-1) * x.C[:, places].to(self.dtype).unsqueeze(2)

    def outputs(self, x: SelectiveOperands, states: Tensor) -> tuple[Tensor, None]:
        """y [B, T, D]."""
        y = torch.empty(x.u.shape, dtype=self.dtype, device=self.device)
        for places, _, state in self.walk(x, states.clone()):
            y[:, places] = (state @ x.C[:, places].to(self.dtype).unsqueeze(-1)).squeeze(-1)
        return y, None

    def gradients(
        self,
        x: SelectiveOperands,
        dy: Tensor,
        states: Tensor,
        kept: Tensor | None,
        d_states: Tensor,
        needed: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """The gradients of all operands, which share nearly all of the work."""
        found = SelectiveOperands(*[torch.zeros(y.shape, dtype=self.dtype, device=self.device) for y in x])
        for first in range(0, self.segments, self._piece):
            end = min(first + self._piece, self.segments)
            of_tokens = self._states_before(x, states[:, first:end], first, end)
            self._gradients_of_piece(x, dy, of_tokens, d_states[:, first:end], first, end, found)
        return found

    def _states_before(self, x: SelectiveOperands, entering: Tensor, first: int, end: int) -> list[Tensor]:
        """Of the j-th tokens of segments for every j, the states that enter them; and behind the last ones."""
        before = [entering]
        before.extend(state.clone() for _, _, state in self.walk(x, entering.clone(), first, end))
        return before

    def _gradients_of_piece(
        self,
        x: SelectiveOperands,
        dy: Tensor,
        before: list[Tensor],
        carried: Tensor,
        first: int,
        end: int,
        found: SelectiveOperands,
    ) -> None:
        """Written to their places in `found`; that of A is added."""
        A = x.A.to(self.dtype)
        for j, places, log_decay, dh in self.walk_back(x, dy, carried.clone(), first, end):
            dt, u, B, dy_j = (y[:, places].to(self.dtype) for y in (x.dt, x.u, x.B, dy))
            behind = before.pop()
            found.C[:, places] = (dy_j.unsqueeze(-2) @ behind).squeeze(-2)
            found.B[:, places] = ((dt * u).unsqueeze(-2) @ dh).squeeze(-2)
            d_new = (dh @ B.unsqueeze(-1)).squeeze(-1)
            d_decay = dh.mul_(log_decay.exp_()).mul_(before[j][:, : dh.shape[1]])
            self._cut(d_decay, places)
            found.u[:, places] = dt * d_new
            found.dt[:, places] = u * d_new + (d_decay * A).sum(-1)
            found.A.add_((d_decay * dt.unsqueeze(-1)).sum((0, 1)))
