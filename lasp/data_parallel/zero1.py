"""ZeRO-1: each rank keeps the optimizer's state of some of the parameters, and sends these when it has stepped."""

from __future__ import annotations

from collections import defaultdict
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
        whole: the optimizer of all that are trained, as for one process, which has not stepped yet; on every rank the
            same. It becomes this rank's: what its constructor was given and what was done to it since stays.
        group: the ranks over which the states are dealt out.

    Raises:
        TypeError: `whole` has no list of groups that could be cut.
    """

    def __init__(self, whole: Optimizer, group: ProcessGroup):
        def keep_mine(groups: list[dict[str, Any]]) -> Optimizer:
            """Of `whole`, the groups with this rank's parameters; some may be empty, which no constructor takes."""
            whole.param_groups[:] = groups
            if len(whole.param_groups) != len(groups) or any(a is not b for a, b in zip(whole.param_groups, groups)):
                raise TypeError(
                    "optimizer must make one whose param_groups is a list that may be changed, since ZeRO-1 leaves in "
                    f"it what is this rank's, got {type(whole).__name__}, which makes it anew whenever it is read"
                )
            return whole

        super().__init__(whole.param_groups, optimizer_class=keep_mine, process_group=group)  # type: ignore[arg-type]
        self.defaults = whole.defaults
        had_states = bool(whole.state)  # some make them at once, such as Adagrad
        mine = self._mine()
        for p in [p for p in whole.state if isinstance(p, Tensor) and p not in mine]:
            del whole.state[p]
        self._share_state(of_others=had_states)

    def state_dict(self) -> dict[str, Any]:
        """States of this rank's parameters, and the settings of all."""
        return Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's part of a whole state, or of what `state_dict` gave."""
        Optimizer.load_state_dict(self, state_dict)
        mine = self._mine()
        self.optim.state = defaultdict(dict, {p: state for p, state in self.state.items() if state and p in mine})
        self._sync_param_groups(self.param_groups, self.optim.param_groups)  # type: ignore[attr-defined]
        self._share_state(of_others=bool(state_dict["state"]))

    def _verify_same_dense_param_type(self) -> None:
        """PyTorch's buckets need that; here each parameter travels by itself."""

    def _mine(self) -> set[Tensor]:
        """The parameters that this rank updates."""
        return {p for group in self.optim.param_groups for p in group["params"]}

    def _share_state(self, *, of_others: bool) -> None:
        """What is the inner optimizer's is ours; `of_others`: there are states, if maybe of other ranks alone."""
        self.state = self.optim.state
        steps_within(self.optim)
        if of_others:
            self._note_states()

    def _note_states(self) -> None:
        """There are states, also if this rank has none, as without a parameter: else torch.distributed.checkpoint takes
        it for one that has yet to step, and has it step, alone."""
        if not self.state:
            self.state[self._all_params[0]] = {}  # type: ignore[attr-defined]

    def _sync_params(self) -> None:
        """Called at the end of every step."""
        with waiting(f"{type(self.optim).__name__} of ZeRO-1: sending the parameters that this rank has updated"):
            super()._sync_params()  # type: ignore[misc]
        self._note_states()
