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
import triton.language as tl
from torch import Tensor

Layout = tuple[tuple[int, ...], bool]  # strides, and whether the address is a multiple of 16 bytes


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

    It gains what a start and an end take, some 2 us of each kernel of a token, for the weights are on their way to the
    L2 cache by then. Such a kernel keeps to an order, in all of its programs:

    1. `ask_for` of what it will read. Nothing is read: what another kernel still writes to these addresses goes through
       the same cache. So weights may have been changed by the kernel just before, too.
    2. `gdc_wait`: the kernel before has ended, and all that it has written is seen.
    3. `gdc_launch_dependents`: the next one may begin. As this stands behind the wait, all kernels but the one just
       before have ended when a kernel begins, so that no more than two run at once.
    4. Loads and stores. A store can overtake no load of an earlier kernel, since all of them have ended; nor can one of
       the next kernel, or of the next replay of a graph, overtake a load of this one, for that waits likewise. A kernel
       that knows nothing of all this begins when this one has ended.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def ask_for(addresses, size):
    """Let `size` bytes behind each address come to the L2 cache; both are multiples of 16. Nobody waits for them."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [addresses.to(tl.int64), tl.full(addresses.shape, size, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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
