"""`lasp.verify` and its command: what is right passes, what is wrong is found, and nothing is left behind."""

import math
import os
import re
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import LAUNCHER_PREFIXES, ROOT
from ranks import mesh_of, run_ranks
from scripts import run_script
from small_model import VOCABULARY, SmallModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import lasp
from lasp.__main__ import main
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.models import TNL, LinearTransformer, LinearTransformerConfig, TNLConfig
from lasp.modules import LightningAttention
from lasp.ranks.group import process

SHARP = 1e-10  # in fp64, of models that compute everything in it


def small():
    return SmallModel().double()


def tnl():
    torch.manual_seed(0)
    return TNL(TNLConfig(29, layers=2, width=16, heads=2, glu_width=24, lrpe=False)).double()


def rotating_tnl():
    torch.manual_seed(0)
    return TNL(TNLConfig(29, layers=2, width=16, heads=2, glu_width=24))


def transformer():
    torch.manual_seed(0)
    return LinearTransformer(LinearTransformerConfig(29, layers=2, width=16, heads=2, mlp_width=24)).double()


MODELS = {f.__name__: f for f in (small, tnl, rotating_tnl, transformer)}


class Left:
    """What `verify` must leave as it was."""

    def __init__(self, model):
        for number, p in enumerate(model.parameters()):  # every other one has a gradient
            p.grad = torch.full_like(p, float(number)) if number % 2 else None
        for number, module in enumerate(model.modules()):
            module.training = number % 3 > 0
        self.model, self.gradients = model, [p.grad for p in model.parameters()]
        self.values = [x.detach().clone() for x in self.tensors()]
        self.kinds = [(type(x), x.dtype, x.data_ptr()) for x in self.tensors()]
        self.modes = [m.training for m in model.modules()]
        self.held = [getattr(m, "sequence", None) for m in model.modules()]
        self.sizes = [None if s is None else s.size for s in self.held]
        self.random, self.told = torch.get_rng_state(), str(lasp.explain(model))
        self.children = [name for name, _ in model.named_modules()]

    def tensors(self):
        return [
            *self.model.parameters(),
            *self.model.buffers(),
            *(p.grad for p in self.model.parameters() if p.grad is not None),
        ]

    def check(self):
        assert all(p.grad is before for p, before in zip(self.model.parameters(), self.gradients))
        assert all(torch.equal(x, before) for x, before in zip(self.tensors(), self.values))
        assert [(type(x), x.dtype, x.data_ptr()) for x in self.tensors()] == self.kinds
        assert [m.training for m in self.model.modules()] == self.modes
        assert [getattr(m, "sequence", None) for m in self.model.modules()] == self.held
        assert [None if s is None else s.size for s in self.held] == self.sizes
        assert torch.equal(torch.get_rng_state(), self.random)
        assert str(lasp.explain(self.model)) == self.told
        assert [name for name, _ in self.model.named_modules()] == self.children
        assert not any(peers.exchanges for peers in process.peers.values())
        assert not process.alone


def _right(kind, packed):
    mesh, make = mesh_of(sp=dist.get_world_size()), MODELS[kind]
    model = make()
    options = {"tolerance": None if kind == "rotating_tnl" else SHARP}
    if packed:
        ids = torch.randint(VOCABULARY, (1, 31), generator=torch.Generator().manual_seed(1))
        options["batch"] = {"input_ids": ids, "cu_seqlens": torch.tensor([0, 3, 21, 22, 31], dtype=torch.int32)}
    found = []
    for parallelized in (False, True):
        if parallelized:
            lasp.parallelize(model, mesh)
        left = Left(model)
        found.append(lasp.verify(model, mesh, **options))
        left.check()
    for result in found:
        assert result.ok, result
        assert bool(result)
        assert result.ranks == dist.get_world_size()
        assert [row.name for row in result.rows] == ["loss", "logits", *(name for name, _ in model.named_parameters())]
        assert all(row.largest > 0 for row in result.rows)
        assert result.shape == ((1, 31) if packed else (2, 64 if kind == "small" else 101 * result.ranks + 1))
    assert found[0].whole_loss == found[1].whole_loss == pytest.approx(found[0].split_loss, rel=1e-6)
    return str(found[0])


@pytest.mark.any_pytorch
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_right_passes_before_and_after_parallelize(kind, world):
    packed = (world + list(MODELS).index(kind)) % 2 == 0  # each kind and each number of ranks both so and so
    tables = run_ranks(world, _right, kind, packed)
    assert len({table.splitlines()[-1] for table in tables}) == 1
    expected = "one rank: nothing is split" if world == 1 else f"{world} ranks compute what one does: none of "
    assert expected in tables[0].splitlines()[-1]


# Wrapped models


def _wrapped(factors, scheme):
    mesh = mesh_of(dp_replicate=factors[0], dp_shard=factors[1], sp=factors[2])
    model = lasp.parallelize(small(), mesh)
    if scheme == "checkpoint":
        model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    elif scheme == "compiled":
        model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    wrapped = {"ddp": wrap_ddp, "fsdp2": wrap_fsdp2}.get(scheme, lambda m, _: m)(model, mesh)
    for p in wrapped.parameters():
        p.grad = torch.ones_like(p)
    gradients = [p.grad for p in wrapped.parameters()]
    found = lasp.verify(wrapped, mesh, tokens=31, tolerance=SHARP)
    assert found.ok, found
    assert [row.name for row in found.rows[2:]] == [name for name, _ in SmallModel().named_parameters()]
    assert all(row.largest > 0 for row in found.rows)
    assert all(p.grad is before for p, before in zip(wrapped.parameters(), gradients))
    # It trains as if nothing had been, also with what the first of these calls compares.
    batch = lasp.shard_batch({"input_ids": torch.arange(13)[None]}, mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    optimizer.zero_grad()
    logits = wrapped(batch["input_ids"], batch["position_ids"])
    lasp.token_loss(logits, batch["labels"], mesh=mesh)[0].backward()
    optimizer.step()
    assert [layer.exchanges for layer in lasp.explain(model)] == [2, 2]


@pytest.mark.parametrize(
    ("factors", "scheme"),
    [
        ((1, 1, 2), "ddp"),
        ((1, 1, 2), "fsdp2"),
        ((1, 1, 2), "checkpoint"),
        ((1, 1, 2), "compiled"),
        ((1, 2, 2), "ddp"),
        ((1, 2, 2), "fsdp2"),
        ((2, 1, 2), "fsdp2"),
    ],
)
def test_wrapped_models_pass_and_train_on(factors, scheme):
    run_ranks(math.prod(factors), _wrapped, factors, scheme)


def _mixed_precision(scheme):
    """The tolerance is that of the arithmetic, which the logits tell."""
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(SmallModel(), mesh)
    if scheme == "fsdp2":
        wrap_fsdp2(model, mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=scheme == "autocast"):
        found = lasp.verify(model, mesh)
    assert found.ok, found
    assert (found.arithmetic, found.tolerance) == ("bfloat16", 5e-2)
    assert max(row.difference for row in found.rows) > 1e-5  # it was computed in bf16


@pytest.mark.parametrize("scheme", ["fsdp2", "autocast"])
def test_mixed_precision_has_its_tolerance(scheme):
    run_ranks(2, _mixed_precision, scheme)


def _without_the_sequence_axis(scheme):
    """Gradients averaged over dp alone: no loss curve shows it."""
    mesh = mesh_of(dp_shard=2, sp=2)
    model = lasp.parallelize(small(), mesh)
    over = mesh["dp_shard"]
    wrapped = (
        wrap_fsdp2(model, over) if scheme == "fsdp2" else DistributedDataParallel(model, process_group=over.get_group())
    )
    found = lasp.verify(wrapped, mesh, tokens=31)
    assert not found.ok
    assert {row.name for row in found.wrong} == {name for name, _ in SmallModel().named_parameters()}
    assert len(found.worst(3)) == 3


@pytest.mark.parametrize("scheme", ["ddp", "fsdp2"])
def test_data_parallelism_that_leaves_out_the_sequence_axis_is_found(scheme):
    run_ranks(4, _without_the_sequence_axis, scheme)


# Mistakes


class Forgets(nn.Module):
    """It does not hand its `sequence` on."""

    sequence = None

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).unbind(-3)
        return lasp.linear_attention(q, k, v)[0].flatten(-2)


class Shifts(nn.Module):
    """A token shift in the forward, where `strict` cannot see it."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, 12)

    def forward(self, x):
        return x + self.mix(F.pad(x, (0, 0, 1, -1)))


class Convolves(nn.Module):
    """A short convolution; `wrong` leaves out the oldest of the tokens before a shard."""

    sequence = None

    def __init__(self, wrong):
        super().__init__()
        self.weight, self.wrong = nn.Parameter(torch.randn(12, 4)), wrong

    def forward(self, x):
        with_before = lasp.halo(x, 4, sequence=self.sequence)
        if self.wrong and self.sequence is not None:
            with_before = F.pad(with_before[:, 1:], (0, 0, 1, 0))
        return F.conv1d(with_before.transpose(1, 2), self.weight.unsqueeze(1), groups=12).transpose(1, 2)


class Counts(nn.Module):
    """Positions of its own, from 0 on every rank."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 12)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1]))


class Normalizes(nn.Module):
    """Over all tokens; in eval mode it would not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x):
        return x + self.norm(x.transpose(1, 2)).transpose(1, 2)


class NotFinite(nn.Module):
    """On the last rank alone, and so in both the split and the whole."""

    def forward(self, x):
        return x * (math.nan if dist.get_rank() == dist.get_world_size() - 1 else 1.0)


lasp.register(Forgets)
lasp.register(Convolves)


class Language(nn.Module):
    def __init__(self, layer, attends=True):
        super().__init__()
        self.tokens, self.layer = nn.Embedding(VOCABULARY, 12), layer
        self.attention = LightningAttention(torch.tensor([-0.1, -0.01])) if attends else None
        self.head = nn.Linear(12, VOCABULARY)

    def forward(self, input_ids):
        x = self.tokens(input_ids)
        x = self.layer(x)
        if self.attention is not None:
            y = x.unflatten(-1, (2, 6))
            x = x + self.attention(y, y, y).flatten(-2)
        return self.head(x)


MISTAKES = {
    "forgets the ranks": (Forgets, "qkv.weight"),
    "functional token shift": (Shifts, "mix.weight"),
    "halo one token short": (lambda: Convolves(True), "weight"),
    "local positions": (Counts, "table.weight"),
    "batch norm": (Normalizes, "norm.weight"),
    "not finite": (NotFinite, None),
}


def _mistake(kind, parallelized, dtype):
    torch.manual_seed(0)
    make, worst = MISTAKES[kind]
    model, options = Language(make()), {"strict": False}
    if parallelized:
        lasp.parallelize(model, dist.group.WORLD, **options)
        options = {}
    left = Left(model)
    model.train()
    left.modes = [True] * len(left.modes)
    found = lasp.verify(model, dist.group.WORLD, tokens=41, dtype=dtype, **options)
    left.check()
    assert not found.ok
    assert not found
    if worst is not None:
        assert f"layer.{worst}" in {row.name for row in found.wrong}
        assert f"layer.{worst}" in {row.name for row in found.worst()}
    else:
        assert all(row.difference == math.inf for row in found.rows)
    last = str(found).splitlines()[-1]
    assert re.match(r"WRONG: \d+ of \d+ tensors .* differ by more than ", last)
    return str(found).splitlines()[1:2] + str(found).splitlines()[3:]  # the loss of a rank may be its own


@pytest.mark.any_pytorch
@pytest.mark.parametrize("parallelized", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_found_and_named_on_every_rank(kind, parallelized):
    first, *others = run_ranks(2, _mistake, kind, parallelized, None)
    assert all(other == first for other in others)


def test_a_mistake_is_found_on_three_ranks_in_fp64():
    run_ranks(3, _mistake, "halo one token short", False, torch.float64)


def _hidden_by_bf16():
    """A wrong token among two hundred is less than bf16 rounds: the verdict says what it cannot see, and what can."""
    torch.manual_seed(0)
    model = Language(Convolves(True))
    options = {"tokens": 203, "strict": False}  # else parallelize refuses it
    hidden = lasp.verify(model, dist.group.WORLD, dtype=torch.bfloat16, **options)
    assert hidden.ok
    assert "a mistake of less than 5% would not show: dtype=torch.float32 is sharper" in str(hidden)
    found = lasp.verify(model, dist.group.WORLD, dtype=torch.float32, **options)
    assert "layer.weight" in {row.name for row in found.wrong}
    assert "would not show" not in str(found)


def test_what_bf16_hides_is_said():
    run_ranks(2, _hidden_by_bf16)


def _right_halo():
    torch.manual_seed(0)
    found = lasp.verify(Language(Convolves(False)), dist.group.WORLD, tokens=41, dtype=torch.float64, tolerance=SHARP)
    assert found.ok, found


def test_the_same_layer_without_the_mistake_passes():
    run_ranks(3, _right_halo)


def _other_weights():
    model = SmallModel(seed=dist.get_rank())
    with pytest.raises(lasp.RankMismatchError, match=r"rank 1 has values of the weights .seed before"):
        lasp.verify(model, dist.group.WORLD)


def test_weights_that_differ_between_ranks_are_found():
    run_ranks(2, _other_weights)


class Attends(nn.Module):
    """Softmax attention, whose result does not depend on the bias of its keys."""

    sequence = None

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        q, k, v = (make(x).unflatten(-1, (2, 6)) for make in (self.q, self.k, self.v))
        return x + lasp.softmax_attention(q, k, v, sequence=self.sequence).flatten(-2)


lasp.register(Attends)


def _zero_but_for_rounding(dtype):
    torch.manual_seed(0)
    found = lasp.verify(Language(Attends()), dist.group.WORLD, tokens=203, dtype=dtype)
    assert found.ok, found
    [bias] = [row for row in found.rows if row.name == "layer.k.bias"]
    assert bias.largest < 1e-4 * max(row.largest for row in found.rows[2:])


@pytest.mark.any_pytorch
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_that_is_zero_but_for_rounding_is_no_alarm(dtype):
    run_ranks(2, _zero_but_for_rounding, dtype)


class Drops(nn.Module):
    def __init__(self, functional):
        super().__init__()
        self.module, self.functional = nn.Dropout(0.5), functional

    def forward(self, x):
        return F.dropout(x, 0.5, self.training) if self.functional else self.module(x)


def _dropout():
    torch.manual_seed(0)
    assert lasp.verify(Language(Drops(False)), dist.group.WORLD, tokens=41).ok
    model = Language(Drops(True))
    left = Left(model.train())
    left.modes = [True] * len(left.modes)
    model.train()
    with pytest.raises(ValueError, match=r"draws random numbers.*call model\.eval\(\)"):
        lasp.verify(model, dist.group.WORLD, tokens=41)
    left.check()
    assert lasp.verify(model.eval(), dist.group.WORLD, tokens=41).ok


def test_dropout_is_off_and_other_random_numbers_are_an_error():
    run_ranks(2, _dropout)


def _behind_zeros():
    """A wrong layer whose output does not come to the loss: nothing is shown, and the table says so."""
    torch.manual_seed(0)
    model = Language(Forgets(), attends=False)
    nn.init.zeros_(model.head.weight)
    found = lasp.verify(model, dist.group.WORLD, tokens=41, strict=False)
    assert not found.ok  # the gradient of the head knows what comes in
    assert found.not_reached == ["tokens.weight", "layer.qkv.weight", "layer.qkv.bias"]
    assert "nothing is shown about: tokens.weight, layer.qkv.weight, layer.qkv.bias" in str(found)


def test_parameters_that_no_gradient_reaches_are_listed():
    run_ranks(2, _behind_zeros)


def _frozen_and_sparse():
    model = small()
    model.tokens.sparse = True
    model.head.weight.requires_grad_(False)
    found = lasp.verify(model, dist.group.WORLD, tolerance=SHARP)
    assert found.ok, found
    assert "head.weight" not in {row.name for row in found.rows}
    assert "tokens.weight" in {row.name for row in found.rows}


def test_frozen_parameters_have_no_row_and_sparse_gradients_one():
    run_ranks(2, _frozen_and_sparse)


# How a model is called


class Odd(nn.Module):
    """Takes its input by another name and returns an object."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.kind = small(), kind

    def forward(self, tokens, positions=None, *, layout, labels=None):
        assert labels is None
        assert layout is not None
        logits = self.inner(tokens, positions, layout)
        return {"tuple": (logits, None), "mapping": {"logits": logits}}.get(self.kind, mock.Mock(logits=logits))


def _odd_models():
    for kind in ("tuple", "mapping", "object"):
        assert lasp.verify(Odd(kind), dist.group.WORLD, tolerance=SHARP).ok
    seen = []

    def forward(model, batch):
        seen.append((sorted(batch), batch["layout"].lengths))
        return model(batch["input_ids"], positions=batch["position_ids"], layout=batch["layout"])[0]

    ids = torch.arange(7)[None]
    labels = torch.full_like(ids, -100)
    labels[0, 5] = 3
    batch = {"input_ids": ids, "labels": labels}
    assert lasp.verify(Odd("tuple"), dist.group.WORLD, batch, forward=forward, tolerance=SHARP).ok
    names = ["input_ids", "labels", "layout", "position_ids"]
    assert seen == [(names, (4, 3)), (names, (4, 3)), (names, (7,))]  # first only up to the model


def test_models_that_are_called_otherwise():
    run_ranks(2, _odd_models)


def _fewer_layers():
    model = small()
    found = lasp.verify(model, dist.group.WORLD, layers=1, tolerance=SHARP)
    assert found.ok
    assert not any("blocks.1" in row.name for row in found.rows)
    assert len(model.blocks) == 2
    lasp.parallelize(model, dist.group.WORLD)
    left = Left(model)
    assert lasp.verify(model, dist.group.WORLD, layers=1, tolerance=SHARP).ok
    left.check()
    assert lasp.verify(SmallModel(), dist.group.WORLD, dtype=torch.bfloat16).arithmetic == "bfloat16"


def test_fewer_layers_of_a_large_model_and_another_dtype():
    run_ranks(2, _fewer_layers)


# What it refuses


BAD = [
    (lambda: 5, {}, TypeError, "model must be a torch.nn.Module, got 5"),
    (lambda: SmallModel().to("meta"), {}, ValueError, r"SmallModel has no weights yet \(device meta\)"),
    (SmallModel, {"forward": 3}, TypeError, "forward must be a function, got 3"),
    (
        SmallModel,
        {"dtype": torch.int64},
        TypeError,
        "dtype must be a floating-point .* got torch.int64",
    ),
    (SmallModel, {"dtype": "float64"}, TypeError, "dtype must be a floating-point .* got 'float64'"),
    (SmallModel, {"layers": 3}, ValueError, "layers must be an integer of at least 1 and at most 2, got 3"),
    (SmallModel, {"layers": 0}, ValueError, "layers must be an integer .* got 0"),
    (SmallModel, {"layers": True}, TypeError, "layers must be an integer, got True"),
    (lambda: Language(Shifts()), {"layers": 1}, ValueError, "layers=1 needs a model with a ModuleList"),
    (SmallModel, {"tokens": 65}, ValueError, "tokens must be an integer of at least 2 and at most 64, got 65"),
    (SmallModel, {"tokens": 2.5}, TypeError, "tokens must be an integer, got 2.5"),
    (SmallModel, {"tolerance": math.nan}, ValueError, "tolerance must be finite, got nan"),
    (SmallModel, {"tolerance": "1"}, TypeError, "tolerance must be a number, got '1'"),
    (SmallModel, {"stricter": 1}, TypeError, r"verify takes the options of parallelize, and \['stricter'\] are none"),
    (SmallModel, {"exchange": "pigeon"}, ValueError, "exchange must be one of"),
    (SmallModel, {"batch": [1]}, TypeError, r"batch must be a mapping, got \[1\]"),
    (SmallModel, {"batch": {}}, TypeError, "input_ids"),
    (
        SmallModel,
        {"batch": {"input_ids": torch.ones(1, 4).long()}, "tokens": 4},
        ValueError,
        "tokens=4 is the length of",
    ),
    (lambda: SmallModel().requires_grad_(False), {}, ValueError, "no parameter of this SmallModel is trained"),
    (lambda: nn.Sequential(LightningAttention()), {}, ValueError, "Sequential has neither config.vocab_size nor an nn"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), BAD, ids=[x[3][:30] for x in BAD])
def test_bad_arguments(make, options, error, message):
    with pytest.raises(error, match=message):
        lasp.verify(make(), None, **options)


def test_a_process_of_its_own_is_one_rank():
    found = lasp.verify(SmallModel(), None)
    assert found.ok
    assert found.ranks == 1


def _one_rank_differs(options, message):
    odd = dist.get_rank() == 1
    model = SmallModel()
    left = Left(model)
    with pytest.raises(lasp.RankMismatchError, match=message):
        lasp.verify(model, dist.group.WORLD, **(options if odd else {}))
    left.check()
    assert lasp.verify(model, dist.group.WORLD).ok


@pytest.mark.any_pytorch
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 33}, r"rank 1 has input_ids \[2, 33, .*\], the others \[2, 64, "),
        ({"layers": 9}, "rank 1 failed before its exchange: ValueError: layers must be an integer"),
        ({"dtype": torch.float64}, 'rank 1 has dtype "torch.float64", the others "None"'),
        ({"tolerance": 0.5}, "rank 1 has tolerance 0.5, the others null"),
        ({"batch": {"input_ids": torch.zeros(2, 64).long()}}, r"rank 1 has input_ids \[2, 64, .checksum "),
    ],
)
def test_what_differs_on_one_rank_is_an_error_on_all(options, message):
    run_ranks(3, _one_rank_differs, options, message)


def _refused_when_wrapped():
    mesh = mesh_of(sp=2)
    model = wrap_ddp(lasp.parallelize(SmallModel(), mesh), mesh)
    for options in ({"layers": 1}, {"dtype": torch.float64}):
        with pytest.raises(ValueError, match=r"is for a model that is not wrapped yet, got DistributedDataParallel"):
            lasp.verify(model, mesh, **options)
    with pytest.raises(ValueError, match=r"\['strict'\] are options of parallelize, but this model is parallelized"):
        lasp.verify(model, mesh, strict=False)
    with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel and not parallelized: call parallelize"):
        lasp.verify(wrap_ddp(SmallModel(), mesh), mesh)
    with pytest.raises(ValueError, match=r"inner is split over the ranks \(0, 1\), but the mesh has \(0,\)"):
        lasp.verify(model, None)
    with pytest.raises(ValueError, match=r"cannot split the sequence of: layer.norm"):
        lasp.verify(Language(Normalizes()), mesh)


def test_what_cannot_be_done_with_a_model_as_it_is():
    run_ranks(2, _refused_when_wrapped)


class Convolution(nn.Module):
    """A layer of somebody else, whose forward knows no ranks."""

    def __init__(self, taps=3):
        super().__init__()
        self.conv = nn.Conv1d(12, 12, taps, groups=12, padding=taps - 1)

    def forward(self, x):
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


def through_a_closure(module, sequence):
    weight, bias = module.conv.weight, module.conv.bias
    module.forward = lambda x: lasp.causal_conv(x, weight.squeeze(1), bias, sequence=sequence)


through_a_closure.covers = True


def _closures():
    """An adapter may keep the ranks where nobody finds them; the weights may be tied, and buffers made on the way."""
    torch.manual_seed(0)
    model, plan = Language(Convolution()).double(), {"layer": through_a_closure}
    model.head.weight = model.tokens.weight
    model.tokens.register_forward_hook(lambda module, *_: module.register_buffer("seen", torch.ones(2)))
    left = Left(model)
    assert lasp.verify(model, dist.group.WORLD, tokens=41, plan=plan, tolerance=SHARP).ok
    left.check()
    lasp.parallelize(model, dist.group.WORLD, plan=plan)
    left = Left(model)
    assert lasp.verify(model, dist.group.WORLD, tokens=41, tolerance=SHARP).ok
    left.check()
    assert [row.path for row in lasp.explain(model)] == ["layer", "attention"]  # that of the closure, too
    patched = Language(nn.Identity())
    patched.layer.forward = lambda x: x
    with pytest.raises(ValueError, match="the forward of layer was replaced by a function, which a copy of the model"):
        lasp.verify(patched, dist.group.WORLD, tokens=41)


def test_ranks_that_a_closure_holds():
    run_ranks(3, _closures)


def _hooks_of_the_model():
    """All are called in both runs, and what they keep stays; one that may step with a gradient is refused."""
    model, kept = small(), []
    model.head.register_forward_pre_hook(lambda _, args: kept.append(("before", args[0].shape[1])))
    model.head.register_forward_hook(lambda *given: kept.append(("behind", given[2].shape[1])))
    model.head.register_full_backward_hook(lambda *given: kept.append(("backward", given[2][0].shape[1])))
    model.head.weight.register_hook(lambda gradient: kept.append(("weight", len(gradient))))
    assert lasp.verify(model, dist.group.WORLD, tokens=42).ok
    for tokens in (21, 42):
        for name in ("before", "behind", "backward"):
            kept.remove((name, tokens))
        kept.remove(("weight", VOCABULARY))
    assert kept == []
    handle = model.head.weight.register_post_accumulate_grad_hook(lambda p: p.add_(p.grad, alpha=-0.1))
    left = Left(model)
    with pytest.raises(ValueError, match=r"no register_post_accumulate_grad_hook, got one at 'head.weight': lasp"):
        lasp.verify(model, dist.group.WORLD, tokens=42)
    left.check()
    handle.remove()
    wrapped = wrap_ddp(lasp.parallelize(small(), dist.group.WORLD), dist.group.WORLD)  # whose own ones are none
    assert lasp.verify(wrapped, dist.group.WORLD, tokens=42).ok


def test_hooks_of_the_model():
    run_ranks(2, _hooks_of_the_model)


def _power_iterations(norm):
    """They go on at each forward in training, in buffers with which split and whole begin."""
    torch.manual_seed(0)
    model = small()
    norm(model.head)
    buffers = [x.clone() for x in model.buffers()]
    for split in (lambda: model, lambda: lasp.parallelize(model, dist.group.WORLD)):
        found = lasp.verify(split(), dist.group.WORLD, tokens=42, tolerance=SHARP)
        assert found.ok, found
        assert all(map(torch.equal, buffers, model.buffers()))
        assert model.training


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm], ids=["old", "new"])
def test_buffers_that_each_forward_changes(norm):
    run_ranks(2, _power_iterations, norm)


class Breaks(nn.Module):
    def forward(self, x):
        if x.shape[1] == 41:  # of the whole
            raise KeyError("broken")
        return x


def _broken():
    """An error in the middle leaves nothing behind, and the group is usable."""
    model = lasp.parallelize(Language(Breaks()), dist.group.WORLD)
    left = Left(model)
    with pytest.raises(KeyError, match="broken"):
        lasp.verify(model, dist.group.WORLD, tokens=41)
    left.check()
    with pytest.raises(ValueError, match=r"must return logits .* of \(2, 21\) tokens, got \(2, 21\); "):
        lasp.verify(model, dist.group.WORLD, tokens=42, forward=lambda m, batch: m(batch["input_ids"])[..., 0])
    left.check()
    assert lasp.verify(model, dist.group.WORLD, tokens=43).ok


def test_an_error_on_the_way_leaves_nothing_behind():
    run_ranks(2, _broken)


class FailsInside(nn.Module):
    """Between two layers, on one rank alone."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def forward(self, x, *_):
        if dist.get_rank() == self.rank:
            raise KeyError("broken")
        return x


def _one_rank_fails(factors, scheme, where):
    """In the function that calls the model, before or behind that, or in the model; before and after a step."""
    mesh, odd = mesh_of(dp_shard=factors[0], sp=factors[1]), dist.get_rank() == 1
    model = small()
    if scheme:
        lasp.parallelize(model, mesh)
        model = {"ddp": wrap_ddp, "fsdp2": wrap_fsdp2}.get(scheme, lambda m, _: m)(model, mesh)
        batch = lasp.shard_batch({"input_ids": torch.arange(13)[None]}, mesh)
        model(batch["input_ids"], batch["position_ids"]).sum().backward()  # no call of a layer is its first
        for peers in process.peers.values():
            peers.forget_step()

    def forward(called, batch):
        is_whole = batch["input_ids"].shape[1] == 41
        fails = odd and is_whole == (where == "whole")
        if fails and where == "before":
            raise KeyError("broken")
        logits = called(batch["input_ids"], batch["position_ids"], batch["layout"])
        if fails and where in ("behind", "whole"):
            raise KeyError("broken")
        return logits

    if where == "inside":
        model.blocks.insert(1, FailsInside(1))
        forward = None
    left, started = Left(model), time.monotonic()
    with pytest.raises(
        lasp.RankMismatchError, match=r"rank \d( \(global rank 1\))? failed .*KeyError: 'broken'"
    ) as raised:
        lasp.verify(model, mesh, tokens=41, forward=forward)
    assert time.monotonic() - started < 15  # half of the group's timeout
    assert isinstance(raised.value.__cause__, KeyError) == odd
    left.check()
    if where == "inside":
        del model.blocks[1]
    assert lasp.verify(model, mesh, tokens=41).ok


@pytest.mark.any_pytorch
@pytest.mark.parametrize(
    ("factors", "scheme", "where"),
    [
        *(((1, 3), scheme, where) for scheme in ("", "plain") for where in ("before", "inside", "behind", "whole")),
        *(((1, 2), scheme, where) for scheme in ("ddp", "fsdp2") for where in ("before", "behind", "whole")),
        ((2, 2), "", "before"),
        ((2, 2), "", "whole"),
        ((2, 2), "fsdp2", "before"),
        ((2, 1), "ddp", "whole"),
    ],
)
def test_a_rank_that_fails_on_the_way_keeps_no_other_waiting(factors, scheme, where):
    run_ranks(math.prod(factors), _one_rank_fails, factors, scheme, where)


def _one_replica_is_called_otherwise():
    """Along an axis that is not the sequence's."""
    mesh, odd = mesh_of(dp_shard=2, sp=2), dist.get_rank() > 1
    started = time.monotonic()
    with pytest.raises(lasp.RankMismatchError, match=r"failed .*layers must be an integer of at least") as raised:
        lasp.verify(small(), mesh, layers=9 if odd else None)
    assert isinstance(raised.value.__cause__, ValueError) == odd
    assert time.monotonic() - started < 15
    assert lasp.verify(small(), mesh, tokens=41).ok


def test_an_argument_that_is_wrong_in_one_replica_is_an_error_in_all():
    run_ranks(4, _one_replica_is_called_otherwise)


# The command line


def run_command(*arguments):
    paths = [str(ROOT), str(ROOT / "kernels")]
    env = {name: x for name, x in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    env |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "lasp", "verify", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.any_pytorch  # test_launchers.py starts ranks in this way, too
@pytest.mark.timeout(300)  # four processes import PyTorch
def test_the_command_verifies_a_tnl_on_two_ranks():
    done = run_command("--layers=1", "--tokens=33", "--dtype=float64")
    assert done.returncode == 0, done.stderr
    assert "2 ranks against one: 2 x 33 tokens, float64" in done.stdout
    assert "2 ranks compute what one does: none of" in done.stdout
    assert "gradient of blocks.0.attention" in done.stdout
    assert "blocks.1" not in done.stdout


def test_the_command_fails_for_a_model_that_is_wrong(tmp_path):
    """On each rank, as torchrun starts it, which the command has become then."""
    (tmp_path / "wrong.py").write_text(
        "from torch import nn\nfrom lasp.modules import LightningAttention\n"
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.tokens, self.mix, self.head = nn.Embedding(9, 4), LightningAttention(), nn.Linear(4, 9)\n"
        "    def forward(self, ids):\n"
        "        x = self.tokens(ids).unsqueeze(2)\n"
        "        x = self.mix(x, x, x)\n"
        "        if x.shape[1] == 203:  # so that parallelize, which tries other lengths, cannot see it\n"
        "            x = nn.functional.pad(x, (0, 0, 0, 0, 1, -1))\n"
        "        return self.head(x.squeeze(2))\n"
    )
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.argv = ['lasp', 'verify', 'wrong:Model', '--sp=2']\n"
        "runpy.run_module('lasp', run_name='__main__', alter_sys=True)"
    )
    (code, printed, error), (other, nothing, _) = run_script(code, 2)
    assert (code, other, nothing) == (1, 1, ""), error
    assert "WRONG: " in printed
    assert "gradient of tokens.weight" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere:build"], "cannot find 'nowhere:build': No module named 'nowhere'"),
        (["lasp:nothing"], "cannot find 'lasp:nothing'"),
        (["lasp:__all__"], "'lasp:__all__' must be a function that returns a model"),
        (["lasp"], "expected module:function, such as my_package.model:build, got 'lasp'"),
        (["--layers=0"], "argument --layers: invalid _positive value: '0'"),
        (["--model=2B"], "invalid choice: '2B'"),
    ],
)
def test_bad_options_end_before_any_rank_starts(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lasp", "verify", *arguments])
    with mock.patch("lasp.verify_command.run_verify", side_effect=AssertionError), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
