"""`stream_backward` on GPUs; what is checked is in stream_on_gpus.py."""

import os
from pathlib import Path

import pytest
import torch
from processes import ROOT, finish, free_port, place, start

SCRIPT = Path(__file__).with_name("stream_on_gpus.py").read_text()


@pytest.mark.timeout(600)  # kernels are compiled
@pytest.mark.parametrize(("world", "gpus"), [(1, 1), (2, 2)])
def test_streaming_on_gpus(world, gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, this machine has {torch.cuda.device_count()}")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common["PYTHONPATH"] = os.pathsep.join(str(x) for x in (ROOT, ROOT / "kernels", ROOT / "tests"))
    ranks = [start(SCRIPT, common | place(rank, world, gpus)) for rank in range(world)]
    outputs = finish(ranks, timeout=500)
    assert [rank.returncode for rank in ranks] == [0] * world, outputs
    assert all("passed" in out for out, _ in outputs)
