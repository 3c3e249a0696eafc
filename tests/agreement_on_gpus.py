"""What ranks compare, where the host waits for no message. For test_agreement_gpu.py, or by hand:

    WAY=heads torchrun --nproc-per-node 2 tests/agreement_on_gpus.py

Each way to differ ends a run: over NCCL the messages of the others are still in flight then. Without GPUs it runs over
gloo, where the same errors come before anything is sent.
"""

import os
import time

import torch
from small_model import VOCABULARY, SmallModel

import lasp
from lasp.ranks import all_peers

WAYS = (
    *("correct", "heads", "dtype", "swapped", "weights", "not averaged", "frozen", "step", "batch"),
    *("scale", "evaluation", "learning rate", "loss"),
)
TIMEOUT = 20.0  # seconds


def train(way, env):
    """Some steps, in the third of which the last rank does something else."""
    odd = env.rank == env.world_size - 1
    mesh = lasp.init_mesh(dp_shard=1, sp=-1)
    model = SmallModel().to(env.device)
    lasp.parallelize(model, mesh["sp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for n in range(4):
        draw = torch.Generator().manual_seed(n + (way == "batch" and odd))
        ids = torch.randint(0, VOCABULARY, (2 + (n == 3), 6 + n), generator=draw).to(env.device)
        if n == 2 and odd:
            differ(way, model, optimizer)
        local = lasp.shard_batch({"input_ids": ids}, mesh)
        loss, _ = lasp.token_loss(model(local["input_ids"], local["position_ids"]), local["labels"], mesh=mesh)
        optimizer.zero_grad()
        (2 * loss if way == "loss" and n == 1 and odd else loss).backward()
        if way != "not averaged":
            lasp.sync_grads(model, mesh)
        if way == "weights" and n == 1 and odd:
            with torch.no_grad():
                model.head.weight[3, 4] += 1
        optimizer.step()


def differ(way, model, optimizer):
    inner = model.blocks[1].mixer.inner
    sound = inner.forward
    if way == "heads":
        inner.forward = lambda q, k, v, **o: sound(*[torch.cat([x, x], 2) for x in (q, k, v)], **o)[:, :, : q.shape[2]]
    elif way == "dtype":
        inner.forward = lambda q, k, v, **o: sound(q.double(), k.double(), v.double(), **o).to(q.dtype)
    elif way == "swapped":
        model.blocks = torch.nn.ModuleList(list(model.blocks)[::-1])
    elif way == "frozen":
        model.tokens.requires_grad_(False)
    elif way == "scale":
        inner.scale = 0.25
    elif way == "evaluation":
        model.eval()
    elif way == "learning rate":
        optimizer.param_groups[0]["lr"] = 0.1
    elif way == "step":
        optimizer.step()


def main():
    way = os.environ["WAY"]
    # Those who average gradients wait elsewhere for the rank that asks which parameters these are.
    expected = (lasp.RankMismatchError, lasp.PeerError) if way == "frozen" else lasp.RankMismatchError
    env = lasp.init(timeout=TIMEOUT)
    started = time.monotonic()
    try:
        train(way, env)
    except expected as error:
        took = time.monotonic() - started
        print(f"rank {env.rank}: {type(error).__name__} after {took:.1f} s: {error}", flush=True)
        assert way != "correct"
    else:
        assert way == "correct", f"rank {env.rank}: nothing was noticed of {way}"
        kinds = [kind for peers in all_peers() for kind in peers.agreed]
        # Of states with and without decay, forward and backward, for two sizes of batches; and of gradients.
        assert len(kinds) == (9 if env.device.type == "cuda" else 0), kinds
    print(f"rank {env.rank}: passed", flush=True)
    os._exit(0)  # what is in flight over NCCL would keep this process


if __name__ == "__main__":
    main()
