"""Backward passes of which there is no backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def no_second_derivative(function: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of a backward: it raises where a graph of itself is asked for.

    (PyTorch's `once_differentiable` raises in a second `backward()` only. Where `torch.autograd.grad` asks for some
    gradients its part would be missing in them.)
    """

    def of(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def once(ctx: Any, *gradients: Any) -> Any:
            refuse_second_derivative(function)
            return backward(ctx, *gradients)

        return once

    return of


def refuse_second_derivative(function: str) -> None:
    """In a backward: raises where a graph of it is asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{function} has no second derivative: call backward without create_graph")
