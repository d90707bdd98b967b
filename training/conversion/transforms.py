"""The published ways to bring a picture to a size, in RGB pictures of PIL. Sizes are (width, height), as in PIL."""

import math
from collections.abc import Callable

import PIL.Image
from PIL.Image import Image, Resampling

from dnnlib.errors import ConfigError

Size = tuple[int, int]  # (width, height)


def scale(picture: Image, size: Size) -> Image:
    """Lanczos to `size`; the aspect is not kept."""
    return picture.resize(size, Resampling.LANCZOS)


def center_crop(picture: Image, size: Size) -> Image:
    """The central square of the shorter side, Lanczos to `size`."""
    side = min(picture.size)
    return scale(_central(picture, side, side), size)


def center_crop_wide(picture: Image, size: Size) -> Image | None:
    """The central band with the aspect of `size`, Lanczos to it, centred on a black square of its width.

    None where the picture has fewer columns, or the band fewer rows, than the result: such pictures are left out.
    """
    width, height = size
    band = round(width * picture.height / picture.width)
    if picture.width < width or band < height:
        return None
    top, bottom = (picture.height - band) // 2, (picture.height + band) // 2
    canvas = PIL.Image.new("RGB", (width, width))
    canvas.paste(scale(picture.crop((0, top, picture.width, bottom)), size), (0, (width - height) // 2))
    return canvas


def center_crop_dhariwal(picture: Image, size: Size) -> Image:
    """Halved with a box filter while that is possible, bicubic until the shorter side fits, cropped centrally.

    The preparation of ImageNet by Dhariwal and Nichol (arXiv 2105.05233). `size` is square.
    """
    target = size[0]
    while min(picture.size) >= 2 * target:
        picture = picture.resize((picture.width // 2, picture.height // 2), Resampling.BOX)
    factor = target / min(picture.size)
    picture = picture.resize((round(picture.width * factor), round(picture.height * factor)), Resampling.BICUBIC)
    left, top = (picture.width - target) // 2, (picture.height - target) // 2
    return picture.crop((left, top, left + target, top + target))


TRANSFORMS: dict[str, Callable[[Image, Size], Image | None]] = {
    "center-crop": center_crop,
    "center-crop-wide": center_crop_wide,
    "center-crop-dhariwal": center_crop_dhariwal,
}


def result_size(name: str | None, size: Size | None) -> Size | None:
    """What the transform called `name` makes with --resolution=`size`; None where pictures keep theirs.

    Raises ConfigError where that is no size for training: square, and a power of two.
    """
    if size is None:
        if name is not None:
            raise ConfigError(
                f"--transform={name} needs a size to bring pictures to; add --resolution=WxH, as in 64x64"
            )
        return None
    width, height = size
    given = f"--resolution={width}x{height}"
    if name == "center-crop-wide":
        if height > width:
            raise ConfigError(f"{given} is higher than wide; --transform={name} centres it on a square of its width")
    elif width != height:
        raise ConfigError(f"{given} is not square; try {width}x{width}, or --transform=center-crop-wide for black bars")
    if not is_power_of_two(width):
        raise ConfigError(f"{given} is no power of two, which networks need; try {_nearest(width)}x{_nearest(width)}")
    return width, width


def require_trainable_size(size: Size, name: str) -> None:
    """Raise ConfigError unless pictures of `size`, the first of which is called `name`, can be trained on."""
    width, height = size
    square = width == height
    if square and is_power_of_two(width):
        return
    wrong = "no power of two" if square else "not square"
    side = _nearest(min(size))
    crop = "" if square else " --transform=center-crop"
    raise ConfigError(
        f"{name} is {width}x{height}, which is {wrong}; add --resolution={side}x{side}{crop}, for example"
    )


def is_power_of_two(number: int) -> bool:
    """Whether `number` >= 1 is a power of two."""
    return number & (number - 1) == 0


def _nearest(number: int) -> int:
    """The power of two nearest to `number`, by ratio."""
    return 1 << round(math.log2(number))


def _central(picture: Image, width: int, height: int) -> Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    right, bottom = (picture.width + width) // 2, (picture.height + height) // 2
    return picture.crop((left, top, right, bottom))
