"""fla-core's function for a call of an operator of ours, and how its settings are compiled in bounded time.

fla tunes 24 to 48 settings of each of its kernels at its first call, which takes minutes, most of them the compiler's.
So processes beside this one compile a part of the settings each, all at once; Triton finds them on disk afterwards.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Peer(NamedTuple):
    """A function that computes the same as a module for the same arguments."""

    name: str
    call: Callable[[Mapping[str, Any]], Tensor]


def peer_of(module: nn.Module, given: Mapping[str, Any]) -> Peer | None:
    """What stands beside a call of a module of `lasp.modules` with the arguments `given`; None where nothing does."""
    kind = type(module).__name__
    if kind == "SoftmaxAttention":
        return Peer("sdpa flash", flash)
    scale = getattr(module, "scale", 1.0)
    decay = given.get("log_decay")
    if kind == "LightningAttention":
        fixed = module.log_decay(given["k"].device)  # type: ignore[operator]
        if decay is not None and decay.ndim == 4:
            return Peer("chunk_gla", lambda x: fla("gla", "chunk_gla")(*_qkv(x), x["log_decay"], scale=scale)[0])
        how = {"g_gamma": lambda x: fixed} if fixed is not None else {}
        how = {"g": lambda x: x["log_decay"]} if decay is not None else how

        def simple(x: Mapping[str, Any]) -> Tensor:
            more = {name: value(x) for name, value in how.items()}
            return fla("simple_gla", "chunk_simple_gla")(*_qkv(x), scale=scale, **more)[0]

        return Peer("chunk_simple_gla", simple)
    if kind == "DeltaRule":
        return delta_peer(None if decay is None else decay.ndim, scale)
    if set(given) == {"x", "log_decay"}:  # a recurrence of each channel by itself
        return Peer("chunk_hgrn", lambda x: fla("hgrn", "chunk_hgrn")(x["x"], x["log_decay"])[0])
    return None


def delta_peer(rank: int | None, scale: float) -> Peer:
    """Of the delta rule with a log_decay of so many dimensions: None, 3 or 4."""
    file, name = {
        None: ("delta_rule", "chunk_delta_rule"),
        3: ("gated_delta_rule", "chunk_gated_delta_rule"),
        4: ("kda", "chunk_kda"),
    }[rank]

    def delta(x: Mapping[str, Any]) -> Tensor:
        more = {} if rank is None else {"g": x["log_decay"]}
        return fla(file, name)(*_qkv(x), beta=x["beta"], scale=scale, **more)[0]

    return Peer(name, delta)


def flash(x: Mapping[str, Any]) -> Tensor:
    """Causal softmax attention of q, k, v [B, T, H, D] by PyTorch's flash kernel."""
    return _softmax(x, SDPBackend.FLASH_ATTENTION)


def scores(x: Mapping[str, Any]) -> Tensor:
    """The same with all scores in memory."""
    return _softmax(x, SDPBackend.MATH)


def _softmax(x: Mapping[str, Any], backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        o = F.scaled_dot_product_attention(*(x[name].transpose(1, 2) for name in ("q", "k", "v")), is_causal=True)
    return o.transpose(1, 2)


def _qkv(x: Mapping[str, Any]) -> list[Tensor]:
    return [x[name].contiguous() for name in ("q", "k", "v")]


def fla(file: str, name: str) -> Callable:
    """A function of fla.ops."""
    os.environ.setdefault("FLA_FLASH_QLA", "0")  # fla hands the gated delta rule to FlashQLA where that is installed
    return getattr(importlib.import_module(f"fla.ops.{file}"), name)


def version() -> str | None:
    """Of fla-core; None, and why on stderr, if it is not there."""
    try:
        import einops  # type: ignore[import-not-found]  # noqa: F401  # fla imports it late
        import fla  # type: ignore[import-not-found]
    except ImportError as missing:
        print(f"without fla: {missing}", file=sys.stderr)
        return None
    return fla.__version__


# ---- settings


_FILES = ("simple_gla", "gla", "delta_rule", "gated_delta_rule", "kda", "hgrn")


def _tuners() -> list[Any]:
    """Of all of fla's functions that are called here."""
    from triton.runtime.autotuner import Autotuner

    for file in _FILES:
        with contextlib.suppress(ImportError):  # that a call of it will tell
            importlib.import_module(f"fla.ops.{file}")
    return [x for x in gc.get_objects() if issubclass(type(x), Autotuner)]  # isinstance would ask odd objects


def compile_beside(command: list[str], seconds: float) -> float:
    """Run `command` with --compile-part N/M in processes, for so many seconds at most; how many it took."""
    begin, parts = time.perf_counter(), max(1, min(14, (os.cpu_count() or 4) - 2))
    processes = [
        subprocess.Popen(
            [*command, "--compile-part", f"{part}/{parts}"],
            env={**os.environ, "FLA_CACHE_RESULTS": "0"},
            stdout=subprocess.DEVNULL,
            stderr=None if part == 0 else subprocess.DEVNULL,
        )
        for part in range(parts)
    ]
    for process in processes:
        try:
            process.wait(max(1.0, seconds - (time.perf_counter() - begin)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.perf_counter() - begin


def compile_part(named: str, calls: Iterable[Callable[[], object]]) -> None:
    """In such a process: part N/M of the settings of what the calls need; what fails is told when it is timed."""
    _take_part(*map(int, named.split("/")))
    for call in calls:
        try:
            call()
            torch.cuda.synchronize()
        except Exception as problem:
            print(f"compiling: {type(problem).__name__}: {problem}", file=sys.stderr)


def _take_part(part: int, parts: int) -> None:
    """A tuner compiles and runs each setting of its part once, and measures none."""

    def share_of(prune: Callable) -> Callable:
        def pruned(*args: Any, **kwargs: Any) -> list[Any]:
            settings = list(prune(*args, **kwargs))
            return settings[part::parts] + settings[:1]

        return pruned

    for tuner in _tuners():
        tuner.prune_configs = share_of(tuner.prune_configs)
    measure_by(lambda call, quantiles=None, **_: (call(), [1.0, 1.0, 1.0])[1])


def measure_quickly() -> None:
    """Tuners take 10 ms a setting, in place of 125."""
    from triton.testing import do_bench

    measure_by(lambda call, quantiles=None, **_: do_bench(call, warmup=2, rep=8, quantiles=quantiles))


def measure_by(bench: Callable) -> None:
    """Give each tuner its way to measure."""
    for tuner in _tuners():
        try:
            tuner._do_bench = bench
            if tuner.do_bench is not bench:
                tuner.do_bench = bench
        except AttributeError:  # a property without a setter, which gives out what was set above
            pass
