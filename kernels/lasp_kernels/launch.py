# pyright: reportCallIssue=false, reportArgumentType=false
# (a kernel is called with numbers and tensors, not with the types that its body sees)
"""How a Triton kernel is started, and what the card underneath can do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

Layout = tuple[tuple[int, ...], bool]  # strides, and whether the address is a multiple of 16 bytes
Placed = tuple[Tensor, Layout]  # and how it lies


def layout(x: Tensor) -> Layout:
    """All that Triton looks at in a tensor of known dtype, and all that a descriptor depends on."""
    return x.stride(), x.data_ptr() % 16 == 0


def fits_tma(layout: Layout, itemsize: int) -> bool:
    """A descriptor needs addresses and strides that are multiples of 16 bytes, and rows that do not coincide."""
    strides, aligned = layout
    return aligned and strides[1] > 0 and all(stride * itemsize % 16 == 0 for stride in strides[:3])


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the card; on a CPU (interpreter) as if there were 8."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@lru_cache
def has_tma(device: torch.device) -> bool:
    """Whether the card has the copy engine for tiles (Hopper and later); the interpreter acts as if it had."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def early(device: torch.device) -> bool:
    """Whether a kernel is started while the one before it still runs (programmatic dependent launch; from Hopper on).

    It saves a part of what a start and an end take. Such a kernel begins, in all of its programs, with

    1. `gdc_wait`: the kernel before has ended, and all that it has written is seen. Nothing is read, written or asked
       for before, not even weights, which the kernel just before may have changed.
    2. `gdc_launch_dependents`: the next one may begin, and waits in its turn. As this stands behind the wait, all
       kernels but the one just before have ended when a kernel begins: no more than two are there at once.

    So loads and stores keep the order of kernels that run one after the other, also from one replay of a graph to the
    next; a kernel that knows nothing of all this begins when the one before has ended.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class Launch:
    """A kernel with its grid and all of its arguments but the tensors.

    Triton's own way to start a kernel looks at each argument to decide whether it must compile; for forty of them
    this takes longer than a short kernel. So it is taken once, and from then on the compiled kernel is started
    directly. The owner sees to it that tensors of one launch are alike in all that Triton looks at (`layout`).
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        programs: tuple[int, int],
        numbers: tuple,
        *,
        blocks: int = 1,
        **settings: Any,
    ):
        """`settings` are the kernel's constants and Triton's options (num_warps, ...); numbers precede constants.

        `blocks` is for the owner: into how many the columns are divided.
        """
        self.blocks = blocks
        self._describes = bool(settings.get("TMA"))  # the kernel makes descriptors
        constants = (settings.pop(name) for name in kernel.arg_names if name in settings)
        self._arguments = (*numbers, *constants)
        self._kernel, self._grid, self._options = kernel, (*programs, 1), settings
        self._device = device if device.type == "cuda" else None
        self._compiled: Callable | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start it on the device of the tensors; Triton would take the current one."""
        if self._device is not None and torch.cuda.current_device() != self._device.index:
            with torch.cuda.device(self._device):
                return self(*tensors)
        if self._describes:
            _allow_scratch()
        if self._compiled is not None:
            self._compiled(*tensors, *self._arguments)
        elif 0 not in self._grid:
            compiled = self._kernel[self._grid](*tensors, *self._arguments, **self._options)
            if compiled is not None:  # as it is under the interpreter
                self._compiled = compiled[self._grid]


_thread = threading.local()


def _allow_scratch() -> None:
    """Triton keeps the allocator by thread; backward has one of its own."""
    if not hasattr(_thread, "has_allocator"):
        triton.set_allocator(_scratch)
        _thread.has_allocator = True


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where programs put the descriptors that they make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")
