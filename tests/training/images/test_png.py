"""The fast PNG decoder against Pillow."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from training.images import png as png_module
from training.images.png import PLAIN, decode_plain_png, encode_png

RNG = np.random.default_rng(6)


def chunk(name, content=b""):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def pillow(data):
    pixels = np.asarray(PIL.Image.open(io.BytesIO(data)))
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def png(image, **options):
    """PNG by Pillow of [C, H, W]."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image.transpose(1, 2, 0).squeeze()).save(buffer, "png", **options)
    return buffer.getvalue()


def parts(data):
    """[(name, content)] of a PNG's chunks."""
    found, start = [], 8
    while start < len(data):
        (length,) = struct.unpack_from(">I", data, start)
        found.append((data[start + 4 : start + 8], data[start + 8 : start + 8 + length]))
        start += 12 + length
    return found


def rebuilt(chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def plain_png(image):
    """An uncompressed PNG with unfiltered rows of [C, H, W], written after the specification."""
    channels, height, width = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image.transpose(1, 2, 0))
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return rebuilt([(b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 3), (64, 64), (200, 150)])
def test_a_plain_png_is_what_pillow_reads(channels, height, width):
    image = RNG.integers(0, 256, (channels, height, width), dtype=np.uint8)
    data = plain_png(image)
    if channels in (1, 3):
        assert encode_png(image, compression=PLAIN) == data
    assert np.array_equal(pillow(data), image)
    for view in (data, memoryview(data)):
        assert np.array_equal(decode_plain_png(view, (channels, height, width)), image)


@pytest.mark.parametrize("with_pyspng", [True, False])
@pytest.mark.parametrize("level", [0, 6])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_filtered_rows_are_decoded_or_left_to_pillow(channels, level, with_pyspng, monkeypatch):
    if with_pyspng:
        pytest.importorskip("pyspng")
    else:
        monkeypatch.setattr(png_module, "_filtered_decoder", lambda: None)
    smooth = np.cumsum(RNG.integers(0, 5, (channels, 40, 40)), axis=2).astype(np.uint8)
    data = png(smooth, compress_level=level)
    pixels = zlib.decompress(b"".join(content for name, content in parts(data) if name == b"IDAT"))
    assert np.frombuffer(pixels, np.uint8).reshape(40, -1)[:, 0].any()  # it does filter
    decoded = decode_plain_png(memoryview(data), smooth.shape)
    assert np.array_equal(decoded, smooth) if with_pyspng else decoded is None


def test_pixels_in_several_chunks_and_chunks_that_say_nothing_of_them():
    image = RNG.integers(0, 256, (3, 20, 20), dtype=np.uint8)
    header, pixels, end = parts(plain_png(image))
    text = (b"tEXt", b"Title\0x")
    data = rebuilt([header, text, (b"IDAT", pixels[1][:100]), (b"IDAT", pixels[1][100:]), text, end])
    assert np.array_equal(decode_plain_png(data, image.shape), image)


def test_what_is_not_plain_is_left_to_pillow():
    image = RNG.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    header, pixels, end = parts(plain_png(image))
    interlaced = (b"IHDR", header[1][:-1] + b"\1")
    sixteen_bits = (b"IHDR", header[1][:8] + b"\x10" + header[1][9:])
    short = (b"IDAT", zlib.compress(zlib.decompress(pixels[1])[:-1], 0))
    long = (b"IDAT", zlib.compress(zlib.decompress(pixels[1]) + b"\0", 0))
    flipped = (b"IDAT", pixels[1][:50] + bytes([pixels[1][50] ^ 1]) + pixels[1][51:])
    whole = rebuilt([header, pixels, end])
    assert decode_plain_png(whole, image.shape) is not None
    for data in (
        rebuilt([interlaced, pixels, end]),
        rebuilt([sixteen_bits, pixels, end]),
        rebuilt([header, (b"tRNS", bytes(6)), pixels, end]),
        rebuilt([header, short, end]),
        rebuilt([header, long, end]),
        rebuilt([header, flipped, end]),
        rebuilt([header, end]),
        whole[:-12],
        whole[:60],
        whole[:20],
        b"",
        b"text",
    ):
        assert decode_plain_png(data, image.shape) is None
    assert decode_plain_png(whole, (3, 8, 9)) is None and decode_plain_png(whole, (4, 8, 8)) is None


def test_a_bomb_is_not_unpacked():
    header, _, end = parts(plain_png(np.zeros((1, 8, 8), dtype=np.uint8)))
    bomb = (b"IDAT", zlib.compress(bytes(200_000_000), 9))
    assert decode_plain_png(rebuilt([header, bomb, end]), (1, 8, 8)) is None
