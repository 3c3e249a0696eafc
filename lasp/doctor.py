"""A check of a machine: what is installed, whether ranks meet, whether results are right, how long a hop takes, and a
step of decoding."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.cuda import nccl

from lasp import exchange
from lasp.exchange import StateMap
from lasp.exchange.board import obstacle
from lasp.layout import ShardLayout
from lasp.ops.attention import linear_attention
from lasp.ops.delta import delta_rule
from lasp.ops.elementwise import elementwise_recurrence, selective_scan
from lasp.ops.halo import block_attention, causal_conv
from lasp.ops.softmax import softmax_attention
from lasp.ranks import SCHEDULES, Env, SequenceParallel, init, waiting
from lasp_kernels import delta_rule_step, fold, linear_attention_step, recurrent_linear_attention
from lasp_kernels.delta import recurrent_delta_rule
from lasp_kernels.elementwise import recurrent_elementwise
from lasp_kernels.selective_scan import SelectiveOperands, recurrent_selective_scan

# Relative Frobenius error allowed against the fp64 recurrence. bf16 has 8 bits, and its products are rounded twice.
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
_OF_CONVOLUTION = 1e-3  # PyTorch lets a GPU's convolutions of fp32 round their inputs to TF32
H, K, V, WINDOW = 4, 32, 48, 4
_HEADS, _DIM = 16, 128  # of a decode step: those of a usual model


class Case(NamedTuple):
    """An operator, on inputs whose decays are as `form` says."""

    operator: str
    form: str
    inputs: dict[str, tuple[int, ...]]  # random numbers of a token, by name
    run: Callable[..., Tensor]  # of the inputs of this rank's tokens, layout= and sequence=
    whole: Callable[..., Tensor]  # of those of all tokens, in fp64


def run_doctor(*, backend: str | None = None, timeout: float = 60.0) -> int:
    """Check the ranks that this was started with and print a report on rank 0. Returns 0 if all is well, else 1."""
    env = init(backend, timeout=timeout)
    say = print if env.rank == 0 else lambda *_: None
    for name, value in _environment(env):
        say(f"{name:<12}{value}")
    sequence = SequenceParallel(dist.group.WORLD, exchange="ring")
    say(f"\noperators on {env.world_size} rank(s) against the fp64 recurrence, worst relative error")
    healthy = True
    for case, dtype in _cases():
        tolerance = _OF_CONVOLUTION if case.operator == "causal_conv" else _TOLERANCE[dtype]
        forward, backward = _worst_over_ranks(_errors(case, dtype, env, sequence), env)
        passed = forward <= tolerance and backward <= tolerance  # also false for NaN
        healthy &= passed
        name = str(dtype).removeprefix("torch.")
        say(
            f"  {case.operator:<23}{case.form:<14}{name:<9} forward {forward:.1e}  gradients {backward:.1e}  "
            f"{'ok' if passed else f'FAILED: more than {tolerance:.0e}'}"
        )
    say(f"\ndecode step of one sequence, {_HEADS} heads of {_DIM} in bf16, in a layer of a model; rank 0")
    for name, error, step, floor in _steps(env):
        passed = error <= _TOLERANCE[torch.bfloat16]
        healthy &= _worst_over_ranks((error, error), env)[0] <= _TOLERANCE[torch.bfloat16]
        say(
            f"  {name:<23}{step * 1e6:8.1f} us, moving its state {floor * 1e6:6.1f} us, error {error:.1e}  "
            f"{'ok' if passed else 'FAILED: more than ' + format(_TOLERANCE[torch.bfloat16], '.0e')}"
        )
    if env.world_size > 1:
        say("\nexchange of one state, until the last rank has it, median of 20")
        for name in ("ring", "direct"):
            if SCHEDULES[name].reads and (reason := obstacle(sequence, env.device)):
                say(f"  {name:<9} not here: {reason}")
                continue
            for label, seconds, size in _latencies(env, SequenceParallel(dist.group.WORLD, exchange=name)):
                say(f"  {name:<9} {label:<9} {size / 2**20:6.2f} MiB  {seconds * 1e6:8.0f} us")
    say(f"\n{'all is well' if healthy else 'something is wrong: see FAILED above'}")
    with waiting("the end of the doctor: the meeting of all ranks"):
        dist.barrier()
    dist.destroy_process_group()
    return 0 if healthy else 1


def _environment(env: Env) -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    try:
        import triton

        yield "triton", triton.__version__
    except ImportError:
        yield "triton", "not installed"
    if env.device.type == "cuda":
        properties = torch.cuda.get_device_properties(env.device)
        yield "device", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        yield "nccl", ".".join(map(str, nccl.version()))
    else:
        yield "device", f"cpu, {torch.get_num_threads()} threads"
    yield "backend", env.backend
    yield "ranks", f"{env.world_size} ({env.local_world_size} on this host), started by {env.launcher}"
    if env.launcher == "single":
        count = max(2, torch.cuda.device_count())
        yield "", f"(several: torchrun --nproc-per-node {count} -m lasp doctor)"


def _cases() -> Iterator[tuple[Case, torch.dtype]]:
    """Linear attention with every form of decay in two dtypes, and the other operators once."""
    for dtype in _TOLERANCE:
        for form in ("none", "[H]", "[B, T, H]", "[B, T, H, K]"):
            yield _linear(form), dtype
    for case in (_delta("[B, T, H]"), _delta("[B, T, H, K]"), _channels(), _selective(), *_softmax(), _convolution()):
        yield case, torch.float32


_QKV = {"q": (H, K), "k": (H, K), "v": (H, V)}


def _linear(form: str) -> Case:
    of_token = {"[B, T, H]": {"g": (H,)}, "[B, T, H, K]": {"g": (H, K)}}.get(form, {})

    def decay(q: Tensor, g: Tensor | None) -> Tensor | None:
        if form == "[H]":
            return -0.3 * torch.arange(1, H + 1, device=q.device) / H
        return None if g is None else -0.3 * torch.sigmoid(g.to(torch.promote_types(g.dtype, torch.float32)))

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, **options: Any) -> Tensor:
        return linear_attention(q, k, v, log_decay=decay(q, g), **options)[0]

    def whole(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
        return recurrent_linear_attention(q, k, v, log_decay=decay(q, g))[0]

    return Case("linear_attention", form, {**_QKV, **of_token}, run, whole)


def _delta(form: str) -> Case:
    def given(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return q, k, v, torch.sigmoid(b), -0.3 * torch.sigmoid(g)

    def run(*inputs: Tensor, **options: Any) -> Tensor:
        q, k, v, beta, log_decay = given(*inputs)
        return delta_rule(q, k, v, beta, log_decay=log_decay, **options)[0]

    def whole(*inputs: Tensor) -> Tensor:
        q, k, v, beta, log_decay = given(*inputs)
        return recurrent_delta_rule(q, k, v, beta, log_decay=log_decay)[0]

    decays = (H,) if form == "[B, T, H]" else (H, K)
    return Case("delta_rule", form, {**_QKV, "b": (H,), "g": decays}, run, whole)


def _channels() -> Case:
    def run(x: Tensor, g: Tensor, **options: Any) -> Tensor:
        return elementwise_recurrence(x, -torch.sigmoid(g), **options)

    def whole(x: Tensor, g: Tensor) -> Tensor:
        return recurrent_elementwise(x, -torch.sigmoid(g))

    return Case("elementwise_recurrence", "[B, T, ...]", {"x": (K,), "g": (K,)}, run, whole)


def _selective() -> Case:
    def given(u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> SelectiveOperands:
        A = -torch.arange(1, 9, device=u.device, dtype=u.dtype).expand(K, 8)
        return SelectiveOperands(u, F.softplus(dt - 2), A, B, C)

    def run(*inputs: Tensor, **options: Any) -> Tensor:
        return selective_scan(*given(*inputs), **options)

    def whole(*inputs: Tensor) -> Tensor:
        return recurrent_selective_scan(given(*inputs))

    return Case("selective_scan", "dt A", {"u": (K,), "dt": (K,), "B": (8,), "C": (8,)}, run, whole)


def _softmax() -> Iterator[Case]:
    yield Case(
        "softmax_attention",
        "none",
        _QKV,
        lambda *qkv, **options: softmax_attention(*qkv, **options),
        lambda *qkv: _masked(*qkv, block=None),
    )
    block = 13  # at no border of a rank
    yield Case(
        "block_attention",
        "none",
        _QKV,
        lambda q, k, v, **options: block_attention(q, k, v, block, **options),
        lambda *qkv: _masked(*qkv, block=block),
    )


def _masked(q: Tensor, k: Tensor, v: Tensor, block: int | None) -> Tensor:
    t = torch.arange(q.shape[1])
    unseen = t > t[:, None]
    if block is not None:
        unseen |= t // block != t[:, None] // block
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * K**-0.5
    return torch.einsum("bhij,bjhv->bihv", scores.masked_fill(unseen, -torch.inf).softmax(-1), v)


def _convolution() -> Case:
    def weight(x: Tensor) -> Tensor:
        return torch.linspace(-1, 1, K * WINDOW, device=x.device, dtype=x.dtype).view(K, WINDOW)

    def run(x: Tensor, **options: Any) -> Tensor:
        return causal_conv(x, weight(x), **options)

    def whole(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, WINDOW - 1, 0))
        taps = zip(weight(x).unbind(1), (padded[:, j : j + x.shape[1]] for j in range(WINDOW)))
        return sum((tap * seen for tap, seen in taps), torch.zeros_like(x))

    return Case("causal_conv", "none", {"x": (K,)}, run, whole)


def _errors(case: Case, dtype: torch.dtype, env: Env, sequence: SequenceParallel) -> tuple[float, float]:
    """Relative errors of this rank's output, and of its worst gradient. Shards differ in length."""
    lengths = tuple(97 + 31 * (r % 3) for r in range(env.world_size))
    start, T = sum(lengths[: env.rank]), sum(lengths)
    mine = slice(start, start + lengths[env.rank])
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(1, T, *shape, generator=generator).to(dtype) for shape in case.inputs.values()]

    whole = [x.double().requires_grad_() for x in rounded]
    expected = case.whole(*whole)
    do = torch.randn(expected.shape, generator=generator).to(dtype)
    expected_gradients = torch.autograd.grad(expected, whole, do.double())

    local = [x[:, mine].to(env.device).requires_grad_() for x in rounded]
    o = case.run(*local, layout=ShardLayout(lengths), sequence=sequence)
    gradients = torch.autograd.grad(o, local, do[:, mine].to(env.device))
    pairs = zip(case.inputs, gradients, expected_gradients)
    backward = [_relative(x, y[:, mine]) for name, x, y in pairs if name != "g"]  # a decay's gradient is a long sum
    return _relative(o, expected[:, mine]), max(backward)


def _relative(x: Tensor, expected: Tensor) -> float:
    return ((x.double().cpu() - expected).norm() / expected.norm()).item()


def _worst_over_ranks(values: tuple[float, float], env: Env) -> tuple[float, float]:
    # NaN would vanish in a maximum, so it travels as infinity.
    worst = torch.tensor(values, dtype=torch.float64, device=env.device).nan_to_num(nan=float("inf"))
    with waiting("the doctor: the largest error of all ranks"):
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst[0].item(), worst[1].item()


def _latencies(env: Env, sequence: SequenceParallel) -> Iterator[tuple[str, float, int]]:
    """Seconds until the last rank has what all before it did, for a small state and one of a usual layer."""
    for label, shape in (("small", (1, 1, 16, 16)), ("layer", (1, 16, 128, 128))):
        state = torch.zeros(1, *shape, device=env.device)
        local = StateMap(state, state.new_zeros(1, *shape[:2], 1))
        times = []
        for _ in range(25):
            with waiting("the doctor: the meeting of all ranks"):
                dist.barrier()
            _synchronize(env)
            begin = time.perf_counter()
            exchange.start(local, sequence, fold=fold).wait()
            _synchronize(env)
            times.append(time.perf_counter() - begin)
        slowest = torch.tensor(statistics.median(times[5:]), device=env.device)
        with waiting("the doctor: the longest time of all ranks"):
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        yield label, slowest.item(), state.nbytes


def _steps(env: Env) -> Iterator[tuple[str, float, float, float]]:
    """Of operators: the error of a decode step against fp64, its seconds, and those of reading and writing its state at
    the speed of a copy. On a GPU steps are a CUDA graph, as in `lasp.generate`."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, state = (
        torch.randn(1, _HEADS, *shape, generator=draw).to(env.device) for shape in ((_DIM,),) * 3 + ((_DIM, _DIM),)
    )
    q, k, v, beta = q.bfloat16(), F.normalize(k, dim=-1).bfloat16(), v.bfloat16(), torch.ones_like(v[..., 0]).bfloat16()
    log_decay = -0.3 * torch.arange(1, _HEADS + 1, device=env.device) / _HEADS
    qw, kw, vw = (x.double().unsqueeze(1) for x in (q, k, v))
    layers = 16 if env.device.type == "cuda" else 2  # in a row
    given = {"scale": _DIM**-0.5, "initial_state": state.double()}
    copied = _seconds_of_byte(env) * 2 * state.nbytes
    for name, call, expected in (
        (
            "linear_attention [H]",
            lambda s: linear_attention_step(q, k, v, log_decay, s, scale=_DIM**-0.5),
            recurrent_linear_attention(qw, kw, vw, log_decay=log_decay.double(), **given)[0],
        ),
        (
            "delta_rule [B, H]",
            lambda s: delta_rule_step(q, k, v, beta, log_decay[None], s, scale=_DIM**-0.5),
            recurrent_delta_rule(qw, kw, vw, beta.double()[None], log_decay=log_decay.double()[None, None], **given)[0],
        ),
    ):
        error = _relative(call(state.clone()), expected.squeeze(1).cpu())
        states = [state.clone() for _ in range(layers)]
        yield (
            name,
            error,
            _seconds_of(lambda call=call, states=states: [call(s) for s in states], env) / layers,
            copied,
        )


def _seconds_of_byte(env: Env) -> float:
    """Seconds to read or write a byte, by a copy of more than fits a cache."""
    a, b = torch.zeros(2, 2 ** (29 if env.device.type == "cuda" else 25), dtype=torch.int8, device=env.device)
    return _seconds_of(lambda: b.copy_(a), env) / (2 * a.nbytes)


def _seconds_of(call: Callable[[], object], env: Env) -> float:
    """Median of some, on a GPU of a CUDA graph of it."""
    if env.device.type == "cuda":
        side = torch.cuda.Stream(env.device)
        side.wait_stream(torch.cuda.current_stream(env.device))
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream(env.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        call = graph.replay
    times = []
    for _ in range(7):
        _synchronize(env)
        begin = time.perf_counter()
        call()
        _synchronize(env)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def _synchronize(env: Env) -> None:
    if env.device.type == "cuda":
        torch.cuda.synchronize(env.device)
