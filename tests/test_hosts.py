"""`lasp.init` on several hosts: network namespaces with a cable between them, as containers are hosts of their own.

All have one name and one /etc/hosts, in which that name may be a loopback address. Needs Linux, iproute2 and root.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LAUNCHER_PREFIXES, finish, mpirun, start

ADDRESSES = ("10.77.0.1", "10.77.0.2")

# Each rank writes what it found, and on which addresses anything in its namespace listens.
MEET = """
import os, pathlib, torch, torch.distributed as dist, lasp
env = lasp.init("gloo", timeout=60)
total = torch.tensor(env.rank + 1.0, requires_grad=True)
x = torch.full((1, 3 - env.rank, 1, 2), env.rank + 1.0, requires_grad=True)
o, _ = lasp.linear_attention(x, x, x, sequence=lasp.SequenceParallel(dist.group.WORLD))
o.sum().backward()
both = torch.cat([o.detach().flatten(), x.grad.flatten()]).sum()
dist.all_reduce(both)
listening = set()
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in pathlib.Path(table).read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A":
            listening.add(address.split(":")[0])
found = (env.rank, env.world_size, env.local_rank, env.local_world_size, env.launcher, both.item())
text = " ".join(map(str, (*found, os.environ["MASTER_ADDR"], ",".join(sorted(listening)))))
dist.barrier()  # all have looked
pathlib.Path(os.environ["RESULTS"], str(env.rank)).write_text(text)
dist.destroy_process_group()
"""


def hexadecimal(address):
    """As /proc/net/tcp has it on a little-endian machine."""
    return "".join(f"{int(part):02X}" for part in reversed(address.split(".")))


LOOPBACK = hexadecimal("127.0.0.1")


@pytest.fixture(scope="module")
def hosts():
    """Two commands; what follows them runs on the one or the other host."""
    if shutil.which("ip") is None:
        pytest.skip("no iproute2")
    names = [f"lasp{os.getpid()}{side}" for side in "ab"]
    cables = [f"v{os.getpid()}{side}" for side in "ab"]

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    try:
        made = [ip("netns", "add", name) for name in names]
        made.append(ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1]))
        if any(x.returncode for x in made):
            pytest.skip(f"no network namespaces here: {made[0].stderr or made[-1].stderr}")
        for name, cable, address in zip(names, cables, ADDRESSES):
            steps = [
                ip("link", "set", cable, "netns", name),
                ip("-n", name, "addr", "add", f"{address}/24", "dev", cable),
                ip("-n", name, "link", "set", cable, "up"),
                ip("-n", name, "link", "set", "lo", "up"),
            ]
            assert not any(x.returncode for x in steps), steps
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture(autouse=True)
def _no_launcher(tmp_path, monkeypatch):
    """Whatever started pytest is not what these tests are about."""
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RESULTS", str(tmp_path))


def results(processes):
    """What the ranks found, by rank."""
    outputs = finish(processes)
    assert [p.returncode for p in processes] == [0] * len(processes), outputs
    return [path.read_text().split() for path in sorted(Path(os.environ["RESULTS"]).iterdir())]


def total(world):
    """What the ranks of MEET find together, computed by one."""
    import torch

    import lasp

    x = torch.cat([torch.full((1, 3 - rank, 1, 2), rank + 1.0) for rank in range(world)], 1).requires_grad_()
    o, _ = lasp.linear_attention(x, x, x)
    o.sum().backward()
    return (o.sum() + x.grad.sum()).item()


def test_a_rank_on_each_host_with_three_variables(hosts):
    """As in a pod of Kubernetes, or from a loop of ssh."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0]}
    found = results([start(MEET, {**common, "RANK": str(r)}, launcher=hosts[r]) for r in range(2)])
    for rank, (*place, sum_, address, listening) in enumerate(found):
        assert place == [str(rank), "2", "0", "1", "torchrun"]
        assert float(sum_) == total(2)
        assert address == ADDRESSES[0]
        assert listening == hexadecimal(ADDRESSES[rank])  # nothing on the loopback interface, and nothing on all


def test_two_ranks_on_one_host_and_one_on_the_other(hosts):
    """The ranks of a host need not follow each other."""
    common = {"WORLD_SIZE": "3", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511"}
    found = results([start(MEET, {**common, "RANK": str(r)}, launcher=hosts[r % 2]) for r in range(3)])
    assert [place[:5] for place in found] == [
        ["0", "3", "0", "2", "torchrun"],
        ["1", "3", "0", "1", "torchrun"],
        ["2", "3", "1", "2", "torchrun"],
    ]
    assert {float(place[5]) for place in found} == {total(3)}
    assert [place[-1] for place in found] == [hexadecimal(ADDRESSES[r % 2]) for r in range(3)]


@pytest.mark.parametrize(
    "variables",
    [{"MASTER_ADDR": "localhost"}, {"MASTER_ADDR": ADDRESSES[0], "LOCAL_WORLD_SIZE": "2"}],
    ids=["address", "local-world-size"],
)
def test_all_ranks_on_one_host_listen_on_loopback_only(hosts, variables):
    common = {"WORLD_SIZE": "2", "MASTER_PORT": "29512", **variables}
    found = results([start(MEET, {**common, "RANK": str(r)}, launcher=hosts[0]) for r in range(2)])
    assert [place[:5] for place in found] == [[str(r), "2", str(r), "2", "torchrun"] for r in range(2)]
    assert {place[-1] for place in found} == {LOOPBACK}


def test_mpirun_over_two_hosts(hosts):
    """No variable says where rank 0 is: MPI only tells the addresses of its host, and all try them."""
    python = (sys.executable, "-c", MEET)
    command = (*mpirun(1), *hosts[0], *python, ":", "-n", "1", *hosts[1])
    found = results([start(MEET, {}, launcher=command)])
    assert [place[:5] for place in found] == [[str(r), "2", "0", "1", "mpi"] for r in range(2)]
    assert {place[6] for place in found} == {ADDRESSES[0]}
    assert {float(place[5]) for place in found} == {total(2)}


def test_mpirun_on_one_host_meets_on_loopback(hosts):
    found = results([start(MEET, {}, launcher=(*hosts[0], *mpirun(2)))])
    assert [place[:5] for place in found] == [[str(r), "2", str(r), "2", "mpi"] for r in range(2)]
    assert {place[6] for place in found} == {"127.0.0.1"}


def test_a_loopback_address_of_another_host(hosts):
    """Each rank says what is wrong, within the timeout and not after 30 minutes."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29513"}
    code = "import lasp; lasp.init('gloo', timeout=10)"
    ranks = [start(code, {**common, "RANK": str(r)}, launcher=hosts[r]) for r in range(2)]
    (_, first), (_, second) = finish(ranks)
    assert "rank 0 of 2 (torchrun) waited 10 s at 127.0.0.1:29513 and not all ranks came: rank 0 came, rank 1" in first
    assert "rank 1 of 2 (torchrun) could not meet the others at 127.0.0.1:29513" in second
    assert "is on another host; then MASTER_ADDR must be an address of that" in second


def test_an_address_that_no_host_has(hosts):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.9"}
    [(_, error)] = finish([start("import lasp; lasp.init('gloo', timeout=2)", variables, launcher=hosts[1])])
    assert "RuntimeError: rank 1 of 2 (torchrun) could not meet the others at 10.77.0.9:29500" in error
    assert "tried for 2 s. MASTER_ADDR must be an address of rank 0's host" in error


def test_an_interface_over_which_the_hosts_do_not_meet(hosts):
    """Gloo's own error says neither what to do nor, on the rank that waits, anything before five times the timeout."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": "lo"}
    code = "import lasp, time; start = time.monotonic()\n"
    code += "try: lasp.init('gloo', timeout=60)\nfinally: print(time.monotonic() - start)"
    outputs = finish([start(code, {**common, "RANK": str(r)}, launcher=hosts[r]) for r in range(2)])
    for rank, (seconds, error) in enumerate(outputs):
        assert (
            f"RuntimeError: rank {rank} of 2 (torchrun) has met the others at {ADDRESSES[0]}:29500, but gloo" in error
        )
        assert "GLOO_SOCKET_IFNAME names the network interface that they share" in error
        assert float(seconds) < 60
