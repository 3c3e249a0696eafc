"""flash-linear-attention's context parallelism, of the gated delta rule: its scalar-gated operator that has one.

The delta rule computes more than a decayed sum, on one GPU too, so compare each with its own one-process time as well.
fla-core 0.6.0 exchanges by an all-gather of states and transitions that it waits for before its kernel starts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lasp
from peers.base import Attention, Contiguous, Inputs, Shape


class FlaContextParallel(Contiguous):
    name = "fla_cp"
    what = "gated delta rule, fla-core's context parallelism"

    def unavailable(self, shape: Shape, sequence: lasp.SequenceParallel) -> str | None:
        if shape.device.type != "cuda" or dist.get_backend(sequence.group) != "nccl":
            return "fla-core's context parallelism needs NVIDIA GPUs and NCCL"
        if torch.cuda.get_device_capability(shape.device) < (8, 0):
            return "fla-core's context parallelism needs an Ampere GPU or newer"
        if shape.batch != 1:
            return f"fla-core's context parallelism needs a batch of 1, got {shape.batch}"
        try:
            import fla.ops.cp  # type: ignore[import-not-found]
            import fla.ops.gated_delta_rule  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as problem:
            return f"fla-core cannot be imported ({problem}); pip install fla-core==0.6.0"
        return None

    def inputs(self, shape: Shape, seed: int, tokens: int | None = None) -> Inputs:
        """With unit keys, a decay per token in log space (g) and a write strength (beta), as the op asks for."""
        x = Inputs.random(shape, seed, tokens)
        draw = torch.Generator(shape.device).manual_seed(seed + 1)
        size = x.q.shape[:3]
        g, beta = (torch.rand(size, generator=draw, device=shape.device) for _ in range(2))
        return replace(x, k=F.normalize(x.k.float(), dim=-1).to(shape.dtype), extra={"g": -0.1 * g, "beta": beta})

    def attention(self, shape: Shape, sequence: lasp.SequenceParallel) -> Attention:
        from fla.ops.cp import build_cp_context  # type: ignore[import-not-found]

        ends = torch.tensor([0, shape.tokens * sequence.size], dtype=torch.long)
        context = build_cp_context(ends.to(shape.device), sequence.group, cu_seqlens_cpu=ends)
        return lambda x: _gated_delta_rule(x, cp_context=context)

    def one_process(self, inputs: Inputs) -> Tensor:
        return _gated_delta_rule(inputs)


def _gated_delta_rule(x: Inputs, **options) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    return chunk_gated_delta_rule(x.q, x.k, x.v, x.extra["g"], x.extra["beta"].to(x.q.dtype), **options)[0]
