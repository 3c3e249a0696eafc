"""The named decay schedules against the formulas of their papers, and what they refuse."""

import math

import pytest
import torch

from lasp import decay


@pytest.mark.parametrize(("layer", "layers"), [(0, 1), (0, 4), (2, 4), (3, 4)])
def test_formulas(layer, layers):
    heads = 8
    factor = 1 - layer / max(layers - 1, 1) + 1e-5
    expected = {
        "alibi": [-(2 ** (-8 * h / heads)) * factor for h in range(1, heads + 1)],
        "tnl": [-(8 * h / heads) * (1 - layer / layers) for h in range(1, heads + 1)],
        "retnet": [math.log(1 - 2 ** (-5 - h)) for h in range(heads)],
    }
    for name, values in expected.items():
        found = decay.schedule(name, heads, layer, layers)
        assert found.dtype == torch.float32
        assert (found <= 0).all()
        torch.testing.assert_close(found, torch.tensor(values), rtol=1e-6, atol=0)


def test_alibi_slopes_of_heads_that_are_no_power_of_two():
    found = -decay.alibi(6, 0, 1) / (1 + 1e-5)
    torch.testing.assert_close(found, torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]))


def test_no_decay_is_none():
    assert decay.schedule("none", 4, 0, 1) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fast", 4, 0, 1), r"name must be one of \['alibi', 'tnl', 'retnet', 'none'\], got 'fast'"),
        (("alibi", 0, 0, 1), "heads must be positive, got 0"),
        (("tnl", 4, 3, 3), "layer must be less than layers, got layer 3 of 3"),
        (("none", 4, -1, 3), "layer must not be negative, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        decay.schedule(*arguments)


def test_host_values_of_a_fixed_decay():
    on_cpu = decay.fixed([-0.5, -1.0])
    assert on_cpu.dtype == torch.float32
    assert decay.host_values(on_cpu) == decay.host_values(torch.tensor([-0.5, -1.0])) == (-0.5, -1.0)
    # A device that has no values to read: what the host knows is what was said when the tensor was made.
    elsewhere = decay.fixed(torch.tensor([-0.5, -1.0]), "meta")
    assert decay.host_values(elsewhere) == (-0.5, -1.0)
    assert decay.host_values(torch.empty(2, device="meta")) is None
    assert decay.host_values(elsewhere.clone()) is None
    assert decay.host_values(None) is None
    assert decay.host_values(torch.zeros(1, 3, 2)) is None
    assert decay.host_values(on_cpu.clone().requires_grad_()) is None
    with pytest.raises(TypeError, match=r"values must be numbers, one a head, got \[\[-0.5, -1.0\]\]"):
        decay.fixed([[-0.5, -1.0]])


def test_host_values_go_with_their_tensor():
    known = len(decay._values_of)
    tensor = decay.fixed([-0.5], "meta")
    assert len(decay._values_of) == known + 1
    del tensor
    assert len(decay._values_of) == known
