"""Channels that decay each by itself over NCCL; what is checked is in elementwise_on_gpus.py."""

from pathlib import Path

import pytest
import torch
from processes import finish, free_port, place, start

SCRIPT = Path(__file__).with_name("elementwise_on_gpus.py").read_text()


@pytest.mark.parametrize("world", [1, 2])
def test_elementwise_on_gpus(world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, this machine has {torch.cuda.device_count()}")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(SCRIPT, common | place(rank, world, world)) for rank in range(world)]
    outputs = finish(ranks, timeout=180)
    assert [rank.returncode for rank in ranks] == [0] * world, outputs
    assert all("passed" in out for out, _ in outputs)
