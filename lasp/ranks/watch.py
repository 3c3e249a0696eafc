"""Over NCCL the host does not wait, and cannot raise: a thread tells where a rank waits before PyTorch ends it.

PyTorch's watchdog aborts a process whose operation on the GPU takes longer than the timeout, and names neither layer
nor peer. So who queues an operation with other ranks notes it here, with an event behind it. The thread prints one line
about the oldest that has not come to its end: as soon as a rank has ended, else when most of the timeout is over.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from lasp.ranks.presence import presence

_LOOK = 0.25  # seconds
_PART = 0.7  # of the timeout, after which a rank that still waits says so
_KEPT = 256  # operations: more than a host is ever ahead of its GPU

Noted = tuple[float, torch.Event, Callable[[], str]]


class Watch:
    """What this process has queued on its GPU with other ranks."""

    def __init__(self) -> None:
        self.on = False
        self._thread: threading.Thread | None = None
        self._noted: deque[Noted] = deque(maxlen=_KEPT)

    def start(self, timeout: timedelta) -> None:
        """From now on, until the process groups are destroyed."""
        self._patience, self.on = _PART * timeout.total_seconds(), True
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, daemon=True, name="lasp watch")
            self._thread.start()

    def note(self, event: torch.Event, what: Callable[[], str]) -> None:
        """`what` must hold no tensor: it is kept for some steps."""
        self._noted.append((time.monotonic(), event, what))

    def note_current(self, what: str) -> None:
        """What has just been queued on the current stream."""
        if not torch.cuda.is_current_stream_capturing():
            self.note(torch.cuda.current_stream().record_event(), lambda: what)

    def _run(self) -> None:
        while dist.is_initialized():
            time.sleep(_LOOK)
            if self._noted and (line := self._line()):
                print(line, file=sys.stderr, flush=True)
                return

    def _line(self) -> str:
        """What to print; empty as long as nothing is wrong."""
        noted = list(self._noted)
        late = time.monotonic() - noted[-1][0] > self._patience
        # An event is not asked without need: while another thread captures a CUDA graph, that would end the capture.
        if not (late or presence.ended()):
            return ""
        pending = next((what for _, event, what in noted if not event.query()), None)
        if pending is None:
            return ""
        known = presence.account(f"PeerError: {pending()}") or "mostly a rank has ended, hangs, or left out a call"
        return (
            f"lasp: rank {dist.get_rank()} waited for another; {pending()} has not come to its end; {known}. "
            f"PyTorch's watchdog will end this process"
        )


watch = Watch()
