"""What adapters put into a model on one rank: there only while it is needed.

On one rank `parallelize` leaves a model as it is. To stream a sequence through it (`lasp.stream_backward`), its layers
must call the operators with ranks even so, of which there is one. So the adapters edit it once; what they have changed
is taken out again, and put in its place while a sequence is streamed.

On several ranks it is the other way round. If modules have come into a model since, it is tried again as in
`parallelize`, and what that has changed is out meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import types
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lasp import adapters
from lasp.adapters.border import Border, OneRank
from lasp.adapters.rebind import was_put
from lasp.checks import hooks, positions, use
from lasp.checks.agreement import capturing, is_due
from lasp.checks.forward import places_of
from lasp.checks.optimizers import before_step
from lasp.layout import ShardLayout
from lasp.ranks import SequenceParallel

_ABSENT = object()
_FORMS = 16  # of a module that are known, the last: a training loop may put something else around it at each step
_entering = threading.Lock()


class Handles:
    """The changes that make a model on one rank call the operators with its rank.

    Args:
        model: as it came.
        layers: with their paths and adapters.
        sequence: of one rank.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[tuple[str, nn.Module, adapters.Adapter]], sequence: SequenceParallel
    ):
        layers = list(layers)
        before = states_of(model)
        border = Border(sequence) if any(isinstance(x, adapters.Foreign) for _, _, x in layers) else None
        self.own = [sequence.of_layer(path, border) for path, _, _ in layers]
        try:
            for (_, module, adapter), own in zip(layers, self.own):
                adapter(module, own)
            if border is not None:
                around = sequence.of_layer("", border)
                adapters.prepare(model, around)
                border.install(model)
                self.own.append(around)
            self._changes = Changes(before)
        finally:
            for module, state in before.items():
                _restore(module, state)

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """A context inside which the changes are in the model."""
        return self._changes.put_in()


States = dict[nn.Module, dict[str, Any]]


def states_of(model: nn.Module) -> States:
    """The attributes of all modules; of those that are dicts (submodules, hooks) also the entries."""
    return {
        module: {name: dict(x) if isinstance(x, dict) else x for name, x in vars(module).items()}
        for module in model.modules()
    }


class Changes:
    """What has changed in modules since `before`, or was added: attributes, and entries of those that are dicts."""

    def __init__(self, before: States):
        # Weakly: these live as long as the model, and must not keep it alive.
        self._changes = [(weakref.ref(m), *_difference(state, m)) for m, state in before.items()]

    def put_in(self) -> contextlib.AbstractContextManager[None]:
        """A context inside which they are in the modules, and what stands for one rank is not."""
        return _in_place(self._put_in())

    @contextlib.contextmanager
    def taken_out(self) -> Iterator[None]:
        """A context inside which they are not; what somebody else has put there since stays."""
        tables = [vars(m).get(name) for m, _, entries in self._living() for name in entries]
        kept = [(x, dict(x)) for x in tables if isinstance(x, dict)]
        try:
            with _in_place(self._taken_out()):
                yield
        finally:
            for table, content in kept:  # hooks that remove themselves when they are called know these
                table.clear()
                table.update(content)

    def lost_forward(self, module: nn.Module) -> bool:
        """Whether they gave a forward to this module, and the one that it has now neither calls that nor is one that
        `rebind` has put there since."""
        for changed, plain, _ in self._living():
            if changed is module and isinstance(given := plain.get("forward", (None, None))[1], _Method):
                now = vars(module).get("forward")
                return not (was_put(now) or _leads_to(now, given.function, vars(module)))
        return False

    def _put_in(self) -> Iterator[tuple[dict[str, Any], str, Any]]:
        for module, plain, entries in self._living():
            values = vars(module)
            for name, (_, new) in plain.items():
                yield values, name, _of(new, module)
            for name, changed in entries.items():
                kept = {key: x for key, x in values[name].items() if not isinstance(x, OneRank)}
                added = {key: new for key, (_, new) in changed.items()}
                yield values, name, type(values[name])({**kept, **added})

    def _taken_out(self) -> Iterator[tuple[dict[str, Any], str, Any]]:
        for module, plain, entries in self._living():
            values = vars(module)
            # Somebody's wrapper of that forward still calls it, and it reads the others.
            wrapped = "forward" in plain and not _is(values.get("forward"), plain["forward"][1], module)
            for name, (old, new) in () if wrapped else plain.items():
                if _is(values.get(name), new, module):
                    yield values, name, _of(old, module)
            for name, changed in entries.items():
                if isinstance(now := values.get(name), dict):
                    left = {k: changed[k][0] if k in changed and x is changed[k][1] else x for k, x in now.items()}
                    yield values, name, type(now)({k: x for k, x in left.items() if x is not _ABSENT})

    def _living(self) -> Iterator[tuple[nn.Module, dict[str, tuple], dict[str, dict[Any, tuple]]]]:
        for reference, plain, entries in self._changes:
            if (module := reference()) is not None:
                yield module, plain, entries


@contextlib.contextmanager
def _in_place(changes: Iterable[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Inside, attributes have other values (`_ABSENT`: none): of a dict of attributes, by name."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for values, name, value in list(changes):
            held.append((values, name, values.get(name, _ABSENT)))
            _set(values, name, value)
        yield
    finally:
        for values, name, value in reversed(held):
            _set(values, name, value)


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        values.pop(name, None)
    else:
        values[name] = value


class Parallelized:
    """What is known of a model that `parallelize` was called with."""

    def __init__(
        self,
        model: nn.Module,
        sequence: SequenceParallel,
        layers: Mapping[str, tuple[nn.Module, adapters.Adapter]],
        own: Iterable[SequenceParallel],
        changes: Changes | None = None,
        look: Look | None = None,
    ):
        self.sequence, self._model = sequence, weakref.ref(model)
        self.own = list(own)  # the ranks of each layer; none on one rank, before a sequence is streamed
        self.streamed = ""  # how a sequence was streamed through it last (lasp.streaming), in words
        self.fills_cache = False  # whether a trial has shown that a prompt's state fits its library's cache
        self.decoded = ""  # how tokens were generated with it last (lasp.inference), in words
        self.last_layer: Any = None  # what of it may give the loss (lasp.streaming); None: not known yet
        self.fitting: dict[tuple, Any] = {}  # by the kind of step: segments for which there is memory, as was tried
        self._layers = [(path, weakref.ref(module), adapter) for path, (module, adapter) in layers.items()]
        self._changes, self._look = changes or Changes({}), look
        self._looking, self._looks = threading.Lock(), 0  # by which thread
        self._forwards = 0
        self._known: weakref.WeakKeyDictionary[hooks.Owner, list[_Forward]] = weakref.WeakKeyDictionary()
        self.accept(model)
        self._handles: Handles | None = None

    @property
    def adapters(self) -> list[tuple[str, adapters.Adapter]]:
        """The adapters of its layers, by path."""
        return [(path, adapter) for path, _, adapter in self._layers]

    def accept(self, model: nn.Module) -> None:
        """What the model consists of is known from now on."""
        self._places = places_of(model)
        now = [(module, _Forward(module)) for module in (hooks.EVERYWHERE, *_modules_of(model))]
        self._modules = [(weakref.ref(module), forward) for module, forward in now]
        for module, forward in now:
            if not self._knows(module):
                living = [x for x in self._known.get(module, ()) if x.lives()]
                self._known[module] = [*living[1 - _FORMS :], forward]

    def _knows(self, module: hooks.Owner, *, only_forward: bool = False) -> bool:
        return any(forward.is_of(module, only_forward) for forward in self._known.get(module, ()))

    def knows_all(self, model: nn.Module) -> bool:
        """Whether the model has the modules that it had, and no others, with their forwards and hooks."""
        now = (hooks.EVERYWHERE, *_modules_of(model))  # before each forward, so that this must be quick
        if len(now) != len(self._modules):
            return False
        for (held, forward), module in zip(self._modules, now):
            if held() is not module or not forward.is_of(module):
                return False
        return True

    def refuse_new_layers(self) -> None:
        """Raise `ValueError` if what mixes tokens has come into the model since: it would see the tokens of each rank,
        or of each segment, by themselves. Layers that are known are told by their class, others tried."""
        model = self._model()
        if model is None or self._looks == threading.get_ident() or self.knows_all(model):
            return
        with self._alone():
            others = {path: module for path, module in model.named_modules() if not self._knows(module)}
            changed = {path: module for path, module in others.items() if not self._knows(module, only_forward=True)}
            hooked = [m for m in (hooks.EVERYWHERE, *others.values()) if not self._knows(m)]
            layers = self._layers_in(model)
            local = tuple(f"{path}." * bool(path) for path, (_, x) in layers.items() if x is adapters.token_local)
            for path, module in changed.items():
                if module not in self._known and adapters.find(module) and not f"{path}.".startswith(local):
                    raise ValueError(
                        f"model must have the layers that lasp.parallelize was called with, got {path!r}, a "
                        f"{type(module).__name__} that was put there afterwards: call lasp.parallelize behind all "
                        "changes"
                    )
                if self._changes.lost_forward(module):
                    raise ValueError(
                        f"model must have the layers that lasp.parallelize was called with, got {path!r}, a "
                        f"{type(module).__name__} whose forward is no longer the one that lasp.parallelize put there, "
                        "nor calls it: call lasp.parallelize behind all changes"
                    )
            if hooked and self._look is not None:
                with self._changes.taken_out():
                    self._look(model, layers, changed, hooked)
            self.accept(model)

    def refuse_positions_of_a_slice(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise `ValueError` if a forward is given positions that were counted on this rank's slice. Of those on a GPU,
        for which the host waits, it looks at the first two forwards', and every 1000th."""
        rank = self.sequence.rank
        if rank == 0 or self._looks == threading.get_ident():  # a trial's
            return
        count, self._forwards = self._forwards, self._forwards + 1
        given = dict(zip(self._places, args)) | kwargs
        layout = next((x for x in given.values() if isinstance(x, ShardLayout)), None)
        if layout is None or rank >= len(layout.lengths):  # without one all ranks before may have no token
            return
        start, _ = layout.bounds(rank)
        if start != 0 and start not in (layout.cu_seqlens or ()):
            positions.refuse_counted_on_a_slice(given, rank, wait=is_due(count) and not capturing())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside there is one thread: others wait, which would find the model as it came."""
        with self._looking:
            self._looks = threading.get_ident()
            try:
                yield
            finally:
                self._looks = 0

    def _layers_in(self, model: nn.Module) -> dict[str, tuple[nn.Module, adapters.Adapter]]:
        """Its layers by the paths that they have now; those that a plan leaves are whatever is there."""
        known = {module: adapter for _, held, adapter in self._layers if (module := held()) is not None}
        left = {path: adapter for path, _, adapter in self._layers if adapter is adapters.token_local}
        now = ((path, m, known.get(m, left.get(path))) for path, m in model.named_modules())
        return {path: (module, adapter) for path, module, adapter in now if adapter is not None}

    def with_ranks(self) -> contextlib.AbstractContextManager[None]:
        """Inside, its layers call the operators with their ranks, on one rank too."""
        if self.sequence.size > 1:
            return contextlib.nullcontext()
        if self._handles is None:
            model = self._model()
            assert model is not None
            living = [(path, module, adapter) for path, held, adapter in self._layers if (module := held()) is not None]
            self._handles = Handles(model, living, self.sequence)
            self.own = self._handles.own
        return self._handles.inside()


Look = Callable[
    [nn.Module, Mapping[str, tuple[nn.Module, adapters.Adapter]], Mapping[str, nn.Module], Container[hooks.Owner]], None
]
"""What raises unless the modules that have changed, by path, mix no tokens, nor the hooks of these: of a model, and its
layers."""


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """`list(model.modules())`, in half the time."""
    found = {model: None}

    def walk(module: nn.Module) -> None:
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                if child._modules:
                    walk(child)

    walk(model)
    return list(found)


class _Forward:
    """The forward that a module has, its own, if somebody gave it one, or its class's, and the hooks around it."""

    __slots__ = ("hooks", "numbers", "of_class", "own")

    def __init__(self, module: hooks.Owner):
        own = vars(module).get("forward")
        self.own = None if own is None else _reference_to(_unbound(own, module))
        self.of_class = getattr(type(module), "forward", None)  # a scripted module's class has none
        self.hooks = [(table, _reference_to(x)) for table, x in hooks.functions_of(module)]
        self.numbers = _numbers_of_hooks(module)  # under which they were registered last, and those that do not count

    def lives(self) -> bool:
        """Whether a module may still have it, or get it back."""
        return (self.own is None or self.own() is not None) and all(x() is not None for _, x in self.hooks)

    def is_of(self, module: hooks.Owner, only_forward: bool = False) -> bool:
        """Whether the module still has it."""
        if getattr(type(module), "forward", None) is not self.of_class:
            return False
        values = module.__dict__
        own = values.get("forward")
        if own is None or self.own is None:
            if own is not self.own:
                return False
        elif not _same(_unbound(own, module), self.own()):
            return False
        if values["_forward_hooks"] or values["_forward_pre_hooks"]:
            return only_forward or self._has_hooks_of(module)
        return only_forward or not self.hooks

    def _has_hooks_of(self, module: hooks.Owner) -> bool:
        numbers = _numbers_of_hooks(module)
        if numbers == self.numbers:
            return True
        now = hooks.functions_of(module)
        pairs = zip(now, self.hooks)
        same = len(now) == len(self.hooks) and all(a == b and _same(x, known()) for (a, x), (b, known) in pairs)
        if same:
            self.numbers = numbers
        return same


def _numbers_of_hooks(module: hooks.Owner) -> list[int]:
    """PyTorch gives each registration a number of its own."""
    return [*vars(module)["_forward_pre_hooks"], *vars(module)["_forward_hooks"]]


def _reference_to(x: Any) -> Callable[[], Any]:
    """Weakly, since it may hold its module; but for objects with slots alone, which cannot be referred to so."""
    try:
        return weakref.WeakMethod(x) if isinstance(x, types.MethodType) else weakref.ref(x)
    except TypeError:
        return lambda: x


def _same(x: Any, known: Any) -> bool:
    """A method is made anew whenever it is asked for."""
    return x is known or (isinstance(x, types.MethodType) and x == known)


def _unbound(value: Any, module: hooks.Owner) -> Any:
    """Of a method of this module its function: the method itself may be another object each time."""
    return value.__func__ if isinstance(value, types.MethodType) and value.__self__ is module else value


_parallelized: weakref.WeakKeyDictionary[nn.Module, Parallelized] = weakref.WeakKeyDictionary()
_untouched: weakref.WeakKeyDictionary[nn.Module, Parallelized] = weakref.WeakKeyDictionary()
"""Models that `parallelize` was never called with, and run on one rank with handles."""


def remember(
    model: nn.Module,
    sequence: SequenceParallel,
    layers: Mapping[str, tuple[nn.Module, adapters.Adapter]],
    own: Iterable[SequenceParallel],
    before: States,
    look: Look | None,
) -> None:
    """Remember what `parallelize` was called with, and have each forward look if the model is still that.

    `before` is what its modules were before `parallelize`, and `look` is called with those that are others since.
    """
    changes = Changes(before)  # without the hook below, at which other threads wait while these are out
    split = _parallelized[model] = Parallelized(model, sequence, layers, own, changes, look)
    if sequence.size > 1 and sequence.validate != "off":
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        use.tried[model] = split
        before_step(_refuse_to_step)


def _before_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a split model. A copy of it is not known, and looks at nothing; nor is looked again for
    each segment of a stream, or each token (see `check_ranks`)."""
    if torch.compiler.is_compiling() or (split := _parallelized.get(model)) is None:
        return
    if split.sequence.stream is None and split.sequence.size > 1:  # else it is as on one rank now (lasp.unsplit)
        split.refuse_new_layers()
        split.refuse_positions_of_a_slice(args, kwargs)


def _refuse_to_step(optimizer: object) -> None:
    """The same before an optimizer steps, whichever: a forward that is compiled as a whole asks nothing."""
    for split in () if capturing() else list(use.tried.values()):
        split.refuse_new_layers()


def of_untouched(
    model: nn.Module, make: Callable[[], Mapping[str, tuple[nn.Module, adapters.Adapter]]]
) -> Parallelized:
    """Of a model that `parallelize` was never called with, on one rank; `make` finds its layers, once while it has the
    same modules."""
    known = _untouched.get(model)
    if known is None or not known.knows_all(model):
        known = _untouched[model] = Parallelized(model, SequenceParallel(None), make(), [])
    return known


def held_by(model: nn.Module) -> list[Parallelized]:
    """What `parallelize` was called with in this process, of the model and of those in it."""
    return [_parallelized[module] for module in model.modules() if module in _parallelized]


def check_ranks(splits: Iterable[Parallelized], sequence: SequenceParallel) -> None:
    """Raise `ValueError` unless these are the ranks that they are split over, with all of their layers."""
    for split in splits:
        split.refuse_new_layers()
        if split.sequence.ranks != sequence.ranks and (split.sequence.size > 1 or sequence.size > 1):
            raise ValueError(
                f"mesh must be that of lasp.parallelize, which has split the model over the ranks "
                f"{split.sequence.ranks}, got one with {sequence.ranks}"
            )


@contextlib.contextmanager
def under_way(stream: Any, splits: list[Parallelized], model: nn.Module) -> Iterator[None]:
    """Inside, the layers of the model find the stream (a `lasp.ops.stream.Carrier`) at their ranks."""
    held = {id(x): x for m in model.modules() if isinstance(x := getattr(m, "sequence", None), SequenceParallel)}
    held |= {id(x): x for split in splits for x in (split.sequence, *split.own)}  # the border of a model asks its own
    with _entering:  # of several threads one
        busy = next((x.stream for x in held.values() if x.stream is not None), None)
        if busy is not None:
            raise RuntimeError(
                f"{stream.name} was called within "
                + ("another one" if busy.name == stream.name else busy.name)
                + " of the same model, or while it runs in another thread: wait for its end, or take a copy, "
                "made before lasp.parallelize"
            )
        for x in held.values():
            object.__setattr__(x, "stream", stream)
    try:
        yield
    finally:
        for x in held.values():
            object.__setattr__(x, "stream", None)


def known(model: nn.Module) -> list[Parallelized]:
    """The same, or what inference knows of a model that `parallelize` was never called with."""
    return held_by(model) or [x for x in (_untouched.get(model),) if x is not None]


@dataclass(frozen=True)
class _Method:
    """One that was put into a module, which it does not hold."""

    function: Callable[..., Any]

    def of(self, module: nn.Module) -> types.MethodType:
        return types.MethodType(self.function, module)


def _method(value: Any, module: nn.Module) -> Any:
    """A value to keep, which must not keep its module."""
    function = _unbound(value, module)
    return value if function is value else _Method(function)


def _of(value: Any, module: nn.Module) -> Any:
    return value.of(module) if isinstance(value, _Method) else value


def _leads_to(value: Any, function: Callable[..., Any], attributes: Mapping[str, Any]) -> bool:
    """Whether it is this function, or holds it as a decorator does, or names an attribute of its module that does."""
    left, seen = [value], set()
    while left:
        x = left.pop()
        if x is function:
            return True
        if id(x) in seen or isinstance(x, nn.Module) or not callable(x):
            continue
        seen.add(id(x))
        left.append(getattr(x, "__wrapped__", None))
        if isinstance(x, types.MethodType):
            left += [x.__func__, x.__self__]
        elif isinstance(x, functools.partial):
            left += [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, types.FunctionType):
            left += gc.get_referents(*(x.__closure__ or ()))
            left += [attributes[name] for name in x.__code__.co_names if name in attributes]
        else:
            left += vars(x).values() if hasattr(x, "__dict__") else ()
    return False


def _is(now: Any, value: Any, module: nn.Module) -> bool:
    """Whether an attribute has a value that was kept."""
    kept = _method(now, module)
    return kept == value if isinstance(value, _Method) else kept is value


def _difference(
    before: dict[str, Any], module: nn.Module
) -> tuple[dict[str, tuple[Any, Any]], dict[str, dict[Any, tuple[Any, Any]]]]:
    """Attributes that are others now, and of those that are dicts (submodules, hooks) their entries: what they were,
    and are."""
    plain, entries = {}, {}
    for name, now in vars(module).items():
        old = before.get(name, _ABSENT)
        if isinstance(now, dict) and isinstance(old, dict):
            changed = {k: (old.get(k, _ABSENT), x) for k, x in now.items() if old.get(k, _ABSENT) is not x}
            if changed:
                entries[name] = changed
        elif now is not old:
            plain[name] = _method(old, module), _method(now, module)
    return plain, entries


def _restore(module: nn.Module, before: dict[str, Any]) -> None:
    values = vars(module)
    for name in list(values):
        if name not in before:
            del values[name]
    for name, old in before.items():
        now = values.get(name)
        if isinstance(old, dict) and isinstance(now, dict):
            now.clear()  # the same object, to which others refer
            now.update(old)
        else:
            values[name] = old
