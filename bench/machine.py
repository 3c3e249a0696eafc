"""All that is measured on a machine with several GPUs: scaling, the longest sequences, faults, predictions.

    python bench/machine.py --list                          # the parts, and about how long each takes
    python bench/machine.py --budget 570 --peers --save     # as many as fit in so many seconds
    python bench/machine.py --budget 570 --peers --save     # again: those that are left

Each part is a command of its own, which bench/README.md explains; here stands which, in what order, and with what sizes
for so many GPUs. A part is begun only where the budget has room for the seconds that it is expected to take, and ended
when the budget is over. Its output is kept in runs/machine; a part that has ended well is not run again on the same day
(`--again`: it is). The exit status is 1 while a part is missing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import add_report_arguments, report
from tables import table

ROOT = Path(__file__).parent.parent
WORK = ROOT / "runs" / "machine"  # output, trainings, and what has ended well
DECAYS = ("fixed", "none", "channel", "delta", "gated_delta", "kda")


@dataclass(frozen=True)
class Part:
    """One command. `{out}` and `{commit}` stand for what this script was given."""

    name: str
    seconds: float  # about how long it takes on H100s or H200s, with its start
    command: str
    step: bool = False  # of examples/train.py, whose last step is kept as a record here


def label(gpus: int) -> str:
    """What records of so many of these cards are called: 8xH200."""
    card = torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0] if torch.cuda.is_available() else "gpu"
    return f"{gpus}x{card}"


def parts(gpus: int, *, peers: bool = False) -> list[Part]:
    """In the order in which they are worth their time."""
    name = f"--name {label(gpus)}"
    ranks = max(8, gpus)  # of the faults: a GPU may have several
    layouts = [f"{dp}x{gpus // dp}" for dp in (2**n for n in range(gpus.bit_length())) if gpus % dp == 0]
    today = f"{{out}}/{datetime.date.today()}"
    kept = "--save --out {out} --commit {commit}"
    start = f"torchrun --standalone --nproc-per-node {gpus}"
    train = "python examples/train.py --model 1B --vocab 64000 --repeat-text --batch 1 --dtype bfloat16 --no-save"
    train += f" --parallel fsdp2 --ranks {gpus} --out {WORK}"
    scaling = f"{start} bench/operator_scaling.py {name}"
    found = [
        Part("weak_1B", 230, f"{start} bench/scaling.py --model 1B --tokens 65536 --mesh {' '.join(layouts)} --steps 3 "
             f"--warmup 2 {kept}"),
        # On 8 GPUs all of it fits; on fewer what blocks keep, 4 KiB a token, goes to the host.
        Part("longest_1B", 180, f"{train}/longest_1B --seq-len {2**22 + 2**19} --recompute all --chunk 32768 "
             f"--offload {0 if gpus >= 8 else 8} --steps 2", step=True),
        Part("stream_1B", 60 + 1400 / gpus, f"{train}/stream_1B --seq-len {2**26} --segment 262144 --steps 1",
             step=True),
        # Of shorter sequences the peak is not in what blocks keep, and foretells too little.
        Part("longest_7B", 220, f"{start} bench/scaling.py --model 7B --mesh 1x{gpus} --only --longest --fill 0.85 "
             f"--chunk 32768 --tokens 65536 131072 --steps 1 --warmup 1 {kept}"),
        Part("faults", 310, f"python tests/faults/inject.py --backend nccl --ranks {ranks} --gpus {gpus} --dp 2 "
             f"--count 20 --seed 0 --parallel 3 --timeout 8 --within 270 {kept}"),
        Part("operator", 200, f"{scaling} --decay {' '.join(DECAYS)} --repetitions 8 {kept}"),
        Part("exchange", 120, f"{start} bench/exchange.py --suite alone op {name} {kept}"),
        Part("simulate", 60, f"python bench/simulate.py --max-ranks {max(8, gpus)} --measured {today}_exchange_"
             f"{label(gpus)}.json --scaling {today}_operator_scaling_{label(gpus)}.json "
             f"{today}_scaling_weak_1B_{gpus}xcuda.json {kept}"),
    ]  # fmt: skip
    if peers:  # whose settings fla tunes first
        found.append(Part("peers", 450, f"{scaling}_peers --decay fixed delta gated_delta kda --weak 32768 --strong 0 "
                          f"--ranks {gpus} --peers --peer-tokens 32768 --repetitions 8 {kept}"))  # fmt: skip
    return found


def command_of(part: Part, out: Path, commit: str | None) -> list[str]:
    """As it is started, by this Python."""
    text = part.command if commit else part.command.replace(" --commit {commit}", "")
    words = [word.replace("{out}", str(out)).replace("{commit}", commit or "") for word in shlex.split(text)]
    start = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    return [*start[words[0]], *words[1:]]


def run(command: list[str], log: Path, seconds: float) -> str:
    """Run it with its output in `log`: "ok", "over" if it was ended after so many seconds, or its exit status."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(seconds)
            return "ok" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            return "over"
        finally:  # its ranks, too, also where this script is interrupted
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def keep_step(part: Part, command: list[str], out: Path, arguments: argparse.Namespace) -> None:
    """A record of the last step of a training."""
    folder = Path(command[command.index("--out") + 1])
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("tokens", "seconds", "tokens_per_s", "tokens_per_s_per_rank", "peak_memory_bytes", "loss")
    row = {name: metrics[-1][name] for name in names}
    facts = {"steps": len(metrics), "seconds of each": [round(step["seconds"], 1) for step in metrics]}
    words = shlex.join(["python", *command[1:]]).replace(str(WORK), "runs/machine")
    name = f"{part.name}_{label(arguments.gpus)}"
    report(name, words, [row], save=True, out=out, facts=facts, markdown=True, commit=arguments.commit)


def run_all(wanted: list[Part], arguments: argparse.Namespace) -> Iterator[dict]:
    """A row for each part, as it ends."""
    out: Path = arguments.out.resolve()
    WORK.mkdir(parents=True, exist_ok=True)
    begun, today = time.monotonic(), datetime.date.today().isoformat()
    for part in wanted:
        done = WORK / f"{part.name}.done"
        if done.exists() and done.read_text() == today and not arguments.again:
            yield {"part": part.name, "seconds": None, "found": "ok, earlier"}
            continue
        left = arguments.budget - (time.monotonic() - begun) if arguments.budget else float("inf")
        if left < part.seconds:
            yield {"part": part.name, "seconds": None, "found": f"no time: {part.seconds:.0f} s expected"}
            continue
        print(f"{part.name}, about {part.seconds:.0f} s: {part.command}", file=sys.stderr, flush=True)
        if part.step:  # of an earlier try
            shutil.rmtree(WORK / part.name, ignore_errors=True)
        start, command = time.monotonic(), command_of(part, out, arguments.commit)
        found = run(command, WORK / f"{part.name}.log", min(left, 2 * part.seconds))
        if found == "ok":
            if part.step:
                keep_step(part, command, out, arguments)
            done.write_text(today)
        yield {"part": part.name, "seconds": time.monotonic() - start, "found": found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="default: all")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds in all; 0: no end")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, in this order")
    parser.add_argument("--peers", action="store_true", help="the peers' scaling, too; needs fla-core")
    parser.add_argument("--again", action="store_true", help="also what has ended well today")
    parser.add_argument("--list", action="store_true", help="tell the parts, and run none")
    add_report_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.gpus < 2:
        parser.error(f"--gpus must be at least 2, got {arguments.gpus}")
    known = {part.name: part for part in parts(arguments.gpus, peers=arguments.peers)}
    if unknown := sorted(set(arguments.only or ()) - set(known)):
        more = "" if arguments.peers else ", and with --peers peers"
        parser.error(f"--only has no part {', '.join(unknown)}; there are {', '.join(known)}{more}")
    wanted = [known[name] for name in arguments.only or known]
    if arguments.list:
        for part in wanted:
            print(f"{part.name}, about {part.seconds:.0f} s\n    {part.command}")
        return
    if not arguments.save:
        parser.error("--save must be given: every part keeps its records in --out")
    rows = list(run_all(wanted, arguments))
    print(table(rows))
    sys.exit(any(not row["found"].startswith("ok") for row in rows))


if __name__ == "__main__":
    main()
