"""What the pages say of the tree is so: files, functions and tests that they name exist; and the site's own rules."""

import ast
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.documented_pages import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "models/README.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
EQUATIONS = ROOT / "docs" / "equations.md"

# `path.py` or `path.py::name` in backticks, with the folder.
_NAMED = re.compile(r"`((?:training|torch_utils|dnnlib|tests|benchmarks|edm2|data)/[\w/]+\.py)(?:::(\w+))?`")
_TEST_FILES = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
_TEST_FILE = re.compile(r"\b(test_\w+\.py)\b")
_CITED = re.compile(r"(?:Eq\.|Equations?) ([\d, and]+)")
_NUMBER = re.compile(r"\d+")


@cache
def defined(path: Path) -> set[str]:
    """Names of the functions and classes at the top of a file, and of test methods."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_and_functions_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name, function in _NAMED.findall(text):
        assert (ROOT / name).is_file(), f"there is no {name}"
        assert not function or function in defined(ROOT / name), f"{name} has no {function}"
    for name in _TEST_FILE.findall(text):
        assert name in _TEST_FILES, f"there is no {name} below tests/"


def rows() -> list[list[str]]:
    """The cells of the tables of equations, without the heads."""
    lines = [line for line in EQUATIONS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if "| function |" not in line]


def test_every_equation_has_a_function_and_a_test() -> None:
    assert len(rows()) > 20
    for row in rows():
        assert len(row) == 4, row
        functions, tests = _NAMED.findall(row[2]), _NAMED.findall(row[3])
        assert functions and all(function for _, function in functions), row
        assert tests and all(path.startswith("tests/") and test.startswith("test_") for path, test in tests), row


def test_every_equation_that_the_code_cites_is_in_the_table() -> None:
    table = {number for row in rows() for number in _NUMBER.findall(row[0])}
    for path in sorted((ROOT / "training").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        cited = {number for numbers in _CITED.findall(text) for number in _NUMBER.findall(numbers)}
        assert cited <= table, f"{path.name} cites Eq. {cited - table}"


def test_the_site_builds_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    front = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert 'src="demo.png"' in front and 'href="docs/' not in front
    assert (tmp_path / "site" / "files" / "training" / "phema.py").is_file()
    tour = (tmp_path / "site" / "tour.html").read_text(encoding="utf-8")
    assert 'src="tour-0.png"' in tour and (tmp_path / "site" / "tour-0.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def tree() -> Any:
    """The hook that maps links of the tree to those of the site."""
    pytest.importorskip("mkdocs")
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_hooks_tree", ROOT / "docs" / "hooks" / "tree.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mapped(tree: Any, text: str, page: str) -> str:
    from mkdocs.config import load_config
    from mkdocs.structure.files import Files

    config = load_config(str(ROOT / "mkdocs.yml"))
    place: Any = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    return str(tree.on_page_markdown(text, place, config, Files([])))


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "[a](docs/metrics.md#honest-numbers)", "[a](metrics.md#honest-numbers)"),
        ("index.md", '<img src="docs/demo.png">', '<img src="demo.png">'),
        ("metrics.md", "[a](../benchmarks/README.md)", "[a](benchmarks.md)"),
        ("options/sweep.md", "[`a`](../metrics.md)", "[`a`](../metrics.md)"),
        ("options/sweep.md", "[a](../../README.md#data)", "[a](../index.md#data)"),
        ("benchmarks.md", "[a](../docs/numerics.md)", "[a](numerics.md)"),
        ("index.md", "[a](https://arxiv.org) [b](#data)", "[a](https://arxiv.org) [b](#data)"),
        ("index.md", "[a](docs/../training/none.py)", "[a](docs/../training/none.py)"),
        ("index.md", "`[a](docs/metrics.md)`\n```\n[a](docs/metrics.md)\n```\n", None),
    ],
)
def test_links_of_the_tree_become_those_of_the_site(tree: Any, page: str, link: str, expected: str | None) -> None:
    assert mapped(tree, link, page) == (link if expected is None else expected)


def test_a_page_that_would_load_something_from_elsewhere_is_told(tree: Any, caplog: pytest.LogCaptureFixture) -> None:
    place: Any = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    tree.on_post_page('<a href="https://arxiv.org">', place, None)
    assert not caplog.records
    tree.on_post_page('<script async src="https://cdn.example/x.js">', place, None)
    assert "index.md loads something from the network" in caplog.text
