"""The pages that a newcomer meets first name what there is, and their picture is the one that its script draws."""

import importlib
import re

from processes import ROOT

DOCS = ROOT / "docs"


def test_the_picture_of_the_readme(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    draw = importlib.import_module("draw_at_a_glance")
    assert draw.picture() == draw.FILE.read_text(), "python docs/draw_at_a_glance.py"
    assert "(docs/at-a-glance.svg)" in (ROOT / "README.md").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_tree_of_files_is_that_of_the_repository():
    """docs/architecture.md names every module of lasp/ and of the kernels, and none that has gone."""
    tree = re.search(r"```\n(.*?)```", (DOCS / "architecture.md").read_text(), re.DOTALL).group(1)
    named = set(re.findall(r"\b(_?\w+\.py)\b", tree))
    here = [ROOT / "lasp", ROOT / "kernels", ROOT / "examples", DOCS]
    files = {path.name for folder in here for path in folder.rglob("*.py")}
    assert named <= files
    folders = {path.parent.name for path in (ROOT / "lasp").glob("*/__init__.py")}
    assert folders <= set(re.findall(r"^ *(\w+)/ ", tree, re.MULTILINE))
    alone = {path.name for path in [*(ROOT / "lasp").glob("*.py"), *(ROOT / "kernels" / "lasp_kernels").glob("*.py")]}
    assert alone - named - {"__init__.py", "__main__.py"} == set()


def test_limits_name_tests_that_there_are():
    rows = [row for row in (DOCS / "limits.md").read_text().splitlines() if row.startswith("| ")]
    shown = [row.strip("| ").rpartition("|")[2].strip() for row in rows if "shown by" not in row]
    named = {name for cell in shown for name in cell.split(", ") if name != "-"}
    assert len(named) > 15
    assert {name for name in named if not (ROOT / "tests" / f"test_{name}.py").is_file()} == set()
