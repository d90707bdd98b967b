"""Networks ready to sample from: loaded from files or reconstructed from runs, and cached up to a number of bytes."""

import json
import threading
from collections import OrderedDict
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

import torch

from dnnlib.download import is_remote
from dnnlib.errors import ConfigError
from dnnlib.parse import require_possible
from dnnlib.text import format_bytes
from torch_utils.precision_names import Precision
from training.encoders import Encoder
from training.fast.prepare import PrepareNetwork
from training.posthoc.inputs import choose_inputs
from training.posthoc.reconstruction import Input, list_input_pickles, reconstruct_phema
from training.sampling.networks import class_names
from training.snapshot import Snapshot, label_dropout, load_snapshot, read_header
from training.snapshot.locate import network_files
from training.snapshot.parts import described

_RUN_PREFIX = "network-snapshot"  # of the files that training writes

# On a GPU each network has CUDA graphs, whose memory --cache-size does not count.
_MAX_NETWORKS = 6

_MAX_EARLY = 8  # snapshots of a run that are offered as guides

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """The most recently used values, at most `max_values` and of at most `max_bytes` in total. Thread-safe."""

    def __init__(self, max_bytes: int, max_values: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_values = max_values
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> V | None:
        """Return the value and mark it as used; None if it is not cached."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: V, num_bytes: int) -> None:
        """Cache `value` in place of the least recently used ones; a value above `max_bytes` is not cached at all."""
        with self._lock:
            self._remove(key)
            if num_bytes > self.max_bytes:
                return
            while self.num_bytes + num_bytes > self.max_bytes or len(self._values) == self.max_values:
                self._remove(next(iter(self._values)))
            self._values[key] = value, num_bytes
            self.num_bytes += num_bytes

    def _remove(self, key: Hashable) -> None:
        self.num_bytes -= self._values.pop(key, (None, 0))[1]


@dataclass(frozen=True, kw_only=True)
class RunSnapshots:
    """The snapshots in the folder of a training run, up to its newest time."""

    path: str  # of the folder, as the user gave it
    prefix: str | None  # of the files' names; None if all files in the folder have the same
    inputs: Sequence[Input]
    nimg: int  # images seen at the newest time

    @classmethod
    def read(cls, path: str) -> "RunSnapshots":
        """Raises ConfigError if the folder cannot be read or its snapshots do not belong together."""
        inputs = list_input_pickles(path)
        prefixes = {_prefix(file) for file in inputs}
        prefix = _RUN_PREFIX if _RUN_PREFIX in prefixes and len(prefixes) > 1 else None
        inputs = [file for file in inputs if prefix in (None, _prefix(file))]
        if not inputs:
            raise ConfigError(f"no snapshots {{prefix}}-{{kimg}}-{{std}}.pkl or .safetensors in {path}")
        nimg, inputs = choose_inputs(inputs, None)
        return cls(path=path, prefix=prefix, inputs=inputs, nimg=nimg)

    @property
    def lengths(self) -> tuple[float, ...]:
        """EMA lengths that are stored at the newest time."""
        return tuple(file.std for file in self.inputs if file.nimg == self.nimg)

    def early(self) -> list[str]:
        """Paths of a few earlier snapshots, each the longest average of its time: guides for the newest ones."""
        paths = list({file.nimg: file.path for file in self.inputs if file.nimg < self.nimg}.values())
        count = min(len(paths), _MAX_EARLY)
        return [paths[i * (len(paths) - 1) // max(count - 1, 1)] for i in range(count)]

    def stored(self, ema: float) -> str | None:
        """Path of the snapshot with this EMA length at the newest time; None if it has to be reconstructed."""
        found = (file.path for file in self.inputs if file.nimg == self.nimg and round(file.std, 3) == ema)
        return next(found, None)


def is_run_folder(source: str) -> bool:
    """Return True for a folder that is not a model folder in the diffusers layout."""
    if is_remote(source) or not (folder := require_possible(source)).is_dir():
        return False
    names = [path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))]
    return not network_files(PurePosixPath(), names)


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Progress of loading a network."""

    text: str


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedNetwork:
    """A network that is ready to sample from."""

    net: Any
    encoder: Encoder | None
    info: dict[str, Any]  # how it was trained, from its file
    notes: tuple[str, ...]  # for the user


@dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """Properties of a network that its file's header states."""

    label_dim: int
    size: tuple[int, int, int]  # channels, height, width of what it denoises
    num_params: int
    nimg: int | None  # images seen in training
    label_dropout: bool  # trained with some labels left out
    lengths: tuple[float, ...]  # EMA lengths that a run stores at its newest time; empty for a network
    class_names: tuple[str, ...] = ()

    @property
    def length(self) -> float | None:
        """The longest stored EMA length, as a first value; None for a network."""
        return round(max(self.lengths), 3) if self.lengths else None

    def takes_guide(self, guide: "NetworkFacts") -> bool:
        """Return whether `guide` is for the same images and labels; see `require_matching_guide`."""
        return guide.size == self.size and guide.label_dim in (0, self.label_dim)

    def __str__(self) -> str:
        channels, height, width = self.size
        classes = f"{self.label_dim} classes" if self.label_dim else "no classes"
        trained = "" if self.nimg is None else f", trained on {_rounded(self.nimg)} images"
        return f"{_rounded(self.num_params)} parameters, {channels}×{height}×{width}, {classes}{trained}"


class Networks:
    """Networks by name and EMA length, thread-safe. The last used stay in memory, up to `max_bytes`."""

    def __init__(
        self,
        device: torch.device,
        *,
        precision: Precision | None = None,
        max_bytes: int = 4 << 30,
        own_networks: Sequence[str] = (),
    ) -> None:
        self.own_networks = own_networks
        self.device = device
        self.precision = precision
        self.cache: BoundedCache[LoadedNetwork] = BoundedCache(
            max_bytes, _MAX_NETWORKS if device.type == "cuda" else None
        )
        self._encoders: dict[str, Encoder] = {}  # one of each kind, since a VAE is large

    def enter_thread(self) -> None:
        """Prepare the current thread for computing: a GPU's work is recorded on the thread's own device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def facts(self, source: str) -> NetworkFacts:
        """Read the header of a file, or of the newest snapshot of a run. Raises ConfigError."""
        run = RunSnapshots.read(source) if is_run_folder(source) else None
        header = read_header(source if run is None else run.inputs[-1].path, own_networks=self.own_networks)
        arguments = header.config["arguments"]
        resolution = arguments["img_resolution"]
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        shapes = [shape for name, (_, shape) in header.tensors.items() if name not in header.buffers]
        return NetworkFacts(
            label_dim=arguments.get("label_dim", 0),
            size=(arguments["img_channels"], height, width),
            num_params=sum(torch.Size(shape).numel() for shape in shapes),
            nimg=header.nimg if run is None else run.nimg,
            label_dropout=bool(label_dropout(header.info)),
            lengths=() if run is None else run.lengths,
            class_names=tuple(class_names(header.info)),
        )

    def load(self, source: str, ema: float | None = None) -> Generator[Loading, None, LoadedNetwork]:
        """Load a file, URL or hub name, or the network of EMA length `ema` of a run's folder. Raises ConfigError."""
        if is_run_folder(source):
            run = RunSnapshots.read(source)
            if ema is None:
                raise ConfigError(f"{source} is the folder of a run; choose an EMA length for its network")
            stored = run.stored(ema)
            if stored is None:
                return (yield from self._reconstruct(run, ema))
            source = stored
        key = (source, stamp(source))
        loaded = self.cache.get(key)
        if loaded is None:
            yield Loading(text=f"Loading {source}")
            snapshot = load_snapshot(source, device=self.device, own_networks=self.own_networks)
            loaded = self._prepare(key, source, snapshot, ())
        return loaded

    def _reconstruct(self, run: RunSnapshots, ema: float) -> Generator[Loading, None, LoadedNetwork]:
        key = (ema, *((file.path, stamp(file.path)) for file in run.inputs))
        loaded = self.cache.get(key)
        if loaded is not None:
            return loaded
        work = reconstruct_phema(run.inputs, ema, run.nimg, own_networks=self.own_networks)
        for done, step in enumerate(work):
            yield Loading(text=f"Loading EMA length {ema:.3f}: {done} of {len(work)}")
            for output in step.outputs:
                note = f"EMA length {ema:.3f} from {len(run.inputs)} snapshots, fit {output.fit:.1e}"
                loaded = self._prepare(key, f"{run.path} at {ema:.3f}", output.snapshot, (note,))
        assert loaded is not None
        return loaded

    def _prepare(self, key: Hashable, name: str, snapshot: Snapshot, notes: tuple[str, ...]) -> LoadedNetwork:
        if getattr(snapshot.net, "cond_channels", 0):
            raise ConfigError(
                f"{name} is conditioned on images (cond_channels={snapshot.net.cond_channels}), which the explorer does"
                " not support; sample from it with generate_images.py"
            )
        net = PrepareNetwork(precision=self.precision)(snapshot.net.to(self.device), self.device)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (*net.parameters(), *net.buffers()))
        if num_bytes > self.cache.max_bytes:
            size, bound = format_bytes(num_bytes), format_bytes(self.cache.max_bytes)
            notes += (f"{name} takes {size}, more than --cache-size={bound}, and is loaded again each time",)
        encoder = snapshot.encoder
        if encoder is not None:
            encoder = self._encoders.setdefault(json.dumps(described(encoder), sort_keys=True), encoder)
        loaded = LoadedNetwork(net=net, encoder=encoder, info=snapshot.info, notes=notes)
        self.cache.put(key, loaded, num_bytes)
        return loaded


def stamp(source: str) -> object:
    """Return a value that changes whenever the file or folder changes; None if `source` is not a path."""
    path = Path(source)
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    except (OSError, ValueError):
        return None


def _prefix(file: Input) -> str:
    return Path(file.path).name.rsplit("-", 2)[0]


def _rounded(number: int) -> str:
    return f"{number / 1e6:.3g} million" if number >= 1e6 else f"{number / 1e3:.3g} thousand"
