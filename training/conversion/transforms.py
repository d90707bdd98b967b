"""The published ways to bring an RGB or RGBA image to a size. Sizes are (width, height), as in PIL."""

import math
import re
from collections.abc import Callable

import PIL.Image
from PIL.Image import Image, Resampling

from dnnlib.errors import ConfigError

Size = tuple[int, int]  # (width, height)

_MAX_PROPOSED = 256


def scale(image: Image, size: Size) -> Image:
    """Scale to `size` by Lanczos without keeping the aspect."""
    return image.resize(size, Resampling.LANCZOS)


def center_crop(image: Image, size: Size) -> Image:
    """Crop the central square of the shorter side; Lanczos to `size`."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    right, bottom = (image.width + side) // 2, (image.height + side) // 2
    return scale(image.crop((left, top, right, bottom)), size)


def center_crop_wide(image: Image, size: Size) -> Image | None:
    """Crop the central band with the aspect of `size`; Lanczos to it, centered on a black square of its width.

    None if the image has fewer columns, or the band fewer rows, than the result: such images are left out.
    """
    width, height = size
    band = round(width * image.height / image.width)
    if image.width < width or band < height:
        return None
    top, bottom = (image.height - band) // 2, (image.height + band) // 2
    canvas = PIL.Image.new(image.mode, (width, width))
    canvas.paste(scale(image.crop((0, top, image.width, bottom)), size), (0, (width - height) // 2))
    return canvas


def center_crop_dhariwal(image: Image, size: Size) -> Image:
    """Halve with a box filter while possible, then bicubic until the shorter side fits; crop centrally.

    The preparation of ImageNet by Dhariwal and Nichol (arXiv 2105.05233). `size` is square.
    """
    target = size[0]
    while min(image.size) >= 2 * target:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    factor = target / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Resampling.BICUBIC)
    left, top = (image.width - target) // 2, (image.height - target) // 2
    return image.crop((left, top, left + target, top + target))


TRANSFORMS: dict[str, Callable[[Image, Size], Image | None]] = {
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
}


def parse_resolution(text: str) -> Size:
    """Parse 'WxH'. Raises ConfigError."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise ConfigError(f"--resolution={text} is not a size; write width and height, as in 64x64")
    return int(match[1]), int(match[2])


def result_size(name: str | None, size: Size | None) -> Size | None:
    """Size of the results of transform `name` for --resolution=`size`; None if it stays. Raises ConfigError."""
    if size is None:
        if name is not None:
            raise ConfigError(f"--transform={name} needs the size of the results; add --resolution=WxH, as in 64x64")
        return None
    width, height = size
    given = f"--resolution={width}x{height}"
    if name == "center-crop-wide":
        if height > width:
            raise ConfigError(f"{given} is higher than wide; --transform={name} centers it on a square of its width")
    elif width != height:
        raise ConfigError(f"{given} is not square; try {width}x{width}, or --transform=center-crop-wide for black bars")
    if not is_power_of_two(width):
        side = _nearest_power(width)
        raise ConfigError(f"{given} is not a power of two, as networks need; try {side}x{side}")
    return width, width


def require_trainable_size(size: Size, name: str) -> None:
    """Raise ConfigError unless networks can be trained on images of `size`; `name` is the first of them."""
    width, height = size
    if not is_trainable(width, height):
        wrong = "not a power of two" if width == height else "not square"
        options = resize_options(min(size), square=width == height)
        raise ConfigError(f"{name} is {width}x{height}, which is {wrong}; add{options}, for example")


def is_trainable(width: int, height: int) -> bool:
    """Return whether networks can be trained on images of this size."""
    return width == height and is_power_of_two(width)


def resize_options(side: int, *, square: bool) -> str:
    """Return options of `convert` for images whose shorter sides are `side`, which enlarge them by a quarter at most.

    Networks of more than _MAX_PROPOSED pixels a side are beyond most users.
    """
    power = 1 << int(math.log2(side))
    power = min(2 * power if 4 * 2 * power <= 5 * side else power, _MAX_PROPOSED)
    return f" --resolution={power}x{power}" + ("" if square else " --transform=center-crop")


def is_power_of_two(number: int) -> bool:
    """Return whether `number` >= 1 is a power of two."""
    return number & (number - 1) == 0


def _nearest_power(number: int) -> int:
    return 1 << round(math.log2(number))
