"""Python processes of their own, as a user starts them."""

import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def free_port():
    """Below the ports that systems give to whoever asks for none, so that nobody is given it before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# Of the processes that start others, those that tests must not take for their own.
LAUNCHER_PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PMI_", "MPI_", "OMPI_", "GLOO_")
LAUNCHER_PREFIXES += ("TORCHELASTIC_",)


def mpirun(ranks):
    """The command that starts so many ranks. On Linux the extra "dev" installs it, so there it must not be missing."""
    beside_python = str(Path(sys.executable).parent)
    found = shutil.which("mpirun", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if sys.platform != "linux":
        pytest.importorskip("mpi4py")
        if found is None:
            pytest.skip("no mpirun, and no wheel of one for this platform")
    assert found is not None, "mpirun is missing: pip install -e '.[dev]'"
    return (found, "-n", str(ranks))


def place(rank, ranks, gpus):
    """The variables of a rank over NCCL that has the GPU `rank % gpus`.

    NCCL refuses two ranks of one host on a GPU. So where there are fewer GPUs than ranks, it takes each `gpus` ranks
    for those of another host, and sends over sockets what goes from one to another.
    """
    here = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank % gpus), "LOCAL_WORLD_SIZE": str(gpus)}
    if ranks <= gpus:
        return here | {"LOCAL_WORLD_SIZE": str(ranks)}
    hosts = {"NCCL_HOSTID": f"host {rank // gpus}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
    return here | hosts | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}


def start(code, variables, launcher=()):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", **variables}
    command = [*launcher, sys.executable, "-c", code]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes, timeout=90):
    """Standard output and error of each; none of them outlives the test."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
