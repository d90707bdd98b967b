"""docs/options/*.md: every option of every script, from what click knows. `python -m tests.helpers.options_pages`
writes them.

tests/scripts/test_help.py holds them.
"""

import inspect
import re
from pathlib import Path

import click

import calculate_metrics
import convert_snapshot
import count_flops
import dataset_tool
import explore
import generate_images
import reconstruct_phema
import report
import sweep
import toy_example
import train_edm2
from tests.helpers.paths import ROOT

FOLDER = ROOT / "docs" / "options"

# In the order of the menu. A new script is a line here, and one in mkdocs.yml.
SCRIPTS: dict[str, click.Command] = {
    "train_edm2.py": train_edm2.train_edm2,
    "generate_images.py": generate_images.cmdline,
    "reconstruct_phema.py": reconstruct_phema.cmdline,
    "calculate_metrics.py": calculate_metrics.cmdline,
    "sweep.py": sweep.cmdline,
    "dataset_tool.py": dataset_tool.cmdline,
    "report.py": report.cmdline,
    "explore.py": explore.cmdline,
    "convert_snapshot.py": convert_snapshot.cmdline,
    "count_flops.py": count_flops.cmdline,
    "toy_example.py": toy_example.cmdline,
}

# "... [default: X]", "[required ...]" as options say it in their own words, at the end of the help.
_IN_WORDS = re.compile(r"\s*\[(?:default: (?P<default>.+)|(?P<required>required.*))\]$")


def page(script: str) -> str:
    """The page of a script: its help in Markdown, and a table of options for it or each of its commands."""
    command = SCRIPTS[script]
    parts = [f"# {script}", *_description(command)]
    if isinstance(command, click.Group):
        parts += _table(command)
        for name, sub in sorted(command.commands.items()):
            parts += [f"## {script} {name}", *_description(sub), *_table(sub)]
    else:
        parts += _table(command)
    return "\n\n".join(parts) + "\n"


def write(folder: Path) -> None:
    """Write all pages."""
    folder.mkdir(exist_ok=True)
    for script in SCRIPTS:
        path = folder / f"{script.removesuffix('.py')}.md"
        path.write_text(page(script), encoding="utf-8", newline="\n")


def examples(command: click.Command) -> list[str]:
    """The blocks of example commands in the help of a command and of those in it."""
    own = [text for is_code, text in _paragraphs(command) if is_code]
    inner = command.commands.values() if isinstance(command, click.Group) else []
    return own + [text for sub in inner for text in examples(sub)]


def _paragraphs(command: click.Command) -> list[tuple[bool, str]]:
    """The help text, paragraph by paragraph; those that click leaves as they are (after a \\b) are code."""
    paragraphs = []
    for text in inspect.cleandoc(command.help or "").split("\n\n"):
        is_code = text.startswith("\b") or text.startswith("python ")
        paragraphs.append((is_code, text.lstrip("\b\n") if is_code else " ".join(text.split())))
    return paragraphs


def _description(command: click.Command) -> list[str]:
    parts: list[str] = []
    code: list[str] = []
    for is_code, text in [*_paragraphs(command), (False, "")]:
        if is_code:
            code.append(text)
            continue
        if code:
            parts.append("```\n" + "\n\n".join(code) + "\n```")
            code = []
        if text:
            parts.append(text)
    return parts


def _table(command: click.Command) -> list[str]:
    """The options and arguments, in the order of the help; nothing where there are none."""
    context = click.Context(command, info_name=command.name)
    rows = []
    for param in command.get_params(context):
        if isinstance(param, click.Option):
            rows += [] if param.hidden or "--help" in param.opts else [_row(param, context)]
        else:
            rows.append((f"`{_words(param.make_metavar(context))}`", "", "required" if param.required else "", ""))
    lines = [f"| {' | '.join(row)} |".replace("  ", " ") for row in rows]
    return ["\n".join(["| option | value | default | |", "|---|---|---|---|", *lines])] if rows else []


def _row(option: click.Option, context: click.Context) -> tuple[str, str, str, str]:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    text, extra = option.help or "", option.get_help_extra(context)
    default = extra.get("required") or extra.get("default") or ""
    words = _IN_WORDS.search(text)
    if words is not None:
        text, default = text[: words.start()], words["default"] or words["required"]
    value = "" if option.is_flag else _words(option.make_metavar(context)).removesuffix(" RANGE")
    if "range" in extra and ".." not in value:
        value += f" ({extra['range']})"
    return names, value, default, text.replace("|", "\\|")


def _words(metavar: str) -> str:
    """[a|b] as a, b: a bar would end the cell of a table."""
    return metavar.removeprefix("[").removesuffix("]").replace("|", ", ")


if __name__ == "__main__":
    write(FOLDER)
