"""Network files: one trained network with all that is needed to use it, as pickle, .safetensors or model folder."""

from training.snapshot.network_file import (
    SUFFIXES,
    Snapshot,
    SnapshotHeader,
    label_dropout,
    load_snapshot,
    nimg_from_kimg,
    parse_name,
    read_header,
    save_snapshot,
)

__all__ = [
    "SUFFIXES",
    "Snapshot",
    "SnapshotHeader",
    "label_dropout",
    "load_snapshot",
    "nimg_from_kimg",
    "parse_name",
    "read_header",
    "save_snapshot",
]
