"""Small stand-ins for models whose code comes with their weights: the published forwards in other words.

Classes, attributes and what calls what with which arguments are as in the published files. What these take from
flash-linear-attention, or from kernels of their own, is written out token by token. What several of them have alike is
here once: the frame around the layers, and softmax attention but for its projections and turns. transformers would
import each as `transformers_modules.<...>`, which here only says it.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutput


def alibi(heads):
    """ALiBi's slopes, those between two powers of two by interpolation."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return slopes if power == heads else slopes + alibi(2 * power)[0::2][: heads - power]


def recurrence(q, k, v, g):
    """o [B, T, H, V] of q and k [B, T, H, K], v [B, T, H, V] and the log-decay g [B, T, H]."""
    state, outputs = 0.0, []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, None] @ state)[..., 0, :])
    return torch.stack(outputs, 1)


def causal(q, k, v, mask, scale):
    """[B, H, T, D]; padded keys are 0 in mask [B, T], None without padding."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    tokens = q.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if mask is not None:
        seen = seen & (mask != 0)[:, None, None]
    seen = seen | torch.eye(tokens, dtype=torch.bool)
    return (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v


def apply_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    width = cos.shape[-1]

    def turn(x):
        x, rest = x[..., :width], x[..., width:]
        a, b = x.chunk(2, -1)
        return torch.cat([x * cos + torch.cat([-b, a], -1) * sin, rest], -1)

    return turn(q), turn(k)


class Norm(nn.Module):
    def __init__(self, width, groups=1, eps=1e-6):
        super().__init__()
        self.weight, self.groups, self.eps = nn.Parameter(torch.ones(width)), groups, eps

    def forward(self, x):
        y = x.unflatten(-1, (self.groups, -1))
        return (y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()).flatten(-2) * self.weight


class Softmax(nn.Module):
    """Grouped-query attention, whose `heads` and `turn` are those of a model."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.attention_dropout = config, layer_idx, 0.0
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_value_heads = config.num_key_value_heads

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        q, k, v = (x.transpose(1, 2) for x in self.heads(hidden_states))
        q, k = self.turn(q, k, position_ids, position_embeddings)
        o = causal(q, k, v, attention_mask, self.head_dim**-0.5).transpose(1, 2).flatten(-2)
        return (self.dense if hasattr(self, "dense") else self.o_proj)(o), None, past_key_value


class Decoder(nn.Module):
    """Layers with norms and residuals between an embedding and logits; `make` gives layer i."""

    def __init__(self, config, make):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(make(i) for i in range(config.num_hidden_layers))
        self.norms = nn.ModuleList(Norm(config.hidden_size) for _ in self.layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, x, **of_layer):
        """`of_layer`: what layer i is given by name, as a function of i, or the same for all."""
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers)):
            x = x + layer(norm(x), **{name: y(i) if callable(y) else y for name, y in of_layer.items()})[0]
        return CausalLMOutput(logits=self.lm_head(x))


class WithSlopes(Decoder):
    """Of which each layer is given its decays."""

    def __init__(self, config, make):
        super().__init__(config, make)
        self.slopes = self._build_slope_tensor(config.num_attention_heads)

    @staticmethod
    def _build_slope_tensor(n_attention_heads):
        return torch.tensor(alibi(n_attention_heads)).reshape(-1, 1, 1)

    def slope_rate(self, i):
        return self.slopes * (1 - i / (len(self.layers) - 1) + 1e-5)


# Ring-linear-2.0


def fused_recurrent_simple_gla(q, k, v, g, initial_state=None, output_final_state=False):
    assert initial_state is None
    assert not output_final_state
    return recurrence(q * q.shape[-1] ** -0.5, k, v, g), None


chunk_simple_gla = fused_recurrent_simple_gla


class BailingMoeV2RotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.head_dim // 2  # of which the rest is not turned
        self.register_buffer("inv_freq", 1e4 ** -(torch.arange(0, width, 2) / width), persistent=False)

    def forward(self, x, position_ids):
        angle = (position_ids[..., None] * self.inv_freq).repeat(1, 1, 2)
        return angle.cos().to(x), angle.sin().to(x)


class BailingMoeV2LinearAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.mode = config, layer_idx, "chunk"
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        width = self.num_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.query_layernorm, self.key_layernorm = Norm(self.head_dim), Norm(self.head_dim)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)
        self.g_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.g_norm = Norm(width, groups=2)
        factor = 1 - (layer_idx - 1) / (config.num_hidden_layers - 1) + 1e-5
        self.register_buffer("slope", -self.build_slope_tensor(self.num_heads) * factor, persistent=False)
        self.lightning_attn_ops = {"chunk": chunk_simple_gla, "fused_recurrent": fused_recurrent_simple_gla}

    @staticmethod
    def build_slope_tensor(n_attention_heads):
        return torch.tensor(alibi(n_attention_heads), dtype=torch.float)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        position_embeddings=None,
        **kwargs,
    ):
        batch, tokens, _ = hidden_states.shape
        mode = "fused_recurrent" if tokens <= 64 else self.mode
        qkv = self.query_key_value(hidden_states).view(batch, tokens, 3 * self.num_heads, self.head_dim)
        q, k, v = qkv.split([self.num_heads] * 3, dim=-2)
        q, k = self.query_layernorm(q), self.key_layernorm(k)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        if attention_mask is not None:
            v = v * attention_mask[:, -tokens:, None, None]
        o, _ = self.lightning_attn_ops[mode](
            q=q,
            k=k,
            v=v,
            g=self.slope[None, None, :].expand(batch, tokens, self.num_heads),
            initial_state=None,
            output_final_state=use_cache,
        )
        o = self.g_norm(o.reshape(batch, tokens, -1)) * torch.sigmoid(self.g_proj(hidden_states))
        return self.dense(o), None, past_key_value


class BailingMoeV2Attention(Softmax):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        heads = self.num_heads + 2 * self.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.query_layernorm, self.key_layernorm = Norm(self.head_dim), Norm(self.head_dim)
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def heads(self, x):
        heads, groups = self.num_heads, self.num_key_value_heads
        q, k, v = self.query_key_value(x).unflatten(-1, (-1, self.head_dim)).split([heads, groups, groups], dim=-2)
        return self.query_layernorm(q), self.key_layernorm(k), v

    def turn(self, q, k, position_ids, position_embeddings):
        return apply_rotary_pos_emb(q, k, *position_embeddings)


class BailingMoeLinearV2ForCausalLM(Decoder):
    def __init__(self, config):
        kinds = (BailingMoeV2LinearAttention, BailingMoeV2Attention)
        super().__init__(config, lambda i: kinds[(i + 1) % config.layer_group_size == 0](config, i))
        self.rotary_emb = BailingMoeV2RotaryEmbedding(config)

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.embed_tokens(input_ids)
        return self.logits(
            x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            position_embeddings=self.rotary_emb(x, position_ids),
        )


# MiniMax-Text-01


class MiniMaxText01LightningAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        width = self.num_heads * self.head_dim
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act, self.norm = ACT2FN["silu"], Norm(width)
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.output_gate = nn.Linear(config.hidden_size, width, bias=False)
        self.offset, self.layer_idx = 0, layer_idx

    def forward(
        self,
        hidden_states,
        attn_mask=None,
        output_attentions=False,
        past_key_value=None,
        use_cache=False,
        slope_rate=None,
        do_eval=False,
        **kwargs,
    ):
        """The published one has this for evaluation only."""
        batch, tokens, _ = hidden_states.shape
        qkv = self.act(self.qkv_proj(hidden_states)).view(batch, tokens, self.num_heads, -1)
        q, k, v = qkv.split([self.head_dim] * 3, dim=3)
        if attn_mask is not None:
            v = v.masked_fill((1 - attn_mask)[:, :, None, None].bool(), 0)
        g = -slope_rate.flatten().expand(batch, tokens, self.num_heads).to(q)
        o = self.norm(recurrence(q, k, v, g).flatten(-2))
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * o), None, None


class MiniMaxText01RotaryEmbedding(nn.Module):
    """Its tables are as long as it is told."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", 1e4 ** -(torch.arange(0, dim, 2) / dim), persistent=False)

    def forward(self, x, seq_len=None):
        angle = (torch.arange(seq_len)[:, None] * self.inv_freq).repeat(1, 2)
        return angle.cos().to(x), angle.sin().to(x)


class MiniMaxText01Attention(Softmax):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        width, narrow = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.rotary_emb = MiniMaxText01RotaryEmbedding(self.head_dim // 2)

    def heads(self, x):
        return (y(x).unflatten(-1, (-1, self.head_dim)) for y in (self.q_proj, self.k_proj, self.v_proj))

    def turn(self, q, k, position_ids, position_embeddings):
        return apply_rotary_pos_emb(q, k, *self.rotary_emb(k, seq_len=k.shape[-2]), position_ids)


class MiniMaxText01ForCausalLM(WithSlopes):
    def __init__(self, config):
        kinds = (MiniMaxText01LightningAttention, MiniMaxText01Attention)
        super().__init__(config, lambda i: kinds[i % 2](config, i))

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        return self.logits(
            self.embed_tokens(input_ids),
            attn_mask=lambda i: None if i % 2 else attention_mask,
            attention_mask=lambda i: attention_mask if i % 2 else None,
            position_ids=position_ids,
            use_cache=use_cache,
            slope_rate=self.slope_rate,
        )


# TransNormerLLM


class Lrpe(nn.Module):
    def __init__(self, num_heads, embed_dim):
        super().__init__()
        width = num_heads * embed_dim
        self.index = torch.empty(0)
        self.theta = nn.Parameter(10000 ** (-2 / width * torch.arange(width)).reshape(num_heads, 1, -1))

    def forward(self, x, offset=0):
        if self.index.shape[0] < x.shape[-2]:
            self.index = torch.arange(x.shape[-2]).reshape(1, -1, 1).to(x)
        angle = self.theta * (self.index[:, : x.shape[-2]] + offset)
        return torch.cat([x * angle.cos(), x * angle.sin()], dim=-1)


class NormLinearAttention(nn.Module):
    def __init__(self, embed_dim, hidden_dim, num_heads, linear_use_lrpe=False):
        super().__init__()
        self.out_proj = nn.Linear(hidden_dim, embed_dim, bias=False)
        self.act, self.num_heads, self.norm = F.silu, num_heads, Norm(hidden_dim)
        self.linear_use_lrpe = linear_use_lrpe
        if linear_use_lrpe:
            self.lrpe = Lrpe(num_heads, hidden_dim // num_heads)
        self.qkvu_proj = nn.Linear(embed_dim, 4 * hidden_dim, bias=False)
        self.offset = 0

    def forward(
        self,
        x,
        attn_mask=None,
        attn_padding_mask=None,
        output_attentions=False,
        past_key_value=None,
        use_cache=False,
        slope_rate=None,
    ):
        q, k, v, u = self.qkvu_proj(x).chunk(4, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = self.act(q), self.act(k)
        if self.linear_use_lrpe:
            q, k = self.lrpe(q, offset=0), self.lrpe(k, offset=0)
        if attn_padding_mask is not None:
            v = v.masked_fill((1 - attn_padding_mask)[:, None, :, None].bool(), 0)
        weights = q @ k.mT * torch.exp(slope_rate.to(q) * attn_mask)
        o = self.norm((weights @ v).transpose(1, 2).flatten(-2))
        return self.out_proj(u * o), None, None


class TransnormerForCausalLM(WithSlopes):
    def __init__(self, config):
        heads, width = config.num_attention_heads, config.num_attention_heads * config.head_dim
        super().__init__(config, lambda i: NormLinearAttention(config.hidden_size, width, heads, i == 0))

    def _prepare_decoder_linear_attn_mask(self, input_shape, inputs_embeds, past_key_values_length):
        here = torch.arange(input_shape[1])
        mask = (here - here[:, None]).to(inputs_embeds)
        return mask.masked_fill(mask > 0, -torch.inf)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.embed_tokens(input_ids)
        mask = self._prepare_decoder_linear_attn_mask(input_ids.shape, x, 0)
        return self.logits(x, attn_mask=mask, attn_padding_mask=attention_mask, slope_rate=self.slope_rate)


for name, kind in list(globals().items()):
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == __name__ and name != "Norm":
        kind.__module__ = "transformers_modules.somebody.model.a1b2c3.modeling"

MODELS = {
    "ring": BailingMoeLinearV2ForCausalLM,
    "minimax": MiniMaxText01ForCausalLM,
    "transnormer": TransnormerForCausalLM,
}


def build(name, dtype=torch.float64):
    """A model in training with weights that make every term matter. 6 heads, which is no power of two."""
    config = SimpleNamespace(
        vocab_size=97,
        hidden_size=32,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=4,
        layer_group_size=2,
    )
    torch.manual_seed(0)
    model = MODELS[name](config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.05 if p.ndim < 2 else 0.15))
    return model.train()
