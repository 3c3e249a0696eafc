"""Wrong values for every argument of every public name: each an error that names the argument and the value.

It comes on every rank, the same on each, before anything is sent: the group works on afterwards. A public argument
without a row here fails `test_every_public_argument_has_a_row`.
"""

import functools
import inspect
import os
import tempfile
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of as init_mesh_of
from ranks import run_ranks
from torch import nn

import lasp
from lasp import adapters, arguments, data_parallel, decay, models
from lasp.modules import LightningAttention, Router

B, T, H, K, V, WORDS = 1, 4, 2, 3, 5, 7


class Wrong(NamedTuple):
    """A value, where the message names it or its argument in another way than usual."""

    value: Any
    says: str  # a part of the message that stands for the value
    name: str = ""  # what is named in place of the argument


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


# Values by the kind of argument that they are wrong for

HUGE = (2**63, -(2**70), 10**5000)  # more than 64 bits; the last Python does not even write
NO_INTEGER = ("2", 2.0, np.float32(2), None, True, [2], torch.tensor(2), *HUGE)
NO_NUMBER = ("2", None, [2.0], True, 2j, torch.tensor(2.0), float("nan"), float("inf"), 10**400, 10**5000)
NO_FLAG = ("no", 0, 1, None, np.bool_(True), torch.tensor(True))
NO_TEXT = (5, None, ["ring"], b"ring")
NO_MESH = ("sp", 3, [0, 1], torch.zeros(2), object)
NO_MODULE = (None, 5, "model", nn.Linear)
NO_LAYOUT = ((T, T), "layout", 5, torch.tensor([T]), {"lengths": (T,)})
NO_SEQUENCE = ("sp", 3, [0, 1])


def no_tensor(shape, *, optional=False):
    """For a float tensor of this shape."""
    values = [
        "x",
        1.5,
        [1.0],
        Wrong(np.zeros(shape), "array("),
        zeros(*shape, dtype=torch.int64),
        zeros(*shape, dtype=torch.bool),
        zeros(*shape, dtype=torch.complex64),
        Wrong(zeros(*shape).to_sparse(), "sparse"),
        Wrong(torch.nested.nested_tensor([zeros(2, 3)], layout=torch.jagged), "nested"),
    ]
    return [*values] if optional else [None, *values]


def qkv(shape):
    """For one of q, k and v."""
    return [*no_tensor(shape), zeros(*shape[:3]), zeros(*shape[:3], 0), Wrong(zeros(*shape, device="meta"), "meta")]


OFFSETS = (
    5,
    "04",
    (0,),
    (),
    (1, 4),
    (0, 3, 2, 4),
    (0, 3),
    (0, 5),
    (0, -1, 4),
    (0, 2.0, 4),
    (0, 2**70),
    (0, 10**5000),
    ("0", "4"),
    [0, True, 4],
    np.array([0.0, 4.0]),
    torch.tensor([0.0, 4.0]),
    torch.tensor([[0, 2], [2, 4]]),
    torch.tensor(4),
)


# Calls whose arguments are right


def attention(ranks):
    return {
        "q": zeros(B, T, H, K),
        "k": zeros(B, T, H, K),
        "v": zeros(B, T, H, V),
        "log_decay": zeros(B, T, H),
        "sequence": ranks,
    }


def delta(ranks):
    return {**attention(ranks), "beta": zeros(B, T, H)}


def split_model(ranks):
    """That `parallelize` was called with."""
    return lasp.parallelize(models.TNL(models.TNLConfig(**TNL)), mesh_of(ranks), strict=False)


@functools.cache
def state_of(rows=1):
    """Behind some tokens of a model like that one."""
    return lasp.prefill(
        lasp.parallelize(models.TNL(models.TNLConfig(**TNL)), None, strict=False), zeros(rows, T).long()
    )


def entered(**options):
    """A context that nothing is done in."""
    with lasp.unsplit(**options):
        pass


@functools.cache
def scratch():
    """A file of this process."""
    return os.path.join(tempfile.mkdtemp(), "state")


def saved():
    """A state's file."""
    state_of().save(scratch())
    return scratch()


def prompt(ranks):
    return {"model": split_model(ranks), "ids": torch.arange(T).view(1, T)}


def generation(ranks):
    return {**prompt(ranks), "max_new_tokens": 2}


def drawing(ranks):
    return {**generation(ranks), "do_sample": True}


def routed():
    """A model that has run."""
    router = Router(4, 3, 2)
    router(zeros(B, T, 4))
    return router


def softmax(ranks):
    return {name: x for name, x in attention(ranks).items() if name != "log_decay"}


def module_forward(ranks):
    return {name: x for name, x in attention(ranks).items() if name != "sequence"}


def batch(**changed):
    return {"input_ids": torch.arange(T).view(1, T), **changed}


def model():
    return nn.Sequential(LightningAttention())


def mesh_of(ranks):
    return ranks.mesh


def replicated(ranks):
    """A model, the same on each rank, and its optimizer."""
    linear = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(linear.weight)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    return {"model": linear, "optimizer": optimizer, "mesh": mesh_of(ranks), "sync_every": 2}


STATEFUL = {
    "scale": NO_NUMBER,
    "initial_state": [*no_tensor((B, H, K, V), optional=True), zeros(B, H, V, K), zeros(B + 1, H, K, V)],
    "output_final_state": NO_FLAG,
    "layout": [*NO_LAYOUT, Wrong(lasp.ShardLayout((T, T, T)), "3 ranks"), Wrong(lasp.ShardLayout((T + 1,)), "")],
    "sequence": NO_SEQUENCE,
    "segment_length": [*(x for x in NO_INTEGER if x is not None), 0, -64, 63],
}
SIZE = [*NO_INTEGER, 0, -1]
SIZES = {name: SIZE for name in ("vocab_size", "layers", "width", "heads")}
SCHEDULE = {"heads": SIZE, "layer": [*NO_INTEGER, -1, 3], "layers": [*NO_INTEGER, 0]}
TNL = {"vocab_size": WORDS, "layers": 1, "width": 4, "heads": 2, "glu_width": 4}
LINEAR = {"vocab_size": WORDS, "layers": 1, "width": 4, "heads": 2, "mlp_width": 4}
DECODER = {"family": "gla", "vocab_size": WORDS, "layers": 1, "width": 4, "heads": 2, "glu_width": 4}
EXPERTS = {name: [*NO_INTEGER, -1, 3] for name in ("experts", "attention_experts", "shared_experts")}
FORWARD = {
    "input_ids": [None, [[1]], zeros(1, T), zeros(1, T, dtype=torch.bool), torch.arange(T)],
    "position_ids": [[0], zeros(T), torch.arange(T + 1), torch.zeros(3, 1, T).long()],
    "layout": NO_LAYOUT,
    "return_hidden": NO_FLAG,
}
LOG_DECAY = [*no_tensor((B, T, H), optional=True), zeros(B, T), Wrong(zeros(B, T, H) + 1, "1.0"), zeros(H + 1)]
PER_TOKEN = [*LOG_DECAY]
LOG_DECAY += [Wrong(torch.full((H,), x), str(x)) for x in (float("nan"), float("-inf"))]
FIXED = [
    "x",
    5,
    {},
    [True],
    ["a"],
    [[-1.0]],
    Wrong([float("nan")], "nan"),
    zeros(1, 2),
    zeros(2, dtype=torch.complex64),
]
FIXED += [[0.5], Wrong(torch.tensor([0.5, -1.0]), "0.5"), Wrong(torch.tensor([torch.nan]), "nan")]
FIXED += [Wrong(zeros(2).requires_grad_(), "gradient"), Wrong(zeros(2).to_sparse(), "sparse")]
OTHER_MASKS = [  # numbers of documents, what is added to scores, and what is neither
    (torch.tensor([[1, 1, 2, 2]]), "[1, 2]"),
    (torch.tensor([[-1e9, 0.0, 0.0, 0.0]]), "[-1000000000.0, 0.0]"),
    (torch.tensor([[1.0, 1.0, 1.0, torch.nan]]), "[nan, nan]"),
]
BATCHES = [
    *(None, 5, [1, 2], torch.arange(4).view(1, 4)),
    *(
        Wrong(batch(input_ids=x), says, "input_ids")
        for x, says in ((None, "None"), ([[1]], "[[1]]"), (zeros(1, T), "float32"), (zeros(1, T).bool(), "bool"))
    ),
    *(
        Wrong(batch(**{name: x}), says, name)
        for name, x, says in (
            ("labels", [[1]], "[[1]]"),
            ("labels", zeros(1, T), "float32"),
            ("labels", zeros(1, T).bool(), "bool"),
            ("labels", zeros(1, T, dtype=torch.uint8), "uint8"),
            ("labels", zeros(1, T + 1).long(), "(1, 5)"),
            ("attention_mask", [[1]], "[[1]]"),
            ("attention_mask", zeros(1, T + 1).long(), "(1, 5)"),
            ("attention_mask", zeros(1, 1, T, T), "(1, 1, 4, 4)"),
            ("attention_mask", zeros(1, T, dtype=torch.complex64), "complex64"),
            *(("attention_mask", x, says) for x, says in OTHER_MASKS),
            ("position_ids", [[1]], "[[1]]"),
            ("position_ids", zeros(1, T), "float32"),
            ("position_ids", zeros(1, T).bool(), "bool"),
            ("position_ids", torch.arange(T + 1), "(5,)"),
            ("position_ids", torch.arange(T).expand(2, T), "(2, 4)"),
            ("position_ids", torch.arange(T).expand(3, 2, T), "(3, 2, 4)"),
            ("position_ids", torch.tensor([1, 2, 0, 1]), "(4,)"),
            ("seq_idx", [[0, 0, 1, 1]], "[[0, 0, 1, 1]]"),
            ("seq_idx", zeros(1, T), "float32"),
            ("seq_idx", zeros(T).int(), "(4,)"),
            ("seq_idx", torch.tensor([[0, 1, 0, 1]]), "(1, 4)"),
            ("cu_seq_lens_q", torch.tensor([0, 3]), "(0, 3)"),
            ("cu_seq_lens_k", [0.0, T], "[0.0, 4]"),
            ("x", zeros(1, T).to_sparse(), "sparse"),
        )
    ),
    *(Wrong(batch(cu_seqlens=x), arguments.shown(x), "cu_seqlens") for x in OFFSETS if not isinstance(x, torch.Tensor)),
    Wrong(batch(cu_seqlens=torch.tensor([0.0, 4.0])), "float32", "cu_seqlens"),
    Wrong(batch(cu_seqlens=torch.tensor([0, 3])), "(0, 3)", "cu_seqlens"),
    Wrong({"input_ids": zeros(2, T).long(), "cu_seqlens": [0, T]}, "(2, 4)", "cu_seqlens"),
]
SEQUENCE = {"x": [None, "x", [1.0], Wrong(zeros(2, T).to_sparse(), "sparse")], "mesh": NO_MESH}
SEQUENCE["dim"] = [*NO_INTEGER, 2, -3]
GROUPED = {"model": NO_MODULE, "mesh": [*NO_MESH, lasp.SequenceParallel(None)]}
REPLICAS = {**GROUPED, "validate": [*NO_TEXT, "always"]}

PROMPTS = {
    "model": [*NO_MODULE, Wrong(nn.Identity(), "Identity", "Identity")],
    "mesh": [x for x in NO_MESH if x is not None],
    "ids": [
        *(5, "12", [], {}, zeros(1, T), zeros(1, T).bool(), zeros(0, T).long(), Wrong([[]], "none in row 0")),
        *(Wrong([[1.0]], "[1.0]"), Wrong([1.0], "1.0"), Wrong([[1], "2"], "'2'"), Wrong([[2**70]], str(2**70))),
        *(zeros(1, 1, T).long(), Wrong(zeros(1, 0).long(), "none in row 0"), Wrong([[1], []], "none in row 1")),
        *(Wrong([zeros(1, 2).long()], "(1, 2)"), Wrong(torch.tensor([[0, WORDS]]), f"got {WORDS}")),
        *(Wrong([[0], [-1]], "got -1"), Wrong(torch.tensor([[0, 2**40]]), str(2**40))),
    ],
    "attention_mask": [
        *("x", [[1, 1, 1, 1]], zeros(1, T + 1), zeros(T), zeros(1, T, dtype=torch.complex64)),
        Wrong(zeros(1, T), "none in row 0", "ids"),
        *(Wrong(*x) for x in OTHER_MASKS),
        Wrong(torch.tensor([[1, 0, 0, 1]]), "2 holes"),
        Wrong(torch.tensor([[0, 1, 0, 1]]), "1 holes"),
    ],
    "cu_seqlens": [*(x for x in OFFSETS if not isinstance(x, torch.Tensor)), Wrong((0, 2, 2, 4), "row 1", "ids")],
    "pad_token_id": [*(x for x in NO_INTEGER if x is not None)],
    "state": [
        *(5, "state", {}, zeros(1, T)),
        Wrong(lasp.InferenceState({}, (1,), zeros(1, WORDS), zeros(1, WORDS), "another"), "another"),
    ],
    "segment": [*(x for x in NO_INTEGER if x is not None), 0, -3],
}
NO_TOKENS = [*(x for x in NO_INTEGER if x is not None and x != [2]), -1]
NO_PATH = [None, 5, ["x"], b"x"]

# Name: the function, its right arguments (a function of the ranks), and wrong values by argument.
TABLE = {
    "linear_attention": (
        lasp.linear_attention,
        attention,
        {
            "q": [*qkv((B, T, H, K)), zeros(B, T, H, K + 1), Wrong(zeros(B, T, 3, K), "3"), Wrong(lambda: 3, "3")],
            "k": [*qkv((B, T, H, K)), zeros(B, T + 1, H, K), Wrong(zeros(B, T, 0, K), "(1, 4, 0, 3)")],
            "v": [
                *(*qkv((B, T, H, V)), zeros(B, T + 1, H, V), zeros(B, T, H, V).half()),
                *(Wrong(zeros(B, T, heads, V), str(heads)) for heads in (0, 1, 3)),
            ],
            "normalize": NO_FLAG,
            "log_decay": LOG_DECAY,
            "causal": NO_FLAG,
            **STATEFUL,
        },
    ),
    "delta_rule": (
        lasp.delta_rule,
        delta,
        {
            "q": [*qkv((B, T, H, K)), zeros(B, T, H, K + 1)],
            "k": [*qkv((B, T, H, K)), zeros(B, T + 1, H, K)],
            "v": [*qkv((B, T, H, V)), Wrong(zeros(B, T, 3, V), "3"), zeros(B, T, H, V).half()],
            "beta": [*no_tensor((B, T, H)), zeros(B, T, H + 1), Wrong(zeros(B, T, H, device="meta"), "meta")],
            "log_decay": [*PER_TOKEN, zeros(H)],
            **STATEFUL,
        },
    ),
    "softmax_attention": (
        lasp.softmax_attention,
        softmax,
        {
            **{name: [*qkv((B, T, H, dim))] for name, dim in (("q", K), ("k", K), ("v", V))},
            "layout": STATEFUL["layout"],
            "sequence": NO_SEQUENCE,
            "window": [*(x for x in NO_INTEGER if x is not None), 0, -1],
            "scale": [x for x in NO_NUMBER if x is not None],
            "softcap": [*(x for x in NO_NUMBER if x is not None), 0.0, -1.0],
            "key_mask": ["x", [True], zeros(B, T), zeros(B, T + 1).bool()],
            "dropout_p": [*NO_NUMBER, 1.0, -0.1],
        },
    ),
    "block_attention": (
        lasp.block_attention,
        lambda ranks: {**softmax(ranks), "block": 3, "layout": lasp.ShardLayout((T,) * ranks.size)},
        {
            **{name: [*qkv((B, T, H, dim)), zeros(B, T + 1, H, dim)] for name, dim in (("q", K), ("k", K), ("v", V))},
            "block": SIZE,
            "scale": [x for x in NO_NUMBER if x is not None],
            "layout": STATEFUL["layout"],
            "sequence": NO_SEQUENCE,
        },
    ),
    "halo": (
        lasp.halo,
        lambda ranks: {"x": zeros(B, T, 3), "width": 2, "sequence": ranks},
        {
            "x": [*no_tensor((B, T, 3)), zeros(3)],
            "width": SIZE,
            "layout": STATEFUL["layout"],
            "sequence": NO_SEQUENCE,
        },
    ),
    "causal_conv": (
        lasp.causal_conv,
        lambda ranks: {"x": zeros(B, T, 3), "weight": zeros(3, 2), "sequence": ranks},
        {
            "x": [*no_tensor((B, T, 3)), zeros(B, T), zeros(3)],
            "weight": [
                *no_tensor((3, 2)),
                zeros(3),
                zeros(4, 2),
                zeros(3, 0),
                Wrong(zeros(3, 2, device="meta"), "meta"),
            ],
            "bias": ["x", 1.5, [1.0], zeros(3).long(), zeros(4), Wrong(zeros(3, device="meta"), "meta")],
            "layout": STATEFUL["layout"],
            "sequence": NO_SEQUENCE,
        },
    ),
    "SequenceParallel": (
        lasp.SequenceParallel,
        lambda ranks: {"mesh": mesh_of(ranks)},
        {
            "mesh": NO_MESH,
            "exchange": [*NO_TEXT, "pigeon"],
            "softmax": [*NO_TEXT, "ring"],
            "name": NO_TEXT,
            "validate": [*NO_TEXT, "always"],
            "check_finite": NO_FLAG,
        },
    ),
    "ShardLayout": (
        lasp.ShardLayout,
        lambda ranks: {"lengths": (2, 2)},
        {
            "lengths": [
                *(None, 4, "22", (), (2.5, 1.5), (True, 3), ("2", "2"), (5, -1), torch.tensor([2.0, 2.0])),
                *((6, 2**70), (1, -(10**5000)), Wrong((2**62, 2**62), str(2**63))),
            ],
            "cu_seqlens": [x for x in OFFSETS if not isinstance(x, torch.Tensor)],
            "padding": [*NO_INTEGER, -1, 5],
        },
    ),
    "ShardLayout.even": (
        lasp.ShardLayout.even,
        lambda ranks: {"tokens": T, "ranks": 2},
        {
            "tokens": [*NO_INTEGER, 10.5, -1],
            "ranks": SIZE,
            "cu_seqlens": [x for x in OFFSETS if not isinstance(x, torch.Tensor)],
        },
    ),
    "ShardLayout.bounds": (lasp.ShardLayout((2, 2)).bounds, lambda ranks: {}, {"rank": [*NO_INTEGER, -1, 2]}),
    "ShardLayout.local": (lasp.ShardLayout((2, 2)).local, lambda ranks: {}, {"rank": [*NO_INTEGER, -1, 2]}),
    "shard_batch": (
        lasp.shard_batch,
        lambda ranks: {"batch": batch(), "mesh": mesh_of(ranks)},
        {
            "batch": BATCHES,
            "mesh": NO_MESH,
            "seq_dim": [*NO_INTEGER, 2, -3],
            "shift_labels": NO_FLAG,
            "pad": NO_FLAG,
            "ignore_index": NO_INTEGER,
            "validate": [*NO_TEXT, "always"],
        },
    ),
    "shard_sequence": (lasp.shard_sequence, lambda ranks: {"x": zeros(2, T), "mesh": mesh_of(ranks)}, SEQUENCE),
    "unshard_sequence": (lasp.unshard_sequence, lambda ranks: {"x": zeros(2, T), "mesh": mesh_of(ranks)}, SEQUENCE),
    "token_loss": (
        lasp.token_loss,
        lambda ranks: {"logits": zeros(1, T, WORDS), "labels": zeros(1, T).long(), "mesh": mesh_of(ranks)},
        {
            "logits": [*no_tensor((1, T, WORDS)), zeros(WORDS), zeros(1, T, 0), zeros(1, T + 1, WORDS)],
            "labels": [
                *(
                    "x",
                    None,
                    [[1]],
                    zeros(1, T),
                    zeros(1, T).bool(),
                    zeros(1, T, dtype=torch.uint8),
                    zeros(1, T, 1).long(),
                ),
                Wrong(torch.tensor([[0, WORDS, 1, -100]]), f"got {WORDS}"),
                Wrong(torch.tensor([[0, 0, -1, 2**40]]), "got -1"),
                Wrong(zeros(1, T, dtype=torch.int64, device="meta"), "meta"),
            ],
            "mesh": NO_MESH,
            "ignore_index": NO_INTEGER,
            "total_tokens": [*(x for x in NO_INTEGER if x is not None), 0, Wrong(1, "got 1, and these are")],
        },
    ),
    "linear_token_loss": (
        lasp.linear_token_loss,
        lambda ranks: {
            "hidden": zeros(1, T, 4),
            "weight": zeros(WORDS, 4),
            "labels": zeros(1, T).long(),
            "mesh": mesh_of(ranks),
        },
        {
            "hidden": [*no_tensor((1, T, 4)), zeros(4), zeros(1, T, 0), zeros(1, T + 1, 4), zeros(1, T, 5)],
            "weight": [*no_tensor((WORDS, 4)), zeros(WORDS), zeros(WORDS, 5), zeros(WORDS, 4).double()],
            "labels": [
                *("x", None, [[1]], zeros(1, T), zeros(1, T).bool(), zeros(1, T, 1).long()),
                Wrong(torch.tensor([[0, WORDS, 1, -100]]), f"got {WORDS}"),
                Wrong(zeros(1, T, dtype=torch.int64, device="meta"), "meta"),
            ],
            "bias": ["x", zeros(WORDS + 1), zeros(WORDS, 1), zeros(WORDS).double(), zeros(WORDS).long()],
            "mesh": NO_MESH,
            "ignore_index": NO_INTEGER,
            "reduction": [*NO_TEXT, "none"],
            "total_tokens": [*(x for x in NO_INTEGER if x is not None), 0, Wrong(1, "got 1, and these are")],
        },
    ),
    "balance_loss": (
        lasp.balance_loss,
        lambda ranks: {"model": routed(), "mesh": mesh_of(ranks)},
        {"model": [*NO_MODULE, Wrong(nn.Identity(), "Identity")], "mesh": NO_MESH},
    ),
    "parallelize": (
        lasp.parallelize,
        lambda ranks: {"model": model(), "mesh": mesh_of(ranks)},
        {
            "model": [*NO_MODULE, Wrong(nn.Identity(), "Identity", "Identity")],
            "mesh": NO_MESH,
            "plan": [5, "x", ["0"], {0: adapters.linear}, {"0": "linear"}, Wrong({"9": adapters.linear}, "9")],
            "exchange": [*NO_TEXT, "pigeon"],
            "softmax": [*NO_TEXT, "ring"],
            "strict": NO_FLAG,
            "validate": [*NO_TEXT, "always"],
            "check_finite": NO_FLAG,
        },
    ),
    "tensor_parallel": (
        lasp.tensor_parallel,
        lambda ranks: {
            "model": models.TNL(models.TNLConfig(**{**TNL, "vocab_size": 8})),
            "mesh": init_mesh_of(tp=ranks.size),
        },
        {
            "model": [*NO_MODULE, Wrong(nn.Identity(), "Identity"), Wrong(model(), "Sequential")],
            "mesh": NO_MESH,
            "validate": [*NO_TEXT, "always"],
        },
    ),
    "explain": (lasp.explain, lambda ranks: {}, {"model": NO_MODULE}),
    "register": (
        lasp.register,
        lambda ranks: {"cls": LightningAttention},
        {
            "cls": [5, "x", int, Wrong(nn.Linear, "Linear", "Linear")],
            "adapter": ["linear", 5, None],
            "covers": ["conv", 5, [1], None],
        },
    ),
    "stream_backward": (
        lasp.stream_backward,
        lambda ranks: {"model": split_model(ranks), "batch": batch(), "mesh": mesh_of(ranks), "segment": 2},
        {
            "model": [*NO_MODULE, Wrong(nn.Identity(), "Identity")],
            "batch": BATCHES,
            "mesh": NO_MESH,
            "segment": [*(x for x in NO_INTEGER if x is not None), 0, -3],
            "loss_fn": [5, "x"],
            "balance": [*NO_NUMBER, Wrong(0.1, "TNL", "routers")],
            "loss_scale": [*(x for x in NO_NUMBER if not isinstance(x, torch.Tensor)), zeros(2), zeros(1).long()],
            "shift_labels": NO_FLAG,
            "ignore_index": NO_INTEGER,
            "progress": NO_FLAG,
            "validate": [*NO_TEXT, "always"],
        },
    ),
    "prefill": (
        lasp.prefill,
        prompt,
        {**PROMPTS, "pad_token_id": [*PROMPTS["pad_token_id"]], "to": [*NO_TOKENS, [2], 99]},
    ),
    "generate": (
        lasp.generate,
        drawing,
        {
            **PROMPTS,
            "ids": [*PROMPTS["ids"], None],
            "pad_token_id": [*PROMPTS["pad_token_id"], -1],
            "max_new_tokens": [*NO_TOKENS, None, 0, [0], [1, 2], [], "3"],
            "do_sample": NO_FLAG,
            "temperature": [*(x for x in NO_NUMBER if x is not None), 0.0, -1.0],
            "top_k": [*(x for x in NO_INTEGER if x is not None), -1],
            "top_p": [*(x for x in NO_NUMBER if x is not None), 0.0, -0.1, 1.1],
            "repetition_penalty": [*NO_NUMBER, 0.0, -1.0],
            "eos_token_id": [*NO_TOKENS, WORDS, Wrong([1, WORDS], f"got {WORDS}"), ["1"], [True]],
            "stop": [5, "x", [], [[]], Wrong([1], "got 1"), Wrong([[1.0]], "[1.0]"), Wrong([["1"]], "['1']")],
            "seed": [*(x for x in NO_INTEGER if x is not None and x != [2]), [1, 2], [], ["1"]],
            "streamer": [5, "x", object],
            "cuda_graph": NO_FLAG,
        },
    ),
    "stream_tokens": (lasp.stream_tokens, generation, {name: PROMPTS[name] for name in ("model", "ids", "mesh")}),
    "unsplit": (entered, lambda ranks: {"model": nn.Linear(1, 1)}, {"model": NO_MODULE}),
    "InferenceState.select": (
        lambda **options: state_of(2).select(**options),
        lambda ranks: {"rows": [1, 0]},
        {"rows": [None, 5, "01", [], [2], [-1], [0, 1.0], [True]]},
    ),
    "InferenceState.to": (
        lambda **options: state_of().to(**options),
        lambda ranks: {"device": "cpu"},
        {"device": [5, "warp", ["cpu"]]},
    ),
    "InferenceState.join": (
        lasp.InferenceState.join,
        lambda ranks: {"states": [state_of(), state_of(2)]},
        {"states": [None, 5, [], [5]]},
    ),
    "InferenceState.save": (
        lambda **options: state_of().save(**options),
        lambda ranks: {"path": scratch()},
        {"path": NO_PATH},
    ),
    "InferenceState.load": (
        lasp.InferenceState.load,
        lambda ranks: {"path": saved()},
        {"path": [*NO_PATH, Wrong(__file__, "test_wrong_inputs")], "device": [5, "warp", ["cpu"]]},
    ),
    "sync_grads": (lasp.sync_grads, lambda ranks: {"model": nn.Linear(1, 1), "mesh": mesh_of(ranks)}, REPLICAS),
    "grad_mesh": (lasp.grad_mesh, lambda ranks: {}, {"mesh": GROUPED["mesh"]}),
    "replica_mesh": (
        lasp.replica_mesh,
        lambda ranks: {"mesh": init_mesh_of(sp=ranks.size)},
        {"mesh": [*GROUPED["mesh"], None]},
    ),
    "CO2": (
        lasp.CO2,
        replicated,
        {
            "model": [*NO_MODULE, Wrong(nn.Linear(1, 1).requires_grad_(False), "Linear"), Wrong(nn.ReLU(), "ReLU")],
            "optimizer": [None, 5, "sgd", Wrong(torch.optim.SGD([nn.Parameter(zeros(3))]), "(3,)"), Wrong([], "none")],
            "mesh": GROUPED["mesh"],
            "sync_every": SIZE,
            "outer_lr": [*NO_NUMBER, 0.0, -1.0],
            "outer_momentum": [*NO_NUMBER, -0.1, 1.1],
            "gap_penalty": [*NO_NUMBER, 0.0, -1.0],
            "clip": [*(x for x in NO_NUMBER if x is not None), 0.0, -1.0],
            "bucket_mb": SIZE,
            "validate": [*NO_TEXT, "always"],
        },
    ),
    "wrap_ddp": (data_parallel.wrap_ddp, lambda ranks: {"model": nn.Linear(1, 1), "mesh": mesh_of(ranks)}, REPLICAS),
    "wrap_fsdp2": (
        data_parallel.wrap_fsdp2,
        lambda ranks: {"model": nn.Linear(1, 1), "mesh": init_mesh_of(sp=ranks.size)},
        {**REPLICAS, "blocks": [5, None, Wrong("xy", "'x'"), Wrong([5], "5"), nn.Linear(1, 1)]},
    ),
    "average_after_backward": (
        data_parallel.average_after_backward,
        lambda ranks: {"model": nn.Linear(1, 1), "mesh": mesh_of(ranks)},
        REPLICAS,
    ),
    "data_parallel": (
        data_parallel.data_parallel,
        lambda ranks: {
            "model": nn.Linear(1, 1),
            "mesh": init_mesh_of(sp=ranks.size),
            "scheme": "zero1",
            "optimizer": torch.optim.AdamW,
        },
        {
            **REPLICAS,
            "scheme": [*NO_TEXT, "zero4", "DDP"],
            "optimizer": [None, 5, "adamw", Wrong(torch.optim.SGD(nn.Linear(1, 1).parameters()), "SGD")],
            "blocks": [5, None, Wrong("xy", "'x'"), Wrong([5], "5"), nn.Linear(1, 1)],
        },
    ),
    "no_sync": (lasp.no_sync, lambda ranks: {"model": nn.Linear(1, 1)}, {"model": NO_MODULE, "enabled": NO_FLAG}),
    "init_mesh": (
        lasp.init_mesh,
        lambda ranks: {},
        {
            "dp_replicate": [*SIZE[:-1], -2],
            "dp_shard": [*SIZE[:-1], -2],
            "sp": [*SIZE[:-1], -2, Wrong(5, "5")],
            "tp": [*SIZE[:-1], -2],
        },
    ),
    "assert_finite": (lasp.assert_finite, lambda ranks: {}, {"gradients_of": ["model", 5, zeros(2)]}),
    "verify": (
        lasp.verify,
        lambda ranks: {"model": models.TNL(models.TNLConfig(**TNL)), "mesh": mesh_of(ranks)},
        {
            "model": NO_MODULE,
            "mesh": NO_MESH,
            "batch": [5, [1, 2], Wrong({"input_ids": None}, "None", "input_ids")],
            "forward": [5, "x"],
            "tokens": [*(x for x in NO_INTEGER if x is not None), 0, -3],
            "layers": [*(x for x in NO_INTEGER if x is not None), 0, 99],
            "dtype": [5, "float64", torch.int64],
            "tolerance": [*(x for x in NO_NUMBER if x is not None), 0.0, -1.0],
        },
    ),
    **{
        f"decay.{name}": (getattr(decay, name), lambda ranks: {"heads": 2, "layer": 0, "layers": 3}, SCHEDULE)
        for name in ("alibi", "tnl", "retnet", "none")
    },
    "decay.schedule": (
        decay.schedule,
        lambda ranks: {"name": "alibi", "heads": 2, "layer": 1, "layers": 3},
        {"name": [*NO_TEXT, "fast"], **SCHEDULE},
    ),
    "decay.fixed": (
        decay.fixed,
        lambda ranks: {"values": [-1.0]},
        {"values": [None, *FIXED], "device": [5, "warp", ["cpu"]]},
    ),
    "decay.host_values": (decay.host_values, lambda ranks: {}, {"log_decay": ["x", 5, [-1.0]]}),
    "LightningAttention": (
        LightningAttention,
        lambda ranks: {},
        {"log_decay": FIXED, "scale": NO_NUMBER, "normalize": NO_FLAG},
    ),
    "LightningAttention.forward": (
        LightningAttention().forward,
        module_forward,
        {name: TABLE_ROWS for name, TABLE_ROWS in (("q", qkv((B, T, H, K))), ("k", qkv((B, T, H, K))))}
        | {"v": qkv((B, T, H, V)), "log_decay": LOG_DECAY, "layout": NO_LAYOUT},
    ),
    "TNLConfig": (
        models.TNLConfig,
        lambda ranks: TNL,
        {**SIZES, "heads": [*SIZE, 3], "glu_width": SIZE, "decay": [*NO_TEXT, "fast"], "lrpe": NO_FLAG},
    ),
    "TNLConfig.named": (models.TNLConfig.named, lambda ranks: {}, {"name": [*NO_TEXT, "huge"]}),
    "LinearTransformerConfig": (
        models.LinearTransformerConfig,
        lambda ranks: LINEAR,
        {**SIZES, "width": [*SIZE, 3], "heads": [*SIZE, 3], "mlp_width": SIZE, "normalize": NO_FLAG},
    ),
    "LinearTransformerConfig.named": (
        models.LinearTransformerConfig.named,
        lambda ranks: {},
        {"name": [*NO_TEXT, "huge"]},
    ),
    "TNL": (models.TNL, lambda ranks: {}, {"config": [None, 5, "tiny", TNL]}),
    "LanguageModel.forward": (models.TNL(models.TNLConfig(**TNL)).forward, lambda ranks: batch(), FORWARD),
    "LinearTransformer": (models.LinearTransformer, lambda ranks: {}, {"config": [None, 5, "tiny", LINEAR]}),
    "DecoderConfig": (
        models.DecoderConfig,
        lambda ranks: DECODER,
        {
            **{**SIZES, "heads": [*SIZE, 3], "glu_width": SIZE, "family": [*NO_TEXT, "rnn"]},
            **{"pattern": [*NO_TEXT, "", "LX"], "tpe": NO_FLAG, **EXPERTS, "experts_per_token": SIZE},
        },
    ),
    "experts_from_dense": (
        models.experts_from_dense,
        lambda ranks: {"model": models.Decoder(models.DecoderConfig(**DECODER)), "experts": 2},
        {"model": [*NO_MODULE, Wrong(nn.Identity(), "Identity")], **EXPERTS, "experts_per_token": [*SIZE, 3]},
    ),
    "DecoderConfig.named": (
        models.DecoderConfig.named,
        lambda ranks: {"family": "gla", "size": "tiny"},
        {"family": [*NO_TEXT, "rnn"], "size": [*NO_TEXT, "huge"]},
    ),
    "Decoder": (models.Decoder, lambda ranks: {}, {"config": [None, 5, "tiny", DECODER]}),
}
ROWS = [
    (name, argument, number)
    for name, (_, _, wrong) in TABLE.items()
    for argument, values in wrong.items()
    for number in range(len(values))
]


def parts_of(value):
    """What may stand for a value in a message."""
    if isinstance(value, Wrong):
        return {value.says}
    if isinstance(value, torch.Tensor):
        return {str(tuple(value.shape)), str(value.dtype)}
    if isinstance(value, dict):  # of one wrong entry
        return {arguments.shown(value), *(arguments.shown(x) for x in value.values()), *map(repr, value)}
    short = isinstance(value, (int, float)) and abs(value) < 2**64
    return {arguments.shown(value)} | ({f"got {value}"} if short else set())


def problem_of(name, argument, number, ranks):
    """What is wrong with the error of one row, or "", and the error's text."""
    function, good, wrong = TABLE[name]
    row = wrong[argument][number]
    value = row.value if isinstance(row, Wrong) else row
    try:
        function(**{**good(ranks), argument: value})
    except (ValueError, TypeError) as error:
        text = f"{type(error).__name__}: {error}"
        named = row.name if isinstance(row, Wrong) and row.name else argument
        if named not in text:
            return f"{named} is not named: {text}", text
        if not any(part in text for part in parts_of(row)):
            return f"the value is not given: {text}", text
        return "", text
    except Exception as error:
        return f"{type(error).__name__}: {error}", ""
    return "accepted", ""


def _all_rows():
    """[problem, text] of every row; afterwards the ranks can still work together."""
    found = []
    for name, argument, number in ROWS:
        ranks = lasp.SequenceParallel(dist.group.WORLD)
        found.append(problem_of(name, argument, number, ranks))
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one.item() == dist.get_world_size()
    ranks = lasp.SequenceParallel(dist.group.WORLD)
    lasp.linear_attention(**attention(ranks))
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_a_wrong_value_is_an_error_with_its_name_on_every_rank(world):
    by_rank = run_ranks(world, _all_rows)
    problems = [f"{row}: {problem}" for row, (problem, _) in zip(ROWS, by_rank[0]) if problem]
    assert not problems, "\n".join(problems)
    for other in by_rank[1:]:
        assert [text for _, text in other] == [text for _, text in by_rank[0]]


def _right_values():
    ranks = lasp.SequenceParallel(dist.group.WORLD)
    for function, good, _ in TABLE.values():
        needed = {x.name for x in inspect.signature(function).parameters.values() if x.default is x.empty}
        if needed <= set(good(ranks)) | {"options"}:  # else it is the only argument, and always wrong here
            function(**good(ranks))


@pytest.mark.parametrize("world", [1, 2])
def test_the_arguments_that_the_rows_change_are_right(world):
    run_ranks(world, _right_values)


# Not called by users with values of their own, or a part of it is checked elsewhere (init: tests/test_init.py,
# library_inputs: tests/test_inference_transformers.py).
NOT_CALLED = {
    "integrations",
    "Env",
    "InferenceState",  # its methods below
    "PeerError",
    "RankMismatchError",
    "adapters",
    "compiled",
    "decay",
    "init",
    "library_inputs",
    "modules",
}
METHODS = [lasp.ShardLayout.even, lasp.ShardLayout.bounds, lasp.ShardLayout.local, LightningAttention.forward]
METHODS += [c.named for c in (models.TNLConfig, models.LinearTransformerConfig, models.DecoderConfig)]
METHODS += [models.TNL.forward]
METHODS += [getattr(lasp.InferenceState, name) for name in ("select", "to", "join", "save", "load")]


def public_functions():
    """All that a user may call, by the name in the table."""
    found = {name: getattr(lasp, name) for name in lasp.__all__ if name not in NOT_CALLED}
    found |= {name: getattr(m, name) for m in (data_parallel, models) for name in m.__all__}
    found |= {f"decay.{name}": getattr(decay, name) for name in ("schedule", "fixed", "host_values", *decay.SCHEDULES)}
    found |= {method.__qualname__: method for method in METHODS}
    return {**found, "LightningAttention": LightningAttention}


@pytest.mark.parametrize("name", public_functions())
def test_every_public_argument_has_a_row(name):
    parameters = inspect.signature(public_functions()[name]).parameters
    for argument, parameter in parameters.items():
        if argument != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert TABLE[name][2].get(argument), f"{name}: no wrong value of {argument} is tried"


def test_every_public_name_is_in_the_table():
    modules = {decay: "decay.", data_parallel: "", models: ""}
    for module, prefix in modules.items():
        for name, value in vars(module).items():
            mine = getattr(value, "__module__", "").startswith(module.__name__)
            if callable(value) and mine and not name.startswith("_") and name != "values_of":
                assert prefix + name in TABLE, f"{module.__name__}.{name} is not tried"
