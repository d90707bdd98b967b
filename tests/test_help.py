"""docs/*-help.txt show what the scripts print for --help. `python -m tests.test_help` writes them anew."""

from pathlib import Path

import click
import click.testing
import pytest

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

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    "train-help.txt": ("train_edm2.py", train_edm2.train_edm2),
    "generate-help.txt": ("generate_images.py", generate_images.cmdline),
    "dataset-help.txt": ("dataset_tool.py", dataset_tool.cmdline),
    "convert-help.txt": ("convert_snapshot.py", convert_snapshot.cmdline),
    "phema-help.txt": ("reconstruct_phema.py", reconstruct_phema.cmdline),
    "metrics-help.txt": ("calculate_metrics.py", calculate_metrics.cmdline),
    "flops-help.txt": ("count_flops.py", count_flops.cmdline),
    "sweep-help.txt": ("sweep.py", sweep.cmdline),
    "report-help.txt": ("report.py", report.cmdline),
    "explore-help.txt": ("explore.py", explore.cmdline),
    "toy-help.txt": ("toy_example.py", toy_example.cmdline),
}


def printed_help(page: str) -> str:
    """The help of a script; of one with commands, theirs too."""
    script, command = PAGES[page]
    names = sorted(command.commands) if isinstance(command, click.Group) else []
    texts = []
    for args in [[], *([name] for name in names)]:
        result = click.testing.CliRunner().invoke(command, [*args, "--help"], prog_name=script)
        assert result.exit_code == 0
        texts.append(result.output)
    return "\n".join(texts)


@pytest.mark.parametrize("page", PAGES)
def test_the_documented_help_is_what_the_script_prints(page: str) -> None:
    assert printed_help(page) == (DOCS / page).read_text(encoding="utf-8")


if __name__ == "__main__":
    for name in PAGES:
        (DOCS / name).write_text(printed_help(name), encoding="utf-8", newline="\n")
