"""What a user starts: the doctor, healthy and not, and the smallest example on one rank and on two."""

import json
import os
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from processes import ROOT, finish, start
from ranks import run_ranks
from scripts import run_processes, run_script

import lasp
from lasp import doctor
from lasp.adapters.outlook import CROSSES
from lasp.doctor import run_doctor

EXAMPLES = ROOT / "examples"


def _slightly_wrong(*args, **options):
    o, state = lasp.linear_attention(*args, **options)
    return o * 1.02, state


def _doctor(broken_ranks):
    broken = lasp.SequenceParallel(lasp.init_mesh(sp=-1, dp_shard=1)["sp"]).rank in broken_ranks
    operator = _slightly_wrong if broken else lasp.linear_attention
    with (
        mock.patch("torch.distributed.destroy_process_group"),  # the next test needs it
        mock.patch("lasp.doctor.linear_attention", operator),
        mock.patch("builtins.print"),
    ):
        return run_doctor(backend="gloo")


@pytest.mark.parametrize("world", [1, 3])
def test_the_doctor_finds_that_all_is_well(world):
    assert run_ranks(world, _doctor, ()) == [0] * world


def test_the_doctor_fails_on_every_rank_when_one_is_wrong():
    assert run_ranks(3, _doctor, (1,)) == [1, 1, 1]


def test_the_doctor_tries_every_operator_and_tells_each_that_is_wrong():
    cases = list(doctor._cases())
    assert {case.operator for case, _ in cases} == set(CROSSES) - {"halo"}  # which causal_conv and others bring along
    env = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    for case, dtype in cases:
        right = getattr(doctor, case.operator)

        def slightly_wrong(*args, right=right, **options):
            found = right(*args, **options)
            return (found[0] * 1.02, *found[1:]) if isinstance(found, tuple) else found * 1.02

        forward, backward = doctor._errors(case, dtype, env, None)
        assert max(forward, backward) < doctor._TOLERANCE[dtype]
        with mock.patch.object(doctor, case.operator, slightly_wrong):
            forward, backward = doctor._errors(case, dtype, env, None)
        assert min(forward, backward) == pytest.approx(0.02, rel=0.2), case


@pytest.mark.parametrize("operator", ["linear_attention_step", "delta_rule_step"])
def test_the_doctor_times_a_decode_step_and_tells_if_it_is_wrong(operator):
    env = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    right = getattr(doctor, operator)
    assert [name for name, *_ in doctor._steps(env)] == ["linear_attention [H]", "delta_rule [B, H]"]
    for _, error, seconds, floor in doctor._steps(env):
        assert error < doctor._TOLERANCE[torch.bfloat16]
        assert min(seconds, floor) > 0
    with mock.patch.object(doctor, operator, lambda *args, **options: 1.02 * right(*args, **options)):
        assert max(error for _, error, *_ in doctor._steps(env)) == pytest.approx(0.02, rel=0.2)


def test_the_command_line_of_the_doctor():
    code = "import sys, runpy; sys.argv[1:] = ['doctor']; runpy.run_module('lasp', run_name='__main__')"
    process = start(code, {})
    [(out, error)] = finish([process])
    assert process.returncode == 0, error
    assert "all is well" in out
    assert re.search(r"linear_attention \[H\] +[\d.]+ us, moving its state +[\d.]+ us, error \S+  ok", out)


def test_the_smallest_example_has_the_same_losses_on_two_ranks():
    code = f"import runpy; runpy.run_path({str(EXAMPLES / 'minimal.py')!r}, run_name='__main__')"
    found = [*run_processes(code, [{}]), *run_script(code, 2)]
    assert [exit_code for exit_code, _, _ in found] == [0, 0, 0], found
    alone, first, second = ([float(x) for x in re.findall(r"loss ([\d.]+)", out)] for _, out, _ in found)
    assert len(alone) == 7
    assert alone[-1] < alone[0] / 4
    assert first == pytest.approx(alone, abs=1e-3)
    assert second == []  # rank 0 alone prints


def _train(folder, *options, launched):
    """Train a few steps of the example on two ranks, which it starts by itself if they are not `launched`; the loss of
    every step of the run."""
    script = EXAMPLES / "train.py"
    arguments = ["--seq-len=130", "--steps=4", "--save-every=2", "--ranks=2", f"--out={folder}", f"--data={__file__}"]
    code = f"import sys, runpy; sys.argv[1:] = {[*arguments, *options]!r}; sys.argv[0] = {str(script)!r}; "
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    if launched:
        [(exit_code, out, error), _] = run_script(code, 2)
    else:  # the example starts torchrun with its own path, so it is found by that and not by this code
        process = start(code, {"PYTHONPATH": os.pathsep.join(map(str, (EXAMPLES, ROOT, ROOT / "kernels")))})
        [(out, error)] = finish([process])
        exit_code = process.returncode
    assert exit_code == 0, error
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "step" in row}, out


def test_the_example_resumes_where_it_was_with_the_same_bits(tmp_path):
    whole, out = _train(tmp_path / "run", "--verify", launched=False)
    assert sorted(whole) == [0, 1, 2, 3]
    assert "the same training" in out
    assert (tmp_path / "run" / "LATEST").read_text().strip() == "step-000004"
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0
    # As if the run had been killed after step 2.
    (tmp_path / "run" / "LATEST").write_text("step-000002")
    metrics = tmp_path / "run" / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines(keepends=True) if json.loads(line).get("step", 0) < 2]
    metrics.write_text("".join(kept))
    # Checkpointed activations change no bit, and no name.
    resumed, _ = _train(tmp_path / "run", "--resume", "--recompute", "all", launched=True)
    assert resumed == whole
