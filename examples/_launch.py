"""How an example starts: as several processes where no launcher has started it, in a folder, or not at all."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import typer

RUNS = Path("runs")  # for results, where no folder is named
MOST_RANKS = 1024  # processes that are started on a host
LARGEST = 2**63 - 1  # that an int64 holds, as lasp has numbers of tokens


def started_by_a_launcher() -> bool:
    """Whether torchrun, mpirun or srun started this process as one of several."""
    sizes = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS")
    return "RANK" in os.environ or any(os.environ.get(name, "1") != "1" for name in sizes)  # lasp.init reads them


def relaunch(script: str, ranks: int) -> NoReturn:
    """Become torchrun with the same command line."""
    if ranks > MOST_RANKS:
        refuse("--ranks", f"{ranks} processes are more than the {MOST_RANKS} that are started on a host")
    if not torch.cuda.is_available():  # the ranks share the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    os.execv(sys.executable, [sys.executable, *torchrun, script, *sys.argv[1:]])


def refuse(option: str, message: str) -> NoReturn:
    """End with a message about an option."""
    raise typer.BadParameter(message, param_hint=option)


def refuse_beyond_memory(option: str, what: str, nbytes: int, *, on_host: bool = False) -> None:
    """Refuse what takes more bytes than there are. `nbytes` is a part of what it takes, which nothing can do without,
    so that all is tried that may run."""
    if torch.cuda.is_available() and not on_host:
        where, held = "a GPU", torch.cuda.get_device_properties(0).total_memory
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        where, held = "this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:  # not known
        return
    if nbytes > held:
        refuse(option, f"{what} take {nbytes >> 30:,} GiB at least, and {where} has {held >> 30:,}")


def new_folder(kind: str) -> str:
    """Make a folder for results, named by their kind and the time at which rank 0 asks."""
    folder = RUNS / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder.mkdir(parents=True)
    return str(folder)
