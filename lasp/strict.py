"""`strict` of `parallelize`: refuse what mixes tokens and has no adapter.

The modules are asked (lasp.checks.trial): the model runs a few times on some 30 tokens, in evaluation and in training,
with gradients, and on some hundred if it is small, on this rank alone, and is left as it was. Where it cannot run so
(weights on the meta device or sharded, unusual inputs, a collective, more than about a second of work) its classes
decide, and `explain` says so: for those of torch.nn a table, for others the names that such layers go by.

When modules of a split model are others than they were, it is asked again (lasp.adapters.handles). Where that cannot
be, the new modules are run by themselves, and only of those that do not run so the class decides, with a warning. The
same holds for forward hooks; of one that does not run nothing is known but that, with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from lasp import adapters
from lasp.adapters import Adapter, sketch
from lasp.checks import hooks, trial
from lasp.checks.forward import places_of
from lasp.checks.torch_modules import has_forward_of_torch, is_of_torch, kind_of
from lasp.checks.use import of_a_pickle
from lasp.modules import OPERATOR_MODULES

Layers = Mapping[str, tuple[nn.Module, Adapter]]

_MIXER_NAMES = re.compile(
    r"attention|attn|conv(?!ert)|mixer|mamba|ssm|ssd|rwkv|hyena|retention|delta_?net|hgrn|lstm|gru|recurren|"
    r"(token|time)_?(shift|mix)|ngram|sdpa|(?-i:MHA|MQA|GQA|MLA|S4|S5|H3|RNN)",
    re.IGNORECASE,
)
# A library puts the model's name before all of its classes, as in Mamba2RMSNorm.
_LOCAL_NAMES = re.compile(
    r"(norm|mlp|glu|ffn|feed_?forward|(rotary|position\w*|word|token)_?embeddings?|rope|experts?|router|linear|head)\d?d?$",
    re.IGNORECASE,
)
_OWN = OPERATOR_MODULES  # which do as they say
_LISTED = 8  # of what is refused, or could not be asked


@dataclass(frozen=True)
class Asked:
    """What came out of it for a model that is not refused."""

    not_asked: str = ""  # what could not be asked, in words for `explain`
    positions: str = ""  # the argument that the model must be given, lest it counts positions from 0 on its slice


def refuse_mixers(
    model: nn.Module,
    layers: Layers,
    changed: Mapping[str, nn.Module] | None = None,
    hooked: Container[hooks.Owner] | None = None,
) -> Asked:
    """Raise `ValueError` if a module mixes tokens and no adapter takes care of it, or a forward hook.

    Args:
        model: as its user made it; nothing of it is split now.
        layers: those with an adapter.
        changed: the modules, by path, that have come into the model since it was asked last; None if it never was. If
            it cannot be tried as a whole these are, and of no others the class decides.
        hooked: those whose hooks have changed since; None: it was never asked.
    """
    _refuse_counts_of_words(model, layers)
    split = {path: module for path, (module, adapter) in layers.items() if adapters.passes_ranks(adapter)}
    with adapters.standing_in(model, layers.values()):
        answers = trial.ask(model, split, changed)
    modules = dict(model.named_modules())
    named = {hook.name: hook for hook in hooks.hooks_of(model)}
    found = {path: how for path, how in answers.mixing.items() if path not in named and not _covered(path, layers)}
    named = {name: hook for name, hook in named.items() if not _left(hook.path, layers)}
    in_hooks = {name: how for name, how in answers.mixing.items() if name in named}
    for path, name in answers.forgot_ranks.items():
        if not _covered(path, layers):
            found[path] = (
                f"it calls lasp.{name} without sequence=self.sequence"
                if path in split
                else f"it calls lasp.{name}, but its class is not registered"
            )
    for path in split:
        if path in answers.asked and path not in found and not _gave_ranks(path, answers.gave_ranks):
            found[path] = "it is registered, but gives its sequence= to no operator of lasp"
    unasked = [p for p in modules if p not in answers.asked and not _left(p, layers)]
    unasked = [p for p in unasked if not _is_weight_holder(p, {**layers, **found}, answers)]
    if changed is not None:
        unasked = [path for path in unasked if path in changed]
    by_class = {path: how for path in unasked if (how := _by_class(path, modules[path], layers))}
    found |= {path: how for path, how in by_class.items() if not any(p.startswith(f"{path}.") for p in by_class)}
    if found or in_hooks:
        raise ValueError(_refusal(found, in_hooks, modules, answers))
    silent = [name for name in named.keys() - answers.asked if hooked is None or named[name].owner in hooked]
    told = [_what_was_not_asked(unasked, modules, answers), _hooks_not_asked(sorted(silent))]
    return Asked("; and ".join(filter(None, told)), answers.counts_positions.get("", ""))


class NeedsPositions:
    """A hook before the forward of a model that would count positions from 0 where none are given."""

    def __init__(self, model: nn.Module, argument: str):
        places = places_of(model)
        self.argument = argument
        self.place = places.index(argument) if argument in places else len(places)

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:  # noqa: D102
        given = args[self.place] if self.place < len(args) else kwargs.get(self.argument)
        if given is None:
            raise ValueError(
                f"{self.argument} is needed where the sequence is split: without it {type(model).__name__} counts "
                "positions from 0 on each rank; lasp.shard_batch makes local['position_ids']"
            )

    def __deepcopy__(self, memo: object) -> NeedsPositions:
        return self  # a copy of the model is split over the same ranks

    def __reduce__(self):
        """Pickled with the model, which then is not split, it does nothing."""
        return of_a_pickle, ()


def _refuse_counts_of_words(model: nn.Module, layers: Layers) -> None:
    """Raise for tables of words that no trial tells: outputs and gradients of inputs are those of the whole."""
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or _covered(path, layers):
            continue
        if module.scale_grad_by_freq:
            how = "scale_grad_by_freq=True divides a word's gradient by how often it occurs in the slice alone"
        elif module.max_norm is not None:
            how = f"max_norm={module.max_norm} writes to the rows of the slice's words: weights of ranks would differ"
        else:
            continue
        raise ValueError(
            f"cannot split the sequence of: {path or 'the model itself'} ({type(module).__name__}): {how}. Leave the "
            f"option out; if that is what you want, plan={{{path!r}: lasp.adapters.token_local}}"
        )


def _covered(path: str, layers: Layers) -> bool:
    """Whether an adapter answers for a module: its own, or else that of the nearest module around it."""
    around = next((p for p in _upwards(path) if p in layers), None)
    return around is not None and adapters.covers(layers[around][1], path[len(around) :].lstrip("."))


def _left(path: str, layers: Layers) -> bool:
    """Whether a plan leaves what is at that path to each rank."""
    around = next((p for p in _upwards(path) if p in layers), None)
    return around is not None and layers[around][1] is adapters.token_local


def _upwards(path: str) -> Iterator[str]:
    """A module's path, and those of the modules around it; the last is that of the model, empty."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _gave_ranks(path: str, gave: set[str]) -> bool:
    """Itself, or a registered layer within it, for which it is only the frame."""
    return any(p == path or not path or p.startswith(f"{path}.") for p in gave)


def _is_weight_holder(path: str, known: Mapping[str, object], answers: trial.Answers) -> bool:
    """Whether a module was not called though the known layer around it was: that takes the weights elsewhere."""
    return next((around in known for around in _upwards(path) if around in answers.asked), False)


def _by_class(path: str, module: nn.Module, layers: Layers) -> str:
    """Why a module that could not be asked is refused; empty if it is not."""
    if path in layers or _covered(path, layers):
        return ""
    if is_of_torch(module):
        kinds = {"mixes": "its class mixes tokens", "depends": "its class may mix tokens, by how it is used"}
        return kinds.get(kind_of(module) or "", "")
    if adapters.known_to_mix(module):
        return "its class mixes tokens"
    name = type(module).__name__
    # A block that holds a known layer, such as an attention block around LightningAttention, mixes through it.
    if any(not path or known.startswith(f"{path}.") for known in layers):
        return ""
    if _MIXER_NAMES.search(name) and not _LOCAL_NAMES.search(name):
        return "by its name it mixes tokens"
    return {"mixes": "the class that it derives from mixes tokens"}.get(kind_of(module) or "", "")


def _what_was_not_asked(unasked: list[str], modules: Mapping[str, nn.Module], answers: trial.Answers) -> str:
    paths = [p for p in unasked if not has_forward_of_torch(modules[p]) and not isinstance(modules[p], _OWN)]
    if not paths:
        return ""
    listed = ", ".join(_name(path, modules) for path in paths[:_LISTED])
    more = f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else ""
    why = "; ".join(dict.fromkeys(answers.silent.values()))
    return f"whether they mix tokens was told by name, not by a trial: {listed}{more}" + (f" ({why})" if why else "")


def _hooks_not_asked(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    told = "whether they mix tokens could not be tried: "
    return told + "; ".join(names[:_LISTED]) + more if names else ""


def _name(path: str, modules: Mapping[str, nn.Module]) -> str:
    return f"{path or 'the model itself'} ({type(modules[path]).__name__})"


# The message


def _refusal(
    found: Mapping[str, str], in_hooks: Mapping[str, str], modules: Mapping[str, nn.Module], answers: trial.Answers
) -> str:
    listed = [f"{_name(path, modules)}: {how}" for path, how in found.items()]
    listed += [f"{name}: {how}" for name, how in in_hooks.items()]
    more = [f"and {len(listed) - _LISTED} more"] if len(listed) > _LISTED else []
    why = "; ".join(dict.fromkeys(answers.silent.values()))
    return "\n".join(
        [
            "cannot split the sequence of: " + "; ".join([*listed[:_LISTED], *more]),
            *(_advice(found, modules) if found else []),
            *([_OF_HOOKS] if in_hooks else []),
            *([f"Of what could not be tried the class decided: {why}"] if why and found else []),
        ]
    )


_OF_POSITIONS = (
    "If it counts positions from 0, as for rotary ones, let it take position_ids, which the model's forward hands on "
    "(docs/guide.md)."
)
_OF_HOOKS = (
    "A forward hook is given the tokens of this rank only: what it does along the sequence belongs into a module that "
    "calls an operator of lasp (docs/models.md)."
)


def _advice(found: Mapping[str, str], modules: Mapping[str, nn.Module]) -> list[str]:
    told_apart = (trial.COUNTED, trial.DRAWS)
    path = next((path for path, how in found.items() if how not in told_apart), next(iter(found)))
    advice = [
        "What mixes tokens by itself is wrong on a slice of the sequence. Let it call an operator of lasp, which takes "
        f"the ranks; for {path or 'the model'}:",
        *(f"    {line}" for line in _three_lines(path, modules)),
        *([_OF_POSITIONS] if not is_of_torch(modules[path]) and trial.COUNTED not in found.values() else []),
        "If that class is not yours, an adapter does the same from outside (docs/models.md): a file to be completed,",
        "",
        *_adapter_for(path, [p for p, how in found.items() if how not in told_apart] or [path], modules),
        "",
        f"Only if it mixes no tokens: plan={{{path!r}: lasp.adapters.token_local}}.",
    ]
    if all(how == trial.DRAWS for how in found.values()):
        advice = [
            "What it draws on a slice is not what it draws on the whole. Let it draw in training only, as "
            "F.dropout(x, p, self.training) does, or, if it mixes no tokens by that, "
            f"plan={{{path!r}: lasp.adapters.token_local}}."
        ]
    counted = (
        f"Let the forward of {type(modules['']).__name__} take position_ids and hand them on to what counts, and call "
        "it as model(local['input_ids'], local['position_ids'])."
    )
    if found[path] == trial.COUNTED:
        advice = [counted]
    elif trial.COUNTED in found.values():
        advice += ["Positions that it counts from 0: " + counted[0].lower() + counted[1:]]
    return advice


def _around(path: str, modules: Mapping[str, nn.Module]) -> str:
    """The path of a module, or for one of torch.nn that of the module around it whose forward can be changed."""
    return next((p for p in _upwards(path) if not is_of_torch(modules[p])), path)


def _adapter_for(path: str, refused: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The file for the class of a module, with the refused ones of torch.nn for which it answers."""
    around = _around(path, modules)
    below = {p[len(around) :].lstrip("."): modules[p] for p in refused if p != around and _around(p, modules) == around}
    return sketch.adapter_for(type(modules[around]), below, itself=around in refused)


def _three_lines(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """A registered class for a module, with the operator that fits: its own, or for one of torch.nn the one around."""
    module = modules[path]
    around = _around(path, modules)
    owner = "MyLayer" if is_of_torch(modules[around]) else type(modules[around]).__name__
    below = path[len(around) :].lstrip(".")
    name = f"self.{below}" if below and owner != "MyLayer" else "self"
    return [
        "@lasp.register",
        f"class {owner}(nn.Module):",
        "    sequence = None  # lasp.parallelize sets it",
        f"    ...  # in its forward: {_operator_for(module, name)}",
    ]


def _operator_for(module: nn.Module, name: str) -> str:
    kind = type(module).__name__.lower()
    if isinstance(module, nn.Conv1d) and module.groups == module.in_channels:
        weight = f"{name}.weight.squeeze(1), {name}.bias"
        return f"y = lasp.causal_conv(x, {weight}, sequence=self.sequence)  # x [B, T, C]"
    if "conv" in kind:
        return "x = lasp.halo(x, width, sequence=self.sequence)  # [B, width - 1 + T, C]; then no padding"
    if re.search(r"pad|shift|pool|unfold|time_?mix|rwkv", kind):
        return "x = lasp.halo(x, 2, sequence=self.sequence)  # with the token before; [:, :-1] is x shifted"
    if re.search(r"delta", kind):
        return "o, _ = lasp.delta_rule(q, k, v, beta, sequence=self.sequence)"
    if re.search(r"linear|lightning|retention|gla|ssm|ssd|mamba|hgrn", kind):
        return "o, _ = lasp.linear_attention(q, k, v, log_decay=log_decay, sequence=self.sequence)"
    if re.search(r"attention|attn|mha|mqa|gqa|mla|sdpa|transformer", kind):
        return "o = lasp.softmax_attention(q, k, v, sequence=self.sequence)  # or linear_attention, delta_rule"
    return "one of linear_attention, delta_rule, softmax_attention, causal_conv, halo, with sequence=self.sequence"
