"""Tensor parallelism: the heads and inner channels of each layer over ranks that all have the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lasp import arguments
from lasp.checks import agreement
from lasp.checks.agreement import Agreement
from lasp.checks.checksum import checksums, forms_of, whole_parameters
from lasp.checks.messages import check_messages
from lasp.checks.optimizers import replaces_parameters
from lasp.checks.use import accept, look_again
from lasp.models.trunk import LanguageModel
from lasp.ranks import SequenceParallel, collectives
from lasp.ranks.parts import is_split
from lasp.tp.plans import check_model
from lasp.tp.split import split

__all__ = ["tensor_parallel"]


def tensor_parallel(model: LanguageModel, mesh: DeviceMesh | None, *, validate: str = "first") -> LanguageModel:
    """Split the weights of a model of `lasp.models` over the ranks of `mesh`, in place, by heads and inner channels.

    Each rank computes with the whole stream of tokens and its own heads; a layer's outputs are summed over the ranks,
    its input's gradients in backward (arXiv 2405.17381, appendix E). A norm over all heads has one sum of squares, a
    number a token, over the ranks. The embedding is cut by channels, and the last layer by words.

    It is a call of its own beside `parallelize`, which splits tokens and leaves every weight where it is: that is for
    any model with an operator of lasp in it, this for those whose weights lasp knows, and who needs one seldom needs
    both. Compose in this order: `parallelize` (its trial of the model needs whole weights), `tensor_parallel`,
    activation checkpointing, data parallelism. ::

        mesh = lasp.init_mesh(sp=2, tp=2)                # ranks of tp are neighbours: they send most
        lasp.parallelize(model, mesh["sp"])
        lasp.tensor_parallel(model, mesh["tp"])
        adamw = functools.partial(torch.optim.AdamW, lr=3e-4)
        model, optimizer = lasp.data_parallel(
            model, mesh, scheme="zero3", optimizer=adamw, blocks=model.blocks
        )

    Ranks of tp get the same batch: draw it by the place in data parallelism, as for sp.

    Parameters become DTensors on the axis "tp", so that `torch.nn.utils.clip_grad_norm_`, the optimizers of
    `torch.optim`, FSDP2 and `torch.distributed.checkpoint` do with them what they do with the whole. Names in the
    `state_dict` stay. A layer sees its part as a plain tensor (`model.blocks[0].glu.value.weight`); the parameter is
    what `named_parameters` gives. Of a `state_dict` of whole tensors load with
    `torch.distributed.checkpoint.state_dict.set_model_state_dict` and `StateDictOptions(full_state_dict=True)`.

    They are other parameters than before: make the optimizer afterwards. One of before raises RuntimeError at its step.

    Args:
        model: a `TNL`, `Decoder` or `LinearTransformer`, whole, the same on every rank; not yet compiled or wrapped.
            On the meta device it stays there: `to_empty`, and then load its weights or call its `init_weights` on
            all ranks, before it is sharded where it fits.
        mesh: `mesh["tp"]`, the whole mesh (its "tp" axis is used), or None. Of one rank the model is left untouched.
        validate: "first" compares the models of the ranks, weights included, before they are split, and the tokens
            that they get at the first two calls and every 1000th (over gloo their shape at every call, over NCCL at
            the first call of each shape); "off" does not.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: a model without a plan, layers or options of them that parts would compute otherwise,
            tied weights, sizes that the ranks do not divide, or what mixes tokens and was put into the model after
            `parallelize`; before any communication.
        RankMismatchError: ranks have other models or weights, or one of them failed with one of the above; later, in a
            forward, other tokens. On every rank.
        PeerError: a rank did not come within the timeout of the group.
    """
    ranks = _ranks_of(mesh, validate)
    with Agreement(ranks, due=validate != "off" and ranks.size > 1, before="tensor_parallel") as ranks_agree:
        _check(model, ranks.size)
        look_again(model)
        ranks_agree.settle(
            lambda: {"ranks": ranks.ranks},
            lambda: {
                "parameter": forms_of(model.named_parameters()),
                "the whole weights of": checksums(whole_parameters(model)),
            },
        )
    if ranks.size > 1:
        assert isinstance(ranks.mesh, DeviceMesh)
        with replaces_parameters(model, "lasp.tensor_parallel"):
            split(model, ranks.mesh)
        accept(model)
        if ranks.mesh.device_type == "cuda":  # so that no forward connects them
            collectives.connect(ranks.group, "cuda")
        model.register_forward_pre_hook(_SameTokens(ranks), with_kwargs=True)
    return model


def _ranks_of(mesh: Any, validate: str) -> SequenceParallel:
    arguments.choice("validate", validate, ("first", "off"))
    if mesh is not None and not isinstance(mesh, DeviceMesh):
        raise TypeError(f'mesh must be a DeviceMesh such as mesh["tp"], or None, got {arguments.shown(mesh)}')
    if mesh is not None:
        if "tp" not in (mesh.mesh_dim_names or ()):
            raise ValueError(f'the mesh has no axis "tp", only {mesh.mesh_dim_names}')
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    return SequenceParallel(mesh, name="", validate=validate)


def _check(model: LanguageModel, ranks: int) -> None:
    arguments.module("model", model)
    for name, parameter in model.named_parameters():
        if is_split(parameter):
            raise ValueError(f"model must be whole, but {name} is split already: lasp.tensor_parallel is called once")
        if isinstance(parameter, DTensor):
            raise ValueError(f"model must be whole, but {name} is sharded: call lasp.tensor_parallel before wrap_fsdp2")
    check_model(model, ranks)


class _SameTokens:
    """A forward pre-hook of the model: its ranks must get the same tokens. Each would compute with others, unseen."""

    def __init__(self, ranks: SequenceParallel):
        self.ranks, self.calls = ranks, 0

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ranks = self.ranks
        if ranks.validate == "off" or ranks.size == 1 or torch.compiler.is_compiling():
            return  # of one rank it is while ranks compute alone, as for `lasp.verify`
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            return  # the model's own error says so
        before = "a forward of the ranks of tensor parallelism"

        def settle() -> None:
            agreement.compare(ranks, {}, {agreement.TOKENS: checksums({"input_ids": ids})}, before=before)

        if agreement.is_due(self.calls) and not agreement.capturing():
            settle()
        else:
            kind = (("tokens", tuple(ids.shape)), ("gradients", torch.is_grad_enabled()))
            check_messages(ranks, before, kind, ids.device, explain=settle)
        self.calls += 1

    def __deepcopy__(self, memo) -> _SameTokens:
        return _SameTokens(self.ranks)
