"""Make a file of tokens, which a run maps into memory and of which each rank reads its own slices.

    python examples/prepare.py my_texts/ tokens.bin                                # bytes are the tokens
    python examples/prepare.py my_texts/ tokens.bin --tokenizer my_tokenizer/tokenizer.json --separator 0
    python examples/train.py --data tokens.bin --vocab 64000

Beside it stands tokens.bin.json, which says what is in it (_tokens.py). A tokenizer of Hugging Face needs `tokenizers`
(a file tokenizer.json) or `transformers` (a folder of a model, or its name on the hub); no code of its own is run. It
is given pieces of some megabyte, cut behind a line: nothing need fit in memory, but for one line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from _files import FileError, NotWritten
from _launch import refuse, refuse_beyond_memory
from _text import files_of
from _tokens import MOST_WORDS, header_of, write_tokens
from _words import Encode, words_of
from tqdm import tqdm

PIECE = 2**20  # bytes


def main(
    source: Annotated[Path, typer.Argument(exists=True, help="Text file, or a folder of them.")],
    out: Annotated[Path, typer.Argument(help="File of tokens to be written, such as tokens.bin.")],
    tokenizer: Annotated[str, typer.Option(help='"bytes", a tokenizer.json, a folder or a name on the hub.')] = "bytes",
    separator: Annotated[int | None, typer.Option(min=0, help="Token to put behind each file.")] = None,
) -> None:
    """Make a file of tokens from text."""
    if out.suffix != ".bin":  # by which a run knows it, should the file beside it be lost
        raise typer.BadParameter(f"{out} must be named *.bin", param_hint="OUT")
    for path in (out, header_of(out)):
        if path.exists():
            raise typer.BadParameter(f"{path} exists; name another file, or remove it", param_hint="OUT")
    files = files_of(source)
    if not any(path.stat().st_size for path in files):
        raise typer.BadParameter(
            f"{source} has no text (hidden files, and those of zeros, are none)", param_hint="SOURCE"
        )
    if separator is not None:
        if separator >= MOST_WORDS:
            refuse("--separator", f"{separator} is none of the {MOST_WORDS} tokens that a file can hold")
        counts = 16 * separator  # of a file, and of a piece of it
        refuse_beyond_memory("--separator", f"the counts of {separator} tokens", counts, on_host=True)
    words = words_of(tokenizer)
    vocab = words.vocab
    if separator is not None:
        vocab = max(vocab, separator + 1)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = write_tokens(out, tokens_of(files, words.encode, separator), vocab=vocab, tokenizer=tokenizer)
    except (FileError, NotWritten) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    of = f"{len(files):,} file" + "s" * (len(files) != 1)
    typer.echo(f"{out}: {found['tokens']:,} tokens ({found['dtype']}) of {of}; --vocab {vocab} or more")


def tokens_of(files: list[Path], encode: Encode, separator: int | None) -> Iterator[np.ndarray]:
    """Of all files, a piece at a time."""
    with tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for path in files:
            try:
                for piece in pieces_of(path):
                    yield encode(piece)
                    bar.update(len(piece))
            except UnicodeDecodeError as error:
                raise FileError(f"{path} is no UTF-8 text: {error}") from error
            if separator is not None:
                yield np.array([separator])


def pieces_of(path: Path) -> Iterator[bytes]:
    """A file, cut behind lines."""
    lines: list[bytes] = []
    try:
        with path.open("rb") as file:
            while lines := file.readlines(PIECE):
                yield b"".join(lines)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror}") from error


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
