"""Complete text with a model that train.py has trained, token by token, in the terminal.

    python examples/complete.py                                         # the newest checkpoint in runs/, line by line
    python examples/complete.py runs/mine --prompt "def main(" --do-sample --temperature 0.8
    git diff | python examples/complete.py runs/mine --max-new-tokens 50
    python examples/complete.py runs/mine --file book.txt --ranks 4 --interactive --save-state book.safetensors
    python examples/complete.py --load-state book.safetensors           # tomorrow

The text comes on standard output, and behind it on standard error how long the context is, and how many tokens a
second were read and written. In a terminal without a prompt, or with --interactive behind one, each line goes on from
the state of before (it is taken as it stands, without its end), an empty line lets the model go on, Ctrl-C stops it,
and Ctrl-D ends all. The time of a token does not depend on how long the context is, unless there are softmax layers.
(torchrun, and so --ranks, ends its processes at Ctrl-C. The state is saved before.)

--ranks, or torchrun, mpirun and srun, split the first prompt over ranks (`lasp.prefill`). Then rank 0 has the state and
goes on by itself, and the others end. --file takes prepare.py's files of tokens as well, which all hosts must see.
"""

from __future__ import annotations

import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import typer
from _checkpoint import LATEST, checkpoint_of, load_weights
from _files import FileError, NotWritten, on_all_ranks, on_rank_0
from _launch import LARGEST, RUNS, refuse, relaunch, started_by_a_launcher
from _model import model_of, of_run
from _report import RUN
from _tokens import is_tokens, open_tokens
from _turns import Turns, load_state, read_prompt, save_state, sums_of, told_of
from _words import Words, words_of
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import lasp
from lasp.inference.sampling import Sampling
from lasp.models import TNL, Decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TRAIN_FIRST = "train a model first, a small one in some minutes by `make demo` (or `python examples/train.py`)"
OF_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class Options:
    """The command line; `main` explains each."""

    run: Path | None
    step: int | None
    prompt: str | None
    file: Path | None
    interactive: bool
    max_new_tokens: int
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    eos_token_id: list[int] | None
    stop: list[str] | None
    seed: int | None
    load_state: Path | None
    save_state: Path | None
    tokenizer: str | None
    dtype: str | None
    segment: int | None
    ranks: int


def main(
    run: Annotated[
        Path | None, typer.Argument(exists=True, file_okay=False, help="Folder of a run; default: the newest in runs/.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="Of the checkpoint; default: the newest.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to go on with.")] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The same in a file; or prepare.py's tokens.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Go on line by line behind --prompt or --file.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=LARGEST, help="At most, each time.")] = 256,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Draw tokens; else the most probable.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Less than 1 draws the probable ones more often.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw of so many most probable ones only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of as few as have this probability together.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens that were there are less probable.")] = 1.0,
    eos_token_id: Annotated[list[int] | None, typer.Option(min=0, help="End behind a token; may be repeated.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End behind this text; may be repeated.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=-LARGEST, max=LARGEST, help="Of what is drawn; default: another each time.")
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Go on from what --save-state has saved.")
    ] = None,
    save_state: Annotated[Path | None, typer.Option(help="File for the state at the end, to go on from.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, a tokenizer.json, a folder or a name on the hub; default: the run's.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of weights and arithmetic; default: the run's.")
    ] = None,
    segment: Annotated[
        int | None, typer.Option(min=1, max=LARGEST, help="Tokens of a prompt that run at once.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Processes to start, which share the first prompt.")] = 1,
) -> None:
    """Complete text with a model that examples/train.py has trained."""
    arguments = dict(locals())
    options = Options(**{name: arguments[name] for name in Options.__dataclass_fields__})
    check(options)
    try:
        if ranks > 1 and not started_by_a_launcher():
            find_checkpoint(options)  # here, where it is one line that there is none, and no traceback of torchrun's
            relaunch(__file__, ranks)
        complete(options)
    except (FileError, NotWritten) as error:  # which say what is wrong, and are on every rank
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(error, file=sys.stderr, flush=True)
        raise typer.Exit(1) from None


def check(options: Options) -> None:
    """Refuse options that do not fit together, before anything starts."""
    if options.prompt is not None and options.file is not None:
        refuse("--file", "is a prompt, and so is --prompt; leave one out")
    if options.prompt == "":
        refuse("--prompt", "is empty; a model needs something to go on with")
    for name in ("temperature", "top_k", "top_p", "seed"):
        if getattr(options, name) is not None and not options.do_sample:
            refuse(f"--{name.replace('_', '-')}", "is for --do-sample, and without it the most probable token is taken")
    try:
        Sampling(**{name: getattr(options, name) for name in OF_SAMPLING})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if "" in (options.stop or ()):
        refuse("--stop", "is empty")
    if options.ranks > 1 and options.prompt is None and options.file is None and sys.stdin.isatty():
        refuse("--ranks", "split a prompt, which is missing: --prompt, --file, or standard input")
    save = options.save_state
    if save is not None and save.exists() and save != options.load_state:
        refuse("--save-state", f"{save} exists; name another file, or remove it")
    if save is not None and not save.absolute().parent.is_dir():
        refuse("--save-state", f"{save.absolute().parent} is no folder")


def complete(options: Options) -> None:
    """All that one rank does."""
    env = lasp.init()
    for stream in (sys.stdin, sys.stdout):  # a model may write, and a file may hold, what an encoding has not got
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    checkpoint = Path(on_rank_0("looking for a checkpoint", lambda: str(find_checkpoint(options))))
    model, words, dtype = load_model(checkpoint, options, env.device)
    vocab = model.config.vocab_size
    state, ids = starting_point(options, words, vocab, env)
    turns = Turns(model, words, state, **options_of_turns(options, words, vocab))
    if ids is not None:
        split, mesh = split_over_ranks(model, env)
        turns.read(lambda: read_prompt(split, ids, state, segment=options.segment, mesh=mesh))
    # What remains is done on one rank, and the others need not wait for it.
    dist.destroy_process_group()
    if env.rank > 0:
        return
    lines, ends = line_by_line(options), False
    if ids is not None or not lines:
        ends = turns.write() and started_by_a_launcher()
    if lines and not ends:
        talk(turns, vocab)
    if options.save_state is not None and turns.state is not None:
        save_state(options.save_state, turns.state, checkpoint, dtype)
        print(f"[the state of {turns.context:,} tokens is in {options.save_state}]", file=sys.stderr)


def line_by_line(options: Options) -> bool:
    """Whether somebody writes at standard input; else what is piped into it is the prompt, if no other is named."""
    return options.interactive or (options.prompt is None and options.file is None and sys.stdin.isatty())


def find_checkpoint(options: Options) -> Path:
    """That of RUN and --step, of the state that is loaded, or the newest in runs/.

    Raises:
        FileError: there is none, or it is not that of the state.
    """
    if options.load_state is None:
        run = options.run or newest_run()
        if options.step is None and not (run / LATEST).is_file():
            raise FileError(f"{run} has no checkpoint yet: {TRAIN_FIRST}")
        return checkpoint_of(run, options.step)
    told = told_of(options.load_state)
    path = Path(told["checkpoint"]) if options.run is None else checkpoint_of(options.run, options.step)
    if not path.is_dir():
        raise FileError(f"{path}, of which {options.load_state} is a state, is no folder; name the run that has it")
    if sums_of(path) != told["sums"]:
        raise FileError(f"{options.load_state} is a state of {told['checkpoint']}, and {path} has other weights")
    return path


def newest_run() -> Path:
    """The run in runs/ that has written a checkpoint last."""
    found = [path for path in RUNS.glob(f"*/{LATEST}") if path.is_file()]
    if not found:
        raise FileError(
            f"{RUNS.absolute()} has no run with a checkpoint: {TRAIN_FIRST}. If one lies elsewhere, name the folder "
            "of its run: python examples/complete.py RUN"
        )
    return max(found, key=lambda path: path.stat().st_mtime).parent


def load_model(checkpoint: Path, options: Options, device: torch.device) -> tuple[TNL | Decoder, Words, str]:
    """The model with its weights, who makes its tokens, and its dtype."""
    of_rank: list[tuple[Any, Words, str]] = []

    def look() -> None:
        config, told = of_run(checkpoint.parent / RUN)
        dtype = told["dtype"] if options.load_state is None else told_of(options.load_state)["dtype"]
        if options.load_state is not None and options.dtype not in (None, dtype):
            raise FileError(f"--dtype is {options.dtype}, and {options.load_state} a state of the model in {dtype}")
        of_rank.append((config, words_of_run(options, told["tokenizer"], checkpoint), options.dtype or dtype))

    on_all_ranks("looking at the run", look)
    ((config, words, dtype),) = of_rank
    for token in options.eos_token_id or ():
        if token >= config.vocab_size:
            of = f"the model's {config.vocab_size} tokens, 0 to {config.vocab_size - 1}"
            raise FileError(f"--eos-token-id {token} is none of {of}")
    with torch.device("meta"):
        model = model_of(config)
    model.to_empty(device=device)  # all of it is read
    load_weights(checkpoint, model)
    return model.to(DTYPES[dtype]), words, dtype


def words_of_run(options: Options, noted: str | None, checkpoint: Path) -> Words:
    """Who makes the tokens: --tokenizer, or what the run has noted."""
    name = options.tokenizer or noted
    if name is None:
        raise FileError(
            f"{checkpoint.parent / RUN} does not say who made the tokens: --tokenizer bytes, or what their file was "
            "made with"
        )
    try:
        return words_of(name)
    except typer.BadParameter as error:
        where = "" if options.tokenizer else f" (which {checkpoint.parent / RUN} names; --tokenizer says where it is)"
        raise FileError(f"{error.message}{where}") from error


def options_of_turns(options: Options, words: Words, vocab: int) -> dict[str, Any]:
    """Those of `lasp.stream_tokens`."""
    found = {name: getattr(options, name) for name in (*OF_SAMPLING, "max_new_tokens")}
    if options.do_sample:
        found["seed"] = secrets.randbelow(2**31) if options.seed is None else options.seed
    if options.stop:
        found["stop"] = [ids_of(text.encode(), words, vocab, "--stop").tolist() for text in options.stop]
    return {**found, "eos_token_id": options.eos_token_id or None}


def starting_point(
    options: Options, words: Words, vocab: int, env: lasp.Env
) -> tuple[lasp.InferenceState | None, Tensor | None]:
    """The state of --load-state, and the tokens [T] of the first prompt; the same on every rank, if there are any."""
    piped: str | None = None
    if options.prompt is None and options.file is None:
        piped = on_rank_0("reading standard input", lambda: None if line_by_line(options) else standard_input())
        if not piped and env.world_size > 1:
            raise FileError("several ranks share a prompt, and there is none: --prompt, --file, or standard input")
    of_rank: list[tuple[lasp.InferenceState | None, Tensor | None]] = []

    def look() -> None:
        state = None if options.load_state is None else load_state(options.load_state, env.device)
        ids = prompt_of(options, words, vocab, piped)
        if ids is None and state is None and not line_by_line(options):
            raise FileError("standard input is empty; a model needs something to go on with")
        of_rank.append((state, ids))

    on_all_ranks("reading the prompt", look)
    return of_rank[0]


def standard_input() -> str:
    """All that is piped into it, a character a byte."""
    return sys.stdin.buffer.read().decode("latin-1")


def prompt_of(options: Options, words: Words, vocab: int, piped: str | None) -> Tensor | None:
    """The tokens of the first prompt, if there is one.

    Raises:
        FileError: it has none, or such as the model does not know.
    """
    if options.file is not None:
        where = str(options.file)
        if is_tokens(options.file):
            return checked(open_tokens(options.file)[0], vocab, where)
        return ids_of(options.file.read_bytes(), words, vocab, where)
    if options.prompt is not None:
        return ids_of(options.prompt.encode(errors="surrogateescape"), words, vocab, "--prompt")
    return ids_of(piped.encode("latin-1"), words, vocab, "standard input") if piped else None


def ids_of(text: bytes, words: Words, vocab: int, where: str) -> Tensor:
    """The tokens [T] of a text. `where` it stands is said in errors.

    Raises:
        FileError: it has none, or such as the model does not know.
    """
    try:
        return checked(words.encode(text), vocab, where)
    except UnicodeDecodeError as error:
        raise FileError(f"{where} is no UTF-8 text, which the tokenizer needs: {error}") from error


def checked(ids: np.ndarray, vocab: int, where: str) -> Tensor:
    """Tokens as the model takes them."""
    if not len(ids):
        raise FileError(f"{where} has no tokens; a model needs something to go on with")
    if ids.max() >= vocab:
        raise FileError(
            f"{where} has token {ids.max()} at {ids.argmax()}, and the model knows {vocab}, 0 to {vocab - 1}: it was "
            "trained on tokens of another tokenizer (--tokenizer)"
        )
    return torch.from_numpy(ids.astype(np.int64))


def split_over_ranks(model: TNL | Decoder, env: lasp.Env) -> tuple[TNL | Decoder, DeviceMesh | None]:
    """The model as it reads a prompt on all ranks, and these. The one that is given, with the same weights, goes on
    alone."""
    if env.world_size == 1:
        return model, None
    with torch.device("meta"):
        split = model_of(model.config)
    split.load_state_dict(model.state_dict(), assign=True)
    mesh = lasp.init_mesh(sp=env.world_size)
    lasp.parallelize(split, mesh["sp"])
    return split, mesh


def talk(turns: Turns, vocab: int) -> None:
    """Line by line, until standard input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # with which a line can be edited
    print("[an empty line goes on, Ctrl-C stops the model, Ctrl-D ends]", file=sys.stderr)
    seen = sys.stdin.isatty() and sys.stdout.isatty()  # by somebody who may ask whose turn it is
    while True:
        try:
            line = input(f"[{turns.context:,}] > " if seen else "").encode(errors="surrogateescape")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not line and turns.state is None:
            continue
        if line:
            try:
                ids = ids_of(line, turns.words, vocab, "the line")
            except FileError as error:
                print(f"[{error}]", file=sys.stderr)
                continue
            turns.read(lambda ids=ids: read_prompt(turns.model, ids, turns.state, segment=None))
        if turns.write() and started_by_a_launcher():  # which had that Ctrl-C too, and waits for an end
            return


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
