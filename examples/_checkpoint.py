"""Checkpoints that are whole or absent, and that run no code when they are loaded.

    folder/step-000050/     one checkpoint, written by torch.distributed.checkpoint
    folder/LATEST           the name of the newest

Every rank writes its part into a folder of another name, which gets its own name when all are done. The parts are
stored by parameter, not by rank: a run may go on with another number of ranks, or from DDP to FSDP2.
"""

from __future__ import annotations

import os
import pickle
import shutil
from enum import EnumMeta
from io import BytesIO
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import metadata, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the state after `step` steps; every rank calls it."""
    name = f"step-{step:06d}"
    partial, final, latest = folder / f"{name}.partial", folder / name, folder / "LATEST"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    state_dict_saver.save(_state(step, model, optimizer), checkpoint_id=str(partial))
    dist.barrier()  # every part is on disk
    if dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)  # what a run that was resumed further back had left
        os.replace(partial, final)
        latest.with_suffix(".partial").write_text(name)
        os.replace(latest.with_suffix(".partial"), latest)
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Read the newest checkpoint into the model and the optimizer; the number of steps they have had."""
    path = folder / (folder / "LATEST").read_text().strip()
    _check_metadata(path / ".metadata")
    state = _state(0, model, optimizer)
    state_dict_loader.load(state, checkpoint_id=str(path), planner=_PlainValues())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def _state(step: int, model: nn.Module, optimizer: Optimizer) -> dict:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": torch.tensor(step)}


class _PlainValues(DefaultLoadPlanner):
    """Refuses stored objects other than numbers, strings and the like. (Tensors are never read otherwise.)"""

    def load_bytes(self, read_item, value: BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def _check_metadata(path: Path) -> None:
    """Raise `UnpicklingError` if the index of a checkpoint, which PyTorch unpickles, asks for anything but data."""
    with path.open("rb") as file:
        _PlainIndex(file).load()


class _PlainIndex(pickle.Unpickler):
    """Knows the classes of which an index consists, and no others."""

    allowed = frozenset(
        {("torch", "Size"), ("torch.serialization", "_get_layout")}
        | {(metadata.__name__, name) for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")}
        | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
        | {(module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")}
        | {("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    )

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):  # by which Python 3.11.0 to 3.11.3 store a member of an enum
            return _member
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"the checkpoint's index asks for {module}.{name}, which is not data")
        return super().find_class(module, name)


def _member(kind: object, name: str) -> object:
    """Of an enum, and nothing else that `getattr` would give."""
    if not isinstance(kind, EnumMeta) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"the checkpoint's index asks for {name} of {kind}, which is not data")
    return kind.__members__[name]
