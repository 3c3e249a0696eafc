"""Do all ranks hold the same model? Asked before something is made of all their parameters, or of their gradients."""

from __future__ import annotations

from torch import nn
from torch.distributed import ProcessGroup

from lasp.checks.agreement import WEIGHTS, checksum, compare, is_due
from lasp.checks.checksum import checksums, forms_of, whole_parameters
from lasp.checks.messages import check_messages
from lasp.checks.use import refuse_whole
from lasp.ranks import SequenceParallel
from lasp.ranks.collectives import device_of


def compare_parameters(model: nn.Module, group: ProcessGroup | None, before: str, *, validate: str = "first") -> None:
    """Raise on every rank unless all ranks of a group have parameters of the same names, shapes, dtypes and uses.

    Raises:
        RankMismatchError: naming rank and parameter.
        PeerError: a rank did not come within the timeout of the group.
    """
    ranks = SequenceParallel(group, validate=validate)
    if ranks.size > 1 and validate == "first":
        compare(ranks, {}, {"parameter": forms_of(model.named_parameters())}, before=before)


def check_gradients(model: nn.Module, group: ProcessGroup | None, before: str, *, validate: str = "first") -> None:
    """The same before each time that gradients meet; of the first two and of every 1000th also the values."""
    ranks = SequenceParallel(group, validate=validate)
    if group is None or ranks.size == 1 or validate == "off":
        return
    refuse_whole(model, group)
    parameters = dict(model.named_parameters())
    forms, calls = forms_of(parameters.items()), ranks.peers.counted.get(model, 0)

    def settle(**listings: dict[str, str]) -> None:
        compare(ranks, {}, {"parameter": forms, **listings}, before=before)

    if is_due(calls):
        settle(**{WEIGHTS: checksums(whole_parameters(model))})
    else:
        kind = (("parameters", len(forms)), ("checksum", checksum(forms.items())))
        device = next((p.device for p in parameters.values() if p.requires_grad), device_of(ranks.peers.group))
        check_messages(ranks, before, kind, device, explain=settle)
    ranks.peers.counted[model] = calls + 1
