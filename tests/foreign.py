"""Small models of transformers from their configs, and the comparison of one that is split with one process."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Two layers of what carries a state, so that one that is taken for another shows, with softmax attention between them.
TYPES = ["linear_attention", "full_attention", "linear_attention"]
HYBRID = {"num_hidden_layers": 3, "layer_types": TYPES}
SSD = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
GDN = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    **HYBRID,
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
KDA = {
    "moe_intermediate_size": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    **HYBRID,
    "num_key_value_heads": 4,
    "num_shared_experts": 1,
}
MAMBA = {"state_size": 8, "time_step_rank": 4, "expand": 2}

# The folder of a model: the prefix of its classes, and what its config needs to be small.
MODELS: dict[str, tuple[str, dict]] = {
    "minimax": (
        "MiniMax",
        {"head_dim": 8, "num_experts_per_tok": 2, "num_local_experts": 4, "block_size": 16, **HYBRID},
    ),
    "mamba2": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "expand": 2, "chunk_size": 16},
    ),
    "bamba": ("Bamba", {"num_hidden_layers": 3, "attn_layer_indices": [1], **SSD}),
    "falcon_h1": ("FalconH1", {"mamba_d_ssm": 64, **SSD}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {"num_local_experts": 4, "shared_intermediate_size": 16, **HYBRID, **SSD},
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "head_dim": 8,
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            "mamba_d_state": 16,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 2,
            "chunk_size": 16,
            "mamba_expand": 2,
            "num_key_value_heads": 4,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "use_mem_rope": True,
            "adapter_rank": 4,
            "num_hidden_layers": 3,
            "layers_block_type": ["hybrid", "mamba", "hybrid"],  # the two share a block
        },
    ),
    "mamba": ("Mamba", MAMBA),
    "falcon_mamba": ("FalconMamba", MAMBA),
    "jamba": (
        "Jamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "mamba_expand": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        {"lru_width": 32, "attention_window_size": 9, "head_dim": 8, "num_hidden_layers": 3},
    ),
    "qwen3_next": ("Qwen3Next", {"head_dim": 16, **MOE, **GDN}),
    "qwen3_5": ("Qwen3_5", {"head_dim": 16, **GDN}),
    "qwen3_5_moe": ("Qwen3_5Moe", {"head_dim": 16, **MOE, **GDN}),
    "olmo_hybrid": ("OlmoHybrid", {**GDN, "linear_num_key_heads": 4}),
    "kimi_linear": ("KimiLinear", KDA),
    "bailing_hybrid": ("BailingHybrid", {"num_expert_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **KDA}),
    "lfm2": (
        "Lfm2",
        {"block_multiple_of": 8, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "llama": ("Llama", {"head_dim": 8}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": 9}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "deepseek_v2": (  # rotary positions as complex numbers, and heads of values narrower than those of keys
        "DeepseekV2",
        {
            "moe_intermediate_size": 16,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}


def file_of(name: str, kind: str = "modeling") -> str:
    return f"transformers.models.{name}.{kind}_{name}"


def modeling(name: str, dtype: torch.dtype) -> types.ModuleType:
    """The file of a model. For fp64 its text with the casts to fp32 widened, which would hide what is exact."""
    if dtype != torch.float64:
        return importlib.import_module(file_of(name))
    wide = file_of(name) + "_wide"
    if wide in sys.modules:
        return sys.modules[wide]
    spec = importlib.util.find_spec(file_of(name))
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text().replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    module = types.ModuleType(wide)
    module.__file__, module.__package__ = spec.origin, file_of(name).rpartition(".")[0]
    sys.modules[wide] = module
    exec(compile(re.sub(r"torch\.float\b", "torch.float64", text), spec.origin, "exec"), module.__dict__)
    return module


def config_of(name: str, **more):
    prefix, small = MODELS[name]
    configs = vars(importlib.import_module(file_of(name, "configuration")))
    config = (configs.get(prefix + "TextConfig") or configs[prefix + "Config"])(**{**COMMON, **small, **more})
    config._attn_implementation = "eager" if name in ("mamba", "falcon_mamba", "mamba2") else "sdpa"
    return config


def build(name: str, dtype: torch.dtype = torch.float64, **more):
    """A model in training with weights that make every term matter: a fresh one hardly mixes tokens."""
    config = config_of(name, **more)
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # grouped products know no fp64
    torch.manual_seed(0)
    model = getattr(modeling(name, dtype), MODELS[name][0] + "ForCausalLM")(config).to(dtype)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.modules():
            if dtype == torch.float64 and hasattr(layer, "slope_rate"):  # buffers that were made in fp32
                layer.slope_rate.copy_(layer.get_slope_rate().double())
                factors = layer.decay_factors(layer.slope_rate)
                for key, value in zip(("query_decay", "key_decay", "diagonal_decay"), factors):
                    getattr(layer, key).copy_(value)
        for key, p in model.named_parameters():
            if not key.endswith(("A_log", "dt_bias")):
                scale = 0.05 if p.ndim < 2 else 0.15
                p.add_(torch.randn(p.shape, generator=noise, dtype=torch.float64).to(dtype) * scale)
    return model.train()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, over the largest entry."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def batch_of(tokens, mask=None, cu_seqlens=None):
    """Two rows of random tokens, of which none is predicted where `mask` is 0, or one of packed documents."""
    rows = 2 if cu_seqlens is None else 1
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(3))
    if mask is not None:
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 0, -100, ids)}
    return {"input_ids": ids} if cu_seqlens is None else {"input_ids": ids, "cu_seqlens": cu_seqlens}


def loss_of(logits, labels):
    """The sum over the tokens that are predicted."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
