"""Do the messages that ranks are about to send each other fit? Asked before every exchange, also where calls are not
compared, so that a tensor of another shape on one rank is an error on every rank, and never garbage or an abort.

Where messages lie on hosts (gloo), every rank tells all others in a few bytes of fixed length what it is about to send:
all see the same difference, and nothing has been sent. NCCL's messages cannot be looked at without keeping the host
waiting. There the ranks agree on each kind of message once, through the key-value store, and remember it: a rank that
comes with a kind on which none has agreed asks the others first, finds them elsewhere or not at all, and sends nothing.
What differs from batch to batch, such as the borders of packed sequences, makes no new kind.

Messages may fit and mean something else: another scale, other borders of packed sequences. Such facts of a call are
compared with the messages over gloo; over NCCL before the next step of an optimizer (`agreement.py`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lasp.checks import agreement
from lasp.checks.rounds import judge
from lasp.ranks import RankMismatchError, SequenceParallel, waiting

Kind = tuple[tuple[str, object], ...]
"""All that decides how many messages there are, how long, and what they mean, by name; the same on every rank."""

_HEADER, _IN_FULL = 256, 8192  # bytes
_TAGS = {_HEADER: 2, _IN_FULL: 3}  # of these messages; those of an exchange have 0 and 1
_SHOWN = 300  # characters of a value
_KINDS = 4096  # that are remembered of a group


def check_messages(
    sequence: SequenceParallel,
    what: str,
    kind: Kind,
    device: torch.device,
    *,
    facts: Kind = (),
    where: str = "",
    explain: Callable[[], None] | None = None,
) -> None:
    """Raise on every rank if their messages do not fit; to be called at the last moment before the first is sent.

    Args:
        sequence: the ranks; with `validate="off"` nothing is asked.
        what: is about to be exchanged; a word for all messages of a kind.
        kind: see `Kind`.
        device: on which the messages lie.
        facts: what else must be the same on every rank, though messages fit without; compared on hosts only.
        where: in which layer and direction.
        explain: called where ranks differ that are about to exchange the same; may raise an error that says it better.

    Raises:
        RankMismatchError: a rank is about to send something else, or has other facts; on every rank.
        PeerError: a rank did not come within the timeout of the group.
    """
    peers = sequence.peers
    if sequence.validate == "off" or peers.fake:
        return
    if on_hosts(sequence, device):
        _meet(sequence, f"{where}: {what}" if where else what, kind, facts, explain)
    elif (what, kind) not in peers.agreed and not agreement.capturing():
        agreement.compare(sequence, {"layer": sequence.name, **dict(kind)}, before=f"a new kind of message, {what}")
        if len(peers.agreed) >= _KINDS:  # on all ranks at the same call
            peers.agreed.clear()
        peers.agreed.add((what, kind))


def on_hosts(sequence: SequenceParallel, device: torch.device) -> bool:
    """Whether the host waits for messages from this device in any case."""
    found = sequence.peers.on_hosts.get(device.type)
    if found is None:
        backend = sequence.peers.group._get_backend(torch.device(device.type))
        found = sequence.peers.on_hosts[device.type] = backend.name() == "gloo"
    return found


def _meet(sequence: SequenceParallel, what: str, kind: Kind, facts: Kind, explain: Callable[[], None] | None) -> None:
    text = f"{what} ({', '.join(f'{name} {value}' for name, value in kind)})"
    mark = zlib.crc32(repr(facts).encode(), zlib.crc32(text.encode()))
    header = (mark.to_bytes(4, "big") + text.encode())[:_HEADER].ljust(_HEADER)
    headers = _of_all(header, what, sequence)
    if headers == [header] * sequence.size:
        return
    told = [header[4:].decode(errors="replace").rstrip() for header in headers]  # the same on every rank
    if explain is not None and len({text.split(" (")[0] for text in told}) == 1:
        explain()
    found = [{"come to": text} for text in told]
    if len(set(told)) == 1:  # they differ where a header is at its end, or in the facts
        mine = json.dumps({name: _in_short(str(value)) for name, value in (("come to", text), *facts)}).encode()
        found = [json.loads(x) for x in _of_all(mine.ljust(_IN_FULL), what, sequence)]
    verdict = judge({sequence.name_of(rank): {"fields": fields} for rank, fields in enumerate(found)})
    came_to_the_same = len({fields["come to"] for fields in found}) == 1
    raise RankMismatchError((f"{what}: " if came_to_the_same else "") + verdict["text"])


def _in_short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..., checksum {zlib.crc32(text.encode()):08x}"


def _of_all(header: bytes, what: str, sequence: SequenceParallel) -> list[bytes]:
    """The headers of all ranks, as the group counts them.

    One message from rank to rank, so that an error names who is missing, under a tag of their length, so that all
    messages that can come are equally long.
    """
    group, peers, me, tag = sequence.group, sequence.peers, sequence.peers.rank, _TAGS[len(header)]
    mine = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    theirs = {rank: torch.empty_like(mine) for rank in range(sequence.size) if rank != me}

    def of_each(act: Callable[[int], Any]) -> dict[int, Any]:
        found = {}
        for rank in theirs:
            with waiting(lambda rank=rank: f"{what}, compared with {sequence.name_of(rank)}"):
                found[rank] = act(rank)
        return found

    arriving = of_each(lambda rank: dist.irecv(theirs[rank], group=group, group_src=rank, tag=tag))
    leaving = of_each(lambda rank: dist.isend(mine, group=group, group_dst=rank, tag=tag))
    of_each(lambda rank: peers.wait(arriving[rank]))
    of_each(lambda rank: peers.wait(leaving[rank]))
    return [bytes((theirs[rank] if rank != me else mine).tolist()) for rank in range(sequence.size)]
