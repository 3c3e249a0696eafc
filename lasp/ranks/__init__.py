"""Ranks: how they find each other, how they are arranged, and what a process keeps of those it works with."""

from lasp.ranks.aside import alone, uncounted
from lasp.ranks.group import PeerError, Peers, RankMismatchError, all_peers, peers_of, waiting
from lasp.ranks.launchers import Env, init
from lasp.ranks.mesh import (
    MESH_AXES,
    axis_groups,
    copies_of,
    grad_group,
    grad_mesh,
    init_mesh,
    replica_mesh,
    sequence_axis,
    shard_mesh,
)
from lasp.ranks.sequence import SCHEDULES, SequenceParallel, Traffic, sequence_of_handle

__all__ = [
    "MESH_AXES",
    "SCHEDULES",
    "Env",
    "PeerError",
    "Peers",
    "RankMismatchError",
    "SequenceParallel",
    "Traffic",
    "all_peers",
    "alone",
    "axis_groups",
    "copies_of",
    "grad_group",
    "grad_mesh",
    "init",
    "init_mesh",
    "peers_of",
    "replica_mesh",
    "sequence_axis",
    "sequence_of_handle",
    "shard_mesh",
    "uncounted",
    "waiting",
]
