"""docs/failures.md has errors as the code prints them, and those that a user may meet."""

import ast
import re
from functools import cache

from processes import ROOT

PAGE = ROOT / "docs" / "failures.md"
HOLE = "\0"  # what differs from one time to the next: {..} in the code, <..> on the page


def text_of(node):
    """What an expression makes: constant parts, and a hole for each that is not constant; None if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None and right is None else (left or HOLE) + (right or HOLE)
    return None


@cache
def texts():
    """Every text of the code, with the file that it is in."""
    found = {}
    for folder in ("lasp", "kernels", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                text = text_of(node)
                if text is not None and len(text) > 3 and id(node) not in documentation:
                    found[re.sub(f"{HOLE}+", HOLE, text)] = path
    return found


def quotes():
    """The texts in the first column of the page's tables."""
    for line in PAGE.read_text().splitlines():
        cells = re.split(r"(?<!\\) \| ", line.strip("| "))
        if line.startswith("| `"):
            yield from re.findall(r"`([^`]+)`", cells[0])


def pieces(quote):
    """Of a text of the page, what stands together in the code, with holes."""
    return [
        x.strip(" ")
        for x in re.split(r"(?<!\.)\.\.(?!\.)", re.sub(r"<(?!=)[^<>]*>", HOLE, quote))
        if x.strip(f" {HOLE}")
    ]


def test_what_the_page_quotes_is_what_the_code_says():
    said = list(quotes())
    assert len(said) > 200
    unknown = [quote for quote in said for piece in pieces(quote) if not any(piece in text for text in texts())]
    assert unknown == []


def test_a_text_that_the_code_does_not_have_is_seen():
    assert pieces("rank <1> has <x>, the others <..>") == [f"rank {HOLE} has {HOLE}, the others {HOLE}"]
    assert pieces("log_decay must be <= 0 .. and more") == ["log_decay must be <= 0", "and more"]
    assert not any("this model was parallelised already" in text for text in texts())


# What no user meets, and what is said in whole by other texts, which the page has.
OF_THE_CODE = {
    "is not the file of the rank that made it": "a file of the board was exchanged by somebody else",
    "a map without transition lets everything pass": "of exchange/maps.py, for who writes a schedule",
}


def raised():
    """The texts of the errors that lasp/ raises, but for those of one argument, which say themselves what is right."""
    for path in sorted((ROOT / "lasp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            kind, text = ast.unparse(node.exc.func), text_of(node.exc.args[0])
            if kind in ("TypeError", "AttributeError", "AssertionError", "IndexError", "_Failed") or text is None:
                continue
            constant = text.replace(HOLE, "").strip(" ;:,")
            if " must " not in text and len(constant) > 20:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", re.sub(f"{HOLE}+", HOLE, text)


def test_errors_have_a_row():
    errors = dict(raised())
    assert len(errors) > 80
    told = [piece for quote in quotes() for piece in pieces(quote) if len(piece.replace(HOLE, "").strip()) > 8]
    told += OF_THE_CODE
    assert {where: text for where, text in errors.items() if not any(piece in text for piece in told)} == {}
