"""Loss and every gradient at dp x sp x tp = 2 x 2 x 2, which the routine tests, of four ranks, have not.

    torchrun --nproc-per-node 8 tests/tensor_parallel_on_eight.py

Each rank is a process of one thread: two cores take a minute.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from test_tensor_parallel import _gradients, _train

import lasp

SIZES = {"dp_shard": 2, "sp": 2, "tp": 2}

torch.set_num_threads(1)
env = lasp.init()
for family in ("tnl", "gla", "gated_delta_net", "mamba2", "hgrn2", "linear_transformer"):
    for scheme in ("sync_grads", "fsdp2"):
        _gradients(family, SIZES, scheme, fused=True)
        if env.rank == 0:
            print(f"{family}, {scheme}: loss, every gradient and their norm are those of one process", flush=True)
for scheme in ("sync_grads", "fsdp2"):
    _train(SIZES, scheme)
    _gradients("tnl", {"dp_replicate": 2, "dp_shard": 1, "sp": 2, "tp": 2}, scheme, fused=True)
    if env.rank == 0:
        print(f"tnl, {scheme}: three clipped steps of AdamW, and gradients with dp_replicate = 2", flush=True)
dist.destroy_process_group()
