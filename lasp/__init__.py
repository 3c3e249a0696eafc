"""lasp: train linear-attention models on sequences too long for one GPU, with one call.

`parallelize(model, mesh["sp"])` splits the sequence over ranks; only the state of the linear attention travels,
whose size does not depend on the length.
"""

from typing import TYPE_CHECKING

from lasp import adapters, data_parallel, decay, integrations, modules
from lasp.adapters import register
from lasp.api import explain, parallelize
from lasp.balance import balance_loss
from lasp.batch import shard_batch, shard_sequence, unshard_sequence
from lasp.checks.finite import assert_finite
from lasp.data_parallel import CO2, no_sync, sync_grads
from lasp.inference import InferenceState, generate, library_inputs, prefill, stream_tokens, unsplit
from lasp.layout import ShardLayout
from lasp.loss import linear_token_loss, token_loss
from lasp.ops import compiled
from lasp.ops.attention import linear_attention
from lasp.ops.delta import delta_rule
from lasp.ops.halo import block_attention, causal_conv, halo
from lasp.ops.softmax import softmax_attention
from lasp.ranks import Env, PeerError, RankMismatchError, SequenceParallel, grad_mesh, init, init_mesh, replica_mesh
from lasp.streaming import stream_backward
from lasp.tp import tensor_parallel
from lasp.verification import verify

if TYPE_CHECKING:  # the package is this function, too, which a checker of types cannot see
    from lasp.data_parallel import data_parallel

__all__ = [
    "CO2",
    "Env",
    "InferenceState",
    "PeerError",
    "RankMismatchError",
    "SequenceParallel",
    "ShardLayout",
    "adapters",
    "assert_finite",
    "balance_loss",
    "block_attention",
    "causal_conv",
    "compiled",
    "data_parallel",
    "decay",
    "delta_rule",
    "explain",
    "generate",
    "grad_mesh",
    "halo",
    "init",
    "init_mesh",
    "integrations",
    "library_inputs",
    "linear_attention",
    "linear_token_loss",
    "modules",
    "no_sync",
    "parallelize",
    "prefill",
    "register",
    "replica_mesh",
    "shard_batch",
    "shard_sequence",
    "softmax_attention",
    "stream_backward",
    "stream_tokens",
    "sync_grads",
    "tensor_parallel",
    "token_loss",
    "unshard_sequence",
    "unsplit",
    "verify",
]
