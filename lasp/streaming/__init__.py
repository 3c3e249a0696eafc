"""`stream_backward`: forward and backward over a sequence longer than memory, segment by segment, and exact.

All that a model whose layers are split by lasp needs of earlier tokens is what its operators carry on: states, and the
last tokens before a convolution. So a step needs the memory of one segment only (docs/streaming.md):

    sweep       segment 0, 1, ... n-2: forward without autograd, which keeps what enters the next segment
    backward    segment n-1, ... 0: forward again, from what entered the segment, and backward, from the gradients of
                what left it to the gradients of what entered

Each segment is split over the ranks as a short sequence would be. Both forwards of a segment draw the same random
numbers. The loss of a segment is its part of the mean over all tokens (loss.py), so that gradients add up to those of
one pass. last_layer.py lets the model give the loss in place of its logits.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lasp import arguments
from lasp.adapters import border
from lasp.adapters.handles import Parallelized, check_ranks, held_by, under_way
from lasp.balance import BalanceOverSegments, routers_of
from lasp.batch import Whole, whole_batch
from lasp.calls import Caller
from lasp.checks import agreement
from lasp.checks.checksum import checksums
from lasp.checks.memory import bytes_of_training, free_bytes, measured
from lasp.checks.optimizers import refuse_steps_in_backward
from lasp.data_parallel.once import AveragedOnce
from lasp.layout import ShardLayout
from lasp.ops.stream import Content, Segment, Stream, wait_for_copies
from lasp.ranks import SequenceParallel, sequence_axis
from lasp.ranks.aside import uncounted
from lasp.streaming.last_layer import LastLayer
from lasp.streaming.loss import Loss, LossFunction, loss_maker


def stream_backward(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    mesh,
    segment: int | None = None,
    loss_fn: LossFunction | None = None,
    loss_scale: float | Tensor = 1.0,
    balance: float = 0.0,
    shift_labels: bool = True,
    ignore_index: int = -100,
    progress: bool = False,
    validate: str = "first",
) -> tuple[Tensor, Tensor]:
    """Forward and backward of the mean loss over a sequence of any length, in the memory of one segment.

    Gradients are left as `loss.backward()` leaves them: `sync_grads`, DDP or FSDP2, clipping and the optimizer follow
    as usual. They are exact. It takes one forward more than `loss.backward()`.

    Args:
        model: `parallelize` was called with it, on one rank too, and it may be wrapped in DDP or FSDP2 since.
        batch: as `shard_batch` takes it, whole on every rank of the sequence, also with packed documents. It may lie on
            the host, from where each segment goes to the device of the model.
        mesh: the whole mesh, `mesh["sp"]`, a ProcessGroup, or None for one rank.
        segment: tokens of a segment, of all ranks together; rounded up to a multiple of the ranks. The last may be
            shorter. None takes as many as fit: at the first call for a model, or with batches of another number of
            rows, short sequences are tried, to see what a token takes, and room is left for gradients and the moments
            of Adam.
        loss_fn: a function of what the model returns for this rank's slice of a segment and of its labels (already
            shifted), which returns the sum of the loss over the labels that count, and how many these are: at most
            those that are not `ignore_index`. (If there are more, that is a ValueError on every rank; on a GPU, where
            the host would have to wait to know it, loss and gradients are NaN.) It is called in both forwards. By
            default the cross entropy of the logits, `token_loss` of the whole: where the model gives what its last
            layer gave, the loss is taken there, and no logits are made (docs/streaming.md).
        loss_scale: gradients are those of this times the loss: 1 / n for the accumulation of n steps, or
            `scaler.get_scale()` of a GradScaler.
        balance: add so many times `lasp.balance_loss`, over all segments, of a model that has routers.
        shift_labels: False if the labels are already the next tokens.
        ignore_index: the label that the loss skips.
        progress: show a bar, on the first rank (needs tqdm).
        validate: "first" compares the batch and these options between the ranks of the sequence, at the first call and
            at every 1000th; "off" does not.

    Returns:
        The mean loss over all tokens of all ranks, the same on each, without a graph; and of how many tokens (int64).

    Raises:
        ValueError, TypeError: an argument that does not fit, before any communication; also a model that was not split.
        RankMismatchError: ranks were given different batches or options, or one of them failed; on every rank.
        PeerError: a rank has ended, or did not come within the timeout of its group.
        RuntimeError: operators are not called in every segment alike, or logits are made otherwise than at first.

    After any error the model's gradients are what they were before; those of what else a `loss_fn` holds may not be.
    """
    sequence = sequence_axis(mesh)
    with agreement.of_batch(sequence, validate=validate, before="stream_backward") as ranks_agree:
        streamed, whole = prepared(model, batch, sequence, shift_labels=shift_labels, ignore_index=ignore_index)
        streamed.set_balance(balance, mesh)
        step = None if segment is None else arguments.integer("segment", segment, at_least=1)
        scale = _scale(loss_scale)
        make_loss = loss_maker(loss_fn, ignore_index, mesh, scale)
        bar = _Bar(progress)
        options = {"segment": segment, "balance": balance, "shift_labels": shift_labels, "ignore_index": ignore_index}
        ranks_agree.settle(lambda: options, lambda: {agreement.BATCH: _batch_checksums(whole)})
    loss = make_loss()
    step = streamed.fitting(whole, make_loss) if step is None else step
    found = streamed.backward(whole, step, loss, bar)
    agreement.note_loss(scale if isinstance(scale, Tensor) else torch.tensor(scale))
    return found


def _told(segments: list[Segment], stream: Stream, of_loss: str) -> str:
    """What `explain` says of it."""
    longest = segments[0].end - segments[0].start
    return (
        f"streamed last: {segments[-1].end:,} tokens in {len(segments)} segments of {longest:,}; at a border "
        f"{stream.crossings} states or last tokens, {stream.bytes:,} bytes kept of all borders by this rank"
        + (f", and {stream.bytes_of_tokens:,} of keys and values" if stream.bytes_of_tokens else "")
        + f"; {of_loss}"
    )


def prepared(
    model: nn.Module,
    batch: Mapping[str, Any],
    sequence: SequenceParallel,
    *,
    shift_labels: bool = True,
    ignore_index: int = -100,
) -> tuple[StreamedModel, Whole]:
    """A model and a batch, looked through, for `StreamedModel.backward`; raises for what does not fit."""
    streamed = StreamedModel(model, _splits(model, sequence), sequence)
    whole = whole_batch(batch, seq_dim=1, shift_labels=shift_labels, ignore_index=ignore_index, read=True)
    if not whole.tokens:
        raise ValueError("batch must have tokens, got input_ids of 0")
    streamed.call.check({"layout", *(name for name, x in whole.values.items() if x is not None)})
    _refuse_padding(streamed, whole)
    return streamed, _without_idle_mask(model, whole)


def _refuse_padding(streamed: StreamedModel, whole: Whole) -> None:
    """Raise if tokens would see padding before them, of which the model is not told."""
    mask = whole.values.get("attention_mask")
    if mask is None or streamed.call.takes("attention_mask") or whole.offsets is not None:
        return
    real = mask != 0
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ValueError(
            "attention_mask has padding before tokens, which would see it, since the forward of "
            f"{streamed.call.name} takes no mask: pad behind the tokens, or let forward take an attention_mask"
        )


def _without_idle_mask(model: nn.Module, whole: Whole) -> Whole:
    """Without an attention_mask that masks nothing, as far as the host knows it: with one, softmax layers would not
    take their flash kernels. (A model of somebody else's takes none, too.)"""
    mask = whole.values.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.device.type != "cpu" or not border.stands_before(model) or not mask.all():
        return whole
    return whole._replace(values={name: x for name, x in whole.values.items() if name != "attention_mask"})


# Arguments


def _splits(model: nn.Module, sequence: SequenceParallel) -> list[Parallelized]:
    splits = held_by(arguments.module("model", model))
    if not splits:
        raise ValueError(
            f"model must be one that lasp.parallelize was called with, on one rank too, got a {type(model).__name__} "
            "that was not: call lasp.parallelize(model, mesh['sp']) before (copies are made before that, too)"
        )
    check_ranks(splits, sequence)
    return splits


def _scale(value: Any) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"loss_scale must be a number, or a tensor of one, got {arguments.shown(value)}")
        return value.detach().reshape(())
    return arguments.number("loss_scale", value)


def _batch_checksums(whole: Whole) -> dict[str, str]:
    """The checksums of what ranks must hold alike."""
    tensors = {name: x for name, x in whole.values.items() if whole.dims[name] is not None}
    if whole.offsets is not None:
        tensors["cu_seqlens"] = torch.tensor(whole.offsets)
    return checksums(tensors)


def cut(tokens: int, offsets: tuple[int, ...] | None, step: int, ranks: int) -> list[Segment]:
    """Of so many tokens, with packed documents at these offsets, segments of `step`, rounded up to a multiple of the
    ranks."""
    step = -(-step // ranks) * ranks
    starts = range(0, tokens, step)
    before = [
        start if offsets is None else start - offsets[bisect.bisect_right(offsets, start) - 1] for start in starts
    ]
    found = []
    for number, (start, following) in enumerate(itertools.zip_longest(starts, before[1:], fillvalue=0)):
        end = min(start + step, tokens)
        padding = -(end - start) % ranks  # of the last one alone
        documents = None
        if offsets is not None:
            inner = offsets[bisect.bisect_right(offsets, start) : bisect.bisect_left(offsets, end)]
            documents = tuple(x - start for x in sorted({start, *inner, end}))
        layout = ShardLayout(ShardLayout.even(end - start + padding, ranks).lengths, documents, padding)
        found.append(Segment(number, start, end, layout, before[number], following > 0))
    return found


# The segments, one after the other


class StreamedModel:
    """A model that goes over the segments of a sequence."""

    def __init__(self, model: nn.Module, splits: list[Parallelized], sequence: SequenceParallel):
        self.model, self.splits, self.sequence = model, splits, sequence
        self.call = Caller(model, ask="or put it into the batch")
        self.device = next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.averaged = AveragedOnce(model)
        self._balance_loss, self._balance_mesh = 0.0, None  # how many times it is added, over which ranks
        refuse_steps_in_backward(
            model,
            "it would be called after each segment, and step with a part of the gradient. Step after "
            "lasp.stream_backward, or wrap the model by FSDP2, which calls hooks once",
            but=self.averaged.once,
        )

    def set_balance(self, times: float, mesh: Any) -> None:
        """Add the balance of the model's routers to the loss, so many times."""
        if arguments.number("balance", times):
            routers_of(self.model)  # raises if there are none
        self._balance_loss, self._balance_mesh = times, mesh

    def backward(self, whole: Whole, step: int, loss: Loss, bar: _Bar | None = None) -> tuple[Tensor, Tensor]:
        """Leave the gradients of a loss over segments of `step` tokens; returns its mean, and of how many tokens."""
        self._over_segments(whole, step, loss, bar or _Bar(False), trial=False)
        assert loss.found is not None
        return loss.found

    def _over_segments(self, whole: Whole, step: int, loss: Loss, bar: _Bar, *, trial: bool) -> None:
        """A `trial` leaves nothing, and averages nothing."""
        self.whole, self.loss, self.trial = whole, loss, trial
        self.segments = cut(whole.tokens, whole.offsets, step, self.sequence.size)
        offsets = whole.offsets or (0, whole.tokens)
        longest = max(end - start for start, end in itertools.pairwise(offsets)) + self.segments[-1].layout.padding
        largest = functools.cache(lambda: int(whole.values["position_ids"].max()))
        self.stream = Stream(self.segments, longest, largest)
        loss.labels = torch.cat([self._cut(x)["labels"].flatten() for x in self.segments])
        self._random: list[_Random] = []
        self._balanced = None
        if self._balance_loss:
            self._balanced = BalanceOverSegments(self.model, self._balance_mesh, loss.group, loss.ranks)
        split = self.splits[0]
        self.last_layer = None
        if loss.ignores is not None:
            inner = self.averaged.without_backward
            self.last_layer = LastLayer(self.model, inner, split.last_layer, loss.ignores)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(_gradients_kept(self.model))
                for split in self.splits:
                    stack.enter_context(split.with_ranks())
                stack.enter_context(under_way(self.stream, self.splits, self.model))
                stack.enter_context(self.averaged.step())
                if self.last_layer is not None:
                    stack.enter_context(self.last_layer.step())
                stack.enter_context(bar.over(2 * len(self.segments) - 1))
                self._sweep(bar)
                self._back(bar)
                if trial:
                    raise _Tried
                loss.found = loss.mean()  # here, where an error in it leaves gradients as they were
        except _Tried:
            return
        finally:
            if self.last_layer is not None:
                split.last_layer = self.last_layer.finding
        of_loss = "all logits of a segment are made, for loss_fn"
        if self.last_layer is not None and self.last_layer.finding is not None:
            of_loss = self.last_layer.finding.told
        for each in self.splits:
            each.streamed = _told(self.segments, self.stream, of_loss)

    def fitting(self, whole: Whole, make_loss: Callable[[], Loss]) -> int:
        """The most tokens of a segment for which there is memory, the same on all ranks of the sequence.

        All ranks over which gradients are averaged come here together: FSDP2 gathers weights in a trial.
        """
        ranks, kept = self.sequence.size, self.splits[0].fitting
        few, more = (n * ranks for n in _TRIED)
        of_loss = make_loss()
        kind = self._kind_of_step(whole, of_loss)
        known = kept.get(kind)
        stale = known is None or (known.tokens > _STEP * ranks and known.bytes > free_bytes(self.device, ranks))
        longest, untried = of_loss.greatest(whole.tokens, int(stale))
        if longest <= more:
            return whole.tokens
        if untried:
            kept[kind] = self._most(whole, few, more, make_loss)
        return min(kept[kind].tokens, whole.tokens)

    def _kind_of_step(self, whole: Whole, loss: Loss) -> tuple:
        """What a token's memory depends on, as far as it is seen here."""
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        recomputes = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        parameters = Counter((p.dtype, p.requires_grad) for p in self.model.parameters())
        rows = whole.values["input_ids"].numel() // whole.tokens
        of_model = self.model.training, recomputes, frozenset(parameters.items())
        return rows, whole.offsets is None, autocast, of_model, type(loss)

    def _most(self, whole: Whole, few: int, more: int, make_loss: Callable[[], Loss]) -> Fitting:
        lengths, used = [min(few, whole.tokens), min(more, whole.tokens)], []
        random = _Random(self.device)
        with uncounted():  # the first one is not measured: what is made once, as logits before the last layer is known
            self._over_segments(_first(whole, lengths[0]), lengths[0], make_loss(), _Bar(False), trial=True)
            for length in lengths:
                with measured(self.device) as peak:
                    self._over_segments(_first(whole, length), length, make_loss(), _Bar(False), trial=True)
                used.append(peak.bytes)
        random.restore()
        ranks = self.sequence.size
        tokens = [-(-length // ranks) for length in lengths]
        local, of_token, fixed = _NO_LIMIT, 0.0, 0.0
        if tokens[1] > tokens[0]:
            of_token = max(1.0, (used[1] - used[0]) / (tokens[1] - tokens[0]))
            fixed = max(0.0, used[0] - of_token * tokens[0])
            room = _SHARE * free_bytes(self.device, ranks) - fixed - bytes_of_training(self.model.parameters())
            local = int(room / of_token) // _STEP * _STEP
        local = make_loss().least(max(_STEP, local))
        return Fitting(local * ranks, fixed + of_token * local)

    def _cut(self, segment: Segment) -> dict[str, Any]:
        first, last = segment.layout.bounds(self.sequence.rank)
        return self.whole.of_segment(segment.start + first, segment.start + last)

    def _local(self, segment: Segment) -> dict[str, Any]:
        """This rank's slice of it, on the model's device."""
        found = {
            name: x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x
            for name, x in self._cut(segment).items()
        }
        return {**found, "layout": segment.layout}

    def _sweep(self, bar: _Bar) -> None:
        """Forward over all but the last, for what enters the next."""
        with torch.no_grad():
            for segment in self.segments[:-1]:
                self._random.append(_Random(self.device))
                output, of_loss, labels = self._forward(self.averaged.without_backward, segment, sweeping=True)
                self.loss.look(of_loss, labels)
                if self._balanced is not None:
                    self._balanced.look()
                del output, of_loss  # logits, beside which the next would lie
                bar.step()

    def _back(self, bar: _Bar) -> None:
        """Forward and backward, from the last to the first."""
        after = None
        wait_for_copies(self.device)
        for segment in reversed(self.segments):
            if segment.number < len(self._random):
                self._random.pop().restore()
            last = segment.number == 0 and not self.trial
            with self.averaged.part(last=last), torch.enable_grad():
                output, of_loss, labels = self._forward(self.model, segment, sweeping=False)
                after = after or _Random(self.device)  # that of the last segment: as after one pass
                part = self.loss.part(of_loss, labels)
                if (balance := self._balance(output)) is not None:
                    part = part + self.loss.beside(balance)
                if self._balanced is not None:
                    part = part + self.loss.beside(self._balance_loss * self._balanced.part())
                del output, of_loss, balance
                with torch.autocast(self.device.type, enabled=False):
                    part.backward()
            self.stream.end_backward()
            bar.step()
        assert after is not None
        after.restore()

    def _forward(self, model: nn.Module, segment: Segment, *, sweeping: bool) -> tuple[Any, Any, Tensor]:
        """What the model gives, what of that the loss is given, and the labels."""
        local = self._local(segment)
        if self.last_layer is not None:
            self.last_layer.begin(local["labels"], sweeping=sweeping)
        self.stream.begin(segment, sweeping=sweeping)
        torch.clear_autocast_cache()  # copies of weights, which else would live until the caller's context ends
        output = self.call(model, local)
        self.stream.end_forward()
        taken = None if self.last_layer is None else self.last_layer.result(output)
        return output, output if taken is None else taken, local["labels"]

    def _balance(self, output: Any) -> Tensor | None:
        """The router's load-balancing loss, if the model gives one: its part of that over all segments."""
        given = getattr(output, "aux_loss", None)
        if given is None:
            return None
        coefficients = [m.router_aux_loss_coef for m in self.model.modules() if hasattr(m, "router_aux_loss_coef")]
        if not self.stream.has_sums or not coefficients:
            raise ValueError(
                f"{type(self.model).__name__} returns an aux_loss that lasp does not know: over segments it may be "
                "another; leave it out (output_router_logits=False), or take it into loss_fn"
            )
        return coefficients[0] * given


# For a segment that fits: tokens a rank of two trials, how much of the free memory may be taken, and what is rounded to
_TRIED, _SHARE, _STEP, _NO_LIMIT = (256, 1024), 0.85, 256, 2**40


class Fitting(NamedTuple):
    """A segment for which there is memory."""

    tokens: int  # of all ranks
    bytes: float  # that it takes on this rank, beside what is there for good


class _Tried(Exception):
    """The end of a trial, after which gradients are what they were."""


def _first(whole: Whole, tokens: int) -> Whole:
    offsets = whole.offsets and (*(x for x in whole.offsets if x < tokens), tokens)
    return whole._replace(values=whole.cut(0, tokens), tokens=tokens, offsets=offsets)


class _Bar:
    """The progress of the process with the first rank, in forwards."""

    def __init__(self, shown: Any):
        self._bar: Any = None
        self._tqdm: Any = None
        if arguments.flag("progress", shown):
            try:
                from tqdm.auto import tqdm
            except ImportError as error:
                raise ImportError("progress=True needs tqdm: pip install tqdm") from error
            self._tqdm = tqdm

    @contextlib.contextmanager
    def over(self, total: int) -> Iterator[None]:
        """A context inside which the bar is shown."""
        if self._tqdm is None or (dist.is_initialized() and dist.get_rank() != 0):
            yield
            return
        with self._tqdm(total=total, unit="segment", desc="stream_backward", leave=False) as self._bar:
            yield
        self._bar = None

    def step(self) -> None:
        """One forward more. (On a GPU what was queued may still run.)"""
        if self._bar is not None:
            self._bar.update()


class _Random:
    """PyTorch's generators as they are now."""

    def __init__(self, device: torch.device):
        self._device = device
        self._host = torch.get_rng_state()
        self._own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Go back to these states, to draw the same once more."""
        torch.set_rng_state(self._host)
        if self._own is not None:
            torch.cuda.set_rng_state(self._own, self._device)


@contextlib.contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """After an error inside, the gradients are what they were; what is accumulated already is copied to the host.

    (They cannot be set aside meanwhile: DDP averages what earlier backwards have added up with its last one.)
    """
    before = [(p, p.grad, None if p.grad is None else Content(_own(p.grad))) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for p, gradient, content in before:
            p.grad = gradient
            if content is not None:
                content.put_back()
        raise


def _own(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
