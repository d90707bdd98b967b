"""What becomes of every kind of image file, as docs/datasets.md tells it."""

import io
import re
import struct
import zlib

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps
import pytest

from tests.helpers.paths import ROOT
from training.images.decode import (
    KEEP_ALPHA,
    MAX_PIXELS,
    DecodeOptions,
    Unreadable,
    decode_image,
    open_image,
)

RNG = np.random.default_rng(3)
PIXELS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data, **options):
    image = decode_image(data, DecodeOptions(**options)).image
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(data):
    with pytest.raises(Unreadable) as caught:
        decode_image(data, DecodeOptions())
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
    assert np.array_equal(rgb(PIXELS), PIXELS)
    for gray in (PIXELS[:, :, 0], PIXELS[:, :, :1]):
        assert np.array_equal(
            np.asarray(decode_image(gray, DecodeOptions()).image), np.repeat(PIXELS[:, :, :1], 3, axis=2)
        )


def test_one_place_opens_files_with_pillow():
    folders = ["dnnlib", "torch_utils", "training", "edm2", "data"]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    openers = [file for file in files if re.search(r"\bImage\.open\(", file.read_text(encoding="utf-8"))]
    assert [file.relative_to(ROOT).as_posix() for file in openers] == ["training/images/decode.py"]


def png_file(size, bits, color_type, rows, *chunks):
    """A PNG of these rows of bytes, with `chunks` (name, content) in front of the pixels."""
    header = struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    )


LONG = b"a" * (9 << 20)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"tEXt", b"note\0" + LONG),
        (b"zTXt", b"note\0\0" + zlib.compress(LONG)),
        (b"iTXt", b"note\0\1\0\0\0" + zlib.compress(LONG)),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + LONG),
        (b"iCCP", b"profile\0\0" + zlib.compress(LONG)),
    ],
)
def test_long_texts_and_profiles_do_not_keep_an_image_from_being_read(chunk):
    rows = [PIXELS[i].tobytes() for i in range(6)]
    assert np.array_equal(rgb(png_file((9, 6), 8, 2, rows, *[chunk] * 9)), PIXELS)


def test_a_short_text_stays(monkeypatch):
    text = (b"tEXt", b"note\0short")
    with open_image(png_file((9, 6), 8, 2, [row.tobytes() for row in PIXELS], text, (b"tEXt", b"b\0" + LONG))) as image:
        assert image.info["note"] == "short" and "b" not in image.info


def rgba(data):
    return np.asarray(decode_image(data, DecodeOptions(background=KEEP_ALPHA)).image)


KEYED = [
    (png_file((4, 1), 1, 0, [b"\xa0"], (b"tRNS", b"\0\1")), [0, 255, 0, 255]),
    (png_file((4, 1), 2, 0, [b"\x1b"], (b"tRNS", b"\0\1")), [255, 0, 255, 255]),
    (png_file((4, 1), 4, 0, [b"\x12\x30"], (b"tRNS", b"\0\2")), [255, 0, 255, 255]),
    (png_file((4, 1), 8, 0, [b"\1\2\3\4"], (b"tRNS", b"\0\3")), [255, 255, 0, 255]),
    (png_file((2, 1), 16, 0, [struct.pack(">2H", 300, 301)], (b"tRNS", struct.pack(">H", 300))), [0, 255]),
    (png_file((2, 1), 8, 2, [b"\1\2\3\4\5\6"], (b"tRNS", struct.pack(">3H", 4, 5, 6))), [255, 0]),
    (png_file((2, 1), 16, 2, [b"\1\2" * 3 + b"\7" * 6], (b"tRNS", b"\1\2" * 3)), [0, 255]),
    (png_file((2, 1), 8, 3, [b"\0\1"], (b"PLTE", b"\xff\0\0\0\xff\0"), (b"tRNS", b"\x80")), [128, 255]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "alpha"), KEYED)
def test_pixels_of_the_color_that_a_png_names_are_transparent(data, alpha):
    assert rgba(data)[0, :, 3].tolist() == alpha
    assert decode_image(data, DecodeOptions()).transparent


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, "RGBA") for kind in ("PNG", "TIFF", "WEBP", "AVIF", "GIF")]
    + [("PNG", "LA"), ("TIFF", "LA"), ("TIFF", "PA"), ("PNG", "P")],
)
def test_transparent_pixels_show_the_background(kind, mode):
    if kind in ("AVIF", "WEBP") and not PIL.features.check(kind.lower()):
        pytest.skip(f"this Pillow does not write {kind}")
    image = PIL.Image.new("RGBA", (8, 8), (200, 200, 200, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 8))
    if mode == "PA":
        alpha = image.getchannel("A")
        image = image.convert("RGB").quantize(4).convert("PA")
        image.putalpha(alpha)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert kind == "GIF" or PIL.Image.open(io.BytesIO(data)).mode == mode
    decoded = decode_image(data, DecodeOptions(background="#ff8000"))
    pixels = np.asarray(decoded.image).astype(int)
    assert decoded.transparent and decoded.image.mode == "RGB"
    assert np.abs(pixels[:, 6:] - [255, 128, 0]).max() <= 2 and np.abs(pixels[:, :2] - 10).max() <= 4
    kept = rgba(data)
    assert kept[:, 6:, 3].max() == 0 and kept[:, :2, 3].min() == 255


def test_opaque_images_with_an_alpha_channel_are_not_transparent():
    data = encoded(PIL.Image.fromarray(PIXELS).convert("RGBA"), "PNG")
    decoded = decode_image(data, DecodeOptions(background="white"))
    assert not decoded.transparent and np.array_equal(np.asarray(decoded.image), PIXELS)
    assert (rgba(encoded(PIL.Image.fromarray(PIXELS), "PNG"))[:, :, 3] == 255).all()


def tiff_file(values, photometric, *, bits, kind=1, big=False):
    """An uncompressed TIFF of gray `values` [H, W]."""
    order = ">" if big else "<"
    pixels = values.tobytes()
    fields = [(256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1), (262, photometric), (273, 8)]
    fields += [(277, 1), (278, values.shape[0]), (279, len(pixels)), (339, kind)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in fields)
    begin = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", 8 + len(pixels))
    return begin + pixels + struct.pack(f"{order}H", len(fields)) + entries + bytes(4)


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.dtype("<u2"), 65535)])
def test_white_is_zero_at_every_depth(dtype, top):
    values = np.linspace(0, top, 7).round().astype(dtype)[None]
    bits = values.dtype.itemsize * 8
    black, white = (rgb(tiff_file(values, photometric, bits=bits)) for photometric in (1, 0))
    assert black[0, 0, 0] == 0 and black[0, -1, 0] == 255
    assert np.array_equal(white, 255 - black)


def test_a_range_gives_a_meaning_to_numbers():
    def scaled(data, low, high):
        return np.asarray(decode_image(data, DecodeOptions(value_range=(low, high))).image)[0, :, 0].tolist()

    deep = encoded(PIL.Image.fromarray(np.array([[0, 1000, 2000, 4095, 60000]], np.uint16)), "PNG")
    assert scaled(deep, 0, 4095) == [0, 62, 125, 255, 255]
    assert decode_image(deep, DecodeOptions()).largest == 60000
    floats = np.array([[-1, 0, 0.5, 1, 9]], np.float32)
    assert scaled(encoded(PIL.Image.fromarray(floats), "TIFF"), 0, 1) == [0, 0, 128, 255, 255]
    assert scaled(tiff_file(floats, 0, bits=32, kind=3), 0, 1) == [255, 255, 127, 0, 0]
    integers = np.array([[-1000, 0, 400]], np.int32)
    assert scaled(encoded(PIL.Image.fromarray(integers), "TIFF"), -1000, 400) == [0, 182, 255]
    assert scaled(encoded(PIL.Image.fromarray(np.array([[0, 7, 255]], np.uint8)), "PNG"), 0, 7) == [0, 7, 255]
    with pytest.raises(Unreadable, match="not finite"):
        scaled(encoded(PIL.Image.fromarray(floats * np.nan), "TIFF"), 0, 1)
    color = png_file((1, 1), 16, 2, [struct.pack(">3H", 4095, 1, 1)])
    assert decode_image(color, DecodeOptions()).largest == 4095
    with pytest.raises(Unreadable, match="only the upper 8"):
        scaled(color, 0, 4095)


def test_git_lfs_pointers_are_named():
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    assert "git lfs pull" in refused(pointer)
