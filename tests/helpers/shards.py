"""Shards of small data sets for tests, and what is expected of them."""

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from dnnlib.errors import ConfigError
from training.streaming.cache import ShardCache
from training.streaming.streamed import StreamedDataset

COUNTS = (7, 5, 0, 9, 6)  # images in each shard
TOTAL = sum(COUNTS)


def png(rng: np.random.Generator, size: int = 8) -> bytes:
    data = io.BytesIO()
    PIL.Image.fromarray(rng.integers(0, 256, [size, size, 3], dtype=np.uint8)).save(data, format="PNG")
    return data.getvalue()


def write_shards(
    folder: Path, *, counts: tuple[int, ...] = COUNTS, number: bool = True, padding: int = 0, labels: bool = True
) -> Path:
    """Files set-00000.zip, ... in `folder`, with images numbered from one to the next; `padding` bytes in each."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    names = iter(f"00000/img{i:08d}.png" for i in range(sum(counts)))
    for shard, count in enumerate(counts):
        with zipfile.ZipFile(folder / f"set-{shard:05d}.zip", "w") as file:
            entries = [(next(names), int(rng.integers(4))) for _ in range(count)]
            for name, _ in entries:
                file.writestr(name, png(rng))
            file.writestr(f"padding{shard}.txt", bytes(padding))
            about: dict[str, Any] = {"labels": entries if labels else None}
            if number:
                about["shard"] = [shard, len(counts)]
            file.writestr("dataset.json", json.dumps(about))
    return folder


def write_tar(path: Path, entries: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def stream(url: str, *, buffer: int = 8, cache_bytes: int = 1 << 30, **options: Any) -> StreamedDataset:
    return StreamedDataset(url, buffer=buffer, cache_bytes=cache_bytes, **options)


def cached(cache: ShardCache) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in cache.folder.glob("*") if path.name[0] != ".")


def leftovers(cache: ShardCache) -> list[str]:
    return [path.name for path in cache.folder.iterdir() if path.suffix == ".part"]


def one_line_error(action: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as failure:
        action()
    assert "\n" not in str(failure.value)
    return str(failure.value)


def plain_order(counts: tuple[int, ...], seed: int, buffer: int, copies: int, epoch: int) -> list[list[int]]:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    filled = [shard for shard, count in enumerate(counts) if count]
    shards = [filled[i] for i in np.random.default_rng([seed, epoch]).permutation(len(filled))]
    windows: list[list[int]] = [[]]
    for shard in shards:
        if len(windows[-1]) >= buffer:
            windows.append([])
        windows[-1] += range(starts[shard], starts[shard] + counts[shard])
    result = []
    for number, images in enumerate(windows):
        items = [image + copy * sum(counts) for copy in range(copies) for image in images]
        permutation = np.random.default_rng([seed, epoch, number]).permutation(len(items))
        result.append([items[i] for i in permutation])
    return result
