"""The commands and Python examples of README.md and the pages in docs/, in the order in which a reader meets them."""

import re
import shlex
from dataclasses import dataclass

from tests.helpers.paths import ROOT

_BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`(python [^`\n]+)`(?!`)")
_COMMANDS = {"", "sh", "bash", "console"}


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """What can be run: a command (one line), a Python block, or a shell script as a whole."""

    page: str
    line: int
    kind: str  # "command", "python" or "script"
    text: str

    @property
    def file(self) -> str | None:
        """The file that a Python block is, as its first line says: `# name.py`."""
        match = re.match(r"# (\w+\.py)\n", self.text)
        return match[1] if match is not None and self.kind == "python" else None

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.page}:{self.line}: {self.text.strip().splitlines()[0]}"


def pages() -> list[str]:
    """Paths of the pages in the tree. Those in docs/options have the examples of the scripts' --help.

    docs/own-data.md is one chain of commands, which tests/training/small_data/test_own_data.py runs.
    """
    found = [ROOT / "README.md", ROOT / "models" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found if path.name != "own-data.md"]


def snippets(page: str) -> list[Snippet]:
    """What a page has to run. Fenced blocks of other languages (text, json, bibtex, ...) are no commands."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found: list[tuple[int, str, str]] = []  # position, kind, text
    for block in _BLOCK.finditer(text):
        language, code = block[1].strip(), block[2]
        if language == "python":
            found.append((block.start(), "python", code))
        elif (language in _COMMANDS and code.startswith("#!")) or "#SBATCH" in code:
            found.append((block.start(), "script", code))
        elif language in _COMMANDS:
            found += [(block.start(2) + at, "command", line) for at, line in _command_lines(code)]
    prose = _BLOCK.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), text)
    found += [(span.start(), "command", span[1]) for span in _INLINE.finditer(prose)]
    return [
        Snippet(page=page, line=text.count("\n", 0, at) + 1, kind=kind, text=code) for at, kind, code in sorted(found)
    ]


def _command_lines(code: str) -> list[tuple[int, str]]:
    """Commands with their place in the block; those over several lines as one line."""
    lines = []
    for match in re.finditer(r"(?:[^\n]*\\\n)*[^\n]+", code):
        line = re.sub(r"\\\n\s*", "", match[0]).removeprefix("$ ")
        if shlex.split(line, comments=True):
            lines.append((match.start(), line))
    return lines
