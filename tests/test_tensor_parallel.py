"""Tensor parallelism: loss and every gradient are those of one process, on dp x sp x tp ranks."""

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import lasp
from lasp.data_parallel import wrap_fsdp2
from lasp.models import TNL, Decoder, DecoderConfig, LinearTransformer, LinearTransformerConfig, TNLConfig
from lasp.models.mixers import MIXERS

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
WORDS = 22


def make(family):
    """Small and in fp64, with no weight at a value at which something is not seen."""
    torch.manual_seed(3)
    sizes = {"layers": 2, "width": 16, "heads": 4}
    if family == "tnl":
        model = TNL(TNLConfig(WORDS, **sizes, glu_width=12))
    elif family == "linear_transformer":
        model = LinearTransformer(LinearTransformerConfig(WORDS, **sizes, mlp_width=12))
    else:
        model = Decoder(DecoderConfig(family, WORDS, **sizes, glu_width=12))
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch_of(rows=2, T=13, seed=0):
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(WORDS, (rows, T), generator=draw)
    labels = tokens.clone()
    labels[0, :4] = -100
    return {"input_ids": tokens, "labels": labels}


def loss_of(model, batch, mesh, *, fused=True):
    if mesh is not None:
        rows = len(batch["input_ids"]) // mesh["dp_shard"].size()
        place = mesh["dp_shard"].get_local_rank()
        batch = {name: x[place * rows : (place + 1) * rows] for name, x in batch.items()}
    local = lasp.shard_batch(batch, mesh)
    call = (local["input_ids"], local["position_ids"], local["layout"])
    if fused:
        hidden = model(*call, return_hidden=True)
        return lasp.linear_token_loss(hidden, model.head.weight, local["labels"], mesh=mesh)[0]
    return lasp.token_loss(model(*call), local["labels"], mesh=mesh)[0]


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def split_model(family, mesh):
    model = lasp.parallelize(make(family), mesh["sp"])
    return lasp.tensor_parallel(model, mesh["tp"])


def assert_same(model, expected, of):
    found = dict(model.named_parameters())
    assert set(found) == {name for name, _ in expected.named_parameters()}
    for name, p in expected.named_parameters():
        assert_close(whole(of(found[name])), of(p), msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def _gradients(family, sizes, scheme, fused):
    mesh = mesh_of(**sizes)
    batch, alone = batch_of(), make(family)
    serial = loss_of(alone, batch, None, fused=fused)
    serial.backward()
    model = split_model(family, mesh)
    if scheme == "fsdp2":
        wrap_fsdp2(model, mesh, blocks=model.blocks)
    loss = loss_of(model, batch, mesh, fused=fused)
    loss.backward()
    if scheme == "sync_grads":
        lasp.sync_grads(model, mesh)
    assert_close(loss, serial, **CLOSE)
    assert_same(model, alone, lambda p: p.grad)
    if scheme == "none" and family != "mamba2":
        parts = [p for name, p in model.named_parameters() if p.to_local().numel() < p.numel()]
        assert len(parts) > 10
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e-3)
    assert_close(whole(norm), expected, **CLOSE)
    assert_same(model, alone, lambda p: p.grad)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", ["tnl", "linear_transformer", *MIXERS])
def test_every_gradient_is_that_of_one_process(family, fused):
    run_ranks(2, _gradients, family, {"dp_shard": 1, "sp": 1, "tp": 2}, "none", fused)
