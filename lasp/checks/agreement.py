"""Do all ranks compute the same? Asked before they exchange anything, so that a difference is an error on every rank.

The transports do not notice a difference: where message sizes differ, gloo may hand out garbage, and NCCL hangs. So
ranks first compare a fingerprint of the call, or report that they failed before they came to their exchange. They do so
through the key-value store of the process group and not through the group itself (rounds.py): when a comparison fails,
nothing is in flight in the group, and it can be used again.

A layer's first call is compared, then every `EVERY`-th. The count of calls decides, since it is the same on every rank;
what a rank happens to have seen before is not. (`messages.py` is for the calls between.)

Before an optimizer steps, ranks also compare how many exchanges each layer has made, and in which order. Over NCCL a
small message is taken by whoever receives next, so a rank that left out an exchange, say in backward, would take
another layer's message for its own, and nobody would ever wait. With it they compare what changes no message and yet
what is trained: settings and layouts of the calls since the last step, which modules are in evaluation mode, the
optimizers' settings; once, buffers; and now and then the weights.
"""

from __future__ import annotations

import json
import math
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lasp import arguments
from lasp.checks import use
from lasp.checks.checksum import checksums, whole_buffers, whole_parameters
from lasp.checks.optimizers import before_step, note_settings
from lasp.checks.rounds import KINDS, Round, first_few, most_common
from lasp.ranks import PeerError, Peers, RankMismatchError, SequenceParallel, Traffic, all_peers
from lasp.ranks.group import process
from lasp.ranks.presence import presence
from lasp.ranks.watch import watch

EVERY = 1000  # calls of a layer from one comparison to the next; also steps, and batches
_REMEMBERED = 4096  # kinds of calls between two steps

Listing = Mapping[str, str]
"""Many things by name, of which ranks compare a checksum first, and each only where that differs."""

BATCH = "batch"
WEIGHTS = "values of"  # parameters; a listing of their checksums
TOKENS = "the tokens that lasp.tensor_parallel's model gets as"
_BUFFERS = "buffer"  # before the first forward
_CALLS = "a call's"  # settings
_SETTINGS = "the optimizer's"
_HINTS = {  # what to do, which stands before what differs
    BATCH: "the ranks of a sequence cut one batch: draw it by the place in data parallelism, not by the global rank, "
    "and cut all of them in one thread",
    TOKENS: "the ranks of tp get one batch: draw it by the place in data parallelism, not by the global rank",
    _BUFFERS: "ranks of a sequence start with the same buffers; afterwards each may count on its own",
    WEIGHTS: "average gradients before each step (lasp.sync_grads(model, mesh), or DDP or FSDP2 over "
    "lasp.grad_mesh(mesh)), and start with the same weights on all ranks of a sequence; "
    'if some are meant to differ (expert parallelism), validate="off"',
}


class Agreement:
    """One call, to which all ranks of a sequence must agree before its exchange, if it is `due`.

    A context around the call: what is raised inside before `settle` is reported to the other ranks. Where that
    happened, the `RankMismatchError` has the original as its cause; if every rank failed, each keeps its own error.
    """

    def __init__(
        self,
        sequence: SequenceParallel | None,
        *,
        due: bool,
        count: Callable[[], None] | None = None,
        before: str = "the exchange",
        kind: str = "call",
    ):
        """`count` is called once all agree: after a difference the next call is compared again."""
        self._open = sequence if due else None
        self._count, self._before, self._kind = count, before, kind

    @property
    def due(self) -> bool:
        """Whether ranks will compare, and have not yet."""
        return self._open is not None

    def settle(
        self, fingerprint: Callable[[], Mapping[str, object]], listings: Callable[[], Mapping[str, Listing]] = dict
    ) -> None:
        """Compare; to be called once, at the last moment before the exchange.

        Args:
            fingerprint: what must be equal on all ranks, by name; plain values. A name that a rank leaves out is not
                compared with it. Called only if the comparison is due.
            listings: the same for many things of a kind.

        Raises:
            RankMismatchError: ranks differ, or one of them failed before it came here.
            PeerError: a rank did not come within the timeout of the group.
        """
        if self._open is None:
            return
        fields, listed = fingerprint(), listings()
        sequence, self._open = self._open, None
        compare(sequence, fields, listed, before=self._before, kind=self._kind)
        if self._count is not None:
            self._count()

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._open is None or not isinstance(error, Exception):
            return
        sequence, self._open = self._open, None
        layer = f"layer {sequence.name!r}: " if sequence.name else ""
        round_ = Round(sequence, self._before, self._kind)
        _raise(round_.compare({"error": f"{layer}{type(error).__name__}: {error}"[:2000]}), error)


def compare(
    sequence: SequenceParallel,
    fields: Mapping[str, object],
    listings: Mapping[str, Listing] | None = None,
    *,
    before: str,
    kind: str = "call",
) -> None:
    """Raise on every rank unless all of them have come here with the same.

    Args:
        sequence: the ranks.
        fields: by name; plain values.
        listings: likewise.
        before: what all are about to do, for messages.
        kind: comparisons of one kind have an order on every rank; of those of two kinds, in two threads, none is known.

    Raises:
        RankMismatchError, PeerError: as `Agreement.settle`.
    """
    _raise(_ask(Round(sequence, before, kind), fields, listings or {}))


def _ask(first: Round, fields: Mapping[str, object], listings: Mapping[str, Listing]) -> dict[str, str]:
    """The verdict; a second comparison finds out what of a listing differs."""
    if "error" in fields:
        return first.compare({"error": fields["error"]})
    record = {name: json.dumps(value, default=str) for name, value in fields.items()}
    record |= {name: f"{len(x)}, checksum {checksum(x.items())}" for name, x in listings.items()}
    verdict = first.compare({"fields": record, "listings": list(listings)})
    odd = [name for name in listings if name in verdict.get("listings", ())]
    if odd:
        items = {f"{name} {item}": value for name in odd for item, value in listings[name].items()}
        items |= {f"the order of {name}": f"checksum {checksum(listings[name])}" for name in odd}
        second = first.again().compare({"fields": items, "complete": True})
        verdict = second if second["found"] != "agreement" else verdict
        hints = "; ".join(_HINTS[name] for name in odd if name in _HINTS)
        verdict["text"] = f"{hints}: {verdict['text']}" if hints else verdict["text"]
    return verdict


def checksum(x: Iterable[object]) -> str:
    """A checksum of plain values in their order."""
    return f"{zlib.crc32(repr(list(x)).encode()):08x}"


def of_call(sequence: SequenceParallel, traffic: Traffic) -> Agreement | None:
    """The agreement on an operator's first forward call, and on every `EVERY`-th; None if the call is not compared."""
    if sequence.validate == "off":
        return None
    before_step(compare_exchanges)
    if capturing():
        return None  # the calls before it are

    def count() -> None:
        traffic.calls += 1

    return Agreement(sequence, due=True, count=count)


@contextmanager
def of_batch(sequence: SequenceParallel, *, validate: str, before: str = "shard_batch") -> Iterator[Agreement]:
    """Around the first batch that is cut for these ranks, and every `EVERY`-th; `before` is who cuts it, each with a
    count of its own, since they compare other things.

    Threads may do that beside the main one, which counts its batches by itself. They share one count and take turns at
    a comparison, so that each rank comes to as many: if their order is another there, that is a difference of batches,
    on every rank. In a process that was forked for it there are no ranks to ask.
    """
    arguments.choice("validate", validate, ("first", "off"))
    if validate == "off" or sequence.validate == "off" or sequence.size == 1 or presence.forked:
        yield Agreement(None, due=False)
        return
    peers = sequence.peers
    kind = KINDS[1] if threading.current_thread() is threading.main_thread() else KINDS[2]

    counted = f"{kind}, {before}"

    def count() -> None:
        peers.batches[counted] += 1

    with peers.cutting[kind]:
        if peers.batches[counted] % EVERY == 0:
            with Agreement(sequence, due=True, count=count, before=before, kind=kind) as ranks_agree:
                yield ranks_agree
            return
        count()
    yield Agreement(None, due=False)


def remember_model(sequence: SequenceParallel, model: nn.Module) -> None:
    """Compare the weights of this model from now on (see `compare_exchanges`), unless `validate` is "off"."""
    if sequence.size > 1 and sequence.validate == "first":
        sequence.peers.models.append(weakref.ref(model))
        process.buffers[model] = model.register_forward_pre_hook(_note_buffers)


def _note_buffers(model: nn.Module, _: Any) -> None:
    """Note the buffers before the first forward, since models may count in buffers what their own tokens are. (Not of a
    model that torch.compile looks at, nor of a copy.)"""
    if torch.compiler.is_compiling() or capturing():
        return
    handle = process.buffers.get(model)
    if isinstance(handle, RemovableHandle):
        handle.remove()
        process.buffers[model] = checksums(whole_buffers(model))


def note_call(sequence: SequenceParallel, operator: str, facts: tuple, layout: str | None) -> None:
    """A call is about to exchange; of its layout what `layout` says in short."""
    peers = sequence.peers
    if len(peers.facts) >= _REMEMBERED:  # without a step: on all ranks at the same call
        peers.facts.clear()
    peers.facts[sequence.name, operator, facts] = None
    if layout is not None:
        count, mark = peers.layouts
        peers.layouts = (count + 1, zlib.crc32(layout.encode(), mark))


def note_loss(gradient: Tensor) -> None:
    """Note the gradient that a loss got, which is the same on all ranks whose gradients are averaged."""
    if not capturing():  # in whose memory something else may lie later
        process.loss_gradient = gradient.detach()


def note_autocast(sequence: SequenceParallel, device: str | None) -> None:
    """Note under which autocast a call runs on a device; None where the call is compiled, and cannot tell."""
    if sequence.validate == "off":
        return
    mode = None
    if device is not None:
        mode = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "off"
    sequence.peers.autocast[mode] = None


def compare_exchanges(optimizer: Optimizer | None = None) -> None:
    """Raise on every rank if one of them has done something else since the last step that was compared.

    That is: a layer has made more exchanges there, or they came in another order, or its calls had other settings,
    layouts or autocast, or optimizers have stepped more often that hold parameters of a model which `parallelize` has
    split. Of such a model also: a module is in evaluation mode, the optimizer has another learning rate or setting,
    another gradient has reached `token_loss`, and before the first step its buffers were others before its first
    forward. Before the first two such steps and every `EVERY`-th ranks also compare the weights of the model that each
    of them holds whole. (Before the second it shows if gradients are not averaged over all ranks.) The host waits for
    the device then, and at no other step; so a learning rate or a gradient on a device is compared then only.

    Optimizers call it before they step (all of `torch.optim`, and what derives from it). Only hosts meet here, through
    the key-value store. A step is compared if layers have exchanged since the last comparison, or if it is one more
    without an exchange than between the last two comparisons, where two optimizers may share the weights.

    So all ranks of a sequence must step an optimizer of its model equally often. Any other may be stepped by some ranks
    only, but not between an exchange and the next step of all: it would wait for them.

    Raises:
        RankMismatchError: naming rank and layer, or rank and parameter.
        RuntimeError: on all ranks a split layer ran that called no operator with its ranks; it is named.
        ValueError: batches were cut for these ranks, but no model was split over them.
        PeerError: a rank did not come within the timeout of its group.
    """
    if capturing():
        return
    if watch.on:  # the averaging of gradients, which may be another's than lasp's
        watch.note_current("what came before the step of the optimizer (as the averaging of gradients)")
    parameters = {id(p) for group in (optimizer.param_groups if optimizer is not None else ()) for p in group["params"]}
    rounds, records, listings = [], [], []
    use.refuse_nothing_split(parameters=parameters)
    unused = use.without_operator()
    for peers in all_peers():
        peers.cut = False
        models = _models_of(peers, parameters)
        peers.steps += bool(models)
        if models:
            note_settings(peers.settings, optimizer, read=is_due(peers.compared_steps))  # type: ignore[arg-type]
        if peers not in unused and not peers.exchanges and (not models or peers.steps <= peers.usual_steps):
            continue
        rounds.append(Round(SequenceParallel(peers.group), "the step of the optimizer"))
        due = is_due(peers.compared_steps)
        records.append(_done(peers, models, due) | ({"error": unused[peers]} if peers in unused else {}))
        listings.append(_listings(peers, models, due))
        peers.forget_step()
    if not rounds:
        return
    process.loss_gradient = None
    with ThreadPoolExecutor(len(rounds)) as pool:  # ranks may know their groups in different orders
        verdicts = list(pool.map(_ask, rounds, records, listings))
    for verdict in verdicts:
        if verdict["found"] == "mismatch":
            verdict["text"] = f"before the step of the optimizer: {verdict['text']}"
        _raise(verdict)
    if unused:  # on all ranks
        raise RuntimeError("; ".join(unused.values()))
    for round_, record in zip(rounds, records):
        round_.peers.compared_steps += 1
        round_.peers.usual_steps = max(1, record["optimizer steps since the last comparison"])


def _models_of(peers: Peers, parameters: set[int]) -> list[nn.Module]:
    """The models split over these ranks that have one of the parameters."""
    living = [model for known in peers.models if (model := known()) is not None]
    return [model for model in living if any(id(p) in parameters for p in model.parameters())]


def _done(peers: Peers, models: list[nn.Module], due: bool) -> dict[str, object]:
    """What a rank has done since the last comparison. `due`: the host waits for the device in any case."""
    done = {
        "exchanges since the last step": _in_short(peers),
        "optimizer steps since the last comparison": peers.steps,
        "layouts since the last step": "{}, checksum {:08x}".format(*peers.layouts),
        "modules in evaluation mode": _evaluating(models),
    }
    loss_gradient = process.loss_gradient
    if None not in peers.autocast:
        done["autocast"] = sorted(map(str, peers.autocast))
    if models and loss_gradient is not None and (due or loss_gradient.device.type == "cpu"):
        value = loss_gradient.item()
        done["the gradient that reached the loss"] = "NaN" if math.isnan(value) else value  # NaN is like NaN
    return done


def _evaluating(models: list[nn.Module]) -> str:
    if all(module.training for model in models for module in model.modules()):
        return "none"
    names = [name or "the model" for model in models for name, module in model.named_modules() if not module.training]
    return f"{len(names)}: {first_few(names)}; checksum {checksum(names)}"


def _listings(peers: Peers, models: list[nn.Module], due: bool) -> dict[str, Listing]:
    listings: dict[str, Listing] = {_CALLS: _facts_of_calls(peers)}
    if models:
        listings[_SETTINGS] = {name: ", ".join(values) for name, values in peers.settings.items()}
    if due:
        listings[WEIGHTS] = _weights(models)
    noted = [process.buffers.pop(model) for model in models if isinstance(process.buffers.get(model), dict)]
    if noted:
        listings[_BUFFERS] = {name: mark for buffers in noted for name, mark in buffers.items()}
    return listings


def _facts_of_calls(peers: Peers) -> Listing:
    """What was told of each layer's calls; several values where they were of several kinds."""
    found: dict[str, list[str]] = {}
    for layer, operator, facts in peers.facts:
        for name, value in facts:
            values = found.setdefault(f"{name} in layer {layer!r} ({operator})", [])
            if str(value) not in values:
                values.append(str(value))
    return {name: ", ".join(sorted(values)) for name, values in found.items()}


def is_due(count: int) -> bool:
    """Whether weights are compared: the first time tells if they began alike, the second if they were trained alike."""
    return count < 2 or count % EVERY == 0


def _weights(models: list[nn.Module]) -> Listing:
    found: dict[str, Tensor] = {}
    for number, model in enumerate(models):
        for name, p in whole_parameters(model).items():
            found[f"{name} of model {number}" if name in found else name] = p
    return checksums(found)


def _in_short(peers: Peers) -> dict[str, object]:
    """What most layers have done, the layers that have done something else, and a checksum of the order."""
    made = peers.exchanges
    layers = {name: (made[name, False], made[name, True]) for name, _ in made}
    usual = most_common(list(layers.values())) if layers else (0, 0)
    odd = {name: counts for name, counts in layers.items() if counts != usual}
    return {"forward, backward": usual, "layers": len(layers), **odd, "order": f"{peers.order:08x}"}


def capturing() -> bool:
    """Whether a CUDA graph is captured: a host that waits would end that."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _raise(verdict: dict[str, str], cause: Exception | None = None) -> None:
    """What the verdict asks for; nothing if ranks agree, or if each has an error of its own."""
    if verdict["found"] == "mismatch":
        raise RankMismatchError(verdict["text"]) from cause
    if verdict["found"] == "absent":
        known = presence.account(f"PeerError: {verdict['text']}")
        raise PeerError(verdict["text"] + (f"; {known}" if known else "")) from cause
