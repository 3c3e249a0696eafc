"""Softmax attention over ranks, against the fp64 formula written out, on every rank."""

import contextlib
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.ranks import collectives

LENGTHS = [(23,), (9, 14), (0, 23), (23, 0), (5, 1, 17), (6, 0, 4, 13)]
CASES = {
    "plain": {},
    "grouped": {"heads": 4},
    "window": {"window": 5},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "more heads": {"heads": 12, "key_heads": 4},
    "one head of keys": {"heads": 12, "key_heads": 1},
    "packed": {"cu_seqlens": (0, 4, 5, 14, 14, 23)},
    "packed window": {"cu_seqlens": (0, 11, 23), "window": 3},
    "padded left": {"padding": (4, 0)},
    "padded right, grouped": {"padding": (-3, -9), "heads": 6},
}


def formula(q, k, v, *, cu_seqlens=None, window=None, scale=None, softcap=None, key_mask=None):
    """o of the whole sequence; [B, T, H, D]."""
    T, groups = q.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    t = torch.arange(T)
    seen = t[:, None] >= t[None]
    if window is not None:
        seen &= t[:, None] - t[None] < window
    if cu_seqlens is not None:
        document = torch.bucketize(t, torch.tensor(cu_seqlens[1:]), right=True)
        seen &= document[:, None] == document[None]
    seen = seen.expand(q.shape[0], 1, T, T)
    if key_mask is not None:
        seen = (seen & key_mask[:, None, None]) | torch.eye(T, dtype=torch.bool)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def _split(lengths, name, known, wrap, order=None):
    order = order or list(range(len(lengths)))
    sequence = lasp.SequenceParallel(DeviceMesh("cpu", order, mesh_dim_names=("sp",)))
    rank, T = sequence.rank, sum(lengths)
    case = dict(CASES[name])
    heads, padding, cu_seqlens = case.pop("heads", 2), case.pop("padding", None), case.pop("cu_seqlens", None)
    draw, B = torch.Generator().manual_seed(0), 1 if cu_seqlens else 2
    kept = case.pop("key_heads", 2)
    q, k, v, do = (
        torch.randn(B, T, h, n, generator=draw).double() for h, n in ((heads, 6), (kept, 6), (kept, 4), (heads, 4))
    )
    mask = None
    if padding is not None:
        place = torch.arange(T)
        mask = torch.stack([place >= n if n >= 0 else place < T + n for n in padding])
        do = do * mask[..., None, None]  # what padding sees is nobody's business
    true = [x.clone().requires_grad_() for x in (q, k, v)]
    o_true = formula(*true, cu_seqlens=cu_seqlens, key_mask=mask, **case)
    expected = torch.autograd.grad(o_true, true, do)

    here = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
    mine = [x[:, here].clone().requires_grad_() for x in (q, k, v)]
    layout = lasp.ShardLayout(lengths, cu_seqlens) if known or cu_seqlens else None
    key_mask = None if mask is None else mask[:, here]
    call = lambda *x: lasp.softmax_attention(*x, layout=layout, sequence=sequence, key_mask=key_mask, **case)  # noqa: E731
    asked = AssertionError("the layout tells how many tokens each rank holds")
    with mock.patch("lasp.ranks.collectives.lengths_of", side_effect=asked) if layout else contextlib.nullcontext():
        o = checkpoint(call, *mine, use_reentrant=False) if wrap else call(*mine)
        found = torch.autograd.grad(o, mine, do[:, here])
    real = slice(None) if mask is None else mask[:, here]
    torch.testing.assert_close(o[real], o_true[:, here][real])
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y[:, here])
    ranks = len(lengths)
    if ranks == 1:
        assert sequence.traffic.bytes_sent == 0
        return
    by_heads = heads % ranks == 0 and (kept % ranks == 0 or ranks % kept == 0)
    counts = (sequence.traffic.forward_exchanges, sequence.traffic.reverse_exchanges)
    assert counts == (1 + by_heads + (mask is not None), 1 + by_heads)
    if mask is None and by_heads:
        there, back = (heads + max(kept, ranks)) * 6 + max(kept, ranks) * 4, heads * 4
        given_away = lengths[rank] * (ranks - 1), T - lengths[rank]
        twice = (there * given_away[0] + back * given_away[1], there * given_away[1] + back * given_away[0])
        assert sequence.traffic.bytes_sent == 8 * B * sum(twice) // ranks
    elif mask is None:
        bytes_of_slice = 8 * B * max(lengths) * kept * (6 + 4)
        assert sequence.traffic.bytes_sent == pytest.approx(2 * (ranks - 1) * bytes_of_slice)


@pytest.mark.any_pytorch
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_gradient_on_every_rank(lengths, name):
    for known in (True, False):
        run_ranks(len(lengths), _split, lengths, name, known, False)


@pytest.mark.parametrize("known", [True, False])
def test_a_recompute_exchanges_nothing(known):
    run_ranks(3, _split, (5, 1, 17), "padded left", known, True)


class NoTensorAsIndex(TorchDispatchMode):
    """On a GPU a list as index is copied there first, and the host waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.index.Tensor, args[1]
        return func(*args, **(kwargs or {}))


def _permuted(name):
    lengths, order = (5, 1, 17), [2, 0, 1]
    _split(lengths, name, True, False, order)
    sequence = lasp.SequenceParallel(DeviceMesh("cpu", order, mesh_dim_names=("sp",)))
    shares = torch.arange(2 * lengths[sequence.rank] * 3 * 4.0).view(2, -1, 3, 4)
    with NoTensorAsIndex():
        tokens = collectives.tokens_to_heads(shares, lengths, sequence, str)
        assert torch.equal(collectives.heads_to_tokens(tokens, lengths, sequence, str), shares)
        gathered = collectives.gather_tokens(shares, lengths, sequence, str)
        assert torch.equal(collectives.scatter_tokens(gathered, lengths, sequence, str), 3 * shares)


@pytest.mark.parametrize("name", ["plain", "one head of keys"])
def test_ranks_in_another_order_than_their_group(name):
    run_ranks(3, _permuted, name)


def _compiled(heads):
    rank, lengths = dist.get_rank(), (5, 8)
    draw = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(2, lengths[rank], heads, 8, generator=draw).double().requires_grad_() for _ in range(3))
    sequence, layout = lasp.SequenceParallel(dist.group.WORLD), lasp.ShardLayout(lengths)
    f = lambda *x: lasp.softmax_attention(*x, layout=layout, sequence=sequence, window=4).cos().sum()  # noqa: E731
    # Compiled first: nothing that an eager call leaves behind may be needed.
    found = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v), (q, k, v))
    expected = torch.autograd.grad(f(q, k, v), (q, k, v))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("heads", [2, 3])
def test_compiled(heads):
    run_ranks(2, _compiled, heads)


def _keys_of_one_rank(heads):
    """Keys are trained on one rank only: all of them come to the exchange of its gradients."""
    rank, sequence = dist.get_rank(), lasp.SequenceParallel(dist.group.WORLD)
    q = torch.ones(1, 3, heads, 4, requires_grad=True)
    k, v = (torch.randn(1, 3, heads, 4, requires_grad=rank == 0) for _ in range(2))
    lasp.softmax_attention(q, k, v, sequence=sequence).sum().backward()
    assert sequence.traffic.reverse_exchanges == heads
    assert (v.grad is not None) == (rank == 0)


@pytest.mark.parametrize("heads", [1, 2])
def test_keys_that_are_trained_on_one_rank_only(heads):
    run_ranks(2, _keys_of_one_rank, heads)


def _all_gather():
    """The user may ask for keys and values on every rank."""
    draw = torch.Generator().manual_seed(dist.get_rank())
    x = [torch.randn(1, 3 + dist.get_rank(), 2, 4, generator=draw).double().requires_grad_() for _ in range(3)]
    found = []
    for softmax in ("auto", "all_gather"):
        sequence = lasp.SequenceParallel(dist.group.WORLD, softmax=softmax)
        o = lasp.softmax_attention(*x, sequence=sequence)
        found.append((o, *torch.autograd.grad(o.cos().sum(), x)))
        assert sequence.traffic.schedule == {"auto": "all_to_all"}.get(softmax, softmax)
    torch.testing.assert_close(*found)
    with pytest.raises(ValueError, match=r"softmax must be .auto. or .all_gather., got 'ring'"):
        lasp.SequenceParallel(dist.group.WORLD, softmax="ring")


def test_keys_and_values_of_all_on_every_rank():
    run_ranks(2, _all_gather)


def _frozen(heads):
    """A rank whose loss needs no gradient of its own tokens still gives the others theirs."""
    rank, sequence = dist.get_rank(), lasp.SequenceParallel(dist.group.WORLD)
    q, k, v = (torch.ones(1, 3, heads, 4, requires_grad=True) for _ in range(3))
    o = lasp.softmax_attention(q, k, v, sequence=sequence)
    (o * (rank == 2)).sum().backward()
    assert (v.grad > 0).all()  # the last rank's tokens see all
    assert sequence.traffic.reverse_exchanges == (1 if heads == 1 else 2)


@pytest.mark.parametrize("heads", [1, 3])
def test_loss_of_one_rank_only(heads):
    run_ranks(3, _frozen, heads)


def _differ():
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="softmax")
    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(lasp.RankMismatchError, match='layer "softmax": rank 1 has window 2, the others null'):
        lasp.softmax_attention(x, x, x, sequence=sequence, window=2 if dist.get_rank() == 1 else None)
    mask, other = torch.ones(1, 3, dtype=torch.bool), lasp.SequenceParallel(dist.group.WORLD)
    with pytest.raises(lasp.RankMismatchError, match=r"rank 2 has key_mask .*, the others null"):
        lasp.softmax_attention(x, x, x, sequence=other, key_mask=mask if dist.get_rank() == 2 else None)
    assert lasp.softmax_attention(x, x, x, sequence=sequence).isfinite().all()


def test_ranks_that_differ_raise_on_all():
    run_ranks(3, _differ)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1.*got 0"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in .*got 1.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be > 0, got -1.0"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
        ({"layout": lasp.ShardLayout((4,))}, ValueError, "layout gives rank 0 4 tokens, but k has 3"),
        ({"sequence": "sp"}, TypeError, "sequence must be a lasp.SequenceParallel or None, got 'sp'"),
    ],
    ids=str,
)
def test_bad_arguments(changed, error, message):
    x = torch.zeros(1, 3, 2, 4)
    with pytest.raises(error, match=message):
        lasp.softmax_attention(x, x, x, **changed)


def _alone(operator):
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    sequence = lasp.SequenceParallel(group, name="layer", validate="off", exchange="ring")
    x = torch.zeros(1, 3, 2, 4)
    calls = {
        "softmax": lambda: lasp.softmax_attention(x, x, x, layout=lasp.ShardLayout((3, 3)), sequence=sequence),
        "softmax, no layout": lambda: lasp.softmax_attention(x, x, x, sequence=sequence),
        "delta": lambda: lasp.delta_rule(x, x, x, x[..., 0], sequence=sequence),
        "unshard": lambda: lasp.unshard_sequence(x, sequence),
    }
    if dist.get_rank() == 1:
        with pytest.raises(lasp.PeerError, match=r"layer 'layer', forward|unshard_sequence"):
            calls[operator]()


@pytest.mark.parametrize("operator", ["softmax", "softmax, no layout", "delta", "unshard"])
def test_a_rank_that_does_not_come_is_a_peer_error(operator):
    run_ranks(2, _alone, operator)
