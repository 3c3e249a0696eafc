"""examples/recall.py: what is learned through the state, and what is left of it where a border is closed."""

import json
from unittest import mock

import numpy as np
import pytest
import recall
import torch.distributed as dist
from _needles import NOBODY_ASKS, Task, sequences
from ranks import run_ranks
from typer.testing import CliRunner

SMALL = ["--keys=4", "--values=8", "--width=32", "--tokens=2048", "--length=512", "--segment=128", "--lr=5e-3"]


def _call(arguments):
    wide = {"COLUMNS": "1000", "TERMINAL_WIDTH": "1000", "NO_COLOR": "1"}
    result = CliRunner().invoke(recall.app, [str(x) for x in arguments], env=wide)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def _on_ranks(arguments):
    with (
        mock.patch.object(recall, "started_by_a_launcher", return_value=True),
        mock.patch.object(dist, "destroy_process_group"),
    ):
        return _call(arguments)


def test_pairs_and_questions():
    """What a sequence asks is answered by its only pair of that key, and by nothing else in it."""
    task = Task(keys=5, values=3, noise=7)
    for length in (task.shortest, 333, 4096):
        batch = sequences(task, np.random.default_rng(length), 3, length, 50)
        rows, places = (batch.questions != NOBODY_ASKS).nonzero(as_tuple=True)
        numbers = batch.questions[rows, places]
        assert numbers.sort().values.tolist() == list(range(len(batch.answers)))
        assert places.tolist() == batch.asked[numbers].tolist()
        assert (batch.distances >= 1).all()
        for row, number in zip(rows, numbers):
            asked, told, answer = batch.asked[number], batch.told[number], batch.answers[number]
            ids = batch.ids[row]
            assert ids[told] == task.keys + answer
            assert ids[told - 1] == ids[asked] < task.keys
            assert ((ids[1:] >= task.keys) & (ids[1:] < task.keys + task.values) & (ids[:-1] == ids[asked])).sum() == 1
        assert batch.ids.max() < task.vocabulary
    assert batch.distances.max() > length // 2
    again = sequences(task, np.random.default_rng(length), 3, length, 50)
    assert (again.ids == batch.ids).all()


def test_recall_goes_through_the_borders_of_ranks_and_segments(tmp_path):
    """Beyond a slice of 256 tokens, and a segment of 128, only the state tells an answer."""
    results = run_ranks(2, _on_ranks, [*SMALL, "--tests=6", "--questions=64", f"--out={tmp_path}"])
    assert [code for code, _ in results] == [0, 0], results
    assert "learned at all distances" in results[0][1]
    assert "Right answers" not in results[1][1]
    found = json.loads((tmp_path / "recall.json").read_text())
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    ways = found["ways"]
    assert list(ways) == ["split and streamed", "each rank alone", "each segment alone"]
    far = ways["split and streamed"]["by distance"][-1]
    assert far["from"] == 256
    assert far["questions"] > 10
    assert far["accuracy"] > 0.9
    for name in ("each rank alone", "each segment alone"):
        assert ways[name]["within reach"]["accuracy"] > 0.9
        assert ways[name]["beyond reach"]["questions"] > 30
        assert ways[name]["beyond reach"]["accuracy"] < 0.4  # chance is an eighth, of 24 independent values
    lengths = found["training"]["split and streamed"]["length"]
    assert sorted(set(lengths)) == [32, 128, 512]
    assert lengths == sorted(lengths)


def _controls(arguments, out):
    """Both controls trained, over two steps; the weights of the model that each rank has in the end."""
    made, build = [], recall.build

    def kept(*options):
        made.append(build(*options))
        return made[-1]

    with mock.patch.object(recall, "build", kept):
        code, output = _on_ranks([*arguments, f"--out={out}"])
    assert code == 0, output
    return [[p.tolist() for p in model.parameters()] for model in made]


def test_controls_are_trained_alike_on_all_ranks(tmp_path):
    """With weights of their own, which the cuts make others."""
    few = ["--steps=1", "--last-steps=1", "--tests=1", "--questions=20", "--train-controls"]
    first, second = run_ranks(2, _controls, [*SMALL, *few], tmp_path)
    assert first == second
    whole, ranks, ranks_trained, segments, segments_trained = first
    assert whole == ranks == segments
    assert whole != ranks_trained != segments_trained != whole
    found = json.loads((tmp_path / "recall.json").read_text())
    assert len(found["ways"]) == 5
    losses = [steps["loss"] for steps in found["training"].values()]
    assert [len(x) for x in losses] == [4, 4, 4]  # of 32, 128, 512 tokens, and the last
    assert losses[0][0] == pytest.approx(losses[2][0], rel=1e-5)  # a sequence of 32 is shorter than a segment
    assert losses[0][0] != pytest.approx(losses[1][0], rel=1e-5)  # and is on two ranks


HUGE = "99999999999999"
HELD = {"--length": "tokens", "--test-length": "tokens", "--tokens": "tokens", "--questions": "questions"}
HELD |= {"--width": "channels", "--layers": "layers", "--values": "values"}


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--length", "31", "31 tokens are less than 32, 8 for each of --keys"),
        ("--test-length", "100", "100 tokens are less than --length 512"),
        ("--segment", "512", "is not a multiple of 2 ranks, and less than the 512 tokens"),
        ("--segment", "129", "is not a multiple of 2 ranks"),
        ("--lr", "nan", "Invalid value for"),
        ("--keys", "1", "Invalid value for"),
        ("--keys", HUGE, "tokens are less than"),
        ("--segment", HUGE, f"{HUGE} is not a multiple of 2 ranks"),
        *((option, HUGE, f"{HUGE} {what} take") for option, what in HELD.items()),
    ],
)
def test_an_option_that_cannot_be(option, value, says):
    with mock.patch.object(recall, "relaunch", side_effect=AssertionError("ranks start")):
        code, output = _call([*SMALL, "--ranks=2", f"{option}={value}"])
    assert code == 2
    assert option in output
    assert says in output
