"""A model that makes a token at a time for bench/decode.py, with its states or keys and values in buffers that stay.

The model's own forward runs on [B, 1] tokens; its attention is replaced while a `Stepping` is entered. `lasp.generate`
does the same with more: here nothing but the model's step is in the way of the clock, and its linear layers and small
operations can be computed in several ways (`HOWS`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lasp_kernels as kernels
from lasp.models import TNL, Decoder, DecoderConfig, TNLConfig, mixers
from lasp.modules import LightningAttention, SoftmaxAttention
from lasp_kernels import layers

HOWS = {
    "eager": "PyTorch's products of matrices and the kernels of training around them",
    "few rows": "a launch for the layers that read the same, with what is around them (few_rows.py), up to 4 sequences",
}


@torch.library.custom_op("lasp_bench::step", mutates_args={"state"})
def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    return kernels.linear_attention_step(q, k, v, log_decay, state, scale=scale)


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)


def _attend(self: LightningAttention, q: Tensor, k: Tensor, v: Tensor, *, layout: object = None) -> Tensor:
    """In place of `LightningAttention.forward`; decays are fixed."""
    q, k, v = (x.squeeze(1) for x in (q, k, v))
    return torch.ops.lasp_bench.step(q, k, v, self.fixed, self.state, self.scale).unsqueeze(1)


def _look(self: SoftmaxAttention, q: Tensor, k: Tensor, v: Tensor, *, layout: object = None) -> Tensor:
    """In place of `SoftmaxAttention.forward`: the token's key and value at the last place, and all of them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    self.keys.index_copy_(2, self.place, k)
    self.values.index_copy_(2, self.place, v)
    return F.scaled_dot_product_attention(q, self.keys, self.values, scale=self.scale).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Rotary:
    """In place of `lasp.models.mixers.rotary`, which makes all angles anew in every layer: those of one position, as
    who decodes would make them once a token; on a GPU in one launch."""

    def __init__(self, place: int, channels: int, device: torch.device, dtype: torch.dtype):
        theta = 10000.0 ** (torch.arange(channels // 2, dtype=torch.float64) / (-channels // 2))
        self.angles = tuple(f(place * theta).to(device, dtype) for f in (torch.cos, torch.sin))
        self._rotated = torch.compile(_rotated, dynamic=False) if device.type == "cuda" else _rotated

    def __call__(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return self._rotated(x, *self.angles)


class Stepping:
    """A model of bench/decode.py, and its step for B sequences.

    Args:
        kind: "tnl" or "softmax".
        config: the TNL's; the softmax model has its shape.
        context: tokens that a softmax model looks at.
    """

    def __init__(
        self, kind: str, config: TNLConfig, B: int, device: torch.device, dtype: torch.dtype, *, context: int = 0
    ):
        self.kind, self.B, self.device, self.context = kind, B, device, context
        torch.manual_seed(0)
        with device:
            self.model = model_of(kind, config).to(dtype).eval().requires_grad_(False)
        self.ids = torch.zeros(B, 1, dtype=torch.int64, device=device)
        self.positions = torch.full((B, 1), max(0, context - 1), device=device)
        self.held: list[Tensor] = []
        for module in self.model.modules():
            if isinstance(module, LightningAttention):
                self._give_state(module, config)
            elif isinstance(module, SoftmaxAttention):
                self._give_cache(module, config, dtype)
        channels = config.width // config.heads
        self._rotary = Rotary(context - 1, channels, device, dtype) if kind == "softmax" else None

    def _give_state(self, module: LightningAttention, config: TNLConfig) -> None:
        H, V = config.heads, config.width // config.heads
        rows = 2 * V if config.lrpe and not self.held else V  # of the first layer
        module.fixed = module.log_decay(self.device)  # type: ignore[assignment]
        module.state = torch.zeros(self.B, H, rows, V, device=self.device)  # type: ignore[assignment]
        self.held.append(module.state)  # type: ignore[arg-type]

    def _give_cache(self, module: SoftmaxAttention, config: TNLConfig, dtype: torch.dtype) -> None:
        """Random numbers in place of those of a prompt: what is measured does not depend on them."""
        shape = (self.B, config.heads, self.context, config.width // config.heads)
        for name in ("keys", "values"):
            x = torch.randn(shape, device=self.device, dtype=dtype)
            setattr(module, name, x)
            self.held.append(x)
        module.place = torch.tensor([self.context - 1], device=self.device)  # type: ignore[assignment]

    @property
    def bytes_of_weights(self) -> int:
        """That a token reads: not the embedding's."""
        weights = (p for name, p in self.model.named_parameters() if not name.startswith("embedding"))
        return sum(p.nbytes for p in weights)

    @property
    def bytes_held(self) -> int:
        """Of states, or keys and values."""
        return sum(x.nbytes for x in self.held)

    @property
    def bytes_of_token(self) -> int:
        """Weights and keys are read; states are read and written."""
        return self.bytes_of_weights + self.bytes_held * (2 if self.kind == "tnl" else 1)

    def step(self) -> Tensor:
        """A token of every sequence: logits [B, vocab_size]; the most probable is the next one's input."""
        logits = self.model(self.ids, self.positions)[:, -1]
        self.ids.copy_(logits.argmax(-1, keepdim=True))
        if self.kind == "tnl":
            self.positions.add_(1)
        return logits

    def reset(self) -> None:
        """At the beginning again, of a TNL."""
        self.positions.zero_()
        for x in self.held:
            x.zero_()

    @contextlib.contextmanager
    def entered(self, how: str) -> Iterator[None]:
        """In which `step` may be called."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(mock.patch.object(LightningAttention, "forward", _attend))
            stack.enter_context(mock.patch.object(SoftmaxAttention, "forward", _look))
            if self._rotary is not None:
                stack.enter_context(mock.patch.object(mixers, "rotary", self._rotary))
            if how == "eager":
                stack.enter_context(mock.patch.object(layers, "_few_rows", return_value=False))
            yield

    def error(self, tokens: int = 6) -> float:
        """Of the logits after some tokens, in an entered TNL, relative to those of the whole sequence at once."""
        ids = torch.randint(self.model.config.vocab_size, (self.B, tokens), device=self.device)  # type: ignore[union-attr]
        self.reset()
        for t in range(tokens):
            self.ids.copy_(ids[:, t : t + 1])
            logits = self.step()
        with contextlib.ExitStack() as stack:
            for kind in (LightningAttention, SoftmaxAttention):
                stack.enter_context(mock.patch.object(kind, "forward", _ORIGINAL[kind]))
            whole = self.model(ids)[:, -1].double()
        self.reset()
        return ((logits.double() - whole).norm() / whole.norm()).item()


_ORIGINAL = {kind: kind.forward for kind in (LightningAttention, SoftmaxAttention)}


def model_of(kind: str, config: TNLConfig) -> nn.Module:
    """TNL, or a `Decoder` with softmax attention of its shape."""
    if kind == "tnl":
        return TNL(config)
    shape = {n: getattr(config, n) for n in ("vocab_size", "layers", "width", "heads", "glu_width")}
    return Decoder(DecoderConfig("softmax", **shape))


def graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call as a CUDA graph; on a CPU itself."""
    if device.type != "cuda":
        call()
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
