"""Training runs small enough for tests: a network of a few thousand weights on images of 8x8 pixels."""

import dataclasses
import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from training.config import NetworkConfig, TrainingConfig
from training.training_loop import TrainingRun

NETWORK = NetworkConfig(channels=4, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), channels_per_head=4)


def write_dataset(
    path: Path, *, num: int = 20, size: int = 8, channels: int = 3, num_classes: int = 3, labels: bool = True
) -> Path:
    """A ZIP file of random pictures, or of float32 raw latents where `channels` is 8."""
    rng = np.random.default_rng(0)
    names = [f"{i:03d}.{'npy' if channels == 8 else 'png'}" for i in range(num)]
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            data = io.BytesIO()
            if channels == 8:
                latents = rng.standard_normal([channels, size, size], dtype=np.float32)
                np.save(data, np.concatenate([latents[:4] * 4, np.abs(latents[4:]) * 0.1]))
            else:
                pixels = rng.integers(0, 256, [size, size, channels], dtype=np.uint8)
                PIL.Image.fromarray(pixels.squeeze()).save(data, format="PNG")
            file.writestr(name, data.getvalue())
        if labels:
            file.writestr("dataset.json", json.dumps({"labels": [[n, i % num_classes] for i, n in enumerate(names)]}))
    return path


def write_labels(path: Path, labels: list[Any] | None) -> Path:
    """Write the images of a data set with other labels."""
    with zipfile.ZipFile(write_dataset(path.with_name("plain.zip"))) as plain, zipfile.ZipFile(path, "w") as file:
        names = [name for name in plain.namelist() if name.endswith(".png")]
        for name in names:
            file.writestr(name, plain.read(name))
        pairs = None if labels is None else [[n, labels[i % len(labels)]] for i, n in enumerate(names)]
        file.writestr("dataset.json", json.dumps({"labels": pairs}))
    return path


def tiny_config(data: Path, **changes: Any) -> TrainingConfig:
    """A run of 6 iterations without any files; names of NetworkConfig's fields change the network."""
    fields = {field.name for field in dataclasses.fields(NetworkConfig)}
    network = dataclasses.replace(NETWORK, **{key: changes.pop(key) for key in list(changes) if key in fields})
    defaults: dict[str, Any] = {"batch": 8, "duration": 48, "rampup": 0.0, "status": 0, "snapshot": 0, "checkpoint": 0}
    return TrainingConfig(data=str(data), network=network, **{**defaults, **changes})


def train(run: TrainingRun) -> TrainingRun:
    """Carry `run` to its end, without what a script does beside it."""
    run.folder.path.mkdir(exist_ok=True)
    for _ in run:
        pass
    return run


def global_random_states() -> dict[str, Any]:
    """The states of all global random generators, for `assert_same_state`."""
    numpy_state: Any = np.random.get_state()
    keys = torch.from_numpy(numpy_state[1].astype(np.int64))
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [keys, *numpy_state[2:]]}


def flat_state(state: Any, prefix: str = "") -> dict[str, Any]:
    """All numbers and tensors of nested containers, each under the path to it."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in flat_state(value, f"{prefix}/{key}").items()}
    return {prefix: state}


def assert_same_state(first: Any, second: Any) -> None:
    """Bitwise the same tensors and numbers under the same names, apart from the time that it took."""
    a, b = flat_state(first), flat_state(second)
    assert a.keys() == b.keys()
    for key, value in a.items():
        if not key.endswith("/total_elapsed_time"):
            assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str = "") -> None:
    """Equal to `tolerance` relative to the largest expected entry."""
    assert actual.shape == expected.shape, name
    error = (actual - expected).abs().max().item()
    largest = expected.abs().max().item()
    assert error <= tolerance * largest, f"{name}: off by {error:.2e}, largest entry {largest:.2e}"
