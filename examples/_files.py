"""Files that are whole or absent, and what is done with them on all ranks: it succeeds on each, or fails on each."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lasp.ranks.collectives import gather_texts


class FileError(ValueError):
    """A file is missing, or is not what a run writes; the text names it."""


class NotWritten(OSError):
    """A file could not be written; the text names it, and how much room there is."""


def write(path: Path, data: str | bytes) -> None:
    """The file has all of `data`, or what it had before: also if the process or the machine ends in between.

    Raises:
        NotWritten: such as on a full disk.
    """
    data = data.encode() if isinstance(data, str) else data
    with replacing(path, len(data)) as partial, partial.open("xb") as file:  # which follows no link
        file.write(data)


@contextmanager
def replacing(path: Path, size: int | None = None) -> Iterator[Path]:
    """Inside, write a file of the name that is given; then it is on the disk, and gets this one.

    Raises:
        NotWritten: an `OSError` inside or afterwards, such as on a full disk. The file has what it had before.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)  # what was left by a process that ended here
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException as error:
        size = partial.stat().st_size if size is None and partial.exists() else size or 0
        partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise _not_written(path, size, error) from error


def append(path: Path, line: str) -> None:
    """Add a line to a file.

    Raises:
        NotWritten: such as on a full disk.
    """
    try:
        with path.open("a") as file:
            file.write(line)
    except OSError as error:
        raise _not_written(path, len(line.encode()), error) from error


def sync(path: Path) -> None:
    """Have what was appended to a file outlast the machine.

    Raises:
        NotWritten: such as on a full disk of another host.
    """
    try:
        _sync(path)
    except OSError as error:
        raise _not_written(path, path.stat().st_size, error) from error


def _sync(path: Path) -> None:
    """A file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """That this user may fill, on the disk of a folder."""
    return shutil.disk_usage(folder).free


def _not_written(path: Path, size: int, error: OSError) -> NotWritten:
    folder = path.parent
    room = f"{free_bytes(folder):,} are free in {folder}" if folder.is_dir() else f"{folder} is no folder"
    return NotWritten(f"{path} cannot be written: {error.strerror}; it needs {size:,} bytes, and {room}")


def remove(path: Path) -> None:
    """A file, a link (and not what it leads to), or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, this process alone has the folder, which is there; it has until it ends, however it does.

    Raises:
        FileError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(
                f"another run writes to {folder}, and of two no file would be whole: wait for its end, or name another"
            ) from None
        except OSError as error:  # such as of a network
            print(f"{folder} cannot be locked ({error.strerror}): see to it that no other run writes there")
        yield
    finally:
        os.close(descriptor)


def check_regular(path: Path) -> None:
    """Raise `FileError` unless there is a file: no link, which may lead anywhere, and no pipe, which never ends."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is a {'link' if stat.S_ISLNK(mode) else 'folder or device'}, and no file")


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        FileError: it is missing, no file, or no text.
    """
    check_regular(path)
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is no text: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileError: there is no such file, or something else in it.
    """
    return parse_object(read(path), str(path))


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object from its text; NaN and Infinity, which JSON does not have, are refused."""
    try:
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where} is not what a run writes: {error or 'too deep'}") from error
    if not isinstance(found, dict):
        raise FileError(f"{where} is not what a run writes: a JSON object, but {text[:60]!r}")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def on_all_ranks(what: str, part: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Call `part` on every rank; what each has returned (as JSON holds it), by rank.

    If it raises on one, all raise, with the same text: `FileError`, `NotWritten` and `FloatingPointError` as they are,
    everything else as a `RuntimeError`. `part` must not talk to other ranks.

    Args:
        what: is done, for the message if a rank does not come.
        part: what is done here.
        group: of all ranks, over which they tell each other; by default the world. A thread beside the main one needs
            one of its own: what two threads send over one group comes in another order on each rank.
    """
    kinds = {kind.__name__: kind for kind in (FileError, NotWritten, FloatingPointError)}
    cause = None
    try:
        mine = {"value": part()}
    except Exception as error:
        cause, known = error, type(error).__name__ in kinds
        mine = {"error": type(error).__name__, "text": str(error) if known else f"{type(error).__name__}: {error}"}
    group = group or dist.group.WORLD
    assert group is not None, "call lasp.init first"
    records = [json.loads(text) for text in gather_texts(json.dumps(mine), group, lambda: what)]
    failed = {rank: record for rank, record in enumerate(records) if "error" in record}
    if not failed:
        return [record["value"] for record in records]
    texts = [record["text"] for record in failed.values()]
    if len(failed) < len(records) or len(set(texts)) > 1:
        texts = [f"rank {rank}: {record['text']}" for rank, record in failed.items()]
    kind = kinds.get(next(iter(failed.values()))["error"])
    text = "; ".join(dict.fromkeys(texts[:4]))
    raise (RuntimeError(f"{what}: {text}") if kind is None else kind(text)) from cause


def on_rank_0(what: str, part: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """The same for what only rank 0 does: the others wait, get what it has returned, or raise as it does."""
    return on_all_ranks(what, part if dist.get_rank() == 0 else lambda: None, group)[0]
