"""Reports of runs whose records have numbers, times and nesting that nobody writes: a page or one line."""

import json
import shlex
from pathlib import Path

import numpy as np
from click.testing import CliRunner

import report
from dnnlib.errors import ConfigError
from edm2.report.next_commands import commands_for
from edm2.report.record import read_run
from edm2.report.sample_grids import strip_of
from training.images.sheet import write_sheet

HUGE = int("9" * 400)
VALUES = [
    1e308,
    -1e308,
    HUGE,
    -HUGE,
    1e300,
    -1e300,
    0,
    -1,
    1e-320,
    float("nan"),
    float("inf"),
    10**15,
    "x",
    None,
    [],
    {},
]
KEYS = ["Progress/kimg", "timestamp", "Loss/loss", "Loss/learning_rate", "Timing/sec_per_kimg", "Timing/total_sec",
    "Timing/maintenance_sec", "Timing/sec_per_tick", "Resources/cpu_mem_gb", "Metrics/fid-0.100", "a/x"]  # fmt: skip


def lines(keys: list[str] = KEYS, **changed: object) -> str:
    """Statistics of 30 lines, the later half with `changed` in turns of sign."""
    plain = dict.fromkeys(keys, 1.5)
    found = []
    for i in range(30):
        changes = {} if i < 15 else {key: -v if i % 2 and type(v) in (int, float) else v for key, v in changed.items()}
        found.append(json.dumps({**plain, "Progress/kimg": i, **changes}))
    return "\n".join(found)


def reported(folder: Path) -> None:
    result = CliRunner().invoke(report.cmdline, [str(folder)])
    assert result.exception is None or isinstance(result.exception, ConfigError | SystemExit), result.exc_info


def test_statistics(tmp_path: Path) -> None:
    """Each key has each value. Charts take long to draw: the keys are tried together, each with another value."""
    measured, num = KEYS[2:], len(VALUES)
    texts = [lines(**{key: VALUES[(i + j) % num] for j, key in enumerate(measured)}) for i in range(num)]
    texts += [lines(**dict.fromkeys(measured, value)) for value in (1e308, HUGE, 1e-320)]
    texts += [lines(KEYS[:3], **dict.fromkeys(KEYS[:2], value)) for value in VALUES]
    for text in texts:
        (tmp_path / "stats.jsonl").write_text(text)
        reported(tmp_path)


def test_other_records(tmp_path: Path) -> None:
    (tmp_path / "stats.jsonl").write_text(lines([key for key in KEYS if not key.startswith(("Loss", "Metrics", "a/"))]))
    deep = [f"{'[' * n}{']' * n}" for n in (40, 60, 500, 900, 100_000)]
    texts = [json.dumps(value) for value in VALUES] + deep + ["9" * 5000]
    for text in texts:
        (tmp_path / "sessions.jsonl").write_text(f'{{"nimg": {text}}}\n{{"nimg": 1, "started": {text}}}\n{text}\n')
        (tmp_path / "training_options.json").write_text(f'{{"duration": {text}, "data": {text}, "x": {{"y": {text}}}}}')
        for key in ("ema_std", "guidance", "fit", "mean"):
            point = {"ema_std": "0.1", "guidance": "1", "fit": "0.1", "mean": '{"fid": 1}', key: text}
            body = ", ".join(f'"{name}": {value}' for name, value in point.items())
            (tmp_path / f"{key}.json").write_text(f'{{"format": "edm2-sweep", "points": [{{{body}}}]}}')
        reported(tmp_path)


def test_sample_grids_that_claim_anything(tmp_path: Path) -> None:
    """No count in one is listed, drawn or allocated; the commands for next steps quote what they take."""
    (tmp_path / "stats.jsonl").write_text(lines())
    (tmp_path / "network-snapshot-0000001-0.100.pkl").touch()
    image = np.zeros([6, 3, 8, 8], dtype=np.uint8)
    plain = {"format": "edm2-samples", "nimg": 1000, "classes": [0, 1, 2], "seeds": [[0, 1], [2, 3], [4, 5]],
        "image": [3, 8, 8], "gap": 2, "label_dim": 3, "steps": 5, "ema_std": 0.1}  # fmt: skip
    values = [*VALUES, 10**12, [10**12], [[10**12]], [["x; rm -rf ~"]], [[HUGE]], [[]], [None] * 3]
    for key in plain:
        for value in values:
            for number in (1, 2):
                texts = {"edm2": json.dumps(plain | {"nimg": 1000 * number} | {key: value})}
                write_sheet(tmp_path / f"samples-000000{number}.png", image, num_columns=2, texts=texts)
            record = read_run(tmp_path)
            for _, command in commands_for(record):
                assert len(shlex.split(command)) < 20 and len(command) < 2000
                assert "rm" not in shlex.split(command)
            strip_of(record.grids)
