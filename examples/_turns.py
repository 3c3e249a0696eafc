"""Turns of a model and of who writes with it: text goes in, text comes out token by token, and the state goes on.

The state may be kept in a file, with a file of JSON beside it that says of which weights it is: those of another
checkpoint of the same run would fit, and make nonsense of it.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _checkpoint import SUMS
from _files import FileError, NotWritten, read, read_object, write
from _words import Shown, Words
from torch import Tensor, nn
from tqdm import tqdm

import lasp

PART = 2**20  # tokens of a prompt between two steps of the bar
# A terminal does what such characters say, and a model may write any of them: they are shown as pictures.
HARMLESS = {**{c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}, **dict.fromkeys(range(127, 160), "\ufffd")}


def read_prompt(
    model: nn.Module, ids: Tensor, state: lasp.InferenceState | None, *, segment: int | None, mesh: Any = None
) -> lasp.InferenceState | None:
    """The state behind a prompt [T] that comes behind a state, on rank 0; the others of a mesh get None."""
    parts = ids.split(PART)
    hide = None if len(parts) > 1 else True  # None: where nobody looks
    with tqdm(total=len(ids), unit="token", unit_scale=True, disable=hide, leave=False, dynamic_ncols=True) as bar:
        for number, part in enumerate(parts, 1):
            to = 0 if number == len(parts) else None  # before that all go on from it
            state = lasp.prefill(model, part, mesh, state=state, segment=segment, to=to)
            bar.update(len(part))
    return state


class Turns:
    """A model on one rank, and the state behind all that was said.

    Args:
        model: on the device where it runs.
        words: tokens of text, and text of tokens.
        state: of what was said before, if there was anything.
        options: those of `lasp.stream_tokens` for each turn.
    """

    def __init__(self, model: nn.Module, words: Words, state: lasp.InferenceState | None, **options: Any):
        self.model, self.words, self.state, self.options = model, words, state, options
        self._read = 0, 0.0  # tokens that were read since the last turn, and the seconds of that

    @property
    def context(self) -> int:
        """Tokens so far."""
        return 0 if self.state is None else self.state.lengths[0]

    def read(self, make_state: Callable[[], lasp.InferenceState | None]) -> None:
        """Have the state of a prompt, and note how long it takes."""
        before, started = self.context, time.perf_counter()
        self.state = make_state()
        if self.state is not None:
            float(self.state.logits[0, 0])  # waits until a GPU has made it
        self._read = self.context - before, time.perf_counter() - started

    def write(self) -> bool:
        """Go on with the text, on standard output; how fast it was comes behind it on standard error. Ctrl-C ends it
        behind a token, and the state is then behind that; returns whether that was so."""
        terminal = sys.stdout.isatty()

        def say(text: str) -> None:
            sys.stdout.write(text.translate(HARMLESS) if terminal else text)
            sys.stdout.flush()

        shown, started = Shown(self.words), time.perf_counter()
        stream = lasp.stream_tokens(self.model, None, state=self.state, **self.options)
        with interrupts() as asked:
            for (token,) in stream:
                assert token is not None, "a row that has ended is the last one here"
                say(shown.add(token))
                if asked:
                    break
        say(shown.end() + "\n" * terminal)
        seconds = time.perf_counter() - started
        found = stream.result()
        self.state = found.state
        print(self._told(found.lengths[0], seconds), file=sys.stderr, flush=True)
        return bool(asked)

    def _told(self, new: int, seconds: float) -> str:
        told = [f"context {_count(self.context)}"]
        read, took = self._read
        if read:
            told.append(f"prompt {_count(read)} in {took:.2f} s, {read / took:,.0f} tokens/s")
        told.append(f"{new:,} new in {seconds:.2f} s, {new / seconds:,.1f} tokens/s")
        if self.options["do_sample"]:
            told.append(f"seed {self.options['seed']}")
        self._read = 0, 0.0
        return f"[{'; '.join(told)}; state {self.state.nbytes / 2**20:,.2f} MiB]" if self.state else ""


def _count(tokens: int) -> str:
    return f"{tokens:,} token{'s' * (tokens != 1)}"


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C only makes the list true, so that nothing is left half done; the second one ends all."""
    asked: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        if asked and callable(before):
            before(number, frame)
        asked.append(number)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


# A state in a file


def about(path: Path) -> Path:
    """Where it is written of which weights a state is."""
    return path.with_name(f"{path.name}.json")


def save_state(path: Path, state: lasp.InferenceState, checkpoint: Path, dtype: str) -> None:
    """Both files.

    Raises:
        NotWritten: such as on a full disk.
    """
    told = {"checkpoint": str(checkpoint.resolve()), "sums": sums_of(checkpoint), "dtype": dtype}
    text = json.dumps(told, indent=1) + "\n"
    try:
        if not (about(path).is_file() and about(path).read_text(errors="replace") == text):
            about(path).unlink(missing_ok=True)  # so that it never stands beside a state of which it is not
        state.save(path)
    except OSError as error:
        raise NotWritten(f"{path} cannot be written: {error.strerror}") from error
    write(about(path), text)


def told_of(path: Path) -> dict[str, str]:
    """What is written beside a state: `checkpoint`, where that lay; `sums`, which it has; `dtype` of the model.

    Raises:
        FileError: nothing, or something else.
    """
    found = read_object(about(path))
    if not all(isinstance(found.get(name), str) for name in ("checkpoint", "sums", "dtype")):
        raise FileError(f"{about(path)} is not what --save-state writes: {sorted(found)} are in it")
    return found


def load_state(path: Path, device: torch.device) -> lasp.InferenceState:
    """The state of a file.

    Raises:
        FileError: it is none, or was changed.
    """
    try:
        return lasp.InferenceState.load(path, device=device)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is no state to go on from: {error}") from error


def sums_of(checkpoint: Path) -> str:
    """SHA-256 of the sums of a checkpoint, which no other one shares."""
    return hashlib.sha256(read(checkpoint / SUMS).encode()).hexdigest()
