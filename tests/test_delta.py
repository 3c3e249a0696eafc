"""The delta rule over ranks: every schedule, dense and packed, against the fp64 recurrence, on every rank."""

import pytest
import torch
import torch.distributed as dist
from ranks import of_one_rank, run_ranks, sequence_of_all
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.ranks import SCHEDULES
from lasp_kernels.delta import recurrent_delta_rule

FORMS = ("none", "token", "channel")
LENGTHS = [(97,), (40, 57), (33, 0, 64), (16, 48, 1, 32)]


def example(form, T, *, sequences=None, heads=2, groups=1, K=6, V=4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(T)
    B = 1 if sequences else 2
    shapes = [(B, T, heads, K), (B, T, heads, K), (B, T, heads * groups, V), (B, T, heads * groups, V)]
    q, k, v, do = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    k = torch.nn.functional.normalize(k, dim=-1)
    beta = 2 * torch.rand(B, T, heads * groups, generator=draw, dtype=torch.float64)
    shape = {"none": None, "token": beta.shape, "channel": (*beta.shape, K)}[form]
    decay = None if shape is None else -2 * torch.rand(shape, generator=draw, dtype=torch.float64) ** 3
    state, d_state = (torch.randn(sequences or B, heads * groups, K, V, generator=draw).double() for _ in range(2))
    x = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": decay, "initial_state": state}
    return {name: None if y is None else y.to(dtype) for name, y in x.items()}, do.to(dtype), d_state.to(dtype)


def gradients(x, o, final, do, d_final):
    wanted = {name: y for name, y in x.items() if y is not None}
    return dict(zip(wanted, torch.autograd.grad((o, final), list(wanted.values()), (do, d_final))))


def results(x, do, d_final, wrap=False, **options):
    x = {name: None if y is None else y.clone().requires_grad_() for name, y in x.items()}

    def call(q, k, v, beta, log_decay, initial_state):
        return lasp.delta_rule(
            q,
            k,
            v,
            beta,
            log_decay=log_decay,
            initial_state=initial_state,
            scale=0.3,
            output_final_state=True,
            **options,
        )

    o, final = checkpoint(call, *x.values(), use_reentrant=False) if wrap else call(*x.values())
    return {"o": o.detach(), "final": final.detach(), **gradients(x, o, final, do, d_final)}


def of_rank(x, do, d_final, lengths, rank):
    start, end = sum(lengths[:rank]), sum(lengths[: rank + 1])
    cut = {name: y if y is None or name == "initial_state" else y[:, start:end] for name, y in x.items()}
    return cut, do[:, start:end], d_final if rank == 0 else torch.zeros_like(d_final)


def assert_is_part(found, whole, lengths, rank, compare):
    start, end = sum(lengths[:rank]), sum(lengths[: rank + 1])
    dist.all_reduce(found["initial_state"])
    for name, expected in whole.items():
        expected = expected if name in ("final", "initial_state") else expected[:, start:end]
        compare(found[name], expected, name)


def close(actual, expected, name):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{name}: {text}")


def by_the_recurrence(x, do, d_final, cu_seqlens):
    true = {name: None if y is None else y.clone().requires_grad_() for name, y in x.items()}
    offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    q, k, v, beta, log_decay, state = true.values()
    options = {"log_decay": log_decay, "initial_state": state, "cu_seqlens": offsets, "scale": 0.3}
    o, final = recurrent_delta_rule(q, k, v, beta, **options)
    return {"o": o.detach(), "final": final.detach(), **gradients(true, o, final, do, d_final)}


def _against_recurrence(form, lengths, cu_seqlens, groups, schedules, wrap):
    rank = dist.get_rank()
    sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    x, do, d_final = example(form, sum(lengths), sequences=sequences, groups=groups)
    whole = of_one_rank(by_the_recurrence, x, do, d_final, cu_seqlens)
    for schedule in schedules:
        sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
        layout = None if cu_seqlens is None else lasp.ShardLayout(lengths, cu_seqlens)
        found = results(*of_rank(x, do, d_final, lengths, rank), wrap=wrap, layout=layout, sequence=sequence)
        ranks = len(lengths) > 1
        assert (sequence.traffic.forward_exchanges, sequence.traffic.reverse_exchanges) == (ranks, ranks)
        assert_is_part(
            found, whole, lengths, rank, lambda a, b, name: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_every_gradient_on_every_rank(form, lengths, packed):
    cu_seqlens = (0, 5, 38, 38, 70, 97) if packed else None
    run_ranks(len(lengths), _against_recurrence, form, lengths, cu_seqlens, 1, tuple(SCHEDULES), False)


@pytest.mark.parametrize("form", FORMS)
def test_recompute_and_grouped_values(form):
    run_ranks(3, _against_recurrence, form, (33, 2, 62), (0, 30, 97), 2, ("ring", "all_gather"), True)


def _bits(form, lengths, cu_seqlens):
    rank = dist.get_rank()
    x, do, d_final = example(form, sum(lengths), sequences=cu_seqlens and len(cu_seqlens) - 1, dtype=torch.float32)
    alone = cu_seqlens and lasp.ShardLayout((sum(lengths),), cu_seqlens)
    whole = results(x, do, d_final, layout=alone, segment_length=64)
    for schedule in SCHEDULES:
        sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
        options = {"layout": lasp.ShardLayout(lengths, cu_seqlens), "sequence": sequence, "segment_length": 64}
        found = results(*of_rank(x, do, d_final, lengths, rank), **options)

        def same(a, b, name):
            assert torch.equal(a, b), f"{name}, {schedule}"  # noqa: B023

        assert_is_part(found, whole, lengths, rank, same)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("lengths", "cu_seqlens"),
    [((128, 64, 64), None), ((64, 0, 128, 37), None), ((128, 64, 64), (0, 64, 256)), ((100, 64, 92), (0, 100, 256))],
    ids=str,
)
def test_with_a_segment_length_the_bits_are_those_of_one_rank(form, lengths, cu_seqlens):
    run_ranks(len(lengths), _bits, form, lengths, cu_seqlens)


def _compiled(packed):
    rank = dist.get_rank()
    lengths, cu_seqlens = (20, 31), (0, 9, 30, 51) if packed else None
    x, *_ = example("channel", 51, sequences=3 if packed else None, dtype=torch.float32)
    sequence, layout = lasp.SequenceParallel(dist.group.WORLD), lasp.ShardLayout(lengths, cu_seqlens)
    start, end = sum(lengths[:rank]), sum(lengths[: rank + 1])
    inputs = [y[:, start:end].clone().requires_grad_() for name, y in x.items() if name != "initial_state"]

    def f(q, k, v, beta, log_decay):
        options = {"layout": layout, "sequence": sequence, "initial_state": x["initial_state"]}
        o, final = lasp.delta_rule(q, k, v, beta, log_decay=log_decay, output_final_state=True, **options)
        return o.square().sum() + final.sum()

    expected = torch.autograd.grad(f(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled(packed):
    run_ranks(2, _compiled, packed)


def _differ():
    x, *_ = example("none", 8)
    arguments = [x[name] for name in ("q", "k", "v", "beta")]
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="mixer")
    with pytest.raises(lasp.RankMismatchError, match=r'layer "mixer": rank 1 has scale 0\.5, the others'):
        lasp.delta_rule(*arguments, scale=0.5 if dist.get_rank() == 1 else 1.0, sequence=sequence)
    with pytest.raises(ValueError, match="beta"):
        lasp.delta_rule(*arguments[:3], arguments[3][:, :-1], sequence=sequence_of_all())
    o, _ = lasp.delta_rule(*arguments, sequence=sequence)
    assert o.isfinite().all()


def test_ranks_that_differ_raise_on_all():
    run_ranks(3, _differ)
