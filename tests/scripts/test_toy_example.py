"""The toy example as users run it: sampling, measures, training, the figure and the two commands."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open

import toy_example
from dnnlib.errors import ConfigError
from tests.helpers.paths import GOLDEN_DIR
from training.presets import locate
from training.sampling.options import HeunOptions
from training.toy import sample as toy_sample
from training.toy import toy_plot
from training.toy.mixture import gt
from training.toy.sample import density_threshold, do_sample, fidelity, thin
from training.toy.toy_files import load_toy_model
from training.toy.train import ToyConfig, ToyRun

SNAPSHOT = GOLDEN_DIR / "snapshots" / "toy.pkl"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few samples, coarse images, no display, and an own folder to write to."""
    monkeypatch.setattr(toy_plot, "_NUM_WIDE", 200)
    monkeypatch.setattr(toy_plot, "_NUM_CLOSE", 50)
    monkeypatch.setattr(toy_plot, "_NUM_CELLS", 20)
    monkeypatch.setattr(toy_sample, "_THRESHOLD_SAMPLES", 2000)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)


def run(*args: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(toy_example.cmdline, args)


def test_the_published_network_gives_the_published_samples(golden) -> None:
    reference, _ = golden("toy.safetensors")
    x_init = reference["model.x"] * 5
    trajectories = do_sample(load_toy_model(SNAPSHOT), x_init, num_steps=8)
    wanted = reference["model.sample"]
    assert trajectories.shape == (9, 64, 2)
    torch.testing.assert_close(trajectories[0], x_init)
    assert (trajectories[-1] - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_trajectories_are_made_of_heun_steps() -> None:
    """Each state follows from the one before it by the formula; exact scores end on the tree."""
    truth = gt("A")
    x_init = truth.sample(500, 5.0, torch.Generator().manual_seed(1))
    path = do_sample(truth, x_init, num_steps=12)
    sigmas = [(5 ** (1 / 7) + i / 11 * (0.002 ** (1 / 7) - 5 ** (1 / 7))) ** 7 for i in range(12)]
    for i in (0, 5, 10):
        step = sigmas[i + 1] - sigmas[i]
        slope = -sigmas[i] * truth.score(path[i], sigmas[i])
        slope_next = -sigmas[i + 1] * truth.score(path[i] + step * slope, sigmas[i + 1])
        torch.testing.assert_close(path[i + 1], path[i] + step * (slope + slope_next) / 2, rtol=1e-4, atol=1e-4)
    assert (truth.logp(path[-1]) > -5).all()  # on the tree or very near


def test_guidance_extrapolates_from_the_guide_through_the_network() -> None:
    net, guide = gt("A"), gt("AB")
    x_init = net.sample(50, 5.0, torch.Generator().manual_seed(1))
    blend = types.SimpleNamespace(score=lambda x, s: 3 * net.score(x, s) - 2 * guide.score(x, s))
    guided = do_sample(net, x_init, 3, guide, num_steps=6)
    torch.testing.assert_close(guided, do_sample(blend, x_init, num_steps=6), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(do_sample(net, x_init, 1, guide, num_steps=6), do_sample(net, x_init, num_steps=6))


def test_thinned_points_keep_their_distance_and_are_as_many_as_fit() -> None:
    points = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    kept = thin(points, 0.1)
    distances = torch.cdist(kept, kept) + torch.eye(len(kept))
    assert distances.min() >= 0.1
    assert torch.cdist(points, kept).min(1).values.max() < 0.1
    assert 20 < len(kept) < 150


def test_the_measures_count_what_is_off_the_tree_and_what_is_hit(monkeypatch) -> None:
    monkeypatch.setattr(toy_sample, "_THRESHOLD_SAMPLES", 20_000)
    truth = gt("A")
    threshold = density_threshold(truth)
    true = truth.sample(20_000, generator=torch.Generator().manual_seed(3))
    assert fidelity(truth, true, threshold).off_tree == pytest.approx(0.001, abs=0.0008)
    assert fidelity(truth, true, threshold).outside == pytest.approx(0.01, abs=0.003)
    # The first ten branches' components by their means, and as many points that are far from all.
    points = torch.cat([truth.mu[:80], torch.full((80, 2), 7.0)])
    measured = fidelity(truth, points)
    assert measured.off_tree == measured.outside == 0.5
    assert measured.components == 80 / 1016
    assert measured.branches == 10 / 127
    assert fidelity(truth, torch.full((3, 2), 9.0), threshold).branches == 0


def test_training_learns_repeats_itself_and_names_its_files(tmp_path) -> None:
    config = ToyConfig(num_layers=2, hidden_dim=16, num_iters=60, batch=256, snapshot=25, seed=4)
    steps = list(ToyRun(config, tmp_path / "run" / "iter{:04d}.pkl"))
    assert len(steps) == len(ToyRun(config)) == 60
    paths = [step.path for step in steps if step.path is not None]
    assert [path.name for path in paths] == ["iter0025.pkl", "iter0050.pkl", "iter0060.pkl"]
    losses = torch.stack([step.loss for step in steps])
    assert losses[-10:].mean() < 0.75 * losses[:10].mean()
    again = list(ToyRun(config))
    assert torch.equal(losses, torch.stack([step.loss for step in again]))
    assert again[-1].path is None
    # The file has the average that the run ended with.
    x = torch.rand(5, 2)
    assert torch.equal(load_toy_model(paths[-1]).score(x, 0.1), again[-1].net.score(x, 0.1))


def test_the_loss_is_the_weighted_error_of_the_score() -> None:
    """At the start the network is a single Gaussian of variance 1/4 + sigma**2, for which the loss is known."""
    truth = gt("A")
    first = next(iter(ToyRun(ToyConfig(batch=20_000, num_iters=1))))
    generator = torch.Generator().manual_seed(8)
    sigma = (-2.3 + 1.5 * torch.randn(20_000, generator=generator)).exp()
    x = truth.sample(20_000, sigma, generator)
    error = -x / (0.25 + sigma.square())[:, None] - truth.score(x, sigma)
    assert float(first.loss) == pytest.approx(float((sigma.square() * error.square().mean(1)).mean()), rel=0.03)


def test_the_learning_rate_falls_with_the_square_root_of_time(monkeypatch) -> None:
    seen: list[float] = []
    step = torch.optim.Adam.step

    def recorded(self: Any, *args: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    list(ToyRun(ToyConfig(num_layers=1, hidden_dim=2, batch=1, num_iters=17, lr_decay=4)))
    assert seen[:5] == [0.01] * 5
    assert seen[16] == pytest.approx(0.01 / 2)


@pytest.mark.usefixtures("small")
def test_without_a_display_plot_writes_a_file_and_says_where() -> None:
    result = run("plot")
    assert result.exit_code == 0, result.output
    assert "Wrote toy-example.png" in result.output
    lines = result.output.splitlines()
    assert re.split(r"  +", lines[0].strip()) == ["off the tree", "outside 99 %", "components hit", "branches hit"]
    assert [line.split("  ")[0] for line in lines[1:4]] == ["true samples", "without guidance", "guidance 3"]
    with Image.open("toy-example.png") as image:
        assert image.size == (1600, 840)
    assert [path.name for path in Path().iterdir()] == ["toy-example.png"]


@pytest.mark.usefixtures("small")
def test_plot_takes_other_networks_strength_and_file() -> None:
    options = ["--guidance=2.5", "--interval=0.01,0.1", "--save=out/figure.svg"]
    result = run("plot", f"--net={SNAPSHOT}", f"--gnet={SNAPSHOT}", *options)
    assert result.exit_code == 0, result.output
    assert "guidance 2.5 in (0.01, 0.1]" in result.output
    text = Path("out", "figure.svg").read_text(encoding="utf-8")
    assert text.startswith("<?xml")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save=figure.doc"], r"figure.doc lacks the suffix of an image; use one of .*png"),
        (["--net=none.pkl"], r"'none.pkl' does not exist"),
        (["--guidance=nan"], r"guidance=nan must be a finite number"),
        (["--interval=2,1"], r"interval 2,1 must be two noise levels LO,HI"),
        (["--device=abacus"], r"--device=abacus is not a device"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_writes_nothing(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_example.cmdline.main(["plot", *options], standalone_mode=False)
    assert not list(Path().iterdir())


@pytest.mark.usefixtures("small")
def test_train_writes_files_that_plot_reads() -> None:
    trained = run("train", "--outdir=run", "--cls=AB", "--layers=1", "--dim=4", "--iters=2", "--format=safetensors")
    assert trained.exit_code == 0, trained.output
    assert sorted(path.name for path in Path("run").iterdir()) == ["iter0002.safetensors", "training.png"]
    assert len(load_toy_model("run/iter0002.safetensors").layers) == 3
    assert run("plot", "--net=run/iter0002.safetensors", "--save=a.png").exit_code == 0


@pytest.mark.usefixtures("small")
def test_do_train_returns_the_network_and_without_a_folder_writes_nothing() -> None:
    net = toy_example.do_train("A", 1, 4, 64, 1)
    assert net.score(torch.zeros(3, 2), 0.5).shape == (3, 2)
    assert not list(Path().iterdir())


@pytest.mark.usefixtures("small")
def test_do_train_takes_the_published_arguments_in_their_order() -> None:
    net = toy_example.do_train("B", 1, 4, 64, 5, 7, -2, 1.2, 0.4, 0.02, 8, 0.05, "run/%d.safetensors", 2, None, "cpu")
    assert sorted(path.name for path in Path("run").iterdir()) == ["2.safetensors", "4.safetensors", "5.safetensors"]
    assert (net.sigma_data, len(net.layers)) == (0.4, 3)
    with safe_open("run/2.safetensors", framework="pt") as file:
        info = json.loads(file.metadata()["info"])
    assert info == {
        "classes": "B", "num_layers": 1, "hidden_dim": 4, "batch": 64, "num_iters": 5, "seed": 7, "P_mean": -2,
        "P_std": 1.2, "sigma_data": 0.4, "lr": 0.02, "lr_decay": 8, "ema_std": 0.05, "snapshot": 2, "iteration": 2,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"iter.pkl names one file for all iterations; use e.g. iter%04d.pkl"):
        toy_example.do_train(pkl_pattern="iter.pkl")


@pytest.mark.usefixtures("small")
def test_a_folder_of_any_name_is_trained_into() -> None:
    for name in ("50%d{x}", "{:d}"):
        trained = run("train", f"--outdir={name}", "--viz=0", "--layers=1", "--dim=4", "--iters=1")
        assert trained.exit_code == 0, trained.output
        assert [path.name for path in Path(name).iterdir()] == ["iter0001.pkl"]


@pytest.mark.usefixtures("small")
def test_do_plot_draws_a_panel_on_the_current_axes() -> None:
    from matplotlib import pyplot

    net, guide = (load_toy_model(SNAPSHOT) for _ in range(2))
    small = {"grid_resolution": 20, "num_samples": 30}
    for elems in ({"gt_uncond", "gt_outline", "samples"}, {"density_net", "arrows_net", "paths"}, {"density_ratio"}):
        figure, axes = pyplot.subplots()
        toy_example.do_plot(net, 2, guide, elems, 0.45, 1.22, 0.3, **small, sigma_max=0.03, sample_distance=0.01)
        assert axes.get_xlim() == pytest.approx((0.15, 0.75)) and axes.get_ylim() == pytest.approx((0.92, 1.52))
        assert axes.lines or axes.collections
        pyplot.close(figure)
    axes = Figure().subplots()
    toy_example.do_plot(num_samples=30, grid_resolution=20, ax=axes)  # the true distribution
    assert len(axes.lines[0].get_xdata()) == 30
    assert not list(Path().iterdir())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"elems": {"sample"}}, r"unknown element 'sample'; choose from density_net, .*samples, paths"),
        ({"elems": {"density_guide"}}, r"densities and scores of a guide need one; add gnet"),
        ({"guidance": 2}, r"guidance=2 needs a guiding network"),
    ],
)
def test_a_panel_that_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_example.do_plot(num_samples=8, grid_resolution=4, ax=Figure().subplots(), **options)


def test_guidance_below_a_noise_level_is_none_above_it() -> None:
    net, guide = gt("A"), gt("AB")
    x_init = net.sample(20, 5.0, torch.Generator().manual_seed(1))
    path = do_sample(net, x_init, 3, guide, 12, interval=(0, 0.5))
    plain, guided = do_sample(net, x_init, num_steps=12), do_sample(net, x_init, 3, guide, 12)
    limit = sum(sigma > 0.55 for sigma in HeunOptions(num_steps=12, sigma_max=5).sigmas())
    torch.testing.assert_close(path[: limit + 1], plain[: limit + 1])
    assert not torch.equal(path[-1], plain[-1]) and not torch.equal(path[-1], guided[-1])


@pytest.mark.usefixtures("small")
def test_with_a_display_windows_are_shown_and_no_file_is_written(monkeypatch) -> None:
    """A backend that looks like one with windows, and notes when they are shown."""
    shown: list[str] = []

    class Manager(FigureManagerBase):
        def show(self) -> None:
            shown.append("window")

        @classmethod
        def pyplot_show(cls, *, block: bool | None = None) -> None:
            shown.append("until closed")

    class Canvas(FigureCanvasAgg):
        required_interactive_framework = "headless"
        manager_class = Manager

    backend: Any = types.ModuleType("window_backend")
    backend.FigureCanvas, backend.FigureManager = Canvas, Manager
    monkeypatch.setitem(sys.modules, "window_backend", backend)
    from matplotlib import pyplot

    pyplot.switch_backend("module://window_backend")
    try:
        assert "Wrote" not in run("plot").output
        assert shown == ["window", "until closed"]
        assert run("plot", "--save=a.png").exit_code == 0
        assert run("train", "--outdir=run", "--dim=4", "--iters=1").exit_code == 0
    finally:
        pyplot.switch_backend("agg")
    assert len(shown) == 4
    assert sorted(path.name for path in Path().rglob("*.*")) == ["a.png", "iter0001.pkl"]


def test_a_display_that_cannot_be_opened_is_reported_in_one_line(monkeypatch) -> None:
    from matplotlib import pyplot

    def refuse(**options: Any) -> Figure:
        raise ImportError("Cannot load backend 'TkAgg'")

    monkeypatch.setattr(pyplot, "figure", refuse)
    with pytest.raises(ConfigError, match=r"cannot open a window \(Cannot load backend 'TkAgg'\); unset MPLBACKEND"):
        toy_example.cmdline.main(["plot"], standalone_mode=False)


@pytest.mark.parametrize("name", [toy_example.NET, toy_example.GNET])
def test_the_shipped_networks_are_small(name) -> None:
    path = Path(locate(name))
    assert path.stat().st_size < 100_000
    assert load_toy_model(path).gain != 0


def test_with_the_shipped_networks_guidance_leaves_fewer_samples_off_the_tree_and_no_large_branch_empty() -> None:
    truth = gt("A")
    net, guide = (load_toy_model(locate(name)) for name in (toy_example.NET, toy_example.GNET))
    x_init = truth.sample(4096, 5.0, torch.Generator().manual_seed(1))
    threshold = density_threshold(truth)
    samples = {guidance: do_sample(net, x_init, guidance, guide)[-1] for guidance in (1, 3)}
    assert fidelity(truth, samples[3], threshold).off_tree < 0.75 * fidelity(truth, samples[1], threshold).off_tree
    # A branch and what grows out of it are listed together: 31 to each branch of the third generation.
    branch = truth.component(samples[3][truth.logp(samples[3]) > threshold]) // 8
    trees = [start for side in (1, 64) for start in (side + 1, side + 32)]
    assert all(((branch >= start) & (branch < start + 31)).sum() > 100 for start in trees)
