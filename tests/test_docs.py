"""What the documentation shows runs as it stands there."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT
from ranks import run_ranks
from scripts import run_script

DOCS = Path(__file__).parent.parent / "docs"


def files_of(page):
    """The code blocks of a page that begin with the name of a file."""
    text = (ROOT / page if page == "README.md" else DOCS / page).read_text()
    return dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", text, re.DOTALL))


def printed_file(message):
    """The file that a refusal prints."""
    return re.search(r"^import .*?^lasp\.register\(.*?\)$", message, re.DOTALL | re.MULTILINE).group()


def filled_in(text, **bodies):
    for name, body in bodies.items():
        text, count = re.subn(rf'raise NotImplementedError\("[^"]*\b{name}\b[^"]*"\)', body, text)
        assert count == 1
    return text


def with_an_adapter(folder):
    """On two ranks: refused without the adapter, and right with it, that of the page and the one that is printed."""
    import torch

    import lasp

    def prove(text):
        program = (folder / "prove.py").read_text().replace("import split_their_library\n", f"{text}\n")
        exec(compile(program, "prove.py", "exec"), {"__name__": "__main__"})

    sys.path.insert(0, str(folder))
    try:
        from their_library.layers import TheirAttention

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 32), TheirAttention(32, 4))
        with pytest.raises(ValueError, match=r"1 \(TheirAttention\): on a slice of the sequence") as refused:
            lasp.parallelize(model, torch.distributed.group.WORLD)
        printed = printed_file(str(refused.value))
        assert "def gated_scan(q, k, v, gate):" in printed
        assert "TheirAttention.forward(self, x) calls these" in printed
        with pytest.raises(NotImplementedError, match="shifted: TheirAttention"):
            prove(printed)
        options = "layout=layout_of(sequence), sequence=sequence"
        prove(
            filled_in(
                printed,
                shifted=f"return lasp.halo(x, 2, {options})[:, :-1]",
                gated_scan=f"return lasp.linear_attention(q, k, v, log_decay=gate.float(), {options})[0]",
            )
        )
        prove((folder / "split_their_library.py").read_text())
    finally:
        sys.path.remove(str(folder))
        lasp.adapters._BY_NAME.pop("their_library.layers.TheirAttention", None)


def test_the_page_about_adapters(tmp_path):
    files = files_of("models.md")
    for name in ("verify_bamba.py", "own_layers.py"):  # below
        files.pop(name)
    assert set(files) == {"their_library/layers.py", "split_their_library.py", "prove.py"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert len(files["split_their_library.py"].strip().splitlines()) <= 20
    run_ranks(2, with_an_adapter, tmp_path)


@pytest.mark.timeout(300)  # of a loaded machine, on which each rank imports all this
@pytest.mark.parametrize(
    ("page", "name"),
    [("README.md", "train_mine.py"), ("guide.md", "positions.py"), ("models.md", "verify_bamba.py")],
)
def test_the_first_programs(tmp_path, page, name):
    """What a newcomer starts first, on two ranks, as he does it."""
    (tmp_path / name).write_text(files_of(page)[name])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("2 ranks compute what one does") == 1
    losses = [float(x) for x in re.findall(r"^step \d+: loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == (0 if name == "verify_bamba.py" else 4)
    if losses:
        assert losses[0] > 2.5  # log(16) is 2.77
        assert losses[-1] < 0.1


def with_own_layers(text):
    """On two ranks: the layer of the page is what stood there before, on one rank and on both."""
    import torch
    import torch.nn.functional as F

    import lasp

    names = {"__name__": "own_layers"}
    exec(compile(text, "own_layers.py", "exec"), names)
    torch.manual_seed(0)
    layer = names["ConvAndSoftmax"](16, 4).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    y = layer.conv(F.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)
    q, k, v = layer.qkv(y).unflatten(-1, (3, 4, -1)).unbind(2)
    o = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True).transpose(1, 2)
    expected = layer.out(o.flatten(2))
    torch.testing.assert_close(layer(x), expected)

    mesh = lasp.init_mesh(sp=2)
    model = torch.nn.Sequential(torch.nn.Embedding(16, 16), layer, torch.nn.Linear(16, 16)).double()
    assert lasp.verify(lasp.parallelize(model, mesh["sp"]), mesh).ok
    mine = x.tensor_split([4], 1)[torch.distributed.get_rank()]
    torch.testing.assert_close(layer(mine), expected.tensor_split([4], 1)[torch.distributed.get_rank()])


def test_layers_of_your_own():
    run_ranks(2, with_own_layers, files_of("models.md")["own_layers.py"])


@pytest.mark.timeout(300)
def test_the_program_with_a_trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (exit_code, printed, error), _ = run_script(files_of("trainer.md")["with_trainer.py"], 2, limit=280.0)
    assert exit_code == 0, error
    losses = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", printed)]
    assert len(losses) >= 3
    assert all(5.5 < loss < 7.5 for loss in losses)  # log(512) is 6.24
    for layer in ("linear_attention", "halo", "softmax_attention"):
        assert printed.count(f"  {layer} ") == 1


def test_code_on_the_pages_parses():
    parsed = []
    for page in sorted([*DOCS.rglob("*.md"), DOCS.parent / "README.md"]):
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            compile(code, page.name, "exec")  # raises SyntaxError
            parsed.append(page.name)
    assert {"README.md", "models.md"} <= set(parsed)


def test_a_name_of_a_class_imports_nothing():
    code = "import sys, lasp; print({'transformers', 'fla', 'accelerate', 'torch._dynamo'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def under_each_scheme(text):
    """The function of the page; it gives the same losses under each."""
    import torch

    import lasp
    from lasp.data_parallel.schemes import SCHEMES
    from lasp.models import TNL, TNLConfig

    names = {}
    exec(compile(text, "training.py", "exec"), names)
    mesh = lasp.init_mesh(dp_replicate=2, sp=2)
    draw = torch.Generator().manual_seed(mesh["dp_replicate"].get_local_rank())
    batches = torch.randint(17, (2, 4, 13), generator=draw)
    found = {}
    for scheme in SCHEMES:
        torch.manual_seed(0)
        model = TNL(TNLConfig(vocab_size=17, layers=2, width=8, heads=2, glu_width=12))
        found[scheme], _ = names["train"](model, mesh, scheme, batches, 2)
    for scheme, losses in found.items():
        assert losses == pytest.approx(found["ddp"], rel=1e-5), scheme
    assert len(set(found["ddp"])) == 4


def test_the_page_about_data_parallelism():
    run_ranks(4, under_each_scheme, files_of("data_parallel.md")["training.py"])


def test_how_it_works_on_four_pretend_ranks():
    """The listing compares itself with autograd; its tensors are those of the operator, too."""
    import torch

    import lasp

    text = files_of("how-it-works.md")["four_ranks.py"]
    assert len(text.splitlines()) < 60  # with its name
    found = {}
    exec(compile(text, "four_ranks.py", "exec"), found)
    assert len(found["ranks"]) == 4
    assert 0 in found["lengths"]
    inputs = [found[name][None, :, None].requires_grad_() for name in ("q", "k", "v", "log_decay")]
    o, state = lasp.linear_attention(*inputs[:3], log_decay=inputs[3], output_final_state=True)
    torch.testing.assert_close(torch.cat(found["o"]), o[0, :, 0])
    torch.testing.assert_close(found["E"][-1], state[0, 0])
    expected = torch.autograd.grad(o, inputs, found["do"][None, :, None])
    for ours, theirs in zip(zip(*found["grads"]), expected):
        torch.testing.assert_close(torch.cat(ours), theirs[0, :, 0])


@pytest.fixture
def drawing(monkeypatch):
    """A script of docs/ that draws a picture, by its name; what it draws is what lies there."""
    monkeypatch.syspath_prepend(str(DOCS))

    def script(name):
        draw = importlib.import_module(name)
        assert draw.picture() == draw.FILE.read_text(), f"python docs/{name}.py"
        return draw

    return script


def test_how_it_works_says_what_the_code_does(drawing):
    """The picture is the one that the script draws from the plan; the page has its numbers, and fifteen words."""
    draw = drawing("draw_how_it_works")
    page = (DOCS / "how-it-works.md").read_text()
    said = " ".join(page.split())
    assert f"| tile | {draw.PLAN.walk_tile} tokens |" in page
    assert f"{draw.SHARD:,} tokens a rank" in said
    assert draw.HEADS * draw.CHANNELS**2 * 4 == 2**20
    assert f"{draw.HEADS} heads of {draw.CHANNELS} x {draw.CHANNELS} it is 1 MiB" in said
    words = page.split("## Fifteen words")[1]
    assert len(re.findall(r"^\| \*\*", words, re.MULTILINE)) == 15


def test_the_page_about_kernels_says_what_the_code_does(drawing):
    """Its picture is drawn from the plan, and the numbers of the text are the plan's; its files are there."""
    from lasp_kernels import plan

    draw = drawing("draw_kernels")
    page = (DOCS / "kernels.md").read_text()
    said = " ".join(page.split())
    walk = plan.config_of("walk", draw.CHANNELS, 2)
    assert f"{walk.tile} tokens, {walk.columns} columns of S, {walk.warps} warps, {walk.stages} stages." in said
    assert f"fp32** inputs have chunks of {plan.config_of('walk', draw.CHANNELS, 4).tile}" in said
    wide = plan.config_of("walk", plan.MAX_DIM, 2)
    assert f"**K above 128**: {wide.columns} columns, {wide.stages} stages" in said
    assert plan.config_of("row-sum walk", draw.CHANNELS, 2).stages == 2  # two blocks with two stages
    assert f"{draw.KEPT} MiB for the call of the picture" in said
    chunks = draw.SHARD // walk.tile * draw.HEADS * draw.CHANNELS**2 * 4
    assert f"The states of all chunks would be {chunks // 2**30} GiB there" in said
    assert 4 * draw.CHANNELS**2 == 4 * walk.tile * draw.CHANNELS * 2 == 64 * 2**10  # a state; q, k, v, o of a chunk
    assert f"K and V to {plan.MAX_DIM}" in said
    kernels = ROOT / "kernels" / "lasp_kernels"
    named = set(re.findall(r"`(\w+\.py)`", page))
    assert len(named) > 25
    assert {name for name in named if not (kernels / name).is_file()} == set()
    source = "".join(file.read_text() for file in kernels.glob("*.py"))
    named = set(re.findall(r"`(\w+_kernel)`", page))
    assert {name for name in named if f"def {name}(" not in source} == set()
    for command in re.findall(r"^(?:pytest|python) .*$", page, re.MULTILINE):
        files = re.findall(r"\S+\.py", command)
        assert files
        assert all((ROOT / file).is_file() for file in files)


def test_the_page_about_the_exchange_says_what_the_code_does(drawing):
    """Its picture and its times are those of the schedules' own formulas; it has each of them."""
    from lasp.exchange.cost import choose

    draw = drawing("draw_exchange")
    page = (DOCS / "exchange.md").read_text()
    for name, schedule in draw.SCHEDULES.items():
        assert f'| `"{name}"` |' in page
        total = schedule.seconds(draw.SIZES, draw.RANKS, draw.NETWORK)
        assert max(end for _, _, end, _ in draw.hops(schedule)) == pytest.approx(total)
    mib = draw.Sizes(state=2**20, gathered=2**20, read=2**20, columns=128)
    times = {n: f"{1e6 * x.seconds(mib, draw.RANKS, draw.NETWORK):.0f}" for n, x in draw.SCHEDULES.items()}
    said = " ".join(page.split())
    assert f"`all_gather` {times['all_gather']} us, `direct` {times['direct']}, `ring` {times['ring']}" in said
    assert times["pipeline"] == times["ring"]  # which cuts nothing
    assert '`"auto"` takes `direct` here for both sizes' in said
    chosen = [choose(None, sizes, draw.RANKS, draw.NETWORK).schedule.name for sizes in (mib, draw.SIZES)]
    assert chosen == ["direct", "direct"]
