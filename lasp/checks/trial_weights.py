"""The weights that a trial runs a module with, and that afterwards it is as it was."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lasp.checks import hooks

SMALL, MEDIUM = 1 << 20, 1 << 28  # numbers of a parameter or buffer that may be copied, and of all of them
_TINY = 1e-2  # if no entry of a parameter is more, it may hide what comes in times it
_SHORT = (torch.bfloat16, torch.float16)

Weights = dict[str, Tensor]  # parameters and buffers in whose place others are used


@contextlib.contextmanager
def as_it_was(module: nn.Module) -> Iterator[list[Weights]]:
    """Inside, it may run: without gradients, dropout or compilation. Afterwards all attributes, weights, buffers and
    random numbers are what they were. Gives the weights to run with, the best first.

    (`functional_call` leaves its own weights in a module that is in the model twice: it puts back by name.)"""
    modules = list(module.modules())
    with kept(modules):
        for m in modules:  # by the attribute: an `eval` of its own might do more
            m.training = isinstance(m, (nn.modules.batchnorm._NormBase,))  # which mixes tokens in training
        yield _weights_of(module)


@contextlib.contextmanager
def kept(modules: list[nn.Module]) -> Iterator[None]:
    """Inside, they may run; afterwards all but the content of tensors is what it was."""
    attributes = [(vars(m), dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in modules]
    plain = vars(nn.Module()).keys()  # what every module has; the lists and such that are left are its own
    held = [x for m in modules for name, x in vars(m).items() if name not in plain and type(x) in (list, dict, set)]
    contents = [(x, copy.copy(x)) for x in (*held, *hooks.tables_of(modules))]
    devices = {p.device for m in modules for p in m._parameters.values() if p is not None and p.device.type == "cuda"}
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with contextlib.ExitStack() as stack:
            for context in (
                torch.random.fork_rng([d.index for d in devices]),
                torch.inference_mode(False),
                torch.no_grad(),
                eager,
                warnings.catch_warnings(),
                *(torch.autocast(kind, enabled=False) for kind in {"cpu", *(d.type for d in devices)}),
            ):
                stack.enter_context(context)
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, content in contents:
            x.clear()
            x.extend(content) if isinstance(x, list) else x.update(content)
        for now, before, parameters, buffers in attributes:
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)
            for name, tensors in (("_parameters", parameters), ("_buffers", buffers)):
                if isinstance(now[name], dict):
                    now[name].clear()
                    now[name].update(tensors)
                else:  # of a scripted module, from which nothing can be taken
                    for key, x in tensors.items():
                        now[name][key] = x


def _weights_of(module: nn.Module) -> list[Weights]:
    """Copies of small buffers, which may be written to, and small trained parameters with random numbers where they are
    zero, and all larger if they are tiny. Before these, where weights are of 16 bits, all in 32: rounding hides a weak
    mixer."""
    weights: Weights = {name: b.clone() for name, b in module.named_buffers() if b.numel() <= SMALL}
    for name, p in module.named_parameters():
        if p.requires_grad and p.is_floating_point() and 0 < p.numel() <= SMALL:
            largest = p.abs().max()
            if bool(largest < _TINY) or bool((p == 0).any()):
                larger = torch.where(largest < _TINY, p / largest * 0.2, p)
                weights[name] = torch.where(p == 0, torch.rand_like(p) * 0.2 + 0.1, larger)
    short = {name: x for name, x in (*module.named_parameters(), *module.named_buffers()) if x.dtype in _SHORT}
    if not 0 < sum(x.numel() for x in short.values()) <= MEDIUM:
        return [weights]
    return [weights | {name: weights.get(name, x).float() for name, x in short.items()}, weights]
