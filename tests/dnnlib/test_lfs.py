"""A Git LFS pointer in place of a file is named as such by everything that reads files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dnnlib.errors import ConfigError
from training.condition.source_images import FileImages
from training.conversion.open_source import open_source
from training.dataset.image_folder import ImageFolderDataset
from training.dataset.image_set import ImageSet
from training.metrics.detectors.common import read_tensors
from training.metrics.reference import load_stats
from training.metrics.reference_images import open_reference
from training.snapshot import load_snapshot
from training.toy.toy_files import load_toy_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("net.pkl", load_snapshot),
        ("net.safetensors", load_snapshot),
        ("toy.pkl", load_toy_model),
        ("ref.pkl", load_stats),
        ("ref.npz", open_reference),
        ("weights.pth", read_tensors),
        ("data.zip", ImageFolderDataset),
        ("data/a.png", lambda path: ImageFolderDataset(path.parent)),
        ("data/a.npy", lambda path: ImageFolderDataset(path.parent)),
        ("images.zip", ImageSet),
        ("images/a.png", lambda path: ImageSet(path.parent)[0]),
        ("samples.npz", ImageSet),
        ("samples.npy", ImageSet),
        ("a.png", lambda path: FileImages(path, 3).read(0)),
        *[(f"set.{end}", open_source) for end in ("zip", "tar", "tar.gz", "parquet", "npz", "npy", "mdb")],
        ("parquet/a.parquet", lambda path: open_source(path.parent)),
        ("tars/a.tar", lambda path: open_source(path.parent)),
    ],
)
def test_pointers_are_named(tmp_path: Path, name: str, read: Callable[[Path], Any]):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"it is a Git LFS pointer, not the file itself; run git lfs pull") as caught:
        read(path)
    assert path.stem.removesuffix(".tar") in str(caught.value)
