"""Compare one evaluation of 2N images with two of N, for a network guided by itself without labels.

On a CUDA device the shapes of img512-S in float16, else two small networks in float32, all with random weights. The
ways take turns, and the fastest evaluation of each counts; the denoised images of both must agree.

    python -m benchmarks.self_guidance
"""

import datetime
import platform
import time

import click
import torch

from benchmarks.sample import IMG512_S, SMALL, random_network
from torch_utils.precision import numerics
from training.fast.prepare import PrepareNetwork
from training.sampling.denoisers import WithoutLabels, bind_labels, merged_call
from training.sampling.guidance import Guidance

TINY = {"img_resolution": 32, "img_channels": 1, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2, 4],
        "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 32}  # fmt: skip  # as the shipped network


def measure(options: dict, batch: int, device: torch.device, *, repeats: int) -> tuple[float, float, float]:
    """Return the seconds of a guided evaluation of `batch` images in two evaluations and in one, and their difference.

    The difference is the largest, relative to the spread of the images.
    """
    net, _ = random_network(options, device, seed=0)
    net = PrepareNetwork()(net, device)
    random = torch.Generator().manual_seed(1)
    size = net.img_resolution
    x = torch.randn([batch, net.img_channels, size, size], generator=random).to(device) * 2
    labels = torch.eye(net.label_dim)[torch.randint(net.label_dim, [batch], generator=random)].to(device)
    guidance = Guidance(weight=1.5, num_guides=1)
    main, guide = bind_labels(net, labels), bind_labels(WithoutLabels(net), labels)
    ways = [guidance.wrap(main, [guide], both) for both in (None, merged_call(net, labels))]

    def run(way: int) -> torch.Tensor:
        return ways[way](x, 2.0, 2.0)

    two, one = run(0), run(1)
    difference = float((two - one).abs().max() / two.std())
    seconds = [float("inf")] * 2
    for _ in range(repeats):
        for way in range(2):
            start = time.perf_counter()
            run(way)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[way] = min(seconds[way], time.perf_counter() - start)
    return seconds[0], seconds[1], difference


@click.command()
@click.option("--repeats", default=20, show_default=True, help="Evaluations of each way")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
def main(repeats: int, device: str) -> None:
    """Print a line for each network and batch size."""
    place = torch.device(device)
    on_gpu = place.type == "cuda"
    machine = (
        torch.cuda.get_device_name(place) if on_gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    click.echo(f"{datetime.date.today()}, {machine}, torch {torch.__version__}")
    networks = {"img512-S": IMG512_S} if on_gpu else {"as the shipped network": TINY, "5 million parameters": SMALL}
    with numerics(cudnn_benchmark=True), torch.no_grad():
        for name, options in networks.items():
            for batch in (1, 8, 32):
                two, one, difference = measure(options, batch, place, repeats=repeats)
                assert difference < (0.05 if on_gpu else 1e-4), f"{name}: the images differ by {difference:.3g}"
                click.echo(
                    f"{name}, batch {batch}: two evaluations {two * 1e3:.2f} ms, one {one * 1e3:.2f} ms,"
                    f" ratio {two / one:.2f}; difference {difference:.1e}"
                )


if __name__ == "__main__":
    main()
