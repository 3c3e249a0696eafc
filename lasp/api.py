"""`parallelize`: one call that splits a model's sequence over ranks, and `explain`, which tells what it did."""

from __future__ import annotations

import fnmatch
import math
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from torch import nn

from lasp import adapters, arguments
from lasp.adapters import Adapter
from lasp.adapters.border import Border, OneRank
from lasp.adapters.handles import Handles
from lasp.checks import finite
from lasp.checks.agreement import Agreement, compare_exchanges, remember_model
from lasp.checks.checksum import forms_of
from lasp.checks.optimizers import before_step
from lasp.checks.use import watch, watch_outputs
from lasp.exchange import cost
from lasp.ranks import SequenceParallel, Traffic, sequence_axis, waiting
from lasp.strict import Asked, NeedsPositions, refuse_mixers

Layers = dict[str, tuple[nn.Module, Adapter]]


class Split:
    """What is known of a model that `parallelize` was called with."""

    def __init__(self, model: nn.Module, sequence: SequenceParallel, layers: Layers, own: Iterable[SequenceParallel]):
        self.sequence, self._model = sequence, weakref.ref(model)
        self.not_asked = ""  # what could not be asked whether it mixes tokens
        self.own = list(own)  # the ranks of each layer; none on one rank, before a sequence is streamed
        self.streamed = ""  # how a sequence was streamed through it last (lasp.streaming), in words
        self.fitting = 0  # the most tokens of a segment for which there is memory; 0: not tried yet
        self._layers = [(path, weakref.ref(module), adapter) for path, (module, adapter) in layers.items()]
        self._handles: Handles | None = None

    def with_ranks(self) -> AbstractContextManager[None]:
        """Inside, its layers call the operators with their ranks, on one rank too."""
        if self.sequence.size > 1:
            return nullcontext()
        if self._handles is None:
            model, layers = self._model(), [(path, module(), adapter) for path, module, adapter in self._layers]
            assert model is not None
            self._handles = Handles(model, [x for x in layers if x[1] is not None], self.sequence)  # type: ignore[misc]
            self.own = self._handles.own
        return self._handles.inside()


_parallelized: weakref.WeakKeyDictionary[nn.Module, Split] = weakref.WeakKeyDictionary()


def splits_of(model: nn.Module) -> list[Split]:
    """Of the model and of those that it holds, what `parallelize` was called with in this process."""
    return [_parallelized[module] for module in model.modules() if module in _parallelized]


def parallelize(
    model: nn.Module,
    mesh,
    *,
    plan: Mapping[str, Adapter] | None = None,
    exchange: str = "auto",
    softmax: str = "all_gather",
    strict: bool = True,
    validate: str = "first",
    check_finite: bool = False,
) -> nn.Module:
    """Split the model's sequence over the ranks of `mesh`, in place. Each rank then runs it on its slice.

    Finds every `lasp.modules.LightningAttention` and every class given to `lasp.register`. Parameters, buffers and
    `state_dict` keys stay as they are. On one rank the model is left untouched, and only `check_finite` is heeded, also
    where the other axes of the mesh have several. Compose in this order: `parallelize`,
    activation checkpointing, `torch.compile`, data parallelism (over `lasp.grad_mesh`).

    Args:
        model: single-device code that knows no ranks.
        mesh: `mesh["sp"]`, the whole mesh (its "sp" axis is used), a ProcessGroup, or None.
        plan: adapters for layers by the pattern of their path, e.g. `{"blocks.*.conv": lasp.adapters.token_local}`;
            it goes before what is registered. (Of an adapter that also answers for modules below its own, see
            `covers` of `lasp.register`.)
        exchange: how a state travels: "ring", "all_gather", "pipeline", "direct" (ranks of one host read each other's
            memory), or "auto", one of them by a cost model, for which the network is measured here, once.
        softmax: how `lasp.softmax_attention` is split: "all_gather".
        strict: refuse a model in which anything mixes tokens that no adapter takes care of, inside of registered layers
            too: its result on a slice would be silently wrong. For that the model runs a few times on some 30 tokens,
            in evaluation and in training, with gradients, and on some hundred if it is small, here and on this rank
            alone, and is left as it was. Where it cannot run so
            (weights on the meta device or sharded, unusual inputs, more than about a second of work) classes and their
            names decide, and `explain` says so.
        validate: "first" compares on all ranks which layers and parameters were found, what each layer is about to
            compute at its first call and at every 1000th, what it is about to send at every call, and before an
            optimizer steps how often each layer has exchanged, and now and then the weights (see
            `lasp.checks.agreement`); "off" does not.
        check_finite: before an optimizer steps that has parameters of the model, every rank raises
            `FloatingPointError` with the names, if a gradient that it would use is NaN or Inf on any rank, or if the
            state of a split layer or its gradient was (see `lasp.assert_finite`).

    Returns:
        The same model.

    Raises:
        ValueError: no layer that can be split, a layer that `strict` refuses, a pattern that matches nothing, a model
            that was parallelized before, or an unknown option.
        TypeError: a plan that is none.
        RankMismatchError: ranks found different layers or parameters (names, shapes, dtypes, which are trained), or
            some of them failed with one of the above; on every rank.
        PeerError: a rank did not come to its `parallelize` within the timeout of the group.
    """
    axis = sequence_axis(mesh)
    with Agreement(axis, due=validate != "off" and axis.size > 1, before="parallelize") as ranks_agree:
        arguments.module("model", model)
        arguments.flag("strict", strict)
        arguments.choice("softmax", softmax, ("all_gather",))
        sequence = replace(axis, exchange=exchange, validate=validate, check_finite=check_finite)
        layers = _find_layers(model, _checked(plan))
        if is_parallelized(model):
            raise ValueError(f"this {type(model).__name__} is parallelized already")
        asked = refuse_mixers(model, layers) if strict else Asked()
        if not any(adapters.exchanges(adapter) for _, adapter in layers.values()):
            raise ValueError(
                f"{type(model).__name__} has no layer that can be split: no lasp.modules.LightningAttention and no "
                "class given to lasp.register"
            )
        ranks_agree.settle(
            lambda: _fingerprint(sequence, layers), lambda: {"parameter": forms_of(model.named_parameters())}
        )
    own: dict[str, SequenceParallel] = {}
    foreign = any(isinstance(adapter, adapters.Foreign) for _, adapter in layers.values())
    if sequence.size == 1 and foreign:
        model.register_forward_pre_hook(OneRank(), with_kwargs=True)
    if sequence.size > 1:
        if sequence.schedule is not None and sequence.schedule.reads:
            with waiting("parallelize: setting up memory that the ranks read from each other"):
                cost.require_direct(sequence)
        if sequence.schedule is None or sequence.schedule.reads:
            with waiting("parallelize: the measurement of the network"):
                cost.measure(sequence)
        border = Border(sequence) if foreign else None
        for path, (module, adapter) in layers.items():
            own[path] = sequence.of_layer(path, border)
            adapter(module, own[path])
            if adapters.exchanges(adapter) and validate != "off":
                watch(module, own[path])
                before_step(compare_exchanges)
        if validate != "off":
            watch_outputs(model, sequence)
        if border is not None:
            adapters.prepare(model, sequence.of_layer("", border))
            border.install(model)
        elif asked.positions:
            model.register_forward_pre_hook(NeedsPositions(model, asked.positions), with_kwargs=True)
    remember_model(sequence, model)
    finite.watch(model, sequence, own.values())
    _parallelized[model] = Split(model, sequence, layers, own.values())
    _parallelized[model].not_asked = asked.not_asked
    return model


def is_parallelized(model: nn.Module) -> bool:
    """Whether `parallelize` was called with this model, or with one that it holds or is a copy of."""
    return any(
        module in _parallelized or isinstance(getattr(module, "sequence", None), SequenceParallel)
        for module in model.modules()
    )


def _checked(plan: object) -> Mapping[str, Adapter]:
    if plan is None:
        return {}
    if not isinstance(plan, Mapping):
        raise TypeError(f"plan must map patterns of paths to adapters, got {plan!r}")
    for pattern, adapter in plan.items():
        if not isinstance(pattern, str):
            raise TypeError(f"plan must map patterns of paths to adapters, got the pattern {pattern!r}")
        adapters.check(adapter, f"plan[{pattern!r}]")
    return plan


def _find_layers(model: nn.Module, plan: Mapping[str, Adapter]) -> Layers:
    layers: Layers = {}
    unused = set(plan)
    for path, module in model.named_modules():
        pattern = next((p for p in plan if fnmatch.fnmatchcase(path, p)), None)
        unused.discard(pattern)  # type: ignore[arg-type]
        adapter = plan[pattern] if pattern is not None else adapters.find(module)
        if adapter is not None:
            layers[path] = (module, adapter)
    if unused:
        raise ValueError(f"no layer matches the plan's {sorted(unused)}")
    return layers


def _fingerprint(sequence: SequenceParallel, layers: Layers) -> dict[str, object]:
    """What must be the same on all ranks: the layers, in order, and how their states travel."""
    kinds = [f"{path}: {type(module).__name__}" for path, (module, _) in layers.items()]
    options = {"exchange": sequence.exchange, "check_finite": sequence.check_finite}
    return {"ranks": sequence.ranks, **options, "layers": kinds}


@dataclass(frozen=True)
class LayerReport:
    """One row of `explain`: one operator of one layer."""

    path: str
    module: str
    operator: str  # such as "linear_attention"; empty before the first call
    exchange: str  # as asked for
    ranks: int
    exchanges: int  # so far, forward and reverse
    bytes_sent: int  # so far, by this rank
    schedule: str  # that the last exchange took; "neighbour" where no head needs more (docs/exchange.md)
    blocks: int  # that it cut a state into
    predicted_seconds: float  # for it, by the cost model
    kernels: str  # what computed the layer, "triton" or "reference"
    repeats: str  # why a recompute repeats the exchange; empty if it does not

    @classmethod
    def of(cls, path: str, module: nn.Module, operator: str, sequence: SequenceParallel) -> LayerReport:
        """As it is now."""
        found = sequence.traffic_of(operator) if operator else Traffic()
        return cls(
            path,
            type(module).__name__,
            operator,
            sequence.exchange,
            sequence.size,
            found.forward_exchanges + found.reverse_exchanges,
            found.bytes_sent,
            found.schedule,
            found.blocks,
            found.predicted_seconds,
            found.kernels,
            found.repeats,
        )

    @property
    def bytes_per_step(self) -> float | None:
        """Sent by this rank for one forward and backward; None before the first."""
        return 2 * self.bytes_sent / self.exchanges if self.exchanges else None

    @property
    def cells(self) -> tuple[str, ...]:
        """As a row of the table."""
        sent = self.bytes_per_step
        how = self.exchange if self.schedule in ("", self.exchange) else f"{self.exchange}: {self.schedule}"
        how += f" in {self.blocks} blocks" if self.blocks > 1 else ""
        known = sent is not None and 0 < self.predicted_seconds < math.inf
        predicted = f"{self.predicted_seconds * 1e6:,.0f} us" if known else ""
        told = "run a step" if sent is None else f"{sent:,.0f}"
        return (self.path, self.module, self.operator, how, str(self.ranks), predicted, told, self.kernels)


class Explanation(list[LayerReport]):
    """The rows of `explain`; prints as a table."""

    not_asked: str = ""  # what in the model could not be asked whether it mixes tokens, and why
    streamed: str = (
        ""  # of the last sequence that went through it in segments: how many, and what crossed their borders
    )

    def __str__(self) -> str:
        notes = [x for x in (self.streamed, self.not_asked) if x]
        if not self:
            return "\n".join(["one rank: nothing is split", *notes])
        sent = "bytes sent a step by this rank"
        rows = [("layer", "module", "operator", "exchange", "ranks", "predicted", sent, "kernels")]
        rows += [layer.cells for layer in self]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        repeats = dict.fromkeys(layer.repeats for layer in self if layer.repeats)
        return "\n".join([*lines, *(f"a recompute repeats its exchanges: {why}" for why in repeats), *notes])


def explain(model: nn.Module) -> Explanation:
    """Which layers are split, how their states travel, how long that should take, and the bytes that were counted.

    A row for each operator of a layer; a layer that has not run yet has one row.
    """
    report = Explanation()
    arguments.module("model", model)
    for split in splits_of(model):
        report.not_asked = report.not_asked or split.not_asked
        report.streamed = report.streamed or split.streamed
    for path, module in model.named_modules():
        sequence = getattr(module, "sequence", None)
        if isinstance(sequence, SequenceParallel):
            report += [LayerReport.of(path, module, name, sequence) for name in sequence.by_operator or ("",)]
    return report
