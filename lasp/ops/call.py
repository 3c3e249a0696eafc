"""What all operators share: one object a call, the agreement before it, and the way of a state between the ranks.

    begin            count the call, and compare it between the ranks if that is due; neither for a recompute
    Call             the tokens of this rank among all, and how a state may travel
    Call.exchange    from the maps of this rank's tokens to the state that enters them

Kernels and exchange meet here and in the operators only: the arithmetic of a map is `lasp_kernels.fold`, its way
`lasp.exchange`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import astuple, dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lasp_kernels as kernels
from lasp import arguments, exchange
from lasp.checks import agreement, finite, reach
from lasp.checks.agreement import Agreement
from lasp.checks.checksum import checksums
from lasp.checks.messages import Kind, check_messages
from lasp.exchange import HeadRuns, StateMap, Terms, horizon
from lasp.layout import LocalRuns, Shard, ShardLayout, crossed_tokens
from lasp.ops import recompute
from lasp.ranks import SequenceParallel, Traffic, waiting
from lasp.ranks.group import process


class MapSteps(Protocol):
    """Of the steps of an operator what concerns its maps; the rest is the operator's own."""

    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def tokens(self) -> int: ...  # noqa: D102
    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def segment_length(self) -> int: ...  # noqa: D102
    def zero_state(self) -> Tensor: ...  # noqa: D102
    def run_map(self, maps: Any, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]: ...  # noqa: D102
    def border_maps(self, maps: Any, *, reverse: bool = False) -> tuple[Tensor, Tensor | None]: ...  # noqa: D102


FORMS = {1: "[H]", 3: "[B, T, H]", 4: "[B, T, H, K]"}
"""Of log-decays, by their dimensions, in messages and for `lasp.explain`."""


def form_of(log_decay: Tensor | None) -> str:
    """Of a log-decay."""
    return "none" if log_decay is None else FORMS[log_decay.ndim]


def begin(
    operator: str, sequence: SequenceParallel | None, x: Tensor | None = None
) -> AbstractContextManager[Agreement | None]:
    """Count a forward call of an operator. A context around it; it gives the `Agreement` that the ranks must come to.

    x is one of its tensors; none in compiled code, which does not see how autocast is set.

    None where nothing is to be compared: on one rank, in a recompute, and at most calls (see `lasp.checks.agreement`).
    """
    if not isinstance(sequence, SequenceParallel):
        return _NOTHING
    finite.note_call(sequence)
    if sequence.size == 1:
        return _NOTHING
    if not sequence.of_model:
        process.by_hand = True
    if sequence.peers.busy:
        raise RuntimeError("the function that makes q must not exchange anything among the same ranks")
    if recompute.under_way():
        return _NOTHING
    agreement.note_autocast(sequence, None if not isinstance(x, Tensor) or x.is_meta else x.device.type)
    traffic = sequence.by_operator.get(operator) or sequence.traffic_of(operator)
    if traffic.calls % agreement.EVERY == 0 and (due := agreement.of_call(sequence, traffic)) is not None:
        return due  # which counts the call once the ranks have agreed
    traffic.calls += 1
    return _NOTHING


_NOTHING = nullcontext()


@dataclass(frozen=True)
class Call:
    """One call of an operator, besides its tensors; calls that are alike share one.

    Args:
        operator: its name.
        shard: this rank's tokens among those of all ranks.
        segment_length: as asked for.
        ends: whether there is an initial or final state.
        rates: the fixed log-decay of each head, where the host knows it.
        settings: what else all ranks must call with, though messages fit without, by name; the same of eager and of
            compiled code.
    """

    operator: str
    shard: Shard
    segment_length: int | None = None
    ends: bool = False
    rates: tuple[float, ...] | None = None
    settings: Kind = ()
    sequence: SequenceParallel | None = field(init=False)  # the ranks; None where there is nothing to exchange
    traffic: Traffic = field(init=False, repr=False)  # what this operator has exchanged in its layer
    _terms: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)
    facts: Kind = field(init=False, repr=False)  # what ranks compare at every call; a layout beside it
    layout_in_short: str | None = field(init=False, repr=False)
    _key: str = field(init=False, repr=False)  # by which a recompute finds its original

    def __post_init__(self) -> None:
        sequence = self.shard.sequence
        traffic = Traffic() if sequence is None else sequence.traffic_of(self.operator)
        layer = "" if sequence is None else f"{sequence.name!r} {int(sequence.handle)}"
        if sequence is not None:
            traffic.repeats = recompute.repeats()
        for name, value in (
            ("sequence", sequence),
            ("traffic", traffic),
            ("facts", (*self.settings, ("segment_length", self.segment_length))),
            ("layout_in_short", None if self.shard.layout is None else _in_short(self.shard.layout)),
            ("_key", f"{self.operator} of layer {layer}"),
        ):
            object.__setattr__(self, name, value)

    # What ranks compare

    @property
    def needs_equal_tokens(self) -> bool:
        """Whether ranks must hold as many tokens: their messages are equally long, and no layout tells how long."""
        sequence = self.sequence
        if sequence is None or sequence.schedule is None or self.shard.layout is not None:
            return False
        return self.segment_length is not None and sequence.schedule.needs_equal_lengths(sequence.size)

    def fingerprint(self, tensors: dict[str, Tensor | None], **settings: object) -> dict[str, object]:
        """What must be the same on all ranks, lest their messages differ in size, number or meaning."""
        sequence, traffic = self.sequence, self.traffic
        assert sequence is not None
        total = sequence.traffic
        return {
            "layer": sequence.name,
            "operator": self.operator,
            "call": traffic.calls,
            "exchanges": [total.forward_exchanges, total.reverse_exchanges],
            "ranks": sequence.ranks,
            "exchange": [sequence.exchange, *astuple(exchange.cost.network_of(sequence))],
            "softmax": sequence.softmax,
            **{name: _form(x, name) for name, x in tensors.items()},
            **_values_held_alike(tensors, self.rates),
            "layout": self.layout_in_short,
            "segment_length": self.segment_length,
            "tokens": next(x.shape[1] for x in tensors.values() if x is not None) if self.needs_equal_tokens else None,
            "decay_on_host": self.rates,
            "check_finite": sequence.check_finite,
            **settings,
        }

    def note_final_state(self, x: Tensor) -> None:
        """One is asked for, of x [B, T, ...]: if that is padded, a layout must say so."""
        if self.sequence is not None:
            who = f"the final state of {self.operator}"
            reach.note_call(who, x, self.shard.layout, self.sequence, reach.FINAL_STATE)

    # How a state travels

    def terms(self, steps: MapSteps, *, given: bool, reverse: bool = False, at_once: bool = False) -> Terms:
        """On what terms the maps of these steps travel; `given` is whether own states stand before them."""
        key = (steps.heads, steps.tokens, steps.dtype, steps.segment_length, given, reverse, at_once)
        found = self._terms.get(key)
        if found is None:
            found = self._terms[key] = Terms(
                reverse=reverse,
                far=self._far(steps, reverse=reverse),
                units=self._most_units(steps, given),
                ragged=self.segment_length is not None and self.shard.layout is None,
                at_once=at_once,
                borrow=True,
                passes=not self.shard.packed or self.shard.lets_pass(reverse=reverse),
                reach=self.shard.reach(reverse=reverse),
            )
        return found

    def _far(self, steps: MapSteps, *, reverse: bool) -> HeadRuns:
        """The heads that need more than the neighbour; the same on every rank."""
        layout, crossed = self.shard.layout, None
        if layout is not None and len(layout.lengths) > 2:
            crossed = crossed_tokens(layout, reverse)
            if self.segment_length is not None:  # then a state crosses a segment at a time
                crossed = tuple(min(tokens, steps.segment_length) for tokens in crossed)
        return horizon.far_heads(self.rates, steps.heads, crossed, steps.dtype)

    def _most_units(self, steps: MapSteps, with_own: bool) -> int:
        """The most maps that any rank sends; without a layout, if all hold as many tokens."""
        if self.segment_length is None:
            return 1
        lengths = [steps.tokens] if self.shard.layout is None else self.shard.layout.lengths
        return max(1, *(-(-tokens // steps.segment_length) for tokens in lengths)) + with_own

    def remembered_tokens(self, dtype: torch.dtype) -> float:
        """Tokens after which nothing is left of a state; infinite if the host cannot know, or bits are promised."""
        if self.rates is None or self.segment_length is not None or self.shard.packed:
            return math.inf
        known = self._terms.get(dtype)
        if known is None:
            known = self._terms[dtype] = horizon.memory(self.rates, kernels.state_dtype(dtype))
        return known

    def exchange(self, maps: Callable[[], StateMap], terms: Terms) -> Callable[[], Tensor]:
        """Send what this rank's tokens do to a state; the result waits for the state that enters them.

        In the recompute of a checkpoint nothing is sent: what the original forward received is there.
        """
        sequence = self.sequence
        assert sequence is not None
        if terms.reverse:
            return self._start(maps(), terms)
        reception = self.reception()
        if reception.result is not None:
            return lambda: reception.result  # type: ignore[return-value]
        if reception.kept and terms.borrow:
            terms = replace(terms, borrow=False)
        wait = self._start(maps(), terms)
        return (lambda: reception.keep(wait())) if reception.kept else wait

    def _start(self, local: StateMap, terms: Terms) -> Callable[[], Tensor]:
        sequence = self.sequence
        assert sequence is not None
        kind = exchange.kind_of(local, sequence, terms)
        self.check_messages("the state", kind, local.state, reverse=terms.reverse)
        return exchange.start(local, sequence, fold=kernels.fold, terms=terms, operator=self.operator).wait

    def check_messages(self, thing: str, kind: Kind, x: Tensor, *, reverse: bool) -> None:
        """Raise on every rank if the ranks are about to send different things; x lies where the messages do."""
        sequence = self.sequence
        assert sequence is not None
        if sequence.validate == "first":
            where = f"layer {sequence.name!r}, {'backward' if reverse else 'forward'}"
            what = f"{self.operator}, {thing}"
            if reverse:  # of a forward whose facts were compared
                check_messages(sequence, what, kind, x.device, where=where)
            else:
                facts = (*self.facts, ("layout", self.layout_in_short))
                check_messages(sequence, what, kind, x.device, facts=facts, where=where)
                agreement.note_call(sequence, self.operator, self.facts, self.layout_in_short)

    @property
    def key(self) -> str:
        """By which a recompute finds its original."""
        return self._key

    def reception(self) -> recompute.Reception:
        """Of a communication of this call's forward: does it take place, or is its result known?"""
        return recompute.reception(self._key)

    def enter(
        self, steps: MapSteps, maps: Any, ends: Tensor | None, *, reverse: bool = False, at_once: bool = False
    ) -> Callable[[], Tensor | None]:
        """Send what the maps of this rank's segments do to a state; the result waits for what enters each of its runs.

        `ends` are the states before all sequences (`reverse`: the gradients of those after them); None is zeros.
        `at_once`: nothing is computed before the result waits.
        """
        shard, given = self.shard, ends is not None
        if shard.sequence is None and not given:
            return lambda: None
        own = None  # zeros, where nobody reads them
        if given or shard.packed or self.segment_length is not None:
            own = shard.own_states(ends, steps.zero_state(), first=not reverse)
        if shard.sequence is None:
            return lambda: own
        terms = self.terms(steps, given=given, reverse=reverse, at_once=at_once)
        wait = self.exchange(lambda: self._at_border(steps, maps, own, given, reverse=reverse), terms)
        if not shard.packed and (shard.runs.continued if reverse else shard.runs.continues):
            return wait
        return lambda: shard.enter(own, wait(), reverse=reverse)

    def _at_border(self, steps: MapSteps, maps: Any, own: Tensor | None, given: bool, *, reverse: bool) -> StateMap:
        """What this rank's tokens do to the state that the next rank (`reverse`: the previous) will receive.

        Only the run at that border matters: as one map, or with a segment length as that of each of its segments, so
        that ranks continue the fold that one rank would do. If the run began on this rank, nothing from before gets
        past it, and its own state, if one was `given`, stands in front.
        """
        shard = self.shard
        if self.segment_length is None and not shard.packed:
            state, transition = steps.run_map(maps, reverse=reverse)
            state, transition = state.unsqueeze(0), None if transition is None else transition.unsqueeze(0)
            return StateMap(kernels.fold(own, state, transition).unsqueeze(0) if given else state, transition)
        passes = shard.lets_pass(reverse=reverse)
        if own is not None:
            own = shard.own_at_border(own, reverse=reverse)
        if self.segment_length is None:
            return self._of_run_at_border(steps.run_map(maps, reverse=reverse), own if given else None, passes, reverse)
        assert own is not None
        state, transition = self._that_may_forget(*steps.border_maps(maps, reverse=reverse))
        if passes and len(state):
            return StateMap(state, transition)
        with_own = given or not len(state)
        if with_own:
            state = torch.cat([own.unsqueeze(0), state])
        if transition is not None:
            like = transition.new_empty(1, *transition.shape[1:])
            border = exchange.identity(like) if passes else exchange.forgetting(like)
            transition = torch.cat([border, transition if with_own else transition[1:]])  # type: ignore[list-item]
        return StateMap(state, transition)

    def _of_run_at_border(
        self, of_runs: tuple[Tensor, Tensor | None], own: Tensor | None, passes: bool, reverse: bool
    ) -> StateMap:
        state, transition = of_runs
        state = self.shard.at_border(state, reverse=reverse).unsqueeze(0)
        if transition is not None:
            transition = self.shard.at_border(transition, reverse=reverse).unsqueeze(0)
        state, transition = self._that_may_forget(state, transition)
        if own is not None:
            state = kernels.fold(own, state, transition).unsqueeze(0)
        return StateMap(state, transition if passes else exchange.forgetting(transition))

    def _that_may_forget(self, state: Tensor, transition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Packed, some rank's map must let nothing pass, so that all have a transition. (Dense, only the first: before
        that there is nothing.)"""
        if transition is None and self.shard.packed:
            transition = state.new_zeros(*state.shape[:3], 1)
        return state, transition

    def sum_over_ranks(self, states: Tensor, *, reverse: bool = False, what: str = "final states") -> Tensor:
        """In place. Forward, one rank holds each final state, the others zeros; reverse, each its gradient of all."""
        sequence = self.sequence
        if sequence is not None:
            direction = "backward" if reverse else "forward"
            what = f"gradients of the {what}" if reverse else what
            self.check_messages(f"the sum of the {what}", kind_of_tensor(states), states, reverse=reverse)
            with waiting(f"layer {sequence.name!r}, {direction}: the sum of the {what} of all ranks"):
                dist.all_reduce(states, group=sequence.group)
        return states

    def final_state(self, behind: Tensor) -> Tensor:
        """Of all sequences on every rank, from the states behind this rank's runs."""
        own = self.shard.all_states(behind, first=False)
        if self.sequence is None:
            return own
        return recompute.once(self._key, lambda: self.sum_over_ranks(own))


class Padding(NamedTuple):
    """The end of a whole sequence that is no token of it, which an operator leaves out and fills with zeros again."""

    layout: ShardLayout  # without it
    here: int  # how many of this rank's tokens it is

    def cut(self, x: Maybe) -> Maybe:
        """A tensor [B, T, ...] without it; anything else as it is."""
        if not self.here or not isinstance(x, Tensor) or x.ndim < 2:
            return x
        return x[:, : max(0, x.shape[1] - self.here)]  # type: ignore[return-value]

    def fill(self, y: Tensor) -> Tensor:
        """[B, T - here, ...] to [B, T, ...]."""
        return F.pad(y, (0, 0) * (y.ndim - 2) + (0, self.here)) if self.here else y


Maybe = TypeVar("Maybe")


def padding_of(x: Tensor, layout: ShardLayout | None, sequence: SequenceParallel | None) -> Padding | None:
    """The padding of a layout, of which x [B, T, ...] holds this rank's tokens; None where there is none.

    None also where these do not fit: the operator then says so, to the other ranks too.
    """
    if not isinstance(layout, ShardLayout) or not layout.padding:
        return None
    rank, size = (sequence.rank, sequence.size) if isinstance(sequence, SequenceParallel) else (0, 1)
    if len(layout.lengths) != size or not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != layout.lengths[rank]:
        return None
    return Padding(layout.real, layout.lengths[rank] - layout.real.lengths[rank])


_LAYOUTS = (ShardLayout, type(None))


def call_of(
    operator: str,
    x: Tensor,
    layout: ShardLayout | None,
    sequence: SequenceParallel | None,
    *,
    segment_length: int | None = None,
    ends: bool = False,
    rates: tuple[float, ...] | None = None,
    settings: Kind = (),
    name: str = "k",
    edges: bool = False,
) -> Call:
    """The `Call` of an operator whose tensor `name` is x [B, T, ...]; raises where the arguments do not fit.

    `edges`: initial and final states are those before the first and after the last sequence alone, [1, H, K, V].
    """
    if isinstance(sequence, (SequenceParallel, type(None))) and isinstance(layout, _LAYOUTS):
        reach.note_call(operator, x, layout, sequence, reach.DOCUMENTS)
    if sequence is None and layout is None:
        return _alone(operator, x.shape[0], segment_length, ends, rates)
    if not isinstance(sequence, SequenceParallel) or sequence.size == 1 or not isinstance(layout, _LAYOUTS):
        return Call(operator, Shard.of(x, layout, sequence, name, edges=edges), segment_length, ends, rates)
    key = (operator, x.shape[:2], layout, segment_length, ends, rates, settings, edges)
    known = sequence.kept.get(key)
    if known is None:
        shard = Shard.of(x, layout, sequence, name, edges=edges)
        known = Call(operator, shard, segment_length, ends, rates, settings)
        if len(sequence.kept) > exchange.KEPT:
            sequence.kept.clear()
        sequence.kept[key] = known
    return known


@lru_cache(maxsize=256)
def _alone(operator: str, batch: int, segment_length: int | None, ends: bool, rates: tuple[float, ...] | None) -> Call:
    """Of one rank and no packed sequences."""
    return Call(operator, Shard(LocalRuns(None, range(0), False, False), None, batch), segment_length, ends, rates)


def facts_of(
    layout: ShardLayout | None, sequence: SequenceParallel | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A layout and the ranks as a custom op takes them: tensors on the host, which a graph does not make constants."""
    lengths, cu_seqlens = (None, None) if layout is None else layout.facts
    return lengths, cu_seqlens, None if sequence is None else sequence.handle


def _form(x: Tensor | None, name: str) -> list[object] | None:
    """The shape of a tensor whose second dimension is that of tokens, if it has one, and the dtype."""
    if x is None:
        return None
    of_all = name == "initial_state" or x.ndim < 2
    return [*(size if of_all or dim != 1 else "T" for dim, size in enumerate(x.shape)), str(x.dtype)]


def _values_held_alike(tensors: dict[str, Tensor | None], rates: tuple[float, ...] | None) -> dict[str, str]:
    """Checksums of what every rank holds whole: the initial states, and decays of heads that the host does not know."""
    whole = {"initial_state": tensors.get("initial_state"), "log_decay": tensors.get("log_decay")}
    found = {f"the values of {name}": x for name, x in whole.items() if x is not None}
    if rates is not None or "T" in (_form(whole["log_decay"], "log_decay") or ()):
        found.pop("the values of log_decay", None)
    return checksums(found)


def kind_of_tensor(x: Tensor) -> Kind:
    """Of a message with all of x."""
    return (("shape", tuple(x.shape)), ("dtype", x.dtype))


def kind_of_tokens(x: Tensor, lengths: Sequence[int] = ()) -> Kind:
    """Of a message with the tokens of x [B, T, ...], of which ranks hold `lengths`."""
    shape = (*x.shape[:1], "T", *x.shape[2:])
    return (("shape", shape), ("dtype", x.dtype), ("most tokens", max(lengths, default=None)))


@lru_cache(maxsize=64)
def _in_short(layout: ShardLayout) -> str:
    """A checksum stands for the offsets, of which there may be thousands."""
    count = "a batch" if layout.cu_seqlens is None else f"{len(layout.cu_seqlens) - 1} packed sequences"
    facts = (layout.lengths, layout.cu_seqlens)
    return f"{count} over {len(layout.lengths)} ranks, checksum {zlib.crc32(repr(facts).encode()):08x}"


def of_own_tokens(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """[B, T, heads, V], what a trial (lasp.checks.trial) gets for the attention of q, k and v: each token sees itself
    only."""
    q, k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k, v))
    return v + q.mean(-1, keepdim=True) + k.mean(-1, keepdim=True)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether backward will come to a call of these, which must be so on all ranks or on none."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast all in its dtype, as for any matrix product; log_decay and states stay as they are."""
    device = tensors[0].device.type
    if device == "meta":  # which has no autocast, and which the checks refuse
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def no_autocast(device_type: str) -> AbstractContextManager:
    """Inside, everything is computed in its own dtype, and no selective checkpoint sees it. (PyTorch's context takes
    long where there is nothing to do.)"""
    unseen = recompute.unseen()
    if not torch.is_autocast_enabled(device_type):
        return unseen
    contexts = ExitStack()
    contexts.enter_context(torch.autocast(device_type, enabled=False))
    contexts.enter_context(unseen)
    return contexts


def check_options(scale: float, output_final_state: bool, segment_length: int | None) -> tuple[float, int | None]:
    """What operators with a state take besides tensors; scale and segment_length as Python's numbers."""
    arguments.flag("output_final_state", output_final_state)
    length = None if segment_length is None else arguments.integer("segment_length", segment_length)
    return arguments.number("scale", scale), length


def check_initial_state(initial_state: Tensor, k: Tensor, v: Tensor, call: Call, *, normalize: bool = False) -> None:
    """Raise `ValueError` unless it is [N, H, K, V] on the device of k, H the heads of v; `normalize`: V + 1."""
    arguments.float_tensor("initial_state", initial_state)
    expected = (call.shard.num_sequences, v.shape[2], k.shape[3], v.shape[3] + normalize)
    if tuple(initial_state.shape) != expected:
        form = "[N, H, K, V + 1]" if normalize else "[N, H, K, V]"
        raise ValueError(f"initial_state must have shape {form} = {expected}, got {tuple(initial_state.shape)}")
    if initial_state.device != k.device:
        raise ValueError(f"initial_state must be on the device of k, {k.device}, got {initial_state.device}")
