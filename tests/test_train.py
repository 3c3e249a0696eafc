"""The command line of examples/train.py: what it refuses, resumes, and cannot write; the same on every rank."""

import contextlib
import functools
import hashlib
import json
import os
import resource
import shutil
from pathlib import Path
from unittest import mock

import _launch
import pytest
import torch
import torch.distributed as dist
import train
import typer
from _files import held
from _text import Text, open_text
from ranks import run_ranks
from safetensors.torch import load_file
from typer.testing import CliRunner

from lasp.models.sizes import SIZES

TEXT = Path(__file__).read_bytes()[:3000]


SMALLEST = (2, 64, 2, 96)  # a "tiny" model, for what takes many steps


def _call(arguments, tiny=SIZES["tiny"]):
    """Exit code, and what was printed; a traceback is an error of the test."""
    wide = {"COLUMNS": "1000", "TERMINAL_WIDTH": "1000", "NO_COLOR": "1"}
    with mock.patch.dict(SIZES, tiny=tiny):
        result = CliRunner().invoke(train.app, [str(x) for x in arguments], env=wide)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def _alone(*arguments):
    """As a user calls it; no rank starts."""
    with mock.patch.object(train, "relaunch", side_effect=AssertionError("ranks start")):
        return _call(["--ranks=2", *arguments])


def _on_ranks(arguments, of_rank=None, **options):
    """As each rank is called by a launcher; the process group outlives it, and so do the text and the options."""
    with (
        mock.patch.object(train, "started_by_a_launcher", return_value=True),
        mock.patch.object(dist, "destroy_process_group"),
    ):
        return _call([*arguments, *(of_rank or {}).get(dist.get_rank(), [])], **options)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes(TEXT)
    return folder


def _small(text, out, *more):
    sizes = ("--seq-len=33", "--batch=2", "--steps=2", "--save-every=1", "--dp=1")
    return [*sizes, f"--data={text}", f"--out={out}", *more]


HUGE = "99999999999999"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--lr", "-inf"),
        ("--lr", "0"),
        ("--lr", "-1"),
        ("--lr", "1e38"),
        ("--seed", str(2**64)),
        ("--seed", "-1"),
        ("--steps", "0"),
        ("--batch", "0"),
        *((option, HUGE) for option in ("--seq-len", "--batch", "--vocab", "--dp", "--sp", "--accumulate")),
        *((option, str(2**70)) for option in ("--seq-len", "--batch", "--vocab", "--segment", "--chunk")),
        ("--save-every", "-1"),
        ("--exchange", "pigeon"),
        ("--dp", "3"),
        ("--data", "/nowhere/at/all"),
    ],
)
def test_an_option_that_cannot_be(text, tmp_path, option, value):
    code, output = _alone(*_small(text, tmp_path / "out"), f"{option}={value}")
    assert code == 2
    named = {"--sp": "--dp", "--accumulate": "--batch"}.get(option, option)  # with the other in the message
    assert f"Invalid value for '{named}'" in output or f"Invalid value for {named}" in output
    assert value != HUGE or HUGE in output
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([f"--seq-len={HUGE}", "--repeat-text"], "--seq-len"),
        ([f"--seq-len={HUGE}", "--repeat-text", "--segment=8"], "--seq-len"),
        ([f"--batch={HUGE}", f"--accumulate={HUGE}"], "--batch"),
        (["--vocab=2000000000000"], "--vocab"),
    ],
)
def test_what_no_memory_holds(text, tmp_path, options, named):
    code, output = _alone(*_small(text, tmp_path / "out"), *options)
    assert (code, f"Invalid value for {named}: " in output, " GiB at least, and " in output) == (2, True, True), output


def test_more_processes_than_a_host_starts():
    with (
        mock.patch.object(os, "execv", side_effect=AssertionError("ranks start")),
        pytest.raises(typer.BadParameter, match=f"{HUGE} processes are more than the 1024") as refused,
    ):
        _launch.relaunch("train.py", int(HUGE))
    assert refused.value.param_hint == "--ranks"


def test_a_folder_for_results_that_cannot_be(text, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("kept")
    monkeypatch.chdir(tmp_path)
    inside = [text, text / "deep" / "er", "texts/out", tmp_path / "link" / "out", text / "a" / ".." / "b"]
    (tmp_path / "link").symlink_to(text)
    for out in [file, file / "out", "/proc/out", "/proc/self/out", *inside]:
        code, output = _alone(*_small(text, out))
        assert (code, "Invalid value for --out" in output, str(out) in output) == (2, True, True), output
    assert file.read_text() == "kept"
    assert [path.name for path in text.iterdir()] == ["a.txt"]
    (tmp_path / "runs").write_text("no folder")
    code, output = _alone("--seq-len=33", f"--data={text}")
    assert (code, "runs cannot be written" in output) == (2, True), output


def test_a_text_that_cannot_be_read(text, tmp_path):
    with mock.patch.object(Path, "read_bytes", side_effect=PermissionError(13, "Permission denied")):
        code, output = _alone(*_small(text, tmp_path / "out"))
    assert (code, "Invalid value for --data" in output, "Permission denied" in output) == (2, True, True), output


def _assert_on_all(world, code, words, arguments, of_rank=None, prints=None, **options):
    """The same exit code on each rank, and all the words on those that print."""
    results = run_ranks(world, functools.partial(_on_ranks, **options), arguments, of_rank)
    assert [x for x, _ in results] == [code] * world, results
    for rank, (_, output) in enumerate(results):
        found = all(word in output for word in words)
        assert found if prints is None or rank in prints else output == "", (rank, output)
    return results


def test_what_ranks_are_started_with_is_looked_at_as_well(text, tmp_path):
    """By torchrun, say. Rank 0 prints it, also what another rank has seen, and has done so when the others end."""
    arguments = _small(text, tmp_path / "out")
    words = ["Invalid value for --lr", "nan is not a positive number"]
    _assert_on_all(2, 2, words, [*arguments, "--lr=nan"], prints=[0])
    _assert_on_all(2, 2, words, arguments, {1: ["--lr=nan"]}, prints=[0])
    other = tmp_path / "other"
    other.write_bytes(TEXT[:-1] + b"?")
    digests = [hashlib.sha256(x).hexdigest() for x in (TEXT, other.read_bytes())]
    words = ["Invalid value for --data", f"{digests[0]} on rank 0", f"{digests[1]} on rank 1"]
    _assert_on_all(2, 2, words, arguments, {1: [f"--data={other}"]}, prints=[0])
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of two steps on two ranks, with its text; to be copied."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_bytes(TEXT)
    _assert_on_all(2, 0, [], _small(folder / "texts", folder / "out"))
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """As if the run had been interrupted after its first step; with a shorter run of three steps to come."""
    folder = shutil.copytree(done, tmp_path / "copy")
    (folder / "out" / "LATEST").write_text("step-000001")
    return folder


def _resume(folder, *more):
    return _small(folder / "texts", folder / "out", "--resume", *more)


def _losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_these_files(done):
    names = ["LATEST", "loss.png", "metrics.jsonl", "run.json", "step-000001", "step-000002"]
    assert sorted(path.name for path in (done / "out").iterdir()) == names
    assert json.loads((done / "out" / "run.json").read_text())["text"] == hashlib.sha256(TEXT).hexdigest()
    first, second = map(json.loads, (done / "out" / "metrics.jsonl").read_text().splitlines())
    assert first["stopped_before_s"] == 0 < second["stopped_before_s"]  # by the first checkpoint


def test_a_checkpoint_beside_the_training_is_that_of_one_that_waits(done, tmp_path):
    _assert_on_all(2, 0, [], _small(done / "texts", tmp_path / "out", "--no-async-save"))
    _assert_same_state(tmp_path / "out", done / "out")


def _state(out, step=None):
    """All that the checkpoint holds: tensors, whole; and the text of what is none."""
    folder = out / ((out / "LATEST").read_text() if step is None else f"step-{step:06d}")
    parts = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, x in load_file(file).items():
            parts.setdefault(name, []).append(x)
    return {name: torch.cat(x) if x[0].ndim else x[0] for name, x in parts.items()}, (
        folder / "values.json"
    ).read_text()


def _assert_same_state(found, expected, steps=(1, 2)):
    for step in steps:
        (tensors, values), (others, other_values) = _state(found, step), _state(expected, step)
        assert values == other_values
        assert tensors.keys() == others.keys()
        for name, x in others.items():
            assert torch.equal(tensors[name], x), name


def test_two_runs_in_one_folder(copy):
    """Each would remove what the other is about to save, and write its metrics over the other's."""
    out = copy / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with held(out):
        words = ["the run ends here: rank 0: another run writes to", str(out)]
        for more in (["--resume"], ["--resume-if-any"]):
            _assert_on_all(2, 1, words, _small(copy / "texts", out, *more))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    _assert_on_all(2, 0, [], _resume(copy))  # it is free again


def test_a_run_without_a_checkpoint_is_not_overwritten(copy):
    out = copy / "out"
    (out / "LATEST").unlink()
    code, output = _alone(*_small(copy / "texts", out))
    assert (code, f"{out / 'metrics.jsonl'} is of a run without a checkpoint" in output) == (2, True), output


def test_the_same_command_goes_on_after_a_restart(copy, done, tmp_path):
    """What it begins the first time; of people, who must say so, it is refused."""
    code, output = _alone(*_small(copy / "texts", copy / "out"))
    assert (code, "holds a run already; add --resume" in output) == (2, True), output
    _assert_on_all(2, 0, [], _small(copy / "texts", copy / "out", "--resume-if-any"))
    _assert_same_state(copy / "out", done / "out")
    assert _losses(copy / "out") == _losses(done / "out")
    _assert_on_all(2, 0, [], _small(copy / "texts", tmp_path / "new", "--resume-if-any"))
    _assert_same_state(tmp_path / "new", done / "out")
    code, output = _alone(*_small(copy / "texts", copy / "out", "--resume-if-any", "--lr=0.5"))
    assert (code, "Invalid value for --lr" in output, "the run to be resumed has 0.002" in output) == (2, True, True)


def test_what_a_restart_needs_is_asked_before_the_first_start(text, tmp_path, monkeypatch):
    code, output = _alone("--seq-len=33", f"--data={text}", "--resume-if-any")
    assert (code, "Invalid value for --resume-if-any: needs --out" in output) == (2, True), output
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    code, output = _alone(*_small(text, tmp_path / "out"))
    assert (code, "torchrun is to restart the run (--max-restarts=3)" in output) == (2, True), output


def test_ranks_that_do_not_share_the_folder(copy, tmp_path):
    words = ["Invalid value for --out", "holds no checkpoint for rank 1, and one for the others"]
    elsewhere = {1: [f"--out={tmp_path / 'elsewhere'}"]}
    _assert_on_all(2, 2, words, _small(copy / "texts", copy / "out", "--resume-if-any"), elsewhere, prints=[0])


def test_the_same_text_at_another_path(copy, done, monkeypatch):
    monkeypatch.chdir(copy)
    _assert_on_all(2, 0, [], [*_resume(copy), f"--data={copy}/../copy/texts/a.txt"])
    assert _losses(copy / "out") == _losses(done / "out")


def test_another_text_at_the_same_path(copy):
    (copy / "texts" / "a.txt").write_bytes(TEXT[1:] + b"!")
    digests = [hashlib.sha256(x).hexdigest() for x in (TEXT, TEXT[1:] + b"!")]
    code, output = _alone(*_resume(copy))
    assert (code, "Invalid value for --data" in output) == (2, True), output
    assert all(digest in output for digest in digests)
    _assert_on_all(2, 2, ["Invalid value for --data", *digests], _resume(copy), prints=[0])


def test_another_python_has_another_text(copy):
    """The default text is that of the Python that runs."""
    file = copy / "out" / "run.json"
    run = json.loads(file.read_text())
    run["options"]["data"], run["python"] = None, "3.9.99"
    file.write_text(json.dumps(run))
    arguments = [x for x in _resume(copy) if not str(x).startswith("--data")]
    with mock.patch.object(train, "open_text", return_value=Text(open_text(copy / "texts" / "a.txt").ids[:-1])):
        code, output = _alone(*arguments)
    assert (code, "Python 3.9.99" in output, f"Python {train.platform.python_version()}" in output) == (2, True, True)


@pytest.mark.parametrize("content", ["half", "", "[]", "{}", '{"options": 5, "text": "x"}', "[" * 100000, None, "link"])
def test_a_run_json_that_is_no_run_json(copy, content):
    file = copy / "out" / "run.json"
    whole = file.read_text()
    file.unlink()
    if content == "link":
        file.with_name("elsewhere").write_text(whole)
        file.symlink_to("elsewhere")
    elif content is not None:
        file.write_text(whole[: len(whole) // 2] if content == "half" else content)
    code, output = _alone(*_resume(copy))
    assert (code, "Invalid value for --resume" in output, str(file) in output) == (2, True, True), output


@pytest.mark.parametrize("content", ["", "step-000007", "../out/step-000002", "step-000002\nstep-000001", b"\xff"])
def test_a_latest_that_names_nothing(copy, content):
    file = copy / "out" / "LATEST"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, output = _alone(*_resume(copy))
    assert (code, "Invalid value for --resume" in output, str(copy / "out") in output) == (2, True, True), output


@pytest.mark.parametrize("content", ["", '{"step": 0, "lo'])
def test_metrics_that_are_gone_are_told_and_left_out(copy, done, content):
    (copy / "out" / "metrics.jsonl").write_text(content)
    [(_, output), _] = _assert_on_all(2, 0, [], _resume(copy, "--verify"))
    assert "metrics.jsonl lacks the losses of 1 of the 1 steps done" in output
    assert "largest difference of 1 of 2 steps" in output
    assert "the same training" in output
    assert _losses(copy / "out") == _losses(done / "out")[1:]


def test_nothing_to_compare(copy):
    (copy / "out" / "LATEST").write_text("step-000002")
    (copy / "out" / "metrics.jsonl").unlink()
    results = run_ranks(2, _on_ranks, _resume(copy, "--verify"))
    assert [code for code, _ in results] == [1, 0]
    assert "--verify has nothing to compare" in results[0][1]


@pytest.mark.parametrize(
    "line", ["nonsense", '{"loss": 1}', '{"step": 0, "loss": NaN}', "[]", '{"step": 0, "loss": "x"}']
)
def test_metrics_that_are_none(copy, line):
    (copy / "out" / "metrics.jsonl").write_text(line + "\n")
    before = (copy / "out" / "run.json").read_bytes()
    _assert_on_all(2, 1, [f"line 1 of {copy / 'out' / 'metrics.jsonl'}"], _resume(copy))
    assert (copy / "out" / "metrics.jsonl").read_text() == line + "\n"
    assert (copy / "out" / "run.json").read_bytes() == before


def test_files_are_replaced_and_links_are_not_followed(copy, tmp_path):
    """A folder from a stranger may hold links in all places that are written to."""
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "my folder").mkdir()
    (tmp_path / "my folder" / "file").write_text("kept")
    out = copy / "out"
    (out / "loss.png").unlink()
    for name in ("loss.png", "LATEST.partial", "run.json.partial", "metrics.jsonl.partial"):
        (out / name).symlink_to(tmp_path / "mine")
    shutil.rmtree(out / "step-000002")
    for name in ("step-000002", "step-000002.partial", "step-000009.partial"):
        (out / name).symlink_to(tmp_path / "my folder")
    _assert_on_all(2, 0, [], _resume(copy))
    assert (tmp_path / "mine").read_text() == "kept"
    assert [x.name for x in (tmp_path / "my folder").iterdir()] == ["file"]
    names = ["LATEST", "loss.png", "metrics.jsonl", "run.json", "step-000001", "step-000002"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert not any(path.is_symlink() for path in out.iterdir())


def test_a_run_that_is_not_finite_ends_and_leaves_no_checkpoint_of_it(text, tmp_path):
    """Weights are finite after the first step; the loss of the second is not."""
    out = tmp_path / "out"
    results = _assert_on_all(2, 1, ["the run ends here", "NaN or Inf"], _small(text, out, "--lr=1e30"))
    assert all(f"rank {rank}: " in output for rank, (_, output) in enumerate(results))
    assert (out / "LATEST").read_text() == "step-000001"
    assert len(_losses(out)) == 1
    for file in out.rglob("*.safetensors"):
        assert all(x.isfinite().all() for x in load_file(file).values())
    assert not list(out.glob("*.partial"))


def test_a_loss_that_is_not_finite(text, tmp_path):
    """Though all gradients are."""
    arguments = _small(text, tmp_path / "out")
    results = run_ranks(2, _with_a_loss, arguments, torch.inf)
    assert [code for code, _ in results] == [1, 1]
    assert all("the loss of step 0 is inf" in output for _, output in results)
    assert not (tmp_path / "out" / "LATEST").exists()


def _with_a_loss(arguments, value):
    one = torch.tensor(1)
    with mock.patch.object(train, "train_step", return_value=(torch.tensor(value), one)):
        return _on_ranks(arguments)


@contextlib.contextmanager
def _largest_file(size):
    """Like a full disk: no file can grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _with_little_room(arguments, rank, size):
    with _largest_file(size) if dist.get_rank() == rank else contextlib.nullcontext():
        return _on_ranks(arguments)


@pytest.mark.parametrize(
    ("rank", "size", "file"),
    [(1, 10_000, "step-000002"), (0, 100, "run.json"), (0, 2_000, "step-000002")],
)
def test_a_full_disk_is_a_sentence_on_every_rank(copy, rank, size, file):
    """One rank cannot write. What was there stays as it was."""
    out, names = copy / "out", ["LATEST", "loss.png", "metrics.jsonl", "run.json", "step-000001"]
    shutil.rmtree(out / "step-000002")
    results = run_ranks(2, _with_little_room, _resume(copy), rank, size)
    assert [code for code, _ in results] == [1, 1], results
    for _, output in results:
        assert "Traceback" not in output
        assert f"{out / file} cannot be" in output
        assert "File too large" in output
        assert " bytes, and " in output
        assert f"free in {out}" in output
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "LATEST").read_text() == "step-000001"
    _assert_on_all(2, 0, [], _resume(copy))  # nothing that it left is in the way
    assert (out / "LATEST").read_text() == "step-000002"


def test_a_full_disk_beside_the_training(text, tmp_path):
    """The first of two checkpoints, while the next step is trained."""
    out = tmp_path / "out"
    for code, output in run_ranks(2, _with_little_room, _small(text, out, "--steps=40", "--save-every=20"), 1, 20_000):
        assert code == 1
        assert f"{out / 'step-000020'} cannot be saved" in output
        assert "Traceback" not in output
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "run.json"]


def test_metrics_on_a_full_disk(copy):
    """The line of a step is the first that does not fit."""
    file = copy / "out" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)[0] * 8
    assert len(lines) > (copy / "out" / "run.json").stat().st_size + 200
    file.write_text(lines)
    for code, output in run_ranks(2, _with_little_room, _resume(copy), 0, len(lines) + 10):
        assert code == 1
        assert f"{file} cannot be written: File too large; it needs " in output
    assert (copy / "out" / "LATEST").read_text() == "step-000001"


def test_without_a_folder_a_new_one_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Path(train.new_folder("tnl"))
    assert made.is_dir()
    assert made.parent == Path("runs")


def _streamed(text, out, parallel):
    """Losses of the streamed run, of a text that is shorter than a sequence."""
    more = ("--repeat-text", "--seq-len=2001", "--segment=350", f"--parallel={parallel}", "--vocab=300")
    code, said = _on_ranks(_small(text, out, *more), tiny=SMALLEST)
    assert code == 0, said
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_sequence_in_segments_trains_as_one(text, tmp_path, parallel):
    (text / "a.txt").write_bytes(TEXT[:1500])
    losses = run_ranks(2, _streamed, text, tmp_path / "streamed", parallel)
    assert losses[0] == losses[1]
    arguments = ("--repeat-text", "--seq-len=2001", "--vocab=300", "--no-save", "--ranks=1")
    code, said = _call([*_small(text, tmp_path / "whole", "--save-every=0"), *arguments], SMALLEST)
    assert code == 0, said
    assert not list((tmp_path / "whole").glob("step-*"))
    whole = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(whole, rel=1e-5)


def test_a_text_shorter_than_a_sequence(text):
    code, said = _alone("--seq-len=4001", f"--data={text}")
    assert code == 2
    assert "4001 tokens are more than the 3000 bytes of text; --repeat-text starts it again" in said
