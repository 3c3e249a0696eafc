"""Tokens a second of a training step over the length of the sequence, from 1,024 to 16 million, on one GPU.

    python bench/lengths.py --save                                  # TNL-1B and a softmax model of its size beside it
    python bench/lengths.py --lengths 1024 16384 262144 --models tnl

A batch has as many sequences as make 32,768 tokens, or one. Weights and AdamW in fp32, arithmetic in bf16 by autocast.
TNL recomputes as few blocks as fit (`lasp.models.memory`), and above `--stream-above` tokens is streamed in segments of
32,768 (`lasp.stream_backward`). The softmax model is transformers' Llama with SDPA's flash kernel and TNL's width,
layers, gated units and vocabulary; all its blocks are recomputed where its activations would not fit. The loss of both
is `lasp.linear_token_loss`. A length that runs out of memory, or would take longer than `--limit` seconds for a step,
ends a model's row.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time

import plots
import torch
from common import add_report_arguments, command_line, report
from torch import Tensor, nn
from torch.optim import AdamW

import lasp
from lasp.models import TNL, TNLConfig
from lasp.models.memory import blocks_to_recompute, save_memory

LENGTHS = (1024, 4096, 16384, 32768, 65536, 131072, 262144, 1048576, 4194304, 16777216)
TOGETHER, SEGMENT = 32768, 32768
# tokens/s a GPU of a 1B model, two A100 80GB (arXiv 2401.04658, table 1): other cards, other vocabulary
PUBLISHED = {
    "Lightning Attention-2, published (two A100)": {1024: 20052, 8192: 19841, 32768: 19691, 65536: 20077},
    "LLaMA with FlashAttention-2, published (two A100)": {1024: 14897, 8192: 10887, 32768: 5836, 65536: 3820},
}


class Model:
    """One of the two, and its step."""

    def __init__(self, name: str, options: argparse.Namespace, tokens: int, *, stream: bool, device: torch.device):
        self.stream, self.device = stream, device
        torch.manual_seed(0)
        self.config = TNLConfig.named(options.model)
        with device:
            self.model = TNL(self.config) if name == "tnl" else softmax_model(self.config)
        lasp.parallelize(self.model, None, validate="off")
        self.head: nn.Module = self.model.head if name == "tnl" else self.model.lm_head  # type: ignore[assignment]
        self.recomputed = self._recompute(name, min(tokens, SEGMENT) if stream else tokens)
        self.optimizer = AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def _recompute(self, name: str, tokens: int) -> int:
        weights = sum(p.numel() for p in self.model.parameters())
        free = torch.cuda.mem_get_info(self.device)[0]
        blocks = blocks_to_recompute(self.config, tokens, free=free, parameters=14 * weights)
        if name == "tnl":
            save_memory(self.model.blocks, recompute=blocks)  # type: ignore[arg-type]
            return blocks
        if blocks:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            self.model.train()
        return self.config.layers if blocks else 0

    def step(self, ids: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            if self.stream:
                loss, _ = lasp.stream_backward(self.model, {"input_ids": ids}, mesh=None, segment=SEGMENT)
            else:
                batch = lasp.shard_batch({"input_ids": ids.to(self.device)}, None)
                loss, _ = lasp.linear_token_loss(self._hidden(batch), self.head.weight, batch["labels"], mesh=None)  # type: ignore[arg-type]
        if not self.stream:
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _hidden(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.model, TNL):
            return self.model(batch["input_ids"], batch["position_ids"], batch["layout"], return_hidden=True)
        return self.model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)[0]  # type: ignore[operator]


def softmax_model(config: TNLConfig) -> nn.Module:
    """As wide and deep as TNL."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.glu_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=2**24,
            attn_implementation="sdpa",
        )
    )


def measure(name: str, length: int, options: argparse.Namespace, device: torch.device) -> dict:
    """One row."""
    stream = name == "tnl" and length > options.stream_above
    batch = max(1, TOGETHER // length)
    model = Model(name, options, batch * length, stream=stream, device=device)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=draw)
    if stream:  # which compiles nothing that depends on the length
        model.step(ids[:, : 4 * SEGMENT])
    else:
        model.step(ids)
        model.step(ids)
    steps = 1 if length > 2**17 else 3
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    for _ in range(steps):
        loss = model.step(ids)
    value = loss.item()
    seconds = (time.perf_counter() - begin) / steps
    return {
        "model": name,
        "tokens of a sequence": length,
        "sequences": batch,
        "how": f"segments of {SEGMENT}" if stream else f"{model.recomputed} blocks recomputed",
        "seconds a step": seconds,
        "tokens/s": batch * length / seconds,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "loss": value,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1B")
    parser.add_argument("--models", nargs="+", choices=["tnl", "softmax"], default=["tnl", "softmax"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--stream-above", type=int, default=131072)
    parser.add_argument("--limit", type=float, default=20, help="seconds of a softmax model's step")
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    env = lasp.init()
    if env.device.type != "cuda":
        raise SystemExit("bench/lengths.py needs a GPU")
    rows: list[dict] = []
    for name in options.models:
        for length in sorted(options.lengths):
            before = [row for row in rows if row["model"] == name]
            if name == "softmax" and before and 4 * before[-1]["seconds a step"] > options.limit:
                print(f"{name}, {length}: not run, a step would take too long", file=sys.stderr)
                break
            try:
                rows.append(measure(name, length, options, env.device))
            except torch.OutOfMemoryError:
                print(f"{name}, {length}: out of memory", file=sys.stderr)
                break
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            print(rows[-1], file=sys.stderr, flush=True)
    kept = report(
        f"lengths_{options.model}",
        command_line("lengths.py", argv),
        rows,
        save=options.save,
        out=options.out,
        commit=options.commit,
        html=options.html,
        facts={"published": PUBLISHED},
        markdown=True,
    )
    if kept:
        plots.draw(kept)


if __name__ == "__main__":
    main()
