"""Models of flash-linear-attention on slices of a sequence: logits and every gradient against one process, in fp64."""

import copy
import functools
import warnings

import pytest
import torch
from ranks import mesh_of, run_ranks

import lasp

pytest.importorskip("fla", reason="needs flash-linear-attention 0.6.0")

import fla_models
import foreign
from fla_models import logits_of
from foreign import loss_of, relative

TOKENS = 37


def batch_of(mask=None, cu_seqlens=None):
    return foreign.batch_of(TOKENS, mask, cu_seqlens)


def reference_of(name, batch):
    """One process, each document alone: the model with gradients of the mean loss, and its logits."""
    model, whole = fla_models.build(name), lasp.shard_batch(batch, None)
    given = {key: whole[key] for key in ("attention_mask",) if key in whole}
    offsets = batch.get("cu_seqlens", (0, TOKENS))
    pairs = [(a, b) for a, b in zip(offsets, offsets[1:]) if b > a]
    logits = torch.cat([logits_of(model(whole["input_ids"][:, a:b], **given)) for a, b in pairs], 1)
    (loss_of(logits, whole["labels"]) / (whole["labels"] != -100).sum()).backward()
    return model, logits.detach()


def compare(name, batch, lengths=None, checkpointing=False, bound=1e-10, **options):
    torch.set_num_threads(1)
    fla_models.without_kernels()
    world = torch.distributed.get_world_size()
    mesh = mesh_of(sp=world)
    reference, logits = reference_of(name, batch)
    model = fla_models.build(name)
    lasp.parallelize(model, mesh["sp"], **options)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    local = lasp.shard_batch(batch, mesh, pad="labels" not in batch)
    given = {key: local[key] for key in ("input_ids", "attention_mask") if key in local}
    got = logits_of(model(**given, layout=local["layout"]))
    start, end = local["layout"].bounds(mesh["sp"].get_local_rank())
    real = local["layout"].total - local["layout"].padding
    here = slice(0, max(0, min(end, real) - start))
    kept = torch.ones(got[:, here].shape[:2], dtype=torch.bool)
    kept = kept if "attention_mask" not in batch else local["attention_mask"][:, here] != 0
    off = relative(got[:, here][kept], logits[:, start : min(end, real)][kept])
    assert off < bound, off
    tokens = (lasp.shard_batch(batch, None)["labels"] != -100).sum()
    (loss_of(got, local["labels"]) * world / tokens).backward()
    lasp.sync_grads(model, mesh)
    pairs = list(zip(model.named_parameters(), reference.parameters()))
    assert all(p.grad is not None for (_, p), r in pairs if r.grad is not None)
    worst = {key: relative(p.grad, r.grad) for (key, p), r in pairs if r.grad is not None}
    assert max(worst.values()) < bound, sorted(worst.items(), key=lambda x: -x[1])[:5]
    assert set(model.state_dict()) == set(reference.state_dict())
    with torch.no_grad():  # and without gradients the layers take other functions of fla
        assert torch.equal(logits_of(copy.deepcopy(model)(**given, layout=local["layout"])), got)
    return max(worst.values())


@pytest.mark.parametrize("name", fla_models.NAMES)
@pytest.mark.parametrize("world", [2, 3])
def test_one_process_and_slices_agree(world, name):
    run_ranks(world, compare, name, batch_of())


@pytest.mark.parametrize("name", fla_models.NAMES)
def test_padding_before_and_behind(name):
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, :15] = 0  # more than the first rank holds
    mask[1, 30:] = 0
    bound = 1e-6 if name == "retnet" else 1e-10  # fla turns by angles in fp32, and counts from the first real token
    run_ranks(3, compare, name, batch_of(mask), None, False, bound)


@pytest.mark.parametrize("name", fla_models.NAMES)
def test_packed_documents_are_each_alone(name):
    run_ranks(3, compare, name, batch_of(cu_seqlens=[0, 5, 6, 20, 20, 29, TOKENS]))


def streamed(name):
    """Segment by segment; on one rank too, where fla's own layers make way meanwhile."""
    torch.set_num_threads(1)
    fla_models.without_kernels()
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    model = fla_models.build(name)
    lasp.parallelize(model, mesh["sp"], strict=False)
    for batch in (batch_of(), batch_of(cu_seqlens=[0, 5, 6, 20, 20, 29, TOKENS])):
        reference, _ = reference_of(name, batch)
        lasp.stream_backward(model, batch, mesh=mesh, segment=12)
        lasp.sync_grads(model, mesh)
        pairs = zip(model.named_parameters(), reference.parameters())
        worst = {key: relative(p.grad, r.grad) for (key, p), r in pairs if r.grad is not None}
        # fla turns by angles in fp32
        assert max(worst.values()) < (1e-6 if name == "retnet" else 1e-10), sorted(worst.items(), key=lambda x: -x[1])[
            :5
        ]
        model.zero_grad()


@pytest.mark.parametrize("name", fla_models.NAMES)
@pytest.mark.parametrize("world", [1, 2])
def test_streamed_segments_and_one_process_agree(world, name):
    run_ranks(world, streamed, name)


@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "lightnet", "retnet"])
def test_checkpointed(name):
    run_ranks(2, compare, name, batch_of(), None, True)


def test_one_token_a_rank():
    """For a single token without gradients fla's convolutions go another way."""
    run_ranks(3, compare_short)


def compare_short():
    fla_models.without_kernels()
    mesh = mesh_of(sp=3)
    ids = torch.tensor([[5, 8, 13]])
    with torch.no_grad():
        for name in ("gla", "gated_deltanet", "kda"):
            model = fla_models.build(name)
            whole = logits_of(model(ids))
            lasp.parallelize(model, mesh["sp"])
            local = lasp.shard_batch({"input_ids": ids}, mesh)
            got = logits_of(model(local["input_ids"], layout=local["layout"]))
            here = mesh["sp"].get_local_rank()
            assert relative(got, whole[:, here : here + 1]) < 1e-10, name


def trained_after_an_evaluation(name):
    """What an evaluation under inference_mode made once serves a training."""
    fla_models.without_kernels()
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(fla_models.build(name), mesh["sp"])
    local = lasp.shard_batch(batch_of(cu_seqlens=[0, 5, 20, TOKENS]), mesh)
    with torch.inference_mode():
        evaluated = logits_of(model(local["input_ids"], layout=local["layout"]))
    trained = logits_of(model(local["input_ids"], layout=local["layout"]))
    trained.sum().backward()
    assert torch.equal(trained, evaluated)


def test_an_evaluation_leaves_what_a_training_can_use():
    run_ranks(2, trained_after_an_evaluation, "retnet")


def refusals():
    fla_models.without_kernels()
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(fla_models.build("gla"), mesh["sp"])
    local = lasp.shard_batch(batch_of(), mesh)
    given = {"input_ids": local["input_ids"], "layout": local["layout"]}
    for labels in ({"labels": local["labels"]}, {"labels": local["labels"], "shift_labels": local["labels"]}):
        with pytest.raises(ValueError, match="labels would be shifted by GLAForCausalLM on its slice alone"):
            model(**given, **labels)
    with pytest.raises(ValueError, match="use_cache=True cannot be used where the sequence of GLAForCausalLM is split"):
        model(**given, use_cache=True)
    holes = torch.ones_like(local["input_ids"])
    holes[0, 3] = 0
    with pytest.raises(ValueError, match="attention_mask has padding among the tokens of a row, which fla takes out"):
        model(**given, attention_mask=holes)
    layer = model.model.layers[0].attn
    with pytest.raises(RuntimeError, match="initial_state of a layer whose sequence is split"):
        layer.forward.__func__.__globals__["chunk_gla"](*torch.ones(3, 1, 2, 2, 4), initial_state=torch.ones(1))


def test_what_a_slice_cannot_do_is_refused():
    run_ranks(2, refusals)


def of_another_version():
    fla_models.without_kernels()
    mesh = mesh_of(sp=2)
    model = fla_models.build("gla")
    layer = type(model.model.layers[0].attn)

    class Later(layer):
        def forward(self, x, **_):
            return chunk_gla_of_later(x)

    Later.__module__, Later.__qualname__, Later.__name__ = layer.__module__, layer.__qualname__, layer.__name__
    model.model.layers[0].attn.__class__ = Later
    with pytest.raises(ValueError, match=r"GatedLinearAttention\.forward calls none of the functions that lasp knows"):
        lasp.parallelize(model, mesh["sp"], strict=False)


def chunk_gla_of_later(x):
    return x


def test_a_forward_that_calls_other_functions_is_an_error():
    run_ranks(2, of_another_version)


class Block(torch.nn.Module):
    def __init__(self, known, unknown):
        super().__init__()
        self.known, self.unknown = known, unknown

    def forward(self, x):
        return self.unknown(self.known(x)[0])


def unknown_layers():
    import fla.layers
    from fla.models.rwkv6.modeling_rwkv6 import RWKV6FeedForward
    from fla.models.rwkv7.modeling_rwkv7 import RWKV7FeedForward
    from fla.modules import LongConvolution

    listed = fla_models.importlib.import_module("lasp.adapters.fla")._LAYERS
    every = [getattr(fla.layers, name) for name in fla.layers.__all__]
    others = [cls for cls in every if cls.__name__ not in listed]
    assert len(others) > 30
    return [*others, RWKV6FeedForward, RWKV7FeedForward, LongConvolution]


@pytest.mark.parametrize("cls", unknown_layers(), ids=lambda cls: cls.__name__)
def test_an_unknown_layer_is_refused_by_its_class(cls):
    """Its kernels do not run here, so that it cannot be asked."""
    from fla.layers import GatedLinearAttention

    unknown = cls.__new__(cls)
    torch.nn.Module.__init__(unknown)
    known = GatedLinearAttention(hidden_size=32, num_heads=2)
    with pytest.raises(ValueError, match=rf"unknown \({cls.__name__}\): its class mixes tokens"):
        lasp.parallelize(Block(known, unknown), None)


def refuses_backward(*_, **__):
    raise RuntimeError("Triton >= 3.4.0 and < 3.7.1 on Hopper GPUs produces incorrect results")


class Refuses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        refuses_backward()


def kernels_that_refuse():
    from unittest import mock

    from fla import utils
    from fla.layers import gated_deltanet

    fla_models.without_kernels()
    model, mesh = fla_models.build("gated_deltanet"), mesh_of(sp=torch.distributed.get_world_size())
    here = {"IS_NVIDIA_HOPPER": True, "TRITON_ABOVE_3_4_0": True, "TRITON_ABOVE_3_7_1": False}
    own = gated_deltanet.chunk_gated_delta_rule

    def chunk_gated_delta_rule(**given):
        return own(**given | {"v": Refuses.apply(given["v"])})

    with (
        mock.patch.multiple(utils, **here),
        mock.patch.object(gated_deltanet, "chunk_gated_delta_rule", chunk_gated_delta_rule),
    ):
        if mesh.size() == 1:
            with pytest.warns(UserWarning, match=r"On one rank the model is fla's own.*take Triton 3\.7\.1 or newer"):
                lasp.parallelize(model, mesh)
            return
        message = (
            r"library's own code \(fla, transformers\) on one rank, which failed: Triton >= 3\.4\.0.*\. That says "
            r"nothing of the split one.*; fla's own backward of Gated DeltaNet does not run on this GPU"
        )
        with pytest.raises(RuntimeError, match=message):
            lasp.verify(model, mesh)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.timeout(300)  # of a loaded machine
def test_it_is_said_where_the_librarys_own_kernels_refuse(world):
    run_ranks(world, kernels_that_refuse, timeout=200.0)


def test_norms_and_multilayer_perceptrons_are_not_refused():
    from fla.layers import GatedLinearAttention
    from fla.modules import GatedMLP

    model = Block(GatedLinearAttention(hidden_size=32, num_heads=2), GatedMLP(hidden_size=32))
    assert lasp.parallelize(model, None) is model  # and raises nothing


def verified(name):
    fla_models.without_kernels()
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(fla_models.build(name), mesh["sp"])
    found = lasp.verify(model, mesh, tokens=40)
    assert found.ok, found


@pytest.mark.parametrize("name", ["retnet", "gated_deltanet", "mamba2"])
def test_verify_runs_the_whole_as_it_came(name):
    run_ranks(2, verified, name)


def _hooks_in_a_layer():
    """A trial runs its projections, but calls something else in place of its convolutions."""
    fla_models.without_kernels()
    mesh = mesh_of(sp=2)
    model = fla_models.build("gla")
    lasp.parallelize(model, mesh["sp"])
    local = lasp.shard_batch(batch_of(), mesh)
    call = functools.partial(model, local["input_ids"], layout=local["layout"])
    expected = logits_of(call())
    layer = next((path, m) for path, m in model.named_modules() if type(m).__name__ == "GatedLinearAttention")

    def mixes(module, args, output):
        return (output[0].cumsum(1), *output[1:]) if isinstance(output, tuple) else output.cumsum(1)

    for path, module in (layer, *((f"{layer[0]}.{name}", m) for name, m in layer[1].named_children())):
        for hook in (lambda module, args, output: None, mixes):
            handle = module.register_forward_hook(hook)
            if hook is mixes:
                with pytest.raises(
                    ValueError, match=rf"split the sequence of: {path} \(\w+\), forward hook test_fla.*mixes: "
                ):
                    call()
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    assert torch.equal(logits_of(call()), expected)
            handle.remove()


def test_a_hook_in_a_layer():
    run_ranks(2, _hooks_in_a_layer)
