"""Explore a model in the browser: command line."""

import importlib.util
import webbrowser

import click

import dnnlib.cli
from dnnlib.errors import ConfigError
from torch_utils.distributed import resolve_device
from torch_utils.precision import PRECISIONS, Precision, numerics, precision_note


@click.command()
@click.option(
    "--net", "nets", metavar="PATH|URL|NAME", multiple=True, help="Network: file, model folder, URL or hub name"
)
@click.option("--run", "runs", metavar="DIR", multiple=True, help="Folder of a run, for any EMA length")
@click.option("--gnet", "gnets", metavar="PATH|URL|NAME", multiple=True, help="Guiding network to choose from")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at")
@click.option("--port", type=click.IntRange(0, 65535), help="Port [default: the first free one from 7860 on]")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or mps [default: the best one here]")
@click.option(
    "--precision",
    metavar="NAME",
    type=click.Choice(PRECISIONS),
    help="fp32, tf32, fp16 or bf16 [default: fp16 on CUDA where the network says so, else fp32]",
)
@click.option(
    "--cache-size", metavar="SIZE", type=dnnlib.cli.BYTES, default="4GB", show_default=True,
    help="Memory for networks that are kept at hand",
)  # fmt: skip
@click.option("--open", "open_browser", is_flag=True, help="Open the page in a browser")
def cmdline(
    nets: tuple[str, ...],
    runs: tuple[str, ...],
    gnets: tuple[str, ...],
    host: str,
    port: int | None,
    device: str | None,
    precision: Precision | None,
    cache_size: int,
    open_browser: bool,
) -> None:
    """Explore a model in the browser: change seeds, class, steps, guidance or EMA length, and see what comes of it.

    Without --net and --run it is the model that the repository carries. --net, --run and --gnet may be given several
    times; the page offers all of them. Each picture comes with the command that makes it again.

    \b
    python explore.py --open
    python explore.py --run=training-runs/fashion --gnet=models/fashion-guide.safetensors

    Needs Gradio: pip install -e '.[explore]'
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page needs Gradio, which is not installed; pip install -e '.[explore]' brings it")
    from edm2.explorer.choices import offered
    from edm2.explorer.networks import Networks
    from edm2.explorer.serve import address, listen, quiet_gradio, serve

    resolved = resolve_device(device)
    networks = Networks(resolved, precision=precision, max_bytes=cache_size)
    with listen(host, port) as listening:
        loopback = listening.getsockname()[0] in ("127.0.0.1", "::1")
        choices = offered(nets, runs, gnets, networks, typed=loopback)

        quiet_gradio()
        from edm2.explorer.backend import Explorer
        from edm2.explorer.jobs import Jobs
        from edm2.explorer.page import Page

        jobs = Jobs(begin=networks.enter_thread)
        page = Page(Explorer(networks), choices, jobs, given_device=device)
        url = address(listening)
        note = None if precision is None else precision_note(precision, resolved)
        for line in (note, None if loopback else f"Whoever reaches {host} can use the page; it asks for no password."):
            if line is not None:
                click.echo(line)
        click.echo(f"The explorer is at {url} (^C ends it)")
        if open_browser:
            webbrowser.open(url)
        try:
            with numerics(cudnn_benchmark=False):
                serve(page.demo, listening)
        finally:
            jobs.close()


if __name__ == "__main__":
    dnnlib.cli.main(cmdline)
