"""Pickles read as data: what plain files hold comes back, and nothing that a hostile file asks for happens."""

import io
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dnnlib import EasyDict
from dnnlib.errors import ConfigError, one_line
from tests.helpers.paths import GOLDEN_DIR
from torch_utils.pickles import machine as pickle_machine
from torch_utils.pickles.safe_pickle import StoredObject, Word, read_pickle

GOLDEN = GOLDEN_DIR


def read(data: bytes) -> Any:
    return read_pickle(io.BytesIO(data), "file.pkl")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.detach(), b) and a.dtype == b.dtype
    if isinstance(a, np.ndarray):
        return type(b) is np.ndarray and a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b) and type(a) is type(b)


PLAIN: dict[str, Any] = {
    "values": [None, True, 3, -1, 2**70, 1.5, "text", "ø", b"", b"\xff\x00", {1, 2}],
    "nested": [(), (1,), (1, 2, 3, 4), {"a": [1]}, [[]]],
    "easy": EasyDict(a=1, b=EasyDict(c=[])),
    "ordered": OrderedDict(),
    "tensor": torch.arange(12.0).reshape(3, 4)[:, ::2],
    "parameter": nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
    "scalar": torch.tensor(2.0).half(),
    "none": torch.zeros(0, 3),
    "array": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
    "number": np.float32(3),
}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_comes_back(name: str, protocol: int) -> None:
    value = read(pickle.dumps(PLAIN[name], protocol))
    values = zip(PLAIN[name], value, strict=True) if isinstance(value, list) else [(PLAIN[name], value)]
    assert all(same(a, b) for a, b in values)


def test_sizes_devices_and_dtypes_are_words_and_text() -> None:
    value = [torch.Size([1, 2]), torch.device("cpu"), torch.float16]
    assert read(pickle.dumps(value)) == [(1, 2), "cpu", Word("torch.float16")]


def test_big_endian_arrays_become_native() -> None:
    array = np.arange(3, dtype=">f8")
    assert same(read(pickle.dumps(array)), np.arange(3.0))


@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_of_either_numpy_are_read(core: str) -> None:
    data = pickle.dumps([np.arange(3.0), np.float64(2)], 2)
    for module in (b"numpy.core.", b"numpy._core."):
        data = data.replace(module, f"numpy.{core}.".encode())
    array, number = read(data)
    assert array.tolist() == [0, 1, 2] and number == 2


def test_shared_values_stay_shared() -> None:
    first, second = read(pickle.dumps([a := [1], a]))
    assert first is second


def test_containers_become_inert() -> None:
    stored = read(pickle.dumps(nn.Sequential(nn.ModuleDict({"a": nn.ModuleList()}))))
    assert isinstance(stored, StoredObject) and stored.class_name == "Sequential"
    assert stored.state["_modules"]["0"].state["_modules"]["a"].class_name == "ModuleList"


def test_published_objects_become_inert_and_keep_their_source_as_text() -> None:
    tree = read_pickle(GOLDEN / "snapshots/rgb-cond-guide.pkl")
    assert set(tree) == {"ema", "encoder", "dataset_kwargs", "loss_fn"} and type(tree) is EasyDict
    assert tree.loss_fn.class_name == "EDM2Loss" and tree.loss_fn.state["P_mean"] == -0.8
    assert tree.ema.source == 'raise RuntimeError("the source code embedded in this pickle was executed")\n'


def test_a_toy_model_and_a_dataset_reference_go_through_the_same_door() -> None:
    toy = read_pickle(GOLDEN / "snapshots/toy.pkl")
    assert toy.class_name == "ToyModel" and toy.state["_init_kwargs"] == {"num_layers": 4, "hidden_dim": 32}
    reference = read_pickle(GOLDEN / "dataset-ref.pkl")
    sigma = reference["fid"]["sigma"]
    assert reference["num_images"] == 50000 and sigma.dtype == np.float64 and np.array_equal(sigma, sigma.T)


def test_a_tensor_cannot_be_larger_than_its_storage() -> None:
    data = pickle.dumps(torch.zeros(3, 1), 2)
    assert read(data).shape == (3, 1)
    widened = data.replace(b"K\x03K\x01\x86", b"K\x03K\x09\x86", 1)
    assert widened != data
    with pytest.raises(ConfigError, match="over a storage of 3 values"):
        read(widened)


def test_the_number_of_steps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MAX_OPCODES", 1000)
    with pytest.raises(ConfigError, match="more than 1000 opcodes"):
        read(b"\x80\x02" + b"N0" * 500 + b"N.")


def test_nesting_is_bounded() -> None:
    def nested(depth: int) -> bytes:
        return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."

    value, depth = read(nested(100)), 1
    while value:
        value, depth = value[0], depth + 1
    assert depth == 100
    with pytest.raises(ConfigError, match="nested more than 100 deep"):
        read(nested(101))


def test_what_is_shared_may_be_so_within_reason() -> None:
    shared = ["text"] * 1000
    assert read(pickle.dumps([shared] * 1000)) == [shared] * 1000
    with pytest.raises(ConfigError, match="shared too often"):
        read(pickle.dumps([shared] * 3000))


def test_the_same_bytes_may_be_used_a_few_times() -> None:
    word, text = b"c_codecs\nencode\nq\x000", b"X\x10\x27\x00\x00" + b"a" * 10_000 + b"q\x010"
    latin = b"X\x06\x00\x00\x00latin1q\x020"

    def copies(count: int) -> bytes:
        return b"\x80\x02" + word + text + latin + b"(" + b"h\x00h\x01h\x02\x86R" * count + b"t."

    assert read(copies(4)) == (b"a" * 10_000,) * 4
    with pytest.raises(ConfigError, match="again and again"):
        read(copies(10))


@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_of_one_hash_cannot_take_quadratic_time(protocol: int) -> None:
    """Text may be any number of keys: its hashes are salted."""
    numbers = [n * sys.hash_info.modulus for n in range(101)]
    assert {hash(n) for n in numbers} == {0}
    for kind in (set, frozenset, dict.fromkeys):
        if kind is not frozenset or protocol == 4:  # which protocol 2 has no word for
            few, texts = kind(numbers[:100]), kind(map(str, range(5000)))
            assert read(pickle.dumps(few, protocol)) == few and read(pickle.dumps(texts, protocol)) == texts
            for many in (kind(numbers), kind([*texts, 1.5])):
                with pytest.raises(ConfigError, match="more than 100 keys, with numbers among them"):
                    read(pickle.dumps(many, protocol))


def test_errors_are_one_printable_line_of_bounded_length() -> None:
    assert (
        one_line(ValueError("a\x1b[2J\n\tb\u202e ø")) == "a?[2J b? ø" and len(one_line(ValueError("a" * 1000))) == 400
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.pkl"):
        read_pickle(tmp_path / "no.pkl")
