"""One rank is killed, stopped, late, or leaves a layer out: the others raise in time and name it; nothing stays behind.

`tests/faults/inject.py` is the same at random places, 200 times.
"""

import functools
import re
from pathlib import Path

import pytest
import torch
from faults.inject import gpu_sets, inject, random_faults
from faults.judge import judge
from faults.launch import Finished
from faults.program import KINDS, Fault, Run

ODD = 1  # the rank in the middle, whom both others wait for
PLACE = {"rank": ODD, "layer": 1, "step": 1}  # of the exchange itself: the calls of this step are not compared
PEERS = [Fault(kind, place=p, **PLACE) for kind in ("kill", "stop", "skip") for p in ("forward", "backward")]
OTHERS = [
    Fault("delay", place="backward", **PLACE),
    Fault("exit", place="backward", store="rank 0", **PLACE),
    Fault("shape", rank=2, layer=2, step=2),
    Fault("dtype", rank=0, layer=0, step=0, store="rank 0"),
    Fault("stop", rank=0, layer=0, step=0, store="rank 0"),
]


@functools.cache
def outcomes():
    """One after the other: key-value stores of several runs in one process hang with torch 2.13, seconds at a time."""
    faults = [*PEERS, *OTHERS]
    return dict(zip(faults, inject(faults, ranks=3, backend="gloo", timeout=4.0, parallel=1)))


@pytest.mark.timeout(400)  # of the first: it waits for all, 30 s on two idle cores
@pytest.mark.parametrize("fault", [*PEERS, *OTHERS], ids=lambda f: f"{f.kind}-{f.place}-{f.store}")
def test_every_fault_is_detected_and_nothing_stays_behind(fault):
    outcome = outcomes()[fault]
    assert outcome.detected, f"{outcome.problem}\n{outcome.errors}"
    assert outcome.left == 0


@pytest.mark.parametrize("fault", PEERS, ids=lambda f: f"{f.kind}-{f.place}")
def test_the_error_names_layer_direction_and_peer(fault):
    layer = rf"layer 'blocks\.1\.mixer\.inner', {fault.place}: "
    # A rank that has heard of it first may be gone, too, by the time that it is met.
    expected = rf"PeerError: {layer}.* with rank ({ODD} failed after |\d failed after .*; global rank {ODD} has ended)"
    if fault.kind == "skip":  # that rank's next layer comes in the place of the one that it left out
        expected = rf"RankMismatchError: rank {ODD} has come to layer 'blocks\.[02]\..*, the others {layer}"
    for rank in (0, 2):
        error = outcomes()[fault].errors[rank]
        assert re.match(expected, error), error


# With dp x sp: the ranks of the other sequence wait, too, and for others.
AIMED = [
    Fault("stop", place="forward", **PLACE),
    Fault("stop", place="backward", **PLACE),
    Fault("stop", place="sync", **PLACE),
    Fault("kill", place="sync", **PLACE),
    Fault("delay", place="loss", **PLACE),
    Fault("stop", rank=0, step=0, place="sync", scheme="ddp", store="rank 0"),
    Fault("kill", place="forward", scheme="fsdp2", exchange="direct", **PLACE),
    Fault("exit", place="save", scheme="ddp", **PLACE),
]


@functools.cache
def outcomes_with_dp():
    return dict(zip(AIMED, inject(AIMED, ranks=4, dp=2, backend="gloo", timeout=5.0, parallel=1)))


@pytest.mark.timeout(400)  # of the first: it waits for all, 50 s on two idle cores
@pytest.mark.parametrize("fault", AIMED, ids=lambda f: f"{f.kind}-{f.place}-{f.scheme}")
def test_with_data_parallelism_every_rank_has_an_error_that_names_rank_and_place_in_time(fault):
    outcome = outcomes_with_dp()[fault]
    assert outcome.detected, f"{outcome.problem}\n{outcome.errors}"
    assert (outcome.left, len(outcome.errors)) == (0, 0 if fault.kind == "delay" else 3)
    assert outcome.seconds is None or outcome.seconds < 5 + 3


def test_random_faults_are_of_all_kinds_and_reproducible():
    faults = random_faults(70, 3, seed=1)
    assert faults == random_faults(70, 3, seed=1) != random_faults(70, 3, seed=2)
    assert {kind: sum(f.kind == kind for f in faults) for kind in KINDS} == dict.fromkeys(KINDS, 10)
    for name in ("rank", "layer", "place", "store", "scheme"):
        assert len({getattr(f, name) for f in faults}) > 1


@pytest.fixture(scope="module")
def outcomes_on_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, this machine has {torch.cuda.device_count()}")
    return dict(zip(PEERS, inject(PEERS, ranks=2, backend="nccl", timeout=8.0, parallel=3)))


@pytest.mark.timeout(300)  # of the first: it waits for all
@pytest.mark.parametrize("fault", PEERS, ids=lambda f: f"{f.kind}-{f.place}")
def test_over_nccl_every_fault_ends_the_other_ranks_and_nothing_stays_behind(fault, outcomes_on_gpus):
    outcome = outcomes_on_gpus[fault]
    assert outcome.detected, f"{outcome.problem}\n{outcome.errors}"
    assert outcome.left == 0


# What processes print that were ended from outside Python.
WATCHDOG = (
    "[PG ID 0 PG GUID 0(default_pg) Rank 0] Process group watchdog thread terminated with exception: [Rank 0] "
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=RECV, NumelIn=48, NumelOut=48, "
    "Timeout(ms)=10000) ran for 10045 milliseconds before timing out.\nException raised from checkTimeout"
)
LINE = (
    "\nlasp: rank 0 waited for another; layer 'blocks.1.mixer.inner', forward: the exchange of the state with rank 1 "
    "has not come to its end; global rank 1 has ended. PyTorch's watchdog will end this process\n"
)
BARRIER = (
    "[FATAL] CUDASymmetricMemory::barrier: rank 0 failed to receive signal from rank 1 in channel 0 after 10000 ms"
)
LAUNCH = (
    "terminate called after throwing an instance of 'c10::AcceleratorError'\n  what():  CUDA error: unspecified launch"
)


def ended_by(log, code=-6, *, line=LINE, backend="nccl", after=10.5, losses=(), **more):
    """What is left of a run of two ranks of which the second was killed at 100 s and the first ended as told."""
    log += line
    run = Run(2, 0, Path(), backend, 10.0)
    events = [
        [{"event": "loss", "step": n, "value": x} for n, x in enumerate(losses)],
        [{"event": "fault", "time": 100.0}],
    ]
    return judge(
        Finished(Fault("kill", rank=1), run, events, [log, ""], [code, -9], {0: 100.0 + after, 1: 100.0}, **more),
        {0: 2.5, 1: 2.25},
    )


def test_an_abort_over_nccl_with_a_message_is_a_detection():
    found = ended_by(WATCHDOG)
    assert (found.detected, found.how, found.seconds) == (True, "1 x watchdog timeout", 10.5)
    assert found.errors[0].startswith(
        "watchdog timeout: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7"
    )
    assert ended_by(BARRIER + "\n" + LAUNCH, 1).how == "1 x symmetric memory"
    assert ended_by(LAUNCH).how == "1 x CUDA error"
    assert ended_by(WATCHDOG, losses=(2.5, 2.25 + 1e-7)).detected


def test_what_over_nccl_is_no_detection():
    assert "raised nothing" in ended_by("").problem
    assert "name neither place nor rank 1" in ended_by(WATCHDOG, line="").problem
    assert "name neither place nor rank 1" in ended_by(WATCHDOG, line=LINE.replace("rank 1", "rank 2")).problem
    assert "raised nothing" in ended_by(WATCHDOG, 0).problem
    assert "raised nothing" in ended_by(WATCHDOG, backend="gloo").problem
    assert "more than 18.0 s" in ended_by(WATCHDOG, after=18.5).problem
    assert "wrong losses on ranks [0]" in ended_by(WATCHDOG, losses=(2.5, 2.26)).problem
    assert "1 processes did not end" in ended_by(WATCHDOG, left=1).problem


def test_injections_share_gpus_only_in_whole_sets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_sets(2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3")
    assert gpu_sets(4) == ["7,6,5,4"]
    with pytest.raises(RuntimeError, match="a run needs 8 GPUs, this machine shows 5; --gpus 5 lets ranks share them"):
        gpu_sets(8)
