"""Padding behind the last real token: no state sees it, on no rank, and no gradient comes from it."""

import warnings
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from inputs import assert_close
from ranks import run_ranks, sequence_of_all

import lasp
from lasp.ops.elementwise import elementwise_recurrence, selective_scan

B, H, K, V, WIDTH = 2, 2, 3, 4, 3
CONTIGUOUS = torch.contiguous_format


def _example():
    """S = 1, 1.5, 1.75: the state after three tokens of ones that halve it. The last of the ranks hold padding."""
    x, g = torch.ones(1, 3, 1, 1), torch.log(torch.tensor([0.5]))
    batch = lasp.shard_batch({"input_ids": torch.ones(1, 3, dtype=torch.long), "x": x}, dist.group.WORLD)
    x, sequence = batch["x"], sequence_of_all()
    _, state = lasp.linear_attention(
        x, x, x, log_decay=g, output_final_state=True, layout=batch["layout"], sequence=sequence
    )
    assert_close(state, torch.full((1, 1, 1, 1), 1.75), "final state", rtol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_three_tokens_have_the_state_of_three(world):
    run_ranks(world, _example)


def operator(name, x, **options):
    """o, and the final state where there is one, of tensors that all operators share."""
    if name == "linear_attention":
        return lasp.linear_attention(
            x["q"], x["k"], x["v"], log_decay=x["g"], initial_state=x["h0"], output_final_state=True, **options
        )
    if name == "queries made later":
        return lasp.linear_attention(
            lambda: x["q"], x["k"], x["v"], log_decay=-x["rate"].exp(), output_final_state=True, **options
        )
    if name == "delta_rule":
        return lasp.delta_rule(
            x["q"], x["k"], x["v"], x["beta"], initial_state=x["h0"], output_final_state=True, **options
        )
    if name == "softmax_attention":
        return lasp.softmax_attention(x["q"], x["k"], x["v"], window=4, key_mask=x["mask"], **options), None
    if name == "block_attention":
        return lasp.block_attention(x["q"], x["k"], x["v"], 3, **options), None
    y = x["k"].flatten(2)
    if name == "elementwise_recurrence":
        return elementwise_recurrence(x["v"], x["g"].unsqueeze(-1), **options), None
    if name == "selective_scan":
        A = -x["rate"].exp().unsqueeze(1).expand(H, K)
        return selective_scan(x["v"][..., 0], x["beta"], A, x["q"][:, :, 0], x["k"][:, :, 1], **options), None
    if name == "halo":
        return lasp.halo(y, WIDTH, **options), None
    return lasp.causal_conv(y, x["weight"], **options), None


def tensors(rows, T, sequences):
    draw = torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    per_token = {
        "q": normal(rows, T, H, K),
        "k": normal(rows, T, H, K),
        "v": normal(rows, T, H, V),
        "g": -normal(rows, T, H).square(),
        "beta": normal(rows, T, H).sigmoid(),
    }
    shared = {"h0": normal(sequences, H, K, V), "rate": normal(H), "weight": normal(H * K, WIDTH)}
    mask = torch.rand(rows, T, generator=draw) < 0.8
    return per_token, shared, {"mask": mask}


def _as_without_padding(name, T, cu_seqlens, compiled):
    """o, final state and every gradient of padded ranks are those of one process that pads nothing."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = B if cu_seqlens is None else 1
    sequences = rows if cu_seqlens is None else len(cu_seqlens) - 1
    per_token, shared, masks = tensors(rows, T, sequences)
    halo_of = WIDTH - 1 if name == "halo" else 0
    whole = {key: x.clone().requires_grad_() for key, x in {**per_token, **shared}.items()}
    layout = None if cu_seqlens is None else lasp.ShardLayout((T,), cu_seqlens)
    o, state = operator(name, {**whole, **masks}, layout=layout)
    # What padding gives counts in the objective here, and must be nothing; its inputs are no numbers.
    objective = o[:, halo_of:].square().sum() + (0 if state is None else (state * state.detach().cos()).sum())
    wanted = dict(zip(whole, torch.autograd.grad(objective, list(whole.values()), allow_unused=True)))

    padding = -T % world
    layout = lasp.ShardLayout(((T + padding) // world,) * world, cu_seqlens, padding)
    start, end = layout.bounds(rank)

    def cut(x, fill):
        return F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding), value=fill)[:, start:end]

    mine = {key: cut(x, torch.nan).clone().requires_grad_() for key, x in per_token.items()}
    mine |= {key: x.clone().requires_grad_() for key, x in shared.items()}
    x = {**mine, "mask": cut(masks["mask"], True)}
    call = torch.compile(operator, backend="aot_eager", dynamic=True) if compiled else operator
    local_o, local_state = call(name, x, layout=layout, sequence=sequence_of_all())
    assert local_o.shape[1] == halo_of + end - start
    local_o = local_o[:, halo_of:]
    real = max(0, min(end, T) - start)
    assert_close(local_o[:, :real], o[:, halo_of + start : halo_of + start + real], "o")
    assert not local_o[:, real:].any()
    if state is not None:
        assert local_state.shape == state.shape
        assert_close(local_state, state, "final state")
    objective = local_o.square().sum()
    if state is not None:  # ranks add what each gives to the gradient of the final state
        objective = objective + (local_state * local_state.detach().cos()).sum() / world
    found = dict(zip(mine, torch.autograd.grad(objective, list(mine.values()), allow_unused=True)))
    for key, gradient in wanted.items():
        if gradient is None:
            continue
        # A copy that lies in memory as it looks: what autograd expands gloo would write beyond.
        ours = torch.zeros_like(mine[key]) if found[key] is None else found[key].clone(memory_format=CONTIGUOUS)
        if key in shared:
            dist.all_reduce(ours)
        else:
            assert not ours[:, real:].any(), f"padding has a gradient of {key}"
            ours, gradient = ours[:, :real], gradient[:, start : start + real]
        assert_close(ours, gradient, f"gradient of {key}")


OPERATORS = ["linear_attention", "queries made later", "delta_rule", "softmax_attention", "halo", "causal_conv"]
OPERATORS += ["elementwise_recurrence", "selective_scan", "block_attention"]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("T", "cu_seqlens"), [(3, None), (9, None), (1, None), (9, (0, 2, 2, 7, 9)), (3, (0, 3, 3))], ids=str
)
@pytest.mark.parametrize("name", OPERATORS)
def test_padded_ranks_give_what_one_process_gives_without(name, T, cu_seqlens, world):
    run_ranks(world, _as_without_padding, name, T, cu_seqlens, False)


@pytest.mark.parametrize("name", ["linear_attention", "causal_conv"])
def test_padding_under_torch_compile(name):
    run_ranks(2, _as_without_padding, name, 9, None, True)


def test_a_layout_knows_its_real_tokens():
    layout = lasp.ShardLayout((3, 3, 3), (0, 2, 4), 5)
    assert layout.real == lasp.ShardLayout((3, 1, 0), (0, 2, 4))
    assert (layout.total, layout.bounds(2)) == (9, (6, 9))
    assert layout.local(1) == layout.real.local(1)
    assert layout.real.real is layout.real


@pytest.mark.parametrize("world", [1, 2])
def test_a_tensor_that_does_not_fit_a_padded_layout(world):
    run_ranks(world, _does_not_fit)


def _does_not_fit():
    world, sequence = dist.get_world_size(), sequence_of_all()
    layout, x = lasp.ShardLayout((4,) * world, padding=3), torch.zeros(1, 5, 1, 2)
    for name in ("k", "q"):
        good = torch.zeros(1, 4, 1, 2)
        q, k = (x, good) if name == "q" else (good, x)
        with pytest.raises(ValueError, match=r"k has 5|q and k must agree.*\(1, [25], 1, 2\)"):
            lasp.linear_attention(q, k, k, layout=layout, sequence=sequence)


def _without_layout(operator):
    x = torch.ones(1, 3, 1, 1)
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.long), "x": x}
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    local = lasp.shard_batch(batch, dist.group.WORLD)["x"]  # whose layout is gone

    def final_state(x, **more):
        more |= {"output_final_state": True, "sequence": sequence}
        if operator == "delta_rule":
            return lasp.delta_rule(x, x, x, x[..., 0], **more)[1]
        return lasp.linear_attention(x, x, x, log_decay=torch.tensor([0.5]).log(), **more)[1]

    did_not_reach = f"did not reach the final state of {operator}, .* 2 tokens.* padding is part .*layout=local"
    with pytest.warns(UserWarning, match=did_not_reach):
        final_state(local)
    with nothing_said():
        local = lasp.shard_batch(batch, dist.group.WORLD)
        by_hand = torch.ones(1, 2 - dist.get_rank(), 1, 1)  # one rank holds as many tokens by chance
        assert final_state(by_hand).item() == (1.75 if operator == "linear_attention" else 1.0)
        final_state(local["x"], layout=local["layout"])
        del local
        local = lasp.shard_batch(batch, dist.group.WORLD, pad=False)["x"]
        assert final_state(local).item() == (1.75 if operator == "linear_attention" else 1.0)


@pytest.mark.parametrize("operator", ["linear_attention", "delta_rule"])
def test_a_final_state_of_a_padded_batch_needs_the_layout(operator):
    run_ranks(2, _without_layout, operator)


@contextmanager
def nothing_said():
    with warnings.catch_warnings(record=True) as said:  # an error in a callback would be lost
        warnings.simplefilter("always")
        yield
    assert not [str(x.message) for x in said]


DENSE = {"input_ids": torch.ones(1, 7, dtype=torch.long), "x": torch.ones(1, 7, 1, 2)}
PACKED = {**DENSE, "cu_seqlens": [0, 4, 7]}


def _documents_without_layout(mesh):
    mesh = dist.group.WORLD if mesh else None
    sequence = lasp.SequenceParallel(mesh, name="attention")

    def cut(batch):
        return lasp.shard_batch(batch, mesh, pad=False)  # 4 and 3 tokens

    calls = {
        "linear_attention": lambda x, **more: lasp.linear_attention(x, x, x, sequence=sequence, **more),
        "delta_rule": lambda x, **more: lasp.delta_rule(x, x, x, x[..., 0], sequence=sequence, **more),
        "halo": lambda x, **more: lasp.halo(x, 2, sequence=sequence, **more),
        "softmax_attention": lambda x, **more: lasp.softmax_attention(x, x, x, sequence=sequence, **more),
    }
    for name, call in calls.items():
        tokens = cut(DENSE)["x"].shape[1]
        did_not_reach = f"did not reach {name} in layer 'attention', .* {tokens} tokens.* packed run into"
        local = cut(PACKED)
        ahead = cut(DENSE)
        call(local["x"])
        with pytest.warns(UserWarning, match=did_not_reach):  # though the last that was cut is another
            del local
        with pytest.warns(UserWarning, match=did_not_reach):
            call(cut(PACKED)["x"])  # its layout is gone at once
        with nothing_said():
            local, ahead = ahead, cut(PACKED)
            call(local["x"])  # needs none, though the last that was cut does
            local, ahead = ahead, cut({**DENSE, "cu_seqlens": [0, 7]})
            call(local["x"], layout=local["layout"])
            local = ahead
            call(local["x"])  # of one document
            del local, ahead
            kept = [cut(PACKED) for _ in range(3)]  # alike, and kept, as for an evaluation
            for local in kept:
                call(local["x"], layout=local["layout"])
            del kept, local
            call(cut(DENSE)["x"])
    local = cut(PACKED)
    calls["halo"](local["x"], layout=local["layout"])
    calls["delta_rule"](local["x"])  # one that is left out
    calls["softmax_attention"](local["x"], layout=local["layout"])
    with pytest.warns(UserWarning, match=r"did not reach delta_rule in layer 'attention', which"):
        calls["halo"](local["x"])  # the next step


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_documents_without_a_layout_are_told(ranks):
    run_ranks(ranks, _documents_without_layout, ranks > 1)
