"""`stream_backward` on GPUs, one or several: run by hand, alone or under torchrun, with PYTHONPATH=.:kernels:tests.

    python tests/stream_on_gpus.py                            against one pass: every operator, recompute, FSDP2; memory
    python tests/stream_on_gpus.py run 1B 8388608 16384       tokens/s and peak memory of an optimizer step of a TNL
    torchrun --nproc-per-node=2 tests/stream_on_gpus.py

`run` takes more: `--fsdp` (else each rank holds all weights), `--checkpoint` (blocks are recomputed inside a segment),
`--steps N`, and 0 for the segment, which then is chosen. The first ends with an error if something is off.
"""

from __future__ import annotations

import argparse
import copy
import time

import streamed_models
import torch
import torch.distributed as dist
from streamed_models import HYBRID, LINEAR, SHORT, STATES, Model, PerHead, SharedHeads, Softmax
from torch import nn
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.data_parallel import wrap_fsdp2
from lasp.models import TNL, TNLConfig

TOKENS, OFFSETS = 125, (0, 7, 8, 30, 31, 77, 125)


def one_pass(model, batch):
    """Loss and gradients on one rank."""
    whole = lasp.shard_batch(batch, None)
    loss, _ = lasp.token_loss(
        model(whole["input_ids"], whole["position_ids"], whole["layout"]), whole["labels"], mesh=None
    )
    loss.backward()
    return loss.detach(), gradients_of(model)


def gradients_of(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    return found


def compare(what, found, expected, bound):
    worst = max(((found[name] - x).norm() / x.norm()).item() for name, x in expected.items())
    say(f"{what}: worst relative difference of a gradient {worst:.1e}")
    assert worst < bound, what


def say(text):
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


def checks(mesh, device):
    """Small models in fp32 and under bf16 autocast, dense and packed, and a TNL with its kernels."""
    ids = torch.randint(streamed_models.VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    for layer in (streamed_models.PerHead, streamed_models.Initial):
        layer.decay = layer.decay.to(device)
    batches = {
        "dense": {"input_ids": ids.to(device)},
        "packed": {"input_ids": ids[:1].to(device), "cu_seqlens": OFFSETS},
    }
    for name, layers in (("linear", LINEAR), ("short", SHORT), ("states", STATES), ("hybrid", HYBRID)):
        reference = Model(*layers).to(device)
        model = copy.deepcopy(reference)
        lasp.parallelize(model, mesh["sp"], strict=False)
        for kind, batch in batches.items():
            loss, expected = one_pass(reference, batch)
            found, _ = lasp.stream_backward(model, batch, mesh=mesh, segment=32)
            lasp.sync_grads(model, mesh)
            compare(f"{name}, {kind}, fp32", gradients_of(model), expected, 1e-3)
            assert abs(found - loss) < 1e-4
    for wrap in (False, True):
        model = Model(*LINEAR, *SHORT).to(device)
        lasp.parallelize(model, mesh["sp"], strict=False)
        restored(mesh, wrap_fsdp2(model, mesh, blocks=model.layers) if wrap else model, batches["dense"])
    in_bf16(mesh, device, batches)
    config = TNLConfig(1000, layers=4, width=256, heads=4, glu_width=512)
    ids = torch.randint(1000, (1, 8192), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    reference = TNL(config).to(device)
    loss, expected = one_pass(reference, {"input_ids": ids.to(device)})
    for what in ("TNL", "TNL, blocks recomputed", "TNL, FSDP2"):
        model = copy.deepcopy(reference)
        lasp.parallelize(model, mesh["sp"], strict=False)
        if what.endswith("recomputed"):
            recompute_blocks(model)
        if what.endswith("FSDP2"):
            wrap_fsdp2(model, mesh, blocks=model.blocks)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found, _ = lasp.stream_backward(model, {"input_ids": ids}, mesh=mesh, segment=1024)  # ids on the host
        peak = torch.cuda.max_memory_allocated() - before
        if what.endswith("FSDP2"):
            gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
        else:
            lasp.sync_grads(model, mesh)
            gradients = gradients_of(model)
        compare(f"{what}, fp32, peak {peak / 2**20:.0f} MiB", gradients, expected, 2e-3)
        assert abs(found - loss) < 1e-4
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh["sp"], strict=False)
    results = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            lasp.stream_backward(model, {"input_ids": ids}, mesh=mesh, segment=1024)
        lasp.sync_grads(model, mesh)
        results.append(gradients_of(model))
    compare(
        "TNL, bf16 autocast",
        {k: x for k, x in results[0].items() if "delta" not in k},
        {k: x for k, x in expected.items() if "delta" not in k},
        0.1,
    )
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items()), "bits repeat"
    say(str(lasp.explain(model)).splitlines()[-1])
    memory_is_constant(mesh, reference)


def restored(mesh, model, batch):
    """After an error in the middle gradients are what they were, which were copied to the host beside the sweep."""
    lasp.stream_backward(model, batch, mesh=mesh, segment=32)
    before = {name: local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    calls = []

    def loss_fn(logits, labels):
        calls.append(1)
        if len(calls) == 6:  # three forwards of the sweep, two backwards are done
            raise OSError("in the middle")
        return logits.float().logsumexp(-1).sum(), (labels != -100).sum()

    try:
        lasp.stream_backward(model, batch, mesh=mesh, segment=32, loss_fn=loss_fn)
    except OSError:
        assert all(torch.equal(local(p.grad), before[name]) for name, p in model.named_parameters() if name in before)
        say("gradients after an error are what they were")
    else:
        raise AssertionError("no error")


def local(x):
    return x.to_local() if hasattr(x, "to_local") else x


def in_bf16(mesh, device, batches):
    """Softmax layers by flash kernels, whose pieces are merged."""
    reference = Model(PerHead, Softmax, SharedHeads, Softmax).to(device)
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh["sp"], strict=False)
    for kind, batch in batches.items():
        with torch.autocast("cuda", torch.bfloat16):
            loss, expected = one_pass(reference, batch)
            found, _ = lasp.stream_backward(model, batch, mesh=mesh, segment=32)
        lasp.sync_grads(model, mesh)
        compare(f"softmax, {kind}, bf16 autocast", gradients_of(model), expected, 0.1)
        assert abs(found - loss) < 2e-2


def memory_is_constant(mesh, reference):
    """Of a sequence 16 times as long."""
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh["sp"], strict=False)
    peaks = []
    for tokens in (8192, 8192, 131072):
        ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(2))
        torch.cuda.reset_peak_memory_stats()
        lasp.stream_backward(model, {"input_ids": ids}, mesh=mesh, segment=1024 * mesh["sp"].size())
        peaks.append(torch.cuda.max_memory_allocated())
    say(f"peak memory of 8,192 and of 131,072 tokens: {peaks[1] / 2**20:.0f} and {peaks[2] / 2**20:.0f} MiB")
    assert peaks[2] < 1.1 * peaks[1]


def recompute_blocks(model):
    """Blocks keep their inputs alone."""
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)


def run(arguments, mesh, device):
    """Optimizer steps over sequences of random tokens."""
    with device:
        model = TNL(TNLConfig.named(arguments.size))
    lasp.parallelize(model, mesh["sp"], strict=False)
    if arguments.checkpoint:
        recompute_blocks(model)
    if arguments.fsdp:
        wrap_fsdp2(model, mesh, blocks=model.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    vocabulary = model.config.vocab_size
    for step in range(arguments.steps):
        ids = torch.randint(vocabulary, (1, arguments.tokens), generator=torch.Generator().manual_seed(step))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.time()
        with torch.autocast("cuda", torch.bfloat16):
            loss, _ = lasp.stream_backward(
                model, {"input_ids": ids}, mesh=mesh, segment=arguments.segment or None, progress=arguments.progress
            )
        if not arguments.fsdp:
            lasp.sync_grads(model, mesh)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds = time.time() - start
        peak = torch.cuda.max_memory_allocated() / 2**30
        say(
            f"TNL-{arguments.size}, {arguments.tokens:,} tokens on {mesh['sp'].size()} ranks: loss {float(loss):.4f}, "
            f"norm {float(norm):.3f}, {seconds:.1f} s, {arguments.tokens / seconds:,.0f} tokens/s, peak {peak:.1f} GiB"
        )
    say(str(lasp.explain(model)).splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    running = commands.add_parser("run")
    running.add_argument("size")
    running.add_argument("tokens", type=int)
    running.add_argument("segment", type=int)
    running.add_argument("--steps", type=int, default=2)
    for name in ("fsdp", "checkpoint", "progress"):
        running.add_argument(f"--{name}", action="store_true")
    arguments = parser.parse_args()
    env = lasp.init()
    mesh = lasp.init_mesh(sp=env.world_size)
    run(arguments, mesh, env.device) if arguments.command == "run" else checks(mesh, env.device)
    dist.destroy_process_group()
    print("passed", flush=True)


if __name__ == "__main__":
    main()
