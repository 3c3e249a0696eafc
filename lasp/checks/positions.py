"""Positions that somebody counted on a slice, as if it were the whole sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lasp.checks.forward import MASKS, POSITIONS


def refuse_counted_on_a_slice(given: Mapping[str, Any], rank: int, *, wait: bool) -> None:
    """Raise `ValueError` if a slice at whose first token nothing begins is given the positions 0, 1, 2, ...

    Nothing is said with a mask, since all tokens before may be padding.

    Args:
        given: the arguments of a forward on the slice, by name.
        rank: whose.
        wait: also look at positions that lie on a GPU, for which the host waits.
    """
    if any(x is not None and MASKS.fullmatch(name) for name, x in given.items()):
        return
    for name, x in given.items():
        if isinstance(x, Tensor) and POSITIONS.fullmatch(name) and _counts_from_0(x, wait):
            raise ValueError(
                f"{name} must be those in the whole sequence, got 0, 1, 2, ... for the slice of rank {rank}, where "
                "neither the sequence nor a document begins: give the forward local['position_ids'], which "
                "lasp.shard_batch makes"
            )


def _counts_from_0(x: Tensor, wait: bool) -> bool:
    if x.ndim not in (1, 2) or x.is_floating_point() or x.shape[-1] < 2 or x.is_meta or not x.numel():
        return False
    if x.device.type != "cpu" and not wait:
        return False
    return not bool(x[..., 0].any()) and bool((x == torch.arange(x.shape[-1], device=x.device)).all())
