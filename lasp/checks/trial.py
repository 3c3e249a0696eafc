"""Which modules mix tokens? Asked of the modules themselves, on this rank alone, before anything is split.

The model runs on a few tokens, and then on each of two slices of them, as two ranks would. What every module gets and
returns is noted in the first run; in the others it is compared with the slice of that, and put right where it differs:

    an input differs    the module that calls this one mixes tokens in its own forward (F.pad, roll, cumsum, SDPA, or
                        positions that it counts from 0)
    an output differs   this module does, in its own forward; not those that it calls, whose outputs were put right

What is called once for some tokens at a time has no slice to be compared with: there only the output of the caller is.

So each module is asked about its own code, and none hides behind a module below, above or beside it. The operators of
lasp are borders of the same kind: they answer as they would over ranks, so that a layer that uses them mixes nothing.
They also note who calls them, and whether with the ranks. And so are forward hooks (lasp.checks.hooks). Those of
modules that cannot run are called by themselves, with numbers in place of what these would get or return. One that
raises is left out, and then called by itself.

Nothing is sent: other ranks may have other modules, or be elsewhere. What is about to cannot be asked.

Parameters that are zero are random here, and tiny ones larger: a convolution that starts as the identity still mixes,
and so does what comes in times a gain of 1e-6. What a model does in training, or with a mask, is asked as well.

If nothing was found, there is a second look: at two rows, for what takes rows for tokens, where the gradients at every
module's borders are compared and put right likewise, for what mixes in backward only; and, as far as the model is
small, at more tokens, for what reaches far.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lasp.checks import hooks
from lasp.checks.forward import MASKS, POSITIONS
from lasp.checks.rounds import Sends, none_asked
from lasp.checks.torch_modules import is_of_torch, kind_of
from lasp.checks.trial_inputs import Inputs, inputs_of, optional
from lasp.checks.trial_slices import How, Slice, copied, equal
from lasp.checks.trial_weights import MEDIUM, SMALL, Weights, as_it_was, kept
from lasp.checks.untouched import keep_all, random_state
from lasp.ranks import SequenceParallel

_CUTS = ((29, 13), (13, 5))  # tokens, and where they are cut (no block ends there); the second if a model takes few
_MORE = ((1031, 487, 0.03), (263, 127, 0.15))  # likewise, of a second look, if the first took fewer seconds: the most
# tokens that a model of so many parameters allows
_ROWS = 2  # of a second look
_PARAMETERS = {"cpu": 5e7, "cuda": 2e10}  # whose use on some 60 tokens takes about a second at most

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass
class Answers:
    """What the modules of a model have said, each by its path, and its hooks by their names (`lasp.checks.hooks`)."""

    mixing: dict[str, str] = field(default_factory=dict)  # how it showed
    asked: set[str] = field(default_factory=set)  # those that ran, whether they mix or not
    silent: dict[str, str] = field(default_factory=dict)  # why a module could not be asked as a whole
    gave_ranks: set[str] = field(default_factory=set)  # layers whose `sequence` reached an operator
    forgot_ranks: dict[str, str] = field(default_factory=dict)  # callers of an operator without ranks; the operator
    counts_positions: dict[str, str] = field(default_factory=dict)  # from 0, if this argument is not given


_running: dict[int, _Trial] = {}  # by thread: others go on with the operators themselves


def operator(stand_in: Callable[..., Any]) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorator of a function that takes `sequence=`. In a trial `stand_in` answers: of the same arguments, results of
    the same shapes, where those of a token depend on that token alone (or are what the ranks before would send)."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if not _running or torch.compiler.is_compiling() or (trial := _running.get(threading.get_ident())) is None:
                return function(*args, **kwargs)
            return trial.operator(function.__name__, stand_in, signature.bind(*args, **kwargs).arguments)

        return call

    return decorate


def ask(model: nn.Module, layers: Mapping[str, nn.Module], changed: Mapping[str, nn.Module] | None = None) -> Answers:
    """Ask every module; the model is left as it was.

    Args:
        model: as its user made it; nothing of it may be split now.
        layers: those that pass their attribute `sequence` to operators, by path.
        changed: modules in it that are asked one by one where the model cannot be tried as a whole.
    """
    answers, found = Answers(), hooks.hooks_of(model)
    reason = _why_not(model)
    with hooks.states_kept(found):
        if reason:
            answers.silent[""] = reason
            _ask_some(changed or {}, layers, answers)
        else:
            _ask("", model, layers, answers)
        left = [hook for hook in found if hook.name not in answers.asked and hook.owner is not hooks.EVERYWHERE]
        told = [_ask_hook(hook, answers) for hook in left]
        answers.asked -= {hook.name for hook, asked in zip(left, told) if not asked}  # several may have one name
    return answers


def _ask_some(changed: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], answers: Answers) -> None:
    """Those modules of a model that cannot be tried as a whole."""
    alone: list[nn.Module] = []
    for path, module in changed.items():
        if path in answers.asked or (is_of_torch(module) and next(module.children(), None) is None):
            continue
        if not _why_not(nn.ModuleList([*alone, module])):  # all of them in about a second
            alone.append(module)
            _ask(path, module, layers, answers)


def _ask_hook(hook: hooks.Hook, answers: Answers) -> bool:
    """Whether it took any of what most modules return, given to it by itself."""
    asked = False
    for in_tuple in (False,) if hook.before else (False, True):
        alone = hooks.Alone(hook, in_tuple=in_tuple)
        with contextlib.suppress(_Failed), kept([alone, *alone.imitated.modules()]):
            alone.imitated.training = False
            for buffers in (m._buffers for m in alone.imitated.modules() if isinstance(m._buffers, dict)):
                small = {name: b for name, b in buffers.items() if b is not None and b.numel() <= SMALL}
                buffers.update({name: b.clone() for name, b in small.items()})  # it may write to them
            found = Answers()
            _ask_whole(hook.name, alone, {}, found, [{}])
            answers.mixing |= found.mixing
            answers.asked |= found.asked
            asked = asked or hook.name in found.asked
    return asked


def _why_not(model: nn.Module) -> str:
    """Why it cannot even be tried; empty if it can."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if any(isinstance(m, wrappers) or hasattr(m, "_fsdp_wrapped_module") for m in model.modules()):
        return "it is wrapped for data parallelism"
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(x) for x in tensors):
        return "its weights are not initialized"
    if any(x.is_meta for x in tensors):
        return "its weights are on the meta device"
    if any(hasattr(x, "device_mesh") for x in tensors) or any(isinstance(m, FSDPModule) for m in model.modules()):
        return "its weights are sharded"
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    work = Counter()
    for p in model.parameters():
        work[p.device.type] += 0 if id(p) in tables else p.numel()
    for kind, numbers in work.items():
        if numbers > _PARAMETERS.get(kind, _PARAMETERS["cpu"]):
            return f"it would take long, with {numbers:,} parameters on {kind}"
    return ""


def _ask(path: str, module: nn.Module, layers: Mapping[str, nn.Module], answers: Answers) -> None:
    """Ask it as a whole; where that fails, the modules in it one by one."""
    if getattr(type(module), "forward", None) is not nn.Module.forward:  # else it is a container
        try:
            with as_it_was(module) as weights:
                _ask_whole(path, module, layers, answers, weights)
            return
        except _Failed as failed:
            answers.silent[path] = str(failed)
    for name, child in module.named_children():
        if not is_of_torch(child) or next(child.children(), None) is not None:
            _ask(f"{path}.{name}" if path else name, child, layers, answers)


class _Failed(Exception):
    """No input was found with which the module runs."""


class _FailedForAll(_Failed):
    """With none it would, since it sends something."""


class _NoMessages(TorchDispatchMode):
    """Inside, a collective is an error: other ranks may have other modules, or try them another number of times."""

    supports_higher_order_operators = True  # such as flex_attention

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # a trial compiles nothing; else this would import the compiler, and ask it at each operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(x, DTensor) for x in types):
            return NotImplemented  # it comes again with what it consists of
        if getattr(func, "namespace", "") in _OF_RANKS:
            raise Sends(f"a trial sends nothing, and {func} is called")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _sending_nothing() -> Iterator[None]:
    with none_asked(), _NoMessages():
        yield


_OF_RANKS = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem")


def _ask_whole(
    path: str, module: nn.Module, layers: Mapping[str, nn.Module], answers: Answers, weights: list[Weights]
) -> None:
    reason = ""
    for parameters, cuts in itertools.product(weights, _CUTS):
        for make_inputs in inputs_of(module, parameters):
            ask, started = functools.partial(_ask_one_way, path, module, layers, parameters, cuts), time.process_time()
            try:
                found = ask(make_inputs)
            except _FailedForAll:
                raise
            except _Failed as failed:
                reason = reason or str(failed)
                continue
            seconds = time.process_time() - started
            others = [(make_inputs, True)] if _may_train(module) else []
            others += [(functools.partial(make_inputs, masks=True), False)] if optional(module, MASKS) else []
            for make_others, training in others:
                with contextlib.suppress(_Failed):  # it need not take a mask of that kind
                    also = ask(make_others, training=training)
                    found.mixing |= {p: how for p, how in also.mixing.items() if p not in found.mixing}
                    found.forgot_ranks |= also.forgot_ranks
                    found.counts_positions |= also.counts_positions
            if not found.mixing:
                found.mixing = _look_again(path, module, layers, parameters, cuts, make_inputs, seconds)
            answers.mixing |= found.mixing
            answers.asked |= found.asked
            answers.silent |= found.silent
            answers.gave_ranks |= found.gave_ranks
            answers.forgot_ranks |= found.forgot_ranks
            answers.counts_positions |= found.counts_positions
            return
    raise _Failed(reason)


def _ask_one_way(
    path: str,
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    parameters: Weights,
    cuts: tuple[int, int],
    make_inputs: Callable[[int, int], Inputs],
    *,
    training: bool = False,
) -> Answers:
    """What comes out with these inputs; raises `_Failed` if nothing does, or if it draws random numbers in training."""
    tokens, cut = cuts
    if training:  # it may write to its weights
        small = {name: p for name, p in module.named_parameters() if p.numel() <= SMALL}
        parameters = small | parameters
    trial = _Trial(path, module, layers, parameters)
    with _in_training(module) if training else contextlib.nullcontext():
        trial.run(make_inputs(tokens, cut), tokens, cut, may_draw=not training)
        found = trial.found
        for name in optional(module, POSITIONS):
            inputs = {n: x for n, x in make_inputs(tokens, cut).items() if n != name}
            if trial.counts_positions(inputs, cut):
                found.counts_positions[path] = name
        if found.mixing:  # a dimension may differ by as much as the tokens by chance: ask again with other numbers
            again = _Trial(path, module, layers, parameters)
            again.draws = set()
            again.run(make_inputs(tokens - 2, cut - 2), tokens - 2, cut - 2)
            found.mixing = {
                p: DRAWS if p in again.draws else why for p, why in found.mixing.items() if p in again.found.mixing
            }
    return found


def _look_again(
    path: str,
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    parameters: Weights,
    cuts: tuple[int, int],
    make_inputs: Callable[..., Inputs],
    seconds: float,
) -> dict[str, str]:
    """What mixes rows, in backward, or further away; `seconds` is what the first look took."""

    def look(tokens: int, cut: int, *, rows: int = 1, gradients: bool = False) -> dict[str, str]:
        trial = _Trial(path, module, layers, parameters, gradients=gradients)
        with torch.set_grad_enabled(gradients):
            trial.run(make_inputs(tokens, cut, rows=rows), tokens, cut)
        return trial.found.mixing

    def look_twice(cuts: tuple[int, int], **options: Any) -> dict[str, str]:
        tokens, cut = cuts
        found = look(tokens, cut, **options)
        again = look(tokens - 2, cut - 2, **options) if found else {}
        return {p: why for p, why in found.items() if p in again}

    found: dict[str, str] = {}
    with contextlib.suppress(_Failed):
        try:
            found = look_twice(cuts, rows=_ROWS, gradients=True)
        except _Failed:  # some code writes to what autograd needs
            found = look_twice(cuts, rows=_ROWS)
    more = next((x[:2] for x in _MORE if seconds <= x[2] and _allows(module, x[0])), None)
    if not found and more is not None:
        with contextlib.suppress(_Failed):  # as where there are fewer positions
            found = look_twice(more)
    return found


def _allows(module: nn.Module, tokens: int) -> bool:
    """Whether so many tokens are as little work as 60 of a model that may be tried, or a fourth of it. Tables count as
    well: mostly there are as many logits."""
    numbers = Counter()
    for p in module.parameters():
        numbers[p.device.type] += p.numel()
    return all(n * tokens * 4 <= _PARAMETERS.get(kind, _PARAMETERS["cpu"]) * 60 for kind, n in numbers.items())


def _may_train(module: nn.Module) -> bool:
    """Whether what it may write to in training can be copied: all buffers, and small parameters."""
    small = sum(p.numel() for p in module.parameters() if p.numel() <= SMALL)
    return small <= MEDIUM and all(b.numel() <= SMALL for b in module.buffers())


@contextlib.contextmanager
def _in_training(module: nn.Module) -> Iterator[None]:
    """Inside, all modules are, but for those that drop something at random."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in modes:
            m.training = True
        keep_all(module)
        yield
    finally:
        for m, training in modes:
            m.training = training


@dataclass
class _Frame:
    """A call that is under way."""

    path: str
    number: int  # of the calls of this module
    lost: bool  # its inputs are no slices of what they were: whoever called it must answer for it
    unclear: list[str] = field(default_factory=list)  # modules of torch.nn below that may mix, and were not put right
    undecided: list[str] = field(default_factory=list)  # all modules below that were not


COUNTED = "it counts positions from 0 on each slice"
DRAWS = "it draws random numbers in evaluation mode, and gives something else on a slice of the sequence"
_BACKWARD = "in backward it gives something else on a slice of the sequence than on the whole"
_HOW = {How.DIFFERS: "on a slice of the sequence it gives something else than on the whole", How.COUNTED: COUNTED}


class _Trial:
    """Three runs of a module."""

    def __init__(
        self,
        path: str,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        parameters: Weights,
        *,
        gradients: bool = False,
    ):
        self.root, self.path, self.parameters = module, path, parameters
        self.gradients: dict[Any, Tensor] | None = None  # on the whole, if they are compared
        if gradients:  # none of parameters
            self.gradients = {}
            self.parameters = {name: p.detach() for name, p in module.named_parameters()} | parameters
        self.in_backward: set[str] = set()  # modules that mix there
        self.draws: set[str] | None = None  # modules that draw random numbers in their own forward, if that is asked
        self.stack: list[_Frame] = []
        self.uneven: set[Any] = set()  # what is called more often the more tokens there are, as for some at a time: its
        # calls on a slice are none of those on the whole, so that who calls it must answer for it
        self.slice = Slice(self._precision())
        prefix = f"{path}." if path else ""
        self.paths = {m: prefix + name if name else path for name, m in module.named_modules()}
        self.failing: set[str] = set()  # hooks that raise on what is made up: they are left out from then on
        self.marks = {p: SequenceParallel(None, name=p) for p, m in layers.items() if m in self.paths}
        for p, mark in self.marks.items():
            layers[p].sequence = mark  # type: ignore[assignment]
        self.found = Answers()
        self.record: dict[Any, list[Any]] = {}

    def _precision(self) -> float:
        """Relative differences below are rounding: products of other numbers of rows may be summed in another order."""
        used = (self.parameters.get(name, p) for name, p in self.root.named_parameters())
        digits = [torch.finfo(p.dtype).eps * 4 for p in used if p.is_floating_point()]
        coarse = 5e-3 if torch.backends.cuda.matmul.allow_tf32 else 1e-4
        return max([*digits, coarse])

    def run(self, inputs: Inputs, tokens: int, cut: int, *, may_draw: bool = True) -> None:
        """Fill `found`; raises `_Failed` if it does not run on the whole, tells nothing, or may not draw and does."""
        self.slice.tokens = tokens
        self.random = random = random_state()
        try:
            out = self._call(inputs, 0, tokens, whole=True)
        except Sends as error:
            raise _FailedForAll(str(error)) from error
        except Exception as error:  # whatever its code raises on an input that was guessed
            raise _Failed(f"a trial with {tokens} tokens ends in {type(error).__name__}: {error}"[:300]) from error
        if not (found := _tensors(out)) or any(bool(x.isnan().any()) for x in found):
            raise _Failed("a trial gives NaN" if found else "a trial returns no tensor")
        if not may_draw and not all(map(torch.equal, random, random_state())):
            raise _Failed("a trial draws random numbers")
        self.found.asked = {key for key, _ in self.record if isinstance(key, str)}
        found = copy.deepcopy(self.found)
        self._call_slices(inputs, cut)
        if self.found.mixing and self.uneven:
            self.found = found
            self._call_slices(inputs, cut)
        self.found.asked -= self.failing
        for path in sorted(self.in_backward - self.found.mixing.keys()):  # what mixes in forward does in backward, too
            self.found.mixing[path] = _BACKWARD

    def _call_slices(self, inputs: Inputs, cut: int) -> None:
        for start, end in ((0, cut), (cut, self.slice.tokens)):
            try:
                self._call(inputs, start, end, whole=False)
            except Sends as error:
                raise _FailedForAll(str(error)) from error
            except Exception as error:
                how = f"it fails on a slice of {end - start} tokens: {type(error).__name__}: {error}"[:300]
                if not self.stack or isinstance(self.root, hooks.Alone):  # in backward, which runs behind all modules
                    raise _Failed(how) from error
                self._blame(self.stack[-1], how)
            else:
                of_whole = Counter(key for key, _ in self.record)
                self.uneven |= {key for key in of_whole | self.counts if of_whole[key] != self.counts[key]}

    def counts_positions(self, inputs: Inputs, cut: int) -> bool:
        """Whether without these inputs, of which positions are missing, it is wrong on the second slice and says
        nothing."""
        self.found, kept = Answers(), self.found
        try:
            self._call(inputs, cut, self.slice.tokens, whole=False)
        except Exception:  # then it says so itself
            return False
        else:
            return bool(self.found.mixing.keys() - kept.mixing.keys())
        finally:
            self.found = kept

    def _call(self, inputs: Inputs, start: int, end: int, *, whole: bool) -> Any:
        self.whole, self.slice.start, self.slice.end = whole, start, end
        self.stack = []
        self.counts: Counter[Any] = Counter()
        values = {
            name: x.value if x.dim is None else x.value.narrow(x.dim, start, end - start).clone()
            for name, x in inputs.items()
        }
        self.leaves: list[Tensor] = []
        values = {name: self._leaf(x) if isinstance(x, Tensor) else x for name, x in values.items()}
        args = (values.pop(next(iter(values))),)
        with _sending_nothing() if dist.is_initialized() else contextlib.nullcontext():
            _running[threading.get_ident()] = self
            try:
                with self._borders():
                    out = torch.func.functional_call(self.root, self._weights(), args, values)
            finally:
                del _running[threading.get_ident()]
            if self.gradients is not None:
                self._backward(_tensors(out))
        return out

    def _weights(self) -> Weights:
        """Those of a run; of what it may write to copies of its own, since ranks would begin with the same."""
        written = {name for name, _ in self.root.named_buffers()}
        if self.root.training:
            written.update(name for name, p in self.parameters.items() if p.numel() <= SMALL)
        return {name: x.clone() if name in written else x for name, x in self.parameters.items()}

    # At the borders of modules

    @contextlib.contextmanager
    def _borders(self) -> Iterator[None]:
        """Inside they are there: hooks, also in the place of others."""
        before = [(table, dict(table)) for table in hooks.tables_of([hooks.EVERYWHERE, *self.paths])]
        found, handles = hooks.hooks_of(self.root, self.path), []
        try:
            for hook in found:
                hook.table[hook.number] = functools.partial(self._call_hook, hook)
            for module in self.paths:
                handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for hook in found:
                hook.table[hook.number] = hook.function
            for table, content in before:  # some hooks remove themselves when they are called
                table.update(content)

    def _call_hook(self, hook: hooks.Hook, module: nn.Module, *given: Any) -> Any:
        """In the place of somebody's hook."""
        if _running.get(threading.get_ident()) is not self:
            return hook.function(module, *given)
        caller = self.stack[-1] if self.stack else None
        self._note_draws(caller)
        frame = self._enter(hook.name, caller)
        key = frame.path, frame.number
        start = 0 if hook.before else len(given) - 1  # of what it may change: the arguments, or the output
        kept, given = given[:start], given[start:]
        if self.whole:
            self.record[key] = [copied(given), None]
        elif not frame.lost:
            how, given = self.slice.put_right(self.record[key][0], given)
            frame.lost = how == How.LOST
            if how in _HOW and caller is not None:
                self._blame(caller, _HOW[how])
        given = self._watch_gradients(given, (*key, "in"), frame)
        self.stack.append(frame)
        depth, out = len(self.stack), given
        try:
            if frame.path not in self.failing:
                out = hook.call(module, (*kept, *given))[start:]
        except Exception:  # it is asked by itself, then
            self.failing.add(frame.path)
            del self.stack[depth:]
        self.stack.pop()
        self._note_draws(frame)
        if self.whole:
            self.record[key][1] = copied(out)
        elif not frame.lost:
            how, out = self.slice.put_right(self.record[key][1], out)
            frame.lost = how == How.LOST
            if frame.path not in self.failing and (how in _HOW or (frame.lost and self.slice.fewer)):
                self._blame(frame, _HOW.get(how, "it returns fewer tokens than it is given"))
        if frame.lost:
            self.found.asked.discard(frame.path)
        return out if hook.before and hook.with_kwargs else out[0]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        caller = self.stack[-1] if self.stack else None
        self._note_draws(caller)
        self.slice.note_autocast()
        frame = self._enter(self.paths[module], caller)
        if isinstance(module, nn.Embedding) and args and isinstance(args[0], Tensor) and args[0].numel():
            asked = int(args[0].max()) + 1
            if asked > module.num_embeddings:  # on a GPU nothing could be computed afterwards
                raise IndexError(f"{frame.path} has {module.num_embeddings} entries, not {asked}")
        if self.whole:
            self.record[frame.path, frame.number] = [copied((args, kwargs)), None]
        elif not frame.lost and caller is not None:
            how, (args, kwargs) = self.slice.put_right(self.record[frame.path, frame.number][0], (args, kwargs))
            frame.lost = how == How.LOST
            if how in _HOW:
                self._blame(caller, _HOW[how])
        self.stack.append(frame)
        return self._watch_gradients((args, kwargs), (frame.path, frame.number, "in"), frame)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        frame = self.stack.pop()
        self._note_draws(frame)
        caller = self.stack[-1] if self.stack else None
        place = (frame.path, frame.number, "out")
        if self.whole:
            self.record[frame.path, frame.number][1] = copied(out)
            return self._watch_gradients(out, place, caller)
        if not frame.lost:
            how, out = self.slice.put_right(self.record[frame.path, frame.number][1], out)
            if how in _HOW:
                self._blame(frame, _HOW[how])
            if how != How.LOST:
                return self._watch_gradients(out, place, caller)
        frame.undecided.append(frame.path)
        if kind_of(module) in ("mixes", "depends"):
            frame.unclear.append(frame.path)
        if caller is not None:
            caller.unclear += frame.unclear
            caller.undecided += frame.undecided
        elif self.slice.fewer:
            self._blame(frame, "it returns fewer tokens than it is given")
        elif not self._blame_unclear(frame):
            self.found.silent[frame.path] = "what it returns cannot be related to the tokens that it is given"
            self.found.asked.difference_update(frame.undecided)
        return out

    def _enter(self, key: Any, caller: _Frame | None) -> _Frame:
        number, self.counts[key] = self.counts[key], self.counts[key] + 1
        lost = caller is not None and caller.lost
        if not self.whole:
            lost = lost or (key, number) not in self.record or key in self.uneven
        return _Frame(key, number, lost)

    def _blame(self, frame: _Frame, how: str) -> None:
        """It mixes tokens; or what it calls does, as far as that could not be put right."""
        if not self._blame_unclear(frame):
            self.found.mixing.setdefault(frame.path, how)

    def _blame_unclear(self, frame: _Frame) -> bool:
        for path in frame.unclear:
            self.found.mixing.setdefault(path, "it returns another number of tokens than it is given")
        return bool(frame.unclear)

    def operator(self, name: str, stand_in: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """In the place of an operator of lasp."""
        caller = self.stack[-1] if self.stack else _Frame(self.path, 0, lost=False)
        frame = self._enter((caller.path, name), caller)
        sequence = arguments.get("sequence")
        given = {n: x() if n == "q" and callable(x) else x for n, x in arguments.items()}
        key = frame.path, frame.number
        if self.whole:
            if sequence is None:
                self.found.forgot_ranks.setdefault(caller.path, name)
            self.found.gave_ranks.update(path for path, mark in self.marks.items() if mark is sequence)
            self.record[key] = [copied(given), None]
        elif not frame.lost:
            how, given = self.slice.put_right(self.record[key][0], given)
            frame.lost = how == How.LOST
            if how in _HOW:
                self._blame(caller, _HOW[how])
        out = stand_in(**given)
        if self.whole:
            self.record[key][1] = copied(out)
        elif not frame.lost:
            out = self.slice.put_right(self.record[key][1], out)[1]
        return self._watch_gradients(out, (*key, "out"), caller)

    def _note_draws(self, frame: _Frame | None) -> None:
        """If random numbers were drawn since the last border, it was by this call."""
        if self.draws is None:
            return
        before, self.random = self.random, random_state()
        if not all(map(torch.equal, before, self.random)):
            self.draws.add(self.path if frame is None else frame.path)

    # Gradients

    def _leaf(self, x: Tensor) -> Tensor:
        """In its place one of which autograd knows, where gradients are compared and it does not yet."""
        if self.gradients is None or not x.is_floating_point() or x.requires_grad:
            return x
        self.leaves.append(x.detach().requires_grad_())
        return self.leaves[-1].clone()  # which may be written to

    def _watch_gradients(self, nest: Any, place: tuple, frame: _Frame | None) -> Any:
        """The same tensors under names of their own, whose gradients are those of this border alone; where one differs,
        it is this call that mixes tokens."""
        if self.gradients is None:
            return nest
        leaves, form = pytree.tree_flatten(nest)
        for i, x in enumerate(leaves):
            x = self._leaf(x) if isinstance(x, Tensor) else x
            if isinstance(x, Tensor) and x.requires_grad:
                watched = x.view_as(x)
                watched.register_hook(functools.partial(self._see_gradient, (*place, i), frame))
                leaves[i] = watched.view_as(watched)  # whose own hooks come before
        return pytree.tree_unflatten(leaves, form)

    def _see_gradient(self, place: tuple, frame: _Frame | None, x: Tensor) -> Tensor | None:
        assert self.gradients is not None
        if self.whole:
            self.gradients[place] = x.clone()
            return None
        part = self.slice.of(self.gradients[place], x) if place in self.gradients else None
        if part is None or part.shape == self.gradients[place].shape:
            return None
        # More tokens than there are, as behind a halo, have their gradients from other slices, too.
        fits = all(a == b or a == self.slice.tokens for a, b in zip(self.gradients[place].shape, x.shape))
        if fits and frame is not None and not equal(part, x) and self.slice.compare(part, x, coarser=10) == How.DIFFERS:
            self.in_backward.add(frame.path)
        return part.clone()

    def _backward(self, outputs: list[Tensor]) -> None:
        """From random gradients of what the whole model gives, or their slices."""
        outputs = [x for x in outputs if x.requires_grad]
        if self.whole:
            self.given = [torch.randn_like(x) for x in outputs]
        given = [self.slice.of(g, x) for g, x in zip(self.given, outputs)]
        if outputs and len(given) == len(self.given) and all(g is not None for g in given):
            torch.autograd.grad(outputs, self.leaves, given, allow_unused=True)  # type: ignore[arg-type]


def _tensors(nest: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(nest) if isinstance(x, Tensor)]
