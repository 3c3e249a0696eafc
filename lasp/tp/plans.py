"""Which weights of the layers of lasp.models are cut, and how: by heads, or by inner channels.

A layer between the residual stream and its last linear layer is cut whole: what it reads is the stream, of which each
rank computes the same, what it gives is a sum over heads, or over inner channels. Whatever in it is not cut (a norm of
each head, an inner layer of low rank) is the same on all ranks, and its gradient is the sum of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lasp.models import linear_transformer, mixers, tnl
from lasp.models.decoder import Decoder, DecoderBlock
from lasp.models.linear_transformer import LinearTransformer
from lasp.models.tnl import TNL
from lasp.models.trunk import LanguageModel
from lasp.modules import CausalConv

MODELS = (TNL, Decoder, LinearTransformer)


@dataclass(frozen=True)
class Plan:
    """How a class of layers is cut; names of submodules and of parameters of its own.

    Args:
        cut: these along their outputs, the first dimension of what they hold: each rank has some heads or channels.
        out: the last linear layer, along its inputs. It gives the sum of all ranks.
        between: a linear layer within, likewise.
        shared: not cut, of all heads alike.
        norm: an RMS norm over all heads or channels.
        heads: what has a fixed decay, or positions, of each head.
        divided: attributes that are numbers of heads or channels.
        enters: the submodule that the stream enters, "" for the layer itself; None if it says by itself where
            (its attribute `parts`).
    """

    cut: tuple[str, ...]
    out: str = "out"
    between: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    norm: str | None = None
    heads: tuple[str, ...] = ()
    divided: tuple[str, ...] = ("heads",)
    enters: str | None = ""


_QKV = ("query", "key", "value")
_DELTA = (*_QKV, "query_conv", "key_conv", "value_conv", "beta")
_ATTENTION = ("attention",)

PLANS: dict[type[nn.Module], Plan] = {
    tnl.GatedLinearAttention: Plan((*_QKV, "gate"), heads=("attention", "lrpe"), enters=None),
    tnl.SimpleGLU: Plan(("value", "gate"), divided=(), enters=None),
    linear_transformer.MultiHeadLinearAttention: Plan(_QKV),
    linear_transformer.Block: Plan(("mlp.0",), "mlp.2", divided=(), enters="mlp"),
    DecoderBlock: Plan(("value", "gate"), shared=("norm",), divided=(), enters=None),
    mixers.SoftmaxMixer: Plan(_QKV),
    mixers.BlockSoftmax: Plan(_QKV),
    mixers.NormAttention: Plan(_QKV),
    mixers.CosFormer2: Plan((*_QKV, "gate.1"), shared=("gate.0",), heads=("lrpe",)),
    mixers.Retention: Plan((*_QKV, "gate"), heads=_ATTENTION),
    mixers.GLA: Plan((*_QKV, "gate", "decay.1"), shared=("decay.0", "norm")),
    mixers.HGRN2: Plan(("query", "forget", "value")),
    mixers.DeltaNet: Plan(_DELTA, shared=("norm",)),
    mixers.GatedDeltaNet: Plan((*_DELTA, "rate", "gate", "log_rate", "rate_bias"), shared=("norm",)),
    mixers.KDA: Plan(
        (*_DELTA, "rate.1", "gate.1", "log_rate", "rate_bias"), shared=("norm", "rate.0", "gate.0")
    ),
    mixers.Mamba2: Plan(
        ("gate", "value", "rate", "log_rate", "rate_bias", "skip"),
        shared=("keys", "conv"),
        norm="norm",
        divided=("heads", "width"),
    ),
    mixers.HGRN: Plan(("value", "forget", "gate"), norm="norm", divided=()),
    mixers.Mamba: Plan(
        ("value", "gate", "conv", "time", "log_rate", "time_bias", "skip"), between=("keys",), divided=()
    ),
    mixers.RGLRU: Plan(
        ("value", "gate", "conv", "input_gate", "recurrence_gate", "input_bias", "recurrence_bias", "rate")
    ),
}  # fmt: skip


def check_model(model: LanguageModel, ranks: int) -> None:
    """Raise for what cannot be split over so many ranks, naming it."""
    name = type(model).__name__
    if type(model) not in MODELS:
        raise ValueError(
            f"model must be one of lasp.models (TNL, Decoder, LinearTransformer), as it was made, got {name}: there is "
            "no plan for the weights of others"
        )
    config: Any = model.config
    for option, none in (("experts", 0), ("attention_experts", 0), ("tpe", False)):
        if found := getattr(config, option, none):
            raise ValueError(
                f"model must have {option} = {none} for tensor parallelism, got {found}: there is no plan for these "
                "weights"
            )
    _check_ends(model)
    _check_layers(model)
    _check_places(model)
    inner = "mlp_width" if isinstance(model, LinearTransformer) else "glu_width"
    for field in ("heads", "width", inner, "vocab_size"):
        size = getattr(config, field)
        if size % ranks:
            raise ValueError(f"the {ranks} ranks of tp must divide {field} of the {name}, got {size}")


def _check_layers(model: LanguageModel) -> None:
    """Raise unless the layers are those that the plans are for."""
    for path, module in model.named_modules():
        if isinstance(module, mixers.Mixer) and type(module) not in PLANS:
            raise ValueError(f"model must have layers with a plan, got {path}, a {type(module).__name__}")
        plan = PLANS.get(type(module))
        if plan is None:
            continue
        for name in (*plan.cut, plan.out, *plan.between, *plan.shared):
            _check_part(f"{path}.{name}", _part(module, name), nn.Parameter, nn.Linear, nn.RMSNorm, CausalConv)
        for name in plan.between:
            _check_option(f"{path}.{name}", "bias", _part(module, name).bias)
        if plan.norm is not None:
            _check_part(f"{path}.{plan.norm}", _part(module, plan.norm), nn.RMSNorm)


def _check_ends(model: LanguageModel) -> None:
    """Raise unless the embedding only looks up weights, and the head only multiplies by them."""
    _check_part("embedding", model.embedding, nn.Embedding)
    _check_part("head", model.head, nn.Linear)
    for option in ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"):
        _check_option("embedding", option, getattr(model.embedding, option))
    _check_option("head", "bias", model.head.bias)
    shape = (model.config.vocab_size, model.config.width)  # type: ignore[union-attr,operator]
    for path in ("embedding", "head"):
        if (found := tuple(model.get_submodule(path).weight.shape)) != shape:  # type: ignore[operator]
            raise ValueError(f"model must have {path}.weight of shape {shape}, as its config says, got {found}")


def _check_places(model: LanguageModel) -> None:
    """Raise for a parameter at two places: each would get a part of its own."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := first.setdefault(id(parameter), name)) != name:
            raise ValueError(
                f"model must have no parameter at two places for tensor parallelism, got {other} and {name}, which are "
                "the same: each place would get one of its own"
            )


def _part(module: nn.Module, name: str) -> Any:
    return module._parameters.get(name) if name in module._parameters else module.get_submodule(name)


def _check_part(path: str, part: Any, *types: type) -> None:
    if type(part) not in types:
        raise ValueError(f"model must have its own layers, got {path}, a {type(part).__name__}")
    if isinstance(part, nn.Module) and "forward" in part.__dict__:
        raise ValueError(f"model must have its own layers, got {path}, whose `forward` something has replaced")


def _check_option(path: str, option: str, found: Any) -> None:
    if found is not None and found is not False:
        told = "one" if option == "bias" else found
        raise ValueError(
            f"model must have {path} without {option} for tensor parallelism, got {told}: parts would leave it out"
        )
