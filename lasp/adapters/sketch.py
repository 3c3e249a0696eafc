"""The file that an adapter for a class of another library begins as: what `parallelize` prints where it refuses one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from lasp.adapters.rebind import is_function, names_in

_MOST = 8  # functions that it has a place for


def adapter_for(
    cls: type[nn.Module], below: Mapping[str, nn.Module] = MappingProxyType({}), *, itself: bool = True
) -> list[str]:
    """Lines of Python that stand by themselves. What is to be written raises until it is.

    Args:
        cls: the class of another library.
        below: modules of torch.nn within it that look along the sequence, by their paths from it.
        itself: whether the class does so in its own forward.
    """
    calls = [name for name in sorted(names_in(cls.forward)) if is_function(cls, name)][:_MOST] if itself else []
    again = {"forward": cls} if itself and not calls else {}
    kinds = {f"forward_of_{type(module).__name__}": type(module) for module in below.values()}
    lines = ["import types", ""] if again or kinds else []
    lines += ["import lasp", f"from lasp.adapters import layout_of{', rebind' if calls else ''}", "", ""]
    for name, kind in (again | kinds).items():
        lines += [*_of_forward(name, kind), "", ""]
    lines += ["def split(module, sequence):"]
    lines += _of_functions(cls, calls) if calls else []
    if again:
        lines += ["    module.sequence, module.forward = sequence, types.MethodType(forward, module)"]
    for name, kind in kinds.items():
        lines += [
            f"    for name in {[path for path, module in below.items() if type(module) is kind]}:",
            "        below = module.get_submodule(name)",
            f"        below.sequence, below.forward = sequence, types.MethodType({name}, below)",
        ]
    return [*lines, "", "", _register(cls, tuple(below))]


def _of_functions(cls: type[nn.Module], calls: list[str]) -> list[str]:
    names_held = inspect.unwrap(cls.forward).__globals__
    lines = [
        f"    # {cls.__name__}.forward{signature_of(cls.forward)} calls these.",
        "    # Those that look along the sequence become one of lasp.linear_attention, delta_rule, softmax_attention,",
        "    # causal_conv, halo, with layout=layout_of(sequence), sequence=sequence; delete the others, here and in",
        "    # the last line. What is written out in the forward itself needs one of its own (docs/models.md).",
    ]
    for name in calls:
        lines += [
            f"    def {name}{signature_of(names_held[name])}:",
            f'        raise NotImplementedError("{name}: {cls.__name__}")',
            "",
        ]
    return [*lines, f"    rebind(module, {', '.join(f'{name}={name}' for name in calls)})"]


def _of_forward(name: str, cls: type[nn.Module]) -> list[str]:
    signature = signature_of(cls.forward)
    first = signature[1:-1].split(",")[0]  # not everybody calls it self
    first = f"{first[1:]}[0]" if first.startswith("*") else first
    return [
        f"def {name}{signature}:",
        f"    # That of {cls.__name__} again, in which what looks along the sequence is one of lasp.linear_attention,",
        "    # delta_rule, softmax_attention, causal_conv, halo, with these two:",
        f"    sequence = {first}.sequence",
        "    layout = layout_of(sequence)",
        f'    raise NotImplementedError("the forward of {cls.__name__}")',
    ]


def _register(cls: type[nn.Module], covers: tuple[str, ...]) -> str:
    """By its dotted name, in which * stands for a function that made the class."""
    name = f"*.{cls.__name__}" if "<locals>" in cls.__qualname__ else cls.__qualname__
    more = f", covers={covers}" if covers else ""
    return f"lasp.register({cls.__module__ + '.' + name!r}, adapter=split{more})"


def signature_of(function: Callable[..., Any]) -> str:
    """The signature of a function as it is written, without types; a default that is no plain value is `...`."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):  # one that is not written in Python
        return "(*args, **kwargs)"
    plain = [
        p.replace(annotation=p.empty, default=p.default if _is_plain(p.default) else ...)
        for p in found.parameters.values()
    ]
    text = str(found.replace(parameters=plain, return_annotation=found.empty))
    return text.replace("Ellipsis", "...")


def _is_plain(value: object) -> bool:
    return value is inspect.Parameter.empty or value is None or isinstance(value, (bool, int, str)) or _is_finite(value)


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and value - value == 0
