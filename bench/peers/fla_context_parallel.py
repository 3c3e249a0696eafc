"""flash-linear-attention's context parallelism, of the delta rule with a decay: its scalar-gated and its KDA operator.

The delta rule computes more than a decayed sum, on one GPU too, so compare each with its own one-process time as well.
fla-core 0.6.0 exchanges by an all-gather of states and transitions that it waits for before its kernel starts. Its
delta rule without a decay has no context parallelism: that is the gated one here, with log-decays of 0.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lasp
from peers.base import Attention, Contiguous, Inputs, Shape


class FlaContextParallel(Contiguous):
    """By what decays: "delta" (nothing), "gated_delta" (a number a head and token), "kda" (each channel)."""

    name = "fla_cp"

    def __init__(self, decay: str = "gated_delta"):
        self.decay = decay
        kind = {"delta": "delta rule (gated by 0)", "gated_delta": "gated delta rule", "kda": "KDA"}[decay]
        self.what = f"{kind}, fla-core's context parallelism"

    def unavailable(self, shape: Shape, sequence: lasp.SequenceParallel) -> str | None:
        if shape.device.type != "cuda" or dist.get_backend(sequence.group) != "nccl":
            return "fla-core's context parallelism needs NVIDIA GPUs and NCCL"
        if torch.cuda.get_device_capability(shape.device) < (8, 0):
            return "fla-core's context parallelism needs an Ampere GPU or newer"
        if shape.batch != 1:
            return f"fla-core's context parallelism needs a batch of 1, got {shape.batch}"
        try:
            import fla.ops.cp  # type: ignore[import-not-found]
            import fla.ops.gated_delta_rule  # type: ignore[import-not-found]
            import fla.ops.kda  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as problem:
            return f"fla-core cannot be imported ({problem}); pip install fla-core==0.6.0"
        return None

    def inputs(self, shape: Shape, seed: int, tokens: int | None = None) -> Inputs:
        """With unit keys, a log-decay per token and a write strength (beta), as the op asks for."""
        x = Inputs.random(shape, seed, tokens)
        draw = torch.Generator(shape.device).manual_seed(seed + 1)
        size = x.q.shape[:3]
        log_decay, beta = (torch.rand(size, generator=draw, device=shape.device) for _ in range(2))
        extra = {"log_decay": -0.1 * log_decay, "beta": beta}
        return replace(x, k=F.normalize(x.k.float(), dim=-1).to(shape.dtype), extra=extra)

    def attention(self, shape: Shape, sequence: lasp.SequenceParallel) -> Attention:
        context = cp_context(shape.tokens, shape.device, sequence.group, sequence.size)
        return lambda x: call(x, self.decay, cp_context=context)

    def one_process(self, inputs: Inputs) -> Tensor:
        """By the kernels that run on ranks: those for packed sequences, of which there is one here."""
        ends = torch.tensor([0, inputs.q.shape[1]], dtype=torch.long, device=inputs.q.device)
        return call(inputs, self.decay, cu_seqlens=ends)


def cp_context(tokens: int, device: torch.device, group: Any, ranks: int) -> Any:
    """For ranks with so many tokens each of one sequence."""
    from fla.ops.cp import build_cp_context  # type: ignore[import-not-found]

    ends = torch.tensor([0, tokens * ranks], dtype=torch.long)
    return build_cp_context(ends.to(device), group, cu_seqlens_cpu=ends)


def call(x: Inputs, decay: str, **options: Any) -> Tensor:
    """o, scaled by 1 / sqrt(K); `options` say how the sequence lies on ranks."""
    os.environ.setdefault("FLA_FLASH_QLA", "0")  # fla hands the gated one to FlashQLA where that is installed
    beta = x.extra["beta"].to(x.q.dtype)
    if decay == "kda":
        from fla.ops.kda import chunk_kda  # type: ignore[import-not-found]

        return chunk_kda(x.q, x.k, x.v, x.extra["log_decay"], beta, **options)[0]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    log_decay = x.extra["log_decay"] if decay == "gated_delta" else torch.zeros(beta.shape, device=beta.device)
    return chunk_gated_delta_rule(x.q, x.k, x.v, log_decay, beta, **options)[0]
