"""The last layer of a model that is streamed gives the loss in place of the logits, where nothing comes behind it."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks
from streamed_models import LINEAR, SHORT, VOCABULARY, WIDTH, Model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp_kernels import linear_loss

TOKENS, SEGMENT = 61, 16
BOUND = 1e-10
TAKEN = "the loss is taken in 'head', without logits"


def batch_of():
    ids = torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, 20:33] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(reference):
    whole = lasp.shard_batch(batch_of(), None)
    output = reference(whole["input_ids"], whole["position_ids"], whole["layout"])
    loss, _ = lasp.token_loss(output, whole["labels"], mesh=None)
    loss.backward()
    return loss.detach(), gradients_of(reference)


def gradients_of(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in found.items()}
    return {name: x for name, x in found.items() if x.any()}


def assert_same(found, expected, bound=BOUND):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert ((found[name] - x).abs().max() / x.abs().max()).item() <= bound, name


def pair(make, wrap=None):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=dist.get_world_size())
    reference = make().double()
    model = copy.deepcopy(reference)
    lasp.parallelize(model, mesh["sp"], strict=False)
    return reference, model, mesh


def how(model):
    return lasp.explain(model).streamed.split("; ")[-1]


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Rows(TorchDispatchMode):
    """How many rows with an entry for each word products of matrices have given at most."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in PRODUCTS and output.shape[-1] == VOCABULARY:
            self.most = max(self.most, output.numel() // VOCABULARY)
        return output


def no_logits():
    reference, model, mesh = pair(lambda: Model(*LINEAR, *SHORT))
    loss, expected = loss_and_gradients(reference)
    for call in range(2):
        with mock.patch.dict(linear_loss.TILE, cpu=3 * VOCABULARY), Rows() as rows:
            found, tokens = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        local = 2 * -(-SEGMENT // dist.get_world_size())
        assert rows.most == (3 if call else local), "the first forward finds out, in the sweep"
        assert abs(found - loss) < BOUND
        assert tokens == int((batch_of()["labels"][:, 1:] != -100).sum())
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected)
        assert how(model) == TAKEN
    # The sweep alone, over all but the last segment, makes none at all.
    with Rows() as rows, mock.patch.object(lasp.streaming.StreamedModel, "_back"), pytest.raises(AssertionError):
        lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
    assert rows.most == 0
    assert "forward" not in vars(model.head)
    assert not model._forward_hooks or dist.get_world_size() > 1


@pytest.mark.parametrize("world", [1, 3])
def test_logits_are_never_whole(world):
    run_ranks(world, no_logits)


class Bias(Model):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.head = nn.Linear(WIDTH, VOCABULARY)


class Tied(Model):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.head.weight = self.tokens.weight


class Frozen(Model):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.head.requires_grad_(False)


class CheckpointedHead(Model):
    reentrant = False

    def __init__(self, *layers):
        super().__init__(*layers)
        self.last = self._modules.pop("head")

    def head(self, x):
        return checkpoint(self.last, x, use_reentrant=self.reentrant)


class Reentrant(CheckpointedHead):
    reentrant = True


class Scaled(Model):
    factor = 0.5

    def forward(self, input_ids, position_ids, layout=None):
        return super().forward(input_ids, position_ids, layout) * self.factor


class ScaledInPlace(Model):
    def forward(self, input_ids, position_ids, layout=None):
        return super().forward(input_ids, position_ids, layout).mul_(0.5)


class Cast(Model):
    def forward(self, input_ids, position_ids, layout=None):
        return super().forward(input_ids, position_ids, layout).float()


class Twice(Model):
    def forward(self, input_ids, position_ids, layout=None):
        logits = super().forward(input_ids, position_ids, layout)
        self.head(logits.new_zeros(1, WIDTH))
        return logits


class Flat(Model):
    """Gives another view of what its last layer gives."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.last = self._modules.pop("head")

    def head(self, x):
        return self.last(x.flatten(0, 1)).view(*x.shape[:2], VOCABULARY)


class MyLinear(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class Subclass(Model):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.head = MyLinear(WIDTH, VOCABULARY)


class Hooked(Model):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.head.register_forward_hook(lambda module, args, output: output * 2)


class Patched(Model):
    """As accelerate puts its hooks around a module."""

    def __init__(self, *layers):
        super().__init__(*layers)
        weight = self.head.weight
        self.head.forward = lambda x: 2 * nn.functional.linear(x, weight)


class Blocks(Model):
    """The head is in a list."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.heads = nn.ModuleList([self._modules.pop("head")])

    def head(self, x):
        return self.heads[0](x)


MADE = "all logits of a segment are made: "
WAYS = {
    Bias: TAKEN,
    Tied: TAKEN,
    Frozen: TAKEN,
    CheckpointedHead: TAKEN.replace("head", "last"),
    Reentrant: TAKEN.replace("head", "last"),
    Scaled: MADE + "they are not what 'head' gave (but scaled, capped or cast)",
    ScaledInPlace: MADE + "they are not what 'head' gave (but scaled, capped or cast)",
    Cast: MADE + "they are not what 'head' gave (but scaled, capped or cast)",
    Flat: MADE + "they are not what 'last' gave (but scaled, capped or cast)",
    Twice: MADE + "they are of a layer that is called more than once, or not with all tokens",
    Subclass: MADE + "none outside of lists and compiled parts is a plain nn.Linear",
    Hooked: MADE + "none outside of lists and compiled parts is a plain nn.Linear",
    Patched: MADE + "none outside of lists and compiled parts is a plain nn.Linear",
    Blocks: MADE + "none outside of lists and compiled parts is a plain nn.Linear",
}


def each_way(make):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=dist.get_world_size())
    reference, model = make(*LINEAR[:2], *SHORT).double(), make(*LINEAR[:2], *SHORT).double()
    lasp.parallelize(model, mesh["sp"], strict=False)
    loss, expected = loss_and_gradients(reference)
    bound = 1e-5 if make is Cast else BOUND
    for segment in (TOKENS, SEGMENT, TOKENS):  # one segment, where the first forward that looks has a backward
        found, _ = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=segment)
        assert abs(found - loss) < bound
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected, bound)
        assert how(model) == WAYS[make]
    lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT, loss_fn=own)
    assert how(model) == MADE.replace(": ", ", for loss_fn")


def own(logits, labels):
    logits, labels = logits.flatten(0, 1), labels.flatten()
    assert logits.shape[-1] == VOCABULARY
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), (labels != -100).sum()


@pytest.mark.parametrize("make", WAYS, ids=lambda make: make.__name__)
def test_what_gives_the_logits(make):
    run_ranks(2 if make in (Tied, Scaled, Twice) else 1, each_way, make)


def other_way_on_a_rank():
    """A rank alone that makes the logits computes the same, and no other waits for it."""
    reference, model, mesh = pair(lambda: Model(*LINEAR))
    loss, expected = loss_and_gradients(reference)
    if dist.get_rank() == 1:
        model.head.register_forward_hook(lambda module, args, output: None)
    for _ in range(2):
        found, _ = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        assert abs(found - loss) < BOUND
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected)
    assert (how(model) == TAKEN) == (dist.get_rank() == 0)


def test_a_rank_that_makes_its_logits_waits_for_nobody():
    run_ranks(2, other_way_on_a_rank)


def changes():
    """What was found is looked for again when layers have changed; what is done to logits later is an error."""
    reference, model, mesh = pair(lambda: Scaled(*LINEAR))
    reference.factor = 1
    loss, expected = loss_and_gradients(reference)
    type(model).forward, before = Model.forward, type(model).forward
    try:
        lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        assert how(model) == TAKEN
        gradients_of(model)
        handle = model.head.register_forward_pre_hook(lambda module, args: None)
        lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        assert how(model) == WAYS[Hooked]
        gradients_of(model)
        handle.remove()
        lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        assert how(model) == TAKEN
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected)
    finally:
        type(model).forward = before
    with pytest.raises(RuntimeError, match="what Scaled gives is no longer what its last layer gave"):
        lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
    assert "forward" not in vars(model.head)
    assert not gradients_of(model)
    model.factor = 1
    found, _ = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
    assert how(model) == WAYS[Scaled]
    assert abs(found - loss) < BOUND
    lasp.sync_grads(model, mesh)
    assert_same(gradients_of(model), expected)


@pytest.mark.parametrize("world", [1, 2])
def test_what_changes_after_it_was_found(world):
    run_ranks(world, changes)


class Bounded(torch.autograd.Function):
    """The same numbers, and another gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e-3, 1e-3)


def by_function(model, args, logits):
    return Bounded.apply(logits)


def by_hook(model, args, logits):
    if logits.requires_grad:
        logits.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def gradient_changed(change, what):
    _, model, mesh = pair(lambda: Model(*LINEAR))
    model.register_forward_hook(change)
    for segment in (SEGMENT, SEGMENT, TOKENS):
        with pytest.raises(RuntimeError, match=f"{what} behind the last layer of Model would get the gradient"):
            lasp.stream_backward(model, batch_of(), mesh=mesh, segment=segment)
        assert not gradients_of(model)
    reference, model, mesh = pair(lambda: Model(*LINEAR))
    loss, _ = loss_and_gradients(reference)
    model.register_forward_hook(change)
    for segment in (TOKENS, SEGMENT):  # where the first forward that looks has a backward
        found, _ = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=segment)
        assert abs(found - loss) < BOUND
        assert how(model) == MADE + f"{what} stands behind 'head'"
        gradients_of(model)


def test_what_changes_the_gradient_of_logits():
    run_ranks(2, gradient_changed, by_hook, "a hook of a tensor")


def by_view(model, args, logits):
    return logits.view(*args[0].shape, VOCABULARY)  # of V numbers a token, whatever comes


def behind(change, gradients):
    reference, model, mesh = pair(lambda: Model(*LINEAR))
    for m in (reference, model):
        m.register_forward_hook(change)
    loss, expected = loss_and_gradients(reference)
    for segment in (SEGMENT, SEGMENT, TOKENS):
        found, _ = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=segment)
        assert abs(found - loss) < BOUND
        assert how(model).startswith(MADE)
        lasp.sync_grads(model, mesh)
        found = gradients_of(model)
        if gradients:
            assert_same(found, expected)


@pytest.mark.parametrize(("change", "gradients"), [(by_function, False), (by_view, True)])  # bounds scale otherwise
def test_what_stands_behind_the_last_layer_is_given_logits(change, gradients):
    run_ranks(2, behind, change, gradients)


def observed():
    """Backward hooks of the model, which put a node of PyTorch's behind it."""
    reference, model, mesh = pair(lambda: Model(*LINEAR))
    loss, expected = loss_and_gradients(reference)
    model.register_full_backward_hook(lambda module, before, after: None)
    for _ in range(2):
        found, _ = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        assert abs(found - loss) < BOUND
        lasp.sync_grads(model, mesh)
        assert_same(gradients_of(model), expected)
        assert how(model) == TAKEN


def test_backward_hooks_of_the_model():
    run_ranks(2, observed)


def averaged(wrap):
    reference, model, mesh = pair(lambda: Model(*LINEAR[:1], *SHORT))
    loss, expected = loss_and_gradients(reference)
    for name, p in model.named_parameters():
        p.requires_grad_(name in expected)  # some no forward uses
    wrapped, name = wrap(model, mesh)
    for segment in (SEGMENT, TOKENS, SEGMENT):
        found, _ = lasp.stream_backward(wrapped, batch_of(), mesh=mesh, segment=segment)
        assert abs(found - loss) < BOUND
        assert_same(gradients_of(model), expected)
        assert how(wrapped) == f"the loss is taken in {name!r}, without logits"


def hook_of_ddp():
    """It changes what the model gave, after the model itself."""
    reference, model, mesh = pair(lambda: Model(*LINEAR))
    reference.register_forward_hook(lambda module, args, logits: logits / 2)
    loss, expected = loss_and_gradients(reference)
    for name, p in model.named_parameters():
        p.requires_grad_(name in expected)  # some no forward uses
    wrapped = wrap_ddp(model, mesh)
    handle = wrapped.register_forward_hook(lambda module, args, logits: logits / 2)
    for _ in range(2):
        found, _ = lasp.stream_backward(wrapped, batch_of(), mesh=mesh, segment=SEGMENT)
        assert abs(found - loss) < BOUND
        assert_same(gradients_of(model), expected)
        assert how(wrapped) == MADE + "DistributedDataParallel around the model has hooks"
    handle.remove()
    lasp.stream_backward(wrapped, batch_of(), mesh=mesh, segment=SEGMENT)
    assert how(wrapped) == "the loss is taken in 'module.head', without logits"


def test_a_hook_of_what_is_around_the_model():
    run_ranks(2, hook_of_ddp)


def by_ddp(model, mesh):
    return wrap_ddp(model, mesh), "module.head"


def by_ddp_that_looks_for_unused(model, mesh):
    return wrap_ddp(model, mesh, find_unused_parameters=True), "module.head"


def by_fsdp2(model, mesh):
    return wrap_fsdp2(model, mesh, blocks=[*model.layers, *model.mlps]), "head"


@pytest.mark.parametrize("wrap", [by_ddp, by_ddp_that_looks_for_unused, by_fsdp2])
def test_gradients_that_others_average(wrap):
    run_ranks(2, averaged, wrap)


def sharded_head():
    """FSDP2 shards the head on its own."""
    reference, model, mesh = pair(lambda: Model(*LINEAR[:1]))
    loss, expected = loss_and_gradients(reference)
    wrap_fsdp2(model, mesh, blocks=[*model.layers, model.head])
    for _ in range(2):
        found, _ = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        assert abs(found - loss) < BOUND
        assert_same(gradients_of(model), expected)
        assert how(model) == WAYS[Hooked]


def test_a_head_that_is_sharded_on_its_own():
    run_ranks(2, sharded_head)


def in_bf16():
    """Under autocast, where the layer casts, both ways round alike."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=dist.get_world_size())
    found = []
    for make in (Model, Hooked):
        model = make(*LINEAR[:1], *SHORT)
        model.head._forward_hooks.clear()
        if make is Hooked:
            model.head.register_forward_hook(lambda module, args, output: None)
        lasp.parallelize(model, mesh["sp"], strict=False)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                model.zero_grad()
                loss, _ = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        assert loss.dtype == torch.float32
        lasp.sync_grads(model, mesh)
        assert (how(model) == TAKEN) == (make is Model)
        found.append((loss, gradients_of(model)))
    assert abs(found[0][0] - found[1][0]) < 1e-5
    assert_same(found[0][1], found[1][1], 0.05)


def test_autocast():
    run_ranks(2, in_bf16)


def wrong_label():
    _, model, mesh = pair(lambda: Model(*LINEAR[:1]))
    bad = batch_of()
    bad["labels"][1, 40] = VOCABULARY
    for _ in range(2):
        with pytest.raises(ValueError, match=f"labels must be from 0 to {VOCABULARY - 1}.*got {VOCABULARY} on rank 1"):
            lasp.stream_backward(model, bad, mesh=mesh, segment=TOKENS)
        assert not gradients_of(model)
        lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        assert how(model) == TAKEN
        model.zero_grad()


def test_a_label_outside_of_the_vocabulary():
    run_ranks(2, wrong_label)


def in_training_after_an_evaluation():
    _, model, mesh = pair(lambda: Model(*LINEAR))
    model.register_forward_hook(lambda m, args, logits: torch.dropout(logits, 0.5, m.training))
    for training in (False, True, True, False):
        model.train(training)
        loss, _ = lasp.stream_backward(model, batch_of(), mesh=mesh, segment=SEGMENT)
        assert loss.isfinite()
        assert (how(model) == TAKEN) is not training
        gradients_of(model)


def test_what_is_only_in_training_is_looked_for_then():
    run_ranks(2, in_training_after_an_evaluation)
