"""Training over dp x sp with `sync_grads`, DDP and FSDP2: gradients and parameters are those of one process."""

import functools
import gc
import warnings
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from inputs import assert_close
from ranks import mesh_of, run_ranks
from small_model import VOCABULARY, SmallModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.ranks.group import process, set_timeout, timeout_of

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # all is in fp64

# dp_replicate, dp_shard, sp
FACTORS = [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (1, 1, 4), (2, 1, 2), (1, 1, 3)]
HYBRID = [(2, 1, 2), (2, 2, 1)]


def whole_batch(seed=0, T=13):
    """Four sequences of a length that no number of ranks divides; many labels are masked, and unevenly so."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (4, T), generator=draw)
    labels = tokens.clone()
    for row, masked in enumerate((0, 11, 5, 13)):
        labels[row, :masked] = -100
    return {"input_ids": tokens, "labels": labels}


def rows_of_this_rank(batch, mesh):
    """Sequences are split over dp, as a data loader would."""
    shape = mesh.shape[:2]
    place = mesh.get_local_rank("dp_replicate") * shape[1] + mesh.get_local_rank("dp_shard")
    rows = 4 // (shape[0] * shape[1])
    return {name: x[place * rows : (place + 1) * rows] for name, x in batch.items()}


def loss_of(model, batch, mesh):
    local = lasp.shard_batch(batch if mesh is None else rows_of_this_rank(batch, mesh), mesh)
    return lasp.token_loss(model(local["input_ids"], local["position_ids"]), local["labels"], mesh=mesh)[0]


def parallel_model(mesh, scheme):
    model = lasp.parallelize(SmallModel().double(), mesh)
    if scheme == "ddp":
        return wrap_ddp(model, mesh)
    if scheme == "fsdp2":
        return wrap_fsdp2(model, mesh, blocks=model.blocks)
    return model


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def named_parameters(model):
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def assert_same_parameters(model, expected, of):
    found = named_parameters(model)
    assert set(found) == {name for name, _ in expected.named_parameters()}
    for name, p in expected.named_parameters():
        assert_close(whole(of(found[name])), of(p), name, **CLOSE)


@functools.cache
def one_process():
    """Loss, and a model with its gradients: a worker needs them for all factors and schemes."""
    alone = SmallModel().double()
    loss = loss_of(alone, whole_batch(), None)
    loss.backward()
    return loss.detach(), alone


@functools.cache
def trained_in_one_process():
    alone, losses = SmallModel().double(), []
    optimizer = optimizer_of(alone)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(alone, whole_batch(step), None)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, alone


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)


def _gradients(factors, scheme):
    mesh = mesh_of(dp_replicate=factors[0], dp_shard=factors[1], sp=factors[2])
    batch = whole_batch()
    serial, alone = one_process()
    model = parallel_model(mesh, scheme)
    loss = loss_of(model, batch, mesh)
    loss.backward()
    if scheme == "sync_grads":
        lasp.sync_grads(model, mesh)
    assert_close(loss, serial, "loss", **CLOSE)
    assert_same_parameters(model, alone, lambda p: p.grad)


@pytest.mark.any_pytorch
@pytest.mark.parametrize(
    ("factors", "scheme"),
    [(f, s) for f in FACTORS for s in ("sync_grads", "ddp", "fsdp2")] + [(f, "fsdp2") for f in HYBRID],
)
def test_every_gradient_is_that_of_one_process(factors, scheme):
    run_ranks(factors[0] * factors[1] * factors[2], _gradients, factors, scheme)


def _train(factors, scheme):
    mesh = mesh_of(dp_replicate=factors[0], dp_shard=factors[1], sp=factors[2])
    losses, alone = trained_in_one_process()
    model = parallel_model(mesh, scheme)
    optimizer = optimizer_of(model)
    for step, serial in enumerate(losses):
        optimizer.zero_grad()
        loss = loss_of(model, whole_batch(step), mesh)
        loss.backward()
        if scheme == "sync_grads":
            lasp.sync_grads(model, mesh)
        optimizer.step()
        assert_close(loss.detach(), serial, "loss", **CLOSE)
    assert_same_parameters(model, alone, lambda p: p.detach())
    untrained = SmallModel().double().state_dict()
    assert not any(torch.allclose(p, untrained[name]) for name, p in alone.state_dict().items())


@pytest.mark.parametrize("factors", FACTORS[:5])
@pytest.mark.parametrize("scheme", ["sync_grads", "ddp", "fsdp2"])
def test_three_adamw_steps_are_those_of_one_process(factors, scheme):
    run_ranks(factors[0] * factors[1] * factors[2], _train, factors, scheme)


class _Overflow(torch.autograd.Function):
    """As in backward of 16 bits, on one rank."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, torch.inf)


def _scaled_steps(mesh, scheme, optimizer):
    """Losses, scales and weights of three clipped steps, of which the gradient of the second overflows."""
    model = SmallModel().double()
    last = mesh is None or dist.get_rank() == dist.get_world_size() - 1
    model.head.register_forward_hook(lambda _, __, x: _Overflow.apply(x) if last and len(found) == 1 else x)
    found, blocks = [], model.blocks
    if mesh is not None:
        lasp.parallelize(model, mesh)
    if scheme in ("", "sync_grads"):
        optimizer = optimizer(model.parameters())
    else:
        model, optimizer = lasp.data_parallel(model, mesh, scheme=scheme, optimizer=optimizer, blocks=blocks)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, whole_batch(step), mesh)
        scaler.scale(loss).backward()
        if scheme == "sync_grads":
            lasp.sync_grads(model, mesh)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        found.append((loss.item(), scaler.get_scale()))
    return found, {name: whole(p.detach()) for name, p in named_parameters(model).items()}


def _skipped_together(scheme, fused):
    adamw = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-6, fused=fused)
    expected = _scaled_steps(None, "", adamw)
    assert [scale for _, scale in expected[0]] == [1024.0, 512.0, 512.0]
    torch.testing.assert_close(_scaled_steps(mesh_of(dp_shard=2, sp=2), scheme, adamw), expected, **CLOSE)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheme", ["sync_grads", "ddp", "ddp-legacy", "zero1", "zero2", "zero3"])
def test_all_ranks_skip_a_step_that_overflows_on_one(scheme, fused):
    """Of a `torch.amp.GradScaler`, which each rank asks by itself."""
    run_ranks(4, _skipped_together, scheme, fused)


def _packed_documents():
    """One row of packed documents, of which one crosses the border of the ranks."""
    mesh = mesh_of(sp=2)
    cu_seqlens = torch.tensor([0, 4, 9, 13], dtype=torch.int32)
    row = {"input_ids": whole_batch()["input_ids"][:1], "cu_seqlens": cu_seqlens}
    found = []
    for over in (None, mesh):
        model = SmallModel().double()
        if over is not None:
            lasp.parallelize(model, over)
        local = lasp.shard_batch(row, over)
        logits = model(local["input_ids"], local["position_ids"], local["layout"])
        loss, count = lasp.token_loss(logits, local["labels"], mesh=over)
        assert count.item() == 10
        loss.backward()
        if over is not None:
            lasp.sync_grads(model, over)
        found.append((loss, model))
    assert_close(found[1][0], found[0][0], "loss", **CLOSE)
    assert_same_parameters(found[1][1], found[0][1], lambda p: p.grad)


def _layout_through_fsdp2():
    """FSDP2 makes dataclasses among the arguments anew, from their fields, when it casts inputs."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, layout):
            return self.weight * x, layout

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    model = wrap_fsdp2(Tokens(), mesh_of(sp=2), mp_policy=policy)
    layout = lasp.ShardLayout((3, 4), (0, 2, 7))
    y, found = model(torch.ones(3), layout)
    assert y.dtype == torch.bfloat16
    assert found == layout
    assert [x.tolist() for x in found.facts] == [[3, 4], [0, 2, 7]]


def test_a_layout_passes_through_fsdp2():
    run_ranks(2, _layout_through_fsdp2)


def test_packed_documents_over_two_ranks():
    run_ranks(2, _packed_documents)


def _sync_grads_without_a_gradient():
    """A parameter unused on one rank counts as zero there, and one that is frozen stays alone."""
    rank = dist.get_rank()
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(3)) for name in ("both", "one", "frozen")})
    model["wide"] = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    model["frozen"].requires_grad_(False)
    model["both"].grad = torch.full((3,), float(rank + 1))
    model["wide"].grad = torch.full((2,), float(rank), dtype=torch.float64)
    if rank == 1:
        model["one"].grad = torch.ones(3)
    lasp.sync_grads(model, dist.group.WORLD)
    assert model["both"].grad.tolist() == [1.5] * 3
    assert model["one"].grad.tolist() == [0.5] * 3
    assert model["wide"].grad.tolist() == [0.5] * 2
    assert model["frozen"].grad is None


def test_sync_grads_where_a_rank_has_no_gradient():
    run_ranks(2, _sync_grads_without_a_gradient)


class _TwoTables(nn.Module):
    """Sparse gradients: of a module that says so, and of a function, where only the gradient does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 3, sparse=True)
        self.other = nn.Parameter(torch.randn(5, 2))
        self.linear = nn.Linear(3, 2)

    def forward(self, ids):
        return (self.linear(self.table(ids)) * F.embedding(ids, self.other, sparse=True)).sum()


def _sparse_gradients(used):
    """Rank r sees the tokens used[r]; with none of them it runs no backward at all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model, alone = _TwoTables(), _TwoTables()
    if used[rank]:
        model(torch.tensor(used[rank])).backward()
    for ids in used:
        if ids:
            (alone(torch.tensor(ids)) / world).backward()
    lasp.sync_grads(model, dist.group.WORLD)
    for name, p in alone.named_parameters():
        found = model.get_parameter(name).grad
        assert_close(found.to_dense(), p.grad.to_dense(), name, rtol=1e-6, atol=1e-7)
    assert model.table.weight.grad.is_sparse
    assert model.table.weight.grad.coalesce().indices().tolist() == [sorted({i for ids in used for i in ids})]
    torch.optim.SparseAdam([model.table.weight]).step()
    return model.table.weight.tolist()


@pytest.mark.parametrize("used", [((0,), (1,)), ((3, 3, 1), ()), ((2,), (), (4, 2))], ids=str)
def test_sparse_gradients_are_averaged(used):
    first, *others = run_ranks(len(used), _sparse_gradients, used)
    assert all(weight == first for weight in others)


def _sync_expanded_gradients():
    model = nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = torch.tensor(1.0 + dist.get_rank()).expand_as(p)
    lasp.sync_grads(model, dist.group.WORLD)
    assert all(torch.equal(p.grad, torch.full_like(p, 1.5)) for p in model.parameters())


def test_sync_grads_of_expanded_gradients():
    run_ranks(2, _sync_expanded_gradients)


def _wide_gradients(grad_dtype):
    """Of 16-bit weights; the last rank has none."""
    model, wide = nn.Linear(3, 2).bfloat16(), torch.float32 if grad_dtype is None else grad_dtype
    for p in model.parameters():
        p.grad_dtype = grad_dtype
        if dist.get_rank() == 0:
            p.grad = torch.full_like(p, 1 + 2**-9, dtype=wide)
    lasp.sync_grads(model, dist.group.WORLD)
    for p in model.parameters():
        assert torch.equal(p.grad, torch.full_like(p, (1 + 2**-9) / 2, dtype=wide))


@pytest.mark.parametrize("grad_dtype", [torch.float32, None], ids=str)
def test_gradients_wider_than_their_weights(grad_dtype):
    run_ranks(2, _wide_gradients, grad_dtype)


def _large_gradients_in_fp16():
    model = nn.Linear(3, 2).half()
    for p in model.parameters():
        p.grad = torch.full_like(p, 40_000.0)  # twice that is more than fp16 holds
    lasp.sync_grads(model, dist.group.WORLD)
    assert all(torch.equal(p.grad, torch.full_like(p, 40_000.0)) for p in model.parameters())


def test_the_average_of_large_gradients_in_fp16_is_finite():
    run_ranks(2, _large_gradients_in_fp16)


def _other_gradient_dtypes():
    model = nn.Linear(3, 2).bfloat16()
    if dist.get_rank() == 1:
        model.bias.grad_dtype = torch.float32
    with pytest.raises(lasp.RankMismatchError, match=r"rank 1 has parameter bias .* with a gradient in torch\.float32"):
        lasp.sync_grads(model, dist.group.WORLD)


def test_gradients_of_other_dtypes_are_told():
    run_ranks(3, _other_gradient_dtypes)


def test_sync_grads_of_one_process_changes_nothing():
    model = SmallModel()
    lasp.sync_grads(model, None)
    assert all(p.grad is None for p in model.parameters())


def _sync_grads_refuses_fsdp2():
    mesh = mesh_of(sp=2)
    with pytest.raises(ValueError, match=r"tokens.weight is sharded \(DTensor\): FSDP2 averages gradients itself"):
        lasp.sync_grads(parallel_model(mesh, "fsdp2"), mesh)


def test_sync_grads_refuses_fsdp2():
    run_ranks(2, _sync_grads_refuses_fsdp2)


def _fsdp2_needs_a_mesh():
    with pytest.raises(TypeError, match=r"mesh must be a DeviceMesh for FSDP2, got <.*ProcessGroup object>"):
        wrap_fsdp2(SmallModel(), dist.group.WORLD)


def test_fsdp2_needs_a_mesh():
    run_ranks(1, _fsdp2_needs_a_mesh)


def _grad_mesh():
    mesh = mesh_of(dp_replicate=2, sp=2)
    over_all = lasp.grad_mesh(mesh)
    assert (over_all.ndim, over_all.mesh.flatten().tolist()) == (1, [0, 1, 2, 3])
    with_tp = lasp.grad_mesh(mesh_of(sp=2, tp=2))
    assert with_tp.size() == 2  # the tp axis is left out
    assert dist.get_rank() % 2 == with_tp.mesh.flatten().tolist()[0] % 2
    axis = mesh["sp"]
    assert lasp.grad_mesh(axis) is axis
    assert lasp.grad_mesh(None) is None
    with pytest.raises(ValueError, match='the mesh has no axis "sp"'):
        lasp.grad_mesh(DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "cp")))


def test_grad_mesh_is_dp_and_sp_without_tp():
    run_ranks(4, _grad_mesh)


def _dropped_wrapper(collecting):
    """Nobody keeps the wrapper, and Python's collector comes by on some ranks between forward and backward."""
    gc.disable()
    try:
        mesh, batch = mesh_of(dp_shard=1, sp=3), whole_batch()
        alone, model = SmallModel().double(), lasp.parallelize(SmallModel().double(), mesh)
        for _ in range(2):  # the second wrapper takes the place of the first
            expected = loss_of(alone, batch, None)
            expected.backward()
            wrapped = wrap_ddp(model, mesh)
            loss, wrapper = loss_of(wrapped, batch, mesh), weakref.ref(wrapped)
            del wrapped
            if dist.get_rank() in collecting:
                gc.collect()
                assert wrapper() is None
            loss.backward()
            assert_same_parameters(model, alone, lambda p: p.grad)
        reducers = process.reducers
        assert model in reducers
        kept = len(reducers)
        del model
        gc.collect()
        assert len(reducers) < kept, "what averages outlives its model"
    finally:
        gc.enable()


@pytest.mark.parametrize("collecting", [(0, 1, 2), (1,)])
def test_gradients_are_averaged_also_where_nobody_keeps_ddp_itself(collecting):
    run_ranks(3, _dropped_wrapper, collecting)


def _timeout():
    before = timeout_of(dist.group.WORLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_timeout(timedelta(seconds=77))
    assert timeout_of(dist.group.WORLD) == timedelta(seconds=77)
    set_timeout(before)


def test_a_timeout_is_set_without_a_warning():
    run_ranks(2, _timeout)


def _optimizer_made_before_sharding():
    model = SmallModel()
    before = torch.optim.SGD(model.parameters(), lr=0.1)
    wrap_fsdp2(model, mesh_of(dp_shard=2, sp=1), blocks=model.blocks)
    with pytest.raises(RuntimeError, match=r"SGD would step on .* as it was before wrap_fsdp2, which the model no"):
        before.step()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_an_optimizer_that_was_made_before_fsdp2():
    """It would step on weights that no model has, and PyTorch says nothing."""
    run_ranks(2, _optimizer_made_before_sharding)
