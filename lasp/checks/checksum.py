"""Checksums by which ranks compare what each of them holds whole: parameters, initial states, a batch.

Bitwise, so that equal means equal: every number is taken as an integer, and its sum, weighted by its place, is taken
modulo 2^64, which is exact in any order and on any device. Numbers that have changed places give another sum.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lasp.ranks.parts import is_split, part_of

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**22  # numbers; in between they need 16 bytes each
_WEIGHT = -7046029254386353131  # odd, of bits that look random: 2^64 over the golden ratio, as a signed number


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The checksum of each tensor, with its shape and dtype. The host waits for each device once."""
    found: dict[str, Tensor] = {name: _sum(x.detach()) for name, x in tensors.items()}
    on: dict[torch.device, list[str]] = {}
    for name, x in found.items():
        on.setdefault(x.device, []).append(name)
    numbers = {name: n for names in on.values() for name, n in zip(names, _to_host([found[name] for name in names]))}
    return {name: f"{form(x)} checksum {numbers[name] % 2**64:016x}" for name, x in tensors.items()}


class RunningChecksums:
    """The checksums of many batches, by the names of their tensors; no host waits before it reads them."""

    def __init__(self):
        self.count = 0
        self._sums: dict[str, Tensor] = {}
        self._forms: dict[str, int] = {}

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take in one more batch; their order counts."""
        self.count += 1
        for name, x in tensors.items():
            now = _sum(x.detach())
            before = self._sums.get(name, now.new_zeros(())).to(now.device)
            self._sums[name] = before * _WEIGHT + now
            self._forms[name] = zlib.crc32(f"{self.count} {form(x)}".encode(), self._forms.get(name, 0))

    def read(self) -> dict[str, str]:
        """The checksum of each name; the host waits for the device."""
        return {
            name: f"shapes {self._forms[name]:08x} checksum {int(x) % 2**64:016x} of {self.count} batches"
            for name, x in self._sums.items()
        }


def _to_host(sums: list[Tensor]) -> list[int]:
    return torch.stack(sums).tolist()


def _sum(x: Tensor) -> Tensor:
    """[] int64, modulo 2^64."""
    flat = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).contiguous().flatten()
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for first in range(0, len(flat), _AT_ONCE):
        part = flat[first : first + _AT_ONCE]
        numbers = part.view(_INTEGERS[part.element_size()]).to(torch.int64)
        places = torch.arange(first, first + len(part), dtype=torch.int64, device=x.device)
        total += (numbers * (places * _WEIGHT * 2 + 1)).sum()  # an odd weight: one number that differs always shows
    return total


def form(x: Tensor) -> str:
    """Shape and dtype, for messages."""
    return f"{list(x.shape)} {x.dtype}"


def forms_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The form of each parameter: shape (of a sharded one, that of the whole), dtype, whether it is trained, and the
    dtype of its gradient if that is another."""
    return {
        name: f"{'of unknown shape' if is_lazy(p) else form(p)}, {'trained' if p.requires_grad else 'frozen'}"
        + ("" if gradient_dtype(p) == p.dtype else f" with a gradient in {gradient_dtype(p)}")
        for name, p in parameters
    }


def gradient_dtype(p: Tensor) -> torch.dtype:
    """In which the gradients of a parameter are added up over ranks, also by those that have none: `p.grad_dtype`. If
    that is None, a gradient may have any."""
    return torch.promote_types(p.dtype, torch.float32) if p.grad_dtype is None else p.grad_dtype


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that a rank holds whole, and the parts that it has as one of the ranks of tensor parallelism; not
    those that FSDP has sharded, or that have no memory yet."""
    parts = ((name, part_of(p.detach()) if is_split(p) else p) for name, p in model.named_parameters())
    return {
        name: p for name, p in parts if not is_lazy(p) and type(p.data) is Tensor and not p.is_meta and not _of_fsdp1(p)
    }


def whole_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a rank holds whole, non-persistent ones too; not those without memory, and no sparse ones."""
    return {
        name: b
        for name, b in model.named_buffers()
        if not is_lazy(b) and type(b.data) is Tensor and not b.is_meta and b.layout is torch.strided
    }


def _of_fsdp1(p: Tensor) -> bool:
    """Whether it is a part of what PyTorch's first FSDP has laid end to end."""
    return getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False)
