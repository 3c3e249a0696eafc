"""`SequenceTrainer`: transformers' Trainer, and those that derive from it, on sequences that are split over ranks.

To a Trainer the ranks of a sequence are what ranks of tensor parallelism are: they are given the same samples and
compute the same loss, and only the model knows that it is split (whole.py). So a step of training is the Trainer's own,
and of it are changed: who gets which samples, how often a token is counted, and what is gathered for metrics.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import Trainer

from lasp import arguments
from lasp.batch import shard_batch
from lasp.checks import agreement
from lasp.checks.checksum import RunningChecksums, checksums
from lasp.integrations.whole import WholeCalls, split_models
from lasp.ranks import sequence_axis
from lasp.streaming import prepared
from lasp.streaming.loss import TokenLoss

_SFT, _DPO = "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"
_KNOWN = ("transformers.trainer", _SFT, _DPO)
"""Files whose `compute_loss` is known to be right with a model that looks whole."""

_OPTIONS: dict[str, tuple[tuple, str]] = {
    "label_smoothing_factor": ((0,), "would smooth a slice; leave it at 0"),
    "neftune_noise_alpha": ((), "scales noise by the length of a slice; leave it out"),
    "use_liger_kernel": ((False,), "puts another loss in the model; leave it out"),
    "average_tokens_across_devices": ((True,), "would divide by other counts on each rank; leave it at True"),
    "auto_find_batch_size": ((False,), "lets a rank alone go on with another batch; leave it out"),
    "eval_use_gather_object": ((False,), "would count each sample once a rank; leave it out"),
    "train_sampling_strategy": (
        ("random", "sequential", "group_by_length"),
        'deals other samples to each rank; "group_by_length" does not',
    ),
    "predict_with_generate": ((False,), "needs a model on one rank; leave it out"),
    "dispatch_batches": ((False,), "cuts batches over all ranks; leave it out"),
    "split_batches": ((False,), "cuts batches over all ranks; leave it out"),
}
"""Options of Trainer or accelerate that are refused: what they may be, and why and what to do."""


class Place:
    """Where a rank is: in its sequence, and in data parallelism, which counts sequences."""

    def __init__(self, mesh: DeviceMesh | None):
        self.sequence = sequence_axis(mesh)
        ranks = torch.zeros(1, 1, dtype=torch.int64)
        if isinstance(mesh, DeviceMesh):
            names = mesh.mesh_dim_names or ("sp",)
            if "tp" in names and mesh["tp"].size() > 1:
                raise ValueError(f"mesh must have no tensor parallelism here, got tp = {mesh['tp'].size()}")
            axis = names.index("sp") if mesh.ndim > 1 else 0
            ranks = mesh.mesh.movedim(axis, -1).flatten(0, -2) if mesh.ndim > 1 else mesh.mesh[None]
            self.data_rank = int((ranks == dist.get_rank()).any(-1).nonzero())
        elif mesh is not None:
            raise TypeError(f"mesh must be a DeviceMesh or None, got {arguments.shown(mesh)}")
        else:
            self.data_rank = 0
        self.data_size, self.world = len(ranks), ranks.numel()
        self.firsts = ranks[:, 0].tolist()  # the first rank of each sequence

    @property
    def split(self) -> bool:
        """Whether a sequence has several ranks."""
        return self.sequence.size > 1


class SequenceTrainer(Trainer):
    """A Trainer for a model that `lasp.parallelize` has split::

        mesh = lasp.init_mesh(dp_shard=2, sp=4)
        lasp.parallelize(model, mesh["sp"])
        trainer = lasp.integrations.SequenceTrainer(model, args, train_dataset=..., mesh=mesh)

    For a child of Trainer it stands before it: `class MyTrainer(SequenceTrainer, SFTTrainer): pass`.

    All ranks of a sequence get the same samples: `per_device_train_batch_size` is of the ranks of a sequence together.
    Losses, gradient norms, metrics and checkpoints are those of a Trainer on as many ranks as there are sequences, with
    a model that is whole. Metrics (`compute_metrics`) are of whole sequences, for which the logits of a batch are put
    together on every rank; where only losses are asked for they are not. On one rank of "sp" it is the plain Trainer.

    Args:
        mesh: the whole mesh (dp_replicate x dp_shard x sp), `mesh["sp"]` if all ranks share one sequence, or None for
            one rank.
        segment: train by `lasp.stream_backward`, in segments of so many tokens of all ranks, for sequences longer than
            memory; on one rank too, where `parallelize` was called with the model. None does not. With the loss of
            Trainer alone; evaluation is in one piece.
        args: as the Trainer takes them.
        kwargs: as the Trainer takes them.

    Raises:
        ValueError: a model that is not split over the sequence axis of `mesh`, ranks that are not those of the
            Trainer, or an option that would be wrong on slices.
        RankMismatchError: before a step, and at the latest at the end of an evaluation, if ranks of a sequence were
            given different batches; on each of them.
    """

    def __init__(self, *args: Any, mesh: DeviceMesh | None, segment: int | None = None, **kwargs: Any):
        self.place = Place(mesh)
        self.segment = None if segment is None else arguments.integer("segment", segment, at_least=1)
        self.whole_calls = WholeCalls(self.place.sequence)
        self.evaluated = RunningChecksums()  # the batches of the evaluation that runs
        if self.place.split and self._loss_of().__module__ == _DPO:
            self._install_reference(*args, **kwargs)
        super().__init__(*args, **kwargs)
        if self.place.split and getattr(self, "aux_loss_enabled", False):  # TRL's fused head computes it
            raise ValueError(
                f"{type(self).__name__}: the router's load-balancing loss would be of slices in TRL's trainers; "
                "set router_aux_loss_coef=0.0"
            )

    def _loss_of(self) -> type:
        """The class whose `compute_loss` ours calls."""
        after = type(self).__mro__[type(self).__mro__.index(SequenceTrainer) + 1 :]
        return next(cls for cls in after if "compute_loss" in vars(cls))

    def _install(self, model: nn.Module | None) -> None:
        """Let the model be called with whole batches."""
        split = [] if model is None else split_models(model)
        if not split:
            raise ValueError(
                f"{type(model).__name__} is not split: call lasp.parallelize(model, mesh['sp']) before "
                f"{type(self).__name__}"
            )
        for module, border in split:
            if border.sequence.ranks != self.place.sequence.ranks:
                raise ValueError(
                    f"{type(module).__name__} is split over the ranks {border.sequence.ranks}, but the sequence axis "
                    f"of mesh has {self.place.sequence.ranks}"
                )
        self.whole_calls.install(model)  # type: ignore[arg-type]

    def _install_reference(
        self, model: Any = None, ref_model: nn.Module | None = None, args: Any = None, **kwargs: Any
    ) -> None:
        """The reference of DPO is split as well: it is the model without its adapters (PEFT), or known before."""
        if ref_model is not None:
            self._install(ref_model)
        elif not (hasattr(model, "peft_config") or getattr(args, "precompute_ref_log_probs", False)):
            raise ValueError(
                f"{type(self).__name__} would load a reference model that is not split: pass ref_model, another model "
                "that lasp.parallelize(ref_model, mesh['sp']) has split"
            )

    def _validate_args(self) -> None:
        super()._validate_args()
        if self.segment is not None:
            owner = next(cls for cls in type(self).__mro__ if "compute_loss" in vars(cls))
            owner = self._loss_of() if owner is SequenceTrainer else owner
            if owner.__module__ != "transformers.trainer" or self.compute_loss_func is not None:
                whose = owner.__name__ if self.compute_loss_func is None else "compute_loss_func"
                raise ValueError(
                    f"segment={self.segment} is for the loss of transformers' Trainer; the one of {whose} needs the "
                    "whole sequence at once: leave it out"
                )
            for name in ("label_smoothing_factor", "neftune_noise_alpha"):
                if getattr(self.args, name, None):
                    raise ValueError(f"{name}={getattr(self.args, name)} does not go with segment: leave it out")
        if not self.place.split:
            return
        if self.args.world_size != self.place.world:
            raise ValueError(
                f"mesh has {self.place.world} ranks, but TrainingArguments knows {self.args.world_size}: start with "
                "torchrun, or set RANK, LOCAL_RANK and WORLD_SIZE"
            )
        for wrong, sentence in self._refused():
            if wrong:
                raise ValueError(f"{type(self).__name__} on sequences that are split: {sentence}")

    def _refused(self) -> Iterable[tuple[object, str]]:
        """What would be wrong on slices, or nobody has tried: whether it is so, and what to do."""
        owner, kind = self._loss_of(), self.accelerator.distributed_type
        yield (
            owner.__module__ not in _KNOWN,
            f"the compute_loss of {owner.__name__} is not known to be right there; known are those of Trainer, "
            "SFTTrainer and DPOTrainer",
        )
        yield (
            self.compute_loss_func is not None,
            "compute_loss_func would be given logits of a slice; define compute_loss in your class, from "
            "super().compute_loss(..., return_outputs=True), whose logits are whole",
        )
        for options in (self.args, self.args.accelerator_config):
            for name, (allowed, sentence) in _OPTIONS.items():
                given = getattr(options, name, None)
                yield given not in (None, *allowed), f"{name}={given!r} {sentence}"
        yield (
            getattr(self.accelerator, "parallelism_config", None) is not None,
            "parallelism_config is another way to split them; leave it out",
        )
        yield (
            kind not in (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU),
            f"{kind.value} through Trainer has not been tried with it, DDP has; leave it out, or where weights must "
            "be sharded take a loop of your own with lasp.data_parallel.wrap_fsdp2(model, mesh) and lasp.token_loss",
        )

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The function is to call `lasp.parallelize` on what it makes."""
        model = super().call_model_init(*args, **kwargs)
        if self.place.split:
            self._install(model)
        return model

    # Who gets which samples

    def create_accelerator_and_postprocess(self) -> None:
        """Make an accelerator that deals samples to sequences, and gathers from each of them once."""
        super().create_accelerator_and_postprocess()
        if self.place.split:
            if self.model is not None:
                self._install(self.model)
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self.accelerator = _Accelerator.of(self.accelerator, self.place, seed)
            self.gather_function = self.accelerator.gather_for_metrics

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        """Draws of an epoch are the same on all ranks of a sequence, and after resuming."""
        if isinstance(self.accelerator, _Accelerator):
            self.accelerator.seed_epoch(epoch)
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        """The batches of an optimizer step, compared all at once with those of the other ranks of the sequence."""
        if self.place.split:
            batches = list(itertools.islice(epoch_iterator, num_batches))
            self._compare_batches("the forward of a batch", batches)
            epoch_iterator = iter(batches)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loop of `evaluate` and `predict`. Its batches are compared as well, most of them behind the last one."""
        self.evaluated = RunningChecksums()
        output = super().evaluation_loop(*args, **kwargs)
        if self.place.split:
            self._compare_batches("the end of an evaluation", evaluated=self.evaluated)
        return output

    def _compare_batches(
        self, before: str, batches: Sequence[Mapping] = (), evaluated: RunningChecksums | None = None
    ) -> None:
        """At each step, other than shard_batch: here it is not the user's code that gives ranks their batches."""
        listing = {} if evaluated is None else evaluated.read()
        for number, batch in enumerate(batches):
            of = f" of micro-batch {number}" if len(batches) > 1 else ""
            listing |= {f"{name}{of}": x for name, x in checksums(_tensors_of(batch)).items()}
        count = len(batches) if evaluated is None else evaluated.count
        agreement.compare(
            self.place.sequence,
            {"batches": count},
            {agreement.BATCH: listing},
            before=before,
            kind="batch of a Trainer",
        )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Weights that a checkpoint lacks are an error: training would go on from others."""
        weights = self.model.state_dict()  # type: ignore[union-attr]
        missing = set(load_result.missing_keys)
        loaded = {
            x.data_ptr() for name, x in weights.items() if name not in missing
        }  # tied ones are loaded with others
        lacks = sorted(name for name in missing if weights[name].data_ptr() not in loaded)
        if self.place.split and lacks:
            raise ValueError(
                f"the checkpoint lacks {', '.join(lacks[:3])}{' ...' if len(lacks) > 3 else ''}, which would stay as "
                "they are: transformers writes some models, such as those with experts, under names that Trainer does "
                "not read; load them by from_pretrained"
            )
        super()._issue_warnings_after_load(load_result)

    # How often a token is counted

    def get_tp_size(self) -> int:
        """Ranks that are given the same samples, as those of tensor parallelism."""
        return super().get_tp_size() * self.place.sequence.size

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """How many labels count: those that `shard_batch` gives, without the last one of a packed document."""
        if (
            self.place.split
            and batch_samples
            and isinstance(batch_samples[0], Mapping)
            and "labels" in batch_samples[0]
        ):
            batch_samples = [
                batch
                if batch.get("shift_labels") is not None
                else {**batch, "shift_labels": shard_batch(batch, None)["labels"]}
                for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = (
            before + (self.state.num_input_tokens_seen - before) // self.place.sequence.size
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of this rank, for its part of the sequence."""
        return super().floating_point_ops(inputs) // self.place.sequence.size

    # Calls of the model

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's; with `segment`, forward and backward go over the sequence segment by segment."""
        if self.segment is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(mode := getattr(self.optimizer, "train", None)):
            mode()
        inputs = self._prepare_inputs(inputs)
        shifted = inputs.pop("shift_labels", None)
        batch = inputs if shifted is None else {**inputs, "labels": shifted}
        streamed, whole = prepared(model, batch, self.place.sequence, shift_labels=shifted is None)
        of_mean, beside = self._scales(whole.values["labels"], num_items_in_batch)
        scaler = self.accelerator.scaler
        up = 1.0 if scaler is None else scaler.scale(torch.ones((), device=self.args.device))
        loss = TokenLoss(self.place.sequence.group, of_mean * up, -100)
        loss.scale_beside = beside * up
        with self.compute_loss_context_manager():
            mean, _ = streamed.backward(whole, self.segment, loss)
        of_tokens = mean - loss.beside_mean()
        return (of_tokens * of_mean + loss.beside_mean() * beside).detach().to(self.args.device, torch.float32)

    def _scales(self, labels: Tensor, num_items_in_batch: Any) -> tuple[Any, float]:
        """What the mean over the tokens of a batch counts in a step, and what a loss that is no such mean does."""
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return 1 / self.current_gradient_accumulation_steps, 1 / self.current_gradient_accumulation_steps
        replicas = (
            self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1
        )
        items, tokens = num_items_in_batch, (labels != -100).sum().to(self.args.device, non_blocking=True)
        if isinstance(items, Tensor):  # a plain number needs no copy, for which the host would wait
            items = items.to(self.args.device, non_blocking=True)
        return tokens / items * replicas, float(replicas)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of the whole sequences; with `return_outputs` also their logits."""
        with self.whole_calls.calls(logits=return_outputs):
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Loss, logits and labels of the whole sequences."""
        if self.place.split:
            if agreement.is_due(self.evaluated.count):
                self._compare_batches("the forward of a batch", [inputs])
            self.evaluated.add(_tensors_of(inputs))
        with self.whole_calls.calls(logits=not prediction_loss_only):
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """The log-probabilities of DPO's reference, over the ranks."""
        with self.whole_calls.calls(logits=False):
            return super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]


def _tensors_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in batch.items() if isinstance(x, Tensor)}


class _Accelerator(Accelerator):
    """Deals samples to sequences, not to ranks."""

    place: Place
    seed: int
    generators: list[torch.Generator]

    @classmethod
    def of(cls, accelerator: Accelerator, place: Place, seed: int) -> _Accelerator:
        """The same object: others hold it, and what it is set up for is its own business."""
        accelerator.__class__ = cls
        assert isinstance(accelerator, cls)
        accelerator.place, accelerator.seed, accelerator.generators = place, seed, []
        return accelerator

    def prepare_data_loader(
        self, data_loader: DataLoader, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> DataLoader:
        """Prepare it as accelerate does, with sequences in place of processes."""
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        init = data_loader.worker_init_fn
        if isinstance(init, functools.partial) and "rank" in init.keywords:  # Trainer's seed of a worker
            data_loader.worker_init_fn = functools.partial(
                init.func, *init.args, **{**init.keywords, "rank": self.place.data_rank}
            )
        sampler: Any = None if isinstance(data_loader.dataset, IterableDataset) else data_loader.sampler
        holder: Any
        for holder in (data_loader, None if isinstance(sampler, RandomSampler) else sampler):
            if getattr(holder, "generator", self) is None:  # it would draw from that of the process
                holder.generator = torch.Generator().manual_seed(self.seed)
                self.generators.append(holder.generator)
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            num_processes=self.place.data_size,
            process_index=self.place.data_rank,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=list(self.rng_types or ()),
            dispatch_batches=False,
            even_batches=self.even_batches,
            use_seedable_sampler=True,
            data_seed=self.seed,
            non_blocking=self.non_blocking,
            use_stateful_dataloader=self.use_stateful_dataloader,
        )
        self._dataloaders.append(prepared)
        return prepared

    def seed_epoch(self, epoch: int) -> None:
        """Begin the draws of an epoch."""
        for generator in self.generators:
            generator.manual_seed(self.seed + epoch)

    def gather_for_metrics(self, input_data: Any, *_: Any, **__: Any) -> Any:
        """Tensors, from each sequence once. (accelerate's own then leaves out what fills the last batch.)"""
        self.gather = self._gather_once  # type: ignore[method-assign]
        try:
            return super().gather_for_metrics(input_data)
        finally:
            del self.gather

    def _gather_once(self, tensors: Any) -> Any:
        def of_firsts(x: Tensor) -> Tensor:
            return x.unflatten(0, (self.place.world, -1))[self.place.firsts].flatten(0, 1)

        return recursively_apply(of_firsts, super().gather(tensors))
