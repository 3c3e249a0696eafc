"""A state passed through maps, as between segments and between ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp_kernels.paths import path_of
from lasp_kernels.plan import MAX_DIM
from lasp_kernels.reference import fold_maps


def fold(entering: Tensor | None, state: Tensor, transition: Tensor | None) -> Tensor:
    """Pass a state [N, H, K, V] through maps as `Steps.border_maps` gives them, with the arithmetic of `Steps.scan`.

    None is a state of zeros, of which the first map leaves its own state.

    state [U, N, H, K, V] and transition, which may come from several devices, and be slices along H or K: None,
    log-decays [U, N, H, K | 1], or matrices [U, N, H, K, K]; see reference.py.
    """
    if entering is None:
        if len(state) == 1:
            return state[0]
        entering, state, transition = state[0], state[1:], None if transition is None else transition[1:]
    if transition is not None and transition.ndim == 5:
        # By K alone, since a slice of the columns of V must have the bits of all of them.
        if state.dtype == torch.float32 and path_of(state, served=transition.shape[-1] <= MAX_DIM) == "triton":
            from lasp_kernels import delta_kernel_steps

            return delta_kernel_steps.fold(entering, state, transition)
        return fold_maps(entering, state, transition)
    # Per channel: as the scan of this form does, on all paths.
    by_number = transition is None or (transition.ndim == 4 and transition.shape[-1] == 1)
    if by_number and path_of(state, served=True) == "triton":
        from lasp_kernels import steps

        return steps.fold(entering, state, transition)
    return fold_maps(entering, state, transition)
