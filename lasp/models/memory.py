"""Three ways to train a model of `lasp.models` in less memory, none of which changes a number.

recompute    a block keeps its input alone, and runs again in backward: a third of its arithmetic more
chunk        a gated linear unit works on so many tokens at a time: for it alone that once more
offload      what so many of the recomputed blocks keep lies in the host's memory until backward needs it
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.utils.checkpoint import checkpoint

from lasp import arguments
from lasp.models.tnl import TNLConfig

FILL = 0.9  # of the memory that is free


def save_memory(blocks: nn.ModuleList, *, recompute: int, chunk: int = 0, offload: int = 0) -> None:
    """Recompute the first so many blocks, keep on the host what the first `offload` of these keep, and let gated linear
    units work on `chunk` tokens at a time, if not 0; in place.

    After `lasp.parallelize` and before FSDP2. The recompute is a module around each block, as PyTorch's own trainers
    use it, since it can be compiled: `block.compile()` before this keeps the exchange outside the recompute, after it
    takes the recompute into the graph. Names of parameters stay. (A `block.forward` replaced by a call of `checkpoint`
    is a frame that torch.compile passes over.)

    Raises:
        ValueError, TypeError: numbers below 0, more blocks than there are, or more of `offload` than are recomputed.
    """
    recompute = arguments.integer("recompute", recompute, at_least=0)
    chunk = arguments.integer("chunk", chunk, at_least=0)
    if recompute > len(blocks):
        raise ValueError(f"recompute must be at most the number of blocks, {len(blocks)}, got {recompute}")
    offload = arguments.integer("offload", offload, at_least=0)
    if offload > recompute:
        raise ValueError(
            f"offload must be at most the blocks that are recomputed, {recompute}, got {offload}: it is what these "
            "keep that goes to the host"
        )
    for number, block in enumerate(blocks):
        if chunk:
            block.glu.forward = functools.partial(in_chunks, block.glu.forward, chunk)  # type: ignore[union-attr]
        if number < recompute:
            block = checkpoint_wrapper(block)
            blocks[number] = offload_wrapper(block) if number < offload else block


def in_chunks(forward: Callable[[Tensor], Tensor], tokens: int, x: Tensor) -> Tensor:
    """A layer that works token by token, on so many of x [B, T, D] at once, whose inner activations are not kept."""
    return torch.cat([checkpoint(forward, part, use_reentrant=False) for part in x.split(tokens, 1)], 1)  # type: ignore[misc]


def blocks_to_recompute(config: TNLConfig, tokens: int, *, free: int, parameters: int, number: int = 2) -> int:
    """As few blocks as fit into the memory of a GPU.

    Args:
        config: of the model.
        tokens: of this rank, at once.
        free: bytes.
        parameters: bytes that gradients, moments and gathered weights will take.
        number: bytes of a number in the arithmetic.
    """
    D, G = config.width, config.glu_width
    kept = number * (9 * D + 2 * G)  # two inputs, q, k before and after swish, v, gate, o; both halves of the unit
    rotated = number * 4 * D if config.lrpe else 0  # q, k of the first block are twice as wide
    working = 2 * kept + rotated + 4 * number * D  # of one block in backward; embeddings, norm and loss
    room = FILL * free - parameters - tokens * (working + config.layers * number * D)
    fitting = int(max(0.0, room) // (tokens * (kept - number * D)))
    return max(0, config.layers - fitting)
