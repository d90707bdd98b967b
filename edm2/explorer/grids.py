"""Images of a setting while they are computed: grids, pairs of grids, and film strips along the noise levels.

All are generators of records, and compute nothing until the next record is asked for: stopping is closing them.
Shape legend: N images, C channels, H x W pixels.
"""

from collections.abc import Generator, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dnnlib.errors import ConfigError
from edm2.explorer.networks import BoundedCache, Loading, Networks, stamp
from edm2.explorer.setting import BATCH, MAX_IMAGES, Setting
from training.encoders import StandardRGBEncoder
from training.images.sheet import contact_sheet
from training.sampling.denoisers import SELF
from training.sampling.image_batches import GeneratedImages, deal_classes
from training.sampling.networks import require_label_dropout, require_writable_images
from training.sampling.solvers import Evaluation

_MAX_FRAMES = 24
_CACHE_BYTES = 256 << 20
_PENDING = 232  # gray value of images that are not started


@dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """State of the sampler after an evaluation of the network."""

    text: str
    share: float  # of the whole work, from 0 to 1
    images: np.ndarray | None  # uint8 [N, C, H, W]: finished, estimated or gray; None if decoding is costly
    num_columns: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The images of a setting."""

    setting: Setting
    images: np.ndarray  # uint8 [N, C, H, W]
    classes: list[int] | None  # of each image, drawn or chosen; None without classes
    num_columns: int
    notes: tuple[str, ...]  # for the user

    def sheet(self) -> np.ndarray:
        """The contact sheet that generate_images.py --grid writes: uint8 [C, height, width]."""
        return contact_sheet(self.images, num_columns=self.num_columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """A state of the sampler as images, uint8 [C, H, W]."""

    sigma: float
    noisy: np.ndarray  # the state, scaled to the contrast of images
    denoised: np.ndarray  # the network's estimate


@dataclass(frozen=True, kw_only=True, eq=False)
class Film:
    """One image's way from noise to the last frame, which is the image itself."""

    setting: Setting
    frames: list[Frame]
    image_class: int | None
    notes: tuple[str, ...]

    @property
    def image(self) -> np.ndarray:
        """uint8 [C, H, W]."""
        return self.frames[-1].denoised

    def sheet(self) -> np.ndarray:
        """The states in the upper row, the network's estimates in the lower row: uint8 [C, height, width]."""
        rows = [frame.noisy for frame in self.frames] + [frame.denoised for frame in self.frames]
        return contact_sheet(np.stack(rows), num_columns=len(self.frames))


Record = Loading | Progress | Grid | Film
Records = Generator[Record, None, None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """The newest record of each of two settings; None if it is not started."""

    a: Record | None
    b: Record | None


class Explorer:
    """Grids, pairs of grids and film strips; finished ones are cached. Thread-safe as long as one runs at a time."""

    def __init__(self, networks: Networks, *, batch: int = BATCH) -> None:
        self.networks = networks
        self.batch = batch
        self._finished: BoundedCache[Grid | Film] = BoundedCache(_CACHE_BYTES)

    def grid(self, setting: Setting) -> Records:
        """See `generate_grid`."""
        return self._cached(setting, 0, generate_grid(setting, self.networks, batch=self.batch))

    def film(self, setting: Setting, position: int, *, num_frames: int) -> Records:
        """Film strip of the image at `position` in the grid of `setting`; see `generate_film`."""
        label_dim = self.networks.facts(setting.net).label_dim if setting.class_idx == "all" else 0
        image = image_of(setting, position, label_dim)
        return self._cached(image, num_frames, generate_film(image, self.networks, num_frames=num_frames))

    def both(self, a: Setting, b: Setting) -> Generator[Pair, None, None]:
        """The grids of two settings, one after the other."""
        record = None
        for record in self.grid(a):
            yield Pair(a=record, b=None)
        for other in self.grid(b):
            yield Pair(a=record, b=other)

    def _cached(self, setting: Setting, num_frames: int, records: Records) -> Records:
        stamps = stamp(setting.net), stamp(setting.guide) if setting.guide else None
        key: Hashable = (setting, num_frames, stamps)
        finished = self._finished.get(key)
        if finished is not None:
            yield finished
            return
        for record in records:
            if isinstance(record, Grid | Film):
                self._finished.put(key, record, record.sheet().nbytes)
            yield record


def image_of(setting: Setting, position: int, label_dim: int) -> Setting:
    """Reduce `setting` to its image at `position`, for a network with `label_dim` classes. Raises ConfigError."""
    if not 0 <= position < setting.num_images:
        raise ConfigError(f"image {position + 1} does not exist; choose one from 1 to {setting.num_images}")
    class_idx = setting.class_idx
    if class_idx == "all" and label_dim:
        _require_dealt(setting, label_dim)
        class_idx = deal_classes(setting.num_images, label_dim)[position]
    return replace(setting, first_seed=setting.first_seed + position, num_images=1, class_idx=class_idx)


def generate_grid(setting: Setting, networks: Networks, *, batch: int = BATCH) -> Records:
    """Yield progress records, then the Grid of `setting`. Raises ConfigError."""
    images, notes = yield from _prepare(setting, networks, batch)
    # Estimates of RGB images are shown after each evaluation; decoding latents would slow sampling down.
    shows_estimates = isinstance(images.encoder, StandardRGBEncoder)
    shown: np.ndarray | None = None
    classes: list[int] = []
    for batch_idx, indices in enumerate(images.batches):
        for evaluation, latents, labels in _evaluations(images, indices):
            if evaluation is None:
                classes += [] if labels is None else labels.argmax(1).tolist()
            if evaluation is None or (shows_estimates and not evaluation.is_trial):
                shown = _with_decoded(shown, images, indices, latents)
            if evaluation is not None:
                yield _progress(setting, images, batch_idx, evaluation, shown)
    assert shown is not None
    columns = images.sheet_columns
    yield Grid(setting=setting, images=shown, classes=classes or None, num_columns=columns, notes=notes)


def generate_film(setting: Setting, networks: Networks, *, num_frames: int = 8) -> Records:
    """Yield progress records, then the Film with `num_frames` of the one image of `setting`. Raises ConfigError."""
    if setting.num_images != 1:
        raise ConfigError(f"a film strip shows one image and the setting has {setting.num_images}; choose one")
    if not 2 <= num_frames <= _MAX_FRAMES:
        raise ConfigError(f"a film strip of {num_frames:g} frames is not possible; choose from 2 to {_MAX_FRAMES}")
    images, notes = yield from _prepare(setting, networks, 1)
    chosen = set(np.linspace(0, setting.num_steps, num_frames).round().astype(int).tolist())
    frames: list[Frame] = []
    image_class = None
    for evaluation, latents, labels in _evaluations(images, images.batches[0]):
        if evaluation is None:
            image = _decoded(images, latents)[0]
            frames.append(Frame(sigma=0.0, noisy=image, denoised=image))
            image_class = None if labels is None else int(labels.argmax(1)[0])
            continue
        if evaluation.step_idx in chosen and not evaluation.is_trial:
            contrast = images.net.sigma_data / (images.net.sigma_data**2 + evaluation.sigma**2) ** 0.5
            noisy, denoised = (_decoded(images, x)[0] for x in (evaluation.x * contrast, latents))
            frames.append(Frame(sigma=evaluation.sigma, noisy=noisy, denoised=denoised))
        yield _progress(setting, images, 0, evaluation, None)
    yield Film(setting=setting, frames=frames, image_class=image_class, notes=notes)


def _prepare(
    setting: Setting, networks: Networks, batch: int
) -> Generator[Loading, None, tuple[GeneratedImages, tuple[str, ...]]]:
    request = setting.request()
    main = yield from networks.load(setting.net, setting.ema)
    loaded = [main]
    guides: list[Any] = []
    for name in request.gnets:
        if name == SELF:
            guides.append(SELF)
        else:
            loaded.append((yield from networks.load(name)))
            guides.append(loaded[-1].net)
    for use, wanted in (("this guide", SELF in request.gnets), ("class none", setting.class_idx == "none")):
        if wanted:
            require_label_dropout(main.net.label_dim, main.info, setting.net, use)
    _require_dealt(setting, main.net.label_dim)
    images = request.generate(
        net=main.net,
        gnets=guides,
        encoder=main.encoder,
        seeds=setting.seeds,
        class_idx=setting.class_idx,
        max_batch_size=batch,
        device=networks.device,
    )
    require_writable_images(images.net, images.encoder)
    idle = setting.guide is not None and setting.guidance == 1
    notes = ("Guidance is 1, so the guide is not used",) if idle else request.notes
    return images, (*notes, *(note for each in loaded for note in each.notes))


def _require_dealt(setting: Setting, label_dim: int) -> None:
    """Raise ConfigError, with numbers that fit, if the images do not divide over all classes."""
    if setting.class_idx == "all" and label_dim and setting.num_images % label_dim:
        fit = [str(label_dim * k) for k in range(1, 5) if label_dim * k <= MAX_IMAGES]
        instead = f"choose {' or '.join(fit)} images, or another class" if fit else "choose another class"
        raise ConfigError(
            f"{setting.num_images} images cannot show each of {label_dim} classes equally often; {instead}"
        )


@torch.no_grad()
def _evaluations(
    images: GeneratedImages, indices: np.ndarray
) -> Iterator[tuple[Evaluation | None, torch.Tensor, torch.Tensor | None]]:
    """Sample a batch: yield each evaluation with its estimate, then None with the result; both with the labels."""
    labels, evaluations = images.evaluations(indices)
    count = len(indices)  # the batch may be padded
    shown = None if labels is None or images.classes.unlabelled else labels[:count]
    while True:
        try:
            evaluation = next(evaluations)
        except StopIteration as end:
            yield None, end.value[:count], shown
            return
        yield evaluation, evaluation.denoised[:count], shown


def _decoded(images: GeneratedImages, latents: torch.Tensor) -> np.ndarray:
    return images.decode(latents).cpu().numpy()


def _with_decoded(
    shown: np.ndarray | None, images: GeneratedImages, indices: np.ndarray, latents: torch.Tensor
) -> np.ndarray:
    """Copy all images, with the decoded `latents` at `indices`; records that were yielded keep theirs."""
    decoded = _decoded(images, latents)
    result = np.full([len(images.seeds), *decoded.shape[1:]], _PENDING, np.uint8) if shown is None else shown.copy()
    result[indices] = decoded
    return result


def _progress(
    setting: Setting, images: GeneratedImages, batch_idx: int, evaluation: Evaluation, shown: np.ndarray | None
) -> Progress:
    num_batches = len(images.batches)
    text = f"Step {evaluation.step_idx + 1} of {setting.num_steps} · noise level {evaluation.sigma:.3g}"
    text += f" · images {batch_idx + 1} of {num_batches}" if num_batches > 1 else ""
    share = (evaluation.step_idx + (0.5 if evaluation.is_trial else 0)) / setting.num_steps
    return Progress(text=text, share=(batch_idx + share) / num_batches, images=shown, num_columns=images.sheet_columns)
