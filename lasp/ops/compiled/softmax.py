"""`lasp.softmax_attention`: its messages, and its arithmetic for packed documents."""

import torch
from torch import Tensor

from lasp.checks.messages import Kind
from lasp.ops import softmax, tokens
from lasp.ops.call import Call, begin
from lasp.ops.compiled._common import (
    MaybeFloat,
    MaybeInt,
    MaybeTensor,
    gradients_of,
    like_all,
    shard_layout,
    token_call,
)
from lasp.ranks import sequence_of_handle


def _agreed_call(x: Tensor, lengths: Tensor, cu_seqlens: MaybeTensor, sequence: MaybeTensor, settings: Kind) -> Call:
    """Of a `softmax_attention` that begins, once the ranks have agreed on it."""
    with begin(softmax.NAME, sequence_of_handle(sequence)) as ranks_agree:
        call = token_call(softmax.NAME, x, lengths, cu_seqlens, sequence, settings)
        if ranks_agree is not None:
            ranks_agree.settle(lambda: call.fingerprint({"x": x}))
    return call


@torch.library.custom_op("lasp::gather_tokens", mutates_args=())
def gather_tokens_op(
    x: Tensor,
    lengths: Tensor,
    cu_seqlens: MaybeTensor,
    total: int,
    sequence: Tensor,
    window: MaybeInt,
    scale: MaybeFloat,
    softcap: MaybeFloat,
    dropout_p: float,
    heads: int,
    masked: bool,
) -> Tensor:
    """x of all ranks, which is `total` tokens; for a `softmax_attention` of these settings."""
    settings = softmax.settings_of(window, scale, softcap, dropout_p, heads, masked)
    call = _agreed_call(x, lengths, cu_seqlens, sequence, settings)
    return tokens.gather(x, tuple(lengths.tolist()), call).contiguous()


@gather_tokens_op.register_fake
def _(x, lengths, cu_seqlens, total, sequence, *settings):
    return x.new_empty(x.shape[0], total, *x.shape[2:])


@torch.library.custom_op("lasp::scatter_tokens", mutates_args=())
def scatter_tokens_op(dx: Tensor, here: int, lengths: Tensor, cu_seqlens: MaybeTensor, sequence: Tensor) -> Tensor:
    """The sum over ranks, of which this rank gets its tokens, as many as are `here`."""
    call = _whole_call(dx, here, lengths, cu_seqlens, sequence)
    return tokens.scatter(dx, tuple(lengths.tolist()), call).contiguous()


@scatter_tokens_op.register_fake
def _(dx, here, lengths, cu_seqlens, sequence):
    return dx.new_empty(dx.shape[0], here, *dx.shape[2:])


def _setup_gather(ctx, inputs, output):
    x, lengths, cu_seqlens, _, sequence, *_ = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(lengths, cu_seqlens, sequence)


def _gather_gradient(ctx, dx):
    return scatter_tokens_op(dx, ctx.tokens, *ctx.saved_tensors), *[None] * 10


gather_tokens_op.register_autograd(_gather_gradient, setup_context=_setup_gather)


@torch.library.custom_op("lasp::deal", mutates_args=())
def deal_op(
    x: Tensor,
    lengths: Tensor,
    cu_seqlens: MaybeTensor,
    total: int,
    sequence: Tensor,
    window: MaybeInt,
    scale: MaybeFloat,
    softcap: MaybeFloat,
    dropout_p: float,
    heads: int,
    masked: bool,
) -> Tensor:
    """All `total` tokens of this rank's share of x [B, T, ranks, n]; for a `softmax_attention` of these settings."""
    settings = softmax.settings_of(window, scale, softcap, dropout_p, heads, masked)
    call = _agreed_call(x, lengths, cu_seqlens, sequence, settings)
    return tokens.deal(x, tuple(lengths.tolist()), call).contiguous()


@deal_op.register_fake
def _(x, lengths, cu_seqlens, total, sequence, *settings):
    return x.new_empty(x.shape[0], total, x.shape[3])


@torch.library.custom_op("lasp::collect", mutates_args=())
def collect_op(
    x: Tensor,
    here: int,
    ranks: int,
    lengths: Tensor,
    cu_seqlens: MaybeTensor,
    sequence: Tensor,
    window: MaybeInt = None,
    scale: MaybeFloat = None,
    softcap: MaybeFloat = None,
    dropout_p: float = 0.0,
    heads: int = 0,
    masked: bool = False,
    reverse: bool = False,
) -> Tensor:
    """The tokens of this rank, as many as are `here`, of all shares; x [B, T of all ranks, n]."""
    settings = softmax.settings_of(window, scale, softcap, dropout_p, heads, masked)
    call = _whole_call(x, here, lengths, cu_seqlens, sequence, settings)
    return tokens.collect(x, tuple(lengths.tolist()), call, reverse=reverse).contiguous()


def _whole_call(
    x: Tensor, here: int, lengths: Tensor, cu_seqlens: MaybeTensor, sequence: Tensor, settings: Kind = ()
) -> Call:
    """The call of a rank that holds the tokens x of all ranks."""
    ranks = sequence_of_handle(sequence)
    assert ranks is not None
    first = sum(lengths.tolist()[: ranks.rank])
    return token_call(softmax.NAME, x[:, first : first + here], lengths, cu_seqlens, sequence, settings)


@collect_op.register_fake
def _(x, here, ranks, *rest):
    return x.new_empty(x.shape[0], here, ranks, x.shape[2])


@torch.library.custom_op("lasp::deal_gradient", mutates_args=())
def deal_gradient_op(dx: Tensor, total: int, lengths: Tensor, cu_seqlens: MaybeTensor, sequence: Tensor) -> Tensor:
    """The gradient of what `collect` was given."""
    call = token_call(softmax.NAME, dx, lengths, cu_seqlens, sequence)
    return tokens.deal(dx, tuple(lengths.tolist()), call, reverse=True).contiguous()


@deal_gradient_op.register_fake
def _(dx, total, lengths, cu_seqlens, sequence):
    return dx.new_empty(dx.shape[0], total, dx.shape[3])


def _setup_deal(ctx, inputs, output):
    x, lengths, cu_seqlens, _, sequence, *_ = inputs
    ctx.tokens = x.shape[1:3]
    ctx.save_for_backward(lengths, cu_seqlens, sequence)


def _deal_gradient(ctx, dx):
    return collect_op(dx, *ctx.tokens, *ctx.saved_tensors, reverse=True), *[None] * 10


deal_op.register_autograd(_deal_gradient, setup_context=_setup_deal)


def _setup_collect(ctx, inputs, output):
    x, _, _, lengths, cu_seqlens, sequence, *_ = inputs
    ctx.total = x.shape[1]
    ctx.save_for_backward(lengths, cu_seqlens, sequence)


def _collect_gradient(ctx, dx):
    return deal_gradient_op(dx, ctx.total, *ctx.saved_tensors), *[None] * 12


collect_op.register_autograd(_collect_gradient, setup_context=_setup_collect)


def _attend(q: Tensor, k: Tensor, v: Tensor, key_mask: MaybeTensor, options: tuple, *facts: MaybeTensor) -> Tensor:
    layout, rank = shard_layout(*facts)  # type: ignore[arg-type]
    settings = dict(zip(("window", "scale", "softcap"), options))
    return softmax.attend_packed(q, k, v, key_mask, layout, rank, settings)


@torch.library.custom_op("lasp::packed_softmax", mutates_args=())
def packed_softmax_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: MaybeTensor,
    window: MaybeInt,
    scale: MaybeFloat,
    softcap: MaybeFloat,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> Tensor:
    """Attention of this rank's queries on the keys and values of all ranks, document by document."""
    o = _attend(q, k, v, key_mask, (window, scale, softcap), lengths, cu_seqlens, sequence)
    return o.clone(memory_format=torch.contiguous_format)


@packed_softmax_op.register_fake
def _(q, k, v, *rest):
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("lasp::packed_softmax_backward", mutates_args=())
def packed_softmax_backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: MaybeTensor,
    window: MaybeInt,
    scale: MaybeFloat,
    softcap: MaybeFloat,
    lengths: Tensor,
    cu_seqlens: Tensor,
    sequence: MaybeTensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""

    def again(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend(q, k, v, key_mask, (window, scale, softcap), lengths, cu_seqlens, sequence)

    dq, dk, dv = gradients_of(again, (q, k, v), do)
    return dq, dk, dv


@packed_softmax_backward_op.register_fake
def _(do, q, k, v, *rest):
    return tuple(like_all((q, k, v), do))


def _setup_softmax(ctx, inputs, output):
    *tensors, window, scale, softcap, lengths, cu_seqlens, sequence = inputs
    ctx.options = (window, scale, softcap)
    ctx.save_for_backward(*tensors, lengths, cu_seqlens, sequence)


def _softmax_gradients(ctx, do):
    q, k, v, key_mask, *facts = ctx.saved_tensors
    return *packed_softmax_backward_op(do, q, k, v, key_mask, *ctx.options, *facts), *[None] * 7


packed_softmax_op.register_autograd(_softmax_gradients, setup_context=_setup_softmax)
