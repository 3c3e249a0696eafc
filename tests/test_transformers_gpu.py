"""Models of transformers split over GPUs; what is checked is in transformers_on_gpus.py."""

from pathlib import Path

import pytest
import torch
from processes import finish, free_port, place, start

pytest.importorskip("transformers", reason="needs the extra `transformers`")

SCRIPT = Path(__file__).with_name("transformers_on_gpus.py").read_text()


@pytest.mark.timeout(600)  # kernels are compiled
@pytest.mark.parametrize(("world", "gpus"), [(2, 2), (2, 1)])  # the last as two hosts
def test_split_models_of_transformers_on_gpus(world, gpus):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, this machine has {torch.cuda.device_count()}")
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [start(SCRIPT, common | place(rank, world, gpus)) for rank in range(world)]
    outputs = finish(ranks, timeout=550)
    assert [rank.returncode for rank in ranks] == [0] * world, outputs
    assert all("passed" in out for out, _ in outputs)
