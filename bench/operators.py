"""The operators whose scaling is measured, by what decays: their inputs, a call, and the same in fp64 in one process.

`none`, `fixed` (one number a head, ALiBi), `token` and `channel` are `lasp.linear_attention`; `delta`, `gated_delta`
and `kda` are `lasp.delta_rule` without a decay, with one of each token, and with one of each channel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peers
import torch
import torch.nn.functional as F
from torch import Tensor

import lasp
from lasp_kernels import chunked_linear_attention
from lasp_kernels.delta_steps import chunked_delta_rule

LINEAR, DELTA = ("fixed", "none", "token", "channel"), ("delta", "gated_delta", "kda")
DECAYS = LINEAR + DELTA


def inputs(shape: peers.Shape, decay: str, seed: int) -> peers.Inputs:
    """Random, the same for a seed; in `extra` log_decay, fp32, whose state keeps some hundred tokens, and beta."""
    x = peers.Inputs.random(shape, seed)
    draw = torch.Generator(shape.device).manual_seed(seed + 1)
    rows = (shape.batch, shape.tokens, shape.heads)
    extra = {}
    if decay in ("token", "gated_delta", "channel", "kda"):
        size = rows if decay in ("token", "gated_delta") else (*rows, shape.dim)
        extra["log_decay"] = F.logsigmoid(torch.randn(size, generator=draw, device=shape.device)) / 16
    if decay in DELTA:
        extra["beta"] = torch.rand(rows, generator=draw, device=shape.device).to(shape.dtype)
        x = replace(x, k=F.normalize(x.k, dim=-1))
    return replace(x, extra=extra)


def call(x: peers.Inputs, decay: str, **options: Any) -> Tensor:
    """o; `options` say how the sequence lies on ranks."""
    options["scale"] = x.q.shape[-1] ** -0.5
    if decay in DELTA:
        return lasp.delta_rule(x.q, x.k, x.v, x.extra["beta"], log_decay=x.extra.get("log_decay"), **options)[0]
    return lasp.linear_attention(x.q, x.k, x.v, log_decay=_log_decay(x, decay), **options)[0]


def exact(x: peers.Inputs, decay: str) -> Tensor:
    """o of inputs in fp64, whole, in PyTorch."""
    scale = x.q.shape[-1] ** -0.5
    if decay in DELTA:
        more = {"log_decay": x.extra.get("log_decay"), "scale": scale}
        return chunked_delta_rule(x.q, x.k, x.v, x.extra["beta"], **more)[0]
    log_decay = _log_decay(x, decay)
    log_decay = None if log_decay is None else log_decay.double()
    return chunked_linear_attention(x.q, x.k, x.v, log_decay=log_decay, scale=scale)[0]


def _log_decay(x: peers.Inputs, decay: str) -> Tensor | None:
    return peers.fixed_decay(x.q.shape[2], x.q.device) if decay == "fixed" else x.extra.get("log_decay")
