"""Every scheme of data parallelism on every mesh of four ranks: gradients, optimizer and weights of one process."""

import copy
import functools
import itertools

import pytest
import torch
from inputs import assert_close
from ranks import mesh_of, run_ranks
from small_model import SmallModel
from test_data_parallel import CLOSE, loss_of, whole, whole_batch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.optim import AdamW

import lasp
from lasp.data_parallel import SCHEMES

FACTORS = [(a, b, c) for a, b, c in itertools.product((1, 2, 4), repeat=3) if a * b * c == 4]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
CLIP = 0.05  # far below the norm of the gradients
MAKE = functools.partial(AdamW, lr=1e-2, eps=1e-6)


def names(model):
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def wrapped(scheme, mesh, make=MAKE, seed=0):
    model = lasp.parallelize(SmallModel(seed).double(), mesh)
    return lasp.data_parallel(model, mesh, scheme=scheme, optimizer=make, blocks=model.blocks)


def backward(model, mesh, step):
    """Two micro-batches; the gradient is that of their sum."""
    batch, losses = whole_batch(step), []
    for number in range(2):
        with lasp.no_sync(model, enabled=number == 0):
            loss = loss_of(model, {name: x[:, 6 * number :][:, :7] for name, x in batch.items()}, mesh)
            loss.backward()
            losses.append(loss.detach())
    return torch.stack(losses)


@functools.cache
def one_process(steps):
    """What a process without ranks has: losses, gradients and their norms, the states, and the weights."""
    model = SmallModel().double()
    optimizer, found = MAKE(model.parameters()), []
    for step in range(steps):
        optimizer.zero_grad()
        losses = backward(model, None, step)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        found.append((losses, gradients, norm))
    return found, copy.deepcopy(model.state_dict()), get_state_dict(model, optimizer, options=FLAT)[1]


def _trains(scheme, factors):
    """Two steps; each rank compares all that it has."""
    mesh = mesh_of(**dict(zip(("dp_replicate", "dp_shard", "sp"), factors)))
    steps, weights, states = one_process(2)
    model, optimizer = wrapped(scheme, mesh)
    for step, (losses, gradients, norm) in enumerate(steps):
        optimizer.zero_grad()
        assert_close(backward(model, mesh, step), losses, "losses", **CLOSE)
        mine = names(model)
        assert mine.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert_close(whole(mine[name].grad), gradient, f"gradient of {name}", **CLOSE)
        clipped = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert_close(whole(clipped), norm, "norm", **CLOSE)
        assert norm > 2 * CLIP, "nothing was clipped"
        optimizer.step()
    for name, p in names(model).items():
        assert_close(whole(p.detach()), weights[name], name, **CLOSE)
    found = get_state_dict(model, optimizer, options=FLAT)[1]
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            assert_close(whole(value), states[name], name, **CLOSE)
    return {name for name in found if name.startswith("state.")}, states.keys()


def _every_scheme(factors):
    of_schemes = {}
    for scheme in SCHEMES:
        if scheme == "hsdp" and factors[0] == 1:
            continue
        found, expected = _trains(scheme, factors)
        expected = {name for name in expected if name.startswith("state.")}
        if scheme != "zero1":
            assert found == expected
        of_schemes[scheme] = found
    return of_schemes["zero1"], expected


@pytest.mark.parametrize("factors", FACTORS, ids=lambda factors: "x".join(map(str, factors)))
def test_two_steps_are_those_of_one_process(factors):
    """Losses, gradients, their norm, clipped steps, weights and states of the optimizer; in two micro-batches."""
    of_ranks = run_ranks(4, _every_scheme, factors)
    shards, expected = factors[1] * factors[2], of_ranks[0][1]
    for first in range(0, 4, shards):  # ZeRO-1: each state lies on one rank of each copy
        parts = [found for found, _ in of_ranks[first : first + shards]]
        assert set.union(*parts) == expected
        assert sum(map(len, parts)) == len(expected)
