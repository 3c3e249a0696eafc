"""The adapter that a refusal prints: a file that compiles, with the signatures of what it is to take the place of."""

import types
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_docs import filled_in, printed_file
from torch import Tensor, nn

import lasp
from lasp.adapters import _BY_NAME
from lasp.adapters.sketch import adapter_for, signature_of

DEFAULT = object()


class Inline(nn.Module):
    """What mixes tokens is written out in its forward."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(6, dtype=torch.float64))

    def forward(
        self,
        x: Tensor,
        /,
        scale: "float | None" = 2.0,
        *others: Tensor,
        like: object = DEFAULT,
        name="a 'b'",
        **more: int,
    ) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return x + scale * self.gain * before


def _signatures(a, b=(1, 2), *, c: int = 3, d: Callable = print, e=float("inf"), f=None):
    pass


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Inline.forward, """(self, x, /, scale=2.0, *others, like=..., name="a 'b'", **more)"""),
        (_signatures, "(a, b=..., *, c=3, d=..., e=..., f=None)"),
        (dict.update, "(*args, **kwargs)"),
    ],
    ids=["method", "function", "builtin"],
)
def test_signatures(function, expected):
    assert signature_of(function) == expected
    compile(f"def f{expected}: pass", "signature", "exec")


def _inline():
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), Inline())
    x = torch.randn(2, 13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    expected.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    with pytest.raises(ValueError, match=r"1 \(Inline\): on a slice") as refused:
        lasp.parallelize(model, dist.group.WORLD)
    text = printed_file(str(refused.value))
    assert """def forward(self, x, /, scale=2.0, *others, like=..., name="a 'b'", **more):""" in text
    text = filled_in(
        text,
        Inline="before = lasp.halo(x, 2, layout=layout, sequence=sequence)[:, :-1]; "
        "return x + scale * self.gain * before",
    )
    exec(compile(text, "adapter.py", "exec"), {})
    try:
        lasp.parallelize(model, dist.group.WORLD)
    finally:
        _BY_NAME.pop("test_sketch.Inline")
    local = lasp.shard_batch({"input_ids": torch.arange(13).expand(2, 13)}, dist.group.WORLD, pad=False)
    start, end = local["layout"].bounds(dist.get_rank())
    found = model(x[:, start:end], layout=local["layout"])
    assert float((found - expected[:, start:end]).abs().max()) < 1e-12
    found.square().sum().backward()
    for p, gradient in zip(model.parameters(), gradients):
        dist.all_reduce(p.grad)
        assert float((p.grad - gradient).abs().max()) < 1e-10


def test_an_adapter_with_a_forward_of_its_own():
    run_ranks(3, _inline)


def test_every_refused_class_is_given_a_file_that_compiles():
    def made():
        class Local(nn.Module):
            def forward(self, x):
                return x.cumsum(1)

        return Local

    for cls in (made(), nn.LSTM, nn.MultiheadAttention, nn.Transformer, Inline, types.new_class("New", (Inline,))):
        lines = adapter_for(cls)
        held = {"__name__": "printed"}
        exec(compile("\n".join(lines), "printed.py", "exec"), held)
        name = lines[-1].split("'")[1]
        assert _BY_NAME.pop(name).adapter is held["split"]
    assert "test_sketch.*.Local" in adapter_for(made())[-1]
