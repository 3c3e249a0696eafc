"""The reference (docs/build_site.py) has every public name, and each of them says what it takes, gives and raises."""

import importlib
import importlib.util
import inspect
import re
import types
from pathlib import Path

import pytest

import lasp
from lasp import modules

FILE = Path(__file__).parent.parent / "docs" / "build_site.py"
# Which look at no argument: what lasp itself makes, and helpers of adapters that take what they are given.
RAISES_NOTHING = {
    "lasp.Env",
    "lasp.InferenceState",
    "lasp.adapters.is_function",
    "lasp.adapters.linear",
    "lasp.adapters.names_in",
    "lasp.adapters.token_local",
    "lasp.modules.Counted",
}
PACKAGES = ("adapters", "data_parallel", "decay", "integrations", "models")  # public names of theirs are in `__all__`


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("build_site", FILE)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def public_names():
    """Of lasp, with those of its modules in place of the modules."""
    names = {f"lasp.{name}" for name in lasp.__all__} - {f"lasp.{name}" for name in (*PACKAGES, "modules")}
    for package in PACKAGES:
        found = importlib.import_module(f"lasp.{package}")
        names |= {f"lasp.{package}.{name}" for name in found.__all__}
    own = [name for name, x in vars(modules).items() if getattr(x, "__module__", "") == modules.__name__]
    return names | {f"lasp.modules.{name}" for name in own if not name.startswith("_")}


def looked_up(name):
    found = lasp
    for part in name.split(".")[1:]:
        if isinstance(found, types.ModuleType) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def reference(site):
    return [f"lasp.{name}" for _, _, names in site.API.values() for name in names.split()]


def test_every_public_name_is_in_the_reference(site):
    pages = {name: site.page_of(name) for name in public_names()}
    assert [name for name, page in pages.items() if page is None] == []
    named = reference(site)
    assert len(named) == len(set(named))
    for name in named:
        assert looked_up(name) is not None, name


def test_the_navigation_has_every_page(site):
    listed = set(re.findall(r'"([\w/-]+\.md)"', (FILE.parent.parent / "zensical.toml").read_text()))
    docs = {str(page.relative_to(FILE.parent)) for page in FILE.parent.rglob("*.md")}
    assert listed == {"index.md", "CONTRIBUTING.md", "api/index.md", *docs, *(f"api/{file}.md" for file in site.API)}


def test_every_file_that_a_page_links_to_is_there(site, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "PAGES", tmp_path)
    site.Pages().write()  # ends at a link to nothing
    home = (tmp_path / "index.md").read_text()
    assert "](bench/results/" in home
    assert "](docs/" not in home
    assert "](../bench/" not in (tmp_path / "exchange.md").read_text()
    assert (tmp_path / "examples" / "minimal.py.md").exists()
    broken = site.Pages()
    with pytest.raises(SystemExit, match=r"docs/exchange\.md: a link to nothing\.md"):
        broken.of_site("docs/exchange.md", "[x](nothing.md)")
    text = "`lasp.CO2` and\n```\n[y](nothing.md) `lasp.CO2`\n```\n"
    expected = "[`lasp.CO2`](api/parallel.md#lasp.CO2) and\n```\n[y](nothing.md) `lasp.CO2`\n```\n"
    assert broken.of_site("docs/exchange.md", text) == expected


def arguments_of(found):
    """Names of what it takes; none of what only has those of nn.Module, and of errors."""
    if inspect.isclass(found) and issubclass(found, Exception):
        return []
    if inspect.isclass(found) and issubclass(found, lasp.modules.nn.Module) and "__init__" not in vars(found):
        return []
    return [p.name for p in inspect.signature(found).parameters.values() if p.name != "self"]


def test_each_says_what_it_takes_gives_and_raises(site):
    lacking = {}
    for name in reference(site):
        found = looked_up(name)
        text = inspect.getdoc(found) or ""
        wrong = [] if len(text) > 20 else ["a docstring"]
        if callable(found) and not isinstance(found, types.ModuleType):
            arguments = arguments_of(found)
            wrong += [x for x in arguments if not re.search(rf"^    {x}: \S", text, re.MULTILINE)]
            gives = None if inspect.isclass(found) else inspect.signature(found).return_annotation
            if gives not in (None, "None", "Iterator[None]") and "\nReturns:\n" not in text:
                wrong.append("Returns")
            if arguments and name not in RAISES_NOTHING and "\nRaises:\n" not in text:
                wrong.append("Raises")
        if wrong:
            lacking[name] = wrong
    assert lacking == {}
