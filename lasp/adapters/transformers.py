"""Layers of Hugging Face's transformers, by the function that looks along the sequence.

Since version 5 the layers of one family are one text: each forward calls a few global functions, and what such a
function is of lasp's operators does not depend on the model that calls it. So there is an adapter for a function, and
a layer takes those whose names its forward uses (`rebind`):

    causal_conv1d_fn                      lasp.causal_conv
    mamba2_chunk_scan                     lasp.linear_attention, a decay per token
    torch_chunk_gated_delta_rule ...      lasp.delta_rule
    attention, through the registry       lasp.softmax_attention

What else the layers do (projections, norms, gates, rotary, padding masks) is their own code. Where a scan is written
out in a forward, the layer has an adapter of its own, by its class (`_CLASSES`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import AttentionMaskInterface

from lasp import arguments
from lasp.adapters import Foreign
from lasp.adapters._common import fixed_decay, needs, no_cache, with_forward
from lasp.adapters._scans import gated_delta_rule, mamba2_scan, rnn_scan, selective_scan
from lasp.adapters.border import facts_of, layout_of
from lasp.adapters.rebind import names_in, put, rebind
from lasp.batch import unshard_sequence
from lasp.checks.use import of_a_pickle
from lasp.ops.attention import linear_attention
from lasp.ops.halo import causal_conv
from lasp.ops.session import Session
from lasp.ops.softmax import softmax_attention
from lasp.ranks import SequenceParallel
from lasp.ranks.collectives import gather_tokens
from lasp_kernels import state_dtype

Adapter = Callable[[nn.Module, SequenceParallel], None]
Make = Callable[[SequenceParallel], Callable[..., Any]]


def adapter_of(module: nn.Module) -> Foreign | None:
    """The adapter of a module of this library; None if its forward calls nothing that looks along the sequence."""
    name = type(module).__name__
    if name in _CLASSES:
        return _CLASSES[name]
    if type(module).forward is nn.Module.forward:
        return None
    uses = names_in(type(module).forward)
    if any(_MIXES.search(name) for name in uses - _KNOWN if callable(_global(module, name))):
        return None  # it does more than is known here
    if _BY_FUNCTION.keys() & uses:
        return Foreign(functools.partial(_rebind_known, uses=frozenset(uses)), ())
    if "ALL_ATTENTION_FUNCTIONS" in uses and getattr(module, "is_causal", True):
        if uses & {"arange", "cumsum", "get_seq_length"} and name not in _POSITIONS_FROM_CACHE:
            return None  # it counts tokens by itself
        return Foreign(attention, ())
    if getattr(module, "rope_type", None) is not None and _is_dynamic(module):
        return Foreign(dynamic_rotary, (), exchanges=False)
    return None


def _rebind_known(module: nn.Module, sequence: SequenceParallel, uses: frozenset[str]) -> None:
    """Put lasp's operators in the place of the functions that the forward calls, and close what goes around them."""
    module.sequence = sequence  # type: ignore[assignment]
    names = {name: make(sequence) for name, make in _BY_FUNCTION.items() if name in uses}
    names |= {name: _no_fused_path for name in _FUSED if name in uses}
    names |= {name: _refuse_step for name in _STEPS if name in uses}
    rebind(module, **names)


def _no_fused_path(*_: Any, **__: Any) -> None:
    """What the library's own fallback returns: the forward then goes step by step, through the functions above."""


def _refuse_step(*_: Any, **__: Any) -> None:
    raise RuntimeError("a decoding step of a layer whose sequence is split: pass use_cache=False, one rank can decode")


# Functions


def _conv(sequence: SequenceParallel) -> Callable[..., Tensor]:
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        **_: Any,
    ) -> Tensor:
        """Short convolution of hidden_states [B, C, T] with weight [C, W]."""
        no_cache(initial_states=initial_states, return_final_states=return_final_states)
        x = hidden_states.to(weight.dtype).transpose(1, 2)
        y = causal_conv(x, weight, bias, layout=layout_of(sequence), sequence=sequence).transpose(1, 2)
        return (y if activation is None else ACT2FN[activation](y)).to(hidden_states.dtype)

    return causal_conv1d_fn


def _ssd(sequence: SequenceParallel) -> Callable[..., Tensor]:
    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **_: Any,
    ) -> Tensor:
        """x [B, T, H, P], dt [B, T, H], A [H], B and C [B, T, G, N]; fp32 where the library computes in it."""
        no_cache(initial_states=initial_states, return_final_states=return_final_states)
        x, wide = hidden_states, state_dtype(hidden_states.dtype)
        dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).to(wide)
        B, C = (y.to(x.dtype) for y in (B, C))
        y = mamba2_scan(x, dt, A.to(wide), B, C, D, layout=layout_of(sequence), sequence=sequence)
        return (y if z is None else y * F.silu(z)).contiguous()  # FalconH1 views it

    return mamba2_chunk_scan


def _delta(sequence: SequenceParallel) -> Callable[..., tuple[Tensor, None]]:
    def chunk_rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """q and k [B, T, H, K], v [B, T, H, V], beta [B, T, H], g [B, T, H] or [B, T, H, K]."""
        no_cache(initial_state=initial_state, output_final_state=output_final_state)
        layout, normalize = layout_of(sequence), use_qk_l2norm_in_kernel
        o = gated_delta_rule(query, key, value, beta, g, normalize=normalize, layout=layout, sequence=sequence)
        return o.to(query.dtype).contiguous(), None

    return chunk_rule


def _selective(sequence: SequenceParallel) -> Callable[..., Tensor]:
    """Mamba's scan (arXiv 2312.00752, algorithm 2): a state of N numbers a channel, each with a decay of its own."""

    def mamba_selective_scan(
        *given: Any,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **more: Any,
    ) -> Tensor:
        """x, dt and z [B, D, T], A [D, N], B and C [B, N, T]; the last two choose how the library would scan."""
        no_cache(return_last_state=return_last_state)
        return selective_scan(*given, **more, layout=layout_of(sequence), sequence=sequence)

    return mamba_selective_scan


_BY_FUNCTION: dict[str, Make] = {
    "causal_conv1d_fn": _conv,
    "mamba2_chunk_scan": _ssd,
    "mamba_selective_scan": _selective,
    "torch_chunk_gated_delta_rule": _delta,
    "chunk_kimi_delta_attention": _delta,
}
_FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")  # paths around these functions
_STEPS = (  # of a token, with a cache
    "causal_conv1d_update",
    "mamba2_selective_state_update",
    "mamba_selective_state_update",
    "torch_recurrent_gated_delta_rule",
    "recurrent_kimi_delta_attention",
)


_POSITIONS_FROM_CACHE = {"IdeficsAttention", "Pix2StructTextAttention"}  # which ask a cache for its length, and no more
_KNOWN = {*_BY_FUNCTION, *_FUSED, *_STEPS, "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"}
_MIXES = re.compile(
    r"inner_fn|fused|conv1d|scan|delta_rule|(?<!_)attention(_forward)?$|_attention\b|recurrent|rnn|gla\b|rwkv|retention"
)


def _global(module: nn.Module, name: str) -> Any:
    return inspect.unwrap(type(module).forward).__globals__.get(name)


# Classes


def _lightning_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """MiniMax, whose loop over blocks is written out in its forward: lightning attention with its fixed decays;
    activation, norm over all heads and gate as the layer has them."""
    no_cache(cache=kwargs.get("cache"), past_key_values=kwargs.get("past_key_values"))
    batch, tokens, _ = hidden_states.shape
    qkv = self.act_fn(self.qkv_proj(hidden_states))
    if attention_mask is not None:
        qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
    q, k, v = qkv.view(batch, tokens, self.num_attention_heads, 3 * self.head_dim).split(self.head_dim, 3)
    o, _ = linear_attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        log_decay=fixed_decay(self, _formula, q),
        layout=layout_of(self.sequence),
        sequence=self.sequence,
    )
    o = self.norm(o.reshape(batch, tokens, -1))
    return self.out_proj(F.sigmoid(self.output_gate(hidden_states)) * o), None


def _formula(module: Any) -> Tensor:
    """The log-decays of a layer, whose buffer may have been rounded by a cast of the model."""
    return -module.get_slope_rate()


def griffin(module: nn.Module, sequence: SequenceParallel) -> None:
    """RecurrentGemma's recurrent block (arXiv 2402.19427, section 2.4): a convolution and an RG-LRU, both below it."""
    block: Any = module
    for part in (block, block.conv_1d, block.rg_lru):
        part.sequence = sequence
    needs(block.rg_lru, "_rnn_scan")
    put(block.rg_lru, "_rnn_scan", _rnn_scan)
    put(block.conv_1d, "forward", _padded_conv)


def _rnn_scan(
    self: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, None]:
    no_cache(recurrent_states=recurrent_states)
    return rnn_scan(hidden_states, recurrent_gate, reset, layout=layout_of(self.sequence), sequence=self.sequence), None


def _padded_conv(self: Any, x: Tensor) -> Tensor:
    """The forward of an nn.Conv1d that is padded on both sides, and of which its owner keeps the first T outputs."""
    layout, weight = layout_of(self.sequence), self.weight.squeeze(1)
    return causal_conv(x.transpose(1, 2), weight, self.bias, layout=layout, sequence=self.sequence).transpose(1, 2)


# Softmax attention


@dataclass(frozen=True)
class Mask:
    """What a model's mask function gives instead of a mask: causality is lasp's, and the borders of documents."""

    window: int | None  # of tokens that one sees, itself included
    real: Tensor | None  # [B, T], bool: which of this rank's tokens are no padding


_MASKS = ("and_masks", "sliding_window_overlay", "packed_sequence_mask_function", "remap_positions_for_packed_sequence")
_NOT_OF_ATTENTION = {  # arguments of a model that it hands on to its layers
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "is_causal",
    "num_items_in_batch",
    "logits_to_keep",
    "position_embeddings",
}


def attention(module: nn.Module, sequence: SequenceParallel) -> None:
    """Any layer that takes its attention from the registry. `prepare` sets the model's config to it."""
    module.sequence = sequence  # type: ignore[assignment]


def lasp_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Heads first, [B, H, T, D], as transformers calls it; what it gives has tokens first."""
    if not isinstance(attention_mask, Mask):
        raise ValueError(
            f"{type(module).__name__} was given a mask of its own making, which lasp does not know how to split: "
            f"{arguments.shown(attention_mask)}"
        )
    unknown = [name for name, x in others.items() if name not in _NOT_OF_ATTENTION and x is not None and x is not False]
    if unknown or others.get("is_causal") is False or others.get("output_attentions"):
        what = ", ".join(unknown) or "attention that is not causal, or its weights"
        raise ValueError(f"{type(module).__name__} asks for {what}, which lasp.softmax_attention has not got")
    window = attention_mask.window
    if sliding_window is not None and window is not None and sliding_window != window:
        raise ValueError(f"sliding_window must be that of the mask, {window}, got {sliding_window}")
    layout, mask = None, attention_mask.real
    if module.sequence is not None:  # it is None in a model that came from a pickle, which is not split
        facts = facts_of(module.sequence)
        layout = facts.layout
        mask = facts.real if mask is None else mask  # transformers drops one of no padding; other ranks may have some
    o = softmax_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        layout=layout,
        sequence=module.sequence,
        window=window,
        scale=scaling,
        softcap=softcap,
        key_mask=mask,
        dropout_p=dropout,
    )
    return o.contiguous(), None


attention.calls = lasp_attention  # type: ignore[attr-defined]  # for `explain`: by a name in the config


def lasp_mask(*, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **_: Any) -> Mask:
    """What the registry of masks holds: what a layer's mask allows, if lasp can split that."""
    windows = _windows(mask_function)
    return Mask(min(windows, default=None), attention_mask)


def _windows(function: Callable[..., Any]) -> list[int]:
    """The sliding windows that a mask function is made of; raises unless it is causal, and knows no more."""
    maker, _, name = function.__qualname__.partition(".<locals>.")
    if maker == "causal_mask_function":
        return []
    if maker not in _MASKS or not name:
        raise ValueError(f"a mask of {function.__qualname__} cannot be split: lasp knows causal and sliding windows")
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))
    if maker == "sliding_window_overlay":
        return [held["sliding_window"]]
    parts = held.get("mask_functions") or ([held["mask_function"]] if "mask_function" in held else [])
    return [window for part in parts for window in _windows(part)]


_INSTEAD_OF: dict[str, Any] = {}  # "lasp", "lasp_1", ...: what each stands in the place of, so that it can be put back


def _name_instead_of(implementation: str | None) -> str:
    """The name in the registries; there is one for each implementation that a model had."""
    for name, other in _INSTEAD_OF.items():
        if other == implementation:
            return name
    name = f"lasp_{len(_INSTEAD_OF)}" if _INSTEAD_OF else "lasp"
    _enter(name, implementation)
    return name


def _enter(name: str, implementation: str | None) -> None:
    _INSTEAD_OF[name] = implementation
    AttentionInterface.register(name, lasp_attention)
    AttentionMaskInterface.register(name, lasp_mask)


def _of_a_pickle(names: dict[str, str | None]) -> Callable[..., None]:
    """What the border of a pickled model becomes. Its configs still have these names, so the registries of this process
    get them."""
    for name, implementation in names.items():
        if name not in _INSTEAD_OF:
            _enter(name, implementation)
    return of_a_pickle()


@contextlib.contextmanager
def as_it_came(model: nn.Module) -> Iterator[None]:
    """Inside, the configs of the model name the attention that they did before."""
    configs = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    found = [(c, now) for c in configs.values() if (now := getattr(c, "_attn_implementation", None)) in _INSTEAD_OF]
    try:
        for config, now in found:
            config._attn_implementation = _INSTEAD_OF[now]
        yield
    finally:
        for config, now in found:
            config._attn_implementation = now


# What a model computes over all tokens


@contextlib.contextmanager
def for_trial(model: nn.Module) -> Iterator[None]:
    """Inside, no router's loss is returned: it is of all tokens, and `balance` sees to that."""
    configs = {id(config): config for m in model.modules() if (config := vars(m).get("config")) is not None}
    asked = [config for config in configs.values() if getattr(config, "output_router_logits", False)]
    try:
        for config in asked:
            config.output_router_logits = False
        yield
    finally:
        for config in asked:
            config.output_router_logits = True


def dynamic_rotary(module: nn.Module, sequence: SequenceParallel) -> None:
    """Rotary positions whose frequencies follow the largest position: that of all ranks, not of a slice.

    One more position, the largest, goes in with the others, and what comes out for it is cut off again.
    """
    module.sequence = sequence  # type: ignore[assignment]
    put(module, "forward", _dynamic_rotary_forward)


def _dynamic_rotary_forward(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    sequence, real = self.sequence, position_ids
    if sequence.stream is None and sequence.size > 1:  # without padding, which is last of all
        real = position_ids[..., : layout_of(sequence).real.lengths[sequence.rank]]
    mine = torch.cat([real.flatten(), position_ids.new_zeros(1)]).amax().reshape(1)
    if sequence.stream is not None:  # of all segments, on every rank
        mine = mine.new_full((1,), sequence.stream.largest_position())
    elif sequence.size > 1:
        mine = gather_tokens(mine, (1,) * sequence.size, sequence, lambda: "the largest position of all ranks", dim=0)
    largest = mine.amax().expand(*position_ids.shape[:-1], 1)
    given = torch.cat([position_ids.minimum(largest), largest], -1)  # positions of padding count on
    found = type(self).forward(self, x, given, *args, **kwargs)
    turns = found if isinstance(found, tuple) else (found,)  # cosines and sines, or complex numbers (DeepSeek-V2)
    if not all(isinstance(y, Tensor) and y.shape[-2:-1] == (position_ids.shape[-1] + 1,) for y in turns):
        raise ValueError(
            f"{type(self).__name__} gives something else than a row a position, [.., T, D]: lasp does not know it"
        )
    mine = tuple(y[..., :-1, :] for y in turns)
    return mine if isinstance(found, tuple) else mine[0]


def _is_dynamic(module: Any) -> bool:
    kinds = module.rope_type.values() if isinstance(module.rope_type, dict) else (module.rope_type,)
    return any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)


def balance(module: nn.Module, sequence: SequenceParallel) -> None:
    """The router's load-balancing loss (arXiv 2101.03961, equations 4 to 6) over the tokens of all ranks.

    It is a product of two means over tokens, so the sums of all ranks meet before the product; the mean of what ranks
    would get alone is another loss.
    """
    module.sequence = sequence  # type: ignore[assignment]
    module.register_forward_hook(_balance, with_kwargs=True, prepend=True)  # the border behind it is still open


def _balance(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    stream = None if module.sequence is None else module.sequence.stream
    if module.sequence is None or (module.sequence.size == 1 and stream is None):  # from a pickle, or `alone`
        return output
    if isinstance(stream, Session):  # which wants no loss
        return output
    if isinstance(output, tuple):
        if not kwargs.get("output_router_logits"):
            return output
        raise ValueError("output_router_logits needs return_dict=True where the sequence is split")
    if getattr(output, "aux_loss", None) is None:
        return output
    counted = _counted(module.sequence, len(output.router_logits[0]), output.router_logits[0].device)
    chosen = probability = rows = 0
    for logits in output.router_logits:
        p = logits.softmax(-1, dtype=state_dtype(logits.dtype))
        among = F.one_hot(p.topk(module.num_experts_per_tok, -1).indices, module.num_experts).sum(1).to(p)
        weight = counted.to(p)
        chosen = chosen + weight @ among
        probability, rows = probability + weight @ p, rows + weight.sum()
    sums = torch.cat([chosen, probability, rows[None]])  # type: ignore[index]
    chosen, probability, rows = (
        unshard_sequence(sums[None], module.sequence, dim=0).sum(0).split([module.num_experts, module.num_experts, 1])
    )
    if stream is not None:  # who was chosen how often, and by how many tokens, is of all segments
        told = stream.over_segments(module.sequence, torch.cat([chosen, rows]).detach())
        chosen, rows = told.split([module.num_experts, 1])
    output.aux_loss = (chosen / rows * probability / rows).sum() * module.num_experts
    return output


def _counted(sequence: SequenceParallel, rows: int, device: torch.device) -> Tensor:
    """[B * T], 1 for the tokens of this rank that are no padding, of the batch or of its layout."""
    facts = facts_of(sequence)
    tokens, real = facts.layout.lengths[sequence.rank], facts.layout.real.lengths[sequence.rank]
    counted = torch.ones(rows // max(tokens, 1), tokens, device=device)
    counted[:, real:] = 0
    return (counted if facts.real is None else counted * facts.real).flatten()


_LIGHTNING = with_forward(
    _lightning_forward,
    *("act_fn", "qkv_proj", "norm", "output_gate", "out_proj", "num_attention_heads", "head_dim", "get_slope_rate"),
)
_CLASSES: dict[str, Foreign] = {
    "MiniMaxLightningAttention": Foreign(_LIGHTNING, ()),
    "RecurrentGemmaRecurrentBlock": Foreign(griffin, ("conv_1d", "rg_lru")),
}


def prepare(model: nn.Module, sequence: SequenceParallel) -> None:
    """What goes around the layers: the registry's name for attention, and what is computed over all tokens.

    `sequence` is that of the model's border. The model gets configs of its own, since its user may hold them for
    another model; "lasp" is not saved with them.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model:  # it may be called by itself
            sequence.border.install(module)
        if isinstance(module, PreTrainedModel) and "load_balancing_loss_func" in names_in(type(module).forward):
            balance(module, sequence)
    own: dict[int, Any] = {}
    for module in model.modules():
        config = vars(module).get("config")
        if hasattr(config, "_attn_implementation") and hasattr(module, "sequence"):
            _own(model, config, own)
    for config in own.values():
        config._attn_implementation = _name_instead_of(config._attn_implementation)
    sequence.border.checks.append(_still_ours)
    sequence.border.when_pickled = lambda: (_of_a_pickle, (dict(_INSTEAD_OF),))


def _still_ours(model: nn.Module) -> None:
    """Raise if attention has been taken out of our hands since."""
    for module in model.modules():
        if "ALL_ATTENTION_FUNCTIONS" in _uses(type(module)) and isinstance(
            getattr(module, "sequence", None), SequenceParallel
        ):
            now = module.config._attn_implementation  # type: ignore[union-attr]
            if now not in _INSTEAD_OF:
                raise ValueError(
                    f"attn_implementation must stay as lasp.parallelize set it, got {now!r}: another one sees no more "
                    "than a slice"
                )
            return


@functools.lru_cache(maxsize=4096)
def _uses(cls: type[nn.Module]) -> frozenset[str]:
    """The names that the forward of a class uses."""
    return frozenset() if cls.forward is nn.Module.forward else frozenset(names_in(cls.forward))


def _own(model: nn.Module, config: Any, own: dict[int, Any]) -> None:
    """All modules of the model that hold this config hold one copy of it."""
    root = next((x for m in model.modules() if (x := vars(m).get("config")) is not None and _holds(x, config)), config)
    if id(root) in own or any(root is x for x in own.values()):
        return
    made = copy.deepcopy(root)
    own[id(root)] = made
    pairs = [(root, made), *((getattr(root, k), getattr(made, k)) for k in getattr(root, "sub_configs", {}))]
    for m in model.modules():
        for old, new in pairs:
            if old is not None and vars(m).get("config") is old:
                m.config = new


def _holds(config: Any, other: Any) -> bool:
    return config is other or any(getattr(config, key, None) is other for key in getattr(config, "sub_configs", {}))
