"""Compare loss and gradient in each number format with float32, on the shipped network and data set.

    python -m benchmarks.numerics_training

The reference is the plain implementation in tests/helpers/oracle.py, in float32. Without a GPU, float16 is computed on
the CPU: slowly, and with the CPU's own order of sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import torch

from dnnlib.cli import main
from tests.helpers.oracle import PlainPrecond, plain_loss
from torch_utils.distributed import resolve_device
from torch_utils.precision import numerics
from training.dataset.image_folder import ImageFolderDataset
from training.encoders import StandardRGBEncoder
from training.fast.training_network import FastPrecond
from training.loss import EDM2Loss
from training.presets import generation_preset, locate, training_preset
from training.run.update import normalize_weights
from training.snapshot import load_snapshot

MODES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def flat(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return all gradients as one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients])


@dataclass(frozen=True, kw_only=True)
class FormatError:
    """Differences of one number format from the plain network in float32."""

    mode: str
    loss: float  # relative
    mean_loss: float
    gradient: float  # relative
    degrees: float  # between the gradients

    def row(self) -> dict[str, str]:
        """Return a row of a table."""
        return {
            "format": self.mode,
            "loss, relative error": f"{self.loss:.1e}",
            "mean loss, difference": f"{self.mean_loss:+.1e}",
            "gradient": f"{self.gradient:.1e}",
            "angle, degrees": f"{self.degrees:.2f}",
        }


def compare_formats(num: int, device: torch.device, loss_scale: float = 1.0) -> Iterator[FormatError]:
    """Yield the errors of each number format on `num` images of the shipped data set."""
    config = training_preset("fashion")
    snapshot = load_snapshot(locate(generation_preset("demo").net))
    net: Any = snapshot.net.to(device, torch.float32).train().requires_grad_(True)
    normalize_weights(net)
    dataset = ImageFolderDataset(locate(config.data), use_labels=True)
    step = len(dataset) // num
    items = [dataset[index * step] for index in range(num)]
    images = StandardRGBEncoder().encode_latents(torch.stack([torch.from_numpy(item[0]) for item in items])).to(device)
    labels = torch.stack([torch.from_numpy(item[1]) for item in items]).to(device)
    generator = torch.Generator().manual_seed(0)
    sigmas = torch.randn([num, 1, 1, 1], generator=generator).to(device)
    noise = torch.randn(images.shape, generator=generator).to(device)

    arguments = dict(net._init_kwargs)
    arguments.pop("use_fp16", None)
    plain = PlainPrecond(*net._init_args, **arguments).to(device)
    plain.load_state_dict(net.state_dict())
    with numerics(cudnn_benchmark=False):
        reference = plain_loss(plain, images, labels, sigmas, noise, P_mean=config.P_mean, P_std=config.P_std)
        expected = flat(list(torch.autograd.grad(reference.sum() / num, list(plain.parameters()))))
    loss_fn = EDM2Loss(P_mean=config.P_mean, P_std=config.P_std)
    for mode, dtype in MODES.items():
        if mode == "tf32" and device.type != "cuda":
            continue
        scale = loss_scale if mode == "fp16" else 1.0
        with numerics(cudnn_benchmark=False, precision="tf32" if mode == "tf32" else "fp32"):
            fast = FastPrecond(net, dtype=dtype)
            loss = loss_fn(fast, images, labels, rnd_normal=sigmas, unit_noise=noise)
            ours = flat(list(torch.autograd.grad(loss.sum() * (scale / num), list(net.parameters())))) / scale
        apart = loss.detach() - reference.detach()
        cosine = torch.nn.functional.cosine_similarity(ours, expected, dim=0).clamp(-1, 1)
        yield FormatError(
            mode=mode,
            loss=float(apart.norm() / reference.detach().norm()),
            mean_loss=float(apart.mean()),
            gradient=float((ours - expected).norm() / expected.norm()),
            degrees=float(cosine.acos().rad2deg()),
        )


@click.command()
@click.option("--num", default=64, show_default=True, help="Images of the batch")
@click.option("--loss-scale", default=1.0, show_default=True, help="For float16")
def numerics_training(num: int, loss_scale: float) -> None:
    """Print a row for each mode."""
    device = resolve_device()
    click.echo(f"{num} images, {device.type}, torch {torch.__version__}")
    click.echo("| mode | loss, relative error | mean loss, difference | gradient, relative error | angle, degrees |")
    click.echo("|---|---|---|---|---|")
    for error in compare_formats(num, device, loss_scale):
        click.echo("| " + " | ".join(error.row().values()) + " |")


if __name__ == "__main__":
    main(numerics_training)
