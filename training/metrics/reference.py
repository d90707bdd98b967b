"""Statistics of image sets as files: the published .pkl and .npz, and our .safetensors (docs/metrics.md).

Statistics are a dictionary, with the published keys if they exist:
    num_images: int, absent if the file does not record it
    fid, fd_dinov2, fd_efflite0, sfid: {"mu": float64 [F], "sigma": float64 [F, F]}
    features: {detector: float32 [M, F]}, of some or all images; absent if none are kept
    logits: {detector: float32 [M, K]}, not written to files
    made_with: {package: version} that the numbers depend on, if the file notes it
"""

import json
import math
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dnnlib.atomic import atomic_path
from dnnlib.download import open_url
from dnnlib.errors import ConfigError, reason_of
from torch_utils.pickles.safe_pickle import file_format, read_pickle
from torch_utils.tensor_file import save_tensors
from training.dataset.sample_array import KEY, npz_arrays
from training.metrics.metric_table import DETECTORS, METRICS

Stats = dict[str, Any]

FORMAT = "edm2-metrics-reference"
VERSION = 1
SUFFIXES = (".pkl", ".safetensors")
FROM_IMAGES = "calculate_metrics.py ref makes statistics of images; its calc and gen also take images as --ref"

_NPZ_KEYS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}

_MAX_NPZ_BYTES = 1 << 30  # Inception's statistics take 34 MB

_MOMENTS = tuple(name for name, metric in METRICS.items() if metric.kind == "frechet")


def load_stats(path: str | os.PathLike[str], verbose: bool = True) -> Stats:
    """Read the statistics in the file or at the http(s) URL `path`. The first bytes tell the format, not the name.

    Nothing in the file is executed. `verbose` is accepted and prints nothing. Raises ConfigError for a file that is
    missing, damaged or does not hold statistics.
    """
    name = str(path)
    if os.path.isdir(path):
        raise ConfigError(f"{name} is a folder, not a file of statistics; {FROM_IMAGES}")
    local = Path(open_url(name, return_filename=True))
    try:
        kind = file_format(local)
        if kind == "zip":
            stats = _read_npz(local)
        elif kind == "safetensors":
            stats = _read_safetensors(local)
        else:
            stats = read_pickle(local, name)
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {reason_of(error)}") from None
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(name) else f"{name}: {message[:400]}") from None
    try:
        return _checked(stats)
    except ConfigError as error:
        raise ConfigError(f"{name} is damaged or not a reference file: {error}") from None


def save_stats(stats: Mapping[str, Any], path: str | os.PathLike[str], verbose: bool = True) -> None:
    """Write `stats` to `path`, whole or not at all: .pkl in the published layout, without features, or .safetensors.

    `verbose` is accepted and prints nothing.
    """
    path = Path(path)
    require_suffix(path)
    moments = {
        name: {key: np.asarray(stats[name][key]) for key in ("mu", "sigma")} for name in _MOMENTS if name in stats
    }
    notes: dict[str, Any] = {"num_images": int(stats["num_images"])} if "num_images" in stats else {}
    if "made_with" in stats:
        notes["made_with"] = dict(stats["made_with"])
    try:
        with atomic_path(path) as temp:
            if path.suffix == ".pkl":
                with open(temp, "wb") as file:
                    pickle.dump({**notes, **moments}, file, protocol=4)
            else:
                _write_safetensors(temp, notes, moments, stats.get("features", {}))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {reason_of(error)}") from None


def require_suffix(path: Path, *, keep_features: bool = False) -> None:
    """Raise ConfigError unless `save_stats` can write a file of this name, with features if `keep_features`."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} has none of the suffixes {' and '.join(SUFFIXES)} of reference files")
    if keep_features and path.suffix == ".pkl":
        raise ConfigError(f"{path} cannot hold features; --features needs a --dest that ends in .safetensors")


def require_statistics(path: Path, metrics: Sequence[str], *, num_images: int, num_features: int | None) -> None:
    """Raise ConfigError unless the file holds statistics of `num_images` images for `metrics`, and `num_features`.

    Files do not record which images these were.
    """
    stats = load_stats(path)
    needed = {name for name in metrics if METRICS[name].kind == "frechet"}
    rows = {len(found) for found in stats.get("features", {}).values()}
    lacks = sorted(needed - stats.keys())
    if stats.get("num_images") != num_images or lacks or rows - {min(num_features or 0, num_images)}:
        names = [name for name in _MOMENTS if name in stats]
        found = f"{stats.get('num_images')} images, {', '.join(sorted(names))}"
        raise ConfigError(
            f"{path} exists and holds other statistics ({found}, features of {max(rows, default=0)}) than those of"
            f" {num_images} images; name another file, or delete it"
        )
    if num_features and not rows:
        raise ConfigError(f"{path} exists and has no features; name another file, or delete it")


def _read_npz(path: Path) -> Stats:
    """Read mean and covariance of Inception's features, as in older published files, and what other programs add.

    These are `mu_s` and `sigma_s` of spatial features, and single features as `arr_0`, float [N, 2048].
    """
    arrays = npz_arrays(path)
    pairs = {name: keys for name, keys in _NPZ_KEYS.items() if set(keys) <= arrays.keys()}
    has_features = KEY in arrays and arrays[KEY].dtype.kind == "f"
    wanted = [key for keys in pairs.values() for key in keys] + [KEY] * has_features
    if not wanted:
        found = f"this one has {', '.join(list(arrays)[:4])}" if arrays else "this one lacks them"
        raise ConfigError(f"an .npz reference holds the arrays mu and sigma; {found}. {FROM_IMAGES}")
    if sum(math.prod(arrays[key].shape) * arrays[key].dtype.itemsize for key in wanted) > _MAX_NPZ_BYTES:
        raise ConfigError(f"it unpacks to more than {_MAX_NPZ_BYTES >> 20} MiB, too much for statistics")
    try:
        with np.load(path, allow_pickle=False) as file:
            values = {key: file[key] for key in wanted}
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds
        raise ConfigError(f"the file is damaged or cut short ({type(error).__name__})") from None
    stats: Stats = {name: {"mu": values[mu], "sigma": values[sigma]} for name, (mu, sigma) in pairs.items()}
    if has_features:
        rows = values[KEY]
        stats |= {"features": {"inception": rows}, "num_images": len(rows)}
        if "fid" not in stats and rows.ndim == 2 and len(rows) > 1:
            stats["fid"] = {"mu": rows.mean(0, np.float64), "sigma": np.cov(rows, rowvar=False, dtype=np.float64)}
    return stats


def _read_safetensors(path: Path) -> Stats:
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("format_version") != str(VERSION):
                raise ConfigError(f"its header does not say that it is an {FORMAT} of version {VERSION}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ConfigError(f"the file is damaged or cut short: {error}") from None
    stats: Stats = {}
    for name, value in tensors.items():
        group, _, key = name.partition(".")
        stats.setdefault(group, {})[key] = value
    for key in ("num_images", "made_with"):
        try:
            note = json.loads(metadata.get(key, "null"))
        except (ValueError, RecursionError):
            raise ConfigError(f"its header entry {key} is not JSON") from None
        if note is not None:
            stats[key] = note
    return stats


def _write_safetensors(path: Path, notes: dict[str, Any], moments: dict[str, Any], features: Mapping[str, Any]) -> None:
    tensors = {f"{name}.{key}": value for name, entry in moments.items() for key, value in entry.items()}
    tensors |= {f"features.{detector}": rows for detector, rows in features.items()}
    metadata = {"format": FORMAT, "format_version": str(VERSION), **{key: json.dumps(n) for key, n in notes.items()}}
    save_tensors(path, {name: np.asarray(value) for name, value in tensors.items()}, metadata)


def _checked(stats: Any) -> Stats:
    """Return the known entries of `stats`, with the types above. Raises ConfigError for wrong ones or none."""
    if not isinstance(stats, dict):
        raise ConfigError(f"it holds a {type(stats).__name__}")
    found: Stats = {}
    count = stats.get("num_images")
    if count is not None:
        if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"its number of images is {str(count)[:40]!r}")
        found["num_images"] = int(count)
    if _is_text(stats.get("made_with")):
        found["made_with"] = stats["made_with"]
    for name in _MOMENTS:
        if name in stats:
            found[name] = _checked_moments(name, stats[name])
    features = stats.get("features", {})
    if not isinstance(features, dict):
        raise ConfigError("its features are not by detector")
    features = {key: _array(f"features.{key}", rows, 2) for key, rows in features.items() if key in DETECTORS}
    if features:
        found["features"] = {key: rows.astype(np.float32) for key, rows in features.items()}
    if not features and not any(name in found for name in _MOMENTS):
        raise ConfigError(f"it has none of {', '.join(_MOMENTS)}")
    return found


def _is_text(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(text, str) for pair in entry.items() for text in pair)


def _checked_moments(name: str, entry: Any) -> dict[str, np.ndarray]:
    if not isinstance(entry, dict) or not {"mu", "sigma"} <= entry.keys():
        raise ConfigError(f"its entry {name} lacks mu or sigma")
    mu, sigma = _array(f"{name}.mu", entry["mu"], 1), _array(f"{name}.sigma", entry["sigma"], 2)
    if sigma.shape != (len(mu), len(mu)):
        raise ConfigError(f"{name}.sigma has shape {list(sigma.shape)} with a mu of {len(mu)}")
    if np.abs(sigma - sigma.T).max() > 1e-3 * np.abs(sigma).max() or sigma.diagonal().min() < 0:
        raise ConfigError(f"{name}.sigma is not a covariance: it is not symmetric, or has a negative variance")
    return {"mu": mu.astype(np.float64), "sigma": sigma.astype(np.float64)}


def _array(name: str, value: Any, num_dims: int) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.ndim != num_dims or value.dtype.kind != "f" or value.size == 0:
        raise ConfigError(f"{name} is not an array of numbers with {num_dims} dimension{'s' if num_dims > 1 else ''}")
    if not np.isfinite(value).all():
        raise ConfigError(f"{name} holds values that are not finite")
    return value
