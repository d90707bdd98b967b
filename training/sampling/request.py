"""What to sample from and how, put together from a preset and options and checked without any network."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import ConfigError
from torch_utils.precision import Precision, precision_note
from training.fast.prepare import PrepareNetwork
from training.presets import generation_preset, locate
from training.sampling.guidance import Guidance
from training.sampling.image_decoder import DecoderOptions
from training.sampling.sampler import HeunOptions, choose_solver


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """A network, its guides and the sampler's options. Raises ConfigError for what cannot work.

    For use: `generate_images(request.net, request.gnets, ..., prepare=request.prepare(), **request.pictures(),
    **request.sampler_kwargs())`.
    """

    net: str  # path or URL
    gnets: tuple[str, ...] = ()  # those that guide; none where nothing is guided
    guidance: float = 1.0
    interval: tuple[float, float] | None = None  # of noise levels, (low, high]
    shares: tuple[float, ...] | None = None  # of the guides; None = equal
    solver: str = "heun"
    heun: HeunOptions = field(default_factory=HeunOptions)  # noise levels and churn, of every solver
    precision: Precision | None = None  # None = what the network's file says
    compile: bool = False
    source: Path | None = None  # pictures for a network that is conditioned on such
    masks: Path | None = None  # what is to be filled of these
    decoder: DecoderOptions = field(default_factory=DecoderOptions)  # of latents
    notes: tuple[str, ...] = ()  # what a user who gave these options should be told

    def __post_init__(self) -> None:
        choose_solver(self.solver, self.heun)
        Guidance(weight=self.guidance, num_guides=len(self.gnets), shares=self.shares, interval=self.interval)
        for option, path in (("source", self.source), ("masks", self.masks)):
            if path is not None and not path.exists():
                raise ConfigError(
                    f"--{option}={path} does not exist; give a picture, or a folder or ZIP file of pictures"
                )
        if self.masks is not None and self.source is None:
            raise ConfigError(
                f"--masks={self.masks} says what to fill of pictures, and there are none; add --source=PATH"
            )

    def pictures(self) -> dict[str, Any]:
        """The keywords for `generate_images` of a network that is conditioned on pictures."""
        return {"source": self.source, "masks": self.masks}

    def sampler_kwargs(self) -> dict[str, Any]:
        """The keywords for `edm_sampler`, apart from the networks, and for `generate_images` to pass on to it."""
        return {
            **dataclasses.asdict(self.heun),
            "guidance": self.guidance,
            "interval": self.interval,
            "shares": self.shares,
            "solver": self.solver,
        }

    def notes_for(self, device: torch.device) -> tuple[str, ...]:
        """What a user should be told who runs this on `device`."""
        note = None if self.precision is None else precision_note(self.precision, device)
        return self.notes if note is None else (*self.notes, note)

    def prepare(self, announce: Callable[[str], None] | None = None) -> PrepareNetwork:
        """What makes loaded networks ready to sample from; `announce` is told what a user should know meanwhile."""
        return PrepareNetwork(precision=self.precision, compile=self.compile, announce=announce)


def resolve_sampling(
    *,
    preset: str | None = None,
    net: str | None = None,
    gnet: Sequence[str] = (),
    gnet_shares: tuple[float, ...] | None = None,
    guidance: float | None = None,
    interval: tuple[float, float] | None = None,
    solver: str | None = None,
    precision: Precision | None = None,
    compile: bool = False,
    source: Path | None = None,
    masks: Path | None = None,
    decoder_precision: str | None = None,
    decoder_tile: int | None = None,
    **heun: float | None,
) -> SamplingRequest:
    """Fill what was left open (None) from the preset. `heun`: the fields of HeunOptions.

    Takes what `edm2.options.sampling.sampling_options` gives. Raises ConfigError for what cannot work.
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
    if not gnets:
        _require_no_guidance(guidance, interval, gnet_shares)
    request = SamplingRequest(
        net=net,
        gnets=gnets,
        guidance=guidance,
        interval=interval,
        shares=gnet_shares,
        solver="heun" if solver is None else solver,
        precision=precision,
        compile=compile,
        source=source,
        masks=masks,
        decoder=DecoderOptions(precision=decoder_precision or "auto", tile=decoder_tile),
        heun=HeunOptions(**{name: value for name, value in heun.items() if value is not None}),  # type: ignore[arg-type]
    )
    return _without_idle_guides(request, tell=bool(gnet))


def _require_no_guidance(
    guidance: float, interval: tuple[float, float] | None, shares: tuple[float, ...] | None
) -> None:
    for option, value in (("interval", interval), ("gnet-shares", shares), ("guidance", (guidance,))):
        if value is not None and value != (1,):
            text = ",".join(f"{number:g}" for number in value)
            raise ConfigError(f"--{option}={text} needs a guiding network; add --gnet=FILE or leave --{option} out")


def _without_idle_guides(request: SamplingRequest, *, tell: bool) -> SamplingRequest:
    """Leave out guides that no step calls, so that they need not be there; with `tell`, say so in the notes."""
    guided = Guidance(weight=request.guidance, num_guides=len(request.gnets), interval=request.interval)
    if any(guided.applies(sigma) for sigma in request.heun.sigmas()[:-1]):
        return request
    note = "Guidance is 1, so the guide is not used; --guidance=1.4, for example, uses it."
    if request.guidance != 1 and request.interval is not None:
        low, high = request.interval
        note = f"No step starts at a noise level in ({low:g}, {high:g}], so the guide is not used."
        tell = True
    return dataclasses.replace(
        request, gnets=(), guidance=1.0, interval=None, shares=None, notes=(note,) if tell else ()
    )
