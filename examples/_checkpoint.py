"""Checkpoints that are whole or absent, hold numbers only, and tell when a byte of them has changed.

    folder/step-000050/          one checkpoint
        shard-*.safetensors      the tensors, a file a rank, by torch.distributed.checkpoint
        values.json              what is no tensor: steps done, the optimizer's options, on what text it was trained
        SHA256SUMS               of all these files; `sha256sum -c SHA256SUMS` checks them as well
    folder/LATEST                the name of the newest

Every rank writes its part into a folder of another name, which gets its own name when all are done. (`Saver`, in a file
beside this one, lets the training go on meanwhile, from a copy on the host.) What all ranks hold alike one of them
writes. The parts are stored by parameter, not by rank: a run may go on with another number of ranks, or under another
scheme of data parallelism. Neither format can hold code, so loading a stranger's checkpoint runs none; and since a
stranger can write sums as well, names, shapes and dtypes must be those of this run, and all numbers finite. What they
do to the model is another matter. (While ranks save and load, PyTorch pickles plans for the other ranks of the same
run; nothing of a file is unpickled.)

What fails on one rank is an error on all of them, before anything is called a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _files import (
    FileError,
    NotWritten,
    check_regular,
    free_bytes,
    on_all_ranks,
    on_rank_0,
    parse_object,
    read,
    read_object,
    remove,
    write,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lasp import CO2
from lasp.ranks import waiting

LATEST, SUMS, VALUES = "LATEST", "SHA256SUMS", "values.json"
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # a key of its own for every number
OF_REPLICA = r"replica[0-9]+\."  # a name of what only one of several replicas has
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    run: Mapping[str, str] | None = None,
    outer: CO2 | None = None,
) -> None:
    """Write the state after `step` steps; every rank calls it.

    Args:
        folder: of the run.
        step: steps done.
        model: parameters and buffers are saved.
        optimizer: its state and its options are saved.
        run: what else a run must have in common with this one to go on with it, such as a digest of its text.
        outer: what averages replicas that train apart. Then the model that is saved is its outer point, and weights and
            moments are saved of each replica.

    Raises:
        FloatingPointError: a number is NaN or Inf. This and the others on every rank; LATEST stays what it was.
        NotWritten: such as on a full disk; what was written of this checkpoint is removed.
        PeerError: a rank has ended, or was silent for the timeout of `lasp.init`.
    """
    write_snapshot(folder, take_snapshot(step, model, optimizer, run=run, outer=outer))


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of a checkpoint."""

    step: int
    tensors: dict[str, Tensor]
    values: str  # the text of values.json
    bytes: int  # of all ranks' tensors together


def take_snapshot(
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    run: Mapping[str, str] | None = None,
    outer: CO2 | None = None,
) -> Snapshot:
    """This rank's part of the state, not copied: what several ranks hold alike is dealt out to them, by size. (All hold
    what is not sharded, but for ZeRO-1: there one rank of each copy has the optimizer's state of a parameter; and for
    what replicas that train apart have of their own.)"""
    tensors, values = _state(model, optimizer, outer)
    mine = {name: [x.numel() * x.element_size(), isinstance(x, DTensor)] for name, x in tensors.items()}
    of_ranks = on_all_ranks(f"preparing the checkpoint of step {step}", lambda: mine)
    size, sharded = {}, set()  # of the names of all ranks, of which this one may lack some
    for of_rank in of_ranks:
        size |= {name: nbytes for name, (nbytes, _) in of_rank.items()}
        sharded |= {name for name, (_, is_sharded) in of_rank.items() if is_sharded}
    holders = {name: [rank for rank, of_rank in enumerate(of_ranks) if name in of_rank] for name in size}
    load = [0] * dist.get_world_size()
    for name in sorted(size.keys() - sharded, key=lambda name: (-size[name], name)):  # the same order on every rank
        least = min(holders[name], key=lambda rank: load[rank])
        load[least] += size[name]
        if least != dist.get_rank():
            tensors.pop(name, None)
    if outer is not None and outer.replica > 0:  # the first writes the shards of what replicas hold alike
        alike = sharded - {name for name in sharded if re.match(OF_REPLICA, name)}
        tensors = {name: x for name, x in tensors.items() if name not in alike}
    record = {"step": step, "run": dict(run or {}), **values}
    return Snapshot(step, tensors, json.dumps(record, indent=1) + "\n", sum(size.values()))


def write_snapshot(folder: Path, snapshot: Snapshot, group: dist.ProcessGroup | None = None) -> None:
    """All of `save` but for looking at the model; in a thread beside the training it needs a group of its own."""
    path = folder / _name(snapshot.step)
    partial, what = folder / f"{path.name}.partial", f"saving {path}"
    on_all_ranks(what, lambda: _check_finite(snapshot.tensors, f"{path} is not saved"), group)
    free = on_rank_0(what, lambda: _make_room(folder), group)
    try:
        _write_parts(partial, snapshot.tensors, what, group)
        on_rank_0(what, lambda: write(partial / VALUES, snapshot.values), group)
        sums = "".join(f"{digest}  {file}\n" for file, digest in _sums(partial, what, group).items())
        on_rank_0(what, lambda: _finish(partial, path, sums), group)
    except NotWritten as error:
        on_rank_0(what, lambda: remove(partial), group)
        raise NotWritten(
            f"{path} cannot be saved; it needs about {snapshot.bytes:,} bytes, and {free:,} were free in {folder}: "
            f"{error}"
        ) from error


def load(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    run: Mapping[str, str] | None = None,
    outer: CO2 | None = None,
) -> int:
    """Read the newest checkpoint into the model, the optimizer and `outer`; the number of steps they have had.

    Raises:
        FileError: on every rank, if LATEST names nothing in this folder, if a file of the checkpoint is not what was
            saved, or if it does not fit this model, optimizer or `run`; names the file, and the tensor.
    """
    what = f"loading the newest checkpoint of {folder}"
    name = _the_same(folder / LATEST, on_all_ranks(what, lambda: newest(folder).name))
    path = folder / name
    _check_sums(path, what)
    tensors, options = _state(model, optimizer, outer)
    values = on_all_ranks(what, lambda: _read_values(path, options, run or {}))[0]
    names = {name for part in on_all_ranks(what, lambda: sorted(tensors)) for name in part}
    on_all_ranks(what, lambda: _check_parts(path, tensors, names))
    _read(path, tensors, what)
    step = values.pop("step")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    own = "" if outer is None else _own(outer)

    def of(kind: str) -> dict[str, Any]:
        return {name.removeprefix(kind): x for name, x in {**tensors, **values}.items() if name.startswith(kind)}

    weights, moments = of(f"{own}model."), of(f"{own}optimizer.") | of("optimizer.")
    if outer is not None:
        trained = of("outer.momentum.")
        state = {"outer": {name: x for name, x in of("model.").items() if name in trained}, "momentum": trained}
        counts = {name: x for name, x in of("outer.").items() if not isinstance(x, Tensor)}
        outer.load_state_dict({**state, "average": of("outer.average."), **counts})
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=FLAT)
    on_rank_0(what, lambda: _make_room(folder))
    return step


def load_weights(path: Path, model: nn.Module) -> None:
    """Read the weights of a checkpoint into a model, and nothing else.

    Raises:
        FileError: as in `load`.
    """
    what = f"loading the weights of {path}"
    _check_sums(path, what)
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    on_all_ranks(what, lambda: _check_parts(path, tensors, set(tensors), of="model."))
    _read(path, tensors, what)


def checkpoint_of(folder: Path, step: int | None) -> Path:
    """That of a step, or else the newest."""
    if step is None:
        return newest(folder)
    return _in_folder(folder / _name(step), "")


def newest(folder: Path) -> Path:
    """The checkpoint that LATEST names: one in this folder, since nothing else is taken for a name, nor a link."""
    name = read(folder / LATEST).strip()
    if not re.fullmatch(r"step-[0-9]+", name):
        raise FileError(f"{folder / LATEST} must hold the name of a checkpoint, such as step-000050, got {name!r}")
    return _in_folder(folder / name, f", though {LATEST} names it")


def _in_folder(path: Path, why: str) -> Path:
    if path.is_symlink() or not path.is_dir():
        raise FileError(f"{path} is {'a link' if path.is_symlink() else 'no folder'}{why}")
    return path


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _the_same(file: Path, of_ranks: list[str]) -> str:
    """What all ranks have read: each from its own host's disk, if that is not shared."""
    if len(set(of_ranks)) > 1:
        listed = ", ".join(f"rank {rank}: {name}" for rank, name in enumerate(of_ranks))
        raise FileError(f"{file} is not the same on all ranks ({listed}); they must share the folder")
    return of_ranks[0]


def _own(outer: CO2) -> str:
    """What the names of a replica's own tensors begin with."""
    return f"replica{outer.replica}."


def _state(model: nn.Module, optimizer: Optimizer, outer: CO2 | None = None) -> tuple[dict[str, Tensor], dict]:
    """What a checkpoint holds: tensors by name, and values that are none."""
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    state = {f"model.{name}": x for name, x in weights.items()} | {
        f"optimizer.{name}": x for name, x in moments.items()
    }
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    values = {name: x for name, x in state.items() if name not in tensors}
    if outer is not None:
        own, found = {f"{_own(outer)}{name}": x for name, x in tensors.items()}, outer.state_dict()
        point = {name: x for name, x in tensors.items() if name.startswith("model.")}  # buffers too
        point |= {f"model.{name}": x for name, x in found["outer"].items()}
        more = {f"outer.{kind}.{name}": x for kind in ("momentum", "average") for name, x in found[kind].items()}
        tensors = {**point, **more, **own}
        values |= {f"outer.{name}": x for name, x in found.items() if not isinstance(x, dict)}
    return tensors, values


def _check_finite(tensors: dict[str, Tensor], consequence: str) -> None:
    """Raise `FloatingPointError` if a number that lies on this rank is NaN or Inf."""
    found = []
    for name, x in tensors.items():
        mine = x.to_local() if isinstance(x, DTensor) else x
        if not mine.isfinite().all():
            found.append(name)
    if found:
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise FloatingPointError(f"{consequence}: NaN or Inf in {', '.join(found[:4])}{more}")


# Saving


def _make_room(folder: Path) -> int:
    """Remove what saves have left that did not come to their end; bytes that are free then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if re.fullmatch(r"step-[0-9]+(\.old)?\.partial", path.name):
                remove(path)
        return free_bytes(folder)
    except OSError as error:
        raise NotWritten(f"{folder} cannot be written: {error.strerror}") from error


def _write_parts(partial: Path, tensors: dict[str, Tensor], what: str, group: dist.ProcessGroup | None) -> None:
    """A file of each rank, which is on the disk afterwards."""
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    # A text would be noted over NCCL, by an event: not beside a main thread that may be capturing a CUDA graph.
    try:
        with waiting(what if group is None else lambda: what):
            state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # on every rank
        failed = {rank: failure for rank, (failure, _) in sorted(error.failures.items())}
        text = "; ".join(f"rank {rank}: {failure}" for rank, failure in failed.items())
        if all(isinstance(failure, OSError | SafetensorError) for failure in failed.values()):
            raise NotWritten(text) from error
        raise RuntimeError(f"{what}: {text}") from error


def _finish(partial: Path, path: Path, sums: str) -> None:
    """All of it is on the disk before it gets its name, and has its name before LATEST names it."""
    write(partial / SUMS, sums)
    old = path.with_name(f"{path.name}.old.partial")
    try:
        if path.exists() or path.is_symlink():  # what a run that was resumed further back had left
            os.replace(path, old)
        os.replace(partial, path)
    except OSError as error:
        raise NotWritten(f"{path} cannot be written: {error.strerror}") from error
    write(path.parent / LATEST, path.name)
    remove(old)


def _sums(path: Path, what: str, group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, in order of names, on every rank. The ranks share the work."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = on_all_ranks(what, lambda: {file.name: _digest(file) for file in _files(path)[rank::ranks]}, group)
    return dict(sorted(item for part in parts for item in part.items()))


def _files(path: Path) -> list[Path]:
    try:
        return sorted(file for file in path.iterdir() if file.suffix == ".safetensors" or file.name == VALUES)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error


def _digest(path: Path) -> str:
    """As `sha256sum` prints it, without holding the file in memory."""
    check_regular(path)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


# Loading


def _check_sums(path: Path, what: str) -> None:
    """Raise `FileError` unless the files are those of SHA256SUMS, each with its bytes."""
    expected = on_all_ranks(what, lambda: _expected_sums(path))[0]  # all decide by the same
    found = _sums(path, what)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise FileError(f"{path / name} is missing, though {SUMS} has it")
        if name not in expected:
            raise FileError(f"{path / name} is not of this checkpoint: {SUMS} does not have it")
        if expected[name] != found[name]:
            raise FileError(f"{path / name} is not what was saved: its SHA-256 is not that of {SUMS}")


def _expected_sums(path: Path) -> dict[str, str]:
    text = read(path / SUMS)
    if not re.fullmatch(r"([0-9a-f]{64}  [^\n/]+\n)+", text):
        raise FileError(f"{path / SUMS} is not a list of SHA-256 sums")
    return {name: digest for digest, name in re.findall(r"(.{64})  (.+)\n", text)}


def _read_values(path: Path, options: dict[str, Any], run: Mapping[str, str]) -> dict[str, Any]:
    """values.json, which must have a value of the same kind for each of this run's options."""
    file = path / VALUES
    values = read_object(file)
    step, saved_run = values.get("step"), values.pop("run", None)
    if type(step) is not int or _name(step) != path.name:
        raise FileError(f"{file} must have the step of {path.name}, got {step!r}")
    if not isinstance(saved_run, dict) or saved_run.keys() != run.keys():
        raise FileError(f"{file} must say of what run it is, {sorted(run)}, got {saved_run!r}")
    for name, value in run.items():
        if saved_run[name] != value:
            raise FileError(f"{file} is of another run: its {name} is {saved_run[name]}, that of this run {value}")
    if values.keys() != {"step", *options}:
        raise FileError(f"{file} and this run differ in {sorted(values.keys() ^ {'step', *options})}")
    for name, value in options.items():
        if not _alike(values[name], value):
            raise FileError(f"{file} has {values[name]!r} for {name}, this run {value!r}")
    return values


def _alike(found: object, expected: object) -> bool:
    """Whether a value from a file can stand for one of this run's."""
    if isinstance(expected, list | tuple):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_alike, found, expected))
    if expected is None or isinstance(expected, bool | str):
        return type(found) is type(expected)
    return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)


def _read(path: Path, tensors: dict[str, Tensor], what: str) -> None:
    """The tensors of files that were looked at."""
    with waiting(what):
        state_dict_loader.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    try:
        on_all_ranks(what, lambda: _check_finite(tensors, f"{path} is no checkpoint to go on with"))
    except FloatingPointError as error:
        raise FileError(str(error)) from error


def _check_parts(path: Path, tensors: dict[str, Tensor], names: set[str], of: str = "") -> None:
    """Raise `FileError` unless the parts make up each of these tensors, whole and in its dtype.

    PyTorch would convert to another, and leave rows as they are that no part has. `names` are those of all ranks'
    tensors. Tensors whose names do not begin with `of` are passed over.
    """
    parts: dict[str, list[tuple[int, tuple[int, ...], str, Path]]] = {}
    for file in _files(path):
        if file.name != VALUES:
            for name, part in _parts_of(file):
                if name.startswith(of):
                    parts.setdefault(name, []).append((*part, file))
    if parts.keys() != names:
        raise FileError(f"{path} and this run differ in the tensors {sorted(parts.keys() ^ names)[:4]}")
    for name, x in tensors.items():
        shape, rows = tuple(x.shape) or (1,), 0
        for first_row, part, dtype, file in sorted(parts[name]):
            if DTYPES.get(dtype) != x.dtype:
                raise FileError(f"{file}: {name} has dtype {dtype}, in this run it is {x.dtype}")
            if first_row != rows or part[1:] != shape[1:]:
                raise FileError(f"{file}: {name} is {list(part)} from row {first_row}, in this run {list(x.shape)}")
            rows += part[0]
        if rows != shape[0]:
            raise FileError(f"{path}: {name} has {rows} rows, in this run it is {list(x.shape)}")


def _parts_of(file: Path) -> Iterable[tuple[str, tuple[int, tuple[int, ...], str]]]:
    """Of each tensor in a file: the name, its first row in the whole tensor, its shape and its dtype."""
    try:
        with safe_open(file, framework="pt") as opened:
            info = "DCP_SHARDING_INFO"
            places = parse_object((opened.metadata() or {}).get(info, ""), f"{info} of {file}")
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                part = opened.get_slice(name)
                shape, place = part.get_shape() or [1], places[name]["saved_offsets"] or [0]
                if len(place) != len(shape) or any(type(n) is not int for n in place) or any(place[1:]):
                    raise FileError(f"{file}: {name} {shape} cannot lie at {place!r}")
                yield name, (place[0], tuple(shape), part.get_dtype())
    except (SafetensorError, KeyError, TypeError) as error:
        raise FileError(f"{file} is no part of a checkpoint: {type(error).__name__}: {error}") from error
