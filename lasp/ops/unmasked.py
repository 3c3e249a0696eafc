"""`linear_attention` without a mask: every token sees the sum over all tokens of its sequence, on all ranks.

    S  = initial_state + sum_t k_t^T v_t                o_t  = scale * q_t S
    dS = d_final_state + scale * sum_t q_t^T do_t       dq_t = scale * do_t S^T    dk_t = v_t dS^T    dv_t = k_t dS

Each rank adds up what its own tokens give, and one sum over the ranks makes it whole: in forward of states, in backward
of their gradients. Of packed documents only those on more than one rank take part, each in the place of the first
border between ranks that it crosses. So a message has one length, whatever documents a batch has; where all final
states are wanted, it has these.

There is nothing to scan, and the products are PyTorch's, in the dtype of states.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from lasp import exchange
from lasp.checks import finite
from lasp.layout import ShardLayout
from lasp.ops import recompute
from lasp.ops.call import Call, no_autocast
from lasp.ranks import SequenceParallel
from lasp_kernels import Operands, state_dtype
from lasp_kernels.once import no_second_derivative

PIECE = 16384  # tokens that are converted to the dtype of states at once


def check(
    x: Operands, segment_length: int | None, layout: ShardLayout | None, sequence: SequenceParallel | None
) -> None:
    """Raise `ValueError` for what belongs to a state that passes from token to token, and for forms without sums."""
    if x.log_decay is not None:
        raise ValueError(
            "log_decay must be None with causal=False, where each token sees all others alike, got a decay of shape "
            f"{tuple(x.log_decay.shape)}"
        )
    if segment_length is not None:
        raise ValueError(
            f"segment_length must be None with causal=False, where a sum is taken rank by rank, got {segment_length}"
        )
    if x.normalize:
        raise ValueError(
            "normalize must be False with causal=False, got True (give v a column of ones, and divide by it)"
        )
    if x.v.shape[2] != x.k.shape[2]:
        raise ValueError(f"v must have the heads of k with causal=False, got {x.v.shape[2]} and {x.k.shape[2]}")
    # Without a mask padding behind the last token is seen by all tokens, and nothing but a layout tells it from these.
    if layout is None and isinstance(sequence, SequenceParallel) and sequence.size > 1:
        raise ValueError(
            "layout must tell which tokens are padding (lasp.shard_batch makes it), since with causal=False each token "
            "would see these too; got None"
        )


def not_streamed(runs: str) -> None:
    """Raise, since the call is on a segment of a stream; `runs` names what runs it."""
    raise ValueError(
        f"causal is False in a model that {runs} runs: each token sees the sum over the whole sequence, and a segment "
        "has its own tokens only"
    )


def forward(
    x: Operands, initial_state: Tensor | None, call: Call, final_state: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """o, the final state [N, H, K, V] if asked for, and the whole sums [runs, H, K, V] that backward needs."""
    with torch.no_grad(), no_autocast(x.k.device.type):
        sums = _sums(x.k, x.v, x.k.shape[2], call)
        if initial_state is not None:
            sums += call.shard.own_states(initial_state, torch.zeros_like(sums), first=True)
        states, final = _whole(sums, call, of_all=final_state)
        finite.note(call.sequence, states)
        o = _times(x.q, states, call, x.v.dtype, scale=x.scale)
    return o, final, states


def backward(
    x: Operands, states: Tensor, do: Tensor, d_final_state: Tensor | None, call: Call, initial_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, and the gradient of the initial state, on the rank where a sequence begins."""
    heads = x.k.shape[2]
    with torch.no_grad(), no_autocast(x.k.device.type):
        sums = _sums(x.q, do, heads, call).mul_(x.scale)
        # Always, whichever inputs need a gradient here: the other ranks add this one's.
        d_states, _ = _whole(sums, call, of_all=d_final_state is not None, more=d_final_state, reverse=True)
        finite.note(call.sequence, d_states, reverse=True)
        dq = _times(do, states.mT, call, x.q.dtype, scale=x.scale)
        dk = _times(x.v, d_states.mT, call, x.k.dtype)
        dv = _times(x.k, d_states, call, x.v.dtype)
        d_initial = call.shard.all_states(d_states, first=True) if initial_grad else None
    return dq, dk, dv, d_initial


def _runs(x: Tensor, call: Call) -> Iterator[tuple[int, list[Tensor]]]:
    """The number of each run, and its tokens in pieces; a dense batch is one run."""
    offsets = call.shard.runs.cu_seqlens or (0, x.shape[1])
    for run, (start, end) in enumerate(zip(offsets, offsets[1:])):
        yield run, list(x[:, start:end].split(PIECE, 1)) if end > start else []


def _sums(y: Tensor, z: Tensor, heads: int, call: Call) -> Tensor:
    """The sum of y^T z, y [B, T, H*G, K] and z [B, T, H*G, V], over the tokens of each run and G: [runs, H, K, V]."""
    offsets = call.shard.runs.cu_seqlens
    rows = y.shape[0] if offsets is None else len(offsets) - 1
    found = torch.zeros(rows, heads, y.shape[3], z.shape[3], dtype=state_dtype(y.dtype), device=y.device)
    for (run, ys), (_, zs) in zip(_runs(y, call), _runs(z, call)):
        here = found if offsets is None else found[run : run + 1]
        for parts in zip(ys, zs):
            a, b = (part.to(found.dtype).unflatten(2, (heads, -1)) for part in parts)
            here += torch.einsum("bthgk,bthgv->bhkv", a, b)
    return found


def _times(y: Tensor, states: Tensor, call: Call, dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
    """Each token of y [B, T, H*G, K] times the state [H, K, V] of its run: [B, T, H*G, V]."""
    out = torch.empty(*y.shape[:3], states.shape[3], dtype=dtype, device=y.device)
    for (run, ys), (_, outs) in zip(_runs(y, call), _runs(out, call)):
        here = states if call.shard.runs.cu_seqlens is None else states[run : run + 1]
        for part, into in zip(ys, outs):
            heads = part.to(states.dtype).unflatten(2, (states.shape[1], -1))
            into.copy_(torch.einsum("bthgk,bhkv->bthgv", heads, here).flatten(2, 3).mul_(scale))
    return out


def _whole(
    sums: Tensor, call: Call, *, of_all: bool, more: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The sums of whole sequences from those of the runs here; with `of_all` also those of all sequences [N, H, K, V].

    `more` [N, H, K, V] is what this rank adds to the sum of each sequence.
    """
    if call.sequence is None:
        whole = sums if more is None else sums + more
        return whole, whole.clone() if of_all else None
    rows, places = _places(call, call.sequence.size, of_all)
    message = sums.new_zeros(rows, *sums.shape[1:]) if more is None else more.to(sums.dtype, copy=True).contiguous()
    for run, row in places:
        message[row] += sums[run]
    if reverse:
        message = _sum(message, call, reverse=True)
    else:
        message = recompute.once(call.key, lambda: _sum(message, call, reverse=False))
    for run, row in places:
        sums[run] = message[row]
    return sums, message if of_all else None


def _places(call: Call, ranks: int, of_all: bool) -> tuple[int, list[tuple[slice, slice]]]:
    """How many sums ranks add up together, and of which runs here they are: (runs, rows of the message)."""
    shard, runs = call.shard, call.shard.runs
    if runs.cu_seqlens is None:
        return shard.num_sequences, [(slice(None), slice(None))]
    first, count = runs.sequences.start, len(runs.sequences)
    if of_all:
        return shard.num_sequences, [(slice(0, count), slice(first, first + count))]
    assert shard.layout is not None
    assert shard.layout.cu_seqlens is not None
    offsets, borders, places = shard.layout.cu_seqlens, tuple(accumulate(shard.layout.lengths)), []
    for run in range(count):
        if (run == 0 and runs.continues) or (run == count - 1 and runs.continued):
            start, end = offsets[first + run : first + run + 2]
            row = next(n for n, border in enumerate(borders) if start < border < end)
            places.append((slice(run, run + 1), slice(row, row + 1)))
    return ranks - 1, places


def _sum(message: Tensor, call: Call, *, reverse: bool) -> Tensor:
    sequence, traffic = call.sequence, call.traffic
    assert sequence is not None
    traffic.kernels = "reference"
    found = call.sum_over_ranks(message, reverse=reverse, what="states")
    exchange.count_exchange(sequence, traffic, reverse=reverse)
    traffic.schedule = "all_reduce"
    traffic.messages += 1
    traffic.bytes_sent += message.nbytes
    return found


class Unmasked(torch.autograd.Function):
    """From q, k, v, the initial state, and (call, scale, whether the final state is wanted) to o and that state."""

    @staticmethod
    def forward(ctx, q, k, v, initial_state, facts):  # noqa: D102
        ctx.call, ctx.scale, wants_final = facts
        ctx.initial_dtype = None if initial_state is None else initial_state.dtype
        o, final_state, states = forward(Operands(q, k, v, None, ctx.scale), initial_state, ctx.call, wants_final)
        ctx.save_for_backward(q, k, v, states)
        return o, final_state

    @staticmethod
    @no_second_derivative("lasp.linear_attention")
    def backward(ctx, do, d_final_state):  # noqa: D102
        q, k, v, states = ctx.saved_tensors
        x, wanted = Operands(q, k, v, None, ctx.scale), ctx.needs_input_grad[3]
        dq, dk, dv, d_initial = backward(x, states, do, d_final_state, ctx.call, wanted)
        return dq, dk, dv, None if d_initial is None else d_initial.to(ctx.initial_dtype), None
