"""The training example under torchrun, mpirun and Slurm's variables: the same losses, bit for bit."""

import json
import os
from pathlib import Path

import pytest
from processes import LAUNCHER_PREFIXES, finish, free_port, mpirun, start
from scripts import run_processes

EXAMPLE = Path(__file__).parent.parent / "examples" / "train.py"
RANKS = 2


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    """Whatever started pytest is not what these tests are about."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)


def losses(folder, launch):
    """Train for three steps; the loss of each."""
    arguments = [f"--out={folder}", "--seq-len=130", "--steps=3", f"--data={__file__}"]
    code = f"import sys, runpy; sys.argv = {[str(EXAMPLE), *arguments]!r}; "
    code += f"sys.path.insert(0, {str(EXAMPLE.parent)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    found = launch(code)
    assert [exit_code for exit_code, *_ in found] == [0] * len(found), found
    run = json.loads((folder / "run.json").read_text())
    assert run["ranks"] == RANKS
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return run["launcher"], [json.loads(line)["loss"] for line in lines]


def torchrun(code):
    common = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    return run_processes(code, [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(RANKS)])


def mpi(code):
    process = start(code, {}, launcher=mpirun(RANKS))
    [output] = finish([process])
    return [(process.returncode, *output)]


def slurm(code):
    common = {"SLURM_NTASKS": str(RANKS), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost"}
    common |= {"SLURM_JOB_NUM_NODES": "1", "MASTER_PORT": str(free_port())}
    return run_processes(code, [{**common, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in range(RANKS)])


@pytest.mark.timeout(300)  # of a loaded machine
def test_every_launcher_trains_to_the_same_losses(tmp_path):
    launcher, expected = losses(tmp_path / "torchrun", torchrun)
    assert launcher == "torchrun"
    assert len(set(expected)) == 3
    assert losses(tmp_path / "slurm", slurm) == ("slurm", expected)
    assert losses(tmp_path / "mpi", mpi) == ("mpi", expected)
