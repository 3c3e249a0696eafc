"""`parallelize`, `explain` and `register`: what they find, what they refuse, and what they leave alone."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from inputs import assert_close
from ranks import mesh_of, run_ranks
from small_model import HEADS, VOCABULARY, WIDTH, SmallModel
from torch import nn

import lasp
from lasp.exchange import cost
from lasp.exchange.base import Sizes
from lasp.modules import LightningAttention
from lasp.ranks import SCHEDULES


class WithLayer(nn.Module):
    """A model that can be split, with one more layer at `extra.layer`."""

    def __init__(self, layer):
        super().__init__()
        self.inner = LightningAttention()
        self.extra = nn.ModuleDict({"layer": layer})


class FooAttention(nn.Module):
    """A mixing layer of somebody else."""


class MyMixer(nn.Module):
    """A mixing layer whose class its user registers."""

    sequence = None

    def forward(self, x):
        x = x.unsqueeze(2)
        o, _ = lasp.linear_attention(x, x, x, sequence=self.sequence)
        return o.squeeze(2)


class MyMixersChild(MyMixer):
    pass


lasp.register(MyMixer)


def tokens(T=13, rows=2):
    return torch.randint(VOCABULARY, (rows, T), generator=torch.Generator().manual_seed(0))


def logits_of(model, ids, mesh=None):
    local = lasp.shard_batch({"input_ids": ids}, mesh, pad=False)
    return model(local["input_ids"], local["position_ids"])


def assert_same_logits(model, serial, mesh, ids):
    whole = lasp.unshard_sequence(logits_of(model, ids, mesh), mesh)
    assert_close(whole, logits_of(serial, ids), "logits")


# What it does


def _splits_the_model():
    mesh = mesh_of(sp=dist.get_world_size())
    model, serial = SmallModel().double(), SmallModel().double()
    assert lasp.parallelize(model, mesh["sp"]) is model
    assert list(model.state_dict()) == list(serial.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in serial.named_parameters()]
    assert_same_logits(model, serial, mesh, tokens())
    with pytest.raises(ValueError, match="this SmallModel is parallelized already"):
        lasp.parallelize(model, mesh["sp"])
    with pytest.raises(ValueError, match="this Sequential is parallelized already"):
        lasp.parallelize(nn.Sequential(model), mesh["sp"])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_logits_are_those_of_one_process_and_keys_stay(world):
    run_ranks(world, _splits_the_model)


def _accepts(kind):
    mesh = mesh_of(sp=2)
    given = {"mesh": mesh, "axis": mesh["sp"], "group": dist.group.WORLD, "sequence": lasp.SequenceParallel(mesh["sp"])}
    model = lasp.parallelize(SmallModel().double(), given[kind], exchange="ring")
    assert [(layer.ranks, layer.exchange) for layer in lasp.explain(model)] == [(2, "ring")] * 2
    assert_same_logits(model, SmallModel().double(), given[kind], tokens())


@pytest.mark.parametrize("kind", ["mesh", "axis", "group", "sequence"])
def test_accepts_a_mesh_an_axis_or_a_group(kind):
    run_ranks(2, _accepts, kind)


def test_one_rank_leaves_the_model_as_it_was():
    model, serial = SmallModel(), SmallModel()
    before = copy.deepcopy(dict(model.named_modules()))
    assert lasp.parallelize(model, None) is model
    assert all(getattr(module, "sequence", None) is None for module in model.modules())
    assert list(model.state_dict()) == list(serial.state_dict())
    for path, module in model.named_modules():
        assert type(module) is type(before[path])
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert vars(module).keys() == vars(before[path]).keys()
    assert torch.equal(logits_of(model, tokens()), logits_of(serial, tokens()))
    assert lasp.explain(model) == []
    assert str(lasp.explain(model)) == "one rank: nothing is split"
    with pytest.raises(ValueError, match="parallelized already"):
        lasp.parallelize(model, None)


def _one_rank_mesh():
    model = lasp.parallelize(SmallModel(), mesh_of(sp=1))
    assert all(getattr(module, "sequence", None) is None for module in model.modules())


def test_an_axis_of_one_rank_is_one_rank():
    run_ranks(1, _one_rank_mesh)


def _two_models_two_meshes():
    pair, all_four = mesh_of(sp=2), mesh_of(sp=4)
    serials = [SmallModel(seed).double() for seed in (1, 2)]
    models = [lasp.parallelize(SmallModel(seed).double(), mesh) for seed, mesh in ((1, pair), (2, all_four))]
    assert {layer.ranks for layer in lasp.explain(models[0])} == {2}
    assert {layer.ranks for layer in lasp.explain(models[1])} == {4}
    outputs = [logits_of(m, tokens(), mesh) for m, mesh in zip(models, (pair, all_four))]
    for output, mesh, serial in zip(outputs, (pair, all_four), serials):
        assert_close(lasp.unshard_sequence(output, mesh), logits_of(serial, tokens()), "logits")
    for serial in serials:
        logits_of(serial, tokens()).square().mean().backward()
    for output, model, serial, mesh in zip(outputs, models, serials, (pair, all_four)):
        output.square().sum().backward()  # the same loss: the averages below divide by the ranks
        lasp.sync_grads(model, mesh)
        # The pair's mesh has two data-parallel replicas of the same batch, so the average is over 4 ranks, of 2 shards.
        factor = mesh["sp"].size() / (2 * 13 * VOCABULARY)
        for name, p in model.named_parameters():
            assert_close(p.grad * factor, serial.get_parameter(name).grad, name)


def test_two_models_on_two_meshes_in_one_process():
    run_ranks(4, _two_models_two_meshes)


def _deepcopy():
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(SmallModel().double(), mesh)
    twin = copy.deepcopy(model)
    assert len(lasp.explain(twin)) == 2
    assert_same_logits(twin, SmallModel().double(), mesh, tokens())
    told = "make copies before lasp.parallelize|copies are made before that"
    for call in (
        lambda: lasp.parallelize(twin, mesh),
        lambda: lasp.generate(twin, [1], max_new_tokens=1),
        lambda: lasp.generate(twin, [1], mesh=mesh, max_new_tokens=1),
        lambda: lasp.stream_backward(twin, {"input_ids": tokens()}, mesh=mesh),
    ):
        with pytest.raises(ValueError, match=told):
            call()


def test_a_copy_of_a_split_model_is_split():
    run_ranks(2, _deepcopy)


def _a_layer_is_replaced(layout):
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(SmallModel().double(), mesh)
    local = lasp.shard_batch({"input_ids": tokens()}, mesh)
    inputs = local["input_ids"], local["position_ids"], *((local["layout"],) if layout else ())
    model.head = nn.Sequential(nn.Dropout(0.0), model.head)  # which mixes no tokens
    assert_close(model(*inputs), model(*inputs), "logits")
    model.blocks[1].mixer = SmallModel().double().blocks[1].mixer
    with pytest.raises(ValueError, match=r"got 'blocks\.1\.mixer\.inner', a LightningAttention that was put there"):
        model(*inputs)
    if dist.get_rank() == 0:  # and without a forward of the others: nothing was sent
        with pytest.raises(ValueError, match="that was put there afterwards"):
            model(*inputs)


@pytest.mark.parametrize("layout", [False, True])
def test_a_layer_that_is_replaced_afterwards(layout):
    """It would see the tokens of each rank by themselves."""
    run_ranks(2, _a_layer_is_replaced, layout)


def _a_layer_that_a_plan_leaves():
    """As a tower that each rank has as a whole."""
    mesh = mesh_of(sp=2)
    model = SmallModel().double()
    model.tower = nn.Sequential(LightningAttention(None))
    lasp.parallelize(model, mesh, plan={"tower*": lasp.adapters.token_local})
    model.tower[0] = LightningAttention(None)
    local = lasp.shard_batch({"input_ids": tokens()}, mesh)
    model(local["input_ids"], local["position_ids"])
    model.other = nn.Sequential(LightningAttention(None))
    with pytest.raises(ValueError, match=r"got 'other\.0', a LightningAttention that was put there"):
        model(local["input_ids"], local["position_ids"])


def test_a_layer_that_a_plan_leaves_may_be_replaced():
    run_ranks(2, _a_layer_that_a_plan_leaves)


# register


def _registered():
    mesh = mesh_of(sp=2)
    x = torch.randn(1, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for cls in (MyMixer, MyMixersChild):
        model = lasp.parallelize(nn.Sequential(cls(), nn.Identity()), mesh)
        assert [layer.path for layer in lasp.explain(model)] == ["0"]
        split = lasp.unshard_sequence(model(lasp.shard_sequence(x, mesh)), mesh)
        assert_close(split, cls()(x), "output")


def test_registered_classes_and_their_subclasses_are_split():
    run_ranks(2, _registered)


def _own_adapter():
    seen = []

    @lasp.register(adapter=lambda module, sequence: seen.append((module, sequence.size, sequence.name)))
    class Local(nn.Module):
        pass

    model = nn.Sequential(nn.Identity(), Local())
    lasp.parallelize(model, mesh_of(sp=2))
    assert seen == [(model[1], 2, "1")]


def test_an_adapter_of_ones_own():
    run_ranks(2, _own_adapter)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (FooAttention, "FooAttention needs a class attribute `sequence = None`"),
        (int, "cls must be a class of torch.nn.Module or its dotted name, got <class 'int'>"),
        (FooAttention(), r"cls must be a class of torch.nn.Module or its dotted name, got FooAttention\(\)"),
    ],
)
def test_classes_that_cannot_be_registered(cls, message):
    with pytest.raises(TypeError, match=message):
        lasp.register(cls)


# What it refuses


@pytest.mark.parametrize(
    "layer",
    [
        nn.MultiheadAttention(4, 1),
        nn.Conv1d(4, 4, 3),
        nn.LSTM(4, 4),
        nn.GRUCell(4, 4),
        nn.MaxPool1d(2),
        nn.BatchNorm1d(4),
        FooAttention(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_an_unknown_mixing_layer_is_refused_by_its_path(layer):
    name = type(layer).__name__
    with pytest.raises(
        ValueError, match=rf"cannot split the sequence of: extra\.layer \({name}\)(.|\n)*lasp\.register"
    ):
        lasp.parallelize(WithLayer(layer), None)
    assert lasp.parallelize(WithLayer(layer), None, strict=False)
    assert lasp.parallelize(WithLayer(layer), None, plan={"extra.*": lasp.adapters.token_local})


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(4, 4), nn.Dropout()], ids=str)
def test_layers_of_single_tokens_are_accepted(layer):
    assert lasp.parallelize(WithLayer(layer), None)


def test_a_refused_model_can_be_tried_again():
    model = WithLayer(nn.Conv1d(4, 4, 3))
    with pytest.raises(ValueError, match="cannot split"):
        lasp.parallelize(model, None)
    assert lasp.parallelize(model, None, strict=False) is model


def _a_peer_is_lost(exchange, function, phase):
    """As if the backend said so, in the middle of what `parallelize` asks of the ranks before the first step."""

    def fail(*_):
        raise RuntimeError("Connection closed by peer")

    peers = lasp.ranks.peers_of(dist.group.WORLD)
    network, peers.network = peers.network, None
    usual = getattr(cost, function)
    setattr(cost, function, fail)
    try:
        with pytest.raises(lasp.PeerError, match=f"^parallelize: {phase} failed after .*Connection closed by peer"):
            lasp.parallelize(SmallModel(), dist.group.WORLD, exchange=exchange)
    finally:
        setattr(cost, function, usual)
        peers.network = network


@pytest.mark.parametrize(
    ("exchange", "function", "phase"),
    [
        ("auto", "_pass_along", "the measurement of the network"),
        ("direct", "board_of", "setting up memory that the ranks read from each other"),
    ],
)
def test_a_peer_that_is_lost_while_the_ranks_measure_is_named(exchange, function, phase):
    run_ranks(2, _a_peer_is_lost, exchange, function, phase)


def _saved_and_loaded(kind):
    """A file of the whole model, or a pickle of it: what is loaded is on no rank until it is split again."""
    world_mesh = mesh_of(sp=2)
    alone, model = SmallModel().double(), lasp.parallelize(SmallModel().double(), world_mesh)
    local = lasp.shard_batch({"input_ids": torch.arange(7).view(1, 7)}, world_mesh)
    split = model(local["input_ids"], local["position_ids"], local["layout"])
    file = io.BytesIO()
    torch.save(model, file) if kind == "file" else pickle.dump(model, file)
    file.seek(0)
    load = functools.partial(torch.load, weights_only=False) if kind == "file" else pickle.load
    with pytest.warns(UserWarning, match="not split over ranks when it is loaded: call lasp.parallelize"):
        loaded = load(file)
    assert [m.sequence for m in loaded.modules() if isinstance(m, LightningAttention)] == [None, None]
    ids = torch.arange(7).view(1, 7)
    assert torch.equal(loaded(ids, torch.arange(7)), alone(ids, torch.arange(7)))
    lasp.parallelize(loaded, world_mesh)
    assert torch.equal(loaded(local["input_ids"], local["position_ids"], local["layout"]), split)
    for same in (copy.copy(model), copy.deepcopy(model)):  # these are of this run, and stay split
        assert torch.equal(same(local["input_ids"], local["position_ids"], local["layout"]), split)
    sequence = next(m.sequence for m in model.modules() if isinstance(m, LightningAttention))
    assert copy.copy(sequence) is copy.deepcopy(sequence) is sequence


@pytest.mark.parametrize("kind", ["file", "pickle"])
def test_a_split_model_can_be_saved_whole(kind):
    run_ranks(2, _saved_and_loaded, kind)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(2, 2)), {}, "Sequential has no layer that can be split"),
        (
            WithLayer(nn.Identity()),
            {"plan": {"inner": lasp.adapters.token_local}},
            "WithLayer has no layer that can be split",
        ),
        (
            WithLayer(nn.Identity()),
            {"plan": {"nothing.*": lasp.adapters.linear}},
            r"no layer matches the plan's \['nothing",
        ),
        (WithLayer(nn.Identity()), {"exchange": "pigeon"}, "exchange must be one of .*'ring'.*, got 'pigeon'"),
        (WithLayer(nn.Identity()), {"softmax": "ring"}, 'softmax must be "auto" or "all_gather", got \'ring\''),
        (WithLayer(nn.Identity()), {"validate": "always"}, 'validate must be "first" or "off", got \'always\''),
    ],
)
def test_bad_arguments_of_parallelize(model, options, message):
    with pytest.raises(ValueError, match=message):
        lasp.parallelize(model, None, **options)


def _odd_option(options, message):
    odd = dist.get_rank() == 1
    model = LightningAttention()
    with pytest.raises(lasp.RankMismatchError, match=f"rank 1 failed before its exchange: ValueError: {message}"):
        lasp.parallelize(model, dist.group.WORLD, **(options if odd else {}))
    lasp.parallelize(model, dist.group.WORLD)


@pytest.mark.parametrize("options", [{"exchange": "bogus"}, {"softmax": "bogus"}], ids=str)
def test_a_bad_option_on_one_rank_is_an_error_on_all(options):
    run_ranks(3, _odd_option, options, f"{next(iter(options))} must be")


def _models_differ(world):
    odd = dist.get_rank() == 1
    model = nn.Sequential(nn.Identity() if odd else LightningAttention(), LightningAttention())
    layers = r'rank 1 has layers \["1: LightningAttention"\], the others \["0: LightningAttention", "1: Light'
    with pytest.raises(lasp.RankMismatchError, match=layers):
        lasp.parallelize(model, dist.group.WORLD)
    assert all(getattr(m, "sequence", None) is None for m in model)
    total = torch.ones(())
    dist.all_reduce(total)  # the group is still usable
    assert total.item() == world


@pytest.mark.parametrize("world", [2, 3])
def test_models_that_differ_raise_on_every_rank(world):
    run_ranks(world, _models_differ, world)


# explain


def _explain():
    mesh, rank, world = mesh_of(sp=3), dist.get_rank(), 3
    model = lasp.parallelize(SmallModel(), mesh, exchange="ring")
    before = lasp.explain(model)
    assert [layer.path for layer in before] == ["blocks.0.mixer.inner", "blocks.1.mixer.inner"]
    assert {(layer.module, layer.exchange, layer.ranks) for layer in before} == {("LightningAttention", "ring", world)}
    assert [layer.bytes_per_step for layer in before] == [None, None]
    assert [(layer.adapter, layer.expected) for layer in before] == [
        ("lasp.adapters.linear", ("linear_attention",))
    ] * 2
    assert str(before).count("linear_attention  ring      3                 a state") == 2
    assert str(before).count("are known after a step") == 1
    for _ in range(2):
        logits_of(model, tokens(), mesh).sum().backward()
    head = WIDTH // HEADS
    message = 4 * 2 * HEADS * head * head  # fp32: a batch of 2, a state for each head
    network = cost.network_of(model.blocks[0].mixer.inner.sequence)
    hops = 2 if rank == 1 else 1  # the middle rank sends both ways
    for layer in lasp.explain(model):
        assert layer.exchanges == 4
        assert layer.bytes_sent == 2 * hops * message
        assert layer.bytes_per_step == hops * message
        assert (layer.schedule, layer.blocks, layer.kernels) == ("ring", 1, "reference")
        assert layer.predicted_seconds == SCHEDULES["ring"].seconds(Sizes(message, None, None, 1), world, network)
    assert f"{hops * message:,}" in str(lasp.explain(model))
    assert "after a step" not in str(lasp.explain(model))


def _explain_auto():
    model = lasp.parallelize(SmallModel(), mesh_of(sp=3))
    logits_of(model, tokens(), mesh_of(sp=3)).sum().backward()
    network = cost.network_of(model.blocks[0].mixer.inner.sequence)
    assert network.source == "measured"
    found = [(layer.exchange, layer.schedule, layer.predicted_seconds) for layer in lasp.explain(model)]
    assert all(exchange == "auto" and schedule in SCHEDULES and 0 < s < 1 for exchange, schedule, s in found)
    assert f"auto: {found[0][1]}" in str(lasp.explain(model))
    return found


def test_explain_tells_what_auto_chose_and_all_ranks_choose_alike():
    first, *others = run_ranks(3, _explain_auto)
    assert all(found == first for found in others)


def test_explain_tells_layers_and_the_bytes_that_were_sent():
    run_ranks(3, _explain)


# LightningAttention


def test_lightning_attention_keeps_its_decay_in_fp32_and_out_of_the_state():
    decay = torch.tensor([-0.1234567, -1.0])
    layer = LightningAttention(decay).to(torch.bfloat16)
    assert not layer.state_dict()
    assert not list(layer.parameters())
    assert torch.equal(layer.log_decay(torch.device("cpu")), decay)
    q = torch.randn(1, 5, 2, 3).bfloat16()
    expected, _ = lasp.linear_attention(q, q, q, log_decay=decay)
    assert torch.equal(layer(q, q, q), expected)


def test_lightning_attention_takes_a_decay_from_the_data_or_a_fixed_one():
    q, decay = torch.randn(1, 5, 2, 3), -torch.rand(1, 5, 2)
    expected, _ = lasp.linear_attention(q, q, q, log_decay=decay, scale=0.5)
    assert torch.equal(LightningAttention(scale=0.5)(q, q, q, decay), expected)
    with pytest.raises(ValueError, match="log_decay is fixed for this layer"):
        LightningAttention(torch.zeros(2))(q, q, q, decay)


def _explain_direct():
    group = dist.new_group([0, 1])
    model = lasp.parallelize(SmallModel(), group, exchange="direct")
    logits_of(model, tokens(), mesh_of(sp=2)).sum().backward()
    return [(layer.exchange, layer.schedule, 0 < layer.predicted_seconds < 1) for layer in lasp.explain(model)]


NAMES = (  # of 0.1; users rely on them
    "Env PeerError RankMismatchError SequenceParallel ShardLayout adapters assert_finite compiled decay explain "
    "grad_mesh init init_mesh linear_attention modules parallelize register shard_batch shard_sequence sync_grads "
    "token_loss unshard_sequence"
)


def test_every_name_stays():
    for name in NAMES.split():
        assert name in lasp.__all__
        assert getattr(lasp, name) is not None


class _Mixer(nn.Module):
    """Of four operators."""

    sequence = None

    def forward(self, x):
        options = {"sequence": self.sequence, "layout": lasp.ShardLayout((5, 5, 5))}
        x = lasp.causal_conv(x, torch.ones(x.shape[2], 3), **options)
        x = x.unsqueeze(2)
        beta = torch.full(x.shape[:3], 0.5)
        x = x + lasp.linear_attention(x, x, x, **options)[0] + lasp.delta_rule(x, x, x, beta, **options)[0]
        return lasp.softmax_attention(x, x, x, **options)


def _explain_operators():
    lasp.register(_Mixer)
    model = lasp.parallelize(nn.Sequential(_Mixer()), dist.group.WORLD, exchange="ring")
    x = torch.randn(1, 5, 4, requires_grad=True)
    model(x).sum().backward()
    rank, report = dist.get_rank(), lasp.explain(model)
    found = {layer.operator: (layer.exchanges, layer.schedule, layer.bytes_sent) for layer in report}
    ways = 2 if rank == 1 else 1
    assert found == {
        "halo": (2, "neighbour", ways * 4 * 2 * 4),
        "linear_attention": (2, "ring", ways * 4 * 16),
        "delta_rule": (2, "ring", ways * 4 * 16),
        "softmax_attention": (2, "all_gather", 2 * 2 * 4 * 5 * 8),
    }
    assert all(name in str(report) for name in found)


def _shift(x):
    return x.roll(1, 1)


class _Shifted(nn.Module):
    def forward(self, x):
        return x + _shift(x)


def _explain_closures():
    """An adapter that leaves no `sequence` in the layer."""

    def split(module, sequence):
        def _shift(x):
            return lasp.halo(x, 2, sequence=sequence)[:, :-1]

        lasp.adapters.rebind(module, _shift=_shift)

    model = lasp.parallelize(nn.Sequential(_Shifted(), nn.Linear(4, 4)), dist.group.WORLD, plan={"0": split})
    twin = copy.deepcopy(model)
    for split_model in (model, twin):
        [row] = lasp.explain(split_model)
        assert (row.path, row.operator, row.expected, row.exchanges) == ("0", "", ("halo",), 0)
        assert row.adapter.endswith("test_api._explain_closures.<locals>.split")
        assert "halo      auto      3                 the last tokens" in str(lasp.explain(split_model))
    model(torch.randn(1, 5, 4)).sum().backward()
    [row] = lasp.explain(model)
    assert (row.operator, row.exchanges) == ("halo", 1)


def test_explain_tells_of_layers_whose_adapter_holds_the_ranks():
    run_ranks(3, _explain_closures)


def test_explain_tells_every_operator_of_a_layer():
    run_ranks(3, _explain_operators)


def test_direct_is_measured_and_explained():
    for found in run_ranks(2, _explain_direct):
        assert found
        assert found == [("direct", "direct", True)] * len(found)
