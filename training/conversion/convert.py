"""The conversion of pictures to a data set, from the options to the files.

Picture i of the data set is the i-th of the source, after the choice by max_images: a name says which picture it is,
whatever was left out, and neither the number of workers nor that of processes changes a byte.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dnnlib.errors import ConfigError
from dnnlib.folders import require_folder
from torch_utils.distributed import World
from training.conversion import archive
from training.conversion.archive import Part, Writer
from training.conversion.finished import MADE_KEY, missing_parts, remove_leftovers, request_digest
from training.conversion.image_source import Source
from training.conversion.selection import choose_rows
from training.conversion.sources import open_source
from training.conversion.transforms import Size, require_trainable_size, result_size
from training.conversion.work import Outcome, Work, convert_chunks
from training.dataset.item_files import find_shards
from training.dataset.label_file import Label

# So much of PNGs goes between processes at once: enough to make the way there cheap, little enough for many workers.
_CHUNK_BYTES = 4 << 20
_MAX_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What to convert, and how; as the options of `dataset_tool.py convert`."""

    source: Path
    dest: Path  # a ZIP file if its name ends so, a folder otherwise
    max_images: int | None = None
    balanced: bool = False  # take max_images evenly over the classes
    resolution: Size | None = None  # (width, height)
    transform: str | None = None  # of transforms.TRANSFORMS; None scales without keeping the aspect
    exif: bool = False  # turn pictures upright as their EXIF data says
    workers: int = 1  # of every process
    on_error: Literal["stop", "skip"] = "stop"  # at files that cannot be read
    shards: int | None = None
    shard_size: int | None = None  # bytes
    overwrite: bool = False  # existing ZIP files
    split: str | None = None
    label: str | None = None
    skip_existing: bool = False  # leave what was made from the same alone

    def __post_init__(self) -> None:
        result_size(self.transform, self.resolution)
        if self.shards is not None and self.shard_size is not None:
            raise ConfigError("--shards and --shard-size both say how large shards are; give one of them")
        if self.sharded and not archive.is_zip(self.dest):
            raise ConfigError(f"--dest={self.dest} is a folder, but shards are ZIP files; name one, as in data.zip")
        if self.dest.suffix.lower() in (".7z", ".gz", ".rar", ".tar", ".tgz"):
            raise ConfigError(f"--dest={self.dest} is neither a ZIP file nor a folder; name one of them")
        if self.balanced and self.max_images is None:
            raise ConfigError("--balanced says how --max-images are taken; add --max-images=N")

    @property
    def sharded(self) -> bool:
        """Whether shards are to be written."""
        return self.shards is not None or self.shard_size is not None


@dataclass(frozen=True, kw_only=True)
class Step:
    """Some pictures, and what became of them."""

    num_images: int
    num_written: int
    left_out: int  # by the transform, which does not enlarge
    unreadable: Sequence[str]  # name and reason; only with on_error 'skip'


class Conversion:
    """A conversion that is ready to run: iterate over its steps; the files are there at the end.

    Making one checks everything that can be without reading all pictures, and writes nothing. Under torchrun every
    process makes and runs one, which writes its share of the shards; they appear when all processes are done. Raises
    ConfigError; whenever the iteration ends early, nothing is left behind. With `skip_existing`, shards appear one by
    one, and those that are there, made from the same, are left out of `parts`: interrupted work goes on from there.
    """

    def __init__(self, options: ConvertOptions, world: World | None = None) -> None:
        self.options = options
        self._world = world or World()
        if self._world.size > 1 and not options.sharded:
            raise ConfigError(
                f"{self._world.size} processes cannot write one file together; "
                f"add --shards={self._world.size}, for example, or --shard-size"
            )
        _require_places(options)
        self.source = open_source(options.source, split=options.split, label=options.label)
        self._rows = choose_rows(self.source, options.max_images, balanced=options.balanced)
        self._work = Work(
            reader=self.source.reader, transform=options.transform, size=options.resolution, exif=options.exif
        )
        self._first, sample = self._find_first()
        assert sample.png is not None and sample.size is not None
        self.size = sample.size
        require_trainable_size(self.size, self._describe(self._first))
        self._png_bytes = len(sample.png)
        self._made_from = self._digest() if options.skip_existing else ""
        self._head = _head(self.source)
        if options.skip_existing:  # else files are the same bytes for the same pictures, whatever their names were
            self._head[MADE_KEY] = self._made_from
        self._stale = archive.existing_shards(options.dest) if options.sharded else []
        self.parts = self._plan()

    def __len__(self) -> int:
        """The pictures that this process has to do."""
        return sum(part.stop - part.start for part in self.parts)

    @property
    def num_images(self) -> int:
        """The pictures of all processes."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Step]:
        """Convert; see the class."""
        one_by_one = self.options.skip_existing
        if one_by_one:
            remove_leftovers(self.parts)
        keys = (self._keys(chunk) for part in self.parts for chunk in self._chunks(part))
        done = 0
        with closing(convert_chunks(self._work, keys, num_workers=self.options.workers)) as outcomes:
            for group in [[part] for part in self.parts] if one_by_one else [self.parts]:
                with archive.writing(group, self._head) as writers:
                    for part, writer in zip(group, writers, strict=True):
                        for chunk in self._chunks(part):
                            step = self._write(writer, chunk, next(outcomes))
                            done += step.num_written
                            yield step
                    for writer in writers:
                        writer.finish()
                    if not one_by_one:
                        self._require_any(sum(self._world.all_gather_objects(done)))
        self._world.barrier()
        self._remove_stale()

    def _plan(self) -> list[Part]:
        """The parts of this process."""
        options, labels = self.options, self.source.labels
        longest = max((labels[row] for row in self._rows), key=_text_length) if labels is not None else None
        each = archive.entry_bytes(self._png_bytes, longest)
        per_shard = None
        if options.shard_size is not None:
            per_shard = archive.pictures_per_shard(options.shard_size, each, self._head)
        parts = archive.plan_parts(options.dest, len(self._rows), num_shards=options.shards, per_shard=per_shard)
        self.num_parts = len(parts)
        mine = parts[self._world.rank :: self._world.size]
        missing = mine
        if options.skip_existing:
            # All, so that every process refuses what does not belong.
            missing_parts(parts, self._made_from, self._stale, replace=options.overwrite)
            missing = missing_parts(mine, self._made_from, [], replace=options.overwrite)
        self.num_kept = len(mine) - len(missing)
        self._paths = [part.path for part in mine]  # written by this process, or kept
        mine = missing
        _require_space(options.dest, each * sum(part.stop - part.start for part in mine))
        return mine

    def _find_first(self) -> tuple[int, Outcome]:
        """The first picture that can be converted, which tells the size of all."""
        reason = None
        for index, row in enumerate(self._rows):
            outcome = self._work.convert(self.source.keys[row])
            if outcome.png is not None:
                return index, outcome
            if outcome.reason is not None:
                reason = reason or self._complain(index, outcome.reason)
                self._stop_at(reason)
        count = len(self._rows)
        if reason is not None:
            raise ConfigError(f"none of the {count} images can be used; {reason}")
        width, height = self.options.resolution or (0, 0)
        raise ConfigError(f"all {count} images are smaller than --resolution={width}x{height}; choose a smaller one")

    def _digest(self) -> str:
        """Of the source's names and labels, and of what is made of them."""
        options = self.options
        how = [options.resolution, options.transform, options.exif, options.on_error]
        names = [self.source.names[row] for row in self._rows]
        labels = None if self.source.labels is None else [self.source.labels[row] for row in self._rows]
        return request_digest({"names": names, "labels": labels, "how": how})

    def _chunks(self, part: Part) -> Iterator[range]:
        """The pictures of a part, in chunks."""
        length = max(1, min(_MAX_CHUNK, _CHUNK_BYTES // self._png_bytes))
        for start in range(part.start, part.stop, length):
            yield range(start, min(start + length, part.stop))

    def _keys(self, chunk: range) -> list[Any]:
        return [self.source.keys[row] for row in self._rows[chunk.start : chunk.stop]]

    def _write(self, writer: Writer, chunk: range, outcomes: Sequence[Outcome]) -> Step:
        num_written, unreadable = 0, []
        for index, outcome in zip(chunk, outcomes, strict=True):
            if outcome.reason is not None:
                reason = self._complain(index, outcome.reason)
                self._stop_at(reason)
                unreadable.append(reason)
            elif outcome.png is not None:
                self._require_size(index, outcome.size)
                writer.add(index, outcome.png, self._label(index))
                num_written += 1
        left_out = len(chunk) - num_written - len(unreadable)
        return Step(num_images=len(chunk), num_written=num_written, left_out=left_out, unreadable=unreadable)

    def _stop_at(self, reason: str) -> None:
        if self.options.on_error == "stop":
            raise ConfigError(f"{reason}; --on-error=skip leaves such files out and lists them")

    def _require_size(self, index: int, size: Size | None) -> None:
        if size != self.size:
            assert size is not None
            (width, height), (first_width, first_height) = size, self.size
            raise ConfigError(
                f"{self._describe(index)} is {width}x{height}, but {self._describe(self._first)} is "
                f"{first_width}x{first_height}; bring them to one size by --resolution={first_width}x{first_height}, "
                f"with --transform=center-crop to keep their aspect"
            )

    def _require_any(self, num_written: int) -> None:
        if not num_written:
            raise ConfigError("no image was left to write")

    def _label(self, index: int) -> Label | None:
        return None if self.source.labels is None else self.source.labels[self._rows[index]]

    def _describe(self, index: int) -> str:
        return f"{self.source.path}: {self.source.names[self._rows[index]]}"

    def _complain(self, index: int, reason: str) -> str:
        name = self._describe(index)
        return reason if reason.startswith(name) else f"{name} cannot be read: {reason}"

    def _remove_stale(self) -> None:
        """Remove shards of an earlier, larger number: --overwrite was given, or there are none."""
        written = {path.name for paths in self._world.all_gather_objects(self._paths) for path in paths}
        for path in self._stale:
            if self._world.is_main and path.name not in written:
                path.unlink(missing_ok=True)


def _head(source: Source) -> dict[str, Any]:
    """What every dataset.json says; whoever reads labels takes no notice of more."""
    head: dict[str, Any] = {"labels": None if source.labels is None else []}
    return head if source.classes is None else {**head, "classes": list(source.classes)}


def _require_places(options: ConvertOptions) -> None:
    """Raise ConfigError unless the destination may be written: neither there already nor a part of the source."""
    source, dest = options.source.resolve(), options.dest.resolve()
    if dest == source or (options.source.is_dir() and dest.is_relative_to(source)):
        raise ConfigError(f"--dest={options.dest} lies inside of --source={options.source}; choose a place outside")
    require_folder(options.dest.parent)
    if not archive.is_zip(dest):
        require_folder(options.dest)
        found = next(iter(sorted(os.listdir(dest))), None) if dest.is_dir() else None
        if found is not None and not options.skip_existing:
            raise ConfigError(f"--dest={options.dest} is not empty, it has {found}; choose a new folder")
        return
    found_shards = archive.existing_shards(options.dest) if options.sharded else []
    places = found_shards if options.sharded else [options.dest]
    inputs = set() if options.source.is_file() else {place.resolve() for place in find_shards(options.source)}
    for place in places:
        if place.is_dir():
            raise ConfigError(f"{place} is a folder; choose another --dest")
        if place.resolve() in inputs:
            raise ConfigError(f"{place} is part of --source={options.source}; choose another --dest")
        if place.exists() and not (options.overwrite or options.skip_existing):
            raise ConfigError(f"{place} exists already; choose another --dest, or add --overwrite to replace it")


def _require_space(dest: Path, wanted: int) -> None:
    """Raise ConfigError where the disk is too small, before hours of work show it."""
    nearest = next(place for place in (dest.absolute(), *dest.absolute().parents) if place.is_dir())
    disk = shutil.disk_usage(nearest)
    # Some network file systems tell nothing.
    if disk.total and wanted > disk.free:
        raise ConfigError(
            f"{dest} would take {wanted / 1e9:.3g} GB, but {disk.free / 1e9:.3g} GB are free there; "
            f"No space left on device: choose another place, a smaller --resolution or --max-images"
        )


def _text_length(label: Label) -> int:
    return len(str(label))
