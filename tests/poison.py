"""Fills memory that PyTorch hands out uninitialised with NaN, so that an element nobody writes fails a test."""

import torch


def install():
    """For `torch.empty`, `empty_like`, `new_empty` and the like, for the rest of the process."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # else the line above has no effect
