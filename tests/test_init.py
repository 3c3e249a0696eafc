"""`lasp.init` in processes of its own: alone, with the variables of torchrun, Slurm and MPI, and where it fails."""

import os
import re
import shutil
import socket
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import LAUNCHER_PREFIXES, finish, free_port, mpirun, start
from ranks import run_ranks
from scripts import run_processes

import lasp
from lasp.ranks import meeting
from lasp.ranks.launchers import _check_gpus, _discover, _first_host
from lasp.ranks.meeting import Member, Place, complete

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
    return written()


def written():
    return [path.read_text().split() for path in sorted(Path(os.environ["RESULTS"]).iterdir())]


def succeed(code, variables):
    """Processes with these variables each, which end well."""
    found = run_processes(code, [{**own, "RESULTS": os.environ["RESULTS"]} for own in variables])
    assert [code for code, _, _ in found] == [0] * len(variables), found


def expected(world, launcher):
    """The sums over ranks show that they have met: of ranks, and of 2 tokens a rank in the attention."""
    total = world * (world + 1) // 2
    return [
        [str(r), str(world), str(r), str(world), launcher, "gloo", "cpu", str(total), str(4.0 * (r + 1))]
        for r in range(world)
    ]


def test_one_process_without_a_launcher():
    assert results([start(MEET, {})]) == expected(1, "single")


def test_one_process_and_an_interface_that_is_not_there():
    [(code, _, error)] = run_processes(MEET, [{"GLOO_SOCKET_IFNAME": "nowhere0"}])
    assert code == 1
    assert "RuntimeError: gloo cannot start in this one process: " in error
    assert "GLOO_SOCKET_IFNAME='nowhere0' must name a network interface of this host" in error


def test_torchrun_variables():
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    succeed(MEET, [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)])
    assert written() == expected(2, "torchrun")


# Each child ends as a Python process does, through its finalization.
END = """
import os, torch, torch.distributed as dist, lasp
for number, port in enumerate(PORTS * 2):
    if os.fork() == 0:
        break
else:
    codes = [os.wait()[1] for _ in PORTS * 2]
    print(codes)
    raise SystemExit(any(codes))
variables = {"RANK": str(number // len(PORTS)), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
os.environ |= variables
lasp.init("gloo", timeout=60)
kept, x = dist.group.WORLD, torch.ones(200_000)
for _ in range(3):
    dist.all_reduce(x)
del x
dist.destroy_process_group()
"""


def test_processes_that_end_after_a_collective():
    """Without what lasp.init does at exit, about one run in three aborts; hence several."""
    ports = [str(free_port()) for _ in range(4)]
    process = start(f"PORTS = {ports}\n{END}", {})
    [output] = finish([process])
    assert process.returncode == 0, output


def test_slurm_variables():
    common = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
    }
    succeed(MEET, [{**common, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)} for r in range(2)])
    assert written() == expected(2, "slurm")


def test_mpirun():
    assert results([start(MEET, {}, launcher=mpirun(2))]) == expected(2, "mpi")


def test_mpirun_with_a_port_that_is_taken():
    """Broadcasts of MPI have no timeout: rank 0 must not fail before the one in which the others wait."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        variables = {"MASTER_PORT": str(taken.getsockname()[1])}
        code = "import lasp\ntry: lasp.init('gloo', timeout=20)\nexcept RuntimeError as error: print(error)"
        [(output, _)] = finish([start(code, variables, launcher=mpirun(2))])
    assert output.count("rank 0 cannot listen for the others") == 2
    assert "set MASTER_ADDR and MASTER_PORT" in output


# What fails


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "mpi"}, 'backend "mpi" is not in PyTorch\'s wheels. Start with mpirun'),
        ({"backend": "smoke"}, 'backend must be "nccl", "gloo" or None, got \'smoke\''),
        ({"backend": 5}, 'backend must be "nccl", "gloo" or None, got 5'),
        ({"backend": ["gloo"]}, 'backend must be "nccl", "gloo" or None, got \\[\'gloo\'\\]'),
        *(
            ({"timeout": x}, rf"timeout must be a number of seconds from 0.001 to 2592000, got {x}")
            for x in (0, -1.5, 1e-9, float("nan"), float("inf"), 1e10, 2**70)
        ),
        ({"timeout": 10**5000}, r"timeout must be a number of seconds from 0.001 to 2592000, got 2\*\*16609 or more"),
        *(({"timeout": x}, f"timeout must be a number of seconds, got {x!r}") for x in ("5", None, True, 1j)),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lasp.init(**arguments)


def test_an_argument_of_another_type():
    for arguments in ({"backend": 5}, {"timeout": "5"}, {"timeout": None}):
        with pytest.raises(TypeError):
            lasp.init(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu():
    with pytest.raises(ValueError, match='backend "nccl" needs a GPU and none is visible; use "gloo"'):
        lasp.init("nccl")


def fail_alone(monkeypatch, **variables):
    """The error of this process as one rank of two."""
    set_variables(monkeypatch, {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **variables})
    with pytest.raises(RuntimeError) as caught:
        lasp.init("gloo", timeout=2)
    return str(caught.value)


def set_variables(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_a_port_that_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = fail_alone(monkeypatch, RANK=0, MASTER_PORT=port)
    assert f"rank 0 of 2 (torchrun) could not meet the others at 127.0.0.1:{port}: " in error
    assert "If the port is taken, set MASTER_PORT to a free one" in error


def test_rank_0_does_not_come(monkeypatch):
    error = fail_alone(monkeypatch, RANK=1)
    assert "rank 1 of 2 (torchrun) could not meet the others at 127.0.0.1:" in error
    assert "That was tried for 2 s. Nobody listens on this host: rank 0 has not started" in error


def test_a_name_that_nobody_knows(monkeypatch):
    error = fail_alone(monkeypatch, RANK=1, MASTER_ADDR="no.such.host.invalid")
    assert "MASTER_ADDR cannot be resolved on this host" in error


def test_a_store_that_does_not_answer(monkeypatch):
    """As where the process that holds it is stopped: PyTorch's client would wait without end."""
    monkeypatch.setattr(meeting, "_ANSWER", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = fail_alone(monkeypatch, RANK=1, MASTER_PORT=silent.getsockname()[1])
    assert ": no answer for 3 s. The process that holds the store, rank 0, has ended or hangs" in error


def fail(*variables):
    """What each of these processes, which must all fail, writes to standard error."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    found = run_processes("import lasp; lasp.init('gloo', timeout=8)", [{**common, **own} for own in variables])
    assert [code for code, _, _ in found] == [1] * len(variables), found
    return [error for _, _, error in found]


def test_a_rank_that_does_not_come():
    """All that did say who has not."""
    errors = fail(*({"RANK": str(r), "WORLD_SIZE": "4"} for r in (0, 2)))
    for rank, error in zip((0, 2), errors):
        assert f"RuntimeError: rank {rank} of 4 (torchrun) waited 8 s at 127.0.0.1:" in error
        assert "and not all ranks came: ranks 0, 2 came, ranks 1, 3 did not." in error


def test_the_store_ends_while_ranks_wait():
    """Long before the timeout: nobody can come any more."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("lasp/life", "a")
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    rank = start("import lasp; lasp.init('gloo', timeout=600)", variables)
    store.wait(["lasp/a/meeting/1"], timedelta(seconds=90))
    del store
    [(_, error)] = finish([rank], timeout=30)
    assert "rank 1 of 2 (torchrun) could not meet the others at 127.0.0.1:" in error
    assert "The process that holds the store, rank 0, has ended or hangs" in error


def test_two_processes_are_the_same_rank():
    for error in fail(*({"RANK": str(r), "WORLD_SIZE": "3"} for r in (0, 1, 1))):
        assert "RankMismatchError" in error
        assert "2 processes are rank 1; every process needs a RANK of its own" in error


def test_ranks_of_different_worlds():
    for error in fail({"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "3"}):
        assert "RankMismatchError" in error
        assert "rank 1 has WORLD_SIZE 3, rank 0 has 2" in error


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({0: 1, 1: 0, 2: 1}, "rank 2 has local rank 1; on its host: rank 2."),
        ({1: 0}, "rank 1 has local rank 0, as rank 0 of its host has; on its host: ranks 0, 1."),
    ],
)
def test_local_ranks_that_do_not_fit_to_the_hosts(told, message):
    """Two ranks on host a and one on host b; some have LOCAL_RANK."""
    members = [Member("", host, 3, "gloo", told.get(r), None, 0, "", "") for r, host in enumerate("aab")]
    with pytest.raises(lasp.RankMismatchError, match=message):
        complete(members)


def test_what_the_hosts_say_completes_what_variables_say():
    members = [Member("", host, 5, "gloo", None, None, 0, "", "") for host in "abaab"]
    assert complete(members) == [(0, 3), (0, 2), (1, 3), (2, 3), (1, 2)]
    swapped = [replace(member, local_rank=x) for member, x in zip(members, (2, 0, 1, 0, 1))]
    assert complete(swapped) == [(2, 3), (0, 2), (1, 3), (0, 3), (1, 2)]
    parts = [replace(member, local_rank=0, local_world_size=1) for member in members]
    assert complete(parts) == [(0, 1)] * 5  # as where a machine with several GPUs plays several hosts


def test_fewer_gpus_than_ranks_of_a_host():
    """Every rank sees it, and says whose it is."""
    _check_gpus({0: (0, 1), 1: (0, 1)})
    with pytest.raises(RuntimeError, match=r"rank 3 has local rank 1 on its host and no GPU of its own: it sees 1\."):
        _check_gpus({2: (0, 1), 3: (1, 1)})


AGAIN = """
import os, torch, torch.distributed as dist, lasp
for life in range(2):
    env = lasp.init("gloo", timeout=60)
    assert lasp.init() is env
    total = torch.tensor(env.rank + 1)
    dist.all_reduce(total)
    assert total == 3
    q = torch.ones(1, 2, 1, 2)
    o, _ = lasp.linear_attention(q, q, q, sequence=lasp.SequenceParallel(dist.group.WORLD))
    assert o[0, -1, 0, 0] == 4.0 * (env.rank + 1)
    try:
        lasp.init("nccl")
        raise AssertionError("accepted")
    except ValueError:
        pass
    dist.destroy_process_group()
    print("life", life, "ended", flush=True)
"""


def test_a_second_life_of_the_group():
    """On one port, with what the first has left in the store."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    found = run_processes(AGAIN, [{**common, "RANK": str(r)} for r in range(2)])
    assert [(code, out.count("life 0 ended"), out.count("life 1 ended")) for code, out, _ in found] == [
        (0, 1, 1)
    ] * 2, found


RESTARTED = f"""
import os, sys, time
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    import lasp
    lasp.init("gloo", timeout=60)
    os._exit(1)
{MEET}"""


def test_torchrun_starts_the_ranks_anew(tmp_path):
    """Its agent keeps the store, with what the first ranks have left there."""
    script = tmp_path / "train.py"
    script.write_text(RESTARTED)
    results_of = tmp_path / "results"
    results_of.mkdir()
    os.environ["RESULTS"] = str(results_of)
    code = "import sys, runpy; runpy.run_module('torch.distributed.run', run_name='__main__', alter_sys=True)"
    code = code.replace(
        "runpy;", f"runpy; sys.argv = ['torchrun', '--nproc-per-node=2', '--max-restarts=1', {str(script)!r}];"
    )
    assert results([start(code, {})]) == expected(2, "torchrun")


def _in_a_group_that_exists():
    for name in [name for name in os.environ if name.startswith(LAUNCHER_PREFIXES) and "SOCKET" not in name]:
        del os.environ[name]
    return lasp.init("gloo")


def test_a_process_group_that_exists():
    """Made by the caller; nobody says which ranks are on which host."""
    found = run_ranks(3, _in_a_group_that_exists)
    assert [(x.rank, x.world_size, x.local_rank, x.local_world_size) for x in found] == [(r, 3, r, 3) for r in range(3)]
    assert {(x.backend, str(x.device)) for x in found} == {("gloo", "cpu")}


def test_an_mpi_launcher_without_mpi4py(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"mpi4py is not installed: pip install 'lasp-runtime\[mpi\]'"):
        lasp.init("gloo")


# How the place is found


def test_slurm_that_starts_mpi_tasks_needs_no_mpi4py(monkeypatch):
    """srun --mpi=pmi2 sets both kinds of variables."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    variables = {"PMI_SIZE": 4, "SLURM_PROCID": 3, "SLURM_NTASKS": 4, "SLURM_LOCALID": 3, "SLURM_NNODES": 1}
    set_variables(monkeypatch, {**variables, "MASTER_PORT": 1234})
    assert _discover() == Place(3, 4, "slurm", 3, 4, "127.0.0.1", 1234)


def test_an_mpi_of_another_library(monkeypatch):
    """Each process would be alone in its world, and train alone."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="OMPI_COMM_WORLD_SIZE is 2, but mpi4py sees 1: it uses another MPI"):
        _discover()


def test_torchrun_goes_before_slurm(monkeypatch):
    variables = {"RANK": 1, "WORLD_SIZE": 2, "SLURM_PROCID": 0, "SLURM_NTASKS": 4}
    set_variables(monkeypatch, {**variables, "MASTER_ADDR": "host", "MASTER_PORT": 1234})
    assert _discover() == Place(1, 2, "torchrun", None, None, "host", 1234)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"MASTER_ADDR": "host"}, {"address": "host", "port": 29500}),
        ({"MASTER_ADDR": "localhost"}, {"address": "127.0.0.1", "port": 29500}),
        ({"LOCAL_WORLD_SIZE": "4"}, {"address": "127.0.0.1", "port": 29500, "local_world_size": 4}),
        ({"MASTER_ADDR": "host", "LOCAL_RANK": "1"}, {"address": "host", "port": 29500, "local_rank": 1}),
        (  # torchrun on one host: its agent listens
            {
                "MASTER_ADDR": "host",
                "MASTER_PORT": "1",
                "LOCAL_WORLD_SIZE": "4",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            },
            {"address": "host", "port": 1, "local_world_size": 4, "agent": True},
        ),
    ],
)
def test_variables_that_are_enough(monkeypatch, variables, found):
    set_variables(monkeypatch, {"RANK": 3, "WORLD_SIZE": 4, **variables})
    assert _discover() == Place(3, 4, "torchrun", **found)


SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "1"}
PLAIN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "host"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK is '0' without WORLD_SIZE: this process would train alone"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2' without RANK: this process would train alone"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is '1' without RANK and WORLD_SIZE"),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, "WORLD_SIZE is '2' without RANK"),
        ({**SLURM, "WORLD_SIZE": "8"}, r"WORLD_SIZE is '8', but slurm has started this process as rank 1 of 4"),
        ({**SLURM, "RANK": "0"}, r"RANK is '0', but slurm has started this process as rank 1 of 4"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set: on every rank, set it to an address of rank 0's"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}, "MASTER_ADDR is not set"),
        ({**PLAIN, "MASTER_ADDR": ""}, "MASTER_ADDR must be an address of rank 0's host, got ''"),
        *(
            ({**PLAIN, name: text}, rf"variable {name} must be an integer {limits}, got '{re.escape(text)}'")
            for name, limits, texts in (
                ("RANK", r"from 0 to 3 \(WORLD_SIZE is 4\)", ("4", "-1", "one", "", "1.0")),
                ("WORLD_SIZE", "of at least 1", ("0", "-2", "two", "", "1e3")),
                ("LOCAL_WORLD_SIZE", r"from 1 to 4 \(WORLD_SIZE is 4\)", ("0", "5", "")),
                ("LOCAL_RANK", r"from 0 to 3 \(WORLD_SIZE is 4\)", ("4", "-1", "x")),
                ("MASTER_PORT", "from 1 to 65535", ("abc", "70000", "0", "", "1_000")),
            )
            for text in texts
        ),
        ({**PLAIN, "WORLD_SIZE": "9" * 5000}, "variable WORLD_SIZE must be an integer of at least 1, got '9999"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, r"RANK must be an integer from 0 to 0 \(WORLD_SIZE is 1\), got '1'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}, "LOCAL_RANK must be an integer from 0 to 0"),
        ({**PLAIN, "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "3"}, r"from 0 to 0 \(LOCAL_WORLD_SIZE is 1\), got '3'"),
        *(
            ({**SLURM, name: text}, rf"variable {name} must be an integer .*, got '{re.escape(text)}'")
            for name, texts in (
                ("SLURM_PROCID", ("4", "-1", "")),
                ("SLURM_NTASKS", ("0", "four")),
                ("SLURM_LOCALID", ("4", "x")),
                ("SLURM_NNODES", ("0", "")),
                ("SLURM_JOB_ID", ("x",)),
                ("SLURM_STEP_ID", ("-1",)),
                ("PMI_SIZE", ("0", "x")),
                ("OMPI_COMM_WORLD_SIZE", ("",)),
                ("MPI_LOCALNRANKS", ("1.5",)),
            )
            for text in texts
        ),
    ],
)
def test_variables_that_are_wrong(monkeypatch, variables, message):
    set_variables(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        lasp.init("gloo", timeout=1)


def test_variables_that_repeat_what_slurm_says(monkeypatch):
    set_variables(monkeypatch, {**SLURM, "WORLD_SIZE": "4", "RANK": "1", "MASTER_PORT": "1"})
    monkeypatch.delenv("RANK")  # as in a script that takes it from SLURM_PROCID
    assert _discover() == Place(1, 4, "slurm", None, 4, "127.0.0.1", 1)


def test_one_task_of_slurm(monkeypatch):
    set_variables(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "WORLD_SIZE": "1"})
    assert _discover() == Place(0, 1, "single")


def slurm_with_two_nodes(monkeypatch, **more):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    variables = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "1020003",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_NODELIST": "gpu[07-09,12]",
        **more,
    }
    set_variables(monkeypatch, variables)
    return _discover()


def test_slurm_with_several_nodes(monkeypatch):
    """How many tasks a node has the ranks find out: SLURM_TASKS_PER_NODE does not say which node this is."""
    assert slurm_with_two_nodes(monkeypatch) == Place(5, 8, "slurm", 1, None, "gpu07", 20003)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu07", "20003")


def test_another_step_of_a_job_has_another_port(monkeypatch):
    assert slurm_with_two_nodes(monkeypatch, SLURM_STEP_ID="2").port == 20005


@pytest.mark.parametrize("more", [{"SLURM_JOB_NODELIST": "localhost"}, {"MASTER_ADDR": "127.0.0.1"}])
def test_slurm_with_a_loopback_address_of_another_node(monkeypatch, more):
    with pytest.raises(
        RuntimeError, match=r"is the loopback address .* on this other node; set MASTER_ADDR to an addr"
    ):
        slurm_with_two_nodes(monkeypatch, SLURM_NODEID="1", **more)


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
        ("rack[2-3]n[01-04],a", "rack2n01"),
    ],
)
def test_the_first_host_of_a_node_list(monkeypatch, nodes, first):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert _first_host(nodes) == first


def test_scontrol_that_fails(monkeypatch, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho invalid hostlist >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(
        RuntimeError, match=r"scontrol cannot read Slurm's node list 'a\[': invalid hostlist; set MASTER"
    ):
        _first_host("a[")


def test_a_node_list_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"cannot read Slurm's node list '\[1-2\]'; set MASTER_ADDR"):
        _first_host("[1-2]")
