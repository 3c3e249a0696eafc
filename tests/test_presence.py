"""A rank that has ended is known at once, one that is only slow is not taken for dead, and errors tell the cause."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from scripts import run_script
from torch.distributed.device_mesh import init_device_mesh

import lasp
from lasp.ranks import group
from lasp.ranks.presence import Presence, _Heard, _Line, _listener, _told, presence
from lasp.ranks.watch import Watch

HEAD = """
import os, signal, sys, time, torch, torch.nn as nn, torch.distributed as dist
import lasp
env = lasp.init("gloo", timeout=TIMEOUT)
mesh = lasp.init_mesh(sp=-1, dp_shard=1)
sequence = lasp.SequenceParallel(mesh["sp"], name="blocks.0", exchange="ring")
x = torch.ones(1, 3, 1, 2, requires_grad=True)
started = time.monotonic()
"""


def run(body, *, timeout=60.0):
    return run_script(HEAD.replace("TIMEOUT", str(timeout)) + body, 3)


def seconds(out):
    return float(re.findall(r"^after (\S+)", out, re.M)[-1])


COMPARE = """
def compared():
    try:
        return lasp.linear_attention(x, x, x, sequence=sequence)
    finally:
        print(f"after {time.monotonic() - started}", flush=True)
"""


def test_a_rank_that_dies_before_a_comparison_is_known_at_once():
    """The timeout is 60 s."""
    body = COMPARE + "if env.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ncompared()\n"
    found = run(body)
    assert found[1][0] == -signal.SIGKILL
    for rank in (0, 2):
        code, out, error = found[rank]
        assert code == 1
        assert "PeerError: layer 'blocks.0': waited " in error
        assert "rank 1 (its process has ended) before the exchange" in error
        assert seconds(out) < 15, out


def test_the_first_rank_of_a_group_that_dies_is_known_at_once_too():
    body = COMPARE + "if env.rank == 0:\n    os._exit(3)\ncompared()\n"
    for _, out, error in run(body)[1:]:
        assert "PeerError: layer 'blocks.0': waited " in error
        assert "rank 0 (its process has ended)" in error
        assert seconds(out) < 15, out


def test_a_rank_whose_forked_child_lives_on_has_ended_all_the_same():
    """Such as the workers of a DataLoader."""
    child = "if os.fork() == 0:\n        os.close(1), os.close(2), time.sleep(40), os._exit(0)\n"
    body = COMPARE + f"if env.rank == 1:\n    {child}    os.kill(os.getpid(), signal.SIGKILL)\ncompared()\n"
    for rank, (_, out, error) in enumerate(run(body)):
        if rank != 1:
            assert "rank 1 (its process has ended)" in error
            assert seconds(out) < 15, out


def test_a_rank_that_holds_the_lock_of_python_is_not_taken_for_dead():
    body = """
import ctypes
from lasp.ranks.presence import presence
if env.rank == 1:
    ctypes.PyDLL(None).usleep(3_000_000)
compared()
print(presence._listener.getsockname()[0])
"""
    for code, out, error in run(COMPARE + body):
        assert code == 0, error
        assert seconds(out) > 2
        assert out.splitlines()[-1] == "127.0.0.1"  # all ranks are here: nothing listens to other hosts


def test_the_errors_of_other_ranks_tell_what_one_of_them_failed_of():
    body = """
if env.rank == 1:
    raise ValueError("a shard is missing")
lasp.token_loss(x[0, :, 0], torch.tensor([0, 1, 0]), mesh=mesh)
"""
    found = run(body)
    assert "ValueError: a shard is missing" in found[1][2]
    for rank in (0, 2):
        last = found[rank][2].strip().splitlines()
        error = next(line for line in last[::-1] if "PeerError" in line)
        assert "token_loss, forward: the sum over all ranks failed after" in error
        assert "global rank 1 reported ValueError: a shard is missing" in error


CALLS = {
    "token_loss": "lasp.token_loss(x[0, :, 0], torch.tensor([0, 1, 0]), mesh=mesh)",
    "sync_grads": "lasp.sync_grads(layer, mesh)",
    "shard_sequence or unshard_sequence": "lasp.unshard_sequence(x, mesh)",
    "the comparison of NaN and Inf": "lasp.assert_finite()",
    "shard_batch": 'lasp.shard_batch({"input_ids": torch.zeros(1, 7, dtype=torch.long)}, mesh)',
}


@pytest.mark.parametrize("what", CALLS)
def test_a_rank_that_ends_before_a_call_of_all_is_named_on_all(what):
    """What is no exchange: the timeout is 60 s."""
    body = f"""
layer = nn.Linear(2, 2)
layer(x[0, :, 0]).sum().backward()
checked = lasp.SequenceParallel(mesh["sp"], check_finite=True)
lasp.linear_attention(x, x, x, sequence=checked)[0].sum().backward()
if env.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    {CALLS[what]}
finally:
    print(f"after {{time.monotonic() - started}}", flush=True)
"""
    found = run(body)
    for rank in (0, 2):
        code, out, error = found[rank]
        assert code == 1
        last = error[error.rindex("PeerError") :]
        assert what in last, error
        assert "global rank 1 has ended" in last or "global ranks 0, 1 have ended" in last, error
        assert seconds(out) < 20, out


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("ddp", r"lasp: rank {rank} waited for another; global rank 1 has ended"),
        ("fsdp2", r".*PeerError: FSDP2's gathering of weights, .* global rank 1 has ended: .*"),  # gloo's words follow
    ],
)
def test_an_error_of_data_parallelism_names_who_has_gone(scheme, expected):
    body = f"""
from lasp.data_parallel import wrap_ddp, wrap_fsdp2
model = wrap_{scheme}(nn.Linear(3, 5), mesh)
model(torch.ones(2, 3)).sum().backward()
if env.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
model(torch.ones(2, 3)).sum().backward()
"""
    found = run(body)
    for rank in (0, 2):
        code, _, error = found[rank]
        assert code == 1
        line = error.strip().splitlines()[-1]
        assert re.fullmatch(expected.format(rank=rank), line), error


def test_a_rank_that_is_stopped_is_told_from_those_that_wait():
    """Timeout 8 s, in which ranks must also meet on a busy machine; nobody's process ends."""
    body = """
import threading
if env.rank == 1:
    threading.Timer(18, os._exit, [0]).start()
    time.sleep(28)
try:
    lasp.token_loss(x[0, :, 0], torch.tensor([0, 1, 0]), mesh=mesh)
except lasp.PeerError as error:
    print(error)
    print(f"after {time.monotonic() - started}", flush=True)
    time.sleep(3)
"""
    for rank, (_, out, error) in enumerate(run(body, timeout=8.0)):
        if rank != 1:
            assert "token_loss, forward: the sum over all ranks failed after" in out, error
            assert "global rank 1 did not report, and may hang" in out
            assert seconds(out) < 8 + 3


def _timeouts():
    before = group.process.timeout, group.timeout_of(dist.group.WORLD)
    try:
        lasp.init("gloo", timeout=7.0)
        mesh = lasp.init_mesh(dp_replicate=2, sp=2)
        handed = dist.new_group([0, 1, 2, 3])
        made = [mesh[name].get_group() for name in ("dp_replicate", "sp")]
        lasp.sync_grads(torch.nn.Linear(2, 2), handed)
        of_user = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "sp"))
        lasp.SequenceParallel(of_user["sp"])
        groups = [dist.group.WORLD, *made, lasp.ranks.grad_group(mesh)[0], handed, of_user["sp"].get_group()]
        return [group.timeout_of(g).total_seconds() for g in groups]
    finally:
        group.process.timeout = None
        group.set_timeout(before[1])
        group.process.timeout = before[0]


def test_every_group_that_lasp_makes_or_is_handed_has_the_timeout_of_init():
    for found in run_ranks(4, _timeouts):
        assert found == [7.0] * 6


# One connection, without ranks.


@pytest.fixture
def listener():
    found = _listener("127.0.0.1")
    yield found
    found.close()


def look(line, wanted, limit=5.0):
    until = time.monotonic() + limit
    while line.look() != wanted and time.monotonic() < until:
        time.sleep(0.01)
    return line.look()


@pytest.mark.parametrize("here", [True, False])
def test_a_connection_stands_until_the_other_end_is_closed(listener, here):
    line = _Line(listener.getsockname(), here)
    time.sleep(0.1)
    assert not line.look()
    assert not line.look()
    listener.close()
    assert look(line, True)


def test_an_end_between_connection_and_first_look_is_seen(listener):
    line = _Line(listener.getsockname(), False)
    time.sleep(0.1)
    listener.close()
    assert look(line, True)


@pytest.mark.parametrize("here", [True, False])
def test_a_refused_connection_is_an_end_only_on_this_host(listener, here):
    """To another host a firewall may refuse it."""
    address = listener.getsockname()
    listener.close()
    assert look(_Line(address, here), here) == here


def test_a_connection_that_something_on_the_way_cuts_is_no_end(listener):
    line = _Line(listener.getsockname(), False)
    time.sleep(0.1)
    assert not line.look()
    accepted, _ = listener.accept()
    accepted.close()
    time.sleep(0.1)
    assert not line.look()
    listener.close()
    assert look(line, True)


def test_a_process_that_is_stopped_or_forks_keeps_or_loses_its_place():
    code = (
        "import os, time; from lasp.ranks.presence import presence, _listener; "
        "presence._listener = _listener('127.0.0.1'); print(presence._listener.getsockname()[1], flush=True); "
        "os.fork() or (os.close(1), time.sleep(60)); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        line = _Line(("127.0.0.1", int(process.stdout.readline())), True)
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.3)
        assert not line.look()
        os.kill(process.pid, signal.SIGKILL)
        assert look(line, True)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_without_ranks_nothing_is_known_or_said():
    presence = Presence()
    presence.announce()
    assert (presence.ended(), presence.account("it"), presence._listener) == ([], "", None)


class Queued:
    """An event on a GPU."""

    def __init__(self, done):
        self.done, self.asked = done, 0

    def query(self):
        self.asked += 1
        return self.done


def _watched(*, late, ended, events):
    found = Watch()
    found._timeout = -1.0 if late else 60.0
    for number, event in enumerate(events):
        found.note(event, lambda number=number: f"layer {number}")
    with (
        mock.patch.object(presence, "ended", return_value=ended),
        mock.patch.object(presence, "account", return_value="global rank 1 has ended"),
        mock.patch.object(dist, "get_rank", return_value=0),
    ):
        return found._line()


def test_over_nccl_the_first_operation_that_does_not_end_is_told():
    for late, ended in ((True, []), (False, [1])):
        events = [Queued(True), Queued(False), Queued(False)]
        line = _watched(late=late, ended=ended, events=events)
        assert line.startswith(
            "lasp: rank 0 waited for another; layer 1 has not come to its end; global rank 1 has ended"
        )
        assert _watched(late=late, ended=ended, events=[Queued(True)]) == ""


def test_over_nccl_the_end_of_a_rank_is_told_once_though_nothing_is_noted():
    """A checkpoint may wait for it. Where all is well others end soon after, and nothing is said."""
    found = Watch()
    with (
        mock.patch.object(presence, "ended", return_value=[1]),
        mock.patch.object(presence, "account", return_value="global rank 1 has ended"),
        mock.patch.object(dist, "get_rank", return_value=0),
    ):
        assert found._line() == ""
        found._timeout = 0.0
        assert found._line().startswith("lasp: rank 0 may wait for another; global rank 1 has ended. If so")
        assert found._line() == ""


def test_over_nccl_the_thread_has_the_timeout_of_init_and_ends_in_silence_with_the_groups():
    found, lines = Watch(), []
    with (
        mock.patch.object(presence, "ended", return_value=[]),
        mock.patch.object(dist, "get_rank", side_effect=[3, ValueError("destroyed")]),
        mock.patch.object(dist, "is_initialized", side_effect=[True, False]),
        mock.patch("threading.excepthook", lines.append),
    ):
        found.start(timedelta(seconds=20))
        found._thread.join(5)
    assert (found._timeout, found._rank, found._thread.is_alive(), lines) == (20.0, 3, False, [])


def test_over_nccl_no_event_is_asked_while_nothing_is_wrong():
    """While another thread captures a CUDA graph that would end the capture."""
    events = [Queued(False)]
    assert _watched(late=False, ended=[], events=events) == ""
    assert events[0].asked == 0


def test_what_is_told_of_many():
    heard = _Heard(causes={}, effects={2: "PeerError: it"}, answered=True)
    assert _told([0, 2, 3], [2, 3], heard) == "global rank 3 has ended"
    assert (
        _told([0, 2, 3], [2], heard)
        == "global rank 2 reported PeerError: it; global ranks 0, 3 did not report, and may hang"
    )
    one, two = {0: "ValueError: x"}, {0: "ValueError: x", 2: "ValueError: x"}
    assert _told([0, 2], [0], _Heard(one)) == "global rank 0 reported ValueError: x"
    both = "global ranks 0, 2 reported ValueError: x; global rank 3 has ended"
    assert _told([0, 2, 3], [0, 2, 3], _Heard(two)) == both
    assert _told(list(range(1, 9)), list(range(1, 9)), _Heard()) == "global ranks 1, 2, 3, 4 and 4 more have ended"
    assert _told([1], [], _Heard()) == ""
