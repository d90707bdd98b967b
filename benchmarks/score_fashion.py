"""Judge the Fashion-MNIST samples of a network by a small classifier, which is trained here.

Two figures, each also for held-out real images, the figures of a perfect generator:
- recognized: the share of images that the classifier puts into the class they were made for;
- distance: Fréchet distance to the real training images in the classifier's 64 features. This is not FID: it only
  compares networks on this data set with one another, at an equal number of images.

    python -m benchmarks.score_fashion --net=models/fashion.safetensors --gnet=models/fashion-guide.safetensors \\
        --guidance=1,1.5,2
"""

from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dnnlib.cli import main
from training.dataset.image_folder import ImageFolderDataset
from training.sampling.generation import generate_images

DATA = Path(__file__).parents[1] / "data"
NUM_CLASSES = 10


class Classifier(nn.Module):
    """Gray 32x32 pixels, scaled to [-1, 1], to class logits; the features are the input of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(32, 64, 5, stride=2, padding=2)]
        self.body = nn.Sequential(*convolutions, nn.ReLU(), nn.Flatten(), nn.Linear(64 * 64, 64), nn.ReLU())
        self.head = nn.Linear(64, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [N, 10] for pixels [N, 1, 32, 32]."""
        return self.head(self.body(x))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return features [N, 64] of uint8 [N, 1, 32, 32]."""
        with torch.no_grad():
            return torch.cat([self.body(scaled(part)) for part in images.split(500)])

    def recognized(self, images: torch.Tensor, classes: torch.Tensor) -> float:
        """Return the share of `images` that are put into their class [N]."""
        with torch.no_grad():
            return float((self.head(self.features(images)).argmax(dim=1) == classes).float().mean())


def scaled(images: torch.Tensor) -> torch.Tensor:
    """Scale uint8 pixels to [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def load(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images [N, 1, 32, 32] and class indices [N] of a data set."""
    dataset = ImageFolderDataset(path)
    items = [dataset[i] for i in range(len(dataset))]
    return torch.from_numpy(np.stack([i for i, _ in items])), torch.from_numpy(np.stack([c for _, c in items])).argmax(
        1
    )


def train_classifier(images: torch.Tensor, classes: torch.Tensor, num_epochs: int = 8) -> Classifier:
    """Train a classifier on the real training images, the same one at every call."""
    torch.manual_seed(0)
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    for _ in range(num_epochs):
        for batch in torch.randperm(len(images)).split(100):
            loss = F.cross_entropy(net(scaled(images[batch])), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between Gaussians fitted to features [N, D]: |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace)


@click.command()
@click.option("--net", required=True, help="Network to judge")
@click.option("--gnet", help="Its guide")
@click.option("--guidance", default="1", show_default=True, help="Strengths to try, comma separated")
@click.option("--num", default=1000, show_default=True, help="Images, evenly over the classes")
@click.option("--steps", default=32, show_default=True, help="Sampling steps")
def score(net: str, gnet: str | None, guidance: str, num: int, steps: int) -> None:
    """Print both figures for held-out real images and for samples at each guidance strength."""
    real, real_classes = load(DATA / "fashion-mnist-32.zip")
    held_out, held_out_classes = load(DATA / "fashion-mnist-32-heldout.zip")
    classifier = train_classifier(real, real_classes)
    reference = classifier.features(real)

    def report(name: str, images: torch.Tensor, classes: torch.Tensor) -> None:
        distance = frechet_distance(classifier.features(images), reference)
        recognized = classifier.recognized(images, classes)
        click.echo(f"{name:<28} images {len(images):>5}   recognized {recognized:6.1%}   distance {distance:8.3f}")

    report("held-out real images", held_out, held_out_classes)
    for strength in [float(text) for text in guidance.split(",")]:
        batches = generate_images(
            net,
            gnet if strength != 1 else None,
            seeds=range(num),
            class_idx="all",
            max_batch_size=100,
            guidance=strength,
            num_steps=steps,
        )
        images = torch.cat([batch.images for batch in batches if batch.images is not None]).cpu()
        report(f"samples, guidance {strength:g}", images, torch.arange(num) // (num // NUM_CLASSES))


if __name__ == "__main__":
    main(score)
