"""examples/train.py with other families: split as in one process, resumed as the same family only, exported."""

import json
from typing import get_args

import _model
import pytest
import torch
from ranks import run_ranks
from test_export import _as_the_docstring_says, _export
from test_train import _alone, _assert_on_all, _small, text  # noqa: F401

from lasp.models import Decoder, DecoderConfig
from lasp.models.sizes import SIZES


def test_every_size_has_a_learning_rate():
    assert get_args(_model.Size) == tuple(SIZES)
    assert {name.split("-")[-1] for name in SIZES} == set(_model.LEARNING_RATES)


def _losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("family", "more"), [("gla", ["--pattern=LS"]), ("hgrn2", ["--parallel=fsdp2"])])
def test_two_ranks_train_as_one(text, tmp_path, family, more):  # noqa: F811
    options = [f"--family={family}", "--recompute=1", *more]
    for ranks in (1, 2):
        _assert_on_all(ranks, 0, [], _small(text, tmp_path / str(ranks), *options))
    one, two = (_losses(tmp_path / str(ranks)) for ranks in (1, 2))
    assert len(one) == 2
    assert torch.allclose(torch.tensor(two), torch.tensor(one), rtol=1e-5)
    code, said = _alone(*_small(text, tmp_path / "2", "--resume"))
    assert code == 2
    assert f"--family: tnl, but the run to be resumed has {family}" in said
    [(code, said)] = run_ranks(1, _export, tmp_path / "2", tmp_path / "weights.safetensors")
    assert code == 0, said
    model = _as_the_docstring_says(tmp_path)
    assert isinstance(model, Decoder)
    assert model.config == DecoderConfig.named(family, "tiny", vocab_size=256, pattern="LS" if family == "gla" else "L")


@pytest.mark.parametrize("more", [["--parallel=fsdp2"], ["--segment=12"]])
def test_two_ranks_train_experts_as_one(text, tmp_path, more):  # noqa: F811
    """The loss holds the balance of all ranks, and over all segments."""
    options = ["--family=gla", "--experts=8", "--attention-experts=4", "--balance=0.5", "--recompute=1"]
    for ranks, how in ((1, []), (2, more)):
        _assert_on_all(ranks, 0, [], _small(text, tmp_path / str(ranks), *options, *how))
    one, two = (_losses(tmp_path / str(ranks)) for ranks in (1, 2))
    assert torch.allclose(torch.tensor(two), torch.tensor(one), rtol=1e-5)
    code, said = _alone(*_small(text, tmp_path / "2", "--resume", "--family=gla"))
    assert code == 2
    assert "--experts: 0, but the run to be resumed has 8" in said
    code, said = _alone(*_small(text, tmp_path / "2", "--resume", *options, "--accumulate=2"))
    assert code == 2  # the balance of each micro-batch is another loss
    assert "--accumulate: 2, but the run to be resumed has 1" in said
    [(code, said)] = run_ranks(1, _export, tmp_path / "2", tmp_path / "weights.safetensors")
    assert code == 0, said
    experts = {"experts": 8, "attention_experts": 4}
    assert _as_the_docstring_says(tmp_path).config == DecoderConfig.named("gla", "tiny", vocab_size=256, **experts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--family=rnn"], "'rnn' is not one of tnl, softmax, block_softmax"),
        (["--family=gla", "--decay=tnl"], "is for --family tnl, not gla"),
        (["--family=gla", "--chunk=5"], "is for --family tnl, not gla"),
        (["--family=gla", "--pattern=LX"], "'LX' is not of letters L and S"),
        (["--experts=8"], "--experts: is for families other than tnl"),
        (["--family=gla", "--balance=0.5"], "--balance: is for models with --experts or --attention-experts"),
        (["--experts-per-token=3"], "--experts-per-token: is for models with --experts or --attention-experts"),
        (["--family=gla", "--experts=7"], "--experts: experts + shared_experts must divide glu_width 384"),
        (["--family=gla", "--attention-experts=3"], "attention_experts must divide the 4 heads, got 3"),
        (["--offload=9"], "--offload: '9' is not all, or a number of blocks up to"),
        (["--recompute=1", "--offload=2"], "--offload: '2' is more than the blocks of --recompute, 1"),
        (["--recompute=0", "--offload=all"], "--offload: 'all' is more than the blocks of --recompute, 0"),
        (["--pattern=LS"], "'LS' is not of letters L and S, and of L alone for tnl"),
    ],
)
def test_what_does_not_fit_is_refused(text, tmp_path, options, said):  # noqa: F811
    code, output = _alone(*_small(text, tmp_path / "out", *options))
    assert code == 2
    assert said in output
