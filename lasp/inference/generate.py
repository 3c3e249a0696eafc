"""`generate` and `stream_tokens`: tokens behind prompts, or behind a state, one of each row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp import arguments
from lasp.checks import agreement
from lasp.inference.decode import Decoding
from lasp.inference.prefill import (
    agreement_of,
    check_state,
    checked_prompts,
    compares_nothing,
    prompt_checksums,
    run_prompts,
)
from lasp.inference.run import Runner, as_usual, sequence_of
from lasp.inference.sampling import Sampling, number_of, seeds_of
from lasp.inference.state import InferenceState
from lasp.ranks import waiting
from lasp.ranks.collectives import device_of
from lasp.ranks.parts import parts_of_model


class Generated(NamedTuple):
    """What `lasp.generate` returns."""

    ids: Tensor  # [B, N], int64, on the model's device: the new tokens; behind the end of a row `pad_token_id`
    lengths: tuple[int, ...]  # how many of them are a row's
    state: InferenceState  # behind all of them


def generate(
    model: nn.Module,
    ids: Any,
    *,
    max_new_tokens: int | Sequence[int],
    state: InferenceState | None = None,
    mesh: Any = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Any = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop: Sequence[Sequence[int]] | None = None,
    seed: int | Sequence[int] | None = None,
    streamer: Any = None,
    segment: int | None = None,
    cuda_graph: bool = True,
) -> Generated:
    """Go on with prompts: the most probable token after the other, or drawn ones.

    A prompt is run by `lasp.prefill`. Then each step takes the time and memory of one token, however many came before
    (softmax layers without a window look at all of them). A model that is split over ranks runs its prompts on all of
    them; then every rank makes the same tokens by itself. Options are named and defined as in transformers; where they
    differ it is said.

    Args:
        model: as of `lasp.prefill`.
        ids: as of `lasp.prefill`. With a `state` they are the tokens behind it, or None to go on with the token that it
            expects.
        max_new_tokens: of each row at most; one number, or one for each row.
        state: of earlier tokens. It is not changed.
        mesh: as of `lasp.prefill`.
        attention_mask: as of `lasp.prefill`.
        cu_seqlens: as of `lasp.prefill`.
        do_sample: draw tokens; else the most probable is taken.
        temperature: of the tokens that are drawn from (`lasp.inference.sampling.Sampling`); None leaves all as they
            are.
        top_k: likewise.
        top_p: likewise.
        repetition_penalty: makes tokens less probable that the row has seen: padding never, those in `state` always.
        eos_token_id: a row ends behind this token, or one of these, which it still gets.
        pad_token_id: what stands in `ids` of the result behind the end of a row; None is the first eos_token_id, or 0.
            Prompts that are a tensor without attention_mask have it cut off at their ends, if it is no eos_token_id.
        stop: sequences of tokens; a row ends behind one of them.
        seed: for do_sample, of the first row; the others have the numbers behind it. Or one for each row. What is drawn
            depends on a row's seed and the positions of its tokens only. None draws one of PyTorch's generator.
        streamer: an object with `put(tensor)` and `end()`, as transformers' TextStreamer: it gets the prompts if they
            are a tensor, then [B] for each step, `pad_token_id` for rows that have ended.
        segment: as of `lasp.prefill`.
        cuda_graph: replay steps as a CUDA graph: on a GPU, of a model without softmax layers that see all tokens,
            without FSDP2 and tensor parallelism, and with experts in bf16 only. Elsewhere it changes nothing, and
            `lasp.explain` tells why.

    Returns:
        The new tokens, how many each row has, and the state behind them. This is what `lasp.prefill` gives for the
        prompts with these tokens, up to rounding: each token has gone through the model, also a row's last.

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication.
        RankMismatchError: ranks were given different prompts or options, or made different tokens; on every rank.
        PeerError: a rank has ended, or did not come within the timeout of its group.
        RuntimeError: as `lasp.prefill`; or a step that cannot be a CUDA graph.
        FloatingPointError: scores that are NaN.
    """
    options = {name: x for name, x in locals().items() if name not in ("model", "ids", "mesh", "streamer")}
    tokens = _stream(model, ids, mesh, streamer, "generate", options)
    with tokens.decoding.entered():
        while not tokens.over:
            tokens.step()
    tokens.compare()
    return tokens.result()


def stream_tokens(model: nn.Module, ids: Any, *, mesh: Any = None, **options: Any) -> TokenStream:
    """`lasp.generate` as an iterator: prompts are run at once, and each step when its tokens are asked for.

    Between steps the model may be used otherwise, also by other streams. All ranks take the steps together.

    Args:
        model: as of `lasp.generate`.
        ids: as of `lasp.generate`.
        mesh: as of `lasp.generate`.
        options: the others of `lasp.generate`, but for `streamer`.

    Returns:
        An iterator that gives a list for each step: of each row the new token, or None behind its end.

    Raises:
        TypeError, ValueError, RankMismatchError, PeerError, RuntimeError: as `lasp.generate`, here or in a step.
    """
    unknown = set(options) - set(_DEFAULTS)
    if unknown or "max_new_tokens" not in options:
        what = f"got {sorted(unknown)}" if unknown else "max_new_tokens is missing"
        raise TypeError(f"options must be those of lasp.generate without streamer, {what}")
    return _stream(model, ids, mesh, None, "stream_tokens", {**_DEFAULTS, **options})


_DEFAULTS = {
    name: x
    for name, x in ({**(generate.__kwdefaults__ or {}), "max_new_tokens": None}).items()
    if name not in ("mesh", "streamer")
}


class TokenStream:
    """An iterator over steps: of each a list with a row's new token, or None behind its end.

    Attributes:
        lengths: how many tokens each row has got so far.
        over: whether all rows have ended.
        decoding: the session, for `lasp.generate`.
    """

    def __init__(self, decoding: Decoding, request: _Request, streamer: Any):
        self.decoding, self._request, self._streamer = decoding, request, streamer
        self._new: list[list[int]] = [[] for _ in decoding.lengths]
        self._ended = [False] * len(self._new)
        self._broken = False  # within a step, or behind one that was broken off
        self.over = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row has seen, see the class."""
        return tuple(len(new) for new in self._new)

    def __iter__(self) -> Iterator[list[int | None]]:
        return self

    def __next__(self) -> list[int | None]:
        if self.over:
            raise StopIteration
        found = self.step()
        if self.over:
            self.compare()
        return found

    @as_usual
    def step(self) -> list[int | None]:
        """What the iterator gives, before all rows have ended."""
        decoding, request = self.decoding, self._request
        self._refuse_broken()
        tokens = request.choose(decoding)
        on_host = _on_its_way(tokens)
        self._broken = True
        decoding.step(tokens.clamp(min=0))  # which runs while the host reads and looks at them
        found = [None if ended else token for ended, token in zip(self._ended, on_host())]
        if -1 in found:
            raise FloatingPointError(
                f"the scores of row {(row := found.index(-1))} are NaN, or infinite, behind "
                f"{decoding.lengths[row] - 1} tokens, so that no token can be chosen: look at the weights, or at a "
                "temperature near 0"
            )
        ending = [row for row, token in enumerate(found) if token is not None and self._ends(row, token)]
        for row in ending:
            self._ended[row] = True
        self.over = all(self._ended)
        if not self.over:
            for row in ending:
                decoding.keep(row)
        self._broken = False
        if self._streamer is not None:
            self._streamer.put(torch.tensor([request.padding if token is None else token for token in found]))
            if self.over:
                self._streamer.end()
        return found

    def _refuse_broken(self) -> None:
        if self._broken:
            self.decoding.refuse_torn()  # which says more of it
            raise RuntimeError(
                "a step of this session was broken off, so that its state may be behind a token that was not returned: "
                "go on from a state of before (lasp.prefill, TokenStream.result)"
            )

    def _ends(self, row: int, token: int) -> bool:
        new, request = self._new[row], self._request
        new.append(token)
        stopped = any(len(stop) <= len(new) and new[-len(stop) :] == stop for stop in request.stop)
        return token in request.ends or stopped or len(new) == request.most[row]

    def compare(self) -> None:
        """Raise `RankMismatchError` on every rank unless all have made the same tokens."""
        runner = self.decoding.runner
        if runner.sequence.size > 1 and not compares_nothing(runner.model):
            tokens = {f"tokens of row {row}": agreement.checksum(new) for row, new in enumerate(self._new)}
            agreement.compare(runner.sequence, tokens, before="the end of lasp.generate")

    def result(self) -> Generated:
        """The tokens and the state so far, a copy of it while rows go on."""
        self._refuse_broken()
        most = max(self.lengths)
        rows = [[*new, *[self._request.padding] * (most - len(new))] for new in self._new]
        state = self.decoding.state(goes_on=not self.over)
        ids = torch.tensor(rows, dtype=torch.int64, device=state.device)
        return Generated(ids, self.lengths, state)


@dataclass(frozen=True)
class _Request:
    """The options of a call, checked."""

    sampling: Sampling
    most: tuple[int, ...]
    ends: frozenset[int]
    padding: int
    stop: tuple[list[int], ...]
    seeds: tuple[int, ...]

    def choose(self, decoding: Decoding) -> Tensor:
        """The next token of each row."""
        numbers = [number_of(*x) for x in zip(self.seeds, decoding.lengths)] if self.sampling.do_sample else []
        with torch.no_grad():
            return self.sampling.choose(decoding.logits, decoding.seen, numbers)


@as_usual
def _stream(model: nn.Module, ids: Any, mesh: Any, streamer: Any, name: str, given: dict[str, Any]) -> TokenStream:
    """Run the prompts."""
    options = dict(given)
    state, segment, cuda_graph = (options.pop(x) for x in ("state", "segment", "cuda_graph"))
    of_prompts = {x: options.pop(x) for x in ("attention_mask", "cu_seqlens")}
    sequence = sequence_of(model, mesh)
    with agreement_of(sequence, model, name) as ranks_agree:
        runner = Runner(model, sequence)
        ends, padding = _ends_and_padding(options, runner.vocabulary)
        if ids is None and state is not None:
            check_state(runner, state, None)
            _refuse_without_ids(of_prompts)
            prompts, rows = [], len(state)
        else:
            cut = options["pad_token_id"] if isinstance(ids, Tensor) and padding not in ends else None
            prompts = checked_prompts(runner, ids, state, pad_token_id=cut, **of_prompts)
            rows = len(prompts)
        step = None if segment is None else arguments.integer("segment", segment, at_least=1)
        arguments.flag("cuda_graph", cuda_graph)
        if streamer is not None and not (callable(getattr(streamer, "put", None)) and hasattr(streamer, "end")):
            raise TypeError(f"streamer must have put(tensor) and end(), got {arguments.shown(streamer)}")
        request = _request(options, rows, ends, padding)
        told = {**options, "segment": segment, "cuda_graph": cuda_graph, "stop": request.stop, "most": request.most}
        told = {x: value for x, value in told.items() if not isinstance(value, Tensor)}
        ranks_agree.settle(lambda: told, lambda: {"prompts": prompt_checksums(prompts, state)})
    if request.sampling.do_sample and given["seed"] is None:
        _refuse_parts(runner)
        request = _with_seeds(request, runner)
    if streamer is not None and isinstance(ids, Tensor):
        streamer.put(ids.cpu())
    behind = state.fork() if state is not None and not prompts else run_prompts(runner, prompts, state, step)
    decoding = Decoding(runner, behind, cuda_graph=cuda_graph)
    for split in runner.splits:
        split.decoded = f"generated last: {rows} rows, steps " + (
            f"one by one, without a CUDA graph, since {decoding.no_graph}" if decoding.no_graph else "as a CUDA graph"
        )
    return TokenStream(decoding, request, streamer)


def _refuse_parts(runner: Runner) -> None:
    """Ranks of tp compute one token together, and know of each other in the model's layers only."""
    parts = parts_of_model(runner.model)
    if parts > 1:
        raise ValueError(
            f"seed must be given to draw from a model that lasp.tensor_parallel has split over {parts} ranks, got "
            "None: all of them must draw alike"
        )


def _refuse_without_ids(of_prompts: dict[str, Any]) -> None:
    for name, value in of_prompts.items():
        if value is not None:
            raise ValueError(f"{name} goes with ids, which are None, got {arguments.shown(value)}")


def _ends_and_padding(options: dict[str, Any], vocabulary: int | None) -> tuple[frozenset[int], int]:
    eos, pad = options["eos_token_id"], options["pad_token_id"]
    ends = () if eos is None else arguments.integers("eos_token_id", eos) if arguments.is_several(eos) else (eos,)
    ends = tuple([_token("eos_token_id", token, vocabulary) for token in ends])
    if pad is not None:
        _token("pad_token_id", pad)
    return frozenset(ends), pad if pad is not None else ends[0] if ends else 0


def _token(name: str, value: Any, vocabulary: int | None = None) -> int:
    token = arguments.integer(name, value, at_least=0)
    if vocabulary is not None and token >= vocabulary:
        raise ValueError(f"{name} must be one of the model's {vocabulary} tokens, 0 to {vocabulary - 1}, got {token}")
    return token


def _request(options: dict[str, Any], rows: int, ends: frozenset[int], padding: int) -> _Request:
    names = ("do_sample", "repetition_penalty", "temperature", "top_k", "top_p")
    sampling = Sampling(**{name: options[name] for name in names})
    most = options["max_new_tokens"]
    if arguments.is_several(most):
        numbers = arguments.integers("max_new_tokens", most)
        if len(numbers) != rows or min(numbers) < 1:
            raise ValueError(
                f"max_new_tokens must be positive, one or one for each of {rows} rows, got {arguments.shown(most)}"
            )
    else:
        numbers = (arguments.integer("max_new_tokens", most, at_least=1),) * rows
    stop = options["stop"]
    if stop is not None and (not isinstance(stop, (list, tuple)) or not stop):
        raise TypeError(f"stop must be a list of sequences of tokens, got {arguments.shown(stop)}")
    sequences = tuple(list(arguments.integers("stop", x)) for x in stop or ())
    if not all(sequences):
        raise ValueError(f"stop must be sequences of at least one token, got {arguments.shown(stop)}")
    seeds = seeds_of(0 if options["seed"] is None else options["seed"], rows)
    return _Request(sampling, numbers, ends, padding, sequences, seeds)


def _with_seeds(request: _Request, runner: Runner) -> _Request:
    """Drawn of PyTorch's generator, on all ranks those of the first."""
    first = torch.randint(2**62, (1,))
    sequence = runner.sequence
    if sequence.size > 1:
        assert sequence.group is not None
        there = first.to(device_of(sequence.group))
        with waiting("lasp.generate: the seed of the first rank"):
            dist.broadcast(there, group=sequence.group, group_src=sequence.in_group[0])
        first = there.cpu()
    return _Request(**{**vars(request), "seeds": seeds_of(int(first), len(request.seeds))})


def _on_its_way(tokens: Tensor) -> Callable[[], list[int]]:
    """Start the copy to the host; the result waits for these tokens, and not for what is queued behind them."""
    if tokens.device.type != "cuda":
        return tokens.tolist
    there = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=True)
    there.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tokens.device))

    def wait() -> list[int]:
        arrived.synchronize()
        return there.tolist()

    return wait
