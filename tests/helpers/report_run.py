"""The folder of a run for tests of its report: everything that a report can show, without training."""

import json
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from edm2.report.document import render
from edm2.report.record import read_run
from tests.helpers.tiny import tiny_config
from training.images.sheet import write_sheet

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
COMMAND = "python train_edm2.py --outdir=run --preset=fashion --duration=4Ki"


def stats_line(nimg: int, **more: Any) -> dict[str, Any]:
    """A line of stats.jsonl after `nimg` images."""
    return {
        "Loss/loss": 1 / (1 + nimg / 1000),
        "Loss/learning_rate": 0.01,
        "Progress/kimg": nimg / 1e3,
        "Timing/total_sec": nimg / 50,
        "Timing/sec_per_tick": 9.0,
        "Timing/sec_per_kimg": 20.0,
        "Timing/maintenance_sec": 1.0,
        "Resources/cpu_mem_gb": 0.5,
        "Resources/peak_gpu_mem_gb": 0.0,
        "Resources/peak_gpu_mem_reserved_gb": 0.0,
        "timestamp": NOW.timestamp() - 3600 + nimg / 50,
        **more,
    }


def write_stats(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> None:
    """Write stats.jsonl, and `tail` after it."""
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "stats.jsonl").write_text(text, encoding="utf-8")


def write_grid(folder: Path, nimg: int, *, size: int = 8, rows: int = 3, columns: int = 2) -> Path:
    """A sample grid whose images are plain, in a gray level that depends on row, column and time."""
    images = np.zeros([rows * columns, 3, size, size], dtype=np.uint8)
    for index in range(rows * columns):
        images[index] = gray_of(index // columns, index % columns, nimg)
    record = {
        "format": "edm2-samples", "format_version": 1, "nimg": nimg, "ema_std": 0.1, "classes": list(range(rows)),
        "seeds": np.arange(rows * columns).reshape(rows, columns).tolist(), "steps": 5, "image": [3, size, size],
        "gap": 2, "label_dim": rows,
    }  # fmt: skip
    path = folder / f"samples-{nimg // 1000:07d}.png"
    write_sheet(path, images, num_columns=columns, texts={"edm2": json.dumps(record)})
    return path


def gray_of(row: int, column: int, nimg: int) -> int:
    """The gray level of an image in `write_grid`."""
    return 10 + row * 60 + column * 20 + nimg // 1000


def write_run(folder: Path) -> Path:
    """A finished run of two sessions with metrics, grids, snapshots, a checkpoint and a sweep."""
    folder.mkdir(parents=True)
    config = tiny_config(Path("data.zip"), duration=4096)
    (folder / "training_options.json").write_text(config.to_json())
    lines = [stats_line(nimg) for nimg in range(256, 4097, 256)]
    for line in lines[3::4]:
        kimg = line["Progress/kimg"]
        line |= {"Metrics/fid-0.050": 50 / kimg, "Metrics/fid-0.100": 50 / kimg + (kimg - 3) ** 2}
        line |= {"Metrics/best_fid": f"network-snapshot-{int(kimg):07d}-0.050.pkl"}
    write_stats(folder, lines)
    sessions = [
        {"started": "2026-11-24T10:00:00+00:00", "nimg": nimg, "command": COMMAND, "processes": 1, "device": "cpu"}
        for nimg in (0, 2048)
    ]
    (folder / "sessions.jsonl").write_text("".join(json.dumps(session) + "\n" for session in sessions))
    for nimg in (1024, 2048, 3072, 4096):
        write_grid(folder, nimg)
        for std in ("0.050", "0.100"):
            (folder / f"network-snapshot-{nimg // 1000:07d}-{std}.pkl").touch()
    (folder / "training-state-0000004.pt").touch()
    points = [
        {"ema_std": std, "guidance": weight, "fit": fit, "values": {"fid": [score]}, "mean": {"fid": score}}
        for std, weight, fit, score in (
            (0.05, 1.0, 0.01, 9.0), (0.1, 1.0, 0.01, 7.0), (0.2, 1.0, 0.3, 8.0), (0.05, 2.0, 0.01, 6.5),
        )
    ]  # fmt: skip
    record = {"format": "edm2-sweep", "format_version": 1, "settings": {"num_images": 500}, "points": points}
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def page_of(folder: Path, *sweeps: Path) -> tuple[str, Page]:
    """The report of a run, and what it is made of."""
    text = render(read_run(folder, sweeps), now=NOW)
    return text, Page(text)
