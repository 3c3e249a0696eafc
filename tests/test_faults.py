"""One rank is killed, stopped, late, or leaves a layer out: the others raise in time and name it; nothing stays behind.

`tests/faults/inject.py` is the same at random places, 200 times.
"""

import functools
import re

import pytest
from faults.inject import inject, random_faults
from faults.program import KINDS, Fault

ODD = 1  # the rank in the middle, whom both others wait for
PLACE = {"rank": ODD, "layer": 1, "step": 1}  # of the exchange itself: the calls of this step are not compared
PEERS = [Fault(kind, direction=d, **PLACE) for kind in ("kill", "stop", "skip") for d in ("forward", "backward")]
OTHERS = [
    Fault("delay", direction="backward", **PLACE),
    Fault("exit", direction="backward", store="rank 0", **PLACE),
    Fault("shape", rank=2, layer=2, step=2),
    Fault("dtype", rank=0, layer=0, step=0, store="rank 0"),
    Fault("stop", rank=0, layer=0, step=0, store="rank 0"),
]


@functools.cache
def outcomes():
    """All at once: most of their time is waiting."""
    faults = [*PEERS, *OTHERS]
    return dict(zip(faults, inject(faults, ranks=3, backend="gloo", timeout=4.0, parallel=4)))


@pytest.mark.parametrize("fault", [*PEERS, *OTHERS], ids=lambda f: f"{f.kind}-{f.direction}-{f.store}")
def test_every_fault_is_detected_and_nothing_stays_behind(fault):
    outcome = outcomes()[fault]
    assert outcome.detected, f"{outcome.problem}\n{outcome.errors}"
    assert outcome.left == 0


@pytest.mark.parametrize("fault", PEERS, ids=lambda f: f"{f.kind}-{f.direction}")
def test_the_error_names_layer_direction_and_peer(fault):
    layer = "" if fault.kind == "skip" else r"1\.mixer\.inner"  # the skipping rank's next layer comes in its place
    for rank in (0, 2):
        error = outcomes()[fault].errors[rank]
        expected = (
            rf"PeerError: layer 'blocks\.{layer or '[012].*'}', {fault.direction}: .* with rank {ODD} failed after "
        )
        assert re.match(expected, error), error


def test_random_faults_are_of_all_kinds_and_reproducible():
    faults = random_faults(70, 3, seed=1)
    assert faults == random_faults(70, 3, seed=1) != random_faults(70, 3, seed=2)
    assert {kind: sum(f.kind == kind for f in faults) for kind in KINDS} == dict.fromkeys(KINDS, 10)
    for name in ("rank", "layer", "direction", "store"):
        assert len({getattr(f, name) for f in faults}) > 1
