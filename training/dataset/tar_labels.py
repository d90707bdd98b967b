"""Labels of WebDataset samples: what the .cls or .json file beside a picture in a tar says."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dnnlib.errors import ConfigError
from training.dataset.item_files import one_line
from training.dataset.label_file import Label, check_labels

SUFFIXES = (".cls", ".json")
_MAX_BYTES = 1 << 20


def sample_label(sizes: Mapping[str, int], read: Callable[[str], bytes], where: str) -> Any:
    """The label of a sample that consists of files of these `sizes`; None if it has none.

    A .cls file comes before a .json file, whose entry `label` or `cls` counts. `read(name)` gives the bytes of a file.
    Raises ConfigError for what holds no label.
    """
    for name in sorted((name for name in sizes if name.endswith(SUFFIXES)), key=lambda name: name.endswith(".json")):
        if sizes[name] > _MAX_BYTES:
            raise ConfigError(f"{where}: {name} has {sizes[name]} bytes, too many for a label")
        try:
            content = json.loads(read(name))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: {name} holds no label: {one_line(error)}") from None
        if name.endswith(".cls"):
            return content
        if isinstance(content, dict):
            label = content.get("label", content.get("cls"))
            if label is not None:
                return label
    return None


def all_or_none(names: Sequence[str], labels: Sequence[Any], where: str) -> list[Label] | None:
    """The labels, checked; None where no image has one. Raises ConfigError where some have."""
    missing = [name for name, label in zip(names, labels, strict=True) if label is None]
    if len(missing) == len(names):
        return None
    if missing:
        raise ConfigError(
            f"{where} has no label for {len(missing)} of {len(names)} images, first {missing[0]}; label all or none"
        )
    return check_labels(zip(names, labels, strict=True), where)
