"""Do the messages that ranks are about to send each other fit? Asked before every exchange, also where calls are not
compared, so that a tensor of another shape on one rank is an error on every rank, and never garbage or an abort.

Where messages lie on hosts (gloo), every rank tells all others in a few bytes of fixed length what it is about to send:
all see the same difference, and nothing has been sent. NCCL's messages cannot be looked at without keeping the host
waiting. There the ranks agree on each kind of message once, through the key-value store, and remember it: a rank that
comes with a kind on which none has agreed asks the others first, finds them elsewhere or not at all, and sends nothing.
What differs from batch to batch, such as the borders of packed sequences, makes no new kind.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
import torch.distributed as dist

from lasp.checks import agreement
from lasp.checks.agreement import judge
from lasp.ranks import RankMismatchError, SequenceParallel, waiting

Kind = tuple[tuple[str, object], ...]
"""All that decides how many messages there are, how long, and what they mean, by name; the same on every rank."""

_HEADER = 256  # bytes
_KINDS = 4096  # that are remembered of a group


def check_messages(
    sequence: SequenceParallel,
    what: str,
    kind: Kind,
    device: torch.device,
    *,
    where: str = "",
    explain: Callable[[], None] | None = None,
) -> None:
    """Raise on every rank if their messages do not fit; to be called at the last moment before the first is sent.

    Args:
        sequence: the ranks; with `validate="off"` nothing is asked.
        what: is about to be exchanged; a word for all messages of a kind.
        kind: see `Kind`.
        device: on which the messages lie.
        where: in which layer and direction.
        explain: called where ranks differ; may raise an error that says it better.

    Raises:
        RankMismatchError: a rank is about to send something else; on every rank.
        PeerError: a rank did not come within the timeout of the group.
    """
    peers = sequence.peers
    if sequence.validate == "off" or peers.fake:
        return
    if on_hosts(sequence, device):
        _meet(sequence, f"{where}: {what}" if where else what, kind, explain)
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


def _meet(sequence: SequenceParallel, what: str, kind: Kind, explain: Callable[[], None] | None) -> None:
    text = f"{what} ({', '.join(f'{name} {value}' for name, value in kind)})".encode()
    header = (zlib.crc32(text).to_bytes(4, "big") + text)[:_HEADER].ljust(_HEADER)
    mine = torch.frombuffer(bytearray(header * sequence.size), dtype=torch.uint8)
    theirs = torch.empty_like(mine)
    with waiting(what):
        # By this collective, since gloo takes a message for that of another collective only if it is of the same sort,
        # and nobody uses this one for other messages among these ranks: none of another length can come.
        dist.all_to_all_single(theirs, mine, group=sequence.group)
    if torch.equal(theirs, mine):
        return
    if explain is not None:
        explain()
    headers = [bytes(row.tolist()) for row in theirs.view(sequence.size, _HEADER)]
    told = [header[4:].decode(errors="replace").rstrip() for header in headers]
    if len(set(told)) == 1:  # they differ where a header is at its end
        told = [f"{text}..., checksum {header[:4].hex()}" for text, header in zip(told, headers)]
    verdict = judge({sequence.name_of(r): {"fields": {"come to": text}} for r, text in enumerate(told)})
    raise RankMismatchError(verdict["text"])
