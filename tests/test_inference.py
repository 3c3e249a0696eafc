"""Prompts and tokens behind them: what one forward over all of them gives, whatever way they came."""

import copy
import functools
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ranks import mesh_of, run_ranks
from streamed_models import (
    Blocks,
    Conv,
    Delta,
    Elementwise,
    Grouped,
    Initial,
    Normalised,
    PerChannel,
    PerHead,
    Selective,
    Shift,
    Window,
)
from streamed_models import Model as Streamed
from torch import nn

import lasp
from lasp import arguments
from lasp.data_parallel import wrap_fsdp2
from lasp.inference.decode import Decoding
from lasp.inference.run import Runner
from lasp.inference.sampling import Sampling, number_of
from lasp.models import TNL, Decoder, DecoderConfig, LinearTransformer, LinearTransformerConfig, TNLConfig
from lasp.models.mixers import MIXERS
from lasp.modules import Router

WORDS = 19
SIZE = (WORDS, 2, 16, 2, 16)  # words, layers, width, heads, inner channels
TOKENS, PROMPT = 77, 71  # past a block of 64; a prompt that no number of ranks divides


def decoder(family, **changes):
    layers = 4 if "pattern" in changes else 2
    return Decoder(DecoderConfig(family, WORDS, layers, *SIZE[2:], **changes))


MODELS = {
    "tnl": lambda: TNL(TNLConfig(*SIZE)),
    "linear_transformer": lambda: LinearTransformer(LinearTransformerConfig(*SIZE)),
    "normalised": lambda: LinearTransformer(LinearTransformerConfig(*SIZE, normalize=True)),
    **{family: lambda family=family: decoder(family) for family in MIXERS},
    "hybrid": lambda: decoder("gla", pattern="LLLS"),
    "tpe": lambda: decoder("cosformer2", tpe=True),
    "experts": lambda: decoder("retnet", experts=4, attention_experts=2),
    "of a user": lambda: Streamed(PerHead, Normalised, Initial, PerChannel, Delta, Elementwise, Selective),
    "of a user, with tokens": lambda: Streamed(Conv, Shift, Window, Grouped, Blocks),
}


def model_of(name, dtype=torch.float64):
    torch.manual_seed(1)
    model = MODELS[name]()
    with torch.no_grad():
        model.head.weight.mul_(10)  # logits that differ
    return model.to(dtype).eval()


def ids_of(rows=2, tokens=TOKENS, seed=0):
    return torch.randint(WORDS, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model, ids):
    """[B, T, words] in one forward."""
    return model(ids, position_ids=torch.arange(ids.shape[1], device=ids.device).expand(ids.shape))


def decoded(model, state, ids, mesh=None):
    """Logits behind each of these tokens, one step after the other."""
    decoding = Decoding(Runner(model, mesh), state.fork(), cuda_graph=True)
    found = []
    for token in ids.unbind(1):
        decoding.step(token)
        found.append(decoding.logits.clone())
    return torch.stack(found, 1), decoding.state(goes_on=False)


def same(a, b):
    """Two states, to the last bit."""
    assert a.held.keys() == b.held.keys()
    assert a.lengths == b.lengths
    tensors = zip(a._tensors(used=True).values(), b._tensors(used=True).values())
    return all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_and_steps_give_what_one_forward_gives(name):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        model, ids = model_of(name, dtype), ids_of()
        expected = logits_of(model, ids)
        state = lasp.prefill(model, ids[:, :PROMPT], segment=13)
        assert state.logits.dtype == dtype
        torch.testing.assert_close(state.logits, expected[:, PROMPT - 1], atol=bound, rtol=bound)
        before = state.fork()
        found, behind = decoded(model, state, ids[:, PROMPT:])
        torch.testing.assert_close(found, expected[:, PROMPT:], atol=bound, rtol=bound)
        assert same(state, before)  # Decoding had a copy
        assert behind.lengths == (TOKENS, TOKENS)
        again = lasp.prefill(model, ids[:, PROMPT:], state=state)  # a second turn
        torch.testing.assert_close(again.logits, expected[:, -1], atol=bound, rtol=bound)
        assert same(state, before)
        if not any(held.grows for held in state.held.values()):
            assert behind.nbytes == lasp.prefill(model, ids[:, :3]).nbytes == again.nbytes


LENGTHS = (9, 70, 3, 9)


@pytest.mark.parametrize("name", ["tnl", "transnormer", "mamba2", "hybrid", "of a user, with tokens"])
def test_rows_of_different_lengths_are_each_what_they_are_alone(name):
    model, ids = model_of(name), ids_of(4)
    rows = [row[:length] for row, length in zip(ids, LENGTHS)]
    options = {"max_new_tokens": 7, "do_sample": True, "temperature": 1.3, "top_k": 15, "repetition_penalty": 1.2}
    found = lasp.generate(model, rows, seed=[5, 6, 7, 8], **options)
    for row, prompt in enumerate(rows):
        alone = lasp.generate(model, prompt, seed=5 + row, **options)
        assert torch.equal(found.ids[row], alone.ids[0])
        torch.testing.assert_close(found.state.logits[row], alone.state.logits[0], atol=1e-12, rtol=1e-12)
        whole = torch.cat([prompt, found.ids[row]])[None]
        torch.testing.assert_close(found.state.logits[row], logits_of(model, whole)[0, -1], atol=1e-12, rtol=1e-12)
        assert found.state.lengths[row] == whole.shape[1]
        assert found.state.seen[row].nonzero().flatten().tolist() == sorted(set(whole[0].tolist()))
    more = [row[-length:] for row, length in zip(ids, (3, 7, 7, 1))]  # behind different numbers of tokens
    again = lasp.prefill(model, more, state=found.state)
    for row, prompt in enumerate(rows):
        whole = torch.cat([prompt, found.ids[row], more[row]])[None]
        torch.testing.assert_close(again.logits[row], logits_of(model, whole)[0, -1], atol=1e-12, rtol=1e-12)
        assert again.lengths[row] == whole.shape[1]
    packed = lasp.generate(model, torch.cat(rows)[None], cu_seqlens=[0, 9, 79, 82, 91], seed=[5, 6, 7, 8], **options)
    assert torch.equal(packed.ids, found.ids)
    assert same(packed.state, found.state)


@pytest.mark.parametrize("name", ["tnl", "delta_net", "mamba", "hybrid"])
def test_padding_never_enters_a_state(name):
    model, ids = model_of(name), ids_of(4) % (WORDS - 1)
    with torch.no_grad():
        model.embedding.weight[-1] = torch.nan  # whoever sees padding is NaN
        model.head.weight[-1] = 0.0  # and it is not generated
    rows = [row[:length] for row, length in zip(ids, LENGTHS)]
    expected = lasp.generate(model, rows, max_new_tokens=4)
    assert expected.state.logits.isfinite().all()
    for left in (True, False):
        padded, mask = torch.full((4, 75), WORDS - 1), torch.zeros(4, 75, dtype=torch.int64)
        for number, row in enumerate(rows):
            place = slice(75 - len(row), 75) if left else slice(0, len(row))
            padded[number, place], mask[number, place] = row, 1
        for options in ({"attention_mask": mask}, {"pad_token_id": WORDS - 1}):
            found = lasp.generate(model, padded, max_new_tokens=4, **options)
            assert torch.equal(found.ids, expected.ids)
            assert same(found.state, expected.state)
            assert same(lasp.prefill(model, padded, **options), lasp.prefill(model, rows))


# One session and others


@pytest.mark.parametrize("name", ["tnl", "gated_delta_net", "rglru", "hybrid"])
def test_interleaved_sessions_have_the_bits_of_each_alone(name):
    model, ids = model_of(name, torch.float32), ids_of(3)
    calls = [
        (ids[:1, :50], {"max_new_tokens": 9, "do_sample": True, "seed": 3}),
        (ids[1:, :20], {"max_new_tokens": 5}),
    ]
    alone = [lasp.generate(model, prompt, **options) for prompt, options in calls]
    streams = [lasp.stream_tokens(model, prompt, **options) for prompt, options in calls]
    steps = [[], []]
    while not all(stream.over for stream in streams):
        for stream, tokens in zip(streams, steps):
            tokens += [x for x in [next(stream, None)] if x is not None]
            logits_of(model, ids)  # and somebody else
    for expected, stream, tokens in zip(alone, streams, steps):
        assert torch.equal(torch.tensor(tokens).T, expected.ids)
        assert torch.equal(stream.result().ids, expected.ids)
        assert same(stream.result().state, expected.state)


@pytest.mark.parametrize("name", ["tnl", "mamba2", "transnormer", "hybrid"])
def test_a_saved_state_goes_on_bit_by_bit(tmp_path, name):
    model, ids = model_of(name, torch.float32), ids_of()
    rows = [ids[0, :30], ids[1, :5]]
    options = {"do_sample": True, "seed": 4, "repetition_penalty": 1.3}
    whole = lasp.generate(model, rows, max_new_tokens=8, **options)
    first = lasp.generate(model, rows, max_new_tokens=3, **options)
    first.state.save(tmp_path / "state")
    first.state.save(tmp_path / "state")  # in its place
    loaded = lasp.InferenceState.load(tmp_path / "state")
    assert [x.name for x in tmp_path.iterdir()] == ["state"]
    assert same(loaded, first.state)
    second = lasp.generate(model, None, state=loaded, max_new_tokens=5, **options)
    assert torch.equal(torch.cat([first.ids, second.ids], 1), whole.ids)
    assert same(second.state, whole.state)


def test_a_file_that_is_no_state_of_the_model_is_refused(tmp_path):
    model = model_of("tnl")
    state = lasp.prefill(model, ids_of())
    state.save(path := tmp_path / "state")
    content = path.read_bytes()
    cuts = content[:-9], content[:7], b"", content[:-1] + bytes([content[-1] ^ 1])
    told = b"[77, 77]", b"linear_attention", b'"model"', b'"lengths"', b"checksum", b"false"  # of the numbers
    flipped = (content.replace(x, bytes([*x[:-2], x[-2] ^ 1, x[-1]])) for x in told)
    for changed in (*cuts, *flipped):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"path must be a.*file.*InferenceState"):
            lasp.InferenceState.load(path)
    with pytest.raises(FileNotFoundError):
        lasp.InferenceState.load(tmp_path / "none")
    for other in (model_of("gla"), model_of("tnl", torch.float32), TNL(TNLConfig(WORDS, 2, 16, 2, 24)).double()):
        with pytest.raises(ValueError, match="state must be of the model that it is given with"):
            lasp.generate(other, None, state=state, max_new_tokens=1)
    with pytest.raises(ValueError, match="state must have as many rows as ids, 3, got 2"):
        lasp.prefill(model, ids_of(3), state=state)


def test_a_write_that_fails_leaves_the_file_of_before(tmp_path, monkeypatch):
    state = lasp.prefill(model_of("tnl"), ids_of())
    state.save(path := tmp_path / "state")
    content = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="the disk is full"):
        lasp.prefill(model_of("tnl"), ids_of(1)).save(path)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_a_state_are_taken_and_put_together():
    model, ids = model_of("hybrid"), ids_of(3)
    rows = [ids[0, :5], ids[1, :40], ids[2, :5]]
    state = lasp.prefill(model, rows)
    found, expected = state.select([2, 0]), lasp.prefill(model, [rows[2], rows[0]])
    assert found.lengths == expected.lengths
    for a, b in zip(found._tensors(used=True).values(), expected._tensors(used=True).values(), strict=True):
        # Not to the bit: on some processors a row's products depend on its place in the batch.
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert same(lasp.InferenceState.join([state.select([0, 1]), state.select([2])]), state)
    both = lasp.generate(model, None, state=state.select([1, 1]), max_new_tokens=3)
    assert torch.equal(both.ids[0], both.ids[1])
    assert state.lengths == (5, 40, 5)


# Ends, and what is drawn


class Heard:
    def __init__(self):
        self.put_, self.ended = [], 0

    def put(self, tokens):
        self.put_.append(tokens.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("name", ["tnl", "hybrid"])
def test_rows_end_by_themselves(name):
    model, ids = model_of(name), ids_of(3, 11)
    free = lasp.generate(model, ids, max_new_tokens=12, do_sample=True, temperature=2.0, seed=1)
    tokens = free.ids.tolist()
    ends = [tokens[0][2], tokens[1][5]]
    first = [next((i + 1 for i, x in enumerate(row) if x in ends), 12) for row in tokens]
    assert len(set(first)) > 1
    heard = Heard()
    options = {"do_sample": True, "temperature": 2.0, "seed": 1}
    found = lasp.generate(model, ids, max_new_tokens=12, eos_token_id=ends, pad_token_id=17, streamer=heard, **options)
    assert found.lengths == tuple(first)
    for row, length in enumerate(first):
        assert found.ids[row].tolist() == tokens[row][:length] + [17] * (max(first) - length)
        whole = torch.cat([ids[row], free.ids[row, :length]])[None]
        expected = lasp.prefill(model, whole)
        torch.testing.assert_close(found.state.logits[row], expected.logits[0], atol=1e-12, rtol=1e-12)
        assert found.state.lengths[row] == expected.lengths[0]
        assert torch.equal(found.state.seen[row], expected.seen[0])
        for key, held in found.state.select([row]).held.items():
            torch.testing.assert_close(held.x, expected.held[key].x, atol=1e-11, rtol=1e-11)
    assert heard.put_[0] == ids.tolist()
    assert heard.put_[1:] == found.ids.T.tolist()
    assert heard.ended == 1
    stream = lasp.stream_tokens(model, ids, max_new_tokens=12, eos_token_id=ends, **options)
    while not stream.over:
        next(stream)
        between = stream.result()  # which changes nothing
        assert between.state.lengths == tuple(11 + length for length in between.lengths)
    assert same(between.state, found.state)
    by_number = lasp.generate(model, ids, max_new_tokens=[2, 12, 7], **options)
    assert by_number.lengths == (2, 12, 7)
    assert by_number.ids[2].tolist() == tokens[2][:7] + [0] * 5
    stopped = lasp.generate(model, ids, max_new_tokens=12, stop=[tokens[0][3:5], [18, 18, 18, 18]], **options)
    assert stopped.lengths[0] <= 5
    assert stopped.ids[0, : stopped.lengths[0]].tolist() == tokens[0][: stopped.lengths[0]]
    assert tokens[0][3:5] == stopped.ids[0, stopped.lengths[0] - 2 : stopped.lengths[0]].tolist()


def test_numbers_may_be_of_numpy():
    model, ids = model_of("tnl"), ids_of(2, 11)
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "seed": 3}
    end = lasp.generate(model, ids, **options).ids[0, 2].item()
    expected = lasp.generate(model, ids, eos_token_id=end, **options)
    for number in (np.int64, np.int32, lambda value: np.array([value, value])):
        found = lasp.generate(model, ids, eos_token_id=number(end), **{**options, "max_new_tokens": number(6)})
        assert torch.equal(found.ids, expected.ids)
        assert found.lengths == expected.lengths
    found = lasp.generate(model, ids, eos_token_id=end, **{**options, "seed": np.int64(3)})
    assert torch.equal(found.ids, expected.ids)
    for name in ("eos_token_id", "max_new_tokens", "seed"):  # reading a tensor may wait for a device
        with pytest.raises(TypeError, match=rf"^{name} must be an integer, got a tensor \(\) of torch.int64 on cpu$"):
            lasp.generate(model, ids, **{**options, name: torch.tensor(3)})


def test_a_row_draws_by_its_own_seed():
    model, ids = model_of("tnl"), ids_of(1).expand(3, -1)
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5}
    found = lasp.generate(model, ids, seed=[5, 5, 6], **options).ids
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(lasp.generate(model, ids, seed=4, **options).ids[1:], found[[0, 2]])
    torch.manual_seed(0)
    drawn = lasp.generate(model, ids, **options).ids
    assert not torch.equal(drawn[0], drawn[1])
    torch.manual_seed(0)
    assert torch.equal(lasp.generate(model, ids, **options).ids, drawn)
    assert not torch.equal(lasp.generate(model, ids, **options).ids, drawn)


def test_tokens_are_drawn_as_often_as_they_are_probable():
    scores = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -torch.inf]]).expand(20000, -1)
    numbers = [number_of(7, position) for position in range(20000)]
    drawn = Sampling(do_sample=True).choose(scores, torch.zeros_like(scores).bool(), numbers)
    shares = drawn.bincount(minlength=5) / 20000
    assert (shares - scores[0].softmax(-1)).abs().max() < 0.01
    ends = Sampling(do_sample=True).choose(scores[:2], torch.zeros(2, 5).bool(), [0.0, 1 - 2.0**-53])
    assert ends.tolist() == [0, 3]
    last = torch.tensor([[-torch.inf, 0.3, 0.1, -torch.inf]])
    assert Sampling(do_sample=True).choose(last, torch.zeros(1, 4).bool(), [1 - 2.0**-53]).tolist() == [2]


# The model


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise RuntimeError("as it was told")
        return x


def attributes(model):
    return [
        {name: dict(x) if isinstance(x, dict) else x for name, x in vars(m).items() if name != "_on_device"}
        for m in model.modules()
    ]


def test_the_model_is_left_as_it_was():
    model = model_of("experts").train()
    model.blocks[1].eval()
    model.blocks[0].norm = nn.Sequential(model.blocks[0].norm, fails := Fails())
    ids = ids_of()
    logits_of(model, ids)  # after which routers have counted
    before = attributes(model)
    state = lasp.prefill(model, ids)
    stream = lasp.stream_tokens(model, ids, max_new_tokens=3)
    next(stream)
    assert attributes(model) == before
    fails.fails = True
    for call in (
        lambda: lasp.prefill(model, ids),
        lambda: lasp.generate(model, None, state=state, max_new_tokens=2),
        lambda: next(stream),
    ):
        with pytest.raises(RuntimeError, match="as it was told"):
            call()
        fails.fails = False
        assert attributes(model) == before
        fails.fails = True
    fails.fails = False
    for call in (lambda: next(stream), stream.result):  # some layers have seen a token that others have not
        with pytest.raises(RuntimeError, match="a step of this session failed"):
            call()
    assert all(router.counted is not None for router in model.modules() if isinstance(router, Router))
    assert "one by one, without a CUDA graph, since the model is on cpu" in str(lasp.explain(model))


class OwnHead(nn.Module):
    """A model around another, which calls the last layer of that in a way of its own."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, input_ids, position_ids=None, layout=None):
        return self.how(self.inner.head, self.inner(input_ids, position_ids, layout, return_hidden=True))


@pytest.mark.parametrize(
    "how",
    [
        lambda head, x: head(input=x),
        lambda head, x: head(x.flatten(0, 1)).view(*x.shape[:2], -1),
        lambda head, x: (head(x), x),
    ],
    ids=["by name", "tokens of all rows", "a tuple"],
)
def test_the_last_layer_may_be_called_in_any_way(how):
    model, ids = model_of("hybrid"), [ids_of(1)[0], ids_of(1)[0, :9]]
    found = lasp.generate(OwnHead(model, how).eval(), ids, max_new_tokens=3, segment=13)
    assert torch.equal(found.ids, lasp.generate(model, ids, max_new_tokens=3).ids)


def test_a_state_of_other_decays_is_refused():
    """Which are no parameters: of the same names and shapes, with another meaning."""
    one, other = (TNL(TNLConfig(*SIZE, decay=decay)) for decay in ("alibi", "tnl"))
    state = lasp.prefill(one, ids_of())
    with pytest.raises(ValueError, match="state must be of the model that it is given with"):
        lasp.generate(other, None, state=state, max_new_tokens=1)
    assert lasp.generate(copy.deepcopy(one), None, state=state, max_new_tokens=1).lengths == (1, 1)


@pytest.mark.parametrize("name", ["hybrid", "of a user, with tokens"])
def test_a_state_goes_on_under_the_autocast_that_it_was_made_with(name):
    model, ids = model_of(name, torch.float32), ids_of()

    def under(autocast, call):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return call()

    for autocast in (False, True):
        state = under(autocast, lambda: lasp.prefill(model, ids))
        for call in (
            lambda state=state: lasp.generate(model, None, state=state, max_new_tokens=2),
            lambda state=state: lasp.prefill(model, ids[:, :9], state=state),
        ):
            under(autocast, call)
            with pytest.raises(ValueError, match=r"state must be .* under the autocast, in which it was made: layer '"):
                under(not autocast, call)


def test_layers_may_be_replaced_between_calls():
    """What is known of a model that nobody split is looked up again; one that was split on one rank is refused."""
    model, ids = model_of("hybrid"), ids_of()
    lasp.prefill(model, ids[:, :3])
    split = lasp.parallelize(copy.deepcopy(model), None)
    for changed in (model, split):
        changed.blocks[1] = copy.deepcopy(changed.blocks[1])
        changed.blocks.append(copy.deepcopy(changed.blocks[3]))
    expected = logits_of(model, ids)
    state = lasp.prefill(model, ids[:, :PROMPT], segment=13)
    torch.testing.assert_close(state.logits, expected[:, PROMPT - 1], atol=1e-12, rtol=1e-12)
    found, _ = decoded(model, state, ids[:, PROMPT:])
    torch.testing.assert_close(found, expected[:, PROMPT:], atol=1e-12, rtol=1e-12)
    for call in (
        lambda: lasp.generate(split, ids, max_new_tokens=2),
        lambda: lasp.stream_backward(split, {"input_ids": ids}, mesh=None, segment=30),
    ):
        with pytest.raises(ValueError, match=r"got 'blocks.1.*put there afterwards"):
            call()


def test_a_stream_that_was_broken_off_within_a_step_is_refused(monkeypatch):
    """Ctrl-C comes where the host waits for a token: the state is behind it, and nobody has got it."""
    model, ids = model_of("tnl"), ids_of()
    stream = lasp.stream_tokens(model, ids, max_new_tokens=4)
    next(stream)
    before = stream.result()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[lasp.stream_tokens.__module__], "_on_its_way", lambda tokens: interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    for call in (lambda: next(stream), stream.result):
        with pytest.raises(RuntimeError, match="a step of this session was broken off"):
            call()
    again = lasp.generate(model, None, state=before.state, max_new_tokens=3)
    assert torch.equal(torch.cat([before.ids, again.ids], 1), lasp.generate(model, ids, max_new_tokens=4).ids)


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize("sampled", [False, True])
def test_scores_that_are_no_numbers_are_no_tokens(sampled):
    model, ids = model_of("tnl", torch.float32), ids_of(3)
    options = {"max_new_tokens": 3, **({"do_sample": True, "seed": 0} if sampled else {})}
    state = lasp.prefill(model, ids)
    state.logits[1] = torch.nan
    with pytest.raises(FloatingPointError, match=rf"scores of row 1 are NaN, or infinite, behind {TOKENS} tokens"):
        lasp.generate(model, None, state=state, **options)
    if sampled:  # which divides to infinity
        with pytest.raises(FloatingPointError, match="temperature near 0"):
            lasp.generate(model, ids, temperature=1e-40, **options)


def test_a_model_may_be_split_later_and_streamed():
    model, ids = model_of("gla"), ids_of()
    expected = lasp.generate(model, ids, max_new_tokens=3)
    lasp.parallelize(model, None)
    assert torch.equal(lasp.generate(model, ids, max_new_tokens=3).ids, expected.ids)
    lasp.stream_backward(model, {"input_ids": ids}, mesh=None, segment=30)
    assert same(lasp.generate(model, ids, max_new_tokens=3).state, expected.state)


@pytest.mark.parametrize("name", ["tnl", "mamba2", "hybrid"])
def test_states_of_inference_mode_go_on_outside(name):
    model, ids = model_of(name), ids_of()
    expected = lasp.generate(model, ids, max_new_tokens=6)
    with torch.inference_mode():
        state = lasp.prefill(model, ids[:, :40])
        stream = lasp.stream_tokens(model, ids[:, 40:], state=state.fork(), max_new_tokens=6)
        next(stream)
    *_, _ = stream
    assert torch.equal(stream.result().ids, expected.ids)
    state = lasp.prefill(model, ids[:, 40:], state=state)
    with torch.inference_mode():
        assert torch.equal(lasp.generate(model, None, state=state, max_new_tokens=6).ids, expected.ids)


@pytest.mark.parametrize("name", MODELS)
def test_16_bits(name):
    """Of the model, or of autocast: states are fp32, and results are as near as those of one forward."""
    model, ids = model_of(name, torch.float32), ids_of()
    expected = logits_of(model, ids)
    for cast in (False, True):
        model = model if cast else copy.deepcopy(model).bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            once = (logits_of(model, ids) - expected)[:, PROMPT:].float().square().mean().sqrt()
            state = lasp.prefill(model, ids[:, :PROMPT], segment=50)
            found, behind = decoded(model, state, ids[:, PROMPT:])
        error = (found - expected[:, PROMPT:]).square().mean().sqrt()
        assert error < 1.5 * once + 1e-3, (error, once)
        assert behind.logits.dtype == torch.float32


class Changes(nn.Module):
    """Calls its operator more often in some runs than in others."""

    sequence = None

    def forward(self, x, layout=None):
        for _ in range(1 + (x.shape[1] == 5)):
            x = lasp.halo(x, 2, layout=layout, sequence=self.sequence)[:, :-1]
        return x


class Uses(Streamed):
    def forward(self, input_ids, position_ids, layout=None):
        return self.head(self.layers[0](self.tokens(input_ids), layout))


def test_a_model_whose_calls_differ_is_refused():
    lasp.register(Changes)
    model = lasp.parallelize(Uses(Changes), None, strict=False)
    once, twice = (lasp.prefill(model, ids_of(tokens=tokens)) for tokens in (4, 5))
    with pytest.raises(RuntimeError, match=r"halo of layer 'layers.0' was called 1 times, before 2 times"):
        lasp.prefill(model, ids_of(tokens=3), state=twice)
    with pytest.raises(RuntimeError, match=r"'layers.0' is called in lasp.prefill as number 1, but was not in the run"):
        lasp.prefill(model, ids_of(tokens=5), state=once)


class Mixes(nn.Module):
    def forward(self, x):
        return x.cumsum(1)


def test_a_model_that_mixes_tokens_otherwise_is_refused():
    model = model_of("tnl")
    model.blocks[1].glu = nn.Sequential(model.blocks[1].glu, Mixes())
    for _ in range(2):
        with pytest.raises(ValueError, match="Mixes"):
            lasp.generate(model, ids_of(), max_new_tokens=1)


# Over ranks


def _over_ranks(names):
    world = torch.distributed.get_world_size()
    mesh = mesh_of(sp=world)
    for name in names:
        model, ids = model_of(name), ids_of()
        expected = logits_of(model, ids)
        split = lasp.parallelize(copy.deepcopy(model), mesh["sp"], strict=False, validate="off")
        lasp.parallelize(model, None, strict=False)
        rows, offsets = [ids[0], ids[1, :2]], [0, len(ids[0]), len(ids[0]) + 2]
        options = {"max_new_tokens": 4, "do_sample": True, "seed": 2}
        one = lasp.generate(model, rows, **options)
        state = lasp.prefill(split, ids[:, :PROMPT], mesh, segment=59)
        torch.testing.assert_close(state.logits, expected[:, PROMPT - 1], atol=1e-11, rtol=1e-11)
        found, _ = decoded(split, state, ids[:, PROMPT:])
        torch.testing.assert_close(found, expected[:, PROMPT:], atol=1e-11, rtol=1e-11)
        again = lasp.prefill(split, ids[:, PROMPT:], state=state)
        torch.testing.assert_close(again.logits, expected[:, -1], atol=1e-11, rtol=1e-11)
        apart = lasp.generate(split, rows, **options)
        packed = lasp.generate(split, torch.cat(rows)[None], cu_seqlens=offsets, **options)
        for several in (apart, packed):
            assert torch.equal(several.ids, one.ids), name
            torch.testing.assert_close(several.state.logits, one.state.logits, atol=1e-11, rtol=1e-11)
        batch = lasp.shard_batch({"input_ids": ids}, mesh)  # and it is split as before
        local = split(batch["input_ids"], position_ids=batch["position_ids"], layout=batch["layout"])
        first, last = batch["layout"].real.bounds(mesh["sp"].get_local_rank())
        torch.testing.assert_close(local[:, : last - first], expected[:, first:last], atol=1e-11, rtol=1e-11)
    return state.logits


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_what_one_gives(world):
    found = run_ranks(world, _over_ranks, list(MODELS))
    assert all(torch.equal(logits, found[0]) for logits in found)


def _of_ranks_together():
    mesh, ids = mesh_of(sp=2), ids_of()
    rank = mesh["sp"].get_local_rank()
    model = lasp.parallelize(model_of("tnl"), mesh, strict=False)
    state = lasp.prefill(model, ids, to=1)
    assert (state is None) is (rank == 0)
    drawn = lasp.generate(model, ids, max_new_tokens=5, do_sample=True)  # seeds of the first rank
    for wrong in (
        lambda: lasp.prefill(model, ids + (rank == 1) * (ids == 3)),
        lambda: lasp.generate(model, ids, max_new_tokens=3 + rank),
        lambda: lasp.generate(model, ids, max_new_tokens=3, seed=rank),
        lambda: lasp.generate(model, ids if rank else None, max_new_tokens=3),
        lambda: lasp.prefill(model if rank else model_of("tnl"), ids, mesh),
    ):
        with pytest.raises(lasp.RankMismatchError, match="rank"):
            wrong()
    with pytest.raises(ValueError, match=r"mesh must be that of lasp.parallelize"):
        lasp.prefill(model, ids, lasp.SequenceParallel(None))
    with pytest.raises(ValueError, match=r"lasp.parallelize was called with"):
        lasp.prefill(model_of("tnl"), ids, mesh)
    stream = lasp.stream_tokens(model, ids, max_new_tokens=2, do_sample=True, seed=0)
    with torch.no_grad():
        stream.decoding.logits[0] = 50.0 * (torch.arange(WORDS) == rank)  # what another card might compute
    with pytest.raises(lasp.RankMismatchError, match="tokens of row 0"):
        list(stream)
    other = mock.patch.object(Sampling, "choose", lambda self, logits, *_: (logits.argmax(-1) + rank) % WORDS)
    with other, pytest.raises(lasp.RankMismatchError, match="tokens of row 0"):
        lasp.generate(model, ids, max_new_tokens=2)
    sharded = wrap_fsdp2(lasp.parallelize(model_of("hybrid"), mesh, strict=False), mesh)
    whole = lasp.generate(model_of("hybrid"), ids, max_new_tokens=4)
    assert torch.equal(lasp.generate(sharded, ids, max_new_tokens=4).ids, whole.ids)
    return drawn.ids


def test_ranks_go_together():
    first, second = run_ranks(2, _of_ranks_together)
    assert torch.equal(first, second)


def _in_parts():
    model, ids = TNL(TNLConfig(WORDS + 1, *SIZE[1:])).double(), ids_of()
    torch.manual_seed(0)
    model.init_weights()
    whole = lasp.generate(model, ids, max_new_tokens=5, do_sample=True, seed=1)
    lasp.tensor_parallel(model, mesh_of(tp=2))
    found = lasp.generate(model, ids, max_new_tokens=5, do_sample=True, seed=1)
    assert torch.equal(found.ids, whole.ids)
    torch.testing.assert_close(found.state.logits, whole.state.logits, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match=r"seed must be given .* over 2 ranks, got None"):
        lasp.generate(model, ids, max_new_tokens=5, do_sample=True)
    return found.state


def test_a_model_in_parts_generates_what_the_whole_does():
    first, second = run_ranks(2, _in_parts)
    assert first.model != second.model
    assert first.nbytes == second.nbytes


# Against transformers, last: workers of tests behind it would import it too


@pytest.mark.parametrize("split", [False, True])
def test_a_model_of_another_library_is_refused(split):
    library = pytest.importorskip("transformers", reason="needs the extra `transformers`")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": WORDS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = library.MiniMaxForCausalLM(library.MiniMaxConfig(**sizes, **heads))
    if split:
        lasp.parallelize(model, None, strict=False)
    with pytest.raises(ValueError, match=r"got a MiniMaxForCausalLM whose layer 'model.layers.0.*another library"):
        lasp.generate(model, ids_of(), max_new_tokens=1)


def test_scores_are_those_of_transformers():
    theirs = pytest.importorskip("transformers.generation.logits_process", reason="needs the extra `transformers`")
    random = torch.Generator().manual_seed(3)
    logits, ids = torch.randn(4, 50, generator=random) * 3, torch.randint(50, (4, 12), generator=random)
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, ids, True)
    for options in (
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_k": 500, "temperature": 1.0},
        {"top_p": 0.6},
        {"top_p": 1.0, "top_k": 0},
        {"top_p": 0.05},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.8, "temperature": 1.9, "top_k": 11, "top_p": 0.8},
    ):
        expected = logits
        for name, processor in (
            ("repetition_penalty", theirs.RepetitionPenaltyLogitsProcessor),
            ("temperature", theirs.TemperatureLogitsWarper),
            ("top_k", theirs.TopKLogitsWarper),
            ("top_p", theirs.TopPLogitsWarper),
        ):
            if options.get(name):
                expected = processor(options[name])(ids, expected)
        assert torch.equal(Sampling(do_sample=True, **options).scores(logits, seen), expected), options
    with pytest.warns(UserWarning, match=r"temperature=0.5 is not heeded without do_sample=True"):
        Sampling(temperature=0.5)


def _page(folder):
    page = Path(__file__).parent.parent / "docs" / "inference.md"
    blocks = re.findall(r"```python\n(?!# \w+\.py\n)(.*?)```", page.read_text(), re.DOTALL)  # none is a whole script
    mesh = mesh_of(sp=torch.distributed.get_world_size())
    model = lasp.parallelize(model_of("tnl"), mesh, strict=False)
    known = {"lasp": lasp, "mesh": mesh, "model": model, "ids": ids_of(), "question": ids_of(1), "more": [[3, 4]]}
    folder = Path(folder) / str(torch.distributed.get_rank())
    folder.mkdir()
    before = os.getcwd()
    os.chdir(folder)
    try:
        for block in blocks:
            exec(block, known)
    finally:
        os.chdir(before)
    assert (folder / "chat.safetensors").exists()
    assert known["answer"].state.lengths[0] > TOKENS + 50
    return len(blocks)


def test_what_the_page_shows_runs(tmp_path):
    assert run_ranks(2, _page, tmp_path) == [3, 3]


# Somebody else who uses the model meanwhile

SECOND = "lasp.prefill was called within lasp.generate of the same model, or while it runs in another thread"
ALONE = (
    "the model was called while lasp.generate is under way with it, in another thread or by its streamer, and would "
    "have gone on from that state"
)


class _Meanwhile:
    """A streamer that uses the model, each time in another way."""

    def __init__(self, *ways):
        self.ways, self.said = list(ways), []

    def put(self, tokens):
        if self.ways:
            with pytest.raises(RuntimeError) as caught:
                self.ways.pop()()
            self.said.append(str(caught.value))

    def end(self):
        pass


def _in_a_thread(function):
    def run():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(function).result()

    return run


def test_a_model_that_generates_is_used_by_nobody_else():
    torch.manual_seed(0)
    model = TNL(TNLConfig(vocab_size=97, layers=2, width=32, heads=2, glu_width=32))
    ids = torch.randint(97, (1, 9))
    expected = lasp.generate(model, ids, max_new_tokens=12)
    another = functools.partial(lasp.generate, model, ids, max_new_tokens=2)
    plain = functools.partial(model, ids, torch.arange(9))
    streamer = _Meanwhile(another, plain, _in_a_thread(another), _in_a_thread(plain))
    stream = lasp.generate(model, [ids[0]], max_new_tokens=12, streamer=streamer)
    assert torch.equal(stream.ids, expected.ids)
    assert torch.equal(stream.state.logits, expected.state.logits)
    assert [text.split(":")[0] for text in streamer.said] == [ALONE, SECOND, ALONE, SECOND]


def test_models_that_generate_at_the_same_time():
    """A model that lasp has not seen is tried, with other operators: for the thread that tries it alone."""
    torch.manual_seed(0)
    model = TNL(TNLConfig(vocab_size=97, layers=2, width=32, heads=2, glu_width=32))
    ids = torch.randint(97, (1, 9))
    expected, others = lasp.generate(model, ids, max_new_tokens=12).ids, [copy.deepcopy(model) for _ in range(6)]
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(functools.partial(lasp.generate, ids=ids, max_new_tokens=12), others):
            assert torch.equal(found.ids, expected)


def test_a_mask_of_a_prompt_is_looked_at_on_every_device():
    """The host reads it anyway: where rows begin and end."""
    model = TNL(TNLConfig(vocab_size=97, layers=1, width=32, heads=2, glu_width=32))
    ids = torch.randint(97, (2, 9))
    with mock.patch.object(arguments, "on_host", return_value=False), pytest.raises(ValueError, match="must be 1 for"):
        lasp.prefill(model, ids, attention_mask=torch.full((2, 9), 2))
