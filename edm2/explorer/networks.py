"""Networks at hand: loaded, reconstructed, ready to sample from, and kept within a number of bytes."""

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import ConfigError
from edm2.explorer.bounded import Bounded
from edm2.explorer.run_snapshots import RunSnapshots, is_run_folder
from torch_utils.precision import Precision
from training.encoders import Encoder
from training.fast.prepare import PrepareNetwork
from training.snapshot import Snapshot, label_dropout, load_snapshot, read_header
from training.snapshot.parts import described

CACHE_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Loading:
    """A network is on its way: so many steps of all are done."""

    name: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedNetwork:
    """A network that is ready to sample from."""

    net: Any
    encoder: Encoder | None
    info: dict[str, Any]  # what its file says of its training
    notes: tuple[str, ...]  # what a user should know of it


@dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """What there is to choose for a network."""

    label_dim: int
    size: tuple[int, int, int]  # channels, height, width of what it denoises
    num_params: int
    nimg: int | None  # images seen in training
    label_dropout: bool  # whether it knows images without a class
    lengths: tuple[float, ...]  # of a run: the EMA lengths that are stored at its newest time; empty for a network

    def __str__(self) -> str:
        channels, height, width = self.size
        classes = f"{self.label_dim} classes" if self.label_dim else "no classes"
        seen = "" if self.nimg is None else f", trained on {_counted(self.nimg)} images"
        return f"{_counted(self.num_params)} parameters, {channels}×{height}×{width}, {classes}{seen}"


class Networks:
    """Networks by their names and EMA lengths. The weights of those used last stay in memory, in `max_bytes` at most;
    a file that has changed is read anew. From any thread; two that ask for the same network at once both load it.
    """

    def __init__(
        self, device: torch.device, *, precision: Precision | None = None, max_bytes: int = CACHE_BYTES
    ) -> None:
        self.device = device
        self.precision = precision
        self.kept: Bounded[Any, LoadedNetwork] = Bounded(max_bytes)
        self._encoders: dict[str, Encoder] = {}  # one of each kind, since a VAE is large

    def enter_thread(self) -> None:
        """To be called in a thread that is going to compute: a GPU's work is recorded on the thread's own device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def facts(self, source: str) -> NetworkFacts:
        """What the file, or the first snapshot in the run's folder, says of its network. Raises ConfigError."""
        run = RunSnapshots.read(source) if is_run_folder(source) else None
        header = read_header(source if run is None else run.inputs[-1].path)
        arguments = header.config["arguments"]
        resolution = arguments["img_resolution"]
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        return NetworkFacts(
            label_dim=arguments.get("label_dim", 0),
            size=(arguments["img_channels"], height, width),
            num_params=sum(
                torch.Size(shape).numel() for name, (_, shape) in header.tensors.items() if name not in header.buffers
            ),
            nimg=header.nimg if run is None else run.nimg,
            label_dropout=bool(label_dropout(header.info)),
            lengths=() if run is None else tuple(run.lengths),
        )

    def load(self, source: str, ema: float | None = None) -> Generator[Loading, None, LoadedNetwork]:
        """The network of a file, URL or name, or the one of EMA length `ema` of a run's folder. Raises ConfigError."""
        run = RunSnapshots.read(source) if is_run_folder(source) else None
        if run is None:
            return (yield from self._load_file(source))
        if ema is None:
            raise ConfigError(f"{source} is the folder of a run; choose an EMA length for its network")
        stored = run.stored(ema)
        if stored is not None:
            return (yield from self._load_file(stored))
        return (yield from self._reconstruct(run, ema))

    def _load_file(self, source: str) -> Generator[Loading, None, LoadedNetwork]:
        key = ("file", source, stamp(source))
        found = self.kept.get(key)
        if found is None:
            yield Loading(name=source, done=0, total=1)
            found = self._ready(key, source, load_snapshot(source, device=self.device), ())
        return found

    def _reconstruct(self, run: RunSnapshots, ema: float) -> Generator[Loading, None, LoadedNetwork]:
        key = ("ema", ema, tuple((file.path, stamp(file.path)) for file in run.inputs))
        found = self.kept.get(key)
        if found is not None:
            return found
        work = run.reconstruct(ema)
        for done, step in enumerate(work):
            yield Loading(name=f"EMA length {ema:.3f}", done=done, total=len(work))
            for output in step.outputs:
                note = f"EMA length {ema:.3f} from {len(run.inputs)} snapshots, fit {output.fit:.1e}"
                found = self._ready(key, f"{run.path} at {ema:.3f}", output.snapshot, (note,))
        assert found is not None
        return found

    def _ready(self, key: Any, name: str, snapshot: Snapshot, notes: tuple[str, ...]) -> LoadedNetwork:
        """The network of `snapshot`, prepared and kept."""
        if getattr(snapshot.net, "cond_channels", 0):
            raise ConfigError(
                f"{name} needs a picture to start from (cond_channels={snapshot.net.cond_channels}), which cannot be"
                " given here; sample from it with generate_images.py"
            )
        net = PrepareNetwork(precision=self.precision)(snapshot.net.to(self.device), self.device)
        num_bytes = _num_bytes(net)
        if num_bytes > self.kept.max_bytes:
            size, bound = (f"{number / 1e9:.2g}" for number in (num_bytes, self.kept.max_bytes))
            notes += (f"{name} takes {size} GB, more than --cache-size={bound}GB, and is loaded each time anew",)
        loaded = LoadedNetwork(net=net, encoder=self._shared(snapshot.encoder), info=snapshot.info, notes=notes)
        self.kept.put(key, loaded, num_bytes)
        return loaded

    def _shared(self, encoder: Encoder | None) -> Encoder | None:
        if encoder is None:
            return None
        return self._encoders.setdefault(json.dumps(described(encoder), sort_keys=True), encoder)


def _num_bytes(net: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers()))


def _counted(number: int) -> str:
    return f"{number / 1e6:.3g} million" if number >= 1e6 else f"{number / 1e3:.3g} thousand"


def stamp(source: str) -> object:
    """Changes when the file, or one in the folder, does; None for what is no path."""
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    try:
        return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    except OSError:
        return None
