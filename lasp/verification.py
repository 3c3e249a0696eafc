"""`verify`: is the split model the whole one? Logits, loss and every gradient, on the ranks that will train."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
import types
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lasp import adapters, arguments
from lasp.api import parallelize
from lasp.batch import shard_batch
from lasp.calls import Caller, logits_of
from lasp.checks.agreement import Agreement
from lasp.checks.checksum import checksums
from lasp.checks.optimizers import refuse_steps_in_backward
from lasp.checks.untouched import buffers_kept, first_layers, in_dtype, keep_all, longest_list, random_state, untouched
from lasp.checks.use import is_split
from lasp.layout import ShardLayout
from lasp.loss import token_loss
from lasp.ranks import (
    PeerError,
    RankMismatchError,
    SequenceParallel,
    alone,
    axis_groups,
    sequence_axis,
    uncounted,
    waiting,
)

Batch = Mapping[str, Any]

# By the coarsest arithmetic: the difference allowed, as a part of the largest entry. Split and whole add the same
# numbers in another order, so they differ by some units in the last place of what is added; a mistake at the border of
# two ranks is of the order of one token among all. Worst of TNL and LinearTransformer with 4 and 24 layers, 203 tokens
# on 2 CPU ranks: 4e-9 in fp64 (2e-15 but for angles, which a TNL has in fp32), 4e-6 in fp32, 2e-2 in bf16. For fp64
# there is room for what many models compute in fp32 whatever their dtype: norms, angles, softmax.
TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
# A gradient that is zero by mathematics, such as that of a key's bias under softmax, is what rounding leaves of large
# numbers. So no largest entry counts for less than this part of that of all gradients.
_LEAST = {"float64": 0.1, "float32": 0.01, "tf32": 1.0, "float16": 1.0, "bfloat16": 1.0}
_COARSE = 1e-2  # a tolerance that hides a wrong token among hundreds
_TOKENS = 101  # a rank, of random ones: more than a tile of the kernels, and no multiple of anything
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")


@dataclass(frozen=True)
class Difference:
    """Split against whole in one tensor, the worst of all ranks."""

    name: str
    largest: float  # absolute entry of the whole
    difference: float  # largest absolute one, as a part of `largest`, or of some part of the largest gradient of all
    # parameters where that is more (see `_LEAST`); infinite if anything was not finite


@dataclass(frozen=True)
class Verification:
    """What `verify` found; the same on every rank. True where a condition is asked for if all is `ok`."""

    ranks: int
    shape: tuple[int, ...]  # of the tokens, [B, T]
    arithmetic: str  # "float64", "float32", "tf32", "float16" or "bfloat16"
    tolerance: float
    split_loss: float
    whole_loss: float
    rows: tuple[Difference, ...]  # the loss, the logits, and the gradient of every parameter that has one

    @property
    def wrong(self) -> list[Difference]:
        """What differs by more than the tolerance."""
        return [row for row in self.rows if not row.difference <= self.tolerance]

    @property
    def ok(self) -> bool:
        """Whether the split model computes what the whole one does."""
        return not self.wrong

    @property
    def not_reached(self) -> list[str]:
        """Parameters whose gradient is zero in both, about which nothing was shown."""
        return [row.name for row in self.rows[2:] if row.largest == row.difference == 0]

    def worst(self, count: int = 10) -> list[Difference]:
        """The parameters whose gradients differ most."""
        return sorted(self.rows[2:], key=lambda row: -row.difference)[:count]

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        B, T = self.shape
        if self.ranks == 1:
            return f"one rank: nothing is split, and nothing to verify (loss {self.whole_loss:.6f})"
        loss, logits = self.rows[:2]
        rows = [("", "largest", "difference"), (f"loss ({self.split_loss:.8f} split)", *_cells(loss))]
        rows += [("logits", *_cells(logits))]
        rows += [(f"gradient of {row.name}", *_cells(row)) for row in self.worst()]
        width = max(len(row[0]) for row in rows)
        lines = [f"{row[0]:<{width}}  {row[1]:>11}  {row[2]:>10}" for row in rows]
        if (more := len(self.rows) - 2 - len(self.worst())) > 0:
            lines.append(f"and {more} gradients that differ less")
        if self.not_reached:
            lines.append(f"no gradient came to, so nothing is shown about: {_in_short(self.not_reached)}")
        of_all = f"of {len(self.rows)} tensors (loss, logits, gradients)"
        verdict = f"{self.ranks} ranks compute what one does: none {of_all} differs by more than {self.tolerance:.0e}"
        if not self.ok:
            verdict = f"WRONG: {len(self.wrong)} {of_all} differ by more than {self.tolerance:.0e} of the largest entry"
        elif self.tolerance >= _COARSE:
            lines.append(f"a mistake of less than {self.tolerance:.0%} would not show: dtype=torch.float32 is sharper")
        head = f"{self.ranks} ranks against one: {B} x {T} tokens, {self.arithmetic}, worst of all ranks"
        return "\n".join([head, *lines, verdict])


def _cells(row: Difference) -> tuple[str, str]:
    return f"{row.largest:.4g}", f"{row.difference:.1e}"


def _in_short(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def verify(
    model: nn.Module,
    mesh,
    batch: Batch | None = None,
    *,
    forward: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None,
    tokens: int | None = None,
    layers: int | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Verification:
    """Compare the model split over the ranks with the whole model on each of them: logits, loss and every gradient.

    All ranks of the mesh call it, before `parallelize` or after it, also after `torch.compile`, activation
    checkpointing, DDP and FSDP2: then what these do to the gradients is part of what is compared. The whole is the same
    weights with all tokens on every rank, without any exchange and without `torch.compile`; before `parallelize` it is
    the model itself, against a copy with the same weights that is split. Layers that drop at random do not; all others
    are in the mode that they are in. Hooks are called, of forward and of backward, in the run of the split model and in
    that of the whole one; what they keep or write of these stays. It takes a forward and a backward of the whole model
    on each rank, and memory for its gradients twice; afterwards all else is what it was.

    Args:
        model: returns logits [B, T, vocabulary], or an object, mapping or tuple that has them as `logits` or as its
            first. It is called with `input_ids` first, and what else of the batch its forward names, but not `labels`.
        mesh: the whole mesh, `mesh["sp"]`, a ProcessGroup, or None. The worst of all ranks of the mesh counts.
        batch: as `lasp.shard_batch` takes it, whole on every rank of the sequence, also with `cu_seqlens`. By default
            2 sequences of random tokens, the same on all ranks.
        forward: calls a model that is called otherwise: a function of the model and this rank's slice of the batch,
            which always holds "layout", to the logits.
        tokens: length of the random sequences; by default 101 a rank and one more, or as many as the model allows.
        layers: take only so many of its blocks, the first of its longest `ModuleList`, where no DDP or FSDP2 holds it.
        dtype: compute in this one, e.g. torch.float64, which shows mistakes that bf16 hides; likewise.
        tolerance: the difference allowed, as a part of the largest entry of a tensor; by default by the coarsest
            dtype of weights and logits: fp64 1e-6, fp32 1e-4, TF32 and fp16 1e-2, bf16 5e-2.
        options: of `lasp.parallelize` (plan, strict, exchange, ...), before it was called.

    Returns:
        What was found, the same on every rank: `ok`, and a table when printed, which names parameters that no gradient
        came to, about which nothing was shown. For one rank nothing is compared.

    Raises:
        ValueError, TypeError: an argument that does not fit, before any communication; a model whose logits have
            another shape; a model that draws random numbers, which split and whole cannot share: call `model.eval()`.
        RankMismatchError: ranks called it with something else, or one of them failed with one of the above, or in
            `forward` or in the model; on every rank.
        PeerError: a rank did not come within the timeout of the group.
    """
    axis = sequence_axis(mesh)

    def prepare() -> tuple[Batch, Callable, dict[str, Any]]:
        _check(model, axis, forward, layers, dtype, tolerance, options)
        taken = _random_batch(model, axis, tokens) if batch is None else _on_device(batch, tokens, model)
        whole = shard_batch(taken, None)
        return taken, _caller(model, whole) if forward is None else forward, whole

    def alike(found: tuple[Batch, Callable, dict[str, Any]]) -> dict[str, object]:
        return _fingerprint(model, found[2]["input_ids"], layers, dtype, tolerance)

    def split() -> nn.Module:
        return model if is_split(model) else parallelize(_same_weights(model), mesh, **options)

    batch, call, whole = _on_all_ranks(axis, prepare, alike)
    with torch.enable_grad(), untouched(model), uncounted(), first_layers(model, layers), in_dtype(model, dtype):
        local = _slice(batch, whole, axis)
        keep_all(model)
        random = random_state()
        if forward is not None:
            _on_all_ranks(axis, lambda: _call_up_to_the_model(call, model, local))
        with buffers_kept(model):  # the whole begins with the same
            of_split = _run_split(model, split, call, local, axis)
        of_whole = _run_whole(model, call, whole, axis)
        drawn = not all(map(torch.equal, random, random_state()))
        return _compare(of_split, of_whole, model, local["layout"], axis, drawn, tolerance)


@contextlib.contextmanager
def _of_its_library(model: nn.Module) -> Iterator[None]:
    """A context around what runs a model's own code: its error says whose it is."""
    try:
        yield
    except RuntimeError as error:
        libraries = adapters.libraries_of(model)
        if not libraries or isinstance(error, (*_KNOWN, torch.OutOfMemoryError)):
            raise
        more = "".join(f"; {text}" for text in adapters.on_one_rank(model))
        raise RuntimeError(
            f"the whole model runs its library's own code ({', '.join(libraries)}) on one rank, which failed: "
            f"{error}. "
            "That says nothing of the split one, in which lasp's operators take the place of the library's kernels "
            f"along the sequence{more}"
        ) from error


Found = TypeVar("Found")
_KNOWN = (PeerError, RankMismatchError)  # what all ranks of the sequence have, if one of them has it


def _on_all_ranks(
    axis: SequenceParallel, step: Callable[[], Found], alike: Callable[[Found], Mapping[str, object]] = lambda _: {}
) -> Found:
    """What `step` gives, once it is done on every rank of the mesh; its error on one of them is an error on all.

    Others may wait for that rank in the first call of a layer, where they hear of it, or come here. `alike` says what
    must be the same on all ranks of the sequence.
    """
    found, failure = None, None
    try:
        found = step()
    except Exception as error:
        failure = error
    others = [SequenceParallel(group) for group in axis_groups(axis.mesh) if group is not axis.group]
    if axis.size > 1 and not isinstance(failure, _KNOWN):
        others.insert(0, axis)
    for ranks in others:
        try:
            with Agreement(ranks, due=True) as ranks_agree:
                if failure is not None:
                    raise failure
                ranks_agree.settle(lambda ranks=ranks: alike(found) if ranks is axis else {})  # type: ignore[arg-type]
        except Exception as error:
            failure = failure if isinstance(failure, _KNOWN) else error
    if failure is not None:
        raise failure
    return found  # type: ignore[return-value]


class _Reached(BaseException):
    """The model was called, which is all that `forward` is run for at first. No error, so that nobody's
    `except Exception` takes it for one."""


def _call_up_to_the_model(call: Callable, model: nn.Module, batch: dict[str, Any]) -> None:
    """What the user's function does before any module runs, and so before any rank could wait for another in it."""

    def stop(*_: object) -> None:
        raise _Reached

    handles = [module.register_forward_pre_hook(stop, prepend=True) for module in model.modules()]
    try:
        with torch.compiler.set_stance("force_eager"), suppress(_Reached):
            call(model, dict(batch))
    finally:
        for handle in handles:
            handle.remove()


def _check(model, axis: SequenceParallel, forward, layers, dtype, tolerance, options: Mapping[str, Any]) -> None:
    """Raise where an argument does not fit."""
    arguments.module("model", model)
    if forward is not None:
        arguments.function("forward", forward)
    if any(x.is_meta for x in (*model.parameters(), *model.buffers())):
        raise ValueError(f"this {type(model).__name__} has no weights yet (device meta): verify a smaller one")
    trained = [p.requires_grad for p in model.parameters()]
    if trained and not any(trained):
        raise ValueError(f"no parameter of this {type(model).__name__} is trained, so that there is nothing to verify")
    refuse_steps_in_backward(
        model, "lasp.verify runs two backwards, and a step in them would change the weights. Verify before it is there"
    )
    wrapped = next((m for m in model.modules() if isinstance(m, (DistributedDataParallel, FSDPModule))), None)
    for name, value in (("layers", layers), ("dtype", dtype)):
        if value is not None and wrapped is not None:
            raise ValueError(f"{name}={value} is for a model that is not wrapped yet, got {type(wrapped).__name__}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {arguments.shown(dtype)}")
    if layers is not None:
        blocks = longest_list(model)
        if blocks is None:
            raise ValueError(
                f"layers={arguments.shown(layers)} needs a model with a ModuleList, and {type(model).__name__} has none"
            )
        _check_integer("layers", layers, 1, len(blocks))
    if tolerance is not None:
        arguments.number("tolerance", tolerance, positive=True)
    if is_split(model):
        if options:
            raise ValueError(f"{sorted(options)} are options of parallelize, but this model is parallelized already")
        for path, module in model.named_modules():
            held = getattr(module, "sequence", None)
            if isinstance(held, SequenceParallel) and held.ranks != axis.ranks:
                raise ValueError(f"{path} is split over the ranks {held.ranks}, but the mesh has {axis.ranks}")
        return
    for path, module in model.named_modules():
        if isinstance(vars(module).get("forward"), types.FunctionType):
            raise ValueError(
                f"the forward of {path or 'the model itself'} was replaced by a function, which a copy of the model "
                "would share with the original: call parallelize first, then verify"
            )
    if unknown := set(options) - set(inspect.signature(parallelize).parameters):
        raise TypeError(f"verify takes the options of parallelize, and {sorted(unknown)} are none of these")
    if wrapped is not None:
        raise ValueError(
            f"this model is wrapped in {type(wrapped).__name__} and not parallelized: call parallelize first, "
            "then DDP or FSDP2"
        )


def _check_integer(name: str, value: object, low: int, high: float) -> None:
    if not low <= arguments.integer(name, value) <= high:
        raise ValueError(f"{name} must be an integer of at least {low} and at most {high}, got {value}")


def _fingerprint(
    model: nn.Module, ids: Tensor, layers: int | None, dtype: torch.dtype | None, tolerance: float | None
) -> dict[str, object]:
    """What must be the same on all ranks."""
    parameters = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    whole = {name: p for name, p in model.named_parameters() if not isinstance(p, DTensor)}
    values = zlib.crc32(repr(checksums(whole)).encode())
    return {
        "model": [type(model).__name__, len(parameters), f"checksum {zlib.crc32(repr(parameters).encode()):08x}"],
        "values of the weights (seed before the model is built)": f"checksum {values:08x}",
        "input_ids": [*ids.shape, f"checksum {zlib.crc32(ids.cpu().contiguous().numpy().tobytes()):08x}"],
        "parallelized": is_split(model),
        "layers": layers,
        "dtype": str(dtype),
        "tolerance": None if tolerance is None else float(tolerance),
    }


# What goes in


def _device(model: nn.Module) -> torch.device:
    return next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _on_device(batch: Batch, tokens: int | None, model: nn.Module) -> dict[str, Any]:
    if tokens is not None:
        raise ValueError(f"tokens={tokens!r} is the length of random sequences, but a batch is given")
    arguments.mapping("batch", batch)
    device = _device(model)
    kept = {"cu_seqlens"}  # read on the host
    return {name: x.to(device) if isinstance(x, Tensor) and name not in kept else x for name, x in batch.items()}


def _random_batch(model: nn.Module, axis: SequenceParallel, tokens: int | None) -> dict[str, Tensor]:
    most = _most_positions(model)
    length = int(min(_TOKENS * axis.size + 1, most)) if tokens is None else tokens
    _check_integer("tokens", length, max(2, axis.size), most)
    draw = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(_vocabulary(model), (2, length), generator=draw).to(_device(model))}


def _slice(batch: Batch, whole: dict[str, Any], axis: SequenceParallel) -> dict[str, Any]:
    """This rank's, without padding; both get the layouts that their calls are given."""
    whole["layout"] = whole.get("layout") or ShardLayout((whole["input_ids"].shape[1],))
    local = shard_batch(batch, axis, pad=False)
    local["layout"] = ShardLayout.even(whole["layout"].total, axis.size, cu_seqlens=whole["layout"].cu_seqlens)
    return local


def _vocabulary(model: nn.Module) -> int:
    """How many tokens there are; those of the first embedding, if no configuration says."""
    for module in model.modules():
        size = getattr(getattr(module, "config", None), "vocab_size", None)
        if isinstance(size, int):
            return size
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is None:
        raise ValueError(
            f"{type(model).__name__} has neither config.vocab_size nor an nn.Embedding, so that random tokens cannot "
            "be made for it: pass batch"
        )
    return embedding.num_embeddings


def _most_positions(model: nn.Module) -> float:
    """The longest sequence of which the model knows the positions."""
    found = [
        module.num_embeddings
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"pos|wpe", path.rpartition(".")[2], re.IGNORECASE)
    ]
    found += [getattr(getattr(m, "config", None), "max_position_embeddings", None) for m in model.modules()]
    return min((n for n in found if isinstance(n, int)), default=math.inf)


def _caller(model: nn.Module, whole: dict[str, Any]) -> Callable[[nn.Module, dict[str, Any]], Tensor]:
    call = Caller(model, ask="put it into the batch, or pass forward")
    call.check({name for name, x in whole.items() if x is not None})
    return lambda called, batch: logits_of(call(called, batch))


def _same_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules and buffers with the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


# What comes out


@dataclass(frozen=True)
class _Run:
    """One forward and backward."""

    logits: Tensor  # [B, T, vocabulary]
    loss: Tensor
    gradients: dict[str, Tensor | None]  # by the parameter's name


def _run_split(
    model: nn.Module, split: Callable[[], nn.Module], call: Callable, local: dict[str, Any], axis: SequenceParallel
) -> _Run:
    """Run this rank's slice. All ranks have come out of the forward before one begins with what follows."""

    def mean_of_all_ranks(*given: Tensor) -> Tensor:
        return token_loss(*given, mesh=axis.group)[0]

    logits = _on_all_ranks(axis, lambda: _forward(split(), call, local))
    run = _backward(logits, local["labels"], model, mean_of_all_ranks)
    _average(run.gradients, model, axis)
    return run


def _run_whole(model: nn.Module, call: Callable, whole: dict[str, Any], axis: SequenceParallel) -> _Run:
    """Run all tokens on this rank."""

    @contextlib.contextmanager
    def as_one_rank() -> Iterator[None]:
        # Packed documents are split by what stands in the model; its library may let them run into each other.
        came = contextlib.nullcontext() if whole["layout"].packed else adapters.as_it_came(model)
        with alone(), came, _of_its_library(model):
            yield

    def logits_of_whole() -> Tensor:
        with as_one_rank():
            return _forward(model, call, whole)

    logits = _on_all_ranks(axis, logits_of_whole)
    with as_one_rank():
        return _backward(logits, whole["labels"], model, _mean_of_one_rank)


def _forward(called: nn.Module, call: Callable, batch: dict[str, Any]) -> Tensor:
    """The logits of a model; raises unless they have the shape of its tokens."""
    labels = batch["labels"]
    logits = call(called, dict(batch))
    if not isinstance(logits, Tensor) or logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        expected = f"logits [B, T, vocabulary] of {tuple(labels.shape)} tokens"
        raise ValueError(f"the model must return {expected}, got {found}; for one that does otherwise pass forward")
    return logits


def _backward(logits: Tensor, labels: Tensor, model: nn.Module, loss_of: Callable) -> _Run:
    """Run backward through a model that has the parameters of `model`."""
    loss = loss_of(logits, labels)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = None
    return _Run(logits.detach(), loss.detach(), gradients)


def _mean_of_one_rank(logits: Tensor, labels: Tensor) -> Tensor:
    exact = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, labels.flatten(), reduction="sum") / (labels != -100).sum().clamp(min=1)


@torch.no_grad()
def _average(gradients: dict[str, Tensor | None], model: nn.Module, axis: SequenceParallel) -> None:
    """Average gradients over the ranks of the sequence, in place, where neither DDP nor FSDP2 has done it."""
    if axis.size == 1:
        return
    done = {
        id(p)
        for m in model.modules()
        for p in m.parameters()
        if isinstance(m, DistributedDataParallel) or (isinstance(m, FSDPModule) and isinstance(p, DTensor))
    }
    for name, p in model.named_parameters():
        if name not in gradients or id(p) in done:
            continue
        mine = _entries(gradients[name], p).clone()
        with waiting("verify: the sum of the gradients of all ranks"):
            dist.all_reduce(mine, group=axis.group)
        gradients[name] = mine / axis.size


def _entries(gradient: Tensor | None, p: Tensor) -> Tensor:
    """This rank's entries of a gradient, dense, in fp32 or fp64; zeros where there is none."""
    x = p.detach().new_zeros(p.shape) if gradient is None else gradient
    x = x.to_local() if isinstance(x, DTensor) else x
    x = x.to_dense() if x.is_sparse else x
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def _compare(
    split: _Run,
    whole: _Run,
    model: nn.Module,
    layout: ShardLayout,
    axis: SequenceParallel,
    drawn: bool,
    tolerance: float | None,
) -> Verification:
    """Compare split and whole, and take the worst of all ranks."""
    start, end = layout.bounds(axis.rank)
    names, pairs = ["loss", "logits"], [(split.loss, whole.loss), (split.logits, whole.logits[:, start:end])]
    for name, p in model.named_parameters():
        if name in whole.gradients:
            names.append(_WRAPPERS.sub("", name).lstrip("."))
            pairs.append((_entries(split.gradients[name], p), _entries(whole.gradients[name], p)))
    found = [torch.stack([_largest(a.double() - b.double()), _largest(b)]) for a, b in pairs]
    found.append(torch.full_like(found[0], float(drawn)))
    # NaN would vanish in a maximum, so it travels as infinity.
    numbers = torch.stack(found).nan_to_num(nan=math.inf, posinf=math.inf)
    for group in axis_groups(axis.mesh):
        with waiting("verify: the comparison of all ranks"):
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
    *values, (drawn_anywhere, _) = numbers.tolist()
    if drawn_anywhere:
        raise ValueError(
            "the model draws random numbers, and split and whole cannot draw the same; call model.eval() before verify"
        )
    arithmetic = _arithmetic(model, whole.logits)
    tolerance = TOLERANCE[arithmetic] if tolerance is None else float(tolerance)
    least = [0.0, 0.0] + [_LEAST[arithmetic] * max((size for _, size in values[2:]), default=0.0)] * (len(values) - 2)
    rows = [
        Difference(name, size, _part(difference, max(size, low)))
        for name, (difference, size), low in zip(names, values, least)
    ]
    shape = (whole.logits.shape[0], layout.total)
    loss = (split.loss.item(), whole.loss.item())
    return Verification(axis.size, shape, arithmetic, tolerance, *loss, tuple(rows))


def _largest(x: Tensor) -> Tensor:
    """The largest absolute entry, 0 of none; NaN if one is."""
    return x.abs().max().double() if x.numel() else torch.zeros((), dtype=torch.float64, device=x.device)


def _part(difference: float, of: float) -> float:
    if difference == 0:
        return 0.0
    return difference / of if 0 < of < math.inf and difference < math.inf else math.inf


def _arithmetic(model: nn.Module, logits: Tensor) -> str:
    """The coarsest of what weights and logits have; TF32 where products of fp32 may use it."""
    found = {str(x.dtype).removeprefix("torch.") for x in (*model.parameters(), logits)}
    coarsest = [name for name in TOLERANCE if name in found][-1:]
    tf32 = logits.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if coarsest == ["float32"] and tf32 else (coarsest or ["float32"])[0]
