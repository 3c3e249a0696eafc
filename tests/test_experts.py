"""Experts over gated units and heads: the formula, what is cut of a dense model, and their balance over ranks."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from inputs import assert_close
from ranks import mesh_of, run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.models import Decoder, DecoderConfig, experts_from_dense
from lasp.models.experts import GatedExperts
from lasp.models.memory import save_memory
from lasp.models.mixers import MIXERS
from lasp.modules import Router
from lasp_kernels.grouped import grouped_linear, in_one_call

VOCABULARY, T, TIMES = 17, 23, 0.3  # so many times the balance is added to the loss
BOTH = {"experts": 5, "experts_per_token": 2, "shared_experts": 1, "attention_experts": 3}


def dense(family="gla", **changes):
    torch.manual_seed(0)
    return Decoder(DecoderConfig(family, VOCABULARY, 2, 24, 3, 30, **changes)).double()


def with_experts(family="gla", **experts):
    model = experts_from_dense(dense(family), **(experts or BOTH))
    with torch.no_grad():
        for router in (m for m in model.modules() if isinstance(m, Router)):
            router.score.weight.mul_(20)  # some are chosen often, some hardly ever
    return model


def batch_of(rows, **more):
    draw = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(VOCABULARY, (rows, T), generator=draw), **more}


def loss_of(model, batch, mesh):
    local = lasp.shard_batch(batch, mesh)
    logits = model(local["input_ids"], local["position_ids"], local["layout"])
    loss, _ = lasp.token_loss(logits, local["labels"], mesh=mesh)
    return loss + TIMES * lasp.balance_loss(model, mesh=mesh)


# The formulas


def test_groups_of_rows_are_multiplied_by_their_own_weight():
    x, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 4), (3, 5, 4)))
    sizes = torch.tensor([2, 0, 7])
    expected = torch.stack([weight[0 if row < 2 else 2] @ x[row] for row in range(9)])
    assert_close(grouped_linear(x, weight, sizes), expected, "y", rtol=1e-12)
    torch.autograd.gradcheck(lambda *a: grouped_linear(*a, sizes), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_gpu_calls_is_the_same(dtype):
    x, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((9, 16), (3, 24, 16)))
    sizes, seed = torch.tensor([2, 0, 7]), torch.randn(9, 24, dtype=dtype)
    found, expected = (f(x, weight, sizes) for f in (in_one_call, grouped_linear))
    for a, b in zip(
        (found, *torch.autograd.grad(found, (x, weight), seed)),
        (expected, *torch.autograd.grad(expected, (x, weight), seed)),
    ):
        assert_close(a, b, "grouped", rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"weight must have multiples of . rows and columns .*\(3, 5, 4\)"):
        in_one_call(torch.randn(9, 4, dtype=dtype), torch.randn(3, 5, 4, dtype=dtype), sizes)


@pytest.mark.parametrize("shared", [0, 1])
def test_each_token_is_the_sum_of_its_experts(shared):
    torch.manual_seed(0)
    layer = GatedExperts(8, 6 * (4 + shared), 4, 2, shared).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros_like(x)
    for row, column in ((i, j) for i in range(2) for j in range(7)):
        token = x[row, column]
        logits = layer.router.score.weight @ token
        best = sorted(range(4), key=lambda e: -float(logits[e].detach()))[:2]
        y = layer.shared(token) if shared else 0
        for e, gate in zip(best, logits[best].softmax(0) * 2):
            y = y + gate * layer.out[e] @ (F.silu(layer.gate[e] @ token) * (layer.value[e] @ token))
        expected = expected + F.pad(y.expand(1, 1, -1), (0, 0, column, 6 - column, row, 1 - row))
    found, seed = layer(x), torch.randn_like(x)
    leaves = [x, *layer.parameters()]
    assert_close(found, expected, "y", rtol=1e-10)
    for a, b in zip(torch.autograd.grad(found, leaves, seed), torch.autograd.grad(expected, leaves, seed)):
        assert_close(a, b, "gradient", rtol=1e-9, atol=1e-11)
    assert torch.autograd.gradgradcheck(layer, x, seed)


def test_heads_that_a_token_has_not_chosen_add_nothing_to_it_but_are_seen_by_others():
    model = with_experts("softmax", attention_experts=3, experts_per_token=1)
    block, x = model.blocks[0], torch.randn(1, T, 24, dtype=torch.float64)
    h, positions = block.mixer_norm(x), torch.arange(T)
    o = block.mixer(h, positions)  # of all heads
    _, chosen = block.head_experts.router(h)
    head = chosen[0, :, 0]
    assert len(head.unique()) > 1
    one_hot = F.one_hot(head, 3).repeat_interleave(8, -1)
    mixed = (o[0] * one_hot) @ block.head_experts.out.weight.T
    assert_close(block.head_experts(h, o)[0], mixed, "heads", rtol=1e-10)


@pytest.mark.parametrize("family", MIXERS)
def test_all_experts_together_are_the_dense_model(family):
    model = dense(family)
    made = experts_from_dense(model, experts=6, experts_per_token=6, shared_experts=4)
    both = experts_from_dense(model, experts=3, experts_per_token=3, attention_experts=3)
    inputs = batch_of(2)["input_ids"]
    for found in (made, both):
        assert_close(found(inputs), model(inputs), family, rtol=1e-12, atol=1e-13)
        assert not {p.data_ptr() for p in found.parameters()} & {p.data_ptr() for p in model.parameters()}
    few = experts_from_dense(model, experts=6, experts_per_token=2)
    assert (few(inputs) - model(inputs)).abs().max() > 1e-3
    assert sum(p.numel() for p in few.parameters()) == sum(p.numel() for p in model.parameters()) + 2 * 6 * 24


def test_a_model_with_experts_begins_as_a_dense_one_does():
    torch.manual_seed(0)
    sizes = []
    for experts in ({}, {"experts": 8}):
        model = Decoder(DecoderConfig("gla", 64, 4, 128, 4, 384, **experts))
        seen = []
        model.blocks[-1].register_forward_hook(lambda _, __, y, seen=seen: seen.append(y.std().item()))
        logits = model(torch.randint(64, (4, 64)))
        sizes.append(seen[0])
        assert logits.std() < 0.3
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)


def test_the_balance_is_one_where_all_are_chosen_alike_and_the_number_of_experts_where_one_is():
    router = Router(4, 4, 1).double()
    with torch.no_grad():
        router.score.weight.copy_(50 * torch.eye(4))
    router(torch.eye(4, dtype=torch.float64)[None])
    assert_close(lasp.balance_loss(router, mesh=None), torch.tensor(1.0, dtype=torch.float64), "even", rtol=1e-9)
    router(torch.eye(4, dtype=torch.float64)[None, :1])
    assert_close(lasp.balance_loss(router, mesh=None), torch.tensor(4.0, dtype=torch.float64), "one", rtol=1e-9)


def test_training_for_balance_alone_balances():
    torch.manual_seed(0)
    router, x = Router(8, 4, 2), torch.randn(2, 64, 8) + 1.0
    optimizer, found = torch.optim.SGD(router.parameters(), lr=0.5), []
    for _ in range(60):
        optimizer.zero_grad()
        router(x)
        found.append(lasp.balance_loss(router, mesh=None))
        found[-1].backward()
        optimizer.step()
    assert found[0] > 1.2
    assert found[-1] < 1.05


# Over ranks


def _reference(batch, model):
    """Of the whole, written out: every router's mean over all tokens."""
    alone, seen = copy.deepcopy(model), []
    for m in alone.modules():
        if isinstance(m, Router):
            m.register_forward_hook(lambda m, args, out: seen.append((m, m.score(args[0]).flatten(0, 1), out[1])))
    whole = lasp.shard_batch(batch, None)
    logits = alone(whole["input_ids"], whole["position_ids"], whole["layout"])
    loss, _ = lasp.token_loss(logits, whole["labels"], mesh=None)
    balances = []
    for m, scores, chosen in seen:
        share = F.one_hot(chosen.flatten(), m.experts).double().mean(0)
        balances.append(m.experts * (share * scores.softmax(-1).mean(0)).sum())
    loss = loss + TIMES * torch.stack(balances).mean()
    loss.backward()
    return alone, loss.detach()


def _check(model, alone, mesh):
    lasp.sync_grads(model, mesh)
    found = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    for name, p in alone.named_parameters():
        assert p.grad.abs().max() > 1e-9, f"{name} has no gradient to compare"
        assert_close(found[name], p.grad, name, rtol=1e-8, atol=1e-11)


def _over_ranks(family, batch, how, dp):
    mesh = mesh_of(dp_shard=dp, sp=torch.distributed.get_world_size() // dp)
    model = with_experts(family)
    alone, expected = _reference(batch, model)
    lasp.parallelize(model, mesh["sp"])
    assert list(model.state_dict()) == list(alone.state_dict())
    if how == "recompute":
        save_memory(model.blocks, recompute=1)
    own = {**batch, "input_ids": batch["input_ids"].chunk(dp)[torch.distributed.get_rank() // mesh["sp"].size()]}
    if how == "streamed":
        loss, _ = lasp.stream_backward(model, own, mesh=mesh, segment=8, balance=TIMES)
    else:
        loss = loss_of(model, own, mesh)
        loss.backward()
    assert_close(loss, expected, "loss", rtol=1e-10)
    _check(model, alone, mesh)
    with pytest.raises(ValueError, match=r"model must have run since .* router 'blocks\.0\..*' has not"):
        lasp.balance_loss(model, mesh=mesh)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("family", ["gla", "softmax", "hgrn2", "mamba2"])
def test_loss_and_gradients_over_ranks(world, family):
    """23 tokens are padded to 24 over 3 ranks: the last token of the last is none."""
    run_ranks(world, _over_ranks, family, batch_of(2), "at once", 1)


@pytest.mark.parametrize("how", ["recompute", "streamed"])
@pytest.mark.parametrize("world", [1, 2])
def test_recomputed_and_streamed(world, how):
    run_ranks(world, _over_ranks, "gla", batch_of(2), how, 1)


@pytest.mark.parametrize("how", ["at once", "streamed"])
def test_two_by_two_ranks(how):
    """The balance is over dp, too: one process that holds all sequences has the same."""
    run_ranks(4, _over_ranks, "gla", batch_of(4), how, 2)


def test_packed_documents():
    offsets = torch.tensor([0, 5, 16, T], dtype=torch.int32)
    run_ranks(2, _over_ranks, "gla", batch_of(1, cu_seqlens=offsets), "streamed", 1)


def _uneven(lengths):
    mesh, batch, model = mesh_of(sp=len(lengths)), batch_of(2), with_experts()
    alone, expected = _reference(batch, model)
    lasp.parallelize(model, mesh)
    layout = lasp.ShardLayout(lengths)
    first, last = layout.bounds(torch.distributed.get_rank())
    local = {name: x[..., first:last] for name, x in lasp.shard_batch(batch, None).items() if name != "layout"}
    loss, _ = lasp.token_loss(model(local["input_ids"], local["position_ids"], layout), local["labels"], mesh=mesh)
    loss = loss + TIMES * lasp.balance_loss(model, mesh=mesh)
    loss.backward()
    assert_close(loss, expected, "loss", rtol=1e-10)
    _check(model, alone, mesh)


def test_uneven_shards():
    run_ranks(3, _uneven, (10, 0, 13))


def _trains(how):
    """Ten steps of AdamW; the whole model, on this rank alone, goes beside."""
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    alone = with_experts()
    model = lasp.parallelize(with_experts(), mesh)
    wrapped = {"sync": lambda: model, "ddp": lambda: wrap_ddp(model, mesh)}.get(
        how, lambda: wrap_fsdp2(model, mesh, blocks=model.blocks)
    )()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (alone, wrapped)]
    losses = []
    for step in range(10):
        ids = torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(step))
        for m, over, optimizer in ((alone, None, optimizers[0]), (wrapped, mesh, optimizers[1])):
            optimizer.zero_grad()
            loss = loss_of(m, {"input_ids": ids}, over)
            loss.backward()
            if how == "sync" and over is not None:
                lasp.sync_grads(model, mesh)
            optimizer.step()
            losses.append(loss.item())
    for expected, found in zip(losses[::2], losses[1::2]):
        assert found == pytest.approx(expected, rel=1e-9)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-3)


@pytest.mark.parametrize(("world", "how"), [(3, "sync"), (2, "ddp"), (2, "fsdp2")])
def test_ten_steps_are_those_of_one_process(world, how):
    run_ranks(world, _trains, how)


def _verified():
    mesh = mesh_of(sp=2)
    assert lasp.verify(with_experts(), mesh).ok


def test_verify_takes_a_model_with_experts():
    run_ranks(2, _verified)


# What does not fit


def _wrong_mesh():
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(with_experts(), mesh)
    local = lasp.shard_batch(batch_of(1), mesh)
    model(local["input_ids"], local["position_ids"], local["layout"])
    with pytest.raises(ValueError, match=r"mesh must hold all ranks of the sequence, \(0, 1\).*got None of the ranks"):
        lasp.balance_loss(model, mesh=None)
    assert lasp.balance_loss(model, mesh=mesh) >= 1 - 1e-9


def _without_layout():
    mesh, model = mesh_of(sp=2), with_experts()
    lasp.parallelize(model, mesh["sp"])
    local = lasp.shard_batch(batch_of(2), mesh)  # of 23 tokens, padded to 24
    model(local["input_ids"], local["position_ids"])
    with pytest.warns(UserWarning, match=r"did not reach the router in layer '.*12 tokens.*balance_loss counts"):
        del local
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        local = lasp.shard_batch(batch_of(2), mesh)
        model(local["input_ids"], local["position_ids"], local["layout"])
        local = lasp.shard_batch({"input_ids": batch_of(2)["input_ids"][:, 1:]}, mesh)
        model(local["input_ids"], local["position_ids"])


def test_padding_without_a_layout_is_said():
    run_ranks(2, _without_layout)


def test_a_mesh_without_ranks_of_the_sequence_is_refused():
    run_ranks(2, _wrong_mesh)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"model must have routers .*, got a Decoder without"):
        lasp.balance_loss(dense(), mesh=None)
    with pytest.raises(ValueError, match=r"model must have run since the last lasp\.balance_loss"):
        lasp.balance_loss(with_experts(), mesh=None)
    with pytest.raises(ValueError, match="model must have routers"):
        lasp.stream_backward(lasp.parallelize(dense(), None), batch_of(1), mesh=None, balance=0.1)
    with pytest.raises(ValueError, match="model must have no experts"):
        experts_from_dense(with_experts(), experts=2)
    with pytest.raises(TypeError, match=r"model must be a lasp\.models\.Decoder"):
        experts_from_dense(nn.Linear(1, 1), experts=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="experts or attention_experts must be more than 0"):
        experts_from_dense(dense())
    with pytest.raises(ValueError, match=r"experts \+ shared_experts must divide glu_width 30, got 4 \+ 0"):
        experts_from_dense(dense(), experts=4)
    with pytest.raises(ValueError, match="attention_experts must divide the 3 heads, got 2"):
        experts_from_dense(dense(), attention_experts=2)
    with pytest.raises(ValueError, match="experts_per_token must be at most experts, 2, got 3"):
        experts_from_dense(dense(), experts=2, experts_per_token=3)
    with pytest.raises(ValueError, match="shared_experts must be 0 where experts are none, got 1"):
        experts_from_dense(dense(), shared_experts=1, attention_experts=3)
    with pytest.raises(ValueError, match="chosen must be at most the 2 experts, got 3"):
        Router(4, 2, 3)


def test_a_forward_without_gradients_gives_no_loss_to_train_with():
    """A reentrant checkpoint runs its forward so: the balance would have no gradient, and nothing would show it."""
    router, x = Router(4, 3, 2), torch.randn(1, 5, 4, requires_grad=True)
    with torch.no_grad():
        router(x)
        assert lasp.balance_loss(router, mesh=None) > 0
    for reentrant in (True, False):
        checkpoint(router, x, use_reentrant=reentrant)
        if reentrant:
            with pytest.raises(ValueError, match=r"model must have run with gradients, .*needs use_reentrant=False"):
                lasp.balance_loss(router, mesh=None)
        else:
            lasp.balance_loss(router, mesh=None).backward()
    assert router.score.weight.grad.abs().max() > 0


def _ranks_that_differ():
    rank, mesh, x = torch.distributed.get_rank(), mesh_of(sp=2), torch.randn(1, 5, 4)
    router = Router(4, 3, 2)
    if rank == 0:
        router(x)
    error, said = (
        (lasp.RankMismatchError, "rank 1 has failed before the sum")
        if rank == 0
        else (ValueError, "must have run since")
    )
    with pytest.raises(error, match=said):
        lasp.balance_loss(router, mesh=mesh)
    other = Router(4, 3 + rank, 2)
    other(x)
    with pytest.raises(lasp.RankMismatchError, match="rank 1 has 4 experts in its routers, the others 3"):
        lasp.balance_loss(other, mesh=mesh)
    router(x)
    assert lasp.balance_loss(router, mesh=mesh) > 0  # the group is as it was


def test_ranks_that_differ_are_told():
    run_ranks(2, _ranks_that_differ)


def test_a_copy_and_a_file_have_no_counts():
    """What a forward has counted belongs to its graph, which cannot be copied."""
    model, ids, file = with_experts(), batch_of(1)["input_ids"], io.BytesIO()
    expected = model(ids)
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with pytest.raises(ValueError, match=r"model must have run since the last lasp\.balance_loss"):
            lasp.balance_loss(other, mesh=None)
        assert torch.equal(other(ids), expected)
    lasp.balance_loss(model, mesh=None).backward()  # the counts of the original are still there


# In other dtypes, and on a GPU


def _worst_in_16_bits(device):
    """The largest relative error of output and gradients, under autocast and in bf16."""
    torch.manual_seed(0)
    layer = GatedExperts(64, 5 * 64, 4, 2, 1).to(device)
    x = torch.randn(2, 37, 64, device=device, requires_grad=True)
    found = []
    for autocast, dtype in ((False, torch.float64), (True, torch.float32), (False, torch.bfloat16)):
        y = x.to(dtype)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            made = copy.deepcopy(layer).to(dtype)
            with torch.no_grad():  # in 16 bits other experts may be chosen
                made.router.score.weight.zero_().add_(torch.arange(4, device=device, dtype=dtype)[:, None])
            out = made(y.abs())
            out.float().square().mean().backward()
        found.append([out, *(p.grad for name, p in made.named_parameters() if "score" not in name)])
    return max(((a.double() - b).norm() / b.norm()).item() for other in found[1:] for a, b in zip(other, found[0]))


def test_in_16_bits():
    assert _worst_in_16_bits("cpu") < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """One launch for all groups, of which one is empty and none is of a round length; the host does not wait."""
    assert _worst_in_16_bits("cuda") < 2e-2
    layer = GatedExperts(64, 4 * 64, 4, 2).to("cuda", torch.bfloat16)
    x = torch.randn(2, 37, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = layer(x)
        (y.float().square().mean() + lasp.balance_loss(layer, mesh=None)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all()
