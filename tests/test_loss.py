"""`lasp.token_loss`: the mean over the tokens of all ranks, equal on every rank, with the exact gradient."""

import copy
import functools
import pickle
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from inputs import assert_close
from ranks import mesh_of, run_ranks
from small_model import SmallModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import lasp
from lasp import ranks
from lasp.data_parallel import wrap_ddp, wrap_fsdp2

VOCABULARY = 7
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def batch(counted, tokens, ignore_index):
    """Logits and labels of all ranks; rank r has tokens[r] tokens and the first counted[r] of them count."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = [], []
    for count, T in zip(counted, tokens):
        logits.append(torch.randn(2, T, VOCABULARY, generator=draw))
        label = torch.randint(1, VOCABULARY, (2, T), generator=draw)
        label[:, count:] = ignore_index
        labels.append(label)
    return logits, labels


def _equals_serial_mean(counted, tokens, ignore_index):
    rank, world = dist.get_rank(), dist.get_world_size()
    logits, labels = batch(counted, tokens, ignore_index)
    weight = torch.ones(VOCABULARY, requires_grad=True)  # a parameter that all ranks share
    whole = torch.cat([x.flatten(0, 1) for x in logits]) * weight
    serial = F.cross_entropy(whole, torch.cat([x.flatten() for x in labels]), ignore_index=ignore_index)
    (expected,) = torch.autograd.grad(serial, weight)

    mine = logits[rank].clone().requires_grad_()
    loss, count = lasp.token_loss(mine * weight, labels[rank], mesh=dist.group.WORLD, ignore_index=ignore_index)
    loss.backward()
    assert count.dtype == torch.int64
    assert count.item() == 2 * sum(counted)
    assert_close(loss, serial, "loss", **CLOSE)
    assert not mine.grad.isnan().any()
    dist.all_reduce(weight.grad)
    assert_close(weight.grad / world, expected, "gradient averaged over ranks", **CLOSE)
    return loss.item()


@pytest.mark.parametrize("ignore_index", [-100, 0])
@pytest.mark.parametrize(
    ("counted", "tokens"),
    [
        ((5,), (5,)),
        ((5, 1), (5, 5)),
        ((0, 3), (4, 4)),
        ((3, 0), (4, 0)),
        ((1, 0, 7), (3, 3, 8)),
        ((2, 2, 2, 2), (2, 2, 2, 2)),
    ],
)
def test_equals_the_serial_mean_on_every_rank(counted, tokens, ignore_index):
    losses = run_ranks(len(counted), _equals_serial_mean, counted, tokens, ignore_index)
    assert len(set(losses)) == 1


def _micro_batches(linear):
    """Of a step, with unequal numbers of tokens on every rank, against one process with all of them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [batch(counted, tokens, -100) for counted, tokens in (((5, 1), (5, 3)), ((0, 7), (1, 9)), ((3, 0), (3, 0)))]
    total = sum(int((x != -100).sum()) for _, labels in parts for x in labels)
    weight = torch.ones(VOCABULARY, requires_grad=True)
    head = torch.eye(VOCABULARY, requires_grad=True)
    added = 0
    for logits, labels in parts:
        mine = (logits[rank] * weight, labels[rank])
        if linear:
            mine = (mine[0], head, mine[1])
        loss_of = lasp.linear_token_loss if linear else lasp.token_loss
        loss, _ = loss_of(*mine, mesh=dist.group.WORLD, total_tokens=total)
        loss.backward()
        added += loss.detach()
    dist.all_reduce(weight.grad)
    whole = [torch.cat([x.flatten(0, 1) for part in parts for x in part[place]]) for place in (0, 1)]
    serial = F.cross_entropy(whole[0] * (one := torch.ones(VOCABULARY, requires_grad=True)), whole[1])
    serial.backward()
    assert_close(added, serial, "loss", **CLOSE)
    assert_close(weight.grad / world, one.grad, "gradient averaged over ranks", **CLOSE)
    with pytest.raises(lasp.RankMismatchError, match=r"rank 1 has .*, total_tokens 8, the others .*, total_tokens 7"):
        lasp.token_loss(logits[rank], labels[rank], mesh=dist.group.WORLD, total_tokens=7 + rank)
    with pytest.raises(ValueError, match="total_tokens must be those of all micro-batches, got 5, and these are 6"):
        lasp.token_loss(logits[rank], labels[rank], mesh=dist.group.WORLD, total_tokens=5)


@pytest.mark.parametrize("linear", [False, True])
def test_micro_batches_with_unequal_numbers_of_tokens(linear):
    run_ranks(2, _micro_batches, linear)


USUAL = {"vocabulary": VOCABULARY, "ignore_index": -100, "total_tokens": 2**62}
OTHERS = [("vocabulary", VOCABULARY + 4093), ("ignore_index", -100 + 4093), ("total_tokens", None)]
OTHERS += [("total_tokens", 2**62 + more) for more in (1, 4093, 4093**2, 2**32, 2**53)]  # in fp64 some are the same


def _other_numbers(linear):
    """By whatever they differ: a checksum does not see some, and fp64 not others."""
    rank = dist.get_rank()

    def loss(vocabulary, **numbers):
        mine, labels = torch.zeros(4, vocabulary), torch.zeros(4, dtype=torch.int64)
        loss_of = functools.partial(lasp.linear_token_loss, mine[:, :2], mine.T[:, :2]) if linear else None
        loss_of = loss_of or functools.partial(lasp.token_loss, mine)
        return loss_of(labels, mesh=dist.group.WORLD, **numbers)[0]

    def told(vocabulary, ignore_index, total_tokens):
        return f"vocabulary {vocabulary} and ignore_index {ignore_index}" + (
            f", total_tokens {total_tokens}" if total_tokens else ""
        )

    assert loss(**USUAL).item() > 0
    for name, other in OTHERS:
        numbers = USUAL | {name: other}
        with pytest.raises(lasp.RankMismatchError) as caught:
            loss(**numbers if rank == 0 else USUAL)
        assert str(caught.value).endswith(f": rank 0 has {told(**numbers)}, the others {told(**USUAL)}")


@pytest.mark.parametrize("linear", [False, True])
def test_ranks_that_have_another_number(linear):
    run_ranks(3, _other_numbers, linear)


def _fp64():
    """What checks a split in fp64 needs a loss and gradients that are exact to fp64, at a count that fp32 rounds."""
    rank, draw = dist.get_rank(), torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, VOCABULARY, generator=draw, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (3, 5), generator=draw)
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), labels.flatten())
    expected.backward()
    mine = logits[rank].clone().requires_grad_()
    loss, _ = lasp.token_loss(mine, labels[rank], mesh=dist.group.WORLD)
    loss.backward()
    assert loss.dtype == torch.float64
    assert_close(loss, expected, "loss", rtol=1e-14, atol=0.0)
    assert_close(mine.grad / 3, whole.grad[rank], "gradient", rtol=1e-13, atol=1e-16)


def test_fp64_logits_have_a_loss_in_fp64():
    run_ranks(3, _fp64)


def _all_masked():
    logits = torch.randn(1, 3, VOCABULARY, requires_grad=True)
    loss, count = lasp.token_loss(logits, torch.full((1, 3), -100), mesh=dist.group.WORLD)
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("world", [1, 2])
def test_no_token_anywhere_is_zero_and_not_nan(world):
    run_ranks(world, _all_masked)


def _penalty():
    """Each rank has the gradient of its own tokens, times the ranks: its square is not that of the whole."""
    logits = torch.randn(2, 3, VOCABULARY, requires_grad=True)
    labels = torch.randint(VOCABULARY, (2, 3))
    loss, _ = lasp.token_loss(logits, labels, mesh=dist.group.WORLD)
    with pytest.raises(RuntimeError, match="token_loss over several ranks has no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_a_penalty_of_gradients_is_refused_over_ranks():
    run_ranks(2, _penalty)
    logits = torch.randn(2, 3, VOCABULARY, requires_grad=True)
    loss, _ = lasp.token_loss(logits, torch.randint(VOCABULARY, (2, 3)), mesh=None)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    gradient.square().sum().backward()
    assert logits.grad is not None


def _over_dp_and_sp():
    mesh = mesh_of(sp=2)
    logits = torch.randn(1, 3, VOCABULARY, generator=torch.Generator().manual_seed(dist.get_rank()))
    labels = torch.tensor([[1, 2, 3]])
    labels[:, dist.get_rank() :] = -100  # 0, 1, 2 and 3 tokens
    loss, count = lasp.token_loss(logits, labels, mesh=mesh)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    dist.all_reduce(total)
    assert count.item() == 6
    assert_close(loss, total / 6, "loss", **CLOSE)


def test_the_mean_is_over_dp_and_sp():
    run_ranks(4, _over_dp_and_sp)


def test_without_ranks_it_is_cross_entropy_in_fp32():
    logits = torch.randn(2, 5, VOCABULARY, dtype=torch.bfloat16)
    labels = torch.randint(VOCABULARY, (2, 5))
    loss, count = lasp.token_loss(logits, labels, mesh=None)
    assert loss.dtype == torch.float32
    assert_close(loss, F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()), "loss", **CLOSE)
    assert count.item() == 10


def test_scaled_loss_scales_the_gradient():
    """Gradient accumulation divides the loss by the number of micro-batches."""
    logits = torch.randn(1, 4, VOCABULARY)
    labels = torch.randint(VOCABULARY, (1, 4))
    found = []
    for factor in (1.0, 0.25):
        x = logits.clone().requires_grad_()
        (lasp.token_loss(x, labels, mesh=None)[0] * factor).backward()
        found.append(x.grad)
    assert_close(found[1], found[0] * 0.25, "gradient", **CLOSE)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"logits \(1, 3, 7\) and labels \(1, 4\) must agree but for the last"):
        lasp.token_loss(torch.zeros(1, 3, 7), torch.zeros(1, 4, dtype=torch.int64), mesh=None)


# Labels and dtypes that are no good, and those that are taken


def _outside(value, world):
    logits, labels = torch.zeros(1, 3, VOCABULARY, requires_grad=True), torch.tensor([[1, 2, -100]])
    if dist.get_rank() == world - 1:
        labels[0, 1] = value
    where = f" on rank {world - 1}" if world > 1 else ""
    with pytest.raises(ValueError, match="labels must be") as caught:
        lasp.token_loss(logits, labels, mesh=dist.group.WORLD)
    assert str(caught.value) == (
        f"labels must be from 0 to {VOCABULARY - 1}, or ignore_index -100, got {value}{where} (1 such)"
    )
    loss, count = lasp.token_loss(logits, torch.tensor([[1, 2, -100]]), mesh=dist.group.WORLD)  # the group works on
    assert count.item() == 2 * world
    assert_close(loss, torch.tensor(VOCABULARY).log(), "loss", **CLOSE)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("value", [VOCABULARY, -1, 2**40])
def test_a_label_outside_the_vocabulary_is_an_error_on_every_rank(value, world):
    run_ranks(world, _outside, value, world)


def _other_options():
    rank, world = dist.get_rank(), dist.get_world_size()
    odd = rank == world - 1
    labels, mesh = torch.tensor([[1, 2, 3]]), dist.group.WORLD
    logits = torch.randn(1, 3, VOCABULARY, requires_grad=True)
    for width, ignored in ((VOCABULARY, 3), (VOCABULARY, -1), (VOCABULARY - 1, -100)):
        mine = {"mesh": mesh, "ignore_index": ignored if odd else -100}
        with pytest.raises(lasp.RankMismatchError) as caught:
            lasp.token_loss(logits[..., : width if odd else VOCABULARY], labels, **mine)
        assert str(caught.value) == (
            f"token_loss: rank {world - 1} has vocabulary {width} and ignore_index {ignored}, "
            f"the others vocabulary {VOCABULARY} and ignore_index -100"
        )
    loss, _ = lasp.token_loss(logits, labels, mesh=mesh, ignore_index=3)  # the group works on
    loss.backward()
    assert logits.grad.isfinite().all()
    in_graph = torch.compile(lasp.token_loss, backend="aot_eager", fullgraph=True)
    assert in_graph(logits, labels, mesh=mesh, ignore_index=3)[0].isfinite()
    assert in_graph(logits, labels, mesh=mesh, ignore_index=3 if odd else -100)[0].isnan()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_ignore_another_label_or_have_another_vocabulary(world):
    run_ranks(world, _other_options)


def _outside_where_the_host_must_not_wait():
    """As on a GPU, whose host would have to wait for the labels: a graph does so as little."""
    loss_of = functools.partial(lasp.token_loss, mesh=dist.group.WORLD)
    loss_of = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    for value in (3, VOCABULARY, -7):
        logits = torch.randn(1, 3, VOCABULARY, requires_grad=True)
        labels = torch.tensor([[1, value if dist.get_rank() == 1 else 2, -100]])
        loss, _ = loss_of(logits, labels)
        loss.backward()
        assert bool(loss.isnan()) == bool(logits.grad.isnan().any()) == (value != 3)


def test_where_the_host_must_not_wait_such_a_label_makes_all_ranks_nan():
    run_ranks(2, _outside_where_the_host_must_not_wait)


MESHES = {
    "of init_mesh": lambda: mesh_of(sp=3),
    "sp of init_mesh": lambda: mesh_of(sp=3)["sp"],
    "a group that lasp has not seen": lambda: dist.new_group([0, 1, 2]),
    "of PyTorch": lambda: init_device_mesh("cpu", (3,)),
}


def _in_a_graph(kind):
    torch._dynamo.reset()
    mesh, rank = MESHES[kind](), dist.get_rank()
    in_graph = torch.compile(functools.partial(lasp.token_loss, mesh=mesh), backend="aot_eager", fullgraph=True)
    logits, labels = batch((2, 0, 5), (3, 4, 7), -100)
    found, expected = (logits[rank].clone().requires_grad_() for _ in range(2))
    loss, tokens = in_graph(found, labels[rank])
    loss.backward()
    eager, _ = lasp.token_loss(expected, labels[rank], mesh=mesh)
    eager.backward()
    assert tokens.item() == 14
    assert_close(loss, eager, "loss", **CLOSE)
    assert_close(found.grad, expected.grad, "gradient", **CLOSE)


@pytest.mark.parametrize("kind", MESHES)
def test_in_a_graph_over_any_mesh(kind):
    run_ranks(3, _in_a_graph, kind)


def _mean_in_fp64():
    draw = torch.Generator().manual_seed(dist.get_rank())
    logits = torch.randn(1, 5, VOCABULARY, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (1, 5), generator=draw)
    loss, _ = lasp.token_loss(logits, labels, mesh=dist.group.WORLD)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(total, logits, retain_graph=True)
    total = total.detach()
    dist.all_reduce(total)
    world = dist.get_world_size()
    assert loss.dtype == torch.float64
    assert_close(loss, total / (5 * world), "loss", rtol=1e-14, atol=0)
    loss.backward()
    assert_close(logits.grad, expected / 5, "gradient", rtol=1e-14, atol=1e-16)


def test_fp64_stays_fp64():
    run_ranks(2, _mean_in_fp64)


def _two_dtypes():
    """One rank in bf16, the other in fp64: their messages are alike all the same."""
    dtype = (torch.bfloat16, torch.float64)[dist.get_rank()]
    loss, count = lasp.token_loss(
        torch.zeros(1, 2, VOCABULARY, dtype=dtype), torch.tensor([[1, 2]]), mesh=dist.group.WORLD
    )
    assert count.item() == 4
    assert_close(loss.double(), torch.tensor(VOCABULARY).double().log(), "loss", rtol=1e-6)


def test_ranks_whose_logits_differ_in_dtype():
    run_ranks(2, _two_dtypes)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_labels_of_any_signed_integers(dtype):
    logits, labels = torch.randn(1, 3, VOCABULARY), torch.tensor([[1, -100, 6]])
    found, expected = (lasp.token_loss(logits, x, mesh=None) for x in (labels.to(dtype), labels))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


# A mean that would leave out ranks of the sequence


class Recast(nn.Module):
    """A model whose logits come in another form."""

    def __init__(self, model, form):
        super().__init__()
        self.model, self.form = model, form

    def forward(self, *args):
        return self.form(self.model(*args))


USES = {
    "as it is": lambda x: x,
    "in fp32": lambda x: x.float(),
    "in bf16": lambda x: x.bfloat16(),
    "flattened": lambda x: x.flatten(0, 1),
    "of an object": lambda x: {"logits": x, "loss": None},
}


def _without_ranks(use, training):
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh, whole = mesh_of(dp_shard=world // 2, sp=2), SmallModel()
    model = lasp.parallelize(Recast(SmallModel(), USES[use if use == "of an object" else "as it is"]), mesh)
    batch = {"input_ids": torch.arange(11).view(1, 11) % 5}
    local = lasp.shard_batch(batch, mesh, pad=False)
    for called in (model, copy.deepcopy(model)):
        with torch.set_grad_enabled(training):
            logits = called(local["input_ids"], local["position_ids"])
        logits = logits["logits"] if use == "of an object" else USES[use](logits)
        labels = local["labels"].flatten() if use == "flattened" else local["labels"]
        for wrong in (None, mesh["dp_shard"]) if world > 2 else (None,):
            with pytest.raises(
                ValueError, match=r"mesh must hold all ranks of the sequence, \(\d, \d\), .* got "
            ) as raised:
                lasp.token_loss(logits, labels, mesh=wrong)
            assert re.search(rf"of the ranks \((\d, )?{rank}(, \d|,)?\)", str(raised.value))
        for right in (mesh, mesh["sp"], mesh["sp"].get_group()):
            assert lasp.token_loss(logits, labels, mesh=right)[0].isfinite()
    # What is right, between the forward of a split model and its step
    ids, positions = batch["input_ids"], torch.arange(11).view(1, 11)
    assert lasp.token_loss(whole(ids, positions), ids, mesh=None)[0].isfinite()
    gathered = model(local["input_ids"], local["position_ids"])
    gathered = lasp.unshard_sequence(gathered["logits"] if use == "of an object" else gathered, mesh)
    assert lasp.token_loss(gathered, ids, mesh=None)[0].isfinite()
    if use == "as it is":
        with ranks.alone():
            assert lasp.token_loss(model(ids, positions), ids, mesh=None)[0].isfinite()
    with pytest.warns(UserWarning, match="not split over ranks when it is loaded"):
        loaded = pickle.loads(pickle.dumps(model.model))
    assert lasp.token_loss(loaded(ids, positions), ids, mesh=None)[0].isfinite()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("world", [2, 4])
def test_the_loss_of_a_split_model_without_its_ranks_is_an_error(world, use):
    run_ranks(world, _without_ranks, use, True)


@pytest.mark.parametrize("use", ["as it is", "flattened", "of an object"])
def test_and_in_evaluation(use):
    run_ranks(2, _without_ranks, use, False)


def _wrapped(compiled):
    mesh = mesh_of(sp=2)
    ids = torch.arange(11).view(1, 11) % 5
    local = lasp.shard_batch({"input_ids": ids}, mesh)
    for wrap in (wrap_ddp, wrap_fsdp2):
        model = lasp.parallelize(SmallModel(), mesh)
        for block in model.blocks if compiled else ():
            block.compile(backend="aot_eager")
        logits = wrap(model, mesh)(local["input_ids"], local["position_ids"])
        with pytest.raises(ValueError, match="mesh must hold all ranks of the sequence"):
            lasp.token_loss(logits, local["labels"], mesh=None)
        lasp.token_loss(logits, local["labels"], mesh=mesh)[0].backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_loss_of_a_wrapped_model_without_its_ranks_is_an_error(compiled):
    run_ranks(2, _wrapped, compiled)
