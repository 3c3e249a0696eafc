"""Checkpoints that are whole or absent, hold numbers only, and tell when a byte of them has changed.

    folder/step-000050/          one checkpoint
        shard-*.safetensors      the tensors, a file a rank, by torch.distributed.checkpoint
        values.json              what is no tensor: steps done, the optimizer's options
        SHA256SUMS               of all these files; `sha256sum -c SHA256SUMS` checks them as well
    folder/LATEST                the name of the newest

Every rank writes its part into a folder of another name, which gets its own name when all are done. The parts are
stored by parameter, not by rank: a run may go on with another number of ranks, or from DDP to FSDP2. Neither format
can hold code, so loading a stranger's checkpoint runs none; what it does to the model is another matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

SUMS, VALUES = "SHA256SUMS", "values.json"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # a key of its own for every number


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the state after `step` steps; every rank calls it."""
    name = f"step-{step:06d}"
    partial, final, latest = folder / f"{name}.partial", folder / name, folder / "LATEST"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    tensors, values = _state(model, optimizer)
    state_dict_saver.save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))
    if dist.get_rank() == 0:
        (partial / VALUES).write_text(json.dumps({"step": step, **values}, indent=1) + "\n")
    dist.barrier()  # every part is on disk
    sums = _sums(partial)
    if dist.get_rank() == 0:
        (partial / SUMS).write_text("".join(f"{digest}  {file}\n" for file, digest in sums.items()))
        shutil.rmtree(final, ignore_errors=True)  # what a run that was resumed further back had left
        os.replace(partial, final)
        latest.with_suffix(".partial").write_text(name)
        os.replace(latest.with_suffix(".partial"), latest)
    dist.barrier()


def load(folder: Path, model: nn.Module, optimizer: Optimizer) -> int:
    """Read the newest checkpoint into the model and the optimizer; the number of steps they have had.

    Raises:
        ValueError: on every rank, if LATEST names nothing in this folder, or if a file of the checkpoint is not what
            was saved; names the file.
    """
    path = newest(folder)
    _check_sums(path)
    tensors, options = _state(model, optimizer)
    values = json.loads((path / VALUES).read_text())
    step = values.pop("step")
    if values.keys() != options.keys():
        raise ValueError(f"{path / VALUES} and this run differ in {sorted(values.keys() ^ options.keys())}")
    state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    weights, moments = (
        {name.removeprefix(kind): value for name, value in {**tensors, **values}.items() if name.startswith(kind)}
        for kind in ("model.", "optimizer.")
    )
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=FLAT)
    return step


def newest(folder: Path) -> Path:
    """The checkpoint that LATEST names: one in this folder, since nothing else is taken for a name."""
    name = (folder / "LATEST").read_text().strip()
    if not re.fullmatch(r"step-\d+", name):
        raise ValueError(f"{folder / 'LATEST'} must hold the name of a checkpoint, such as step-000050, got {name!r}")
    return folder / name


def _state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict]:
    """What a checkpoint holds: tensors by name, and values that are none."""
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    state = {f"model.{name}": x for name, x in weights.items()} | {
        f"optimizer.{name}": x for name, x in moments.items()
    }
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in state.items() if name not in tensors}


def _sums(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, in order of names, on every rank. The ranks share the work."""
    files = sorted(file.name for file in path.iterdir() if file.suffix == ".safetensors" or file.name == VALUES)
    mine = {name: _digest(path / name) for name in files[dist.get_rank() :: dist.get_world_size()]}
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return dict(sorted(item for part in parts for item in part.items()))


def _digest(path: Path) -> str:
    """As `sha256sum` prints it, without holding the file in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check_sums(path: Path) -> None:
    """Raise `ValueError` unless the files are those of SHA256SUMS, each with its bytes."""
    text = (path / SUMS).read_bytes().decode(errors="backslashreplace")
    if not re.fullmatch(r"([0-9a-f]{64}  [^\n/]+\n)+", text):
        raise ValueError(f"{path / SUMS} is not a list of SHA-256 sums")
    expected = {name: digest for digest, name in re.findall(r"(.{64})  (.+)\n", text)}
    found = _sums(path)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{path / name} is missing, though {SUMS} has it")
        if name not in expected:
            raise ValueError(f"{path / name} is not of this checkpoint: {SUMS} does not have it")
        if expected[name] != found[name]:
            raise ValueError(f"{path / name} is not what was saved: its SHA-256 is not that of {SUMS}")
