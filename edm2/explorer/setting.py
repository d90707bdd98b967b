"""Everything that the explorer's images depend on, as one value; what to choose from; the commands that make them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal

from dnnlib.cli import quoted
from dnnlib.errors import ConfigError
from dnnlib.text import format_exact
from edm2.explorer.networks import NetworkFacts, Networks, RunSnapshots, is_run_folder
from training.phema import MAX_STD
from training.posthoc.inputs import kimg_text
from training.posthoc.reconstruction import output_name
from training.presets import GENERATION, locate
from training.sampling.denoisers import SELF
from training.sampling.request import SamplingRequest, resolve_sampling

BATCH = 16  # images at once
MAX_IMAGES = 256
NO_GUIDE = "none"
_DEFAULT_BATCH = 32  # of generate_images.py


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network, a guide, seeds, a class, and how to sample. Raises ConfigError for values that no network can take.

    Equal settings give equal images as long as the files they name stay the same.
    """

    net: str  # like --net, or the folder of a run
    ema: float | None = None  # EMA length of a run's network, in thousandths; None for a network by itself
    guide: str | None = None  # like --gnet; 'self' is the network itself without its class
    guidance: float = 1.0
    interval: tuple[float, float] | None = None  # noise levels (low, high] that are guided; None = all
    class_idx: int | Literal["all", "none"] | None = None  # None = drawn by the seeds; 'none' = leave it out
    first_seed: int = 0
    num_images: int = 16
    num_steps: int = 18
    solver: str = "heun"

    def __post_init__(self) -> None:
        if not self.net.strip():
            raise ConfigError("no network to sample from; choose one, or enter a file or the folder of a run")
        if self.ema is not None and not (0 < self.ema < MAX_STD and round(self.ema, 3) == self.ema):
            raise ConfigError(f"EMA length {self.ema:g} must be from 0.001 to 0.288, in thousandths")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            low, high = self.interval
            raise ConfigError(f"guided noise levels cannot be above {low:g} and up to {high:g}; make the first smaller")
        _require_between("images", self.num_images, 1, MAX_IMAGES)
        _require_between("as first seed", self.first_seed, 0, (1 << 32) - self.num_images)  # seeds are modulo 2**32
        _require_between("steps", self.num_steps, 1, 1000)
        self.request()

    @property
    def seeds(self) -> list[int]:
        """One per image."""
        return list(range(self.first_seed, self.first_seed + self.num_images))

    def request(self) -> SamplingRequest:
        """Return the request to sample with, without the guide if no step calls it. Its network is still a name."""
        return resolve_sampling(
            net=self.net,
            gnet=() if self.guide is None else (self.guide,),
            guidance=self.guidance,
            interval=None if self.guide is None else self.interval,
            solver=self.solver,
            num_steps=self.num_steps,
        )

    def differences(self, other: "Setting") -> list[str]:
        """Names of the fields whose values differ."""
        return [name for name in self.__dataclass_fields__ if getattr(self, name) != getattr(other, name)]


def _require_between(what: str, value: int, low: int, high: int) -> None:
    if value != int(value) or not low <= value <= high:
        raise ConfigError(f"{value:g} {what} is out of range; choose a whole number from {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Entries of the page's pickers, as (label, value), and the guide to begin with."""

    networks: list[tuple[str, str]]
    guides: list[tuple[str, str]]  # of the first network; NO_GUIDE comes first
    guide: str
    guidance: float
    typed: bool  # whether other names may be typed
    known: tuple[tuple[str, str, NetworkFacts], ...] = ()  # label, name and facts of guides for any network

    def guides_of(self, net: str, facts: NetworkFacts | None) -> list[tuple[str, str]]:
        """Return the guides that fit the network `net`; of a run also its own early snapshots. Raises ConfigError."""
        if facts is None:
            return [(NO_GUIDE, NO_GUIDE)]
        fitting = [(label, name) for label, name, guide in self.known if facts.takes_guide(guide) and name != net]
        early = RunSnapshots.read(net).early() if is_run_folder(net) else []
        given = {name for _, name in fitting}
        fitting += [(f"earlier: {Path(path).stem}", path) for path in early if path not in given]
        own = [("itself, without its class", SELF)] if facts.label_dim and facts.label_dropout else []
        return [(NO_GUIDE, NO_GUIDE), *fitting, *own]


def offered(
    nets: Sequence[str], runs: Sequence[str], gnets: Sequence[str], networks: Networks, *, typed: bool
) -> Choices:
    """Return what the command line names and what the repository ships. Raises ConfigError for an unusable name."""
    for run in runs:
        RunSnapshots.read(run)
    for name in (*nets, *runs):
        networks.facts(name)
    shipped = GENERATION["demo"]
    assert shipped.gnet is not None
    net, guide = (_relative(locate(name)) for name in (shipped.net, shipped.gnet))
    entries = [(name, name) for name in (*nets, *runs)]
    known = [(name, name, networks.facts(name)) for name in gnets]
    if Path(net).is_file() and net not in (*nets, *runs):
        entries.append((f"shipped: {Path(net).stem}", net))
    if Path(guide).is_file() and guide not in gnets:
        known.append((f"shipped: {Path(guide).stem}", guide, networks.facts(guide)))
    first = gnets[0] if gnets else NO_GUIDE if nets or runs else guide
    choices = Choices(
        networks=entries, guides=[], guide=first, guidance=shipped.guidance, typed=typed, known=tuple(known)
    )
    net = entries[0][1] if entries else ""
    guides = choices.guides_of(net, networks.facts(net) if net else None)
    return replace(choices, guides=guides, guide=first if first in dict(guides).values() else NO_GUIDE)


def _relative(path: str) -> str:
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def commands_for(
    setting: Setting, networks: Networks, *, given_device: str | None = None, batch: int = BATCH, outdir: str = "out"
) -> list[str]:
    """Return the command lines for the images of `setting`: generate_images.py, after reconstruct_phema.py for an EMA
    length that is not stored.

    Several images are written as one contact sheet, a single one as a file named after its seed. `given_device`: the
    user's --device; `batch`: images at once, on which the last digits depend on a GPU.
    """
    lines = []
    own = [f"--network={name}" for name in networks.own_networks]
    net = setting.net
    if is_run_folder(setting.net) and setting.ema is not None:
        run = RunSnapshots.read(setting.net)
        stored = run.stored(setting.ema)
        if stored is None:
            words = [f"--indir={run.path}", *([] if run.prefix is None else [f"--inprefix={run.prefix}"])]
            words += [f"--outkimg={kimg_text(run.nimg)}", f"--outdir={outdir}", f"--outstd={setting.ema:.3f}"]
            lines.append(quoted(["python", "reconstruct_phema.py", *words, *own]))
            suffix = ".safetensors" if own else ".pkl"
            stored = str(PurePath(outdir, f"{output_name('phema', run.nimg, setting.ema)}{suffix}"))
        net = stored
    count, first = setting.num_images, setting.first_seed
    words = [f"--net={net}", *own, *_guidance_options(setting.request())]
    words += [f"--solver={setting.solver}", f"--steps={setting.num_steps}"]
    words.append(f"--seeds={first}-{first + count - 1}" if count > 1 else f"--seeds={first}")
    for option, value in (("class", setting.class_idx), ("precision", networks.precision), ("device", given_device)):
        if value is not None:
            words.append(f"--{option}={value}")
    if count > batch and batch != _DEFAULT_BATCH:
        words.append(f"--batch={batch}")
    words.append(f"--grid={PurePath(outdir, 'grid.png')}" if count > 1 else f"--outdir={outdir}")
    return [*lines, quoted(["python", "generate_images.py", *words])]


def _guidance_options(request: SamplingRequest) -> list[str]:
    if not request.gnets:
        return []
    words = [*(f"--gnet={guide}" for guide in request.gnets), f"--guidance={format_exact(request.weight)}"]
    if request.sampler.guidance.interval is not None:
        words.append(f"--interval={','.join(map(str, request.sampler.guidance.interval))}")
    return words
