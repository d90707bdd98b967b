"""The measures of the house: names, circles of imports, sizes of functions, and the words that people read."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.test_layers import PACKAGES, files_of, imports_of, read

SCRIPTS = sorted(ROOT.glob("*.py"))
PRODUCT = [*SCRIPTS, *(path for package in PACKAGES for path in files_of(package))]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *(page for folder in ("docs", "models", "data", "benchmarks") for page in sorted((ROOT / folder).rglob("*.md"))),
]

LONGEST, MOST_BRANCHES = 80, 18
# Longer because of their published signatures and the documentation of these.
PUBLISHED = {"generate_images", "edm_sampler", "EDM2Pipeline.__call__"}
ADVISED_AGAINST = re.compile(r"\b(is no|is none|beside|goes on|pictures?)\b")


def module_of(path: Path) -> str:
    """The dotted name of a module or package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions_of(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function with its name inside the module, methods as Class.method."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{child.name}" if isinstance(child, ast.FunctionDef | ast.ClassDef) else prefix
            if isinstance(child, ast.FunctionDef):
                yield name, child
            nested = isinstance(child, ast.FunctionDef | ast.ClassDef)
            yield from visit(child, f"{name}." if nested else prefix)

    yield from visit(ast.parse(read(path)), "")


def branches(function: ast.FunctionDef) -> int:
    """The cyclomatic complexity: 1, and one for every decision, those of functions inside it left out."""
    count = 1
    pending: list[ast.AST] = list(ast.iter_child_nodes(function))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.If | ast.For | ast.While | ast.IfExp | ast.ExceptHandler | ast.Assert | ast.match_case):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        pending.extend(ast.iter_child_nodes(node))
    return count


def test_no_name_stands_for_two_modules_below_training():
    places = defaultdict(list)
    for path in files_of("training"):
        name = path.parent.name if path.name == "__init__.py" else path.stem
        places[name].append(path.relative_to(ROOT).as_posix())
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_imports_make_no_circle():
    """Imports inside functions and those for type checkers count as well: they make two files one."""
    modules = {module_of(path): path for path in PRODUCT}
    arrows: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = set()
        for item in imports_of(read(path), package):
            named = {f"{item.module}.{part}" for part in item.names} & modules.keys()
            found |= named or ({item.module} & modules.keys())
        arrows[name] = found - {name}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                walk(other, (*trail, name))
            done.add(name)

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        for name in sorted(arrows):
            walk(name, ())
    finally:
        sys.setrecursionlimit(limit)


def test_functions_are_short_and_straight():
    bad = []
    for path in PRODUCT:
        for name, function in functions_of(path):
            length = (function.end_lineno or 0) - function.lineno + 1
            if (length > LONGEST and name not in PUBLISHED) or branches(function) > MOST_BRANCHES:
                where = path.relative_to(ROOT).as_posix()
                bad.append(f"{where}: {name} has {length} lines and {branches(function)} branches")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("paths", [PRODUCT, PAGES], ids=["product", "documentation"])
def test_words_are_those_of_the_glossary(paths: list[Path]):
    """See "Words" in CONTRIBUTING.md; a handful of places need the words."""
    uses = [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(read(path).splitlines(), 1)
        if ADVISED_AGAINST.search(line)
    ]
    assert len(uses) <= 15, "\n".join(uses)


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= 220


def test_whatever_a_test_starts_has_a_time_limit():
    """A call of subprocess, and the wait for the end of a process."""
    unlimited = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for call in ast.walk(ast.parse(read(path))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            of, name = ast.unparse(call.func.value), call.func.attr
            starts = of == "subprocess" and name in {"run", "call", "check_call", "check_output"}
            waits = name in {"wait", "communicate", "join"} and re.search(r"(process|driver|worker)$", of) is not None
            limited = any(keyword.arg == "timeout" for keyword in call.keywords)
            if (starts and not limited) or (waits and not (limited or call.args)):
                unlimited.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}")
    assert not unlimited


def test_what_several_tests_use_lies_in_helpers():
    """A test module imports from no other, apart from the measures in this folder."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        names = {node.module or "" for node in ast.walk(ast.parse(read(path))) if isinstance(node, ast.ImportFrom)}
        others = {name for name in names if name.startswith("tests.") and not name.startswith("tests.helpers")}
        found += [f"{path.relative_to(ROOT)}: {name}" for name in sorted(others - {"tests.test_layers"})]
    assert not found
