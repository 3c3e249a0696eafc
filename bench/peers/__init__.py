"""Other ways to split causal attention over ranks, each in a file of its own with its library's own calls.

All have the same interface (`Peer` in base.py): a name, why it cannot run here if it cannot, this rank's inputs, the
attention over ranks, and the same in one process.
"""

from peers.base import Inputs, Peer, Shape, gate, make
from peers.fla_context_parallel import FlaContextParallel
from peers.lasp1_serial import Lasp1Serial
from peers.ours import Lasp, fixed_decay
from peers.ring_softmax import RingSoftmax
from peers.ulysses import Ulysses

PEERS: tuple[Peer, ...] = (Lasp(), Lasp1Serial(), Ulysses(), FlaContextParallel(), RingSoftmax())

__all__ = ["PEERS", "Inputs", "Peer", "Shape", "fixed_decay", "gate", "make"]
