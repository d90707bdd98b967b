"""The direction dnnlib <- torch_utils <- training <- edm2 <- scripts, from the source text, and the measures of the
house."""

import ast
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGES = ("dnnlib", "torch_utils", "training", "edm2")
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
STDLIB = frozenset(sys.stdlib_module_names)

# What may not be imported, by package, on top of the packages above it and the scripts.
FORBIDDEN = {
    "dnnlib": {"torch", "torchvision", "safetensors"},
    "torch_utils": {"click", "tqdm"},
    "training": {"click", "tqdm"},
    "edm2": {"tqdm"},
}
# Texts that the published reader executes when it opens a snapshot.
EMBEDDED = ("networks_edm2.py", "loss.py", "encoders.py", "toy/model.py")


@dataclass(frozen=True)
class Import:
    """One imported module, with the names taken from it; `top` where importing the file runs it at once."""

    module: str
    names: tuple[str, ...]
    line: int
    top: bool

    @property
    def package(self) -> str:
        """The first part of the module's name."""
        return self.module.partition(".")[0]


def imports_of(source: str, package: str = "") -> list[Import]:
    """Every import statement in `source`, a module of `package`, and `import_module`/`__import__` of a literal."""
    found: list[Import] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, (), node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative: the packages are flat, so that one dot is the package itself
                module = f"{package}.{module}".rstrip(".")
            found.append(Import(module, tuple(alias.name for alias in node.names), node.lineno, top))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                found.append(Import(str(node.args[0].value), (), node.lineno, top))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            inside = True
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(ast.parse(source), True)
    return found


def layer_violations(source: str, package: str, scripts: Iterable[str] = SCRIPTS) -> list[str]:
    """Imports of a module of `package` ('' for a script) that go against the direction."""
    above = set(PACKAGES[PACKAGES.index(package) + 1 :]) if package else set()
    forbidden = above | set(scripts) | FORBIDDEN.get(package, set())
    return [f"line {i.line}: {i.module}" for i in imports_of(source, package) if i.package in forbidden]


def foreign_imports(source: str, allowed: set[str], *, top_only: bool) -> list[str]:
    """Imports of anything but the standard library and `allowed` (module names; 'torch' allows 'torch.nn' too)."""
    bad = []
    for item in imports_of(source, "training"):
        # `from a import b` may mean the module a.b, so that is what is held against the list.
        names = [f"{item.module}.{name}" for name in item.names] or [item.module]
        for name in names:
            known = item.package in STDLIB or any(name == a or name.startswith(f"{a}.") for a in allowed)
            if not known and (item.top or not top_only):
                bad.append(f"line {item.line}: {name}")
    return bad


def print_calls(source: str) -> list[str]:
    """Calls of the built-in print."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"line {n.lineno}: print" for n in nodes if isinstance(n.func, ast.Name) and n.func.id == "print"]


def files_of(package: str) -> list[Path]:
    """The package's modules."""
    return sorted((ROOT / package).rglob("*.py"))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def assert_none(violations: dict[str, list[str]]) -> None:
    bad = [f"{name}: {line}" for name, lines in violations.items() for line in lines]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_nothing_from_the_layers_above_it(package):
    files = files_of(package)
    assert files
    assert_none({f"{package}/{path.name}": layer_violations(read(path), package) for path in files})


def test_scripts_never_import_one_another():
    assert_none({name: layer_violations(read(ROOT / f"{name}.py"), "") for name in sorted(SCRIPTS)})


def test_training_never_prints():
    assert_none({f"training/{path.name}": print_calls(read(path)) for path in files_of("training")})


def test_phema_stands_alone():
    path = ROOT / "training" / "phema.py"
    assert_none({"phema.py": foreign_imports(read(path), {"torch", "numpy"}, top_only=False)})


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_text_that_is_embedded_in_snapshots_needs_torch_numpy_and_persistence_only(name):
    allowed = {"torch", "numpy", "torch_utils.persistence"}
    assert_none({name: foreign_imports(read(ROOT / "training" / name), allowed, top_only=True)})


def test_nothing_under_the_packages_imports_the_tests_or_the_benchmarks():
    for package in PACKAGES:
        for path in files_of(package):
            assert not {"tests", "benchmarks"} & {i.package for i in imports_of(read(path), package)}, path


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("dnnlib", "import torch"),
        ("dnnlib", "import torch.nn.functional as F"),
        ("dnnlib", "def f():\n    from torch import nn"),
        ("dnnlib", "from torch_utils import persistence"),
        ("dnnlib", "import importlib\nimportlib.import_module('training.phema')"),
        ("torch_utils", "import os, training.loss"),
        ("torch_utils", "try:\n    import click\nexcept ImportError:\n    pass"),
        ("training", "import tqdm"),
        ("training", "from click import echo"),
        ("training", "def f():\n    import edm2.diffusers"),
        ("training", "import made_up_script"),
        ("", "from made_up_script import main"),
    ],
)
def test_the_checker_sees_a_violation(package, source):
    assert layer_violations(source, package, scripts={"made_up_script"})


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("dnnlib", "import os\nfrom dnnlib.errors import ConfigError\nimport requests"),
        ("torch_utils", "import torch\nfrom dnnlib import atomic\nfrom . import persistence"),
        ("training", "import torch\nimport dnnlib\nfrom torch_utils import distributed\nfrom .phema import std_to_exp"),
        ("", "import click\nimport tqdm\nfrom training import sampler\n'import made_up_script'"),
    ],
)
def test_the_checker_lets_the_direction_pass(package, source):
    assert not layer_violations(source, package, scripts={"made_up_script"})


@pytest.mark.parametrize(
    "source",
    [
        "import scipy",
        "from dnnlib import EasyDict",
        "from training.phema import std_to_exp",
        "from .phema import std_to_exp",
        "import torchvision",
        "from torch_utils import distributed",
        "class A:\n    import dnnlib",
    ],
)
def test_the_checker_sees_a_foreign_import(source):
    assert foreign_imports(source, {"torch", "numpy", "torch_utils.persistence"}, top_only=True)


def test_the_checker_tells_imports_at_module_level_from_those_inside_functions():
    source = (
        "import torch\nfrom torch_utils import persistence\nfrom torch_utils.persistence import persistent_class\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers\ndef f():\n    import diffusers\n"
    )
    allowed = {"torch", "torch_utils.persistence"}
    assert not foreign_imports(source, allowed, top_only=True)
    assert len(foreign_imports(source, allowed, top_only=False)) == 2


def test_the_checker_sees_a_print():
    assert print_calls("def f():\n    print('x')") == ["line 2: print"]
    assert not print_calls("log.print('x')\n'print(1)'")
