"""What the custom ops share: types of their schemas, a call's facts, and gradients by running it once more."""

from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

from lasp.checks.messages import Kind
from lasp.layout import ShardLayout
from lasp.ops.call import Call, call_of
from lasp.ranks import sequence_of_handle

MaybeTensor = Optional[Tensor]  # noqa: UP045  # schemas are read from these annotations
MaybeInt = Optional[int]  # noqa: UP045
MaybeFloat = Optional[float]  # noqa: UP045


def token_call(
    operator: str,
    x: Tensor,
    lengths: MaybeTensor,
    cu_seqlens: MaybeTensor,
    sequence: MaybeTensor,
    settings: Kind = (),
) -> Call:
    """Of an operator that brings tokens of other ranks to x [B, T, ...]."""
    layout = ShardLayout.of_facts(lengths, cu_seqlens)
    return call_of(operator, x, layout, sequence_of_handle(sequence), settings=settings, name="x")


def shard_layout(lengths: Tensor, cu_seqlens: Tensor, sequence: MaybeTensor) -> tuple[ShardLayout, int]:
    """Of packed documents, and this rank's place."""
    layout, ranks = ShardLayout.of_facts(lengths, cu_seqlens), sequence_of_handle(sequence)
    assert layout is not None
    return layout, 0 if ranks is None else ranks.rank


# How a call of eager code is dispatched. Inside an op autograd would be left out.
_AS_EAGER = (torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set())


def gradients_of(f: Callable[..., Tensor], tensors: Sequence[MaybeTensor], dy: Tensor) -> list[Tensor]:
    """Of f's tensors, by running it again, since an op cannot keep what autograd would; an empty tensor for None."""
    with torch._C._ForceDispatchKeyGuard(*_AS_EAGER), torch.enable_grad():  # type: ignore[attr-defined]
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
        given = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad(f(*leaves), given, dy))
    return [dy.new_empty(0) if x is None else next(found).contiguous() for x in leaves]


def like_all(tensors: Sequence[MaybeTensor], dy: Tensor) -> list[Tensor]:
    """What `gradients_of` gives, for the shapes alone."""
    return [dy.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
