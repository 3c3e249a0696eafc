"""What mixes tokens and has no adapter is refused, wherever it is: modules are asked, and their class decides else."""

import contextlib
import copy
import inspect
import pickle
import re
import types
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn
import torch.nn.functional as F
from ranks import mesh_of, run_ranks
from small_model import SmallModel
from torch import nn
from torch.ao.quantization import FakeQuantize, disable_observer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import lasp
from lasp.checks import torch_modules, trial
from lasp.data_parallel.fsdp2 import wrap_fsdp2
from lasp.models import TNL, LinearTransformer, LinearTransformerConfig, TNLConfig
from lasp.modules import LightningAttention

D, IDS = 8, 17
IN_BACKWARD = "in backward it gives something else on a slice of the sequence than on the whole"
WRONG = "on a slice of the sequence it gives something else than on the whole"
OTHER_LENGTH = "it returns another number of tokens than it is given"
BY_CLASS, UNCLEAR = "its class mixes tokens", "its class may mix tokens, by how it is used"


@lasp.register
class Registered(nn.Module):
    """Sound: a short convolution and linear attention, both with the ranks. Weights of the first in a Conv1d."""

    sequence = None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(D, D, 4, padding=3, groups=D)
        self.qkv = nn.Linear(D, 3 * D)

    def before(self, x):
        return lasp.causal_conv(x, self.conv.weight.squeeze(1), self.conv.bias, sequence=self.sequence)

    def attend(self, q, k, v):
        return lasp.linear_attention(q, k, v, sequence=self.sequence)[0]

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 2, -1)).unbind(2)
        return self.attend(q, k, v).flatten(2)


class CallsItsConv(Registered):
    """The shape of GLA, Mamba-2 and others: a short convolution inside of a registered layer."""

    def before(self, x):
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class ConvAfterHalo(Registered):
    """Sound: the convolution gets the tokens before the shard, and pads nothing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(D, D, 4)

    def before(self, x):
        return self.conv(lasp.halo(x, 4, sequence=self.sequence).transpose(1, 2)).transpose(1, 2)


class ShiftsKeys(Registered):
    def attend(self, q, k, v):
        return lasp.linear_attention(q, k.roll(1, 1), v, sequence=self.sequence)[0]


class MakesQLate(Registered):
    def attend(self, q, k, v):
        return lasp.linear_attention(lambda: q.cumsum(1), k, v, sequence=self.sequence)[0]


class FourOperators(Registered):
    """Sound."""

    def attend(self, q, k, v):
        options, beta = {"sequence": self.sequence}, q.sigmoid().mean(-1)
        o, _ = lasp.delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, **options)
        _, state = lasp.linear_attention(q, k, v, output_final_state=True, **options)
        return o + lasp.softmax_attention(q, k, v, **options) + state.sum()


class Forgets(Registered):
    def attend(self, q, k, v):
        return lasp.linear_attention(q, k, v)[0]


class ForgetsConv(Registered):
    def before(self, x):
        return lasp.causal_conv(x, self.conv.weight.squeeze(1), self.conv.bias)


class CallsNothing(Registered):
    def before(self, x):
        return x

    def attend(self, q, k, v):
        return v


class NotRegistered(nn.Module):
    def forward(self, x):
        x = x.unsqueeze(2)
        return lasp.linear_attention(x, x, x)[0].squeeze(2)


class MHA(nn.Module):
    """Softmax attention under a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Own(nn.Module):
    """A layer whose forward is given, with modules of its own."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.do = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.do(self, x)


class Channels(nn.Module):
    """A module that takes [B, C, T]."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Rows(nn.Module):
    """A module that takes [B * T, C], as RetNet's GroupNorm does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.flatten(0, 1)).view_as(x)


class Experts(nn.Module):
    """Each expert gets the tokens that a router sends it: a number that depends on the data."""

    def __init__(self, balance=False):
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True)) for _ in range(3))
        self.balance = balance

    def forward(self, x):
        rows = x.flatten(0, 1)
        chosen, y = self.router(rows).argmax(-1), torch.zeros_like(rows)
        for n, expert in enumerate(self.experts):
            mine = (chosen == n).nonzero().squeeze(1)
            if len(mine):
                y[mine] = expert(rows[mine])
        return (y + y.mean(0) if self.balance else y).view_as(x)


class Siblings(nn.Module):
    """A shift that is a module, and beside it a recurrence that is not (RWKV has that shape)."""

    def __init__(self):
        super().__init__()
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))

    def forward(self, x):
        return (x - self.shift(x)).cumsum(1)


class HiddenByZeros(nn.Module):
    """What it mixes does not show in its output before the first step: it comes in times a parameter that is zero."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(D))

    def forward(self, x):
        return x + self.gain * (F.pad(x, (0, 0, 1, -1)) - x)


class OverlapsHalves(nn.Module):
    """Each token is a window of two, and windows that overlap are added up."""

    def __init__(self):
        super().__init__()
        self.fold = nn.Fold((1, 1), (1, 2))

    def forward(self, x):
        self.fold.output_size = (1, x.shape[1] + 1)
        return self.fold(x.mT.repeat_interleave(2, 1))[:, :, 0, : x.shape[1]].mT


class HiddenByTinyGain(HiddenByZeros):
    """As behind a LayerScale."""

    def __init__(self):
        super().__init__()
        nn.init.constant_(self.gain, 1e-6)


class InTrainingOnly(nn.Module):
    def forward(self, x):
        return x + x.mean(1, keepdim=True) if self.training else x


class Capacity(Experts):
    """In training an expert takes so many tokens only, the first that come."""

    def forward(self, x):
        chosen = self.router(x).argmax(-1, keepdim=True)
        free = (chosen == torch.arange(3)).cumsum(1).gather(-1, chosen) <= max(1, x.shape[1] // 4)
        return super().forward(x) * free if self.training else super().forward(x)


class OnlyInTraining(Registered):
    """Forgets the ranks in training, which a trial sees: strict=False."""

    def attend(self, q, k, v):
        return lasp.linear_attention(q, k, v, sequence=None if self.training else self.sequence)[0]

    def before(self, x):
        return x


class LearnedPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(64, D))

    def forward(self, x):
        return x + self.table[: x.shape[1]]


class Angles(nn.Module):
    """Of rotary positions: a table by the number of tokens, in float."""

    def forward(self, x):
        return torch.outer(torch.arange(x.shape[1]).to(x), 10 ** -torch.linspace(0, 1, x.shape[-1]).to(x)).cos()


class Model(nn.Module):
    """A language model around a registered layer and others."""

    def __init__(self, *layers, first=None):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(IDS, D)
        self.layers = nn.ModuleList([first or Registered(), *layers])
        self.head = nn.Linear(D, IDS)

    def start(self, ids):
        return self.tokens(ids)

    def forward(self, ids):
        x = self.start(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Flat(Model):
    """What it returns has no dimension of tokens."""

    def forward(self, ids):
        return super().forward(ids).flatten()


class Cuts(Model):
    def forward(self, ids):
        return super().forward(ids)[:, :-1]


class Counts(Model):
    """Counts positions from 0."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(64, D)

    def start(self, ids):
        return self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))


class KnowsDocuments(Model):
    """Counts the documents before a token; where one ends, the token says."""

    def __init__(self, vocabulary, ends):
        super().__init__()
        self.tokens, self.ends = nn.Embedding(vocabulary, D), ends % vocabulary

    def start(self, ids):
        return self.tokens(ids) + (ids == self.ends).cumsum(1).unsqueeze(-1)


class EndsByAnAttribute(KnowsDocuments):
    """The id of a document's end stands in the middle of the vocabulary, as that of many tokenizers whose table is
    rounded up."""

    def __init__(self, holder):
        super().__init__(50_304, 50_256)
        ends, self.ends = self.ends, None
        self.config = types.SimpleNamespace(vocab_size=50_304, eos_token_id=[7, ends] if holder == "list" else ends)

    def start(self, ids):
        ends = self.config.eos_token_id
        ends = ends[-1] if isinstance(ends, list) else ends
        return self.tokens(ids) + (ids == ends).cumsum(1).unsqueeze(-1)


EOS = 31_337


class EndsByAConstant(EndsByAnAttribute):
    """Nobody but its code knows the id."""

    def __init__(self):
        super().__init__("")
        del self.config

    def start(self, ids):
        return self.tokens(ids) + (ids == EOS).cumsum(1).unsqueeze(-1)


class InBackwardOnly(torch.autograd.Function):
    """As one that smooths gradients; `backward` mixes tokens, and forward does not."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cumsum(1)


def of_long_sequences(mix):
    """What a trial of some 30 tokens does not come to."""
    return lambda s, x: mix(x) if x.shape[1] > 64 else x


class DrawsInEvaluation(nn.Module):
    """Noise of its own on every token, also in evaluation."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class CountsByMask(Model):
    """Counts positions from 0 where a mask is given."""

    def forward(self, ids, attention_mask=None):
        x = self.tokens(ids)
        if attention_mask is not None:
            x = x + attention_mask.cumsum(1).unsqueeze(-1)
        return self.head(x + self.layers[0](x))


class CountsUnlessGiven(Counts):
    def forward(self, ids, position_ids=None):
        x = self.tokens(ids)
        x = x + self.positions(torch.arange(ids.shape[1]) if position_ids is None else position_ids)
        return self.head(x + self.layers[0](x))


class HandsOn(nn.Module):
    """A wrapper that names nothing of what it hands on, and says by no `base_model` to whom."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class NamesTokens(HandsOn):
    def forward(self, tokens, **kwargs):
        return self.inner(tokens, **kwargs)


def in_blocks(x, size):
    padded = F.pad(x, (0, 0, 0, -x.shape[1] % size))
    return padded.unflatten(1, (-1, size)).cumsum(2).flatten(1, 2)[:, : x.shape[1]]


def some_at_a_time(layer, x):
    return torch.cat([layer.inner(part) for part in x.split(4, 1)], 1)


def dirac():
    conv = nn.Conv1d(D, D, 3, padding=1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def refusal(model, **options):
    with pytest.raises(ValueError, match="cannot split the sequence of: ") as raised:
        lasp.parallelize(model, None, **options)
    assert not any(hasattr(m, "_forward_hooks") and m._forward_hooks for m in model.modules())
    return str(raised.value)


def refused(model, **options):
    """The paths that the refusal names, with what it says of each."""
    first = refusal(model, **options).split("\n")[0].removeprefix("cannot split the sequence of: ")
    return dict(entry.split(": ", 1) for entry in first.split("; "))


# What is refused

MIXING = {
    "conv in a registered layer": (Model(CallsItsConv()), {"layers.1.conv (Conv1d)": WRONG}),
    "roll in a registered layer": (Model(ShiftsKeys()), {"layers.1 (ShiftsKeys)": WRONG}),
    "cumsum in the function that makes q": (Model(MakesQLate()), {"layers.1 (MakesQLate)": WRONG}),
    "sdpa": (Model(MHA()), {"layers.1 (MHA)": WRONG}),
    "roll": (Model(Own(lambda s, x: x.roll(1, 1))), {"layers.1 (Own)": WRONG}),
    "cumsum": (Model(Own(lambda s, x: x.cumsum(1))), {"layers.1 (Own)": WRONG}),
    "token shift": (Model(Own(lambda s, x: F.pad(x, (0, 0, 1, -1)))), {"layers.1 (Own)": WRONG}),
    "mean": (Model(Own(lambda s, x: x + x.mean(1, keepdim=True))), {"layers.1 (Own)": WRONG}),
    "flip": (Model(Own(lambda s, x: x.flip(1))), {"layers.1 (Own)": WRONG}),
    "look ahead": (Model(Own(lambda s, x: F.pad(x, (0, 0, -1, 1)))), {"layers.1 (Own)": WRONG}),
    "functional conv": (
        Model(Own(lambda s, x: F.conv1d(x.mT, s.conv.weight, padding=1).mT, conv=nn.Conv1d(D, D, 3))),
        {"layers.1 (Own)": WRONG},
    ),
    "positions": (Counts(), {"the model itself (Counts)": trial.COUNTED}),
    "fewer tokens": (Cuts(), {"the model itself (Cuts)": "it returns fewer tokens than it is given"}),
    "table of positions": (Model(LearnedPositions()), {"layers.1 (LearnedPositions)": WRONG}),
    "angles of positions": (
        Model(Own(lambda s, x: x * s.angles(x), angles=Angles())),
        {"layers.1.angles (Angles)": trial.COUNTED},
    ),
    "angles that are handed on": (
        Model(Own(lambda s, x: x * s.inner(torch.arange(x.shape[1]).to(x).view(1, -1, 1)), inner=nn.Tanh())),
        {"layers.1 (Own)": trial.COUNTED},
    ),
    "shift and recurrence": (
        Model(Siblings()),
        {"layers.1.shift (ZeroPad2d)": WRONG, "layers.1 (Siblings)": WRONG},
    ),
    "zero gain": (Model(HiddenByZeros()), {"layers.1 (HiddenByZeros)": WRONG}),
    "tiny gain": (Model(HiddenByTinyGain()), {"layers.1 (HiddenByTinyGain)": WRONG}),
    "in training only": (Model(InTrainingOnly()), {"layers.1 (InTrainingOnly)": WRONG}),
    "capacity of experts": (Model(Capacity()), {"layers.1 (Capacity)": WRONG}),
    "without ranks in training": (
        Model(OnlyInTraining()),
        {"layers.1 (OnlyInTraining)": "it calls lasp.linear_attention without sequence=self.sequence"},
    ),
    "in blocks of two": (
        Model(Own(lambda s, x: in_blocks(x, 2))),
        {"layers.1 (Own)": WRONG},
    ),
    "in blocks of four": (
        Model(Own(lambda s, x: in_blocks(x, 4))),
        {"layers.1 (Own)": WRONG},
    ),
    "scale of all tokens": (Model(Own(lambda s, x: x / x.abs().max())), {"layers.1 (Own)": WRONG}),
    "documents, few ids": (KnowsDocuments(17, 0), {"the model itself (KnowsDocuments)": WRONG}),
    "documents, many ids": (KnowsDocuments(50_000, 0), {"the model itself (KnowsDocuments)": WRONG}),
    "documents, the last id": (KnowsDocuments(50_000, -1), {"the model itself (KnowsDocuments)": WRONG}),
    "documents, an id of the configuration": (
        EndsByAnAttribute(""),
        {"the model itself (EndsByAnAttribute)": WRONG},
    ),
    "documents, several ids": (EndsByAnAttribute("list"), {"the model itself (EndsByAnAttribute)": WRONG}),
    "documents, an id in the code": (EndsByAConstant(), {"the model itself (EndsByAConstant)": WRONG}),
    "shift by 100": (Model(Own(lambda s, x: F.pad(x, (0, 0, 100, 0))[:, : x.shape[1]])), {"layers.1 (Own)": WRONG}),
    "dilated conv": (
        Model(
            Own(
                lambda s, x: F.conv1d(F.pad(x.mT, (180, 0)), s.conv.weight, dilation=90).mT,
                conv=nn.Conv1d(D, D, 3),
            )
        ),
        {"layers.1 (Own)": WRONG},
    ),
    "dilated Conv1d": (
        Model(Channels(nn.Sequential(nn.Conv1d(D, D, 3, dilation=40, padding=40)))),
        {"layers.1.inner.0 (Conv1d)": WRONG},
    ),
    "roll by 50 where there are so many": (
        Model(Own(lambda s, x: x.roll(50, 1) if x.shape[1] > 50 else x)),
        {"layers.1 (Own)": WRONG},
    ),
    "mean of long sequences": (
        Model(Own(of_long_sequences(lambda x: x - x.mean(1, keepdim=True)))),
        {"layers.1 (Own)": WRONG},
    ),
    "rows for tokens": (
        Model(Own(lambda s, x: x.reshape(x.shape[1], x.shape[0], D).transpose(0, 1))),
        {"layers.1 (Own)": WRONG},
    ),
    "in backward only": (Model(Own(lambda s, x: InBackwardOnly.apply(x))), {"layers.1 (Own)": IN_BACKWARD}),
    "in backward only, after a layer": (
        Model(Own(lambda s, x: s.after(InBackwardOnly.apply(s.before(x))), before=nn.Linear(D, D), after=nn.GELU())),
        {"layers.1 (Own)": IN_BACKWARD},
    ),
    "random numbers in evaluation": (Model(DrawsInEvaluation()), {"layers.1 (DrawsInEvaluation)": trial.DRAWS}),
    "positions by a mask": (CountsByMask(), {"the model itself (CountsByMask)": WRONG}),
    "identity at first": (Model(Channels(dirac())), {"layers.1.inner (Conv1d)": WRONG}),
    "ZeroPad2d": (Model(nn.ZeroPad2d((0, 0, 1, -1))), {"layers.1 (ZeroPad2d)": WRONG}),
    "CircularPad1d": (
        Model(Channels(nn.Sequential(nn.CircularPad1d((2, 0)), nn.Conv1d(D, D, 3)))),
        {"layers.1.inner.0 (CircularPad1d)": WRONG},
    ),
    "ReflectionPad1d": (
        Model(Own(lambda s, x: s.pad(x.mT)[..., : x.shape[1]].mT, pad=nn.ReflectionPad1d((1, 0)))),
        {"layers.1.pad (ReflectionPad1d)": WRONG},
    ),
    "ReplicationPad1d": (
        Model(Own(lambda s, x: s.pad(x.mT)[..., : x.shape[1]].mT, pad=nn.ReplicationPad1d((1, 0)))),
        {"layers.1.pad (ReplicationPad1d)": WRONG},
    ),
    "LPPool1d": (
        Model(Channels(nn.Sequential(nn.ConstantPad1d((1, 0), 0.0), nn.LPPool1d(2, 2, 1)))),
        {"layers.1.inner.0 (ConstantPad1d)": WRONG},
    ),
    "LPPool1d that shortens": (
        nn.Sequential(Registered(), Channels(nn.LPPool1d(2, 2))),
        {"1.inner (LPPool1d)": OTHER_LENGTH},
    ),
    "GroupNorm": (Model(Channels(nn.GroupNorm(2, D))), {"layers.1.inner (GroupNorm)": WRONG}),
    "BatchNorm1d": (Model(Channels(nn.BatchNorm1d(D))), {"layers.1.inner (BatchNorm1d)": WRONG}),
    "BatchNorm1d of rows": (Model(Rows(nn.BatchNorm1d(D))), {"layers.1.inner (BatchNorm1d)": WRONG}),
    "InstanceNorm1d": (Model(Channels(nn.InstanceNorm1d(D))), {"layers.1.inner (InstanceNorm1d)": WRONG}),
    "Softmax": (Model(nn.Softmax(1)), {"layers.1 (Softmax)": WRONG}),
    "pooled gate": (
        Model(Own(lambda s, x: x * s.pool(x.mT).mT.sigmoid(), pool=nn.AdaptiveAvgPool1d(1))),
        {"layers.1.pool (AdaptiveAvgPool1d)": WRONG},
    ),
    "Upsample": (
        nn.Sequential(Registered(), Channels(nn.Upsample(scale_factor=2))),
        {"1.inner (Upsample)": OTHER_LENGTH},
    ),
    "Upsample, linear, and back": (
        Model(Channels(nn.Sequential(nn.Upsample(scale_factor=2, mode="linear"), nn.MaxPool1d(2)))),
        {"layers.1.inner.0 (Upsample)": OTHER_LENGTH, "layers.1.inner.1 (MaxPool1d)": OTHER_LENGTH},
    ),
    "Unfold": (
        Model(Own(lambda s, x: s.unfold(x.mT.unsqueeze(2)).mT[..., :D], unfold=nn.Unfold((1, 3), padding=(0, 1)))),
        {"layers.1.unfold (Unfold)": WRONG},
    ),
    "Fold": (Model(OverlapsHalves()), {"layers.1.fold (Fold)": WRONG}),
    "LSTM": (Model(Own(lambda s, x: s.rnn(x)[0], rnn=nn.LSTM(D, D, batch_first=True))), {"layers.1.rnn (LSTM)": WRONG}),
    "MultiheadAttention": (
        Model(nn.TransformerEncoderLayer(D, 2, D, batch_first=True)),
        {"layers.1.self_attn (MultiheadAttention)": WRONG},
    ),
    "balance of experts": (Model(Experts(balance=True)), {"layers.1 (Experts)": WRONG}),
    "without ranks": (
        Model(Forgets()),
        {"layers.1 (Forgets)": "it calls lasp.linear_attention without sequence=self.sequence"},
    ),
    "convolution without ranks": (
        Model(ForgetsConv()),
        {"layers.1 (ForgetsConv)": "it calls lasp.causal_conv without sequence=self.sequence"},
    ),
    "some at a time": (
        Model(Own(some_at_a_time, inner=Own(lambda s, x: x.cumsum(1)))),
        {"layers.1 (Own)": WRONG},
    ),
    "no operator": (
        Model(CallsNothing()),
        {"layers.1 (CallsNothing)": "it is registered, but gives its sequence= to no operator of lasp"},
    ),
    "not registered": (
        Model(NotRegistered()),
        {"layers.1 (NotRegistered)": "it calls lasp.linear_attention, but its class is not registered"},
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_is_refused_and_nothing_else_is_named(name):
    model, expected = MIXING[name]
    assert refused(model) == expected


OTHER_DTYPES = [
    pytest.param(dtype, marks=pytest.mark.any_pytorch) for dtype in (torch.bfloat16, torch.float16, torch.float64)
]


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["conv in a registered layer", "sdpa", "GroupNorm", "table of positions"])
def test_in_any_dtype(name, dtype):
    model, expected = MIXING[name]
    assert refused(copy.deepcopy(model).to(dtype)) == expected


# What is accepted

SOUND = {
    "operators": Model(FourOperators()),
    "halo": Model(ConvAfterHalo()),
    "GroupNorm of rows": Model(Rows(nn.GroupNorm(2, D))),
    "Conv1d of width 1": Model(Channels(nn.Conv1d(D, D, 1))),
    "Softmax": Model(nn.Softmax(-1)),
    "Experts": Model(Experts()),
    "Upsample and back": Model(Channels(nn.Sequential(nn.Upsample(scale_factor=2), nn.AvgPool1d(2)))),
    "dropout by a function": Model(Own(lambda s, x: F.dropout(x, 0.5, s.training))),
    "Dropout": Model(nn.Dropout(0.5), nn.RReLU(), nn.LayerNorm(D), nn.GELU(), nn.Identity()),
    "inplace": Model(Own(lambda s, x: s.act(x.clone()), act=nn.ReLU(inplace=True))),
    "shared": (lambda layer: Model(layer, layer))(Registered()),
    "SmallModel": SmallModel(),
    "TNL": TNL(TNLConfig(IDS, layers=2, width=32, heads=2, glu_width=48)),
    "LinearTransformer": LinearTransformer(LinearTransformerConfig(IDS, layers=2, width=32, heads=2, mlp_width=48)),
    "example": nn.Sequential(nn.Embedding(16, D), Registered(), Registered(), nn.Linear(D, 16)),
    "no embedding": nn.Sequential(nn.LayerNorm(D), Registered()),
    "a row alone": Model(Own(lambda s, x: x.squeeze(0).unsqueeze(0) * (1 if len(x) == 1 else s.no_rows))),
    "no gradient": Model(Own(lambda s, x: x + x.detach().round())),
    "in place": Model(Own(lambda s, x: (x * 2).mul_(3).add_(x))),
    "some at a time": Model(Own(some_at_a_time, inner=nn.Sequential(nn.Linear(D, D), nn.GELU()))),
    "of both rows": Model(Own(lambda s, x: x + x.mean(0, keepdim=True))),
    "a gain of its own": Model(Own(lambda s, x: x * s.gain(x.new_ones(1, D)), gain=nn.Linear(D, D))),
    "long": Model(Own(lambda s, x: s.conv(x.mT).mT, conv=nn.Conv1d(D, D, 1, dilation=64))),
}


@pytest.mark.parametrize("dtype", [torch.float32, *OTHER_DTYPES], ids=str)
@pytest.mark.parametrize("name", SOUND)
def test_what_mixes_no_tokens_is_accepted_after_a_trial(name, dtype):
    model = lasp.parallelize(copy.deepcopy(SOUND[name]).to(dtype), None)
    assert lasp.explain(model).not_asked == ""


def _state(model):
    plain = {
        path: {name: x for name, x in vars(m).items() if not name.startswith("_")} for path, m in model.named_modules()
    }
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    tensors = {name: x.clone() for name, x in (*model.named_parameters(), *model.named_buffers())}
    return plain, hooks, tensors, [p.grad for p in model.parameters()], torch.get_rng_state()


class Keeps(nn.Module):
    """Changes itself in forward, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.calls, self.last = 0, None
        self.register_buffer("seen", torch.zeros(()))
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        self.seen += x.shape[1]
        self.late = torch.rand(())
        self.norm(x.flatten(0, 1))
        return x


def test_a_trial_leaves_everything_as_it_was(capfd):
    model = Model(Keeps(), Own(lambda s, x: warnings.warn("seen", stacklevel=1) or x), nn.Dropout())
    model.layers[2].eval()
    model.tokens.weight.grad = torch.ones(IDS, D)
    before = _state(model)
    plan = {"layers.1": lasp.adapters.token_local}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lasp.parallelize(model, None, plan=plan)
    after = _state(model)
    assert before[:2] == after[:2]
    assert before[3] == after[3]
    assert all(torch.equal(x, after[2][name]) for name, x in before[2].items())
    assert torch.equal(before[4], after[4])
    assert capfd.readouterr() == ("", "")
    assert all(m._forward_pre_hooks == {} for m in model.modules())


def test_a_trial_gives_back_the_weights_of_a_layer_that_is_there_twice():
    """A weight of zeros is random in a trial, and functional_call would leave it so where a layer has two names."""
    layer = Own(lambda s, x: x + s.gain * x)
    layer.gain = nn.Parameter(torch.zeros(D))
    model = Model(layer, nn.Identity(), layer)
    before = dict(model.named_parameters(remove_duplicate=False))
    lasp.parallelize(model, None)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items())
    assert torch.equal(layer.gain, torch.zeros(D))


def sends_by(kind, x):
    """What reaches other ranks, in one of the ways there are."""
    group, last = dist.group.WORLD, dist.get_world_size() - 1
    if kind == "all_reduce":
        dist.all_reduce(x.sum())
    elif kind == "with autograd":
        torch.distributed.nn.functional.all_reduce(x)
    elif kind == "functional":
        functional.all_reduce(x, "sum", group) + 1
    elif kind == "DTensor":
        DTensor.from_local(x, init_device_mesh("cpu", (last + 1,)), [Partial()]).full_tensor()
    elif kind == "send":
        dist.send(x.contiguous(), 0)
    elif kind == "objects":
        dist.all_gather_object([None] * (last + 1), 1)
    elif kind == "barrier":
        dist.barrier()
    elif kind == "lasp":
        lasp.unshard_sequence(x, group)
    elif kind == "through the store":
        lasp.sync_grads(nn.Linear(2, 2), group)


SENDS = ["all_reduce", "with autograd", "functional", "DTensor", "send", "objects", "barrier", "lasp"]
SENDS += ["through the store"]


class SendsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient.sum())
        return gradient * 2


def _sends_on_one_rank():
    """Nobody waits for it there, and the ranks go on as ever."""
    mesh = mesh_of(sp=2)
    init_device_mesh("cpu", (2,))  # the first in a process sends something itself
    rank = dist.get_rank()

    def every_fourth(layer, x):
        layer.calls = getattr(layer, "calls", 0) + 1
        if layer.calls % 4 == 0:
            dist.all_reduce(x.sum())
        return x

    ways = {kind: lambda s, x, kind=kind: sends_by(kind, x) or x for kind in SENDS}
    ways |= {
        "in training": lambda s, x: (s.training and sends_by("all_reduce", x)) or x,
        "in backward": lambda s, x: SendsInBackward.apply(x),
        "now and then": every_fourth,
    }
    for kind, forward in ways.items():
        model = Model(Own(forward if rank == 1 else lambda s, x: x))
        lasp.parallelize(model, mesh)
        told = lasp.explain(model).not_asked
        if rank == 1 and kind in SENDS:
            why = r"a trial sends nothing, and (\w+\.\w+\.default is called|ranks are asked before sync_grads)"
            assert re.search(rf"the model itself \(Model\), layers\.1 \(Own\) \({why}\)", told), (kind, told)
        else:
            assert told == "", (kind, told)
    dist.barrier()
    assert lasp.verify(SmallModel(), mesh).ok


@pytest.mark.timeout(120)
def test_a_module_sends_nothing_in_a_trial():
    run_ranks(2, _sends_on_one_rank)


class RingAttention(nn.Module):
    def forward(self, x):
        dist.all_gather([torch.empty_like(x) for _ in range(dist.get_world_size())], x)
        return x


class ExpertsOfRanks(nn.Module):
    """A token is sent to the rank that holds its expert, and back."""

    def __init__(self):
        super().__init__()
        self.router, self.expert = nn.Linear(D, 2), nn.Linear(D, D)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        chosen = self.router(tokens).argmax(-1)
        order, counts = chosen.argsort(stable=True), torch.bincount(chosen, minlength=2)
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts)
        send, receive = counts.tolist(), theirs.tolist()
        group = dist.group.WORLD
        there = functional.all_to_all_single_autograd(tokens[order], receive, send, group)
        back = functional.all_to_all_single_autograd(self.expert(there), send, receive, group)
        return torch.zeros_like(tokens).index_copy(0, order, back).view_as(x)


def _modules_that_send():
    """Those that ranks share experts, or weights, by are told by name; and a plan may say of one what it does."""
    mesh, rank = mesh_of(sp=2), dist.get_rank()
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"layers\.1 \(RingAttention\): by its name it mixes tokens") as refused:
        lasp.parallelize(Model(RingAttention()), mesh)
    assert "decided: a trial sends nothing, and c10d.allgather_.default is called" in str(refused.value)
    model = Model(RingAttention())
    lasp.parallelize(model, mesh, plan={"layers.1": lasp.adapters.token_local})
    assert "layers.1" not in lasp.explain(model).not_asked

    torch.manual_seed(0)
    model, experts = Model(ExpertsOfRanks()), [nn.Linear(D, D) for _ in range(2)]
    model.layers[1].expert = experts[rank]
    lasp.parallelize(model, mesh)
    told = "the model itself (Model), layers.1 (ExpertsOfRanks) (a trial sends nothing, and c10d.alltoall_base_.default"
    assert told in lasp.explain(model).not_asked
    x = torch.randn(1, 3 + rank, D)
    y = model.layers[1](x)
    chosen = model.layers[1].router(x).argmax(-1, keepdim=True)
    torch.testing.assert_close(y, torch.where(chosen == 0, experts[0](x), experts[1](x)))
    assert model(torch.arange(8)[None] + rank).shape == (1, 8, IDS)


def test_modules_that_send_are_told_by_name():
    run_ranks(2, _modules_that_send)


class WritesInTraining(nn.Module):
    """As one that keeps its losses in a list, and a code book as a mean of what it has seen."""

    def __init__(self):
        super().__init__()
        self.losses, self.seen, self.counts = [1.0], {2}, {"a": [3]}
        self.codes = nn.Parameter(torch.ones(D), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(D))

    def forward(self, x):
        if self.training:
            self.losses.append(x.mean())
            self.seen.add(len(self.losses))
            self.counts[len(self.losses)] = []
            self.codes.data.lerp_(x.mean((0, 1)), 0.1)
            self.gain.data.clamp_(0.0, 0.5)
        return x * 2


@pytest.mark.parametrize("training", [True, False])
def test_a_trial_in_training_writes_nothing(training):
    model = Model(WritesInTraining()).train(training)
    lasp.parallelize(model, None)
    layer = model.layers[1]
    assert (layer.losses, layer.seen, layer.counts) == ([1.0], {2}, {"a": [3]})
    assert torch.equal(layer.codes, torch.ones(D))
    assert torch.equal(layer.gain, torch.ones(D))
    assert all(m.training == training for m in model.modules())


def by_a_hook(layer):
    """A spectral norm by a hook of one's own, which writes to its buffer in evaluation, too."""
    layer.register_buffer("u", torch.randn(len(layer.weight)))

    def before(layer, args):
        v = F.normalize(layer.weight.detach().mT @ layer.u, dim=0)
        layer.u.data = F.normalize(layer.weight.detach() @ v, dim=0)
        layer.sigma = layer.u @ layer.weight @ v

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(lambda layer, args, out: out / layer.sigma)


NORMS = [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, by_a_hook]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS, ids=["hook", "parametrization", "own hook"])
def test_each_run_of_a_trial_begins_with_the_same_buffers(norm, training):
    """A power iteration goes on at each forward, of the weight alone."""
    torch.manual_seed(0)
    model = Model(nn.Linear(D, D)).train(training)
    norm(model.layers[1])
    before = _state(model)
    lasp.parallelize(model, None)
    assert lasp.explain(model).not_asked == ""
    assert all(torch.equal(x, before[2][name]) for name, x in _state(model)[2].items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_range_of_activations_is_refused_while_it_is_observed():
    """It is that of a rank's tokens; what rounds by a range that is known does it token by token."""
    model = Model(nn.Sequential(nn.Linear(D, D), FakeQuantize()))
    model(torch.zeros(1, 3, dtype=torch.long))
    assert refused(model) == {"layers.1.1 (FakeQuantize)": WRONG}
    lasp.parallelize(model.apply(disable_observer), None)
    assert lasp.explain(model).not_asked == ""


def test_a_trial_that_fails_leaves_everything_as_it_was_too():
    model = Model(Own(lambda s, x: x[:, :0].reshape(-1)[10], conv=nn.Conv1d(D, D, 3)))
    before = _state(model)
    assert refused(model) == {"layers.1.conv (Conv1d)": BY_CLASS}
    after = _state(model)
    assert before[:2] == after[:2]
    assert torch.equal(before[4], after[4])


def test_every_operator_answers_in_a_trial():
    """What takes the ranks is a border that a trial knows, and keeps its name and its arguments."""
    named = {name: getattr(lasp, name) for name in lasp.__all__}
    operators = {n for n, f in named.items() if inspect.isfunction(f) and "sequence" in inspect.signature(f).parameters}
    assert operators == {
        "linear_attention",
        "delta_rule",
        "causal_conv",
        "halo",
        "softmax_attention",
        "block_attention",
    }
    assert all(named[n].__wrapped__.__name__ == n and named[n].__doc__ for n in operators)


def test_operators_work_as_ever_after_a_trial():
    x = torch.randn(1, 5, 2, 4)
    expected = lasp.linear_attention(x, x, x)[0]
    refused(MIXING["sdpa"][0])
    lasp.parallelize(copy.deepcopy(SOUND["operators"]), None)
    assert torch.equal(lasp.linear_attention(x, x, x)[0], expected)
    assert not torch.equal(expected, x)


# Where a trial cannot run


class OddInputs(nn.Module):
    """Nobody can guess what its forward takes."""

    def __init__(self, *layers):
        super().__init__()
        self.inner = LightningAttention()
        self.layers = nn.ModuleList(layers)

    def forward(self, image, boxes):
        raise NotImplementedError(boxes["image"])


class SomebodysAttention(nn.Module):
    def forward(self, x, boxes):
        raise NotImplementedError(boxes["image"])


def meta(make):
    with torch.device("meta"):
        return make()


def large():
    model = SmallModel()
    model.large = nn.ParameterList([nn.Parameter(torch.empty(1).expand(10**9))])
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (meta(lambda: TNL(TNLConfig.named("1B"))), "its weights are on the meta device"),
        (large(), r"it would take long, with 1,000,00\d,\d* parameters on cpu"),
        (nn.Sequential(SmallModel(), nn.LazyLinear(D)), "its weights are not initialized"),
        (Flat(), "the model itself .*cannot be related to the tokens"),
        (OddInputs(), "a trial with 29 tokens ends in TypeError: 'NoneType' object is not subscriptable"),
    ],
    ids=["meta", "large", "lazy", "flat", "odd"],
)
def test_explain_says_that_names_decided_and_why(model, why):
    lasp.parallelize(model, None)
    told = lasp.explain(model)
    assert told.not_asked.startswith("whether they mix tokens was told by name, not by a trial: ")
    assert type(model).__name__ in told.not_asked or "SmallModel" in told.not_asked
    assert told.not_asked in str(told)
    assert re.search(why, told.not_asked), told.not_asked


@pytest.mark.parametrize(
    ("layer", "how"),
    [
        (nn.Conv1d(D, D, 3), BY_CLASS),
        (nn.LPPool1d(2, 2), BY_CLASS),
        (nn.Unfold(3), BY_CLASS),
        (nn.ZeroPad2d(1), UNCLEAR),
        (nn.GroupNorm(2, D), UNCLEAR),
        (nn.LayerNorm((5, D)), UNCLEAR),
        (nn.Softmax(1), UNCLEAR),
        (nn.Flatten(), UNCLEAR),
        (nn.CrossEntropyLoss(), UNCLEAR),
        (type("MyConv", (nn.Conv1d,), {})(D, D, 3), "by its name it mixes tokens"),
        (type("Smoother", (nn.Conv1d,), {})(D, D, 3), "the class that it derives from mixes tokens"),
        (SomebodysAttention(), "by its name it mixes tokens"),
        (type("MHA", (SomebodysAttention,), {})(), "by its name it mixes tokens"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_without_a_trial_classes_and_names_decide(layer, how):
    assert refused(OddInputs(layer)) == {f"layers.0 ({type(layer).__name__})": how}
    lasp.parallelize(OddInputs(layer), None, plan={"layers.0": lasp.adapters.token_local})


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(D, D),
        nn.LayerNorm(D),
        nn.Softmax(-1),
        nn.Flatten(2),
        nn.Dropout(),
        nn.CrossEntropyLoss(reduction="none"),
    ]
    + [
        type(name, (SomebodysAttention,), {})()
        for name in ("Mamba2RMSNorm", "RecurrentGemmaMlp", "RecurrentGemmaRotaryEmbedding", "ConvertIds")
    ],
    ids=lambda x: type(x).__name__,
)
def test_without_a_trial_these_are_accepted(layer):
    model = OddInputs(layer)
    assert lasp.parallelize(model, None) is model
    with pytest.raises(ValueError, match="parallelized already"):
        lasp.parallelize(model, None)


def test_where_the_whole_cannot_be_asked_its_parts_are():
    assert refused(OddInputs(nn.Sequential(nn.Linear(D, D), MHA()))) == {"layers.0.1 (MHA)": WRONG}
    assert refused(OddInputs(CallsItsConv())) == {"layers.0.conv (Conv1d)": WRONG}


def test_a_model_of_few_tokens_is_asked_with_few():
    model = Counts()
    model.positions = nn.Embedding(14, D)
    assert refused(model) == {"the model itself (Counts)": trial.COUNTED}


def _sharded():
    model = wrap_fsdp2(SmallModel(), mesh_of(sp=2))
    lasp.parallelize(model, mesh_of(sp=2))
    assert "(its weights are sharded)" in lasp.explain(model).not_asked
    wrapped = nn.parallel.DistributedDataParallel(SmallModel())
    lasp.parallelize(wrapped, mesh_of(sp=2))
    assert "(it is wrapped for data parallelism)" in lasp.explain(wrapped).not_asked


def test_weights_that_are_sharded_are_not_gathered_for_a_trial():
    run_ranks(2, _sharded)


# The table of torch.nn


def test_every_module_of_torch_is_in_one_list():
    classes = [x for x in vars(nn).values() if isinstance(x, type) and issubclass(x, nn.Module) and x is not nn.Module]
    lists = (torch_modules.LOCAL, torch_modules.MIXES, torch_modules.DEPENDS)
    assert len(classes) > 150
    for cls in classes:
        assert sum(cls.__name__ in names for names in lists) == 1, f"{cls.__name__} is new: does it mix tokens?"


# What it says


def test_advice_on_positions_stands_beside_that_on_a_layer():
    model = Counts()
    model.layers.append(CallsItsConv())
    text = refusal(model)
    assert "for layers.1.conv:" in text
    assert text.endswith(
        "Positions that it counts from 0: let the forward of Counts take position_ids and hand them on to what counts, "
        "and call it as model(local['input_ids'], local['position_ids'])."
    )


def test_the_refusal_shows_a_way_for_the_class_and_offers_token_local_last():
    text = refusal(Model(CallsItsConv()))
    assert "@lasp.register\n    class CallsItsConv(nn.Module):\n        sequence = None" in text
    assert "lasp.causal_conv(x, self.conv.weight.squeeze(1), self.conv.bias, sequence=self.sequence)" in text
    assert text.endswith("Only if it mixes no tokens: plan={'layers.1.conv': lasp.adapters.token_local}.")
    assert "strict" not in text
    text = refusal(Model(MHA()))
    assert "class MHA(nn.Module)" in text
    assert "o = lasp.softmax_attention(q, k, v, sequence=self.sequence)" in text
    rotary = "\nIf it counts positions from 0, as for rotary ones, let it take position_ids"
    assert rotary in refusal(Model(LearnedPositions()))
    assert rotary not in refusal(Model(CallsItsConv()))
    assert refusal(Counts()).endswith("call it as model(local['input_ids'], local['position_ids']).")
    many = refusal(Model(*(MHA() for _ in range(20))))
    assert many.count("(MHA)") == 8
    assert "and 12 more" in many


# Adapters


class Foreign(nn.Module):
    """Of somebody else: it mixes in its own forward, in its conv, and (by mistake) in its norm."""

    def __init__(self, norm=None):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(D, D, 3, padding=2), norm or nn.LayerNorm(D)

    def forward(self, x):
        return self.norm(self.conv(x.mT)[..., : x.shape[1]].mT.cumsum(1))


def _leave(module, sequence):
    pass


class Covering:
    """An adapter that is an object."""

    covers = ("conv",)

    def __call__(self, module, sequence):
        pass


BEYOND = []


class ReadsOffsets(nn.Module):
    """Takes the offsets of documents beside their tokens, as kernels do, which read and write where these tell them."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(D, D)

    def forward(self, x, cu_seqlens):
        BEYOND.append(int(cu_seqlens[-1]) - x.shape[1])
        return self.project(x)


class MakesOffsets(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first, self.reads = first, ReadsOffsets()

    def forward(self, x):
        tokens = x.shape[1]
        return x + self.reads(x, torch.tensor([0, tokens] if self.first is None else [0, tokens // 2, tokens]))


@pytest.mark.parametrize("first", [None, "half"])
def test_numbers_about_the_whole_are_not_given_to_a_slice(first):
    """They would be read beyond its end: on a GPU that spoils memory without a word."""
    model = nn.Sequential(nn.Linear(D, D), MakesOffsets(first), Registered())
    BEYOND.clear()
    refused = pytest.raises(ValueError, match="1") if first else contextlib.nullcontext()
    with refused:  # other borders of documents on a slice
        lasp.parallelize(model, None)
    assert len(BEYOND) > 2
    assert set(BEYOND) == {0}


def test_an_adapter_answers_for_its_module_and_for_what_it_covers():
    plain = {"layers.1": _leave}
    assert refused(Model(Foreign())) == {"layers.1.conv (Conv1d)": WRONG, "layers.1 (Foreign)": WRONG}
    assert refused(Model(Foreign()), plan=plain) == {"layers.1.conv (Conv1d)": WRONG}
    shift = nn.ZeroPad2d((0, 0, 1, -1))
    assert refused(Model(Foreign(shift)), plan={"layers.1": Covering()}) == {"layers.1.norm (ZeroPad2d)": WRONG}
    lasp.parallelize(Model(Foreign()), None, plan={"layers.1": Covering()})

    @lasp.register(adapter=_leave, covers=["conv"])
    class Named(Foreign):
        pass

    @lasp.register(adapter=_leave, covers=True)
    class Everything(Foreign):
        pass

    lasp.parallelize(Model(Named()), None)
    assert refused(Model(Named(shift))) == {"layers.1.norm (ZeroPad2d)": WRONG}
    lasp.parallelize(Model(Everything(shift)), None)


def test_the_refusal_of_random_numbers_says_what_to_do():
    text = refusal(Model(DrawsInEvaluation()))
    assert "layers.1 (DrawsInEvaluation): it draws random numbers in evaluation mode" in text
    assert "Let it draw in training only, as F.dropout(x, p, self.training) does" in text
    assert "@lasp.register" not in text
    lasp.parallelize(Model(DrawsInEvaluation()), None, plan={"layers.1": lasp.adapters.token_local})
    both = refusal(Model(DrawsInEvaluation(), MHA()))
    assert "o = lasp.softmax_attention" in both


def test_a_second_look_is_in_proportion():
    """Of a large model, or one that takes long, there is none at many tokens."""
    seen = []

    class Notes(nn.Module):
        def __init__(self, numbers):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1).expand(numbers))

        def forward(self, x):
            seen.append(tuple(x.shape[:2]))
            return x

    for numbers, most in ((1, (1, 1031)), (1_000_000, (1, 263)), (30_000_000, (2, 29))):
        seen.clear()
        model = Model(Notes(numbers))
        with mock.patch.object(trial, "_MORE", [(tokens, cut, 9.0) for tokens, cut, _ in trial._MORE]):
            lasp.parallelize(model, None)
        assert max(seen, key=lambda shape: shape[0] * shape[1]) == most


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"scale_grad_by_freq": True}, r"tokens \(Embedding\): scale_grad_by_freq=True divides a word's gradient"),
        ({"max_norm": 0.5}, r"tokens \(Embedding\): max_norm=0\.5 writes to the rows of the slice's words"),
    ],
    ids=str,
)
def test_tables_that_look_at_all_words(option, message):
    model = SmallModel()
    model.tokens = nn.Embedding(*model.tokens.weight.shape, **option)
    with pytest.raises(ValueError, match=message):
        lasp.parallelize(model, None)
    lasp.parallelize(model, None, plan={"tokens": lasp.adapters.token_local})


def test_the_nearest_adapter_decides():
    """token_local of the model answers for a layer in it only where that has no adapter of its own."""
    plan = {"": lasp.adapters.token_local}
    lasp.parallelize(Model(MHA()), None, plan=plan)
    assert refused(Model(CallsItsConv()), plan=plan) == {"layers.1.conv (Conv1d)": WRONG}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"adapter": "linear"},
            "adapter must be a function, got 'linear'",
        ),
        ({"adapter": None}, "adapter must be a function, got None"),
        ({"covers": "conv"}, "covers must be True or names of modules, e.g. .*, got 'conv'"),
        ({"covers": 3}, "covers must be True or names of modules, .*, got 3"),
        ({"covers": [nn.Conv1d]}, "covers must be True or names of modules, .*Conv1d"),
    ],
)
def test_bad_arguments_of_register(options, message):
    with pytest.raises(TypeError, match=message):
        lasp.register(Foreign, **options)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (5, "plan must map patterns of paths to adapters, got 5"),
        (["layers.1"], "plan must map patterns of paths to adapters, got "),
        ({3: _leave}, "plan must map patterns of paths to adapters, got the pattern 3"),
        ({"layers.1": "token_local"}, r"plan\['layers.1'\] must be an adapter, .*, got 'token_local'"),
    ],
)
def test_bad_plans(plan, message):
    with pytest.raises(TypeError, match=message):
        lasp.parallelize(Model(Foreign()), None, plan=plan)


# On ranks


def _all_refuse(name):
    model, expected = MIXING[name]
    found = refused_on_ranks(model)
    assert found == expected
    lasp.parallelize(Model(), dist.group.WORLD)


def refused_on_ranks(model):
    with pytest.raises(ValueError, match="cannot split the sequence of: ") as raised:
        lasp.parallelize(model, dist.group.WORLD)
    assert all(getattr(m, "sequence", None) is None for m in model.modules())
    first = str(raised.value).split("\n")[0].removeprefix("cannot split the sequence of: ")
    return dict(entry.split(": ", 1) for entry in first.split("; "))


@pytest.mark.parametrize("name", ["conv in a registered layer", "sdpa", "ZeroPad2d", "Fold", "without ranks"])
def test_every_rank_refuses_with_the_same_words(name):
    run_ranks(2, _all_refuse, name)


def _one_refuses():
    model = Model(MHA()) if dist.get_rank() == 1 else Model(nn.Identity())
    with pytest.raises(lasp.RankMismatchError, match=r"rank 1 failed .*cannot split the sequence of: layers.1 \(MHA\)"):
        lasp.parallelize(model, dist.group.WORLD)


def test_what_one_rank_refuses_is_an_error_on_all():
    run_ranks(3, _one_refuses)


def _positions_are_needed(wrap, by_place):
    rank, mesh = dist.get_rank(), mesh_of(sp=2)
    torch.manual_seed(0)
    model = wrap(CountsUnlessGiven().double())
    serial = copy.deepcopy(model)
    lasp.parallelize(model, mesh)
    ids = torch.arange(11).view(1, 11) % IDS
    local = lasp.shard_batch({"input_ids": ids}, mesh, pad=False)
    for given in ((), (None,)) if by_place else ((),):
        with pytest.raises(ValueError, match="position_ids is needed where the sequence is split"):
            model(local["input_ids"], *given)
    expected = lasp.shard_sequence(serial(ids), mesh)
    if by_place:
        torch.testing.assert_close(model(local["input_ids"], local["position_ids"]), expected)
    found = model(local["input_ids"], position_ids=local["position_ids"])
    torch.testing.assert_close(found, expected)
    (found.square().sum() * 2).backward()  # of the two ranks' mean
    lasp.sync_grads(model, mesh)
    serial(ids).square().sum().backward()
    for p, q in zip(model.parameters(), serial.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="position_ids is needed"):
        twin(local["input_ids"])
    with pytest.warns(UserWarning, match="not split over ranks when it is loaded"):
        loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(ids), serial(ids))
    return rank


@pytest.mark.parametrize(
    ("wrap", "by_place"), [(nn.Module.double, True), (HandsOn, True), (NamesTokens, False)], ids=["none", "all", "most"]
)
def test_a_model_that_would_count_positions_from_0_must_be_given_them(wrap, by_place):
    assert run_ranks(2, _positions_are_needed, wrap, by_place) == [0, 1]


def test_one_rank_may_count_positions():
    ids = torch.arange(5)[None]
    model, serial = CountsUnlessGiven(), CountsUnlessGiven()
    serial.load_state_dict(model.state_dict())
    assert torch.equal(lasp.parallelize(model, None)(ids), serial(ids))


# A split layer without an exchange


class TwoPaths(nn.Module):
    """A model of which a step may leave out a layer."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.other = Registered(), layer

    def forward(self, x, both=True):
        x = self.used(x)
        return x + self.other(x) if both else x


FORGOT = r"layer 'other' \(OnlyInTraining\) ran, but called no operator of lasp with the ranks"


def _step(model, x, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x, **options).square().sum().backward()
    lasp.sync_grads(model, dist.group.WORLD)
    optimizer.step()


def _silent_layer():
    x = torch.randn(1, 5 + dist.get_rank(), D)
    torch.manual_seed(0)
    model = lasp.parallelize(TwoPaths(OnlyInTraining()), dist.group.WORLD, strict=False)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(x)
    _step(model, x, both=False)  # a layer that did not run is none that forgot, nor is one in evaluation
    changed = copy.deepcopy(model.state_dict())
    assert not all(torch.equal(p, before[name]) for name, p in changed.items())
    with pytest.raises(RuntimeError, match=FORGOT) as raised:
        _step(model, x)
    assert not isinstance(raised.value, (lasp.RankMismatchError, lasp.PeerError))
    assert all(torch.equal(p, changed[name]) for name, p in model.state_dict().items())
    with pytest.raises(RuntimeError, match=FORGOT):
        _step(model, x)
    model.other.eval()
    _step(model, x)
    assert not model.used._forward_hooks
    assert not model.other._forward_hooks


def test_a_split_layer_that_exchanges_nothing_is_an_error_before_the_step():
    run_ranks(2, _silent_layer)


def _silent_on_one_rank():
    x = torch.randn(1, 5, D)
    model = lasp.parallelize(TwoPaths(OnlyInTraining()), dist.group.WORLD, strict=False)
    if dist.get_rank() != 1:
        model.other.eval()
        model.other.sequence = None  # whose exchange would wait for rank 1
        model.other.forward = lambda x: x * 1.0
        for layer in (model.other,):
            layer._forward_hooks.clear()
    with pytest.raises(lasp.RankMismatchError, match=f"rank 1 failed .*{FORGOT}"):
        _step(model, x)


def test_a_layer_that_is_silent_on_one_rank_is_an_error_on_all():
    run_ranks(2, _silent_on_one_rank)


def _nothing_exchanges():
    model = lasp.parallelize(nn.Sequential(OnlyInTraining()), dist.group.WORLD, strict=False)
    with pytest.raises(RuntimeError, match=r"layer '0' \(OnlyInTraining\) ran, but called no operator"):
        _step(model, torch.randn(1, 5, D))


def test_a_model_in_which_no_layer_exchanges_is_an_error_before_the_step():
    run_ranks(2, _nothing_exchanges)


def _adapter_of_ones_own():
    """One that gives its module ranks under another name for each operator, and one that does nothing."""

    def adapter(module, sequence):
        from dataclasses import replace

        module.sequence = replace(sequence, name=f"{sequence.name}.scan")

    good = lasp.parallelize(TwoPaths(Registered()), dist.group.WORLD, plan={"other": adapter})
    _step(good, torch.randn(1, 5, D))
    bad = lasp.parallelize(TwoPaths(MHA()), dist.group.WORLD, plan={"other": _leave})
    with pytest.raises(RuntimeError, match=r"layer 'other' \(MHA\) ran, but called no operator"):
        _step(bad, torch.randn(1, 5, D))


def test_an_adapter_that_does_nothing_is_an_error_before_the_step():
    run_ranks(2, _adapter_of_ones_own)
