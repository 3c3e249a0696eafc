"""`python -m lasp verify`: is a model that is split over ranks the whole one? It starts the ranks where nobody has."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from lasp.models import TNL, TNLConfig
from lasp.ranks import Env, init, init_mesh, waiting
from lasp.verification import verify


def run_verify(
    build: Callable[[], nn.Module],
    *,
    sp: int | None = None,
    layers: int | None = None,
    tokens: int | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    timeout: float = 60.0,
) -> int:
    """Verify the model that `build` makes, on the ranks that this was started with, else on as many as GPUs, or 2.

    Prints the table on rank 0. Returns 0 if the split model computes what the whole one does, else 1.
    """
    env = init(backend, timeout=timeout)
    if env.launcher == "single":
        _start_ranks(sp or (torch.cuda.device_count() if env.backend == "nccl" else 0) or 2, env)
    mesh = init_mesh(dp_shard=1 if sp is None else -1, sp=sp or -1)
    torch.manual_seed(0)  # the same weights on every rank
    model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{build.__qualname__} must return a torch.nn.Module, got {type(model).__name__}")
    found = verify(
        model.to(env.device), mesh, layers=layers, tokens=tokens, dtype=None if dtype is None else getattr(torch, dtype)
    )
    if env.rank == 0:
        print(found, flush=True)
    with waiting("lasp verify: the end of all ranks"):
        dist.barrier()  # a launcher ends all ranks when the first has failed
    dist.destroy_process_group()
    return 0 if found.ok else 1


def tnl(name: str, layers: int | None) -> Callable[[], nn.Module]:
    """Makes a TNL by its name; with fewer layers, for a machine that cannot hold it."""
    changes = {} if layers is None else {"layers": layers}
    config = TNLConfig.named(name, vocab_size=256, **changes)
    return lambda: TNL(config)


def load(target: str) -> Callable[[], nn.Module]:
    """The function that `package.module:function` names; it must take no argument and return a model.

    Raises:
        ValueError: no such thing.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise ValueError(f"expected module:function, such as my_package.model:build, got {target!r}")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"cannot find {target!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"{target!r} must be a function that returns a model, got {found!r}")
    return found  # type: ignore[return-value]


def _start_ranks(ranks: int, env: Env) -> None:
    """Become torchrun with the same command line. Does not return."""
    if env.device.type == "cpu":  # the ranks share the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "lasp", *sys.argv[1:]])
