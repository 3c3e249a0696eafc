"""What ranks hold alike: batches, parameters, decays, initial states, steps. A difference is an error on every rank."""

import copy
import os
import re
import select
import threading
import time
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks
from small_model import VOCABULARY, SmallModel
from test_agreement import SOON, arguments, works
from torch import nn

import lasp
from lasp.checks import agreement
from lasp.checks.checksum import checksums, whole_parameters
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.ranks import peers_of

HINT = r'average gradients before each step \(lasp\.sync_grads\(model, mesh\), .* validate="off": '


def fresh(world=None):
    """A group of all ranks in which nothing was compared yet."""
    return dist.new_group(range(world or dist.get_world_size()))


def raises(message):
    return pytest.raises(lasp.RankMismatchError, match=message)


# Batches


def _ids(seed, tokens=7):
    return torch.randint(0, VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(seed))


def _batches(name):
    rank, odd = dist.get_rank(), dist.get_world_size() - 1
    group, mine, options = fresh(), {"input_ids": _ids(0)}, {}
    packed = {"input_ids": _ids(0)[:1], "cu_seqlens": torch.tensor([0, 3, 7])}
    shown = {
        "seed": rf"""rank {odd} has batch input_ids \[2, 7\] torch.int64 checksum .*, the others \[2, 7\] """,
        "tokens": rf"rank {odd} has batch input_ids \[2, 8\]",
        "labels": rf"rank {odd} has batch labels",
        "borders": rf"""rank {odd} has batch cu_seqlens \[3\] torch.int64 checksum""",
        "option": rf"rank {odd} has pad false, the others true",
        "failure": rf"rank {odd} failed before its exchange: TypeError: ",
    }[name]
    if name == "labels":
        mine["labels"] = _ids(int(rank == odd))
    elif name == "borders":
        mine = packed | ({"cu_seqlens": torch.tensor([0, 4, 7])} if rank == odd else {})
    elif rank == odd:
        mine = {"seed": {"input_ids": _ids(1)}, "tokens": {"input_ids": _ids(0, 8)}, "failure": {}}.get(name, mine)
        options = {"pad": False} if name == "option" else {}
    started = time.monotonic()
    with raises(shown):
        lasp.shard_batch(mine, group, **options)
    assert time.monotonic() - started < SOON
    lasp.shard_batch({"input_ids": _ids(0)}, group)  # compared, as after every difference
    lasp.shard_batch({"input_ids": _ids(rank)}, group)  # not
    with mock.patch.object(agreement, "EVERY", 2), raises("input_ids"):
        lasp.shard_batch({"input_ids": _ids(rank)}, group)
    lasp.shard_batch({"input_ids": _ids(rank)}, group, validate="off")


@pytest.mark.parametrize("name", ["seed", "tokens", "labels", "borders", "option", "failure"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_of_a_sequence_with_different_batches(name, world):
    run_ranks(world, _batches, name)


def _batches_of_replicas():
    """Two sequences have two batches."""
    mesh = mesh_of(sp=2)
    ids = _ids(mesh.get_local_rank("dp_shard"))
    peers_of(mesh["sp"].get_group()).batches.clear()
    lasp.shard_batch({"input_ids": ids}, mesh)


def test_different_sequences_have_different_batches():
    run_ranks(4, _batches_of_replicas)


def _prefetched():
    """A thread cuts batches while another compares calls, in any order of the two."""
    rank, group = dist.get_rank(), fresh()
    errors = []

    def prefetch():
        time.sleep(0.3 * rank)
        try:
            with mock.patch.object(agreement, "EVERY", 1):
                for n in range(6):
                    lasp.shard_batch({"input_ids": _ids(n + (n == 5 and rank == 1))}, group)
        except lasp.RankMismatchError as error:
            errors.append(str(error))

    thread = threading.Thread(target=prefetch)
    thread.start()
    for _ in range(4):
        works(lasp.SequenceParallel(group))
    thread.join()
    assert len(errors) == 1
    assert "rank 1 has batch input_ids" in errors[0]


def test_batches_are_cut_in_a_thread_of_their_own():
    run_ranks(2, _prefetched)


def _threads(other_order):
    """The main thread, as for an evaluation, counts its batches apart from those of two others, which take turns."""
    rank, group = dist.get_rank(), fresh()
    errors, turn = [], threading.Barrier(2)

    def prefetch(number):
        first = number == (rank if other_order else 0)  # which of the two is at the first batch, which is compared
        first or turn.wait(SOON)
        for n in range(2):
            try:
                lasp.shard_batch({"input_ids": _ids(10 * number + n)}, group)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            not first or n or turn.wait(SOON)

    threads = [threading.Thread(target=prefetch, args=(number,)) for number in range(2)]
    with mock.patch.object(agreement, "EVERY", 5):
        for thread in threads:
            thread.start()
        for n in range(5):
            lasp.shard_batch({"input_ids": _ids(100 + n)}, group)
            time.sleep(0.05 * (1 - rank))
        for thread in threads:
            thread.join()
    return errors


def _turns():
    assert _threads(other_order=False) == []


def test_batches_of_several_threads():
    run_ranks(2, _turns)


def _other_turns():
    errors = _threads(other_order=True)
    assert errors[0].startswith("RankMismatchError: the ranks of a sequence cut one batch: draw it by the place in ")
    assert (
        "data parallelism, not by the global rank, and cut all of them in one thread: rank 1 has batch inp" in errors[0]
    )


def test_threads_that_cut_batches_in_another_order_are_an_error_on_every_rank():
    run_ranks(2, _other_turns)


def _forked(known):
    """As a DataLoader's worker, in which no rank can be asked; another process may take longer."""
    group = fresh()
    if known:
        lasp.SequenceParallel(group)
    if dist.get_rank() == 0:
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.write(writer, bytes(lasp.shard_batch({"input_ids": _ids(0)}, group)["input_ids"].flatten().tolist()))
            os._exit(0)
        assert select.select([reader], [], [], SOON)[0]
        assert list(os.read(reader, 100)) == _ids(0)[:, :4].flatten().tolist()
        os.wait()


@pytest.mark.parametrize("known", [True, False])
def test_nothing_is_compared_in_a_forked_process(known):
    run_ranks(2, _forked, known)


# Parameters


def _models(name):
    rank, model = dist.get_rank(), SmallModel()
    shown = {
        "shape": r"rank 1 has parameter head.weight \[16, 12\] torch.float32, trained, the others \[17, 12\]",
        "dtype": "rank 1 has parameter tokens.weight .*torch.float64, trained, the others .*torch.float32, trained",
        "frozen": "rank 1 has parameter tokens.weight .*, frozen, the others .*, trained",
        "more": r"rank 1 has parameter extra \[1\] torch.float32, trained, the others nothing",
        "order": "rank 1 has the order of parameter checksum ",
    }[name]
    if rank == 1:
        if name == "shape":
            model.head = nn.Linear(12, 16, bias=False)
        elif name == "dtype":
            model.tokens.double()
        elif name == "frozen":
            model.tokens.requires_grad_(False)
        elif name == "more":
            model.extra = nn.Parameter(torch.zeros(1))
        else:
            model.head, model.tokens = model._modules.pop("head"), model._modules.pop("tokens")
    return model, shown


def _parallelize_other_models(name):
    model, shown = _models(name)
    with raises(shown):
        lasp.parallelize(model, dist.group.WORLD)
    lasp.parallelize(model, dist.group.WORLD, validate="off")


@pytest.mark.parametrize("name", ["shape", "dtype", "frozen", "more", "order"])
def test_ranks_with_other_parameters(name):
    run_ranks(3, _parallelize_other_models, name)


def _average_other_models(name, later):
    model, shown = _models(name)
    same, group = SmallModel(), fresh()
    for m in (same, model):
        for p in m.parameters():
            p.grad = torch.ones_like(p)
    peers_of(group).counted[model] = 2 * later  # at the first calls the values are compared as well
    before = [p.grad.clone() for p in model.parameters()]
    for _ in range(2):
        started = time.monotonic()
        with raises(shown):
            lasp.sync_grads(model, group)
        assert time.monotonic() - started < SOON
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before))
    lasp.sync_grads(same, group)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", ["shape", "dtype", "frozen", "more", "order"])
def test_gradients_of_other_parameters_are_not_averaged(name, later):
    run_ranks(3, _average_other_models, name, later)


def _wrap_other_models(name, wrap):
    model, shown = _models(name)
    mesh = mesh_of(sp=3)
    started = time.monotonic()
    with raises(shown):
        wrap(model, mesh)
    assert time.monotonic() - started < SOON
    wrap(SmallModel(), mesh)


@pytest.mark.parametrize("name", ["shape", "dtype", "frozen", "more", "order"])
@pytest.mark.parametrize("wrap", [wrap_ddp, wrap_fsdp2])
def test_other_parameters_are_not_wrapped(name, wrap):
    run_ranks(3, _wrap_other_models, name, wrap)


def _step(model, optimizer, mesh, sync=True, ids=None):
    optimizer.zero_grad()
    local = lasp.shard_batch({"input_ids": _ids(0) if ids is None else ids}, mesh, validate="off")
    logits = model(local["input_ids"], local["position_ids"])
    loss, _ = lasp.token_loss(logits, local["labels"], mesh=mesh)
    loss.backward()
    if sync:
        lasp.sync_grads(model, mesh, validate="off")
    optimizer.step()


def _weights(how):
    """Other weights, two parameters of equal shape that have changed places, and one bit."""
    rank, group = dist.get_rank(), fresh()
    model = SmallModel(seed=rank if how == "seed" else 0)
    lasp.parallelize(model, group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = model.blocks[0].mlp, model.blocks[1].mlp
    if rank == 1 and how == "swapped":
        with torch.no_grad():
            kept = first[1].weight.clone()
            first[1].weight.copy_(second[1].weight)
            second[1].weight.copy_(kept)
    elif rank == 1 and how == "a bit":
        first[1].bias.data.view(torch.int32)[3] += 1
    name = {"seed": "tokens.weight", "swapped": "blocks.0.mlp.1.weight", "a bit": "blocks.0.mlp.1.bias"}[how]
    before = [p.detach().clone() for p in model.parameters()]
    started = time.monotonic()
    for _ in range(2):
        with raises(rf"^(?!.*blocks.1.norm)before the step of the optimizer: {HINT}rank 1 has values of {name} "):
            _step(model, optimizer, group)
    assert time.monotonic() - started < SOON
    assert all(torch.equal(x, p) for x, p in zip(before, model.parameters()))
    model.load_state_dict(SmallModel().state_dict())
    for _ in range(3):
        _step(model, optimizer, group)


@pytest.mark.parametrize("how", ["seed", "swapped", "a bit"])
def test_other_weights_before_the_first_step(how):
    run_ranks(2, _weights, how)


def _not_averaged(sync):
    """Gradients that are not averaged over the sequence show in the weights at the second step."""
    group = fresh()
    model = lasp.parallelize(SmallModel(), group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _step(model, optimizer, group, sync)
    with nullcontext() if sync else raises(f"^before the step of the optimizer: {HINT}rank 1 has values of "):
        _step(model, optimizer, group, sync)
    if sync:
        for _ in range(2):
            _step(model, optimizer, group)
        if dist.get_rank() == 2:
            model.head.weight.data[3, 4] *= 2
        _step(model, optimizer, group)  # not compared
        steps = peers_of(group).compared_steps
        with mock.patch.object(agreement, "EVERY", steps), raises("rank 2 has values of head.weight"):
            _step(model, optimizer, group)


@pytest.mark.parametrize("sync", [False, True])
def test_weights_that_drift_apart(sync):
    run_ranks(3, _not_averaged, sync)


def _values_of_sync_grads():
    """Also over the ranks of data parallelism, and where no sequence is split."""
    rank, group = dist.get_rank(), fresh()
    model = SmallModel()
    first = model.head.weight[0, 0].item()
    model.head.weight.data[0, 0] += float(rank == 2)
    for _ in range(2):
        with raises(rf"^{HINT}rank 2 has values of head.weight "):
            lasp.sync_grads(model, group)
    lasp.sync_grads(model, group, validate="off")
    model.head.weight.data[0, 0] = first
    for n in range(4):
        with mock.patch.object(agreement, "EVERY", 3), raises("rank 1") if n == 3 else nullcontext():
            lasp.sync_grads(model, group)
        if n == 2:
            model.head.weight.data[0, 0] += float(rank == 1)


def test_sync_grads_compares_values():
    run_ranks(3, _values_of_sync_grads)


def _fsdp2():
    """What is sharded differs, as it must; what is not is compared."""
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(SmallModel(), mesh["sp"])
    wrap_fsdp2(model, mesh, blocks=model.blocks)
    assert whole_parameters(model) == {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        local = lasp.shard_batch({"input_ids": _ids(mesh.get_local_rank("dp_shard"))}, mesh, validate="off")
        model(local["input_ids"], local["position_ids"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_sharded_parameters_are_not_compared():
    run_ranks(2, _fsdp2)


# Steps


def _one_step_more(odd):
    """An optimizer that one rank steps alone: told at the next step of all."""
    rank, group = dist.get_rank(), fresh()
    model = lasp.parallelize(SmallModel(), group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        _step(model, optimizer, group)
    if rank == odd:
        optimizer.step()
    with raises(rf"rank {odd} has optimizer steps since the last comparison 2, the others 1"):
        _step(model, optimizer, group)
    _step(model, optimizer, group)


@pytest.mark.parametrize("odd", range(3))
def test_a_step_that_only_one_rank_takes(odd):
    run_ranks(3, _one_step_more, odd)


def _only_steps():
    """A rank that goes on without any exchange comes to the comparison as well."""
    rank, group = dist.get_rank(), fresh()
    model = lasp.parallelize(SmallModel(), group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        _step(model, optimizer, group)
    started = time.monotonic()
    peers = peers_of(group)
    if rank != 1:
        peers.exchanges["blocks.0", False] += 1  # as over NCCL, where nobody waits for the rank that left it out
    shown = "rank 1 has exchanges since the last step .*; rank 1 has optimizer steps since .* 2, the others 1"
    with raises(shown):
        for _ in range(2 if rank == 1 else 1):
            optimizer.step()
    assert time.monotonic() - started < SOON


def test_a_rank_that_only_steps():
    run_ranks(3, _only_steps)


def _two_optimizers():
    """Of which the second never follows an exchange; and more steps than before, on all ranks."""
    group = fresh()
    model = lasp.parallelize(SmallModel(), group)
    halves = [list(model.parameters())[::2], list(model.parameters())[1::2]]
    optimizers = [torch.optim.SGD(half, lr=0.1) for half in halves]
    foreign = torch.optim.SGD([torch.ones(2)], lr=0.1)
    for n in range(4):
        _step(model, optimizers[0], group)
        for _ in range(7 * dist.get_rank()):  # of no concern to the others
            foreign.step()
        optimizers[1].step()
        optimizers[1].zero_grad()
        if n == 2:
            for _ in range(5):
                optimizers[1].step()


def test_two_optimizers():
    run_ranks(2, _two_optimizers)


def _in_another_order():
    """What reaches the optimizer over NCCL: as many exchanges of each layer, in another order."""
    rank, group = dist.get_rank(), fresh()
    sequences = [lasp.SequenceParallel(group, name=name) for name in "ab"]
    for sequence in sequences[:: -1 if rank == 1 else 1]:
        for reverse in (False, True):
            lasp.exchange.count_exchange(sequence, sequence.traffic_of("x"), reverse=reverse)
    with raises(r'rank 1 has exchanges since the last step .*\[1, 1\], "layers": 2, "order": "\w{8}"}, the others'):
        agreement.compare_exchanges()


def test_the_order_of_exchanges_is_compared_before_a_step():
    run_ranks(3, _in_another_order)


# What a step depends on besides


class Counting(SmallModel):
    """With buffers: one is saved, one is not, and one counts tokens."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.arange(3.0))
        self.blocks[1].register_buffer("unsaved", torch.arange(4), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids, position_ids, layout=None):
        self.seen += input_ids.sum()
        return super().forward(input_ids, position_ids, layout) * self.kept.mean()


def _buffers(odd, name):
    """Before the first step; what is counted afterwards is each rank's own."""
    rank, group = dist.get_rank(), fresh()
    for sound in (True, False):
        model = lasp.parallelize(Counting(), group)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if not sound and rank == odd:
            model.get_buffer(name).view(-1)[-1] += 1
        before = [p.detach().clone() for p in model.parameters()]
        started = time.monotonic()
        with (
            nullcontext()
            if sound
            else raises(rf"each may count on its own: rank {odd} has buffer {name} .* checksum .*, the others ")
        ):
            _step(model, optimizer, group)
        assert time.monotonic() - started < SOON
        assert sound or all(torch.equal(x, p) for x, p in zip(before, model.parameters()))
        _step(model, optimizer, group)  # once it was told, all go on
        copied = copy.deepcopy(model)
        copied(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4))
    assert len({*map(int, _of_all(model.seen, group))}) > 1


def _of_all(x, group):
    found = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(found, x, group=group)
    return found


@pytest.mark.parametrize(("odd", "name"), [(0, "kept"), (1, "blocks.1.unsaved"), (2, "seen")])
def test_other_buffers_before_the_first_step(odd, name):
    run_ranks(3, _buffers, odd, name)


def _evaluating(odd, part):
    rank, group = dist.get_rank(), fresh()
    model = lasp.parallelize(SmallModel(), group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, shown = {
        "model": (model, f"{len(list(model.modules()))}: the model; tokens; "),
        "a part": (model.blocks[1].mlp[2], "1: blocks.1.mlp.2; checksum "),
    }[part]
    for n in range(5):
        model.train()
        model.blocks[0].norm.eval()  # on all ranks: as they like
        if n == 2:
            model.blocks[0].norm.train()
            module.train(rank != odd)
        elif n == 3:
            model.eval()
        before = model.head.weight.detach().clone()
        with (
            raises(rf"rank {odd} has modules in evaluation mode \"{shown}.*, the others \"none")
            if n == 2
            else nullcontext()
        ):
            _step(model, optimizer, group)
        assert torch.equal(before, model.head.weight) == (n == 2)


@pytest.mark.parametrize(("odd", "part"), [(0, "model"), (1, "a part"), (2, "model")])
def test_modules_in_evaluation_mode_on_one_rank(odd, part):
    run_ranks(3, _evaluating, odd, part)


def _settings(name, odd):
    """Also of a second optimizer, whose steps are not compared by themselves."""
    rank, group = dist.get_rank(), fresh()
    model = lasp.parallelize(SmallModel(), group)
    parameters = list(model.parameters())
    groups = [{"params": parameters[1::2]}, {"params": parameters[2::2], "lr": torch.tensor(0.25)}]
    first, second = torch.optim.AdamW(groups, lr=0.5), torch.optim.SGD(parameters[:1], lr=0.125, momentum=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(first, 2)
    changed, number, value = {
        "lr": (first, 0, 0.75),
        "betas": (first, 0, (0.5, 0.999)),
        "lr of the second group": (first, 1, torch.tensor(0.75)),
        "momentum": (second, 0, 0.75),
    }[name]
    entry = name.split(" ")[0]
    usual = changed.param_groups[number][entry]
    shown = str(value.item() if isinstance(value, torch.Tensor) else value)
    kind = type(changed).__name__
    shown = rf"rank {odd} has the optimizer's {entry} of group {number} \({kind}\) {re.escape(shown)}, the others"
    for n in range(4):
        if n == 1 and rank == odd:
            changed.param_groups[number][entry] = value
        before = parameters[1].detach().clone()
        wrong = n == (2 if changed is second else 1)
        with raises(shown) if wrong else nullcontext():
            _step(model, first, group)
        assert torch.equal(before, parameters[1]) == wrong
        if wrong:
            changed.param_groups[number][entry] = usual
        second.step()
        if n == 2:
            schedule.step()  # on all ranks


@pytest.mark.parametrize(
    ("name", "odd"), [("lr", 0), ("betas", 1), ("lr of the second group", 2), ("momentum", 1), ("lr", 2)]
)
def test_an_optimizer_that_is_told_something_else_on_one_rank(name, odd):
    run_ranks(3, _settings, name, odd)


def _scaled_loss(odd):
    rank, group = dist.get_rank(), fresh()
    model = lasp.parallelize(SmallModel(), group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for n in range(5):
        optimizer.zero_grad()
        local = lasp.shard_batch({"input_ids": _ids(n)}, group)
        logits = model(local["input_ids"], local["position_ids"])
        loss, _ = lasp.token_loss(logits, local["labels"], mesh=group)
        factor = 1.0 if n == 4 else 0.5  # which all ranks may change
        (loss * (2 * factor if (rank, n) == (odd, 3) else factor)).backward()
        lasp.sync_grads(model, group)
        before = model.head.weight.detach().clone()
        shown = rf"rank {odd} has the gradient that reached the loss 1.0, the others 0.5"
        with raises(shown) if n == 3 else nullcontext():
            optimizer.step()
        assert torch.equal(before, model.head.weight) == (n == 3)


@pytest.mark.parametrize("odd", range(3))
def test_a_loss_that_is_scaled_on_one_rank(odd):
    run_ranks(3, _scaled_loss, odd)


# Arguments that every rank holds whole


def _arguments(name, operator):
    rank, sequence = dist.get_rank(), lasp.SequenceParallel(dist.group.WORLD, name="deep")
    x = arguments()
    decay, state = (
        torch.tensor([-0.1, -0.2], requires_grad=True),
        torch.ones(*x["k"].shape[:1], *x["k"].shape[2:], x["v"].shape[-1]),
    )
    given = {"log_decay": decay, "initial_state": state}
    if operator == "delta":
        given.pop("log_decay")

    def call():
        if operator == "delta":
            lasp.delta_rule(**x, beta=x["k"][..., 0], **given, sequence=sequence)
        else:
            lasp.linear_attention(**x, **given, sequence=sequence)

    if rank == 2:
        given[name].data.view(-1)[1] *= 1.5
    with raises(f'layer "deep": rank 2 has the values of {name} .* checksum .*, the others'):
        call()
    if rank == 2:
        given[name].data.view(-1)[1] /= 1.5
    call()
    if rank == 2:
        given[name].data.view(-1)[1] *= 1.5
    call()  # not compared
    with mock.patch.object(agreement, "EVERY", 2), raises("rank 2 has the values"):
        call()


@pytest.mark.parametrize(
    ("name", "operator"), [("log_decay", "linear"), ("initial_state", "linear"), ("initial_state", "delta")]
)
def test_other_values_of_what_every_rank_holds(name, operator):
    run_ranks(3, _arguments, name, operator)


# Checksums


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
def test_a_checksum_sees_every_number_and_its_place(dtype):
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (3, 5), generator=draw).to(dtype)
    x[0, 0], x[2, 4] = 1, 0
    others = {"first": x.clone(), "last": x.clone(), "order": x.flip(0, 1), "strides": x.t().contiguous().t()}
    others["first"][0, 0], others["last"][2, 4] = 0, 1
    found = checksums({"x": x, **others})
    assert found["x"] == found["strides"]
    assert len({found[name] for name in ("x", "first", "last", "order")}) == 4
    assert found["x"] != checksums({"x": x.view(5, 3)})["x"]
    assert checksums({"": x[:0]})[""]


def test_a_checksum_of_parts_is_that_of_the_whole():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = checksums({"x": x})
    with mock.patch("lasp.checks.checksum._AT_ONCE", 7):
        assert checksums({"x": x}) == whole
        x[999] += 1
        assert checksums({"x": x}) != whole
