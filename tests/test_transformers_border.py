"""What a split model of transformers is called with, what it refuses, and what else one does with such a model."""

import copy
import importlib
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from processes import ROOT
from ranks import mesh_of, run_ranks

import lasp

pytest.importorskip("transformers", reason="needs the extra `transformers`")

import foreign

IDS = torch.randint(3, 97, (2, 41), generator=torch.Generator().manual_seed(5))


def split(name, **more):
    """On each rank: the model, and the slice of a batch. Whether they mix tokens test_transformers.py asks of all."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    model = foreign.build(name, torch.float32, **more)
    lasp.parallelize(model, mesh["sp"], strict=False)
    return model, lasp.shard_batch({"input_ids": IDS}, mesh, pad=False), mesh


def refuses_what_needs_the_whole():
    model, local, _ = split("bamba")
    ids, layout = local["input_ids"], local["layout"]
    ok = {"input_ids": ids, "layout": layout}
    other = lasp.ShardLayout((1, 40))
    wrong = [
        ({"layout": None}, ValueError, "layout is needed"),
        ({"layout": (21, 20)}, TypeError, r"layout must be a lasp.ShardLayout, got \(21, 20\)"),
        ({"layout": other}, ValueError, r"got lengths \(1, 40\)"),
        ({"layout": lasp.ShardLayout((*layout.lengths, 0))}, ValueError, "layout must be of 2 ranks"),
        ({"layout": lasp.ShardLayout(layout.lengths, (0, 3, 41))}, ValueError, "a batch of 1, got 2 rows"),
        ({"use_cache": True}, ValueError, "use_cache=True cannot be used where the sequence of BambaForCausalLM"),
        ({"cache": object()}, ValueError, "cache cannot be used"),
        ({"past_key_values": object()}, ValueError, "past_key_values cannot be used"),
        ({"labels": ids}, ValueError, r"lasp.token_loss\(output.logits"),
        ({"labels": ids, "shift_labels": ids}, ValueError, r"lasp.token_loss\(output.logits"),
        ({"logits_to_keep": 1}, ValueError, "logits_to_keep .* got 1"),
        ({"logits_to_keep": torch.tensor([0, 1])}, ValueError, "logits_to_keep .* got a tensor"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, ValueError, "attention_mask must be the"),
        ({"seq_idx": torch.zeros(1, 1)}, ValueError, "seq_idx was given, but the layout is not of packed"),
        ({"input_ids": None}, ValueError, "input_ids .* or inputs_embeds .* are needed"),
    ]
    for change, kind, message in wrong:
        with pytest.raises(kind, match=message):
            model(**{**ok, **change})
    with pytest.raises((ValueError, TypeError), match=r"layout|use_cache"):
        model.generate(ids, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="ran outside of the forward of the model"):
        model.model.layers[0].mamba(torch.zeros(2, ids.shape[1], 32))
    first = model(**ok).logits  # nothing is broken by what was refused
    assert torch.equal(first, model(ids, None, local["position_ids"], layout=layout).logits)
    inner = model.model(**ok).last_hidden_state
    assert torch.equal(first, model.lm_head(inner))
    hidden = model.get_input_embeddings()(ids)
    assert torch.equal(first, model(inputs_embeds=hidden, layout=layout).logits)
    assert torch.equal(first, model(**ok, return_dict=False)[0])


def refuses_a_rank_without_tokens():
    model, _, mesh = split("bamba")
    ids = IDS[:, : mesh.size() - 1]
    local = lasp.shard_batch({"input_ids": ids}, mesh, pad=False)
    last = mesh.size() - 1
    with pytest.raises(ValueError, match=rf"every rank of BambaForCausalLM a token, got none on \[{last}\] of"):
        model(local["input_ids"], layout=local["layout"])
    local = lasp.shard_batch({"input_ids": ids}, mesh)  # with padding in its place
    assert model(local["input_ids"], layout=local["layout"]).logits.shape[1] == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_without_tokens_is_refused(ranks):
    run_ranks(ranks, refuses_a_rank_without_tokens)


def test_what_needs_the_whole_sequence_is_refused():
    run_ranks(2, refuses_what_needs_the_whole)


class HandsOn(torch.nn.Module):
    """As PEFT's: it names none of the arguments that it hands on."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def by_place():
    torch.set_num_threads(1)
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(HandsOn(HandsOn(foreign.build("bamba", torch.float32))), mesh["sp"], strict=False)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    local = lasp.shard_batch({"input_ids": IDS, "attention_mask": mask}, mesh, pad=False)
    named = {name: local[name] for name in ("input_ids", "attention_mask")}
    expected = model(**named, layout=local["layout"]).logits
    found = model(*named.values(), layout=local["layout"]).logits
    assert torch.equal(found, expected)
    positions = local["position_ids"].expand(2, -1).clone()
    assert torch.equal(model(*named.values(), positions, layout=local["layout"]).logits, expected)
    assert torch.equal(model(*named.values(), None, layout=local["layout"]).logits, expected)
    with pytest.raises(ValueError, match="attention_mask must be the"):
        model(IDS[:, : len(positions[0])], torch.ones(2, 1, 4, 4), layout=local["layout"])


def test_arguments_without_names_through_a_wrapper():
    run_ranks(2, by_place)


class NamesTokens(HandsOn):
    def forward(self, input_ids, **kwargs):
        return self.inner(input_ids, **kwargs)


class NamesItsMask(HandsOn):
    def forward(self, input_ids, mask=None, **kwargs):
        return self.inner(input_ids, attention_mask=mask, **kwargs)


def refuses_a_mask_of_another_name():
    torch.set_num_threads(1)
    mesh = mesh_of(sp=2)
    model = lasp.parallelize(NamesItsMask(foreign.build("minimax", torch.float32)), mesh["sp"], strict=False)
    local = lasp.shard_batch({"input_ids": IDS}, mesh, pad=False)
    ids, layout = local["input_ids"], local["layout"]
    with pytest.raises(ValueError, match=r"mask would not reach the split layers of NamesItsMask, .* attention_mask"):
        model(ids, torch.ones_like(ids), layout=layout)
    with pytest.raises(TypeError, match="multiple values"):  # in whatever order; here the wrapper itself objects
        model(ids, torch.ones_like(ids), attention_mask=torch.ones_like(ids), layout=layout)
    assert model(ids, layout=layout).logits.shape[1] == ids.shape[1]


def test_a_mask_of_another_name_is_refused():
    run_ranks(2, refuses_a_mask_of_another_name)


def filled_in_through_a_wrapper(wrap):
    """The trial of `parallelize` gives a wrapper's model the positions that its border will give it."""
    torch.set_num_threads(1)
    mesh = mesh_of(sp=2)
    model = wrap(foreign.build("minimax", torch.float32).eval())
    serial = copy.deepcopy(model)
    lasp.parallelize(model, mesh["sp"])
    local = lasp.shard_batch({"input_ids": IDS}, mesh, pad=False)
    lasp.token_loss(model(local["input_ids"], layout=local["layout"]).logits, local["labels"], mesh=mesh)[0].backward()
    lasp.sync_grads(model, mesh)
    labels = lasp.shard_batch({"input_ids": IDS}, None)["labels"]
    lasp.token_loss(serial(IDS).logits, labels, mesh=None)[0].backward()
    for p, q in zip(model.parameters(), serial.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("wrap", [HandsOn, NamesTokens])
def test_positions_that_are_filled_in_through_a_wrapper(wrap):
    run_ranks(2, filled_in_through_a_wrapper, wrap)


def own_batch_in_every_recompute():
    """Two batches of other lengths, both forward before either backward: each recompute sees its own layout."""
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    batches = [
        {"input_ids": IDS[:1], "cu_seqlens": (0, 7, 30, 41)},
        {"input_ids": IDS[1:], "cu_seqlens": (0, 25, 41)},
    ]
    gradients = []
    for checkpointed in (False, True):
        model, _, _ = split("minimax")
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        outputs = []
        for batch in batches:
            local = lasp.shard_batch(batch, mesh, pad=False)
            outputs.append(model(local["input_ids"], layout=local["layout"]).logits.square().mean())
        for loss in outputs:
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_recompute_sees_its_own_batch():
    run_ranks(2, own_batch_in_every_recompute)


def reentrant_is_an_error():
    model, local, _ = split("minimax")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    loss = model(local["input_ids"], layout=local["layout"]).logits.square().mean()
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        loss.backward()


def test_a_reentrant_checkpoint_is_an_error():
    run_ranks(2, reentrant_is_an_error)


def balanced(name):
    """The router's loss over all ranks, and its gradients."""
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    mask = torch.ones(2, 41, dtype=torch.int64)
    mask[1, 30:] = 0
    for batch in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask}):
        reference = foreign.build(name, torch.float32)
        whole = reference(**batch, use_cache=False, output_router_logits=True).aux_loss
        whole.backward()
        model, _, _ = split(name, output_router_logits=True)
        local = lasp.shard_batch(batch, mesh, pad=False)
        inputs = {key: local[key] for key in ("input_ids", "attention_mask", "layout") if key in local}
        loss = model(**inputs).aux_loss
        torch.testing.assert_close(loss, whole)
        loss.backward()
        lasp.sync_grads(model, mesh)
        for (key, p), r in zip(model.named_parameters(), reference.parameters()):
            if r.grad is not None and float(r.grad.abs().max()) > 1e-5:
                assert foreign.relative(p.grad, r.grad) < 1e-4, key
    # A mean of what ranks would get alone is another loss.
    alone = reference(IDS[:, :20], use_cache=False, output_router_logits=True).aux_loss
    assert abs(float(alone - whole)) > 1e-3


@pytest.mark.parametrize("name", ["minimax", "qwen3_next", "qwen3_5_moe", "jamba", "granitemoehybrid"])
def test_the_router_s_loss_is_over_all_ranks(name):
    run_ranks(2, balanced, name)


def rotary(kind, name):
    """Frequencies follow the largest position of all ranks."""
    long = {"long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0] * 4, "original_max_position_embeddings": 23}
    more = {
        "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **(long if kind == "longrope" else {"factor": 2.0})}
    }
    more["max_position_embeddings"] = 23  # an odd number, behind which a sequence is long
    reference = foreign.build(name, torch.float32, **more)
    whole = reference(IDS, use_cache=False).logits
    model, local, mesh = split(name, **more)
    start, end = local["layout"].bounds(mesh["sp"].get_local_rank())
    got = model(local["input_ids"], layout=local["layout"]).logits
    assert foreign.relative(got, whole[:, start:end]) < 1e-5
    short = reference(IDS[:, :20], use_cache=False).logits
    assert foreign.relative(short, whole[:, :20]) > 1e-3  # as a slice would have had it
    # Padding, which makes it 24 tokens, is none of them.
    reference, model = (foreign.build(name, torch.float32, **more) for _ in range(2))
    lasp.parallelize(model, mesh["sp"], strict=False)
    local = lasp.shard_batch({"input_ids": IDS[:, :23]}, mesh)
    found = lasp.unshard_sequence(model(local["input_ids"], layout=local["layout"]).logits, mesh)[:, :23]
    assert foreign.relative(found, reference(IDS[:, :23], use_cache=False).logits) < 1e-5


@pytest.mark.parametrize(
    ("kind", "name"),
    [("dynamic", "llama"), ("longrope", "llama"), ("dynamic", "deepseek_v2")],  # whose rotary is of complex numbers
)
def test_rotary_that_follows_the_length_has_the_whole_one(kind, name):
    run_ranks(2, rotary, kind, name)


def kept_and_copied(folder):
    from transformers import AutoModelForCausalLM

    model, local, mesh = split("bamba")
    before = foreign.build("bamba", torch.float32)
    assert list(model.state_dict()) == list(before.state_dict())
    call = {"input_ids": local["input_ids"], "layout": local["layout"]}
    expected = model(**call).logits

    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(copied(**call).logits, expected)

    copied.save_pretrained(folder)  # rank 0 does
    torch.distributed.barrier()
    assert "lasp" not in (folder / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config._attn_implementation == "sdpa"
    whole = again(IDS, use_cache=False).logits
    start, end = local["layout"].bounds(mesh["sp"].get_local_rank())
    assert foreign.relative(expected, whole[:, start:end]) < 1e-4
    lasp.parallelize(again, mesh["sp"])
    assert foreign.relative(again(**call).logits, expected) < 1e-5

    file = io.BytesIO()
    torch.save(copied, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)  # not split
    assert foreign.relative(loaded(IDS, use_cache=False).logits, whole) < 1e-5


def test_saved_loaded_copied(tmp_path):
    run_ranks(2, kept_and_copied, tmp_path)


def others_stay_as_they_are():
    from transformers.models.bamba import modeling_bamba

    config = foreign.config_of("bamba")
    names = dict(vars(modeling_bamba))
    model, other = (modeling_bamba.BambaForCausalLM(config).eval() for _ in range(2))
    before = other(IDS, use_cache=False).logits
    lasp.parallelize(model, mesh_of(sp=torch.distributed.get_world_size())["sp"])
    assert config._attn_implementation == "sdpa"
    assert torch.equal(other(IDS, use_cache=False).logits, before)
    assert all(vars(modeling_bamba)[key] is x for key, x in names.items())


def test_nothing_is_patched_for_other_models():
    run_ranks(2, others_stay_as_they_are)


def told():
    model, local, _ = split("qwen3_next")
    model(local["input_ids"], layout=local["layout"])
    report = str(lasp.explain(model))
    assert "delta_rule" in report
    assert "softmax_attention" in report
    assert "halo" in report


def test_explain_tells_every_operator():
    run_ranks(2, told)


def test_one_rank_is_the_model_itself():
    model = foreign.build("minimax", torch.float32)
    expected = model(IDS, use_cache=False).logits
    lasp.parallelize(model, None)
    batch = lasp.shard_batch({"input_ids": IDS}, None)
    assert torch.equal(model(batch["input_ids"], layout=batch["layout"], use_cache=False).logits, expected)
    packed = lasp.shard_batch({"input_ids": IDS[:1], "cu_seqlens": (0, 7, 41)}, None)
    with pytest.raises(ValueError, match=r"might run into each other .* pack on two ranks"):
        model(packed["input_ids"], layout=packed["layout"])


def unsplit_in_one_thread():
    """What its library made of it one model is there only, and other models nowhere."""
    model, local, _ = split("bamba")
    other, copied = split("bamba")[0], copy.deepcopy(model)
    arguments = {name: local[name] for name in ("input_ids", "layout")}
    expected = model(**arguments).logits
    whole = {"input_ids": IDS}

    def elsewhere():
        for found in (other, copied):
            assert torch.equal(found(**arguments).logits, expected)
        for use in (model, lambda **_: lasp.unsplit(model).__enter__()):
            with pytest.raises(RuntimeError, match="as its library made it while another thread is"):
                use(**arguments)

    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        with lasp.unsplit(model):
            of_whole = model(**whole).logits
            pool.submit(torch.no_grad()(elsewhere)).result()
            with lasp.unsplit(model):
                assert torch.equal(model(**whole).logits, of_whole)
            assert torch.equal(model(**whole).logits, of_whole)
        assert torch.equal(model(**arguments).logits, expected)
        assert pool.submit(torch.no_grad()(model), **arguments).result().logits.shape == expected.shape
    start, end = local["layout"].bounds(torch.distributed.get_rank())
    assert foreign.relative(of_whole[:, start:end], expected) < 1e-4


def test_what_its_library_made_of_a_model_is_of_one_thread():
    run_ranks(2, unsplit_in_one_thread)


def unknown_mask(name, more, message):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    configs = importlib.import_module(foreign.file_of(name, "configuration"))
    prefix = {"gpt_oss": "GptOss", "gemma3": "Gemma3", "llama4": "Llama4"}[name]
    kind = getattr(configs, f"{prefix}TextConfig", None) or getattr(configs, f"{prefix}Config")
    config = kind(**{**foreign.COMMON, "head_dim": 8, **more})
    model = getattr(importlib.import_module(foreign.file_of(name)), f"{prefix}ForCausalLM")(config)
    if name == "llama4":
        with pytest.raises(ValueError, match=message):
            lasp.parallelize(model, mesh["sp"], strict=False)
        return
    lasp.parallelize(model, mesh["sp"], strict=False)
    local = lasp.shard_batch({"input_ids": IDS}, mesh, pad=False)
    if message is None:
        assert lasp.verify(model, mesh).ok
        return
    with pytest.raises(ValueError, match=message):
        model(local["input_ids"], layout=local["layout"])


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}, "s_aux"),
        ("llama4", {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 16}, "no layer"),
        ("gemma3", {"sliding_window": 9, "query_pre_attn_scalar": 8}, None),
    ],
)
def test_a_mask_that_lasp_has_not_got_is_refused(name, more, message):
    run_ranks(2, unknown_mask, name, more, message)


def interrupted():
    """After Ctrl-C in a forward, of which PyTorch tells no hook, the next call is a call of its own."""
    model, local, _ = split("mamba2")
    call = {"input_ids": local["input_ids"], "layout": local["layout"]}
    expected = model(**call).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.backbone.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**call)
    handle.remove()
    with pytest.raises(ValueError, match="layout is needed"):
        model(local["input_ids"])
    assert torch.equal(model(**call).logits, expected)


def test_an_interrupt_leaves_nothing_behind():
    run_ranks(2, interrupted)


def taken_out():
    model, local, _ = split("llama")
    call = {"input_ids": local["input_ids"], "layout": local["layout"]}
    model(**call)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"attn_implementation must stay .*, got 'sdpa'"):
        model(**call)


def test_attention_that_is_taken_out_of_the_registry_is_an_error():
    run_ranks(2, taken_out)


def router_of_padding():
    """The layout's padding is no token, a mask may be positional, and a tuple would hide the loss of a slice."""
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    mask = torch.ones(2, 41, dtype=torch.int64)
    mask[1, 30:] = 0
    reference = foreign.build("qwen3_next", torch.float32)
    whole = [reference(**x, use_cache=False, output_router_logits=True).aux_loss for x in _with_and_without(mask)]
    model, _, _ = split("qwen3_next")
    found = []
    for batch in _with_and_without(mask):
        local = lasp.shard_batch(batch, mesh)  # 41 tokens are padded to 42
        given = (local["input_ids"], local["attention_mask"]) if "attention_mask" in local else (local["input_ids"],)
        found.append(model(*given, layout=local["layout"], output_router_logits=True).aux_loss)
    torch.testing.assert_close(found, whole)
    with pytest.raises(ValueError, match="output_router_logits needs return_dict=True"):
        model(*given, layout=local["layout"], output_router_logits=True, return_dict=False)


def _with_and_without(mask):
    return {"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask}


def test_the_router_s_loss_counts_no_padding():
    run_ranks(2, router_of_padding)


def decays_made_once():
    """MiniMax's are made of the layer's formula once, and those of an evaluation serve a training."""
    model, local, _ = split("minimax")
    kind = next(type(m) for m in model.modules() if hasattr(m, "get_slope_rate"))
    formula, made = kind.get_slope_rate, []
    kind.get_slope_rate = lambda self, device=None: made.append(self.layer_idx) or formula(self, device)
    try:
        with torch.inference_mode():
            evaluated = model(local["input_ids"], layout=local["layout"]).logits
        for _ in range(2):
            trained = model(local["input_ids"], layout=local["layout"]).logits
            trained.sum().backward()
    finally:
        kind.get_slope_rate = formula
    assert made == [0, 2]  # the layers that are linear
    assert torch.equal(trained, evaluated)


def test_decays_are_made_once():
    run_ranks(2, decays_made_once)


def given_positions():
    """Positions that a user gives decide over frequencies that follow the largest."""
    more = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 24,
    }
    positions = (torch.arange(41) - 12).clamp(min=0).expand(2, -1)
    mask = (torch.arange(41) >= 12).long().expand(2, -1)
    batch = {"input_ids": IDS, "position_ids": positions, "attention_mask": mask}
    whole = foreign.build("llama", torch.float32, **more)(**batch, use_cache=False).logits
    model, _, mesh = split("llama", **more)
    local = lasp.shard_batch(batch, mesh, pad=False)
    got = model(**{key: local[key] for key in (*batch, "layout")}).logits
    start, end = local["layout"].bounds(mesh["sp"].get_local_rank())
    real = local["attention_mask"] != 0
    assert foreign.relative(got[real], whole[:, start:end][real]) < 1e-5


def test_rotary_that_follows_given_positions():
    run_ranks(2, given_positions)


def saved_for_another_process(path):
    model, _, _ = split("llama")
    if torch.distributed.get_rank() == 0:
        torch.save(model.eval(), path / "model.pt")
        torch.save(foreign.build("llama", torch.float32).eval()(IDS, use_cache=False).logits, path / "logits.pt")


def test_a_pickled_model_runs_in_another_process(tmp_path):
    run_ranks(2, saved_for_another_process, tmp_path)
    code = (
        "import sys, torch\n"
        "folder = sys.argv[1]\n"
        "model = torch.load(f'{folder}/model.pt', weights_only=False)\n"
        "ids = torch.randint(3, 97, (2, 41), generator=torch.Generator().manual_seed(5))\n"
        "torch.testing.assert_close(model(ids, use_cache=False).logits, torch.load(f'{folder}/logits.pt'))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env, timeout=90
    )
    assert done.returncode == 0, done.stderr[-2000:]


def compiled(name):
    model, local, _ = split(name)
    torch._dynamo.reset()
    inputs = {"input_ids": local["input_ids"], "layout": local["layout"]}
    expected = model(**inputs).logits
    expected.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    found = torch.compile(model, backend="aot_eager")(**inputs).logits
    assert foreign.relative(found, expected) < 1e-5
    found.square().mean().backward()
    for p, g in zip(model.parameters(), gradients):
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["minimax", "bamba", "llama"])
def test_compiled_models_are_the_same(name):
    run_ranks(2, compiled, name)
