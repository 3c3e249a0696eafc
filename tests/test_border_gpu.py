"""What the border of a model does on a GPU, for which no host waits."""

import pytest
import torch

from lasp import ShardLayout
from lasp.adapters import border

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_positions_of_packed_documents_are_made_without_a_wait_of_the_host():
    border.positions(ShardLayout((2, 2), (0, 1, 4)), 1, torch.device("cuda", 0))  # memory is pinned and allocated
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = border.positions(ShardLayout((5, 6), (0, 3, 3, 9), 2), 1, torch.device("cuda", 0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.tolist()[0][:4] == [2, 3, 4, 5]
