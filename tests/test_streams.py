"""In which order an exchange on a GPU is queued, and on which stream; stand-ins for streams, so without a GPU.

What the card then does is for exchange_on_gpus.py.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from lasp.exchange import base, board
from lasp.ops import stream
from lasp.ranks.group import process


class FakeCard:
    """Streams that write down what they are told."""

    def __init__(self):
        self.log, self.capturing = [], False
        self.current = [self.stream("caller")]

    def stream(self, name):
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.log.append(f"{name} waits for {event}"),
            record_event=lambda: self.write(f"event {len(self.log)} on {name}"),
        )

    def current_stream(self, device=None):
        return self.current[-1]

    def is_capturing(self):
        return self.capturing

    def write(self, what):
        self.log.append(what)
        return what

    def here(self, what):
        self.log.append(f"{what} on {self.current[-1].name}")

    @contextlib.contextmanager
    def use(self, stream):
        self.current.append(stream)
        yield
        self.current.pop()

    def tensor(self, name="state"):
        kept = lambda stream: self.log.append(f"{name} kept for {stream.name}")  # noqa: E731
        return SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0), record_stream=kept, shape=(2, 8))

    def schedule(self):
        self.here("exchange")
        yield
        return self.tensor("entering")

    def closing(self, joins):
        return SimpleNamespace(joins=joins, finish=lambda: self.here("finish"))

    def taken(self):
        """What was written since the last time."""
        log, self.log = self.log, []
        return log


@pytest.fixture
def card():
    fake = FakeCard()
    base._side_stream.cache_clear()
    with (
        mock.patch("torch.cuda.current_stream", fake.current_stream),
        mock.patch("torch.cuda.Stream", return_value=fake.stream("side")),
        mock.patch("torch.cuda.stream", fake.use),
        mock.patch("torch.cuda.is_current_stream_capturing", fake.is_capturing),
    ):
        yield fake
    base._side_stream.cache_clear()


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("capturing", [False, True])
def test_beside_the_caller(card, joins, capturing):
    card.capturing = capturing
    inputs = [card.tensor(), card.tensor("transition")]
    pending = base.RunningBeside(card.schedule(), [card.closing(joins)], inputs)
    event = "event 3 on side" if joins or capturing else "event 2 on side"  # else the caller does not wait for the end
    order = ["finish on side", event] if joins or capturing else [event, "finish on side"]
    begun = ["side waits for caller", "exchange on side", *order, "state kept for side", "transition kept for side"]
    assert card.taken() == begun
    pending.wait()
    assert card.taken() == [f"caller waits for {event}", "entering kept for caller"]


def test_on_the_callers_own_stream(card):
    base.Inline(card.schedule(), [card.closing(False)]).wait()
    assert card.taken() == ["exchange on caller", "finish on caller"]


def test_what_goes_before_an_exchange_runs_on_its_stream(card):
    with base.beside(card.tensor()):
        card.here("end of the tokens")
    assert card.taken() == ["side waits for caller", "end of the tokens on side"]


def test_turns_of_a_board_are_in_order_and_graphs_meet_twice(card):
    boards = board.Board(([card.tensor()] * 2, lambda: card.here("meeting")), 0)
    boards.begin()
    boards.end()
    assert card.taken() == ["event 0 on caller"]
    boards.begin()
    assert card.taken() == ["caller waits for event 0 on caller"]
    assert not boards.repeats
    card.capturing = True
    boards.begin()
    boards.end()
    assert card.taken() == ["meeting on caller"]  # no event from outside of the capture, and none that others wait for
    card.capturing = False
    boards.begin()
    assert card.taken() == ["caller waits for event 0 on caller", "meeting on caller"]
    larger = board.Board(([card.tensor()] * 2, boards.meet), 0, boards)
    assert larger.repeats
    assert larger._in_graphs is boards  # whose memory the graph goes on to use


def _symmetric_memory(missing):
    rank, group = dist.get_rank(), dist.new_group([0, 1])
    met = []
    handle = SimpleNamespace(rank=rank, barrier=lambda **options: met.append(options))
    handle.get_remote_tensor = lambda r, shape, dtype: torch.full(shape, r, dtype=dtype)
    empty = mock.Mock(side_effect=torch.OutOfMemoryError("none left") if rank == missing else None)
    empty.return_value = torch.full((128,), 77, dtype=torch.uint8)
    meetings = process.meetings
    with (
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.distributed._symmetric_memory.empty", empty),
        mock.patch("torch.distributed._symmetric_memory.rendezvous", return_value=handle) as rendezvous,
    ):
        problem, memory = board._make(group, 64, torch.device("cuda", 0))
    if missing is None:
        assert problem == ""
        tensors, meet = memory
        assert [x.shape for x in tensors] == [(2, 64)] * 2
        assert [x[0, 0].item() for x in tensors] == [77 if r == rank else r for r in range(2)]
        meet()
        assert met == [{"channel": 0, "timeout_ms": met[0]["timeout_ms"]}]
        assert met[0]["timeout_ms"] > 1000
        assert process.meetings == meetings + 1
    else:  # the other rank does not wait in a rendezvous
        assert memory is None
        assert problem == f"rank {missing}: OutOfMemoryError: none left"
        rendezvous.assert_not_called()
    process.meetings = meetings


@pytest.mark.parametrize("missing", [None, 0, 1])
def test_symmetric_memory_is_set_up_by_all_or_by_none(missing):
    run_ranks(2, _symmetric_memory, missing)


def test_gradients_are_copied_to_pinned_memory_beside_the_sweep():
    """And nothing is added to them before; the host waits for nothing."""
    card = FakeCard()
    side, gradient = card.stream("side"), card.tensor("gradient")
    gradient.detach, gradient.dtype, gradient.layout = lambda: gradient, torch.float32, torch.strided
    host = SimpleNamespace(copy_=lambda x, non_blocking: card.here(f"copy, non_blocking={non_blocking}"))
    with (
        mock.patch.object(stream, "_side_stream", return_value=side),
        mock.patch.multiple(torch.cuda, current_stream=card.current_stream, stream=card.use),
        mock.patch.object(torch, "empty", return_value=host) as empty,
    ):
        stream.Content(gradient)
        card.here("sweep")
        stream.wait_for_copies(torch.device("cuda", 0))
        card.here("backward")
    assert empty.call_args.kwargs["pin_memory"]
    assert card.log == [
        "side waits for caller",
        "copy, non_blocking=True on side",
        "gradient kept for side",
        "sweep on caller",
        "caller waits for side",
        "backward on caller",
    ]
