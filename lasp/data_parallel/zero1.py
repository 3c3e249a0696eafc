"""ZeRO-1: each rank keeps the optimizer's state of some of the parameters, and sends these when it has stepped."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.optim.zero_redundancy_optimizer import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from lasp.checks.optimizers import steps_within
from lasp.ranks import waiting


class Zero1(ZeroRedundancyOptimizer):
    """PyTorch's `ZeroRedundancyOptimizer`, whose state is saved and loaded as any other optimizer's.

    `state_dict` has the states of this rank's parameters, under their places among all, and `load_state_dict` takes
    from a dict what is this rank's. So torch.distributed.checkpoint reads and writes it by the names of parameters, and
    a run may go on under another scheme, or over other ranks; nothing is gathered, and nothing that was sent unpickled.

    Args:
        parameters: all that are trained; on every rank the same.
        make: an optimizer of parameters, as for one process. It may sort them into groups.
        group: the ranks over which the states are dealt out.
    """

    def __init__(
        self, parameters: Iterable[Tensor], make: Callable[[Iterable[Tensor]], Optimizer], group: ProcessGroup
    ):
        whole = make(parameters)  # has no state yet: it only tells groups and settings
        kind = type(whole)
        takes = inspect.signature(kind).parameters
        defaults = {name: value for name, value in whole.defaults.items() if name in takes}
        super().__init__(whole.param_groups, optimizer_class=kind, process_group=group, **defaults)
        self._share_state()

    def state_dict(self) -> dict[str, Any]:
        """States of this rank's parameters, and the settings of all."""
        return Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of a whole state, or of what `state_dict` gave, that which belongs to this rank."""
        Optimizer.load_state_dict(self, state_dict)
        mine = {p for group in self.optim.param_groups for p in group["params"]}
        self.optim.state = defaultdict(dict, {p: state for p, state in self.state.items() if state and p in mine})
        self._sync_param_groups(self.param_groups, self.optim.param_groups)  # type: ignore[attr-defined]
        self._share_state()

    def _verify_same_dense_param_type(self) -> None:
        """PyTorch's buckets need that; here each parameter travels by itself."""

    def _share_state(self) -> None:
        """What is the inner optimizer's is ours."""
        self.state = self.optim.state
        steps_within(self.optim)

    def _sync_params(self) -> None:
        """At the end of every step."""
        with waiting(f"{type(self.optim).__name__} of ZeRO-1: sending the parameters that this rank has updated"):
            super()._sync_params()  # type: ignore[misc]
        if not self.state:  # of a rank that has no parameter: else PyTorch takes it for one that has yet to step
            self.state[self._all_params[0]] = {}  # type: ignore[attr-defined]
