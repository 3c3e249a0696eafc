"""What travels between ranks, and how two of them fold into one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lasp.mesh import PeerError, SequenceParallel


@dataclass(frozen=True)
class StateMap:
    """What a run of tokens does to a state that passes through it: S -> exp(log_decay) * S + state.

    state [N, H, K, V] and log_decay [N, H, K | 1], both fp32 (fp64 for fp64 inputs). A run that starts a
    sequence forgets what came before: its log_decay is -inf.
    """

    state: Tensor
    log_decay: Tensor

    def pack(self) -> Tensor:
        """One flat buffer, so that a hop is one message."""
        return torch.cat([self.state.reshape(-1), self.log_decay.reshape(-1)])

    def unpack(self, buffer: Tensor) -> StateMap:
        """The map in a buffer that another rank packed; this one lends the shapes."""
        state, log_decay = buffer.split([self.state.numel(), self.log_decay.numel()])
        return StateMap(state.view(self.state.shape), log_decay.view(self.log_decay.shape))


def compose(first: StateMap, then: StateMap) -> StateMap:
    """The map of two neighbouring runs, `first` before `then`. Associative; every schedule folds from the left."""
    state = then.log_decay.exp().unsqueeze(-1) * first.state + then.state
    return StateMap(state, first.log_decay + then.log_decay)


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> Tensor:
        """The state [N, H, K, V] that enters this rank's tokens; zeros where no rank comes before."""
        ...


@contextmanager
def waiting(sequence: SequenceParallel, peer: int | None, *, reverse: bool) -> Iterator[None]:
    """Around what a backend does with a peer: its error becomes a `PeerError` with the layer and the peer.

    `peer` is a rank as the group counts it, None where all take part.
    """
    started = time.monotonic()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeerError(
            f"layer {sequence.name!r}, {'backward' if reverse else 'forward'}: the exchange of the state with "
            f"{'the other ranks' if peer is None else sequence.name_of(peer)} failed after "
            f"{time.monotonic() - started:.1f} s; a rank has ended, hangs, or left out a call: {error}"
        ) from error
