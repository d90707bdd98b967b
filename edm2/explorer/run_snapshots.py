"""The snapshots in the folder of a training run, out of which a network of any EMA length can be had."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dnnlib.errors import ConfigError
from training.posthoc.inputs import choose_inputs
from training.posthoc.reconstruction import Input, Reconstruction, list_input_pickles, reconstruct_phema
from training.snapshot.locate import network_files

_PREFIX = "network-snapshot"  # of what training writes


@dataclass(frozen=True, kw_only=True)
class RunSnapshots:
    """The stored averages of one run, at the newest time that there is."""

    path: str  # of the folder, as the user gave it
    prefix: str | None  # of the files, where the folder holds others too
    inputs: Sequence[Input]
    nimg: int  # images seen at the newest time

    @classmethod
    def read(cls, path: str) -> "RunSnapshots":
        """Raises ConfigError where the folder cannot be read, or holds no snapshots that belong together."""
        inputs = list_input_pickles(path)
        prefixes = {_prefix(file) for file in inputs}
        prefix = _PREFIX if _PREFIX in prefixes and len(prefixes) > 1 else None
        if prefix is not None:
            inputs = [file for file in inputs if _prefix(file) == prefix]
        if not inputs:
            raise ConfigError(f"no snapshots {{prefix}}-{{kimg}}-{{std}}.pkl or .safetensors in {path}")
        nimg, inputs = choose_inputs(inputs, None)
        return cls(path=path, prefix=prefix, inputs=inputs, nimg=nimg)

    @property
    def kimg(self) -> int:
        """Thousands of images seen, as names of files have it."""
        return self.nimg // 1000

    @property
    def lengths(self) -> list[float]:
        """The EMA lengths that are stored at the newest time."""
        return [file.std for file in self.inputs if file.nimg == self.nimg]

    def stored(self, ema: float) -> str | None:
        """The file with this EMA length at the newest time; None where it has to be reconstructed."""
        for file in self.inputs:
            if file.nimg == self.nimg and round(file.std, 3) == ema:
                return file.path
        return None

    def reconstruct(self, ema: float) -> Reconstruction:
        """The work that makes the network of this EMA length, in memory."""
        return reconstruct_phema(self.inputs, ema, self.nimg)


def is_run_folder(source: str) -> bool:
    """Whether `source` is a folder that is no model folder, as diffusers has them."""
    folder = Path(source)
    if not folder.is_dir():
        return False
    names = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))]
    return not network_files(PurePosixPath(), names)


def _prefix(file: Input) -> str:
    return os.path.basename(file.path).rsplit("-", 2)[0]
