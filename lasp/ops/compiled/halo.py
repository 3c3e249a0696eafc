"""`lasp.halo`, and what is computed from it of packed documents: convolutions, and attention in blocks."""

import torch
from torch import Tensor

from lasp.layout import Shard, ShardLayout
from lasp.ops import halo
from lasp.ops.call import begin
from lasp.ops.compiled._common import MaybeFloat, MaybeTensor, gradients_of, like_all, shard_layout, token_call
from lasp.ranks import sequence_of_handle
from lasp_kernels import convolution


@torch.library.custom_op("lasp::halo", mutates_args=())
def halo_op(x: Tensor, width: int, lengths: MaybeTensor, cu_seqlens: MaybeTensor, sequence: MaybeTensor) -> Tensor:
    """x with the tokens before it."""
    with begin(halo.NAME, sequence_of_handle(sequence)) as ranks_agree:
        halo.check(x, width)
        call = token_call(halo.NAME, x, lengths, cu_seqlens, sequence)
        if ranks_agree is not None and width > 1:
            ranks_agree.settle(lambda: call.fingerprint({"x": x}, width=width))
    return halo.with_halo(x, width, call)[0]


@halo_op.register_fake
def _(x, width, lengths, cu_seqlens, sequence):
    return x.new_empty(x.shape[0], width - 1 + x.shape[1], *x.shape[2:])


@torch.library.custom_op("lasp::halo_backward", mutates_args=())
def halo_backward_op(
    dy: Tensor, width: int, lengths: MaybeTensor, cu_seqlens: MaybeTensor, sequence: MaybeTensor
) -> Tensor:
    """The gradient of x."""
    call = token_call(halo.NAME, dy[:, width - 1 :], lengths, cu_seqlens, sequence)
    return halo.without_halo(dy, width, call)[0]


@halo_backward_op.register_fake
def _(dy, width, lengths, cu_seqlens, sequence):
    return dy.new_empty(dy.shape[0], dy.shape[1] - width + 1, *dy.shape[2:])


def _setup_halo(ctx, inputs, output):
    _, ctx.width, *facts = inputs
    ctx.save_for_backward(*facts)


def _halo_gradient(ctx, dy):
    return halo_backward_op(dy, ctx.width, *ctx.saved_tensors), None, None, None, None


halo_op.register_autograd(_halo_gradient, setup_context=_setup_halo)


def _conv(x: Tensor, weight: Tensor, bias: MaybeTensor, *facts: MaybeTensor) -> Tensor:
    layout, rank = shard_layout(*facts)  # type: ignore[arg-type]
    return convolution.causal_conv(x, weight, bias, cu_seqlens=layout.local(rank).cu_seqlens)


@torch.library.custom_op("lasp::packed_conv", mutates_args=())
def packed_conv_op(
    x: Tensor, weight: Tensor, bias: MaybeTensor, lengths: Tensor, cu_seqlens: Tensor, sequence: MaybeTensor
) -> Tensor:
    """The convolution of this rank's documents, from x with the tokens before it."""
    return _conv(x, weight, bias, lengths, cu_seqlens, sequence).clone(memory_format=torch.contiguous_format)


@packed_conv_op.register_fake
def _(x, weight, bias, lengths, cu_seqlens, sequence):
    return x.new_empty(x.shape[0], x.shape[1] - weight.shape[1] + 1, x.shape[2])


@torch.library.custom_op("lasp::packed_conv_backward", mutates_args=())
def packed_conv_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: MaybeTensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""

    def again(x: Tensor, weight: Tensor, bias: MaybeTensor) -> Tensor:
        return _conv(x, weight, bias, lengths, cu_seqlens, sequence)

    dx, dw, db = gradients_of(again, (x, weight, bias), dy)
    return dx, dw, db


@packed_conv_backward_op.register_fake
def _(dy, x, weight, bias, *facts):
    return tuple(like_all((x, weight, bias), dy))


def _setup_conv(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _conv_gradients(ctx, dy):
    dx, dw, db = packed_conv_backward_op(dy, *ctx.saved_tensors)
    return dx, dw, None if ctx.saved_tensors[2] is None else db, None, None, None


packed_conv_op.register_autograd(_conv_gradients, setup_context=_setup_conv)


def _blocks(q: Tensor, both: Tensor, block: int, scale: MaybeFloat, *facts: MaybeTensor) -> Tensor:
    lengths, cu_seqlens, sequence = facts
    shard = Shard.of(q, ShardLayout.of_facts(lengths, cu_seqlens), sequence_of_handle(sequence), "q")
    keys_and_values = halo.Brought(both, shard.runs.cu_seqlens, shard.tokens_before)
    return halo.attend_in_blocks(q, keys_and_values, block, scale)


@torch.library.custom_op("lasp::packed_blocks", mutates_args=())
def packed_blocks_op(
    q: Tensor,
    both: Tensor,
    block: int,
    scale: MaybeFloat,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> Tensor:
    """Attention in blocks of this rank's documents, from keys and values side by side with the tokens before them."""
    o = _blocks(q, both, block, scale, lengths, cu_seqlens, sequence)
    return o.clone(memory_format=torch.contiguous_format)


@packed_blocks_op.register_fake
def _(q, both, *rest):
    return q.new_empty(*q.shape[:3], both.shape[3] - q.shape[3])


@torch.library.custom_op("lasp::packed_blocks_backward", mutates_args=())
def packed_blocks_backward_op(
    do: Tensor,
    q: Tensor,
    both: Tensor,
    block: int,
    scale: MaybeFloat,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of q, and of keys and values."""
    dq, d_both = gradients_of(
        lambda q, both: _blocks(q, both, block, scale, lengths, cu_seqlens, sequence), (q, both), do
    )
    return dq, d_both


@packed_blocks_backward_op.register_fake
def _(do, q, both, *rest):
    return tuple(like_all((q, both), do))


def _setup_blocks(ctx, inputs, output):
    q, both, ctx.block, ctx.scale, *facts = inputs
    ctx.save_for_backward(q, both, *facts)


def _blocks_gradients(ctx, do):
    q, both, *facts = ctx.saved_tensors
    return *packed_blocks_backward_op(do, q, both, ctx.block, ctx.scale, *facts), *[None] * 5


packed_blocks_op.register_autograd(_blocks_gradients, setup_context=_setup_blocks)
