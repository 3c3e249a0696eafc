"""Models of flash-linear-attention over NCCL, against fla's own kernels. For test_fla_gpu.py, or by hand:

    torchrun --nproc-per-node 2 tests/fla_on_gpus.py [names of fla_models.NAMES]

Logits and gradients of fla's model on the whole batch and of the split one, both in fp32 and in bf16, are compared with
the same in fp64 by PyTorch alone: the split model may be off twice as far as fla's own is. Where fla's kernels do not
serve, a bound takes their place. Triton's autotuner would try up to a hundred settings of each kernel: here the first
that runs is taken. Without GPUs it runs over gloo in fp32, and fla's kernels in Triton's interpreter
(TRITON_INTERPRET=1).
"""

import sys
import time

import fla_models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from triton.runtime.autotuner import Autotuner

import lasp

env = lasp.init(timeout=300)
GPU = env.device.type == "cuda"
TOKENS = 151 if GPU else 29
DTYPES = (torch.float32, torch.bfloat16) if GPU else (torch.float32,)
BOUNDS = {torch.float32: 3e-4, torch.bfloat16: 0.2}  # where there is nothing of fla's
SLACK = {torch.float32: 2e-5, torch.bfloat16: 1e-3}  # for what fla has better by chance
mesh = lasp.init_mesh(sp=env.world_size)
ids = torch.randint(0, 97, (2, TOKENS), generator=torch.Generator().manual_seed(3)).to(env.device)
batch = lasp.shard_batch({"input_ids": ids}, None)
local = lasp.shard_batch({"input_ids": ids}, mesh, pad=False)
start, end = local["layout"].bounds(env.rank)


def model_of(name, dtype):
    model = fla_models.build(name, torch.float32, for_kernels=GPU)
    with torch.no_grad():
        for p in model.parameters():  # the weights of all are the same
            p.copy_(p.bfloat16())
    return model.to(env.device, dtype)


def results(model, ids, labels, **given):
    """The logits and all gradients of the mean loss, in fp64."""
    logits = fla_models.logits_of(model(ids, **given))
    loss = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    (loss * (env.world_size if given else 1) / (batch["labels"] != -100).sum()).backward()
    if given:
        lasp.sync_grads(model, mesh)
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().double(), **gradients}


def whole(name, dtype):
    """fla's own model, or why it does not run."""
    try:
        found = results(model_of(name, dtype), ids, batch["labels"])
    except Exception as error:  # whatever fla or Triton raises where its kernels do not serve
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return {**found, "logits": found["logits"][:, start:end]}


def split(name, dtype):
    model = lasp.parallelize(model_of(name, dtype), mesh)
    return results(model, local["input_ids"], local["labels"], layout=local["layout"])


def off(found, exact):
    """By how much, relative to the norm, the logits and the worst gradient."""
    each = {key: float((found[key] - x).norm() / x.norm().clamp(min=1e-30)) for key, x in exact.items()}
    return each.pop("logits"), max(each.values())


class FirstThatRuns:
    """In place of the clock of Triton's autotuner: one setting of a kernel is as good as another if only it runs."""

    def __init__(self):
        self.bench, self.prune, self.found = Autotuner._bench, Autotuner.prune_configs, set()
        Autotuner._bench = lambda tuner, *args, **given: self.time(tuner, *args, **given)
        Autotuner.prune_configs = lambda tuner, *args, **given: self.start(tuner, *args, **given)

    def start(self, tuner, *args, **given):
        self.found.discard(id(tuner))
        return self.prune(tuner, *args, **given)

    def time(self, tuner, *args, config, **given):
        if id(tuner) in self.found:
            return [float("inf")] * 3
        # Without a GPU there is no clock of one.
        times = self.bench(tuner, *args, config=config, **given) if GPU else [0.0] * 3
        if times[0] < float("inf"):
            self.found.add(id(tuner))
        return times


def main():
    FirstThatRuns()
    names = sys.argv[1:] or fla_models.NAMES
    runs = []
    for name in names:
        for dtype in DTYPES:
            began = time.monotonic()
            own = whole(name, dtype)
            between = time.monotonic()
            runs.append((name, dtype, own, split(name, dtype), between - began, time.monotonic() - between))
            if env.rank == 0:
                print(f"{name} {dtype} ran in {time.monotonic() - began:.0f} s", flush=True)
    fla_models.without_kernels()
    exact, wrong = {}, []
    for name, dtype, own, found, *seconds in runs:
        exact[name] = exact.get(name) or whole(name, torch.float64)
        assert not isinstance(exact[name], str), exact[name]
        got = off(found, exact[name])
        allowed = (BOUNDS[dtype],) * 2
        if not isinstance(own, str):
            allowed = tuple(2 * x + SLACK[dtype] for x in off(own, exact[name]))
        ok = all(x <= y for x, y in zip(got, allowed))
        wrong += [] if ok else [name]
        if env.rank == 0:
            what = (
                own
                if isinstance(own, str)
                else f"fla's own {off(own, exact[name])[0]:.1e} {off(own, exact[name])[1]:.1e}"
            )
            times = " + ".join(f"{x:.0f}" for x in seconds)
            print(f"{name} {dtype}: {got[0]:.1e} {got[1]:.1e}, {what}; {times} s{'' if ok else ' WRONG'}", flush=True)
    assert not wrong, wrong
    dist.barrier()
    dist.destroy_process_group()
    print("passed", flush=True)


main()
