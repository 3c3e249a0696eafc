"""Whether the layout of a batch reaches the operators that its tokens reach.

An operator without a layout does not know of which batch its tokens are: others may have been cut ahead, and be packed
where this one is not. So nothing is said until it is certain:

    the layout is gone, and has reached no operator            it can reach none any more
    it has reached some, and then one of them runs again       the others ran without it

What ran with as many tokens, and needed a layout as this batch has one, is named then.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from lasp.ranks import SequenceParallel
from lasp.ranks.group import process

DOCUMENTS = "documents that are packed run into each other"
FINAL_STATE = "padding is part of the final state"
BALANCE = "lasp.balance_loss counts padding"

_KEPT = 8  # batches of which nothing is certain yet
_NAMED = 3


class Cut:
    """A batch with packed documents or padding."""

    def __init__(self, layout: Any, tokens: int):
        self.form, self.tokens = _form_of(layout), tokens
        offsets = layout.cu_seqlens or ()
        self.harm = {DOCUMENTS} if len(set(offsets)) > 2 else set()
        self.harm |= {FINAL_STATE, BALANCE} if layout.padding else set()
        self.reached: set[str] = set()
        self.missed: dict[tuple[str, str], None] = {}  # who, and the harm
        self.over = not self.harm
        self.gone = False
        weakref.finalize(layout, self._goes)

    def _goes(self) -> None:
        self.gone = True
        if self.reached or self.missed:  # else whoever runs next with its tokens
            self.settle()

    def settle(self) -> None:
        """Say who ran without the layout."""
        if self.over:
            return
        self.over = True
        harms = dict.fromkeys(harm for who, harm in self.missed if who not in self.reached)
        for harm in harms:
            found = [who for who, what in self.missed if what == harm and who not in self.reached]
            names = ", ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
            warnings.warn(
                f"the layout of a batch that lasp.shard_batch has cut did not reach {names}, which ran on "
                f"{self.tokens} tokens, as many as it has: without it {harm}; pass layout=local['layout']",
                stacklevel=2,
            )


class Cuts:
    """Of one process group, or of one rank."""

    def __init__(self):
        self.batches: deque[Cut] = deque(maxlen=_KEPT)
        self.current: Cut | None = None  # whose layout was given last

    def given(self, who: str, layout: Any) -> None:
        """An operator has got this layout."""
        form = _form_of(layout)
        alike = [cut for cut in [*self.batches] if not cut.over and cut.form == form]  # it may be of any of these
        found = alike[0] if alike else None
        if found is not self.current:
            self._settle_current()
            if found is not None:
                found.missed.clear()  # that was of batches before
        self.current = found
        for cut in alike:
            cut.reached.add(who)

    def missing(self, who: str, tokens: int, harm: str) -> None:
        """An operator has run without a layout."""
        if self.current is not None and who in self.current.reached:  # it is another batch's turn
            self._settle_current()
        for cut in [*self.batches]:
            if cut.over or cut.tokens != tokens or harm not in cut.harm or (cut.reached and cut is not self.current):
                continue
            cut.missed[who, harm] = None
            if cut.gone:
                cut.settle()
                return

    def _settle_current(self) -> None:
        if self.current is not None:
            self.current.settle()
        self.current = None


def _form_of(layout: Any) -> tuple:
    return layout.real.lengths, layout.real.cu_seqlens


def _cuts_of(sequence: SequenceParallel | None) -> Cuts:
    of = process if sequence is None or sequence.size == 1 else sequence.peers
    if of.cuts is None:
        of.cuts = Cuts()
    return of.cuts


def note_cut(sequence: SequenceParallel, layout: Any) -> None:
    """A batch was cut, with this layout."""
    cut = Cut(layout, layout.lengths[sequence.rank])
    if not cut.over:
        _cuts_of(sequence).batches.append(cut)


def note_call(who: str, x: Tensor, layout: Any, sequence: SequenceParallel | None, harm: str) -> None:
    """An operator runs on x [B, T, ...], with a layout or without; `harm` is what that would do, if one is needed."""
    if torch.compiler.is_compiling() or (sequence is not None and sequence.stream is not None):
        return  # a segment of a stream has a layout of its own
    cuts = _cuts_of(sequence)
    if not cuts.batches:
        return
    if sequence is not None and sequence.name:
        who = f"{who} in layer {sequence.name!r}"
    if layout is not None:
        cuts.given(who, layout)
    elif harm != DOCUMENTS or x.shape[0] == 1:
        cuts.missing(who, x.shape[1], harm)
