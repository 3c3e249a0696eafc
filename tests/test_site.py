"""The site that `make docs` has built: what it links to is there, and it works in a browser, from a disk, alone.

`make test-docs` builds it and runs these. In the browser (Chromium, if there is one: `apt-get install chromium`, or
what `playwright install chromium` brings) pages are opened wide and narrow, light and dark; without one what the files
hold is looked at, and the rest is skipped.
"""

import functools
import http.server
import importlib.util
import inspect
import json
import os
import re
import shutil
import threading
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

import lasp
import lasp.models
import lasp.ops.elementwise

pytest.importorskip("zensical", reason="make test-docs")
ROOT = Path(__file__).parent.parent
SITE = ROOT / "site"


@functools.cache
def build_site():
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


class Page(HTMLParser):
    """What a page links to, its anchors, and how many elements of a kind its article has."""

    def __init__(self, file):
        super().__init__()
        self.links, self.sources, self.anchors, self.elements, self.depth = [], [], set(), {}, 0
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors.update(x for x in (attrs.get("id"), attrs.get("name") if tag == "a" else None) if x)
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        elif tag in ("img", "script", "link", "iframe", "source") and (source := attrs.get("src") or attrs.get("href")):
            self.sources.append(source)
        if tag == "article":
            self.depth += 1
        elif self.depth:
            self.elements[tag] = self.elements.get(tag, 0) + 1

    def handle_endtag(self, tag):
        self.depth -= tag == "article"


@pytest.fixture(scope="module")
def pages():
    found = {str(file.relative_to(SITE)): Page(file) for file in SITE.rglob("*.html")}
    assert {"index.html", "how-it-works.html", "api/operators.html"} <= set(found), "make docs"
    return found


def target_of(page, link):
    """The file of the site, and the anchor, that a link on a page is for; None for one to elsewhere."""
    parts = urllib.parse.urlsplit(link)
    if parts.scheme or parts.netloc:
        return None
    path = urllib.parse.unquote(parts.path)
    file = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
    return "index.html" if file == "." else file, urllib.parse.unquote(parts.fragment)


def test_every_link_and_picture_is_there(pages):
    missing, counted = [], 0
    for name, page in pages.items():
        for link in page.links + page.sources:
            found = target_of(name, link)
            if found is None or name == "404.html":  # which has links from the root of a server
                continue
            counted += 1
            file, anchor = found
            if not (SITE / file).is_file() or (anchor and file in pages and anchor not in pages[file].anchors):
                missing.append((name, link))
    assert missing == []
    assert counted > 1000


def test_nobody_is_asked(pages):
    """No script, style, font or picture of another server."""
    theirs = [(name, x) for name, page in pages.items() for x in page.sources if urllib.parse.urlsplit(x).netloc]
    assert theirs == []


def test_the_reference_has_every_name(pages):
    names = [f"lasp.{name}" for _, _, names in build_site().API.values() for name in names.split()]
    lacking = []
    for name in names:
        file, anchor = build_site().page_of(name).split("#")
        if anchor not in pages[file.replace(".md", ".html")].anchors:
            lacking.append(name)
    assert lacking == []
    assert len(names) > 60
    # A docstring's own mentions of pages and names are links.
    assert {"../data_parallel.html", "../api/ranks.html#lasp.grad_mesh"} <= set(pages["api/parallel.html"].links)


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", *(str(x.relative_to(ROOT)) for x in (ROOT / "docs").rglob("*.md"))]
)
def test_a_page_has_what_its_markdown_has(pages, path):
    """As many headings, list items, rows, blocks of code and pictures as by GitHub's rules (markdown-it's)."""
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse((ROOT / path).read_text())
    flat = [t for token in tokens for t in (token, *(token.children or ()))]
    kinds = {
        "list_item_open": "li",
        "tr_open": "tr",
        "fence": "pre",
        "code_block": "pre",
        "image": "img",
        "strong_open": "strong",
    }
    expected = dict.fromkeys(kinds.values(), 0)
    for token in flat:
        if token.type in kinds:
            expected[kinds[token.type]] += 1
    headings = sum(t.type == "heading_open" for t in flat)
    page = pages[build_site().place_of(path).replace(".md", ".html")]
    assert {kind: page.elements.get(kind, 0) for kind in expected} == expected
    assert sum(page.elements.get(f"h{n}", 0) for n in range(1, 7)) == headings


def test_the_reference_says_what_the_code_says(pages):
    """Of each name the docstring of what it stands for when it is imported, not that of a file of the same name."""
    said = {}
    for _, _, names in build_site().API.values():
        for name in names.split():
            found = functools.reduce(getattr, name.split("."), lasp)
            if callable(found):
                expected = " ".join(inspect.getdoc(found).split("\n\n")[0].split()).removesuffix("::").strip()
                said[name] = build_site().summary_of(name) == expected
    assert [name for name, same in said.items() if not same] == []
    listed = {name for file in build_site().API for name in pages[f"api/{file}.html"].anchors}
    assert "lasp.inference.prefill.prefill" in listed
    assert "lasp.inference.prefill.check_state" not in listed


def test_the_index_of_the_search_has_every_page(pages):
    items = json.loads((SITE / "search.json").read_text())["items"]
    found = {item["location"].partition("#")[0] for item in items}
    assert {name for name in pages if name != "404.html"} <= found
    assert any("lasp.linear_attention" in item["location"] for item in items)


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="make test-docs")
    with playwright.sync_playwright() as p:
        own = Path(p.chromium.executable_path)
        names = ("chromium", "chromium-browser", "google-chrome", "chrome")
        path = str(own) if own.exists() else next((x for x in map(shutil.which, names) if x), None)
        if path is None:
            pytest.skip("there is no Chromium: apt-get install chromium")
        found = p.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_address[1]}"
    served.shutdown()


def opened(browser, where, *, width=1300, scheme="light", **options):
    """A page, and what went wrong in it: errors, and what it asked of others."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda r: None if r.url.startswith((where[:12], "data:", "blob:")) else wrong.append(r.url))
    page.goto(where)
    page.wait_for_load_state("networkidle")
    return page, wrong


@pytest.mark.timeout(400)  # some ninety pages, on a machine that does other things, too
@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (390, "dark")])
def test_pages_open(browser, pages, width, scheme):
    """Every page, from the disk: pictures are shown, nothing goes wrong, and none is wider than the screen."""
    page, wrong = opened(browser, (SITE / "index.html").as_uri(), width=width, scheme=scheme)
    bad = {}
    for name in sorted(pages):
        if name == "404.html":
            continue
        page.goto((SITE / name).as_uri())
        broken = page.evaluate("[...document.images].filter(x => !(x.complete && x.naturalWidth)).map(x => x.src)")
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if broken or wide > 0 or wrong:
            bad[name] = broken, wide, list(wrong)
        wrong.clear()
    page.close()
    assert bad == {}


@pytest.mark.parametrize("place", ["disk", "server"])
def test_search_finds(browser, server, place):
    where = (SITE / "index.html").as_uri() if place == "disk" else f"{server}/index.html"
    page, wrong = opened(browser, where)
    page.keyboard.press("Control+k")
    page.keyboard.type("horizon")
    result = page.get_by_role("option", name=re.compile("Horizon: heads that only need")).first
    result.wait_for(timeout=60000)
    result.click()
    page.wait_for_url(re.compile(r"exchange\.html"), timeout=60000)
    assert wrong == []
    page.close()


def test_code_copies(browser, server):
    """The button of the listing gives what the page of the repository has."""
    page, wrong = opened(browser, f"{server}/how-it-works.html", permissions=["clipboard-read", "clipboard-write"])
    blocks = page.locator("article pre")
    count = blocks.count()
    assert count == page.locator("article pre button, article .highlight button").count()
    listing = page.locator("article .highlight", has_text="four_ranks.py")
    listing.hover()
    listing.locator("button").first.click()
    page.wait_for_timeout(500)
    copied = page.evaluate("navigator.clipboard.readText()")
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    assert copied.strip() == re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1).strip()
    assert wrong == []
    page.close()


def test_dark_and_light(browser):
    page, wrong = opened(browser, (SITE / "index.html").as_uri(), scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.locator("form[data-md-component=palette] label:visible").first.click()
    page.wait_for_timeout(500)
    assert page.evaluate(ground) != dark
    assert wrong == []
    page.close()


@pytest.mark.parametrize("picture", ["exchange", "how-it-works", "kernels"])
def test_nothing_covers_anything_in_the_picture(browser, picture):
    """Words of a drawn picture do not touch each other, lines do not run through them, and all are inside."""
    page, _ = opened(browser, (ROOT / "docs" / f"{picture}.svg").as_uri())
    found = page.evaluate(
        """() => {
            const box = x => { const b = x.getBBox(); return [b.x, b.y, b.x + b.width, b.y + b.height] }
            const texts = [...document.querySelectorAll("text")].map(x => [x.textContent, ...box(x)])
            const lines = [...document.querySelectorAll("svg > path")].map(x => [x.getAttribute("d"), ...box(x)])
            return {texts, lines, size: box(document.querySelector("svg > rect"))}
        }"""
    )

    def meet(a, b):
        return a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]

    texts, lines = found["texts"], [x for x in found["lines"] if x[1] == x[3] or x[2] == x[4]]
    assert len(texts) > 30
    assert len(lines) > 20
    assert [(a[0], b[0]) for n, a in enumerate(texts) for b in texts[:n] if meet(a, b)] == []
    # A line without width: a little of one.
    fat = [(d, x1 - 0.8, y1 - 0.8, x2 + 0.8, y2 + 0.8) for d, x1, y1, x2, y2 in lines]
    assert [(a[0], b[0]) for a in texts for b in fat if meet(a, b)] == []
    left, top, right, bottom = found["size"]
    assert [x[0] for x in texts if x[1] < left or x[2] < top or x[3] > right or x[4] > bottom] == []
    page.close()
