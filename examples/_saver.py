"""Checkpoints are written while the training goes on: the step waits for a copy on the host, and not for a disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from _checkpoint import take_snapshot, write_snapshot
from _files import on_all_ranks
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.optim import Optimizer

from lasp import CO2
from lasp.ranks.group import making_groups


class Saver:
    """Saves the checkpoints of one run; a context, at whose end all are written. Every rank makes one.

    `beside` the training, a save copies this rank's part to the host, with PyTorch's stager, and a thread does the
    rest: all that `_checkpoint.save` does, in the same order, over a gloo group of its own. (PyTorch's `async_save` is
    the first half of that: a checkpoint is more than the files that it writes.) One save is under way at most; the next
    one waits for it. What fails is raised on every rank by the first `check`, `save` or end that comes after.

    Args:
        folder: of the run.
        device: of the model.
        beside: whether there will be saves beside the training.
        run, outer: as in `_checkpoint.save`.
    """

    def __init__(
        self, folder: Path, device: torch.device, *, beside: bool, run: Mapping[str, str], outer: CO2 | None = None
    ):
        self.folder, self.run, self.outer = folder, run, outer
        self._under_way: Future[None] | None = None
        self._step = 0  # that is under way
        self._group: dist.ProcessGroup | None = None
        self._thread = self._stager = None
        if not beside:
            return
        with making_groups("making the process group of the thread that saves checkpoints"):
            self._group = dist.new_group(backend="gloo")  # type: ignore[assignment]  # this rank is in it
        gpu = device.type == "cuda"
        # Its copy is complete before the next step begins. That of a GPU is in pinned memory, which the next save takes
        # again. (DefaultStager of torch 2.11 copies once, and cannot again.)
        self._stager = BlockingAsyncStager(cache_staged_state_dict=gpu)
        # A thread has a current GPU of its own, by default the first: PyTorch's writer would touch that from all ranks.
        self._thread = ThreadPoolExecutor(1, "checkpoint", (lambda: torch.cuda.set_device(device)) if gpu else None)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Also after an error, which is the same on all ranks mostly: what is under way is whole or absent then."""
        try:
            if error is None:
                self.wait()
            elif self._under_way is not None and (also := self._under_way.exception()) is not None:
                print(f"\nrank {dist.get_rank()}: the checkpoint of step {self._step}: {also}", file=sys.stderr)
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                dist.destroy_process_group(self._group)

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, *, beside: bool) -> None:
        """Save the state after `step` steps, now or `beside` what follows; see `_checkpoint.save`."""
        self.wait()
        snapshot = take_snapshot(step, model, optimizer, run=self.run, outer=self.outer)
        if not beside or self._thread is None or self._stager is None:
            write_snapshot(self.folder, snapshot)
            return
        snapshot = replace(snapshot, tensors=self._stager.stage(snapshot.tensors))
        self._step, self._under_way = step, self._thread.submit(write_snapshot, self.folder, snapshot, self._group)

    def check(self) -> None:
        """Raise what the save under way has failed of on any rank: on all, at the same step. Does not wait for it."""
        self._look(wait=False)

    def wait(self) -> None:
        """Until the save that is under way has come to its end; raise what it has failed of on any rank."""
        self._look(wait=True)

    def _look(self, *, wait: bool) -> None:
        under_way = self._under_way
        if under_way is None:  # on every rank
            return

        def look() -> bool:
            if wait or under_way.done():
                under_way.result()
                return True
            return False

        what = f"waiting for the checkpoint of step {self._step}"
        try:
            if all(on_all_ranks(what, look)):
                self._under_way = None
        except BaseException:
            self._under_way = None  # it was told
            raise
