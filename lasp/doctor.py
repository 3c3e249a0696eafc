"""A check of a machine: what is installed, whether ranks meet, whether results are right, how long a hop takes."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl

from lasp import exchange
from lasp.exchange import StateMap
from lasp.exchange.board import obstacle
from lasp.ops.attention import linear_attention
from lasp.ranks import SCHEDULES, Env, SequenceParallel, init, waiting
from lasp_kernels import fold, recurrent_linear_attention

# Relative Frobenius error allowed against the fp64 recurrence. bf16 has 8 bits, and its products are rounded twice.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def run_doctor(*, backend: str | None = None, timeout: float = 60.0) -> int:
    """Check the ranks that this was started with and print a report on rank 0. Returns 0 if all is well, else 1."""
    env = init(backend, timeout=timeout)
    say = print if env.rank == 0 else lambda *_: None
    for name, value in _environment(env):
        say(f"{name:<12}{value}")
    sequence = SequenceParallel(dist.group.WORLD, exchange="ring")
    say(f"\nlinear attention on {env.world_size} rank(s) against the fp64 recurrence, worst relative error")
    healthy = True
    for dtype, tolerance in _TOLERANCE.items():
        for form in ("none", "[H]", "[B,T,H]", "[B,T,H,K]"):
            forward, backward = _worst_over_ranks(_errors(form, dtype, env, sequence), env)
            passed = forward <= tolerance and backward <= tolerance  # also false for NaN
            healthy &= passed
            name = str(dtype).removeprefix("torch.")
            say(
                f"  {name:<9} log_decay {form:<10} forward {forward:.1e}  gradients {backward:.1e}  "
                f"{'ok' if passed else f'FAILED: more than {tolerance:.0e}'}"
            )
    if env.world_size > 1:
        say("\nexchange of one state, until the last rank has it, median of 20")
        for name in ("ring", "direct"):
            if SCHEDULES[name].reads and (reason := obstacle(sequence, env.device)):
                say(f"  {name:<9} not here: {reason}")
                continue
            for label, seconds, size in _latencies(env, SequenceParallel(dist.group.WORLD, exchange=name)):
                say(f"  {name:<9} {label:<9} {size / 2**20:6.2f} MiB  {seconds * 1e6:8.0f} us")
    say(f"\n{'all is well' if healthy else 'something is wrong: see FAILED above'}")
    with waiting("the end of the doctor: the meeting of all ranks"):
        dist.barrier()
    dist.destroy_process_group()
    return 0 if healthy else 1


def _environment(env: Env) -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    try:
        import triton

        yield "triton", triton.__version__
    except ImportError:
        yield "triton", "not installed"
    if env.device.type == "cuda":
        properties = torch.cuda.get_device_properties(env.device)
        yield "device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield "nccl", ".".join(map(str, nccl.version()))
    else:
        yield "device", f"cpu, {torch.get_num_threads()} threads"
    yield "backend", env.backend
    yield "ranks", f"{env.world_size} ({env.local_world_size} on this host), started by {env.launcher}"
    if env.launcher == "single":
        count = max(2, torch.cuda.device_count())
        yield "", f"(several: torchrun --nproc-per-node {count} -m lasp doctor)"


def _errors(form: str, dtype: torch.dtype, env: Env, sequence: SequenceParallel) -> tuple[float, float]:
    """Relative errors of this rank's output, and of its worst gradient. Shards differ in length."""
    H, K, V = 4, 32, 48
    lengths = [97 + 31 * (r % 3) for r in range(env.world_size)]
    start, T = sum(lengths[: env.rank]), sum(lengths)
    mine = slice(start, start + lengths[env.rank])
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, T, H, n, generator=generator) for n in (K, K, V, V))
    shape = {"none": None, "[H]": (H,), "[B,T,H]": (1, T, H), "[B,T,H,K]": (1, T, H, K)}[form]
    log_decay = None if shape is None else -0.3 * torch.rand(shape, generator=generator)

    rounded = [x.to(dtype) for x in (q, k, v, do)]
    whole = [x.double().requires_grad_() for x in rounded[:3]]
    expected, _ = recurrent_linear_attention(*whole, log_decay=None if log_decay is None else log_decay.double())
    expected_gradients = torch.autograd.grad(expected, whole, rounded[3].double())

    local = [x[:, mine].to(env.device).requires_grad_() for x in rounded[:3]]
    if log_decay is not None:
        log_decay = (log_decay if form == "[H]" else log_decay[:, mine]).to(env.device)
    o, _ = linear_attention(*local, log_decay=log_decay, sequence=sequence)
    gradients = torch.autograd.grad(o, local, rounded[3][:, mine].to(env.device))
    backward = [_relative(x, y[:, mine]) for x, y in zip(gradients, expected_gradients)]
    return _relative(o, expected[:, mine]), max(backward)


def _relative(x: Tensor, expected: Tensor) -> float:
    return ((x.double().cpu() - expected).norm() / expected.norm()).item()


def _worst_over_ranks(values: tuple[float, float], env: Env) -> tuple[float, float]:
    # NaN would vanish in a maximum, so it travels as infinity.
    worst = torch.tensor(values, dtype=torch.float64, device=env.device).nan_to_num(nan=float("inf"))
    with waiting("the doctor: the largest error of all ranks"):
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst[0].item(), worst[1].item()


def _latencies(env: Env, sequence: SequenceParallel) -> Iterator[tuple[str, float, int]]:
    """Seconds until the last rank has what all before it did, for a small state and one of a usual layer."""
    for label, shape in (("small", (1, 1, 16, 16)), ("layer", (1, 16, 128, 128))):
        state = torch.zeros(1, *shape, device=env.device)
        local = StateMap(state, state.new_zeros(1, *shape[:2], 1))
        times = []
        for _ in range(25):
            with waiting("the doctor: the meeting of all ranks"):
                dist.barrier()
            _synchronize(env)
            begin = time.perf_counter()
            exchange.start(local, sequence, fold=fold).wait()
            _synchronize(env)
            times.append(time.perf_counter() - begin)
        slowest = torch.tensor(statistics.median(times[5:]), device=env.device)
        with waiting("the doctor: the longest time of all ranks"):
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        yield label, slowest.item(), state.nbytes


def _synchronize(env: Env) -> None:
    if env.device.type == "cuda":
        torch.cuda.synchronize(env.device)
