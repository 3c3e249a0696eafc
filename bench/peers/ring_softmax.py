"""Ring attention (arXiv 2310.01889): causal softmax attention whose keys and values go round the ranks.

Every block is torch's flash attention; outputs of blocks merge by their log-sum-exp, and backward gives each block the
output and log-sum-exp of the whole. Of 2W parts of a sequence rank r holds the r-th from the front and the r-th from
the back, so all ranks compute as much. (torch's experimental context parallelism has no CPU path, and its interface
differs between the versions that this project runs with; this ring runs wherever SDPA does.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lasp
from peers.base import Attention, Contiguous, Inputs, Shape

aten = torch.ops.aten


class RingSoftmax(Contiguous):
    name = "ring_softmax"
    what = "causal softmax attention, keys and values round a ring (torch's flash kernel)"

    def unavailable(self, shape: Shape, sequence: lasp.SequenceParallel) -> str | None:
        if shape.tokens % 2:
            return f"{shape.tokens} tokens of a rank cannot be halved"
        return None

    def shard(self, whole: Tensor, sequence: lasp.SequenceParallel) -> Tensor:
        parts = whole.chunk(2 * sequence.size, 1)
        return torch.cat([parts[sequence.rank], parts[-1 - sequence.rank]], 1)

    def attention(self, shape: Shape, sequence: lasp.SequenceParallel) -> Attention:
        return lambda x: ring(x.q, x.k, x.v, sequence)

    def one_process(self, inputs: Inputs) -> Tensor:
        return flash(inputs.q, inputs.k, inputs.v)


def ring(q: Tensor, k: Tensor, v: Tensor, sequence: lasp.SequenceParallel) -> Tensor:
    """o of q, k, v [B, T, H, D] of this rank's two parts of the sequence."""
    return _Ring.apply(*(x.transpose(1, 2) for x in (q, k, v)), sequence).transpose(1, 2)  # type: ignore[union-attr]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of a whole sequence in one process."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)


class _Ring(torch.autograd.Function):
    """q, k, v [B, H, T, D], the two parts of this rank one behind the other."""

    @staticmethod
    def forward(ctx, q, k, v, sequence):
        # o in fp32 while blocks merge; lse [B, H, T], -inf where nothing was seen.
        o = torch.zeros(q.shape, device=q.device, dtype=torch.float32)
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device)
        kv = torch.stack([k, v])
        for step in range(sequence.size):
            waiting = _rotate(kv, sequence) if step + 1 < sequence.size else None
            rows, columns, causal = _block(step, q.shape[2], sequence)
            part, part_lse, *random = _flash(q[:, :, rows], kv[0][:, :, columns], kv[1][:, :, columns], causal)
            both = torch.logaddexp(lse[:, :, rows], part_lse)
            old, new = ((x - both).exp().unsqueeze(-1) for x in (lse[:, :, rows], part_lse))
            o[:, :, rows] = old * o[:, :, rows] + new * part.float()
            lse[:, :, rows] = both
            kv = kv if waiting is None else waiting()
        o = o.to(q.dtype)
        ctx.save_for_backward(q, k, v, o, lse, *random)
        ctx.sequence = sequence
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, *random = ctx.saved_tensors
        sequence, do = ctx.sequence, do.contiguous()
        dq = torch.zeros(q.shape, device=q.device, dtype=torch.float32)
        kv = torch.stack([k, v])
        d_kv = torch.zeros(kv.shape, device=q.device, dtype=torch.float32)  # goes round with its keys and values
        for step in range(sequence.size):
            waiting = _rotate(kv, sequence) if step + 1 < sequence.size else None
            rows, columns, causal = _block(step, q.shape[2], sequence)
            k_part, v_part = (x[:, :, columns] for x in kv)
            seen = [x[:, :, rows].contiguous() for x in (do, q, o, lse)]
            part_dq, part_dk, part_dv = _flash_backward(*seen, k_part, v_part, causal, random)
            dq[:, :, rows] += part_dq
            d_kv[0][:, :, columns] += part_dk
            d_kv[1][:, :, columns] += part_dv
            kv = kv if waiting is None else waiting()
            d_kv = _rotate(d_kv, sequence)()  # after the last step home again
        return dq.to(q.dtype), d_kv[0].to(k.dtype), d_kv[1].to(v.dtype), None


def _block(step: int, tokens: int, sequence: lasp.SequenceParallel) -> tuple[slice, slice, bool]:
    """Which of this rank's queries see which of the keys that `step` hops brought here, and whether with a mask."""
    source = (sequence.rank - step) % sequence.size
    everything, front, back = slice(None), slice(0, tokens // 2), slice(tokens // 2, None)
    if source == sequence.rank:
        return everything, everything, True
    # The front part of an earlier rank lies before all our queries, its back part behind them; of a later rank both
    # parts lie between our front and our back.
    return (everything, front, False) if source < sequence.rank else (back, everything, False)


def _rotate(x: Tensor, sequence: lasp.SequenceParallel):
    """Send to the next rank of the ring, receive from the one before; the result waits."""
    received = torch.empty_like(x)
    if sequence.size == 1:
        return lambda: x
    source, target = (sequence.ranks[(sequence.rank + i) % sequence.size] for i in (-1, 1))
    ends = (dist.P2POp(dist.isend, x, target, sequence.group), dist.P2POp(dist.irecv, received, source, sequence.group))
    works = dist.batch_isend_irecv(list(ends))

    def wait() -> Tensor:
        for work in works:
            work.wait()
        return received

    return wait


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and what backward wants to know of dropout, of which there is none."""
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    o, lse, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return o, lse, seed, offset


def _flash_backward(
    do: Tensor, q: Tensor, o: Tensor, lse: Tensor, k: Tensor, v: Tensor, causal: bool, random: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(do, q, k, v, o, lse, 0.0, causal)
    lengths = (None, None, q.shape[2], k.shape[2])
    return aten._scaled_dot_product_flash_attention_backward(do, q, k, v, o, lse, *lengths, 0.0, causal, *random)
