"""Every schedule on real streams: bits of one rank, races, CUDA graphs. For test_exchange_gpu.py, or by hand:

    torchrun --nproc-per-node 4 tests/exchange_on_gpus.py

Without GPUs it runs over gloo, but for what only a GPU has.
"""

import random

import torch
import torch.distributed as dist

import lasp
from lasp import decay
from lasp.exchange import StateMap, Terms, cost, start
from lasp.ranks import SCHEDULES
from lasp_kernels import fold

H, D, T, SEGMENT = 4, 64, 512, 128


def report(env, text):
    if env.rank == 0:
        print(text, flush=True)


def exchanges(env):
    """Several under way at once, both ways, on ranks that come late: always the left fold of the ranks before."""
    rank, world = env.rank, env.world_size
    draw = torch.Generator().manual_seed(0)
    state = torch.randn(world, 3, 1, H, D, D, generator=draw).to(env.device)
    log_decay = -torch.rand(world, 3, 1, H, 1, generator=draw).to(env.device)
    log_decay[:, -1, :, 1:3] = -200.0  # two heads that no rank lets pass
    zeros = torch.zeros(1, H, D, D, device=env.device)
    expected = {}
    for reverse in (False, True):
        expected[reverse] = zeros
        for r in range(world - 1, rank, -1) if reverse else range(rank):
            expected[reverse] = fold(expected[reverse], state[r], log_decay[r])
    far = ((0, 1), (3, 4)) if world > 2 else None
    late = random.Random(rank)
    for schedule in SCHEDULES:
        sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
        for turn in range(10):
            if env.device.type == "cuda":
                torch.cuda._sleep(late.randrange(10**7))
            pending = []
            for reverse in (False, True, False, True):
                local = StateMap(state[rank].clone(), log_decay[rank].clone())
                pending.append(
                    (reverse, start(local, sequence, fold=fold, terms=Terms(reverse, far if turn % 2 else None)))
                )
                del local  # its memory must not be given to another before the exchange has read it
                torch.randn(3, 1, H, D, D, device=env.device)
            for reverse, exchange in pending:
                entering = exchange.wait()
                assert torch.equal(entering, expected[reverse]), f"{schedule}, turn {turn}, reverse {reverse}"
        report(env, f"exchange {schedule}: ok")


def inputs_of(form, env, dtype):
    draw = torch.Generator().manual_seed(1)
    whole = T * env.world_size
    q, k, v, do = (torch.randn(1, whole, H, D, generator=draw).to(env.device, dtype) for _ in range(4))
    g = None
    if form == "head":
        g = decay.fixed([-0.001, -0.01, -1.0, -2.0], env.device)
    elif form == "token":
        g = -0.1 * torch.rand(1, whole, H, generator=draw).to(env.device)
    return [q, k, v, do], g


def results(tensors, g, **options):
    q, k, v, do = tensors
    leaves = [x.detach().clone().requires_grad_() for x in ((q, k, v) if g is None or g.ndim == 1 else (q, k, v, g))]
    o, final = lasp.linear_attention(
        *leaves[:3], log_decay=leaves[3] if len(leaves) > 3 else g, output_final_state=True, **options
    )
    return [o.detach(), *torch.autograd.grad(o, leaves, do), final.detach()]


def operator(env):
    """The bits of one rank for every schedule and decay."""
    mine = slice(T * env.rank, T * (env.rank + 1))
    layout = lasp.ShardLayout((T,) * env.world_size)
    for form in ("none", "head", "token"):
        tensors, g = inputs_of(form, env, torch.bfloat16)
        whole = results(tensors, g, segment_length=SEGMENT)
        local, local_g = [x[:, mine] for x in tensors], g if form != "token" else g[:, mine]
        by_default = None
        for schedule in SCHEDULES:
            sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
            for known in (None, layout):
                options = {"sequence": sequence, "layout": known}
                found = results(local, local_g, segment_length=SEGMENT, **options)
                for n, (x, y) in enumerate(zip(found, whole)):
                    expected = y if n == len(found) - 1 else y[:, mine]
                    assert torch.equal(x, expected), f"result {n} of {form}, {schedule}, {known}"
                found = results(local, local_g, **options)
                by_default = by_default or found
                for n, (x, y) in enumerate(zip(found, by_default)):
                    assert torch.equal(x, y), f"by default, result {n} of {form}, {schedule}"
        report(env, f"operator {form}: ok")


def graphs(env, schedule):
    """Two captures of forward and backward, replayed in turn on other inputs; between them exchanges of other sizes."""
    tensors, g = inputs_of("head", env, torch.bfloat16)
    mine = slice(T * env.rank, T * (env.rank + 1))
    q, k, v, do = (x[:, mine].clone() for x in tensors)
    for x in (q, k, v):
        x.requires_grad_()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule, **VALIDATE_OFF)

    def step():
        o, _ = lasp.linear_attention(q, k, v, log_decay=g, sequence=sequence)
        return [o, *torch.autograd.grad(o, (q, k, v), do)]

    captures = []
    for heads in (H, 128):  # then an exchange that needs more memory than the graphs before know of
        captures.append(capture(step))
        wide = [torch.randn(1, T, heads, D, device=env.device, requires_grad=True) for _ in range(3)]
        o, _ = lasp.linear_attention(*wide, sequence=sequence)
        o.sum().backward()
        for _ in range(2):
            for n, (replay, outputs) in enumerate(captures):
                with torch.no_grad():
                    for x in (q, k, v, do):
                        x.copy_(torch.randn_like(x))
                replay()
                torch.cuda.synchronize()
                for m, (x, y) in enumerate(zip(outputs, step())):
                    assert torch.equal(x, y), f"result {m} of graph {n} with {schedule}, {heads} heads"
    report(env, f"graphs with {schedule}: ok")


def capture(step):
    """The replay of a graph of `step`, and what it writes to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, capture_error_mode="thread_local"):
        outputs = step()
    return captured.replay, outputs


# Comparing what ranks compute is for the host, which a graph leaves out; an option of later versions.
VALIDATE_OFF = {"validate": "off"} if "validate" in lasp.SequenceParallel.__dataclass_fields__ else {}


def main():
    env = lasp.init(timeout=60)
    exchanges(env)
    operator(env)
    if env.device.type == "cuda":
        graphs(env, "all_gather")
        graphs(env, "direct")
    network = cost.measure(lasp.SequenceParallel(dist.group.WORLD))
    report(env, f"{env.world_size} x {env.device.type}: {network}")
    dist.destroy_process_group()
    print(f"rank {env.rank}: passed")


if __name__ == "__main__":
    main()
