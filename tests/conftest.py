"""One thread, poisoned memory, and an end for the worker processes."""

import poison
import pytest
import ranks
import torch


@pytest.fixture(scope="session", autouse=True)
def _session():
    torch.set_num_threads(1)  # two cores run up to four ranks
    poison.install()
    yield
    ranks.shutdown()
