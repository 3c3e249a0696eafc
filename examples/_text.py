"""What a run is trained on: the bytes of a text, or a file of tokens; and the batch of every step."""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _tokens import entropy, is_tokens, open_tokens
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import lasp


class Text:
    """Tokens in their order.

    Args:
        ids: what has a length and can be cut into slices, such as an array [tokens] of unsigned integers.
        noted: what stands beside a file of tokens; None: `ids` are bytes.
    """

    def __init__(self, ids: Any, noted: dict[str, Any] | None = None):
        self.ids, self._noted = ids, noted
        self.in_slices = noted is not None  # whether each rank reads its own alone
        self.vocab, self.unit = (256, "byte") if noted is None else (noted["vocab"], "token")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def digest(self) -> str:
        """SHA-256: runs with the same one see the same batches."""
        return hashlib.sha256(self.ids.data).hexdigest() if self._noted is None else self._noted["sha256"]

    @property
    def tokenizer(self) -> str:
        """Who has made the tokens, as prepare.py notes it; "bytes" of a text."""
        return "bytes" if self._noted is None else self._noted["tokenizer"]

    @cached_property
    def entropy(self) -> float:
        """Of the unigrams, in nats a token."""
        if self._noted is not None:
            return self._noted["entropy"]
        counts = np.zeros(256, dtype=np.int64)
        for i in range(0, len(self), 2**20):  # piecewise: bincount makes eight bytes of each
            counts += np.bincount(self.ids[i : i + 2**20], minlength=256)
        return entropy(counts)

    def part(self, start: int, end: int) -> Text:
        """The tokens from `start` to `end`; of a file of tokens what is noted stays that of all."""
        return Text(self.ids[start:end], self._noted)

    def piece(self, start: int, count: int) -> np.ndarray:
        """So many tokens; behind the end the text begins again. Nothing else is read."""
        pieces = []
        while count > 0:
            start %= len(self)
            pieces.append(self.ids[start : min(start + count, len(self))])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0] if pieces else np.empty(0, np.uint8)


def open_text(source: Path | None) -> Text:
    """A file of tokens; a text file, or all of a folder, as bytes; by default the standard library's sources.

    Raises:
        FileError: a file of tokens is none.
    """
    if source is not None and is_tokens(source):
        return Text(*open_tokens(source))
    if source is not None and source.is_file():
        return Text(np.memmap(source, dtype=np.uint8, mode="r") if source.stat().st_size else np.empty(0, np.uint8))
    return Text(np.frombuffer(b"".join(path.read_bytes() for path in files_of(source)), dtype=np.uint8))


def files_of(source: Path | None) -> list[Path]:
    """A text file itself, all text files under a folder, or the standard library's sources."""
    if source is None:
        return _sources(standard_library())
    return [source] if source.is_file() else _text_files(source)


def standard_library() -> Path:
    """The running Python's own sources: real text that is on every machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def _sources(folder: Path) -> list[Path]:
    """Python files, without those of installed packages; in an order that is the same for every rank."""
    installed = {"site-packages", "dist-packages"}
    return sorted(path for path in folder.rglob("*.py") if installed.isdisjoint(path.relative_to(folder).parts))


def _text_files(folder: Path) -> list[Path]:
    """Files without a zero byte at their beginning, hidden ones left out."""

    def is_text(path: Path) -> bool:
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            return False
        with path.open("rb") as file:
            return b"\0" not in file.read(8192)

    return sorted(path for path in folder.rglob("*") if is_text(path))


def _starts(
    text: Text, mesh: DeviceMesh | None, seed: int, step: int, batch: int, seq_len: int, part: tuple[int, int]
) -> list[int]:
    """Where the sequences of this rank begin.

    Every rank draws the places of the whole batch from (seed, step) and takes its rows. So any dp x sp sees the same
    batch, and a resumed run goes on with the batch that an uninterrupted one would have had: the state of the data is
    the number of steps done. A text shorter than a sequence is repeated.
    """
    starts = np.random.default_rng([seed, step]).integers(0, max(1, len(text) - seq_len + 1), size=batch)
    micro, batch = part[0], batch // part[1]
    starts = starts[micro * batch : (micro + 1) * batch]
    dp_rank, dp = 0, 1
    if mesh is not None:
        for axis in ("dp_replicate", "dp_shard"):
            dp_rank, dp = dp_rank * mesh[axis].size() + mesh[axis].get_local_rank(), dp * mesh[axis].size()
    return starts[dp_rank * batch // dp : (dp_rank + 1) * batch // dp].tolist()


def batch_of_step(
    text: Text,
    mesh: DeviceMesh | None,
    *,
    seed: int,
    step: int,
    batch: int,
    seq_len: int,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Whole sequences [batch / dp, seq_len], int64, of this rank's place in data parallelism.

    `part` is the number of a micro-batch, and how many there are, each [batch / dp / parts, seq_len].
    """
    starts = _starts(text, mesh, seed, step, batch, seq_len, part)
    return torch.from_numpy(np.stack([text.piece(start, seq_len) for start in starts]).astype(np.int64))


def slice_of_step(
    text: Text,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    seed: int,
    step: int,
    batch: int,
    seq_len: int,
    part: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """What `lasp.shard_batch` makes of `batch_of_step`, where this rank reads its own slice alone.

    That is seq_len / sp tokens of each sequence, and the one behind them, which is the last label.
    """
    sp, padding = mesh["sp"].size(), -seq_len % mesh["sp"].size()
    layout = lasp.ShardLayout(lasp.ShardLayout.even(seq_len + padding, sp).lengths, padding=padding)
    first, last = layout.bounds(mesh["sp"].get_local_rank())
    held = max(0, min(last, seq_len) - first)  # what is behind is padding
    known = max(0, min(last + 1, seq_len) - first)
    starts = _starts(text, mesh, seed, step, batch, seq_len, part)
    tokens = torch.from_numpy(np.stack([text.piece(start + first, known) for start in starts]).astype(np.int64))
    positions = torch.arange(first, first + held).expand(len(starts), held)
    cut = {"input_ids": (tokens[:, :held], 0), "labels": (tokens[:, 1:], -100), "position_ids": (positions, 0)}
    local = {name: F.pad(x, (0, last - first - x.shape[1]), value=fill) for name, (x, fill) in cut.items()}
    return {**{name: x.to(device) for name, x in local.items()}, "layout": layout}
