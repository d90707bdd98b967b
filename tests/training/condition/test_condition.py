"""What a network is conditioned on: the text that names it, the images that it makes, and masks by position."""

import numpy as np
import pytest
import torch

from dnnlib.errors import ConfigError
from training.condition.masks import NUM_DRAWS, random_masks, uniform_of
from training.condition.spec import Inpaint, LowRes, parse_condition
from training.run.batch_inputs import condition_images
from training.run.streams import NoiseStream

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("lowres:4", LowRes(factor=4)),
        ("inpaint", Inpaint()),
        ("inpaint:0.1-0.5", Inpaint()),
        ("inpaint:.25-1", Inpaint(least=0.25, most=1)),
    ],
)
def test_a_text_names_a_condition_and_the_condition_gives_it_back(text, condition):
    assert parse_condition(text) == condition == parse_condition(str(condition))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "lowres:FACTOR"),
        ("lowres", "lowres:FACTOR"),
        ("lowres:x4", "lowres:FACTOR"),
        ("lowres:1", "from 2 to 256"),
        ("lowres:999", "from 2 to 256"),
        ("inpaint:0.5", "inpaint:MIN-MAX"),
        ("inpaint:0-0.5", "0 < MIN <= MAX <= 1"),
        ("inpaint:0.6-0.5", "0 < MIN <= MAX <= 1"),
        ("inpaint:0.6-1.5", "0 < MIN <= MAX <= 1"),
        ("colour\n:1", "unknown"),
    ],
)
def test_other_texts_are_refused_with_what_would_be_right(text, word):
    with pytest.raises(ConfigError) as error:
        parse_condition(text)
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_lowres_is_the_rounded_mean_of_areas_and_its_own_small_picture(factor):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, [5, 3, 12, 24])
    clean = torch.from_numpy(pixels).float() / 127.5 - 1
    condition = LowRes(factor=factor)
    areas = pixels.reshape(5, 3, 12 // factor, factor, 24 // factor, factor).sum((3, 5))
    levels = (2 * areas + factor**2) // (2 * factor**2)  # halves up, in whole numbers
    small = condition.reduce(clean)
    assert np.array_equal(((small + 1) * 127.5).round().numpy(), levels)
    assert torch.equal(small, torch.from_numpy(levels).float() / 127.5 - 1)  # as out of a file of 8 bits
    seen = condition.images(clean, None, 0.5)
    assert seen.shape == clean.shape == (5, condition.channels(3), 12, 24)
    assert torch.equal(condition.images(seen, None, 0.5), seen)
    assert torch.equal(seen[:, :, ::factor, ::factor], small)


def test_lowres_needs_sides_that_it_divides():
    LowRes(factor=4).check_size(8, 32)
    with pytest.raises(ConfigError, match=r"lowres:4 .* 6x8 pixels; use lowres:2"):
        LowRes(factor=4).check_size(8, 6)
    Inpaint().check_size(7, 5)


def test_inpaint_hides_pixels_and_says_where():
    clean = torch.randn(2, 3, 4, 4)
    hidden = torch.rand(2, 1, 4, 4) < 0.5
    seen = Inpaint().images(clean, hidden, 0.5)
    assert seen.shape == (2, Inpaint().channels(3), 4, 4)
    where = hidden.expand_as(clean)
    assert bool((seen[:, :3][where] == 0).all()) and torch.equal(seen[:, :3][~where], clean[~where])
    assert torch.equal(seen[:, 3:] == 0.5, hidden) and torch.equal(seen[:, 3:] == -0.5, ~hidden)


@pytest.mark.parametrize(("size", "least", "most"), [((16, 16), 0.1, 0.5), ((12, 20), 0.3, 0.3), ((8, 8), 0.5, 1.0)])
def test_masks_hide_the_share_that_was_asked_for(size, least, most):
    uniform = torch.rand(400, NUM_DRAWS, generator=torch.Generator().manual_seed(0))
    masks = random_masks(uniform, size, least=least, most=most)
    assert masks.shape == (400, 1, *size) and masks.dtype == torch.bool
    shares, wanted = masks.float().mean((1, 2, 3)), least + (most - least) * uniform[:, 0]
    # More by what lies at the same distance as the last pixel: a side of each of three rectangles at the most.
    extra = shares - wanted
    assert float(extra.min()) >= -1e-6 and float(extra.max()) < 3 * 2 / min(size)
    assert float(extra.mean()) < 1.5 / min(size)
    assert float(shares.min()) >= least - 1e-6


def test_masks_differ_are_everywhere_and_of_both_kinds():
    uniform = torch.rand(400, NUM_DRAWS, generator=torch.Generator().manual_seed(0))
    masks = random_masks(uniform, (16, 16), least=0.1, most=0.5)[:, 0]
    assert len(torch.unique(masks.flatten(1), dim=0)) > 390
    often = masks.float().mean(0)
    assert float(often.min()) > 0.1 and float(often.max()) < 0.6
    # A single rectangle is all pixels whose row and whose column has one that is hidden; a stroke hardly ever is.
    boxes = masks.any(1)[:, None, :] & masks.any(2)[:, :, None]
    is_box = (boxes == masks).flatten(1).all(1)
    one_rectangle = (uniform[:, 1] < 0.5) & (uniform[:, 2] < 1 / 3)
    assert bool(is_box[one_rectangle].all()) and float(is_box[uniform[:, 1] >= 0.5].float().mean()) < 0.2


def test_the_extremes_of_random_numbers_make_masks_too():
    for value in (0.0, 1.0):
        masks = random_masks(torch.full([1, NUM_DRAWS], value), (8, 8), least=0.1, most=0.5)
        assert 0 < int(masks.sum()) < 64
    normal = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])
    torch.testing.assert_close(uniform_of(normal), torch.distributions.Normal(0, 1).cdf(normal))


def test_what_is_seen_belongs_to_the_position_in_the_run():
    """However many processes share a batch, an image has the same mask; the next one has another."""
    clean = torch.randn(24, 1, 8, 8)
    for condition in (Inpaint(), LowRes(factor=2)):
        whole = condition_images(condition, clean, NoiseStream(3, CPU), 48, 0.5)
        for parts in (2, 3, 24):
            shares = [
                condition_images(condition, part, NoiseStream(3, CPU), 48 + rank * len(part), 0.5)
                for rank, part in enumerate(clean.chunk(parts))
            ]
            assert torch.equal(torch.cat(shares), whole)
    masks = condition_images(Inpaint(), clean, NoiseStream(3, CPU), 48, 0.5)[:, -1]
    later = condition_images(Inpaint(), clean, NoiseStream(3, CPU), 72, 0.5)[:, -1]
    other = condition_images(Inpaint(), clean, NoiseStream(4, CPU), 48, 0.5)[:, -1]
    assert not any(torch.equal(a, b) or torch.equal(a, c) for a, b, c in zip(masks, later, other, strict=True))
