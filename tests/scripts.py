"""A script on ranks that it may end in any way: what each printed, and how it ended."""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from processes import LAUNCHER_PREFIXES, finish, free_port, start
from ranks import answers, ask_once, collect_rarely, measure_little, run_exit_functions, workers


def run_script(code, ranks, *, limit=100.0, agent=True):
    """Exit code, standard output and error of each rank of a script.

    With `agent` this process holds their key-value store, as torchrun's does; else rank 0 makes one.
    """
    return _run_ranks(run_processes, code, ranks, limit, agent, {})


def run_interpreted(code, ranks, *, limit=100.0):
    """`run_script` with Triton's kernels in its interpreter, for a test file and a script that import `interpreter`."""
    common = {"TRITON_INTERPRET": "1", "LASP_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}
    # Where there is a GPU, processes may be forked from one that has imported Triton to compile: take new ones.
    run = _run_new if torch.cuda.is_available() else run_processes
    return _run_ranks(run, code, ranks, limit, True, common)


def _run_ranks(run, code, ranks, limit, agent, common):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent else None
    all_have = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port if store else free_port())}
    all_have |= {"TORCHELASTIC_USE_AGENT_STORE": str(agent), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    all_have |= common
    return run(code, [{**all_have, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)], limit)


def _run_new(code, variables, limit):
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [start(code, {**own, **path}) for own in variables]
    texts = finish(processes, limit)
    return [(process.returncode, *text) for process, text in zip(processes, texts)]


def run_processes(code, variables, limit=100.0):
    """The same of processes that have these variables of launchers each, and no others. They are forked from one that
    has imported what takes long."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            workers().Process(target=_script, args=(code, own, Path(folder, str(number)), answers().name), daemon=True)
            for number, own in enumerate(variables)
        ]
        try:
            for process in processes:
                process.start()
            until = time.monotonic() + limit
            for process in processes:
                process.join(max(0.0, until - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.join()
        texts = [[Path(folder, f"{n}.{name}").read_text() for name in ("out", "err")] for n in range(len(processes))]
    return [(process.exitcode, *text) for process, text in zip(processes, texts)]


def _script(code, variables, path, of_all):
    """What Python does with a script."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(path.with_suffix(f".{name}"), os.O_CREAT | os.O_WRONLY), number)
    for name in list(os.environ):
        if name.startswith(LAUNCHER_PREFIXES):
            del os.environ[name]
    os.environ |= variables
    collect_rarely()
    measure_little()
    if "TRITON_INTERPRET" not in variables:  # other kernels may answer otherwise
        ask_once(of_all)
    torch.set_num_threads(1)
    try:
        exec(compile(code, "script", "exec"), {"__name__": "__main__"})
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        sys.stdout.flush()
        run_exit_functions()
