"""Do all ranks compute the same? Asked before they exchange anything, so that a difference is an error on every rank.

Transports are no judges: gloo may hand out garbage where message sizes differ, NCCL hangs. So ranks compare a
fingerprint of the call first, or report that they failed before they came to their exchange. They do so through the
key-value store of the process group and not through the group itself: when a comparison fails, nothing of the group is
in flight, and it can be used again.

A layer's first call is compared, then every `EVERY`-th. The count of calls decides, which is the same on every rank;
what a rank happens to have seen before is not. Before an optimizer steps, ranks also compare how many exchanges each
layer has made: over NCCL a small message waits for whoever asks next, so that a rank that left one out, in backward
say, would take those of other layers for its own, and nobody would ever wait.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]  # public, untyped

from lasp.checks import use
from lasp.checks.optimizers import before_step
from lasp.ranks import PeerError, RankMismatchError, SequenceParallel, Traffic, all_peers, peers_of

EVERY = 1000  # calls of a layer from one comparison to the next
_ANSWER = timedelta(seconds=10)  # for the store to answer what needs no other rank
_NAMED = 4  # differences that a message lists; of 1,000 ranks all may differ


class Agreement:
    """One call, to which all ranks of a sequence must agree before its exchange, if it is `due`.

    A context around the call: what is raised inside before `settle` is reported to the other ranks. Where that
    happened, the `RankMismatchError` has the original as its cause; if every rank failed, each keeps its own error.
    """

    def __init__(self, sequence: SequenceParallel | None, *, due: bool, traffic: Traffic | None = None):
        """`traffic` counts the call once all agree: after a difference the next one is compared again."""
        self._open = sequence if due else None
        self._traffic = traffic

    @property
    def due(self) -> bool:
        """Whether ranks will compare, and have not yet."""
        return self._open is not None

    def settle(self, fingerprint: Callable[[], Mapping[str, object]]) -> None:
        """Compare; to be called once, at the last moment before the exchange.

        Args:
            fingerprint: what must be equal on all ranks, by name; plain values. A name that a rank leaves out is not
                compared with it. Called only if the comparison is due.

        Raises:
            RankMismatchError: ranks differ, or one of them failed before it came here.
            PeerError: a rank did not come within the timeout of the group.
        """
        if self._open is None:
            return
        fields = {name: json.dumps(value) for name, value in fingerprint().items()}
        sequence, self._open = self._open, None
        _raise(_Round(sequence).compare({"fields": fields}))
        if self._traffic is not None:
            self._traffic.calls += 1

    def __enter__(self) -> Agreement:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._open is None or not isinstance(error, Exception):
            return
        sequence, self._open = self._open, None
        layer = f"layer {sequence.name!r}: " if sequence.name else ""
        _raise(_Round(sequence).compare({"error": f"{layer}{type(error).__name__}: {error}"[:2000]}), error)


def of_call(sequence: SequenceParallel, traffic: Traffic) -> Agreement | None:
    """Of an operator's first forward call, and of every `EVERY`-th; None if it is not to be compared."""
    if sequence.validate == "off":
        return None
    before_step(compare_exchanges)
    return None if _capturing() else Agreement(sequence, due=True, traffic=traffic)  # the calls before it are


def compare_exchanges() -> None:
    """Raise on every rank if a layer has made more exchanges on one than on another since the last call.

    Optimizers call it before they step (all of `torch.optim`, and what derives from it). Only hosts meet here, through
    the key-value store; no device is waited for. An optimizer that only some of the ranks step must not do so between
    an exchange and the next step of all: it would wait for them.

    Raises:
        RankMismatchError: naming rank and layer.
        RuntimeError: on all ranks a split layer ran that called no operator with its ranks; it is named.
        PeerError: a rank did not come within the timeout of its group.
    """
    if _capturing():
        return
    rounds, records = [], []
    unused = use.without_operator()
    for peers in all_peers():
        if peers in unused:
            rounds.append(_Round(SequenceParallel(peers.group), "the step of the optimizer"))
            records.append({"error": unused[peers]})
        elif peers.exchanges:
            rounds.append(_Round(SequenceParallel(peers.group), "the step of the optimizer"))
            records.append({"fields": {"exchanges since the last step": json.dumps(_in_short(peers.exchanges))}})
        peers.exchanges.clear()
    if not rounds:
        return
    with ThreadPoolExecutor(len(rounds)) as pool:  # ranks may know their groups in different orders
        verdicts = list(pool.map(_Round.compare, rounds, records))
    for verdict in verdicts:
        _raise(verdict)
    if unused:  # on all ranks
        raise RuntimeError("; ".join(unused.values()))


def _in_short(made: Counter[tuple[str, bool]]) -> dict[str, object]:
    """What most layers have done, and the layers that have done something else."""
    layers = {name: (made[name, False], made[name, True]) for name, _ in made}
    usual = _most(list(layers.values()))
    odd = {name: counts for name, counts in layers.items() if counts != usual}
    return {"forward, backward": usual, "layers": len(layers), **odd}


def _capturing() -> bool:
    """Whether a CUDA graph is captured: a host that waits would end that."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _raise(verdict: dict[str, str], cause: Exception | None = None) -> None:
    """What the verdict asks for; nothing if ranks agree, or if each has an error of its own."""
    if verdict["found"] == "mismatch":
        raise RankMismatchError(verdict["text"]) from cause
    if verdict["found"] == "absent":
        raise PeerError(verdict["text"]) from cause


class _Round:
    """One comparison: every rank writes a record, the group's first rank reads them all and writes the verdict.

    Keys are deleted by those who read them last, so that nothing piles up in the store.
    """

    def __init__(self, sequence: SequenceParallel, before: str = "the exchange"):
        self.sequence, self.peers, self.before = sequence, sequence.peers, before
        self.rank, self.size = self.peers.rank, self.peers.size
        self.number = next(self.peers.comparisons)

    def compare(self, record: dict[str, object]) -> dict[str, str]:
        """The verdict on all ranks' records."""
        if self.peers.fake:
            return {"found": "agreement", "text": ""}
        self.timeout = self.peers.timeout
        verdicts: list[dict[str, str] | Exception] = []
        # In a thread that can be left behind: PyTorch's client waits without end for a store whose process is stopped.
        thread = threading.Thread(target=self._talk, args=(record, verdicts), daemon=True)
        thread.start()
        thread.join((self.timeout + min(self.timeout, _ANSWER)).total_seconds())
        verdict = verdicts[0] if verdicts else TimeoutError("no answer")
        if isinstance(verdict, dict):
            return verdict
        if not isinstance(verdict, (dist.DistError, TimeoutError)):
            raise verdict
        raise PeerError(
            f"{self._layer()}the key-value store of the process group does not answer; the process that holds it "
            f"(torchrun's agent, or rank 0) has ended or hangs: {verdict}"
        ) from verdict

    def _talk(self, record: dict[str, object], verdicts: list) -> None:
        started = time.monotonic()
        try:
            self.store = _connection(self.peers.group)
            self.store.set(self._key(self.rank), json.dumps(record))
            verdicts.append(self._judge(started) if self.rank == 0 else self._read(started))
        except Exception as error:
            verdicts.append(error)

    def _judge(self, started: float) -> dict[str, str]:
        keys = [self._key(rank) for rank in range(self.size)]
        if self._wait(keys):
            verdict = judge({self._name(r): json.loads(x) for r, x in enumerate(self.store.multi_get(keys))})
        else:
            verdict = self._absent(started)
        self.store.set(self._key("verdict"), json.dumps(verdict))
        self._clean()
        return verdict

    def _read(self, started: float) -> dict[str, str]:
        key = self._key("verdict")
        if not self._wait([key]):
            absent = self._absent(started)
            # A rank that comes later must not believe that this one is still there.
            self.store.set(self._key(self.rank), json.dumps({"error": f"PeerError: {absent['text']}"}))
            if not self.store.check([key]):
                return absent
        verdict = json.loads(self.store.get(key))
        self._clean()
        return verdict

    def _wait(self, keys: list[str]) -> bool:
        """Whether all keys came within the timeout."""
        try:
            self.store.wait(keys, self.timeout)
        except dist.DistStoreError:
            return False
        return True

    def _absent(self, started: float) -> dict[str, str]:
        missing = [self._name(rank) for rank in range(self.size) if not self.store.check([self._key(rank)])]
        who = ", ".join(missing) or f"the verdict of {self._name(0)}"
        text = f"{self._layer()}waited {time.monotonic() - started:.1f} s for {who} before {self.before}; not come yet"
        return {"found": "absent", "text": text}

    def _clean(self) -> None:
        self.store.delete_key(self._key(self.rank))
        if self.store.add(self._key("readers"), 1) == self.size:
            self.store.delete_key(self._key("verdict"))
            self.store.delete_key(self._key("readers"))

    def _key(self, part: int | str) -> str:
        return f"{self.number}/{part}"

    def _name(self, rank: int) -> str:
        return self.sequence.name_of(rank)

    def _layer(self) -> str:
        return f"layer {self.sequence.name!r}: " if self.sequence.name else ""


def judge(records: Mapping[str, dict]) -> dict[str, str]:
    """The verdict on the records of all ranks, by the name of the rank.

    The value that most ranks have is taken for the right one; of as many, the first rank's.
    """
    failed = {rank: record["error"] for rank, record in records.items() if "error" in record}
    if len(failed) == len(records):
        return {"found": "failure", "text": ""}
    if failed:
        listed = [f"{rank} failed before its exchange: {error}" for rank, error in failed.items()]
        return {"found": "mismatch", "text": _list(listed)}
    fields = {rank: record["fields"] for rank, record in records.items()}
    layer = _most([x.get("layer") for x in fields.values()])
    different = []
    for name in dict.fromkeys(name for x in fields.values() for name in x):
        values = {rank: x[name] for rank, x in fields.items() if name in x}
        usual = _most(list(values.values()))
        different += [f"{rank} has {name} {x}, the others {usual}" for rank, x in values.items() if x != usual]
    if not different:
        return {"found": "agreement", "text": ""}
    return {"found": "mismatch", "text": (f"layer {layer}: " if layer else "") + _list(different)}


def _most(values: list) -> object:
    return Counter(values).most_common(1)[0][0]  # of equally many, the first


def _list(found: list[str]) -> str:
    more = len(found) - _NAMED
    return "; ".join(found[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _connection(group: ProcessGroup) -> Store:
    """To the group's store, of our own: one that waits keeps others out, and the backend's threads use the group's."""
    peers = peers_of(group)
    if peers.store is None:
        store = group.get_group_store().clone()  # type: ignore[attr-defined]
        peers.store = PrefixStore("lasp/agreement", store)
    return peers.store
