"""`check_finite` on a GPU: flags follow a model that moves there, and the host waits once a step."""

import pytest
import torch
import torch.distributed as dist
from small_model import SmallModel

import lasp
from lasp.checks import finite

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module", autouse=True)
def _group():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("moves", [("cpu", "cuda"), ("cuda", "cpu")])
def test_flags_follow_their_layer(moves):
    """What was noted on the first device counts, and so does what is noted on the second."""
    for bad in (0, 1):
        sequence = lasp.SequenceParallel(dist.group.WORLD, check_finite=True)
        for number, device in enumerate(moves):
            finite.note(sequence, torch.full((2, 3), torch.nan if number == bad else 1.0, device=device))
        with pytest.raises(FloatingPointError, match=r"rank 0: a layer without name \(forward\)$"):
            lasp.assert_finite()
        lasp.assert_finite()


def test_a_model_that_has_moved():
    model = lasp.parallelize(SmallModel(), dist.group.WORLD, check_finite=True)
    for device in ("cpu", "cuda"):
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for factor in (1.0, torch.inf):
            optimizer.zero_grad()
            ids = torch.full((1, 5), 3, device=device)
            (model(ids, torch.arange(5, device=device)).square().mean() * factor).backward()
            if factor == 1.0:
                optimizer.step()
        with pytest.raises(FloatingPointError, match=r"the gradient of tokens\.weight, "):
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


def test_the_host_waits_once_a_step():
    """Where nothing is wrong, and the gradients are many."""
    model = lasp.parallelize(SmallModel().cuda(), dist.group.WORLD, check_finite=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sequence = lasp.SequenceParallel(dist.group.WORLD, check_finite=True)
    finite.note(sequence, torch.ones(2, 3, device="cuda"))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as warned:
            lasp.assert_finite(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in warned if "synchroniz" in str(w.message)]) == 1
