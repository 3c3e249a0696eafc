"""Models of flash-linear-attention against its own kernels; what is checked is in fla_on_gpus.py.

On one GPU two ranks share it. Compiling its kernels, in the first setting of each that runs, takes minutes.
"""

from pathlib import Path

import pytest
import torch
from processes import finish, free_port, place, start

pytest.importorskip("fla", reason="needs flash-linear-attention 0.6.0")

import fla_models

HERE = Path(__file__).parent
SCRIPT = HERE.joinpath("fla_on_gpus.py").read_text()


def run(world, variables, names, timeout):
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    code = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nsys.argv[1:] = {names!r}\n{SCRIPT}"
    ranks = [start(code, common | variables(rank)) for rank in range(world)]
    outputs = finish(ranks, timeout=timeout)
    assert [rank.returncode for rank in ranks] == [0] * world, outputs
    assert all("passed" in out for out, _ in outputs)
    return outputs[0][0]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world", "gpus"), [(2, 2), (2, 1)])
def test_split_models_are_as_near_as_fla(world, gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, this machine has {torch.cuda.device_count()}")
    found = run(world, lambda rank: place(rank, world, gpus), [], 1700)
    assert "WRONG" not in found
    assert all(f"{name} {dtype}: " in found for name in fla_models.NAMES for dtype in (torch.float32, torch.bfloat16))


@pytest.mark.timeout(600)  # imports and an interpreter, on a machine that may be busy
def test_against_the_kernels_that_triton_can_interpret():
    """Those of the other layers do not run in it."""
    here = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    names = ["gla", "hgrn2", "delta_net", "mamba2"]
    found = run(2, lambda rank: here | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, names, 570)
    assert "WRONG" not in found
    assert all(f"{name} {torch.float32}: " in found for name in names)
