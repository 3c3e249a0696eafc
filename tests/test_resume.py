"""Runs that go on: on other ranks, and by themselves when torchrun starts all again after one was killed."""

import json
import os
import shutil

import pytest
from processes import LAUNCHER_PREFIXES, ROOT, finish, start
from ranks import run_ranks
from test_train import SMALLEST, _assert_on_all, _assert_same_state, _losses, _on_ranks, _state

TABLE = [
    ((2, 1, "ddp"), (2, 1, "ddp")),
    ((2, 1, "ddp"), (1, 1, "ddp")),
    ((2, 1, "ddp"), (4, 2, "fsdp2")),
    ((4, 2, "fsdp2"), (4, 2, "fsdp2")),
    ((4, 2, "fsdp2"), (3, 1, "ddp")),
    ((4, 2, "fsdp2"), (2, 2, "fsdp2")),
    ((3, 1, "zero1"), (4, 2, "hsdp")),
    ((4, 2, "hsdp"), (2, 1, "zero2")),
]  # ranks, --dp, --parallel: before, and after


def _arguments(folder, dp, parallel, *more):
    sizes = ("--seq-len=33", "--batch=4", "--steps=4", "--save-every=2", f"--dp={dp}", f"--parallel={parallel}")
    sizes += ("--dp-replicate=2", "--accumulate=2") if parallel == "hsdp" else ()
    return [*sizes, f"--data={__file__}", f"--out={folder}", *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of four steps, by layout of their ranks."""
    found = {}
    for world, dp, parallel in dict(TABLE):
        folder = found[world, dp, parallel] = tmp_path_factory.mktemp("run") / "out"
        _assert_on_all(world, 0, [], _arguments(folder, dp, parallel), tiny=SMALLEST)
        assert len(set(_losses(folder))) == 4
    return found


@pytest.mark.parametrize(("before", "after"), TABLE)
def test_a_run_goes_on_on_other_ranks(runs, tmp_path, before, after):
    """In another split of batch and sequence, and under another wrapper; on the same ranks with the same bits."""
    folder = shutil.copytree(runs[before], tmp_path / "copy")
    (folder / "LATEST").write_text("step-000002")
    shutil.rmtree(folder / "step-000004")
    _assert_on_all(after[0], 0, [], _arguments(folder, *after[1:], "--resume"), tiny=SMALLEST)
    assert _losses(folder) == pytest.approx(_losses(runs[before]), rel=1e-5)
    (tensors, _), (expected, _) = _state(folder, 4), _state(runs[before], 4)
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        assert (tensors[name] - x).abs().max() <= 1e-2 * x.abs().max(), name
    if before == after:
        assert _losses(folder) == _losses(runs[before])
        _assert_same_state(folder, runs[before], [2, 4])


KILLED = """
import os, signal, sys
import torch.distributed as dist
import train
step = train.train_step


def killed(options, number, *rest):
    if number == 5 and dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(options, number, *rest)


train.train_step = killed
train.app()
"""


@pytest.mark.timeout(240)  # ranks start twice
def test_after_a_rank_was_killed_the_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    options = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=1", str(script)]
    options += _arguments(tmp_path / "killed", 1, "ddp", "--steps=8", "--resume-if-any")
    code = f"import sys, runpy; sys.argv[1:] = {options!r}; "
    code += "runpy.run_module('torch.distributed.run', run_name='__main__')"
    paths = os.pathsep.join(map(str, (ROOT / "examples", ROOT, ROOT / "kernels")))
    process = start(code, {"PYTHONPATH": paths})
    assert [x for x, _ in run_ranks(2, _on_ranks, _arguments(tmp_path / "whole", 1, "ddp", "--steps=8"))] == [0, 0]
    [(_, error)] = finish([process], timeout=200)
    assert process.returncode == 0, error
    assert "exitcode: -9" in error, error  # it was killed, and not spared
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    _assert_same_state(tmp_path / "killed", tmp_path / "whole", [8])
    lines = [json.loads(x) for x in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(8))
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["options"]["resume"] is True
