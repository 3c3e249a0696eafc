"""bench/machine.py: its commands are known to the scripts that it starts, and each part ends as it says."""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import machine  # noqa: E402


@pytest.mark.parametrize("gpus", [2, 4, 6, 8])
def test_scripts_know_the_options_of_their_parts(gpus):
    for part in machine.parts(gpus, peers=True):
        words = machine.command_of(part, Path("out"), "abc")
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        source = (ROOT / words[script]).read_text() + (ROOT / "bench" / "common.py").read_text()
        options = [word.removeprefix("--") for word in words[script:] if word.startswith("--")]
        assert options, part
        missing = [
            o
            for o in options
            if f'"--{o}"' not in source and f"{o.removeprefix('no-').replace('-', '_')}:" not in source
        ]
        assert missing == [], part
        assert not any("{" in word for word in words), part


def test_layouts_use_all_gpus():
    weak = next(part for part in machine.parts(6) if part.name == "weak_1B")
    assert weak.command.split("--mesh ")[1].split(" --")[0] == "1x6 2x3"


@pytest.fixture
def run_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "WORK", tmp_path / "kept")

    def run(*wanted, budget=0.0, again=False):
        arguments = argparse.Namespace(out=tmp_path, budget=budget, again=again, commit="abc", gpus=2)
        return {row["part"]: row["found"] for row in machine.run_all(list(wanted), arguments)}

    return run


def runs(process):
    """Whether it does in a second from now: one that was ended may wait to be collected."""
    time.sleep(1)
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def code(text):
    return shlex.join(["python", "-c", text])


def test_each_part_ends_as_it_says(run_parts, tmp_path):
    child = "import os, time; child = os.fork(); child and print(child, flush=True); time.sleep(60)"
    wanted = [
        machine.Part("well", 30, code("print('all of it')")),
        machine.Part("badly", 30, code("raise SystemExit(3)")),
        machine.Part("slowly", 2, code(child)),
    ]
    start = time.monotonic()
    assert run_parts(*wanted) == {"well": "ok", "badly": "exit status 3", "slowly": "over"}
    assert time.monotonic() - start < 30
    assert (tmp_path / "kept" / "well.log").read_text() == "all of it\n"
    assert not runs(int((tmp_path / "kept" / "slowly.log").read_text()))  # what it started has ended with it
    assert run_parts(wanted[0], budget=1) == {"well": "ok, earlier"}
    assert run_parts(wanted[0], budget=1, again=True) == {"well": "no time: 30 s expected"}


def test_the_last_step_of_a_training_is_a_record(run_parts, tmp_path):
    lines = [
        {
            "tokens": 8,
            "seconds": s,
            "tokens_per_s": 8 / s,
            "tokens_per_s_per_rank": 4 / s,
            "peak_memory_bytes": 1,
            "loss": 2.0,
        }
        for s in (4.0, 2.0)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write = f"import pathlib, sys; f = pathlib.Path(sys.argv[2]); f.mkdir(); (f / 'metrics.jsonl').write_text({text!r})"
    part = machine.Part("short_1B", 30, code(write) + f" --out {tmp_path}/kept/short_1B", step=True)
    assert run_parts(part) == {"short_1B": "ok"}
    (record,) = tmp_path.glob("*_short_1B_2x*.json")
    record = json.loads(record.read_text())
    assert record["rows"][0]["seconds"] == 2.0
    assert record["facts"]["seconds of each"] == [4.0, 2.0]
    assert record["environment"]["commit"] == "abc"
    assert str(tmp_path) not in record["command"]
