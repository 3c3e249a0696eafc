"""`lasp.linear_token_loss`: `token_loss` of a linear layer's outputs, without having all of them at once."""

import copy
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import mesh_of, run_ranks
from torch import nn

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.models import TNL, LinearTransformer, LinearTransformerConfig, TNLConfig
from lasp_kernels import linear_loss

D, V = 6, 11
LENGTHS = [(23,), (9, 14), (0, 23), (5, 1, 17)]


def drawn(lengths, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    T = sum(lengths)
    hidden = torch.randn(2, T, D, generator=draw).to(dtype)
    weight, bias = torch.randn(V, D, generator=draw).to(dtype), torch.randn(V, generator=draw).to(dtype)
    labels = torch.randint(0, V, (2, T), generator=draw)
    labels[torch.rand(2, T, generator=draw) < 0.3] = -100
    return hidden, weight, bias, labels


def tiles_of(tokens):
    return mock.patch.object(linear_loss, "tokens_at_once", return_value=tokens)


def _equals_token_loss(lengths, tokens, with_bias):
    rank, ranks = dist.get_rank(), len(lengths)
    hidden, weight, bias, labels = drawn(lengths)
    here = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    inputs = [hidden[:, here].clone(), weight, *([bias] if with_bias else [])]
    inputs = [x.requires_grad_() for x in inputs]
    whole = F.linear(hidden, weight, bias if with_bias else None)
    expected_loss = F.cross_entropy(whole.flatten(0, 1), labels.flatten())
    logits = F.linear(*inputs)
    expected = lasp.token_loss(logits, labels[:, here], mesh=dist.group.WORLD)
    expected = *expected, *torch.autograd.grad(2.5 * expected[0], inputs)
    more = {"bias": inputs[2]} if with_bias else {}
    with tiles_of(tokens):
        found = lasp.linear_token_loss(*inputs[:2], labels[:, here], mesh=dist.group.WORLD, **more)
        found = *found, *torch.autograd.grad(2.5 * found[0], inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[0], expected_loss, rtol=1e-12, atol=0)
    assert found[1] == (labels != -100).sum()
    return ranks


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 1000])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_loss_and_every_gradient_on_every_rank(lengths, tokens, with_bias):
    assert run_ranks(len(lengths), _equals_token_loss, lengths, tokens, with_bias) == [len(lengths)] * len(lengths)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_what_is_frozen_gets_no_gradient(trained):
    hidden, weight, _, labels = drawn((7,))
    hidden.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    loss, _ = lasp.linear_token_loss(hidden, weight, labels, mesh=None)
    assert loss.requires_grad == any(trained)
    torch.testing.assert_close(loss, F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten()))
    if any(trained):
        loss.backward()
    assert ((hidden.grad is not None), (weight.grad is not None)) == trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_in_fp32(dtype):
    hidden, weight, bias, labels = drawn((700,), dtype)
    given = [x.requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = F.cross_entropy(F.linear(*exact).flatten(0, 1), labels.flatten())
    expected.backward()
    with tiles_of(64):
        loss, _ = lasp.linear_token_loss(*given[:2], labels, mesh=None, bias=given[2])
    loss.backward()
    assert loss.dtype == torch.float32
    close = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), expected, rtol=close, atol=0)
    for x, y in zip(given, exact):
        assert x.grad.dtype == dtype
        assert (x.grad.double() - y.grad).norm() < close * y.grad.norm()


def test_autocast_takes_weights_in_fp32():
    hidden, weight, _, labels = drawn((9,), torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = lasp.linear_token_loss(hidden, weight, labels, mesh=None)
    loss.backward()
    assert weight.grad.dtype == torch.float32
    expected, _ = lasp.linear_token_loss(hidden.bfloat16(), weight.detach().bfloat16(), labels, mesh=None)
    torch.testing.assert_close(loss, expected)


def test_memory_does_not_grow_with_the_logits():
    """In a process of its own: a step whose logits would take 1.6 GB in fp32, in less than 0.5 GB."""
    code = """
import resource, torch, lasp
torch.set_num_threads(1)
hidden, weight = torch.randn(8192, 8, requires_grad=True), torch.randn(50000, 8, requires_grad=True)
labels = torch.randint(50000, (8192,))
small = lasp.linear_token_loss(hidden[:8], weight, labels[:8], mesh=None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss, tokens = lasp.linear_token_loss(hidden, weight, labels, mesh=None)
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(found.stdout) * (1 if sys.platform == "darwin" else 1024) < 5e8, found.stdout


def small(kind):
    torch.manual_seed(0)
    if kind == "tnl":
        return TNL(TNLConfig(V, layers=2, width=16, heads=2, glu_width=24, lrpe=False)).double()
    return LinearTransformer(LinearTransformerConfig(V, layers=2, width=16, heads=2, mlp_width=24)).double()


def _trained(kind, wrapper):
    mesh = mesh_of(sp=dist.get_world_size())
    ids = torch.randint(0, V, (2, 25), generator=torch.Generator().manual_seed(1))
    one = small(kind)
    batch = lasp.shard_batch({"input_ids": ids}, None)
    lasp.token_loss(one(batch["input_ids"]), batch["labels"], mesh=None)[0].backward()

    model = lasp.parallelize(copy.deepcopy(one), mesh["sp"])
    model.zero_grad()
    local = lasp.shard_batch({"input_ids": ids}, mesh)
    if wrapper == "ddp":
        wrapped = wrap_ddp(model, mesh)
    elif wrapper == "fsdp2":
        wrapped = wrap_fsdp2(model, mesh, blocks=model.blocks)
    else:
        wrapped = model
    hidden = wrapped(local["input_ids"], local["position_ids"], local["layout"], return_hidden=True)
    loss, _ = lasp.linear_token_loss(hidden, model.head.weight, local["labels"], mesh=mesh)
    loss.backward()
    if wrapper is None:
        lasp.sync_grads(model, mesh)
    for (name, p), q in zip(model.named_parameters(), one.parameters()):
        grad = p.grad.full_tensor() if wrapper == "fsdp2" else p.grad
        torch.testing.assert_close(grad, q.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("wrapper", [None, "ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["tnl", "linear_transformer"])
def test_models_give_what_their_head_reads(kind, wrapper):
    run_ranks(2, _trained, kind, wrapper)


def _put_away():
    mesh, model = mesh_of(sp=2), nn.Sequential(nn.Linear(D, D), nn.Linear(D, V))
    wrap_fsdp2(model, mesh)
    hidden, _, _, labels = drawn((5,), torch.float32)
    with pytest.raises(TypeError, match=r"weight must be whole, got a DTensor \(11, 6\)"):
        lasp.linear_token_loss(hidden, model[1].weight, labels, mesh=mesh)


def test_sharded_weights_are_refused():
    run_ranks(2, _put_away)


def _outside():
    hidden, weight, _, labels = drawn((5,))
    labels = labels.clone()
    if dist.get_rank() == 1:
        labels[0, 0] = V
    with pytest.raises(ValueError, match="labels must be from 0 to 10, or ignore_index -100, got 11 on rank 1"):
        lasp.linear_token_loss(hidden, weight, labels, mesh=dist.group.WORLD)


def test_a_label_outside_is_an_error_on_every_rank():
    run_ranks(2, _outside)


def _any_ignore_index():
    """Labels that do not count may be any number, and lie on one rank only."""
    hidden, weight, _, labels = drawn((5,))
    labels = labels.masked_fill(labels == -100, 3)
    if dist.get_rank() == 1:
        labels[:, 2:] = V + 3
    given = hidden, weight.requires_grad_()
    found, tokens = lasp.linear_token_loss(*given, labels, mesh=dist.group.WORLD, ignore_index=V + 3)
    expected, count = lasp.token_loss(hidden @ weight.T, labels, mesh=dist.group.WORLD, ignore_index=V + 3)
    torch.testing.assert_close(found, expected)
    assert tokens == count == 14


def test_labels_that_do_not_count_may_be_any_number():
    run_ranks(2, _any_ignore_index)


def test_an_evaluation_makes_no_gradients():
    hidden, weight, bias, labels = drawn((5,))
    weight.requires_grad_()
    with torch.no_grad(), mock.patch.object(linear_loss, "_add_product") as add:
        loss, _ = lasp.linear_token_loss(hidden, weight, labels, mesh=None, bias=bias)
    assert not add.called
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight, bias).flatten(0, 1), labels.flatten()))


def test_gradients_in_16_bits_are_scaled_in_32():
    """1 / 777 is off by 0.2% in bf16, which all gradients behind it would be."""
    hidden, weight, _, _ = drawn((777,), torch.bfloat16)
    labels = torch.zeros(2, 777, dtype=torch.int64)
    labels[1] = -100
    hidden.requires_grad_()
    lasp.linear_token_loss(hidden, weight, labels, mesh=None)[0].backward()
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy((exact @ weight.double().T).flatten(0, 1), labels.flatten()).backward()
    scale = (hidden.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert abs(scale - 1) < 5e-4


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"hidden": torch.zeros(2, 3, 5)},
            ValueError,
            r"weight must have shape \[V, D\] with the D of hidden \(2, 3, 5\)",
        ),
        ({"weight": torch.zeros(V)}, ValueError, r"weight must have shape \[V, D\].*got \(11,\)"),
        ({"weight": torch.zeros(V, D).half()}, TypeError, "weight must have the dtype of hidden, torch.float32, got"),
        ({"bias": torch.zeros(V + 1)}, ValueError, r"bias must have shape \[V\] = \(11,\), got \(12,\)"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"hidden \(2, 3, 6\) and labels \(2, 4\)"),
        ({"labels": torch.zeros(2, 3)}, TypeError, "labels must"),
    ],
    ids=str,
)
def test_bad_arguments(changed, error, message):
    good = {"hidden": torch.zeros(2, 3, D), "weight": torch.zeros(V, D), "labels": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        lasp.linear_token_loss(**{**good, **changed}, mesh=None)


def test_no_second_derivative():
    """Also where `torch.autograd.grad` would pass over its part, and another one has an own."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(7, 8)
    loss = linear_loss.linear_cross_entropy(hidden, weight, torch.arange(5)) + hidden.pow(3).sum()
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
