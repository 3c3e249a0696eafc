"""Other packages' kernels of the delta rule, called alike: o of [q, k, v, beta] and, if there is one, log_decay.

All are [1, T, H, D] or [1, T, H], q, k, v and beta in bf16, log_decay in fp32: the log of what a token keeps, not
summed. Keys have unit length already. None gets or gives a state.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

import torch
from fla_families import delta_peer
from torch import Tensor

Call = Callable[[list[Tensor]], Tensor]

FORMS = {"fla": ("none", "token", "channel"), "flashqla": ("token",), "cudnn": ("token", "channel")}
_PACKAGES = {"fla": "fla-core", "flashqla": "flash-qla", "cudnn": "nvidia-cudnn-frontend"}


def peer(name: str, form: str) -> Call:
    """ImportError, or whatever the package raises, where it is not there or not for this machine."""
    return {"fla": _fla, "flashqla": _flashqla, "cudnn": _cudnn}[name](form)


def refusal(problem: Exception) -> str:
    """Why, in 200 characters: of a longer text the end, where cuDNN tells the reasons of its engines."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text if len(text) <= 200 else '... ' + text[-200:]}"


def versions(names: list[str]) -> list[str]:
    """Of the packages that are installed."""
    found = []
    for package in (_PACKAGES[name] for name in names):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} is not installed")
    return found


def _fla(form: str) -> Call:
    import fla  # type: ignore[import-not-found]  # noqa: F401

    rank = {"none": None, "token": 3, "channel": 4}[form]

    def call(x: list[Tensor]) -> Tensor:
        beside = delta_peer(rank, x[0].shape[-1] ** -0.5)
        return beside.call(dict(zip(("q", "k", "v", "beta", "log_decay"), x)))

    return call


def _flashqla(form: str) -> Call:
    """K = V = 128 only; it asserts so."""
    from flash_qla import chunk_gated_delta_rule  # type: ignore[import-not-found]

    return lambda x: chunk_gated_delta_rule(*x[:3], x[4], x[3], scale=x[0].shape[-1] ** -0.5)[0]


def _cudnn(form: str) -> Call:
    """Sequences lie behind each other there: [T, H, D], and their ends. Hopper's backward wants beta in fp32."""
    from cudnn import linear_attention  # type: ignore[import-not-found]

    function = {"token": linear_attention.gated_delta_net, "channel": linear_attention.kimi_delta_attention}[form]

    def call(x: list[Tensor]) -> Tensor:
        q, k, v, beta, log_decay = (y.flatten(0, 1) for y in x)
        ends = _ends(q.shape[0], q.device)
        return function(q, k, v, log_decay, beta.float(), ends, scale=q.shape[-1] ** -0.5)[0].unsqueeze(0)

    return call


@functools.cache
def _ends(T: int, device: torch.device) -> Tensor:
    return torch.tensor([0, T], dtype=torch.int32, device=device)
