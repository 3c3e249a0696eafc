"""Memory of each rank that the others read directly: of GPUs over NVLink, of CPU processes as shared memory.

For ranks of one host. A rank writes to its own board, all meet, and each reads from the others' boards what it needs.
There is no message, and nothing that must be received. On GPUs this is PyTorch's symmetric memory: `meet` is a kernel
of one block, which finds room beside kernels that fill the card, where NCCL's must wait until they leave.

A board has two halves that take turns, so that no second meeting is needed before it is written again: a rank that
comes to the next meeting has read what the last one was for.
"""

from __future__ import annotations

import os
import socket
import tempfile
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lasp.mesh import SequenceParallel, group_timeout

SMALLEST = 2**20  # bytes of a half

Memory = tuple[list[Tensor], Callable[[], None]]  # of each rank, as the group counts them [2, bytes]; and `meet`


class Board:
    """The boards of all ranks of a group, as this rank sees them.

    Every rank must use it for the same exchanges, in the same order.
    """

    def __init__(self, memory: Memory, rank: int):
        self._memory, self._meet = memory
        self._rank = rank
        self._half = 0
        self._repeats = False  # whether a CUDA graph may have used a half twice in a row
        self._last: tuple[torch.Event, bool] | None = None  # the end of the last turn, and whether in a capture

    @property
    def capacity(self) -> int:
        """Bytes that a rank can write."""
        return self._memory[0].shape[1]

    def begin(self) -> None:
        """Take the next half. What is queued on the current stream from here on comes after the last turn."""
        self._half = 1 - self._half
        if self._memory[0].is_cuda:
            capturing = torch.cuda.is_current_stream_capturing()
            if self._last is not None and self._last[1] == capturing:
                torch.cuda.current_stream().wait_event(self._last[0])
            self._repeats |= capturing
            if self._repeats:  # a replay does not know whose turn it is
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
        """No more is written or read in this turn."""
        if self._memory[0].is_cuda:
            stream = torch.cuda.current_stream()
            self._last = (stream.record_event(), torch.cuda.is_current_stream_capturing())


_boards: weakref.WeakKeyDictionary[ProcessGroup, Board] = weakref.WeakKeyDictionary()
_obstacles: weakref.WeakKeyDictionary[ProcessGroup, str] = weakref.WeakKeyDictionary()
_meetings = 0  # to set up symmetric memory, of this process in all groups


def board_of(sequence: SequenceParallel, size: int, device: torch.device) -> Board:
    """The group's board, with room for messages of `size` bytes, the same on every rank.

    Where there is none, or it is too small, a collective call.

    Raises:
        ValueError: on every rank, if they cannot read each other's memory.
        RuntimeError: it would have to be made while a CUDA graph is captured.
    """
    group = sequence.group
    assert group is not None
    board = _boards.get(group)
    if board is not None and board.capacity >= size:
        return board
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError('exchange "direct" makes its memory at the first call: make one before the capture')
    obstacle = _obstacles.get(group)
    if obstacle is None:
        capacity = max(SMALLEST, 1 << (size - 1).bit_length())
        obstacle, memory = _make(group, capacity, device)
        if memory is not None:
            _boards[group] = Board(memory, dist.get_rank(group))
            return _boards[group]
        _obstacles[group] = obstacle
    raise ValueError(f'exchange "direct" needs ranks that read each other\'s memory: {obstacle}')


def obstacle(sequence: SequenceParallel, device: torch.device) -> str:
    """Why the ranks cannot read each other's memory; empty if they can. A collective call, the first time."""
    try:
        board_of(sequence, SMALLEST, device)
    except ValueError:
        assert sequence.group is not None
        return _obstacles[sequence.group]
    return ""


def _make(group: ProcessGroup, size: int, device: torch.device) -> tuple[str, Memory | None]:
    """The memory, or why there is none, in which all ranks agree."""
    if dist.get_backend(group) == "fake":
        return "the backend is a fake", None
    hosts = _of_all(_host(), group)
    if len(set(hosts)) > 1:
        return f"they are on {len(set(hosts))} hosts", None
    if len(set(_of_all(str(_meetings), group))) > 1:
        # PyTorch (2.11) numbers the meetings of a process over all groups: they would wait for each other without end.
        return "some of them have set up symmetric memory in other groups, and others not as often", None
    problem, memory = "", None
    try:
        memory = _of_gpus(group, size, device) if device.type == "cuda" else _of_processes(group, size)
    except (RuntimeError, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(_of_all(problem, group)) if text]
    return ("; ".join(problems), None) if problems else ("", memory)


def _of_gpus(group: ProcessGroup, size: int, device: torch.device) -> Memory:
    import torch.distributed._symmetric_memory as symmetric_memory

    global _meetings
    _meetings += 1
    torch.cuda.synchronize(device)  # nobody reads a smaller one, which this replaces, any longer
    mine = symmetric_memory.empty(2 * size, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(mine, group)
    ranks = range(dist.get_world_size(group))
    memory = [mine if r == handle.rank else handle.get_remote_tensor(r, (2 * size,), torch.uint8) for r in ranks]
    milliseconds = int(group_timeout(group) / timedelta(milliseconds=1))
    return [x.view(2, size) for x in memory], lambda: handle.barrier(channel=0, timeout_ms=milliseconds)


def _of_processes(group: ProcessGroup, size: int) -> Memory:
    """Files that live in memory, and lose their names as soon as all have opened them."""
    path, problem = _new_file(2 * size)
    try:
        paths = _of_all(path, group)
        if "" in paths:
            raise OSError(problem or "another rank has none")
        memory = [torch.from_file(x, shared=True, size=2 * size, dtype=torch.uint8).view(2, size) for x in paths]
        dist.barrier(group=group)
    finally:
        if path:
            os.unlink(path)
    return memory, lambda: dist.barrier(group=group)  # type: ignore[return-value]


def _new_file(size: int) -> tuple[str, str]:
    """Its path, or why there is none. Its memory is taken now, since none might be left when it is written."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="lasp_board_", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    except OSError as error:
        return "", str(error)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.unlink(path)
        return "", f"{path}: {error}"
    finally:
        os.close(descriptor)
    return path, ""


def _host() -> str:
    """This host as it has been up since it was started; names alone may be the same on several."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _of_all(mine: str, group: ProcessGroup) -> list[str]:
    found: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found
