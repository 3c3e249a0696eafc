"""Writes the pages of the site, from which `make docs` builds it: README.md, docs/, all that these link to, the API.

On GitHub the pages are read as they are. Here they lie in one folder, so links between them are rewritten, a record or
a program that one of them links to becomes a page, and a name of the API that stands in a text is a link to what it is.
A link to a file that is not there ends the build.
"""

from __future__ import annotations

import functools
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "site"

SAME = {  # names that stand for what another is explained by; lasp.data_parallel is a package and this function
    "data_parallel": "data_parallel.data_parallel",
    "adapters.register": "register",
    **{f"data_parallel.{name}": name for name in ("CO2", "no_sync", "sync_grads")},
}

API = {
    "ranks": (
        "Ranks",
        "How processes find each other, and how they are arranged.",
        """init Env init_mesh grad_mesh replica_mesh SequenceParallel ShardLayout PeerError RankMismatchError""",
    ),
    "models": (
        "Splitting a model",
        "From a model on one device to one whose sequence is split, and a proof that it is the same.",
        """parallelize explain verify register stream_backward assert_finite integrations.SequenceTrainer""",
    ),
    "operators": (
        "Operators",
        "Each is one way to depend on tokens of other ranks; with `sequence=None` it runs on one.",
        """linear_attention delta_rule softmax_attention block_attention causal_conv halo
        ops.elementwise.elementwise_recurrence ops.elementwise.selective_scan compiled""",
    ),
    "modules": (
        "Modules",
        "The operators as modules, for models of your own. `lasp.parallelize` finds them.",
        """modules.LightningAttention modules.DeltaRule modules.SoftmaxAttention modules.BlockAttention
        modules.CausalConv modules.ElementwiseRecurrence modules.SelectiveScan modules.Router modules.Counted
        modules.OPERATOR_MODULES""",
    ),
    "decay": (
        "Decays",
        "The fixed decays of published models, by name.",
        """decay.schedule decay.SCHEDULES decay.alibi decay.tnl decay.retnet decay.none decay.fixed""",
    ),
    "batches": (
        "Batches and losses",
        "From a whole batch to a rank's slice, and from there to the mean over all tokens.",
        """shard_batch shard_sequence unshard_sequence token_loss linear_token_loss balance_loss""",
    ),
    "parallel": (
        "Data parallelism",
        "Gradients of all ranks, and where weights lie. `lasp.tensor_parallel` cuts the weights of lasp's own models.",
        """data_parallel.data_parallel no_sync sync_grads CO2 tensor_parallel data_parallel.wrap_ddp
        data_parallel.wrap_fsdp2 data_parallel.average_after_backward""",
    ),
    "inference": (
        "Inference",
        "A prompt of any length, split over ranks, and then token by token.",
        """prefill generate stream_tokens InferenceState library_inputs unsplit""",
    ),
    "adapters": (
        "Adapters",
        "For layers of other libraries; [Models](../models.md) shows how to write one.",
        """adapters.linear adapters.token_local adapters.rebind adapters.layout_of adapters.names_in
        adapters.is_function""",
    ),
    "own_models": (
        "lasp's own models",
        "Single-device code that knows no ranks; `lasp.parallelize` splits them like any other.",
        """models.TNL models.TNLConfig models.LinearTransformer models.LinearTransformerConfig models.Decoder
        models.DecoderConfig models.experts_from_dense""",
    ),
}
"""The pages of the reference: file, title, what it is about, names behind `lasp.`"""


def page_of(name: str) -> str | None:
    """The page of the reference, with its anchor, where a name such as "lasp.CO2" is explained."""
    short = SAME.get(name.removeprefix("lasp."), name.removeprefix("lasp."))
    found = [file for file, (_, _, names) in API.items() if short in names.split()]
    return f"api/{found[0]}.md#lasp.{short}" if found else None


def place_of(path: str) -> str:
    """Where a file of the repository lies in the site's folder."""
    if path == "README.md":
        return "index.md"
    path = path.removeprefix("docs/")
    path = re.sub(r"(^|/)README\.md$", r"\1index.md", path)
    return f"{path}.md" if path.endswith(".py") else path


class Pages:
    """The pages that were written, and those that are still to be: what others link to."""

    def __init__(self) -> None:
        docs = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))
        self.wanted = ["README.md", *docs, "CONTRIBUTING.md"]
        self.written: set[str] = set()

    def write(self) -> None:
        """All of them."""
        while self.wanted:
            path = self.wanted.pop()
            if path in self.written:
                continue
            self.written.add(path)
            source, target = ROOT / path, PAGES / place_of(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.endswith(".md"):
                target.write_text(self.of_site(path, source.read_text()))
            elif path.endswith(".py"):
                target.write_text(f"# {path}\n\n````python\n{source.read_text()}````\n")
            else:
                shutil.copyfile(source, target)

    def of_site(self, path: str, text: str) -> str:
        """A page's Markdown with the site's links; code stays as it is."""
        parts = re.split(r"(^ *```.*?^ *```[^\n]*$)", text, flags=re.DOTALL | re.MULTILINE)
        return "".join(part if part.lstrip().startswith("```") else self._prose(path, part) for part in parts)

    def _prose(self, path: str, text: str) -> str:
        pieces = re.split(r"(\[[^\]\[]*\]\([^)\s]*\)|`[^`\n]*`|^#.*$)", text, flags=re.MULTILINE)
        here = posixpath.dirname(place_of(path))
        for n, piece in enumerate(pieces):
            link = re.fullmatch(r"\[([^\]\[]*)\]\(([^)\s]*)\)", piece)
            name = re.fullmatch(r"`(lasp(?:\.\w+)+)(\([^`]*\))?`", piece)
            if link is not None:
                pieces[n] = f"[{link[1]}]({self._target(path, link[2])})"
            elif name is not None and (page := page_of(name[1])) is not None:
                pieces[n] = f"[{piece}]({posixpath.relpath(page, here or '.')})"
        return "".join(pieces)

    def _target(self, path: str, target: str) -> str:
        """Of a link on a page of the repository, that on the site's page."""
        file, mark, anchor = target.partition("#")
        if not file or "://" in file or file.startswith("mailto:"):
            return target
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(path), file))
        if wanted.startswith("..") or not (ROOT / wanted).is_file():
            raise SystemExit(f"{path}: a link to {target}, which is no file of this repository")
        self.wanted.append(wanted)
        here = posixpath.dirname(place_of(path))
        return posixpath.relpath(place_of(wanted), here or ".") + mark + anchor


def write_reference() -> None:
    """A page for each group of names, and one that lists all."""
    (PAGES / "api").mkdir(parents=True, exist_ok=True)
    index = [
        "# All names",
        "",
        "Shapes, dtypes and errors stand with each. B is the batch, T this rank's tokens, H heads,",
    ]
    index += ["K and V the channels of keys and values, N sequences.", ""]
    for file, (title, about, names) in API.items():
        lines = [f"# {title}", "", about, ""]
        index += [f"## {title}", "", about, ""]
        for name in names.split():
            lines += [*_directive(name), ""]
            shown = "data_parallel" if name == SAME["data_parallel"] else name
            index += [f"- [`lasp.{shown}`]({file}.md#lasp.{name}): {summary_of(name)}"]
        index.append("")
        (PAGES / "api" / f"{file}.md").write_text("\n".join(lines))
    (PAGES / "api" / "index.md").write_text("\n".join(index))


def _directive(name: str) -> list[str]:
    """What mkdocstrings takes for a name; of a module class its forward alone is shown beside what makes it."""
    path, last, options = definition_of(name).path, name.rpartition(".")[2], []
    if not path.endswith(f".{last}.{last}"):  # else a function whose file has its name, which would be found instead
        path = f"lasp.{name}"
    if path.endswith(f".{last}.{last}"):
        shown = "lasp.data_parallel" if name == SAME["data_parallel"] else f"lasp.{name}"
        options = [f"heading: {shown}", f"toc_label: {last}"]
    if name == "compiled":
        options = ["members: false", "show_source: false"]
    if name.startswith("modules.") or name in ("models.TNL", "models.LinearTransformer", "models.Decoder"):
        options = ["members: [forward]"]
    anchor = [] if path == f"lasp.{name}" else [f'<a id="lasp.{name}"></a>', ""]
    return [*anchor, f"::: {path}", *(["    options:"] if options else []), *(f"      {x}" for x in options)]


def summary_of(name: str) -> str:
    """The first paragraph of what a name's docstring says, read from the source."""
    docstring = definition_of(name).docstring
    if docstring is None:
        raise SystemExit(f"lasp.{name} has no docstring")
    return docstring.value.split("\n\n")[0].replace("\n", " ").removesuffix("::").strip()


def definition_of(name: str) -> Any:
    """What a public name stands for: of a file and a function in it that have one name, the function."""
    found = package()[name]
    found = found.final_target if found.is_alias else found
    last = name.rpartition(".")[2]
    return found[last] if found.is_module and last in found.members else found


@functools.cache
def package() -> Any:
    """lasp, as griffe reads it: nothing is imported."""
    import griffe  # of the environment of `make docs`

    loader = griffe.GriffeLoader(search_paths=[str(ROOT), str(ROOT / "kernels")])
    found = loader.load("lasp")
    loader.resolve_aliases(implicit=True)
    return found


def link_docstrings() -> None:
    """On the pages of the reference: names and pages that docstrings mention become links."""

    def linked(found: re.Match) -> str:
        page = page_of(found[1])
        return f'<a href="../{page.replace(".md", ".html")}">{found[0]}</a>' if page else found[0]

    for file in API:
        page = SITE / "api" / f"{file}.html"
        parts = re.split(r"(<pre.*?</pre>|<nav.*?</nav>|<h\d.*?</h\d>|<a .*?</a>)", page.read_text(), flags=re.DOTALL)
        for n in range(0, len(parts), 2):
            parts[n] = re.sub(r"<code>(lasp(?:\.\w+)+)(?:\([^<]*\))?</code>", linked, parts[n])
            parts[n] = re.sub(r"\bdocs/([\w/-]+)\.md\b", r'<a href="../\1.html">docs/\1.md</a>', parts[n])
        page.write_text("".join(parts))


def ask_nobody() -> None:
    """In place of a script from another server, which search needs where the site lies on a disk, one of ours."""
    theirs = "https://unpkg.com/iframe-worker/shim"
    for page in SITE.rglob("*.html"):
        text = page.read_text()
        if text.count(theirs) != 1:
            raise SystemExit(
                f"{page.relative_to(ROOT)}: this zensical makes other pages than the one in constraints.txt"
            )
        page.write_text(text.replace(theirs, "../" * (len(page.relative_to(SITE).parts) - 1) + "from_disk.js"))


def main() -> int:
    """Write the pages, and let zensical build."""
    shutil.rmtree(PAGES, ignore_errors=True)
    Pages().write()
    write_reference()
    for name in ("site.css", "from_disk.js"):
        shutil.copyfile(ROOT / "docs" / name, PAGES / name)
    zensical = Path(sys.executable).with_name("zensical")
    done = subprocess.run([zensical, "build", "--clean", "--strict"], cwd=ROOT)
    if done.returncode == 0:
        link_docstrings()
        ask_nobody()
        print(f"open {(SITE / 'index.html').relative_to(ROOT)} in a browser")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
