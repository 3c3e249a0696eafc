"""FSDP2 (`fully_shard`) over dp x sp."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.optim import Optimizer

from lasp import arguments
from lasp.checks.messages import check_messages
from lasp.checks.optimizers import averages, before_step, free_gathered, replaces_parameters
from lasp.checks.replicas import compare_parameters
from lasp.checks.use import look_again, note_averaged
from lasp.ops.stream import Content
from lasp.ranks import SequenceParallel, collectives, copies_of, grad_mesh, shard_mesh, waiting
from lasp.ranks.group import process


def wrap_fsdp2(
    model: nn.Module, mesh: DeviceMesh, *, blocks: Iterable[nn.Module] = (), validate: str = "first", **options
) -> nn.Module:
    """Shard the parameters of each of `blocks`, then of the rest, over all ranks of `grad_mesh(mesh)`, in place.

    With dp_replicate > 1 it is hybrid: sharded over dp_shard x sp and replicated over dp_replicate. With a loss from
    `lasp.token_loss` every parameter's gradient is that of the whole batch.

    Args:
        model: after `lasp.parallelize`, activation checkpointing and torch.compile; the same on all ranks.
        mesh: the whole mesh, or one axis of it.
        blocks: modules inside the model whose weights are gathered together, as a rule its layers.
        validate: "first" compares the names, shapes and dtypes of the parameters on all ranks, and which are trained,
            and refuses a step on one that was added later, which nobody averages; "off" does neither.
        options: for `fully_shard` (mp_policy, reshard_after_forward, ...).

    Returns:
        The same model.

    Raises:
        TypeError: `mesh` is no `DeviceMesh`, or an argument that does not fit.
        ValueError: one of `blocks` is no part of the model; or what mixes tokens was put into it after `parallelize`.
        RankMismatchError: ranks hold other parameters; on every rank.
    """
    return wrapped("wrap_fsdp2", model, mesh, blocks, validate, options)


def wrapped(
    by: str, model: nn.Module, mesh: DeviceMesh, blocks: Iterable[nn.Module], validate: str, options: dict[str, Any]
) -> nn.Module:
    """The same, `by` what the user has called, which errors name."""
    arguments.module("model", model)
    arguments.choice("validate", validate, ("first", "off"))
    blocks = check_blocks(model, blocks)
    axis = grad_mesh(mesh)
    if not isinstance(axis, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh for FSDP2, got {arguments.shown(mesh)}")
    look_again(model)
    compare_parameters(model, axis.get_group(), by, validate=validate)
    if validate != "off":
        note_averaged(model, axis.get_group())
    shard = shard_mesh(mesh)
    if isinstance(shard, DeviceMesh) and copies_of(mesh) > 1:
        axis = DeviceMesh._concatenate([mesh["dp_replicate"], shard])
    with waiting(f"{by}: sharding the parameters over all ranks"), replaces_parameters(model, by):
        for block in blocks:
            fully_shard(block, mesh=axis, **options)
        fully_shard(model, mesh=axis, **options)
    if mesh.device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(_GatherOfWeights(validate))  # type: ignore[arg-type]
                module.set_custom_reduce_scatter(_SumOfGradients(validate))  # type: ignore[arg-type]
    process.sharded.add(model)
    before_step(_free_gathered)
    if axis.size() > 1 and validate != "off":
        averages(model.parameters(), model, by, _sharded)
    return model


def check_blocks(model: nn.Module, blocks: Any) -> list[nn.Module]:
    """`blocks` as a list, if each is a part of the model: FSDP2 would shard any module, and leave the model whole."""
    if not isinstance(blocks, Iterable):
        raise TypeError(f"blocks must be modules, got {arguments.shown(blocks)}")
    blocks, parts = list(blocks), {id(module) for module in model.modules() if module is not model}
    for number, block in enumerate(blocks):
        if id(arguments.module("blocks", block)) not in parts:
            what = "the model itself" if block is model else f"{arguments.shown(block)}, which is no part of it"
            raise ValueError(f"blocks must be modules inside model ({type(model).__name__}), got {what}, as {number}")
    return blocks


def _free_gathered(optimizer: Optimizer) -> None:
    """A forward without a backward, such as for a loss that is only told, may leave weights gathered; after the step
    the next forward would take them for those that the optimizer has just changed."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(process.sharded):
        if any(id(p) in stepped for p in _sharded(model)):
            free_gathered(model)


def _sharded(model: nn.Module) -> list[Tensor]:
    return parameters_of([m for m in model.modules() if isinstance(m, FSDPModule)])


# Several backwards of a step: what is private of FSDP2 here is what its public setters set, and gives no way to read


def _groups(module: FSDPModule) -> list[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12 or so
    return [x for x in (several if several is not None else [state._fsdp_param_group]) if x is not None]


@contextlib.contextmanager
def weights_kept(modules: Sequence[FSDPModule]) -> Iterator[None]:
    """Inside, weights that were gathered stay until the backward that averages. After an error what earlier backwards
    have added up without averaging is what it was. (Before the first backward, `stream.wait_for_copies`.)"""
    groups = [group for module in modules for group in _groups(module)]
    sums = [(x, _sum_of(x)) for group in groups for x in group.fsdp_params]
    contents = [None if found is None else Content(found) for _, (_, found) in sums]
    before = [group.post_forward_mesh_info for group in groups]
    roots = [module._get_fsdp_state()._is_root for module in modules]  # None: not known before the first forward
    try:
        for group in groups:
            group.post_forward_mesh_info = None
        yield
    except BaseException:
        for module in modules:
            _begin_anew(module)
        for (parameter, (in_weights, found)), content in zip(sums, contents):
            parameter.unsharded_accumulated_grad = None if in_weights else found
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = found if in_weights else None
            if content is not None:
                content.put_back()
        raise
    finally:
        for group, info in zip(groups, before):
            group.post_forward_mesh_info = info
        for module, known in zip(modules, roots):
            state = module._get_fsdp_state()
            if known is None and state._is_root and state._auto_reshard_after_forward:
                for group in _groups(module):  # as it is once the root is known
                    group.post_forward_mesh_info = None


def parameters_of(modules: Sequence[FSDPModule]) -> list[Tensor]:
    """The parameters that FSDP2 has sharded, whose gradients come once a step."""
    return [x.sharded_param for module in modules for group in _groups(module) for x in group.fsdp_params]


def _sum_of(parameter: Any) -> tuple[bool, Tensor | None]:
    """What earlier backwards have added up of a parameter's gradient, and whether it stands at the gathered weight."""
    found = parameter.unsharded_accumulated_grad
    if found is None and hasattr(parameter, "_unsharded_param"):
        return True, parameter._unsharded_param.grad
    return False, found


def _begin_anew(module: FSDPModule) -> None:
    """After an error in the middle, which FSDP2 would take for a backward that goes on."""
    state = module._get_fsdp_state()
    if state._is_root and hasattr(module, "reset_iter_state"):  # since torch 2.13
        module.reset_iter_state()
    else:
        for part in (state, *_groups(module)):
            part._training_state = TrainingState.IDLE
        for group in _groups(module):
            group._post_forward_indices.clear()
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
    module.reshard()


@contextlib.contextmanager
def averaging(modules: Sequence[FSDPModule], *, last: bool) -> Iterator[None]:
    """Inside, a backward averages and shards only if it is the `last`, and if it would have without this."""
    with contextlib.nullcontext() if last else _switched_off(modules, (*_AVERAGE, "reshard_after_backward")):
        if not last:
            for module in modules:
                module.set_is_last_backward(False)
        try:
            yield
        finally:
            if not last:
                for module in modules:
                    module.set_is_last_backward(True)


def adding_up(modules: Sequence[FSDPModule]) -> contextlib.AbstractContextManager[None]:
    """Inside, a backward averages nothing. Weights are freed as always."""
    return _switched_off(modules, _AVERAGE)


_AVERAGE = ("reduce_grads", "all_reduce_grads")


@contextlib.contextmanager
def _switched_off(modules: Sequence[FSDPModule], names: Sequence[str]) -> Iterator[None]:
    groups = [group for module in modules for group in _groups(module)]
    before = [[getattr(group, name) for name in names] for group in groups]
    try:
        for group in groups:
            for name in names:
                setattr(group, name, False)
        yield
    finally:
        for group, values in zip(groups, before):
            for name, value in zip(names, values):
                setattr(group, name, value)


class _Compared:
    """What FSDP2 sends, over gloo: the ranks look first whether their messages fit.

    gloo ends a process where they do not, without an error: as on a rank whose backward has left a block out.
    """

    what: ClassVar[str]

    def __init__(self, validate: str):
        self._validate = validate
        self._of_groups: dict[Any, SequenceParallel] = {}

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate as FSDP2 does by default."""
        return torch.empty(*size, dtype=dtype, device=device)

    def compare(self, mine: Tensor, group: ProcessGroup) -> None:
        """Raise on every rank that is about to send something else."""
        ranks = self._of_groups.setdefault(group, SequenceParallel(group, validate=self._validate))
        if ranks.size > 1:  # not while `lasp.verify` computes the whole, where all do the same
            check_messages(ranks, self.what, (("numbers", mine.numel()), ("dtype", mine.dtype)), mine.device)


class _GatherOfWeights(_Compared):
    what = "FSDP2's gathering of weights"

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False) -> Any:
        self.compare(input_tensor, group)
        with waiting(self.what):
            return collectives.gather_flat(output_tensor, input_tensor, group=group, async_op=async_op)


class _SumOfGradients(_Compared):
    what = "FSDP2's sum of gradients"

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, op: Any, async_op: bool = False
    ) -> Any:
        self.compare(input_tensor, group)
        with waiting(self.what):
            return collectives.scatter_sum_flat(output_tensor, input_tensor, op, group=group, async_op=async_op)
