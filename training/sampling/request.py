"""What to sample from and how: made from a preset and options, and checked without loading any network."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import ConfigError
from torch_utils.compiling import missing_compiler
from torch_utils.distributed import World
from torch_utils.precision import precision_note
from torch_utils.precision_names import Precision
from training.fast.prepare import PrepareNetwork
from training.presets import generation_preset, locate
from training.sampling.generation import generate_images
from training.sampling.guidance import Guidance
from training.sampling.image_batches import GeneratedImages
from training.sampling.networks import DecoderOptions
from training.sampling.options import SamplerOptions
from training.sampling.own_sampler import own_sampler
from training.sampling.sampler import Sampler

# Images of a process from which compiling pays on a GPU: it saves about 6 ms an image of EDM2-S, and more of larger
# networks, and takes about two minutes the first time and half a minute later. Estimates, not measured.
COMPILE_FROM = 5000


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """A network, its guides and the sampler's options. Raises ConfigError for invalid values."""

    net: str  # path or URL
    gnets: tuple[str, ...] = ()  # the guides; none if no step is guided
    sampler: Sampler = field(default_factory=SamplerOptions)
    own_networks: tuple[str, ...] = ()  # classes of the user's own that may be imported for the networks' files
    precision: Precision | None = None  # None = as the network's file says
    compile: bool | None = None  # None = by the number of images, on CUDA
    source: Path | None = None  # images for a network that is conditioned on images
    masks: Path | None = None  # what to fill of them
    decoder: DecoderOptions = field(default_factory=DecoderOptions)  # of latents
    notes: tuple[str, ...] = ()  # for a user who gave these options

    def __post_init__(self) -> None:
        for option, path in self.condition_files().items():
            if not path.exists():
                raise ConfigError(f"--{option}={path} does not exist; give an image, or a folder or ZIP file of images")
        if self.masks is not None and self.source is None:
            raise ConfigError(f"--masks={self.masks} needs images to fill; add --source=PATH")

    @property
    def weight(self) -> float:
        """The guidance weight; 1 = no guidance."""
        return self.sampler.guidance.weight

    def condition_files(self) -> dict[str, Path]:
        """Return the files given by --source and --masks, by the names of these options."""
        paths = {"source": self.source, "masks": self.masks}
        return {name: path for name, path in paths.items() if path is not None}

    def generate(
        self,
        net: Any = None,
        gnets: Sequence[Any] = (),
        *,
        announce: Callable[[str], None] | None = None,
        **options: Any,
    ) -> GeneratedImages:
        """Call `generate_images` for this request. `options`: its keywords for seeds, classes, files and processes.

        `net` and `gnets` replace the request's files by networks that are loaded and prepared already. `announce` is
        called with what a user should know while networks are prepared.
        """
        prepare = None
        if net is None:
            net, gnets, prepare = self.net, self.gnets, self.prepare(announce)
            world = options.get("world")
            if self.compile is None and world is not None:
                prepare = _compiling_for(prepare, len(options.get("seeds", ())), world)
        return generate_images(
            net=net,
            gnet=gnets,
            prepare=prepare,
            sampler_options=self.sampler,
            own_networks=self.own_networks,
            decoder=self.decoder,
            source=self.source,
            masks=self.masks,
            **options,
        )

    def notes_for(self, device: torch.device) -> tuple[str, ...]:
        """Return what a user should know who runs this on `device`."""
        note = None if self.precision is None else precision_note(self.precision, device)
        return self.notes if note is None else (*self.notes, note)

    def prepare(self, announce: Callable[[str], None] | None = None) -> PrepareNetwork:
        """Return what prepares loaded networks for sampling; for `announce` see `generate`."""
        return PrepareNetwork(precision=self.precision, compile=bool(self.compile), announce=announce)


def _compiling_for(prepare: PrepareNetwork, num_images: int, world: World) -> PrepareNetwork:
    """Return `prepare` with compilation if that pays for `num_images` of all processes, and tell the user."""
    share = num_images // world.size
    if world.device.type != "cuda" or share < COMPILE_FROM or missing_compiler(world.device) is not None:
        return prepare
    if prepare.announce is not None:
        prepare.announce(
            f"Compiling first, for {share:,} images per process: takes minutes, unless an earlier run left its code in"
            " the cache; --no-compile leaves it out."
        )
    return dataclasses.replace(prepare, compile=True, automatic=True)


def resolve_sampling(
    *,
    preset: str | None = None,
    net: str | None = None,
    gnet: Sequence[str] = (),
    gnet_shares: tuple[float, ...] | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] | None = None,
    solver: str | None = None,
    sampler: str | None = None,
    sampler_args: dict[str, Any] | None = None,
    own_networks: Sequence[str] = (),
    precision: Precision | None = None,
    compile: bool | None = None,
    source: Path | None = None,
    masks: Path | None = None,
    decoder_precision: str | None = None,
    decoder_tile: int | None = None,
    **heun: float | None,
) -> SamplingRequest:
    """Return the request for what `edm2.options.sampling.sampling_options` gives. `heun`: the fields of HeunOptions.

    Values left out (None) come from the preset, then from the defaults. Raises ConfigError for invalid values.
    """
    gnets = tuple(gnet)
    if preset is not None:
        row = generation_preset(preset)
        net = locate(row.net) if net is None else net
        if row.gnet is not None:
            gnets = gnets or (locate(row.gnet),)
            guidance = row.guidance if guidance is None else guidance
            interval = row.interval if interval is None else interval
    if net is None:
        raise ConfigError("no network to sample from; give --net=FILE or --preset=NAME (--list-presets shows them)")
    guidance = 1.0 if guidance is None else guidance
    if not gnets and sampler is None:
        _require_no_guidance(guidance, interval, gnet_shares)
    options = {"guidance": guidance, "interval": interval, "shares": gnet_shares, "solver": solver, **heun}
    request = SamplingRequest(
        net=net,
        gnets=gnets,
        sampler=_sampler(sampler, sampler_args, options, len(gnets)),
        own_networks=tuple(own_networks),
        precision=precision,
        compile=compile,
        source=source,
        masks=masks,
        decoder=DecoderOptions(precision=decoder_precision or "auto", tile=decoder_tile),
    )
    if not isinstance(request.sampler, SamplerOptions):  # it may call the guides as it likes
        return request
    if not request.sampler.guided_steps:
        return _without_guides(request, request.sampler, explain=bool(gnet))
    return request if interval is None else dataclasses.replace(request, notes=(_guided_note(request.sampler),))


def _sampler(name: str | None, arguments: dict[str, Any] | None, options: dict[str, Any], num_guides: int) -> Sampler:
    """Return ours, or that of the user's own called `name`; it gets what was given, and has defaults of its own."""
    given = {option: value for option, value in options.items() if value is not None}
    if name is not None:
        return own_sampler(name, given | (arguments or {}), num_guides)
    if arguments is not None:
        raise ConfigError("--sampler-args needs --sampler=module:function")
    return SamplerOptions.from_keywords(num_guides=num_guides, **given)


def _guided_note(sampler: SamplerOptions) -> str:
    levels = sampler.heun.sigmas()
    first, last = sampler.guided_steps[0], sampler.guided_steps[-1]
    return (
        f"Guided: steps {first} to {last} of 0 to {len(levels) - 2}, which start at noise levels {levels[first]:.4g} to"
        f" {levels[last]:.4g}."
    )


def _require_no_guidance(
    guidance: float, interval: tuple[float, float] | None, shares: tuple[float, ...] | None
) -> None:
    for option, value in (("interval", interval), ("gnet-shares", shares), ("guidance", (guidance,))):
        if value is not None and value != (1,):
            text = ",".join(f"{number:g}" for number in value)
            raise ConfigError(f"--{option}={text} needs a guiding network; add --gnet=FILE or leave out --{option}")


def _without_guides(request: SamplingRequest, sampler: SamplerOptions, *, explain: bool) -> SamplingRequest:
    """Leave out guides that no step calls, so that their files need not exist; with `explain`, note why."""
    guidance = sampler.guidance
    note = "Guidance is 1, so the guide is not used; --guidance=1.4, for example, uses it."
    if guidance.weight != 1 and guidance.interval is not None:
        low, high = guidance.interval
        note = f"No step starts at a noise level in ({low:g}, {high:g}], so the guide is not used."
        explain = True
    sampler = dataclasses.replace(sampler, guidance=Guidance(weight=1.0))
    return dataclasses.replace(request, gnets=(), sampler=sampler, notes=(note,) if explain else ())
