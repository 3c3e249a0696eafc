"""One thread, poisoned memory, an end for the worker processes, and how many files run at once."""

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


@pytest.fixture(scope="module", autouse=True)
def _ranks():
    """Each file has workers of its own: they grow to 0.5 GB each, and a file finds nothing of those before it."""
    yield
    ranks.shutdown()
