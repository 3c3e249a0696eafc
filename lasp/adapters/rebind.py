"""`rebind`: a module's own forward, in which some of the functions that it calls are others.

A layer of another library is often right as it is but for one function that looks along the sequence: a scan, a
convolution, attention. That function is a global name of the file in which the layer stands. To put another in its
place in that file would change every model of the process. So this instance gets a forward of its own: the same code,
with a copy of the file's names in which a few mean something else.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_MARK = "_lasp_rebound"


def rebind(module: nn.Module, method: str = "forward", /, **names: Any) -> None:
    """Give this instance a `forward` (or another method) in which these global names mean something else.

    The class, its file and other instances stay as they are; so do parameters, buffers and `state_dict`. A copy of the
    module (`copy.deepcopy`) has it too, a pickled one has not.

    Args:
        module: the instance.
        method: which of its methods; those that it calls in turn keep their names.
        names: what each global name is to be.

    Raises:
        TypeError: the method is no plain function, or its class checkpoints in it.
        ValueError: the code does not use one of the names: then the library has changed, and an adapter that was
            written for what it was may no longer be right.
    """
    given = getattr(type(module), method, None)
    if given is None:
        raise TypeError(f"{type(module).__qualname__} has no method {method!r}")
    function = inspect.unwrap(given)  # decorators hand arguments on, and warn of old ones
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{type(module).__qualname__}.{method} must be a function, got {function!r}")
    if hasattr(module, "gradient_checkpointing") and method == "forward":
        raise TypeError(f"{type(module).__qualname__} checkpoints itself around its forward, which would be lost")
    used = names_in(function)
    if missing := sorted(set(names) - used):
        library = function.__module__.partition(".")[0]
        raise ValueError(
            f"{type(module).__qualname__}.{method} does not use {', '.join(missing)}"
            + (f": {of_another_version(library)}" if library in TESTED else "")
            + f"; what it uses is {', '.join(sorted(used & function.__globals__.keys()))}"
        )
    # A code object of its own: what torch.compile keeps of a function, it keeps by that.
    own = types.FunctionType(
        function.__code__.replace(),
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    own.__dict__.update(function.__dict__)
    own.__signature__ = inspect.signature(given)  # type: ignore[attr-defined]  # models ask it what a forward takes
    put(module, method, own)


def put(module: nn.Module, method: str, function: Callable[..., Any]) -> None:
    """Give this instance a method: a function whose first argument is the module, and which holds no module itself, so
    that a copy of the module has a method of its own."""
    setattr(function, _MARK, method)
    setattr(module, method, types.MethodType(function, module))


def was_put(value: Any) -> bool:
    """Whether it is a method that was put into a module."""
    return isinstance(value, types.MethodType) and hasattr(value.__func__, _MARK)


def names_in(function: Callable[..., Any]) -> set[str]:
    """The names that a function's code uses, those of functions inside it too.

    Args:
        function: a plain function; what decorators have wrapped is looked for.

    Returns:
        Names of globals and of attributes.
    """
    code = inspect.unwrap(function).__code__

    def names(code: types.CodeType) -> set[str]:
        return set(code.co_names).union(*(names(x) for x in code.co_consts if isinstance(x, types.CodeType)))

    return names(code)


def is_function(cls: type[nn.Module], name: str) -> bool:
    """Whether a name that the forward of a class uses is a function of its file, or of one that it imports from.

    Args:
        cls: the module class.
        name: the global name.

    Returns:
        False also where the file has no such name, or it is a class.
    """
    found = inspect.unwrap(cls.forward).__globals__.get(name)
    return callable(found) and not isinstance(found, type)


def of_another_version(library: str) -> str:
    """In words, that an adapter is for another version of a library, with what it was tested with."""
    return f"this adapter is for another version of {library} ({tested_with(library)})"


def tested_with(library: str) -> str:
    """In words, the version of a library that adapters were tested with, and the one that is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        here = version({"fla": "flash-linear-attention"}.get(library, library))
    except PackageNotFoundError:
        return "of which no version is installed"
    tested = TESTED.get(library)
    return f"tested with {tested}; here is {here}" if tested else f"here is {here}"


TESTED = {"transformers": "5.24", "fla": "0.6.0"}


@contextlib.contextmanager
def without_methods(model: nn.Module) -> Iterator[None]:
    """Inside, all methods that were put into modules of the model are gone; not what else somebody calls them."""
    taken = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if was_put(value) and getattr(value.__func__, _MARK) == name:
                taken.append((module, name, value))
                delattr(module, name)
    try:
        yield
    finally:
        for module, name, value in taken:
            setattr(module, name, value)
