"""CO2: outer steps of replicas that train apart, against the rule written out in one process, in fp64."""

import functools
import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import _checkpoint
import pytest
import torch
import torch.distributed as dist
from inputs import assert_close
from processes import finish, free_port, start
from ranks import mesh_of, of_one_rank, run_ranks, shutdown
from small_model import VOCABULARY, SmallModel
from test_train import SMALLEST, _alone, _assert_on_all, _assert_same_state, _losses, _state
from torch import nn
from torch.distributed.tensor import DTensor

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.data_parallel.schemes import SCHEMES
from lasp.ranks import grad_group, shard_mesh

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # all is in fp64
T, EVERY = 13, 3
STEPS = 4 * EVERY + 2
RULES = {
    "plain": {},
    "no momentum": {"outer_momentum": 0.0},
    "all": {"outer_momentum": 0.7, "outer_lr": 0.8, "gap_penalty": 1.6, "clip": 2e-3},
    "function": {"gap_penalty": lambda s: 1 + s.moved.abs() / 1e-3 + s.round + s.sent_lr / s.lr},
}
# dp_replicate, dp_shard, sp, and how a replica averages its gradients
LAYOUTS = [
    (2, 1, 1, "alone"),
    (2, 1, 2, "sync_grads"),
    (2, 1, 2, "ddp"),
    (2, 1, 2, "fsdp2"),
    (2, 2, 1, "fsdp2"),
    (1, 1, 2, "ddp"),
    (4, 1, 1, "alone"),
    (2, 1, 2, "ddp-legacy"),
    (2, 1, 2, "zero1"),
    (2, 2, 1, "zero2"),
]


def rows(replica, step):
    """Two sequences of an odd length, with labels masked unevenly: each replica has its own."""
    draw = torch.Generator().manual_seed(100 * step + replica)
    tokens = torch.randint(VOCABULARY, (2, T), generator=draw)
    labels = tokens.clone()
    labels[0, : 3 + replica] = -100
    return {"input_ids": tokens, "labels": labels}


def loss_of(model, batch, mesh):
    local = lasp.shard_batch(batch, mesh)
    return lasp.token_loss(model(local["input_ids"], local["position_ids"]), local["labels"], mesh=mesh)[0]


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)


class Simulation:
    """The rule of lasp/data_parallel/co2.py for all replicas in one process; flat vectors, no ranks."""

    def __init__(self, replicas, **options):
        self.models = [SmallModel().double() for _ in range(replicas)]
        self.optimizers = [optimizer_of(m) for m in self.models]
        self.options = {"outer_lr": 1.0, "outer_momentum": 0.5, "gap_penalty": 1.0, "clip": None, **options}
        self.outer = self.flat(0)
        self.momentum = torch.zeros_like(self.outer)
        self.sent, self.sent_lr, self.moved, self.rounds, self.steps = None, None, torch.zeros_like(self.outer), 0, 0

    def flat(self, replica):
        return torch.cat([p.detach().flatten() for p in self.models[replica].parameters()])

    def put(self, values):
        for model in self.models:
            torch.nn.utils.vector_to_parameters(values.clone(), model.parameters())

    def local_step(self, step):
        for replica, (model, optimizer) in enumerate(zip(self.models, self.optimizers)):
            optimizer.zero_grad()
            loss_of(model, rows(replica, step), None).backward()
            set_lr(optimizer, step)
            optimizer.step()
        self.steps += 1
        if self.steps == EVERY:
            self.end_round()

    def end_round(self):
        mean = torch.stack([self.flat(r) for r in range(len(self.models))]).mean(0)
        if self.sent is not None:
            self.outer_step()
        self.sent, self.sent_lr = mean, self.optimizers[0].param_groups[0]["lr"]
        self.rounds, self.steps = self.rounds + 1, 0
        self.put(self.outer)

    def outer_step(self):
        o = self.options
        gap = o["gap_penalty"]
        if callable(gap):
            lr = self.optimizers[0].param_groups[0]["lr"]
            difference = self.outer - self.sent
            gap = gap(lasp.data_parallel.co2.Staleness(self.rounds - 1, lr, self.sent_lr, difference, self.moved))
        self.momentum = o["outer_momentum"] * self.momentum + (self.outer - self.sent) / gap
        if o["clip"] is not None:
            self.momentum = self.momentum.clamp(-o["clip"], o["clip"])
        before = self.outer
        self.outer = self.outer - o["outer_lr"] * self.momentum
        self.moved = self.outer - before

    def finish(self):
        if self.steps:
            self.end_round()
        if self.sent is not None:
            self.outer_step()
            self.sent = None
            self.put(self.outer)


def set_lr(optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * 0.97**step


def build(mesh, how):
    """A replica's model; another seed would be another model."""
    replica = lasp.replica_mesh(mesh)
    model = lasp.parallelize(SmallModel().double(), replica["sp"])
    if how == "ddp":
        model = wrap_ddp(model, replica)
    elif how == "fsdp2":
        model = wrap_fsdp2(model, replica, blocks=model.blocks)
    elif how in SCHEMES:
        make = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-6)
        return lasp.data_parallel(model, replica, scheme=how, optimizer=make, blocks=model.blocks)
    return model, optimizer_of(model)


def rows_of_rank(mesh, step):
    """dp_shard deals out the rows of a replica."""
    shard, place = mesh["dp_shard"].size(), mesh["dp_shard"].get_local_rank()
    batch = rows(mesh["dp_replicate"].get_local_rank(), step)
    count = 2 // shard
    return {name: x[place * count : (place + 1) * count] for name, x in batch.items()}


def train(model, optimizer, co2, mesh, how, steps):
    """Local steps; what `co2.step` returned."""
    replica, ended = lasp.replica_mesh(mesh), []
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, rows_of_rank(mesh, step), replica).backward()
        if how == "sync_grads":
            lasp.sync_grads(model, replica)
        set_lr(optimizer, step)
        optimizer.step()
        ended.append(co2.step())
    return ended


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def named(model):
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def flat(model):
    return torch.cat([whole(p.detach()).flatten() for p in named(model).values()])


def of_state(tensors):
    return torch.cat([whole(x).flatten() for x in tensors.values()])


@functools.cache
def simulated(replicas, rule):
    """Weights of all replicas after each step; what the rule holds then; and what it ends with."""
    simulation, of_steps = Simulation(replicas, **RULES[rule]), []

    def of_all():
        return torch.stack([simulation.flat(replica) for replica in range(replicas)])

    for step in range(STEPS):
        simulation.local_step(step)
        of_steps.append(of_all())
    held = {"outer": simulation.outer, "momentum": simulation.momentum, "average": simulation.sent}
    simulation.finish()
    assert_close(of_all()[0], simulation.outer, "what the simulation ends with", **CLOSE)
    return of_steps, held, of_all(), simulation.momentum


def _rule(layout, rule):
    *factors, how = layout
    mesh = mesh_of(dp_replicate=factors[0], dp_shard=factors[1], sp=factors[2])
    me = mesh["dp_replicate"].get_local_rank()
    model, optimizer = build(mesh, how)
    co2 = lasp.CO2(model, optimizer, mesh, bucket_mb=1, sync_every=EVERY, **RULES[rule])
    of_steps, held, at_the_end, momentum = of_one_rank(simulated, factors[0], rule)
    for step, expected in enumerate(of_steps):
        ended = train(model, optimizer, co2, mesh, how, [step])
        assert ended == [(step + 1) % EVERY == 0]
        assert_close(flat(model), expected[me], f"weights after step {step}", **CLOSE)
    state = co2.state_dict()
    for name, expected in held.items():
        assert_close(of_state(state[name]), expected, name, **CLOSE)
    assert not torch.allclose(held["momentum"], torch.zeros(()).double())
    own = flat(model)
    with co2.outer_weights():
        assert_close(flat(model), held["outer"], "weights inside", **CLOSE)
    assert torch.equal(flat(model), own)
    if factors[0] > 1:
        assert not torch.allclose(*of_steps[-1][:2]), "replicas do not train apart"
    co2.finish()
    assert_close(flat(model), at_the_end[me], "weights at the end", **CLOSE)
    if RULES[rule].get("clip"):
        assert (momentum.abs() == RULES[rule]["clip"]).any(), "the clip does nothing here"
    train(model, optimizer, co2, mesh, how, [20])  # and on it goes


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(map(str, x)))
def test_replicas_train_by_the_rule(layout):
    run_ranks(layout[0] * layout[1] * layout[2], _rule, layout, "all")


@pytest.mark.parametrize("rule", RULES)
def test_each_rule(rule):
    run_ranks(2, _rule, LAYOUTS[0], rule)


def test_a_function_for_the_gap_sees_each_rank_s_part():
    run_ranks(4, _rule, (2, 1, 2, "ddp"), "function")


def _same_as_delayed_sgd():
    """docs/co2.md: the rule is outer SGD a round late, with momentum `outer_momentum - outer_lr / gap_penalty`."""
    beta, lr, gap = 0.6, 0.9, 1.5
    mesh = mesh_of(dp_replicate=2)
    (model, optimizer), simulation = build(mesh, "alone"), Simulation(2)
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=1, outer_momentum=beta, outer_lr=lr, gap_penalty=gap)
    x, m, change = simulation.outer, torch.zeros_like(simulation.outer), None
    for step in range(6):
        simulation.put(x)
        for replica, (theirs, inner) in enumerate(zip(simulation.models, simulation.optimizers)):
            inner.zero_grad()
            loss_of(theirs, rows(replica, step), None).backward()
            set_lr(inner, step)
            inner.step()
        if change is not None:
            m = (beta - lr / gap) * m + change / gap
        change = x - (simulation.flat(0) + simulation.flat(1)) / 2  # of the round that ends, from its own beginning
        x = x - lr * m
        train(model, optimizer, co2, mesh, "alone", [step])
        assert_close(flat(model), x, f"round {step}", **CLOSE)


def test_the_rule_is_sgd_a_round_late_with_less_momentum():
    run_ranks(2, _same_as_delayed_sgd)


# Going on in the middle of a round


def _resume(layout, after):
    *factors, how = layout
    mesh = mesh_of(dp_replicate=factors[0], dp_shard=factors[1], sp=factors[2])
    options = {"sync_every": EVERY, "bucket_mb": 1, **RULES["all"]}
    model, optimizer = build(mesh, how)
    co2 = lasp.CO2(model, optimizer, mesh, **options)
    train(model, optimizer, co2, mesh, how, range(after))
    state = co2.state_dict()
    assert (state["rounds"], state["local_steps"]) == divmod(after, EVERY)
    assert state["on_the_way"] == (after >= EVERY)
    weights = {name: p.detach().clone() for name, p in named(model).items()}
    moments = optimizer.state_dict()
    copied = {"state": {i: {k: v.clone() for k, v in s.items()} for i, s in moments["state"].items()}}
    groups = [dict(group) for group in moments["param_groups"]]
    train(model, optimizer, co2, mesh, how, range(after, after + 2 * EVERY + 1))

    again, its_optimizer = build(mesh, how)
    its_co2 = lasp.CO2(again, its_optimizer, mesh, **options)
    with torch.no_grad():
        for name, p in named(again).items():
            p.copy_(weights[name])
    its_optimizer.load_state_dict({**copied, "param_groups": groups})
    its_co2.load_state_dict(state)
    train(again, its_optimizer, its_co2, mesh, how, range(after, after + 2 * EVERY + 1))
    assert torch.equal(flat(again), flat(model))
    first, second = co2.state_dict(), its_co2.state_dict()
    for name in ("outer", "momentum", "average"):
        assert torch.equal(of_state(first[name]), of_state(second[name])), name
    assert {k: v for k, v in first.items() if not isinstance(v, dict)} == {
        k: v for k, v in second.items() if not isinstance(v, dict)
    }


@pytest.mark.parametrize(
    ("layout", "after"),
    [
        *((LAYOUTS[2], after) for after in (1, EVERY, 2 * EVERY + 1)),
        *((LAYOUTS[3], after) for after in (EVERY, 2 * EVERY + 2)),
    ],
    ids=["ddp-1", "ddp-3", "ddp-7", "fsdp2-3", "fsdp2-8"],
)
def test_a_run_goes_on_in_the_middle_of_a_round_with_the_same_bits(layout, after):
    run_ranks(4, _resume, layout, after)


# Of examples/train.py: replicas are saved with what is their own, and a run goes on where it was

ON_THE_WAY = [  # ranks, --dp, --parallel, steps done
    (2, 2, "ddp", 2),
    (4, 2, "fsdp2", 3),
    (4, 2, "zero1", 3),
    (4, 2, "zero2", 1),  # in micro-batches
]


@pytest.mark.parametrize(("world", "dp", "parallel", "done"), ON_THE_WAY)
def test_the_example_goes_on_in_the_middle_of_a_round_with_the_same_bits(tmp_path, world, dp, parallel, done):
    sizes = ["--seq-len=33", "--batch=4", "--steps=4", "--save-every=1", f"--dp={dp}", f"--parallel={parallel}"]
    sizes += [f"--data={__file__}", "--outer-every=2", "--validate", "--validate-every=3"]
    sizes += ["--accumulate=2"] if parallel == "zero2" else []
    _assert_on_all(world, 0, [], [*sizes, f"--out={tmp_path / 'whole'}"], tiny=SMALLEST)
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    (folder / "LATEST").write_text(f"step-00000{done}")
    for step in range(done + 1, 5):
        shutil.rmtree(folder / f"step-00000{step}")
    _assert_on_all(world, 0, [], [*sizes, f"--out={folder}", "--resume"], tiny=SMALLEST)
    assert _losses(folder) == _losses(tmp_path / "whole")
    assert (folder / "validation.json").read_text() == (tmp_path / "whole" / "validation.json").read_text()
    _assert_same_state(folder, tmp_path / "whole", range(1, 5))
    tensors, text = _state(folder, done)
    values = json.loads(text)
    assert (values["outer.rounds"], values["outer.local_steps"]) == divmod(done, 2)
    assert values["outer.on_the_way"] == (done >= 2)
    weight, apart = "head.weight", done % 2 > 0
    assert torch.equal(tensors[f"replica0.model.{weight}"], tensors[f"replica1.model.{weight}"]) != apart
    tensors, _ = _state(folder, 4)  # the end: what was on its way is part of all
    for replica in range(dp):
        assert torch.equal(tensors[f"replica{replica}.model.{weight}"], tensors[f"model.{weight}"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_the_replicas_of_the_example_may_grow_but_not_their_number(tmp_path, parallel):
    sizes = ["--seq-len=33", "--batch=4", "--steps=8", "--save-every=2", f"--data={__file__}", "--outer-every=4"]
    _assert_on_all(2, 0, [], [*sizes, "--dp=2", f"--out={tmp_path / 'whole'}"], tiny=SMALLEST)
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    (folder / "LATEST").write_text("step-000006")
    shutil.rmtree(folder / "step-000008")
    if parallel == "ddp":
        words = ["its replicas is 2, that of this run 4"]
        _assert_on_all(4, 1, words, [*sizes, "--dp=4", f"--out={folder}", "--resume"], tiny=SMALLEST)
    _assert_on_all(4, 0, [], [*sizes, "--dp=2", f"--parallel={parallel}", f"--out={folder}", "--resume"], tiny=SMALLEST)
    assert _losses(folder) == pytest.approx(_losses(tmp_path / "whole"), rel=1e-5)


def test_the_example_refuses_replicas_that_cannot_be(tmp_path):
    sizes = ["--seq-len=33", "--batch=4", "--steps=2", f"--data={__file__}", f"--out={tmp_path / 'out'}"]
    code, text = _alone(*sizes, "--outer-every=2")
    assert code == 2
    assert "--outer-every" in text
    assert "of --dp replicas, of which there is one" in text
    code, text = _alone(*sizes, "--outer-every=2", "--dp=2", "--verify")
    assert code == 2
    assert "--outer-every does not" in text
    code, text = _alone(*sizes, "--outer-every=2", "--dp=2", "--dp-replicate=2")
    assert code == 2
    assert "Invalid value for --dp-replicate" in text
    assert "with --outer-every each of the --dp ranks is a replica that trains apart" in text
    code, text = _alone(*sizes, "--outer-every=2", "--dp=2", "--parallel=hsdp")
    assert code == 2
    assert "hsdp averages over copies at every step, and --outer-every does not" in text


def _parts_of_replicas():
    """What this rank writes, and of what each replica has alike: names of tensors that are sharded, and of others."""
    mesh = mesh_of(dp_replicate=2, dp_shard=2)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)).double()  # FSDP2 shards no buffers
    model = wrap_fsdp2(model, lasp.replica_mesh(mesh))
    optimizer = optimizer_of(model)
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=EVERY)
    snapshot = _checkpoint.take_snapshot(0, model, optimizer, outer=co2)
    sharded = sorted(name for name, x in snapshot.tensors.items() if isinstance(x, DTensor))
    return sharded, sorted(set(snapshot.tensors) - set(sharded)), snapshot.bytes, sorted(model.state_dict())


def test_each_tensor_of_replicas_is_written_once():
    """Weights are sharded over a replica, buffers and the counts of AdamW are not; a rank knows the others' by name."""
    of_ranks = run_ranks(4, _parts_of_replicas)
    names, sharded = of_ranks[0][3], [found for found, *_ in of_ranks]
    for replica in (0, 1):
        own = [name for name in sharded[2 * replica] if name.startswith(f"replica{replica}.")]
        assert len(own) == 3 * 4  # weights, and two moments of each
        alike = [name for name in sharded[2 * replica] if name not in own]
        assert len(alike) == (0 if replica else 3 * 4)  # outer point, momentum, average
        assert sharded[2 * replica] == sharded[2 * replica + 1]
    whole = [name for _, found, *_ in of_ranks for name in found]
    assert len(whole) == len(set(whole))
    buffers = [name for name in names if "running" in name or "batches" in name]
    own = {f"replica{replica}.model.{name}" for replica in (0, 1) for name in buffers}
    counts = {f"replica{replica}.optimizer.state.{p}.step" for replica in (0, 1) for p in set(names) - set(buffers)}
    assert set(whole) == {*own, *counts, *(f"model.{name}" for name in buffers)}
    assert len({nbytes for _, _, nbytes, _ in of_ranks}) == 1


def _one_group():
    """For ranks of a replica, and for those over which weights are dealt out in copies."""
    for factors in ({"dp_replicate": 2, "sp": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"dp_replicate": 2, "tp": 2}):
        mesh = mesh_of(**factors)
        shard = shard_mesh(mesh)
        assert shard.get_group() is grad_group(lasp.replica_mesh(mesh))[0] is shard_mesh(mesh).get_group()
        first = dist.get_rank() if "tp" in factors else dist.get_rank() // 2 * 2
        last = dist.get_rank() if "tp" in factors else first + 1
        assert dist.get_process_group_ranks(shard.get_group()) == [*range(first, last + 1)]


def test_copies_and_replicas_share_a_process_group():
    run_ranks(4, _one_group)


def _wrong_states():
    mesh = mesh_of(dp_replicate=2)
    model, optimizer = build(mesh, "alone")
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=EVERY)
    train(model, optimizer, co2, mesh, "alone", range(EVERY + 1))
    state, before = co2.state_dict(), flat(model)
    name = "head.weight"
    for change, says in (
        ({"rounds": -1}, "rounds"),
        ({"rounds": 0}, "rounds"),
        ({"local_steps": EVERY}, "local_steps"),
        ({"local_steps": 1.5}, "local_steps"),
        ({"sent_lr": None}, "sent_lr"),
        ({"on_the_way": 1}, "on_the_way"),
        ({"average": {}}, "head.weight|blocks"),
        ({"outer": None}, "outer"),
        ({"outer": {**state["outer"], "more": torch.zeros(1)}}, "more"),
        ({"outer": {k: v for k, v in state["outer"].items() if k != name}}, name),
        ({"momentum": {**state["momentum"], name: state["momentum"][name].float()}}, name),
        ({"average": {**state["average"], name: state["average"][name][1:]}}, name),
        ({"more": 1}, "more"),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            co2.load_state_dict({**state, **change})
    with pytest.raises(TypeError, match="state must be a mapping, got 5"):
        co2.load_state_dict(5)
    assert torch.equal(flat(model), before)
    again = co2.state_dict()
    assert all(torch.equal(of_state(state[x]), of_state(again[x])) for x in ("outer", "momentum", "average"))


def test_a_state_that_does_not_fit_is_refused_before_anything_changes():
    run_ranks(2, _wrong_states)


# What travels beside the steps


@contextmanager
def slow_all_reduces(gate):
    """Asynchronous all-reduces go out from a thread, in their order, once the gate is open: a slow network."""
    real, network = dist.all_reduce, ThreadPoolExecutor(1)
    network.submit(gate.wait, 20)

    class Late:
        def __init__(self, *args, **options):
            self.sent = network.submit(real, *args, **{**options, "async_op": False})

        def wait(self, timeout=None):
            self.sent.result(20)

    def all_reduce(*args, **options):
        return Late(*args, **options) if options.get("async_op") else real(*args, **options)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = real
        network.shutdown(wait=False)


def _overlap():
    """The network stands still until the last step of a round: all others are taken meanwhile, with the same result."""
    mesh = mesh_of(dp_replicate=2)
    model, optimizer = build(mesh, "alone")
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=EVERY)
    expected, me = Simulation(2), mesh["dp_replicate"].get_local_rank()
    for step in range(EVERY):
        expected.local_step(step)
    train(model, optimizer, co2, mesh, "alone", range(EVERY - 1))
    gate = threading.Event()
    with slow_all_reduces(gate):
        train(model, optimizer, co2, mesh, "alone", [EVERY - 1])  # sends
    for step in range(EVERY, 2 * EVERY - 1):
        train(model, optimizer, co2, mesh, "alone", [step])
        expected.local_step(step)
        assert not any(work.sent.done() for work in co2._on_the_way.work), "it has arrived: nothing was overlapped"
        assert_close(flat(model), expected.flat(me), "weights while it travels", **CLOSE)
    before = time.monotonic()
    threading.Timer(0.5, gate.set).start()
    train(model, optimizer, co2, mesh, "alone", [2 * EVERY - 1])  # consumes
    assert time.monotonic() - before >= 0.4, "the end of a round has not waited for what the one before sent"
    expected.local_step(2 * EVERY - 1)
    assert_close(flat(model), expected.flat(me), "weights after it arrived", **CLOSE)


def test_the_average_travels_while_local_steps_run():
    run_ranks(2, _overlap)


def _bytes_sent(layout, expected_parts):
    """Over dp_replicate goes each rank's part once a round, in one message a bucket, and nothing between."""
    *factors, how = layout
    mesh = mesh_of(dp_replicate=factors[0], dp_shard=factors[1], sp=factors[2])
    model, optimizer = build(mesh, how)
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=EVERY)
    group, sent, real = mesh["dp_replicate"].get_group(), [], dist.all_reduce

    def all_reduce(x, *args, **options):
        if options.get("group") is group and x.is_floating_point():
            sent.append(x.numel())
        return real(x, *args, **options)

    dist.all_reduce = all_reduce
    try:
        train(model, optimizer, co2, mesh, how, range(2 * EVERY + 1))
    finally:
        dist.all_reduce = real
    numbers = sum(p.numel() for p in SmallModel().parameters())
    assert len(sent) == 2  # one bucket holds all
    assert abs(sent[0] - numbers / expected_parts) <= 0.1 * numbers / expected_parts  # FSDP2's rows are uneven
    mine = [bucket.outer.numel() for bucket in co2._buckets]
    assert sum(mine) == sent[0]
    co2.finish()


@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=lambda x: "-".join(map(str, x)))
def test_a_replica_sends_one_copy_of_the_model_a_round(layout):
    run_ranks(layout[0] * layout[1] * layout[2], _bytes_sent, layout, layout[1] * layout[2])


def _bf16():
    """The outer point keeps what 16 bits would lose; frozen parameters stay, and so do buffers."""
    mesh = mesh_of(dp_replicate=2)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=1, gap_penalty=3.0)
    outer = co2.state_dict()["outer"]
    assert {x.dtype for x in outer.values()} == {torch.float32}
    assert set(outer) == {"0.weight", "1.weight", "1.bias"}
    for step in range(3):
        draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
        model(torch.randn(5, 4, generator=draw).bfloat16()).float().square().sum().backward()
        optimizer.step()
        co2.step()
    outer = co2.state_dict()["outer"]["0.weight"]
    assert not torch.equal(outer, outer.bfloat16().float())
    assert torch.equal(model[0].weight, outer.bfloat16())
    assert torch.equal(model[0].bias, frozen)
    theirs = outer.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(theirs, outer), "replicas have different outer points"


def test_parameters_of_16_bits_and_frozen_ones():
    run_ranks(2, _bf16)


# What goes wrong


def _raises_on_every_rank(kind, says, act):
    with pytest.raises(kind, match=says):
        act()
    one = torch.ones(1)
    dist.all_reduce(one)  # the group works on
    assert one.item() == dist.get_world_size()


def _other_replicas(what):
    mesh = mesh_of(dp_replicate=2, sp=2)
    me = mesh["dp_replicate"].get_local_rank()
    replica = lasp.replica_mesh(mesh)
    model = lasp.parallelize(SmallModel(seed=me if what == "weights" else 0).double(), replica["sp"])
    if what == "frozen" and me:
        model.head.weight.requires_grad_(False)
    model = wrap_ddp(model, replica)
    every = 4 + me if what == "sync_every" else 4
    says = {
        "weights": r"first weight tokens.weight|first weight module.tokens.weight",
        "frozen": "head.weight",
        "sync_every": "has sync_every 5, the others 4",
    }[what]
    _raises_on_every_rank(
        lasp.RankMismatchError, says, lambda: lasp.CO2(model, optimizer_of(model), mesh, sync_every=every)
    )


@pytest.mark.parametrize("what", ["weights", "frozen", "sync_every"])
def test_replicas_that_differ_are_told_apart_before_training(what):
    run_ranks(4, _other_replicas, what)


def _another_round():
    """A replica that has left out a step: its averages would be those of other rounds."""
    mesh = mesh_of(dp_replicate=2)
    model, optimizer = build(mesh, "alone")
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=1)
    train(model, optimizer, co2, mesh, "alone", range(2))
    if dist.get_rank() == 1:
        co2.rounds += 1
    train(model, optimizer, co2, mesh, "alone", [2])  # sends
    weights = flat(model)
    _raises_on_every_rank(
        lasp.RankMismatchError,
        "CO2: replicas have sent different things to one average: rank 1 has round 3, the others 2",
        co2.step,
    )
    assert torch.equal(flat(model), weights)


def test_averages_of_different_rounds_are_an_error_on_every_replica():
    run_ranks(2, _another_round)


def _another_point():
    mesh = mesh_of(dp_replicate=2)
    model, optimizer = build(mesh, "alone")
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=1)
    if dist.get_rank() == 1:  # as after a checkpoint of something else
        state = co2.state_dict()
        state["outer"]["head.weight"] += 1e-7
        co2.load_state_dict(state)
    train(model, optimizer, co2, mesh, "alone", [0])
    _raises_on_every_rank(lasp.RankMismatchError, "rank 1 has outer point checksum", co2.step)


def test_outer_points_that_differ_are_an_error_on_every_replica():
    run_ranks(2, _another_point)


def _a_step_left_out_in_a_replica():
    """One rank of a replica calls step() once less: the others are about to gather a new outer point."""
    mesh = mesh_of(sp=2)
    model, optimizer = build(mesh, "ddp")
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=2)
    if dist.get_rank() == 1:
        co2.local_steps, co2.rounds = 0, 1
    train(model, optimizer, co2, mesh, "ddp", [0])
    co2.local_steps = 1
    _raises_on_every_rank(lasp.RankMismatchError, "CO2: the outer point: rank 1 has", co2.step)


def test_a_replica_whose_ranks_have_counted_differently():
    run_ranks(2, _a_step_left_out_in_a_replica)


def _no_peer():
    """A replica that does not come: an error within the timeout, and the weights are as they were."""
    from datetime import timedelta

    from lasp.ranks.group import set_timeout, timeout_of

    mesh = mesh_of(dp_replicate=2)
    model, optimizer = build(mesh, "alone")
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=1)
    usual = timeout_of(dist.group.WORLD)
    if dist.get_rank() == 1:
        time.sleep(6)  # and never sends
        return
    set_timeout(timedelta(seconds=2))
    try:
        train(model, optimizer, co2, mesh, "alone", [0])
        weights, outer = flat(model), of_state({i: b.outer for i, b in enumerate(co2._buckets)})
        started = time.monotonic()
        with pytest.raises(lasp.PeerError, match=r"CO2: the average of round 0 over 2 replicas .* failed after"):
            co2.step()
        assert time.monotonic() - started < 5.5
        assert torch.equal(flat(model), weights)
        assert torch.equal(of_state({i: b.outer for i, b in enumerate(co2._buckets)}), outer)
    finally:
        set_timeout(usual)


def test_a_replica_that_does_not_come_is_a_peer_error_within_the_timeout():
    try:
        run_ranks(2, _no_peer)
    finally:
        shutdown()  # gloo has closed the connections of the one that gave up


KILLED = """
import os, signal, time, torch, lasp
env = lasp.init("gloo", timeout=60)
mesh = lasp.init_mesh(dp_replicate=2)
model = torch.nn.Linear(3, 3)
torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
co2 = lasp.CO2(model, optimizer, mesh, sync_every=2)
for step in range(8):
    if step == 5 and env.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    try:
        co2.step()
    except lasp.PeerError as error:
        print(step, time.monotonic() - began, error)
        break
"""


def test_a_replica_that_is_killed_is_a_peer_error_at_once():
    """In the middle of a round: what it had sent is consumed, and what comes next fails."""
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    outputs = finish([start(KILLED, {**where, "RANK": str(rank)}) for rank in range(2)])
    step, seconds, error = outputs[0][0].split(maxsplit=2)
    assert int(step) in (5, 7)
    assert float(seconds) < 30
    assert re.match(r"CO2: (sending|the average of) .*round [12] ", error), error
    assert "global rank 1 has ended" in error


def _averaged_anyway(how):
    mesh = mesh_of(dp_replicate=2)
    model = SmallModel().double()
    model, _ = lasp.data_parallel(model, mesh, scheme=how, optimizer=torch.optim.AdamW)
    _raises_on_every_rank(
        ValueError,
        "must be averaged within a replica only: give the scheme, such as wrap_ddp, lasp.replica_mesh",
        lambda: lasp.CO2(model, optimizer_of(model), mesh, sync_every=2),
    )


@pytest.mark.parametrize("how", SCHEMES)
def test_gradients_that_are_averaged_over_replicas_anyway(how):
    run_ranks(2, _averaged_anyway, how)


def _finite():
    """With check_finite the replicas do not meet at each step, and a replica's own ranks do."""
    mesh = mesh_of(dp_replicate=2, sp=2)
    replica = lasp.replica_mesh(mesh)
    model = lasp.parallelize(SmallModel().double(), replica["sp"], check_finite=True)
    model = wrap_ddp(model, replica)
    optimizer = optimizer_of(model)
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=4)
    me = mesh["dp_replicate"].get_local_rank()
    train(model, optimizer, co2, mesh, "ddp", range(1 + 2 * me))  # one replica is two steps ahead
    if me:
        next(model.parameters()).grad[0, 0] = torch.nan  # on both ranks of it
        with pytest.raises(FloatingPointError, match=r"rank 2: the gradient of .*; rank 3: the gradient of"):
            optimizer.step()


def test_non_finite_gradients_stop_their_replica_only():
    run_ranks(4, _finite)


def _bad_penalty(found):
    mesh = mesh_of(dp_replicate=2)
    model, optimizer = build(mesh, "alone")
    co2 = lasp.CO2(model, optimizer, mesh, sync_every=1, gap_penalty=lambda s: found)
    co2.step()
    _raises_on_every_rank((TypeError, ValueError), "what gap_penalty returns must be", co2.step)


@pytest.mark.parametrize("found", [0.0, -1, None, "1", float("nan"), torch.ones(2)], ids=repr)
def test_what_a_function_for_the_gap_returns(found):
    run_ranks(2, _bad_penalty, found)


def test_one_replica_is_told():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"mesh has one replica \(dp_replicate=1, or None\)") as told:
        lasp.CO2(model, optimizer, None, sync_every=2)
    assert len(told) == 1


def _unfreezes(validate):
    """It, or what is added, would never be averaged: refused, unless replicas are not compared, as with a scheme."""
    mesh = mesh_of(dp_replicate=2)
    for adds in (False, True):
        model = SmallModel().double()
        model.tokens.requires_grad_(adds)
        co2 = lasp.CO2(model, optimizer_of(model), mesh, sync_every=1, validate=validate)
        co2.step()
        model.tokens.requires_grad_(True)
        if adds:
            model.register_parameter("shift", torch.nn.Parameter(torch.zeros(())))
        own = model.shift if adds else model.tokens.weight
        with torch.no_grad():
            own.fill_(dist.get_rank())
            model.head.weight.add_(dist.get_rank())
        if validate == "first":
            with pytest.raises(RuntimeError, match=f"{'shift' if adds else 'tokens.weight'} was unfrozen or added"):
                co2.step()
            continue
        co2.step()
        co2.finish()
        assert bool((own == dist.get_rank()).all())
        both = [torch.empty_like(model.head.weight) for _ in range(2)]
        dist.all_gather(both, model.head.weight.detach())
        assert torch.equal(*both)


@pytest.mark.parametrize("validate", ["first", "off"])
def test_what_is_unfrozen_later_would_never_be_averaged(validate):
    run_ranks(2, _unfreezes, validate)


def _looks(scheme):
    """At a loss: on its own weights before the end of a round, and on those that all replicas share after each step.
    FSDP2 keeps what a forward has gathered until a backward, whatever is written to the shards meanwhile."""
    mesh = mesh_of(dp_replicate=2, sp=2)
    replica = lasp.replica_mesh(mesh)
    losses = {}
    for looks in (False, True):
        model = lasp.parallelize(SmallModel().double(), replica)
        model, optimizer = lasp.data_parallel(
            model, replica, scheme=scheme, optimizer=functools.partial(torch.optim.AdamW, lr=1e-2), blocks=model.blocks
        )
        if looks:
            with torch.no_grad():
                loss_of(model, rows(0, 0), replica)
        co2 = lasp.CO2(model, optimizer, mesh, sync_every=2)
        found = losses[looks] = []
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_of(model, rows(co2.replica, step), replica)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                own = loss_of(model, rows(0, 0), replica).item() if looks else 0
                co2.step()
                with co2.outer_weights():
                    shared = loss_of(model, rows(0, 0), replica).item() if looks else 0
            found.append((loss.item(), own, shared))
        co2.finish()
        with torch.no_grad():
            found.append((loss_of(model, rows(0, 0), replica).item(), 0, 0))
    assert_close(torch.tensor([x for x, *_ in losses[True]]), torch.tensor([x for x, *_ in losses[False]]), scheme)
    return losses[True]


def test_a_look_at_the_loss_changes_nothing_of_the_training():
    expected = run_ranks(4, _looks, "ddp")
    for scheme in ("zero2", "zero3"):
        for found, right in zip(run_ranks(4, _looks, scheme), expected):
            for a, b in zip(found, right):
                assert a == pytest.approx(b, abs=1e-9), scheme
