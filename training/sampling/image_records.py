"""What a generated image was made from, noted in its file, and which images of a request are there already.

The note is a tEXt chunk with the keyword of `KEYWORD` and a JSON object: the seed, the networks by a digest of their
weights, the kind of device (generators differ by it), and whatever else was not left at its default.
"""

import contextlib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib.errors import ConfigError
from training.encoders import Encoder, StandardRGBEncoder
from training.images.png_files import PngHead, read_png_head
from training.sampling.guidance import WithoutLabels
from training.sampling.sampler import edm_sampler
from training.snapshot.parts import described

KEYWORD = "generate_images"

_DIGITS = 16  # of digests
_VALUES = 64  # of each tensor, that go into a network's digest


def image_path(outdir: Path, seed: int, *, subdirs: bool) -> Path:
    """The file of the image of `seed`: {seed:06d}.png, with `subdirs` in a folder for every thousand seeds."""
    folder = outdir / f"{seed // 1000 * 1000:06d}" if subdirs else outdir
    return folder / f"{seed:06d}.png"


def network_digest(net: Any) -> str | None:
    """A digest of what the network is: the beginning of each tensor, as float32, and the settings outside of them.

    It is the same for the file in either format. None for what is no torch module.
    """
    if isinstance(net, WithoutLabels):
        return f"{network_digest(net.net)} without labels"
    if not isinstance(net, torch.nn.Module):
        return None
    tensors = net.state_dict()
    described = {name: list(value.shape) for name, value in tensors.items()}
    settings = {
        name: getattr(net, name, None) for name in ("img_resolution", "img_channels", "label_dim", "sigma_data")
    }
    digest = hashlib.sha256(json.dumps([described, settings], default=str).encode())
    starts = [value.detach().reshape(-1)[:_VALUES].to(torch.float32) for value in tensors.values() if value.numel()]
    if starts:
        digest.update(torch.cat(starts).cpu().numpy().tobytes())  # one copy from the device
    return digest.hexdigest()[:_DIGITS]


def encoder_digest(encoder: Encoder) -> str:
    """A digest of the encoder's class and constructor arguments."""
    try:
        content = json.dumps(described(encoder), sort_keys=True)
    except (AttributeError, ConfigError):  # none of ours
        content = type(encoder).__name__
    return hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]


def request_record(
    net: Any,
    guides: Sequence[Any],
    encoder: Encoder,
    device: torch.device,
    sampler_fn: Callable[..., torch.Tensor],
    sampler_kwargs: Mapping[str, Any],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """What all images of a request depend on, as JSON has it. `more`: further settings; None there is left out.

    Options that have the sampler's defaults are left out, and so are guides where guidance is 1.
    """
    defaults = {name: _as_json_has_it(p.default) for name, p in inspect.signature(sampler_fn).parameters.items()}
    options = {name: _as_json_has_it(value) for name, value in sampler_kwargs.items()}
    options = {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}
    record: dict[str, Any] = {"net": network_digest(net), "device": device.type, **options}
    if sampler_fn is not edm_sampler:
        record["sampler"] = getattr(sampler_fn, "__name__", type(sampler_fn).__name__)
    if guides and sampler_kwargs.get("guidance", 1) != 1:
        record["gnet"] = [network_digest(guide) for guide in guides]
    if not isinstance(encoder, StandardRGBEncoder):
        record["encoder"] = encoder_digest(encoder)
    record |= {name: value for name, value in more.items() if value is not None}
    return _as_json_has_it(record)


def image_record(request: Mapping[str, Any], seed: int, chosen_class: int | None) -> dict[str, Any]:
    """What one image depends on; `chosen_class` where the seed does not draw it."""
    return {"seed": seed, **request, **({} if chosen_class is None else {"class": chosen_class})}


def as_text(record: Mapping[str, Any]) -> str:
    """The note in a file; ASCII."""
    return json.dumps(record, sort_keys=True)


def images_there(
    paths: Sequence[Path], records: Sequence[Mapping[str, Any]], shape: tuple[int, int, int] | None
) -> list[bool]:
    """Which of these files are there, whole; `records`: what they should be made from.

    Files that say nothing of it, as earlier versions wrote them, count by their names. Raises ConfigError where one
    was made from something else, or has another `shape` (C, H, W; None = not known).
    """
    names: dict[Path, set[str]] = {}
    there = []
    for path, record in zip(paths, records, strict=True):
        if path.parent not in names:
            names[path.parent] = _names_in(path.parent)
        head = read_png_head(path) if path.name in names[path.parent] else None
        if head is not None:
            _require_same(path, head, record, shape)
        there.append(head is not None)
    return there


def remove_leftovers(paths: Sequence[Path]) -> None:
    """Remove the temporary files that a killed run left for these files (see dnnlib.atomic)."""
    wanted = set(paths)
    for folder in dict.fromkeys(path.parent for path in paths):
        for name in _names_in(folder):
            match = re.fullmatch(r"\.(.+\.png)\.[0-9a-f]{12}\.tmp", name)
            if match and folder / match[1] in wanted:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _require_same(path: Path, head: PngHead, record: Mapping[str, Any], shape: tuple[int, int, int] | None) -> None:
    advice = "give another --outdir, or leave --skip-existing out to make everything anew"
    if shape is not None and head.shape != shape:
        there = "a picture of another kind" if head.shape is None else "x".join(map(str, head.shape))
        raise ConfigError(
            f"{path} is there and is {there} (channels, height, width), not {'x'.join(map(str, shape))}; {advice}"
        )
    try:
        noted = json.loads(head.texts.get(KEYWORD, ""))
    except (ValueError, RecursionError):
        return
    if not isinstance(noted, dict):
        return
    for name in sorted(noted.keys() | record.keys()):
        if noted.get(name) != record.get(name):
            old, new = (
                "the default" if value is None else str(value)[:80] for value in (noted.get(name), record.get(name))
            )
            raise ConfigError(f"{path} was made with {name} {old}, and this asks for {new}; {advice}")


def _as_json_has_it(value: Any) -> Any:
    return json.loads(json.dumps(value, default=lambda x: str(x) if isinstance(x, torch.dtype) else type(x).__name__))
