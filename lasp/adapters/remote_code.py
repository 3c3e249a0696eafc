"""Layers of models whose code comes with their weights (`trust_remote_code=True`), by the names of their classes.

transformers imports such code as `transformers_modules.<where it is from>.<file>`. Known are the published files of

    Ring-linear-2.0     BailingMoeV2LinearAttention (and BailingMoeLinearAttention of its preview), with softmax layers
    MiniMax-Text-01     MiniMaxText01LightningAttention, with softmax layers; MiniMax-M1, which has the same
    TransNormerLLM      NormLinearAttention, with LRPE

A fixed decay is what the code's formula says. A buffer that holds it may have been rounded by a cast of the model, and
so may a tensor that was made while 16 bits were the default.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lasp.adapters import Foreign
from lasp.adapters._common import fixed_decay, in_fp32, no_cache, with_forward
from lasp.adapters.border import facts_of, layout_of, longest_document, positions_here
from lasp.adapters.rebind import put
from lasp.ops.attention import linear_attention
from lasp.ops.softmax import softmax_attention
from lasp.ranks import SequenceParallel
from lasp_kernels import state_dtype

_FOLDER = "transformers_modules"


def adapter_of(module: nn.Module) -> Foreign | None:
    """The adapter of a module of such code; None for a class that is not known."""
    for base in type(module).__mro__:
        if base.__module__.partition(".")[0] == _FOLDER and base.__name__ in _CLASSES:
            return _CLASSES[base.__name__]
    return None


def prepare(model: nn.Module, sequence: SequenceParallel) -> None:
    """What goes around the layers: slopes in fp32, and no mask of all tokens by all tokens, which nobody reads."""
    of_such_code: list[Any] = [m for m in model.modules() if type(m).__module__.partition(".")[0] == _FOLDER]
    for module in of_such_code:
        if isinstance(slopes := getattr(module, "slopes", None), Tensor) and hasattr(module, "_build_slope_tensor"):
            if slopes.dtype.itemsize < 4:
                slopes = in_fp32(functools.partial(module._build_slope_tensor, len(slopes)))
            # Beside the weights: the model copies them from elsewhere at each call, for which the host would wait.
            module.slopes = slopes.to(next(module.parameters(), slopes).device)
        if hasattr(module, "_prepare_decoder_linear_attn_mask"):
            put(module, "_prepare_decoder_linear_attn_mask", _no_mask)
        if type(module).__name__ == "Lrpe":
            module.sequence = sequence
            put(module, "forward", _lrpe_forward)


def as_it_came(model: nn.Module) -> AbstractContextManager:
    """Nothing is changed but methods, and slopes that are more precise than they were, and where the weights are."""
    return nullcontext()


def _no_mask(self: Any, *_: Any, **__: Any) -> None:
    return None


# Ring-linear-2.0


def _bailing_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The published forward, but for what it takes from `lightning_attn_ops`."""
    ops = dict.fromkeys(self.lightning_attn_ops, _simple_gla(self, self.sequence))
    return type(self).forward(_With(self, lightning_attn_ops=ops), *args, **kwargs)


class _With:
    """A module as its own forward sees it, with other attributes in the place of some."""

    def __init__(self, module: nn.Module, **others: Any):
        self.__dict__.update(others, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _simple_gla(module: Any, sequence: SequenceParallel) -> Callable[..., tuple[Tensor, None]]:
    def simple_gla(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        scale: float | None = None,
        initial_state: Any = None,
        output_final_state: bool = False,
        head_first: bool = False,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """q, k and v [B, T, H, D], g [B, T, H], which is the same for all tokens."""
        no_cache(initial_state=initial_state, output_final_state=output_final_state, head_first=head_first, **others)
        known = hasattr(module, "slope")  # made by the formula
        o, _state = linear_attention(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            log_decay=fixed_decay(module, _bailing_formula, q) if known else g[0, 0].to(state_dtype(q.dtype)),
            scale=k.shape[-1] ** -0.5 if scale is None else scale,
            layout=layout_of(sequence),
            sequence=sequence,
        )
        return o, None

    return simple_gla


def _bailing_formula(module: Any) -> Tensor:
    """[H]: slopes as ALiBi's times 1 - (l - 1) / (L - 1) + 1e-5 for the layer l, from 0."""
    factor = 1 - (module.layer_idx - 1) / (module.config.num_hidden_layers - 1) + 1e-5
    return -torch.as_tensor(module.build_slope_tensor(module.num_heads)).flatten() * factor


# MiniMax-Text-01


def _minimax_forward(
    self: Any,
    hidden_states: Tensor,
    attn_mask: Tensor | None = None,
    output_attentions: bool = False,
    past_key_value: Any = None,
    use_cache: bool = False,
    slope_rate: Tensor | None = None,
    do_eval: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None, None]:
    """Lightning attention, in training too, for which the published forward has nothing."""
    no_cache(output_attentions=output_attentions, past_key_value=past_key_value, use_cache=use_cache)
    mask = attn_mask if attn_mask is not None else kwargs.get("attention_mask")
    q, k, v = self.act(self.qkv_proj(hidden_states)).unflatten(-1, (self.num_heads, -1)).split(self.head_dim, -1)
    o = _lightning(self, q, k, v, mask, slope_rate)
    o = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(o.flatten(-2))
    return self.out_proj(o), None, None


def _lightning(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slope_rate: Tensor | None) -> Tensor:
    """o [B, T, H, D] of q, k and v of that shape; slope_rate [H, 1, 1] is what the model makes of its formula."""
    if slope_rate is None:
        raise ValueError(
            f"slope_rate of layer {module.sequence.name!r} is None: the model's own gradient checkpointing leaves it "
            "out; checkpoint its layers by torch.utils.checkpoint (use_reentrant=False) with all of their arguments"
        )
    v = v if mask is None else v * (mask != 0)[:, :, None, None].to(v.dtype)
    o, _state = linear_attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        log_decay=-slope_rate.flatten().to(q.device, state_dtype(q.dtype)),
        layout=layout_of(module.sequence),
        sequence=module.sequence,
    )
    return o


# TransNormerLLM


def _transnormer_forward(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None = None,
    attn_padding_mask: Tensor | None = None,
    output_attentions: bool = False,
    past_key_value: Any = None,
    use_cache: bool = False,
    slope_rate: Tensor | None = None,
) -> tuple[Tensor, None, None]:
    """NormAttention: linear attention whose output is normalized, in training and evaluation alike."""
    no_cache(output_attentions=output_attentions, past_key_value=past_key_value, use_cache=use_cache)
    q, k, v, u = (y.unflatten(-1, (self.num_heads, -1)) for y in self.qkvu_proj(x).chunk(4, -1))
    q, k = self.act(q), self.act(k)
    if self.linear_use_lrpe:
        q, k = (self.lrpe(y.transpose(1, 2)).transpose(1, 2) for y in (q, k))
    o = _lightning(self, q, k, v, attn_padding_mask, slope_rate)
    return self.out_proj(u.flatten(-2) * self.norm(o.flatten(-2))), None, None


def _lrpe_forward(self: Any, x: Tensor, offset: int = 0) -> Tensor:
    """x [B, H, T, D] turned by theta p into [B, H, T, 2 D]; p counts over all ranks, and is in the dtype of x."""
    place = positions_here(self.sequence, x.device)[0].to(x.dtype)
    angle = self.theta * place[:, None]
    return torch.cat([x * torch.cos(angle), x * torch.sin(angle)], -1)


# Softmax layers


def _softmax_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None, None]:
    """Attention of these files, eager, SDPA and flash alike. Padding comes from the model's border: a mask of
    [T, T] is of this rank's tokens alone."""
    no_cache(output_attentions=output_attentions, past_key_value=past_key_value, use_cache=use_cache)
    no_cache(sliding_window=getattr(self.config, "sliding_window", None))
    q, k, v = (y.transpose(1, 2) for y in _heads(self, hidden_states))
    facts, rotate = facts_of(self.sequence), type(self).forward.__globals__["apply_rotary_pos_emb"]
    if position_embeddings is not None:
        q, k = rotate(q, k, *position_embeddings)
    else:
        q, k = rotate(q, k, *self.rotary_emb(v, seq_len=longest_document(self.sequence)), position_ids)
    o = softmax_attention(
        *(y.transpose(1, 2) for y in (q, k, v)),
        layout=facts.layout,
        sequence=self.sequence,
        scale=1 / math.sqrt(self.head_dim),
        key_mask=facts.real,
        dropout_p=self.attention_dropout if self.training else 0.0,
    )
    out = self.dense if hasattr(self, "dense") else self.o_proj
    return out(o.flatten(-2)), None, None


def _heads(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, T, heads, D]."""
    heads, groups = module.num_heads, module.num_key_value_heads
    if not hasattr(module, "query_key_value"):
        q, k, v = (
            project(x).unflatten(-1, (-1, module.head_dim)) for project in (module.q_proj, module.k_proj, module.v_proj)
        )
        return q, k, v
    q, k, v = module.query_key_value(x).unflatten(-1, (-1, module.head_dim)).split([heads, groups, groups], -2)
    if hasattr(module, "query_layernorm"):
        q, k = module.query_layernorm(q), module.key_layernorm(k)
    return q, k, v


_BAILING = Foreign(
    with_forward(_bailing_forward, "lightning_attn_ops", "query_key_value", "g_proj", "g_norm", "layer_idx"), ()
)
_MINIMAX = Foreign(
    with_forward(_minimax_forward, "act", "qkv_proj", "num_heads", "head_dim", "norm", "output_gate", "out_proj"), ()
)
_TRANSNORMER = Foreign(
    with_forward(_transnormer_forward, "qkvu_proj", "act", "num_heads", "linear_use_lrpe", "norm", "out_proj"),
    ("lrpe",),
)
_SOFTMAX = Foreign(
    with_forward(_softmax_forward, "num_heads", "num_key_value_heads", "head_dim", "attention_dropout", "config"),
    ("rotary_emb",),
)
_CLASSES = {
    "BailingMoeV2LinearAttention": _BAILING,
    "BailingMoeLinearAttention": _BAILING,
    "MiniMaxText01LightningAttention": _MINIMAX,
    "MiniMaxM1LightningAttention": _MINIMAX,
    "NormLinearAttention": _TRANSNORMER,
    **{
        f"{model}{kind}": _SOFTMAX
        for model in ("BailingMoeV2", "BailingMoe", "MiniMaxText01", "MiniMaxM1")
        for kind in ("Attention", "SdpaAttention", "FlashAttention2")
    },
}
