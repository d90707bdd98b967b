"""Bytes of tensors inside pickles: whole files of torch.save, read by our own machine and never by torch.

Each file has one storage, in one of two forms: the older one, which tensors inside a pickle still have, and the ZIP
file that torch.save writes since PyTorch 1.6.
"""

import io
import zipfile
from dataclasses import dataclass
from typing import Any

import torch

from torch_utils.pickles.machine import Machine, Refused, Vocabulary, Word

# Start of a file in the older form.
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001

_ZIP_ENTRY = b"PK\x01\x02"
_MAX_ZIP_ENTRIES = 100  # torch.save writes about six

STORAGE_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}

_WORDS: Vocabulary = dict.fromkeys(
    [f"{module}.{name}" for module in ("torch", "torch.cuda") for name in STORAGE_DTYPES]
)


class Storage:
    """A storage: its values as a flat tensor."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values


@dataclass(frozen=True)
class _Described:
    key: str
    dtype: torch.dtype
    count: int


def load_storage(payload: bytes, values: bool = True) -> Storage:
    """Read the storage in `payload`. Without `values` it is on the meta device, after the same checks."""
    if type(payload) is not bytes:
        raise Refused("a storage that is not given as bytes")
    described, data = (_read_zip if payload[:4] == b"PK\x03\x04" else _read_legacy)(payload)
    if len(data) != described.count * described.dtype.itemsize:
        raise Refused(f"a storage of {described.count} values with {len(data)} bytes")
    if described.count == 0 or not values:
        return Storage(torch.empty(described.count, dtype=described.dtype, device="cpu" if values else "meta"))
    return Storage(torch.frombuffer(bytearray(data), dtype=described.dtype))


def _read_legacy(payload: bytes) -> tuple[_Described, memoryview]:
    machine = Machine(io.BytesIO(payload), _WORDS, _no_state, _describe)
    if machine.load() != _TORCH_MAGIC or machine.load() != _TORCH_PROTOCOL:
        raise Refused("a storage in an unknown form of torch.save")
    system = machine.load()
    if type(system) is not dict or system.get("little_endian") is not True:
        raise Refused("a storage written on a big-endian machine")
    described, keys = machine.load(), machine.load()
    if type(described) is not _Described or type(keys) is not list or len(keys) != 1 or keys[0] != described.key:
        raise Refused("a payload that is not one storage")
    if int.from_bytes(machine.read(8), "little") != described.count:
        raise Refused(f"a storage of {described.count} values with another number before them")
    return described, memoryview(payload)[len(payload) - machine.remaining() :]


def _read_zip(payload: bytes) -> tuple[_Described, bytes]:
    # For each entry of the directory Python makes an object of many times its size, so the entries are counted first,
    # by their signature. Random bytes of a tensor do not contain it a hundred times.
    if payload.count(_ZIP_ENTRY) > _MAX_ZIP_ENTRIES:
        raise Refused(f"a payload of more than {_MAX_ZIP_ENTRIES} files")
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as file:
            # torch.save does not compress. A compressed file could expand to any size.
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in file.infolist()):
                raise Refused("a compressed or encrypted payload")
            names = set(file.namelist())
            roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
            if len(roots) != 1:
                raise Refused("a payload that is not one storage")
            if f"{roots[0]}byteorder" in names and file.read(f"{roots[0]}byteorder") != b"little":
                raise Refused("a storage written on a big-endian machine")
            described = Machine(io.BytesIO(file.read(f"{roots[0]}data.pkl")), _WORDS, _no_state, _describe).load()
            if type(described) is not _Described or f"{roots[0]}data/{described.key}" not in names:
                raise Refused("a payload that is not one storage")
            return described, file.read(f"{roots[0]}data/{described.key}")
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise Refused(f"a damaged payload ({error})") from None


def _describe(reference: Any) -> _Described:
    """Parse a persistent id of torch.save: key, dtype and number of values of a storage."""
    tag, word, key, _location, count, *view = reference  # the older form has a view here, always None in current files
    if tag != "storage" or type(word) is not Word or type(key) is not str or view not in ([], [None]):
        raise Refused("a payload that is not a plain storage")
    if type(count) is not int or count < 0:
        raise Refused("a storage of an unknown number of values")
    return _Described(key, STORAGE_DTYPES[word.name.rsplit(".", 1)[-1]], count)


def _no_state(target: Any, state: Any) -> None:
    raise Refused("a payload that sets attributes")
