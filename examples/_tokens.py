"""Files of tokens: numbers one after the other, and beside them in JSON what they are.

    x.bin          N little-endian numbers of 1, 2 or 4 bytes
    x.bin.json     their dtype, how many they are, the vocabulary and who made it, unigram entropy, SHA-256

A run never reads such a file whole. Of its bytes it checks at its start that they are as many as x.bin.json says, and
the SHA-256 of 64 blocks of 4 KiB, from the first to the last; `sha256sum x.bin` checks all of them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from _files import FileError, read_object, replacing, write

DTYPES = {"uint8": np.dtype("u1"), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
MOST_WORDS = 2**32  # that the largest of them tells apart
FIELDS = {"dtype": str, "tokens": int, "vocab": int, "tokenizer": str, "entropy": float, "sha256": str, "sample": str}
BLOCKS, BLOCK = 64, 4096  # that are looked at, and their bytes


def header_of(path: Path) -> Path:
    """Where it is written what a file holds."""
    return path.with_name(f"{path.name}.json")


def is_tokens(path: Path) -> bool:
    """Whether a file is one of tokens, or must be by its name."""
    return path.is_file() and (path.suffix == ".bin" or header_of(path).exists())


def open_tokens(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The tokens, memory-mapped, and what `write_tokens` has noted of them.

    Raises:
        FileError: nothing is noted, or something that is not true; names the file.
    """
    header = header_of(path)
    if not header.exists():
        raise FileError(
            f"{path} has no {header.name} beside it, which says what is in it: examples/prepare.py writes both"
        )
    found = read_object(header)
    for name, kind in FIELDS.items():
        if type(found.get(name)) is not kind:
            raise FileError(f"{header} is not what prepare.py writes: {name} is {found.get(name)!r}")
    if found["dtype"] not in DTYPES:
        raise FileError(f"{header}: dtype must be one of {', '.join(DTYPES)}, got {found['dtype']!r}")
    dtype, size = DTYPES[found["dtype"]], path.stat().st_size
    if size != found["tokens"] * dtype.itemsize:
        raise FileError(f"{path} has {size:,} bytes, and not the {found['tokens']:,} {found['dtype']} of {header.name}")
    if _sample(path) != found["sample"]:
        raise FileError(f"{path} is not what {header.name} was written for: a block of it has another SHA-256")
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype), found


def write_tokens(path: Path, pieces: Iterable[np.ndarray], *, vocab: int, tokenizer: str) -> dict[str, Any]:
    """Write a file of tokens and what is noted of them, which is returned; both are whole or absent.

    Args:
        path: of the file.
        pieces: integers from 0 to vocab - 1.
        vocab: how many words there are.
        tokenizer: who made them, for the reader of x.bin.json.
    """
    name = next(name for name, dtype in DTYPES.items() if vocab - 1 <= np.iinfo(dtype).max)
    digest, counts = hashlib.sha256(), np.zeros(vocab, np.int64)
    with replacing(path) as partial:
        with partial.open("xb") as file:
            for piece in pieces:
                if len(piece) and not 0 <= piece.min() <= piece.max() < vocab:
                    raise ValueError(f"the tokenizer {tokenizer} gave {piece.max()}, though it has {vocab} words")
                counts += np.bincount(piece, minlength=vocab)
                data = piece.astype(DTYPES[name]).tobytes()
                digest.update(data)
                file.write(data)
        sample = _sample(partial)
    found = {"dtype": name, "tokens": int(counts.sum()), "vocab": vocab, "tokenizer": tokenizer}
    found |= {"entropy": entropy(counts), "sha256": digest.hexdigest(), "sample": sample}
    write(header_of(path), json.dumps(found, indent=1) + "\n")
    return found


def entropy(counts: np.ndarray) -> float:
    """Nats a token: the loss of a model that knows how often each occurs, and nothing else."""
    share = counts[counts > 0] / max(1, counts.sum())
    return float(abs((share * np.log(share)).sum()))


def _sample(path: Path) -> str:
    """SHA-256 of some blocks, which are all of a small file."""
    digest, last = hashlib.sha256(), max(0, path.stat().st_size - BLOCK)
    with path.open("rb") as file:
        for i in range(BLOCKS):
            file.seek(math.ceil(last * i / (BLOCKS - 1)))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()
