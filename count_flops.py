"""Count the parameters and operations of a network and of sampling from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib.start import ASKED_FOR_HELP

import click

import dnnlib.cli
from dnnlib.atomic import write_text
from dnnlib.cli import PATH, SOURCE
from dnnlib.errors import ConfigError
from dnnlib.text import unknown
from edm2.options.sampling import sampling_options_without
from training.presets import GENERATION, TRAINING

if not ASKED_FOR_HELP:  # which does not wait for torch
    from training.flops import FlopCount, RunCost, count_flops, decoder_of, network_of, run_cost
    from training.sampling.denoisers import SELF
    from training.sampling.networks import require_label_dropout
    from training.sampling.options import SamplerOptions
    from training.sampling.request import SamplingRequest, resolve_sampling

# Users' scripts import count_flops from here.
__all__ = ["FlopCount", "count_flops"]

CONVENTION = (
    "One multiply-accumulate counts as one operation, as in the papers; so does any other operation on one element."
)


@click.command()
@click.argument("source", metavar="[NETWORK|PRESET]", type=SOURCE, required=False)
@sampling_options_without(
    "precision", "compile", "decoder-tile", "decoder-precision", "source", "masks", "sampler", "sampler-args", "network"
)
@click.option("--decoder/--no-decoder", default=None, help="Count the VAE decoder [default: for networks of latents]")
@click.option("--json", "json_file", metavar="FILE", type=PATH, help="Write the counts as JSON")
def cmdline(source: str | None, decoder: bool | None, json_file: Path | None, **sampling: Any) -> None:
    """Count the parameters and operations of a network, and of sampling one image with it.

    NETWORK is a file or URL, PRESET the name of a training or generation preset. This needs neither a GPU nor weights;
    published files are not downloaded. Sampling counts the evaluations of every network by the sampler's options.

    \b
    python count_flops.py \\
        https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img512-s-2147483-0.130.pkl

    \b
    # A guided run: both networks, 32 steps, and the decoder
    python count_flops.py edm2-img512-s-guid-interval-fid

    \b
    # The network of a training preset
    python count_flops.py edm2-img512-xxl
    """
    request = resolve(source, sampling)
    names = [request.net, *request.gnets]
    nets = [network_of(request.net)]
    nets += [nets[0] if name == SELF else network_of(name) for name in request.gnets]
    if SELF in names:
        require_label_dropout(nets[0].label_dim, None, request.net, "--gnet=self")
    counts = [count_flops(net) for net in nets]
    codec = decoder_of(nets[0], request.net) if decoder is not False else None
    assert isinstance(request.sampler, SamplerOptions)
    cost = run_cost(nets[0], nets[1:], request.sampler, decoder=codec)
    if decoder and not cost.decoder_flops:
        raise ConfigError(f"{request.net} generates pixels and has no decoder; omit --decoder")
    click.echo("\n".join(describe(names, counts, request, cost)))
    if json_file is not None:
        networks = [{"network": name, **count._asdict()} for name, count in zip(names, counts, strict=True)]
        image = {**cost._asdict(), "total_flops": cost.total_flops}
        record = {"networks": networks, "image": image, "counts": CONVENTION}
        write_text(json_file, json.dumps(record, indent=2) + "\n")


def resolve(source: str | None, sampling: dict[str, Any]) -> SamplingRequest:
    """Resolve the networks and sampling options. Raises ConfigError for invalid ones."""
    if source is not None:
        if sampling["net"] is not None or sampling["preset"] is not None:
            raise ConfigError(f"{source} and --net or --preset both name a network; give one of them")
        sampling = {**sampling, ("preset" if source in GENERATION else "net"): source}
    elif sampling["preset"] in TRAINING:
        sampling = {**sampling, "net": sampling["preset"], "preset": None}
    elif sampling["preset"] not in (None, *GENERATION):
        raise ConfigError(unknown("preset", sampling["preset"], [*TRAINING, *GENERATION]))
    return resolve_sampling(**sampling)


def describe(names: Sequence[str], counts: Sequence[FlopCount], request: SamplingRequest, cost: RunCost) -> list[str]:
    """The lines of the output."""
    lines = []
    for name, count, role in zip(names, counts, ("Network", *["Guide"] * len(counts)), strict=False):
        lines += [f"{role}: {name}", f"  parameters            {count.total_params / 1e6:14.6f} M", "  one evaluation"]
        lines += [f"    {kind:<20}{flops / 1e9:14.6f} Gflops" for kind, flops in sorted(count.by_operation.items())]
        lines.append(f"    {'total':<20}{count.total_flops / 1e9:14.6f} Gflops")
    assert isinstance(request.sampler, SamplerOptions)
    guides = "".join(f" + {calls} of a guide" for calls in cost.guide_calls)
    lines.append(
        f"One image: {request.sampler.heun.num_steps} steps of {request.sampler.solver},"
        f" {cost.main_calls} evaluations{guides}"
    )
    parts = {"network": cost.main_flops, "guides": cost.guide_flops, "decoder": cost.decoder_flops}
    lines += [f"    {name:<20}{flops / 1e9:14.3f} Gflops" for name, flops in parts.items() if flops]
    lines.append(f"    {'total':<20}{cost.total_flops / 1e9:14.3f} Gflops")
    return [*lines, CONVENTION]


if __name__ == "__main__":
    dnnlib.cli.main(cmdline)
