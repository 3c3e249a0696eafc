"""`Decoding`: a state that goes on token by token, a token of each row at a time, in memory that stays where it is.

On a GPU the step is recorded as a CUDA graph, which the host starts with one call. The first steps run as they are, on
a stream of their own, so that what is made once (handles, compiled kernels) is there; the one behind them is recorded
and from then on replayed. It needs a model whose step always does the same in the same memory:

- no softmax layer without a window, whose keys and values grow;
- no weights that others hold (FSDP2, tensor parallelism), which would have to be gathered by NCCL in the graph;
- no experts but in bf16: in other dtypes PyTorch's grouped product has its sizes read by the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lasp.inference.run import Runner
from lasp.inference.state import InferenceState
from lasp.layout import ShardLayout
from lasp.models.experts import GatedExperts, HeadExperts
from lasp.ops.session import Key, Session
from lasp.ranks.parts import parts_of_model

_WARM = 2  # steps before the graph
_ONE = ShardLayout((1,))


class Decoding:
    """One session of a model.

    Args:
        runner: the model.
        state: its own from now on.
        cuda_graph: whether steps may be one.
    """

    def __init__(self, runner: Runner, state: InferenceState, *, cuda_graph: bool):
        self.runner = runner
        self._session = Session(state.held, "lasp.generate")
        self.lengths = list(state.lengths)
        self.logits, self.seen = state.logits, state.seen
        self._positions = torch.tensor(self.lengths, device=state.device)[:, None]
        self._ids = torch.zeros_like(self._positions)
        self._kept: dict[int, _Row] = {}  # of rows that have come to their end
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        self._inside = False
        self._torn = False  # within a step, or behind one that failed
        self.no_graph = why_no_graph(runner, state, cuda_graph)  # empty if there is to be one
        self._side = torch.cuda.Stream(state.device) if not self.no_graph else None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """A context around steps between which nobody else uses the model; else each step enters it by itself."""
        if self._inside:
            yield
            return
        with self.runner.inside(self._session, each_alone=True):
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def step(self, tokens: Tensor) -> None:
        """One token [B] of each row: `logits`, `seen` and the state are then those behind it."""
        self.refuse_torn()
        self._torn = True
        with torch.no_grad():
            self._ids.copy_(tokens[:, None])
            if self._graph is None and self._side is not None and self._steps >= _WARM:
                self._record()
            if self._graph is not None:
                self._graph.replay()
            elif self._side is not None:
                self._side.wait_stream(torch.cuda.current_stream(self._side.device))
                with torch.cuda.stream(self._side):
                    self._forward()
                torch.cuda.current_stream(self._side.device).wait_stream(self._side)
            else:
                self._forward()
        self._steps += 1
        self.lengths = [length + 1 for length in self.lengths]
        self._torn = False

    def refuse_torn(self) -> None:
        """Raise `RuntimeError` behind a step that failed."""
        if self._torn:
            raise RuntimeError(
                "a step of this session failed, so that some layers are behind its token and others before it: go on "
                "from a state of before (lasp.prefill, TokenStream.result)"
            )

    def _record(self) -> None:
        assert self._side is not None
        try:
            with torch.cuda.device(self._side.device), _casting_anew():
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self._side, capture_error_mode="thread_local"):
                    self._forward()
        except RuntimeError as error:
            raise RuntimeError(
                f"a step of {type(self.runner.model).__name__} cannot be a CUDA graph: pass cuda_graph=False to "
                f"lasp.generate ({error})"
            ) from error
        self._graph = graph

    def _forward(self) -> None:
        with self.entered():
            self._session.begin_token(self.lengths, self._positions[:, 0])
            self.logits.copy_(self.runner.logits(self._ids, self._positions, _ONE))
            self._session.end()
            self.seen.scatter_(1, self._ids, True)
            self._positions.add_(1)

    def keep(self, row: int) -> None:
        """A row has come to its end: in the state it is as it is now, whatever further steps make of it."""
        fixed = {key: x[row].clone() for key, (x, grows) in self._session.kept.items() if not grows}
        self._kept[row] = _Row(fixed, self.logits[row].clone(), self.seen[row].clone(), self.lengths[row])

    def state(self, *, goes_on: bool) -> InferenceState:
        """The state behind the last step, with rows that have ended as they were then; a copy if other steps follow."""
        self.refuse_torn()
        found = InferenceState(self._session.kept, self.lengths, self.logits, self.seen, self.runner.form)
        if goes_on:
            found = found.fork()
        lengths = list(found.lengths)
        for row, kept in self._kept.items():
            for key, x in kept.fixed.items():
                found.held[key].x[row] = x
            found.logits[row], found.seen[row], lengths[row] = kept.logits, kept.seen, kept.length
        found.lengths = tuple(lengths)
        return found


@contextlib.contextmanager
def _casting_anew() -> Iterator[None]:
    """Inside, autocast keeps no copies of weights, which would be gone when the graph is replayed."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Row(NamedTuple):
    """A row that has come to its end. Keys and values, of which there are ever more, keep its own part as it was."""

    fixed: dict[Key, Tensor]
    logits: Tensor
    seen: Tensor
    length: int


def why_no_graph(runner: Runner, state: InferenceState, wanted: bool) -> str:
    """Why steps are no CUDA graph, in words; empty if they are one."""
    if not wanted:
        return "cuda_graph=False"
    if runner.device.type != "cuda":
        return f"the model is on {runner.device}"
    grown = next((key.layer for key, held in state.held.items() if held.grows), None)
    if grown is not None:
        return f"the keys and values of layer {grown!r} grow"
    if any(isinstance(m, FSDPModule) for m in runner.model.modules()):
        return "FSDP2 gathers weights"
    experts = (m for m in runner.model.modules() if isinstance(m, (GatedExperts, HeadExperts)))
    odd = {p.dtype for m in experts for p in m.parameters()} - {torch.bfloat16}
    if odd:
        return f"the host reads how many tokens an expert has, in {odd.pop()}"
    if parts_of_model(runner.model) > 1:
        return "the ranks of tensor parallelism add up"
    return ""
