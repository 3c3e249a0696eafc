"""The exchange over NCCL, on all GPUs of this machine; what is checked is in exchange_on_gpus.py."""

from pathlib import Path

import pytest
import torch
from processes import finish, free_port, start

SCRIPT = Path(__file__).with_name("exchange_on_gpus.py").read_text()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_schedule_on_gpus(world):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, this machine has {torch.cuda.device_count()}")
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(SCRIPT, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world)]
    outputs = finish(ranks)
    assert [rank.returncode for rank in ranks] == [0] * world, outputs
    assert all("passed" in out for out, _ in outputs)
