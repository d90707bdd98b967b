"""docs/options/*.md are what the scripts' --help says."""

from pathlib import Path

import pytest

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
