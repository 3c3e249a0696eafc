"""One file of weights from a checkpoint of several ranks, loaded as the docstring of export.py says."""

import json
import re
import shutil

import export
import pytest
import torch
from _files import read_object
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from test_checkpoint import _sign
from test_train import TEXT, _assert_on_all, _largest_file, _small, _state
from typer.testing import CliRunner

from lasp.models import TNL, TNLConfig


def _export(*arguments):
    """Exit code, and what was printed."""
    wide = {"COLUMNS": "1000", "TERMINAL_WIDTH": "1000", "NO_COLOR": "1"}
    result = CliRunner().invoke(export.app, [str(x) for x in arguments], env=wide)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of two ranks whose weights lie on both, of another vocabulary and decay than the usual ones."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "text").write_bytes(TEXT)
    more = ("--parallel=fsdp2", "--vocab=301", "--decay=tnl", "--recompute=all")
    _assert_on_all(2, 0, [], _small(folder / "text", folder / "out", *more))
    return folder / "out"


def _as_the_docstring_says(folder):
    code = "\n".join(
        line[4:] for line in export.__doc__.splitlines() if line.startswith("    ") and "python" not in line
    )
    assert "assign=True" in code
    found = {}
    exec(re.sub(r'"weights\.(\w+)"', rf'"{folder}/weights.\1"', code), found)
    return found["model"]


def _logits(model):
    with torch.no_grad():
        return model(torch.tensor([list(TEXT[:77])]))


@pytest.mark.parametrize("step", [None, 1])
def test_the_logits_are_those_of_the_run(done, tmp_path, step):
    more = [] if step is None else [f"--step={step}"]
    [(code, said)] = run_ranks(1, _export, done, tmp_path / "weights.safetensors", *more)
    assert code == 0, said
    assert f"step-00000{step or 2}; " in said
    model = _as_the_docstring_says(tmp_path)
    assert model.config == TNLConfig.named("tiny", vocab_size=301, decay="tnl")
    found, whole = load_file(tmp_path / "weights.safetensors"), _state(done, step)[0]
    assert found.keys() == {x.removeprefix("model.") for x in whole if x.startswith("model.")}
    trained = TNL(model.config)
    trained.load_state_dict({name: whole[f"model.{name}"] for name in found})
    assert torch.equal(_logits(model), _logits(trained))
    about = read_object(tmp_path / "weights.json")
    assert about["checkpoint"] == f"step-00000{step or 2}"
    assert about["text"] == read_object(done / "run.json")["text"]
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_is_there_is_kept(done, tmp_path):
    for name in ("weights.safetensors", "weights.json"):
        (tmp_path / name).write_text("kept")
        code, said = _export(done, tmp_path / "weights.safetensors")
        assert (code, f"{tmp_path / name} exists" in said) == (2, True), said
        assert (tmp_path / name).read_text() == "kept"
        (tmp_path / name).unlink()
    code, said = _export(done, tmp_path / "weights.bin")
    assert (code, "must be named *.safetensors" in said) == (2, True), said


@pytest.mark.parametrize(("change", "words"), [
    ("a byte", "its SHA-256 is not that of SHA256SUMS"),
    ("another vocabulary", "model.embedding.weight has 301 rows, in this run it is [302, 128]"),
    ("no options", "run.json is not what a run writes: KeyError: 'options'"),
    ("NaN", "is no checkpoint to go on with: NaN or Inf in model."),
    ("no step", "step-000007 is no folder"),
])  # fmt: skip
def test_a_run_that_is_none(done, tmp_path, change, words):
    folder = shutil.copytree(done, tmp_path / "copy")
    shard = sorted((folder / "step-000002").glob("*.safetensors"))[-1]
    about, data = read_object(folder / "run.json"), bytearray(shard.read_bytes())
    if change == "a byte":
        data[-1] ^= 1
    elif change == "NaN":  # in all numbers of the file
        length = int.from_bytes(data[:8], "little") + 8
        data[length:] = b"\xff" * (len(data) - length)
    elif change == "another vocabulary":
        about["options"]["vocab"] = 302
    elif change == "no options":
        del about["options"]
    shard.write_bytes(data)
    (folder / "run.json").write_text(json.dumps(about))
    if change == "NaN":
        _sign(shard.parent)
    more = ["--step=7"] if change == "no step" else []
    [(code, said)] = run_ranks(1, _export, folder, tmp_path / "weights.safetensors", *more)
    assert (code, words in said) == (1, True), said
    assert sorted(x.name for x in tmp_path.iterdir()) == ["copy"]


def _with_little_room(*arguments):
    with _largest_file(100_000):
        return _export(*arguments)


def test_a_full_disk(done, tmp_path):
    [(code, said)] = run_ranks(1, _with_little_room, done, tmp_path / "weights.safetensors")
    assert (code, f"{tmp_path / 'weights.safetensors'} cannot be written: " in said) == (1, True), said
    assert "File too large" in said
    assert not list(tmp_path.iterdir())
