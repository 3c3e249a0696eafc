"""Imports point one way, kernels know no ranks, and models know neither."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LASP, KERNELS = ROOT / "lasp", ROOT / "kernels" / "lasp_kernels"

# From the bottom to the top; a layer may import what stands on the lines before its own, and its own folder.
LAYERS = [
    {"lasp.collectives"},
    {"lasp.mesh", "lasp.decay", "lasp.recompute", "lasp.optimizers"},
    {"lasp.exchange", "lasp.data", "lasp.agreement", "lasp.finite", "lasp_kernels"},
    {"lasp.shard", "lasp.loss"},
    {"lasp.attention"},
    {"lasp.modules", "lasp.compiled"},
    {"lasp.adapters", "lasp.data_parallel", "lasp.models"},
    {"lasp.api"},
    {"lasp"},
    {"lasp.doctor"},
    {"lasp.__main__"},
]


def files(folder):
    return sorted(folder.rglob("*.py"))


def imports(path):
    """Every name that a file imports, at the top or in a function, with its module: `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name):
    """The layer of what is imported and the entry that says so; None if it is not ours."""
    parts = name.split(".")
    for entry in (".".join(parts[:2]), parts[0]):
        for number, layer in enumerate(LAYERS):
            if entry in layer:
                return number, entry
    return None


def upward_imports(path, own):
    """What a file of the module `own` must not import."""
    own_number, own_entry = layer_of(own)
    for name in imports(path):
        if (found := layer_of(name)) is not None:
            number, entry = found
            if entry != own_entry and number >= own_number:
                yield name


def module_of(path):
    folder = path.parent if path.name == "__init__.py" else path.with_suffix("")
    return ".".join(folder.relative_to(ROOT).parts)


@pytest.mark.parametrize("path", files(LASP), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    own = module_of(path)
    assert own == "lasp" or layer_of(own)[1] != "lasp", f"{own} is in no layer of this test: add it where it belongs"
    assert not list(upward_imports(path, own))


@pytest.mark.parametrize(
    "line", ["from lasp import api", "import lasp", "from lasp import parallelize", "import lasp.api"]
)
def test_an_import_that_points_upwards_is_seen(tmp_path, line):
    bad = tmp_path / "bad.py"
    bad.write_text(f"def f():\n    {line}\n")
    assert list(upward_imports(bad, "lasp.attention"))


def test_kernels_know_neither_ranks_nor_lasp():
    for path in files(KERNELS):
        for module in imports(path):
            assert not module.startswith("torch.distributed"), f"{path.name} imports {module}"
            assert module.split(".")[0] != "lasp", f"{path.name} imports {module}"


def names(path):
    """The identifiers of a file's code; words in texts do not count."""
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


@pytest.mark.parametrize("folder", [LASP / "models", KERNELS], ids=lambda folder: folder.name)
def test_models_and_kernels_mention_no_rank(folder):
    for path in files(folder):
        found = [
            n for n in names(path) if re.search(r"(^|_)(ranks?|world_size|dist|process_group|mesh)($|_)|^group$", n)
        ]
        assert not found, f"{path.name} mentions {found}"


def test_the_folder_of_the_kernels_is_no_package():
    """A package named `kernels` would shadow Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_kernels_and_exchange_meet_only_in_the_operator():
    library = [path for path in files(LASP) if layer_of(module_of(path))[0] <= layer_of("lasp")[0]]
    for path in library:
        found = {layer_of(name)[1] for name in imports(path) if layer_of(name)}
        assert ({"lasp_kernels", "lasp.exchange"} <= found) == (path == LASP / "attention.py"), path
