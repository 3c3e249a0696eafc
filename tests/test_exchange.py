"""What each schedule brings, how many messages and bytes it takes, the horizon, and the cost model."""

import gc
import os
import time
import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from inputs import assert_close
from ranks import run_ranks
from scripts import run_script

import lasp
from lasp.exchange import StateMap, Terms, board, cost, forgetting, horizon, identity, start
from lasp.exchange.base import Sizes, heads_in
from lasp.exchange.neighbour import NEIGHBOUR
from lasp.ranks import SCHEDULES, collectives
from lasp.ranks.group import process
from lasp_kernels import fold

U, N, H, K, V = 2, 2, 3, 5, 8


def random_map(seed, *, channels=1, restarts=False, units=U):
    draw = torch.Generator().manual_seed(seed)
    log_decay = -torch.rand((units, N, H, channels), generator=draw)
    if restarts:
        log_decay[units // 2] = -torch.inf
    return StateMap(torch.randn((units, N, H, K, V), generator=draw), log_decay)


def expected_at(rank, maps, reverse):
    """The left fold over the ranks before, unit by unit."""
    state = torch.zeros(N, H, K, V)
    for mapping in maps[:rank:-1] if reverse else maps[:rank]:
        for log_decay, local in zip(mapping.transition, mapping.state):
            state = log_decay.exp().unsqueeze(-1) * state + local
    return state


def _brings_the_fold(schedule, reverse, channels, restarting):
    rank, world = dist.get_rank(), dist.get_world_size()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
    units = [1 + r % U for r in range(world)]
    maps = [random_map(r, channels=channels, restarts=r == restarting, units=units[r]) for r in range(world)]
    entering = start(maps[rank], sequence, fold=fold, terms=Terms(reverse, units=max(units))).wait()
    assert torch.equal(entering, expected_at(rank, maps, reverse))

    traffic = sequence.traffic
    assert (traffic.forward_exchanges, traffic.reverse_exchanges) == ((0, 1) if reverse else (1, 0))
    assert traffic.schedule == schedule
    last = rank == (0 if reverse else world - 1)
    state = 4 * N * H * K * V
    if world == 1:
        assert (traffic.messages, traffic.bytes_sent) == (0, 0)
    elif schedule in ("all_gather", "direct"):
        readers = world - 1 if schedule == "all_gather" else rank if reverse else world - 1 - rank
        assert traffic.messages == (readers > 0)
        message = max(units) * (state + 4 * N * H * channels)
        if schedule == "direct" and world == 2:  # what enters one rank need not get past another
            message = state
        assert traffic.bytes_sent == readers * message
    else:
        assert traffic.messages == (0 if last else traffic.blocks)
        assert traffic.bytes_sent == (0 if last else state)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_brings_the_left_fold_of_all_ranks_before(world, schedule):
    for reverse in (False, True):
        for channels, restarting in ((1, None), (K, None), (1, 1)):
            run_ranks(world, _brings_the_fold, schedule, reverse, channels, restarting)


def _in_blocks(blocks):
    """A network on which so many blocks are the best."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange="pipeline")
    tau = blocks**2 / (world - 2)
    network = cost.Network(1.0, 4 * N * H * K * V / tau, 1.0, 1.0, "made up")
    sequence.peers.network = network
    try:
        for channels in (1, K):
            maps = [random_map(r, channels=channels) for r in range(world)]
            pending = [start(maps[rank], sequence, fold=fold, terms=Terms(reverse)) for reverse in (False, True)]
            for reverse, exchange in zip((False, True), pending):  # two under way at once
                assert torch.equal(exchange.wait(), expected_at(rank, maps, reverse))
    finally:
        sequence.peers.network = None
    assert sequence.traffic.blocks == blocks
    assert sequence.traffic.bytes_sent == 4 * N * H * K * V * 2 * ((rank > 0) + (rank < world - 1))


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_pipeline_in_blocks_of_rows_both_ways_at_once(blocks):
    run_ranks(4, _in_blocks, blocks)


def _order_of_mesh(order, schedule):
    from torch.distributed.device_mesh import DeviceMesh

    sequence = lasp.SequenceParallel(DeviceMesh("cpu", order), exchange=schedule)
    place = order.index(dist.get_rank())
    assert sequence.prev_rank == (order[place - 1] if place else None)
    assert sequence.next_rank == (order[place + 1] if place < 3 else None)
    maps = [random_map(r) for r in range(4)]
    for reverse in (False, True):
        entering = start(maps[place], sequence, fold=fold, terms=Terms(reverse)).wait()
        assert torch.equal(entering, expected_at(place, maps, reverse))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_order_is_that_of_the_mesh(schedule):
    run_ranks(4, _order_of_mesh, [2, 0, 3, 1], schedule)


def map_of_kind(kind, seed, units):
    draw = torch.Generator().manual_seed(seed)
    shape = {"none": None, "number": (N, H, 1), "vector": (N, H, K), "matrix": (N, H, K, K)}[kind]
    transition = None if shape is None else torch.randn((units, *shape), generator=draw)
    if kind in ("number", "vector"):
        transition = -transition.abs()
    return StateMap(torch.randn((units, N, H, K, V), generator=draw), transition)


def _every_kind(schedule, kind, reverse, forgetting_rank):
    """Against maps applied one by one, written out; to the bit against one rank's fold of them all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange=schedule)
    units = [1 + (r + 1) % U for r in range(world)]
    maps = [map_of_kind(kind, r, units[r]) for r in range(world)]
    if forgetting_rank is not None:
        transition = maps[forgetting_rank].transition
        transition[-1] = forgetting(transition[-1:])[0]
    entering = start(maps[rank], sequence, fold=fold, terms=Terms(reverse, units=max(units))).wait()
    expected = torch.zeros(N, H, K, V)
    for one in maps[:rank:-1] if reverse else maps[:rank]:
        for n, state in enumerate(one.state):
            if kind == "none":
                expected = expected + state
            elif kind == "matrix":
                expected = one.transition[n] @ expected + state
            else:
                expected = one.transition[n].exp().unsqueeze(-1) * expected + state
    torch.testing.assert_close(entering, expected)
    before = maps[:rank:-1] if reverse else maps[:rank]
    if before:
        transitions = None if kind == "none" else torch.cat([one.transition for one in before])
        assert torch.equal(entering, fold(None, torch.cat([one.state for one in before]), transitions))


@pytest.mark.parametrize("kind", ["none", "number", "vector", "matrix"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_carries_every_kind_of_map(schedule, kind):
    for reverse in (False, True):
        for forgetting_rank in (None,) if kind == "none" else (None, 1):
            run_ranks(4, _every_kind, schedule, kind, reverse, forgetting_rank)


@pytest.mark.parametrize("kind", ["none", "number", "vector", "matrix"])
def test_what_changes_nothing_and_what_lets_nothing_pass(kind):
    one = map_of_kind(kind, 0, 1)
    entering = torch.randn(N, H, K, V)
    nothing = torch.zeros_like(one.state)
    assert torch.equal(fold(entering, nothing, identity(one.transition)), entering)
    if kind == "none":
        with pytest.raises(ValueError, match="lets everything pass"):
            forgetting(one.transition)
    else:
        assert torch.equal(fold(entering, one.state, forgetting(one.transition)), one.state[0])
    packed = one.packed(3)
    assert torch.equal(fold(entering, *one.unpack(packed)), fold(entering, *one))  # what was added changes nothing


def test_fold_is_the_scan_and_associative():
    a, b = random_map(1), random_map(2)
    state = random_map(3).state[0]
    together = fold(state, torch.cat([a.state, b.state]), torch.cat([a.transition, b.transition]))
    assert torch.equal(together, fold(fold(state, a.state, a.transition), b.state, b.transition))
    as_one = fold(torch.zeros_like(state), a.state, a.transition)
    total = a.transition.sum(0).exp().unsqueeze(-1)
    assert_close(fold(state, a.state, a.transition), total * state + as_one, "one map", rtol=1e-5, atol=1e-5)


# Horizon


def _near_and_far(schedule, far, reverse):
    """Heads that no rank in between lets pass, and others, have the same bits with and without the horizon."""
    rank, world = dist.get_rank(), dist.get_world_size()
    near = horizon.others(far, H)
    maps = [random_map(r) for r in range(world)]
    for mapping in maps:
        for first, end in near:
            mapping.transition[-1, :, first:end] = -104.5
    plain, short = (lasp.SequenceParallel(dist.group.WORLD, exchange=schedule) for _ in range(2))
    through_chain = start(maps[rank], plain, fold=fold, terms=Terms(reverse)).wait()
    entering = start(maps[rank], short, fold=fold, terms=Terms(reverse, far)).wait()
    assert torch.equal(entering, through_chain)
    last = rank == (0 if reverse else world - 1)
    if schedule == "direct":  # if some heads go further, all are read by all
        readers, units = (1 - last, 1) if not far else (rank if reverse else world - 1 - rank, U)
        assert short.traffic.bytes_sent == readers * units * 4 * N * H * (K * V + (1 if far else 0))
        assert short.traffic.schedule == "direct"
        return
    sent = 0 if last else heads_in(near)
    if schedule == "all_gather":
        decays = 4 * N * heads_in(far) * U * (world - 1)
        sent, extra = sent + heads_in(far) * U * (world - 1), decays
    else:
        sent, extra = sent + (0 if last else heads_in(far)), 0
    assert short.traffic.bytes_sent == 4 * N * K * V * sent + extra
    assert short.traffic.schedule == (schedule if far else "neighbour")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("far", [(), ((0, 1),), ((1, 2),), ((0, 1), (2, 3)), ((0, 3),)], ids=str)
def test_heads_behind_the_horizon_go_to_the_neighbour_only(schedule, far):
    for reverse in (False, True):
        run_ranks(4, _near_and_far, schedule, far, reverse)


def test_far_heads():
    single, double = torch.float32, torch.float64
    assert horizon.far_heads([-1.0, -2.0], 2, None, single) == ((0, 2),)  # the host does not know how many tokens
    assert horizon.far_heads(None, 2, [500], single) == ((0, 2),)
    assert horizon.far_heads(None, 2, [], single) == ()  # a sequence begins on every rank
    assert horizon.far_heads([-1.0, -2.0, -0.1], 3, [90, 100], single) == ((0, 1), (2, 3))
    assert horizon.far_heads([-1.0, -2.0, -0.1], 3, [105], single) == ((2, 3),)
    assert horizon.far_heads([-1.0, -2.0, -0.1], 3, [105], double) == ((0, 3),)
    assert horizon.far_heads([-1.0, 0.0], 2, [10**9], single) == ((1, 2),)
    assert horizon.far_heads([-1.0, -1.0], 2, [200, 0], single) == ((0, 2),)  # a rank without tokens lets all pass
    for runs in ((), ((0, 2),), ((1, 3),), ((0, 1), (3, 5))):
        both = sorted(h for a, b in (*runs, *horizon.others(runs, 5)) for h in range(a, b))
        assert both == list(range(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_left_of_a_state_beyond_the_horizon(dtype):
    exponent = torch.tensor(-horizon.EXPONENT[dtype], dtype=dtype)
    assert exponent.exp() == 0
    assert (exponent + 1).exp() > 0


# Cost model

FAST = cost.Network(1e-5, 1e10, 2e-5, 2e10, "made up")


def predict(name, size, ranks, network, *, columns=2**31):
    """Seconds of a schedule by its name, if a rank contributes so many bytes whatever is made of them."""
    schedule = {"neighbour": NEIGHBOUR, **SCHEDULES}[name]
    return schedule.seconds(Sizes(size, size, size, columns), ranks, network)


def test_predictions_are_the_formulas():
    n = 10**6
    assert predict("neighbour", n, 9, FAST) == pytest.approx(1.1e-4)
    assert predict("ring", n, 9, FAST) == pytest.approx(8 * 1.1e-4)
    assert predict("all_gather", n, 9, FAST) == pytest.approx(8 * 7e-5)
    blocks = SCHEDULES["pipeline"].blocks(Sizes(n, n, n, 4), 9, FAST)
    assert blocks == 4
    assert predict("pipeline", n, 9, FAST, columns=4) == pytest.approx(11 * 3.5e-5)
    assert predict("pipeline", n, 2, FAST) == predict("ring", n, 2, FAST)
    assert predict("direct", n, 9, FAST) == float("inf")
    near = replace(FAST, direct_latency=1e-5, direct_bandwidth=1e11)
    assert predict("direct", n, 9, near) == pytest.approx(9e-5)
    for schedule in SCHEDULES:
        assert predict(schedule, n, 1, FAST) == 0


def test_the_best_number_of_blocks_is_the_best():
    pipeline = SCHEDULES["pipeline"]
    for ranks in (2, 3, 8, 64):
        best = pipeline.blocks(Sizes(2**21, None, None, 2**31), ranks, FAST)
        assert best == max(1, round(((ranks - 2) * 2**21 / (FAST.latency * FAST.bandwidth)) ** 0.5))
        times = {b: predict("pipeline", 2**21, ranks, FAST, columns=b) for b in range(1, 200)}
        assert predict("pipeline", 2**21, ranks, FAST) <= min(times.values()) * 1.01
    assert pipeline.blocks(Sizes(2**21, None, None, 8), 64, FAST) == 8


def test_auto_takes_the_fastest_and_a_name_is_obeyed():
    def choose(exchange, size, ranks, network=FAST, **options):
        sizes = Sizes(size, size, size, 128)
        return cost.choose(SCHEDULES.get(exchange), sizes, ranks, network, **options).schedule.name

    even = cost.Network(1e-5, 1e10, 1e-5, 1e10, "made up")
    assert choose("auto", 2**20, 3, even) == "all_gather"  # which a busy card delays once, not at every hop
    assert choose("auto", 2**20, 2, even) == "ring"  # the first of two need not wait for the second
    fast_hops = cost.Network(1e-6, 1e10, 1e-4, 1e10, "made up")
    assert choose("auto", 2**16, 2, fast_hops) == "ring"
    assert choose("auto", 2**20, 64) == "pipeline"
    slow_start = cost.Network(1e-3, 1e10, 1e-6, 1e10, "made up")
    beside = replace(even, direct_latency=5e-6, direct_bandwidth=1e11)
    assert choose("auto", 2**20, 8, beside) == "direct"
    assert choose("auto", 2**20, 8, beside, near=True) == "direct"
    assert choose("auto", 2**20, 8, even, near=True) == choose("ring", 2**20, 8, beside, near=True) == "neighbour"
    assert choose("direct", 2**20, 8, even, near=True) == "direct"
    assert choose("auto", 2**26, 8, replace(beside, direct_bandwidth=1e9)) == "pipeline"
    assert choose("auto", 2**20, 8, slow_start) == "all_gather"
    unknown = Sizes(2**20, None, None, 128)  # how much the others have
    assert cost.choose(None, unknown, 8, slow_start).schedule.name != "all_gather"
    for exchange in SCHEDULES:
        assert choose(exchange, 2**20, 8, slow_start) == exchange
    # Four H200s: one head of 16 goes far, so the others are a message of their own; a read takes all at once.
    measured = cost.Network(7.8e-6, 252e9, 3.9e-6, 311e9, "measured", 17.3e-6, 348e9)
    one_far = Sizes(2**16, 2**16, 2**20, 128)
    assert cost.choose(None, one_far, 4, measured).schedule.name == "all_gather"
    found = cost.choose(None, one_far, 4, measured, hop=15 * 2**16)
    assert (found.schedule.name, found.seconds) == ("direct", SCHEDULES["direct"].seconds(one_far, 4, measured))
    state, auto = StateMap(torch.empty(1, 1, 16, 128, 128), None), SimpleNamespace(size=4, schedule=None)
    route = lasp.exchange._choose(state, auto, Terms(False, ((15, 16),)), measured)
    assert (route.schedule.name, route.hop) == ("direct", ())
    split = cost.choose(SCHEDULES["ring"], one_far, 4, measured, hop=15 * 2**16)
    assert split.seconds > cost.choose(SCHEDULES["ring"], one_far, 4, measured).seconds + 7.8e-6
    sizes = Sizes(2**30, None, None, 128)
    assert 128 % cost.choose(SCHEDULES["pipeline"], sizes, 64, FAST).blocks == 0  # never more than columns


def test_published_network_gives_the_published_times():
    """All-Scan and all-gather of ZeCO on H100s, 32 heads of 128 x 128; arXiv 2507.01004, in ms."""
    for ranks, scan, gather in (
        (8, 0.226, 0.375),
        (16, 0.297, 0.658),
        (32, 0.448, 1.616),
        (64, 0.739, 2.543),
        (128, 1.272, 4.350),
        (256, 2.165, 8.514),
    ):
        assert predict("pipeline", 2**21, ranks, cost.PUBLISHED) == pytest.approx(scan * 1e-3, rel=0.11)
        assert predict("all_gather", 2**21, ranks, cost.PUBLISHED) == pytest.approx(gather * 1e-3, rel=0.3)


def _measured():
    sequence = lasp.SequenceParallel(dist.new_group(list(range(dist.get_world_size()))))
    assert cost.network_of(sequence) is cost.PUBLISHED
    network = cost.measure(sequence)
    assert network is cost.measure(sequence) is cost.network_of(sequence)
    numbers = (network.latency, network.bandwidth, network.collective_latency, network.collective_bandwidth)
    assert all(0 < x < float("inf") for x in numbers)
    assert network.source == "measured"
    return numbers


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_measure_the_same_numbers_once(world):
    results = run_ranks(world, _measured)
    assert len(set(results)) == 1


def _by_itself():
    """A `SequenceParallel` that nobody measured for, as `parallelize` does."""
    sequence = lasp.SequenceParallel(dist.new_group(list(range(dist.get_world_size()))))
    maps = [random_map(r) for r in range(sequence.size)]
    assert torch.equal(start(maps[sequence.rank], sequence, fold=fold).wait(), expected_at(sequence.rank, maps, False))
    network = cost.network_of(sequence)
    assert network.source == "measured"
    start(maps[sequence.rank], sequence, fold=fold).wait()
    assert cost.network_of(sequence) is network
    named = lasp.SequenceParallel(dist.new_group(list(range(dist.get_world_size()))), exchange="ring")
    start(maps[sequence.rank], named, fold=fold).wait()
    assert cost.network_of(named) is cost.PUBLISHED  # nothing is to be chosen
    later = lasp.SequenceParallel(named.group)  # the same ranks, connected already
    start(maps[sequence.rank], later, fold=fold).wait()
    assert cost.network_of(later).source == "measured"
    return sequence.traffic.schedule


@pytest.mark.parametrize("world", [2, 3])
def test_auto_measures_at_the_first_exchange_however_the_ranks_came(world):
    assert len(set(run_ranks(world, _by_itself))) == 1


def _refuses_to_begin(schedule):
    """As NCCL does, whose connection to a rank that has ended is closed; gloo says it when one waits."""
    sequence = lasp.SequenceParallel(dist.group.WORLD, name="mixer", exchange=schedule, validate="off")
    q, k, v = (torch.randn(1, 5, 2, 4, requires_grad=True) for _ in range(3))
    o, _ = lasp.linear_attention(q, k, v, sequence=sequence)
    began = [mock.patch.object(of, name, side_effect=RuntimeError("remote process exited")) for of, name in BEGINNINGS]
    with began[0], began[1], began[2]:
        with pytest.raises(lasp.PeerError, match=r"^layer 'mixer', backward: the exchange .*remote process exited"):
            o.sum().backward()
        with pytest.raises(lasp.PeerError, match=r"^layer 'mixer', forward: the exchange .*remote process exited"):
            lasp.linear_attention(q, k, v, sequence=sequence)


BEGINNINGS = ((collectives, "gather_flat"), (dist, "isend"), (dist, "irecv"))


@pytest.mark.parametrize("schedule", ["ring", "pipeline", "all_gather"])
def test_a_message_that_cannot_begin_is_told_with_its_place(schedule):
    run_ranks(2, _refuses_to_begin, schedule)


def _reset():
    from lasp.ranks import group

    sequence = lasp.SequenceParallel(dist.group.WORLD)
    start(random_map(sequence.rank), sequence, fold=fold).wait()
    assert sequence.peers.connected
    assert sequence.peers.network
    assert sequence.peers.exchanges
    group.reset()
    assert not sequence.peers.connected
    assert sequence.peers.network is None
    assert not sequence.peers.exchanges
    start(random_map(sequence.rank), sequence, fold=fold).wait()
    assert sequence.peers is lasp.SequenceParallel(dist.group.WORLD).peers


def test_all_that_is_kept_of_groups_is_forgotten_in_one_place():
    run_ranks(2, _reset)


def test_names():
    with pytest.raises(ValueError, match="'chain'"):
        lasp.SequenceParallel(None, exchange="chain")


# Boards


def _read_late(late):
    """A rank that lags behind still reads what the others wrote for it, though they have gone on."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange="direct")
    for turn in range(6):
        maps = [random_map(10 * turn + r, units=1 + turn) for r in range(world)]  # which also outgrow the board
        if rank == late:
            time.sleep(0.05)
        pending = [start(maps[rank], sequence, fold=fold, terms=Terms(reverse)) for reverse in (False, True, False)]
        for exchange, reverse in zip(pending, (False, True, False)):
            assert torch.equal(exchange.wait(), expected_at(rank, maps, reverse))


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_board_is_not_written_before_it_was_read(late, monkeypatch):
    monkeypatch.setattr(board, "SMALLEST", 64)
    run_ranks(3, _read_late, late)


def _refused(what):
    rank = dist.get_rank()
    sequence = lasp.SequenceParallel(dist.new_group([0, 1]), exchange="direct")
    before = _boards_of_this_process()
    real, message = {
        "hosts": (mock.patch.object(board, "this_host", return_value=f"host {rank}"), "they are on 2 hosts"),
        "meetings": (mock.patch.object(process, "meetings", rank), "not as often"),
        "no space": (mock.patch("os.fdopen", _fails if rank else os.fdopen), "rank 1: OSError: full"),
        "cannot map": (mock.patch("torch.from_file", _fails if rank else torch.from_file), "rank 1: OSError: full"),
        "another's file": (mock.patch.object(board, "texts_of_all", _tokens), "rank 0: OSError: .* is not the file"),
    }[what]
    started = time.monotonic()
    with real, pytest.raises(ValueError, match=f'exchange "direct".*{message}'):
        start(random_map(rank), sequence, fold=fold)
    assert time.monotonic() - started < 5
    assert _boards_of_this_process() == before
    for exchange in ("ring", "direct") if what not in ("hosts", "meetings") else ("ring",):  # these are for good
        again = lasp.SequenceParallel(sequence.group, exchange=exchange)
        maps = [random_map(r) for r in range(2)]
        assert torch.equal(start(maps[rank], again, fold=fold).wait(), expected_at(rank, maps, False))


def _fails(*args, **options):
    raise OSError("full")


def _tokens(mine, group, told=board.texts_of_all):
    """As if the names of the other ranks' files were those of other files here."""
    return [text + "?" if "\n" in text else text for text in told(mine, group)]


def _boards_of_this_process():
    """Open files without a name, and such as have one, which no system with the former may have."""
    links = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sorted(str(link) for link in links if "lasp_board_" in str(link)) + list(_in_shared_memory())


def _in_shared_memory():
    return {path for path in Path("/dev/shm").iterdir() if "lasp" in path.name}


KILLED_AT_THE_BOARD = """
import os, signal, torch, lasp
from lasp.exchange import board
env = lasp.init("gloo", timeout=20.0)
mesh = lasp.init_mesh(sp=-1, dp_shard=1)

def killed_at(call, number):
    calls = []
    def wrapped(*args, **options):
        calls.append(None)
        if len(calls) == number and env.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **options)
    return wrapped

PATCH
sequence = lasp.SequenceParallel(mesh["sp"], name="blocks.0", exchange="direct", validate="off")
x = torch.ones(1, 3, 1, 2)
lasp.linear_attention(x, x, x, sequence=sequence)
"""


@pytest.mark.any_pytorch
@pytest.mark.parametrize(
    "moment",
    [
        "os.urandom = killed_at(os.urandom, 1)",  # before there is memory
        "board._problems = killed_at(board._problems, 1)",  # it is there
        "board._InFile.join = killed_at(board._InFile.join, 1)",
        "torch.from_file = killed_at(torch.from_file, 2)",  # some of it is mapped
        "board._problems = killed_at(board._problems, 2)",  # all of it
        "board._InFile.close = killed_at(board._InFile.close, 1)",
    ],
)
def test_nothing_is_left_in_shared_memory_whenever_a_rank_is_killed(moment):
    before = _in_shared_memory()
    found = run_script(KILLED_AT_THE_BOARD.replace("PATCH", moment), 3)
    assert [code for code, _, _ in found] == [1, -9, 1], found
    for rank in (0, 2):
        assert "PeerError: layer 'blocks.0'" in found[rank][2]
        assert "global rank 1 has ended" in found[rank][2]
    assert _in_shared_memory() == before


@pytest.mark.parametrize("what", ["hosts", "meetings", "no space", "cannot map", "another's file"])
def test_ranks_that_cannot_read_each_others_memory_are_refused_on_every_rank(what):
    run_ranks(2, _refused, what)


def _auto_without_memory():
    rank, group = dist.get_rank(), dist.new_group([0, 1, 2])
    sequence, maps = lasp.SequenceParallel(group), [random_map(r) for r in range(3)]
    sequence.peers.network = replace(FAST, direct_latency=1e-9, direct_bandwidth=1e15)
    with mock.patch("os.fdopen", _fails if rank == 1 else os.fdopen), pytest.warns(match="full"):
        entering = start(maps[rank], sequence, fold=fold).wait()
    assert torch.equal(entering, expected_at(rank, maps, False))
    assert sequence.traffic.schedule != "direct"
    assert cost.network_of(sequence).direct_latency == float("inf")


def test_auto_takes_messages_where_memory_does_not_suffice():
    run_ranks(3, _auto_without_memory)


def _let_go():
    before = _mapped_boards()
    group = dist.new_group([0, 1])
    maps = [random_map(r) for r in range(2)]
    start(maps[dist.get_rank()], lasp.SequenceParallel(group, exchange="direct"), fold=fold).wait()
    assert _mapped_boards() > before
    alive = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert alive() is None
    assert _mapped_boards() == before


def _mapped_boards():
    return Path("/proc/self/maps").read_text().count("lasp_board_")


def test_a_board_goes_with_its_group():
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not tell what is mapped")
    run_ranks(2, _let_go)


def _alone_at_the_board():
    group = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    sequence = lasp.SequenceParallel(group, exchange="direct", name="layer")
    if dist.get_rank() == 0:
        with pytest.raises(lasp.PeerError, match="layer 'layer', forward"):
            start(random_map(0), sequence, fold=fold)


def test_a_rank_that_does_not_come_is_a_peer_error():
    run_ranks(2, _alone_at_the_board)
