"""One comparison between the ranks of a group, through its key-value store: the protocol below `agreement.py`.

Every rank writes what it is about to do, the group's first rank reads all of it and writes a verdict, and every rank
reads that. The store is the one that the group was made with (torchrun's agent, or rank 0), so a comparison that fails
leaves nothing in flight in the group itself.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]  # public, untyped

from lasp.ranks import PeerError, SequenceParallel, peers_of
from lasp.ranks.presence import presence

# How long the store may take to answer what needs no other rank: a fifth of the timeout, within these bounds.
_LEAST_ANSWER, _ANSWER = timedelta(seconds=1.5), timedelta(seconds=10)
# A rank that waits polls the store, at first often and then less and less, and looks meanwhile whether the ranks that
# it waits for are still alive. (The store's own `wait` would print a warning each time that a limit is over.)
_FIRST_PAUSE, _LONGEST_PAUSE, _GROWTH = 0.0005, 0.05, 1.3  # seconds, seconds, factor
_BETWEEN_LOOKS = 0.25  # seconds
_NAMED = 4  # differences that a message lists

# Comparisons of each have an order on every rank: before calls and steps, of batches that the main thread cuts, and of
# those that others cut.
KINDS = ("call", "batch", "batch of a thread")
_LIFE = "life"  # a key: the token of the first rank
_READ = timedelta(seconds=2)  # for ranks that wait for a verdict to read it; a tenth of the timeout, if less
_LOOK_AGAIN = timedelta(seconds=0.5)  # for it, until it is known to be of this life


class Sends(Exception):
    """What is tried was about to send something, or to compare something with other ranks."""


_tries: set[int] = set()  # threads


@contextmanager
def none_asked() -> Iterator[None]:
    """Inside, for a trial, other ranks are not asked: they may have other modules, or try them more or less often."""
    here = threading.get_ident()
    _tries.add(here)
    try:
        yield
    finally:
        _tries.discard(here)


class Round:
    """One comparison: every rank writes a record, the group's first rank reads them all and writes the verdict.

    Keys are deleted by those who read them last, so that nothing piles up in the store. They begin with the token of
    the first rank, so that what another life of the same group has left there, which ended in an error, says nothing
    in this one. The first time the others read that token it may be of the other life: they then look again until they
    get a verdict with their own token in it, which nobody knew before.
    """

    def __init__(self, sequence: SequenceParallel, before: str = "the exchange", kind: str = "call"):
        self.sequence, self.peers, self.before, self.kind = sequence, sequence.peers, before, kind
        self.rank, self.size = self.peers.rank, self.peers.size
        here, main = threading.get_ident(), threading.main_thread().ident
        if here in _tries:
            raise Sends(f"a trial sends nothing, and ranks are asked before {before}")
        known = {KINDS[0]: main, KINDS[1]: main} | self.peers.threads
        self.holds_up = [other for other in KINDS if other != kind and known.get(other) == here]
        self.peers.threads[kind] = here
        self._count()

    def _count(self) -> None:
        self.number = self.peers.rounds[self.kind]
        self.peers.rounds[self.kind] += 1
        self.life = self.peers.life

    def again(self) -> Round:
        """The next one, of the same thread and about the same."""
        found = copy.copy(self)
        found._count()
        return found

    def compare(self, record: dict[str, Any]) -> dict[str, Any]:
        """The verdict on all ranks' records."""
        if self.peers.fake:
            return {"found": "agreement", "text": ""}
        if "fields" in record and "complete" not in record:
            record = record | {"fields": {"come to": json.dumps(self.before), **record["fields"]}}
        record = record | {"holds up": self.holds_up}
        self.timeout = self.peers.timeout
        verdicts: list[dict[str, Any] | Exception] = []
        # In a thread that can be left behind: PyTorch's client waits without end for a store whose process is stopped.
        thread = threading.Thread(target=self._talk, args=(record, verdicts), daemon=True)
        thread.start()
        thread.join((self.timeout + min(max(self.timeout / 5, _LEAST_ANSWER), _ANSWER)).total_seconds())
        verdict = verdicts[0] if verdicts else TimeoutError("no answer")
        if isinstance(verdict, dict):
            for kind, number in verdict.get("rounds", {}).items():  # that are over without this rank
                self.peers.rounds[kind] = max(self.peers.rounds[kind], number)
            return verdict
        if not isinstance(verdict, (dist.DistError, TimeoutError)):
            raise verdict
        text = (
            f"{self._layer()}the key-value store of the process group does not answer; the process that holds it "
            f"(torchrun's agent, or rank 0) has ended or hangs: {verdict}"
        )
        known = presence.account(f"PeerError: {text}")
        raise PeerError(text + (f"; {known}" if known else "")) from verdict

    def _talk(self, record: dict[str, Any], verdicts: list) -> None:
        started = time.monotonic()
        try:
            self.store = _connection(self.peers.group, self.kind)
            verdicts.append((self._judge if self.rank == 0 else self._read)(record, started))
        except Exception as error:
            verdicts.append(error)

    def _judge(self, record: dict[str, Any], started: float) -> dict[str, Any]:
        if self.life is None:
            self.life = self.peers.life = self.peers.token
            self.store.set(_LIFE, self.life)
        self._tell(record)
        keys = {rank: self._key(rank) for rank in range(self.size)}
        there = None
        if self._wait(keys) or (there := self._others_there()):
            at = keys if there is None else {rank: there.get(rank, key) for rank, key in keys.items()}
            found = [json.loads(x) for x in self.store.multi_get(list(at.values()))]
            verdict = judge({self._name(r): x for r, x in enumerate(found)})
            verdict |= {"tokens": [x["token"] for x in found if "token" in x]}
        else:
            verdict = self._absent(started) | {"tokens": []}
        self._publish(verdict, keys, there)
        self._clean(verdict)
        return verdict

    def _publish(self, verdict: dict[str, Any], keys: dict[int, str], there: dict[int, str] | None) -> None:
        """The verdict; in another round too, if ranks wait `there`, and neither then takes place any more."""
        agreed = verdict["found"] == "agreement"
        readers = {self._key(""): 0 if agreed else sum(self.store.check([key]) for key in keys.values()) - 1}
        if there:
            other = next(iter(there.values())).rpartition("/")[0] + "/"
            readers[other] = len(there)
            rounds = {kind: int(number) + 1 for _, kind, number, _ in (path.split("/") for path in readers)}
            verdict |= {"rounds": rounds, "readers": {other: len(there), self._key(""): self.size - len(there)}}
        for path in readers:
            self.store.set(f"{path}verdict", json.dumps(verdict))
        # Until they have it: this process may hold the store, and end with the error that follows.
        until = time.monotonic() + min(self.timeout / 10, _READ).total_seconds()
        for path, count in readers.items():
            while count and self.store.add(f"{path}readers", 0) < count and time.monotonic() < until:
                time.sleep(0.001)

    def _others_there(self) -> dict[int, str] | None:
        """The keys of ranks that wait at a comparison of another kind, while all others are here, if that has no end:
        no thread is left that would come to the others."""
        missing = [rank for rank in range(self.size) if not self.store.check([self._key(rank)])]
        for kind in self.holds_up:
            keys = {rank: f"{self.life}/{kind}/{self.peers.rounds[kind]}/{rank}" for rank in missing}
            if keys and self.store.check(list(keys.values())):
                records = map(json.loads, self.store.multi_get(list(keys.values())))
                if all(self.kind in record["holds up"] for record in records):
                    return keys
        return None

    def _read(self, record: dict[str, Any], started: float) -> dict[str, Any]:
        verdict = self._received(record) if self.life else self._received_in_new_life(record, started)
        if verdict is None:
            absent = self._absent(started)
            if self.life is None:
                return absent
            # A rank that comes later must not believe that this one is still there.
            self._tell({"error": f"PeerError: {absent['text']}"})
            if not self.store.check([self._key("verdict")]):
                return absent
            verdict = json.loads(self.store.get(self._key("verdict")))
        with suppress(dist.DistError):  # the first rank, which may hold the store, need not wait for what follows
            self._clean(verdict)
        return verdict

    def _received(self, record: dict[str, Any], limit: timedelta | None = None) -> dict[str, str] | None:
        """The verdict, if it comes within the limit."""
        self._tell(record)
        key = self._key("verdict")
        return json.loads(self.store.get(key)) if self._wait({0: key}, limit) else None

    def _received_in_new_life(self, record: dict[str, Any], started: float) -> dict[str, str] | None:
        token, first = self.peers.token, dist.get_global_rank(self.peers.group, 0)
        while (left := self.timeout - timedelta(seconds=time.monotonic() - started)) > timedelta(0):
            limit = min(left, _LOOK_AGAIN)
            if not self._wait({0: _LIFE}, limit):
                if presence.ended([first]):
                    break
                continue
            self.life = self.store.get(_LIFE).decode()
            verdict = self._received(record | {"token": token}, limit)
            if verdict is not None and token in verdict["tokens"]:
                self.peers.life = self.life
                return verdict
            if presence.ended([first]):
                break
            if verdict is not None:  # of another life, or that a rank is absent
                left = self.timeout.total_seconds() - (time.monotonic() - started)
                time.sleep(max(0.0, min(left, limit.total_seconds())))
        return None

    def _tell(self, record: dict[str, Any]) -> None:
        self.store.set(self._key(self.rank), json.dumps(record))

    def _wait(self, keys: dict[int, str], limit: timedelta | None = None) -> bool:
        """Whether the keys of all these ranks came within the limit; not waited for once one of them has ended."""
        until = time.monotonic() + (self.timeout if limit is None else limit).total_seconds()
        ranks = {dist.get_global_rank(self.peers.group, rank): key for rank, key in keys.items()}
        presence.announce()
        if self.number == 0:
            presence.learn(ranks)
        pause, look = _FIRST_PAUSE, time.monotonic() + _BETWEEN_LOOKS
        rest, look_there = _BETWEEN_LOOKS, look
        while not (here := self.store.check(list(keys.values()))) and time.monotonic() < until:
            if time.monotonic() > look:
                presence.learn(ranks)  # those that had not announced themselves
                if not all(self.store.check([ranks[rank]]) for rank in presence.ended(ranks)):
                    break
                look = time.monotonic() + _BETWEEN_LOOKS
            if self.rank == 0 and time.monotonic() > look_there:
                if self._others_there():
                    break
                rest *= 2  # of many ranks it asks the store for each
                look_there = time.monotonic() + rest
            time.sleep(pause)
            pause = min(pause * _GROWTH, _LONGEST_PAUSE)
        return here or self.store.check(list(keys.values()))

    def _absent(self, started: float) -> dict[str, Any]:
        ranks = range(self.size) if self.life is not None else [0]
        missing = [r for r in ranks if self.life is None or not self.store.check([self._key(r)])]
        who = ", ".join(map(self._named, missing)) or f"the verdict of {self._named(0)}"
        text = f"{self._layer()}waited {time.monotonic() - started:.1f} s for {who} before {self.before}; not come yet"
        return {"found": "absent", "text": text}

    def _named(self, rank: int) -> str:
        ended = presence.ended([dist.get_global_rank(self.peers.group, rank)])
        return self._name(rank) + (" (its process has ended)" if ended else "")

    def _clean(self, verdict: Mapping[str, Any]) -> None:
        self.store.delete_key(self._key(self.rank))
        if self.store.add(self._key("readers"), 1) == verdict.get("readers", {}).get(self._key(""), self.size):
            self.store.delete_key(self._key("verdict"))
            self.store.delete_key(self._key("readers"))

    def _key(self, part: int | str) -> str:
        return f"{self.life}/{self.kind}/{self.number}/{part}"

    def _name(self, rank: int) -> str:
        return self.sequence.name_of(rank)

    def _layer(self) -> str:
        return f"layer {self.sequence.name!r}: " if self.sequence.name else ""


def judge(records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The verdict on the records of all ranks, by the name of the rank.

    The value that most ranks have is taken for the right one; of as many, the first rank's. Ranks that have come to
    different things are not compared further. Where only listings differ, their names are told; else the listings,
    whose checksums say little, are left out.
    """
    failed = {rank: record["error"] for rank, record in records.items() if "error" in record}
    if len(failed) == len(records):
        return {"found": "failure", "text": ""}
    if failed:
        failures = [f"{rank} failed before its exchange: {error}" for rank, error in failed.items()]
        return {"found": "mismatch", "text": first_few(failures)}
    fields = {rank: record["fields"] for rank, record in records.items()}
    complete = all(record.get("complete") for record in records.values())  # what one leaves out the others lack
    layer = most_common([x.get("layer") for x in fields.values()])
    different: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for x in fields.values() for name in x):
        values = {rank: x.get(name, "nothing") for rank, x in fields.items() if name in x or complete}
        usual = most_common(list(values.values()))
        found = [f"{rank} has {name} {x}, the others {usual}" for rank, x in values.items() if x != usual]
        if found:
            different[name] = found
        if found and name == "come to":
            break
    if not different:
        return {"found": "agreement", "text": ""}
    listings = [name for name in different if all(name in x.get("listings", ()) for x in records.values())]
    told = [text for name, found in different.items() if name not in listings for text in found]
    text = first_few(told or [text for found in different.values() for text in found])
    verdict: dict[str, Any] = {"found": "mismatch", "text": (f"layer {layer}: " if layer else "") + text}
    return verdict | ({} if told else {"listings": listings})


def most_common(values: list) -> Any:
    """The most frequent of some values; of several that are, the first."""
    return Counter(values).most_common(1)[0][0]


def first_few(found: list[str]) -> str:
    """The first of some texts, and how many more there are: of 1,000 ranks all may differ."""
    more = len(found) - _NAMED
    return "; ".join(found[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _connection(group: ProcessGroup, kind: str) -> Store:
    """A connection of our own to the group's store: one that waits blocks all others, such as the backend's threads."""
    stores = peers_of(group).stores
    if kind not in stores:
        store = group.get_group_store().clone()  # type: ignore[attr-defined]
        stores[kind] = PrefixStore("lasp/agreement", store)
    return stores[kind]
