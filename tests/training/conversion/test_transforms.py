"""The transforms of dataset_tool.py against golden pixels, and the sizes that they accept."""

import numpy as np
import PIL
import PIL.Image
import pytest

from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from training.conversion.transforms import TRANSFORMS, center_crop_wide, require_trainable_size, result_size, scale

# Pillow's resize rounds differently from version 13 on; published data sets were made with 10.
_NAME = "transforms.npz" if int(PIL.__version__.partition(".")[0]) >= 13 else "transforms-pillow12.npz"
with np.load(GOLDEN_DIR / _NAME) as _file:
    GOLDEN = {name: _file[name] for name in _file}
CASES = [name for name in GOLDEN if not name.endswith(".in")]


@pytest.mark.parametrize("case", CASES)
def test_every_pixel_is_that_of_the_published_tool(case):
    image, name = case.split(".")
    source = PIL.Image.fromarray(GOLDEN[f"{image}.in"])
    size = (64, 48) if name == "center-crop-wide" else (32, 32)
    result = (scale if name == "scale" else TRANSFORMS[name])(source, size)
    if GOLDEN[case].size == 0:
        assert result is None
    else:
        assert result.mode == "RGB"
        assert np.array_equal(np.asarray(result), GOLDEN[case])


def test_the_golden_file_covers_every_transform_and_a_image_that_is_left_out():
    assert {case.split(".")[1] for case in CASES} == {*TRANSFORMS, "scale"}
    assert any(GOLDEN[case].size == 0 for case in CASES)


@pytest.mark.parametrize(
    ("width", "height", "kept"), [(64, 64, True), (63, 64, False), (128, 96, True), (129, 95, False)]
)
def test_center_crop_wide_leaves_out_what_it_would_have_to_enlarge(width, height, kept):
    # The band of 64x48 in a WxH image has round(64 H / W) rows: 64, -, 48, 47.
    assert (center_crop_wide(PIL.Image.new("RGB", (width, height)), (64, 48)) is not None) == kept


def test_center_crop_wide_puts_black_bars_above_and_below():
    result = np.asarray(center_crop_wide(PIL.Image.new("RGB", (100, 100), "white"), (64, 48)))
    assert result.shape == (64, 64, 3)
    assert (result[8:56] == 255).all() and not result[:8].any() and not result[56:].any()


def test_what_comes_out_has_the_size_that_was_announced():
    source = PIL.Image.new("RGB", (150, 110))
    for name, transform in TRANSFORMS.items():
        size = (32, 16) if name == "center-crop-wide" else (32, 32)
        assert transform(source, size).size == result_size(name, size)
    assert result_size(None, None) is None


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("center-crop", None, "--transform=center-crop needs the size"),
        (None, (64, 48), "64x48 is not square; try 64x64"),
        ("center-crop-dhariwal", (64, 32), "not square"),
        ("center-crop-wide", (48, 64), "higher than wide"),
        ("center-crop-wide", (48, 32), "not a power of two, as networks need; try 64x64"),
        (None, (100, 100), "try 128x128"),
    ],
)
def test_sizes_that_cannot_be_trained_on_are_refused_with_one_that_can(name, size, told):
    with pytest.raises(ConfigError, match=told):
        result_size(name, size)


def test_images_that_keep_their_size_must_be_square_and_a_power_of_two():
    require_trainable_size((64, 64), "a.png")
    with pytest.raises(ConfigError, match=r"a.png is 60x40, .*not square; add --resolution=32x32 --transform"):
        require_trainable_size((60, 40), "a.png")
    with pytest.raises(ConfigError, match=r"a.png is 28x28, .*not a power of two; add --resolution=32x32, for example"):
        require_trainable_size((28, 28), "a.png")
