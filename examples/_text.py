"""Text as bytes, and the batch of every step."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def standard_library() -> Path:
    """The running Python's own sources: real text that is on every machine."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_text(source: Path | None) -> np.ndarray:
    """The bytes of a text file, of all text files under a folder, or of the standard library's sources; uint8."""
    if source is not None and source.is_file():
        return np.memmap(source, dtype=np.uint8, mode="r") if source.stat().st_size else np.empty(0, np.uint8)
    files = _sources(standard_library()) if source is None else _text_files(source)
    return np.frombuffer(b"".join(path.read_bytes() for path in files), dtype=np.uint8)


def fingerprint(text: np.ndarray) -> str:
    """SHA-256 of the bytes: runs with the same one see the same batches."""
    return hashlib.sha256(text.data).hexdigest()


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


def unigram_entropy(text: np.ndarray) -> float:
    """Nats a byte: the loss of a model that knows how often each byte occurs, and nothing else."""
    counts = np.zeros(256, dtype=np.int64)
    for i in range(0, len(text), 2**20):  # piecewise: bincount makes eight bytes of each
        counts += np.bincount(text[i : i + 2**20], minlength=256)
    share = counts[counts > 0] / len(text)
    return float(-(share * np.log(share)).sum())


def batch_of_step(
    text: np.ndarray, *, seed: int, step: int, batch: int, seq_len: int, dp_rank: int = 0, dp: int = 1
) -> Tensor:
    """Whole sequences [batch / dp, seq_len], int64, of one data-parallel rank.

    Every rank draws the places of the whole batch from (seed, step) and takes its rows. So any dp x sp sees the same
    batch, and a resumed run goes on with the batch that an uninterrupted one would have had. A text shorter than a
    sequence is repeated.
    """
    starts = np.random.default_rng([seed, step]).integers(0, max(1, len(text) - seq_len + 1), size=batch)
    rows = starts[dp_rank * batch // dp : (dp_rank + 1) * batch // dp]
    return torch.from_numpy(np.stack([_from(text, start, seq_len) for start in rows]).astype(np.int64))


def _from(text: np.ndarray, start: int, seq_len: int) -> np.ndarray:
    """So many bytes; behind the end the text begins again."""
    return text[start : start + seq_len] if start + seq_len <= len(text) else np.resize(text, seq_len)
