"""Memory of each rank that the others read directly: of GPUs over NVLink, of CPU processes as shared memory.

For ranks of one host. A rank writes to its own board, all meet, and each reads from the others' boards what it needs.
There is no message, and nothing that must be received. On GPUs this is PyTorch's symmetric memory: `meet` is a kernel
of one block, which finds room beside kernels that fill the card, where NCCL's must wait until they leave.

A board has two halves that take turns, so that no second meeting is needed before it is written again: a rank that
comes to the next meeting has read what the last one was for.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lasp.ranks import SequenceParallel, peers_of
from lasp.ranks.collectives import texts_of_all
from lasp.ranks.group import process
from lasp.ranks.hosts import this_host

SMALLEST = 2**20  # bytes of a half

Memory = tuple[list[Tensor], Callable[[], None]]  # of each rank, as the group counts them [2, bytes]; and `meet`


class Board:
    """The boards of all ranks of a group, as this rank sees them.

    Every rank must use it for the same exchanges, in the same order.
    """

    def __init__(self, memory: Memory, rank: int, replaced: Board | None = None):
        """`replaced` is the smaller one that was used before."""
        self._memory, self._meet = memory
        self._rank = rank
        self._half = 0
        self._last: torch.Event | None = None  # the end of the last turn outside of a capture
        self.repeats = replaced is not None and replaced.repeats
        self._in_graphs = replaced if self.repeats else None  # graphs that were captured go on to use it

    @property
    def capacity(self) -> int:
        """Bytes that a rank can write."""
        return self._memory[0].shape[1]

    def begin(self) -> None:
        """Take the next half. What is queued on the current stream from here on comes after the last turn."""
        self._half = 1 - self._half
        if self._memory[0].is_cuda:
            # A graph repeats the halves of its capture, in which case two turns in a row may have the same. (Turns of
            # one capture are in order without an event: all are on the stream of the exchanges, or on one that waited.)
            self.repeats |= torch.cuda.is_current_stream_capturing()
            if self._last is not None and not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream().wait_event(self._last)
            if self.repeats:
                self._meet()

    def mine(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Where this rank writes what the others shall read."""
        return self.view(self._rank, shape, dtype)

    def meet(self) -> None:
        """Wait, on the current stream or a CPU, until every rank has written."""
        self._meet()

    def view(self, rank: int, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """What a rank, as the group counts it, wrote in this turn; until the next but one begins."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[rank][self._half, :size].view(dtype).view(shape)

    def end(self) -> None:
        """End the turn: no more is written or read in it."""
        if self._memory[0].is_cuda and not torch.cuda.is_current_stream_capturing():
            self._last = torch.cuda.current_stream().record_event()


def has_room(sequence: SequenceParallel, size: int) -> bool:
    """Whether `board_of` need not make one."""
    board = sequence.peers.board
    return board is not None and board.capacity >= size


def board_of(sequence: SequenceParallel, size: int, device: torch.device) -> Board:
    """The group's board, with room for messages of `size` bytes, the same on every rank.

    Where there is none, or it is too small, a collective call.

    Raises:
        ValueError: on every rank, if they cannot read each other's memory, or there is not enough.
    """
    peers = sequence.peers
    if has_room(sequence, size):
        return peers.board
    if peers.refusal is None:
        peers.refusal = _refusal(peers.group)
    obstacle, memory = peers.refusal, None
    if not obstacle:
        obstacle, memory = _make(peers.group, max(SMALLEST, 1 << (size - 1).bit_length()), device)
    if memory is None:
        raise ValueError(f'exchange "direct" needs ranks that read each other\'s memory: {obstacle}')
    peers.board = Board(memory, peers.rank, peers.board)
    return peers.board


def obstacle(sequence: SequenceParallel, device: torch.device, size: int = SMALLEST) -> str:
    """Why the ranks have no board of this size; empty if they have. A collective call, the first time."""
    try:
        board_of(sequence, size, device)
    except ValueError as error:
        return str(error)
    return ""


def _refusal(group: ProcessGroup) -> str:
    """Why these ranks can never have a board, in which all agree; empty if they may."""
    if dist.get_backend(group) == "fake":
        return "the backend is a fake"
    hosts = set(texts_of_all(this_host(), group))
    if len(hosts) > 1:
        return f"they are on {len(hosts)} hosts"
    # PyTorch (2.11) numbers such meetings of a process over all groups: unequal ones would wait for each other without
    # end. (What others than lasp have set up is not counted here.)
    if len(set(texts_of_all(str(process.meetings), group))) > 1:
        return "some of them have set up symmetric memory in other groups, and others not as often"
    return ""


def _make(group: ProcessGroup, size: int, device: torch.device) -> tuple[str, Memory | None]:
    """The memory, or why there is none, in which all ranks agree. No rank joins before all have memory to give."""
    own: _OnGpu | _InFile | None = None
    memory, problem = None, ""
    try:
        own = _OnGpu(size, device) if device.type == "cuda" else _InFile(size)
    except (RuntimeError, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
    try:
        problems = _problems(problem, group)
        if own is not None and not problems:
            try:
                memory = own.join(group)
            except (RuntimeError, OSError) as error:
                problem = f"{type(error).__name__}: {error}"
            problems = _problems(problem, group)
    finally:
        if own is not None:
            own.close()
    return problems, None if problems else memory


class _OnGpu:
    """PyTorch's symmetric memory."""

    def __init__(self, size: int, device: torch.device):
        from torch.distributed import _symmetric_memory

        torch.cuda.synchronize(device)  # nobody reads a smaller one, which this replaces, any longer
        self._memory = _symmetric_memory.empty(2 * size, dtype=torch.uint8, device=device)

    def join(self, group: ProcessGroup) -> Memory:
        """Join it with the memory of the others; a collective call."""
        from torch.distributed import _symmetric_memory

        process.meetings += 1
        handle = _symmetric_memory.rendezvous(self._memory, group)
        shape, ranks = self._memory.shape, range(dist.get_world_size(group))
        found = [self._memory if r == handle.rank else handle.get_remote_tensor(r, shape, torch.uint8) for r in ranks]
        milliseconds = int(peers_of(group).timeout / timedelta(milliseconds=1))
        return [x.view(2, -1) for x in found], lambda: handle.barrier(channel=0, timeout_ms=milliseconds)

    def close(self) -> None:
        """Nothing is left over."""


class _InFile:
    """Memory as a file without a name, which the others open through this process: so none is left, whoever is killed.

    (Where the system has no such files, as macOS, one with a name, which it loses as soon as all have opened it.)
    """

    def __init__(self, size: int):
        self._size, self._token = 2 * size, os.urandom(16).hex()
        name, self._named = f"lasp_board_{os.getpid()}", not hasattr(os, "memfd_create")
        if self._named:
            self._descriptor, self._path = tempfile.mkstemp(prefix=f"{name}_")
        else:
            self._descriptor = os.memfd_create(name)
            self._path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        try:
            with os.fdopen(self._descriptor, "wb", closefd=False) as file:
                file.write(self._token.encode().ljust(self._size, b"\0"))  # all of it: later there might be none left
        except OSError:
            self.close()
            raise

    def join(self, group: ProcessGroup) -> Memory:
        """Join it with the others' files; a collective call. In another container the same name may be another file."""
        found = []
        for path, token in (x.split("\n") for x in texts_of_all(f"{self._path}\n{self._token}", group)):
            with open(path, "rb") as file:  # which must exist: torch would make one
                if file.read(len(token)) != token.encode():
                    raise OSError(f"{path} is not the file of the rank that made it")
            found.append(torch.from_file(path, shared=True, size=self._size, dtype=torch.uint8).view(2, -1))
        alive = weakref.ref(group)  # what a board refers to must not keep the group alive, by which it is found
        return found, lambda: dist.barrier(group=alive())  # type: ignore[return-value]

    def close(self) -> None:
        """Close the file; the memory goes with the last process that has it."""
        os.close(self._descriptor)
        if self._named:
            os.unlink(self._path)


def _problems(mine: str, group: ProcessGroup) -> str:
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts_of_all(mine, group)) if text)
