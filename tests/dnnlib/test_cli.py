"""The end of a script: exit codes, and one line for a user's mistake."""

import click
import pytest

from dnnlib.cli import INT_LIST, NIMG, main
from dnnlib.errors import ConfigError
from edm2.options.metrics import STD_LIST


@click.command()
@click.option("--count", type=NIMG)
@click.option("--list", "numbers", type=INT_LIST)
@click.option("--stds", type=STD_LIST, default="0.05,0.1")
@click.option("--fail")
def command(count: int | None, numbers: list[int] | None, stds: list[float], fail: str | None) -> None:
    click.echo(f"{count} {numbers} {stds}")
    if fail == "user":
        raise ConfigError("two\n  lines")
    if fail == "said":
        raise click.exceptions.Exit(1)
    if fail == "bug":
        raise KeyError("oops")
    if fail == "interrupt":
        raise KeyboardInterrupt


def end_of(*args: str) -> int:
    try:
        main(command, list(args))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_options_arrive_parsed_and_success_is_0(capsys):
    assert end_of("--count=2Ki", "--list=1,3-5") == 0
    assert capsys.readouterr().out == "2048 [1, 3, 4, 5] [0.05, 0.1]\n"
    assert end_of("--help") == 0


def test_a_program_may_choose_its_exit_code():
    assert end_of("--fail=said") == 1


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--fail=user"], "Error: two lines"),
        (["--count=abc"], "Error: Invalid value for '--count': 'abc' is not an image count"),
        (["--list=5-1"], "the range '5-1'"),
        (["--stds=0.5"], "'0.5' in '0.5' is not an EMA length"),
        (["--nothing"], "No such option"),
        (["surplus"], "unexpected extra argument"),
    ],
)
def test_a_users_mistake_is_one_line_and_2(capsys, args, text):
    assert end_of(*args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("Error: ")
    assert text in error


def test_other_processes_say_which_they_are(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert end_of("--fail=user") == 2
    assert capsys.readouterr().err == "Error (process 3): two lines\n"


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError, match="oops"):
        main(command, ["--fail=bug"])


def test_an_interrupted_program_ends_with_130():
    assert end_of("--fail=interrupt") == 130
