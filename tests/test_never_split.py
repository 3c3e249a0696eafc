"""Batches that were cut, and a model that was never split: an error on every rank, and none where all is right.

And who keeps only a part of a split model: what ranks compare does not depend on when Python's collector comes by.
"""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import mesh_of, run_ranks
from small_model import HEADS, VOCABULARY, WIDTH, SmallModel
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.ranks import group


def whole_batch():
    draw = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(0, VOCABULARY, (2, 13), generator=draw)}


def logits_of(model, local):
    return model(local["input_ids"], local["position_ids"])


def own_loss(logits, local, _):
    return F.cross_entropy(logits.flatten(0, 1), local["labels"].flatten())


def mean_of_all(logits, local, mesh):
    return lasp.token_loss(logits, local["labels"], mesh=mesh)[0]


def step(model, mesh, loss_of=mean_of_all, synced=True, batch=None, called=None):
    local = lasp.shard_batch(batch or whole_batch(), mesh)
    loss = loss_of(logits_of(called or model, local), local, mesh)
    loss.backward()
    if synced:
        lasp.sync_grads(model, mesh)
    torch.optim.SGD(model.parameters(), 0.1).step()
    return loss.item()


NO_MODEL = r"^no model was given to lasp\.parallelize, but lasp\.shard_batch has cut batches over the ranks \(0, 1.*\)"
THIS = (
    r"^this (FSDP)?SmallModel was never given to lasp\.parallelize, but lasp\.shard_batch has cut batches over .*Call"
)


def _forgotten(how):
    group.reset()
    mesh, model = mesh_of(dp_shard=1, sp=-1), SmallModel().double()
    before = copy.deepcopy(model.state_dict())
    message, options = (NO_MODEL, {}) if how in ("token_loss", "verified", "torch") else (THIS, {"loss_of": own_loss})
    if how == "verified":  # what is split there is a copy
        assert lasp.verify(model, mesh, whole_batch()).ok
    if how.startswith("another"):
        lasp.parallelize(SmallModel(), mesh)
        options = {}
    if how.endswith("DDP"):
        options |= {"synced": False, "called": wrap_ddp(model, mesh)}
    elif how.endswith("FSDP2"):
        options |= {"synced": False, "called": wrap_fsdp2(model, mesh)}
    elif how == "torch":
        called = DistributedDataParallel(model, process_group=lasp.grad_mesh(mesh).get_group())
        options = {"synced": False, "called": called, "loss_of": own_loss}
    if how in ("DDP", "FSDP2"):
        message = NO_MODEL
    with pytest.raises(ValueError, match=message):
        step(model, mesh, **options)
    if not how.endswith("FSDP2"):
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    group.reset()


HOW = "sync_grads token_loss verified torch DDP FSDP2 another another-DDP another-FSDP2"


@pytest.mark.parametrize("how", HOW.split())
@pytest.mark.parametrize("world", [2, 3])
def test_a_model_that_was_never_split_is_an_error_on_every_rank(world, how):
    run_ranks(world, _forgotten, how)


class ByHand(nn.Module):
    """Its ranks are its user's business."""

    def __init__(self, ranks):
        super().__init__()
        torch.manual_seed(0)
        self.ranks = ranks
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, positions):
        x = self.embed(ids).unflatten(-1, (HEADS, -1))
        return self.head(lasp.linear_attention(x, x.sigmoid(), x, sequence=self.ranks)[0].flatten(-2))


class Local(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, positions):
        return self.head(self.embed(ids).sigmoid())


class Outer(nn.Module):
    """In a reference cycle: only Python's collector can free it."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = SmallModel(), nn.Linear(VOCABULARY, VOCABULARY)
        self.itself = [self]

    def forward(self, ids, positions):
        return self.head(self.inner(ids, positions))


def _right(kind, wrapped):
    group.reset()
    mesh = mesh_of(dp_shard=1, sp=-1)
    if kind == "by hand":
        alone, model = ByHand(None).double(), ByHand(lasp.SequenceParallel(mesh["sp"])).double()
    elif kind == "token-local":
        alone, model = Local().double(), Local().double()
        with pytest.raises(ValueError, match=r"no layer that can be split.*plan=\{'': lasp\.adapters\.token_local\}"):
            lasp.parallelize(model, mesh)
        lasp.parallelize(model, mesh, plan={"": lasp.adapters.token_local})
    elif kind == "part":
        outer = Outer().double()
        alone, model = copy.deepcopy(outer.inner), lasp.parallelize(outer, mesh).inner
    else:
        alone, model = SmallModel().double(), lasp.parallelize(SmallModel().double(), mesh)
        model = copy.deepcopy(model)
    options = {"synced": False, "called": wrap_ddp(model, mesh)} if wrapped else {}
    for _ in range(3):
        assert abs(step(model, mesh, **options) - step(alone, None)) < 1e-12
        for (name, p), q in zip(model.named_parameters(), alone.parameters()):
            assert float((p.grad - q.grad).abs().max()) < 1e-12, name
            p.grad = q.grad = None
    group.reset()


@pytest.mark.parametrize("wrapped", [False, True], ids=["sync_grads", "DDP"])
@pytest.mark.parametrize("kind", ["by hand", "token-local", "part", "copy"])
def test_what_is_right_is_no_error(kind, wrapped):
    run_ranks(3, _right, kind, wrapped)


# A part of a model


def kept_part(name, mesh, collecting, **options):
    """A part of a split model; the collector takes the frame around it on some ranks only, if it may."""
    outer = Outer()
    part = getattr(lasp.parallelize(outer, mesh, **options), name)
    del outer
    if dist.get_rank() in collecting:
        gc.collect()
    return part


def _compared(collecting):
    gc.disable()
    try:
        mesh, last = mesh_of(dp_shard=1, sp=-1), dist.get_world_size() - 1
        model = kept_part("inner", mesh, collecting)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def forward_and_backward():
            local = lasp.shard_batch(whole_batch(), mesh)
            mean_of_all(logits_of(model, local), local, mesh).backward()
            lasp.sync_grads(model, mesh)

        for _ in range(3):
            forward_and_backward()
            optimizer.step()
        forward_and_backward()
        optimizer.param_groups[0]["lr"] = 0.1 if dist.get_rank() < last else 0.2
        with pytest.raises(lasp.RankMismatchError, match=rf"rank {last} has the optimizer's lr of group 0 .*0\.2"):
            optimizer.step()
    finally:
        gc.enable()


@pytest.mark.parametrize("collecting", [(), (0,), (0, 1, 2)], ids=str)
def test_ranks_compare_what_they_do_with_a_part_of_a_model(collecting):
    run_ranks(3, _compared, collecting)


def _head_alone():
    """No layer exchanges, and yet all ranks count the steps of the model's optimizer."""
    gc.disable()
    try:
        head = kept_part("head", mesh_of(dp_shard=1, sp=-1), (0,))
        optimizer = torch.optim.SGD(head.parameters(), 0.1)
        for _ in range(4):
            head(torch.ones(1, VOCABULARY)).sum().backward()
            optimizer.step()
        dist.barrier()
    finally:
        gc.enable()


def test_steps_of_a_head_whose_model_is_gone_on_one_rank():
    run_ranks(2, _head_alone)


def _finite(collecting):
    gc.disable()
    try:
        mesh = mesh_of(dp_shard=1, sp=-1)
        model = kept_part("inner", mesh, collecting, check_finite=True)
        lasp.verify(model, mesh, whole_batch())
        step(model, mesh)
        head = model.head
        head.weight.grad = torch.full_like(head.weight, torch.nan if dist.get_rank() == 1 else 0.0)
        optimizer = torch.optim.SGD(head.parameters(), 0.1)
        with pytest.raises(FloatingPointError, match=r"rank 1: .*head\.weight"):
            optimizer.step()
    finally:
        gc.enable()


@pytest.mark.parametrize("collecting", [(), (0,), (0, 1)], ids=str)
def test_nan_in_a_part_of_a_model_stops_every_rank(collecting):
    run_ranks(2, _finite, collecting)


def _freed():
    mesh = mesh_of(dp_shard=1, sp=-1)
    model = lasp.parallelize(Outer(), mesh, check_finite=True)
    known, part, twin = weakref.ref(model), model.inner.blocks[0], copy.deepcopy(model)
    step(model, mesh)
    del model
    gc.collect()
    assert known() is not None  # a part of it is kept
    del part
    gc.collect()
    assert known() is None  # by nothing else, nor by its copy
    assert all("_lasp_whole" in vars(m) for m in twin.modules())
    assert len(twin.state_dict()) == len(Outer().state_dict())


def test_a_model_is_freed_with_its_last_part():
    run_ranks(2, _freed)
