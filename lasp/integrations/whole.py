"""A model that is split, called with whole batches: its arguments are cut before its forward, and what it gives is of
the whole again.

Trainers compute their losses in ways of their own, with the whole sequence at hand. So to them the model looks whole,
as one that is split by tensor parallelism does: all ranks of a sequence give it the same batch and compute the same
loss, whose gradient follows the convention of data parallelism (see `lasp.unshard_sequence`). What is put together are
numbers of a token (log-probabilities), or the loss itself; logits only where somebody asks for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lasp import arguments
from lasp.adapters.border import Border, by_name
from lasp.batch import shard_batch, unshard_sequence
from lasp.checks.use import of_a_pickle
from lasp.loss import token_loss
from lasp.ranks import SequenceParallel

_OF_TOKENS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")  # TRL's fused head


class WholeCalls:
    """Hooks of models that are split over the same ranks; they act inside `calls` only."""

    def __init__(self, sequence: SequenceParallel):
        self.sequence, self.under_way = sequence, False
        self._logits = False
        self._open: list[_Call | None] = []

    def install(self, model: nn.Module) -> None:
        """Install hooks around the model, or those within it, that `parallelize` has split and that need a layout."""
        for module, _border in split_models(model):
            hooks = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
            if self not in hooks:
                module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
                module.register_forward_hook(self._after, always_call=True)

    @contextlib.contextmanager
    def calls(self, *, logits: bool) -> Iterator[None]:
        """Inside, the models take and give what is whole; `logits`: these too, [B, T, V] on every rank."""
        if self.under_way:  # the outer one knows who asks
            yield
            return
        self.under_way, self._logits = True, logits
        try:
            yield
        finally:
            self.under_way = False

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._open.append(None)
        if not self.under_way or kwargs.get("layout") is not None:
            return args, kwargs
        call = self._open[-1] = _Call(model, args, kwargs, self.sequence)
        return (), call.kwargs

    def _after(self, model: nn.Module, args: tuple, output: Any) -> Any:
        call = self._open.pop()
        return None if call is None or output is None else call.whole(output, logits=self._logits)

    def __deepcopy__(self, memo: object) -> WholeCalls:
        return self  # a copy of the model is split over the same ranks

    def __reduce__(self):
        """Pickled with a model, which then is not split, it does nothing."""
        return of_a_pickle, ()


def split_models(model: nn.Module) -> list[tuple[nn.Module, Border]]:
    """The models in it that `parallelize` has split and whose forward needs a layout, with what stands before it."""
    found: list[tuple[nn.Module, Border]] = []
    for module in model.modules():  # the outer ones first, whose borders stand before models in them too
        if any(module in set(outer.modules()) for outer, _ in found):
            continue
        found += [(module, hook) for hook in module._forward_pre_hooks.values() if isinstance(hook, Border)]
    return found


class _Call:
    """One call of a model's forward with a whole batch."""

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], sequence: SequenceParallel):
        self.model, self.sequence = model, sequence
        given = by_name(model, args) | kwargs
        if not isinstance(given.get("input_ids"), Tensor) or given["input_ids"].ndim != 2:
            got = arguments.shown(given.get("input_ids"))
            raise ValueError(f"input_ids [B, T] are needed to cut a batch for {type(model).__name__}, got {got}")
        self.fused = bool(given.get("fused_lm_head"))
        self.count = given.pop("num_items_in_batch", None)
        labels, shifted = given.pop("labels", None), given.pop("shift_labels", None)
        self.tokens = given["input_ids"].shape[1]
        self.targets = self.tokens if shifted is not None else self.tokens - 1  # that the fused head would give
        if shifted is not None or labels is not None:
            given["labels"] = labels if shifted is None else shifted
        local = shard_batch(given, sequence, shift_labels=shifted is None, pad=False)
        if given.get("position_ids") is None or local["layout"].packed:
            del local["position_ids"]  # the model's border makes them, for a model that takes them
        self.labels = local.pop("labels")
        self.labels = None if labels is None and shifted is None else self.labels
        if self.fused:
            local |= {"labels": self.labels, "shift_labels": self.labels}
        else:
            local["return_dict"] = True
        self.kwargs = local

    def whole(self, output: Any, *, logits: bool) -> Any:
        """What the model gave for its slice, put together; what is of the slice only is left out."""
        fields = {} if getattr(output, "aux_loss", None) is None else {"aux_loss": output.aux_loss}
        if self.fused:
            return type(output)(**fields, **self._of_tokens(output))
        if self.labels is not None:
            fields["loss"] = self._loss(output)
        if logits:
            fields["logits"] = unshard_sequence(output.logits, self.sequence, dim=1)
        return type(output)(**fields)

    def _loss(self, output: Any) -> Tensor:
        """The loss as transformers defines it: a sum over `num_items_in_batch`, or the mean, and the router's."""
        loss, tokens = token_loss(output.logits, self.labels, mesh=self.sequence.group)  # type: ignore[arg-type]
        if self.count is not None:
            loss = loss * (tokens / torch.as_tensor(self.count, device=loss.device)).to(loss.dtype)
        if getattr(output, "aux_loss", None) is not None:
            loss = loss + self.model.router_aux_loss_coef * output.aux_loss
        return loss

    def _of_tokens(self, output: Any) -> dict[str, Tensor]:
        """Numbers of a token [B, T], in one message."""
        names = [name for name in _OF_TOKENS if getattr(output, name, None) is not None]
        parts = torch.stack([getattr(output, name).to(output.log_probs.dtype) for name in names], -1)
        whole = unshard_sequence(parts, self.sequence, dim=1)[:, : self.targets]
        return {name: x.to(getattr(output, name).dtype) for name, x in zip(names, whole.unbind(-1))}
