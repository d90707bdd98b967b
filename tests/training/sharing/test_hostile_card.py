"""A stranger's file brings no markup and no lines into the model card, and no number that Python cannot take."""

import dataclasses
import re
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from training.sharing.convert_network import _read_result
from training.sharing.model_card import CardFacts, _training, model_card
from training.snapshot import load_snapshot, save_snapshot

NET = GOLDEN_DIR / "snapshots" / "rgb-cond.pkl"


def test_markup_and_line_breaks_stay_text() -> None:
    evil = "a\n\n# Head\r\n<img src=x onerror=alert(1)> [link](javascript:x) | `code` **b**"
    info = {"source": evil, evil: evil, "note": [evil], "training_command": f"x ``` {evil}"}
    text = _training(dataclasses.replace(load_snapshot(str(NET)), info=info), CardFacts())
    table = "\n".join(line for line in text.partition("Command:")[0].splitlines() if "Head" in line)
    assert table.count("Head") >= 4
    assert not any(line.lstrip().startswith("# Head") for line in table.splitlines())
    assert not any(sign in table.replace("\\" + sign, "") for sign in ("<", "[", "`"))
    assert text.count("```") == 2


@pytest.mark.parametrize(
    "key", ["nimg", "ema_std", "network", "encoder", "loss", "dataset_kwargs", "info", "format_version"]
)
@pytest.mark.parametrize(
    "text", ["1" + "0" * 400, "-1" + "0" * 400, "9" * 5000, "1e999", "[" * 100_000, "NaN", "{}", "\x00"]
)
def test_header_entries_that_nobody_writes(key: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_snapshot(load_snapshot(str(NET)), path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, {**metadata, key: text})
    try:
        load_snapshot(str(path))
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def test_results_of_a_stranger_stay_text() -> None:
    evil = "x`|\n\n# Head\n<img src=x>"
    snapshot = dataclasses.replace(load_snapshot(str(NET)), dataset_kwargs={"path": f"a/{evil}", "xflip": evil})
    entry = {"minimum": 1.0, "mean": evil, "std": evil}
    result = {"results": {evil: entry}, "num_images": evil, "command": evil}
    text = model_card(snapshot, "net", CardFacts(scores={evil: 2.0}, results=(result,)))
    assert not any(line.startswith("# Head") for line in text.splitlines())
    for line in text.splitlines():
        if "Head" in line:
            outside = re.sub(r"`[^`]*`", "", line.replace("\\`", ""))
            assert "<img" not in outside.replace("\\<", "")
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 5)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"results": {"a": {"minimum": %s}}}' % ("9" * 400)])
def test_results_that_nobody_writes_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a result"):
        _read_result(tmp_path / "r.json")
