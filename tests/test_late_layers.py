"""Modules that come into a model after `parallelize`: what mixes tokens is refused, on every rank; others pass."""

import concurrent.futures
import contextlib
import copy
import functools
import re
import threading
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import foreign
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import mesh_of, run_ranks
from small_model import VOCABULARY, WIDTH, SmallModel
from torch import nn
from torch.ao.quantization.quantize import _register_activation_post_process_hook
from torch.distributed._tools.mod_tracker import ModTracker
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import prune

import lasp
from lasp.adapters import handles
from lasp.checks import hooks, trial


class Cumulates(nn.Module):
    def forward(self, x):
        return x + x.cumsum(1)


class Convolves(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x):
        return self.conv(x.mT)[..., : x.shape[1]].mT


class Attends(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class WithoutRanks(nn.Module):
    def forward(self, x):
        return lasp.linear_attention(*[x.unsqueeze(2)] * 3)[0].squeeze(2)


MIXERS = {"cumsum": Cumulates, "conv": Convolves, "sdpa": Attends, "no ranks": WithoutRanks}


class Lora(nn.Module):
    """As PEFT puts it around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a = base, nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Int8(nn.Module):
    """A linear layer whose weights are integers, times a number a row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def tokens(T=26):
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(0))


def inputs_of(mesh, layout=True):
    local = lasp.shard_batch({"input_ids": tokens()}, mesh, pad=False)
    return local["input_ids"], local["position_ids"], *((local["layout"],) if layout else ())


def split_model(mesh, **options):
    return lasp.parallelize(SmallModel().double(), mesh, **options)


def assert_refused(call, name):
    """And on one rank alone: nothing was sent before."""
    told = r"model must have the layers that lasp.parallelize was called with[^\n]* cannot split the sequence of: "
    for repeat in (True, True, dist.get_rank() == 0):
        if repeat:
            with pytest.raises(ValueError, match=told + name):
                call()


def assert_same_logits(model, alone, mesh):
    with torch.no_grad():
        whole = lasp.unshard_sequence(model(*inputs_of(mesh)), mesh)
        torch.testing.assert_close(whole, alone(*inputs_of(None)))


# What is refused


def _refused(kind, layout):
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    before = model.blocks[1].mlp
    model.blocks[1].mlp = nn.Sequential(before, MIXERS[kind]().double())
    name = r"blocks\.1\.mlp\.1" + (r"(\.conv)? \(Conv" if kind == "conv" else rf" \({MIXERS[kind].__name__}")
    assert_refused(lambda: model(*inputs_of(mesh, layout)), name)
    model.blocks[1].mlp = before
    assert_same_logits(model, SmallModel().double(), mesh)


@pytest.mark.parametrize("layout", [False, True])
@pytest.mark.parametrize("kind", MIXERS)
def test_a_layer_that_mixes_tokens_and_that_nobody_registered(kind, layout):
    run_ranks(2, _refused, kind, layout)


def _patched(where):
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    norm = model.blocks[0].norm

    def forward(self, x):
        return nn.LayerNorm.forward(self, x).cumsum(1)

    class Cumulating(nn.LayerNorm):
        pass

    Cumulating.forward = forward
    if where == "instance":
        norm.forward = types.MethodType(forward, norm)
    elif where == "partial":
        norm.forward = functools.partial(forward, norm)
    else:
        norm.__class__ = Cumulating
    assert_refused(lambda: model(*inputs_of(mesh)), r"blocks\.0\.norm \(")


@pytest.mark.parametrize("where", ["instance", "partial", "class"])
def test_a_forward_that_was_replaced_by_one_that_mixes_tokens(where):
    run_ranks(2, _patched, where)


def _registered_layer_patched():
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    layer = model.blocks[0].mixer.inner
    layer.forward = lambda q, k, v, layout=None: lasp.linear_attention(q, k, v, scale=0.5)[0]
    assert_refused(lambda: model(*inputs_of(mesh)), r"blocks\.0\.mixer\.inner \(LightningAttention\): it calls lasp.li")


def test_a_registered_layer_whose_forward_was_replaced():
    run_ranks(2, _registered_layer_patched)


def _adapted_layer_patched(kind):
    """Attention of a library, in whose forward `parallelize` has put an operator of lasp."""
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(foreign.build(kind), mesh)
    layer = next(m for m in model.modules() if "forward" in vars(m))
    given, local = layer.forward, lasp.shard_batch({"input_ids": tokens()}, mesh, pad=False)

    def around(*args, **kwargs):
        return given(*args, **kwargs)

    def around_attribute(self, *args, **kwargs):  # as accelerate's hooks of old, and many patches
        return self.given(*args, **kwargs)

    layer.given = given
    bound = types.MethodType(around_attribute, layer)

    def call():
        return model(local["input_ids"], layout=local["layout"]).logits

    expected = call()
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, given, use_reentrant=False)
    for same in (around, bound, functools.partial(around_attribute, layer), checkpointed, given):
        layer.forward = same
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it was asked
            torch.testing.assert_close(call(), expected)
    told = r"model must have the layers .*whose forward is no longer the one that lasp.parallelize put there"
    for other in (functools.partial(type(layer).forward, layer), None):
        del layer.forward
        if other is not None:
            layer.forward = other
        with pytest.raises(ValueError, match=told):
            call()


@pytest.mark.parametrize("kind", ["bamba", "lfm2", "minimax"])
def test_the_forward_of_an_adapter_that_was_replaced(kind):
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    run_ranks(2, _adapted_layer_patched, kind)


def _within_a_stream():
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Cumulates())
    for call in (
        lambda: lasp.prefill(model, tokens(), mesh),
        lambda: lasp.stream_backward(model, {"input_ids": tokens()}, mesh=mesh, segment=8),
    ):
        with pytest.raises(ValueError, match=r"cannot split the sequence of: blocks\.1\.mlp\.1 \(Cumulates"):
            call()


def test_in_a_stream_and_in_generation():
    run_ranks(2, _within_a_stream)


def test_on_one_rank_in_a_stream():
    model = lasp.parallelize(SmallModel().double(), None)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Cumulates())
    with pytest.raises(ValueError, match=r"cannot split the sequence of: blocks\.1\.mlp\.1 \(Cumulates"):
        lasp.stream_backward(model, {"input_ids": tokens()}, mesh=None, segment=8)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp[0], nn.Dropout(0.0))
    lasp.stream_backward(model, {"input_ids": tokens()}, mesh=None, segment=8)


def _sharded():
    """Such a model cannot be tried as a whole: no rank has its weights. What came into it can."""
    mesh = mesh_of(sp=2)
    axis = lasp.grad_mesh(mesh)
    for kind in ("cumsum", "sdpa", "no ranks", "conv"):
        model = split_model(mesh)
        fully_shard(model, mesh=axis)
        kept = model.blocks[1].mlp
        model.blocks[1].mlp = nn.Sequential(kept, MIXERS[kind]().double())
        assert_refused(lambda model=model: model(*inputs_of(mesh)), r"blocks\.1\.mlp\.1")
        model.reshard()  # which FSDP2 does behind a forward
        model.blocks[1].mlp = nn.Sequential(kept, nn.Dropout(0.0))
        assert_same_logits(model, SmallModel().double(), mesh)


def test_in_a_model_of_fsdp2():
    run_ranks(2, _sharded)


def _before_fsdp2():
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Convolves().double())
    assert_refused(lambda: lasp.data_parallel.wrap_fsdp2(model, mesh), r"blocks\.1\.mlp\.1")


def test_before_its_weights_are_sharded():
    run_ranks(2, _before_fsdp2)


def _compiled():
    """A forward that is compiled as a whole asks nothing; the step of its optimizer does."""
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Cumulates())
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    compiled(*inputs_of(mesh)).sum().backward()
    with pytest.raises(ValueError, match=r"cannot split the sequence of: blocks\.1\.mlp\.1 \(Cumulates"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_before_the_step_of_a_model_that_is_compiled():
    run_ranks(2, _compiled)


# What passes


def _asked_once(model, alone, mesh, times=1):
    with mock.patch.object(trial, "ask", wraps=trial.ask) as ask, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert_same_logits(model, alone, mesh)
    assert ask.call_count == times


def _adapters(kind):
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    for m in (model, alone):
        torch.manual_seed(0)
        for block in m.blocks:
            block.mixer.qkv = kind(block.mixer.qkv)
            block.mlp[1] = kind(block.mlp[1])
    _asked_once(model, alone, mesh)
    before = copy.deepcopy(alone.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("kind", [Lora, Int8])
def test_adapters_and_integers_in_linear_layers(kind):
    run_ranks(2, _adapters, kind)


def _wrapped(kind):
    mesh = mesh_of(sp=2)
    model, alone, times = split_model(mesh), SmallModel().double(), 1
    for number, block in enumerate(model.blocks):
        if kind == "checkpoint":
            model.blocks[number] = checkpoint_wrapper(block)
        elif kind == "compiled":
            model.blocks[number] = torch.compile(block, backend="eager")
        elif kind == "compiled in place":
            block.compile(backend="eager")
            times = 0
        elif kind == "partial":
            block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
        elif kind == "sharded":
            fully_shard(block, mesh=lasp.grad_mesh(mesh))
            times = 0
        else:
            model.blocks[number] = checkpoint_wrapper(block)
            fully_shard(model.blocks[number], mesh=lasp.grad_mesh(mesh))
    if kind.endswith("sharded"):
        fully_shard(model, mesh=lasp.grad_mesh(mesh))
    _asked_once(model, alone, mesh, times)
    local = lasp.shard_batch({"input_ids": tokens()}, mesh)
    loss, _ = lasp.token_loss(model(*inputs_of(mesh)[:2], local["layout"]), local["labels"], mesh=mesh)
    loss.backward()


@pytest.mark.parametrize(
    "kind", ["checkpoint", "compiled", "compiled in place", "partial", "sharded", "checkpoint, sharded"]
)
def test_wrapped_layers(kind):
    run_ranks(2, _wrapped, kind)


def _less_memory(scheme):
    from lasp.models import TNL, TNLConfig
    from lasp.models.memory import save_memory

    mesh = mesh_of(sp=2)
    torch.manual_seed(0)
    model = TNL(TNLConfig(vocab_size=VOCABULARY, width=16, layers=2, heads=2, glu_width=32))
    alone = copy.deepcopy(model)
    lasp.parallelize(model, mesh)
    save_memory(model.blocks, recompute=1, chunk=4, offload=1)
    if scheme:
        make = functools.partial(torch.optim.SGD, lr=0.1)
        model, _ = lasp.data_parallel(model, mesh, scheme=scheme, optimizer=make, blocks=list(model.blocks))
        with mock.patch.object(trial, "ask", side_effect=AssertionError):  # it was asked before it was sharded
            assert_same_logits(model, alone, mesh)
    else:
        _asked_once(model, alone, mesh)


@pytest.mark.parametrize("scheme", ["", "zero3"])
def test_a_model_that_saves_memory(scheme):
    run_ranks(2, _less_memory, scheme)


def _under_autocast(inner):
    """Its rounding depends on the number of rows; that is no mixing."""
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(SmallModel(), mesh)
    if inner:
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, nn.Linear(WIDTH, WIDTH))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=not inner):
        model(*inputs_of(mesh))
    model(*inputs_of(mesh)).sum().backward()
    model.blocks[0].mlp = nn.Sequential(model.blocks[0].mlp, Cumulates())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=not inner):
        assert_refused(lambda: model(*inputs_of(mesh)), r"blocks\.0\.mlp\.1 \(Cumulates")


@pytest.mark.parametrize("inner", [False, True])
def test_in_inference_and_under_autocast(inner):
    run_ranks(2, _under_autocast, inner)


def _comes_and_goes():
    """What was there before is known, and so is a method that is bound anew."""
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    head, norm = model.head, model.blocks[0].norm

    def forward(self, x):
        return nn.LayerNorm.forward(self, x)

    for times in (2, 0, 0):
        with mock.patch.object(trial, "ask", wraps=trial.ask) as ask:
            assert_same_logits(model, alone, mesh)
            norm.forward = types.MethodType(forward, norm)
            assert_same_logits(model, alone, mesh)
            if times:
                other = nn.Sequential(head)
            model.head = other
            assert_same_logits(model, alone, mesh)
            model.head = head
            assert_same_logits(model, alone, mesh)
            del norm.forward
        assert ask.call_count == times


def test_what_was_there_before_is_not_asked_again():
    run_ranks(2, _comes_and_goes)


def _another_thread():
    """It would find the model as it came, and take this rank's slice for the whole."""
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Cumulates())
    inside, ask, running = threading.Event(), trial.ask, []

    def asks(*args):
        if not inside.is_set():  # the first one
            inside.set()
            concurrent.futures.wait(running, timeout=1.0)  # which the other one would have needed
        return ask(*args)

    call = functools.partial(model, *inputs_of(mesh, layout=False))
    with ThreadPoolExecutor(2) as pool, mock.patch.object(trial, "ask", asks):
        running.append(second := pool.submit(lambda: inside.wait(10.0) and call()))
        first = pool.submit(call)
        for thread in (first, second):
            with pytest.raises(ValueError, match=r"cannot split the sequence of: blocks\.1\.mlp\.1 \(Cumulates"):
                thread.result()


def test_another_thread_waits_for_a_trial():
    run_ranks(2, _another_thread)


class _Slots:
    """A callable to which nothing can refer weakly."""

    __slots__ = ("forward",)

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *args):
        return self.forward(*args)


def _any_callable():
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    model.blocks[0].norm.forward = _Slots(model.blocks[0].norm.forward)
    _asked_once(model, SmallModel().double(), mesh)


def test_a_forward_may_be_any_callable():
    run_ranks(2, _any_callable)


def _forwards_that_are_gone():
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    norm = model.blocks[0].norm
    for _ in range(4):
        norm.forward = functools.partial(nn.LayerNorm.forward, norm)
        model(*inputs_of(mesh))
    assert len(handles._parallelized[model]._known[norm]) == 2  # its class's, and the one that is there


def test_forwards_that_are_gone_are_not_kept():
    run_ranks(2, _forwards_that_are_gone)


def _scripted():
    """No hook can be put before such a module, and nothing be taken out of it."""
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    for m in (model, alone):
        m.blocks[0].mlp = torch.jit.script(nn.Sequential(m.blocks[0].mlp, nn.Tanh()))
    before = [p.clone() for p in model.parameters()]
    told = r"told by name, not by a trial: .*blocks\.0\.mlp \(RecursiveScriptModule\)"
    with pytest.warns(UserWarning, match=told):
        assert_same_logits(model, alone, mesh)
    assert all(map(torch.equal, before, model.parameters()))
    assert re.search(told, lasp.explain(lasp.parallelize(alone, mesh)).not_asked)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_that_is_scripted():
    run_ranks(2, _scripted)


def _left_as_it_was():
    """The trial leaves hooks, ranks, gradients, modes and random numbers."""
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, nn.Dropout(0.0))

    def state():
        return {
            path: {name: list(x.items()) if isinstance(x, dict) else x for name, x in vars(m).items()}
            for path, m in model.named_modules()
            if path
        }

    before, random = state(), torch.get_rng_state()
    hooks = model._forward_pre_hooks, list(model._forward_hooks)
    model(*inputs_of(mesh))
    assert state() == before
    assert torch.equal(random, torch.get_rng_state())
    assert (model._forward_pre_hooks, list(model._forward_hooks)) == hooks
    assert model._forward_pre_hooks is hooks[0]
    assert [row.ranks for row in lasp.explain(model)] == [2, 2]


def test_the_model_is_left_as_it_was():
    run_ranks(2, _left_as_it_was)


def _not_strict():
    mesh = mesh_of(sp=2)
    for options in ({"strict": False}, {"validate": "off"}):
        model = split_model(mesh, **options)
        model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Cumulates())
        with mock.patch.object(trial, "ask", side_effect=AssertionError):
            model(*inputs_of(mesh))


def test_nothing_is_asked_where_parallelize_did_not():
    run_ranks(2, _not_strict)


def _fewer_layers():
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    assert lasp.verify(
        model,
        mesh,
        {"input_ids": tokens(27)},
        layers=1,
        forward=lambda m, b: m(b["input_ids"], b["position_ids"], b["layout"]),
    ).ok
    with mock.patch.object(trial, "ask", side_effect=AssertionError):
        assert_same_logits(model, alone, mesh)


def test_layers_that_come_back_are_known():
    """As behind `verify(layers=1)`: they were refused as new ones."""
    run_ranks(2, _fewer_layers)


def _cannot_be_asked():
    """Its name says nothing, and it needs weights that are sharded."""
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    for part in (model.blocks[0].mlp, model):
        fully_shard(part, mesh=lasp.grad_mesh(mesh))

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model.blocks[0].mlp = Around(model.blocks[0].mlp)
    told = r"whether they mix tokens was told by name, not by a trial: blocks\.0\.mlp \(Around\) \(its weights are sha"
    with pytest.warns(UserWarning, match=r"of what was put into the model after lasp.parallelize, " + told):
        assert_same_logits(model, alone, mesh)
    _asked_once(model, alone, mesh, times=0)


def test_what_cannot_be_asked_is_told():
    run_ranks(2, _cannot_be_asked)


def _a_plan_leaves():
    mesh = mesh_of(sp=2)
    model = SmallModel().double()
    model.tower = nn.Sequential(Cumulates())
    model.blocks[1].mlp = nn.Sequential(model.blocks[1].mlp, Cumulates())
    lasp.parallelize(model, mesh, plan=dict.fromkeys(["tower*", "blocks.1.mlp.1"], lasp.adapters.token_local))
    model.blocks[1].mlp[1] = Cumulates()
    model(*inputs_of(mesh))
    model.blocks[1].mlp.append(Cumulates())
    assert_refused(lambda: model(*inputs_of(mesh)), r"blocks\.1\.mlp\.2 \(Cumulates")


def test_what_a_plan_leaves_may_be_replaced():
    run_ranks(2, _a_plan_leaves)


# Forward hooks


class Mixing:
    """Ways to mix tokens in a hook. As a method it is another object whenever it is asked for."""

    def hook(self, module, args, output):
        return output.cumsum(1)

    def in_place(self, module, args, output):
        output.copy_(output.cumsum(1))

    def on_kwargs(self, module, args, kwargs, output):
        return output + output.mean(1, keepdim=True)

    def fewer(self, module, args, output):
        return output[:, ::2].repeat_interleave(2, dim=1)[:, : output.shape[1]]

    def in_backward(self, module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.cumsum(1))

    def before(self, module, args):
        return F.normalize(args[0], dim=1)

    def before_kwargs(self, module, args, kwargs):
        return (args[0].roll(1, 1), *args[1:]), kwargs

    def __call__(self, module, args, output):
        return output.flip(1)


def _register(module, name):
    """With one of `Mixing`."""
    mixing = Mixing()
    hook = mixing if name == "__call__" else getattr(mixing, name)
    if name == "fewer":
        hook = functools.partial(hook)
    if name.startswith("before"):
        return module.register_forward_pre_hook(hook, with_kwargs=name == "before_kwargs")
    kwargs = name == "on_kwargs"
    return module.register_forward_hook(hook, with_kwargs=kwargs, always_call=kwargs, prepend=name == "hook")


def _told_of(name, path):
    kind = "forward pre-hook" if name.startswith("before") else "forward hook"
    name = "" if name == "__call__" else rf"\.{name}"
    return rf"{path} \(\w+\), {kind} test_late_layers\.Mixing{name}: "


def _hook_that_mixes(name):
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    paths = {"": "the model itself"} if name not in ("before", "before_kwargs") else {}
    paths |= dict.fromkeys(["blocks.0.norm", "blocks.1", "blocks.1.mlp.2", "blocks.0.mixer.inner", "blocks.0.mixer"])
    for path, told in paths.items():
        handle = _register(model.get_submodule(path), name)
        assert_refused(lambda: model(*inputs_of(mesh)), _told_of(name, told or re.escape(path)))
        handle.remove()
        with mock.patch.object(trial, "ask", side_effect=AssertionError):  # as it was
            assert_same_logits(model, alone, mesh)


@pytest.mark.parametrize("name", [name for name in vars(Mixing) if name == "__call__" or not name.startswith("_")])
def test_a_hook_that_mixes_tokens(name):
    run_ranks(2, _hook_that_mixes, name)


def _hook_in_all_modules(name):
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    register = torch.nn.modules.module.register_module_forward_hook
    handle = register(getattr(Mixing(), name), with_kwargs=name == "on_kwargs")
    try:
        assert_refused(
            lambda: model(*inputs_of(mesh)), rf"all modules, forward hook test_late_layers\.Mixing\.{name}: "
        )
    finally:
        handle.remove()
    seen = []
    handle = register(lambda module, args, output: seen.append(output))
    try:
        _asked_once(model, alone, mesh)
    finally:
        handle.remove()
    assert seen
    _asked_once(model, alone, mesh, times=0)


@pytest.mark.parametrize("name", ["hook", "on_kwargs"])
def test_a_hook_in_all_modules_of_the_process(name):
    run_ranks(2, _hook_in_all_modules, name)


def _hook_before_parallelize():
    mesh = mesh_of(sp=2)
    for path in ("blocks.0.mixer.inner", "blocks.0.norm"):
        model = SmallModel().double()
        model.get_submodule(path).register_forward_hook(Mixing().hook)
        with pytest.raises(ValueError, match="cannot split the sequence of: " + _told_of("hook", re.escape(path))):
            lasp.parallelize(model, mesh)


def test_a_hook_that_mixes_tokens_and_was_there_before():
    """That of a layer of which an adapter says that it mixes none passed."""
    run_ranks(2, _hook_before_parallelize)


def _hook_in_a_layer_of_a_library(build, layer):
    """A trial does not enter those whose adapter answers for them."""
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(build(), mesh)
    local = lasp.shard_batch({"input_ids": tokens()}, mesh, pad=False)
    found = next((path, m) for path, m in model.named_modules() if type(m).__name__ == layer)
    for path, module in (found, *((f"{found[0]}.{name}", m) for name, m in found[1].named_children())):
        if isinstance(module, nn.Linear) or path == found[0]:
            seen = []
            recording = module.register_forward_hook(lambda m, args, output, seen=seen: seen.append(output))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model(local["input_ids"], layout=local["layout"])
            assert len(seen) <= 1  # the made-up ones are gone
            recording.remove()
            mixing = module.register_forward_hook(
                lambda m, args, out: (out[0].cumsum(1), *out[1:]) if isinstance(out, tuple) else out.cumsum(1)
            )
            with pytest.raises(
                ValueError, match=rf"{re.escape(path)} \(\w+\), forward hook test_late_layers.*lambda>: "
            ):
                model(local["input_ids"], layout=local["layout"])
            mixing.remove()


@pytest.mark.parametrize(("kind", "layer"), [("bamba", "BambaMixer"), ("minimax", "MiniMaxLightningAttention")])
def test_a_hook_in_a_layer_of_transformers(kind, layer):
    pytest.importorskip("transformers", reason="needs the extra `transformers`")
    run_ranks(2, _hook_in_a_layer_of_a_library, functools.partial(foreign.build, kind), layer)


def _hook_under_fsdp2():
    """No module of it can run in a trial; what the hook does can."""
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    for part in (*model.blocks, model):
        fully_shard(part, mesh=lasp.grad_mesh(mesh))
    assert_same_logits(model, alone, mesh)
    for path in ("", "blocks.0.norm", "blocks.1", "blocks.1.mlp.1", "blocks.0.mixer.inner", "head"):
        for name in ("hook", "before", "in_backward", "in_place"):
            if (path, name) == ("", "before"):  # ids
                name = "before_kwargs"
            handle = _register(model.get_submodule(path), name)
            assert_refused(lambda: model(*inputs_of(mesh)), _told_of(name, re.escape(path) or "the model itself"))
            handle.remove()
    assert_same_logits(model, alone, mesh)
    head, norms, shift = model.head, [], torch.ones(VOCABULARY, dtype=torch.float64)
    for hook in (lambda m, args, y: norms.append(y.norm(dim=-1)), lambda m, args, y: y + shift - shift):
        handle = head.register_forward_hook(hook)
        _asked_once(model, alone, mesh)
        handle.remove()
        _asked_once(model, alone, mesh, times=0)
    handle = model.blocks[0].register_forward_hook(
        lambda m, args, y: (y[0].cumsum(1), *y[1:])
    )  # if it returned a tuple
    assert_refused(lambda: model(*inputs_of(mesh)), r"blocks\.0 \(\w+\), forward hook test_late_layers.*lambda>: ")
    handle.remove()

    def needs_two_rows(module, args, output):
        assert output.shape[0] == 2

    head.register_forward_hook(needs_two_rows)
    told = r"whether they mix tokens could not be tried: head \(\w+\), forward hook .*needs_two_rows"
    with pytest.warns(UserWarning, match=told):
        assert_same_logits(model, alone, mesh)
    _asked_once(model, alone, mesh, times=0)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        with pytest.warns(UserWarning, match="could not be tried: all modules, forward hook "):
            assert_same_logits(model, alone, mesh)
    finally:
        handle.remove()
    local = lasp.shard_batch({"input_ids": tokens()}, mesh)
    loss, _ = lasp.token_loss(model(*inputs_of(mesh)[:2], local["layout"]), local["labels"], mesh=mesh)
    loss.backward()


def test_a_hook_in_a_model_of_fsdp2():
    run_ranks(2, _hook_under_fsdp2)


class _Recorder:
    def __init__(self):
        self.seen = []

    def hook(self, module, args, output):
        module.last = output.norm(dim=-1)
        self.seen.append(module.last)


def _hooks_that_record():
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    recorder, norm = _Recorder(), model.blocks[0].norm
    for times in (1, 0, 0):  # put back it is the same, though a method is another object each time
        handle = norm.register_forward_hook(recorder.hook)
        before = len(recorder.seen)
        _asked_once(model, alone, mesh, times)
        assert len(recorder.seen) - before == 3  # no made-up numbers
        assert recorder.seen[-1].shape == norm.last.shape == (2, 13)
        handle.remove()
        _asked_once(model, alone, mesh, times=0)
    for step in range(3):
        handle = norm.register_forward_pre_hook(lambda m, args, step=step: None)
        _asked_once(model, alone, mesh)
        handle.remove()
        del handle
    model(*inputs_of(mesh))
    model.blocks[0].mlp = nn.Sequential(model.blocks[0].mlp)
    norm.register_forward_pre_hook(lambda m, args: None)
    model(*inputs_of(mesh))
    assert len(handles._parallelized[model]._known[norm]) == 3  # without hooks, with the recorder's, and with this one


def test_a_hook_that_records():
    run_ranks(2, _hooks_that_record)


def _hooks_that_remove_themselves(path, by_itself):
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    module, seen = model.get_submodule(path), []

    def once(module, args, kwargs, output):
        seen.append(output.shape)
        handle.remove()
        return output * 2

    handle = module.register_forward_hook(once, with_kwargs=True, always_call=True)
    alone.get_submodule(path).register_forward_hook(lambda m, args, output: output * 2)
    cannot = mock.patch.object(trial, "_why_not", lambda model: "" if isinstance(model, hooks.Alone) else "it cannot")
    with cannot if by_itself else contextlib.nullcontext():
        assert_same_logits(model, alone, mesh)
    assert seen[-1][:2] == (2, 13)  # which it still sees behind the trial
    assert not any(handle.id in table for name, table in vars(module).items() if name.startswith("_forward_"))
    count = len(seen)
    assert_same_logits(model, SmallModel().double(), mesh)
    assert len(seen) == count


@pytest.mark.parametrize("by_itself", [False, True], ids=["", "by itself"])
@pytest.mark.parametrize("path", ["blocks.0.norm", "blocks.0.mixer.inner", ""])
def test_a_hook_that_removes_itself(path, by_itself):
    run_ranks(2, _hooks_that_remove_themselves, path, by_itself)


def _hooks_of_torch(kind):
    """They are not asked."""
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    after = contextlib.nullcontext()
    for m in (model, alone):
        linear = m.blocks[0].mlp[1]
        if kind == "weight norm":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(linear)
        elif kind == "spectral norm":
            torch.manual_seed(0)
            nn.utils.spectral_norm(linear)  # which goes on at each forward in training
        elif kind == "pruned":
            prune.l1_unstructured(linear, "weight", 0.5)
        elif kind == "checkpoint":
            torch.distributed._composable.checkpoint(m.blocks[0])
        elif kind == "observer":
            linear.activation_post_process = nn.Identity()
            _register_activation_post_process_hook(linear)
    if kind == "modules of the process":
        after = ModTracker()
    with after:
        _asked_once(model, alone, mesh, times=int(kind == "observer"))  # that is a module
    local = lasp.shard_batch({"input_ids": tokens()}, mesh)
    loss, _ = lasp.token_loss(model(*inputs_of(mesh)[:2], local["layout"]), local["labels"], mesh=mesh)
    loss.backward()


@pytest.mark.parametrize(
    "kind", ["weight norm", "spectral norm", "pruned", "checkpoint", "observer", "modules of the process"]
)
def test_hooks_of_torch(kind):
    run_ranks(2, _hooks_of_torch, kind)


def _hook_that_is_compiled():
    """PyTorch's decorators leave a function its user's name."""
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    for decorate in (torch.no_grad(), torch.compiler.disable, functools.partial(torch.compile, backend="eager")):
        handle = model.blocks[0].norm.register_forward_hook(decorate(_cumulates))
        told = r"blocks\.0\.norm \(LayerNorm\), forward hook test_late_layers\._cumulates: "
        assert_refused(lambda: model(*inputs_of(mesh)), told)
        handle.remove()


def _cumulates(module, args, output):
    return output.cumsum(1)


def test_a_hook_that_is_decorated():
    run_ranks(2, _hook_that_is_compiled)


def _hook_of_operators_of_functions():
    mesh = mesh_of(sp=2)
    model = split_model(mesh)

    def attends(module, args, output):
        q = output.unsqueeze(1).float()
        return flex_attention(q, q, q).squeeze(1).to(output)

    model.blocks[0].norm.register_forward_hook(attends)
    assert_refused(lambda: model(*inputs_of(mesh)), r"blocks\.0\.norm \(LayerNorm\), forward hook .*attends: ")


def test_a_hook_that_calls_an_operator_which_takes_functions():
    run_ranks(2, _hook_of_operators_of_functions)


def _hook_that_a_plan_leaves():
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(SmallModel().double(), mesh, plan={"blocks.1.mlp": lasp.adapters.token_local})
    model.blocks[1].mlp[0].register_forward_hook(_cumulates)
    model(*inputs_of(mesh))
    model.blocks[1].norm.register_forward_hook(_cumulates)
    assert_refused(lambda: model(*inputs_of(mesh)), r"blocks\.1\.norm \(\w+\), forward hook .*: [^;]*\n")


def test_a_hook_where_a_plan_leaves_all():
    run_ranks(2, _hook_that_a_plan_leaves)


def test_a_hook_on_one_rank_in_a_stream():
    model = lasp.parallelize(SmallModel().double(), None)
    handle = model.blocks[1].norm.register_forward_hook(_cumulates)
    with pytest.raises(ValueError, match=r"cannot split the sequence of: blocks\.1\.norm \(LayerNorm\), forward hook"):
        lasp.stream_backward(model, {"input_ids": tokens()}, mesh=None, segment=8)
    handle.remove()
    lasp.stream_backward(model, {"input_ids": tokens()}, mesh=None, segment=8)


class _Installs(nn.Module):
    """As models of transformers whose hidden states are asked for."""

    def forward(self, x):
        if not hasattr(self, "installed"):
            self.installed = True
            self.register_forward_hook(lambda module, args, output: output * 2)
        return x


def _hooks_that_a_forward_installs():
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    for m in (model, alone):
        m.blocks[0].mlp.append(_Installs())
    added = model.blocks[0].mlp[-1]
    assert_same_logits(model, alone, mesh)
    assert len(added._forward_hooks) == 1
    _asked_once(model, alone, mesh)


def test_a_hook_that_a_forward_installs():
    """One of a trial would stay, beside that of the first forward."""
    run_ranks(2, _hooks_that_a_forward_installs)


class _Written(dict):
    """As an output of transformers."""

    def update(self, *args):
        raise AssertionError


class _Stateful:
    """What hooks keep, and where."""

    def __init__(self, module):
        self.module, self.count, self.before = module, 0, None
        self.written = _Written(a=1)
        self.lists, self.largest = {"all": []}, torch.zeros((), dtype=torch.float64)
        module.own = []
        module.register_buffer("in_place", torch.zeros((), dtype=torch.float64))
        module.register_buffer("anew", torch.zeros((), dtype=torch.float64))
        self.buffers = module.in_place, module.anew

    def method(self, module, args, output):
        x = output.detach().abs().max()
        self.count += 1
        self.before = output.detach() if self.before is None else self.before + output.detach()
        self.lists["all"].append(x)
        self.largest.copy_(torch.maximum(x, self.largest))
        module.own.append(x)
        module.in_place.copy_(torch.maximum(x, module.in_place))
        module.anew = torch.maximum(x, module.anew)

    __call__ = method

    def in_closure(self):
        count, before, this = 0, None, self

        def hook(module, args, output):
            nonlocal count, before
            count, before = count + 1, output.detach() if before is None else before + output.detach()
            this.method(module, args, output)
            assert this.count == count

        return hook

    def check(self, forwards):
        assert self.count == len(self.lists["all"]) == len(self.module.own) == forwards
        largest = max(self.lists["all"], default=torch.zeros((), dtype=torch.float64))
        assert self.largest == self.module.in_place == self.module.anew == largest
        assert self.module.in_place is self.buffers[0]
        assert forwards or self.module.anew is self.buffers[1]


def _hooks_with_a_state(sharded):
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    states = [_Stateful(m) for m in (model.blocks[0].norm, model.blocks[1], model.head)]
    if sharded:
        for part in (*model.blocks, model):
            fully_shard(part, mesh=lasp.grad_mesh(mesh))
    model(*inputs_of(mesh))
    for state, hook in zip(states, (states[0], states[1].method, states[2].in_closure())):
        state.module.register_forward_hook(hook)
    handles._parallelized[model].refuse_new_layers()
    for forwards in range(3):
        for state in states:
            state.check(forwards)
        model(*inputs_of(mesh))  # whose tensors have other shapes than those of a trial


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hook_keeps_nothing_of_a_trial(sharded):
    run_ranks(2, _hooks_with_a_state, sharded)


_norms, _calls = [], 0  # of a script, as most keep them


def _record_norm(module, args, output):
    global _calls
    _calls += 1
    _norms.append(output.detach().norm())


def _hook_with_globals():
    global _calls
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    _norms.clear()
    _calls = 0
    model.blocks[1].register_forward_hook(_record_norm)
    model.blocks[0].register_forward_hook(lambda module, args, output: _norms.append(output.detach().norm()))
    handles._parallelized[model].refuse_new_layers()
    assert (len(_norms), _calls) == (0, 0)
    model(*inputs_of(mesh))
    assert (len(_norms), _calls) == (2, 1)


def test_a_hook_keeps_nothing_of_a_trial_in_globals():
    run_ranks(2, _hook_with_globals)


def _hook_of_the_process_that_removes_itself():
    mesh = mesh_of(sp=2)
    model, alone = split_model(mesh), SmallModel().double()
    tables = torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_hooks_always_called
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: handle.remove(), always_call=True
    )
    handles._parallelized[model].refuse_new_layers()
    assert all(handle.id in table for table in tables)
    assert_same_logits(model, alone, mesh)
    assert not any(handle.id in table for table in tables)


def test_a_hook_of_the_process_that_removes_itself():
    run_ranks(2, _hook_of_the_process_that_removes_itself)


def _hooks_that_ask_autograd(sharded):
    mesh = mesh_of(sp=2)
    model, kept = split_model(mesh), []
    if sharded:
        for part in (*model.blocks, model):
            fully_shard(part, mesh=lasp.grad_mesh(mesh))
    for hook in (lambda m, args, y: y.retain_grad(), lambda m, args, y: y.register_hook(kept.append) and None):
        model.blocks[0].norm.register_forward_hook(hook)
        with mock.patch.object(trial, "ask", wraps=trial.ask) as ask, warnings.catch_warnings():
            warnings.simplefilter("error")
            model(*inputs_of(mesh)).sum().backward()
        assert ask.call_count == 1

    def mixes(module, args, y):
        y.retain_grad()
        y.data.copy_(y.data.cumsum(1))

    model.blocks[0].norm.register_forward_hook(mixes)
    assert_refused(lambda: model(*inputs_of(mesh)), r"blocks\.0\.norm \(\w+\), forward hook .*mixes: ")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hook_that_asks_for_gradients(sharded):
    """A trial runs without; such hooks could not be tried, nor the modules around them."""
    run_ranks(2, _hooks_that_ask_autograd, sharded)


class _Rolls(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = SmallModel().double()

    def forward(self, input_ids, position_ids, layout=None):
        return self.model(input_ids, position_ids, layout).roll(1, 1)


def _hook_that_fails(when):
    mesh = mesh_of(sp=2)
    model = _Rolls()

    def needs_two_rows(module, args, y):
        assert y.shape[0] == 2

    def needs_many_tokens(module, args, y):
        assert y.shape[1] > 20

    hook = {"always": needs_two_rows, "on slices": needs_many_tokens}[when]
    model.model.blocks[0].register_forward_hook(hook)
    with pytest.raises(ValueError, match=r"cannot split the sequence of: the model itself \(_Rolls\): on a slice"):
        lasp.parallelize(model, mesh)
    model = split_model(mesh)
    model.blocks[0].register_forward_hook(hook)
    with pytest.warns(UserWarning, match=rf"could not be tried: blocks\.0 \(Block\), forward hook .*{hook.__name__}"):
        handles._parallelized[model].refuse_new_layers()


@pytest.mark.parametrize("when", ["always", "on slices"])
def test_a_hook_that_fails_hides_no_module(when):
    run_ranks(2, _hook_that_fails, when)


def _hook_that_sends(sharded):
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    if sharded:
        for part in (*model.blocks, model):
            fully_shard(part, mesh=lasp.grad_mesh(mesh))

    def sends(module, args, y):
        largest = y.detach().abs().max()
        dist.all_reduce(largest, dist.ReduceOp.MAX)

    def gathers(module, args, y):  # while the weights are sharded
        if hasattr(module.weight, "full_tensor"):
            module.weight.full_tensor()
        else:
            dist.barrier()

    for hook in (sends, gathers):
        handle = model.head.register_forward_hook(hook)
        if dist.get_rank() == 0:  # alone
            with pytest.warns(
                UserWarning, match=rf"could not be tried: head \(Linear\), forward hook .*{hook.__name__}"
            ):
                handles._parallelized[model].refuse_new_layers()
        handle.remove()
    handle = model.head.register_forward_hook(sends)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(*inputs_of(mesh))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hook_sends_nothing_in_a_trial(sharded):
    """How often it is called there depends on the rank: other ranks would wait for ever."""
    run_ranks(2, _hook_that_sends, sharded)


def _one_function_in_both_places():
    mesh = mesh_of(sp=2)
    model = split_model(mesh)

    def hook(module, args, *output):
        return output[0].cumsum(1) if output else None

    handle = model.head.register_forward_pre_hook(hook)
    model(*inputs_of(mesh))
    handle.remove()
    model.head.register_forward_hook(hook)
    assert_refused(lambda: model(*inputs_of(mesh)), r"head \(Linear\), forward hook .*hook: ")


def test_a_pre_hook_that_becomes_a_hook():
    run_ranks(2, _one_function_in_both_places)


def _made(what):
    def hook(module, args, output):
        return what(output)

    return hook


def _hooks_of_one_name():
    mesh = mesh_of(sp=2)
    model = split_model(mesh)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=lasp.grad_mesh(mesh))
    harmless, mixing = _made(lambda x: x * 1), _made(lambda x: x.cumsum(1))

    def fails(x):
        assert x.shape[0] == 2

    for first, second in ((harmless, mixing), (mixing, harmless)):
        registered = [model.head.register_forward_hook(hook) for hook in (first, second)]
        assert_refused(lambda: model(*inputs_of(mesh)), r"head \(Linear\), forward hook .*hook: ")
        for handle in registered:
            handle.remove()
    for both in ((harmless, _made(fails)), (_made(fails), harmless)):
        registered = [model.head.register_forward_hook(hook) for hook in both]
        with pytest.warns(UserWarning, match=r"could not be tried: head \(Linear\), forward hook .*hook"):
            model(*inputs_of(mesh))
        for handle in registered:
            handle.remove()


def test_hooks_of_one_name_on_one_module():
    """As a function makes them for all modules."""
    run_ranks(2, _hooks_of_one_name)


class _WithSlots:
    __slots__ = ()

    def hook(self, module, args, output):
        pass


def _hooks_anew():
    mesh = mesh_of(sp=2)
    model, kept = split_model(mesh), []
    for _ in range(20):
        kept.append(lambda module, args, output: None)
        for hook in (_WithSlots().hook, kept[-1]):
            handle = model.blocks[0].norm.register_forward_hook(hook)
            with mock.patch.object(handles._parallelized[model], "_look", None):  # quickly
                handles._parallelized[model].refuse_new_layers()
            handle.remove()
    assert len(handles._parallelized[model]._known[model.blocks[0].norm]) < 20


def test_what_is_known_of_a_module_is_bounded():
    run_ranks(2, _hooks_anew)
