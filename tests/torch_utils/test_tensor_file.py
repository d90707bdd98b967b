"""Our writer of safetensors files against the library's reader."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from torch_utils.tensor_file import save_tensors


@pytest.mark.parametrize("name", ["tensor", "σ", 'with "quotes"'])
def test_the_library_reads_what_was_written(tmp_path: Path, name: str):
    tensors = {
        name: np.arange(6, dtype=np.float16).reshape(2, 3).T,  # not contiguous
        "double": np.array([0.1, np.nan, np.inf]),
        "scalar": np.array(3, dtype=np.int64),
        "bytes": np.arange(3, dtype=np.uint8),
        "empty": np.zeros([0, 4], dtype=np.float32),
    }
    save_tensors(tmp_path / "a", tensors, {"format": "x", "key": name})
    with safe_open(tmp_path / "a", framework="np") as file:
        assert file.metadata() == {"format": "x", "key": name}
        assert set(file.keys()) == set(tensors)
        for key, value in tensors.items():
            found = file.get_tensor(key)
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value)


def test_the_same_tensors_in_another_order_make_the_same_bytes(tmp_path: Path):
    tensors = {"b": np.ones(3), "a": np.zeros(2, dtype=np.float32), "c": np.zeros(2)}
    save_tensors(tmp_path / "1", tensors, {"x": "1", "y": "2"})
    save_tensors(tmp_path / "2", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
