"""Text to tokens, and back: its bytes, or a tokenizer of Hugging Face."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer

Encode = Callable[[bytes], np.ndarray]
UNKNOWN = "\ufffd"  # what decoding gives for bytes that are no character, or not yet


class Words(NamedTuple):
    """Who makes tokens of text."""

    vocab: int  # how many there are
    encode: Encode  # raises UnicodeDecodeError for what is no text, if it does not take bytes as they are
    decode: Callable[[list[int]], str]


def words_of(name: str) -> Words:
    """Those of "bytes", of a file tokenizer.json, or of a folder of a model or its name on the hub; no code of a
    stranger is run. Ends with a message about --tokenizer if there are none."""
    if name == "bytes":
        return Words(256, lambda text: np.frombuffer(text, np.uint8), _text_of_bytes)
    path = Path(name)
    if path.is_file():
        need("tokenizers", name)
        from tokenizers import Tokenizer

        try:
            found = Tokenizer.from_file(name)
        except Exception as error:  # the library raises no other kind
            raise typer.BadParameter(f"{name} is no tokenizer: {error}", param_hint="--tokenizer") from error
        return _words(
            found.get_vocab(),
            lambda text: found.encode(text, add_special_tokens=False).ids,
            lambda ids: found.decode(ids, skip_special_tokens=False),
        )
    if path.suffix == ".json":  # which is no name on the hub
        raise typer.BadParameter(f"{name} is no file", param_hint="--tokenizer")
    need("transformers", name)
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{name} is no tokenizer: {error}", param_hint="--tokenizer") from error
    return _words(
        loaded.get_vocab(),
        lambda text: loaded.encode(text, add_special_tokens=False),
        lambda ids: loaded.decode(ids, clean_up_tokenization_spaces=False),
    )


def _words(known: dict[str, int], encode: Callable[[str], Any], decode: Callable[[list[int]], str]) -> Words:
    return Words(max(known.values()) + 1, lambda text: np.array(encode(text.decode()), np.int64), decode)


def _text_of_bytes(ids: list[int]) -> str:
    """A token that is no byte, such as a separator, is shown by its number."""
    return b"".join(bytes([token]) if token < 256 else f"<{token}>".encode() for token in ids).decode(errors="replace")


def need(library: str, name: str) -> None:
    """End with a message unless a library is installed."""
    if importlib.util.find_spec(library) is None:
        message = f"{name} needs {library}, which is not installed: pip install {library}; bytes need nothing"
        raise typer.BadParameter(message, param_hint="--tokenizer")


class Shown:
    """The text of tokens that come one by one: what is not yet a whole character is held back until it is."""

    _KEPT = 32  # tokens that are decoded again with those that come, since how one reads may depend on those before

    def __init__(self, words: Words):
        self._decode = words.decode
        self._ids: list[int] = []
        self._given = 0  # characters of their text

    def add(self, token: int) -> str:
        """What there is to show more, which may be nothing."""
        self._ids.append(token)
        text = self._decode(self._ids)
        unknown = len(text) - len(text.rstrip(UNKNOWN))
        found = self._give(text, len(text) - min(unknown, 3))  # a character has four bytes at most
        if self._given == len(text) and len(self._ids) > 2 * self._KEPT:
            self._ids = self._ids[-self._KEPT :]
            self._given = len(self._decode(self._ids))
        return found

    def end(self) -> str:
        """What was held back, since nothing more comes; the next token is the first of another text."""
        text = self._decode(self._ids)
        found = self._give(text, len(text))
        self._ids, self._given = [], 0
        return found

    def _give(self, text: str, until: int) -> str:
        found = text[self._given : until]
        self._given = max(self._given, until)
        return found
