"""Explore a model in the browser: command line."""

from __future__ import annotations

import importlib.util
import webbrowser

from dnnlib.start import ASKED_FOR_HELP

import click

import dnnlib.cli
from dnnlib.cli import SOURCE
from dnnlib.errors import ConfigError
from edm2.options.sampling import own_networks_option, settled_precision
from torch_utils.precision_names import AUTO, PRECISIONS, Precision

if not ASKED_FOR_HELP:  # which does not wait for torch
    from torch_utils.distributed import resolve_device
    from torch_utils.precision import numerics, precision_note


@click.command()
@click.option(
    "--net",
    "nets",
    metavar="PATH|URL|NAME",
    type=SOURCE,
    multiple=True,
    help="Network: file, model folder, URL or hub name",
)
@click.option("--run", "runs", metavar="DIR", type=SOURCE, multiple=True, help="Folder of a run, for any EMA length")
@click.option("--gnet", "gnets", metavar="PATH|URL|NAME", type=SOURCE, multiple=True, help="Guide to choose from")
@own_networks_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on")
@click.option("--port", type=click.IntRange(0, 65535), help="Port [default: first free port from 7860]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps [default: best available]")
@click.option(
    "--precision",
    metavar="NAME",
    type=click.Choice((*PRECISIONS, AUTO)),
    help="fp32, tf32, fp16, bf16; auto = fastest here [default: fp16 on CUDA where the network says so, else fp32]",
)
@click.option(
    "--cache-size", metavar="SIZE", type=dnnlib.cli.BYTES, default="4GB", show_default=True,
    help="Memory for loaded networks",
)  # fmt: skip
@click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser")
def cmdline(
    nets: tuple[str, ...],
    runs: tuple[str, ...],
    gnets: tuple[str, ...],
    own_networks: tuple[str, ...],
    host: str,
    port: int | None,
    device: str | None,
    precision: Precision | None,
    cache_size: int,
    open_browser: bool,
) -> None:
    """Explore a model interactively in the browser: seeds, class, steps, guidance and EMA length.

    Without --net and --run, the page shows the model that the repository ships. --net, --run and --gnet may be given
    several times; the page offers all of them. Each image comes with the command that makes it again.

    \b
    python explore.py --open
    python explore.py --run=training-runs/fashion --gnet=models/fashion-guide.safetensors

    Needs Gradio: pip install -e '.[explore]'
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio, which is not installed; run pip install -e '.[explore]'")
    from edm2.explorer.networks import Networks
    from edm2.explorer.serve import address, listen, quiet_gradio, serve
    from edm2.explorer.setting import offered

    resolved = resolve_device(device)
    precision = settled_precision(precision, device)
    networks = Networks(resolved, precision=precision, max_bytes=cache_size, own_networks=own_networks)
    with listen(host, port) as listening:
        loopback = listening.getsockname()[0] in ("127.0.0.1", "::1")
        choices = offered(nets, runs, gnets, networks, typed=loopback)
        with quiet_gradio():
            from edm2.explorer.grids import Explorer
            from edm2.explorer.page import Page

            page = Page(Explorer(networks), choices, given_device=device)
        note = None if precision is None else precision_note(precision, resolved)
        for line in (note, None if loopback else f"Anyone who can reach {host} can use the page; it has no password."):
            if line is not None:
                click.echo(line)
        click.echo(f"The explorer is at {address(listening)} (^C ends it)")
        if open_browser:
            webbrowser.open(address(listening))
        with numerics(cudnn_benchmark=False):
            serve(page.demo, listening, host)


if __name__ == "__main__":
    dnnlib.cli.main(cmdline)
