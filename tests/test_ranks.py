"""The pool of workers: values by rank, errors and hangs that name the rank, and a pool that works again after them."""

import os
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import RankError, mesh_of, run_ranks
from small_model import SmallModel
from torch import nn

import lasp
from lasp.checks import trial


def _sum_of_ranks():
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def _fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("this one is broken")


def _sleep_on(rank):
    if dist.get_rank() == rank:
        time.sleep(60)


def _exit_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def _uninitialised():
    for x in (torch.empty(3), torch.empty_like(torch.ones(2)), torch.ones(1).new_empty(4)):
        assert x.isnan().all()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_default_group_has_exactly_the_ranks(world):
    assert run_ranks(world, _sum_of_ranks) == [(r, world, sum(range(world))) for r in range(world)]


def test_an_exception_on_one_rank_names_it_and_the_pool_recovers():
    with pytest.raises(RankError, match=r"rank 1 of 2 failed(.|\n)*this one is broken"):
        run_ranks(2, _fail_on, 1)
    assert len(run_ranks(2, _sum_of_ranks)) == 2


def test_a_hang_on_one_rank_names_it_and_the_pool_recovers():
    with pytest.raises(RankError, match="rank 1 of 2 did not finish"):
        run_ranks(2, _sleep_on, 1, timeout=2.0)
    assert len(run_ranks(2, _sum_of_ranks)) == 2


def test_a_dead_process_names_its_rank():
    with pytest.raises(RankError, match="rank 0 of 2 failed:\nthe process died, exit code 7"):
        run_ranks(2, _exit_on, 0)


def test_memory_is_poisoned_in_workers_and_here():
    run_ranks(1, _uninitialised)
    _uninitialised()


def _threads_of_devices():
    for _ in range(3):
        x = torch.ones(())
        dist.all_reduce(x, group=dist.new_group())
        assert x == 2
    return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")].count("gloo_tcp_loop\n")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are found in /proc")
def test_groups_share_a_device():
    assert run_ranks(2, _threads_of_devices) == [1, 1]


def _priority_of_a_device(nice, allowed):
    error = None if allowed else PermissionError()
    with (
        mock.patch.object(dist.ProcessGroupGloo, "__init__"),
        mock.patch.object(os, "getpriority", return_value=nice),
        mock.patch.object(os, "setpriority", side_effect=error) as told,
        mock.patch.object(os, "sched_setscheduler", side_effect=error),
    ):
        ranks._one_device()
    return [call.args[2] for call in told.call_args_list]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are found in /proc")
def test_the_thread_of_a_device_comes_after_others():
    """Under `nice` too, where a higher priority is refused to who is not root; and where it may not be said at all."""
    assert run_ranks(1, _priority_of_a_device, 0, True) == [[10]]
    assert run_ranks(1, _priority_of_a_device, 15, True) == [[19]]
    assert run_ranks(1, _priority_of_a_device, 0, False) == [[10]]


class Other(SmallModel):
    pass


class Mixes(SmallModel):
    def forward(self, input_ids, position_ids, layout=None):
        return super().forward(input_ids, position_ids, layout).flip(1)


def _tried(models):
    mesh, counts = mesh_of(sp=dist.get_world_size())["sp"], []
    with mock.patch.object(trial, "ask", wraps=trial.ask) as ask:
        for model in models:
            if isinstance(model, Mixes):
                with pytest.raises(ValueError, match="mixes tokens"):
                    lasp.parallelize(model, mesh)
            else:
                lasp.parallelize(model, mesh)
            counts.append(ask.call_count)
    return counts


def test_a_model_is_tried_once():
    """By one rank, and an equal one not again, on other ranks neither; one with other weights, of another class, or
    with other modules is. What is refused each rank tries."""
    deeper = SmallModel()
    deeper.head = nn.Sequential(deeper.head)
    models = [SmallModel(), SmallModel(), SmallModel(1), SmallModel().double(), Other(), deeper, Mixes(), Mixes()]
    by_all = [sum(counts) for counts in zip(*run_ranks(2, _tried, models))]
    assert by_all == [1, 1, 2, 3, 4, 5, 7, 9]
    assert run_ranks(3, _tried, models) == [[0, 0, 0, 0, 0, 0, 1, 2]] * 3
