"""`prefill`: what a model knows behind its prompts, each of them split over the ranks and run in segments."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from lasp import arguments
from lasp.adapters.handles import held_by
from lasp.checks.agreement import Agreement
from lasp.checks.checksum import checksums
from lasp.inference.library import check_cache
from lasp.inference.prompts import prompts_of
from lasp.inference.run import Runner, as_usual, sequence_of
from lasp.inference.state import InferenceState
from lasp.layout import ShardLayout
from lasp.ops.session import Session
from lasp.ops.stream import Segment
from lasp.ranks import SequenceParallel, alone

_SEGMENT = 2**15  # tokens of a rank, of all rows together


def prefill(
    model: nn.Module,
    ids: Any,
    mesh: Any = None,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Any = None,
    pad_token_id: int | None = None,
    state: InferenceState | None = None,
    segment: int | None = None,
    to: int | None = None,
) -> InferenceState | None:
    """Run prompts through a model and return what it knows behind them, for `lasp.generate`.

    A prompt is split over the ranks, and streamed in segments, so that it may be longer than memory; what is kept of it
    does not depend on its length (but for the keys and values of softmax layers without a window). Rows of one length
    run together. One of another length runs by itself, so that no state ever sees padding.

    Args:
        model: of `lasp.models`, one that calls lasp's operators, or one of transformers, for whose own `generate` there
            is `lasp.library_inputs`. It is split by `lasp.parallelize`, or was never given to it and is on one rank.
            It runs in evaluation mode and is left as it was.
        ids: [B, T] of integers, the same on every rank; or of rows of different lengths a list of [T]; or [T].
        mesh: of `lasp.parallelize`; None is that with which the model was split, or one rank.
        attention_mask: [B, T], 0 where ids are padding, which is cut off, at the left or right end of a row.
        cu_seqlens: the offsets [N + 1] of prompts that are packed in one row of ids; each becomes a row of its own.
        pad_token_id: without attention_mask, tokens at both ends of rows that are padding.
        state: of the rows' earlier tokens, which ids go on from: the next turn of a chat. It is not changed.
        segment: tokens of a row that run at once, on all ranks together; None is 32,768 a rank, of all rows.
        to: the rank of the sequence that is to have the state, the others get None; None is all of them. One rank goes
            on with a model of these weights that is not split: with the split one `lasp.generate` waits for all ranks.

    Returns:
        The state, with the logits of each row's next token.

    Raises:
        TypeError, ValueError: an argument that does not fit, before any communication.
        RankMismatchError: ranks were given different prompts or options, or one of them failed; on every rank.
        PeerError: a rank has ended, or did not come within the timeout of its group.
        RuntimeError: a model that does not call its operators in every run alike.
    """
    sequence = sequence_of(model, mesh)
    with agreement_of(sequence, model, "prefill") as ranks_agree:
        runner = Runner(model, sequence, foreign=True)
        options = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens, "pad_token_id": pad_token_id}
        rows = checked_prompts(runner, ids, state, **options)
        step = None if segment is None else arguments.integer("segment", segment, at_least=1)
        if to is not None and arguments.integer("to", to, at_least=0) >= runner.sequence.size:
            raise ValueError(f"to must be one of the {runner.sequence.size} ranks of the sequence, got {to}")
        if runner.foreign:
            check_cache(runner)
        ranks_agree.settle(lambda: {"segment": segment, "to": to}, lambda: {"prompts": prompt_checksums(rows, state)})
    found = run_prompts(runner, rows, state, step)
    return found if to is None or to == runner.sequence.rank else None


def agreement_of(sequence: SequenceParallel, model: nn.Module, name: str) -> Agreement:
    """The agreement around the checks of a call. All calls are compared: a state of two prompts would be of none."""
    due = sequence.size > 1 and not (isinstance(model, nn.Module) and compares_nothing(model))
    return Agreement(sequence, due=due, before=name)


def compares_nothing(model: nn.Module) -> bool:
    """Whether it was split with validate="off"."""
    return any(split.sequence.validate == "off" for split in held_by(model))


def checked_prompts(
    runner: Runner,
    ids: Any,
    state: InferenceState | None,
    *,
    attention_mask: Any,
    cu_seqlens: Any,
    pad_token_id: Any,
) -> list[Tensor]:
    """The rows of ids; raises for what does not fit."""
    if pad_token_id is not None:
        arguments.integer("pad_token_id", pad_token_id)
    rows = prompts_of(
        ids,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        pad_token_id=pad_token_id,
        vocabulary=runner.vocabulary,
    )
    check_state(runner, state, len(rows))
    return rows


def check_state(runner: Runner, state: Any, rows: int | None) -> None:
    """Raise unless it is None or a state of the model, with so many rows."""
    if state is None:
        return
    if not isinstance(state, InferenceState):
        raise TypeError(
            f"state must be an InferenceState, of lasp.prefill or lasp.generate, got {arguments.shown(state)}"
        )
    state.check("state", runner.form, runner.device, rows)


def prompt_checksums(rows: list[Tensor], state: InferenceState | None) -> dict[str, str]:
    """The checksums of the prompts and the state, which ranks must hold alike."""
    found = {f"row {number}": row for number, row in enumerate(rows)}
    if state is not None:
        found |= {"state": state.logits, "lengths": torch.tensor(state.lengths)}
    return checksums(found)


@as_usual
def run_prompts(runner: Runner, rows: list[Tensor], state: InferenceState | None, step: int | None) -> InferenceState:
    """The state behind these rows, which were checked."""
    before = (0,) * len(rows) if state is None else state.lengths
    alike: dict[tuple[int, int], list[int]] = {}
    for number, (row, seen) in enumerate(zip(rows, before)):
        alike.setdefault((seen, row.numel()), []).append(number)
    found = [
        _run(runner, torch.stack([rows[n] for n in numbers]), None if state is None else state.select(numbers), step)
        for numbers in alike.values()
    ]
    if len(found) == 1:
        return found[0]
    order = [number for numbers in alike.values() for number in numbers]
    return InferenceState.join(found).select(sorted(range(len(rows)), key=order.__getitem__))


def _run(runner: Runner, ids: Tensor, state: InferenceState | None, step: int | None) -> InferenceState:
    """The state behind rows [B, T] of one length, from a state of rows of one length, which is changed."""
    (B, T), ranks, rank = ids.shape, runner.sequence.size, runner.sequence.rank
    before = 0 if state is None else state.lengths[0]
    step = max(1, _SEGMENT // B) * ranks if step is None else step
    session = Session({} if state is None else state.held, "lasp.prefill")
    session.room = before + T
    logits = None
    with runner.inside(session):
        for number, start in enumerate(range(0, T, step)):
            end = min(start + step, T)
            # Code of another library runs on no empty slice: then all tokens are on every rank.
            few = bool(runner.foreign) and end - start < ranks
            layout = ShardLayout((end - start,)) if few else ShardLayout.even(end - start, ranks)
            first, last = (start, end) if few else (start + x for x in layout.bounds(rank))
            session.begin_segment(Segment(number, before + start, before + end, layout, before + start, True))
            here = ids[:, first:last].to(runner.device)
            positions = torch.arange(before + first, before + last, device=runner.device).repeat(B, 1)
            holds_last = first < last == end and (not few or rank == ranks - 1)
            with alone() if few else contextlib.nullcontext():
                logits = runner.logits(here, positions, layout, last=holds_last)
            session.end()
        assert logits is not None
        logits = runner.of_last_rank(logits)
        seen = torch.zeros_like(logits, dtype=torch.bool) if state is None else state.seen
        for part in ids.split(step, 1):
            seen.scatter_(1, part.to(runner.device), True)
    return InferenceState(session.kept, (before + T,) * B, logits, seen, runner.form)
