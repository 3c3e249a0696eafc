"""A small training run over ranks, in which one rank does something bad at a chosen place. `inject.py` starts it.

Three linear-attention layers over dp x sp, a real loss, gradients averaged in one of three ways, AdamW, checkpoints,
some steps. What happens on each rank goes line by line into a file, with times of the clock that all processes of the
host share.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import torch
import torch.distributed as dist
from processes import place
from ranks import run_exit_functions
from small_model import VOCABULARY, Block, SmallModel
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2

LAYERS, STEPS, TOKENS = 3, 4, 11
START = 60.0  # seconds that ranks may need until the fault happens, or until they end if there is none
SCHEMES = ("sync", "ddp", "fsdp2")  # how gradients are averaged
COMPARED_EVERY = 2  # calls of a layer, instead of `lasp.checks.agreement.EVERY`

# Where something happens: in a layer, before the sum of the loss, before gradients are averaged, before a checkpoint.
IN_LAYER = ("forward", "backward")
PLACES = (*IN_LAYER, "loss", "sync", "save")
# What a rank can do. A wrong shape or dtype is that of a call which ranks compare, and a call is a forward.
KINDS = ("kill", "stop", "exit", "skip", "delay", "shape", "dtype")
COMPARED = ("shape", "dtype")
OF_LAYERS = (*COMPARED, "skip")  # what only a layer can have


@dataclass(frozen=True)
class Fault:
    """What one rank does, and where."""

    kind: str  # one of KINDS, or "none"
    rank: int = 0
    layer: int = 0
    step: int = 0
    place: str = "forward"
    exchange: str = "ring"
    store: str = "launcher"  # who holds the key-value store: the launcher, as with torchrun, or "rank 0"
    scheme: str = "sync"


@dataclass(frozen=True)
class Run:
    """How the ranks meet, and where they write."""

    ranks: int
    port: int
    folder: Path
    backend: str
    timeout: float
    devices: str = ""  # CUDA_VISIBLE_DEVICES, on GPUs
    dp: int = 1


# How a rank ends that waits in vain for another over NCCL: PyTorch's watchdog aborts the process after the group's
# timeout. By default it sleeps a minute before, four times the time that a dump of its records may take.
NCCL = {
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "100",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",  # no records: to look up the stack of a call may take 8 s
    # For a watchdog that hangs itself, in a call of CUDA; the process ends after two to three times that.
    "TORCH_NCCL_ENABLE_MONITORING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "10",
    "TORCH_NCCL_LOG_CPP_STACK_ON_UNCLEAN_SHUTDOWN": "0",
    # So nothing has to be compiled.
    "LASP_KERNELS": "reference",
}


def run_rank(rank: int, run: Run, fault: Fault) -> None:
    """The whole life of one rank."""
    os.setsid()  # a stopped process is continued when the shell that started its group ends
    threading.Thread(target=_end_with_parent, daemon=True).start()
    output = os.open(run.folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core of a process with a GPU takes long to write
    torch.set_num_threads(1)
    os.environ |= _environment(rank, run, fault)
    journal = Journal(run.folder / f"{rank}.jsonl")
    try:
        train(run, fault, journal)
        journal.write("done")
    except (Exception, CheckpointException) as error:
        sys.excepthook(*sys.exc_info())  # as of a script
        journal.write("error", type=type(error).__name__, text=str(error))
        sys.exit(1)
    finally:
        run_exit_functions()


def _environment(rank: int, run: Run, fault: Fault) -> dict[str, str]:
    """What a launcher would set, and how NCCL's watchdog ends a process. CUDA and NCCL read it when they start."""
    gpus = run.devices.count(",") + 1 if run.devices else run.ranks
    launcher = place(rank, run.ranks, gpus) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(run.port),
        "TORCHELASTIC_USE_AGENT_STORE": str(fault.store == "launcher"),
    }
    return launcher | ({"CUDA_VISIBLE_DEVICES": run.devices} | NCCL if run.backend == "nccl" else {})


def train(run: Run, fault: Fault, journal: Journal) -> None:
    """Write the loss of every step that ends."""
    env = lasp.init(run.backend, timeout=START)  # on a busy machine ranks may come seconds apart
    model = SmallModel()
    model.blocks.append(Block(torch.tensor([-0.5, -0.05, -2.0])))
    assert len(model.blocks) == LAYERS
    model.to(env.device)
    dist.barrier()  # CUDA has begun, which on a GPU that many processes start at once takes some of them seconds more
    lasp.init(run.backend, timeout=run.timeout)
    lasp.checks.agreement.EVERY = COMPARED_EVERY
    mesh = lasp.init_mesh(sp=-1, dp_shard=run.dp)
    step: int | None = None  # until training begins; what is there before parallelize is tried then, without fault

    def here(place: str) -> bool:
        return env.rank == fault.rank and fault.kind != "none" and (place, step) == (fault.place, fault.step)

    if env.rank == fault.rank and fault.place in IN_LAYER:
        misbehave(model.blocks[fault.layer].mixer.inner, fault, journal, lambda: here(fault.place))
    embedded: list[torch.Tensor] = []
    model.tokens.register_forward_hook(lambda module, inputs, x: embedded.append(x))
    lasp.parallelize(model, mesh["sp"], exchange=fault.exchange)
    trained = model
    if fault.scheme == "ddp":
        trained = wrap_ddp(model, mesh)
    elif fault.scheme == "fsdp2":
        wrap_fsdp2(model, mesh, blocks=model.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):  # `here` reads it
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCABULARY, (2 * run.dp, TOKENS), generator=draw)
        ids = ids.chunk(run.dp)[mesh["dp_shard"].get_local_rank()]
        local = lasp.shard_batch({"input_ids": ids.to(env.device)}, mesh)
        logits = trained(local["input_ids"], local["position_ids"])
        x = embedded.pop()
        if fault.scheme != "sync" and here("sync"):  # gradients are averaged as they come; those of the embedding last
            x.register_hook(lambda gradient: act(fault.kind, journal, gradient)[0])
        if here("loss"):
            act(fault.kind, journal)
        loss, _ = lasp.token_loss(logits, local["labels"], mesh=mesh)
        optimizer.zero_grad()
        loss.backward()
        if fault.scheme == "sync":
            if here("sync"):
                act(fault.kind, journal)
            lasp.sync_grads(model, mesh)
        optimizer.step()
        journal.write("loss", step=step, value=loss.item())
        state = {"model": get_model_state_dict(model)}
        if here("save"):
            act(fault.kind, journal)
        with lasp.ranks.waiting("saving a checkpoint"):
            state_dict_saver.save(state, checkpoint_id=run.folder / f"step-{step}")
    if env.device.type == "cuda":
        torch.cuda.synchronize()  # also the stream of the exchanges, on which one may still wait for a rank
    dist.barrier()
    dist.destroy_process_group()


def misbehave(layer, fault: Fault, journal: Journal, here) -> None:
    """Change the layer's forward so that the fault happens when its step comes, once."""
    sound = layer.forward

    def forward(q, k, v, **options):
        if not here():
            return sound(q, k, v, **options)
        if fault.place == "forward":
            q, k, v = act(fault.kind, journal, q, k, v)
            return v.clone() if fault.kind == "skip" else sound(q, k, v, **options)
        o = sound(q, k, v, **options)
        if fault.kind == "skip":
            journal.write("fault")
            return o.detach()
        o.register_hook(lambda gradient: act(fault.kind, journal, gradient)[0])
        return o

    layer.forward = forward


def act(kind: str, journal: Journal, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Do it; returns what the rank goes on with, if it does."""
    journal.write("fault")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "exit":
        sys.exit(0)
    elif kind == "delay":
        time.sleep(DELAY)
    elif kind == "shape":
        return tuple(x[..., :-1, :] for x in tensors)  # a head is missing
    elif kind == "dtype":
        return tuple(x.double() for x in tensors)
    return tensors


DELAY = 1.0  # seconds


class Journal:
    """Lines of JSON, each with the time; written at once, since the process may not live long."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, event: str, **facts) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "time": time.monotonic(), **facts}) + "\n")


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
