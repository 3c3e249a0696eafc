"""Checkpoints beside the training: what a blocking save writes, from a copy; errors on every rank, at the same step."""

import contextlib
import hashlib
import os
import threading
from unittest import mock

import _checkpoint
import pytest
import torch
import torch.distributed as dist
from _files import FileError, NotWritten
from _saver import Saver
from processes import ROOT, finish, free_port, start
from ranks import run_ranks
from safetensors.torch import load_file
from test_checkpoint import _assert_same, _load, _step, _whole, _wrapped
from test_train import _state
from torch.distributed.checkpoint.staging import BlockingAsyncStager

CPU = torch.device("cpu")


def _begin(scheme, steps=2):
    model = _wrapped(1, scheme)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125, betas=(0.5, 0.75))
    for _ in range(steps):
        _step(model, optimizer)
    return model, optimizer


@contextlib.contextmanager
def _held():
    """Inside, whoever writes waits for the event; it comes in the end."""
    go, write = threading.Event(), _checkpoint._write_parts

    def later(*args):
        assert go.wait(30)
        write(*args)

    with mock.patch.object(_checkpoint, "_write_parts", later):
        try:
            yield go
        finally:
            go.set()


def _while_training(folder, scheme):
    """The next steps are trained before a byte is written, and exchange meanwhile."""
    model, optimizer = _begin(scheme)
    expected = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in _whole(model, optimizer).items()}
    _checkpoint.save(folder / "blocking", 2, model, optimizer)
    with Saver(folder / "beside", CPU, beside=True, run={}) as saver, _held() as go:
        saver.save(2, model, optimizer, beside=True)
        for _ in range(3):
            saver.check()
            _step(model, optimizer)
            dist.all_reduce(torch.ones(5))
        assert not (folder / "beside" / "LATEST").exists()
        go.set()
        saver.wait()
        assert (folder / "beside" / "LATEST").read_text() == "step-000002"
    return expected


@pytest.mark.parametrize(("world", "scheme"), [(1, "ddp"), (2, "ddp"), (3, "fsdp2")])
def test_the_files_are_those_of_a_blocking_save(tmp_path, world, scheme):
    expected = run_ranks(world, _while_training, tmp_path, scheme)[0]
    blocking, beside = (tmp_path / name / "step-000002" for name in ("blocking", "beside"))
    names = sorted(path.name for path in blocking.iterdir())
    assert sorted(path.name for path in beside.iterdir()) == names
    assert (beside / "values.json").read_bytes() == (blocking / "values.json").read_bytes()
    for name in names[:-1]:
        if name != "SHA256SUMS":
            _assert_same(load_file(beside / name), load_file(blocking / name))
    sums = (beside / "SHA256SUMS").read_text()
    assert sums.count("\n") == world + 1
    for line in sums.splitlines():
        assert line.split()[0] == hashlib.sha256((beside / line.split()[1]).read_bytes()).hexdigest()
    assert beside.parent.joinpath("LATEST").read_text() == "step-000002"
    for found in run_ranks(world, _load, tmp_path / "beside", scheme):
        _assert_same(found, expected)


def _parts(world):
    """What is alike on all ranks is copied by one of them."""
    model, optimizer = _begin("ddp")
    whole, _ = _checkpoint._state(model, optimizer)
    mine = _checkpoint.take_snapshot(2, model, optimizer).tensors
    names = [None] * world
    dist.all_gather_object(names, sorted(mine))
    assert sorted(name for part in names for name in part) == sorted(whole)
    assert all(names)


def test_ranks_share_the_copying():
    run_ranks(2, _parts, 2)


def _one_after_the_other(folder, kept):
    """On a GPU the copy's memory is pinned and taken again; here it is taken again."""
    model, optimizer = _begin("fsdp2")
    expected = {}

    def note(step):
        weights = {name: x for name, x in _whole(model, optimizer).items() if isinstance(x, torch.Tensor)}
        expected[step] = {name: x.clone() for name, x in weights.items()}

    stager = mock.patch("_saver.BlockingAsyncStager", return_value=BlockingAsyncStager(cache_staged_state_dict=kept))
    pinned = mock.patch.object(torch.Tensor, "pin_memory", lambda x: x)
    with stager, pinned, Saver(folder, CPU, beside=True, run={}) as saver, _held() as go:
        note(2)
        saver.save(2, model, optimizer, beside=True)
        _step(model, optimizer)
        threading.Timer(0.3, go.set).start()
        note(3)
        saver.save(3, model, optimizer, beside=True)  # which waits
        assert (folder / "LATEST").read_text() in ("step-000002", "step-000003")
        _step(model, optimizer)
        note(4)
        saver.save(4, model, optimizer, beside=False)
        assert (folder / "LATEST").read_text() == "step-000004"
        _step(model, optimizer)
        note(5)
        saver.save(5, model, optimizer, beside=True)
    assert (folder / "LATEST").read_text() == "step-000005"  # the end waits
    return expected


@pytest.mark.parametrize("kept", [False, True])
def test_one_save_is_under_way_at_most(tmp_path, kept):
    expected = run_ranks(2, _one_after_the_other, tmp_path, kept)[0]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["LATEST", *(f"step-00000{n}" for n in expected)]
    for step, tensors in expected.items():
        found = {name.split(".", 1)[1]: x for name, x in _state(tmp_path, step)[0].items()}
        _assert_same(found, tensors)


FAULTS = {
    "writing": ("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", KeyError, RuntimeError),
    "a full disk": ("torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", OSError, NotWritten),
    "no file": ("_checkpoint._digest", FileError, FileError),
    "not finite": ("_checkpoint._check_finite", FloatingPointError, FloatingPointError),
}


_CALLS = []  # of `check`, until it raised


def _checks(saver):
    """As a training does, which exchanges between."""
    for calls in range(1, 100_000):
        _CALLS[:] = [calls]
        dist.all_reduce(torch.ones(1))
        saver.check()


def _fails(folder, odd, fault, how):
    target, raised, kind = FAULTS[fault]
    error = raised(28, "No space") if raised is OSError else raised("of this rank")
    model, optimizer = _begin("ddp", 4)
    broken = mock.patch(target, side_effect=error) if dist.get_rank() == odd else contextlib.nullcontext()
    text = "No space" if raised is OSError else "of this rank"
    with Saver(folder, CPU, beside=True, run={}) as saver, broken:
        saver.save(4, model, optimizer, beside=True)
        ends = {
            "check": lambda: _checks(saver),
            "save": lambda: saver.save(5, model, optimizer, beside=True),
            "wait": saver.wait,
        }
        with pytest.raises(kind, match=f"rank {odd}: .*{text}"):
            ends[how]()
        saver.check()  # what was told once is not told again
        calls = _CALLS.pop() if how == "check" else 0
    with (
        pytest.raises(kind, match=f"rank {odd}: .*{text}"),
        mock.patch(target, side_effect=error) if dist.get_rank() == odd else contextlib.nullcontext(),
        Saver(folder, CPU, beside=True, run={}) as saver,
    ):
        saver.save(4, model, optimizer, beside=True)  # and the end tells it
    return calls


@pytest.mark.parametrize(("odd", "fault", "how"), [
    (0, "writing", "check"), (1, "a full disk", "check"), (1, "no file", "wait"), (0, "not finite", "save"),
    (1, "writing", "save"), (0, "a full disk", "wait"),
])  # fmt: skip
def test_what_fails_beside_the_training_is_raised_on_every_rank_at_the_same_step(tmp_path, odd, fault, how):
    run_ranks(2, _save_first, tmp_path)
    calls = run_ranks(2, _fails, tmp_path, odd, fault, how)
    assert calls[0] == calls[1]
    assert (tmp_path / "LATEST").read_text() == "step-000002"
    kept = {"LATEST", "step-000002"} | ({"step-000004.partial"} if fault in ("writing", "no file") else set())
    assert {x.name for x in tmp_path.iterdir()} == kept
    run_ranks(2, _save_first, tmp_path)  # what it left is in nobody's way
    assert {x.name for x in tmp_path.iterdir()} == {"LATEST", "step-000002"}


def _save_first(folder):
    with Saver(folder, CPU, beside=True, run={}) as saver:
        saver.save(2, *_begin("ddp"), beside=True)


def _training_fails(folder, capture):
    """Both the training, and then the save beside it."""
    fails = mock.patch.object(_checkpoint, "_finish", side_effect=NotWritten("of the save"))
    with (
        mock.patch("builtins.print") as said,
        fails if capture else contextlib.nullcontext(),
        contextlib.suppress(ZeroDivisionError),
        Saver(folder, CPU, beside=True, run={}) as saver,
    ):
        saver.save(2, *_begin("ddp"), beside=True)
        raise ZeroDivisionError
    told = " ".join(str(call.args[0]) for call in said.mock_calls)
    assert ("the checkpoint of step 2" in told and "of the save" in told) if capture else not told


@pytest.mark.parametrize("also", [False, True])
def test_a_save_that_is_under_way_when_the_training_fails_comes_to_its_end(tmp_path, also):
    run_ranks(2, _training_fails, tmp_path, also)
    assert [x.name for x in tmp_path.glob("LATEST")] == ([] if also else ["LATEST"])


KILLED = """
import os, pathlib, signal, sys, torch, lasp, _checkpoint, _saver
import torch.distributed as dist
env = lasp.init("gloo", timeout=20)
model = torch.nn.Linear(300, 3)
optimizer = torch.optim.AdamW(model.parameters())
folder = pathlib.Path(sys.argv[1])
_checkpoint.save(folder, 1, model, optimizer)
if env.rank == 1:
    _checkpoint.HuggingFaceStorageWriter.write_data = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
try:
    with _saver.Saver(folder, env.device, beside=True, run={}) as saver:
        saver.save(2, model, optimizer, beside=True)
        while True:
            saver.check()
except (lasp.PeerError, RuntimeError) as error:
    print(error)
"""


@pytest.mark.any_pytorch
def test_a_rank_that_is_killed_while_it_saves_beside_the_training(tmp_path):
    paths = os.pathsep.join(map(str, (ROOT / "examples", ROOT, ROOT / "kernels")))
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    code = KILLED.replace("sys.argv", repr(["", str(tmp_path / "run")]))
    processes = [start(code, {**common, "RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": paths}) for r in range(2)]
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, -9], outputs
    assert "step 2" in outputs[0][0], outputs
    assert "rank 1 has ended" in outputs[0][0] + outputs[0][1], outputs
    assert (tmp_path / "run" / "LATEST").read_text() == "step-000001"
    whole = {path.name for path in (tmp_path / "run").iterdir() if (path / "SHA256SUMS").exists()}
    assert whole == {"step-000001"}
