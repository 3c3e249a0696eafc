"""What a check of a model does aside from training: compute as one rank, and exchange without being counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lasp.ranks.group import process
from lasp.ranks.sequence import by_thread, is_alone, living_sequences, set_alone


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this thread exchanges nothing: the rank computes by itself, and so must be given all tokens.

    Every `SequenceParallel` of this process, whoever holds it (a layer, the closure of an adapter, a graph for
    backward), is then one of one rank, as if it had been made without a mesh: what an adapter reads from it at a call
    fits; what it read before, when it edited a layer, does not. To other threads it is what it was.
    """
    before = is_alone()
    with by_thread():
        set_alone(True)
        try:
            yield
        finally:
            set_alone(before)


@contextmanager
def uncounted() -> Iterator[None]:
    """Afterwards nothing tells that something was exchanged inside.

    `explain`, the calls that ranks compare, what they compare before an optimizer steps (exchanges, layers that ran,
    models, batches), and the flags of states that were not finite are as before. All ranks must leave it together.
    Inside, the first call of each layer is compared again, so that a rank that fails before it keeps none waiting.
    """
    held = living_sequences()
    traffic = [{operator: replace(found) for operator, found in s.by_operator.items()} for s in held]
    compared = {id(x): (Counter(x.exchanges), x.order, list(x.models), x.cut) for x in process.peers.values()}
    noted, ran, split = dict(process.noted), dict(process.ran), process.split
    flags = {s: flag.clone() for s, flag in process.not_finite.items()}
    for sequence in held:
        for found in sequence.by_operator.values():
            found.calls = 0
    try:
        yield
    finally:
        for sequence, before in zip(held, traffic):
            sequence.kept.clear()  # calls, which hold what is dropped here
            for operator in list(sequence.by_operator):
                if operator in before:
                    vars(sequence.by_operator[operator]).update(vars(before[operator]))
                else:
                    del sequence.by_operator[operator]
        for peers in process.peers.values():
            peers.exchanges, peers.order, peers.models, peers.cut = compared.get(id(peers), (Counter(), 0, [], False))
        process.noted, process.ran, process.split = noted, ran, split
        process.not_finite.clear()
        process.not_finite.update(flags)
