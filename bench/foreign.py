"""What it costs to split a model of transformers: tokens a second and memory, beside the library's own on one GPU.

    torchrun --nproc-per-node 2 bench/foreign.py --model minimax qwen3_next --tokens 32768

Random weights, about a billion parameters, bf16, gradient checkpointing, forward and backward of one sequence:

- `original`: the model as the library made it, on each GPU by itself, with as many tokens as a rank has
- `one rank`: the same after `parallelize` on one rank, which leaves it as it is
- `split`: one sequence of tokens x ranks, over all ranks
- `split, K and V gathered`: the same without an all-to-all over the heads of softmax layers (transformers offers that
  too, through DeepSpeed; for linear layers it offers nothing)
- `split, no exchange`: the same layers and shards, each rank by itself (linear layers do the same work; softmax layers
  see a shorter sequence)

and then a layer of each kind alone, split against by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import inspect
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import add_report_arguments, command_line, report
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import lasp
from lasp.adapters.border import Facts
from lasp.adapters.transformers import Mask
from lasp.ranks import alone

COMMON = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "max_position_embeddings": 1 << 20,
    "use_cache": False,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "minimax": (
        "MiniMax",
        {
            "num_hidden_layers": 12,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 2048,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            "num_hidden_layers": 12,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 4096,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 1024,
            "shared_expert_intermediate_size": 1024,
            "linear_num_value_heads": 16,
            "linear_num_key_heads": 8,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
        },
    ),
    "bamba": (
        "Bamba",
        {
            "num_hidden_layers": 16,
            "num_key_value_heads": 4,
            "intermediate_size": 6144,
            "mamba_n_heads": 64,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "attn_layer_indices": [3, 7, 11, 15],
        },
    ),
}


def build(name: str, **less) -> torch.nn.Module:
    prefix, sizes = MODELS[name]
    configs = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    config = getattr(configs, f"{prefix}Config")(**{**COMMON, **sizes, **less})
    config._attn_implementation = "sdpa"
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = getattr(modeling, f"{prefix}ForCausalLM")(config)
    return model.to(torch.bfloat16).train()


def seconds(step: Callable[[], None], repeats: int, ranks: bool) -> tuple[float, float]:
    """Median of a step, of the slowest rank, and the peak of memory in GiB."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(repeats):
        if ranks:
            dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    worst = torch.tensor(
        [statistics.median(found), torch.cuda.max_memory_allocated() / 2**30], dtype=torch.float64, device="cuda"
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst[0].item(), worst[1].item()


def training_step(model: torch.nn.Module, local: dict, split: bool) -> Callable[[], None]:
    more = {"layout": local["layout"]} if split else {"use_cache": False}

    def step() -> None:
        # Chunks of the sequence, so that logits of 32,000 words in fp32 are not what the memory measures.
        hidden = model.model(local["input_ids"], **more).last_hidden_state
        loss = 0.0
        for h, labels in zip(hidden.split(4096, 1), local["labels"].split(4096, 1)):
            loss = loss + checkpoint(part, model.lm_head, h, labels, use_reentrant=False)
        (loss / local["layout"].total).backward()
        model.zero_grad()

    return step


def part(head: torch.nn.Module, h: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = head(h).float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


def of_model(name: str, options: argparse.Namespace, mesh) -> tuple[list, list]:
    ranks, rows = dist.get_world_size(), []
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, COMMON["vocab_size"], (1, options.tokens * ranks), generator=generator).cuda()
    by_itself = lasp.shard_batch({"input_ids": ids[:, : options.tokens]}, None)
    local = lasp.shard_batch({"input_ids": ids}, mesh)

    def row(what: str, step: Callable[[], None], tokens: int, ranks_of: int) -> None:
        try:
            took, peak = seconds(step, options.repeats, ranks_of > 1)
        except torch.OutOfMemoryError:
            took = peak = float("nan")
        rows.append(
            {
                "model": name,
                "what": what,
                "parameters, billions": sum(p.numel() for p in model.parameters()) / 1e9,
                "GPUs": ranks_of,
                "tokens a GPU": tokens,
                "seconds": took,
                "tokens/s a GPU": tokens / took,
                "peak GiB": peak,
            }
        )
        if dist.get_rank() == 0:
            print(rows[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()

    model = build(name)
    model.gradient_checkpointing_enable()
    row("original", training_step(model, by_itself, False), options.tokens, 1)
    one = lasp.parallelize(model, None)
    row("one rank", training_step(one, by_itself, False), options.tokens, 1)
    del one, model
    model = build(name)
    lasp.parallelize(model, mesh["sp"])
    model.gradient_checkpointing_enable()
    row("split", training_step(model, local, True), options.tokens, ranks)
    with alone():
        row("split, no exchange", training_step(model, by_itself, True), options.tokens, ranks)
    gathered = build(name)
    lasp.parallelize(gathered, mesh["sp"], softmax="all_gather")
    gathered.gradient_checkpointing_enable()
    row("split, K and V gathered", training_step(gathered, local, True), options.tokens, ranks)
    del gathered
    return rows, of_layers(name, model, options, local, by_itself)


def of_layers(name: str, model: torch.nn.Module, options: argparse.Namespace, local: dict, by_itself: dict) -> list:
    """A mixer of each kind, forward and backward: split, and each rank by itself with as many tokens."""
    rows, ranks, shape = [], dist.get_world_size(), (1, options.tokens, COMMON["hidden_size"])
    kinds = {type(m).__name__: m for m in model.modules() if getattr(m, "sequence", None) is not None}
    for kind, layer in kinds.items():
        if isinstance(layer, PreTrainedModel):
            continue
        x = torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        found, takes = {}, inspect.signature(layer.forward).parameters
        for what, batch, place in (("split", local, contextlib.nullcontext()), ("by itself", by_itself, alone())):
            with place:
                given = {"position_embeddings": None, "attention_mask": Mask(None, None)}
                if "position_embeddings" in takes:
                    given["position_embeddings"] = model.model.rotary_emb(x, position_ids=batch["position_ids"][:1])
                if "scaling" not in vars(layer):  # no softmax
                    given["attention_mask"] = None
                given = {key: value for key, value in given.items() if key in takes}
                layer.sequence.border.facts = Facts(batch["layout"])

                def step(given=given, layer=layer, x=x) -> None:
                    out = layer(x, **given)
                    out = out[0] if isinstance(out, tuple) else out
                    out.backward(torch.ones_like(out))

                found[what], _ = seconds(step, 3 * options.repeats, what == "split")
                layer.sequence.border.facts = None
        rows.append(
            {
                "model": name,
                "layer": kind,
                "operators": " ".join(sorted(layer.sequence.by_operator)),
                "kernels": " ".join(sorted({t.kernels for t in layer.sequence.by_operator.values()} - {""})),
                "ranks": ranks,
                "tokens a rank": options.tokens,
                "split, ms": 1e3 * found["split"],
                "by itself, ms": 1e3 * found["by itself"],
                "split, % of by itself": 100 * found["by itself"] / found["split"],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=32768, help="of a rank")
    parser.add_argument("--repeats", type=int, default=3)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    env = lasp.init()
    mesh = lasp.init_mesh(sp=env.world_size)
    rows, layers = [], []
    for name in options.model:
        of_one, of_its_layers = of_model(name, options, mesh)
        rows, layers = rows + of_one, layers + of_its_layers
    if env.rank == 0:
        report(
            f"foreign_{env.world_size}xcuda",
            command_line("foreign.py", argv, env.world_size),
            rows,
            tables={"a layer of each kind, forward and backward": layers},
            save=options.save,
            out=options.out,
            commit=options.commit,
            html=options.html,
            markdown=True,
        )


if __name__ == "__main__":
    main()
