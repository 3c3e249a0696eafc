"""The programs of docs/recipes.md, as they stand there: on two ranks what they are on one, on every rank.

`lora.py` needs PEFT and is run by tests/test_peft.py. What a recipe calls a trap is tried here, too.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from processes import LAUNCHER_PREFIXES, ROOT, free_port
from scripts import run_script
from test_docs import DOCS, files_of

from lasp.models import TNL, TNLConfig

pytestmark = pytest.mark.timeout(600)  # of a loaded machine
LIMIT = 280.0
PROGRAMS = files_of("recipes.md")
ELSEWHERE = {"lora.py"}
AFTER = """
import os, lasp, torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
exchanges = {layer.exchanges for layer in lasp.explain(model)}
torch.save({"loss": loss.item(), "weights": weights, "exchanges": exchanges}, os.environ["RANK"] + ".pt")
"""


def in_fp64(program):
    """The same weights as they stand, and everything from there on in fp64."""
    changed, count = re.subn(
        r"^(model = .*)\.to\(env\.device\)", r"\1.to(env.device, torch.float64)", program, flags=re.MULTILINE
    )
    assert count == 1
    return changed


def replaced(program, *pairs):
    for old, new in pairs:
        assert program.count(old) == 1, (program.count(old), old)
        program = program.replace(old, new)
    return program


def finished(program, ranks, folder, *arguments):
    """What each rank found in the end, and what rank 0 printed."""
    folder.mkdir(exist_ok=True)
    before = f"import os, sys; os.chdir({str(folder)!r}); sys.argv = {['recipe.py', *arguments]!r}\n"
    before += "os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"  # ranks are of a CPU also where there is a GPU
    ranks_ended = run_script(before + program + AFTER, ranks, limit=LIMIT)
    assert [code for code, *_ in ranks_ended] == [0] * ranks, "\n".join(error for *_, error in ranks_ended)
    assert [printed for _, printed, _ in ranks_ended[1:]] == [""] * (ranks - 1)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)], ranks_ended[0][1]


def assert_same(found, expected, bound=1e-9):
    """Of every rank, to so much absolutely: weights are of the size 0.1, and a step of AdamW moves them by 0.001."""
    for rank in found:
        assert rank["loss"] == pytest.approx(expected["loss"], abs=bound)
        assert rank["weights"].keys() == expected["weights"].keys()
        for name, x in rank["weights"].items():
            torch.testing.assert_close(x, expected["weights"][name], rtol=0, atol=bound)


def losses(printed):
    return [float(x) for x in re.findall(r"^step \d+: loss (\d+\.\d+)", printed, re.MULTILINE)]


# Compiled without kernels, which a C++ compiler takes long for on a CPU; beside one process that compiles nothing.
COMPILE = "block.compile()"
OTHER_SCHEMES = {
    "ddp.py": [('"ddp"', '"zero1"')],
    "fsdp2.py": [('"fsdp2"', '"zero2"')],
}
RANKS = dict.fromkeys(("ddp.py", "fsdp2.py", "accumulate.py"), (2, 4))
COMPARED = [name for name in PROGRAMS if name not in {"recompute.py", "bf16.py", "resume.py", *ELSEWHERE}]


def test_every_program_is_run():
    assert len(COMPARED) == 7
    assert set(PROGRAMS) == {*COMPARED, "recompute.py", "bf16.py", "resume.py", *ELSEWHERE}
    page = (DOCS / "recipes.md").read_text()
    assert page.count("```python\n") == len(PROGRAMS)


@pytest.mark.parametrize("name", COMPARED)
def test_ranks_find_what_one_process_does(name, tmp_path):
    program = PROGRAMS[name]
    [expected], printed = finished(in_fp64(program), 1, tmp_path / "alone")
    first, *_, last = losses(printed)
    assert last < first - 0.01  # of random tokens, which it learns by heart
    for ranks in RANKS.get(name, (2,)):
        found, _ = finished(in_fp64(program), ranks, tmp_path / f"split{ranks}")
        assert_same(found, expected)
        assert all(rank["exchanges"] for rank in found)
    for scheme, other in OTHER_SCHEMES.get(name, ()):
        found, _ = finished(replaced(in_fp64(program), (scheme, other)), 2, tmp_path / other.strip('"'))
        assert_same(found, expected)
    _, as_it_stands = finished(program, 2, tmp_path / "fp32")
    assert losses(as_it_stands) == pytest.approx(losses(printed), abs=3e-5)


def test_a_recompute_sends_nothing(tmp_path):
    """In each of three steps a layer exchanges once forward and once back; compiled outside of the checkpoint, once
    more (tests/test_recompute.py)."""
    program = in_fp64(PROGRAMS["recompute.py"])
    [expected], _ = finished(replaced(program, (COMPILE, "pass")), 1, tmp_path / "alone")
    compiled = replaced(program, (COMPILE, 'block.compile(backend="aot_eager", fullgraph=True)'))
    found, printed = finished(compiled, 2, tmp_path / "split")
    assert_same(found, expected)
    assert [rank["exchanges"] for rank in found] == [{6}, {6}]
    assert printed.count("  linear_attention  ") == 2


def plainly(documents, steps=3):
    """The same steps of PyTorch alone: the mean over all tokens of documents that know nothing of each other."""
    torch.manual_seed(0)
    model = TNL(TNLConfig(vocab_size=256, layers=2, width=64, heads=2, glu_width=128))
    documents = [torch.randint(256, (length,)) for length in documents]
    optimizer = torch.optim.AdamW(model.double().parameters(), lr=1e-3)
    loss = torch.zeros(())
    for _ in range(steps):
        summed = [F.cross_entropy(model(x[None])[0, :-1], x[1:], reduction="sum") for x in documents]
        loss = torch.stack(summed).sum() / sum(len(x) - 1 for x in documents)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"loss": loss.item(), "weights": model.state_dict()}


@pytest.mark.parametrize(
    ("name", "documents"), [("accumulate.py", (700, 91, 1001, 411)), ("packed.py", (700, 2, 90, 411))]
)
def test_documents_are_what_they_are_alone(name, documents, tmp_path):
    found, _ = finished(in_fp64(PROGRAMS[name]), 2, tmp_path)
    assert_same(found, plainly(documents))


def test_parts_that_no_wrapper_averages(tmp_path):
    """As the page says: without `no_sync`, and `sync_grads` once, behind the last."""
    program = in_fp64(PROGRAMS["accumulate.py"])
    [expected], _ = finished(program, 1, tmp_path / "alone")
    [wrapped] = re.findall(r"^model, optimizer = .*\n", program, flags=re.MULTILINE)
    by_hand = replaced(
        program,
        (wrapped, "optimizer = adamw(model.parameters())\n"),
        ("lasp.no_sync(model, enabled=number + 1 < len(cut))", "torch.enable_grad()"),
        ("    optimizer.step()\n", "    lasp.sync_grads(model, mesh)\n    optimizer.step()\n"),
    )
    found, _ = finished(by_hand, 4, tmp_path / "split")
    assert_same(found, expected)


# What happens to whoever does not heed them: an error, or another result.
REFUSED = [
    ("ddp.py", ("dp.size())[dp.get_local_rank()]", "env.world_size)[env.rank]"), "RankMismatchError"),
    (
        "convolution.py",
        ("self.wide(lasp.halo(y, 3, **where).mT).mT", "self.wide(nn.functional.pad(y, (0, 0, 2, 0)).mT).mT"),
        "on a slice of the sequence",
    ),
    (
        "softmax.py",
        (
            "self.mixer(q, k, v, layout=layout)",
            "nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)",
        ),
        "on a slice of the sequence",
    ),
    ("accumulate.py", ("torch.distributed.all_reduce(counted)", "pass"), "RankMismatchError"),
    ("softmax.py", ("self.positions(position_ids)", "self.positions.weight[: input_ids.shape[1]]"), "on a slice"),
]
WRONG = [
    ("packed.py", [(', local["layout"])', ")")]),
    (
        "accumulate.py",
        [("part.backward()", "(part / len(parts)).backward()"), (", total_tokens=total", "")],
    ),
    (
        "clip.py",
        [
            ("    lasp.sync_grads(model, mesh)\n", ""),
            ("    optimizer.step()\n", "    lasp.sync_grads(model, mesh)\n    optimizer.step()\n"),
        ],
    ),
]


@pytest.mark.parametrize(("name", "change", "error"), REFUSED)
def test_a_trap_that_is_an_error(name, change, error):
    for code, _, printed in run_script(replaced(PROGRAMS[name], change), 2, limit=LIMIT):
        assert code == 1
        assert error in printed


@pytest.mark.parametrize(("name", "changes"), WRONG)
def test_a_trap_that_no_error_shows(name, changes, tmp_path):
    [expected], _ = finished(in_fp64(PROGRAMS[name]), 1, tmp_path)
    found, _ = finished(in_fp64(replaced(PROGRAMS[name], *changes)), 2, tmp_path)
    for rank in found:
        assert abs(rank["loss"] - expected["loss"]) > 1e-7


def test_mixed_precision(tmp_path):
    program = PROGRAMS["bf16.py"]
    [expected], _ = finished(replaced(program, ("torch.bfloat16):", "torch.bfloat16, enabled=False):")), 1, tmp_path)
    [alone], _ = finished(program, 1, tmp_path)
    assert alone["loss"] != expected["loss"]
    found, printed = finished(program, 2, tmp_path)
    assert printed.count("in torch.float32, logits in torch.bfloat16") == 3
    page = " ".join((DOCS / "recipes.md").read_text().split())
    [policy] = re.findall(r"`mp_policy=(MixedPrecisionPolicy\([^`]*\))`", page)
    under_fsdp2 = "from torch.distributed.fsdp import MixedPrecisionPolicy\n" + replaced(
        PROGRAMS["fsdp2.py"],
        ("blocks=model.blocks", f"blocks=model.blocks, mp_policy={policy}"),
        ("(256, (4, 1001))", "(256, (2, 1001))"),
        ("    norm = ", "    assert logits.dtype == torch.bfloat16\n    norm = "),
    )
    sharded, _ = finished(under_fsdp2, 2, tmp_path)
    for rank in (alone, *found, *sharded):
        assert rank["loss"] == pytest.approx(expected["loss"], abs=2e-3)
        assert {x.dtype for x in rank["weights"].values()} == {torch.float32}


def test_it_goes_on_where_it_ended(tmp_path):
    """Interrupted in its fifth step, whose checkpoint would have been the third; then on other ranks."""
    program = in_fp64(PROGRAMS["resume.py"])
    [expected], uninterrupted = finished(program, 1, tmp_path / "alone", str(tmp_path / "never"), "6")
    runs = tmp_path / "runs"
    _, began = finished(program, 2, tmp_path / "began", str(runs), "5")
    assert began.splitlines() == uninterrupted.splitlines()[:5]
    under_zero1 = replaced(program, ('scheme="fsdp2"', 'scheme="zero1"'), (", blocks=model.blocks", ""))
    for ranks in (1, 2, 3):
        again = tmp_path / f"on{ranks}"
        shutil.copytree(runs, again)
        goes_on = under_zero1 if ranks == 2 else program
        found, printed = finished(goes_on, ranks, tmp_path / f"found{ranks}", str(again), "6")
        assert printed.splitlines() == uninterrupted.splitlines()[4:]
        assert_same(found, expected)
    (runs / "4" / ".metadata").unlink()  # a checkpoint that was not all written
    found, printed = finished(program, 2, tmp_path / "half", str(runs), "6")
    assert printed.splitlines() == uninterrupted.splitlines()[2:]
    assert_same(found, expected)


def block(language):
    [found] = re.findall(rf"```{language}\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)
    return found


@pytest.fixture(scope="module")
def direct(tmp_path_factory):
    """What resume.py prints on two ranks."""
    folder = tmp_path_factory.mktemp("direct")
    return finished(PROGRAMS["resume.py"], 2, folder, str(folder / "runs"), "4")[1]


def own_environment(folder):
    """Of a process that no launcher has started; with commands of `folder`, and python, torchrun and lasp of here."""
    found = {name: x for name, x in os.environ.items() if not name.startswith(LAUNCHER_PREFIXES)}
    programs = folder / "bin"
    programs.mkdir()
    for name, command in (("python", ""), ("torchrun", " -m torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{command} "$@"\n')
        (programs / name).chmod(0o755)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return found | {"PATH": path, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def ended(commands, folder, env):
    """Exit code, standard output and error of each of some commands at once; nothing that they have started stays."""
    options = {"cwd": folder, "env": env, "text": True, "start_new_session": True}
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) for command in commands
    ]
    try:
        printed = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return [(process.returncode, *texts) for process, texts in zip(started, printed)]


# What srun does with a command on one host: as many tasks as there are to be, which know their number.
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || failed=$?; done
exit "${failed:-0}"
"""


def test_the_script_of_slurm(direct, tmp_path):
    script = block("bash")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", script, re.MULTILINE))
    assert script.count("#SBATCH") == len(options)
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # one task a GPU
    assert "requeue" in options
    (tmp_path / "resume.sbatch").write_text(replaced(script, ("runs/mine 10000", "runs/mine 4")))
    (tmp_path / "resume.py").write_text(PROGRAMS["resume.py"])
    checks = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for check in checks:
        done = subprocess.run([*check, "resume.sbatch"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    env = own_environment(tmp_path)
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    env |= {"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    env |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "1", "MASTER_PORT": str(free_port())}
    [(code, printed, error)] = ended([["bash", "resume.sbatch"]], tmp_path, env)
    assert code == 0, error
    assert printed == direct
    assert {path.parent.name for path in tmp_path.glob("runs/mine/*/.metadata")} == {"2", "4"}


def test_the_job_of_kubernetes(direct, tmp_path):
    """What belongs together is the same, and two pods, here processes of this host, train as two ranks do."""
    yaml = pytest.importorskip("yaml", reason="the extra `transformers` brings it")
    service, job = yaml.safe_load_all(block("yaml"))
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    name, pods = job["metadata"]["name"], job["spec"]["completions"]
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (job["spec"]["completionMode"], job["spec"]["parallelism"]) == ("Indexed", pods)
    [container] = pod["containers"]
    command = container["command"]
    program = command.index("resume.py")
    assert command[0] == "torchrun"
    options = dict(x.split("=") for x in command[1:program])
    assert options["--nnodes"] == str(pods)
    assert options["--nproc-per-node"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert options["--node-rank"] == "$(JOB_COMPLETION_INDEX)"  # Kubernetes puts the pod's number there
    assert options["--master-addr"] == f"{name}-0.{pod['subdomain']}"
    assert [x["name"] for x in container["volumeMounts"]] == [x["name"] for x in pod["volumes"]]
    folder, steps = command[program + 1 :]
    assert steps == "10000"
    assert folder.startswith(f"{container['volumeMounts'][0]['mountPath']}/")
    (tmp_path / "resume.py").write_text(PROGRAMS["resume.py"])
    options |= {"--nproc-per-node": "1", "--master-addr": "127.0.0.1", "--master-port": str(free_port())}
    here = []
    for index in range(pods):
        of_pod = [f"{option}={value}" for option, value in (options | {"--node-rank": str(index)}).items()]
        here.append([command[0], *of_pod, "resume.py", f"{tmp_path}{folder}", "4"])
    found = ended(here, tmp_path, own_environment(tmp_path))
    assert [code for code, *_ in found] == [0] * pods, found
    assert [printed for _, printed, _ in found] == [direct, ""]
