"""Channels that decay each by itself, on GPUs: against an fp64 loop, with no wait of the host. For
test_elementwise_gpu.py, or by hand, which also prints times and memory:

    torchrun --nproc-per-node 2 tests/elementwise_on_gpus.py

Without GPUs it runs over gloo, but for what only a GPU has.
"""

import math
import time

import torch
import torch.distributed as dist

import lasp
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp.ranks import SCHEDULES
from lasp_kernels.elementwise import recurrent_elementwise
from lasp_kernels.selective_scan import SelectiveOperands, recurrent_selective_scan

T, PACKED = 197, (0, 5, 38, 38, 70, 197)


def report(env, text):
    if env.rank == 0:
        print(text, flush=True)


def gradients(f, x, dy):
    x = [y.clone().requires_grad_() for y in x]
    y = f(*x)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


def examples(channels):
    draw = torch.Generator().manual_seed(channels)
    normal = [torch.randn(1, T, channels, generator=draw) for _ in range(3)]
    decay = -(10 ** (8 * torch.rand(1, T, channels, generator=draw) - 4))
    decay[:, 50] = -math.inf
    yield elementwise_recurrence, recurrent_elementwise, (normal[0], decay), normal[2]

    def loop(*tensors, cu_seqlens):
        return recurrent_selective_scan(SelectiveOperands(*tensors), cu_seqlens=cu_seqlens)

    A, (B, C) = -torch.rand(channels, 7, generator=draw), torch.randn(2, 1, T, 7, generator=draw)
    yield selective_scan, loop, (normal[0], normal[1].exp(), A, B, C), normal[2]


def against_loop(env, channels, cu_seqlens):
    layout = lasp.ShardLayout.even(T, env.world_size, cu_seqlens=cu_seqlens)
    here = slice(*layout.bounds(env.rank))
    for operator, loop, x, dy in examples(channels):
        whole = lambda *x: loop(*x, cu_seqlens=cu_seqlens)  # noqa: B023, E731
        true = gradients(whole, [y.double() for y in x], dy.double())
        mine = [(y if y.shape[1] != T else y[:, here]).to(env.device) for y in x]  # A, which is no token's, whole
        for schedule in SCHEDULES:
            sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
            call = lambda *x: operator(*x, layout=layout, sequence=sequence)  # noqa: B023, E731
            for found, expected in zip(gradients(call, mine, dy[:, here].to(env.device)), true):
                if expected.shape[1] != T:
                    dist.all_reduce(found)
                part = expected if expected.shape[1] != T else expected[:, here]
                error = (found.double().cpu() - part).abs().max() / expected.abs().max()
                assert error < 2e-6, (operator.__name__, schedule, channels, cu_seqlens, float(error))


def without_waiting(env):
    """Documents that lie elsewhere at each call; the first calls measure and compare."""
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    tensors = next(examples(5))[2]
    for turn in range(6):
        layout = lasp.ShardLayout.even(T, env.world_size, cu_seqlens=(0, 5 + turn, 70, T))
        here = slice(*layout.bounds(env.rank))
        mine = [y[:, here].to(env.device) for y in tensors]
        call = lambda *x: elementwise_recurrence(*x, layout=layout, sequence=sequence)  # noqa: B023, E731
        dy = torch.ones_like(mine[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if turn > 1 else "default")
        gradients(call, mine, dy)
        torch.cuda.set_sync_debug_mode("default")


def times(env, tokens, channels=4096):
    sequence = lasp.SequenceParallel(dist.group.WORLD)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, device=env.device, dtype=dtype)

    u, B, C, dy = (normal(1, tokens, n, dtype=torch.bfloat16) for n in (channels, 16, 16, channels))
    dt, A = normal(1, tokens, channels).sigmoid(), -normal(channels, 16).exp()
    for operator, x in ((elementwise_recurrence, (u, -dt)), (selective_scan, (u, dt, A, B, C))):
        for _ in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, started = torch.cuda.memory_allocated(), time.perf_counter()
            gradients(lambda *x: operator(*x, sequence=sequence), x, dy)  # noqa: B023
            host = time.perf_counter() - started
            torch.cuda.synchronize()
            whole, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() - before
        report(
            env,
            f"{operator.__name__}, {tokens} tokens a rank, {channels} channels, bf16: forward and backward "
            f"{whole * 1e3:.1f} ms, the host {host * 1e3:.1f} ms, peak {peak / u.nbytes:.1f} times the input",
        )


def main():
    env = lasp.init(timeout=60)
    for channels in (1, 5, 64):
        for cu_seqlens in (None, PACKED):
            against_loop(env, channels, cu_seqlens)
    if env.device.type == "cuda":
        without_waiting(env)
        for tokens in (4096, 32768):
            times(env, tokens)
    dist.destroy_process_group()
    print(f"rank {env.rank}: passed")


if __name__ == "__main__":
    main()
