"""Files of the safetensors format: written by us, read by its library.

The library's own writer leaves a second temporary file if it is killed, tells an error of the system as text only, and
orders the header by chance.
"""

import json
import os
from collections.abc import Mapping

import numpy as np

_KINDS = {"f": "F", "i": "I", "u": "U"}  # of NumPy, and as the header calls them


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write `tensors`, of floating-point numbers or integers, to `path`: the same bytes for the same arguments.

    The format: the length of the header in 8 bytes, the header in JSON, padded with spaces, and the tensors without
    gaps, those of the largest type first, so that each is aligned.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        value = tensors[name]
        start, end = end, end + value.nbytes
        dtype = f"{_KINDS[value.dtype.kind]}{8 * value.dtype.itemsize}"
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).data)
