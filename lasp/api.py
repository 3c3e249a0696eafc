"""`parallelize`: one call that splits a model's sequence over ranks, and `explain`, which tells what it did."""

from __future__ import annotations

import fnmatch
import math
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from lasp import adapters, arguments
from lasp.adapters import Adapter
from lasp.checks.agreement import Agreement
from lasp.exchange import cost
from lasp.ranks import SequenceParallel, Traffic, sequence_axis

# Modules of PyTorch whose output at one token depends on other tokens.
_MIXERS = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.modules.conv._ConvNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
# Classes of others, by the names such layers go by.
_MIXER_NAMES = re.compile(
    r"attention|attn|conv(?!ert)|mixer|mamba|ssm|ssd|rwkv|hyena|retention|delta_?net|hgrn|lstm|gru|recurren|token_?shift",
    re.IGNORECASE,
)

_parallelized: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
    `state_dict` keys stay as they are. On one rank the model is left untouched. Compose in this order: `parallelize`,
    activation checkpointing, `torch.compile`, data parallelism (over `lasp.grad_mesh`).

    Args:
        model: single-device code that knows no ranks.
        mesh: `mesh["sp"]`, the whole mesh (its "sp" axis is used), a ProcessGroup, or None.
        plan: adapters for layers by the pattern of their path, e.g. `{"blocks.*.conv": lasp.adapters.token_local}`;
            it goes before what is registered.
        exchange: how a state travels: "ring", "all_gather", "pipeline", "direct" (ranks of one host read each other's
            memory), or "auto", one of them by a cost model, for which the network is measured here, once.
        softmax: how softmax attention is split: "all_gather". No adapter for softmax layers exists yet, so `strict`
            refuses them.
        strict: refuse a model with a layer that mixes tokens and has no adapter (attention, convolution, recurrence),
            whose result on a slice would be silently wrong.
        validate: "first" compares on all ranks which layers were found, and what each layer is about to compute at its
            first call and at every 1000th, and before an optimizer steps how often each layer has exchanged; "off"
            does not.
        check_finite: every rank raises `FloatingPointError` with the layer's name before an optimizer steps, if the
            state of a split layer, or its gradient, was NaN or Inf on any rank (see `lasp.assert_finite`).

    Returns:
        The same model.

    Raises:
        ValueError: no layer that can be split, a layer that `strict` refuses, a pattern that matches nothing, a model
            that was parallelized before, or an unknown option.
        RankMismatchError: ranks found different layers, or some of them failed with one of the above; on every rank.
        PeerError: a rank did not come to its `parallelize` within the timeout of the group.
    """
    axis = sequence_axis(mesh)
    with Agreement(axis, due=validate != "off" and axis.size > 1) as ranks_agree:
        arguments.module("model", model)
        arguments.flag("strict", strict)
        plan = {} if plan is None else arguments.mapping("plan", plan)
        for pattern, adapter in plan.items():
            arguments.function(f"plan[{arguments.text('plan: a pattern', pattern)!r}]", adapter)
        arguments.choice("softmax", softmax, ("all_gather",))
        sequence = replace(axis, exchange=exchange, validate=validate, check_finite=check_finite)
        layers = _find_layers(model, plan, strict)
        split = [module for module, _ in layers.values() if getattr(module, "sequence", None) is not None]
        if model in _parallelized or split:
            raise ValueError(f"this {type(model).__name__} is parallelized already")
        ranks_agree.settle(lambda: _fingerprint(sequence, layers))
    if sequence.size > 1:
        if sequence.schedule is not None and sequence.schedule.reads:
            cost.require_direct(sequence)
        if sequence.schedule is None or sequence.schedule.reads:
            cost.measure(sequence)
        for path, (module, adapter) in layers.items():
            adapter(module, replace(sequence, name=path))
    _parallelized.add(model)
    return model


def _find_layers(model: nn.Module, plan: Mapping[str, Adapter], strict: bool) -> dict[str, tuple[nn.Module, Adapter]]:
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
    unknown = [path for path, module in model.named_modules() if _mixes_tokens(path, module, layers)] if strict else []
    if unknown:
        listed = ", ".join(
            f"{path or 'the model itself'} ({type(model.get_submodule(path)).__name__})" for path in unknown
        )
        raise ValueError(
            f"cannot split the sequence of: {listed}. Such a layer mixes tokens, so its result on a slice would be "
            "wrong. Give its class an adapter with lasp.register; or, if it mixes no tokens, say so with "
            f"plan={{{unknown[0]!r}: lasp.adapters.token_local}}; or pass strict=False"
        )
    if not any(adapter is not adapters.token_local for _, adapter in layers.values()):
        raise ValueError(
            f"{type(model).__name__} has no layer that can be split: no lasp.modules.LightningAttention and no class "
            "given to lasp.register"
        )
    return layers


def _mixes_tokens(path: str, module: nn.Module, layers: Mapping[str, tuple[nn.Module, Adapter]]) -> bool:
    """Whether a layer looks like a token mixer that no adapter takes care of."""
    if any(path == known or path.startswith(known + ".") for known in layers if known or path == known):
        return False
    if isinstance(module, _MIXERS):
        return True
    if not _MIXER_NAMES.search(type(module).__name__):
        return False
    # A block that holds a known layer, such as an attention block around LightningAttention, mixes through it.
    return not any(known.startswith(path + ".") or path == "" for known in layers)


def _fingerprint(sequence: SequenceParallel, layers: Mapping[str, tuple[nn.Module, Adapter]]) -> dict[str, object]:
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

    def __str__(self) -> str:
        if not self:
            return "one rank: nothing is split"
        sent = "bytes sent a step by this rank"
        rows = [("layer", "module", "operator", "exchange", "ranks", "predicted", sent, "kernels")]
        rows += [layer.cells for layer in self]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        repeats = dict.fromkeys(layer.repeats for layer in self if layer.repeats)
        return "\n".join([*lines, *(f"a recompute repeats its exchanges: {why}" for why in repeats)])


def explain(model: nn.Module) -> Explanation:
    """Which layers are split, how their states travel, how long that should take, and the bytes that were counted.

    A row for each operator of a layer; a layer that has not run yet has one row.
    """
    report = Explanation()
    arguments.module("model", model)
    for path, module in model.named_modules():
        sequence = getattr(module, "sequence", None)
        if isinstance(sequence, SequenceParallel):
            report += [LayerReport.of(path, module, name, sequence) for name in sequence.by_operator or ("",)]
    return report
