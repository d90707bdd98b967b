"""The end of a script: exit codes, and one line for a user's mistake."""

import os
import signal
from pathlib import Path

import click
import pytest

from dnnlib.cli import INT_LIST, NIMG, PATH, SOURCE, main
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


def test_an_interrupted_program_ends_with_130(capsys):
    assert end_of("--fail=interrupt") == 130
    with pytest.raises(SystemExit):
        main(command, ["--fail=interrupt"], interrupted="The same command continues.")
    out, error = capsys.readouterr()
    assert error.endswith("Interrupted. The same command continues.\n") and "Interrupted" not in out
    group = click.Group("tool", commands={"command": command, "other": command})
    with pytest.raises(SystemExit):
        main(group, ["command", "--fail=interrupt"], interrupted={"other": "No.", "command": "Yes."})
    assert capsys.readouterr().err.endswith("Interrupted. Yes.\n")


def test_a_program_that_ignores_interrupts_says_so_at_its_start(capsys, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert end_of() == 0
        assert f"^C does not end this program; kill {os.getpid()} does" in capsys.readouterr().err
        assert end_of("--help") == 0
        monkeypatch.setenv("RANK", "1")
        assert end_of() == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert end_of() == 0
    assert capsys.readouterr().err == ""


@click.command()
@click.option("--out", type=PATH)
@click.option("--net", "nets", type=SOURCE, multiple=True)
@click.argument("more", type=SOURCE, nargs=-1)
def paths(out: Path, nets: tuple[str, ...], more: tuple[str, ...]) -> None:
    click.echo(repr((out, nets, more)))


def test_a_tilde_is_the_home_folder_in_every_path(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    other = str(Path("~root").expanduser()) if hasattr(os, "getuid") else str(tmp_path)
    somebody = "~root" if hasattr(os, "getuid") else "~"
    main(paths, ["--out=~/a/b", "--net=~/c", "--net=hf://user/~x", "--net=https://host/~d/e", f"{somebody}/f", "g~"])
    expected = (tmp_path / "a" / "b", (f"{tmp_path}/c", "hf://user/~x", "https://host/~d/e"), (f"{other}/f", "g~"))
    assert capsys.readouterr().out == f"{expected!r}\n"

    with pytest.raises(SystemExit):
        main(paths, ["--out=~nobody-of-this-name/a"])
    assert "no user 'nobody-of-this-name'; for a path that begins with ~, type ./~nobody" in capsys.readouterr().err
    (tmp_path / "~file").touch()
    main(paths, ["--out=~file"])
    assert "~file" in capsys.readouterr().out


def test_paths_and_urls_that_are_none_are_one_line(capsys):
    for name in ("n" * 256, "n" * 5000, "a/" * 3000, "https://[::1", "HTTP://[x]/a.zip", "http://a:99999/"):
        with pytest.raises(SystemExit) as end:
            main(paths, [f"--net={name}"])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and len(error) < 500
    main(paths, ["--net=" + "n" * 200, "--net=s3://" + "n" * 300, "--net=user/name"])
