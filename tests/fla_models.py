"""Small models of flash-linear-attention from their configs, and what stands for its kernels where there is no GPU.

Its kernels along the sequence become its own naive functions, their text with fp32 widened to fp64; its norms, gates
and rotary positions become PyTorch's. All that is put into fla's modules, in the process that asks for it.
"""

import functools
import importlib
import inspect
import re
import textwrap

import torch
import torch.nn.functional as F
from torch import nn

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "intermediate_size": 48,
    "fuse_cross_entropy": False,
    "fuse_swiglu": False,
    "use_cache": False,
}
MODELS = {  # the folder of a model: the prefix of its classes, and what its config needs
    "linear_attn": ("LinearAttention", {"expand_v": 1, "num_kv_heads": 1}),
    "retnet": ("RetNet", {"expand_v": 2, "num_heads": 4, "num_kv_heads": 2}),
    "gla": ("GLA", {"use_short_conv": True, "expand_k": 1.0}),
    "hgrn2": ("HGRN2", {"expand_ratio": 16, "num_heads": None, "use_short_conv": True}),
    "lightnet": ("LightNet", {"expand_ratio": 16, "num_heads": None, "gate_low_rank_dim": 8}),
    "delta_net": ("DeltaNet", {"allow_neg_eigval": True}),
    "gated_deltanet": ("GatedDeltaNet", {"head_dim": 8, "expand_v": 2, "num_v_heads": 4, "allow_neg_eigval": True}),
    "kda": ("KDA", {"head_dim": 8, "expand_v": 2, "num_v_heads": 4}),
    "mamba2": (
        "Mamba2",
        {"head_dim": 8, "num_heads": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16, "residual_in_fp32": False},
    ),
}
VARIANTS = {  # of one of these, or of a layer that has no model
    "linear_attn normalized": ("linear_attn", {"feature_map": "elu", "norm_feature_map": True, "norm_q": True}),
    "gated_deltanet no conv": ("gated_deltanet", {"use_short_conv": False}),
    "kda bounded": ("kda", {"safe_gate": True, "lower_bound": -5.0}),
    "simple_gla": ("simple_gla", {}),
    "simple_gla conv": ("simple_gla", {"use_short_conv": True, "num_kv_heads": 1}),
}
NAMES = [*MODELS, *VARIANTS]
FOR_KERNELS = {"hidden_size": 128}  # heads wide enough for fla's
FOR_KERNELS_TOO = {
    "hgrn2": {"expand_ratio": 64},
    "lightnet": {"expand_ratio": 64},
    "gated_deltanet": {"head_dim": 32},
    "kda": {"head_dim": 32},
    "mamba2": {"head_dim": 32, "state_size": 32},
}


class SimpleGLA(nn.Module):
    """A model of a layer that fla has no model of."""

    def __init__(self, hidden_size=32, **options):
        super().__init__()
        layer = importlib.import_module("fla.layers.simple_gla").SimpleGatedLinearAttention
        options |= {"hidden_size": hidden_size, "num_heads": 2}
        self.embeddings = nn.Embedding(97, hidden_size)
        self.layers = nn.ModuleList(layer(layer_idx=i, **options) for i in range(2))
        self.lm_head = nn.Linear(hidden_size, 97, bias=False)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = x + layer(x, attention_mask=attention_mask)[0]
        return self.lm_head(x)


def build(name, dtype=torch.float64, *, for_kernels=False):
    """A model in training with weights that make every term matter."""
    folder, options = VARIANTS.get(name, (name, {}))
    more = {**FOR_KERNELS, **FOR_KERNELS_TOO.get(folder, {})} if for_kernels else {}
    torch.manual_seed(0)
    if folder == "simple_gla":
        model = SimpleGLA(**{**options, **more})
    else:
        prefix, small = MODELS[folder]
        library = importlib.import_module(f"fla.models.{folder}")
        config = getattr(library, f"{prefix}Config")(**{**SMALL, **small, **options, **more})
        model = getattr(library, f"{prefix}ForCausalLM")(config)
    model = model.to(dtype)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if not key.endswith(("A_log", "dt_bias")):
                scale = 0.05 if p.ndim < 2 else 0.15
                p.add_(torch.randn(p.shape, generator=noise, dtype=torch.float64).to(dtype) * scale)
    return model.train()


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


# Without a GPU


@functools.cache
def without_kernels():
    """In this process fla computes with PyTorch alone, in fp64 where it is given that."""
    layers = {name: importlib.import_module(f"fla.layers.{name}") for name in _FUNCTIONS}
    for name, functions in _FUNCTIONS.items():
        for function, stand_in in functions.items():
            assert hasattr(layers[name], function), f"fla.layers.{name} has no {function}"
            setattr(layers[name], function, stand_in())
    modules = importlib.import_module("fla.modules")
    modules.RMSNorm.forward = _rms_norm
    modules.FusedRMSNormGated.forward = _rms_norm_gated
    modules.GatedMLP.forward = lambda self, x, **_: self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
    modules.RotaryEmbedding.forward = _rotary
    modules.ShortConvolution.forward = _short_convolution
    activations = importlib.import_module("fla.modules.activations")
    activations.ACT2FN.update(silu=F.silu, swish=F.silu)
    mamba2 = layers["mamba2"]
    mamba2.RMSNormGated.forward = _rms_norm_of_groups
    mamba2.Mamba2.torch_forward = wide(mamba2.Mamba2.torch_forward)
    hgrn2 = importlib.import_module("fla.models.hgrn2").HGRN2Model
    hgrn2.forward = wide(hgrn2.forward)


def wide(function):
    """The same function with fp64 in the place of fp32."""
    text = textwrap.dedent(inspect.getsource(function)).replace("torch.float32", "torch.float64")
    text = re.sub(r"torch\.float\b", "torch.float64", text.replace(".float()", ".double()"))
    scope = dict(function.__globals__)
    exec(compile("from __future__ import annotations\n" + text, f"<{function.__name__} in fp64>", "exec"), scope)
    return scope[function.__name__]


def naive(path, name):
    return wide(getattr(importlib.import_module(f"fla.ops.{path}"), name))


def documents(function):
    """A function of whole sequences [B, T, ...] for tokens of several, side by side."""

    def call(cu_seqlens=None, state_v_first=False, initial_state=None, output_final_state=False, **tensors):
        assert initial_state is None
        assert not output_final_state
        if cu_seqlens is None:
            return function(**tensors), None
        tokens = next(iter(tensors.values())).shape[1]
        parts = []
        for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
            of_all = {
                k: x[:, start:end] if isinstance(x, torch.Tensor) and x.ndim > 2 and x.shape[1] == tokens else x
                for k, x in tensors.items()
            }
            parts.append(function(**of_all))
        return torch.cat(parts, 1), None

    return call


def _linear():
    recurrent = naive("linear_attn.naive", "naive_recurrent_linear_attn")
    return documents(lambda **x: recurrent(**x)[0])


def _retention():
    """As fla's chunk_retention is made of simple GLA, with decays in fp32. (Its naive function has others.)"""
    recurrent = naive("simple_gla.naive", "naive_recurrent_simple_gla")

    def whole(q, k, v):
        g = (1 - 2.0 ** (-5.0 - torch.arange(q.shape[2], dtype=torch.float, device=q.device))).log().to(q.dtype)
        return recurrent(q, k, v, g.expand(q.shape[:3]))[0]

    return documents(whole)


def _simple_gla():
    recurrent = naive("simple_gla.naive", "naive_recurrent_simple_gla")
    return documents(lambda **x: recurrent(**x)[0])


def _gla():
    recurrent = naive("gla.naive", "naive_recurrent_gla")
    return documents(lambda q, k, v, g=None, gk=None: recurrent(q, k, v, gk if g is None else g)[0])


def _lightnet():
    """fla's additive gate (fla.ops.gsa.naive) before GLA."""
    recurrent = naive("gla.naive", "naive_recurrent_gla")

    def whole(q, k, v):
        z = k.logcumsumexp(1)
        return recurrent(q, (k - z).exp(), v, torch.cat([z[:, :1], z[:, :-1]], 1) - z)[0]

    by_document = documents(whole)
    return lambda **x: (by_document(**x)[0], (None, None))


def _unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _delta():
    recurrent = naive("delta_rule.naive", "delta_rule_recurrence")

    def whole(q, k, v, beta, use_qk_l2norm_in_kernel):
        q, k = (_unit(q), _unit(k)) if use_qk_l2norm_in_kernel else (q, k)
        return recurrent(*(x.transpose(1, 2) for x in (q, k, v, beta)))[0].transpose(1, 2)

    return documents(whole)


def _gated_delta():
    gate = naive("gated_delta_rule.gate", "naive_gdn_gate")
    recurrent = naive("gated_delta_rule.naive", "naive_recurrent_gated_delta_rule")

    def whole(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, **inside):
        assert set(inside) == {"use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "use_gate_in_kernel"}
        assert all(inside.values())
        q, k = (_unit(x).repeat_interleave(v.shape[2] // q.shape[2], 2) for x in (q, k))
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
        return recurrent(q, k, v, beta, gate(g, A_log, dt_bias, output_dtype=g.dtype))[0]

    return documents(whole)


def _kda():
    gate = naive("kda.gate", "naive_kda_gate")
    bounded = naive("kda.gate", "naive_kda_lowerbound_gate")
    recurrent = naive("kda.naive", "naive_recurrent_kda")

    def whole(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, lower_bound, safe_gate=False, **inside):
        assert set(inside) == {"use_qk_l2norm_in_kernel", "use_beta_sigmoid_in_kernel", "use_gate_in_kernel"}
        assert all(inside.values())
        if lower_bound is None:
            g = gate(g, A_log, dt_bias, output_dtype=g.dtype)
        else:
            g = bounded(g, A_log, dt_bias, lower_bound, output_dtype=g.dtype)
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
        return recurrent(_unit(q), _unit(k), v, g, beta)[0]

    return documents(whole)


def _conv():
    def causal_conv1d(x, weight, bias=None, activation=None, **_):
        y = F.conv1d(F.pad(x.mT, (weight.shape[-1] - 1, 0)), weight[:, None], bias, groups=x.shape[-1]).mT
        return y if activation is None else F.silu(y)

    return documents(causal_conv1d)


def _short_convolution(self, x, mask=None, cache=None, output_final_state=False, cu_seqlens=None):
    x = x if mask is None else x * mask[..., None]
    return _conv()(
        x=x, weight=self.weight.squeeze(1), bias=self.bias, activation=self.activation, cu_seqlens=cu_seqlens
    )


def _rms_norm(self, x, residual=None, prenorm=False, residual_in_fp32=False):
    x = x if residual is None else x + residual
    y = F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
    return (y, x) if prenorm else y


def _rms_norm_gated(self, x, g, residual=None, prenorm=False, residual_in_fp32=False):
    assert residual is None
    gate = torch.sigmoid(g) if self.activation == "sigmoid" else F.silu(g)
    return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * gate


def _rms_norm_of_groups(self, x, z=None):
    x = x if z is None or self.norm_before_gate else x * F.silu(z)
    y = F.rms_norm(x.unflatten(-1, (-1, self.group_size)), (self.group_size,), None, self.eps).flatten(-2) * self.weight
    return y if z is None or not self.norm_before_gate else y * F.silu(z)


def _rotary(self, q, k, seqlen_offset=0, cu_seqlens=None, max_seqlen=None):
    rotate = importlib.import_module("fla.modules.rotary.ops").rotary_embedding_ref
    tokens = q.shape[1]
    here = torch.arange(tokens, device=q.device) + seqlen_offset
    if cu_seqlens is not None:
        here = torch.cat([torch.arange(n, device=q.device) for n in cu_seqlens.diff().tolist()])
    assert int(here.max()) < (max_seqlen or tokens)
    self._update_cos_sin_cache(max_seqlen or tokens, device=q.device, dtype=q.dtype)
    return tuple(rotate(x, self._cos_cached[here], self._sin_cached[here], self.interleaved) for x in (q, k))


_FUNCTIONS = {
    "linear_attn": {
        "chunk_linear_attn": _linear,
        "fused_recurrent_linear_attn": _linear,
        "elu_p1": lambda: lambda x: F.elu(x) + 1,
    },
    "multiscale_retention": {"chunk_retention": _retention, "fused_recurrent_retention": _retention},
    "simple_gla": {"chunk_simple_gla": _simple_gla, "fused_recurrent_simple_gla": _simple_gla},
    "gla": {"chunk_gla": _gla, "fused_recurrent_gla": _gla},
    "hgrn2": {
        "chunk_gla": _gla,
        "fused_recurrent_gla": _gla,
        "swish": lambda: F.silu,
        "rms_norm_linear": lambda: _norm_linear,
    },
    "lightnet": {
        "chunk_lightnet": _lightnet,
        "fused_recurrent_lightnet": _lightnet,
        "rms_norm_swish_gate_linear": lambda: _norm_gate_linear,
    },
    "delta_net": {"chunk_delta_rule": _delta, "fused_recurrent_delta_rule": _delta},
    "gated_deltanet": {
        "chunk_gated_delta_rule": _gated_delta,
        "fused_recurrent_gated_delta_rule": _gated_delta,
        "causal_conv1d": lambda: lambda backend=None, **x: _conv()(**x),
    },
    "kda": {"chunk_kda": _kda, "fused_recurrent_kda": _kda},
    "mamba2": {},
}


def _norm_linear(x, norm_weight, norm_bias, weight, bias, eps=1e-5):
    assert norm_bias is None
    return F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, eps), weight, bias)


def _norm_gate_linear(x, g, norm_weight, norm_bias, weight, bias, eps=1e-6):
    assert norm_bias is None
    return F.linear(F.rms_norm(x, x.shape[-1:], norm_weight, eps) * F.silu(g), weight, bias)
