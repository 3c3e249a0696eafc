"""What the documentation shows runs as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT
from ranks import run_ranks

DOCS = Path(__file__).parent.parent / "docs"


def files_of(page):
    """The code blocks of a page that begin with the name of a file."""
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return dict(blocks)


def with_an_adapter(folder):
    """On two ranks: refused without the adapter, and right with it."""
    import torch

    import lasp

    sys.path.insert(0, str(folder))
    try:
        from their_library.layers import TheirAttention

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(32, 32), TheirAttention(32, 4))
        with pytest.raises(ValueError, match=r"1 \(TheirAttention\): on a slice of the sequence") as refused:
            lasp.parallelize(model, torch.distributed.group.WORLD)
        assert "rebind(module, scan=scan)  # its forward calls gated_scan, shifted" in str(refused.value)
        assert "lasp.register('their_library.layers.TheirAttention', adapter=split)" in str(refused.value)
        exec(compile((folder / "prove.py").read_text(), "prove.py", "exec"), {"__name__": "__main__"})
    finally:
        sys.path.remove(str(folder))


def test_the_page_about_adapters(tmp_path):
    files = files_of("models.md")
    assert set(files) == {"their_library/layers.py", "split_their_library.py", "prove.py"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert len(files["split_their_library.py"].strip().splitlines()) <= 20
    run_ranks(2, with_an_adapter, tmp_path)


def test_the_first_program_of_the_readme(tmp_path):
    """What a newcomer starts first, on two ranks."""
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", (DOCS.parent / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "verify_bamba.py"
    script.write_text(dict(blocks)["verify_bamba.py"])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("2 ranks compute what one does") == 1


def test_code_on_the_pages_parses():
    parsed = []
    for page in sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]):
        for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            compile(code, page.name, "exec")  # raises SyntaxError
            parsed.append(page.name)
    assert {"README.md", "models.md"} <= set(parsed)


def test_a_name_of_a_class_imports_nothing():
    code = "import sys, lasp; print({'transformers', 'fla', 'accelerate', 'torch._dynamo'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr
