"""Numbers on the pages that users read are those of the records beside which they stand.

A sentence or a row of a table that links a record of bench/results must have its numbers from there (JSON and Markdown
of that name), as far as it shows digits; so must a table whose heading, or the sentence with a colon above it, links
one. A number with a unit must stand in a column of that unit. What a page computes from a record (a ratio, a sum) is
computed here too, in `DERIVED`; what is a setting that the record does not tell is in `SETTINGS`.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STEMS = sorted({path.stem for path in RESULTS.glob("*.*")})

NUMBER = re.compile(r"(?<![\w.,^/=+~*-])-?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(e-?\d+)?(?![\w^]|[.,]\d|-\w)")
# By what follows a number: words one of which is in the name of its column.
UNITS = {
    "%": ("%", "accuracy", "percent", "share", "idle"),
    "ms": ("ms", "us"),
    "us": ("us", "ms"),
    "MiB": ("mib", "gib", "mb", "bytes"),
    "GiB": ("gib", "mib", "memory", "bytes"),
    "tokens/s": ("tokens/s", "tokens_per_s", "tok/s"),
    "TFLOP/s": ("tflop",),
    "times": ("x ", "speed-up", " / lasp"),
}
AFTER = re.compile(r"\s?(%|ms\b|us\b|MiB\b|GiB\b|tokens/s|TFLOP/s|times)")
LISTED = re.compile(r"(?: (?:to|and|or|against)|,(?: and)?| \+) $")


@dataclass(frozen=True)
class Number:
    """As a page shows it."""

    text: str
    unit: str  # of UNITS, or ""

    @property
    def value(self) -> float:
        return float(self.text.replace(",", ""))

    @property
    def half(self) -> float:
        """How far the exact number may be off: half of the last digit shown, of which zeros at the end may be none."""
        mantissa, _, exponent = self.text.replace(",", "").partition("e")
        _, _, decimals = mantissa.partition(".")
        step = 10.0 ** -len(decimals)
        if not decimals and abs(float(mantissa)) >= 1000:
            step = 10.0 ** min(3, len(mantissa) - len(mantissa.rstrip("0")))
        return 0.5001 * step * 10.0 ** int(exponent or 0)


def numbers_of(text: str) -> list[Number]:
    """Of prose, without links' targets, code, commits, versions, and words for a size or a bound ("16 million", "below
    2e-8"); "98 to 101%" are two with a unit."""
    text = re.sub(r"\]\([^)]*\)|`[^`]*`|\b[0-9a-f]{7}\b|arXiv [\d., and]+", " ", text)
    text = re.sub(
        r"\b(?:Triton|torch|PyTorch|transformers|flash-linear-attention|CUDA|FlashQLA|frontend) \d[\d.]*", " ", text
    )
    text = re.sub(r"\b\d[\d.,]* (?:million|billion)|\bbelow \d[\d.,e-]*", " ", text)
    found: list[Number] = []
    matches = list(NUMBER.finditer(text))
    for match, following in zip(reversed(matches), [None, *reversed(matches)]):
        after = AFTER.match(text, match.end())
        between = text[match.end() : following.start()] if following else "."
        listed = found and "," not in match[0] and LISTED.fullmatch(between)
        unit = after[1] if after else found[-1].unit if listed else ""
        found.append(Number(match[0], unit))
    return found[::-1]


# ---- which record


def records_in(text: str) -> list[str]:
    """The records that a text links or names in code, by their stems."""
    names = re.findall(r"bench/results/([\w.-]+?)\.(?:md|json)\b", text)
    for code in re.findall(r"`([^`]+)`", text):
        name = re.sub(r"\.(md|json)$", "", code.strip().removeprefix("bench/results/"))
        tail = "_" + name.lstrip(".").removeprefix("_")
        fitting = [stem for stem in STEMS if stem == name or stem.endswith(tail)]
        if len(fitting) > 1 and names and name.startswith((".", "_")):  # "..._4xcuda" behind "exchange_2xcuda"
            fitting = [max(fitting, key=lambda stem: alike(stem, names[-1]))]
        names += fitting if len(fitting) == 1 and len(tail) > 6 else []
    return list(dict.fromkeys(names))


def alike(one: str, other: str) -> int:
    """How many letters two names begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class Claim:
    """A sentence or row, and the records that it must agree with."""

    page: str
    text: str
    records: tuple[str, ...]


def claims_of(page: Path) -> Iterator[Claim]:
    """All of a page."""
    above: list[str] = []
    for block in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        lines = block.strip().split("\n")
        if lines[0].startswith("|"):
            of_table = above or records_in(lines[0])
            for row in lines[2:]:
                if records := records_in(row) or of_table:
                    yield Claim(page.name, row, tuple(records))
            above = []
            continue
        for item in re.split(r"\n(?=[-*] |\d+\. )", block):
            for sentence in re.split(r"(?<=[a-z)%\d`][.:]) (?=[A-Z`*\[(])", " ".join(item.split())):
                if records := records_in(sentence):
                    yield Claim(page.name, sentence, tuple(records))
        above = records_in(block) if block.rstrip().endswith(":") else []


# ---- what a record holds


LENGTHS = ("T", "tokens", "tokens a rank", "sequence", "tokens of a sequence")


@dataclass(frozen=True)
class Held:
    """A number of a record: its column in lower case, its table, and the lengths of its row if it has one."""

    column: str
    value: float
    table: str = ""
    lengths: frozenset[float] = frozenset()


@lru_cache
def held(stem: str) -> tuple[Held, ...]:
    """All numbers of a record: of its JSON, and of its Markdown, of which tables count only where there is no JSON."""
    found: list[Held] = []

    def walk(value: object, column: str, table: str, lengths: frozenset[float]) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, str(key).lower(), table, lengths_of(value) or lengths)
                found.extend(Held("", number) for number in read(str(key)))
        elif isinstance(value, list):
            for inner in value:
                walk(inner, column, f"{table} {column}" if isinstance(inner, dict) else table, lengths)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if not column.startswith("spread"):  # of repetitions: no page tells it
                found.append(Held(column, float(value), table, lengths))
        elif isinstance(value, str):
            found.extend(Held(column, number, table, lengths) for number in read(value))

    path, text = RESULTS / f"{stem}.json", RESULTS / f"{stem}.md"
    if path.exists():
        walk(json.loads(path.read_text()), "", "", frozenset())
    columns: list[str] = []
    for line in text.read_text().split("\n") if text.exists() else []:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        columns = (columns if len(cells) == len(columns) else cells) if cells else []
        if not cells:
            found.extend(Held("", number) for number in read(line))
        elif not path.exists():
            lengths = frozenset(n for name, cell in zip(columns, cells) if name in LENGTHS for n in read(cell))
            found += [
                Held(name.lower(), n, str(columns), lengths) for name, cell in zip(columns, cells) for n in read(cell)
            ]
    return tuple(found)


def lengths_of(row: dict) -> frozenset[float]:
    """Tokens of a rank and of a sequence, if a row tells them."""
    found = {float(row[key]) for key in LENGTHS if isinstance(row.get(key), int | float)}
    if isinstance(row.get("tokens a rank"), int | float) and isinstance(row.get("ranks"), int | float):
        found.add(float(row["tokens a rank"] * row["ranks"]))
    return frozenset(found)


def read(text: str) -> list[float]:
    """All numbers of a record's text, also those in a command or a shape."""
    return [float(match[0].replace(",", "")) for match in NUMBER.finditer(re.sub(r"[x_=@%]", " ", text))]


SCALES = {"%": (1, 100), "ms": (1, 1e-3), "us": (1, 1e3), "GiB": (1, 2**-10, 2**-30), "MiB": (1, 2**10, 2**-20)}


def in_record(number: Number, stem: str, beside: frozenset[float] = frozenset()) -> bool:
    """Is it there, in a column of its unit, or can it be computed? Of a table that has rows of the lengths `beside` it
    only these count."""
    if any(abs(abs(value) - abs(number.value)) <= number.half for value in derived(stem)):
        return True
    pool = held(stem)
    narrowed = {of.table for of in pool if of.lengths & beside}
    pool = tuple(of for of in pool if of.table not in narrowed or not of.lengths or of.lengths & beside)
    words = UNITS.get(number.unit)
    if words and any(word in of.column for of in pool for word in words):
        pool = tuple(of for of in pool if of.column == "" or any(word in of.column for word in words))
    elif number.unit == "times" and stem in DERIVED:
        return False  # a ratio, and this was none of those above
    return any(
        abs(abs(of.value * scale) - abs(number.value)) <= number.half + 1e-12 * abs(of.value)
        for of in pool
        for scale in SCALES.get(number.unit, (1, 100) if of.column.endswith("accuracy") else (1,))  # of which % is said
    )


# ---- what pages compute from records

Rows = list[dict]


def both(row: dict, of: str = "") -> float:
    """Forward and backward of a row, in ms."""
    return row[f"{of}fwd ms"] + row[f"{of}bwd ms"]


def fla_families(result: dict) -> list[float]:
    """How many times as long as ours fla takes for both."""
    return [both(row, "fla ") / both(row) for row in result["rows"] if row["fla fwd ms"] and row["fla bwd ms"]]


def delta_peers(result: dict) -> list[float]:
    """Each time against ours of the same length and decay: forward, backward, both; and both in ms."""
    ours = {(row["T"], row["decay"]): row for row in result["rows"] if row["kernels"] == "triton"}
    found = []
    for row in result["rows"]:
        own = ours[row["T"], row["decay"]]
        for time in (lambda row: row["fwd ms"], lambda row: row["bwd ms"], both):
            try:
                found += [time(row) / time(own), time(own) / time(row), time(row)]
            except TypeError:  # a part that was not measured
                continue
    return found


def against_one_rank(result: dict) -> list[float]:
    """% of one rank's tokens/s with as many tokens."""
    one = {row["tokens a rank"]: row["tokens/s/GPU"] for row in result["rows"] if row["ranks"] == 1}
    return [100 * row["tokens/s/GPU"] / one[row["tokens a rank"]] for row in result["rows"] if row["ranks"] > 1]


def against_softmax(result: dict) -> list[float]:
    """How many times softmax's tokens/s, forward and backward, a fixed decay has."""
    speed = {(row["tokens"], row["attention"]): row["forward+backward tok/s"] for row in result["rows"]}
    of_softmax = {tokens: value for (tokens, kind), value in speed.items() if "log_decay" not in kind}
    return [speed[tokens, "linear, log_decay [H]"] / value for tokens, value in of_softmax.items()]


def far_answers(result: dict) -> list[float]:
    """Of the long test: how much longer it is, how many questions lie over 65,535 tokens back, and % of them right."""
    rows = result["runs"][1]["ways"]["split and streamed"]["by distance"]
    far = [row for row in rows if row["from"] >= 65536]
    questions = sum(row["questions"] for row in far)
    longer = result["runs"][1]["options"]["test_length"] / result["runs"][1]["options"]["length"]
    return [longer, questions, 100 * sum(row["questions"] * row["accuracy"] for row in far) / questions]


def step_by_class(result: dict) -> list[float]:
    """TFLOP of the products, and TFLOP/s in the time of their kernels; what a step takes beside the named classes."""
    row, classes = result["rows"][0], result["tables"]["by class, 65536 tokens"]
    [ms] = [of["ms"] for of in classes if of["class"] == "products of matrices"]
    executed = row["executed TFLOP/s"] * row["step ms"] / 1e3
    attention = 16 * 12 * 2048 * 128 * 65536 * (1 + 1 / 3) / 1e12  # of 16 layers, forward once more, by other kernels
    return [executed, 1e3 * executed / ms, executed - attention, 1e3 * (executed - attention) / ms]


def errors_in_percent(result: dict) -> list[float]:
    return [100 * value for row in result["tables"]["errors"] for value in row.values() if isinstance(value, float)]


DERIVED: dict[str, Callable[[dict], list[float]]] = {
    "2026-11-22_reference_cpu": against_softmax,
    "2026-11-26_channel_1xH200": errors_in_percent,
    "2026-11-26_families_385M_1xH200": fla_families,
    "2026-11-26_recall_2xcpu": far_answers,
    "2026-11-26_scaling_weak_1B_8xH200": against_one_rank,
    "2026-11-26_step_1B_recomputed-all": step_by_class,
    "2026-11-26_stream_1B_16M_1xH100": lambda result: [*divmod(round(result["rows"][0]["seconds"]), 60)],
    "2026-11-26_transformers_2xcuda": lambda result: [len(result["rows"])],
    "2026-11-27_delta_1xH200": delta_peers,
}
# Shapes that a script has by itself, and whatever else stands in the same sentence and is no number of the run.
SETTINGS: dict[str, tuple[float, ...]] = {
    "2026-11-26_channel_1xH200": (16,),  # heads: bench/channel.py
    "2026-11-26_families_385M_1xH200": (128,),  # K = V: the model's
    "2026-11-26_fla_2xcuda": (3,),  # ranks of tests/test_fla.py
    "2026-11-26_scan_1xH200": (2048,),  # channels: bench/scan.py
    "2026-11-26_softmax_2xcuda": (16, 4, 128),  # heads of queries and of keys, their size: bench/softmax.py
    "2026-11-26_step_1B_recomputed-all": (8192, 700, 28, 2.9, 3.0),  # matrices; watts; bytes a weight; TB/s by hand
    "2026-11-26_transformers_2xcuda": (1.5,),  # what tests/transformers_on_gpus.py allows
    "2026-11-27_delta_1xH200": (16,),  # heads: bench/delta.py
}


@lru_cache
def derived(stem: str) -> tuple[float, ...]:
    path = RESULTS / f"{stem}.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    return (*(DERIVED[stem](result) if stem in DERIVED else ()), *SETTINGS.get(stem, ()))


CLAIMS = [claim for page in PAGES for claim in claims_of(page)]


def wrong_in(claim: Claim) -> list[Number]:
    """The numbers of a claim that none of its records has."""
    numbers = numbers_of(claim.text)
    beside = frozenset(number.value for number in numbers if "," in number.text)
    if re.search(r"\bfrom [\d,]+ on\b", claim.text):  # of all lengths above
        beside = frozenset()
    return [number for number in numbers if not any(in_record(number, stem, beside) for stem in claim.records)]


@pytest.mark.parametrize("page", sorted({claim.page for claim in CLAIMS}))
def test_numbers_are_those_of_their_records(page):
    told = [
        f"{number.text}{number.unit} {claim.records}: {claim.text}"
        for claim in CLAIMS
        for number in (wrong_in(claim) if claim.page == page else ())
    ]
    assert not told, "\n".join(["not in the record beside it:", *told])


def test_pages_have_claims_and_nothing_is_listed_for_no_claim():
    """Were links written otherwise, the checker would find nothing and say nothing."""
    of_page = {
        page: sum(claim.page == page for claim in CLAIMS) for page in ("results.md", "performance.md", "families.md")
    }
    assert all(count >= 20 for count in of_page.values()), of_page
    claimed = {stem for claim in CLAIMS for stem in claim.records}
    assert {*DERIVED, *SETTINGS} <= claimed
    assert claimed <= set(STEMS), "links of no record"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("98 to 101% of it, 2,301,952 tokens", ["98%", "101%", "2,301,952"]),
        ("97%, 98% ([record](bench/results/2026-11-26_x.md))", ["97%", "98%"]),
        ("7.3 times on H100s at 2259849, TNL-1B, fla-core 0.6.0, Triton 3.6, `--tokens 4`", ["7.3times"]),
        ("within 3e-6 of fp64, 1.5 ms and 20 us", ["3e-6", "1.5ms", "20us"]),
        ("0.72 + 1.87 ms", ["0.72ms", "1.87ms"]),
    ],
)
def test_numbers_of_a_text(text, expected):
    assert [f"{number.text}{number.unit}" for number in numbers_of(text)] == expected


@pytest.mark.parametrize(
    ("number", "half"), [("98", 0.5), ("3.0", 0.05), ("86,500", 50), ("120,000", 500), ("3e-6", 5e-7), ("1.50", 5e-3)]
)
def test_rounding(number, half):
    assert Number(number, "").half == pytest.approx(half, rel=1e-3)


SENTENCE = "131,072 tokens each, forward {}%, backward {}% ([record](bench/results/2026-11-22_exchange_2xcuda.md))"
LONGEST = "2,301,952 tokens, {} tokens/s a GPU, {} GiB ([r](bench/results/2026-11-22_scaling_longest_1B_4xcuda.md))"
SPEEDS = "KDA is {} times ([record](bench/results/2026-11-27_delta_1xH200.md))"


@pytest.mark.parametrize(
    ("sentence", "right", "wrong"),
    [
        (SENTENCE, ("98", "99"), ("55", "64")),
        (LONGEST, ("55,280", "70"), ("55,290", "71")),
        (SPEEDS, ("1.4",), ("3.7",)),
    ],
)
def test_a_wrong_number_is_found(sentence, right, wrong):
    def of(numbers):
        text = sentence.format(*numbers)
        return [number.text for number in wrong_in(Claim("a page", text, tuple(records_in(text))))]

    assert of(right) == []
    assert of(wrong) == list(wrong)


def test_names_of_records():
    assert records_in("`bench/results/2026-11-22_exchange_2xcuda.md`, `..._4xcuda.md`") == [
        "2026-11-22_exchange_2xcuda",
        "2026-11-22_exchange_4xcuda",
    ]
    assert records_in("(`..._operator_scaling_4xcuda.md`, `.png`)") == ["2026-11-22_operator_scaling_4xcuda"]
    assert records_in("`kernels_headline_decay-fixed-none`") == ["2026-11-22_kernels_headline_decay-fixed-none"]
    assert records_in("`lasp.halo` and `bench/softmax.py` at `18768f7`") == []
