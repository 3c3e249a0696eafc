"""`parallelize`: one call that splits a model's sequence over ranks, and `explain`, which tells what it did."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace

from torch import nn

from lasp import adapters, arguments
from lasp.adapters import Adapter, handles, outlook
from lasp.adapters.border import Border, OneRank
from lasp.checks import finite, hooks
from lasp.checks.agreement import Agreement, compare_exchanges, remember_model
from lasp.checks.checksum import forms_of
from lasp.checks.optimizers import before_step
from lasp.checks.use import is_split, keep_whole, split_models, watch, watch_outputs
from lasp.exchange import cost
from lasp.ranks import SequenceParallel, Traffic, sequence_axis, waiting
from lasp.ranks.group import process
from lasp.ranks.parts import parts_of_model
from lasp.strict import Asked, Layers, NeedsPositions, refuse_mixers


def parallelize(
    model: nn.Module,
    mesh,
    *,
    plan: Mapping[str, Adapter] | None = None,
    exchange: str = "auto",
    softmax: str = "auto",
    strict: bool = True,
    validate: str = "first",
    check_finite: bool = False,
) -> nn.Module:
    """Split the model's sequence over the ranks of `mesh`, in place. Each rank then runs it on its slice.

    Finds every `lasp.modules.LightningAttention` and every class given to `lasp.register`. Parameters, buffers and
    `state_dict` keys stay as they are. On one rank the model is left untouched, and only `check_finite` is heeded, also
    where the other axes of the mesh have several. Compose in this order: `parallelize`, activation checkpointing,
    `torch.compile`, data parallelism (over `lasp.grad_mesh`).

    Args:
        model: single-device code that knows no ranks.
        mesh: `mesh["sp"]`, the whole mesh (its "sp" axis is used), a ProcessGroup, or None.
        plan: adapters for layers by the pattern of their path, e.g. `{"blocks.*.conv": lasp.adapters.token_local}`;
            it goes before what is registered.
        exchange: how a state travels: "ring", "all_gather", "pipeline", "direct" (ranks of one host read each other's
            memory), or "auto", one of them by a cost model, for which the network is measured here, once.
        softmax: how `lasp.softmax_attention` is split: "auto", by heads where the ranks divide them, so that all do as
            much; or "all_gather", the keys and values of all tokens on every rank (docs/exchange.md).
        strict: refuse a model in which anything mixes tokens that no adapter takes care of, inside of registered layers
            too: its result on a slice would be silently wrong. Its modules are asked by a trial (lasp.strict), and
            forward hooks, which then see made-up data. If modules, a `forward` or forward hooks are added or replaced
            later, it is tried again at the next forward (before the next step of an optimizer if it is compiled as a
            whole), which then raises the same.
        validate: "first" compares on all ranks what they found and what each of their layers computes
            (lasp.checks.agreement), and has each forward look whether modules have changed; "off" does not.
        check_finite: before an optimizer steps that has parameters of the model, raise `FloatingPointError` on every
            rank if a gradient, or a state of a split layer, is NaN or Inf on any of them (see `lasp.assert_finite`).

    Returns:
        The same model. (A copy of it is split, too, but nobody watches its optimizer, and it neither streams nor
        generates: make copies before.)

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
        sequence = replace(axis, exchange=exchange, softmax=softmax, validate=validate, check_finite=check_finite)
        layers = _find_layers(model, _checked(plan))
        asked = _asked(model, layers, strict)
        ranks_agree.settle(
            lambda: _fingerprint(sequence, layers), lambda: {"parameter": forms_of(model.named_parameters())}
        )
    before = handles.states_of(model)
    own = _split(model, sequence, layers, asked)
    remember_model(sequence, model)
    finite.watch(model, sequence, own)
    handles.remember(model, sequence, layers, own, before, _look_again if strict else None)
    if sequence.size > 1 or check_finite:
        keep_whole(model)
    process.split |= sequence.size > 1
    split_models[model] = asked.not_asked
    return model


def on_one_rank(model: nn.Module, check: Callable[[list[tuple[str, Adapter]]], None]) -> handles.Parallelized:
    """What `parallelize` would know of a model on one rank, without a call of it, which may follow later.

    `check` raises for adapters, by the paths of their layers, that do not fit; before the model is tried.

    Raises:
        ValueError: as `parallelize`, with strict=True.
    """

    def layers() -> Layers:
        found = _find_layers(model, {})
        check([(path, adapter) for path, (_, adapter) in found.items()])
        _asked(model, found, strict=True)
        return found

    return handles.of_untouched(model, layers)


def _asked(model: nn.Module, layers: Layers, strict: bool) -> Asked:
    """Raise unless the model can be split by these layers; what came out of a trial, if it is to be strict."""
    if is_split(model):
        raise ValueError(
            f"this {type(model).__name__} is parallelized already, or a copy of one that is: make copies before "
            "lasp.parallelize, and call it with each"
        )
    asked = refuse_mixers(model, layers) if strict else Asked()
    token_local = "" in layers and layers[""][1] is adapters.token_local  # as the user says of the model itself
    if not token_local and not any(adapters.exchanges(adapter) for _, adapter in layers.values()):
        raise ValueError(
            f"{type(model).__name__} has no layer that can be split: no lasp.modules.LightningAttention and no "
            "class given to lasp.register; if nothing in it mixes tokens, plan={'': lasp.adapters.token_local}"
        )
    return asked


def _look_again(
    model: nn.Module, layers: Layers, changed: Mapping[str, nn.Module], hooked: Container[hooks.Owner]
) -> None:
    """Raise unless what has come into a model since, of which nothing is split now, mixes no tokens."""
    try:
        with adapters.without_edits(model):
            asked = refuse_mixers(model, layers, changed, hooked)
    except ValueError as error:
        raise ValueError(
            f"model must have the layers that lasp.parallelize was called with: call it behind all changes. Of what "
            f"the {type(model).__name__} is now, lasp {error}"
        ) from None
    if asked.not_asked:
        warnings.warn(f"of what was put into the model after lasp.parallelize, {asked.not_asked}", stacklevel=2)


def _split(model: nn.Module, sequence: SequenceParallel, layers: Layers, asked: Asked) -> list[SequenceParallel]:
    """Give the ranks to the layers, and what stands before the forward of the model; the layers' own ranks."""
    foreign = any(isinstance(adapter, adapters.Foreign) for _, adapter in layers.values())
    if sequence.size == 1:
        if foreign:
            model.register_forward_pre_hook(OneRank(), with_kwargs=True)
            for text in adapters.on_one_rank(model):
                warnings.warn(text, stacklevel=3)
        return []
    _set_up(sequence)
    own: dict[str, SequenceParallel] = {}
    border = Border(sequence) if foreign else None
    for path, (module, adapter) in layers.items():
        own[path] = sequence.of_layer(path, border)
        adapter(module, own[path])
        if adapters.exchanges(adapter):
            vars(module)[_SPLIT] = _Split(own[path], outlook.name_of(adapter), outlook.operators_of(module, adapter))
        if adapters.exchanges(adapter) and sequence.validate != "off":
            watch(module, own[path])
            before_step(compare_exchanges)
    if sequence.validate != "off":
        watch_outputs(model, sequence)
    if border is not None:
        adapters.prepare(model, sequence.of_layer("", border))
        border.install(model)
    elif asked.positions:
        model.register_forward_pre_hook(NeedsPositions(model, asked.positions), with_kwargs=True)
    return list(own.values())


def _set_up(sequence: SequenceParallel) -> None:
    """What the schedule needs of the network, once."""
    if sequence.schedule is not None and sequence.schedule.reads:
        with waiting("parallelize: setting up memory that the ranks read from each other"):
            cost.require_direct(sequence)
    if sequence.schedule is None or sequence.schedule.reads:
        with waiting("parallelize: the measurement of the network"):
            cost.measure(sequence)


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
    layers: dict[str, tuple[nn.Module, Adapter]] = {}
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
    options = {"exchange": sequence.exchange, "softmax": sequence.softmax, "check_finite": sequence.check_finite}
    return {"ranks": sequence.ranks, **options, "layers": kinds}


_SPLIT = "_lasp_split"


@dataclass(frozen=True)
class _Split:
    """An attribute of a layer: what `explain` has to tell of it before it has run."""

    sequence: SequenceParallel | None  # None of a pickled one, which is not split
    adapter: str
    operators: tuple[str, ...]


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
    kernels: str  # what computed it: "triton", "reference" (lasp's steps in PyTorch), "SDPA", "torch"
    repeats: str  # why a recompute repeats the exchange; empty if it does not
    adapter: str = ""  # where it stands: a function, of lasp's own the file
    expected: tuple[str, ...] = ()  # operators that the code of layer and adapter names
    decay: str = ""  # the form of its log-decays, such as "[B, T, H]"; "none" without

    @classmethod
    def of(cls, path: str, module: nn.Module, operator: str, sequence: SequenceParallel) -> LayerReport:
        """The report of an operator as it is now."""
        found, split = sequence.traffic_of(operator) if operator else Traffic(), vars(module).get(_SPLIT)
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
            split.adapter if isinstance(split, _Split) else "",
            split.operators if isinstance(split, _Split) else (),
            found.decay,
        )

    @property
    def bytes_per_step(self) -> float | None:
        """Sent by this rank for one forward and backward; None before the first."""
        return 2 * self.bytes_sent / self.exchanges if self.exchanges else None

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of its row in the table."""
        sent = self.bytes_per_step
        how = self.exchange if self.schedule in ("", self.exchange) else f"{self.exchange}: {self.schedule}"
        how += f" in {self.blocks} blocks" if self.blocks > 1 else ""
        known = sent is not None and 0 < self.predicted_seconds < math.inf
        predicted = f"{self.predicted_seconds * 1e6:,.0f} us" if known else ""
        crosses = "; ".join(dict.fromkeys(outlook.CROSSES[name] for name in self.expected))
        told = (crosses or "run a step") if sent is None else f"{sent:,.0f}"
        operator = self.operator or ", ".join(self.expected)
        return (
            self.path,
            self.module,
            self.adapter,
            operator,
            how,
            str(self.ranks),
            predicted,
            told,
            self.decay,
            self.kernels,
        )


_AFTER_A_STEP = (
    "of layers that have not run, operators and what they send are told from the code of the layer and its adapter; "
    "schedule, bytes, decay and kernels are known after a step"
)


class Explanation(list[LayerReport]):
    """The rows of `explain`; prints as a table."""

    not_asked: str = ""  # what in the model could not be asked whether it mixes tokens, and why
    data_parallel: str = ""  # what `lasp.data_parallel` has done
    tensor_parallel: str = ""  # what `lasp.tensor_parallel` has done
    streamed: str = (
        ""  # of the last sequence that went through it in segments: how many, and what crossed their borders
    )
    decoded: str = ""  # how tokens were generated last: whether a step is a CUDA graph, and why not

    def __str__(self) -> str:
        told = (self.data_parallel, self.tensor_parallel, self.streamed, self.decoded, self.not_asked)
        notes = [x for x in told if x]
        if not self:
            return "\n".join(["one rank: nothing is split", *notes])
        sent = "bytes sent a step by this rank"
        rows = [("layer", "module", "adapter", "operator", "exchange", "ranks", "predicted", sent, "decay", "kernels")]
        rows += [layer.cells for layer in self]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        repeats = dict.fromkeys(layer.repeats for layer in self if layer.repeats)
        if any(layer.bytes_per_step is None for layer in self):
            notes.insert(0, _AFTER_A_STEP)
        return "\n".join([*lines, *(f"a recompute repeats its exchanges: {why}" for why in repeats), *notes])


def explain(model: nn.Module) -> Explanation:
    """Which layers are split and how: operators, schedules, predicted time, counted bytes, form of decays, kernels.

    A row for each operator of a layer. A layer that has not run yet has one row: with the adapter that split it, the
    operators that its code and the adapter's name, and what these send; the rest is known after a step.

    Args:
        model: after `parallelize`.

    Returns:
        A list with a row for each operator of a layer; `print` shows it as a table. Bytes are those that this rank
        sends in a step, seconds are predicted for one exchange.

    Raises:
        TypeError: `model` is no module.
    """
    report = Explanation()
    arguments.module("model", model)
    report.not_asked = split_models.get(model, "")
    if (parts := parts_of_model(model)) > 1:
        report.tensor_parallel = f"tensor parallel: heads, inner channels and words over {parts} ranks"
    report.data_parallel = process.schemes.get(model, "")
    report.streamed = next((x.streamed for x in handles.held_by(model) if x.streamed), "")
    report.decoded = next((x.decoded for x in handles.known(model) if x.decoded), "")
    layers = any(isinstance(vars(m).get(_SPLIT), _Split) for m in model.modules())
    for path, module in model.named_modules():
        split, sequence = vars(module).get(_SPLIT), getattr(module, "sequence", None)
        if isinstance(split, _Split) and not isinstance(sequence, SequenceParallel):  # what an adapter holds elsewhere
            sequence = split.sequence
        if not isinstance(sequence, SequenceParallel):
            continue
        only_helps = layers and not isinstance(split, _Split)  # an adapter gave it ranks, for a layer around it
        for name in sequence.by_operator or (() if only_helps else ("",)):
            report.append(LayerReport.of(path, module, name, sequence))
    return report
