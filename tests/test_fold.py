"""The fold of maps of all kinds; on the Triton path under the interpreter, where there is no GPU."""

import interpreter
import pytest
import torch

from lasp_kernels import fold

U, N, H, K, V = 3, 2, 2, 16, 24


def maps(*shape, device="cpu"):
    draw = torch.Generator().manual_seed(0)
    state, entering = torch.randn(U, N, H, K, V, generator=draw), torch.randn(N, H, K, V, generator=draw)
    transition = torch.randn(U, N, H, *shape, generator=draw) if shape else None
    return [None if x is None else x.to(device) for x in (entering, state, transition)]


@pytest.fixture(params=["reference", "triton"])
def device(request, monkeypatch):
    monkeypatch.setenv("LASP_KERNELS", request.param)
    return "cuda" if request.param == "triton" and interpreter.CUDA else "cpu"


def test_no_decay_has_the_bits_of_a_decay_by_nothing(device):
    entering, state, _ = maps(device=device)
    expected = fold(entering, state, torch.zeros(U, N, H, 1, device=device))
    assert torch.equal(fold(entering, state, None), expected)
    assert torch.equal(fold(entering, state, None), entering + state[0] + state[1] + state[2])


@pytest.mark.parametrize("kind", ["none", "decay", "matrix"])
def test_nothing_that_enters_is_a_state_of_zeros(device, kind):
    shape = {"none": (), "decay": (1,), "matrix": (K, K)}[kind]
    entering, state, transition = maps(*shape, device=device)
    transition = -transition.abs() if kind == "decay" else transition
    assert torch.equal(fold(None, state, transition), fold(torch.zeros_like(entering), state, transition))
    assert torch.equal(fold(None, state[:1], None if transition is None else transition[:1]), state[0])


def test_decays_per_channel_have_the_bits_of_the_reference(device):
    """Their scan rounds as it does, on all paths."""
    entering, state, log_decay = maps(K, device=device)
    log_decay = -log_decay.abs()
    expected = entering
    for u in range(U):
        expected = log_decay[u].exp().unsqueeze(-1) * expected + state[u]
    assert torch.equal(fold(entering, state, log_decay), expected)


def test_matrices_are_applied_in_order_with_the_same_bits_for_some_heads_and_columns(device):
    entering, state, matrix = maps(K, K, device=device)
    found = fold(entering, state, matrix)
    expected = entering.double()
    for u in range(U):
        expected = matrix[u].double() @ expected + state[u].double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)
    part = fold(entering[:, 1:, :, 5:9], state[:, :, 1:, :, 5:9], matrix[:, :, 1:])
    assert torch.equal(part, found[:, 1:, :, 5:9])
