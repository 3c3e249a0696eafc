"""The pages of docs/ can be read by somebody who has not seen this project; what is for ourselves stands in docs/lab/.

One number a cell, the field's words, no diary, no page without end, and a record behind every number of performance.md.
"""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
LONGEST = 400  # lines of a page
LENGTHS = {"kernels.md": 200, "exchange.md": 150, "performance.md": 180, "glossary.md": 30}
LENGTHS |= {"recipes.md": 600}  # three lines in four are programs, each a whole one
PLAIN = ("exchange.md", "families.md", "glossary.md", "how-it-works.md", "kernels.md", "performance.md")
FIELD = {  # this project's words, and what readers of these pages know them as
    r"multiprocessors?": "SM",
    r"(the )?floor": "roofline",
    r"programs?": "thread block",
    r"tiles?": "chunk",
    r"boards?": "symmetric memory",
}

NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?"
MEASURED = rf"(?:{NUMBER}|-)(?: \w+)?"  # and its unit
SEVERAL = re.compile(rf"{MEASURED}(?:(?:, | / |; ){MEASURED})+")
COMMIT = re.compile(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{7}\b")
LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]*)\)")


def rows_of(text):
    """The cells of every row of a page's tables, without heads and rules."""
    rows, lines = [], re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
    for n, line in enumerate(lines):
        if not line.startswith("|") or (n + 1 < len(lines) and re.fullmatch(r"[|\s:-]+", lines[n + 1])):
            continue
        if not re.fullmatch(r"[|\s:-]+", line):
            rows.append([cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def prose_of(text):
    """A page without code, links' targets and pictures."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)\s]*\)", "]", text)


def crowded(text):
    """Cells with several numbers in a row; what begins with words may enumerate."""
    return [cell for row in rows_of(text) for cell in row if SEVERAL.fullmatch(cell)]


@pytest.mark.parametrize("page", PAGES)
def test_a_cell_holds_one_thing(page):
    assert crowded((DOCS / page).read_text()) == []


def test_what_is_no_cell_for_a_reader():
    """The cells that this is about are found, and no others."""
    head = "| a | b |\n|---|---|\n"
    cells = ("28, 16 / 26, 15", "0.120, 75", "254 / 262", "252 / -", "9.7, 9.8 GiB")
    assert [crowded(f"{head}| 8,192 | {cell} |") for cell in cells] == [[cell] for cell in cells]
    right = ("131,072", "**0.252**", "-", "fp32, bf16", "K = 64, 128", "16 heads of 128 x 128")
    assert [crowded(f"{head}| a row | {cell} |") for cell in right] == [[]] * len(right)
    assert crowded(f"{head}| 1 | 2 |\n\n```\n| 1, 2 / 3, 4 |\n```\n") == []


@pytest.mark.parametrize("page", PAGES)
def test_no_page_is_without_end(page):
    assert len((DOCS / page).read_text().splitlines()) <= LENGTHS.get(page, LONGEST)


@pytest.mark.parametrize("page", PLAIN)
def test_a_page_is_no_diary(page):
    """It says what is so; at which commit what was tried is for docs/lab/."""
    assert COMMIT.findall(prose_of((DOCS / page).read_text())) == []
    assert COMMIT.findall("(29aa4ff, one run), 1234567 tokens, defaced") == ["29aa4ff"]


@pytest.mark.parametrize("page", ["exchange.md", "kernels.md", "performance.md"])
def test_a_page_has_the_words_of_the_field(page):
    prose = prose_of((DOCS / page).read_text())
    found = {word: re.findall(rf"(?i)\b{word}\b", prose) and instead for word, instead in FIELD.items()}
    assert {word: instead for word, instead in found.items() if instead} == {}


@pytest.mark.parametrize("page", ["exchange.md", "how-it-works.md", "kernels.md"])
def test_a_picture_comes_early(page):
    text = (DOCS / page).read_text()
    [picture] = re.findall(r"^!\[.+\]\((\S+\.svg)\)$", text, re.MULTILINE)
    assert (DOCS / picture).is_file()
    assert text.index(picture) < text.index("## " if page != "how-it-works.md" else "## Three levels")


def test_the_glossary_ties_each_word_to_the_field():
    rows = rows_of((DOCS / "glossary.md").read_text())
    assert 0 < len(rows) <= 15
    assert [row for row in rows if len(row) != 3 or not all(row)] == []
    known = {row[0] for row in rows_of((DOCS / "how-it-works.md").read_text().split("## Fifteen words")[1])}
    assert len(known) == 15
    assert known & {row[0] for row in rows} == set()


def record_of(row):
    """The one record that a row links to."""
    [target] = LINK.findall(row[-1])
    return DOCS / target


def test_each_number_of_the_performance_is_in_its_record():
    """A row with a number ends with its record, in which all numbers that are a cell of it stand."""
    checked, lacking = 0, []
    for row in rows_of((DOCS / "performance.md").read_text()):
        numbers = [cell.replace(",", "") for cell in row if re.fullmatch(NUMBER, cell)]
        if not numbers:
            continue
        record = record_of(row)
        assert record.parent == DOCS / ".." / "bench" / "results"
        assert record.is_file(), row
        said = set(re.findall(r"[\d.]+(?:e[-+]?\d+)?", record.read_text().replace(",", "")))
        lacking += [(record.name, x) for x in numbers if x not in said and float(x) not in map(float_of, said)]
        checked += len(numbers)
    assert lacking == []
    assert checked > 80


def float_of(text):
    try:
        return float(text)
    except ValueError:  # the end of a sentence, or a version
        return None


def test_each_plot_of_the_performance_has_its_command_and_record():
    text = (DOCS / "performance.md").read_text()
    plots = re.findall(r"^!\[[^\]]+\]\((\S+)\.png\)\n\n(.*?)(?=^!\[|^#|^\|)", text, re.MULTILINE | re.DOTALL)
    assert len(plots) >= 4
    for plot, words in plots:
        assert (DOCS / f"{plot}.png").is_file()
        assert f"({plot}.md)" in words
        assert re.search(r"`(torchrun .* |python )bench/\w+\.py[^`]*`", words.replace("\n", " ")), plot
        assert re.search(r"^`(python|torchrun) ", (DOCS / f"{plot}.md").read_text(), re.MULTILINE), plot


def slugs_of(text):
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", *DOCS.rglob("*.md")]
    broken, counted = [], 0
    for page in pages:
        for target in LINK.findall(page.read_text()):
            file, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            found = page if not file else (page.parent / file).resolve()
            counted += 1
            if not found.exists() or (anchor and found.suffix == ".md" and anchor not in slugs_of(found.read_text())):
                broken.append((page.name, target))
    assert broken == []
    assert counted > 200


def test_pages_that_the_code_names_are_there():
    named = {}
    for folder in ("lasp", "kernels", "tests", "bench", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text()):
                named.setdefault(page, file.name)
    assert len(named) > 5
    assert {page: file for page, file in named.items() if not (ROOT / page).is_file()} == {}


def drawn(monkeypatch, name):
    """The function of bench/plots.py that draws a record, and the record."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    plots = importlib.import_module("plots")
    result = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    kind = next(kind for kind in plots.DRAWINGS if result["benchmark"].startswith(kind))
    return plots.DRAWINGS[kind](result), result


def lines_of(axes):
    return {line.get_label(): [float(y) for y in line.get_ydata()] for line in axes.lines}


def test_the_plot_of_kernels_has_what_the_record_has(monkeypatch):
    figure, result = drawn(monkeypatch, "2026-11-22_kernels_published_lengths")
    rows = [row for row in result["rows"] if row["suite"] == "published"]  # which alone has a peer
    times, roofline = figure.axes
    for what in ("lasp", "fla"):
        of = [row for row in rows if row["what"] == what]
        assert len(of) >= 5
        assert lines_of(times)[what] == pytest.approx([row["fwd ms"] + row["bwd ms"] for row in of])
        assert lines_of(roofline)[f"{what}, forward"] == [row["fwd % floor"] for row in of]
        assert lines_of(roofline)[f"{what}, backward"] == [row["bwd % floor"] for row in of]


def test_the_plot_of_the_delta_rule_has_every_peer_that_ran(monkeypatch):
    figure, result = drawn(monkeypatch, "2026-11-27_delta_1xH200")
    found = {axes.get_title(): [tick.get_text() for tick in axes.get_xticklabels()] for axes in figure.axes}
    assert found == {
        "DeltaNet": ["lasp", "fla"],
        "Gated DeltaNet": ["lasp", "fla", "flashqla"],
        "KDA": ["lasp", "fla", "cudnn"],
    }
    heights = [bar.get_y() + bar.get_height() for axes in figure.axes for bar in axes.containers[1]]
    ran = [row for row in result["rows"] if row["T"] == 131072 and row["fwd ms"]]
    assert heights == pytest.approx([row["fwd ms"] + row["bwd ms"] for row in ran])


def test_the_plot_of_many_families_over_ranks(monkeypatch):
    figure, result = drawn(monkeypatch, "2026-11-26_operator_scaling_8xH200")
    assert [axes.get_title() for axes in figure.axes] == [f"{n}K tokens on each" for n in (8, 32, 128)]
    both = [row for row in result["rows"] if (row["tokens a rank"], row["direction"]) == (131072, "both")]
    lines = lines_of(figure.axes[-1])
    for decay, name in (("fixed", "ALiBi slopes"), ("kda", "KDA")):
        assert lines[name] == [row["% of ideal"] for row in both if row["decay"] == decay]
    figure, _ = drawn(
        monkeypatch, "2026-11-22_operator_scaling_4xcuda"
    )  # of two decays: with each direction, and strong
    assert len(figure.axes) >= 3
    assert not any("on each" in axes.get_title() and "K" in axes.get_title()[:4] for axes in figure.axes)


def test_the_plot_of_peers_on_one_number_of_ranks(monkeypatch):
    figure, result = drawn(monkeypatch, "2026-11-27_operator_scaling_4xH200_peers")
    ways, delta_rules = figure.axes
    heights = {axes: [bar.get_height() for of in axes.containers for bar in of] for axes in figure.axes}
    of_peers = [row["both ms"] for row in result["tables"]["weak scaling of peers, forward and backward"]]
    assert heights[ways] == [ms for ms in of_peers if ms]
    beside = result["tables"]["the delta rule beside fla-core's context parallelism"]
    forward = {
        o: [r["ms"] for r in beside if (r["direction"], r["operator"]) == ("forward", o)] for o in ("lasp", "fla_cp")
    }
    assert heights[delta_rules] == forward["lasp"] + forward["fla_cp"]
    backward = {
        row["decay"] for row in beside if (row["direction"], row["operator"]) == ("both", "fla_cp") and row["ms"]
    }
    told = [tick.get_text() for tick in delta_rules.get_xticklabels()]
    assert [("no backward" in text) for text in told] == [
        decay not in backward for decay in ("delta", "gated_delta", "kda")
    ]


def test_the_plot_of_decoding_has_both_models(monkeypatch):
    figure, result = drawn(monkeypatch, "2026-11-27_decode_contexts")
    lines = lines_of(figure.axes[0])
    assert lines["TransNormerLLM, lasp"] == [row["tokens/s"] for row in result["tables"]["lengths"]]
    softmax = [row["tokens/s"] for row in result["rows"] if row["model"] == "softmax"]
    assert lines["softmax attention (Llama of the same size)"] == softmax
    assert len(softmax) > 5
