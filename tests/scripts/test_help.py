"""What --help says is in docs/options/*.md, and takes no time to say; paths have one type of option."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dnnlib.cli import PATH, SOURCE
from edm2.options.training import SECTIONS
from tests.helpers.options_pages import FOLDER, SCRIPTS, page
from tests.helpers.paths import ROOT


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_documented_options_are_those_of_the_script(script: str) -> None:
    documented = (FOLDER / script).with_suffix(".md").read_text(encoding="utf-8")
    assert page(script) == documented, "python -m tests.helpers.options_pages writes the pages anew"


def test_every_script_has_its_page_and_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts == set(SCRIPTS)
    assert {path.stem for path in FOLDER.glob("*.md")} == {Path(script).stem for script in scripts}
    assert all(f"options/{Path(script).stem}.md" in menu for script in scripts)


HELP_OF_ALL = """
import contextlib, io, json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code and text.getvalue().startswith("Usage: " + " ".join(sys.argv[:-1])), (sys.argv, end)
    waited = {"torch", "numpy", "PIL", "scipy", "matplotlib", "requests"} & set(sys.modules)
    assert not waited, (sys.argv, waited)
"""


def test_help_imports_nothing_that_takes_long() -> None:
    words = [[script, "--help"] for script in SCRIPTS]
    for script, command in SCRIPTS.items():
        words += [[script, name, "--help"] for name in getattr(command, "commands", ())]
    args = [sys.executable, "-c", HELP_OF_ALL, json.dumps(words)]
    subprocess.run(args, cwd=ROOT, check=True, timeout=60)


def all_options(command: click.Command, name: str) -> list[tuple[str, click.Parameter]]:
    """Every option and argument, each with the command that has it."""
    found = [(f"{name}: {param.name}", param) for param in command.get_params(click.Context(command))]
    for sub_name, sub in getattr(command, "commands", {}).items():
        found += all_options(sub, f"{name} {sub_name}")
    return found


# Options that are texts of another kind than a path.
OTHER_TEXTS = {
    "background", "condition", "dataset_class", "decoder_precision", "device", "host", "inprefix", "label", "licence",
    "loss_class", "metrics", "metrics_names", "network_class", "out_prefix", "own_networks", "preset", "resolution",
    "sampler", "solver", "split",
}  # fmt: skip


def test_every_path_is_read_with_the_home_folder_in_place_of_a_tilde() -> None:
    options = [item for script, command in SCRIPTS.items() for item in all_options(command, script)]
    plain_paths = [name for name, param in options if type(param.type) is click.Path]
    texts = {name: param for name, param in options if param.type is click.STRING}
    assert not plain_paths and not [name for name, param in texts.items() if param.name not in OTHER_TEXTS]
    assert sum(param.type in (PATH, SOURCE) for _, param in options) > 40


@pytest.mark.parametrize("name", ["n" * 300, "a/" * 3000, "~/" + "n" * 5000, "a\0b", "~" + "n" * 300])
def test_a_name_longer_than_the_file_system_takes_is_one_line_in_every_option(name: str) -> None:
    for script, command in SCRIPTS.items():
        for where, param in all_options(command, script):
            if param.type in (PATH, SOURCE):
                with pytest.raises(click.UsageError) as caught:
                    param.type.convert(name, param, None)
                assert len(caught.value.message) < 500 and "\n" not in caught.value.message, where


def test_the_options_of_training_are_in_sections() -> None:
    text = CliRunner().invoke(SCRIPTS["train_edm2.py"], ["--help"]).output
    titles = [line.removesuffix(":") for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == list(SECTIONS.values())
