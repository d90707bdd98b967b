"""Pickles read as data: what plain files hold comes back, and nothing that a hostile file asks for happens."""

import io
import os
import pickle
import random
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dnnlib import EasyDict
from dnnlib.errors import ConfigError
from torch_utils import pickle_machine
from torch_utils.safe_pickle import StoredObject, Word, read_pickle

GOLDEN = Path(__file__).parent / "golden"


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


# Hostile files. Each would, in an ordinary unpickler, run something that makes the marker file.


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


def stack_global(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


def storage(payload: bytes) -> bytes:
    """A pickle that loads `payload` as a storage."""
    body = b"B" + struct.pack("<I", len(payload)) + payload
    return b"\x80\x04" + stack_global("torch.storage", "_load_from_bytes") + body + b"\x85R."


def legacy(described: bytes, keys: bytes = b"\x80\x02]X\x01\x00\x00\x00ka.", rest: bytes = b"") -> bytes:
    """A file in torch.save's older form around the pickle `described`."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join(pickle.dumps(part, 2) for part in head) + described + keys + rest


def torch_saved(value: Any, *, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def hostile(marker: str) -> dict[str, bytes]:
    command = f"echo > {marker}" if sys.platform != "win32" else f"type nul > {marker}"
    system, code = os.system.__module__, f"open({marker!r}, 'w')"
    argument = b"X" + struct.pack("<I", len(command)) + command.encode()
    name = f"{system} system".encode()
    reconstruct = stack_global("torch_utils.persistence", "_reconstruct_persistent_obj")
    tensor = stack_global("torch._utils", "_rebuild_tensor_v2")
    easy = stack_global("dnnlib.util", "EasyDict")
    huge = pickle.dumps(("storage", Word("x"), "k", "cpu", 2**60, None), 2)
    return {
        "GLOBAL and REDUCE": b"c" + name.replace(b" ", b"\n") + b"\n" + argument + b"\x85R.",
        "STACK_GLOBAL and REDUCE": b"\x80\x04" + stack_global(system, "system") + argument + b"\x85R.",
        "INST": b"(" + argument + b"i" + name.replace(b" ", b"\n") + b"\n.",
        "OBJ": b"\x80\x02(c" + name.replace(b" ", b"\n") + b"\n" + argument + b"o.",
        "NEWOBJ": b"\x80\x04" + stack_global(system, "system") + argument + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + stack_global(system, "system") + argument + b"\x85}\x92.",
        "BUILD on a known function": b"\x80\x04" + reconstruct + b"}" + short("__code__") + b"Nsb.",
        "BUILD with slots": b"\x80\x04" + reconstruct + b"N}" + short("__defaults__") + b"Ns\x86b.",
        "BUILD on a dictionary": b"\x80\x04" + easy + b")\x81}" + short("__class__") + easy + b"sb.",
        "eval": pickle.dumps(Call(eval, code)),
        "exec": pickle.dumps(Call(exec, code)),
        "getattr chain": pickle.dumps(Call(getattr, Call(getattr, "", "__class__"), "__base__")),
        "protocol 0": pickle.dumps(Call(eval, code), 0),
        "dotted name": b"\x80\x04" + stack_global("collections", "OrderedDict.fromkeys") + b"]\x85R.",
        "function of a known module": b"\x80\x04" + stack_global("torch.storage", "os.system") + argument + b"\x85R.",
        "storage with a call, older form": storage(legacy(pickle.dumps(Call(eval, code), 2))),
        "storage with a call, torch.save": storage(torch_saved(Call(eval, code), new=False)),
        "storage with a call, zip form": storage(torch_saved(Call(eval, code), new=True)),
        "storage with a foreign type": storage(legacy(b"\x80\x02(X\x07\x00\x00\x00storagecbuiltins\neval\ntQ.")),
        "storage of a huge size": storage(
            legacy(huge.replace(b"ctorch_utils.safe_pickle\nWord\n", b"ctorch\nHalfStorage\n"))
        ),
        "bare pickle as storage": storage(pickle.dumps(Call(eval, code))),
        "tensor over anything": b"\x80\x04" + tensor + b"(" + short("x") + b"K\x00)))NtR.",
        "object array": pickle.dumps(np.array([Call(eval, code)], dtype=object)),
        "array with fields": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
        "array of text": pickle.dumps(np.array(["text"])),
        "extension code": b"\x80\x02\x82\x01.",
        "persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "persistent id as text": b"Pid\n.",
        "out-of-band buffer": b"\x80\x05\x97.",
        "unknown opcode": b"\x80\x04\xff.",
        "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
        "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
        "negative length": b"\x80\x02T" + struct.pack("<i", -1) + b"abc.",
        "huge integer": b"\x80\x02\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000 + b".",
        "unhashable key": b"\x80\x02}]Ns.",
        "deep tuple as key": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",
        "empty stack": b"\x80\x02.",
        "no mark": b"\x80\x02t.",
        "unset memo": b"\x80\x02h\x05.",
        "no end": b"\x80\x02]",
        "more after the end": b"\x80\x02N.N.",
        "empty": b"",
        "not a pickle": b"PK\x03\x04" + bytes(50),
        "html": b"<!DOCTYPE html><html></html>",
        "torch.save": torch_saved({"a": torch.ones(2)}, new=True),
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_a_hostile_file_gives_one_clear_error_and_runs_nothing(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(ConfigError) as caught:
        read(hostile(str(marker))[name])
    assert str(caught.value).startswith("file.pkl: ") and "\n" not in str(caught.value)
    assert not marker.exists()


def test_the_corpus_would_run_in_an_ordinary_unpickler(tmp_path: Path) -> None:
    for name in ("GLOBAL and REDUCE", "STACK_GLOBAL and REDUCE", "INST", "eval", "exec", "object array"):
        marker = tmp_path / name.replace(" ", "-")
        value = pickle.loads(hostile(str(marker))[name])
        assert marker.exists(), name
        del value


def test_the_error_names_the_offending_global() -> None:
    with pytest.raises(ConfigError, match=r"refers to 'builtins\.eval'"):
        read(pickle.dumps(Call(eval, "1")))
    with pytest.raises(ConfigError, match=r"_load_from_bytes': it refers to '__builtin__\.eval'"):
        read(storage(torch_saved(Call(eval, "1"), new=False)))


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


def test_deep_nesting_is_no_recursion() -> None:
    value = read(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")
    depth = 0
    while value:
        value, depth = value[0], depth + 1
    assert depth == 199_999


def test_every_truncation_is_refused() -> None:
    data = (GOLDEN / "snapshots/toy.pkl").read_bytes()
    for length in [*range(0, 300), *range(300, len(data), 997)]:
        with pytest.raises(ConfigError):
            read(data[:length])


def test_flipped_bits_give_data_or_one_error() -> None:
    data = (GOLDEN / "snapshots/toy.pkl").read_bytes()
    generator = random.Random(0)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(data)
        damaged[generator.randrange(len(data) // 2)] ^= 1 << generator.randrange(8)
        try:
            read(bytes(damaged))
            outcomes.add("data")
        except ConfigError:
            outcomes.add("error")
    assert outcomes == {"data", "error"}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.pkl"):
        read_pickle(tmp_path / "no.pkl")
