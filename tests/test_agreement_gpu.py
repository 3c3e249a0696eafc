"""What ranks compare over NCCL, on GPUs of this machine; what is checked is in agreement_on_gpus.py."""

from pathlib import Path

import pytest
import torch
from agreement_on_gpus import TIMEOUT, WAYS
from processes import finish, free_port, place, start

SCRIPT = Path(__file__).with_name("agreement_on_gpus.py")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("world", "gpus"), [(2, 2), (4, 4)])
def test_every_difference_is_an_error_on_every_rank(world, gpus, way):
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs, this machine has {torch.cuda.device_count()}")
    # The heads of the small model are narrower than the Triton kernels take.
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WAY": way, "LASP_KERNELS": "reference"}
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\nfrom agreement_on_gpus import main; main()"
    ranks = [start(code, common | place(rank, world, gpus)) for rank in range(world)]
    outputs = finish(ranks, timeout=90 + TIMEOUT)
    assert [rank.returncode for rank in ranks] == [0] * world, outputs
    assert all("passed" in out for out, _ in outputs), outputs
