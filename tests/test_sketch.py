"""The adapter that a refusal prints: a file that compiles, with the signatures of what it is to take the place of."""

import types
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
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
        this,  # as not everybody calls it self
        x: Tensor,
        /,
        scale: "float | None" = 2.0,
        *others: Tensor,
        like: object = DEFAULT,
        name="a 'b'",
        **more: int,
    ) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return x + scale * this.gain * before


class Below(nn.Module):
    """A convolution below looks along the sequence, and nothing else does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(6, 6, dtype=torch.float64)
        self.convs = nn.Sequential(*(nn.Conv1d(6, 6, 4, padding=3, groups=g, dtype=torch.float64) for g in (2, 6)))

    def forward(self, x):
        y = self.scale(x)
        for conv in self.convs:
            y = F.silu(conv(y.mT)[..., : x.shape[1]].mT)
        return y


def before(x):
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


class Both(Below):
    """Its forward does, too, by a function."""

    def forward(self, x):
        return super().forward(x) * before(x)


def _signatures(a, b=(1, 2), *, c: int = 3, d: Callable = print, e=float("inf"), f=None):
    pass


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (Inline.forward, """(this, x, /, scale=2.0, *others, like=..., name="a 'b'", **more)"""),
        (_signatures, "(a, b=..., *, c=3, d=..., e=..., f=None)"),
        (dict.update, "(*args, **kwargs)"),
    ],
    ids=["method", "function", "builtin"],
)
def test_signatures(function, expected):
    assert signature_of(function) == expected
    compile(f"def f{expected}: pass", "signature", "exec")


CONVOLVED = (
    "import torch; x = lasp.halo(input.mT, 4, layout=layout, sequence=sequence); "
    "y = torch.nn.functional.conv1d(x.mT, self.weight, self.bias, groups=self.groups); "
    "return torch.nn.functional.pad(y, (0, 3))"
)
SHIFTED = "return lasp.halo(x, 2, layout=layout_of(sequence), sequence=sequence)[:, :-1]"
ADAPTERS = {
    Inline: {
        "Inline": "before = lasp.halo(x, 2, layout=layout, sequence=sequence)[:, :-1]; "
        "return x + scale * this.gain * before"
    },
    Below: {"Conv1d": CONVOLVED},
    Both: {"Conv1d": CONVOLVED, "before": SHIFTED},
}
PRINTED = {
    Inline: """def forward(this, x, /, scale=2.0, *others, like=..., name="a 'b'", **more):""",
    Below: "\nlasp.register('test_sketch.Below', adapter=split, covers=('convs.0', 'convs.1'))",
    Both: "\n    for name in ['convs.0', 'convs.1']:\n",
}


def _adapted(cls):
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), cls())
    x = torch.randn(2, 13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    expected.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    with pytest.raises(ValueError, match=rf"\({'Conv1d' if cls is Below else cls.__name__}\): on a slice") as refused:
        lasp.parallelize(model, dist.group.WORLD)
    text = printed_file(str(refused.value))
    assert PRINTED[cls] in text
    assert text.count("NotImplementedError") == len(ADAPTERS[cls])
    text = filled_in(text, **ADAPTERS[cls])
    exec(compile(text, "adapter.py", "exec"), {})
    try:
        lasp.parallelize(model, dist.group.WORLD)
    finally:
        _BY_NAME.pop(f"test_sketch.{cls.__name__}")
    local = lasp.shard_batch({"input_ids": torch.arange(13).expand(2, 13)}, dist.group.WORLD, pad=False)
    start, end = local["layout"].bounds(dist.get_rank())
    found = model(x[:, start:end], layout=local["layout"])
    assert float((found - expected[:, start:end]).abs().max()) < 1e-12
    found.square().sum().backward()
    for p, gradient in zip(model.parameters(), gradients):
        dist.all_reduce(p.grad)
        assert float((p.grad - gradient).abs().max()) < 1e-10


@pytest.mark.parametrize("cls", ADAPTERS)
def test_the_adapter_that_is_printed_once_it_is_filled_in(cls):
    run_ranks(3, _adapted, cls)


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


def test_a_module_of_torch_that_stands_in_no_other_class_is_given_one_of_its_own():
    with pytest.raises(ValueError, match=r"1 \(LSTM\): on a slice") as refused:
        lasp.parallelize(nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 6, batch_first=True)), None)
    assert printed_file(str(refused.value)).endswith("lasp.register('torch.nn.modules.rnn.LSTM', adapter=split)")
