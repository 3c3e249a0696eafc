"""`lasp.init` in processes of its own: alone, with the variables of torchrun, Slurm and MPI, and where it fails."""

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from processes import LAUNCHER_PREFIXES, finish, free_port, mpirun, start

import lasp
from lasp.ranks.launchers import _discover, _first_host

# Each rank writes a file: the lines that two ranks print at once, mpirun may mix.
MEET = """
import os, pathlib, torch, torch.distributed as dist, lasp
env = lasp.init("gloo", timeout=60)
total = torch.tensor(env.rank + 1)
dist.all_reduce(total)
q = torch.ones(1, 2, 1, 2)
o, _ = lasp.linear_attention(q, q, q, sequence=lasp.SequenceParallel(dist.group.WORLD))
place = (env.rank, env.world_size, env.local_rank, env.local_world_size)
found = (*place, env.launcher, env.backend, env.device, total.item(), o[0, -1, 0, 0].item())
pathlib.Path(os.environ["RESULTS"], str(env.rank)).write_text(" ".join(map(str, found)))
dist.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def _no_launcher(tmp_path):
    """Whatever started pytest is not what these tests are about, nor is what one test leaves for the next."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(LAUNCHER_PREFIXES):
            del os.environ[name]
    os.environ["RESULTS"] = str(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


def results(processes):
    """What the ranks of these processes found, by rank."""
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0] * len(processes), outputs
    return [path.read_text().split() for path in sorted(Path(os.environ["RESULTS"]).iterdir())]


def expected(world, launcher):
    """The sums over ranks show that they have met: of ranks, and of 2 tokens a rank in the attention."""
    total = world * (world + 1) // 2
    return [
        [str(r), str(world), str(r), str(world), launcher, "gloo", "cpu", str(total), str(4.0 * (r + 1))]
        for r in range(world)
    ]


def test_one_process_without_a_launcher():
    assert results([start(MEET, {})]) == expected(1, "single")


def test_torchrun_variables():
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(MEET, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    assert results(ranks) == expected(2, "torchrun")


END = """
import torch, torch.distributed as dist, lasp
lasp.init("gloo", timeout=60)
kept, x = dist.group.WORLD, torch.ones(200_000)
for _ in range(3):
    dist.all_reduce(x)
del x
dist.destroy_process_group()
"""


def test_a_process_that_ends_after_a_collective():
    """Without what lasp.init does at exit, about one run in three aborts; hence several."""
    for _ in range(4):
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [start(END, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
        outputs = finish(ranks)
        assert [rank.returncode for rank in ranks] == [0, 0], outputs


def test_slurm_variables():
    common = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
    }
    ranks = [start(MEET, {**common, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)}) for r in range(2)]
    assert results(ranks) == expected(2, "slurm")


def test_mpirun():
    assert results([start(MEET, {}, launcher=mpirun(2))]) == expected(2, "mpi")


# What fails


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "mpi"}, 'backend "mpi" is not in PyTorch\'s wheels. Start with mpirun'),
        ({"backend": "smoke"}, 'backend must be "nccl", "gloo" or None, got \'smoke\''),
        ({"timeout": 0}, "timeout must be a positive number of seconds, got 0"),
        ({"timeout": -1.5}, "timeout must be a positive number of seconds, got -1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lasp.init(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu():
    with pytest.raises(ValueError, match='backend "nccl" needs a GPU and none is visible; use "gloo"'):
        lasp.init("nccl")


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        [(_, error)] = finish([start("import lasp; lasp.init('gloo', timeout=20)", variables)])
    assert "RuntimeError: rank 0 of 2 (torchrun) could not meet the others at 127.0.0.1:" + port in error
    assert "set MASTER_PORT to a free one" in error


def test_a_rank_that_does_not_come():
    port = str(free_port())
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    [(_, error)] = finish([start("import lasp; lasp.init('gloo', timeout=2)", variables)])
    assert f"RuntimeError: rank 0 of 2 (torchrun) waited 2 s at 127.0.0.1:{port} and not all ranks came" in error


def test_an_mpi_launcher_without_mpi4py(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"mpi4py is not installed: pip install 'lasp-runtime\[mpi\]'"):
        lasp.init("gloo")


# How the place is found


def test_slurm_that_starts_mpi_tasks_needs_no_mpi4py(monkeypatch):
    """srun --mpi=pmi2 sets both kinds of variables."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for name, value in {"PMI_SIZE": "4", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert _discover() == (3, 4, 3, 4, "slurm")


def test_torchrun_goes_before_slurm(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1234")
    assert _discover() == (1, 2, 1, 2, "torchrun")


def test_slurm_with_several_nodes(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    variables = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "1020003",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NODELIST": "gpu[07-09,12]",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _discover() == (5, 8, 1, 4, "slurm")
    assert os.environ["MASTER_ADDR"] == "gpu07"
    assert os.environ["MASTER_PORT"] == "20003"


def test_slurm_without_a_node_list(monkeypatch):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="Slurm gives no node list"):
        _discover()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a1,a2", "a1"),
        ("gpu[07-09,12]", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack2-n[001-004]-ib,rack3-n001", "rack2-n001-ib"),
    ],
)
def test_the_first_host_of_a_node_list(monkeypatch, nodes, first):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert _first_host(nodes) == first


def test_a_node_list_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"cannot read Slurm's node list '\[1-2\]'; set MASTER_ADDR"):
        _first_host("[1-2]")
