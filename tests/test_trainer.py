"""Trainers of transformers on sequences split over ranks: losses, norms, weights and metrics of one process."""

import contextlib
import copy
import functools
import multiprocessing
import os
import random
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of, run_ranks

import lasp

pytest.importorskip("transformers", reason="needs the extra `transformers`")
pytest.importorskip("accelerate", reason="needs the extra `transformers`")

import foreign

TOKENS, VOCABULARY = 21, 97


@contextlib.contextmanager
def launched():
    """As torchrun starts a process; accelerate keeps what it finds."""
    from accelerate.state import AcceleratorState, GradientState

    rank, world = dist.get_rank(), dist.get_world_size()
    found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 1}
    found |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with mock.patch.dict(os.environ, {name: str(x) for name, x in found.items()} if world > 1 else {}):
        forget()
        try:
            yield
        finally:
            forget()
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def samples(count=16, *, ragged=False):
    """Prompts of different length do not count; `ragged`: neither are samples equally long."""
    draw = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        tokens = int(torch.randint(5, TOKENS, (), generator=draw)) if ragged else TOKENS
        ids = torch.randint(3, VOCABULARY, (tokens,), generator=draw)
        labels = ids.clone()
        labels[: int(torch.randint(0, tokens - 3, (), generator=draw))] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def arguments(folder, **options):
    from transformers import TrainingArguments

    given = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.5,
    }
    given |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(folder, **given | {"lr_scheduler_type": "constant"} | options)


def trainer_of(model, args=None, *, cls=None, **options):
    from transformers import PrinterCallback

    torch.set_num_threads(1)
    made = (cls or lasp.integrations.SequenceTrainer)(model, args=args, **options)
    made.remove_callback(PrinterCallback)
    return made


def logs_of(trainer):
    return [(x["loss"], x["grad_norm"]) for x in trainer.state.log_history if "grad_norm" in x]


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def split(name, sp, **more):
    """Whether they mix tokens all these models were asked in test_transformers.py, which takes most of the time."""
    model = foreign.build(name, **more)
    mesh = mesh_of(dp_shard=-1, sp=sp)
    lasp.parallelize(model, mesh["sp"], strict=False)
    return model, mesh


def train(
    name, sp, folder, batches, make=lambda data: data, config=None, ragged=False, collator=None, sizes=None, **options
):
    """Losses and gradient norms of each step, and the weights; `batches` of 2 samples a step."""
    with launched():
        model, mesh = split(name, sp, **(sizes or {}))
        vars(model.config).update(config or {})
        vars(model).update({key: x for key, x in (config or {}).items() if hasattr(model, key)})
        args = arguments(folder, gradient_accumulation_steps=batches // mesh["dp_shard"].size(), **options)
        data = make(samples(ragged=ragged))
        trainer = trainer_of(model, args, train_dataset=data, mesh=mesh, data_collator=collator)
        trainer.train()
        return logs_of(trainer), weights_of(model), trainer.state


def assert_same(found, expected, bound=1e-6):
    (logs, weights, *_), (expected_logs, expected_weights, *_) = found, expected
    np.testing.assert_allclose(logs, expected_logs, rtol=5e-6)
    assert len(logs) == len(expected_logs) > 0
    for name, x in expected_weights.items():
        assert float((weights[name] - x).abs().max()) < bound, name


_alone = {}


def one_process(name, folder):
    """What several tests compare with: `train` on one rank, as it comes."""
    if name not in _alone:
        [_alone[name]] = run_ranks(1, train, name, 1, folder, 2)
    return _alone[name]


@pytest.mark.parametrize(
    ("world", "sp", "name"),
    [(4, 2, name) for name in ("bamba", "minimax", "qwen3_next", "llama", "mamba2")]
    + [(2, 2, "bamba"), (3, 3, "bamba")],
)
def test_training_is_that_of_one_process(world, sp, name, tmp_path):
    """Accumulation, clipping, prompts that do not count; DDP over dp x sp."""
    expected = one_process(name, tmp_path)
    assert expected[0][0][1] > 0.5  # it is clipped
    for found in run_ranks(world, train, name, sp, tmp_path, 2):
        assert_same(found, expected)


def train_in_segments(name, sp, folder, segment, config=None, ragged=False):
    """By `lasp.stream_backward`, on one rank too."""
    made = functools.partial(trainer_of, segment=segment)
    collator = _collate_padded if ragged else None
    with mock.patch.dict(globals(), trainer_of=made):
        return train(name, sp, folder, 2, config=config, ragged=ragged, collator=collator)


@pytest.mark.parametrize("name", ["bamba", "minimax"])
def test_training_in_segments_is_that_of_one_pass(name, tmp_path):
    """Padded samples, accumulation, clipping, the router's loss; DDP over dp x sp; on one rank, too."""
    more = {"output_router_logits": True, "router_aux_loss_coef": 0.5} if name == "minimax" else None
    ragged = name == "bamba"
    options = (_same, more, ragged, _collate_padded if ragged else None)
    [expected] = run_ranks(1, train, name, 1, tmp_path, 2, *options)
    for world, sp in ((1, 1), (2, 2), (4, 2)):
        for found in run_ranks(world, train_in_segments, name, sp, tmp_path, 7, more, ragged):
            assert_same(found, expected)


def segments_refused(folder):
    class Mine(lasp.integrations.SequenceTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with launched():
        model, mesh = split("llama", dist.get_world_size())
        for options, message in (
            ({"segment": 0}, "segment must be positive, got 0"),
            ({"segment": 7, "cls": Mine}, "segment=7 is for the loss of transformers' Trainer; the one of Mine"),
            ({"segment": 7, "compute_loss_func": print}, "the one of compute_loss_func needs the whole sequence"),
        ):
            with pytest.raises(ValueError, match=message):
                trainer_of(model, arguments(folder), mesh=mesh, **options)
        with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 does not go with segment"):
            trainer_of(model, arguments(folder, label_smoothing_factor=0.1), mesh=mesh, segment=7)


@pytest.mark.parametrize("world", [1, 2])
def test_losses_that_need_the_whole_sequence_are_refused_in_segments(world, tmp_path):
    run_ranks(world, segments_refused, tmp_path)


def train_one_layer(folder, sp, **options):
    return train("llama", sp, folder, 2, sizes={"num_hidden_layers": 1}, **options)[:2]


def train_compiled(folder):
    return train_one_layer(folder, 2, torch_compile=True, torch_compile_backend="aot_eager")


@pytest.mark.timeout(600)  # of a loaded machine
def test_compiled_training_is_that_of_one_process(tmp_path):
    """Layers that carry states compile in test_transformers_border.py."""
    [expected] = run_ranks(1, train_one_layer, tmp_path, 1)
    for found in run_ranks(2, train_compiled, tmp_path, timeout=400.0):
        assert_same(found, expected)


def _stream(data):
    return Stream(data)


def train_checkpointed(folder, sp):
    return train("bamba", sp, folder, 2, activation_checkpointing=True, ragged=True, collator=_collate_padded)


def test_checkpointed_and_padded(tmp_path):
    [expected] = run_ranks(1, train_checkpointed, tmp_path, 1)
    for found in run_ranks(2, train_checkpointed, tmp_path, 2):
        assert_same(found, expected)


def test_streams(tmp_path):
    [expected] = run_ranks(1, train, "bamba", 1, tmp_path, 2, _stream)
    for found in run_ranks(4, train, "bamba", 2, tmp_path, 2, _stream):
        assert_same(found, expected)


def test_the_loss_of_the_router_is_of_all_ranks_and_once_a_batch(tmp_path):
    """As transformers weighs it: once for each micro-batch, however many ranks share that."""
    more = {"output_router_logits": True, "router_aux_loss_coef": 2.0}  # parallelize refuses a model that gives it
    [expected] = run_ranks(1, train, "minimax", 1, tmp_path, 2, _same, more)
    without = one_process("minimax", tmp_path)
    assert expected[0][0][0] > without[0][0][0] + 1
    for world, sp in ((2, 2), (4, 2)):
        for found in run_ranks(world, train, "minimax", sp, tmp_path, 2, _same, more):
            assert_same(found, expected)


def _same(data):
    return data


def train_packed(name, sp, folder, form):
    """Two documents in each batch, of 1; on one rank each by itself, as models without kernels cannot take them."""
    from transformers import DataCollatorWithFlattening

    flat = {"position_ids": {}, "flash": {"return_flash_attn_kwargs": True}, "seq_idx": {"return_seq_idx": True}}
    if sp == 1:
        return train(name, 1, folder, 4, ragged=True, per_device_train_batch_size=1)
    collator = DataCollatorWithFlattening(**flat[form])
    return train(name, sp, folder, 2, ragged=True, collator=collator, remove_unused_columns=form != "flash")


FORMS = ("position_ids", "flash", "seq_idx")


@pytest.mark.parametrize(("name", "forms"), [("bamba", FORMS), ("qwen3_next", FORMS[:1]), ("mamba2", FORMS[2:])])
def test_packed_documents_do_not_see_each_other(name, forms, tmp_path):
    [expected] = run_ranks(1, train_packed, name, 1, tmp_path, None)
    for form in forms:
        for found in run_ranks(2, train_packed, name, 2, tmp_path, form):
            assert_same(found, expected)
    for found in run_ranks(4, train_packed, name, 2, tmp_path, "flash"):
        assert_same(found, expected)


def metrics(prediction):
    """Of whole sequences: that a sample is at its place, and its last token too."""
    logits, labels = prediction.predictions, prediction.label_ids
    logits = logits[0] if isinstance(logits, tuple) else logits
    weight = np.cos(np.arange(logits[..., 0].size)).reshape(logits.shape[:2])
    right = (logits.argmax(-1)[:, :-1] == labels[:, 1:])[labels[:, 1:] != -100]
    return {"accuracy": right.mean(), "weighed": (logits.mean(-1) * weight).sum(), "samples": len(logits)}


def evaluate(name, sp, folder, batch, ragged=False, **options):
    """7 samples, so that the last batch is not full: loss alone, metrics, predictions, all in one call of each."""
    with launched():
        model, mesh = split(name, sp)
        args = arguments(folder, per_device_eval_batch_size=batch, **options)
        collator = _collate_padded if ragged else None
        trainer = trainer_of(model, args, eval_dataset=samples(7, ragged=ragged), mesh=mesh, data_collator=collator)
        alone = trainer.evaluate()["eval_loss"]
        trainer.compute_metrics = metrics
        found = trainer.evaluate()
        predicted = trainer.predict(samples(7, ragged=ragged))
        unlabelled = trainer.predict([{"input_ids": sample["input_ids"]} for sample in samples(7)]).predictions
        numbers = [alone, *(found[f"eval_{key}"] for key in ("loss", "accuracy", "weighed", "samples"))]
        return numbers, predicted.predictions, predicted.label_ids, unlabelled


def _collate_padded(data):
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([sample["input_ids"] for sample in data], batch_first=True)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if "labels" in data[0]:
        batch["labels"] = pad([sample["labels"] for sample in data], batch_first=True, padding_value=-100)
    return batch


@pytest.mark.parametrize("name", ["bamba", "llama"])
def test_metrics_are_of_whole_sequences(name, tmp_path):
    """Also with data parallelism, where the last batch is filled with samples that do not count."""
    for world, sp, ragged in ((2, 2, False), (3, 3, True), (4, 2, False)):
        data = world // sp
        expected = run_ranks(data, evaluate, name, 1, tmp_path, 4 // data, ragged)[0]
        for found in run_ranks(world, evaluate, name, sp, tmp_path, 4 // data, ragged):
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
            assert found[0][-1] == 7
            for x, y in zip(found[1:], expected[1:]):
                assert x.shape == y.shape
                np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def resume(sp, folder, data, count, options):
    """A run of 7 steps, that wrote a checkpoint after 5, in its second epoch, and one that begins there."""
    runs = []
    with launched():
        for begin in (None, f"{folder}/checkpoint-5"):
            model, mesh = split("bamba", sp, attention_dropout=0.3)
            options = options | {"max_steps": 7, "save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch"}
            steps = 4 // mesh["dp_shard"].size()
            args = arguments(
                folder,
                gradient_accumulation_steps=steps,
                learning_rate=0.01,
                **options | {"lr_scheduler_type": "linear", "include_num_input_tokens_seen": "all"},
            )
            trainer = trainer_of(model, args, train_dataset=data(samples(count, ragged=True)), mesh=mesh)
            trainer.data_collator = _collate_padded
            seen = []
            step = trainer.training_step
            trainer.training_step = lambda model, inputs, n: seen.append(inputs["input_ids"]) or step(model, inputs, n)  # noqa: B023
            dist.barrier()
            trainer.train(resume_from_checkpoint=begin)
            runs.append((logs_of(trainer), weights_of(model), seen, trainer.state.num_input_tokens_seen))
    return runs


@pytest.mark.parametrize(
    ("world", "sp", "order"), [(4, 2, "random"), (4, 2, "group_by_length"), (4, 2, "stream"), (2, 2, "random")]
)
def test_a_run_goes_on_in_the_middle_of_an_epoch(world, sp, order, tmp_path):
    """With the bits of one that was not stopped: optimizer, schedule, dropout, and which samples come."""
    data = _stream if order == "stream" else _same
    options = {} if order == "stream" else {"train_sampling_strategy": order}
    count = 60 if order == "stream" else 20  # a stream must last for the run
    ranks = run_ranks(world, resume, sp, tmp_path, data, count, options)
    seen = []
    for whole, rest in ranks:
        assert len(whole[0]) == 7
        assert rest[0][-2:] == whole[0][-2:]
        assert all(torch.equal(rest[1][name], x) for name, x in whole[1].items())
        assert all(torch.equal(x, y) for x, y in zip(rest[2], whole[2][-len(rest[2]) :]))
        assert whole[3] == rest[3]
        seen.append(whole[2])
    for rank in range(world):  # of one sequence the same, and an epoch has each sample once
        assert all(torch.equal(x, y) for x, y in zip(seen[rank], seen[rank // sp * sp]))
    if order != "stream":
        epoch = [row.tolist() for batches in seen[::sp] for batch in batches[: 10 * sp // world] for row in batch]
        epoch = sorted([token for token in row if token] for row in epoch)
        assert epoch == sorted(sample["input_ids"].tolist() for sample in samples(20, ragged=True))


def resume_without(folder):
    """A checkpoint in which a weight has another name, as transformers writes some models with experts."""
    with launched():
        model, mesh = split("minimax", 2)
        options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
        trainer_of(model, arguments(folder, **options), train_dataset=samples(4), mesh=mesh).train()
        dist.barrier()
        model, mesh = split("minimax", 2)
        trainer = trainer_of(model, arguments(folder, max_steps=2), train_dataset=samples(4), mesh=mesh)
        with pytest.raises(
            ValueError, match=r"the checkpoint lacks model\.layers.*experts.*, which would stay as they are"
        ):
            trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-1")


def test_a_checkpoint_that_lacks_weights_is_an_error(tmp_path):
    run_ranks(2, resume_without, tmp_path)


class Own(torch.utils.data.Dataset):
    """Each rank draws its own samples from the n-th on, as if it knew only its rank."""

    def __init__(self, first):
        self.first = first

    def __len__(self):
        return 8

    def __getitem__(self, n):
        return samples(8)[(n + dist.get_rank() * (n >= self.first)) % 8]


def own_samples(folder, first, accumulated):
    with launched():
        model, mesh = split("llama", 2)
        args = arguments(
            folder,
            gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            train_sampling_strategy="sequential",
            max_steps=1,
        )
        trainer = trainer_of(model, args, train_dataset=Own(first), eval_dataset=Own(first), mesh=mesh)
        before = weights_of(model)
        for run in (trainer.train, trainer.evaluate, lambda: trainer.predict(Own(first))):
            with pytest.raises(lasp.RankMismatchError, match="ranks of a sequence cut one batch"):
                run()
        assert all(torch.equal(x, before[name]) for name, x in weights_of(model).items())


@pytest.mark.parametrize(("first", "accumulated"), [(0, 1), (3, 4)])
def test_other_samples_on_ranks_of_a_sequence_are_an_error_before_they_count(first, accumulated, tmp_path):
    run_ranks(2, own_samples, tmp_path, first, accumulated)


def visits(folder):
    """Of the store, by batches: one a step, whatever it accumulates; of an evaluation two batches, and its end."""
    from lasp.checks import agreement

    with launched():
        model, mesh = split("llama", 2)
        args = arguments(folder, gradient_accumulation_steps=4, per_device_eval_batch_size=1, max_steps=2)
        trainer = trainer_of(model, args, train_dataset=samples(16), eval_dataset=samples(5), mesh=mesh)
        seen, genuine = [], agreement.compare

        def compare(*args, before, **kwargs):
            seen.append(before) if kwargs.get("kind") == "batch of a Trainer" else None
            genuine(*args, before=before, **kwargs)

        with mock.patch.object(agreement, "compare", compare):
            trainer.train()
            assert seen == ["the forward of a batch"] * 2
            trainer.evaluate()
            assert seen[2:] == ["the forward of a batch"] * 2 + ["the end of an evaluation"]


def test_batches_are_compared_once_a_step(tmp_path):
    run_ranks(2, visits, tmp_path)


class Shorter(torch.utils.data.IterableDataset):
    """That of the second rank ends earlier."""

    def __iter__(self):
        return iter(samples(8)[: 8 - 3 * dist.get_rank()])


def ends_earlier(folder):
    with launched():
        model, mesh = split("llama", 2)
        args = arguments(folder, gradient_accumulation_steps=4, per_device_train_batch_size=1, max_steps=2)
        trainer = trainer_of(model, args, train_dataset=Shorter(), mesh=mesh)
        with pytest.raises(lasp.RankMismatchError, match="rank 1 has batches 1, the others 4"):
            trainer.train()


def test_data_that_end_earlier_on_a_rank(tmp_path):
    run_ranks(2, ends_earlier, tmp_path)


def plain(name, folder):
    """All ways to call a split model without its layout, by libraries that do not know of it."""
    from accelerate import Accelerator
    from torch.nn.parallel import DistributedDataParallel
    from transformers import Trainer

    with launched():
        model, _mesh = split(name, 2)
        options = {"max_steps": 1, "ddp_find_unused_parameters": True}
        data = samples(4)
        unlabelled = [{"input_ids": sample["input_ids"]} for sample in data]
        refused = pytest.raises(ValueError, match=r"layout is needed.*lasp\.integrations\.SequenceTrainer")
        for given in (data, unlabelled):
            trainer = trainer_of(
                model, arguments(folder, **options), cls=Trainer, train_dataset=given, eval_dataset=given
            )
            for run in (trainer.train, trainer.evaluate, lambda: trainer.predict(given)):  # noqa: B023
                with refused:
                    run()
        batch = {"input_ids": data[0]["input_ids"][None]}
        for called in (model, DistributedDataParallel(model), Accelerator(cpu=True).prepare(copy.deepcopy(model))):
            for more in ({}, {"labels": batch["input_ids"]}, {"labels": batch["input_ids"], "use_cache": False}):
                with refused:
                    called(**batch, **more)


@pytest.mark.parametrize("name", foreign.MODELS)
def test_a_split_model_in_a_plain_trainer_is_an_error_on_every_rank(name, tmp_path):
    run_ranks(2, plain, name, tmp_path)


OPTIONS = {
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0,
    "average_tokens_across_devices": False,
    "auto_find_batch_size": True,
    "eval_use_gather_object": True,
    "train_sampling_strategy": "batch_rebalance",
    "dispatch_batches": True,
    "split_batches": True,
}


def refused(folder):
    from accelerate.utils import DistributedType
    from transformers import Trainer

    with launched():
        model, mesh = split("llama", 2)
        whole = foreign.build("llama")
        for name, value in OPTIONS.items():
            options = {name: value} if name not in ("dispatch_batches", "split_batches") else {}
            options = options or {"accelerator_config": {name: value}}
            with pytest.raises(ValueError, match=f"SequenceTrainer on sequences that are split: {name}"):
                trainer_of(model, arguments(folder, **options), train_dataset=samples(4), mesh=mesh)
        with pytest.raises(ValueError, match="compute_loss_func would be given logits of a slice"):
            trainer_of(model, arguments(folder), compute_loss_func=print, mesh=mesh)
        with pytest.raises(ValueError, match=r"LlamaForCausalLM is not split: call lasp\.parallelize"):
            trainer_of(whole, arguments(folder), mesh=mesh)
        with pytest.raises(TypeError, match="mesh must be"):
            trainer_of(model, arguments(folder), mesh="sp")

        trainer = trainer_of(model, arguments(folder), train_dataset=samples(4), mesh=mesh)
        for kind in ("FSDP", "DEEPSPEED"):
            sharded = mock.PropertyMock(return_value=DistributedType[kind])
            with (
                mock.patch.object(type(trainer.accelerator), "distributed_type", sharded),
                pytest.raises(ValueError, match=rf"{kind} through Trainer .*DDP has; .*wrap_fsdp2\(model, mesh\)"),
            ):
                trainer._validate_args()

        class Theirs(Trainer):
            def compute_loss(self, *args, **kwargs):
                return 0

        class Mine(lasp.integrations.SequenceTrainer, Theirs):
            pass

        with pytest.raises(ValueError, match="the compute_loss of Theirs is not known to be right"):
            trainer_of(model, arguments(folder), cls=Mine, mesh=mesh)


def test_options_that_would_be_wrong_on_slices_are_refused(tmp_path):
    run_ranks(2, refused, tmp_path)


def other_mesh(folder):
    with launched():
        model, _ = split("llama", 2)
        with pytest.raises(
            ValueError, match=r"is split over the ranks \((0, 1|2, 3)\), but the sequence axis of mesh has"
        ):
            trainer_of(model, arguments(folder), mesh=mesh_of(sp=4))
        with pytest.raises(ValueError, match="mesh has 2 ranks, but TrainingArguments knows 4"):
            trainer_of(model, arguments(folder), mesh=mesh_of(dp_shard=-1, sp=2)["sp"])
        with pytest.raises(ValueError, match="mesh must have no tensor parallelism here, got tp = 2"):
            trainer_of(model, arguments(folder), mesh=mesh_of(sp=2, tp=2))


def test_a_mesh_that_is_not_the_models_or_the_trainers(tmp_path):
    run_ranks(4, other_mesh, tmp_path)


def own_loss(sp, folder):
    """A class of the user's that computes something of whole logits."""

    class Mine(lasp.integrations.SequenceTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = loss + (outputs.logits.logsumexp(-1)[:, ::3] ** 2).mean()
            return (loss, outputs) if return_outputs else loss

    with launched():
        model, mesh = split("bamba", sp)
        trainer = trainer_of(model, arguments(folder), cls=Mine, train_dataset=samples(), mesh=mesh)
        trainer.train()
        return logs_of(trainer), weights_of(model)


def test_a_loss_of_whole_logits(tmp_path):
    [expected] = run_ranks(1, own_loss, 1, tmp_path)
    for found in run_ranks(2, own_loss, 2, tmp_path):
        assert_same(found, expected)


class HandsOn(torch.nn.Module):
    """As a wrapper of a user: it names none of the arguments that it hands on."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def by_place(sp, folder):
    class Mine(lasp.integrations.SequenceTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            with self.whole_calls.calls(logits=True):
                output = model(inputs["input_ids"], inputs.get("attention_mask"))
            loss = output.logits.logsumexp(-1).mean()
            return (loss, output) if return_outputs else loss

    with launched():
        model, mesh = HandsOn(foreign.build("bamba")), mesh_of(dp_shard=-1, sp=sp)
        lasp.parallelize(model, mesh["sp"], strict=False)
        args = arguments(folder, remove_unused_columns=False)
        trainer = trainer_of(model, args, cls=Mine, train_dataset=samples(), mesh=mesh)
        trainer.train()
        return logs_of(trainer), weights_of(model)


def test_arguments_without_names_through_a_wrapper(tmp_path):
    [expected] = run_ranks(1, by_place, 1, tmp_path)
    for found in run_ranks(2, by_place, 2, tmp_path):
        assert_same(found, expected)


def workers(folder):
    """Draws in a worker process of the loader are the same on all ranks of a sequence; the batches are compared."""

    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, n):
            ids = torch.randint(3, VOCABULARY, (TOKENS,))
            return {"input_ids": ids, "labels": ids}

    with launched():
        model, mesh = split("llama", 2)
        torch.manual_seed(dist.get_rank())  # so that the processes' own draws differ
        args = arguments(folder, dataloader_num_workers=1, dataloader_multiprocessing_context="fork")
        trainer = trainer_of(model, args, train_dataset=Random(), mesh=mesh)
        torch.manual_seed(dist.get_rank())
        with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):
            trainer.train()
        return logs_of(trainer)


def test_workers_of_a_loader_draw_alike(tmp_path):
    ranks = run_ranks(4, workers, tmp_path)
    assert ranks[0] == ranks[1] == ranks[2] == ranks[3]


def test_what_comes_in_later_is_not_imported_before():
    from processes import finish, start

    code = (
        "import sys, lasp; assert 'transformers' not in sys.modules; lasp.integrations; "
        "assert 'transformers' not in sys.modules and 'accelerate' not in sys.modules; "
        "lasp.integrations.SequenceTrainer; assert 'transformers' in sys.modules"
    )
    process = start(code, {})
    [(_, error)] = finish([process])
    assert process.returncode == 0, error
