"""Pictures of a setting as they come into being: a grid, or the way of one image down the noise levels.

Both are generators: they can be left between any two evaluations of the network, and compute nothing until they are
asked. Shape legend: N images, C channels, H x W pixels.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from edm2.explorer.networks import Loading, Networks
from edm2.explorer.setting import MAX_IMAGES, Setting
from training.encoders import StandardRGBEncoder
from training.images.sheet import contact_sheet
from training.sampling.checks import deal_classes, require_label_dropout, require_writable_images
from training.sampling.generation import GeneratedImages, generate_images
from training.sampling.guidance import SELF
from training.sampling.sampler import edm_evaluations
from training.sampling.solvers import Evaluation

BATCH = 16  # images at once
MAX_FRAMES = 24
_UNSEEN = 232  # grey of images that are not begun


@dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """How far the sampler is, after an evaluation."""

    batch_idx: int
    num_batches: int
    step_idx: int
    num_steps: int
    sigma: float  # noise level of the state
    share: float  # of the whole work, from 0 to 1
    images: np.ndarray | None  # uint8 [N, C, H, W], all of the grid: done, estimated, grey; None where that is costly
    num_columns: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The pictures of a setting."""

    setting: Setting
    images: np.ndarray  # uint8 [N, C, H, W]
    classes: list[int] | None  # of each image, drawn or chosen; None for a network without classes
    num_columns: int
    notes: tuple[str, ...]  # what a user should know

    def sheet(self) -> np.ndarray:
        """What generate_images.py --grid writes: uint8 [C, height, width]."""
        return contact_sheet(self.images, num_columns=self.num_columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """A state of the sampler, as pictures uint8 [C, H, W]."""

    sigma: float
    noisy: np.ndarray  # the state, scaled to the contrast of images
    denoised: np.ndarray  # what the network makes of it


@dataclass(frozen=True, kw_only=True, eq=False)
class Film:
    """The way of one image, from noise to the last frame, which is the image itself."""

    setting: Setting
    frames: list[Frame]
    image_class: int | None
    notes: tuple[str, ...]

    @property
    def image(self) -> np.ndarray:
        """uint8 [C, H, W]."""
        return self.frames[-1].denoised

    def sheet(self) -> np.ndarray:
        """The states in the upper row, what the network makes of them below: uint8 [C, height, width]."""
        rows = [frame.noisy for frame in self.frames] + [frame.denoised for frame in self.frames]
        return contact_sheet(np.stack(rows), num_columns=len(self.frames))


def image_of(setting: Setting, position: int, label_dim: int) -> Setting:
    """`setting` with the image at `position` alone, of a network with `label_dim` classes. Raises ConfigError."""
    if not 0 <= position < setting.num_images:
        raise ConfigError(f"there is no image {position + 1} among {setting.num_images}; choose one that is there")
    class_idx = setting.class_idx
    if class_idx == "all" and label_dim:
        _require_dealt(setting, label_dim)
        class_idx = deal_classes(setting.num_images, label_dim)[position]
    return replace(setting, first_seed=setting.first_seed + position, num_images=1, class_idx=class_idx)


def generate_grid(setting: Setting, networks: Networks, *, batch: int = BATCH) -> Iterator[Loading | Progress | Grid]:
    """The grid of `setting`, after records of the progress. Raises ConfigError."""
    images, notes = yield from _prepared(setting, networks, batch)
    shown: np.ndarray | None = None
    classes: list[int] = []
    for batch_idx, indices in enumerate(images.batches):
        labels, evaluations = _begin(images, indices)
        classes += [] if labels is None else labels.argmax(1).tolist()
        while True:
            try:
                evaluation = next(evaluations)
            except StopIteration as end:
                shown = _filled(shown, images, indices, end.value)
                break
            if not evaluation.is_trial and isinstance(images.encoder, StandardRGBEncoder):
                shown = _filled(shown, images, indices, evaluation.denoised)
            yield _progress(setting, images, batch_idx, evaluation, shown)
    assert shown is not None
    yield Grid(
        setting=setting,
        images=shown,
        classes=classes or None,
        num_columns=images.sheet_columns,
        notes=notes,
    )


def generate_film(setting: Setting, networks: Networks, *, num_frames: int = 8) -> Iterator[Loading | Progress | Film]:
    """The way of the one image of `setting` in so many frames, after records of the progress. Raises ConfigError."""
    if setting.num_images != 1:
        raise ConfigError(f"a film strip shows one image and the setting has {setting.num_images}; choose one")
    if not 2 <= num_frames <= MAX_FRAMES:
        raise ConfigError(f"a film strip of {num_frames:g} frames cannot be; choose 2 to {MAX_FRAMES}")
    images, notes = yield from _prepared(setting, networks, 1)
    chosen = set(np.linspace(0, setting.num_steps, num_frames).round().astype(int).tolist())
    labels, evaluations = _begin(images, images.batches[0])
    frames: list[Frame] = []
    while True:
        try:
            evaluation = next(evaluations)
        except StopIteration as end:
            image = _decoded(images, end.value)[0]
            break
        if evaluation.step_idx in chosen and not evaluation.is_trial:
            contrast = images.net.sigma_data / (images.net.sigma_data**2 + evaluation.sigma**2) ** 0.5
            noisy, denoised = (_decoded(images, x)[0] for x in (evaluation.x * contrast, evaluation.denoised))
            frames.append(Frame(sigma=evaluation.sigma, noisy=noisy, denoised=denoised))
        yield _progress(setting, images, 0, evaluation, None)
    frames.append(Frame(sigma=0.0, noisy=image, denoised=image))
    image_class = None if labels is None else int(labels.argmax(1)[0])
    yield Film(setting=setting, frames=frames, image_class=image_class, notes=notes)


def _prepared(
    setting: Setting, networks: Networks, batch: int
) -> Generator[Loading, None, tuple[GeneratedImages, tuple[str, ...]]]:
    """The networks of `setting`, loaded, and its batches, checked; nothing is computed yet."""
    request = setting.request()
    loaded = yield from networks.load(setting.net, setting.ema)
    guides: list[Any] = []
    others = []
    for name in request.gnets:
        if name == SELF:
            guides.append(SELF)
        else:
            others.append((yield from networks.load(name)))
            guides.append(others[-1].net)
    for what, wanted in (("this guide", SELF in request.gnets), ("class none", setting.class_idx == "none")):
        if wanted:
            require_label_dropout(loaded.net.label_dim, loaded.info, setting.net, what)
    _require_dealt(setting, loaded.net.label_dim)
    images = generate_images(
        net=loaded.net,
        gnet=guides,
        encoder=loaded.encoder,
        seeds=setting.seeds,
        class_idx=setting.class_idx,
        max_batch_size=batch,
        device=networks.device,
        **request.sampler_kwargs(),
    )
    require_writable_images(images.net, images.encoder)
    idle = setting.guide is not None and setting.guidance == 1
    told = ("Guidance is 1, so the guide is not used",) if idle else request.notes
    return images, (*told, *(note for each in (loaded, *others) for note in each.notes))


def _require_dealt(setting: Setting, label_dim: int) -> None:
    """Raise ConfigError, in an explorer's words, where the images cannot be dealt over all classes."""
    if setting.class_idx == "all" and label_dim and setting.num_images % label_dim:
        fit = [label_dim * k for k in range(1, 5) if label_dim * k <= MAX_IMAGES]
        instead = f"choose {' or '.join(map(str, fit))} images, or another class" if fit else "choose another class"
        raise ConfigError(
            f"{setting.num_images} images cannot show each of {label_dim} classes equally often; {instead}"
        )


def _begin(images: GeneratedImages, indices: np.ndarray) -> tuple[torch.Tensor | None, Any]:
    """The labels of the images of a batch, if they have any, and the generator that samples it without gradients."""
    random, noise, labels = images.draw(indices)
    evaluations = edm_evaluations(
        net=images.net,
        noise=noise,
        labels=labels,
        gnet=images.gnet,
        randn_like=random.randn_like,
        **images.sampler_kwargs,
    )

    @torch.no_grad()
    def sample() -> Generator[Evaluation, None, torch.Tensor]:
        return (yield from evaluations)

    told = None if labels is None or images.unlabelled else labels[: len(indices)]
    return told, sample()


def _decoded(images: GeneratedImages, latents: torch.Tensor) -> np.ndarray:
    return images.decode(latents).cpu().numpy()


def _filled(
    shown: np.ndarray | None, images: GeneratedImages, indices: np.ndarray, latents: torch.Tensor
) -> np.ndarray:
    """A copy of all pictures, with those at `indices` decoded anew."""
    pictures = _decoded(images, latents[: len(indices)])
    result = shown.copy() if shown is not None else None
    if result is None:
        result = np.full([len(images.seeds), *pictures.shape[1:]], _UNSEEN, dtype=np.uint8)
    result[indices] = pictures
    return result


def _progress(
    setting: Setting, images: GeneratedImages, batch_idx: int, evaluation: Evaluation, shown: np.ndarray | None
) -> Progress:
    num_batches = len(images.batches)
    within = (evaluation.step_idx + (0.5 if evaluation.is_trial else 0)) / setting.num_steps
    return Progress(
        batch_idx=batch_idx,
        num_batches=num_batches,
        step_idx=evaluation.step_idx,
        num_steps=setting.num_steps,
        sigma=evaluation.sigma,
        share=(batch_idx + within) / num_batches,
        images=shown,
        num_columns=images.sheet_columns,
    )
