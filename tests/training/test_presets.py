"""The preset tables against the figures of the papers."""

import math

import pytest

from dnnlib.errors import ConfigError
from training.presets import (
    GENERATION,
    MODEL_ROOT,
    REPOSITORY_DIR,
    TRAINING,
    generation_preset,
    locate,
    training_preset,
)
from training.sampling.options import HeunOptions
from training.sampling.request import resolve_sampling

PUBLISHED = {name: row for name, row in GENERATION.items() if name.startswith("edm2-")}


def test_the_names_are_those_of_the_published_readme():
    families = [
        (["xs", "s", "m", "l", "xl", "xxl"], "edm2-img512-{}-{}", ["fid", "dino"]),
        (["s", "m", "l", "xl"], "edm2-img64-{}-{}", ["fid"]),
        (["xs", "s", "m", "l", "xl", "xxl"], "edm2-img512-{}-guid-{}", ["fid", "dino"]),
        (["s", "xxl"], "edm2-img512-{}-guid-interval-{}", ["fid", "dino"]),
        (["s", "xxl"], "edm2-img512-{}-autog-{}", ["fid", "dino"]),
        (["s-uncond"], "edm2-img512-{}-autog-{}", ["fid", "dino"]),
        (["s"], "edm2-img64-{}-autog-{}", ["fid", "dino"]),
    ]
    names = {form.format(size, goal) for sizes, form, goals in families for size in sizes for goal in goals}
    assert set(PUBLISHED) == names


def test_a_guided_row_is_what_the_published_readme_spells_out():
    row = generation_preset("edm2-img512-xxl-guid-dino")
    assert row.net == MODEL_ROOT + "edm2-img512-xxl-0939524-0.015.pkl"
    assert row.gnet == MODEL_ROOT + "edm2-img512-xs-uncond-2147483-0.015.pkl"
    assert (row.guidance, row.metric, row.score) == (1.7, "fd_dinov2", 33.09)


def test_the_rows_are_the_papers_figures():
    # Sums over the columns, so that a slip of a digit anywhere shows.
    fid = [row for row in PUBLISHED.values() if row.metric == "fid"]
    dino = [row for row in PUBLISHED.values() if row.metric == "fd_dinov2"]
    assert (len(fid), len(dino)) == (22, 18)
    assert math.fsum(row.score or 0 for row in fid) == pytest.approx(40.09 + 1.68 + 1.40)
    assert math.fsum(row.score or 0 for row in dino) == pytest.approx(835.81 + 46.25 + 29.16)
    assert math.fsum(row.guidance for row in PUBLISHED.values() if row.gnet) == pytest.approx(
        36.85 + 2.1 + 3.2 + 2.0 + 2.9
    )
    stds = [float(url[-9:-4]) for row in PUBLISHED.values() for url in (row.net, row.gnet) if url]
    kimgs = [int(url[-17:-10]) for row in PUBLISHED.values() for url in (row.net, row.gnet) if url]
    assert len(stds) == len(kimgs) == 64
    assert math.fsum(stds) == pytest.approx(4.66 + 2 * (0.025 + 0.085 + 0.015 + 0.015))
    assert sum(kimgs) == 87107275 + 2 * (2147483 + 939524) + 4 * 2147483


@pytest.mark.parametrize("goal", ["fid", "dino"])
@pytest.mark.parametrize("size", ["s", "xxl"])
def test_guidance_in_an_interval_uses_the_networks_of_guidance_everywhere(size: str, goal: str):
    limited = generation_preset(f"edm2-img512-{size}-guid-interval-{goal}")
    everywhere = generation_preset(f"edm2-img512-{size}-guid-{goal}")
    assert (limited.net, limited.gnet, limited.metric) == (everywhere.net, everywhere.gnet, everywhere.metric)
    expected = {
        ("s", "fid"): ((0.28, 2.90), 2.1, 1.68),
        ("s", "dino"): ((0.60, 5.00), 3.2, 46.25),
        ("xxl", "fid"): ((0.19, 1.61), 2.0, 1.40),
        ("xxl", "dino"): ((0.60, 5.00), 2.9, 29.16),
    }
    assert (limited.interval, limited.guidance, limited.score) == expected[size, goal]


@pytest.mark.parametrize(
    ("preset", "first", "last"),
    [("s-guid-interval-fid", 15, 21), ("s-guid-interval-dino", 13, 19), ("xxl-guid-interval-fid", 17, 22),
     ("xxl-guid-interval-dino", 13, 19)],
)  # fmt: skip
def test_guidance_in_an_interval_guides_the_steps_of_the_paper(preset: str, first: int, last: int):
    sampler = resolve_sampling(preset=f"edm2-img512-{preset}").sampler
    assert sampler.guided_steps == list(range(first, last + 1))
    # With 64 steps the levels 2 i of 63 are near the levels i of 31: about twice the steps.
    steps = resolve_sampling(preset=f"edm2-img512-{preset}", num_steps=64).sampler.guided_steps
    levels = [sigma for i, sigma in enumerate(HeunOptions(num_steps=64).sigmas()) if i in steps]
    low, high = HeunOptions().sigmas()[last + 1], HeunOptions().sigmas()[first]
    assert len(steps) == pytest.approx(2 * (last + 1 - first), abs=1)
    assert all(low < level <= high for level in levels)


def test_a_row_has_a_guide_exactly_where_it_has_guidance():
    for row in GENERATION.values():
        assert (row.gnet is None) == (row.guidance == 1)


def test_shipped_files_lie_in_the_repository_and_urls_stay():
    assert locate("models/net.safetensors") == str(REPOSITORY_DIR / "models" / "net.safetensors")
    assert (REPOSITORY_DIR / "training" / "presets.py").is_file()
    assert locate("https://example.com/net.pkl") == "https://example.com/net.pkl"
    for row in GENERATION.values():
        for place in (row.net, row.gnet):
            assert place is None or place.startswith("https://") or (REPOSITORY_DIR / place).is_file()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("edm2-img512-xxs", (2048 * 2**20, 64, 0.0170, 70000, 0, -0.4, 1.0)),
        ("edm2-img512-xs", (2048 * 2**20, 128, 0.0120, 70000, 0, -0.4, 1.0)),
        ("edm2-img512-s", (2048 * 2**20, 192, 0.0100, 70000, 0, -0.4, 1.0)),
        ("edm2-img512-m", (2048 * 2**20, 256, 0.0090, 70000, 0.10, -0.4, 1.0)),
        ("edm2-img512-l", (1792 * 2**20, 320, 0.0080, 70000, 0.10, -0.4, 1.0)),
        ("edm2-img512-xl", (1280 * 2**20, 384, 0.0070, 70000, 0.10, -0.4, 1.0)),
        ("edm2-img512-xxl", (896 * 2**20, 448, 0.0065, 70000, 0.10, -0.4, 1.0)),
        ("edm2-img64-xs", (1024 * 2**20, 128, 0.0120, 35000, 0, -0.8, 1.6)),
        ("edm2-img64-s", (1024 * 2**20, 192, 0.0100, 35000, 0, -0.8, 1.6)),
        ("edm2-img64-m", (2048 * 2**20, 256, 0.0090, 35000, 0.10, -0.8, 1.6)),
        ("edm2-img64-l", (1024 * 2**20, 320, 0.0080, 35000, 0.10, -0.8, 1.6)),
        ("edm2-img64-xl", (640 * 2**20, 384, 0.0070, 35000, 0.10, -0.8, 1.6)),
    ],
)
def test_training_rows_are_the_papers(name: str, expected: tuple[float, ...]):
    row = training_preset(name)
    net = row.network
    assert (row.duration, net.channels, row.lr, row.decay, net.dropout, row.P_mean, row.P_std) == expected
    assert (row.batch, row.rampup, row.ema_stds) == (2048, 10, (0.050, 0.100))
    assert (net.channel_mult, net.num_blocks, net.attn_resolutions) == ((1, 2, 3, 4), 3, (16, 8))


def test_there_are_no_other_training_rows_of_that_name():
    assert sum(name.startswith("edm2-") for name in TRAINING) == 12


@pytest.mark.parametrize("look_up", [generation_preset, training_preset])
def test_an_unknown_preset_is_refused_with_similar_names(look_up):
    with pytest.raises(ConfigError, match=r"unknown .* preset 'edm2-img512-sx.*'; .*edm2-img512-xs"):
        look_up("edm2-img512-sx" + ("-fid" if look_up is generation_preset else ""))
    with pytest.raises(ConfigError, match="such as"):
        look_up("?")
