"""TRL's trainers on sequences that are split over ranks: what they log, and the weights, of one process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import lasp

pytest.importorskip("transformers", reason="needs the extra `transformers`")
pytest.importorskip("trl", reason="needs TRL")

import foreign
from test_trainer import VOCABULARY, launched, logs_of, samples, split, trainer_of, weights_of

pytestmark = pytest.mark.timeout(600)  # of a loaded machine, on which each rank imports all this
LIMIT = 200.0
OF_TIME = ("runtime", "per_second", "flos", "epoch", "preparation")


def tokenizer():
    """A word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2")


def options_of(folder, mesh, **options):
    given = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.1, "optim": "sgd", "use_cpu": True}
    given |= {"max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    given |= {"lr_scheduler_type": "constant", "bf16": False, "max_length": None, "activation_checkpointing": False}
    given |= {"gradient_accumulation_steps": 2 // mesh["dp_shard"].size()}
    return {"output_dir": folder, **given, **options}


def dataset(rows, folder=None):
    """In memory; in a folder, all ranks have the same, and what is kept of it."""
    import datasets

    datasets.disable_progress_bars()
    plain = [{name: x if isinstance(x, str) else x.tolist() for name, x in row.items()} for row in rows]
    made = datasets.Dataset.from_list(plain)
    if folder is None:
        return made
    place = f"{folder}/{dist.get_world_size()}"
    if dist.get_rank() == 0:
        made.save_to_disk(place)
    dist.barrier()
    return datasets.load_from_disk(place)


def told(trainer):
    """All numbers of each log, by name."""
    rows = [{k: x for k, x in row.items() if not any(t in k for t in OF_TIME)} for row in trainer.state.log_history]
    return logs_of(trainer), weights_of(trainer.model), rows


def assert_same(found, expected, *, metrics=True):
    np.testing.assert_allclose(found[0], expected[0], rtol=5e-6)
    for name, x in expected[1].items():
        assert float((found[1][name] - x).abs().max()) < 1e-6, name
    for row, known in zip(found[2], expected[2]) if metrics else ():
        assert row.keys() == known.keys()
        for name, x in known.items():
            assert row[name] == pytest.approx(x, rel=2e-5, abs=2e-5), name


def sft(name, sp, folder, options):
    import trl

    class Mine(lasp.integrations.SequenceTrainer, trl.SFTTrainer):
        pass

    with launched():
        model, mesh = split(name, sp)
        data = dataset(samples(ragged=True))
        args = trl.SFTConfig(**options_of(folder, mesh, **options))
        given = {"train_dataset": data, "eval_dataset": data.select(range(8)), "processing_class": tokenizer()}
        trainer = trainer_of(model, args, cls=Mine, mesh=mesh, **given)
        trainer.train()
        trainer.evaluate()
        return told(trainer)


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}, {"padding_free": True}], ids=str)
@pytest.mark.parametrize("name", ["bamba", "qwen3"])
def test_sft(name, options, tmp_path):
    alone = {} if "padding_free" in options else options  # a model without kernels takes no documents on one rank
    [expected] = run_ranks(1, sft, name, 1, tmp_path, alone, timeout=LIMIT)
    for found in run_ranks(2, sft, name, 2, tmp_path, options, timeout=LIMIT):
        assert_same(found, expected)
    for found in run_ranks(4, sft, name, 2, tmp_path, options, timeout=LIMIT):
        assert_same(found, expected, metrics=False)  # TRL takes their means over batches and not over tokens


def preferences():
    draw = torch.Generator().manual_seed(6)

    def text(least, most):
        ids = torch.randint(3, VOCABULARY, (int(torch.randint(least, most, (), generator=draw)),), generator=draw)
        return "".join(f" w{n}" for n in ids.tolist())

    return [{"prompt": text(3, 12), "chosen": text(1, 9), "rejected": text(1, 9)} for _ in range(16)]


def reference(mesh):
    model = foreign.build("bamba")
    with torch.no_grad():
        for p in model.parameters():
            p *= 0.95
    return lasp.parallelize(model, mesh["sp"])


def dpo(sp, folder, kind, options):
    import trl

    class Mine(lasp.integrations.SequenceTrainer, trl.DPOTrainer):
        pass

    with launched():
        model, mesh = split("bamba", sp)
        if kind == "peft":
            model = with_adapter(model)
        data = dataset(preferences(), folder)
        args = trl.DPOConfig(**options_of(folder, mesh, **options))
        given = {"ref_model": reference(mesh)} if kind == "reference" else {}
        given |= {"train_dataset": data, "eval_dataset": data.select(range(8)), "processing_class": tokenizer()}
        trainer = trainer_of(model, cls=Mine, mesh=mesh, args=args, **given)
        trainer.train()
        trainer.evaluate()
        return told(trainer)


def with_adapter(model):
    import peft

    torch.manual_seed(1)
    found = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "in_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("reference", {}),
        ("reference", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0, 0.5], "use_weighting": True}),
        ("reference", {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5}),
        ("reference", {"precompute_ref_log_probs": True}),
        ("precomputed", {"precompute_ref_log_probs": True}),
        ("peft", {}),
    ],
    ids=str,
)
def test_dpo(kind, options, tmp_path):
    if kind == "peft":
        pytest.importorskip("peft", reason="needs PEFT")
    [expected] = run_ranks(1, dpo, 1, tmp_path, kind, options, timeout=LIMIT)
    for found in run_ranks(2, dpo, 2, tmp_path, kind, options, timeout=LIMIT):
        assert_same(found, expected)
    for found in run_ranks(4, dpo, 2, tmp_path, kind, options, timeout=LIMIT):
        assert_same(found, expected, metrics=False)


def refused(folder):
    import trl

    class Sft(lasp.integrations.SequenceTrainer, trl.SFTTrainer):
        pass

    class Dpo(lasp.integrations.SequenceTrainer, trl.DPOTrainer):
        pass

    class Reward(lasp.integrations.SequenceTrainer, trl.RewardTrainer):
        pass

    with launched():
        model, mesh = split("minimax", 2)
        data = {"train_dataset": dataset(samples(4)), "processing_class": tokenizer(), "mesh": mesh}
        options = options_of(folder, mesh)
        with pytest.raises(ValueError, match=r"load-balancing loss would be of slices.*router_aux_loss_coef=0\.0"):
            trainer_of(model, trl.SFTConfig(**options), cls=Sft, **data)
        trainer_of(model, trl.SFTConfig(**options, router_aux_loss_coef=0.0), cls=Sft, **data).train()
        data["train_dataset"] = dataset(preferences())
        for args in (None, trl.DPOConfig(**options)):
            with pytest.raises(ValueError, match=r"a reference model that is not split: pass ref_model, another model"):
                Dpo(model, args=args, **data)
        with pytest.raises(ValueError, match=r"BambaForCausalLM is not split: call lasp\.parallelize"):
            Dpo(model, foreign.build("bamba"), trl.DPOConfig(**options), **data)


def test_what_would_be_wrong_is_refused(tmp_path):
    run_ranks(2, refused, tmp_path, timeout=LIMIT)
