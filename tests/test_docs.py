"""The README and the pages of docs/: their code runs and prints what they say, their links lead."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from cubin import surrogates
from cubin.core import primitives
from tests.required import require

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
EXECUTED = [page for page in PAGES if page.name != "CONTRIBUTING.md"]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def prose(page):
    """The text of a page or of a notebook without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def blocks(page):
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


# ---------------------------------------------------------------- code


def said(statement, following, lines):
    """What the page says that a statement prints: a comment behind it, or the lines below."""
    line = lines[statement.end_lineno - 1].encode()[statement.end_col_offset :].decode()
    if "#" in line:
        return line.split("#", 1)[1].strip()
    below = lines[statement.end_lineno : following]
    return "\n".join(text.removeprefix("#").strip() for text in below if text.startswith("#"))


def execute(source, names):
    """Run a block, and compare what its statements print with what stands beside them.

    What is printed may be followed by a colon and an explanation.
    """
    lines = source.splitlines()
    statements = ast.parse(source).body
    starts = [statement.lineno - 1 for statement in statements] + [len(lines)]
    for statement, following in zip(statements, starts[1:], strict=True):
        printed = io.StringIO()
        code = compile(ast.Module([statement], []), "<block>", "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if printed.getvalue():
            expected = said(statement, following, lines)
            found = "\n".join(text.strip() for text in printed.getvalue().strip().splitlines())
            assert found in (expected, expected.split(":")[0]), f"prints {found!r}"


@pytest.fixture
def forgotten():
    """The surrogates that a page registers are forgotten."""
    before = set(surrogates.SIGN)
    yield
    for name in set(surrogates.SIGN) - before:
        del surrogates.SIGN[name], primitives.REGISTRY[name]


def with_marks(page):
    on_device = any("import cupy" in block for block in blocks(page))
    return pytest.param(page, id=name_of(page), marks=[pytest.mark.kernels] if on_device else [])


@pytest.mark.parametrize("page", [with_marks(page) for page in EXECUTED])
def test_code_runs_and_prints_what_it_says(page, request, tmp_path, monkeypatch, forgotten):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in blocks(page):
        if "import torch" in block:
            require("torch")
        if "import jax" in block:
            require("jax")
        if "import dask" in block:
            require("dask")
        if "import cupy" in block:
            monkeypatch.setitem(sys.modules, "cupy", request.getfixturevalue("device"))
        execute(block, names)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("print(1 + 1)  # 3", "prints '2'"),
        ("print(2)", "prints '2'"),
        ("for i in range(2):\n    print(i)\n# 0\n# 2\n", r"prints '0\\n1'"),
    ],
)
def test_what_a_block_prints_is_compared(block, message):
    with pytest.raises(AssertionError, match=message):
        execute(block, {})
    execute("print(2)  # 2: an explanation\nfor i in range(2):\n    print(i)\n# 0\n# 1\n", {})


# ---------------------------------------------------------------- links


def anchors(page):
    """What the headings of a page can be reached by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page):
    """The relative links of a page that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title: one\n[a](#a-title-one) [b](#two) [c](none.md)\n", encoding="utf-8")
    assert broken(page) == ["#two", "none.md"]


def test_readme_leads_to_every_page():
    text = README.read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name}" in text
    for notebook in NOTEBOOKS:
        assert f"({name_of(notebook)})" in text


# ---------------------------------------------------------------- form


def test_readme_fits_and_says_first_what_does_not_exist():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    start = text.index("CuPy")
    assert "No GPU run exists yet" in text[start : start + 100]
    assert "<!-- the test command -->\n```\npython3 -m venv" in text


def test_docs_are_in_the_source_distribution():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    assert {"docs", "README.md"} <= set(build["build"]["targets"]["sdist"]["include"])
