"""The worked examples of docs/extending.md as files, and small parts of a user's own for tests."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.helpers.documented_pages import snippets

PAGE = "docs/extending.md"


def examples() -> dict[str, str]:
    """The page's files by name."""
    return {snippet.file: snippet.text for snippet in snippets(PAGE) if snippet.file is not None}


@contextlib.contextmanager
def in_folder_of_examples(path: Path) -> Iterator[Path]:
    """Work in `path`, with the page's files in it; modules imported from there are forgotten afterwards."""
    for name, text in examples().items():
        (path / name).write_text(text, encoding="utf-8")
    before, modules = list(sys.path), set(sys.modules)
    try:
        with contextlib.chdir(path):
            yield path
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(path):
                del sys.modules[name]


def saved_tensors(outdir: str) -> dict[str, Any]:
    """All tensors of the four snapshots in `outdir`, by file."""
    found = {path.name: load_file(path) for path in sorted(Path(outdir).glob("*-0.*.safetensors"))}
    assert len(found) == 4
    return found
