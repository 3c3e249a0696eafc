"""lasp: train linear-attention models on sequences too long for one GPU, with one call.

`parallelize(model, mesh["sp"])` splits the sequence over ranks; only the state of the linear attention travels,
whose size does not depend on the length.
"""

from lasp import adapters, compiled, decay, modules
from lasp.adapters import register
from lasp.api import explain, parallelize
from lasp.attention import linear_attention
from lasp.data import ShardLayout, shard_batch, shard_sequence, unshard_sequence
from lasp.data_parallel import sync_grads
from lasp.finite import assert_finite
from lasp.loss import token_loss
from lasp.mesh import Env, PeerError, RankMismatchError, SequenceParallel, grad_mesh, init, init_mesh

__all__ = [
    "Env",
    "PeerError",
    "RankMismatchError",
    "SequenceParallel",
    "ShardLayout",
    "adapters",
    "assert_finite",
    "compiled",
    "decay",
    "explain",
    "grad_mesh",
    "init",
    "init_mesh",
    "linear_attention",
    "modules",
    "parallelize",
    "register",
    "shard_batch",
    "shard_sequence",
    "sync_grads",
    "token_loss",
    "unshard_sequence",
]
