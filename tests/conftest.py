"""One thread, poisoned memory, and an end for the worker processes."""

import os

import poison
import pytest
import ranks
import torch


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """How many files run at once with `-n auto`: few, as a test may start four ranks; one where these may be GPUs."""
    return 0 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


@pytest.fixture(scope="session", autouse=True)
def _session():
    torch.set_num_threads(1)  # two cores run up to four ranks
    poison.install()
    yield
    ranks.shutdown()
