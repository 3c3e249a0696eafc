"""Over NCCL the host does not wait, and cannot raise: a thread tells where a rank waits before PyTorch ends it.

PyTorch's watchdog aborts a process whose operation on the GPU takes longer than the timeout, and names neither layer
nor peer. So who queues an operation with other ranks notes it here, with an event behind it. The thread prints one line
about the oldest that has not come to its end: as soon as a rank has ended, else when most of the timeout is over.
Another line says that a rank has ended, since what is not noted (a checkpoint, say) may wait for it as well.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from lasp.ranks.presence import presence

_LOOK = 0.25  # seconds
_PART = 0.7  # of the timeout, after which a rank that still waits says so
_SOON = 0.2  # of the timeout, after which the end of a rank is told to one that has noted nothing
_KEPT = 256  # operations: more than a host is ever ahead of its GPU


class Done(Protocol):
    """An event on a GPU, or what tells whether the host has come out of a call."""

    def query(self) -> bool: ...  # noqa: D102


Noted = tuple[float, Done, Callable[[], str]]


class Watch:
    """What this process has queued on its GPU with other ranks."""

    def __init__(self) -> None:
        self.on = False
        self._thread: threading.Thread | None = None
        self._noted: deque[Noted] = deque(maxlen=_KEPT)
        self._timeout = float("inf")  # seconds
        self._rank = 0  # kept, as the process groups may be destroyed while the thread looks
        self._ended_since: float | None = None  # when the first end of a rank was seen; infinite once it was told
        self._told = False  # whether it was said what this rank waits for

    def start(self, timeout: timedelta) -> None:
        """Watch from now on, until the process groups are destroyed."""
        self._timeout, self._rank, self.on = timeout.total_seconds(), dist.get_rank(), True
        if self._thread is None or not self._thread.is_alive():
            self._noted.clear()  # of another life of the process groups
            self._ended_since, self._told = None, False
            self._thread = threading.Thread(target=self._run, daemon=True, name="lasp watch")
            self._thread.start()

    def note(self, event: Done, what: Callable[[], str]) -> None:
        """`what` must hold no tensor: it is kept for some steps."""
        self._noted.append((time.monotonic(), event, what))

    def note_current(self, what: str) -> None:
        """What has just been queued on the current stream."""
        if not torch.cuda.is_current_stream_capturing():
            self.note(torch.cuda.current_stream().record_event(), lambda: what)

    def _run(self) -> None:
        while dist.is_initialized():
            if line := self._line():
                print(line, file=sys.stderr, flush=True)
                if self._told:
                    return
            time.sleep(_LOOK)

    def _line(self) -> str:
        """What to print; empty as long as nothing is wrong."""
        rank, pending = f"lasp: rank {self._rank}", self._pending()
        if pending is not None:
            self._told = True
            known = presence.account(f"PeerError: {pending()}") or "mostly a rank has ended, hangs, or left out a call"
            return (
                f"{rank} waited for another; {pending()} has not come to its end; {known}. "
                "PyTorch's watchdog will end this process"
            )
        if presence.ended() and self._is_time_to_tell():
            known = presence.account("PeerError: it may wait in what is no exchange of lasp's")
            return f"{rank} may wait for another; {known}. If so, PyTorch's watchdog will end this process"
        return ""

    def _pending(self) -> Callable[[], str] | None:
        """The oldest that has not come to its end, if it is late or a rank has ended."""
        noted = list(self._noted)
        late = bool(noted) and time.monotonic() - noted[-1][0] > _PART * self._timeout
        # An event is not asked without need: while another thread captures a CUDA graph, that would end the capture.
        if not noted or not (late or presence.ended()):
            return None
        return next((what for _, event, what in noted if not event.query()), None)

    def _is_time_to_tell(self) -> bool:
        """Once; a while after a rank has ended, since others end soon after it where all is well."""
        now = time.monotonic()
        if self._ended_since is None:
            self._ended_since = now
        if now - self._ended_since < _SOON * self._timeout:
            return False
        self._ended_since = float("inf")
        return True


watch = Watch()
