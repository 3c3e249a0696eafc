"""Bad arguments of the operator and of the ranks: each with its message, before any communication."""

import functools
import os
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import GLOO_TIMEOUT, run_ranks
from small_model import SmallModel
from torch.distributed.device_mesh import DeviceMesh

import lasp
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
from lasp.ranks import SCHEDULES, collectives
from lasp.ranks.group import timeout_of

B, T, H, K, V = 2, 5, 2, 3, 4


def call(**changed):
    arguments = {
        "q": torch.zeros(B, T, 2 * H, K),
        "k": torch.zeros(B, T, H, K),
        "v": torch.zeros(B, T, H, V),
        **changed,
    }
    return lasp.linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_the_arguments_that_the_others_change_are_good():
    o, final_state = call()
    assert o.shape == (B, T, 2 * H, V)
    assert final_state is None


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got \\[1.0\\]"),
        ({"k": None}, TypeError, "k must be a tensor, got None"),
        ({"log_decay": -0.1}, TypeError, "log_decay must be a tensor, got -0.1"),
        ({"initial_state": 0}, TypeError, "initial_state must be a tensor, got 0"),
        (
            {"q": torch.zeros(B, T, H, K, dtype=torch.int64)},
            TypeError,
            "q must be a floating-point tensor, got torch.int64",
        ),
        ({"v": torch.zeros(B, T, H)}, ValueError, r"v must have shape \[B, T, H, dim\], got \(2, 5, 2\)"),
        ({"v": torch.zeros(B, T, H, V).half()}, TypeError, "one dtype, got q torch.float32 and v torch.float16"),
        ({"v": torch.zeros(B, T, H, V, device="meta")}, ValueError, "one device, got q on cpu and v on meta"),
        (
            {"v": torch.zeros(B, T + 1, H, V)},
            ValueError,
            r"k and v must agree in B and T, got k .* and v \(2, 6, 2, 4\)",
        ),
        ({"q": torch.zeros(B, T, H, K + 1)}, ValueError, r"q and k must agree in B, T and K, got q \(2, 5, 2, 4\)"),
        ({"q": torch.zeros(B, T, 3, K)}, ValueError, "q must have a multiple of the heads of k, got 3 and 2"),
        (
            {"v": torch.zeros(B, T, 3, V)},
            ValueError,
            "v must have the heads of k, or a multiple of them, got 3 and 2",
        ),
        (
            {"v": torch.zeros(B, T, 2 * H, V)},
            ValueError,
            "only one of q and v may have more heads than k, got q 4, k 2 and v 4",
        ),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
        (
            {"initial_state": torch.zeros(B, H, K, V), "normalize": True},
            ValueError,
            r"initial_state must have shape \[N, H, K, V \+ 1\] = \(2, 2, 3, 5\), got \(2, 2, 3, 4\)",
        ),
        ({"segment_length": 0}, ValueError, "segment_length must be a positive multiple of 64, got 0"),
        ({"segment_length": 100}, ValueError, "segment_length must be a positive multiple of 64, got 100"),
        ({"log_decay": torch.zeros(H, dtype=torch.int64)}, TypeError, "log_decay must be a floating-point tensor"),
        ({"log_decay": torch.zeros(H + 1)}, ValueError, r"log_decay must have shape \[H\] = \(2,\).*got \(3,\)"),
        ({"log_decay": torch.zeros(B, T)}, ValueError, r"log_decay must have shape .*got \(2, 5\)"),
        ({"log_decay": torch.zeros(B, T, H, V)}, ValueError, r"log_decay must have shape .*got \(2, 5, 2, 4\)"),
        (
            {"log_decay": torch.tensor([0.1, -0.1])},
            ValueError,
            "log_decay must be finite and <= 0, got values from -0.1",
        ),
        (
            {"log_decay": torch.tensor([-torch.inf, 0])},
            ValueError,
            "log_decay must be finite and <= 0, got values from -inf",
        ),
        (
            {"log_decay": torch.tensor([torch.nan, 0])},
            ValueError,
            "log_decay must be finite and <= 0, got values from nan",
        ),
        (
            {"initial_state": torch.zeros(B, H, V, K)},
            ValueError,
            r"initial_state must have .* \(2, 2, 3, 4\), got \(2, 2, 4, 3\)",
        ),
        ({"sequence": "sp"}, TypeError, "sequence must be a lasp.SequenceParallel or None, got 'sp'"),
        ({"layout": lasp.ShardLayout((T, T))}, ValueError, "layout is for 2 ranks, but the sequence has 1: was"),
        ({"layout": lasp.ShardLayout((T + 1,))}, ValueError, "layout gives rank 0 6 tokens, but k has 5"),
        (
            {"layout": lasp.ShardLayout((T,), (0, T))},
            ValueError,
            r"packed sequences \(cu_seqlens\) need a batch of 1, got 2",
        ),
    ],
)
def test_linear_attention(changed, error, message):
    with pytest.raises(error, match=message):
        call(**changed)


def _before_communication(validate):
    """One rank alone raises; the exchange that follows finds nothing of it in its way."""
    sequence = lasp.SequenceParallel(dist.group.WORLD, validate=validate)
    odd = dist.get_rank() == 1
    q = torch.zeros(B, T, 3 if odd else 2 * H, K)
    if validate == "first":  # the others hear of it
        message = "rank 1 failed before its exchange: ValueError: q must have a multiple of the heads of k, got 3 and 2"
        with pytest.raises(lasp.RankMismatchError, match=message) as caught:
            call(q=q, sequence=sequence)
        assert isinstance(caught.value.__cause__, ValueError) == odd
    elif odd:
        with pytest.raises(ValueError, match="heads of k"):
            call(q=q, sequence=sequence)
    o, _ = call(sequence=sequence)
    assert torch.equal(o, torch.zeros(B, T, 2 * H, V))
    assert sequence.traffic.forward_exchanges == 1


@pytest.mark.parametrize("validate", ["first", "off"])
def test_a_bad_argument_on_one_rank_leaves_the_group_usable(validate):
    run_ranks(2, _before_communication, validate)


@pytest.mark.parametrize(
    ("mesh", "options", "error", "message"),
    [
        (None, {"exchange": "pigeon"}, ValueError, "exchange must be one of .*got 'pigeon'"),
        ("sp", {}, TypeError, "mesh must be a 1-D DeviceMesh, a ProcessGroup or None, got 'sp'"),
        (3, {}, TypeError, "mesh must be a 1-D DeviceMesh, a ProcessGroup or None, got 3"),
    ],
)
def test_sequence_parallel(mesh, options, error, message):
    with pytest.raises(error, match=message):
        lasp.SequenceParallel(mesh, **options)


def _meshes():
    square = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "cp"))
    with pytest.raises(
        ValueError, match=r'mesh must be one axis such as mesh\["sp"\], got \(\'dp\', \'cp\'\) \(2, 2\)'
    ):
        lasp.SequenceParallel(square)
    for function in (lambda: lasp.parallelize(torch.nn.Identity(), square), lambda: lasp.shard_batch({}, square)):
        with pytest.raises(ValueError, match=r"the mesh has no axis \"sp\", only \('dp', 'cp'\)"):
            function()
    some = DeviceMesh("cpu", [1, 3])
    if dist.get_rank() in (0, 2):
        with pytest.raises(ValueError, match=rf"rank {dist.get_rank()} is not in .*\(1, 3\)"):
            lasp.SequenceParallel(some)
    else:
        assert lasp.SequenceParallel(some).ranks == (1, 3)


def test_meshes_that_are_no_sequence():
    run_ranks(4, _meshes)


def _init_mesh():
    mesh = lasp.init_mesh(sp=2)
    assert mesh.mesh_dim_names == ("dp_replicate", "dp_shard", "sp", "tp")
    assert tuple(mesh.shape) == (1, 2, 2, 1)
    assert mesh["sp"].mesh.tolist() in ([0, 1], [2, 3])  # neighbours in the sequence are neighbours in rank
    assert tuple(lasp.init_mesh(dp_shard=1, sp=-1).shape) == (1, 1, 4, 1)
    for options, message in [
        ({"sp": 0}, "sp must be positive or -1, got 0"),
        ({"tp": -2}, "tp must be positive or -1, got -2"),
        ({"sp": -1}, "only one axis may be -1, got dp_shard and sp"),
        ({"sp": 3}, "'sp': 3.* does not divide 4 ranks"),
        ({"dp_shard": 1, "sp": 2}, "does not divide 4 ranks"),
    ]:
        with pytest.raises(ValueError, match=message):
            lasp.init_mesh(**options)


def test_init_mesh():
    run_ranks(4, _init_mesh)


def _held():
    """Threads, and open files and sockets, of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def _asked_again():
    sizes, found = {"dp_replicate": 2, "sp": 2}, []
    for _ in range(20):
        mesh = lasp.init_mesh(**sizes)
        wrap_ddp(SmallModel(), mesh)
        wrap_fsdp2(SmallModel(), mesh)  # which makes a group of its own
        for group in [*mesh.get_all_groups(), lasp.grad_mesh(mesh).get_group()]:
            one = torch.ones(1)
            dist.all_reduce(one, group=group)
            assert one.item() == dist.get_world_size(group)
        found.append((_held(), mesh))
        del mesh
    counts = [held for held, _ in found]  # a mesh that was made anew would have a thread and sockets more each time
    assert all(last - first <= 2 for first, last in zip(counts[0], map(max, zip(*counts)))), counts
    assert all(mesh is found[0][1] for _, mesh in found)
    assert lasp.init_mesh(dp_shard=2, sp=2) is not found[0][1]


@pytest.mark.skipif(sys.platform != "linux", reason="counts what /proc tells")
def test_a_mesh_that_is_asked_for_again_costs_nothing():
    run_ranks(4, _asked_again)


def _destroyed():
    first = lasp.init_mesh(dp_shard=2, tp=2)
    dist.destroy_process_group(first["tp"].get_group())
    second = lasp.init_mesh(dp_shard=2, tp=2)
    assert second is not first
    lasp.init(timeout=11)
    again = lasp.init_mesh(dp_shard=2, tp=2)
    assert again is second
    one = torch.ones(1)
    dist.all_reduce(one, group=again["tp"].get_group())
    assert one.item() == 2
    assert all(timeout_of(group).total_seconds() == 11 for group in again.get_all_groups())
    lasp.init(timeout=GLOO_TIMEOUT)  # for the tests that come


def test_a_mesh_whose_group_was_destroyed_is_made_anew_and_one_that_is_kept_has_the_last_timeout():
    run_ranks(4, _destroyed)


def _connect(names):
    sizes = {name: [] for name in names}

    def recorded(name, call):
        return lambda first, *rest, **options: (sizes[name].append(first.nbytes), call(first, *rest, **options))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            place = dist if name == "all_reduce" else collectives
            patch.setattr(place, name, recorded(name, getattr(place, name)))
        collectives.connect(dist.group.WORLD, "cpu", megabytes=1)
    return sizes


def test_connecting_runs_every_collective_from_small_to_large():
    sizes, *others = run_ranks(3, _connect, ("all_reduce", "gather_flat", "scatter_sum_flat"))
    assert all(x == sizes for x in others)
    for name, parts in (("all_reduce", 1), ("gather_flat", 1), ("scatter_sum_flat", 3)):
        whole = [parts * n for n in sizes[name]]
        assert whole[0] == 3 * 4
        assert 2**20 <= whole[-1] < 2**20 + 12
        assert all(a < b < 4.1 * a or b <= 24 for a, b in zip(whole, whole[1:]))


def test_init_mesh_before_init():
    with pytest.raises(RuntimeError, match=r"call lasp.init\(\) before lasp.init_mesh\(\)"):
        lasp.init_mesh()


# NumPy's numbers are taken on any number of ranks, whose settings travel as JSON


def _numpys_numbers():
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    x, word = torch.ones(1, 64, 1, 2), np.int64(64)
    options = {"sequence": sequence, "output_final_state": True}
    for function, tensors in ((lasp.linear_attention, (x, x, x)), (lasp.delta_rule, (x, x, x, x[..., 0]))):
        found = function(*tensors, scale=np.float32(0.5), segment_length=word, **options)
        expected = function(*tensors, scale=0.5, segment_length=64, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    softmax = functools.partial(lasp.softmax_attention, x, x, x, sequence=sequence)
    numbers = {"window": np.int32(3), "scale": np.float16(0.5), "softcap": np.float64(2), "dropout_p": np.float32(0)}
    assert torch.equal(softmax(**numbers), softmax(window=3, scale=0.5, softcap=2.0))
    y = torch.arange(128.0).view(1, 64, 2)
    assert torch.equal(lasp.halo(y, np.int64(3), sequence=sequence), lasp.halo(y, 3, sequence=sequence))
    loss = functools.partial(lasp.token_loss, y, torch.zeros(1, 64).long(), mesh=dist.group.WORLD)
    assert torch.equal(loss(ignore_index=np.int64(-1))[0], loss()[0])
    sizes = {"dp_shard": np.int64(1), "sp": np.int64(dist.get_world_size())}
    assert lasp.init_mesh(**sizes)["sp"].size() == dist.get_world_size()


@pytest.mark.parametrize("world", [1, 2])
def test_numpys_numbers(world):
    run_ranks(world, _numpys_numbers)


def _one_rank_alone(argument, value):
    """An option is wrong on one rank: the others hear of it, and the group works on."""
    sequence = lasp.SequenceParallel(dist.group.WORLD)
    odd = dist.get_rank() == 1
    for function in (call, functools.partial(lasp.delta_rule, *[torch.zeros(B, T, H, K)] * 3, torch.zeros(B, T, H))):
        with pytest.raises(lasp.RankMismatchError, match=f"rank 1 failed before its exchange: .*{argument} must be"):
            function(sequence=sequence, **({argument: value} if odd else {}))
        function(sequence=sequence)


@pytest.mark.parametrize(
    ("argument", "value"), [("scale", float("nan")), ("output_final_state", "no"), ("segment_length", "64")], ids=str
)
def test_an_option_that_is_wrong_on_one_rank(argument, value):
    run_ranks(2, _one_rank_alone, argument, value)


@pytest.mark.parametrize(
    "function", [lasp.linear_attention, lasp.softmax_attention, lambda q, k, v: lasp.delta_rule(q, k, v, k[..., 0])]
)
def test_tensors_that_hold_no_numbers(function):
    x = torch.zeros(B, T, H, K, device="meta")
    with pytest.raises(ValueError, match="q, k and v must be on a device that holds numbers, got q on meta"):
        function(x, x, x)


def _no_rows(schedule):
    """A batch of no rows: nothing to compute, but all take part."""
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
    x = torch.zeros(0, 5, 2, 3, dtype=torch.float64).requires_grad_()
    decays = (None, torch.tensor([-0.1, -200.0], dtype=torch.float64), torch.zeros(0, 5, 2, dtype=torch.float64))
    results = [lasp.linear_attention(x, x, x, log_decay=g, output_final_state=True, sequence=sequence) for g in decays]
    results.append(lasp.delta_rule(x, x, x, x[..., 0], output_final_state=True, sequence=sequence))
    for o, state in results:
        assert (o.shape, state.shape) == (x.shape, (0, 2, 3, 3))
    others = [lasp.softmax_attention(x, x, x, sequence=sequence), lasp.halo(x, 3, sequence=sequence)]
    others.append(lasp.causal_conv(x[..., 0], torch.ones(2, 3), sequence=sequence))
    sum(y.sum() for y in (*sum(results, ()), *others)).backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("schedule", ["auto", *SCHEDULES])
def test_a_batch_of_no_rows(schedule):
    run_ranks(3, _no_rows, schedule)
