"""PNG files: the pixels that Pillow reads back, the texts, and what a head tells of a file that is there."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngImageFile

from dnnlib.errors import ConfigError
from training.images.png import encode_png
from training.images.png_files import PngHead, read_png, read_png_head, write_png


def smooth_image(channels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random field with some noise and a flat part, so that every filter and run has something to do."""
    rng = np.random.default_rng(seed)
    slopes = rng.normal(size=[channels, 2, 1, 1])
    y, x = np.mgrid[:height, :width]
    field = 128 + slopes[:, 0] * y + slopes[:, 1] * x + rng.normal(size=[channels, height, width]) * 2
    field[:, : height // 3] = 255
    return field.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("compression", range(10))
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 1, 1), (3, 1, 7), (1, 9, 1), (3, 33, 21), (1, 16, 40)])
def test_pillow_reads_back_the_same_pixels(compression: int, channels: int, height: int, width: int):
    image = smooth_image(channels, height, width)
    data = encode_png(image, compression=compression)
    with PIL.Image.open(io.BytesIO(data)) as file:
        file.load()
        assert (file.format, file.mode) == ("PNG", "L" if channels == 1 else "RGB")
        assert np.array_equal(np.asarray(file).reshape(height, width, channels), image.transpose(1, 2, 0))
    with PIL.Image.open(io.BytesIO(data)) as file:
        file.verify()


def test_memory_order_plays_no_part():
    image = smooth_image(3, 12, 8)
    swapped = np.ascontiguousarray(image.transpose(1, 2, 0)).transpose(2, 0, 1)
    assert encode_png(image) == encode_png(swapped)


def test_the_fast_level_packs_about_as_well_as_pillow_and_none_does_not():
    image = smooth_image(3, 128, 128)
    sizes = {level: len(encode_png(image, compression=level)) for level in (0, 1, 6)}
    assert sizes[1] < 1.2 * sizes[6] < sizes[0]
    assert image.size < sizes[0] < image.size + 1000


@pytest.mark.parametrize("compression", [0, 1, 6])
def test_texts_are_read_by_others_and_by_us(tmp_path: Path, compression: int):
    path = tmp_path / "a.png"
    write_png(path, smooth_image(3, 5, 4), compression=compression, texts={"a": "1", "generate_images": '{"seed": 3}'})
    with PIL.Image.open(path) as file:
        assert isinstance(file, PngImageFile)
        assert file.text == {"a": "1", "generate_images": '{"seed": 3}'}
    assert read_png_head(path) == PngHead(shape=(3, 5, 4), texts={"a": "1", "generate_images": '{"seed": 3}'})
    assert np.array_equal(read_png(path), smooth_image(3, 5, 4))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_heads_of_other_peoples_files(tmp_path: Path, mode: str):
    path = tmp_path / "a.png"
    PIL.Image.new(mode, (4, 5)).save(path, optimize=True)
    head = read_png_head(path)
    assert head is not None and head.texts == {}
    assert head.shape == {"L": (1, 5, 4), "RGB": (3, 5, 4), "RGBA": (4, 5, 4)}.get(mode)


def test_what_is_not_whole_has_no_head(tmp_path: Path):
    path = tmp_path / "a.png"
    data = encode_png(smooth_image(3, 9, 9), texts={"a": "b"})
    assert read_png_head(path) is None
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert read_png_head(path) is None, length
    for damaged in (b"x" + data[1:], data[:8] + data[-12:], data[:-1] + b"x", b"\x89PNG\r\n\x1a\n" + b"\xff" * 300):
        path.write_bytes(damaged)
        assert read_png_head(path) is None
    (tmp_path / "folder.png").mkdir()
    assert read_png_head(tmp_path / "folder.png") is None


def test_what_cannot_be_written_or_read_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match="5 channels cannot be written as PNG"):
        encode_png(np.zeros([5, 2, 2], np.uint8))
    with pytest.raises(ConfigError, match="--png-compression=10"):
        encode_png(np.zeros([3, 2, 2], np.uint8), compression=10)
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(ConfigError, match=r"a\.png cannot be read"):
        read_png(tmp_path / "a.png")
