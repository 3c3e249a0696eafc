"""`lasp.linear_attention(causal=False)`: each token sees the sum over its sequence, on all ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from inputs import assert_close, gradients, random_inputs
from ranks import mesh_of, run_ranks, sequence_of_all
from torch import nn
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.ops import unmasked

SCALE, DIMS = 0.7, {"H": 2, "K": 5, "V": 4}
LENGTHS = [(23,), (9, 14), (0, 9), (7, 0, 16), (5, 11, 2), (1, 0, 0, 22), (4, 4, 4, 4)]
NAMES = ("q", "k", "v", "initial_state")


def offsets_of(lengths):
    """Documents that cross no border, one or all, that begin on one, and empty ones."""
    T, first = sum(lengths), lengths[0]
    middles = [sum(lengths[:r]) + lengths[r] // 2 for r in range(len(lengths))]
    return [(0, T), (0, first, T), (0, *middles, T), (0, T // 3, T // 3, T // 2, T), (0, 0, T), (0, T, T), (0, 1, 2, T)]


def true_results(x, cu_seqlens):
    """By two products of all tokens of a sequence, in fp64: o, the final state, and the gradients."""
    x = copy.copy(x)
    leaves = {name: getattr(x, name).clone().requires_grad_() for name in NAMES if getattr(x, name) is not None}
    q, k, v, h0 = leaves["q"], leaves["k"], leaves["v"], leaves.get("initial_state")
    k, v = (y.repeat_interleave(q.shape[2] // k.shape[2], 2) for y in (k, v))
    bounds = [slice(*pair) for pair in zip(cu_seqlens, cu_seqlens[1:])] if cu_seqlens else [slice(None)]
    states, outputs = [], []
    for n, tokens in enumerate(bounds):
        state = torch.einsum("bthk,bthv->bhkv", k[:, tokens], v[:, tokens])
        if h0 is not None:
            state = state + (h0[n : n + 1] if cu_seqlens else h0).repeat_interleave(q.shape[2] // h0.shape[1], 1)
        states.append(state[:, :: q.shape[2] // x.k.shape[2]])
        outputs.append(SCALE * torch.einsum("bthk,bhkv->bthv", q[:, tokens], state))
    return leaves, torch.cat(outputs, 1), torch.cat(states)


def expected_of(x, cu_seqlens, with_final):
    leaves, o, final = true_results(x, cu_seqlens)
    objective = (o * x.do).sum() + ((final * x.d_final_state).sum() if with_final else 0)
    found = torch.autograd.grad(objective, list(leaves.values()))
    return o.detach(), final.detach(), dict(zip(leaves, found))


def cut(x, lengths, rank):
    start = sum(lengths[:rank])
    return x[:, start : start + lengths[rank]]


def check(x, lengths, cu_seqlens, *, with_final, sequence, call=lasp.linear_attention, dense_layout=False):
    """This rank's part against all of it, gradients too; those of what all ranks hold whole are added up."""
    rank, world = dist.get_rank(), len(lengths)
    o, final, wanted = expected_of(x, cu_seqlens, with_final)
    mine = x.shard(lengths, rank)
    mine.d_final_state.div_(world)
    mine.require_grad(NAMES)
    layout = lasp.ShardLayout(lengths, cu_seqlens) if cu_seqlens or dense_layout or world > 1 else None
    options = {"scale": SCALE, "causal": False, "layout": layout, "sequence": sequence}
    options |= {"initial_state": mine.initial_state, "output_final_state": with_final}
    found_o, found_final = call(mine.q, mine.k, mine.v, **options)
    assert_close(found_o, cut(o, lengths, rank), "o")
    assert (found_final is not None) == with_final
    if with_final:
        assert_close(found_final, final, "final state")
    seeds = found_final if with_final else torch.zeros((), dtype=torch.float64)
    found = gradients(mine, found_o, seeds)
    for name, gradient in found.items():
        if name == "initial_state":
            dist.all_reduce(gradient)
            assert_close(gradient, wanted[name], "d initial_state, of all ranks")
        else:
            assert_close(gradient, cut(wanted[name], lengths, rank), f"d{name}")


def _dense(lengths, groups):
    for state in (False, True):
        x = random_inputs("none", sum(lengths), groups=groups, state=state, **DIMS)
        for with_final in (False, True):
            check(x, lengths, None, with_final=with_final, sequence=sequence_of_all(), dense_layout=state)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_dense(lengths, groups):
    run_ranks(len(lengths), _dense, lengths, groups)


def _packed(lengths, piece):
    unmasked.PIECE = piece
    for seed, cu_seqlens in enumerate(offsets_of(lengths)):
        for state in (False, True):
            x = random_inputs(
                "none", sum(lengths), B=1, groups=2, sequences=len(cu_seqlens) - 1, state=state, seed=seed, **DIMS
            )
            for with_final in (False, True):
                check(x, lengths, cu_seqlens, with_final=with_final, sequence=sequence_of_all())


@pytest.mark.parametrize("piece", [3, 16384])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed(lengths, piece):
    run_ranks(len(lengths), _packed, lengths, piece)


def _recomputed(cu_seqlens):
    lengths = (7, 0, 16)
    x = random_inputs("none", 23, B=1, **DIMS) if cu_seqlens is None else None
    x = x or random_inputs("none", 23, B=1, sequences=len(cu_seqlens) - 1, **DIMS)

    def call(q, k, v, **options):
        return checkpoint(lasp.linear_attention, q, k, v, **options, use_reentrant=False)

    sequence = lasp.SequenceParallel(dist.group.WORLD, name="whole")
    check(x, lengths, cu_seqlens, with_final=cu_seqlens is None, sequence=sequence, call=call)
    traffic = sequence.traffic_of("linear_attention")
    assert (traffic.calls, traffic.forward_exchanges, traffic.reverse_exchanges) == (1, 1, 1)
    assert (traffic.kernels, traffic.schedule) == ("reference", "all_reduce")


@pytest.mark.parametrize("cu_seqlens", [None, (0, 4, 11, 23)])
def test_one_sum_forward_and_one_backward_also_with_a_recompute(cu_seqlens):
    run_ranks(3, _recomputed, cu_seqlens)


def _message(documents):
    """As long for few documents as for many, of which most lie on one rank."""
    layout = lasp.ShardLayout((40, 40), tuple(sorted({0, 80, *range(3, 80, 80 // documents)})))
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    x = torch.randn(1, 40, 2, 5, requires_grad=True)
    lasp.linear_attention(x, x, x, causal=False, layout=layout, sequence=sequence)[0].sum().backward()
    return sequence.traffic_of("linear_attention").bytes_sent


def test_a_message_does_not_grow_with_the_documents():
    assert run_ranks(2, _message, 2) == run_ranks(2, _message, 20) == [2 * 2 * 5 * 5 * 4] * 2


def _other_ways():
    """A q that is made by a function, bf16 with states in fp32, and padding."""
    rank, x = dist.get_rank(), random_inputs("none", 21, state=False, **DIMS)
    o, final, _ = expected_of(x, None, True)
    sequence, lengths = sequence_of_all(), (11, 10)
    mine = x.shard(lengths, rank)
    layout = lasp.ShardLayout(lengths)
    made, _ = lasp.linear_attention(
        lambda: mine.q, mine.k, mine.v, scale=SCALE, causal=False, layout=layout, sequence=sequence
    )
    assert_close(made, cut(o, lengths, rank), "o")
    half, state = lasp.linear_attention(
        *(y.bfloat16() for y in (mine.q, mine.k, mine.v)),
        scale=SCALE,
        causal=False,
        layout=layout,
        sequence=sequence,
        output_final_state=True,
    )
    assert (half.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close(half.double(), cut(o, lengths, rank), "o in bf16", rtol=0.05, atol=0.3)
    padded = [torch.cat([y, torch.full_like(y[:, :rank], torch.nan)], 1) for y in (mine.q, mine.k, mine.v)]
    layout = lasp.ShardLayout((11, 11), padding=1)
    found, state = lasp.linear_attention(
        *padded, scale=SCALE, causal=False, layout=layout, sequence=sequence, output_final_state=True
    )
    assert_close(found[:, : lengths[rank]], cut(o, lengths, rank), "o of padded tokens")
    assert not found[:, lengths[rank] :].any()
    assert_close(state, final, "final state")


def test_queries_made_later_and_bf16_and_padding():
    run_ranks(2, _other_ways)


def _compiled(cu_seqlens):
    lengths, sequence = (13, 10), sequence_of_all()
    sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    x = random_inputs("none", 23, B=1, groups=2, sequences=sequences, **DIMS)
    compiled = torch.compile(lasp.linear_attention, fullgraph=True, backend="aot_eager")
    for with_final in (False, True):
        check(x, lengths, cu_seqlens, with_final=with_final, sequence=sequence, call=compiled)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 4, 4, 11, 23)])
def test_in_a_graph(cu_seqlens):
    run_ranks(2, _compiled, cu_seqlens)


class Encoder(nn.Module):
    """A layer that sees all tokens alike."""

    sequence = None

    def forward(self, x, layout=None):
        x = x.unsqueeze(2)
        return lasp.linear_attention(x, x, x, causal=False, layout=layout, sequence=self.sequence)[0].squeeze(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(11, 3), Encoder(), nn.Linear(3, 11)

    def forward(self, input_ids, position_ids=None, layout=None):
        return self.head(self.layer(self.embed(input_ids), layout))


def _in_a_model():
    mesh = mesh_of(sp=2)
    torch.manual_seed(0)
    model = Model().double()
    lasp.parallelize(model, mesh, plan={"layer": lasp.adapters.linear})
    ids = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    found = lasp.verify(model, mesh, {"input_ids": ids})
    assert found.ok, str(found)
    local = lasp.shard_batch({"input_ids": ids}, mesh)
    model(local["input_ids"], layout=local["layout"])
    assert "all_reduce" in str(lasp.explain(model)), str(lasp.explain(model))
    with pytest.raises(ValueError, match="causal is False in a model that lasp"):
        lasp.stream_backward(model, {"input_ids": ids}, mesh=mesh, segment=4)


def test_parallelize_verify_explain_and_a_stream():
    run_ranks(2, _in_a_model)


def _refused():
    sequence, x = lasp.SequenceParallel(dist.group.WORLD, name="whole"), torch.zeros(1, 4, 2, 3)
    for options, said in (
        ({"log_decay": -torch.ones(2)}, r"log_decay must be None with causal=False.*\(2,\)"),
        ({"segment_length": 64}, r"segment_length must be None with causal=False.*64"),
        ({"normalize": True}, "normalize must be False with causal=False, got True"),
    ):
        with pytest.raises(ValueError, match=said):
            lasp.linear_attention(x, x, x, causal=False, sequence=sequence, **options)
        with pytest.raises(ValueError, match=said):
            torch.compile(lasp.linear_attention, backend="aot_eager")(x, x, x, causal=False, **options)
    with pytest.raises(ValueError, match="v must have the heads of k with causal=False, got 2 and 1"):
        lasp.linear_attention(x[:, :, :1], x[:, :, :1], x, causal=False, sequence=sequence)
    with pytest.raises(ValueError, match=r"layout must tell which tokens are padding .* got None"):
        lasp.linear_attention(x, x, x, causal=False, sequence=sequence)
    causal, options = dist.get_rank() == 0, {"layout": lasp.ShardLayout((4, 4)), "sequence": sequence}
    with pytest.raises(lasp.RankMismatchError, match="causal"):
        lasp.linear_attention(x, x, x, causal=causal, **options)
    assert not lasp.linear_attention(x, x, x, causal=False, **options)[0].any()
    with pytest.raises(lasp.RankMismatchError, match="the sum of the states"):
        lasp.linear_attention(x, x, x, causal=causal, **options)
    y = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(lasp.linear_attention(y, y, y, causal=False)[0].sum(), y, create_graph=True)


def test_what_does_not_go_with_it_is_refused():
    run_ranks(2, _refused)
