"""Imports point one way, kernels know no ranks, and models know neither."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LASP, KERNELS = ROOT / "lasp", ROOT / "kernels" / "lasp_kernels"

# From the bottom to the top; a layer may import what stands on the lines before its own, and its own folder.
LAYERS = [
    {"lasp.arguments"},
    {"lasp.ranks", "lasp.decay", "lasp_kernels"},
    {"lasp.exchange", "lasp.layout", "lasp.checks"},
    {"lasp.batch", "lasp.loss"},
    {"lasp.ops"},
    {"lasp.modules"},
    {"lasp.adapters", "lasp.balance", "lasp.data_parallel", "lasp.models"},
    {"lasp.strict", "lasp.tp"},
    {"lasp.api", "lasp.calls"},
    {"lasp.verification", "lasp.streaming", "lasp.inference"},
    {"lasp.integrations"},
    {"lasp"},
    {"lasp.doctor", "lasp.verify_command"},
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
    assert list(upward_imports(bad, "lasp.ops.attention"))


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


def test_kernels_and_exchange_meet_only_in_the_operators():
    library = [path for path in files(LASP) if layer_of(module_of(path))[0] <= layer_of("lasp")[0]]
    for path in library:
        found = {layer_of(name)[1] for name in imports(path) if layer_of(name)}
        if {"lasp_kernels", "lasp.exchange"} <= found:
            assert path.parent == LASP / "ops", path


def test_operators_do_not_know_each_other():
    """What they share is in call.py. Each has a file of its own in ops/compiled, which knows that one alone."""
    operators = {"attention", "delta", "elementwise", "halo", "softmax"}
    for name in operators:
        others = {f"lasp.ops.{place}{other}" for other in operators - {name} for place in ("", "compiled.")}
        for path in (LASP / "ops" / f"{name}.py", LASP / "ops" / "compiled" / f"{name}.py"):
            for imported in imports(path):
                assert not any(imported.startswith(other) for other in others), f"{path} imports {imported}"


def test_schemes_of_data_parallelism_do_not_know_each_other():
    """A file a scheme: once.py and schemes.py, which are none, know the wrappers; legacy.py calls `sync_grads`."""
    schemes = {"co2", "ddp", "fsdp2", "legacy", "manual", "zero1"}
    for name in schemes:
        known = {"lasp.data_parallel.manual.sync_grads"} if name == "legacy" else set()
        for imported in imports(LASP / "data_parallel" / f"{name}.py"):
            assert not imported.startswith("lasp.data_parallel") or imported in known, f"{name}.py imports {imported}"


@pytest.mark.parametrize("names", [{"ring", "pipeline", "all_gather", "direct"}])
def test_schedules_are_told_apart_by_their_class_and_not_by_their_name(names):
    """Each is written once, where it is registered; what depends on it asks the class."""
    for path in files(LASP):
        texts = [
            node.value
            for comparison in ast.walk(ast.parse(path.read_text()))
            if isinstance(comparison, ast.Compare)
            for node in ast.walk(comparison)
            if isinstance(node, ast.Constant)
        ]
        found = names & {text for text in texts if isinstance(text, str)}
        assert not found or path == LASP / "api.py", f"{path} compares with {found}"


# What waits for other ranks, in torch.distributed's names and in those of collectives.py.
COLLECTIVES = re.compile(
    r"(all_)?(reduce|gather|scatter|to_all)\w*|broadcast\w*|\w*barrier|i?(send|recv)\w*|batch_isend_irecv|new_\w*group\w*"
)
OTHERS = {"gather_flat", "scatter_sum_flat", "start_all_gather", "init_device_mesh", "_flatten", "rendezvous"} | {
    "DistributedDataParallel",
    "fully_shard",
}
# Functions that are called within the waiting of another, which knows the layer.
WITHIN = {
    ("lasp/checks/messages.py", "_of_all"): "its own of_each, one for each rank",
    ("lasp/exchange/board.py", "_OnGpu"): "board_of and Turn.meet",
    ("lasp/exchange/board.py", "_InFile"): "board_of and Turn.meet",
    ("lasp/exchange/cost.py", "measure"): "exchange._measure",
    ("lasp/exchange/cost.py", "_seconds_on_cpu"): "measure",
    ("lasp/exchange/cost.py", "_seconds_on_gpu"): "measure",
    ("lasp/exchange/cost.py", "_pass_along"): "measure",
    ("lasp/exchange/cost.py", "_gather"): "measure",
    ("lasp/ranks/collectives.py", "start_all_gather"): "its callers, which are looked at, too",
    ("lasp/ranks/collectives.py", "texts_of_all"): "gather_texts, and what calls board_of",
}


def unguarded(path):
    """Calls of collectives outside of a `with waiting(...)`, with the function or class at the top that they are in."""

    def walk(node, inside):
        if isinstance(node, ast.With):
            parts = [part for x in node.items for part in ast.walk(x.context_expr)]  # one may have a condition
            called = [part.func for part in parts if isinstance(part, ast.Call)]
            inside |= any(isinstance(f, ast.Name) and f.id in ("waiting", "making_groups") for f in called)
        if isinstance(node, ast.Call) and not inside:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            of_dist = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "dist"
            if called in OTHERS or (of_dist and COLLECTIVES.fullmatch(called)):
                yield called
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    for top in ast.parse(path.read_text()).body:
        yield from ((getattr(top, "name", ""), called) for called in walk(top, False))


def test_every_collective_stands_inside_a_waiting_that_names_it():
    """Else a rank that ended or hangs is an error of the backend's, which names neither layer nor phase nor peer."""
    found = {
        (str(path.relative_to(ROOT)), top, called)
        for path in files(LASP)
        for top, called in unguarded(path)
        if path != LASP / "ranks" / "launchers.py"  # where ranks meet at first, which has errors of its own
    }
    assert {entry for entry in found if entry[:2] not in WITHIN} == set()
    assert {entry[:2] for entry in found} == set(WITHIN), "an entry of WITHIN is not needed"


def test_nothing_that_another_rank_sends_is_unpickled():
    """To unpickle is to run what is sent: whoever reaches a port of one rank would reach all of them."""
    unpickles = re.compile(r"\w*(gather|broadcast|scatter|send|recv)_object\w*|\bc?pickle\b")
    for path in [*files(LASP), *files(ROOT / "examples")]:
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(path.read_text()))}
        assert not {name for name in names if unpickles.fullmatch(name)}, path


@pytest.mark.parametrize(
    "line", ["dist.all_reduce(x)", "dist.barrier()", "x = lambda: dist.irecv(x)", "fully_shard(m)"]
)
def test_a_collective_without_waiting_is_seen(tmp_path, line):
    bad = tmp_path / "bad.py"
    bad.write_text(f"def f():\n    {line}\n\n\ndef g():\n    with waiting('it'):\n        {line}\n")
    assert [top for top, _ in unguarded(bad)] == ["f"]


def starts_elsewhere(tree):
    """Lines on which a kernel is started, kernel[grid](...), outside of `with torch.cuda.device_of(x)`."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any("torch.cuda.device" in ast.unparse(item) for item in node.items):
            inside |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and id(node) not in inside:
            yield node.lineno, ast.unparse(node.func.value)


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda path: path.name)
def test_kernels_start_on_the_device_of_their_tensors(path):
    """Triton starts them on the current device: of a model on another one, beside whatever wrote their inputs."""
    found = [at for at in starts_elsewhere(ast.parse(path.read_text())) if at[1].endswith("kernel")]
    assert found == [] or path.name == "launch.py", found  # Launch sees to it by itself


def test_a_start_elsewhere_is_found():
    code = "with torch.cuda.device_of(x):\n    a_kernel[(1,)](x)\nb_kernel[grid](x)"
    assert list(starts_elsewhere(ast.parse(code))) == [(3, "b_kernel")]


def marked_in_vain(code):
    """Names that have a mark of pytest and are no tests: there it does nothing, and nobody says so."""
    for node in ast.walk(ast.parse(code)):
        decorators = [ast.unparse(x) for x in getattr(node, "decorator_list", [])]
        if any(x.startswith("pytest.mark.") for x in decorators) and not node.name.lower().startswith("test"):
            yield node.name


def test_marks_stand_on_tests():
    mark = "@pytest.mark.skip\n"
    assert list(marked_in_vain(f"{mark}def _worker(): ...\n{mark}def test_it(): ...")) == ["_worker"]
    found = {path.name: names for path in files(ROOT / "tests") if (names := list(marked_in_vain(path.read_text())))}
    assert not found
