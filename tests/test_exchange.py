"""The fold of state maps, and the ring: what arrives, how many messages and how many bytes."""

import pytest
import torch
import torch.distributed as dist
from inputs import assert_close
from ranks import run_ranks

import lasp
from lasp.exchange import StateMap, compose, resolve, start

N, H, K, V = 2, 3, 4, 5


def random_map(seed, *, channels=1, restarts=False, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    log_decay = -torch.rand((N, H, channels), generator=draw, dtype=dtype)
    state = torch.randn((N, H, K, V), generator=draw, dtype=dtype)
    return StateMap(state, torch.full_like(log_decay, -torch.inf) if restarts else log_decay)


def apply(mapping, state):
    return mapping.log_decay.exp().unsqueeze(-1) * state + mapping.state


@pytest.mark.parametrize("channels", [1, K])
@pytest.mark.parametrize("restarts", [None, 0, 1, 2])
def test_compose_is_associative_and_applies_first_then_second(channels, restarts):
    a, b, c = (random_map(i, channels=channels, restarts=restarts == i) for i in range(3))
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    assert_close(left.state, right.state, "state")
    assert_close(left.log_decay, right.log_decay, "log_decay")
    state = random_map(9).state
    assert_close(apply(left, state), apply(c, apply(b, apply(a, state))), "applied to a state")


def test_a_run_that_starts_a_sequence_forgets_what_came_before():
    then = random_map(1, restarts=True)
    both = compose(random_map(0), then)
    assert torch.equal(both.state, then.state)
    assert (both.log_decay == -torch.inf).all()


@pytest.mark.parametrize("channels", [1, K])
def test_pack_is_one_flat_message_and_unpack_its_inverse(channels):
    mine, other = random_map(0, channels=channels), random_map(1, channels=channels)
    message = other.pack()
    assert message.shape == (N * H * K * V + N * H * channels,)
    found = mine.unpack(message)
    assert torch.equal(found.state, other.state)
    assert torch.equal(found.log_decay, other.log_decay)


def _ring(reverse, channels, restarting):
    rank, world = dist.get_rank(), dist.get_world_size()
    sequence = lasp.SequenceParallel(dist.group.WORLD, exchange="ring")
    maps = [random_map(r, channels=channels, restarts=r == restarting, dtype=torch.float32) for r in range(world)]
    entering = start(maps[rank], sequence, reverse=reverse).wait()

    before = list(reversed(range(rank + 1, world))) if reverse else list(range(rank))
    expected = torch.zeros(N, H, K, V)
    for r in before:
        expected = apply(maps[r], expected)
    assert_close(entering, expected, "entering state", rtol=1e-6, atol=1e-6)

    traffic = sequence.traffic
    last = rank == (0 if reverse else world - 1)
    assert traffic.messages == (0 if last else 1)
    assert traffic.bytes_sent == traffic.messages * 4 * (N * H * K * V + N * H * channels)
    assert (traffic.forward_exchanges, traffic.reverse_exchanges) == ((0, 1) if reverse else (1, 0))
    return traffic.messages


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("channels", "restarting"), [(1, None), (K, None), (1, 1)])
def test_ring_brings_the_fold_of_all_ranks_before_in_one_message_a_hop(world, reverse, channels, restarting):
    assert sum(run_ranks(world, _ring, reverse, channels, restarting)) == world - 1


def test_auto_is_the_ring():
    assert resolve(lasp.SequenceParallel(None)) == "ring"
    assert resolve(lasp.SequenceParallel(None, exchange="ring")) == "ring"


def _neighbours(order):
    from torch.distributed.device_mesh import DeviceMesh

    sequence = lasp.SequenceParallel(DeviceMesh("cpu", order))
    place = order.index(dist.get_rank())
    assert sequence.neighbour(-1) == (order[place - 1] if place else None)
    assert sequence.neighbour(1) == (order[place + 1] if place < 3 else None)


def test_neighbours_follow_the_order_of_the_mesh():
    run_ranks(4, _neighbours, [2, 0, 3, 1])
