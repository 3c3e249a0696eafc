"""A module's own forward with other functions in it, and classes that are registered by their names."""

import copy
import functools

import pytest
import torch
from torch import nn

import lasp
from lasp import adapters
from lasp.adapters import rebind
from lasp.adapters.rebind import without_methods


def double(x):
    return 2 * x


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapper


class Layer(nn.Module):
    def __init__(self, by=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(by))

    @decorated
    def forward(self, x, *, more=3.0):
        def inner():
            return double(x)

        return self.weight * inner() + more

    def other(self, x):
        return double(x)


class Checkpointed(Layer):
    gradient_checkpointing = False


def test_one_instance_has_another_function():
    layer, other = Layer(), Layer()
    x = torch.ones(3)
    rebind(layer, double=lambda x: 5 * x)
    assert torch.equal(layer(x), 5 * x + 3)
    assert torch.equal(layer(x, more=0.0), 5 * x)
    assert torch.equal(other(x), 2 * x + 3)
    assert torch.equal(double(x), 2 * x)
    assert list(layer.state_dict()) == ["weight"]
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.fill_(7.0)
    assert torch.equal(copied(x), 5 * x + 3)  # its own weights, not those of the first
    with without_methods(layer):
        assert torch.equal(layer(x), 7 * 2 * x + 3)
    assert torch.equal(layer(x), 7 * 5 * x + 3)
    rebind(other, "other", double=lambda x: 9 * x)
    assert torch.equal(other.other(x), 9 * x)
    assert torch.equal(other(x), 2 * x + 3)


@pytest.mark.parametrize(
    ("layer", "method", "names", "kind", "message"),
    [
        (
            Layer(),
            "forward",
            {"triple": abs},
            ValueError,
            "Layer.forward does not use triple; what it uses is double",
        ),
        (Layer(), "nothing", {"double": abs}, TypeError, "Layer has no method 'nothing'"),
        (Checkpointed(), "forward", {"double": abs}, TypeError, "Checkpointed checkpoints itself around its forward"),
        (torch.nn.ReLU(), "training", {}, TypeError, "ReLU has no method|must be a function"),
    ],
)
def test_what_cannot_be_replaced(layer, method, names, kind, message):
    with pytest.raises(kind, match=message):
        rebind(layer, method, **names)


def test_a_version_that_an_adapter_was_not_written_for():
    transformers = pytest.importorskip("transformers", reason="needs the extra `transformers`")
    from transformers.models.llama.modeling_llama import LlamaMLP

    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    with pytest.raises(
        ValueError, match=rf"does not use scan: .* \(tested with 5.24; here is {transformers.__version__}\)"
    ):
        rebind(LlamaMLP(config), scan=abs)


def test_a_class_is_found_by_its_name():
    def split(module, sequence):
        module.sequence = sequence

    name = f"{Layer.__module__}.Layer"
    assert lasp.register(name, adapter=split, covers=True) == name
    try:
        for module in (Layer(), Checkpointed()):  # and by that of the class that it derives from
            found = adapters.find(module)
            assert isinstance(found, adapters.Foreign)
            assert found.adapter is split
            assert adapters.covers(found, "below")
        lasp.register("*.Checkpointed", adapter=lasp.adapters.token_local)
        assert adapters.find(Checkpointed()) is lasp.adapters.token_local
    finally:
        for pattern in (name, "*.Checkpointed"):
            adapters._BY_NAME.pop(pattern, None)
    assert adapters.find(Layer()) is None


@pytest.mark.parametrize(
    ("name", "adapter", "kind", "message"),
    [
        ("Layer", abs, ValueError, "cls must be a class or its dotted name such as 'library.file.Class', got 'Layer'"),
        ("a..b", abs, ValueError, r"got 'a..b'"),
        ("a.b c", abs, ValueError, r"got 'a.b c'"),
        ("a.b", adapters.linear, TypeError, "a.b is given by its name, so that it needs an adapter"),
        ("a.b", 3, TypeError, "adapter must be"),
    ],
)
def test_names_that_are_none(name, adapter, kind, message):
    with pytest.raises(kind, match=message):
        lasp.register(name, adapter=adapter)
