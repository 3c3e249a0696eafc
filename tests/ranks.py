"""A pool of worker processes that stays up for all tests of a file, so that a distributed test costs milliseconds.

`run_ranks(world, fn, *args)` calls a top-level function on `world` ranks at once, each in a process of its own whose
default process group (gloo) has exactly those ranks. What the ranks return comes back as a list. An exception on any
rank, or a rank that hangs, fails the test and names the rank; the processes are then replaced by fresh ones.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import hashlib
import io
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
import weakref
from datetime import timedelta
from multiprocessing.connection import wait

import poison
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

TIMEOUT = 100.0  # seconds that a job may take; the first that compiles takes 12 of a core
GRACE = 3.0  # seconds that the other ranks have after one has failed
GROUPS = 48  # that a worker may hold after a job: each has sockets and two threads, for ever
GLOO_TIMEOUT = 30.0  # seconds after which gloo itself gives up, with a traceback

# What a first compilation imports, and what models of transformers and its Trainer do: 1 and 2 s of each worker. And
# what examples/ and some tests import.
COMPILERS = ["torch._dynamo", "torch._dynamo.backends.debugging", "torch._inductor.compile_fx"]
COMPILERS += ["torch._dynamo.repro.after_dynamo", "torch.distributed.tensor.experimental"]
OTHERS = ["pytest", "torch.distributed.checkpoint", "torch.distributed.optim", "typer.testing", "matplotlib.pyplot"]
TRANSFORMERS = ["transformers.trainer", "transformers.models.bamba.modeling_bamba"]

_pools: dict[int, "_Pool"] = {}


class RankError(AssertionError):
    """A job failed on the ranks that the message names."""


def run_ranks(world, fn, *args, timeout=TIMEOUT):
    """Call `fn(*args)` on ranks 0 to world - 1; returns what each of them returned."""
    if world not in _pools:
        _pools[world] = _Pool(world)
    pool = _pools[world]
    try:
        results = pool.run(fn, args, timeout)
    except BaseException:
        _pools.pop(world).kill()  # its groups may be in the middle of anything
        raise
    if pool.groups > GROUPS:
        _pools.pop(world).kill()
    return results


def workers():
    """How processes are started: a server that has imported what takes long forks them at once."""
    if sys.platform != "linux":  # forking is not safe there
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    wanted = [name for name in OTHERS if name in sys.modules]  # by a test file
    wanted += TRANSFORMERS if "transformers" in sys.modules else []
    if not torch.cuda.is_available():  # else importing them may start CUDA, which no forked process could use then
        wanted = [*COMPILERS, *wanted]
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "lasp", *wanted])
    return context


def collect_rarely():
    """Of what was imported nothing is garbage, and need not be looked through; Python looks for it every 700 objects,
    which takes 7% of the processor time of tests, and what they keep is small."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def measure_little():
    """Messages of 4 MB tell the bandwidth between ranks, ten of them in each new group: smaller ones do for tests."""
    from lasp.exchange import cost

    cost.LARGE = 2**19


def run_exit_functions():
    """As Python does when a process ends, and multiprocessing does not. But the libraries of PyTorch stay, which would
    take out their operators one by one."""
    for finalizer in list(weakref.finalize._registry):
        _, function, *_ = finalizer.peek() or (None, None)
        if function is torch.library._del_library:
            finalizer.atexit = False
    atexit._run_exitfuncs()


def shutdown():
    """End all workers."""
    while _pools:
        _pools.popitem()[1].kill()
    answers().cleanup()
    answers.cache_clear()


@functools.cache
def answers():
    """The folder in which workers of a file find what others were answered (`ask_once`)."""
    return tempfile.TemporaryDirectory()


@functools.cache
def sequence_of_all(exchange="auto"):
    """In a worker: the sequence over all its ranks. Its traffic adds up over jobs."""
    import lasp

    return lasp.SequenceParallel(dist.group.WORLD, exchange=exchange)


@functools.cache
def mesh_of(**axes):
    """In a worker: `lasp.init_mesh`, made once."""
    import lasp

    return lasp.init_mesh(**axes)


def of_one_rank(function, *args, group=None, **options):
    """In a worker: what a function returns that would return the same on all ranks of a group. One of them calls it."""
    found = [function(*args, **options) if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(found, group_src=0, group=group)
    return found[0]


def divided(function, cases):
    """In a worker: by case what a function returns that would return the same on all ranks. They share the cases."""
    cases, world = list(cases), dist.get_world_size()
    of_ranks = [None] * world
    dist.all_gather_object(of_ranks, {case: function(case) for case in cases[dist.get_rank() :: world]})
    return {case: of_ranks[number % world][case] for number, case in enumerate(cases)}


class _Pool:
    def __init__(self, world):
        context = workers()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.workers, self.pipes, self.groups = [], [], 0
        for rank in range(world):
            ours, theirs = context.Pipe()
            of_worker = (rank, world, self.store.port, theirs, answers().name)
            worker = context.Process(target=_work, args=of_worker, daemon=True)
            worker.start()
            theirs.close()
            self.workers.append(worker)
            self.pipes.append(ours)

    def run(self, fn, args, timeout):
        job = pickle.dumps((fn, args))
        for pipe in self.pipes:
            pipe.send_bytes(job)
        results, errors = {}, {}
        deadline = time.monotonic() + timeout
        while len(results) + len(errors) < len(self.pipes):
            open_pipes = [p for r, p in enumerate(self.pipes) if r not in results and r not in errors]
            ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    done, value, groups = pickle.loads(pipe.recv_bytes())
                    self.groups = max(self.groups, groups)
                except (EOFError, ConnectionError):
                    self.workers[rank].join(1)
                    done, value = False, f"the process died, exit code {self.workers[rank].exitcode}"
                (results if done else errors)[rank] = value
                if not done:
                    deadline = min(deadline, time.monotonic() + GRACE)
        silent = [r for r in range(len(self.pipes)) if r not in results and r not in errors]
        if errors or silent:
            raise RankError(_explain(errors, silent, len(self.pipes)))
        return [results[rank] for rank in range(len(self.pipes))]

    def kill(self):
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join()
        for pipe in self.pipes:
            pipe.close()


def _explain(errors, silent, world):
    parts = [f"rank {rank} of {world} failed:\n{text}" for rank, text in sorted(errors.items())]
    if silent:
        parts.append(f"rank {', '.join(map(str, silent))} of {world} did not finish and was killed")
    return "\n".join(parts)


def _work(rank, world, port, pipe, folder):
    threading.Thread(target=_die_with_parent, daemon=True).start()
    collect_rarely()
    torch.set_num_threads(1)
    poison.install()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    _one_device()
    ask_once(folder)
    measure_little()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    limit = timedelta(seconds=GLOO_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        try:
            fn, args = pickle.loads(job)
            if "lasp" in sys.modules:  # what an earlier job exchanged is no concern of this one's optimizers
                sys.modules["lasp"].ranks.group.forget_steps()
                sys.modules["lasp"].ranks.group.process.timeout = None  # nor is the timeout that its lasp.init was told
            answer = pickle.dumps((True, fn(*args), len(distributed_c10d._world.pg_map)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc(), 0))
        pipe.send_bytes(answer)


def _one_device():
    """All groups of this process share a device of gloo: each has a thread that wakes up a hundred times a second."""
    group, before = dist.ProcessGroupGloo, _threads()
    device, make = group.create_device(interface=os.environ["GLOO_SOCKET_IFNAME"]), group.__init__
    # While another thread holds the lock of a connection, that one asks again and again for its share of a core, which
    # who holds the lock may wait for: 30% of the processor time of test_streaming.py. So it is to come after others.
    for thread in _threads() - before:
        nice = os.getpriority(os.PRIO_PROCESS, thread)  # of all of these tests
        with contextlib.suppress(OSError):  # where a sandbox allows neither, tests take longer
            os.setpriority(os.PRIO_PROCESS, thread, min(nice + 10, 19))  # more would let it starve on busy cores
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))

    def make_on_device(self, store, rank, size, timeout, **more):
        options = group._Options()
        for name, value in {"_devices": [device], "_threads": 2, "_timeout": timeout, **more}.items():
            setattr(options, name, value)
        make(self, store, rank, size, options)

    group.__init__ = make_on_device


def _threads():
    return {int(name) for name in os.listdir("/proc/self/task")} if sys.platform == "linux" else set()


class _Bits(pickle.Pickler):
    """Of equal models the same bytes: tensors by what they hold."""

    def reducer_override(self, x):
        if not isinstance(x, torch.Tensor):
            return NotImplemented
        held = x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return tuple, ((str(x.dtype), tuple(x.shape), x.requires_grad, held),)


def ask_once(folder):
    """`parallelize` tries a model if no worker of the file has tried its equal before, of the same classes and weights.

    Else a file would try the same small model again for each mesh and scheme, on each rank: up to a third of its time.
    Ranks that come at once wait for the first. What cannot be pickled, as models of local classes, is always tried.
    """
    import lasp.api

    ask = lasp.api.refuse_mixers

    def once(model, layers, *changed):
        if changed:
            return ask(model, layers, *changed)
        bits = io.BytesIO()
        try:
            _Bits(bits).dump((model, {path: adapter for path, (_, adapter) in layers.items()}))
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, pickle.PicklingError):
            return ask(model, layers)
        with open(os.path.join(folder, hashlib.sha256(bits.getvalue()).hexdigest()), "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # which ends with the process, too
            file.seek(0)
            if known := file.read():
                return pickle.loads(known)
            answer = ask(model, layers)
            file.write(pickle.dumps(answer))
        return answer

    lasp.api.refuse_mixers = once


def _die_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
