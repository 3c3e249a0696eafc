"""One thread, poisoned memory, an end for the worker processes, and how many files run at once, in which order."""

import gc
import os

import poison
import pytest
import ranks
import torch


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """How many files run at once with `-n auto`: few, as a test may start four ranks; one where these may be GPUs.

    One more than there are cores: what waits for a timeout, or for a rank, needs none.
    """
    return 0 if torch.cuda.is_available() else min(3, 1 + (os.cpu_count() or 1))


# Files that take long, the longest first: what comes last should be short, since nothing runs beside it.
LONG = """
bench co2 recipes streaming trainer late_layers transformers tensor_parallel complete kernels verify compiled faults
train delta_kernels streaming_transformers transformers_border init channel bits_alone agreement recompute messages
presence kernels_on_ranks elementwise data resume bits last_layer inference_transformers inference softmax replicas
schemes data_parallel attention scan_kernels hosts padding loss remote_code families experts docs scripts checkpoint
exchange recall mixing delta prepare aside train_families unmasked never_split launchers fla trl loops peft
"""


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONG.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish():
    ranks.collect_rarely()  # what was imported and collected stays


def pytest_configure(config):
    ranks.collect_rarely()
    # Else libraries that count their objects report them as leaks. Behind pytest's own, which collects garbage twice.
    config.add_cleanup(gc.unfreeze)


@pytest.fixture(scope="session", autouse=True)
def _session():
    torch.set_num_threads(1)  # two cores run up to four ranks
    poison.install()


@pytest.fixture(scope="module", autouse=True)
def _ranks():
    """Each file has workers of its own: they grow to 0.5 GB each, and a file finds nothing of those before it."""
    yield
    ranks.shutdown()
