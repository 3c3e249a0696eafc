"""`stream_backward`: gradients of a sequence in segments are those of one pass over all of it."""

import copy
import itertools
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import mesh_of, of_one_rank, run_ranks
from streamed_models import (
    HYBRID,
    LINEAR,
    SHORT,
    STATES,
    VOCABULARY,
    Conv,
    Delta,
    Elementwise,
    Grouped,
    Initial,
    Layer,
    Model,
    SharedHeads,
    Shift,
    Softmax,
    Window,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lasp
from lasp import streaming
from lasp.adapters.handles import held_by
from lasp.checks import memory
from lasp.checks.memory import bytes_of_training
from lasp.data_parallel import fsdp2, wrap_ddp, wrap_fsdp2
from lasp.models import TNL, LinearTransformer, LinearTransformerConfig, TNLConfig
from lasp.ops import recompute
from lasp.ranks import group
from lasp_kernels import softmax_pieces

TOKENS = 61
OFFSETS = (0, 7, 8, 8, 30, 31, 61)  # of packed documents; one is empty, one crosses several borders
# Tokens of all, and of a segment. 13: a border is at no document's; 5: fewer tokens than a convolution's and ranks.
SEGMENTS = ((TOKENS, 100), (TOKENS, 13), (23, 5))
BOUND = 1e-10


def batch_of(packed, tokens=TOKENS):
    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))[:, :tokens]
    if packed:
        return {"input_ids": ids[:1], "cu_seqlens": (*(x for x in OFFSETS if x < tokens), tokens)}
    labels = ids.clone()
    labels[:, 20:33] = -100  # a whole segment counts nothing
    return {"input_ids": ids, "labels": labels}


def one_pass(model, batch):
    """Loss, number of tokens and gradients of a model that is not split."""
    whole = lasp.shard_batch(batch, None)
    loss, tokens = lasp.token_loss(
        model(whole["input_ids"], whole["position_ids"], whole["layout"]), whole["labels"], mesh=None
    )
    loss.backward()
    return loss.detach(), tokens, gradients_of(model)


def gradients_of(model):
    given = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = {name: x for name, x in given.items() if x.any()}  # sync_grads gives zeros to what is not used
    model.zero_grad()
    return found


def assert_same(found, expected, bound=BOUND):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        worst = ((found[name] - x).abs().max() / x.abs().max().clamp(min=1e-30)).item()
        assert worst <= bound, (name, worst)


def pair(*layers, exchange="auto", **options):
    """A model on one rank as reference, and a copy that is split over all."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=dist.get_world_size())
    reference = Model(*layers, **options).double()
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh["sp"], exchange=exchange, strict=False)
    return reference, model, mesh


def streamed_as_one_pass(layers, packed, exchange="auto", segments=SEGMENTS):
    reference, model, mesh = pair(*layers, exchange=exchange)
    for of_all, segment in segments:
        batch = batch_of(packed, of_all)
        loss, tokens, expected = of_one_rank(one_pass, reference, batch)
        with mock.patch.object(streaming.loss, "_PART", 7 if segment == 13 else 4096):  # tokens of the loss at a time
            found = lasp.stream_backward(model, batch, mesh=mesh, segment=segment)
        assert abs(found[0] - loss) < BOUND
        assert found[1] == tokens
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected)


@pytest.mark.parametrize(("world", "packed"), [(1, True), (2, True), (3, True), (4, False)])
def test_linear_attention_of_every_decay(world, packed):
    run_ranks(world, streamed_as_one_pass, LINEAR, packed)


def published_models():
    """The library's own, as they are."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=dist.get_world_size())
    sizes = {"vocab_size": VOCABULARY, "layers": 2, "width": 16, "heads": 2}
    for make in (lambda: TNL(TNLConfig(glu_width=24, **sizes)), lambda: LinearTransformer(transformer(sizes))):
        torch.manual_seed(0)
        reference = make().double()
        model = copy.deepcopy(reference)
        lasp.parallelize(model, mesh["sp"])
        for packed, (of_all, segment) in itertools.product((False, True), ((TOKENS, 16), (23, 5))):
            batch = batch_of(packed, of_all)
            loss, _, expected = of_one_rank(one_pass, reference, batch)
            found, _ = lasp.stream_backward(model, batch, mesh=mesh, segment=segment)
            assert abs(found - loss) < BOUND
            lasp.sync_grads(model, mesh)
            assert_same(gradients_of(model), expected)


def transformer(sizes):
    return LinearTransformerConfig(mlp_width=24, **sizes)


@pytest.mark.parametrize("world", [1, 3])
def test_the_librarys_models(world):
    run_ranks(world, published_models)


@pytest.mark.parametrize(("world", "packed"), [(1, False), (2, True), (4, False)])
@pytest.mark.parametrize("layers", [(Initial,), SHORT, STATES], ids=["initial", "short", "states"])
def test_every_operator(world, layers, packed):
    run_ranks(world, streamed_as_one_pass, layers, packed)


@pytest.mark.parametrize(("world", "packed"), [(1, False), (2, True), (4, False)])
def test_softmax_layers_of_hybrids(world, packed):
    run_ranks(world, streamed_as_one_pass, HYBRID, packed)


def by_flash(world_packed):
    """The way of a GPU's kernels, with these written out."""
    called = []

    def scores_of(q, k, causal, scale):
        called.append(causal)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = scale * q @ k.mT
        if causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores, k

    def forward(q, k, v, causal, scale):
        scores, _ = scores_of(q, k, causal, scale)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    def backward(do, q, k, v, o, lse, causal, scale):
        heads = k.shape[1]
        scores, k = scores_of(q, k, causal, scale)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        weights = (scores - lse[..., None]).exp()
        of_scores = weights * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * scale
        dk, dv = of_scores.mT @ q, weights.mT @ do
        return of_scores @ k, *(x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))

    functions = {"has_flash": lambda q, piece: True, "flash_forward": forward, "flash_backward": backward}
    with mock.patch.multiple(softmax_pieces, **functions):
        streamed_as_one_pass((Softmax, Grouped, Window, SharedHeads), world_packed)
    assert set(called) == {True, False}


@pytest.mark.parametrize(("world", "packed"), [(1, True), (3, False)])
def test_softmax_layers_by_flash_kernels(world, packed):
    run_ranks(world, by_flash, packed)


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "pipeline"])
def test_every_schedule(exchange):
    run_ranks(3, streamed_as_one_pass, (*LINEAR, *STATES), True, exchange, SEGMENTS[1:2])


# Inside a segment


class Checkpointed(Model):
    reentrant = False

    def block(self, number, x, layout):
        return checkpoint(super().block, number, x, layout, use_reentrant=self.reentrant)


def recomputed_as_one_pass(packed, reentrant):
    reference, _, mesh = pair(*LINEAR, *SHORT, *STATES)
    model = Checkpointed(*LINEAR, *SHORT, *STATES).double()
    model.reentrant = reentrant
    lasp.parallelize(model, mesh["sp"], strict=False)
    batch = batch_of(packed)
    _, _, expected = one_pass(reference, batch)
    for segment in (16, 61):
        lasp.stream_backward(model, batch, mesh=mesh, segment=segment)
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_checkpoints_inside_of_segments(world, reentrant):
    run_ranks(world, recomputed_as_one_pass, world == 1, reentrant)


def calls_told_apart():
    reference, _, mesh = pair(Initial)
    model = Checkpointed(Initial).double()
    lasp.parallelize(model, mesh["sp"], strict=False)
    _, _, expected = one_pass(reference, batch_of(True))
    lasp.stream_backward(model, batch_of(True), mesh=mesh, segment=16)
    lasp.sync_grads(model, mesh)
    assert_same(gradients_of(model), expected)
    model.reentrant = True
    with pytest.raises(
        RuntimeError, match=r"linear_attention of layer 'layers.0' is called 2 times.*use_reentrant=False"
    ):
        lasp.stream_backward(model, batch_of(True), mesh=mesh, segment=16)
    assert not gradients_of(model)


@pytest.mark.parametrize("world", [1, 2])
def test_a_recompute_finds_which_of_a_layers_calls_it_repeats(world):
    run_ranks(world, calls_told_apart)


class Drop(torch.nn.Module):
    """Dropout that tells what it drew, or takes what it is told."""

    def __init__(self):
        super().__init__()
        self.drawn, self.told = [], None

    def forward(self, x):
        if self.told is not None:
            return x * self.told.pop(0)
        self.drawn.append((torch.rand_like(x) > 0.3).to(x))
        return x * self.drawn[-1]


def drawn_alike(checkpointed):
    reference, _, mesh = pair(*LINEAR, *SHORT)
    model = (Checkpointed if checkpointed else Model)(*LINEAR, *SHORT).double()
    reference.dropout, model.dropout = Drop(), Drop()
    lasp.parallelize(model, mesh["sp"], strict=False)
    batch, layers = batch_of(False), len(LINEAR + SHORT)
    torch.manual_seed(dist.get_rank())
    lasp.stream_backward(model, batch, mesh=mesh, segment=16)
    lasp.sync_grads(model, mesh)
    found, drawn = gradients_of(model), model.dropout.drawn
    swept = [drawn[i : i + layers] for i in range(0, 3 * layers, layers)]
    of_last = drawn[3 * layers : 4 * layers]
    if not checkpointed:  # the last segment, then from the third to the first as before
        again = [drawn[i : i + layers] for i in range(4 * layers, len(drawn), layers)]
        assert len(again) == 3
        for one, other in zip(swept, reversed(again)):
            assert all(map(torch.equal, one, other))
    # One pass that drops the same.
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, [*swept, of_last])
    masks = [torch.cat([x[s][i] for s in range(4) for x in of_ranks], 1)[:, :TOKENS] for i in range(layers)]
    reference.dropout.told = masks
    assert_same(found, one_pass(reference, batch)[2])
    model.dropout.drawn = []
    lasp.stream_backward(model, batch, mesh=mesh, segment=16)
    assert not torch.equal(model.dropout.drawn[0], drawn[0])  # a step draws anew


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_both_runs_of_a_segment_draw_the_same(world, checkpointed):
    run_ranks(world, drawn_alike, checkpointed)


# Data parallelism


def batches_of_replicas():
    """Of other lengths, so that replicas have other numbers of segments."""
    ids = torch.randint(VOCABULARY, (2, 1, TOKENS), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": ids[0]}, {"input_ids": ids[1, :, :29]}]


def mean_of_replicas(reference, batches):
    """Gradients of the mean over the tokens of all of them."""
    losses, tokens = [], 0
    for batch in batches:
        whole = lasp.shard_batch(batch, None)
        logits = reference(whole["input_ids"], whole["position_ids"])
        losses.append(F.cross_entropy(logits.flatten(0, 1), whole["labels"].flatten(), reduction="sum"))
        tokens += int((whole["labels"] != -100).sum())
    loss = sum(losses) / tokens
    loss.backward()
    return loss.detach(), tokens, gradients_of(reference)


def under_ddp():
    torch.set_num_threads(1)
    mesh = mesh_of(dp_shard=2, sp=2)
    replica = mesh["dp_shard"].get_local_rank()
    reference = Model(*LINEAR, *SHORT).double()
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh, strict=False)
    for p in (*model.layers[0].gates.parameters(), *model.layers[1].gates.parameters()):
        p.requires_grad_(False)  # which no forward uses
    for p in (*model.layers[2].parameters(),):
        assert p.requires_grad
    wrapped = wrap_ddp(model, mesh, find_unused_parameters=True)
    fired = []

    def hook(state, bucket):
        fired.append(bucket.index())
        group = lasp.grad_mesh(mesh).get_group()
        work = dist.all_reduce(bucket.buffer().div_(4), group=group, async_op=True)
        return work.get_future().then(lambda x: x.value()[0])

    wrapped.register_comm_hook(None, hook)
    batches = batches_of_replicas()
    loss, tokens, expected = mean_of_replicas(reference, batches)
    for _ in range(2):
        found = lasp.stream_backward(wrapped, batches[replica], mesh=mesh, segment=16)
        assert abs(found[0] - loss) < BOUND
        assert found[1] == tokens
        assert_same(gradients_of(model), expected)
        assert len(fired) == len(set(fired)), "the reducer fires once"
        fired.clear()
    # Accumulation: two steps of half the weight, averaged in the second.
    with wrapped.no_sync():
        lasp.stream_backward(wrapped, batches[replica], mesh=mesh, segment=16, loss_scale=0.5)
    assert not fired
    lasp.stream_backward(wrapped, batches[replica], mesh=mesh, segment=61, loss_scale=torch.tensor(0.5))
    assert_same(gradients_of(model), expected)


def test_ddp_averages_once():
    run_ranks(4, under_ddp)


def under_fsdp2(replicas):
    torch.set_num_threads(1)
    mesh = mesh_of(dp_replicate=replicas, dp_shard=2 // replicas, sp=2)
    replica = dist.get_rank() // 2
    reference = Model(*LINEAR[:2], *SHORT, *STATES[:2]).double()
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh, strict=False)
    wrap_fsdp2(model, mesh, blocks=[*model.layers, *model.mlps])
    counts = Counter()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for name in ("_GatherOfWeights", "_SumOfGradients"):
                setter = "set_custom_all_gather" if name.startswith("_G") else "set_custom_reduce_scatter"
                getattr(module, setter)(counted(getattr(fsdp2, name), name, counts)("first"))
    batches = batches_of_replicas()
    _, _, expected = mean_of_replicas(reference, batches)
    for _ in range(2):
        counts.clear()
        lasp.stream_backward(model, batches[replica], mesh=mesh, segment=16)
        assert_same(full_gradients_of(model), expected)
        assert counts["_GatherOfWeights"] == counts["_SumOfGradients"] == len(model.layers) * 2 + 1
    model.set_requires_gradient_sync(False)
    lasp.stream_backward(model, batches[replica], mesh=mesh, segment=16, loss_scale=0.25)
    assert all(p.grad is None for p in model.parameters())
    model.set_requires_gradient_sync(True)
    lasp.stream_backward(model, batches[replica], mesh=mesh, segment=16, loss_scale=0.75)
    assert_same(full_gradients_of(model), expected)
    # Afterwards weights are sharded again as they were.
    counts.clear()
    local = lasp.shard_batch(batches[replica], mesh)
    loss, _ = lasp.token_loss(
        model(local["input_ids"], local["position_ids"], local["layout"]), local["labels"], mesh=mesh
    )
    loss.backward()
    assert_same(full_gradients_of(model), expected)
    blocks = len(model.layers) * 2
    assert counts["_GatherOfWeights"] == 2 * blocks + 1, "the root alone keeps its weights until backward"


def counted(cls, name, counts):
    class Counted(cls):
        def __call__(self, *args, **kwargs):
            counts[name] += 1
            return super().__call__(*args, **kwargs)

    return Counted


def full_gradients_of(model):
    found = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: x for name, x in found.items() if x.any()}


@pytest.mark.parametrize("replicas", [1, 2])
def test_fsdp2_gathers_and_sums_once(replicas):
    run_ranks(4, under_fsdp2, replicas)


# What may go wrong


class Faulty(torch.nn.Module):
    """Raises in the forward, or backward, that comes after so many."""

    def __init__(self, model):
        super().__init__()
        self.model, self.left, self.backward_too = model, 10**9, False

    def forward(self, input_ids, position_ids, layout=None):
        self.left -= 1
        if self.left < 0:
            raise OSError("nothing left")
        return self.model(input_ids, position_ids, layout)


def nothing_half_done():
    _, model, mesh = pair(*LINEAR, *SHORT)
    faulty, batch = Faulty(model), batch_of(False)
    lasp.stream_backward(faulty, batch, mesh=mesh, segment=16)
    before = {name: p.grad for name, p in faulty.named_parameters()}
    content = {name: None if x is None else x.clone() for name, x in before.items()}
    for left in (0, 2, 3, 5):  # of three forwards of the sweep and four with backward
        faulty.left = left
        with pytest.raises(OSError, match="nothing left"):
            lasp.stream_backward(faulty, batch, mesh=mesh, segment=16)
        for name, p in faulty.named_parameters():
            assert p.grad is before[name]
            assert p.grad is None or torch.equal(p.grad, content[name])
    faulty.zero_grad()
    faulty.left = 5
    with pytest.raises(OSError, match="nothing left"):
        lasp.stream_backward(faulty, batch, mesh=mesh, segment=16)
    assert all(p.grad is None for p in faulty.parameters())
    faulty.left = 10**9
    lasp.stream_backward(faulty, batch, mesh=mesh, segment=16)
    for name, p in faulty.named_parameters():
        assert p.grad is None or torch.equal(p.grad, content[name]), "bits repeat"


@pytest.mark.parametrize("world", [1, 2])
def test_an_error_leaves_gradients_as_they_were(world):
    run_ranks(world, nothing_half_done)


def refused():
    group.reset()  # the first batch is compared
    _, model, mesh = pair(*LINEAR)
    batch, rank = batch_of(False), dist.get_rank()
    with pytest.raises(ValueError, match=r"model must be one that lasp.parallelize was called with"):
        lasp.stream_backward(Model(*LINEAR), batch, mesh=mesh, segment=16)
    with pytest.raises(lasp.RankMismatchError, match="rank 1 has segment 17, the others 16"):
        lasp.stream_backward(model, batch, mesh=mesh, segment=16 + (rank == 1))
    other = {**batch, "labels": batch["labels"].roll(rank, 1)}
    with pytest.raises(lasp.RankMismatchError, match="rank 1 has batch labels"):
        lasp.stream_backward(model, other, mesh=mesh, segment=16)
    with pytest.raises(lasp.RankMismatchError, match=r"rank 0 failed.*segment must be positive, got 0"):
        lasp.stream_backward(model, batch, mesh=mesh, segment=16 if rank else 0)
    with pytest.raises(ValueError, match=f"labels must be from 0 to {VOCABULARY - 1}.*got 77 on rank 0"):
        lasp.stream_backward(model, {**batch, "labels": batch["labels"].fill_(77)}, mesh=mesh, segment=16)
    assert all(p.grad is None for p in model.parameters())


def test_ranks_agree_before_anything_is_sent():
    run_ranks(2, refused)


class FinalState(Layer):
    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        o, state = lasp.linear_attention(q, k, v, output_final_state=True, layout=layout, sequence=self.sequence)
        return (o + state.sum()).flatten(-2)


lasp.register(FinalState)


def final_state_refused():
    _, model, mesh = pair(FinalState)
    with pytest.raises(ValueError, match=r"output_final_state is True in a model that lasp.stream_backward runs"):
        lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)


def test_a_state_that_is_not_there_yet():
    run_ranks(1, final_state_refused)


class Fickle(Layer):
    """Calls its operator once more, or not at all, on few tokens."""

    more = True

    def forward(self, x, layout=None):
        q, k, v = self.split(x)
        for _ in range(1 + (x.shape[1] < 14) * (1 if self.more else -1)):
            v, _ = lasp.linear_attention(q, k, v, layout=layout, sequence=self.sequence)
        return v.flatten(-2)


lasp.register(Fickle)


def fickle():
    _, model, mesh = pair(Fickle)
    with pytest.raises(RuntimeError, match=r"is called in segment 3 of lasp.stream_backward as number 1, but was not"):
        lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)
    model.layers[0].more = False
    with pytest.raises(RuntimeError, match=r"in segment 3 .* 'layers.0' was called 0 times, before 1 times"):
        lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)
    assert all(p.grad is None for p in model.parameters())


def test_an_operator_that_is_not_called_in_every_segment_alike():
    run_ranks(1, fickle)


def own_loss():
    reference, model, mesh = pair(*LINEAR, *SHORT)
    batch = batch_of(False)
    loss, tokens, expected = one_pass(reference, batch)

    def loss_fn(logits, labels):
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return total, (labels != -100).sum()

    found = lasp.stream_backward(model, batch, mesh=mesh, segment=16, loss_fn=loss_fn)
    assert abs(found[0] - loss) < BOUND
    assert found[1] == tokens
    lasp.sync_grads(model, mesh)
    assert_same(gradients_of(model), expected)
    with pytest.raises(TypeError, match="loss_fn must return the sum of the loss"):
        lasp.stream_backward(model, batch, mesh=mesh, segment=16, loss_fn=lambda output, labels: 5)
    for wrong in ("5", torch.zeros(2), torch.zeros((), device="meta"), None):
        with pytest.raises(TypeError, match=r"loss_fn must return a number of tokens, or a tensor \(\) on cpu, got"):
            lasp.stream_backward(
                model, batch, mesh=mesh, segment=16, loss_fn=lambda x, y, wrong=wrong: (x.sum(), wrong)
            )
    assert "streamed last: 61 tokens in 4 segments of" in str(lasp.explain(model))


@pytest.mark.parametrize("world", [1, 3])
def test_a_loss_of_the_callers(world):
    run_ranks(world, own_loss)


def counts_right(logits, labels):
    logits, labels = logits.flatten(0, 1), labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), (labels != -100).sum()


def miscounted():
    """Of one rank, in one segment: an error on every rank, and no gradients."""
    _, model, mesh = pair(*LINEAR, *SHORT)
    batch, rank, last = batch_of(False), dist.get_rank(), dist.get_world_size() - 1
    for wrong, told in ((1000, "1000 of"), (-3, "-3 of"), (float("nan"), "nan of")):
        for number in (0, 3):  # of the forwards; the fourth is of the last segment
            calls = []

            def loss_fn(logits, labels, wrong=wrong, number=number, calls=calls):
                calls.append(1)
                total, count = counts_right(logits, labels)
                return total, wrong if rank == last and len(calls) == number + 1 else count

            expected = rf"at most the labels that are not ignore_index -100, got {told} [0-9]+ labels on rank {last}: "
            with pytest.raises(ValueError, match=expected):
                lasp.stream_backward(model, batch, mesh=mesh, segment=16, loss_fn=loss_fn)
            assert not gradients_of(model)
    # Padding, and what ignore_index marks, does not count.
    with pytest.raises(ValueError, match=f"not ignore_index -100, got .* on rank {last}"):
        lasp.stream_backward(
            model, batch, mesh=mesh, segment=16, loss_fn=lambda x, y: (counts_right(x, y)[0], y.numel())
        )
    assert not gradients_of(model)


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_counts_more_than_there_is(world):
    run_ranks(world, miscounted)


def counted_on_a_device():
    """No copy from the host, for which it would wait for the device."""
    seen = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    total = torch.zeros((), device="meta")
    with Operations():
        for count in (5, 5.0, torch.tensor(5), torch.tensor([5])):
            found = streaming.loss._count_beside(total, count)
            assert (found.device.type, found.dtype, found.shape) == ("meta", torch.float64, ())
    assert not [x for x in seen if "_to_copy" in x or "copy_" in x], seen
    assert streaming.loss._count_beside(torch.zeros(()), torch.tensor([5])) == 5


def test_a_count_waits_for_no_device():
    run_ranks(1, counted_on_a_device)


def nothing_counts():
    """A loss_fn that leaves out what does not count, so that its sum is a plain zero there."""
    reference, model, mesh = pair(*LINEAR, *SHORT)
    batch = batch_of(False)
    batch["labels"][:, 16:49] = -100  # two whole segments
    loss, tokens, expected = one_pass(reference, batch)

    def loss_fn(logits, labels):
        counts = labels != -100
        if not counts.any():
            return torch.zeros((), dtype=logits.dtype), 0
        return F.cross_entropy(logits[counts], labels[counts], reduction="sum"), int(counts.sum())

    found = lasp.stream_backward(model, batch, mesh=mesh, segment=16, loss_fn=loss_fn)
    assert abs(found[0] - loss) < BOUND
    assert found[1] == tokens
    lasp.sync_grads(model, mesh)
    assert_same(gradients_of(model), expected)
    with pytest.raises(ValueError, match=r"loss_fn must return a sum with a gradient where tokens count, got"):
        lasp.stream_backward(model, batch, mesh=mesh, segment=16, loss_fn=lambda x, y: counts_right(x.detach(), y))
    assert not gradients_of(model)


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_without_a_graph_where_nothing_counts(world):
    run_ranks(world, nothing_counts)


def of_hidden():
    """`linear_token_loss` in a loss_fn, for a model that gives what its last layer would read."""
    reference, model, mesh = pair(*LINEAR, *SHORT)
    batch = batch_of(False)
    loss, tokens, expected = one_pass(reference, batch)
    head = model.head
    model.head = torch.nn.Identity()
    trained = {"head.weight": head.weight}

    def loss_fn(hidden, labels):
        return lasp.linear_token_loss(hidden, head.weight, labels, mesh=mesh, reduction="sum")

    found = lasp.stream_backward(model, batch, mesh=mesh, segment=16, loss_fn=loss_fn)
    assert abs(found[0] - loss) < BOUND
    assert found[1] == tokens
    model.head = head
    lasp.sync_grads(model, mesh)
    assert_same(gradients_of(model), expected)
    assert trained
    total, count = lasp.linear_token_loss(
        torch.randn(3, 4), torch.randn(5, 4), torch.tensor([1, -100, 5]), mesh=None, reduction="sum"
    )
    assert total.isnan()
    assert count == 2


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_of_what_the_last_layer_reads(world):
    run_ranks(world, of_hidden)


def compared_though_others_were():
    """A batch that `shard_batch` has cut before does not use up the first comparison."""
    group.reset()
    _, model, mesh = pair(*LINEAR)
    batch, rank = batch_of(False), dist.get_rank()
    lasp.shard_batch(batch, mesh)
    other = {**batch, "labels": batch["labels"].roll(rank, 1)}
    with pytest.raises(lasp.RankMismatchError, match="rank 1 has batch labels"):
        lasp.stream_backward(model, other, mesh=mesh, segment=16)
    lasp.stream_backward(model, batch, mesh=mesh, segment=16)
    model.zero_grad()
    group.reset()
    lasp.stream_backward(model, batch, mesh=mesh, segment=16)
    with pytest.raises(lasp.RankMismatchError, match="rank 1 has batch labels"):
        lasp.shard_batch(other, mesh)


def test_each_who_cuts_a_batch_compares_the_first():
    run_ranks(2, compared_though_others_were)


def steps_in_backward():
    """An optimizer that steps when a gradient has come would do so after each segment."""
    _, model, mesh = pair(*LINEAR)
    handle = model.head.weight.register_post_accumulate_grad_hook(lambda p: p.add_(p.grad, alpha=-0.1))
    with pytest.raises(ValueError, match=r"model must have no register_post_accumulate_grad_hook, got one at 'head.we"):
        lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)
    handle.remove()
    lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)
    _apply_optimizer_in_backward(torch.optim.SGD, model.mlps.parameters(), {"lr": 0.1})
    with pytest.raises(ValueError, match=r"model must have no optimizer in backward, got one at 'mlps.0.weight'"):
        lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)


def test_a_step_in_a_hook_of_backward_is_refused():
    run_ranks(1, steps_in_backward)


def steps_under_fsdp2():
    """FSDP2 calls such a hook itself, once its gradient is there."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=2)
    reference = Model(*LINEAR, *SHORT).double()
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh, strict=False)
    wrap_fsdp2(model, mesh, blocks=[*model.layers, *model.mlps])
    _, _, expected = one_pass(reference, batch_of(False))
    called = []
    model.head.weight.register_post_accumulate_grad_hook(lambda p: called.append(p.grad.full_tensor().clone()))
    lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)
    assert len(called) == 1
    assert_same({"head.weight": called[0]}, {"head.weight": expected["head.weight"]})


def test_hooks_that_fsdp2_calls_once():
    run_ranks(2, steps_under_fsdp2)


def error_in_the_mean(wrap):
    """Of the last message of a step: gradients are what they were, also what was accumulated."""
    _, model, mesh = pair(*LINEAR, *SHORT)
    batch = batch_of(False)
    if wrap:
        wrap_fsdp2(model, mesh, blocks=[*model.layers, *model.mlps])
    lasp.stream_backward(model, batch, mesh=mesh, segment=16)
    before = {
        name: (p.grad, None if p.grad is None else streaming._own(p.grad).clone())
        for name, p in model.named_parameters()
    }
    failing = mock.patch.object(streaming.Loss, "_over_ranks", side_effect=lasp.PeerError("gone"))
    with failing, pytest.raises(lasp.PeerError, match="gone"):
        lasp.stream_backward(model, batch, mesh=mesh, segment=16)
    for name, p in model.named_parameters():
        gradient, content = before[name]
        assert p.grad is gradient
        assert gradient is None or torch.equal(streaming._own(gradient), content)


@pytest.mark.parametrize("wrap", [False, True])
def test_an_error_in_the_last_message_leaves_gradients_as_they_were(wrap):
    run_ranks(2, error_in_the_mean, wrap)


def one_rank_is_left_as_it_was():
    """Streaming puts something into a model on one rank, and takes it out again."""
    _, model, _ = pair(*LINEAR)
    before = [dict(vars(m)) for m in model.modules()]
    lasp.stream_backward(model, batch_of(False), mesh=None, segment=16)
    assert before == [dict(vars(m)) for m in model.modules()]
    assert all(m.sequence is None for m in model.layers)


def test_one_rank_is_untouched_but_while_it_is_streamed():
    run_ranks(1, one_rank_is_left_as_it_was)


def in_bf16():
    torch.set_num_threads(1)
    mesh = mesh_of(sp=dist.get_world_size())
    model = Model(*LINEAR, *SHORT, *STATES)
    lasp.parallelize(model, mesh["sp"], strict=False)
    batch = batch_of(False)
    with torch.autocast("cpu", torch.bfloat16):
        whole, _ = lasp.stream_backward(model, batch, mesh=mesh, segment=61)
        lasp.sync_grads(model, mesh)
        of_one = gradients_of(model)
        parts, _ = lasp.stream_backward(model, batch, mesh=mesh, segment=16)
        lasp.sync_grads(model, mesh)
    found = gradients_of(model)
    assert found.keys() == of_one.keys(), "weights that autocast had cast before still get gradients"
    assert abs(whole - parts) < 0.02
    assert_same(found, of_one, 0.2)


def test_autocast_around_it():
    run_ranks(2, in_bf16)


# A segment that fits


def chosen(lengths, share):
    torch.set_num_threads(1)
    mesh = mesh_of(dp_shard=2, sp=2)
    rank = dist.get_rank()
    reference = Model(*LINEAR, *SHORT).double()
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh, strict=False)
    wrap_fsdp2(model, mesh, blocks=[*model.layers])
    batches = batches_of_replicas()
    _, _, expected = mean_of_replicas(reference, batches)
    tried = []

    def free(device, sharing):
        return 2**17 if rank == 3 else 2**40  # the rank with the least memory decides

    def of_training(parameters):
        tried.append(1)
        return bytes_of_training(parameters)

    random = torch.get_rng_state()
    settings = {"_TRIED": lengths, "_STEP": 2, "_SHARE": share}
    with mock.patch.multiple(streaming, free_bytes=free, bytes_of_training=of_training, **settings):
        lasp.stream_backward(model, batches[rank // 2], mesh=mesh, progress=rank == 0)
        assert_same(full_gradients_of(model), expected)
        lasp.stream_backward(model, batches[rank // 2], mesh=mesh)
        assert_same(full_gradients_of(model), expected)
    assert torch.equal(random, torch.get_rng_state())
    return len(tried), re.search("in [0-9]+ segments", lasp.explain(model).streamed)[0]


def test_the_rank_with_least_memory_chooses_the_segment():
    found = run_ranks(4, chosen, (3, 9), 0.85)
    assert [n for n, _ in found] == [1] * 4, "tried once"
    assert found[0][1] == found[1][1] != "in 1 segments"
    assert found[2][1] == found[3][1]


def test_what_is_short_is_one_segment():
    assert run_ranks(4, chosen, (256, 1024), 0.85) == [(0, "in 1 segments")] * 4


def tried_again():
    """What was found for one kind of step is not taken for another, nor where memory is gone since."""
    _, model, mesh = pair(*LINEAR[:1], *SHORT)
    batch, free, found = batch_of(False), [2**18], []
    kinds = [lambda: batch, lambda: {"input_ids": batch["input_ids"].repeat(4, 1)}]

    def free_now(device, sharing):
        return free[0]

    def step(make, **more):
        with mock.patch.object(streaming.StreamedModel, "_most", autospec=True, side_effect=most) as trial:
            lasp.stream_backward(model, make(), mesh=mesh, **more)
            model.zero_grad()
        found.append(int(re.search("segments of ([0-9]+);", lasp.explain(model).streamed)[1]))
        return trial.call_count

    most = streaming.StreamedModel._most
    with mock.patch.multiple(streaming, free_bytes=free_now, _TRIED=(3, 9), _STEP=2):
        assert [step(kinds[0]), step(kinds[0]), step(kinds[1]), step(kinds[1]), step(kinds[0])] == [1, 0, 1, 0, 0]
        assert found[0] == found[1] == found[4] > found[2] == found[3], "four times as many rows"
        assert step(kinds[0], loss_fn=counts_right) == 1
        model.eval()
        assert step(kinds[0]) == 1
        model.train()
        for p in model.layers[0].parameters():
            p.requires_grad_(False)
        assert step(kinds[0]) == 1
        with torch.autocast("cpu", torch.bfloat16):
            assert step(kinds[0]) == 1
        before = found[-2]
        free[0] = max(x.bytes for x in held_by(model)[0].fitting.values()) / 4
        assert [step(kinds[0]), step(kinds[0])] == [1, 0]
        assert found[-1] < before


@pytest.mark.parametrize("world", [1, 2])
def test_a_segment_that_fits_is_found_for_each_kind_of_step(world):
    run_ranks(world, tried_again)


def test_the_free_memory_of_hosts():
    """Of Linux, of a system that tells how much there is, and of one that tells nothing."""
    linux = memory.free_bytes(torch.device("cpu"), 1)
    assert 2**20 < memory.free_bytes(torch.device("cpu"), 2) < linux < 2**60
    without = {"psutil": None}
    with mock.patch.dict("sys.modules", without), mock.patch.object(memory.sys, "platform", "darwin"):
        assert abs(2 * memory.free_bytes(torch.device("cpu"), 1) - 4096 * memory.os.sysconf("SC_PHYS_PAGES")) < 2
        with (
            mock.patch.object(memory.os, "sysconf_names", {}),
            pytest.raises(
                RuntimeError, match=r"free memory of this machine is not known, on darwin: .*\(segment=...\)"
            ),
        ):
            memory.free_bytes(torch.device("cpu"), 1)
    told = mock.Mock(virtual_memory=lambda: mock.Mock(available=3000))
    with mock.patch.dict("sys.modules", psutil=told), mock.patch.object(memory.sys, "platform", "win32"):
        assert memory.free_bytes(torch.device("cpu"), 3) == 1000


# What goes around it


def compiled_as_one_pass(whole, layers):
    reference, model, mesh = pair(*layers)
    _, _, expected = one_pass(reference, batch_of(True))
    called = torch.compile(model, backend="aot_eager") if whole else model
    if not whole:
        for layer in (*model.layers, model.mlps[0]):
            layer.compile(backend="aot_eager")
    for _ in range(2):
        lasp.stream_backward(called, batch_of(True), mesh=mesh, segment=24)
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected)


@pytest.mark.parametrize(
    ("whole", "layers"), [(False, (*LINEAR[:1], Shift, Delta)), (True, (*LINEAR[:1], Conv, Elementwise))]
)
def test_compiled_graphs_end_at_the_operators(whole, layers):
    run_ranks(2, compiled_as_one_pass, whole, layers)


def trained():
    """Steps of an optimizer, before which ranks compare what they have exchanged, and whether it was finite."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=dist.get_world_size())
    losses = []
    for segment in (61, 16):
        model = Model(*LINEAR, *SHORT, *STATES).double()
        lasp.parallelize(model, mesh["sp"], strict=False, check_finite=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses.append([])
        for _ in range(4):
            loss, _ = lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=segment)
            lasp.sync_grads(model, mesh)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss))
    assert max(abs(a - b) for a, b in zip(*losses)) < 1e-9
    assert losses[0][-1] < losses[0][0]
    spoilt = Model(*LINEAR[:2]).double()
    lasp.parallelize(spoilt, mesh["sp"], strict=False, check_finite=True)
    optimizer = torch.optim.AdamW(spoilt.parameters(), lr=0.01)
    with torch.no_grad():
        spoilt.layers[1].qkv.weight.fill_(torch.nan)
    lasp.stream_backward(spoilt, batch_of(False), mesh=mesh, segment=16)
    lasp.sync_grads(spoilt, mesh)
    with pytest.raises(FloatingPointError, match=r"a state or a gradient was NaN or Inf before this step"):
        optimizer.step()


@pytest.mark.parametrize("world", [1, 2])
def test_steps_of_an_optimizer(world):
    run_ranks(world, trained)


def frozen():
    """Layers whose keys get no gradients, and adapters that are trained alone."""
    for names in (("tokens", "positions", "layers.0", "norms.0", "mlps.0"), ("tokens", "positions", "layers", "head")):
        reference, model, mesh = pair(*LINEAR, *SHORT, *STATES, *HYBRID[1:2])
        for each in (reference, model):
            for name, p in each.named_parameters():
                p.requires_grad_(not name.startswith(names))
        _, _, expected = one_pass(reference, batch_of(True))
        lasp.stream_backward(model, batch_of(True), mesh=mesh, segment=16)
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected)


@pytest.mark.parametrize("world", [1, 2])
def test_frozen_layers(world):
    run_ranks(world, frozen)


class FailsOnce(torch.nn.Module):
    """In the backward of a segment in the middle."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        if x.requires_grad and not recompute.under_way():
            self.calls += 1
            if self.calls == 2:
                x = x.clone()
                x.register_hook(self.fail)
        return x

    def fail(self, gradient):
        raise OSError("in the middle")


def error_under_fsdp2():
    torch.set_num_threads(1)
    mesh = mesh_of(sp=2)
    reference = Model(*LINEAR, *SHORT).double()
    model = Checkpointed(*LINEAR, *SHORT).double()
    model.dropout = FailsOnce()
    lasp.parallelize(model, mesh, strict=False)
    wrap_fsdp2(model, mesh, blocks=[*model.layers, *model.mlps])
    _, _, expected = one_pass(reference, batch_of(False))
    model.dropout.calls = -len(model.layers)  # the last segment is done with then
    with pytest.raises(OSError, match="in the middle"):
        lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)
    assert all(p.grad is None for p in model.parameters())
    lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)
    assert_same(full_gradients_of(model), expected)
    # What was accumulated before stays.
    model.set_requires_gradient_sync(False)
    lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16, loss_scale=0.25)
    model.set_requires_gradient_sync(True)
    model.dropout.calls = -len(model.layers)
    with pytest.raises(OSError, match="in the middle"):
        lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16)
    lasp.stream_backward(model, batch_of(False), mesh=mesh, segment=16, loss_scale=0.75)
    assert_same(full_gradients_of(model), expected)


def test_an_error_under_fsdp2_leaves_nothing_behind():
    run_ranks(2, error_under_fsdp2)


# Other threads


def in_another_thread(layers):
    """In the middle of each forward, and of each backward, another thread calls the model: it would join the stream."""
    (_, model, mesh), (_, alike, _) = pair(*layers), pair(*layers)
    batch, told = batch_of(packed=False), []
    local = lasp.shard_batch(batch, mesh)
    arguments = [local[name] for name in ("input_ids", "position_ids", "layout")]

    def call(*_):
        if threading.current_thread() is threading.main_thread():
            try:
                pool.submit(model, *arguments).result()
            except RuntimeError as error:
                told.append(str(error))

    loss, _ = lasp.stream_backward(alike, batch, mesh=mesh, segment=13)
    with ThreadPoolExecutor(1) as pool:
        model.norms[1].register_forward_hook(call)
        model.norms[1].register_full_backward_hook(call)
        found, _ = lasp.stream_backward(model, batch, mesh=mesh, segment=13)
    assert torch.equal(found, loss)
    assert_same(gradients_of(model), gradients_of(alike), 0.0)
    assert len(told) == 5 + 5 + 4  # two forwards of a segment, of the last one, and a backward
    assert {text.split(":")[0] for text in told} == {JOINED}
    with torch.no_grad():
        assert torch.equal(model(*arguments), alike(*arguments))  # and nothing is left


JOINED = (
    "the model was called while lasp.stream_backward is under way with it, in another thread, and would have gone on "
    "from a segment of it"
)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("layers", [LINEAR, SHORT, STATES, HYBRID], ids=["linear", "short", "states", "hybrid"])
def test_a_forward_in_another_thread_is_refused(world, layers):
    run_ranks(world, in_another_thread, layers)
