"""Files of tokens: what prepare.py writes, what is refused, and that a rank reads its own slice alone."""

import hashlib
import json
import os
from unittest import mock

import _words
import numpy as np
import prepare
import pytest
import torch
from _files import FileError, NotWritten
from _text import Text, batch_of_step, open_text, slice_of_step
from _tokens import BLOCK, BLOCKS, open_tokens, write_tokens
from ranks import mesh_of, run_ranks
from test_train import TEXT, _assert_on_all, _assert_same_state, _call, _largest_file, _losses, _small
from typer.testing import CliRunner

import lasp

NOTED = {"vocab": 70_000, "sha256": "x", "entropy": 1.0}


def _prepare(*arguments):
    """Exit code, and what was printed."""
    wide = {"COLUMNS": "1000", "TERMINAL_WIDTH": "1000", "NO_COLOR": "1"}
    result = CliRunner().invoke(prepare.app, [str(x) for x in arguments], env=wide)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_bytes(TEXT)
    (folder / "deep" / "b.txt").write_bytes("größer\n".encode() * 3)
    (folder / "deep" / "c.bin").write_bytes(b"\0" * 100)  # no text
    return folder


def test_bytes(texts, tmp_path):
    out = tmp_path / "new" / "x.bin"
    with mock.patch.object(prepare, "PIECE", 50):
        code, said = _prepare(texts, out)
    whole = TEXT + "größer\n".encode() * 3
    assert (code, out.read_bytes()) == (0, whole), said
    assert f"{len(whole):,} tokens (uint8) of 2 files; --vocab 256 or more" in said
    noted = json.loads(out.with_name("x.bin.json").read_text())
    assert noted["sha256"] == hashlib.sha256(whole).hexdigest()
    assert (noted["tokens"], noted["vocab"], noted["tokenizer"]) == (len(whole), 256, "bytes")
    text, as_bytes = open_text(out), open_text(texts)
    assert isinstance(text.ids, np.memmap)
    assert (text.digest, text.vocab, len(text)) == (as_bytes.digest, 256, len(as_bytes))
    assert text.entropy == pytest.approx(as_bytes.entropy, rel=1e-12)
    assert (text.unit, as_bytes.unit) == ("token", "byte")
    code, said = _prepare(texts, out)
    assert (code, f"{out} exists" in said) == (2, True)


def test_separators(texts, tmp_path):
    code, said = _prepare(texts, tmp_path / "x.bin", "--separator=256")
    assert (code, "(uint16) of 2 files; --vocab 257 or more" in said) == (0, True), said
    ids = np.fromfile(tmp_path / "x.bin", "<u2")
    assert np.flatnonzero(ids == 256).tolist() == [len(TEXT), len(ids) - 1]
    assert bytes(ids[: len(TEXT)].tolist()) == TEXT


def test_a_file_of_tokens_is_never_read_as_text(texts, tmp_path):
    """Its bytes have the same SHA-256, with which a run would go on."""
    code, said = _prepare(texts, tmp_path / "corpus.tokens")
    assert (code, "must be named *.bin" in said) == (2, True), said
    assert not list(tmp_path.glob("corpus*"))


def _tokenizer(path):
    """Words apart, of which there are more than 256."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, **{word: 300 + n for n, word in enumerate(sorted(set(TEXT.decode().split())))}}
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    found.save(str(path))
    return words


def test_a_tokenizer_of_hugging_face(texts, tmp_path):
    words = _tokenizer(tmp_path / "tokenizer.json")
    with mock.patch.object(prepare, "PIECE", 50):
        code, said = _prepare(texts, tmp_path / "x.bin", f"--tokenizer={tmp_path / 'tokenizer.json'}")
    assert code == 0, said
    ids, noted = open_tokens(tmp_path / "x.bin")
    assert ids.tolist() == [*(words[word] for word in TEXT.decode().split()), 0, 0, 0]
    assert (noted["vocab"], noted["dtype"]) == (max(words.values()) + 1, "uint16")
    (tmp_path / "model").mkdir()
    (tmp_path / "tokenizer.json").rename(tmp_path / "model" / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    pytest.importorskip("transformers")
    code, said = _prepare(texts, tmp_path / "y.bin", f"--tokenizer={tmp_path / 'model'}")
    assert code == 0, said
    assert (tmp_path / "y.bin").read_bytes() == (tmp_path / "x.bin").read_bytes()


@pytest.mark.parametrize(("library", "name"), [("tokenizers", "texts/a.txt"), ("transformers", "texts")])
def test_tokenizers_that_are_none(texts, tmp_path, library, name):
    pytest.importorskip(library)
    code, said = _prepare(texts, tmp_path / "x.bin", f"--tokenizer={tmp_path / name}")
    assert (code, f"{tmp_path / name} is no tokenizer" in said) == (2, True), said
    assert not list(tmp_path.glob("x.bin*"))


def test_a_tokenizer_whose_library_is_not_there(texts, tmp_path):
    for name, library in ((texts / "a.txt", "tokenizers"), (texts, "transformers")):
        with mock.patch.object(_words.importlib.util, "find_spec", return_value=None):
            code, said = _prepare(texts, tmp_path / "x.bin", f"--tokenizer={name}")
        assert (code, f"needs {library}, which is not installed: pip install {library}" in said) == (2, True), said
    assert not list(tmp_path.glob("x.bin*"))


def test_what_is_no_text_for_a_tokenizer(texts, tmp_path):
    _tokenizer(tmp_path / "tokenizer.json")
    (texts / "a.txt").write_bytes(b"\xff\xfe")
    code, said = _prepare(texts, tmp_path / "x.bin", f"--tokenizer={tmp_path / 'tokenizer.json'}")
    assert (code, f"{texts / 'a.txt'} is no UTF-8 text" in said) == (1, True), said
    assert not list(tmp_path.glob("x.bin*"))


def test_a_full_disk(texts, tmp_path):
    with _largest_file(1000):
        code, said = _prepare(texts, tmp_path / "x.bin")
    assert (code, f"{tmp_path / 'x.bin'} cannot be written: File too large" in said) == (1, True), said
    assert not list(tmp_path.glob("x.bin*"))
    with pytest.raises(NotWritten), mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        write_tokens(tmp_path / "x.bin", [np.arange(5)], vocab=5, tokenizer="own")
    assert not list(tmp_path.glob("x.bin*"))


@pytest.mark.parametrize(("vocab", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_smallest_dtype_that_holds_all_words(tmp_path, vocab, dtype):
    pieces = [np.array([0, vocab - 1]), np.array([], np.int64), np.array([7])]
    noted = write_tokens(tmp_path / "x", pieces, vocab=vocab, tokenizer="own")
    ids, found = open_tokens(tmp_path / "x")
    assert (found, ids.tolist(), noted["dtype"], ids.dtype.name) == (noted, [0, vocab - 1, 7], dtype, dtype)
    assert noted["entropy"] == pytest.approx(np.log(3))
    for wrong in (vocab, -1):
        with pytest.raises(ValueError, match=f"the tokenizer own gave {wrong}, though it has {vocab} words"):
            write_tokens(tmp_path / "y", [np.array([wrong])], vocab=vocab, tokenizer="own")
    assert not list(tmp_path.glob("y*"))


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "x.bin"
    write_tokens(path, [np.arange(300_000) % 60_000], vocab=60_000, tokenizer="own")
    return path


def _changed(path, **noted):
    file = path.with_name("x.bin.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **noted}))


@pytest.mark.parametrize("noted", [
    {"dtype": "float64"}, {"dtype": None}, {"tokens": "300000"}, {"vocab": 0.5}, {"tokens": True}, {"sample": None},
    {"tokens": 299_999}, {"dtype": "uint8"}, {"sample": "0" * 64},
])  # fmt: skip
def test_what_is_noted_and_not_true(tokens, noted):
    _changed(tokens, **noted)
    with pytest.raises(FileError, match=r"x\.bin"):
        open_text(tokens)


def test_a_file_that_has_changed(tokens, tmp_path):
    data = tokens.read_bytes()
    blocks = [round((len(data) - BLOCK) * i / (BLOCKS - 1)) for i in range(BLOCKS)]
    for at in (0, blocks[31] + BLOCK // 2, len(data) - 1):
        tokens.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(FileError, match=r"x\.bin is not what x\.bin\.json was written for"):
            open_text(tokens)
    for other in (data[:-2], data + b"ab"):
        tokens.write_bytes(other)
        with pytest.raises(FileError, match=rf"x\.bin has {len(other):,} bytes, and not the 300,000 uint16"):
            open_text(tokens)
    tokens.with_name("x.bin.json").unlink()
    code, said = _call(["--ranks=1", f"--data={tokens}", f"--out={tmp_path / 'out'}"])
    assert (code, "Invalid value for --data" in said, "has no x.bin.json beside it" in said) == (2, True, True), said


def test_a_start_does_not_read_all(tmp_path):
    """256 GiB, of which the disk holds none: to read them takes minutes."""
    path, size = tmp_path / "x.bin", 2**38
    with path.open("wb") as file:
        file.truncate(size)
    sample = hashlib.sha256(bytes(BLOCKS * BLOCK)).hexdigest()
    noted = {"dtype": "uint32", "tokens": size // 4, "vocab": 5, "tokenizer": "own", "sample": sample} | NOTED
    path.with_name("x.bin.json").write_text(json.dumps(noted))
    text = open_text(path)
    assert (text.digest, len(text), text.entropy) == ("x", size // 4, 1.0)
    ids = batch_of_step(text, None, seed=0, step=0, batch=2, seq_len=7)
    assert ids.tolist() == [[0] * 7] * 2


def test_the_vocabulary_must_be_that_of_the_model(tokens, tmp_path):
    code, said = _call(["--ranks=1", f"--data={tokens}", f"--out={tmp_path / 'out'}", "--seq-len=33"])
    assert (code, "Invalid value for --vocab: 256 words are fewer than the 60000 of" in said) == (2, True), said


class Counted:
    """An array that notes what is read of it."""

    def __init__(self, ids):
        self.ids, self.read = ids, []

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, part):
        self.read.append(range(len(self))[part])
        return self.ids[part]


def _slices(seq_len, length, dp):
    mesh = mesh_of(dp_shard=dp, sp=-1)
    text = Text(Counted(np.random.default_rng(0).integers(0, 70_000, length).astype(np.uint32)), NOTED)
    drawn = {"seed": 3, "step": 5, "batch": 2 * dp, "seq_len": seq_len}
    found = slice_of_step(text, mesh, torch.device("cpu"), **drawn)
    parts, text.ids.read = text.ids.read, []
    expected = lasp.shard_batch({"input_ids": batch_of_step(text, mesh, **drawn)}, mesh)
    assert found.keys() == expected.keys()
    assert found["layout"] == expected["layout"]
    for name, x in expected.items():
        if name != "layout":
            assert found[name].dtype == x.dtype
            assert torch.equal(found[name], x), name
    assert sum(map(len, text.ids.read)) == 2 * seq_len
    if length >= seq_len:  # of each of the two sequences
        own = expected["input_ids"].shape[1]
        first, end = mesh["sp"].get_local_rank() * own, (mesh["sp"].get_local_rank() + 1) * own + 1
        assert parts == [range(x.start + first, x.start + min(end, seq_len)) for x in text.ids.read if first < seq_len]
    return sum(map(len, parts))


@pytest.mark.parametrize(("world", "dp"), [(1, 1), (2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize(("seq_len", "length"), [(101, 1000), (100, 100), (101, 37), (2, 5), (4, 3)])
def test_a_rank_reads_its_slice_alone(world, dp, seq_len, length):
    read = run_ranks(world, _slices, seq_len, length, dp)
    sp = world // dp
    assert sum(read) == dp * 2 * (seq_len + sum(1 for rank in range(1, sp) if rank * -(-seq_len // sp) < seq_len))


@pytest.mark.parametrize("more", [("--segment=20",), ()])
def test_a_run_on_tokens_is_that_on_the_text(texts, tmp_path, more):
    """Of bytes: the same losses and weights, streamed or from slices."""
    (texts / "deep" / "b.txt").unlink()
    assert _prepare(texts, tmp_path / "x.bin")[0] == 0
    _assert_on_all(2, 0, [], _small(texts, tmp_path / "text", *more))
    [(_, said), _] = _assert_on_all(2, 0, [], _small(tmp_path / "x.bin", tmp_path / "tokens", *more, "--verify"))
    assert "the same training" in said
    assert "bits) a token" in said
    assert _losses(tmp_path / "tokens") == _losses(tmp_path / "text")
    _assert_same_state(tmp_path / "tokens", tmp_path / "text")
    arguments = _small(tmp_path / "x.bin", tmp_path / "tokens", *more, "--resume")
    (tmp_path / "tokens" / "LATEST").write_text("step-000001")
    _assert_on_all(2, 0, [], arguments)
    assert _losses(tmp_path / "tokens") == _losses(tmp_path / "text")


@pytest.mark.parametrize(
    ("separator", "words"),
    [
        (2**32 - 1, "the counts of 4294967295 tokens take 63 GiB at least"),
        (99999999999999, "is none of the 4294967296"),
    ],
)
def test_a_separator_that_no_file_holds(tmp_path, separator, words):
    file = tmp_path / "a.txt"
    file.write_bytes(b"some text")
    with mock.patch.object(os, "sysconf", return_value=2**17):  # 16 GiB, in pages of 128 KiB
        code, said = _prepare(file, tmp_path / "x.bin", "--separator", separator)
    assert (code, "Invalid value for --separator" in said, words in said) == (2, True, True), said


def test_a_folder_without_text_is_refused(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(bytes(100))
    (folder / "empty.txt").write_bytes(b"")
    code, said = _prepare(folder, tmp_path / "x.bin")
    assert code == 2
    assert "pictures has no text" in said
    assert not (tmp_path / "x.bin").exists()
