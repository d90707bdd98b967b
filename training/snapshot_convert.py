"""Network files from one format to the other: .pkl to .safetensors and back."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dnnlib.download import is_url
from dnnlib.errors import ConfigError
from dnnlib.folders import make_folder, require_folder
from training.snapshot import SUFFIXES, Snapshot, load_snapshot, save_snapshot


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One file that was written."""

    source: str
    path: Path
    snapshot: Snapshot


class Conversion:
    """Converts the files while it is iterated over; each is written whole or not at all."""

    def __init__(self, jobs: list[tuple[str, Path]]) -> None:
        self.jobs = jobs  # source and output of each

    def __len__(self) -> int:
        return len(self.jobs)

    def __iter__(self) -> Iterator[Converted]:
        for source, path in self.jobs:
            snapshot = load_snapshot(source)
            make_folder(path.parent)
            save_snapshot(snapshot, path)
            yield Converted(source=source, path=path, snapshot=snapshot)


def convert_snapshots(
    sources: Sequence[str], *, outdir: str | os.PathLike[str] | None = None, out: str | os.PathLike[str] | None = None
) -> Conversion:
    """Check the request, and return the conversion of the network files `sources`, paths or http(s) URLs.

    `outdir` gets files of the same names with the other suffix; `out` is the output of a single source, and its suffix
    the format. Everything that the files hold is kept. Raises ConfigError before anything is read or written.
    """
    if (outdir is None) == (out is None):
        raise ConfigError("give either --outdir=DIR or --out=FILE, where to write to")
    if out is not None and len(sources) != 1:
        raise ConfigError(f"--out={out} is one file for {len(sources)} inputs; give --outdir=DIR for several")
    if out is not None and Path(out).suffix not in SUFFIXES:
        raise ConfigError(f"--out={out} has none of the suffixes {' and '.join(SUFFIXES)} of network files")
    paths = [Path(out)] if out is not None else [Path(outdir or "") / _other_name(source) for source in sources]
    for source, path in zip(sources, paths, strict=True):
        if any(_is_same(path, Path(other)) for other in sources if not is_url(other)):
            raise ConfigError(f"{source} would be written to {path}, which is an input; choose another place")
        if paths.count(path) > 1:
            raise ConfigError(f"several inputs would be written to {path}; convert them one by one with --out=FILE")
        require_folder(path.parent)
    return Conversion(list(zip(sources, paths, strict=True)))


def _other_name(source: str) -> str:
    """The file's name with the suffix of the other format."""
    name = Path(unquote(urlsplit(source).path) if is_url(source) else source)
    if name.suffix not in SUFFIXES:
        raise ConfigError(f"{source} has none of the suffixes {' and '.join(SUFFIXES)}; name its output by --out=FILE")
    return name.stem + SUFFIXES[1 - SUFFIXES.index(name.suffix)]


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve() or (path.exists() and other.exists() and path.samefile(other))
