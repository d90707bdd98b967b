"""What becomes of every kind of image file, as docs/datasets.md tells it."""

import io
import struct
import zlib

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest

from training.images.decode import MAX_PIXELS, Unreadable, decode_rgb, rgb_from_array

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data, **options):
    image = decode_rgb(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(data):
    with pytest.raises(Unreadable) as caught:
        decode_rgb(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_their_pixels(kind, options):
    if kind == "WEBP" and not PIL.features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    assert np.array_equal(rgb(encoded(PIL.Image.fromarray(PIXELS), kind, **options)), PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_give_what_pillow_makes_of_them(mode):
    data = encoded(PIL.Image.fromarray(PIXELS).convert(mode), "JPEG")
    assert np.array_equal(rgb(data), np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")))


def test_cmyk_is_converted_without_a_profile():
    cmyk = PIL.Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 255], [0, 51, 0, 0]]], dtype=np.uint8), mode="CMYK")
    assert rgb(encoded(cmyk, "TIFF")).tolist() == [[[0, 255, 255], [0, 0, 0], [255, 204, 255]]]


def test_gray_becomes_three_equal_channels_and_bits_black_and_white():
    gray = PIXELS[:, :, 0]
    assert np.array_equal(rgb(encoded(PIL.Image.fromarray(gray), "PNG")), np.stack([gray] * 3, axis=2))
    bits = rgb(encoded(PIL.Image.fromarray(gray > 99), "PNG"))
    assert np.array_equal(bits[:, :, 1], np.where(gray > 99, 255, 0))


def test_palettes_give_their_colors_and_alpha_is_dropped():
    palette = PIL.Image.fromarray(PIXELS).quantize(8)
    assert np.array_equal(rgb(encoded(palette, "PNG", transparency=0)), np.asarray(palette.convert("RGB")))
    alpha = np.concatenate([PIXELS, RNG.integers(0, 256, (6, 9, 1), dtype=np.uint8)], axis=2)
    assert np.array_equal(rgb(encoded(PIL.Image.fromarray(alpha), "PNG")), PIXELS)
    gray_alpha = rgb(encoded(PIL.Image.fromarray(alpha[:, :, 2:]), "PNG"))
    assert np.array_equal(gray_alpha, np.stack([PIXELS[:, :, 2]] * 3, axis=2))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF"])
def test_of_several_images_in_a_file_the_first_is_taken(kind):
    frames = [PIL.Image.new("RGB", (4, 4), color) for color in ("#ff0000", "#0000ff")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert PIL.Image.open(io.BytesIO(data)).n_frames == 2
    assert (rgb(data) == [255, 0, 0]).all()


def test_sixteen_bits_are_scaled_to_eight_and_not_cut():
    values = np.array([[0, 127, 128, 129, 257, 30000, 65406, 65535]], dtype=np.uint16)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)
    gray = PIL.Image.fromarray(values)
    portable = b"P5 8 1 65535\n" + values.astype(">u2").tobytes()
    for data in (encoded(gray, "PNG"), encoded(gray, "TIFF"), portable):
        assert np.array_equal(rgb(data)[:, :, 0], expected)
    assert rgb(encoded(gray, "PNG")).max() == 255


def test_sixteen_bit_color_is_within_one_level():
    values = RNG.integers(0, 65536, (1, 5, 3))
    raw = b"\0" + values.astype(">u2").tobytes()
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [
            (b"IHDR", struct.pack(">IIBBBBB", 5, 1, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(raw)),
            (b"IEND", b""),
        ]
    )
    assert np.abs(rgb(data) - values / 257).max() <= 1


@pytest.mark.parametrize(("dtype", "told"), [(np.float32, "floating point"), (np.int32, "32-bit integer")])
def test_pixels_of_unknown_range_are_refused(dtype, told):
    assert told in refused(encoded(PIL.Image.fromarray(np.ones((4, 4), dtype=dtype)), "TIFF"))


def turned(pixels, orientation):
    """What EXIF's eight orientations mean, as turns and flips of [H, W, C]."""
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels, 1),
    }[orientation]


def with_orientation(kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encoded(PIL.Image.fromarray(PIXELS), kind, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_image_only_where_it_is_asked_for(orientation):
    for kind in ("PNG", "JPEG"):
        data = with_orientation(kind, orientation)
        stored = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
        assert stored.shape == PIXELS.shape
        assert np.array_equal(rgb(data), stored)
        assert np.array_equal(rgb(data, exif=True), turned(stored, orientation))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_a_tiff_is_part_of_its_format_and_followed_once(orientation):
    data = with_orientation("TIFF", orientation)
    for exif in (False, True):
        assert np.array_equal(rgb(data, exif=exif), turned(PIXELS, orientation))


def test_damaged_files_have_a_reason():
    whole = encoded(PIL.Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG")
    assert refused(b"") == "the file is empty"
    assert "truncated" in refused(whole[:4000])
    for data in (b"text", whole[4:]):
        assert refused(data).startswith("it is not a BMP, GIF, JPEG")


def test_formats_that_start_programs_are_not_tried(monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert PIL.Image.open(io.BytesIO(page)).format == "EPS"
    assert "it is not a BMP" in refused(page)


@pytest.mark.parametrize("side", [11_600, 13_400, 60_000, 2**31 - 1])
def test_an_absurd_size_costs_no_memory(side):
    bomb = bytearray(encoded(PIL.Image.fromarray(PIXELS), "PNG"))
    bomb[16:24] = struct.pack(">II", side, side)
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    message = refused(bytes(bomb))
    assert ("pixels" in message and str(side) in message) or "exceeds limit" in message


def test_the_limit_lets_large_photographs_pass():
    assert MAX_PIXELS > 12_000 * 9_000


def test_arrays_of_one_and_three_channels_become_rgb():
    assert np.array_equal(np.asarray(rgb_from_array(PIXELS)), PIXELS)
    for gray in (PIXELS[:, :, 0], PIXELS[:, :, :1]):
        assert np.array_equal(np.asarray(rgb_from_array(gray)), np.repeat(PIXELS[:, :, :1], 3, axis=2))
