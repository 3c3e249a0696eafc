"""Layers of flash-linear-attention (fla), by the functions that their forwards call.

    chunk_linear_attn, chunk_retention, chunk_simple_gla, chunk_gla, chunk_lightnet     lasp.linear_attention
    chunk_delta_rule, chunk_gated_delta_rule, chunk_kda                                 lasp.delta_rule
    ShortConvolution, causal_conv1d                                                     lasp.causal_conv

A layer has several functions for one thing, and takes one by the number of tokens and by whether there are gradients:
ranks might take different ones, so all of them are replaced. fla's own kernels along the sequence are not called;
its norms, gates and projections are, and these need a GPU as they do elsewhere.

With a padding mask fla takes the padded tokens out, so that a row's real tokens stand side by side. Over ranks they
stay where they are and change nothing: their keys, values, gates and outputs are zero. That is the same where padding
is before or behind a row's tokens, and another convolution where it is among them, which is refused (values are looked
at on a CPU only: on a GPU the host would have to wait).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fla import utils
from fla.modules.rotary.ops import rotary_embedding_ref
from torch import Tensor, nn

from lasp import arguments, decay
from lasp.adapters import Foreign
from lasp.adapters._common import needs, no_cache, with_forward
from lasp.adapters._scans import gated_delta_rule, mamba2_scan
from lasp.adapters.border import layout_of, longest_document, positions_here, tokens_before
from lasp.adapters.rebind import names_in, of_another_version, put, rebind
from lasp.ops.attention import linear_attention
from lasp.ops.call import of_own_tokens
from lasp.ops.halo import causal_conv
from lasp.ranks import SequenceParallel
from lasp_kernels import state_dtype

Make = Callable[[SequenceParallel], Callable[..., Any]]


def adapter_of(module: nn.Module) -> Foreign | None:
    """The adapter of a module of this library; None for one that is in no list, or whose class has another forward."""
    for base in type(module).__mro__:
        if _is_of_fla(base) and base.__name__ in _LAYERS:
            return _LAYERS[base.__name__]
        if "forward" in vars(base):
            return None
    return None


def mixes(module: nn.Module) -> bool:
    """Whether its class says that it mixes tokens: all of fla's layers do, and a few other modules."""
    return any(
        _is_of_fla(base) and (base.__module__.startswith("fla.layers.") or base.__name__ in _OTHER_MIXERS)
        for base in type(module).__mro__
    )


_OTHER_MIXERS = {"LongConvolution", "ImplicitLongConvolution", "RWKV6FeedForward", "RWKV7FeedForward"}


def _is_of_fla(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "fla" and issubclass(cls, nn.Module)


def prepare(model: nn.Module, sequence: SequenceParallel) -> None:
    """A model of fla shifts labels on its slice, whatever else it is given."""
    model.register_forward_pre_hook(_refuse_labels, with_kwargs=True)


def as_it_came(model: nn.Module) -> AbstractContextManager:
    """A context inside which the model is as fla made it; nothing is changed but methods."""
    return nullcontext()


def on_one_rank(model: nn.Module) -> str:
    """What to say of a model that stays fla's own: of the gated delta rule its backward may refuse the Triton here."""
    names = ("IS_NVIDIA_HOPPER", "TRITON_ABOVE_3_4_0", "TRITON_ABOVE_3_7_1")
    known = [getattr(utils, name, None) for name in names]
    classes = {base for m in model.modules() for base in type(m).__mro__ if base.__name__ == "GatedDeltaNet"}
    gated = any(_is_of_fla(cls) for cls in classes)
    if not gated or known != [True, True, False] or importlib.util.find_spec("tilelang") is not None:
        return ""
    return (
        "fla's own backward of Gated DeltaNet does not run on this GPU with Triton 3.4.0 to before 3.7.1. On one rank "
        "the model is fla's own, as it is the whole that lasp.verify compares with: take Triton 3.7.1 or "
        "newer, or install tilelang. (Over two ranks or more lasp's steps take the place of these kernels)"
    )


def _refuse_labels(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if any(kwargs.get(name) is not None for name in ("labels", "shift_labels")):
        raise ValueError(
            f"labels would be shifted by {type(model).__name__} on its slice alone, and the means of slices are not "
            "the mean: leave labels and shift_labels out, and loss, tokens = lasp.token_loss(output.logits, "
            "local['labels'], mesh=mesh)"
        )


def _rebind_known(module: nn.Module, sequence: SequenceParallel) -> None:
    module.sequence = sequence  # type: ignore[assignment]
    uses = names_in(type(module).forward)
    known = {name: make(sequence) for name, make in _BY_FUNCTION.items() if name in uses}
    if not known.keys() - _MASKS:
        raise ValueError(
            f"{type(module).__qualname__}.forward calls none of the functions that lasp knows: "
            f"{of_another_version('fla')}"
        )
    rebind(module, **known)
    if isinstance(rotary := getattr(module, "rotary", None), nn.Module):
        _rotary(rotary, sequence)


def _stand_in(module: nn.Module) -> None:
    """What replaces the forward in a trial: each token by itself."""
    uses = names_in(type(module).forward) & _BY_FUNCTION.keys() - _MASKS
    rebind(module, **{name: _STAND_INS.get(_BY_FUNCTION[name], _each_token) for name in uses})


def _each_token(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return of_own_tokens(q, k, v, v.shape[2]), None


def _each_token_of_lightnet(**tensors: Any) -> tuple[Tensor, tuple[None, None]]:
    return _each_token(**tensors)[0], (None, None)


def _no_convolution(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return x, None


# Padding


@dataclass(frozen=True)
class _Real:
    """Which tokens are no padding, [B, T], in the place of fla's cu_seqlens of the tokens without it."""

    mask: Tensor

    def of(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with zeros for padding."""
        return x * self.mask.view(*self.mask.shape, *(1,) * (x.ndim - 2)).to(x.dtype)


def _unpad(_: SequenceParallel) -> Callable[..., Any]:
    def unpad_hidden_states(
        hidden_states: Tensor, cu_seqlens: Any, attention_mask: Tensor | None, q_len: int
    ) -> tuple[Tensor, _Real | None, _Real | None]:
        _not_known(cu_seqlens=cu_seqlens)
        real = None if attention_mask is None else _Real(_padded_at_ends(attention_mask))
        return hidden_states, real, real

    return unpad_hidden_states


def _repad(_: SequenceParallel) -> Callable[..., Tensor]:
    def repad_hidden_states(hidden_states: Tensor, indices: _Real | None, batch_size: int, q_len: int) -> Tensor:
        return hidden_states if indices is None else indices.of(hidden_states)

    return repad_hidden_states


def _padded_at_ends(mask: Tensor) -> Tensor:
    real = mask != 0
    if real.device.type == "cpu" and bool(((real[:, 1:] & ~real[:, :-1]) & (real[:, :-1].cumsum(1) > 0)).any()):
        raise ValueError(
            "attention_mask has padding among the tokens of a row, which fla takes out and lasp leaves where it is: "
            f"pad before or behind them, got {arguments.shown(mask)}"
        )
    return real


def _without_padding(real: _Real | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if real is None else tuple(real.of(x) for x in tensors)


def _not_known(**given: Any) -> None:
    """Raise for arguments that lasp does not know."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise RuntimeError(f"{name} of a layer of fla whose sequence is split: {of_another_version('fla')}")


_OF_KERNELS = {"state_v_first", "chunk_size", "safe_gate", "cu_seqlens_cpu"}  # how one computes


def _check(real: object, initial_state: object, output_final_state: object, others: dict[str, Any]) -> None:
    no_cache(initial_state=initial_state, output_final_state=output_final_state)
    _not_known(cu_seqlens=None if isinstance(real, _Real) else real)
    _not_known(**{name: x for name, x in others.items() if name not in _OF_KERNELS})


# Functions


def _linear(sequence: SequenceParallel, fixed: Callable[[int, torch.device], Tensor] | None = None) -> Callable:
    """Linear attention with no decay, a fixed one, or one that comes as `g` or `gk`."""

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        gk: Tensor | None = None,
        scale: float | None = None,
        initial_state: Any = None,
        output_final_state: bool | None = False,
        normalize: bool = False,
        cu_seqlens: _Real | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """q and k [B, T, H, K], v [B, T, H, V], g [B, T, H] or [B, T, H, K]; o [B, T, H, V]."""
        _check(cu_seqlens, initial_state, output_final_state, others)
        k, v = _without_padding(cu_seqlens, k, v)
        g = gk if g is None else g
        if g is not None:
            (g,) = _without_padding(cu_seqlens, g.to(state_dtype(q.dtype)))
        elif fixed is not None:
            g = fixed(q.shape[2], q.device)
        if normalize:  # by the sum of the keys: what a value of 1 would be
            v = torch.cat([v, _without_padding(cu_seqlens, torch.ones_like(v[..., :1]))[0]], -1)
        o, _state = linear_attention(
            q,
            k,
            v,
            log_decay=g,
            scale=k.shape[-1] ** -0.5 if scale is None else scale,
            layout=layout_of(sequence),
            sequence=sequence,
        )
        if normalize:
            o = o[..., :-1] / (o[..., -1:] + 1e-10)
        return o.contiguous(), None

    return attention


def _retention(sequence: SequenceParallel) -> Callable[..., Any]:
    return _linear(sequence, _retention_decay)


@functools.lru_cache(maxsize=64)
def _retention_decay(heads: int, device: torch.device) -> Tensor:
    """[H]: as fla's chunk_retention has it, in fp32."""
    with torch.inference_mode(False):  # what an evaluation makes may serve a training
        return decay.fixed((1 - 2.0 ** (-5.0 - torch.arange(heads, dtype=torch.float, device="cpu"))).log(), device)


def _lightnet(sequence: SequenceParallel) -> Callable[..., Any]:
    """LightNet (arXiv 2405.21022): keys are a softmax over the tokens so far, and what they lose the state decays by.

    The sum of exp(k) over the tokens so far is a linear attention too, with keys and queries of 1. In fp64 it needs no
    maximum, which would be one of all ranks: |k| may be up to 700.
    """
    attend = _linear(sequence)

    def lightnet(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        initial_state: Any = None,
        output_final_state: bool | None = False,
        cu_seqlens: _Real | None = None,
        **others: Any,
    ) -> tuple[Tensor, tuple[None, None]]:
        _check(cu_seqlens, initial_state, output_final_state, others)
        (weight,) = _without_padding(cu_seqlens, k.double().exp())
        one = torch.ones_like(weight[..., :1])
        layout = layout_of(sequence)
        total, _state = linear_attention(one, one, weight, layout=layout, sequence=sequence)
        share = weight / torch.where(total > 0, total, 1.0)  # before the first token that is no padding
        g = torch.log1p(-share.clamp(max=1 - 1e-12))  # the first token forgets what is not there
        o, _none = attend(q, share.to(k.dtype), v, g=g, scale=scale, cu_seqlens=cu_seqlens)
        return o, (None, None)

    return lightnet


def _delta(sequence: SequenceParallel, gate: Callable[..., Tensor] | None = None) -> Callable[..., Any]:
    """The delta rule; l2norm, beta and `gate` are as fla's kernels compute them inside, in fp32."""

    def rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        beta: Tensor | None = None,
        scale: float | None = None,
        initial_state: Any = None,
        output_final_state: bool | None = False,
        use_qk_l2norm_in_kernel: bool = False,
        use_beta_sigmoid_in_kernel: bool = False,
        allow_neg_eigval: bool = False,
        use_gate_in_kernel: bool = False,
        A_log: Tensor | None = None,
        dt_bias: Tensor | None = None,
        lower_bound: float | None = None,
        cu_seqlens: _Real | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """q and k [B, T, H, K], v [B, T, G*H, V], beta [B, T, G*H], g [B, T, G*H] or [B, T, G*H, K]."""
        _check(cu_seqlens, initial_state, output_final_state, others)
        wide, dtype = state_dtype(v.dtype), v.dtype
        b = torch.ones_like(v[..., 0]) if beta is None else beta.to(wide)
        if use_beta_sigmoid_in_kernel:
            b = b.sigmoid() * (2 if allow_neg_eigval else 1)
        if g is not None:
            g = g.to(wide)
            if use_gate_in_kernel:
                assert gate is not None
                g = gate(g, A_log, dt_bias, lower_bound)
            (g,) = _without_padding(cu_seqlens, g)
        k, v, b = _without_padding(cu_seqlens, k, v, b)
        layout, normalize = layout_of(sequence), use_qk_l2norm_in_kernel
        o = gated_delta_rule(q, k, v, b, g, scale=scale, normalize=normalize, layout=layout, sequence=sequence)
        return o.to(dtype).contiguous(), None

    return rule


def _gdn(sequence: SequenceParallel) -> Callable[..., Any]:
    return _delta(sequence, _gdn_gate)


def _kda(sequence: SequenceParallel) -> Callable[..., Any]:
    return _delta(sequence, _kda_gate)


def _gdn_gate(g: Tensor, a_log: Tensor, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """[B, T, H], from logits: -exp(A_log) softplus(g + bias)."""
    _not_known(lower_bound=lower_bound)
    g = g if dt_bias is None else g + dt_bias.to(g.dtype)
    return -a_log.to(g.dtype).exp() * F.softplus(g)


def _kda_gate(g: Tensor, a_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """[B, T, H, K], from logits: -exp(A_log) softplus(g + bias), or bound sigmoid(exp(A_log) (g + bias))."""
    g = g if dt_bias is None else g + dt_bias.to(g.dtype).view(g.shape[-2:])
    rate = None if a_log is None else a_log.to(g.dtype).exp().view(-1, 1)
    if lower_bound is None:
        assert rate is not None
        return -rate * F.softplus(g)
    return lower_bound * torch.sigmoid(g if rate is None else rate * g)


def _conv(sequence: SequenceParallel) -> Callable[..., tuple[Tensor, None]]:
    def causal_conv1d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        initial_state: Any = None,
        output_final_state: bool | None = False,
        activation: str | None = None,
        backend: str | None = None,
        cu_seqlens: _Real | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """x [B, T, C], weight [C, W]."""
        _check(cu_seqlens, initial_state, output_final_state, others)
        (x,) = _without_padding(cu_seqlens, x)
        y = causal_conv(x, weight, bias, layout=layout_of(sequence), sequence=sequence)
        y = y if activation is None else F.silu(y)
        return (y if residual is None else y + residual), None

    return causal_conv1d


_BY_FUNCTION: dict[str, Make] = {
    "unpad_hidden_states": _unpad,
    "repad_hidden_states": _repad,
    "causal_conv1d": _conv,
    "chunk_linear_attn": _linear,
    "fused_chunk_linear_attn": _linear,
    "fused_recurrent_linear_attn": _linear,
    "chunk_retention": _retention,
    "fused_chunk_retention": _retention,
    "parallel_retention": _retention,
    "fused_recurrent_retention": _retention,
    "chunk_simple_gla": _linear,
    "fused_recurrent_simple_gla": _linear,
    "chunk_gla": _linear,
    "fused_chunk_gla": _linear,
    "fused_recurrent_gla": _linear,
    "chunk_lightnet": _lightnet,
    "fused_recurrent_lightnet": _lightnet,
    "chunk_delta_rule": _delta,
    "fused_recurrent_delta_rule": _delta,
    "chunk_gated_delta_rule": _gdn,
    "fused_recurrent_gated_delta_rule": _gdn,
    "chunk_kda": _kda,
    "fused_recurrent_kda": _kda,
}
_MASKS = {"unpad_hidden_states", "repad_hidden_states"}
_STAND_INS = {_lightnet: _each_token_of_lightnet, _conv: _no_convolution}


# Modules


def _short_convolution_in_trial(module: nn.Module) -> None:
    put(module, "forward", lambda self, x, *_, **__: _no_convolution(x))


def _short_convolution_forward(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Any = None,
    output_final_state: bool | None = False,
    cu_seqlens: _Real | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Short convolution of x [B, T, C], over the ranks."""
    return _conv(self.sequence)(
        x=x,
        weight=self.weight.squeeze(1),
        bias=self.bias,
        residual=residual,
        initial_state=cache,
        output_final_state=output_final_state,
        activation=self.activation,
        cu_seqlens=cu_seqlens if mask is None else _Real(_padded_at_ends(mask)),
        **others,
    )


def _rotary(module: nn.Module, sequence: SequenceParallel) -> None:
    """Rotary positions, which fla counts from the length of a cache: from where the slice begins."""
    needs(module, "scale")
    _not_known(scale_base=module.scale)  # decays from the middle of the tokens that it sees
    with_forward(_rotary_forward, "_update_cos_sin_cache", "interleaved")(module, sequence)


def _rotary_forward(
    self: Any, q: Tensor, k: Tensor, seqlen_offset: int = 0, cu_seqlens: Any = None, max_seqlen: Any = None
) -> tuple[Tensor, Tensor]:
    """q and k [B, T, H, D]."""
    layout, longest = layout_of(self.sequence), longest_document(self.sequence)
    if not layout.packed:
        start = layout.bounds(self.sequence.rank)[0] + tokens_before(self.sequence)
        return type(self).forward(self, q, k, seqlen_offset=start, max_seqlen=longest)
    self._update_cos_sin_cache(longest, device=q.device, dtype=q.dtype)
    here = positions_here(self.sequence, q.device)[0]
    cos, sin = self._cos_cached[here], self._sin_cached[here]
    return tuple(rotary_embedding_ref(x, cos, sin, self.interleaved) for x in (q, k))  # type: ignore[return-value]


def _mamba2_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, None, None]:
    """Mamba-2, whose scan is written out in a method, and fused with all around it on another path."""
    no_cache(past_key_values=past_key_values, use_cache=use_cache)
    _not_known(cu_seqlens=others.get("cu_seqlens"))
    real = None if attention_mask is None else _Real(_padded_at_ends(attention_mask))
    batch, tokens, _ = hidden_states.shape
    (x,) = _without_padding(real, hidden_states)
    gate, x, dt = self.in_proj(x).split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
    (x,) = _without_padding(real, x)
    layout, sequence = layout_of(self.sequence), self.sequence
    x = self.act(causal_conv(x, self.conv1d.weight.squeeze(1), self.conv1d.bias, layout=layout, sequence=sequence))
    (x,) = _without_padding(real, x)
    state = self.n_groups * self.ssm_state_size
    x, B, C = x.split([self.intermediate_size, state, state], -1)
    x = x.view(batch, tokens, self.num_heads, self.head_dim)
    B, C = (_of_heads(self, y.view(batch, tokens, self.n_groups, -1)) for y in (B, C))
    wide = state_dtype(x.dtype)
    dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
    A = -self.A_log.to(wide).exp()
    o = mamba2_scan(x, dt, A, B, C, self._get_D(), layout=layout, sequence=sequence).reshape(batch, tokens, -1)
    o = self.norm(o, gate) if self.rmsnorm else o * self.act(gate)
    return self.out_proj(o.to(hidden_states.dtype)), None, None


def _of_heads(module: Any, x: Tensor) -> Tensor:
    """[B, T, G, N] for H heads. fla has two ways: H / G neighbours share a group in the kernels of mamba-ssm, as in the
    operator, and every G-th head does in its own code, which runs where these are not installed or there is no GPU."""
    kernels = type(module).forward.__globals__.get("is_fast_path_available") and x.device.type == "cuda"
    return x if kernels or module.n_groups == 1 else x.repeat(1, 1, module.num_heads // module.n_groups, 1)


_REBOUND = Foreign(_rebind_known, (), stand_in=_stand_in)
_LAYERS = {
    "LinearAttention": _REBOUND,
    "MultiScaleRetention": Foreign(_rebind_known, ("rotary",), stand_in=_stand_in),
    "SimpleGatedLinearAttention": _REBOUND,
    "GatedLinearAttention": _REBOUND,
    "HGRN2Attention": _REBOUND,
    "LightNetAttention": _REBOUND,
    "DeltaNet": _REBOUND,
    "GatedDeltaNet": _REBOUND,
    "KimiDeltaAttention": _REBOUND,
    "Mamba2": Foreign(
        with_forward(
            _mamba2_forward,
            *("in_proj", "conv1d", "out_proj", "norm", "act", "dt_bias", "A_log", "dt_limit", "n_groups", "_get_D"),
        ),
        ("conv1d",),
    ),
    # As a whole: for a single token without gradients its own forward goes another way, with a cache of zeros.
    "ShortConvolution": Foreign(
        with_forward(_short_convolution_forward, "weight", "bias", "activation"),
        (),
        stand_in=_short_convolution_in_trial,
    ),
}
