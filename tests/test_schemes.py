"""Every scheme of data parallelism on every mesh of four ranks: gradients, optimizer and weights of one process."""

import copy
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from inputs import assert_close
from ranks import mesh_of, run_ranks
from small_model import SmallModel
from test_data_parallel import CLOSE, loss_of, rows_of_this_rank, whole, whole_batch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import AdamW

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.data_parallel.schemes import SCHEMES
from lasp.models import TNL, TNLConfig

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


def _sent(scheme):
    """The collectives of a micro-batch that another follows, of the last one, and of the step."""
    mesh, found = mesh_of(dp_shard=2), []  # no states travel
    model, optimizer = wrapped(scheme, mesh)
    for _ in range(2):  # DDP arranges its buckets in the first step
        for enabled in (True, False):
            with CommDebugMode() as seen, lasp.no_sync(model, enabled=enabled):
                loss_of(model, whole_batch(), mesh).backward()
            found.append({str(name).split(".")[-1]: n for name, n in seen.get_comm_counts().items()})
        with CommDebugMode() as seen:
            optimizer.step()
        found.append({str(name).split(".")[-1]: n for name, n in seen.get_comm_counts().items()})
    return found[-3:]


LOSS, BUFFERS = {"allreduce_": 1}, {"broadcast_": 2}  # of token_loss; DDP's, before the first forward of a step
UNITS = 3  # that FSDP2 gathers at once: two blocks, and the rest, which stays from the forward to the backward
SENT = {
    "ddp": ({**BUFFERS, **LOSS}, {"allreduce_": 2}, {}),
    "ddp-legacy": (LOSS, {"allreduce_": 2}, {}),
    "zero1": ({**BUFFERS, **LOSS}, {"allreduce_": 2}, {"broadcast_": len(list(SmallModel().parameters()))}),
    "zero2": (
        {**LOSS, "_allgather_base_": UNITS},
        {**LOSS, "_allgather_base_": UNITS, "_reduce_scatter_base_": UNITS},
        {},
    ),
    "zero3": (
        {**LOSS, "_allgather_base_": 2 * UNITS - 1},
        {**LOSS, "_allgather_base_": 2 * UNITS - 1, "_reduce_scatter_base_": UNITS},
        {},
    ),
}


@pytest.mark.parametrize("scheme", SENT)
def test_gradients_travel_once_a_step(scheme):
    for found in run_ranks(2, _sent, scheme):
        assert tuple(found) == SENT[scheme]


def _looks():
    """A forward between backward and step, as for a loss on other text, changes nothing of the training."""
    mesh = mesh_of(sp=2)
    for scheme in ("zero2", "zero3", "ddp-legacy"):
        alone = SmallModel().double()
        pairs = ((alone, MAKE(alone.parameters()), None), (*wrapped(scheme, mesh), mesh))
        for step in range(3):
            losses = []
            for model, optimizer, over in pairs:
                optimizer.zero_grad()
                loss = loss_of(model, whole_batch(step), over)
                loss.backward()
                with torch.no_grad():
                    loss_of(model, whole_batch(step), over)
                optimizer.step()
                losses.append(loss.detach())
            assert_close(losses[1], losses[0], f"{scheme}: loss", **CLOSE)


def test_a_look_at_the_loss_between_backward_and_step():
    run_ranks(2, _looks)


def _verified(scheme):
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(TNL(TNLConfig(vocab_size=17, layers=2, width=8, heads=2, glu_width=12)), mesh)
    model, _ = lasp.data_parallel(model, mesh, scheme=scheme, optimizer=MAKE, blocks=model.blocks)
    found = lasp.verify(model, mesh)
    assert found.ok, str(found)


@pytest.mark.parametrize("scheme", ["ddp-legacy", "zero1", "zero2"])
def test_verify_of_a_model_that_is_data_parallel(scheme):
    run_ranks(2, _verified, scheme)


class _Sometimes(SmallModel):
    """Beside what is always used, a parameter that its first forward uses alone, and one that none does."""

    def __init__(self):
        super().__init__()
        self.once, self.never, self.first = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3)), True

    def forward(self, input_ids, position_ids, layout=None):
        found = super().forward(input_ids, position_ids, layout)
        return found * self.once if self.first else found


def _unused(scheme):
    mesh, make = mesh_of(sp=2), functools.partial(MAKE, weight_decay=0.5)
    alone, model = _Sometimes().double(), lasp.parallelize(_Sometimes().double(), mesh)
    optimizers = [make(alone.parameters()), make(model.parameters())]
    inner = model
    if scheme is not None:
        options = {"find_unused_parameters": True} if scheme in ("ddp", "zero1") else {}
        model, optimizers[1] = lasp.data_parallel(model, mesh, scheme=scheme, optimizer=make, **options)
    for step in range(3):
        alone.first = inner.first = step == 0
        for one, optimizer, over in zip((alone, model), optimizers, (None, mesh)):
            optimizer.zero_grad()
            loss_of(one, whole_batch(step), over).backward()
            if one is model and scheme is None:
                lasp.sync_grads(model, mesh)
            optimizer.step()
    assert alone.never.grad is None
    for name, p in names(alone).items():
        assert_close(whole(names(model)[name].detach()), p.detach(), name, **CLOSE)


@pytest.mark.parametrize("scheme", [None, *(x for x in SCHEMES if x not in ("fsdp2", "hsdp"))])
def test_what_no_rank_uses_is_left_as_it_is(scheme):
    """As in one process: no gradient, so no decay of its weights and no step by its moments."""
    run_ranks(2, _unused, scheme)


def _backwards(scheme):
    """DDP averages in the first backward behind its forwards, and leaves to each rank what later ones add."""
    mesh, alone = mesh_of(sp=2), SmallModel().double()
    model, optimizer = wrapped(scheme, mesh)
    for _ in range(3):  # by then weights are no longer compared
        optimizer.zero_grad()
        loss_of(model, whole_batch(), mesh).backward()
        optimizer.step()

    def late():
        first, second = (loss_of(model, whole_batch(step), mesh) for step in range(2))
        first.backward()
        second.backward()

    def accumulated():
        with lasp.no_sync(model):
            loss_of(model, whole_batch(), mesh).backward()

    def within():
        loss_of(model.module, whole_batch(), mesh).backward()

    before = {name: p.detach().clone() for name, p in names(model).items()}
    for wrong in (late, accumulated, within):
        optimizer.zero_grad()
        wrong()
        called = rf"lasp\.data_parallel\(\.\., scheme='{scheme}'\)"
        with pytest.raises(RuntimeError, match=rf"with the gradient of this rank alone: {called} averages in the one"):
            optimizer.step()
    loss_of(model, whole_batch(1), mesh).backward()  # averages what was added up until now, too
    alone.load_state_dict(before)
    for step in range(2):
        loss_of(alone, whole_batch(step), None).backward()
    for name, p in alone.named_parameters():
        assert_close(names(model)[name].grad, p.grad, name, **CLOSE)
    optimizer.step()
    optimizer.zero_grad()
    first, second = (loss_of(model, whole_batch(step), mesh) for step in range(2))
    (first + second).backward()
    optimizer.step()
    accumulated()
    lasp.sync_grads(model.module, mesh)
    optimizer.step()


@pytest.mark.parametrize("scheme", ["ddp", "zero1"])
def test_a_backward_that_ddp_does_not_average(scheme):
    run_ranks(2, _backwards, scheme)


class _UsedByOne(nn.Module):
    """A parameter that rank 0 alone uses, in a backward that may fail."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.other = nn.Linear(3, 2).double(), nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x, use):
        y = self.linear(x)
        return (y * self.other if use else y).square().sum()


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise FloatingPointError("in the middle of a backward")


def _legacy():
    """A parameter that one rank does not use; and a backward that failed leaves the next one as it should be."""
    rank, mesh = dist.get_rank(), mesh_of(sp=2)
    torch.manual_seed(1)
    data = torch.randn(2, 4, 3, dtype=torch.float64)
    alone, (model, _) = _UsedByOne(), lasp.data_parallel(_UsedByOne(), mesh, scheme="ddp-legacy", optimizer=MAKE)
    with pytest.raises(FloatingPointError, match="in the middle"):
        model(_Fails.apply(data[0].clone().requires_grad_()), True).backward()
    for m in (alone, model):
        m.zero_grad()
    (alone(data[0], True) / 2 + alone(data[1], False) / 2).backward()
    model(data[rank], rank == 0).backward()
    for name, p in alone.named_parameters():
        assert_close(model.get_parameter(name).grad, p.grad, name, **CLOSE)
    if rank:  # now the ranks differ
        model.linear.weight.requires_grad_(False)
    with pytest.raises(lasp.RankMismatchError, match=r"parameter linear\.weight"):
        model(data[rank], True).backward()


def test_legacy_ddp_averages_whatever_a_rank_has_used():
    run_ranks(2, _legacy)


def _streams(scheme):
    """Segment by segment, in two micro-batches: each gradient is that of the sum, and travels once."""
    mesh, batch = mesh_of(dp_shard=2, sp=2), whole_batch()
    alone = SmallModel().double()
    for row in range(2):
        loss_of(alone, {name: x[row::2] for name, x in batch.items()}, None).backward()
    model, _ = wrapped(scheme, mesh)
    mine = rows_of_this_rank(batch, mesh)
    for row in range(2):
        part = {name: x[row : row + 1] for name, x in mine.items()}
        with lasp.no_sync(model, enabled=row == 0):
            lasp.stream_backward(model, part, mesh=mesh, segment=4)
    found = names(model)
    for name, p in alone.named_parameters():
        assert_close(whole(found[name].grad), p.grad, name, **CLOSE)


@pytest.mark.parametrize("scheme", [x for x in SCHEMES if x not in ("fsdp2", "hsdp")])
def test_micro_batches_that_are_streamed(scheme):
    run_ranks(4, _streams, scheme)


def _groups(parameters):
    """As one gives no weight decay to vectors; the second group may be empty on a rank."""
    parameters = list(parameters)
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is wide] for wide in (True, False))
    return AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 3e-2}], lr=1e-2, eps=1e-6)


def _more_ranks_than_parameters(bare):
    """Ranks without a parameter of their own, in ZeRO-1 with groups, a schedule, and a look at NaN before each step."""
    mesh = mesh_of(sp=4)
    models = [SmallModel().double(), lasp.parallelize(SmallModel().double(), mesh, check_finite=True)]
    for m in models:
        m.requires_grad_(False)
        m.head.weight.requires_grad_(True)
        m.blocks[0].norm.bias.requires_grad_(True)
    trained = [p for p in models[0].parameters() if p.requires_grad]
    optimizers = [MAKE(trained) if bare else _groups(trained)]
    if bare:  # a user's own, as PyTorch's pages have it
        models[1] = wrap_ddp(models[1], mesh)
        trained = [p for p in models[1].parameters() if p.requires_grad]
        group = lasp.grad_mesh(mesh).get_group()
        optimizers.append(ZeroRedundancyOptimizer(trained, AdamW, process_group=group, lr=1e-2, eps=1e-6))
    else:
        models[1], made = lasp.data_parallel(models[1], mesh, scheme="zero1", optimizer=_groups)
        optimizers.append(made)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(x, 0.5) for x in optimizers]
    for step in range(3):
        for m, over, optimizer, schedule in zip(models, (None, mesh), optimizers, schedules):
            optimizer.zero_grad()
            loss_of(m, whole_batch(step), over).backward()
            optimizer.step()
            schedule.step()
    for name, p in names(models[1]).items():
        assert_close(p.detach(), models[0].get_parameter(name).detach(), name, **CLOSE)
    if not bare:
        optimizers[1].zero_grad()
        found = get_state_dict(models[1], optimizers[1], options=FLAT)[1]  # changes nothing, on no rank
        return {name: x.clone() for name, x in found.items() if name.startswith("state.")}


@pytest.mark.parametrize("bare", [False, True])
def test_ranks_without_a_parameter_in_zero1(bare):
    of_ranks = run_ranks(4, _more_ranks_than_parameters, bare)
    if not bare:
        assert sorted(map(len, of_ranks)) == [0, 0, 3, 3]  # step and two moments each
        assert all(x["state.head.weight.step"] == 3 for x in of_ranks if "state.head.weight.step" in x)


class _TwoModes(torch.optim.Optimizer):
    """What it is given beside lr is no setting of a group, so `defaults` does not have it."""

    def __init__(self, params, lr, mode="a"):
        super().__init__(params, {"lr": lr})
        self.mode, self.steps = mode, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign() if self.mode == "b" else p.grad, alpha=group["lr"])


class _OfTwo(torch.optim.Optimizer):
    """Whose groups are a new list whenever they are read: those of two others."""

    def __init__(self, params):
        half, rest = (list(params)[n::2] for n in range(2))
        self.parts = [AdamW(half), torch.optim.SGD(rest)]

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]


def _set(made, **settings):
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def _kept_by_zero1():
    """What makes the optimizer is all that says what it does, groups, states from the first and all."""
    mesh = mesh_of(sp=4)
    makers = [
        functools.partial(_TwoModes, lr=1e-2, mode="b"),
        lambda ps: _set(_TwoModes(ps, lr=1e-2), mode="b"),
        functools.partial(torch.optim.Adagrad, lr=1e-2, initial_accumulator_value=0.3),
        lambda ps: AdamW([{"params": list(ps)[::2]}], lr=1e-2, eps=1e-6),  # only some of them
    ]
    for number, make in enumerate(makers):
        alone = SmallModel().double()
        for m in (alone, model := lasp.parallelize(SmallModel().double(), mesh)):
            if number == 2:  # fewer than ranks
                m.requires_grad_(False)
                m.head.weight.requires_grad_(True)
        expected = make([p for p in alone.parameters() if p.requires_grad])
        model, optimizer = lasp.data_parallel(model, mesh, scheme="zero1", optimizer=make)
        for m, o in ((alone, expected), (model, optimizer)):
            get_state_dict(m, o)  # where there is none yet it steps, by nothing, and on no rank alone
        for step in range(3):
            for m, over, o in ((alone, None, expected), (model, mesh, optimizer)):
                o.zero_grad()
                loss_of(m, whole_batch(step), over).backward()
                o.step()
        assert optimizer.defaults == expected.defaults
        assert [len(group["params"]) for group in optimizer.param_groups] == [
            len(group["params"]) for group in expected.param_groups
        ]
        for name, p in names(model).items():
            assert_close(p.detach(), alone.get_parameter(name).detach(), f"{number}: {name}", **CLOSE)
    with pytest.raises(TypeError, match=r"optimizer must make one whose param_groups is a list .* got _OfTwo, which"):
        lasp.data_parallel(SmallModel(), mesh, scheme="zero1", optimizer=_OfTwo)


def test_zero1_steps_with_the_optimizer_that_was_made():
    run_ranks(4, _kept_by_zero1)


def _loads_where_a_rank_has_none(flat):
    """States are looked at, loaded and looked at again: of one parameter, on two ranks."""
    mesh, options = mesh_of(sp=2), StateDictOptions(flatten_optimizer_state_dict=flat, strict=False)
    model = lasp.parallelize(SmallModel().double().requires_grad_(False), mesh)
    model.head.weight.requires_grad_(True)
    model, optimizer = lasp.data_parallel(model, mesh, scheme="zero1", optimizer=MAKE)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, whole_batch(step), mesh).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = names(model)["head.weight"].detach().clone()
        found = copy.deepcopy(get_state_dict(model, optimizer, options=options)[1])
        set_optimizer_state_dict(model, optimizer, found, options=options)
        assert str(get_state_dict(model, optimizer, options=options)[1]) == str(found)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert str(get_state_dict(model, optimizer, options=options)[1]) == str(found)
        assert torch.equal(names(model)["head.weight"], before)
    steps = [x["step"].item() for x in optimizer.state.values() if x]
    assert steps == ([] if dist.get_rank() else [2])


@pytest.mark.parametrize("flat", [True, False])
def test_states_are_loaded_into_zero1_where_a_rank_has_none(flat):
    run_ranks(2, _loads_where_a_rank_has_none, flat)


def _refused_by_one():
    """Rank 0 alone: if it sent anything first, it would wait."""
    mesh, split, model, other = mesh_of(sp=2), mesh_of(sp=1, tp=2), SmallModel(), SmallModel()
    of_two = lasp.tensor_parallel(TNL(TNLConfig(vocab_size=18, layers=1, width=8, heads=2, glu_width=12)), split["tp"])
    if dist.get_rank() == 0:
        for scheme in ("ddp", "zero1"):
            with pytest.raises(ValueError, match=r"embedding\.weight is a DTensor, as after lasp\.tensor_parallel"):
                lasp.data_parallel(of_two, split, scheme=scheme, optimizer=MAKE)
        blocks = [model.blocks[0], other.blocks[1]]
        for scheme in SCHEMES[:-1]:
            with pytest.raises(ValueError, match=r"inside model \(SmallModel\), got Block\(.*no part of it, as 1"):
                lasp.data_parallel(model, mesh, scheme=scheme, optimizer=MAKE, blocks=blocks)
        with pytest.raises(ValueError, match=r"inside model \(SmallModel\), got the model itself, as 0"):
            wrap_fsdp2(other, mesh, blocks=[other])
    dist.barrier()
    for scheme in SCHEMES[:-1]:  # seen once the model is wrapped
        with pytest.raises(TypeError, match=r"optimizer must make a torch\.optim\.Optimizer, got None from it"):
            lasp.data_parallel(SmallModel(), mesh, scheme=scheme, optimizer=lambda parameters: None)
    dist.barrier()


def test_what_does_not_fit_is_refused_before_ranks_meet():
    run_ranks(2, _refused_by_one)


def _refused():
    """On each rank the same, before anything is sent; the ranks then work together."""
    rank, mesh, hybrid = dist.get_rank(), mesh_of(sp=2), mesh_of(dp_replicate=2)
    wrong = [
        (
            mesh,
            "hsdp",
            {},
            ValueError,
            r"dp_replicate > 1 .* got \{'dp_replicate': 1, 'dp_shard': 1, 'sp': 2, 'tp': 1\}",
        ),
        (mesh["sp"], "hsdp", {}, ValueError, r"dp_replicate > 1 .* got \{'sp': 2\}"),
        (dist.group.WORLD, "zero3", {}, TypeError, "mesh must be a DeviceMesh for scheme 'zero3', got <.*ProcessGroup"),
        (None, "zero2", {}, TypeError, "mesh must be a DeviceMesh for scheme 'zero2', got None"),
        (mesh, "ddp", {"mp_policy": None}, TypeError, "options of scheme 'ddp' are .*'bucket_cap_mb'.* got mp_policy"),
        (mesh, "zero1", {"process_group": 1}, TypeError, "options of scheme 'zero1' are .* got process_group"),
        (
            mesh,
            "ddp-legacy",
            {"bucket_cap_mb": 1},
            TypeError,
            r"options of scheme 'ddp-legacy' are \[\], got bucket_cap",
        ),
        (mesh, "zero2", {"reshard_after_forward": True}, TypeError, "'zero2' are .* got reshard_after_forward"),
        (hybrid, "fsdp", {}, ValueError, "scheme must be one of .*'hsdp'.*, got 'fsdp'"),
    ]
    for over, scheme, options, error, text in wrong:
        with pytest.raises(error, match=text):
            lasp.data_parallel(SmallModel(), over, scheme=scheme, optimizer=MAKE, **options)
    with pytest.raises(lasp.RankMismatchError, match=r"zero1.* on rank 1|rank 1.*zero1"):
        lasp.data_parallel(SmallModel(), mesh, scheme="zero1" if rank else "ddp", optimizer=MAKE)
    for scheme, by in (("ddp", "DistributedData"), ("zero3", "FSDPModule"), ("ddp-legacy", "the scheme 'ddp-legacy'")):
        model, _ = wrapped(scheme, mesh)
        with pytest.raises(ValueError, match=f"model is data parallel already, by {by}.*got "):
            lasp.data_parallel(model, mesh, scheme="ddp", optimizer=MAKE)
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one.item() == 2


def test_what_does_not_fit_is_refused():
    run_ranks(2, _refused)


def _explained():
    hybrid = mesh_of(dp_replicate=2, sp=2)
    found = {scheme: str(lasp.explain(wrapped(scheme, hybrid)[0])) for scheme in ("ddp", "zero1", "hsdp")}
    assert "data parallel: ddp, gradients averaged over 4 ranks\n" in found["ddp"] + "\n"
    assert "gradients averaged over 4 ranks; the optimizer's states dealt out over 2, in 2 copies" in found["zero1"]
    assert "hsdp, gradients averaged over 4 ranks; parameters, gradients and the optimizer's states" in found["hsdp"]


def test_explain_tells_the_scheme():
    run_ranks(4, _explained)


@pytest.mark.parametrize("scheme", ["ddp", "ddp-legacy", "zero1"])
def test_one_process_without_a_mesh(scheme):
    model, optimizer = lasp.data_parallel(SmallModel().double(), None, scheme=scheme, optimizer=MAKE)
    assert type(model) is SmallModel
    assert type(optimizer) is AdamW


SGD = functools.partial(torch.optim.SGD, lr=0.1)


def _unfreezes():
    """The head alone at first, then the blocks instead: PyTorch's DDP would never average these, and say nothing."""
    mesh = mesh_of(sp=2)
    for scheme, refused in {"ddp": True, "zero1": True, "ddp-legacy": False, "zero3": False}.items():
        by = rf"lasp\.data_parallel\(\.\., scheme='{scheme}'\) does not average what was unfrozen"
        alone, model = SmallModel().double(), lasp.parallelize(SmallModel().double(), mesh)
        for m in (alone, model):
            m.requires_grad_(False).head.requires_grad_(True)
        wrapper, optimizer = lasp.data_parallel(model, mesh, scheme=scheme, optimizer=SGD, blocks=model.blocks)
        pairs = ((alone, alone, SGD(alone.head.parameters()), None), (model, wrapper, optimizer, mesh))
        for step in range(3):
            for m, called, o, over in pairs:
                if step == 2:
                    m.requires_grad_(False).blocks.requires_grad_(True)
                    o.add_param_group({"params": list(m.blocks.parameters())})
                o.zero_grad()
                loss_of(called, whole_batch(step), over).backward()
                if step == 2 and refused and m is model:
                    with pytest.raises(RuntimeError, match=rf"would step on blocks\.0\.norm\.weight .*: {by}"):
                        o.step()
                else:
                    o.step()
        if not refused:
            for name, p in names(wrapper).items():
                assert_close(whole(p.detach()), alone.get_parameter(name).detach(), f"{scheme}: {name}", **CLOSE)


def test_what_is_unfrozen_later_is_averaged_or_refused():
    run_ranks(2, _unfreezes)


def _freezes():
    """What was trained before the wrapper, and is frozen: its gradient of then, set to zero, is no new one."""
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(SmallModel().double(), mesh)
    optimizer = SGD(model.parameters())
    loss_of(model, whole_batch(), mesh).backward()
    optimizer.zero_grad(set_to_none=False)
    model.tokens.requires_grad_(False)
    before = model.tokens.weight.clone()
    loss_of(lasp.data_parallel.wrap_ddp(model, mesh), whole_batch(), mesh).backward()
    optimizer.step()
    assert torch.equal(model.tokens.weight, before)


def test_what_is_frozen_may_have_a_gradient_of_before():
    run_ranks(2, _freezes)


def _adds():
    """A parameter that comes after the wrapper, as LoRA's do."""
    mesh = mesh_of(sp=2)
    for scheme in ("ddp", "zero3", "ddp-legacy"):
        model = lasp.parallelize(SmallModel().double(), mesh)
        wrapper, optimizer = lasp.data_parallel(model, mesh, scheme=scheme, optimizer=SGD, blocks=model.blocks)
        model.register_parameter("shift", nn.Parameter(torch.zeros((), dtype=torch.float64)))
        optimizer.add_param_group({"params": [model.shift]})
        model.head.register_forward_pre_hook(lambda _, args, shift=model.shift: (args[0] + shift,))
        loss_of(wrapper, whole_batch(), mesh).backward()
        if scheme == "ddp-legacy":  # which averages all that a model has
            optimizer.step()
        else:
            with pytest.raises(RuntimeError, match="would step on shift with the gradient of this rank alone"):
                optimizer.step()


def test_what_is_added_later_is_averaged_or_refused():
    run_ranks(2, _adds)


def _casts():
    """After the wrapper: a cast, and weights that are assigned; FSDP2's parameters are then others, which it knows."""
    mesh = mesh_of(sp=2)
    for assign in (False, True):
        model = lasp.parallelize(SmallModel(), mesh)
        wrapper, _ = lasp.data_parallel(model, mesh, scheme="zero3", optimizer=SGD, blocks=model.blocks)
        wrapper.double()
        if assign:
            weights = {name: x.clone() for name, x in wrapper.state_dict().items()}
            wrapper.load_state_dict(weights, assign=True)
        optimizer, alone = SGD(wrapper.parameters()), SmallModel().double()
        loss_of(wrapper, whole_batch(), mesh).backward()
        optimizer.step()
        loss_of(alone, whole_batch(), None).backward()
        SGD(alone.parameters()).step()
        for name, p in names(wrapper).items():
            assert_close(whole(p.detach()), alone.get_parameter(name).detach(), f"assign={assign}: {name}", **CLOSE)


def test_what_fsdp2_knows_may_be_cast_or_assigned_afterwards():
    run_ranks(2, _casts)
