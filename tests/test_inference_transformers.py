"""Prompts of transformers' models over ranks, and the library's own `generate` behind them, against the library alone.

In fp64, of which the library gives logits in fp32. Rows of different lengths are padded on the left, and each is
compared with what the library makes of it by itself.
"""

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from ranks import mesh_of, run_ranks
from scripts import run_script

import lasp
from lasp.data_parallel import wrap_fsdp2

pytest.importorskip("transformers", reason="needs the extra `transformers`")

import foreign

LENGTHS = (41, 20, 3)  # of prompts: past a window of 9, no multiple of anything, and less than a convolution's width
WIDTH = max(LENGTHS)
SEGMENT = 13
OPTIONS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
OPTIONS |= {"eos_token_id": None, "pad_token_id": 0}

# MLA keeps compressed keys; RecurrentGemma keeps its states in the layers.
REFUSED = {"recurrent_gemma": "layers.0.temporal_block", "kimi_linear": "", "bailing_hybrid": "", "deepseek_v2": ""}
REFUSED |= {name: "layers.1.self_attn" for name in ("kimi_linear", "bailing_hybrid")}
REFUSED["deepseek_v2"] = "layers.0.self_attn"
FILLED = [name for name in foreign.MODELS if name not in REFUSED]
TWO = ["minimax", "bamba", "mamba2", "qwen3_next", "zamba2", "mistral"]  # that run on two ranks, too
# The library limits the time steps of Mamba-2 in a prompt and not in a step, so that its own last token differs.
STEP_DIFFERS = {"nemotron_h": 1e-4, "zamba2": 1e-4}


def build(name, dtype=torch.float64, **more):
    if name == "minimax":  # of whose batches with padding the library makes the right thing so only
        more.setdefault("layer_types", ["full_attention", "linear_attention", "linear_attention"])
    return foreign.build(name, dtype, **more).eval()


def prompts():
    """ids and mask [3, WIDTH], padded on the left with what no row may see."""
    ids = torch.randint(3, 97, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(3))
    mask = torch.stack([torch.arange(WIDTH) >= WIDTH - length for length in LENGTHS]).long()
    return ids, mask


def generated(model, ids, tokens, **more):
    """The new tokens, and the logits that they were chosen by, [B, N, words]."""
    found = model.generate(ids, max_new_tokens=tokens, **OPTIONS, **more)
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1)


def alone(model, rows, tokens):
    """Of each row [T] by itself, by the library, which takes a token 0 for padding where no mask says otherwise."""
    found = [generated(model, row[None], tokens, attention_mask=torch.ones_like(row[None])) for row in rows]
    return [torch.cat(x) for x in zip(*found)]


def compare(got, expected, name):
    assert torch.equal(got[0], expected[0]), name
    error = foreign.relative(got[1], expected[1])
    assert error < STEP_DIFFERS.get(name, 1e-6), (name, error)


def behind(model, state, ids, tokens):
    """What the library makes behind a state."""
    with lasp.unsplit(model):
        inputs = lasp.library_inputs(model, state, ids)
        return generated(model, inputs.pop("input_ids"), tokens, **inputs)


SAID = 12  # tokens of the first turn


@functools.cache
def conversation(name):
    """What the library says by itself to `prompts`, and behind that to some tokens more; and those of both turns."""
    model, (ids, mask) = build(name), prompts()
    rows = [row[real.bool()] for row, real in zip(ids, mask)]
    first = alone(model, rows, SAID)
    said = torch.cat([ids[:, -1:], first[0], ids[:, 20:26]], 1)
    return first, said, alone(model, [torch.cat([row[:-1], more]) for row, more in zip(rows, said)], 4)


def converse(model, mesh, name, conversation):
    """The same with the prompts by lasp; returns the state behind the second."""
    (ids, mask), (first, said, second) = prompts(), conversation
    state = lasp.prefill(model, ids[:, :-1], mesh, attention_mask=mask[:, :-1], segment=SEGMENT)
    assert state.lengths == tuple(length - 1 for length in LENGTHS)
    compare(behind(model, state, ids[:, -1:], SAID), first, name)
    state = lasp.prefill(model, said[:, :-1], mesh, state=state, segment=SEGMENT)
    compare(behind(model, state, said[:, -1:], 4), second, name)
    return state


@pytest.mark.parametrize("name", FILLED)
def test_the_librarys_generate_goes_on_behind_a_prompt(name, tmp_path):
    model = build(name)
    before = {key: dict(vars(m)) for key, m in model.named_modules()}
    state = converse(model, None, name, conversation(name))
    assert {key: dict(vars(m)) for key, m in model.named_modules()} == before
    state.save(tmp_path / "state")
    loaded = lasp.InferenceState.load(tmp_path / "state")
    compare(behind(model, loaded, conversation(name)[1][:, -1:], 4), conversation(name)[2], name)


def _over_ranks(conversations):
    torch.set_num_threads(1)
    mesh, (ids, mask) = mesh_of(sp=torch.distributed.get_world_size()), prompts()
    for name, told in conversations.items():
        model = build(name)
        whole = model(input_ids=ids, use_cache=False).logits
        split = lasp.parallelize(copy.deepcopy(model), mesh["sp"], strict=False, validate="off")
        state = converse(split, mesh, name, told)
        if name in ("bamba", "minimax"):  # behind a state of ranks, a model that is not split
            compare(behind(model, state, told[1][:, -1:], 4), told[2], name)
        if name == "bamba":  # and one of the ranks by itself
            rank = mesh["sp"].get_local_rank()
            of_one = lasp.prefill(split, ids[:, :-1], attention_mask=mask[:, :-1], to=1)
            assert (of_one is None) is (rank != 1)
            if of_one is not None:
                compare(behind(split, of_one, ids[:, -1:], SAID), told[0], name)
        local = lasp.shard_batch({"input_ids": ids}, mesh, pad=False)  # and it is split as before
        got = split(local["input_ids"], layout=local["layout"]).logits
        first, last = local["layout"].bounds(mesh["sp"].get_local_rank())
        assert foreign.relative(got, whole[:, first:last]) < 1e-11, name
    return state.logits


@pytest.mark.parametrize(("world", "names"), [(2, TWO), (3, FILLED)])
def test_ranks_give_the_library_what_one_gives(world, names):
    found = run_ranks(world, _over_ranks, {name: conversation(name) for name in names}, timeout=200.0)
    assert all(torch.equal(logits, found[0]) for logits in found)


# What the library has, and what it has not


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_cache_cannot_be_filled_is_refused_before_its_prompt(name):
    model, (ids, _) = build(name), prompts()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"cache lasp can fill.*got a .*ForCausalLM: .*layer 'model.{REFUSED[name]}'"
        ):
            lasp.prefill(model, ids)


class Wraps(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, **more):
        return self.model(input_ids, **more)


def test_what_is_no_model_of_transformers_is_refused():
    model, (ids, _) = build("llama"), prompts()
    with pytest.raises(ValueError, match=r"got a Wraps, which has no generate\(\)"):
        lasp.prefill(Wraps(lasp.parallelize(build("llama"), None)), ids)
    for call in (lasp.generate, lasp.stream_tokens):
        with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn' another library wrote.*library_inputs"):
            call(model, ids, max_new_tokens=1)
    own = lasp.models.TNL(lasp.models.TNLConfig(97, 1, 16, 2, 16))
    with pytest.raises(ValueError, match=r"model must be one of transformers, got a TNL: lasp.generate is for it"):
        lasp.library_inputs(own, lasp.prefill(own, ids), ids[:, -1:])


def test_wrong_inputs():
    model, (ids, _) = build("llama"), prompts()
    right = {"model": model, "state": lasp.prefill(model, ids), "ids": ids[:, -1:]}
    lasp.library_inputs(**right)
    for name, value, error, says in (
        ("model", 5, TypeError, "model must be a torch.nn.Module, got 5"),
        ("model", torch.nn.Linear(1, 1), ValueError, "model must be one of transformers, got a Linear"),
        ("model", build("mistral"), ValueError, "state must be of the model that it is given with, Mistral"),
        ("state", None, TypeError, "state must be an InferenceState, of lasp.prefill, got None"),
        ("state", ids, TypeError, "state must be an InferenceState"),
        ("state", right["state"].select([0]), ValueError, "state must have as many rows as ids, 3, got 1"),
        ("ids", None, TypeError, "ids must be a tensor"),
        ("ids", ids[:, -1:].double(), TypeError, "ids must"),
        ("ids", ids[:, :0], ValueError, "ids must have at least one token in each row"),
        ("ids", ids[:, -1:] + 97, ValueError, "ids must be of the model's 97 tokens"),
        ("ids", ids[:, -2:], ValueError, "ids must be one token a row, got 2: those before it are for lasp.prefill"),
        ("ids", [[1], [1], [1, 2]], ValueError, "ids must be one token a row, got 2"),
    ):
        with pytest.raises(error, match=re.escape(says)):
            lasp.library_inputs(**{**right, name: value})


def test_a_state_that_is_not_what_the_library_holds_is_found(monkeypatch):
    """Before a prompt runs, and by its numbers: shapes are right."""
    from lasp.adapters import caches, transformers

    ids, _ = prompts()
    scan = transformers.mamba2_scan
    monkeypatch.setattr(
        transformers, "mamba2_scan", lambda x, dt, A, *more, **ranks: scan(x, dt, 30 * A, *more, **ranks)
    )
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.mamba' holds other state \(linear_attention\)"):
        lasp.prefill(build("bamba"), ids)
    monkeypatch.undo()
    monkeypatch.setitem(caches._STATES, "linear_attention", lambda x: x)  # heads of 8 channels, states of 16
    with pytest.raises(
        ValueError, match=r"'model.layers.0.mamba' holds state of shape \(1, 8, 16, 8\), and the model's"
    ):
        lasp.prefill(build("bamba"), ids)


def test_minimax_as_the_library_makes_it():
    """Where its first layer has no keys its batches with padding are wrong, also without lasp."""
    (ids, mask), types = prompts(), ["linear_attention", "full_attention", "linear_attention"]
    model = build("minimax", layer_types=types)
    state = lasp.prefill(model, ids[:, :-1])
    compare(behind(model, state, ids[:, -1:], 5), alone(model, ids, 5), "minimax")
    state = lasp.prefill(model, ids[:, :-1], attention_mask=mask[:, :-1])
    with pytest.raises(ValueError, match=r"state must have rows of one length for a MiniMax.*got \(40, 19, 2\)"):
        lasp.library_inputs(model, state, ids[:, -1:])
    windowed = build("minimax", sliding_window=7)  # which its cache knows nothing of
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn' holds .* a window of 7 tokens, .* cache those of all"
    ):
        lasp.prefill(windowed, ids)


@pytest.mark.parametrize("name", ["bamba", "qwen3_next", "mistral", "mamba"])
def test_dtypes_of_the_library(name):
    """Logits are as near as those of the library's own prompt; a cache is in its dtypes."""
    ids, _ = prompts()
    exact = alone(build(name), ids, 1)[1]
    for dtype in (torch.float32, torch.bfloat16):
        model = build(name, dtype)
        with torch.no_grad():
            theirs = caches_of(model(input_ids=ids[:, :-1], use_cache=True).cache)
        state = lasp.prefill(model, ids[:, :-1], segment=SEGMENT)
        ours = caches_of(lasp.library_inputs(model, state, ids[:, -1:])["cache"])
        assert {slot: (x.dtype, x.shape) for slot, x in ours.items()} == {
            slot: (x.dtype, x.shape) for slot, x in theirs.items()
        }
        errors = [
            (logits.double() - exact).square().mean().sqrt()
            for logits in (behind(model, state, ids[:, -1:], 1)[1], alone(model, ids, 1)[1])
        ]
        assert errors[0] < 1.5 * errors[1] + (1e-5 if dtype == torch.float32 else 1e-2), errors


def caches_of(cache):
    from lasp.adapters.caches import slots_of

    return slots_of(cache)


def _dynamic():
    """Rotary positions that follow the largest one, and routers that return their loss."""
    torch.set_num_threads(1)
    mesh, (ids, _) = mesh_of(sp=2), prompts()
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for name, more in (
        ("llama", {"rope_parameters": rope, "max_position_embeddings": 16}),
        ("qwen3_next", {"output_router_logits": True}),
    ):
        model = build(name, **more)
        with torch.no_grad():
            theirs = caches_of(model(input_ids=ids[:, :-1], use_cache=True).cache)
        split = lasp.parallelize(model, mesh["sp"], strict=False)
        state = lasp.prefill(split, ids[:, :-1], segment=50)
        ours = caches_of(lasp.library_inputs(split, state, ids[:, -1:])["cache"])
        for slot, x in theirs.items():
            assert foreign.relative(ours[slot][..., 1:], x[..., 1:]) < 1e-11, slot


def test_what_a_model_makes_of_all_tokens():
    run_ranks(2, _dynamic)


def test_code_that_comes_with_weights_has_a_cache_of_its_own():
    import remote_models

    model = remote_models.build(next(iter(remote_models.MODELS)), torch.float64)
    with pytest.raises(
        ValueError, match=r"cache lasp can fill.* is one of transformers_modules, which has a cache of its"
    ):
        lasp.prefill(model, torch.ones(1, 9, dtype=torch.int64))


def _sharded(told):
    torch.set_num_threads(1)
    mesh = mesh_of(sp=2)
    converse(wrap_fsdp2(lasp.parallelize(build("bamba"), mesh["sp"], strict=False), mesh), mesh, "bamba", told)


def test_weights_may_be_sharded():
    run_ranks(2, _sharded, conversation("bamba"))


def test_the_page_shows_what_runs(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.save_pretrained(tmp_path)
    model, (ids, _) = build("bamba", torch.float32, eos_token_id=None), prompts()
    model.save_pretrained(tmp_path)
    (tmp_path / "PROMPT.txt").write_text(tokenizer.decode(ids[0]))
    expected = tokenizer.decode(model.generate(ids[:1], max_new_tokens=20)[0, WIDTH:])
    assert len(expected.split()) == 20
    page = (Path(__file__).parent.parent / "docs" / "inference.md").read_text()
    (code,) = re.findall(r"```python\n# long_prompt.py\n(.*?)```", page, re.DOTALL)
    script = f"import sys\nsys.argv = ['', {str(tmp_path)!r}, {str(tmp_path / 'PROMPT.txt')!r}]\n{code}"
    (ended, out, error), second = run_script(script, 2)
    assert ended == second[0] == 0, error + second[2]
    assert out.strip() == expected
    assert not second[1]
