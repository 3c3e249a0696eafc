"""examples/train.py: learning rates, the loss on held-out text by position, and what a run tells of itself."""

import json
import math
import sys
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import train
from _report import smoothed
from _schedule import SCHEDULES, learning_rate
from _text import Text
from _validation import BATCHES, held_out
from ranks import run_ranks
from test_train import TEXT, _alone, _call, _on_ranks, _small, text  # noqa: F401

from lasp.models import TNL, TNLConfig

SEQ = 33


def rates(schedule, steps=100, **more):
    return [learning_rate(schedule, 2.0, step, steps, **more) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_begins_with_a_warm_up(schedule):
    assert rates(schedule)[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert rates(schedule, warmup=4)[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates(schedule, warmup=0)[0] == 2.0
    assert rates(schedule, steps=1) == [2.0]
    falling = rates(schedule)[10:]
    assert max(falling) == 2.0
    assert falling == sorted(falling, reverse=True)
    assert all(rate > 0 for rate in rates(schedule, warmup=200))


def test_where_schedules_are_later():
    cosine, linear, wsd, constant = (rates(schedule) for schedule in ("cosine", "linear", "wsd", "constant"))
    assert cosine[55] == linear[55] == pytest.approx(1.1)  # half of the way down to 0.2
    assert cosine[40] == pytest.approx(2 * (0.55 + 0.45 * math.cos(math.pi / 3)))
    assert linear[40] == pytest.approx(1.4)
    assert wsd[10:81] == [2.0] * 71
    assert wsd[90] == pytest.approx(1.1)
    assert [x[-1] for x in (cosine, linear, wsd)] == pytest.approx([0.2, 0.2, 0.2], rel=0.5)
    assert constant[10:] == [2.0] * 90
    with pytest.raises(ValueError, match="schedule must be one of cosine, linear, wsd, constant, got 'sine'"):
        learning_rate("sine", 1.0, 0, 1)


def test_a_smoothed_curve():
    assert smoothed([3.0, 3.0, 3.0], 2) == [3.0, 3.0, 3.0]
    assert smoothed([1.0, 4.0], 2) == pytest.approx([1.0, 3.0])
    assert smoothed([], 2) == []


def _by_position_of_one_model(ids):
    """The losses of the untrained model of seed 0, by the position of the token that predicts."""
    torch.manual_seed(0)
    model = TNL(TNLConfig.named("tiny", vocab_size=256))
    with torch.no_grad():
        logits = model(ids)[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    edges = [0, 1, 2, 4, 8, 16, 32]
    return [(a, losses[:, a:b].numel(), losses[:, a:b].mean().item()) for a, b in zip(edges, edges[1:])]


def _seen(arguments):
    """A run, and all sequences that were trained on and validated on."""
    trained, unseen = [], []
    of_step = train.batch_of_step

    def recorded(into):
        def batch_of_step(*args, **options):
            into.append(of_step(*args, **options))
            return into[-1]

        return batch_of_step

    with (
        mock.patch("train.batch_of_step", recorded(trained)),
        mock.patch("_validation.batch_of_step", recorded(unseen)),
    ):
        code, output = _on_ranks(arguments)
    assert code == 0, output
    return torch.cat(trained), torch.cat(unseen), output


MARKED = bytes(x % 128 for x in TEXT[:2850]) + bytes(
    128 + x % 128 for x in TEXT[2850:]
)  # the last twentieth is another


@pytest.mark.parametrize(
    "more", [["--dp=2"], [], ["--parallel=fsdp2"], ["--segment=14"], ["--parallel=fsdp2", "--segment=14"]], ids=str
)
def test_the_loss_by_position_is_that_of_one_process(text, tmp_path, more):  # noqa: F811
    """Of text that no step has seen; with a learning rate that changes nothing."""
    (text / "a.txt").write_bytes(MARKED)
    options = ["--validate", "--validate-every=1", "--lr=1e-12"]
    results = run_ranks(2, _seen, _small(text, tmp_path / "out", *options, *more))
    ids = torch.cat([unseen for _, unseen, _ in results[: 2 if "--dp=2" in more else 1]])
    for trained, unseen, _ in results:
        assert trained.max() < 128 <= unseen.min()
        assert unseen.shape[1] == trained.shape[1] == SEQ
    found = json.loads((tmp_path / "out" / "validation.json").read_text())["validation"]
    assert [x["step"] for x in found] == [1, 2]
    expected = _by_position_of_one_model(ids)
    for x in found:
        rows = x["by position"]
        assert [row["from"] for row in rows] == [first for first, _, _ in expected]
        assert rows[-1]["to"] == SEQ - 2
        assert sum(row["tokens"] for row in rows) == BATCHES * 2 * (SEQ - 1)
        assert [row["loss"] for row in rows] == pytest.approx([loss for _, _, loss in expected], rel=1e-5)
        mean = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
        assert x["loss"] == pytest.approx(mean, rel=1e-12)
    assert (tmp_path / "out" / "validation.png").stat().st_size > 5_000
    assert "held-out text" in results[0][2]


def test_held_out_is_the_last_twentieth():
    trained, unseen = held_out(Text(torch.arange(1999).numpy()))
    assert (len(trained), len(unseen)) == (1900, 99)
    assert unseen.ids[0] == 1900
    assert len(held_out(Text(torch.arange(19).numpy()))[1]) == 0


def test_a_resumed_run_validates_as_an_uninterrupted_one(text, tmp_path):  # noqa: F811
    """The losses of before stay; what the options were must stay, too."""
    out, more = tmp_path / "out", ("--validate", "--validate-every=1", "--schedule=wsd")
    assert [x for x, _ in run_ranks(2, _on_ranks, _small(text, out, *more))] == [0, 0]
    whole = json.loads((out / "validation.json").read_text())
    (out / "LATEST").write_text("step-000001")
    for other, says in [
        ("--schedule=linear", "linear, but the run to be resumed has wsd"),
        ("--warmup=2", "2, but the run to be resumed has None"),
    ]:
        code, output = _alone(*_small(text, out, "--resume", *more, other))
        assert (code, says in output) == (2, True), output
    code, output = _alone(*_small(text, out, "--resume", "--schedule=wsd"))
    assert (code, "False, but the run to be resumed has True" in output) == (2, True), output
    assert [x for x, _ in run_ranks(2, _on_ranks, _small(text, out, "--resume", *more))] == [0, 0]
    assert json.loads((out / "validation.json").read_text()) == whole
    (out / "validation.json").write_text("[]")
    for code, output in run_ranks(2, _on_ranks, _small(text, out, "--resume", *more)):
        assert (code, f"{out / 'validation.json'} is not what a run writes" in output) == (1, True), output


def test_reports_that_cannot_be(text, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    code, output = _alone(*_small(text, out), "--validate", "--seq-len=151")
    assert (code, "holds out 150 tokens at the end, which are fewer than the 151 of --seq-len" in output) == (2, True)
    code, output = _alone(*_small(text, out), "--validate-every=1")
    assert (code, "needs --validate" in output) == (2, True), output
    with mock.patch.object(train, "is_installed", return_value=False):
        code, output = _alone(*_small(text, out), "--tensorboard")
    assert (code, "needs the package tensorboard: pip install" in output) == (2, True), output
    assert not (out / "run.json").exists()


class _Writer:
    """In TensorBoard's place, which few have."""

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        _Writer.last = self

    def add_scalar(self, name, number, step):
        self.scalars.append((name, step))

    def close(self):
        self.closed = True


def test_curves_for_tensorboard_and_a_summary_of_one_step(text, tmp_path):  # noqa: F811
    """On one rank; also that nothing is said of checkpoints, and of a mean, where there is none."""
    module = types.SimpleNamespace(SummaryWriter=_Writer)
    with (
        mock.patch.dict(sys.modules, {"torch.utils.tensorboard": module}),
        mock.patch.object(train, "is_installed", return_value=True),
    ):
        options = ["--ranks=1", "--tensorboard", "--validate", "--no-save", "--save-every=0", "--steps=1"]
        code, output = _call(_small(text, tmp_path / "out", *options))
    assert code == 0, output
    writer = _Writer.last
    assert writer.closed
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "out" / "tensorboard"), None)
    names = {"loss", "lr", "tokens_per_s", "peak_memory_bytes", "held-out loss"}
    assert sorted(writer.scalars) == sorted((name, 0) for name in names)
    assert "mean" not in output
    assert "That loss is" in output
    assert f"metrics.jsonl, run.json and loss.png are in {tmp_path / 'out'}" in output
