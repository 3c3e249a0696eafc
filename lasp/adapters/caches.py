"""The caches of transformers, filled with what a prompt has left with lasp's operators.

A cache is a list of layers, each with keys and values, or with the last tokens before a convolution and a state. In
which layer a call's belong nobody has to say: layers run in the order in which a cache has them, so the first softmax
attention of a run is the first layer with keys. How a state lies in the cache is a line of `_STATES`. Whether all that
is right for a model is asked by a trial (`refuse_unlike`), against the cache that the library makes itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.ops import attention, delta, elementwise, halo, softmax
from lasp.ops.session import Held, Key

_STATES = {  # from lasp's [B, H, K, V] to the library's; for Mamba-1 both are [B, D, N]
    attention.NAME: lambda x: x.mT,  # of Mamba-2, [B, H, P, N]
    delta.NAME: lambda x: x,
    elementwise.SELECTIVE: lambda x: x,
}


class Slot(NamedTuple):
    """A place for one tensor in a cache."""

    kind: str  # "keys", "values", "convolution" or "state"
    layer: int  # of the cache
    number: int = 0  # among those of the kind in the layer


Calls = Mapping[Slot, tuple[Key, Tensor]]


def slots_of(cache: Any) -> dict[Slot, Tensor]:
    """What a cache holds, in order."""
    found = {}
    for number, layer in enumerate(cache.layers):
        for kind in ("keys", "values"):
            x = getattr(layer, kind, None)
            if isinstance(x, Tensor) and x.numel():
                found[Slot(kind, number)] = x
        for kind, name in (("convolution", "conv_states"), ("state", "recurrent_states")):
            several = getattr(layer, name, None) or {}
            found |= {Slot(kind, number, place): x for place, x in several.items() if isinstance(x, Tensor)}
    states = enumerate(getattr(cache, "linear_cache", ()))  # MiniMax's own
    found |= {Slot("state", number): x for number, x in states if isinstance(x, Tensor)}
    return found


def known(cache: Any) -> bool:
    """Whether it is one of transformers, and not of a library that has derived its own from it."""
    return type(cache).__module__.startswith("transformers.") and hasattr(cache, "layers")


def by_slot(held: Mapping[Key, Held], lengths: Sequence[int], cache: Any) -> dict[Slot, tuple[Key, Tensor]]:
    """What calls hold of rows of these lengths, as it lies in a cache that has room for it, with the calls.

    Raises:
        ValueError: the cache has no room for a call, or a call for what is in it, or room of another shape.
    """
    slots = slots_of(cache)
    kinds = {softmax.NAME: "keys", halo.NAME: "convolution"}
    free = {kind: iter([x for x in slots if x.kind == kind]) for kind in ("keys", "convolution", "state")}
    found: dict[Slot, tuple[Key, Tensor]] = {}
    for key, one in held.items():
        kind = kinds.get(key.operator, "state")
        slot = next(free[kind], None)
        if slot is None:
            raise ValueError(
                f"layer {key.layer!r} holds {_WHAT[kind]} ({key.operator}), for which the model's cache has no place"
            )
        for name, x in _as_in(cache, key, one, slot, slots, lengths).items():
            here, there = _form(name, x), _form(name, slots[name])
            if here != there:
                raise ValueError(
                    f"layer {key.layer!r} holds {name.kind} of shape {here}, and the model's cache {there}"
                )
            found[name] = key, x
    if rest := [x for x in slots if x not in found]:
        raise ValueError(f"the cache of layer number {rest[0].layer} has {_WHAT[rest[0].kind]} that no operator holds")
    return found


_WHAT = {
    "keys": "keys and values",
    "values": "keys and values",
    "convolution": "the last tokens before a convolution",
    "state": "a state",
}


def _form(slot: Slot, x: Tensor) -> tuple[int, ...]:
    """The shape of a tensor in a cache, but for the number of tokens of keys and values."""
    return (*x.shape[:2], *x.shape[3:]) if slot.kind in ("keys", "values") else tuple(x.shape)


def _as_in(
    cache: Any, key: Key, held: Held, slot: Slot, slots: dict[Slot, Tensor], lengths: Sequence[int]
) -> dict[Slot, Tensor]:
    """What a call holds, in the shapes of the cache, but for what differs."""
    x, there = held.x, slots[slot]
    if slot.kind == "keys":
        reach, window = x.shape[1], getattr(cache.layers[slot.layer], "sliding_window", None)
        if not held.grows and window != reach + 1:
            raise ValueError(
                f"layer {key.layer!r} holds the keys and values of a window of {reach + 1} tokens, and the model's "
                f"cache those of {window or 'all'}"
            )
        wide = there.shape[-1]
        both = _right_aligned(held, lengths).transpose(1, 2)
        values = slot._replace(kind="values")
        return {slot: both[..., :wide], values: both[..., wide:]}
    if slot.kind == "convolution":  # one more token than a convolution looks back, which is never read
        tokens = x.flatten(2).transpose(1, 2)
        return {slot: torch.cat([torch.zeros_like(tokens[..., :1]), tokens], -1)}
    if hasattr(cache, "linear_cache"):
        return {slot: x}
    if key.operator not in _STATES:
        raise ValueError(f"layer {key.layer!r} holds a state of {key.operator}, which is in no cache of transformers")
    return {slot: _STATES[key.operator](x if x.ndim == there.ndim else x.reshape(there.shape))}


def _right_aligned(held: Held, lengths: Sequence[int]) -> Tensor:
    """[B, T, H, K + V]: keys and values with each row's last token at the end; before its first there are zeros."""
    most = max(lengths)
    if not held.grows:  # in a window, where they lie so
        return held.x[:, held.x.shape[1] - min(most, held.x.shape[1]) :]
    if min(lengths) == most:
        return held.x[:, :most]
    found = held.x.new_zeros(len(lengths), most, *held.x.shape[2:])
    for row, length in enumerate(lengths):
        found[row, most - length :] = held.x[row, :length]
    return found


def refuse_unlike(calls: Calls, cache: Any) -> None:
    """Raise `ValueError` unless this is what the library has in its cache behind the same tokens.

    In 16 bits rounding may have chosen another expert, and what is in another order, or of another layer, is still
    farther away.
    """
    there = slots_of(cache)
    bound = 0.5 if any(x.itemsize == 2 for x in there.values()) else 0.02
    for slot, (key, x) in calls.items():
        ours, theirs = x.to(torch.float64), there[slot].to(torch.float64)
        if slot.kind == "convolution":
            ours, theirs = ours[..., 1:], theirs[..., 1:]
        if ours.shape != theirs.shape or not (ours - theirs).norm() <= bound * theirs.norm():
            raise ValueError(
                f"layer {key.layer!r} holds other {slot.kind} ({key.operator}) than the model's cache behind the same "
                "tokens"
            )


def fill(cache: Any, calls: Calls, tokens: int) -> None:
    """Put these into a cache that was used for as many rows; it is then one behind so many tokens."""
    widths = {slot: x.shape[-1] for slot, x in slots_of(cache).items() if slot.kind == "convolution"}
    dtypes = {slot: x.dtype for slot, x in slots_of(cache).items()}
    cache.reset()
    for slot, (_, x) in calls.items():
        x = x.to(dtypes[slot]).contiguous()
        if slot.kind == "keys":
            _, values = calls[slot._replace(kind="values")]
            cache.update(x, values.to(x.dtype).contiguous(), slot.layer)
            layer = cache.layers[slot.layer]
            if hasattr(layer, "cumulative_length"):  # of a window, which counts all tokens
                layer.cumulative_length = tokens
        elif slot.kind == "convolution":
            cache.update_conv_state(x, slot.layer, state_idx=slot.number, conv_kernel_size=widths[slot])
        elif slot.kind == "state" and hasattr(cache, "linear_cache"):
            cache.set_linear_cache(slot.layer, x.clone())
        elif slot.kind == "state":
            cache.update_recurrent_state(x, slot.layer, state_idx=slot.number)


def counts(cache: Any, tokens: int) -> bool:
    """Whether a cache behind so many tokens says so, where a model makes masks by that."""
    return all(cache.is_linear) or cache.get_seq_length() == tokens
