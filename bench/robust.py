"""Inference of TransNormerLLM in its two forms (arXiv 2307.14995, section 3.4), on any CPU or one GPU.

    python bench/robust.py [--save]

    origin     kv_t = kv_{t-1} + k_t lambda^{-t} v_t          o_t = q_t lambda^t kv_t
    robust     kv_t = lambda kv_{t-1} + k_t v_t               o_t = q_t kv_t

The same numbers, but lambda^{-t} is infinite from token ln(largest number) / s on, with lambda = exp(-s), and infinity
times zero is no number. B 2, H 8, 1,024 tokens, D 64, decays 2^-1 to 2^-8 of the heads (ALiBi slopes, as the released
weights have). A row a form and dtype: heads with NaN or infinity, the first token that has it, the one at which
lambda^{-t} by itself is infinite, and the largest error of o against fp64, relative to the largest o of its head, in
the other heads.
"""

from __future__ import annotations

import argparse
import math

import torch
from common import add_report_arguments, command_line, report
from torch import Tensor

import lasp
from lasp_kernels import linear_attention_step, recurrent_linear_attention

B, H, T, D = 2, 8, 1024, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def origin(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """o [B, T, H, D]; the sum and the powers in q's dtype."""
    kv = q.new_zeros(*q.shape[:1], q.shape[2], q.shape[3], v.shape[3])
    outputs = []
    for t in range(q.shape[1]):
        grown = (-log_decay * (t + 1)).exp().to(q.dtype)[:, None, None]
        kv = kv + grown * (k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2))
        shrunk = (log_decay * (t + 1)).exp().to(q.dtype)[:, None, None]
        outputs.append(((q[:, t].unsqueeze(-2) * shrunk) @ kv).squeeze(-2))
    return torch.stack(outputs, 1)


def robust(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """Ours: token by token, from a state in fp32."""
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], device=q.device)
    steps = [linear_attention_step(q[:, t], k[:, t], v[:, t], log_decay, state) for t in range(q.shape[1])]
    return torch.stack(steps, 1)


def inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the log-decays [H]."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=draw).to(device, dtype) for _ in range(3))
    return q, k, v, lasp.decay.alibi(H, 0, 1).to(device)


def row(name: str, dtype: torch.dtype, device: torch.device) -> dict:
    """Of a form in a dtype."""
    q, k, v, log_decay = inputs(dtype, device)
    o = {"origin": origin, "robust": robust}[name](q, k, v, log_decay).double()
    expected, _ = recurrent_linear_attention(q.double(), k.double(), v.double(), log_decay=log_decay.double())
    spoilt = ~o.isfinite().all(-1).all(0)  # [T, H]
    heads = spoilt.any(0)
    tokens = spoilt.any(1).nonzero()
    errors = (o - expected).abs().amax((0, 1, 3)) / expected.abs().amax((0, 1, 3))
    largest = math.log(torch.finfo(dtype).max)
    return {
        "form": name,
        "dtype": str(dtype).removeprefix("torch."),
        "heads with NaN": f"{int(heads.sum())} of {H}",
        "first at token": int(tokens[0]) + 1 if len(tokens) else None,
        "lambda^-t is infinite at": math.ceil(largest / -log_decay.min().item()) if name == "origin" else None,
        "error of the others": errors[~heads].max().item() if not heads.all() else None,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_report_arguments(parser)
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row(name, dtype, device) for dtype in DTYPES for name in ("origin", "robust")]
    report(
        "robust", command_line("robust.py", argv), rows, save=options.save, out=options.out, commit=options.commit,
        html=options.html,
        facts={"B, H, tokens, D": [B, H, T, D]}, markdown=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
