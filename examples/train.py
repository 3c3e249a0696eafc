"""Train a TransNormerLLM, or a model of another family, on real text, with every sequence split over the ranks.

    python examples/train.py --verify            # all GPUs, or 2 CPU processes where there are none
    python examples/train.py --data my_texts/ --model 385M --seq-len 65536 --parallel fsdp2 --dtype bfloat16
    torchrun --nproc-per-node 4 examples/train.py --dp 2 --sp 2 --validate --validate-every 20 --schedule wsd
    python examples/train.py --model 1B --vocab 64000 --seq-len 16777216 --repeat-text --segment 32768 --batch 1 \
        --steps 1 --dtype bfloat16 --parallel fsdp2 --no-save
    python examples/train.py --family gla --pattern LLLS --verify    # three layers of GLA, one of softmax, and so on
    torchrun --nproc-per-node 8 --max-restarts 3 examples/train.py --out runs/mine --save-every 500 --resume-if-any

The one of 16,777,216 tokens streams its sequence through the GPU in segments (`lasp.stream_backward`): no memory would
hold it. The last goes on by itself with its newest checkpoint after a rank or a host was lost, as a job of Slurm's does
with `#SBATCH --requeue` and the same options behind `srun python`.

Also starts under mpirun and srun. Each step of `train_step` is what it would be on one device, but for the three calls
of lasp; `build_model` holds the others. Text, checkpoints, reports, learning rates and the loss on held-out text have a
file each beside this one. prepare.py makes a file of tokens (`--data tokens.bin`) of a text, export.py one file of
the weights of a checkpoint, and complete.py goes on with a text.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import _checkpoint
import torch
import torch.distributed as dist
import typer
from _files import FileError, NotWritten, held, on_all_ranks, on_rank_0, read_object
from _launch import LARGEST, RUNS, new_folder, refuse, refuse_beyond_memory, relaunch, started_by_a_launcher
from _model import FAMILIES, LEARNING_RATES, NO_EXPERTS, Size, config_of, experts_of, model_of
from _report import METRICS, RUN, Report
from _saver import Saver
from _schedule import learning_rate
from _tensorboard import is_installed
from _text import Text, batch_of_step, open_text, slice_of_step
from _validation import Validation, held_out
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from tqdm import trange

import lasp
from lasp.data_parallel.schemes import FSDP2_SCHEMES, SCHEMES
from lasp.models import TNL, Decoder, DecoderConfig, TNLConfig
from lasp.models.memory import blocks_to_recompute, save_memory
from lasp.ranks import SCHEDULES

# The largest difference between the losses of a step that --verify allows. Sums taken in another order differ in the
# last bits, and training lets such differences grow: in the demo weights that are 1e-7 off change a loss by up to 5e-6
# (with twice the learning rate 7e-5), in one process as well.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
Scheme = Literal[SCHEMES]
# Options that a resumed run must have as before: what it computes hangs on them.
SAME = (
    "family",
    "model",
    "pattern",
    "vocab",
    "decay",
    *NO_EXPERTS,
    "seq_len",
    "batch",
    "steps",
    "lr",
    "schedule",
    "warmup",
    "dtype",
    "seed",
    "validate",
    "outer_every",
)


@dataclass(frozen=True)
class Options:
    """The command line; `main` explains each."""

    dp: int
    dp_replicate: int
    sp: int | None
    seq_len: int
    batch: int
    accumulate: int
    segment: int
    family: str
    model: str
    pattern: str
    vocab: int
    decay: str
    experts: int
    experts_per_token: int
    attention_experts: int
    balance: float
    steps: int
    lr: float
    schedule: str
    warmup: int | None
    parallel: str
    outer_every: int
    dtype: str
    seed: int
    recompute: str
    chunk: int
    offload: str
    exchange: str
    data: Path | None
    out: Path | None
    resume: bool
    resume_if_any: bool
    save_every: int
    save: bool
    async_save: bool
    repeat_text: bool
    validate: bool
    validate_every: int
    tensorboard: bool
    verify: bool
    ranks: int | None


def main(
    dp: Annotated[int, typer.Option(min=1, help="Ranks over which the sequences of a batch are dealt out.")] = 1,
    dp_replicate: Annotated[
        int, typer.Option(min=1, help="Of these, the copies of what --parallel deals out; hsdp needs some.")
    ] = 1,
    sp: Annotated[int | None, typer.Option(min=1, help="Ranks that share a sequence; default: all.")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a whole sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step, of all ranks together.")] = 2,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Micro-batches of a step; gradients travel after the last.")
    ] = 1,
    segment: Annotated[
        int, typer.Option(min=0, max=LARGEST, help="Stream it in segments of so many tokens; 0: in one.")
    ] = 0,
    family: Annotated[str, typer.Option(help=f"What the layers are: {', '.join(FAMILIES)}.")] = "tnl",
    model: Annotated[Size, typer.Option(help="Size.")] = "tiny",
    pattern: Annotated[str, typer.Option(help="Of the family (L) and softmax (S), repeated: LLLS. Not for tnl.")] = "L",
    vocab: Annotated[
        int, typer.Option(min=256, max=LARGEST, help="Words that the model knows; bytes are the first 256.")
    ] = 256,
    decay: Annotated[Literal["alibi", "tnl", "retnet", "none"], typer.Option(help="Decay schedule of tnl.")] = "alibi",
    experts: Annotated[int, typer.Option(min=0, help="Slices of a gated unit that tokens choose from; 0: none.")] = 0,
    experts_per_token: Annotated[int, typer.Option(min=1, help="How many of them a token chooses.")] = 2,
    attention_experts: Annotated[int, typer.Option(min=0, help="Groups of heads likewise; 0: all heads.")] = 0,
    balance: Annotated[
        float, typer.Option(min=0, help="The loss holds so many times the balance of the experts.")
    ] = 0.01,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole run.")] = 80,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; default: by model.")] = None,
    schedule: Annotated[
        Literal["cosine", "linear", "wsd", "constant"], typer.Option(help="How the learning rate falls.")
    ] = "cosine",
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps in which it rises; default: a tenth of all.")] = None,
    parallel: Annotated[Scheme, typer.Option(help="What the ranks deal out (docs/data_parallel.md).")] = "ddp",  # type: ignore[valid-type]
    outer_every: Annotated[
        int,
        typer.Option(min=0, help="Steps that the --dp replicas train apart between averages (CO2); 0: none."),
    ] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the arithmetic.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Of the weights and the batches.")] = 0,
    recompute: Annotated[
        str, typer.Option(help="Blocks computed again in backward: how many, all, or auto: on a GPU as few as fit.")
    ] = "auto",
    chunk: Annotated[int, typer.Option(min=0, max=LARGEST, help="Tokens of a gated unit at once; 0: all.")] = 0,
    offload: Annotated[
        str, typer.Option(help="Recomputed blocks whose inputs lie on the host until backward: how many, or all.")
    ] = "0",
    exchange: Annotated[str, typer.Option(help="How states travel between ranks.")] = "auto",
    data: Annotated[
        Path | None, typer.Option(exists=True, help="Text, or prepare.py's tokens; default: Python's own sources.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; default: a new one in runs/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")] = False,
    resume_if_any: Annotated[
        bool,
        typer.Option("--resume-if-any", help="The same, or begin if there is none: for torchrun's --max-restarts."),
    ] = False,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: only at the end.")] = 0,
    save: Annotated[bool, typer.Option(help="Save the weights at the end.")] = True,
    async_save: Annotated[bool, typer.Option(help="Go on training while a checkpoint is written.")] = True,
    repeat_text: Annotated[
        bool, typer.Option("--repeat-text", help="Let sequences longer than the text start it again.")
    ] = False,
    validate: Annotated[
        bool, typer.Option("--validate", help="Hold out the end of the text, and tell the loss on it by position.")
    ] = False,
    validate_every: Annotated[int, typer.Option(min=0, help="Steps between these losses; 0: only at the end.")] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write the curves for TensorBoard too.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare with training in one process.")] = False,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes to start; default: GPUs, or 2.")] = None,
) -> None:
    """Train a language model (TransNormerLLM, or --family) with its sequences split over ranks."""
    default_lr = LEARNING_RATES[model.split("-")[-1]]
    arguments = {**locals(), "lr": default_lr if lr is None else lr}
    options = Options(**{name: arguments[name] for name in Options.__dataclass_fields__})
    if not started_by_a_launcher():
        ranks = options.ranks or torch.cuda.device_count() or 2
        check(going_on(options), ranks, text_of(options))  # before any rank starts
        if ranks > 1:
            relaunch(__file__, ranks)
    try:
        run(options)
    except (FileError, NotWritten, FloatingPointError) as error:  # which say what is wrong, and are on every rank
        print(f"\nrank {dist.get_rank()}: the run ends here: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from None


def going_on(options: Options) -> Options:
    """Whether a run begins or goes on, where that hangs on what is there. (Ranks ask when all have met: then those of
    an earlier start, who may have written, have ended.)"""
    there = options.out is not None and (options.out / _checkpoint.LATEST).exists()
    return replace(options, resume=options.resume or (options.resume_if_any and there))


def check(options: Options, ranks: int, text: Text) -> None:
    """Refuse options that do not fit together, before anything starts."""
    check_ranks(options, ranks)
    if not 0 < options.lr <= 1e30:  # the optimizer scales it, and what fp32 cannot hold is an error there
        refuse("--lr", f"{options.lr} is not a positive number up to 1e30")
    if options.family not in FAMILIES:
        refuse("--family", f"{options.family!r} is not one of {', '.join(FAMILIES)}")
    if options.family != "tnl" and (options.decay != "alibi" or options.chunk):
        refuse("--decay" if options.decay != "alibi" else "--chunk", f"is for --family tnl, not {options.family}")
    if not options.pattern or set(options.pattern) - set("L" if options.family == "tnl" else "LS"):
        refuse("--pattern", f"{options.pattern!r} is not of letters L and S, and of L alone for tnl")
    check_experts(options)
    layers = config_of_run(options).layers
    if options.recompute not in ("auto", "all", *map(str, range(layers + 1))):
        refuse("--recompute", f"{options.recompute!r} is not auto, all, or a number of blocks up to {layers}")
    if options.offload not in ("all", *map(str, range(layers + 1))):
        refuse("--offload", f"{options.offload!r} is not all, or a number of blocks up to {layers}")
    if options.recompute.isdigit() and options.offload != "0":
        offloaded = 1 if options.offload == "all" else int(options.offload)
        if offloaded > int(options.recompute):
            refuse("--offload", f"{options.offload!r} is more than the blocks of --recompute, {options.recompute}")
    exchanges = ("auto", *SCHEDULES)
    if options.exchange not in exchanges:
        refuse("--exchange", f"{options.exchange!r} is not one of {', '.join(exchanges)}")
    if not len(text):
        refuse("--data", f"{describe(options)} has no text (hidden files, and those of zeros, are none)")
    if options.seq_len > len(text) and not options.repeat_text:
        hint = "--repeat-text starts it again"
        refuse("--seq-len", f"{options.seq_len} tokens are more than the {len(text)} {text.unit}s of text; {hint}")
    if options.vocab < text.vocab:
        refuse("--vocab", f"{options.vocab} words are fewer than the {text.vocab} of {describe(options)}")
    check_memory(options, ranks)
    check_reports(options, text)
    latest = None if options.out is None else options.out / _checkpoint.LATEST
    if (options.resume or options.resume_if_any) and latest is None:
        refuse("--resume" if options.resume else "--resume-if-any", "needs --out, the folder of the run to go on with")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and not (options.resume or options.resume_if_any):  # each would begin anew, or be refused
        refuse("--resume-if-any", f"is missing: torchrun is to restart the run (--max-restarts={restarts})")
    if options.resume and latest is not None and not latest.exists():
        refuse("--resume", f"there is no checkpoint in --out {options.out}")
    if not options.resume and latest is not None and latest.exists():
        refuse(
            "--out",
            f"{options.out} holds a run already; add --resume to go on with it (or --resume-if-any, where the same "
            "command is started again by torchrun or Slurm), or name another folder",
        )
    metrics = None if options.out is None else options.out / METRICS
    if not options.resume and not options.resume_if_any and metrics is not None and metrics.exists():
        what = "is of a run without a checkpoint, and would be lost"
        refuse("--out", f"{metrics} {what}; remove it, or name another folder")
    check_folder(options.out or RUNS, options.data)
    if options.resume:
        check_same_run(options, text)


def check_ranks(options: Options, ranks: int) -> None:
    """Refuse to deal out a batch, or weights, over ranks where it cannot be."""
    sp = options.sp or ranks // options.dp
    if options.dp * sp != ranks:
        wanted = "" if options.sp is None else f" x --sp {options.sp}"
        refuse("--dp", f"{options.dp}{wanted} does not make {ranks} ranks")
    if options.batch % (options.dp * options.accumulate):
        micro = f" in --accumulate {options.accumulate} micro-batches" if options.accumulate > 1 else ""
        refuse("--batch", f"{options.batch} sequences cannot be dealt out to --dp {options.dp} ranks{micro}")
    if options.outer_every:
        check_outer(options)
    if options.dp % options.dp_replicate:
        refuse("--dp-replicate", f"{options.dp_replicate} copies cannot be made of --dp {options.dp} ranks")
    if options.parallel == "hsdp" and options.dp_replicate == 1:
        refuse("--parallel", "hsdp needs --dp-replicate above 1; zero3 shards over all ranks")


def check_memory(options: Options, ranks: int) -> None:
    """Refuse a model, or a batch, of which not even a part fits: the weights in fp32, which each rank has before they
    are dealt out; the tokens of a micro-batch; and what leaves the first layer for those that run at once."""
    config = config_of_run(replace(options, vocab=256))  # since of a larger one weights may not even be counted
    words = 2 * 4 * options.vocab * config.width  # of the first layer and of the last
    refuse_beyond_memory("--vocab", f"the weights of {options.vocab} words", words)
    with torch.device("meta"):
        weights = sum(p.nbytes for p in model_of(config).parameters())
    refuse_beyond_memory("--model", f"the weights of {options.model}", weights)
    sp, rows = ranks // options.dp, options.batch // options.dp // options.accumulate
    number = 2 if options.dtype == "bfloat16" else 4
    at_once = min(options.segment or options.seq_len, options.seq_len)  # of a sequence
    for tokens, nbytes, on_host in ((options.seq_len, 8, True), (at_once, config.width * number, False)):
        option = ("--seq-len", f"{tokens} tokens") if tokens > rows else ("--batch", f"{options.batch} sequences")
        refuse_beyond_memory(option[0], option[1], rows * -(-tokens // sp) * nbytes, on_host=on_host)
    refuse_beyond_memory("--batch", f"{options.batch} places of sequences", 8 * options.batch, on_host=True)


def check_outer(options: Options) -> None:
    """Refuse what does not go together with replicas that train apart."""
    if options.dp == 1:
        refuse("--outer-every", "is the steps between averages of --dp replicas, of which there is one")
    if options.dp_replicate > 1:
        refuse(
            "--dp-replicate",
            "makes copies whose gradients are averaged at every step, and with --outer-every each of the --dp ranks is "
            "a replica that trains apart; leave one of the two out",
        )
    if options.parallel == "hsdp":
        refuse("--parallel", "hsdp averages over copies at every step, and --outer-every does not; take zero3")
    if options.verify:
        refuse("--verify", "compares with training that averages every gradient, and --outer-every does not")


def check_experts(options: Options) -> None:
    """Refuse numbers of experts that the model cannot have."""
    if not (options.experts or options.attention_experts):
        for name in ("experts_per_token", "balance"):
            if getattr(options, name) != NO_EXPERTS[name]:
                refuse(f"--{name.replace('_', '-')}", "is for models with --experts or --attention-experts")
        return
    if options.family == "tnl":
        refuse("--experts" if options.experts else "--attention-experts", "is for families other than tnl")
    try:
        config_of_run(options)
    except ValueError as error:
        refuse("--experts", str(error))


def check_reports(options: Options, text: Text) -> None:
    """Refuse to report what cannot be."""
    if options.validate_every and not options.validate:
        refuse("--validate-every", "needs --validate, which holds out the end of the text")
    held = len(held_out(text)[1])
    if options.validate and options.seq_len > held and not (options.repeat_text and held):
        refuse(
            "--validate", f"holds out {held} tokens at the end, which are fewer than the {options.seq_len} of --seq-len"
        )
    if options.tensorboard and not is_installed():
        refuse(
            "--tensorboard", "needs the package tensorboard: pip install 'lasp-runtime[tensorboard]', or tensorboard"
        )


def check_folder(out: Path, data: Path | None) -> None:
    """Refuse a folder for results that cannot be written, or whose files would be part of the text."""
    if data is not None and data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        refuse("--out", f"{out} lies inside --data {data}, whose files are the text; name a folder elsewhere")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        refuse("--out", f"{out} cannot be written: {error.strerror}")


def check_same_run(options: Options, text: Text) -> None:
    """A resumed run may lie on other ranks, but what it computes must not change, and its files must be whole."""
    assert options.out is not None
    file, now = options.out / RUN, as_json(options)
    try:
        _checkpoint.newest(options.out)
        run_before = read_object(file)
        before, digest = run_before.get("options"), run_before.get("text")
        before = {**NO_EXPERTS, "outer_every": 0, "accumulate": 1, **before} if isinstance(before, dict) else before
        if not isinstance(before, dict) or not isinstance(digest, str) or not before.keys() >= {*SAME, "data"}:
            raise FileError(f"{file} is not what a run writes: options and a digest of its text are not in it")
    except FileError as error:
        refuse("--resume", str(error))
    for name in (*SAME, "accumulate") if balance_of(options) else SAME:  # not linear: of each micro-batch for itself
        if before[name] != now[name]:
            refuse("--" + name.replace("_", "-"), f"{now[name]}, but the run to be resumed has {before[name]}")
    if digest != text.digest:
        hint = f" (the sources of Python {run_before.get('python')})" if before["data"] is None else ""
        refuse(
            "--data",
            f"{describe(options)} is not the text of the run to be resumed: its SHA-256 is {text.digest}, that "
            f"of the run's {digest}{hint}",
        )


def balance_of(options: Options) -> float:
    """How many times the loss holds the balance of the experts; 0 without experts."""
    return options.balance if options.experts or options.attention_experts else 0.0


def describe(options: Options) -> str:
    """The text, for messages."""
    return f"the sources of Python {platform.python_version()}" if options.data is None else str(options.data)


def text_of(options: Options) -> Text:
    """What to train on."""
    try:
        return open_text(options.data)
    except (OSError, FileError) as error:
        refuse("--data", f"{describe(options)} cannot be read: {error}")


def as_json(options: Options) -> dict:
    """The options as run.json holds them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def meshes_of(options: Options) -> tuple[DeviceMesh, DeviceMesh]:
    """All ranks, and those of a step's loss and gradients: with --outer-every a replica's, else all."""
    apart = options.outer_every > 0
    copies = options.dp if apart else options.dp_replicate
    mesh = lasp.init_mesh(dp_replicate=copies, dp_shard=options.dp // copies, sp=options.sp or -1)
    return mesh, lasp.replica_mesh(mesh) if apart else mesh


def run(options: Options) -> None:
    """The whole run of one rank."""
    env = lasp.init()
    options = going_on(options)
    text, digest = agree(options, env)
    mesh, of_steps = meshes_of(options)
    folder = options.out or Path(on_rank_0("naming the folder for results", lambda: new_folder("tnl")))
    with ExitStack() as until_the_end:
        on_rank_0("taking the folder for results", lambda: until_the_end.enter_context(held(folder)))
        text, losses = train(options, env, (mesh, of_steps), text, digest, folder)
    dist.destroy_process_group()
    if options.verify and env.rank == 0:
        verify(options, text, losses, env.device)


def train(
    options: Options,
    env: lasp.Env,
    meshes: tuple[DeviceMesh, DeviceMesh],
    text: Text,
    digest: str,
    folder: Path,
) -> tuple[Text, dict[int, float]]:
    """All steps, from the first one or a checkpoint on, and what they leave in the folder; what of the text they are
    trained on, and the loss of every step."""
    mesh, of_steps = meshes
    apart = options.outer_every > 0
    model, optimizer = with_optimizer(options, build_model(options, of_steps, env.device), of_steps, env.device)
    same = {"text": digest, **({"replicas": str(options.dp)} if apart else {})}
    outer = lasp.CO2(model, optimizer, mesh, sync_every=options.outer_every) if apart else None
    first_step = _checkpoint.load(folder, model, optimizer, run=same, outer=outer) if options.resume else 0
    if options.resume and env.rank == 0:
        print(f"going on with step {first_step} of {options.steps}, from {folder / f'step-{first_step:06d}'}")
    validation = None
    if options.validate:
        text, unseen = held_out(text)
        validation = Validation(folder, unseen, first_step=first_step)
    about = {"text": digest, "tokenizer": text.tokenizer, "entropy": text.entropy, "unit": text.unit}
    report = Report(folder, env, as_json(options), first_step=first_step, **about)
    beside = options.async_save and 0 < options.save_every < options.steps
    with Saver(folder, env.device, beside=beside, run=same, outer=outer) as saver:
        for step in range(first_step, options.steps):
            loss, tokens = train_step(options, step, text, model, optimizer, meshes, env.device)
            if not loss.isfinite():  # the same on every rank, of a replica
                raise FloatingPointError(f"the loss of step {step} is {loss.item()}")
            counted = int(tokens) * (options.dp if apart else 1)
            report.step(step, loss.item(), counted, lr=optimizer.param_groups[0]["lr"])
            if outer is not None:
                outer.step()
                if step + 1 == options.steps:
                    outer.finish()
            saver.check()
            due, last = options.save_every and (step + 1) % options.save_every == 0, step + 1 == options.steps
            if due or (options.save and last):
                report.sync()
                saver.save(step + 1, model, optimizer, beside=not last)
                report.restart_clock()
            if validation is not None and options.validate_every and (step + 1) % options.validate_every == 0:
                with nullcontext() if outer is None else outer.outer_weights():
                    report.held_out(step + 1, validation.run(step + 1, model, mesh, options, env.device))
    if validation is not None and options.steps not in validation.losses:
        report.held_out(options.steps, validation.run(options.steps, model, mesh, options, env.device))
    report.finish({} if validation is None else validation.losses)
    return text, report.losses


def agree(options: Options, env: lasp.Env) -> tuple[Text, str]:
    """The text and its digest, if this rank's options and files, which may be those of another host, are fine on all.

    Ends the run if not: what is wrong is printed on rank 0, which the others wait for.
    """
    texts: list[Text] = []

    def look() -> dict[str, str | None]:
        try:
            texts.append(text_of(options))
            check(options, env.world_size, texts[0])
        except typer.BadParameter as error:
            return {"option": error.param_hint, "message": error.message}  # type: ignore[dict-item]
        return {"digest": texts[0].digest, "begins": None if options.resume else "begins"}

    found = on_all_ranks("looking at the options", look)
    refused = next((x for x in found if "option" in x), None)
    if refused is None and len({x["digest"] for x in found}) > 1:
        digests = ", ".join(f"{x['digest']} on rank {rank}" for rank, x in enumerate(found))
        refused = {"option": "--data", "message": f"{describe(options)} differs between ranks; SHA-256: {digests}"}
    if refused is None and len({x["begins"] for x in found}) > 1:
        ranks = ", ".join(str(rank) for rank, x in enumerate(found) if x["begins"])
        message = (
            f"{options.out} holds no checkpoint for rank {ranks}, and one for the others; they must share the folder"
        )
        refused = {"option": "--out", "message": message}
    if refused is not None:
        if env.rank == 0:
            typer.BadParameter(refused["message"], param_hint=refused["option"]).show()
        on_all_ranks("waiting for rank 0 to say what is wrong with the options", lambda: None)
        raise typer.Exit(2)
    return texts[0], found[env.rank]["digest"]


def config_of_run(options: Options) -> TNLConfig | DecoderConfig:
    """Of its model."""
    of_model = {"vocab": options.vocab, "decay": options.decay, "pattern": options.pattern}
    return config_of(options.family, options.model, **of_model, **experts_of(asdict(options)))


def build_model(options: Options, mesh: DeviceMesh | None, device: torch.device) -> nn.Module:
    """The model on this rank; without a mesh the plain one."""
    torch.manual_seed(options.seed)  # the same weights on every rank
    with device:
        model = model_of(config_of_run(options))
    if mesh is not None:
        lasp.parallelize(model, mesh["sp"], exchange=options.exchange, check_finite=True)
    recompute = recomputed(options, model, mesh, device)
    offload = recompute if options.offload == "all" else int(options.offload)
    save_memory(model.blocks, recompute=recompute, chunk=options.chunk, offload=offload)
    return model


def with_optimizer(
    options: Options, model: nn.Module, mesh: DeviceMesh | None, device: torch.device
) -> tuple[nn.Module, Optimizer]:
    """The model as it is called, and AdamW, on a GPU in one kernel: under --parallel, without a mesh plain."""
    adamw = functools.partial(AdamW, lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    if mesh is None:
        return model, adamw(model.parameters())
    more: dict[str, Any] = {"blocks": model.blocks}
    if options.parallel in FSDP2_SCHEMES:
        bf16 = torch.bfloat16 if options.dtype == "bfloat16" else None
        more["mp_policy"] = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)
    return lasp.data_parallel(model, mesh, scheme=options.parallel, optimizer=adamw, **more)


def recomputed(options: Options, model: TNL | Decoder, mesh: DeviceMesh | None, device: torch.device) -> int:
    """How many blocks are computed again in backward."""
    if options.recompute == "all" or (options.offload != "0" and options.recompute == "auto"):
        return model.config.layers
    if options.recompute != "auto":
        return int(options.recompute)
    if device.type != "cuda":
        return 0
    if not isinstance(model, TNL):  # what the others keep is not known
        return model.config.layers
    ranks, sp = mesh.size() // options.dp_replicate if mesh else 1, mesh["sp"].size() if mesh else 1
    tokens = -(-min(options.segment or options.seq_len, options.seq_len) // sp) * (
        options.batch // options.accumulate // (options.dp if mesh else 1)
    )
    count = sum(p.numel() for p in model.parameters())
    bytes_of = count * bytes_of_parameter(options, ranks)
    number = 2 if options.dtype == "bfloat16" else 4
    free = torch.cuda.mem_get_info(device)[0]
    found = blocks_to_recompute(model.config, tokens, free=free, parameters=bytes_of, number=number)
    return max(on_all_ranks("choosing the blocks that are computed again", lambda: found)) if mesh else found


def bytes_of_parameter(options: Options, ranks: int) -> int:
    """Beside its 4 of the weight as it is stored: gradient and two moments in fp32, and the weight in 16 bits, of which
    so many ranks share what --parallel deals out."""
    if options.parallel in FSDP2_SCHEMES:
        return 12 // ranks + 6 + (4 if options.accumulate > 1 else 0)  # what micro-batches add up is whole
    return 10 + 8 // ranks if options.parallel == "zero1" else 18


def train_step(
    options: Options,
    step: int,
    text: Text,
    model: nn.Module,
    optimizer: Optimizer,
    meshes: tuple[DeviceMesh | None, DeviceMesh | None],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """One step; the loss of the global batch (with --outer-every a replica's part of it) before it, and the tokens that
    it is the mean of. `meshes` are those of `meshes_of`."""
    optimizer.zero_grad()
    losses, counts = [], []
    for micro in range(options.accumulate):
        with lasp.no_sync(model, enabled=micro + 1 < options.accumulate):
            loss, count = micro_batch(options, step, micro, text, model, meshes, device)
        losses.append(loss)
        counts.append(count)
    # Each loss is a part of the mean, since all micro-batches have as many tokens.
    loss, tokens = torch.stack(losses).sum(), torch.stack(counts).sum()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(options.schedule, options.lr, step, options.steps, options.warmup)
    optimizer.step()
    return loss, tokens


def micro_batch(
    options: Options,
    step: int,
    micro: int,
    text: Text,
    model: nn.Module,
    meshes: tuple[DeviceMesh | None, DeviceMesh | None],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of one; its part of the step's loss, and its tokens."""
    mesh, of_steps = meshes
    drawn: dict[str, Any] = {"seed": options.seed, "step": step, "batch": options.batch, "seq_len": options.seq_len}
    drawn["part"] = (micro, options.accumulate)
    share = 1 / options.accumulate
    sharded = mesh is not None and options.parallel in FSDP2_SCHEMES  # then FSDP2 casts to bf16
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16" and not sharded)
    balance = balance_of(options)
    if options.segment and mesh is not None:
        with autocast:  # the ids stay on the host, and so does what crosses the borders of segments
            more = {"segment": options.segment, "balance": balance, "loss_scale": share}
            ids, first = batch_of_step(text, mesh, **drawn), step == 0 and micro == 0
            loss, tokens = lasp.stream_backward(model, {"input_ids": ids}, mesh=of_steps, progress=first, **more)
            return share * loss.detach(), tokens
    if text.in_slices and mesh is not None:  # the same, where this rank reads its own slice of a file alone
        local = slice_of_step(text, mesh, device, **drawn)
    else:  # this rank's slice, labels, positions, layout
        local = lasp.shard_batch({"input_ids": batch_of_step(text, mesh, **drawn).to(device)}, mesh)
    head = (model.module if isinstance(model, DistributedDataParallel) else model).head
    with autocast:
        hidden = model(local["input_ids"], local["position_ids"], local["layout"], return_hidden=True)
        loss, tokens = lasp.linear_token_loss(hidden, head.weight, local["labels"], mesh=of_steps)  # type: ignore[union-attr,arg-type]
        if balance:
            loss = loss + balance * lasp.balance_loss(model, mesh=of_steps)
    loss = share * loss
    loss.backward()  # the scheme of --parallel averages the gradients over `of_steps`, after the last micro-batch
    return loss.detach(), tokens


def verify(options: Options, text: Text, split: dict[int, float], device: torch.device) -> None:
    """Train the same seed on the same batches without lasp's ranks, and compare the loss of every known step."""
    if not split:
        print("--verify has nothing to compare: metrics.jsonl has no losses", file=sys.stderr)
        raise typer.Exit(1)
    print("The same training in one process, for comparison:")
    model, optimizer = with_optimizer(options, build_model(options, None, device), None, device)
    single = []
    for step in trange(options.steps, unit="step", dynamic_ncols=True):
        loss, _ = train_step(options, step, text, model, optimizer, (None, None), device)
        single.append(loss.item())
    print(f"{'step':>6}  {'split':>10}  {'one process':>11}  {'difference':>10}")
    steps = sorted(split)
    for step in sorted({*steps[:: max(1, len(steps) // 10)], steps[-1]}):
        print(f"{step:6d}  {split[step]:10.6f}  {single[step]:11.6f}  {abs(split[step] - single[step]):10.1e}")
    worst = max(steps, key=lambda step: abs(split[step] - single[step]))
    difference, tolerance = abs(split[worst] - single[worst]), TOLERANCE[options.dtype]
    which = f"all {options.steps}" if len(steps) == options.steps else f"{len(steps)} of {options.steps}"
    print(f"largest difference of {which} steps: {difference:.1e} at step {worst}", end="")
    print(f" (tolerance {tolerance:g}): {'the same training' if difference <= tolerance else 'NOT the same'}")
    if not difference <= tolerance:
        raise typer.Exit(1)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)  # plain tracebacks: every rank may print one
app.command()(main)

if __name__ == "__main__":
    app()
