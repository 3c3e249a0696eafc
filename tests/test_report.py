"""The page of a run and the pictures: what they show, what they say is missing, and that names cover nothing."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ranks import run_ranks

BENCH = Path(__file__).parent.parent / "bench"
sys.path.append(str(BENCH))

import html_report  # noqa: E402
import plots  # noqa: E402

RESULTS = BENCH / "results"
DATA = "data:image/svg+xml;base64,"


class Page(HTMLParser):
    """The pictures of a page by their captions, its tags and where they point."""

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.points_to, self.text = [], {}, [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.said = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        of = dict(attrs)
        self.points_to += [of[name] for name in ("src", "href", "action") if name in of]
        if tag == "img":
            self.pictures[of["alt"]] = base64.b64decode(of["src"].removeprefix(DATA)).decode()
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, words):
        [found] = [svg for caption, svg in self.pictures.items() if words in caption]
        return found


def page_of(folder, *arguments):
    target = folder / "report.html"
    html_report.main([*map(str, arguments), "--out", str(target)])
    text = target.read_text()
    page = Page(text)
    assert all(place.startswith(DATA) for place in page.points_to)  # no file and no network
    assert not re.search(r"url\(|@import|<script|<link", text)
    return page


def words_of(svg):
    """What letters a picture has: matplotlib tells each text in a comment."""
    return re.findall(r"<!-- (.*?) -->", svg)


def test_a_page_of_a_record(tmp_path):
    record = RESULTS / "2026-11-22_scaling_weak_1B_2xcuda.json"
    page, result = page_of(tmp_path, record), json.loads(record.read_text())
    for value in (result["command"], *result["environment"].values()):
        assert value in page.said
    assert {"1 rank", "2 ranks, one sequence", "tokens/s/GPU"} <= set(words_of(page.of("over the length (sequence)")))
    peaks = [row["peak GiB"] for row in result["rows"]]
    assert {f"{peak:.3g}" for peak in peaks} <= {word.strip() for word in words_of(page.of("fullest rank"))}
    split = [row for row in result["rows"] if row["exchange costs ms"] is not None]
    said = words_of(page.of("NCCL's kernels ran"))
    for row in split:
        assert f"{row['exchange costs ms']:.3g}  more than without" in said
        assert f"{row['exposed NCCL ms']:.3g}  only NCCL, rank 0" in said
    assert "memory by rank: this record holds that of the fullest rank only" in page.said
    assert "loss by step: a benchmark's record holds none" in page.said
    assert "where it comes from" not in page.said


def test_memory_and_exposed_time_of_each_rank_are_drawn(tmp_path):
    result = json.loads((RESULTS / "2026-11-22_scaling_weak_1B_2xcuda.json").read_text())
    for row in result["rows"]:
        row["peak GiB by rank"], row["exposed NCCL ms by rank"] = [11.25, 12.5], [1.25, 7.5]
    (tmp_path / "record.json").write_text(json.dumps(result))
    page = page_of(tmp_path, tmp_path / "record.json")
    assert {"11.2  rank 0", "12.5  rank 1"} <= set(words_of(page.of("tensors of a rank")))
    assert {"1.25  only NCCL, rank 0", "7.5  only NCCL, rank 1"} <= set(words_of(page.of("NCCL's kernels ran")))
    assert "by rank: this record" not in page.said


def test_a_page_of_a_training(tmp_path):
    steps = [{"step": n, "loss": 5.0 - n, "tokens_per_s_per_rank": 100.0, "peak_memory_bytes": 2**30} for n in range(4)]
    lines = [json.dumps(step) for step in steps] + ['{"step": 4, "lo']  # cut off
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "run.json").write_text(json.dumps({"options": {"lr": 0.5}, "torch": "2.13.0+cpu", "ranks": 2}))
    page = page_of(tmp_path, "--metrics", tmp_path / "metrics.jsonl")
    assert len(page.pictures) == 3
    assert "loss, nats" in words_of(page.of("Loss of each step"))
    assert "tokens/s/rank" in words_of(page.of("Tokens a second"))
    assert "2.13.0+cpu" in page.said
    for lack in ("no command, no commit", "memory by rank: metrics.jsonl holds", "exposed communication: a training"):
        assert lack in page.said
    assert "steps, 4 rows" in page.said


def test_a_page_of_a_trace(tmp_path):
    page = page_of(tmp_path, BENCH.parent / "docs" / "overlap_fixed.json")
    assert {"2.78", "1.89"} <= {word.strip() for word in words_of(page.of("Microseconds in which"))}
    assert "rank 1: exchange" in words_of(page.of("Every kernel"))
    assert "memory by rank: this trace is older than its measurement" in page.said


SLOW = ("simulation", "operator_scaling", "published")  # their own pictures, which test_bench.py has drawn, too


def test_every_record_has_a_page(tmp_path):
    page = page_of(tmp_path, *[path for path in RESULTS.glob("*.json") if not any(name in path.name for name in SLOW)])
    assert page.said.count("Not in this record") > 30


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json: Expecting"),
        ("a.json", "[1]", "a.json: expected a JSON object, got list"),
        ("a.json", "{}", "a.json: no record of a benchmark: it has no 'benchmark'"),
        ("a.json", '{"benchmark": "x", "rows": [{"tokens": NaN}]}', "a.json: a number is NaN"),
        ("a.json", '{"benchmark": "x", "environment": null}', "a.json: 'environment' must be an object, got NoneType"),
        ("a.json", '{"benchmark": "x", "facts": [1]}', "a.json: 'facts' must be an object, got list"),
        ("a.json", '{"benchmark": "x", "tables": [1]}', "a.json: 'tables' must be an object, got list"),
        ("a.json", '{"benchmark": "x", "rows": [3]}', r"a.json: 'rows' must be a list of objects, got \[3\]"),
        ("a.json", '{"benchmark": "x", "tables": {"t": 3}}', "a.json: the table 't' must be a list of objects, got 3"),
        (
            "a.json",
            '{"benchmark": "x", "rows": [{"peak GiB by rank": 3}]}',
            "a.json: 'peak GiB by rank' must be a list, a number a rank, got 3",
        ),
        (
            "a.json",
            '{"benchmark": "x", "rows": [{"exposed NCCL ms": 1.0}, {"exposed NCCL ms": {"a": 1}}]}',
            "a.json: something in it is not what a run writes: TypeError: ",
        ),
        (
            "a.json",
            '{"benchmark": "x", "rows": [{"layout": "", "ranks": 2, "tokens": 1, "tokens/s": 1}, '
            '{"layout": "a", "ranks": 2, "tokens": 1, "tokens/s": 1}]}',
            "a.json: something in it is not what a run writes: ValueError: ",
        ),
        ("m.jsonl", '{"step": 1, "loss": -Infinity}\n', r"line 1 of .*m.jsonl: a number is -Infinity"),
        ("m.jsonl", '{"step": 1}\n', r"line 1 of .*m.jsonl: no step and loss in it"),
        ("m.jsonl", '{"step": 1, "loss": 2}\nx\n', r"line 2 of .*m.jsonl: Expecting"),
        ("m.jsonl", "", "m.jsonl: no step in it"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    arguments = [str(tmp_path / name)] if name == "a.json" else ["--metrics", str(tmp_path / name)]
    with pytest.raises(SystemExit, match=message):
        html_report.main([*arguments, "--out", str(tmp_path / "report.html")])
    with pytest.raises(SystemExit, match=r"missing\.json: "):
        html_report.main([str(tmp_path / "missing.json")])
    assert not (tmp_path / "report.html").exists()


def test_nothing_to_show_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        html_report.main([])
    assert "expected a record or --metrics, got neither" in capsys.readouterr().err


# ---- what scaling.py measures of each rank


def _of_each_rank():
    import scaling
    import torch.distributed as dist

    rank = dist.get_rank()
    return scaling.by_rank(10.0 + rank), scaling.by_rank(None), scaling.by_rank(None if rank else 1.0)


def test_numbers_of_each_rank():
    assert run_ranks(2, _of_each_rank) == [([10.0, 11.0], None, None)] * 2


def test_numbers_of_ranks_keep_four_digits():
    import scaling

    assert scaling.four_digits([22.71828, 3]) == [22.72, 3]


def test_exposed_time_of_a_trace():
    """An exchange from 10 to 30 beside a kernel from 0 to 15 and one from 25 to 26: 14 us alone."""
    import overlap

    kernels = [
        {"kernel": "forward_walk_kernel", "start": 0, "us": 15},
        {"kernel": "nccl", "start": 10, "us": 10},
        {"kernel": "barrier_kernel", "start": 20, "us": 10},
        {"kernel": "other", "start": 25, "us": 1},
    ]
    record = overlap.record("what", "torchrun bench/overlap.py", [(kernels, 2.26), (kernels[:1], 3.0)])
    assert record["exposed exchange us by rank"] == [14, 0]
    assert record["peak MiB by rank"] == [2.3, 3.0]
    assert record["ranks"] == [kernels, kernels[:1]]
    assert {"torch", "commit", "device"} <= record["environment"].keys()


# ---- pictures


def test_names_beside_lines_cover_no_line_and_no_name():
    figure = plots.sheet(figsize=(6, 4))
    axes = figure.subplots()
    lines = [[1, 2, 3], [1.02, 2.02, 3.02], [3, 2, 1], [2, 2, 2]]
    for number, line in enumerate(lines):
        axes.plot([1, 2, 4], line, label=f"name {number}")
    axes.plot([1, 2, 4], [0, 0, 0], label="_")
    plots.label_lines(axes)
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
    assert set(boxes) == {f"name {number}" for number in range(4)}
    assert all(text.get_color() == line.get_color() for text, line in zip(axes.texts, axes.lines))
    for name, box in boxes.items():
        assert not any(box.overlaps(other) for of, other in boxes.items() if of != name)
        assert not any(
            line.get_path().transformed(line.get_transform()).intersects_bbox(box, filled=False) for line in axes.lines
        )
        assert axes.bbox.padded(1).contains(box.x0, box.y0)
        assert axes.bbox.padded(1).contains(box.x1, box.y1)


@pytest.mark.parametrize(
    "name",
    [
        "2026-11-22_operator_scaling_4xcuda",
        "2026-11-22_scaling_longest_1B_4xcuda",
        "2026-11-22_scaling_weak_1B_4xcuda",
        "2026-11-26_families_385M_1xH200",
        "2026-11-26_lengths_1B",
        "2026-11-26_scaling_weak_1B_8xH200",
    ],
)
def test_pictures_have_a_white_ground_and_a_pages_width(name):
    figure = plots.figure_of(json.loads((RESULTS / f"{name}.json").read_text()), f"{name}.json")
    assert figure.get_figwidth() == plots.WIDTH
    assert figure.get_facecolor() == (1, 1, 1, 1)
    texts = [text for axes in figure.axes for text in axes.texts if text.get_visible()]
    assert all(text.get_fontsize() >= 7 for text in texts)
