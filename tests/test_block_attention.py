"""Softmax attention in blocks: against a mask over the whole sequence, wherever ranks and documents begin; every
gradient on every rank."""

import math

import pytest
import torch
import torch.distributed as dist
from inputs import assert_close
from ranks import run_ranks, sequence_of_all
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lasp
from lasp_kernels import blocks
from lasp_kernels.softmax import softmax_attention

H, G, K, V = 2, 2, 3, 5


def whole_attention(q, k, v, block, documents, scale=None):
    """By its definition: of q [B, T, H*G, K], k and v of the whole sequence, which documents cut."""
    T = q.shape[1]
    place = torch.empty(T, dtype=torch.int64)
    for number, (start, end) in enumerate(zip(documents, documents[1:])):
        place[start:end] = number * T + torch.arange(end - start) // block  # blocks of two documents never meet
    seen = (place[:, None] == place) & torch.ones(T, T).tril().bool()
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    return torch.einsum("bhij,bjhv->bihv", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def tensors(T, batch):
    draw = torch.Generator().manual_seed(T)
    shapes = ((H * G, K), (H, K), (H, V), (H * G, V))
    return [torch.randn(batch, T, *shape, generator=draw, dtype=torch.float64) for shape in shapes]


def _against_a_mask(lengths, block, documents, wrap):
    T, rank = sum(lengths), dist.get_rank()
    mine = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    *whole, do = tensors(T, 2 if documents is None else 1)
    whole = [x.requires_grad_() for x in whole]
    expected = whole_attention(*whole, block, documents or (0, T), scale=0.7)
    gradients = torch.autograd.grad(expected, whole, do)

    local = [x[:, mine].detach().clone().requires_grad_() for x in whole]
    layout, sequence = lasp.ShardLayout(lengths, documents), sequence_of_all()

    def call(q, k, v):
        return lasp.block_attention(q, k, v, block, scale=0.7, layout=layout, sequence=sequence)

    counted = sequence.traffic_of("halo").forward_exchanges
    o = checkpoint(call, *local, use_reentrant=False) if wrap else call(*local)
    o.backward(do[:, mine])
    assert sequence.traffic_of("halo").forward_exchanges - counted == (len(lengths) > 1 and block > 1)
    assert_close(o, expected[:, mine], "o", rtol=1e-12, atol=1e-13)
    for name, x, gradient in zip("qkv", local, gradients):
        assert_close(x.grad, gradient[:, mine], f"gradient of {name}", rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("block", [1, 2, 5, 40])
@pytest.mark.parametrize("lengths", [(23,), (11, 12), (5, 1, 17), (7, 0, 10, 6), (0, 23), (2, 2, 2, 17)], ids=str)
def test_over_ranks(lengths, block):
    run_ranks(len(lengths), _against_a_mask, lengths, block, None, block == 5)


@pytest.mark.parametrize("documents", [(0, 23), (0, 4, 11, 23), (0, 0, 1, 12, 12, 22, 23)], ids=str)
@pytest.mark.parametrize("lengths", [(23,), (11, 12), (5, 0, 18), (3, 9, 1, 10)], ids=str)
def test_packed_documents_count_their_own_blocks(lengths, documents):
    for block in (3, 5):
        run_ranks(len(lengths), _against_a_mask, lengths, block, documents, False)


def test_documents_get_what_they_would_get_alone():
    q, k, v, _ = tensors(13, 1)
    packed = lasp.block_attention(q, k, v, 4, layout=lasp.ShardLayout((13,), (0, 6, 13)))
    alone = [lasp.block_attention(q[:, a:b], k[:, a:b], v[:, a:b], 4) for a, b in ((0, 6), (6, 13))]
    assert torch.equal(packed, torch.cat(alone, 1))


def test_more_blocks_than_a_kernel_takes(monkeypatch):
    q, k, v, _ = tensors(23, 2)
    expected = whole_attention(q, k, v, 3, (0, 23))
    monkeypatch.setattr(blocks, "ROWS", 5)
    assert_close(lasp.block_attention(q, k, v, 3), expected, "o", rtol=1e-12, atol=1e-13)


def test_a_row_is_no_longer_than_what_there_is(monkeypatch):
    """Of a block of millions, and of documents that are shorter than a block."""
    seen = []

    def noted(q, k, v, *, scale):
        seen.append(q.shape[:2])
        return softmax_attention(q, k, v, scale=scale)

    monkeypatch.setattr(blocks, "softmax_attention", noted)
    q, k, v, _ = tensors(23, 1)
    for documents, rows in (((0, 23), (1, 23)), ((0, 4, 11, 23), (3, 12))):
        layout = lasp.ShardLayout((23,), documents)
        expected = whole_attention(q, k, v, 1000, documents)
        assert_close(lasp.block_attention(q, k, v, 1000, layout=layout), expected, "o", rtol=1e-12, atol=1e-13)
        assert seen.pop() == rows


class _Counted(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_documents_are_not_worked_on_one_by_one():
    """On a GPU each would cost the host some thirty launches."""
    found = []
    for step in (200, 2):
        q, k, v = (x.requires_grad_() for x in tensors(400, 1)[:3])
        layout = lasp.ShardLayout((400,), tuple(range(0, 401, step)))
        with _Counted() as counted:
            lasp.block_attention(q, k, v, 16, layout=layout).sum().backward()
        found.append(counted.number)
    assert (found[1] - found[0]) / 198 < 8  # the halves of a split, views for the most part


def test_no_row_of_a_batch():
    q, k, v = (x[:0].requires_grad_() for x in tensors(23, 2)[:3])
    o = lasp.block_attention(q, k, v, 5)
    o.sum().backward()
    assert o.shape == (0, 23, H * G, V)
    assert k.grad.shape == k.shape


def test_a_token_that_is_not_finite_spoils_its_block_behind_it():
    q, k, v, _ = tensors(12, 1)
    k[:, 6] = torch.nan
    k.requires_grad_()
    o = lasp.block_attention(q, k, v, 4)
    o.sum().backward()
    spoilt = torch.tensor([t in (6, 7) for t in range(12)])
    assert torch.equal(o.isnan().flatten(2).any(2)[0], spoilt)
    assert torch.equal(k.grad.isnan().flatten(2).any(2)[0], torch.tensor([4 <= t < 8 for t in range(12)]))


def _without_layout():
    q, k, v, _ = tensors(4, 1)
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="blocks")
    with pytest.raises(ValueError, match=r"layout must tell how tokens lie on the ranks .* got None"):
        lasp.block_attention(q, k, v, 4, sequence=sequence)
    layout = lasp.ShardLayout((4, 4))
    with pytest.raises(lasp.RankMismatchError, match='layer "blocks": rank 1 has width 5, the others 4'):
        lasp.block_attention(q, k, v, 4 + dist.get_rank(), layout=layout, sequence=sequence)
    scale = 0.5 if dist.get_rank() else None
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="blocks")
    with pytest.raises(lasp.RankMismatchError, match=r'layer "blocks": rank 1 has scale 0\.5, the others null'):
        lasp.block_attention(q, k, v, 4, scale=scale, layout=layout, sequence=sequence)
    wrong = v[:, :3] if dist.get_rank() else v  # of one rank: all are told
    with pytest.raises((ValueError, lasp.RankMismatchError), match=r"k and v must agree in \[B, S, H\]"):
        lasp.block_attention(q, k, wrong, 4, layout=layout, sequence=sequence)
    assert lasp.block_attention(q, k, v, 4, layout=layout, sequence=sequence).shape == (*v.shape[:2], H * G, V)


def test_what_does_not_fit_is_an_error_on_every_rank():
    run_ranks(2, _without_layout)


def _compiled():
    rank, sequence = dist.get_rank(), lasp.SequenceParallel(dist.group.WORLD)
    lengths = (3, 5, 4)
    layout = lasp.ShardLayout(lengths)
    local = [x[:, : lengths[rank]].clone().requires_grad_() for x in tensors(5, 2)[:3]]

    def f(q, k, v):
        return lasp.block_attention(q.sin(), k, v, 4, layout=layout, sequence=sequence).cos().sum()

    expected = torch.autograd.grad(f(*local), local)
    found = torch.autograd.grad(torch.compile(f, backend="aot_eager", fullgraph=True)(*local), local)
    torch.testing.assert_close(found, expected)


def test_compiled():
    run_ranks(3, _compiled)
