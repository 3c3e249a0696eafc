"""What tests/test_transformers_gpu.py runs on every rank: models of transformers, split over GPUs, in fp32 and bf16.

In fp32 split against the library's own forward. In bf16 both are compared with the library's in fp32: what splitting
adds must stay within what bf16 does to the model anyway.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path("tests").resolve()))
import foreign

import lasp

env = lasp.init(timeout=120.0)
mesh = lasp.init_mesh(sp=env.world_size)
TOKENS = 517
NAMES = sys.argv[1:] or list(foreign.MODELS)
ids = torch.randint(3, 97, (2, TOKENS), generator=torch.Generator().manual_seed(3)).to(env.device)
local = lasp.shard_batch({"input_ids": ids}, mesh, pad=False)
labels = lasp.shard_batch({"input_ids": ids}, None)["labels"]
start, end = local["layout"].bounds(env.rank)


def loss_of(logits, labels):
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def whole(name, dtype):
    model = foreign.build(name, torch.float32).to(env.device, dtype)
    logits = model(ids, use_cache=False).logits
    (loss_of(logits, labels) / (labels != -100).sum()).backward()
    return logits.detach().float(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def split(name, dtype):
    model = foreign.build(name, torch.float32).to(env.device, dtype)
    lasp.parallelize(model, mesh["sp"])
    logits = model(local["input_ids"], layout=local["layout"]).logits
    (loss_of(logits, local["labels"]) * env.world_size / (labels != -100).sum()).backward()
    lasp.sync_grads(model, mesh)
    report = lasp.explain(model)
    return (
        logits.detach().float(),
        {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None},
        report,
    )


def worst(found, expected):
    """Of logits, and of all gradients together, which a single tiny one does not decide."""
    logits, gradients = found
    of_logits = foreign.relative(logits, expected[0][:, start:end] if logits.shape[1] != TOKENS else expected[0])
    names = expected[1]
    difference = torch.sqrt(sum((gradients[n] - names[n]).square().sum() for n in names))
    return of_logits, float(difference / torch.sqrt(sum(names[n].square().sum() for n in names)))


wrong = []
for name in NAMES:
    exact = whole(name, torch.float32)
    logits, gradients, report = split(name, torch.float32)
    fp32 = worst((logits, gradients), exact)
    own = worst(whole(name, torch.bfloat16), exact)
    logits, gradients, _ = split(name, torch.bfloat16)
    bf16 = worst((logits, gradients), exact)
    kernels = sorted({f"{row.operator} {row.kernels}".strip() for row in report})
    numbers = torch.tensor([*fp32, *own, *bf16], device=env.device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    fp32, own, bf16 = numbers[:2].tolist(), numbers[2:4].tolist(), numbers[4:].tolist()
    good = max(fp32) < 2e-3 and all(a < 1.5 * b + 1e-3 for a, b in zip(bf16, own))
    wrong += [] if good else [name]
    if env.rank == 0:
        text = "fp32 {:.1e} {:.1e}; bf16 of the library {:.1e} {:.1e}, split {:.1e} {:.1e}".format(*fp32, *own, *bf16)
        print(f"{name:16} {'ok ' if good else 'NOT'} logits, gradients: {text}; {', '.join(kernels)}", flush=True)
assert not wrong, wrong
torch.distributed.barrier()
print("passed", flush=True)
