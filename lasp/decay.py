"""Fixed decays by name: the log-decay [H] of a layer, fp32, on the CPU.

Published models differ although their descriptions read alike, so a model names its schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lasp import arguments

__all__ = ["SCHEDULES", "alibi", "fixed", "none", "retnet", "schedule", "tnl"]


def alibi(heads: int, layer: int, layers: int) -> Tensor:
    """TransNormerLLM's released code, and MiniMax-01: -s_h (1 - l / (L - 1) + 1e-5), s_h = ALiBi's slopes, l from 0.

    For a power of two of heads s_h = 2^(-8h/H), h from 1; otherwise the slopes of the next lower power of two and
    every other one of the next higher (ALiBi, arXiv 2108.12409).

    Args:
        heads: H, of the layer.
        layer: which layer, from 0.
        layers: how many the model has.

    Returns:
        log_decay [H], fp32, on the CPU (or torch's default device).

    Raises:
        ValueError, TypeError: numbers that are no integers, or a layer that is not among the layers.
    """
    _check(heads, layer, layers)
    factor = 1 - layer / (layers - 1) + 1e-5 if layers > 1 else 1 + 1e-5
    return -torch.tensor(_alibi_slopes(heads), dtype=torch.float64).mul(factor).float()


def _alibi_slopes(heads: int) -> list[float]:
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    if power == heads:
        return slopes
    return slopes + _alibi_slopes(2 * power)[0::2][: heads - power]


def tnl(heads: int, layer: int, layers: int) -> Tensor:
    """TransNormerLLM's paper (arXiv 2307.14995): -(8h / H)(1 - l / L), h and l from 1 and 0.

    Args:
        heads: H, of the layer.
        layer: which layer, from 0.
        layers: how many the model has.

    Returns:
        log_decay [H], fp32, on the CPU (or torch's default device).

    Raises:
        ValueError, TypeError: numbers that are no integers, or a layer that is not among the layers.
    """
    _check(heads, layer, layers)
    h = torch.arange(1, heads + 1, dtype=torch.float64)
    return (-(8 * h / heads) * (1 - layer / layers)).float()


def retnet(heads: int, layer: int = 0, layers: int = 1) -> Tensor:
    """RetNet (arXiv 2307.08621): log(1 - 2^(-5-h)), h from 0, the same in every layer.

    Args:
        heads: H, of the layer.
        layer: which layer, from 0; it changes nothing.
        layers: how many the model has; it changes nothing.

    Returns:
        log_decay [H], fp32, on the CPU (or torch's default device).

    Raises:
        ValueError, TypeError: numbers that are no integers, or a layer that is not among the layers.
    """
    _check(heads, layer, layers)
    h = torch.arange(heads, dtype=torch.float64)
    return torch.log1p(-(2.0 ** (-5 - h))).float()


def none(heads: int, layer: int = 0, layers: int = 1) -> None:
    """No decay: plain linear attention. It gives None, which `log_decay=` takes.

    Args:
        heads: H, of the layer.
        layer: which layer, from 0; it changes nothing.
        layers: how many the model has; it changes nothing.

    Raises:
        ValueError, TypeError: numbers that are no integers, or a layer that is not among the layers.
    """
    _check(heads, layer, layers)


def fixed(values: Tensor | Sequence[float], device: torch.device | str | None = None) -> Tensor:
    """A fixed log-decay [H] in fp32 on a device, whose values the host can still tell (see `host_values`).

    So the operator knows, without waiting for the device, which heads a distant rank can still matter to. The values
    must not be changed afterwards.

    Args:
        values: one number a head, finite and <= 0, that requires no gradient.
        device: where it is to lie; None is the CPU.

    Returns:
        log_decay [H], fp32.

    Raises:
        ValueError, TypeError: values that are no log-decays, one a head; a device that is none.
    """
    on_host = values_of("values", values)
    tensor = on_host.to(arguments.device("device", device))
    if tensor.device.type != "cpu" and not torch.compiler.is_compiling():
        _values_of[tensor] = tuple(on_host.tolist())
    return tensor


def values_of(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """A fixed log-decay [H] in fp32 on the CPU; `name` is that of the argument, for the error if it is none."""
    if isinstance(values, Tensor):
        if arguments.tensor(name, values).dtype in (torch.bool, torch.complex64, torch.complex128):
            raise TypeError(f"{name} must be real numbers, got {arguments.shown(values)}")
        if values.requires_grad:
            raise ValueError(f"{name} must not require a gradient: a fixed decay is not learned, got {values!r}")
        on_host = values.detach().to("cpu", torch.float32)
    elif (isinstance(values, Sequence) and not isinstance(values, str)) or hasattr(values, "__array__"):
        try:
            on_host = torch.tensor([arguments.number(name, x) for x in values], dtype=torch.float32, device="cpu")
        except TypeError:
            raise TypeError(f"{name} must be numbers, one a head, got {arguments.shown(values)}") from None
    else:
        raise TypeError(f"{name} must be a tensor or a sequence of numbers, got {arguments.shown(values)}")
    if on_host.ndim != 1:
        raise ValueError(f"{name} must be one log-decay a head, [H], got shape {tuple(on_host.shape)}")
    if not (on_host.isfinite() & (on_host <= 0)).all():
        raise ValueError(f"{name} must be finite and <= 0, got {on_host.tolist()}")
    return on_host


_values_of = WeakTensorKeyDictionary()  # by identity; an entry goes with its tensor


def host_values(log_decay: Tensor | None) -> tuple[float, ...] | None:
    """The values of a fixed log-decay [H], if the host has them: it is on a CPU, or was made by `fixed`.

    None for other forms, and if a gradient is asked for: then the values may change.
    """
    if log_decay is None or arguments.tensor("log_decay", log_decay).ndim != 1 or log_decay.requires_grad:
        return None
    return tuple(log_decay.tolist()) if log_decay.device.type == "cpu" else _values_of.get(log_decay)


SCHEDULES = {"alibi": alibi, "tnl": tnl, "retnet": retnet, "none": none}
"""By name: what `schedule` and the configs of `lasp.models` take."""


def schedule(name: str, heads: int, layer: int, layers: int) -> Tensor | None:
    """The log-decay [H] of a layer, by the name of its schedule.

    Args:
        name: one of `SCHEDULES`: "alibi", "tnl", "retnet" or "none".
        heads: H, of the layer.
        layer: which layer, from 0.
        layers: how many the model has.

    Returns:
        log_decay [H], fp32, on the CPU; None for "none".

    Raises:
        ValueError, TypeError: another name, numbers that are no integers, or a layer that is not among the layers.
    """
    arguments.choice("name", name, SCHEDULES)
    with torch.device("cpu"):  # also when the model is being built on the meta device
        return SCHEDULES[name](heads, layer, layers)


def _check(heads: int, layer: int, layers: int) -> None:
    arguments.integer("heads", heads, at_least=1)
    if arguments.integer("layer", layer, at_least=0) >= arguments.integer("layers", layers, at_least=1):
        raise ValueError(f"layer must be less than layers, got layer {layer} of {layers}")
