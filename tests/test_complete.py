"""examples/complete.py: its text is that of lasp.generate, from any checkpoint, prompt, state and number of ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import _turns
import complete
import numpy as np
import pytest
import torch
import torch.distributed as dist
from _files import read_object
from _model import FAMILIES, model_of, of_run
from _tokens import write_tokens
from _words import Shown, Words, words_of
from processes import ROOT
from ranks import run_ranks
from scripts import run_processes
from test_train import TEXT, _assert_on_all, _largest_file, _small, _state
from typer.testing import CliRunner

import lasp

PROMPT = "def größe("  # 12 bytes


def _complete(*arguments, piped=b""):
    """Exit code, standard output, and standard error in one line; the process group outlives it."""
    wide = {"COLUMNS": "1000", "TERMINAL_WIDTH": "1000", "NO_COLOR": "1"}
    with mock.patch.object(dist, "destroy_process_group"):
        result = CliRunner().invoke(complete.app, [str(x) for x in arguments], env=wide, input=piped)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def _with_pipe(piped, *arguments):
    return _complete(*arguments, piped=piped)


def _on_one(*arguments, piped=b""):
    [found] = run_ranks(1, _with_pipe, piped, *arguments)
    return found


def _trained(run, step=None, dtype=torch.float32):
    """The model of a checkpoint, put together without the example."""
    model = model_of(of_run(run / "run.json")[0])
    tensors = _state(run, step)[0]
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    return model.to(dtype)


def _text(ids):
    return b"".join(bytes([token]) if token < 256 else b"<%d>" % token for token in ids).decode(errors="replace")


def _generated(model, prompt, **options):
    """Tokens that lasp.generate gives behind a text."""
    return lasp.generate(model, list(prompt.encode()), **options).ids[0].tolist()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of two ranks whose weights lie on both, with tokens that are no bytes."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "text").write_bytes(TEXT)
    more = ("--parallel=fsdp2", "--vocab=301", "--family=gla", "--pattern=LS", "--lr=0.01")
    _assert_on_all(2, 0, [], _small(folder / "text", folder / "out", *more))
    return folder / "out"


# The text


DRAWN = {"do_sample": True, "seed": 5}  # the most probable token of so little training is always a space
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 200, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 7}


def _as_options(**options):
    named = {name.replace("_", "-"): x for name, x in options.items()}
    return [f"--{name}" if x is True else f"--{name}={x}" for name, x in named.items()]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_the_text_is_that_of_generate(done, world, options):
    ids = _generated(_trained(done), PROMPT, max_new_tokens=40, **options)
    found = run_ranks(world, _complete, done, f"--prompt={PROMPT}", "--max-new-tokens=40", *_as_options(**options))
    code, out, error = found[0]
    assert (code, out) == (0, _text(ids)), error
    assert "[context 52 tokens; prompt 12 tokens in " in error
    assert "; 40 new in " in error
    assert (" tokens/s; seed 7; state " in error) == bool(options)
    assert found[1:] == [(0, "", "")] * (world - 1)


@pytest.mark.parametrize("options", [
    ["--family=tnl"], ["--family=mamba"], ["--family=gated_delta_net"], ["--family=kda", "--experts=2"],
])  # fmt: skip
def test_other_models(tmp_path, options):
    (tmp_path / "text").write_bytes(TEXT)
    _assert_on_all(2, 0, [], _small(tmp_path / "text", tmp_path / "out", "--dtype=bfloat16", *options))
    ids = _generated(_trained(tmp_path / "out", dtype=torch.bfloat16), PROMPT, max_new_tokens=20, **DRAWN)
    found = _on_one(tmp_path / "out", f"--prompt={PROMPT}", "--max-new-tokens=20", *_as_options(**DRAWN))
    assert found[:2] == (0, _text(ids)), found


def _built_without_weights(folder):
    """What is no weight, such as a table of decays, must be there as well."""
    options = {"model": "tiny", "vocab": 256, "decay": "alibi", "dtype": "float32"}
    ids = torch.tensor([list(TEXT[:50])])
    for family in FAMILIES:
        own = {**options, "family": family, "pattern": "L" if family == "tnl" else "LS"}
        (folder / "run.json").write_text(json.dumps({"options": own, "text": "", "tokenizer": "bytes"}))
        torch.manual_seed(0)
        expected = model_of(of_run(folder / "run.json")[0])
        with mock.patch.object(
            complete,
            "load_weights",
            lambda path, model, expected=expected: model.load_state_dict(expected.state_dict()),
        ):
            found = complete.load_model(
                folder / "step-000001",
                mock.Mock(load_state=None, tokenizer=None, dtype=None, eos_token_id=None),
                torch.device("cpu"),
            )[0]
        with torch.no_grad():
            assert torch.equal(found(ids), expected(ids)), family


def test_the_model_of_every_family_is_whole(tmp_path):
    run_ranks(1, _built_without_weights, tmp_path)


def test_prompts_from_elsewhere(done, tmp_path):
    """A file, a file of tokens, a pipe; and bytes that are no text."""
    data = b"\xff\xfe" + PROMPT.encode()
    (tmp_path / "file").write_bytes(data)
    write_tokens(tmp_path / "x.bin", [np.frombuffer(data, np.uint8)], vocab=256, tokenizer="bytes")
    ids = lasp.generate(_trained(done), list(data), max_new_tokens=20, **DRAWN).ids[0].tolist()
    few = ["--max-new-tokens=20", *_as_options(**DRAWN)]
    for world in (1, 2):
        for more, piped in (
            (f"--file={tmp_path / 'file'}", b""),
            (f"--file={tmp_path / 'x.bin'}", b""),
            ("--step=2", data),
        ):
            found = run_ranks(world, _with_pipe, piped, done, *few, more)
            assert [x[:2] for x in found] == [(0, _text(ids)), (0, "")][:world], found


def test_a_prompt_in_parts(done, tmp_path):
    """As a bar of progress has them, which are far longer; those of one rank and of two."""
    (tmp_path / "file").write_bytes(TEXT[:333])
    ids = lasp.generate(_trained(done), list(TEXT[:333]), max_new_tokens=20, **DRAWN).ids[0].tolist()
    few = ["--max-new-tokens=20", *_as_options(**DRAWN)]
    for world in (1, 2):
        found = run_ranks(world, _in_parts, done, f"--file={tmp_path / 'file'}", *few)
        assert [x[:2] for x in found] == [(0, _text(ids)), (0, "")][:world], found


def _in_parts(*arguments):
    with mock.patch.object(_turns, "PART", 100):
        return _complete(*arguments)


def test_where_the_text_ends(done):
    ids = _generated(_trained(done), PROMPT, max_new_tokens=40, do_sample=True, seed=3)
    end = ids[11]
    arguments = [f"--prompt={PROMPT}", "--max-new-tokens=40", "--do-sample", "--seed=3"]
    expected = _text(ids[: ids.index(end) + 1])
    assert _on_one(done, *arguments, "--eos-token-id=300", f"--eos-token-id={end}")[:2] == (0, expected)
    place, stop = next((n, x) for n in range(40) if (x := bytes(y for y in ids[n : n + 2] if y < 128)) and len(x) == 2)
    assert 0 not in stop
    found = next(n for n in range(40) if ids[n : n + 2] == list(stop))
    assert found <= place
    assert _on_one(done, *arguments, f"--stop={stop.decode()}")[:2] == (0, _text(ids[: found + 2]))


def test_another_seed_each_time(done):
    arguments = [done, f"--prompt={PROMPT}", "--max-new-tokens=40", "--do-sample"]
    first, second = _on_one(*arguments), _on_one(*arguments)
    assert first[1] != second[1]
    seed = first[2].split("seed ")[1].split(";")[0]
    assert _on_one(*arguments, f"--seed={seed}")[1] == first[1]


# Tokenizers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of pairs of bytes, so that most characters beyond ASCII are several tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator([TEXT.decode()], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    found.save(str(path))
    return path


def test_a_run_on_tokens(tokenizer, tmp_path):
    words = words_of(str(tokenizer))
    write_tokens(tmp_path / "x.bin", [words.encode(TEXT)], vocab=words.vocab, tokenizer=str(tokenizer))
    run = tmp_path / "out"
    _assert_on_all(2, 0, [], _small(tmp_path / "x.bin", run, "--vocab=300", "--lr=0.01"))
    assert read_object(run / "run.json")["tokenizer"] == str(tokenizer)
    prompt = words.encode(PROMPT.encode()).tolist()
    ids = lasp.generate(_trained(run), prompt, max_new_tokens=40, **DRAWN).ids[0].tolist()
    few = ["--max-new-tokens=40", *_as_options(**DRAWN)]
    assert _on_one(run, f"--prompt={PROMPT}", *few)[:2] == (0, words.decode(ids))
    (tmp_path / "latin").write_bytes(b"\xff")
    code, _, error = _on_one(run, f"--file={tmp_path / 'latin'}", *few)
    assert (code, f"{tmp_path / 'latin'} is no UTF-8 text" in error) == (1, True), error
    about = read_object(run / "run.json")
    for noted, more, words_of_error in (
        ("/nowhere/tokenizer.json", [], "/nowhere/tokenizer.json is no file (which"),
        ("/nowhere/tokenizer.json", ["--tokenizer=/elsewhere.json"], "/elsewhere.json is no file"),
        (None, [], "does not say who made the tokens: --tokenizer bytes, or"),
    ):
        (run / "run.json").write_text(json.dumps({**about, "tokenizer": noted}))
        code, _, error = _on_one(run, f"--prompt={PROMPT}", *few, *more)
        assert (code, words_of_error in error) == (1, True), error
    found = _on_one(run, f"--prompt={PROMPT}", *few, f"--tokenizer={tokenizer}")
    assert found[:2] == (0, words.decode(ids))


@pytest.mark.parametrize("text", ["größe €5 😀😀!", "plain", "a\ufffdb", "x" * 500 + "ü" * 300])
def test_no_part_of_a_character_is_shown(tokenizer, text):
    """Neither of bytes, nor of tokens of a tokenizer."""
    for words in (words_of("bytes"), words_of(str(tokenizer))):
        shown = Shown(words)
        pieces = [shown.add(token) for token in words.encode(text.encode()).tolist()]
        assert "".join([*pieces, shown.end()]) == text
        assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)
        held = len(pieces) - sum(map(bool, pieces))
        assert (held > 0) == (not text.isascii())


@pytest.mark.parametrize(
    "data", [b"a\xffb", b"\xe2\x82", b"\xf0\x9f\x98" * 40 + b"\x80!", b"\xc3(\xa0\xa1\xff\xff\xff\xff.", b"\x80"]
)
def test_bytes_that_are_no_text_are_shown_as_such(data):
    shown = Shown(words_of("bytes"))
    pieces = [shown.add(token) for token in data]
    assert "".join([*pieces, shown.end()]) == data.decode(errors="replace")
    assert shown.add(65) == "A"  # nothing is left of what was before


def test_what_stands_before_a_token_may_change_how_it_reads():
    """Such a decoder leaves out the space before the first token of all, and decodes few again and again."""
    most = []

    def decode(ids):
        most.append(len(ids))
        return " ".join(f"w{token}" for token in ids)

    shown = Shown(Words(1000, lambda text: np.empty(0), decode))
    assert "".join(shown.add(token) for token in range(1000)) == " ".join(f"w{token}" for token in range(1000))
    assert max(most) < 100


# States


def test_it_goes_on_tomorrow(done, tmp_path):
    """With the tokens that one run would have had; from the state's own checkpoint, though there is a newer one."""
    run, file = shutil.copytree(done, tmp_path / "run"), tmp_path / "state.safetensors"
    drawn = _as_options(**DRAWN)
    ids = _generated(_trained(run, 1), PROMPT, max_new_tokens=40, **DRAWN)
    first = _on_one(run, "--step=1", f"--prompt={PROMPT}", f"--save-state={file}", "--max-new-tokens=15", *drawn)
    assert first[:2] == (0, _text(ids[:15])), first
    assert f"[the state of 27 tokens is in {file}]" in first[2]
    loaded = lasp.InferenceState.load(file)
    assert loaded.lengths == (27,)
    same = ["--load-state", file, "--save-state", file]
    second = _on_one(*same, "--max-new-tokens=10", *drawn)
    assert second[:2] == (0, _text(ids[15:25])), second
    assert "[context 37 tokens; 10 new in " in second[2]
    third = _on_one(run, "--step=1", "--load-state", file, "--max-new-tokens=15", *drawn)
    assert third[:2] == (0, _text(ids[25:])), third
    more = ["--load-state", file, "--prompt=abc", "--max-new-tokens=9", *drawn]
    with_more = _on_one(*more)
    state = lasp.prefill(_trained(run, 1), [*PROMPT.encode(), *ids[:25]])
    expected = lasp.generate(_trained(run, 1), list(b"abc"), state=state, max_new_tokens=9, **DRAWN).ids[0].tolist()
    assert with_more[:2] == (0, _text(expected)), with_more
    assert [x[:2] for x in run_ranks(2, _complete, *more)] == [(0, _text(expected)), (0, "")]


@pytest.fixture
def saved(done, tmp_path):
    """A copy of the run, and a state of it."""
    run, file = shutil.copytree(done, tmp_path / "run"), tmp_path / "state.safetensors"
    code, _, error = _on_one(run, f"--prompt={PROMPT}", f"--save-state={file}", "--max-new-tokens=2")
    assert code == 0, error
    return run, file


def test_a_state_that_is_none(saved, tmp_path):
    run, file = saved
    load = ["--load-state", file]

    def refused(*arguments):
        found = [run_ranks(1, _complete, *arguments), run_ranks(2, _complete, *arguments, "--prompt=a")]
        assert [x[:2] for ranks in found for x in ranks] == [(1, "")] * 3, found
        assert found[1][0][2].removeprefix("rank 0: ") == found[0][0][2]
        assert found[1][1][2] == ""
        return found[0][0][2]

    assert f"{file} is a state of {run / 'step-000002'}, and {run / 'step-000001'} has other weights" in refused(
        run, "--step=1", *load
    )
    assert f"--dtype is bfloat16, and {file} a state of the model in float32" in refused(*load, "--dtype=bfloat16")
    data, about = bytearray(file.read_bytes()), Path(f"{file}.json")
    data[-1] ^= 1
    file.write_bytes(data)
    assert f"{file} is no state to go on from: path must be a file as InferenceState.save wrote it" in refused(*load)
    file.write_bytes(data[:100])
    assert f"{file} is no state to go on from" in refused(*load)
    told = about.read_text()
    about.write_text("{}")
    assert f"{about} is not what --save-state writes" in refused(*load)
    about.unlink()
    assert f"{about} cannot be read: No such file" in refused(*load)
    about.write_text(told)
    shutil.move(run, tmp_path / "moved")
    assert f"{run / 'step-000002'}, of which {file} is a state, is no folder" in refused(*load)


def _with_little_room(*arguments):
    with _largest_file(1000):
        return _complete(*arguments)


def test_a_state_that_cannot_be_written(saved, tmp_path):
    """What was there of an earlier one is not taken for this one's."""
    run, file = saved
    more = (run, f"--prompt={PROMPT}", "--max-new-tokens=2")
    [(code, out, error)] = run_ranks(1, _with_little_room, *more, f"--save-state={tmp_path / 'new'}")
    assert (code, f"{tmp_path / 'new'} cannot be written: File too large" in error) == (1, True), error
    assert out
    assert not list(tmp_path.glob("*new*"))
    [(code, _, error)] = run_ranks(1, _with_little_room, f"--load-state={file}", f"--save-state={file}")
    assert (code, f"{file} cannot be written: File too large" in error) == (1, True), error
    assert _on_one("--max-new-tokens=1", f"--load-state={file}")[0] == 0  # goes on from what was there before
    for path, words in ((file, f"{file} exists"), (tmp_path / "no" / "x", f"{tmp_path / 'no'} is no folder")):
        code, out, error = _complete(*more, f"--save-state={path}")
        assert (code, out, "Invalid value for --save-state" in error, words in error) == (2, "", True, True), error


# Line by line


def test_each_line_goes_on_from_the_state_of_before(done, tmp_path):
    model, file = _trained(done), tmp_path / "state"
    first = lasp.generate(model, list(b"abc"), max_new_tokens=9, **DRAWN)
    second = lasp.generate(model, None, state=first.state, max_new_tokens=9, **DRAWN)
    third = lasp.generate(model, list(b"\xff xyz"), state=second.state, max_new_tokens=9, **DRAWN)
    answers = [_text(x.ids[0].tolist()) for x in (first, second, third)]
    lines = ["--interactive", "--max-new-tokens=9", *_as_options(**DRAWN)]
    code, out, error = _on_one(done, *lines, f"--save-state={file}", piped=b"\nabc\n\n\xff xyz\n")
    assert (code, out) == (0, "".join(answers)), error
    assert [f"[context {n} tokens; " in error for n in (12, 21, 35)] == [True] * 3, error
    assert lasp.InferenceState.load(file).lengths == (35,)
    found = run_ranks(2, _with_pipe, b"\n\xff xyz\n", done, "--prompt=abc", *lines)  # only the first is split
    assert [x[:2] for x in found] == [(0, "".join(answers)), (0, "")], found
    code, out, error = _on_one(f"--load-state={file}", "--interactive", piped=b"")
    assert (code, out) == (0, ""), error


def _interrupted(*arguments, piped=b"\xff\n"):
    """Ctrl-C behind the third token."""
    real = lasp.stream_tokens

    def stream(*args, **options):
        found = real(*args, **options)

        class Interrupting:
            def __iter__(self):
                for number, tokens in enumerate(found):
                    if number == 2:
                        os.kill(os.getpid(), signal.SIGINT)
                    yield tokens

            def result(self):
                return found.result()

        return Interrupting()

    before = signal.getsignal(signal.SIGINT)
    with mock.patch.object(lasp, "stream_tokens", stream):
        found = _complete(*arguments, piped=piped)
    assert signal.getsignal(signal.SIGINT) is before
    return found


def test_a_text_that_is_broken_off(done, tmp_path):
    file, ids = tmp_path / "state", _generated(_trained(done), PROMPT, max_new_tokens=9, **DRAWN)
    drawn = _as_options(**DRAWN)
    [(code, out, error)] = run_ranks(1, _interrupted, done, f"--prompt={PROMPT}", f"--save-state={file}", *drawn)
    assert (code, out) == (0, _text(ids[:3])), error
    assert "; 3 new in " in error
    code, out, error = _on_one(f"--load-state={file}", "--max-new-tokens=6", *drawn)
    assert (code, out) == (0, _text(ids[3:])), error


def _interrupted_under_a_launcher(*arguments):
    with mock.patch.object(complete, "started_by_a_launcher", return_value=True):
        return _interrupted(*arguments, piped=b"more\n\n\n")


def test_a_launcher_that_had_the_interrupt_too_is_not_kept_waiting(done, tmp_path):
    """It kills who does not end; at a terminal the next line is asked for."""
    file = tmp_path / "state"
    for run, tokens in ((_interrupted_under_a_launcher, 4), (_interrupted, 8)):
        more = [done, "--prompt=a", "--interactive", "--max-new-tokens=9", f"--save-state={file}"]
        [(code, _, error)] = run_ranks(1, run, *more)
        assert (code, lasp.InferenceState.load(file).lengths) == (0, (tokens,)), error
        file.unlink()


def test_the_second_interrupt_ends_all():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
    try:
        with _turns.interrupts() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


class _Terminal:
    def __init__(self):
        self.texts = []

    def isatty(self):
        return True

    def write(self, text):
        self.texts.append(text)

    def flush(self):
        self.texts.append(None)


def test_a_terminal_gets_each_token_at_once_and_no_commands(monkeypatch):
    """The model's tokens are the byte ESC and others; what a terminal would do with these is not done."""
    model = lasp.models.TNL(lasp.models.TNLConfig.named("tiny", vocab_size=256))
    tokens = [27, *b"[2Jx\n", 0xC2, 0x9B, 7, *"ü".encode()]
    stream = mock.MagicMock()
    stream.__iter__.return_value = ([token] for token in tokens)
    stream.result.return_value = lasp.generate(model, [1], max_new_tokens=len(tokens))
    terminal = _Terminal()
    monkeypatch.setattr(lasp, "stream_tokens", lambda *args, **options: stream)
    monkeypatch.setattr(sys, "stdout", terminal)
    _turns.Turns(model, words_of("bytes"), None, do_sample=False).write()
    expected = ["\u241b", "[", "2", "J", "x", "\n", "", "\ufffd", "\u2407", "", "ü", "\n"]
    assert terminal.texts == [y for x in expected for y in (x, None)]


# Errors


def _folder_of_runs(done, folder, *names):
    for number, name in enumerate(names):
        shutil.copytree(done, folder / "runs" / name)
        os.utime(folder / "runs" / name / "LATEST", (1000 * number, 1000 * number))


def _in_folder(folder, *arguments):
    os.chdir(folder)
    try:
        return _complete(*arguments)
    finally:
        os.chdir(ROOT)


def test_the_newest_run(done, tmp_path):
    few = ("--prompt=a", "--max-new-tokens=1")
    for world in (1, 2):
        found = run_ranks(world, _in_folder, tmp_path, *few)
        said = f"{tmp_path / 'runs'} has no run with a checkpoint: train a model first, a small one in some"
        assert [(x[0], said in x[2]) for x in found] == [(1, True), (1, False)][:world], found
    [(code, _, error)] = run_ranks(1, _in_folder, tmp_path, *few, "--ranks=2")  # in place of a traceback of torchrun's
    assert (code, said in error) == (1, True), error
    _folder_of_runs(done, tmp_path, "z", "a", "m")
    (tmp_path / "runs" / "recall" / "without").mkdir(parents=True)
    os.utime(tmp_path / "runs" / "a" / "LATEST", (9000, 9000))
    (tmp_path / "runs" / "a" / "LATEST").write_text("step-000007")
    os.utime(tmp_path / "runs" / "a" / "LATEST", (9000, 9000))
    [(code, _, error)] = run_ranks(1, _in_folder, tmp_path, *few)
    assert (code, "runs/a/step-000007 is no folder, though LATEST names it" in error) == (1, True), error


@pytest.mark.parametrize(("change", "words"), [
    ("a byte", "its SHA-256 is not that of SHA256SUMS"),
    ("no LATEST", "has no checkpoint yet: train a model first"),
    ("no run.json", "run.json cannot be read: No such file"),
    ("no options", "run.json is not what a run writes: KeyError: 'options'"),
    ("another vocabulary", "model.embedding.weight has 301 rows, in this run it is [302, 128]"),
])  # fmt: skip
def test_a_checkpoint_that_is_none(done, tmp_path, change, words):
    run = shutil.copytree(done, tmp_path / "copy")
    shard = sorted((run / "step-000002").glob("*.safetensors"))[-1]
    about, data = read_object(run / "run.json"), bytearray(shard.read_bytes())
    if change == "a byte":
        data[-1] ^= 1
        shard.write_bytes(data)
    elif change == "another vocabulary":
        about["options"]["vocab"] = 302
    elif change == "no options":
        del about["options"]
    (run / "run.json").write_text(json.dumps(about))
    if change.startswith("no ") and change != "no options":
        (run / change.removeprefix("no ")).unlink()
    for world in (1, 2):
        found = run_ranks(world, _complete, run, "--prompt=a")
        assert [(x[0], x[1], words in x[2]) for x in found] == [(1, "", True), (1, "", False)][:world], found


def test_prompts_that_are_none(done, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    write_tokens(tmp_path / "x.bin", [np.array([5, 300, 400])], vocab=401, tokenizer="bytes")
    outside = f"{tmp_path / 'x.bin'} has token 400 at 2, and the model knows 301, 0 to 300: it was trained on tokens of"
    for arguments, words in (
        ([f"--file={tmp_path / 'empty'}"], f"{tmp_path / 'empty'} has no tokens"),
        ([f"--file={tmp_path / 'x.bin'}"], outside),
        (["--prompt=a", "--eos-token-id=301"], "--eos-token-id 301 is none of the model's 301 tokens, 0 to 300"),
    ):
        for world in (1, 2):
            found = run_ranks(world, _complete, done, *arguments)
            assert [(x[0], x[1], words in x[2]) for x in found] == [(1, "", True), (1, "", False)][:world], found
    [(code, out, error)] = run_ranks(1, _complete, done)
    assert (code, out, "standard input is empty" in error) == (1, "", True), error
    found = run_ranks(2, _complete, done)
    said = "several ranks share a prompt, and there is none: --prompt, --file, or standard input"
    assert [(x[0], x[1], said in x[2]) for x in found] == [(1, "", True), (1, "", False)], found


def test_a_line_that_is_no_prompt(tokenizer):
    """It is said, and the next one is asked for."""
    model = lasp.models.TNL(lasp.models.TNLConfig.named("tiny", vocab_size=200))
    turns, said = _turns.Turns(model, words_of(str(tokenizer)), None, max_new_tokens=2, do_sample=False), []
    lines = iter(["ÿ€", "\udcff"])
    with (
        mock.patch("builtins.input", side_effect=lambda prompt: next(lines, None) or _end()),
        mock.patch("builtins.print", side_effect=lambda *x, **options: said.extend(x)),
    ):
        complete.talk(turns, 100)
    assert [("the line has token" in x, "the line is no UTF-8 text" in x) for x in said[1:]] == [
        (True, False),
        (False, True),
    ], said
    assert turns.state is None


def _end():
    raise EOFError


@pytest.mark.parametrize(("arguments", "option", "words"), [
    (["--prompt="], "--prompt", "is empty"),
    (["--prompt=a", f"--file={__file__}"], "--file", "is a prompt, and so is --prompt"),
    (["--prompt=a", "--temperature=2"], "--temperature", "is for --do-sample"),
    (["--prompt=a", "--top-k=2"], "--top-k", "is for --do-sample"),
    (["--prompt=a", "--top-p=0.5"], "--top-p", "is for --do-sample"),
    (["--prompt=a", "--seed=2"], "--seed", "is for --do-sample"),
    (["--prompt=a", "--do-sample", "--top-p=1.5"], "top_p must be in (0, 1], got 1.5", ""),
    (["--prompt=a", "--do-sample", "--temperature=0"], "temperature must be", ""),
    (["--prompt=a", "--repetition-penalty=-1"], "repetition_penalty must be", ""),
    (["--prompt=a", "--stop="], "--stop", "is empty"),
    (["--prompt=a", "--max-new-tokens=0"], "'--max-new-tokens'", ""),
    (["--prompt=a", "--segment=0"], "'--segment'", ""),
    (['--prompt=a', '--do-sample', f'--seed={2**70}'], "'--seed'", ""),
    (['--prompt=a', f'--segment={2**70}'], "'--segment'", ""),
    (['--prompt=a', f'--max-new-tokens={2**70}'], "'--max-new-tokens'", ""),
    (["--prompt=a", "--load-state=/nowhere"], "'--load-state'", "does not exist"),
    (["/nowhere", "--prompt=a"], "", "'/nowhere' does not exist"),
])  # fmt: skip
def test_options_that_do_not_fit(arguments, option, words):
    with mock.patch.object(complete, "complete", side_effect=AssertionError("it begins")):
        code, out, error = _complete(*arguments)
    assert (code, out, "Invalid value" in error, option in error, words in error) == (2, "", True, True, True), error


# As a script


def test_it_runs_from_another_folder_on_ranks_that_it_starts(done, tmp_path):
    """And takes the newest checkpoint there; only lasp need be found."""
    shutil.copytree(done, tmp_path / "runs" / "tnl-1")
    script = ROOT / "examples" / "complete.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, "--ranks=2", "--max-new-tokens=20"]
    found = subprocess.run(command, cwd=tmp_path, env=env, input=PROMPT.encode(), capture_output=True, timeout=110)
    error = found.stderr.decode()
    ids = _generated(_trained(done), PROMPT, max_new_tokens=20)
    assert (found.returncode, found.stdout.decode()) == (0, _text(ids)), error
    assert "[context 32 tokens; prompt 12 tokens in " in error


OTHERS = f"""
import os, runpy, sys
os.chdir(os.environ["FOLDER"])
script = os.path.join({str(ROOT / "examples")!r}, os.environ["NAME"] + ".py")
# As Python finds what is beside a script, and nothing else of this folder but lasp.
sys.path[:] = [os.path.dirname(script), {str(ROOT)!r}, {str(ROOT / "kernels")!r}] + [
    path for path in sys.path if path and os.path.dirname(path) != {str(ROOT)!r}
]
sys.argv = [script, "--help"]
runpy.run_path(script, run_name="__main__")
"""


def test_the_other_examples_are_found_from_another_folder(tmp_path):
    names = ["train", "export", "prepare", "recall"]
    for name, found in zip(names, run_processes(OTHERS, [{"NAME": name, "FOLDER": str(tmp_path)} for name in names])):
        code, out, error = found
        assert (code, "Usage" in out) == (0, True), (name, error)
    assert not list(tmp_path.iterdir())
