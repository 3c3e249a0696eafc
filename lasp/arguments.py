"""Checks of arguments, a function a kind: what does not fit is an error that names the argument and its value.

Every public function begins with these, before it computes or sends anything. Each returns the value in the one form
that the rest of the code knows: NumPy's numbers become Python's, whose JSON ranks compare. A tensor is no number:
reading one may wait for a device. Operators are called once a layer, so the usual value passes at the first comparison.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SHOWN = 120  # characters of a value that a message holds
_LARGEST = 2**63 - 1  # that an int64 holds, as tensors and kernels have them


def shown(value: object) -> str:
    """A value, for a message: in full if it is short; of a tensor its form, since reading it may wait for a device."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype} on {value.device}"
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN:  # Python may refuse to write it in digits
        return f"{'-' if value < 0 else ''}2**{value.bit_length() - 1} or more"
    try:
        text = repr(value)
    except ValueError:  # such a number is in it
        text = f"a {type(value).__name__} with numbers too long to be shown"
    text = re.sub(" at 0x[0-9a-f]+", "", " ".join(text.split()))  # all ranks say the same
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def integer(name: str, value: Any, *, at_least: int | None = None) -> int:
    """A whole number of 64 bits, Python's or NumPy's; no bool, and no float that happens to be whole."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {shown(value)}")
        value = int(value)
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name} must fit into 64 bits, got {shown(value)}")
    if at_least is not None and value < at_least:
        bound = {0: "must not be negative", 1: "must be positive"}.get(at_least, f"must be at least {at_least}")
        raise ValueError(f"{name} {bound}, got {value}")
    return value


def number(name: str, value: Any, *, positive: bool = False) -> float:
    """A finite number, Python's or NumPy's."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {shown(value)}")
        try:
            value = float(value)
        except OverflowError:
            raise ValueError(f"{name} must be finite, got {shown(value)}") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if positive and value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return value


def flag(name: str, value: Any) -> bool:
    """True or False; nothing that merely counts as one of them, such as the text "no"."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    return value


def choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of some strings."""
    choices = list(choices)
    if text(name, value) not in choices:
        one_of = f"one of {choices}" if len(choices) > 2 else " or ".join(f'"{x}"' for x in choices)
        raise ValueError(f"{name} must be {one_of}, got {value!r}")
    return value


def mapping(name: str, value: Any) -> Mapping[Any, Any]:
    """A dict or the like."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {shown(value)}")
    return value


def module(name: str, value: Any) -> nn.Module:
    """A module of PyTorch."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {shown(value)}")
    return value


def function(name: str, value: Any) -> Callable[..., Any]:
    """What can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {shown(value)}")
    return value


def device(name: str, value: Any) -> torch.device | None:
    """A device or its name, or None."""
    if value is None or isinstance(value, torch.device):
        return value
    try:
        return torch.device(text(name, value))
    except RuntimeError:
        raise ValueError(f"{name} must name a device, got {value!r}") from None


def tensor(name: str, value: Any) -> Tensor:
    """A dense tensor: neither sparse nor nested."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(value)}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one of {value.dtype}")
    return value


def float_tensor(name: str, value: Any) -> Tensor:
    """A dense tensor of real floating-point numbers."""
    if not tensor(name, value).is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {shown(value)}")
    return value


def integer_tensor(name: str, value: Any, *, signed: bool = False) -> Tensor:
    """A dense tensor of integers, no bools; `signed`: of a dtype that holds negative ones."""
    dtype = tensor(name, value).dtype
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool or (signed and not dtype.is_signed):
        raise TypeError(f"{name} must be a tensor of {'signed ' if signed else ''}integers, got {shown(value)}")
    return value


def is_several(value: Any) -> bool:
    """Whether what may be one number or one a row is several; NumPy's numbers and tensors of no dimension are one."""
    return isinstance(value, (list, tuple)) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0)


def integers(name: str, value: Any) -> tuple[int, ...]:
    """A list, a tuple, a NumPy array or a tensor of whole numbers as a tuple. (For one on a device the host waits.)"""
    given = value
    if isinstance(value, Tensor):
        value = tensor(name, value)
    if hasattr(value, "tolist"):  # tensors, and NumPy's arrays
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)):
        raise TypeError(f"{name} must be a sequence of integers, got {shown(given)}")
    try:
        return tuple([integer(name, x) for x in value])
    except TypeError:
        raise TypeError(f"{name} must be integers, got {shown(given)}") from None
    except ValueError:
        raise ValueError(f"{name} must be integers of 64 bits, got {shown(given)}") from None


def on_host(x: Tensor) -> bool:
    """Whether values can be looked at without a wait for a device."""
    return x.device.type == "cpu"


def padding_mask(name: str, value: Any, of: str, ids: Tensor, *, read: bool = False) -> Tensor:
    """A mask of the shape of `ids`, which are called `of`: bools or numbers, 1 for tokens and 0 for padding.

    Its values are looked at on a CPU only, or where it will be `read` anyway. Numbers of packed documents, and what is
    added to scores, are masks of another kind, and would be read as padding in the wrong places, or as none.
    """
    found = tensor(name, value)
    if found.shape != ids.shape:
        raise ValueError(f"{name} must have the shape of {of} {tuple(ids.shape)}, got {shown(found)}")
    if found.dtype.is_complex:
        raise TypeError(f"{name} must be of bools or real numbers, got {shown(found)}")
    if (read or on_host(found)) and not ((found == 0) | (found == 1)).all():
        values = [found.min().item(), found.max().item()]
        raise ValueError(
            f"{name} must be 1 for tokens and 0 for padding, got {shown(values)} among others; packed documents are "
            "told by cu_seqlens"
        )
    return found


def offsets(name: str, value: Any, *, tokens: int, of: str) -> tuple[int, ...]:
    """Offsets of packed sequences, [N + 1] or [1, N + 1] as collators make them, that rise from 0 to `tokens`.

    `of` says for the message whose tokens these are.
    """
    given = value
    is_array = hasattr(value, "tolist") and getattr(value, "ndim", 0) == 2  # of NumPy, or a tensor
    if (is_array or isinstance(value, (list, tuple))) and len(value) == 1 and hasattr(value[0], "__len__"):
        value = value[0]
    found = integers(name, value)
    if len(found) < 2 or found[0] != 0 or any(b < a for a, b in zip(found, found[1:])) or found[-1] != tokens:
        got = shown(found if isinstance(given, Tensor) else given)
        raise ValueError(f"{name} must rise from 0 to the {tokens} tokens of {of}, got {got}")
    return found


def positions(position_ids: Any, input_ids: Any) -> None:
    """Raise unless a model's input_ids are integers [B, T], and position_ids, if any, integers [B, T] or [T]."""
    if integer_tensor("input_ids", input_ids).ndim != 2:
        raise ValueError(f"input_ids must have shape [B, T], got {tuple(input_ids.shape)}")
    if position_ids is None:
        return
    shape = tuple(input_ids.shape)
    if tuple(integer_tensor("position_ids", position_ids).shape) not in (shape, (1, shape[1]), shape[1:]):
        raise ValueError(
            f"position_ids must have shape [B, T] = {shape} or [T] = {shape[1:]} as input_ids, "
            f"got {tuple(position_ids.shape)}"
        )
