"""Every command and Python example of README.md, docs/ and the scripts' --help, run at small size, page by page.

tests/helpers/documented_rules.py says how each is made small, tests/helpers/documented_files.py what files a reader
would have.
"""

import contextlib
import glob
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import dnnlib.download
import training.metrics.detectors
from tests.helpers.documented_files import FILES, URLS, make_for
from tests.helpers.documented_pages import ROOT, Snippet, pages, snippets
from tests.helpers.documented_rules import NOT_RUN, PYTHON, RULES, Rule
from tests.helpers.documented_run import run_script
from tests.helpers.ranks import run_ranks
from tests.helpers.stand_in_detector import StandInDetector
from torch_utils import distributed
from training.metrics import available as plan
from training.toy import sample
from training.toy import toy_plot as plot

PAGES = pages()
# Options that name what a command writes.
WRITTEN = {"--outdir", "--out", "--dest", "--grid", "--json", "--plot", "--save"}


class Sandbox:
    """A folder in which a reader would work: commands run there, and the files that they need are made for them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._provided: set[str] = set()

    def run(self, snippet: Snippet) -> None:
        """Run it, unless it is on the list of what is not run."""
        if snippet.kind == "python":
            self._python(snippet)
        elif snippet.kind == "script":
            _check_shell(snippet)
        elif not any(re.search(pattern, snippet.text) for pattern in NOT_RUN):
            self._command(snippet)

    def _command(self, snippet: Snippet) -> None:
        rules = [rule for rule in RULES if rule.fits(snippet.text)]
        assert rules, f"{snippet.where}\nhas no rule in tests/helpers/documented_rules.py"
        words = shlex.split(snippet.text, comments=True)
        launched = words[0] == "torchrun"
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert launched or words[:script] == ["python"], snippet.where
        args = _made_small(words[script + 1 :], rules)
        for word in args:
            if word.partition("=")[0] not in WRITTEN:
                self.provide(word)
            elif word.partition("=")[2] in self._provided:  # made for an earlier command; this one makes it itself
                (self.path / word.partition("=")[2]).unlink()
        args = [name for word in map(_of_this_run, args) for name in _expanded(word)]
        processes = max(rule.processes for rule in rules)
        if launched and processes > 1:
            run_ranks(words[script], *args, num=processes)
        else:
            run_script(words[script], args)
        self._require_results(snippet, args)

    def _require_results(self, snippet: Snippet, args: list[str]) -> None:
        if "-n" in args or "--dry-run" in args or "--list-presets" in args:
            return
        for word in args:
            option, _, value = word.partition("=")
            if option in WRITTEN:
                there = glob.glob(f"{value.removesuffix('.zip')}*")
                assert there, f"{snippet.where}\ndid not write {value}"

    def _python(self, snippet: Snippet) -> None:
        text = snippet.text
        if snippet.file is not None:  # of which a later command is
            (self.path / snippet.file).write_text(text, encoding="utf-8")
            return
        for pattern, replacement in PYTHON:
            text = re.sub(pattern, replacement, text)
        for name in re.findall(r'"([^"\n]+)"', text):
            self.provide(name)
            text = text.replace(f'"{name}"', f'"{_of_this_run(name)}"')
        exec(compile(text, snippet.where, "exec"), {"__name__": "documented"})

    def provide(self, word: str) -> None:
        """Make the file that the word (`FILE`, `--option=FILE`, `--option=FILE,FILE`) names, where there is none."""
        name = (word.partition("=")[2] if word.startswith("-") else word).removeprefix("./")
        path = self.path / name.replace("*", "net")
        if name and not path.exists() and make_for(FILES, name, path) and path.is_file():
            self._provided.add(name)


def _made_small(words: list[str], rules: list[Rule]) -> list[str]:
    """The words of a command with the rules' options in the place of its own; alternative names are one option."""
    for rule in rules:
        for option in [*rule.put.split(), *rule.instead.split()]:
            name = option.partition("=")[0]
            names = {name, "--num"} if name == "--num-images" else {name}
            given = [word for word in words if word.partition("=")[0] in names]
            if given or option in rule.put.split():
                words = [word for word in words if word not in given] + [option]
        if rule.replace is not None:
            words = [re.sub(*rule.replace, word) for word in words]
    return words


def _of_this_run(word: str) -> str:
    """A run that was made small ends earlier: where {prefix}-{kimg}-{std} is missing, the newest kimg is meant."""
    match = re.fullmatch(r"(?P<before>(--\w+=)?)(?P<prefix>.*-)(?P<kimg>\d{7})(?P<after>-\d\.\d{3}\.\w+)", word)
    if match is None or Path(word.removeprefix(match["before"])).exists() or "://" in word:
        return word
    return match["before"] + max(glob.glob(f"{match['prefix']}*{match['after']}"), default=word)


def _expanded(word: str) -> list[str]:
    """As a shell does it with `*`."""
    return sorted(glob.glob(word)) if "*" in word and not word.startswith("-") else [word]


def _check_shell(snippet: Snippet) -> None:
    """That bash can read it: what it starts is for a cluster."""
    bash = shutil.which("bash")
    if bash is not None:
        subprocess.run([bash, "-n"], input=snippet.text, text=True, check=True, timeout=120)


def _from_the_table(path: Path, url: str, *_: object) -> None:
    assert make_for(URLS, url, path), f"{url} has no stand-in in tests/helpers/documented_files.py"


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """Without a network and without detectors' weights, and with all global switches put back afterwards."""
    path = tmp_path / "sandbox"
    path.mkdir()
    monkeypatch.chdir(path)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(dnnlib.download, "_fill", _from_the_table)
    for module in (training.metrics.detectors, plan):
        monkeypatch.setattr(module, "make_detector", lambda name, device, weights=None: StandInDetector(name))
    for detector in training.metrics.detectors.DETECTORS.values():
        monkeypatch.setattr(detector, "has_weights", lambda: True)
    # The size of the toy example's figure and of its measures.
    monkeypatch.setattr(plot, "_NUM_WIDE", 64)
    monkeypatch.setattr(plot, "_NUM_CLOSE", 64)
    monkeypatch.setattr(plot, "_NUM_CELLS", 20)
    monkeypatch.setattr(sample, "_THRESHOLD_SAMPLES", 64)
    for name in ("should_stop", "should_suspend", "request_suspend", "update_progress"):
        monkeypatch.setattr(distributed, name, getattr(distributed, name))  # examples replace them
    monkeypatch.syspath_prepend(str(ROOT))
    yield Sandbox(path)


@contextlib.contextmanager
def _hub(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub with the network of the examples, where the page names one."""
    if "hf://user/name" not in text:
        yield
        return
    from tests.helpers.fake_hub import serve_hub

    with serve_hub(tmp_path / "hub", monkeypatch) as hub:
        for revision in ("main", "v1.0"):
            hub.add("user/name", {"net.pkl": ROOT / "tests" / "golden" / "snapshots" / "rgb-cond.pkl"}, revision)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_all_that_a_page_shows_runs(
    page: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _hub("".join(snippet.text for snippet in snippets(page)), tmp_path, monkeypatch):
        for snippet in snippets(page):
            print(snippet.where, flush=True)
            sandbox.run(snippet)


def test_every_rule_and_every_reason_is_needed() -> None:
    commands = [snippet.text for page in PAGES for snippet in snippets(page) if snippet.kind == "command"]
    examples = [snippet.text for page in PAGES for snippet in snippets(page) if snippet.kind == "python"]
    assert [rule.of for rule in RULES if not any(rule.fits(command) for command in commands)] == []
    assert [of for of in NOT_RUN if not any(re.search(of, command) for command in commands)] == []
    assert [of for of, _ in PYTHON if not any(re.search(of, example) for example in examples)] == []


def test_a_command_without_a_rule_fails(sandbox: Sandbox) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:3: python new\.py.*\s+has no rule"):
        sandbox.run(Snippet(page="page.md", line=3, kind="command", text="python new.py --steps=2"))
    with pytest.raises(AssertionError, match="exit code 2"):
        sandbox.run(Snippet(page="page.md", line=3, kind="command", text="python generate_images.py --no-such=2"))


def test_blocks_lines_and_spans_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "Try `python a.py -n`.\n```\n# why\npython b.py \\\n    --x=1  # so\n```\n"
        "```text\npython no.py\n```\n```python\nx = 1\n```\n"
    )
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr("tests.helpers.documented_pages.ROOT", tmp_path)
    found = [(snippet.line, snippet.kind, snippet.text) for snippet in snippets("page.md")]
    assert found == [
        (1, "command", "python a.py -n"),
        (4, "command", "python b.py --x=1  # so"),
        (10, "python", "x = 1\n"),
    ]
